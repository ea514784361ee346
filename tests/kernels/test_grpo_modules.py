"""`FusedLinearGRPOLoss` against the formulas on all the logits, and against Liger's where it is."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastrl_kernels import FusedLinearGRPOLoss, LMHead
from tests.kernels.signatures import check_signatures

B, T, D, V = 6, 9, 16, 61


def make_batch(seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """Ragged rows, one of them left-padded, one with a hole, one masked whole, one of advantage 0.

    Log-probabilities of the old policy and the reference lie far enough from the policy's for some
    tokens and some sequences to be clipped.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    mask = torch.arange(T) < torch.tensor([T, 4, 6, 1, 5, 7])[:, None]
    mask[1] = mask[1].flip(0)
    mask[2, 2:4] = False
    mask[4] = False
    hidden, weight, bias = normal(B, T, D), normal(V, D) / 4, normal(V) / 4
    ids = torch.randint(V, (B, T), generator=generator)
    logits = hidden @ weight.T + bias
    logps = logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    return {
        "_input": hidden, "lin_weight": weight, "selected_token_ids": ids,
        "attention_mask": mask.long(),
        "advantages": torch.tensor([1.0, -0.7, 0.4, -1.5, 0.9, 0.0], dtype=dtype),
        "bias": bias,
        "ref_per_token_logps": logps + 0.5 * normal(B, T),
        "old_per_token_logps": logps + 0.4 * normal(B, T) + 0.3 * normal(B, 1),
        "vllm_is_ratio": normal(B, T).exp().clamp(max=3),
    }  # fmt: skip


def formula(batch: dict[str, Any], **s: Any) -> tuple[Tensor, list[Tensor]]:
    """The loss and its metrics on (B, T, V) logits, as the papers and TRL have them."""
    hidden, mask = batch["_input"], batch["attention_mask"].to(batch["_input"].dtype)
    logits = (hidden @ batch["lin_weight"].T + batch["bias"]) / s.get("temperature", 1.0)
    logps = logits.log_softmax(-1).gather(-1, batch["selected_token_ids"][..., None])[..., 0]
    old = batch.get("old_per_token_logps")
    old = logps.detach() if old is None else old
    kind, level = s["loss_type"], s.get("importance_sampling_level", "token")
    a = batch["advantages"][:, None].expand(B, T)
    lengths = mask.sum(1, keepdim=True).clamp(min=1)
    d = logps - old
    if level == "sequence":
        d = ((d * mask).sum(1, keepdim=True) / lengths).expand(B, T)
    rho, low, high = d.exp(), s.get("epsilon_low", 0.2), s.get("epsilon_high", 0.2)
    clipped = (a > 0) & (rho > 1 + high) | (a < 0) & (rho < 1 - low)
    rollout = batch.get("vllm_is_ratio")
    rollout = torch.ones_like(mask) if rollout is None else rollout.reshape(B, -1).expand(B, T)
    if kind == "cispo":
        losses = -rho.clamp(max=high).detach() * a * logps
        clipped = (a > 0) & (rho > high)
    elif kind == "sapo":
        tau = torch.where(a > 0, s["sapo_temperature_pos"] + 0 * a, s["sapo_temperature_neg"])
        losses, clipped = -4 / tau * torch.sigmoid(tau * (rho - 1)) * a, clipped & False
    elif kind == "vespo":
        w = ((d * mask).sum(1) + rollout_logs(batch)).exp().detach()[:, None]
        k = 3.0 - (a >= 0).to(a.dtype)
        c = 5.0 - k
        losses = -c.exp() * w**k * (-c * w).exp() * a * logps
        clipped, rollout = clipped & False, torch.ones_like(mask)
    else:
        capped = rho if s.get("delta") is None else rho.clamp(max=s["delta"])
        losses = -torch.minimum(capped * a, rho.clamp(1 - low, 1 + high) * a)
    if kind == "luspo":
        rollout = rollout.mean(1, keepdim=True)
    losses, kls = losses * rollout, torch.zeros_like(mask)
    if s["beta"]:
        gap = batch["ref_per_token_logps"] - logps
        kls = (gap.exp() - gap - 1) * (rho if s.get("use_bias_correction_kl") else 1)
    losses = (losses + s["beta"] * kls) * mask
    num_tokens = mask.sum()
    if kind in ("grpo", "sapo"):
        loss = (losses.sum(1, keepdim=True) / lengths).mean()
    elif kind == "dr_grpo":
        loss = losses.sum() / (B * s["max_completion_length"])
    elif kind == "luspo":
        loss = losses.sum() / B
    else:
        items = batch.get("num_items_in_batch") if kind != "bnpo" else None
        loss = losses.sum() / (num_tokens if items is None else items)
    found = [kls] * bool(s["beta"]) + [clipped]
    return loss, [(values * mask).sum() / num_tokens for values in found]


def rollout_logs(batch: dict[str, Any]) -> Tensor:
    """(B,) logarithm of the correction of a sequence."""
    ratio = batch.get("vllm_is_ratio")
    return torch.zeros(B) if ratio is None else ratio.reshape(B, -1).log().sum(1)


CASES: list[dict[str, Any]] = [
    *({"loss_type": kind, "beta": beta} for kind, beta in itertools.product(
        ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo"), (0.0, 0.1))),
    *({"loss_type": kind, "beta": beta, "importance_sampling_level": "sequence"}
      for kind, beta in itertools.product(("grpo", "bnpo", "dr_grpo", "dapo"), (0.0, 0.1))),
    {"loss_type": "luspo", "beta": 0.0, "importance_sampling_level": "sequence"},
    {"loss_type": "cispo", "beta": 0.0, "epsilon_high": 1.3},
    {"loss_type": "dapo", "beta": 0.0, "delta": 1.6},
    {"loss_type": "dapo", "beta": 0.0, "delta": 1.1},
    {"loss_type": "grpo", "beta": 0.1, "delta": 1.3, "importance_sampling_level": "sequence"},
    {"loss_type": "dapo", "beta": 0.1, "use_bias_correction_kl": True},
    {"loss_type": "dapo", "beta": 0.1, "use_bias_correction_kl": True,
     "importance_sampling_level": "sequence"},
    {"loss_type": "grpo", "beta": 0.1, "temperature": 0.7},
]  # fmt: skip
GIVEN = {
    "everything": {},
    "on-policy": {"old_per_token_logps": None},
    "no correction": {"vllm_is_ratio": None},
    "on-policy, no correction": {"old_per_token_logps": None, "vllm_is_ratio": None},
    "one correction a row": {"vllm_is_ratio": (B,), "num_items_in_batch": 77.0},
    "one correction a row, on-policy": {"vllm_is_ratio": (B, 1), "old_per_token_logps": None},
}


def case_of(given: str, settings: dict[str, Any], dtype: torch.dtype) -> tuple[dict, dict]:
    """Arguments of forward and of the constructor."""
    batch = make_batch(dtype=dtype)
    for name, value in GIVEN[given].items():
        is_shape = isinstance(value, tuple)
        batch[name] = batch["vllm_is_ratio"][:, 0].reshape(value) if is_shape else value
    settings = {"max_completion_length": 2 * T, "sapo_temperature_pos": 1.1,
                "sapo_temperature_neg": 0.9, **settings}  # fmt: skip
    return batch, settings


def name_of(settings: dict[str, Any]) -> str:
    return "-".join(str(value) for value in settings.values())


def trained(batch: dict[str, Any]) -> list[Tensor]:
    return [batch[name].requires_grad_() for name in ("_input", "lin_weight", "bias")]


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("settings", CASES, ids=name_of)
def test_loss_metrics_and_gradients_are_the_formula_s(given: str, settings: dict[str, Any]) -> None:
    batch, settings = case_of(given, settings, torch.float64)
    tensors = trained(batch)
    loss, metrics = FusedLinearGRPOLoss(**settings)(**batch)
    expected, expected_metrics = formula(batch, **settings)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(list(metrics), expected_metrics, rtol=1e-10, atol=1e-12)
    grads, others = (torch.autograd.grad(3 * x, tensors) for x in (loss, expected))
    torch.testing.assert_close(grads, others, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("settings", CASES, ids=name_of)
def test_same_as_liger(given: str, settings: dict[str, Any]) -> None:
    chunked_loss = pytest.importorskip("liger_kernel.chunked_loss")
    batch, settings = case_of(given, settings, torch.float32)
    tensors = trained(batch)
    results = []
    for module in (FusedLinearGRPOLoss, chunked_loss.LigerFusedLinearGRPOLoss):
        loss, metrics = module(compiled=False, **settings)(**batch)
        results.append([loss, *metrics, *torch.autograd.grad(2 * loss, tensors)])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def test_the_signature_is_liger_s() -> None:
    chunked_loss = pytest.importorskip("liger_kernel.chunked_loss")
    check_signatures(FusedLinearGRPOLoss, chunked_loss.LigerFusedLinearGRPOLoss)


def test_reference_from_its_hidden_states() -> None:
    """The frozen head of the reference gets no gradient."""
    batch = make_batch()
    reference = make_batch(seed=1)
    logits = reference["_input"] @ reference["lin_weight"].T + reference["bias"]
    ids = batch["selected_token_ids"][..., None]
    batch["ref_per_token_logps"] = logits.log_softmax(-1).gather(-1, ids)[..., 0]
    module = FusedLinearGRPOLoss(beta=0.1)
    expected = module(**batch)
    del batch["ref_per_token_logps"]
    weight = reference["lin_weight"].requires_grad_()
    hidden = batch["_input"].requires_grad_()
    loss, metrics = module(
        **batch, ref_input=reference["_input"], ref_weight=weight, ref_bias=reference["bias"]
    )
    torch.testing.assert_close((loss, metrics), expected, rtol=1e-10, atol=1e-12)
    loss.backward()
    assert weight.grad is None
    assert hidden.grad is not None


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_rows_that_train_nothing_have_no_gradient_and_no_say(beta: float) -> None:
    batch = make_batch()
    module = FusedLinearGRPOLoss(beta=beta, loss_type="grpo")
    loss, _ = module(**batch)
    batch["_input"][4] = float("nan")  # masked whole
    if not beta:
        batch["_input"][5] = float("nan")  # advantage 0
    again, _ = module(**{**batch, "_input": batch["_input"].requires_grad_()})
    assert torch.equal(loss, again)
    again.backward()
    grad = batch["_input"].grad
    assert grad[4].eq(0).all()
    assert grad[5].eq(0).all() == (beta == 0)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_other_heads(level: str) -> None:
    """An adapter on the head, and a layer, in place of weight and bias."""
    batch, generator = make_batch(), torch.Generator().manual_seed(2)
    a, b = (torch.randn(*x, generator=generator, dtype=torch.float64) for x in ((2, D), (V, 2)))
    module = FusedLinearGRPOLoss(beta=0.0, importance_sampling_level=level)
    head = LMHead(batch["lin_weight"], batch.pop("bias"), a, b, lora_scale=0.5)
    found = module(**{**batch, "lin_weight": head})
    merged = nn.Linear(D, V, dtype=torch.float64)
    with torch.no_grad():
        merged.weight.copy_(batch["lin_weight"] + 0.5 * b @ a)
        merged.bias.copy_(head.bias)  # type: ignore[arg-type]
    torch.testing.assert_close(found, module(**{**batch, "lin_weight": merged}))
    with pytest.raises(ValueError, match="bias must be None"):
        module(**{**batch, "lin_weight": merged, "bias": merged.bias})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_type": "gspo"}, "loss_type must be one of grpo"),
        ({"importance_sampling_level": "turn"}, "token or sequence, got 'turn'"),
        ({"loss_type": "cispo", "importance_sampling_level": "sequence"}, "must be token with"),
        ({"loss_type": "luspo", "beta": 0.0}, "would train padding"),
        ({"loss_type": "luspo", "importance_sampling_level": "sequence"}, "would train padding"),
        ({"loss_type": "dr_grpo"}, "needs max_completion_length"),
        ({"use_ref_model": False}, "needs use_ref_model=True"),
        ({"loss_type": "sapo", "delta": 2.0}, "delta must be None"),
        ({"delta": 0.0}, "delta must be positive"),
        ({"sapo_temperature_neg": 0.0}, "sapo_temperature_neg must be positive"),
    ],
)
def test_settings_that_no_loss_has(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FusedLinearGRPOLoss(**settings)


def test_arguments_that_do_not_fit() -> None:
    batch, module = make_batch(), FusedLinearGRPOLoss()
    wrong = {
        "_input": (batch["_input"][0], "shape"),
        "attention_mask": (torch.ones(B, T + 1), "attention_mask must have one number"),
        "advantages": (torch.ones(B, T), "one number for each completion"),
        "vllm_is_ratio": (torch.ones(B, T + 1), "vllm_is_ratio must have one of the shapes"),
        "ref_per_token_logps": (None, "needs ref_per_token_logps"),
    }
    for name, (value, message) in wrong.items():
        with pytest.raises(ValueError, match=message):
            module(**{**batch, name: value})


def test_tokens_of_several_processes() -> None:
    """Gradients are averaged over processes: each divides by its share of all tokens."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    batch, module = make_batch(), FusedLinearGRPOLoss(beta=0.0)
    alone, _ = module(**batch, num_items_in_batch=50)
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    try:
        shared, _ = module(**batch, num_items_in_batch=torch.tensor(200))
    finally:
        torch.distributed.destroy_process_group()
    torch.testing.assert_close(shared, alone)
