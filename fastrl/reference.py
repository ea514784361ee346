"""The policy that a penalty pulls towards, in as little memory as the policy leaves it.

With an adapter it is the same weights with the adapter switched off, or with the adapter's first
values in its place; otherwise a copy: beside the policy, on the CPU, or rounded.

Legend: N packed tokens, D hidden.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor

from fastrl.adapters import adapter_off, adapter_parameters, is_adapted, is_untouched
from fastrl.errors import InputError
from fastrl.integrations.base_models import read_model
from fastrl.integrations.streamed import streamed_copy
from fastrl.integrations.tokenizer import load_tokenizer
from fastrl.packing import Plan
from fastrl.policy import Policy
from fastrl.weight_only import weight_only_copy
from fastrl_kernels import LMHead

MARK = "reference.json"
NUM_BITS = {"8bit": 8, "4bit": 4}


class Reference(Protocol):
    """What a policy is compared with; `fastrl.loss.token_statistics` takes it like a policy."""

    @property
    def head_dtype(self) -> torch.dtype: ...

    @property
    def lm_head(self) -> LMHead: ...

    def hidden_states(self, plan: Plan) -> Tensor:
        """(N, D) final hidden states of a packed plan, in the dtype of the head; no gradient."""
        ...

    def update(self, policy: Policy, mixup_alpha: float) -> None:
        """reference <- mixup_alpha * policy + (1 - mixup_alpha) * reference."""
        ...

    def save(self, directory: Path) -> None:
        """Write what `load_reference` restores to the bit."""
        ...


def make_reference(policy: Policy, kind: str, *, moves: bool = False) -> Reference:
    """The policy as it is now.

    kind: auto, copy, cpu, 8bit or 4bit, see `ModelConfig.reference`. moves: `update` will be
    called, which a rounded reference cannot follow.
    """
    if moves and kind in NUM_BITS:
        raise InputError(
            f"a reference that follows the policy needs its exact weights, but model.reference is "
            f"{kind!r}, which rounds them; choose 'copy' or 'cpu'"
        )
    if not is_adapted(policy.model):
        return CopiedReference(policy, kind)
    assert kind in ("auto", "copy"), "memory_modes refuses the others"
    if not moves and is_untouched(policy.model):
        return BaseReference(policy)
    return AdapterReference(policy)


class BaseReference:
    """The policy's own weights with its adapter switched off: nothing is stored."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    @property
    def head_dtype(self) -> torch.dtype:
        """What hidden states are given to the head in."""
        with adapter_off(self.policy.model):
            return self.policy.head_dtype

    @property
    def lm_head(self) -> LMHead:
        """The base's own."""
        with adapter_off(self.policy.model):
            return self.policy.lm_head

    @torch.no_grad()
    def hidden_states(self, plan: Plan) -> Tensor:
        """See `Reference`."""
        with adapter_off(self.policy.model), self.policy.evaluating():
            return self.policy.hidden_states(plan)

    def update(self, policy: Policy, mixup_alpha: float) -> None:
        """A base never moves."""
        raise ValueError("made with moves=False, so there is no adapter to move; pass moves=True")

    def save(self, directory: Path) -> None:
        """See `Reference`: that it is the base is all there is to know."""
        _write_mark(directory, "base")


class AdapterReference:
    """The policy's own weights below an adapter that keeps its values; they take turns."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.parameters = adapter_parameters(policy.model)
        self.values = {name: x.detach().clone() for name, x in self.parameters.items()}

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        """Within the block the adapter has the reference's values: storages are exchanged."""
        current = {name: parameter.data for name, parameter in self.parameters.items()}
        try:
            for name, parameter in self.parameters.items():
                parameter.data = self.values[name]
            yield
        finally:
            for name, parameter in self.parameters.items():
                parameter.data = current[name]

    @property
    def head_dtype(self) -> torch.dtype:
        """What hidden states are given to the head in."""
        return self.policy.head_dtype

    @property
    def lm_head(self) -> LMHead:
        """With the reference's own values, where it has an adapter."""
        with self._in_place():
            # A parameter would go back to the policy's values with the end of the block.
            return _with_tensors(self.policy.lm_head, Tensor.detach)

    @torch.no_grad()
    def hidden_states(self, plan: Plan) -> Tensor:
        """See `Reference`."""
        with self._in_place(), self.policy.evaluating():
            return self.policy.hidden_states(plan)

    @torch.no_grad()
    def update(self, policy: Policy, mixup_alpha: float) -> None:
        """See `Reference`; A and B are mixed each for itself."""
        mix(list(self.values.values()), list(self.parameters.values()), mixup_alpha)

    def save(self, directory: Path) -> None:
        """See `Reference`."""
        _write_mark(directory, "adapter")
        own = {name: value.cpu().contiguous() for name, value in self.values.items()}
        save_file(own, directory / "adapter.safetensors")

    def load(self, directory: Path) -> None:
        """Take the values that `save` has written."""
        saved = load_file(directory / "adapter.safetensors")
        for name, value in self.values.items():
            value.copy_(saved[name])


class CopiedReference:
    """Weights of its own: as they are, on the CPU, or rounded."""

    def __init__(self, policy: Policy, kind: str) -> None:
        self.kind = kind
        self.policy = _copy(policy, kind)

    @property
    def head_dtype(self) -> torch.dtype:
        """What hidden states are given to the head in."""
        return self.policy.head_dtype

    @property
    def lm_head(self) -> LMHead:
        """Of the copy."""
        return self.policy.lm_head

    @torch.no_grad()
    def hidden_states(self, plan: Plan) -> Tensor:
        """See `Reference`."""
        return self.policy.hidden_states(plan)

    @torch.no_grad()
    def update(self, policy: Policy, mixup_alpha: float) -> None:
        """See `Reference`."""
        own, theirs = self.policy.model.parameters(), policy.model.parameters()
        mix(list(own), list(theirs), mixup_alpha)

    def save(self, directory: Path) -> None:
        """See `Reference`; a model directory unless the weights are rounded."""
        if self.kind in NUM_BITS:
            _write_mark(directory, self.kind)
            save_model(self.policy.model, str(directory / "rounded.safetensors"))
        else:
            self.policy.save(directory)
            _write_mark(directory, "model")

    def load(self, directory: Path) -> None:
        """Take the weights that `save` has written."""
        if self.kind in NUM_BITS:
            load_model(self.policy.model, str(directory / "rounded.safetensors"))
            return
        parameters = dict(self.policy.model.named_parameters())
        dtype = next(iter(parameters.values())).dtype
        saved = read_model(directory, load_tokenizer(directory), dtype=dtype)
        with torch.no_grad():
            for name, value in saved.named_parameters():
                parameters[name].copy_(value)


class _StreamedPolicy(Policy):
    """A policy whose weights are not where it computes."""

    computes_on: torch.device

    @property
    def device(self) -> torch.device:
        """Where plans are."""
        return self.computes_on

    @property
    def lm_head(self) -> LMHead:
        """The head, brought to the device."""
        return _with_tensors(super().lm_head, lambda x: x.to(self.computes_on, non_blocking=True))


def _with_tensors(head: LMHead, change: Callable[[Tensor], Tensor]) -> LMHead:
    parts: Any = (change(part) if isinstance(part, Tensor) else part for part in head)
    return LMHead(*parts)


def _copy(policy: Policy, kind: str) -> Policy:
    # On the CPU there is nowhere to stream from.
    if kind in ("auto", "copy") or (kind == "cpu" and policy.device.type == "cpu"):
        return policy.frozen_copy()
    if kind == "cpu":
        return streamed_policy(policy)
    dtype = torch.bfloat16 if policy.is_half else next(policy.model.parameters()).dtype
    model = weight_only_copy(policy.model, num_bits=NUM_BITS[kind], dtype=dtype)
    return Policy(
        model, policy.tokenizer, bf16=policy.bf16,
        cast_lm_head_to_fp32=policy.cast_lm_head_to_fp32,
    )  # fmt: skip


def streamed_policy(policy: Policy) -> Policy:
    """A frozen copy on the CPU whose layers visit the policy's device one by one."""
    streamed = _StreamedPolicy(
        streamed_copy(policy.model, policy.device), policy.tokenizer, bf16=policy.bf16,
        cast_lm_head_to_fp32=policy.cast_lm_head_to_fp32,
    )  # fmt: skip
    streamed.computes_on = policy.device
    return streamed


def mix(own: Sequence[Tensor], theirs: Sequence[Tensor], mixup_alpha: float) -> None:
    """own <- mixup_alpha * theirs + (1 - mixup_alpha) * own, in float32, rounded once."""
    assert len(own) == len(theirs)
    for value, other in zip(own, theirs, strict=True):
        mixed = torch.lerp(value.float(), other.to(value.device).float(), mixup_alpha)
        value.copy_(mixed)


def load_reference(policy: Policy, kind: str, directory: Path) -> Reference:
    """The reference that was saved in `directory`, of a run with this kind of policy."""
    try:
        saved = json.loads((directory / MARK).read_text(encoding="utf-8"))["kind"]
        if saved == "base":
            return BaseReference(policy)
        if saved == "adapter":
            adapted = AdapterReference(policy)
            adapted.load(directory)
            return adapted
        copied = CopiedReference(policy, kind)
        copied.load(directory)
        return copied
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise InputError(
            f"cannot restore the reference policy from {directory}: {error}"
        ) from error


def _write_mark(directory: Path, kind: str) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / MARK).write_text(json.dumps({"kind": kind}) + "\n", encoding="utf-8")
