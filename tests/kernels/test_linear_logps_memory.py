"""The heads never hold an (S, V) tensor, stay inside the workspace they declare, and skip work."""

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastrl_kernels import LMHead, linear_logps, policy_loss
from fastrl_kernels.chunks import Inputs
from fastrl_kernels.head import accumulation_dtype
from fastrl_kernels.linear_logps import chunked
from fastrl_kernels.linear_logps.op import head_gradients_op, linear_logps_op
from fastrl_kernels.objectives import Objective, clipped_ratio, policy_gradient
from fastrl_kernels.plan import MIB, explain, shape_of
from fastrl_kernels.policy_loss.one_pass import Tokens, one_pass
from fastrl_kernels.policy_loss.op import policy_loss_op
from fastrl_kernels.sweep import TokenSlopes, sweep
from fastrl_kernels.token_loss.op import token_loss_op

S, D, V, R = 131, 33, 1237, 5
PER_ROW = S * 128  # outputs, indices and slopes: a handful of numbers for each token


OPERATORS = {
    op._opoverload: op._init_fn
    for op in (linear_logps_op, head_gradients_op, policy_loss_op, token_loss_op)
}


class MemoryLog(TorchDispatchMode):
    """Largest tensor, most bytes alive at once, and multiplications, of all that runs inside."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.live = self.peak = self.num_products = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fastrl":  # look inside
            with self:
                return OPERATORS[func](*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        products = {torch.ops.aten.mm.default: 0, torch.ops.aten.mm.out: 0}
        products |= {torch.ops.aten.addmm_.default: 1}
        if func in products:
            left, right = args[products[func] :][:2]
            self.num_products += left.shape[0] * left.shape[1] * right.shape[1]
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


def make_case(dtype: torch.dtype, full: bool) -> tuple[Inputs, Tokens]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype).requires_grad_()

    head = LMHead(normal(V, D))
    if full:
        head = LMHead(normal(V, D), normal(V), normal(R, D), normal(V, R), softcap=9.0)
    target_ids = torch.randint(0, V, (S,), generator=generator)
    sums = accumulation_dtype(dtype)
    ones = torch.ones(S, dtype=sums)
    inputs = Inputs(normal(S, D), head, target_ids, ones)
    return inputs, Tokens(ones, ones / S, None, None, None)


def result_bytes(inputs: Inputs) -> int:
    """Of all gradients, and of the float32 sums of those of the head."""
    sums = accumulation_dtype(inputs.hidden_states.dtype).itemsize
    tensors = [x for x in (inputs.hidden_states, *inputs.head) if isinstance(x, Tensor)]
    return sum(x.numel() * (x.itemsize + sums) for x in tensors)


CASES = [
    (dtype, full, workspace_mb)
    for dtype in (torch.float32, torch.bfloat16, torch.float64)
    for full in (False, True)
    for workspace_mb in (0.5, 1, 2)
]


@pytest.mark.parametrize(("dtype", "full", "workspace_mb"), CASES)
@pytest.mark.parametrize("batch_invariant", [False, True])
def test_statistics_stay_inside_the_workspace(
    dtype: torch.dtype, full: bool, workspace_mb: float, batch_invariant: bool
) -> None:
    inputs, _ = make_case(dtype, full)
    detached = LMHead(*(x.detach() if isinstance(x, Tensor) else x for x in inputs.head))
    plan = explain(
        inputs.hidden_states.detach(), detached, workspace_mb=workspace_mb,
        batch_invariant=batch_invariant,
    )  # fmt: skip
    assert plan.engine == "forward"
    assert plan.workspace_bytes <= workspace_mb * MIB
    assert plan.rows < S or workspace_mb == 2
    settings: dict[str, Any] = {"workspace_mb": workspace_mb, "batch_invariant": batch_invariant}
    with MemoryLog() as log, torch.no_grad():
        chunked.forward(inputs, **settings)
    assert plan.rows * V <= log.largest or workspace_mb == 2  # the log does see inside
    assert log.largest < S * V or plan.rows >= S
    assert log.peak <= plan.workspace_bytes + PER_ROW


@pytest.mark.parametrize(("dtype", "full", "workspace_mb"), CASES)
@pytest.mark.parametrize("batch_invariant", [False, True])
def test_min_memory_stays_inside_the_workspace(
    dtype: torch.dtype, full: bool, workspace_mb: float, batch_invariant: bool
) -> None:
    inputs, tokens = make_case(dtype, full)
    plan = explain(
        inputs.hidden_states, inputs.head, engine="min_memory", workspace_mb=workspace_mb,
        batch_invariant=batch_invariant,
    )  # fmt: skip
    settings: dict[str, Any] = {"workspace_mb": workspace_mb, "batch_invariant": batch_invariant}
    with torch.no_grad():
        out = chunked.forward(inputs, **settings)
        ones = tokens.advantages
        statistics = (out.logps, out.entropies, out.lse, out.residuals)
        slopes = TokenSlopes(ones, ones, *statistics)
        with MemoryLog() as log:
            grads = sweep(slopes, inputs, needs_grad=[True] * 5, **settings)
    results = sum(grad.numel() * grad.itemsize for grad in grads)
    assert plan.workspace_bytes <= workspace_mb * MIB
    assert log.peak <= plan.workspace_bytes + results + PER_ROW


@pytest.mark.parametrize(("dtype", "full", "workspace_mb"), CASES)
def test_one_pass_stays_inside_the_workspace(
    dtype: torch.dtype, full: bool, workspace_mb: float
) -> None:
    inputs, tokens = make_case(dtype, full)
    plan = explain(inputs.hidden_states, inputs.head, engine="one_pass", workspace_mb=workspace_mb)
    assert plan.workspace_bytes <= workspace_mb * MIB
    with torch.no_grad(), MemoryLog() as log:
        one_pass(
            inputs, tokens, Objective(policy_gradient), 0.01, needs_grad=[True] * 5,
            workspace_mb=workspace_mb, batch_invariant=False,
        )  # fmt: skip
    assert log.largest < S * V or plan.rows >= S
    assert log.peak <= plan.workspace_bytes + result_bytes(inputs) + PER_ROW


@pytest.mark.parametrize("needs_grad", [[True, True], [True, False], [False, True]])
@pytest.mark.parametrize("engine", ["one_pass", "min_memory"])
def test_work_is_that_of_the_rows_with_a_gradient(needs_grad: list[bool], engine: str) -> None:
    """2 SVD for all rows; for those with a gradient 2 SVD each, and 2 more to make logits again."""
    inputs, tokens = make_case(torch.float32, full=False)
    advantages = torch.zeros(S)
    advantages[::11] = 1.0
    num_active = int(advantages.sum())
    hidden = inputs.hidden_states.requires_grad_(needs_grad[0])
    weight = inputs.head.weight.requires_grad_(needs_grad[1])  # type: ignore[union-attr]
    with MemoryLog() as log:
        out = policy_loss(
            hidden, weight, inputs.target_ids, advantages, tokens.weights, engine=engine,
            objective=Objective(policy_gradient), workspace_mb=1,
        )  # fmt: skip
        out.loss.backward()
    again = 1 if engine == "min_memory" else 0
    assert log.num_products == (S + num_active * (sum(needs_grad) + again)) * V * D
    assert torch.equal(out.slopes != 0, advantages != 0)


def test_clipped_rows_never_reach_the_products_of_the_backward() -> None:
    inputs, tokens = make_case(torch.float32, full=False)
    logps = linear_logps(
        inputs.hidden_states.detach(), inputs.head.weight.detach(), inputs.target_ids
    ).logps  # type: ignore[union-attr]
    old_logps = logps.clone()
    old_logps[5:] -= 1.0  # ratio e, above the bound, with a positive advantage
    with MemoryLog() as log:
        out = policy_loss(
            inputs.hidden_states, inputs.head, inputs.target_ids, torch.ones(S), tokens.weights,
            objective=Objective(clipped_ratio, (0.2, 0.28)), old_logps=old_logps, workspace_mb=1,
            engine="one_pass",
        )  # fmt: skip
        out.loss.backward()
    assert out.clipped.tolist() == [False] * 5 + [True] * (S - 5)
    assert log.num_products == (S + 2 * 5) * V * D


@pytest.mark.parametrize("engine", ["one_pass", "min_memory"])
def test_rows_that_are_known_not_to_count_cost_nothing(engine: str) -> None:
    inputs, tokens = make_case(torch.float32, full=False)
    inputs.target_ids[7:] = -1
    weights = tokens.weights.clone()
    weights[:3] = 0
    with MemoryLog() as log:
        out = policy_loss(
            inputs.hidden_states, inputs.head, inputs.target_ids, tokens.advantages, weights,
            objective=Objective(policy_gradient), workspace_mb=1, engine=engine,
        )  # fmt: skip
        out.loss.backward()
    assert log.num_products == (4 if engine == "min_memory" else 3) * 4 * V * D
    assert out.logps[7:].abs().max() == 0
    assert out.logps[:3].abs().max() == 0


def test_two_phases_of_a_sequence_level_objective() -> None:
    """2 SVD + 6 rho SVD: statistics of all rows, one pass over those with a coefficient."""
    inputs, tokens = make_case(torch.float32, full=False)
    with MemoryLog() as log:
        with torch.no_grad():
            logps = linear_logps(inputs.hidden_states, inputs.head, inputs.target_ids).logps
        chosen = torch.zeros(S)
        chosen[:10] = logps[:10].sigmoid()
        out = policy_loss(
            inputs.hidden_states, inputs.head, inputs.target_ids, chosen,
            tokens.weights * (chosen != 0), objective=Objective(policy_gradient),
        )  # fmt: skip
        out.loss.backward()
    assert log.num_products == (S + 3 * 10) * V * D


def test_shape_of_a_call_is_read_off_its_tensors() -> None:
    inputs, _ = make_case(torch.bfloat16, full=True)
    shape = shape_of(inputs.hidden_states, inputs.head)
    assert (shape.num_tokens, shape.hidden_size, shape.vocab_size, shape.rank) == (S, D, V, R)
    assert shape.trains_hidden
    assert shape.trains_weight
