# `make` needs python3 (3.11 or later) with venv, and brings everything else itself.
PYTHON ?= python3
UV := .make/uv/bin/uv
export UV_PYTHON := $(shell $(PYTHON) -c 'import sys; print(sys.executable)')
export UV_PYTHON_DOWNLOADS := never

.PHONY: demo test check bench bench-more bench-peers format mxnet-env

demo: $(UV)
	@$(UV) sync --quiet --locked --inexact --no-default-groups --extra demo
	@$(UV) run --quiet --no-sync infermill demo

test: .venv/installed
	@$(MAKE) --no-print-directory mxnet-env || echo 'mxnet-env: not installed, and the tests that need MXNet are skipped'
	$(UV) run --no-sync pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder --max-worker-restart 0

check: .venv/installed
	$(UV) run --no-sync ruff format --check
	$(UV) run --no-sync ruff check
	$(UV) run --no-sync mypy

# About half an hour on two fast cores; installing the peers, once, into .make/peers, comes before it.
bench: .venv/installed bench-peers
	$(UV) run --no-sync python benchmarks/bench.py photos small

bench-more: .venv/installed bench-peers
	$(UV) run --no-sync python benchmarks/bench.py elsewhere protocol plan
	$(UV) run --no-sync python benchmarks/bench_tuning.py
	$(UV) run --no-sync python benchmarks/quantize_lite0.py

bench-peers: .venv/installed
	@$(UV) run --no-sync python benchmarks/environments.py

format: .venv/installed
	$(UV) run --no-sync ruff format
	$(UV) run --no-sync ruff check --fix

.venv/installed: $(UV) uv.lock
	$(UV) sync --locked --all-extras
	@touch $@

# The last MXNet needs a NumPy before 1.24, and so a Python before 3.12, of its own.
mxnet-env: .make/mxnet/installed

.make/mxnet/installed: $(UV)
	$(UV) venv --quiet --clear --python '>=3.8,<3.12' .make/mxnet
	$(UV) pip install --quiet --python .make/mxnet/bin/python mxnet==1.9.1 'numpy<1.24' || { rm -r .make/mxnet; exit 1; }
	.make/mxnet/bin/python -c 'import mxnet' || { rm -r .make/mxnet; exit 1; }
	@touch $@

$(UV):
	$(PYTHON) -m venv .make/uv
	.make/uv/bin/pip install --quiet uv==0.13.9
