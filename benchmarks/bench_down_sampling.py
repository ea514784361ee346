"""Tokens and completions that are dropped, against the same ones multiplied by zero.

python benchmarks/bench_down_sampling.py [--quick] [--json PATH] [--only TEXT] [--seconds S]

"head": forward and backward from hidden states, a fifth of the tokens trained, those of the largest
|advantage| * entropy. "update": a step of D3S from rollouts to new weights, 8 of 16 completions and
a fifth of their tokens, with the 25M parameters of bench_shared_prefix.py. Masking computes all of
it and multiplies by zero; its prompts are shared too, and its head is the faster of logits in full
and logits in chunks (for which the scores must be known before). Every gradient is compared with
the masked computation in float64, one sequence after the other. "selecting" is the part of an
update that only decides: scores, selection, and plans without what was dropped.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from bench_shared_prefix import build_model
from compare import exit_status
from measure import Timing, time_interleaved
from rows import OURS, Row, environment, print_table, write_json
from torch import Tensor

from fastrl.down_sampling import Weighted, weigh_tokens
from fastrl.loss import NOT_MEASURED, Measured, backward, measure
from fastrl.methods.estimates import rows_to_train
from fastrl.methods.inputs import StepInputs
from fastrl.methods.needs import looks_past_tokens
from fastrl.methods.record import Method, use
from fastrl.packing import PackedPass, pack_rollouts
from fastrl.phases import Prepared, prepare, start_inputs
from fastrl.policy import Policy, train_tokenizer
from fastrl.types import Example, Prompts, Rewards, Rollouts
from fastrl_kernels import linear_logps, policy_loss, select_tokens
from fastrl_kernels.objectives import SURROGATES, Objective

MAX_ERROR = 2e-5  # of float32 gradients relative to the largest float64 one
RATIO, NUM_GENERATIONS, NUM_KEPT = 0.2, 16, 8
GOALS = {"head": 0.65, "update": 0.5, "selecting": 0.02}
OBJECTIVE = Objective(SURROGATES["clipped_ratio"], (0.2, 0.2))
SHARPNESS = 6.0  # standard deviation of logits, in that of a fresh model
CHUNK = 512  # rows of logits at a time
METHOD = Method(
    "d3s", "", "",
    selection=use("max_variance_advantages", num_kept=NUM_KEPT,
                  kept_fraction=NUM_KEPT / NUM_GENERATIONS),
    token_weights=use("advantage_entropy", fraction=RATIO),
)  # fmt: skip


class Case(NamedTuple):
    """Prompts and completions of an update; the head alone has `num_rows` and no layers."""

    operation: str
    num_rows: int = 0
    num_prompts: int = 0
    prompt_length: int = 0
    completion_length: int = 0

    def __str__(self) -> str:
        if self.operation == "head":
            return f"head S={self.num_rows} kept={RATIO} float32"
        return (
            f"update prompts={self.num_prompts} P={self.prompt_length} R={self.completion_length} "
            f"G={NUM_GENERATIONS}->{NUM_KEPT} kept={RATIO} float32"
        )


class HeadWork:
    """Hidden states, a head and scores, and every way to the gradients of both."""

    def __init__(self, num_rows: int, quick: bool, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(0)
        hidden, vocabulary = (64, 2000) if quick else (512, 32000)
        scale = 3 / hidden**0.5

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(dtype)

        self.states = normal(num_rows, hidden).requires_grad_()
        self.weight = (scale * normal(vocabulary, hidden)).requires_grad_()
        self.target_ids = torch.randint(vocabulary, (num_rows,), generator=generator)
        self.advantages = normal(num_rows)
        with torch.no_grad():
            self.entropies = entropies_of(self.states @ self.weight.T)

    def kept(self, entropies: Tensor) -> Tensor:
        """(S,) bool: the tokens to train."""
        scores = self.advantages.abs() * entropies
        return select_tokens(scores, torch.ones_like(scores, dtype=torch.bool), ratio=RATIO)

    def train_kept(self, kept: Tensor) -> None:
        """The head forward and backward over the kept rows alone."""
        rows = kept.nonzero()[:, 0]
        weights = torch.full((len(rows),), 1 / len(rows), dtype=self.states.dtype)
        policy_loss(
            self.states[rows], self.weight, self.target_ids[rows], self.advantages[rows], weights,
            objective=OBJECTIVE,
        ).loss.backward()  # fmt: skip

    def two_phases(self) -> None:
        """Scores from the policy: the head forward over all rows first."""
        with torch.no_grad():
            found = linear_logps(self.states, self.weight, self.target_ids)
        self.train_kept(self.kept(found.entropies))

    def sampled_scores(self) -> None:
        """Scores that a sampler recorded."""
        self.train_kept(self.kept(self.entropies))

    def masked_in_full(self) -> None:
        """All logits at once, scored and masked."""
        logits = self.states @ self.weight.T
        mask = self.kept(entropies_of(logits.detach()))
        self.masked_loss(logits, slice(None), mask, int(mask.sum())).backward()

    def masked_in_chunks(self) -> None:
        """Logits of some rows at a time, masked by scores that were known before."""
        mask = self.kept(self.entropies)
        num_kept = int(mask.sum())
        for start in range(0, len(mask), CHUNK):
            rows = slice(start, start + CHUNK)
            logits = self.states[rows] @ self.weight.T
            self.masked_loss(logits, rows, mask[rows], num_kept).backward()

    def masked_loss(self, logits: Tensor, rows: slice, mask: Tensor, num_kept: int) -> Tensor:
        """The share of some rows in the loss."""
        logps = logits.log_softmax(-1).gather(1, self.target_ids[rows, None])[:, 0]
        return masked_mean(logps, self.advantages[rows], mask, num_kept)

    def gradients(self, run: Callable[[], None]) -> list[Tensor]:
        """Of the states and the head."""
        run()
        found = [self.states.grad, self.weight.grad]
        self.states.grad = self.weight.grad = None
        return found

    def steps(self) -> dict[str, Callable[[], Any]]:
        """What is timed, by name."""
        ways = {
            f"{OURS} scores from the policy": self.two_phases,
            f"{OURS} scores from the sampler": self.sampled_scores,
            "masking, logits in full": self.masked_in_full,
            "masking, logits in chunks": self.masked_in_chunks,
        }
        return {name: lambda way=way: self.gradients(way) for name, way in ways.items()}


def entropies_of(logits: Tensor) -> Tensor:
    """(S,) entropies in nats."""
    table = logits.log_softmax(-1)
    return -(table.exp() * table).sum(-1)


def masked_mean(logps: Tensor, advantages: Tensor, mask: Tensor, num_kept: int) -> Tensor:
    """The clipped surrogate of on-policy tokens, those outside of the mask multiplied by 0."""
    ratios = (logps - logps.detach()).exp()
    clipped = ratios.clamp(0.8, 1.2)
    losses = -torch.minimum(ratios * advantages, clipped * advantages)
    return (losses * mask).sum() / num_kept


class UpdateWork:
    """A policy with the rollouts of a step, and every way from them to new weights."""

    def __init__(self, case: Case, quick: bool, dtype: torch.dtype = torch.float32) -> None:
        model = build_model(quick, dtype)
        with torch.no_grad():  # entropies far enough apart that float32 picks the same tokens
            model.lm_head.weight *= SHARPNESS
        tokenizer = train_tokenizer(["0 1 2 3"], vocab_size=300)
        self.policy = Policy(model, tokenizer)
        self.rollouts, self.rewards = make_rollouts(case, model.config.vocab_size)
        # At a learning rate of 0 the optimizer does all its work and the weights stay.
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)

    def inputs(self) -> StepInputs:
        """The step before anything is decided."""
        longest = int(self.rollouts.lengths.max())
        return start_inputs(
            self.rollouts, self.rewards, self.rollouts.lengths,
            max_completion_length=longest, progress=0.0,
        )  # fmt: skip

    def decide(self, scores_from: str) -> tuple[StepInputs, Tensor, Weighted]:
        """Which completions stay, and which tokens if that is known."""
        inputs, advantages, kept = rows_to_train(METHOD, self.inputs())
        return inputs, advantages, weigh_tokens(
            METHOD, self.rollouts, inputs, kept, scores_from=scores_from, is_exact=True
        )  # fmt: skip

    def pack(self, advantages: Tensor, weighted: Weighted) -> list[PackedPass]:
        """All of it in one pass."""
        return pack_rollouts(
            self.rollouts, weighted.kept, advantages, weighted.weights,
            max_tokens_per_pass=10**6, device=torch.device("cpu"), dtype=self.policy.model.dtype,
        )  # fmt: skip

    def dropped(self, scores_from: str) -> None:
        """Gradients as the trainer makes them."""
        inputs, advantages, weighted = self.decide(scores_from)
        passes = self.pack(advantages, weighted)
        measured = NOT_MEASURED
        if looks_past_tokens(weighted.method):
            measured = measure(self.policy, passes, 1.0)
        ready = ready_of(weighted, inputs, passes, measured)
        backward(self.policy, ready, 1.0, measured.hidden_states)

    def masked(self) -> None:
        """Gradients with every completion in the row and every token at the head."""
        inputs, advantages, kept = rows_to_train(METHOD, self.inputs())
        every = torch.ones_like(kept)
        (item,) = self.pack(advantages, Weighted(METHOD, every, advantages))
        plan, states = item.plan, self.policy.hidden_states(item.plan)
        logits = states[plan.source_index] @ self.policy.lm_head.weight.T
        entropies = entropies_of(logits.detach())
        mask = mask_of(inputs, kept, plan.completion_index, entropies)
        logps = logits.log_softmax(-1).gather(1, plan.target_ids[:, None])[:, 0]
        # Advantages of the completions left out are 0 by now; theirs are masked anyway.
        masked_mean(logps, item.batch.advantages, mask, int(mask.sum())).backward()

    def masked_row_by_row(self) -> list[Tensor]:
        """Gradients of one sequence after the other; also records the entropies of a sampler."""
        inputs, advantages, kept = rows_to_train(METHOD, self.inputs())
        with torch.no_grad():
            entropies = [entropies_of(logits) for logits, _ in self.rows()]
        mask = mask_of(
            inputs, kept, torch.repeat_interleave(self.rollouts.lengths), torch.cat(entropies)
        )
        masks = mask.split(self.rollouts.lengths.tolist())
        for b, (logits, targets) in enumerate(self.rows()):
            logps = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
            values = advantages[b].expand(len(targets))
            masked_mean(logps, values, masks[b], int(mask.sum())).backward()
        self.entropies = tuple(x.float() for x in entropies)
        return self.take_gradients()

    def rows(self) -> Any:
        """Logits and targets of every completion, one at a time."""
        for b, completion in enumerate(self.rollouts.completion_ids):
            prompt = self.rollouts.prompts.token_ids[b // NUM_GENERATIONS]
            ids = torch.cat([prompt, completion])[None, :-1]
            logits = self.policy.model(input_ids=ids, use_cache=False).logits[0]
            yield logits[len(prompt) - 1 :], completion

    def take_gradients(self) -> list[Tensor]:
        """Of every parameter, which have none afterwards."""
        found = [p.grad for p in self.policy.model.parameters()]
        self.policy.model.zero_grad(set_to_none=True)
        return found

    def gradients(self, run: Callable[[], None]) -> list[Tensor]:
        """Of every parameter."""
        run()
        return self.take_gradients()

    def ways(self) -> dict[str, Callable[[], None]]:
        """How gradients are made, by name."""
        return {
            f"{OURS} scores from the sampler": lambda: self.dropped("sampler"),
            f"{OURS} scores from the policy": lambda: self.dropped("policy"),
            "masking": self.masked,
        }

    def update(self, way: Callable[[], None]) -> None:
        """Gradients, clipping and AdamW."""
        way()
        torch.nn.utils.clip_grad_norm_(self.policy.model.parameters(), 1.0)
        self.optimizer.step()
        self.policy.model.zero_grad(set_to_none=True)

    def deciding(self) -> dict[str, Callable[[], Any]]:
        """The parts of an update that only decide."""
        inputs, advantages, weighted = self.decide("policy")
        passes = self.pack(advantages, weighted)
        measured = measure(self.policy, passes, 1.0)._replace(hidden_states=None)

        def after_measuring() -> None:
            rows_to_train(METHOD, self.inputs())
            ready_of(weighted, inputs, passes, measured._replace(hidden_states=torch.empty(0)))

        return {
            f"{OURS} selecting, scores from the sampler": lambda: self.decide("sampler"),
            f"{OURS} selecting, scores from the policy": after_measuring,
        }


def ready_of(
    weighted: Weighted, inputs: StepInputs, passes: list[PackedPass], measured: Measured
) -> Prepared:
    """The passes with the tokens that are trained."""
    return prepare(
        weighted.method, inputs, passes, measured.statistics,
        trim=measured.hidden_states is None,
    )  # fmt: skip


def mask_of(inputs: StepInputs, kept: Tensor, owners: Tensor, entropies: Tensor) -> Tensor:
    """(S,) 1 for the tokens of the kept completions with the largest |advantage| * entropy."""
    assert inputs.advantages is not None
    scores = inputs.advantages.abs()[owners] * entropies.double()
    scores = scores.masked_fill(~kept[owners], -1.0)
    num_kept = int(RATIO * int(kept[owners].sum()) + 1e-9)
    order = scores.argsort(descending=True, stable=True)
    return torch.zeros_like(entropies).index_fill(0, order[:num_kept], 1.0)


def make_rollouts(case: Case, vocabulary: int) -> tuple[Rollouts, Rewards]:
    """Random tokens and rewards."""
    generator = torch.Generator().manual_seed(1)

    def tokens(length: int) -> Tensor:
        return torch.randint(vocabulary, (length,), generator=generator)

    num = case.num_prompts * NUM_GENERATIONS
    prompts = tuple(tokens(case.prompt_length) for _ in range(case.num_prompts))
    rollouts = Rollouts(
        prompts=Prompts(prompts, tuple(Example("") for _ in prompts)),
        completion_ids=tuple(tokens(case.completion_length) for _ in range(num)),
        rollout_logps=None,
        finished=torch.ones(num, dtype=torch.bool),
    )
    return rollouts, Rewards(torch.rand(num, generator=generator), {})


def error_of(found: list[Tensor], truth: list[Tensor]) -> float:
    """Largest error of a gradient relative to the largest value of its tensor."""
    pairs = zip(found, truth, strict=True)
    return max(float((x.double() - y).abs().max() / y.abs().max()) for x, y in pairs)


def measure_head(case: Case, quick: bool, seconds: float) -> list[Row]:
    """Check and time the head."""
    exact = HeadWork(case.num_rows, quick, torch.float64)
    truth = exact.gradients(exact.masked_in_full)
    work = HeadWork(case.num_rows, quick)
    steps = work.steps()
    errors = {name: error_of(step(), truth) for name, step in steps.items()}
    timings = time_interleaved(steps, device="cpu", seconds=seconds, min_rounds=3)
    return report(case, errors, timings, "head")


def measure_update(case: Case, quick: bool, seconds: float) -> list[Row]:
    """Check and time the update, and what of it is deciding."""
    exact = UpdateWork(case, quick, torch.float64)
    truth = exact.masked_row_by_row()
    work = UpdateWork(case, quick)
    work.rollouts = with_entropies(work.rollouts, exact.entropies)
    del exact
    ways = work.ways()
    errors = {name: error_of(work.gradients(way), truth) for name, way in ways.items()}
    steps = {name: (lambda way=way: work.update(way)) for name, way in ways.items()}
    timings = time_interleaved(steps, device="cpu", seconds=seconds, min_rounds=3)
    rows = report(case, errors, timings, "update")
    deciding = time_interleaved(work.deciding(), device="cpu", seconds=1.0)
    rows += report_deciding(case, deciding, timings)
    return rows


def with_entropies(rollouts: Rollouts, entropies: tuple[Tensor, ...]) -> Rollouts:
    """As an engine would have recorded them."""
    return Rollouts(
        rollouts.prompts, rollouts.completion_ids, None, rollouts.finished, entropies
    )  # fmt: skip


def report(
    case: Case, errors: dict[str, float], timings: dict[str, Timing], kind: str
) -> list[Row]:
    """The rows of a case as a table, and the ratios to the fastest masking."""
    where = environment("cpu")
    rows = [
        Row(
            case=str(case), implementation=name, correct=errors[name] <= MAX_ERROR,
            environment=where, p20_ms=timing.p20, p50_ms=timing.p50, p80_ms=timing.p80,
            weight_grad_error=errors[name],
        )
        for name, timing in timings.items()
    ]  # fmt: skip
    print_table(rows)
    masking = min(timing.p50 for name, timing in timings.items() if "masking" in name)
    for name, timing in timings.items():
        if name.startswith(OURS):
            print(f"{name}: {timing.p50 / masking:.3f}x masking (goal {GOALS[kind]})")
    return rows


def report_deciding(
    case: Case, deciding: dict[str, Timing], updates: dict[str, Timing]
) -> list[Row]:
    """The parts that decide, beside the updates they belong to."""
    where = environment("cpu")
    rows = []
    for name, timing in deciding.items():
        update = updates[name.replace(" selecting,", "")]
        share = timing.p50 / update.p50
        note = f"{100 * share:.2f}% of the update (goal {100 * GOALS['selecting']:.0f}%)"
        print(f"{name}: {timing.p50:.2f} ms, {note}")
        rows.append(
            Row(
                case=str(case), implementation=name, correct=True, environment=where,
                p20_ms=timing.p20, p50_ms=timing.p50, p80_ms=timing.p80, note=note,
            )
        )  # fmt: skip
    return rows


def make_cases(quick: bool) -> list[Case]:
    """The head at two sizes; updates with short and with long prompts."""
    if quick:
        return [Case("head", 300), Case("update", 0, 2, 12, 24)]
    return [
        Case("head", 1024),
        Case("head", 4096),
        Case("update", 0, 2, 64, 64),
        Case("update", 0, 1, 128, 128),
        Case("update", 0, 1, 512, 64),
    ]


def main() -> int:
    """1 where our implementation is not correct."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, to try the benchmark")
    parser.add_argument("--json", type=Path, help="write the rows here, after every case")
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    parser.add_argument("--seconds", type=float, default=30.0, help="for the timing of a case")
    args = parser.parse_args()
    rows: list[Row] = []
    for case in make_cases(args.quick):
        if args.only in str(case):
            run = measure_head if case.operation == "head" else measure_update
            rows += run(case, args.quick, args.seconds)
            write_json(args.json, rows)
    return exit_status(rows)


if __name__ == "__main__":
    sys.exit(main())
