"""What a configuration will need, before it runs, and how it is kept within a limit."""

from fastrl.config import Config
from fastrl.memory.plan import GIB, PARTS, PHASES, MemoryPlan, Phase

__all__ = ["GIB", "PARTS", "PHASES", "MemoryPlan", "Phase", "plan_memory"]


def plan_memory(config: Config, device: str | None = None) -> MemoryPlan:
    """What a run of the configuration will need; device: see `fastrl.memory.survey`."""
    from fastrl.memory.survey import survey  # which imports most of a trainer

    return survey(config, device=device).plan()
