"""Every entry point of the head at real sizes on a GPU that is not there, forward and backward.

What `dry_run` checks of every launch is not repeated here: grids, devices, strides, whether the
front end builds it, whether anything waits for the device. S tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from fastrl_kernels import (
    LMHead,
    linear_logps,
    policy_loss,
    select_tokens,
    selected_logps,
    token_loss,
)
from fastrl_kernels.adamw import Moments, Rates, adamw_step
from fastrl_kernels.head_logits import head_logits
from fastrl_kernels.head_workspace import bytes_inside
from fastrl_kernels.nf4 import NF4Weight
from fastrl_kernels.objectives import Objective, Regulariser, clipped_ratio, k3
from fastrl_kernels.plan import Shape
from tests.kernels.dry_run import DEVICE, MARKS, Run, Watch, dry_run

pytestmark = MARKS
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
QWEN, GEMMA = (16384, 151936, 4096), (16384, 262208, 2560)  # S, V, D; S V is beyond 2^31
SMALL = (1031, 5003, 200)
RANK = 24  # of adapters
OBJECTIVE = Objective(clipped_ratio, (0.2, 0.28), (Regulariser(k3, 0.04),))
GATHER, CUBLAS, MIN_MEMORY = ("one_pass", "gather"), ("one_pass", "cublas"), ("min_memory", "auto")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    with dry_run(monkeypatch) as found:
        yield found


def empty(*shape: int, dtype: torch.dtype = FP32, trains: bool = False) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device=DEVICE, requires_grad=trains)


def make_head(vocab_size: int, width: int, dtype: torch.dtype, what: str = "") -> LMHead:
    """A head with the parts that are named."""
    head = LMHead(empty(vocab_size, width, dtype=dtype, trains=True))
    if "nf4" in what:
        count = vocab_size * width
        packed, blocks = empty(count // 2, dtype=torch.uint8), empty(-(-count // 64))
        weight = NF4Weight(packed, blocks, empty(16), 64, vocab_size, width, dtype)
        head = head._replace(weight=weight)
    if "lora" in what:
        own = FP32 if "wide" in what else dtype  # PEFT keeps adapters in float32
        lora_a = empty(RANK, width, dtype=own, trains=True)
        lora_b = empty(vocab_size, RANK, dtype=own, trains=True)
        head = head._replace(lora_a=lora_a, lora_b=lora_b, lora_scale=2.0)
    if "bias" in what:
        head = head._replace(bias=empty(vocab_size, dtype=dtype, trains=True))
    if "softcap" in what:
        head = head._replace(softcap=30.0, vocab_size=vocab_size - 3)
    return head


def call_policy_loss(
    sizes: tuple[int, int, int], dtype: torch.dtype, engine: tuple[str, str], what: str = "",
    **settings: Any,
) -> None:  # fmt: skip
    num_tokens, vocab_size, width = sizes
    per_token = [empty(num_tokens) for _ in range(5)]
    out = policy_loss(
        empty(num_tokens, width, dtype=dtype, trains=True),
        make_head(vocab_size, width, dtype, what), empty(num_tokens, dtype=torch.int64),
        *per_token[:2], old_logps=per_token[2], ref_logps=per_token[3],
        rollout_weights=per_token[4], engine=engine[0], products=engine[1],
        **{"objective": OBJECTIVE, "workspace_mb": 8192, **settings},
    )  # fmt: skip
    assert out.logps.shape == (num_tokens,)


@pytest.mark.parametrize(
    ("sizes", "dtype", "engine", "kernels"),
    [
        (QWEN, BF16, GATHER, {"logits", "fix_up", "active_slots", "hidden_gradients"}),
        (GEMMA, BF16, CUBLAS, {"stored_logits", "fix_up"}),
        (GEMMA, FP16, GATHER, {"logits", "fix_up", "gradients", "weight_gradients"}),
        (QWEN, FP32, CUBLAS, {"stored_logits", "fix_up"}),
        ((4096, *QWEN[1:]), BF16, MIN_MEMORY,
         {"logits", "statistics", "token_losses", "slice_gradients"}),
    ],
)  # fmt: skip
def test_policy_loss(run, sizes, dtype, engine, kernels):
    call_policy_loss(sizes, dtype, engine)
    run.backward()
    assert {f"{name}_kernel" for name in kernels} <= run.counts().keys()


@pytest.mark.parametrize("engine", [GATHER, CUBLAS, MIN_MEMORY])
@pytest.mark.parametrize(
    ("what", "dtype"),
    [("lora bias softcap", BF16), ("wide lora", BF16), ("nf4 lora", BF16), ("nf4 bias", FP32)],
)
def test_policy_loss_of_every_head(run, engine, what, dtype):
    call_policy_loss(SMALL, dtype, engine, what, entropy_coef=0.01, workspace_mb=512)
    run.backward()
    assert run.launches
    # What an adapter's first half gives is summed up in float32, and goes into the second as it is.
    assert all(RANK not in shape for shape in run.rounded)


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("engine", ["one_pass", "min_memory"])
def test_policy_loss_without_kernels(run, dtype, engine):
    """Gradients of logits are rounded where bfloat16 has room for them, and float16 has not."""
    call_policy_loss(SMALL, dtype, (engine, "auto"), "lora bias", implementation="torch")
    run.backward()
    assert not run.launches
    num_tokens = SMALL[0]
    is_of_logits = [num_tokens in shape and max(shape) > num_tokens for shape in run.rounded]
    assert any(is_of_logits) == (dtype == BF16)
    assert all(RANK not in shape for shape in run.rounded)


@pytest.mark.parametrize("engine", [GATHER, CUBLAS, MIN_MEMORY])
@pytest.mark.parametrize("what", ["", "wide lora bias"])
def test_memory_stays_inside_the_workspace(run, engine, what):
    """Gradients apart; as tests/kernels/test_kernels_on_gpu.py measures it."""
    sizes = num_tokens, vocab_size, width = 12000, 32768, 2048
    workspace_mb = 96 if engine is MIN_MEMORY else 1024
    call_policy_loss(sizes, BF16, engine, what, workspace_mb=workspace_mb)
    run.backward()
    gradients = 2 * (num_tokens + vocab_size) * width
    if what:
        gradients += 2 * vocab_size + 4 * RANK * (vocab_size + width)
    assert run.peak_bytes <= workspace_mb * 2**20 + gradients + 64 * num_tokens


@pytest.mark.parametrize("what", ["", "lora"])
@pytest.mark.parametrize("sizes", [(8192, 151936, 1024), (16384, 32000, 4096)])
def test_memory_inside_is_what_a_plan_says(run, sizes, what):
    """`bytes_inside`, of which plans of whole steps are made: no less, and hardly more."""
    call_policy_loss(sizes, BF16, GATHER, what, workspace_mb=2048)
    (outputs,) = [out for _, _, out in run.calls]
    inside = run.peak_bytes - sum(x.nbytes for x in outputs)
    rank = RANK if what else 0
    shape = Shape(sizes[0], sizes[2], sizes[1], rank, BF16, device="cuda")
    planned = bytes_inside("one_pass", shape, 2048, needs_grad=[True] * 5)
    assert 0.98 * planned <= inside <= 1.02 * planned


@pytest.mark.parametrize("engine", [GATHER, MIN_MEMORY])
def test_policy_loss_with_settings_of_every_kind(run, engine):
    """Numbers of each token, the gradient into `weight.grad`, rows alike in any batch."""
    num_tokens = SMALL[0]
    objective = Objective(clipped_ratio, (empty(num_tokens), 0.28), (Regulariser(k3, empty(1)),))
    call_policy_loss(
        SMALL, FP16, engine, objective=objective, entropy_coef=empty(num_tokens),
        temperature=empty(num_tokens), accumulate_grad=True, batch_invariant=True,
        workspace_mb=512,
    )  # fmt: skip
    run.backward()
    assert run.launches


@pytest.mark.parametrize("engine", [GATHER, CUBLAS, MIN_MEMORY])
def test_tensors_that_are_parts_of_others(run, engine):
    """Rows apart, a transposed weight, numbers that are columns or one for all."""
    num_tokens, vocab_size, width = SMALL
    hidden = empty(num_tokens, 2 * width, dtype=BF16)[:, :width].requires_grad_()
    weight = empty(width, vocab_size, dtype=BF16).T.requires_grad_()
    columns = empty(num_tokens, 6).unbind(1)
    policy_loss(
        hidden, LMHead(weight, bias=empty(vocab_size, 2, dtype=BF16)[:, 1].requires_grad_()),
        empty(2, num_tokens).long().T[:, 0], columns[0], empty(1).expand(num_tokens),
        old_logps=columns[2], ref_logps=columns[3], rollout_weights=columns[4],
        temperature=columns[5], objective=OBJECTIVE, engine=engine[0], products=engine[1],
        entropy_coef=empty(1).expand(num_tokens), workspace_mb=64,
    )  # fmt: skip
    run.backward()
    assert run.launches


@pytest.mark.parametrize("num_tokens", [0, 1])
@pytest.mark.parametrize("engine", [GATHER, CUBLAS, MIN_MEMORY])
def test_few_tokens(run, num_tokens, engine):
    """A size of 1 is a constant to the compiler, and one of 0 no grid."""
    call_policy_loss((num_tokens, 1000, 64), BF16, engine, "lora bias", workspace_mb=64)
    run.backward()
    assert bool(run.launches) == (num_tokens > 0 or engine is MIN_MEMORY)  # metrics of nothing


def test_policy_loss_builds_few_kernels(run):
    """However many tokens there are: half of the rows train, chunks are whole or not."""
    for num_tokens in (16384, 16000, 12345, 4096, 777):
        call_policy_loss((num_tokens, 32000, 512), BF16, GATHER, workspace_mb=512)
    for kernel in run.counts():
        assert len(run.builds(kernel)) <= 4, run.builds(kernel)


@pytest.mark.parametrize(("sizes", "num_chunks"), [(QWEN, 3), (GEMMA, 2)])
def test_linear_logps(run, sizes, num_chunks):
    """Log-probabilities alone, as for the old policy and the reference."""
    num_tokens, vocab_size, width = sizes
    with torch.no_grad():
        hidden = empty(num_tokens, width, dtype=BF16)
        linear_logps(hidden, empty(vocab_size, width, dtype=BF16), empty(num_tokens).long())
    assert run.counts() == {"logits_kernel": num_chunks, "statistics_kernel": num_chunks}
    assert run.launches[0].grid[1] == -(-vocab_size // 2048)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize(("dtype", "vocab_size"), [(BF16, 151936), (FP32, 262208), (FP16, 32003)])
def test_selected_logps(run, in_place, dtype, vocab_size):
    logits = empty(16384, vocab_size, dtype=dtype, trains=True)
    selected_logps(logits, empty(16384).long(), temperature=0.7, inplace_backward=in_place)
    run.backward()
    names = ["stored_logits_kernel", "statistics_kernel", "stored_gradients_kernel"]
    assert [launch.kernel for launch in run.launches] == names
    assert run.launches[2].grid[1] == -(-vocab_size // 2048)


def test_logits_of_the_last_tokens_of_rows(run):
    """Completions of (B, T, V) logits: rows apart, ids that are a slice too."""
    ids = empty(8, 2048).long()
    for row in range(2):
        logits = empty(2048, 2 * 32000, dtype=BF16)[:, :32000]
        selected_logps(logits, ids[:, row].expand(2048, 8).T.reshape(-1)[::8])
    assert run.counts()["stored_logits_kernel"] == 2


@pytest.mark.parametrize("num_tokens", [2**20 + 3, 1])
def test_token_loss(run, num_tokens):
    logps, entropies = (empty(num_tokens, trains=True) for _ in range(2))
    given = {name: empty(num_tokens) for name in ("old_logps", "ref_logps", "rollout_weights")}
    token_loss(
        logps, entropies, *(empty(num_tokens, 2).T), objective=OBJECTIVE, entropy_coef=0.01, **given
    )
    run.backward()
    assert run.counts() == {"token_losses_kernel": 1}


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("amount", [{"ratio": 0.2}, {"budget": 1}])
def test_select_tokens(run, dtype, amount):
    for scores in (empty(16384, dtype=dtype), empty(2**24, dtype=dtype), empty(16384, 2).T[1]):
        select_tokens(scores, **amount)
        select_tokens(scores.to(dtype), empty(len(scores), 2).bool()[:, 1], **amount)
    select_tokens(empty(2048, 8192, dtype=dtype), per="sequence", **amount)
    lengths = empty(70000, dtype=torch.int64)
    select_tokens(empty(2**20, dtype=dtype), per="sequence", lengths=lengths, **amount)
    assert run.counts()["keep_kernel"] == 8
    assert len(run.builds("keep_kernel")) <= 4


@pytest.mark.parametrize("count", [1, 151936 * 4096, 2**31 + 2**20 + 77])
@pytest.mark.parametrize("in_8bit", [False, True])
def test_adamw(run, count, in_8bit):
    moments = Moments(empty(count), empty(count))
    if in_8bit:
        scales = [empty(-(-count // 256)) for _ in range(2)]
        moments = Moments(empty(count, dtype=torch.int8), empty(count, dtype=torch.uint8), *scales)
    rates = Rates(lr=1e-5, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, step=1)
    weights, remainders = empty(count, dtype=BF16), empty(count, dtype=torch.int16)
    for gradients in (empty(count, dtype=BF16), empty(count)):
        adamw_step(weights, gradients, moments, rates, remainders=remainders)
        adamw_step(weights, gradients, moments, rates, scale=0.5, start=2**33)
        adamw_step(empty(count), gradients, moments, rates)
    assert run.counts() == {"adamw_kernel": 6}
    assert {launch.grid for launch in run.launches} == {(-(-count // 1024), 1, 1)}


def test_logits_of_a_decoding_step(run):
    """No kernel of this library: products alone, which fit together."""
    head = make_head(151936, 2048, BF16, "lora bias softcap")
    with Watch(run):
        logits = head_logits(empty(64, 2048, dtype=BF16), head, temperature=0.7)
    assert run.rounded == []
    assert (logits.shape, logits.dtype) == ((64, 151936 - 3), FP32)
    assert not run.launches
