"""Runs on a device that refuses tensors of the CPU, and the same on the CPU; tells how they differ.

Started by tests/test_devices.py in a process of its own, which keeps the device. Nothing is written
of weights, which such a device cannot be read for.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastrl import run
from fastrl.config import Config, DataConfig, EvalConfig, WarmStartConfig
from fastrl.optim import lean
from fastrl.policy import Policy
from fastrl.seeding import make_generator
from fastrl_kernels import model_head
from tests.pretend_device import DEVICE, Held, Pretending
from tests.test_training import numbers, tiny_config

SMALL = {
    "warm_start": WarmStartConfig(steps=1, batch_size=4), "data": DataConfig(eval_size=2),
    "eval": EvalConfig(num_samples=1), "max_steps": 1, "prompts_per_step": 2,
}  # fmt: skip
EVERYWHERE = "fastrl."


def replace(known: Any, other: Any) -> None:
    """In all modules that have it, under whatever name."""
    for name, module in list(sys.modules.items()):
        if name.startswith(EVERYWHERE):
            for key, value in list(vars(module).items()):
                if value is known:
                    setattr(module, key, other)


def cases() -> dict[str, dict[str, Any]]:
    """What a run may be made of, in few runs."""
    tiny = tiny_config("")
    adapter = {"r": 2, "target_modules": ["q_proj", "down_proj"]}
    return {
        "d3s, adapter": {
            "method": "d3s", "objective": {"beta": 0.1, "entropy_coef": 0.01},
            "num_iterations": 2, "num_mini_batches": 2,
            "model": dataclasses.replace(tiny.model, lora=adapter),
            "optim": dataclasses.replace(tiny.optim, in_backward="two_phase"),
            "rollout": dataclasses.replace(
                tiny.rollout, top_p=0.9, top_k=40, min_p=0.01, repetition_penalty=1.2,
                stop_strings=("1",), engine_args={"check_steps": 1},
            ),
        },
        "ppo": {
            "method": "ppo", "max_tokens_per_pass": 64,
            "model": dataclasses.replace(tiny.model, precision="split"),
            "optim": dataclasses.replace(tiny.optim, optimizer="adamw_8bit"),
        },
    }  # fmt: skip


def trained(config: Config) -> list[dict[str, Any]]:
    """Its metrics."""
    with contextlib.redirect_stdout(io.StringIO()):
        run.train(config)
    return numbers(Path(config.output_dir))


def is_close(one: float, other: float) -> bool:
    """Matrix products of the device's tensors may be other ones than torch chooses on a CPU."""
    return math.isclose(one, other, rel_tol=2e-2, abs_tol=1e-4)


def is_refused(make: Callable[[], object]) -> bool:
    """Because of tensors in two places."""
    try:
        make()
    except RuntimeError as error:
        return "on one device" in str(error)
    return False


def look_at_the_device() -> None:
    """It refuses sums, values to write and what is indexed, but not copies and single numbers."""
    x, y = torch.arange(6.0, device=DEVICE), torch.arange(6.0)
    index = torch.tensor([1, 4])
    for make in (
        lambda: x + y, lambda: torch.where(x > 2, y, x), lambda: torch.cat([x, y]),
        lambda: y[x.long()], lambda: x.index_select(0, index),
        lambda: x.index_put_((index,), y[:2]),
    ):  # fmt: skip
        assert is_refused(make)
    assert (x[index] * y[3] + y.to(DEVICE)[:2]).tolist() == [3.0, 13.0]
    assert torch.equal(y.clone().copy_(x), y)
    leaf = x.clone().requires_grad_()
    (leaf * leaf).sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.device == DEVICE
    assert torch.equal(leaf.grad.cpu(), 2 * y)
    print("what is apart is refused")


def main() -> None:
    torch.set_num_threads(1)
    with Pretending():
        look_at_the_device()
    directory = Path(sys.argv[1])
    changes = {name: {**SMALL, **case} for name, case in cases().items()}
    expected = {
        name: trained(tiny_config(directory / f"{name} on the CPU", **case))
        for name, case in changes.items()
    }
    from fastrl.policy import resolve_device

    replace(resolve_device, lambda name: DEVICE)
    replace(make_generator, lambda device, *labels: make_generator(torch.device("cpu"), *labels))
    run.RunState.save = lambda *_, **__: None  # type: ignore[assignment, method-assign]
    Policy.save = lambda _, path: path.mkdir(parents=True, exist_ok=True)  # type: ignore[assignment, method-assign]
    lean.CHUNK_SIZES[DEVICE.type] = lean.CHUNK_SIZES["cpu"]
    a_type = type
    model_head.type = lambda x: torch.nn.Parameter if isinstance(x, Held) else a_type(x)  # type: ignore[attr-defined]
    for name, case in changes.items():
        with Pretending():
            found = trained(tiny_config(directory / name, **case))
        assert len(found) == len(expected[name]) > 0
        for row, other in zip(found, expected[name], strict=True):
            assert row.keys() == other.keys()
            apart = {k: (row[k], other[k]) for k in row if not is_close(row[k], other[k])}
            assert not apart, apart
        print(f"{name}: the same")


if __name__ == "__main__":
    main()
