# `make quickstart` and `make test` need Python >= 3.11 and nothing else; both work in .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LAUNCH := $(BIN)/accelerate launch --config_file launch/accelerate/cpu.yaml dist_cifar/train.py

# Debian's: the suite's cluster, mpirun, and a browser for the report.
TEST_PACKAGES := slurmctld slurmd slurm-client munge iproute2 procps openmpi-bin chromium

.PHONY: help quickstart test test-slurm test-packages lint types check clean

help:
	@echo "make quickstart   train a small network on two CPU ranks, on generated images"
	@echo "make test         run every test; those that this machine cannot run are skipped"
	@echo "make test-slurm   run the tests on a SLURM cluster, which as root it installs where apt-get can"
	@echo "make lint         check style and format"
	@echo "make types        check the types of the package"
	@echo "make check        lint, types, and the quick tests of the architecture, the config and the documents"
	@echo "make clean        remove .venv and runs/quickstart"

quickstart: $(VENV)/installed
	@rm -rf runs/quickstart
	$(LAUNCH) --config configs/quickstart.yaml
	@echo
	@echo "Next, the real job: CIFAR-10 on the same two ranks (downloads 170 MB):"
	@echo "  . $(BIN)/activate"
	@echo "  accelerate launch --config_file launch/accelerate/cpu.yaml dist_cifar/train.py --config configs/cpu_resnet20.yaml"

# The tests on a SLURM cluster and those of faults mostly wait: they run beside the others, and their output follows.
test: $(VENV)/installed-test
	@($(BIN)/python -m pytest tests/integration/slurm; slurm=$$?; $(BIN)/python -m pytest tests/integration/faults && exit $$slurm) \
		>$(VENV)/waiting.log 2>&1 & waiting=$$!; \
	$(BIN)/python -m pytest --ignore=tests/integration/slurm --ignore=tests/integration/faults; others=$$?; \
	wait $$waiting; waiting=$$?; cat $(VENV)/waiting.log; exit $$((others | waiting))

test-slurm: $(VENV)/installed-test test-packages
	DIST_CIFAR_SLURM=1 $(BIN)/python -m pytest tests/integration/slurm

# As another user than root, or without apt-get, it changes nothing: the tests then say what is missing.
test-packages:
	@(for name in slurmctld slurmd sbatch munged ip pgrep mpirun chromium; do command -v $$name || exit 1; done) >/dev/null || \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		apt-get -qq update && \
		DEBIAN_FRONTEND=noninteractive apt-get -qq install --no-install-recommends $(TEST_PACKAGES) >/dev/null; \
	fi

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed-test
	$(BIN)/mypy

# The quick tests of what a change breaks first; the blocks of the pages are run by `make test`.
check: lint types
	$(BIN)/python -m pytest -m "not slow" tests/test_architecture.py tests/config/test_load.py tests/optim/test_lr_schedule.py \
		tests/ops/test_philox.py tests/test_state.py tests/integration/documents/test_facts.py tests/integration/documents/test_readme.py tests/integration/documents/test_blocks.py

clean:
	rm -rf $(VENV) runs/quickstart

$(VENV)/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("dist_cifar needs Python >= 3.11, $(PYTHON) is " + sys.version.split()[0] + "; try make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(VENV)/installed-test: $(VENV)/installed
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	@touch $@
