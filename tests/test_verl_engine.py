"""verl's own FSDP worker with our head and our policy losses, on the CPU.

Its engines know GPUs; verl lets a platform be added, and the one here is the CPU with gloo.
"""

from __future__ import annotations

import socket
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed
from packaging.version import Version
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from fastrl.errors import InputError
from fastrl.integrations.replaced_forward import restore_forward
from fastrl.integrations.verl import use_fused_head

if Version(pytest.importorskip("verl").__version__) < Version("0.9.1"):
    pytest.importorskip("flash_attn")  # by which it removed padding
cuda = pytest.importorskip("verl.plugin.platform.platform_cuda")
manager = pytest.importorskip("verl.plugin.platform.platform_manager")

B, P, R, V = 4, 6, 9, 61
PROMPTS, LENGTHS = (6, 2, 2, 4), (9, 1, 5, 7)
BACKENDS = (None, "torch", "fastrl")


class CPU(cuda.PlatformCUDA):
    """What verl's engines ask of a device, for the CPU."""

    device_name = "cpu"
    device_module = torch.cpu

    def is_available(self) -> bool:
        return True

    def current_device(self) -> Any:
        return torch.device("cpu")

    def communication_backend_name(self) -> str:
        return "gloo"

    def empty_cache(self) -> None:
        pass


@pytest.fixture(scope="module", autouse=True)
def one_worker():
    """A process group of this process alone."""
    before = manager._current_platform
    manager.set_platform(CPU())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    torch.distributed.init_process_group("gloo", init_method=address, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()
    manager._current_platform = before


def save_model(path: str, *, tied: bool) -> None:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, initializer_range=0.2,
        tie_word_embeddings=tied,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(path)


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def model_path(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("verl") / ("tied" if request.param else "separate")
    save_model(str(path), tied=request.param)
    return str(path)


def make_engine(path: str, backend: str | None, strategy: str, monkeypatch: Any, **model: Any):
    """verl's engine of an actor; backend: impl_backend, or None for logits."""
    from verl.models.transformers import monkey_patch
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

    # verl looks for a class that TRL 1.16 has no more, wherever TRL is installed.
    monkeypatch.setattr(monkey_patch, "is_trl_available", lambda: False)
    # verl's own backends replace the forward of the class.
    monkeypatch.setattr(Qwen3ForCausalLM, "forward", Qwen3ForCausalLM.forward)
    config = HFModelConfig(
        path=path, load_tokenizer=False, external_lib="fastrl.integrations.verl_plugin",
        override_config={"attn_implementation": "eager"}, use_fused_kernels=backend is not None,
        fused_kernel_options={"impl_backend": backend}, **model,
    )  # fmt: skip
    engine = FSDPEngineWithLMHead(
        config,
        FSDPEngineConfig(
            strategy=strategy, mixed_precision={"param_dtype": "fp32"}, use_torch_compile=False
        ),
        FSDPOptimizerConfig(lr=1e-3, total_training_steps=10),
        CheckpointConfig(),
    )
    engine.initialize()
    return engine


def make_batch(*, fused: bool, remove_padding: bool, temperature: float = 0.7):
    """Rollouts as verl's trainer hands them to a worker."""
    from tensordict import TensorDict
    from verl.utils import tensordict_utils as tu
    from verl.workers.utils.padding import left_right_2_no_padding

    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, V, (B, P + R), generator=generator)
    columns = torch.arange(P + R)
    prompts, lengths = torch.tensor(PROMPTS)[:, None], torch.tensor(LENGTHS)[:, None]
    mask = ((columns >= P - prompts) & (columns < P + lengths)).long()
    trained = mask[:, P:].clone()
    trained[0, 3:5] = 0  # the words of a tool
    data = TensorDict(
        {
            "input_ids": ids * mask, "prompts": ids[:, :P], "responses": ids[:, P:],
            "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
            "response_mask": trained,
            "old_log_probs": -torch.rand(B, R, generator=generator) * 8,
            "advantages": torch.tensor([0.7, -1.2, 0.0, 1.5])[:, None].expand(B, R).clone(),
        },
        batch_size=B,
    )  # fmt: skip
    data = left_right_2_no_padding(data)
    tu.assign_non_tensor(
        data, temperature=temperature, use_fused_kernels=fused, use_remove_padding=remove_padding,
        calculate_entropy=True, use_dynamic_bsz=False, micro_batch_size_per_gpu=2,
        global_batch_size=B,
    )  # fmt: skip
    return data


def look(engine: Any, remove_padding: bool, fused: bool) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies of all tokens but the last of a row, whose target is any."""
    with engine.eval_mode():
        out = engine.infer_batch(make_batch(fused=fused, remove_padding=remove_padding))
    found = out["model_output"]
    kept = torch.ones(sum(PROMPTS) + sum(LENGTHS), dtype=torch.bool)
    kept[found["log_probs"].offsets()[1:] - 1] = False
    return found["log_probs"].values()[kept], found["entropy"].values()[kept]


def update(engine: Any, remove_padding: bool, fused: bool, loss_mode: str) -> tuple[Any, Any]:
    """Metrics and gradients, or shards of them, of one batch of two micro-batches."""
    from verl.workers.config import FSDPActorConfig, PolicyLossConfig
    from verl.workers.utils.losses import ppo_loss

    config = FSDPActorConfig(
        rollout_n=2, ppo_micro_batch_size_per_gpu=2, entropy_coeff=0.01, clip_ratio_c=10.0,
        policy_loss=PolicyLossConfig(loss_mode=loss_mode),
    )  # fmt: skip
    with engine.train_mode():
        engine.optimizer_zero_grad()
        out = engine.forward_backward_batch(
            make_batch(fused=fused, remove_padding=remove_padding), partial(ppo_loss, config=config)
        )
        gradients = {
            name: getattr(parameter.grad, "to_local", lambda grad=parameter.grad: grad)().clone()
            for name, parameter in engine.module.named_parameters()
            if parameter.grad is not None and parameter.grad.numel()
        }
    return out, gradients


@pytest.mark.parametrize("remove_padding", [True, False], ids=["packed", "padded"])
def test_update_with_our_head_and_loss(model_path, monkeypatch, remove_padding):
    """Log-probabilities, entropies, loss, gradients: those of verl with logits and its own loss."""
    found = {}
    # verl's own backends read the weight of an untied head, which is a shard under FSDP2.
    backends = BACKENDS if "tied" in model_path else (None, "fastrl")
    for backend in backends:
        with monkeypatch.context() as patch:
            engine = make_engine(model_path, backend, "fsdp2", patch)
            fused = backend is not None
            loss_mode = "fastrl_dapo" if backend == "fastrl" else "vanilla"
            views = look(engine, remove_padding, fused)
            found[backend] = views, *update(engine, remove_padding, fused, loss_mode)
    views, out, gradients = found["fastrl"]
    for backend in backends[:-1]:
        expected_views, expected, expected_gradients = found[backend]
        for ours, theirs in zip(views, expected_views, strict=True):
            assert float((ours - theirs).abs().max()) < 1e-5
        for name, theirs in expected_gradients.items():
            assert float((gradients[name] - theirs).abs().max()) < 1e-5, (backend, name)
        for name, value in expected["metrics"].items():
            ours, theirs = _numbers(out["metrics"][name]), _numbers(value)
            assert float((ours - theirs).abs().max()) < 1e-5, (backend, name)
    assert float(gradients["model.embed_tokens.weight"].abs().max()) > 1e-3
    assert {"actor/pg_loss", "actor/pg_clipfrac", "actor/entropy_loss"} <= set(out["metrics"])


def _numbers(metric: Any) -> Tensor:
    """Of each micro-batch."""
    return torch.tensor([float(value) for value in getattr(metric, "values", metric)])


def test_a_shard_of_the_head_is_refused(model_path):
    """Of tensor parallelism: FSDP gathers its shards."""
    mesh = init_device_mesh("cpu", (1,))
    model = Qwen3ForCausalLM.from_pretrained(model_path)
    use_fused_head(model)
    weight = distribute_tensor(model.lm_head.weight.detach(), mesh, [Shard(0)])
    model.lm_head.weight = torch.nn.Parameter(weight)
    ids = torch.ones(1, 3, dtype=torch.int64)
    with pytest.raises(InputError, match=r"whole weight, got a shard.*use_fused_kernels=False"):
        model(input_ids=ids, temperature=1.0)
    restore_forward(model)
    with pytest.raises(InputError, match="before FSDP wraps the model"):
        use_fused_head(model)
