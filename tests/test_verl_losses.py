"""Policy losses in verl's registry beside verl's own, and beside those of our own training."""

from __future__ import annotations

import dataclasses
import importlib
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import Tensor

from fastrl.config import ObjectiveConfig
from fastrl.errors import InputError
from fastrl.integrations import verl as fastrl_verl
from fastrl.integrations.verl import policy_loss, policy_loss_overrides, register_policy_losses
from fastrl.integrations.verl_losses import VerlPolicyLoss, why_not
from fastrl.methods import METHODS, resolve_method
from fastrl.methods.coefficients import coefficients
from fastrl.methods.inputs import StepInputs
from fastrl_kernels import token_loss

VERSION = Version(pytest.importorskip("verl").__version__)
core = pytest.importorskip("verl.trainer.ppo.core_algos")
configs = pytest.importorskip("verl.workers.config")

B, R = 7, 11
LENGTHS = torch.tensor([11, 3, 7, 1, 0, 5, 9])  # one is masked altogether
MODES = (
    "token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean",
    *(("token-sum",) if Version("0.9") <= VERSION else ()),
)  # fmt: skip
GSPO_MODES = MODES if Version("0.9.1") <= VERSION else MODES[3:4]
"""Before that version verl's own GSPO had one average for all modes."""
GLOBAL = {"dp_size": 2, "batch_num_tokens": 57, "global_batch_size": 11, "loss_scale_factor": 33}
PAGE = (Path(__file__).parent.parent / "docs" / "verl.md").read_text(encoding="utf-8")
NAMES = [name for name, method in METHODS.items() if why_not(method) is None]


@pytest.fixture(scope="module", autouse=True)
def registered() -> list[str]:
    return register_policy_losses()


class Step:
    """verl's tables of one micro-batch, with padding on both sides and a hole in the middle."""

    def __init__(self, *, seed: int = 0, spread: float = 0.5, dtype: Any = torch.float64) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal() -> Tensor:
            return torch.randn(B, R, generator=generator, dtype=torch.float64)

        self.mask = torch.arange(R) < LENGTHS[:, None]
        self.mask[0, 3] = False  # the words of a tool
        self.mask[2, 0] = False
        self.mask[5] = self.mask[5].roll(4)
        self.old_logps = (-normal().abs() - 0.05).to(dtype)
        self.logps = (self.old_logps + spread * normal()).to(dtype)
        self.weights = normal().abs().to(dtype)
        advantages = torch.randn(B, 1, generator=generator, dtype=torch.float64)
        advantages[2] = 0
        self.advantages = advantages.expand(B, R).to(dtype).clone()
        self.token_advantages = (self.advantages * (1 + 0.3 * normal())).to(dtype)


def actor(information: dict[str, Any] | None = None, **fields: Any) -> Any:
    """verl's actor config."""
    inner = {key: fields.pop(key) for key in list(fields) if "cov" in key or key == "ppo_kl_coef"}
    config = configs.ActorConfig(
        strategy="fsdp", rollout_n=4, ppo_micro_batch_size_per_gpu=4,
        policy_loss=configs.PolicyLossConfig(**inner), **fields,
    )  # fmt: skip
    config.global_batch_info.update(information or {})
    return config


def run(
    name: str, step: Step, config: Any, mode: str, *, weighted: bool = False,
    advantages: Tensor | None = None,
) -> tuple[float, Tensor, dict[str, float]]:  # fmt: skip
    """Loss, gradient and metrics, called as verl calls them."""
    logps = step.logps.clone().requires_grad_()
    loss, metrics = core.get_policy_loss_fn(name)(
        old_log_prob=step.old_logps, log_prob=logps,
        advantages=step.advantages if advantages is None else advantages,
        response_mask=step.mask, loss_agg_mode=mode, config=config,
        rollout_is_weights=step.weights if weighted else None,
    )  # fmt: skip
    assert loss.dtype == logps.dtype
    return float(loss.detach()), torch.autograd.grad(loss, logps)[0], metrics


def assert_same(
    ours: tuple[float, Tensor, dict[str, float]], theirs: tuple[float, Tensor, dict[str, float]],
    tolerance: float = 1e-6,
) -> None:  # fmt: skip
    assert abs(ours[0] - theirs[0]) <= tolerance * max(1.0, abs(theirs[0]))
    assert float((ours[1] - theirs[1]).abs().max()) <= tolerance
    assert float(theirs[1].abs().max()) > 1e-3
    for name, value in theirs[2].items():
        assert abs(ours[2][name] - value) <= tolerance, name


TOKEN_CASES = {
    "ppo_dualclip": ("vanilla", {"clip_ratio_high": 0.28, "clip_ratio_c": 1.5}),
    "dapo": ("vanilla", {"clip_ratio_low": 0.1, "clip_ratio_c": 10.0}),
    "cispo": ("cispo", {"clip_ratio_low": 0.3}),
    "gspo_token": ("gspo", {"clip_ratio_low": 0.05, "clip_ratio_high": 0.08}),
    "gpg": ("gpg", {}),
}


@pytest.mark.parametrize("information", [{}, GLOBAL], ids=["local", "global"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", TOKEN_CASES)
def test_verls_loss_gradient_and_metrics(name, mode, information):
    """Advantages of tokens, and the weights of verl's rollout correction."""
    theirs, fields = TOKEN_CASES[name]
    if theirs == "gspo" and mode not in GSPO_MODES:
        pytest.skip("the average of verl's own is another")
    step, config = Step(), actor(information, **fields)
    for weighted in (False, True):
        arguments = {"weighted": weighted, "advantages": step.token_advantages}
        ours = run("fastrl_" + name, step, config, mode, **arguments)
        assert_same(ours, run(theirs, step, config, mode, **arguments))
    assert ours[2]["actor/pg_clipfrac"] > 0 or name == "gpg"


@pytest.mark.parametrize("name", TOKEN_CASES)
def test_verls_loss_in_single_precision(name):
    theirs, fields = TOKEN_CASES[name]
    step, config = Step(dtype=torch.float32), actor(**fields)
    ours = run("fastrl_" + name, step, config, "seq-mean-token-mean")
    assert_same(ours, run(theirs, step, config, "seq-mean-token-mean"), 1e-5)


@pytest.mark.parametrize("mode", GSPO_MODES)
def test_verls_gspo(mode):
    step, config = Step(), actor(GLOBAL, clip_ratio_low=0.05, clip_ratio_high=0.08)
    ours = run("fastrl_gspo", step, config, mode, weighted=True)
    assert_same(ours, run("gspo", step, config, mode, weighted=True))
    assert ours[2]["actor/pg_clipfrac"] > 0


def test_verls_sapo():
    """verl averages it over completions whatever loss_agg_mode says, ours does as it says."""
    step, config = Step(), actor(GLOBAL, tau_pos=0.8, tau_neg=1.3)
    ours = run("fastrl_sapo_soft", step, config, "seq-mean-token-mean", weighted=True)
    assert_same(ours, run("sapo", step, config, "token-mean", weighted=True))
    other = run("fastrl_sapo_soft", step, config, "token-mean", weighted=True)
    assert abs(other[0] - ours[0]) > 1e-3


def test_verls_geometric_mean():
    """verl counts completions without a token in its mean, so there is none here."""
    step, config = Step(spread=0.3), actor(clip_ratio_low=0.25, clip_ratio_high=0.4)
    step.mask[4, :2] = True
    ours = run("fastrl_gmpo", step, config, "seq-mean-token-mean")
    theirs = run("geo_mean", step, config, "token-mean")
    del theirs[2]["actor/pg_clipfrac"], theirs[2]["actor/pg_clipfrac_lower"]  # of either side
    assert_same(ours, theirs)
    assert (ours[1][step.mask] == 0).any()


def test_verls_divergence_mask():
    """The gradient; as a value verl has sg[ratio] logp, and the penalty is ours alone."""
    step, config = Step(), actor(GLOBAL, clip_ratio_c=3.0, clip_ratio_low=0.1, clip_ratio_high=0.15)
    step.advantages[2] = 0.3  # verl counts a zero advantage among the negative ones
    step.logps = step.logps.clamp(max=-0.01)
    assert float((step.logps - step.old_logps).exp().max()) < 3
    _, ours, metrics = run("fastrl_dppo_tv", step, config, "token-mean", weighted=True)
    _, theirs, expected = run("dppo_tv", step, config, "token-mean", weighted=True)
    share = step.mask * (GLOBAL["dp_size"] / GLOBAL["batch_num_tokens"])
    penalty = 1e-3 * 2 * (step.logps - step.old_logps) * share
    assert_same((0.0, ours - penalty, metrics), (0.0, theirs, expected))
    assert metrics["actor/pg_clipfrac"] > 0


def test_verls_covariance_clip():
    """So many tokens may be drawn that chance has no part."""
    fields = {"clip_cov_ratio": 1.0, "clip_cov_lb": 0.1, "clip_cov_ub": 2.0, "clip_ratio_c": 1e9}
    step, config = Step(), actor(GLOBAL, clip_ratio_low=0.3, clip_ratio_high=0.3, **fields)
    ours = run("fastrl_clip_cov", step, config, "token-mean", weighted=True)
    value, gradient, _ = run("clip_cov", step, config, "token-mean", weighted=True)
    assert_same(ours, (value, gradient, {}))
    without = run("fastrl_ppo_dualclip", step, actor(
        GLOBAL, clip_ratio_low=0.3, clip_ratio_high=0.3, clip_ratio_c=1e9), "token-mean",
        weighted=True)  # fmt: skip
    assert float((without[1] - gradient).abs().max()) > 1e-3


def test_verls_covariance_penalty():
    step, config = Step(), actor(GLOBAL, kl_cov_ratio=0.2, ppo_kl_coef=0.7)
    ours = run("fastrl_kl_cov", step, config, "token-mean", weighted=True)
    value, gradient, _ = run("kl_cov", step, config, "token-mean")
    assert abs(ours[0] - value) > 1e-3
    ours = run("fastrl_kl_cov", step, config, "token-mean")
    assert_same(ours, (value, gradient, {}))


def as_published(name: str) -> tuple[Any, str]:
    """The config and the average that the arguments of `policy_loss_overrides` make."""
    first, *rest = policy_loss_overrides(name)
    assert first == "actor_rollout_ref.model.external_lib=fastrl.integrations.verl_plugin"
    pairs = dict(line.removeprefix("actor_rollout_ref.actor.").split("=") for line in rest)
    assert pairs.pop("policy_loss.loss_mode") == "fastrl_" + name
    mode = pairs.pop("loss_agg_mode")
    fields = {key.removeprefix("policy_loss."): float(value) for key, value in pairs.items()}
    return actor(**fields), mode


def in_our_training(name: str, step: Step) -> tuple[float, Tensor]:
    """Loss and gradient of the record itself, from the tokens as our trainer has them."""
    rows = torch.arange(B)
    lengths = step.mask.sum(dim=1)
    logps = step.logps[step.mask].requires_grad_()
    inputs = StepInputs(
        rewards=torch.zeros(B, dtype=torch.float64), groups=rows, lengths=lengths,
        finished=torch.ones(B, dtype=torch.bool), max_completion_length=R, progress=torch.zeros(()),
        generator=torch.default_generator, completion_index=rows.repeat_interleave(lengths),
        logps=logps.detach(), old_logps=step.old_logps[step.mask],
        advantages=step.advantages[step.mask],
    )  # fmt: skip
    found = coefficients(resolve_method(name, ObjectiveConfig()), inputs)
    out = token_loss(
        logps, torch.zeros_like(logps), found.advantages, found.token_weights,
        objective=found.objective, old_logps=inputs.old_logps,
    )  # fmt: skip
    loss = float(out.loss.detach() if found.loss is None else found.loss)
    table = torch.zeros(B, R, dtype=torch.float64)
    table[step.mask] = torch.autograd.grad(out.loss, logps)[0]
    return loss, table


@pytest.mark.parametrize("name", NAMES)
def test_published_numbers_train_as_our_own_trainer_does(name):
    step = Step(seed=1)
    config, mode = as_published(name)
    torch.manual_seed(3)
    ours = run("fastrl_" + name, step, config, mode)
    torch.manual_seed(3)
    value, gradient = in_our_training(name, step)
    assert_same(ours, (value, gradient, {}))


def test_which_are_registered(registered):
    assert registered == ["fastrl_" + name for name in NAMES]
    assert {"grpo", "dapo", "ppo", "gspo", "cispo", "kl_cov", "vespo", "bapo"} <= set(NAMES)
    assert "vanilla" in core.POLICY_LOSS_REGISTRY


REFUSED = {
    "dpo": "pairs or groups",
    "nft": "the prompt of each completion and rewards",
    "topr": "rewards",
    "mapo": "actor.use_kl_loss=True",
    "tis": "algorithm.rollout_correction",
    "entropy_top20": "entropies",
    "mdpo": "the progress of training",
    "scalerl": "prompt_mean",
    "pods": "selects completions, max_variance",
    "aapo": "values of prompts, reference_rollouts",
    "sfpo": "look_ahead",
    "trpo_penalty": "controller, doubling_kl",
    "vapo": "rewards",
    "astar_po": "pairs or groups",
    "sppo": "not built yet",
    "grppo": "did you mean 'grpo'",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_verl_cannot_compute_is_refused(name):
    with pytest.raises(InputError, match=REFUSED[name]):
        register_policy_losses([name])
    assert "fastrl_" + name not in core.POLICY_LOSS_REGISTRY


def test_a_method_of_ones_own(monkeypatch):
    mine = dataclasses.replace(METHODS["kl_cov"], name="mine")
    monkeypatch.setitem(METHODS, "mine", mine)
    monkeypatch.setattr(core, "POLICY_LOSS_REGISTRY", dict(core.POLICY_LOSS_REGISTRY))
    assert register_policy_losses(["mine"]) == ["fastrl_mine"]
    fields = {"kl_cov_ratio": 0.2, "ppo_kl_coef": 0.7}
    ours = run("fastrl_mine", Step(), actor(**fields), "token-mean")
    assert_same(ours, run("fastrl_kl_cov", Step(), actor(**fields), "token-mean"))


def test_a_loss_of_another_origin_is_kept(monkeypatch):
    mine = object()
    monkeypatch.setitem(core.POLICY_LOSS_REGISTRY, "fastrl_grpo", mine)
    with pytest.raises(InputError, match="'fastrl_grpo' already, which is not ours"):
        register_policy_losses(["gpg", "grpo"])
    assert core.POLICY_LOSS_REGISTRY["fastrl_grpo"] is mine


def test_a_field_without_effect_is_refused():
    step = Step()
    cases = {
        "fastrl_gpg": ({"clip_ratio_high": 0.28}, "clip_ratio_high = 0.28 has no effect"),
        "fastrl_grpo": ({"clip_ratio_c": 10.0}, "reads clip_ratio_high, clip_ratio_low"),
        "fastrl_gspo": ({"tau_pos": 0.9}, "leave it at 1.0"),
        "fastrl_dapo": ({"kl_cov_ratio": 0.1}, "actor.policy_loss.kl_cov_ratio"),
        "fastrl_cispo": ({"clip_ratio": 0.1}, "actor.clip_ratio = 0.1"),
    }
    for name, (fields, message) in cases.items():
        with pytest.raises(InputError, match=message):
            run(name, step, actor(**fields), "token-mean")
    run("fastrl_grpo", step, actor(clip_ratio=0.1, clip_ratio_low=0.1), "token-mean")


def test_one_clip_ratio_stands_in_for_both_bounds():
    step = Step()
    both = actor(clip_ratio_low=0.1, clip_ratio_high=0.1)
    one = actor(clip_ratio=0.1, clip_ratio_low=None, clip_ratio_high=None)
    ours = run("fastrl_grpo", step, one, "token-mean")
    assert ours[0] == run("fastrl_grpo", step, both, "token-mean")[0]
    assert_same(ours, run("vanilla", step, dataclasses.replace(one, clip_ratio_c=1e9),
                          "token-mean"))  # fmt: skip


def test_advantages_of_tokens_need_a_loss_of_tokens():
    step = Step()
    for name in ("fastrl_gspo", "fastrl_gmpo", "fastrl_vespo"):
        with pytest.raises(InputError, match="one advantage per completion"):
            run(name, step, actor(), "token-mean", advantages=step.token_advantages)


def test_nothing_to_train_on():
    """verl's own mean would be 0 / 0."""
    step = Step()
    step.mask[:] = False
    for name in ("fastrl_grpo", "fastrl_gspo", "fastrl_bapo"):
        logps = step.logps.clone().requires_grad_()
        loss, metrics = core.get_policy_loss_fn(name)(
            step.old_logps, logps, step.advantages, step.mask, "token-mean", actor(GLOBAL)
        )
        loss.backward()
        assert float(loss.detach()) == 0
        assert torch.equal(logps.grad, torch.zeros_like(logps))
        assert set(metrics.values()) == {0.0}


def test_no_config():
    with pytest.raises(InputError, match="needs verl's actor config, got None"):
        policy_loss("grpo")(*[torch.zeros(1, 1)] * 4)


@pytest.mark.parametrize("version", ["0.7.1", "0.10.0", "1.0"])
def test_other_versions_of_verl(monkeypatch, version):
    monkeypatch.setattr("verl.__version__", version)
    with pytest.raises(InputError, match=rf"expected verl>=0.8.0,<0.10, got {version}.*token_loss"):
        register_policy_losses()
    with pytest.raises(InputError, match="expected verl"):
        fastrl_verl.register_fused_head()


def test_a_loss_can_be_compared_and_printed():
    assert policy_loss("grpo") == VerlPolicyLoss("fastrl_grpo", METHODS["grpo"])


def test_the_page_lists_what_is_registered():
    (listed,) = re.findall(r"<!-- registered -->(.*?)<!-- end -->", PAGE, re.S)
    assert re.findall(r"`(\w+)`", listed) == NAMES


def test_the_recipe_is_a_config_of_verl():
    hydra = pytest.importorskip("hydra")
    convert = pytest.importorskip("verl.utils.config").omega_conf_to_dataclass
    (recipe,) = re.findall(r"```shell\n(.*?)```", PAGE, re.S)
    command = shlex.split(recipe.replace("\\\n", " "))
    assert command[:3] == ["python", "-m", "verl.trainer.main_ppo"]
    with hydra.initialize_config_module("verl.trainer.config", version_base=None):
        found = hydra.compose("ppo_trainer", command[3:]).actor_rollout_ref
    assert found.model.fused_kernel_options.impl_backend == fastrl_verl.BACKEND
    importlib.import_module(found.model.external_lib)
    config, step = convert(found.actor), Step()
    ours = run(config.policy_loss.loss_mode, step, config, config.loss_agg_mode)
    assert_same(ours, (*in_our_training("grpo", step), {}))
