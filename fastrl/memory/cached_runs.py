"""What engines with transformers' own caches take: those of models with state, and `generate`.

Legend: P prompts, R rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastrl.memory.decoder_runs import prefill, run
from fastrl.memory.engine_moments import Call
from fastrl.policy import Policy
from fastrl.rollout.cached import CachedDecoder
from fastrl.rollout.continuous_batching import FREE_SHARE, ContinuousBatchingEngine
from fastrl.rollout.requests import Request

Parts = Mapping[str, int]
LOGITS_OF_GENERATE = 2
"""The model's own, and the scores that become those of the drawn tokens."""
LOGITS_ALIVE = 3
"""Copies of a batch's logits while transformers draws from them: as given, processed, softmax."""


class FlashAttention(TorchFunctionMode):
    """Attention of torch as it runs on devices: scores are never there whole.

    On "meta" it would be products of whole matrices, with a copy of keys and values for each head.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # fmt: skip
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        q, _, v = args[:3]
        dtype = torch.bfloat16 if torch.is_autocast_enabled("cpu") else q.dtype
        return q.new_empty(*q.shape[:-1], v.shape[-1], dtype=dtype)


def cached_call(policy: Policy, device: str, call: Call, engine: str) -> list[Parts]:
    """Of the prompts' forward pass, and of the last step, whose keys and values are the longest.

    Engine "native" has a prompt once for all its completions, and the arithmetic of training;
    "generate" has a copy for each, in the arithmetic of the weights.
    """
    is_native = engine == "native"
    num_copies = 1 if is_native else call.num_generations
    rows = tuple(range(call.num_generations // num_copies))
    ids = torch.zeros(call.prompt_length, dtype=torch.int64)
    requests = [Request(ids, rows)] * (call.num_prompts * num_copies)
    decoder = CachedDecoder(policy)
    with policy.autocast() if is_native else nullcontext(), FlashAttention():
        ledger = run(lambda: decoder.admit(requests), device, num_rows=call.num_rows)
        found = [_parts(ledger.peak, cache_bytes(decoder.cache))]
        tokens = torch.zeros(call.num_rows, dtype=torch.int64, device=policy.device)

        def last_step() -> None:
            lengthen(decoder.cache, max(call.completion_length - 2, 0))
            decoder.step(tokens)

        ledger = run(last_step, device)
        return [*found, _parts(ledger.peak, cache_bytes(decoder.cache))]


def copied_logits(policy: Policy, call: Call, engine: str) -> int:
    """Bytes of logits that `generate` has beside those that tokens are drawn from."""
    num_columns = policy.lm_head.num_columns
    copies = 0 if engine == "native" else LOGITS_OF_GENERATE
    return copies * call.num_rows * num_columns * torch.float32.itemsize


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
