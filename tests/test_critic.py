"""Value models: what they say, what they learn from, and what they leave alone."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForSequenceClassification

from fastrl.adapters import adapter_parameters
from fastrl.assembly import build_trainer
from fastrl.config import CriticConfig, ModelConfig, OptimConfig
from fastrl.critic import ValueRecord, value_metrics
from fastrl.errors import InputError
from fastrl.merging import merged_weights
from fastrl.packing import pack
from fastrl.phases import ValueTerms
from fastrl.value_losses import clipped_squared_error, huber_error, squared_error
from tests.helpers import TINY, random_ids, tiny_model, tiny_policy
from tests.test_training import tiny_config

LORA = {"r": 4}


def trainer_of(critic: str = "head", *, lora=None, method: str = "ppo", **changes):
    """A trainer that has no reference: the penalty of PPO's rewards is taken away."""
    config = tiny_config(
        "unused", method=method, critic=CriticConfig(model=critic),
        model=ModelConfig(architecture={"model_type": "qwen3", **TINY}, lora=lora or {}),
        objective={
            "reward_shaping": "none", "parameters": {"critic_learning_rate": 1e-2},
        }, **changes,
    )  # fmt: skip
    return build_trainer(config)


def parameters_of(module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in module.parameters()]


def same(first, second) -> bool:
    return all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_losses_of_values_by_hand():
    values = torch.tensor([0.0, 0.5, 0.5, -0.5, 20.0], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    targets = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    # within the band; moved past it towards the target: held at 0.2; away from it: as they are
    found = clipped_squared_error(values, old, targets, epsilon_value=0.2)
    assert found.tolist() == pytest.approx([0.5, 0.32, 0.125, 1.125, 200.0])
    (slopes,) = torch.autograd.grad(found.sum(), values)
    assert slopes.tolist() == pytest.approx([-1.0, 0.0, 0.5, -1.5, 20.0])
    wide = clipped_squared_error(values, old, targets, epsilon_value=1e9)
    torch.testing.assert_close(wide, squared_error(values, old, targets), rtol=0, atol=0)
    huber = huber_error(values, old, targets, delta=10.0)
    (slopes,) = torch.autograd.grad(huber.sum(), values)
    assert slopes.tolist() == pytest.approx([-1.0, -0.5, 0.5, -1.5, 10.0])


def test_metrics_of_values():
    terms = ValueTerms(
        torch.tensor([0.0, 1.0, 5.0]), torch.tensor([1.0, 3.0, 9.0]), torch.tensor([0.5, 0.5, 0.0])
    )
    record = ValueRecord(
        terms, torch.tensor([0.5, 2.0, 0.0]), torch.tensor([2.0, 4.0, 100.0]),
        torch.tensor([True, False, True]),
    )  # fmt: skip
    assert value_metrics([record]) == pytest.approx(
        {
            "val/loss": 3.0, "val/clipfrac": 0.5, "val/mean": 0.5, "val/target_mean": 2.0,
            "val/var_explained": 1 - 0.25 / 1.0,
        }
    )  # fmt: skip
    assert value_metrics([]) == {}


def test_a_fresh_head_says_zero():
    trainer = trainer_of()
    plan = pack(random_ids([5]), [random_ids([3, 4])])
    values = trainer.critic.values(plan, trainer.policy.hidden_states(plan))
    assert values.tolist() == [0.0] * 7


@pytest.mark.parametrize(("several", "runs"), [(False, 1), (True, 2)])
def test_values_of_a_head_take_no_pass_of_their_own(several, runs):
    """Advantages need every value before the first gradient: a single pass serves for both."""
    trainer = trainer_of(max_tokens_per_pass=60 if several else 4096)
    hidden_states, seen = trainer.policy.hidden_states, []

    def counted(plan):
        seen.append(plan)
        return hidden_states(plan)

    trainer.policy.hidden_states = counted
    num_passes = trainer.train_step(0).metrics["packing/passes"]
    assert (num_passes > 1) == several
    assert len(seen) == runs * num_passes


def test_an_adapter_has_its_own_weights_on_the_same_base():
    trainer = trainer_of("lora", lora=LORA)
    policy, critic = trainer.policy, trainer.critic
    own = list(adapter_parameters(policy.model).values())
    its = list(adapter_parameters(policy.model, "critic").values())
    assert {id(p) for p in critic.trained.parameters()} >= {id(p) for p in its}
    stepped = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert stepped == {id(p) for p in own}
    base = [p for p in policy.model.parameters() if not any(p is q for q in (*own, *its))]
    before = [x.clone() for x in base]
    plan = pack(random_ids([5]), [random_ids([3, 4])])
    states = policy.hidden_states(plan).detach()
    for step in range(2):
        trainer.train_step(step)
    assert same(before, base)
    assert any(bool(x.any()) for name, x in adapter_parameters(policy.model, "critic").items()
               if "lora_B" in name)  # fmt: skip
    assert not torch.equal(states, policy.hidden_states(plan))
    # Away from its own passes the critic's adapter changes nothing.
    states = policy.hidden_states(plan)
    with torch.no_grad():
        for parameter in its:
            parameter.add_(1.0)
    assert torch.equal(states, policy.hidden_states(plan))
    assert policy.model.active_adapters == ["default"]


def test_a_policy_learns_the_same_beside_any_critic_that_stands_still():
    """The value loss of an adapter of its own does not reach the policy."""
    weights = []
    for rate in (1e-2, 1e-5):
        trainer = trainer_of("lora", lora=LORA)
        for group in trainer.learner.critic_stepper.optimizer.param_groups:
            group["peak_lr"] = rate
        trainer.train_step(0)
        weights.append([x.clone() for x in adapter_parameters(trainer.policy.model).values()])
    assert same(*weights)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradients_of_an_adapter_are_those_of_the_model_switched_to_it(checkpointed):
    """Also where layers are computed again during the backward pass."""
    trainer = trainer_of("lora", lora=LORA)
    policy, critic = trainer.policy, trainer.critic
    if checkpointed:
        policy.model.gradient_checkpointing_enable({"use_reentrant": False})
    its = adapter_parameters(policy.model, "critic")
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in (*its.values(), critic.head.weight):
            parameter.add_(torch.randn(parameter.shape, generator=generator) / 10)
    plan = pack(random_ids([5]), [random_ids([3, 4])])
    with critic.in_use():
        values = critic.values(plan, None)
        values.square().sum().backward()
    found = {name: parameter.grad.clone() for name, parameter in its.items()}
    policy.model.zero_grad()
    policy.model.gradient_checkpointing_disable()
    policy.model.base_model.set_adapter("critic")
    expected = critic.head(policy.hidden_states(plan))[plan.source_index]
    assert torch.equal(values, expected)
    expected.square().sum().backward()
    for name, parameter in its.items():
        assert torch.equal(found[name], parameter.grad), name


@pytest.fixture
def own_model(tmp_path):
    """A directory with a model of another size and the policy's tokenizer."""
    tokenizer = trainer_of().policy.tokenizer
    model = tiny_model(vocab_size=len(tokenizer), hidden_size=16, dtype=torch.float32, seed=5)
    model.save_pretrained(tmp_path / "own")
    tokenizer.save_pretrained(tmp_path / "own")
    return tmp_path / "own"


def test_a_model_of_its_own_trains_and_leaves_the_policy_alone(own_model):
    trainer = trainer_of(str(own_model))
    before = parameters_of(trainer.critic.trained)
    metrics = trainer.train_step(0).metrics
    assert metrics["val/loss"] > 0
    assert not same(before, parameters_of(trainer.critic.trained))
    assert trainer.critic.body.config.hidden_size == 16
    with_head = trainer_of()
    with_head.train_step(0)
    expected = trainer_of("head")
    expected.train_step(0)
    assert same(parameters_of(with_head.policy.model), parameters_of(expected.policy.model))


@pytest.mark.parametrize(
    ("precision", "optimizer"),
    [("split", "adamw_8bit"), ("stochastic", "adamw"), ("autocast", "adamw")],
)
def test_a_model_of_its_own_is_kept_as_the_policy_is(own_model, precision, optimizer):
    architecture = {"model_type": "qwen3", **TINY}
    config = tiny_config(
        "unused", method="ppo", objective={"reward_shaping": "none"}, num_mini_batches=2,
        critic=CriticConfig(model=str(own_model)),
        optim=OptimConfig(optimizer=optimizer, learning_rate=1e-3),
        model=ModelConfig(
            architecture=architecture, precision=precision, gradient_checkpointing=True
        ),
    )  # fmt: skip
    trainer = build_trainer(config)
    dtypes = [
        {p.dtype for p in m.parameters()} for m in (trainer.critic.body, trainer.policy.model)
    ]
    assert dtypes[0] == dtypes[1]
    assert trainer.critic.head.weight.dtype == torch.float32
    before = parameters_of(trainer.critic.body)
    metrics = trainer.train_step(0).metrics
    assert metrics["skipped/non_finite"] == 0
    assert 0 < metrics["val/loss"] < 1
    assert not same(before, parameters_of(trainer.critic.body))


def test_the_policy_is_saved_and_merged_without_its_critic(tmp_path):
    trainer, alone = trainer_of("lora", lora=LORA), trainer_of(lora=LORA)
    before = merged_weights(alone.policy)
    with torch.no_grad():
        for parameter in adapter_parameters(trainer.policy.model, "critic").values():
            parameter.add_(1.0)
    found = merged_weights(trainer.policy)
    assert found.keys() == before.keys()
    assert all(torch.equal(found[name], before[name]) for name in found)
    trainer.policy.save(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert not any("critic" in name for name in saved)
    assert len(saved) == len(adapter_parameters(alone.policy.model))


def test_sampling_is_the_policys_alone():
    """Keys and values, folded weights and all: the gap to the trainer stays rounding."""
    trainer = trainer_of("lora", lora=LORA, max_steps=5)
    for step in range(5):
        metrics = trainer.train_step(step).metrics
        assert metrics["sampling/sampling_logp_difference/max"] < 1e-4


def test_a_reward_model_brings_its_head(tmp_path):
    tokenizer = trainer_of().policy.tokenizer
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = AutoConfig.for_model(
        "qwen3", vocab_size=len(tokenizer), num_labels=1, **{**TINY, **ids}
    )
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    trainer = trainer_of(str(tmp_path))
    assert torch.equal(trainer.critic.head.weight, model.score.weight)
    ids = random_ids([5])[0], random_ids([4], seed=2)[0]
    plan = pack([ids[0]], [[ids[1]]])
    with torch.no_grad():
        states = model.model(input_ids=torch.cat(ids)[None]).last_hidden_state[0]
        expected = (states @ model.score.weight.T)[4:8, 0]
        found = trainer.critic.values(plan, None)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_what_cannot_be_a_value_model_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"without model\.lora the policy trains them"):
        trainer_of("lora")
    with pytest.raises(InputError, match="alone for 50 steps, but max_steps is 4"):
        build_trainer(tiny_config("unused", method="vapo"))
    with pytest.raises(InputError, match=r"has no config\.json"):
        trainer_of(str(tmp_path / "nowhere"))
    tiny_policy().save(tmp_path)
    with pytest.raises(InputError, match="another vocabulary than the policy"):
        trainer_of(str(tmp_path))


@pytest.mark.parametrize("critic", ["head", "lora", "own"])
def test_warm_up_of_the_value_model_leaves_the_policy_alone(critic, own_model):
    parameters = {"critic_warmup_steps": 2}
    trainer = trainer_of(
        str(own_model) if critic == "own" else critic, lora=LORA if critic == "lora" else None,
        optim=OptimConfig(learning_rate=1e-3, lr_scheduler_type="linear"), max_steps=6,
        num_mini_batches=2, num_iterations=2,
    )  # fmt: skip
    trainer.method = dataclasses.replace(
        trainer.method,
        value_loss=dataclasses.replace(trainer.method.value_loss, parameters=parameters),
    )
    its = parameters_of(trainer.critic.trained)
    stepped = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    before = [p.detach().clone() for p in stepped]
    rates, losses = [], []
    for step in range(4):
        metrics = trainer.train_step(step).metrics
        rates.append(metrics["learning_rate"])
        losses.append(metrics["val/loss"])
        if step < 2:
            assert same(before, stepped)
            assert not trainer.optimizer.state
            assert metrics["loss"] == metrics["grad_norm"] == 0
            assert "entropy" not in metrics
        assert not same(its, parameters_of(trainer.critic.trained))
        its = parameters_of(trainer.critic.trained)
    assert not same(before, stepped)
    assert rates == pytest.approx([0, 0, 1e-3, 0.75e-3])
    assert min(losses) > 0


@pytest.mark.parametrize("critic", ["head", "lora", "own"])
def test_a_checkpoint_goes_on_to_the_same_bits(critic, own_model, tmp_path):
    def fresh():
        return trainer_of(
            str(own_model) if critic == "own" else critic, lora=LORA if critic == "lora" else None,
            num_mini_batches=2,
        )  # fmt: skip

    whole = fresh()
    whole.train_step(0)
    torch.save(whole.learner.state_dict(), tmp_path / "learner.pt")
    torch.save(whole.policy.model.state_dict(), tmp_path / "policy.pt")
    stream = whole.sampler.stream.state_dict()
    whole.train_step(1)
    resumed = fresh()
    resumed.policy.model.load_state_dict(torch.load(tmp_path / "policy.pt", weights_only=True))
    resumed.learner.load_state_dict(torch.load(tmp_path / "learner.pt", weights_only=True))
    resumed.sampler.stream.load_state_dict(stream)
    resumed.train_step(1)
    assert same(parameters_of(whole.policy.model), parameters_of(resumed.policy.model))
    assert same(parameters_of(whole.critic.trained), parameters_of(resumed.critic.trained))
    kept = whole.learner.critic_stepper.optimizer.state_dict()["state"]
    found = resumed.learner.critic_stepper.optimizer.state_dict()["state"]
    assert str(kept) == str(found)
