"""What padding does to the positions of a batch, which a packed row has none of.

Legend: B sequences, L their padded length, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastrl.integrations.capabilities import without_wrappers

NUM_TOKENS = 4
"""Tokens that a model is run on to see whether it counts padding."""
HALF = (torch.bfloat16, torch.float16)
SAME = {True: 2**-5, False: 2e-3}
"""Difference over the largest hidden state, where they are rounded to HALF and where not."""


class PositionsOfPadding:
    """Whether a batch has other positions on padded rows than in a packed one."""

    def __init__(self) -> None:
        self._counts: dict[type, bool] = {}  # by the class of a model, which need not be run twice

    def reason(self, model: nn.Module, input_ids: Tensor, mask: Tensor | None) -> str | None:
        """What a row without padding would change; None where it changes nothing.

        input_ids, mask: (B, L).
        """
        if mask is None:
            return None
        kept = mask != 0
        starts = kept[:, 0].long() + (kept[:, 1:] & ~kept[:, :-1]).sum(1)
        if bool((starts > 1).any()):
            return "attention_mask leaves out tokens between others, which keep their positions"
        if not bool((kept.any(1) & ~kept[:, 0]).any()):
            return None
        kind = type(without_wrappers(model))
        if kind not in self._counts:
            self._counts[kind] = counts_padding(model, input_ids[:1, -NUM_TOKENS:])
        if self._counts[kind]:
            return f"{kind.__name__} counts the positions of padding before a sequence"
        return None


@torch.compiler.disable
@torch.no_grad()
def counts_padding(model: nn.Module, input_ids: Tensor) -> bool:
    """Whether masked tokens before others change the hidden states of those; input_ids (1, L)."""
    body: Any = without_wrappers(model).base_model
    padded = torch.cat([input_ids[:, :1], input_ids[:, :1], input_ids], 1)
    mask = torch.ones_like(padded)
    mask[:, :2] = 0
    # Under autocast float32 states carry the rounding of bfloat16.
    with evaluating(body), torch.autocast(input_ids.device.type, enabled=False):
        alone = body(input_ids=input_ids, use_cache=False).last_hidden_state
        behind = body(input_ids=padded, attention_mask=mask, use_cache=False).last_hidden_state
    allowed = SAME[alone.dtype in HALF] * alone.float().abs().max()
    return bool((alone.float() - behind[:, 2:].float()).abs().max() > allowed)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in evaluation mode within the block, and then in the mode that it was in."""
    trained = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in trained:
            module.training = True
