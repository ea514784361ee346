"""Implementations by others that start from hidden states, each behind one adapter.

A loader imports what its adapter needs when it is called, so that a peer which is not installed is
missed by nobody; `Absent` says that one cannot run here. All policy losses are the same number: the
clipped ratio of GRPO with epsilons 0.2 and 0.28, no KL, summed with token weights of 1 / S.

S selected tokens, D hidden, V vocabulary, B sequences, L tokens in the longest.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from reference import EPSILON_HIGH, EPSILON_LOW, token_losses
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

LogpsFunction = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor | None]]
"""(hidden_states, weight, target_ids, temperature) -> (logps, entropies or None)"""
PolicyFunction = Callable[
    [Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, float, list[int]],
    tuple[Tensor, Tensor | None],
]
"""(hidden_states, weight, target_ids, advantages, old_logps, token_weights, temperature, lengths)
-> (loss, logps or None); lengths: of the B sequences"""


class Absent(Exception):
    """An implementation cannot run here; the message says why."""


def require_cuda(device: str) -> None:
    """Raise Absent for a peer that has nothing but GPU kernels."""
    if device != "cuda":
        raise Absent("runs on CUDA only")


def by_sequence(values: Tensor, lengths: list[int]) -> Tensor:
    """(S, ...) as (B, L, ...), zeros behind the shorter ones."""
    if min(lengths) == max(lengths):
        return values.unflatten(0, (len(lengths), -1))
    return pad_sequence(values.split(lengths), batch_first=True)


def sequence_advantages(advantages: Tensor, lengths: list[int]) -> Tensor:
    """(B,): the one nonzero advantage of each sequence, 0 where none of its tokens is trained."""
    rows = by_sequence(advantages, lengths)
    return rows.gather(1, rows.abs().argmax(1, keepdim=True)).squeeze(1)


# Plain PyTorch


def naive_policy_loss(
    hidden_states: Tensor, weight: Tensor, target_ids: Tensor, advantages: Tensor,
    old_logps: Tensor, token_weights: Tensor, temperature: float, lengths: list[int],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """All logits, and no entropies: what every trainer began with."""
    log_probs = _log_probs(hidden_states, weight, temperature)
    logps = log_probs.gather(-1, target_ids[:, None]).squeeze(-1)
    return (token_weights * token_losses(logps, old_logps, advantages)).sum(), logps


def naive_logps(
    hidden_states: Tensor, weight: Tensor, target_ids: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """All logits."""
    log_probs = _log_probs(hidden_states, weight, temperature)
    entropies = -(log_probs.exp() * log_probs).sum(-1)
    return log_probs.gather(-1, target_ids[:, None]).squeeze(-1), entropies


def torch_chunked_ce_logps(device: str, *, num_rows: int | None) -> LogpsFunction:
    """`torch.nn.functional.linear_cross_entropy` by chunks; no temperature, no entropies.

    num_rows: rows of logits at a time; None takes its default, a handful for a large vocabulary.
    reduction="none" recomputes the logits in backward.
    """
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise Absent(f"torch {torch.__version__} has no linear_cross_entropy by chunks")
    options = torch.nn.LinearCrossEntropyOptions()
    if num_rows is not None:
        options = torch.nn.LinearCrossEntropyOptions(
            batch_chunk_size=num_rows, chunking_method=None
        )

    def logps(
        hidden_states: Tensor, weight: Tensor, target_ids: Tensor, temperature: float
    ) -> tuple[Tensor, None]:
        scaled = _over_temperature(hidden_states, temperature)
        nlls = F.linear_cross_entropy(scaled, weight, target_ids, reduction="none", options=options)
        return -nlls, None

    return logps


def _log_probs(hidden_states: Tensor, weight: Tensor, temperature: float) -> Tensor:
    logits = hidden_states @ weight.T
    if temperature != 1.0:  # at 1 the division would only be one more copy
        logits = logits / temperature
    return F.log_softmax(logits, dim=-1, dtype=torch.float32)


def _over_temperature(hidden_states: Tensor, temperature: float) -> Tensor:
    """For peers without a temperature: dividing the logits is dividing the hidden states."""
    return hidden_states if temperature == 1.0 else hidden_states / temperature


# TRL 1.16


def trl_logps(device: str) -> LogpsFunction:
    """The head that its GRPO trainer patches into the model, with the trainer's own tile width.

    Logits are rounded to the dtype of the hidden states before the statistics. Triton on CUDA and
    XPU, PyTorch operations elsewhere.
    """
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE  # its backward imports the module

    def logps(
        hidden_states: Tensor, weight: Tensor, target_ids: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        no_bias, no_softcap, logit_scale, outputs = None, None, 1.0, ("entropy",)
        logps, entropies, *_ = ChunkedLogProbFunction.apply(
            hidden_states, weight, no_bias, target_ids, temperature, _CHUNKED_LOGPROB_CHUNK_SIZE,
            no_softcap, logit_scale, outputs,
        )  # fmt: skip
        return logps, entropies

    return logps


# Liger 0.8


def liger_chunked_grpo(device: str) -> PolicyFunction:
    """`LigerFusedLinearGRPOLoss` with its defaults: one sequence a chunk, the objective compiled.

    It knows one advantage a sequence and a mask, so a zero advantage becomes a masked token;
    num_items_in_batch keeps the mean over all S tokens. Its weights are 1 / S, nothing else. Where
    sequences differ in length it takes padded rows, as a trainer hands them to it.
    """
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    def policy(
        hidden_states: Tensor, weight: Tensor, target_ids: Tensor, advantages: Tensor,
        old_logps: Tensor, token_weights: Tensor, temperature: float, lengths: list[int],
    ) -> tuple[Tensor, None]:  # fmt: skip
        grpo = LigerFusedLinearGRPOLoss(
            beta=0.0, use_ref_model=False, epsilon_low=EPSILON_LOW, epsilon_high=EPSILON_HIGH,
            loss_type="dapo", temperature=temperature,
        )  # fmt: skip
        loss, _ = grpo(
            by_sequence(hidden_states, lengths), weight, by_sequence(target_ids, lengths),
            (by_sequence(advantages, lengths) != 0).float(),
            sequence_advantages(advantages, lengths),
            old_per_token_logps=by_sequence(old_logps, lengths), num_items_in_batch=len(target_ids),
        )  # fmt: skip
        return loss, None

    return policy


def liger_triton_grpo(device: str) -> PolicyFunction:
    """Materialised logits, then `triton_grpo_loss`, whose backward overwrites them.

    It wants (B, L + 1, V) logits of which the last position is unused, so a row of zeros is added
    to the hidden states of each sequence.
    """
    require_cuda(device)
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    def policy(
        hidden_states: Tensor, weight: Tensor, target_ids: Tensor, advantages: Tensor,
        old_logps: Tensor, token_weights: Tensor, temperature: float, lengths: list[int],
    ) -> tuple[Tensor, None]:  # fmt: skip
        logits = F.pad(by_sequence(hidden_states, lengths), (0, 0, 0, 1)) @ weight.T
        loss, *_ = triton_grpo_loss(
            logits, by_sequence(old_logps, lengths), None, by_sequence(target_ids, lengths),
            sequence_advantages(advantages, lengths), (by_sequence(advantages, lengths) != 0).int(),
            temperature=temperature, beta=0.0, eps_low=EPSILON_LOW, eps_high=EPSILON_HIGH,
            loss_type="dapo", reduce=True, num_items_in_batch=len(target_ids),
        )  # fmt: skip
        return loss, None

    return policy


def liger_scaled_ce_logps(device: str) -> LogpsFunction:
    """One call for NLL and entropy: CuTe kernels on exactly sm_90, else verl's loop of 512 rows.

    On sm_90 the logits pass through float16, and the entropies and the sum of the weight gradient
    over waves of 1024 rows are bf16.
    """
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    def logps(
        hidden_states: Tensor, weight: Tensor, target_ids: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        nlls, entropies = LigerFusedLinearScaledCrossEntropyFunction.apply(
            hidden_states, weight, target_ids, temperature, -100, 1, True
        )
        return -nlls, entropies

    return logps


def liger_flce_logps(device: str) -> LogpsFunction:
    """Triton cross-entropy over row chunks of cuBLAS logits; no temperature, no entropies.

    reduction="none" recomputes the logits in backward; the weight gradient is summed in float32
    only when asked.
    """
    require_cuda(device)
    from liger_kernel.ops import LigerFusedLinearCrossEntropyFunction

    def logps(
        hidden_states: Tensor, weight: Tensor, target_ids: Tensor, temperature: float
    ) -> tuple[Tensor, None]:
        scaled = _over_temperature(hidden_states, temperature)
        no_bias, no_class_weight, z_loss, smoothing = None, None, 0.0, 0.0
        nlls, *_ = LigerFusedLinearCrossEntropyFunction.apply(
            scaled, weight, target_ids, no_bias, no_class_weight, -100, z_loss, smoothing, "none",
            None, False, torch.float32,
        )  # fmt: skip
        return -nlls, None

    return logps


# Cut Cross-Entropy 25.1


def cce_logps(device: str, *, filter_eps: str | None) -> LogpsFunction:
    """No temperature, no entropies. Its kernels on CUDA, elsewhere its own compiled PyTorch.

    filter_eps: "high", the default, skips gradient tiles in which no probability reaches 2^-12 (in
    bf16); None skips nothing.
    """
    from cut_cross_entropy import linear_cross_entropy

    if device != "cuda" and filter_eps is None:
        raise Absent("without its CUDA kernels there is nothing to filter")
    backend = "cce" if device == "cuda" else "torch_compile"

    def logps(
        hidden_states: Tensor, weight: Tensor, target_ids: Tensor, temperature: float
    ) -> tuple[Tensor, None]:
        scaled = _over_temperature(hidden_states, temperature)
        nlls = linear_cross_entropy(
            scaled, weight, target_ids, reduction="none", filter_eps=filter_eps, impl=backend
        )
        return -nlls, None

    return logps
