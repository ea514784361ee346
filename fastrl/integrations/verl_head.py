"""The forward pass that verl's fused kernels ask for, with log-probabilities from our head.

Legend: B rows, L their length (one row of all tokens where verl removes padding), D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from fastrl.errors import InputError
from fastrl.integrations.capabilities import decoder_of, without_wrappers
from fastrl.integrations.replaced_forward import replace_forward
from fastrl_kernels import LMHead, linear_logps

ONE: dict[str, tuple[Any, ...]] = {
    "logits_to_keep": (0,),
    "past_key_values": (),
    "inputs_embeds": (),
}
"""Arguments that a fused call takes only with these values, or None."""
EXTRA = ("temperature", "shift_labels")
"""Arguments of a fused call that the model itself does not know."""


def use_fused_head(model: Any, *, workspace_mb: float = 256) -> None:
    """Give a causal language model the forward pass that verl expects of fused kernels.

    A call with `temperature`, as verl makes it with use_fused_kernels, answers log_probs and
    entropy (B, L) in float32 in verl's CausalLMOutputForPPO; any other call is the model's own.
    Log-probabilities are of softmax(logits / temperature) with all that the head has: bias, scale,
    softcap, adapter. They are zero where attention_mask is. temperature: a number, or a tensor of
    shape (), (B,) or (B, L). shift_labels (B, L) are the targets; without them it is labels, or
    input_ids, rolled by one. workspace_mb: MiB at the head.

    model: of transformers, PEFT-wrapped or not, before FSDP wraps it. Undone by
    `fastrl.integrations.replaced_forward.restore_forward`. Raises InputError for models of images,
    for which verl has its own forward passes, and for one whose forward is replaced already.
    """
    base = without_wrappers(model)
    if not isinstance(base, PreTrainedModel):
        raise InputError(
            f"expected a transformers model with a language-model head, got {type(base).__name__}; "
            "use the fused head before FSDP or DistributedDataParallel wraps the model"
        )
    if base.config.get_text_config() is not base.config or base.config.is_encoder_decoder:
        raise InputError(
            f"the fused head is for causal language models of text, got {type(base).__name__}; set "
            "fused_kernel_options.impl_backend=torch, verl's own, for this one"
        )
    _check_whole(base.get_output_embeddings())
    try:
        LMHead.from_model(base)
    except ValueError as error:
        raise InputError(f"{type(base).__name__} cannot use the fused head: {error}") from error
    replace_forward(base, FusedForward(workspace_mb), extra=EXTRA)


class FusedForward:
    """Takes the place of a model's forward; knows nothing of the model."""

    def __init__(self, workspace_mb: float) -> None:
        self.workspace_mb = workspace_mb

    def __call__(self, model: Any, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("temperature") is None:
            given = {name: value for name, value in kwargs.items() if name not in EXTRA}
            if kwargs.get("shift_labels") is not None:
                raise InputError("shift_labels are for a fused forward pass; give temperature too")
            return original(*args, **given)
        output: Any = import_module("verl.models.transformers.dense_common").CausalLMOutputForPPO
        call = _read_call(args, kwargs)
        outputs = decoder_of(model)(**call.decoder_kwargs)
        rows = call.rows()
        states = outputs.last_hidden_state.flatten(0, 1)
        found = _at_head(
            model, states if rows is None else states[rows], call.taken(call.targets, rows),
            call.taken(call.temperatures, rows), self.workspace_mb,
        )  # fmt: skip
        return output(
            log_probs=call.table(found[0], rows),
            entropy=call.table(found[1], rows),
            past_key_values=outputs.get("past_key_values"),
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
        )


class _Call(NamedTuple):
    """What verl asks of a fused forward pass."""

    decoder_kwargs: dict[str, Any]
    targets: Tensor  # (B, L)
    temperatures: Tensor | float  # (B, L)

    def rows(self) -> Tensor | None:
        """(S,) positions of a flat table that are no padding; None for all of them."""
        mask = self.decoder_kwargs.get("attention_mask")
        if mask is None or mask.dim() != 2:
            return None
        return mask.flatten().nonzero().squeeze(1)

    def taken(self, table: Any, rows: Tensor | None) -> Any:
        """Of those positions; a number stays one."""
        if not isinstance(table, Tensor):
            return table
        return table.flatten() if rows is None else table.flatten()[rows]

    def table(self, values: Tensor, rows: Tensor | None) -> Tensor:
        """(B, L) of values of those positions, zero elsewhere."""
        if rows is not None:
            values = values.new_zeros(self.targets.numel()).index_put((rows,), values)
        # Not a view: FSDP2 warns of those, as an operation in place would undo its hooks.
        return values.view(self.targets.shape).clone()


def _read_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call:
    if args:
        raise InputError("a fused forward pass takes input_ids and all else by name, as verl does")
    given = dict(kwargs)
    temperature, targets = given.pop("temperature"), given.pop("shift_labels", None)
    labels, input_ids = given.pop("labels", None), given.get("input_ids")
    for name, values in ONE.items():
        value = given.get(name)
        if isinstance(value, Tensor) or value not in (None, *values):
            raise InputError(f"a fused forward pass has no {name}; leave it out")
    given.pop("logits_to_keep", None)
    if given.pop("return_dict", True) is False:
        raise InputError("a fused forward pass needs return_dict=True")
    if input_ids is None:
        raise InputError("a fused forward pass needs input_ids (B, L)")
    if targets is None:
        targets = torch.roll(input_ids if labels is None else labels, shifts=-1, dims=-1)
    if targets.shape != input_ids.shape:
        raise InputError(
            f"shift_labels must have the shape of input_ids, {tuple(input_ids.shape)}, got "
            f"{tuple(targets.shape)}"
        )
    return _Call(given, targets.long(), _temperatures(temperature, input_ids.shape))


def _temperatures(temperature: Any, shape: torch.Size) -> Tensor | float:
    """A number, or (B, L)."""
    if not isinstance(temperature, Tensor):
        return float(temperature)
    values = temperature.detach().float()
    if values.dim() == 1 and len(values) == shape[0]:
        values = values[:, None]
    if values.dim() not in (0, 2):
        raise InputError(
            f"temperature must be a number or of shape (), ({shape[0]},) or {tuple(shape)}, got "
            f"{tuple(temperature.shape)}"
        )
    return values.expand(shape)


def _at_head(
    model: Any, states: Tensor, targets: Tensor, temperature: Any, workspace_mb: float
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies (S,), computed where the model would compute logits.

    FSDP gathers a layer's weight when the layer is called and frees it again: verl shards an
    untied head by itself, and its weight is whole in no other place.
    """

    def forward(states: Tensor) -> tuple[Tensor, Tensor]:
        _check_whole(layer)
        head = LMHead.from_model(model)
        # As nn.Linear under autocast, which is given either.
        states = states.to(head.weight.dtype)
        out = linear_logps(
            states, head, targets, temperature=temperature, workspace_mb=workspace_mb
        )
        return out.logps, out.entropies

    layer = model.get_output_embeddings()
    with _in_place_of_forward(layer, forward):
        return layer(states)


def _check_whole(layer: Any) -> None:
    """Refuse a shard of the head, which tensor parallelism leaves one."""
    if isinstance(getattr(layer, "weight", None), DTensor):
        raise InputError(
            "the fused head needs the head's whole weight, got a shard; use it before FSDP wraps "
            "the model, and verl's own path (use_fused_kernels=False) with tensor parallelism"
        )


@contextmanager
def _in_place_of_forward(layer: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    previous = layer.__dict__.get("forward")
    object.__setattr__(layer, "forward", forward)
    try:
        yield
    finally:
        if previous is None:
            object.__delattr__(layer, "forward")
        else:
            object.__setattr__(layer, "forward", previous)
