"""RMSNorm, RoPE and SwiGLU of liger-kernel in the layers of one model.

Only its element-wise kernels: losses are those of fastrl_kernels. Other models in the process stay
as they are.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
from importlib import import_module
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastrl.errors import InputError


class _Norm(NamedTuple):
    """How a model's RMSNorm scales what it has normalised."""

    offset: float  # weights are this much larger than what is stored
    casting_mode: str  # llama: rounds before the scale; gemma: after it


NORMS = {
    "llama": _Norm(0.0, "llama"),
    "mistral": _Norm(0.0, "llama"),
    "qwen2": _Norm(0.0, "llama"),
    "qwen3": _Norm(0.0, "llama"),
    "smollm3": _Norm(0.0, "llama"),
    "gemma": _Norm(1.0, "gemma"),
    "gemma2": _Norm(1.0, "gemma"),
    "gemma3_text": _Norm(1.0, "gemma"),
}
"""By model_type."""
ROTATION = "apply_rotary_pos_emb"


def check_liger(device: torch.device) -> None:
    """Refuse the switch where liger-kernel is missing or cannot run."""
    if importlib.util.find_spec("liger_kernel") is None:
        raise InputError("model.use_liger_kernel needs it; pip install 'fastrl-llm[liger-kernel]'")
    if device.type != "cuda":
        raise InputError(
            f"model.use_liger_kernel runs on a GPU, got model.device {str(device)!r}; remove it"
        )


def use_liger_kernel(model: Any) -> None:
    """Let the layers of this model compute norms, rotations and SiLU products with liger-kernel."""
    config = model.config.get_text_config()
    norm = NORMS.get(config.model_type)
    if norm is None:
        raise InputError(
            f"model.use_liger_kernel knows {', '.join(NORMS)}, got {config.model_type}; remove it"
        )
    for module in model.modules():
        kind: Any = type(module)
        if kind.__name__.endswith("RMSNorm"):
            module.__class__ = _norm_class(kind, norm)
        elif hasattr(module, "q_proj") and ROTATION in _forward_of(kind).__code__.co_names:
            module.__class__ = _attention_class(kind)
        elif _is_swiglu(module):
            module.__class__ = _mlp_class(kind)


def _is_swiglu(module: nn.Module) -> bool:
    has_parts = all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj"))
    act = getattr(module, "act_fn", None)
    return has_parts and type(act).__name__ in ("SiLU", "SiLUActivation")


def _forward_of(kind: type) -> FunctionType:
    return inspect.unwrap(kind.forward)  # type: ignore[attr-defined]


@functools.cache
def _norm_class(kind: type, norm: _Norm) -> type:
    function = import_module("liger_kernel.ops").LigerRMSNormFunction

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        eps = getattr(self, "variance_epsilon", None)
        eps = self.eps if eps is None else eps
        in_place = False  # would overwrite a gradient that the residual stream may still need
        return function.apply(
            hidden_states, self.weight, eps, norm.offset, norm.casting_mode, in_place
        )

    return type(f"Liger{kind.__name__}", (kind,), {"forward": forward})


@functools.cache
def _mlp_class(kind: type) -> type:
    function = import_module("liger_kernel.ops").LigerSiLUMulFunction

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        gate, up = self.gate_proj(hidden_states), self.up_proj(hidden_states)
        return self.down_proj(function.apply(gate, up))

    return type(f"Liger{kind.__name__}", (kind,), {"forward": forward})


@functools.cache
def _attention_class(kind: type) -> type:
    """The class with another function in place of the one that its module calls for rotations."""
    rotate = import_module("liger_kernel.transformers.rope").liger_rotary_pos_emb
    original = _forward_of(kind)
    names = {**original.__globals__, ROTATION: rotate}
    forward = FunctionType(
        original.__code__, names, original.__name__, original.__defaults__, original.__closure__
    )
    forward.__kwdefaults__ = original.__kwdefaults__
    return type(f"Liger{kind.__name__}", (kind,), {"forward": forward})
