"""Predicted against measured memory: whole runs, and the parts that sampling's plan is made of."""

from __future__ import annotations

import sys
from itertools import groupby
from pathlib import Path

import pytest
import torch

from fastrl.memory.engine_moments import Call, moments
from fastrl.rollout import Sampling
from fastrl.rollout.decoder import PackedDecoder
from fastrl.rollout.native import NativeEngine
from fastrl.rollout.room import Room
from fastrl.types import Example, Prompts
from fastrl_kernels import decode_attention
from fastrl_kernels.adamw import random_bits
from fastrl_kernels.decode_attention import launch, workspace
from tests.helpers import random_ids, tiny_policy

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))  # as a script there has it

from bench_memory_plan import OVER, PEAK, UNDER, outcomes
from measure import tracked_peak
from memory_cases import CASES, NO_TOKEN, Case, merged, model
from memory_trace import mark, span, traced

SMALL = {
    "prompts_per_step": 2,
    "rollout": {"max_prompt_length": 32, "max_completion_length": 16},
    "model": {"architecture": {"num_hidden_layers": 2, "vocab_size": 512}},
}
"""In place of what all cases have; plans are as near, and a run takes a second."""
ROWS = {
    "data": {"eval_size": 6},
    "eval": {"num_samples": 4},
    "rollout": {"max_completion_length": 68},
}
BOUNDED = {"rollout": {"engine_args": {"kv_cache_gib": 1.5 / 1024}}}
LARGE = {
    "rollout": {"max_prompt_length": 256, "max_completion_length": 256},
    "model": {"device": "cuda"},
}
RUNS = [
    *(
        case
        for case in CASES
        if case.name
        in ("llama", "qwen3_moe", "grpo with KL", "autocast", "split", "split, 8-bit moments",
            "two phases", "recomputed", "lora")
    ),
    Case("two passes", {"max_tokens_per_pass": 200}),
    Case("many rows", ROWS),
    Case("many rows, bounded", merged(ROWS, BOUNDED)),
]  # fmt: skip
CALL = Call(num_prompts=4, num_generations=3, prompt_length=7, completion_length=90)
BUDGETS = {"no limit": None, "room for all": 4 * 7 + 12 * 90, "room for few": 450, "for one": 280}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("num_groups", "width", "heads", "num_columns", "suffix", "window"),
    [
        (4, 4, (4, 2), 48, (32, 32), None),
        (16, 4, (8, 2), 128, (100, 128), None),
        (2, 8, (8, 8), 300, (64, 64), None),
        (8, 1, (4, 1), 64, (64, 64), None),
        (16, 4, (8, 2), 128, (100, 128), 48),
        (63, 4, (4, 2), 48, (20, 96), 32),
    ],
)
def test_workspace_of_decode_attention(
    dtype, num_groups, width, heads, num_columns, suffix, window
):
    (H, Hkv), K, R, (used, capacity) = heads, 64, num_groups * width, suffix
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    q = normal(H, R, K).transpose(0, 1)  # as a model has them
    prefix = [normal(num_groups, Hkv, num_columns, K) for _ in range(2)]
    own = [normal(R, Hkv, capacity, K) for _ in range(2)]
    found = []

    def call():
        found.append(
            decode_attention(
                q, *prefix, *own,
                row_groups=torch.arange(num_groups, dtype=torch.int32).repeat_interleave(width),
                prefix_lengths=torch.full((num_groups,), num_columns, dtype=torch.int32),
                suffix_length=used, window=window,
            )
        )  # fmt: skip

    measured = tracked_peak(call) - found[0].nbytes
    predicted = workspace.workspace_bytes(
        q, prefix[0], *own, suffix_length=used, window=window, implementation="torch"
    )
    assert 0.99 * measured < predicted < 1.05 * measured


def test_parts_of_the_kernels_are_as_wide_as_their_launch_says(monkeypatch):
    monkeypatch.setattr(launch, "interprets_triton", lambda: False)
    assert launch.split_columns() == workspace.PART_COLUMNS


class Watched(PackedDecoder):
    """Writes down what there is memory for whenever that may be the highest."""

    def __init__(self, policy, max_new_tokens):
        super().__init__(policy, max_new_tokens)
        self.seen = []

    def _see(self, kind, num_rows):
        self.seen.append((kind, self.num_tokens, num_rows))

    def admit(self, requests):
        hidden = super().admit(requests)
        self._see("admit", sum(len(request.rows) for request in requests))
        return hidden

    def grow(self):
        before = self.num_tokens
        super().grow()
        if self.num_tokens != before:
            self._see("grow", sum(len(cohort.active) for cohort in self.cohorts))

    def step(self, tokens):
        self._see("step", len(tokens))
        return super().step(tokens)


@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS)
def test_moments_are_those_of_the_engine(budget, monkeypatch):
    policy = tiny_policy()
    policy.eos_token_ids = [NO_TOKEN]
    ids = random_ids([CALL.prompt_length] * CALL.num_prompts)
    prompts = Prompts(tuple(ids), tuple(Example(prompt="x") for _ in ids))
    sampling = Sampling(CALL.num_generations, CALL.completion_length)
    engine = NativeEngine(policy)
    decoder = Watched(policy, CALL.completion_length)
    monkeypatch.setattr(engine, "_decoder", lambda max_new_tokens: decoder)
    monkeypatch.setattr(engine, "_room", lambda max_new_tokens: Room(budget, max_new_tokens))
    engine.generate(prompts, sampling, torch.Generator().manual_seed(0))
    found = moments(policy, Room(budget, CALL.completion_length), CALL)
    expected = [key for key, _ in groupby(decoder.seen)]
    told = [(moment.kind, moment.num_tokens, moment.num_rows) for moment in found]
    assert [key for key, _ in groupby(told)] == expected
    assert (engine.num_restarts > 0) == (budget == BUDGETS["room for few"])


def test_spans_count_what_is_in_use():
    class Worker:
        def work(self):
            torch.ones(2**18)

    worker = Worker()
    with traced() as trace:
        before = torch.ones(2**16)
        mark(worker, "work", "inner")
        with span("outer"):
            worker.work()
            after = torch.ones(2**17)
        del before
    assert trace.peaks["inner"] == 4 * (2**16 + 2**18)
    assert trace.peaks["outer"] == trace.peaks[""] == 4 * (2**16 + 2**17)
    assert trace.highest == trace.peaks["inner"]
    assert trace.remaining == after.nbytes


@pytest.fixture
def no_positions_kept() -> None:
    """Rounding by chance keeps a table for the process; a plan counts it, as of a fresh one."""
    random_bits._positions.cache_clear()


@pytest.mark.parametrize("case", RUNS, ids=[case.name for case in RUNS])
def test_a_plan_is_near_what_its_run_takes(case, no_positions_kept):
    small = case._replace(options=merged(SMALL, case.options))
    found = {outcome.phase: outcome for outcome in outcomes(small)}
    assert set(found) >= {PEAK, "rollout", "update", "evaluate"}
    assert ("step" in found) == ("two phases" not in case.name)  # which steps in the backward pass
    for outcome in found.values():
        assert 1 - UNDER <= outcome.ratio <= 1 + OVER, outcome


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("options", [{}, model(precision="split")], ids=["float32", "split"])
def test_a_plan_is_near_what_its_run_takes_on_a_gpu(options):
    """A model of 100M parameters: what an allocator rounds, and libraries keep, is little of it."""
    fields = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 8}
    case = Case("on a GPU", merged(merged(LARGE, {"model": {"architecture": fields}}), options))
    peak, *_ = outcomes(case)
    assert 1 - UNDER <= peak.ratio <= 1 + OVER, peak
