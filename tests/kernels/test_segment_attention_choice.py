"""Which implementation "auto" takes, on machines that are not this one either.

N packed tokens, M segments, H heads, Hkv key-value heads, K head size of queries and keys, Kv of
values.
"""

import itertools
import re
from typing import Any

import pytest
import torch

from fastrl_kernels import make_segments, segment_attention
from fastrl_kernels.segment_attention.choice import (
    IMPLEMENTATIONS,
    MASK_BYTES,
    Choice,
    Facts,
    Machine,
    choose_attention,
    facts_of,
    mask_bytes,
    obstacle_to,
)
from tests.kernels.test_segment_attention import LENGTHS, OPTIONS, PARENTS, inputs

GPU = Machine("cuda", (9, 0), has_triton=True, has_flash_attn=False)
BARE_GPU = GPU._replace(has_triton=False)
OLD_GPU = BARE_GPU._replace(capability=(7, 5))
CPU = Machine("cpu", None, has_triton=True, has_flash_attn=False)
BF16 = Facts(GPU, torch.bfloat16, 8704, 16, 8, 128, 128)
FP32 = BF16._replace(dtype=torch.float32)


def heads(facts: Facts, size: int, value_size: int | None = None) -> Facts:
    return facts._replace(head_size=size, value_size=value_size or size)


@pytest.mark.parametrize(
    ("facts", "name", "reason"),
    [
        (BF16, "triton", "one kernel"),
        (heads(BF16, 256), "triton", "one kernel"),
        (heads(BF16, 192, 128), "triton", "one kernel"),
        (BF16._replace(window=100, has_softcap=True, has_sinks=True), "triton", "one kernel"),
        (FP32, "triton", "one kernel"),
        (heads(FP32, 256), "triton", "one kernel"),
        (BF16._replace(dtype=torch.float64), "torch", "no kernels for float64"),
        # Wider than the kernels.
        (heads(FP32, 64, 512), "sdpa", "heads of at most 256; all pairs"),
        (heads(BF16, 512), "sdpa", "heads of at most 256; all pairs .* 0.48 of at most 2"),
        (heads(BF16, 512)._replace(num_tokens=40_000), "torch", "at most 256; one path"),
        (heads(BF16, 512)._replace(has_softcap=True), "torch", "at most 256; one path"),
        # Without triton there is no compiler for FlexAttention either.
        (BF16._replace(machine=BARE_GPU), "varlen", "triton is not installed; flash"),
        (BF16._replace(machine=BARE_GPU, has_sinks=True), "varlen", "not installed; flash"),
        (BF16._replace(machine=BARE_GPU, window=64), "sdpa", "not installed; all pairs"),
        (BF16._replace(machine=BARE_GPU, has_softcap=True), "torch", "not installed; one path"),
        (
            BF16._replace(machine=BARE_GPU._replace(has_flash_attn=True), has_softcap=True),
            "varlen",
            "not installed; flash",
        ),
        (BF16._replace(machine=OLD_GPU), "sdpa", "not installed; all pairs"),
        (heads(BF16, 192, 128)._replace(machine=BARE_GPU), "sdpa", "not installed; all pairs"),
        (FP32._replace(machine=BARE_GPU), "sdpa", "not installed; all pairs"),
        (BF16._replace(machine=CPU), "torch", "one path at a time"),
        (
            BF16._replace(machine=CPU, num_tokens=200, has_sinks=True),
            "torch",
            "one path at a time",
        ),
    ],
)
def test_choices_and_their_reasons(facts: Facts, name: str, reason: str) -> None:
    choice = choose_attention(facts)
    assert choice.name == name
    assert re.search(reason, choice.reason), choice.reason


def all_facts() -> list[Facts]:
    machines = [GPU, BARE_GPU, OLD_GPU, CPU, CPU._replace(device="mps")]
    machines += [machine._replace(has_flash_attn=True) for machine in machines[:3]]
    dtypes = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
    sizes = [(8, 8), (60, 60), (64, 64), (192, 128), (256, 256), (512, 512)]
    options = itertools.product([None, 100], [False, True], [False, True])
    return [
        Facts(machine, dtype, num_tokens, 16, 4, *size, *option)
        for machine, dtype, num_tokens, size, option in itertools.product(
            machines, dtypes, [100, 10_000, 50_000], sizes, list(options)
        )
    ]


def test_nothing_is_chosen_that_has_an_obstacle() -> None:
    names = set()
    for facts in all_facts():
        choice = choose_attention(facts)
        assert obstacle_to(choice.name, facts) is None
        assert choice.name != "sdpa" or facts.machine.device != "cuda" or (
            mask_bytes(facts) <= MASK_BYTES
        )  # fmt: skip
        names.add(choice.name)
    assert names == set(IMPLEMENTATIONS) - {"flex"}  # compiled by triton, which has our kernels


def test_mask_bytes_are_those_of_the_tensors() -> None:
    segments = make_segments(LENGTHS, PARENTS)
    q, _, v = inputs(0, kv_heads=3)
    mask = segments.visibility()
    repeated = [torch.empty(q.shape), torch.empty(*q.shape[:2], v.shape[2])]
    tensors = [mask, mask.to(torch.float32), *repeated]
    facts = facts_of(q.float(), v.float(), None, False, False)
    assert mask_bytes(facts) == sum(x.nbytes for x in tensors)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("lengths", [LENGTHS, [70 * length for length in LENGTHS]])
def test_auto_gives_the_bits_of_its_choice(options: dict, lengths: list[int]) -> None:
    segments = make_segments(lengths, PARENTS)
    times = segments.num_tokens // sum(LENGTHS)
    q, k, v = (x.repeat(times, 1, 1) for x in inputs(1))
    has = {f"has_{name}": name in options for name in ("softcap", "sinks")}
    facts = facts_of(q, v, options.get("window"), **has)
    choice = choose_attention(facts)
    assert choice.name == "torch"
    found, expected = (
        segment_attention(q, k, v, segments, **options, implementation=implementation)
        for implementation in ("auto", choice.name)
    )
    assert torch.equal(found, expected)


def test_facts_of_tensors() -> None:
    q, _, v = inputs(0, kv_heads=3, value_size=7)
    facts = facts_of(q, v, 9, True, False)
    assert facts[1:] == (torch.float64, 34, 6, 3, 13, 7, 9, True, False)
    assert facts.machine.device == "cpu"
    assert isinstance(choose_attention(facts), Choice)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("triton", {"dtype": torch.float64}, "no kernels for float64"),
        ("triton", {"machine": CPU}, "on cpu and the interpreter is off"),
        ("triton", {"machine": BARE_GPU}, "not installed"),
        ("sdpa", {"has_sinks": True}, "no sinks"),
        ("flex", {"machine": BARE_GPU}, "not installed"),
        ("flex", {"dtype": torch.float64}, "float64"),
        ("flex", {"head_size": 8}, "heads of 16 to 256"),
        ("flex", {"value_size": 512}, "heads of 16 to 256"),
        ("varlen", {"dtype": torch.float32}, "bfloat16, not float32"),
        ("varlen", {"machine": OLD_GPU}, "capability 8.0"),
        ("varlen", {"head_size": 192}, "up to 256, not 192 and 128"),
        ("varlen", {"head_size": 60, "value_size": 60}, "multiple of 8 up to 256, not 60 and 60"),
        ("varlen", {"has_softcap": True}, "takes the package flash-attn"),
        (
            "varlen",
            {"head_size": 256, "value_size": 256, "machine": GPU._replace(capability=(8, 9))},
            "no gradients for heads above 192",
        ),
        ("varlen", {"head_size": 256, "value_size": 256}, None),
        ("torch", {"dtype": torch.float64, "head_size": 1000}, None),
        ("varlen", {"machine": CPU, "dtype": torch.float64}, None),
        ("flex", {"machine": CPU, "dtype": torch.float64, "head_size": 8}, None),
    ],
)
def test_obstacles(name: str, change: dict[str, Any], message: str | None) -> None:
    obstacle = obstacle_to(name, BF16._replace(**change))
    assert (obstacle is None) if message is None else (message in str(obstacle))
