"""Memory modes of a model, switched on and off between two calls."""

from __future__ import annotations

from typing import Any

import torch

from fastrl.bench.techniques import Technique
from fastrl.integrations.capabilities import without_wrappers
from fastrl.integrations.chunked_mlp import chunk_mlps, mlps_of
from fastrl.integrations.offload import offload_checkpoints


class Modes:
    """Remembers what the model's MLPs were before they were cut into chunks."""

    def __init__(self, model: Any) -> None:
        self.model: Any = without_wrappers(model)
        self.mlps: list[tuple[Any, type]] = []

    def switch(self, technique: Technique, device: torch.device) -> None:
        """Let the model compute as the technique does, from now on.

        Raises InputError for a model whose MLPs cannot be cut, or without layers to recompute.
        """
        self.switch_off()
        if technique.mlp_chunk_size:
            self.mlps = [(mlp, type(mlp)) for mlp in mlps_of(self.model)]
            chunk_mlps(self.model, technique.mlp_chunk_size)
        if technique.recomputes:
            enable = getattr(self.model, "activation_checkpointing_enable", None)
            (enable or self.model.gradient_checkpointing_enable)({"use_reentrant": False})
        if technique.offloads:
            offload_checkpoints(self.model, device)

    def switch_off(self) -> None:
        """Let the model compute as it came."""
        # Newer transformers call it activation checkpointing.
        disable = getattr(self.model, "activation_checkpointing_disable", None)
        (disable or self.model.gradient_checkpointing_disable)()
        for mlp, kind in self.mlps:
            mlp.__class__ = kind
        self.mlps = []
