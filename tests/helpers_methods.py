"""Steps as a method sees them, without a model, and what the loss makes of them.

Legend: B completions, S trained tokens.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from fastrl.config import ObjectiveConfig
from fastrl.methods import Method, resolve_method
from fastrl.methods.coefficients import (
    Coefficients,
    coefficients,
)
from fastrl.methods.estimates import estimated, rows_to_train
from fastrl.methods.inputs import StepInputs
from fastrl.methods.needs import estimates_from_tokens
from fastrl_kernels.objectives import TokenLosses, evaluate

SIZES = {
    "dapo": {"cache": 4.0},
    "scalerl": {"max_thinking_tokens": 0},
    **{name: {"critic_warmup_steps": 0} for name in ("ppo_max", "vc_ppo", "vapo")},
}
"""Numbers of methods that are published for completions of thousands of tokens, and for runs of
hundreds of steps."""


def small_method(name: str) -> Method:
    """A method with numbers that suit completions of few tokens."""
    return resolve_method(name, ObjectiveConfig(parameters=SIZES.get(name, {})))


def step_inputs(
    group_sizes: list[int], lengths: list[int], *, seed: int = 0, log_ratio: float = 0.3,
    equal_rewards: bool = False, infinite: bool = False, dtype: torch.dtype = torch.float64,
) -> StepInputs:  # fmt: skip
    """A random step; lengths repeat over the completions, which are in any order of their prompts.

    log_ratio: how far the policies are apart. infinite: the sampler said +-inf now and then.
    """
    generator = torch.Generator().manual_seed(seed)
    groups = torch.repeat_interleave(torch.arange(len(group_sizes)), torch.tensor(group_sizes))
    num = len(groups)
    groups = groups[torch.randperm(num, generator=generator)]
    counted = torch.tensor([lengths[i % len(lengths)] for i in range(num)])
    index = torch.repeat_interleave(torch.arange(num), counted)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    def policy() -> Tensor:
        moved = logps + log_ratio * (2 * uniform(len(index)) - 1)
        return moved.clamp(max=0.0)

    logps = -4 * uniform(len(index)) - (log_ratio if log_ratio > 1 else 0.0)
    rollout_logps = policy()
    if infinite:
        rollout_logps[::3], rollout_logps[1::5] = -torch.inf, torch.inf
    parts = torch.randint(0, 2, (2, num), generator=generator).double()
    parts[1] *= uniform(num)
    rewards = torch.ones(num, dtype=torch.float64) if equal_rewards else parts.mean(0)
    sum_p2 = (0.05 + 0.9 * uniform(len(index))).to(dtype)
    return StepInputs(
        rewards=rewards,
        groups=groups,
        lengths=counted,
        finished=uniform(num) > 0.3,
        max_completion_length=16,
        progress=uniform(1)[0],
        generator=generator,
        reward_parts=torch.ones_like(parts) if equal_rewards else parts,
        ref_rewards=rewards,
        ref_groups=groups,
        baselines=rewards,
        completion_index=index,
        logps=logps.to(dtype),
        old_logps=policy().to(dtype),
        ref_logps=policy().to(dtype),
        rollout_logps=rollout_logps.to(dtype),
        entropies=(3 * uniform(len(index))).to(dtype),
        sum_p2=sum_p2,
        sum_p3=sum_p2.square(),
        squared_hidden_norms=(100 * uniform(len(index))).to(dtype),
        values=uniform(len(index)).to(dtype),
        reward_scale=torch.tensor(0.5, dtype=torch.float64),
    )


def token_losses(found: Coefficients, inputs: StepInputs) -> TokenLosses:
    """Value and slope of the loss at every token, not yet weighted."""
    assert inputs.logps is not None
    assert inputs.old_logps is not None
    return evaluate(
        found.objective, inputs.logps, inputs.old_logps, inputs.ref_logps, found.advantages,
        found.rollout_weights,
    )  # fmt: skip


def loss_of(method: Method, inputs: StepInputs) -> tuple[StepInputs, Coefficients, TokenLosses]:
    """All of the above."""
    inputs, advantages, _ = rows_to_train(method, inputs)
    if estimates_from_tokens(method):
        inputs = estimated(method, inputs)
    elif method.has_advantage:
        inputs = dataclasses.replace(inputs, advantages=advantages[inputs.tokens])
    found = coefficients(method, inputs)
    return inputs, found, token_losses(found, inputs)
