"""What is installed, what GPU there is, and which kernels will run."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from fastrl_kernels.implementation import choose_implementation

EXTRAS = (
    "peft", "bitsandbytes", "torchao", "flash-attn", "liger-kernel", "vllm", "ray", "trl", "wandb",
)  # fmt: skip
REQUIRED = ("torch", "triton", "transformers", "reasoning-gym", "math-verify")
HAS_KERNEL = {
    "policy_loss": True,
    "linear_logps": True,
    "selected_logps": True,
    "token_loss": True,
    "segment_attention": False,
}


def examine() -> list[tuple[str, str]]:
    """(what, state) lines, most important first."""
    rows = [("fastrl-llm", _version("fastrl-llm")), ("python", platform.python_version())]
    rows += [(name, _version(name)) for name in REQUIRED]
    rows.append(("GPU", _gpu()))
    rows += [(f"kernel {name}", _implementations(has)) for name, has in HAS_KERNEL.items()]
    rows += [(f"extra {name}", _version(name)) for name in EXTRAS]
    return rows


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _implementations(has_kernel: bool) -> str:
    """What "auto" runs, and why not Triton where it does not."""
    tensor = torch.empty(0, device="cuda" if torch.cuda.is_available() else "cpu")
    chosen = choose_implementation("auto", tensor, has_kernel=has_kernel)
    try:
        choose_implementation("triton", tensor, has_kernel=has_kernel)
    except ValueError as error:
        return f"{chosen}; {error}"
    return f"{chosen}; triton available"


def _gpu() -> str:
    if not torch.cuda.is_available():
        built = torch.version.cuda
        return "none" if built is None else f"none (torch is built for CUDA {built})"
    properties = torch.cuda.get_device_properties(0)
    memory = properties.total_memory / 2**30
    return f"{properties.name}, {memory:.0f} GiB, sm_{properties.major}{properties.minor}"
