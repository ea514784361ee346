"""`linear_logps` in PyTorch, forward: row chunks, each with all of the vocabulary.

S selected tokens, D hidden, V vocabulary without padding, R rows of a chunk.
"""

import torch

from fastrl_kernels.chunks import (
    Inputs,
    entropy,
    fill_logits,
    gather,
    logits_buffer,
    power_sums,
    softmax_,
    split,
    worthwhile_rows,
)
from fastrl_kernels.head import accumulation_dtype
from fastrl_kernels.linear_logps.reference import LinearLogps
from fastrl_kernels.plan import MIB, forward_plan, shape_of


def forward(inputs: Inputs, *, workspace_mb: float, batch_invariant: bool) -> LinearLogps:
    """Statistics of every row; shapes and meaning as in `linear_logps`."""
    shape = shape_of(inputs.hidden_states, inputs.head)
    plan = forward_plan(shape, int(workspace_mb * MIB), batch_invariant)
    out = _empty_outputs(inputs)
    row_ids = worthwhile_rows(inputs.target_ids >= 0)
    buffer = logits_buffer(inputs, plan.rows, row_ids, batch_invariant)
    for ids, num_rows in split(row_ids, plan.rows, batch_invariant):
        chunk = gather(inputs, ids, num_rows)
        logits = buffer[: ids.shape[0]]
        fill_logits(logits, chunk, inputs, plan.columns, padded=batch_invariant)
        stats = softmax_(logits, chunk.target_ids, wants_argmax=True)
        sums = (entropy(logits, plan.columns), *power_sums(logits, plan.columns))
        values = (stats.logps[:, 0], sums[0], stats.lse[:, 0], sums[1], sums[2])
        for column, value in zip(out, (*values, stats.argmax_ids), strict=True):
            value = value.flatten().masked_fill_(chunk.ignored, 0)  # type: ignore[union-attr]
            column[ids[:num_rows]] = value[:num_rows]
    return out


def _empty_outputs(inputs: Inputs) -> LinearLogps:
    """Zeros in the shapes and dtypes of the result."""
    hidden, num_tokens = inputs.hidden_states, inputs.hidden_states.shape[0]
    dtype = accumulation_dtype(hidden.dtype)
    values = [hidden.new_zeros(num_tokens, dtype=dtype) for _ in range(5)]
    return LinearLogps._make([*values, torch.zeros_like(inputs.target_ids)])
