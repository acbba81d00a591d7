# `make quickstart` and `make test` need Python >= 3.11 and nothing else; both work in .venv.

PYTHON ?= python3

# locked: the exact versions of requirements/. latest, lowest: the newest and the lowest that pyproject.toml allows.
PACKAGES ?= locked
ifeq ($(filter locked latest lowest,$(PACKAGES)),)
$(error PACKAGES=$(PACKAGES) is none of locked, latest, lowest)
endif
VENV := .venv$(filter-out -locked,-$(PACKAGES))
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
UV := .venv-uv/bin/uv
LAUNCH := $(BIN)/accelerate launch --config_file launch/accelerate/cpu.yaml dist_cifar/train.py

# Debian's: the suite's cluster, mpirun, and a browser for the report.
TEST_PACKAGES := slurmctld slurmd slurm-client munge iproute2 procps openmpi-bin mpich chromium g++

.PHONY: help quickstart test test-slurm test-packages lint types check docs lock clean require-python FORCE

help:
	@echo "make quickstart   train a small network on two CPU ranks, on generated images"
	@echo "make test         run every test; those that this machine cannot run are skipped"
	@echo "make test-slurm   run the tests on a SLURM cluster, which as root it installs where apt-get can"
	@echo "make lint         check style and format"
	@echo "make types        check the types of the package"
	@echo "make check        lint, types, and the quick tests of the architecture, the words, the config and the documents"
	@echo "make docs         write the generated parts of the documents: the references, tables and pictures"
	@echo "make lock         write requirements/ from pyproject.toml; UPGRADE=--upgrade takes the newest versions"
	@echo "make clean        remove .venv, those of PACKAGES=latest and lowest, and runs/quickstart"
	@echo
	@echo "PACKAGES=latest or PACKAGES=lowest, as in make test PACKAGES=lowest, installs the newest or the lowest versions that"
	@echo "pyproject.toml allows in a .venv of their own, instead of the locked ones."

quickstart: $(VENV)/installed
	@rm -rf runs/quickstart
	$(LAUNCH) --config configs/quickstart.yaml
	@echo
	@echo "Next, the real job: CIFAR-10 on the same two ranks (downloads 170 MB):"
	@echo "  . $(BIN)/activate"
	@echo "  accelerate launch --config_file launch/accelerate/cpu.yaml dist_cifar/train.py --config configs/cpu_resnet20.yaml"

# The tests on a SLURM cluster and those of faults mostly wait: they run beside the others, and their output follows.
# The package is compiled first: where PYTHONDONTWRITEBYTECODE is set, each of the hundreds of processes that the tests
# start would compile it for itself.
test: $(VENV)/installed-test
	@$(BIN)/python -m compileall -q dist_cifar
	@($(BIN)/python -m pytest tests/integration/slurm; slurm=$$?; $(BIN)/python -m pytest tests/integration/faults && exit $$slurm) \
		>$(VENV)/waiting.log 2>&1 & waiting=$$!; \
	$(BIN)/python -m pytest --ignore=tests/integration/slurm --ignore=tests/integration/faults; others=$$?; \
	wait $$waiting; waiting=$$?; cat $(VENV)/waiting.log; exit $$((others | waiting))

test-slurm: $(VENV)/installed-test test-packages
	DIST_CIFAR_SLURM=1 $(BIN)/python -m pytest tests/integration/slurm

# As another user than root, or without apt-get, it changes nothing: the tests then say what is missing.
test-packages:
	@(for name in slurmctld slurmd sbatch munged ip pgrep mpirun.openmpi mpirun.mpich chromium g++; do command -v $$name || exit 1; done) >/dev/null || \
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
	$(BIN)/python -m pytest -m "not slow" tests/test_architecture.py tests/test_words.py tests/config/test_load.py \
		tests/optim/test_lr_schedule.py tests/ops/test_philox.py tests/run/test_training_sums.py tests/integration/documents

# Everything in README.md and docs/ that comes from the config's fields, from docstrings or from benchmarks/results/.
docs: $(VENV)/installed-test
	$(BIN)/python benchmarks/publish/config_reference.py
	$(BIN)/python benchmarks/publish/api_reference.py
	$(BIN)/python benchmarks/publish/tables.py
	$(BIN)/python benchmarks/publish/tree_picture.py docs/tree.svg
	$(BIN)/python benchmarks/publish/plot.py benchmarks/results/augment.json docs/augment.png
	$(BIN)/python benchmarks/publish/plot.py benchmarks/results/peers.json docs/peers.png
	$(BIN)/python benchmarks/publish/plot.py benchmarks/results/time_to_accuracy.json benchmarks/results/accuracy.json \
		docs/time_to_accuracy.png
	@test -f runs/quickstart/report.html || { echo "docs/report.png stays: make quickstart first"; exit 0; } && \
	$(BIN)/python benchmarks/publish/report_picture.py runs/quickstart docs/report.png

# Universal: with markers for each Python and platform. The packages of the first file are those of the second, at the
# same versions, that running needs. A version that is locked stays while it fits, unless UPGRADE=--upgrade.
LOCK := DS_BUILD_OPS=0 UV_CUSTOM_COMPILE_COMMAND="make lock" $(UV) pip compile --quiet --universal --python-version 3.11 \
	--no-emit-index-url --no-annotate $(UPGRADE) pyproject.toml --group build

lock: $(UV)
	$(LOCK) --extra test --constraint requirements/chosen.txt --output-file requirements/test.txt
	$(LOCK) --constraint requirements/test.txt --output-file requirements/run.txt

clean:
	rm -rf .venv .venv-latest .venv-lowest .venv-uv runs/quickstart

$(UV): requirements/uv.txt
	$(PYTHON) -m venv --clear .venv-uv
	.venv-uv/bin/python -m pip install --quiet --disable-pip-version-check --requirement requirements/uv.txt
	@touch $@

require-python:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("dist_cifar needs Python >= 3.11, $(PYTHON) is " + sys.version.split()[0] + "; try make PYTHON=python3.12")'

ifeq ($(PACKAGES),locked)

# Another lock makes a new environment, in which nothing of the old one is left. Nothing but the lock is installed, hence
# --no-deps; what has to be built (this package and DeepSpeed) is built with the locked setuptools, hence without isolation.
$(VENV)/installed: pyproject.toml requirements/run.txt requirements/test.txt | require-python
	@cat requirements/run.txt requirements/test.txt | cmp --silent - $(VENV)/lock.txt || \
		{ $(PYTHON) -m venv --clear $(VENV) && \
		$(PIP) install --no-deps --requirement requirements/run.txt && \
		cat requirements/run.txt requirements/test.txt >$(VENV)/lock.txt; }
	$(PIP) install --no-deps --no-build-isolation --editable .
	@$(PIP) check
	@touch $@

$(VENV)/installed-test: $(VENV)/installed
	DS_BUILD_OPS=0 $(PIP) install --no-deps --no-build-isolation --requirement requirements/test.txt
	@$(PIP) check
	@touch $@

else

# Resolved anew each time, since what is newest changes; --exact removes what the last time left.
$(VENV)/installed: $(UV) FORCE | require-python
	@[ -d $(VENV) ] || $(PYTHON) -m venv --without-pip $(VENV)
	DS_BUILD_OPS=0 $(UV) pip install --quiet --python $(BIN)/python --exact --upgrade \
		--resolution $(if $(filter lowest,$(PACKAGES)),lowest-direct,highest) --editable '.[test]'
	@touch $@

$(VENV)/installed-test: $(VENV)/installed
	@touch $@

endif
