"""Whole runs of TRL's trainers and of the drop-in, side by side."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastrl.integrations import head_rows
from fastrl.integrations.trl_batches import groups_of
from tests.helpers_trl import offline, online, save_tiny

trl = pytest.importorskip("trl")
CLOCKS = ("time", "runtime", "per_second")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("tiny") / "model")


def small_ids(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """The share of tokens in one half of the vocabulary: a few steps can raise it."""
    return [sum(token < 130 for token in ids) / len(ids) for ids in completion_ids]


def trained(trainer: Any, directory: str, *, resume: str | None = None, **settings: Any) -> Any:
    made = online(trainer, directory, **settings)
    torch.manual_seed(3)
    made.train(resume_from_checkpoint=resume)
    return made


def largest_difference(ours: Any, theirs: Any) -> float:
    pairs = zip(ours.model.parameters(), theirs.model.parameters(), strict=True)
    return max(float((a - b).detach().abs().max()) for a, b in pairs)


def assert_same_logs(ours: Any, theirs: Any, tolerance: float) -> None:
    assert len(ours.state.log_history) == len(theirs.state.log_history)
    for mine, its in zip(ours.state.log_history, theirs.state.log_history, strict=True):
        assert mine.keys() == its.keys()
        for name, value in its.items():
            if not any(clock in name for clock in CLOCKS):
                expected = value and pytest.approx(value, rel=tolerance, abs=tolerance)
                assert mine[name] == expected, (name, its["step"])


def test_twenty_steps_have_the_same_rewards_metrics_and_weights(directory):
    from fastrl.integrations.trl import FastGRPOTrainer

    settings = {
        "max_steps": 20, "learning_rate": 1e-2, "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 4, "rest": {"reward": small_ids},
    }  # fmt: skip
    theirs = trained(trl.GRPOTrainer, directory, **_copy(settings))
    ours = trained(
        FastGRPOTrainer, directory, **_copy(settings), fast={"strict": True, "regroup": False}
    )
    rewards = [entry["reward"] for entry in theirs.state.log_history if "reward" in entry]
    assert len(rewards) == 20
    assert sum(rewards[-5:]) > sum(rewards[:5]) + 5 * 0.1  # it learns
    assert_same_logs(ours, theirs, 1e-4)
    assert largest_difference(ours, theirs) < 1e-4


def _copy(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: dict(x) if isinstance(x, dict) else x for key, x in settings.items()}


def adapter() -> dict[str, Any]:
    peft = pytest.importorskip("peft")
    return {"peft_config": peft.LoraConfig(r=4, target_modules="all-linear")}


RUNS: dict[str, dict[str, Any]] = {
    "old policies and a reference": {"num_iterations": 2, "beta": 0.1, "sync_ref_model": True,
                                     "ref_model_sync_steps": 2},
    "adapter off for the reference": {"beta": 0.1, "rest": adapter},
    "checkpointed layers": {"activation_checkpointing": True},
    "checkpointed layers, adapter": {"activation_checkpointing": True, "rest": adapter},
    "masked truncated completions": {"mask_truncated_completions": True},
    "temperature and evaluation": {"temperature": 0.7, "eval_strategy": "steps", "eval_steps": 2,
                                   "per_device_eval_batch_size": 8},
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_short_runs_are_trls(directory, name):
    from fastrl.integrations.trl import FastGRPOTrainer

    found = []
    for trainer, fast in (
        (trl.GRPOTrainer, {}),
        (FastGRPOTrainer, {"strict": True, "regroup": False}),
    ):
        settings = {"max_steps": 2, "learning_rate": 1e-2, "gradient_accumulation_steps": 2}
        settings |= RUNS[name]
        if "rest" in settings:
            settings["rest"] = settings["rest"]()
        if "eval_steps" in settings:
            datasets = pytest.importorskip("datasets")
            prompts = datasets.Dataset.from_dict({"prompt": ["What is 3 + 3?", "Say"]})
            settings["rest"] = {"eval_dataset": prompts}
        found.append(trained(trainer, directory, **settings, fast=fast))
    theirs, ours = found
    assert_same_logs(ours, theirs, 1e-4)
    assert largest_difference(ours, theirs) < 1e-5


def test_half_precision_is_trls_up_to_its_rounding(directory):
    """Under autocast the layers, the head and the reference are in bfloat16."""
    from fastrl.integrations.trl import FastGRPOTrainer

    settings = {"max_steps": 1, "bf16": True, "beta": 0.1, "learning_rate": 0.1, "optim": "sgd"}
    theirs = trained(trl.GRPOTrainer, directory, **settings)
    ours = trained(FastGRPOTrainer, directory, **settings, fast={"strict": True})
    assert_same_logs(ours, theirs, 2e-2)
    exact = trained(trl.GRPOTrainer, directory, **{**settings, "bf16": False})
    # Each differs from float32 by its own rounding, and from the other by no more than both.
    assert largest_difference(ours, theirs) < 2 * largest_difference(theirs, exact)
    assert largest_difference(ours, exact) < 2 * largest_difference(theirs, exact)


def test_a_trainer_that_has_trained_already_keeps_its_autocast(directory):
    """accelerate wraps a model's forward pass when training begins, a reference's before."""
    from fastrl.integrations.trl import FastDPOTrainer, accelerate_trl

    settings = {"bf16": True, "max_steps": 1, "learning_rate": 0.0}
    late = offline(trl.DPOTrainer, directory, **settings)
    late.train()
    late = accelerate_trl(late, strict=True)
    fast = offline(FastDPOTrainer, directory, **settings, fast={"strict": True})
    fast.train()
    batch = next(iter(fast.get_train_dataloader()))
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    for name in ("model", "ref_model"):
        outputs = [
            getattr(trainer, name)(**inputs, labels=labels, fused_lm_head=True).log_probs
            for trainer in (late, fast)
        ]
        assert outputs[0].dtype == torch.float32
        assert torch.equal(*outputs)
        with torch.autocast("cpu", enabled=False):
            exact = head_rows.head_rows(getattr(late, name), **inputs, labels=labels)
        assert exact.hidden_states.dtype == torch.float32
        error = (outputs[0] - exact.table(exact.linear_logps().logps)).abs().max()
        assert 1e-4 < error < 0.2  # it was in half precision


@pytest.mark.parametrize("kind", ["GRPO", "RLOO"])
def test_regrouping_leaves_weights_and_losses(directory, kind):
    """Scattered groups come together; only what is logged per micro-batch may differ."""
    from fastrl.integrations import trl as ours_of

    settings = {
        "max_steps": 4, "learning_rate": 1e-3, "gradient_accumulation_steps": 4, "kind": kind,
        "per_device_train_batch_size": 4, "num_iterations": 2, "steps_per_generation": 8,
    }  # fmt: skip
    theirs = trained(getattr(trl, f"{kind}Trainer"), directory, **settings)
    ours = trained(getattr(ours_of, f"Fast{kind}Trainer"), directory, **settings)
    assert largest_difference(ours, theirs) < 1e-5
    for mine, its in zip(ours.state.log_history, theirs.state.log_history, strict=True):
        for name in {"loss", "grad_norm", "reward"} & its.keys():
            assert mine[name] == pytest.approx(its[name], rel=1e-4, abs=1e-6)
    num_groups = [
        sum(int(groups_of(batch).max()) + 1 for batch in trainer._buffered_inputs)
        for trainer in (theirs, ours)
    ]
    assert num_groups[1] < num_groups[0]


def test_checkpoints_go_both_ways(directory, tmp_path):
    from fastrl.integrations.trl import FastGRPOTrainer

    settings = {"learning_rate": 1e-3, "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    kinds = {"theirs": trl.GRPOTrainer, "ours": FastGRPOTrainer}
    for first, second in (("theirs", "ours"), ("ours", "theirs")):
        out = str(tmp_path / first)
        whole = trained(kinds[first], directory, **settings, output_dir=out)
        again = trained(
            kinds[second], directory, **settings, output_dir=out, resume=f"{out}/checkpoint-2"
        )
        assert again.state.global_step == 4
        assert largest_difference(again, whole) < 1e-5
    assert sorted(p.name for p in (tmp_path / "theirs/checkpoint-2").iterdir()) == sorted(
        p.name for p in (tmp_path / "ours/checkpoint-2").iterdir()
    )
