"""Rollouts on the training weights, against transformers' `generate` and continuous batching.

python benchmarks/bench_rollout.py [--quick] [--json PATH] [--only TEXT] [--seconds S]

The model is a Qwen3 of 25M parameters without its embedding, V = 32000. Completions have given
lengths, the same for everyone: all of the longest, or log-normal with a median of a fourth of it.
Ours returns log-probabilities and entropies of every token, `generate` returns neither, continuous
batching log-probabilities. It forks a prompt's completions where they have one length, and shares
blocks of prompts otherwise. Before anything is timed, greedy tokens of ours are compared with those
of `generate` and sampled log-probabilities with one forward pass per sequence. Memory is the growth
of the resident set in a process of its own.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_shared_prefix import Case, build_model
from compare import exit_status
from measure import Timing, in_fresh_process, peak_on_cpu, time_interleaved
from rows import OURS, Row, environment, print_table, write_json
from torch import Tensor
from transformers import (
    ContinuousBatchingConfig,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
)

from fastrl.policy import Policy, train_tokenizer
from fastrl.rollout import Sampling
from fastrl.rollout.native import NativeEngine
from fastrl.rollout.table import Table
from fastrl.types import Example, Prompts

CHECKED_TOKENS = 32  # of greedy completions, against those of `generate`
GOAL = 1.5  # times the tokens a second of the others
MAX_LOGP_ERROR = 1e-4
END = 1
MIB = 2**20


def lengths_of(case: Case) -> Any:
    """Of every completion, on the CPU in numpy."""
    num = case.num_prompts * case.num_generations
    if not case.is_ragged:
        return np.full(num, case.completion_length)
    noise = torch.randn(num, generator=torch.Generator().manual_seed(2))
    drawn = case.completion_length / 4 * noise.mul(0.8).exp()
    return drawn.clamp(2, case.completion_length).long().numpy()


class LimitedTable(Table):
    """A table in which every row ends at a length of its own."""

    limits: Any

    @property
    def goes_on(self) -> Any:
        """Rows that have not reached their length."""
        return self.lengths < self.limits


class LimitedEngine(NativeEngine):
    """The native engine with a length for each completion."""

    limits: Any

    def new_table(self, num_rows: int, num_columns: int) -> Table:
        """See LimitedTable."""
        table = LimitedTable(num_rows, num_columns, self.policy.device)
        table.limits = self.limits
        return table


class ForcedEnds(LogitsProcessor):
    """Lets every row of `generate` end at its length, and not before."""

    def __init__(self, lengths: Tensor, prompt_length: int) -> None:
        self.lengths = lengths
        self.prompt_length = prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores[:, END] = -torch.inf
        ending = self.lengths <= input_ids.shape[1] - self.prompt_length + 1
        scores[ending] = -torch.inf
        scores[ending, END] = 0.0
        return scores


class Work:
    """One case, ready to be sampled in every way."""

    def __init__(self, case: Case, quick: bool) -> None:
        self.case, self.lengths = case, lengths_of(case)
        model = build_model(quick, torch.float32)
        tokenizer = train_tokenizer([""], vocab_size=258)
        self.policy = Policy(model, tokenizer)
        self.policy.eos_token_ids = []  # lengths are given
        self.model = model.eval()
        generator = torch.Generator().manual_seed(1)
        shape = (case.num_prompts, case.prompt_length)
        self.ids = torch.randint(2, model.config.vocab_size, shape, generator=generator)
        self.prompts = Prompts(tuple(self.ids), tuple(Example("") for _ in self.ids))
        self.engine = LimitedEngine(self.policy)
        self.engine.limits = self.lengths
        self.kept: dict[str, int] = {}  # most memory of keys and values

    def native(self, temperature: float = 1.0) -> Any:
        """Ours."""
        sampling = Sampling(
            self.case.num_generations, self.case.completion_length, temperature=temperature
        )
        out = self.engine.generate(self.prompts, sampling, torch.Generator().manual_seed(0))
        self.kept[f"{OURS} native"] = self.engine.peak_kv_bytes
        return out

    @torch.no_grad()
    def generate(self, temperature: float = 1.0) -> Any:
        """transformers' `generate` with its own sampling."""
        case = self.case
        settings = GenerationConfig(
            max_new_tokens=case.completion_length, do_sample=temperature > 0, eos_token_id=END,
            pad_token_id=0, top_k=0, return_dict_in_generate=True,
        )  # fmt: skip
        input_ids = self.ids.repeat_interleave(case.num_generations, 0)
        ends = ForcedEnds(torch.from_numpy(self.lengths), case.prompt_length)
        out = self.model.generate(
            input_ids=input_ids, attention_mask=torch.ones_like(input_ids),
            generation_config=settings, logits_processor=LogitsProcessorList([ends]),
        )  # fmt: skip
        layers = out.past_key_values.layers
        self.kept["transformers generate"] = sum(x.keys.nbytes + x.values.nbytes for x in layers)
        return out

    def continuous_batching(self) -> Any:
        """transformers' continuous batching with a cache of the size that the case needs."""
        case = self.case
        page = 32
        own = -(-case.completion_length // page) + 1
        shared = -(-case.prompt_length // page)
        pages = case.num_prompts * (shared + case.num_generations * (own + 1))
        config = ContinuousBatchingConfig(
            num_blocks=int(1.3 * pages) + 16, page_size=page, max_batch_tokens=1024,
            auto_switch_to_flash=False, return_logprobs=True,
        )  # fmt: skip
        settings = GenerationConfig(
            max_new_tokens=case.completion_length,
            do_sample=True,
            top_k=0,
            num_return_sequences=1 if case.is_ragged else case.num_generations,
        )
        manager = self.model.init_continuous_batching(settings, config)
        for p, ids in enumerate(self.ids.tolist()):
            for g in range(case.num_generations if case.is_ragged else 1):
                limit = int(self.lengths[p * case.num_generations + g])
                manager.add_request(ids, request_id=f"{p}-{g}", max_new_tokens=limit)
        manager.start()
        outputs = []
        while len(outputs) < len(self.lengths):
            output = manager.get_result(timeout=60)
            assert output is not None, "continuous batching has stopped"
            outputs.append(output)
        manager.stop(block=True)
        assert sum(len(x.generated_tokens) for x in outputs) == self.lengths.sum()
        return outputs

    def ways(self) -> dict[str, Callable[[], Any]]:
        """How the case is sampled, by name."""
        return {
            f"{OURS} native": self.native,
            "transformers generate": self.generate,
            "transformers continuous batching": self.continuous_batching,
        }

    def num_parted(self) -> int:
        """Greedy completions that differ from those of `generate`, but for ties in float32."""
        ours = self.native(temperature=0.0)
        theirs = self.generate(temperature=0.0).sequences[:, self.case.prompt_length :]
        num = 0
        for row, (ids, limit) in enumerate(zip(ours.completion_ids, self.lengths, strict=True)):
            # Its last token is the end that was forced upon it.
            same = (ids[: limit - 1] == theirs[row, : limit - 1]).int().cumprod(0)
            first = int(same.sum())
            num += int(first < limit - 1 and not self._is_tie(row, ids[:first]))
        return num

    @torch.no_grad()
    def _is_tie(self, row: int, ids: Tensor) -> bool:
        prompt = self.ids[row // self.case.num_generations]
        logits = self.model(input_ids=torch.cat([prompt, ids])[None]).logits[0, -1]
        best = logits.topk(2).values
        return bool(best[0] - best[1] < 1e-4)

    @torch.no_grad()
    def logp_error(self) -> float:
        """Largest error of a recorded log-probability, over one completion of each prompt."""
        rollouts, worst = self.native(), 0.0
        for p, prompt in enumerate(self.ids):
            row = p * self.case.num_generations
            ids = rollouts.completion_ids[row]
            logits = self.model(input_ids=torch.cat([prompt, ids])[None]).logits[0]
            logps = logits[len(prompt) - 1 : -1].log_softmax(-1).gather(1, ids[:, None])[:, 0]
            worst = max(worst, float((logps - rollouts.rollout_logps[row]).abs().max()))
        return worst


def peak(case: Case, quick: bool, name: str) -> int:
    """Memory of one way, in this process."""
    work = Work(case, quick)
    return peak_on_cpu(work.ways()[name], lambda: None)


def measure(case: Case, quick: bool, seconds: float) -> list[Row]:
    """Check and time a case, and its memory."""
    num_parted = Work(case._replace(completion_length=CHECKED_TOKENS), quick).num_parted()
    work = Work(case, quick)
    error = work.logp_error()
    few = 2 if case.num_prompts >= 16 else 3  # of minutes each
    timings = time_interleaved(work.ways(), device="cpu", seconds=seconds, min_rounds=few)
    where = environment("cpu")
    rows = [
        Row(
            case=str(case), implementation=name, environment=where,
            correct=not name.startswith(OURS) or (error <= MAX_LOGP_ERROR and not num_parted),
            p20_ms=timing.p20, p50_ms=timing.p50, p80_ms=timing.p80,
            peak_bytes=in_fresh_process(peak, case, quick, name) if case.num_prompts < 16 else None,
            logp_error=error if name.startswith(OURS) else None,
            note=_note(name, timing, int(work.lengths.sum()), work.kept),
        )
        for name, timing in timings.items()
    ]  # fmt: skip
    print_table(rows)
    print(f"greedy completions that differ from generate's: {num_parted} of {len(work.lengths)}")
    ours = timings[f"{OURS} native"].p50
    for row in rows:
        ratio = "" if row.implementation.startswith(OURS) else (
            f", ours {timings[row.implementation].p50 / ours:.2f}x (goal {GOAL})"
        )  # fmt: skip
        print(f"{row.implementation}: {row.note}{ratio}")
    return rows


def _note(name: str, timing: Timing, num_tokens: int, kept: dict[str, int]) -> str:
    speed = f"{1000 * num_tokens / timing.p50:.0f} tokens/s"
    return speed + (f", keys and values {kept[name] / MIB:.1f} MiB" if name in kept else "")


def make_cases(quick: bool) -> list[Case]:
    """Log-normal lengths at several sizes of batch, one length, and a long prompt."""
    if quick:
        return [Case(2, 32, 12, 4), Case(2, 32, 24, 4, is_ragged=True)]
    return [
        Case(4, 256, 128, 8, is_ragged=True),
        Case(16, 256, 128, 8, is_ragged=True),
        Case(4, 256, 128, 8),
        Case(1, 512, 128, 8),
    ]


def main() -> int:
    """1 where our implementation is not correct."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, to try the benchmark")
    parser.add_argument("--json", type=Path, help="write the rows here, after every case")
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    parser.add_argument("--seconds", type=float, default=30.0, help="of timing a case, about")
    args = parser.parse_args()
    rows: list[Row] = []
    for case in make_cases(args.quick):
        if args.only in str(case):
            rows += measure(case, args.quick, args.seconds)
            write_json(args.json, rows)
    return exit_status(rows)


if __name__ == "__main__":
    sys.exit(main())
