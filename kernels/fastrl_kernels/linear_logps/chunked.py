"""`linear_logps` in PyTorch, forward: row chunks, each with all of the vocabulary.

S selected tokens, D hidden, V vocabulary without padding, R rows of a chunk.
"""

from fastrl_kernels.chunks import (
    Inputs,
    Statistics,
    empty_statistics,
    fill_logits,
    gather,
    logits_buffer,
    split,
    statistics_,
    worthwhile_rows,
)
from fastrl_kernels.plan import MIB, make_plan, shape_of


def forward(inputs: Inputs, *, workspace_mb: float, batch_invariant: bool) -> Statistics:
    """Statistics of every row that has a target; the rest are zero."""
    shape = shape_of(inputs.hidden_states, inputs.head)
    plan = make_plan("forward", shape, int(workspace_mb * MIB), batch_invariant)
    out = empty_statistics(inputs.hidden_states, inputs.target_ids)
    row_ids = worthwhile_rows(inputs.target_ids >= 0)
    buffer = logits_buffer(inputs, plan.rows, row_ids, batch_invariant)
    for ids, num_rows in split(row_ids, plan.rows, batch_invariant):
        chunk = gather(inputs, ids, num_rows)
        logits = buffer[: ids.shape[0]]
        fill_logits(logits, chunk, inputs, plan.columns, padded=batch_invariant)
        for column, value in zip(
            out, statistics_(logits, chunk.target_ids, plan.columns), strict=True
        ):
            column[ids[:num_rows]] = value.masked_fill(chunk.ignored, 0)[:num_rows]
    return out
