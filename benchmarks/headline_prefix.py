"""A group's prompt encoded once: are gradients the same, and what does it cost?

Forward and backward of the model of bench_shared_prefix.py with its head and loss, on one group. A
seed has tokens of its own. Gradients are compared in float64 with those of one sequence after the
other, on the small model; time, of one core, and memory beyond the inputs are of the large one, in
float32. The PrefixGrouper package takes part where it is installed, wrapped around PyTorch's
attention in every layer.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from bench_shared_prefix import (
    OURS,
    STATES,
    Case,
    Group,
    Work,
    make_groups,
    make_trained,
    padded_states,
    plan_of,
    row_states,
    shared_states,
)
from measure import count_big_blocks, high_water_mark, reset_high_water_mark
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, Qwen3RotaryEmbedding

from fastrl.integrations.transformers import attention_implementation

PACKAGE = "prefix_grouper"
ATTENTION = "benchmarked_prefix_grouper"


class Shape(NamedTuple):
    """A prompt of P tokens with G completions of R tokens."""

    prompt_length: int
    num_generations: int
    completion_length: int = 32

    def __str__(self) -> str:
        return f"P={self.prompt_length} G={self.num_generations} R={self.completion_length}"


SHAPES = (Shape(64, 8), Shape(128, 8), Shape(256, 8), Shape(128, 2), Shape(128, 4), Shape(128, 16))
States = Callable[[Any, list[Group]], Iterator[tuple[Tensor, slice]]]


def grouper_states(model: Any, groups: list[Group]) -> Iterator[tuple[Tensor, slice]]:
    """Hidden states of the trained tokens, from our row with attention by the package."""
    from prefix_grouper import PrefixGrouper

    plan = plan_of(groups)
    info = [[len(g.prompt), *(len(c) - 1 for c in g.completions)] for g in groups]
    with attention_by(model, PrefixGrouper(info)):
        hidden = model.model(
            input_ids=plan.inputs["input_ids"], position_ids=plan.inputs["position_ids"],
            use_cache=False,
        ).last_hidden_state[0]  # fmt: skip
    yield hidden[plan.source_index], slice(0, len(plan.target_ids))


@contextmanager
def attention_by(model: Any, grouper: Any) -> Iterator[None]:
    """Every layer's attention through the package while the model runs forward."""
    from transformers import AttentionInterface

    def causal(q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
        hidden = causal_lower_right(q.shape[2], k.shape[2])
        out = scaled_dot_product_attention(q, k, v, attn_mask=hidden, enable_gqa=True)
        return out.transpose(1, 2)

    def attention(
        module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **_: Any
    ) -> tuple[Tensor, None]:
        return grouper.forward(causal, q, k, v), None

    AttentionInterface.register(ATTENTION, attention)
    with attention_implementation(model, ATTENTION):
        yield


def ways() -> dict[str, States]:
    """By name; the package's only where it is installed."""
    found: dict[str, States] = {
        f"{OURS} shared prefix": shared_states, "padded rows": padded_states,
    }  # fmt: skip
    if importlib.util.find_spec(PACKAGE) is not None:
        found["PrefixGrouper"] = grouper_states
    return found


def prefix_cost(shape: Shape, seed: int, quick: bool = False) -> dict[str, Any]:
    """Error of gradients, seconds and bytes of each way."""
    torch.set_num_threads(1)
    found = ways()
    errors = gradient_errors(shape, seed, list(found))
    work = work_of(shape, seed, quick, torch.float32)
    groups, trained = work.groups, work.trained
    small = make_groups(Case(1, 16, 4, 2), work.model.config.vocab_size)
    rows = {}
    for name in found:
        work.groups, work.trained = small, make_trained(small, work.model)
        work.backward(name)
        work.groups, work.trained = groups, trained
        began = time.process_time()
        work.backward(name)
        rows[name] = {"error": errors[name], "seconds": time.process_time() - began}
    count_big_blocks()
    for name in found:
        before = reset_high_water_mark()  # gradients are there, and are added to
        work.backward(name)
        rows[name]["peak_bytes"] = high_water_mark() - before
    return {"shape": str(shape), **shape._asdict(), "seed": seed, "ways": rows}


def gradient_errors(shape: Shape, seed: int, names: list[str]) -> dict[str, float]:
    """Largest error of a float64 gradient, relative to the largest value of its tensor."""
    STATES.update(ways())  # what Work looks names up in
    STATES["one row per sequence"] = row_states
    work = work_of(shape, seed, True, torch.float64)
    found = {}
    with all_in_float64():
        truth = work.gradients("one row per sequence")
        for name in names:
            pairs = zip(work.gradients(name), truth, strict=True)
            found[name] = max(float((x - y).abs().max() / y.abs().max()) for x, y in pairs)
    return found


@contextmanager
def all_in_float64() -> Iterator[None]:
    """Norms and rotary angles too, which the layers compute in float32 whatever their dtype.

    There a difference in the sixteenth digit can become one in the seventh.
    """
    norm, rotary = Qwen3RMSNorm.forward, Qwen3RotaryEmbedding.forward

    def exact_norm(self: Any, x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * (x * scale)

    def exact_rotary(self: Any, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angles = position_ids[..., None].to(x.dtype) * self.inv_freq.to(x.dtype)
        both = torch.cat([angles, angles], -1)
        return both.cos(), both.sin()

    Qwen3RMSNorm.forward, Qwen3RotaryEmbedding.forward = exact_norm, exact_rotary
    try:
        yield
    finally:
        Qwen3RMSNorm.forward, Qwen3RotaryEmbedding.forward = norm, rotary


def work_of(shape: Shape, seed: int, quick: bool, dtype: torch.dtype) -> Work:
    """A model with one group of the seed's own tokens."""
    work = Work(Case(1, *_lengths(shape)), quick, dtype)
    generator = torch.Generator().manual_seed(seed)
    vocabulary = work.model.config.vocab_size

    def tokens(length: int) -> Tensor:
        return torch.randint(vocabulary, (length,), generator=generator)

    completions = [tokens(shape.completion_length) for _ in range(shape.num_generations)]
    work.groups = [Group(tokens(shape.prompt_length), completions)]
    work.trained = make_trained(work.groups, work.model)
    return work


def _lengths(shape: Shape) -> tuple[int, int, int]:
    return shape.prompt_length, shape.completion_length, shape.num_generations
