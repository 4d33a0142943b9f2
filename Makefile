# Every target makes .venv and installs what it needs, once; native sources are rebuilt when they changed.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
NATIVE := $(wildcard native/*)

.PHONY: demo test fix check bench build clean
.DELETE_ON_ERROR:

DEMO := build/demo
demo: .venv/.base .venv/.accelerate
	@echo "==> a real answer from SmolLM2-135M (fetched once)"
	$(BIN)/miaotui run demo "What is gravity?" --max-tokens 64 --temperature 0 --stats
	@echo "==> its weights as bfloat16, and the fastest form of those that keeps their quality: three minutes"
	@$(BIN)/python -m benchmarks.dense_folder $(DEMO)/smollm2-bf16
	@rm -rf $(DEMO)/fast
	$(BIN)/miaotui accelerate $(DEMO)/smollm2-bf16 --goal latency --floor 1% --budget 3m --explain -o $(DEMO)/fast
	$(BIN)/miaotui run $(DEMO)/fast "What is gravity?" --max-tokens 64 --temperature 0 --stats

test: .venv/.dev .venv/.base
	@echo "==> tests (CPU only)"
	$(BIN)/python -m pytest

fix: .venv/.dev
	@echo "==> mend formatting, what ruff can mend, and the pages that are made from the code"
	$(BIN)/ruff check --fix -q . || true
	$(BIN)/ruff format .
	$(BIN)/clang-format -i native/*.cpp native/*.h
	$(BIN)/python tools/cli_reference.py
	$(BIN)/python tools/support_matrix.py

check: .venv/.dev .venv/.base
	@echo "==> lint, format, types, import rows"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror native/*.cpp native/*.h
	$(BIN)/mypy --strict src
	$(BIN)/lint-imports

bench: .venv/.base
	@echo "==> every regime on the demo model; JSON in benchmarks/results/local/"
	@mkdir -p benchmarks/results/local
	$(BIN)/miaotui bench demo --json > benchmarks/results/local/demo.json
	@echo "wrote benchmarks/results/local/demo.json"

build: .venv/.base

clean:
	@echo "==> remove build trees and caches; .venv stays"
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

.venv/.tools: pyproject.toml constraints.txt
	@echo "==> create .venv with the build tools ($(PYTHON))"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['build-system']['requires'], sep='\n')" > .venv/build-requires.txt
	$(PIP) install -c constraints.txt -r .venv/build-requires.txt setuptools
	@touch $@

.venv/.base: .venv/.tools CMakeLists.txt $(NATIVE)
	@echo "==> install miaotui (editable) and compile its native kernels"
	$(PIP) install --no-build-isolation -c constraints.txt -e .
	@touch $@

.venv/.accelerate: pyproject.toml constraints.txt | .venv/.base
	@echo "==> install what accelerate needs (PyTorch, Optuna)"
	$(PIP) install --no-build-isolation -c constraints.txt -e '.[accelerate]'
	@touch $@

.venv/.dev: pyproject.toml constraints.txt | .venv/.base
	@echo "==> install what tests and checks need (PyTorch, transformers, linters)"
	$(PIP) install --no-build-isolation -c constraints.txt -e '.[reference,compress,accelerate,eval,dev]'
	@touch $@
