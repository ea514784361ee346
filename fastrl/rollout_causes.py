"""Why an engine's log-probabilities are not the trainer's: hypotheses, each put to the test.

Legend: S tokens of a few short completions, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastrl.packing import pack
from fastrl.policy import Policy
from fastrl.rollout import Engine, Sampling
from fastrl.rollout.drawing import penalise, truncate
from fastrl.types import Rollouts
from fastrl_kernels import linear_logps
from fastrl_kernels.head_logits import head_logits

CUT_PROBABILITIES = tuple(p / 100 for p in range(50, 100))
"""Values of top-p that are looked for."""


class Cause(NamedTuple):
    """What explains the gap."""

    name: str  # weights, temperature, truncation or dtype
    text: str


@dataclass(frozen=True)
class Forward:
    """What the trainer thinks of the completions."""

    logits: Tensor  # (S, V) at temperature 1
    target_ids: Tensor  # (S,)
    logps: Tensor  # (S,) at the sampling temperature, as the loss takes them

    def at(self, temperature: float) -> Tensor:
        """(S, V) log-probabilities of all tokens at a temperature."""
        return (self.logits / temperature).log_softmax(dim=-1)

    def of_targets(self, values: Tensor) -> Tensor:
        """(S,) of (S, V): those of the tokens that were drawn."""
        return values.gather(1, self.target_ids[:, None])[:, 0]


def cause_of(
    engine: Engine, policy: Policy, rollouts: Rollouts, sampling: Sampling, recorded: Tensor,
    forward: Forward, tolerance: float,
) -> Cause:  # fmt: skip
    """The hypothesis that explains the gap, or the only one that is left.

    To explain it is to leave less than half, and of temperature and truncation no more than the
    tolerance; a fit to noise leaves nearly all.
    """
    enough = mean_gap(recorded, forward.logps) / 2
    tested = [
        *_temperatures(recorded, forward, sampling),
        *_truncations(rollouts, recorded, forward, sampling),
    ]
    gap, cause = min(tested, key=lambda item: item[0])
    if gap <= min(tolerance, enough):
        return cause
    rounding = ""
    for rounded, dtype in _in_bfloat16(policy):
        logps = trainer_forward(rounded, rollouts, sampling.temperature).logps.to(recorded)
        # Rounding falls alike where the same dtype runs.
        if mean_gap(recorded, logps) <= enough:
            return Cause(
                "dtype",
                f"the engine's are those of a forward pass with {dtype}, but the trainer runs in "
                "float32; set model.precision = 'autocast', let the engine run in float32, or set "
                "objective.rollout_correction",
            )
        rounding = f" ({dtype} would make {mean_gap(forward.logps, logps):.2g} nats)"
    if not shares_weights(engine):
        return Cause(
            "weights",
            "the engine has weights of its own, and no temperature, truncation or dtype makes them "
            f"those being trained{rounding}; load these into it, or set "
            "objective.rollout_correction",
        )
    return Cause(
        "weights",
        f"no temperature, truncation or dtype explains it{rounding}, so the engine reads other "
        "weights than those being trained, such as a stale copy",
    )


def _in_bfloat16(policy: Policy) -> Iterator[tuple[Policy, str]]:
    """The policy as it would be in bfloat16: its layers only, then a copy with rounded weights.

    None where the trainer rounds itself.
    """
    if is_half(policy):
        return
    cast = policy.cast_lm_head_to_fp32
    layers_only = Policy(policy.model, policy.tokenizer, bf16=True, cast_lm_head_to_fp32=cast)
    yield layers_only, "layers in bfloat16"
    rounded = {
        id(tensor): torch.nn.Parameter(tensor.detach().bfloat16(), requires_grad=False)
        for tensor in policy.model.parameters()
        if tensor.is_floating_point()
    }
    # Parameters are taken from there: no second copy in float32 on the way.
    model = copy.deepcopy(policy.model, rounded)
    yield Policy(model, policy.tokenizer), "weights in bfloat16"


def _temperatures(
    recorded: Tensor, forward: Forward, sampling: Sampling
) -> Iterator[tuple[float, Cause]]:
    """Temperature 1, and the one that fits best: halved intervals of its logarithm."""

    def gap_at(temperature: float) -> float:
        return mean_gap(recorded, forward.of_targets(forward.at(temperature)))

    best, width = 1.0, 2.0  # factors from 1/4 to 4
    yield gap_at(1.0), _at_temperature("1", sampling)
    for _ in range(8):
        tried = [best * 2 ** (width * k / 8) for k in range(-8, 9)]
        best = min(tried, key=gap_at)
        width /= 4
    yield gap_at(best), _at_temperature(f"{best:.3g}", sampling)


def _at_temperature(temperature: str, sampling: Sampling) -> Cause:
    return Cause(
        "temperature",
        f"the engine's are those of temperature {temperature}, but rollout.temperature is "
        f"{sampling.temperature:g}; make the engine take it, and give log-probabilities of "
        "softmax(logits / temperature)",
    )


def _truncations(
    rollouts: Rollouts, recorded: Tensor, forward: Forward, sampling: Sampling
) -> Iterator[tuple[float, Cause]]:
    """The run's own truncation and penalty, and any one top-k or top-p."""
    logps = forward.at(sampling.temperature)
    advice = "; make it record those of the whole softmax(logits / temperature)"
    if not sampling.is_exact:
        scores = logps
        if sampling.repetition_penalty != 1.0:
            seen = _seen(rollouts, logps)
            logits = forward.logits / sampling.temperature
            scores = penalise(logits, seen, sampling.repetition_penalty).log_softmax(dim=-1)
        kept = truncate(scores, sampling).log_softmax(dim=-1)
        text = "the engine's are those after the run's own truncation and repetition penalty"
        yield mean_gap(recorded, forward.of_targets(kept)), Cause("truncation", text + advice)
    ordered = logps.sort(dim=-1, descending=True).values
    masses = ordered.logcumsumexp(dim=-1)  # (S, V): of the k most likely tokens
    own = forward.of_targets(logps)
    gaps = (own[:, None] - masses - recorded[:, None]).abs().mean(dim=0)
    gaps[-1] = torch.inf  # all tokens are no truncation
    k = int(gaps.argmin())
    text = f"the engine's are renormalised over the {k + 1} most likely tokens (top_k {k + 1})"
    yield float(gaps[k]), Cause("truncation", text + advice)
    before = masses.exp() - ordered.exp()
    for p in CUT_PROBABILITIES:
        last = (before < p).sum(dim=-1, keepdim=True) - 1
        gap = mean_gap(recorded, own - masses.gather(1, last)[:, 0])
        text = f"the engine's are renormalised over {p:g} of the probability (top_p {p:g})"
        yield gap, Cause("truncation", text + advice)


def _seen(rollouts: Rollouts, logps: Tensor) -> Tensor:
    """(S, V) bool: tokens of the prompt and of the completion before each token."""
    seen = torch.zeros(logps.shape, dtype=torch.bool)
    row = 0
    for b, ids in enumerate(rollouts.completion_ids):
        prompt = rollouts.prompts.token_ids[b // rollouts.num_generations]
        for offset in range(len(ids)):
            seen[row, prompt] = True
            seen[row, ids[:offset]] = True
            row += 1
    return seen.to(logps.device)


@torch.no_grad()
def trainer_forward(policy: Policy, rollouts: Rollouts, temperature: float) -> Forward:
    """The trainer's view, one prompt with its completions at a time."""
    G, head = rollouts.num_generations, policy.lm_head
    parts = []
    for p, ids in enumerate(rollouts.prompts.token_ids):
        plan = pack([ids], [rollouts.completion_ids[p * G : (p + 1) * G]]).to(policy.device)
        hidden = policy.hidden_states(plan)[plan.source_index]
        logps = linear_logps(hidden, head, plan.target_ids, temperature=temperature).logps
        parts.append((head_logits(hidden, head), plan.target_ids, logps))
    return Forward(*map(torch.cat, zip(*parts, strict=True)))


def mean_gap(recorded: Tensor, logps: Tensor) -> float:
    """Nats, mean over tokens of the absolute difference."""
    return float((recorded - logps).abs().mean())


def is_half(policy: Policy) -> bool:
    """Whether the trainer rounds to half precision."""
    return policy.is_half or policy.head_dtype in (torch.bfloat16, torch.float16)


def shares_weights(engine: Engine) -> bool:
    """Whether the engine reads the weights that are trained."""
    return bool(getattr(engine, "shares_weights", False))


def follows_training(engine: Engine) -> bool:
    """Whether the engine samples from the weights as they are after every update, or says so."""
    return shares_weights(engine) or bool(getattr(engine, "follows_training", False))
