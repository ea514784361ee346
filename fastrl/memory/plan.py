"""What a run will need, phase by phase, in bytes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

GIB = 2**30


def gib(num_bytes: float) -> str:
    """Gibibytes in three digits."""
    return f"{num_bytes / GIB:.3g}"


PHASES = ("rollout", "score", "update", "step", "evaluate")
"""score: log-probabilities of the old and the reference policy; step: the optimizer's."""
PARTS = (
    "weights", "adapter", "gradients", "optimizer", "reference", "value model", "keys and values",
    "activations", "head", "attention", "sampling", "other",
)  # fmt: skip
"""What the bytes of a phase are for. optimizer: moments and the bits that weights lack to float32.
head, attention: workspace of the kernels. sampling: logits of the tokens that are drawn."""


class Phase(NamedTuple):
    """A phase at its highest moment."""

    name: str  # one of PHASES
    parts: Mapping[str, int]  # bytes by what they are for, names from PARTS

    @property
    def total(self) -> int:
        """Bytes in tensors."""
        return sum(self.parts.values())


class MemoryPlan(NamedTuple):
    """All phases of a run on one device."""

    device: str  # "cpu" or "cuda"
    phases: tuple[Phase, ...]
    outside: int = 0
    """Bytes beside torch's allocator: the CUDA context, or libraries and Python on a CPU."""
    slack: int = 0
    """Bytes that the allocator holds beyond those in tensors: rounding and holes."""
    notes: tuple[str, ...] = ()
    """What the numbers leave out or only estimate."""

    @property
    def highest(self) -> Phase:
        """The phase that sets the peak."""
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def peak(self) -> int:
        """Most bytes in tensors."""
        return self.highest.total

    @property
    def needed(self) -> int:
        """Bytes that a card has to have."""
        return self.peak + self.outside + self.slack

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "device": self.device,
            "phases": {phase.name: dict(phase.parts) for phase in self.phases},
            "outside_bytes": self.outside,
            "slack_bytes": self.slack,
            "peak_bytes": self.peak,
            "peak_phase": self.highest.name,
            "needed_bytes": self.needed,
            "notes": list(self.notes),
        }
