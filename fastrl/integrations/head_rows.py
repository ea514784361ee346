"""From a padded batch, as other trainers hold it, to the rows of its trained tokens at the head.

Legend: B sequences, L their padded length, S trained tokens, D hidden, V vocabulary. A table is
(B, L - 1): its column t is the token at t + 1, as log-probabilities of a shifted batch are.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastrl.errors import InputError
from fastrl.integrations.capabilities import LeakError, check_model, without_wrappers
from fastrl.integrations.padding import PositionsOfPadding
from fastrl.packing import Plan, pack
from fastrl.precision import head_in_dtype
from fastrl_kernels import LinearLogps, LMHead, PolicyLoss, linear_logps, policy_loss
from fastrl_kernels.shared_rows import select_rows


@dataclass(frozen=True)
class HeadRows:
    """Hidden states that predict the trained tokens of a batch, and the head they go through."""

    hidden_states: Tensor  # (S, D), in the dtype of the head
    lm_head: LMHead
    target_ids: Tensor  # (S,) int64
    places: Tensor  # (S,) int64: of each trained token in a flattened table
    shape: tuple[int, int]  # (B, L - 1)

    def table(self, values: Tensor) -> Tensor:
        """(S,) values as a (B, L - 1) table with zeros elsewhere; differentiable."""
        return table_of(values, self.places, self.shape)

    def tokens(self, table: Tensor) -> Tensor:
        """The (S,) values of a (B, L - 1) table that belong to trained tokens."""
        return table.reshape(-1)[self.places]

    def linear_logps(self, **settings: Any) -> LinearLogps:
        """`linear_logps` of these rows, outside of autocast, whose sums would be rounded."""
        with torch.autocast(self.hidden_states.device.type, enabled=False):
            return linear_logps(self.hidden_states, self.lm_head, self.target_ids, **settings)

    def policy_loss(self, advantages: Tensor, token_weights: Tensor, **settings: Any) -> PolicyLoss:
        """`policy_loss` of these rows with (S,) advantages and weights, outside of autocast."""
        with torch.autocast(self.hidden_states.device.type, enabled=False):
            return policy_loss(
                self.hidden_states, self.lm_head, self.target_ids, advantages, token_weights,
                **settings,
            )  # fmt: skip


def table_of(values: Tensor, places: Tensor, shape: tuple[int, int]) -> Tensor:
    """(S,) values at their places in a flattened table, zeros elsewhere; differentiable."""
    return values.new_zeros(shape[0] * shape[1]).index_copy(0, places, values).view(shape)


def head_rows(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor, *,
    share_prefixes: bool = True, **model_kwargs: Any,
) -> HeadRows:  # fmt: skip
    """Run the layers of a causal language model for the trained tokens of a padded batch.

    input_ids (B, L) int64; attention_mask (B, L), 0 for padding on either side, None for none;
    labels (B, L): the token ids where they are trained, negative elsewhere, not shifted; what is
    predicted in a packed row is input_ids. model: a
    transformers model with a head, PEFT-wrapped or not. Hidden states have a gradient, also where
    nothing is trained (S = 0). Within an autocast block the head is in the block's dtype too.

    share_prefixes: what stands before a sequence's first label is its prompt, and equal prompts
    stand once in one packed row without padding; sequences without labels are not there at all.
    Raises InputError or LeakError where the model does not allow that. Otherwise the layers run on
    the padded batch, with model_kwargs.
    """
    _check_batch(input_ids, attention_mask, labels)
    if not share_prefixes:
        return _padded(model, input_ids, attention_mask, labels, model_kwargs)
    if model_kwargs:
        raise InputError(f"a packed row has no place for {', '.join(model_kwargs)}; leave it out")
    layout = _lay_out(input_ids, attention_mask, labels)
    if layout is not None:
        return _shared(model, layout, (input_ids.shape[0], input_ids.shape[1] - 1))
    # One token keeps the result connected to the model.
    found = _padded(model, input_ids[:1, :2], None, labels.new_full((1, 2), -100), {})
    return HeadRows(
        found.hidden_states, found.lm_head, found.target_ids, found.places,
        (input_ids.shape[0], input_ids.shape[1] - 1),
    )  # fmt: skip


class RowMaker:
    """`head_rows` with shared prompts where the model and the call allow it, padded rows elsewhere.

    The first call of each kind that does not says so in a warning, or raises InputError if
    `strict`.
    """

    def __init__(self, *, strict: bool = False) -> None:
        self.strict = strict
        self._reasons: set[str] = set()
        self._positions = PositionsOfPadding()

    def __call__(
        self, model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor,
        **model_kwargs: Any,
    ) -> HeadRows:  # fmt: skip
        """As `head_rows`; model_kwargs of None count as not given."""
        given = {name: value for name, value in model_kwargs.items() if value is not None}
        reason = why_not_shared(model, given)
        reason = reason or self._positions.reason(model, input_ids, attention_mask)
        if reason is None:
            try:
                return head_rows(model, input_ids, attention_mask, labels)
            except LeakError as error:  # shows only while the model runs
                reason = str(error)
        self.fall_back(reason)
        return head_rows(model, input_ids, attention_mask, labels, share_prefixes=False, **given)

    def fall_back(self, reason: str) -> None:
        """Warn that rows are padded, once for each reason; InputError if strict."""
        if self.strict:
            raise InputError(f"prompts cannot be shared: {reason}")
        if reason not in self._reasons:
            self._reasons.add(reason)
            warnings.warn(f"prompts are not shared, rows are padded: {reason}", stacklevel=4)


@torch.compiler.disable
def why_not_shared(model: nn.Module, model_kwargs: dict[str, Any]) -> str | None:
    """Why this model or what it is called with needs padded rows; None where prompts can be shared.

    Some models show it only while they run, by a LeakError.
    """
    if model_kwargs:
        return f"a packed row has no place for {', '.join(sorted(model_kwargs))}"
    try:
        check_model(without_wrappers(model))
    except InputError as error:
        return str(error)
    return None


def _check_batch(input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor) -> None:
    shapes = [tuple(x.shape) for x in (input_ids, attention_mask, labels) if x is not None]
    if len(shapes[0]) != 2 or shapes[0][1] < 2 or len(set(shapes)) > 1:
        raise InputError(
            "input_ids, attention_mask and labels must have one shape (B, L) with L of at least 2, "
            f"got {', '.join(map(str, shapes))}"
        )


class _Layout(NamedTuple):
    """A padded batch as one packed row."""

    plan: Plan
    places: Tensor  # (S,) int64


@torch.compiler.disable
def _lay_out(input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor) -> _Layout | None:
    """The sequences with labels, grouped by prompts; None where there are none."""
    device, length = input_ids.device, input_ids.shape[1]
    ids, trained = input_ids.cpu(), labels.cpu() >= 0
    trained[:, 0] = False  # nothing predicts it
    kept = torch.ones_like(trained) if attention_mask is None else attention_mask.cpu() != 0
    if bool((trained & ~kept).any()):
        raise InputError("labels include tokens that attention_mask leaves out; set them to -100")
    groups: dict[bytes, list[_Sequence]] = {}
    for row in trained.any(1).nonzero()[:, 0].tolist():
        positions = kept[row].nonzero()[:, 0]
        is_trained = trained[row, positions]
        first, *_, last = is_trained.nonzero()[:, 0].tolist() * 2
        if first == 0:
            raise InputError(
                f"the first token of sequence {row} is trained, but nothing predicts it; set its "
                "label to -100"
            )
        tokens, end = ids[row, positions], last + 1
        sequence = _Sequence(
            tokens[:first], tokens[first:end], is_trained[first:end],
            row * (length - 1) + positions[first:end] - 1,
        )  # fmt: skip
        groups.setdefault(tokens[:first].numpy().tobytes(), []).append(sequence)
    if not groups:
        return None
    plan = pack(
        [group[0].prompt for group in groups.values()],
        [[sequence.completion for sequence in group] for group in groups.values()],
    )
    sequences = [sequence for group in groups.values() for sequence in group]
    is_trained = torch.cat([sequence.is_trained for sequence in sequences])
    places = torch.cat([sequence.places for sequence in sequences])
    if not bool(is_trained.all()):
        plan, places = plan.keep_tokens(is_trained), places[is_trained]
    return _Layout(plan.to(device), places.to(device))


class _Sequence(NamedTuple):
    """One sequence up to its last label, without padding."""

    prompt: Tensor  # before the first label
    completion: Tensor
    is_trained: Tensor  # of each of the completion's tokens
    places: Tensor  # of the completion's tokens in a flattened table


def _shared(model: nn.Module, layout: _Layout, shape: tuple[int, int]) -> HeadRows:
    body: Any = without_wrappers(model).base_model
    with layout.plan.attach(model, source_rows_only=True):
        hidden = body(**layout.plan.inputs).last_hidden_state[0]
    return _at_head(
        model,
        select_rows(hidden, layout.plan.source_index),
        layout.plan.target_ids,
        layout.places,
        shape,
    )


def _padded(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor,
    model_kwargs: dict[str, Any],
) -> HeadRows:  # fmt: skip
    body: Any = without_wrappers(model).base_model
    hidden = body(
        input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **model_kwargs
    ).last_hidden_state
    targets = labels[:, 1:].reshape(-1)
    places = (targets >= 0).nonzero()[:, 0]
    rows, length = hidden.shape[0], hidden.shape[1] - 1
    states = hidden[:, :-1].reshape(rows * length, -1)[places]
    return _at_head(model, states, targets[places], places, (rows, length))


def _at_head(
    model: nn.Module, hidden_states: Tensor, target_ids: Tensor, places: Tensor,
    shape: tuple[int, int],
) -> HeadRows:  # fmt: skip
    head, device = LMHead.from_model(without_wrappers(model)), hidden_states.device.type
    if torch.is_autocast_enabled(device) and head.weight.dtype == torch.float32:
        head = head_in_dtype(head, torch.get_autocast_dtype(device))
    return HeadRows(hidden_states.to(head.weight.dtype), head, target_ids, places, shape)
