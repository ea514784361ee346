# `make demo` and `make test` set everything up themselves; see README.md.
.PHONY: setup demo test gate lint format clean

setup:
	@scripts/setup.sh

demo: setup
	.venv/bin/fastrl train examples/demo.toml --overwrite

test: setup
	.venv/bin/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

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
