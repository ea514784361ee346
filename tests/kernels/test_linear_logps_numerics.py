"""Rounding of linear_logps against float64: extreme logits, low precision, exactly equal bits."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fastrl_kernels import LinearLogps, LMHead, linear_logps
from fastrl_kernels.linear_logps import linear_logps_reference

S = 37


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fill what torch.empty returns with NaN, and refuse operations without a fixed order."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def leaves(hidden: Tensor, head: LMHead) -> list[Tensor]:
    tensors = (hidden, head.weight, head.bias, head.lora_a, head.lora_b)
    return [tensor.requires_grad_() for tensor in tensors if tensor is not None]


def gradients(out: LinearLogps, tensors: list[Tensor], seed: int = 9) -> tuple[Tensor, ...]:
    """Gradients of a random weighting of logps and entropies."""
    weights = normal(torch.Generator().manual_seed(seed), 2, S).to(out.logps.dtype)
    return torch.autograd.grad((out.logps, out.entropies), tensors, tuple(weights))


def extreme_inputs(dtype: torch.dtype, case: str) -> tuple[Tensor, LMHead, Tensor]:
    """Logits up to 50, all shifted by 30 either way, or peaked, in the given dtype."""
    generator = torch.Generator().manual_seed(3)
    hidden = normal(generator, S, 64)
    weight = normal(generator, 1501, 64) / 8
    logits = hidden @ weight.T
    bias = torch.zeros(1501, dtype=torch.float64)
    if case == "large":
        weight *= 50 / logits.abs().max()
    elif case == "peaked":
        hidden[:, 0] = 8
        weight[700] *= 0
        weight[700, 0] = 4
    else:
        bias += {"up": 30.0, "down": -30.0}[case]
    target_ids = torch.randint(0, 1501, (S,), generator=generator)
    target_ids[::3] = 700
    target_ids[::7] = -1
    return hidden.to(dtype), LMHead(weight.to(dtype), bias.to(dtype)), target_ids


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["large", "up", "down", "peaked"])
def test_low_precision_inputs_against_float64(dtype: torch.dtype, case: str) -> None:
    hidden, head, target_ids = extreme_inputs(dtype, case)
    wide = LMHead(head.weight.double(), head.bias.double())  # type: ignore[union-attr]
    truth = linear_logps_reference(hidden.double(), wide, target_ids)
    out = linear_logps(hidden, head, target_ids, workspace_mb=1)
    assert truth.lse.abs().max() < 60
    for name in ("logps", "entropies", "lse", "sum_p2", "sum_p3"):
        error = (getattr(out, name).double() - getattr(truth, name)).abs()
        assert error.median() <= 1e-5, name
        assert error.max() <= 1e-4, name
    assert torch.equal(out.argmax_ids, truth.argmax_ids)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", ["large", "up", "down", "peaked"])
def test_gradients_err_at_most_three_times_as_much_as_pytorch(
    dtype: torch.dtype, case: str
) -> None:
    hidden, head, target_ids = extreme_inputs(dtype, case)
    wide = LMHead(head.weight.double(), head.bias.double())  # type: ignore[union-attr]
    wide_leaves = leaves(hidden.double(), wide)
    truth = gradients(linear_logps_reference(wide_leaves[0], wide, target_ids), wide_leaves)
    tensors = leaves(hidden, head)
    ours = gradients(linear_logps(hidden, head, target_ids, workspace_mb=1), tensors)
    naive = gradients(linear_logps_reference(hidden, head, target_ids), tensors)
    for grad, pytorch_grad, expected in zip(ours, naive, truth, strict=True):
        assert grad.dtype == dtype
        error = (grad.double() - expected).abs().max()
        assert error <= 3 * (pytorch_grad.double() - expected).abs().max()


@pytest.mark.parametrize("batch_invariant", [True, False])
def test_same_inputs_give_the_same_bits(batch_invariant: bool) -> None:
    hidden, head, target_ids = extreme_inputs(torch.float32, "large")
    tensors = leaves(hidden, head)

    def run() -> list[Tensor]:
        out = linear_logps(
            hidden, head, target_ids, workspace_mb=0.5, batch_invariant=batch_invariant
        )
        return [*out, *gradients(out, tensors)]

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("workspace_mb", "num_threads"), [(0.25, 1), (0.5, 1), (1, 2), (256, 1)])
def test_batch_invariant_row_alone_and_in_a_batch(
    dtype: torch.dtype, workspace_mb: float, num_threads: int
) -> None:
    torch.set_num_threads(num_threads)
    hidden, head, target_ids = extreme_inputs(dtype, "large")
    hidden.requires_grad_()

    def run(rows: slice | list[int]) -> list[Tensor]:
        out = linear_logps(
            hidden[rows],
            head,
            target_ids[rows],
            temperature=0.9,
            workspace_mb=workspace_mb,
            batch_invariant=True,
        )
        loss = out.logps.sum() + 0.1 * out.entropies.sum()
        (grad,) = torch.autograd.grad(loss, hidden)
        return [*out, grad[rows]]

    together = run(slice(None))
    for rows in ([0], [1], [16], [35], [36], [36, 5, 21], list(range(11, 28))):
        for alone, batch in zip(run(rows), together, strict=True):
            assert torch.equal(alone, batch[rows])
