"""Whole runs in process: same seed same bits, exact resume, real directories and files."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastrl.activations import head_row_cost
from fastrl.assembly import build_trainer
from fastrl.config import (
    Config,
    DataConfig,
    EvalConfig,
    ModelConfig,
    OptimConfig,
    RolloutConfig,
    SaveConfig,
    WarmStartConfig,
)
from fastrl.config_io import load_config, override_config
from fastrl.errors import InputError
from fastrl.held_out import evaluate
from fastrl.report import read_metrics
from fastrl.run import train
from tests.helpers import TINY, tiny_policy

EXAMPLES = Path(__file__).parent.parent / "examples"
TIMES = ("time", "tokens_per_second", "memory")


def tiny_config(output_dir, **changes) -> Config:
    config = Config(
        task="reasoning_gym:chain_sum",
        task_args={"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2},
        rewards=(f"{Path(__file__).parent / 'helpers.py'}:checksum", "task"),
        reward_workers=0,
        output_dir=str(output_dir),
        values_dir=f"{output_dir}-values",
        max_steps=4,
        prompts_per_step=3,
        max_tokens_per_pass=128,
        data=DataConfig(eval_size=8),
        model=ModelConfig(architecture={"model_type": "qwen3", **TINY}),
        rollout=RolloutConfig(num_generations=4, max_prompt_length=48, max_completion_length=5),
        optim=OptimConfig(learning_rate=1e-3),
        warm_start=WarmStartConfig(steps=6, batch_size=8),
        eval=EvalConfig(num_samples=2),
    )
    return dataclasses.replace(config, **changes)


def numbers(directory):
    """metrics.jsonl without what the clock decides."""
    return [
        {k: v for k, v in row.items() if not any(word in k for word in TIMES)}
        for row in read_metrics(directory)
    ]


def weights(directory):
    return load_file(directory / "final" / "model.safetensors")


def assert_same_run(first, second):
    assert numbers(first) == numbers(second)
    for name, value in weights(first).items():
        assert torch.equal(value, weights(second)[name]), name
    completions = [(d / "completions.jsonl").read_text() for d in (first, second)]
    assert completions[0] == completions[1]


def test_same_seed_same_bits(tmp_path):
    for name in ("a", "b"):
        train(tiny_config(tmp_path / name))
    assert_same_run(tmp_path / "a", tmp_path / "b")
    train(tiny_config(tmp_path / "c", seed=1))
    assert numbers(tmp_path / "a") != numbers(tmp_path / "c")


def test_a_run_leaves_what_it_promises(tmp_path):
    summary = train(tiny_config(tmp_path / "run", eval=EvalConfig(eval_steps=2, num_samples=2)))
    run = tmp_path / "run"
    names = {path.name for path in run.iterdir()}
    assert {"config.toml", "metrics.jsonl", "completions.jsonl", "curve.png", "final"} <= names
    assert list((run / "tensorboard").glob("events.*"))
    assert (run / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((run / "summary.json").read_text()) == json.loads(json.dumps(summary))
    for key in ("pass_at_1_before", "pass_at_1_after", "train_seconds", "steps",
                "peak_memory_bytes", "tokens_per_second"):  # fmt: skip
        assert summary[key] is not None
    rows = read_metrics(run)
    assert [row["step"] for row in rows if "eval_pass@1" in row] == [0, 2, 4]
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4]
    for name in ("reward", "reward_std", "frac_reward_zero_std", "grad_norm", "learning_rate",
                 "num_tokens", "completions/mean_length", "completions/clipped_ratio",
                 "rewards/task/mean", "step_time", "packing/token_ratio"):  # fmt: skip
        assert all(row[name] is not None for row in steps), name
    sample = [json.loads(line) for line in (run / "completions.jsonl").read_text().splitlines()]
    assert len(sample) == 4 * 4
    assert set(sample[0]) >= {"step", "prompt", "completion", "reward", "finished"}


def test_evaluate_reads_a_run_and_repeats_its_last_evaluation(tmp_path):
    config = tiny_config(tmp_path / "run")
    summary = train(config)
    evaluation = evaluate(config, tmp_path / "run")
    assert evaluation.pass_at[1] == summary["pass_at_1_after"]


@pytest.mark.parametrize("checkpoint_step", [2, 4])
def test_resume_is_exact(tmp_path, checkpoint_step):
    """A run that went on from a checkpoint ends like one that never stopped."""
    objective = {"beta": 0.05}
    whole = tiny_config(tmp_path / "whole", max_steps=6, num_iterations=2, objective=objective)
    train(whole)
    save = SaveConfig(save_steps=checkpoint_step)
    parted = dataclasses.replace(whole, output_dir=str(tmp_path / "parted"), save=save)
    train(dataclasses.replace(parted, max_steps=5))
    # What came after the checkpoint must be forgotten, a half-written line included.
    with (tmp_path / "parted" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "rew')
    train(parted, resume=True)
    rows = [row for row in numbers(tmp_path / "parted") if "loss" in row]
    assert rows == [row for row in numbers(tmp_path / "whole") if "loss" in row]
    for name, value in weights(tmp_path / "whole").items():
        assert torch.equal(value, weights(tmp_path / "parted")[name]), name


def test_a_penalty_cannot_be_added_to_a_run_that_kept_no_reference(tmp_path):
    config = tiny_config(tmp_path / "run", save=SaveConfig(save_steps=2))
    train(config)
    changed = dataclasses.replace(config, objective={"beta": 0.1}, max_steps=5)
    with pytest.raises(
        InputError, match=r"another objective\.beta \(None -> 0\.1\); a run may change .* max_steps"
    ):
        train(changed, resume=True)


def test_old_checkpoints_are_removed(tmp_path):
    save = SaveConfig(save_steps=1, save_total_limit=2)
    train(tiny_config(tmp_path / "run", save=save))
    kept = sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*"))
    assert kept == ["checkpoint-3", "checkpoint-4"]


def test_penalty_pulls_towards_the_reference(tmp_path):
    divergence = []
    for beta in (1e-6, 100.0):
        objective = {"beta": beta, "regulariser": "k2"}
        run = tmp_path / f"beta-{beta}"
        train(tiny_config(run, max_steps=12, objective=objective))
        assert (run / "reference" / "model.safetensors").is_file()
        rows = [row for row in read_metrics(run) if "kl" in row]
        assert rows[0]["kl"] == pytest.approx(0.0, abs=1e-9)
        divergence.append(rows[-1]["kl"])
    assert 0 < divergence[1] < 0.5 * divergence[0]


@pytest.mark.parametrize("chat", [False, True])
def test_training_on_a_model_directory_and_a_jsonl_file(tmp_path, chat):
    """Any Hugging Face directory, prompts with answers or chat messages, a reward of the user's."""
    policy = tiny_policy()
    if chat:
        policy.tokenizer.chat_template = (
            "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
            "{% if add_generation_prompt %}[assistant]{% endif %}"
        )
    policy.save(tmp_path / "model")
    with (tmp_path / "data.jsonl").open("w") as file:
        for a in range(12):
            question = f"What is {a} + {a}?"
            turns = [{"role": "user", "content": question}]
            record = {"messages": turns} if chat else {"prompt": question}
            file.write(json.dumps({**record, "answer": str(2 * a), "level": a}) + "\n")
    (tmp_path / "rewards.py").write_text(
        "def short(prompts, completions, answer, level, **columns):\n"
        "    texts = [c if isinstance(c, str) else c[0]['content'] for c in completions]\n"
        "    assert all(int(a) == 2 * n for a, n in zip(answer, level))\n"
        "    return [1.0 / (1 + len(text)) for text in texts]\n"
    )
    flags = {
        "--model.path": tmp_path / "model",
        "--task": f"jsonl:{tmp_path / 'data.jsonl'}",
        "--output-dir": tmp_path / "run",
        "--data.eval-size": 3,
        "--max-steps": 3,
        "--rollout.max-prompt-length": 48,
        "--rollout.max-completion-length": 5,
        "--optim.learning-rate": 1e-3,
    }
    words = [str(word) for pair in flags.items() for word in pair]
    words += [
        "--rewards",
        "math",
        f"{tmp_path / 'rewards.py'}:short",
        "--reward-weights",
        "1",
        "0.5",
    ]
    train(override_config(load_config(EXAMPLES / "local_model.toml"), words, "fastrl train"))
    rows = [row for row in read_metrics(tmp_path / "run") if "loss" in row]
    for row in rows:
        total = row["rewards/math/mean"] + 0.5 * row["rewards/short/mean"]
        assert row["reward"] == pytest.approx(total, abs=1e-6)
    before, after = load_file(tmp_path / "model" / "model.safetensors"), weights(tmp_path / "run")
    assert any(not torch.equal(before[name], after[name]) for name in before)
    if chat:
        first = json.loads((tmp_path / "run" / "completions.jsonl").read_text().splitlines()[0])
        assert first["prompt"][0]["role"] == "user"


def test_rewards_that_all_agree_leave_the_policy_alone(tmp_path):
    (tmp_path / "flat.py").write_text(
        "def one(prompts, completions):\n    return [1.0] * len(prompts)\n"
    )
    config = tiny_config(
        tmp_path / "run", rewards=(f"{tmp_path / 'flat.py'}:one",), warm_start=WarmStartConfig()
    )
    train(config)
    rows = [row for row in read_metrics(tmp_path / "run") if "loss" in row]
    assert {row["grad_norm"] for row in rows} == {0.0}
    assert {row["packing/tokens"] for row in rows} == {0.0}
    assert {row["frac_reward_zero_std"] for row in rows} == {1.0}


def test_tokens_that_split_groups_repeat_are_counted(tmp_path):
    """A split changes no loss, and what it costs is what the step has more to encode."""
    found = {}
    rollout = RolloutConfig(num_generations=12, max_prompt_length=48, max_completion_length=5)
    for budget in (53, 4096):
        config = tiny_config(
            tmp_path / str(budget), max_tokens_per_pass=budget, max_steps=1,
            warm_start=WarmStartConfig(), data=DataConfig(eval_size=2), rollout=rollout,
        )  # fmt: skip
        train(config)
        (found[budget],) = [row for row in numbers(tmp_path / str(budget)) if "loss" in row]
    tight, wide = found[53], found[4096]
    assert wide["packing/repeated_tokens"] == 0
    extra = tight["packing/tokens"] - wide["packing/tokens"]
    assert tight["packing/repeated_tokens"] == extra > 0
    assert tight["packing/passes"] > wide["packing/passes"] == 1
    for name in ("loss", "grad_norm"):
        assert tight[name] == pytest.approx(wide[name], rel=1e-4, abs=1e-7)


def test_rows_at_the_head_take_their_part_of_the_budget(tmp_path):
    trainer = build_trainer(tiny_config(tmp_path / "run", max_tokens_per_pass=80))
    assert trainer.head_row_cost == head_row_cost(
        trainer.policy.model.config, bf16=False, is_checkpointed=False
    )
    passes = {}
    for cost in (trainer.head_row_cost, 3.0):
        trainer.head_row_cost = cost
        passes[cost] = trainer.train_step(0).metrics["packing/passes"]
    assert passes[3.0] > passes[min(passes)]


@pytest.mark.parametrize("method", ["dr_grpo", "lite_ppo", "cispo", "rloo", "reinforce"])
def test_every_method_trains(tmp_path, method):
    config = tiny_config(tmp_path / "run", method=method, max_steps=2)
    train(config)
    rows = [row for row in read_metrics(tmp_path / "run") if "loss" in row]
    assert all(row["grad_norm"] > 0 for row in rows)


REWARDS = """
import os, time

def lengths(completions):
    return [float(len(text) % 3) for text in completions]

def dangerous(completions, answer):
    if len(answer[0]) == 2 and len(completions) == 1:  # alone, after a prompt failed
        time.sleep(60 if len(completions[0]) % 2 else 0)
        os._exit(1)
    if len(answer[0]) == 2:
        os._exit(1)
    return [1.0 for _ in completions]
"""


def test_rewards_in_processes_of_their_own_train_to_the_same_bits(tmp_path):
    (tmp_path / "scores.py").write_text(REWARDS, encoding="utf-8")
    spec = f"{tmp_path / 'scores.py'}:lengths"
    for name, workers in (("here", 0), ("pool", 2)):
        config = tiny_config(tmp_path / name, rewards=(spec, "task"), reward_workers=workers)
        train(dataclasses.replace(config, max_steps=2))
    ours, theirs = (
        load_file(tmp_path / n / "final" / "model.safetensors") for n in ("here", "pool")
    )
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    for mine, other in zip(numbers(tmp_path / "here"), numbers(tmp_path / "pool"), strict=True):
        assert mine.items() <= other.items()
        assert not any(other.get(f"rewards/{name}") for name in ("timeouts", "crashes"))


def test_a_reward_that_hangs_or_crashes_is_counted_and_the_run_goes_on(tmp_path):
    (tmp_path / "scores.py").write_text(REWARDS, encoding="utf-8")
    specs = tuple(f"{tmp_path / 'scores.py'}:{name}" for name in ("lengths", "dangerous"))
    config = tiny_config(
        tmp_path / "run", rewards=specs, reward_workers=2, reward_timeout=0.5,
        rollout=RolloutConfig(num_generations=2, max_prompt_length=48, max_completion_length=5),
    )  # fmt: skip
    config = dataclasses.replace(config, max_steps=2)
    first = build_trainer(dataclasses.replace(config, rewards=specs[:1]))
    answers = [first.task.train_example(i).answer for i in range(48, 54)]
    first.sampler.scorer.close()
    assert 0 < sum(len(answer) == 2 for answer in answers) < 6
    summary = train(config)
    assert summary["steps"] == 2
    rows = [row for row in read_metrics(tmp_path / "run") if "reward" in row]
    total = sum(row["rewards/timeouts"] + row["rewards/crashes"] for row in rows)
    assert total >= 2 * sum(len(answer) == 2 for answer in answers)


@pytest.mark.parametrize(
    ("method", "num_iterations", "several", "runs"),
    [
        ("grpo", 1, True, 1),  # the policy is its own old policy
        ("grpo", 3, True, 3),  # the first iteration's log-probabilities are the old ones
        ("dppo_tv", 1, True, 1),  # the sampler's are
        ("dppo_tv", 3, True, 3),
        ("tis", 1, False, 1),  # one pass: its layers serve the correction and the loss
        ("tis", 1, True, 2),
    ],
)
def test_no_forward_pass_is_spent_on_old_logps(tmp_path, method, num_iterations, several, runs):
    """How often the layers see a pass: once an iteration, and once more only for a correction."""
    config = tiny_config(
        tmp_path / "run", method=method, max_tokens_per_pass=60 if several else 4096,
        num_iterations=num_iterations,
    )  # fmt: skip
    trainer = build_trainer(config)
    seen = []
    hidden_states = trainer.policy.hidden_states

    def counted(plan):
        seen.append(plan)
        return hidden_states(plan)

    trainer.policy.hidden_states = counted
    num_passes = trainer.train_step(0).metrics["packing/passes"]
    assert (num_passes > 1) == several
    assert len(seen) == runs * num_passes


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"engine_args": {"kv_cache_gib": 1e-5}}, "kv_cache_gib must hold one prompt"),
        ({"engine_args": {"kv_cache_gb": 1.0}}, "engine_args do not fit engine 'native'"),
        ({"engine_args": {"check_steps": -1}}, "check_steps must be a whole number of at least 0"),
        ({"engine": "naive"}, "unknown rollout.engine 'naive'; did you mean 'native'"),
        ({"stop_strings": ("",)}, "stop_strings has an empty string"),
    ],
)
def test_sampling_that_cannot_work_is_refused_before_a_run(tmp_path, settings, message):
    config = tiny_config(tmp_path / "run")
    config = dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, **settings))
    with pytest.raises(InputError, match=message):
        train(config)
    assert not (tmp_path / "run").exists()
