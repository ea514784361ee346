"""Bytes in tensors while a piece of a program runs, with or without data.

Under a ledger a program runs on tensors on "meta" as it would on a device: nothing is computed, but
every storage is made and freed where it would be. What the program asks its tensors for, which have
no values, is answered as of a step in which every token counts. Operations of our own say what
they take inside (`fastrl.memory.kernels`).
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastrl.memory.timeline import Mark, Pulse, Recording
from fastrl_kernels import Segments

aten = torch.ops.aten


class Inside(NamedTuple):
    """What an operation takes beside its inputs and outputs."""

    part: str  # one of PARTS
    num_bytes: int  # while it runs
    again: Callable[[Any], int] | None = None
    """The same for other work."""
    kept_bytes: int = 0
    """As long as its first output."""


Kernel = Callable[["Ledger", tuple[Any, ...]], Inside]
"""Of the ledger that asks and the operation's arguments."""


class Ledger(TorchDispatchMode):
    """Counts the storages that are made within its block, views once.

    device: "cpu" or "cuda", which tensors on "meta" stand for. num_needed: rows of the last layer
    that trained tokens need, out of `num_tokens`, where the program looks for them. segments: of
    its row, on the CPU. kernels: what operations take inside, by their qualified names.
    """

    def __init__(
        self, device: str = "cpu", *, num_tokens: int | None = None, num_needed: int = 0,
        segments: Segments | None = None, kernels: Mapping[str, Kernel] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.device = device
        self.segments = segments
        if num_tokens is None and segments is not None:
            num_tokens = segments.num_tokens
        self.num_tokens, self.num_needed = num_tokens, num_needed
        self.part = "activations"
        self.recording = Recording(device)
        self.kernels = _kernels() if kernels is None else kernels
        self._alive: dict[int, int] = {}  # storages of this block, by address: their numbers
        self._references: dict[int, Any] = {}

    @property
    def peak(self) -> int:
        """Most bytes at once so far."""
        return self.recording.timeline().peak().total

    @property
    def in_use(self) -> int:
        """Bytes now."""
        return self.recording.in_use

    def tag(self, tensor: Tensor, part: str) -> None:
        """Say what the storage of a tensor is for; one that is not counted here stays so."""
        number = self._alive.get(tensor.untyped_storage()._cdata)
        if number is not None:
            self.recording.parts[number] = part

    @contextmanager
    def as_part(self, part: str) -> Iterator[None]:
        """What is made within the block is for `part`."""
        before, self.part = self.part, part
        try:
            yield
        finally:
            self.part = before

    def pulse(self, part: str, num_bytes: int, again: Callable[[Any], int] | None = None) -> None:
        """Bytes that are taken and given back at once; `again`: as a function of other work."""
        self.recording.pulses.append(Pulse(self.recording.now, part, num_bytes, again))

    def mark(self, name: str) -> None:
        """What comes from here on belongs to `name`."""
        recording = self.recording
        recording.marks.append(Mark(recording.now, len(recording.pulses), name))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # fmt: skip
        kwargs = kwargs or {}
        answer = ANSWERS.get(func)
        if answer is not None:
            found = answer(self, func, args, kwargs)
            if found is not None:
                return self._seen(found)
        if self.device == "cuda" and _is_on_cpu(kwargs.get("device")):
            # Not on the device: neither made nor counted.
            return func(*args, **{**kwargs, "device": torch.device("meta"), "pin_memory": None})
        facts = _facts(func)
        if facts.is_composite:  # which only a ledger inside of another sees whole
            with self:
                return func.decompose(*args, **kwargs)
        kernel = self.kernels.get(func._schema.name)
        inside = None if kernel is None else kernel(self, args)
        if func in MIXING and self.device == "cpu":
            self._add_casts(args, is_in_place=facts.is_alias)
        out = func(*args, **kwargs)
        if not facts.is_alias:
            self._seen(out)
        if inside is not None:
            self._add_inside(inside, out)
        return out

    def _add_inside(self, inside: Inside, out: Any) -> None:
        first = next(leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor))
        number = self._alive[first.untyped_storage()._cdata]
        self.recording.enlarge(number, inside.kept_bytes)
        self.pulse(inside.part, inside.num_bytes, inside.again)

    def _add_casts(self, operands: tuple[Any, ...], *, is_in_place: bool) -> None:
        """On a CPU operands of several dtypes are cast to one of them first, results to theirs."""
        tensors = [x for x in operands if isinstance(x, Tensor) and x.dim()]
        if len({x.dtype for x in tensors}) > 1:
            dtype = functools.reduce(torch.promote_types, (x.dtype for x in tensors))
            missing = sum(x.numel() for x in tensors if x.dtype != dtype)
            if is_in_place and tensors[0].dtype != dtype:
                missing += tensors[0].numel()
            self.pulse(self.part, missing * dtype.itemsize)

    def _seen(self, out: Any) -> Any:
        leaves = (out,) if isinstance(out, Tensor) else tree_leaves(out)
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage())
        return out

    def _add(self, storage: Any) -> None:
        address = storage._cdata
        if address in self._alive:
            return
        number = self.recording.add(storage.nbytes(), self.part)
        self._alive[address] = number

        def remove(_: Any, self: Ledger = self) -> None:
            del self._alive[address], self._references[address]
            self.recording.free(number)

        self._references[address] = weakref.ref(storage, remove)


def _kernels() -> Mapping[str, Kernel]:
    from fastrl.memory.kernels import KERNELS  # which runs some of them under a ledger

    return KERNELS


def inside_of(call: Callable[[], Any]) -> int:
    """Bytes that a call takes on a CPU beside what it returns."""
    with Ledger(kernels={}) as ledger:
        out = call()
        kept = ledger.in_use
    del out
    return ledger.peak - kept


MIXING = {
    form
    for name in ("add", "add_", "sub", "sub_", "mul", "mul_", "div", "div_")
    for form in [getattr(aten, name).Tensor]
}
"""Operations that take operands of several dtypes."""


def _is_on_cpu(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cpu"


class _Facts(NamedTuple):
    """Of an operation."""

    is_alias: bool
    """Whether what it returns is one of its inputs, or a view of it."""
    is_composite: bool
    """Whether it is made of others."""


@functools.cache
def _facts(func: Any) -> _Facts:
    returns = func._schema.returns
    keys = torch._C.DispatchKey
    return _Facts(
        bool(returns) and all(item.alias_info is not None for item in returns),
        func.has_kernel_for_dispatch_key(keys.CompositeImplicitAutograd)
        and not func.has_kernel_for_dispatch_key(keys.CPU),
    )


def _a_number(ledger: Ledger, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Of a tensor without values: finite, true and neither very large nor very small."""
    tensor = args[0]
    if not tensor.is_meta:
        return None
    return True if tensor.dtype == torch.bool else 1.0 if tensor.is_floating_point() else 1


def _distinct(ledger: Ledger, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if not args[0].is_meta:
        return None
    empty = args[0].new_empty(0)
    return args[0].new_empty(ledger.num_needed), empty, empty


def _places(ledger: Ledger, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Of a mask: everywhere, but for the rows of the last layer that no trained token needs."""
    mask = args[0]
    if not mask.is_meta:
        return None
    assert mask.dim() == 1, "only masks of tokens are looked at"
    count = len(mask)
    if count == ledger.num_tokens:
        count -= ledger.num_needed
    return mask.new_empty((count, 1), dtype=torch.int64)


def _grouped(ledger: Ledger, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Products of groups of rows, which "meta" has in bfloat16 alone."""
    left, right = args[:2]
    offsets: Any = args[2] if len(args) > 2 else kwargs.get("offs")
    if not left.is_meta:
        return None
    if left.dim() == right.dim() == 2:
        return left.new_empty(len(offsets), left.shape[0], right.shape[1])
    rows = left.shape[:-1] if right.dim() == 3 else left.shape[1:-1]
    return left.new_empty(*rows, right.shape[-1])


ANSWERS: dict[Any, Callable[..., Any]] = {
    aten._local_scalar_dense.default: _a_number,
    aten.is_nonzero.default: _a_number,
    aten._unique2.default: _distinct,
    aten.nonzero.default: _places,
    aten._grouped_mm.default: _grouped,
}
"""Operations that "meta" does not run, most of them because their results depend on values; None
for a tensor that has values."""
