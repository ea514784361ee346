"""Whole runs of TRL's trainers and of the drop-in, side by side, and what the drop-in saves."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from fastrl.errors import InputError
from fastrl.integrations import head_rows
from fastrl.integrations.trl_batches import groups_of, regrouped
from tests.helpers_trl import assert_same, batch_of, offline, online, result_of, save_tiny

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


@pytest.mark.parametrize(("num_batches", "num_accumulated"), [(4, 2), (4, 4), (2, 4), (3, 2)])
def test_completions_stay_within_their_optimizer_step(directory, num_batches, num_accumulated):
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(0, 3, (num_batches * 4, 1), generator=generator)
    rows = torch.arange(num_batches * 4)
    batches = [
        {
            "prompt_ids": prompts[start : start + 4], "prompt_mask": torch.ones(4, 1),
            "row": rows[start : start + 4], "num_items_in_batch": torch.tensor(7), "nothing": None,
        }
        for start in range(0, len(rows), 4)
    ]  # fmt: skip
    found = regrouped(batches, num_accumulated)
    assert all(batch["num_items_in_batch"] == 7 and batch["nothing"] is None for batch in found)
    window = min(num_accumulated, num_batches)
    if num_batches % window:  # steps straddle what was generated
        assert found is batches
        return
    for start in range(0, num_batches, window):
        before, after = (
            torch.cat([x["row"] for x in y[start : start + window]]) for y in (batches, found)
        )
        assert sorted(after.tolist()) == before.tolist()
        groups = prompts[after, 0]
        assert groups.diff().ne(0).sum() + 1 == groups.unique().numel()  # each in one piece
        assert torch.equal(
            torch.cat([x["prompt_ids"] for x in found[start : start + window]])[:, 0], groups
        )


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


class Counts:
    """Tokens that layers and the head see, with and without gradient."""

    def __init__(self, model: Any) -> None:
        self.tokens = {True: 0, False: 0}
        model.model.layers[0].register_forward_hook(self._add)

    def _add(self, layer: Any, args: Any, output: Any) -> None:
        self.tokens[torch.is_grad_enabled()] += args[0].shape[0] * args[0].shape[1]


def test_prompts_stand_once_and_idle_completions_have_no_backward(directory):
    """Of batch_of: group 0 has 4 completions, 3 learn; group 1 has one left; group 2 is idle."""
    from fastrl.integrations.trl import FastGRPOTrainer

    theirs, ours = (online(x, directory) for x in (trl.GRPOTrainer, FastGRPOTrainer))
    batch = batch_of(theirs)
    for trainer in (theirs, ours):
        trainer.current_gradient_accumulation_steps = 1
    result_of(ours, batch)  # once, it sees whether padding counts as a position
    counts = [Counts(x.model) for x in (theirs, ours)]
    assert_same(result_of(ours, batch), result_of(theirs, batch))
    assert counts[0].tokens == {True: 8 * 19, False: 0}
    # Prompts of 12 and 5 tokens once; of every completion all but the last token. Completion 2,
    # idle in a group that learns, stays: its backward pass is less than another prompt.
    learning = 12 + (7 - 1) + (5 - 1) + (6 - 1) + (7 - 1) + 5 + (3 - 1)
    idle = 1 + (1 - 1) + (2 - 1)
    assert counts[1].tokens == {True: learning, False: idle}


def test_an_instance_of_a_subclass_keeps_its_own_loss(directory):
    from fastrl.integrations.trl import accelerate_trl

    class Halved(trl.GRPOTrainer):
        def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Any:
            return super()._compute_loss(model, inputs) / 2

    theirs, ours = online(Halved, directory), online(Halved, directory)
    assert accelerate_trl(ours, strict=True) is ours
    assert type(ours) is Halved
    for trainer in (theirs, ours):
        trainer.current_gradient_accumulation_steps = 1
    batch = batch_of(theirs)
    result_of(ours, batch)  # once, it sees whether padding counts as a position
    counts = Counts(ours.model)
    assert_same(result_of(ours, batch), result_of(theirs, batch))
    assert counts.tokens[True] < 8 * 19  # prompts are shared
    assert counts.tokens[False] == 0  # what an unknown loss needs is not known


def test_a_model_that_cannot_share_has_padded_rows_and_one_warning(tmp_path):
    from fastrl.integrations.trl import FastGRPOTrainer

    fields = {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}
    directory = save_tiny(tmp_path / "dynamic", **fields)
    theirs, ours, strict = (
        online(x, directory, fast=fast)
        for x, fast in (
            (trl.GRPOTrainer, {}), (FastGRPOTrainer, {}), (FastGRPOTrainer, {"strict": True})
        )
    )  # fmt: skip
    batch = batch_of(theirs)
    for trainer in (theirs, ours, strict):
        trainer.current_gradient_accumulation_steps = 1
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found, again = result_of(ours, batch), result_of(ours, batch)
    said = [str(item.message) for item in caught if "padded" in str(item.message)]
    assert len(said) == 1
    assert "longest sequence" in said[0]
    assert torch.equal(found.loss, again.loss)
    assert_same(found, result_of(theirs, batch))
    with pytest.raises(InputError, match=r"prompts cannot be shared: .*longest sequence"):
        result_of(strict, batch)


def doubled(_, bucket):  # annotations are checked, and would be strings here
    future: Any = torch.futures.Future()
    future.set_result(2 * bucket.buffer())
    return future


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("finds_unused", [False, True])
def test_every_gradient_goes_through_distributed_hooks(directory, tmp_path, finds_unused, level):
    """A hook of communication doubles what DistributedDataParallel sees, and that is all."""
    from fastrl.integrations.trl import accelerate_trl

    distributed = pytest.importorskip("accelerate.utils").DistributedType
    address = f"file://{tmp_path}/store"
    theirs, ours = (online(trl.GRPOTrainer, directory) for _ in range(2))
    for trainer in (theirs, ours):
        trainer.current_gradient_accumulation_steps = 1
        trainer.importance_sampling_level = level
    state = ours.accelerator.state
    was, state.distributed_type = state.distributed_type, distributed.MULTI_CPU
    accelerate_trl(ours, strict=True)
    state.distributed_type = was
    batch = batch_of(theirs)
    torch.distributed.init_process_group("gloo", init_method=address, rank=0, world_size=1)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(
            ours.model, find_unused_parameters=finds_unused
        )
        wrapped.register_comm_hook(None, doubled)
        for _ in range(2):
            found, expected = result_of(ours, batch, wrapped), result_of(theirs, batch)
            twice = {name: 2 * gradient for name, gradient in expected.gradients.items()}
            assert_same(found, expected._replace(gradients=twice))
    finally:
        torch.distributed.destroy_process_group()


def test_inputs_that_a_packed_row_lacks_have_padded_rows(directory):
    """As images have; the loss still is one pass, and nothing is left out of the padded batch."""
    from fastrl.integrations.trl import FastGRPOTrainer

    theirs, ours = (online(x, directory) for x in (trl.GRPOTrainer, FastGRPOTrainer))
    counts = Counts(ours.model)
    for trainer in (theirs, ours):
        trainer.current_gradient_accumulation_steps = 1
    batch = batch_of(theirs)
    batch["token_type_ids"] = torch.zeros(8, 19, dtype=torch.int64)
    with pytest.warns(UserWarning, match="no place for token_type_ids"):
        found = result_of(ours, batch)
    assert_same(found, result_of(theirs, batch))
    assert counts.tokens == {True: 8 * 19, False: 0}
    images = [{**batch, "pixel_values": [torch.ones(1)]}] * 2
    assert regrouped(images, 2) is images


def test_rows_are_made_by_one_function(directory, monkeypatch):
    """Old policies, references and the policy all come through head_rows; none past it."""
    from fastrl.integrations.trl import FastGRPOTrainer

    calls = []
    original = head_rows._shared

    def shared(model: Any, layout: Any, shape: Any) -> Any:
        calls.append((torch.is_grad_enabled(), shape[0]))
        return original(model, layout, shape)

    monkeypatch.setattr(head_rows, "_shared", shared)
    trained(
        FastGRPOTrainer, directory, max_steps=1, num_iterations=2, beta=0.1,
        per_device_train_batch_size=8,
    )  # fmt: skip
    assert calls == [(False, 8), (False, 8), (True, 8)]
