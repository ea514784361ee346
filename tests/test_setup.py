"""`make` on a machine that lacks something says so in one line."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def checkout(tmp_path):
    """A copy of what the set-up reads, so that the real environment stays untouched."""
    for name in ("Makefile", "pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    return tmp_path


def make_setup(checkout, **environment):
    result = subprocess.run(
        ["make", "--silent", "setup"], cwd=checkout, capture_output=True, text=True, check=False,
        env={**os.environ, **environment},
    )  # fmt: skip
    lines = [line for line in result.stderr.splitlines() if not line.startswith("make")]
    return result.returncode, lines


def test_missing_python(checkout):
    code, lines = make_setup(checkout, PYTHON="python-of-tomorrow")
    assert code != 0
    assert lines == [
        "setup: no python-of-tomorrow found; install Python 3.11 or newer, or set PYTHON"
    ]


def test_old_python(checkout):
    old = checkout / "old-python"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.8.10"\nexit 1\n')
    old.chmod(0o755)
    code, lines = make_setup(checkout, PYTHON=str(old))
    assert code != 0
    assert len(lines) == 1
    assert "Python 3.8.10 is too old" in lines[0]


def test_missing_compiler(checkout):
    code, lines = make_setup(checkout, CC="compiler-of-tomorrow")
    assert code != 0
    assert lines == ["setup: no C compiler (compiler-of-tomorrow) found; install gcc or clang"]


def test_no_network(checkout):
    nowhere = {
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(checkout),
        "PIP_EXTRA_INDEX_URL": "",
        "PIP_CONFIG_FILE": os.devnull,
    }
    code, lines = make_setup(checkout, **nowhere)
    assert code != 0
    assert len(lines) == 1
    assert "could not install" in lines[0]
    assert "network" in lines[0]
    assert not (checkout / ".venv" / "requirements.sha256").exists()


def test_an_up_to_date_environment_is_left_alone():
    if not (ROOT / ".venv" / "requirements.sha256").exists():
        pytest.skip("this environment was not made by `make`")
    before = (ROOT / ".venv" / "setup.log").stat().st_mtime
    assert make_setup(ROOT, PYTHON=sys.executable) == (0, [])
    assert (ROOT / ".venv" / "setup.log").stat().st_mtime == before
