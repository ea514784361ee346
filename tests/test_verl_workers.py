"""Two of verl's workers that hold a shard each: FSDP gathers the head where ours is computed."""

from __future__ import annotations

import multiprocessing
import socket
from typing import Any

import pytest
import torch
import torch.distributed
from torch.distributed.fsdp import _init_utils
from transformers import Qwen3ForCausalLM

import tests.test_verl_engine as engine

pytest.importorskip("verl.workers.engine.fsdp.transformer_impl")  # once, before the processes

SHARDS = [("fsdp", 0), ("fsdp2", 0), ("fsdp2", 4)]
"""Strategy and rank of the adapters."""


class Patch:
    """For good, in a process of its own."""

    def setattr(self, owner: Any, name: str, value: Any) -> None:
        setattr(owner, name, value)


def look_and_update(path: str, backend: str | None, strategy: str, rank: int) -> tuple[Any, ...]:
    """Log-probabilities, entropies and the own shards of all gradients."""
    torch.manual_seed(5)  # of the adapters
    worker = engine.make_engine(path, backend, strategy, Patch(), lora_rank=rank)
    loss_mode = "vanilla" if backend is None else "fastrl_dapo"
    views = engine.look(worker, True, backend is not None)
    _, gradients = engine.update(worker, True, backend is not None, loss_mode)
    return views, gradients


def work(rank: int, address: str, path: str, queue: Any) -> None:
    try:
        torch.set_num_threads(1)
        torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
        engine.manager.set_platform(engine.CPU())
        torch.cpu.empty_cache = lambda: None  # of a device module, which verl calls
        _init_utils._check_module_states_for_sync_module_states = lambda _: None  # for gloo
        original, found = Qwen3ForCausalLM.forward, {}
        for strategy, lora in SHARDS:
            Qwen3ForCausalLM.forward = original
            theirs = look_and_update(path, None, strategy, lora)
            ours = look_and_update(path, "fastrl", strategy, lora)
            gaps = [float((a - b).abs().max()) for a, b in zip(ours[0], theirs[0], strict=True)]
            gaps += [float((ours[1][name] - theirs[1][name]).abs().max()) for name in theirs[1]]
            scale = max(float(x.abs().max()) for x in theirs[1].values())
            found[strategy, lora] = max(gaps), scale
        torch.distributed.destroy_process_group()
        queue.put(found)
    except BaseException as error:
        queue.put(repr(error))
        raise


def test_two_workers(tmp_path):
    """Beside logits and verl's own loss, with a head that is not tied."""
    engine.save_model(str(tmp_path), tied=False)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    workers = [
        context.Process(target=work, args=(rank, address, str(tmp_path), queue)) for rank in (0, 1)
    ]
    for worker in workers:
        worker.start()
    answers = [queue.get(timeout=120) for _ in workers]
    for worker in workers:
        worker.join(timeout=20)
    for answer in answers:
        assert isinstance(answer, dict), answer
        for case, (gap, scale) in answer.items():
            assert gap < 1e-5, case
            assert scale > 1e-2, case
