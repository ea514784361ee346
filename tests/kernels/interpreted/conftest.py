"""Kernels under Triton's interpreter: inputs and checks that the tests of this folder share.

The interpreter is chosen when a kernel is defined, so the folder is collected only where
TRITON_INTERPRET=1 was set before start; ../test_interpreted.py starts such a process.
S selected tokens, D hidden, V vocabulary, r rank of the adapter.
"""

import inspect
import itertools
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from fastrl_kernels.head import LMHead, weight_rows
from fastrl_kernels.linear_logps.reference import LinearLogps, linear_logps_reference
from fastrl_kernels.nf4 import NF4Weight
from fastrl_kernels.selected_logps.reference import selected_logps_reference

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TRAINABLE = ("hidden_states", "weight", "bias", "lora_a", "lora_b")
# Ragged modulo the interpreter's blocks of 16 rows, 32 columns, 16 deep, and its splits of 96.
S, D, V = 17, 19, 135


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fill what torch.empty returns with NaN, and refuse operations without a fixed order."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def rounding_to_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Round to nearest as a GPU does; the interpreter cuts the last bits off, all to one side."""
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounded(values: Any, source: Any, target: Any, mode: Any) -> Any:
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(values, source, target, mode)
        nearest = torch.from_numpy(values.view("float32")).bfloat16()
        return nearest.view(torch.uint16).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", rounded)


@pytest.fixture(autouse=True)
def bounds_of_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    """NumPy 2.4 makes no number of arrays of shape (1,), which are Triton 3.6's bounds of loops."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_also(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda number: number.handle.data.item())

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch_also)


@pytest.fixture(scope="session")
def builtins_of_the_language() -> dict[Any, list[str]]:
    """Names in each part of the language that the interpreter replaces."""
    import triton.language as tl

    parts = (tl, tl.core, tl.math, tl.tensor, tl.core.tensor_descriptor_base)
    return {
        part: [name for name, member in inspect.getmembers(part) if tl.core.is_builtin(member)]
        for part in parts
    }


@pytest.fixture(autouse=True)
def language_patched_once_a_launch(
    monkeypatch: pytest.MonkeyPatch, builtins_of_the_language: dict[Any, list[str]]
) -> None:
    """The interpreter patches the language again in every call of a device function, slowly."""
    from triton.runtime import interpreter

    patch, run = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[str] = set()

    def run_afresh(executor: Any, *args: Any, **kwargs: Any) -> None:
        patched.clear()
        run(executor, *args, **kwargs)

    def patch_once(function: Any) -> Any:
        if function.__module__ in patched:
            return None
        patched.add(function.__module__)
        return patch(function)

    def patch_known(part: Any, builder: Any, scope: Any) -> None:
        for name in builtins_of_the_language[part]:
            member = getattr(part, name)
            if interpreter.tl.core.is_builtin(member):
                interpreter._patch_attr(part, name, member, builder, scope)

    monkeypatch.setattr(interpreter, "_patch_lang", patch_once)
    monkeypatch.setattr(interpreter, "_patch_builtin", patch_known)
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", run_afresh)


class Case(NamedTuple):
    """Inputs of a head, with NaN in everything that must not be read."""

    hidden: Tensor  # (S, D), NaN on ignored rows
    head: LMHead  # NaN in the padding of the vocabulary
    target_ids: Tensor  # (S,)
    temperature: float | Tensor = 1.0


HEADS = (
    "plain", "everything", "bias", "softcap", "scale", "rank 1", "minus inf", "up", "down",
    "peaked", "nf4", "float32 adapter",
)  # fmt: skip


def make_case(
    name: str, dtype: torch.dtype, *, rows: int = S, width: int = D, columns: int = V
) -> Case:
    """Random inputs with one feature of the head, or with "everything" at once."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, width, generator=generator)
    weight = torch.randn(columns, width, generator=generator) / width**0.5
    target_ids = torch.randint(0, columns, (rows,), generator=generator)
    if name == "minus inf":  # such a target would have no gradient
        target_ids = 96 + target_ids % (columns - 101)
    target_ids[3::7] = -1
    fields = head_fields(name, columns, width, generator)
    temperature: float | Tensor = 1.0
    if name == "everything":
        weight = padded(weight)
        temperature = 0.5 + torch.rand(rows, generator=generator)
    if name == "peaked":  # one probability is near 1, and the tiles after it add next to nothing
        hidden[:, 0], weight[40], weight[40, 0] = 8, 0, 4
    field_dtype = torch.float32 if name == "float32 adapter" else dtype
    for key, value in fields.items():
        fields[key] = value.to(field_dtype) if isinstance(value, Tensor) else value
    packed = nf4_weight(weight, dtype, generator) if name == "nf4" else weight.to(dtype)
    hidden[target_ids < 0] = torch.nan
    return Case(hidden.to(dtype), LMHead(packed, **fields), target_ids, temperature)


def head_fields(name: str, columns: int, width: int, generator: torch.Generator) -> dict[str, Any]:
    """What the head of the case has besides its weight, in float32."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    bias = normal(columns)
    adapter = {"lora_a": normal(5, width) / width**0.5, "lora_b": normal(columns, 5) / 2}
    minus_inf = bias.clone()
    minus_inf[:96] = minus_inf[-5:] = -torch.inf  # a whole split, and some of the last one
    cases: dict[str, dict[str, Any]] = {
        "bias": {"bias": bias},
        "minus inf": {"bias": minus_inf},
        "up": {"bias": bias + 30},
        "down": {"bias": bias - 30},
        "softcap": {"softcap": 2.0},
        "scale": {"logit_scale": 1.7},
        "rank 1": {"lora_a": normal(1, width), "lora_b": normal(columns, 1), "lora_scale": 0.3},
        "float32 adapter": adapter,
        "everything": {
            "bias": padded(bias), "lora_a": adapter["lora_a"], "lora_b": padded(adapter["lora_b"]),
            "lora_scale": 0.5, "logit_scale": 0.7, "softcap": 3.0, "vocab_size": columns,
        },
    }  # fmt: skip
    return cases.get(name, {})


def padded(rows: Tensor) -> Tensor:
    """Seven more rows of NaN: the padding of a vocabulary, which nobody may read."""
    return torch.cat([rows, torch.full_like(rows[:1].expand(7, *rows.shape[1:]), torch.nan)])


def nf4_weight(like: Tensor, dtype: torch.dtype, generator: torch.Generator) -> NF4Weight:
    """A random 4-bit weight of the same shape."""
    size = like.numel()
    return NF4Weight(
        packed=torch.randint(256, (-(-size // 2),), generator=generator).to(torch.uint8),
        absmax=0.2 + torch.rand(-(-size // 64), generator=generator) / 2,
        codebook=torch.linspace(-1, 1, 16),
        block_size=64, num_rows=like.shape[0], hidden_size=like.shape[1], dtype=dtype,
    )  # fmt: skip


def clean(tensor: Any) -> Any:
    """Zeros instead of NaN and nearly as little as -inf, of which autograd makes NaN.

    What must not be read cannot matter, and exp(-1e4) is 0 in every dtype.
    """
    if not isinstance(tensor, Tensor):
        return tensor
    return tensor.masked_fill(tensor.isnan(), 0).clamp(min=-1e4)


def cleaned(case: Case, dtype: torch.dtype | None = None) -> Case:
    """The same numbers without NaN and with an unpacked weight, in another dtype if wanted."""
    dtype = dtype or case.hidden.dtype
    weight = weight_rows(case.head, slice(0, case.head.weight.shape[0]))
    fields = [
        clean(x).to(dtype) if isinstance(x, Tensor) else x
        for x in case.head._replace(weight=weight)
    ]
    temperature = case.temperature
    if isinstance(temperature, Tensor) and dtype == torch.float64:
        temperature = temperature.double()
    hidden = clean(case.hidden).to(dtype)
    return Case(hidden, LMHead._make(fields), case.target_ids, temperature)


def trained(case: Case, names: Sequence[str] = TRAINABLE) -> tuple[Case, list[Tensor]]:
    """The case with leaves of the given names that require grad, and these leaves."""
    parts = {"hidden_states": case.hidden, **case.head._asdict()}
    found = {
        name: parts[name].detach().requires_grad_()
        for name in TRAINABLE
        if name in names and isinstance(parts[name], Tensor)
    }
    head = case.head._replace(**{k: x for k, x in found.items() if k != "hidden_states"})
    hidden = found.get("hidden_states", case.hidden.detach())
    return case._replace(hidden=hidden, head=head), list(found.values())


def trainable(case: Case) -> list[str]:
    """Names of the tensors of the case that can have a gradient."""
    parts = {"hidden_states": case.hidden, **case.head._asdict()}
    return [name for name in TRAINABLE if isinstance(parts[name], Tensor)]


def sets_of_trained_tensors() -> list[tuple[str, ...]]:
    """None, one, all but one and all: any three of them are trained or not in each of 8 ways."""
    return [names for size in (0, 1, 4, 5) for names in itertools.combinations(TRAINABLE, size)]


def naive_logps(
    hidden: Tensor, head: LMHead, target_ids: Tensor, *, temperature: float | Tensor
) -> LinearLogps:
    """What PyTorch gives in one dtype: logits as they come out of the product, then a softmax."""
    logits = hidden @ head.weight.T  # type: ignore[union-attr]
    if head.lora_a is not None and head.lora_b is not None:
        logits = logits + head.lora_scale * ((hidden @ head.lora_a.T) @ head.lora_b.T)
    if head.bias is not None:
        logits = logits + head.bias
    logits = logits * head.logit_scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    logits = logits[:, : head.vocab_size]
    return selected_logps_reference(logits, target_ids, temperature=temperature)


def check_statistics(got: LinearLogps, truth: LinearLogps) -> None:
    """Every statistic against float64: 1e-4 at worst, 1e-5 in the median; the argmax is exact."""
    for name, value, expected in zip(LinearLogps._fields, got, truth, strict=True):
        if name == "argmax_ids":
            assert torch.equal(value, expected)
        else:
            check_values(value, expected, name)


def check_values(got: Tensor, truth: Tensor, name: str = "") -> None:
    """1e-4 at worst, 1e-5 in the median; infinities at the same places."""
    assert got.dtype == torch.float32, name
    assert got.shape == truth.shape, name
    if got.numel():
        error = torch.where(got == truth, 0, (got.double() - truth).abs())
        assert error.median() <= 1e-5, name
        assert error.max() <= 1e-4, name


def check_gradients(
    got: Sequence[Tensor | None], naive: Sequence[Tensor], truth: Sequence[Tensor]
) -> None:
    """Three times the error of PyTorch in the same dtype, in the norm and at worst.

    At worst a rounding of the largest element counts as PyTorch's error too: it can be lucky there.
    """
    for index, (grad, pytorch_grad, expected) in enumerate(zip(got, naive, truth, strict=True)):
        assert grad is not None, index
        assert grad.shape == expected.shape, index
        if not grad.numel():
            continue
        error, pytorch_error = grad.double() - expected, pytorch_grad.double() - expected
        float32_rounding = 1e-6 * expected.norm() + 1e-30
        assert error.norm() <= 3 * pytorch_error.norm() + float32_rounding, index
        rounding = torch.finfo(grad.dtype).eps / 2 * expected.abs().max()
        worst = torch.maximum(pytorch_error.abs().max(), rounding)
        assert error.abs().max() <= 3 * worst + float32_rounding, index


ENGINES: dict[str, dict[str, str]] = {
    "gather": {"engine": "one_pass", "products": "gather"},
    "cublas": {"engine": "one_pass", "products": "cublas"},
    "min_memory": {"engine": "min_memory"},
}
OPTIONS = ("old_logps", "ref_logps", "rollout_weights")


def with_tokens(case: Case) -> tuple[Case, dict[str, Tensor]]:
    """Per-token constants, some advantages 0; rows of weight 0 and ignored ones hold NaN."""
    wide = cleaned(case, torch.float64)
    out = linear_logps_reference(*wide[:3], temperature=wide.temperature)
    generator, num_tokens = torch.Generator().manual_seed(5), case.target_ids.shape[0]
    logps = out.logps.float()
    noise = torch.randn(3, num_tokens, generator=generator)
    tokens = {
        "advantages": noise[0],
        "token_weights": (0.2 + torch.rand(num_tokens, generator=generator)) / max(1, num_tokens),
        "old_logps": logps + 0.3 * noise[1],
        "ref_logps": logps + 0.5 * noise[2],
        "rollout_weights": 0.5 + torch.rand(num_tokens, generator=generator),
    }
    tokens["advantages"][1::6] = 0
    tokens["token_weights"][5::8] = 0
    uncounted = (tokens["token_weights"] == 0) | (case.target_ids < 0)
    for name, values in tokens.items():
        if name != "token_weights":
            values[uncounted] = torch.nan
    hidden = case.hidden.masked_fill(uncounted[:, None], torch.nan)
    return case._replace(hidden=hidden), tokens
