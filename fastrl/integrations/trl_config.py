"""A config from the arguments of TRL's GRPOTrainer.

What TRL calls a step is an optimizer step; here a step is a batch of rollouts with all of its
optimizer steps, so that counts of steps are divided. An argument that would change what is trained
and has no counterpart raises; one that only says where things run or what is logged is noted.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

from fastrl.config import Config, EvalConfig, ModelConfig, OptimConfig, RolloutConfig, SaveConfig
from fastrl.errors import InputError, nearest

SAME = {
    "rollout.num_generations": "num_generations",
    "rollout.max_completion_length": "max_completion_length",
    "rollout.temperature": "temperature",
    "rollout.top_p": "top_p",
    "rollout.top_k": "top_k",
    "rollout.min_p": "min_p",
    "rollout.repetition_penalty": "repetition_penalty",
    "model.gradient_checkpointing": "gradient_checkpointing",
    "model.use_liger_kernel": "use_liger_kernel",
    "model.cast_lm_head_to_fp32": "cast_lm_head_to_fp32",
    "optim.learning_rate": "learning_rate",
    "optim.lr_scheduler_type": "lr_scheduler_type",
    "optim.lr_scheduler_kwargs": "lr_scheduler_kwargs",
    "optim.adam_beta1": "adam_beta1",
    "optim.adam_beta2": "adam_beta2",
    "optim.weight_decay": "weight_decay",
    "optim.max_grad_norm": "max_grad_norm",
    "save.save_total_limit": "save_total_limit",
    "num_iterations": "num_iterations",
    "seed": "seed",
    "output_dir": "output_dir",
}
"""Fields of the config and what TRL calls them, where both mean the same."""
OPTIMIZERS = {
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw",
    "adamw_8bit": "bnb_adamw_8bit",
    "adamw_bnb_8bit": "bnb_adamw_8bit",
    "paged_adamw_8bit": "bnb_paged_adamw_8bit",
    "adamw_torch_8bit": "torchao_adamw_8bit",
    "adamw_torch_4bit": "torchao_adamw_4bit",
}
LOSSES = {  # loss_type and importance_sampling_level -> surrogate and aggregation
    ("grpo", "token"): ("clipped_ratio", "sequence_mean"),
    ("bnpo", "token"): ("clipped_ratio", "token_mean"),
    ("dapo", "token"): ("clipped_ratio", "token_mean"),
    ("dr_grpo", "token"): ("clipped_ratio", "constant"),
    ("cispo", "token"): ("truncated_importance", "token_mean"),
    ("sapo", "token"): ("soft_gated_ratio", "sequence_mean"),
    ("vespo", "token"): ("sequence_tempered", "token_mean"),
    ("grpo", "sequence"): ("geometric_ratio", "sequence_mean"),
    ("luspo", "sequence"): ("geometric_ratio", "sequence_sum"),
}
VESPO = {
    "positive_power": "vespo_k_pos",
    "positive_decay": "vespo_lambda_pos",
    "negative_power": "vespo_k_neg",
    "negative_decay": "vespo_lambda_neg",
}
ADVANTAGES = {"group": "group_relative", "none": "group_centred", "batch": "batch_relative"}
READ = {
    "per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation",
    "generation_batch_size", "max_steps", "warmup_steps", "optim", "bf16", "loss_type",
    "importance_sampling_level", "scale_rewards", "beta", "use_bias_correction_kl", "epsilon",
    "epsilon_high", "delta", "sapo_temperature_neg", "sapo_temperature_pos", "vespo_k_pos",
    "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg", "top_entropy_quantile", "entropy_coef",
    "reward_weights", "multi_objective_aggregation", "mask_truncated_completions", "eval_strategy",
    "sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps",
    "eval_steps", "save_strategy", "save_steps", "use_cpu",
    "activation_checkpointing", "activation_checkpointing_kwargs", "gradient_checkpointing_kwargs",
    "accelerator_config",
    *SAME.values(),
}  # fmt: skip
"""What is turned into something."""
WITHOUT_EFFECT = (
    "logging_", "log_", "report_to", "run_name", "project", "trackio_", "hub_", "push_to_hub",
    "dataloader_", "disable_tqdm", "vllm_", "use_vllm", "use_transformers_", "transformers_",
    "cache_implementation", "use_cache", "ds3_", "ddp_", "per_device_eval_batch_size", "eval_",
    "save_", "remove_unused_columns", "num_completions_to_print", "skip_memory_metrics",
    "torch_compile", "do_",
    "include_", "local_rank", "tf32", "pad_to_multiple_of", "full_determinism",
    "num_train_epochs", "num_generations_eval", "shuffle_dataset", "disable_dropout",
    "torch_empty_cache_steps", "average_tokens_across_devices", "restore_callback", "jit_mode",
    "trust_remote_code", "data_seed", "load_best_model_at_end", "prediction_loss",
    "entropy_coef_", "entropy_target", "enable_jit",
)  # fmt: skip
"""Beginnings of names of what says nothing of the loss on one device, or only beside another."""


class Imported(NamedTuple):
    """A config, and what was not taken over."""

    config: Config
    notes: list[str]


def from_trl(arguments: Any, **fields: Any) -> Imported:
    """The config of a run that trains what a GRPOTrainer with these arguments would.

    arguments: a trl.GRPOConfig. fields: of `Config`, such as task, rewards and model, which TRL
    takes elsewhere; they replace what was imported. Raises InputError for an argument that has no
    counterpart. Losses are compared with TRL's own in tests/test_trl_parity.py.
    """
    known = [field.name for field in dataclasses.fields(Config)]
    for name in fields:
        if name not in known:
            raise InputError(f"Config has no field {name!r}; {nearest(name, known)}")
    if arguments.max_steps <= 0:
        raise InputError("GRPOConfig.max_steps is not set; say how long to train, not by epochs")
    notes = _refuse_and_note(arguments)
    num_mini_batches = _whole(
        arguments.steps_per_generation, arguments.gradient_accumulation_steps,
        "steps_per_generation must be a multiple of gradient_accumulation_steps",
    )  # fmt: skip
    sections = _sections(arguments, num_mini_batches * arguments.num_iterations)
    weights = arguments.reward_weights
    config = Config(
        **sections[""],
        method="grpo",
        objective=_objective(arguments, num_mini_batches * arguments.num_iterations),
        prompts_per_step=_whole(
            arguments.generation_batch_size, arguments.num_generations,
            "generation_batch_size must be a multiple of num_generations",
        ),
        num_mini_batches=num_mini_batches,
        reward_weights=None if weights is None else tuple(map(float, weights)),
        model=ModelConfig(**sections["model"]),
        rollout=RolloutConfig(**sections["rollout"]),
        optim=OptimConfig(**sections["optim"]),
        save=SaveConfig(**sections["save"]),
        eval=EvalConfig(**sections["eval"]),
    )  # fmt: skip
    return Imported(dataclasses.replace(config, **fields), notes)


def _sections(arguments: Any, per_batch: int) -> dict[str, dict[str, Any]]:
    """Fields of each table of the config; per_batch: optimizer steps of a batch of rollouts."""

    def steps(count: float) -> int:
        return math.ceil(count / per_batch)

    warmup = arguments.warmup_steps
    if 0 < warmup < 1:
        warmup *= arguments.max_steps
    is_saved = _text(arguments.save_strategy) == "steps"
    is_evaluated = _text(arguments.eval_strategy) == "steps"
    found: dict[str, dict[str, Any]] = {
        "": {"max_steps": steps(arguments.max_steps)},
        "rollout": {},
        "model": {
            "precision": "autocast" if arguments.bf16 else "float32",
            "device": "cpu" if arguments.use_cpu else "auto",
        },
        "optim": {"optimizer": _optimizer(arguments), "warmup_steps": steps(warmup)},
        "save": {"save_steps": steps(arguments.save_steps) if is_saved else 0},
        "eval": {"eval_steps": steps(arguments.eval_steps) if is_evaluated else 0},
    }
    for path, name in SAME.items():
        section, _, key = path.rpartition(".")
        value = getattr(arguments, name)
        if value is not None:
            found[section][key] = getattr(value, "value", value)
    if arguments.activation_checkpointing is not None:  # its newer name
        found["model"]["gradient_checkpointing"] = arguments.activation_checkpointing
    return found


def _refuse_and_note(arguments: Any) -> list[str]:
    """Arguments that are not at their default and are not read: an error, or a note."""
    notes = []
    for field in dataclasses.fields(arguments):
        name, value = field.name, getattr(arguments, field.name)
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if name in READ or name.startswith("_") or value == default or not value:
            continue
        if not name.startswith(WITHOUT_EFFECT):
            raise InputError(
                f"GRPOConfig.{name} = {value!r} has no counterpart in FastRL; remove it, or set up "
                "the run with a config of its own"
            )
        notes.append(f"{name} = {value!r} was not taken over")
    return notes


def _objective(arguments: Any, per_batch: int) -> dict[str, Any]:
    """The table `objective`, on top of method grpo; per_batch: as in _sections."""
    level = (arguments.loss_type, arguments.importance_sampling_level)
    if level not in LOSSES:
        raise InputError(
            f"GRPOConfig.loss_type {level[0]!r} with importance_sampling_level {level[1]!r} has no "
            f"counterpart; there are {', '.join(f'{a} ({b})' for a, b in LOSSES)}"
        )
    surrogate, aggregation = LOSSES[level]
    scale = {True: "group", False: "none"}.get(arguments.scale_rewards, arguments.scale_rewards)
    found: dict[str, Any] = {"surrogate": surrogate, "aggregation": aggregation}
    found["advantage"] = ADVANTAGES[str(scale)]
    parameters: dict[str, Any] = {}
    if arguments.multi_objective_aggregation == "normalize_then_sum":
        found["advantage"] = "decoupled_rewards"
        if arguments.reward_weights is not None:
            raise InputError(
                "GRPOConfig.reward_weights beside multi_objective_aggregation 'normalize_then_sum' "
                "has no counterpart; remove the weights"
            )
    _set_surrogate(arguments, found, parameters)
    if arguments.beta:
        found["beta"] = arguments.beta
        found["regulariser"] = "k3_is" if arguments.use_bias_correction_kl else "k3"
    if arguments.sync_ref_model:
        found["reference_update"] = "moving_average"
        parameters["mixup_alpha"] = arguments.ref_model_mixup_alpha
        parameters["sync_steps"] = math.ceil(arguments.ref_model_sync_steps / per_batch)
    if arguments.top_entropy_quantile < 1:
        found["token_weights"] = "high_entropy"
        parameters["fraction"] = arguments.top_entropy_quantile
    if arguments.entropy_coef:
        found["entropy_coef"] = arguments.entropy_coef
    if arguments.mask_truncated_completions:
        found["mask_truncated_completions"] = True
    return {**found, "parameters": parameters} if parameters else found


def _optimizer(arguments: Any) -> str:
    name = _text(arguments.optim)
    if name not in OPTIMIZERS:
        raise InputError(
            f"GRPOConfig.optim {name!r} has no counterpart; {nearest(name, list(OPTIMIZERS))}"
        )
    return OPTIMIZERS[name]


def _set_surrogate(arguments: Any, found: dict[str, Any], parameters: dict[str, Any]) -> None:
    """Numbers of the surrogate, by its names for them."""
    surrogate = found["surrogate"]
    high = arguments.epsilon if arguments.epsilon_high is None else arguments.epsilon_high
    if surrogate == "truncated_importance":
        # TRL caps the ratio at epsilon_high itself, here the cap is 1 + epsilon_high.
        found |= {"epsilon_low": 1.0, "epsilon_high": high - 1.0}
    elif surrogate == "soft_gated_ratio":
        parameters |= {
            "temperature_positive": arguments.sapo_temperature_pos,
            "temperature_negative": arguments.sapo_temperature_neg,
        }
    elif surrogate == "sequence_tempered":
        parameters |= {ours: getattr(arguments, theirs) for ours, theirs in VESPO.items()}
    else:
        found |= {"epsilon_low": arguments.epsilon, "epsilon_high": high}
    if arguments.delta is not None:
        if surrogate != "clipped_ratio":
            raise InputError(
                f"GRPOConfig.delta has no effect on loss_type {arguments.loss_type!r}; remove it"
            )
        found["surrogate"], parameters["delta"] = "two_sided_clipped_ratio", arguments.delta


def _text(value: Any) -> str:
    """A word that may be a member of one of transformers' enumerations."""
    return str(getattr(value, "value", value))


def _whole(value: int, divisor: int, rule: str) -> int:
    if value % divisor:
        raise InputError(f"GRPOConfig.{rule}, got {value} and {divisor}")
    return value // divisor
