"""What the tests of packing share: small tensors, and the slow meaning of a plan."""

from __future__ import annotations

import torch
from torch import Tensor

from fastrl.packing import Plan


def ids(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def bools(values: list[bool]) -> Tensor:
    return torch.tensor(values, dtype=torch.bool)


def check_paths(plan: Plan, expected: list[list[tuple[list[int], int]]]) -> None:
    """Every trained token is predicted from exactly its path: ids, positions and order.

    expected: for each completion the (tokens before, token) of its trained tokens, in order.
    """
    sees = plan.segments.visibility()
    assert plan.completion_lengths == tuple(len(tokens) for tokens in expected)
    assert plan.completion_index.tolist() == [
        index for index, tokens in enumerate(expected) for _ in tokens
    ]
    for sources, targets, tokens in zip(
        plan.scatter(plan.source_index), plan.scatter(plan.target_ids), expected, strict=True
    ):
        assert targets.tolist() == [token for _, token in tokens]
        for source, (path, _) in zip(sources.tolist(), tokens, strict=True):
            visible = sees[source].nonzero()[:, 0]
            assert visible[-1] == source
            assert plan.input_ids[visible].tolist() == path
            assert plan.position_ids[visible].tolist() == list(range(len(path)))
