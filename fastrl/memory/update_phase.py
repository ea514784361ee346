"""Scores, forward and backward pass and optimizer of a step, without data.

The trainer's own functions run on "meta" under a ledger. The step is a later one: states of the
optimizer are there from the beginning.

Legend: N packed tokens, S trained tokens.
"""

from __future__ import annotations

import contextlib
from typing import Literal, NamedTuple

import torch

from fastrl.config import Config
from fastrl.critic import Critic, ModelCritic
from fastrl.integrations.hybrids import calls_of_mixers
from fastrl.integrations.last_layer import MIN_SAVED
from fastrl.loss import PassBackward, measure, token_statistics
from fastrl.memory.arithmetic import casts_in
from fastrl.memory.kernels import OBJECTIVE
from fastrl.memory.ledger import Ledger
from fastrl.memory.model import MetaPolicy
from fastrl.memory.passes import Work, pass_on_meta
from fastrl.memory.refusals import layer_named
from fastrl.memory.rig import MetaLearner, watch_gradients
from fastrl.memory.timeline import Timeline
from fastrl.methods.coefficients import Coefficients
from fastrl.methods.needs import estimates_from_tokens, looks_past_tokens, needs_view
from fastrl.methods.record import Method
from fastrl.packing import PackedPass
from fastrl.phases import Prepared, ValueTerms
from fastrl.reference import Reference
from fastrl_kernels.head import accumulation_dtype
from fastrl_kernels.plan import explain, meant_device

Place = Literal["only", "first", "last"]
"""Of a pass in its step: alone, with others after it, or after others that have left gradients."""


class Rig(NamedTuple):
    """All that a step runs, on "meta"."""

    config: Config
    method: Method
    device: str  # "cpu" or "cuda", which it stands for
    policy: MetaPolicy
    critic: Critic | None
    reference: Reference | None


class Program(NamedTuple):
    """What a step does whatever the size of its passes: timelines of one program are alike."""

    optimizer: str
    in_backward: str
    place: Place
    reference: str | None
    follows: bool
    measures: bool
    estimates: bool
    has_entropy: bool
    has_values: bool
    has_parts: bool
    engine: str
    selects_rows: bool
    num_chunks: tuple[int, ...]
    has_mixers: bool
    """Whether layers mix tokens otherwise than by attention."""


def program_of(rig: Rig, work: Work, place: Place) -> Program:
    """That of `recorded`."""
    config, method, policy = rig.config, rig.method, rig.policy
    token = meant_device.set(rig.device)
    head, dtype = policy.lm_head, policy.head_dtype
    hidden = torch.empty(
        work.num_rows, head.weight.shape[1], dtype=dtype, device="meta", requires_grad=True
    )
    engine = explain(hidden, head, workspace_mb=work.workspace_mb).engine
    meant_device.reset(token)
    size = config.model.mlp_chunk_size
    counts = (work.num_tokens, work.num_needed) if size else ()
    return Program(
        config.optim.optimizer, config.optim.in_backward, place,
        config.model.reference if rig.reference is not None else None,
        method.reference_update is not None or config.warm_start.steps > 0,
        measures(method), estimates_from_tokens(method), method.entropy_coef != 0,
        method.value_loss is not None, config.num_mini_batches > 1, engine,
        work.num_needed <= (1 - MIN_SAVED) * work.num_tokens,
        tuple(-(-count // size) for count in counts),
        bool(calls_of_mixers(policy.model)),
    )  # fmt: skip


def measures(method: Method) -> bool:
    """Whether the first update of a step looks at its tokens before its backward pass."""
    if estimates_from_tokens(method):
        return True
    return needs_view(method) if method.ratio_to_sampler else looks_past_tokens(method)


def recorded(rig: Rig, work: Work, place: Place) -> Timeline:
    """A step, as far as one of its passes."""
    ledger = Ledger(
        rig.device, num_tokens=work.num_tokens, num_needed=work.num_needed, segments=work.segments
    )
    learner = MetaLearner(rig.config, rig.policy, rig.critic, device=rig.device, ledger=ledger)
    dtype = accumulation_dtype(rig.policy.head_dtype)
    item = pass_on_meta(work, has_reference=rig.reference is not None, dtype=dtype)
    hooks = watch_gradients(ledger, learner, rig.policy)
    token = meant_device.set(rig.device)
    models = [rig.policy.model, *([rig.critic.body] if isinstance(rig.critic, ModelCritic) else [])]
    casts = casts_in(*models) if rig.policy.bf16 else contextlib.nullcontext()
    try:
        with layer_named(rig.policy.model), casts, ledger:
            _step(rig, learner, item, ledger, place)
    finally:
        meant_device.reset(token)
        for hook in hooks:
            hook.remove()
    return ledger.recording.timeline()


def _step(rig: Rig, learner: MetaLearner, item: PackedPass, ledger: Ledger, place: Place) -> None:
    config, method, policy = rig.config, rig.method, rig.policy
    temperature, workspace_mb = config.rollout.temperature, config.workspace_mb
    num_passes = 1 if place == "only" else 2
    ledger.mark("score")
    if rig.reference is not None:
        token_statistics(rig.reference, item.plan, temperature, workspace_mb=workspace_mb)
    hidden = None
    if measures(method) or config.num_mini_batches > 1:
        keeps_graph = not (
            num_passes > 1 or config.num_mini_batches > 1
            or learner.stepper.runs_backward_twice(num_passes)
        )  # fmt: skip
        critic = rig.critic if estimates_from_tokens(method) else None
        found = measure(
            policy, [item], temperature, critic=critic, keeps_graph=keeps_graph,
            workspace_mb=workspace_mb,
        )  # fmt: skip
        hidden = found.hidden_states
        del found
    ledger.mark("update")
    backward = PassBackward(
        policy, _ready(rig, item), temperature, hidden, critic=rig.critic,
        value_choice=method.value_loss, workspace_mb=workspace_mb,
    )  # fmt: skip
    del hidden

    def run(index: int) -> None:
        if place == "last" and index == 0:
            _leave_gradients(learner, ledger)
        if index == (place == "last"):
            backward(0)
        if index == num_passes - 1 and config.optim.in_backward == "off":
            ledger.mark("step")

    learner.step(num_passes, run, trains_policy=True)


def _ready(rig: Rig, item: PackedPass) -> Prepared:
    numbers = item.batch.advantages
    method = rig.method
    coefficients = Coefficients(
        OBJECTIVE, numbers, item.batch.token_weights, None, method.entropy_coef
    )
    values = (ValueTerms(numbers, numbers, numbers),) if rig.critic is not None else ()
    return Prepared([item], [coefficients], None, None, values)


def _leave_gradients(learner: MetaLearner, ledger: Ledger) -> None:
    """What the passes before the last leave behind."""
    for parameter in learner.trained:
        parameter.grad = torch.empty_like(parameter)
        ledger.tag(parameter.grad, "gradients")
