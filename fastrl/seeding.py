"""Random streams that are functions of the seed and a name, so that nothing needs restoring."""

from __future__ import annotations

import hashlib

import torch


def derive_seed(seed: int, *labels: str | int) -> int:
    """A 63-bit seed for one named stream of a run; different labels give unrelated streams."""
    text = "/".join(map(str, (seed, *labels)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def make_generator(device: torch.device, seed: int, *labels: str | int) -> torch.Generator:
    """A torch generator on `device` for one named stream, for example (seed, "rollout", step)."""
    return torch.Generator(device=device).manual_seed(derive_seed(seed, *labels))
