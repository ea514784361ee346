"""FastRL: reinforcement learning of language models on memory-constrained hardware.

Names are loaded when first used, so that `import fastrl` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastrl.config import Config as Config
    from fastrl.config_io import load_config as load_config
    from fastrl.errors import InputError as InputError
    from fastrl.packing import Plan as Plan
    from fastrl.packing import pack as pack
    from fastrl.packing import pack_tree as pack_tree
    from fastrl.run import train as train

_HOMES = {
    "Config": "fastrl.config",
    "InputError": "fastrl.errors",
    "Plan": "fastrl.packing",
    "load_config": "fastrl.config_io",
    "pack": "fastrl.packing",
    "pack_tree": "fastrl.packing",
    "train": "fastrl.run",
}

__all__ = ["Config", "InputError", "Plan", "load_config", "pack", "pack_tree", "train"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fastrl' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
