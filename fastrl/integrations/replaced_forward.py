"""Another function in place of a model's `forward`, and the old one back."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any

from fastrl.errors import InputError

PLACE = "_replaced_forward"
"""Attribute of a model with the `ReplacedForward` it has."""


class ReplacedForward:
    """Stands where a model has its bound method `forward`.

    Unlike a method or a closure it is bound to the copy in a copy of the model, and can be pickled
    with it. accelerate, which wraps `forward.__func__`, takes it for a method.
    """

    def __init__(
        self, model: Any, function: Callable[..., Any], extra: tuple[str, ...] = ()
    ) -> None:
        self.__self__ = model
        self.function = function
        self.extra = extra
        self.previous = model.__dict__.get("forward")  # None where the class's own was in use

    @property
    def original(self) -> Callable[..., Any]:
        """What the model would have as `forward`."""
        if self.previous is not None:
            return self.previous
        return MethodType(type(self.__self__).forward, self.__self__)

    @functools.cached_property
    def __signature__(self) -> inspect.Signature:
        """Of the original, with the extra arguments: transformers reads columns off it."""
        known = inspect.signature(self.original)
        own = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
            for name in self.extra
        ]
        rest = list(known.parameters.values())
        place = len(rest) - (rest[-1:] != [] and rest[-1].kind is inspect.Parameter.VAR_KEYWORD)
        return known.replace(parameters=[*rest[:place], *own, *rest[place:]])

    @functools.cached_property
    def __func__(self) -> Callable[..., Any]:
        """As a function of the model, for code that binds it anew."""

        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            return self.__dict__[PLACE](*args, **kwargs)

        signature = self.__signature__
        itself = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        named: Any = forward
        named.__signature__ = signature.replace(parameters=[itself, *signature.parameters.values()])
        named.is_replaced_forward = True
        return forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self.__self__, self.original, *args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        cached = ("__signature__", "__func__")  # made anew: of functions, which cannot be pickled
        return {name: value for name, value in self.__dict__.items() if name not in cached}


def replace_forward(
    model: Any, function: Callable[..., Any], *, extra: tuple[str, ...] = ()
) -> None:
    """Let `model(...)` call `function(model, original, *args, **kwargs)`; original is bound.

    function: of a module or an object of a class, so that the model can still be pickled; it must
    keep neither model nor original, which a copy of the model has others of. extra: keyword
    arguments that the signature gets beside those of the original. Raises InputError where a
    forward was already replaced.
    """
    if PLACE in model.__dict__:
        raise InputError(
            f"the forward of this {type(model).__name__} is already replaced; unfuse it first"
        )
    replaced = ReplacedForward(model, function, extra)
    object.__setattr__(model, PLACE, replaced)
    model.forward = replaced


def restore_forward(model: Any) -> None:
    """Undo `replace_forward`; InputError where it was not called, or others wrapped since."""
    name = type(model).__name__
    replaced = model.__dict__.get(PLACE)
    if replaced is None:
        raise InputError(f"the forward of this {name} is its own; there is nothing to undo")
    now = model.__dict__.get("forward")
    # accelerate leaves a method where it takes its wrapper off.
    if now is not replaced and not hasattr(getattr(now, "__func__", None), "is_replaced_forward"):
        raise InputError(
            f"the forward of this {name} was wrapped once more after it was replaced; undo that "
            "first, for accelerate by accelerator.unwrap_model(model, keep_fp32_wrapper=False)"
        )
    del model.__dict__[PLACE], model.__dict__["forward"]
    if replaced.previous is not None:
        model.forward = replaced.previous


def replaced_function(model: Any) -> Callable[..., Any] | None:
    """What `replace_forward` put in place of this model's forward, if anything."""
    replaced = model.__dict__.get(PLACE)
    return None if replaced is None else replaced.function
