"""Where AdamW keeps its moments: in float32, in 8 bits, or on the CPU.

A store is two functions: what a parameter's state starts as, and a walk over the state that hands
out the moments of a span and, once the caller has changed them in place, puts them back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fastrl_kernels.adamw import Moments
from fastrl_kernels.adamw.blockwise import num_blocks

MomentStore = Literal["float32", "8bit", "cpu"]
State = dict[str, Tensor]


class Piece(NamedTuple):
    """A span of a parameter with its moments on the parameter's device, to be changed in place."""

    span: slice
    moments: Moments


class Store(NamedTuple):
    """How moments are kept."""

    start: Callable[[int, torch.device], State]
    walk: Callable[[State, Sequence[slice], torch.device], Iterator[Piece]]


def spans_of(numel: int, chunk_size: int) -> list[slice]:
    """The elements of a parameter in pieces of at most `chunk_size`."""
    return [slice(i, min(i + chunk_size, numel)) for i in range(0, numel, chunk_size)]


def _start_in_float32(numel: int, device: torch.device) -> State:
    return {name: torch.zeros(numel, device=device) for name in ("exp_avg", "exp_avg_sq")}


def _walk_in_float32(state: State, spans: Sequence[slice], device: torch.device) -> Iterator[Piece]:
    for span in spans:
        yield Piece(span, Moments(state["exp_avg"][span], state["exp_avg_sq"][span]))


def _start_in_8bit(numel: int, device: torch.device) -> State:
    scales = torch.zeros(num_blocks(numel), device=device)
    return {
        "exp_avg_codes": torch.zeros(numel, dtype=torch.int8, device=device),
        "exp_avg_scales": scales,
        "exp_avg_sq_codes": torch.zeros(numel, dtype=torch.uint8, device=device),
        "exp_avg_sq_scales": scales.clone(),
    }


def _walk_in_8bit(state: State, spans: Sequence[slice], device: torch.device) -> Iterator[Piece]:
    for span in spans:
        blocks = slice(num_blocks(span.start), num_blocks(span.stop))
        codes = [state[name][span] for name in ("exp_avg_codes", "exp_avg_sq_codes")]
        scales = [state[name][blocks] for name in ("exp_avg_scales", "exp_avg_sq_scales")]
        yield Piece(span, Moments(*codes, *scales))


def _start_on_cpu(numel: int, device: torch.device) -> State:
    pinned = device.type == "cuda"
    return {name: torch.zeros(numel, pin_memory=pinned) for name in ("exp_avg", "exp_avg_sq")}


def _walk_on_cpu(state: State, spans: Sequence[slice], device: torch.device) -> Iterator[Piece]:
    held = state["exp_avg"], state["exp_avg_sq"]
    if device.type == "cuda":
        yield from _streamed(held, spans, device)
        return
    for span in spans:
        moments = Moments(*(part[span].to(device, copy=True) for part in held))
        yield Piece(span, moments)
        held[0][span].copy_(moments.first)
        held[1][span].copy_(moments.second)


def _streamed(
    held: tuple[Tensor, Tensor], spans: Sequence[slice], device: torch.device
) -> Iterator[Piece]:
    """While a span is computed with, the one before it is stored and the one after it loaded.

    Two buffers take turns, so that what is on the GPU is bounded however far the CPU runs ahead.
    """
    computing = torch.cuda.current_stream(device)
    loading, storing = torch.cuda.Stream(device), torch.cuda.Stream(device)
    longest = max(span.stop - span.start for span in spans)
    buffers = [torch.empty(2, longest, device=device) for _ in spans[:2]]
    loading.wait_stream(computing)  # the buffers' memory may still be in use
    stored: list[torch.cuda.Event | None] = [None, None]
    loaded: list[torch.cuda.Event] = []

    def load(index: int) -> None:
        span, slot = spans[index], index % 2
        free = stored[slot]
        if free is not None:
            loading.wait_event(free)
        with torch.cuda.stream(loading):
            for row, source in enumerate(held):
                part = source[span]
                buffers[slot][row, : len(part)].copy_(part, non_blocking=True)
            loaded.append(loading.record_event())

    load(0)
    for index, span in enumerate(spans):
        if index + 1 < len(spans):
            load(index + 1)
        slot, length = index % 2, span.stop - span.start
        computing.wait_event(loaded[index])
        yield Piece(span, Moments(buffers[slot][0, :length], buffers[slot][1, :length]))
        storing.wait_event(computing.record_event())
        with torch.cuda.stream(storing):
            for row, target in enumerate(held):
                target[span].copy_(buffers[slot][row, :length], non_blocking=True)
            stored[slot] = storing.record_event()
    computing.wait_stream(storing)  # before the buffers, or the moments, are used again


STORES: dict[MomentStore, Store] = {
    "float32": Store(_start_in_float32, _walk_in_float32),
    "8bit": Store(_start_in_8bit, _walk_in_8bit),
    "cpu": Store(_start_on_cpu, _walk_on_cpu),
}
