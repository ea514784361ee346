"""Sampling with transformers' continuous batching, on the training model itself.

Legend: P prompts, G num_generations, B = P*G completions.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from fastrl.errors import InputError, NotFiniteError
from fastrl.policy import Policy
from fastrl.rollout import OnCompletion, Sampling
from fastrl.rollout.completions import Completion, Ends, to_rollouts
from fastrl.rollout.thinking import refuse_thinking_limit
from fastrl.types import Prompts, Rollouts

FREE_SHARE = 0.2
"""Of the cache: transformers starts no prompt while less than 0.15 of it is free."""
HAS_PAGES = "page_size" in {field.name for field in dataclasses.fields(ContinuousBatchingConfig)}
"""Since transformers 5.18; they were blocks before, and attention had other names."""
POLL_SECONDS = 0.5


class Names(NamedTuple):
    """What the requests and their answers are called."""

    prompts: dict[str, int]  # request -> prompt p
    rows: dict[str, int]  # answer -> row b


class ContinuousBatchingEngine:
    """transformers' paged cache and scheduler, with a new manager for every rollout.

    A kept manager would answer from cached prompt blocks of older weights. Its log-probabilities
    are of what it drew from: they are `rollout_logps` unless top-k, top-p or min-p cut the
    distribution, and `processed_logps` then; there are no entropies. Stop strings do not end its
    work: completions are cut afterwards.

    The same generator gives the same completions: it seeds torch's global random stream, which is
    put back afterwards and which `on_completion` must not draw from. A completion does depend on
    what else is in the batch.
    """

    shares_weights = True

    def __init__(
        self, policy: Policy, *, cache_tokens: int = 16384, page_size: int = 32,
        max_batch_tokens: int = 1024,
    ) -> None:  # fmt: skip
        """cache_tokens: of K/V, at most; page_size and max_batch_tokens in tokens.

        Left to itself transformers takes most of the memory and, on a CPU, two to three times as
        long. Where attention is not flash, that of each token goes over all that is cached.
        """
        for name, value, smallest in (
            ("cache_tokens", cache_tokens, 1),
            ("page_size", page_size, 4),
            ("max_batch_tokens", max_batch_tokens, 1),
        ):
            if value < smallest:
                raise InputError(
                    f"rollout.engine_args.{name} must be at least {smallest}, got {value}"
                )
        self.policy = policy
        self.cache_tokens = cache_tokens
        self.page_size = page_size
        self.max_batch_tokens = max_batch_tokens

    def generate(
        self, prompts: Prompts, sampling: Sampling, generator: torch.Generator,
        on_completion: OnCompletion | None = None,
    ) -> Rollouts:  # fmt: skip
        """See `Engine.generate`; the policy's modes, dtypes and settings stay as they were."""
        refuse_thinking_limit(sampling.thinking, "hf_cb")
        if sampling.repetition_penalty != 1.0:
            raise InputError(
                "rollout.engine 'hf_cb' has no repetition penalty: transformers' continuous "
                "batching drops it; set rollout.repetition_penalty = 1 or use another engine"
            )
        ends = Ends(self.policy, sampling)
        # A prompt of one token leaves nothing to prefill before it is forked: that is an error.
        # The settings refuse to fork what is not sampled.
        forks = sampling.temperature > 0.0 and min(len(ids) for ids in prompts.token_ids) > 1
        names = _names(len(prompts), sampling.num_generations, forks)
        token_ids = {name: prompts.token_ids[p].tolist() for name, p in names.prompts.items()}
        config = self._cache_config(list(token_ids.values()), sampling, generator)
        completions: dict[int, Completion] = {}
        with _running(self.policy, token_ids, self._settings(sampling, forks), config) as manager:
            for output in _outputs(manager, len(names.rows)):
                row = names.rows[output.request_id]
                completions[row] = ends.cut(
                    torch.tensor(output.generated_tokens), torch.tensor(output.logprobs)
                )
                if on_completion is not None:
                    on_completion(row, completions[row].ids)
        in_order = [completions[b] for b in range(len(names.rows))]
        return to_rollouts(prompts, sampling, in_order, is_processed=True)

    def _settings(self, sampling: Sampling, forks: bool) -> GenerationConfig:
        """What is drawn from; nothing of the model's own settings enters."""
        settings = GenerationConfig(
            max_new_tokens=sampling.max_completion_length,
            eos_token_id=self.policy.eos_token_ids,
            num_return_sequences=sampling.num_generations if forks else 1,
            do_sample=sampling.temperature > 0.0,
        )
        if settings.do_sample:  # truncation leaves the most likely token as it is
            num_columns = self.policy.model.config.get_text_config().vocab_size
            settings.temperature = sampling.temperature
            settings.top_k = min(sampling.top_k, num_columns)
            settings.top_p = sampling.top_p
            settings.min_p = sampling.min_p or None
        return settings

    def _cache_config(
        self, prompts: list[list[int]], sampling: Sampling, generator: torch.Generator
    ) -> ContinuousBatchingConfig:
        """A cache for the whole rollout where `cache_tokens` allow it."""
        pages = [-(-len(ids) // self.page_size) for ids in prompts]
        own = -(-sampling.max_completion_length // self.page_size) + 1
        smallest = int((max(pages) + own) / (1 - FREE_SHARE)) + 1
        largest = self.cache_tokens // self.page_size
        if smallest > largest:
            raise InputError(
                "the longest prompt and rollout.max_completion_length need "
                f"rollout.engine_args.cache_tokens of at least {smallest * self.page_size}, "
                f"got {self.cache_tokens}"
            )
        wanted = (sum(pages) + len(prompts) * sampling.num_generations * own) / (1 - FREE_SHARE)
        fields: dict[str, Any] = {
            "num_blocks": max(smallest, min(largest, int(wanted) + 1)),
            "max_batch_tokens": self.max_batch_tokens,
            "return_logprobs": True,
            "seed": int(torch.randint(2**62, (), generator=generator, device=generator.device)),
        }
        if HAS_PAGES:
            fields |= {"page_size": self.page_size, "auto_switch_to_flash": False}
        else:
            fields["block_size"] = self.page_size
        return ContinuousBatchingConfig(**fields)


def _names(num_prompts: int, num_generations: int, forks: bool) -> Names:
    """One request a prompt, whose answers transformers numbers, or one a completion."""
    rows = [
        (p, g, p * num_generations + g) for p in range(num_prompts) for g in range(num_generations)
    ]
    if not forks:
        return Names({f"{b}": p for p, _, b in rows}, {f"{b}": b for _, _, b in rows})
    return Names(
        {f"{p}": p for p in range(num_prompts)},
        {f"{p}__child#{g - 1}" if g else f"{p}": b for p, g, b in rows},
    )


@contextlib.contextmanager
def _running(
    policy: Policy, token_ids: Mapping[str, list[int]], settings: GenerationConfig,
    config: ContinuousBatchingConfig,
) -> Iterator[Any]:  # fmt: skip
    """A manager that works on all prompts; the model is put back when it has ended."""
    model = policy.model
    modes = [(module, module.training) for module in model.modules()]
    attention = model.config._attn_implementation
    manager = None
    with torch.random.fork_rng([policy.device] if policy.device.type == "cuda" else []):
        try:
            manager = _new_manager(model, settings, config)
            # All before the start: what is batched together must not depend on the time.
            for name, ids in token_ids.items():
                manager.add_request(ids, request_id=name)
            manager.start()
            yield manager
        finally:
            if manager is not None and manager.is_running():
                manager.stop(block=True, hard_stop=True)
            if model.config._attn_implementation != attention:
                model.set_attn_implementation(attention)
            for module, training in modes:
                module.training = training


def _new_manager(model: Any, settings: GenerationConfig, config: ContinuousBatchingConfig) -> Any:
    attention = model.config._attn_implementation
    if getattr(model.config.get_text_config(), "attn_logit_softcapping", None) is not None:
        raise _unfit("its attention leaves out the soft cap of the scores")
    try:
        if not HAS_PAGES and not attention.startswith("paged|"):
            model.set_attn_implementation(f"paged|{attention}")  # it would choose another itself
        return model.init_continuous_batching(settings, config)
    except (AttributeError, ValueError) as error:
        raise _unfit(error) from error


def _outputs(manager: Any, count: int) -> Iterator[Any]:
    """That many finished outputs in the order in which they end."""
    while count > 0:
        output = manager.get_result(timeout=POLL_SECONDS)
        if output is not None and output.error is None:
            count -= 1
            yield output
        elif output is not None or not manager.is_running():
            if manager.is_running():  # it records why after it has handed out what had failed
                manager.stop(block=True, hard_stop=True)
            raise _failure(manager.background_thread_status.fatal_error, output)


def _failure(fatal: Exception | None, output: Any) -> Exception:
    text = str(fatal or getattr(output, "error", None) or "it stopped without saying why")
    if "`inf`, `nan`" in text:  # torch.multinomial's words
        return NotFiniteError("the model's logits are not finite; lower the learning rate")
    if isinstance(fatal, MemoryError):
        return InputError(
            f"no memory for the cache: {text}; lower rollout.engine_args.cache_tokens"
        )
    if isinstance(fatal, ValueError):
        return _unfit(fatal)
    return RuntimeError(f"transformers' continuous batching failed: {text}")


def _unfit(reason: object) -> InputError:
    return InputError(
        f"transformers' continuous batching does not take this model: {reason}; use another "
        "rollout.engine"
    )
