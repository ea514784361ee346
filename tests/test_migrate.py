"""Every row of docs/migrate.md against the packages that it speaks of, where they are installed."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import fastrl_kernels
from fastrl.advantages import ADVANTAGES
from fastrl.explain import explain
from fastrl.integrations.trl import LOSSES, SAME, from_trl
from fastrl.integrations.verl_losses import why_not
from fastrl.integrations.verl_settings import AGGREGATIONS
from fastrl.methods.axes import AXES, hyper_parameters_of
from fastrl.methods.table import METHODS
from fastrl.report import read_metrics
from fastrl.run import train
from fastrl_kernels import FusedLinearGRPOLoss, policy_loss
from fastrl_kernels.objectives import REGULARISERS, bind_torch
from tests.test_training import tiny_config

PAGE = Path(__file__).parent.parent / "docs" / "migrate.md"


def section(title: str) -> str:
    """The text below a heading, up to the next one."""
    _, _, after = PAGE.read_text(encoding="utf-8").partition(f"\n### {title}\n")
    assert after, title
    return re.split(r"\n##+ ", after)[0]


def rows(title: str) -> list[list[list[str]]]:
    """For each row of the table below a heading, what stands in `backticks` in each cell."""
    lines = [line for line in section(title).splitlines() if line.startswith("| `")]
    return [[re.findall(r"`([^`]+)`", cell) for cell in line.split("|")[1:-1]] for line in lines]


def ids(row: Any) -> str:
    return ",".join(row[0])


def resolve(path: str) -> Any:
    """What stands under a dotted path; a function goes before a module of its name."""
    first, *names = path.split(".")
    found = importlib.import_module(first)
    for name in names:
        if not hasattr(found, name):
            importlib.import_module(f"{found.__name__}.{name}")
        found = getattr(found, name)
    return found


FIELDS = {line.partition(" (")[0] for line in explain("") if not line.startswith(" ")}


OTHERS = {"Liger": "liger_kernel", "TRL": "trl"}


@pytest.mark.parametrize("library", OTHERS)
def test_classes_and_functions(library):
    """Ours exist wherever this runs; theirs where they are installed."""
    table = rows(f"Classes and functions of {library}")
    for _, ours, *_ in table:
        assert all(callable(resolve(path)) for path in ours)
    pytest.importorskip(OTHERS[library])
    for theirs, *_ in table:
        assert all(callable(resolve(path)) for path in theirs)


def test_all_modules_with_liger_s_signatures_are_there():
    known = {name for name in fastrl_kernels.__all__ if name.startswith("FusedLinear")}
    found = {path.rpartition(".")[2] for row in rows("Classes and functions of Liger")
             for path in row[1]}  # fmt: skip
    assert known - found == {"FusedLinearLogps", "FusedLinearPolicyLoss"}  # of our own form
    for row in rows("Classes and functions of Liger"):
        ours, theirs = (paths[0].rpartition(".")[2] for paths in (row[1], row[0]))
        if ours.startswith("FusedLinear"):
            assert theirs == f"Liger{ours}"


def test_arguments_of_the_grpo_loss():
    table = rows("Arguments of the GRPO loss")
    ours = inspect.signature(policy_loss).parameters
    module = {
        *inspect.signature(FusedLinearGRPOLoss.__init__).parameters,
        *inspect.signature(FusedLinearGRPOLoss.forward).parameters,
    }
    theirs = [name for row in table for name in row[0]]
    assert set(theirs) <= module
    assert {name for row in table for name in row[1]} <= set(ours)
    left = {name for name in module - set(theirs) if not name.startswith("vespo_")}
    assert left == {
        "self", "compiled", "importance_sampling_level", "workspace_mb", "implementation",
    }  # fmt: skip


def keywords(text: str) -> dict[str, Any]:
    """Literals by name, of `name=literal, ...`."""
    (call,) = ast.parse(f"f({text})").body
    return {item.arg: ast.literal_eval(item.value) for item in call.value.keywords}  # type: ignore


@pytest.mark.parametrize("row", rows("Values of loss_type"), ids=ids)
def test_values_of_loss_type_of_liger(row):
    (given,), (path,) = row
    loss = FusedLinearGRPOLoss(**{"beta": 0.0, "max_completion_length": 9, **keywords(given)})
    objective = loss._objective()
    used = [objective.surrogate, *(item.function for item in objective.regularisers)]
    assert resolve(path) in used


TRL_ROWS = rows("Fields of GRPOConfig")


@pytest.mark.parametrize("row", TRL_ROWS, ids=ids)
def test_fields_of_grpo_config(row, tmp_path):
    trl = pytest.importorskip("trl")
    base: dict[str, Any] = {
        "output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "report_to": [],
        "max_steps": 8, "num_generations": 4, "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 2, "steps_per_generation": 4,
        "gradient_checkpointing": False,
    }  # fmt: skip
    given = keywords(row[0][0])
    if "generation_batch_size" in given:
        del base["steps_per_generation"]
    config = from_trl(trl.GRPOConfig(**{**base, **given})).config
    for text in row[1]:
        path, _, value = text.partition(" = ")
        assert path in FIELDS
        found: Any = config
        for name in path.split("."):
            found = found[name] if isinstance(found, dict) else getattr(found, name)
        assert found == ast.literal_eval(value), text


def test_fields_that_are_the_same_are_all_there():
    """Of `SAME`, which `fastrl explain` reads: one list of names."""
    found = {
        (text.partition(" = ")[0], name)
        for row in TRL_ROWS
        for name in keywords(row[0][0])
        for text in row[1]
    }
    assert set(SAME.items()) <= found


def test_values_of_loss_type_of_trl():
    table = rows("Values of loss_type and importance_sampling_level")
    found = [tuple(tuple(map(ast.literal_eval, cell)) for cell in row) for row in table]
    assert dict(found) == LOSSES  # which test_trl_parity.py compares with TRL's losses


@pytest.fixture(scope="module")
def our_metrics(tmp_path_factory) -> set[str]:
    """Of a step of a run with a reference policy."""
    directory = tmp_path_factory.mktemp("run") / "run"
    config = tiny_config(directory, max_steps=1, objective={"beta": 0.1})
    train(config)
    return {name for line in read_metrics(directory) for name in line}


def test_metrics_of_trl(our_metrics):
    names = re.findall(r"`([^`]+)`", section("Metrics of TRL"))
    assert len(names) > 20
    assert set(names) <= our_metrics
    trainer = pytest.importorskip("trl.trainer.grpo_trainer")
    text = inspect.getsource(trainer)
    of_transformers = {"loss", "grad_norm", "learning_rate"}
    for name in set(names) - of_transformers:
        assert f'"{name.replace("/task/", "/{reward_func_name}/")}"' in text, name


# verl is read, not imported: it needs a good deal of other packages.


@pytest.fixture(scope="module")
def verl() -> Path:
    found = importlib.util.find_spec("verl")
    if found is None or not found.submodule_search_locations:
        pytest.skip("verl is not installed")
    return Path(found.submodule_search_locations[0])


def names_in(path: Path) -> set[str]:
    """What a file defines at its top level."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return found


def test_our_side_of_verl():
    for row in rows("Functions of verl"):
        assert all(resolve(path) for path in row[1])


def test_functions_of_verl(verl):
    for row in rows("Functions of verl"):
        module, _, name = row[0][0].rpartition(".")
        file = verl.parent.joinpath(*module.split(".")).with_suffix(".py")
        assert name in names_in(file), row[0]


def test_our_fields_beside_verl_s():
    for row in rows("Keys of verl's configuration"):
        for path in row[1]:
            if path.startswith("objective.parameters."):
                name = path.rpartition(".")[2]
                owners = [(axis, key) for axis, choices in AXES.items() for key in choices]
                assert any(name in hyper_parameters_of(*owner) for owner in owners), path
            else:
                assert path in FIELDS, path


def test_keys_of_verl(verl):
    import yaml

    file = verl / "trainer" / "config" / "_generated_ppo_trainer.yaml"
    content = yaml.safe_load(file.read_text(encoding="utf-8"))
    for row in rows("Keys of verl's configuration"):
        found = content
        for name in row[0][0].split("."):
            assert name in found, row[0]
            found = found[name]


@pytest.mark.parametrize("row", rows("Values of loss_mode"), ids=ids)
def test_our_side_of_loss_modes(row):
    method = METHODS[row[1][0]]
    assert method.surrogate.name == row[2][0]
    assert why_not(method) is None  # so register_policy_losses has it


def test_loss_modes_of_verl(verl):
    text = (verl / "trainer" / "ppo" / "core_algos.py").read_text(encoding="utf-8")
    known = set(re.findall(r'@register_policy_loss\("(\w+)"\)', text))
    assert {row[0][0] for row in rows("Values of loss_mode")} == known - {
        "dppo_kl", "dro", "bypass_mode",
    }  # fmt: skip


def test_averages_of_verl(verl):
    table = {row[1][0]: row[0][0] for row in rows("Values of loss_agg_mode")}
    assert table == AGGREGATIONS  # which test_verl_losses.py compares with verl's
    text = (verl / "trainer" / "ppo" / "core_algos.py").read_text(encoding="utf-8")
    assert all(f'"{name}"' in text for name in table.values())


@pytest.mark.parametrize("row", rows("Values of kl_loss_type"), ids=ids)
def test_penalties_of_verl(row):
    (kind,), (name,) = row[:2]
    function = bind_torch(REGULARISERS[name])
    core = pytest.importorskip("verl.trainer.ppo.core_algos")
    near = torch.randn(2, 40, generator=torch.Generator().manual_seed(0))
    logps, ref_logps = 0.5 * near - 2
    values, slopes = function(logps, ref_logps)
    expected = core.kl_penalty(logps.requires_grad_(), ref_logps, kind)
    if kind != "k1+":
        torch.testing.assert_close(values, expected.detach())
    torch.testing.assert_close(slopes, torch.autograd.grad(expected.sum(), logps)[0])


ESTIMATORS = rows("Values of adv_estimator")


@pytest.mark.parametrize("row", ESTIMATORS, ids=ids)
def test_our_side_of_estimators(row):
    choice = METHODS[row[1][0]].advantage
    assert choice is not None
    assert choice.name == row[2][0]


def test_estimators_of_verl(verl):
    text = (verl / "trainer" / "ppo" / "core_algos.py").read_text(encoding="utf-8")
    known = set(re.findall(r'^    [A-Z_]+ = "(\w+)"$', text, re.M))
    others = {"grpo_vectorized", "rloo_vectorized", "tir_optimal_token_baseline"}
    assert {row[0][0] for row in ESTIMATORS} == known - others


@pytest.mark.parametrize("name", ["grpo", "rloo", "opo", "gpg", "grpo_passk"])
def test_outcome_advantages_are_verl_s(name):
    core = pytest.importorskip("verl.trainer.ppo.core_algos")
    (ours,) = (row[2][0] for row in ESTIMATORS if row[0][0] == name)
    generator = torch.Generator().manual_seed(0)
    groups = torch.arange(3).repeat_interleave(4)
    lengths = torch.randint(1, 6, (12,), generator=generator)
    rewards = torch.randn(12, generator=generator).mul(4).round()  # some alike, some zero
    mask = (torch.arange(5) < lengths[:, None]).float()
    token_rewards = torch.zeros(12, 5).scatter(1, lengths[:, None] - 1, rewards[:, None])
    estimate = core.get_adv_estimator_fn(name)
    table, _ = estimate(
        token_rewards, mask, index=groups.numpy(), config={"norm_adv_by_std_in_grpo": True}
    )
    given = {"rewards": rewards, "groups": groups, "lengths": lengths}
    function = ADVANTAGES[ours]
    arguments = inspect.signature(function).parameters
    settings = {"std_epsilon": 1e-6} if "std_epsilon" in arguments else {}
    found = function(*(given[x] for x in arguments if x in given), **settings)
    torch.testing.assert_close(found, table[:, 0], rtol=1e-5, atol=1e-6)
