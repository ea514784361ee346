"""Triton kernels without a GPU: their numbers under the interpreter, and what a launch depends on.

The interpreter is chosen when a kernel is defined, so the files of interpreted/ have processes of
their own.
"""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastrl_kernels import LMHead, implementation, policy_loss, select_tokens
from fastrl_kernels.objectives import Objective, Regulariser, clipped_ratio, k3

pytest.importorskip("triton")
HERE = Path(__file__).parent
FILES = sorted((HERE / "interpreted").glob("test_*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_kernels_under_the_interpreter(path: Path) -> None:
    result = subprocess.run(
        [
            sys.executable, "-m", "pytest", path, "-q", "-p", "no:cacheprovider",
            "-p", "no:randomly",
        ],
        cwd=HERE.parent.parent, env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    counts = {word: int(count) for count, word in re.findall(r"(\d+) ([a-z]+)", summary(result))}
    assert counts.pop("passed") >= path.read_text(encoding="utf-8").count("\ndef test_") > 0
    assert not counts.keys() & {"skipped", "deselected", "xfailed", "xpassed"}, result.stdout


def summary(result: subprocess.CompletedProcess[str]) -> str:
    """The last line that pytest prints."""
    return result.stdout.strip().splitlines()[-1]


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What Triton would build on a GPU for the launches made since; the kernels do not run."""
    jit = pytest.importorskip("triton.runtime.jit")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend

    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("every kernel is interpreted in this process")
    backend = make_backend(GPUTarget("cuda", 90, 32))
    found: list[str] = []

    def record(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        binder = jit.create_function_from_signature(kernel.signature, kernel.params, backend)
        _, specialization, options = binder(*args, **kwargs)
        found.append(f"{kernel.__name__} {specialization} {options}")
        for tensor in (*args, *kwargs.values()):  # indices, which PyTorch goes on to use
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.int32:
                tensor.zero_()

    monkeypatch.setattr(implementation, "interprets_triton", lambda: True)
    monkeypatch.setattr(jit.JITFunction, "run", record)
    return found


@pytest.fixture
def launches(built: list[str]) -> Callable[..., set[str]]:
    """What Triton would build for a call of policy_loss."""

    def run(num_tokens: int, engine: str, **settings: Any) -> set[str]:
        built.clear()
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(num_tokens, 19, generator=generator, requires_grad=True)
        weight = torch.randn(203, 19, generator=generator, requires_grad=True)
        head = LMHead(weight, logit_scale=settings.pop("logit_scale", 1.0), softcap=5.0)
        per_token = torch.ones(num_tokens)
        policy_loss(
            hidden, head, torch.zeros(num_tokens).long(), per_token, per_token,
            old_logps=per_token, ref_logps=per_token, engine=engine, **settings,
            implementation="triton",
        ).loss.backward()  # fmt: skip
        return set(built)

    return run


@pytest.mark.parametrize(
    "engine",
    [{"engine": "one_pass", "products": "gather"}, {"engine": "one_pass", "products": "cublas"},
     {"engine": "min_memory"}],
    ids=["gather", "cublas", "min_memory"],
)  # fmt: skip
def test_no_number_builds_another_kernel(
    launches: Callable[..., set[str]], engine: dict[str, str]
) -> None:
    def objective(epsilon: float, beta: float) -> Objective:
        return Objective(clipped_ratio, (epsilon, epsilon), (Regulariser(k3, beta),))

    built = launches(37, **engine, objective=objective(0.2, 0.1), entropy_coef=0.5, temperature=2.0)
    others = launches(
        39, **engine, objective=objective(1.0, 1.0), entropy_coef=1.0, temperature=1.0,
        logit_scale=0.5,
    )  # fmt: skip
    assert len(built) >= 2
    assert others == built


@pytest.mark.parametrize(
    "amounts", [[{"ratio": 0.5}, {"ratio": 1.0}], [{"budget": 1}, {"budget": 16}]]
)
def test_no_number_builds_another_selection(
    built: list[str], amounts: list[dict[str, float]]
) -> None:
    for num_tokens in (1, 16, 70_001):
        scores, lengths = torch.rand(num_tokens), torch.tensor([num_tokens, 0, 0])
        for amount in amounts:
            select_tokens(scores, **amount, implementation="triton")
            select_tokens(
                scores, **amount, per="sequence", lengths=lengths, implementation="triton"
            )
    assert len(built) == 3 * 2 * 2 * 5
    assert len(set(built)) == 2  # one counts, one keeps
