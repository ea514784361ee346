"""A group's prompt encoded once, against padded rows, packed rows and one row per sequence.

python benchmarks/bench_shared_prefix.py [--quick] [--json PATH] [--only TEXT]

The model is a Qwen3 of 25M parameters without its embedding. Every implementation computes the
same loss and the same gradients, which are compared with one forward pass per sequence in float64
before anything is timed. An update is forward, head and policy loss, backward, clipping and AdamW;
"trunk" is its forward and backward through the layers, from token ids to hidden states.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from compare import exit_status
from measure import Timing, in_fresh_process, peak_on_cpu, quantiles
from rows import OURS, Row, environment, print_table, write_json
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3Config

import fastrl
from fastrl_kernels import LMHead, policy_loss
from fastrl_kernels.objectives import SURROGATES, Objective

OBJECTIVE = Objective(SURROGATES["clipped_ratio"], (0.2, 0.2))
NUM_ROUNDS, NUM_CLOSE_ROUNDS = 3, 9  # more where nothing is shared and little should differ
MAX_ERROR = 2e-5  # of float32 gradients relative to the largest float64 one


class Case(NamedTuple):
    """P prompt tokens, R completion tokens, G completions of each of `num_prompts` prompts."""

    num_prompts: int
    prompt_length: int
    completion_length: int
    num_generations: int
    is_ragged: bool = False

    def __str__(self) -> str:
        lengths = "log-normal up to " if self.is_ragged else ""
        return (
            f"prompts={self.num_prompts} P={self.prompt_length} "
            f"R={lengths}{self.completion_length} G={self.num_generations} float32"
        )


class Group(NamedTuple):
    """A prompt and its completions."""

    prompt: Tensor
    completions: list[Tensor]


class Trained(NamedTuple):
    """(S,) of the trained tokens, in the order of the sequences: what the loss needs."""

    target_ids: Tensor
    advantages: Tensor
    token_weights: Tensor


class Seconds(NamedTuple):
    """Of one update."""

    trunk: float
    update: float


def make_cases(quick: bool) -> list[Case]:
    """The last ones share nothing."""
    if quick:
        return [Case(1, 64, 16, 4), Case(2, 48, 16, 4, is_ragged=True)]
    shared = [(1, 1024, 64, 16), (1, 512, 128, 8), (2, 256, 64, 8), (4, 64, 64, 8)]
    cases = [Case(*shape) for shape in shared]
    return [*cases, Case(2, 256, 256, 8, is_ragged=True), Case(8, 256, 128, 1), Case(32, 64, 32, 1)]


class Sizes(NamedTuple):
    """Of a model."""

    hidden: int
    num_layers: int
    intermediate: int
    vocabulary: int


TINY, USUAL = Sizes(64, 2, 192, 2000), Sizes(512, 8, 1536, 32000)


def build_model(quick: bool, dtype: torch.dtype, sizes: Sizes | None = None) -> Any:
    """The same random weights in every process and dtype; sizes: other than the usual ones."""
    hidden, layers, intermediate, vocabulary = sizes or (TINY if quick else USUAL)
    config = Qwen3Config(
        hidden_size=hidden, num_hidden_layers=layers, intermediate_size=intermediate,
        num_attention_heads=hidden // 64, num_key_value_heads=max(hidden // 128, 1), head_dim=64,
        vocab_size=vocabulary, tie_word_embeddings=True, max_position_embeddings=65536,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    return model.to(dtype).train()


def make_groups(case: Case, vocabulary: int) -> list[Group]:
    """Random tokens; ragged completions are log-normal, the median a quarter of the longest."""
    generator = torch.Generator().manual_seed(1)

    def tokens(length: int) -> Tensor:
        return torch.randint(vocabulary, (length,), generator=generator)

    def length() -> int:
        if not case.is_ragged:
            return case.completion_length
        drawn = case.completion_length / 4 * torch.randn((), generator=generator).mul(0.8).exp()
        return int(drawn.clamp(2, case.completion_length))

    return [
        Group(tokens(case.prompt_length), [tokens(length()) for _ in range(case.num_generations)])
        for _ in range(case.num_prompts)
    ]


def make_trained(groups: list[Group], model: Any) -> Trained:
    """Random advantages, one for each completion; weights of a token mean."""
    generator = torch.Generator().manual_seed(2)
    dtype = model.dtype
    completions = [completion for group in groups for completion in group.completions]
    target_ids = torch.cat(completions)
    lengths = torch.tensor([len(completion) for completion in completions])
    num_tokens = len(target_ids)
    advantages = torch.randn(len(completions), generator=generator).repeat_interleave(lengths)
    weights = torch.full((num_tokens,), 1 / num_tokens, dtype=dtype)
    return Trained(target_ids, advantages.to(dtype), weights)


def plan_of(groups: list[Group], **options: Any) -> fastrl.Plan:
    """One packed row."""
    prompts, completions = [g.prompt for g in groups], [g.completions for g in groups]
    return fastrl.pack(prompts, completions, **options)


def shared_states(
    model: Any, groups: list[Group], **options: Any
) -> Iterator[tuple[Tensor, slice]]:
    """Hidden states of the trained tokens, and which ones they are, from one row with each prompt
    once.
    """
    plan = plan_of(groups, **options)
    with plan.attach(model, source_rows_only=True):
        hidden = model.model(**plan.inputs).last_hidden_state[0]
    yield hidden[plan.source_index], slice(0, len(plan.target_ids))


def packed_states(model: Any, groups: list[Group]) -> Iterator[tuple[Tensor, slice]]:
    """The same with a copy of the prompt for every completion: no padding, nothing shared."""
    return shared_states(model, groups, min_token_ratio=float("inf"))


def padded_states(model: Any, groups: list[Group]) -> Iterator[tuple[Tensor, slice]]:
    """The same from one batch of rows padded on the right, as most trainers have it."""
    rows = [torch.cat([g.prompt, c])[:-1] for g in groups for c in g.completions]
    input_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(input_ids.shape[1]) < lengths[:, None]
    num_prompt = torch.tensor([len(g.prompt) for g in groups for _ in g.completions])
    trained = mask & (torch.arange(input_ids.shape[1]) >= num_prompt[:, None] - 1)
    given = {} if bool(mask.all()) else {"attention_mask": mask.long()}
    hidden = model.model(input_ids=input_ids, use_cache=False, **given).last_hidden_state
    states = hidden[trained]
    yield states, slice(0, len(states))


def row_states(model: Any, groups: list[Group]) -> Iterator[tuple[Tensor, slice]]:
    """The same with a forward pass for each sequence; the caller may go backward after each."""
    start = 0
    for group in groups:
        for completion in group.completions:
            row = torch.cat([group.prompt, completion])[None, :-1]
            hidden = model.model(input_ids=row, use_cache=False).last_hidden_state[0]
            states = hidden[len(group.prompt) - 1 :]
            yield states, slice(start, start + len(states))
            start += len(states)


STATES: dict[str, Callable[..., Iterator[tuple[Tensor, slice]]]] = {
    f"{OURS} shared prefix": shared_states,
    "padded rows": padded_states,
    "packed rows": packed_states,
    "one row per sequence": row_states,
}


class Work:
    """A model with its data, and every implementation as a step that leaves gradients behind."""

    def __init__(self, case: Case, quick: bool, dtype: torch.dtype = torch.float32) -> None:
        self.case = case
        self.model = build_model(quick, dtype)
        self.groups = make_groups(case, self.model.config.vocab_size)
        self.trained = make_trained(self.groups, self.model)
        # At a learning rate of 0 the optimizer does all its work and the weights stay.
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0, weight_decay=0.0)

    def backward(self, name: str) -> tuple[float, float]:
        """The loss, and seconds in the head; gradients are added to the parameters'."""
        total = in_head = 0.0
        for states, part in STATES[name](self.model, self.groups):
            start = time.perf_counter()
            leaf = states.detach().requires_grad_()
            loss = self.loss(leaf, part)
            loss.backward()
            in_head += time.perf_counter() - start
            states.backward(leaf.grad)
            total += float(loss.detach())
        return total, in_head

    def loss(self, states: Tensor, part: slice) -> Tensor:
        """The share of some trained tokens in the loss."""
        ids, advantages, weights = (x[part] for x in self.trained)
        head = LMHead.from_model(self.model)
        return policy_loss(states, head, ids, advantages, weights, objective=OBJECTIVE).loss

    def update(self, name: str) -> Seconds:
        """One update, timed."""
        start = time.perf_counter()
        _, in_head = self.backward(name)
        in_trunk = time.perf_counter() - start - in_head
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.model.zero_grad(set_to_none=True)
        return Seconds(in_trunk, time.perf_counter() - start)

    def gradients(self, name: str) -> list[Tensor]:
        """Of every parameter, the loss first."""
        loss, _ = self.backward(name)
        grads = [p.grad.clone() for p in self.model.parameters() if p.grad is not None]
        self.model.zero_grad(set_to_none=True)
        return [torch.tensor(loss), *grads]


def errors_of(case: Case, quick: bool, work: Work) -> dict[str, float]:
    """Largest error of the loss and of any gradient, relative to the largest value of its tensor,
    against one forward pass per sequence in float64.
    """
    truth = Work(case, quick, torch.float64).gradients("one row per sequence")
    found = {}
    for name in STATES:
        pairs = zip(work.gradients(name), truth, strict=True)
        found[name] = max(float((x.double() - y).abs().max() / y.abs().max()) for x, y in pairs)
    return found


def peak_of(case: Case, quick: bool, name: str) -> int:
    """Peak bytes beyond weights, gradients and optimizer states, in this process."""
    work = Work(case, quick)
    for parameter in work.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    groups, trained = work.groups, work.trained
    small = make_groups(Case(1, 64, 16, 2), work.model.config.vocab_size)

    def step() -> None:
        work.backward(name)

    def use_all() -> None:
        work.groups, work.trained = groups, trained

    # The first call only loads libraries and starts threads, which a small group does as well.
    work.groups, work.trained = small, make_trained(small, work.model)
    return peak_on_cpu(step, use_all)


def flops_of(work: Work, shares: bool) -> tuple[float, float]:
    """Floating-point operations of the trunk and of the update, optimizer aside, from counts.

    A token takes 2 operations for each weight of a layer; a (query, key) pair 4 for each element of
    a head, in each layer; a trained token 2 for each weight of the head. Backward is twice forward.
    """
    config = work.model.config
    num_tokens = num_pairs = num_rows = 0
    for group in work.groups:
        lengths = [len(c) - 1 for c in group.completions]
        prompt = len(group.prompt)
        copies = 1 if shares and plan_of(work.groups).token_ratio > 1 else len(lengths)
        num_tokens += copies * prompt + sum(lengths)
        num_pairs += copies * prompt * (prompt + 1) // 2
        num_pairs += sum(x * prompt + x * (x + 1) // 2 for x in lengths)
        num_rows += sum(x + 1 for x in lengths)
    layers = sum(p.numel() for p in work.model.model.layers.parameters())
    width = config.num_attention_heads * config.head_dim
    trunk = 3 * (2 * layers * num_tokens + 4 * width * config.num_hidden_layers * num_pairs)
    return trunk, trunk + 3 * 2 * config.vocab_size * config.hidden_size * num_rows


def measure(case: Case, quick: bool) -> list[Row]:
    """Check, measure memory, time; printed with the ratios that counts of operations predict."""
    work = Work(case, quick)
    errors = errors_of(case, quick, work)
    peaks = {name: in_fresh_process(peak_of, case, quick, name) for name in STATES}
    times: dict[str, list[Seconds]] = {name: [] for name in STATES}
    shuffle = random.Random(0).shuffle
    for _ in range(NUM_ROUNDS if case.num_generations > 1 else NUM_CLOSE_ROUNDS):
        order = list(STATES)
        shuffle(order)
        for name in order:
            times[name].append(work.update(name))
    where, rows = environment("cpu"), []
    for index, part in enumerate(Seconds._fields):
        done = {name: flops_of(work, shares=name.startswith(OURS))[index] for name in STATES}
        found = [
            row_of(
                f"{part} {case}", name, errors[name], peaks[name] if part == "update" else None,
                quantiles([1000 * seconds[index] for seconds in times[name]]), where,
                flops=done[name],
            )
            for name in STATES
        ]  # fmt: skip
        print_table(found)
        ratio = done["padded rows"] / done[f"{OURS} shared prefix"]
        print(f"token ratio {plan_of(work.groups).token_ratio:.2f}, FLOP ratio {ratio:.2f}")
        sys.stdout.flush()
        rows += found
    return rows


def row_of(
    case: str, name: str, error: float, peak: int | None, timing: Timing, where: dict[str, str], *,
    flops: float,
) -> Row:  # fmt: skip
    """The result of one implementation; its operations are those it cannot do without."""
    return Row(
        case=case, implementation=name, correct=error <= MAX_ERROR, environment=where,
        p20_ms=timing.p20, p50_ms=timing.p50, p80_ms=timing.p80, peak_bytes=peak,
        tflops=flops / timing.p50 / 1e9, weight_grad_error=error,
    )  # fmt: skip


def main() -> int:
    """1 where our implementation is not correct."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, to try the benchmark")
    parser.add_argument("--json", type=Path, help="write the rows here, after every case")
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    args = parser.parse_args()
    rows: list[Row] = []
    for case in make_cases(args.quick):
        if args.only in str(case):
            rows += measure(case, args.quick)
            write_json(args.json, rows)
    return exit_status(rows)


if __name__ == "__main__":
    sys.exit(main())
