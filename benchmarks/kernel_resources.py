"""Compile every shipped kernel for every architecture, without a GPU, and table what it needs.

python benchmarks/kernel_resources.py [--arch 90 ...] [--json PATH] [--markdown PATH]

Registers and spills come from cuobjdump, shared memory from the compiler. A spill in an innermost
loop, more than a few outside, or more shared memory than the architecture has, is an error. Each
architecture gets the tiles that a launch takes there.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from kernel_cases import Case, cases

ROOT = Path(__file__).parent.parent
COMMAND = "python benchmarks/kernel_resources.py --json PATH"
SPILLED_OUTSIDE = 128
"""Bytes of a thread that may spill outside innermost loops: some dozens of moves for a tile."""
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}  # bytes a block
POINTERS = {
    "row_ids_ptr": "*i64", "target_ids_ptr": "*i64", "argmax_ids_ptr": "*i64", "slots_ptr": "*i32",
    "count_ptr": "*i32", "active_count_ptr": "*i32", "clipped_ptr": "*i1",
}  # fmt: skip
FLOATS = (
    "lora_scale", "logit_scale", "softcap", "scale", "decay", "rest1", "beta2", "rest2",
    "step_size", "correction", "eps",
)  # fmt: skip

MULTIPLES = ("_stride", "_size", "num_columns", "columns_per_split", "width")
"""Of 16 at usual sizes, which a launch tells the compiler; without it no load is of 16 bytes."""


def load(name: Any) -> Any:
    """The object that "module:attribute" names; everything else as it is."""
    if not isinstance(name, str) or ":" not in name:
        return name
    module, attribute = name.split(":")
    return getattr(importlib.import_module(module), attribute)


def constant(value: Any) -> Any:
    """A compile-time argument: functions of objectives become device functions."""
    import triton

    if isinstance(value, tuple):
        return tuple(constant(item) for item in value)
    found = load(value)
    return triton.jit(found) if callable(found) else found


def column(arch: int) -> str:
    """Of the tables of tiles, as `launch.column_of` chooses it on such a GPU."""
    from fastrl_kernels.launch import LARGE_CHIPS

    return "large" if (arch // 10, arch % 10) in LARGE_CHIPS else "small"


def compile_case(case: Case, arch: int) -> dict[str, Any]:
    """Machine code of one case for one architecture, and the resources it takes."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = load(case.kernel)
    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for index, name in enumerate(kernel.arg_names):
        if name in case.constants:
            signature[name] = "constexpr"
            constants[index,] = constant(case.constants[name])
        elif name in case.absent:
            signature[name], constants[index,] = "constexpr", None
        elif name == "parameters":
            signature[name] = case.parameters
        elif name in FLOATS:
            signature[name] = "fp32"
        elif name.endswith("_ptr"):
            signature[name] = case.pointers.get(name, POINTERS.get(name, "*fp32"))
            attributes[index,] = [["tt.divisibility", 16]]
        else:
            signature[name] = "i32"
            if name not in case.odd and name.endswith(MULTIPLES):
                attributes[index,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    if case.maxnreg is not None:
        options["maxnreg"] = case.maxnreg
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    registers, spilled = _usage(compiled.asm["cubin"])
    in_loops = spills_in_loops(compiled.asm["cubin"]) if spilled else 0
    few_spills = in_loops == 0 and spilled <= SPILLED_OUTSIDE
    return {
        "kernel": case.name, "arch": f"sm_{arch}", "registers": registers,
        "spilled_bytes": spilled, "spills_in_loops": in_loops,
        "shared_bytes": compiled.metadata.shared,
        "shared_limit": SHARED_LIMIT[arch], "num_warps": case.num_warps,
        "fits": few_spills and compiled.metadata.shared <= SHARED_LIMIT[arch],
    }  # fmt: skip


def _usage(cubin: bytes) -> tuple[int, int]:
    """Registers a thread and bytes of stack a thread."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers = max(int(number) for number in re.findall(r"REG:(\d+)", text))
    return registers, max(int(number) for number in re.findall(r"STACK:(\d+)", text))


def spills_in_loops(cubin: bytes) -> int:
    """Instructions of innermost loops that keep or fetch what registers have no room for."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True)
    return spills_of(text.stdout)


def spills_of(assembly: str) -> int:
    """The same, of the machine's instructions as text."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in assembly.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            instructions.append(instruction[1])
    loops = [
        (labels[jump[1]], end)
        for end, instruction in enumerate(instructions)
        if (jump := re.search(r"\bBRA\b.*?(\.L_x_\d+)", instruction))
        and labels.get(jump[1], end + 1) <= end
    ]
    inner = [
        (first, last) for first, last in loops
        if not any(first <= a and b <= last and (a, b) != (first, last) for a, b in loops)
    ]  # fmt: skip
    return sum(
        bool(re.search(r"\b(STL|LDL)\b", instruction))
        for first, last in inner for instruction in instructions[first : last + 1]
    )  # fmt: skip


def compile_all(architectures: list[int], num_workers: int | None = None) -> list[dict[str, Any]]:
    """Resources of every case for every architecture; compiled kernels come from Triton's cache."""
    columns = {arch: cases(column(arch)) for arch in architectures}
    jobs = [(case, arch) for found in zip(*columns.values(), strict=True)
            for case, arch in zip(found, architectures, strict=True)]  # fmt: skip
    with ProcessPoolExecutor(num_workers or os.cpu_count()) as pool:
        return list(pool.map(compile_case, *zip(*jobs, strict=True)))


def markdown(rows: list[dict[str, Any]]) -> str:
    """Registers / shared KiB of every kernel on every architecture."""
    architectures = sorted({row["arch"] for row in rows}, key=lambda name: int(name[3:]))
    lines = [
        f"| kernel | warps | {' | '.join(architectures)} |",
        f"|---|---|{'---|' * len(architectures)}",
    ]
    for name in dict.fromkeys(row["kernel"] for row in rows):
        found = {row["arch"]: row for row in rows if row["kernel"] == name}
        cells = [
            f"{found[arch]['registers']} / {found[arch]['shared_bytes'] / 1024:.0f}"
            for arch in architectures
        ]
        warps = ", ".join(dict.fromkeys(str(found[arch]["num_warps"]) for arch in architectures))
        lines.append(f"| {name} | {warps} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", type=int, nargs="+", default=sorted(SHARED_LIMIT))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    arguments = parser.parse_args()
    import triton

    rows = compile_all(arguments.arch)
    title = f"Registers a thread / KiB of shared memory a block, triton {triton.__version__}.\n\n"
    if arguments.json:
        found = {"triton": triton.__version__, "command": COMMAND, "rows": rows}
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    if arguments.markdown:
        arguments.markdown.write_text(title + markdown(rows))
    print(title + markdown(rows))
    broken = [row for row in rows if not row["fits"]]
    for row in broken:
        print("does not fit:", row)
    return bool(broken)


if __name__ == "__main__":
    sys.exit(main())
