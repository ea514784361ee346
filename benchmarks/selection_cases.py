"""The fifth of the tokens with the largest scores, of all or of each sequence, as a mask of them.

B sequences of C tokens each; scores look like entropies.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from cases import Loaders, Prepared
from implementations import load
from measure import Step
from reference import Errors
from torch import Tensor

RATIO = 0.2

Select = Callable[[Tensor], Tensor]
"""scores (B, C) -> bool (B, C), of every row alone"""


@dataclass(frozen=True)
class Tokens:
    """What a case is large in."""

    num_sequences: int
    length: int
    device: str
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        """As a case is named."""
        return f"B={self.num_sequences} C={self.length} {str(self.dtype).removeprefix('torch.')}"


@dataclass(frozen=True)
class SelectionCase:
    """A selection of one size."""

    shape: Tokens

    def __str__(self) -> str:
        """Name of the case in the results."""
        return f"select_tokens ratio={RATIO} {self.shape}"


def prepare(case: SelectionCase, only: str | None = None, kept: set[str] | None = None) -> Prepared:
    """Inputs and steps of a case: of all implementations, of those kept or of the one named."""
    shape = case.shape
    random = torch.Generator(shape.device).manual_seed(0)
    size = (shape.num_sequences, shape.length)
    scores = torch.randn(size, generator=random, device=shape.device).abs().to(shape.dtype)
    loaders = selection_loaders()
    if kept is not None:
        loaders = {name: loader for name, loader in loaders.items() if name in kept}
    if only is not None:
        loaders = {only: loaders[only]}
    mask = torch.empty(size, dtype=torch.bool, device=shape.device)
    return Prepared(
        steps={
            name: functools.partial(run, scores)
            for name, run in load(loaders, shape.device).functions.items()
        },
        leaves=(scores,),
        check=lambda found: compare(found, scores),
        make_floor=lambda: one_comparison(scores, mask),
        floor_name="one comparison",
        num_bytes=scores.nbytes + mask.nbytes,
        formulas="bytes = B C (e + 1): scores read, the mask written",
    )


def compare(found: Tensor, scores: Tensor) -> Errors:
    """As the error, how many tokens differ from the reference; no case tolerates one."""
    from fastrl_kernels.token_selection import select_tokens_reference

    expected = select_tokens_reference(scores.cpu(), ratio=RATIO, per="sequence")
    return Errors(logps=float((found.cpu() != expected).sum()))


def one_comparison(scores: Tensor, kept: Tensor) -> Step:
    """Reads the scores and writes the mask once."""
    return lambda: torch.gt(scores, 0.5, out=kept)


def selection_loaders() -> Loaders:
    """All implementations; those of PyTorch promise nothing about equal scores, but the sort."""
    return {
        "fastrl select_tokens": lambda device: fastrl_selection,
        "torch.topk": lambda device: by_topk,
        "torch.kthvalue": lambda device: by_kthvalue,
        "torch.sort": lambda device: by_sort,
    }


def fastrl_selection(scores: Tensor) -> Tensor:
    """`fastrl_kernels.select_tokens`."""
    from fastrl_kernels import select_tokens

    return select_tokens(scores, ratio=RATIO, per="sequence")


def by_topk(scores: Tensor) -> Tensor:
    """Indices of the largest, unsorted."""
    indices = scores.topk(number_kept(scores), dim=1, sorted=False).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, indices, True)


def by_kthvalue(scores: Tensor) -> Tensor:
    """The smallest score that is kept; of equal ones it keeps all."""
    place = scores.shape[1] - number_kept(scores) + 1
    return scores >= scores.kthvalue(place, dim=1, keepdim=True).values


def by_sort(scores: Tensor) -> Tensor:
    """The first of a stable sort."""
    order = scores.argsort(dim=1, descending=True, stable=True)[:, : number_kept(scores)]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, True)


def number_kept(scores: Tensor) -> int:
    """Of each row."""
    return max(1, int(RATIO * scores.shape[1] + 1e-9))
