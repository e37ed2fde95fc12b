# megatron_ep_v2: every command a contributor needs. `make help` lists them.
#
# Each Python version has its own environment, .venv/<version>, so both stacks of constraints.txt can live side by side:
#   make test                        python3 of this machine
#   make test PYTHON=python3.12      the other stack (pyenv's interpreters are found too)
#   make train INSTALL=no            PYTHON as it is, nothing installed: a container or cluster that has its own torch and deep_ep
#   make train DEEPEP=2.5            on a host with GPUs: DeepEP 2.5 instead of 2.1, in .venv/<version>-deepep-2.5

PYTHON  ?= python3
INSTALL ?= yes
# The DeepEP to install: 2.1, 2.5 or no. By default none of it is downloaded where there is no GPU.
DEEPEP  ?= $(if $(wildcard /dev/nvidia[0-9]*),2.1,no)
# Extra arguments for the command behind a target: make train ARGS="--steps 50"
ARGS    ?=
# Training processes; by default one for each GPU, or two on the CPU where there are fewer than two GPUs.
NPROC   ?=
# nproc takes OMP_NUM_THREADS for the number of cores where it is set.
CPUS    := $(shell env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
# Test workers: one more than cores, because a test that waits for its processes leaves a core idle. A test starts up to 8
# processes of its own, so more than 8 workers only fight for memory.
WORKERS ?= $(shell n=$(CPUS); echo $$((n < 8 ? n + 1 : 8)))

# The interpreter by name, or pyenv's newest of that name where its shim does not answer.
PYTHON_EXE := $(shell $(PYTHON) -c 'import sys; print(sys.executable)' 2>/dev/null || \
  ls "$$(pyenv root 2>/dev/null)"/versions/*/bin/$(PYTHON) 2>/dev/null | sort -V | tail -n 1)
PYTHON_VERSION := $(if $(PYTHON_EXE),$(shell "$(PYTHON_EXE)" -c 'import sys; print("%d.%d" % sys.version_info[:2])'))

VENV  := .venv/$(or $(PYTHON_VERSION),unknown)
EXTRAS := dev
CONSTRAINTS := constraints.txt
ifneq ($(DEEPEP),no)
VENV := $(VENV)-deepep-$(DEEPEP)
EXTRAS := dev,deepep$(if $(filter 2.5,$(DEEPEP)),25)
CONSTRAINTS := $(VENV)/constraints.txt
endif
STAMP := $(VENV)/.installed

ifeq ($(INSTALL),no)
PY := $(PYTHON_EXE)
READY := check-python
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
else
PY := $(VENV)/bin/python
READY := $(STAMP)
endif

# Without this, a megatron-core that is installed below a git checkout takes our commit for its own: 0.19.2+<our commit>.
export NO_VCS_VERSION := 1

PYTEST = export CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1; exec "$(PY)" -m pytest -n $(WORKERS) --dist worksteal

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help install train test test-fast wheel-check resolve lint format bench hooks clean distclean check-python

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile
	@echo
	@echo '  PYTHON=python3.12     another interpreter, in its own environment (tested: 3.11 and 3.12)'
	@echo '  DEEPEP=2.5            install DeepEP 2.5; on hosts with GPUs the default is 2.1, on others no'
	@echo '  INSTALL=no            use PYTHON as it is and install nothing'
	@echo '  ARGS="--steps 50"     passed on to train, test, test-fast and bench'
	@echo '  NPROC=4  WORKERS=1    processes of train; workers of test'

install: $(READY)  ## create the environment and install everything, versions from constraints.txt
	@echo "ready: $(PY)"

train: $(READY)  ## train a small Qwen3-MoE: on all GPUs, or on the CPU with two processes
	@exec "$(PY)" -m megatron_ep_v2 train $(if $(NPROC),--nproc $(NPROC)) $(ARGS)

test: $(READY)  ## run the tests on the CPU
	@$(PYTEST) $(ARGS)

test-fast: $(READY)  ## run those that take no long
	@$(PYTEST) -m 'not slow and not gpu and not multinode' $(ARGS)

wheel-check: $(READY)  ## build the wheel and run each command from it, without the source tree
	@.ci/wheel-check "$(PY)"

resolve: $(READY)  ## whether the extras for GPUs resolve for every Python and machine
	@.ci/resolve-extras "$(PY)"

lint: $(READY)  ## ruff (rules and format) and mypy
	"$(PY)" -m ruff check .
	"$(PY)" -m ruff format --check .
	"$(PY)" -m mypy

format: $(READY)  ## let ruff fix and format the sources
	"$(PY)" -m ruff check --fix .
	"$(PY)" -m ruff format .

bench: $(READY)  ## time Megatron's dispatchers side by side: on all GPUs, or on the CPU with two processes
	@exec "$(PY)" -m megatron_ep_v2 bench $(ARGS)

hooks: $(READY)  ## run format and lint before each git commit
	"$(PY)" -m pre_commit install

clean:  ## remove caches and build products
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +

distclean: clean  ## clean, and remove the environments in .venv
	rm -rf .venv

check-python:
	@case "$(DEEPEP)" in no|2.1|2.5) ;; *) \
	  echo 'error: DEEPEP=$(DEEPEP) is unknown.' >&2; \
	  echo '  fix: DEEPEP=2.1 or DEEPEP=2.5 on a host with GPUs; DEEPEP=no installs none' >&2; exit 1 ;; esac
	@if [ -z "$(PYTHON_EXE)" ]; then \
	  echo 'error: no interpreter "$(PYTHON)" here.' >&2; \
	  echo '  fix: name one that exists, e.g. make train PYTHON=python3.11 (tested: 3.11 and 3.12)' >&2; exit 1; fi
	@"$(PYTHON_EXE)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo 'error: "$(PYTHON)" is Python $(PYTHON_VERSION); megatron_ep_v2 needs 3.10 or newer.' >&2; \
	  echo '  fix: name a newer one, e.g. make train PYTHON=python3.11 (tested: 3.11 and 3.12)' >&2; exit 1; }
	@[ "$(INSTALL)" = no ] || "$(PYTHON_EXE)" -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo 'error: "$(PYTHON)" cannot create environments: its venv or ensurepip module is missing.' >&2; \
	  echo '  fix: install it (Debian, Ubuntu: apt install python$(PYTHON_VERSION)-venv)' >&2; exit 1; }

# .incomplete stays behind when an installation breaks off; the next call then starts from an empty environment.
# Without it an existing environment is only updated, so what was built into it by hand (TransformerEngine) survives.
# DeepEP's wheel says which torch. Its version 2.5 needs newer wheels than torch pins: docs/compatibility.md.
$(STAMP): setup.py pyproject.toml constraints.txt | check-python
	@echo "Installing into $(VENV): a few minutes the first time, depending on the network"
	@if [ -e $(VENV)/.incomplete ] || [ ! -x $(PY) ]; then "$(PYTHON_EXE)" -m venv --clear $(VENV); fi
	@touch $(VENV)/.incomplete
ifneq ($(DEEPEP),no)
	@grep -vE '^(torch|triton)=' constraints.txt >$(CONSTRAINTS)
endif
	$(PY) -m pip install --disable-pip-version-check -c $(CONSTRAINTS) -e '.[$(EXTRAS)]'
ifeq ($(DEEPEP),2.5)
	$(PY) -m pip install --disable-pip-version-check --no-deps 'nvidia-nccl-cu13>=2.32.3' 'nvidia-cuda-runtime==13.1.*'
endif
	@rm $(VENV)/.incomplete
	@touch $@
