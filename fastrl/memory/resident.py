"""What lies on the device between two steps.

Legend: D hidden.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fastrl.adapters import adapter_parameters
from fastrl.config import Config
from fastrl.integrations.capabilities import without_wrappers
from fastrl.memory.model import MetaPolicy, layers_of
from fastrl.memory.optimizers import Kept
from fastrl.memory.timeline import BLOCK
from fastrl.methods.needs import needs_reference
from fastrl.methods.record import Method
from fastrl.reference import NUM_BITS
from fastrl.update import look_ahead
from fastrl.weight_only import weight_only_copy


def resident_parts(
    config: Config, method: Method, policy: MetaPolicy, body: Any, *, device: str
) -> dict[str, int]:
    """Bytes by part, from the second step on: no gradients, and states of the optimizer.

    policy: whole. body: the layers of the value model, where it is a directory's.
    """
    model, settings = policy.model, config.model
    adapter = list(adapter_parameters(model).values()) if settings.lora else []
    trained = [x for x in model.parameters() if x.requires_grad]
    kept = Kept(config.optim.optimizer, settings.precision, device)
    total = bytes_of(_tensors(model), device)
    parts = {"weights": total - bytes_of(adapter, device), "adapter": bytes_of(adapter, device)}
    parts["optimizer"] = sum(map(kept.bytes_of, trained)) + kept.bytes_of_positions(trained)
    if method.value_loss is not None:
        values = _value_model(config, policy, body)
        parts["value model"] = bytes_of(values, device)
        parts["optimizer"] += sum(kept.bytes_of(x) for x in values if x.is_floating_point())
    if needs_reference(method):
        parts["reference"] = _reference_bytes(config, method, policy, adapter, device)
    if look_ahead(method)[0]:
        parts["other"] = bytes_of(trained, device)
    return {part: size for part, size in parts.items() if size}


def bytes_of(tensors: Iterable[Tensor], device: str) -> int:
    """Of distinct tensors, in blocks of the device's allocator."""
    block = BLOCK[device]
    return sum(-(-x.numel() * x.dtype.itemsize // block) * block for x in tensors)


def _tensors(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers, those that are shared once."""
    return list({id(x): x for x in (*module.parameters(), *module.buffers())}.values())


def _value_model(config: Config, policy: MetaPolicy, body: Any) -> list[Tensor]:
    """What is trained of the value model; its head and its adapter are in float32."""
    D = (policy.model if body is None else body).config.get_text_config().hidden_size

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, device="meta")

    head = [empty(1, D), empty(1)]
    if config.critic.model == "head":
        return head
    if config.critic.model == "lora":
        own = adapter_parameters(policy.model).items()
        return head + [empty(*x.shape) for path, x in own if ".lora_" in path]
    return head + _tensors(body)


def _reference_bytes(
    config: Config, method: Method, policy: MetaPolicy, adapter: list[Any], device: str
) -> int:
    kind = config.model.reference
    if config.model.lora:
        moves = method.reference_update is not None or config.warm_start.steps > 0
        return bytes_of(adapter, device) if moves else 0
    if kind in NUM_BITS:
        dtype = torch.bfloat16 if policy.is_half else next(policy.model.parameters()).dtype
        copy = weight_only_copy(policy.model, num_bits=NUM_BITS[kind], dtype=dtype)
        return bytes_of(_tensors(copy), device)
    total = bytes_of(_tensors(policy.model), device)
    if kind == "cpu" and device == "cuda":
        return total - bytes_of(_away(policy.model), device)
    return total


def _away(model: Any) -> list[Tensor]:
    """What a reference on the CPU has there: layers, embedding and head."""
    layers = layers_of(model)
    inner: Any = without_wrappers(model)
    ends = (inner.get_input_embeddings(), inner.get_output_embeddings())
    found = [x for part in (layers, *ends) if part is not None for x in part.parameters()]
    return list({id(x): x for x in found}.values())


def visiting_bytes(model: Any, device: str) -> int:
    """What a reference on the CPU brings to the device at once: two layers and the head."""
    layers = layers_of(model)
    if layers is None:
        return 0
    sizes = sorted(bytes_of(layer.parameters(), device) for layer in layers)
    inner: Any = without_wrappers(model)
    return sum(sizes[-2:]) + bytes_of(inner.get_output_embeddings().parameters(), device)
