"""Which engine runs, how many rows and columns of logits are alive at once, what that takes.

S selected tokens, D hidden, V vocabulary without padding, r rank of the adapter. One matrix product
with the head is 2 S V D floating-point operations. Engines:

forward      2 SVD        statistics only, row chunks
one_pass     (2 + 4a) SVD row chunks; the gradient is made while the logits are there
min_memory   (2 + 6a) SVD statistics first; backward makes the logits of vocabulary slices again

where a is the fraction of rows with a gradient, and one product less each for a frozen head and for
hidden states without gradient. `one_pass` adds every chunk to a float32 gradient of the whole
weight; `min_memory` writes each row of it once.
"""

from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor

from fastrl_kernels.head import LMHead, accumulation_dtype, as_lm_head
from fastrl_kernels.products import HALF, TILE, round_up

MIB = 2**20
ENGINES = ("auto", "one_pass", "min_memory")
# Rows that share each slice of the weight; more would only take memory.
MAX_ROWS = {"cpu": 256, "cuda": 4096}
LIBRARY_SHARE = 8  # an eighth of the workspace is left to buffers of the libraries below
MAX_TILE_ROWS = 4096  # of min_memory
SLICE = 2048  # columns of a slice in min_memory; the gradients of hidden states add up over slices
SCALARS_PER_ROW = 32  # ids, temperatures, maxima, sums and slopes of one row
# Operations that a device does in the time of moving one byte: the price of adding every chunk to
# the gradient of the weight. Ratios of a 2-core CPU (measured) and of data sheets (H100, H200).
FLOPS_PER_BYTE = {"cpu": 15, "cuda": 150}
meant_device: ContextVar[str] = ContextVar("meant_device", default="cpu")
"""Type of the device that tensors on "meta" stand for."""


class Shape(NamedTuple):
    """Everything about a call that its plan depends on."""

    num_tokens: int
    hidden_size: int
    vocab_size: int
    rank: int = 0
    dtype: torch.dtype = torch.float32
    trains_hidden: bool = True
    trains_weight: bool = True
    device: str = "cpu"

    @property
    def itemsize(self) -> int:
        """Bytes of an element of the sums."""
        return accumulation_dtype(self.dtype).itemsize


class Plan(NamedTuple):
    """How one call runs."""

    engine: str
    """"forward", "one_pass" or "min_memory"."""
    rows: int
    """Rows of logits alive at once; with `batch_invariant` the last chunk is filled up to it."""
    columns: int
    """Columns of the weight in one matrix product."""
    workspace_bytes: int
    """Most memory the call takes, outputs and gradients apart."""
    gradient_bytes: int
    """Gradients in the dtypes of their tensors."""
    flops: int
    """Operations of the matrix products when every row has a gradient."""


def shape_of(hidden_states: Tensor, lm_head: LMHead | Tensor) -> Shape:
    """Read off tensors, real or fake; what requires no gradient is not trained."""
    head = as_lm_head(lm_head)
    weight, device = head.weight, hidden_states.device.type
    return Shape(
        num_tokens=hidden_states.shape[0],
        hidden_size=hidden_states.shape[1],
        vocab_size=head.num_columns,
        rank=0 if head.lora_a is None else head.lora_a.shape[0],
        dtype=hidden_states.dtype,
        trains_hidden=hidden_states.requires_grad,
        trains_weight=isinstance(weight, Tensor) and weight.requires_grad,
        device=meant_device.get() if device == "meta" else device,
    )


def explain(
    hidden_states: Tensor,
    lm_head: LMHead | Tensor,
    *,
    engine: str = "auto",
    workspace_mb: float = 256,
    batch_invariant: bool = False,
) -> Plan:
    """The plan that `policy_loss` follows for these inputs; tensors on "meta" will do.

    What requires a gradient is read off the tensors. Where nothing does, the plan is that of the
    statistics alone, which `linear_logps` follows too.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine must be one of {', '.join(ENGINES)}, got {engine!r}; use auto")
    shape = shape_of(hidden_states, lm_head)
    workspace = int(workspace_mb * MIB)
    head = as_lm_head(lm_head)
    if not any(isinstance(x, Tensor) and x.requires_grad for x in (hidden_states, *head)):
        return make_plan("forward", shape, workspace, batch_invariant)
    if engine != "auto":
        return make_plan(engine, shape, workspace, batch_invariant)
    plan = _plan("one_pass", shape, workspace, batch_invariant)
    other = _plan("min_memory", shape, workspace, batch_invariant)
    if plan.rows >= 1 and (other.rows < 1 or _cost(plan, shape) <= _cost(other, shape)):
        return plan
    return make_plan("min_memory", shape, workspace, batch_invariant)


def make_plan(engine: str, shape: Shape, workspace: int, batch_invariant: bool) -> Plan:
    """The plan of an engine in so many bytes, "forward" included; raises where they are too few."""
    plan = _plan(engine, shape, workspace, batch_invariant)
    if plan.rows >= 1:
        return plan
    size = max(workspace, MIB // 1024) / MIB
    while _plan(engine, shape, int(float(f"{size:.3g}") * MIB), batch_invariant).rows < 1:
        size *= 1.25
    raise ValueError(
        f"workspace_mb must hold one row of {shape.vocab_size} logits, got {workspace / MIB:.3g}; "
        f"give it at least {size:.3g}"
    )


def _plan(engine: str, shape: Shape, workspace: int, batch_invariant: bool) -> Plan:
    """The same, with no rows where the workspace is too small."""
    if engine != "min_memory":
        return _row_chunks(engine, shape, workspace, batch_invariant)
    forward = _row_chunks("forward", shape, workspace, batch_invariant)
    columns = _slice_columns(shape, workspace)
    rows, sweep_bytes = _sweep_rows(shape, workspace, columns, batch_invariant)
    return Plan(
        engine="min_memory",
        rows=rows if forward.rows >= 1 else 0,
        columns=columns,
        workspace_bytes=max(forward.workspace_bytes, sweep_bytes),
        gradient_bytes=_gradient_bytes(shape),
        flops=_flops("min_memory", shape, workspace),
    )


def hidden_block(shape: Shape, workspace: int) -> int:
    """Rows whose hidden gradients add up at once in `min_memory`; all where no sum is kept apart.

    Half-precision gradients add up in float32 beside the result. Where those of all rows would take
    more than a quarter of the workspace, blocks of rows go through the vocabulary one by one, and
    the weight's gradient takes a pass of its own: 2 SVD more instead of memory without bound.
    """
    if shape.dtype not in HALF or not shape.trains_hidden:
        return max(1, shape.num_tokens)
    rows = workspace // 4 // (shape.hidden_size * shape.itemsize)
    return max(1, min(shape.num_tokens, rows))


def _row_chunks(engine: str, shape: Shape, workspace: int, batch_invariant: bool) -> Plan:
    columns = _slice_columns(shape, workspace)
    width = _width(shape)
    # The buffer; three slices of columns for elementwise work or copies to multiples of TILE.
    row_values = shape.vocab_size + 3 * columns + 6 * width + SCALARS_PER_ROW
    row_bytes = row_values * shape.itemsize
    fixed_bytes = _fixed_bytes(shape, columns)
    if engine == "one_pass":
        fixed_bytes += _accumulator_bytes(shape)
    workspace -= workspace // LIBRARY_SHARE
    rows = max(0, min(MAX_ROWS.get(shape.device, 256), (workspace - fixed_bytes) // row_bytes))
    if rows > TILE:
        rows -= rows % TILE
    used = rows if batch_invariant else min(rows, round_up(shape.num_tokens))
    return Plan(
        engine=engine,
        rows=rows,
        columns=columns,
        workspace_bytes=used * row_bytes + fixed_bytes,
        gradient_bytes=_gradient_bytes(shape) if engine == "one_pass" else 0,
        flops=_flops(engine, shape, workspace),
    )


def _sweep_rows(
    shape: Shape, workspace: int, columns: int, batch_invariant: bool
) -> tuple[int, int]:
    """Rows of a tile of min_memory, and the bytes that its backward takes."""
    width = _width(shape)
    row_bytes = (4 * columns + 6 * width + SCALARS_PER_ROW) * shape.itemsize
    fixed_bytes = _fixed_bytes(shape, columns)
    if shape.dtype in HALF and shape.trains_hidden:
        fixed_bytes += hidden_block(shape, workspace) * shape.hidden_size * shape.itemsize
    rows = (workspace - workspace // LIBRARY_SHARE - fixed_bytes) // row_bytes
    rows = max(0, min(MAX_TILE_ROWS, rows - rows % TILE if rows > TILE else rows))
    used = rows if batch_invariant else min(rows, round_up(shape.num_tokens))
    return rows, used * row_bytes + fixed_bytes


def _slice_columns(shape: Shape, workspace: int) -> int:
    """Columns whose weights, with their gradient, take a quarter of the workspace at most."""
    affordable = workspace // 4 // (2 * _width(shape) * shape.itemsize)
    return min(round_up(shape.vocab_size), SLICE, max(TILE, affordable - affordable % TILE))


def _width(shape: Shape) -> int:
    return round_up(shape.hidden_size) + round_up(shape.rank)


def _fixed_bytes(shape: Shape, columns: int) -> int:
    """A slice of the weight and of its gradient, and what a product of one tile of rows takes."""
    width = _width(shape)
    slice_values = 2 * columns * width
    tile_values = TILE * (4 * columns + 6 * width)
    small_gradients = shape.vocab_size + shape.rank * width
    return (slice_values + tile_values + small_gradients) * shape.itemsize


def _accumulator_bytes(shape: Shape) -> int:
    """float32 sums of gradients that are half-precision in the end."""
    if shape.dtype not in HALF:
        return 0
    width = (shape.hidden_size if shape.trains_weight else 0) + shape.rank + 1
    return shape.vocab_size * width * shape.itemsize


def _gradient_bytes(shape: Shape) -> int:
    rows = shape.num_tokens * shape.trains_hidden + shape.vocab_size * shape.trains_weight
    adapter = shape.rank * (shape.hidden_size + shape.vocab_size)
    return (rows * shape.hidden_size + adapter) * shape.dtype.itemsize


def _flops(engine: str, shape: Shape, workspace: int) -> int:
    """Of the products with the head, adapters included, when every row has a gradient."""
    product = 2 * shape.num_tokens * shape.vocab_size * shape.hidden_size
    adapter = 2 * shape.num_tokens * (shape.vocab_size + shape.hidden_size) * shape.rank
    gradients = product * (shape.trains_hidden + shape.trains_weight) + 2 * adapter
    forwards = 2 if engine == "min_memory" else 1
    if engine == "min_memory" and hidden_block(shape, workspace) < shape.num_tokens:
        forwards += shape.trains_weight
    return forwards * (product + adapter) + (gradients if engine != "forward" else 0)


def _cost(plan: Plan, shape: Shape) -> float:
    """Operations, and the sums that leave the chip counted in operations."""
    sums = 2 * shape.hidden_size * shape.itemsize * FLOPS_PER_BYTE.get(shape.device, 15)
    if plan.engine == "one_pass":
        num_chunks = -(-shape.num_tokens // max(1, plan.rows))
        return plan.flops + sums * num_chunks * shape.vocab_size * shape.trains_weight
    num_slices = -(-shape.vocab_size // plan.columns)
    return plan.flops + sums * num_slices * shape.num_tokens * shape.trains_hidden
