"""Which of the policy's memory modes exclude each other, found out before anything is loaded."""

from __future__ import annotations

import torch

from fastrl.adapters import check_lora
from fastrl.config import ModelConfig
from fastrl.errors import InputError
from fastrl.integrations.liger import check_liger
from fastrl.integrations.nf4 import check_bitsandbytes


def check_memory_modes(config: ModelConfig, device: torch.device) -> None:
    """Refuse what cannot be had together, or not here, with what to change."""
    if config.lora:
        check_lora(config.lora)
    if config.load_in_4bit:
        if not config.lora:
            raise InputError(
                "model.load_in_4bit keeps weights frozen, so something else must be trained; set "
                "model.lora, for example lora = {r = 16}"
            )
        check_bitsandbytes("model.load_in_4bit")
    if config.lora and config.reference not in ("auto", "copy"):
        raise InputError(
            f"model.reference = {config.reference!r} would store the weights again, but with "
            "model.lora the reference shares them; leave it at 'auto'"
        )
    if config.activation_offloading:
        if not config.gradient_checkpointing:
            raise InputError(
                "model.activation_offloading moves what gradient checkpointing keeps; set "
                "model.gradient_checkpointing = true too"
            )
        if device.type != "cuda":
            raise InputError(
                f"model.activation_offloading moves activations to the memory of the CPU, where "
                f"they are already on {device}; remove it"
            )
    if config.use_liger_kernel:
        check_liger(device)
