"""Real TRL trainers on a tiny model, and one batch that has everything a batch may have."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from fastrl.policy import train_tokenizer
from tests.helpers import TEXTS, tiny_model

PROMPTS = ["What is 1 + 2?", "What is 11 + 4?", "7", "Say 5"]


def save_tiny(directory: Path, model_type: str = "qwen3", **fields: Any) -> str:
    """A random model with its tokenizer, as TRL's trainers load it; some completions end."""
    tokenizer = train_tokenizer(TEXTS, vocab_size=260)
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    model = tiny_model(
        model_type, vocab_size=len(tokenizer), dtype=torch.float32, **{**ids, **fields}
    )
    model.get_output_embeddings().weight.data[tokenizer.eos_token_id] *= 3
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


def count_characters(completions: list[str], **_: Any) -> list[float]:
    """A reward that differs between completions of a random model."""
    return [float(len(completion) % 5) for completion in completions]


def arguments(kind: str, directory: str, **settings: Any) -> Any:
    """A GRPOConfig, RLOOConfig or DPOConfig for the CPU that reports to nobody."""
    trl = pytest.importorskip("trl")
    given: dict[str, Any] = {
        "output_dir": directory + "-out", "use_cpu": True, "bf16": False, "report_to": [],
        "per_device_train_batch_size": 8, "activation_checkpointing": False, "logging_steps": 1,
        "disable_tqdm": True, "save_strategy": "no", "max_steps": 2,
        "adam_epsilon": 1e-4,  # else a gradient that is nothing but rounding makes a whole step
    }  # fmt: skip
    if kind != "DPO":
        given |= {"num_generations": 4, "max_completion_length": 6}
    return getattr(trl, f"{kind}Config")(**{**given, **settings})


def online(trainer: Any, directory: str, *, kind: str = "GRPO", **settings: Any) -> Any:
    """A trainer of that class for prompts; settings: of its config, `fast` for ours, `rest`."""
    datasets = pytest.importorskip("datasets")
    fast, rest = settings.pop("fast", {}), settings.pop("rest", {})
    return trainer(
        model=rest.pop("model", directory), reward_funcs=rest.pop("reward", count_characters),
        args=arguments(kind, directory, **settings),
        train_dataset=datasets.Dataset.from_dict({"prompt": PROMPTS * 16}), **rest, **fast,
    )  # fmt: skip


class Result(NamedTuple):
    """What one micro-batch gives."""

    loss: Tensor
    gradients: dict[str, Tensor]
    metrics: dict[str, list[float]]


def result_of(trainer: Any, inputs: dict[str, Any], model: Any = None) -> Result:
    """Loss, all gradients and all metrics of one batch; model: a wrapped one."""
    trainer.model.train()
    trainer.model.zero_grad(set_to_none=True)
    trainer._metrics["train"].clear()
    loss = trainer.compute_loss(trainer.model if model is None else model, dict(inputs))
    loss.backward()
    named = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    missing = [name for name, parameter in named.items() if parameter.grad is None]
    assert not missing, missing  # an optimizer would leave them out, and not TRL's
    gradients = {name: parameter.grad.clone() for name, parameter in named.items()}
    return Result(
        loss.detach(), gradients, {k: list(v) for k, v in trainer._metrics["train"].items()}
    )


def assert_same(ours: Result, theirs: Result, tolerance: float = 1e-5) -> None:
    """Losses, gradients and metrics within a relative tolerance."""
    largest = max(float(gradient.abs().max()) for gradient in theirs.gradients.values())
    assert ours.loss == pytest.approx(float(theirs.loss), rel=tolerance, abs=tolerance / 10)
    assert ours.gradients.keys() == theirs.gradients.keys()
    for name, gradient in theirs.gradients.items():
        error = float((ours.gradients[name] - gradient).abs().max())
        allowed = tolerance * float(gradient.abs().max()) + tolerance / 100 * largest
        assert error <= allowed, (name, error, allowed)
    assert ours.metrics.keys() == theirs.metrics.keys()
    for name, values in theirs.metrics.items():
        expected = pytest.approx(values, rel=tolerance, abs=tolerance, nan_ok=True)
        assert ours.metrics[name] == expected, name


def batch_of(trainer: Any, *, seed: int = 0) -> dict[str, Any]:
    """Eight completions of three prompts, out of order and ragged, as TRL hands them on.

    One group has no advantage at all, one completion is masked whole, one has no advantage among
    others that have. Old, reference and sampling policies are near the current one.
    """
    generator = torch.Generator().manual_seed(seed)
    P, C, vocab_size = 12, 7, trainer.model.config.vocab_size
    prompt_of = torch.tensor([0, 1, 0, 2, 1, 0, 2, 0])
    prompt_lengths = torch.tensor([12, 5, 1])
    lengths = torch.tensor([7, 3, 5, 1, 4, 6, 2, 7])
    prompts = torch.randint(3, vocab_size, (3, P), generator=generator)[prompt_of]
    prompt_mask = (torch.arange(P) >= P - prompt_lengths[prompt_of, None]).long()
    completion_mask = (torch.arange(C) < lengths[:, None]).long()
    completion_mask[4] = 0  # as mask_truncated_completions does
    batch = {
        "prompt_ids": prompts * prompt_mask, "prompt_mask": prompt_mask,
        "completion_ids": torch.randint(3, vocab_size, (8, C), generator=generator),
        "completion_mask": completion_mask,
        "advantages": torch.tensor([1.3, -0.7, 0.0, 0.0, 0.9, -1.1, 0.0, 0.4]),
        "num_items_in_batch": completion_mask.sum() * 2,
    }  # fmt: skip
    with torch.no_grad():
        logps = trainer._get_per_token_logps_and_entropies(
            trainer.model, torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1),
            torch.cat([prompt_mask, completion_mask], 1), C,
        )[0]  # fmt: skip

    def near(scale: float) -> Tensor:
        return logps + scale * torch.randn(8, C, generator=generator) * completion_mask

    return batch | {
        "old_per_token_logps": near(0.3), "ref_per_token_logps": near(0.4),
        "sampling_per_token_logps": near(0.5),
    }  # fmt: skip


PAIRS = {
    "prompt": ["What is 1 + 2?", "Say", "What is 11 + 4?", "7"] * 4,
    "chosen": ["3", "5 5 5 5", "15 and more", "0"] * 4,
    "rejected": ["4 4 4", "1", "11", "what is it"] * 4,
}


def offline(trainer: Any, directory: str, **settings: Any) -> Any:
    """A DPOTrainer of that class; settings: of its config, `fast` for ours, `rest`."""
    datasets = pytest.importorskip("datasets")
    fast, rest = settings.pop("fast", {}), settings.pop("rest", {})
    return trainer(
        model=rest.pop("model", directory),
        args=arguments("DPO", directory, **{"per_device_train_batch_size": 4, **settings}),
        train_dataset=datasets.Dataset.from_dict(PAIRS), **rest, **fast,
    )  # fmt: skip
