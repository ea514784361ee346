"""Run by test_peak_memory.py as a process of its own: growth of the peak resident memory of a call.

Prints bytes beyond inputs, outputs and gradients. Usage: peak_memory.py CASE
"""

import sys
from pathlib import Path

import torch

from fastrl_kernels import linear_logps, policy_loss
from fastrl_kernels.objectives import Objective, clipped_ratio

S, D, V = 2048, 256, 65536


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process, bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def call(case: str, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> None:
    num_tokens = hidden.shape[0]
    if case == "linear_logps":
        out = linear_logps(hidden, weight, targets)
        (out.logps.sum() + out.entropies.sum()).backward()
        return
    ones = torch.ones(num_tokens)
    policy_loss(
        hidden, weight, targets, ones, ones / num_tokens, engine=case, old_logps=-12 * ones,
        objective=Objective(clipped_ratio, (0.2, 0.28)), entropy_coef=0.01,
    ).loss.backward()  # fmt: skip


def main(case: str) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(S, D, generator=generator).requires_grad_()
    weight = (torch.randn(V, D, generator=generator) / 16).requires_grad_()
    targets = torch.randint(V, (S,), generator=generator)
    few = slice(0, 32)
    call(case, hidden[few].detach().requires_grad_(), weight, targets[few])  # libraries load
    weight.grad = None
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # forget the peak so far
    before = resident("VmRSS")
    call(case, hidden, weight, targets)
    assert hidden.grad is not None
    assert weight.grad is not None
    gradients = 4 * (hidden.grad.numel() + weight.grad.numel())
    print(resident("VmHWM") - before - gradients)


if __name__ == "__main__":
    main(sys.argv[1])
