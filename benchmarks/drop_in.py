"""TRL's trainers on completions that are given, as they are and accelerated: one update at a time.

P prompt tokens, R completion tokens, G num_generations.
"""

from __future__ import annotations

import tempfile
import time
from itertools import repeat
from typing import Any, NamedTuple

import torch
from bench_shared_prefix import Case
from measure import peak_on_cpu
from torch import Tensor
from updates import Batch, Plan, batches, rollout_of, save_model

from fastrl.integrations.trl import accelerate_trl

SEED = 5  # of TRL's shuffling, the same for both
SMALL = 0.1


class Setting(NamedTuple):
    """What is trained, and how."""

    name: str
    case: Case
    arguments: dict[str, Any] | None = None
    """Of TRL's config, beyond those that all have."""
    num_micro_batches: int = 1
    is_preference: bool = False
    """DPO on two completions of each prompt."""

    def __str__(self) -> str:
        return f"{self.name}, {self.case}"


class Outcome(NamedTuple):
    """What one update computed."""

    loss: float
    grad_norm: float
    gradients: list[Tensor]


class Updates:
    """A trainer whose generation is done: every update trains the same completions.

    The learning rate is 0, so that the optimizer does all its work and the weights stay.
    """

    def __init__(self, setting: Setting, *, is_ours: bool, quick: bool) -> None:
        plan = Plan(setting.case, 1, 1, quick)
        with tempfile.TemporaryDirectory() as directory:
            save_model(directory, quick)
            build = _dpo_trainer if setting.is_preference else _grpo_trainer
            self.trainer, self.batch = build(setting, plan, directory)
        trainer = self.trainer
        if is_ours:
            accelerate_trl(trainer, strict=True)
        trainer.create_optimizer_and_scheduler(num_training_steps=1000)
        self.model, trainer.optimizer = trainer.accelerator.prepare(
            trainer.model, trainer.optimizer
        )
        self.num_micro_batches = setting.num_micro_batches
        trainer.current_gradient_accumulation_steps = setting.num_micro_batches
        if not setting.is_preference:
            self.model.train()
            scored = trainer._generate_and_score_completions(self.batch)
            trainer._generate_and_score_completions = lambda _: scored

    def backward(self) -> float:
        """The loss of all micro-batches, whose gradients are in the weights."""
        torch.manual_seed(SEED)
        state, total = self.trainer.accelerator.gradient_state, 0.0
        for index in range(self.num_micro_batches):
            state._set_sync_gradients(index == self.num_micro_batches - 1)
            # A loss counts by its share of the step; TRL has divided by it already.
            total += float(self.trainer.training_step(self.model, dict(self._inputs()), None))
        return total

    def _inputs(self) -> Any:
        return self.batch if isinstance(self.batch, dict) else {"prompts": self.batch}

    def update(self) -> float:
        """Seconds from completions to new weights, as transformers' training loop does it."""
        began = time.perf_counter()
        self.backward()
        norm = self.trainer._clip_grad_norm(self.model)
        self.trainer._get_grad_norm(self.model, grad_norm=norm)
        self.trainer.optimizer.step()
        self.model.zero_grad()
        return time.perf_counter() - began

    def outcome(self) -> Outcome:
        """What an update computes, before it is clipped."""
        loss = self.backward()
        gradients = [p.grad.clone() for p in self.model.parameters() if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients))
        self.model.zero_grad()
        return Outcome(loss, norm, gradients)


def peak_of(setting: Setting, is_ours: bool, quick: bool) -> int:
    """Peak bytes of an update beyond weights, gradients and optimizer states, in this process."""
    updates = Updates(setting, is_ours=is_ours, quick=quick)
    gradients = sum(p.numel() * p.element_size() for p in updates.model.parameters())
    return peak_on_cpu(updates.update, lambda: None) - gradients


def errors(ours: Outcome, theirs: Outcome) -> tuple[float, float]:
    """Relative differences: of loss and norm, and of gradients by each tensor's largest value.

    A loss sums advantages of either sign, about 1 each: below SMALL it is what rounding left.
    """
    of_loss = abs(ours.loss - theirs.loss) / max(abs(theirs.loss), SMALL)
    of_norm = abs(ours.grad_norm - theirs.grad_norm) / theirs.grad_norm
    assert len(ours.gradients) == len(theirs.gradients)
    pairs = zip(ours.gradients, theirs.gradients, strict=True)
    of_gradients = max(float((x - y).abs().max() / y.abs().max()) for x, y in pairs)
    return max(of_loss, of_norm), of_gradients


def _arguments(setting: Setting, directory: str) -> dict[str, Any]:
    size = setting.case.num_prompts * setting.case.num_generations
    return {
        "output_dir": directory, "use_cpu": True, "bf16": False, "report_to": [],
        "save_strategy": "no", "per_device_train_batch_size": size // setting.num_micro_batches,
        "gradient_accumulation_steps": setting.num_micro_batches, "max_steps": 1000,
        "learning_rate": 0.0, "weight_decay": 0.0, "lr_scheduler_type": "constant",
        "disable_tqdm": True, "seed": 0, "gradient_checkpointing": False,
    }  # fmt: skip


def _grpo_trainer(setting: Setting, plan: Plan, directory: str) -> tuple[Any, Any]:
    """The trainer, and the examples that it makes its completions for."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    case = setting.case
    size = case.num_prompts * case.num_generations
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    (given,) = batches(plan, model.config.vocab_size)

    settings = _arguments(setting, directory) | {
        # Prompts of one completion each are a group to TRL, for their advantages alone.
        "num_generations": case.num_generations if case.num_generations > 1 else size,
        "steps_per_generation": setting.num_micro_batches, "num_iterations": 1,
        "max_completion_length": case.completion_length, "beta": 0.0, "loss_type": "dapo",
    }  # fmt: skip
    trainer = GRPOTrainer(
        model=model, reward_funcs=lambda given, **_: given,
        args=GRPOConfig(**{**settings, **(setting.arguments or {})}),
        train_dataset=Dataset.from_dict({"prompt": ["1"] * size}),
        processing_class=AutoTokenizer.from_pretrained(directory),
        rollout_func=rollout_of(repeat(given), case.num_generations),
    )  # fmt: skip
    return trainer, [{"prompt": "1"} for _ in range(size)]  # each gets its own reward


def _dpo_trainer(setting: Setting, plan: Plan, directory: str) -> tuple[Any, Any]:
    """The trainer, and a batch of pairs from its own collator."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    (given,) = batches(plan, model.config.vocab_size)
    settings = _arguments(setting, directory) | (setting.arguments or {})
    settings |= {"per_device_train_batch_size": setting.case.num_prompts, "max_length": None}
    row = {"prompt": "1", "chosen": "2", "rejected": "3"}
    trainer = DPOTrainer(
        model=model, args=DPOConfig(**settings),
        train_dataset=Dataset.from_list([row] * setting.case.num_prompts),
        processing_class=AutoTokenizer.from_pretrained(directory),
    )  # fmt: skip
    return trainer, trainer.data_collator(_pairs(given))


def _pairs(given: Batch) -> list[dict[str, list[int]]]:
    """Two completions of each prompt, the first of them chosen."""
    return [
        {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
        for prompt, chosen, rejected in zip(
            given.prompts, given.completions[::2], given.completions[1::2], strict=True
        )
    ]
