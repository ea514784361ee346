"""A policy loss and its gradients straight from hidden states and a language-model head."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastrl_kernels.head import (
    LMHead,
    accumulation_dtype,
    as_lm_head,
    check_inputs,
    per_token_temperature,
)
from fastrl_kernels.head_arguments import NUM_TENSORS, to_arguments
from fastrl_kernels.implementation import check_finite, choose_implementation
from fastrl_kernels.linear_logps import check_accumulation, linear_logps
from fastrl_kernels.linear_logps.op import NUM_TRAINABLE
from fastrl_kernels.objectives import Objective, Parameter, check_objective, check_per_token
from fastrl_kernels.objectives.arguments import to_arguments as objective_to_arguments
from fastrl_kernels.plan import explain
from fastrl_kernels.policy_loss.one_pass import Tokens, check_products
from fastrl_kernels.policy_loss.op import policy_loss_op
from fastrl_kernels.policy_loss.reference import PolicyLoss, policy_loss_reference
from fastrl_kernels.token_loss import token_loss

__all__ = ["PolicyLoss", "policy_loss", "policy_loss_reference"]


def policy_loss(
    hidden_states: Tensor,
    lm_head: LMHead | Tensor,
    target_ids: Tensor,
    advantages: Tensor,
    token_weights: Tensor,
    *,
    objective: Objective,
    old_logps: Tensor | None = None,
    ref_logps: Tensor | None = None,
    rollout_weights: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    entropy_coef: Parameter = 0.0,
    workspace_mb: float = 256,
    engine: str = "auto",
    batch_invariant: bool = False,
    accumulate_grad: bool = False,
    check: bool = False,
    products: str = "auto",
    implementation: str = "auto",
) -> PolicyLoss:
    """Sum over tokens of token_weight * (objective - entropy_coef * entropy), without logits.

    hidden_states, lm_head, target_ids, temperature, workspace_mb, batch_invariant: as in
    `linear_logps`. advantages, token_weights, old_logps, ref_logps, rollout_weights: (S,) floating
    point constants. token_weights carry all averaging and masking; a row of weight 0 is ignored.
    Without old_logps the policy is its own old policy, and every ratio is exactly 1. entropy_coef:
    a number, or a tensor as a parameter of the objective may be.

    engine: "one_pass" makes the gradients while the logits are there and gives them away in one
    backward; "min_memory" makes the logits again in backward; "auto" asks `explain`.
    accumulate_grad: backward adds the weight's gradient into `weight.grad` itself, past hooks and
    without a second tensor of that size; the weight must be a leaf. check: raise where an input or
    the loss is not finite, which waits for the device. products, of the Triton one-pass engine
    alone: "gather" skips rows without a gradient, "cublas" takes whole chunks, "auto" picks.
    """
    implementation = choose_implementation(implementation, hidden_states)
    head = as_lm_head(lm_head)
    check_inputs(hidden_states, head, target_ids)
    check_objective(objective, ref_logps, target_ids)
    dtype = accumulation_dtype(hidden_states.dtype)
    given = {
        "advantages": advantages,
        "token_weights": token_weights,
        "old_logps": old_logps,
        "ref_logps": ref_logps if objective.needs_ref_logps else None,
        "rollout_weights": rollout_weights,
    }
    for name, tensor in given.items():
        check_per_token(name, tensor, hidden_states)
    tokens = Tokens._make(None if x is None else x.detach().to(dtype) for x in given.values())
    check_accumulation(head, accumulate_grad)
    check_products(products, hidden_states.dtype)
    # A row of weight 0 counts as ignored, whatever it holds.
    target_ids = torch.where(tokens.weights != 0, target_ids, -1)
    plan = explain(
        hidden_states, head, engine=engine, workspace_mb=workspace_mb,
        batch_invariant=batch_invariant,
    )  # fmt: skip
    run = _min_memory if plan.engine == "min_memory" else _one_pass
    settings = Settings(
        temperature, entropy_coef, workspace_mb, batch_invariant, accumulate_grad, implementation,
        products,
    )  # fmt: skip
    result = run(hidden_states, head, target_ids, tokens, objective, settings)
    if check:
        check_finite(result.loss, hidden_states=hidden_states, **head._asdict(), **given)
    return result


class Settings(NamedTuple):
    """How one call runs, apart from its tensors."""

    temperature: float | Tensor
    entropy_coef: Parameter
    workspace_mb: float
    batch_invariant: bool
    accumulate_grad: bool
    implementation: str
    products: str


def _one_pass(
    hidden_states: Tensor, head: LMHead, target_ids: Tensor, tokens: Tokens, objective: Objective,
    settings: Settings,
) -> PolicyLoss:  # fmt: skip
    arguments = to_arguments(head)
    trainable = (hidden_states, *arguments[: NUM_TRAINABLE - 1])
    needs_grad = [
        torch.is_grad_enabled() and isinstance(tensor, Tensor) and tensor.requires_grad
        for tensor in trainable
    ]
    dtype = accumulation_dtype(hidden_states.dtype)
    outputs = policy_loss_op(
        hidden_states, *arguments[:NUM_TENSORS], target_ids,
        per_token_temperature(settings.temperature, hidden_states), *tokens,
        *arguments[NUM_TENSORS:],
        *objective_to_arguments(objective, settings.entropy_coef, dtype, hidden_states.device),
        settings.workspace_mb, settings.batch_invariant,
        settings.accumulate_grad, settings.implementation, settings.products, needs_grad,
    )  # fmt: skip
    return PolicyLoss._make(outputs[: len(PolicyLoss._fields)])


def _min_memory(
    hidden_states: Tensor, head: LMHead, target_ids: Tensor, tokens: Tokens, objective: Objective,
    settings: Settings,
) -> PolicyLoss:  # fmt: skip
    """Statistics first, then the objective on (S,) numbers; backward makes the logits again."""
    out = linear_logps(
        hidden_states, head, target_ids, temperature=settings.temperature,
        workspace_mb=settings.workspace_mb, batch_invariant=settings.batch_invariant,
        accumulate_grad=settings.accumulate_grad, implementation=settings.implementation,
    )  # fmt: skip
    tokens_out = token_loss(
        out.logps, out.entropies, tokens.advantages, tokens.weights.masked_fill(target_ids < 0, 0),
        objective=objective, old_logps=tokens.old_logps, ref_logps=tokens.ref_logps,
        rollout_weights=tokens.rollout_weights, entropy_coef=settings.entropy_coef,
        implementation=settings.implementation,
    )  # fmt: skip
    return PolicyLoss(
        loss=tokens_out.loss,
        logps=out.logps.detach(),
        entropies=out.entropies.detach(),
        slopes=tokens_out.slopes,
        clipped=tokens_out.clipped,
    )
