"""Inputs for the tests of policy_loss, and the loss written down once more from its formulas.

The transcription uses plain matrix products and autograd, nothing of the library: PPO-clip
(arXiv:1707.06347), the k3 penalty (arXiv:2402.03300 equation 4), an entropy bonus, and constant
weights for tokens of another policy.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrl_kernels import LMHead, PolicyLoss, policy_loss
from fastrl_kernels.nf4 import NF4Weight
from fastrl_kernels.objectives import Objective, Regulariser, clipped_ratio, k3

S, D, V, R = 39, 19, 123, 3  # of which 31 count, so that chunks are ragged
PADDING = 6
SMALL = 0.12  # MiB: a few rows a chunk, several slices of the vocabulary
ENGINES = ("one_pass", "min_memory")
LOW, HIGH, BETA, ENTROPY_COEF = 0.2, 0.28, 0.07, 0.03
OBJECTIVE = Objective(clipped_ratio, (LOW, HIGH), (Regulariser(k3, BETA),))
TENSORS = ("hidden_states", "weight", "bias", "lora_a", "lora_b")


class Case(NamedTuple):
    """The arguments of one call."""

    hidden_states: Tensor
    head: LMHead
    target_ids: Tensor
    advantages: Tensor
    token_weights: Tensor
    old_logps: Tensor | None
    ref_logps: Tensor | None
    rollout_weights: Tensor | None
    temperature: float | Tensor

    def leaves(self) -> list[Tensor]:
        """hidden_states and the tensors of the head, all requiring gradients from now on."""
        tensors = (self.hidden_states, *self.head[:4])
        return [x.requires_grad_() for x in tensors if isinstance(x, Tensor)]

    def to(self, dtype: torch.dtype) -> Case:
        """The same numbers rounded to a dtype; what is per token stays as it is."""
        parts = {name: x.detach().to(dtype) for name, x in self.tensors().items()}
        hidden_states = parts.pop("hidden_states")
        return self._replace(hidden_states=hidden_states, head=self.head._replace(**parts))

    def tensors(self) -> dict[str, Tensor]:
        """What can be trained, by name."""
        values = zip(TENSORS, (self.hidden_states, *self.head[:4]), strict=True)
        return {name: x for name, x in values if isinstance(x, Tensor)}

    def rows(self, index: Any) -> Case:
        """Some of the tokens."""
        fields = {name: value for name, value in self._asdict().items() if name != "head"}
        return self._replace(
            **{name: x[index] for name, x in fields.items() if isinstance(x, Tensor)}
        )


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def make_case(
    seed: int = 0, *, num_tokens: int = S, per_token: bool = False, spread: float = 0.3,
    **features: Any,
) -> Case:  # fmt: skip
    """Everything in float64, every fifth token ignored or of weight 0; features of the LMHead.

    per_token: one temperature for each token.
    spread: of the log-ratios to the old and the reference policy, wide enough to clip some tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    hidden_states = normal(generator, num_tokens, D)
    head = LMHead(normal(generator, V, D), normal(generator, V) * 3)
    head = head._replace(lora_a=normal(generator, R, D), lora_b=normal(generator, V, R))
    head = head._replace(**features)
    target_ids = torch.randint(0, head.num_columns, (num_tokens,), generator=generator)
    target_ids[2::10] = -100
    weights = torch.rand(num_tokens, generator=generator, dtype=torch.float64) / max(1, num_tokens)
    weights[7::10] = 0.0
    case = Case(
        hidden_states=hidden_states,
        head=head,
        target_ids=target_ids,
        advantages=normal(generator, num_tokens),
        token_weights=weights,
        old_logps=None,
        ref_logps=None,
        rollout_weights=torch.rand(num_tokens, generator=generator, dtype=torch.float64) + 0.5,
        temperature=torch.linspace(0.5, 2, num_tokens).double() if per_token else 0.8,
    )
    logps = transcribe(case)["logps"].detach()
    return case._replace(
        old_logps=logps + spread * normal(generator, num_tokens),
        ref_logps=logps + spread * normal(generator, num_tokens),
    )


def random_nf4(seed: int = 0) -> tuple[NF4Weight, Tensor]:
    """A 4-bit (V, D) weight of random bytes, and the float64 values that it stands for."""
    generator = torch.Generator().manual_seed(seed)
    num_values, block_size = V * D, 64
    nibbles = torch.randint(0, 16, (2 * -(-num_values // 2),), generator=generator)
    packed = (16 * nibbles[::2] + nibbles[1::2]).to(torch.uint8)
    codebook = torch.linspace(-1, 1, 16)
    absmax = torch.rand(-(-num_values // block_size), generator=generator) + 0.5
    values = codebook[nibbles[:num_values]] * absmax.repeat_interleave(block_size)[:num_values]
    weight = NF4Weight(packed, absmax, codebook, block_size, V, D, torch.float64)
    return weight, values.double().view(V, D)


def transcribe(
    case: Case, objective: Objective = OBJECTIVE, entropy_coef: float = ENTROPY_COEF
) -> dict[str, Tensor]:
    """Every field of PolicyLoss; zeros on ignored tokens. Of the objective, its numbers only."""
    kept = (case.target_ids >= 0) & (case.token_weights != 0)
    head, hidden = case.head, case.hidden_states[kept]
    columns = slice(0, head.vocab_size)
    logits = hidden @ head.weight[columns].T
    if head.lora_a is not None and head.lora_b is not None:
        logits = logits + head.lora_scale * (hidden @ head.lora_a.T) @ head.lora_b[columns].T
    if head.bias is not None:
        logits = logits + head.bias[columns]
    logits = logits * head.logit_scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    temperature = case.temperature
    logits = logits / (temperature[kept, None] if isinstance(temperature, Tensor) else temperature)
    shifted = logits - logits.detach().max(1, keepdim=True).values
    all_logps = shifted - shifted.exp().sum(1, keepdim=True).log()
    entropies = -(all_logps.exp() * all_logps).sum(1)
    logps = all_logps[torch.arange(len(hidden)), case.target_ids[kept]]
    slopes_of = logps.detach().requires_grad_()

    def losses(logps: Tensor) -> tuple[Tensor, Tensor]:
        """Without the entropy bonus; and which tokens the clip stopped."""
        advantages = case.advantages[kept]
        old_logps = logps.detach() if case.old_logps is None else case.old_logps[kept]
        ratio = torch.exp(logps - old_logps)
        low, high = 1 - objective.hyper_parameters[0], 1 + objective.hyper_parameters[1]
        values = -torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)
        stopped = ((ratio > high) & (advantages > 0)) | ((ratio < low) & (advantages < 0))
        if case.rollout_weights is not None:
            values = values * case.rollout_weights[kept]
        if objective.regularisers and case.ref_logps is not None:
            delta = case.ref_logps[kept] - logps
            values = values + BETA * (delta.exp() - delta - 1)
        return case.token_weights[kept] * values, stopped

    values, stopped = losses(logps)
    (slopes,) = torch.autograd.grad(losses(slopes_of)[0].sum(), slopes_of)
    bonus = entropy_coef * (case.token_weights[kept] * entropies).sum()
    zeros = torch.zeros(len(kept), dtype=logits.dtype)
    return {
        "loss": values.sum() - bonus,
        "logps": zeros.masked_scatter(kept, logps),
        "entropies": zeros.masked_scatter(kept, entropies),
        "slopes": zeros.masked_scatter(kept, slopes),
        "clipped": torch.zeros_like(kept).masked_scatter(kept, stopped),
    }


def run(case: Case, **settings: Any) -> PolicyLoss:
    """policy_loss with the objective of the transcription, unless told otherwise."""
    defaults: dict[str, Any] = {"objective": OBJECTIVE, "entropy_coef": ENTROPY_COEF}
    function = settings.pop("function", policy_loss)
    return function(
        case.hidden_states, case.head, case.target_ids, case.advantages, case.token_weights,
        old_logps=case.old_logps, ref_logps=case.ref_logps, rollout_weights=case.rollout_weights,
        temperature=case.temperature, **{**defaults, **settings},
    )  # fmt: skip


def loss_and_gradients(case: Case, **settings: Any) -> tuple[PolicyLoss, tuple[Tensor, ...]]:
    """The result, and the gradients of everything that can be trained."""
    leaves = case.leaves()
    out = run(case, **settings)
    return out, torch.autograd.grad(out.loss, leaves)
