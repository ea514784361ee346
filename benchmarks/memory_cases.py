"""Configurations whose memory is predicted and measured, and how one of them is run.

Completions become as long as they may and prompts are as long as they may, so that a run meets the
worst that its plan expects: prompts are digits, each a token of its own, and no token ends a text.
"""

from __future__ import annotations

import dataclasses
import json
import random
import string
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import torch
from memory_trace import Trace, mark, span, traced

from fastrl.assembly import build_trainer
from fastrl.config import Config, CriticConfig
from fastrl.config_io import load_config
from fastrl.held_out import evaluate_held_out
from fastrl.methods.needs import requirements
from fastrl.reference import make_reference
from fastrl.trainer import Trainer

NUM_STEPS = 2  # the second has the optimizer's states from its beginning
NO_TOKEN = -1
OTHER_MODEL = "another model"  # stands for a directory that is written for the case
NUM_TRAINING = 32  # prompts
TOKENS_PER_WORD = 64  # of the vocabulary, for each word of an answer: text enough to learn it from
REWARD = """
def share(completion_ids, **columns):
    return [sum(ids) % 1009 / 1009 for ids in completion_ids]
"""
"""As good as never the same for two completions of a prompt, which would not be trained on then."""


class Case(NamedTuple):
    """What a configuration has other than the usual one; tables are merged key by key."""

    name: str
    options: Mapping[str, Any] = {}
    is_quick: bool = False
    """Whether it is one of the few that a first look is taken at."""


def usual() -> dict[str, Any]:
    """13 MB of weights, of which a pass of 700 tokens keeps 90 MB."""
    return {
        "method": "grpo",
        "rewards": ["share.py:share"],
        "reward_workers": 0,
        "prompts_per_step": 4,
        "max_steps": NUM_STEPS,
        "max_tokens_per_pass": 4096,
        "data": {"eval_size": 4},
        "eval": {"num_samples": 1},
        "rollout": {"num_generations": 4, "max_prompt_length": 48, "max_completion_length": 32},
        "model": {
            "device": "cpu",
            "architecture": {
                "model_type": "qwen3", "vocab_size": 2048, "hidden_size": 256,
                "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 4,
                "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 1024,
            },
        },
    }  # fmt: skip


def merged(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Both tables as one, the second's values where both have one."""
    found = dict(first)
    for key, value in second.items():
        known = found.get(key)
        both = isinstance(known, Mapping) and isinstance(value, Mapping)
        found[key] = merged(known, value) if both else value
    return found


def without_none(table: Mapping[str, Any]) -> dict[str, Any]:
    """The table without keys that a case takes away."""
    return {
        key: without_none(value) if isinstance(value, Mapping) else value
        for key, value in table.items()
        if value is not None
    }


def architecture(model_type: str, **fields: Any) -> dict[str, Any]:
    """Another model."""
    return {"model": {"architecture": {"model_type": model_type, **fields}}}


def model(**fields: Any) -> dict[str, Any]:
    """Other settings of the model."""
    return {"model": fields}


def optim(precision: str, optimizer: str, in_backward: str = "off") -> dict[str, Any]:
    """Weights, moments and gradients; a step is one pass."""
    return {
        "model": {"precision": precision},
        "optim": {"optimizer": optimizer, "in_backward": in_backward},
        "max_tokens_per_pass": 8192,
    }


def rollout(num_prompts: int, G: int, L: int, C: int, **fields: Any) -> dict[str, Any]:
    """P prompts of L tokens, G completions of C tokens each."""
    lengths = {"num_generations": G, "max_prompt_length": L, "max_completion_length": C}
    return {"prompts_per_step": num_prompts, "rollout": {**lengths, **fields}}


LORA = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
KL = {"objective": {"beta": 1e-3}}
ALL_KEPT = {"objective": {"parameters": {"kept_fraction": 1.0, "fraction": 1.0}}}
DROPLESS = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
OLD = {"intermediate_size": None, "num_key_value_heads": None, "head_dim": None}
LOCAL = ["sliding_attention", "full_attention"] * 2
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 192}
DELTA = {
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 32,
    "linear_value_head_dim": 32, "linear_conv_kernel_dim": 4,
}  # fmt: skip
CONVOLVING = architecture("lfm2", head_dim=None, layer_types=["conv", "full_attention"] * 2)
LONG = rollout(2, 4, 16, 160)
WIDE = rollout(4, 8, 48, 32)
NARROW = architecture("llama", hidden_size=64, intermediate_size=128, vocab_size=8192)

FAMILIES = (
    Case("llama", architecture("llama"), is_quick=True),
    Case("llama, tied head", architecture("llama", tie_word_embeddings=True)),
    Case("mistral", architecture("mistral", sliding_window=24)),
    Case("qwen2", architecture("qwen2", head_dim=None)),
    Case("qwen3", is_quick=True),
    Case("gemma2", architecture("gemma2", sliding_window=24, query_pre_attn_scalar=64)),
    Case(
        "gemma3",
        architecture("gemma3_text", sliding_window=24, layer_types=LOCAL, query_pre_attn_scalar=64),
    ),
    Case("gpt2", architecture("gpt2", n_inner=768, **DROPLESS, **OLD)),
    Case("phi3", architecture("phi3", head_dim=None)),
    Case("qwen3_moe", architecture("qwen3_moe", num_experts=4, head_dim=None, **EXPERTS)),
    Case("lfm2", CONVOLVING),
    Case("qwen3_5", architecture("qwen3_5_text", **DELTA)),
)
METHODS = (
    Case("grpo with KL", KL, is_quick=True),
    Case("gspo", {"method": "gspo"}),
    Case("d3s", {"method": "d3s", **ALL_KEPT}),
    Case("rebel", {"method": "rebel", **rollout(8, 2, 48, 32)}),
    Case("astar_po", {"method": "astar_po", **rollout(8, 1, 48, 32)}),
    Case("ppo, value head", {"method": "ppo"}),
    Case("ppo, value model", {"method": "ppo", "critic": {"model": OTHER_MODEL}}),
    Case("ppo, value adapter", {"method": "ppo", "critic": {"model": "lora"}, **model(lora=LORA)}),
    Case("dapo", {"method": "dapo", "objective": {"parameters": {"cache": 6}}}),
    Case("two iterations of two mini-batches", {"num_iterations": 2, "num_mini_batches": 2}),
)
PRECISIONS = (
    Case("autocast", model(precision="autocast"), is_quick=True),
    Case("autocast with KL", {**model(precision="autocast"), **KL}),
    Case("split", model(precision="split"), is_quick=True),
    Case("stochastic", model(precision="stochastic")),
    Case("split, float32 head", model(precision="split", cast_lm_head_to_fp32=True)),
    Case("8-bit moments", optim("float32", "adamw_8bit")),
    Case("split, 8-bit moments", optim("split", "adamw_8bit"), is_quick=True),
    Case("moments offloaded", optim("float32", "adamw_offload")),
    Case("two phases", optim("float32", "adamw", "two_phase"), is_quick=True),
    Case("norm of before", optim("float32", "adamw", "previous_norm")),
    Case("split, norm of before", optim("split", "adamw_8bit", "previous_norm")),
    Case("stochastic, two phases", optim("stochastic", "adamw_8bit", "two_phase")),
)
MODES = (
    Case("recomputed", model(gradient_checkpointing=True), is_quick=True),
    Case("recomputed, autocast", model(gradient_checkpointing=True, precision="autocast")),
    Case("chunked MLP", model(mlp_chunk_size=64)),
    Case("recomputed, chunked MLP", model(gradient_checkpointing=True, mlp_chunk_size=64)),
    Case("lora", model(lora=LORA), is_quick=True),
    Case("lora with KL", {**model(lora=LORA), **KL}),
    Case("lora, split", model(lora=LORA, precision="split")),
    Case("lora, recomputed, autocast",
         model(lora=LORA, precision="autocast", gradient_checkpointing=True)),
    Case("reference in 8 bits", {**model(reference="8bit"), **KL}),
    Case("reference in 4 bits", {**model(reference="4bit"), **KL}),
)  # fmt: skip
SIZES = (
    Case("passes of 512 tokens", {"max_tokens_per_pass": 512}, is_quick=True),
    Case("passes of 256 tokens, recomputed",
         {"max_tokens_per_pass": 256, **model(gradient_checkpointing=True)}),
    Case("eight generations", WIDE),
    Case("long prompts", rollout(4, 4, 256, 16)),
    Case("long completions", LONG),
    Case("large vocabulary", NARROW),
    Case("large vocabulary, 16 MiB at the head", {**NARROW, "workspace_mb": 16}),
    Case("large vocabulary, 4 MiB at the head", {**NARROW, "workspace_mb": 4}),
    Case("a larger model", architecture("qwen3", hidden_size=512, intermediate_size=1536)),
)  # fmt: skip
MANY = {**rollout(2, 2, 48, 96), "data": {"eval_size": 64}, "eval": {"num_samples": 4}}
BOUNDED = {"rollout": {"engine_args": {"kv_cache_gib": 20 / 1024}}}
FOLDED = {"rollout": {"engine_args": {"fold_adapters": True}}}
ROLLOUTS = (
    Case("many rows", MANY, is_quick=True),
    Case("many rows, keys and values in 20 MiB", merged(MANY, BOUNDED), is_quick=True),
    Case("many rows, autocast", {**MANY, **model(precision="autocast")}),
    Case("nucleus of a large vocabulary", {**NARROW, **rollout(4, 16, 16, 8, top_p=0.9, top_k=50)}),
    Case("adapters folded", {**model(lora=LORA), **FOLDED}),
    Case("transformers' generate", {"rollout": {"engine": "generate"}}),
    Case("lfm2, many rows", {**MANY, **CONVOLVING}),
)
CASES = (*FAMILIES, *METHODS, *PRECISIONS, *MODES, *SIZES, *ROLLOUTS)


def config_of(case: Case, directory: Path) -> Config:
    """The case's configuration, with everything it names written to a directory."""
    import tomli_w

    table = without_none(merged(usual(), case.options))
    write_task(
        directory,
        table["rollout"]["max_prompt_length"],
        table["data"]["eval_size"],
        table["model"]["architecture"]["vocab_size"] // TOKENS_PER_WORD,
    )
    table |= {
        "task": f"jsonl:{directory / 'task.jsonl'}",
        "rewards": [f"{directory / 'share.py'}:share"],
        "output_dir": str(directory / "run"),
        "values_dir": str(directory / "values"),
    }
    path = directory / "config.toml"
    path.write_text(tomli_w.dumps(table), encoding="utf-8")
    config = load_config(path)
    if config.critic.model == OTHER_MODEL:
        critic = dataclasses.replace(config.critic, model=str(directory / "critic"))
        alone = dataclasses.replace(config, method="grpo", critic=CriticConfig())
        build_trainer(alone).policy.save(directory / "critic")
        config = dataclasses.replace(config, critic=critic)
    return config


def write_task(directory: Path, prompt_length: int, eval_size: int, num_words: int) -> None:
    """Different prompts of exactly so many tokens, and text to learn a vocabulary from."""
    draw = random.Random(0)
    records = []
    for _ in range(NUM_TRAINING + eval_size):
        prompt = "".join(draw.choices(string.digits, k=prompt_length))
        words = ["".join(draw.choices(string.ascii_letters, k=8)) for _ in range(num_words)]
        records.append(json.dumps({"prompt": prompt, "answer": "1".join(words)}))
    (directory / "task.jsonl").write_text("\n".join(records), encoding="utf-8")
    (directory / "share.py").write_text(REWARD, encoding="utf-8")


def measured(config: Config) -> Trace:
    """Two steps and an evaluation of a fresh trainer; on a GPU only what is highest of all."""
    if config.model.device.startswith("cuda"):
        return measured_on_gpu(config)
    with traced() as trace:
        trainer = build_trainer(config)
        with closing(trainer.sampler.scorer):
            run(trainer)
        del trainer
    return trace


def measured_on_gpu(config: Config) -> Trace:
    """By the count of torch's allocator, from when the trainer has been built."""
    trainer, found = build_trainer(config), Trace()
    with closing(trainer.sampler.scorer):
        torch.cuda.reset_peak_memory_stats()
        run(trainer)
        found.highest = torch.cuda.max_memory_allocated()
    return found


def run(trainer: Trainer) -> None:
    """As a run does, in spans that have the names of a plan's phases."""
    config, policy, method = trainer.config, trainer.policy, trainer.method
    wanted = config.model.architecture["vocab_size"]
    if len(policy.tokenizer) != wanted:
        raise RuntimeError(f"expected {wanted} tokens, the text gave {len(policy.tokenizer)}")
    if "ref_logps" in requirements(method):
        moves = method.reference_update is not None
        trainer.reference = make_reference(policy, config.model.reference, moves=moves)
    policy.eos_token_ids = [NO_TOKEN]
    mark(trainer, "train_step", "update")
    mark(trainer, "sample", "rollout")
    mark(trainer, "pack", "score")
    for name in ("_measure", "_with_own_logps"):
        mark(trainer.updater, name, "score")
    for stepper in (trainer.learner.stepper, trainer.learner.critic_stepper):
        if stepper is not None:
            mark(stepper, "_step_all", "step")
    for step in range(NUM_STEPS):
        trainer.train_step(step)
    with span("evaluate"):
        prompts = trainer.encode(trainer.task.eval_examples())
        evaluate_held_out(trainer, prompts)
