"""TRL's RLOOTrainer and DPOTrainer with FastRL's forward and backward passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.helpers import tiny_model
from tests.helpers_trl import assert_same, batch_of, offline, online, result_of, save_tiny

trl = pytest.importorskip("trl")
DPO_LOSSES = (
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot",
    "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
)  # fmt: skip


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("tiny") / "model")


def other_model(trainer: Any) -> Any:
    """A reference that is not the policy."""
    config = trainer.model.config
    model = tiny_model(vocab_size=config.vocab_size, dtype=torch.float32, seed=5)
    model.config._name_or_path = config._name_or_path
    return model


@pytest.fixture(scope="module")
def rloo(directory: str) -> tuple[Any, Any]:
    from fastrl.integrations.trl import FastRLOOTrainer

    ours = online(FastRLOOTrainer, directory, kind="RLOO", fast={"strict": True})
    return online(trl.RLOOTrainer, directory, kind="RLOO"), ours


@pytest.mark.parametrize("noise", [0.0, 0.1, 1.0])
def test_rloo_is_trls(rloo: tuple[Any, Any], noise: float) -> None:
    batch = batch_of(rloo[0])
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        logps = rloo[0]._get_per_token_logps_and_entropies(
            rloo[0].model, torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1),
            torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1), 7,
        )[0].sum(1)  # fmt: skip
    batch["old_logps"] = logps + noise * torch.randn(8, generator=generator)
    ours, theirs = result_of(rloo[1], batch), result_of(rloo[0], batch)
    assert_same(ours, theirs)
    assert bool(ours.gradients["lm_head.weight"].any())


@pytest.fixture(scope="module")
def dpo(directory: str) -> tuple[Any, Any, dict[str, Any]]:
    """Both trainers with a reference of its own, and a batch."""
    from fastrl.integrations.trl import FastDPOTrainer

    theirs = offline(trl.DPOTrainer, directory)
    ours = offline(FastDPOTrainer, directory, fast={"strict": True})
    for trainer in (theirs, ours):
        weights = other_model(trainer).state_dict()
        trainer.ref_model.load_state_dict(weights)
        trainer.label_smoothing = 0.1
    batch = next(iter(theirs.get_train_dataloader()))
    assert len(set(batch["attention_mask"].sum(1).tolist())) > 2
    return theirs, ours, batch


def compare_dpo(
    dpo: tuple[Any, Any, dict[str, Any]], *, tolerance: float = 1e-5, **attributes: Any
) -> Any:
    theirs, ours, batch = dpo
    found = []
    for trainer in (ours, theirs):
        saved = {name: getattr(trainer, name) for name in attributes}
        vars(trainer).update(attributes)
        found.append(result_of(trainer, batch))
        vars(trainer).update(saved)
    assert_same(*found, tolerance)
    return found[0]


@pytest.mark.parametrize("loss_type", DPO_LOSSES)
def test_every_loss_of_dpo_is_trls(dpo, loss_type):
    # Its gate divides log-probabilities, whose rounding is the same in both, by 0.05.
    tolerance = 1e-4 if loss_type == "discopop" else 1e-5
    found = compare_dpo(dpo, loss_types=[loss_type], loss_weights=[1.0], tolerance=tolerance)
    assert bool(found.gradients["lm_head.weight"].any())
    assert {"logits/chosen", "mean_token_accuracy", "entropy"} <= found.metrics.keys()


OPTIONS: dict[str, dict[str, Any]] = {
    "length desensitised": {"ld_alpha": 0.5},
    "several losses": {"loss_types": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1]},
    "forward KL": {"f_divergence_type": "forward_kl"},
    "Jensen-Shannon": {"f_divergence_type": "js_divergence"},
    "alpha": {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.5},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_of_dpo_is_trls(dpo, name):
    # exp of a sum of log-probabilities, about 30 nats here: their rounding is multiplied.
    tolerance = 1e-4 if name == "forward KL" else 1e-5
    compare_dpo(dpo, **OPTIONS[name], tolerance=tolerance)


def fresh(directory: str, settings: dict[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
    from fastrl.integrations.trl import FastDPOTrainer

    ours = offline(FastDPOTrainer, directory, **settings, fast={"strict": True})
    theirs = offline(trl.DPOTrainer, directory, **settings)
    return theirs, ours, next(iter(theirs.get_train_dataloader()))


def test_wpo_weights_are_trls(directory):
    """They need the sum of squared probabilities, which is asked for when a trainer is made."""
    compare_dpo(fresh(directory, {"use_weighting": True}))


def test_references_computed_beforehand_are_trls(directory):
    theirs, ours, batch = fresh(directory, {"precompute_ref_log_probs": True})
    assert ours.ref_model is None
    assert "ref_chosen_logps" in batch
    batch["ref_chosen_logps"] += 1.0  # a tie of policy and reference is decided by rounding
    compare_dpo((theirs, ours, batch))


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_a_capped_head_and_an_adapter(tmp_path, softcap):
    """Gemma 2: mean logits are no longer linear in hidden states. The adapter is off for the
    reference."""
    peft = pytest.importorskip("peft")
    from fastrl.integrations.trl import FastDPOTrainer

    directory = save_tiny(
        tmp_path / "model", "gemma2", final_logit_softcapping=softcap, query_pre_attn_scalar=8
    )
    trainers = []
    for trainer in (trl.DPOTrainer, FastDPOTrainer):
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
        torch.manual_seed(2)
        trainers.append(offline(trainer, directory, rest={"peft_config": config}))
        generator = torch.Generator().manual_seed(0)
        for name, parameter in trainers[-1].model.named_parameters():
            if "lora_B" in name:  # zeros would make it the reference
                parameter.data.normal_(std=0.2, generator=generator)
    theirs, ours = trainers
    found = compare_dpo((theirs, ours, next(iter(theirs.get_train_dataloader()))))
    assert found.metrics["rewards/margins"] != [0.0]
    assert all("lora" in name for name in found.gradients)
