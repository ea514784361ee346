"""What attaching a plan to a hybrid model refuses, restores and survives, in models as they are."""

from __future__ import annotations

import contextlib
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastrl.config import ModelConfig
from fastrl.errors import InputError
from fastrl.integrations.hybrids import MIXERS, mixers_of
from fastrl.integrations.transformers import check_model
from fastrl.packing import Plan, pack
from fastrl.report import read_metrics
from fastrl.run import train
from tests.helpers import TINY, random_ids
from tests.test_hybrids import DELTA, HYBRIDS, SHORT_CONV, hybrid
from tests.test_training import assert_same_run, tiny_config

ONE_OF_EACH = ["lfm2", "qwen3_5_text", "qwen3_next"]


def group(seed: int = 0, lengths: tuple[int, ...] = (6, 0, 3, 9), prompt: int = 5) -> Plan:
    return pack(random_ids([prompt], seed=seed), [random_ids(lengths, seed=seed + 1)])


def gradients(model: Any) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def mixing_functions(model: Any) -> list[Any]:
    """What the model's layers would mix tokens with, if they were called now."""
    return [
        inspect.unwrap(type(module).forward).__globals__[mixer]
        for module in model.modules()
        for mixer in mixers_of(module)
    ]


@pytest.mark.parametrize("model_type", sorted(HYBRIDS))
def test_a_sibling_cannot_be_seen(model_type: str) -> None:
    """Bitwise, because a small leak hides below any tolerance."""
    model = hybrid(model_type).float().eval()
    prompts, completions = random_ids([2, 5]), random_ids([6, 0, 3, 9, 2], seed=1)

    def hidden(first: Tensor) -> tuple[Plan, list[Tensor]]:
        plan = pack(prompts, [[first, *completions[1:3]], completions[3:]])
        with plan.attach(model), torch.no_grad():
            states = model.base_model(**plan.inputs).last_hidden_state[0]
        return plan, plan.scatter(states[plan.source_index])

    _, before = hidden(completions[0])
    _, after = hidden(3 + (completions[0] + 7) % 58)
    assert not torch.equal(before[0], after[0])
    for own, same in zip(before[1:], after[1:], strict=True):
        assert torch.equal(own, same)


@pytest.mark.parametrize("model_type", sorted(HYBRIDS))
def test_the_same_bits_on_every_run(model_type: str) -> None:
    model, plan = hybrid(model_type).float(), group()
    runs = []
    for _ in range(3):
        model.zero_grad()
        with plan.attach(model):
            logits = model(**plan.inputs).logits
        logits.square().sum().backward()
        runs.append([logits.detach(), *gradients(model)])
    for own, second, third in zip(*runs, strict=True):
        assert torch.equal(own, second)
        assert torch.equal(own, third)


@pytest.mark.parametrize("model_type", ONE_OF_EACH)
@pytest.mark.parametrize("inside", [True, False])
def test_backward_of_checkpointed_layers_inside_and_after_the_block(
    model_type: str, inside: bool
) -> None:
    model, plan = hybrid(model_type).float(), group()
    with plan.attach(model):
        model.model(**plan.inputs).last_hidden_state.square().sum().backward()
    expected = gradients(model)
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with plan.attach(model):
        loss = model.model(**plan.inputs).last_hidden_state.square().sum()
        other = group(seed=5, lengths=(2, 4), prompt=3)
        with torch.no_grad():
            model.model(**other.inputs)
        if inside:
            loss.backward()
    if not inside:
        loss.backward()
    for recomputed, plain in zip(gradients(model), expected, strict=True):
        assert torch.equal(recomputed, plain)


@pytest.mark.parametrize("model_type", ONE_OF_EACH)
def test_everything_is_restored(model_type: str) -> None:
    model, plan = hybrid(model_type).eval(), group()
    functions = mixing_functions(model)

    def assert_restored() -> None:
        assert all(a is b for a, b in zip(mixing_functions(model), functions, strict=True))
        assert not model.base_model._forward_pre_hooks
        assert not model.base_model._forward_hooks
        assert model.config._attn_implementation == "eager"

    with plan.attach(model):
        assert not any(a is b for a, b in zip(mixing_functions(model), functions, strict=True))
        with plan.attach(hybrid(model_type)):
            pass
        model(**plan.inputs)  # the inner block has left the outer one as it was
    assert_restored()
    with pytest.raises(ZeroDivisionError), plan.attach(model):
        _ = 1 / 0
    assert_restored()


@pytest.mark.parametrize("model_type", ONE_OF_EACH)
def test_a_model_without_a_plan_is_as_ever_in_another_s_block(model_type: str) -> None:
    """Also after a forward pass that failed half-way."""
    model, other, plan = hybrid(model_type), hybrid(model_type), group()
    row = random_ids([9])[0][None]
    expected = other(input_ids=row, use_cache=False).logits

    def inside_a_block() -> None:
        with plan.attach(model):
            with contextlib.suppress(ZeroDivisionError):
                model(**plan.inputs)
            results.append(other(input_ids=row, use_cache=False).logits)

    results: list[Tensor] = []
    inside_a_block()
    model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(RuntimeError, match="1 forward passes"):
        inside_a_block()
    assert len(results) == 2
    assert all(torch.equal(result, expected) for result in results)


def test_two_models_with_plans_at_a_time() -> None:
    """Each is counted for itself: here one has other layers than the other."""
    policy, critic, plan = hybrid("qwen3_next"), hybrid("lfm2"), group()
    expected = []
    for model in (policy, critic):
        with plan.attach(model):
            expected.append(model(**plan.inputs).logits)
    with plan.attach(policy), plan.attach(critic):
        both = [policy(**plan.inputs).logits, critic(**plan.inputs).logits]
    for own, same in zip(both, expected, strict=True):
        assert torch.equal(own, same)


@pytest.mark.parametrize("model_type", ONE_OF_EACH)
def test_generation_between_blocks_is_as_before(model_type: str) -> None:
    model, plan = hybrid(model_type).float().eval(), group()
    prompt = random_ids([5], seed=3)[0][None]

    def generated() -> Tensor:
        mask = torch.ones_like(prompt)
        return model.generate(prompt, attention_mask=mask, max_new_tokens=6, do_sample=False)

    before = generated()
    with plan.attach(model), torch.no_grad():
        model.model(**plan.inputs)
    assert torch.equal(before, generated())


@pytest.mark.parametrize("model_type", ["lfm2", "qwen3_5_text"])
def test_a_compiled_model_gives_the_same_numbers(model_type: str) -> None:
    model = hybrid(model_type).float()

    def numbers(run: Any, plan: Plan) -> list[Tensor]:
        model.zero_grad()
        with plan.attach(run):
            logits = run(**plan.inputs).logits
        logits.square().mean().backward()
        return [logits.detach(), *gradients(model)]

    plans = [group(), group(seed=2, lengths=(3, 6, 0, 9))]  # another forest of as many tokens
    expected = [numbers(model, plan) for plan in plans]
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", dynamic=False)
    for plan, plain in zip(plans, expected, strict=True):
        with torch._dynamo.config.patch(error_on_recompile=plan is plans[1]):
            ours = numbers(compiled, plan)
        for own, same in zip(ours, plain, strict=True):
            torch.testing.assert_close(own, same, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model_type", ONE_OF_EACH)
def test_a_layer_that_goes_its_own_way_is_noticed(model_type: str) -> None:
    model, plan = hybrid(model_type), group()
    layer = next(module for module in model.modules() if mixers_of(module))
    layer.forward = lambda hidden_states, **kwargs: hidden_states.cumsum(1)
    with pytest.raises(RuntimeError, match="1 of causal_conv1d_fn"), plan.attach(model):
        model(**plan.inputs)


def test_a_module_of_the_name_that_works_otherwise_is_refused() -> None:
    class Lfm2ShortConv(nn.Module):
        def forward(self, hidden_states: Tensor) -> Tensor:
            return hidden_states.cumsum(1)

    assert Lfm2ShortConv.__name__ in MIXERS
    model = hybrid("lfm2")
    model.model.layers[0].conv = Lfm2ShortConv()
    with pytest.raises(InputError, match="use transformers"):
        check_model(model)


@pytest.mark.parametrize(
    ("model_type", "layers"),
    [("lfm2", SHORT_CONV["layer_types"]), ("qwen3_next", DELTA["layer_types"])],
)
def test_layers_of_another_kind_are_still_refused(model_type: str, layers: list[str]) -> None:
    model = hybrid(model_type)
    check_model(model)
    model.model.layers[1].extra = nn.Conv1d(4, 4, 3)
    with pytest.raises(InputError, match=r"convolution at layers\.1\.extra"):
        check_model(model)
    del model.model.layers[1].extra
    name = "conv" if model_type == "lfm2" else "linear_attn"
    setattr(model.model.layers[0], name, nn.Identity())
    with pytest.raises(InputError, match=f"layers of type .*{layers[0]}"):
        check_model(model)


def test_what_a_plan_replaces_is_refused() -> None:
    model, plan = hybrid("qwen3_next"), group()
    with pytest.raises(InputError, match="cu_seq_lens_q"), plan.attach(model):
        model(**plan.inputs, cu_seq_lens_q=torch.tensor([0, 4]))
    two_rows = {**plan.inputs, "input_ids": plan.inputs["input_ids"].expand(2, -1)}
    with pytest.raises(InputError, match="a batch of 2"), plan.attach(model):
        model(**two_rows)


def test_a_run_with_a_hybrid_is_the_same_twice(tmp_path: Path) -> None:
    """Warm start, evaluation and steps through plans, from the same seed to the same bits."""
    model = ModelConfig(
        architecture={"model_type": "qwen3_5_text", **TINY, "num_hidden_layers": 3, **DELTA}
    )
    for name in ("a", "b"):
        train(tiny_config(tmp_path / name, model=model, max_steps=2))
    assert_same_run(tmp_path / "a", tmp_path / "b")
    for row in read_metrics(tmp_path / "a"):
        if "loss" in row:
            assert row["ratio/max"] == 1  # old log-probabilities come from the same plan
            assert row["packing/token_ratio"] > 1.5
