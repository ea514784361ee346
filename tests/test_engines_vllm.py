"""vLLM: what can be said without it; on a machine with it and a GPU, all that it must do."""

import importlib
import importlib.metadata
from types import SimpleNamespace

import pytest
import torch

from fastrl.config import ModelConfig
from fastrl.errors import InputError
from fastrl.policy import load_policy
from fastrl.rollout import Sampling, vllm
from fastrl.rollout.completions import Ends, to_rollouts
from fastrl.types import Example, Prompts
from tests.helpers import tiny_policy
from tests.helpers_engines import generator, prompts_of, worst_gap


def says_version(monkeypatch, version):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: {"vllm": version}[name])


def test_without_it_the_extra_is_named(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(InputError, match=r"needs vLLM \(0\.32 .* 0\.34\): pip install .*\[vllm\]"):
        vllm.VLLMEngine(tiny_policy())


@pytest.mark.parametrize("version", ["0.31.9", "0.34.0", "1.0.0", "0.9.2+cu129"])
def test_versions_out_of_the_window_are_refused(monkeypatch, version):
    says_version(monkeypatch, version)
    with pytest.raises(InputError, match=r"is installed and .* for 0\.32 <= version < 0\.34"):
        vllm.import_vllm()


@pytest.mark.parametrize("version", ["0.32.0", "0.33.1+cu129", "0.32.0rc1"])
def test_versions_in_the_window_are_imported(monkeypatch, version):
    says_version(monkeypatch, version)
    module = object()
    monkeypatch.setattr(importlib, "import_module", {"vllm": module}.__getitem__)
    assert vllm.import_vllm() is module


def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setattr(vllm, "import_vllm", object)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="needs a CUDA GPU"):
        vllm.VLLMEngine(tiny_policy())


def test_a_policy_of_no_directory_and_quantised_weights_are_refused(monkeypatch):
    monkeypatch.setattr(vllm, "import_vllm", object)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    policy = tiny_policy()
    with pytest.raises(InputError, match=r"reads the model from a directory and '' is none"):
        vllm.VLLMEngine(policy)
    packed = torch.nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False)
    policy.model.model.layers[0].mlp.gate_proj.weight = packed
    with pytest.raises(InputError, match="quantised"):
        vllm.VLLMEngine(policy, model=".")


@pytest.mark.parametrize(("rank", "room"), [(1, 1), (4, 8), (16, 16), (257, 320)])
def test_room_for_an_adapter_is_what_vllm_knows(rank, room):
    model = SimpleNamespace(peft_config={"a": SimpleNamespace(r=1), "b": SimpleNamespace(r=rank)})
    assert vllm.adapter_room(SimpleNamespace(model=model)) == room


def test_an_adapter_beyond_vllms_ranks_is_refused():
    model = SimpleNamespace(peft_config={"a": SimpleNamespace(r=1024)})
    with pytest.raises(InputError, match="rank 512 at most, got 1024"):
        vllm.adapter_room(SimpleNamespace(model=model))


def output_of(first_row, *completions):
    """With the fields of vllm.RequestOutput, CompletionOutput and Logprob that are read."""
    return SimpleNamespace(
        request_id=str(first_row),
        finished=True,
        outputs=[
            SimpleNamespace(
                index=index,
                token_ids=tuple(ids),
                logprobs=None if logps is None else [
                    {token: SimpleNamespace(logprob=logp), 299: SimpleNamespace(logprob=-0.01)}
                    for token, logp in zip(ids, logps, strict=True)
                ],
            )
            for index, (ids, logps) in enumerate(completions)
        ],
    )  # fmt: skip


def test_its_outputs_become_rollouts():
    policy, sampling = tiny_policy(), Sampling(2, 3)
    policy.eos_token_ids = [0, 7]
    ends = Ends(policy, sampling)
    second = output_of(2, ([9, 0], [-1.5, -2.5]), ([8, 8, 8], [-1.0, -1.25, -1.75]))
    first = output_of(0, ([7], [-0.5]), ([3, 4, 0], [-3.0, -2.0, -1.0]))
    found = dict(vllm.completions_of(second, ends) + vllm.completions_of(first, ends))
    in_order = [found[b] for b in range(4)]
    rollouts = to_rollouts(prompts_of([4, 5]), sampling, in_order, is_processed=True)
    expected = [[7], [3, 4, 0], [9, 0], [8, 8, 8]]
    assert [ids.tolist() for ids in rollouts.completion_ids] == expected
    expected = [[-0.5], [-3.0, -2.0, -1.0], [-1.5, -2.5], [-1.0, -1.25, -1.75]]
    assert [logps.tolist() for logps in rollouts.rollout_logps] == expected
    assert rollouts.finished.tolist() == [True, True, True, False]
    assert rollouts.processed_logps is None


def test_an_output_without_logps_is_refused():
    ends = Ends(tiny_policy(), Sampling(1, 3))
    with pytest.raises(InputError, match="no log-probabilities"):
        vllm.completions_of(output_of(0, ([7], None)), ends)


@pytest.mark.gpu
@pytest.mark.parametrize("has_adapter", [False, True])
def test_on_a_gpu_it_samples_from_the_weights_of_the_moment(tmp_path, has_adapter):
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    pytest.importorskip("vllm")
    tiny_policy(head_dim=64, hidden_size=128, max_position_embeddings=256).save(tmp_path)
    policy = load_policy(ModelConfig(device="cuda"), tmp_path)
    if has_adapter:
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
        policy.model = peft.get_peft_model(policy.model, config)
    ids = tuple(torch.tensor(policy.tokenizer(text)["input_ids"]) for text in ("What is", "3 + 4?"))
    prompts, sampling = Prompts(ids, tuple(Example(prompt="x") for _ in ids)), Sampling(8, 24)
    engine = vllm.VLLMEngine(policy, dtype="float32", enforce_eager=True, max_model_len=256)
    for _ in range(2):
        seen = {}
        rollouts = engine.generate(prompts, sampling, generator(), seen.__setitem__)
        assert sorted(seen) == list(range(16))
        assert worst_gap(policy, rollouts, sampling) < 1e-3
        with torch.no_grad():
            for parameter in policy.model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
