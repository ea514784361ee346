"""Conversations of several turns: drawn turns, the policy's own contexts, REFUEL's loss, resume."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter

import pytest
import torch

from fastrl.assembly import build_trainer
from fastrl.config import (
    DataConfig,
    EvalConfig,
    ModelConfig,
    OptimConfig,
    RolloutConfig,
    SaveConfig,
    WarmStartConfig,
)
from fastrl.conversations import draw_turns
from fastrl.encoding import decode_completions
from fastrl.errors import InputError
from fastrl.held_out import evaluate_held_out
from fastrl.phase_clock import PhaseClock
from fastrl.report import read_metrics
from fastrl.rescore import rescore
from fastrl.run import train
from fastrl.types import Example
from tests.helpers import TINY, tiny_policy
from tests.helpers_updates import make_exact
from tests.test_training import assert_same_run, numbers, tiny_config, weights

TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}{{ m.content }};{% endfor %}"
    "{% if add_generation_prompt %}a{% endif %}"
)
REWARD = """
SEEN = []


def whole(prompts, completions, answer):
    found = []
    for prompt, completion, wanted in zip(prompts, completions, answer, strict=True):
        messages = [*prompt, *completion]
        SEEN.append((messages, wanted))
        found.append(sum(k * sum(map(ord, m["content"])) for k, m in enumerate(messages)) % 11 / 10)
    return found
"""
SCRIPTS = [[f"{a} + {b}?" for b in range(1 + a % 3)] for a in range(12)]
ROLLOUT = RolloutConfig(num_generations=2, max_prompt_length=60, max_completion_length=4)


def score(messages) -> float:
    """The reward above."""
    return sum(k * sum(map(ord, m["content"])) for k, m in enumerate(messages)) % 11 / 10


@pytest.fixture
def config(tmp_path):
    """Four steps of four conversations of one to three turns."""
    policy = tiny_policy(max_position_embeddings=256)
    policy.tokenizer.chat_template = TEMPLATE
    policy.save(tmp_path / "model")
    (tmp_path / "reward.py").write_text(REWARD)
    write(tmp_path / "data.jsonl", [{"turns": x, "answer": x[-1]} for x in SCRIPTS])
    return tiny_config(
        tmp_path / "run", method="refuel", task=f"jsonl:{tmp_path / 'data.jsonl'}", task_args={},
        rewards=(f"{tmp_path / 'reward.py'}:whole",), rollout=ROLLOUT, prompts_per_step=4,
        model=ModelConfig(path=str(tmp_path / "model")), warm_start=WarmStartConfig(),
        data=DataConfig(eval_size=3), eval=EvalConfig(num_samples=2), max_tokens_per_pass=256,
    )  # fmt: skip


def write(path, records) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def seen_by(trainer):
    """The conversations that the reward has been given, which the caller may clear."""
    (reward,) = trainer.sampler.scorer.rewards
    spec = reward.function.__closure__
    (function,) = [cell.cell_contents for cell in spec if callable(cell.cell_contents)]
    return function.__globals__["SEEN"]


def users(messages):
    return [m["content"] for m in messages if m["role"] == "user"]


def replies(messages):
    return [m["content"] for m in messages if m["role"] == "assistant"]


def test_all_turns_are_drawn_alike():
    example = Example([{"role": "user", "content": "a"}], later_turns=("b", "c"))
    generator = torch.Generator().manual_seed(0)
    counts = Counter(draw_turns([example] * 3000, generator))
    assert sorted(counts) == [0, 1, 2]
    assert all(abs(count - 1000) < 4 * (3000 * 2 / 9) ** 0.5 for count in counts.values())


def test_a_group_branches_at_its_turn_and_is_scored_for_the_end(config):
    """Of every completion: what the reward saw goes on from its context and says the whole script.

    Rewards are those of the conversation that goes on from it, and nobody else's.
    """
    trainer = build_trainer(config)
    seen = seen_by(trainer)
    turns = Counter()
    for step in range(3):
        del seen[:]
        sampled = trainer.sample(step, PhaseClock()).everything
        rollouts, texts, rewards = sampled
        assert rollouts.num_generations == 2
        for row, (text, total) in enumerate(zip(texts, rewards.total.tolist(), strict=True)):
            example = rollouts.prompts.examples[row // 2]
            context, (messages, wanted) = example.prompt, seen[row]
            assert messages[: len(context)] == context
            assert messages[len(context)] == {"role": "assistant", "content": text}
            assert users(messages) in SCRIPTS
            assert wanted == users(messages)[-1]
            assert len(replies(messages)) == len(users(messages))
            assert len(users(context)) + len(example.later_turns) == len(users(messages))
            assert total == pytest.approx(score(messages))
            turns[len(users(context)), len(users(messages))] += 1
        encoded = trainer.policy.tokenizer.apply_chat_template(
            rollouts.prompts.examples[0].prompt, add_generation_prompt=True, return_dict=False
        )
        assert rollouts.prompts.token_ids[0].tolist() == encoded
    assert {turn for turn, _ in turns} == {1, 2, 3}
    assert any(turn < num_turns for turn, num_turns in turns), "some conversations go on"


def test_the_context_is_the_policys_own(config):
    """At a temperature of almost 0, answers before and after the turn are the most likely ones."""
    rollout = dataclasses.replace(ROLLOUT, temperature=1e-4)
    trainer = build_trainer(dataclasses.replace(config, rollout=rollout))
    seen = seen_by(trainer)
    found = []
    for step in range(2):
        del seen[:]
        trainer.sample(step, PhaseClock())
        for messages, _ in seen:
            for place in range(1, len(messages), 2):
                assert messages[place]["content"] == most_likely(trainer, messages[:place])
        found.append([messages for messages, _ in seen if len(messages) > 2])
        with torch.no_grad():  # the contexts of the next step are those of other weights
            for weight in trainer.policy.model.parameters():
                weight.copy_(weight.flip(0))
    first, second = ({messages[1]["content"] for messages in each} for each in found)
    assert first != second


def most_likely(trainer, messages) -> str:
    policy = trainer.policy
    ids = policy.tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    start = len(ids)
    while len(ids) < start + ROLLOUT.max_completion_length:
        with torch.no_grad():
            ids = [*ids, int(policy.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())]
        if ids[-1] in policy.eos_token_ids:
            break
    return decode_completions([torch.tensor(ids[start:])], policy.tokenizer)[0]


def test_a_step_is_the_formula(config):
    """mean (D1 - D2 - 1000 (R1 - R2))^2 over pairs, D of the turn's tokens, at the first update."""
    trainer = build_trainer(config)
    make_exact(trainer, learning_rate=0.0)
    state = trainer.sampler.stream.state_dict()
    rollouts, _, rewards = trainer.sample(0, PhaseClock()).trained
    trainer.sampler.stream.load_state_dict(state)
    model, totals = trainer.policy.model, rewards.total.double()
    sums = []
    for row, completion in enumerate(rollouts.completion_ids):
        prompt = rollouts.prompts.token_ids[row // 2]
        logits = model(input_ids=torch.cat([prompt, completion])[None]).logits[0]
        logps = logits[len(prompt) - 1 : -1].log_softmax(dim=1)
        sums.append(logps.gather(1, completion[:, None]).sum())
    ratios = [total - total.detach() for total in sums]
    errors = [
        ratios[row] - ratios[row + 1] - 1000.0 * (totals[row] - totals[row + 1])
        for row in range(0, len(ratios), 2)
    ]
    loss = torch.stack(errors).square().mean()
    assert loss > 0
    loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    gradients = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        p.register_hook(lambda gradient, name=name: gradients[name].add_(gradient))
    output = trainer.train_step(0)
    assert output.metrics["loss"] == pytest.approx(float(loss.detach()), rel=1e-9)
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-6, atol=1e-7)
    assert 1 <= output.metrics["conversations/turn"] <= output.metrics["conversations/num_turns"]
    lengths = [1 + len(trainer.task.train_example(index).later_turns) for index in range(4)]
    assert output.metrics["conversations/num_turns"] == sum(lengths) / 4


def test_with_one_turn_it_is_rebel(config, tmp_path):
    write(tmp_path / "one.jsonl", [{"turns": x[:1], "answer": "1"} for x in SCRIPTS])
    chats = [{"prompt": [{"role": "user", "content": x[0]}], "answer": "1"} for x in SCRIPTS]
    write(tmp_path / "chat.jsonl", chats)
    config = dataclasses.replace(config, num_iterations=2)
    train(dataclasses.replace(config, task=f"jsonl:{tmp_path / 'one.jsonl'}"))
    rebel = {"method": "rebel", "objective": {"parameters": {"eta": 1000.0}}}
    train(dataclasses.replace(
        config, **rebel, task=f"jsonl:{tmp_path / 'chat.jsonl'}", output_dir=str(tmp_path / "rebel")
    ))  # fmt: skip
    rows = numbers(tmp_path / "run")
    turns = [row.pop("conversations/turn") for row in rows if "loss" in row]
    assert turns == [row.pop("conversations/num_turns") for row in rows if "loss" in row] == [1] * 4
    assert rows == numbers(tmp_path / "rebel")
    for name, value in weights(tmp_path / "run").items():
        assert torch.equal(value, weights(tmp_path / "rebel")[name]), name


@pytest.mark.parametrize("checkpoint_step", [1, 3])
def test_resume_is_exact(config, tmp_path, checkpoint_step):
    """The same turns, contexts and weights after a checkpoint; another seed draws others."""
    whole = dataclasses.replace(config, output_dir=str(tmp_path / "whole"))
    train(whole)
    save = SaveConfig(save_steps=checkpoint_step)
    parted = dataclasses.replace(config, output_dir=str(tmp_path / "parted"), save=save)
    train(dataclasses.replace(parted, max_steps=checkpoint_step))
    train(parted, resume=True)
    of = [[row for row in numbers(tmp_path / x) if "loss" in row] for x in ("whole", "parted")]
    assert of[0] == of[1]
    assert len({row["conversations/turn"] for row in of[0]}) > 1
    for name, value in weights(tmp_path / "whole").items():
        assert torch.equal(value, weights(tmp_path / "parted")[name]), name
    texts = [(tmp_path / x / "completions.jsonl").read_text() for x in ("whole", "parted")]
    assert texts[0] == texts[1]


def test_rewards_in_processes_of_their_own_score_alike(config, tmp_path):
    train(config)
    pooled = dataclasses.replace(config, reward_workers=2, output_dir=str(tmp_path / "pooled"))
    train(pooled)
    found = [
        [(row["reward"], row["loss"]) for row in numbers(tmp_path / x) if "loss" in row]
        for x in ("run", "pooled")
    ]
    assert found[0] == found[1]


def test_held_out_conversations_are_had_to_their_end(config):
    trainer = build_trainer(config)
    seen = seen_by(trainer)
    del seen[:]
    examples = trainer.task.eval_examples()
    evaluation = evaluate_held_out(trainer, trainer.encode(examples))
    assert evaluation.mean_reward == pytest.approx(sum(score(x) for x, _ in seen) / len(seen))
    scripts = [[x.prompt[0]["content"], *x.later_turns] for x in examples for _ in range(2)]
    assert [users(messages) for messages, _ in seen] == scripts
    assert all(len(replies(messages)) == len(users(messages)) for messages, _ in seen)


def test_a_replayed_run_is_the_run_that_was_saved(config, tmp_path):
    train(config, save_rollouts=tmp_path / "saved")
    again = dataclasses.replace(config, output_dir=str(tmp_path / "again"))
    train(again, replay_rollouts=tmp_path / "saved")
    assert_same_run(tmp_path / "run", tmp_path / "again")
    with pytest.raises(InputError, match="not how they ended"):
        rescore(config, tmp_path / "saved")
    other = dataclasses.replace(again, seed=1, output_dir=str(tmp_path / "other"))
    with pytest.raises(InputError, match="recorded with other prompts"):
        train(other, replay_rollouts=tmp_path / "saved")


def test_a_system_prompt_is_in_every_context(config, tmp_path):
    data = dataclasses.replace(config.data, system_prompt="S")
    train(dataclasses.replace(config, data=data, max_steps=2))
    shown = [json.loads(x) for x in (tmp_path / "run/completions.jsonl").read_text().splitlines()]
    assert {row["prompt"][0]["content"] for row in shown} == {"S"}
    assert {len(row["prompt"]) % 2 for row in shown} == {0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"method": "rebel"},
            r"such as .*\?', but method 'rebel' trains on the answer",
        ),
        ({"method": "astar_po"}, "use method 'refuel', or records with 'prompt'"),
        ({"warm_start": WarmStartConfig(steps=1)}, r"set warm_start\.steps = 0"),
        (
            {"rollout": dataclasses.replace(ROLLOUT, max_prompt_length=36)},
            r"can have \d+ tokens before its last answer, 2 answers of max_completion_length=4 "
            "among them, more than max_prompt_length=36",
        ),
        ({"rollout": dataclasses.replace(ROLLOUT, num_generations=1)}, "must be at least 2"),
        ({"objective": {"max_pass_rate": 0.5}}, "max_pass_rate is of prompts that come again"),
        (
            {"rollout": dataclasses.replace(ROLLOUT, max_tokens_per_step=64)},
            "trains on tokens of older policies",
        ),
    ],
)
def test_what_does_not_suit_conversations_is_refused(config, changes, message):
    with pytest.raises(InputError, match=message):
        build_trainer(dataclasses.replace(config, **changes))


def test_a_tokenizer_without_a_template_is_refused(config):
    model = ModelConfig(architecture={"model_type": "qwen3", **TINY})
    with pytest.raises(InputError, match="needs a tokenizer with a chat template"):
        build_trainer(dataclasses.replace(config, model=model))


def test_the_turns_are_in_the_logs(config, tmp_path):
    train(dataclasses.replace(config, max_steps=3))
    rows = [row for row in read_metrics(tmp_path / "run") if "loss" in row]
    for row in rows:
        assert 1 <= row["conversations/turn"] <= row["conversations/num_turns"] <= 3
        assert row["grad_norm"] > 0


def test_it_learns(config, tmp_path):
    """Letters in all answers of a conversation: more of them, though a step trains one turn."""
    (tmp_path / "letters.py").write_text(
        "def letters(prompts, completions):\n"
        "    found = []\n"
        "    for prompt, completion in zip(prompts, completions, strict=True):\n"
        "        said = [m['content'] for m in [*prompt, *completion][1::2]]\n"
        "        shares = [sum(map(str.isalpha, x)) / max(len(x), 1) for x in said]\n"
        "        found.append(sum(shares) / len(shares))\n"
        "    return found\n"
    )
    config = dataclasses.replace(
        config, rewards=(f"{tmp_path / 'letters.py'}:letters",), max_steps=24, prompts_per_step=16,
        optim=OptimConfig(learning_rate=5e-3), eval=EvalConfig(num_samples=8),
    )  # fmt: skip
    train(config)
    found = [row["eval_reward"] for row in read_metrics(tmp_path / "run") if "eval_reward" in row]
    assert found[-1] > found[0] + 0.3, found
