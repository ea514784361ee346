"""linear_logps in row chunks against the reference with all logits; truth is float64."""

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fastrl_kernels import LinearLogps, LMHead, linear_logps
from fastrl_kernels.linear_logps import linear_logps_reference
from fastrl_kernels.plan import explain

S, D, V, R = 37, 19, 123, 3
SMALL = 0.12  # MiB: a few rows a chunk, several slices of the vocabulary


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fill what torch.empty returns with NaN, and refuse operations without a fixed order."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def make_inputs(seed: int, **features: object) -> tuple[Tensor, LMHead, Tensor]:
    """Hidden states, head and targets (some ignored) in float64; features replace LMHead fields."""
    generator = torch.Generator().manual_seed(seed)
    hidden = normal(generator, S, D)
    head = LMHead(normal(generator, V, D), normal(generator, V))
    head = head._replace(lora_a=normal(generator, R, D), lora_b=normal(generator, V, R))
    head = head._replace(**features)
    target_ids = torch.randint(0, head.num_columns, (S,), generator=generator)
    target_ids[::5] = -1 - torch.arange(len(target_ids[::5])) * 33
    return hidden, head, target_ids


def leaves(hidden: Tensor, head: LMHead) -> list[Tensor]:
    tensors = (hidden, head.weight, head.bias, head.lora_a, head.lora_b)
    return [tensor.requires_grad_() for tensor in tensors if tensor is not None]


def gradients(out: LinearLogps, tensors: list[Tensor], seed: int = 9) -> tuple[Tensor, ...]:
    """Gradients of a random weighting of logps and entropies."""
    weights = normal(torch.Generator().manual_seed(seed), 2, S).to(out.logps.dtype)
    return torch.autograd.grad((out.logps, out.entropies), tensors, tuple(weights))


COMBINATIONS = list(itertools.product([True, False], [True, False], [1.0, 0.3], [None, 4.0]))


@pytest.mark.parametrize(("has_bias", "has_lora", "logit_scale", "softcap"), COMBINATIONS)
@pytest.mark.parametrize("vocab_size", [None, V - 6])
@pytest.mark.parametrize("per_token", [True, False])
def test_values_and_gradients_match_the_reference(
    has_bias: bool,
    has_lora: bool,
    logit_scale: float,
    softcap: float | None,
    vocab_size: int | None,
    per_token: bool,
) -> None:
    features: dict = {"logit_scale": logit_scale, "softcap": softcap, "vocab_size": vocab_size}
    features |= {} if has_bias else {"bias": None}
    features |= {"lora_scale": 0.7} if has_lora else {"lora_a": None, "lora_b": None}
    hidden, head, target_ids = make_inputs(0, **features)
    tensors = leaves(hidden, head)
    temperature = torch.linspace(0.5, 2, S, dtype=torch.float64) if per_token else 0.8
    out = linear_logps(hidden, head, target_ids, temperature=temperature, workspace_mb=SMALL)
    truth = linear_logps_reference(hidden, head, target_ids, temperature=temperature)
    for value, expected in zip(out, truth, strict=True):
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-10)
    grads, expected_grads = gradients(out, tensors), gradients(truth, tensors)
    for grad, expected in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected, rtol=0, atol=1e-10)


def test_reference_gradients_match_finite_differences() -> None:
    hidden, head, target_ids = make_inputs(1, softcap=4.0, logit_scale=0.5, vocab_size=V - 6)
    tensors = leaves(hidden, head)

    def scalar(*tensors: Tensor) -> Tensor:
        out = linear_logps_reference(tensors[0], head._replace(weight=tensors[1]), target_ids)
        return (out.logps * torch.linspace(-1, 1, S)).sum() + out.entropies.sin().sum()

    assert torch.autograd.gradcheck(scalar, tensors[:2], fast_mode=True)


def test_full_distribution_example() -> None:
    logits = torch.tensor([[1.0, 0.0, -1.0, 0.5]], requires_grad=True)
    rows = logits.expand(4, 4)
    out = linear_logps(rows, torch.eye(4), torch.arange(4))
    log_p = torch.tensor([-0.746567, -1.746567, -2.746567, -1.246567])
    torch.testing.assert_close(out.logps, log_p, rtol=0, atol=1e-5)
    for value, golden in zip(
        (out.entropies, out.sum_p2, out.sum_p3), (1.192979, 0.341838, 0.135817), strict=True
    ):
        torch.testing.assert_close(value, torch.full((4,), golden), rtol=0, atol=1e-5)
    (grad,) = torch.autograd.grad(out.entropies[0], logits)
    golden_grad = torch.tensor([[-0.211595, 0.096530, 0.099659, 0.015406]])
    torch.testing.assert_close(grad, golden_grad, rtol=0, atol=1e-5)
    assert out.argmax_ids.tolist() == [0, 0, 0, 0]


def test_ignored_rows_are_zero_and_harmless() -> None:
    hidden, head, target_ids = make_inputs(5)
    hidden[target_ids < 0] = torch.nan
    tensors = leaves(hidden, head)
    out = linear_logps(hidden, head, target_ids, workspace_mb=SMALL)
    kept = target_ids >= 0
    for value in out:
        assert torch.equal(value[~kept], torch.zeros_like(value[~kept]))
    grads = gradients(out, tensors)
    assert torch.equal(grads[0][~kept], torch.zeros_like(grads[0][~kept]))
    rows = hidden[kept].detach().requires_grad_()
    truth = linear_logps_reference(rows, head, target_ids[kept])
    weights = normal(torch.Generator().manual_seed(9), 2, S)[:, kept]
    expected = torch.autograd.grad(
        (truth.logps, truth.entropies), [rows, *tensors[1:]], tuple(weights)
    )
    torch.testing.assert_close(grads[0][kept], expected[0], rtol=0, atol=1e-10)
    for grad, other in zip(grads[1:], expected[1:], strict=True):
        torch.testing.assert_close(grad, other, rtol=0, atol=1e-10)


def test_all_rows_ignored() -> None:
    hidden, head, _ = make_inputs(6)
    tensors = leaves(hidden, head)
    out = linear_logps(hidden, head, torch.full((S,), -100))
    for value in (*out, *gradients(out, tensors)):
        assert torch.equal(value, torch.zeros_like(value))


def test_no_rows() -> None:
    hidden, head, target_ids = make_inputs(7)
    tensors = leaves(hidden, head)
    out = linear_logps(hidden[:0], head, target_ids[:0])
    assert all(value.shape == (0,) for value in out)
    for grad in torch.autograd.grad(out.logps.sum() + out.entropies.sum(), tensors):
        assert torch.equal(grad, torch.zeros_like(grad))


def test_rows_without_slope_do_not_change_the_others() -> None:
    hidden, head, target_ids = make_inputs(8)
    tensors = leaves(hidden, head)
    slopes = normal(torch.Generator().manual_seed(8), 2, S)
    slopes[:, ::2] = 0
    slopes[0, 1::4] = 0  # rows with an entropy slope alone must stay
    out = linear_logps(hidden, head, target_ids, workspace_mb=SMALL)
    truth = linear_logps_reference(hidden, head, target_ids)
    grads = torch.autograd.grad((out.logps, out.entropies), tensors, tuple(slopes))
    expected = torch.autograd.grad((truth.logps, truth.entropies), tensors, tuple(slopes))
    for grad, other in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, other, rtol=0, atol=1e-10)
    assert torch.equal(grads[0][::2], torch.zeros_like(grads[0][::2]))


def test_padding_columns_change_nothing() -> None:
    hidden, head, target_ids = make_inputs(9, vocab_size=V - 6)
    tensors = leaves(hidden, head)
    with torch.no_grad():
        head.weight[V - 6 :] = 1e4
    out = linear_logps(hidden, head, target_ids)
    cut = head._replace(
        weight=head.weight[: V - 6],
        bias=head.bias[: V - 6],  # type: ignore[index]
        lora_b=head.lora_b[: V - 6],  # type: ignore[index]
        vocab_size=None,
    )
    for value, other in zip(out, linear_logps(hidden, cut, target_ids), strict=True):
        assert torch.equal(value, other)
    grads = gradients(out, tensors)
    for grad in (grads[1], grads[2], grads[4]):
        assert torch.equal(grad[V - 6 :], torch.zeros_like(grad[V - 6 :]))


@pytest.mark.parametrize("workspace_mb", [0.0, 0.0005])
def test_workspace_below_one_row_raises(workspace_mb: float) -> None:
    hidden, head, target_ids = make_inputs(10)
    with pytest.raises(ValueError, match="workspace_mb") as error:
        linear_logps(hidden, head, target_ids, workspace_mb=workspace_mb)
    enough = float(str(error.value).rsplit(" ", 1)[1])
    assert explain(hidden.detach(), head, workspace_mb=enough).rows >= 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_states": torch.zeros(2, 3, D)}, "hidden_states"),
        ({"hidden_states": torch.zeros(S, D)}, "one dtype"),
        ({"hidden_states": torch.zeros(S, D + 1, dtype=torch.float64)}, "weight"),
        ({"target_ids": torch.zeros(S)}, "target_ids"),
        ({"target_ids": torch.zeros(S - 1, dtype=torch.int64)}, "target_ids"),
        ({"target_ids": torch.full((S,), V)}, "vocabulary size"),
        ({"target_ids": torch.zeros(S, dtype=torch.int64, device="meta")}, "one device"),
        ({"bias": torch.zeros(V - 1)}, "bias"),
        ({"lora_a": None}, "lora_a and lora_b"),
        ({"lora_b": torch.zeros(V, R + 1)}, "lora_b"),
        ({"vocab_size": V + 1}, "vocab_size"),
        ({"softcap": -1.0}, "softcap"),
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": torch.ones(S - 1)}, "temperature"),
        ({"temperature": torch.zeros(S)}, "temperature"),
        ({"temperature": torch.ones(S, requires_grad=True)}, "temperature"),
        ({"implementation": "triton"}, '"torch"'),
        ({"implementation": "fast"}, "implementation"),
    ],
)
def test_bad_arguments_raise(change: dict, message: str) -> None:
    hidden, head, target_ids = make_inputs(11)
    fields = {name: value for name, value in change.items() if name in LMHead._fields}
    arguments = {"hidden_states": hidden, "target_ids": target_ids, "lm_head": head}
    arguments |= {"lm_head": head._replace(**fields)}
    arguments |= {name: value for name, value in change.items() if name not in fields}
    with pytest.raises(ValueError, match=message):
        linear_logps(**arguments)
