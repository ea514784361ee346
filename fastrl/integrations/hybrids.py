"""Layers that mix tokens without attention: short convolutions and gated delta rules.

Such a module of transformers mixes tokens inside of one or two functions of its file. While a plan
is attached, stand-ins take the place of these functions: they follow the segments of the forward
pass under way and leave all else, projections, gates and norms, to the module. A model that runs
without a plan meanwhile, of the same family perhaps, gets the originals through them.

Legend: N packed tokens, D channels, H heads, K head size of queries and keys, Kv of values.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastrl.errors import InputError
from fastrl.integrations.block import current_block
from fastrl_kernels import Segments
from fastrl_kernels.segment_conv import segment_conv
from fastrl_kernels.segment_recurrence import segment_recurrence

CONV, RULE = "causal_conv1d_fn", "torch_chunk_gated_delta_rule"
MIXERS = {
    "Lfm2MoeShortConv": (CONV,),
    "Lfm2ShortConv": (CONV,),
    "Lfm3ShortConv": (CONV,),
    "OlmoHybridGatedDeltaNet": (CONV, RULE),
    "Qwen3NextGatedDeltaNet": (CONV, RULE),
    "Qwen3_5GatedDeltaNet": (CONV, RULE),
    "Qwen3_5MoeGatedDeltaNet": (CONV, RULE),
}
"""Class of a layer -> the functions inside of which it mixes tokens, once each in a forward."""

_lock = threading.Lock()
_num_users: Counter[tuple[int, str]] = Counter()
_originals: dict[tuple[int, str], Callable[..., Any]] = {}


def mixers_of(module: nn.Module) -> tuple[str, ...]:
    """The functions inside of which the module mixes tokens; none for any other module."""
    name = type(module).__name__
    mixers = MIXERS.get(name, ())
    called = inspect.unwrap(type(module).forward).__code__.co_names if mixers else ()
    missing = [mixer for mixer in mixers if mixer not in called]
    if missing:
        raise InputError(
            f"{name} mixes tokens with {', '.join(missing)} in the versions of transformers that "
            "are known here, but not in this one; use transformers 5.17 to 5.23"
        )
    return mixers


def calls_of_mixers(model: nn.Module) -> Counter[str]:
    """How often each of these functions is called in one forward pass."""
    return Counter(mixer for module in model.modules() for mixer in mixers_of(module))


@contextmanager
def mixers_along_paths(model: nn.Module) -> Iterator[None]:
    """Within the block the functions in which the model's layers mix tokens follow the segments."""
    places = {
        (id(namespace), mixer): namespace
        for module in model.modules()
        for mixer in mixers_of(module)
        for namespace in [inspect.unwrap(type(module).forward).__globals__]
    }
    with _lock:
        for place, namespace in places.items():
            _, mixer = place
            if not _num_users[place]:
                _originals[place] = namespace[mixer]
                namespace[mixer] = _stand_in(mixer, namespace[mixer])
            _num_users[place] += 1
    try:
        yield
    finally:
        with _lock:
            for place, namespace in places.items():
                _, mixer = place
                _num_users[place] -= 1
                if not _num_users[place]:
                    namespace[mixer] = _originals.pop(place)


@functools.cache  # the same object every time, or torch.compile would compile every time
def _stand_in(mixer: str, original: Callable[..., Any]) -> Callable[..., Any]:
    along_paths: Callable[..., Any] = _conv_along_paths if mixer == CONV else _rule_along_paths

    @torch.compiler.disable  # segments differ from row to row, and each would be compiled anew
    @functools.wraps(original)
    def stand_in(*args: Any, **kwargs: Any) -> Any:
        block = current_block.get()
        if block is None or block.segments is None:
            return original(*args, **kwargs)
        block.mixer_calls[mixer] += 1
        return along_paths(original, block.segments, *args, **kwargs)

    return stand_in


def _conv_along_paths(
    original: Callable[..., Tensor], segments: Segments, /, hidden_states: Tensor, weight: Tensor,
    bias: Tensor | None = None, activation: str | None = None, **rest: Any,
) -> Tensor:  # fmt: skip
    """hidden_states (1, D, N) and weight (D, kernel size), as every layer passes them."""
    _check_call(CONV, hidden_states, rest)

    def conv(rows: Tensor) -> Tensor:
        return original(rows.T[None], weight, bias, activation=activation)[0].T

    out = segment_conv(hidden_states[0].T, conv, segments, kernel_size=weight.shape[1])
    return out.T[None]


def _rule_along_paths(
    original: Callable[..., tuple[Tensor, Tensor]], segments: Segments, /,
    query: Tensor, key: Tensor, value: Tensor, *, g: Tensor, beta: Tensor,
    initial_state: Tensor | None = None, use_qk_l2norm_in_kernel: bool = False, **rest: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """query, key (1, N, H, K), value (1, N, H, Kv), g and beta (1, N, H).

    The states (H, K, Kv) of the prompts stay inside; they are float32 for inputs of any dtype.
    """
    _check_call(RULE, query, {**rest, "initial_state": initial_state})

    def rule(inputs: Sequence[Tensor], state: Tensor | None) -> tuple[Tensor, Tensor]:
        query, key, value, g, beta = inputs  # zeros of padding: no decay, nothing written
        return original(
            query, key, value, g=g, beta=beta, initial_state=state, output_final_state=True,
            use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        )  # fmt: skip

    inputs = [x[0] for x in (query, key, value, g, beta)]
    return segment_recurrence(inputs, rule, segments)[None], None


def _check_call(mixer: str, row: Tensor, rest: dict[str, Any]) -> None:
    if len(row) != 1:
        raise InputError(
            f"expected one packed row, got a batch of {len(row)}; call the model with "
            "**plan.inputs alone"
        )
    tensors = sorted(what for what, given in rest.items() if isinstance(given, Tensor))
    if tensors:
        raise InputError(
            f"{mixer} was called with {', '.join(tensors)}, which a plan replaces; call the model "
            "with **plan.inputs alone"
        )
