"""What our own operations take inside, beside their inputs and outputs.

On a CPU the operation itself runs once on "meta", under a ledger of its own, on as many rows as
show its highest moment. On a GPU formulas beside the launches tell, `fastrl_kernels.head_workspace`
and `fastrl_kernels.segment_attention.workspace`.

Legend: S rows at the head, D hidden, V vocabulary, r rank of the adapter.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrl.memory.attention import attention_inside
from fastrl.memory.ledger import Inside, Kernel, Ledger, inside_of
from fastrl_kernels import LMHead
from fastrl_kernels.chunks import Inputs
from fastrl_kernels.head import accumulation_dtype
from fastrl_kernels.head_arguments import NUM_TENSORS
from fastrl_kernels.linear_logps import chunked
from fastrl_kernels.objectives import SURROGATES, Objective
from fastrl_kernels.plan import MIB, Shape, make_plan
from fastrl_kernels.policy_loss.one_pass import Tokens, one_pass
from fastrl_kernels.sweep import TokenSlopes, sweep

OBJECTIVE = Objective(SURROGATES["clipped_ratio"], (0.2, 0.2))
"""All objectives take a few numbers for each row of a chunk."""
CHUNKS = 2
"""Of rows that are shown, and what remains behind the last whole one: nothing else is different."""


class Head(NamedTuple):
    """What a call at the head depends on besides the number of its rows."""

    device: str
    engine: str  # as in `fastrl_kernels.plan`; "backward" for the second half of min_memory
    dtype: torch.dtype
    sizes: tuple[int, int, int]  # D, rows of the weight, r
    has_bias: bool
    logit_scale: float
    softcap: float | None
    vocab_size: int | None
    needs_grad: tuple[bool, ...]  # in the order of `Gradients`
    has_entropy: bool
    workspace_mb: float

    def shape(self, num_tokens: int) -> Shape:
        """As plans see it."""
        D, rows, rank = self.sizes
        return Shape(
            num_tokens, D, self.vocab_size or rows, rank, self.dtype,
            self.needs_grad[0], self.needs_grad[1], self.device,
        )  # fmt: skip

    def bytes_of(self, work: Any) -> int:
        """Of a pass."""
        return head_bytes(self._replace(workspace_mb=work.workspace_mb), work.num_rows)


@functools.lru_cache(maxsize=1024)
def head_bytes(head: Head, num_tokens: int) -> int:
    """Most bytes beside inputs and outputs."""
    if head.device == "cuda":
        from fastrl_kernels.head_workspace import bytes_inside

        return bytes_inside(
            head.engine, head.shape(num_tokens), head.workspace_mb, needs_grad=head.needs_grad
        )
    if head.engine == "backward":
        return _bytes_of_backward(head, num_tokens)
    plan = make_plan(head.engine, head.shape(num_tokens), int(head.workspace_mb * MIB), False)
    if num_tokens > CHUNKS * plan.rows:
        num_tokens = CHUNKS * plan.rows + num_tokens % plan.rows
    inputs, numbers = _inputs(head, num_tokens), _numbers(head, num_tokens)
    if head.engine == "forward" and not head.has_entropy:
        return inside_of(
            lambda: chunked.forward(inputs, workspace_mb=head.workspace_mb, batch_invariant=False)
        )
    tokens = Tokens(numbers, numbers, None, None, None)
    return inside_of(
        lambda: one_pass(
            inputs, tokens, OBJECTIVE, 0.01 * head.has_entropy, needs_grad=list(head.needs_grad),
            workspace_mb=head.workspace_mb, batch_invariant=False,
        )
    )  # fmt: skip


def _bytes_of_backward(head: Head, num_tokens: int) -> int:
    inputs, numbers = _inputs(head, num_tokens), _numbers(head, num_tokens)
    entropies = numbers if head.has_entropy else None
    slopes = TokenSlopes(numbers, entropies, numbers, numbers, numbers, numbers)
    return inside_of(
        lambda: sweep(
            slopes,
            inputs,
            needs_grad=list(head.needs_grad),
            workspace_mb=head.workspace_mb,
            batch_invariant=False,
        )
    )


def _inputs(head: Head, num_tokens: int) -> Inputs:
    D, rows, rank = head.sizes

    def empty(*size: int) -> Tensor:
        return torch.empty(size, dtype=head.dtype, device="meta")

    return Inputs(
        empty(num_tokens, D),
        LMHead(
            empty(rows, D), empty(rows) if head.has_bias else None,
            empty(rank, D) if rank else None, empty(rows, rank) if rank else None,
            logit_scale=head.logit_scale, softcap=head.softcap, vocab_size=head.vocab_size,
        ),
        torch.empty(num_tokens, dtype=torch.int64, device="meta"),
        _numbers(head, num_tokens),
    )  # fmt: skip


def _numbers(head: Head, num_tokens: int) -> Tensor:
    return torch.empty(num_tokens, dtype=accumulation_dtype(head.dtype), device="meta")


def _at_head(
    ledger: Ledger, engine: str, tensors: tuple[Any, ...], constants: tuple[Any, ...], *,
    needs_grad: tuple[bool, ...], has_entropy: bool, workspace_mb: float,
) -> Inside:  # fmt: skip
    """tensors: hidden states, weight, bias, lora_a, lora_b; constants: lora_scale and on."""
    hidden, weight, bias, lora_a, _ = tensors
    head = Head(
        ledger.device, engine, hidden.dtype,
        (hidden.shape[1], weight.shape[0], 0 if lora_a is None else lora_a.shape[0]),
        bias is not None, constants[1], constants[2], constants[3], needs_grad, has_entropy,
        workspace_mb,
    )  # fmt: skip
    return Inside("head", head_bytes(head, len(hidden)), head.bytes_of)


def _linear_logps(ledger: Ledger, args: tuple[Any, ...]) -> Inside:
    constants = args[NUM_TENSORS + 3 :]
    return _at_head(
        ledger, "forward", args[:5], constants,
        needs_grad=(False,) * 5, has_entropy=False, workspace_mb=constants[6],
    )  # fmt: skip


def _policy_loss(ledger: Ledger, args: tuple[Any, ...]) -> Inside:
    constants = args[NUM_TENSORS + 8 :]
    _functions, _counts, numbers, _tensors, workspace_mb, *_, needs_grad = constants[6:]
    return _at_head(
        ledger, "one_pass" if any(needs_grad) else "forward", args[:5], constants,
        # The weight of the entropy comes last; NaN where it is a tensor.
        needs_grad=tuple(needs_grad), has_entropy=numbers[-1] != 0, workspace_mb=workspace_mb,
    )  # fmt: skip


def _head_gradients(ledger: Ledger, args: tuple[Any, ...]) -> Inside:
    constants = args[10 + NUM_TENSORS :]
    return _at_head(
        ledger, "backward", args[7:12], constants,
        needs_grad=tuple(constants[-1]), has_entropy=args[2] is not None,
        workspace_mb=constants[6],
    )  # fmt: skip


KERNELS: dict[str, Kernel] = {
    "fastrl::linear_logps": _linear_logps,
    "fastrl::policy_loss": _policy_loss,
    "fastrl::head_gradients": _head_gradients,
    "fastrl::path_attention": functools.partial(attention_inside, is_backward=False),
    "fastrl::path_attention_gradients": functools.partial(attention_inside, is_backward=True),
}
