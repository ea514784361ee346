"""Loading, building and saving policies; broken directories are refused in one line."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastrl.config import ModelConfig
from fastrl.errors import InputError
from fastrl.packing import pack
from fastrl.policy import load_policy, new_policy, resolve_device, train_tokenizer
from fastrl_kernels import linear_logps
from tests.helpers import TEXTS, TINY, random_ids, tiny_policy

CONFIG = ModelConfig(architecture={"model_type": "qwen3", "vocab_size": 300, **TINY})


@pytest.fixture
def directory(tmp_path):
    tiny_policy().save(tmp_path / "model")
    return tmp_path / "model"


def test_saved_policy_loads_with_the_same_bits(directory):
    policy, loaded = tiny_policy(), load_policy(ModelConfig(), directory)
    for (name, a), (_, b) in zip(
        policy.model.named_parameters(), loaded.model.named_parameters(), strict=True
    ):
        assert torch.equal(a, b), name
    assert loaded.tokenizer.get_vocab() == policy.tokenizer.get_vocab()
    assert loaded.eos_token_ids == [policy.tokenizer.eos_token_id]


def test_hugging_face_loads_and_generates_from_a_saved_policy(directory):
    model = AutoModelForCausalLM.from_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    inputs = tokenizer("What is 3 + 4?", return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert out.shape[1] > inputs.input_ids.shape[1]


def test_hidden_states_give_the_model_s_own_logps():
    policy = tiny_policy()
    prompts, completions = random_ids([5, 3]), random_ids([4, 6], seed=1)
    plan = pack(prompts, [[c] for c in completions])
    with torch.no_grad():
        hidden = policy.hidden_states(plan)
        out = linear_logps(hidden[plan.source_index], policy.lm_head, plan.target_ids)
        for prompt, completion, logps in zip(
            prompts, completions, plan.scatter(out.logps), strict=True
        ):
            logits = policy.model(input_ids=torch.cat([prompt, completion])[None]).logits[0]
            expected = logits[len(prompt) - 1 : -1].log_softmax(-1)
            expected = expected.gather(1, completion[:, None])[:, 0]
            torch.testing.assert_close(logps, expected, rtol=0, atol=1e-5)


def test_bf16_autocast_changes_activations_and_not_weights():
    policy = tiny_policy()
    plan = pack(random_ids([5]), [random_ids([4], seed=1)])
    exact = policy.hidden_states(plan).detach()
    policy.bf16 = True
    rounded = policy.hidden_states(plan).detach()
    assert rounded.dtype == torch.float32
    assert 1e-4 < (rounded - exact).abs().max() / exact.abs().max() < 3e-2
    assert all(parameter.dtype == torch.float32 for parameter in policy.model.parameters())


def test_gradient_checkpointing_gives_the_same_gradient(directory):
    gradients = []
    for checkpointing in (False, True):
        config = ModelConfig(gradient_checkpointing=checkpointing)
        policy = load_policy(config, directory)
        plan = pack(random_ids([5, 2]), [random_ids([4, 3], seed=1), random_ids([6, 1], seed=2)])
        policy.hidden_states(plan).square().mean().backward()
        gradients.append([p.grad for p in policy.model.parameters() if p.grad is not None])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


def test_new_policy_is_a_function_of_the_seed():
    state = torch.random.get_rng_state()
    first, same, other = (new_policy(CONFIG, TEXTS, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(state, torch.random.get_rng_state())
    weights = [next(policy.model.parameters()) for policy in (first, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_tokenizer_reads_numbers_digit_by_digit_and_any_text_back():
    tokenizer = train_tokenizer(TEXTS, vocab_size=300)
    ids = tokenizer("What is 10 + 11?").input_ids
    pieces = [tokenizer.decode([i]) for i in ids]
    assert [piece for piece in pieces if piece.strip().isdigit()] == ["1", "0", "1", "1"]
    for text in ("What is 7 + 5?", " π ≠ naïve\n\ttabs  twice ", "🙂 -12"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert len({tokenizer.eos_token_id, tokenizer.pad_token_id, None}) == 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "needs model_type"),
        ({"model_type": "qwen33"}, "unknown model.architecture.model_type 'qwen33'"),
        ({"model_type": "qwen3", "hiden_size": 8}, "did you mean 'hidden_size'?"),
        (
            {"model_type": "qwen3", "vocab_size": 8},
            "vocab_size must be a whole number, at least 258",
        ),
        ({"model_type": "qwen3", "eos_token_id": 8}, "eos_token_id cannot be set"),
        ({"model_type": "qwen3", **TINY, "hidden_size": -1}, "cannot build model.architecture"),
    ],
)
def test_bad_architectures(fields, message):
    with pytest.raises(InputError, match=message) as error:
        new_policy(ModelConfig(architecture=fields), TEXTS, seed=0)
    assert "\n" not in str(error.value)


def test_bad_directories(tmp_path, directory):
    def refused(message):
        with pytest.raises(InputError, match=message) as error:
            load_policy(ModelConfig(), directory)
        assert "\n" not in str(error.value)

    with pytest.raises(InputError, match="no model directory"):
        load_policy(ModelConfig(), tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"has no config\.json"):
        load_policy(ModelConfig(), tmp_path)

    weights = load_file(directory / "model.safetensors")
    kept = {name: value for name, value in weights.items() if "layers.1.mlp" not in name}
    save_file(kept, directory / "model.safetensors", metadata={"format": "pt"})
    refused("lack 3 tensors of the model")
    (directory / "model.safetensors").write_bytes(b"not safetensors")
    refused("cannot load the model")
    (directory / "model.safetensors").unlink()
    refused("cannot load the model")

    settings = json.loads((directory / "tokenizer_config.json").read_text())
    for kind in ("pad_token", "eos_token"):
        changed = {key: value for key, value in settings.items() if key != kind}
        (directory / "tokenizer_config.json").write_text(json.dumps(changed))
        refused(f"has no {kind}")
    (directory / "tokenizer.json").write_text("{")
    refused("cannot load the tokenizer")
    (directory / "config.json").write_text("{")
    refused("cannot load the (tokenizer|model)")


def test_tokenizer_of_another_model_is_refused(directory):
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(directory)
    with pytest.raises(InputError, match="do not belong together"):
        load_policy(ModelConfig(), directory)


def test_devices():
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type in ("cpu", "cuda")
    with pytest.raises(InputError, match="must be auto, cpu, cuda or cuda:N, got 'gpu'"):
        resolve_device("gpu")
    with pytest.raises(InputError, match="GPUs; use auto"):
        resolve_device(f"cuda:{torch.cuda.device_count()}")
