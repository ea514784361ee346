"""`FusedLinearCrossEntropyLoss` against PyTorch's cross entropy on all the logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fastrl_kernels import CrossEntropyOutput, FusedLinearCrossEntropyLoss, LMHead
from tests.kernels.signatures import check_signatures
from tests.kernels.test_linear_logps_memory import MemoryLog

S, D, V, IGNORED = 23, 16, 61, -5


def make_case(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, weight, bias, targets of which a third are ignored, and class weights."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    target = torch.randint(V, (S,), generator=generator)
    target[::3] = IGNORED
    hidden, weight, bias = normal(S, D), normal(V, D) / 2, normal(V)
    tensors = [x.requires_grad_() for x in (hidden, weight, bias)]
    return *tensors, target, normal(V).exp()  # type: ignore[return-value]


def formula(logits: Tensor, target: Tensor, **s: Any) -> CrossEntropyOutput:
    """PyTorch's, with the z-loss of PaLM and a weight of exp(logp) for every token."""
    reduction, weight = s["reduction"], s.get("ce_weight")
    if s.get("softcap"):
        logits = s["softcap"] * torch.tanh(logits / s["softcap"])
    kept = target != IGNORED
    losses = cross_entropy(
        logits, target, weight, ignore_index=IGNORED, reduction="none",
        label_smoothing=s.get("label_smoothing", 0.0),
    )  # fmt: skip
    z_losses = s.get("lse_square_scale", 0.0) * logits.logsumexp(1) ** 2 * kept
    if reduction == "mean":
        losses = losses / (kept.sum() if weight is None else weight[target[kept]].sum())
        z_losses = z_losses / kept.sum()
    losses = losses + z_losses
    if s.get("use_token_scaling"):
        ids = target.masked_fill(~kept, 0)[:, None]
        scales = logits.softmax(1).gather(1, ids)[:, 0].detach()
        losses, z_losses = losses * scales, z_losses * scales
    predicted = logits.argmax(1).masked_fill(~kept, -1)
    accuracy = (predicted == target).double()
    if reduction != "none":
        losses, z_losses, accuracy = losses.sum(), z_losses.sum(), accuracy.sum() / kept.sum()
    return CrossEntropyOutput(losses, z_losses.detach(), accuracy, predicted)


SETTINGS: list[dict[str, Any]] = [
    {},
    {"weighted": True},
    {"softcap": 5.0},
    {"lse_square_scale": 0.1},
    {"lse_square_scale": 0.1, "softcap": 5.0, "weighted": True},
    {"label_smoothing": 0.2},
    {"label_smoothing": 0.2, "weighted": True, "lse_square_scale": 0.1},
    {"use_token_scaling": True, "lse_square_scale": 0.1},
]
RETURNS = {f"return_{name}": True for name in ("z_loss", "token_accuracy", "predicted_tokens")}


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_same_as_pytorch(settings: dict[str, Any], reduction: str) -> None:
    *tensors, target, classes = make_case()
    hidden, weight, bias = tensors
    given = {"reduction": reduction, **settings}
    if given.pop("weighted", False):
        given["ce_weight"] = classes
    expected = formula(hidden @ weight.T + bias, target, **given)
    upstream = torch.linspace(-1, 2, expected.loss.numel(), dtype=torch.float64)

    def gradients(loss: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad((loss * upstream).sum(), tensors, retain_graph=True)

    found = FusedLinearCrossEntropyLoss(ignore_index=IGNORED, **given)(weight, hidden, target, bias)
    record = FusedLinearCrossEntropyLoss(ignore_index=IGNORED, **given, **RETURNS)(
        weight, hidden, target, bias
    )
    torch.testing.assert_close(found, expected.loss)
    for value, other in zip(record, expected, strict=True):
        torch.testing.assert_close(value, other)
    for loss in (found, record.loss):
        torch.testing.assert_close(gradients(loss), gradients(expected.loss), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("settings", [SETTINGS[0], SETTINGS[3], SETTINGS[6]], ids=str)
def test_other_heads(settings: dict[str, Any]) -> None:
    """An adapter, a scale and padded rows of the vocabulary; and a layer."""
    hidden, weight, bias, target, classes = (x.detach() for x in make_case())
    generator = torch.Generator().manual_seed(2)
    a, b = (torch.randn(*x, generator=generator, dtype=torch.float64) for x in ((2, D), (V, 2)))
    padding = torch.ones(5, D, dtype=torch.float64)
    head = LMHead(
        torch.cat([weight, padding]), torch.cat([bias, padding[:, 0]]), a,
        torch.cat([b, padding[:, :2]]), 0.5, logit_scale=0.7, vocab_size=V,
    )  # fmt: skip
    layer = nn.Linear(D, V, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(0.7 * (weight + 0.5 * b @ a))
        layer.bias.copy_(0.7 * bias)
    given = {key: value for key, value in settings.items() if key != "weighted"}
    if settings.get("weighted"):
        given["ce_weight"] = classes
    module = FusedLinearCrossEntropyLoss(ignore_index=IGNORED, **given)
    torch.testing.assert_close(module(head, hidden, target), module(layer, hidden, target))


def test_nothing_but_ignored_tokens() -> None:
    hidden, weight, bias, _, _ = make_case()
    target = torch.full((S,), IGNORED)
    for settings in ({}, {"lse_square_scale": 0.1, "label_smoothing": 0.1}):
        module = FusedLinearCrossEntropyLoss(ignore_index=IGNORED, **settings)
        loss = module(weight, hidden, target, bias)
        assert loss == 0
        assert all(x.eq(0).all() for x in torch.autograd.grad(loss, (hidden, weight, bias)))


def test_no_logits() -> None:
    """Statistics, smoothing and z-loss hold no (S, V) tensor either."""
    tokens, columns = 300, 2000
    hidden = torch.randn(tokens, 8).requires_grad_()
    weight = torch.randn(columns, 8).requires_grad_()
    target = torch.randint(columns, (tokens,))
    module = FusedLinearCrossEntropyLoss(
        label_smoothing=0.1, lse_square_scale=0.1, return_token_accuracy=True, workspace_mb=0.5
    )
    with MemoryLog() as log:
        module(weight, hidden, target).loss.backward()
    assert log.largest <= tokens * columns // 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reduction": "batch"}, "reduction must be one of mean"),
        ({"label_smoothing": 1.5}, r"label_smoothing must be in \[0, 1\]"),
        ({"accum_dtype": torch.float16}, "accum_dtype must be None or torch.float32"),
        ({"label_smoothing": 0.1, "softcap": 30.0}, "label_smoothing must be 0 beside softcap"),
    ],
)
def test_what_is_refused(settings: dict[str, Any], message: str) -> None:
    hidden, weight, bias, target, _ = make_case()
    with pytest.raises(ValueError, match=message):
        FusedLinearCrossEntropyLoss(ignore_index=IGNORED, **settings)(weight, hidden, target, bias)


def test_the_signature_is_liger_s() -> None:
    liger = pytest.importorskip("liger_kernel.transformers.fused_linear_cross_entropy")
    check_signatures(FusedLinearCrossEntropyLoss, liger.LigerFusedLinearCrossEntropyLoss)
