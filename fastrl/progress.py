"""Live progress on a terminal, one line a step anywhere else."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from fastrl.config import Config
from fastrl.types import StepMetrics

SHOWN = {
    "reward": "reward",
    "pass rate": "pass_rate",
    "KL": "kl",
    "entropy": "entropy",
    "clip fraction": "clip_ratio/region_mean",
    "completion length": "completions/mean_length",
    "generation tokens/s": "tokens_per_second/rollout",
    "training tokens/s": "tokens_per_second/train",
    "memory GiB": "memory/peak_gib",
}
"""What is shown of a step, by the name of its metric; KL only with a reference policy."""


class RunProgress(Protocol):
    """Shows a run to whoever watches it."""

    def __enter__(self) -> RunProgress: ...

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...  # fmt: skip

    def warm_start(self, step: int, loss: float) -> None:
        """After supervised step `step`, counted from 1."""

    def step(self, step: int, metrics: StepMetrics) -> None:
        """After training step `step`, counted from 1."""

    def evaluation(self, step: int, metrics: StepMetrics) -> None:
        """After a held-out evaluation at `step`."""

    def note(self, text: str) -> None:
        """Something that the user should know."""


def make_progress(config: Config) -> RunProgress:
    """A live table where the output is a terminal, lines elsewhere."""
    console = Console()
    return _Live(config, console) if console.is_terminal else _Lines(config)


class _Lines:
    def __init__(self, config: Config) -> None:
        self.config = config
        self.eta = _Eta()

    def __enter__(self) -> _Lines:
        return self

    def __exit__(self, *_: object) -> None:
        return

    def warm_start(self, step: int, loss: float) -> None:
        total = self.config.warm_start.steps
        if step % max(1, total // 10) == 0:
            print(f"warm start {step}/{total} loss {loss:.4f}", flush=True)

    def step(self, step: int, metrics: StepMetrics) -> None:
        shown = " ".join(
            f"{label.replace(' ', '_')} {_short(metrics[name])}"
            for label, name in SHOWN.items()
            if name in metrics
        )
        left = self.eta.remaining(step, self.config.max_steps)
        print(f"step {step}/{self.config.max_steps} {shown} eta {left:.0f}s", flush=True)

    def evaluation(self, step: int, metrics: StepMetrics) -> None:
        shown = " ".join(f"{name} {_short(value)}" for name, value in metrics.items())
        print(f"evaluation after step {step}: {shown}", flush=True)

    def note(self, text: str) -> None:
        print(text, flush=True)


class _Live:
    def __init__(self, config: Config, console: Console) -> None:
        self.config = config
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
        )
        self.warm = self.bar.add_task(
            "warm start", total=config.warm_start.steps, visible=config.warm_start.steps > 0
        )
        self.train = self.bar.add_task(config.method, total=config.max_steps)
        self.live = Live(self.bar, console=console, refresh_per_second=4)
        self.held_out: StepMetrics = {}

    def __enter__(self) -> _Live:
        self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.live.stop()

    def warm_start(self, step: int, loss: float) -> None:
        self.bar.update(self.warm, completed=step, description=f"warm start, loss {loss:.3f}")

    def step(self, step: int, metrics: StepMetrics) -> None:
        self.bar.update(self.train, completed=step)
        table = Table.grid(padding=(0, 2))
        for label, name in SHOWN.items():
            if name in metrics:
                table.add_row(label, _short(metrics[name]))
        for name, value in self.held_out.items():
            table.add_row(name, _short(value))
        self.live.update(Group(self.bar, table))

    def evaluation(self, step: int, metrics: StepMetrics) -> None:
        self.held_out = metrics

    def note(self, text: str) -> None:
        self.live.console.print(text, markup=False)


class _Eta:
    """Seconds to go, from the steps that this process has seen."""

    def __init__(self) -> None:
        self.first: tuple[int, float] | None = None

    def remaining(self, step: int, total: int) -> float:
        now = time.perf_counter()
        if self.first is None:
            self.first = (step, now)
        first_step, first_time = self.first
        done = step - first_step
        return (total - step) * (now - first_time) / done if done else 0.0


def _short(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.0f}"
