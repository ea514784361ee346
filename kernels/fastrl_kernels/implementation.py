"""Which code computes a public function: one meaning of `implementation=` for all of them."""

import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def interprets_triton() -> bool:
    """Whether Triton kernels run on CPU tensors, by Triton's own switch for that."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def choose_implementation(implementation: str, tensor: Tensor) -> str:
    """Name of the implementation to run; "auto" picks, and a choice that cannot be met raises.

    Triton kernels run on a GPU, and under its interpreter on a CPU; in float64 there are none.
    """
    if implementation not in ("auto", "torch", "triton"):
        raise ValueError(
            f'implementation must be "auto", "torch" or "triton", got {implementation!r}; '
            'use "auto"'
        )
    if implementation == "torch":
        return "torch"
    obstacle = None
    if importlib.util.find_spec("triton") is None:
        obstacle = "triton is not installed"
    elif tensor.dtype == torch.float64:
        obstacle = "there are no kernels for float64"
    elif not (tensor.is_cuda or interprets_triton()):
        obstacle = f"the tensors are on {tensor.device} and the interpreter is off"
    if obstacle is None:
        return "triton" if tensor.is_cuda or implementation == "triton" else "torch"
    if implementation == "triton":
        raise ValueError(f'implementation="triton" is impossible: {obstacle}; use "torch"')
    return "torch"


def capability_of(device: torch.device) -> tuple[int, int]:
    """Compute capability of a GPU that is there."""
    # torch.compile knows the properties as constants, get_device_capability it does not.
    properties = torch.cuda.get_device_properties(device)
    return properties.major, properties.minor


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Launches inside go to the tensor's device, whichever is current outside."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def check_finite(result: Tensor, **inputs: object) -> None:
    """Raise ValueError naming the inputs that are not finite, if the result is not."""
    if bool(result.isfinite().all()):
        return
    broken = [
        name
        for name, value in inputs.items()
        if isinstance(value, Tensor) and value.is_floating_point() and not value.isfinite().all()
    ]
    cause = f"{' and '.join(broken)} are not finite" if broken else "every input is finite"
    raise ValueError(
        f"expected finite results, got {float(result.flatten().sum())}: {cause}; "
        "look for a division by zero or an overflow before this call"
    )
