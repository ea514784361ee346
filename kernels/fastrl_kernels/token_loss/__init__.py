"""The objective of tokens whose log-probabilities are there already, with its metrics."""

from torch import Tensor

from fastrl_kernels.implementation import choose_implementation
from fastrl_kernels.objectives import Objective, Parameter, check_objective, check_per_token
from fastrl_kernels.objectives.arguments import to_arguments
from fastrl_kernels.token_loss.op import token_loss_op
from fastrl_kernels.token_loss.reference import TokenLoss, token_loss_reference

__all__ = ["TokenLoss", "token_loss", "token_loss_reference"]


def token_loss(
    logps: Tensor,
    entropies: Tensor,
    advantages: Tensor,
    token_weights: Tensor,
    *,
    objective: Objective,
    old_logps: Tensor | None = None,
    ref_logps: Tensor | None = None,
    rollout_weights: Tensor | None = None,
    entropy_coef: Parameter = 0.0,
    implementation: str = "auto",
) -> TokenLoss:
    """Sum over tokens of token_weight * (objective - entropy_coef * entropy), from (S,) numbers.

    logps, entropies: (S,) float32 or float64, as `linear_logps` and `selected_logps` give them; the
    loss is differentiable in both. The rest: (S,) floating-point constants, as in `policy_loss`.
    ref_logps are measured against even where the objective has no use for them. entropy_coef: a
    number, or a tensor as a parameter of the objective may be.
    """
    implementation = choose_implementation(implementation, logps)
    check_objective(objective, ref_logps, logps)
    given = (advantages, token_weights, old_logps, ref_logps, rollout_weights)
    names = ("advantages", "token_weights", "old_logps", "ref_logps", "rollout_weights")
    for name, tensor in zip(
        ("logps", "entropies", *names), (logps, entropies, *given), strict=True
    ):
        check_per_token(name, tensor, logps)
    constants = [None if x is None else x.detach().to(logps.dtype).contiguous() for x in given]
    arguments = to_arguments(objective, entropy_coef, logps.dtype, logps.device)
    loss, slopes, _, clipped, metrics = token_loss_op(
        logps.contiguous(), entropies.contiguous(), *constants, *arguments, implementation
    )
    return TokenLoss(loss, slopes, clipped, *metrics.unbind())
