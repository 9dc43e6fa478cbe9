# SPDX-License-Identifier: BSD-3-Clause
# The commands of this project. Everything happens in $(VENV), made from the lock in requirements/;
# stamp files there say what is done, so that a second call installs nothing again.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
# Random calls of the C++ operators that `make sanitize` makes, and where they begin.
CALLS ?= 1000000

# How long `make fuzz` looks, and where it begins: another SEED, other cases.
SECONDS ?= 600
SEED ?= 0
# One more than two cores: tests of several ranks wait for each other a good part of their time.
JOBS ?= 3

BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check
# Another PYTHON has another stamp, so it gets a fresh environment.
MADE := $(VENV)/.made-by-$(notdir $(PYTHON))
RUN := $(VENV)/.requirements-run
TEST := $(VENV)/.requirements-test
LINT := $(VENV)/.requirements-lint
TYPES := $(VENV)/.requirements-types
MUTATE := $(VENV)/.requirements-mutate
WHEEL := $(VENV)/.requirements-wheel
BUILT := $(VENV)/.built

# Systems that people train with, each in an environment of its own: what they pin contradicts what
# we pin, and each other. One takes from $(VENV) whatever its own lock leaves open, torch above all.
ENGINES := $(patsubst requirements/engines/%.txt,%,$(wildcard requirements/engines/*.txt))
ENGINE ?= $(ENGINES)
TEST_ENGINES := $(addprefix test-engine-,$(ENGINE))

CSRC := $(wildcard csrc/*.h csrc/*.cpp csrc/*.cu csrc/*.cuh)

.PHONY: help venv build test test-slow test-engines $(TEST_ENGINES) fuzz mutate sanitize lint types format \
  demo study bench bench-sharded table gpu profile wheel wheel-test clean distclean

help: ## this text
	@sed -n 's/^\([a-z-]*\):[^#]*## /  \1|/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "%-13s %s\n", $$1, $$2}'
	@echo "  variables: PYTHON=python3.12  VENV=.venv  ARGS='-k adamw' (for the tests, demo, study, bench, gpu, profile)"

venv: $(RUN) $(TEST) $(LINT) ## create .venv and install every pinned requirement

build: $(BUILT) ## compile the extension and install dgg, editable (again: make -W setup.py build)

# Always the pytest command: `python -m pytest` would put the repository root on sys.path, where
# kernels/ shadows Hugging Face's library of that name.
# A file's tests stay together: they share what they have built.
test: $(BUILT) $(TEST) ## run the tests, on two cores (JOBS=1 for one)
	$(BIN)/pytest -n $(JOBS) --dist loadfile $(ARGS)

test-slow: $(BUILT) $(TEST) ## run the tests that `make test` leaves out
	$(BIN)/pytest -m slow $(ARGS)

# -P for the same reason as in `test`.
test-engines: $(TEST_ENGINES) ## run dgg in LLaMA-Factory, axolotl and others (ENGINE=axolotl for one), pinned
$(TEST_ENGINES): test-engine-%: build/engines/%/.made
	build/engines/$*/bin/python -P -m pytest --timeout 1200 tests/engines/test_$*.py $(ARGS)

mutate: $(BUILT) $(MUTATE) ## change lines of dgg/ and see that a test notices each; half an hour
	$(BIN)/python -P tests/mutate.py $(ARGS)

sanitize: $(BUILT) $(TEST) ## send CALLS random calls through a C++ library that checks itself
	$(BIN)/python -P tests/sanitized.py --calls $(CALLS) --seed $(SEED) $(ARGS)

fuzz: $(BUILT) $(TEST) ## random lives and hostile states against a float64 model, SECONDS=600 in all
	$(BIN)/python -P tests/fuzz_machine.py --seconds $$(( $(SECONDS) * 2 / 3 )) --seed $(SEED) $(ARGS)
	$(BIN)/python -P tests/fuzz_hostile.py --seconds $$(( $(SECONDS) / 3 )) --seed $(SEED)

lint: $(LINT) ## check style and formatting
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(if $(CSRC),$(BIN)/clang-format --dry-run -Werror $(CSRC))

types: $(BUILT) $(TYPES) ## check the types, with mypy and pyright, of the package and of a script
	$(BIN)/pytest -m "slow or not slow" tests/test_types.py $(ARGS)

format: $(LINT) ## apply style and formatting
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(if $(CSRC),$(BIN)/clang-format -i $(CSRC))

demo: $(BUILT) ## six tasks with and without guidance, three seeds; goes on where it was; writes build/demo
	$(BIN)/python bench/demo.py --out build/demo $(ARGS)

study: $(BUILT) ## the evidence: all beds, 20 seeds; goes on where it was; writes runs/study
	$(BIN)/python bench/study/run.py --out runs/study $(ARGS)

bench: $(BUILT) $(TEST) ## time every backend against eager PyTorch
	$(BIN)/python bench/step.py $(ARGS)

bench-sharded: $(BUILT) $(TEST) ## time sharded steps on 1, 2 and 4 ranks, count what they send
	$(BIN)/python bench/sharded.py $(ARGS)

table: $(BUILT) $(TEST) ## write docs/compatibility.md's table from the marks of the tests
	$(BIN)/python -P tests/compatibility.py --write docs/compatibility.md

# No environment: a machine with a GPU is taken as it is, with its own torch, and without a network.
gpu: ## build, check, measure, test on this machine's GPU with its own $(PYTHON); 14 minutes at most
	$(PYTHON) bench/gpu/run.py $(ARGS)

profile: $(BUILT) $(TEST) ## profile a LoRA step: nsys where there is one, else torch.profiler
	$(BIN)/python bench/gpu/nsys_step.py --launch --out build/profile $(ARGS)

wheel: $(WHEEL) ## build what is released into dist/ and check it: sources, a binary and a pure wheel
	$(BIN)/python tests/wheels.py build $(ARGS)

wheel-test: $(MADE) ## try the wheels of dist/ in fresh environments, with every Python that is here
	$(BIN)/python tests/wheels.py test $(ARGS)

clean: ## remove what was built, demo results included; keeps .venv
	rm -rf build dist *.egg-info dgg/_C*.so dgg/_build_error*.txt $(BUILT)
	rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find dgg kernels tests bench -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## clean, and remove .venv
	rm -rf $(VENV)

$(MADE):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "dgg needs Python >= 3.10; say which: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(if $(wildcard $(VENV)/.made-by-*),--clear) $(VENV)
	@touch $@

$(RUN): $(MADE) requirements/run.txt
	$(PIP) install -r requirements/run.txt
	@touch $@

# DeepSpeed has no wheel and must not bring another torch along.
$(TEST): $(RUN) requirements/test.txt requirements/deepspeed.txt
	$(PIP) install -r requirements/test.txt
	DS_BUILD_OPS=0 $(PIP) install --no-build-isolation --no-deps -r requirements/deepspeed.txt
	@touch $@

# --no-deps: a lock names all that is installed, so that nothing brings another torch along.
build/engines/%/.made: requirements/engines/%.txt $(TEST) | $(BUILT)
	$(BIN)/python -m venv --clear --without-pip $(@D)
	$(BIN)/python -c 'import sysconfig as s; print("import site; site.addsitedir(%r)" % s.get_path("purelib"))' \
	  > $$($(@D)/bin/python -c 'import sysconfig as s; print(s.get_path("purelib"))')/of_the_tests.pth
	$(@D)/bin/python -P -m pip --disable-pip-version-check install --no-compile --no-deps -r $<
	@touch $@

$(MUTATE): $(TEST) requirements/mutate.txt
	$(PIP) install -r requirements/mutate.txt
	@touch $@

$(TYPES): $(TEST) requirements/types.txt
	$(PIP) install -r requirements/types.txt
	@touch $@

$(WHEEL): $(RUN) requirements/wheel.txt
	$(PIP) install -r requirements/wheel.txt
	@touch $@

$(LINT): $(MADE) requirements/lint.txt
	$(PIP) install -r requirements/lint.txt
	@touch $@

# No build isolation: the extension is compiled against the torch that it will run with.
$(BUILT): $(RUN) pyproject.toml setup.py $(CSRC)
	$(PIP) install --no-build-isolation --no-deps -e .
	@touch $@
