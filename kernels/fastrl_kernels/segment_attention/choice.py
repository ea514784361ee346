"""Which implementation computes segment attention, why, and what stands in the way of the others.

A choice depends on shapes, dtype, device and installed packages, never on time, free memory or
values. So forward and backward agree, and so do the old and the new log-probabilities of one plan.

N packed tokens, H heads, Hkv key-value heads, K head size of queries and keys, Kv of values.
"""

import importlib.util
from typing import NamedTuple

import torch
from torch import Tensor

from fastrl_kernels.implementation import capability_of, interprets_triton
from fastrl_kernels.products import HALF
from fastrl_kernels.segment_attention.flash import HAS_FLASH_ATTN

HAS_TRITON = importlib.util.find_spec("triton") is not None
IMPLEMENTATIONS = ("torch", "triton", "sdpa", "flex", "varlen")

MASK_BYTES = 2 * 2**30
"""The most that the mask may take on a GPU; a bound from bytes (16384 tokens in float32 take
1.25 GiB), not measured."""


SMALL_GPUS = ((8, 6), (8, 9), (12, 0), (12, 1))
"""Capabilities with too little shared memory for PyTorch's flash attention of wide heads."""


class Machine(NamedTuple):
    """Where attention runs, and what is installed there."""

    device: str
    """Type of the device: cuda, cpu, ..."""
    capability: tuple[int, int] | None
    """Of an NVIDIA GPU."""
    has_triton: bool
    has_flash_attn: bool


class Facts(NamedTuple):
    """All that a choice depends on."""

    machine: Machine
    dtype: torch.dtype
    num_tokens: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    value_size: int
    window: int | None = None
    has_softcap: bool = False
    has_sinks: bool = False

    @property
    def widest_head(self) -> int:
        return max(self.head_size, self.value_size)


class Choice(NamedTuple):
    name: str
    """One of IMPLEMENTATIONS."""
    reason: str


def machine_of(device: torch.device) -> Machine:
    """This machine, for tensors on that device."""
    capability = capability_of(device) if device.type == "cuda" else None
    return Machine(device.type, capability, HAS_TRITON, HAS_FLASH_ATTN)


def facts_of(q: Tensor, v: Tensor, window: int | None, has_softcap: bool, has_sinks: bool) -> Facts:
    """The facts about these queries (N, H, K) and values (N, Hkv, Kv)."""
    return Facts(
        machine_of(q.device), q.dtype, q.shape[0], q.shape[1], v.shape[1],
        q.shape[2], v.shape[2], window, has_softcap, has_sinks,
    )  # fmt: skip


def choose_attention(facts: Facts) -> Choice:
    """What `implementation="auto"` runs."""
    if facts.machine.device != "cuda":
        return Choice("torch", "one path at a time, cost and memory follow the visible pairs")
    if facts.dtype == torch.float64:
        return Choice("torch", "there are no kernels for float64")
    obstacle = obstacle_to("triton", facts)
    if obstacle is None:
        return Choice("triton", "one kernel for all segments, nothing hidden is computed")
    return _without_kernels(facts, obstacle)


def _without_kernels(facts: Facts, obstacle: str) -> Choice:
    """On a GPU, the first that can, by the work that each does: only what is visible in a few
    launches; all N^2 pairs; dozens of launches for each tile."""
    if obstacle_to("varlen", facts) is None and facts.window is None:
        return Choice("varlen", f"{obstacle}; flash attention, a call for each level")
    num_bytes = mask_bytes(facts)
    if obstacle_to("sdpa", facts) is None and num_bytes <= MASK_BYTES:
        needed = f"{num_bytes / 2**30:.2g} of at most {MASK_BYTES / 2**30:.2g} GiB"
        return Choice("sdpa", f"{obstacle}; all pairs through a mask, {needed}")
    return Choice("torch", f"{obstacle}; one path at a time, slow but small")


def mask_bytes(facts: Facts) -> int:
    """Of the (N, N) mask on a GPU, once as bool and once as numbers to add, and of keys and values
    repeated for every head."""
    itemsize = facts.dtype.itemsize
    repeated = 0
    if facts.num_heads != facts.num_kv_heads:
        repeated = facts.num_heads * (facts.head_size + facts.value_size) * itemsize
    return facts.num_tokens * (facts.num_tokens * (1 + itemsize) + repeated)


def obstacle_to(name: str, facts: Facts) -> str | None:
    """Why the implementation cannot compute this, None if it can."""
    checks = {
        "triton": _obstacle_to_triton,
        "sdpa": _obstacle_to_sdpa,
        "flex": _obstacle_to_flex,
        "varlen": _obstacle_to_varlen,
    }
    return checks[name](facts) if name in checks else None


def _obstacle_to_triton(facts: Facts) -> str | None:
    if not facts.machine.has_triton:
        return "triton is not installed"
    if facts.dtype == torch.float64:
        return "there are no kernels for float64"
    if facts.machine.device != "cuda" and not interprets_triton():
        return f"the tensors are on {facts.machine.device} and the interpreter is off"
    if facts.widest_head > 256:
        return "the kernels take heads of at most 256"
    return None


def _obstacle_to_sdpa(facts: Facts) -> str | None:
    if facts.has_softcap or facts.has_sinks:
        return "PyTorch's attention has no softcap and no sinks"
    return None


def _obstacle_to_flex(facts: Facts) -> str | None:
    if facts.machine.device == "cpu":
        return None  # gradients are refused where they are asked for
    if facts.machine.device != "cuda":
        return f"FlexAttention runs on GPUs and CPUs, the tensors are on {facts.machine.device}"
    if not facts.machine.has_triton:
        return "FlexAttention is compiled by triton, which is not installed"
    if facts.dtype == torch.float64:
        return "there are no kernels for float64"
    if min(facts.head_size, facts.value_size) < 16 or facts.widest_head > 256:
        return "compiled FlexAttention takes heads of 16 to 256"
    return None


def _obstacle_to_varlen(facts: Facts) -> str | None:
    if facts.machine.device != "cuda":
        return None  # plain PyTorch takes everything
    if facts.dtype not in HALF:
        return f"flash attention takes float16 and bfloat16, not {_name(facts.dtype)}"
    if facts.machine.capability is not None and facts.machine.capability < (8, 0):
        return "flash attention needs an NVIDIA GPU of compute capability 8.0"
    if facts.head_size != facts.value_size or facts.head_size % 8 or facts.head_size > 256:
        return (
            "flash attention takes keys and values of one head size, a multiple of 8 up to 256, "
            f"not {facts.head_size} and {facts.value_size}"
        )
    if facts.machine.has_flash_attn:
        return None
    if facts.has_softcap:
        return "softcap takes the package flash-attn, which is not installed"
    if facts.head_size > 192 and facts.machine.capability in SMALL_GPUS:
        return "PyTorch's flash attention has no gradients for heads above 192 on this GPU"
    return None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
