"""The optimizer that a configuration names, with every check that needs no compute."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple

import torch

from fastrl.config import Config, OptimConfig
from fastrl.errors import InputError, nearest
from fastrl.optim.lean import LeanAdamW, WeightStore
from fastrl.optim.moments import MomentStore

Precision = Literal["float32", "autocast", "split", "stochastic"]
Groups = list[dict[str, Any]]

MOMENTS: dict[str, MomentStore] = {
    "adamw": "float32",
    "adamw_8bit": "8bit",
    "adamw_offload": "cpu",
}
"""Our own optimizers, by where they keep their moments."""
OURS = f"use {', '.join(MOMENTS)}"


class Library(NamedTuple):
    """An optimizer of an optional package, which is its extra's name too."""

    package: str
    make: Callable[[Groups, dict[str, Any]], torch.optim.Optimizer]
    needs_gpu: bool = False


def _bnb_adamw_8bit(groups: Groups, options: dict[str, Any]) -> torch.optim.Optimizer:
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(groups, **options)


def _bnb_paged_adamw_8bit(groups: Groups, options: dict[str, Any]) -> torch.optim.Optimizer:
    from bitsandbytes.optim import PagedAdamW8bit

    return PagedAdamW8bit(groups, **options)


def _torchao_adamw_8bit(groups: Groups, options: dict[str, Any]) -> torch.optim.Optimizer:
    from torchao.optim import AdamW8bit

    return AdamW8bit(groups, **options)


def _torchao_adamw_4bit(groups: Groups, options: dict[str, Any]) -> torch.optim.Optimizer:
    from torchao.optim import AdamW4bit

    return AdamW4bit(groups, **options)


LIBRARIES = {
    "bnb_adamw_8bit": Library("bitsandbytes", _bnb_adamw_8bit),
    "bnb_paged_adamw_8bit": Library("bitsandbytes", _bnb_paged_adamw_8bit, needs_gpu=True),
    "torchao_adamw_8bit": Library("torchao", _torchao_adamw_8bit),
    "torchao_adamw_4bit": Library("torchao", _torchao_adamw_4bit),
}


def check_optimizer(config: Config) -> None:
    """Refuse an optimizer that is unknown, not installed, or that the rest of `config` excludes."""
    name, precision = config.optim.optimizer, config.model.precision
    if name not in MOMENTS and name not in LIBRARIES:
        known = [*MOMENTS, *LIBRARIES]
        raise InputError(f"unknown optim.optimizer {name!r}; {nearest(name, known)}")
    library = LIBRARIES.get(name)
    if library is None:
        return
    if precision in ("split", "stochastic"):
        raise InputError(
            f"optim.optimizer {name} and model.precision {precision} exclude each other: only our "
            f"own optimizers know how the weights are kept; {OURS}; or precision autocast"
        )
    if config.optim.in_backward != "off":
        raise InputError(
            f"optim.optimizer {name} and optim.in_backward {config.optim.in_backward} exclude each "
            f"other: it steps all parameters at once; {OURS}; or in_backward off"
        )
    if find_spec(library.package) is None:
        raise InputError(
            f"optim.optimizer {name} needs {library.package}; "
            f"pip install 'fastrl-llm[{library.package}]'; or {OURS}"
        )
    if library.needs_gpu and config.model.device == "cpu":
        raise InputError(f"optim.optimizer {name} needs a GPU; {OURS}; or another model.device")


def make_optimizer(
    groups: Groups, config: OptimConfig, *, precision: Precision, seed: int
) -> torch.optim.Optimizer:
    """The configured optimizer over groups as `parameter_groups` makes them.

    precision: as of `config.model`; what bfloat16 parameters among them become.
    """
    betas = (config.adam_beta1, config.adam_beta2)
    library = LIBRARIES.get(config.optimizer)
    if library is not None:
        on_cpu = any(p.device.type == "cpu" for group in groups for p in group["params"])
        if library.needs_gpu and on_cpu:
            raise InputError(f"optim.optimizer {config.optimizer} needs a GPU; {OURS}")
        return library.make(groups, {"lr": config.learning_rate, "betas": betas})
    weights: WeightStore = "float32" if precision == "autocast" else precision
    moments = MOMENTS[config.optimizer]
    return LeanAdamW(groups, betas=betas, weights=weights, moments=moments, seed=seed)
