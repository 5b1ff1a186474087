# Everything runs in .venv, made on first use. PYTHON names the interpreter (>= 3.10), CXX the compiler.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
NATIVE := $(shell find csrc -type f)
ARGS ?=
# Tests run in a process for each core, at most 8, of one thread each: pytest-xdist.
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -p no:benchmark -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder
BUDGET ?= 120
# Of the operators, under each instruction set but the best, which make test has. The sets of AVX-512 differ in bfloat16 alone.
ISA_TESTS ?= instruction_set or one_channel or training or large_means or without_kinks

.PHONY: demo test verify many isas bench gpu lint build cuda mutate sanitize fuzz clean distclean help
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

help:
	@echo "make demo   train networks on 5,000 MNIST digits, fused and naive side by side: eight minutes from nothing"
	@echo "make test   run the tests, a sample of those that are many: fifteen minutes from nothing"
	@echo "make verify run the others: the many, all instruction sets, CUDA by nvcc, sanitizers; an hour"
	@echo "make many   run the many alone, ARGS='tests/fuzz' for some of them; a part of make verify"
	@echo "make isas   run tests of the operators under each instruction set that runs here; a part of make verify"
	@echo "make bench  time the operators against eager PyTorch and torch.compile"
	@echo "make gpu    nine minutes on a GPU: kernels right? fast? tuned; STEPS=correctness,speed for some of it, OUT=folder;"
	@echo "            PYTHON=python3 uses that one as it is, without network; without a GPU kernels are compiled for sm_90"
	@echo "make lint   ruff and mypy"
	@echo "make build  compile the library in place, for every instruction set, and for CUDA where there are a GPU and nvcc"
	@echo "make cuda   compile the CUDA kernels where there is no GPU, warnings and spills being errors, into build/cuda"
	@echo "make mutate plant faults and see that tests notice, for BUDGET ($(BUDGET)) seconds a script; BUDGET=0: all of them"
	@echo "make sanitize  run operators and random comparisons under AddressSanitizer and UndefinedBehaviorSanitizer"
	@echo "make fuzz   compare 50,000 random layers with their plain twins: hours; ARGS='--minutes 10' for some of them"
	@echo "make clean  remove build products; make distclean also removes $(VENV)"
	@echo "ARGS is passed on: make demo ARGS='--network all', make test ARGS='-k demo', make bench ARGS='--dtype bfloat16'"

demo: $(VENV)/.demo $(VENV)/.native
	$(PY) -m csp_kernels demo $(ARGS)

test: $(VENV)/.test $(VENV)/.native
	$(PYTEST) $(ARGS)

verify: many
	$(MAKE) --no-print-directory isas cuda sanitize

many: $(VENV)/.test $(VENV)/.build
	$(PYTEST) -m verify $(ARGS)

isas: $(VENV)/.test $(VENV)/.build
	for isa in $$($(PY) -c 'from csp_kernels import native; print(*set(native.isas()) - {native.isa()})'); do \
	  CSP_KERNELS_ISA=$$isa $(PY) -m csp_kernels info >/dev/null 2>&1 || { echo "$$isa does not run here"; continue; }; \
	  case $$isa in v4 | v4bf16) select="($(ISA_TESTS)) and bfloat16";; *) select="$(ISA_TESTS)";; esac; \
	  echo "instruction set $$isa"; CSP_KERNELS_ISA=$$isa $(PYTEST) tests/ops tests/test_isa.py -k "$$select" || exit 1; \
	done

bench: $(VENV)/.bench $(VENV)/.native
	$(PY) benchmarks/bench_dense_block.py $(ARGS)

# Steps under limits of time, most valuable first: docs/gpu_schedule.md. A PYTHON that is named runs them as it is: no
# virtual environment, no downloads. Without a GPU every launch is compiled for sm_90 and none is run.
STEPS ?=
OUT ?=
ifeq ($(origin PYTHON),file)
gpu: $(VENV)/.test $(VENV)/.native
gpu: GPU_PYTHON = $(PY)
else
gpu: GPU_PYTHON = $(PYTHON)
endif
gpu:
	$(GPU_PYTHON) benchmarks/gpu_schedule.py $(if $(STEPS),--steps "$(STEPS)") $(if $(OUT),--out "$(OUT)") $(ARGS)

lint: $(VENV)/.lint
	$(PY) -m ruff check .
	$(PY) -m mypy

build: $(VENV)/.build

# A kernel that spills or uses local memory is an error. Objects are kept; the library in place stays as it is.
cuda: $(VENV)/.torch
	@if command -v "$${NVCC:-nvcc}" >/dev/null; then \
	  CSP_KERNELS_CUDA=1 CSP_KERNELS_CUDA_ARCHS="$${CSP_KERNELS_CUDA_ARCHS:-90}" \
	    NVCC_APPEND_FLAGS="$${NVCC_APPEND_FLAGS:--Xptxas=-warn-spills,-warn-lmem-usage -Werror all-warnings}" \
	    $(PY) setup.py -q build_ext --build-lib build/cuda; \
	else echo "nvcc is missing: CUDA kernels were run on the host only, not compiled for a GPU"; fi

mutate: $(VENV)/.test $(VENV)/.native
	$(PY) tests/stage/mutate.py --budget $(BUDGET)
	$(PY) tests/kernels/mutate.py --budget $(BUDGET)
	$(PY) tests/cuda/mutate.py --budget $(BUDGET)
	$(PY) tests/cpu/mutate.py --budget $(BUDGET)

# A library of its own, build/sanitize/_C.so. The interpreter knows nothing of sanitizers: their runtime is preloaded.
SANITIZED = CSP_KERNELS_LIBRARY=build/sanitize/_C.so OMP_NUM_THREADS=2 UBSAN_OPTIONS=print_stacktrace=1 \
  ASAN_OPTIONS=detect_leaks=0:detect_odr_violation=0:alloc_dealloc_mismatch=0 \
  LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libubsan.so)"
SANITIZE_TESTS ?= (odd or growth or layout or random_graphs or changed_programs or dtypes) and not channels_last
sanitize: $(VENV)/.test
	CXX=c++ CSP_KERNELS_SANITIZE=1 CSP_KERNELS_CUDA=0 CSP_KERNELS_ISAS="$${CSP_KERNELS_ISAS:-native}" $(PY) setup.py -q build_ext
	$(SANITIZED) $(PY) tests/fuzz/compare.py --cases 300
	$(SANITIZED) $(PY) -m pytest -p no:benchmark -n 2 tests/ops tests/stage/test_operator.py -k "$(SANITIZE_TESTS)" $(ARGS)

fuzz: $(VENV)/.test $(VENV)/.native
	OMP_NUM_THREADS=1 $(PY) tests/fuzz/compare.py --cases 50000 $(ARGS)

# --- what the targets need, one line a step; what the steps print goes to a file, whose end is shown where one fails ---

LOG := build/setup.log
step = @mkdir -p build; echo "$(1)"; { $(2); } >$(LOG) 2>&1 || \
  { status=$$?; tail -n 40 $(LOG); echo "failed: $(1); all it said is in $(LOG)"; exit $$status; }

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "csp_kernels needs Python >= 3.10; name one: make PYTHON=python3.12"; exit 1; }
	$(call step,1/4 creating $(VENV),$(PYTHON) -m venv $(VENV))
	@touch $@

# --no-compile: torch's thousands of files are compiled when they are imported, most never.
$(VENV)/.torch: $(VENV)/.python
	$(call step,2/4 installing torch: a minute or two,$(PIP) install -q --no-compile "setuptools>=77" "torch>=2.11")
	@touch $@

# The package in place and the extra's dependencies.
$(VENV)/.demo $(VENV)/.test $(VENV)/.bench $(VENV)/.lint: $(VENV)/.%: $(VENV)/.torch pyproject.toml
	$(call step,3/4 installing what make $* needs,CSP_KERNELS_NATIVE=0 $(PIP) install -q --no-compile --no-build-isolation -e ".[$*]")
	@touch $@

# The library for this machine alone, where there is none for all: enough to try and to test, in a quarter of the time.
$(VENV)/.native: $(VENV)/.torch setup.py $(NATIVE)
	$(call step,4/4 compiling for this machine: three to seven minutes,CSP_KERNELS_ISAS="$${CSP_KERNELS_ISAS:-native}" CSP_KERNELS_CUDA="$${CSP_KERNELS_CUDA:-0}" $(PY) setup.py -q build_ext --inplace)
	@grep ' builds ' $(LOG) || true
	@touch $@

$(VENV)/.build: $(VENV)/.torch setup.py $(NATIVE)
	$(PY) setup.py -q build_ext --inplace
	@touch $@ $(VENV)/.native

clean:
	rm -rf build dist *.egg-info csp_kernels/*.so .pytest_cache .mypy_cache .ruff_cache .benchmarks
	rm -f $(VENV)/.build $(VENV)/.native
	find csp_kernels tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
