"""What gradient checkpointing keeps, in the memory of the CPU.

A checkpointed layer keeps its input until backward. Here the input leaves for pinned memory while
the next layers run, on a stream of its own, and comes back while the layer above runs backward.

Legend: N packed tokens, D hidden.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from transformers import PreTrainedModel

from fastrl.errors import InputError

MAX_LEAVING = 2
"""Inputs whose copies may be under way while their memory on the GPU is still held."""


class Kept:
    """A tensor on its way to the CPU and back."""

    def __init__(self, tensor: Tensor, transfers: Transfers, previous: Kept | None) -> None:
        self.transfers = transfers
        self.previous = None if previous is None else weakref.ref(previous)
        self.device = tensor.device
        self.on_device: Tensor | None = tensor
        self.on_cpu = torch.empty_like(
            tensor, device="cpu", memory_format=torch.contiguous_format,
            pin_memory=transfers.stream is not None,
        )  # fmt: skip
        self.arrived = transfers.copy(self.on_cpu, tensor)

    def leave(self) -> None:
        """Let go of the memory on the device, once the copy is made."""
        self.transfers.wait(self.arrived)
        self.on_device = None

    def come_back(self) -> None:
        """Begin to copy the tensor to the device, if it is not there."""
        if self.on_device is None:
            self.on_device = torch.empty_like(self.on_cpu, device=self.device)
            self.arrived = self.transfers.copy(self.on_device, self.on_cpu)

    def taken(self) -> Tensor:
        """The tensor on its device; the one that is needed next begins to come back."""
        self.come_back()
        assert self.on_device is not None
        self.transfers.wait(self.arrived)
        tensor, self.on_device = self.on_device, None
        previous = None if self.previous is None else self.previous()
        if previous is not None:
            previous.come_back()
        return tensor


class Transfers:
    """Copies beside the computation; on a CPU, where there are no streams, in line with it."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.leaving: deque[weakref.ref[Kept]] = deque()
        self.last: weakref.ref[Kept] | None = None

    def keep(self, tensor: Tensor, *, is_first: bool) -> Kept:
        """Begin to bring a tensor to the CPU; is_first: of a forward pass."""
        previous = None if is_first or self.last is None else self.last()
        kept = Kept(tensor, self, previous)
        self.last = weakref.ref(kept)
        self.leaving.append(self.last)
        while len(self.leaving) > MAX_LEAVING:
            oldest = self.leaving.popleft()()
            if oldest is not None:
                oldest.leave()
        return kept

    def copy(self, target: Tensor, source: Tensor) -> Any:
        """target <- source behind all that the computation has begun; what to wait for."""
        if self.stream is None:
            target.copy_(source)
            return None
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        with self._in_stream():
            target.copy_(source, non_blocking=True)
        return self.stream.record_event()

    def wait(self, event: Any) -> None:
        """Let the computation wait for a copy; the CPU goes on."""
        if self.stream is not None:
            torch.cuda.current_stream(self.stream.device).wait_event(event)

    def _in_stream(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.stream is None else torch.cuda.stream(self.stream)


class _Checkpoint:
    """The checkpointing function of one layer, whose input goes to the CPU meanwhile."""

    def __init__(self, inner: Callable[..., Any], transfers: Transfers, *, is_first: bool) -> None:
        self.inner, self.transfers, self.is_first = inner, transfers, is_first

    def __deepcopy__(self, memo: dict[int, Any]) -> _Checkpoint:
        """A copy of the model is a reference, which runs without gradient and keeps nothing."""
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with saved_tensors_hooks(self._pack, self._unpack):
            return self.inner(*args, **kwargs)

    def _pack(self, tensor: Tensor) -> Tensor | Kept:
        """What is inside of the layer has hooks of its own: these see what it is called with."""
        if tensor.dim() < 2 or not tensor.is_floating_point():
            return tensor
        return self.transfers.keep(tensor, is_first=self.is_first)

    def _unpack(self, packed: Tensor | Kept) -> Tensor:
        return packed.taken() if isinstance(packed, Kept) else packed


def offload_checkpoints(model: PreTrainedModel, device: torch.device) -> None:
    """Keep the inputs of checkpointed layers on the CPU until backward, from now on."""
    layers: list[Any] = [
        module for module in model.modules() if getattr(module, "gradient_checkpointing", False)
        and hasattr(module, "_gradient_checkpointing_func")
    ]  # fmt: skip
    if not layers:
        raise InputError(
            f"{type(model).__name__} has no layers with gradient checkpointing, whose inputs could "
            "be kept on the CPU; remove model.activation_offloading"
        )
    transfers = Transfers(device)
    for index, layer in enumerate(layers):
        inner = layer._gradient_checkpointing_func
        layer._gradient_checkpointing_func = _Checkpoint(inner, transfers, is_first=index == 0)
