"""Calls with GPU tensors where there is no GPU: all that happens before a kernel starts, any size.

Tensors are fake, of a GPU that is not the current one. Operators run their own code with them. A
launch is recorded, and checked as a GPU would: its grid, its device, what its pointers point to;
every new specialisation goes through the front end of the compiler. Nothing may wait for the
device or copy from one to another. Where PyTorch has no CUDA, autograd has none either, so
`Run.backward` calls what operators have registered.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime import jit

from fastrl_kernels.linear_logps.op import head_gradients_op, linear_logps_op
from fastrl_kernels.policy_loss.op import policy_loss_op
from fastrl_kernels.selected_logps.op import (
    selected_logps_backward_op,
    selected_logps_inplace_backward_op,
    selected_logps_op,
)
from fastrl_kernels.token_loss.op import token_loss_op
from fastrl_kernels.token_selection.op import select_tokens_op

MARKS = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs the kernels themselves"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is built"),
]
DEVICE = torch.device("cuda", 1)
TARGET = GPUTarget("cuda", 90, 32)
OPERATORS = (
    policy_loss_op, linear_logps_op, head_gradients_op, selected_logps_op,
    selected_logps_backward_op, selected_logps_inplace_backward_op, token_loss_op,
    select_tokens_op,
)  # fmt: skip
HALF = (torch.bfloat16, torch.float16)


class Launch(NamedTuple):
    """One launch, as a GPU would have seen it."""

    kernel: str
    grid: tuple[int, int, int]
    build: str
    """What Triton builds the kernel for."""


@dataclass(frozen=True)
class Pointer:
    """What Triton looks at of a tensor; memory begins at multiples of 512 bytes."""

    dtype: torch.dtype
    offset: int

    def data_ptr(self) -> int:
        return 2**40 + self.offset * self.dtype.itemsize


class Run:
    """What happened in a dry run."""

    def __init__(self, compiler: Callable[[ASTSource, Any], None] | None) -> None:
        self.launches: list[Launch] = []
        self.devices: list[torch.device] = []  # entered and not left
        self.compiler = compiler
        self.peak_bytes = 0  # of what operators allocate
        self.rounded: list[tuple[int, ...]] = []  # shapes of what they took from float32 to half
        self.calls: list[tuple[Any, tuple[Any, ...], Any]] = []  # of operators
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def builds(self, kernel: str) -> set[str]:
        """What a kernel is built for."""
        return {launch.build for launch in self.launches if launch.kernel == kernel}

    def counts(self) -> dict[str, int]:
        """Launches of each kernel."""
        names = [launch.kernel for launch in self.launches]
        return {name: names.count(name) for name in names}

    def record(self, kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        """In place of JITFunction.run."""
        assert not warmup
        sizes = (*grid, 1, 1)[:3]
        assert 0 < sizes[0] < 2**31, f"{kernel.__name__}: grid {grid}"
        assert all(0 < size < 2**16 for size in sizes[1:]), f"{kernel.__name__}: grid {grid}"
        # Triton starts nothing, and says nothing, where the product does not fit 32 bits.
        assert math.prod(sizes) < 2**31, f"{kernel.__name__}: grid {grid}"
        tensors = _tensors((args, tuple(kwargs.values())))
        assert self.devices == [DEVICE], f"{kernel.__name__} starts on the current device"
        numbers = {x for x in (*args, *kwargs.values()) if type(x) is int}
        for tensor in tensors:
            assert tensor.device == DEVICE, f"{kernel.__name__} gets a tensor on {tensor.device}"
            _check_strides(kernel.__name__, tensor, numbers)
        pointers = [_pointers(x) for x in args], {key: _pointers(x) for key, x in kwargs.items()}
        backend = make_backend(TARGET)
        binder = jit.create_function_from_signature(kernel.signature, kernel.params, backend)
        kwargs = {**pointers[1], "debug": False, "instrumentation_mode": ""}
        bound, specialization, settings = binder(*pointers[0], **kwargs)
        jit.compute_cache_key({}, specialization, settings)  # which wants to hash all of it
        build = f"{kernel.__name__} {specialization}"
        self.launches.append(Launch(kernel.__name__, sizes, build))
        if self.compiler is not None and build not in _COMPILED:
            _COMPILED.add(build)
            options, signature, constants, attributes = kernel._pack_args(
                backend, kwargs, bound, specialization, {}
            )
            self.compiler(ASTSource(kernel, signature, constants, attributes), options)

    def backward(self) -> None:
        """The gradients of all that was called, as if every result had one."""
        calls, self.calls = self.calls, []
        for operator, args, out in reversed(calls):
            if operator._backward_fn is None:
                continue
            context = _Context(tuple(_requires_grad(x) for x in args))
            operator._setup_context_fn(ctx=context, inputs=args, output=out)
            gradients = [
                None if id(x) in context.without_gradient else torch.empty_like(x) for x in out
            ]
            results = operator._backward_fn(context, *gradients)
            assert len(results) == len(args), operator
            for value, given in zip(results, args, strict=True):
                if isinstance(value, Tensor):
                    pair = _described(value)[:3], _described(given)[:3]
                    assert pair[0] == pair[1], f"{operator}: a gradient, and its tensor, {pair}"

    def allocate(self, given: list[Tensor], out: list[Tensor]) -> None:
        """Note the memory of new tensors, and that of tensors that are gone."""
        for tensors, is_new in ((given, False), (out, True)):
            for storage in (tensor.untyped_storage() for tensor in tensors):
                entry = StorageWeakRef(storage), is_new * storage.nbytes()
                self._storages.setdefault(storage._cdata, entry)
        self._storages = {key: x for key, x in self._storages.items() if not x[0].expired()}
        self.peak_bytes = max(self.peak_bytes, sum(x[1] for x in self._storages.values()))


_COMPILED: set[str] = set()


class _Context:
    """What autograd gives to an operator's backward."""

    def __init__(self, needs_input_grad: tuple[Any, ...]) -> None:
        self.needs_input_grad = needs_input_grad
        self.saved_tensors: tuple[Tensor | None, ...] = ()
        self.without_gradient: set[int] = set()

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors

    def mark_non_differentiable(self, *tensors: Tensor) -> None:
        self.without_gradient = {id(x) for x in tensors}

    def set_materialize_grads(self, value: bool) -> None:
        assert not value


def _requires_grad(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(_requires_grad(x) for x in value)
    return isinstance(value, Tensor) and value.requires_grad


def front_end(source: ASTSource, options: Any) -> None:
    """To Triton's own representation, where types, shapes and names are checked."""
    from triton._C.libtriton import ir

    backend = make_backend(TARGET)
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    functions = backend.get_codegen_implementation(options)
    source.make_ir(TARGET, options, functions, backend.get_module_map(), context)


def _tensors(values: tuple[Any, ...]) -> list[Tensor]:
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, tuple | list):
            found += _tensors(tuple(value))
        elif isinstance(value, Tensor):
            found.append(value)
    return found


def _pointers(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_pointers(x) for x in value)
    if isinstance(value, Tensor):
        return Pointer(value.dtype, int(value.storage_offset()))
    return value


def _check_strides(kernel: str, tensor: Tensor, numbers: set[int]) -> None:
    """Elements side by side, and rows as far apart as the kernel is told."""
    if tensor.is_contiguous():
        return
    assert tensor.stride(-1) == 1 or tensor.shape[-1] == 1, f"{kernel}: {tensor.stride()}"
    assert tensor.dim() > 1, f"{kernel}: {tensor.stride()}"
    assert tensor.stride(-2) in numbers, f"{kernel} is not told of the stride {tensor.stride(-2)}"


# x[...] = number makes a tensor of it on the CPU, which is read there.
_OF_NUMBERS = (
    torch.ops.aten.lift_fresh.default, torch.ops.aten.fill_.Tensor, torch.ops.prim.device.default,
)  # fmt: skip
_CASTS = (torch.ops.aten.to, torch.ops.aten._to_copy)


class Watch(TorchDispatchMode):
    """Of what is done in PyTorch: memory, and copies between devices and dtypes."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run = run

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        given = _tensors((args, tuple((kwargs or {}).values())))
        out = func(*args, **(kwargs or {}))
        devices = {x.device for x in (*given, *_tensors((out,)))}
        if func in _OF_NUMBERS:
            return out
        if func.overloadpacket in _CASTS and given[0].dtype == torch.float32 != out.dtype:
            self.run.rounded.append(tuple(out.shape))
        assert devices <= {DEVICE}, f"{func} goes from one device to another: {devices}"
        self.run.allocate(given, _tensors((out,)))
        return out


def _body(operator: Any, declared: Any, run: Run) -> Callable[..., Any]:
    """The operator's own code in place of what it declares to return, and compared with that."""

    def call(*args: Any) -> Any:
        with Watch(run):
            out = operator._init_fn(*args)
        run.calls.append((operator, args, out))
        if declared is not None:
            for found, expected in zip(_tensors((out,)), _tensors((declared(*args),)), strict=True):
                pair = _described(found), _described(expected)
                assert pair[0] == pair[1], f"{operator}: returns, and declares, {pair}"
        return out

    return call


def _described(tensor: Tensor) -> tuple[Any, ...]:
    strides = tensor.stride() if tensor.numel() else ()
    return tuple(tensor.shape), tensor.dtype, tensor.device, strides


def _product(function: Any, *args: Tensor, out_dtype: Any = None, **kwargs: Any) -> Any:
    """torch.mm and torch.addmm with the out_dtype that fake tensors lack, as CUDA checks it."""
    if out_dtype is None:
        return function(*args, **kwargs)
    left, right = args[-2:]
    assert left.dtype == right.dtype in HALF
    assert out_dtype == torch.float32
    assert all(x.dtype == out_dtype for x in args[:-2])
    out = kwargs.get("out")
    if out is None:
        out = left.new_empty(left.shape[0], right.shape[1], dtype=out_dtype)
    assert (out.shape, out.dtype) == ((left.shape[0], right.shape[1]), out_dtype)
    assert left.shape[1] == right.shape[0]
    return out


@contextlib.contextmanager
def _guard() -> Iterator[None]:
    """Device guards of "meta", which do nothing, for "cuda" too.

    A build of PyTorch without CUDA has none, and cannot index its tensors.
    """
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    table = (ctypes.c_void_p * 16).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    cuda, meta = (torch._C._autograd.DeviceType.__members__[x].value for x in ("CUDA", "Meta"))
    before, table[cuda] = table[cuda], table[meta]
    try:
        yield
    finally:
        table[cuda] = before


@contextlib.contextmanager
def dry_run(
    monkeypatch: pytest.MonkeyPatch,
    compiler: Callable[[ASTSource, Any], None] | None = front_end,
) -> Iterator[Run]:
    """Within, "cuda" is there for fake tensors; what is launched is recorded."""
    run = Run(compiler)

    class Device:
        """In place of torch.cuda.device."""

        def __init__(self, device: torch.device) -> None:
            self.device = device

        def __enter__(self) -> None:
            run.devices.append(self.device)

        def __exit__(self, *_: object) -> None:
            run.devices.pop()

    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "device", Device)
        patch.setattr(jit.JITFunction, "run", lambda kernel, *a, **k: run.record(kernel, *a, **k))
        for operator in OPERATORS:
            body = _body(operator, operator._abstract_fn, run)
            patch.setattr(operator, "_abstract_fn", body)
        for name in ("mm", "addmm"):
            patch.setattr(torch, name, functools.partial(_product, getattr(torch, name)))
        patch.setattr(torch, "is_grad_enabled", lambda: True)
        with _guard(), FakeTensorMode(), torch.no_grad():
            yield run
