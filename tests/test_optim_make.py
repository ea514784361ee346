"""Optimizers by name: what is refused before any compute, and the libraries where installed."""

from __future__ import annotations

import copy
import io
from importlib.util import find_spec

import pytest
import torch
from torch import nn

from fastrl.config import Config, ModelConfig, OptimConfig
from fastrl.errors import InputError
from fastrl.optim import LeanAdamW, Stepper, check_optimizer, make_optimizer, parameter_groups
from fastrl.optim import make as make_module
from fastrl.optim.make import LIBRARIES, MOMENTS


def config_of(*, device: str = "auto", precision: str = "float32", **optim) -> Config:
    return Config(model=ModelConfig(device=device, precision=precision), optim=OptimConfig(**optim))


def installed(monkeypatch, *packages: str) -> None:
    monkeypatch.setattr(make_module, "find_spec", lambda name: name in packages or None)


def made(name: str, module: nn.Module, **options) -> torch.optim.Optimizer:
    groups = parameter_groups(module, learning_rate=1e-2, weight_decay=0.1)
    config = OptimConfig(optimizer=name, learning_rate=1e-2, adam_beta2=0.99)
    return make_optimizer(groups, config, **{"precision": "float32", "seed": 3, **options})


@pytest.mark.parametrize("name", [*MOMENTS, *LIBRARIES])
@pytest.mark.parametrize("precision", ["float32", "autocast"])
def test_what_fits_together_passes(monkeypatch, name, precision):
    installed(monkeypatch, "bitsandbytes", "torchao")
    check_optimizer(config_of(optimizer=name, precision=precision))


@pytest.mark.parametrize("name", MOMENTS)
@pytest.mark.parametrize("precision", ["float32", "autocast", "split", "stochastic"])
@pytest.mark.parametrize("in_backward", ["off", "two_phase", "previous_norm"])
def test_ours_fit_with_all(monkeypatch, name, precision, in_backward):
    installed(monkeypatch)
    config = config_of(optimizer=name, precision=precision, in_backward=in_backward, device="cpu")
    check_optimizer(config)
    dtype = torch.bfloat16 if precision in ("split", "stochastic") else torch.float32
    optimizer = made(name, nn.Linear(5, 3).to(dtype), precision=precision)
    assert isinstance(optimizer, LeanAdamW)
    Stepper(optimizer, max_grad_norm=1.0, in_backward=in_backward)
    assert optimizer.moments == MOMENTS[name]
    assert optimizer.weights == ("float32" if precision == "autocast" else precision)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert all(group["betas"] == (0.9, 0.99) for group in optimizer.param_groups)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "adam_8bit"}, "unknown optim.optimizer 'adam_8bit'; did you mean"),
        (
            {"optimizer": "bnb_adamw_8bit", "precision": "split"},
            "bnb_adamw_8bit and model.precision split exclude each other",
        ),
        (
            {"optimizer": "torchao_adamw_4bit", "precision": "stochastic"},
            "torchao_adamw_4bit and model.precision stochastic exclude each other",
        ),
        (
            {"optimizer": "torchao_adamw_8bit", "in_backward": "two_phase"},
            "torchao_adamw_8bit and optim.in_backward two_phase exclude each other",
        ),
        ({"optimizer": "bnb_paged_adamw_8bit", "device": "cpu"}, "needs a GPU"),
    ],
)
def test_what_excludes_each_other_is_refused(monkeypatch, options, message):
    installed(monkeypatch, "bitsandbytes", "torchao")
    with pytest.raises(InputError, match=message):
        check_optimizer(config_of(**options))


@pytest.mark.parametrize("name", LIBRARIES)
def test_a_missing_extra_is_named(monkeypatch, name):
    installed(monkeypatch)
    package = name.split("_")[0].replace("bnb", "bitsandbytes")
    with pytest.raises(InputError, match=rf"pip install 'fastrl-llm\[{package}\]'"):
        check_optimizer(config_of(optimizer=name))


def test_a_library_cannot_step_in_the_backward_pass():
    model = nn.Linear(3, 5)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with pytest.raises(InputError, match="which SGD cannot"):
        Stepper(optimizer, max_grad_norm=1.0, in_backward="two_phase")


CPU_LIBRARIES = [name for name in LIBRARIES if not LIBRARIES[name].needs_gpu]


@pytest.fixture(params=CPU_LIBRARIES)
def library(request) -> str:
    package = LIBRARIES[request.param].package
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    return request.param


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_pages_need_a_gpu():
    """On the CPU bitsandbytes would keep ordinary states instead, with a warning."""
    with pytest.raises(InputError, match="bnb_paged_adamw_8bit needs a GPU"):
        made("bnb_paged_adamw_8bit", nn.Linear(5, 3))


def trained(optimizer: torch.optim.Optimizer, model: nn.Module, first: int, last: int) -> list:
    """Losses of a regression, by the stepper."""
    stepper = Stepper(optimizer, max_grad_norm=1.0)
    truth = torch.randn(64, 64, generator=torch.Generator().manual_seed(9)) / 8
    losses = []

    def backward(step: int) -> None:
        inputs = torch.randn(64, 64, generator=torch.Generator().manual_seed(step))
        loss = (model(inputs) - inputs @ truth).square().mean()
        loss.backward()
        losses.append(float(loss.detach()))

    for step in range(first, last):
        outcome = stepper.step(1, lambda index, step=step: backward(step))
        assert outcome.is_applied
    return losses


def new_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(64, 64)


def test_a_library_trains_as_float32_does(library):
    ours, theirs = new_model(), new_model()
    exact = trained(made("adamw", ours), ours, 0, 60)
    found = trained(made(library, theirs), theirs, 0, 60)
    assert exact[-1] < exact[0] / 20
    if "4bit" in library:
        assert found == pytest.approx(exact, abs=0.1 * exact[0])
    else:
        assert found == pytest.approx(exact, rel=0.1)


def test_a_resumed_library_has_the_bits_of_one_that_was_not_stopped(library):
    """And the options of the new configuration."""
    whole = new_model()
    losses = trained(made(library, whole), whole, 0, 8)
    model = new_model()
    optimizer = made(library, model)
    assert trained(optimizer, model, 0, 5) == losses[:5]
    file = io.BytesIO()
    torch.save(Stepper(optimizer, max_grad_norm=1.0).state_dict(), file)
    file.seek(0)
    model = copy.deepcopy(model)
    optimizer = made(library, model)
    optimizer.param_groups[0]["peak_lr"] = 0.5
    stepper = Stepper(optimizer, max_grad_norm=1.0)
    stepper.load_state_dict(torch.load(file, weights_only=True))
    assert optimizer.param_groups[0]["peak_lr"] == 0.5
    assert trained(optimizer, model, 5, 8) == losses[5:]
    for found, expected in zip(model.parameters(), whole.parameters(), strict=True):
        assert torch.equal(found, expected)


def test_a_gradient_that_is_not_finite_leaves_a_library_alone(library):
    model = new_model()
    optimizer = made(library, model)
    trained(optimizer, model, 0, 2)
    before = copy.deepcopy(model.state_dict())
    outcome = Stepper(optimizer, max_grad_norm=1.0).step(
        1, lambda index: (model(torch.ones(1, 64)).sum() * torch.inf).backward()
    )
    assert not outcome.is_applied
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_options_of_a_restored_optimizer_are_its_own():
    model = new_model()
    optimizer = made("adamw_8bit", model)
    trained(optimizer, model, 0, 2)
    state = Stepper(optimizer, max_grad_norm=1.0).state_dict()
    other = made("adamw_8bit", new_model())
    for group in other.param_groups:
        group.update(lr=0.5, peak_lr=0.25, betas=(0.5, 0.5))
    expected = copy.deepcopy(other.param_groups)
    Stepper(other, max_grad_norm=1.0).load_state_dict(state)
    for found, own in zip(other.param_groups, expected, strict=True):
        assert {k: v for k, v in found.items() if k != "params"} == {
            k: v for k, v in own.items() if k != "params"
        }
