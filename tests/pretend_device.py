"""A device that holds numbers and refuses those of the CPU, as a GPU would, where there is none.

Its tensors compute on the CPU, under a device of their own. An operation on one of them and one on
the CPU raises, but for copies, single numbers and indices, which a GPU takes too. Nothing has its
memory: what reads it directly, such as writing a checkpoint, does not work. A process that has
imported this file has the device for good, so tests start another one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("pretend")
DEVICE = torch.device("pretend", 0)
aten: Any = torch.ops.aten
INDEXING = (
    aten.index.Tensor, aten.index_put.default, aten.index_put_.default,
    aten._index_put_impl_.default,
)  # fmt: skip
COPIES = (aten._to_copy.default, aten.copy_.default, aten._local_scalar_dense.default)


class Held(Tensor):
    """A tensor on the device, which is `inner` on the CPU."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Held:
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined, no-any-return]
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype, device=DEVICE,
        )  # fmt: skip

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    def __repr__(self) -> str:
        return f"Held({self.inner})"

    def tolist(self) -> Any:
        return self.inner.tolist()

    def new_tensor(self, data: Any, *, dtype: torch.dtype | None = None) -> Tensor:
        return _on_cpu(data, dtype=dtype or self.dtype).to(DEVICE)

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return computed(func, args, kwargs or {})


class Pretending(TorchDispatchMode):
    """Within, the device can be asked for new tensors."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return computed(func, args, kwargs or {})


def computed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What an operation returns, from the CPU, if all of it is in one place."""
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    check(func, args, tensors)
    held = {id(x.inner): x for x in tensors if isinstance(x, Held)}
    place = kwargs.get("device")
    place = None if place is None else torch.device(place)
    if place == DEVICE:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    args, kwargs = tree_map(lambda x: x.inner if isinstance(x, Held) else x, (args, kwargs))
    out = func(*args, **kwargs)
    if func is aten.copy_.default:
        return held.get(id(args[0]), args[0])
    stays = bool(held) if place is None else place == DEVICE

    def returned(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        known = held.get(id(x))  # of an operation in place
        return known if known is not None else Held(x) if stays else x

    return tree_map(returned, out)


def check(func: Any, args: tuple[Any, ...], tensors: list[Tensor]) -> None:
    """Raise RuntimeError where a GPU would: tensors in two places."""
    is_held = [isinstance(x, Held) for x in tensors]
    if not any(is_held) or func in COPIES:
        return
    others = [x for x, there in zip(tensors, is_held, strict=True) if not there and x.dim()]
    if func in INDEXING and is_held[0]:  # indices may be on the CPU, values may not
        others = [x for x in others if not any(x is index for index in args[1])]
    elif func in INDEXING:
        others = [tensors[0]]
    if others:
        shapes = ", ".join(f"{tuple(x.shape)} {x.dtype}" for x in others)
        raise RuntimeError(f"{func}: all tensors must be on one device, but {shapes} on the CPU")


_on_cpu = torch.tensor


def _made(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """torch.tensor and its kind, which ask no mode, for the device too."""

    @functools.wraps(make)
    def made(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        if device is not None and torch.device(device).type == DEVICE.type:
            return make(data, *args, **kwargs).to(DEVICE)
        return make(data, *args, **kwargs, **({} if device is None else {"device": device}))

    return made


torch.tensor, torch.as_tensor = _made(torch.tensor), _made(torch.as_tensor)
torch.__future__.set_swap_module_params_on_conversion(True)  # model.to(...) takes such tensors
torch.pretend.get_amp_supported_dtype = lambda: [torch.bfloat16]  # type: ignore[attr-defined]
