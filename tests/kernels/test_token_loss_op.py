"""token_loss as an operator: fake tensors, torch.compile, bad input."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastrl_kernels.objectives import Objective, Regulariser, clipped_ratio, k3
from fastrl_kernels.objectives.arguments import to_arguments
from fastrl_kernels.token_loss.op import token_loss_op
from tests.kernels.token_cases import CLIP, S, Tokens, call, make_tokens


def op_arguments(tokens: Tokens) -> tuple[Any, ...]:
    arguments = to_arguments(CLIP, 0.03, tokens.logps.dtype, tokens.logps.device)
    return (*tokens, *arguments, "torch")


def test_operator_passes_opcheck() -> None:
    tokens = make_tokens(7, 7, torch.float32)
    torch.library.opcheck(token_loss_op, op_arguments(tokens))
    tokens.logps.requires_grad_()
    torch.library.opcheck(token_loss_op, op_arguments(tokens))
    tokens.entropies.requires_grad_()
    torch.library.opcheck(token_loss_op, op_arguments(tokens))


def test_fake_tensors_have_the_shapes_and_dtypes_of_real_ones() -> None:
    for dtype in (torch.float32, torch.float64):
        tokens = make_tokens(8, 7, dtype)
        tokens.logps.requires_grad_()
        real = call(tokens)
        with FakeTensorMode() as mode:
            fake = call(Tokens._make(mode.from_tensor(x) for x in tokens))
        for value, expected in zip(fake, real, strict=True):
            assert (value.shape, value.dtype) == (expected.shape, expected.dtype)
            assert value.requires_grad == expected.requires_grad


def test_compiled_function_gives_the_same_bits() -> None:
    torch._dynamo.reset()
    tokens = make_tokens(9)
    tokens.logps.requires_grad_()

    def loss(tokens: Tokens, epsilon: float) -> Tensor:
        objective = Objective(clipped_ratio, (epsilon, epsilon), (Regulariser(k3, 0.1),))
        return call(tokens._replace(logps=tokens.logps * 2), objective=objective).loss

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for rows, epsilon in ((S, 0.2), (63, 0.3), (7, 0.1)):
        some = Tokens._make(x[:rows] for x in tokens)  # type: ignore[index]
        expected, value = loss(some, epsilon), compiled(some, epsilon)
        assert torch.equal(value, expected)
        (grad,) = torch.autograd.grad(value, tokens.logps)
        assert torch.equal(grad, torch.autograd.grad(expected, tokens.logps)[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logps": torch.zeros(S, dtype=torch.int64)}, "logps"),
        ({"logps": torch.zeros(S, 1)}, "logps"),
        ({"entropies": torch.zeros(S - 1)}, "entropies"),
        ({"advantages": torch.zeros(S - 1)}, "advantages"),
        ({"advantages": 1.0}, "advantages"),
        ({"token_weights": torch.ones(S, dtype=torch.bool)}, "token_weights"),
        ({"old_logps": torch.zeros(S, 2)}, "old_logps"),
        ({"ref_logps": None}, "needs ref_logps"),
        ({"ref_logps": torch.zeros(S + 1)}, "ref_logps"),
        ({"rollout_weights": torch.zeros(S, device="meta")}, "rollout_weights"),
        ({"objective": "k3"}, "did you mean"),
        ({"objective": CLIP.surrogate}, "objective must be"),
        ({"objective": Objective(lambda x, y, a: (a * x, a))}, "top level"),
        ({"implementation": "triton"}, '"torch"'),
        ({"implementation": "fast"}, "implementation"),
    ],
)
def test_bad_arguments_raise(change: dict[str, Any], message: str) -> None:
    fields = {name: value for name, value in change.items() if name in Tokens._fields}
    settings = {name: value for name, value in change.items() if name not in fields}
    with pytest.raises(ValueError, match=message):
        call(make_tokens(10, dtype=torch.float32)._replace(**fields), **settings)
