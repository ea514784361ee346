"""Fused models under Trainer, accelerate, PEFT, DistributedDataParallel, torch.compile and TRL."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from transformers import Trainer, TrainingArguments

from fastrl.errors import InputError
from fastrl.integrations.transformers import FusedOutput, fuse, unfuse
from tests.test_fuse import EXACT, assert_same, batch_of, gradients, model_of

peft = pytest.importorskip("peft")
datasets = pytest.importorskip("datasets")

LORA = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "down_proj", "lm_head"]}


def with_lora(model: Any, **settings: Any) -> Any:
    """A PeftModel whose adapter changes the logits, which a fresh one does not."""
    model = peft.get_peft_model(model, peft.LoraConfig(**{**LORA, **settings}))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2, generator=generator)
    return model


def dataset_of() -> Any:
    """Rows of two kinds of length and of shared prompts, and a column that no forward takes."""
    batch = batch_of(4)
    rows = {name: tensor.tolist() for name, tensor in batch.inputs.items()}
    return datasets.Dataset.from_dict({**rows, "text": ["x"] * len(batch.input_ids)})


def train(model: Any, directory: Path, **settings: Any) -> dict[str, Any]:
    """Losses, weights and the loss on held-out rows after a few real steps of a Trainer."""
    arguments = TrainingArguments(
        str(directory), use_cpu=True, report_to="none", logging_steps=1, max_steps=4, seed=0,
        learning_rate=0.05, per_device_train_batch_size=2, optim="sgd", save_strategy="no",
        per_device_eval_batch_size=5, disable_tqdm=True, **settings,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=dataset_of(), eval_dataset=dataset_of())
    trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    metrics = trainer.evaluate()
    return {
        "losses": logged,
        "evaluated": metrics["eval_loss"],
        "weights": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "trainer": trainer,
    }


@pytest.mark.parametrize(
    ("adapted", "settings"),
    [
        (False, {}),
        (False, {"gradient_accumulation_steps": 3, "prediction_loss_only": True}),
        (False, {"gradient_checkpointing": True, "prediction_loss_only": True}),
        (True, {"gradient_checkpointing": True, "gradient_accumulation_steps": 3}),
    ],
    ids=["predictions", "accumulation", "checkpointing", "lora"],
)
def test_a_trainer_gives_the_same_losses_and_weights(
    tmp_path: Path, adapted: bool, settings: dict[str, Any]
) -> None:
    model = with_lora(model_of()) if adapted else model_of()
    fused = copy.deepcopy(model)
    expected = train(model, tmp_path, **settings)
    ours = train(fuse(fused), tmp_path, **settings)
    trainer = ours.pop("trainer")
    assert expected.pop("trainer").model_accepts_loss_kwargs == trainer.model_accepts_loss_kwargs
    assert len(ours["losses"]) == 4
    torch.testing.assert_close(ours, expected, **EXACT)
    if not settings:
        predictions = trainer.predict(dataset_of()).predictions
        assert [part.shape for part in predictions] == [(12, 13), (12, 13)]
        assert abs(predictions[0]).sum() > 0


def test_a_trainer_keeps_the_column_of_target_ids(tmp_path: Path) -> None:
    rows = dataset_of()
    shifted = [[*row[1:], -100] for row in rows["labels"]]
    rows = rows.remove_columns("labels").add_column("target_ids", shifted)
    model, batch = fuse(model_of()), batch_of(4)
    arguments = TrainingArguments(
        str(tmp_path), use_cpu=True, report_to="none", label_names=["target_ids"],
        per_device_eval_batch_size=12, disable_tqdm=True, prediction_loss_only=True,
    )  # fmt: skip
    loss = Trainer(model, arguments, eval_dataset=rows).evaluate()["eval_loss"]
    assert loss == pytest.approx(model(**batch.inputs).loss.item(), abs=1e-5)


@pytest.mark.parametrize("first", ["fuse", "peft"])
def test_fused_before_or_after_peft_wraps(first: str) -> None:
    model, batch = model_of(), batch_of()
    own = with_lora(copy.deepcopy(model))(**batch.inputs).loss
    model = with_lora(fuse(model)) if first == "fuse" else fuse(with_lora(model))
    fused = model(**batch.inputs)
    torch.testing.assert_close(fused.loss, own, **EXACT)
    with model.disable_adapter():
        base = model(**batch.inputs).loss
    assert abs(base - own) > 0.01
    unfuse(model)
    assert_same(model, batch)


def test_adapters_that_a_fused_row_has_no_place_for() -> None:
    batch = batch_of()
    activated = with_lora(model_of(), target_modules=["q_proj"], alora_invocation_tokens=[5, 6],
                          task_type="CAUSAL_LM")  # fmt: skip
    with pytest.raises(InputError, match="activated LoRA"):
        fuse(activated)(**batch.inputs)
    prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    learnt = peft.get_peft_model(fuse(model_of()), prompt)
    with pytest.raises(InputError, match="inputs_embeds"):
        learnt(**batch.inputs)
    with pytest.raises(InputError, match="prompt learnt by PEFT"):
        fuse(peft.get_peft_model(model_of(), prompt))
    with pytest.raises(InputError, match=r"lora_dropout=0\.1"):
        fuse(with_lora(model_of(), lora_dropout=0.1))


def test_weights_in_bfloat16_without_autocast() -> None:
    """No farther from the float32 model than twice what the model's own forward is."""
    model, batch = model_of(), batch_of()
    model.load_state_dict({n: x.bfloat16().float() for n, x in model.state_dict().items()})
    exact = gradients(model(**batch.inputs).loss, model)
    theirs = gradients(model.bfloat16()(**batch.inputs).loss, model)
    for name, gradient in gradients(fuse(model)(**batch.inputs).loss, model).items():
        error = (theirs[name].float() - exact[name]).norm()
        assert (gradient.float() - exact[name]).norm() <= 2 * error


@pytest.fixture
def new_accelerator() -> Iterator[None]:
    """Accelerators of a process share one setting of precision, Trainers' included."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("new_accelerator")
def test_under_accelerates_autocast() -> None:
    """bfloat16 in both, the fused head's sums in float32: nearer to the float32 model."""
    model, batch = model_of(), batch_of()
    exact = gradients(model(**batch.inputs).loss, model)
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    own = accelerator.prepare_model(copy.deepcopy(model))
    fused = accelerator.prepare_model(fuse(copy.deepcopy(model)))
    result = fused(**batch.inputs)
    assert type(result) is FusedOutput
    assert result.logps.dtype == torch.float32
    assert inspect.signature(fused.forward) == inspect.signature(fuse(model).forward)
    theirs = gradients(own(**batch.inputs).loss, own)
    for name, gradient in gradients(result.loss, fused).items():
        assert (gradient - exact[name]).norm() <= 2 * (theirs[name] - exact[name]).norm()
    with pytest.raises(InputError, match=r"unwrap_model\(model, keep_fp32_wrapper=False\)"):
        unfuse(fused)
    unwrapped = accelerator.unwrap_model(fused, keep_fp32_wrapper=False)
    assert torch.equal(unwrapped(**batch.inputs).loss, model(**batch.inputs).loss)
    assert "forward" not in vars(unfuse(unwrapped))
    with pytest.raises(InputError, match=r"before accelerator\.prepare"):
        fuse(own)


def test_gradients_go_through_ddp(tmp_path: Path) -> None:
    """A hook on DDP's buckets sees them all: it doubles what the parameters get."""
    model, batch = model_of(), batch_of()
    expected = gradients(model(**batch.inputs).loss, model)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(fuse(model))
        wrapped.register_comm_hook(None, doubled)
        for labels in (batch.labels, torch.full_like(batch.labels, -100), batch.labels):
            wrapped.zero_grad()
            wrapped(batch.input_ids, batch.attention_mask, labels=labels).loss.backward()
        with pytest.raises(InputError, match="before it is wrapped"):
            unfuse(wrapped)
    finally:
        torch.distributed.destroy_process_group()
    found = {name: parameter.grad / 2 for name, parameter in model.named_parameters()}
    torch.testing.assert_close(found, expected, **EXACT)


def doubled(state, bucket):  # DDP wants the types themselves, or none
    future = torch.futures.Future()
    future.set_result(2 * bucket.buffer())
    return future


def test_compiled() -> None:
    model, batch = model_of(num_hidden_layers=1), batch_of()
    own = model(**batch.inputs).loss
    torch._dynamo.reset()
    compiled = fuse(torch.compile(model, backend="eager"))
    torch._dynamo.utils.counters.clear()
    torch.testing.assert_close(compiled(**batch.inputs).loss, own, **EXACT)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert compiled.forward is not model.forward
    assert "forward" not in vars(unfuse(compiled)._orig_mod)


def test_a_model_that_trl_has_patched() -> None:
    """TRL's own calls go on to TRL's head, and all others are fused."""
    utils = pytest.importorskip("trl.trainer.utils")
    model, batch = model_of(), batch_of()
    own = model(**batch.inputs).loss
    utils.add_fused_lm_head(model)
    patched = model.forward
    fuse(model)
    torch.testing.assert_close(model(**batch.inputs).loss, own, **EXACT)
    theirs = model(**batch.inputs, fused_lm_head=True)
    assert type(theirs).__name__ == "FusedCausalLMOutput"
    torch.testing.assert_close(theirs.log_probs, model(**batch.inputs).logps, **EXACT)
    unfuse(model)
    assert model.forward == patched
    fuse(model := model_of())
    utils.add_fused_lm_head(model)
    assert type(model(**batch.inputs)) is FusedOutput
    with pytest.raises(InputError, match="wrapped once more"):
        unfuse(model)
