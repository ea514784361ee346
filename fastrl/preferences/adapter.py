"""From the tokens of a step to the slope of a preference loss at each of them.

Legend: B completions, S trained tokens, P prompts. Everything between the two is a few
numbers a completion, computed in float64.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fastrl.preferences.losses import PreferenceLoss
from fastrl.preferences.pairing import PairingRule
from fastrl.preferences.terms import PairTerms, SequenceLoss, SequenceTerms
from fastrl.ragged import counts, number_of, sums

HOW_TO_GET = {
    "ref_logps": "take them from the frozen reference model",
    "old_logps": "take them from the policy at the start of the update",
    "advantages": "take them from an advantage estimator",
    "alignments": "give sum_p2, which linear_logps returns",
    "from_reference": "mark the completions that the reference model sampled",
    "companions": "mark the third completion of every prompt",
}


@dataclass(frozen=True)
class PreferenceInputs:
    """The detached vectors of one optimizer step; None for what the loss does not ask for."""

    logps: Tensor  # (S,) current policy
    completion_index: Tensor  # (S,) int64, non-decreasing
    lengths: Tensor  # (B,) int64; 0 for a completion that is empty or left out
    groups: Tensor  # (B,) int64 prompt
    rewards: Tensor  # (B,)
    ref_logps: Tensor | None = None  # (S,)
    old_logps: Tensor | None = None  # (S,)
    advantages: Tensor | None = None  # (S,), constant over a completion: the first is taken
    sum_p2: Tensor | None = None  # (S,) of the current policy
    from_reference: Tensor | None = None  # (B,) bool
    companions: Tensor | None = None  # (B,) bool the one of its prompt that is in no pair

    def __post_init__(self) -> None:
        """Raise ValueError for a vector of the wrong length."""
        for kind, like, names in (
            ("trained token", self.logps, ("completion_index", "ref_logps", "old_logps",
             "advantages", "sum_p2")),
            ("completion", self.lengths, ("groups", "rewards", "from_reference", "companions")),
        ):  # fmt: skip
            for name in names:
                vector = getattr(self, name)
                if vector is not None and vector.shape != like.shape:
                    raise ValueError(
                        f"expected one entry of {name} per {kind}, shape {tuple(like.shape)}, "
                        f"got {tuple(vector.shape)}"
                    )
        num_tokens = counts(self.completion_index, self.lengths.shape[0])
        if num_tokens.shape != self.lengths.shape or bool(
            ((self.lengths > 0) & (self.lengths != num_tokens)).any()
        ):
            raise ValueError(
                f"expected the log-probabilities of all {int(self.lengths.sum())} tokens that "
                f"lengths speaks of, got {self.logps.numel()} of {num_tokens.shape[0]} "
                "completions; a preference loss needs every completion, whatever its advantage"
            )


def preference_terms(
    loss: PreferenceLoss, inputs: PreferenceInputs, *, pairing: PairingRule | None = None,
    hyper_parameters: Mapping[str, float] | None = None,
) -> SequenceLoss:  # fmt: skip
    """The loss of a step and its slope at every token, both in the dtype of logps.

    A mean over pairs, or what the group loss says it is a mean over: slopes need no more weights.
    Without a single pair both are zero. pairing replaces the one in the loss's record.
    """
    settings = dict(hyper_parameters or {})
    if loss.level == "group":
        if pairing is not None:
            raise ValueError(f"{_name(loss)} works on groups and has no pairs; leave pairing out")
        arguments = [_per_completion(loss, inputs, name) for name in loss.parameters]
        terms: SequenceTerms = loss.function(*arguments, **settings)
        return _of_tokens(inputs, terms.losses.sum(), terms.slopes)
    rule = pairing or loss.pairing
    assert rule is not None
    pairs = rule(inputs.rewards, inputs.groups, _pairable(loss, inputs))
    if loss.level == "tokens":
        vectors = {"pairs": pairs}
        for name in loss.parameters[:-1]:
            vector = _given(loss, inputs, name)
            vectors[name] = vector.double() if vector.is_floating_point() else vector
        finished: SequenceLoss = loss.function(**vectors, **settings)
        dtype = inputs.logps.dtype
        return SequenceLoss(finished.loss.to(dtype), finished.slopes.to(dtype))
    return _of_pairs(loss, inputs, pairs, settings)


def _of_pairs(
    loss: PreferenceLoss, inputs: PreferenceInputs, pairs: Tensor, settings: dict[str, float]
) -> SequenceLoss:
    members = {"chosen": pairs[:, 0], "rejected": pairs[:, 1]}
    if loss.needs_companions:
        marked = _given(loss, inputs, "companions")
        members["companion"] = _companions(marked, inputs.groups)[inputs.groups[pairs[:, 0]]]
    arguments = []
    for name in loss.parameters:
        role, number = name.split("_", 1)
        arguments.append(_per_completion(loss, inputs, number)[members[role]])
    terms: PairTerms = loss.function(*arguments, **settings)
    slopes = [terms.chosen_slopes, terms.rejected_slopes]
    if terms.companion_slopes is not None:
        slopes.append(terms.companion_slopes)
    num = max(pairs.shape[0], 1)
    owners = torch.cat([members[role] for role in members])
    totals = sums(torch.cat(slopes) / num, owners, inputs.lengths.shape[0])
    return _of_tokens(inputs, terms.losses.sum() / num, totals)


def _of_tokens(inputs: PreferenceInputs, loss: Tensor, slopes: Tensor) -> SequenceLoss:
    dtype = inputs.logps.dtype
    return SequenceLoss(loss.to(dtype), slopes.to(dtype)[inputs.completion_index])


def _pairable(loss: PreferenceLoss, inputs: PreferenceInputs) -> Tensor:
    """(B,) lengths, zero for companions."""
    if not loss.needs_companions:
        return inputs.lengths
    return inputs.lengths.masked_fill(_given(loss, inputs, "companions"), 0)


def _companions(marked: Tensor, groups: Tensor) -> Tensor:
    """(P,) number of the marked completion of each prompt."""
    rows = marked.nonzero()[:, 0]
    num_each = counts(groups[rows], number_of(groups))
    if bool((num_each[groups] != 1).any()):
        raise ValueError(
            f"expected one companion for every prompt, got {int(num_each[groups].min())} to "
            f"{int(num_each.max())}; mark exactly one completion of each in companions"
        )
    companions = torch.zeros_like(num_each)
    companions[groups[rows]] = rows
    return companions


def _per_completion(loss: PreferenceLoss, inputs: PreferenceInputs, name: str) -> Tensor:
    """(B,) the number of that name of every completion."""
    name = name.removeprefix("sequence_")
    num = inputs.lengths.shape[0]
    if name in ("lengths", "groups", "from_reference"):
        return _given(loss, inputs, name)
    if name == "rewards":
        return inputs.rewards.double()
    if name == "advantages":
        advantages = _given(loss, inputs, name).double()
        num_each = counts(inputs.completion_index, num)
        starts = num_each.cumsum(0) - num_each
        first = torch.cat([advantages, advantages.new_zeros(1)])[starts]
        return torch.where(num_each > 0, first, 0)
    if name == "alignments":
        if inputs.sum_p2 is None:
            raise _missing(loss, name)
        aligned = inputs.logps.double() - inputs.sum_p2.double().log()
        return sums(aligned, inputs.completion_index, num) / inputs.lengths.clamp(min=1)
    return sums(_given(loss, inputs, name).double(), inputs.completion_index, num)


def _given(loss: PreferenceLoss, inputs: PreferenceInputs, name: str) -> Tensor:
    vector: Tensor | None = getattr(inputs, name)
    if vector is None:
        raise _missing(loss, name)
    return vector


def _missing(loss: PreferenceLoss, name: str) -> ValueError:
    return ValueError(f"{_name(loss)} needs {name}, got None; {HOW_TO_GET[name]}")


def _name(loss: PreferenceLoss) -> str:
    return loss.function.__name__
