"""The command line: one function a command."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from fastrl.cli_configs import config_of, run_or_config
from fastrl.cli_tables import print_table
from fastrl.errors import InputError, nearest
from fastrl.words import no_more, take_json_path, take_path, take_switch, take_value, take_values

USAGE = """usage: fastrl COMMAND [ARGUMENTS]

Reinforcement learning of language models on memory-constrained hardware.

commands:
  train CONFIG.toml [--FIELD VALUE ...] [--overwrite]   train as a config file says
  train --resume RUN [--FIELD VALUE ...]                continue from the newest whole checkpoint
  train --resume RUN --allow-change FIELD ...           with another value of a field
  train ... --save-rollouts DIR                         keep all that every step samples
  train ... --replay-rollouts DIR                       train on that instead of sampling
  eval RUN_OR_CONFIG [--FIELD VALUE ...] [--json PATH]  pass@k on the held-out prompts
  score RUN_OR_CONFIG --replay-rollouts DIR [--json PATH]  score saved rollouts once more
  vstar CONFIG.toml [--FIELD VALUE ...]                 sample what A*-PO knows of every prompt
  merge RUN DIRECTORY                                   a run's weights without an adapter
  methods [show NAME]                                   policy-optimisation methods and their axes
  explain [FIELD]                                       what a field of the config is
  tasks [WORD]                                          tasks to train on, with their parameters
  bench MODEL_OR_CONFIG [--ARGUMENT VALUE ...]          what each technique gives, settings for it
  plan MODEL_OR_CONFIG [--gpu CARD] [--fit]             memory of each phase, settings that fit
  doctor                                                what is installed and which kernels will run

`fastrl train --help` lists every field with its default."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 2 bad input, 130 interrupted."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0
    if words[0] == "--version":
        from importlib.metadata import version

        print(version("fastrl-llm"))
        return 0
    command = COMMANDS.get(words[0])
    if words[0] not in WITH_HELP and {"-h", "--help"} & set(words):
        print(USAGE)
        return 0
    try:
        if command is None:
            hint = nearest(words[0], list(COMMANDS))
            raise InputError(f"unknown command {words[0]!r}; {hint}")
        return command(words[1:])
    except InputError as error:
        print(f"fastrl: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fastrl: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _train(words: list[str]) -> int:
    overwrite = take_switch(words, "--overwrite")
    resume = take_value(words, "--resume")
    save = take_path(words, "--save-rollouts")
    replay = take_path(words, "--replay-rollouts")
    allowed = take_values(words, "--allow-change")
    if allowed and resume is None:
        raise InputError("--allow-change is for a run that is resumed; give --resume RUN")
    if resume is not None:
        if overwrite or any(word.startswith("--output-dir") for word in words):
            raise InputError(
                "--resume continues a run in its place; give no --overwrite, --output-dir"
            )
        run_directory = Path(resume)
        if not (run_directory / "config.toml").is_file():
            raise InputError(f"no run to resume in {resume}: it has no config.toml")
        words = [str(run_directory / "config.toml"), *words, "--output-dir", resume]
    config = config_of(words, "fastrl train CONFIG.toml")
    _prepare_libraries()
    from fastrl.run import train
    from fastrl.stop_requests import Interrupted

    try:
        summary = train(
            config, overwrite=overwrite, resume=resume is not None, allow_change=allowed,
            save_rollouts=save, replay_rollouts=replay,
        )  # fmt: skip
    except Interrupted as stop:
        print(f"fastrl: {stop}", file=sys.stderr)
        return 130
    print(
        f"held-out pass@1 {summary['pass_at_1_before']:.3f} -> {summary['pass_at_1_after']:.3f} in "
        f"{summary['steps']} steps, {summary['train_seconds']:.0f} s; see {config.output_dir}"
    )
    return 0


def _eval(words: list[str]) -> int:
    json_path = take_json_path(words)
    if {"-h", "--help"} & set(words):
        print(USAGE)
        return 0
    config, run_directory = run_or_config(words, "fastrl eval RUN_OR_CONFIG")
    _prepare_libraries()
    from fastrl.held_out import evaluate

    evaluation = evaluate(config, run_directory)
    print_table(
        ("measure", "value"),
        [(name, f"{value:.4f}") for name, value in evaluation.metrics.items()],
        title=f"{evaluation.num_prompts} held-out prompts, {evaluation.num_samples} samples each",
    )
    if json_path is not None:
        record = {
            "task": config.task,
            "num_prompts": evaluation.num_prompts,
            "num_samples": evaluation.num_samples,
            **evaluation.metrics,
        }
        Path(json_path).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return 0


def _score(words: list[str]) -> int:
    json_path = take_json_path(words)
    directory = take_path(words, "--replay-rollouts")
    if {"-h", "--help"} & set(words):
        print(USAGE)
        return 0
    config, _ = run_or_config(words, "fastrl score RUN_OR_CONFIG --replay-rollouts DIR")
    if directory is None:
        raise InputError("give the rollouts to score: --replay-rollouts DIR")
    _prepare_libraries()
    from fastrl.rescore import rescore

    scored = rescore(config, directory)
    print_table(
        ("measure", "recorded", "now"),
        [(name, *map(_shown, values)) for name, values in scored.rows],
        title=f"{scored.num_completions} completions of {scored.num_steps} steps",
    )
    if json_path is not None:
        text = json.dumps(scored.record, indent=2) + "\n"
        Path(json_path).write_text(text, encoding="utf-8")
    return 0


def _vstar(words: list[str]) -> int:
    config = config_of(words, "fastrl vstar CONFIG.toml")
    _prepare_libraries()
    from fastrl.vstar import run_vstar

    summary = run_vstar(config, on_batch=lambda progress: print(progress.line, flush=True))
    print("\n".join(summary.lines))
    return 0


def _merge(words: list[str]) -> int:
    if len(words) != 2 or words[0].startswith("-") or words[1].startswith("-"):
        raise InputError("give a run and a directory to write to: fastrl merge RUN DIRECTORY")
    run_directory, target = Path(words[0]), Path(words[1])
    if target.exists():
        raise InputError(f"{target} exists; choose another directory")
    config, _ = run_or_config(words[:1], "fastrl merge RUN DIRECTORY")
    _prepare_libraries()
    from fastrl.checkpoint import newest_checkpoint
    from fastrl.merging import save_merged
    from fastrl.policy import load_policy

    final = run_directory / "final"
    directory = final if final.is_dir() else newest_checkpoint(run_directory).checkpoint
    if directory is None:
        raise InputError(f"{run_directory} has neither final nor a checkpoint to merge")
    save_merged(load_policy(config.model, directory, seed=config.seed), target)
    print(f"wrote {target}")
    return 0


def _methods(words: list[str]) -> int:
    name = take_value(words, "show")
    no_more(words)
    from fastrl.methods.describe import lines, show

    print("\n".join(lines() if name is None else show(name)))
    return 0


def _explain(words: list[str]) -> int:
    from fastrl.explain import explain

    name = words.pop(0) if words else ""
    no_more(words)
    print("\n".join(explain(name)))
    return 0


def _tasks(words: list[str]) -> int:
    from fastrl.tasks import list_tasks

    word = words.pop(0) if words else ""
    no_more(words)
    rows = [(task.name, task.parameters) for task in list_tasks() if word in task.name]
    if not rows:
        raise InputError(f"no task has {word!r} in its name; fastrl tasks lists all of them")
    print_table(("task", "parameters (task_args)"), rows, title=f"{len(rows)} tasks")
    return 0


def _doctor(words: list[str]) -> int:
    no_more(words)
    from fastrl.doctor import examine

    print_table(("what", "state"), examine(), title="fastrl doctor")
    return 0


def _bench(words: list[str]) -> int:
    from fastrl.bench import request

    if {"-h", "--help"} & set(words):
        print(request.USAGE)
        return 0
    asked = request.take_request(words)
    _prepare_libraries()
    from fastrl.bench.report import report
    from fastrl.bench.run import bench

    record = report(bench(asked), print_table)
    if asked.json_path is not None:
        text = json.dumps(record, indent=2) + "\n"
        Path(asked.json_path).write_text(text, encoding="utf-8")
    recommended = record["recommended"]
    if asked.toml_path is not None and recommended is not None:
        asked.toml_path.write_text(recommended["toml"], encoding="utf-8")
    return int(any(row["is_correct"] is False for row in record["techniques"]))


def _plan(words: list[str]) -> int:
    from fastrl import cli_plan

    if {"-h", "--help"} & set(words):
        print(cli_plan.USAGE)
        return 0
    asked = cli_plan.take_request(words)
    _prepare_libraries()
    return cli_plan.run(asked)


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": _train,
    "eval": _eval,
    "score": _score,
    "vstar": _vstar,
    "merge": _merge,
    "methods": _methods,
    "explain": _explain,
    "tasks": _tasks,
    "bench": _bench,
    "plan": _plan,
    "doctor": _doctor,
}
WITH_HELP = ("train", "eval", "score", "vstar", "bench", "plan")
"""Commands that tell more than how they are called."""


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _prepare_libraries() -> None:
    """Settings that libraries read when first imported: quiet, offline and deterministic."""
    import logging

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is local; a lookup would only hang
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic matrix products
    logging.getLogger("torch").setLevel(logging.ERROR)
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
