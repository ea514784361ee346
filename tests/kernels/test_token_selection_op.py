"""select_tokens as an operator: fake tensors, torch.compile, bad input."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastrl_kernels import select_tokens
from fastrl_kernels.token_selection.op import select_tokens_op
from tests.kernels.selection_cases import brute_force, make_lengths, make_mask, make_scores

S = 63
SCORES, MASK = make_scores("ties", S, torch.float32), make_mask(S)


@pytest.mark.parametrize("lengths", [None, make_lengths(S, 4)])
def test_operator_passes_opcheck(lengths: Tensor | None) -> None:
    for amount in ((0.3, None), (None, 5)):
        torch.library.opcheck(select_tokens_op, (SCORES, MASK, lengths, *amount, "torch"))
        torch.library.opcheck(select_tokens_op, (SCORES, None, lengths, *amount, "torch"))


def test_fake_tensors_have_shape_and_dtype_of_real_ones() -> None:
    scores = SCORES.view(7, 9)
    with FakeTensorMode() as mode:
        fake = select_tokens(mode.from_tensor(scores), ratio=0.5, per="sequence")
    assert (fake.shape, fake.dtype) == ((7, 9), torch.bool)


def test_compiled_function_keeps_the_same_tokens() -> None:
    torch._dynamo.reset()

    def kept_scores(scores: Tensor, mask: Tensor) -> Tensor:
        return torch.where(select_tokens(scores * 2, mask, ratio=0.4), scores, 0)

    compiled = torch.compile(kept_scores, backend="aot_eager", fullgraph=True)
    for num_tokens in (S, 17, 5):
        scores, mask = SCORES[:num_tokens], MASK[:num_tokens]
        expected = torch.where(torch.tensor(brute_force(scores, mask, ratio=0.4)), scores, 0)
        assert torch.equal(compiled(scores, mask), expected)


def test_scores_may_require_a_gradient() -> None:
    scores = SCORES.clone().requires_grad_()
    kept = select_tokens(scores, ratio=0.5)
    assert not kept.requires_grad
    scores[kept].sum().backward()
    assert torch.equal(scores.grad, kept.float())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ratio": None}, "either ratio or budget"),
        ({"budget": 3}, "either ratio or budget"),
        ({"ratio": 0.0}, "ratio must be in"),
        ({"ratio": 1.1}, "ratio must be in"),
        ({"ratio": float("nan")}, "ratio must be in"),
        ({"ratio": None, "budget": 0}, "budget must be"),
        ({"ratio": None, "budget": 2.0}, "budget must be"),
        ({"ratio": None, "budget": True}, "budget must be"),
        ({"scores": torch.zeros(S, dtype=torch.int64)}, "scores must be floating point"),
        ({"scores": torch.zeros(3, 3, 7)}, "scores must be floating point"),
        ({"scores": torch.tensor(1.0)}, "scores must be floating point"),
        ({"mask": MASK.float()}, "mask must be torch.bool"),
        ({"mask": MASK[:-1]}, "mask must be torch.bool"),
        ({"mask": MASK.to("meta")}, "mask must be torch.bool"),
        ({"per": "group"}, "per must be"),
        ({"per": "sequence"}, "expected lengths"),
        ({"lengths": torch.tensor([S])}, "expected lengths"),
        ({"scores": SCORES.view(7, 9), "mask": None, "per": "sequence",
          "lengths": torch.tensor([S])}, "expected lengths"),
        ({"per": "sequence", "lengths": torch.tensor([30, 32])}, "sum up to the 63 scores"),
        ({"per": "sequence", "lengths": torch.tensor([64, -1])}, "sum up to the 63 scores"),
        ({"per": "sequence", "lengths": torch.tensor([63.0])}, "lengths must be torch.int64"),
        ({"per": "sequence", "lengths": torch.tensor(63)}, "lengths must be torch.int64"),
        ({"implementation": "fast"}, "implementation"),
    ],
)  # fmt: skip
def test_bad_arguments_raise(change: dict[str, Any], message: str) -> None:
    settings = {"scores": SCORES, "mask": MASK, "ratio": 0.5, **change}
    with pytest.raises(ValueError, match=message):
        select_tokens(settings.pop("scores"), settings.pop("mask"), **settings)
