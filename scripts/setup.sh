#!/usr/bin/env bash
# Create .venv and install the project into it, unless that has been done for these requirements.
set -euo pipefail
cd "$(dirname "$0")/.."

fail() {
  echo "setup: $1" >&2
  exit 1
}

python=${PYTHON:-python3}
command -v "$python" >/dev/null || fail "no $python found; install Python 3.11 or newer, or set PYTHON"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
  fail "$("$python" --version) is too old; install Python 3.11 or newer, or set PYTHON=python3.11"
command -v "${CC:-cc}" >/dev/null || fail "no C compiler (${CC:-cc}) found; install gcc or clang"
"$python" -c 'import ensurepip, venv' 2>/dev/null ||
  fail "$python cannot make virtual environments; install its venv package (python3-venv)"

gpu=no
if command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; then gpu=yes; fi

wanted=$("$python" - "$gpu" <<'EOF'
import hashlib, json, sys, tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
parts = [project["dependencies"], project["optional-dependencies"]["dev"], project["scripts"]]
print(hashlib.sha256(json.dumps([parts, sys.version, sys.argv[1]]).encode()).hexdigest())
EOF
)
stamp=.venv/requirements.sha256
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then exit 0; fi

echo "setup: installing into .venv (a few minutes the first time; log in .venv/setup.log)"
"$python" -m venv .venv
log=.venv/setup.log
install() {
  .venv/bin/python -m pip install --disable-pip-version-check "$@" >>"$log" 2>&1 ||
    fail "could not install $*: $(grep -m1 -iE 'error|no matching' "$log" || echo "see $log") (is there a network?)"
}
: >"$log"
# Without a GPU the pinned CPU build goes in first, so that nothing pulls gigabytes of CUDA packages.
if [ "$gpu" = no ]; then install torch==2.13.0; fi
install -e ".[dev]"
echo "$wanted" >"$stamp"
