"""What a technique will need, found out on fake tensors before anything of that size is made.

Legend: b rows, T their length, S trained tokens, V vocabulary.
"""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrl.activations import INPUTS_ON_DEVICE, packed_token_bytes
from fastrl.bench.models import Blueprint, quiet
from fastrl.bench.modes import Modes
from fastrl.bench.techniques import Technique
from fastrl.bench.workload import Layout, Workload, packed_passes, padded_rows, padded_width
from fastrl.integrations.capabilities import without_wrappers
from fastrl.integrations.chunked_mlp import mlps_of
from fastrl.memory.plan import gib
from fastrl_kernels.plan import explain

LOGITS_COPIES = 3
"""Of float32 logits that are stored: their softmax's logarithm, its gradient and that of logits."""
STATE_BYTES = 8  # a trained parameter: two float32 moments of AdamW


class Estimate(NamedTuple):
    """Bytes."""

    weights: int
    gradients: int
    states: int
    activations: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self)

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {gib(value)}" for name, value in self._asdict().items())
        return f"{gib(self.total)} GiB ({parts})"


class Pass(NamedTuple):
    """What one forward and backward pass looks at."""

    num_tokens: int  # through the layers
    num_trained: int  # at the head
    num_logits: int  # rows of logits that padded rows make, padding included


def passes_of(work: Workload, layout: Layout, technique: Technique) -> list[Pass]:
    """Those of an update."""
    if technique.is_packed:
        packed = packed_passes(
            work, layout._replace(device=torch.device("cpu")),
            shares=technique.shares_prompts, drops=technique.drops_tokens,
        )  # fmt: skip
        return [Pass(len(x.plan.input_ids), len(x.plan.target_ids), 0) for x in packed]
    width, lengths = padded_width(work), work.rollouts.lengths
    longest = int(lengths.max())
    return [
        Pass(len(rows) * width, int(lengths[list(rows)].sum()), len(rows) * (longest + 1))
        for rows in padded_rows(work, layout)
    ]


class Estimator:
    """Counts what autograd would keep of one padded row, on fake tensors, once for each mode."""

    def __init__(self, blueprint: Blueprint, work: Workload, layout: Layout, *, bf16: bool) -> None:
        self.blueprint = blueprint
        self.work = work
        self.layout = layout
        self.bf16 = bf16
        self.modes = Modes(blueprint.model)
        self.width = padded_width(work)
        self.known: dict[tuple[bool, bool], int] = {}

    def estimate(self, technique: Technique) -> Estimate:
        """Of the technique's largest pass. A packed row counts as padded rows of as many tokens."""
        passes = passes_of(self.work, self.layout, technique)
        num_tokens = max(x.num_tokens for x in passes)
        kept = self._layer_bytes(num_tokens, technique)
        head = self._head_bytes(technique, max(passes, key=lambda x: x.num_trained))
        model = self.blueprint
        return Estimate(
            model.weight_bytes, model.gradient_bytes, STATE_BYTES * model.num_trained, kept + head
        )

    def _layer_bytes(self, num_tokens: int, technique: Technique) -> int:
        """Of the layers; by the formula for models that fake tensors cannot run, which are those
        that route tokens and those with an adapter.
        """
        config = self.blueprint.config
        if not self.blueprint.can_run:
            if technique.mlp_chunk_size:
                mlps_of(without_wrappers(self.blueprint.model))  # refuses models with experts
            return num_tokens * packed_token_bytes(
                config, bf16=self.bf16, is_checkpointed=technique.recomputes,
                is_offloaded=technique.offloads, has_chunked_mlps=technique.mlp_chunk_size > 0,
            )  # fmt: skip
        kept = self._saved(num_tokens, technique)
        if technique.recomputes:
            layers = config.get_text_config().num_hidden_layers
            kept = kept * min(layers, INPUTS_ON_DEVICE) // layers if technique.offloads else kept
            kept += self._saved(num_tokens, technique._replace(recomputes=False)) // layers
        copies = 2 * self.blueprint.num_parameters if self.bf16 else 0  # of weights, for autocast
        return kept + copies

    def _saved(self, num_tokens: int, technique: Technique) -> int:
        """Bytes that a forward pass of the layers leaves for the backward pass."""
        key = (technique.recomputes, technique.mlp_chunk_size > 0)
        if key not in self.known:
            size = min(technique.mlp_chunk_size, self.width // 2)
            one_row = technique._replace(offloads=False, mlp_chunk_size=size)
            self.modes.switch(one_row, torch.device("cpu"))
            self.known[key] = self._saved_of_a_row()
            self.modes.switch_off()
        return self.known[key] * num_tokens // self.width

    def _saved_of_a_row(self) -> int:
        found: dict[int, Tensor] = {}

        def keep(tensor: Tensor) -> Tensor:
            found[tensor.untyped_storage()._cdata] = tensor
            return tensor

        model: Any = without_wrappers(self.blueprint.model)
        autocast: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if self.bf16:
            autocast = torch.autocast("cpu", torch.bfloat16)
        with self.blueprint.mode, quiet(), autocast:
            ids = torch.zeros(1, self.width, dtype=torch.int64)
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                body = model.base_model
                body(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        weights = {x.untyped_storage()._cdata for x in model.parameters()}
        shapes = {tuple(sorted(x.shape)) for x in model.parameters() if self.bf16 and x.dim() == 2}
        return sum(
            x.untyped_storage().nbytes()
            for key, x in found.items()
            if key not in weights and tuple(sorted(x.shape)) not in shapes
        )

    def _head_bytes(self, technique: Technique, largest: Pass) -> int:
        """What the head keeps and needs: logits, or the workspace of the fused loss."""
        model = self.blueprint
        if not technique.is_fused:
            return LOGITS_COPIES * 4 * model.vocab_size * largest.num_logits
        transformer: Any = without_wrappers(model.model)
        weight = transformer.get_output_embeddings().weight
        hidden = torch.empty(
            largest.num_trained, model.hidden_size, dtype=weight.dtype, device="meta",
            requires_grad=True,
        )  # fmt: skip
        head = torch.empty(
            weight.shape, dtype=weight.dtype, device="meta", requires_grad=weight.requires_grad
        )
        plan = explain(hidden, head)
        return plan.workspace_bytes + plan.gradient_bytes + 2 * hidden.numel() * hidden.itemsize
