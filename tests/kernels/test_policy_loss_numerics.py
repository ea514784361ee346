"""Rounding of policy_loss against float64: extreme logits, low precision, finite differences."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fastrl_kernels import LMHead, PolicyLoss
from fastrl_kernels.objectives import Objective, importance_ratio
from fastrl_kernels.plan import MIB, hidden_block, shape_of
from fastrl_kernels.policy_loss import policy_loss_reference
from tests.kernels.policy_cases import (
    ENGINES,
    TENSORS,
    Case,
    loss_and_gradients,
    make_case,
    normal,
    run,
)

S, D, V = 37, 64, 1501
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = ["large", "up", "down", "peaked", "peaked up", "peaked down"]


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fill what torch.empty returns with NaN, and refuse operations without a fixed order."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def extreme_case(shape: str, dtype: torch.dtype) -> Case:
    """Logits up to 50, shifted by 30 either way, or with p > 0.999; old_logps some way off."""
    generator = torch.Generator().manual_seed(3)
    hidden_states = normal(generator, S, D)
    weight = normal(generator, V, D) / 8
    bias = torch.zeros(V, dtype=torch.float64)
    target_ids = torch.randint(0, V, (S,), generator=generator)
    if shape == "large":
        weight *= 50 / (hidden_states @ weight.T).abs().max()
    if shape.startswith("peaked"):
        hidden_states[:, 0] = 8 + torch.rand(S, generator=generator, dtype=torch.float64)
        weight[:, 0] = 0
        weight[700] = 0
        weight[700, 0] = 2
        target_ids[::2] = 700
    bias += 30.0 * shape.endswith("up") - 30.0 * shape.endswith("down")
    target_ids[::7] = -1
    case = Case(
        hidden_states=hidden_states,
        head=LMHead(weight, bias),
        target_ids=target_ids,
        advantages=normal(generator, S),
        token_weights=torch.full((S,), 1 / S, dtype=torch.float64),
        old_logps=None,
        ref_logps=None,
        rollout_weights=None,
        temperature=1.0,
    ).to(dtype)
    logps = truth(case)[0].logps
    return case._replace(
        old_logps=logps + 0.2 * normal(generator, S), ref_logps=logps + 0.2 * normal(generator, S)
    )


def truth(case: Case, **settings: Any) -> tuple[PolicyLoss, tuple[Tensor, ...]]:
    """In float64, on the same rounded inputs."""
    settings = {"objective": Objective(importance_ratio), **settings}
    return loss_and_gradients(case.to(torch.float64), function=policy_loss_reference, **settings)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_are_as_extreme_as_they_claim(dtype: torch.dtype, shape: str) -> None:
    case = extreme_case(shape, dtype)
    wide = case.to(torch.float64)
    logits = wide.hidden_states @ wide.head.weight.T + wide.head.bias  # type: ignore
    peaks = logits.softmax(1).amax(1)
    if shape.startswith("peaked"):
        assert peaks.min() > 0.999
        assert peaks.max() < 1
    if shape.endswith(("up", "down")):
        assert logits.mean().abs() > 29
    assert logits.abs().max() <= 51


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_of_low_precision_inputs(engine: str, dtype: torch.dtype, shape: str) -> None:
    case = extreme_case(shape, dtype)
    expected, _ = truth(case)
    out = run(case, engine=engine, objective=Objective(importance_ratio), workspace_mb=2)
    for name in ("logps", "entropies"):
        assert getattr(out, name).dtype == torch.float32
        error = (getattr(out, name).double() - getattr(expected, name)).abs()
        assert error.median() <= 1e-5, name
        assert error.max() <= 1e-4, name


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_err_at_most_three_times_as_much_as_pytorch(
    engine: str, dtype: torch.dtype, shape: str
) -> None:
    case = extreme_case(shape, dtype)
    settings: dict[str, Any] = {"objective": Objective(importance_ratio), "entropy_coef": 0.05}
    _, expected = truth(case, **settings)
    _, grads = loss_and_gradients(case, engine=engine, workspace_mb=4, **settings)
    _, naive = loss_and_gradients(case, function=policy_loss_reference, **settings)
    for name, grad, other, exact in zip(TENSORS, grads, naive, expected, strict=False):
        assert grad.dtype == dtype
        error, allowed = (grad - exact).abs().max(), 3 * (other - exact).abs().max()
        assert error <= allowed, name


@pytest.mark.parametrize(
    "engine",
    [
        "one_pass",
        "min_memory",
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_sharp_tokens_alone(engine: str, dtype: torch.dtype) -> None:
    """All targets have p > 0.999, so that the gradient is the small difference 1 - p."""
    settings: dict[str, Any] = {"objective": Objective(importance_ratio), "entropy_coef": 0.0}
    for shape in ("peaked", "peaked up", "peaked down"):
        case = extreme_case(shape, dtype)
        case = case.rows(case.target_ids == 700)
        _, expected = truth(case, **settings)
        _, grads = loss_and_gradients(case, engine=engine, workspace_mb=4, **settings)
        _, naive = loss_and_gradients(case, function=policy_loss_reference, **settings)
        for name, grad, other, exact in zip(TENSORS, grads, naive, expected, strict=False):
            error, allowed = (grad - exact).abs().max(), 3 * (other - exact).abs().max()
            assert error <= allowed, (shape, name)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [2.0**14, 1 / 3])
def test_gradients_of_a_scaled_loss(engine: str, dtype: torch.dtype, scale: float) -> None:
    """As a GradScaler has it for half precision: 65536 tokens, whose shares underflow in fp16."""
    case = extreme_case("up", dtype)
    case = case._replace(token_weights=torch.full((S,), 2.0**-16, dtype=torch.float64))
    settings: dict[str, Any] = {"objective": Objective(importance_ratio)}
    grads = []
    for inputs, which in ((case.to(torch.float64), "truth"), (case, "naive"), (case, "ours")):
        options = {"engine": engine} if which == "ours" else {"function": policy_loss_reference}
        leaves = inputs.leaves()
        loss = run(inputs, **settings, **options).loss
        grads.append(torch.autograd.grad(loss * scale, leaves))
    for name, exact, other, grad in zip(TENSORS, *grads, strict=False):
        error, allowed = (grad - exact).abs().max(), 3 * (other - exact).abs().max()
        assert error <= allowed, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("workspace_mb", [0.09, 0.15, 0.2])
def test_hidden_gradients_block_by_block(dtype: torch.dtype, workspace_mb: float) -> None:
    """Where the float32 sums of all rows take too much, and the head has a pass of its own."""
    case = make_case(3, num_tokens=1031).to(dtype)
    leaves = case.leaves()
    block = hidden_block(shape_of(case.hidden_states, case.head), int(workspace_mb * MIB))
    num_counted = int(((case.target_ids >= 0) & (case.token_weights != 0)).sum())
    assert block < num_counted
    assert num_counted % block
    _, expected = loss_and_gradients(case.to(torch.float64), function=policy_loss_reference)
    _, naive = loss_and_gradients(case, function=policy_loss_reference)
    _, grads = loss_and_gradients(case, engine="min_memory", workspace_mb=workspace_mb)
    for leaf, grad, other, exact in zip(leaves, grads, naive, expected, strict=True):
        assert grad.dtype == leaf.dtype
        assert (grad - exact).abs().max() <= 3 * (other - exact).abs().max()


def with_tensors(case: Case, tensors: tuple[Tensor, ...]) -> Case:
    """The case with other numbers in what can be trained."""
    hidden_states, *parts = tensors
    fields = dict(zip(TENSORS[1:], parts, strict=True))
    return case._replace(hidden_states=hidden_states, head=case.head._replace(**fields))


class Repeated(torch.autograd.Function):
    """policy_loss called again for every backward, since one_pass gives its gradients once."""

    @staticmethod
    def forward(ctx: Any, case: Case, settings: dict[str, Any], *tensors: Tensor) -> Tensor:
        ctx.case, ctx.settings, ctx.tensors = case, settings, tensors
        return run(with_tensors(case, tensors), **settings).loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        with torch.enable_grad():
            leaves = [tensor.detach().requires_grad_() for tensor in ctx.tensors]
            loss = run(with_tensors(ctx.case, tuple(leaves)), **ctx.settings).loss
            return (None, None, *torch.autograd.grad(loss * grads[0], leaves))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("workspace_mb", [0.1, 256])
def test_finite_differences(engine: str, workspace_mb: float) -> None:
    case = make_case(1, num_tokens=9, softcap=9.0, logit_scale=0.7, lora_scale=0.5, vocab_size=117)
    settings: dict[str, Any] = {
        "objective": Objective(importance_ratio), "entropy_coef": 0.3, "engine": engine,
        "workspace_mb": workspace_mb,
    }  # fmt: skip

    def loss(*tensors: Tensor) -> Tensor:
        if engine == "one_pass":
            return Repeated.apply(case, settings, *tensors)  # type: ignore[no-any-return]
        return run(with_tensors(case, tensors), **settings).loss

    assert torch.autograd.gradcheck(loss, case.leaves(), fast_mode=True)
    hidden_states, *parts = (tensor.detach() for tensor in case.leaves())

    def loss_of_hidden_states(hidden_states: Tensor) -> Tensor:
        return loss(hidden_states, *(part.requires_grad_() for part in parts))

    assert torch.autograd.gradcheck(loss_of_hidden_states, hidden_states.requires_grad_())
