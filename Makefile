# `make demo` and `make test` work on a fresh machine with Python 3.11 to 3.13 and a package index.

PYTHON ?=
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
TORCH  := $(shell grep '^torch==' constraints.txt)
# For the vocabulary that it ships, without the vision packages that it depends on.
CLIP   := open_clip_torch==3.3.0
EXTRAS := export,ort,graphsurgeon,simplify,trt-rtx,report,ui,sweep,ray,dev

PYTHON310 ?=
TPU       := .venv-tpu

# A terminal's colours and a developer's own settings must not decide whether tests pass.
export PYTHONUTF8 := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_ROOT_USER_ACTION := ignore

.DEFAULT_GOAL := help
.PHONY: help venv demo test quick lint docs format bench optimum tpu-env browser ui clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(STAMP) ## Make .venv with the tested versions (PYTHON=python3.12 picks another Python)

# torch comes first and through pip, which also sees a CPU build that the machine serves;
# uv then installs the rest in seconds.
$(STAMP): pyproject.toml constraints.txt
	@python=$$(./.ci/find-python $(PYTHON)) && echo "making $(VENV) with $$python" \
		&& "$$python" -m venv --clear $(VENV)
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt $(TORCH) uv
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt \
		--editable '.[$(EXTRAS)]'
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps $(CLIP)
	@touch $@

demo: $(STAMP) ## Export, optimize, build and run the digits model; leaves a PNG sheet and a summary
	@$(BIN)/python examples/demo.py

test: lint ## Lint, types and every test (about 32 minutes on 2 cores)
	@$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

quick: $(STAMP) ## The tests without the slow ones
	@$(BIN)/python -m pytest -m 'not slow'

lint: $(STAMP) ## Ruff and mypy, changing nothing
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

docs: $(STAMP) ## Write docs/passes.md from the passes themselves
	@$(BIN)/python -m sdopt passes --markdown > docs/passes.md

format: $(STAMP) ## Let ruff format and fix what it can
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

bench: $(STAMP) ## Time and memory on a full-size SD1.5, beside other tools (needs 24 GB and 20 GB disk)
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt \
		--editable '.[bench]'
	@$(BIN)/python benchmarks/compile.py

# optimum-onnx 0.1 needs transformers below 4.58, so it gets an environment of its own.
optimum: $(STAMP) ## Run a bundle with Hugging Face optimum's pipeline, in .venv-optimum
	@test -d .venv-optimum || $(BIN)/python -m venv .venv-optimum
	@.venv-optimum/bin/python -m pip install --quiet $(TORCH)
	@$(BIN)/uv pip install --quiet --python .venv-optimum/bin/python \
		optimum-onnx==0.1.0 transformers==4.57.6 diffusers==0.39.0 onnxruntime==1.31.1 $(TORCH)
	@$(BIN)/sdopt export examples/digits -o build/optimum --dtype fp32
	@.venv-optimum/bin/python examples/optimum/check.py build/optimum examples/digits

# tpu_mlir is built for Python 3.10 and wants packages of 2023, so it gets an environment of its own;
# sdopt runs its tools as commands. The tests find it there.
tpu-env: $(TPU)/.installed ## Sophgo's compiler in .venv-tpu (PYTHON310=... picks a Python 3.10)

$(TPU)/.installed: constraints-tpu.txt
	@python=$$(./.ci/find-python310 $(PYTHON310)) && echo "making $(TPU) with $$python" \
		&& "$$python" -m venv --clear $(TPU)
	@$(TPU)/bin/python -m pip install --quiet uv
	@$(TPU)/bin/uv pip install --quiet --python $(TPU)/bin/python --no-deps -r constraints-tpu.txt
	@touch $@

# The pages that sdopt writes are looked at by a real browser; as root on Debian it is installed.
browser: ## Chromium for the tests of pages
	@./.ci/find-chromium 2>/dev/null || { apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
		apt-get install -y -qq --no-install-recommends chromium >/dev/null; } \
		|| ./.ci/find-chromium

# The digits model as a bundle, and as one file to be exported from the page.
ui: $(STAMP) ## Serve the page of `sdopt ui` over the digits model, in build/ui
	@mkdir -p build/ui
	@$(BIN)/sdopt export examples/digits -o build/ui/digits --dtype fp32
	@test -f build/ui/digits.safetensors \
		|| $(BIN)/python examples/digits/single_file.py -o build/ui/digits.safetensors
	@$(BIN)/sdopt ui --root build/ui

clean: ## Remove .venv, caches and what the demo left
	@rm -rf $(VENV) demo build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
