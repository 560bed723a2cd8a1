# make demo: everything from an empty machine to the main job. make test: every test; without a GPU those that need one skip.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
# Those that go with this torch.
TRITON ?= triton==3.7.1
TORCHVISION ?= torchvision==0.28.0
# A test run without compiled kernels would say little; `make test RKFAST_CPU=auto` allows it.
RKFAST_CPU ?= 1
DEMO ?=
TESTS ?=

BIN := $(VENV)/bin
BUILT_FROM := pyproject.toml setup.py $(wildcard build_backend/*.py) $(shell find csrc -type f)
ifneq ($(shell uname -s),Linux)
TRITON :=
endif

.DELETE_ON_ERROR:
.PHONY: demo test lint bench clean

demo: $(VENV)/.demo
	$(BIN)/rkfast demo $(DEMO)

# A test on each core, and no threads within: those of one would wait for those of the other.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal $(TESTS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(VENV)/.dev
	$(BIN)/rkfast bench ops

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/python -m pip install '$(TORCH)'
	touch $@

$(VENV)/.demo: $(VENV)/.torch $(BUILT_FROM)
	$(BIN)/python -m pip install -e '.[demo]'
	touch $@

$(VENV)/.dev: $(VENV)/.torch $(BUILT_FROM)
	RKFAST_CPU=$(RKFAST_CPU) $(BIN)/python -m pip install -e '.[dev,demo,bench,train]' $(TRITON) $(TORCHVISION) timm lightning accelerate transformers
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info rkfast/_build.json rkfast/_C*.so rkfast/_cuda*.so
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
