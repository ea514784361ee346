"""Stepping in the backward pass against the ordinary step, which is checked against torch's own."""

from __future__ import annotations

import copy
import math
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastrl.errors import InputError
from fastrl.optim import LeanAdamW, Stepper, clip_factor, gradient_norm, parameter_groups

V, D, N = 37, 24, 65  # vocabulary, width, tokens


class TiedModel(nn.Module):
    """Embedding and head share one weight; a layer that is never used; a frozen one; an adapter."""

    def __init__(self, *, checkpointed: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(V, D)
        self.layers = nn.ModuleList(nn.Linear(D, D) for _ in range(4))
        self.norm = nn.LayerNorm(D)
        self.unused = nn.Linear(D, D)
        self.lora_a = nn.Parameter(torch.randn(3, D) / D)
        self.lora_b = nn.Parameter(torch.zeros(D, 3))
        self.layers[0].requires_grad_(False)
        self.checkpointed = checkpointed

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embedding(ids)
        for layer in self.layers:

            def run(x: Tensor, layer: nn.Module = layer) -> Tensor:
                return torch.tanh(layer(x))

            if self.checkpointed:
                hidden = hidden + checkpoint(run, hidden, use_reentrant=False)
            else:
                hidden = hidden + run(hidden)
        hidden = self.norm(hidden + hidden @ self.lora_a.T @ self.lora_b.T)
        return hidden @ self.embedding.weight.T


def new_model(dtype: torch.dtype = torch.float32, **options) -> TiedModel:
    torch.manual_seed(0)
    return TiedModel(**options).to(dtype)


class Problem:
    """A model that learns a fixed permutation, a few passes of tokens a step."""

    def __init__(
        self, in_backward: str, *, num_passes: int, weights="float32", moments="float32",
        max_grad_norm: float = 0.5, model: TiedModel | None = None,
    ) -> None:  # fmt: skip
        dtype = torch.float32 if weights == "float32" else torch.bfloat16
        self.model = model or new_model(dtype)
        self.num_passes = num_passes
        self.num_calls = 0
        groups = parameter_groups(self.model, learning_rate=1e-2, weight_decay=0.01)
        optimizer = LeanAdamW(groups, weights=weights, moments=moments, chunk_size=256)
        self.stepper = Stepper(optimizer, max_grad_norm=max_grad_norm, in_backward=in_backward)

    def loss(self, step: int, index: int) -> Tensor:
        generator = torch.Generator().manual_seed(100 * step + index)
        ids = torch.randint(V, (N,), generator=generator)
        return nn.functional.cross_entropy(self.model(ids).float(), (7 * ids + 3) % V)

    def backward(self, step: int, index: int) -> None:
        self.num_calls += 1
        self.loss(step, index).backward()

    def run(self, first: int, last: int) -> list[float]:
        return [
            self.stepper.step(self.num_passes, lambda index, step=step: self.backward(step, index))
            .grad_norm
            for step in range(first, last)
        ]  # fmt: skip


def assert_same_weights(one: nn.Module, other: nn.Module) -> None:
    for (name, found), expected in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(found, expected), name


def test_an_ordinary_step_has_the_bits_of_torch():
    problem = Problem("off", num_passes=2)
    model = new_model()
    groups = parameter_groups(model, learning_rate=1e-2, weight_decay=0.01)
    optimizer = torch.optim.AdamW(groups, foreach=True)
    parameters = [p for group in groups for p in group["params"]]
    for step in range(5):
        (norm,) = problem.run(step, step + 1)
        other = Problem("off", num_passes=2, model=model)
        for index in range(2):
            other.loss(step, index).backward()
        assert norm == float(nn.utils.clip_grad_norm_(parameters, 0.5))
        assert norm > 0.5  # so that it is clipped
        optimizer.step()
        optimizer.zero_grad()
        assert_same_weights(problem.model, model)


@pytest.mark.parametrize("num_passes", [1, 3])
@pytest.mark.parametrize(
    ("weights", "moments"), [("float32", "float32"), ("split", "8bit"), ("stochastic", "cpu")]
)
def test_two_phases_have_the_bits_of_an_ordinary_step(num_passes, weights, moments):
    ordinary, twice = (
        Problem(mode, num_passes=num_passes, weights=weights, moments=moments)
        for mode in ("off", "two_phase")
    )
    assert twice.run(0, 6) == ordinary.run(0, 6)
    assert_same_weights(twice.model, ordinary.model)
    assert twice.num_calls == 6 * (2 if num_passes == 1 else num_passes)


@pytest.mark.parametrize("num_passes", [1, 3])
def test_the_previous_norm_steps_as_an_ordinary_step_where_nothing_is_clipped(num_passes):
    ordinary, once = (
        Problem(mode, num_passes=num_passes, max_grad_norm=1e3) for mode in ("off", "previous_norm")
    )
    assert once.run(0, 6) == pytest.approx(ordinary.run(0, 6), rel=1e-6)
    assert_same_weights(once.model, ordinary.model)
    # The first step alone measures its norm in a pass of its own.
    assert once.num_calls == 6 * num_passes + (1 if num_passes == 1 else 0)


def test_the_previous_norm_clips_by_the_last_step_or_by_what_is_seen_so_far():
    """Against the definition, gradient by gradient in the order in which they come."""
    problem = Problem("previous_norm", num_passes=1)
    (previous,) = problem.run(0, 1)
    expected = copy.deepcopy(problem)
    order: list[Tensor] = []
    parameters = [p for p in problem.model.parameters() if p.requires_grad]
    handles = [p.register_post_accumulate_grad_hook(order.append) for p in parameters]
    problem.run(1, 2)
    for handle in handles:
        handle.remove()
    twin = dict(
        zip(parameters, [p for p in expected.model.parameters() if p.requires_grad], strict=True)
    )
    expected.loss(1, 0).backward()
    squares = 0.0
    scales = []
    for parameter in order:
        gradient = twin[parameter].grad
        squares += float(gradient.double().square().sum())
        scales.append(clip_factor(max(previous, math.sqrt(squares)), 0.5))
        expected.stepper.optimizer.step_parameter(twin[parameter], scale=scales[-1])
    for found, other in twin.items():
        torch.testing.assert_close(found, other, rtol=1e-6, atol=1e-7)
    assert problem.stepper.previous_norm == pytest.approx(math.sqrt(squares), rel=1e-6)


def test_a_spike_is_clipped_although_the_last_norm_was_small():
    problem = Problem("previous_norm", num_passes=1)
    problem.stepper.previous_norm = 1e-4
    problem.run(0, 1)
    moments = [problem.stepper.optimizer.state[p] for p in problem.model.parameters()]
    largest = [float(s["exp_avg"].norm()) / 0.1 for s in moments if s]
    assert max(largest) <= 0.5 * (1 + 1e-6)
    assert problem.stepper.previous_norm > 0.5


@pytest.mark.parametrize("in_backward", ["off", "two_phase", "previous_norm"])
@pytest.mark.parametrize("num_passes", [1, 2])
def test_a_resumed_stepper_has_the_bits_of_one_that_was_not_stopped(in_backward, num_passes):
    whole = Problem(in_backward, num_passes=num_passes, weights="split", moments="8bit")
    norms = whole.run(0, 6)
    first = Problem(in_backward, num_passes=num_passes, weights="split", moments="8bit")
    assert first.run(0, 3) == norms[:3]
    second = Problem(
        in_backward, num_passes=num_passes, weights="split", moments="8bit",
        model=copy.deepcopy(first.model),
    )  # fmt: skip
    second.stepper.load_state_dict(copy.deepcopy(first.stepper.state_dict()))
    assert second.run(3, 6) == norms[3:]
    assert_same_weights(second.model, whole.model)


@pytest.mark.parametrize("in_backward", ["off", "two_phase", "previous_norm"])
@pytest.mark.parametrize("num_passes", [1, 2])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(in_backward, num_passes, value):
    """The whole gradient spoilt at the head; in previous_norm that is the first to come."""
    problem = Problem(in_backward, num_passes=num_passes, weights="split", moments="8bit")
    problem.run(0, 2)
    before = copy.deepcopy((problem.model.state_dict(), problem.stepper.state_dict()))

    def spoilt(index: int) -> None:
        (problem.loss(2, index) * value).backward()

    outcome = problem.stepper.step(num_passes, spoilt)
    assert not outcome.is_applied
    assert not math.isfinite(outcome.grad_norm)
    after = (problem.model.state_dict(), problem.stepper.state_dict())
    assert str(before[1]["optimizer"]["state"].keys()) == str(after[1]["optimizer"]["state"].keys())
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert all(p.grad is None for p in problem.model.parameters())
    assert problem.run(2, 3)[0] == Problem.run(problem_from(before, problem), 2, 3)[0]


def problem_from(state: tuple[dict, dict], like: Problem) -> Problem:
    model = new_model(torch.bfloat16)
    model.load_state_dict(state[0])
    made = Problem(
        like.stepper.in_backward, num_passes=like.num_passes, weights="split", moments="8bit",
        model=model,
    )  # fmt: skip
    made.stepper.load_state_dict(state[1])
    return made


def test_the_previous_norm_keeps_what_came_before_the_first_bad_gradient():
    """The embedding's gradient, the last to come, is spoilt: earlier ones were stepped already."""
    problem = Problem("previous_norm", num_passes=1)
    problem.run(0, 1)
    before = copy.deepcopy(problem.model)

    def spoil(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        output.register_hook(lambda gradient: gradient * math.nan)

    handle = problem.model.embedding.register_forward_hook(spoil)
    outcome = problem.stepper.step(1, lambda index: problem.backward(1, index))
    handle.remove()
    assert not outcome.is_applied
    assert torch.equal(problem.model.embedding.weight, before.embedding.weight)
    assert not torch.equal(problem.model.lora_b, before.lora_b)
    assert all(p.isfinite().all() for p in problem.model.parameters())


@pytest.mark.parametrize("in_backward", ["two_phase", "previous_norm"])
def test_gradients_are_freed_one_by_one(in_backward):
    """At most one parameter's gradient is there at a time."""
    problem = Problem(in_backward, num_passes=1)
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    most = 0

    def count(parameter: Tensor) -> None:
        nonlocal most
        alive.add(parameter.grad)
        most = max(most, sum(p.grad is not None for p in problem.model.parameters()))

    for parameter in problem.model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(count)
    problem.run(0, 3)
    assert most == 1
    assert not alive


@pytest.mark.parametrize("in_backward", ["off", "two_phase", "previous_norm"])
def test_checkpointed_layers_step_as_others(in_backward):
    plain = Problem(in_backward, num_passes=1)
    recomputed = Problem(in_backward, num_passes=1, model=new_model(checkpointed=True))
    assert recomputed.run(0, 4) == plain.run(0, 4)
    assert_same_weights(recomputed.model, plain.model)


def test_several_backward_calls_of_a_pass_are_refused():
    problem = Problem("two_phase", num_passes=1)

    def twice(index: int) -> None:
        problem.backward(0, index)
        problem.backward(0, index)

    with pytest.raises(InputError, match="several backward calls"):
        problem.stepper.step(1, twice)
    assert all(p.grad is None for p in problem.model.parameters())
    assert problem.run(0, 2) == Problem("off", num_passes=1).run(0, 2)  # hooks are gone


def test_a_step_without_passes_changes_nothing():
    for in_backward in ("off", "two_phase", "previous_norm"):
        problem = Problem(in_backward, num_passes=1)
        problem.run(0, 1)
        before = copy.deepcopy((problem.model.state_dict(), problem.stepper.state_dict()))
        assert problem.stepper.step(0, lambda index: None) == (0.0, True)
        torch.testing.assert_close(
            (problem.model.state_dict(), problem.stepper.state_dict()), before, rtol=0, atol=0
        )


def test_norms_of_bfloat16_gradients_are_taken_in_float32():
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(n, generator=generator).bfloat16() for n in (5_000_011, 257, 1)]
    truth = math.sqrt(sum(float(g.double().square().sum()) for g in gradients))
    copied = [torch.linalg.vector_norm(g.float()).double() for g in gradients]
    allowed = 2 * abs(float(torch.stack(copied).norm()) - truth)  # of torch in float32
    assert abs(gradient_norm(gradients) - truth) < allowed
    assert gradient_norm([]) == 0.0
