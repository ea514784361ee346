"""The loss of GRPO and its relatives with the signature of Liger's `LigerFusedLinearGRPOLoss`.

B completions of T places. One pass over the head where the loss is a sum over tokens; where whole
sequences matter, log-probabilities first and the logits again in backward.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastrl_kernels.batches import (
    Settings,
    check_batch,
    check_table,
    head_with_bias,
    table_logps,
)
from fastrl_kernels.head import LMHead, accumulation_dtype
from fastrl_kernels.objectives import (
    Objective,
    Regulariser,
    clipped_ratio,
    k3,
    k3_is,
    policy_gradient,
    soft_gated_ratio,
    truncated_importance,
    two_sided_clipped_ratio,
)
from fastrl_kernels.policy_loss import policy_loss
from fastrl_kernels.sequence_losses import (
    GRPOBatch,
    metrics,
    sequence_loss,
    tokens_of_a_process,
    vespo_weights,
)

CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
LOSS_TYPES = (*CLIPPED, "cispo", "sapo", "vespo")
LEVELS = ("token", "sequence")


class FusedLinearGRPOLoss(nn.Module):
    """GRPO, BNPO, Dr. GRPO, DAPO, CISPO, SAPO, LUSPO, GSPO and VESPO from hidden states.

    Arguments, order and returns of Liger's `LigerFusedLinearGRPOLoss`, `workspace_mb` and
    `implementation` apart. `compiled` and `chunk_size`, which say how Liger cuts its work, have no
    effect: `workspace_mb` bounds it. Log-ratios of tokens are clamped to +-20. Two combinations
    raise that Liger takes: `loss_type="luspo"` with the token level or with `beta`, where padding
    would be trained, and `beta` with `use_ref_model=False`, which is no penalty.
    """

    def __init__(
        self, beta: float = 0.04, compiled: bool = True, use_ref_model: bool = True,
        chunk_size: int = 1, epsilon_low: float = 0.2, epsilon_high: float = 0.2,
        loss_type: str = "dapo", max_completion_length: int | None = None,
        importance_sampling_level: str = "token", sapo_temperature_pos: float = 1.0,
        sapo_temperature_neg: float = 1.05, temperature: float = 1.0, delta: float | None = None,
        use_bias_correction_kl: bool = False, vespo_k_pos: float = 2.0,
        vespo_lambda_pos: float = 3.0, vespo_k_neg: float = 3.0, vespo_lambda_neg: float = 2.0, *,
        workspace_mb: float = 256, implementation: str = "auto",
    ) -> None:  # fmt: skip
        super().__init__()
        self.beta, self.use_ref_model = beta, use_ref_model
        self.epsilon_low, self.epsilon_high, self.delta = epsilon_low, epsilon_high, delta
        self.loss_type, self.max_completion_length = loss_type, max_completion_length
        self.importance_sampling_level = importance_sampling_level
        self.sapo_temperature_pos = sapo_temperature_pos
        self.sapo_temperature_neg = sapo_temperature_neg
        self.temperature = temperature
        self.use_bias_correction_kl = use_bias_correction_kl
        self.vespo_k_pos, self.vespo_lambda_pos = vespo_k_pos, vespo_lambda_pos
        self.vespo_k_neg, self.vespo_lambda_neg = vespo_k_neg, vespo_lambda_neg
        self.settings = Settings(workspace_mb, implementation)
        _check(self)

    def forward(
        self,
        _input: Tensor,
        lin_weight: nn.Module | LMHead | Tensor,
        selected_token_ids: Tensor,
        attention_mask: Tensor,
        advantages: Tensor,
        bias: Tensor | None = None,
        ref_per_token_logps: Tensor | None = None,
        old_per_token_logps: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: nn.Module | LMHead | Tensor | None = None,
        ref_bias: Tensor | None = None,
        vllm_is_ratio: Tensor | None = None,
        num_items_in_batch: Tensor | float | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The loss, and what to log: the mean KL where `beta` is not 0, the share that was clipped.

        _input: (B, T, D) hidden states that predict selected_token_ids (B, T). attention_mask:
        (B, T), 1 where a token is trained. advantages: (B,). Log-probabilities: (B, T), constants.
        ref_input with ref_weight: of the reference model, instead of ref_per_token_logps.
        vllm_is_ratio: (B,), (B, 1) or (B, T). num_items_in_batch: trained tokens of the whole
        step, which dapo, cispo and vespo divide by. The head may be an LMHead or a layer too.
        """
        check_batch(_input, selected_token_ids, "selected_token_ids")
        head = head_with_bias(lin_weight, bias)
        given = {
            "attention_mask": attention_mask,
            "ref_per_token_logps": ref_per_token_logps,
            "old_per_token_logps": old_per_token_logps,
        }
        for name, table in given.items():
            if table is not None:
                check_table(name, table, selected_token_ids)
        num_rows = selected_token_ids.shape[0]
        if advantages.shape != (num_rows,):
            raise ValueError(
                f"advantages must have one number for each completion, shape ({num_rows},), got "
                f"{tuple(advantages.shape)}; take one column of it"
            )
        dtype = accumulation_dtype(_input.dtype)
        mask = attention_mask.to(dtype)
        target_ids = selected_token_ids.masked_fill(mask == 0, -1)
        reference = ref_per_token_logps
        if self.beta != 0 and reference is None:
            reference = self._reference(ref_input, ref_weight, ref_bias, target_ids)
        old = None if old_per_token_logps is None else old_per_token_logps.detach().to(dtype)
        batch = GRPOBatch(
            target_ids, mask, self._weights(mask, num_items_in_batch),
            advantages.detach().to(dtype)[:, None], old,
            None if self.beta == 0 or reference is None else reference.detach().to(dtype),
            self._rollout_weights(vllm_is_ratio, mask),
        )  # fmt: skip
        if self._is_sum_over_tokens(batch):
            loss, logps = self._one_pass(_input, head, batch)
        else:
            logps = self._logps(_input, head, target_ids)
            loss = sequence_loss(self, logps, batch)
        return loss, metrics(self, logps.detach(), batch)

    def _logps(self, _input: Tensor, head: LMHead, target_ids: Tensor) -> Tensor:
        return table_logps(_input, head, target_ids, self.settings, temperature=self.temperature)

    def _reference(
        self, ref_input: Tensor | None, ref_weight: nn.Module | LMHead | Tensor | None,
        ref_bias: Tensor | None, target_ids: Tensor,
    ) -> Tensor:  # fmt: skip
        """(B, T) of the reference model, without gradient."""
        if ref_input is None or ref_weight is None:
            raise ValueError(
                f"beta = {self.beta} needs ref_per_token_logps, or ref_input and ref_weight, got "
                "none; give them, or set beta to 0"
            )
        check_batch(ref_input, target_ids, "selected_token_ids")
        with torch.no_grad():
            return self._logps(ref_input, head_with_bias(ref_weight, ref_bias), target_ids)

    def _weights(self, mask: Tensor, num_items_in_batch: Tensor | float | None) -> Tensor:
        """(B, T) what each token's loss counts."""
        return grpo_weights(
            self.loss_type, mask, max_completion_length=self.max_completion_length,
            num_tokens=lambda: tokens_of_a_process(mask, num_items_in_batch),
        )  # fmt: skip

    def _rollout_weights(self, ratio: Tensor | None, mask: Tensor) -> Tensor | None:
        """(B, T) or (B, 1): the correction for tokens that another program sampled."""
        if ratio is None:
            return None
        num_rows, num_places = mask.shape
        shapes = ((num_rows,), (num_rows, 1), (num_rows, num_places))
        if ratio.shape not in shapes:
            raise ValueError(
                f"vllm_is_ratio must have one of the shapes {shapes}, got {tuple(ratio.shape)}; "
                "give one number for each completion or for each token"
            )
        ratio = ratio.detach().to(mask.dtype).view(num_rows, -1)
        # Liger's LUSPO is a mean over all places, padding too, of one number times these.
        return ratio.mean(1, keepdim=True) if self.loss_type == "luspo" else ratio

    def _is_sum_over_tokens(self, batch: GRPOBatch) -> bool:
        """Whether the loss and its gradient are those of an objective of single tokens.

        Where the policy is its own old policy, all ratios are 1 and so are those of sequences.
        """
        if self.delta is not None and self.delta <= 1 + self.epsilon_high:
            return False  # the cap within the clip, which no objective has
        if self.importance_sampling_level == "token" and self.loss_type != "vespo":
            return True
        return batch.old_logps is None and not (self.beta != 0 and self.use_bias_correction_kl)

    def _one_pass(self, _input: Tensor, head: LMHead, batch: GRPOBatch) -> tuple[Tensor, Tensor]:
        """The loss and (B, T) log-probabilities, by the objective that this loss is."""
        rollout, advantages = batch.rollout_weights, batch.advantages
        if self.loss_type == "vespo":
            advantages = advantages * vespo_weights(self, torch.zeros_like(batch.mask), batch)
            rollout = None
        elif self.importance_sampling_level == "sequence" and rollout is not None:
            # The ratio of a sequence multiplies their sum, and is a mean over its tokens.
            lengths = batch.mask.sum(1, keepdim=True).clamp(min=1)
            rollout = (rollout * batch.mask).sum(1, keepdim=True) / lengths
        weights = batch.weights
        if self.beta == 0:  # then a token without an advantage has neither value nor slope
            weights = weights * (advantages != 0)

        def rows(table: Tensor | None) -> Tensor | None:
            return None if table is None else table.expand_as(batch.mask).flatten()

        out = policy_loss(
            _input.flatten(0, 1), head, batch.target_ids.flatten(),
            advantages.expand_as(batch.mask).flatten(), weights.flatten(),
            objective=self._objective(), old_logps=rows(batch.old_logps),
            ref_logps=rows(batch.ref_logps), rollout_weights=rows(rollout),
            temperature=self.temperature, **self.settings._asdict(),
        )  # fmt: skip
        return out.loss, out.logps.view_as(batch.mask)

    def _objective(self) -> Objective:
        """The loss of one token."""
        return grpo_objective(
            self.loss_type, epsilon_low=self.epsilon_low, epsilon_high=self.epsilon_high,
            delta=self.delta, beta=self.beta, use_bias_correction_kl=self.use_bias_correction_kl,
            sapo_temperatures=(self.sapo_temperature_pos, self.sapo_temperature_neg),
        )  # fmt: skip


def grpo_weights(
    loss_type: str, mask: Tensor, *, max_completion_length: int | None,
    num_tokens: Callable[[], Tensor],
) -> Tensor:  # fmt: skip
    """(B, T) weights of token losses, by the names that TRL and Liger give their averages.

    mask: (B, T), 1 for tokens that are trained. max_completion_length: for "dr_grpo" alone.
    num_tokens: asked where the mean is over more than this batch ("dapo", "cispo", "vespo").
    """
    num_rows = mask.shape[0]
    if loss_type in ("grpo", "sapo"):
        return mask / (mask.sum(1, keepdim=True).clamp(min=1) * num_rows)
    if loss_type == "bnpo":
        return mask / mask.sum().clamp(min=1)
    if loss_type == "luspo":
        return mask / num_rows
    if loss_type == "dr_grpo":
        assert max_completion_length is not None
        return mask / (num_rows * max_completion_length)
    return mask / num_tokens()


def grpo_objective(
    loss_type: str, *, epsilon_low: float, epsilon_high: float, delta: float | None, beta: float,
    use_bias_correction_kl: bool, sapo_temperatures: tuple[float, float],
) -> Objective:  # fmt: skip
    """The loss of one token, by the names and numbers that TRL and Liger give it."""
    penalty = k3_is if use_bias_correction_kl else k3
    regularisers = (Regulariser(penalty, beta),) if beta != 0 else ()
    if loss_type == "cispo":  # whose cap is epsilon_high itself
        return Objective(truncated_importance, (1.0, epsilon_high - 1.0), regularisers)
    if loss_type == "sapo":
        return Objective(soft_gated_ratio, sapo_temperatures, regularisers)
    if loss_type == "vespo":
        return Objective(policy_gradient, (), regularisers)
    if delta is not None:
        bounds = (epsilon_low, epsilon_high, delta)
        return Objective(two_sided_clipped_ratio, bounds, regularisers)
    return Objective(clipped_ratio, (epsilon_low, epsilon_high), regularisers)


def _check(loss: FusedLinearGRPOLoss) -> None:
    """Raise ValueError for settings that no loss has."""
    kind, level = loss.loss_type, loss.importance_sampling_level
    if kind not in LOSS_TYPES:
        raise ValueError(f"loss_type must be one of {', '.join(LOSS_TYPES)}, got {kind!r}")
    if level not in LEVELS:
        raise ValueError(f"importance_sampling_level must be token or sequence, got {level!r}")
    if level == "sequence" and kind not in CLIPPED:
        raise ValueError(
            f"importance_sampling_level must be token with loss_type {kind!r}, got {level!r}; "
            f"sequences have {', '.join(CLIPPED)}"
        )
    if kind == "luspo" and (level == "token" or loss.beta != 0):
        raise ValueError(
            "loss_type 'luspo' needs importance_sampling_level='sequence' and beta=0, got "
            f"{level!r} and {loss.beta}: a mean over all places would train padding; set them, or "
            "take loss_type='grpo'"
        )
    if kind == "dr_grpo" and loss.max_completion_length is None:
        raise ValueError("loss_type 'dr_grpo' needs max_completion_length, got None; set it")
    if loss.beta != 0 and not loss.use_ref_model:
        raise ValueError(
            f"beta = {loss.beta} needs use_ref_model=True, got False, where the penalty is towards "
            "the policy itself and zero; set beta to 0"
        )
    if loss.delta is not None and kind not in CLIPPED:
        raise ValueError(
            f"delta must be None with loss_type {kind!r}, which has no clip, got {loss.delta}"
        )
    positive = {
        name: getattr(loss, name)
        for name in ("sapo_temperature_pos", "sapo_temperature_neg", "temperature", "delta")
    }
    for name, value in positive.items():
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")
