"""The self-check names what is wrong with an engine: engines that really do the wrong thing."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from transformers import AutoModelForCausalLM

from fastrl.assembly import build_trainer
from fastrl.config import ObjectiveConfig
from fastrl.encoding import encode_prompts
from fastrl.errors import InputError
from fastrl.methods.needs import requirements
from fastrl.methods.resolve import resolve_method
from fastrl.policy import Policy
from fastrl.report import read_metrics
from fastrl.rollout import ENGINES, Sampling
from fastrl.rollout.generate import GenerateEngine
from fastrl.rollout.native import NativeEngine
from fastrl.rollout_check import TOLERANCE, check_engine, compare
from fastrl.run import train
from fastrl.types import Example, Prompts, Rollouts
from tests.helpers import tiny_policy
from tests.test_training import numbers, tiny_config, weights

SAMPLING = Sampling(num_generations=4, max_completion_length=12, temperature=0.8)
GRPO = resolve_method("grpo", ObjectiveConfig())
CORRECTED = resolve_method("grpo", ObjectiveConfig(rollout_correction="truncated_tokens"))


def prompts_of(policy: Policy) -> Prompts:
    examples = [Example(prompt=f"What is {a} + {a + 3}?") for a in range(3)]
    return encode_prompts(examples, policy.tokenizer, max_prompt_length=64, chat_template=None)


def check(engine, policy, sampling=SAMPLING, method=GRPO) -> list[str]:
    generator = torch.Generator().manual_seed(5)
    return check_engine(
        engine, policy, prompts_of(policy), sampling, generator, method, name="tried"
    )


class StaleEngine(NativeEngine):
    """Samples from a copy of the weights as they were when it was made."""

    def __init__(self, policy: Policy) -> None:
        super().__init__(policy.frozen_copy())


class ForeignEngine(StaleEngine):
    """The same, and it says so."""

    shares_weights = False


class LateEngine(ForeignEngine):
    """Says that it takes over the weights, and does not."""

    follows_training = True


class OtherTemperatureEngine(NativeEngine):
    """Draws at a temperature of its own."""

    temperature = 1.0

    def generate(self, prompts, sampling, generator, on_completion=None):
        own = dataclasses.replace(sampling, temperature=self.temperature)
        return super().generate(prompts, own, generator, on_completion)


class WarmEngine(OtherTemperatureEngine):
    temperature = 1.3


class ProcessedEngine(NativeEngine):
    """Records the log-probabilities of what it draws from, truncated and penalised."""

    own: ClassVar[dict[str, float]] = {}

    def generate(self, prompts, sampling, generator, on_completion=None):
        own = dataclasses.replace(sampling, **self.own)
        found = super().generate(prompts, own, generator, on_completion)
        return dataclasses.replace(found, rollout_logps=found.processed_logps, processed_logps=None)


class TopKEngine(ProcessedEngine):
    """Truncates although it was not asked to, as settings in a model's directory may."""

    own: ClassVar = {"top_k": 7}


class TopPEngine(ProcessedEngine):
    own: ClassVar = {"top_p": 0.8}


class HalfEngine(NativeEngine):
    """Runs the layers in bfloat16."""

    def __init__(self, policy: Policy) -> None:
        super().__init__(Policy(policy.model, policy.tokenizer, bf16=True))


class HalfWeightsEngine(NativeEngine):
    """Runs a copy of the weights that was loaded in bfloat16."""

    def __init__(self, policy: Policy) -> None:
        with tempfile.TemporaryDirectory() as directory:
            policy.save(Path(directory))
            model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
        super().__init__(Policy(model, policy.tokenizer))


class SilentEngine(NativeEngine):
    """Records nothing."""

    def generate(self, prompts, sampling, generator, on_completion=None) -> Rollouts:
        found = super().generate(prompts, sampling, generator, on_completion)
        return dataclasses.replace(found, rollout_logps=None, rollout_entropies=None)


def changed(policy: Policy, *, by: float) -> None:
    """A training step's worth of other weights."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(by * noise.to(parameter))


@pytest.mark.parametrize("engine", [NativeEngine, GenerateEngine])
@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_an_engine_on_the_training_weights_passes(engine, temperature):
    policy = tiny_policy()
    sampling = dataclasses.replace(SAMPLING, temperature=temperature)
    assert check(engine(policy), policy, sampling) == []
    generator = torch.Generator().manual_seed(2)
    rollouts = engine(policy).generate(prompts_of(policy), sampling, generator)
    found = compare(engine(policy), policy, rollouts, sampling)
    assert found is not None
    assert found.gap < 0.01 * TOLERANCE
    assert found.num_tokens == int(rollouts.lengths.sum())


def test_truncation_that_is_recorded_as_it_should_be_passes_with_a_note():
    policy = tiny_policy()
    sampling = dataclasses.replace(SAMPLING, top_p=0.8, repetition_penalty=1.2)
    (note,) = check(NativeEngine(policy), policy, sampling)
    assert "no rollout_correction undoes that" in note


@pytest.mark.parametrize("factor", [0.995, 1.005])
def test_a_small_difference_of_temperature_is_found(factor):
    """The tolerance is below what half a percent of temperature makes."""
    policy = tiny_policy()

    class Slightly(OtherTemperatureEngine):
        temperature = SAMPLING.temperature * factor

    with pytest.raises(InputError, match=f"temperature {0.8 * factor:.3g}"):
        check(Slightly(policy), policy)


@pytest.mark.parametrize(
    ("engine", "sampling", "cause"),
    [
        (OtherTemperatureEngine, SAMPLING, r"temperature: .* are those of temperature 1, but "),
        (WarmEngine, SAMPLING, r"temperature: .* are those of temperature 1\.3, but "),
        (
            ProcessedEngine,
            dataclasses.replace(SAMPLING, top_p=0.7),
            "truncation: .* after the run's own truncation",
        ),
        (
            ProcessedEngine,
            dataclasses.replace(SAMPLING, min_p=0.1, repetition_penalty=1.5),
            "truncation: .* after the run's own truncation",
        ),
        (TopKEngine, SAMPLING, r"truncation: .* 7 most likely tokens \(top_k 7\)"),
        (TopPEngine, SAMPLING, r"truncation: .* over 0\.8 of the probability \(top_p 0\.8\)"),
        (HalfEngine, SAMPLING, "dtype: .* layers in bfloat16"),
        (HalfWeightsEngine, SAMPLING, "dtype: .* weights in bfloat16"),
    ],
)
def test_the_cause_is_named(engine, sampling, cause):
    policy = tiny_policy()
    with pytest.raises(
        InputError, match=f"'tried' does not sample from the policy.*Cause: {cause}"
    ):
        check(engine(policy), policy, sampling)


@pytest.mark.parametrize("by", [0.02, 0.2])
def test_weights_are_named_where_nothing_else_explains_the_gap(by):
    policy = tiny_policy()
    stale, foreign = StaleEngine(policy), ForeignEngine(policy)
    assert check(stale, policy) == []
    changed(policy, by=by)
    with pytest.raises(InputError, match=r"Cause: weights: .*such as a stale copy"):
        check(stale, policy)
    with pytest.raises(InputError, match="Cause: weights: the engine has weights of its own"):
        check(foreign, policy)


def test_weights_of_its_own_are_known_to_a_method_that_corrects_for_them():
    policy = tiny_policy()
    foreign = ForeignEngine(policy)
    (note,) = check(foreign, policy)  # still the same weights
    assert "does not correct for one that stays behind; set objective.rollout_correction" in note
    assert check(foreign, policy, method=CORRECTED) == []
    changed(policy, by=0.05)
    (note,) = check(foreign, policy, method=CORRECTED)
    assert "(weights), which the method corrects for" in note
    stale = StaleEngine(policy)
    changed(policy, by=0.05)
    with pytest.raises(InputError, match="such as a stale copy"):  # it claims to have none
        check(stale, policy, method=CORRECTED)
    late = LateEngine(policy)
    assert check(late, policy) == []
    changed(policy, by=0.05)
    with pytest.raises(InputError, match="Cause: weights"):  # it claims to follow
        check(late, policy, method=CORRECTED)


@pytest.mark.parametrize("engine", [HalfEngine, HalfWeightsEngine])
def test_rounding_of_the_engine_is_known_to_a_method_that_corrects_for_it(engine):
    policy = tiny_policy()
    (note, *others) = check(engine(policy), policy, method=CORRECTED)
    assert "(dtype), which the method corrects for" in note
    assert not others


def test_bfloat16_in_both_is_rounding_and_a_wrong_temperature_is_not():
    policy = tiny_policy()
    policy.bf16 = True
    assert all("from rounding" in note for note in check(NativeEngine(policy), policy))
    with pytest.raises(InputError, match=r"Cause: temperature: .* temperature 1\.3"):
        check(WarmEngine(policy), policy)


def test_no_log_probabilities_are_refused_where_the_method_needs_them():
    policy = tiny_policy()
    (note,) = check(SilentEngine(policy), policy)
    assert "records no log-probabilities" in note
    with pytest.raises(InputError, match="needs the sampler's log-probabilities"):
        check(SilentEngine(policy), policy, method=CORRECTED)


def test_the_check_changes_nothing(tmp_path):
    """Weights and metrics of a run that is checked at every step are those of one that is not."""
    config = tiny_config(tmp_path / "rarely", max_steps=3)
    train(config)
    rollout = dataclasses.replace(config.rollout, engine_args={"check_steps": 1})
    train(dataclasses.replace(config, output_dir=str(tmp_path / "often"), rollout=rollout))
    assert numbers(tmp_path / "rarely") == numbers(tmp_path / "often")
    for name, value in weights(tmp_path / "rarely").items():
        assert torch.equal(value, weights(tmp_path / "often")[name]), name


@pytest.fixture
def stale_engine(monkeypatch):
    """An engine of these tests under a name of its own."""
    monkeypatch.setitem(ENGINES, "stale", "tests.test_rollout_check:StaleEngine")
    monkeypatch.setitem(ENGINES, "warm", "tests.test_rollout_check:WarmEngine")


def test_a_run_with_a_wrong_engine_ends_before_it_writes_anything(tmp_path, stale_engine):
    config = tiny_config(tmp_path / "run")
    rollout = dataclasses.replace(config.rollout, engine="warm")
    with pytest.raises(InputError, match="Cause: temperature"):
        train(dataclasses.replace(config, rollout=rollout))
    assert not (tmp_path / "run").exists()


def test_a_copy_from_before_the_warm_start_is_found_before_training(tmp_path, stale_engine):
    config = tiny_config(tmp_path / "run")
    rollout = dataclasses.replace(config.rollout, engine="stale")
    with pytest.raises(InputError, match="Cause: weights"):
        train(dataclasses.replace(config, rollout=rollout))
    assert (tmp_path / "run" / "checkpoint-0").is_dir()  # what the warm start has cost is kept


def test_a_copy_that_grows_stale_is_found_by_checks_on_the_way(tmp_path, stale_engine):
    config = tiny_config(
        tmp_path / "run", max_steps=6,
        warm_start=dataclasses.replace(tiny_config("").warm_start, steps=0),
    )  # fmt: skip
    rollout = dataclasses.replace(config.rollout, engine="stale", engine_args={"check_steps": 2})
    with pytest.raises(InputError, match="Cause: weights"):
        train(dataclasses.replace(config, rollout=rollout))
    steps = [row["step"] for row in read_metrics(tmp_path / "run") if "loss" in row]
    assert steps == [1, 2]
    assert (tmp_path / "run" / "checkpoint-2").is_dir()


class ShiftedEngine(NativeEngine):
    """Records a quarter of a nat too much, and an eighth more for the first completion."""

    def generate(self, prompts, sampling, generator, on_completion=None):
        found = super().generate(prompts, sampling, generator, on_completion)
        first, *others = [values + 0.25 for values in found.rollout_logps]
        return dataclasses.replace(found, rollout_logps=(first + 0.125, *others))


@pytest.mark.parametrize("num_iterations", [1, 2])
@pytest.mark.parametrize("method", ["grpo", "gspo", "tis", "dppo_tv", "dpo"])
def test_the_gap_is_a_metric_of_every_step(tmp_path, method, num_iterations):
    """Also where ratios are to the sampler, which hide it; no update of the step is in it."""
    config = tiny_config(tmp_path / "run", method=method, num_iterations=num_iterations)
    trainer = build_trainer(config)
    if "ref_logps" in requirements(trainer.method):
        trainer.reference = trainer.policy.frozen_copy()
    trainer.sampler.engine = ShiftedEngine(trainer.policy)
    metrics = trainer.train_step(0).metrics
    name = "sampling/sampling_logp_difference"
    assert metrics[f"{name}/max"] == pytest.approx(0.375, abs=1e-4)
    assert 0.25 - 1e-4 <= metrics[f"{name}/mean"] < 0.3


@pytest.mark.parametrize("by", [3e-4, 1e-3, 3e-3, 1e-2])
@pytest.mark.parametrize("seed", range(3))
def test_small_changes_of_weights_are_taken_for_nothing_else(by, seed):
    """Whatever the size of the gap, no fitted temperature or truncation explains it away."""
    policy = tiny_policy(seed=seed)
    stale = StaleEngine(policy)
    changed(policy, by=by)
    generator = torch.Generator().manual_seed(seed)
    rollouts = stale.generate(prompts_of(policy), SAMPLING, generator)
    found = compare(stale, policy, rollouts, SAMPLING)
    assert found is not None
    assert (found.cause is None) == (found.gap <= TOLERANCE)
    assert found.cause is None or found.cause.name == "weights"
