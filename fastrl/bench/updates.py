"""An update of a policy in whatever way a technique makes it.

Legend: b rows of a batch, C completion length, S trained tokens, V vocabulary, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastrl.bench.modes import Modes
from fastrl.bench.techniques import Technique
from fastrl.bench.workload import Layout, Workload, packed_passes, padded_rows
from fastrl.loss import policy_pass_loss
from fastrl.packing import PackedPass
from fastrl.policy import Policy
from fastrl_kernels import policy_loss
from fastrl_kernels.objectives import SURROGATES, Objective

EPSILON = 0.2
OBJECTIVE = Objective(SURROGATES["clipped_ratio"], (EPSILON, EPSILON))


class Updates:
    """A policy and a workload, and every technique as a call that adds to its gradients."""

    def __init__(self, policy: Policy, work: Workload, layout: Layout, temperature: float) -> None:
        self.policy = policy
        self.work = work
        self.layout = layout
        self.temperature = temperature
        self.modes = Modes(policy.model)
        self.passes: dict[tuple[bool, bool], list[PackedPass]] = {}

    def step(self, technique: Technique) -> Callable[[], float]:
        """The update as a call that returns its loss; what is packed is packed here."""
        passes: list[PackedPass] = []
        if technique.is_packed:
            key = (technique.shares_prompts, technique.drops_tokens)
            if key not in self.passes:
                self.passes[key] = packed_passes(
                    self.work, self.layout, shares=key[0], drops=key[1]
                )
            passes = self.passes[key]

        def run() -> float:
            is_fused = technique.is_fused
            total = 0.0
            for loss in self._packed_losses(passes) if passes else self._padded_losses(is_fused):
                loss.backward()
                total += float(loss.detach())
            return total

        return run

    def switch(self, technique: Technique) -> None:
        """Let the model compute as the technique does, from now on."""
        self.modes.switch(technique, self.policy.device)

    def release(self) -> None:
        """Free the gradients."""
        self.policy.model.zero_grad(set_to_none=True)

    def _packed_losses(self, passes: list[PackedPass]) -> Iterator[Tensor]:
        for item in passes:
            hidden = self.policy.hidden_states(item.plan)
            yield policy_pass_loss(
                hidden, self.policy.lm_head, item.batch, objective=OBJECTIVE,
                temperature=self.temperature, entropy_coef=0.0,
            ).loss  # fmt: skip

    def _padded_losses(self, is_fused: bool) -> Iterator[Tensor]:
        for rows in padded_rows(self.work, self.layout):
            batch = self._padded(rows)
            yield self._fused_loss(batch) if is_fused else self._stored_loss(batch)

    def _padded(self, rows: range) -> _Padded:
        """Some completions behind their prompts, padded on the right."""
        work, device = self.work, self.layout.device
        G = work.rollouts.num_generations
        completions = [work.rollouts.completion_ids[b] for b in rows]

        def padded(values: list[Tensor]) -> Tensor:
            return torch.nn.utils.rnn.pad_sequence(values, batch_first=True).to(device)

        targets = padded(completions)
        prompts = torch.stack([work.rollouts.prompts.token_ids[b // G] for b in rows]).to(device)
        mask = padded([torch.ones_like(ids) for ids in completions])
        return _Padded(
            torch.cat([prompts, targets], dim=1),
            torch.cat([torch.ones_like(prompts), mask], dim=1),
            targets,
            mask.bool(),
            work.advantages[list(rows)].to(device, self.layout.dtype),
            padded([work.weights[b] for b in rows]).to(self.layout.dtype),
        )

    def _stored_loss(self, batch: _Padded) -> Tensor:
        """As one writes it with transformers: logits of the completions, kept until backward."""
        num_kept = batch.targets.shape[1] + 1  # the last one predicts what nobody sampled
        with self.policy.autocast():
            logits = self.policy.model(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False,
                logits_to_keep=num_kept,
            ).logits[:, -num_kept:-1]  # fmt: skip
        logps = (logits.float() / self.temperature).log_softmax(-1)  # (b, C, V)
        logps = logps.gather(-1, batch.targets[..., None])[..., 0]
        ratio = (logps - logps.detach()).exp()
        advantages = batch.advantages[:, None]
        clipped = ratio.clamp(1 - EPSILON, 1 + EPSILON) * advantages
        values = torch.minimum(ratio * advantages, clipped)
        return -torch.where(batch.mask, batch.weights * values, 0).sum()

    def _fused_loss(self, batch: _Padded) -> Tensor:
        """The same from hidden states, without logits."""
        with self.policy.autocast():
            hidden = self.policy.body(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
            ).last_hidden_state
        num_kept = batch.targets.shape[1] + 1
        states = hidden[:, -num_kept:-1][batch.mask].to(self.policy.head_dtype)  # (S, D)
        advantages = batch.advantages[:, None].expand_as(batch.weights)[batch.mask]
        return policy_loss(
            states, self.policy.lm_head, batch.targets[batch.mask], advantages,
            batch.weights[batch.mask], objective=OBJECTIVE, temperature=self.temperature,
        ).loss  # fmt: skip


class _Padded(NamedTuple):
    """Rows of one pass."""

    input_ids: Tensor  # (b, P + C)
    attention_mask: Tensor  # likewise
    targets: Tensor  # (b, C)
    mask: Tensor  # (b, C) bool
    advantages: Tensor  # (b,)
    weights: Tensor  # (b, C)
