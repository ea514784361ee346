"""`policy_loss` on a GPU in one pass: products, the fix-up kernel, products.

Products either gather the rows that count ("gather", Triton) or take whole chunks ("cublas").
S selected tokens, D hidden, V vocabulary without padding, R rows of a chunk, r rank of the adapter.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastrl_kernels.chunks import Chunk, Inputs, column_slices, gather, low_rank
from fastrl_kernels.gathered_products import (
    Gathered,
    active_slots,
    adapted_rows,
    add_hidden_gradients,
    unit_of,
)
from fastrl_kernels.head import LMHead
from fastrl_kernels.launch import (
    NUM_SUMS,
    Rows,
    cdiv,
    hidden_blocks,
    objective_arguments,
    parts,
    power_of_2,
    row_block,
    row_chunks,
    rows_where,
    split_columns,
)
from fastrl_kernels.linear_logps.launch import dense_inputs, write_sums
from fastrl_kernels.linear_logps.launch_backward import add_head_gradients, finish_hidden
from fastrl_kernels.objectives import Objective, Parameter
from fastrl_kernels.objectives.objective import is_zero
from fastrl_kernels.plan import MIB, Plan, make_plan, shape_of
from fastrl_kernels.policy_loss.kernel import fix_up_kernel, gradients_kernel
from fastrl_kernels.policy_loss.one_pass import Losses, Tokens, empty_losses, empty_sums
from fastrl_kernels.policy_loss.reference import PolicyLoss
from fastrl_kernels.products import HALF, add_product, write_product
from fastrl_kernels.selected_logps.kernel import stored_logits_kernel
from fastrl_kernels.sweep import Gradients, head_sums
from fastrl_kernels.sweep import add_head_gradients as add_dense_gradients

MAX_SPLITS = 4  # of the sum over the vocabulary that gives the hidden gradients
ENOUGH_PROGRAMS = 256


def products_for(products: str, dtype: torch.dtype, batch_invariant: bool = False) -> str:
    """Who multiplies: tensor cores take half precision, so for the rest the library is faster.

    The library's way depends on the number of rows, and with it the bits of each.
    """
    if products == "cublas" and batch_invariant:
        raise ValueError(
            'batch_invariant needs products="gather" on a GPU, got "cublas", whose sums depend on '
            "the number of rows; use auto"
        )
    if products != "auto":
        return products
    return "gather" if dtype in HALF or batch_invariant else "cublas"


def one_pass(
    inputs: Inputs, tokens: Tokens, objective: Objective, entropy_coef: Parameter, *,
    needs_grad: list[bool], workspace_mb: float, products: str = "auto",
    batch_invariant: bool = False,
) -> tuple[PolicyLoss, Gradients]:  # fmt: skip
    """As `one_pass.one_pass`, without waiting for the device."""
    products = products_for(products, inputs.hidden_states.dtype, batch_invariant)
    inputs = dense_inputs(inputs)
    tokens = Tokens._make(None if x is None else x.contiguous() for x in tokens)
    shape = shape_of(inputs.hidden_states, inputs.head)
    shape = shape._replace(trains_hidden=needs_grad[0], trains_weight=needs_grad[1])
    plan = make_plan(
        "one_pass" if any(needs_grad) else "forward", shape, int(workspace_mb * MIB),
        batch_invariant,
    )  # fmt: skip
    out = empty_losses(inputs)
    sums = empty_sums(inputs, needs_grad)
    num_tokens = inputs.hidden_states.shape[0]
    if num_tokens:
        run = _Run(
            inputs, tokens, objective, entropy_coef, plan, sums, out,
            entropy_slopes=torch.zeros_like(out.slopes),
            lse=torch.zeros_like(out.slopes),
            residuals=torch.zeros_like(out.slopes),
            one=torch.ones_like(out.slopes[:1]),
            is_dense=products == "cublas",
            wants_gradients=any(needs_grad),
            batch_invariant=batch_invariant,
        )  # fmt: skip
        rows = rows_where((inputs.target_ids >= 0) & (tokens.weights != 0))
        buffer = inputs.hidden_states.new_empty(
            min(plan.rows, num_tokens), shape.vocab_size, dtype=torch.float32
        )
        for chunk in row_chunks(rows, plan.rows):
            run.chunk(chunk, buffer[: chunk.ids.shape[0]])
    return PolicyLoss(out.values.sum(), out.logps, out.entropies, out.slopes, out.clipped), sums


class _Run(NamedTuple):
    """All that the chunks of one call share."""

    inputs: Inputs
    tokens: Tokens
    objective: Objective
    entropy_coef: Parameter
    plan: Plan
    sums: Gradients
    out: Losses
    entropy_slopes: Tensor  # (S,)
    lse: Tensor  # (S,)
    residuals: Tensor  # (S,) what rounding took from lse
    one: Tensor  # (1,)
    is_dense: bool
    wants_gradients: bool
    batch_invariant: bool

    def chunk(self, rows: Rows, logits: Tensor) -> None:
        """Loss and gradients of some rows; logits: (R, V) float32 room for theirs."""
        dtype = self.inputs.hidden_states.dtype
        gradients = logits.view(dtype)[:, : logits.shape[1]]
        if self.is_dense:
            dense = gather(self.inputs, rows.ids, rows.ids.shape[0])
            # Rows of weight 0 may hold anything, and zero times NaN would reach the weight.
            counts = torch.arange(rows.ids.shape[0], device=rows.ids.device) < rows.num_rows
            dense.hidden_states.masked_fill_(~counts[:, None], 0)
            sums = self.dense_sums(dense, rows, logits)
            self.fix_up(rows, sums, logits, gradients, wants_gradients=self.wants_gradients)
            if self.wants_gradients:
                self.dense_gradients(dense, gradients)
            return
        sums = write_sums(self.inputs, rows, logits if self.wants_gradients else None)
        is_narrow = dtype == torch.float16
        wants_gradients = self.wants_gradients and not is_narrow
        self.fix_up(rows, sums, logits, gradients, wants_gradients=wants_gradients)
        unit = self.one
        if self.wants_gradients and is_narrow:
            slopes = torch.stack([self.out.slopes[rows.ids], self.entropy_slopes[rows.ids]])
            unit = unit_of(slopes, dtype)
            self.write_gradients(rows, logits, gradients, unit)
        if self.wants_gradients:
            self.gathered_gradients(rows, gradients, unit)

    def dense_sums(self, chunk: Chunk, rows: Rows, logits: Tensor) -> Tensor:
        """Fill the logits by whole products; statistics in progress of them."""
        inputs, head = self.inputs, self.inputs.head
        adapted = low_rank(chunk, head, padded=False)
        for part in parts(head, split_columns()):
            tile = logits[:, part.first_column :][:, : part.num_columns]
            write_product(tile, chunk.hidden_states, part.weight.T)
            if adapted is not None and part.lora_b is not None:
                lora_b = part.lora_b.to(adapted.dtype)
                add_product(tile, adapted, lora_b.T, scale=head.lora_scale)
        num_rows = rows.ids.shape[0]
        sums = logits.new_empty(1, NUM_SUMS, num_rows)
        stored_logits_kernel[(num_rows,)](
            logits, head.bias, rows.ids, rows.num_rows, inputs.target_ids, inputs.temperatures,
            sums, num_rows, head.num_columns, logits.stride(0), float(head.logit_scale),
            float(head.softcap or 1.0), BY_SLOT=True, HAS_BIAS=head.bias is not None,
            HAS_SOFTCAP=head.softcap is not None, REWRITE=_is_rewritten(head), **row_block(),
        )  # fmt: skip
        return sums

    def fix_up(
        self, rows: Rows, sums: Tensor, logits: Tensor, gradients: Tensor, *, wants_gradients: bool
    ) -> None:
        """Statistics to losses and slopes; logits to their gradients."""
        inputs, tokens, out = self.inputs, self.tokens, self.out
        num_tokens = inputs.hidden_states.shape[0]
        parameters, constants = objective_arguments(self.objective, self.entropy_coef, num_tokens)
        fix_up_kernel[(rows.ids.shape[0],)](
            sums, logits, gradients, rows.ids, rows.num_rows, inputs.target_ids,
            inputs.temperatures,
            tokens.advantages, tokens.weights, tokens.old_logps, tokens.ref_logps,
            tokens.rollout_weights, out.values, out.logps, out.entropies, self.lse,
            self.residuals, out.slopes,
            self.entropy_slopes, out.clipped,
            parameters, sums.shape[2], sums.shape[0], logits.shape[1],
            logits.stride(0), gradients.stride(0), float(inputs.head.logit_scale),
            float(inputs.head.softcap or 1.0),
            **constants, HAS_OLD=tokens.old_logps is not None,
            HAS_REF=tokens.ref_logps is not None, HAS_ROLLOUT=tokens.rollout_weights is not None,
            HAS_SOFTCAP=inputs.head.softcap is not None, GRADIENTS=wants_gradients,
            DENSE=self.is_dense, IS_RAW=self.is_dense and not _is_rewritten(inputs.head),
            BLOCK_SPLITS=power_of_2(sums.shape[0]), **row_block(),
        )  # fmt: skip

    def write_gradients(self, rows: Rows, logits: Tensor, gradients: Tensor, unit: Tensor) -> None:
        """Logits to their gradients in place, in units of `unit` (1,)."""
        head = self.inputs.head
        gradients_kernel[(rows.ids.shape[0],)](
            logits, gradients, rows.ids, rows.num_rows, self.inputs.target_ids,
            self.inputs.temperatures, self.out.slopes, self.entropy_slopes, self.out.logps,
            self.out.entropies, self.lse, self.residuals, unit, logits.shape[1], logits.stride(0),
            gradients.stride(0),
            float(head.logit_scale), float(head.softcap or 1.0),
            HAS_SOFTCAP=head.softcap is not None, **row_block(),
        )  # fmt: skip

    def gathered_gradients(self, rows: Rows, gradients: Tensor, unit: Tensor) -> None:
        """Take the rows with a gradient through the products."""
        inputs, head = self.inputs, self.inputs.head
        entropy_slopes = None if is_zero(self.entropy_coef) else self.entropy_slopes
        slots, count = active_slots(rows.ids, rows.num_rows, self.out.slopes, entropy_slopes)
        adapted = adapted_rows(inputs, rows)
        hidden_sum = adapted_sum = None
        if self.sums.hidden_states.numel():
            hidden_sum = self.room(rows, inputs.hidden_states.shape[1])
        if head.lora_b is not None and (hidden_sum is not None or self.sums.lora_a.numel()):
            adapted_sum = self.room(rows, head.lora_b.shape[1])
        for part in parts(head, split_columns()):
            columns = slice(part.first_column, part.first_column + part.num_columns)
            chunk = Gathered(gradients[:, columns], slots, count, unit)
            sums = head_sums(self.sums, columns)
            add_head_gradients(sums, chunk, inputs, rows, adapted, head.lora_scale)
            is_first = part.first_column == 0
            if hidden_sum is not None:
                add_hidden_gradients(hidden_sum, chunk, part.weight, is_first=is_first)
            if adapted_sum is not None and part.lora_b is not None:
                add_hidden_gradients(adapted_sum, chunk, part.lora_b, is_first=is_first)
        finish_hidden(self.sums, hidden_sum, adapted_sum, inputs, rows.ids[slots.long()])

    def room(self, rows: Rows, width: int) -> Tensor:
        """(splits, R, width) for sums over the vocabulary, split until the device is full.

        Bits depend on the number of splits, and that on the chunk's rows: on those of a full one
        where a row is to be the same in any batch.
        """
        hidden = self.inputs.hidden_states
        blocks = hidden_blocks(hidden.dtype, hidden.device, self.inputs.head.num_columns)
        num_rows = self.plan.rows if self.batch_invariant else rows.ids.shape[0]
        num_programs = cdiv(num_rows, blocks.rows) * cdiv(width, blocks.columns)
        num_splits = max(1, min(MAX_SPLITS, ENOUGH_PROGRAMS // num_programs))
        shape = (num_splits, rows.ids.shape[0], width)
        return hidden.new_empty(shape, dtype=torch.float32)

    def dense_gradients(self, chunk: Chunk, gradients: Tensor) -> None:
        """Take all rows through the products; those without a gradient are zero."""
        head = self.inputs.head
        hidden_sum = None
        if self.sums.hidden_states.numel():
            hidden_sum = torch.zeros_like(chunk.hidden_states, dtype=torch.float32)
        adapted = low_rank(chunk, head, padded=False)
        # An adapter's gradients take a float32 copy of the logits', which is not made of all.
        is_whole = isinstance(head.weight, Tensor) and head.lora_b is None
        width = head.num_columns if is_whole else split_columns()
        for columns in column_slices(head.num_columns, width):
            add_dense_gradients(
                head_sums(self.sums, columns), hidden_sum, gradients[:, columns], chunk, head,
                columns, adapted, padded=False,
            )  # fmt: skip
        if hidden_sum is not None:
            dtype = self.sums.hidden_states.dtype
            self.sums.hidden_states.index_copy_(0, chunk.row_ids, hidden_sum.to(dtype))


def _is_rewritten(head: LMHead) -> bool:
    """Whether a bias or a softcap changes the logits before the fix-up reads them."""
    return head.bias is not None or head.softcap is not None
