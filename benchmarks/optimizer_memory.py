"""Bytes a parameter of one way to keep weights, moments and gradients, in a process of its own.

python benchmarks/optimizer_memory.py PRECISION OPTIMIZER IN_BACKWARD [--device cpu|cuda]

Trains 16 layers of 1024 x 1024 on 8 rows, so that activations are next to nothing and one layer's
gradient a sixteenth of all. Prints one line of JSON:
- held: bytes of the weights and of the optimizer's state between steps, on `device` and on the CPU;
- peak: most bytes in use during a step, after two others. On a GPU as its allocator counts them; on
  a CPU the growth of the resident memory since before the model, with large blocks in pages of
  their own, so that freed ones do not count.
"""

from __future__ import annotations

import argparse
import ctypes
import json

import torch
from torch import nn

from fastrl.config import OptimConfig
from fastrl.optim import Stepper, make_optimizer, parameter_groups
from fastrl.process_memory import counted_bytes, forget_peak

WIDTH, NUM_LAYERS, NUM_ROWS = 1024, 16, 8
M_MMAP_THRESHOLD = -3  # from malloc.h


def new_stepper(model: nn.Module, precision: str, optimizer: str, in_backward: str) -> Stepper:
    groups = parameter_groups(model, learning_rate=1e-4, weight_decay=0.01)
    config = OptimConfig(optimizer=optimizer, in_backward=in_backward)
    made = make_optimizer(groups, config, precision=precision, seed=0)
    return Stepper(made, max_grad_norm=1.0, in_backward=in_backward)


def new_model(precision: str, device: str, num_layers: int) -> nn.Module:
    dtype = torch.bfloat16 if precision in ("split", "stochastic") else torch.float32
    layers = [nn.Linear(WIDTH, WIDTH, bias=False, dtype=dtype) for _ in range(num_layers)]
    return nn.Sequential(*layers).to(device)


def train(stepper: Stepper, model: nn.Sequential, num_steps: int) -> None:
    weight = model[0].weight
    inputs = torch.randn(NUM_ROWS, WIDTH, device=weight.device).to(weight.dtype)
    for _ in range(num_steps):
        outcome = stepper.step(1, lambda index: model(inputs).float().square().mean().backward())
        assert outcome.is_applied


def held_bytes(stepper: Stepper, model: nn.Module, device: str) -> int:
    """Of weights and state on a device, each storage once."""
    tensors = [*model.parameters()]
    for state in stepper.optimizer.state.values():
        for value in state.values():
            found = value.values() if isinstance(value, dict) else [value]
            tensors += [x for x in found if isinstance(x, torch.Tensor)]
    storages = {
        x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()
        for tensor in tensors
        for x in inner_tensors(tensor)
        if x.device.type == device
    }
    return sum(storages.values())


def inner_tensors(tensor: torch.Tensor) -> list[torch.Tensor]:
    """What a tensor subclass, such as torchao's states, is made of."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [getattr(tensor, name) for name in names]


def measured(precision: str, optimizer: str, in_backward: str, device: str) -> dict[str, object]:
    """The numbers of one mode."""
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16)
    small = new_model(precision, device, 1)  # libraries load
    train(new_stepper(small, precision, optimizer, in_backward), small, 2)
    del small
    before = counted_bytes("VmRSS") if device == "cpu" else torch.cuda.memory_allocated()
    model = new_model(precision, device, NUM_LAYERS)
    stepper = new_stepper(model, precision, optimizer, in_backward)
    train(stepper, model, 2)
    if device == "cpu":
        forget_peak()
    else:
        torch.cuda.reset_peak_memory_stats()
    train(stepper, model, 2)
    peak = (
        counted_bytes("VmHWM") if device == "cpu" else torch.cuda.max_memory_allocated()
    ) - before
    count = sum(p.numel() for p in model.parameters())
    return {
        "precision": precision, "optimizer": optimizer, "in_backward": in_backward,
        "device": device, "held": held_bytes(stepper, model, device) / count,
        "held_on_cpu": held_bytes(stepper, model, "cpu") / count, "peak": peak / count,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("precision", "optimizer", "in_backward"):
        parser.add_argument(name)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    given = parser.parse_args()
    found = measured(given.precision, given.optimizer, given.in_backward, given.device)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
