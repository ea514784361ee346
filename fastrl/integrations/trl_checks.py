"""With which TRL, and with which of its trainers and options, FastRL's forward pass works."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from fastrl.errors import InputError

SUPPORTED = ((1, 16), (1, 17))
"""Releases of TRL from the first on and below the second: those that were read and tested."""
RANGE = "trl>=1.16,<1.17"
PARTS = (
    "with another one use the parts: fastrl.pack, fastrl_kernels.linear_logps and "
    "fastrl_kernels.policy_loss"
)
NAMES = ("GRPOTrainer", "RLOOTrainer", "DPOTrainer")


def check_version() -> None:
    """Raise InputError unless a release of TRL is installed whose trainers are known."""
    try:
        found = version("trl")
    except PackageNotFoundError:
        raise InputError(
            f"expected {RANGE}, but TRL is not installed; pip install 'fastrl-llm[trl]'"
        ) from None
    release = tuple(int(number) for number in re.findall(r"\d+", found)[:2])
    if not SUPPORTED[0] <= release < SUPPORTED[1]:
        raise InputError(f"expected {RANGE}, got {found}; install one of these, or {PARTS}")


def base_of(trainer: Any) -> type:
    """The one of TRL's trainers that this one is; InputError for any other object."""
    import trl

    for name in NAMES:
        base: type = getattr(trl, name)
        if isinstance(trainer, base):
            return base
    raise InputError(
        f"expected a trainer of TRL that is one of {', '.join(NAMES)}, got "
        f"{type(trainer).__name__}; {PARTS}"
    )


def check_trainer(trainer: Any) -> None:
    """Raise InputError for what is set up in the trainer and cannot work, by its name."""
    for reason in (*_distribution(trainer), *_arguments(trainer), *_adapter(trainer)):
        raise InputError(f"FastRL's forward pass does not work with {reason}, or use TRL's trainer")


def _distribution(trainer: Any) -> list[str]:
    accelerator, found = trainer.accelerator, []
    kind = str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type))
    if kind == "FSDP":
        found.append("FSDP, which keeps parts of the head on other devices; use DDP")
    plugin = getattr(accelerator.state, "deepspeed_plugin", None) if kind == "DEEPSPEED" else None
    if plugin is not None and plugin.zero_stage == 3:
        found.append("DeepSpeed ZeRO-3, which keeps parts of the head elsewhere; use ZeRO-2")
    parallelism = getattr(accelerator, "parallelism_config", None)
    for name in ("cp", "sp", "tp"):
        if getattr(parallelism, f"{name}_enabled", False):
            found.append(f"parallelism_config.{name}_size above 1; leave it at 1")
    if len(set(getattr(trainer.model, "hf_device_map", {}).values())) > 1:
        found.append("a device_map over several devices; put the model on one")
    return found


def _arguments(trainer: Any) -> list[str]:
    arguments, found = trainer.args, []
    if arguments.torch_compile:
        found.append(
            "torch_compile=True: packed rows have another length every time; set it to False"
        )
    if getattr(arguments, "neftune_noise_alpha", None):
        found.append("neftune_noise_alpha: a shared prompt has one noise; leave it at None")
    is_autocast = trainer.accelerator.mixed_precision != "no"
    if getattr(arguments, "cast_lm_head_to_fp32", False) and is_autocast:
        found.append(
            "cast_lm_head_to_fp32=True under mixed precision, where the head is in half "
            "precision; load the model in bfloat16 and set bf16=False"
        )
    return found


def _adapter(trainer: Any) -> list[str]:
    for config in getattr(trainer.model, "peft_config", {}).values():
        if getattr(config, "is_prompt_learning", False):
            return ["a prompt learnt by PEFT, which is no part of a packed row; use LoRA"]
        if getattr(config, "alora_invocation_tokens", None):
            return ["aLoRA, whose adapter begins within a prompt; use plain LoRA"]
    return []
