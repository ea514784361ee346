"""What the kernels take on a GPU, against their launches under Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
CODE = f"""
import sys
sys.path.insert(0, {str(BENCHMARKS)!r})
import torch
from measure import tracked_peak
from fastrl_kernels import linear_logps, make_segments, policy_loss, segment_attention
from fastrl_kernels.head_workspace import bytes_inside
from fastrl_kernels.objectives import SURROGATES, Objective
from fastrl_kernels.plan import Shape
from fastrl_kernels.segment_attention import workspace

torch.set_num_threads(1)
S, D, V = 20, 32, 300
CLIPPED = Objective(SURROGATES["clipped_ratio"], (0.2, 0.2))
targets, ones = torch.arange(S), torch.ones(S)
hidden, weight = torch.randn(S, D).requires_grad_(), torch.randn(V, D).requires_grad_()
shape = Shape(S, D, V, dtype=torch.float32, device="cuda")


def loss():
    policy_loss(hidden, weight, targets, ones, ones, objective=CLIPPED, engine="one_pass",
                implementation="triton").loss.backward()


with torch.no_grad():
    forward = tracked_peak(lambda: linear_logps(hidden, weight, targets, implementation="triton"))
grads = 4 * (S + V) * D
needs = [True, True, False, False, False]
print("forward", forward, bytes_inside("forward", shape, 256, needs_grad=[False] * 5) + 32 * S)
print("one_pass", tracked_peak(loss),
      bytes_inside("one_pass", shape, 256, needs_grad=needs) + grads)

segments = make_segments([40, 20, 18, 12], [-1, 0, 0, 0])
q, k, v = (torch.randn(90, heads, 32).requires_grad_() for heads in (4, 2, 2))
out = segment_attention(q, k, v, segments, implementation="triton")
grad = torch.ones_like(out)
taken = workspace.bytes_inside(
    segments, num_heads=4, num_kv_heads=2, head_size=32, value_size=32, dtype=torch.float32,
    window=None,
)
print("attention", tracked_peak(lambda: out.backward(grad)), taken + 4 * 90 * 8 * 32)
"""


def test_formulas_are_what_the_launches_take():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    out = subprocess.run(
        [sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, check=True
    ).stdout
    for line in out.strip().splitlines():
        name, measured, planned = line.split()
        ratio = int(planned) / int(measured)
        assert 0.95 <= ratio <= 1.15, f"{name}: planned {planned}, measured {measured}"
