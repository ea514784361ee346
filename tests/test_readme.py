"""What the README shows is what was measured, and what it says can be run."""

import importlib
import json
import re
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from report_demo import BEGIN, CURVE, END, RESULTS, render
from report_rows import DOCUMENTS, filled

from fastrl.cli import COMMANDS
from fastrl.config_io import load_config
from fastrl_kernels import LinearLogps, Plan, PolicyLoss
from tests.helpers import random_ids, tiny_model, tiny_policy

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_demo_section_is_generated_from_the_committed_results():
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    section = README.split(BEGIN)[1].split(END)[0].strip()
    assert section == render(results)
    assert CURVE.is_file()
    for run in results["runs"]:
        assert run["pass_at_1_after"] - run["pass_at_1_before"] >= 0.30
        assert run["num_parameters"] <= 2_000_000


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_tables_are_those_of_the_committed_results(path):
    text = path.read_text(encoding="utf-8")
    assert text == filled(text)


def test_first_code_comes_within_25_lines():
    lines = README.splitlines()
    assert next(number for number, line in enumerate(lines) if line.startswith("```")) < 25


def test_every_file_and_command_that_is_named_exists():
    for name in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / name).exists(), name
    for command in re.findall(r"`fastrl (\w+)", README):
        assert command in COMMANDS, command
    tree = README.split("## Files")[1].split("```")[1]
    for package in (ROOT / "fastrl", ROOT / "kernels" / "fastrl_kernels"):
        for path in package.iterdir():
            hidden = path.name.startswith("_") or path.name == "py.typed"
            assert hidden or f"  {path.name}" in tree, f"{path.name} is not in the tree"
    root = ROOT
    for line in tree.strip().splitlines():
        words = re.split(r"\s{2,}", line.strip())[0].split()
        if not line.startswith(" "):
            root = ROOT / words[0]
            assert root.is_dir(), line
            continue
        for word in words:
            assert (root / word).exists(), word


def test_examples_are_valid_configs():
    examples = sorted((ROOT / "examples").glob("*.toml"))
    assert len(examples) >= 2
    for path in examples:
        assert load_config(path).task


@pytest.mark.parametrize("page", ["README.md", "docs/modules.md", "kernels/README.md"])
def test_python_examples_run_as_written(page):
    """Each block sees a model and token ids, as the text around it says."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.S)
    assert blocks
    prompts, flat = random_ids([5, 3]), random_ids([4, 2, 6, 1], seed=1)
    for block in blocks:
        model = tiny_model(dtype=torch.float32)
        names = {
            "model": model,
            "prompt_ids": prompts,
            "completion_ids": [flat[:2], flat[2:]],
            "hidden_states": torch.randn(7, 32, generator=torch.Generator().manual_seed(0)),
            "target_ids": random_ids([7])[0],
            "torch": torch,
            "advantages": torch.linspace(-1, 1, 7),
            "token_weights": torch.full((7,), 1 / 7),
            "old_logps": torch.linspace(-5, -3, 7),
        }
        exec(compile(block, page, "exec"), names)
        out = names["out"]
        assert isinstance(out, LinearLogps | PolicyLoss | Plan)
        if "plan" in names:
            assert [len(logps) for logps in names["logps"]] == [4, 2, 6, 1]


def test_the_loop_of_your_own_samples():
    text = (ROOT / "docs" / "rollouts.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", text, re.S)
    policy = tiny_policy()
    names = {"model": policy.model, "tokenizer": policy.tokenizer}
    names["prompt_ids"] = tuple(random_ids([5, 3]))
    exec(compile(block, "docs/rollouts.md", "exec"), names)
    assert len(names["logps"]) == 16
    assert names["rollouts"].num_generations == 8


def test_study_section_is_generated_from_the_committed_results():
    report_study = importlib.import_module("report_study")
    results = json.loads(report_study.RESULTS.read_text(encoding="utf-8"))
    text = report_study.DOCUMENT.read_text(encoding="utf-8")
    assert text == report_study.replace_section(text, report_study.render(results))
    assert report_study.FIGURE.is_file()
    assert len(results["runs"]) == 10
