"""The reference policy: to the bit where weights are shared or copied, close where rounded."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from fastrl.config import ModelConfig
from fastrl.errors import InputError
from fastrl.integrations.decoding import has_state
from fastrl.loss import token_statistics
from fastrl.packing import pack
from fastrl.policy import Policy, new_policy
from fastrl.reference import (
    AdapterReference,
    BaseReference,
    load_reference,
    make_reference,
    streamed_policy,
)
from fastrl.weight_only import WeightOnlyLinear
from tests.helpers import TEXTS, TINY, random_ids, tiny_policy

WIDE = {"model_type": "qwen3", "vocab_size": 300, **TINY, "hidden_size": 64,
        "intermediate_size": 128, "head_dim": 16}  # fmt: skip
HEAD_TOO = {"r": 4, "target_modules": ["q_proj", "lm_head"], "modules_to_save": ["up_proj"]}


def plan_of():
    groups = [random_ids([4, 2], seed=1), random_ids([6, 1], seed=2)]
    return pack(random_ids([5, 3]), groups)


def logps_of(policy) -> Tensor:
    return token_statistics(policy, plan_of(), 0.9).logps


def adapted(lora=None, **fields) -> Policy:
    pytest.importorskip("peft")
    config = ModelConfig(architecture=WIDE, lora={"r": 4} if lora is None else lora, **fields)
    return new_policy(config, TEXTS, seed=0)


def move(policy: Policy, *, seed: int = 0, scale: float = 0.1) -> None:
    """Change every weight that is trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator) * scale
                parameter.add_(noise.to(parameter))


def storages(model: nn.Module) -> set[int]:
    return {x.untyped_storage().data_ptr() for x in (*model.parameters(), *model.buffers())}


@pytest.mark.parametrize("lora", [{"r": 4}, HEAD_TOO])
@pytest.mark.parametrize("precision", ["float32", "autocast", "split"])
@pytest.mark.parametrize("was_trained", [False, True])
def test_a_shared_reference_gives_the_bits_of_before(lora, precision, was_trained):
    policy = adapted(lora, precision=precision)
    if was_trained:  # as a warm start does
        move(policy, seed=1)
    before = logps_of(policy)
    reference = make_reference(policy, "auto")
    assert isinstance(reference, AdapterReference if was_trained else BaseReference)
    assert torch.equal(logps_of(reference), before)
    move(policy)
    moved = logps_of(policy)
    assert not torch.equal(moved, before)
    assert torch.equal(logps_of(reference), before)
    assert torch.equal(logps_of(policy), moved)
    wanting = [x.requires_grad for x in policy.model.parameters()]
    logps_of(reference)
    assert [x.requires_grad for x in policy.model.parameters()] == wanting


def test_a_shared_reference_stores_no_weights_of_the_base():
    policy = adapted()
    base = make_reference(policy, "auto")
    assert base.policy is policy
    assert not [x for x in vars(base).values() if isinstance(x, Tensor | dict)]
    move(policy)
    other = make_reference(policy, "auto")
    own = sum(x.nbytes for x in other.values.values())
    assert own == sum(x.nbytes for x in policy.model.parameters() if x.requires_grad)
    assert own < 0.3 * sum(x.nbytes for x in policy.model.parameters())


def test_gradients_do_not_notice_the_reference():
    """A pass that was run before the reference's turn goes backward after it."""
    for was_trained in (False, True):
        gradients = []
        for asks in (False, True):
            policy = adapted(HEAD_TOO)
            move(policy)
            reference = BaseReference(policy) if not was_trained else AdapterReference(policy)
            move(policy, seed=3)
            hidden = policy.hidden_states(plan_of())
            if asks:
                logps_of(reference)
            hidden.square().mean().backward()
            gradients.append([x.grad for x in policy.model.parameters() if x.grad is not None])
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
        assert len(gradients[0]) == 2 * 3


@pytest.mark.parametrize("kind", ["auto", "copy", "cpu"])
@pytest.mark.parametrize("tie", [False, True])
def test_a_copy_gives_the_bits_of_before(kind, tie):
    policy = tiny_policy(tie_word_embeddings=tie)
    before = logps_of(policy)
    reference = make_reference(policy, kind)
    move(policy)
    assert torch.equal(logps_of(reference), before)
    assert not storages(policy.model) & storages(reference.policy.model)


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("model_type", ["qwen3", "gemma2", "llama"])
def test_streamed_layers_give_the_same_bits_with_two_on_the_device(monkeypatch, tie, model_type):
    policy = tiny_policy(
        model_type=model_type, num_hidden_layers=5, tie_word_embeddings=tie,
        **({"query_pre_attn_scalar": 8} if model_type == "gemma2" else {}),
    )  # fmt: skip
    before = logps_of(policy)
    visiting: list[int] = []
    from fastrl.integrations.streamed import StreamedLayers

    enter = StreamedLayers.enter

    def counted(self: StreamedLayers, index: int) -> None:
        enter(self, index)
        homes = [home for layer in self.at_home for home in layer.values()]
        away = [x for layer in self.layers for x in layer.parameters() if x.data_ptr() not in
                {home.data_ptr() for home in homes}]  # fmt: skip
        assert {id(x) for x in away} == {id(x) for x in self.layers[index].parameters()}
        visiting.append(len(self.visiting))

    monkeypatch.setattr(StreamedLayers, "enter", counted)
    streamed = streamed_policy(policy)
    move(policy)
    for _ in range(2):
        assert torch.equal(logps_of(streamed), before)
    assert max(visiting) == 2
    assert visiting[4] == 1  # nothing follows the last layer
    homes = storages(streamed.model)
    assert torch.equal(logps_of(streamed), before)
    assert storages(streamed.model) == homes


@pytest.mark.parametrize(("kind", "num_bits"), [("8bit", 8), ("4bit", 4)])
def test_a_rounded_reference_is_close_and_small(kind, num_bits):
    """A model of trained models' proportions: weights of about 1 / sqrt(D)."""
    architecture = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
    policy = tiny_policy(**architecture)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(5 / parameter.shape[1] ** 0.5)  # std 1 / sqrt(D)
    before, plain = logps_of(policy), copy.deepcopy(policy.model)
    reference = make_reference(policy, kind)
    move(policy)
    rounded = logps_of(reference)
    gap = (rounded - before).abs().mean()
    atol = {8: 0.02, 4: 0.4}[num_bits]  # nats
    assert atol / 20 < gap < atol
    linears = [m for m in reference.policy.model.modules() if isinstance(m, WeightOnlyLinear)]
    assert len(linears) == 2 * 7
    num_values = sum(x.shape[0] * x.shape[1] for x in linears)
    num_bytes = sum(x.codes.nbytes + x.factors.nbytes for x in linears)
    assert num_bytes / num_values == num_bits / 8 + 4 / 64
    # It is the policy with these weights, and nothing else is rounded.
    dense = tiny_policy(**architecture)
    dense.model.load_state_dict(plain.state_dict())
    for path, module in reference.policy.model.named_modules():
        if isinstance(module, WeightOnlyLinear):
            dense.model.get_submodule(path).weight.data = module.weight
    torch.testing.assert_close(logps_of(dense), rounded, rtol=0, atol=1e-5)
    assert not storages(policy.model) & storages(reference.policy.model)


@pytest.mark.parametrize("shape", [(7, 123), (64, 64), (1, 1), (5, 257)])
def test_rounded_weights_are_the_nearest_of_their_blocks(shape):
    from fastrl.weight_only import NF4_LEVELS

    linear = nn.Linear(shape[1], shape[0], dtype=torch.float32)
    weight = linear.weight.detach().reshape(-1)
    for num_bits, levels in ((8, [k / 127 for k in range(-127, 128)]), (4, list(NF4_LEVELS))):
        rounded = WeightOnlyLinear(linear, num_bits=num_bits, dtype=torch.float32)
        found = rounded.weight.reshape(-1)
        for start in range(0, len(weight), 64):
            block = weight[start : start + 64]
            candidates = block.abs().max() * torch.tensor(levels)
            distances = (block[:, None] - candidates).abs()
            ours = (found[start : start + 64] - block).abs()
            assert (ours <= distances.amin(dim=1) + 1e-6 * block.abs().max()).all()
        x = torch.randn(3, shape[1], generator=torch.Generator().manual_seed(0))
        expected = x.double() @ rounded.weight.double().T + linear.bias.double()
        torch.testing.assert_close(rounded(x).double(), expected, rtol=1e-5, atol=1e-5)


def test_levels_of_4_bits_are_those_of_bitsandbytes():
    bnb = pytest.importorskip("bitsandbytes")
    linear = nn.Linear(128, 40, bias=False)
    packed, state = bnb.functional.quantize_4bit(
        linear.weight.data, quant_type="nf4", compress_statistics=False
    )
    theirs = bnb.functional.dequantize_4bit(packed, state)
    ours = WeightOnlyLinear(linear, num_bits=4, dtype=torch.float32).weight
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("precision", ["autocast", "split"])
def test_a_rounded_reference_computes_as_the_policy_does(precision):
    config = ModelConfig(architecture=WIDE, precision=precision)
    policy = new_policy(config, TEXTS, seed=0)
    before = logps_of(policy)
    gap = (logps_of(make_reference(policy, "8bit")) - before).abs().max()
    assert gap < 0.05
    assert has_state(policy.model) is False


@pytest.mark.parametrize("kind", ["auto", "copy", "cpu", "8bit", "4bit"])
@pytest.mark.parametrize("tie", [False, True])
def test_a_saved_reference_comes_back_to_the_bit(tmp_path, kind, tie):
    policy = tiny_policy(tie_word_embeddings=tie)
    reference = make_reference(policy, kind)
    before = logps_of(reference)
    reference.save(tmp_path / "reference")
    move(policy)
    restored = load_reference(policy, kind, tmp_path / "reference")
    assert torch.equal(logps_of(restored), before)


@pytest.mark.parametrize("was_trained", [False, True])
def test_a_saved_reference_of_an_adapter_comes_back_to_the_bit(tmp_path, was_trained):
    policy = adapted(HEAD_TOO)
    if was_trained:
        move(policy)
    reference = make_reference(policy, "auto")
    before = logps_of(reference)
    reference.save(tmp_path / "reference")
    move(policy, seed=5)
    restored = load_reference(policy, "auto", tmp_path / "reference")
    assert torch.equal(logps_of(restored), before)
    if not was_trained:
        assert [x.name for x in (tmp_path / "reference").iterdir()] == ["reference.json"]


@pytest.mark.parametrize("kind", ["copy", "cpu"])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_a_reference_that_follows_a_policy(kind, alpha):
    policy = tiny_policy()
    reference = make_reference(policy, kind, moves=True)
    first = [x.detach().clone() for x in policy.model.parameters()]
    move(policy)
    reference.update(policy, alpha)
    pairs = zip(first, policy.model.parameters(), reference.policy.model.parameters(), strict=True)
    for before, now, found in pairs:
        expected = alpha * now.double() + (1 - alpha) * before.double()
        torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-7)
        assert alpha not in (0.0, 1.0) or torch.equal(found, before if alpha == 0 else now)


def test_a_reference_that_follows_an_adapter():
    policy = adapted(HEAD_TOO)
    before = logps_of(policy)
    reference = make_reference(policy, "auto", moves=True)
    assert isinstance(reference, AdapterReference)
    assert torch.equal(logps_of(reference), before)
    first = {name: x.clone() for name, x in reference.values.items()}
    move(policy)
    now = logps_of(policy)
    reference.update(policy, 0.25)
    for name, value in reference.values.items():
        expected = 0.25 * reference.parameters[name].double() + 0.75 * first[name].double()
        torch.testing.assert_close(value.double(), expected.detach(), rtol=1e-6, atol=1e-7)
    assert torch.equal(logps_of(policy), now)
    reference.update(policy, 1.0)
    assert torch.equal(logps_of(reference), now)


def test_what_cannot_follow_and_what_cannot_be_restored(tmp_path):
    policy = tiny_policy()
    for kind in ("8bit", "4bit"):
        with pytest.raises(InputError, match="needs its exact weights"):
            make_reference(policy, kind, moves=True)
    with pytest.raises(ValueError, match="pass moves=True"):
        make_reference(adapted(), "auto").update(policy, 0.5)
    with pytest.raises(InputError, match="cannot restore the reference policy"):
        load_reference(policy, "copy", tmp_path)
    make_reference(policy, "copy").save(tmp_path / "reference")
    (tmp_path / "reference" / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(InputError, match="cannot restore the reference policy"):
        load_reference(policy, "copy", tmp_path / "reference")


def test_models_whose_weights_are_not_in_linear_layers_are_not_rounded():
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    gpt2 = {"n_embd": 32, "n_head": 4, "n_layer": 2, "intermediate_size": 128}
    for model_type, fields in (("qwen3_moe", experts), ("gpt2", gpt2)):
        policy = tiny_policy(model_type=model_type, **fields)
        with pytest.raises(InputError, match="only linear layers can be kept in 8 or 4 bits"):
            make_reference(policy, "8bit")


def test_a_rounded_copy_is_made_layer_by_layer():
    """The layers' weights are never there in full a second time."""
    policy = tiny_policy()
    assert copy.deepcopy(policy.model) is not policy.model
    reference = make_reference(policy, "8bit")
    assert not [m for m in reference.policy.model.model.layers.modules() if type(m) is nn.Linear]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_streamed_layers_take_the_memory_of_two_on_a_gpu():
    policy = tiny_policy(num_hidden_layers=8, hidden_size=512, intermediate_size=2048)
    policy.model.cuda()
    plan = plan_of().to(policy.device)
    before = token_statistics(policy, plan, 0.9).logps
    layer = sum(x.nbytes for x in policy.model.model.layers[0].parameters())
    weights = torch.cuda.memory_allocated()
    reference = make_reference(policy, "cpu")
    assert torch.cuda.memory_allocated() - weights < layer / 10  # norms and tables of angles
    move(policy)
    for _ in range(3):
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        assert torch.equal(token_statistics(reference, plan, 0.9).logps, before)
        assert torch.cuda.max_memory_allocated() - start < 3 * layer
