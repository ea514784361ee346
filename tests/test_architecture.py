"""Who may import what, read off the sources: no import can hide inside a function."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PURE = (
    "types",
    "tasks",
    "rewards",
    "advantages",
    "aggregation",
    "controllers",
    "encoding",
    "packing",
    "preferences",
    "prefix_tree",
    "ragged",
    "reward_shaping",
    "rollout_correction",
    "schedules",
    "selection",
    "sequence_surrogates",
    "token_weights",
)
TRANSFORMERS_HOMES = ("policy", "rollout", "integrations")
OPTIONAL = {
    "peft", "bitsandbytes", "torchao", "flash_attn", "liger_kernel", "vllm", "ray", "trl", "verl",
    "wandb",
}  # fmt: skip


def modules(root: Path, package: str) -> dict[str, Path]:
    """Dotted name -> file of every module of a package."""
    return {
        ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path
        for path in sorted((root / package).rglob("*.py"))
    }


def imports(path: Path) -> set[str]:
    """Everything the file imports, at any depth of nesting, as dotted names."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def top_level(path: Path) -> set[str]:
    """Packages imported at module level, outside of functions and of TYPE_CHECKING."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}
    return {name.split(".")[0] for name in names}


FASTRL = modules(ROOT, "fastrl")
KERNELS = modules(ROOT / "kernels", "fastrl_kernels")


def packages(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


def belongs(module: str, homes: tuple[str, ...]) -> bool:
    return any(module == f"fastrl.{home}" or module.startswith(f"fastrl.{home}.") for home in homes)


@pytest.mark.parametrize("module", sorted(KERNELS))
def test_kernels_need_only_torch_and_triton(module):
    allowed = {"torch", "triton", "fastrl_kernels", *sys.stdlib_module_names}
    if module == "fastrl_kernels.segment_attention.flash":  # within a function, as for all extras
        allowed.add("flash_attn")
    assert packages(imports(KERNELS[module])) <= allowed


@pytest.mark.parametrize("module", sorted(name for name in FASTRL if belongs(name, PURE)))
def test_pure_stages_know_no_model_and_no_kernel(module):
    """Of the kernels only segments, which are data, and the selection of tokens; no products.

    Packing attaches lazily.
    """
    names = imports(FASTRL[module])
    assert "transformers" not in packages(names)
    kernels = {name for name in names if name.startswith("fastrl_kernels")}
    allowed = ("fastrl_kernels.segments", "fastrl_kernels.token_selection")
    assert all(name.startswith(allowed) for name in kernels)
    forbidden = {"fastrl.policy", "fastrl.rollout", "fastrl.trainer", "fastrl.loss"}
    assert not names & forbidden


@pytest.mark.parametrize("module", sorted(FASTRL))
def test_transformers_is_imported_where_models_live(module):
    names = {n for n in imports(FASTRL[module]) if n.split(".")[0] == "transformers"}
    # The command line silences its progress bars, inside one function.
    allowed = (
        {"transformers.utils", "transformers.utils.logging"} if module == "fastrl.cli" else set()
    )
    assert belongs(module, TRANSFORMERS_HOMES) or names <= allowed


@pytest.mark.parametrize("module", sorted({**FASTRL, **KERNELS}))
def test_optional_packages_are_imported_inside_functions(module):
    assert not top_level({**FASTRL, **KERNELS}[module]) & OPTIONAL


@pytest.mark.parametrize("module", sorted({**FASTRL, **KERNELS}))
def test_nothing_imports_benchmarks_or_tests(module):
    path = {**FASTRL, **KERNELS}[module]
    assert not packages(imports(path)) & {"benchmarks", "tests", "examples"}


@pytest.mark.parametrize("module", sorted({**FASTRL, **KERNELS}))
def test_files_are_short(module):
    path = {**FASTRL, **KERNELS}[module]
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 300
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):  # without the signature, long where a kernel has it
            assert (node.end_lineno or 0) - node.body[0].lineno < 50, f"{node.name} is too long"


def test_there_is_no_package_called_kernels():
    """An `kernels/__init__.py` would shadow the Hugging Face package that transformers imports."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize("statement", ["import fastrl", "import fastrl.cli, fastrl.config"])
def test_importing_the_package_loads_no_torch(statement):
    code = (
        f"{statement}; import sys; print('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "False"
