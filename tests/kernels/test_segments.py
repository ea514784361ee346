"""Segments against a brute-force walk up the parents."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrl_kernels import Segments, make_segments
from fastrl_kernels.segment_attention.tiles import Sizes, make_tiles


def random_forest(generator: torch.Generator, num_segments: int) -> tuple[list[int], list[int]]:
    """Lengths (zero included) and parents of a random forest in depth-first preorder."""
    lengths, parents, path = [], [], []
    for segment in range(num_segments):
        depth = int(torch.randint(0, len(path) + 1, (), generator=generator))
        path = path[:depth]
        lengths.append(int(torch.randint(0, 6, (), generator=generator)))
        parents.append(path[-1] if path else -1)
        path.append(segment)
    return lengths, parents


def walk(lengths: list[int], parents: list[int], window: int | None) -> tuple[list, list]:
    """Visibility (N, N) and positions (N,) by listing the path of every token."""
    tokens = [(segment, i) for segment, length in enumerate(lengths) for i in range(length)]
    index = {token: n for n, token in enumerate(tokens)}
    visible = [[False] * len(tokens) for _ in tokens]
    positions = []
    for query, (segment, offset) in enumerate(tokens):
        path = [(segment, i) for i in range(offset + 1)]
        above = parents[segment]
        while above >= 0:
            path = [(above, i) for i in range(lengths[above])] + path
            above = parents[above]
        positions.append(len(path) - 1)
        for key in path if window is None else path[-window:]:
            visible[query][index[key]] = True
    return visible, positions


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("window", [None, 1, 4])
def test_visibility_and_positions_follow_the_path(seed: int, window: int | None) -> None:
    generator = torch.Generator().manual_seed(seed)
    lengths, parents = random_forest(generator, num_segments=11)
    segments = make_segments(lengths, torch.tensor(parents))
    visible, positions = walk(lengths, parents, window)
    num_tokens = sum(lengths)
    assert segments.num_tokens == num_tokens
    assert segments.num_segments == 11
    assert segments.positions.tolist() == positions
    expected = torch.tensor(visible, dtype=torch.bool).reshape(num_tokens, num_tokens)
    assert torch.equal(segments.visibility(window), expected)


@pytest.mark.parametrize("kind", ["random", "chain", "comb"])
def test_hundreds_of_segments_of_any_depth(kind: str) -> None:
    """Against a walk from every segment up to its root, one parent at a time."""
    generator = torch.Generator().manual_seed(0)
    lengths, parents = random_forest(generator, num_segments=400)
    if kind == "chain":
        parents = list(range(-1, 399))
    elif kind == "comb":  # every second segment is a leaf beside the rest of the chain
        parents = [-1, *(s - 1 if s % 2 else s - 2 for s in range(1, 400))]
        parents[2] = 0
    segments = make_segments(lengths, parents)
    ends, depths = [sum(lengths[: s + 1]) for s in range(400)], [0] * 400
    for segment in range(400):
        above = parents[segment]
        while above >= 0:
            depths[segment] += lengths[above]
            ends[above] = max(ends[above], sum(lengths[: segment + 1]))
            above = parents[above]
    assert segments.subtree_ends.tolist() == ends
    assert segments.depths.tolist() == depths
    in_order = [depths[s] + i for s, length in enumerate(lengths) for i in range(length)]
    assert segments.positions.tolist() == in_order


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(-1, 6), max_size=7))
def test_refused_where_segments_are_not_in_preorder(parents: list[int]) -> None:
    """Every small list of parents: what is accepted continues the path of the one before it."""
    path: list[int] = []
    is_forest = True
    for segment, parent in enumerate(parents):
        is_forest &= parent == -1 or parent in path
        path = [*path[: path.index(parent) + 1 if parent in path else 0], segment]
    if is_forest:
        assert make_segments([1] * len(parents), parents).parents.tolist() == parents
    else:
        with pytest.raises(ValueError, match=r"in depth-first preorder|segment before it"):
            make_segments([1] * len(parents), parents)


def test_fields_of_one_prompt_with_two_completions_and_a_second_root() -> None:
    segments = make_segments([3, 2, 0, 1, 2], [-1, 0, 0, 0, -1])
    assert segments.starts.tolist() == [0, 3, 5, 5, 6]
    assert segments.subtree_ends.tolist() == [6, 5, 5, 6, 8]
    assert segments.ends.tolist() == [6, 6, 6, 5, 5, 6, 8, 8]
    assert segments.positions.tolist() == [0, 1, 2, 3, 4, 3, 0, 1]
    assert segments.ends.dtype == torch.int32
    assert segments.positions.dtype == torch.int64


@pytest.mark.parametrize("lengths", [[], [0], [0, 0]])
def test_no_tokens(lengths: list[int]) -> None:
    segments = make_segments(lengths, [-1] * len(lengths))
    assert segments.num_tokens == 0
    assert segments.num_segments == len(lengths)
    assert segments.visibility().shape == (0, 0)


def test_same_forest_on_the_meta_device() -> None:
    segments = make_segments([3, 2], [-1, 0])
    moved = segments.to("meta")
    assert isinstance(moved, Segments)
    assert {moved.lengths.device.type, moved.ends.device.type} == {"meta"}
    assert moved != segments
    assert moved.host is segments.host is segments
    assert moved.to("meta") is moved


def test_tables_of_attention_are_made_without_reading_the_device() -> None:
    """Where nothing can be read at all, as on "meta": only the numbers that the CPU has help."""
    segments = make_segments([90, 70, 0, 50], [-1, 0, 0, 0])
    sizes = Sizes(None, num_groups=2, num_kv_heads=2, query_tile=16, key_tile=16, query_step=16,
                  num_programs=99)  # fmt: skip
    tables, expected = make_tiles(segments.to("meta"), sizes), make_tiles(segments, sizes)
    assert tables.num_slots == expected.num_slots > 0
    for table, like in zip(tables[:-1], expected[:-1], strict=True):
        assert isinstance(table, torch.Tensor)
        assert isinstance(like, torch.Tensor)
        assert (table.device.type, table.shape) == ("meta", like.shape)


@pytest.mark.parametrize(
    ("lengths", "parents", "message"),
    [
        ([1, 2], [-1], "one value per segment"),
        ([1, -2], [-1, 0], "zero or more"),
        ([1, 2], [-1, 1], "segment before it"),
        ([1, 2], [-1, -2], "segment before it"),
        ([1, 1, 1, 1], [-1, 0, -1, 0], "depth-first preorder"),
        ([1, 1, 1, 1], [-1, 0, 0, 1], "depth-first preorder"),
        (torch.tensor([1.0]), [-1], "integers"),
        ([1], torch.tensor([[-1]]), "integers"),
    ],
)
def test_bad_forests_raise(lengths: list, parents: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_segments(lengths, parents)


def test_bad_window_raises() -> None:
    with pytest.raises(ValueError, match="window"):
        make_segments([2], [-1]).visibility(0)
