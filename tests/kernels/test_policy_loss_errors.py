"""What policy_loss refuses, and what it says."""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from fastrl_kernels import LMHead, policy_loss
from fastrl_kernels.objectives import Objective, Regulariser, clipped_ratio, importance_ratio, k3
from tests.kernels.policy_cases import ENGINES, Case, D, R, S, V, make_case, run

WIDE = torch.float64


def arguments_of(case: Case) -> dict[str, Any]:
    """Every argument of the call by its own name."""
    fields = case._asdict()
    return {"lm_head": fields.pop("head"), "objective": Objective(importance_ratio), **fields}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_states": torch.zeros(2, 3, D, dtype=WIDE)}, "hidden_states"),
        ({"hidden_states": torch.zeros(S, D, dtype=torch.int64)}, "hidden_states"),
        ({"hidden_states": torch.zeros(S, D)}, "one dtype"),
        ({"hidden_states": torch.zeros(S, D + 1, dtype=WIDE)}, "weight"),
        ({"target_ids": torch.zeros(S)}, "target_ids"),
        ({"target_ids": torch.zeros(S, dtype=torch.int32)}, "target_ids"),
        ({"target_ids": torch.zeros(S - 1, dtype=torch.int64)}, "target_ids"),
        ({"target_ids": torch.full((S,), V)}, "vocabulary size"),
        ({"target_ids": torch.zeros(S, dtype=torch.int64, device="meta")}, "one device"),
        ({"weight": torch.zeros(V, D, 1, dtype=WIDE)}, "weight"),
        ({"bias": torch.zeros(V - 1, dtype=WIDE)}, "bias"),
        ({"lora_a": None}, "lora_a and lora_b"),
        ({"lora_b": torch.zeros(V, R + 1, dtype=WIDE)}, "lora_b"),
        ({"vocab_size": V + 1}, "vocab_size"),
        ({"softcap": 0.0}, "softcap"),
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": torch.ones(S - 1, dtype=WIDE)}, "temperature"),
        ({"temperature": torch.zeros(S, dtype=WIDE)}, "temperature"),
        ({"temperature": torch.ones(S, dtype=WIDE, requires_grad=True)}, "temperature"),
        ({"advantages": torch.zeros(S - 1, dtype=WIDE)}, "advantages"),
        ({"advantages": torch.zeros(S, 1, dtype=WIDE)}, "advantages"),
        ({"advantages": torch.zeros(S, dtype=torch.int64)}, "advantages"),
        ({"advantages": torch.zeros(S, dtype=WIDE, device="meta")}, "advantages"),
        ({"advantages": [0.0] * S}, "advantages"),
        ({"token_weights": torch.ones(S, dtype=torch.bool)}, "token_weights"),
        ({"token_weights": torch.ones((), dtype=WIDE)}, "token_weights"),
        ({"old_logps": torch.zeros(S + 1, dtype=WIDE)}, "old_logps"),
        ({"rollout_weights": torch.zeros(1, dtype=WIDE)}, "rollout_weights"),
        ({"objective": "clipped_ratio"}, r"did you mean Objective\(clipped_ratio"),
        ({"objective": "clip_ratio"}, r"did you mean Objective\(clipped_ratio"),
        ({"objective": "ppo"}, "there are the surrogates policy_gradient, "),
        ({"objective": clipped_ratio}, "objective must be"),
        ({"objective": None}, "objective must be"),
        (
            {
                "objective": Objective(importance_ratio, (), (Regulariser(k3, 0.1),)),
                "ref_logps": None,
            },
            "ref_logps",
        ),
        (
            {
                "objective": Objective(importance_ratio, (), (Regulariser(k3, 0.1),)),
                "ref_logps": torch.zeros(S - 1, dtype=WIDE),
            },
            "ref_logps",
        ),
        ({"engine": "two_pass"}, "one_pass, min_memory"),
        ({"engine": "forward"}, "engine"),
        ({"accumulate_grad": True}, "accumulate_grad"),
        ({"implementation": "triton"}, '"torch"'),
        ({"implementation": "cuda"}, "implementation"),
    ],
)
def test_bad_arguments_raise(engine: str, change: dict[str, Any], message: str) -> None:
    case = make_case(0)
    case.hidden_states.requires_grad_()
    fields = {name: value for name, value in change.items() if name in LMHead._fields}
    arguments = {"engine": engine, **arguments_of(case)}
    arguments |= {"lm_head": case.head._replace(**fields)}
    arguments |= {name: value for name, value in change.items() if name not in fields}
    with pytest.raises(ValueError, match=message):
        policy_loss(**arguments)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_computed_weight_cannot_take_its_gradient_directly(engine: str) -> None:
    case = make_case(1)
    weight = case.head.weight.requires_grad_() * 2  # type: ignore[union-attr,operator]
    computed = case._replace(head=case.head._replace(weight=weight))
    with pytest.raises(ValueError, match="leaf"):
        run(computed, engine=engine, accumulate_grad=True)


def inner(function: Any) -> Any:
    """The same function under a name that no module has."""

    def wrapped(logp: Tensor, old_logp: Tensor, advantage: Tensor) -> tuple[Tensor, Tensor]:
        return function(logp, old_logp, advantage)

    return wrapped


class Surrogates:
    """A place that is not the top level of a module."""

    @staticmethod
    def ratio(logp, old_logp, advantage):  # type: ignore[no-untyped-def]
        return importance_ratio(logp, old_logp, advantage)

    def __call__(self, logp, old_logp, advantage):  # type: ignore[no-untyped-def]
        return importance_ratio(logp, old_logp, advantage)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "surrogate",
    [
        lambda logp, old_logp, advantage: (advantage * logp, advantage),
        inner(importance_ratio),
        Surrogates.ratio,
        Surrogates(),
        functools.partial(importance_ratio),
        "clipped_ratio",
    ],
)
def test_a_surrogate_without_a_module_to_find_it_in(engine: str, surrogate: Any) -> None:
    case = make_case(2)
    case.hidden_states.requires_grad_()
    with pytest.raises(ValueError, match="top level"):
        run(case, engine=engine, objective=Objective(surrogate))
    regularisers = (Regulariser(surrogate, 0.1),)
    with pytest.raises(ValueError, match="top level"):
        run(case, engine=engine, objective=Objective(importance_ratio, (), regularisers))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("hyper_parameters", [(), (0.2,), (0.2, 0.2, 0.2)])
def test_hyper_parameters_that_do_not_fit(engine: str, hyper_parameters: tuple[float, ...]) -> None:
    case = make_case(3)
    case.hidden_states.requires_grad_()
    with pytest.raises(ValueError, match="hyper_parameters"):
        run(case, engine=engine, objective=Objective(clipped_ratio, hyper_parameters))


def test_products_that_do_not_exist() -> None:
    with pytest.raises(ValueError, match="products"):
        run(make_case(4), products="tensor_cores")


@pytest.mark.parametrize("engine", [*ENGINES, "auto"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("trained", [(0,), (1,), (3, 4), (0, 1, 2, 3, 4)])
@pytest.mark.parametrize("batch_invariant", [False, True])
def test_a_workspace_below_one_row_names_one_that_works(
    engine: str, dtype: torch.dtype, trained: tuple[int, ...], batch_invariant: bool
) -> None:
    case = make_case(5).to(dtype)
    for index in trained:
        (case.hidden_states, *case.head[:4])[index].requires_grad_()  # type: ignore[union-attr]
    settings: dict[str, Any] = {"engine": engine, "batch_invariant": batch_invariant}
    for workspace_mb in (0.0, 0.01):
        with pytest.raises(ValueError, match="workspace_mb must hold one row") as error:
            run(case, workspace_mb=workspace_mb, **settings)
        enough = float(str(error.value).rsplit(" ", 1)[1])
        out = run(case, workspace_mb=enough, **settings)
        out.loss.backward()
        assert out.loss.isfinite()


@pytest.mark.parametrize("engine", ENGINES)
def test_check_names_what_is_not_finite(engine: str) -> None:
    case = make_case(6)
    out = run(case, engine=engine, check=True)
    assert torch.equal(out.loss, run(case, engine=engine).loss)
    with torch.no_grad():
        case.head.weight[5, 2] = torch.nan  # type: ignore[index]
    with pytest.raises(ValueError, match="weight are not finite"):
        run(case, engine=engine, check=True)
    clean = make_case(6)
    for name in ("hidden_states", "advantages", "old_logps", "rollout_weights"):
        broken = clean._replace(**{name: getattr(clean, name).clone()})
        getattr(broken, name)[3] = torch.nan
        with pytest.raises(ValueError, match=f"{name} are not finite"):
            run(broken, engine=engine, check=True, objective=Objective(importance_ratio))
    far = clean._replace(old_logps=torch.full((S,), -1e308, dtype=WIDE) * 10)
    far = far._replace(advantages=torch.full((S,), 1e308, dtype=WIDE))
    with pytest.raises(ValueError, match="old_logps are not finite"):
        run(far, engine=engine, check=True)
    overflow = clean._replace(advantages=torch.full((S,), 1e308, dtype=WIDE))
    overflow = overflow._replace(token_weights=overflow.token_weights * 1e9)
    with pytest.raises(ValueError, match="every input is finite"):
        run(overflow, engine=engine, check=True)


@pytest.mark.parametrize("engine", ENGINES)
def test_targets_of_tokens_without_weight_may_be_anything(engine: str) -> None:
    case = make_case(7)
    case.leaves()
    expected = run(case, engine=engine)
    target_ids = torch.where(case.token_weights == 0, V + 5, case.target_ids)
    out = run(case._replace(target_ids=target_ids), engine=engine)
    for value, other in zip(out, expected, strict=True):
        assert torch.equal(value, other)
