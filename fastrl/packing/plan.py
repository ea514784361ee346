"""A packed row with the map from its hidden states to the tokens they predict.

Legend: N packed tokens, S trained tokens.
"""

from __future__ import annotations

import dataclasses
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastrl.packing.kept_tokens import keep_tokens
from fastrl.packing.shared_tokens import DistinctRows, distinct_rows
from fastrl_kernels.segments import Segments


@dataclass(frozen=True)
class Plan:
    """A packed row and the map from hidden states to the tokens they predict.

    A completion is whatever the caller packed and numbered: a completion of a prompt, a whole
    sequence, a segment of a tree. Trained tokens follow the caller's order.
    """

    input_ids: Tensor  # (N,) int64
    segments: Segments
    source_index: Tensor  # (S,) int64: the packed position whose hidden state predicts the token
    target_ids: Tensor  # (S,) int64
    completion_index: Tensor  # (S,) int64
    completion_lengths: tuple[int, ...]  # trained tokens of each completion
    num_unshared_tokens: int  # tokens of the same completions in one row each
    num_repeated_tokens: int = 0  # packed tokens that an earlier pass of the same step has too

    def __post_init__(self) -> None:
        if self.segments.num_tokens != len(self.input_ids):
            raise ValueError(
                f"expected segments over all {len(self.input_ids)} packed tokens, got lengths that "
                f"sum to {self.segments.num_tokens}"
            )
        if sum(self.completion_lengths) != len(self.target_ids):
            raise ValueError(
                f"expected completion_lengths of the {len(self.target_ids)} trained tokens, got "
                f"lengths that sum to {sum(self.completion_lengths)}"
            )

    @property
    def position_ids(self) -> Tensor:
        """(N,) int64, continuing along the path from the prompt into each completion."""
        return self.segments.positions

    @property
    def token_ratio(self) -> float:
        """Tokens that one row per completion would take, over packed tokens: what sharing saves."""
        return self.num_unshared_tokens / len(self.input_ids)

    @property
    def inputs(self) -> dict[str, Any]:
        """Keyword arguments for the body of a transformers model, inside `attach`."""
        return {
            "input_ids": self.input_ids[None],
            "position_ids": self.position_ids[None],
            "use_cache": False,
            "segments": self.segments,
        }

    def attach(
        self, model: nn.Module, *, source_rows_only: bool = False
    ) -> AbstractContextManager[None]:
        """Give the model segment attention for this block; models that would leak are refused.

        source_rows_only: the last layer takes its queries, output projection and MLP only on the
        rows of `source_index`, where the model class allows it; other hidden states are then zero.
        """
        from fastrl.integrations.transformers import segment_attention_enabled

        rows = self.source_index.unique() if source_rows_only else None
        return segment_attention_enabled(model, rows, num_tokens=len(self.input_ids))

    def scatter(self, values: Tensor) -> list[Tensor]:
        """Per-token values (S,) as one tensor per completion, in the caller's order."""
        if values.shape[:1] != self.target_ids.shape:
            raise ValueError(
                f"expected one value per trained token, ({len(self.target_ids)},), "
                f"got {tuple(values.shape)}"
            )
        return list(values.split(list(self.completion_lengths)))

    def distinct_rows(self) -> DistinctRows:
        """Tokens that several completions share and train, as one row at the head each.

        Log-probabilities of the U rows, then `spread` to all S tokens, cost the head once per row
        and leave every completion its own advantage, ratio and clip.
        """
        return distinct_rows(self.source_index, self.target_ids)

    def keep_tokens(self, kept: Tensor, *, trim: bool = False) -> Plan:
        """The plan with fewer trained tokens: those that `kept` (S,) bool says, at least one.

        The gradient is that of the whole plan with weight 0 on the others, which have no row at
        the head any more. The packed row stays as it is, so hidden states of the whole plan serve
        the kept tokens too. trim: what no kept token depends on leaves the row, in forests of any
        depth: what follows the last kept token of a completion, completions without kept tokens
        and prompts without completions. Waits for the device.
        """
        return keep_tokens(self, kept, trim=trim)

    def to(self, device: torch.device) -> Plan:
        """The same plan with its tensors on `device`."""
        return dataclasses.replace(
            self,
            input_ids=self.input_ids.to(device),
            segments=self.segments.to(device),
            source_index=self.source_index.to(device),
            target_ids=self.target_ids.to(device),
            completion_index=self.completion_index.to(device),
        )
