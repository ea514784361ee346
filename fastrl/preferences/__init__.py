"""Pair, list and regression losses of whole completions, as one slope per token.

A loss is a function of a few numbers per completion: sums of log-probabilities, lengths, rewards.
LOSSES names them all; `preference_terms` turns tokens into those numbers, makes the pairs, and
gives back what each token contributes to the gradient of its log-probability.
"""

from fastrl.preferences.adapter import PreferenceInputs, preference_terms
from fastrl.preferences.losses import LOSSES, PreferenceLoss
from fastrl.preferences.pairing import PAIRINGS, PairingRule
from fastrl.preferences.terms import PairTerms, SequenceLoss, SequenceTerms

__all__ = [
    "LOSSES",
    "PAIRINGS",
    "PairTerms",
    "PairingRule",
    "PreferenceInputs",
    "PreferenceLoss",
    "SequenceLoss",
    "SequenceTerms",
    "preference_terms",
]
