"""policy_loss: every engine, dtype, head and option, odd sizes and layouts, against float64."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import triton.language as tl
from torch import Tensor

from fastrl_kernels import LMHead, policy_loss
from fastrl_kernels.linear_logps import launch as linear_launch
from fastrl_kernels.linear_logps import launch_backward
from fastrl_kernels.objectives import (
    Objective,
    Regulariser,
    clipped_ratio,
    importance_ratio,
    k1_score,
    k3,
    policy_gradient,
)
from fastrl_kernels.policy_loss import launch, policy_loss_reference
from fastrl_kernels.token_loss import TokenLoss, token_loss_reference
from tests.kernels.interpreted.conftest import (
    DTYPES,
    ENGINES,
    OPTIONS,
    TRAINABLE,
    Case,
    S,
    check_gradients,
    check_values,
    cleaned,
    make_case,
    naive_logps,
    sets_of_trained_tensors,
    trainable,
    trained,
    with_tokens,
)

CLIPPED = Objective(clipped_ratio, (0.2, 0.28))
REGULARISED = CLIPPED._replace(regularisers=(Regulariser(k3, 0.1),))
# cuBLAS has no units, which float16 needs.
ENGINES_AND_DTYPES = [
    pair for pair in itertools.product(ENGINES, DTYPES) if pair != ("cublas", torch.float16)
]
ENGINES_OF_FLOAT16 = ("gather", "min_memory")
triton_loss = functools.partial(policy_loss, implementation="triton")


def check_policy_loss(
    case: Case, tokens: dict[str, Tensor], options: Sequence[str] = (), *, objective: Objective,
    entropy_coef: float = 0.0, **settings: Any,
) -> None:  # fmt: skip
    """The loss, what it was made of and its gradients, against float64."""

    def run(inputs: Case, function: Callable[..., Any], dtype: torch.dtype, **more: Any) -> tuple:
        inputs, tensors = trained(inputs, trainable(case))
        constants = {
            name: tokens[name].to(dtype) for name in ("advantages", "token_weights", *options)
        }
        out = function(
            *inputs[:3], **constants, temperature=inputs.temperature, objective=objective,
            entropy_coef=entropy_coef, **more,
        )  # fmt: skip
        return out, torch.autograd.grad(3 * out.loss, tensors)

    truth, expected = run(cleaned(case, torch.float64), policy_loss_reference, torch.float64)
    out, gradients = run(case, triton_loss, torch.float32, **settings)
    _, naive = run(cleaned(case), naive_policy_loss, torch.float32)
    for name in ("loss", "logps", "entropies"):
        check_values(getattr(out, name), getattr(truth, name), name)
    largest = tokens["token_weights"].max() if len(truth.slopes) else 1.0
    check_values(out.slopes / largest, truth.slopes / largest, "slopes")
    assert torch.equal(out.clipped, truth.clipped)
    check_gradients(gradients, naive, expected)


def naive_policy_loss(
    hidden: Tensor, head: LMHead, target_ids: Tensor, advantages: Tensor, token_weights: Tensor, *,
    temperature: float | Tensor, **settings: Any,
) -> TokenLoss:  # fmt: skip
    """The loss of `naive_logps`."""
    target_ids = torch.where(token_weights == 0, -1, target_ids)
    weights = token_weights.masked_fill(target_ids < 0, 0)
    out = naive_logps(hidden, head, target_ids, temperature=temperature)
    return token_loss_reference(out.logps, out.entropies, advantages, weights, **settings)


@pytest.mark.parametrize(("engine", "dtype"), ENGINES_AND_DTYPES)
def test_everything_at_once(engine: str, dtype: torch.dtype) -> None:
    case, tokens = with_tokens(make_case("everything", dtype))
    settings = ENGINES[engine]
    check_policy_loss(case, tokens, OPTIONS, objective=REGULARISED, entropy_coef=0.1, **settings)


@pytest.mark.parametrize(("engine", "dtype"), ENGINES_AND_DTYPES)
def test_nothing_but_the_clip(engine: str, dtype: torch.dtype) -> None:
    case, tokens = with_tokens(make_case("plain", dtype))
    check_policy_loss(case, tokens, ("old_logps",), objective=CLIPPED, **ENGINES[engine])


@pytest.mark.parametrize("engine", ["gather", "min_memory"])
@pytest.mark.parametrize(
    ("options", "objective", "entropy_coef"),
    [
        ((), CLIPPED, 0.0),
        ((), Objective(policy_gradient), 0.1),
        (("rollout_weights",), CLIPPED, 0.0),
        (("ref_logps",), Objective(importance_ratio, (), (Regulariser(k1_score, 0.5),)), 0.0),
        (("old_logps", "ref_logps"), CLIPPED, 0.1),  # beta is 0: ref_logps are not read
    ],
)
def test_options(
    engine: str, options: tuple[str, ...], objective: Objective, entropy_coef: float
) -> None:
    case, tokens = with_tokens(make_case("plain", torch.float32))
    settings: dict[str, Any] = {"objective": objective, "entropy_coef": entropy_coef}
    check_policy_loss(case, tokens, options, **settings, **ENGINES[engine])


@pytest.mark.parametrize("engine", ENGINES)
def test_parameters_as_tensors_and_several_regularisers(engine: str) -> None:
    case, tokens = with_tokens(make_case("plain", torch.float32))
    each = torch.rand(len(case.target_ids), generator=torch.Generator().manual_seed(1))
    one = torch.full((1,), 0.3)
    regularisers = (Regulariser(k3, each), Regulariser(k1_score, one))
    objective = Objective(clipped_ratio, (each, one), regularisers)
    settings: dict[str, Any] = {"objective": objective, "entropy_coef": 0.1 * each}
    check_policy_loss(case, tokens, OPTIONS, **settings, **ENGINES[engine])


@pytest.mark.parametrize("engine", ["gather", "cublas"])
@pytest.mark.parametrize(
    "name", ["bias", "softcap", "scale", "minus inf", "peaked", "up", "down", "rank 1", "nf4"]
)
def test_every_head(engine: str, name: str) -> None:
    case, tokens = with_tokens(make_case(name, torch.float32))
    check_policy_loss(case, tokens, ("old_logps",), objective=CLIPPED, **ENGINES[engine])


@pytest.mark.parametrize("engine", ENGINES)
def test_a_float32_adapter_beside_a_bfloat16_head(engine: str) -> None:
    case, tokens = with_tokens(make_case("float32 adapter", torch.bfloat16))
    check_policy_loss(case, tokens, ("old_logps",), objective=CLIPPED, **ENGINES[engine])


@pytest.mark.parametrize("engine", ["gather", "cublas"])
@pytest.mark.parametrize(
    ("rows", "width", "columns"),
    [(0, 19, 203), (1, 1, 5), (7, 33, 31), (37, 5, 97), (2, 16, 1), (4, 17, 203)],
)
def test_sizes_around_the_blocks_and_splits(
    engine: str, rows: int, width: int, columns: int
) -> None:
    shape = {"rows": rows, "width": width, "columns": columns}
    case, tokens = with_tokens(make_case("plain", torch.bfloat16, **shape))
    check_policy_loss(case, tokens, ("old_logps",), objective=CLIPPED, **ENGINES[engine])


@pytest.mark.parametrize(
    ("engine", "dtype"),
    [("gather", torch.float32), ("gather", torch.float16), ("cublas", torch.bfloat16)],
)
def test_chunks_of_rows(engine: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    make_plan = launch.make_plan
    monkeypatch.setattr(launch, "make_plan", lambda *call: make_plan(*call)._replace(rows=7))
    case, tokens = with_tokens(make_case("everything", dtype))
    settings = ENGINES[engine]
    check_policy_loss(case, tokens, OPTIONS, objective=REGULARISED, entropy_coef=0.1, **settings)


def test_chunks_of_rows_in_min_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The public plan refuses workspaces that hold so few rows, so a MiB is made smaller here."""
    monkeypatch.setattr(linear_launch, "MIB", 2**8)
    monkeypatch.setattr(launch_backward, "MIB", 2**8)
    case, tokens = with_tokens(make_case("everything", torch.float16))
    settings = ENGINES["min_memory"]
    check_policy_loss(case, tokens, OPTIONS, objective=REGULARISED, workspace_mb=16, **settings)


def apart(tensor: Any) -> Any:
    """The same values with others between them, in memory."""
    if not isinstance(tensor, Tensor):
        return tensor
    return torch.stack([tensor, torch.full_like(tensor, 7)], -1)[..., 0]


@pytest.mark.parametrize("engine", ENGINES)
def test_elements_apart_in_memory(engine: str) -> None:
    case, tokens = with_tokens(make_case("everything", torch.float32))
    head = LMHead._make(map(apart, case.head))
    case = Case(apart(case.hidden), head, apart(case.target_ids), apart(case.temperature))
    tokens = {name: apart(values) for name, values in tokens.items()}
    settings = ENGINES[engine]
    check_policy_loss(case, tokens, OPTIONS, objective=REGULARISED, entropy_coef=0.1, **settings)


@pytest.mark.parametrize("engine", ENGINES)
def test_one_number_for_all_tokens(engine: str) -> None:
    """Expanded, so that it is one number in memory too."""
    case = make_case("plain", torch.float32)
    tokens = {"advantages": torch.tensor([1.5]), "token_weights": torch.tensor([0.1])}
    tokens = {name: value.expand(S) for name, value in tokens.items()}
    check_policy_loss(case, tokens, objective=CLIPPED, **ENGINES[engine])


@pytest.mark.parametrize("engine", ENGINES)
def test_every_set_of_trained_tensors(engine: str) -> None:
    case, tokens = with_tokens(make_case("everything", torch.float32, rows=3, width=7, columns=29))
    constants = (tokens["advantages"], tokens["token_weights"])
    settings: dict[str, Any] = {"objective": CLIPPED, "entropy_coef": 0.1}
    wide, wide_tensors = trained(cleaned(case, torch.float64))
    loss = policy_loss_reference(
        *wide[:3], *(x.double() for x in constants), temperature=wide.temperature, **settings
    ).loss
    truth = dict(zip(TRAINABLE, torch.autograd.grad(loss, wide_tensors), strict=True))
    settings |= {"temperature": case.temperature, **ENGINES[engine]}
    for names in sets_of_trained_tensors():
        some, tensors = trained(case, names)
        out = triton_loss(*some[:3], *constants, **settings)
        torch.testing.assert_close(out.loss.double(), loss, rtol=1e-5, atol=1e-6)
        gradients = torch.autograd.grad(out.loss, tensors) if tensors else ()
        for name, grad in zip(names, gradients, strict=True):
            torch.testing.assert_close(grad.double(), truth[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("engine", ENGINES)
def test_accumulation_into_the_weights_gradient(engine: str) -> None:
    case, tokens = with_tokens(make_case("plain", torch.bfloat16))
    constants = (tokens["advantages"], tokens["token_weights"])
    case, (_, weight) = trained(case)
    weight.grad = torch.ones_like(weight)
    settings: dict[str, Any] = {"accumulate_grad": True, **ENGINES[engine]}
    triton_loss(*case[:3], *constants, objective=CLIPPED, **settings).loss.backward()
    wide, (_, wide_weight) = trained(cleaned(case, torch.float64))
    loss = policy_loss_reference(
        *wide[:3], *(x.double() for x in constants), objective=CLIPPED
    ).loss
    (truth,) = torch.autograd.grad(loss, wide_weight)
    check_gradients([weight.grad], [(truth + 1).bfloat16()], [truth + 1])


@pytest.mark.parametrize("engine", ENGINES_OF_FLOAT16)
def test_tiny_weights_in_float16(engine: str) -> None:
    """1e-5 times a probability is below what float16 holds; a loss scale brings the sums back."""
    case, tokens = with_tokens(make_case("everything", torch.float16))
    constants = {name: tokens[name] for name in ("advantages", "old_logps")}
    settings = {"objective": CLIPPED, "temperature": case.temperature, **ENGINES[engine]}

    def gradients(scale: float) -> tuple[Tensor, ...]:
        leaves, tensors = trained(case)
        weights = tokens["token_weights"] * S * scale
        loss = triton_loss(*leaves[:3], token_weights=weights, **constants, **settings).loss
        return torch.autograd.grad(loss / scale, tensors)

    for small, large in zip(gradients(2**-17), gradients(1.0), strict=True):
        torch.testing.assert_close(small, large, rtol=0.01, atol=0.01)
        assert large.abs().max() > 0.1


@pytest.mark.parametrize("engine", ENGINES_OF_FLOAT16)
def test_a_huge_ratio_in_float16(engine: str) -> None:
    """A negative advantage is not clipped from above: this slope is e^14 times the weight."""
    case, tokens = with_tokens(make_case("plain", torch.float16))
    tokens["advantages"][0] = -1
    tokens["old_logps"][0] -= 14
    names = ("advantages", "token_weights", "old_logps")

    def gradients(inputs: Case, function: Callable[..., Any], dtype: torch.dtype) -> Any:
        leaves, tensors = trained(inputs)
        constants = {name: tokens[name].to(dtype) for name in names}
        loss = function(*leaves[:3], **constants, objective=CLIPPED).loss
        return torch.autograd.grad(loss * 1e-4, tensors)

    function = functools.partial(triton_loss, **ENGINES[engine])
    got = gradients(case, function, torch.float32)
    truth = gradients(cleaned(case, torch.float64), policy_loss_reference, torch.float64)
    for grad, expected in zip(got, truth, strict=True):
        assert (grad - expected).norm() <= 0.003 * expected.norm()


def my_surrogate(logp, old_logp, advantage, width):  # type: ignore[no-untyped-def]
    """A bump around the old policy, which no library has."""
    x = (logp - old_logp) / width
    bump = tl.exp(-0.5 * x * x)
    return advantage * bump, -advantage * bump * x / width


@pytest.mark.parametrize("engine", ENGINES)
def test_an_objective_of_the_users_own(engine: str) -> None:
    case, tokens = with_tokens(make_case("plain", torch.float32))
    objective = Objective(my_surrogate, (0.5,))
    check_policy_loss(case, tokens, ("old_logps",), objective=objective, **ENGINES[engine])
