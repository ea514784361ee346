"""The bare matrix products that an update cannot do without, as a call of their own.

Legend: N tokens of a pass, S trained ones, V vocabulary, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastrl.bench.estimates import Pass
from fastrl.bench.measuring import time_one
from fastrl.bench.models import Blueprint

HEAD_ROWS = 4096  # of logits that exist at a time
TRIAL_FLOPS = 2e9  # of a product that is worth timing, as far as so many tokens have them:
TRIAL_TOKENS = range(256, 8192)


class Products(NamedTuple):
    """Shapes of one pass: activations (tokens, columns) times the weight (rows, columns)."""

    num_tokens: int
    rows: int
    columns: int
    is_trained: bool

    @property
    def flops(self) -> int:
        """Forward, gradient of the activations, gradient of a trained weight."""
        return (4 + 2 * self.is_trained) * self.num_tokens * self.rows * self.columns


def products_of(blueprint: Blueprint, passes: Sequence[Pass]) -> list[Products]:
    """Of all weights of the layers with all tokens, and of the head with the trained ones."""
    found = []
    for one in passes:
        found += [
            Products(one.num_tokens, rows, columns, is_trained)
            for rows, columns, is_trained in blueprint.products
        ]
        for start in range(0, one.num_trained, HEAD_ROWS):
            rows = min(HEAD_ROWS, one.num_trained - start)
            found.append(
                Products(rows, blueprint.vocab_size, blueprint.hidden_size, blueprint.trains_head)
            )
    return found


def flops_of(blueprint: Blueprint, passes: Sequence[Pass]) -> int:
    """Of the products."""
    return sum(product.flops for product in products_of(blueprint, passes))


class Floor:
    """Runs the products on buffers that are made once and shared by all shapes."""

    def __init__(
        self, products: Sequence[Products], *, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.products = products
        largest = {
            "inputs": max(x.num_tokens * x.columns for x in products),
            "outputs": max(x.num_tokens * x.rows for x in products),
            "weights": max(x.rows * x.columns for x in products),
        }
        self.buffers = {
            name: torch.full((size,), 0.01, device=device, dtype=dtype)
            for name, size in largest.items()
        }
        self.results = {name: torch.empty_like(buffer) for name, buffer in self.buffers.items()}

    def __call__(self) -> None:
        """Every product once."""
        for shape in self.products:
            inputs = self._view(self.buffers, "inputs", shape.num_tokens, shape.columns)
            outputs = self._view(self.buffers, "outputs", shape.num_tokens, shape.rows)
            weight = self._view(self.buffers, "weights", shape.rows, shape.columns)
            made = self._view(self.results, "outputs", shape.num_tokens, shape.rows)
            torch.mm(inputs, weight.T, out=made)
            torch.mm(
                outputs, weight,
                out=self._view(self.results, "inputs", shape.num_tokens, shape.columns),
            )  # fmt: skip
            if shape.is_trained:
                torch.mm(
                    outputs.T, inputs,
                    out=self._view(self.results, "weights", shape.rows, shape.columns),
                )  # fmt: skip

    def _view(self, buffers: dict[str, Tensor], name: str, rows: int, columns: int) -> Tensor:
        return buffers[name][: rows * columns].view(rows, columns)


def flops_per_second(blueprint: Blueprint, *, device: torch.device, dtype: torch.dtype) -> float:
    """Of the largest product of the layers with a few tokens: the best of five calls."""
    rows, columns, _ = max(blueprint.products, key=lambda shape: shape[0] * shape[1])
    tokens = TRIAL_FLOPS / Products(1, rows, columns, True).flops
    num_tokens = int(min(max(tokens, TRIAL_TOKENS.start), TRIAL_TOKENS.stop))
    floor = Floor([Products(num_tokens, rows, columns, True)], device=device, dtype=dtype)
    best = min(time_one(floor, device) for _ in range(5))
    return 1000 * sum(product.flops for product in floor.products) / best
