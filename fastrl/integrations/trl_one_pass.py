"""TRL's GRPO losses whose gradients can be made while the logits are there.

Where the loss of a token depends on no other token, `policy_loss` makes loss and gradients in one
pass over the head, from the numbers below. TRL's own `_compute_loss` still computes the value and
the metrics, from the log-probabilities of that pass.

Legend: B sequences, C padded length of completions, S labelled tokens. Tables here are (B, C).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrl.integrations.head_rows import HeadRows
from fastrl_kernels import PolicyLoss
from fastrl_kernels.grpo_modules import grpo_objective, grpo_weights
from fastrl_kernels.objectives import Objective

CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
"""Loss types with PPO's surrogate; they differ in how tokens are averaged."""
PER_TOKEN = (*CLIPPED, "cispo", "sapo")


class OnePass(NamedTuple):
    """A loss over the labelled tokens of a batch, (B, C) tables that may be expanded views."""

    objective: Objective
    advantages: Tensor
    token_weights: Tensor  # all averaging and masking
    old_logps: Tensor | None
    ref_logps: Tensor | None
    rollout_weights: Tensor | None
    entropy_coefs: Tensor | None

    def run(self, rows: HeadRows, places: Tensor, **settings: Any) -> PolicyLoss:
        """The loss of some rows of the batch; places: of their tokens in a (B, L - 1) table.

        A token that is masked, though labelled, has the log-probability of the old policy.
        """
        index = self._index(rows, places)

        def tokens(table: Tensor | None) -> Tensor | None:
            return None if table is None else table[index]

        weights = self.token_weights[index]
        entropy_coefs = tokens(self.entropy_coefs)
        found = rows.policy_loss(
            self.advantages[index], weights, objective=self.objective,
            old_logps=tokens(self.old_logps), ref_logps=tokens(self.ref_logps),
            rollout_weights=tokens(self.rollout_weights),
            entropy_coef=0.0 if entropy_coefs is None else entropy_coefs, **settings,
        )  # fmt: skip
        if self.old_logps is None:
            return found
        # Not 0: a ratio to the old policy of infinity, times a mask of 0, would be no number.
        old_logps = self.old_logps[index].to(found.logps.dtype)
        return found._replace(logps=torch.where(weights == 0, old_logps, found.logps))

    def _index(self, rows: HeadRows, places: Tensor) -> tuple[Tensor, Tensor]:
        """(S,) rows and columns of the tokens in the tables; completions end the sequences."""
        length = rows.shape[1]
        return places // length, places % length - (length - self.token_weights.shape[1])


def one_pass_of(trainer: Any, inputs: dict[str, Any]) -> OnePass | None:
    """What a GRPOTrainer is about to compute for a batch; None where tokens depend on each other.

    Those are sequence-level ratios off the policy, `vespo`, masks by entropy or by the drift of a
    sequence, and the loss of a router. A `delta` within the clip range is TRL's alone, too.
    """
    delta, high = trainer.args.delta, trainer.epsilon_high
    if (
        (trainer.importance_sampling_level != "token" and not _is_one_policy(trainer, inputs))
        or trainer.loss_type not in PER_TOKEN
        or trainer.top_entropy_quantile < 1.0
        or trainer.off_policy_mask_threshold is not None
        or trainer.aux_loss_enabled
        or (delta is not None and trainer.loss_type in CLIPPED and delta < 1 + high)
    ):
        return None
    mask = loss_mask(inputs)
    table = mask.shape
    weights = _token_weights(trainer, inputs, mask)
    is_corrected = trainer.use_vllm and trainer.vllm_importance_sampling_correction
    ratio = inputs["importance_sampling_ratio"].expand(table) if is_corrected else None
    advantages = inputs["advantages"]
    advantages = advantages if advantages.dim() == 2 else advantages[:, None]
    return OnePass(
        objective=_objective(trainer),
        advantages=advantages.expand(table),
        token_weights=weights,
        old_logps=inputs.get("old_per_token_logps"),
        ref_logps=inputs["ref_per_token_logps"] if trainer.beta != 0.0 else None,
        rollout_weights=ratio,
        entropy_coefs=_entropy_coefs(trainer, mask, weights),
    )


def _is_one_policy(trainer: Any, inputs: dict[str, Any]) -> bool:
    """Whether a sequence's ratio is 1 and its gradient that of its tokens' ratios.

    What each token multiplies it by would be shared out among the tokens of the sequence.
    """
    is_corrected = trainer.use_vllm and trainer.vllm_importance_sampling_correction
    has_ratio_in_penalty = trainer.beta != 0.0 and trainer.args.use_bias_correction_kl
    return (
        inputs.get("old_per_token_logps") is None
        and inputs["advantages"].dim() == 1
        and not is_corrected
        and not has_ratio_in_penalty
    )


def loss_mask(inputs: dict[str, Any]) -> Tensor:
    """(B, C) tokens that the policy sampled and that are trained, as TRL masks them."""
    mask: Tensor = inputs["completion_mask"]
    return mask * inputs["tool_mask"] if "tool_mask" in inputs else mask


def entropy_coef_of(trainer: Any) -> float:
    """The coefficient of the entropy bonus that TRL applies to this batch."""
    if not trainer._entropy_bonus_enabled:
        return 0.0
    is_high = trainer.use_adaptive_entropy and (
        trainer._last_world_entropy > trainer.args.entropy_target
    )
    return 0.0 if is_high else trainer.entropy_coef


def _objective(trainer: Any) -> Objective:
    arguments = trainer.args
    return grpo_objective(
        trainer.loss_type, epsilon_low=trainer.epsilon_low, epsilon_high=trainer.epsilon_high,
        delta=arguments.delta, beta=trainer.beta,
        use_bias_correction_kl=arguments.use_bias_correction_kl,
        sapo_temperatures=(arguments.sapo_temperature_pos, arguments.sapo_temperature_neg),
    )  # fmt: skip


def _num_micro_batches(trainer: Any) -> int:
    """Over how many batches the optimizer's step is a mean; none are accumulated in evaluation."""
    return trainer.current_gradient_accumulation_steps if trainer.model.training else 1


def _token_weights(trainer: Any, inputs: dict[str, Any], mask: Tensor) -> Tensor:
    """(B, C) weights with which the losses of tokens add up to TRL's loss."""

    def num_tokens() -> Tensor:
        # TRL counts the tokens of all that was generated at once, on all processes.
        share = trainer.args.steps_per_generation if trainer.model.training else 1
        num_items: Tensor = inputs["num_items_in_batch"].clamp(min=1.0)
        return num_items / (trainer.accelerator.num_processes * share)

    weights = grpo_weights(
        trainer.loss_type, mask, max_completion_length=trainer.max_completion_length,
        num_tokens=num_tokens,
    )  # fmt: skip
    return weights / _num_micro_batches(trainer)


def _entropy_coefs(trainer: Any, mask: Tensor, weights: Tensor) -> Tensor | None:
    """(B, C) coefficients that turn the weights into the bonus' own: a mean over all tokens."""
    coefficient = entropy_coef_of(trainer)
    if coefficient == 0.0:
        return None
    bonus = mask * coefficient / (mask.sum().clamp(min=1.0) * _num_micro_batches(trainer))
    return bonus / torch.where(weights == 0, 1, weights)
