"""The preference modules against formulas on all the logits, our own pair losses, and Liger's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastrl.preferences import LOSSES
from fastrl_kernels import (
    FusedLinearCPOLoss,
    FusedLinearDPOLoss,
    FusedLinearKTOLoss,
    FusedLinearORPOLoss,
    FusedLinearSimPOLoss,
    LMHead,
)
from fastrl_kernels.pair_losses import PAIR_LOSSES, PairSettings
from tests.kernels.signatures import check_signatures

B, T, D, V = 6, 8, 16, 61
IGNORED = -7
SMOOTHED = {"exo_pair": 0.05, "robust": 0.2}


def make_batch(seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """Three pairs of ragged rows, padded on both sides and with a hole."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    kept = torch.arange(T) < torch.tensor([T, 3, 5, 1, 6, 7])[:, None]
    kept[1] = kept[1].flip(0)
    kept[4, 2:4] = False
    target = torch.randint(V, (B, T), generator=generator).masked_fill(~kept, IGNORED)
    return {
        "lin_weight": normal(V, D) / 4, "_input": normal(B, T, D), "target": target,
        "bias": normal(V) / 4, "ref_input": normal(B, T, D), "ref_weight": normal(V, D) / 4,
        "ref_bias": normal(V) / 4,
    }  # fmt: skip


def without_reference(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in batch.items() if not name.startswith("ref_")}


def rows_of(logits: Tensor, target: Tensor, *, mean: bool) -> Tensor:
    """(B,) from (B, T, V) logits."""
    kept = target != IGNORED
    ids = target.masked_fill(~kept, 0)[..., None]
    logps = logits.log_softmax(-1).gather(-1, ids)[..., 0] * kept
    return logps.sum(1) / (kept.sum(1) if mean else 1)


def numbers(batch: dict[str, Any], *, mean: bool = False, nll_target: Tensor | None = None) -> Any:
    """Log-probabilities and log-ratios of rows, and what every loss of pairs returns first."""
    logits = batch["_input"] @ batch["lin_weight"].T + batch["bias"]
    rows = ratios = rows_of(logits, batch["target"], mean=mean)
    if "ref_input" in batch:
        reference = batch["ref_input"] @ batch["ref_weight"].T + batch["ref_bias"]
        ratios = rows - rows_of(reference, batch["target"], mean=mean)
    target = batch["target"] if nll_target is None else nll_target
    nll = -rows_of(logits, target, mean=False)[: B // 2].sum()
    nll = nll / (target[: B // 2] != IGNORED).sum()
    means = [half.mean() for half in logits.detach().chunk(2)]
    return rows.chunk(2), ratios.chunk(2), nll, [*rows.detach().chunk(2), *means]


def pair_formula(kind: str, chosen: Tensor, rejected: Tensor, **s: Any) -> Tensor:
    """Mean over pairs by this library's own losses, whose slopes are analytic."""
    names = {
        "sigmoid": ("dpo", {}), "hinge": ("hinge", {}), "nca_pair": ("nca", {}),
        "exo_pair": ("exo", {"label_smoothing": SMOOTHED["exo_pair"]}),
        "robust": ("robust_dpo", {"label_smoothing": SMOOTHED["robust"]}),
        "apo_zero": ("apo_zero", {}), "apo_down": ("apo_down", {}),
        "discopop": ("discopop", {"temperature": 0.05}),
    }  # fmt: skip
    name, settings = names[kind]
    zeros = torch.zeros_like(chosen)
    return LOSSES[name].function(chosen, rejected, zeros, zeros, **settings, **s)


@pytest.mark.parametrize(
    "kind", [x for x in PAIR_LOSSES if x not in ("bco_pair", "sppo_hard")]
)  # whose shift and scale are others in fastrl.preferences
def test_pair_losses_are_those_of_training(kind: str) -> None:
    """Values and slopes: one formula, written twice."""
    generator = torch.Generator().manual_seed(3)
    chosen, rejected = torch.randn(2, 40, generator=generator, dtype=torch.float64).mul(6)
    chosen.requires_grad_()
    rejected.requires_grad_()
    settings = PairSettings(0.3, SMOOTHED.get(kind, 0.0), 0.05)
    losses = PAIR_LOSSES[kind](chosen, rejected, settings)
    expected = pair_formula(kind, chosen.detach(), rejected.detach(), beta=0.3)
    slopes = torch.autograd.grad(losses.sum(), (chosen, rejected))
    torch.testing.assert_close(losses.detach(), expected.losses)
    torch.testing.assert_close(slopes, (expected.chosen_slopes, expected.rejected_slopes))


DPO: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sigmoid": lambda c, r: (1 + (-0.2 * (c - r)).exp()).log(),
    "bco_pair": lambda c, r: (1 + (-0.2 * c).exp()).log() + (1 + (0.2 * r).exp()).log(),
    "sppo_hard": lambda c, r: (c - 2.5) ** 2 + (r + 2.5) ** 2,
    "hinge": lambda c, r: (1 - 0.2 * (c - r)).clamp(min=0),
}


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("has_reference", [True, False])
@pytest.mark.parametrize("kind", DPO)
def test_dpo(kind: str, has_reference: bool, mean: bool) -> None:
    batch = make_batch()
    batch = batch if has_reference else without_reference(batch)
    module = FusedLinearDPOLoss(
        IGNORED, 0.2, alpha=0.3, compute_nll_loss=mean, use_ref_model=has_reference,
        average_log_prob=mean, loss_type=kind,
    )  # fmt: skip

    def formula() -> tuple[Tensor, list[Tensor]]:
        _, (chosen, rejected), nll, logged = numbers(batch, mean=mean)
        loss = DPO[kind](chosen, rejected).mean() + 0.3 * mean * nll
        return loss, [*logged, mean * nll, 0.2 * chosen, 0.2 * rejected]

    compare(batch, module, formula)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cpo_and_simpo(smoothing: float) -> None:
    batch = without_reference(make_batch())

    def formula(mean: bool, margin: float, has_nll: bool) -> tuple[Tensor, list[Tensor]]:
        (chosen, rejected), _, nll, logged = numbers(batch, mean=mean)
        u = 0.5 * (chosen - rejected) - margin
        losses = (1 - smoothing) * (1 + (-u).exp()).log() + smoothing * (1 + u.exp()).log()
        nll = nll * has_nll
        return losses.mean() + 2 * nll, [*logged, nll, 0.5 * chosen, 0.5 * rejected]

    compare(
        batch, FusedLinearCPOLoss(IGNORED, 0.5, 2.0, smoothing), lambda: formula(False, 0.0, True)
    )
    simpo = FusedLinearSimPOLoss(IGNORED, 0.5, 2.0, smoothing, gamma=0.4, compute_nll_loss=False)
    compare(batch, simpo, lambda: formula(True, 0.4, False))


@pytest.mark.parametrize("has_targets", [False, True])
def test_orpo(has_targets: bool) -> None:
    batch = without_reference(make_batch())
    given = {"nll_target": make_batch(seed=4)["target"]} if has_targets else {}

    def formula() -> tuple[Tensor, list[Tensor]]:
        (chosen, rejected), _, nll, logged = numbers(batch, mean=True, **given)
        odds = (chosen.exp() / (1 - chosen.exp())).log()
        odds = odds - (rejected.exp() / (1 - rejected.exp())).log()
        gains = -(1 + (-odds).exp()).log()
        logged = [*logged, nll, 0.3 * chosen, 0.3 * rejected, gains.mean(), odds.mean()]
        return nll - 0.3 * gains.mean(), logged

    compare(batch, FusedLinearORPOLoss(IGNORED, 0.3), formula, **given)


@pytest.mark.parametrize("has_reference", [True, False])
def test_kto(has_reference: bool) -> None:
    batch = make_batch()
    batch = batch if has_reference else without_reference(batch)
    labels = torch.tensor([True, False, True, True, False, False])
    kl = torch.tensor(0.3, dtype=torch.float64)

    def formula() -> tuple[Tensor, list[Tensor]]:
        rows, ratios, _, _ = numbers(batch)
        rows, ratios = torch.cat(rows), torch.cat(ratios)
        logits = (batch["_input"] @ batch["lin_weight"].T + batch["bias"]).sum((1, 2))
        signs = 2 * labels.double() - 1
        loss = (1 - 1 / (1 + (-0.2 * (ratios - kl) * signs).exp())).mean()
        values = (rows, logits, 0.2 * ratios)
        return loss, [x[of].sum() for x in values for of in (labels, ~labels)]

    module = FusedLinearKTOLoss(IGNORED, 0.2, use_ref_model=has_reference)
    compare(batch, module, formula, preference_labels=labels, kl=kl)


def compare(batch: dict[str, Any], module: nn.Module, formula: Any, **given: Any) -> None:
    """Loss, everything returned beside it, and gradients; the frozen reference gets none."""
    names = [name for name in ("_input", "lin_weight", "bias") if name in batch]
    tensors = [batch[name].requires_grad_() for name in names]
    loss, logged = module(**batch, **given)
    expected, others = formula()
    assert not any(x.requires_grad for x in logged)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(list(logged), [x.detach() for x in others], rtol=1e-9, atol=1e-10)
    grads, truth = (torch.autograd.grad(3 * x, tensors) for x in (loss, expected))
    torch.testing.assert_close(grads, truth, rtol=1e-9, atol=1e-11)


LIGER: list[tuple[type[nn.Module], dict[str, Any]]] = [
    *((FusedLinearDPOLoss, {"loss_type": kind, "label_smoothing": SMOOTHED.get(kind, 0.0)})
      for kind in PAIR_LOSSES),
    (FusedLinearDPOLoss, {"compute_nll_loss": True, "alpha": 0.3, "average_log_prob": True}),
    (FusedLinearDPOLoss, {"use_ref_model": False}),
    (FusedLinearCPOLoss, {"label_smoothing": 0.1, "alpha": 0.5}),
    (FusedLinearCPOLoss, {"average_log_prob": True, "compute_nll_loss": False}),
    (FusedLinearSimPOLoss, {"gamma": 0.3}),
    (FusedLinearORPOLoss, {}),
    (FusedLinearKTOLoss, {"use_ref_model": True}),
    (FusedLinearKTOLoss, {"average_log_prob": True}),
]  # fmt: skip


def name_of(value: Any) -> str:
    return value.__name__ if isinstance(value, type) else "-".join(map(str, value.values()))


@pytest.mark.parametrize(("module", "settings"), LIGER, ids=name_of)
def test_same_as_liger(module: type[nn.Module], settings: dict[str, Any]) -> None:
    chunked_loss = pytest.importorskip("liger_kernel.chunked_loss")
    theirs = getattr(chunked_loss, f"Liger{module.__name__}")
    check_signatures(module, theirs)
    batch = make_batch(dtype=torch.float32)
    has_reference = settings.get("use_ref_model", module is FusedLinearDPOLoss)
    batch = batch if has_reference else without_reference(batch)
    if module is FusedLinearKTOLoss:
        batch["preference_labels"] = torch.tensor([True, False, True, True, False, False])
        batch["kl"] = torch.tensor(0.2)
    if module is FusedLinearORPOLoss:
        batch["nll_target"] = make_batch(seed=4)["target"]
    tensors = [batch[name].requires_grad_() for name in ("_input", "lin_weight", "bias")]
    results = []
    for kind in (module, theirs):
        loss, logged = kind(ignore_index=IGNORED, beta=0.2, compiled=False, **settings)(**batch)
        logged = [x.detach() for x in logged]
        results.append([loss, *logged, *torch.autograd.grad(2 * loss, tensors)])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def test_other_heads() -> None:
    """An adapter on the head and padded rows of the vocabulary, the mean of logits included."""
    batch, generator = without_reference(make_batch()), torch.Generator().manual_seed(2)
    a, b = (torch.randn(*x, generator=generator, dtype=torch.float64) for x in ((2, D), (V, 2)))
    weight, bias = batch["lin_weight"], batch.pop("bias")
    padding = torch.ones(5, D, dtype=torch.float64)
    head = LMHead(
        torch.cat([weight, padding]), torch.cat([bias, padding[:, 0]]), a,
        torch.cat([b, padding[:, :2]]), 0.5, logit_scale=0.7, vocab_size=V,
    )  # fmt: skip
    module = FusedLinearCPOLoss(IGNORED)
    found = module(**{**batch, "lin_weight": head})
    merged = 0.7 * (weight + 0.5 * b @ a)
    torch.testing.assert_close(found, module(**{**batch, "lin_weight": merged}, bias=0.7 * bias))
    with pytest.raises(ValueError, match="softcap must be None"):
        module(**{**batch, "lin_weight": head._replace(softcap=30.0)})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_type": "ipo"}, "got 'ipo', whose means over tokens"),
        ({"loss_type": "exo_pair"}, r"label_smoothing must be in \(0, 1\)"),
        ({"loss_type": "robust", "label_smoothing": 0.5}, r"in \[0, 0.5\)"),
        ({"label_smoothing": 0.1}, "label_smoothing must be 0 with loss_type 'sigmoid'"),
    ],
)
def test_settings_that_no_loss_has(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FusedLinearDPOLoss(**settings)


def test_arguments_that_do_not_fit() -> None:
    batch = make_batch()
    with pytest.raises(ValueError, match="needs ref_input and ref_weight"):
        FusedLinearDPOLoss(IGNORED)(**without_reference(batch))
    with pytest.raises(ValueError, match="takes no reference"):
        FusedLinearDPOLoss(IGNORED, use_ref_model=False)(**batch)
    odd = {**without_reference(batch), "_input": batch["_input"][:5], "target": batch["target"][:5]}
    with pytest.raises(ValueError, match="as many rejected rows"):
        FusedLinearCPOLoss(IGNORED)(**odd)
    with pytest.raises(ValueError, match="preference_labels must be bool"):
        FusedLinearKTOLoss(IGNORED)(**without_reference(batch))
