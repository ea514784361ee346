"""TOML and command line to Config and back; every mistake is one line that names the fix."""

import ast
import dataclasses
import inspect
import itertools
from pathlib import Path

import pytest

from fastrl.config import Config, RolloutConfig
from fastrl.config_io import load_config, override_config, save_config
from fastrl.errors import InputError

GOOD = """
task = "reasoning_gym:chain_sum"
rewards = ["task"]
[task_args]
min_terms = 2
[rollout]
num_generations = 4
temperature = 1
"""


def write(tmp_path, text):
    path = tmp_path / "config.toml"
    path.write_text(text)
    return path


def test_toml_and_flags(tmp_path):
    config = load_config(write(tmp_path, GOOD))
    assert config.rollout == RolloutConfig(num_generations=4, temperature=1.0)
    flags = ["--rollout.num-generations", "16", "--task-args.min-terms", "3", "--seed", "7"]
    changed = override_config(config, [*flags, "--objective.beta", "0.1"], "fastrl train")
    assert changed.rollout.num_generations == 16
    assert changed.task_args == {"min_terms": 3}
    assert (changed.seed, changed.objective) == (7, {"beta": 0.1})
    changed = override_config(config, ["--objective.parameters", "a.b", "0.5"], "fastrl train")
    assert changed.objective == {"parameters": {"a.b": 0.5}}
    assert config.rollout.num_generations == 4


def test_a_budget_of_tokens_is_a_number_or_left_out(tmp_path):
    config = load_config(write(tmp_path, GOOD))
    assert config.rollout.max_tokens_per_step is None
    flags = ["--rollout.max-tokens-per-step", "4096"]
    changed = override_config(config, flags, "fastrl train")
    assert changed.rollout.max_tokens_per_step == 4096
    for one in (config, changed):
        save_config(one, tmp_path / "saved.toml")
        assert load_config(tmp_path / "saved.toml") == one


def test_saved_config_reads_back_the_same(tmp_path):
    config = load_config(write(tmp_path, GOOD))
    config = dataclasses.replace(config, reward_weights=(0.5,), output_dir='a "quoted" path')
    save_config(config, tmp_path / "saved.toml")
    assert load_config(tmp_path / "saved.toml") == config


def test_every_field_has_a_docstring():
    """The help text of a flag is the string under its field."""
    tree = ast.parse(Path(inspect.getfile(Config)).read_text(encoding="utf-8"))
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    fields = 0
    for cls in (node for node in classes if node.name.endswith("Config")):
        for item, following in itertools.pairwise([*cls.body, ast.Pass()]):
            if isinstance(item, ast.AnnAssign):
                fields += 1
                described = isinstance(following, ast.Expr) or "Config" in ast.unparse(item)
                assert described, ast.unparse(item)
    assert fields >= 50


def test_the_config_stays_small():
    """Every option costs a reader: those of a method, in `objective`, are the method's own."""

    def leaves(value):
        items = [getattr(value, field.name) for field in dataclasses.fields(value)]
        return sum(leaves(item) if dataclasses.is_dataclass(item) else 1 for item in items)

    assert leaves(Config()) < 70


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tusk = 'x'", "unknown key 'tusk'; did you mean 'task'?"),
        ("[rollout]\nnum_generation = 4", "'rollout.num_generation'; did you mean 'num_generatio"),
        ("[rollout]\nnum_generations = '4'", "rollout.num_generations must be a whole number"),
        ("[rollout]\nnum_generations = 4.5", "rollout.num_generations must be a whole number"),
        ("[rollout]\nnum_generations = true", "rollout.num_generations must be a whole number"),
        ("[rollout]\nnum_generations = 0", "rollout.num_generations must be at least 1, got 0"),
        ("[rollout]\nmax_tokens_per_step = 0", "max_tokens_per_step must be at least 1, got 0"),
        ("[rollout]\nmax_tokens_per_step = 9.5", "max_tokens_per_step must be a whole number"),
        ("workspace_mb = 0", "workspace_mb must be above 0, got 0"),
        ("[rollout]\ntop_p = 1.5", "rollout.top_p must be above 0 and at most 1, got 1.5"),
        ("[rollout]\ntemperature = nan", "rollout.temperature must be a finite number, got nan"),
        ("rollout = 3", "rollout must be a table, got 3"),
        ("rewards = 'task'", "rewards must be a list, got 'task'"),
        ("[objective]\nbetta = 0.1", "'objective.betta'; did you mean 'beta'?"),
        (
            "[objective]\nepsilon_low = 1.5",
            "objective.epsilon_low must be at least 0 and at most 1",
        ),
        ("[optim]\nin_backward = 'yes'", "must be one of off, two_phase, previous_norm"),
        ("task = ", "not valid TOML"),
    ],
)
def test_bad_files(tmp_path, text, message):
    with pytest.raises(InputError) as error:
        load_config(write(tmp_path, text))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"cannot read config .*nowhere\.toml: No such file"):
        load_config(tmp_path / "nowhere.toml")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rollout.num-generation", "4"], "did you mean '--rollout.num-generations'?"),
        (["--rollout.num-generations", "x"], "--rollout.num-generations: invalid literal"),
        (["--rollout.num-generations"], "Missing value for argument '--rollout.num-generations'"),
        (["--rollout.num-generations", "0"], "rollout.num_generations must be at least 1, got 0"),
        (["--optim.in-backward", "x"], "invalid choice 'x'"),
        (
            ["--objective.epsilon-low", "2"],
            "objective.epsilon_low must be at least 0 and at most 1",
        ),
        (["--task-args.mix", "3"], "did you mean '--task-args.min-terms'?"),
    ],
)
def test_bad_flags(tmp_path, flags, message):
    with pytest.raises(InputError) as error:
        override_config(load_config(write(tmp_path, GOOD)), flags, "fastrl train")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
