"""Sampling with transformers' `generate`: one left-padded batch.

Legend: P prompts, G num_generations, B = P*G, V vocabulary.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from fastrl.policy import Policy
from fastrl.rollout import OnCompletion, Sampling
from fastrl.rollout.draws import Drawing
from fastrl.rollout.randomness import completion_keys
from fastrl.rollout.table import Rows, Table
from fastrl.types import Prompts, Rollouts


class GenerateEngine:
    """The oracle: correct for every model that `generate` supports, fast for none."""

    shares_weights = True

    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    @torch.no_grad()
    def generate(
        self, prompts: Prompts, sampling: Sampling, generator: torch.Generator,
        on_completion: OnCompletion | None = None,
    ) -> Rollouts:  # fmt: skip
        """See `Engine.generate`; the policy's mode and generation settings stay as they were.

        The same random numbers as those of the native engine, so the same completions.
        """
        model, pad_token_id = self.policy.model, self.policy.tokenizer.pad_token_id
        G, C = sampling.num_generations, sampling.max_completion_length
        input_ids, attention_mask = _left_padded(prompts.token_ids, pad_token_id, G)
        keys = completion_keys(prompts, G, generator)
        table = Table(len(keys), C, self.policy.device)
        sampler = _Sampler(Drawing(self.policy, sampling, keys, table, prompts), on_completion)
        settings = GenerationConfig(
            max_new_tokens=C,
            do_sample=False,  # the sampler has already drawn: its token is the only finite score
            eos_token_id=self.policy.eos_token_ids,
            pad_token_id=pad_token_id,
            use_cache=True,
        )
        own_settings = model.generation_config
        # Settings left open would be filled in from the model's own file, where instruct models
        # keep repetition penalties and the like, which would change the sampled distribution.
        model.generation_config = settings
        try:
            with self.policy.evaluating():
                model.generate(
                    input_ids=input_ids.to(self.policy.device),
                    attention_mask=attention_mask.to(self.policy.device),
                    generation_config=settings,
                    logits_processor=LogitsProcessorList([sampler]),
                )
        finally:
            model.generation_config = own_settings
        return table.rollouts(prompts, is_exact=sampling.is_exact)


class _Sampler(LogitsProcessor):
    """Draws the next token itself; rows that have ended get an end-of-sequence token."""

    def __init__(self, drawing: Drawing, on_completion: OnCompletion | None) -> None:
        self.drawing = drawing
        self.on_completion = on_completion
        self.rows: Rows = np.arange(len(drawing.keys))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        drawing = self.drawing
        forced = drawing.ends[:1].repeat(len(scores))
        if not len(self.rows):  # all that is left has ended with a stop string, not a token
            return torch.full_like(scores, -torch.inf).scatter_(1, forced[:, None], 0.0)
        # Columns past the vocabulary are padding and must never be drawn.
        logits = scores[torch.from_numpy(self.rows), : drawing.head.num_columns].float()
        tokens = drawing.from_logits(logits.div_(drawing.temperature), self.rows)
        goes_on = drawing.table.goes_on[self.rows]
        forced[torch.from_numpy(self.rows)] = tokens
        if self.on_completion is not None:
            for row in self.rows[~goes_on].tolist():
                self.on_completion(row, drawing.table.completion(row))
        self.rows = self.rows[goes_on]
        return torch.full_like(scores, -torch.inf).scatter_(1, forced[:, None], 0.0)


def _left_padded(
    token_ids: tuple[Tensor, ...], pad_token_id: int, num_generations: int
) -> tuple[Tensor, Tensor]:
    """(B, L) ids and mask. The mask comes from the lengths: a prompt may contain the pad token."""
    longest = max(len(ids) for ids in token_ids)
    input_ids = torch.full((len(token_ids), longest), pad_token_id, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    for row, ids in enumerate(token_ids):
        input_ids[row, longest - len(ids) :] = ids
        attention_mask[row, longest - len(ids) :] = 1
    repeat = torch.arange(len(token_ids)).repeat_interleave(num_generations)
    return input_ids[repeat], attention_mask[repeat]
