"""What policy_loss gives to the last bit: on-policy ratios, repeated runs, rows in any company."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fastrl_kernels import explain, linear_logps
from fastrl_kernels.objectives import (
    Objective,
    clipped_ratio,
    importance_ratio,
    policy_gradient,
    truncated_importance,
)
from tests.kernels.policy_cases import (
    ENGINES,
    OBJECTIVE,
    SMALL,
    Case,
    S,
    loss_and_gradients,
    make_case,
    run,
)

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
# Several chunks or one; one thread or, once, two, which wait for each other where cores are shared.
WORKSPACES = [(dtype, workspace_mb, 1) for dtype in DTYPES for workspace_mb in (0.12, 0.2, 256)]
WORKSPACES += [(torch.float32, 0.16, 2)]
SURROGATES = [
    Objective(policy_gradient),
    Objective(importance_ratio),
    Objective(clipped_ratio, (0.2, 0.28)),
    Objective(truncated_importance, (1.0, 4.0)),
]


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fill what torch.empty returns with NaN, and refuse operations without a fixed order."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def all_counted(case: Case) -> Case:
    """A weight for every token that has a target."""
    return case._replace(token_weights=case.token_weights + 0.01)


def on_policy_slopes(case: Case) -> Tensor:
    """-weight * advantage in the dtype of sums; zero on ignored rows."""
    dtype = torch.float64 if case.hidden_states.dtype == torch.float64 else torch.float32
    advantages, weights = case.advantages.to(dtype), case.token_weights.to(dtype)
    if case.rollout_weights is not None:
        advantages = advantages * case.rollout_weights.to(dtype)
    return -(weights * advantages).masked_fill(case.target_ids < 0, 0)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("objective", SURROGATES, ids=lambda o: o.surrogate.__name__)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_rollout_weights", [True, False])
def test_slopes_without_old_logps(
    engine: str, objective: Objective, dtype: torch.dtype, has_rollout_weights: bool
) -> None:
    case = make_case(0).to(dtype)._replace(old_logps=None)
    if not has_rollout_weights:
        case = case._replace(rollout_weights=None)
    out, _ = loss_and_gradients(case, engine=engine, objective=objective, workspace_mb=SMALL)
    assert torch.equal(out.slopes, on_policy_slopes(case))
    assert not out.clipped.any()


def old_logps_of(case: Case, **settings: Any) -> Tensor:
    with torch.no_grad():
        return linear_logps(
            case.hidden_states, case.head, case.target_ids, temperature=case.temperature, **settings
        ).logps


def check_on_policy(case: Case, old_logps: Tensor, **settings: Any) -> None:
    """Every ratio is 1: the same as without old_logps, to the last bit."""
    objective = Objective(clipped_ratio, (0.0, 0.0))
    counted = (case.target_ids >= 0) & (case.token_weights != 0)
    fresh = case._replace(old_logps=old_logps.masked_fill(~counted, torch.nan))
    out, grads = loss_and_gradients(fresh, objective=objective, **settings)
    assert torch.equal(out.logps[counted], old_logps[counted])
    assert torch.equal(out.slopes, on_policy_slopes(case))
    assert not out.clipped.any()
    own = case._replace(old_logps=None)
    expected, expected_grads = loss_and_gradients(own, objective=objective, **settings)
    for value, other in zip((*out, *grads), (*expected, *expected_grads), strict=True):
        assert torch.equal(value, other)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("workspace_mb", [0.12, 0.16, 256])
def test_ratio_is_one_after_the_same_chunks(
    engine: str, dtype: torch.dtype, workspace_mb: float
) -> None:
    """One workspace and one set of rows make the same chunks.

    Half-precision sums of one_pass take room, so that there the chunk must be one.
    """
    if dtype == torch.bfloat16 and engine == "one_pass":
        workspace_mb = 256
    case = all_counted(make_case(1)).to(dtype)
    old_logps = old_logps_of(case, workspace_mb=workspace_mb)
    check_on_policy(case, old_logps, engine=engine, workspace_mb=workspace_mb)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("dtype", "workspace_mb", "num_threads"), WORKSPACES)
def test_ratio_is_one_after_shuffled_parts_of_the_batch(
    engine: str, dtype: torch.dtype, workspace_mb: float, num_threads: int
) -> None:
    torch.set_num_threads(num_threads)
    case = make_case(2, per_token=True).to(dtype)
    settings: dict[str, Any] = {"workspace_mb": workspace_mb, "batch_invariant": True}
    order = torch.randperm(S, generator=torch.Generator().manual_seed(2))
    old_logps = torch.zeros(S, dtype=torch.promote_types(dtype, torch.float32))
    for rows in order.split([1, 2, 17, S - 20]):
        old_logps[rows] = old_logps_of(case.rows(rows), **settings)
    check_on_policy(case, old_logps, engine=engine, **settings)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch_invariant", [True, False])
@pytest.mark.parametrize("accumulate_grad", [True, False])
def test_same_inputs_give_the_same_bits(
    engine: str, dtype: torch.dtype, batch_invariant: bool, accumulate_grad: bool
) -> None:
    case = make_case(3, softcap=9.0).to(dtype)

    def once() -> list[Tensor]:
        leaves = case.leaves()
        for leaf in leaves:
            leaf.grad = None
        out = run(
            case, engine=engine, workspace_mb=0.16, batch_invariant=batch_invariant,
            accumulate_grad=accumulate_grad,
        )  # fmt: skip
        out.loss.backward()
        return [*out, *(leaf.grad for leaf in leaves)]  # type: ignore[list-item]

    for first, second in zip(once(), once(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("dtype", "workspace_mb", "num_threads"), WORKSPACES)
def test_row_alone_and_in_a_batch(
    engine: str, dtype: torch.dtype, workspace_mb: float, num_threads: int
) -> None:
    torch.set_num_threads(num_threads)
    case = all_counted(make_case(4, per_token=True, softcap=9.0)).to(dtype)

    def results(rows: list[int]) -> list[Tensor]:
        some = case.rows(rows)
        some = some._replace(hidden_states=some.hidden_states.detach().requires_grad_())
        out = run(some, engine=engine, workspace_mb=workspace_mb, batch_invariant=True)
        (grad,) = torch.autograd.grad(out.loss, some.hidden_states)
        return [out.logps, out.entropies, out.slopes, out.clipped, grad]

    plan = explain(case.leaves()[0], case.head, engine=engine, workspace_mb=workspace_mb)
    assert plan.rows < S or workspace_mb == 256
    together = results(list(range(S)))
    for rows in ([0], [1], [16], [S - 1], [S - 1, 5, 21], list(range(11, 28)), [3, 3]):
        for alone, batch in zip(results(rows), together, strict=True):
            assert torch.equal(alone, batch[rows])


@pytest.mark.parametrize("engine", ENGINES)
def test_auto_is_torch_on_a_cpu(engine: str) -> None:
    case = make_case(7).to(torch.float32)
    results = []
    for implementation in ("auto", "torch"):
        out, grads = loss_and_gradients(case, engine=engine, implementation=implementation)
        results.append((*out, *grads))
    for value, other in zip(*results, strict=True):
        assert torch.equal(value, other)


def test_engines_give_the_same_values() -> None:
    """Both take their statistics from the same chunks."""
    case = make_case(5).to(torch.float32)
    first, second = (run(case, engine=engine, workspace_mb=SMALL) for engine in ENGINES)
    for name in ("logps", "entropies", "slopes", "clipped"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name


def test_objective_of_the_clip_at_its_edge() -> None:
    """A ratio of exactly 1 is inside bounds of exactly 1; see also test_objectives.py."""
    case = make_case(6)._replace(old_logps=None)
    for low, high in ((0.0, 0.0), (0.2, 0.0), (0.0, 0.28)):
        objective = OBJECTIVE._replace(hyper_parameters=(low, high), regularisers=())
        for engine in ENGINES:
            out = run(case, engine=engine, objective=objective)
            assert torch.equal(out.slopes, on_policy_slopes(case))
