"""What is timed: three operations on hidden states, each as a step without arguments.

policy_loss    loss and its gradients
linear_logps   log-probabilities and entropies, then gradients for random slopes in both
forward        log-probabilities and entropies without gradient

S selected tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from implementations import load, logps_loaders, policy_loaders
from inputs import TEMPERATURE, Inputs, Shape, make_inputs
from measure import Step
from peers import LogpsFunction, PolicyFunction
from reference import (
    Errors,
    Outputs,
    Reference,
    compare,
    policy_reference,
    row_statistics,
    with_gradients,
)
from torch import Tensor

Loaders = dict[str, Callable[[str], Callable[..., Any]]]


@dataclass(frozen=True)
class Case:
    """One operation at one size; share_trained of the tokens have a nonzero advantage."""

    operation: str
    shape: Shape
    share_trained: float = 1.0

    def __str__(self) -> str:
        """Name of the case in the results."""
        share = "" if self.share_trained == 1.0 else f" rho={self.share_trained:g}"
        return f"{self.operation}{share} {self.shape}"


class Prepared(NamedTuple):
    """A case ready to run."""

    steps: dict[str, Step]
    leaves: tuple[Tensor, ...]
    """The tensors whose .grad a step leaves behind."""
    check: Callable[[Outputs], Errors]
    """Errors of the outputs and of the gradients in the leaves; the reference is made once."""
    make_floor: Callable[[], Step]
    floor_name: str
    flops: float | None = None
    num_bytes: float | None = None
    overwritable: tuple[Tensor, ...] = ()
    """Inputs that a gradient may be written over."""
    tolerances: dict[str, float] | None = None
    """Of the errors; None for those of reference.TOLERANCES."""
    formulas: str = ""
    """How flops and num_bytes were counted."""


def prepare(
    case: Case, only: str | None = None, loaders: Loaders | None = None,
    kept: set[str] | None = None,
) -> Prepared:  # fmt: skip
    """Inputs and steps of a case: of all implementations, of those kept or of the one named."""
    inputs = make_inputs(case.shape, share_trained=case.share_trained)
    make_step = STEPS[case.operation]
    if loaders is None:
        loaders = policy_loaders() if case.operation == "policy_loss" else logps_loaders()
    if kept is not None:
        loaders = {name: loader for name, loader in loaders.items() if name in kept}
    if only is not None:
        loaders = {only: loaders[only]}
    functions = load(loaders, case.shape.device).functions
    reference = functools.cache(lambda: make_reference(case.operation, inputs))
    share_backward = 0.0 if case.operation == "forward" else case.share_trained
    num_products = 1 + 2 * share_backward
    return Prepared(
        steps={name: make_step(run, inputs) for name, run in functions.items()},
        leaves=(inputs.hidden_states, inputs.weight),
        check=lambda outputs: compare(
            outputs, reference(), inputs.hidden_states.grad, inputs.weight.grad
        ),
        make_floor=lambda: bare_products(inputs, share_backward),
        floor_name="bare matrix products",
        flops=2 * num_products * case.shape.num_tokens * inputs.weight.numel(),
        num_bytes=(1 + (share_backward > 0)) * (inputs.weight.nbytes + inputs.hidden_states.nbytes),
        formulas=FORWARD_FORMULAS if case.operation == "forward" else FORMULAS,
    )


def policy_step(run: PolicyFunction, inputs: Inputs) -> Step:
    """Forward and backward of the policy loss."""

    def step() -> Outputs:
        inputs.hidden_states.grad = inputs.weight.grad = None
        loss, logps = run(
            inputs.hidden_states, inputs.weight, inputs.target_ids, inputs.advantages,
            inputs.old_logps, inputs.token_weights, TEMPERATURE, inputs.lengths,
        )  # fmt: skip
        loss.backward()
        return Outputs(loss.detach(), None if logps is None else logps.detach())

    return step


def logps_step(run: LogpsFunction, inputs: Inputs) -> Step:
    """Forward, and backward with given slopes of the logps and of the entropies."""

    def step() -> Outputs:
        inputs.hidden_states.grad = inputs.weight.grad = None
        logps, entropies = run(inputs.hidden_states, inputs.weight, inputs.target_ids, TEMPERATURE)
        assert entropies is not None
        slopes = (inputs.logp_slopes.to(logps.dtype), inputs.entropy_slopes.to(entropies.dtype))
        torch.autograd.backward((logps, entropies), slopes)
        return Outputs(None, logps.detach(), entropies.detach())

    return step


def forward_step(run: LogpsFunction, inputs: Inputs) -> Step:
    """Logps and entropies under no_grad, as for old and reference policies."""

    def step() -> Outputs:
        with torch.no_grad():
            logps, entropies = run(
                inputs.hidden_states, inputs.weight, inputs.target_ids, TEMPERATURE
            )
        return Outputs(None, logps, entropies)

    return step


FORWARD_FORMULAS = "flops = 2 S V D; bytes = (V + S) D e: weight and hidden states read"
FORMULAS = (
    "flops = 2 (1 + 2 rho) S V D, rho the share with a gradient; "
    "bytes = 2 (V + S) D e: weight and hidden states read, their gradients written"
)

STEPS: dict[str, Callable[..., Step]] = {
    "policy_loss": policy_step,
    "linear_logps": logps_step,
    "forward": forward_step,
}


def make_reference(operation: str, inputs: Inputs) -> Reference:
    """Float64 results of an operation; see reference.py for what is sampled."""
    hidden_states, weight = inputs.hidden_states.detach(), inputs.weight.detach()
    if operation == "policy_loss":
        return policy_reference(
            hidden_states, weight, inputs.target_ids, inputs.advantages, inputs.token_weights,
            inputs.old_logps, TEMPERATURE,
        )  # fmt: skip
    statistics = row_statistics(
        hidden_states, weight, inputs.target_ids, TEMPERATURE, torch.float64
    )
    if operation == "forward":
        return Reference(statistics)
    return with_gradients(
        statistics, hidden_states, weight, inputs.target_ids,
        inputs.logp_slopes, inputs.entropy_slopes, TEMPERATURE,
    )  # fmt: skip


def bare_products(inputs: Inputs, share_backward: float) -> Step:
    """The matrix products alone, into buffers: logits, and both gradients for a share of the rows.

    The logits stand in for their gradient; zeros would be multiplied faster than numbers.
    """
    hidden_states, weight = inputs.hidden_states.detach(), inputs.weight.detach()
    num_rows = round(share_backward * len(hidden_states))
    logits = hidden_states @ weight.T
    hidden_grad = torch.empty_like(hidden_states[:num_rows])
    weight_grad = torch.empty_like(weight)

    def step() -> None:
        torch.mm(hidden_states, weight.T, out=logits)
        if num_rows:
            torch.mm(logits[:num_rows], weight, out=hidden_grad)
            torch.mm(logits[:num_rows].T, hidden_states[:num_rows], out=weight_grad)

    return step
