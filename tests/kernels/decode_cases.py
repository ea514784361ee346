"""Inputs of decode attention, with NaN in every column that must not be read.

R rows, P groups, H heads, Hkv key-value heads, K head size of queries and keys, Kv of values, L
prefix columns, C suffix columns.
"""

from typing import Any

import torch
from torch import Tensor

# Rows of each group: some, none, many, one. Tokens of each prefix: all columns, none, one, some.
ROWS = (3, 0, 5, 1)
LENGTHS = (37, 12, 1, 0)


def make_case(
    rows: tuple[int, ...] = ROWS,
    lengths: tuple[int, ...] = LENGTHS,
    *,
    heads: tuple[int, int] = (6, 2),
    sizes: tuple[int, int] = (13, 7),
    columns: tuple[int, int] = (37, 19),
    suffix_length: int = 11,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> tuple[list[Tensor], dict[str, Any]]:
    """The five tensors, and the keywords that say where their tokens are."""
    generator = torch.Generator().manual_seed(seed)
    num_rows, num_groups = sum(rows), len(rows)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    tensors = [normal(num_rows, heads[0], sizes[0])]
    tensors += [normal(num_groups, heads[1], columns[0], size) for size in sizes]
    tensors += [normal(num_rows, heads[1], columns[1], size) for size in sizes]
    for x in tensors[1:3]:
        for group, length in enumerate(lengths):
            x[group, :, length:] = torch.nan
    for x in tensors[3:]:
        x[:, :, suffix_length:] = torch.nan
    groups = torch.repeat_interleave(torch.tensor(rows))
    where = {
        "row_groups": groups.int(),
        "prefix_lengths": torch.tensor(lengths, dtype=torch.int32),
        "suffix_length": suffix_length,
    }
    return [x.to(dtype) for x in tensors], where


def with_sinks(options: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The options with their list of sinks as a tensor."""
    return {k: torch.tensor(v, dtype=dtype) if k == "sinks" else v for k, v in options.items()}


SINKS = [-2.0, 0.5, 3.0, 0.0, -1.0, 1.0]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"scale": 0.7},
    {"window": 5},  # inside the suffix
    {"window": 11},  # exactly the suffix
    {"window": 17},  # the end of each prefix
    {"window": 1000},
    {"softcap": 1.5},
    {"sinks": SINKS},
    {"softcap": 2.0, "window": 20, "sinks": SINKS, "scale": -1.3},
]
