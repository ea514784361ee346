"""Implementations that start from logits, and their two operations as steps without arguments.

selected_logps    log-probabilities and entropies, then the gradient of the logits for random slopes
selected_forward  log-probabilities and entropies without gradient

S selected tokens, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from cases import Case, Loaders, Prepared
from implementations import load
from inputs import TEMPERATURE, LogitInputs, make_logits
from measure import Step
from peers import require_cuda
from reference import (
    CHUNK_ROWS,
    SAMPLE,
    Outputs,
    Reference,
    Slopes,
    Statistics,
    compare,
    logit_statistics,
)
from torch import Tensor

SelectedFunction = Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor | None]]
"""(logits, target_ids, temperature) -> (logps, entropies or None)"""

IN_PLACE = "fastrl selected_logps in place"


def selected_loaders() -> dict[str, Callable[[str], SelectedFunction]]:
    """Implementations that give gradients."""
    return {
        "fastrl selected_logps": fastrl_selected_logps,
        IN_PLACE: lambda device: fastrl_selected_logps(device, inplace_backward=True),
        "naive": lambda device: naive_selected,
        "naive compiled": lambda device: torch.compile(naive_selected),
        "trl": trl_selected,
    }


def forward_loaders() -> dict[str, Callable[[str], SelectedFunction]]:
    """Implementations that need not."""
    loaders = {**selected_loaders(), "liger (no entropies)": liger_selected}
    del loaders[IN_PLACE]  # differs in backward only
    return loaders


def fastrl_selected_logps(device: str, **options: Any) -> SelectedFunction:
    """`fastrl_kernels.selected_logps`."""
    from fastrl_kernels import selected_logps

    def selected(logits: Tensor, target_ids: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        result = selected_logps(logits, target_ids, temperature=temperature, **options)
        return result.logps, result.entropies

    return selected


def naive_selected(logits: Tensor, target_ids: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """All log-probabilities in float32."""
    if temperature != 1.0:
        logits = logits / temperature
    log_probs = logits.log_softmax(-1, dtype=torch.float32)
    entropies = -(log_probs.exp() * log_probs).sum(-1)
    return log_probs.gather(-1, target_ids[:, None]).squeeze(-1), entropies


def trl_selected(device: str) -> SelectedFunction:
    """One Triton pass on CUDA and XPU; elsewhere row by row, and in bf16 for bf16 logits."""
    from trl.trainer.utils import selective_log_softmax_and_entropy

    def selected(logits: Tensor, target_ids: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        return selective_log_softmax_and_entropy(logits, target_ids, temperature=temperature)

    return selected


def liger_selected(device: str) -> SelectedFunction:
    """`fused_selective_log_softmax`: no backward; reads S of (1, S + 1, V) logits."""
    require_cuda(device)
    from liger_kernel.ops.grpo_loss import fused_selective_log_softmax

    def selected(logits: Tensor, target_ids: Tensor, temperature: float) -> tuple[Tensor, None]:
        num_tokens, vocab_size = logits.shape
        padded = logits.as_strided((1, num_tokens + 1, vocab_size), (0, vocab_size, 1))
        logps = fused_selective_log_softmax(padded, target_ids[None], temperature=temperature)
        return logps.squeeze(0), None

    return selected


class FromModel(torch.autograd.Function):
    """Hands out logits as a model would, and keeps their gradient in `leaf.grad`.

    Logits that are a leaf would not do: no backward may overwrite them.
    """

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, logits: Tensor, leaf: Tensor) -> Tensor:
        ctx.leaf = leaf
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None]:
        ctx.leaf.grad = grad
        return None, None, None


def prepare(case: Case, only: str | None = None, kept: set[str] | None = None) -> Prepared:
    """Inputs and steps of a case: of all implementations, of those kept or of the one named."""
    inputs = make_logits(case.shape)
    with_backward = case.operation == "selected_logps"
    loaders: Loaders = selected_loaders() if with_backward else forward_loaders()
    if kept is not None:
        loaders = {name: loader for name, loader in loaders.items() if name in kept}
    if only is not None:
        loaders = {only: loaders[only]}
    make_step = backward_step if with_backward else forward_step
    # In place, the logits become their gradient: of a copy, right for the first call, which is the
    # one that is checked, and of no importance to the time of the others.
    spare = inputs.logits.clone() if IN_PLACE in loaders else inputs.logits
    reference = functools.cache(lambda: make_reference(inputs, with_backward))
    num_passes = 3 if with_backward else 1
    return Prepared(
        steps={
            name: make_step(run, inputs, spare if name == IN_PLACE else inputs.logits)
            for name, run in load(loaders, case.shape.device).functions.items()
        },
        leaves=(inputs.logits,),
        check=lambda outputs: compare(outputs, reference(), inputs.logits.grad, None),
        make_floor=lambda: bare_copies(inputs.logits, num_passes),
        floor_name="bare copies",
        num_bytes=num_passes * inputs.logits.nbytes,
        formulas=f"bytes = {num_passes} S V e: logits read"
        + (" twice, their gradient written" if with_backward else ""),
        overwritable=(spare,),
    )


def backward_step(run: SelectedFunction, inputs: LogitInputs, logits: Tensor) -> Step:
    """Forward, and backward with given slopes of the logps and of the entropies."""
    anchor = torch.zeros((), device=inputs.logits.device, requires_grad=True)

    def step() -> Outputs:
        inputs.logits.grad = None
        from_model = FromModel.apply(anchor, logits, inputs.logits)
        logps, entropies = run(from_model, inputs.target_ids, TEMPERATURE)
        assert entropies is not None
        slopes = (inputs.logp_slopes.to(logps.dtype), inputs.entropy_slopes.to(entropies.dtype))
        torch.autograd.backward((logps, entropies), slopes)
        return Outputs(None, logps.detach(), entropies.detach())

    return step


def forward_step(run: SelectedFunction, inputs: LogitInputs, logits: Tensor) -> Step:
    """Logps and entropies under no_grad."""

    def step() -> Outputs:
        with torch.no_grad():
            return Outputs(None, *run(logits, inputs.target_ids, TEMPERATURE))

    return step


def make_reference(inputs: LogitInputs, with_backward: bool) -> Reference:
    """Float64 statistics of every row, and the gradient of some rows of logits."""
    parts = [
        logit_statistics(rows.double() / TEMPERATURE, targets)
        for rows, targets in zip(
            inputs.logits.split(CHUNK_ROWS), inputs.target_ids.split(CHUNK_ROWS), strict=True
        )
    ]
    statistics = Statistics(*(torch.cat(part) for part in zip(*parts, strict=True)))
    if not with_backward:
        return Reference(statistics)
    slopes = Slopes(
        inputs.target_ids, inputs.logp_slopes.double(), inputs.entropy_slopes.double(), statistics
    )
    num_tokens, vocab_size = inputs.logits.shape
    few = torch.arange(0, num_tokens, max(1, num_tokens // (SAMPLE // 4)))
    few = few.to(inputs.logits.device)
    columns = torch.arange(vocab_size, device=inputs.logits.device)
    grads = slopes.of_logits(inputs.logits[few].double() / TEMPERATURE, few, columns)
    return Reference(statistics, rows=few, hidden_grads=grads / TEMPERATURE)


def bare_copies(logits: Tensor, num_passes: int) -> Step:
    """Copies that move the bytes of the logits `num_passes` times, reads and writes together."""
    half = logits[: len(logits) // 2]
    target = torch.empty_like(half)

    def step() -> None:
        for _ in range(num_passes):
            target.copy_(half)

    return step
