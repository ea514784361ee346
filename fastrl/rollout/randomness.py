"""Random numbers that belong to a completion and a position, whatever else is sampled beside them.

Legend: P prompts, G num_generations, B = P*G completions, R rows.
"""

from __future__ import annotations

import hashlib
from collections import Counter

import numpy as np
import torch
from numpy.typing import NDArray

from fastrl.types import Prompts

Keys = NDArray[np.uint64]
GOLDEN = np.uint64(0x9E3779B97F4A7C15)
MANTISSA_BITS = 53


def completion_keys(prompts: Prompts, num_generations: int, generator: torch.Generator) -> Keys:
    """(B,) one key a completion, made of one draw from `generator`, the prompt's tokens and g.

    A prompt that occurs again gets other keys. Its keys depend on no other prompt, so neither does
    what it is answered.
    """
    seed = torch.randint(2**62, (), generator=generator, device=generator.device).item()
    occurrences: Counter[bytes] = Counter()
    found = []
    for ids in prompts.token_ids:
        tokens = ids.cpu().numpy().tobytes()
        start = occurrences[tokens]
        occurrences[tokens] += num_generations
        digest = hashlib.blake2b(tokens, digest_size=8, key=int(seed).to_bytes(8, "big")).digest()
        generations = np.arange(start, start + num_generations, dtype=np.uint64)
        found.append(_mix(np.uint64(int.from_bytes(digest, "big")) + generations * GOLDEN))
    return np.concatenate(found)


def uniforms(keys: Keys, positions: NDArray[np.int64]) -> torch.Tensor:
    """(R,) float64 in [0, 1), a function of key and position alone.

    The counter-based generator SplitMix64 (Steele, Lea and Flood 2014, figure 15), so that a
    completion needs no state and can be continued later.
    """
    counters = keys + (positions.astype(np.uint64) + np.uint64(1)) * GOLDEN
    bits = _mix(counters) >> np.uint64(64 - MANTISSA_BITS)
    return torch.from_numpy(bits.astype(np.float64) * 2.0**-MANTISSA_BITS)


def _mix(bits: Keys) -> Keys:
    """SplitMix64's finaliser; products wrap around."""
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))
