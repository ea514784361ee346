"""What the compiler already tells of a kernel's speed: how many fit, and which products it uses.

python benchmarks/tune_resources.py [--write] [--instructions]

From the committed table of kernel_resources.py, for Hopper (sm_90): how many blocks a
multiprocessor holds, what limits them, and how many of its 64 warps they are. --write puts the
table into TUNING.md; --instructions compiles the kernels and lists the shapes of their products on
tensor cores, wgmma or the older mma, which reach about half its rate.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
ROWS = HERE / "results" / "aot" / "kernel_resources.json"
PAGE = HERE / "TUNING.md"
BEGIN, END = "<!-- resources -->", "<!-- end of resources -->"
REGISTERS, REGISTER_UNIT = 65536, 8  # of a multiprocessor; a thread gets a multiple of eight
SHARED_BYTES, RESERVED_BYTES = 228 * 1024, 1024  # of a multiprocessor; of each block for itself
MAX_WARPS, MAX_BLOCKS = 64, 32
SHOWN = re.compile(r"\(.*bf16.*\)|^AdamW \(split")
HIDDEN = re.compile(r"window|softcap|everything|mask|odd")
PRODUCTS = re.compile(r"(wgmma)\.mma_async\.sync\.aligned\.(m\d+n\d+k\d+)|(mma)\.sync\.aligned\."
                      r"(m\d+n\d+k\d+)")  # fmt: skip


class Residency(NamedTuple):
    """Of one kernel on one multiprocessor."""

    blocks: int
    limit: str
    """What there is too little of for one more."""
    warps: int


def residency(registers: int, shared_bytes: int, num_warps: int) -> Residency:
    """How many blocks fit at a time."""
    granted = -(-registers // REGISTER_UNIT) * REGISTER_UNIT
    fitting = {
        "warps": min(MAX_WARPS // num_warps, MAX_BLOCKS),
        "registers": REGISTERS // (granted * 32 * num_warps),
        "shared memory": SHARED_BYTES // (shared_bytes + RESERVED_BYTES),
    }
    limit = min(fitting, key=lambda name: fitting[name])
    return Residency(fitting[limit], limit, fitting[limit] * num_warps)


def table(rows: list[dict[str, Any]]) -> str:
    """Of the kernels in bfloat16 without extras, for Hopper."""
    lines = [
        "| kernel | registers | shared KiB | warps | blocks | limited by | warps of 64 |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        name = row["kernel"]
        if row["arch"] != "sm_90" or not SHOWN.search(name) or HIDDEN.search(name):
            continue
        found = residency(row["registers"], row["shared_bytes"], row["num_warps"])
        lines.append(
            f"| {name} | {row['registers']} | {row['shared_bytes'] / 1024:.0f} | "
            f"{row['num_warps']} | {found.blocks} | {found.limit} | {found.warps} |"
        )
    return "\n".join(lines)


def with_table(page: str, text: str) -> str:
    """The page with this table in its place."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}"


def products_of(ptx: str) -> list[str]:
    """Shapes of products on tensor cores, such as "wgmma m64n64k16"."""
    found = {
        f"{new or old} {shape or other}" for new, shape, old, other in PRODUCTS.findall(ptx)
    }  # fmt: skip
    return sorted(found)


def print_instructions() -> None:
    """Compiles for Hopper, or reads from the cache of Triton."""
    import kernel_resources
    import triton
    from kernel_cases import cases

    compile_kernel, texts = triton.compile, []

    def keeping(*args: Any, **kwargs: Any) -> Any:
        compiled = compile_kernel(*args, **kwargs)
        texts.append(compiled.asm["ptx"])
        return compiled

    triton.compile = keeping
    for case in cases("large"):
        if SHOWN.search(case.name) and not HIDDEN.search(case.name):
            kernel_resources.compile_case(case, 90)
            print(f"{case.name:50} {', '.join(products_of(texts[-1])) or '-'}", flush=True)


def main() -> int:
    """Prints the table, or the shapes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put the table into TUNING.md")
    parser.add_argument("--instructions", action="store_true", help="compile, and list products")
    args = parser.parse_args()
    if args.instructions:
        print_instructions()
        return 0
    text = table(json.loads(ROWS.read_text(encoding="utf-8"))["rows"])
    if args.write:
        PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8"), text), encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
