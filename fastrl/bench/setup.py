"""What `fastrl bench` knows before it computes anything; what can be refused is refused here."""

from __future__ import annotations

import dataclasses
import math
import time
from typing import Any, NamedTuple

import torch

from fastrl.activations import head_row_cost
from fastrl.bench.estimates import Estimator, Pass, passes_of
from fastrl.bench.measuring import available_bytes
from fastrl.bench.models import Blueprint, draw_blueprint
from fastrl.bench.request import Request
from fastrl.bench.rows import Row
from fastrl.bench.techniques import Technique, make_techniques
from fastrl.bench.workload import Layout, Workload, make_workload
from fastrl.errors import InputError
from fastrl.integrations.capabilities import check_model, without_wrappers
from fastrl.memory.plan import gib
from fastrl.memory_modes import check_memory_modes
from fastrl.policy import resolve_device
from fastrl.precision import trained_dtype

LEAST_TOKENS = 4096  # of a pass, unless asked otherwise
NUM_CHUNKS = 8  # of the tokens of a pass in an MLP


class Setup(NamedTuple):
    """What is known before any compute."""

    request: Request
    device: torch.device
    blueprint: Blueprint
    work: Workload
    layout: Layout
    passes: dict[str, list[Pass]]  # of each technique, by name
    rows: list[Row]
    deadline: float  # of time.perf_counter
    remarks: list[str]

    @property
    def compute_dtype(self) -> torch.dtype:
        """Of matrix products in the layers."""
        is_float32 = self.request.config.model.precision == "float32"
        return torch.float32 if is_float32 else torch.bfloat16

    @property
    def left(self) -> list[Row]:
        """The rows that nothing speaks against so far."""
        return [row for row in self.rows if not row.note]


def set_up(request: Request) -> Setup:
    """From a request to the rows to measure; InputError for what cannot be."""
    deadline = time.perf_counter() + request.seconds
    device = resolve_device(request.config.model.device)
    if "model.precision" in request.chooses and device.type == "cuda":
        request = _with_precision(request, "split")
    settings = dataclasses.replace(
        request.config.model, gradient_checkpointing=False, activation_offloading=False
    )
    check_memory_modes(settings, device)
    blueprint = draw_blueprint(request)
    check_model(without_wrappers(blueprint.model))
    _check_positions(request, blueprint.config)
    layout = _layout(request, blueprint, device)
    config = request.config
    work = make_workload(
        config, vocab_size=blueprint.vocab_size, is_fixed_length=request.is_fixed_length,
        zero_spread=request.zero_spread,
    )  # fmt: skip
    remarks: list[str] = []
    if work.method != config.method:
        remarks.append(
            f"method {config.method} looks at tokens before it weighs them: what is dropped is "
            f"that of {work.method}"
        )
    rows = _rows(request, blueprint, work, layout, remarks)
    if all(row.note for row in rows):
        raise InputError(f"the model does not fit: {rows[-1].note.removeprefix('left out: ')}")
    passes = {row.technique.name: passes_of(work, layout, row.technique) for row in rows}
    return Setup(request, device, blueprint, work, layout, passes, rows, deadline, remarks)


def _rows(
    request: Request, blueprint: Blueprint, work: Workload, layout: Layout, remarks: list[str]
) -> list[Row]:
    """Every technique with what it will need; what does not fit has a note."""
    config = request.config
    shared = passes_of(work, layout, Technique("shared"))
    chunk = config.model.mlp_chunk_size or max(32, max(x.num_tokens for x in shared) // NUM_CHUNKS)
    estimator = Estimator(blueprint, work, layout, bf16=config.model.precision == "autocast")
    rows, available = [], available_bytes(layout.device)
    for technique in make_techniques(layout.device, chunk):
        try:
            row = Row(technique, estimator.estimate(technique))
        except InputError as error:  # a model without layers of that kind
            remarks.append(f"{technique.name.strip()}: left out, {error}")
            continue
        if row.estimate.total > available:
            row.note = f"left out: needs {row.estimate}, there are {gib(available)} GiB"
        rows.append(row)
    return rows


def _with_precision(request: Request, precision: Any) -> Request:
    model = dataclasses.replace(request.config.model, precision=precision)
    return dataclasses.replace(request, config=dataclasses.replace(request.config, model=model))


def _check_positions(request: Request, config: Any) -> None:
    rollout = request.config.rollout
    positions = getattr(config.get_text_config(), "max_position_embeddings", 0)
    needed = rollout.max_prompt_length + rollout.max_completion_length
    if positions and needed > positions:
        raise InputError(
            f"a prompt and a completion are {needed} tokens but the model has {positions} "
            "positions; lower --prompt-length or --completion-length"
        )


def _layout(request: Request, blueprint: Blueprint, device: torch.device) -> Layout:
    """Passes as the trainer would cut them."""
    config, settings = request.config, request.config.model
    is_half = settings.precision != "float32"
    dtype = trained_dtype(settings.precision)
    cost = head_row_cost(
        blueprint.config, bf16=is_half, is_checkpointed=False,
        has_bf16_stream=dtype == torch.bfloat16,
        head_dtype=torch.float32 if settings.cast_lm_head_to_fp32 else dtype,
    )  # fmt: skip
    rollout = config.rollout
    least = math.ceil(rollout.max_prompt_length + rollout.max_completion_length * (1 + cost))
    budget = config.max_tokens_per_pass
    if "max_tokens_per_pass" in request.chooses:
        budget = max(LEAST_TOKENS, least)
    if budget < least:
        raise InputError(
            f"a pass must hold one prompt and completion with its rows at the head, at least "
            f"{least} tokens, got {budget}; raise --max-tokens-per-pass"
        )
    return Layout(budget, cost, device, torch.float32)
