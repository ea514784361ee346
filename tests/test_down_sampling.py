"""Dropped tokens leave the computation: the gradient is that of masking them, row by row."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from fastrl.assembly import build_trainer
from fastrl.config import WarmStartConfig
from fastrl.down_sampling import check_scores, weigh_tokens, weighs_before_packing
from fastrl.errors import InputError
from fastrl.loss import NOT_MEASURED, backward, measure, token_statistics
from fastrl.methods import METHODS
from fastrl.methods.estimates import rows_to_train
from fastrl.methods.needs import looks_past_tokens
from fastrl.methods.record import Method, Penalty, use
from fastrl.packing import PackedPass, pack_rollouts
from fastrl.phases import prepare, start_inputs, step_loss
from fastrl.policy import Policy
from fastrl.savings import Work, down_sampling_metrics, row_flops, work_of
from fastrl.types import Rewards, Rollouts
from tests.helpers import random_rollouts, tiny_policy, with_float64_norms
from tests.test_training import tiny_config

PROMPTS = [5, 9, 2]
COMPLETIONS = [[4, 7, 1, 6], [3, 12, 5, 2], [8, 1, 1, 3]]
LENGTHS = [length for group in COMPLETIONS for length in group]
REWARDS = torch.tensor([1, 0, 0.5, 0.3, 0, 0.2, 0.9, 1, 1, 0.25, 0, 0.1], dtype=torch.float64)
B, G, TEMPERATURE = 12, 4, 0.9
CPU = torch.device("cpu")


def policy_of(kind: str) -> Policy:
    """In float64: every weight trained, LoRA on two projections, or checkpointed layers."""
    policy = tiny_policy(dtype=torch.float64)
    with_float64_norms(policy.model)
    if kind == "lora":
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(r=3, target_modules=["q_proj", "up_proj"])
        policy.model = peft.inject_adapter_in_model(config, policy.model)
        generator = torch.Generator().manual_seed(4)
        policy.model.double()
        for name, parameter in policy.model.named_parameters():
            parameter.requires_grad_("lora" in name)
            if "lora" in name:
                torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    if kind == "checkpointed":
        policy.model.train().gradient_checkpointing_enable({"use_reentrant": False})
    return policy


def dense_rows(policy: Policy, rollouts: Rollouts) -> list[tuple[Tensor, Tensor]]:
    """Log-probabilities and entropies of every completion, each by itself through the model."""
    found = []
    for b, completion in enumerate(rollouts.completion_ids):
        prompt = rollouts.prompts.token_ids[b // G]
        logits = policy.model(input_ids=torch.cat([prompt, completion])[None]).logits[0]
        table = (logits[len(prompt) - 1 : -1] / TEMPERATURE).log_softmax(-1)
        logps = table.gather(1, completion[:, None])[:, 0]
        found.append((logps, -(table.exp() * table).sum(-1)))
    return found


def recorded_rollouts(policy: Policy) -> Rollouts:
    """Random completions with the entropies that the policy itself has on them."""
    rollouts = random_rollouts(PROMPTS, COMPLETIONS)
    with torch.no_grad():
        rows = dense_rows(policy, rollouts)
    return dataclasses.replace(
        rollouts,
        rollout_logps=tuple(logps for logps, _ in rows),
        rollout_entropies=tuple(entropies for _, entropies in rows),
    )


def gradients(policy: Policy) -> dict[str, Tensor]:
    found = {n: p.grad.clone() for n, p in policy.model.named_parameters() if p.grad is not None}
    policy.model.zero_grad(set_to_none=True)
    return found


def our_step(
    policy: Policy, reference: Policy, method: Method, scores_from: str, budget: int
) -> tuple[float, dict[str, Tensor], list[PackedPass]]:
    """Loss and gradients of one optimizer step the way the trainer makes them."""
    rollouts = recorded_rollouts(policy)
    inputs = start_inputs(
        rollouts, Rewards(REWARDS.float(), {}), rollouts.lengths, max_completion_length=12,
        progress=0.25, generator=torch.Generator().manual_seed(5),
    )  # fmt: skip
    inputs, advantages, kept = rows_to_train(method, dataclasses.replace(inputs, rewards=REWARDS))
    weighted = weigh_tokens(method, rollouts, inputs, kept, scores_from=scores_from, is_exact=True)
    passes = pack_rollouts(
        rollouts, weighted.kept, advantages, weighted.weights,
        max_tokens_per_pass=budget, device=CPU, dtype=torch.float64,
    )  # fmt: skip

    def with_reference(item: PackedPass) -> PackedPass:
        logps = token_statistics(reference, item.plan, TEMPERATURE).logps
        return PackedPass(item.plan, dataclasses.replace(item.batch, ref_logps=logps))

    passes = [with_reference(item) for item in passes]
    measured = NOT_MEASURED
    if looks_past_tokens(weighted.method):
        measured = measure(policy, passes, TEMPERATURE)
    hidden = measured.hidden_states
    ready = prepare(weighted.method, inputs, passes, measured.statistics, trim=hidden is None)
    losses = backward(policy, ready, TEMPERATURE, hidden)
    return step_loss(ready, losses), gradients(policy), ready.passes


def masked_step(
    policy: Policy, reference: Policy, *, completions: list[int], fraction: float, score: str,
    leaves_denominator: bool,
) -> tuple[float, dict[str, Tensor], int]:  # fmt: skip
    """Loss and gradients with every token computed and the dropped ones multiplied by zero."""
    rollouts = random_rollouts(PROMPTS, COMPLETIONS)
    groups = REWARDS.view(-1, G)
    advantages = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)
    rows = dense_rows(policy, rollouts)
    with torch.no_grad():
        ref_rows = dense_rows(reference, rollouts)
    losses, scores = [], []
    for b, advantage in enumerate(advantages.flatten()):
        logps, entropies = rows[b]
        delta = logps - ref_rows[b][0]
        ratio = (logps - logps.detach()).exp()
        surrogate = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
        losses.append(-surrogate + 0.05 * ((-delta).exp() - 1 + delta) - 0.01 * entropies)
        scores.append(entropies.detach() * (advantage.abs() if score == "|A| H" else 1))
    is_candidate = torch.cat([torch.full((n,), b in completions) for b, n in enumerate(LENGTHS)])
    all_scores = torch.cat(scores).masked_fill(~is_candidate, -math.inf)
    num_candidates = int(is_candidate.sum())
    num_kept = int(fraction * num_candidates)
    if score == "H":
        num_kept = 1 + math.floor(fraction * (num_candidates - 1))
    mask = torch.zeros(len(all_scores), dtype=torch.float64)
    mask[all_scores.argsort(descending=True)[:num_kept]] = 1
    loss = (mask * torch.cat(losses)).sum() / (num_kept if leaves_denominator else num_candidates)
    loss.backward()
    return float(loss.detach()), gradients(policy), num_kept


METHOD = Method(
    "d3s", "", "", token_weights=use("advantage_entropy", fraction=0.3),
    penalties=(Penalty(use("k3"), 0.05),), entropy_coef=0.01,
)  # fmt: skip
TOP_ENTROPY = dataclasses.replace(METHOD, token_weights=use("high_entropy", fraction=0.3))
EXTREMES = [b for b in range(B) if REWARDS[b] in (REWARDS.view(-1, G)[b // G].aminmax())]


@pytest.mark.parametrize("kind", ["whole", "lora", "checkpointed"])
@pytest.mark.parametrize("scores_from", ["sampler", "policy"])
@pytest.mark.parametrize("budget", [1000, 22])
def test_gradient_is_that_of_the_masked_dense_computation(kind, scores_from, budget):
    policy, reference = policy_of(kind), tiny_policy(dtype=torch.float64, seed=1)
    with_float64_norms(reference.model)
    for method, expected in (
        (METHOD, {"score": "|A| H", "leaves_denominator": True, "completions": [*range(B)]}),
        (TOP_ENTROPY, {"score": "H", "leaves_denominator": False, "completions": [*range(B)]}),
        (
            dataclasses.replace(METHOD, selection=use("best_and_worst")),
            {"score": "|A| H", "leaves_denominator": True, "completions": EXTREMES},
        ),
    ):
        truth = masked_step(policy, reference, fraction=0.3, **expected)
        loss, found, passes = our_step(policy, reference, method, scores_from, budget)
        assert sum(len(item.batch.target_ids) for item in passes) == truth[2]
        assert loss == pytest.approx(truth[0], abs=1e-12)
        assert found.keys() == truth[1].keys()
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, truth[1][name], rtol=0, atol=1e-12, msg=name)


def test_what_is_dropped_is_not_encoded():
    policy, reference = policy_of("whole"), tiny_policy(dtype=torch.float64, seed=1)
    method = dataclasses.replace(METHOD, token_weights=use("advantage_entropy", fraction=0.05))
    num_packed = {}
    for scores_from, budget in (("sampler", 1000), ("policy", 22), ("policy", 1000)):
        passes = our_step(policy, reference, method, scores_from, budget)[2]
        num_packed[scores_from, budget] = sum(len(item.plan.input_ids) for item in passes)
        for item in passes if (scores_from, budget) != ("policy", 1000) else []:
            sees = item.plan.segments.visibility()
            assert sees[item.plan.source_index].any(0).all()
    whole = sum(PROMPTS) + sum(LENGTHS) - B
    assert num_packed["policy", 1000] == whole  # its layers have run before anything was dropped
    assert num_packed["sampler", 1000] < whole / 2


def test_random_tokens_need_no_policy():
    """They are drawn before packing whatever the sampler recorded, and hit a third of them all."""
    policy, reference = policy_of("whole"), tiny_policy(dtype=torch.float64, seed=1)
    method = dataclasses.replace(METHOD, token_weights=use("random", fraction=1 / 3))
    _, _, passes = our_step(policy, reference, method, "policy", 1000)
    weights = torch.cat([item.batch.token_weights for item in passes])
    assert len(weights) == sum(LENGTHS) // 3
    expected = torch.full_like(weights, 1 / len(weights))  # (S / K) / S
    torch.testing.assert_close(weights, expected, rtol=1e-14, atol=0)


def test_the_sampler_is_asked_where_it_knows():
    rollouts = recorded_rollouts(policy_of("whole"))
    silent = dataclasses.replace(rollouts, rollout_entropies=None)

    def before(method, rollouts, scores_from, *, is_exact=True):
        return weighs_before_packing(method, rollouts, scores_from=scores_from, is_exact=is_exact)

    assert before(METHOD, rollouts, "auto")
    assert before(METHOD, rollouts, "sampler", is_exact=False)
    assert not before(METHOD, rollouts, "auto", is_exact=False)
    assert not before(METHOD, silent, "auto")
    assert not before(METHOD, rollouts, "policy")
    random = dataclasses.replace(METHOD, token_weights=use("random"))
    assert before(random, silent, "policy", is_exact=False)
    with pytest.raises(InputError, match=r"recorded no entropies.*rollout\.engine"):
        before(METHOD, silent, "sampler")
    by_sequence = dataclasses.replace(METHOD, surrogate=use("geometric_token_ratio"))
    assert not before(by_sequence, rollouts, "auto")
    assert not before(METHODS["clip_cov"], rollouts, "auto")
    assert not before(METHODS["grpo"], rollouts, "auto")


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (METHODS["clip_cov"], "clip_covariance look at clipped, logps"),
        (METHODS["grpo"], "'grpo' scores no tokens"),
        (
            dataclasses.replace(METHOD, surrogate=use("geometric_token_ratio")),
            "belong to a method that looks past tokens",
        ),
    ],
)
def test_scores_that_a_sampler_cannot_know(method, message):
    check_scores(method, "auto")
    check_scores(method, "policy")
    with pytest.raises(InputError, match=message):
        check_scores(method, "sampler")


def test_savings_are_counted():
    """Of 11 + 3 tokens behind a prompt of 4, three are trained, and one completion is dropped."""
    rollouts = random_rollouts([4], [[6, 5, 3]])
    rows = [[0, 1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0]]
    passes = pack_rollouts(
        rollouts, torch.ones(3, dtype=torch.bool), torch.ones(3),
        [torch.tensor(row, dtype=torch.float64) for row in rows],
        max_tokens_per_pass=100, device=CPU,
    )  # fmt: skip
    measured = Work(tokens=15, rows=14)
    found = down_sampling_metrics(rollouts, passes, measured, row_flops=2.0)
    packed, trained = 4 + (5 + 4 + 2), 4 + (2 + 2)
    assert found == {
        "down_sampling/completions_dropped": 1,
        "down_sampling/rows_skipped": 14 - 3,
        "down_sampling/tokens_trimmed": packed - trained,
        "down_sampling/flops_saved": pytest.approx(
            1 - (3 * (trained + 2 * 3) + 15 + 2 * 14) / (3 * (packed + 2 * 14))
        ),
        "down_sampling/step_skipped": 0,
    }
    nothing = down_sampling_metrics(rollouts, [], Work(), row_flops=2.0)
    assert nothing["down_sampling/flops_saved"] == nothing["down_sampling/step_skipped"] == 1
    whole = pack_rollouts(
        rollouts, torch.ones(3, dtype=torch.bool), torch.ones(3), torch.ones(3),
        max_tokens_per_pass=10, device=CPU,
    )  # fmt: skip
    assert len(whole) > 1  # a prompt that is encoded again is not a token that was added
    found = down_sampling_metrics(rollouts, whole, Work(), row_flops=2.0)
    assert found["down_sampling/tokens_trimmed"] == found["down_sampling/rows_skipped"] == 0
    assert work_of(whole, runs_layers=False) == Work(0, 14)


def test_a_row_at_the_head_by_its_weights():
    policy = tiny_policy()
    layers = policy.model.base_model.layers
    outside = sum(p.numel() for p in layers.parameters()) + 32  # and the last norm
    assert row_flops(policy.model) == len(policy.tokenizer) * 32 / outside


def trainer_of(directory, method: str, num_iterations: int = 1, **objective):
    config = tiny_config(
        directory, method=method, num_iterations=num_iterations, objective=objective,
        warm_start=WarmStartConfig(),
    )  # fmt: skip
    return build_trainer(config)


@pytest.mark.parametrize("scores_from", ["sampler", "policy"])
def test_a_trainer_logs_what_it_saves(tmp_path, scores_from):
    """A fifth of the tokens is trained; only what is known before packing shortens the row."""
    trainer = trainer_of(tmp_path, "entropy_top20", scores_from=scores_from, num_iterations=2)
    metrics = trainer.train_step(0).metrics
    num_tokens = metrics["completions/mean_length"] * 12
    kept = num_tokens - metrics["down_sampling/rows_skipped"]
    assert 0.1 * num_tokens < kept <= 1 + 0.2 * num_tokens
    assert metrics["down_sampling/step_skipped"] == 0
    assert metrics["grad_norm"] > 0
    assert abs(metrics["old_kl/k1"]) < 0.1
    trimmed = metrics["down_sampling/tokens_trimmed"]
    assert (trimmed > 0) == (scores_from == "sampler")
    saved = trainer.train_step(1).metrics["down_sampling/flops_saved"]
    assert 0 < saved < 1


def test_a_token_that_is_picked_later_has_its_own_old_logp(tmp_path):
    """Half of the tokens is drawn anew in every iteration; the weights hardly move in between."""
    parameters = {"fraction": 0.5, "lowest": -1e9, "highest": 1e9}
    trainer = trainer_of(tmp_path, "clip_cov", num_iterations=3, parameters=parameters)
    for group in trainer.optimizer.param_groups:
        group["peak_lr"] = 1e-9
    metrics = trainer.train_step(0).metrics
    assert metrics["down_sampling/rows_skipped"] > 0
    assert abs(metrics["old_kl/k1"]) < 1e-4
    assert metrics["ratio/max"] == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("budget", [60, 4096])
@pytest.mark.parametrize(
    ("method", "fields"),
    [
        ("grpo", {"selection": "multiple_of", "parameters": {"multiple": 100}}),
        ("clip_cov", {"parameters": {"fraction": 1.0, "lowest": -1e9, "highest": 1e9}}),
    ],
)
def test_a_step_that_keeps_nothing_is_skipped_and_counted(tmp_path, method, fields, budget):
    trainer = trainer_of(tmp_path, method, **fields)
    trainer.recovery.max_tokens_per_pass = budget
    before = [p.detach().clone() for p in trainer.policy.model.parameters()]
    metrics = trainer.train_step(0).metrics
    assert metrics["down_sampling/step_skipped"] == 1
    assert metrics["down_sampling/completions_dropped"] == 12
    assert metrics["grad_norm"] == metrics["loss"] == 0
    for old, new in zip(before, trainer.policy.model.parameters(), strict=True):
        assert torch.equal(old, new)
    assert not trainer.optimizer.state
