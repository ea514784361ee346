"""One new token of each of many sequences through a transformers model, as one packed row.

Every layer but attention looks at single tokens, so R sequences of one token each are a row of R
tokens with their own positions; attention is left to whoever holds their keys and values.

Legend: R rows, H heads, Hkv key-value heads, K head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from fastrl.integrations.capabilities import check_model, decoder_of, without_wrappers
from fastrl.integrations.hybrids import mixers_of
from fastrl.integrations.transformers import attention_implementation, refuse_extras

IMPLEMENTATION = "fastrl_decoding"


class Layer(NamedTuple):
    """What a layer asks of attention."""

    module: nn.Module
    scale: float | None
    window: int | None
    softcap: float | None
    sinks: Tensor | None


class KeyValueStore(Protocol):
    """Holds the keys and values of all sequences, layer by layer."""

    def attend(self, layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Append k and v (R, Hkv, K) of the new tokens and attend with q (R, H, K): (R, H, Kv)."""
        ...


_store: ContextVar[KeyValueStore | None] = ContextVar("store", default=None)


def has_state(model: nn.Module) -> bool:
    """Whether some layers keep a state other than keys and values: convolutions, recurrences.

    Raises InputError for a model whose layers mix tokens in a way that is not known here.
    """
    model = without_wrappers(model)
    check_model(model)
    assert isinstance(model, PreTrainedModel)
    return any(mixers_of(module) for module in decoder_of(model).modules())


@contextmanager
def decoding(model: nn.Module, store: KeyValueStore) -> Iterator[None]:
    """Within the block attention of the model is that of `store`; see `decode_inputs`."""
    model = without_wrappers(model)
    assert isinstance(model, PreTrainedModel)
    token = _store.set(store)
    try:
        with attention_implementation(model, IMPLEMENTATION):
            yield
    finally:
        _store.reset(token)


def decode_inputs(input_ids: Tensor, position_ids: Tensor) -> dict[str, Any]:
    """Keyword arguments for the body of a transformers model; (R,) tokens and their positions."""
    return {
        "input_ids": input_ids[None],
        "position_ids": position_ids[None],
        "use_cache": False,
    }


@torch.compiler.disable
def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *,
    scaling: float | None = None, sliding_window: int | None = None, softcap: float | None = None,
    s_aux: Tensor | None = None, **rest: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """query (1, H, R, K), key and value (1, Hkv, R, K), as every transformers layer calls it."""
    store = _store.get()
    assert store is not None, "the implementation is set within `decoding` only"
    refuse_extras(module, attention_mask, rest)
    out = store.attend(
        Layer(module, scaling, sliding_window, softcap, s_aux),
        query[0].transpose(0, 1).to(value.dtype),  # autocast leaves rotated queries in float32
        key[0].transpose(0, 1).to(value.dtype),
        value[0].transpose(0, 1),
    )
    return out[None], None


AttentionInterface.register(IMPLEMENTATION, _attention)
