"""Schedules by transformers' names against transformers' own schedulers."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import get_scheduler

from fastrl.config import OptimConfig
from fastrl.errors import InputError
from fastrl.integrations.schedules import make_schedule

KINDS = {
    "linear": {},
    "cosine": {},
    "cosine_with_restarts": {"num_cycles": 3},
    "polynomial": {"lr_end": 1e-8, "power": 2.0},
    "constant_with_warmup": {},
    "inverse_sqrt": {},
    "cosine_with_min_lr": {"min_lr": 1e-7},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1},
    "warmup_stable_decay": {"num_decay_steps": 20, "decay_type": "1-sqrt"},
}
PEAK, MAX_STEPS = 3e-6, 97


def config_of(kind: str, warmup_steps: int = 0, **arguments) -> OptimConfig:
    return OptimConfig(
        learning_rate=PEAK, lr_scheduler_type=kind, warmup_steps=warmup_steps,
        lr_scheduler_kwargs=arguments,
    )  # fmt: skip


@pytest.mark.parametrize("warmup_steps", [0, 1, 7])
@pytest.mark.parametrize("kind", KINDS)
def test_rates_after_the_warm_up_are_those_of_transformers(kind, warmup_steps):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=PEAK)
    scheduler = get_scheduler(kind, optimizer, warmup_steps, MAX_STEPS, dict(KINDS[kind]))
    factor = make_schedule(config_of(kind, warmup_steps, **KINDS[kind]), MAX_STEPS)
    rates = []
    for _ in range(MAX_STEPS):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    after = range(warmup_steps, MAX_STEPS)
    assert [PEAK * factor(step) for step in after] == [rates[step] for step in after]
    shifted = 0 if kind == "cosine_warmup_with_min_lr" else 1  # whose first step moves anyhow
    for step in range(warmup_steps - 1):
        assert PEAK * factor(step) == rates[step + shifted]
    assert factor(0) > 0
    assert factor(max(0, warmup_steps - 1)) == 1.0 or not warmup_steps


@pytest.mark.parametrize("warmup_steps", [0, 5])
def test_shapes_by_their_definitions(warmup_steps):
    shapes = {
        "constant": lambda progress: 1.0,
        "linear": lambda progress: 1.0 - progress,
        "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
    }
    for kind, shape in shapes.items():
        factor = make_schedule(config_of(kind, warmup_steps), MAX_STEPS)
        for step in range(MAX_STEPS):
            if step < warmup_steps:
                expected = (step + 1) / warmup_steps
            else:
                expected = shape((step - warmup_steps) / (MAX_STEPS - warmup_steps))
            assert factor(step) == pytest.approx(expected, rel=4e-16, abs=2e-16)


def test_a_schedule_is_a_function_of_the_step():
    factor = make_schedule(config_of("cosine", 5), MAX_STEPS)
    forwards = [factor(step) for step in range(MAX_STEPS)]
    assert [factor(step) for step in reversed(range(MAX_STEPS))] == forwards[::-1]


def test_a_warm_up_longer_than_the_run_is_one():
    for kind, arguments in KINDS.items():
        if kind == "warmup_stable_decay":
            continue  # its phases must add up to the run
        factor = make_schedule(config_of(kind, 10, **arguments), 4)
        assert [factor(step) for step in range(4)] == pytest.approx([0.1, 0.2, 0.3, 0.4])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (config_of("cosin"), "'cosin' is not known; did you mean 'cosine'"),
        (config_of("reduce_lr_on_plateau"), "follows the loss, not the step"),
        (config_of("greedy"), "follows the loss, not the step"),
        (config_of("constant", min_lr=1.0), "takes no optim.lr_scheduler_kwargs"),
        (config_of("cosine", min_lr=1.0), "unexpected keyword argument 'min_lr'"),
        (config_of("cosine_with_min_lr"), "min_lr"),
        (config_of("polynomial", lr_end=1.0), "must be smaller than initial lr"),
        (config_of("warmup_stable_decay"), "num_decay_steps"),
        (config_of("cosine", num_cycles=math.inf), "lr_scheduler_kwargs"),
    ],
)
def test_what_is_no_schedule_is_refused(config, message):
    with pytest.raises(InputError, match=message):
        make_schedule(config, MAX_STEPS)
