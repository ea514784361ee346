"""The cases of gpu_suite.py and cpu_suite.py in the order of their value, and who takes part.

S selected tokens, D hidden, V vocabulary; of a group's attention P prompt tokens, R completion
tokens, G completions; of decoding P prompts of L tokens and G rows of S tokens for each; of a
selection B sequences of C tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import attention_cases
import bench_optimizer
import cases
import decode_cases
import logits_cases
import loss_cases
import selection_cases
import torch
import update_cases
from attention_cases import AttentionCase, Group
from bench_plans import plan_cases
from cases import Case, Loaders, Prepared
from compare import kernel_case
from decode_cases import Batch, DecodeCase
from implementations import LOGPS, MIN_MEMORY, POLICY, fastrl_variants, load, logps_loaders
from implementations import policy_loaders as all_policy_loaders
from inputs import SPREAD, Shape
from loss_cases import LossCase
from rows import Row, print_table
from selection_cases import SelectionCase, Tokens
from suite import SuiteCase
from update_cases import UpdateCase

STABLE = (POLICY, LOGPS, "naive", "trl")  # the rest of the peers run in a process of their own
TIMING_SECONDS = {"cpu": 8.0, "cuda": 12.0}  # of a case; imports, checks and compilation on top


def gpu_cases(tiny: bool) -> list[SuiteCase]:
    """16384 tokens of a 152k vocabulary in bf16, hidden sizes of Qwen3's 0.6B, 1.7B and 8B.

    tiny: the same at small sizes on the CPU.
    """
    num_tokens, vocab_size = (64, 1024) if tiny else (16384, 151936)
    sizes = (32, 64, 128) if tiny else (1024, 2048, 4096)
    device = "cpu" if tiny else "cuda"
    small, medium, large = (
        Shape(num_tokens, vocab_size, size, torch.bfloat16, device) for size in sizes
    )
    ragged = Shape(num_tokens, vocab_size, sizes[1], torch.bfloat16, device, spread=SPREAD)
    logits = Shape(num_tokens // 2, vocab_size, 0, torch.bfloat16, device)
    selections = ((1, 4096), (16, 257)) if tiny else ((1, 2**20), (1024, 1024))
    all_tokens, sequences = (Tokens(*size, device) for size in selections)
    heads = (4, 2, 16) if tiny else (16, 8, 128)
    groups = [(24, 8, 2)] * 3 if tiny else [(512, 512, 8), (2048, 512, 16), (8192, 1024, 8)]
    short, long, longest = (Group(*group, *heads, torch.bfloat16, device) for group in groups)
    uneven = Group(*groups[1], *heads, torch.bfloat16, device, SPREAD)
    batches = [(2, 3, 24, 8)] * 2 if tiny else [(8, 8, 512, 512), (8, 16, 2048, 512)]
    few, many = (Batch(*batch, *heads, torch.bfloat16, device) for batch in batches)
    losses = loss_cases.Tokens(1024 if tiny else 2**20, device)
    update = update_cases.TINY if tiny else update_cases.ON_GPU
    return [
        of("engines", Case("policy_loss", medium), 90),
        of("update", UpdateCase(update), 90),
        of("attention", AttentionCase("attention", uneven), 60),
        of("engines", Case("policy_loss", large), 90),
        of("attention", AttentionCase("attention", long), 60),
        of("decode", DecodeCase(many), 45),
        of("all", Case("forward", medium), 60),
        of("engines", Case("policy_loss", medium, 0.2), 60),
        of("peers", Case("policy_loss", ragged), 90),
        optimizer_case(device, 45, tiny=tiny),
        of("selection", SelectionCase(all_tokens), 30),
        of("logits", Case("selected_logps", logits), 45),
        of("losses", LossCase("peers", losses), 45),
        of("engines", Case("policy_loss", small), 90),
        of("attention", AttentionCase("attention", longest), 60),
        of("attention", AttentionCase("attention_forward", long), 45),
        of("logits", Case("selected_forward", logits), 45),
        of("all", Case("linear_logps", medium), 60),
        of("peers", Case("policy_loss", medium), 90),
        of("decode", DecodeCase(few), 45),
        of("engines", Case("policy_loss", medium, 0.5), 60),
        of("attention", AttentionCase("attention", short), 45),
        of("all", Case("forward", large), 60),
        of("losses", LossCase("objectives", losses), 45),
        *plan_cases(32 if tiny else 1, device, limit=30)[:1],
        optimizer_memory_case(device, 90),  # four processes, each with its imports
        of("peers", Case("policy_loss", large), 90),
        of("engines", Case("policy_loss", large, 0.2), 60),
        of("all", Case("forward", small), 60),
        of("selection", SelectionCase(sequences), 30),
        of("all", Case("linear_logps", large), 60),
        of("peers", Case("policy_loss", small), 90),
    ]


def cpu_cases(tiny: bool) -> list[SuiteCase]:
    """Sizes of a small model in float32."""
    num_tokens, vocab_size, size = (64, 1024, 32) if tiny else (512, 16384, 256)
    shape = Shape(num_tokens, vocab_size, size, torch.float32, "cpu")
    ragged = Shape(num_tokens, vocab_size, size, torch.float32, "cpu", spread=SPREAD)
    logits = Shape(num_tokens, vocab_size, 0, torch.float32, "cpu")
    heads = (4, 2, 16) if tiny else (8, 4, 64)
    groups = [(24, 8, 2)] * 2 if tiny else [(512, 64, 8), (256, 128, 8)]
    group, other = (Group(*sizes, *heads, torch.float32, "cpu") for sizes in groups)
    uneven = Group(*groups[0], *heads, torch.float32, "cpu", SPREAD)
    batch = Batch(*((2, 3, 24, 8) if tiny else (4, 8, 512, 64)), *heads, torch.float32, "cpu")
    tokens = Tokens(*((16, 257) if tiny else (256, 1024)), "cpu")
    losses = loss_cases.Tokens(1024 if tiny else 65536, "cpu")
    update = update_cases.TINY if tiny else update_cases.ON_CPU
    return [
        of("stable", Case("policy_loss", shape), 150),
        of("attention", AttentionCase("attention", uneven), 120),
        of("update", UpdateCase(update), 150),
        of("stable", Case("policy_loss", shape, 0.2), 120),
        of("logits", Case("selected_logps", logits), 90),
        of("peers", Case("policy_loss", ragged), 180),
        of("losses", LossCase("peers", losses), 60),
        of("selection", SelectionCase(tokens), 45),
        of("decode", DecodeCase(batch), 60),
        *plan_cases(32 if tiny else 4, "cpu", limit=45),
        optimizer_case("cpu", 60, tiny=tiny),
        of("all", Case("forward", shape), 90),
        of("attention", AttentionCase("attention", group), 90),
        of("losses", LossCase("objectives", losses), 60),
        of("attention", AttentionCase("attention_forward", other), 60),
        of("all", Case("linear_logps", shape), 120),
        of("stable", Case("policy_loss", shape, 0.5), 90),
    ]


def of(group: str, case: Any, limit: float) -> SuiteCase:
    """A case for one group of implementations."""
    seconds = TIMING_SECONDS[case.shape.device]
    with_memory = not (isinstance(case, LossCase) and case.group == "objectives")
    return kernel_case(
        case, GROUPS[group], seconds=seconds, limit=limit, group=group, with_memory=with_memory
    )


def optimizer_case(device: str, limit: float, *, tiny: bool) -> SuiteCase:
    """AdamW by ways to keep weights and moments."""
    width = 64 if tiny else 512 if device == "cpu" else 4096
    name = f"AdamW of {bench_optimizer.NUM_MATRICES} matrices of {width} x {width}"
    seconds = TIMING_SECONDS[device]
    measure = functools.partial(optimizer_rows, name, width, device, seconds)
    return SuiteCase(name, measure, limit, device)


def optimizer_rows(name: str, width: int, device: str, seconds: float) -> list[Row]:
    """Printed."""
    rows = bench_optimizer.time_rows(name, width, device, seconds)
    print_table(rows)
    return rows


def optimizer_memory_case(device: str, limit: float) -> SuiteCase:
    """What is held and needed with moments on the CPU, and with steps in backward."""
    name = "bytes of a step of AdamW, 16.8M parameters"
    return SuiteCase(name, functools.partial(optimizer_memory, name, device), limit, device)


def optimizer_memory(name: str, device: str) -> list[Row]:
    """Printed."""
    rows = [
        bench_optimizer.memory_row(name, "split", kind, in_backward, device)
        for kind in ("adamw", "adamw_offload")
        for in_backward in ("off", "two_phase")
    ]
    print_table(rows)
    return rows


def prepare_engines(case: Case, only: str | None = None) -> Prepared:
    """Ours with every engine, beside naive and TRL."""
    return cases.prepare(case, only, _stable() | fastrl_variants())


def prepare_stable(case: Case, only: str | None = None) -> Prepared:
    """Ours by its two ways, beside naive and TRL."""
    return cases.prepare(case, only, _stable() | {MIN_MEMORY: all_policy_loaders()[MIN_MEMORY]})


def prepare_peers(case: Case, only: str | None = None) -> Prepared:
    """All the other peers beside our default."""
    elsewhere = {*STABLE, MIN_MEMORY} - {POLICY}
    chosen = {name: load for name, load in all_policy_loaders().items() if name not in elsewhere}
    return cases.prepare(case, only, chosen)


def _stable() -> Loaders:
    loaders = all_policy_loaders()
    return {name: loaders[name] for name in STABLE}


def absent_peers(device: str) -> list[str]:
    """One line for each implementation that cannot run here."""
    group = Group(24, 8, 2, 4, 2, 16, torch.float32, device)
    loaders = all_policy_loaders() | logps_loaders() | logits_cases.forward_loaders()
    loaders |= attention_cases.attention_loaders(group) | decode_cases.decode_loaders()
    return load(loaders | update_cases.update_loaders(), device).absent


GROUPS: dict[str, Callable[..., Prepared]] = {
    "engines": prepare_engines,
    "stable": prepare_stable,
    "peers": prepare_peers,
    "all": cases.prepare,
    "logits": logits_cases.prepare,
    "attention": attention_cases.prepare,
    "decode": decode_cases.prepare,
    "selection": selection_cases.prepare,
    "losses": loss_cases.prepare,
    "update": update_cases.prepare,
}
