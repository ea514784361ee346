"""Losses and gradients of TRL's own GRPOTrainer on the same inputs."""

from __future__ import annotations

import collections
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastrl.config import ObjectiveConfig
from fastrl.methods import Method, resolve_method
from fastrl.methods.coefficients import coefficients
from fastrl.methods.inputs import StepInputs
from fastrl_kernels import token_loss

B, G, C = 8, 4, 11  # completions, generations, longest completion
LENGTHS = torch.tensor([11, 3, 7, 1, 5, 9, 2, 8])
MASK = torch.arange(C) < LENGTHS[:, None]


class Step:
    """Random numbers of one step as (B, C) tables, zero past the end of a completion."""

    def __init__(self, log_ratio: float) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.old_logps = -self.normal().abs() - 0.1
        self.logps = (self.old_logps + log_ratio * self.normal()).masked_fill(~MASK, 0)
        self.ref_logps = (self.logps + 0.4 * self.normal()).masked_fill(~MASK, 0)
        self.rollout_logps = (self.old_logps + 0.5 * self.normal()).masked_fill(~MASK, 0)
        self.entropies = self.normal().abs()
        self.advantages = torch.randn(B, generator=self.generator, dtype=torch.float64)
        self.advantages[2] = 0

    def normal(self) -> Tensor:
        values = torch.randn(B, C, generator=self.generator, dtype=torch.float64)
        return values.masked_fill(~MASK, 0)


def of_trl(step: Step, **settings: Any) -> tuple[float, Tensor]:
    """Loss and gradient of the log-probabilities from TRL's `_compute_loss`."""
    grpo = pytest.importorskip("trl.trainer.grpo_trainer")
    accelerate = pytest.importorskip("accelerate")
    logps = step.logps.clone().requires_grad_()
    trainer = object.__new__(grpo.GRPOTrainer)
    arguments = {
        "delta": None, "use_bias_correction_kl": False, "sapo_temperature_pos": 1.0,
        "sapo_temperature_neg": 1.05, "vespo_k_pos": 2.0, "vespo_lambda_pos": 3.0,
        "vespo_k_neg": 3.0, "vespo_lambda_neg": 2.0, "steps_per_generation": 1,
        "report_to": [],
    }  # fmt: skip
    attributes = {
        "beta": 0.0, "epsilon_low": 0.2, "epsilon_high": 0.28, "loss_type": "grpo",
        "importance_sampling_level": "token", "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None, "use_vllm": False, "aux_loss_enabled": False,
        "vllm_importance_sampling_correction": False, "max_completion_length": 16,
        "current_gradient_accumulation_steps": 1, "_entropy_bonus_enabled": False,
    }  # fmt: skip
    attributes |= {key: value for key, value in settings.items() if key not in arguments}
    arguments |= {key: value for key, value in settings.items() if key in arguments}
    trainer.__dict__ |= attributes
    trainer.__dict__ |= {
        "args": SimpleNamespace(**arguments),
        "model": SimpleNamespace(training=True),
        "_metrics": collections.defaultdict(lambda: collections.defaultdict(list)),
        "accelerator": accelerate.Accelerator(cpu=True),
        "_get_per_token_logps_and_entropies": lambda *_, **__: (logps, step.entropies, None),
    }
    ratio = (step.old_logps - step.rollout_logps).exp().clamp(max=2)
    sampler = {"importance_sampling_ratio": ratio} if attributes["use_vllm"] else {}
    ids = torch.zeros(B, C, dtype=torch.int64)
    loss = trainer._compute_loss(
        trainer.model,
        {
            "prompt_ids": ids[:, :1], "prompt_mask": ids[:, :1], "completion_ids": ids,
            "completion_mask": MASK.long(), "advantages": step.advantages,
            "old_per_token_logps": step.old_logps, "ref_per_token_logps": step.ref_logps,
            "num_items_in_batch": MASK.sum(), **sampler,
        },
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(loss, logps)
    return float(loss.detach()), gradient


def of_ours(step: Step, method: Method) -> tuple[float, Tensor]:
    """The same from the method's record."""
    index = torch.arange(B).repeat_interleave(LENGTHS)
    logps = step.logps[MASK].requires_grad_()
    inputs = StepInputs(
        rewards=torch.zeros(B, dtype=torch.float64), groups=torch.arange(B) // G, lengths=LENGTHS,
        finished=torch.ones(B, dtype=torch.bool), max_completion_length=16,
        progress=torch.zeros(()), completion_index=index, logps=logps.detach(),
        old_logps=step.old_logps[MASK], ref_logps=step.ref_logps[MASK],
        rollout_logps=step.rollout_logps[MASK], entropies=step.entropies[MASK],
        advantages=step.advantages[index],
    )  # fmt: skip
    found = coefficients(method, inputs)
    out = token_loss(
        logps, step.entropies[MASK], found.advantages, found.token_weights,
        objective=found.objective, old_logps=inputs.old_logps, ref_logps=inputs.ref_logps,
        rollout_weights=found.rollout_weights, entropy_coef=found.entropy_coef,
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(out.loss, logps)
    loss = float(out.loss.detach())
    if found.loss is not None:
        loss += float(found.loss + (found.token_weights * found.advantages * logps.detach()).sum())
    table = torch.zeros(B, C, dtype=torch.float64)
    table[MASK] = gradient
    return loss, table


CLIP_HIGHER = ObjectiveConfig(epsilon_high=0.28)
SEQUENCE = {"importance_sampling_level": "sequence", "epsilon_low": 0.05, "epsilon_high": 0.08}
NARROW = ObjectiveConfig(epsilon_low=0.05, epsilon_high=0.08)
CASES: dict[str, tuple[dict[str, Any], str, ObjectiveConfig]] = {
    "grpo": ({}, "grpo", CLIP_HIGHER),
    "grpo with k3": (
        {"beta": 0.04}, "grpo", ObjectiveConfig(epsilon_high=0.28, beta=0.04),
    ),
    "grpo with unbiased k3": (
        {"beta": 0.04, "use_bias_correction_kl": True, "epsilon_high": 100.0, "epsilon_low": 1.0},
        "grpo",
        ObjectiveConfig(surrogate="importance_ratio", beta=0.04, regulariser="k3_is"),
    ),
    "two-sided clip": (
        {"delta": 1.5}, "grpo",
        ObjectiveConfig(
            surrogate="two_sided_clipped_ratio", epsilon_high=0.28, parameters={"delta": 1.5}
        ),
    ),
    "bnpo": ({"loss_type": "bnpo"}, "bnpo", CLIP_HIGHER),
    "dr_grpo": ({"loss_type": "dr_grpo"}, "dr_grpo", CLIP_HIGHER),
    "dapo": ({"loss_type": "dapo"}, "lite_ppo", CLIP_HIGHER),
    "cispo": ({"loss_type": "cispo", "epsilon_high": 5.0}, "cispo", ObjectiveConfig()),
    "sapo": ({"loss_type": "sapo"}, "sapo_soft", ObjectiveConfig()),
    "vespo": ({"loss_type": "vespo"}, "vespo", ObjectiveConfig()),
    "gspo": (SEQUENCE, "gspo", NARROW),
    "luspo": ({"loss_type": "luspo", **SEQUENCE}, "luspo", NARROW),
    "entropy quantile": (
        {"loss_type": "dapo", "top_entropy_quantile": 0.2}, "entropy_top20", ObjectiveConfig(),
    ),
    "truncated importance sampling": (
        {"use_vllm": True, "vllm_importance_sampling_correction": True}, "grpo",
        ObjectiveConfig(epsilon_high=0.28, rollout_correction="truncated_tokens"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("log_ratio", [0.0, 0.1, 0.7])
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_are_those_of_trl(case: str, log_ratio: float) -> None:
    settings, name, overrides = CASES[case]
    step = Step(log_ratio)
    expected_loss, expected = of_trl(step, **settings)
    loss, gradient = of_ours(step, resolve_method(name, overrides))
    assert loss == pytest.approx(expected_loss, rel=1e-6, abs=1e-9)
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-9)
    assert gradient.abs().max() > 0 or log_ratio > 0


def test_every_loss_type_is_here() -> None:
    """TRL's list of loss types, read off its own error."""
    config = pytest.importorskip("trl").GRPOConfig
    text = str(config.__dataclass_fields__["loss_type"].metadata.get("help", ""))
    named = {kind for kind in ("grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo")
             if f"`{kind}`" in text or f"'{kind}'" in text or f'"{kind}"' in text}  # fmt: skip
    assert named <= {settings.get("loss_type", "grpo") for settings, _, _ in CASES.values()}
