"""The ledger of `fastrl.memory`: storages counted by hand and by torch's allocator."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from fastrl.memory.arithmetic import Casts, autocast
from fastrl.memory.attention import Attention
from fastrl.memory.ledger import Ledger
from fastrl.memory.timeline import Moment
from fastrl_kernels import LMHead, linear_logps, make_segments, policy_loss, segment_attention
from fastrl_kernels.objectives import SURROGATES, Objective
from fastrl_kernels.segment_attention.scores import Options

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))  # as a script there has it

from measure import tracked_peak

DEVICES = ["cpu", "meta"]
CLIPPED = Objective(SURROGATES["clipped_ratio"], (0.2, 0.2))


@pytest.mark.parametrize("device", DEVICES)
def test_storages_are_counted_once_and_until_they_are_freed(device):
    with Ledger() as ledger:
        first = torch.zeros(1000, device=device)
        view = first.view(10, 100)[2:]
        second = view + 1  # 3200 bytes
        assert ledger.in_use == 4000 + 3200
        del first
        assert ledger.in_use == 4000 + 3200  # the view has it
        del view, second
        assert ledger.in_use == 0
    assert ledger.peak == 7200


@pytest.mark.parametrize("device", DEVICES)
def test_what_was_there_before_and_what_is_in_place_does_not_count(device):
    weight = torch.zeros(64, 64, device=device)
    with Ledger() as ledger:
        weight.add_(1)
        transposed = weight.t()
        total = transposed.sum()
    assert ledger.in_use == 4
    assert total.dim() == 0


def test_parts_of_the_highest_moment():
    with Ledger() as ledger:
        one = torch.zeros(100, device="meta")
        with ledger.as_part("sampling"):
            two = torch.zeros(50, device="meta")
        ledger.tag(one, "gradients")
        ledger.pulse("head", 1000)
        ledger.mark("later")
        del one
        three = torch.zeros(10, device="meta")
    timeline = ledger.recording.timeline()
    assert timeline.peak() == Moment(1600, {"gradients": 400, "sampling": 200, "head": 1000})
    window = timeline.windows()[0]
    assert (window.name, window.highest.total) == ("later", 600)
    assert two.numel() + three.numel() == 60


def test_blocks_of_a_gpu():
    with Ledger("cuda") as ledger:
        small = torch.zeros(3, device="meta")
        on_cpu = torch.zeros(1000, device="cpu")
    assert ledger.peak == 512
    assert small.numel() + on_cpu.numel() == 1003


def test_questions_about_values_are_answered():
    mask = torch.zeros(12, dtype=torch.bool, device="meta")
    with Ledger(num_tokens=12, num_needed=5):
        assert bool(mask.all())
        assert float(torch.zeros((), device="meta")) == 1.0
        assert mask.nonzero().shape == (7, 1)
        assert mask[:3].nonzero().shape == (3, 1)
        assert torch.zeros(9, dtype=torch.int64, device="meta").unique().shape == (5,)
    # Real tensors have values of their own.
    with Ledger(num_tokens=3, num_needed=1):
        assert torch.tensor([1, 0, 1]).nonzero().shape == (2, 1)
        assert not bool(torch.tensor(0.0))


def mlp(device):
    with torch.device(device):
        return nn.Sequential(nn.Linear(64, 256), nn.SiLU(), nn.Linear(256, 64), nn.Softmax(-1))


def test_a_backward_pass_takes_on_meta_what_it_takes_of_the_allocator():
    peaks = {}
    for device in DEVICES:
        model = mlp(device)
        inputs = torch.zeros(129, 64, device=device)
        with Ledger() as ledger:
            model(inputs).square().sum().backward()
        peaks[device] = ledger.peak
    model, inputs = mlp("cpu"), torch.zeros(129, 64)
    assert peaks["meta"] == peaks["cpu"]
    assert peaks["meta"] == tracked_peak(lambda: model(inputs).square().sum().backward())


def test_autocast_on_meta_makes_the_copies_that_autocast_makes():
    peaks = {}
    for device in DEVICES:
        model = mlp(device)
        inputs = torch.zeros(129, 64, device=device)
        context = autocast() if device == "meta" else torch.autocast("cpu", torch.bfloat16)
        with Ledger() as ledger, Casts():
            with context:
                out = model(inputs)
            assert ledger.in_use > 129 * 64 * 2
            out.float().sum().backward()
        peaks[device] = ledger.peak
    assert peaks["meta"] == peaks["cpu"]


HEADS = [  # S, D, V, dtype, workspace_mb
    (700, 64, 2048, torch.float32, 256.0),
    (129, 64, 8192, torch.float32, 4.0),
    (700, 64, 4096, torch.bfloat16, 256.0),
    (300, 64, 8192, torch.bfloat16, 2.0),
]


@pytest.mark.parametrize(("S", "D", "V", "dtype", "workspace_mb"), HEADS)
@pytest.mark.parametrize("engine", ["forward", "one_pass", "min_memory"])
def test_what_the_head_takes(S, D, V, dtype, workspace_mb, engine):
    def run(device):
        hidden, weight = (torch.randn(n, D, device=device).to(dtype) for n in (S, V))
        targets, ones = torch.arange(S, device=device), torch.ones(S, device=device)

        def call():
            if engine == "forward":
                linear_logps(hidden, LMHead(weight), targets, workspace_mb=workspace_mb)
                return
            policy_loss(
                hidden.requires_grad_(), weight.requires_grad_(), targets, ones, ones,
                objective=CLIPPED, engine=engine, workspace_mb=workspace_mb,
            ).loss.backward()  # fmt: skip

        return call

    if engine == "one_pass" and workspace_mb < 8:
        pytest.skip("the sums of the weight's gradient do not fit")
    call = run("meta")
    with Ledger() as ledger:
        call()
    assert ledger.peak == pytest.approx(tracked_peak(run("cpu")), rel=0.02)


FORESTS = [
    ([300, 200, 210, 190], [-1, 0, 0, 0]),  # long paths
    ([20, 30, 31, 29, 21, 30], [-1, 0, 0, 0, -1, 4]),  # short ones
    ([40, 30, 200, 50], [-1, 0, 0, -1]),
]


@pytest.mark.parametrize(("lengths", "parents"), FORESTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 48])
def test_what_attention_takes_inside(lengths, parents, dtype, window):
    segments = make_segments(lengths, parents)
    N, heads, size = segments.num_tokens, (4, 2), 32
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(N, count, size, generator=generator).to(dtype) for count in (4, 2, 2))
    segment_attention(q, k, v, segments, window=window)  # whose tables are kept

    def inside(*, is_backward):
        options = Options(size**-0.5, window, None)
        attention = Attention("cpu", dtype, heads, (size, size), options, False, is_backward)
        return attention.bytes_on(segments)

    out_bytes = N * 4 * size * dtype.itemsize
    forward = tracked_peak(lambda: segment_attention(q, k, v, segments, window=window))
    assert inside(is_backward=False) + out_bytes == pytest.approx(forward, rel=0.02)

    for x in (q, k, v):
        x.requires_grad_()
    out = segment_attention(q, k, v, segments, window=window)
    grad = torch.ones_like(out)
    backward = tracked_peak(lambda: out.backward(grad))
    grads = N * 8 * size * dtype.itemsize
    assert inside(is_backward=True) + grads == pytest.approx(backward, rel=0.02)
