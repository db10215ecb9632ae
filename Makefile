# Every target makes its own .venv on a machine with nothing but Python >= 3.10, pip and make.
PYTHON ?= python3
VENV ?= .venv
PRESET ?= clm
DEMO_OUTPUT ?= demo-output
DEMO_ARGS ?=
PYTEST_ARGS ?=
PYTEST_WORKERS ?= 2
TORCH ?= torch==2.13.0

PY := $(VENV)/bin/python
STAMP := $(VENV)/.dpsm_hf-installed
DEEPSPEED_VENV := $(VENV:%/=%)-deepspeed
DEEPSPEED_PY := $(DEEPSPEED_VENV)/bin/python
DEEPSPEED_STAMP := $(DEEPSPEED_VENV)/.installed
OLDEST_VENV := $(VENV:%/=%)-oldest
OLDEST_PY := $(OLDEST_VENV)/bin/python
OLDEST_STAMP := $(OLDEST_VENV)/.installed
# The lower bounds of setup.cfg, which a test compares with these, and the tests that chose them. From the registry torch
# is a CUDA build there (4 GB to download, 6.3 GB on disk); pip takes a build for the CPU where it finds one.
OLDEST := torch==2.8.0 transformers==5.18.0 accelerate==1.12.0 datasets==4.5.0 peft==0.19.0 huggingface_hub==1.33.0
CORE_TESTS := tests/training/test_equal_to_trainer.py tests/training/test_trainer_features.py tests/head/test_head.py \
  tests/evaluation/test_trainer_evaluation.py tests/models/test_own_loss.py tests/tasks/test_run_clm.py \
  tests/tasks/test_command_line.py

.DEFAULT_GOAL := help
.PHONY: help venv demo docs test deepspeed test-deepspeed oldest test-oldest bench lint format clean

help: ## Show this list
	@echo "make <target>   (PYTHON=$(PYTHON) VENV=$(VENV))"
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  \1\t\2/' | expand -t 20

venv: $(STAMP) ## Create .venv with the tested versions and this package (editable)

# torch goes first and alone: a build of it that is already at hand (a CPU wheel, say) then satisfies
# the requirement, and the big download is not repeated when another package fails to install.
$(STAMP): setup.cfg constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "error: '$(PYTHON)' is missing or older than Python 3.10. Name another one: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -c 'import venv' || { \
	  echo "error: '$(PYTHON)' has no venv module. On Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@if test -x $(PY) && $(PY) -m pip --version >/dev/null 2>&1; then :; \
	elif $(PYTHON) -c 'import ensurepip' >/dev/null 2>&1; then echo "creating $(VENV)"; $(PYTHON) -m venv --clear $(VENV); \
	elif $(PYTHON) -m pip --version >/dev/null 2>&1; then echo "creating $(VENV) (pip from the system)"; \
	  $(PYTHON) -m venv --clear --without-pip $(VENV) && $(PYTHON) -m pip --python $(PY) install pip; \
	else echo "error: '$(PYTHON)' has neither ensurepip nor pip. On Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; fi
	@echo "installing $(TORCH) (the biggest download; pip says nothing until it is done)"
	@$(PY) -m pip install -qq "$(TORCH)" -c constraints.txt
	@echo "installing this package and what it needs (some minutes)"
	@$(PY) -m pip install -qq -e ".[test]" -c constraints.txt
	@touch $@

demo: $(STAMP) ## Train one model with ce, brier and dpsm on real text and compare; PRESET=clm|summarization|finetune
	$(PY) -m dpsm_hf demo --preset $(PRESET) --output_dir $(DEMO_OUTPUT) $(DEMO_ARGS)

docs: $(STAMP) ## Build the documentation site into build/site; every warning is an error
	@$(PY) -c 'import mkdocs, mkdocstrings, material' 2>/dev/null || $(PY) -m pip install -qq -e ".[docs]" -c constraints.txt
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build -q
	@echo "build/site/index.html"

# Two workers halve the time; one thread each keeps them out of each other's way and sums in one order.
test: $(STAMP) ## Run the unit, integration and distributed tests; PYTEST_ARGS="-k name"
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(PY) -m pytest -n $(PYTEST_WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

# DeepSpeed has an environment of its own, on top of the other: where it is installed Accelerate imports it in every run.
$(DEEPSPEED_STAMP): $(STAMP)
	@c++ --version >/dev/null || { \
	  echo "error: DeepSpeed compiles its communication and needs a C++ compiler. On Debian and Ubuntu: apt-get install g++" >&2; exit 1; }
	@echo "installing DeepSpeed into $(DEEPSPEED_VENV)"
	@$(PY) -m venv --clear --without-pip $(DEEPSPEED_VENV)
	@$(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > \
	  "$$($(DEEPSPEED_PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/below.pth"
	@$(PY) -m pip install -qq "pip>=22.3"  # the first that knows --python
	@$(PY) -m pip --python $(DEEPSPEED_PY) install -qq "deepspeed>=0.17" -c constraints.txt
	@touch $@

deepspeed: $(DEEPSPEED_STAMP) ## Create .venv-deepspeed, which test-deepspeed needs

test-deepspeed: $(DEEPSPEED_STAMP) ## Run the tests over sharded weights with DeepSpeed too, on the CPU
	OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu $(DEEPSPEED_PY) -m pytest tests/distributed/test_sharded.py $(PYTEST_ARGS)

# Like DeepSpeed's: an environment on top of the other, with the oldest versions in front.
$(OLDEST_STAMP): $(STAMP)
	@echo "installing the oldest versions into $(OLDEST_VENV)"
	@$(PY) -m venv --clear --without-pip $(OLDEST_VENV)
	@$(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > \
	  "$$($(OLDEST_PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/below.pth"
	@$(PY) -m pip install -qq "pip>=22.3"  # the first that knows --python
	@$(PY) -m pip --python $(OLDEST_PY) install -qq $(OLDEST)
	@touch $@

oldest: $(OLDEST_STAMP) ## Create .venv-oldest, which test-oldest needs

test-oldest: $(OLDEST_STAMP) ## Run the core tests with the oldest versions that setup.cfg allows
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(OLDEST_PY) -m pytest $(CORE_TESTS) $(PYTEST_ARGS)

bench: $(STAMP) ## Time the head, training steps and growth against others (half an hour, on a quiet machine); BENCH_ARGS
	$(PY) -m benchmarks $(BENCH_ARGS)

lint: $(STAMP) ## Check style (ruff), formatting (ruff format) and types (mypy)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy dpsm_hf

format: $(STAMP) ## Rewrite the sources in the project's style
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

clean: ## Remove what the tools left behind (not .venv, not the demo's runs)
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find dpsm_hf tests -name __pycache__ -type d -prune -exec rm -rf {} +
