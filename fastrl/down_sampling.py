"""Where the scores come from that pick tokens, and which tokens they pick before any is encoded.

Legend: B completions, S tokens of the completions that count.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from fastrl.errors import InputError
from fastrl.methods.axes import inputs_of
from fastrl.methods.coefficients import completion_weights, token_weights
from fastrl.methods.inputs import KNOWN, PER_TOKEN, StepInputs
from fastrl.methods.needs import counts_every_completion, looks_past_tokens
from fastrl.methods.record import Method
from fastrl.selection import with_gradient
from fastrl.types import Rollouts

SAMPLED = frozenset({"entropies", "rollout_logps"})
"""Inputs of token weights that the rollout engine may have recorded while it sampled."""
BEFORE_PACKING = (KNOWN - PER_TOKEN) | SAMPLED | {"completion_index"}
"""Inputs of token weights that take no forward pass of the policy."""


class Weighted(NamedTuple):
    """A step before packing, as far as the weights of its tokens are known."""

    method: Method  # what is left to find out from tokens
    kept: Tensor  # (B,) bool: the completions to encode
    weights: Tensor | list[Tensor]  # (B,), or for each completion those of its tokens


def weigh_tokens(
    method: Method, rollouts: Rollouts, inputs: StepInputs, kept: Tensor, *, scores_from: str,
    is_exact: bool,
) -> Weighted:  # fmt: skip
    """The weights of all tokens where they can be had before packing, else of completions alone."""
    if not weighs_before_packing(method, rollouts, scores_from=scores_from, is_exact=is_exact):
        return Weighted(method, kept, completion_weights(method, inputs))
    weights = weights_before_packing(method, rollouts, inputs)
    method = _without_token_weights(method)
    assert inputs.advantages is not None
    # The scores needed every completion; the loss does not.
    counts_all = counts_every_completion(method)
    kept = with_gradient(inputs.advantages, inputs.lengths, has_penalty=counts_all)
    return Weighted(method, kept, weights)


def weighs_before_packing(
    method: Method, rollouts: Rollouts, *, scores_from: str, is_exact: bool
) -> bool:
    """Whether the weights of tokens are found before packing. Their scores come, cheapest first,

    1. from what the sampler recorded, or from no policy at all: tokens are dropped before packing,
       once for all iterations of the step, and what only they need is never encoded;
    2. from a forward pass that the step takes anyway, of a method that looks past tokens, or of one
       that has several passes: tokens are dropped before the layers run with gradient;
    3. from the only pass of the step: the layers run once, with gradient; the head runs forward
       over all tokens, and then once more, forward and backward, over those that are kept.

    This is about the first; `Trainer.update` does the others. `scores_from` "sampler" insists on
    it, "policy" leaves what was recorded aside, and "auto" takes it where it `is_exact`: sampler
    and trainer run the model in the same dtype, so that the scores are the policy's but for the
    order of sums. Truncation of the sampler does no harm: what it records is of the whole softmax.
    """
    if not _can_weigh_before_packing(method):
        return False
    assert method.token_weights is not None
    needed = SAMPLED & set(inputs_of("token_weights", method.token_weights.name))
    missing = sorted(name for name in needed if _recorded(rollouts, name) is None)
    if scores_from == "sampler" and missing:
        raise InputError(
            f"objective.scores_from is 'sampler', but the sampler recorded no {missing[0]}, which "
            f"token_weights {method.token_weights.name} look at; choose another rollout.engine, or "
            "scores_from 'policy'"
        )
    if not needed or scores_from == "sampler":
        return True
    return scores_from == "auto" and is_exact and not missing


def check_scores(method: Method, scores_from: str) -> None:
    """Raise InputError where scores shall come from the sampler and cannot."""
    if scores_from != "sampler" or _can_weigh_before_packing(method):
        return
    if method.token_weights is None or method.loss is not None:
        raise InputError(
            f"objective.scores_from is 'sampler', but method {method.name!r} scores no tokens; "
            "set objective.token_weights, or leave scores_from at 'auto'"
        )
    asked = set(inputs_of("token_weights", method.token_weights.name)) - BEFORE_PACKING
    why = "belong to a method that looks past tokens"
    if asked:
        why = f"look at {', '.join(sorted(asked))}"
    raise InputError(
        f"objective.scores_from is 'sampler', but token_weights {method.token_weights.name} {why}, "
        "which takes a forward pass of the policy; leave scores_from at 'auto'"
    )


def weights_before_packing(method: Method, rollouts: Rollouts, inputs: StepInputs) -> list[Tensor]:
    """For each completion the weights of its tokens, 0 for all of one that is left out.

    inputs: the step before tokens, with advantages (B,) and lengths of 0 where completions are
    left out.
    """
    counted = inputs.lengths > 0
    index = torch.repeat_interleave(inputs.lengths)
    drawn = rollouts.sampled or [torch.ones_like(ids).bool() for ids in rollouts.completion_ids]

    def gather(name: str) -> Tensor | None:
        values = _recorded(rollouts, name)
        if values is None or not len(index):
            return None
        rows = counted.nonzero()[:, 0].tolist()
        return torch.cat([values[b][drawn[b]] for b in rows]).double()

    assert inputs.advantages is not None
    tokens = dataclasses.replace(
        inputs,
        completion_index=index,
        advantages=inputs.advantages[index],
        entropies=gather("entropies"),
        rollout_logps=gather("rollout_logps"),
    )
    found = token_weights(method, tokens).split(inputs.lengths.tolist()) if len(index) else ()
    weights = [torch.zeros(len(ids), dtype=torch.float64) for ids in rollouts.completion_ids]
    for b in counted.nonzero()[:, 0].tolist():
        weights[b][drawn[b]] = found[b].double()
    return weights


def _can_weigh_before_packing(method: Method) -> bool:
    """Whether nothing of the method needs the policy's view of all tokens."""
    if method.token_weights is None or method.loss is not None:
        return False
    asked = set(inputs_of("token_weights", method.token_weights.name))
    return asked <= BEFORE_PACKING and not looks_past_tokens(_without_token_weights(method))


def _without_token_weights(method: Method) -> Method:
    return dataclasses.replace(method, token_weights=None)


def _recorded(rollouts: Rollouts, name: str) -> tuple[Tensor, ...] | None:
    return rollouts.rollout_entropies if name == "entropies" else rollouts.rollout_logps
