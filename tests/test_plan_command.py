"""`fastrl plan` through the real command line: what it prints, writes, fits and refuses."""

import dataclasses
import io
import json
import subprocess
import sys
from contextlib import closing, redirect_stdout
from pathlib import Path

import pytest
import torch

from fastrl.assembly import build_trainer
from fastrl.cli import main
from fastrl.config import Config, ModelConfig
from fastrl.config_io import load_config, save_config
from fastrl.errors import InputError
from fastrl.memory.fit import fit, remedies
from fastrl.memory.knobs import Knobs
from fastrl.memory.picture import bars
from fastrl.memory.plan import GIB, MemoryPlan, Phase
from fastrl.memory.report import lines, table
from fastrl.memory.search import fastest, smallest
from fastrl.memory.survey import survey
from fastrl.memory.work import sizes_of
from tests.helpers import TINY, tiny_policy
from tests.test_cli import ENVIRONMENT
from tests.test_training import tiny_config

MIB = 2**20
WIDE = {**TINY, "hidden_size": 64, "intermediate_size": 192}
SMALL = ["--prompt-length", "24", "--completion-length", "16", "--num-generations", "4"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A model's config.json alone."""
    path = tmp_path_factory.mktemp("model")
    tiny_policy().model.config.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def toml(tmp_path_factory):
    """A run on the CPU that can be made to fit."""
    path = tmp_path_factory.mktemp("run") / "config.toml"
    config = tiny_config(path.parent / "run", prompts_per_step=4)
    model = ModelConfig(architecture={"model_type": "qwen3", **WIDE}, device="cpu")
    save_config(dataclasses.replace(config, model=model), path)
    return path


def planned(capsys, tmp_path, *words, code=0):
    """The record and the output of a plan."""
    path = tmp_path / "plan.json"
    assert main(["plan", *map(str, words), "--json", str(path)]) == code
    return json.loads(path.read_text()), capsys.readouterr().out


def refused(capsys, *words):
    assert main(["plan", *map(str, words)]) == 2
    message = capsys.readouterr().err
    assert message.startswith("fastrl: ")
    assert message.count("\n") == 1
    return message


def test_the_table_is_the_plan(capsys, directory, tmp_path):
    picture = tmp_path / "plan.png"
    words = (directory, *SMALL, "--gpu", "rtx4090", "--picture", picture)
    record, out = planned(capsys, tmp_path, *words)
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert record["device"] == "cuda"
    assert record["limit_bytes"] == int(23.52 * GIB)
    assert record["fits"] is True
    totals = {name: sum(parts.values()) for name, parts in record["phases"].items()}
    assert record["peak_bytes"] == max(totals.values()) == totals[record["peak_phase"]]
    beside = record["outside_bytes"] + record["slack_bytes"]
    assert record["needed_bytes"] == record["peak_bytes"] + beside
    assert record["config"]["rollout.max_completion_length"] == 16
    assert "torch" in record["versions"]
    for text in (*totals, "rtx4090 has 23.5 GiB", f"{record['peak_phase']} sets the peak"):
        assert text in out
    config = Config(model=ModelConfig(path=str(directory)))
    rollout = dataclasses.replace(
        config.rollout, max_prompt_length=24, max_completion_length=16, num_generations=4
    )
    plan = survey(dataclasses.replace(config, rollout=rollout), device="cuda").plan()
    assert plan.record() == {key: record[key] for key in plan.record()}


def test_every_way_to_name_a_model_gives_the_same_plan(capsys, directory, tmp_path):
    first, _ = planned(capsys, tmp_path, directory / "config.json", *SMALL)
    other = tmp_path / "other.json"
    other.write_text((directory / "config.json").read_text())
    save_config(Config(model=ModelConfig(path=str(directory))), tmp_path / "config.toml")
    for source in (other, tmp_path):  # the latter looks like a run
        record, _ = planned(capsys, tmp_path, source, *SMALL)
        assert record["phases"] == first["phases"]


def test_flags_of_the_config_change_the_plan(capsys, directory, tmp_path):
    first, _ = planned(capsys, tmp_path, directory, *SMALL)
    record, _ = planned(capsys, tmp_path, directory, *SMALL, "--optim.optimizer=adamw_8bit",
                        "--precision", "stochastic")  # fmt: skip
    assert record["config"]["model.precision"] == "stochastic"
    held, before = (x["phases"]["rollout"] for x in (record, first))
    assert held["weights"] < 0.51 * before["weights"]


def test_what_does_not_fit_is_planned_and_says_so(capsys, directory, tmp_path):
    record, out = planned(capsys, tmp_path, directory, *SMALL, "--gpu", "64MiB", code=1)
    assert record["fits"] is False
    assert "too few" in out


def test_a_picture_has_a_bar_for_each_phase():
    phases = (
        Phase("rollout", {"weights": GIB}),
        Phase("update", {"weights": GIB, "head": 2 * GIB}),
    )
    plan = MemoryPlan("cuda", phases, outside=GIB // 2, slack=GIB // 4)
    heights = bars(plan)
    assert heights["weights"] == [1.0, 1.0]
    assert [sum(column) for column in zip(*heights.values(), strict=True)] == [1.75, 3.75]


def test_lines_of_a_plan_have_its_numbers():
    phases = (
        Phase("rollout", {"weights": GIB}),
        Phase("update", {"weights": GIB, "head": 2 * GIB}),
    )
    plan = MemoryPlan("cuda", phases, outside=GIB // 2, slack=GIB // 4, notes=("a note",))
    header, rows = table(plan)
    assert header == ("GiB", "rollout", "update")
    assert rows == [
        ("weights", "1", "1"), ("head", "-", "2"), ("in tensors", "1", "3"),
        ("slack", "0.25", "0.25"), ("outside", "0.5", "0.5"), ("needed", "1.75", "3.75"),
    ]  # fmt: skip
    text = lines(plan, 3 * GIB)
    assert "update sets the peak, 2 GiB of it for head" in text[-3]
    assert "0.75 too few" in text[-2]
    assert text[-1] == "a note"


# Settings that fit


@pytest.fixture(scope="module")
def surveyed(toml):
    """The model of the run, known once for all tests."""
    return survey(load_config(toml))


@pytest.fixture(scope="module")
def fitted(toml, surveyed, tmp_path_factory):
    """The command line's way to four fifths of what the run would need."""
    folder = tmp_path_factory.mktemp("fitted")
    limit = int(0.8 * surveyed.plan().needed)
    words = ("plan", toml, "--memory-limit", f"{limit / MIB:.4f}MiB", "--fit", "--toml",
             folder / "fitted.toml", "--json", folder / "fitted.json")  # fmt: skip
    with redirect_stdout(io.StringIO()) as out:
        assert main([*map(str, words)]) == 0
    record = json.loads((folder / "fitted.json").read_text())
    return limit, record, out.getvalue(), folder / "fitted.toml"


def test_a_fitted_config_fits_and_says_what_was_changed(fitted, surveyed):
    limit, record, out, path = fitted
    assert record["needed_bytes"] <= limit < surveyed.plan().needed
    assert record["fit"]["changes"]
    assert "what was changed" in out
    config = load_config(path)
    assert config.memory_limit == f"{limit / MIB:.4f}MiB"
    assert surveyed.plan(config).needed == record["needed_bytes"]
    for change in record["fit"]["changes"]:
        assert change["path"] in out
        assert f"# {change['path']} = {change['now']} (was {change['was']})" in path.read_text()


def test_a_fitted_config_trains(fitted):
    config = dataclasses.replace(load_config(fitted[3]), memory_limit=None)
    trainer = build_trainer(config)
    with closing(trainer.sampler.scorer):
        before = [x.detach().clone() for x in trainer.policy.model.parameters()]
        output = trainer.train_step(0)
    assert output.metrics["grad_norm"] > 0
    after = trainer.policy.model.parameters()
    assert not all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


def test_what_would_change_the_mathematics_is_only_suggested(fitted):
    _, record, out, path = fitted
    config = load_config(path)
    assert (config.model.precision, config.model.lora) == ("float32", {})
    assert "not set, because they change what is computed" in out
    needed = {x["setting"]: x["needed"] for x in record["fit"]["suggestions"]}
    assert needed["model.precision = stochastic"] < record["needed_bytes"]
    assert "model.lora = {r = 16}" in needed


def test_no_other_settings_of_a_real_model_that_fit_are_faster(surveyed, toml):
    """By brute force over what a CPU has, but for workspaces and keys and values."""
    config = load_config(toml)
    fixed = frozenset({"workspace_mb", "kv_cache_gib"})
    knobs = Knobs(config, sizes_of(config), "cpu", fixed=fixed)
    candidates = knobs.candidates()
    needed = [surveyed.plan(x.settings.of(config)).needed for x in candidates]
    for limit in sorted(needed)[:: len(needed) // 4]:
        found = fastest(knobs, limit, surveyed.plan)
        costs = [x.cost.total for x, n in zip(candidates, needed, strict=True) if n <= limit]
        assert found.candidate.cost.total == min(costs)
        assert found.plan.needed <= limit
    assert fastest(knobs, min(needed) - 1, surveyed.plan) is None
    assert smallest(knobs, surveyed.plan).plan.needed == min(needed)


def test_what_fits_as_it_is_does_not_become_slower(surveyed, toml):
    config = load_config(toml)
    outcome = fit(surveyed, config, 4 * surveyed.plan().needed, "much")
    assert outcome.slower <= 1
    assert outcome.suggestions == []
    assert outcome.plan.needed <= 4 * surveyed.plan().needed


def test_remedies_of_a_run_that_failed_are_three_lines(surveyed, toml):
    found = remedies(surveyed, load_config(toml))
    assert 0 < len(found) <= 3
    assert all(line.startswith("set ") and "saves " in line for line in found)


# Bad input


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "give a config or a model directory"),
        (("nowhere",), "no model directory and no config at nowhere"),
        (("{toml}", "--gpu", "rtx4091"), "the nearest are rtx4090"),
        (("{directory}", "--gpu", "rtx4060", "--memory-limit", "24GiB"), "more than the 7.72 GiB"),
        (("{directory}", "--memory-limit", "much"), "memory_limit must be a card"),
        (("{toml}", "--gpu", "8GiB"), "plans for a GPU, but model.device is 'cpu'"),
        (("{toml}", "--fit"), "--fit needs a limit"),
        (("{directory}", "--colour", "red"), "unknown argument '--colour'"),
        (("{directory}", "--picture", "plan.jpg"), "ends in .png"),
        (("{directory}", "--picture", "nowhere/plan.png"), "existing directory"),
        (("{directory}", "--toml", "nowhere/x.toml"), "existing directory"),
        (("{directory}", "--json"), "--json needs a value"),
        (("{directory}", "--completion-length", "0"), "at least 1"),
        (("{broken}",), "no JSON"),
        (("{broken_toml}",), "is not valid TOML"),
        (("{strange}",), "strange"),
    ],
)
def test_one_line_for_every_mistake(capsys, directory, toml, tmp_path, words, message):
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "broken.toml").write_text("a = ")
    (tmp_path / "strange.json").write_text('{"model_type": "strange"}')
    names = {
        "directory": directory, "toml": toml, "broken": tmp_path / "broken.json",
        "broken_toml": tmp_path / "broken.toml", "strange": tmp_path / "strange.json",
    }  # fmt: skip
    assert message in refused(capsys, *(word.format(**names) for word in words))


def test_the_smallest_limit_is_enough(surveyed, toml):
    config = load_config(toml)
    with pytest.raises(InputError, match=r"x has 0\.000977 GiB, but the smallest limit") as error:
        fit(surveyed, config, MIB, "x")
    least = float(str(error.value).split("would do is ")[1].split(" GiB")[0])
    knobs = Knobs(config, sizes_of(config), "cpu")
    assert fastest(knobs, int(1.01 * least * GIB), surveyed.plan) is not None
    assert fastest(knobs, int(0.99 * least * GIB), surveyed.plan) is None


def test_help_needs_no_torch():
    code = (
        "from fastrl.cli import main; import sys; main(['plan', '--help']); "
        "print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT, check=True
    )
    assert "--gpu CARD|SIZE" in done.stdout
    assert done.stdout.endswith("False\n")


def test_a_plan_of_seven_billion_parameters_is_quick(capsys, tmp_path):
    """Under 20 s on two cores, everything included: here without what is imported already."""
    import time

    from fastrl.memory.published import MODELS

    path = tmp_path / "config.json"
    path.write_text(json.dumps(MODELS["Qwen3-8B"]))
    started = time.perf_counter()
    record, _ = planned(capsys, tmp_path, Path(tmp_path), "--gpu", "h100", code=1)
    assert time.perf_counter() - started < 20
    assert record["phases"]["update"]["weights"] > 8.1e9 * 4
