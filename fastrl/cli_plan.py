"""`fastrl plan`: what a run will need before it runs, and settings that stay within a limit."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastrl.cli_configs import model_fields, model_or_config
from fastrl.cli_tables import print_table
from fastrl.errors import InputError
from fastrl.memory.cards import limit_of
from fastrl.words import take_json_path, take_path, take_switch, take_value

if TYPE_CHECKING:
    from fastrl.config import Config
    from fastrl.memory.fit import Outcome
    from fastrl.memory.plan import MemoryPlan

USAGE = """usage: fastrl plan CONFIG.toml|RUN|MODEL_DIR|CONFIG.json [ARGUMENTS] [--FIELD VALUE ...]

Tells what every phase of a run will need of a device's memory; reads no weights, needs no GPU.

  --gpu CARD|SIZE        plan for a GPU: a card such as rtx4090, or what there is, such as 24GiB
  --fit                  the fastest settings that stay within it, of those that change no result
  --toml PATH            write the config, fitted or not, for fastrl train
  --json PATH            write all numbers
  --picture PATH.png     draw the phases
  --prompt-length P, --completion-length R, --num-generations G, --prompts N, --method NAME,
  --precision NAME, --device NAME, and every field of the config, as fastrl train has them

Exit code 1: planned, but it does not fit."""

SHORT = {
    "--prompt-length": "--rollout.max-prompt-length",
    "--completion-length": "--rollout.max-completion-length",
    "--num-generations": "--rollout.num-generations",
    "--prompts": "--prompts-per-step",
    "--precision": "--model.precision",
    "--device": "--model.device",
}


@dataclass(frozen=True)
class Request:
    """What was asked for."""

    config: Config
    device: str | None
    """cuda where a card is given; None for what the run would use."""
    limit: int | None
    """Bytes."""
    limit_name: str
    fits: bool
    json_path: str | None
    toml_path: Path | None
    picture_path: Path | None


def take_request(words: list[str]) -> Request:
    """The request of a command line; InputError where it cannot be one."""
    from fastrl.config import Config
    from fastrl.config_io import override_config

    if not words or words[0].startswith("-"):
        raise InputError("give a config or a model directory: fastrl plan CONFIG [--gpu 24GiB]")
    source = Path(words.pop(0))
    json_path = take_json_path(words)
    toml_path = _writable(words, "--toml")
    picture_path = _writable(words, "--picture")
    if picture_path is not None and picture_path.suffix != ".png":
        raise InputError(f"--picture {picture_path}: expected a name that ends in .png")
    fits, gpu = take_switch(words, "--fit"), take_value(words, "--gpu")
    words[:] = [_long(word) for word in words]
    config, _ = model_or_config(source, Config())
    config = with_model(override_config(config, words, "fastrl plan"))
    limit = limit_of(gpu, config.memory_limit)
    if gpu is not None and config.model.device.startswith("cpu"):
        raise InputError(
            f"--gpu {gpu} plans for a GPU, but model.device is 'cpu'; drop one of them"
        )
    device = None if gpu is None else "cuda"
    name = config.memory_limit or gpu or ""
    return Request(config, device, limit, name, fits, json_path, toml_path, picture_path)


def _long(word: str) -> str:
    name, separator, value = word.partition("=")
    return SHORT.get(name, name) + separator + value


def _writable(words: list[str], name: str) -> Path | None:
    path = take_path(words, name)
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise InputError(f"{name} {path}: expected a file in an existing directory")
    return path


def with_model(config: Config) -> Config:
    """The config whose model is a directory, or has the fields of a config.json by another name."""
    model = config.model
    if model.path is None:
        if not model.architecture:
            raise InputError("no model given; set model.path or model.architecture")
        return config
    path = Path(model.path)
    if path.is_dir() or not path.is_file():
        if not (path / "config.json").is_file():
            raise InputError(
                f"no model's config at {path}/config.json; give a local Hugging Face directory"
            )
        return config
    fields = model_fields(path)
    changes: dict[str, Any] = {"path": None, "architecture": fields}
    if path.name == "config.json":
        changes = {"path": str(path.parent)}
    return dataclasses.replace(config, model=dataclasses.replace(model, **changes))


def run(request: Request) -> int:
    """Plan, fit where asked, print and write; returns 1 where the plan is above the limit."""
    from fastrl.memory import picture, report
    from fastrl.memory.fit import fit
    from fastrl.memory.survey import survey

    config, outcome = request.config, None
    limit, name = request.limit, request.limit_name
    surveyed = survey(config, device=request.device)
    if limit is None and surveyed.device == "cuda":
        limit, name = _this_gpu()
    # What a GPU has decides how much of it keys and values take.
    known = dataclasses.replace(config, memory_limit=name or None)
    if request.fits:
        if limit is None:
            raise InputError("--fit needs a limit; give --gpu rtx4090, --gpu 24GiB or memory_limit")
        outcome = fit(surveyed, known, limit, name)
        config = dataclasses.replace(outcome.config, memory_limit=config.memory_limit)
        plan = outcome.plan
    else:
        plan = surveyed.plan(known)
    _print(config, plan, outcome, limit, name)
    if request.json_path is not None:
        record = report.record(plan, config, limit)
        if outcome is not None:
            record["fit"] = outcome.record()
        Path(request.json_path).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    if request.picture_path is not None:
        picture.draw(plan, request.picture_path, title=_title(config), limit=limit, name=name)
    if request.toml_path is not None:
        _write_config(config, request.toml_path, outcome)
    return int(limit is not None and plan.needed > limit)


def _this_gpu() -> tuple[int | None, str]:
    """Bytes of this machine's GPU, and these as a size; None where it has none."""
    import torch

    if not torch.cuda.is_available():
        return None, ""
    num_bytes = torch.cuda.get_device_properties(0).total_memory
    return num_bytes, f"{num_bytes >> 20}MiB"


def _print(
    config: Config, plan: MemoryPlan, outcome: Outcome | None, limit: int | None, name: str
) -> None:
    from fastrl.memory import changes, report, suggest

    if outcome is not None:
        print(outcome.headline)
        if outcome.changes:
            print_table(changes.HEADER, changes.rows(outcome.changes), title="what was changed")
    header, rows = report.table(plan)
    print_table(header, rows, title=f"{_title(config)}, on {plan.device}")
    for line in report.verdict(plan, limit, name or "the limit"):
        print(line)
    if outcome is not None and outcome.suggestions:
        print_table(
            suggest.HEADER, suggest.rows(outcome.suggestions),
            title="not set, because they change what is computed",
        )  # fmt: skip


def _title(config: Config) -> str:
    rollout, model = config.rollout, config.model
    name = Path(model.path).name if model.path else model.architecture["model_type"]
    return (
        f"{name}, {config.method}: prompts of {rollout.max_prompt_length} and completions of "
        f"{rollout.max_completion_length} tokens, {rollout.num_generations} of each"
    )


def _write_config(config: Config, path: Path, outcome: Outcome | None) -> None:
    from fastrl.config_io import RUN_MARK, save_config

    save_config(config, path)
    found = path.read_text(encoding="utf-8").removeprefix(RUN_MARK)
    opening = [] if outcome is None else [outcome.headline, *outcome.lines()]
    comment = "".join(f"# {line}\n" for line in opening)
    path.write_text(comment + found, encoding="utf-8")
