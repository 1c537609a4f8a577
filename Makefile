# Everything works on a fresh machine with Python 3.11: each target sets up what it needs.
PYTHON  ?= python3.11
PROFILE ?= smol
WORKDIR ?= runs
SEED    ?= 0
SET     ?=
VENV    := .venv
BIN     := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help install run test lint results images images-push images-pin images-test clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-11s %s\n", $$1, $$2}'

install: $(VENV)/.installed ## make .venv with the pinned packages

# torch first: no other package may choose its version.
$(VENV)/.installed: requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check $$(grep '^torch==' requirements.lock)
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps -e .
	@touch $@

run: install ## run the whole pipeline here (PROFILE=smol|tiny WORKDIR=runs SEED=0 SET="key=value ...")
	$(BIN)/saferlhf run --profile $(PROFILE) --workdir $(WORKDIR) --seed $(SEED) $(foreach s,$(SET),--set $(s))

test: install lint ## check style and types, run all tests
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -q -n 2 --dist loadgroup \
		--at-least golden=15 --at-least end_to_end=12 --at-least fault=100

lint: install ## ruff and mypy
	$(BIN)/ruff check components pipelines images tests
	$(BIN)/ruff format --check components pipelines images tests
	$(BIN)/mypy

results: install ## run three seeds (an hour) and write the README's results table
	for seed in 0 1 2; do $(MAKE) run PROFILE=smol SEED=$$seed WORKDIR=runs/seed-$$seed || exit 1; done
	$(BIN)/python -m tests.benchmarks.results runs/seed-0 runs/seed-1 runs/seed-2

# REGISTRY, TAG, BUILDER, PIP_CONF, BUILD_OPTIONS, ...: see images/README.md. What is set on make's command line is in
# the script's environment.
images: ## build the container images (IMAGE="service trainer rollout" REGISTRY=localhost)
	images/build.sh build $(IMAGE)

images-push: ## push them and print their digests (REGISTRY=registry.example.com/team)
	images/build.sh push $(IMAGE)

images-pin: ## write the registry's present digests of the base images into images/bases.env
	images/build.sh pin

images-test: install ## build images here and run the pipeline in containers (as root, with podman; minutes)
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -q -s tests/containers --at-least containers=20

clean: ## remove .venv and caches (work folders are kept)
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache *.egg-info
