"""Run by test_objectives_in_triton.py as a process of its own: the interpreter is chosen at import.

`interpret` compares every objective inside a kernel with the torch binding of the same source, in
programs that have a block of tokens and numbers for parameters, and in programs that have one token
with parameters of its own; `compile ARCH` builds machine code of both.
"""

import sys

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastrl_kernels.objectives import REGULARISERS, SURROGATES, Regulariser, bind_torch
from tests.objective_formulas import HYPER, make_tokens

BLOCK = 64
S = 37
FUNCTIONS = {**SURROGATES, **REGULARISERS}
INPUTS = tuple(
    3 if name in SURROGATES else len(Regulariser(function).inputs)
    for name, function in FUNCTIONS.items()
)
OFFSETS = [0]
for name in FUNCTIONS:
    OFFSETS.append(OFFSETS[-1] + len(HYPER.get(name, ())))
PARAMETERS = tuple(number for name in FUNCTIONS for number in HYPER.get(name, ()))


@triton.jit
def evaluate_all(
    x_ptr, y_ptr, z_ptr, out_ptr, parameters, n, FUNCTIONS: tl.constexpr, INPUTS: tl.constexpr,
    OFFSETS: tl.constexpr, PER_TOKEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Value and slope of every function, one after the other; without a BLOCK, of one token."""
    i = tl.program_id(0) if BLOCK == 0 else tl.arange(0, BLOCK)
    m = i < n
    x, y, z = tl.load(x_ptr + i, m), tl.load(y_ptr + i, m), tl.load(z_ptr + i, m)
    for index in tl.static_range(len(FUNCTIONS)):
        own = ()
        for k in tl.static_range(OFFSETS[index], OFFSETS[index + 1]):
            if PER_TOKEN:
                own = own + (tl.load(parameters[k] + i, m, 1.0),)  # noqa: RUF005
            else:
                own = own + (parameters[k],)  # noqa: RUF005
        if INPUTS[index] == 2:
            value, slope = FUNCTIONS[index](x, y, *own)
        else:
            value, slope = FUNCTIONS[index](x, y, z, *own)
        tl.store(out_ptr + 2 * index * n + i, value, m)
        tl.store(out_ptr + (2 * index + 1) * n + i, slope, m)


def device_functions():
    return tuple(triton.jit(function) for function in FUNCTIONS.values())


def interpret() -> None:
    """Values and slopes of the interpreted kernel against those of torch."""
    x, y, _, z = (tokens.float() for tokens in make_tokens(S))
    spread = torch.linspace(0.8, 1.2, S)
    for per_token in (False, True):
        parameters = PARAMETERS
        if per_token:
            parameters = tuple(number * spread for number in PARAMETERS)
        got = torch.full((len(FUNCTIONS), 2, S), torch.nan)
        evaluate_all[(S if per_token else 1,)](
            x, y, z, got, parameters, S, device_functions(), INPUTS, tuple(OFFSETS), per_token,
            0 if per_token else BLOCK,
        )  # fmt: skip
        for index, (name, function) in enumerate(FUNCTIONS.items()):
            own = parameters[OFFSETS[index] : OFFSETS[index + 1]]
            want = torch.stack(bind_torch(function)(*(x, y, z)[: INPUTS[index]], *own))
            torch.testing.assert_close(got[index], want, rtol=4e-6, atol=1e-6, msg=name)
            print("same", name)


def compile_for(arch: int) -> None:
    """Machine code for one architecture, without a GPU."""
    pointers = dict.fromkeys(("x_ptr", "y_ptr", "z_ptr", "out_ptr"), "*fp32")
    names = ("FUNCTIONS", "INPUTS", "OFFSETS", "PER_TOKEN", "BLOCK")
    for per_token in (False, True):
        kind = "*fp32" if per_token else "fp32"
        values = (INPUTS, tuple(OFFSETS), per_token, 0 if per_token else BLOCK)
        source = ASTSource(
            fn=evaluate_all,
            signature={
                **pointers, "parameters": (kind,) * len(PARAMETERS), "n": "i32",
                **dict.fromkeys(names, "constexpr"),
            },
            constexprs={(6 + i,): x for i, x in enumerate((device_functions(), *values))},
        )  # fmt: skip
        assert triton.compile(source, target=GPUTarget("cuda", arch, 32)).asm["cubin"]
    for name in FUNCTIONS:
        print("compiled", name)


if __name__ == "__main__":
    interpret() if sys.argv[1] == "interpret" else compile_for(int(sys.argv[2]))
