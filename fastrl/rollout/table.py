"""Everything that has been drawn so far, one line a completion.

Legend: B completions, C most tokens of one, R rows that go on.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastrl.errors import NotFiniteError
from fastrl.rollout.drawing import Drawn
from fastrl.types import Prompts, Rollouts

Rows = NDArray[np.int64]
"""(R,) the rows b of some completions."""


class Table:
    """Tokens with what they were drawn from, (B, C) each, and how far each row is."""

    def __init__(self, num_rows: int, num_columns: int, device: torch.device) -> None:
        self.ids = torch.zeros(num_rows, num_columns, dtype=torch.int64, device=device)
        self.logps, self.entropies, self.processed_logps = (
            torch.zeros(num_rows, num_columns, device=device) for _ in range(3)
        )
        self.lengths = np.zeros(num_rows, dtype=np.int64)
        self.finished = np.zeros(num_rows, dtype=bool)
        self.sampled = np.ones((num_rows, num_columns), dtype=bool)
        """False where a token was put there and not drawn."""
        self.thinking_budgets: NDArray[np.int64] | None = None
        """(B,) where there is a limit on thinking; -1 where it has not been drawn yet."""

    def start(self, rollouts: Rollouts) -> None:
        """Begin with what an earlier call has drawn, the same rows in the same order."""
        recorded = rollouts.rollout_logps, rollouts.rollout_entropies, rollouts.processed_logps
        tables = (self.logps, self.entropies, self.processed_logps)
        for row, ids in enumerate(rollouts.completion_ids):
            self.ids[row, : len(ids)] = ids
            for table, values in zip(tables, recorded, strict=True):
                if values is not None:
                    table[row, : len(ids)] = values[row]
        self.lengths[:] = rollouts.lengths.numpy()
        self.finished[:] = rollouts.finished.numpy()
        if rollouts.sampled is not None:
            for row, sampled in enumerate(rollouts.sampled):
                self.sampled[row, : len(sampled)] = sampled.numpy()
        if rollouts.thinking_budgets is not None:
            self.thinking_budgets = rollouts.thinking_budgets.numpy().copy()

    def limit_thinking(self, budgets: NDArray[np.int64]) -> None:
        """Give each row a budget (B,), but for those that have one from an earlier call."""
        known = self.thinking_budgets
        self.thinking_budgets = budgets if known is None else np.where(known < 0, budgets, known)

    @property
    def goes_on(self) -> NDArray[np.bool_]:
        """(B,) the rows that have neither ended nor reached the limit."""
        return ~self.finished & (self.lengths < self.ids.shape[1])

    def append(self, rows: Rows, drawn: Drawn, forced: NDArray[np.int64] | None = None) -> None:
        """Write one token behind each of the rows; forced: as `draw` was given it."""
        if not bool(torch.isfinite(drawn.logps).all()):
            raise NotFiniteError("the model's logits are not finite; lower the learning rate")
        place = tuple(torch.from_numpy(x).to(self.ids.device) for x in (rows, self.lengths[rows]))
        self.ids[place] = drawn.tokens
        self.logps[place] = drawn.logps
        self.entropies[place] = drawn.entropies
        self.processed_logps[place] = drawn.processed_logps
        if forced is not None:
            self.sampled[rows, self.lengths[rows]] = forced < 0
        self.lengths[rows] += 1

    def completion(self, row: int) -> Tensor:
        """The tokens of one row so far."""
        return self.ids[row, : self.lengths[row]].cpu()

    def rollouts(self, prompts: Prompts, *, is_exact: bool) -> Rollouts:
        """What came of the prompts; is_exact: tokens were drawn from the policy itself."""

        def cut(table: Tensor) -> tuple[Tensor, ...]:
            table = table.cpu()
            return tuple(line[:n].clone() for line, n in zip(table, self.lengths, strict=True))

        budgets, sampled = self.thinking_budgets, None
        if budgets is not None:
            lines = zip(self.sampled, self.lengths, strict=True)
            sampled = tuple(torch.from_numpy(line[:n].copy()) for line, n in lines)
        return Rollouts(
            prompts=prompts,
            completion_ids=cut(self.ids),
            rollout_logps=cut(self.logps),
            finished=torch.from_numpy(self.finished.copy()),
            rollout_entropies=cut(self.entropies),
            processed_logps=None if is_exact else cut(self.processed_logps),
            sampled=sampled,
            thinking_budgets=None if budgets is None else torch.from_numpy(budgets.copy()),
        )
