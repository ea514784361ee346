# `make demo` and `make test` set everything up themselves; see README.md.
.PHONY: setup demo test test-verl gate lint format clean

setup:
	@scripts/setup.sh

demo: setup
	.venv/bin/fastrl train examples/demo.toml --overwrite

test: setup
	.venv/bin/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

# Against the real verl, from a directory of its own; left out, and said so, where it cannot be had.
test-verl: setup
	@scripts/setup_verl.sh; code=$$?; if [ $$code -eq 3 ]; then exit 0; elif [ $$code -ne 0 ]; then exit $$code; fi; \
	PYTHONPATH=.venv/verl .venv/bin/python -m pytest --numprocesses auto --maxprocesses 4 tests/test_verl_*.py tests/test_migrate.py

gate: setup
	.venv/bin/python benchmarks/speed_gate.py

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

format: setup
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

clean:
	rm -rf .venv build dist runs *.egg-info
