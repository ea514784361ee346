"""MLPs in chunks and inputs of layers on the CPU: the same numbers in fewer bytes."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from fastrl.activations import packed_token_bytes
from fastrl.config import ModelConfig
from fastrl.errors import InputError
from fastrl.integrations.chunked_mlp import chunk_mlps
from fastrl.integrations.offload import MAX_LEAVING, Kept, offload_checkpoints
from fastrl.packing import Plan, pack, pack_tree
from fastrl.policy import Policy, load_policy, new_policy
from tests.helpers import TEXTS, TINY, random_ids, tiny_policy
from tests.test_activations import saved_bytes
from tests.test_policy_memory import Census

GPT2 = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "n_embd": 32, "n_head": 4,
        "n_layer": 2, "intermediate_size": 128}  # fmt: skip
DENSE = {"llama": {}, "qwen3": {}, "gemma2": {"query_pre_attn_scalar": 8}, "gpt2": GPT2}


def plan_of() -> Plan:
    groups = [random_ids([9, 7], seed=1), random_ids([6, 1], seed=2)]
    return pack(random_ids([5, 13]), groups)


def checkpointed(policy: Policy) -> Policy:
    enable = getattr(policy.model, "activation_checkpointing_enable", None)
    (enable or policy.model.gradient_checkpointing_enable)({"use_reentrant": False})
    return policy


def hidden_and_gradients(policy: Policy, plan: Plan | None = None) -> list[Tensor]:
    """Hidden states that count, and the gradient of every weight."""
    plan = plan_of() if plan is None else plan
    hidden = policy.hidden_states(plan)[plan.source_index]
    weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0))
    (hidden * weights.to(hidden)).sum().backward()
    gradients = [x.grad for x in policy.model.parameters() if x.grad is not None]
    return [hidden.detach(), *gradients]


@pytest.mark.parametrize("model_type", DENSE)
@pytest.mark.parametrize("is_checkpointed", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 7, 16, 1000])
def test_mlps_in_chunks_change_rounding_alone(model_type, is_checkpointed, num_tokens):
    policy = tiny_policy(model_type=model_type, dtype=torch.float64, **DENSE[model_type])
    chunked = copy.deepcopy(policy)
    chunk_mlps(chunked.model, num_tokens)
    if is_checkpointed:
        policy, chunked = checkpointed(policy), checkpointed(chunked)
    expected, found = hidden_and_gradients(policy), hidden_and_gradients(chunked)
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6 * float(a.abs().max()))
        assert num_tokens < 1000 or torch.equal(a, b)
    with torch.no_grad():
        plain, again = policy.hidden_states(plan_of()), chunked.hidden_states(plan_of())
    torch.testing.assert_close(again, plain, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma2"])
def test_bytes_of_a_packed_token_with_mlps_in_chunks(model_type, bf16):
    policy = tiny_policy(model_type=model_type, **DENSE[model_type])
    policy.bf16 = bf16
    whole = (saved_bytes(policy, 112) - saved_bytes(policy, 48)) / 64
    chunk_mlps(policy.model, 16)
    measured = (saved_bytes(policy, 112) - saved_bytes(policy, 48)) / 64
    config = policy.model.config
    estimated = packed_token_bytes(config, bf16=bf16, is_checkpointed=False, has_chunked_mlps=True)
    assert 0.66 < estimated / measured < 1.5
    saved = 2 * (2 if bf16 else 4) * 3 * 48  # gate, up and their product at least, in two layers
    assert whole - measured >= saved


def test_most_bytes_of_recomputed_layers_with_mlps_in_chunks():
    """What a layer keeps while it runs backward is that of one chunk, not of the pass."""
    num_tokens, chunk, width = 512, 32, 512
    peaks = []
    for size in (num_tokens, chunk):
        policy = checkpointed(tiny_policy(intermediate_size=width, max_position_embeddings=1024))
        chunk_mlps(policy.model, size)
        plan = pack_tree(random_ids([num_tokens + 1]))
        with Census() as census:
            policy.hidden_states(plan).sum().backward()
            peaks.append(census.peak)
    saved = 3 * 4 * width * (num_tokens - chunk)  # gate, up and their product
    assert peaks[0] - peaks[1] > saved


@pytest.mark.parametrize("load_in_4bit", [False, True])
@pytest.mark.parametrize("precision", ["float32", "autocast", "split"])
@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_bytes_of_a_packed_token_under_an_adapter(model_type, precision, load_in_4bit):
    pytest.importorskip("peft")
    if load_in_4bit:
        pytest.importorskip("bitsandbytes")
    wide = {"hidden_size": 64, "intermediate_size": 192, "head_dim": 16}
    architecture = {"model_type": model_type, **TINY, **wide}
    config = ModelConfig(
        architecture=architecture, precision=precision, lora={"r": 4}, load_in_4bit=load_in_4bit
    )
    policy = new_policy(config, TEXTS, seed=0)
    measured = (saved_bytes(policy, 112) - saved_bytes(policy, 48)) / 64
    estimated = packed_token_bytes(
        policy.model.config, bf16=policy.is_half, is_checkpointed=False,
        has_bf16_stream=policy.has_bf16_stream,
    )  # fmt: skip
    assert 0.66 < estimated / measured < 1.5


def test_a_chunked_model_is_saved_and_copied_as_any_other(tmp_path):
    policy = tiny_policy()
    chunk_mlps(policy.model, 4)
    copied = copy.deepcopy(policy)
    with torch.no_grad():
        before = policy.hidden_states(plan_of())
        policy.model.model.layers[0].mlp.up_proj.weight.zero_()
        assert torch.equal(copied.hidden_states(plan_of()), before)
        assert not torch.equal(policy.hidden_states(plan_of()), before)
    copied.save(tmp_path)
    plain = load_policy(ModelConfig(), tmp_path)
    again = load_policy(ModelConfig(mlp_chunk_size=4), tmp_path)
    assert "Chunked" not in type(plain.model.model.layers[0].mlp).__name__
    with torch.no_grad():
        assert torch.equal(again.hidden_states(plan_of()), before)


def test_an_adapter_in_a_chunked_mlp_gets_its_gradient():
    peft = pytest.importorskip("peft")
    found = []
    for num_tokens in (1000, 5):
        policy = tiny_policy(dtype=torch.float64)
        chunk_mlps(policy.model, num_tokens)
        lora = peft.LoraConfig(target_modules=["up_proj"], init_lora_weights=False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = peft.get_peft_model(policy.model, lora, autocast_adapter_dtype=False)
        found.append(hidden_and_gradients(Policy(model.double(), policy.tokenizer)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6 * float(a.abs().max()))


def test_models_whose_mlps_cannot_be_cut():
    moe = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    with pytest.raises(InputError, match="routes tokens to experts"):
        chunk_mlps(tiny_policy(model_type="qwen3_moe", **moe).model, 8)
    policy = tiny_policy()
    del policy.model.model.layers[1].mlp
    with pytest.raises(InputError, match=r"has 1 in 2 layers; set it to 0"):
        chunk_mlps(policy.model, 8)


@pytest.mark.parametrize("model_type", DENSE)
def test_inputs_that_were_away_give_the_same_gradient(model_type):
    fields = {"num_hidden_layers": 5, **DENSE[model_type]}
    if model_type == "gpt2":
        fields["n_layer"] = fields.pop("num_hidden_layers")
    plain = checkpointed(tiny_policy(model_type=model_type, **fields))
    offloaded = copy.deepcopy(plain)
    offload_checkpoints(offloaded.model, torch.device("cpu"))
    for _ in range(2):  # the second pass finds nothing of the first
        expected, found = hidden_and_gradients(plain), hidden_and_gradients(offloaded)
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("load_in_4bit", [False, True])
def test_inputs_that_were_away_give_an_adapter_the_same_gradient(load_in_4bit):
    """With chunks too: the first layer's input wants no gradient, and comes back all the same."""
    pytest.importorskip("peft")
    if load_in_4bit:
        pytest.importorskip("bitsandbytes")
    wide = {"hidden_size": 64, "intermediate_size": 192, "head_dim": 16, "num_hidden_layers": 4}
    config = ModelConfig(
        architecture={"model_type": "qwen3", **TINY, **wide}, lora={"r": 4}, mlp_chunk_size=9,
        load_in_4bit=load_in_4bit, gradient_checkpointing=True,
    )  # fmt: skip
    found = []
    for offloads in (False, True):
        policy = new_policy(config, TEXTS, seed=0)
        for parameter in policy.model.parameters():
            if parameter.requires_grad:
                parameter.data.add_(0.02)
        if offloads:
            offload_checkpoints(policy.model.get_base_model(), torch.device("cpu"))
        found.append(hidden_and_gradients(policy))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert len(found[0]) == 1 + 4 * 7 * 2


def test_two_passes_may_be_under_way():
    policy = checkpointed(tiny_policy(num_hidden_layers=4))
    expected = hidden_and_gradients(policy)
    policy.model.zero_grad()
    offload_checkpoints(policy.model, torch.device("cpu"))
    other = pack(random_ids([4]), [random_ids([3, 2], seed=9)])
    first, second = policy.hidden_states(plan_of()), policy.hidden_states(other)
    second.sum().backward()
    policy.model.zero_grad()
    rows = first[plan_of().source_index]
    weights = torch.randn(rows.shape, generator=torch.Generator().manual_seed(0))
    (rows * weights).sum().backward()
    gradients = [x.grad for x in policy.model.parameters() if x.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(expected[1:], gradients, strict=True))


def test_what_stays_on_the_device_is_a_few_inputs_whatever_the_depth():
    for num_layers in (4, 9):
        policy = checkpointed(tiny_policy(num_hidden_layers=num_layers))
        offload_checkpoints(policy.model, torch.device("cpu"))
        plan = pack_tree(random_ids([65]))
        hidden = policy.hidden_states(plan)
        kept = [x for x in gc.get_objects() if type(x) is Kept]
        assert len(kept) == num_layers
        assert sum(x.on_device is not None for x in kept) == MAX_LEAVING
        assert sum(x.on_cpu.nbytes for x in kept) == num_layers * 64 * 32 * 4
        del kept
        hidden.sum().backward()
        del hidden
        gc.collect()
        assert not [x for x in gc.get_objects() if type(x) is Kept]


def test_the_estimate_of_checkpoints_on_the_cpu():
    config = tiny_policy(num_hidden_layers=9).model.config
    layer = packed_token_bytes(config, bf16=False, is_checkpointed=False) / 9
    away, there = (
        packed_token_bytes(config, bf16=False, is_checkpointed=True, is_offloaded=x)
        for x in (True, False)
    )
    assert (away - layer, there - layer) == ((MAX_LEAVING + 1) * 4 * 32, 9 * 4 * 32)


def test_nothing_but_inputs_of_layers_leaves():
    """Inside of a layer, and around the layers, hooks are whose they were."""
    policy = checkpointed(tiny_policy())
    offload_checkpoints(policy.model, torch.device("cpu"))
    outside: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        outside.append(x)
        return x

    with saved_tensors_hooks(keep, lambda x: x):
        hidden = policy.hidden_states(plan_of())
    assert outside  # of the last norm
    hidden.sum().backward()
    with pytest.raises(InputError, match="no layers with gradient checkpointing"):
        offload_checkpoints(tiny_policy().model, torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_inputs_of_layers_leave_the_gpu():
    found, peaks = [], []
    for offloads in (False, True):
        policy = checkpointed(
            tiny_policy(num_hidden_layers=12, hidden_size=256, max_position_embeddings=8192)
        )
        policy.model.cuda()
        if offloads:
            offload_checkpoints(policy.model, policy.device)
        plan = pack(random_ids([500]), [random_ids([700] * 8, seed=1)]).to(policy.device)
        hidden_and_gradients(policy, plan)
        policy.model.zero_grad()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        found.append(hidden_and_gradients(policy, plan))
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    num_tokens = 500 + 8 * 700 - 8
    assert peaks[0] - peaks[1] > (12 - MAX_LEAVING - 3) * num_tokens * 256 * 4
