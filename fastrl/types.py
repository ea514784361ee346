"""What travels between the stages of a training step.

Legend: P prompts, G num_generations, B = P*G completions, N packed tokens, S trained tokens.
Everything here is frozen and checks its own shapes: a stage can trust what it is given.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fastrl.example import Example as Example
from fastrl.example import Message as Message
from fastrl_kernels.segments import Segments


@dataclass(frozen=True)
class Prompts:
    """P tokenised prompts and the records they came from."""

    token_ids: tuple[Tensor, ...]  # P ragged int64
    examples: tuple[Example, ...]

    def __post_init__(self) -> None:
        _require(
            len(self.token_ids) == len(self.examples),
            f"one example per prompt, got {len(self.token_ids)} prompts and "
            f"{len(self.examples)} examples",
        )
        for index, ids in enumerate(self.token_ids):
            _require(
                ids.dim() == 1 and ids.numel() > 0 and ids.dtype == torch.int64,
                f"prompt {index} must be a non-empty int64 vector, got {tuple(ids.shape)} "
                f"of {ids.dtype}",
            )

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True)
class Rollouts:
    """B = P*G sampled completions; row b = p*G + g answers prompt p."""

    prompts: Prompts
    completion_ids: tuple[Tensor, ...]  # B ragged int64, the end-of-sequence token included
    rollout_logps: tuple[Tensor, ...] | None  # B ragged fp32, nats at the sampling temperature
    finished: Tensor  # (B,) bool: False where the length limit cut the completion
    rollout_entropies: tuple[Tensor, ...] | None = None  # B ragged fp32, of the same distribution
    # B ragged fp32, of the distribution that was drawn from, after truncation and penalties; None
    # where that is the same one or unknown.
    processed_logps: tuple[Tensor, ...] | None = None
    # B ragged bool: False where a token was put there and not drawn, so that it is not trained;
    # None where all were drawn.
    sampled: tuple[Tensor, ...] | None = None
    # (B,) int64 tokens after which thinking is ended, -1 where that is not known yet; None for no
    # limit.
    thinking_budgets: Tensor | None = None

    def __post_init__(self) -> None:
        num_completions = len(self.completion_ids)
        _require(
            len(self.prompts) > 0 and num_completions % len(self.prompts) == 0,
            f"the same number of completions for each of {len(self.prompts)} prompts, "
            f"got {num_completions} in all",
        )
        _require(
            self.finished.shape == (num_completions,) and self.finished.dtype == torch.bool,
            f"finished must be ({num_completions},) bool, got {tuple(self.finished.shape)} "
            f"of {self.finished.dtype}",
        )
        shapes = [ids.shape for ids in self.completion_ids]
        for name in ("rollout_logps", "rollout_entropies", "processed_logps", "sampled"):
            values = getattr(self, name)
            _require(
                values is None or [value.shape for value in values] == shapes,
                f"{name} to hold one value per completion token; return None where the engine "
                "records none",
            )

    @property
    def num_generations(self) -> int:
        """G, the completions of one prompt."""
        return len(self.completion_ids) // len(self.prompts)

    @property
    def lengths(self) -> Tensor:
        """(B,) int64 completion lengths in tokens."""
        return torch.tensor([len(ids) for ids in self.completion_ids], dtype=torch.int64)

    @property
    def num_sampled(self) -> Tensor:
        """(B,) int64 tokens that were drawn: those that can be trained."""
        if self.sampled is None:
            return self.lengths
        return torch.tensor([int(drawn.sum()) for drawn in self.sampled], dtype=torch.int64)


@dataclass(frozen=True)
class Rewards:
    """The score of every completion: the weighted total and the parts it was made of."""

    total: Tensor  # (B,) fp32
    # name -> (B,) fp32, NaN where a reward did not apply, inf where its score was not finite
    parts: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        _require(self.total.dim() == 1, f"total must be (B,), got {tuple(self.total.shape)}")
        _require(bool(torch.isfinite(self.total).all()), "total must be finite")
        for name, part in self.parts.items():
            _require(
                part.shape == self.total.shape,
                f"reward {name!r} must be {tuple(self.total.shape)}, got {tuple(part.shape)}",
            )

    @property
    def is_finite(self) -> Tensor:
        """(B,) bool: whether all that is known of a completion is in its total."""
        found = torch.ones_like(self.total, dtype=torch.bool)
        for part in self.parts.values():
            found &= ~part.isinf()
        return found


@dataclass(frozen=True)
class Batch:
    """One packed forward pass: a forest of shared prefixes and the S tokens trained on it."""

    input_ids: Tensor  # (N,) int64
    position_ids: Tensor  # (N,) int64, continuing along each path
    segments: Segments
    source_index: Tensor  # (S,) int64: the hidden state that predicts the token
    target_ids: Tensor  # (S,) int64
    completion_index: Tensor  # (S,) int64: the row b of Rollouts the token belongs to
    advantages: Tensor  # (S,)
    token_weights: Tensor  # (S,), normalised over the whole optimizer step
    old_logps: Tensor | None = None  # (S,)
    ref_logps: Tensor | None = None  # (S,)
    rollout_weights: Tensor | None = None  # (S,) corrections for the sampler's rounding or age
    rollout_logps: Tensor | None = None  # (S,) as the sampler recorded them

    def __post_init__(self) -> None:
        num_packed = self.input_ids.shape[0]
        num_tokens = self.target_ids.shape[0]
        _require(
            self.position_ids.shape == (num_packed,) and self.segments.num_tokens == num_packed,
            f"position_ids and segments must cover {num_packed} packed tokens",
        )
        for name in ("source_index", "completion_index", "advantages", "token_weights",
                     "old_logps", "ref_logps", "rollout_weights", "rollout_logps"):  # fmt: skip
            value = getattr(self, name)
            _require(
                value is None or value.shape == (num_tokens,),
                f"{name} must have one value per trained token, shape ({num_tokens},)",
            )


StepMetrics = dict[str, float]
"""Name -> value of one step, in TRL's metric names where it has one."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(f"expected {message}")
