"""What a run leaves behind: metrics, completions, TensorBoard events, a curve and a summary."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any

from fastrl.checkpoint import TrainerState
from fastrl.config import Config
from fastrl.evaluate import Evaluation
from fastrl.step_output import StepOutput
from fastrl.trainer import Trainer


class RunLog:
    """Appends every step to the run's files; a resumed run drops what lies past its checkpoint."""

    def __init__(self, directory: Path, config: Config, *, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.config = config
        self._metrics = _open_truncated(directory / "metrics.jsonl", step)
        rows = read_metrics(directory)
        self._evaluated = {row["step"] for row in rows if "eval_reward" in row}
        self._completions = _open_truncated(directory / "completions.jsonl", step)
        self._events = SummaryWriter(str(directory / "tensorboard"), purge_step=step + 1)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        for file in (self._metrics, self._completions, self._events):
            file.close()

    def step(self, step: int, output: StepOutput) -> None:
        """Metrics and a sample of completions of one training step, counted from 1."""
        self._write(step, output.metrics)
        rollouts, texts, rewards = output.sampled.everything
        total = len(texts)
        wanted = min(self.config.save.completions_per_step, total)
        for row in (index * total // wanted for index in range(wanted)):
            example = rollouts.prompts.examples[row // rollouts.num_generations]
            record = {
                "step": step,
                "prompt": example.prompt,
                "completion": texts[row],
                "answer": example.answer,
                "reward": _number(rewards.total[row]) if rewards.is_finite[row] else None,
                "rewards": {name: _number(part[row]) for name, part in rewards.parts.items()},
                "finished": bool(rollouts.finished[row]),
            }
            self._completions.write(json.dumps(record, ensure_ascii=False) + "\n")
        self._completions.flush()

    def evaluation(self, step: int, evaluation: Evaluation) -> None:
        """A held-out evaluation after `step` training steps; a repeated one says nothing new."""
        if step not in self._evaluated:
            self._evaluated.add(step)
            self._write(step, evaluation.metrics)

    def _write(self, step: int, metrics: Mapping[str, float]) -> None:
        numbers = {name: _number(value) for name, value in metrics.items()}
        self._metrics.write(json.dumps({"step": step, **numbers}) + "\n")
        self._metrics.flush()
        for name, value in metrics.items():
            self._events.add_scalar(name, value, step)


def results_of(state: TrainerState, trainer: Trainer, evaluation: Evaluation) -> dict[str, Any]:
    """What a run has come to; evaluation: of its last weights."""
    seconds = state.train_seconds
    return {
        "pass_at_1_before": state.pass_at_1_before,
        "pass_at_1_after": evaluation.pass_at[1],
        "best_step": state.best_step,
        "best_pass_at_1": state.best_pass_at_1,
        "pass_at_k_after": {str(k): value for k, value in evaluation.pass_at.items()},
        "train_seconds": seconds,
        "steps": state.step,
        "warm_start_steps": state.warm_start_step,
        "num_tokens": state.num_tokens,
        "tokens_per_second": state.num_tokens / seconds if seconds else 0.0,
        "peak_memory_bytes": trainer.memory.highest,
        "planned_memory_bytes": trainer.memory.planned_highest,
        "num_parameters": trainer.policy.num_parameters,
    }


def write_summary(directory: Path, config: Config, results: Mapping[str, Any]) -> dict[str, Any]:
    """Write summary.json: the results with what they were measured on."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()
    summary = {
        **results,
        "task": config.task,
        "method": config.method,
        "seed": config.seed,
        "device": device or platform.machine(),
        "num_threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("torch", "transformers", "reasoning-gym")},
    }
    text = json.dumps(summary, indent=2) + "\n"
    (directory / "summary.json").write_text(text, encoding="utf-8")
    return summary


def draw_curve(directory: Path) -> None:
    """curve.png: pass rate of the training completions and held-out pass@1 over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = read_metrics(directory)
    steps = [row for row in rows if "pass_rate" in row]
    evaluations = [row for row in rows if "eval_pass@1" in row]
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(
        [row["step"] for row in steps], [row["pass_rate"] for row in steps],
        color="tab:blue", alpha=0.4, linewidth=1, label="pass rate of training completions",
    )  # fmt: skip
    axes.plot(
        [row["step"] for row in evaluations], [row["eval_pass@1"] for row in evaluations],
        color="tab:orange", marker="o", label="held-out pass@1",
    )  # fmt: skip
    axes.set(xlabel="training step", ylabel="fraction correct", ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(directory / "curve.png", dpi=120)
    pyplot.close(figure)


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl."""
    text = (directory / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n") if line]


def _number(value: Any) -> float | None:
    """JSON has no NaN and no infinity: a value that does not exist is null."""
    number = float(value)
    return number if math.isfinite(number) else None


def _open_truncated(path: Path, step: int) -> Any:
    """Open for appending after the last whole line of at most `step`."""
    kept = []
    if path.exists():
        # Only "\n" ends a line: a completion may hold the other separators of Unicode.
        *whole, _ = path.read_text(encoding="utf-8").split("\n")
        kept = [f"{line}\n" for line in whole if json.loads(line)["step"] <= step]
    shortened = path.with_suffix(".partial")
    shortened.write_text("".join(kept), encoding="utf-8")
    shortened.replace(path)
    return path.open("a", encoding="utf-8")
