"""What down-sampling saved of a step: completions, rows at the head, packed tokens, operations.

Legend: B completions, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from fastrl.packing import PackedPass, count_rollouts, split_cost
from fastrl.types import Rollouts, StepMetrics


class Work(NamedTuple):
    """Tokens that went through the layers, and rows that went through the head."""

    tokens: int = 0
    rows: int = 0

    def flops(self, row_flops: float) -> float:
        """Matrix products with weights, in those of a packed token through the layers."""
        return self.tokens + self.rows * row_flops


def work_of(passes: Sequence[PackedPass], *, runs_layers: bool = True) -> Work:
    """Of the passes; of their rows alone where the layers had run already."""
    tokens = sum(len(item.plan.input_ids) for item in passes) if runs_layers else 0
    return Work(tokens, sum(len(item.plan.target_ids) for item in passes))


def row_flops(model: Any) -> float:
    """Products with weights that a row at the head takes, in those of a packed token: V D over the
    parameters outside of the embeddings and the head.
    """
    config = model.config.get_text_config()
    head = config.vocab_size * config.hidden_size
    outside = sum(parameter.numel() for parameter in model.parameters())
    outside -= head if config.tie_word_embeddings else 2 * head
    return head / max(outside, 1)


def down_sampling_metrics(
    rollouts: Rollouts, trained: Sequence[PackedPass], measured: Work, *, row_flops: float
) -> StepMetrics:
    """What the last iteration of a step left out of all that was sampled.

    trained: the passes with gradient; measured: what ran forward only before them. Backward counts
    twice a forward, so the operations of the step are 3 trained + measured, and those of training
    on every token 3 all. Attention's own products and a reference policy do not count. Below 0
    where measuring took more than dropping saved.
    """
    everything = Work(count_rollouts(rollouts), int(rollouts.lengths.sum()))
    done = work_of(trained)
    used = {b for item in trained for b in item.batch.completion_index.unique().tolist()}
    flops = 3 * done.flops(row_flops) + measured.flops(row_flops)
    return {
        "down_sampling/completions_dropped": float(int((rollouts.lengths > 0).sum()) - len(used)),
        "down_sampling/rows_skipped": float(everything.rows - done.rows),
        "down_sampling/tokens_trimmed": float(
            everything.tokens - (done.tokens - split_cost(trained))
        ),
        "down_sampling/flops_saved": 1 - flops / max(3 * everything.flops(row_flops), 1e-9),
        "down_sampling/step_skipped": float(not trained),
    }
