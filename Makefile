# make train    set everything up and run the whole job: train, quantise, write the artifact, read it back, score it
# make test     set everything up and run linter, type checker and tests (those that need a GPU run where there is one)
#
# make train PRESET=one-gpu ARGS="--seed 42"    another preset and further options

PYTHON ?= python3
VENV   ?= .venv
PRESET ?= sample
ARGS   ?=
BIN    := $(VENV)/bin
# Two processes, as two cores or a small GPU have room for; one thread of torch in each.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

.PHONY: train test lint clean

train: $(VENV)/ready
	$(BIN)/python train.py --preset $(PRESET) $(ARGS)

test: lint
	$(PYTEST) $(ARGS)
	TRITON_INTERPRET=1 $(PYTEST) tests/test_adapters.py tests/test_attention.py tests/test_attention_input.py \
		tests/test_cached_attention.py tests/test_cross_entropy.py tests/test_gptq_kernel.py tests/test_int6.py \
		tests/test_launch.py tests/test_mlp.py tests/test_newton_schulz.py tests/test_optimizer.py tests/test_residual.py

lint: $(VENV)/ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/ready: requirements.txt constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python %d.%d found, 3.11 or later wanted (make PYTHON=...)" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement requirements.txt --constraint constraints.txt
	@touch $@

$(VENV)/ready-dev: $(VENV)/ready requirements-dev.txt
	$(BIN)/python -m pip install --quiet --requirement requirements-dev.txt --constraint constraints.txt
	@touch $@

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache
