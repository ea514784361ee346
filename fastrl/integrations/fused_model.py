"""A causal language model whose forward gives log-probabilities of labels in place of logits.

Legend: B sequences, L their padded length.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from fastrl.errors import InputError
from fastrl.integrations.capabilities import without_wrappers
from fastrl.integrations.fused_call import read_call
from fastrl.integrations.fused_rows import FusedRows
from fastrl.integrations.head_rows import why_not_shared
from fastrl.integrations.replaced_forward import replace_forward, replaced_function, restore_forward
from fastrl_kernels import LMHead


@dataclass
class FusedOutput(ModelOutput):
    """What a fused model gives for labels; only `loss`, `logps` and `entropies`, no logits."""

    loss: Tensor | None = None
    """Mean of -logps over the labelled tokens, or their sum over num_items_in_batch."""
    logps: Tensor | None = None
    """(B, L - 1) for labels: column t is the label at t + 1. (B, L) for target_ids. float32."""
    entropies: Tensor | None = None
    """Of the distributions that the logps are from, of the same shape; zero without a label too."""


def fuse(
    model: Any, *, temperature: float = 1.0, workspace_mb: float = 256,
    share_prefixes: Literal["auto", False] = "auto", strict: bool = False,
) -> Any:  # fmt: skip
    """Let a causal language model give log-probabilities and entropies of labels, without logits.

    Changes the model in place and returns it. After it `model(input_ids, attention_mask, labels=)`
    is a `FusedOutput`, differentiable, whose loss is that of the model's own forward; without
    labels the forward is the model's own, so that it generates as before. `target_ids` (B, L) may
    stand for labels: already shifted, and with any token in the last column. Negative ones are
    ignored. A batch without labels has the loss 0. `unfuse` undoes it.

    temperature divides the logits, and the loss is then of that distribution. workspace_mb: MiB at
    the head. share_prefixes "auto": what stands before a sequence's first label is its prompt, and
    equal prompts of a batch are computed once, in one row without padding. Where the model class or
    an argument of the call (position_ids, images) does not allow that, rows are padded, and the
    first such call warns; `strict` makes it an InputError. False: rows are always padded.

    Works on a model that PEFT has wrapped or will wrap, under transformers.Trainer, accelerate and
    torch.compile, and with DistributedDataParallel around it afterwards. A copy or a pickle of a
    fused model is fused. Arguments that would need logits or a cache are refused beside labels. The
    first call compares a few tokens with the model's own forward, and raises InputError where its
    logits or its loss are not those of its head alone.

    A Trainer's predictions are logps and entropies. Its `use_liger_kernel` puts another forward in
    place of this one, and torch.nn.DataParallel calls it on one device only: use neither. Not
    tested: layers on several devices (device_map), FSDP and DeepSpeed.
    """
    base = _causal_model(model)
    if share_prefixes not in ("auto", False):
        raise InputError(
            f"share_prefixes must be 'auto' or False, got {share_prefixes!r}; strict=True raises "
            "where prompts cannot be shared"
        )
    if strict and not share_prefixes:
        raise InputError("strict=True asks for shared prompts, and share_prefixes=False for none")
    for name, value in (("temperature", temperature), ("workspace_mb", workspace_mb)):
        if not value > 0:
            raise InputError(f"{name} must be positive, got {value}")
    reason = why_not_shared(base, {}) if strict else None
    if reason is not None:
        raise InputError(f"prompts cannot be shared: {reason}")
    _check_base(base)
    rows = FusedRows(share_prefixes=bool(share_prefixes), strict=strict)
    replace_forward(base, FusedForward(temperature, workspace_mb, rows), extra=("target_ids",))
    return model


def unfuse(model: Any) -> Any:
    """Give a fused model the forward back that it had, and return the model."""
    base = _causal_model(model)
    if not isinstance(replaced_function(base), FusedForward):
        raise InputError(f"this {type(base).__name__} is not fused; there is nothing to undo")
    restore_forward(base)
    return model


def _causal_model(model: Any) -> PreTrainedModel:
    base = without_wrappers(model)
    if not isinstance(base, PreTrainedModel):
        inner = getattr(base, "module", None)
        hint = "fuse the model before it is wrapped" if isinstance(inner, nn.Module) else (
            "load one with AutoModelForCausalLM"
        )  # fmt: skip
        raise InputError(
            f"expected a transformers model with a language-model head, got {type(base).__name__}; "
            f"{hint}"
        )
    return base


def _check_base(base: PreTrainedModel) -> None:
    if base.config.is_encoder_decoder:
        raise InputError(
            f"{type(base).__name__} is an encoder with a decoder; only causal language models, "
            "whose labels are their input, can be fused"
        )
    if "_original_forward" in vars(base):  # its autocast would be passed by
        raise InputError(
            f"this {type(base).__name__} runs under accelerate's autocast; fuse it before "
            "accelerator.prepare"
        )
    try:
        LMHead.from_model(base)
    except ValueError as error:
        raise InputError(f"{type(base).__name__} cannot be fused: {error}") from error


class FusedForward:
    """Takes the place of a model's forward; has the settings of `fuse`, and nothing of a model."""

    def __init__(self, temperature: float, workspace_mb: float, rows: FusedRows) -> None:
        self.temperature = temperature
        self.workspace_mb = workspace_mb
        self.rows = rows

    def __call__(
        self, model: Any, original: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:  # fmt: skip
        """The model's own forward, or a FusedOutput where there are labels or target_ids."""
        arguments = _by_name(original, args, kwargs)
        has_labels = any(arguments.get(name) is not None for name in ("labels", "target_ids"))
        # TRL asks its own fused head for the loss where it has patched the model.
        if not has_labels or arguments.get("fused_lm_head"):
            kwargs.pop("target_ids", None)
            return original(*args, **kwargs)
        call = read_call(model, arguments)
        rows = self.rows.of_call(model, original, call)
        out = rows.linear_logps(temperature=self.temperature, workspace_mb=self.workspace_mb)
        count = max(len(rows.target_ids), 1) if call.num_items is None else call.num_items
        if isinstance(count, Tensor):
            count = count.to(out.logps.device)
        missing = (0, call.num_columns - rows.shape[1])
        return FusedOutput(
            loss=(-out.logps).sum() / count,
            logps=pad(rows.table(out.logps), missing),
            entropies=pad(rows.table(out.entropies), missing),
        )


def _by_name(
    original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    if not args:
        return dict(kwargs)
    bound = inspect.signature(original).bind_partial(*args)
    twice = sorted(bound.arguments.keys() & kwargs.keys())
    if twice:
        raise TypeError(f"forward() got multiple values for argument {twice[0]!r}")
    return {**bound.arguments, **kwargs}
