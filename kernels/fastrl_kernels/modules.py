"""The functions as modules, for code that keeps its losses in a `torch.nn.Module`."""

from typing import Any

from torch import Tensor, nn

from fastrl_kernels.head import LMHead
from fastrl_kernels.linear_logps import LinearLogps, linear_logps
from fastrl_kernels.objectives import Objective, Parameter
from fastrl_kernels.policy_loss import PolicyLoss, policy_loss


class FusedLinearLogps(nn.Module):
    """`linear_logps` with its settings kept; the head stays where it lives, and is an argument."""

    def __init__(
        self, *, temperature: float = 1.0, workspace_mb: float = 256,
        batch_invariant: bool = False, implementation: str = "auto",
    ) -> None:  # fmt: skip
        super().__init__()
        self.settings: dict[str, Any] = {
            "temperature": temperature,
            "workspace_mb": workspace_mb,
            "batch_invariant": batch_invariant,
            "implementation": implementation,
        }

    def forward(
        self, hidden_states: Tensor, lm_head: nn.Module | LMHead | Tensor, target_ids: Tensor
    ) -> LinearLogps:
        """hidden_states (S, D), target_ids (S,); a head that is a module gives weight and bias."""
        return linear_logps(hidden_states, head_of(lm_head), target_ids, **self.settings)


class FusedLinearPolicyLoss(nn.Module):
    """`policy_loss` with its objective and settings kept."""

    def __init__(
        self, objective: Objective, *, temperature: float = 1.0, entropy_coef: Parameter = 0.0,
        workspace_mb: float = 256, engine: str = "auto", batch_invariant: bool = False,
        accumulate_grad: bool = False, implementation: str = "auto",
    ) -> None:  # fmt: skip
        super().__init__()
        self.settings: dict[str, Any] = {
            "objective": objective,
            "temperature": temperature,
            "entropy_coef": entropy_coef,
            "workspace_mb": workspace_mb,
            "engine": engine,
            "batch_invariant": batch_invariant,
            "accumulate_grad": accumulate_grad,
            "implementation": implementation,
        }

    def forward(
        self,
        hidden_states: Tensor,
        lm_head: nn.Module | LMHead | Tensor,
        target_ids: Tensor,
        advantages: Tensor,
        token_weights: Tensor,
        *,
        old_logps: Tensor | None = None,
        ref_logps: Tensor | None = None,
        rollout_weights: Tensor | None = None,
    ) -> PolicyLoss:
        """All of `policy_loss`'s tensors, with the same shapes and meanings."""
        return policy_loss(
            hidden_states, head_of(lm_head), target_ids, advantages, token_weights,
            old_logps=old_logps, ref_logps=ref_logps, rollout_weights=rollout_weights,
            **self.settings,
        )  # fmt: skip


def head_of(lm_head: nn.Module | LMHead | Tensor) -> LMHead | Tensor:
    """A head as the functions take it; nn.Linear gives its weight and bias, adapters included.

    Scale, softcap and padding are known to the whole model alone: `LMHead.from_model`.
    """
    if not isinstance(lm_head, nn.Module):
        return lm_head
    from fastrl_kernels.model_head import head_of_layer

    return head_of_layer(lm_head)
