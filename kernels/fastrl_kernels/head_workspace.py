"""What the head's kernels take on a GPU beside inputs and outputs, from shapes alone.

S selected tokens, D hidden, V vocabulary without padding, R rows of a chunk, r rank of the adapter.
"""

from collections.abc import Sequence

import torch

from fastrl_kernels.launch import NUM_SUMS, cdiv, hidden_blocks, split_columns
from fastrl_kernels.linear_logps.launch import MAX_ROWS as MAX_FORWARD_ROWS
from fastrl_kernels.linear_logps.launch_backward import MAX_ROWS as MAX_BACKWARD_ROWS
from fastrl_kernels.plan import MIB, Shape, make_plan
from fastrl_kernels.policy_loss.launch import ENOUGH_PROGRAMS, MAX_SPLITS, products_for

ORDER_BYTES = 32
"""Of a row: its place among those that count, and what sorting takes to find it."""


def bytes_inside(
    engine: str, shape: Shape, workspace_mb: float, *, needs_grad: Sequence[bool]
) -> int:
    """Of `policy_loss` in one pass, of `linear_logps` ("forward") or of its gradients ("backward").

    needs_grad: in the order of `Gradients`.
    """
    inside = {"one_pass": _one_pass, "forward": _forward, "backward": _backward}[engine]
    return ORDER_BYTES * shape.num_tokens + inside(shape, int(workspace_mb * MIB), needs_grad)


def _forward(shape: Shape, workspace: int, needs_grad: Sequence[bool]) -> int:
    num_splits = cdiv(shape.vocab_size, split_columns())
    row_bytes = 4 * (NUM_SUMS * num_splits + 2 * shape.hidden_size)
    rows = max(1, min(MAX_FORWARD_ROWS, workspace // row_bytes, shape.num_tokens))
    return rows * 4 * NUM_SUMS * num_splits + _adapted_bytes(shape, rows)


def _one_pass(shape: Shape, workspace: int, needs_grad: Sequence[bool]) -> int:
    """The logits of a chunk, sums over the vocabulary, and the chunk's hidden gradients."""
    D, S = shape.hidden_size, shape.num_tokens
    rows = min(make_plan("one_pass", shape, workspace, False).rows, S)
    total = rows * shape.vocab_size * 4 + 12 * S + _adapted_bytes(shape, rows)
    if products_for("auto", shape.dtype) == "cublas":
        chunk = rows * D * shape.dtype.itemsize
        sums = rows * D * 4 if needs_grad[0] else 0
        return total + chunk + sums + rows * 4 * NUM_SUMS
    total += rows * 4 * NUM_SUMS * cdiv(shape.vocab_size, split_columns())
    if needs_grad[0]:
        # The last chunk has fewer rows, and may share out the vocabulary to more programs.
        total += max(_hidden_sums(shape, rows), _hidden_sums(shape, S % max(1, rows)))
    return total


def _hidden_sums(shape: Shape, rows: int) -> int:
    """Hidden gradients of some rows over the splits of the vocabulary, their sum, and rounded."""
    D = shape.hidden_size
    blocks = hidden_blocks(shape.dtype, torch.device("cuda"), shape.vocab_size)
    num_programs = max(1, cdiv(rows, blocks.rows) * cdiv(D, blocks.columns))
    num_splits = max(1, min(MAX_SPLITS, ENOUGH_PROGRAMS // num_programs))
    return rows * D * (4 * (num_splits + (num_splits > 1)) + shape.dtype.itemsize)


def _backward(shape: Shape, workspace: int, needs_grad: Sequence[bool]) -> int:
    """Gradients of hidden states that add up over slices, one slice of logits and of the weight."""
    D, S, itemsize = shape.hidden_size, shape.num_tokens, shape.dtype.itemsize
    block = max(1, workspace // 4 // (4 * D))
    rows = min(S, block) if needs_grad[0] else S
    size = max(1, min(MAX_BACKWARD_ROWS, workspace // 4 // (split_columns() * itemsize)))
    total = min(size, S) * split_columns() * itemsize + 12 * S
    if needs_grad[1] and itemsize < 4:
        total += min(split_columns(), shape.vocab_size) * D * 4
    if needs_grad[0]:
        total += rows * D * (4 + itemsize)
    return total + 2 * _adapted_bytes(shape, rows)


def _adapted_bytes(shape: Shape, rows: int) -> int:
    """Hidden states after the first half of an adapter, and that half transposed."""
    return 4 * rows * shape.rank + shape.rank * shape.hidden_size * shape.dtype.itemsize
