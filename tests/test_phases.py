"""Methods that look past single tokens: the gradient of a step is that of the written-out loss."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastrl.loss import policy_pass_loss, token_statistics
from fastrl.methods.axes import hyper_parameters_of
from fastrl.methods.coefficients import completion_weights
from fastrl.methods.defaults import DEFAULTS
from fastrl.methods.estimates import rows_to_train, token_advantages
from fastrl.methods.inputs import StepInputs
from fastrl.methods.needs import LEARN_WITHOUT_ADVANTAGE, estimates_from_tokens
from fastrl.methods.record import Method, Penalty, use
from fastrl.packing import PackedPass, pack_rollouts
from fastrl.phases import estimates, prepare, start_inputs, step_loss
from fastrl.policy import Policy
from fastrl.types import Rewards, Rollouts
from fastrl_kernels import LMHead
from fastrl_kernels.objectives import SURROGATES, Objective, evaluate
from tests.helpers import random_rollouts, tiny_model, tiny_policy, with_float64_norms

PROMPTS = [5, 9, 2]
COMPLETIONS = [[4, 7, 1, 6], [3, 12, 5, 2], [8, 1, 1, 3]]
REWARDS = torch.tensor([1, 0, 0.5, 0, 0, 0, 1, 1, 1, 0.25, 0, 0], dtype=torch.float64)
B, G, TEMPERATURE = 12, 4, 0.9
LENGTHS = [length for group in COMPLETIONS for length in group]
Logps = list[Tensor]  # one tensor of log-probabilities for each completion


@dataclasses.dataclass
class Truth:
    """What a transcription is given: log-probabilities by completion, with gradient."""

    logps: Logps
    old: Logps
    ref: Logps
    rollout: Logps
    entropies: Logps

    def mean_ratio(self, b: int) -> Tensor:
        return (self.logps[b] - self.old[b]).mean().exp()


def noise(seed: int, scale: float) -> Logps:
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(n, generator=generator, dtype=torch.float64) for n in LENGTHS]


def rollouts_of_step(rollout_logps: Logps) -> Rollouts:
    rollouts = random_rollouts(PROMPTS, COMPLETIONS)
    return dataclasses.replace(rollouts, rollout_logps=tuple(x.detach() for x in rollout_logps))


def dense_truth(model) -> Truth:
    """Every completion by itself through the stock model."""
    rollouts = random_rollouts(PROMPTS, COMPLETIONS)
    logps, entropies = [], []
    for b, completion in enumerate(rollouts.completion_ids):
        prompt = rollouts.prompts.token_ids[b // G]
        logits = model(input_ids=torch.cat([prompt, completion])[None]).logits[0]
        table = (logits[len(prompt) - 1 : -1] / TEMPERATURE).log_softmax(-1)
        logps.append(table.gather(1, completion[:, None])[:, 0])
        entropies.append(-(table.exp() * table).sum(-1))
    others = [
        [x.detach() + d for x, d in zip(logps, noise(seed, scale), strict=True)]
        for seed, scale in ((1, 0.3), (2, 0.5), (3, 0.4))
    ]
    return Truth(logps, *others, entropies)


def of_model(model, item: PackedPass) -> Tensor:
    with item.plan.attach(model):
        return model.model(**item.plan.inputs).last_hidden_state[0]


def step(
    model, method: Method, truth: Truth, budget: int, *, trim: bool
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of one optimizer step the way the trainer makes them."""
    rollouts = rollouts_of_step(truth.rollout)
    inputs = start_inputs(
        rollouts, Rewards(REWARDS.float(), {}), rollouts.lengths, max_completion_length=12,
        progress=0.25, generator=torch.Generator().manual_seed(5),
    )  # fmt: skip
    inputs, advantages, kept = rows_to_train(method, inputs)
    passes = pack_rollouts(
        rollouts, kept, advantages, completion_weights(method, inputs),
        max_tokens_per_pass=budget, device=torch.device("cpu"), dtype=torch.float64,
    )  # fmt: skip

    def with_others(item: PackedPass) -> PackedPass:
        rows = item.batch.completion_index.unique_consecutive().tolist()
        old, ref = (torch.cat([x[row].detach() for row in rows]) for x in (truth.old, truth.ref))
        batch = dataclasses.replace(item.batch, old_logps=old, ref_logps=ref)
        return PackedPass(item.plan, batch)

    passes = [with_others(item) for item in passes]
    policy = Policy(model, tiny_policy().tokenizer)
    statistics = [token_statistics(policy, item.plan, TEMPERATURE) for item in passes]
    if estimates_from_tokens(method):
        inputs = estimates(method, inputs, passes, statistics)
    ready = prepare(method, inputs, passes, statistics, trim=trim)
    model.zero_grad()
    losses = []
    for item, constants in zip(ready.passes, ready.coefficients, strict=True):
        loss = policy_pass_loss(
            of_model(model, item), LMHead.from_model(model), item.batch,
            objective=constants.objective, temperature=TEMPERATURE,
            entropy_coef=constants.entropy_coef,
        )  # fmt: skip
        loss.loss.backward()
        losses.append(loss._replace(loss=loss.loss.detach()))
    return step_loss(ready, losses), {n: p.grad.clone() for n, p in model.named_parameters()}


def grpo_advantages() -> list[float]:
    groups = REWARDS.view(-1, G)
    centred = groups - groups.mean(1, keepdim=True)
    return (centred / (groups.std(1, keepdim=True) + 1e-4)).flatten().tolist()


def group_sequence(truth: Truth) -> Tensor:
    """GSPO with k3 towards the reference and an entropy bonus."""
    total = torch.zeros((), dtype=torch.float64)
    for b, advantage in enumerate(grpo_advantages()):
        ratio = truth.mean_ratio(b)
        surrogate = torch.minimum(ratio * advantage, ratio.clamp(0.9, 1.1) * advantage)
        delta = truth.logps[b] - truth.ref[b]
        penalty = ((-delta).exp() - 1 + delta).mean()
        total = total - (surrogate - 0.05 * penalty + 0.01 * truth.entropies[b].mean()) / B
    return total


def pairs_of_best_and_worst(truth: Truth) -> Tensor:
    """DPO on the first best and the first worst completion of every prompt, with k2 beside it."""
    losses = []
    for first in range(0, B, G):
        group = REWARDS[first : first + G].tolist()
        best, worst = first + group.index(max(group)), first + group.index(min(group))
        gaps = [(truth.logps[b] - truth.ref[b]).sum() for b in (best, worst)]
        losses.append(-torch.nn.functional.logsigmoid(0.1 * (gaps[0] - gaps[1])))
    penalty = sum(((truth.logps[b] - truth.ref[b]) ** 2 / 2).mean() for b in range(B)) / B
    return torch.stack(losses).mean() + 0.05 * penalty


def corrected(truth: Truth) -> Tensor:
    """Clipped GRPO over tokens, every token weighted by min(old / rollout, 2)."""
    total = torch.zeros((), dtype=torch.float64)
    for b, advantage in enumerate(grpo_advantages()):
        ratio = (truth.logps[b] - truth.old[b]).exp()
        surrogate = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
        weights = (truth.old[b] - truth.rollout[b]).exp().clamp(max=2.0)
        total = total - (weights * surrogate).sum() / sum(LENGTHS)
    return total


def token_returns(truth: Truth) -> Tensor:
    """REINFORCE++: rewards less a divergence of every token, summed up and whitened."""
    returns = []
    for b in range(B):
        rewards = -0.1 * (truth.old[b] - truth.ref[b])
        rewards = rewards.clone()
        rewards[-1] += REWARDS[b]
        returns.append(rewards.flip(0).cumsum(0).flip(0))
    flat = torch.cat(returns)
    white = (flat - flat.mean()) / (flat.std() + 1e-8)
    total, start = torch.zeros((), dtype=torch.float64), 0
    for b in range(B):
        advantages = white[start : start + LENGTHS[b]]
        start += LENGTHS[b]
        ratio = (truth.logps[b] - truth.old[b]).exp()
        clipped = ratio.clamp(0.8, 1.2) * advantages
        total = total - torch.minimum(ratio * advantages, clipped).sum() / sum(LENGTHS)
    return total


def uncertain_tokens(truth: Truth) -> Tensor:
    """A fifth of all tokens, those of highest entropy; the others stay in the average."""
    entropies = torch.cat(truth.entropies).detach()
    number = 1 + math.floor(0.2 * (len(entropies) - 1))
    threshold = entropies.sort(descending=True).values[number - 1]
    total = torch.zeros((), dtype=torch.float64)
    for b, advantage in enumerate(grpo_advantages()):
        ratio = (truth.logps[b] - truth.old[b]).exp()
        surrogate = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.28) * advantage)
        total = total - surrogate[truth.entropies[b] >= threshold].sum() / sum(LENGTHS)
    return total


def covariant_tokens(truth: Truth) -> Tensor:
    """KL-Cov: the tenth of tokens of highest covariance is held to the old policy."""
    logps = torch.cat(truth.logps).detach()
    advantages = torch.cat(
        [
            torch.full((n,), a, dtype=torch.float64)
            for n, a in zip(LENGTHS, grpo_advantages(), strict=True)
        ]
    )
    covariance = (advantages - advantages.mean()) * (logps - logps.mean())
    threshold = covariance.sort(descending=True).values[int(0.1 * len(logps)) - 1]
    distance = torch.cat(truth.logps) - torch.cat(truth.old)
    surrogate = distance.exp() * advantages
    penalised = (covariance >= threshold) * distance.abs()
    return (0.7 * penalised - surrogate).sum() / sum(LENGTHS)


METHODS: dict[Callable[[Truth], Tensor], Method] = {
    group_sequence: Method(
        "gspo", "", "",
        surrogate=use("geometric_ratio", epsilon_low=0.1, epsilon_high=0.1),
        penalties=(Penalty(use("k3"), 0.05),), aggregation=use("sequence_mean"), entropy_coef=0.01,
    ),
    pairs_of_best_and_worst: Method(
        "dpo", "", "", loss=use("dpo", beta=0.1), penalties=(Penalty(use("k2"), 0.05),),
        aggregation=use("sequence_mean"),
    ),
    corrected: Method("tis", "", "", rollout_correction=use("truncated_tokens")),
    token_returns: Method(
        "reinforce_pp", "", "", reward_shaping=use("kl_penalised_tokens", beta=0.1),
        advantage=use("whitened_returns"),
    ),
    uncertain_tokens: Method(
        "entropy_top20", "", "", token_weights=use("high_entropy", fraction=0.2),
        surrogate=use("clipped_ratio", epsilon_low=0.2, epsilon_high=0.28),
    ),
    covariant_tokens: Method(
        "kl_cov", "", "", surrogate=use("importance_ratio"),
        penalties=(Penalty(use("absolute_old"), 0.7, use("covariance_top", fraction=0.1)),),
    ),
}  # fmt: skip


@pytest.mark.parametrize("transcription", METHODS, ids=lambda function: function.__name__)
@pytest.mark.parametrize(("budget", "trim"), [(1000, False), (1000, True), (22, True)])
def test_gradient_is_that_of_the_written_out_loss(transcription, budget, trim):
    model = with_float64_norms(tiny_model())
    truth = dense_truth(model)
    expected_loss = transcription(truth)
    model.zero_grad()
    expected_loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    loss, gradients = step(model, METHODS[transcription], truth, budget, trim=trim)
    assert loss == pytest.approx(float(expected_loss.detach()), abs=1e-12)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-12, msg=name)


def test_surrogates_that_learn_without_an_advantage_are_known():
    """Rows of zero advantage are left out for all others."""
    logps, old_logps, advantages = torch.tensor([[-1.0, -1.0], [-1.3, -0.6], [0.0, 0.0]]).double()
    found = set()
    for name, function in SURROGATES.items():
        known = DEFAULTS.get(name, {})
        values = [known.get(x, 0.5) for x in hyper_parameters_of("surrogate", name)]
        slopes = evaluate(Objective(function, tuple(values)), logps, old_logps, None, advantages)
        if slopes.slopes.any():
            found.add(name)
    assert found == LEARN_WITHOUT_ADVANTAGE


def test_one_token_a_completion_on_average_is_no_advantage_a_token():
    """As many tokens as completions, but not one of each."""
    index = torch.tensor([0, 0, 2])
    inputs = StepInputs(
        rewards=torch.tensor([1.0, 5.0, 3.0]).double(), groups=torch.tensor([0, 0, 0]),
        lengths=torch.tensor([2, 0, 1]), finished=torch.ones(3, dtype=torch.bool),
        max_completion_length=4, progress=torch.zeros(()), completion_index=index,
    )  # fmt: skip
    found = token_advantages(Method("m", "", "", advantage=use("group_centred")), inputs)
    assert found.tolist() == [-2.0, -2.0, 0.0]
