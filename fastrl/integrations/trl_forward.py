"""What a model answers when a TRL trainer asks it for log-probabilities.

All of TRL's trainers ask at one place: `model(..., labels=labels, fused_lm_head=True)` gives tables
of numbers of every labelled token, from which TRL computes its loss and its metrics. Here the same
tables come from packed rows in which equal prompts stand once, and no logits are kept.

Legend: B sequences, L their padded length, S labelled tokens, D hidden, V vocabulary. Tables are
(B, L - 1): column t is the token at t + 1.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrl.errors import InputError
from fastrl.integrations.head_rows import HeadRows, RowMaker, table_of
from fastrl.integrations.trl_mean_logits import mean_logits
from fastrl.integrations.trl_one_pass import OnePass

CALL = "fastrl_call"
"""Keyword argument under which a trainer says what it knows of a call beforehand."""
WITHOUT_EFFECT = ("use_cache", "output_router_logits", "return_dict")
"""Keyword arguments of a forward pass that leave hidden states alone where they are false."""
ROUTERS = (
    "the routers' load-balancing loss is over all rows, and TRL's own forward pass computes it; "
    "router_aux_loss_coef=0 turns it off"
)


class Call(NamedTuple):
    """What is known of a batch before its forward pass."""

    idle: Tensor | None = None  # (B,) bool: no token of the sequence can have a gradient
    one_pass: OnePass | None = None  # the loss itself, where gradients need nothing else


class Answer(NamedTuple):
    """Numbers of S labelled tokens; a loss where the call had one."""

    places: Tensor  # (S,) in a flattened (B, L - 1) table
    logps: Tensor
    entropies: Tensor
    sum_p2: Tensor | None
    is_top1: Tensor | None
    mean_logits: Tensor | None
    loss: Tensor | None = None


class FusedForward:
    """Answers calls with `fused_lm_head=True` of one model of a trainer."""

    def __init__(
        self, make_rows: RowMaker, *, temperature: float, wants_statistics: bool,
        workspace_mb: float, may_accumulate: bool,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:  # fmt: skip
        """wants_statistics: besides log-probabilities and entropies the other fields of TRL's
        output. may_accumulate: nobody but the optimizer waits for the gradient of the head.
        """
        self.temperature = temperature
        self.wants_statistics = wants_statistics
        self.workspace_mb = workspace_mb
        self.may_accumulate = may_accumulate
        self.autocast = autocast
        self.make_rows = make_rows

    def __call__(
        self, model: Any, *, input_ids: Tensor | None, labels: Tensor,
        attention_mask: Tensor | None = None, num_items_in_batch: Any = None,
        fastrl_call: Call | None = None, **kwargs: Any,
    ) -> Any:  # fmt: skip
        """TRL's FusedCausalLMOutput; its loss is that of the call where the call has one."""
        from trl.trainer.utils import FusedCausalLMOutput

        if input_ids is None or kwargs.get("shift_labels") is not None:
            raise InputError(
                "expected input_ids and labels of whole sequences, got input embeddings or "
                "shift_labels (context or sequence parallelism, learnt prompts); use TRL's trainer"
            )
        call = fastrl_call or Call()
        with self.autocast():
            answer = self._answer(model, input_ids, attention_mask, labels, call, kwargs)
        shape = (labels.shape[0], labels.shape[1] - 1)

        def table(values: Tensor | None) -> Tensor | None:
            return None if values is None else table_of(values, answer.places, shape)

        mask = labels[:, 1:] >= 0
        loss = answer.loss
        if loss is None:
            items = mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
            loss = -answer.logps.sum() / items
        sum_p2 = None if answer.sum_p2 is None else answer.sum_p2.log()
        return FusedCausalLMOutput(
            loss=loss, log_probs=table(answer.logps), entropy=table(answer.entropies),
            log_sum_sq_probs=table(sum_p2), mean_logits=table(answer.mean_logits),
            is_top1=table(answer.is_top1), label_mask=mask,
        )  # fmt: skip

    def _answer(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor,
        call: Call, kwargs: dict[str, Any],
    ) -> Answer:  # fmt: skip
        given = {
            name: value
            for name, value in kwargs.items()
            if value is not None and (value is not False or name not in WITHOUT_EFFECT)
        }
        batch = (input_ids, attention_mask, labels)
        if call.idle is None or given or not torch.is_grad_enabled():
            rows = self.make_rows(model, *batch, **given)
            return self._at_head(rows, rows.places, call.one_pass)
        learning, idle = (~call.idle).nonzero()[:, 0], call.idle.nonzero()[:, 0]
        if not idle.numel():
            rows = self.make_rows(model, *batch)
            return self._at_head(rows, rows.places, call.one_pass)
        with torch.no_grad():
            rows = self.make_rows(model, *_rows_of(batch, idle))
            unlearnt = self._at_head(rows, places_in_batch(rows, idle), None)
        rows = self.make_rows(model, *_rows_of(batch, learning))
        learnt = self._at_head(rows, places_in_batch(rows, learning), call.one_pass)
        return _joined(learnt, unlearnt)

    def _at_head(self, rows: HeadRows, places: Tensor, one_pass: OnePass | None) -> Answer:
        """places: of the rows' tokens in a table of the whole batch."""
        settings = {"temperature": self.temperature, "workspace_mb": self.workspace_mb}
        weight = self._accumulating_weight(rows)
        if one_pass is not None:
            # The engine has a gradient of its own; the first of a step becomes weight.grad itself.
            accumulates = weight is not None and weight.grad is not None
            found = one_pass.run(rows, places, accumulate_grad=accumulates, **settings)
            return Answer(places, found.logps, found.entropies, None, None, None, found.loss)
        out = rows.linear_logps(accumulate_grad=weight is not None, **settings)
        if not self.wants_statistics:
            return Answer(places, out.logps, out.entropies, None, None, None)
        return Answer(
            places, out.logps, out.entropies, out.sum_p2, out.argmax_ids == rows.target_ids,
            mean_logits(rows.hidden_states, rows.lm_head, **settings),
        )  # fmt: skip

    def _accumulating_weight(self, rows: HeadRows) -> Tensor | None:
        """The head's weight, if backward may add the gradient into its `grad` past all hooks."""
        weight = rows.lm_head.weight
        if (
            not self.may_accumulate
            or not torch.is_grad_enabled()
            or not isinstance(weight, Tensor)
            or not (weight.requires_grad and weight.is_leaf)
            or weight._backward_hooks
            or getattr(weight, "_post_accumulate_grad_hooks", None)
        ):
            return None
        return weight


def install(model: Any, answers: FusedForward) -> None:
    """Let `answers` have the calls of a model, patched by TRL, that ask for log-probabilities.

    Calls that need the routers' losses stay with TRL, as all others do.
    """
    theirs = model.forward

    # TRL's own way, too: `generate` looks at the signature.
    @functools.wraps(type(model).forward)
    def forward(self: Any, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return theirs(*args, **kwargs)
        wants_routers = getattr(self.config.get_text_config(), "output_router_logits", False)
        if kwargs.get("output_router_logits", wants_routers):
            answers.make_rows.fall_back(ROUTERS)
            kwargs.pop(CALL, None)
            return theirs(*args, fused_lm_head=True, **kwargs)
        assert not args  # TRL names everything
        return answers(self, **kwargs)

    model.forward = MethodType(forward, model)


def places_in_batch(rows: HeadRows, row_ids: Tensor) -> Tensor:
    """(S,) places in a table of the batch that these rows of it, (b,) int64, were taken from."""
    length = rows.shape[1]
    return row_ids[rows.places // length] * length + rows.places % length


def _rows_of(
    batch: tuple[Tensor, Tensor | None, Tensor], row_ids: Tensor
) -> tuple[Tensor, Tensor | None, Tensor]:
    input_ids, attention_mask, labels = batch
    mask = None if attention_mask is None else attention_mask[row_ids]
    return input_ids[row_ids], mask, labels[row_ids]


def _joined(learnt: Answer, unlearnt: Answer) -> Answer:
    """Two parts of one batch; the loss is the first's."""

    def join(a: Tensor | None, b: Tensor | None) -> Tensor | None:
        return None if a is None or b is None else torch.cat((a, b))

    *columns, loss = learnt
    return Answer._make([*map(join, columns, unlearnt[:-1]), loss])
