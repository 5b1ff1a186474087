# Everything runs in .venv, made on first use. PYTHON names the interpreter (>= 3.10), CXX the compiler.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
NATIVE := $(shell find csrc -type f)
ARGS ?=
TARGET ?= sm_90

.PHONY: demo test bench gpu lint build clean distclean help
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

help:
	@echo "make demo   train networks on 5,000 MNIST digits, fused and naive side by side (needs no download of data)"
	@echo "make test   run the tests"
	@echo "make bench  time the operators against eager PyTorch and torch.compile"
	@echo "make gpu    on a GPU: all tests, tests/gpu, benchmarks and plots; without one: compile every kernel for TARGET ($(TARGET))"
	@echo "make lint   ruff and mypy"
	@echo "make build  compile the library in place"
	@echo "make clean  remove build products; make distclean also removes $(VENV)"
	@echo "ARGS is passed on: make demo ARGS='--network all', make test ARGS='-k demo', make bench ARGS='--dtype bfloat16'"

demo: $(VENV)/.demo $(VENV)/.build
	$(PY) -m csp_kernels demo $(ARGS)

test: $(VENV)/.test $(VENV)/.build
	$(PY) -m pytest $(ARGS)

bench: $(VENV)/.bench $(VENV)/.build
	$(PY) benchmarks/bench_dense_block.py $(ARGS)

# ARGS is the benchmark's. It runs even where a test fails: it checks its candidates itself.
gpu: $(VENV)/.test $(VENV)/.build
	@if $(PY) -c 'import sys; from csp_kernels.backends import why_not_triton; sys.exit(why_not_triton() or 0)'; then \
	  failed=0; \
	  $(PY) -m pytest || failed=1; \
	  $(PY) -m pytest tests/gpu || failed=1; \
	  $(PY) benchmarks/gpu.py --plot $(ARGS) || failed=1; \
	  exit $$failed; \
	else \
	  echo "no GPU: a dry run, which compiles every kernel for $(TARGET) and runs none (make gpu TARGET=sm_80 for another)"; \
	  $(PY) benchmarks/gpu.py --dry-run --with-tests --target $(TARGET) $(ARGS); \
	fi

lint: $(VENV)/.lint
	$(PY) -m ruff check .
	$(PY) -m mypy

build: $(VENV)/.build

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "csp_kernels needs Python >= 3.10; name one: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.torch: $(VENV)/.python
	$(PIP) install "setuptools>=77" "torch>=2.11"
	touch $@

$(VENV)/.build: $(VENV)/.torch setup.py $(NATIVE)
	$(PY) setup.py -q build_ext --inplace
	touch $@

# The package in place (the objects built above are kept) and the extra's dependencies.
$(VENV)/.demo $(VENV)/.test $(VENV)/.bench $(VENV)/.lint: $(VENV)/.%: $(VENV)/.torch pyproject.toml | $(VENV)/.build
	$(PIP) install --no-build-isolation -e ".[$*]"
	touch $@

clean:
	rm -rf build dist *.egg-info csp_kernels/*.so .pytest_cache .mypy_cache .ruff_cache .benchmarks
	rm -f $(VENV)/.build
	find csp_kernels tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
