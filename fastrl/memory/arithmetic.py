"""Autocast for tensors on "meta", which have none: the same casts, and the same copies kept.

Within `torch.autocast("cpu")` a `Casts` mode rounds the operands of matrix products as autocast
does on the devices. A float32 weight that is trained is rounded once: autocast keeps the copy until
its block ends. In the backward pass there are no such modes, so layers that are computed again
begin one of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

ROUNDED: frozenset[Any] = frozenset({
    torch.nn.functional.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__,
    Tensor.__rmatmul__, torch.bmm, Tensor.bmm, torch.mm, Tensor.mm, torch.addmm, Tensor.addmm,
    torch.baddbmm, Tensor.baddbmm, torch.addbmm, Tensor.addbmm, torch.einsum, torch.conv1d,
    torch.nn.functional.scaled_dot_product_attention,
})  # fmt: skip
"""Operations that autocast runs in bfloat16."""

_copies: ContextVar[dict[Tensor, Tensor] | None] = ContextVar("copies", default=None)


class Casts(TorchFunctionMode):
    """Rounds what autocast would, wherever `torch.autocast("cpu")` is on."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # fmt: skip
        kwargs = kwargs or {}
        if func in ROUNDED and torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map(_rounded, (args, kwargs))
        return func(*args, **kwargs)


def _rounded(value: Any) -> Any:
    if not isinstance(value, Tensor) or not value.is_meta or value.dtype != torch.float32:
        return value
    copies = _copies.get()
    if copies is None or not (value.is_leaf and value.requires_grad):
        return value.to(torch.bfloat16)
    if value not in copies:
        copies[value] = value.to(torch.bfloat16)
    return copies[value]


@contextmanager
def casts_in(*models: nn.Module) -> Iterator[None]:
    """Within the block layers of the models round wherever they run, in the backward pass too."""
    modes: list[Casts] = []

    def begin(*_: Any) -> None:
        modes.append(Casts())
        modes[-1].__enter__()

    def end(*_: Any) -> None:
        modes.pop().__exit__(None, None, None)

    hooks = [
        hook
        for module in {module for model in models for module in model.modules()}
        if type(module).__name__ == "Conv1D"  # of transformers
        or isinstance(module, nn.Linear)
        or hasattr(module, "gradient_checkpointing")
        for hook in (
            module.register_forward_pre_hook(begin),
            module.register_forward_hook(end, always_call=True),
        )
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def autocast() -> Iterator[None]:
    """What `torch.autocast(device, torch.bfloat16)` is to a device, for tensors on "meta"."""
    if _copies.get() is not None:  # the copies live as long as the outermost block
        yield
        return
    token = _copies.set({})
    try:
        with Casts(), torch.autocast("cpu", torch.bfloat16):
            yield
    finally:
        _copies.reset(token)
