"""What a technique will need, found out on fake tensors before anything of that size is made.

Legend: b rows, T their length, S trained tokens, V vocabulary.
"""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrl.bench.models import Blueprint, quiet
from fastrl.bench.modes import Modes
from fastrl.bench.techniques import Technique
from fastrl.bench.workload import Layout, Workload, packed_passes, padded_rows, padded_width
from fastrl.integrations.capabilities import without_wrappers
from fastrl_kernels.plan import explain

LOGITS_COPIES = 3
"""Of float32 logits that are stored: their softmax's logarithm, its gradient and that of logits."""
STATE_BYTES = 8  # a trained parameter: two float32 moments of AdamW
OFFLOADED_INPUTS = 3  # of checkpointed layers that stay on the GPU


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


def gib(num_bytes: float) -> str:
    """Gibibytes in three digits."""
    return f"{num_bytes / 2**30:.3g}"


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
    """Counts what autograd would keep, on fake tensors, once for each shape and mode."""

    def __init__(self, blueprint: Blueprint, work: Workload, layout: Layout, *, bf16: bool) -> None:
        self.blueprint = blueprint
        self.work = work
        self.layout = layout
        self.bf16 = bf16
        self.modes = Modes(blueprint.model)
        self.known: dict[tuple[int, bool, int], int] = {}

    def estimate(self, technique: Technique) -> Estimate:
        """Of the technique's largest pass. Packed rows count as padded rows of as many tokens."""
        passes = passes_of(self.work, self.layout, technique)
        num_rows = -(-max(x.num_tokens for x in passes) // padded_width(self.work))
        kept = self._saved(num_rows, technique)
        if technique.recomputes:
            layers = self.blueprint.config.get_text_config().num_hidden_layers
            kept = kept * min(layers, OFFLOADED_INPUTS) // layers if technique.offloads else kept
            kept += self._saved(num_rows, technique._replace(recomputes=False)) // layers
        head = self._head_bytes(technique, max(passes, key=lambda x: x.num_trained))
        model = self.blueprint
        return Estimate(
            model.weight_bytes, model.gradient_bytes, STATE_BYTES * model.num_trained, kept + head
        )

    def _saved(self, num_rows: int, technique: Technique) -> int:
        """Bytes that a forward pass of the layers leaves for the backward pass."""
        key = (num_rows, technique.recomputes, technique.mlp_chunk_size)
        if key not in self.known:
            plain = technique._replace(offloads=False)
            self.modes.switch(plain, torch.device("cpu"))
            self.known[key] = self._measured(num_rows)
        return self.known[key]

    def _measured(self, num_rows: int) -> int:
        found: dict[int, Tensor] = {}

        def keep(tensor: Tensor) -> Tensor:
            found[tensor.untyped_storage()._cdata] = tensor
            return tensor

        model: Any = without_wrappers(self.blueprint.model)
        autocast: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if self.bf16:
            autocast = torch.autocast("cpu", torch.bfloat16)
        width = padded_width(self.work)
        with self.blueprint.mode, quiet(), autocast:
            ids = torch.zeros(num_rows, width, dtype=torch.int64)
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                body = model.base_model
                body(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        weights = {x.untyped_storage()._cdata for x in model.parameters()}
        return sum(x.untyped_storage().nbytes() for key, x in found.items() if key not in weights)

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
