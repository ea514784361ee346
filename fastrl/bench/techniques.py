"""The ways to make one and the same update, from plain transformers to all that FastRL has."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch


class Technique(NamedTuple):
    """One way to make the update; the last three are settings of a run, the others always on."""

    name: str
    is_packed: bool = True
    is_fused: bool = True
    shares_prompts: bool = True
    drops_tokens: bool = True
    recomputes: bool = False
    offloads: bool = False
    mlp_chunk_size: int = 0

    @property
    def settings(self) -> dict[str, Any]:
        """Fields of `model` that switch it on."""
        found: dict[str, Any] = {}
        if self.recomputes:
            found["gradient_checkpointing"] = True
        if self.offloads:
            found["activation_offloading"] = True
        if self.mlp_chunk_size:
            found["mlp_chunk_size"] = self.mlp_chunk_size
        return found

    @property
    def is_trainable(self) -> bool:
        """Whether `fastrl train` can make the update so."""
        return self.is_packed and self.shares_prompts and self.drops_tokens


def make_techniques(device: torch.device, mlp_chunk_size: int) -> list[Technique]:
    """Each adds to the one before it, up to the memory modes, which add to sparse heads."""
    plain = Technique("padded rows, stored logits", False, False, False, False)
    found = [
        plain,
        plain._replace(name="+ fused head and loss", is_fused=True),
        Technique("+ packed rows", shares_prompts=False, drops_tokens=False),
        Technique("+ shared prefix", drops_tokens=False),
        Technique("+ sparse heads"),
        Technique("  with recomputation", recomputes=True),
    ]
    if device.type == "cuda":
        found.append(Technique("  with offload", recomputes=True, offloads=True))
    return [
        *found,
        Technique("  with chunked MLP", mlp_chunk_size=mlp_chunk_size),
        Technique("  with both", recomputes=True, mlp_chunk_size=mlp_chunk_size),
    ]


def without_chunks(techniques: list[Technique]) -> list[Technique]:
    """For models whose MLPs cannot be cut."""
    return [technique for technique in techniques if not technique.mlp_chunk_size]
