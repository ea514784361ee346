"""The wheel holds both packages and works away from the sources."""

import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    target = tmp_path_factory.mktemp("wheel")
    source = target / "source"
    source.mkdir()
    names = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    for name in names:  # a copy of what is tracked: building in place would leave files behind
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", target, source],
        check=True, capture_output=True,
    )  # fmt: skip
    (path,) = target.glob("*.whl")
    return path


def test_wheel_holds_every_module_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {str(p.relative_to(ROOT)) for p in (ROOT / "fastrl").rglob("*.py")}
    kernels = ROOT / "kernels"
    modules |= {str(p.relative_to(kernels)) for p in (kernels / "fastrl_kernels").rglob("*.py")}
    modules |= {"fastrl/py.typed", "fastrl_kernels/py.typed"}
    packaged = {name for name in names if ".dist-info/" not in name}
    assert packaged == modules
    assert wheel.name.startswith("fastrl_llm-")


def test_installed_wheel_imports_and_computes_elsewhere(wheel, tmp_path):
    """A fresh environment that sees this one's dependencies but not the source tree."""
    home = tmp_path / "env"
    venv.create(home, with_pip=False, system_site_packages=False)
    python = home / "bin" / "python"
    site = next((home / "lib").glob("python*")) / "site-packages"
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet"]
    subprocess.run([*install, "--target", site, wheel], check=True)
    libraries = Path(pytest.__file__).parent.parent
    (site / "dependencies.pth").write_text(f"{libraries}\n")
    # The editable install of the sources is reached through .pth files, which a plain path skips.
    code = (
        "import fastrl, fastrl_kernels, torch\n"
        "from fastrl_kernels import linear_logps\n"
        "out = linear_logps(torch.eye(3), torch.eye(3), torch.arange(3))\n"
        "print(fastrl.__file__, fastrl_kernels.__file__, float(out.logps[0]))\n"
        "assert torch.allclose(out.logps, torch.eye(3).log_softmax(-1).diagonal())\n"
    )
    run = subprocess.run([python, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert str(ROOT) not in run.stdout
    command = subprocess.run(
        [python, "-m", "fastrl", "--help"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert "fastrl COMMAND" in command.stdout
