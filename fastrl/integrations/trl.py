"""TRL: a config from its arguments, and its trainers with FastRL's forward and backward passes.

Names are loaded when first used: TRL is imported for the trainers alone.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastrl.integrations.trl_config import LOSSES as LOSSES
    from fastrl.integrations.trl_config import SAME as SAME
    from fastrl.integrations.trl_config import Imported as Imported
    from fastrl.integrations.trl_config import from_trl as from_trl
    from fastrl.integrations.trl_drop_in import accelerate_trl as accelerate_trl

    FastDPOTrainer: Any
    FastGRPOTrainer: Any
    FastRLOOTrainer: Any

_HOMES = {
    "Imported": "fastrl.integrations.trl_config",
    "LOSSES": "fastrl.integrations.trl_config",
    "SAME": "fastrl.integrations.trl_config",
    "accelerate_trl": "fastrl.integrations.trl_drop_in",
    "from_trl": "fastrl.integrations.trl_config",
}
TRAINERS = {
    "FastDPOTrainer": "DPOTrainer",
    "FastGRPOTrainer": "GRPOTrainer",
    "FastRLOOTrainer": "RLOOTrainer",
}
"""Trainers of this module and TRL's that each is a subclass of."""

__all__ = [
    "FastDPOTrainer",
    "FastGRPOTrainer",
    "FastRLOOTrainer",
    "Imported",
    "accelerate_trl",
    "from_trl",
]


def __getattr__(name: str) -> Any:
    if name in TRAINERS:
        found = import_module("fastrl.integrations.trl_drop_in").fast_trainer(name, TRAINERS[name])
    elif name in _HOMES:
        found = getattr(import_module(_HOMES[name]), name)
    else:
        raise AttributeError(f"module 'fastrl.integrations.trl' has no attribute {name!r}")
    globals()[name] = found  # one class for all who ask
    return found


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
