"""The modules give what the functions give, to the last bit, for every way to pass a head."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastrl_kernels import (
    FusedLinearCrossEntropyLoss,
    FusedLinearDPOLoss,
    FusedLinearGRPOLoss,
    FusedLinearKTOLoss,
    FusedLinearLogps,
    FusedLinearPolicyLoss,
    LMHead,
    linear_logps,
    policy_loss,
)
from fastrl_kernels.objectives import Objective, importance_ratio
from tests.kernels.policy_cases import (
    ENGINES,
    OBJECTIVE,
    SMALL,
    Case,
    D,
    S,
    V,
    loss_and_gradients,
    make_case,
)
from tests.kernels.test_linear_logps_memory import MemoryLog

HEADS = ["tensor", "record", "linear", "linear without bias"]


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fill what torch.empty returns with NaN, and refuse operations without a fixed order."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def make_head(kind: str, seed: int = 0) -> tuple[Any, LMHead, list[Tensor]]:
    """A head as a user has it, as the functions take it, and its tensors."""
    case = make_case(seed)
    linear = nn.Linear(D, V, bias=kind != "linear without bias", dtype=torch.float64)
    with torch.no_grad():
        linear.weight.copy_(case.head.weight)  # type: ignore[arg-type]
        if linear.bias is not None:
            linear.bias.copy_(case.head.bias)  # type: ignore[arg-type]
    if kind.startswith("linear"):
        record = LMHead(linear.weight, linear.bias)
        return linear, record, [x for x in record[:2] if isinstance(x, Tensor)]
    if kind == "tensor":
        return linear.weight, LMHead(linear.weight), [linear.weight]
    head = case.head._replace(lora_scale=0.5, softcap=9.0, logit_scale=0.7, vocab_size=V - 6)
    return head, head, [x.requires_grad_() for x in head[:4] if isinstance(x, Tensor)]


def logps_and_gradients(out: Any, tensors: list[Tensor]) -> list[Tensor]:
    loss = (out.logps * torch.linspace(-1, 1, S)).sum() + out.entropies.sum()
    return [*out, *torch.autograd.grad(loss, tensors)]


@pytest.mark.parametrize("kind", HEADS)
def test_linear_logps(kind: str) -> None:
    case = make_case(1)
    lm_head, record, tensors = make_head(kind)
    tensors = [case.hidden_states.requires_grad_(), *tensors]
    target_ids = case.target_ids.clamp(max=record.num_columns - 1)
    for settings in ({}, {"temperature": 0.7, "workspace_mb": SMALL, "batch_invariant": True}):
        module = FusedLinearLogps(**settings)
        found = logps_and_gradients(module(case.hidden_states, lm_head, target_ids), tensors)
        out = linear_logps(case.hidden_states, record, target_ids, **settings)
        for value, other in zip(found, logps_and_gradients(out, tensors), strict=True):
            assert torch.equal(value, other)


def tokens_of(case: Case) -> tuple[list[Tensor], dict[str, Any]]:
    """Positional and named tensors of policy_loss, after the head."""
    names = ("old_logps", "ref_logps", "rollout_weights")
    named = {name: getattr(case, name) for name in names}
    return [case.target_ids, case.advantages, case.token_weights], named


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("engine", ENGINES)
def test_policy_loss(kind: str, engine: str) -> None:
    lm_head, record, tensors = make_head(kind)
    case = make_case(2)
    positional, named = tokens_of(case)
    positional[0] = positional[0].clamp(max=record.num_columns - 1)
    tensors = [case.hidden_states.requires_grad_(), *tensors]
    results = []
    settings: dict[str, Any] = {
        "temperature": 0.8, "entropy_coef": 0.1, "workspace_mb": SMALL, "engine": engine,
        "batch_invariant": True,
    }  # fmt: skip
    module = FusedLinearPolicyLoss(OBJECTIVE, **settings)
    for out in (
        module(case.hidden_states, lm_head, *positional, **named),
        policy_loss(
            case.hidden_states, record, *positional, objective=OBJECTIVE, **named, **settings
        ),
    ):
        results.append([*out, *torch.autograd.grad(out.loss, tensors)])
    for value, other in zip(*results, strict=True):
        assert torch.equal(value, other)


@pytest.mark.parametrize("engine", ENGINES)
def test_gradients_arrive_at_the_layer(engine: str) -> None:
    layer, record, tensors = make_head("linear")
    case = make_case(3)._replace(head=record)
    settings: dict[str, Any] = {"objective": Objective(importance_ratio), "entropy_coef": 0.0}
    _, grads = loss_and_gradients(case, engine=engine, workspace_mb=SMALL, **settings)
    positional, named = tokens_of(case)
    for accumulate_grad in (False, True):
        layer.zero_grad()
        module = FusedLinearPolicyLoss(
            Objective(importance_ratio), temperature=0.8, workspace_mb=SMALL, engine=engine,
            accumulate_grad=accumulate_grad,
        )  # fmt: skip
        module(case.hidden_states, layer, *positional, **named).loss.backward()
        for tensor, grad in zip(tensors, grads[1:], strict=True):
            torch.testing.assert_close(tensor.grad, grad, rtol=0, atol=1e-12)


def test_settings_are_checked_by_the_functions() -> None:
    case = make_case(4)
    positional, named = tokens_of(case)
    with pytest.raises(ValueError, match="workspace_mb"):
        FusedLinearLogps(workspace_mb=0.0)(case.hidden_states, case.head, case.target_ids)
    with pytest.raises(ValueError, match='"torch"'):
        FusedLinearLogps(implementation="cuda")(case.hidden_states, case.head, case.target_ids)
    for settings in ({"engine": "none"}, {"temperature": 0.0}, {"implementation": "triton"}):
        module = FusedLinearPolicyLoss(OBJECTIVE, **settings)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=next(iter(settings))):
            module(case.hidden_states, case.head, *positional, **named)


class Scaled(nn.Linear):
    """A layer that is not what its weight says."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


@pytest.mark.parametrize(
    "layer", [Scaled(D, V), nn.Embedding(V, D), nn.Sequential(nn.Linear(D, V))]
)
def test_a_layer_that_is_no_linear_head_raises(layer: nn.Module) -> None:
    case = make_case(5).to(torch.float32)
    with pytest.raises(ValueError, match="expected a head"):
        FusedLinearLogps()(case.hidden_states, layer, case.target_ids)


def test_modules_hold_no_state() -> None:
    """A head that is trained elsewhere is not trained or saved twice."""
    for module in (FusedLinearLogps(), FusedLinearPolicyLoss(OBJECTIVE)):
        assert list(module.parameters()) == []
        assert module.state_dict() == {}


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("is_preference", [False, True])
def test_losses_of_batches_hold_no_logits(level: str, is_preference: bool) -> None:
    """Neither one pass nor two, nor the means of logits that preference losses return."""
    num_rows, num_places, num_columns = 4, 75, 2000
    hidden = torch.randn(num_rows, num_places, 8).requires_grad_()
    weight = torch.randn(num_columns, 8).requires_grad_()
    target = torch.randint(num_columns, (num_rows, num_places))
    with MemoryLog() as log:
        if is_preference:
            module = FusedLinearDPOLoss(average_log_prob=level == "token", workspace_mb=0.5)
            loss, _ = module(weight, hidden, target, None, hidden.detach(), weight)
        else:
            grpo = FusedLinearGRPOLoss(0.0, importance_sampling_level=level, workspace_mb=0.5)
            mask, ones = torch.ones_like(target), torch.ones(num_rows)
            old = torch.full_like(target, -8, dtype=torch.float32)
            loss, _ = grpo(hidden, weight, target, mask, ones, old_per_token_logps=old)
        loss.backward()
    assert log.largest <= num_rows * num_places * num_columns // 4


def test_losses_of_batches_are_the_same_under_autocast() -> None:
    """Which would round sums over the vocabulary to half precision."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight, a, b = (
        torch.randn(*shape, generator=generator) for shape in ((4, 9, 8), (61, 8), (2, 8), (61, 2))
    )
    target = torch.randint(61, (4, 9), generator=generator)
    head = LMHead(weight, lora_a=a, lora_b=b)
    labels = torch.tensor([True, False, False, True])
    smoothed = FusedLinearCrossEntropyLoss(label_smoothing=0.1, lse_square_scale=0.1)

    def run(dtype: torch.dtype | None) -> list[Any]:
        leaf = hidden.clone().requires_grad_()
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            loss = smoothed(head, leaf.flatten(0, 1), target.flatten())
            loss = loss + FusedLinearDPOLoss(use_ref_model=False)(head, leaf, target)[0]
            kto = FusedLinearKTOLoss()(leaf, head, target, preference_labels=labels)
        return [loss, kto, torch.autograd.grad(loss + kto[0], leaf)]

    torch.testing.assert_close(run(torch.bfloat16), run(None), rtol=0, atol=0)
