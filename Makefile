# The two commands of a fresh clone are `make train` and `make test`; both create .venv and install into it.
# TORCH_INDEX_URL names PyTorch's CPU wheel index, as PyTorch's install page gives it, for machines without a GPU.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INDEX := $(if $(TORCH_INDEX_URL),--extra-index-url $(TORCH_INDEX_URL))
READY := $(VENV)/.installed
# Environments of their own that share every package with $(VENV), except for triton, and for torch.
VENV36 := .venv-triton36
READY36 := $(VENV36)/.installed
VENV211 := .venv-torch211
READY211 := $(VENV211)/.installed
SPEC ?= specs/deepseek-v3-nano.yaml

.DEFAULT_GOAL := help

.PHONY: help
help: ## show this list
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

# torch comes first. A CUDA build pins its own triton, so the pin of constraints.txt only holds beside a CPU build.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	grep -v '^triton' constraints.txt > $(VENV)/constraints.txt
	$(BIN)/pip install --quiet --disable-pip-version-check $(INDEX) -c $(VENV)/constraints.txt torch
	if $(BIN)/python -c 'import sys, torch; sys.exit(torch.version.cuda is not None)'; then cp constraints.txt $(VENV)/constraints.txt; fi
	$(BIN)/pip install --quiet --disable-pip-version-check $(INDEX) -c $(VENV)/constraints.txt --editable '.[dev]'
	touch $@

.PHONY: install
install: $(READY) ## create .venv and install modelspec into it with what development needs

.PHONY: train
train: $(READY) ## train DeepSeek-V3's smallest sibling on real text, a few minutes on two cores; resumes an interrupted run
	$(BIN)/modelspec train $(SPEC) --resume

.PHONY: test
test: $(READY) ## run every test
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --dist loadfile

# What an environment lacks it takes from $(VENV).
define shared
packages() { $$1/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }; \
echo "import site; site.addsitedir('$$(packages $(VENV))')" > "$$(packages $(1))/shared.pth"
endef

$(READY36): $(READY)
	$(PYTHON) -m venv $(VENV36)
	$(VENV36)/bin/pip install --quiet --disable-pip-version-check --no-deps 'triton==3.6.*'
	$(call shared,$(VENV36))
	touch $@

$(READY211): $(READY)
	$(PYTHON) -m venv $(VENV211)
	$(VENV211)/bin/pip install --quiet --disable-pip-version-check $(INDEX) 'torch==2.11.*'
	$(call shared,$(VENV211))
	touch $@

.PHONY: triton36
triton36: $(READY36) ## run the kernels' tests, interpreted and compiled, with the oldest triton that they support
	OMP_NUM_THREADS=1 $(VENV36)/bin/python -m pytest tests/kernels

.PHONY: torch211
torch211: $(READY211) ## run the builders' and kernels' tests with the oldest torch that they support; brings its CUDA build
	OMP_NUM_THREADS=1 $(VENV211)/bin/python -m pytest --numprocesses auto --dist loadfile tests/builders tests/kernels

.PHONY: parity
parity: $(READY) ## hold every layout of four and eight processes against one process, some minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.parity

.PHONY: check
check: $(READY) ## run the linters and type checkers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pyright

.PHONY: format
format: $(READY) ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PHONY: bench
bench: $(READY) ## measure a training step beside transformers, and the start-up of commands
	$(BIN)/python benchmarks/train_step.py
	$(BIN)/python benchmarks/startup.py

# Needs torch and triton alone, so that a machine with a GPU can do without installing anything.
.PHONY: gpu
gpu: ## test the kernels on the GPU at hand and measure them, under 9 minutes; results go to OUT
	PYTHONPATH=. $(or $(wildcard $(BIN)/python),$(PYTHON)) -m benchmarks.gpu $(if $(OUT),--out $(OUT))

.PHONY: clean
clean: ## remove .venv, caches and builds; runs stay
	rm -rf $(VENV) $(VENV36) $(VENV211) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
