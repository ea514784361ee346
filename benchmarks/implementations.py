"""All implementations by name: ours, and the peers that can run here.

S selected tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import peers
import torch
from peers import Absent, LogpsFunction, PolicyFunction
from reference import EPSILON_HIGH, EPSILON_LOW, token_losses
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent / "kernels"))  # this checkout, installed or not

POLICY, MIN_MEMORY = "fastrl policy_loss", "fastrl policy_loss min_memory"
LOGPS = "fastrl linear_logps"

# Engines of policy_loss, each with a workspace in MiB that it fits: one_pass adds the gradient of a
# half-precision weight up in float32, 2.3 GiB at V = 151936 and D = 4096.
ENGINES: dict[str, dict[str, Any]] = {
    "one_pass cublas 4GiB": {"engine": "one_pass", "products": "cublas", "workspace_mb": 4096},
    "one_pass gather 4GiB": {"engine": "one_pass", "products": "gather", "workspace_mb": 4096},
    "min_memory 256MiB": {"engine": "min_memory", "workspace_mb": 256},
    "min_memory 4GiB": {"engine": "min_memory", "workspace_mb": 4096},
}


class Loaded(NamedTuple):
    """Adapters that can run, and one line for each that cannot."""

    functions: dict[str, Callable[..., Any]]
    absent: list[str]


def load(loaders: dict[str, Callable[[str], Callable[..., Any]]], device: str) -> Loaded:
    """The adapters of all loaders that find what they need."""
    functions, absent = {}, []
    for name, loader in loaders.items():
        try:
            functions[name] = loader(device)
        except (ImportError, Absent) as reason:
            absent.append(f"{name}: {str(reason).splitlines()[0]}")
    return Loaded(functions, absent)


def logps_loaders() -> dict[str, Callable[[str], LogpsFunction]]:
    """Implementations of logps and entropies, both differentiable."""
    return {
        LOGPS: fastrl_linear_logps,
        "naive": lambda device: peers.naive_logps,
        "naive compiled": lambda device: torch.compile(peers.naive_logps),
        "trl": peers.trl_logps,
        "liger scaled ce": peers.liger_scaled_ce_logps,
    }


def policy_loaders() -> dict[str, Callable[[str], PolicyFunction]]:
    """Implementations of the whole policy loss."""
    return {
        POLICY: fastrl_policy_loss,
        MIN_MEMORY: lambda device: fastrl_policy_loss(device, engine="min_memory"),
        LOGPS: with_torch_objective(fastrl_linear_logps),
        "naive": lambda device: peers.naive_policy_loss,
        "naive compiled": lambda device: torch.compile(peers.naive_policy_loss),
        "trl": with_torch_objective(peers.trl_logps),
        "liger chunked grpo": peers.liger_chunked_grpo,
        "liger triton grpo": peers.liger_triton_grpo,
        "liger scaled ce": with_torch_objective(peers.liger_scaled_ce_logps),
        "liger flce": with_torch_objective(peers.liger_flce_logps),
        "cce": with_torch_objective(lambda device: peers.cce_logps(device, filter_eps="high")),
        "cce exact": with_torch_objective(lambda device: peers.cce_logps(device, filter_eps=None)),
        "torch chunked ce": with_torch_objective(
            lambda device: peers.torch_chunked_ce_logps(device, num_rows=None)
        ),
        "torch chunked ce 512 rows": with_torch_objective(
            lambda device: peers.torch_chunked_ce_logps(device, num_rows=512)
        ),
    }


def with_torch_objective(
    loader: Callable[[str], LogpsFunction],
) -> Callable[[str], PolicyFunction]:
    """Loader of a policy loss: the loader's logps, then the objective in PyTorch."""

    def load_policy(device: str) -> PolicyFunction:
        logps_of = loader(device)

        def policy(
            hidden_states: Tensor, weight: Tensor, target_ids: Tensor, advantages: Tensor,
            old_logps: Tensor, token_weights: Tensor, temperature: float, lengths: list[int],
        ) -> tuple[Tensor, Tensor]:  # fmt: skip
            logps, _ = logps_of(hidden_states, weight, target_ids, temperature)
            return (token_weights * token_losses(logps, old_logps, advantages)).sum(), logps

        return policy

    return load_policy


def fastrl_linear_logps(device: str) -> LogpsFunction:
    """`fastrl_kernels.linear_logps` with its defaults."""
    from fastrl_kernels import linear_logps

    def logps(
        hidden_states: Tensor, weight: Tensor, target_ids: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        result = linear_logps(hidden_states, weight, target_ids, temperature=temperature)
        return result.logps, result.entropies

    return logps


def fastrl_policy_loss(device: str, **options: Any) -> PolicyFunction:
    """`fastrl_kernels.policy_loss` with its defaults, or with the given engine and workspace."""
    from fastrl_kernels import policy_loss
    from fastrl_kernels.objectives import Objective, clipped_ratio

    objective = Objective(clipped_ratio, (EPSILON_LOW, EPSILON_HIGH))

    def policy(
        hidden_states: Tensor, weight: Tensor, target_ids: Tensor, advantages: Tensor,
        old_logps: Tensor, token_weights: Tensor, temperature: float, lengths: list[int],
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        result = policy_loss(
            hidden_states, weight, target_ids, advantages, token_weights,
            objective=objective, old_logps=old_logps, temperature=temperature, **options,
        )  # fmt: skip
        return result.loss, result.logps

    return policy


def fastrl_variants() -> dict[str, Callable[[str], PolicyFunction]]:
    """Loaders of our loss with each engine."""
    return {
        f"{POLICY} {name}": functools.partial(fastrl_policy_loss, **keywords)
        for name, keywords in ENGINES.items()
    }
