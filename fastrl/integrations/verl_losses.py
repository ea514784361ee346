"""Policy losses of our methods as functions of verl's tables.

A policy loss is one part of a method: what is computed from log-probabilities and advantages. In
verl the advantages come from algorithm.adv_estimator, entropy and KL penalties from the actor's own
settings, and the average over tokens from loss_agg_mode.
Legend: B completions, R length of verl's tables, S trained tokens.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrl.errors import InputError
from fastrl.integrations.verl_settings import AGGREGATIONS, read_fields, with_fields
from fastrl.methods.axes import inputs_of
from fastrl.methods.coefficients import coefficients
from fastrl.methods.inputs import StepInputs, apply
from fastrl.methods.record import Method, use
from fastrl.sequence_surrogates import LOG_RATIO_LIMIT, SEQUENCE_SURROGATES
from fastrl_kernels import token_loss

PASSED = frozenset({
    "logps", "old_logps", "advantages", "completion_index", "lengths", "generator", "clipped",
})  # fmt: skip
"""Inputs of a method that verl's tables have."""
MISSING = {
    "ref_logps": "log-probabilities of the reference; set actor.use_kl_loss=True and its "
    "kl_loss_coef and kl_loss_type beside the loss of another method",
    "rollout_logps": "log-probabilities of the sampler; set algorithm.rollout_correction, whose "
    "weights go with every loss",
    "rewards": "rewards",
    "groups": "the prompt of each completion",
    "entropies": "entropies",
    "progress": "the progress of training",
}
"""Inputs that verl does not pass to a policy loss, in words."""
PER_TOKEN = frozenset({"geometric_token_ratio"})
"""Surrogates of completions that take an advantage for each token."""
VERL_SELECTS = ("nonzero_std",)
VERL_ASKS = ("greedy_completion",)
"""Selections and values of prompts that verl has under other names."""


def why_not(method: Method) -> str | None:
    """What the method's policy loss needs and verl does not pass; None if it can be computed."""
    if method.missing:
        return f"it also needs {method.missing}, which is not built yet"
    if method.loss is not None:
        return f"its loss, {method.loss.name}, is one of pairs or groups of completions"
    missing = _missing_inputs(method)
    if missing:
        return f"verl does not pass {' and '.join(MISSING.get(name, name) for name in missing)}"
    if method.aggregation.name not in AGGREGATIONS:
        return (
            f"its average, {method.aggregation.name}, is none of verl's loss_agg_modes; choose the "
            "policy loss of another method"
        )
    if method.entropy_coef:
        return (
            f"its entropy bonus belongs to verl; set actor.entropy_coeff={method.entropy_coef:g} "
            "beside the policy loss of another method"
        )
    part = _part_outside(method)
    return None if part is None else f"{part}, which is no part of a policy loss"


def _missing_inputs(method: Method) -> list[str]:
    asked: set[str] = set()
    for axis in ("surrogate", "token_weights", "computed", "rollout_correction"):
        choice = getattr(method, axis)
        if choice is not None:
            asked |= set(inputs_of(axis, choice.name))
    for penalty in method.penalties:
        asked |= set(inputs_of("regulariser", penalty.regulariser.name))
        if penalty.tokens is not None:
            asked |= set(inputs_of("tokens", penalty.tokens.name))
    return sorted(asked - PASSED)


def _part_outside(method: Method) -> str | None:
    """What makes the method, beside its advantage and rewards, and verl has no setting for."""
    if method.selection is not None and method.selection.name not in VERL_SELECTS:
        return f"it selects completions, {method.selection}"
    if method.prompt_values is not None and method.prompt_values.name not in VERL_ASKS:
        return f"it has values of prompts, {method.prompt_values}"
    for axis in ("look_ahead", "reference_update", "thinking"):
        if getattr(method, axis) is not None:
            return f"it has {axis} {getattr(method, axis)}"
    if method.controllers:
        return f"a controller, {method.controllers[0]}, moves its numbers from step to step"
    if method.draws_turn or method.max_pass_rate is not None or method.mask_truncated_completions:
        return "it leaves out turns, prompts or completions"
    return None


@dataclass(frozen=True)
class VerlPolicyLoss:
    """A policy loss with the signature of verl's registry."""

    name: str
    method: Method

    def __call__(
        self, old_log_prob: Tensor, log_prob: Tensor, advantages: Tensor, response_mask: Tensor,
        loss_agg_mode: str = "token-mean", config: Any = None,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, float]]:  # fmt: skip
        """Loss, differentiable in log_prob, and verl's metrics; the tables are (B, R).

        config: verl's ActorConfig; its clip_ratio_low, clip_ratio_high, clip_ratio_c, tau_pos,
        tau_neg and policy_loss fields take the place of the published numbers, and its
        global_batch_info says over what is averaged. What a method computes from its tokens
        (BAPO's bounds, covariances) it computes from those of this call.
        """
        if config is None:
            raise InputError(f"the policy loss {self.name!r} needs verl's actor config, got None")
        method = with_fields(self.method, read_fields(self.name, self.method, config))
        mask = response_mask.bool()
        weights = _token_weights(response_mask, loss_agg_mode, config, log_prob)
        logps = log_prob[mask]
        if logps.dtype not in (torch.float32, torch.float64):
            logps = logps.float()
        rollout_weights = None if rollout_is_weights is None else rollout_is_weights[mask]
        step = _Step(mask, logps, old_log_prob[mask], advantages[mask], weights[mask],
                     rollout_weights)  # fmt: skip
        if method.surrogate.name in SEQUENCE_SURROGATES:
            _check_advantages(self.name, method, mask, advantages)
        return _loss(method, step)


class _Step(NamedTuple):
    """One call; (S,) each but the mask (B, R)."""

    mask: Tensor
    logps: Tensor
    old_logps: Tensor
    advantages: Tensor
    weights: Tensor
    rollout_weights: Tensor | None

    @property
    def inputs(self) -> StepInputs:
        """In the names of a method, without gradient."""
        lengths = self.mask.sum(dim=1)
        rows = torch.arange(len(lengths), device=lengths.device)
        zero = torch.zeros((), dtype=torch.float64, device=lengths.device)
        return StepInputs(
            rewards=zero.expand(len(lengths)), groups=rows, lengths=lengths,
            finished=torch.ones_like(rows, dtype=torch.bool),
            max_completion_length=self.mask.shape[1], progress=zero,
            generator=torch.default_generator, completion_index=rows.repeat_interleave(lengths),
            logps=self.logps.detach().double(), old_logps=self.old_logps.detach().double(),
            advantages=self.advantages.detach().double(),
        )  # fmt: skip


def _token_weights(mask: Tensor, mode: str, config: Any, like: Tensor) -> Tensor:
    """(B, R) share of every token in verl's average: its loss is linear in the table."""
    agg_loss = import_module("verl.trainer.ppo.core_algos").agg_loss
    information = getattr(config, "global_batch_info", None) or {}
    with torch.enable_grad():
        table = torch.zeros(mask.shape, dtype=torch.float64, device=like.device, requires_grad=True)
        total = agg_loss(loss_mat=table, loss_mask=mask, loss_agg_mode=mode, **information)
        return torch.autograd.grad(total, table)[0]


def _loss(method: Method, step: _Step) -> tuple[Tensor, dict[str, float]]:
    inputs = step.inputs
    found = coefficients(dataclasses.replace(method, aggregation=use("sum")), inputs)
    weights = found.token_weights * step.weights
    out = token_loss(
        step.logps, torch.zeros_like(step.logps), found.advantages, weights,
        objective=found.objective, old_logps=step.old_logps, rollout_weights=step.rollout_weights,
    )  # fmt: skip
    loss, clipped = out.loss, out.clipped
    if found.clipped is not None:
        # The slopes are right already, but the value of the loss is not slope * logp.
        terms, logps = apply("surrogate", method.surrogate, inputs), inputs.logps
        gaps = terms.slopes * logps - terms.values
        if step.rollout_weights is not None:
            gaps = gaps * step.rollout_weights
        loss, clipped = loss + (weights * gaps).sum().to(loss.dtype), found.clipped
    return loss, _metrics(method, inputs, clipped)


def _metrics(method: Method, inputs: StepInputs, clipped: Tensor) -> dict[str, float]:
    """Means over the tokens, by verl's names.

    pg_clipfrac: tokens with an advantage that learn nothing, and those of a truncated weight;
    pg_clipfrac_lower: those that dual clipping stops, and for GMPO those of negative advantage.
    """
    assert inputs.logps is not None
    assert inputs.old_logps is not None
    assert inputs.advantages is not None
    log_ratios = (inputs.logps - inputs.old_logps).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    known, negative = method.surrogate.parameters, inputs.advantages < 0
    lower = torch.zeros_like(negative)
    if "dual_clip" in known:
        lower = negative & (log_ratios.exp() > known["dual_clip"])
    elif method.surrogate.name == "clipped_geometric_ratio":
        lower = negative & clipped
    elif method.surrogate.name == "truncated_importance":
        ratios = log_ratios.exp()
        clipped = (ratios < 1 - known["epsilon_low"]) | (ratios > 1 + known["epsilon_high"])
    count = max(len(log_ratios), 1)
    return {
        "actor/pg_clipfrac": float((clipped & ~lower).sum()) / count,
        "actor/ppo_kl": float(-log_ratios.sum()) / count,
        "actor/pg_clipfrac_lower": float(lower.sum()) / count,
    }


def _check_advantages(name: str, method: Method, mask: Tensor, advantages: Tensor) -> None:
    """Refuse advantages of tokens where a completion has one ratio and so one advantage."""
    if method.surrogate.name in PER_TOKEN:
        return
    highest = advantages.masked_fill(~mask, -torch.inf).amax(dim=1)
    lowest = advantages.masked_fill(~mask, torch.inf).amin(dim=1)
    gap = (highest - lowest).clamp(min=0).amax() if mask.any() else torch.zeros(())
    if bool(gap > 1e-6):
        raise InputError(
            f"the policy loss {name!r} takes one advantage per completion, got one in which they "
            f"differ by {float(gap):.3g}; choose an algorithm.adv_estimator of whole completions, "
            "such as grpo, or the loss fastrl_gspo_token"
        )
