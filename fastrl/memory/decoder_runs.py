"""What the native engine's decoder takes at one moment: the decoder itself on tensors without data.

Legend: P prompts, R rows, L tokens of a prompt, Hkv key-value heads.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastrl.integrations.decoding import decoding
from fastrl.memory.kernels import KERNELS
from fastrl.memory.ledger import Inside, Ledger
from fastrl.policy import Policy
from fastrl.rollout import Sampling
from fastrl.rollout.cohort import Cohort, KeyValues
from fastrl.rollout.decoder import PREFILL_TOKENS, PackedDecoder
from fastrl.rollout.drawing import ROWS_IN_CACHE, draw
from fastrl.rollout.draws import LOGITS_AT_A_TIME
from fastrl.rollout.requests import Request
from fastrl_kernels import Segments, make_segments
from fastrl_kernels.decode_attention import LARGEST_HEAD
from fastrl_kernels.decode_attention.workspace import workspace_bytes
from fastrl_kernels.head_logits import head_logits

RUNS_KEPT = 256
"""Of each kind: plans that differ in something else ask for them again."""


class EngineLedger(Ledger):
    """A ledger of an engine, which looks at what it keeps on the host: that has its values.

    num_rows: completions that its prompts get, where it asks a tensor on "meta".
    """

    def __init__(self, device: str, *, segments: Segments | None, num_rows: int) -> None:
        num_needed = 0 if segments is None else len(segments.lengths)
        super().__init__(device, num_needed=num_needed, segments=segments, kernels=OWN_KERNELS)
        self.num_rows = num_rows

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # fmt: skip
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if func is torch.ops.aten.repeat_interleave.Tensor and args[0].is_meta:
            return self._seen(torch.empty(self.num_rows, dtype=torch.int64, device="meta"))
        if self.device == "cuda" and device is not None and torch.device(device).type == "cpu":
            return func(*args, **kwargs)
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _seen(self, out: Any) -> Any:
        is_on_host = isinstance(out, Tensor) and not out.is_meta
        return out if self.device == "cuda" and is_on_host else super()._seen(out)


class Layout(NamedTuple):
    """Of the keys and values of one layer of attention."""

    module: nn.Module
    num_heads: int  # Hkv
    key_size: int
    value_size: int
    dtype: torch.dtype

    @property
    def token_bytes(self) -> int:
        """Of a key and a value."""
        return self.num_heads * (self.key_size + self.value_size) * self.dtype.itemsize


class Prefill(NamedTuple):
    """Encoding prompts."""

    layouts: tuple[Layout, ...]
    beside: int
    """Bytes at the highest, beside what is there when it is over."""
    kept: int
    """Bytes of that beside keys and values: weights in bfloat16, which autocast rounds once."""

    @property
    def token_bytes(self) -> int:
        """Of one token's keys and values in all layers."""
        return sum(layout.token_bytes for layout in self.layouts)


@lru_cache(maxsize=RUNS_KEPT)
def prefill(
    policy: Policy, device: str, *, num_prompts: int, num_rows: int, length: int, capacity: int,
    is_first: bool = True,
) -> Prefill:  # fmt: skip
    """Of P prompts of L tokens with R rows; capacity: columns of the rows' own keys and values.

    Of passes that are alike two run: the second has all that the first keeps beside it. The first
    pass of a call rounds weights on its way.
    """
    in_pass = min(num_prompts, max(1, PREFILL_TOKENS // length))
    num_run = 2 * in_pass if num_prompts >= 2 * in_pass else in_pass  # passes that are full
    segments = make_segments([length] * in_pass, [-1] * in_pass)
    decoder = PackedDecoder(policy, capacity)
    ids = torch.zeros(length, dtype=torch.int64)
    shares = _shares(num_rows, num_prompts)[:num_run]
    requests = [Request(ids, tuple(range(share))) for share in shares]
    with policy.autocast():
        if not is_first:
            _round_weights(policy, device)
        ledger = run(lambda: decoder.admit(requests), device, segments)
        kept = ledger.in_use - decoder.num_bytes
    (cohort,) = decoder.cohorts
    layouts = tuple(_layout(module, values) for module, values in cohort.layers.items())
    kept = kept if policy.bf16 else 0
    return Prefill(layouts, ledger.peak - decoder.num_bytes - kept, kept)


@lru_cache(maxsize=RUNS_KEPT)
def decoder_step(
    policy: Policy, device: str, layouts: tuple[Layout, ...], *, num_prompts: int, num_rows: int,
    length: int, columns: int,
) -> int:  # fmt: skip
    """Bytes that R rows take beside their keys and values while each gets one more token."""
    shares = _shares(num_rows, num_prompts)
    cohort = Cohort([length] * num_prompts, shares, max_new_tokens=columns, device=policy.device)
    cohort.capacity, cohort.num_new = columns, columns - 1
    for layout in layouts:
        sizes = (layout.key_size, layout.value_size)
        cohort.layers[layout.module] = KeyValues(
            *(
                torch.empty(
                    num, layout.num_heads, width, size, dtype=layout.dtype, device=policy.device
                )
                for num, width in ((num_prompts, length), (num_rows, columns))
                for size in sizes
            )
        )
    decoder = PackedDecoder(policy, columns)
    decoder.cohorts = [cohort]
    tokens = torch.zeros(num_rows, dtype=torch.int64, device=policy.device)
    with policy.autocast(), decoding(policy.model, decoder):
        _round_weights(policy, device)
        return run(lambda: decoder.step(tokens), device).peak


def _round_weights(policy: Policy, device: str) -> None:
    """What autocast keeps of weights is there from here on, and belongs to no run."""
    if policy.bf16:
        request = Request(torch.zeros(1, dtype=torch.int64), (0,))
        run(lambda: PackedDecoder(policy, 1).admit([request]), device)


def growth(layouts: tuple[Layout, ...], num_copied: int) -> int:
    """Bytes beside keys and values as they are afterwards, while the last layer's values grow.

    The old ones and those of them that are in use, see `Cohort._rebuilt`.
    """
    last = layouts[-1]
    return 2 * num_copied * last.num_heads * last.value_size * last.dtype.itemsize


@lru_cache(maxsize=RUNS_KEPT)
def drawing(policy: Policy, device: str, sampling: Sampling, num_rows: int) -> int:
    """Bytes that drawing a token of R rows takes: hidden states, logits and what is made of them.

    A CPU works on some rows at a time and casts a head in half precision; a GPU does neither.
    """
    head, meta, is_cuda = policy.lm_head, policy.device, device == "cuda"
    num_columns = head.num_columns
    at_once = min(num_rows, max(1, LOGITS_AT_A_TIME // num_columns))
    hidden = torch.empty(at_once, head.weight.shape[1], dtype=policy.head_dtype, device=meta)
    logits_bytes = at_once * num_columns * torch.float32.itemsize
    product_bytes = logits_bytes
    if not is_cuda:
        product_bytes = run(lambda: head_logits(hidden, head), device).peak
    some = min(at_once, max(1, ROWS_IN_CACHE // num_columns))
    logits = torch.empty(some, num_columns, device=meta)
    numbers = torch.empty(some, dtype=torch.float64, device=meta)
    seen = None
    if sampling.repetition_penalty != 1.0:
        seen = torch.empty(some, num_columns, dtype=torch.bool, device=meta)
    draw_bytes = run(lambda: draw(logits, numbers, sampling, seen), device).peak
    if is_cuda:
        draw_bytes = draw_bytes * at_once // some
    return hidden.nbytes + max(product_bytes, logits_bytes + draw_bytes)


def run(
    call: Callable[[], object], device: str, segments: Segments | None = None, *, num_rows: int = 0
) -> Ledger:
    """What a call takes without gradient; segments: of its packed row, one a prompt."""
    ledger = EngineLedger(device, segments=segments, num_rows=num_rows)
    with torch.no_grad(), ledger:
        call()
    return ledger


def _decode_inside(ledger: Ledger, args: tuple[Any, ...]) -> Inside:
    """Of one decoding step of a layer."""
    q, prefix_k, _, suffix_k, suffix_v, _, _, suffix_length, _, _, _, window, _, _ = args
    fits = max(q.shape[2], suffix_v.shape[3]) <= LARGEST_HEAD and q.dtype != torch.float64
    num_bytes = workspace_bytes(
        q, prefix_k, suffix_k, suffix_v, suffix_length=suffix_length, window=window,
        implementation="triton" if ledger.device == "cuda" and fits else "torch",
    )  # fmt: skip
    return Inside("attention", num_bytes)


OWN_KERNELS = {**KERNELS, "fastrl::decode_attention": _decode_inside}


def _layout(module: nn.Module, kept: KeyValues) -> Layout:
    _, num_heads, _, key_size = kept.prefix_k.shape
    return Layout(module, num_heads, key_size, kept.prefix_v.shape[3], kept.prefix_k.dtype)


def _shares(num_rows: int, num_prompts: int) -> list[int]:
    """Rows of each prompt: as many each, but for the first ones."""
    least, more = divmod(num_rows, num_prompts)
    return [least + (p < more) for p in range(num_prompts)]
