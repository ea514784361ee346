"""Memory that an update takes beyond weights and gradients, measured.

On a CPU by the growth of a process, which has to be a fresh one for every technique. To load the
libraries eight times would take most of the time there is, so that one process loads them, starts
no thread, and forks for every technique.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import pickle
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import torch

from fastrl.bench.measuring import count_big_blocks, peak_on_cpu, peak_on_cuda
from fastrl.bench.models import draw_blueprint, load_model
from fastrl.bench.request import Request
from fastrl.bench.techniques import Technique
from fastrl.bench.updates import Updates
from fastrl.bench.workload import Layout, Workload, make_workload
from fastrl.config import Config
from fastrl.policy import Policy

COMMAND = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from fastrl.bench.peaks import main; main()"
)
LEAST_SECONDS = 1.0  # worth starting another one for
END_SECONDS = 1.0  # for the process to end after its deadline


class Job(NamedTuple):
    """What a process of its own is to measure."""

    request: Request
    techniques: tuple[Technique, ...]
    layout: Layout
    num_threads: int
    deadline: float
    """Of time.monotonic, which all processes share."""


class Peak(NamedTuple):
    """Bytes, or why there are none."""

    num_bytes: int | None
    why: str = ""


def peaks_in_own_processes(job: Job) -> list[Peak]:
    """Of every technique, on a CPU."""
    path = json.dumps([str(entry) for entry in sys.path])
    with subprocess.Popen(
        [sys.executable, "-c", COMMAND, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
    ) as process:  # fmt: skip
        try:
            left = job.deadline + END_SECONDS - time.monotonic()
            output, errors = process.communicate(pickle.dumps(job), left)
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
            errors = b"no time left"
    found = [Peak(*json.loads(line)) for line in output.decode().splitlines()]
    last = (errors.decode(errors="replace").strip().splitlines() or [""])[-1][:200]
    return found + [Peak(None, last)] * (len(job.techniques) - len(found))


def main() -> None:
    """The process of its own: a job from stdin, to stdout a line for every technique."""
    job: Job = pickle.loads(sys.stdin.buffer.read())
    draw_blueprint(job.request)  # loads what belongs to the model, and computes nothing
    num_threads = len(list(Path("/proc/self/task").iterdir()))
    if num_threads > 1:
        raise RuntimeError(f"expected one thread before a fork, got {num_threads}")
    for technique in job.techniques:
        print(json.dumps(_peak_in_fork(job, technique)), flush=True)


def _peak_in_fork(job: Job, technique: Technique) -> Peak:
    left = job.deadline - time.monotonic()
    if left < LEAST_SECONDS:
        return Peak(None, "no time left")
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_peak, args=(sender, job, technique))
    process.start()
    sender.close()
    try:
        if receiver.poll(left):
            return Peak(receiver.recv())
        return Peak(None, f"no time left after {left:.0f} s")
    except EOFError:  # it has said why on stderr, or was killed
        process.join()
        return Peak(None, f"its process ended with exit code {process.exitcode}")
    finally:
        process.kill()
        process.join()


def _send_peak(sender: Connection, job: Job, technique: Technique) -> None:
    torch.set_num_threads(job.num_threads)
    count_big_blocks()
    sender.send(_peak(job, technique))


def peak_in_this_process(updates: Updates, technique: Technique) -> int:
    """Bytes on a GPU, of a technique that has run before."""
    updates.switch(technique)
    _allocate_gradients(updates)
    peak = peak_on_cuda(updates.step(technique), updates.policy.device)
    updates.release()
    return peak


def _peak(job: Job, technique: Technique) -> int:
    """After an update of one prompt, which loads libraries and starts threads."""
    policy = load_model(job.request, job.layout.device)
    config = job.request.config
    peak = 0
    for some in (dataclasses.replace(config, prompts_per_step=1), config):
        work = workload_of(job.request, some, policy)
        updates = Updates(policy, work, job.layout, config.rollout.temperature)
        updates.switch(technique)
        _allocate_gradients(updates)
        peak = peak_on_cpu(updates.step(technique))
        updates.modes.switch_off()
    return peak


def workload_of(request: Request, config: Config, policy: Policy) -> Workload:
    """What the request asks for, with the vocabulary of its model."""
    return make_workload(
        config, vocab_size=policy.model.config.get_text_config().vocab_size,
        is_fixed_length=request.is_fixed_length, zero_spread=request.zero_spread,
    )  # fmt: skip


def _allocate_gradients(updates: Updates) -> None:
    """They are there before: what counts is what comes beside them."""
    for parameter in updates.policy.model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
