"""linear_logps never holds an (S, V) tensor and stays inside the workspace it declares."""

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastrl_kernels import LMHead
from fastrl_kernels.linear_logps import chunked
from fastrl_kernels.linear_logps.plan import plan_for, round_up

S, D, V, R = 131, 33, 1237, 5


class MemoryLog(TorchDispatchMode):
    """Largest tensor, most bytes alive at once, and multiplications, of all that runs inside."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.live = self.peak = self.num_products = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.mm.default:
            self.num_products += args[0].shape[0] * args[0].shape[1] * args[1].shape[1]
        known = {x.untyped_storage()._cdata for x in tree_leaves(args) if isinstance(x, Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
                self.add(tensor.untyped_storage(), known)
        return out

    def add(self, storage: torch.UntypedStorage, known: set[int]) -> None:
        key = storage._cdata
        if key in known or key in self.seen:
            return
        self.seen.add(key)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self.drop, key, storage.nbytes())

    def drop(self, key: int, num_bytes: int) -> None:
        self.seen.discard(key)
        self.live -= num_bytes


def make_case(dtype: torch.dtype, full: bool) -> tuple[Tensor, LMHead, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    head = LMHead(normal(V, D))
    if full:
        head = LMHead(normal(V, D), normal(V), normal(R, D), normal(V, R), softcap=9.0)
    target_ids = torch.randint(0, V, (S,), generator=generator)
    temperatures = torch.ones(S, dtype=chunked.accumulation_dtype(dtype))
    return normal(S, D), head, target_ids, temperatures


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("workspace_mb", [0.25, 1, 2])
def test_peak_memory_is_the_workspace_and_the_results(
    dtype: torch.dtype, full: bool, workspace_mb: float
) -> None:
    hidden, head, target_ids, temperatures = make_case(dtype, full)
    plan = plan_for(hidden, head, workspace_mb)
    assert plan.workspace_bytes <= workspace_mb * 2**20
    assert plan.rows < S
    settings: dict[str, Any] = {"workspace_mb": workspace_mb, "batch_invariant": True}
    per_row = S * 64  # outputs, indices and slopes: a handful of numbers for each token

    with MemoryLog() as forward:
        out = chunked.forward(hidden, head, target_ids, temperatures, **settings)
    largest = round_up(plan.rows) * round_up(V), S * D, round_up(V) * round_up(D)
    assert forward.largest <= max(largest)
    assert plan.rows * V <= forward.largest  # the log does see inside
    assert forward.largest < S * V
    assert forward.peak <= plan.workspace_bytes + per_row

    slopes = torch.ones(S, dtype=temperatures.dtype)
    with MemoryLog() as backward:
        chunked.backward(
            slopes,
            slopes,
            out.entropies,
            hidden,
            head,
            target_ids,
            temperatures,
            needs_grad=[True] * 5,
            **settings,
        )
    tensors = [x for x in (hidden, *head) if isinstance(x, Tensor)]
    results = sum(x.numel() for x in tensors) * (slopes.itemsize + dtype.itemsize)
    assert backward.largest <= max(largest)
    assert backward.largest < S * V
    assert backward.peak <= plan.workspace_bytes + results + per_row


@pytest.mark.parametrize("needs_grad", [[True, True], [True, False], [False, True]])
def test_work_of_the_backward(needs_grad: list[bool]) -> None:
    hidden, head, target_ids, temperatures = make_case(torch.float32, full=False)
    slopes = torch.zeros(S)
    slopes[::11] = 1.0
    num_rows = len(slopes[::11])
    with MemoryLog() as log:
        chunked.backward(
            slopes,
            torch.zeros(S),
            torch.zeros(S),
            hidden,
            head,
            target_ids,
            temperatures,
            needs_grad=[*needs_grad, False, False, False],
            workspace_mb=1,
            batch_invariant=False,
        )
    expected = round_up(num_rows) * round_up(V) * round_up(D)
    assert log.num_products == expected * (1 + sum(needs_grad))


def test_work_of_the_forward_leaves_out_ignored_rows() -> None:
    hidden, head, target_ids, temperatures = make_case(torch.float32, full=False)
    target_ids[7:] = -1
    with MemoryLog() as log:
        chunked.forward(
            hidden, head, target_ids, temperatures, workspace_mb=1, batch_invariant=False
        )
    assert log.num_products == round_up(7) * round_up(V) * round_up(D)
