"""The cases of gpu_suite.py in the order of their value, and who takes part in which.

S selected tokens, D hidden, V vocabulary; of a group's attention P prompt tokens, R completion
tokens, G completions; of decoding P prompts of L tokens and G rows of S tokens for each; of a
selection B sequences of C tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import attention_cases
import cases
import decode_cases
import logits_cases
import selection_cases
import torch
from attention_cases import AttentionCase, Group
from cases import Case, Prepared
from decode_cases import Batch, DecodeCase
from implementations import LOGPS, MIN_MEMORY, POLICY, fastrl_variants, policy_loaders
from inputs import Shape
from selection_cases import SelectionCase, Tokens

STABLE = (POLICY, LOGPS, "naive", "trl")  # the rest of the peers run in a process of their own


@dataclass(frozen=True)
class SuiteCase:
    """A case, the group of implementations in it, and after how long its process is killed."""

    case: Case | AttentionCase | DecodeCase | SelectionCase
    group: str
    limit_seconds: float

    def __str__(self) -> str:
        """Name in the results; the same case can come once for each group."""
        return f"{self.case} [{self.group}]"


def suite_cases(tiny: bool) -> list[SuiteCase]:
    """16384 tokens of a 152k vocabulary in bf16, hidden sizes of Qwen3's 0.6B, 1.7B and 8B."""
    num_tokens, vocab_size = (64, 1024) if tiny else (16384, 151936)
    sizes = (32, 64, 128) if tiny else (1024, 2048, 4096)
    device = "cpu" if tiny else "cuda"
    small, medium, large = (
        Shape(num_tokens, vocab_size, size, torch.bfloat16, device) for size in sizes
    )
    logits = Shape(num_tokens // 2, vocab_size, 0, torch.bfloat16, device)
    selections = ((1, 4096), (16, 257)) if tiny else ((1, 2**20), (1024, 1024))
    all_tokens, sequences = (Tokens(*size, device) for size in selections)
    heads = (4, 2, 16) if tiny else (16, 8, 128)
    groups = [(24, 8, 2)] * 3 if tiny else [(512, 512, 8), (2048, 512, 16), (8192, 1024, 8)]
    short, long, longest = (Group(*group, *heads, torch.bfloat16, device) for group in groups)
    batches = [(2, 3, 24, 8)] * 2 if tiny else [(8, 8, 512, 512), (8, 16, 2048, 512)]
    few, many = (Batch(*batch, *heads, torch.bfloat16, device) for batch in batches)
    return [
        SuiteCase(Case("policy_loss", medium), "engines", 90),
        SuiteCase(Case("policy_loss", large), "engines", 90),
        SuiteCase(AttentionCase("attention", long), "attention", 60),
        SuiteCase(Case("policy_loss", small), "engines", 90),
        SuiteCase(DecodeCase(many), "decode", 45),
        SuiteCase(DecodeCase(few), "decode", 45),
        SuiteCase(Case("forward", medium), "all", 60),
        SuiteCase(Case("policy_loss", medium, 0.2), "engines", 60),
        SuiteCase(Case("policy_loss", medium), "peers", 90),
        SuiteCase(AttentionCase("attention", longest), "attention", 60),
        SuiteCase(AttentionCase("attention", short), "attention", 45),
        SuiteCase(AttentionCase("attention_forward", long), "attention", 45),
        SuiteCase(SelectionCase(all_tokens), "selection", 30),
        SuiteCase(Case("selected_logps", logits), "logits", 45),
        SuiteCase(Case("selected_forward", logits), "logits", 45),
        SuiteCase(Case("linear_logps", medium), "all", 60),
        SuiteCase(Case("forward", large), "all", 60),
        SuiteCase(Case("policy_loss", large), "peers", 90),
        SuiteCase(Case("policy_loss", large, 0.2), "engines", 60),
        SuiteCase(Case("forward", small), "all", 60),
        SuiteCase(SelectionCase(sequences), "selection", 30),
        SuiteCase(Case("linear_logps", large), "all", 60),
        SuiteCase(Case("policy_loss", small), "peers", 90),
    ]


def prepare_engines(case: Case, only: str | None = None) -> Prepared:
    """Ours with every engine, beside naive and TRL."""
    return cases.prepare(case, only, _stable() | fastrl_variants())


def prepare_peers(case: Case, only: str | None = None) -> Prepared:
    """All the other peers beside our default."""
    elsewhere = {*STABLE, MIN_MEMORY} - {POLICY}
    chosen = {name: loader for name, loader in policy_loaders().items() if name not in elsewhere}
    return cases.prepare(case, only, chosen)


def _stable() -> cases.Loaders:
    loaders = policy_loaders()
    return {name: loaders[name] for name in STABLE}


GROUPS: dict[str, Callable[..., Prepared]] = {
    "engines": prepare_engines,
    "peers": prepare_peers,
    "all": cases.prepare,
    "logits": logits_cases.prepare,
    "attention": attention_cases.prepare,
    "decode": decode_cases.prepare,
    "selection": selection_cases.prepare,
}
