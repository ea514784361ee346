"""The longest context on cards of every size: a table of docs/memory.md, and what others publish.

`python -m fastrl.memory.sizes` prints the table; `python -m fastrl.memory.sizes docs/memory.md`
writes it between its marks.

Every cell is the largest multiple of 256 tokens, prompt and completion, with which a plan stays
within what a card gives a process; `fastrl plan --fit` has the same knobs.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from fastrl.config import Config, DataConfig, ModelConfig, RolloutConfig
from fastrl.memory.cards import CARDS
from fastrl.memory.knobs import Knobs
from fastrl.memory.published import CONTEXTS, FIGURES, MODELS
from fastrl.memory.search import leanest
from fastrl.memory.survey import Survey
from fastrl.memory.work import sizes_of

MARKS = ("<!-- sizes:begin -->", "<!-- sizes:end -->")
BY_SIZE = {
    8: "rtx4060", 12: "rtx3060", 16: "rtx4060ti-16", 24: "rtx4090", 48: "l40s", 80: "h100",
}  # fmt: skip
"""Nominal GB, and the card whose usable memory counts."""
MODES = ("full", "LoRA", "NF4")
GROUPS = (8, 16)
PROMPT, STEP, RANK = 512, 256, 16
NONE = "-"

TEXT = """The longest context, prompt of {prompt} tokens and completion, that GRPO can train \
with, by card and with what `fastrl plan --fit` may set:
passes of one completion or of a whole step, recomputation with offload, small workspaces, \
AdamW's moments in the memory of the CPU, gradients freed in the
backward pass, room for one group's keys and values. Precision is split in all three modes; LoRA \
and NF4 have r = {rank} on all linear layers; G completions of one prompt a step.
Predicted, not measured, for what a card gives a process in GiB: {cards}. "all": the {positions:,} \
positions that the models have; "-": not even {least} tokens.
Made by `python -m fastrl.memory.sizes docs/memory.md`."""


class Case(NamedTuple):
    """A row of the table."""

    model: str
    mode: str
    num_generations: int


def cases() -> Iterator[Case]:
    """All rows."""
    for model in MODELS:
        for mode in MODES:
            yield from (Case(model, mode, G) for G in GROUPS)


def config_of(case: Case, context: int) -> Config:
    """The run of a row with that many tokens of prompt and completion."""
    return Config(
        model=ModelConfig(
            architecture=MODELS[case.model], device="cuda", precision="split",
            lora={} if case.mode == "full" else {"r": RANK}, load_in_4bit=case.mode == "NF4",
        ),
        rollout=RolloutConfig(
            num_generations=case.num_generations, max_prompt_length=PROMPT,
            max_completion_length=context - PROMPT,
        ),
        data=DataConfig(eval_size=8),
        prompts_per_step=1,
    )  # fmt: skip


@cache
def _surveyed(model: str, mode: str) -> Survey:
    config = config_of(Case(model, mode, GROUPS[0]), PROMPT + STEP)
    least = sizes_of(config).config.max_position_embeddings
    return Survey(dataclasses.replace(config, max_tokens_per_pass=2 * least), device="cuda")


@cache
def needed(case: Case, context: int) -> int:
    """Fewest bytes that a run with this context takes."""
    surveyed = _surveyed(case.model, case.mode)
    config = dataclasses.replace(config_of(case, context), max_tokens_per_pass=4 * context)
    knobs = Knobs(config, sizes_of(config), "cuda", fixed=frozenset({"mlp_chunk_size"}))
    ways = [leanest(knobs, is_least=True)]
    if case.mode == "full":  # without an adapter gradients matter
        ways.append(leanest(knobs, is_least=False)._replace(in_backward="two_phase"))
    lean = [way._replace(optimizer="adamw_offload").of(config) for way in ways]
    return min(surveyed.plan(x).needed for x in lean)


def longest_context(case: Case, num_bytes: int) -> int:
    """The largest multiple of STEP that fits, or 0. What a context needs grows nearly evenly, so
    the next one to look at is where a line between two known ones meets the limit.
    """
    low, high = PROMPT // STEP + 1, positions_of(case.model) // STEP
    if needed(case, STEP * low) > num_bytes:
        return 0
    if needed(case, STEP * high) <= num_bytes:
        return STEP * high
    while high - low > 1:
        below, above = (needed(case, STEP * end) for end in (low, high))
        guess = low + int((high - low) * (num_bytes - below) / (above - below))
        middle = min(max(guess, low + 1), high - 1)
        if needed(case, STEP * middle) <= num_bytes:
            low = middle
            if needed(case, STEP * (low + 1)) > num_bytes:
                return STEP * low
        else:
            high = middle
    return STEP * low


def positions_of(model: str) -> int:
    """Tokens that the model has positions for."""
    return int(MODELS[model]["max_position_embeddings"])


def row(case: Case) -> tuple[str, ...]:
    """A row of the table."""
    found = [longest_context(case, CARDS[card].num_bytes) for card in BY_SIZE.values()]
    all_of = positions_of(case.model) // STEP * STEP
    cells = (NONE if n == 0 else "all" if n == all_of else f"{n:,}" for n in found)
    return (case.model, case.mode, str(case.num_generations), *cells)


def header() -> tuple[str, ...]:
    """Of the table."""
    return ("model", "mode", "G", *(f"{size} GB" for size in BY_SIZE))


def document(rows: Iterable[Sequence[str]]) -> str:
    """Everything between the marks."""
    cards = ", ".join(f"{name} {CARDS[name].usable:.4g}" for name in BY_SIZE.values())
    text = TEXT.format(
        prompt=PROMPT,
        rank=RANK,
        cards=cards,
        least=PROMPT + STEP,
        positions=positions_of(next(iter(MODELS))),
    )
    claims = []
    for claim in CONTEXTS:
        contexts = (claim.contexts.get(size, "not published") for size in BY_SIZE)
        claims.append((claim.who, claim.what, *contexts, _link(claim.source)))
    figures = [(x.who, x.what, x.memory, _link(x.source)) for x in FIGURES]
    top = ("who", "what", *(f"{size} GB" for size in BY_SIZE), "source")
    return "\n\n".join([
        text,
        _table(header(), rows),
        "What others publish. TRL publishes no context by card. Unsloth's numbers by card are of "
        "supervised fine-tuning, which samples nothing and keeps no group's keys and values:",
        _table(top, claims),
        _table(("who", "what", "memory", "source"), figures),
    ])  # fmt: skip


def _link(address: str) -> str:
    return f"[{address.rstrip('/').rpartition('/')[2]}]({address})"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def between_marks(page: str) -> str:
    """What stands between them."""
    begin, end = MARKS
    return page.split(begin, 1)[1].split(end, 1)[0].strip()


def main(arguments: Sequence[str]) -> None:
    """Print the table, or put it into a page."""
    made = document([row(case) for case in cases()])
    if not arguments:
        print(made)
        return
    path = Path(arguments[0])
    page = path.read_text(encoding="utf-8")
    path.write_text(page.replace(between_marks(page), made), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
