"""The last layer on the rows that trained tokens need, and on the others keys and values alone.

What no trained token is predicted from is read by the last layer through its keys and values only:
its query, its output projection and its MLP change nothing. So the layer runs twice, first on the
rows that are not needed, until attention is reached with their keys and values, then on the
others.

Legend: N packed tokens, H heads, Hkv key-value heads, K head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

MIN_SAVED = 0.05
"""Share of the rows below which running the layer twice costs more than it saves."""


class _KeysKnown(Exception):
    """The rows that are not needed have reached attention."""


@dataclass
class Rows:
    """One run of the last layer: which rows it is on, and the keys and values it has left."""

    needed: Tensor  # int64, ascending
    others: Tensor  # int64, ascending
    places: Tensor  # (N,) int64: where each row is among the others, then the needed ones
    keys: Tensor | None = None  # (1, Hkv, len(others), K), as the layer gives them to attention
    values: Tensor | None = None

    def all_rows(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of the needed rows among zeros, keys and values of all; (1, heads, N, size).

        In the layer's first run there is nothing to attend with yet: it ends here.
        """
        if self.keys is None or self.values is None:
            self.keys, self.values = k, v
            raise _KeysKnown
        zeros = q.new_zeros(1, q.shape[1], len(self.places), q.shape[3])
        return (
            zeros.index_copy(2, self.needed, q),
            torch.cat([self.keys, k], 2)[:, :, self.places],
            torch.cat([self.values, v], 2)[:, :, self.places],
        )


_rows: ContextVar[Rows | None] = ContextVar("rows", default=None)


def rows_of_last_layer() -> Rows | None:
    """The run of the last layer that attention is called from, if it is one of those."""
    return _rows.get()


class _LastLayer(nn.Module):
    """Takes the place of a model's last layer for one block."""

    def __init__(self, layer: Any, needed: Tensor, num_tokens: int) -> None:
        super().__init__()
        self.layer, self.training = layer, layer.training
        is_other = torch.ones(num_tokens, dtype=torch.bool, device=needed.device)
        is_other[needed] = False
        self.needed, self.others = needed, is_other.nonzero()[:, 0]
        self.places = torch.cat([self.others, needed]).argsort()

    def __getattr__(self, name: str) -> Any:
        """Of the layer: models ask theirs what kind of attention they do."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)

    @torch.compiler.disable  # leaving a layer by an exception cannot be compiled
    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Hidden states (1, N, D) with zeros in the rows that are not needed."""
        inputs = _Inputs(hidden_states, args, kwargs)
        if not (self.layer.gradient_checkpointing and self.training):
            return self._run(inputs)
        return self.layer._gradient_checkpointing_func(
            lambda states: self._run(inputs._replace(hidden_states=states)), hidden_states
        )

    def _run(self, inputs: _Inputs) -> Any:
        """Both runs, inside of one checkpoint where there are any."""
        checkpoints = self.layer.gradient_checkpointing
        self.layer.gradient_checkpointing = False
        rows = Rows(self.needed, self.others, self.places)
        token = _rows.set(rows)
        try:
            self._find_keys(inputs)
            out = self._call(inputs, self.needed)
        finally:
            _rows.reset(token)
            self.layer.gradient_checkpointing = checkpoints
        states = out[0] if isinstance(out, tuple) else out
        states = torch.zeros_like(inputs.hidden_states, dtype=states.dtype).index_copy(
            1, self.needed, states
        )
        return (states, *out[1:]) if isinstance(out, tuple) else states

    def _find_keys(self, inputs: _Inputs) -> None:
        try:
            self._call(inputs, self.others)
        except _KeysKnown:
            return
        raise RuntimeError(f"{type(self.layer).__name__} ended without attention")

    def _call(self, inputs: _Inputs, rows: Tensor) -> Any:
        num_tokens = inputs.hidden_states.shape[1]
        hidden_states, args, kwargs = _take(tuple(inputs), rows, num_tokens)
        return self.layer(hidden_states, *args, **kwargs)


class _Inputs(NamedTuple):
    """What a model calls its layer with."""

    hidden_states: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def _take(value: Any, rows: Tensor, num_tokens: int) -> Any:
    """Some rows of every tensor of N rows, wherever it hides among a layer's arguments."""
    if isinstance(value, tuple | list):
        return type(value)(_take(item, rows, num_tokens) for item in value)
    if isinstance(value, dict):
        return {key: _take(item, rows, num_tokens) for key, item in value.items()}
    if isinstance(value, Tensor) and value.dim() > 1 and value.shape[:2] == (1, num_tokens):
        return value[:, rows]
    return value


def can_skip_rows(decoder: nn.Module) -> bool:
    """Whether the last layer reads other rows through the keys and values of one attention only.

    Not where it has a convolution or a state, borrows the keys of another layer, or is not the
    last thing before the norm.
    """
    layers = getattr(decoder, "layers", None)
    config: Any = decoder.config
    if not isinstance(layers, nn.ModuleList) or len(layers) != config.num_hidden_layers:
        return False
    if getattr(config, "num_kv_shared_layers", None):
        return False
    kinds = getattr(config, "layer_types", None)
    attends = kinds is None or kinds[-1] in ("full_attention", "sliding_attention")
    return attends and hasattr(layers[-1], "self_attn")


@contextmanager
def last_layer_on_rows(decoder: nn.Module, needed: Tensor, num_tokens: int) -> Iterator[None]:
    """Within the block the last of the decoder's layers computes the needed rows, where it can.

    needed: int64, ascending and distinct, out of `num_tokens`. The decoder gives zeros elsewhere.
    """
    if len(needed) > (1 - MIN_SAVED) * num_tokens or not can_skip_rows(decoder):
        yield
        return
    layers: Any = decoder.layers
    layer = layers[-1]
    layers[-1] = _LastLayer(layer, needed, num_tokens)
    try:
        yield
    finally:
        layers[-1] = layer
