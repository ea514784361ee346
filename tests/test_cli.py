"""The command line as a user meets it: answers, exit codes, and one line for every mistake."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fastrl.cli import main
from tests.helpers import TINY, tiny_policy

ARCHITECTURE = "\n".join(f"{key} = {value}" for key, value in TINY.items())
CONFIG = f"""
task = "reasoning_gym:chain_sum"
rewards = ["{Path(__file__).parent / "helpers.py"}:checksum"]
reward_workers = 0
max_steps = 2
prompts_per_step = 2
max_tokens_per_pass = 128
[task_args]
min_terms = 2
max_terms = 2
[data]
eval_size = 4
[model.architecture]
model_type = "qwen3"
{ARCHITECTURE}
[rollout]
num_generations = 2
max_prompt_length = 48
max_completion_length = 8
[eval]
num_samples = 2
"""


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text(CONFIG)
    return path


ROOT = Path(__file__).parent.parent
# The sources of this checkout, whether they are installed or not.
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}


def fastrl(*words):
    """A real process, as from a shell."""
    return subprocess.run(
        [sys.executable, "-m", "fastrl", *map(str, words)],
        capture_output=True, text=True, env=ENVIRONMENT, check=False,
    )  # fmt: skip


def test_help_is_fast_and_import_faster():
    started = time.perf_counter()
    result = fastrl("--help")
    assert result.returncode == 0
    assert "train CONFIG.toml" in result.stdout
    assert time.perf_counter() - started < 1.0
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import fastrl"], check=True, env=ENVIRONMENT)
    assert time.perf_counter() - started < 0.5


def test_train_resume_and_eval_as_processes(tmp_path, config):
    run = tmp_path / "run"
    result = fastrl("train", config, "--output-dir", run, "--save.save-steps", "1")
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    lines = result.stdout.splitlines()
    assert sum(line.startswith("step ") for line in lines) == 2
    assert "held-out pass@1" in lines[-1]
    assert json.loads((run / "summary.json").read_text())["steps"] == 2

    again = fastrl("train", config, "--output-dir", run)
    assert again.returncode == 2
    assert "already holds a run" in again.stderr

    resumed = fastrl("train", "--resume", run, "--max-steps", "3")
    assert resumed.returncode == 0, resumed.stderr
    assert "step 3/3" in resumed.stdout
    assert "step 2/3" not in resumed.stdout

    report = tmp_path / "eval.json"
    evaluated = fastrl("eval", run, "--json", report, "--eval.num-samples", "4")
    assert evaluated.returncode == 0, evaluated.stderr
    assert set(json.loads(report.read_text())) >= {"eval_pass@1", "eval_pass@4", "num_prompts"}
    assert "eval_pass@4" in evaluated.stdout


@pytest.mark.parametrize("request_to_stop", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_saves_a_checkpoint_and_resuming_ends_like_an_undisturbed_run(
    tmp_path, config, request_to_stop
):
    run = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "fastrl", "train", str(config), "--output-dir", str(run),
         "--max-steps", "100000"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT,
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 2/"):
            break
    process.send_signal(request_to_stop)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "--resume" in errors
    (checkpoint,) = run.glob("checkpoint-*")
    stopped = int(checkpoint.name.split("-")[1])
    total = str(stopped + 2)
    assert main(["train", "--resume", str(run), "--max-steps", total]) == 0
    whole = tmp_path / "whole"
    flags = ["--output-dir", str(whole), "--max-steps", total]
    assert main(["train", str(config), *flags]) == 0
    weights = [(d / "final" / "model.safetensors").read_bytes() for d in (run, whole)]
    assert weights[0] == weights[1]


PARTIAL = ["--rollout.max-tokens-per-step", "14", "--objective.rollout-correction", "decoupled"]


@pytest.mark.parametrize("more", [[], PARTIAL])
def test_a_killed_run_goes_on_from_its_last_checkpoint_to_the_same_bits(tmp_path, config, more):
    run, whole = tmp_path / "run", tmp_path / "whole"
    flags = ["--max-steps", "8", "--save.save-steps", "2", "--objective.beta", "0.1", *more]
    process = subprocess.Popen(
        [sys.executable, "-m", "fastrl", "train", str(config), "--output-dir", str(run), *flags],
        stdout=subprocess.PIPE, text=True, env=ENVIRONMENT,
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 5/"):
            break
    process.kill()
    process.communicate()
    assert not (run / "summary.json").exists()
    (run / ".partial-checkpoint-6").mkdir(exist_ok=True)  # as if it had died while writing
    assert main(["train", "--resume", str(run)]) == 0
    assert main(["train", str(config), "--output-dir", str(whole), *flags]) == 0
    for name in ("final/model.safetensors", "completions.jsonl"):
        assert (run / name).read_bytes() == (whole / name).read_bytes()
    assert not list(run.glob(".partial*"))


def test_a_stop_during_the_warm_start_is_resumed_exactly(tmp_path, config, monkeypatch):
    from fastrl.warm_start import WarmStart

    flags = ["--warm-start.steps", "5", "--warm-start.batch-size", "4"]
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    assert main(["train", str(config), *flags, "--output-dir", str(whole)]) == 0
    step_of = WarmStart.train_step

    def stop_at_3(self, step):
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return step_of(self, step)

    monkeypatch.setattr(WarmStart, "train_step", stop_at_3)
    assert main(["train", str(config), *flags, "--output-dir", str(parted)]) == 130
    assert [path.name for path in parted.glob("*-*")] == ["warm-start-3"]
    assert main(["train", "--resume", str(parted)]) == 0
    weights = [(d / "final" / "model.safetensors").read_bytes() for d in (whole, parted)]
    assert weights[0] == weights[1]


def test_methods_tasks_and_doctor(capsys):
    assert main(["methods"]) == 0
    assert "dr_grpo" in capsys.readouterr().out
    assert main(["tasks", "countdown"]) == 0
    assert "reasoning_gym:countdown" in capsys.readouterr().out
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert torch.__version__ in out
    assert "linear_logps" in out
    assert main(["--version"]) == 0


def run_refused(capsys, *words) -> str:
    assert main(list(map(str, words))) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("fastrl: ")
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["traim"], "unknown command 'traim'; did you mean 'train'?"),
        (["train"], "give a config file first"),
        (["train", "nowhere.toml"], "cannot read config nowhere.toml"),
        (["train", "--resume", "nowhere"], "no run to resume in nowhere"),
        (["train", "--resume"], "--resume needs a value"),
        (["eval"], "give a run directory or a config"),
        (["methods", "x"], "unexpected argument 'x'"),
        (["tasks", "zzz"], "no task has 'zzz' in its name"),
    ],
)
def test_bad_commands(capsys, words, message):
    assert message in run_refused(capsys, *words)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--method", "gropo"], "unknown method 'gropo'; did you mean 'grpo'?"),
        (["--objective.advantage", "group"], "unknown objective.advantage 'group'"),
        (["--objective.regulariser", "k3"], "has no effect with beta 0"),
        (["--method", "rloo", "--objective.epsilon-low", "0.1"], "has no effect on surrogate"),
        (["--task", "reasoning_gym:chain_summ"], "did you mean"),
        (["--task-args.min-terms", "0"], "min_terms"),
        (["--task", "jsonl:nowhere.jsonl", "--rewards", "exact"], "task_args"),
        (["--rewards", "tusk"], "did you mean 'task'?"),
        (["--rewards", "nowhere:f"], "nowhere"),
        (["--reward-weights", "1", "2"], "one weight per reward"),
        (["--rollout.num-generations", "1"], "num_generations must be at least 2"),
        (["--rollout.engine", "vlm"], "unknown rollout.engine 'vlm'"),
        (["--rollout.max-prompt-length", "3"], "max_prompt_length"),
        (["--rollout.max-completion-length", "100"], "max_tokens_per_pass must hold"),
        (["--max-tokens-per-pass", "55"], "at least 56 tokens (0.5 of them for the rows)"),
        (["--rollout.max-prompt-length", "127", "--max-tokens-per-pass", "500"], "128 positions"),
        (["--model.path", "nowhere"], "model.path and model.architecture exclude each other"),
        (["--model.device", "gpu"], "model.device must be auto, cpu, cuda or cuda:N"),
        (["--data.system-prompt", "x", "--rewards", "task"], "chat template"),
    ],
)
def test_bad_configs_write_nothing(capsys, tmp_path, config, flags, message):
    run = tmp_path / "run"
    assert message in run_refused(capsys, "train", config, "--output-dir", run, *flags)
    assert not run.exists()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise KeyError('answer')", "KeyError"),
        ("return [float('nan')] * len(prompts)", "nan"),
        ("return [1.0]  * (len(prompts) + 1)", "2"),
        ("return 1.0", "score"),
        ("return ['high'] * len(prompts)", "'high'"),
    ],
)
def test_broken_reward_functions_are_named_before_any_compute(
    capsys, tmp_path, config, body, message
):
    path = tmp_path / "broken.py"
    path.write_text(f"def score(prompts, completions):\n    {body}\n")
    run = tmp_path / "run"
    error = run_refused(capsys, "train", config, "--rewards", f"{path}:score", "--output-dir", run)
    assert "score" in error
    assert message in error
    assert not run.exists()


def test_a_reward_that_breaks_later_keeps_the_work_so_far(capsys, tmp_path, config):
    path = tmp_path / "late.py"
    path.write_text(
        "calls = []\n"
        "def score(prompts, completions):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 5:\n"
        "        raise RuntimeError('late')\n"
        "    return [len(c) % 3 for c in completions]\n"
    )
    run = tmp_path / "run"
    words = ["train", str(config), "--rewards", f"{path}:score", "--output-dir", str(run)]
    assert main([*words, "--max-steps", "9"]) == 2
    error = capsys.readouterr().err
    assert "score" in error
    assert "late" in error
    assert len(list(run.glob("checkpoint-*"))) == 1


def test_directories_that_are_not_runs_are_left_alone(capsys, tmp_path, config):
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "chapter.txt").write_text("years of work")
    for flags in ([], ["--overwrite"]):
        error = run_refused(capsys, "train", config, "--output-dir", other, *flags)
        assert "is not a FastRL run" in error
    assert [path.name for path in other.iterdir()] == ["chapter.txt"]


def test_overwrite_replaces_a_run_and_keeps_what_is_not_its_own(tmp_path, config):
    run = tmp_path / "run"
    words = ["train", str(config), "--output-dir", str(run)]
    assert main([*words, "--save.save-steps", "1"]) == 0
    (run / "notes.txt").write_text("mine")
    assert main([*words, "--overwrite", "--max-steps", "1"]) == 0
    assert (run / "notes.txt").read_text() == "mine"
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-1"]
    assert json.loads((run / "summary.json").read_text())["steps"] == 1


def test_places_that_cannot_be_written(capsys, tmp_path, config):
    (tmp_path / "file").write_text("")
    error = run_refused(capsys, "train", config, "--output-dir", tmp_path / "file" / "run")
    assert "is not a writable directory" in error
    error = run_refused(capsys, "eval", config, "--json", tmp_path / "nowhere" / "eval.json")
    assert "expected a file in an existing directory" in error


def test_no_disk_space_is_said_before_writing(capsys, tmp_path, config, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    error = run_refused(capsys, "train", config, "--output-dir", tmp_path / "run")
    assert "not enough disk space" in error
    assert not (tmp_path / "run").exists()


def test_a_broken_jsonl_line_is_numbered(capsys, tmp_path, config):
    tiny_policy().save(tmp_path / "model")
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "a", "answer": "b"}\n{"prompt": \n')
    config.write_text(
        f"""
task = "jsonl:{data}"
rewards = ["exact"]
[model]
path = "{tmp_path / "model"}"
[rollout]
max_prompt_length = 48
max_completion_length = 8
"""
    )
    assert "data.jsonl:2" in run_refused(
        capsys, "train", config, "--output-dir", tmp_path / "run"
    )  # fmt: skip


def test_a_finished_run_goes_on_without_losing_or_repeating_a_line(tmp_path, config):
    run, whole = tmp_path / "run", tmp_path / "whole"
    assert main(["train", str(config), "--output-dir", str(run)]) == 0
    with (run / "completions.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": 1, "completion": "a\u2028b"}, ensure_ascii=False) + "\n")
    assert main(["train", f"--resume={run}", "--max-steps", "3"]) == 0
    assert main(["train", str(config), "--output-dir", str(whole), "--max-steps", "3"]) == 0
    weights = [(d / "final" / "model.safetensors").read_bytes() for d in (run, whole)]
    assert weights[0] == weights[1]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], "eval_reward" in row) for row in rows] == [
        (0, True), (1, False), (2, False), (2, True), (3, False), (3, True),
    ]  # fmt: skip
    assert main(["train", "--resume", str(run)]) == 0
    assert len((run / "metrics.jsonl").read_text().splitlines()) == len(rows)


def test_a_run_stopped_before_any_checkpoint_starts_anew(tmp_path, config):
    run = tmp_path / "run"
    assert main(["train", str(config), "--output-dir", str(run)]) == 0
    first = (run / "completions.jsonl").read_bytes()
    shutil.rmtree(run / "checkpoint-2")
    assert main(["train", "--resume", str(run)]) == 0
    assert (run / "completions.jsonl").read_bytes() == first
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 2]


@pytest.mark.parametrize(
    "flags", [["--seed", "5"], ["--prompts-per-step", "3"], ["--optim.learning-rate", "1"]]
)
def test_resuming_does_not_change_what_is_trained(capsys, tmp_path, config, flags):
    run = tmp_path / "run"
    assert main(["train", str(config), "--output-dir", str(run)]) == 0
    capsys.readouterr()
    error = run_refused(capsys, "train", "--resume", run, "--max-steps", "4", *flags)
    field = flags[0].removeprefix("--").replace("-", "_")
    assert f"the resumed run has another {field} (" in error
    assert f"add --allow-change {field}" in error
    assert "give no --overwrite" in run_refused(capsys, "train", "--resume", run, "--output-dir=x")
    (run / "checkpoint-2" / "optimizer.pt").write_bytes(b"")
    error = run_refused(capsys, "train", "--resume", run, "--max-steps", "4")
    assert "no checkpoint in" in error
    assert "optimizer.pt has 0 bytes" in error


def test_overwrite_deletes_neither_foreign_directories_nor_its_own_input(capsys, tmp_path, config):
    project = tmp_path / "project"
    (project / "reference").mkdir(parents=True)
    (project / "reference" / "paper.pdf").write_text("mine")
    (project / "config.toml").write_text(config.read_text())
    words = ["train", project / "config.toml", "--output-dir", project, "--overwrite"]
    assert "is not a FastRL run" in run_refused(capsys, *words)
    assert (project / "reference" / "paper.pdf").exists()

    run = tmp_path / "run"
    assert main(["train", str(config), "--output-dir", str(run)]) == 0
    head, _, tail = config.read_text().partition("[model.architecture]")
    text = f'{head}[model]\npath = "{run / "final"}"\n[rollout]{tail.partition("[rollout]")[2]}'
    config.write_text(text)
    capsys.readouterr()
    error = run_refused(capsys, "train", config, "--output-dir", run, "--overwrite")
    assert "--overwrite would delete" in error
    assert (run / "final" / "model.safetensors").exists()


def test_divergence_is_said_and_not_saved(capsys, tmp_path, config):
    run = tmp_path / "run"
    flags = ["--warm-start.steps", "6", "--warm-start.learning-rate", "1e30"]
    assert main(["train", str(config), "--output-dir", str(run), *flags]) == 2
    assert "gradient is not finite; lower its learning rate" in capsys.readouterr().err
    assert not (run / "final").exists()
    assert not list(run.glob("checkpoint-*"))


def test_a_reward_that_breaks_in_the_last_evaluation_loses_no_training(capsys, tmp_path, config):
    path = tmp_path / "late.py"
    path.write_text(
        "calls = []\n"
        "def score(prompts, completions):\n"
        "    calls.append(1)\n"
        "    assert len(calls) < 5\n"
        "    return [len(c) % 3 for c in completions]\n"
    )
    run = tmp_path / "run"
    words = ["train", str(config), "--rewards", f"{path}:score", "--output-dir", str(run)]
    assert main(words) == 2
    assert "AssertionError" in capsys.readouterr().err
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-2"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("attention_dropout = 0.1", "dropout 0.1"),
        ("num_attention_heads = 3", "cannot run a packed row"),
    ],
)
def test_models_that_cannot_be_packed_are_refused_first(capsys, tmp_path, config, lines, message):
    text = config.read_text().replace("num_attention_heads = 4\n", "")
    default = "" if "num_attention_heads" in lines else "\nnum_attention_heads = 4"
    config.write_text(text.replace("[rollout]", f"{lines}{default}\n[rollout]"))
    run = tmp_path / "run"
    assert message in run_refused(capsys, "train", config, "--output-dir", run)
    assert not run.exists()
