"""The last layer on the rows of trained tokens: what it leaves out, and what it never changes.

Values and gradients of every family are compared in test_families.py.
"""

from typing import Any

import pytest
import torch
from torch import nn

from fastrl.integrations.last_layer import can_skip_rows
from fastrl.packing import pack
from tests.helpers import random_ids, tiny_model
from tests.test_families import FAMILIES, family, packed_logits
from tests.test_hybrids import HYBRIDS, hybrid

CANNOT = {"gpt2"}  # its layers have other names


def plan_of(num_prompts: int = 1) -> Any:
    prompts = random_ids([12] * num_prompts)
    completions = [random_ids([3, 5, 1], seed=1 + p) for p in range(num_prompts)]
    return pack(prompts, completions)


def states(model: Any, plan: Any, **options: Any) -> torch.Tensor:
    with plan.attach(model, **options):
        return model.base_model(**plan.inputs).last_hidden_state[0]


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_the_last_mlp_sees_the_rows_of_trained_tokens_alone(model_type: str) -> None:
    model = family(model_type)
    if model_type in CANNOT:
        assert not can_skip_rows(model.base_model)
        return
    plan = plan_of()
    rows = []
    for layer in model.base_model.layers:
        layer.mlp.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[:-1].numel()))
    states(model, plan, source_rows_only=True)
    needed = len(plan.source_index.unique())
    assert rows == [len(plan.input_ids)] * (len(rows) - 1) + [needed]
    assert needed < len(plan.input_ids)


def test_other_rows_are_zero_and_only_on_request() -> None:
    model, plan = tiny_model("qwen3").eval(), plan_of()
    with torch.no_grad():
        some, full = states(model, plan, source_rows_only=True), states(model, plan)
    needed = torch.zeros(len(full), dtype=torch.bool)
    needed[plan.source_index] = True
    assert torch.equal(some.abs().sum(-1) == 0, ~needed)
    assert (full.abs().sum(-1) > 0).all()
    torch.testing.assert_close(some[needed], full[needed], rtol=0, atol=1e-12)


def test_the_model_is_as_before_even_after_an_error() -> None:
    model, plan = tiny_model("llama"), plan_of()
    names = [name for name, _ in model.named_modules()]
    with (
        pytest.raises(RuntimeError, match="without segments"),
        plan.attach(model, source_rows_only=True),
    ):
        model(input_ids=plan.input_ids[None])
    assert [name for name, _ in model.named_modules()] == names
    ids = plan.input_ids[None]
    assert (model(input_ids=ids).logits.abs().sum(-1) > 0).all()


def test_nothing_is_run_twice_where_nearly_all_rows_are_needed() -> None:
    model = tiny_model("qwen3")
    prompt, completion = random_ids([1, 60])
    plan = pack([prompt], [[completion]])
    calls = []
    model.base_model.layers[-1].register_forward_hook(lambda *_: calls.append(1))
    states(model, plan, source_rows_only=True)
    assert len(calls) == 1


def test_the_same_bits_twice_and_with_checkpointing() -> None:
    model, plan = tiny_model("qwen3", dtype=torch.float32).train(), plan_of(3)

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        states(model, plan, source_rows_only=True)[plan.source_index].square().sum().backward()
        return [p.grad.clone() for p in model.base_model.parameters()]

    first, second = gradients(), gradients()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for x, y, z in zip(first, second, gradients(), strict=True):
        assert torch.equal(x, y)
        assert torch.equal(x, z)


@pytest.mark.parametrize("model_type", sorted(HYBRIDS))
def test_a_hybrid_skips_rows_only_where_attention_comes_last(
    model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A convolution or a state needs its neighbours."""
    assert not can_skip_rows(hybrid(model_type).base_model)
    kinds = HYBRIDS[model_type]["layer_types"]
    monkeypatch.setitem(HYBRIDS[model_type], "layer_types", [kinds[0], kinds[0], kinds[1]])
    model, plan = hybrid(model_type), plan_of(2)
    assert can_skip_rows(model.base_model)
    with torch.no_grad():
        some, full = (packed_logits(model, plan, source_rows_only=x) for x in (True, False))
    torch.testing.assert_close(some, full, rtol=0, atol=2e-6)  # norms are float32 inside


def test_a_layer_without_attention_is_an_error() -> None:
    model, plan = tiny_model("qwen3"), plan_of()

    class Silent(nn.Module):
        def forward(self, hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
            return hidden_states, None

    model.base_model.layers[-1].self_attn = Silent()
    with (
        pytest.raises(RuntimeError, match="ended without attention"),
        plan.attach(model, source_rows_only=True),
    ):
        model.base_model(**plan.inputs)
