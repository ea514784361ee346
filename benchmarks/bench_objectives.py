"""Every per-token objective on log-probabilities that are there already, against plain PPO-clip.

python benchmarks/bench_objectives.py [--json PATH]

Value, slopes and metrics by `token_loss`, forward and backward, on 65536 tokens in float32. The
repetitions of all objectives are interleaved.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from fastrl.methods.axes import hyper_parameters_of
from fastrl.methods.defaults import DEFAULTS
from fastrl_kernels import token_loss
from fastrl_kernels.objectives import REGULARISERS, SURROGATES, Objective, Regulariser

NUM_TOKENS = 65536
REPETITIONS = 40
COMPUTED = {"pass_rate": 0.4, "step_size": 0.5, "reward": 1.0, "low": 0.8, "high": 1.2}
"""Stand-ins for hyper-parameters that a method computes from the batch."""


def objectives() -> dict[str, Objective]:
    """Every surrogate, and PPO-clip with every regulariser."""
    found = {}
    for name, function in SURROGATES.items():
        known = DEFAULTS.get(name, {})
        values = [known.get(x, COMPUTED.get(x)) for x in hyper_parameters_of("surrogate", name)]
        found[name] = Objective(function, tuple(values))
    clip = found["clipped_ratio"]
    for name, function in REGULARISERS.items():
        found[f"clipped_ratio + {name}"] = clip._replace(regularisers=(Regulariser(function, 0.1),))
    return found


def make_call(device: str) -> Any:
    """Milliseconds of one forward and backward pass of an objective."""
    generator = torch.Generator(device).manual_seed(0)

    def normal() -> torch.Tensor:
        return torch.randn(NUM_TOKENS, generator=generator, device=device)

    logps, advantages = -normal().abs(), normal()
    old_logps, ref_logps = logps + 0.3 * normal(), logps + 0.3 * normal()
    weights = torch.full_like(logps, 1 / NUM_TOKENS)

    def call(objective: Objective) -> float:
        leaf = logps.clone().requires_grad_()
        if device == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        token_loss(
            leaf, -logps, advantages, weights, objective=objective, old_logps=old_logps,
            ref_logps=ref_logps,
        ).loss.backward()  # fmt: skip
        if device == "cuda":
            torch.cuda.synchronize()
        return 1000 * (time.perf_counter() - started)

    return call


def main() -> int:
    """Print the table; write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    call, cases = make_call(device), objectives()
    times: dict[str, list[float]] = {name: [] for name in cases}
    for repetition in range(REPETITIONS + 1):
        for name, objective in cases.items():
            elapsed = call(objective)
            if repetition:
                times[name].append(elapsed)
    base = statistics.median(times["clipped_ratio"])
    rows = []
    for name, values in times.items():
        p20, _, _, p80 = statistics.quantiles(values, n=5)
        p50 = statistics.median(values)
        rows.append({
            "case": f"token_loss S={NUM_TOKENS}", "implementation": name, "p20_ms": p20,
            "p50_ms": p50, "p80_ms": p80, "peak_bytes": None, "floor_ms": None, "correct": None,
        })  # fmt: skip
        print(f"{name:44} {p50:8.2f} ms {p50 / base:6.2f} x")
    if options.json:
        record = {
            "device": device, "threads": torch.get_num_threads(), "torch": torch.__version__,
            "dtype": "float32", "command": "python benchmarks/bench_objectives.py", "rows": rows,
        }  # fmt: skip
        options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
