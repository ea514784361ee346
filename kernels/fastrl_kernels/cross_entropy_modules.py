"""Cross entropy with the signature of Liger's `LigerFusedLinearCrossEntropyLoss`.

S tokens, D hidden, V vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from fastrl_kernels.batches import COLUMNS, Settings, head_with_bias
from fastrl_kernels.head import LMHead, accumulation_dtype
from fastrl_kernels.linear_logps import LinearLogps, linear_logps
from fastrl_kernels.objectives import Objective, log_likelihood
from fastrl_kernels.policy_loss import policy_loss

REDUCTIONS = ("mean", "sum", "none")


class CrossEntropyOutput(NamedTuple):
    """What was asked for beside the loss, without gradient; None for the rest."""

    loss: Tensor
    z_loss: Tensor | None = None
    token_accuracy: Tensor | None = None
    predicted_tokens: Tensor | None = None  # (S,) int64, -1 where ignored


class _Weights(NamedTuple):
    """(S,) what each part of a token's loss counts, averaging included; 0 where it is ignored."""

    likelihood: Tensor  # with the class weight of the target
    smoothing: Tensor
    z_loss: Tensor


class FusedLinearCrossEntropyLoss(nn.Module):
    """Cross entropy from hidden states: no (S, V) tensor.

    Arguments, order and returns of Liger's `LigerFusedLinearCrossEntropyLoss`, `workspace_mb` and
    `implementation` apart. A sum or mean of weighted likelihoods takes one pass over the head;
    smoothing, z-loss, token scaling, "none" and statistics make the logits again in backward.
    `accum_dtype` may be float32, which sums always have. Raises for `label_smoothing` beside
    `softcap`, where the sum of all logits would need them all.
    """

    def __init__(
        self, ce_weight: Tensor | None = None, ignore_index: int = -100,
        lse_square_scale: float = 0.0, label_smoothing: float = 0.0, reduction: str = "mean",
        softcap: float | None = None, return_z_loss: bool = False,
        accum_dtype: torch.dtype | None = None, use_token_scaling: bool = False,
        return_token_accuracy: bool = False, return_predicted_tokens: bool = False, *,
        workspace_mb: float = 256, implementation: str = "auto",
    ) -> None:  # fmt: skip
        super().__init__()
        self.ce_weight, self.ignore_index = ce_weight, ignore_index
        self.lse_square_scale, self.label_smoothing = lse_square_scale, label_smoothing
        self.reduction, self.softcap = reduction, softcap
        self.return_z_loss, self.use_token_scaling = return_z_loss, use_token_scaling
        self.return_token_accuracy = return_token_accuracy
        self.return_predicted_tokens = return_predicted_tokens
        self.settings = Settings(workspace_mb, implementation)
        if reduction not in REDUCTIONS:
            raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
        if accum_dtype not in (None, torch.float32):
            raise ValueError(
                f"accum_dtype must be None or torch.float32, in which all sums are, got "
                f"{accum_dtype}"
            )

    def forward(
        self, lin_weight: nn.Module | LMHead | Tensor, _input: Tensor, target: Tensor,
        bias: Tensor | None = None,
    ) -> Tensor | CrossEntropyOutput:  # fmt: skip
        """The loss of _input (S, D) and target (S,), or a record where statistics are asked for."""
        head = self._head(head_with_bias(lin_weight, bias))
        kept = target != self.ignore_index
        target_ids = target.masked_fill(~kept, -1)
        weights = self._weights(target_ids, accumulation_dtype(_input.dtype))
        wants_record = (
            self.return_z_loss or self.return_token_accuracy or self.return_predicted_tokens
        )
        is_plain = not (self.lse_square_scale or self.label_smoothing or self.use_token_scaling)
        if is_plain and not wants_record and self.reduction != "none":
            return policy_loss(
                _input, head, target_ids, torch.ones_like(weights.likelihood), weights.likelihood,
                objective=Objective(log_likelihood), **self.settings._asdict(),
            ).loss  # fmt: skip
        out = linear_logps(_input, head, target_ids, **self.settings._asdict())
        losses, z_losses = -weights.likelihood * out.logps, torch.zeros_like(out.logps)
        if self.lse_square_scale or self.label_smoothing:
            # Of what linear_logps returns only logps give gradients.
            with torch.autocast(_input.device.type, enabled=False):
                lse = target_logits(_input, head, target_ids) - out.logps
                gaps = self._gaps(lse, _input, head) if self.label_smoothing else None
            z_losses = self.lse_square_scale * weights.z_loss * lse.square()
            if gaps is not None:
                smooth = weights.smoothing * gaps
                losses = (1 - self.label_smoothing) * losses + self.label_smoothing * smooth
            losses = losses + z_losses
        if self.use_token_scaling:
            scales = out.logps.detach().exp()
            losses, z_losses = losses * scales, z_losses * scales
        loss = losses if self.reduction == "none" else losses.sum()
        return self._record(loss, z_losses.detach(), out, target_ids) if wants_record else loss

    def _head(self, head: LMHead) -> LMHead:
        if self.softcap is not None:
            if head.softcap not in (None, self.softcap):
                raise ValueError(
                    f"softcap = {self.softcap} is not the head's own, {head.softcap}; leave it out"
                )
            head = head._replace(softcap=self.softcap)
        if self.label_smoothing and head.softcap is not None:
            raise ValueError(
                f"label_smoothing must be 0 beside softcap = {head.softcap}, got "
                f"{self.label_smoothing}: the sum of capped logits needs all of them"
            )
        needs_rows = self.lse_square_scale or self.label_smoothing
        if needs_rows and not isinstance(head.weight, Tensor):
            raise ValueError(
                "lse_square_scale and label_smoothing need a weight that is a tensor, got one in 4 "
                "bits; set them to 0"
            )
        return head

    def _weights(self, target_ids: Tensor, dtype: torch.dtype) -> _Weights:
        kept = (target_ids >= 0).to(dtype)
        likelihood = kept
        if self.ce_weight is not None:
            likelihood = kept * self.ce_weight.to(dtype)[target_ids.clamp(min=0)]
        if self.reduction != "mean":
            return _Weights(likelihood, kept, kept)
        total = likelihood.sum()
        total = torch.where(total == 0, 1, total)
        return _Weights(likelihood / total, kept / total, kept / kept.sum().clamp(min=1))

    def _gaps(self, lse: Tensor, _input: Tensor, head: LMHead) -> Tensor:
        """(S,) the likelihood loss of every class, by its weight, as a mean over V classes."""
        if self.ce_weight is None:
            classes = lse.new_ones(head.num_columns)
        else:
            classes = self.ce_weight.to(lse.dtype)
        return (lse * classes.sum() - weighted_logits(_input, head, classes)) / head.num_columns

    def _record(
        self, loss: Tensor, z_losses: Tensor, out: LinearLogps, target_ids: Tensor
    ) -> CrossEntropyOutput:
        kept, sums = target_ids >= 0, self.reduction != "none"
        right = ((out.argmax_ids == target_ids) & kept).to(loss.dtype)
        accuracy = right.sum() / kept.sum() if sums else right
        return CrossEntropyOutput(
            loss,
            (z_losses.sum() if sums else z_losses) if self.return_z_loss else None,
            accuracy if self.return_token_accuracy else None,
            out.argmax_ids.masked_fill(~kept, -1) if self.return_predicted_tokens else None,
        )


def target_logits(_input: Tensor, head: LMHead, target_ids: Tensor) -> Tensor:
    """(S,) logits of the targets in the dtype of sums, from (S, D) rows of the weight."""
    dtype, ids = accumulation_dtype(_input.dtype), target_ids.clamp(min=0)
    assert isinstance(head.weight, Tensor)
    hidden = _input.to(dtype)
    logits = (hidden * embedding(ids, head.weight).to(dtype)).sum(1)
    if head.lora_a is not None and head.lora_b is not None:
        low_rank = hidden @ head.lora_a.to(dtype).T
        logits = logits + head.lora_scale * (low_rank * head.lora_b[ids].to(dtype)).sum(1)
    if head.bias is not None:
        logits = logits + head.bias[ids].to(dtype)
    logits = logits * head.logit_scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return logits.masked_fill(target_ids < 0, 0)


def weighted_logits(_input: Tensor, head: LMHead, classes: Tensor) -> Tensor:
    """(S,) sums over the vocabulary of class weight * logit, through one row of weighted sums."""
    dtype = classes.dtype
    assert isinstance(head.weight, Tensor)

    def total(columns: Tensor) -> Tensor:
        pairs = zip(classes.split(COLUMNS), columns[: len(classes)].split(COLUMNS), strict=True)
        return torch.stack([weights @ rows.to(dtype) for weights, rows in pairs]).sum(0)

    hidden = _input.to(dtype)
    logits = hidden @ total(head.weight)
    if head.lora_a is not None and head.lora_b is not None:
        logits = logits + head.lora_scale * (hidden @ head.lora_a.to(dtype).T) @ total(head.lora_b)
    if head.bias is not None:
        logits = logits + classes @ head.bias[: len(classes)].to(dtype)
    return logits * head.logit_scale
