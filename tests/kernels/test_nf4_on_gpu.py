"""Heads and layers in 4 bits on a GPU: their rows bit for bit, losses at them, a step of adapters.

See gpu_sizes.py for a rehearsal on the CPU. S tokens, D hidden, V vocabulary, r rank.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastrl.optim import LeanAdamW
from fastrl_kernels import LMHead, linear_logps, policy_loss
from fastrl_kernels.nf4 import NF4Weight
from fastrl_kernels.objectives import Objective, clipped_ratio
from fastrl_kernels.policy_loss import policy_loss_reference
from tests.kernels.gpu_sizes import DEVICE, MARKS, make_generator, relative_error, sized

pytestmark = MARKS
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
GRPO = Objective(clipped_ratio, (0.2, 0.28))
GRADIENTS = {BF16: 1e-2, FP16: 2e-3, FP32: 1e-4}
ENGINES = [
    (BF16, {"engine": "one_pass", "products": "gather"}),
    (BF16, {"engine": "one_pass", "products": "cublas"}),
    (BF16, {"engine": "min_memory"}),
    (FP16, {"engine": "one_pass", "products": "gather"}),
    (FP16, {"engine": "min_memory"}),
    (FP32, {"engine": "min_memory"}),
]
BLOCK = 64


def four_bits(num_rows: int, width: int, dtype: torch.dtype, seed: int) -> NF4Weight:
    """Random bytes, whose values are of the size of a layer's weights."""
    generator, size = make_generator(seed), num_rows * width
    packed = torch.randint(256, (-(-size // 2),), generator=generator, device=DEVICE)
    absmax = torch.rand(-(-size // BLOCK), generator=generator, device=DEVICE)
    return NF4Weight(
        packed.to(torch.uint8), (0.5 + absmax) / width**0.5,
        torch.linspace(-1, 1, 16, device=DEVICE), BLOCK, num_rows, width, dtype,
    )  # fmt: skip


def on_cpu(weight: NF4Weight) -> NF4Weight:
    """The same bytes there."""
    return NF4Weight._make(x.cpu() if isinstance(x, Tensor) else x for x in weight)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_rows_have_the_bits_of_a_cpu(dtype: torch.dtype) -> None:
    num_rows, width = sized((5003, 203), (67, 19))
    weight = four_bits(num_rows, width, dtype, 0)
    whole = on_cpu(weight).rows(0, num_rows)
    for rows in ((0, num_rows), (num_rows // 3, num_rows // 2), (num_rows - 1, num_rows), (5, 5)):
        assert torch.equal(weight.rows(*rows).cpu(), whole[slice(*rows)])


def test_the_last_rows_of_more_than_two_to_the_31_values() -> None:
    num_rows, width = sized((262208, 8256), (203, 64))
    weight = four_bits(4, width, BF16, 0)  # repeated: random bytes would take 8 times the memory
    times = num_rows // 4 + 1
    weight = weight._replace(
        packed=weight.packed.repeat(times)[: num_rows * width // 2],
        absmax=weight.absmax.repeat(times)[: num_rows * width // BLOCK],
        num_rows=num_rows,
    )
    last = num_rows - 41  # no multiple of 4
    weight.absmax[last * width // BLOCK :] *= 3
    own = NF4Weight(
        weight.packed[last * width // 2 :], weight.absmax[last * width // BLOCK :],
        weight.codebook, BLOCK, 41, width, BF16,
    )  # fmt: skip
    assert torch.equal(weight.rows(last, num_rows).cpu(), on_cpu(own).rows(0, 41))


def head_case(dtype: torch.dtype) -> tuple[Tensor, LMHead, dict[str, Tensor]]:
    """Hidden states, a 4-bit head with an adapter, and what a policy loss takes of the tokens."""
    S, V, D = sized((515, 5003, 200), (17, 67, 19))
    generator = make_generator(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=DEVICE)

    weight = four_bits(V, D, dtype, 2)
    target_ids = torch.randint(V, (S,), generator=generator, device=DEVICE)
    target_ids[::13] = -1
    hidden = 2 * weight.rows(0, V).float()[target_ids] + 0.5 * normal(S, D)
    adapter = [(normal(8, D) / D**0.5).to(dtype), (0.2 * normal(V, 8)).to(dtype)]
    tokens = {
        "advantages": normal(S) * (torch.arange(S, device=DEVICE) % 3 > 0),
        "token_weights": torch.ones(S, device=DEVICE),  # means would be lost in float16
        "old_logps": -3 * torch.rand(S, generator=generator, device=DEVICE),
    }
    return hidden.to(dtype), LMHead(weight, None, *adapter), {"target_ids": target_ids, **tokens}


def leaves_of(hidden: Tensor, head: LMHead) -> tuple[list[Tensor], LMHead]:
    """What has a gradient: hidden states and the adapter, and the head that holds them."""
    leaves = [x.detach().requires_grad_() for x in (hidden, head.lora_a, head.lora_b)]  # type: ignore[union-attr]
    return leaves, head._replace(lora_a=leaves[1], lora_b=leaves[2])


def loss_and_gradients(
    function: Any, hidden: Tensor, head: LMHead, tokens: dict[str, Tensor], **settings: Any
) -> tuple[Any, list[Tensor]]:
    leaves, head = leaves_of(hidden, head)
    out = function(leaves[0], head, **tokens, objective=GRPO, **settings)
    return out, list(torch.autograd.grad(out.loss, leaves))


@pytest.mark.parametrize(("dtype", "engine"), ENGINES)
def test_policy_loss_at_a_4_bit_head(dtype: torch.dtype, engine: dict[str, str]) -> None:
    """Against float64 of the values that the bytes stand for; the same bits twice."""
    hidden, head, tokens = head_case(dtype)
    weight = head.weight
    assert isinstance(weight, NF4Weight)
    settings = {**engine, "workspace_mb": 24, "implementation": "triton"}
    out, gradients = loss_and_gradients(policy_loss, hidden, head, tokens, **settings)
    _, again = loss_and_gradients(policy_loss, hidden, head, tokens, **settings)
    wide = [x.double() for x in (weight.rows(0, weight.num_rows), head.lora_a, head.lora_b)]  # type: ignore[union-attr]
    dense = LMHead(wide[0], None, *wide[1:])
    truth, expected = loss_and_gradients(policy_loss_reference, hidden.double(), dense, tokens)
    for name in ("logps", "entropies"):
        assert (getattr(out, name) - getattr(truth, name)).abs().max() <= 1e-4
    for found, same, exact in zip(gradients, again, expected, strict=True):
        assert relative_error(found, exact) < GRADIENTS[dtype]
        assert torch.equal(found, same)


def in_float32(head: LMHead) -> LMHead:
    """With the adapter as it is trained: bfloat16 would lose small updates."""
    return head._replace(lora_a=head.lora_a.float(), lora_b=head.lora_b.float())  # type: ignore[union-attr]


def qlora_run(num_steps: int) -> tuple[list[float], list[Tensor], list[Tensor]]:
    """Losses, first gradients and last adapters of a layer and a head, both frozen in 4 bits."""
    hidden, head, tokens = head_case(BF16)
    width, rank = hidden.shape[1], 8
    layer = four_bits(width, width, BF16, 3)
    generator = make_generator(4)
    a = torch.randn(rank, width, generator=generator, device=DEVICE) / width**0.5
    b = torch.randn(width, rank, generator=generator, device=DEVICE) / 8
    (_, *adapter), head = leaves_of(hidden, in_float32(head))
    leaves = [a.requires_grad_(), b.requires_grad_(), *adapter]
    before = [layer.packed.clone(), head.weight.packed.clone()]  # type: ignore[union-attr]

    def states(dtype: torch.dtype) -> Tensor:
        adapted = hidden.to(dtype) @ a.to(dtype).T @ b.to(dtype).T
        return hidden.to(dtype) @ layer.rows(0, width).to(dtype).T + adapted

    with torch.no_grad():
        own = linear_logps(states(BF16), head, tokens["target_ids"], implementation="triton")
        tokens["old_logps"] = own.logps
    optimizer, losses, first = LeanAdamW(leaves, lr=1e-3), [], []
    for _ in range(num_steps):
        out = policy_loss(states(BF16), head, **tokens, objective=GRPO, implementation="triton")
        out.loss.backward()
        first = first or [leaf.grad.clone() for leaf in leaves]  # type: ignore[union-attr]
        losses.append(out.loss.item())
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(before[0], layer.packed)
    assert torch.equal(before[1], head.weight.packed)  # type: ignore[union-attr]
    return losses, first, [leaf.detach() for leaf in leaves]


def qlora_truth() -> list[Tensor]:
    """The first gradients in float64, of dense weights that hold the same numbers."""
    hidden, head, tokens = head_case(BF16)
    weight, width = head.weight, hidden.shape[1]
    assert isinstance(weight, NF4Weight)
    layer = four_bits(width, width, BF16, 3)
    generator = make_generator(4)
    a = torch.randn(8, width, generator=generator, device=DEVICE) / width**0.5
    b = torch.randn(width, 8, generator=generator, device=DEVICE) / 8
    wide = [x.double().requires_grad_() for x in (a, b, head.lora_a, head.lora_b)]  # type: ignore[union-attr]
    x = hidden.double()
    states = x @ layer.rows(0, width).double().T + x @ wide[0].T @ wide[1].T
    dense = LMHead(weight.rows(0, weight.num_rows).double(), None, *wide[2:])
    tokens.pop("old_logps")  # on-policy: every ratio is 1
    loss = policy_loss_reference(states, dense, **tokens, objective=GRPO).loss
    return list(torch.autograd.grad(loss, wide))


def test_steps_of_adapters_over_4_bits() -> None:
    losses, gradients, adapters = qlora_run(4)
    for found, exact in zip(gradients, qlora_truth(), strict=True):
        assert relative_error(found, exact) < 3e-2  # of products in bfloat16
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]
    again = qlora_run(4)
    assert again[0] == losses
    assert all(torch.equal(x, y) for x, y in zip(adapters, again[2], strict=True))
