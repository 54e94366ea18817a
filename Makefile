# `make demo` runs the main job on a real kernel, `make test` every check. Both need nothing but Python >= 3.11 with
# venv, and Rust; they install the rest: Python packages into .venv, QEMU and a kernel (as root, with apt) for the lab.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CARGO_TARGET_DIR ?= $(CURDIR)/target
export CARGO_TARGET_DIR
RUST_SOURCES := $(shell find rust/src -name '*.rs') Cargo.toml Cargo.lock rust/Cargo.toml pyproject.toml

.PHONY: help demo test check format lint types rust-test rust-memory fuzz python-fuzz python-test judges wheel bench clean

help:
	@echo 'make demo    a file-backed disk on a real kernel: format, mount, copy, check (minutes)'
	@echo 'make test    every check: format, lint, types, Rust, Python, the lab'
	@echo 'make check   the fast ones only: no lab, no fuzzing'
	@echo 'make wheel   a manylinux wheel and the sdist, in dist/'
	@echo 'make bench   cost per command on the simulator, and beside nbdkit (minutes)'
	@echo 'make judges  libiscsi, sg3_utils and scsi_debug judge the emulation (many minutes)'
	@echo 'make fuzz    fuzz all targets (SECONDS=60 each)'

$(VENV)/bootstrap:
	@command -v cargo >/dev/null || { echo 'error: cargo is missing: install Rust >= 1.89 (https://rustup.rs)'; exit 1; }
	@$(PYTHON) -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' || \
	    { echo 'error: Python >= 3.11 with venv is needed (Debian: apt-get install python3-venv)'; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	@touch $@

# The package as users install it: a wheel, built from this tree.
$(VENV)/installed: $(VENV)/bootstrap $(RUST_SOURCES) $(shell find python handlers -name '*.py')
	$(BIN)/pip install --quiet --disable-pip-version-check .
	@touch $@

# The package for work on it: the tree itself, and the tools.
$(VENV)/develop: $(VENV)/bootstrap $(RUST_SOURCES)
	$(BIN)/pip install --quiet --disable-pip-version-check --group dev
	$(BIN)/pip uninstall --quiet --yes tcmu-rs
	$(BIN)/maturin develop --release --quiet
	@rm -f $(VENV)/installed
	@touch $@

demo: $(VENV)/bootstrap
	@test -e $(VENV)/develop || $(MAKE) --no-print-directory $(VENV)/installed
	$(BIN)/python -m tests.demo

test: format lint types rust-test rust-memory python-fuzz python-test
	@echo 'all checks passed'

check: format lint types rust-test
	$(BIN)/python -m pytest -m 'not lab and not slow'

format: $(VENV)/develop
	cargo fmt --check
	$(BIN)/ruff format --check .

lint: $(VENV)/develop
	$(BIN)/ruff check .
	cargo clippy --quiet --all-targets -- -D warnings
	PYO3_PYTHON=$(abspath $(BIN))/python cargo clippy --quiet --lib --features python -- -D warnings

types: $(VENV)/develop
	$(BIN)/mypy
	$(BIN)/python -m mypy.stubtest tcmu_rs._native

rust-test:
	cargo test --quiet

# AddressSanitizer and loom over the core, and every fuzz target for a short while with the kept corpus.
SECONDS ?= 10
rust-memory:
	rust/check-memory
	rust/fuzz/run $(SECONDS)

# The same for what Python parses.
python-fuzz: $(VENV)/develop
	$(BIN)/python -m tests.fuzz 2

fuzz: $(VENV)/develop
	rust/fuzz/run $(SECONDS)
	$(BIN)/python -m tests.fuzz $(SECONDS)

python-test: $(VENV)/develop
	@$(BIN)/python -m tests.lab install || echo 'the lab cannot be installed here: its tests are skipped'
	$(BIN)/python -m pytest -m 'not judges'

# libiscsi's suite, sg3_utils, scsi_debug: what docs/scsi.md says comes from here. Many minutes.
judges: $(VENV)/develop
	$(BIN)/python -m pytest -o faulthandler_timeout=4000 -m judges tests/guest

wheel: $(VENV)/bootstrap
	$(BIN)/pip install --quiet --disable-pip-version-check 'maturin>=1.9.4,<2'
	rm -rf dist
	$(BIN)/maturin build --release --compatibility pypi --out dist
	$(BIN)/maturin sdist --out dist
	@ls -l dist

bench: $(VENV)/develop
	$(BIN)/pip install --quiet --disable-pip-version-check --group bench
	$(BIN)/python -m bench.micro
	$(BIN)/python -m bench.simulator --quick
	$(BIN)/python -m bench.native --quick

clean:
	rm -rf $(VENV) target dist rust/fuzz/target
