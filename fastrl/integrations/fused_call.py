"""A call with labels of a model that `fuse` has changed: what it may ask for.

Legend: B sequences, L their padded length.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastrl.errors import InputError

ONLY: dict[str, tuple[Any, ...]] = {
    "use_cache": (None, False),
    "return_dict": (None, True),
    "logits_to_keep": (None, 0),
    "output_attentions": (None, False),
    "output_hidden_states": (None, False),
    "output_router_logits": (None, False),
    "past_key_values": (None,),
    "inputs_embeds": (None,),
    "fused_lm_head": (None, False),
}
"""Arguments that a call with labels takes with these values alone."""
PADDING_FREE = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}
"""What attention layers take beside what a model's body names: of rows with several sequences."""


@dataclass(frozen=True)
class FusedCall:
    """A call with labels, as `head_rows` takes it."""

    input_ids: Tensor  # (B, L)
    attention_mask: Tensor | None  # (B, L)
    labels: Tensor  # (B, L), not shifted
    model_kwargs: dict[str, Any]
    num_items: Tensor | int | None
    num_columns: int  # of the tables of results


@torch.compiler.disable
def read_call(model: Any, arguments: dict[str, Any]) -> FusedCall:
    """The arguments of a call by name; InputError for what gives no log-probabilities."""
    _check_config(model)
    given = {name: value for name, value in arguments.items() if value is not None}
    if "labels" in given and "target_ids" in given:
        raise InputError(
            "got both labels and target_ids; give labels as input_ids has them, or target_ids "
            "shifted by one"
        )
    input_ids, mask = given.pop("input_ids", None), given.pop("attention_mask", None)
    labels, target_ids = given.pop("labels", None), given.pop("target_ids", None)
    num_items = given.pop("num_items_in_batch", None)
    model_kwargs = _model_kwargs(model, given)
    if input_ids is None:
        raise InputError("a fused model needs input_ids beside labels, got none")
    _check_shapes(input_ids, mask, labels if target_ids is None else target_ids)
    if target_ids is None:
        num_columns = input_ids.shape[1] - 1
    else:
        num_columns = input_ids.shape[1]
        labels = pad(target_ids, (1, 0), value=-100)
        if bool((labels[:, -1] >= 0).any()):  # the token after the last one
            input_ids, mask, model_kwargs = _one_more(input_ids, mask, model_kwargs, labels[:, -1:])
        labels = labels[:, : input_ids.shape[1]]
    return FusedCall(input_ids, mask, labels, model_kwargs, num_items, num_columns)


def _one_more(
    input_ids: Tensor, mask: Tensor | None, model_kwargs: dict[str, Any], last: Tensor
) -> tuple[Tensor, Tensor | None, dict[str, Any]]:
    """The batch with a column for the last target, which is predicted but read by nothing."""
    if mask is not None:
        mask = torch.cat([mask, (last >= 0).to(mask.dtype)], 1)
    model_kwargs = {
        name: torch.cat([value, value[:, -1:]], 1)
        if isinstance(value, Tensor) and value.shape == input_ids.shape
        else value
        for name, value in model_kwargs.items()
    }
    return torch.cat([input_ids, last.clamp(min=0)], 1), mask, model_kwargs


def _check_shapes(input_ids: Tensor, mask: Tensor | None, labels: Tensor) -> None:
    shapes = [
        tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        for x in (input_ids, labels, mask)
        if x is not None
    ]
    if input_ids.dim() != 2 or len(set(shapes)) > 1:
        raise InputError(
            "a fused model takes input_ids, labels or target_ids and attention_mask of one shape "
            f"(B, L), got {', '.join(map(str, shapes))}"
        )


def _check_config(model: Any) -> None:
    """Refuse what a model's config or adapters would add to the result of every call."""
    configs = {id(config): config for config in (model.config, model.config.get_text_config())}
    for config in configs.values():
        for name in ("output_attentions", "output_hidden_states", "output_router_logits"):
            if getattr(config, name, False):
                raise InputError(
                    f"config.{name} asks a fused model for more than log-probabilities; set it to "
                    "False, or unfuse the model"
                )
        if getattr(config, "return_dict", True) is False:
            raise InputError("config.return_dict=False asks for tuples; a fused model gives none")
    for adapter in getattr(model, "peft_config", {}).values():
        if getattr(adapter, "alora_invocation_tokens", None):
            raise InputError(
                "an activated LoRA (alora_invocation_tokens) finds its place in rows that a fused "
                "model does not keep; use plain LoRA"
            )


def _model_kwargs(model: Any, given: dict[str, Any]) -> dict[str, Any]:
    """What goes on to the body of the model; InputError for what goes nowhere."""
    for name, allowed in ONLY.items():
        value = given.pop(name, None)
        if isinstance(value, Tensor) or value not in allowed:
            raise InputError(
                f"a fused model does not take {name} beside labels, got {_short(value)}; leave it "
                "out, or unfuse the model"
            )
    known = inspect.signature(model.base_model.forward).parameters.keys() | PADDING_FREE
    unknown = sorted(given.keys() - known)
    if unknown:
        raise InputError(
            f"a fused model does not take {', '.join(unknown)} beside labels; leave it out"
            + ("; shifted labels are target_ids" if "shift_labels" in unknown else "")
        )
    return given


def _short(value: Any) -> str:
    return repr(value) if isinstance(value, bool | int | float | str) else type(value).__name__
