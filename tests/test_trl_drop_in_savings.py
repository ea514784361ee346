"""What the drop-in for TRL saves, and when it does without: padded rows, losses of a subclass."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from fastrl.errors import InputError
from fastrl.integrations import head_rows
from fastrl.integrations.trl_batches import regrouped
from tests.helpers_trl import assert_same, batch_of, online, result_of, save_tiny

trl = pytest.importorskip("trl")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("tiny") / "model")


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


@pytest.mark.parametrize("method", ["_compute_loss", "compute_loss"])
def test_micro_batches_of_an_unknown_loss_stay_trls(directory, method):
    from fastrl.integrations.trl import accelerate_trl

    known = accelerate_trl(online(trl.GRPOTrainer, directory))
    assert "_prepare_inputs" in vars(known)
    subclass = type("Mine", (trl.GRPOTrainer,), {method: lambda *_, **__: None})
    assert "_prepare_inputs" not in vars(accelerate_trl(online(subclass, directory)))


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
    settings = {"max_steps": 1, "num_iterations": 2, "beta": 0.1}
    online(FastGRPOTrainer, directory, **settings).train()
    assert calls == [(False, 8), (False, 8), (True, 8)]
