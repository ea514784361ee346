"""TRL's trainers with FastRL's forward and backward passes: same arguments, metrics, checkpoints.

What is replaced is how a trainer gets log-probabilities and gradients; generation, rewards,
advantages, the losses themselves and all logging are TRL's own code.
"""

from __future__ import annotations

import functools
import inspect
from contextlib import nullcontext
from typing import Any

import torch

from fastrl.errors import InputError
from fastrl.integrations.head_rows import RowMaker
from fastrl.integrations.trl_batches import apart, can_regroup, regrouped, without_gradient
from fastrl.integrations.trl_checks import base_of, check_trainer, check_version
from fastrl.integrations.trl_forward import CALL, Call, FusedForward, install
from fastrl.integrations.trl_one_pass import one_pass_of

LOSS = ("_compute_loss", "_get_per_token_logps_and_entropies")
"""Methods that must be TRL's own for the loss to be known before it is computed."""
ACCELERATED = "_fastrl_forward"


def accelerate_trl(
    trainer: Any, *, strict: bool = False, workspace_mb: float = 256, regroup: bool = True
) -> Any:
    """The same trainer, whose model now gives log-probabilities and gradients by FastRL's kernels.

    trainer: TRL's GRPOTrainer, RLOOTrainer or DPOTrainer, or a subclass, before or between calls of
    `train`. Equal prompts of a micro-batch stand once; no logits are kept; completions without a
    gradient have a forward pass alone; GRPO losses whose tokens do not depend on each other get
    their gradients in one pass over the head, all others through TRL's own loss.

    strict: raise where rows would have to be padded, which otherwise is one warning with the
    reason. workspace_mb: MiB of logits and sums alive at the head. regroup: within one optimizer
    step completions of a prompt come into the same micro-batch, wherever the step's gradient stays
    the same; what TRL logs per micro-batch then is of other micro-batches. Raises InputError
    for what cannot work.
    """
    check_version()
    base = base_of(trainer)
    if ACCELERATED in vars(trainer):
        raise InputError(
            f"this {type(trainer).__name__} is accelerated already; call accelerate_trl once, and "
            "not for FastRL's own classes"
        )
    check_trainer(trainer)
    is_own = _is_own(trainer, base, LOSS)
    _replace_forward(trainer, strict=strict, workspace_mb=workspace_mb)
    if base.__name__ == "DPOTrainer":
        return trainer
    if is_own:
        trainer._compute_loss = functools.partial(_loss, trainer, trainer._compute_loss)
        if regroup and can_regroup(trainer) and _is_own(trainer, base, ("compute_loss",)):
            trainer._prepare_inputs = functools.partial(_inputs, trainer, trainer._prepare_inputs)
    return trainer


def fast_trainer(name: str, base_name: str) -> type:
    """A subclass of one of TRL's trainers that accelerates itself."""
    check_version()
    import trl

    base: Any = getattr(trl, base_name)

    class FastTrainer(base):
        def __init__(
            self, *args: Any, strict: bool = False, workspace_mb: float = 256,
            regroup: bool = True, **kwargs: Any,
        ) -> None:  # fmt: skip
            super().__init__(*args, **kwargs)
            accelerate_trl(self, strict=strict, workspace_mb=workspace_mb, regroup=regroup)

    FastTrainer.__name__ = FastTrainer.__qualname__ = name
    FastTrainer.__module__ = "fastrl.integrations.trl"
    FastTrainer.__doc__ = (
        f"TRL's {base_name} with FastRL's forward and backward passes.\n\n"
        f"The arguments are those of {base_name}, and strict, workspace_mb and regroup of "
        "`accelerate_trl` as keywords."
    )
    # Editors and `help` show TRL's arguments before ours.
    theirs = list(inspect.signature(base.__init__).parameters.values())[1:]
    ours = inspect.signature(accelerate_trl).parameters.values()
    keywords = [item for item in ours if item.kind is item.KEYWORD_ONLY]
    FastTrainer.__signature__ = inspect.Signature([*theirs, *keywords])
    return FastTrainer


def _is_own(trainer: Any, base: type, methods: tuple[str, ...]) -> bool:
    """Whether these methods are those of TRL, not of a subclass."""
    return all(
        getattr(type(trainer), name) is getattr(base, name) and name not in vars(trainer)
        for name in methods
        if hasattr(base, name)
    )


def _replace_forward(trainer: Any, *, strict: bool, workspace_mb: float) -> None:
    """Install a FusedForward in the policy and in the reference model."""
    accelerator = trainer.accelerator
    make_rows = RowMaker(strict=strict)
    is_alone = str(getattr(accelerator.distributed_type, "value", "")) == "NO"
    for model in (trainer.model, getattr(trainer, "ref_model", None)):
        if model is None:
            continue
        model = accelerator.unwrap_model(model)
        model = model.get_base_model() if hasattr(model, "peft_config") else model
        is_prepared = "_original_forward" in vars(model)
        answers = FusedForward(
            make_rows,
            temperature=getattr(trainer, "temperature", 1.0),
            wants_statistics=not hasattr(trainer, "temperature") and model is not trainer.ref_model,
            workspace_mb=workspace_mb,
            may_accumulate=is_alone,
            # The forward pass that accelerate wrapped in autocast is no longer called.
            autocast=accelerator.autocast if is_prepared else nullcontext,
        )
        install(model, answers)
    vars(trainer)[ACCELERATED] = make_rows


def _loss(trainer: Any, theirs: Any, model: Any, inputs: dict[str, Any]) -> Any:
    """TRL's loss of a batch, with its gradient.

    Where one pass gave the gradients, TRL's loss is computed from detached log-probabilities, and
    the loss of that pass stands in for it in backward.
    """
    if not torch.is_grad_enabled() or trainer.aux_loss_enabled:
        return theirs(model, inputs)
    one_pass = one_pass_of(trainer, inputs) if hasattr(trainer, "loss_type") else None
    asking = _Asking(model, Call(apart(without_gradient(trainer, inputs), inputs), one_pass))
    value = theirs(asking, inputs)
    if asking.loss is None:
        return value
    return value + (asking.loss - asking.loss.detach())


class _Asking:
    """A model that is told what is known of the batch, and keeps the loss that it answers with."""

    def __init__(self, model: Any, call: Call) -> None:
        self.model = model
        self.call = call
        self.loss: torch.Tensor | None = None

    def __call__(self, **kwargs: Any) -> Any:
        output = self.model(**kwargs, **{CALL: self.call})
        if self.call.one_pass is not None:
            self.loss = output.loss
        return output


def _inputs(trainer: Any, theirs: Any, generation_batch: Any) -> Any:
    """TRL's inputs of a micro-batch, from micro-batches that are regrouped when they are new."""
    before = trainer._buffered_inputs
    inputs = theirs(generation_batch)
    if trainer._buffered_inputs is before or not trainer.model.training:
        return inputs
    trainer._buffered_inputs = regrouped(
        trainer._buffered_inputs, trainer.args.gradient_accumulation_steps
    )
    return trainer._buffered_inputs[trainer._step % trainer.args.steps_per_generation]
