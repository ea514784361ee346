"""policy_loss against its formulas and against the reference with all logits; truth is float64."""

import importlib
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fastrl_kernels import explain, policy_loss
from fastrl_kernels.objectives import Objective, importance_ratio
from fastrl_kernels.policy_loss import policy_loss_reference
from tests.kernels.policy_cases import (
    ENGINES,
    OBJECTIVE,
    PADDING,
    SMALL,
    Case,
    S,
    V,
    loss_and_gradients,
    make_case,
    random_nf4,
    run,
    transcribe,
)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fill what torch.empty returns with NaN, and refuse operations without a fixed order."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


NO_ADAPTER: dict[str, Any] = {"lora_a": None, "lora_b": None}
HEADS: dict[str, dict[str, Any]] = {
    "plain": {"bias": None, **NO_ADAPTER},
    "bias": NO_ADAPTER,
    "adapter": {"bias": None, "lora_scale": 0.7},
    "scale": {"bias": None, "logit_scale": 0.3, **NO_ADAPTER},
    "softcap": {"softcap": 4.0, **NO_ADAPTER},
    "padded": {"vocab_size": V - PADDING},
    "everything": {
        "lora_scale": 0.7, "logit_scale": 0.3, "softcap": 4.0, "vocab_size": V - PADDING,
    },
}  # fmt: skip


def assert_close(value: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(value, expected, rtol=0, atol=1e-11)


def check(case: Case, formula: dict[str, Any] | None = None, **settings: Any) -> None:
    """Values and all gradients are those of the transcription and of the reference."""
    formula = formula or {}
    leaves = case.leaves()
    truth = transcribe(case, **formula)
    expected = torch.autograd.grad(truth["loss"], leaves)
    for function in (policy_loss, policy_loss_reference):
        options = settings if function is policy_loss else {}
        out, grads = loss_and_gradients(case, function=function, **formula, **options)
        for name, value in truth.items():
            assert_close(getattr(out, name), value.detach())
        for grad, truth_grad in zip(grads, expected, strict=True):
            assert_close(grad, truth_grad)
        assert [value.requires_grad for value in out] == [True] + [False] * 4


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("workspace_mb", [0.1, SMALL, 0.16, 256])
@pytest.mark.parametrize("per_token", [True, False])
def test_values_and_gradients(engine: str, head: str, workspace_mb: float, per_token: bool) -> None:
    case = make_case(0, per_token=per_token, **HEADS[head])
    case.leaves()
    plan = explain(case.hidden_states, case.head, engine=engine, workspace_mb=workspace_mb)
    num_counted = int(((case.target_ids >= 0) & (case.token_weights != 0)).sum())
    assert plan.rows >= num_counted if workspace_mb == 256 else num_counted % plan.rows
    out = transcribe(case)
    assert 0 < out["clipped"].sum() < num_counted
    check(case, engine=engine, workspace_mb=workspace_mb)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("filling", [torch.nan, torch.inf, 1e300])
def test_padding_rows_of_the_head_do_not_matter(engine: str, filling: float) -> None:
    case = make_case(1, **HEADS["everything"])
    clean, clean_grads = loss_and_gradients(case, engine=engine, workspace_mb=SMALL)
    with torch.no_grad():
        for tensor in (case.head.weight, case.head.bias, case.head.lora_b):
            tensor[V - PADDING :] = filling  # type: ignore[index]
    out, grads = loss_and_gradients(case, engine=engine, workspace_mb=SMALL)
    for value, other in zip((*out, *grads), (*clean, *clean_grads), strict=True):
        assert torch.equal(value, other)
    for grad in (grads[1], grads[2], grads[4]):
        assert torch.equal(grad[V - PADDING :], torch.zeros_like(grad[V - PADDING :]))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("workspace_mb", [SMALL, 256])
def test_frozen_head_in_four_bits(engine: str, workspace_mb: float) -> None:
    weight, values = random_nf4()
    dense = make_case(2, weight=values, lora_scale=0.7)
    truth = transcribe(dense)
    dense.leaves()
    names = [name for name in dense.tensors() if name != "weight"]
    expected = torch.autograd.grad(
        transcribe(dense)["loss"], [dense.tensors()[name] for name in names]
    )
    quantised = dense._replace(head=dense.head._replace(weight=weight))
    out, grads = loss_and_gradients(quantised, engine=engine, workspace_mb=workspace_mb)
    for name, value in truth.items():
        assert_close(getattr(out, name), value.detach())
    for grad, truth_grad in zip(grads, expected, strict=True):
        assert_close(grad, truth_grad)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("num_tokens", [0, 1, 7, 257])
@pytest.mark.parametrize("workspace_mb", [SMALL, 256])
@pytest.mark.parametrize("batch_invariant", [False, True])
def test_any_number_of_tokens(
    engine: str, num_tokens: int, workspace_mb: float, batch_invariant: bool
) -> None:
    case = make_case(3, num_tokens=num_tokens)
    check(case, engine=engine, workspace_mb=workspace_mb, batch_invariant=batch_invariant)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("what", ["ignored", "of weight 0"])
def test_no_token_counts(engine: str, what: str) -> None:
    case = make_case(4)
    if what == "ignored":
        case = case._replace(target_ids=-1 - torch.arange(S))
    else:
        case = case._replace(token_weights=torch.zeros(S, dtype=torch.float64))
    with torch.no_grad():
        case.hidden_states.fill_(torch.nan)
    out, grads = loss_and_gradients(case, engine=engine, workspace_mb=SMALL)
    for value in (*out, *grads):
        assert torch.equal(value, torch.zeros_like(value))


def spoil(case: Case) -> Case:
    """NaN and infinities in everything that tokens without weight may hold."""
    masked = (case.token_weights == 0) | (case.target_ids < 0)
    spoilt = {
        "hidden_states": torch.nan, "advantages": torch.inf, "old_logps": -torch.inf,
        "ref_logps": torch.nan, "rollout_weights": torch.inf,
    }  # fmt: skip
    case = case._replace(
        **{
            name: getattr(case, name).masked_fill(
                masked[:, None] if name == "hidden_states" else masked, value
            )
            for name, value in spoilt.items()
        }
    )
    case.advantages[7] = torch.nan
    case.old_logps[17] = torch.nan  # type: ignore[index]
    return case


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("workspace_mb", [SMALL, 256])
@pytest.mark.parametrize("batch_invariant", [False, True])
def test_tokens_without_weight_are_zero_and_harmless(
    engine: str, workspace_mb: float, batch_invariant: bool
) -> None:
    settings: dict[str, Any] = {
        "engine": engine, "workspace_mb": workspace_mb, "batch_invariant": batch_invariant,
    }  # fmt: skip
    case = make_case(5)
    clean, clean_grads = loss_and_gradients(case, **settings)
    spoilt = spoil(case)
    out, grads = loss_and_gradients(spoilt, **settings)
    for value, other in zip((*out, *grads), (*clean, *clean_grads), strict=True):
        assert torch.equal(value, other)
    masked = (case.token_weights == 0) | (case.target_ids < 0)
    assert masked.sum() == 8
    for value in (*out[1:], grads[0]):
        assert torch.equal(value[masked], torch.zeros_like(value[masked]))
    kept, kept_grads = loss_and_gradients(case.rows(~masked), **settings)
    assert_close(out.loss, kept.loss)
    assert_close(grads[0][~masked], kept_grads[0])
    for grad, other in zip(grads[1:], kept_grads[1:], strict=True):
        assert_close(grad, other)


def test_rows_of_weight_zero_that_are_computed_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a GPU no row is left out, so as not to wait for the count; here the same on a CPU."""
    module = importlib.import_module("fastrl_kernels.policy_loss.one_pass")
    monkeypatch.setattr(module, "worthwhile_rows", lambda mask: torch.arange(mask.shape[0]))
    monkeypatch.setattr(module, "_keep_active", lambda *parts: parts)
    case = make_case(5)
    clean, clean_grads = loss_and_gradients(case, engine="one_pass")
    out, grads = loss_and_gradients(spoil(case), engine="one_pass")
    for value, other in zip((*out, *grads), (*clean, *clean_grads), strict=True):
        assert_close(value, other)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("workspace_mb", [SMALL, 256])
@pytest.mark.parametrize("layout", ["transposed", "strided rows", "strided columns"])
def test_inputs_that_are_not_contiguous(engine: str, workspace_mb: float, layout: str) -> None:
    case = make_case(6)
    expected, expected_grads = loss_and_gradients(case, engine=engine, workspace_mb=workspace_mb)

    def relay(tensor: Tensor) -> Tensor:
        rows, columns = tensor.shape
        tensor = tensor.detach()
        if layout == "transposed":
            return tensor.T.contiguous().T
        if layout == "strided rows":
            return torch.full((3 * rows, columns), torch.nan, dtype=tensor.dtype)[::3].copy_(tensor)
        return torch.full((rows, 2 * columns), torch.nan, dtype=tensor.dtype)[:, ::2].copy_(tensor)

    parts = {name: relay(getattr(case.head, name)) for name in ("weight", "lora_a", "lora_b")}
    relaid = case._replace(
        hidden_states=relay(case.hidden_states), head=case.head._replace(**parts),
        advantages=torch.stack([case.advantages] * 2, 1)[:, 0],
    )  # fmt: skip
    assert not relaid.hidden_states.is_contiguous()
    out, grads = loss_and_gradients(relaid, engine=engine, workspace_mb=workspace_mb)
    for value, other in zip((*out, *grads), (*expected, *expected_grads), strict=True):
        assert_close(value, other)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("missing", list(itertools.product([True, False], repeat=3)))
def test_constants_that_are_left_out(engine: str, missing: tuple[bool, bool, bool]) -> None:
    names = ("old_logps", "ref_logps", "rollout_weights")
    case = make_case(7)
    case = case._replace(
        **{name: None for name, is_missing in zip(names, missing, strict=True) if is_missing}
    )
    objective = OBJECTIVE if case.ref_logps is not None else OBJECTIVE._replace(regularisers=())
    for entropy_coef in (0.0, 0.3):
        formula = {"objective": objective, "entropy_coef": entropy_coef}
        check(case, formula, engine=engine, workspace_mb=SMALL)


@pytest.mark.parametrize("engine", ENGINES)
def test_tokens_in_other_dtypes_and_with_gradients_are_constants(engine: str) -> None:
    case = make_case(8)
    rounded = {
        name: getattr(case, name).float() for name in ("advantages", "old_logps", "token_weights")
    }
    exact = case._replace(**{name: value.double() for name, value in rounded.items()})
    expected, expected_grads = loss_and_gradients(exact, engine=engine)
    asking = {name: value.requires_grad_() for name, value in rounded.items()}
    out, grads = loss_and_gradients(case._replace(**asking), engine=engine)
    for value, other in zip((*out, *grads), (*expected, *expected_grads), strict=True):
        assert torch.equal(value, other)
    assert all(value.grad is None for value in asking.values())


def test_small_example_by_hand() -> None:
    """Two tokens, logits (log 3, 0) and (0, 0): p = 3/4 and 1/2."""
    logits = torch.tensor([[3.0, 1.0], [1.0, 1.0]], dtype=torch.float64).log()
    hidden, weight = logits.requires_grad_(), torch.eye(2, dtype=torch.float64)
    case = make_case(0)._replace(hidden_states=hidden, temperature=1.0)
    case = case._replace(
        head=case.head._replace(weight=weight, bias=None, lora_a=None, lora_b=None),
        target_ids=torch.tensor([0, 1]),
        advantages=torch.tensor([2.0, -1.0], dtype=torch.float64),
        token_weights=torch.tensor([0.5, 0.25], dtype=torch.float64),
        old_logps=torch.tensor([0.5, 0.25], dtype=torch.float64).log(),
        ref_logps=None,
        rollout_weights=None,
    )
    for engine in ENGINES:
        out = run(case, engine=engine, objective=Objective(importance_ratio), entropy_coef=0.0)
        assert_close(out.loss, torch.tensor(-0.5 * 1.5 * 2 + 0.25 * 2, dtype=torch.float64))
        assert_close(out.slopes, torch.tensor([-1.5, 0.5], dtype=torch.float64))
        (grad,) = torch.autograd.grad(out.loss, hidden)
        assert_close(grad, torch.tensor([[-0.375, 0.375], [-0.25, 0.25]], dtype=torch.float64))
