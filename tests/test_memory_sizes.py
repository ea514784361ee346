"""The table of what fits on which card, in docs/memory.md, against what the planner says now."""

import dataclasses
import random
from pathlib import Path

import pytest

from fastrl.memory import sizes
from fastrl.memory.cards import CARDS
from fastrl.memory.knobs import Knobs
from fastrl.memory.search import leanest
from fastrl.memory.work import sizes_of

PAGE = Path(__file__).parent.parent / "docs" / "memory.md"


@pytest.fixture(scope="module")
def written():
    """What stands between the marks."""
    return sizes.between_marks(PAGE.read_text())


def cells(line):
    return tuple(cell.strip() for cell in line.strip("| ").split("|"))


def rows_of(written):
    lines = [cells(line) for line in written.splitlines() if line.startswith("|")]
    start = lines.index(sizes.header()) + 2
    return lines[start : start + len(list(sizes.cases()))]


def tokens(cell):
    """Of a cell; what is longer than every position counts as endless."""
    return {"all": 10**9, sizes.NONE: 0}[cell] if cell in ("all", sizes.NONE) else (
        int(cell.replace(",", ""))
    )  # fmt: skip


def test_a_cell_drawn_by_a_fixed_seed_is_what_the_planner_says(written):
    """The whole table takes minutes: `python -m fastrl.memory.sizes docs/memory.md` makes it."""
    found = rows_of(written)
    everything = list(sizes.cases())
    names = [(case.model, case.mode, str(case.num_generations)) for case in everything]
    assert [row[:3] for row in found] == names
    between = [
        (case, tokens(cell), CARDS[card].num_bytes)
        for case, row in zip(everything, found, strict=True)
        for cell, card in zip(row[3:], sizes.BY_SIZE.values(), strict=True)
        if 0 < tokens(cell) < 10**9
    ]
    case, context, limit = random.Random(10).choice(between)
    assert sizes.needed(case, context) <= limit < sizes.needed(case, context + sizes.STEP)


def test_all_but_the_numbers_is_as_the_module_has_it(written):
    assert sizes.document(rows_of(written)) == written


def test_more_memory_and_fewer_bytes_hold_longer_contexts(written):
    found = {row[:3]: [tokens(cell) for cell in row[3:]] for row in rows_of(written)}
    for (model, mode, group), contexts in found.items():
        assert contexts == sorted(contexts)
        leaner = found[model, {"full": "LoRA"}.get(mode, "NF4"), group]
        assert all(x <= y for x, y in zip(contexts, leaner, strict=True))
        fewer = found[model, mode, "8"]
        assert all(x <= y for x, y in zip(contexts, fewer, strict=True))


def test_the_settings_of_a_cell_are_among_those_of_fit():
    case = sizes.Case("Qwen3-0.6B", "full", 8)
    config = dataclasses.replace(sizes.config_of(case, 2048), max_tokens_per_pass=8192)
    knobs = Knobs(config, sizes_of(config), "cuda", fixed=frozenset({"mlp_chunk_size"}))
    everything = {candidate.settings for candidate in knobs.candidates()}
    for is_least, in_backward in ((True, "off"), (False, "two_phase")):
        way = leanest(knobs, is_least=is_least)
        assert way._replace(optimizer="adamw_offload", in_backward=in_backward) in everything
