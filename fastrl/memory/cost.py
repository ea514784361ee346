"""How long a step takes, in operations of matrix products: to compare settings, not to tell time.

Memory that is read or sent and kernels that are launched are counted in the operations that the
device does meanwhile. Completions have their longest length. Only what a setting changes has to be
right; what all settings share is there so that shares of the whole can be told.

Legend: T packed tokens, S rows at the head, P, R, G, D, V, L as in `work`.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import NamedTuple

from fastrl.config import Config
from fastrl.errors import InputError
from fastrl.memory.work import ModelSizes, Pass, StepWork, method_of, work_of
from fastrl.methods.needs import needs_reference
from fastrl.precision import frozen_dtype, trained_dtype
from fastrl_kernels.plan import FLOPS_PER_BYTE, MIB, Plan, Shape, make_plan

FLOPS_PER_SENT_BYTE = 6000
"""Between a CPU and a GPU. Data sheets: 165 TFLOP/s in bfloat16 over 31.5 GB/s of PCIe 4.0 x16 for
an RTX 4090, 989 over 63 (5.0) for an H100, 5200 and 15700; products reach less of the former."""
FLOPS_PER_LAUNCH = {"cpu": 1e6, "cuda": 3e8}
"""Of a kernel that is too small to matter: some 10 and 5 microseconds."""
LAUNCHES_PER_LAYER = 25
"""Of a forward pass; a backward pass has twice as many."""
MOMENT_BYTES = 8
STEP_BYTES = 28
"""That AdamW moves for a parameter: weight, gradient and two moments in, all but one out."""
UNPACKED_BYTES = 5
"""That making a rounded weight anew moves: codes in, 16 bits out, and in again."""


class Cost(NamedTuple):
    """Operations of a training step, by what they are for."""

    rollout: float
    score: float
    update: float
    optimizer: float

    @property
    def total(self) -> float:
        """All of them."""
        return sum(self)


def cost_of(
    config: Config, sizes: ModelSizes, device: str, kv_share: float = 1.0,
    work: StepWork | None = None,
) -> Cost:  # fmt: skip
    """Of one training step.

    kv_share: of the keys and values of all completions at their longest, how much finds room.
    """
    pricer = Pricer(config, sizes, device, work or work_of(config, sizes))
    return Cost(pricer.rollout(kv_share), pricer.score(), pricer.update(), pricer.optimizer())


class Pricer:
    """Adds up what a step does."""

    def __init__(self, config: Config, sizes: ModelSizes, device: str, work: StepWork) -> None:
        self.config, self.sizes, self.device, self.work = config, sizes, device, work
        model = config.model
        self.weight_dtype = (frozen_dtype if model.lora else trained_dtype)(model.precision)
        self.per_byte = FLOPS_PER_BYTE[device]
        self.num_trained = sizes.num_parameters
        if model.lora:
            self.num_trained = int(model.lora.get("r", 8)) * sizes.lora_width

    @property
    def weight_bytes(self) -> float:
        """Of the layers, as a pass reads them."""
        if self.config.model.load_in_4bit:
            return 0.5 * self.sizes.layer_values
        return self.sizes.layer_values * self.weight_dtype.itemsize

    def layers(self, num_tokens: int) -> float:
        """A forward pass of the layers."""
        sizes, rollout = self.sizes, self.config.rollout
        context = rollout.max_prompt_length + rollout.max_completion_length / 2
        attention = 4 * sizes.num_layers * sizes.attention_width * context
        read = self.weight_bytes * self.per_byte + self._launches()
        return num_tokens * (2 * sizes.layer_values + attention) + read

    def _launches(self) -> float:
        return self.sizes.num_layers * LAUNCHES_PER_LAYER * FLOPS_PER_LAUNCH[self.device]

    def rollout(self, kv_share: float) -> float:
        """Prompts, then every token: its products, and the weights read once for each step."""
        config, sizes = self.config, self.sizes
        rollout = config.rollout
        num_rows = config.prompts_per_step * rollout.num_generations
        R = rollout.max_completion_length
        head = sizes.head_values
        prompts = self.layers(config.prompts_per_step * rollout.max_prompt_length)
        drawn = num_rows * R * 2 * (sizes.layer_values + head)
        read = (self.weight_bytes + head * self.weight_dtype.itemsize) * self.per_byte
        return prompts + drawn + R / min(1.0, kv_share) * (read + self._launches())

    def score(self) -> float:
        """Log-probabilities of the reference policy, where the method asks for them."""
        if not needs_reference(method_of(self.config)):
            return 0.0
        found = 0.0
        for one, count in Counter(self.work.passes).items():
            forward = self.layers(one.num_tokens)
            head = 2.0 * one.num_rows * self.sizes.head_values
            found += count * (forward + head + self._reference(forward))
        return found * self._parts()

    def _parts(self) -> int:
        return self.work.num_steps // self.config.num_iterations

    def _reference(self, forward: float) -> float:
        """What fetching or unpacking the reference's weights adds to a pass."""
        kind, sizes = self.config.model.reference, self.sizes
        if kind in ("8bit", "4bit"):
            return sizes.layer_values * UNPACKED_BYTES * self.per_byte
        if kind != "cpu" or self.device == "cpu":
            return 0.0
        sent = self.weight_bytes * FLOPS_PER_SENT_BYTE
        head = sizes.head_values * self.weight_dtype.itemsize * FLOPS_PER_SENT_BYTE
        return head + _behind(sent, forward, sizes.num_layers)

    def update(self) -> float:
        """Forward and backward passes of all optimizer steps."""
        found = sum(count * self._pass(one) for one, count in Counter(self.work.passes).items())
        if self.config.optim.in_backward == "two_phase" and len(self.work.passes) == 1:
            found *= 2
        return found * self.work.num_steps

    def _pass(self, one: Pass) -> float:
        model, sizes, T = self.config.model, self.sizes, one.num_tokens
        forward = self.layers(T)
        weights = 0.0 if model.lora else 2.0 * T * sizes.layer_values
        gradients = 2 * self.num_trained * self.weight_dtype.itemsize * self.per_byte
        found = 2 * forward + self._launches() + weights + gradients
        if model.gradient_checkpointing:
            found += forward
        if model.activation_offloading:
            num_bytes = T * sizes.num_layers * sizes.hidden * self.weight_dtype.itemsize
            sent = num_bytes * FLOPS_PER_SENT_BYTE
            found += _behind(sent, forward, sizes.num_layers)
            found += _behind(sent, 2 * forward, sizes.num_layers)
        if 0 < model.mlp_chunk_size < T:
            num_chunks = math.ceil(T / model.mlp_chunk_size)
            found += 2 * T * sizes.mlp_values
            found += num_chunks * sizes.mlp_values * self.weight_dtype.itemsize * self.per_byte
            found += num_chunks * self._launches() / 2
        return found + self._head(one.num_rows)

    def _head(self, num_rows: int) -> float:
        """Of the fused loss, by the engine that costs less."""
        sizes = self.sizes
        shape = Shape(
            num_rows, sizes.hidden, sizes.vocab, dtype=self.weight_dtype,
            trains_weight=not self.config.model.lora, device=self.device,
        )  # fmt: skip
        workspace = int(self.config.workspace_mb * MIB)
        found, refusals = [], []
        for engine in ("one_pass", "min_memory"):
            try:
                found.append(self._engine(make_plan(engine, shape, workspace, False), shape))
            except ValueError as error:
                refusals.append(error)
        if not found:
            raise InputError(str(refusals[-1])) from refusals[-1]
        return min(found)

    def _engine(self, plan: Plan, shape: Shape) -> float:
        """Products, and the sums that leave the chip: of the weight's gradient by chunk, or of the
        hidden states' by slice of the vocabulary.
        """
        sums = 2 * shape.hidden_size * shape.itemsize * self.per_byte
        if plan.engine == "one_pass":
            num_chunks = math.ceil(shape.num_tokens / plan.rows)
            return plan.flops + sums * num_chunks * shape.vocab_size * shape.trains_weight
        return plan.flops + sums * math.ceil(shape.vocab_size / plan.columns) * shape.num_tokens

    def optimizer(self) -> float:
        """Steps of AdamW."""
        found = STEP_BYTES * self.per_byte
        if self.config.optim.optimizer == "adamw_offload" and self.device != "cpu":
            found += 2 * MOMENT_BYTES * FLOPS_PER_SENT_BYTE
        return found * self.num_trained * self.work.num_steps


def _behind(sent: float, computed: float, num_layers: int) -> float:
    """What a copy layer by layer behind computing adds: one layer's, and what takes longer."""
    return max(0.0, sent - computed) + sent / num_layers
