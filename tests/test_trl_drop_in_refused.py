"""What the drop-in for TRL refuses, by name, and how its classes look from outside."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastrl.errors import InputError
from fastrl.integrations import trl as ours_of
from fastrl.integrations import trl_checks
from fastrl.integrations.trl import accelerate_trl
from fastrl.integrations.trl_mean_logits import mean_logits
from fastrl_kernels import LMHead, linear_logps
from tests.helpers_trl import batch_of, online, save_tiny

trl = pytest.importorskip("trl")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("tiny") / "model")


@pytest.mark.parametrize("found", ["1.15.0", "1.17.0", "2.0.0.dev0", "0.29.1"])
def test_other_versions_are_refused_with_the_range_and_the_parts(monkeypatch, found):
    monkeypatch.setattr(trl_checks, "version", lambda name: found)
    with pytest.raises(InputError, match=rf"trl>=1.16,<1.17, got {found}; .*policy_loss"):
        accelerate_trl(object())
    vars(ours_of).pop("FastGRPOTrainer", None)
    with pytest.raises(InputError, match="linear_logps"):
        _ = ours_of.FastGRPOTrainer


@pytest.mark.parametrize("found", ["1.16.0", "1.16.3.post1"])
def test_versions_in_the_range_are_taken(monkeypatch, found):
    monkeypatch.setattr(trl_checks, "version", lambda name: found)
    trl_checks.check_version()


def test_an_absent_trl_is_named(monkeypatch):
    def absent(name: str) -> str:
        raise trl_checks.PackageNotFoundError(name)

    monkeypatch.setattr(trl_checks, "version", absent)
    with pytest.raises(InputError, match="TRL is not installed; pip install"):
        accelerate_trl(object())


def test_other_trainers_are_refused():
    with pytest.raises(InputError, match="GRPOTrainer, RLOOTrainer, DPOTrainer, got Generator"):
        accelerate_trl(torch.Generator())


def test_a_second_acceleration_is_refused(directory):
    with pytest.raises(InputError, match="FastGRPOTrainer is accelerated already"):
        accelerate_trl(online(ours_of.FastGRPOTrainer, directory))
    trainer = accelerate_trl(online(trl.GRPOTrainer, directory))
    with pytest.raises(InputError, match="GRPOTrainer is accelerated already"):
        accelerate_trl(trainer)


def changed(trainer: Any, path: str, value: Any) -> None:
    *parents, name = path.split(".")
    for parent in parents:
        trainer = getattr(trainer, parent)
    object.__setattr__(trainer, name, value)


PARALLEL = {"cp_enabled": False, "sp_enabled": False, "tp_enabled": False}
SETUPS: dict[str, tuple[str, Any, str]] = {
    "compiled": ("args.torch_compile", True, "torch_compile=True"),
    "noise": ("args.neftune_noise_alpha", 5.0, "neftune_noise_alpha"),
    "devices": ("model.hf_device_map", {"a": 0, "b": 1}, "device_map"),
    "prompt": (
        "model.peft_config", {"default": SimpleNamespace(is_prompt_learning=True)}, "prompt learnt"
    ),
    "aLoRA": (
        "model.peft_config", {"default": SimpleNamespace(alora_invocation_tokens=[3])}, "aLoRA"
    ),
    "context": (
        "accelerator.parallelism_config", SimpleNamespace(**PARALLEL | {"cp_enabled": True}),
        "cp_size",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SETUPS)
def test_what_cannot_work_is_refused_by_name(directory, name):
    path, value, said = SETUPS[name]
    trainer = online(trl.GRPOTrainer, directory)
    if name == "context":  # a property of the accelerator
        trainer.accelerator = SimpleNamespace(
            distributed_type="NO", state=None, mixed_precision="no", parallelism_config=value
        )
    else:
        changed(trainer, path, value)
    with pytest.raises(InputError, match=said):
        accelerate_trl(trainer)


@pytest.mark.parametrize(
    ("kind", "stage", "said"),
    [("FSDP", 0, "FSDP"), ("DEEPSPEED", 3, "ZeRO-3"), ("DEEPSPEED", 2, "")],
)
def test_sharded_heads_are_refused(kind, stage, said):
    accelerator = SimpleNamespace(
        distributed_type=SimpleNamespace(value=kind), mixed_precision="no",
        state=SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=stage)),
    )  # fmt: skip
    trainer = SimpleNamespace(
        accelerator=accelerator, model=SimpleNamespace(), args=SimpleNamespace(torch_compile=False)
    )
    if not said:
        trl_checks.check_trainer(trainer)
        return
    with pytest.raises(InputError, match=said):
        trl_checks.check_trainer(trainer)


def test_a_float32_head_under_autocast_is_refused(directory):
    trainer = online(trl.GRPOTrainer, directory, bf16=True, cast_lm_head_to_fp32=True)
    with pytest.raises(InputError, match="cast_lm_head_to_fp32=True under mixed precision"):
        accelerate_trl(trainer)


def test_shifted_labels_are_refused(directory):
    trainer = accelerate_trl(online(trl.GRPOTrainer, directory))
    ids = torch.ones(2, 4, dtype=torch.int64)
    with pytest.raises(InputError, match="shift_labels"):
        trainer.model(input_ids=ids, labels=ids, shift_labels=ids, fused_lm_head=True)


def test_other_calls_of_the_model_are_its_own(directory):
    theirs, ours = online(trl.GRPOTrainer, directory), online(ours_of.FastGRPOTrainer, directory)
    ids = torch.arange(3, 13).view(2, 5)
    with torch.no_grad():
        expected, found = (x.model(input_ids=ids, labels=ids) for x in (theirs, ours))
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.loss, expected.loss)
    assert inspect.signature(ours.model.forward) == inspect.signature(theirs.model.forward)


def test_classes_take_trls_arguments():
    theirs = list(inspect.signature(trl.GRPOTrainer).parameters)
    ours = inspect.signature(ours_of.FastGRPOTrainer).parameters
    assert list(ours) == [*theirs, "strict", "workspace_mb", "regroup"]
    assert issubclass(ours_of.FastDPOTrainer, trl.DPOTrainer)
    assert ours_of.FastRLOOTrainer is ours_of.FastRLOOTrainer
    assert ours_of.FastRLOOTrainer.__name__ == "FastRLOOTrainer"
    with pytest.raises(AttributeError, match="FastPPOTrainer"):
        _ = ours_of.FastPPOTrainer


def test_routers_losses_are_left_to_trl(tmp_path):
    """A mixture of experts with its load-balancing loss: TRL's own forward, said once."""
    settings = {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
        "output_router_logits": True, "router_aux_loss_coef": 0.1,
    }  # fmt: skip
    directory = save_tiny(tmp_path / "experts", "qwen3_moe", **settings)
    theirs, ours = online(trl.GRPOTrainer, directory), online(ours_of.FastGRPOTrainer, directory)
    strict = online(ours_of.FastGRPOTrainer, directory, fast={"strict": True})
    batch, losses = batch_of(theirs), []
    for trainer in (theirs, ours, strict):
        trainer.current_gradient_accumulation_steps = 1
    losses.append(theirs.compute_loss(theirs.model, dict(batch)))
    with pytest.warns(UserWarning, match="load-balancing loss"):
        losses.append(ours.compute_loss(ours.model, dict(batch)))
    assert torch.equal(losses[0], losses[1])
    assert ours._metrics["train"]["aux_loss"] == theirs._metrics["train"]["aux_loss"]
    with pytest.raises(InputError, match="router_aux_loss_coef"):
        strict.compute_loss(strict.model, dict(batch))


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("workspace_mb", [0.004, 256])
def test_mean_logits_are_those_of_all_logits(softcap, workspace_mb):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    head = LMHead(
        normal(63, 5), bias=normal(63), lora_a=normal(2, 5), lora_b=normal(63, 2), lora_scale=0.5,
        logit_scale=1.5, softcap=softcap, vocab_size=61,
    )  # fmt: skip
    hidden = normal(7, 5)
    logits = hidden @ (head.weight + 0.5 * head.lora_b @ head.lora_a).T + head.bias
    logits = logits[:, :61] * 1.5
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    found = mean_logits(hidden, head, temperature=0.7, workspace_mb=workspace_mb)
    torch.testing.assert_close(found, logits.mean(1) / 0.7)
    targets = torch.zeros(7, dtype=torch.int64)
    lse = linear_logps(hidden, head, targets, temperature=0.7).lse
    torch.testing.assert_close(lse, (logits / 0.7).logsumexp(1))  # the same head
