"""What a configuration will need, before it runs, and how it is kept within a limit."""

from fastrl.memory.plan import GIB, PARTS, PHASES, MemoryPlan, Phase

__all__ = ["GIB", "PARTS", "PHASES", "MemoryPlan", "Phase"]
