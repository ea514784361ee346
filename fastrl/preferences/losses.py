"""The table of preference losses: which function, on what, and how its pairs are made."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from fastrl.preferences import (
    anchored,
    averaged,
    companions,
    divergences,
    lists,
    logistic,
    regression,
    unpaired,
)
from fastrl.preferences.length_desensitized import length_desensitized_dpo
from fastrl.preferences.pairing import PairingRule, adjacent, best_worst, every_two

ROLES = ("chosen_", "rejected_", "companion_", "sequence_")
"""What a positional parameter can begin with; the rest names a number of each completion."""


@dataclass(frozen=True)
class PreferenceLoss:
    """A loss and what it works on: the numbers of pairs, those of groups, or tokens of pairs.

    A "pair" function returns PairTerms, a "group" function SequenceTerms, a "tokens" function,
    which takes tokens and pairs, a SequenceLoss. Its positional parameters name its inputs.
    """

    function: Callable[..., Any]
    level: Literal["pair", "group", "tokens"]
    pairing: PairingRule | None = None  # used where the caller does not choose another

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the function's inputs, in order."""
        kinds = inspect.signature(self.function).parameters.values()
        return tuple(p.name for p in kinds if p.kind is p.POSITIONAL_OR_KEYWORD)

    @property
    def inputs(self) -> frozenset[str]:
        """What it is computed from, without the role: logps, ref_logps, lengths, rewards, ..."""
        names = set()
        for name in self.parameters:
            role = next((role for role in ROLES if name.startswith(role)), "")
            names.add(name.removeprefix(role))
        return frozenset(names)

    @property
    def needs_reference(self) -> bool:
        """Whether ref_logps are among its inputs."""
        return "ref_logps" in self.inputs

    @property
    def needs_companions(self) -> bool:
        """Whether its pairs have a third completion."""
        return any(name.startswith("companion_") for name in self.parameters)


def _pair(function: Callable[..., Any], pairing: PairingRule = best_worst) -> PreferenceLoss:
    return PreferenceLoss(function, "pair", pairing)


def _group(function: Callable[..., Any]) -> PreferenceLoss:
    return PreferenceLoss(function, "group")


LOSSES: dict[str, PreferenceLoss] = {
    "dpo": _pair(logistic.dpo),
    "conservative_dpo": _pair(logistic.conservative_dpo),
    "robust_dpo": _pair(logistic.robust_dpo),
    "soft_dpo": _pair(logistic.soft_dpo),
    "hinge": _pair(logistic.hinge),
    "exo": _pair(logistic.exo),
    "discopop": _pair(logistic.discopop),
    "weighted_dpo": _pair(logistic.weighted_dpo),
    "sorted_dpo": _pair(logistic.sorted_dpo),
    "sorted_margin_dpo": _pair(logistic.sorted_margin_dpo),
    "forward_kl_dpo": _pair(divergences.forward_kl_dpo),
    "jensen_shannon_dpo": _pair(divergences.jensen_shannon_dpo),
    "alpha_divergence_dpo": _pair(divergences.alpha_divergence_dpo),
    "length_desensitized_dpo": PreferenceLoss(length_desensitized_dpo, "tokens", best_worst),
    "nca": _pair(anchored.nca),
    "bco": _pair(anchored.bco),
    "apo_zero": _pair(anchored.apo_zero),
    "apo_down": _pair(anchored.apo_down),
    "regularised_dpo": _pair(anchored.regularised_dpo),
    "constrained_dpo": _pair(anchored.constrained_dpo),
    "exploratory_dpo": _pair(anchored.exploratory_dpo),
    "simpo": _pair(averaged.simpo),
    "normalised_dpo": _pair(averaged.normalised_dpo),
    "cpo": _pair(averaged.cpo),
    "orpo": _pair(averaged.orpo),
    "slic": _pair(averaged.slic),
    "rationale_dpo": _pair(companions.rationale_dpo),
    "rationale_sigmoid_dpo": _pair(companions.rationale_sigmoid_dpo),
    "rationale_orpo": _pair(companions.rationale_orpo),
    "spac": _pair(companions.spac),
    "ipo": _pair(regression.ipo),
    "ipo_sum": _pair(regression.ipo_sum),
    "sppo": _pair(regression.sppo),
    "win_rate_sppo": _pair(regression.win_rate_sppo),
    "general_preference": _pair(regression.general_preference),
    "inpo": _pair(regression.inpo),
    "rebel": _pair(regression.rebel, adjacent),
    "contrastive_policy_gradient": _pair(regression.contrastive_policy_gradient, every_two),
    "list_wise_exo": _group(lists.list_wise_exo),
    "info_nca": _group(lists.info_nca),
    "list_softmax": _group(lists.list_softmax),
    "plackett_luce": _group(lists.plackett_luce),
    "lambda_rank": _group(lists.lambda_rank),
    "rank_hinge": _group(lists.rank_hinge),
    "kto": _group(unpaired.kto),
    "optimal_advantage_regression": _group(unpaired.optimal_advantage_regression),
    "group_variance": _group(unpaired.group_variance),
    "mirror_descent": _group(unpaired.mirror_descent),
    "level_preference": _group(unpaired.level_preference),
}
