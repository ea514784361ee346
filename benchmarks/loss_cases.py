"""The objective of S tokens whose log-probabilities are there already, with its gradient.

objectives  every per-token objective by `token_loss`, each beside plain PPO-clip
peers       PPO-clip in PyTorch, bare and with the numbers that a trainer logs, which ours has

S selected tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from cases import Loaders, Prepared
from implementations import load
from measure import Step
from reference import EPSILON_HIGH, EPSILON_LOW, Errors, token_losses
from torch import Tensor

from fastrl.methods.axes import hyper_parameters_of
from fastrl.methods.defaults import DEFAULTS
from fastrl_kernels.objectives import REGULARISERS, SURROGATES, Objective, Regulariser
from fastrl_kernels.token_loss import token_loss_reference

PLAIN = "clipped_ratio"
CLIP = Objective(SURROGATES[PLAIN], (EPSILON_LOW, EPSILON_HIGH))
COMPUTED = {"pass_rate": 0.4, "step_size": 0.5, "reward": 1.0, "low": 0.8, "high": 1.2}
"""Stand-ins for hyper-parameters that a method computes from the batch."""


@dataclass(frozen=True)
class Tokens:
    """What a case is large in."""

    num_tokens: int
    device: str
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class LossCase:
    """Some implementations at one size."""

    group: str
    shape: Tokens

    def __str__(self) -> str:
        """Name of the case in the results."""
        return f"token_loss {self.group} S={self.shape.num_tokens}"


class Inputs(NamedTuple):
    """(S,) each; the first requires a gradient."""

    logps: Tensor
    entropies: Tensor
    advantages: Tensor
    token_weights: Tensor
    old_logps: Tensor
    ref_logps: Tensor

    def loss(self, run: Callable[..., Any], objective: Objective) -> Tensor:
        """Of `token_loss` or its reference."""
        return run(
            *self[:4], objective=objective, old_logps=self.old_logps, ref_logps=self.ref_logps
        ).loss


class Result(NamedTuple):
    """What one call left behind."""

    objective: Objective
    loss: Tensor


TorchLoss = Callable[[Inputs], tuple[Tensor, list[Tensor]]]
"""Loss and metrics."""


def prepare(case: LossCase, only: str | None = None, kept: set[str] | None = None) -> Prepared:
    """Inputs and steps of a case: of all implementations, of those kept or of the one named."""
    inputs = make_inputs(case.shape)
    loaders = loss_loaders()[case.group]
    if kept is not None:
        loaders = {name: loader for name, loader in loaders.items() if name in kept}
    if only is not None:
        loaders = {only: loaders[only]}
    functions = load(loaders, case.shape.device).functions
    wide = Inputs(*(x.detach().double() for x in inputs))
    return Prepared(
        steps={name: make_step(run, inputs) for name, run in functions.items()},
        leaves=(inputs.logps,),
        check=lambda result: compare(result, wide, inputs.logps.grad),
        make_floor=lambda: bare_copies(inputs.logps, num_passes=4),
        floor_name="bare copies",
        num_bytes=8 * inputs.logps.nbytes,
        formulas="bytes = 8 S e: six inputs and the slopes read, the gradient written",
    )


def make_inputs(shape: Tokens, *, seed: int = 0) -> Inputs:
    """Log-probabilities of a policy that has moved, so that some tokens are clipped."""
    random = torch.Generator(shape.device).manual_seed(seed)

    def normal() -> Tensor:
        return torch.randn(shape.num_tokens, generator=random, device=shape.device)

    logps, advantages = -normal().abs(), normal()
    drifts = [0.3 * normal() for _ in range(2)]
    weights = torch.full_like(logps, 1 / shape.num_tokens)
    old_logps, ref_logps = (logps + drift for drift in drifts)
    return Inputs(
        logps.requires_grad_(), -logps.detach(), advantages, weights, old_logps, ref_logps
    )


def make_step(run: Callable[[Inputs], tuple[Objective, Tensor]], inputs: Inputs) -> Step:
    """Forward and backward."""

    def step() -> Result:
        inputs.logps.grad = None
        objective, loss = run(inputs)
        loss.backward()
        return Result(objective, loss.detach())

    return step


def compare(result: Result, wide: Inputs, grad: Tensor | None) -> Errors:
    """Loss and gradient against the float64 reference of the same objective."""
    logps = wide.logps.clone().requires_grad_()
    loss = wide._replace(logps=logps).loss(token_loss_reference, result.objective)
    (truth,) = torch.autograd.grad(loss, logps)
    found = torch.full_like(truth, torch.nan) if grad is None else grad.double()
    scale = float((wide.token_weights * wide.advantages.abs()).sum())
    true_loss = float(loss.detach())
    return Errors(
        loss=abs(float(result.loss) - true_loss) / max(scale, abs(true_loss)),
        hidden_grad=float((found - truth).norm() / truth.norm()),
    )


def bare_copies(values: Tensor, *, num_passes: int) -> Step:
    """Copies of one (S,) tensor: two of its sizes in bytes each."""
    source = values.detach()
    target = torch.empty_like(source)

    def step() -> None:
        for _ in range(num_passes):
            target.copy_(source)

    return step


def objectives() -> dict[str, Objective]:
    """Plain PPO-clip, every other surrogate, and PPO-clip with every regulariser."""
    found = {PLAIN: CLIP}
    for name, function in SURROGATES.items():
        known = DEFAULTS.get(name, {})
        values = [known.get(x, COMPUTED.get(x)) for x in hyper_parameters_of("surrogate", name)]
        found.setdefault(name, Objective(function, tuple(values)))
    for name, function in REGULARISERS.items():
        found[f"{PLAIN} + {name}"] = CLIP._replace(regularisers=(Regulariser(function, 0.1),))
    return found


def loss_loaders() -> dict[str, Loaders]:
    """All implementations by group."""
    ours = {
        f"fastrl {name}": functools.partial(fastrl_loss, objective=objective)
        for name, objective in objectives().items()
    }
    peers = {
        "fastrl token_loss": functools.partial(fastrl_loss, objective=CLIP),
        "naive": lambda device: in_torch(naive),
        "naive compiled": lambda device: in_torch(torch.compile(naive)),
        "naive with metrics": lambda device: in_torch(naive_with_metrics),
        "naive with metrics compiled": lambda device: in_torch(torch.compile(naive_with_metrics)),
    }
    return {"objectives": ours, "peers": peers}


def fastrl_loss(
    device: str, *, objective: Objective
) -> Callable[[Inputs], tuple[Objective, Tensor]]:
    """`fastrl_kernels.token_loss`, which gives metrics too."""
    from fastrl_kernels import token_loss

    return lambda inputs: (objective, inputs.loss(token_loss, objective))


def in_torch(run: TorchLoss) -> Callable[[Inputs], tuple[Objective, Tensor]]:
    """PPO-clip by autograd."""
    return lambda inputs: (CLIP, run(inputs)[0])


def naive(inputs: Inputs) -> tuple[Tensor, list[Tensor]]:
    """The loss alone."""
    losses = token_losses(inputs.logps, inputs.old_logps, inputs.advantages)
    return (inputs.token_weights * losses).sum(), []


def naive_with_metrics(inputs: Inputs) -> tuple[Tensor, list[Tensor]]:
    """The loss, and what trainers log beside it: clip fractions, entropy and both divergences."""
    loss, _ = naive(inputs)
    with torch.no_grad():
        log_ratios = inputs.logps - inputs.old_logps
        ratios, positive = log_ratios.exp(), inputs.advantages > 0
        to_ref = inputs.ref_logps - inputs.logps
        per_token = (
            (positive & (ratios > 1 + EPSILON_HIGH)).float(),
            (~positive & (ratios < 1 - EPSILON_LOW)).float(),
            inputs.entropies,
            torch.exp(-log_ratios) - 1 + log_ratios,
            torch.exp(to_ref) - 1 - to_ref,
        )
        return loss, [*(metric.mean() for metric in per_token), ratios.max()]
