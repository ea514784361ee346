"""Rows at the head for a fused model, and whether they mean what its own forward means.

Legend: B sequences, L their padded length.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from fastrl.errors import InputError
from fastrl.integrations.fused_call import FusedCall
from fastrl.integrations.head_rows import HeadRows, RowMaker, head_rows
from fastrl.integrations.padding import HALF, evaluating

Forward = Callable[..., Any]

NUM_CHECKED = 4
"""Tokens that the model's own forward is run on."""
SAME_LOSS = 1e-3
"""Relative difference of two losses from the same logits."""
SAME_LOGPS = {True: 2**-6, False: 2e-3}
"""Difference over the largest logit, where logits are rounded to HALF and where not."""


class FusedRows(RowMaker):
    """Rows of a model, shared where that gives what its own forward gives; keeps what it found.

    share_prefixes: False pads the rows of every call.
    """

    def __init__(self, *, share_prefixes: bool, strict: bool) -> None:
        super().__init__(strict=strict)
        self.share_prefixes = share_prefixes
        self.same_loss = False  # as far as it was looked at

    def of_call(self, model: Any, original: Forward, call: FusedCall) -> HeadRows:
        """Rows with the labels of a call; original: the model's own forward."""
        if not self.same_loss:
            self.same_loss = check_same_loss(model, original, call)
        inputs = (call.input_ids, call.attention_mask, call.labels)
        if self.share_prefixes:
            rows = self(model, *inputs, **call.model_kwargs)
        else:
            rows = head_rows(model, *inputs, share_prefixes=False, **call.model_kwargs)
        # A label need not be the token that is read in its place.
        return dataclasses.replace(rows, target_ids=rows.tokens(call.labels[:, 1:]))


@torch.compiler.disable
@torch.no_grad()
def check_same_loss(model: Any, original: Forward, call: FusedCall) -> bool:
    """Whether this could be seen: InputError where the fused loss would not be the model's own.

    Runs the model's own forward on a few tokens: some have more between their hidden states and
    their logits than a head, or more in their loss than the labels' negative log-probabilities.
    """
    places = (call.labels[:, 1:] >= 0).nonzero()
    if not len(places):
        return False
    row, column = places[0].tolist()
    start = max(column + 2 - NUM_CHECKED, 0)
    ids = call.input_ids[row : row + 1, start : start + NUM_CHECKED]
    with evaluating(model):
        own = original(input_ids=ids, labels=ids, use_cache=False)
        rows = head_rows(model, ids, None, ids, share_prefixes=False)
        ours = rows.linear_logps().logps
    name, logits = type(model).__name__, own.logits[0, :-1]
    logps = logits.float().log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    loss, advice = -logps.mean(), "score its logits with fastrl_kernels.selected_logps"
    if not bool((own.loss.float() - loss).abs() <= SAME_LOSS * loss.abs()):
        raise InputError(
            f"{name} cannot be fused: its loss is {own.loss.item():.6g} where the mean of its "
            f"labels' negative log-probabilities is {loss.item():.6g}; {advice}"
        )
    is_half = logits.dtype in HALF or rows.hidden_states.dtype in HALF
    difference = (logps - ours).abs().max()
    if not bool(difference <= SAME_LOGPS[is_half] * logits.float().abs().max()):
        raise InputError(
            f"{name} cannot be fused: its logits are not what its head makes of its hidden states, "
            f"log-probabilities differ by {difference.item():.3g}; {advice}"
        )
    return True
