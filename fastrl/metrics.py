"""The numbers of a step, in TRL's names where it has one.

Legend: B completions, S trained tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastrl.methods.inputs import StepInputs
from fastrl.packing import PackedPass, split_cost
from fastrl.phase_clock import PhaseClock
from fastrl.selection import zero_spread_fraction
from fastrl.types import Rewards, Rollouts, StepMetrics
from fastrl_kernels import PolicyLoss, token_loss
from fastrl_kernels.objectives import Objective, policy_gradient


@dataclass(frozen=True)
class TokenRecord:
    """What the last pass over each trained token showed: (S,) each, on the CPU."""

    logps: Tensor
    old_logps: Tensor
    entropies: Tensor
    advantages: Tensor | None  # None where the loss compares completions
    clipped: Tensor  # bool
    rollout_logps: Tensor | None
    ref_logps: Tensor | None
    rollout_weights: Tensor | None


def rollout_metrics(rollouts: Rollouts, rewards: Rewards, *, pass_threshold: float) -> StepMetrics:
    """Rewards and completion lengths of one step."""
    lengths = rollouts.lengths.double()
    terminated = lengths[rollouts.finished]
    groups = rewards.total.double().view(-1, rollouts.num_generations)
    metrics = {
        "reward": float(rewards.total.double().mean()),
        "reward_std": float(groups.std(dim=1, correction=0).mean()),
        "pass_rate": float((rewards.total >= pass_threshold).double().mean()),
        "completions/clipped_ratio": float((~rollouts.finished).double().mean()),
    }
    if rollouts.num_generations > 1:  # one completion has no spread that could be zero
        owners = torch.arange(len(groups)).repeat_interleave(groups.shape[1])
        metrics["frac_reward_zero_std"] = zero_spread_fraction(rewards.total, owners)
    if rollouts.sampled is not None:
        metrics["completions/forced_end_ratio"] = float(
            (rollouts.num_sampled < rollouts.lengths).double().mean()
        )
    for name, values in (("length", lengths), ("terminated_length", terminated)):
        for statistic in ("mean", "min", "max"):
            value = float(getattr(values, statistic)()) if len(values) else 0.0
            metrics[f"completions/{statistic}_{name}"] = value
    for name, part in rewards.parts.items():
        applied = part[~part.isnan()].double()
        metrics[f"rewards/{name}/mean"] = float(applied.mean()) if len(applied) else math.nan
        metrics[f"rewards/{name}/std"] = float(applied.std(correction=0)) if len(applied) else 0.0
    return metrics


def token_metrics(record: TokenRecord | None) -> StepMetrics:
    """Entropy, clipping and divergences over the trained tokens; none if nothing was trained."""
    if record is None:
        return {}
    ones = torch.ones_like(record.logps)
    found = token_loss(
        record.logps, record.entropies, ones, ones, objective=Objective(policy_gradient),
        old_logps=record.old_logps, ref_logps=record.ref_logps,
        rollout_weights=record.rollout_weights,
    )  # fmt: skip
    metrics = {
        "entropy": float(found.entropy),
        **_clip_metrics(record),
        "ratio/max": float(found.max_ratio),
        **{f"old_kl/k{k}": float(getattr(found, f"old_k{k}")) for k in (1, 2, 3)},
    }
    if record.ref_logps is not None:
        metrics["kl"] = float(found.ref_k3)
        metrics |= {f"ref_kl/k{k}": float(getattr(found, f"ref_k{k}")) for k in (1, 2, 3)}
    if record.rollout_weights is not None:
        metrics["sampling/effective_samples"] = float(found.effective_samples)
    if record.rollout_logps is not None:
        # The sampler and the trainer run the same weights: what is left is rounding.
        difference = (record.old_logps - record.rollout_logps).abs()
        metrics["sampling/sampling_logp_difference/mean"] = float(difference.mean())
        metrics["sampling/sampling_logp_difference/max"] = float(difference.max())
    return metrics


def kl_metrics(passes: Sequence[PackedPass]) -> StepMetrics:
    """objective/kl: log-ratio of a completion to the reference, mean over those that are trained
    (of the policy before the step; an estimate of the KL, which single batches may have below 0).
    """
    total, rows = 0.0, set()
    for item in passes:
        batch = item.batch
        if batch.old_logps is None or batch.ref_logps is None:
            return {}
        total += float((batch.old_logps.double() - batch.ref_logps.double()).sum())
        rows |= set(batch.completion_index.unique().tolist())
    return {"objective/kl": total / len(rows)} if rows else {}


def _clip_metrics(record: TokenRecord) -> StepMetrics:
    """Fractions that the surrogate stopped: upwards, downwards, and by a bound on bad tokens."""
    if record.advantages is None:
        return {}
    fell = record.logps <= record.old_logps
    is_bad = record.advantages < 0
    fractions = {
        "low": record.clipped & is_bad & fell,
        "high": record.clipped & (record.advantages > 0),
        "dual": record.clipped & is_bad & ~fell,
        "region": record.clipped,
    }
    return {f"clip_ratio/{name}_mean": float(x.double().mean()) for name, x in fractions.items()}


def advantage_metrics(inputs: StepInputs) -> StepMetrics:
    """The fraction of counted completions that have no advantage anywhere."""
    if inputs.advantages is None:
        return {}
    counted = inputs.lengths > 0
    has_advantage = inputs.advantages != 0
    if inputs.completion_index is not None:
        found = torch.zeros_like(counted)
        found[inputs.completion_index[has_advantage]] = True
        has_advantage = found
    idle = counted & ~has_advantage
    return {"advantages/zero_fraction": int(idle.sum()) / max(int(counted.sum()), 1)}


def packing_metrics(passes: Sequence[PackedPass]) -> StepMetrics:
    """How many passes the step took, what sharing prompts saved and what splitting groups cost."""
    packed = sum(len(item.plan.input_ids) for item in passes)
    unshared = sum(item.plan.num_unshared_tokens for item in passes)
    return {
        "packing/passes": float(len(passes)),
        "packing/tokens": float(packed),
        "packing/repeated_tokens": float(split_cost(passes)),
        "packing/token_ratio": unshared / packed if packed else 1.0,
    }


def speed_metrics(
    watch: PhaseClock, rollouts: Rollouts, passes: Sequence[PackedPass]
) -> StepMetrics:
    """Seconds and memory of the phases, sampled and packed training tokens a second."""
    num_sampled = int(rollouts.lengths.sum())
    num_packed = sum(len(item.plan.input_ids) for item in passes)
    return {
        **watch.metrics,
        "tokens_per_second/rollout": num_sampled / watch.laps["rollout"],
        "tokens_per_second/train": num_packed / watch.laps["train"],
    }


def record_tokens(
    passes: Sequence[PackedPass], losses: Sequence[PolicyLoss], clipped: Sequence[Tensor | None],
    advantages: Tensor | None,
) -> TokenRecord | None:  # fmt: skip
    """The trained tokens of all passes side by side; None if there are none.

    clipped: of each pass, where the loss itself does not know; advantages: (S,).
    """
    if not passes:
        return None

    def gather(values: Iterable[Tensor | None]) -> Tensor | None:
        present = [value for value in values if value is not None]
        return torch.cat(present).double().cpu() if present else None

    batches = [item.batch for item in passes]
    logps = gather(loss.logps for loss in losses)
    entropies = gather(loss.entropies for loss in losses)
    old_logps = gather(batch.old_logps for batch in batches)
    stopped = [
        loss.clipped if known is None else known
        for loss, known in zip(losses, clipped, strict=True)
    ]
    assert logps is not None
    assert entropies is not None
    assert old_logps is not None
    return TokenRecord(
        logps=logps,
        old_logps=old_logps,
        entropies=entropies,
        advantages=advantages,
        clipped=torch.cat([item.cpu() for item in stopped]),
        rollout_logps=gather(batch.rollout_logps for batch in batches),
        ref_logps=gather(batch.ref_logps for batch in batches),
        rollout_weights=gather(batch.rollout_weights for batch in batches),
    )
