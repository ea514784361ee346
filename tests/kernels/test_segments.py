"""Segments against a brute-force walk up the parents."""

import pytest
import torch

from fastrl_kernels import Segments, make_segments


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
