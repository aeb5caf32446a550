# make demo: the main job on real data.   make test: every check that CI makes.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --quiet --disable-pip-version-check --constraint constraints.txt
STAMP := .venv/.installed
# What is tested without kernels, too; the tests of kernels themselves choose them.
WITHOUT_KERNELS := tests/test_staleness.py $(addprefix tests/,core functional golden layers proxy quant_tensor quantizers)

.PHONY: demo test lint format benchmark clean

demo: $(STAMP)
	@echo "== training a small network at 8, 4 and 2 bits on handwritten digits"
	@$(BIN)/python examples/quickstart.py

lint: $(STAMP)
	@echo "== ruff: lint and format"
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --quiet --check .
	@echo "== mypy --strict"
	@$(BIN)/mypy
	@echo "== import-linter: every import goes down the floors"
	@$(BIN)/lint-imports --no-cache > .venv/imports.log || (cat .venv/imports.log; exit 1)

test: lint
	@echo "== examples, in short"
	@$(BIN)/python examples/quickstart.py --epochs 2 --output .venv/demo_output > .venv/demo.log || (cat .venv/demo.log; exit 1)
	@$(BIN)/python examples/custom_quantizer.py > .venv/custom.log || (cat .venv/custom.log; exit 1)
	@$(BIN)/python examples/mixed_precision.py > .venv/mixed.log || (cat .venv/mixed.log; exit 1)
	@$(BIN)/python examples/transformer.py > .venv/transformer.log || (cat .venv/transformer.log; exit 1)
	@$(BIN)/python examples/keyword_spotting.py --epochs 2 > .venv/keyword.log || (cat .venv/keyword.log; exit 1)
	@$(BIN)/python examples/quantize_a_model.py > .venv/quantize.log || (cat .venv/quantize.log; exit 1)
	@$(BIN)/python examples/ptq.py > .venv/ptq.log || (cat .venv/ptq.log; exit 1)
	@$(BIN)/python examples/new_format.py --epochs 3 > .venv/new_format.log || (cat .venv/new_format.log; exit 1)
	@$(BIN)/python examples/formats.py --output .venv/demo_output > .venv/formats.log || (cat .venv/formats.log; exit 1)
	@$(BIN)/torchrun --nproc-per-node 2 examples/distributed.py > .venv/distributed.log 2>&1 || (cat .venv/distributed.log; exit 1)
	@echo "== pytest"
	@$(BIN)/python -m pytest -q -n 2 -m "not exhaustive"
	@echo "== pytest of what has kernels, without them"
	@QFRAMEWORK_KERNELS=reference $(BIN)/python -m pytest -q -n 2 -m "not slow and not exhaustive" $(WITHOUT_KERNELS)

benchmark: $(STAMP)
	@$(BIN)/python -m benchmarks --check

format: $(STAMP)
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

$(STAMP): pyproject.toml constraints.txt
	@echo "== setting up .venv (once)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(PIP) torch
	@$(PIP) --editable ".[examples,dev]"
	@touch $(STAMP)

clean:
	rm -rf .venv demo_output build dist *.egg-info
