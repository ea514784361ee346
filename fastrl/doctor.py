"""What is installed, what GPU there is, which kernels will run, and what attention will."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from fastrl_kernels.implementation import choose_implementation
from fastrl_kernels.segment_attention.choice import (
    IMPLEMENTATIONS,
    Choice,
    Facts,
    Machine,
    choose_attention,
    machine_of,
    obstacle_to,
)

EXTRAS = (
    "peft", "bitsandbytes", "torchao", "flash-attn", "liger-kernel", "vllm", "ray", "trl", "wandb",
)  # fmt: skip
REQUIRED = ("torch", "triton", "transformers", "reasoning-gym", "math-verify")
KERNELS = ("policy_loss", "linear_logps", "selected_logps", "token_loss", "select_tokens")

# A prompt of 512 tokens with 16 completions of 512, as attention of a usual model sees them.
GROUP: dict[str, Any] = {
    "num_tokens": 17 * 512,
    "num_heads": 16,
    "num_kv_heads": 8,
}
ATTENTIONS: dict[str, tuple[torch.dtype, int, dict[str, Any]]] = {
    "bf16/64": (torch.bfloat16, 64, {}),
    "bf16/128": (torch.bfloat16, 128, {}),
    "bf16/256": (torch.bfloat16, 256, {}),
    "bf16/512": (torch.bfloat16, 512, {}),
    "fp32/128": (torch.float32, 128, {}),
    "bf16/128 with a window": (torch.bfloat16, 128, {"window": 1024}),
    "bf16/256 with softcap": (torch.bfloat16, 256, {"has_softcap": True}),
    "bf16/64 with sinks": (torch.bfloat16, 64, {"has_sinks": True}),
}


def examine() -> list[tuple[str, str]]:
    """(what, state) lines, most important first."""
    rows = [("fastrl-llm", _version("fastrl-llm")), ("python", platform.python_version())]
    rows += [(name, _version(name)) for name in REQUIRED]
    rows.append(("GPU", _gpu()))
    rows += [(f"kernel {name}", _implementations()) for name in KERNELS]
    machine = machine_of(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    rows += attention_rows(machine)
    rows += [(f"extra {name}", _version(name)) for name in EXTRAS]
    return rows


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _implementations() -> str:
    """What "auto" runs, and why not Triton where it does not."""
    tensor = torch.empty(0, device="cuda" if torch.cuda.is_available() else "cpu")
    chosen = choose_implementation("auto", tensor)
    try:
        choose_implementation("triton", tensor)
    except ValueError as error:
        return f"{chosen}; {error}"
    return f"{chosen}; triton available"


def attention_rows(machine: Machine) -> list[tuple[str, str]]:
    """What "auto" takes for a prompt with completions, a row for each choice; then the others."""
    cases: dict[Choice, list[str]] = {}
    for case, (dtype, head_size, options) in ATTENTIONS.items():
        facts = Facts(machine, dtype, **GROUP, head_size=head_size, value_size=head_size, **options)
        cases.setdefault(choose_attention(facts), []).append(case)
    rows = [
        (f"attention {choice.name}", f"for {_listed(names)}: {choice.reason}")
        for choice, names in cases.items()
    ]
    facts = Facts(machine, torch.bfloat16, **GROUP, head_size=128, value_size=128)
    for name in IMPLEMENTATIONS:
        if name not in {choice.name for choice in cases}:
            obstacle = obstacle_to(name, facts)
            state = "not available: " if obstacle else "on request"
            rows.append((f"attention {name}", state + (obstacle or _remark(name, machine))))
    return rows


def _listed(cases: list[str]) -> str:
    return "all heads and options" if len(cases) == len(ATTENTIONS) else ", ".join(cases)


def _remark(name: str, machine: Machine) -> str:
    if machine.device != "cuda":
        remarks = {"flex": ", without gradients", "varlen": ", in plain PyTorch, for tests"}
        return remarks.get(name, "")
    if name != "varlen":
        return ""
    return ", by flash-attn" if machine.has_flash_attn else ", by PyTorch's flash attention"


def _gpu() -> str:
    if not torch.cuda.is_available():
        built = torch.version.cuda
        return "none" if built is None else f"none (torch is built for CUDA {built})"
    properties = torch.cuda.get_device_properties(0)
    memory = properties.total_memory / 2**30
    return f"{properties.name}, {memory:.0f} GiB, sm_{properties.major}{properties.minor}"
