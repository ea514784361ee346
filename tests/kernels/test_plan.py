"""The plan of a call: which engine, how many operations, and whether it stays in its workspace."""

import itertools
from typing import Any

import pytest
import torch

from fastrl_kernels import LMHead, explain
from fastrl_kernels.plan import MIB, Shape, hidden_block, shape_of
from tests.kernels.policy_cases import make_case, random_nf4, run

FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16


def on_meta(
    num_tokens: int, hidden_size: int, vocab_size: int, *, rank: int = 0,
    dtype: torch.dtype = FLOAT32, hidden: bool = True, weight: bool = True, adapter: bool = True,
    **fields: Any,
) -> tuple[torch.Tensor, LMHead]:  # fmt: skip
    """Inputs without memory, of which some are trained."""

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    head = LMHead(empty(vocab_size, hidden_size).requires_grad_(weight), **fields)
    if rank:
        halves = (empty(rank, hidden_size), empty(vocab_size, rank))
        lora_a, lora_b = (half.requires_grad_(adapter) for half in halves)
        head = head._replace(lora_a=lora_a, lora_b=lora_b)
    return empty(num_tokens, hidden_size).requires_grad_(hidden), head


# 2 S V D = 210 operations a product with the head, 2 S (V + D) r = 200 a pass of the adapter.


@pytest.mark.parametrize(
    ("engine", "settings", "flops"),
    [
        ("one_pass", {"hidden": False, "weight": False}, 210),
        ("one_pass", {}, 3 * 210),
        ("one_pass", {"weight": False}, 2 * 210),
        ("one_pass", {"hidden": False}, 2 * 210),
        ("min_memory", {}, 4 * 210),
        ("min_memory", {"weight": False}, 3 * 210),
        ("min_memory", {"hidden": False, "weight": False}, 210),
        ("one_pass", {"rank": 2}, 3 * 210 + 3 * 200),
        ("min_memory", {"rank": 2}, 4 * 210 + 4 * 200),
        ("one_pass", {"rank": 2, "weight": False}, 2 * 210 + 3 * 200),
        ("one_pass", {"rank": 2, "hidden": False, "weight": False, "adapter": False}, 210 + 200),
        ("one_pass", {"vocab_size": 11, "fields": {"vocab_size": 7}}, 3 * 210),
    ],
)
def test_operations(engine: str, settings: dict[str, Any], flops: int) -> None:
    settings = dict(settings)
    fields = settings.pop("fields", {})
    head_size = settings.pop("vocab_size", 7)
    hidden, head = on_meta(5, 3, head_size, **settings)
    plan = explain(hidden, head._replace(**fields), engine=engine)
    assert plan.flops == flops
    assert plan.engine == (engine if hidden.requires_grad or flops > 410 else "forward")


def test_operations_of_hidden_gradients_block_by_block() -> None:
    """Half-precision sums of all rows would not fit, so the logits are made once more."""
    hidden, head = on_meta(4096, 128, 1000, dtype=BFLOAT16)
    for workspace_mb, num_products in ((64, 4), (2, 5)):
        plan = explain(hidden, head, engine="min_memory", workspace_mb=workspace_mb)
        assert plan.flops == num_products * 2 * 4096 * 128 * 1000
    shape = shape_of(hidden, head)
    assert hidden_block(shape, 64 * MIB) == 4096
    assert hidden_block(shape, 2 * MIB) == 2 * MIB // 4 // (128 * 4) == 1024
    assert hidden_block(shape._replace(dtype=FLOAT32), 2 * MIB) == 4096
    frozen = explain(*on_meta(4096, 128, 1000, dtype=BFLOAT16, weight=False), workspace_mb=2,
                     engine="min_memory")  # fmt: skip
    assert frozen.flops == 3 * 2 * 4096 * 128 * 1000


def test_auto_takes_min_memory_where_float32_sums_do_not_fit() -> None:
    """32000 x 1024 of them are 125 MiB."""
    inputs = on_meta(4096, 1024, 32000, dtype=BFLOAT16)
    sums = 32000 * 1024 * 4 / MIB
    for workspace_mb, engine in ((64, "min_memory"), (sums, "min_memory"), (256, "one_pass")):
        plan = explain(*inputs, workspace_mb=workspace_mb)
        assert plan.engine == engine
        assert plan.workspace_bytes <= workspace_mb * MIB
    assert explain(*inputs, workspace_mb=256).workspace_bytes > sums * MIB
    with pytest.raises(ValueError, match="workspace_mb"):
        explain(*inputs, workspace_mb=64, engine="one_pass")


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
@pytest.mark.parametrize("workspace_mb", [32, 64, 256, 1024])
def test_auto_takes_one_pass_for_a_frozen_head(dtype: torch.dtype, workspace_mb: float) -> None:
    inputs = on_meta(4096, 1024, 32000, dtype=dtype, weight=False)
    assert explain(*inputs, workspace_mb=workspace_mb).engine == "one_pass"


def test_auto_takes_one_pass_for_a_head_in_four_bits() -> None:
    case = make_case(0)
    weight, _ = random_nf4()
    hidden = case.hidden_states.requires_grad_()
    plan = explain(hidden, LMHead(weight), workspace_mb=0.2)
    assert plan.engine == "one_pass"
    assert plan.flops == 2 * explain(hidden.detach(), LMHead(weight)).flops


@pytest.mark.parametrize("trained", ["hidden", "weight", "adapter"])
def test_what_is_trained_is_read_off_the_tensors(trained: str) -> None:
    parts = dict.fromkeys(("hidden", "weight", "adapter"), False) | {trained: True}
    inputs = on_meta(5, 3, 7, rank=2, **parts)
    for engine in ("one_pass", "min_memory"):
        assert explain(*inputs, engine=engine).engine == engine
    nothing = on_meta(5, 3, 7, rank=2, **dict.fromkeys(parts, False))
    for engine in ("one_pass", "min_memory", "auto"):
        assert explain(*nothing, engine=engine).engine == "forward"


def test_calls_do_what_the_plan_says() -> None:
    """One backward through one_pass, any number through min_memory."""
    case = make_case(1).to(BFLOAT16)
    engines = set()
    for workspace_mb in (0.1, 0.2, 0.3, 1, 256):
        case.leaves()
        plan = explain(case.hidden_states, case.head, workspace_mb=workspace_mb)
        engines.add(plan.engine)
        loss = run(case, workspace_mb=workspace_mb).loss
        loss.backward(retain_graph=True)
        if plan.engine == "min_memory":
            loss.backward()
        else:
            with pytest.raises(RuntimeError, match="once"):
                loss.backward()
    assert engines == {"one_pass", "min_memory"}


def test_plan_of_meta_tensors_is_that_of_real_ones() -> None:
    case = make_case(2)
    case.leaves()
    head = LMHead(*(x.to("meta") if isinstance(x, torch.Tensor) else x for x in case.head))
    for engine in ("one_pass", "min_memory", "auto"):
        for workspace_mb in (0.1, 0.3, 4):
            settings: dict[str, Any] = {"engine": engine, "workspace_mb": workspace_mb}
            real = explain(case.hidden_states, case.head, **settings)
            assert explain(case.hidden_states.to("meta"), head, **settings) == real


def test_gradient_bytes() -> None:
    hidden, head = on_meta(5, 3, 7, dtype=BFLOAT16)
    assert explain(hidden, head, engine="one_pass").gradient_bytes == 2 * (5 * 3 + 7 * 3)
    frozen = on_meta(5, 3, 7, weight=False)
    assert explain(*frozen, engine="min_memory").gradient_bytes == 4 * 5 * 3
    assert explain(hidden.detach(), head.weight.detach()).gradient_bytes == 0  # type: ignore


SIZES = itertools.product((1, 257, 16384), (19, 896, 4096), (123, 32000, 151936), (0, 3, 64))
SHAPES = [sizes for sizes in SIZES if sizes[3] < sizes[1]]


def plans(workspace_mb: float, engine: str) -> list[tuple[float, Any]]:
    """Workspaces and plans of many shapes; those of the message where the first is too small."""
    found = []
    for (num_tokens, hidden_size, vocab_size, rank), dtype, weight, batch_invariant in (
        itertools.product(SHAPES, (FLOAT32, BFLOAT16), (True, False), (True, False))
    ):  # fmt: skip
        inputs = on_meta(num_tokens, hidden_size, vocab_size, rank=rank, dtype=dtype, weight=weight)
        settings: dict[str, Any] = {"engine": engine, "batch_invariant": batch_invariant}
        try:
            found.append((workspace_mb, explain(*inputs, workspace_mb=workspace_mb, **settings)))
        except ValueError as error:
            enough = float(str(error).rsplit(" ", 1)[1])
            found.append((enough, explain(*inputs, workspace_mb=enough, **settings)))
    return found


@pytest.mark.parametrize("engine", ["auto", "one_pass", "min_memory"])
@pytest.mark.parametrize("workspace_mb", [8, 64, 256])
def test_plans_stay_inside_the_workspace(workspace_mb: float, engine: str) -> None:
    for given, plan in plans(workspace_mb, engine):
        assert plan.workspace_bytes <= given * MIB
        assert plan.rows >= 1
        assert plan.columns >= 1


@pytest.mark.parametrize("workspace_mb", [0.25, 1, 4])
def test_adapters_wider_than_the_hidden_states_stay_inside_too(workspace_mb: float) -> None:
    vocab_size = {0.25: 123, 1: 32000, 4: 151936}[workspace_mb]
    inputs = on_meta(16384, 19, vocab_size, rank=64, dtype=BFLOAT16)
    plan = explain(*inputs, engine="min_memory", workspace_mb=workspace_mb)
    assert plan.workspace_bytes <= workspace_mb * MIB


@pytest.mark.parametrize(
    ("hidden_size", "vocab_size", "rank", "workspace_mb"),
    [(896, 123, 64, 1), (4096, 32000, 64, 4), (19, 123, 3, 0.0358)],
)
def test_the_smallest_workspaces_hold_the_backward_too(
    hidden_size: int, vocab_size: int, rank: int, workspace_mb: float
) -> None:
    inputs = on_meta(257, hidden_size, vocab_size, rank=rank, dtype=BFLOAT16)
    with pytest.raises(ValueError, match="give it at least") as error:
        explain(*inputs, engine="min_memory", workspace_mb=workspace_mb)
    enough = float(str(error.value).rsplit(" ", 1)[1])
    plan = explain(*inputs, engine="min_memory", workspace_mb=enough)
    assert plan.workspace_bytes <= enough * MIB


@pytest.mark.parametrize("engine", ["auto", "one_pass", "min_memory"])
def test_a_workspace_that_is_far_too_small_names_one_that_works(engine: str) -> None:
    for _, plan in plans(0.001, engine):
        assert plan.rows >= 1


def test_errors() -> None:
    case = make_case(3)
    with pytest.raises(ValueError, match="auto, one_pass, min_memory"):
        explain(case.hidden_states, case.head, engine="forward")
    for engine in ("auto", "one_pass", "min_memory"):
        case.leaves()
        with pytest.raises(ValueError, match="one row of 123 logits"):
            explain(case.hidden_states, case.head, engine=engine, workspace_mb=0.01)


def test_shape_of_a_head_in_four_bits() -> None:
    weight, _ = random_nf4()
    case = make_case(4)
    shape = shape_of(case.hidden_states, LMHead(weight, vocab_size=117))
    assert shape == Shape(39, 19, 117, 0, torch.float64, False, False, "cpu")
