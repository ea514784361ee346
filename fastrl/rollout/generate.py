"""Sampling with transformers' `generate`: one left-padded batch, one private random stream.

Legend: P prompts, G num_generations, B = P*G, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from fastrl.errors import NotFiniteError
from fastrl.policy import Policy
from fastrl.rollout import Sampling
from fastrl.types import Prompts, Rollouts


class GenerateEngine:
    """The reference engine: correct for every model that `generate` supports, fast for none."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    @torch.no_grad()
    def generate(
        self, prompts: Prompts, sampling: Sampling, generator: torch.Generator
    ) -> Rollouts:
        """See `Engine.generate`; the policy's mode and generation settings stay as they were."""
        model, tokenizer = self.policy.model, self.policy.tokenizer
        input_ids, attention_mask = _left_padded(
            prompts.token_ids, tokenizer.pad_token_id, sampling.num_generations
        )
        sampler = _Sampler(sampling, generator, self._num_columns())
        settings = GenerationConfig(
            max_new_tokens=sampling.max_completion_length,
            do_sample=False,  # the sampler has already drawn: its token is the only finite score
            eos_token_id=self.policy.eos_token_ids,
            pad_token_id=tokenizer.pad_token_id,
            use_cache=True,
        )
        was_training, own_settings = model.training, model.generation_config
        model.eval()
        # Settings left open would be filled in from the model's own file, where instruct models
        # keep repetition penalties and the like, which would change the sampled distribution.
        model.generation_config = settings
        try:
            sequences = model.generate(
                input_ids=input_ids.to(self.policy.device),
                attention_mask=attention_mask.to(self.policy.device),
                generation_config=settings,
                logits_processor=LogitsProcessorList([sampler]),
            )
        finally:
            model.train(was_training)
            model.generation_config = own_settings
        drawn, logps = sequences[:, input_ids.shape[1] :].cpu(), sampler.logps.cpu()
        if not torch.isfinite(logps).all():
            raise NotFiniteError("the model's logits are not finite; lower the learning rate")
        return _trimmed(prompts, drawn, logps, sampler.entropies.cpu(), self.policy.eos_token_ids)

    def _num_columns(self) -> int:
        """Columns of the logits that are tokens; the rest is padding and must never be drawn."""
        return self.policy.model.config.get_text_config().vocab_size


class _Sampler(LogitsProcessor):
    """Draws the next token itself, from its own generator, and records what it drew from.

    Log-probabilities and entropies are of softmax(logits / temperature), before any truncation.
    """

    def __init__(self, sampling: Sampling, generator: torch.Generator, num_columns: int) -> None:
        self.sampling = sampling
        self.generator = generator
        self.num_columns = num_columns
        self._logps: list[Tensor] = []
        self._entropies: list[Tensor] = []

    @property
    def logps(self) -> Tensor:
        """(B, C) fp32, one column per generated position."""
        return torch.stack(self._logps, dim=1)

    @property
    def entropies(self) -> Tensor:
        """(B, C) fp32."""
        return torch.stack(self._entropies, dim=1)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        logits = scores[:, : self.num_columns].float()
        logps = torch.log_softmax(logits / (self.sampling.temperature or 1.0), dim=-1)  # (B, V)
        probabilities = logps.exp()
        tokens = self._draw(logps, probabilities)
        self._logps.append(logps.gather(1, tokens[:, None])[:, 0])
        finite = logps.clamp_(min=torch.finfo(logps.dtype).min)  # 0 * -inf would be NaN
        self._entropies.append(-torch.linalg.vecdot(probabilities, finite))
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens[:, None], 0.0)

    def _draw(self, logps: Tensor, probabilities: Tensor) -> Tensor:
        """(B,) tokens from the probabilities after truncation."""
        if self.sampling.temperature == 0.0:
            return logps.argmax(dim=-1)
        kept = truncate(logps, self.sampling)
        if kept is not logps:
            probabilities = kept.exp()
        # argmax(p / Exponential(1)) is a draw from p (the exponential race of Gumbel-max sampling).
        noise = torch.empty_like(probabilities).exponential_(generator=self.generator)
        return (probabilities / noise).argmax(dim=-1)


def truncate(logps: Tensor, sampling: Sampling) -> Tensor:
    """(B, V) log-probabilities with the tokens excluded by top-k, top-p or min-p at -inf."""
    if 0 < sampling.top_k < logps.shape[-1]:
        kth = logps.topk(sampling.top_k, dim=-1).values[:, -1:]
        logps = logps.masked_fill(logps < kth, -torch.inf)
    if sampling.top_p < 1.0:
        ordered, order = logps.sort(dim=-1, descending=True)
        probabilities = ordered.softmax(dim=-1)
        before = probabilities.cumsum(dim=-1) - probabilities  # the most likely token always stays
        dropped = torch.zeros_like(logps, dtype=torch.bool)
        dropped.scatter_(1, order, before >= sampling.top_p)
        logps = logps.masked_fill(dropped, -torch.inf)
    if sampling.min_p > 0.0:
        floor = logps.amax(dim=-1, keepdim=True) + torch.log(logps.new_tensor(sampling.min_p))
        logps = logps.masked_fill(logps < floor, -torch.inf)
    return logps


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


def _trimmed(
    prompts: Prompts, drawn: Tensor, logps: Tensor, entropies: Tensor, eos_token_ids: list[int]
) -> Rollouts:
    """Cut every row after its first end-of-sequence token; a row without one was truncated."""
    is_end = torch.isin(drawn, torch.tensor(eos_token_ids))
    finished = is_end.any(dim=1)
    lengths = torch.where(finished, is_end.int().argmax(dim=1) + 1, drawn.shape[1]).tolist()

    def cut(table: Tensor) -> tuple[Tensor, ...]:
        return tuple(row[:n].clone() for row, n in zip(table, lengths, strict=True))

    return Rollouts(
        prompts=prompts,
        completion_ids=cut(drawn),
        rollout_logps=cut(logps),
        finished=finished,
        rollout_entropies=cut(entropies),
    )
