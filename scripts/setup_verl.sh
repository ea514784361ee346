#!/usr/bin/env bash
# Put verl and what importing it needs into .venv/verl, for the tests against it; exits 3 where an
# index has none of it. A directory of its own: verl asks for other versions than FastRL does, and its
# wheel has packages called `tests` and `scripts`.
set -euo pipefail
cd "$(dirname "$0")/.."

packages=(
  verl==0.9.1 tensordict==0.10.0 ray==2.60.0 hydra-core==1.3.8 omegaconf==2.4.0
  antlr4-python3-runtime==4.9.3 codetiming==1.4.0 pyvers==0.2.3 cloudpickle==3.1.2 orjson==3.13.0
  importlib-metadata==10.2.0 zipp==4.1.2 msgpack==1.2.4 jsonschema jsonschema-specifications
  referencing rpds-py attrs requests urllib3 charset-normalizer certifi
)
stamp=.venv/verl.txt
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "${packages[*]}" ]; then exit 0; fi

log=.venv/verl.log
rm -rf .venv/verl "$stamp"
if ! .venv/bin/python -m pip install --disable-pip-version-check --no-deps --target .venv/verl \
  "${packages[@]}" >"$log" 2>&1; then
  echo "setup_verl: no verl ($(grep -m1 -iE 'error|no matching' "$log" || echo "see $log")); its tests are left out" >&2
  exit 3
fi
PYTHONPATH=.venv/verl .venv/bin/python -c 'import verl'
echo "${packages[*]}" >"$stamp"
