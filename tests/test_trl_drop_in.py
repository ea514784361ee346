"""The losses, gradients and metrics of TRL's GRPOTrainer, from FastRL's forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastrl.integrations.trl_one_pass import OnePass, one_pass_of
from tests.helpers_trl import assert_same, batch_of, online, result_of, save_tiny

trl = pytest.importorskip("trl")
LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def pair(directory: str) -> tuple[Any, Any]:
    """TRL's trainer and ours, of equal weights; each test sets their attributes as it needs."""
    from fastrl.integrations.trl import FastGRPOTrainer

    theirs = online(trl.GRPOTrainer, directory)
    ours = online(FastGRPOTrainer, directory, fast={"strict": True})
    return theirs, ours


@pytest.fixture(scope="module")
def batch(pair: tuple[Any, Any]) -> dict[str, Any]:
    return batch_of(pair[0])


@pytest.fixture
def compare(pair: tuple[Any, Any], batch: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that sets attributes of both, compares one micro-batch, and undoes it.

    A loss that one pass gave must have TRL's value, not the gradient alone.
    """
    run_one_pass, losses = OnePass.run, []

    def record(*args: Any, **settings: Any) -> Any:
        found = run_one_pass(*args, **settings)
        losses.append(float(found.loss.detach()))
        return found

    monkeypatch.setattr(OnePass, "run", record)
    saved = [(vars(x).copy(), vars(x.args).copy()) for x in pair]

    def run(changes: dict[str, Any] | None = None, **attributes: Any) -> tuple[Any, Any]:
        for trainer in pair:
            trainer.current_gradient_accumulation_steps = 2
            for name, value in attributes.items():
                setattr(trainer.args if hasattr(trainer.args, name) else trainer, name, value)
                if hasattr(trainer, name):
                    setattr(trainer, name, value)
        inputs = {**batch, **(changes or {})}
        inputs = {name: value for name, value in inputs.items() if value is not None}
        losses.clear()
        found = result_of(pair[1], inputs), result_of(pair[0], inputs)
        assert_same(*found)
        assert losses == pytest.approx([float(found[1].loss)] * len(losses), rel=1e-5, abs=1e-6)
        assert len(losses) == (one_pass_of(pair[1], inputs) is not None)
        return found

    yield run
    for trainer, (state, arguments) in zip(pair, saved, strict=True):
        vars(trainer).clear()
        vars(trainer).update(state)
        vars(trainer.args).clear()
        vars(trainer.args).update(arguments)


@pytest.mark.parametrize(("level", "beta"), [("token", 0.0), ("token", 0.04), ("sequence", 0.04)])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_every_loss_is_trls(compare, pair, batch, loss_type, level, beta):
    high = 2.5 if loss_type == "cispo" else 0.28
    found, _ = compare(
        loss_type=loss_type, importance_sampling_level=level, beta=beta, epsilon_high=high
    )
    one_pass = one_pass_of(pair[1], batch)
    assert (one_pass is not None) == (level == "token" and loss_type != "vespo")
    assert all(bool(gradient.any()) for gradient in found.gradients.values())


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_on_policy_batches_without_old_logps(compare, pair, batch, loss_type, level):
    fresh = {"old_per_token_logps": None}
    high = 2.5 if loss_type == "cispo" else 0.28
    compare(
        fresh, loss_type=loss_type, importance_sampling_level=level, beta=0.04, epsilon_high=high,
        use_bias_correction_kl=False,
    )  # fmt: skip
    is_one_pass = one_pass_of(pair[1], {k: v for k, v in batch.items() if k not in fresh})
    assert (is_one_pass is not None) == (loss_type != "vespo")


@pytest.mark.parametrize(
    ("changes", "of_tokens"), [({"use_bias_correction_kl": True, "beta": 0.1}, False), ({}, True)],
    ids=["unbiased KL", "advantages of tokens"],
)  # fmt: skip
def test_sequences_on_policy_whose_tokens_depend_on_each_other(
    compare, pair, batch, changes, of_tokens
):
    fresh = {"old_per_token_logps": None}
    if of_tokens:
        C = batch["completion_ids"].shape[1]
        fresh["advantages"] = batch["advantages"][:, None] * torch.linspace(0.5, 2, C)
    compare(fresh, importance_sampling_level="sequence", **changes)
    inputs = {name: value for name, value in {**batch, **fresh}.items() if value is not None}
    assert one_pass_of(pair[1], inputs) is None


ADAPTIVE = {
    "use_adaptive_entropy": True, "entropy_target": 6.0, "entropy_coef_delta": 0.002,
    "entropy_coef_max": 0.1, "entropy_coef_min": 0.0, "_entropy_bonus_enabled": True,
    "entropy_coef": 0.01, "_entropy_window_stats": None,
}  # fmt: skip
VLLM = {"use_vllm": True, "vllm_importance_sampling_correction": True}
OPTIONS: dict[str, dict[str, Any]] = {
    "unbiased KL": {"beta": 0.1, "use_bias_correction_kl": True},
    "unbiased KL, sequence": {
        "beta": 0.1, "use_bias_correction_kl": True, "importance_sampling_level": "sequence",
    },
    "two-sided clip": {"delta": 1.5},
    "two-sided clip within the other": {"delta": 1.05},
    "high-entropy tokens": {"top_entropy_quantile": 0.3},
    "off-policy sequences masked": {"off_policy_mask_threshold": 0.02},
    "entropy bonus": {"entropy_coef": 0.02, "_entropy_bonus_enabled": True},
    "entropy bonus, high-entropy tokens": {
        "entropy_coef": 0.02, "_entropy_bonus_enabled": True, "top_entropy_quantile": 0.5,
    },
    "adaptive entropy bonus, on": {**ADAPTIVE, "_last_world_entropy": 1.0},
    "adaptive entropy bonus, off": {**ADAPTIVE, "_last_world_entropy": float("inf")},
}  # fmt: skip


@pytest.mark.parametrize("loss_type", ["bnpo", "dapo"])
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_is_trls(compare, pair, name, loss_type):
    compare(loss_type=loss_type, epsilon_high=0.28, **OPTIONS[name])
    assert pair[0].entropy_coef == pair[1].entropy_coef
    assert pair[1]._last_world_entropy == pytest.approx(pair[0]._last_world_entropy, rel=1e-5)


@pytest.mark.parametrize("mode", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_ratios_to_vllm_weigh_the_surrogate_alone(compare, batch, loss_type, mode):
    """Truncated and masked ratios, of tokens (B, C) or of completions (B, 1)."""
    difference = batch["old_per_token_logps"] - batch["sampling_per_token_logps"]
    if mode == "sequence":
        difference = difference.sum(1, keepdim=True)
    ratio = difference.exp().clamp(max=1.2)
    ratio = ratio.masked_fill(ratio < 0.7, 0.0)
    assert (float(ratio.min()), round(float(ratio.max()), 6)) == (0.0, 1.2)
    ratios = {"importance_sampling_ratio": ratio}
    compare(ratios, loss_type=loss_type, beta=0.04, **VLLM)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_tokens_of_tools_are_read_and_not_trained(compare, batch, loss_type, level):
    """One tool answered in the middle of a completion, one at the end, one made all of it."""
    tool_mask = torch.ones(8, 7, dtype=torch.int64)
    tool_mask[0, 2:4] = tool_mask[2, 3:] = tool_mask[3] = 0
    old_logps = batch["old_per_token_logps"].clone()
    old_logps[0, 2] -= 84.0  # a ratio that is infinite where the log-probability counts as 0
    assert -84.0 - 80.0 < old_logps[0, 2] < -88.8
    changes = {
        "tool_mask": tool_mask,
        "old_per_token_logps": old_logps if level == "token" else None,
    }
    compare(changes, loss_type=loss_type, importance_sampling_level=level, beta=0.04)


def test_advantages_of_tokens(compare, batch):
    """As subclasses may give them."""
    generator = torch.Generator().manual_seed(3)
    advantages = batch["advantages"][:, None] * torch.rand(8, 7, generator=generator)
    for loss_type in ("grpo", "cispo", "sapo"):
        compare({"advantages": advantages}, loss_type=loss_type)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "vespo"])
@pytest.mark.parametrize("case", ["no advantages", "all masked", "one completion"])
def test_nothing_to_learn_still_gives_every_parameter_a_gradient(compare, batch, case, loss_type):
    """Of zeros, as TRL does: an optimizer moves weights with zero gradients, not with none."""
    changes: dict[str, Any] = {"advantages": torch.zeros(8)}
    if case == "all masked":
        changes = {"completion_mask": torch.zeros(8, 7, dtype=torch.int64)}
    if case == "one completion":
        changes = {name: value[:1] if value.dim() else value for name, value in batch.items()}
    found, _ = compare(changes, loss_type=loss_type)
    assert case == "one completion" or not any(bool(x.any()) for x in found.gradients.values())


def test_evaluation_is_trls(pair, batch):
    losses = []
    for trainer in pair:
        trainer.model.eval()
        with torch.no_grad():
            losses.append(float(trainer.compute_loss(trainer.model, dict(batch))))
        trainer.model.train()
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    metrics = [trainer._metrics["eval"] for trainer in pair]
    assert metrics[1].keys() == metrics[0].keys()
    for name, values in metrics[0].items():
        assert metrics[1][name] == pytest.approx(values, rel=1e-5, abs=1e-5, nan_ok=True)
