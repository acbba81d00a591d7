# `make quickstart` and `make test` need Python >= 3.11 and nothing else; both work in .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LAUNCH := $(BIN)/accelerate launch --config_file launch/accelerate/cpu.yaml dist_cifar/train.py

# Debian's; the suite's cluster and its other launchers.
TEST_PACKAGES := slurmctld slurmd slurm-client munge iproute2 openmpi-bin

.PHONY: help quickstart test test-slurm test-packages lint clean

help:
	@echo "make quickstart   train a small network on two CPU ranks, on generated images"
	@echo "make test         run every test"
	@echo "make test-slurm   run the tests on a real SLURM of three nodes, as root; installs Debian's packages for it"
	@echo "make lint         check style and format"
	@echo "make clean        remove .venv and runs/quickstart"

quickstart: $(VENV)/installed
	@rm -rf runs/quickstart
	$(LAUNCH) --config configs/quickstart.yaml
	@echo
	@echo "Next, the real job: CIFAR-10 on the same two ranks (downloads 170 MB):"
	@echo "  . $(BIN)/activate"
	@echo "  accelerate launch --config_file launch/accelerate/cpu.yaml dist_cifar/train.py --config configs/cpu_resnet20.yaml"

test: $(VENV)/installed-test
	$(BIN)/python -m pytest

test-slurm: $(VENV)/installed-test test-packages
	$(BIN)/python -m pytest tests/slurm

test-packages:
	@(for name in slurmctld slurmd munged ip mpirun; do command -v $$name >/dev/null || exit 1; done) || { \
	    [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null || { echo "please install $(TEST_PACKAGES)"; exit 1; }; \
	    apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends $(TEST_PACKAGES); }

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) runs/quickstart

$(VENV)/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("dist_cifar needs Python >= 3.11, $(PYTHON) is " + sys.version.split()[0] + "; try make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	@touch $@
