"""Attention of one new token a row, P prompts of L tokens with G rows of S own tokens each.

Ours read a prompt's keys and values once for its G rows. The others attend over R = P * G rows of
L + S tokens, whose copies of the prompt are there already: what it takes to make them, and to keep
them, is not counted. H heads, Hkv key-value heads, K head size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from cases import Loaders, Prepared
from implementations import load
from measure import Step
from peers import require_cuda
from reference import Errors
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


@dataclass(frozen=True)
class Batch:
    """What a case is large in."""

    num_prompts: int
    num_generations: int
    prompt: int
    completion: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    dtype: torch.dtype
    device: str

    def __str__(self) -> str:
        """As a case is named."""
        return (
            f"P={self.num_prompts} G={self.num_generations} L={self.prompt} S={self.completion} "
            f"H={self.num_heads} Hkv={self.num_kv_heads} K={self.head_size} "
            f"{str(self.dtype).removeprefix('torch.')}"
        )

    @property
    def num_rows(self) -> int:
        """R."""
        return self.num_prompts * self.num_generations


@dataclass(frozen=True)
class DecodeCase:
    """One step of one layer."""

    shape: Batch

    def __str__(self) -> str:
        """Name of the case in the results."""
        return f"decode_attention {self.shape}"


class Inputs(NamedTuple):
    """Random normal; the suffixes have room for twice their tokens, NaN where there are none."""

    q: Tensor  # (R, H, K)
    prefix_k: Tensor  # (P, Hkv, L, K)
    prefix_v: Tensor
    suffix_k: Tensor  # (R, Hkv, 2 S, K)
    suffix_v: Tensor


Decode = Callable[[Inputs, Batch], Step]
"""What is timed, made from the inputs: a step that returns (R, H, K)."""


def prepare(case: DecodeCase, only: str | None = None, kept: set[str] | None = None) -> Prepared:
    """Inputs and steps of a case: of all implementations, of those kept or of the one named."""
    batch = case.shape
    inputs = make_inputs(batch)
    loaders = decode_loaders()
    if kept is not None:
        loaders = {name: loader for name, loader in loaders.items() if name in kept}
    if only is not None:
        loaders = {only: loaders[only]}
    functions = load(loaders, batch.device).functions
    truth = functools.cache(lambda: fastrl_step(Inputs(*(x.double() for x in inputs)), batch)())
    own = inputs.suffix_k[:, :, : batch.completion]
    num_bytes = 2 * (inputs.q.nbytes + inputs.prefix_k.nbytes + own.nbytes)
    num_tokens = batch.num_rows * (batch.prompt + batch.completion)
    return Prepared(
        steps={name: make_step(inputs, batch) for name, make_step in functions.items()},
        leaves=tuple(inputs),
        check=lambda out: compare(out, truth()),
        make_floor=lambda: one_sum(num_bytes, batch),
        floor_name="one sum of as many bytes as the keys and values have",
        flops=4.0 * num_tokens * batch.num_heads * batch.head_size,
        num_bytes=num_bytes,
        formulas="flops = 4 R (L + S) H K; bytes = 2 (R H + P Hkv L + R Hkv S) K e: queries in, "
        "outputs out, keys and values of each prompt once",
    )


def make_inputs(batch: Batch, *, seed: int = 0) -> Inputs:
    """One seed, one input."""
    random = torch.Generator(batch.device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        values = torch.randn(*size, batch.head_size, generator=random, device=batch.device)
        return values.to(batch.dtype)

    prefix = (batch.num_prompts, batch.num_kv_heads, batch.prompt)
    suffix = (batch.num_rows, batch.num_kv_heads, 2 * batch.completion)
    inputs = Inputs(
        normal(batch.num_rows, batch.num_heads), normal(*prefix), normal(*prefix), normal(*suffix),
        normal(*suffix),
    )  # fmt: skip
    for x in inputs[3:]:
        x[:, :, batch.completion :] = torch.nan
    return inputs


def compare(out: Tensor, truth: Tensor) -> Errors:
    """||error|| / ||truth||, as that of a gradient, which may round as much as these outputs."""
    return Errors(hidden_grad=float((out.double() - truth).norm() / truth.norm()))


def one_sum(num_bytes: int, batch: Batch) -> Step:
    """Reads once as many bytes as the keys and values take, each prompt's once."""
    values = torch.ones(num_bytes // 4, device=batch.device)
    return lambda: values.sum()


def fastrl_step(inputs: Inputs, batch: Batch, *, implementation: str = "auto") -> Step:
    """`fastrl_kernels.decode_attention`."""
    from fastrl_kernels import decode_attention

    prompts = torch.arange(batch.num_prompts, dtype=torch.int32, device=batch.device)
    return functools.partial(
        decode_attention,
        *inputs,
        row_groups=prompts.repeat_interleave(batch.num_generations),
        prefix_lengths=torch.full_like(prompts, batch.prompt),
        suffix_length=batch.completion,
        implementation=implementation,
    )


def repeated(inputs: Inputs, batch: Batch) -> tuple[Tensor, Tensor]:
    """Keys and values (R, Hkv, L + S, K) of every row."""
    pairs = ((inputs.prefix_k, inputs.suffix_k), (inputs.prefix_v, inputs.suffix_v))
    keys, values = (
        torch.cat(
            [prefix.repeat_interleave(batch.num_generations, 0), own[:, :, : batch.completion]], 2
        )
        for prefix, own in pairs
    )
    return keys, values


def sdpa_step(inputs: Inputs, batch: Batch) -> Step:
    """PyTorch's attention over whole rows."""
    keys, values = repeated(inputs, batch)
    q = inputs.q[:, :, None]

    def step() -> Tensor:
        return scaled_dot_product_attention(q, keys, values, enable_gqa=True)[:, :, 0]

    return step


def load_flash(device: str) -> Decode:
    """The decoding kernel of the package flash-attn over whole rows."""
    require_cuda(device)
    from flash_attn import flash_attn_with_kvcache

    def make_step(inputs: Inputs, batch: Batch) -> Step:
        keys, values = (x.transpose(1, 2).contiguous() for x in repeated(inputs, batch))
        q = inputs.q[:, None]
        lengths = torch.full((batch.num_rows,), keys.shape[1], dtype=torch.int32, device=q.device)
        return lambda: flash_attn_with_kvcache(q, keys, values, cache_seqlens=lengths)[:, 0]

    return make_step


def decode_loaders() -> Loaders:
    """All implementations."""
    by_products = functools.partial(fastrl_step, implementation="torch")
    return {
        "fastrl decode_attention": lambda device: fastrl_step,
        "fastrl decode_attention torch": lambda device: by_products,
        "sdpa, repeated rows": lambda device: sdpa_step,
        "flash_attn, repeated rows": load_flash,
    }
