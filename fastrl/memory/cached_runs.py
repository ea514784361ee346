"""What engines with transformers' own caches take: those of models with state, and `generate`.

Legend: P prompts, R rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fastrl.memory.decoder_runs import prefill, run
from fastrl.memory.engine_moments import Call
from fastrl.policy import Policy
from fastrl.rollout.cached import CachedDecoder
from fastrl.rollout.continuous_batching import FREE_SHARE, ContinuousBatchingEngine
from fastrl.rollout.requests import Request

Parts = Mapping[str, int]
LOGITS_ALIVE = 3
"""Copies of a batch's logits while transformers draws from them: as given, processed, softmax."""


def cached_call(policy: Policy, device: str, call: Call, num_copies: int) -> Iterator[Parts]:
    """Of the prompts' forward pass, and of the last step, whose keys and values are the longest.

    num_copies: of each prompt that are encoded.
    """
    per_prompt = call.num_generations // num_copies
    ids = torch.zeros(call.prompt_length, dtype=torch.int64)
    requests = [
        Request(ids, tuple(range(per_prompt))) for _ in range(call.num_prompts * num_copies)
    ]
    decoder = CachedDecoder(policy)
    with policy.autocast():
        peak = run(lambda: decoder.admit(requests), device, num_rows=call.num_rows).peak
    yield _parts(peak, cache_bytes(decoder.cache))
    tokens = torch.zeros(call.num_rows, dtype=torch.int64, device=policy.device)

    def last_step() -> None:
        lengthen(decoder.cache, call.completion_length - 2)
        decoder.step(tokens)

    if call.completion_length > 1:
        with policy.autocast():
            peak = run(last_step, device).peak
        yield _parts(peak, cache_bytes(decoder.cache))


def paged_call(policy: Policy, device: str, arguments: Mapping[str, Any], call: Call) -> Parts:
    """Of continuous batching, by its settings: pages, and a batch of tokens on its way.

    An estimate: transformers' own masks, graphs and copies are not in it.
    """
    engine = ContinuousBatchingEngine(policy, **arguments)
    page = engine.page_size
    own = -(-call.completion_length // page) + 1
    pages = call.num_prompts * -(-call.prompt_length // page) + call.num_rows * own
    num_tokens = min(int(pages / (1 - FREE_SHARE) + 1) * page, engine.cache_tokens)
    in_batch = min(engine.max_batch_tokens, num_tokens)
    found = prefill(policy, device, num_prompts=1, num_rows=1, length=in_batch, capacity=1)
    rows = min(in_batch, call.num_rows)
    return {
        "keys and values": num_tokens * found.token_bytes,
        "activations": found.beside,
        "sampling": LOGITS_ALIVE * rows * policy.lm_head.num_columns * torch.float32.itemsize,
    }


def _parts(peak: int, kept: int) -> Parts:
    return {"keys and values": kept, "activations": peak - kept}


def cache_tensors(cache: Any) -> Iterator[Tensor]:
    """All states of a cache of transformers."""
    for layer in cache.layers:
        for name in ("keys", "values", "conv_states", "recurrent_states"):
            found = getattr(layer, name, None)
            for tensor in found.values() if isinstance(found, dict) else [found]:
                if isinstance(tensor, Tensor):
                    yield tensor


def cache_bytes(cache: Any) -> int:
    """Of all its layers."""
    return sum(tensor.nbytes for tensor in cache_tensors(cache))


def lengthen(cache: Any, num_tokens: int) -> None:
    """Let every layer of attention have so many tokens more, as new tensors."""
    for layer in cache.layers:
        for name in ("keys", "values"):
            old = getattr(layer, name, None)
            if isinstance(old, Tensor) and old.dim() == 4:
                rows, heads, length, size = old.shape
                setattr(layer, name, old.new_empty(rows, heads, length + num_tokens, size))
