"""From a config to the objects that train it, with every check that needs no compute."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path

import torch

from fastrl.activations import smallest_pass
from fastrl.carried import check_partial_rollouts
from fastrl.config import Config
from fastrl.config_io import objective_of
from fastrl.conversations import check_contexts, check_conversations, to_the_last_turn
from fastrl.down_sampling import check_scores
from fastrl.errors import InputError
from fastrl.integrations.schedules import make_schedule
from fastrl.methods.checks import check_generations, check_sizes
from fastrl.methods.resolve import resolve_method
from fastrl.optim import check_optimizer
from fastrl.packing import pack
from fastrl.policy import Policy, load_policy, new_policy
from fastrl.rewards import LocalScorer, RewardPool, Scorer, load_rewards
from fastrl.rollout.native import NativeEngine
from fastrl.rollout.stopping import stop_strings_of
from fastrl.rollout.thinking import check_thinking
from fastrl.tasks import Task, load_task
from fastrl.trainer import Trainer

TOKENIZER_SAMPLE = 2048
"""Training examples whose text a fresh tokenizer is learnt from."""


def build_trainer(config: Config, directory: Path | None = None) -> Trainer:
    """Task, rewards, policy and method of a config; the policy from `directory` if one is given."""
    method = resolve_method(config.method, objective_of(config))
    check_generations(method, config.rollout.num_generations)
    check_sizes(
        method,
        num_generations=config.rollout.num_generations,
        max_completion_length=config.rollout.max_completion_length,
        num_rewards=len(config.rewards),
    )
    check_scores(method, method.scores_from)
    check_optimizer(config)
    make_schedule(config.optim, config.max_steps)
    longest = config.rollout.max_prompt_length + config.rollout.max_completion_length - 1
    if longest > config.max_tokens_per_pass:
        raise InputError(
            f"max_tokens_per_pass must hold one prompt and completion, at least {longest} tokens "
            f"(max_prompt_length + max_completion_length - 1), got {config.max_tokens_per_pass}"
        )
    task, scorer = load_task_and_scorer(config)
    try:
        check_conversations(config, method, task)
        policy = _policy(config, task, directory)
        _check_packing(policy)
        trainer = Trainer(config, policy, task, scorer, method)
        check_partial_rollouts(config, method, trainer.sampler.engine)
        _check_lengths(config, trainer)
    except BaseException:
        scorer.close()
        raise
    return trainer


def load_task_and_scorer(config: Config) -> tuple[Task, Scorer]:
    """What is asked and who scores the answers, tried on what is known before a run."""
    if not config.task:
        raise InputError("no task given; set task = 'reasoning_gym:NAME' or 'jsonl:PATH'")
    task = _task(config)
    scorer: Scorer
    if config.reward_workers:
        scorer = RewardPool(
            config.rewards, config.reward_weights, partial(_task, config),
            num_workers=config.reward_workers, timeout_s=config.reward_timeout,
        )  # fmt: skip
    else:
        scorer = LocalScorer(load_rewards(config.rewards, config.reward_weights, task))
    unanswered = [example for example in task.known_examples() if example.answer is None]
    try:
        for example in (task.train_example(0), *unanswered[:1]):
            scorer.check(to_the_last_turn(example))
    except BaseException:
        scorer.close()
        raise
    return task, scorer


def _task(config: Config) -> Task:
    return load_task(
        config.task,
        config.task_args,
        seed=config.seed,
        eval_size=config.data.eval_size,
        eval_path=config.data.eval_path,
        answer_tag=config.data.answer_tag,
        system_prompt=config.data.system_prompt,
    )


def _policy(config: Config, task: Task, directory: Path | None) -> Policy:
    if directory is not None:
        return load_policy(config.model, directory, seed=config.seed)
    if config.model.path is not None:
        if config.model.architecture:
            raise InputError("model.path and model.architecture exclude each other; remove one")
        return load_policy(config.model, config.model.path, seed=config.seed)
    if not config.model.architecture:
        raise InputError("no model given; set model.path or model.architecture")
    examples = [task.train_example(index) for index in range(TOKENIZER_SAMPLE)]
    texts = [f"{example.prompt}{example.answer or ''}" for example in examples]
    return new_policy(config.model, texts, seed=config.seed)


def _check_packing(policy: Policy) -> None:
    """The model must be able to run a packed row: two completions of one token's prompt."""
    ids = torch.tensor([policy.eos_token_ids[0]] * 2)
    plan = pack([ids[:1]], [[ids, ids]]).to(policy.device)
    try:
        with torch.no_grad():
            policy.hidden_states(plan)
    except InputError:
        raise
    except Exception as error:  # whatever a layer of inconsistent shape happens to raise
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"the model cannot run a packed row: {reason}") from error


def _check_lengths(config: Config, trainer: Trainer) -> None:
    """Prompts, positions and, for a warm start, solutions must fit before anything is spent."""
    first = [trainer.task.train_example(index) for index in range(config.prompts_per_step)]
    known = [*first, *trainer.task.known_examples()]
    trainer.encode(known)
    check_contexts(known, trainer.encode, config.rollout)
    positions = getattr(trainer.policy.model.config.get_text_config(), "max_position_embeddings", 0)
    needed = config.rollout.max_prompt_length + config.rollout.max_completion_length
    rows = trainer.head_row_cost * config.rollout.max_completion_length
    rollout = config.rollout
    least = smallest_pass(
        rollout.max_prompt_length, rollout.max_completion_length, trainer.head_row_cost
    )
    if least > config.max_tokens_per_pass:
        raise InputError(
            f"max_tokens_per_pass must hold one prompt and completion with its rows at the head, "
            f"at least {least} tokens ({rows:.1f} of them for the rows), "
            f"got {config.max_tokens_per_pass}"
        )
    if positions and needed > positions:
        raise InputError(
            f"max_prompt_length + max_completion_length is {needed} tokens but the model has "
            f"{positions} positions; lower them"
        )
    _check_sampling(config, trainer)
    if config.warm_start.steps:
        for example in (*first, *trainer.task.known_examples()):
            trainer.encode_solution(example)


def _check_sampling(config: Config, trainer: Trainer) -> None:
    """What ends completions can occur, and the largest group finds room."""
    sampler = trainer.sampler
    stop_strings_of(trainer.policy.tokenizer, config.rollout.stop_strings)
    if sampler.sampling.thinking is not None:
        check_thinking(
            trainer.policy.tokenizer, trainer.policy.eos_token_ids, sampler.sampling.thinking,
            config.rollout.max_completion_length,
        )  # fmt: skip
    if isinstance(sampler.engine, NativeEngine):
        most = max(config.rollout.num_generations, config.eval.num_samples)
        largest = dataclasses.replace(sampler.sampling, num_generations=most)
        sampler.engine.check(config.rollout.max_prompt_length, largest)
