"""Whole runs in every memory mode: they train, and go on from a checkpoint to the same bits."""

from __future__ import annotations

import dataclasses
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fastrl.cli import main
from fastrl.config import ModelConfig, OptimConfig, SaveConfig, WarmStartConfig
from fastrl.errors import InputError
from fastrl.held_out import evaluate
from fastrl.report import read_metrics
from fastrl.run import train
from tests.helpers import TINY
from tests.test_training import numbers, tiny_config

LORA = {"r": 4, "lora_alpha": 8}
KL = {"beta": 0.05}
MOVES = {
    "reference_update": "moving_average", "parameters": {"mixup_alpha": 0.5, "sync_steps": 1},
}  # fmt: skip
MODES = {
    "reference that follows": ({}, {}, {**KL, **MOVES}),
    "lora, reference that follows": ({"lora": LORA}, {}, {**KL, **MOVES}),
    "lora": ({"lora": LORA}, {}, KL),
    "lora, without a warm start": ({"lora": LORA}, {}, KL),
    "split, 8-bit": ({"precision": "split"}, {"optimizer": "adamw_8bit"}, {}),
    "split, in backward": ({"precision": "split"}, {"in_backward": "previous_norm"}, {}),
    "stochastic": ({"precision": "stochastic"}, {}, {}),
    "autocast, offloaded": ({"precision": "autocast"}, {"optimizer": "adamw_offload"}, {}),
    "two phases": ({}, {"in_backward": "two_phase"}, {}),
    "recomputed, chunked": ({"gradient_checkpointing": True, "mlp_chunk_size": 16}, {}, {}),
    "reference on the CPU": ({"reference": "cpu"}, {}, KL),
    "float32 head": ({"precision": "split", "cast_lm_head_to_fp32": True}, {}, KL),
}


def config_of(directory, mode, **changes):
    model, optim, objective = MODES[mode]
    architecture = {"model_type": "qwen3", **TINY}
    config = tiny_config(
        directory,
        model=ModelConfig(architecture=architecture, **model),
        optim=OptimConfig(learning_rate=1e-3, **optim),
        objective=objective,
        **changes,
    )
    if "without a warm start" in mode:
        config = dataclasses.replace(config, warm_start=WarmStartConfig())
    return config


def final_tensors(directory):
    (path,) = (directory / "final").glob("*.safetensors")
    return load_file(path)


@pytest.mark.parametrize("mode", MODES)
def test_a_run_resumes_exactly(tmp_path, mode):
    whole = config_of(tmp_path / "whole", mode)
    train(whole)
    rows = [row for row in read_metrics(tmp_path / "whole") if "loss" in row]
    assert any(row["grad_norm"] > 0 for row in rows)
    save = SaveConfig(save_steps=2)
    parted = dataclasses.replace(whole, output_dir=str(tmp_path / "parted"), save=save)
    train(dataclasses.replace(parted, max_steps=3))
    shutil.rmtree(tmp_path / "parted" / "checkpoint-3")
    train(parted, resume=True)
    again = [row for row in numbers(tmp_path / "parted") if "loss" in row]
    assert again == [row for row in numbers(tmp_path / "whole") if "loss" in row]
    ours, theirs = final_tensors(tmp_path / "whole"), final_tensors(tmp_path / "parted")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    evaluate(whole, tmp_path / "whole")


def test_an_adapter_is_saved_alone_and_merged_on_request(tmp_path, capsys):
    config = config_of(tmp_path / "run", "lora")
    summary = train(config)
    run = tmp_path / "run"
    names = {path.name for path in (run / "final").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json"} <= names
    assert "model.safetensors" not in names
    assert (run / "base" / "model.safetensors").is_file()
    assert summary["pass_at_1_after"] == evaluate(config, run).pass_at[1]
    assert main(["merge", str(run), str(tmp_path / "merged")]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    base = AutoModelForCausalLM.from_pretrained(run / "base")
    pairs = list(zip(merged.state_dict().values(), base.state_dict().values(), strict=True))
    assert any(not torch.equal(one, other) for one, other in pairs)
    assert main(["merge", str(run), str(tmp_path / "merged")]) == 2
    assert "merged exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "optim", "message"),
    [
        ({"lora": {"r": 4, "target_modules": ["q_prj"]}}, {}, "no module .* 'q_proj'"),
        ({"lora": {"rank": 4}}, {}, "model.lora.rank cannot be set"),
        ({"load_in_4bit": True}, {}, "set model.lora"),
        ({"activation_offloading": True}, {}, "set model.gradient_checkpointing"),
        ({"lora": LORA, "reference": "cpu"}, {}, "leave it at 'auto'"),
        ({}, {"optimizer": "adam_8bit"}, "unknown optim.optimizer 'adam_8bit'"),
        ({}, {"lr_scheduler_type": "cosin"}, "did you mean 'cosine'"),
        ({"precision": "split"}, {"optimizer": "bnb_adamw_8bit"}, "exclude each other"),
        ({}, {"optimizer": "torchao_adamw_4bit"}, "torchao"),
    ],
)
def test_modes_that_cannot_be_had_are_refused_before_a_run(tmp_path, model, optim, message):
    architecture = {"model_type": "qwen3", **TINY}
    config = tiny_config(
        tmp_path / "run",
        model=ModelConfig(architecture=architecture, **model),
        optim=OptimConfig(**optim),
    )
    with pytest.raises(InputError, match=message):
        train(config)
    assert not (tmp_path / "run").exists()
