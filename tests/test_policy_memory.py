"""Phases share memory: one copy of the weights, keys and values before the update, and back."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastrl.assembly import build_trainer
from fastrl.config import Config, DataConfig, ModelConfig, RolloutConfig
from fastrl.policy import Policy, new_policy
from fastrl.rollout import Sampling, make_engine
from tests.helpers import TEXTS, TINY
from tests.helpers_engines import generator, prompts_of

LARGE = {"model_type": "qwen3", "vocab_size": 300, **TINY, "hidden_size": 128,
         "intermediate_size": 512, "head_dim": 32, "num_hidden_layers": 4}  # fmt: skip
LORA = {"lora": {"r": 2}, "precision": "float32"}
MODES: dict[str, dict[str, Any]] = {
    "full": {},
    "full bf16": {"precision": "split"},
    "lora": LORA,
    "nf4": {**LORA, "load_in_4bit": True},
}


class Census(TorchDispatchMode):
    """Bytes of tensors that were made inside and are alive, now and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves(args) if isinstance(x, Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.add(tensor.untyped_storage(), given)
        return out

    def add(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        key = storage._cdata
        if key in given or key in self.seen:
            return
        self.seen.add(key)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self.drop, key, storage.nbytes())

    def drop(self, key: int, num_bytes: int) -> None:
        self.seen.discard(key)
        self.live -= num_bytes

    def settled(self) -> int:
        """What is alive after garbage collection; the peak counts anew from there."""
        gc.collect()
        self.peak = self.live
        return self.live


def policy_of(mode: str) -> Policy:
    if "lora" in MODES[mode]:
        pytest.importorskip("peft")
    if MODES[mode].get("load_in_4bit"):
        pytest.importorskip("bitsandbytes")
    return new_policy(ModelConfig(architecture=LARGE, **MODES[mode]), TEXTS, seed=0)


def bytes_of_weights(policy: Policy) -> int:
    return sum(x.nbytes for x in policy.model.parameters())


@pytest.mark.parametrize("mode", MODES)
def test_the_engine_has_no_weights_of_its_own(mode):
    """All that sampling allocates is less than a third of the layers' weights."""
    policy = policy_of(mode)
    places = [x.data_ptr() for x in policy.model.parameters()]
    layers = policy.body.layers if hasattr(policy.body, "layers") else []
    weights = sum(x.nbytes for layer in layers for x in layer.parameters())
    engine = make_engine("native", policy)
    prompts = prompts_of([5, 3])
    with Census() as census:
        rollouts = engine.generate(prompts, Sampling(2, 4), generator())
        peak = census.peak
        assert engine.peak_kv_bytes > 0
        assert peak > engine.peak_kv_bytes  # it sees what is allocated
        after = census.settled()
    assert [x.data_ptr() for x in policy.model.parameters()] == places
    kept = [*rollouts.completion_ids, *rollouts.rollout_logps, rollouts.finished]
    assert after <= 16 * sum(x.nbytes for x in kept) + 4096
    if mode != "nf4":  # dequantises a layer's weight for its product
        assert peak < weights / 3
    else:
        assert peak < 4 * 128 * 512 * 2 + weights / 3


def config_of(directory: Path, mode: str) -> Config:
    return Config(
        task="reasoning_gym:chain_sum",
        task_args={"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2},
        rewards=(f"{Path(__file__).parent / 'helpers.py'}:checksum",),
        reward_workers=0,
        output_dir=str(directory),
        max_steps=4,
        prompts_per_step=2,
        max_tokens_per_pass=256,
        data=DataConfig(eval_size=4),
        model=ModelConfig(architecture=LARGE, **MODES[mode]),
        rollout=RolloutConfig(num_generations=4, max_prompt_length=48, max_completion_length=8),
    )


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_a_phase_begins_with_nothing_of_the_one_before(tmp_path, mode):
    policy_of(mode)  # skips where a package is missing
    trainer = build_trainer(config_of(tmp_path, mode))
    trained = sum(x.nbytes for x in trainer.policy.model.parameters() if x.requires_grad)
    sample, found = trainer.sample, {}

    def watched(*args: Any, **kwargs: Any) -> Any:
        found["before sampling"] = census.settled()
        out = sample(*args, **kwargs)
        found["most while sampling"] = census.peak
        found["after sampling"] = census.settled()
        return out

    trainer.train_step(0)  # moments are allocated
    trainer.sample = watched
    with Census() as census:
        for step in (1, 2):
            census.settled()
            trainer.train_step(step)
            found["most while updating"] = census.peak
            found["after updating"] = census.settled()
            engine = trainer.sampler.engine
            assert found["most while sampling"] > engine.peak_kv_bytes
            small = trained / 20  # tokens, rewards, metrics
            assert found["before sampling"] < small
            assert found["after sampling"] < small
            assert found["after sampling"] < engine.peak_kv_bytes
            assert found["most while updating"] > trained  # gradients at least
            assert found["after updating"] < small
    assert all(x.grad is None for x in trainer.policy.model.parameters())
