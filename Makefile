# SPDX-License-Identifier: Apache-2.0
# Everything starts from a bare Debian 12 or 13: `make test` as root installs what is missing, builds the
# node tree under .cache/ and runs all tests. Without root the tests that need nodes are skipped.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help venv node check test test-gpu gpu-kit demo bench clean

PYTHON ?= python3
# The Python that has PyTorch.
GPU_PYTHON ?= python3
# Such as: -k "share or guard".
GPU_ARGS ?=
# Such as: -n 2 --all-cells (docs/tests.md).
PYTEST_ARGS ?= -n 2
# Emulated machines are a processor each: no more of them at a time, whatever PYTEST_ARGS says.
MACHINE_ARGS ?= -n 2
DIST := --dist loadfile --no-loadscope-reorder
BIN := .venv/bin
STAMP := .venv/.installed
# What the tests and the node tree need of the host, beyond make and a shell.
PACKAGES := binutils ca-certificates debian-archive-keyring e2fsprogs gcc iproute2 libc6-dev mmdebstrap python3 python3-venv \
	qemu-system-x86 util-linux xz-utils

help: ## this list
	@grep -hE '^[a-z]+:.*## ' Makefile | sed -E 's/^([a-z]+):.*## /\1\t/' | expand -t 10

venv: $(STAMP) ## .venv with cryoci (editable) and its tools; installs missing Debian packages

$(STAMP): pyproject.toml
	@missing=$$(for p in $(PACKAGES); do \
	    dpkg-query -W -f '$${Status}' $$p 2>/dev/null | grep -q 'ok installed' || echo $$p; done | xargs); \
	if [ -n "$$missing" ]; then \
	    if ! command -v apt-get >/dev/null; then echo "make: this needs Debian 12 or 13 (no apt-get here)" >&2; exit 1; fi; \
	    if [ "$$(id -u)" != 0 ]; then \
	        echo "make: not root, and these packages are missing: $$missing" >&2; \
	        echo "make: run as root: apt-get install $$missing" >&2; exit 1; fi; \
	    apt-get -qq update; \
	    DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends $$missing >/dev/null; \
	fi
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "make: $(PYTHON) is older than 3.11" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install -q --disable-pip-version-check "setuptools>=77" -e '.[dev]'
	@touch $@

node: venv ## build the node tree, its layers and the machine image (root; about 2 minutes, then cached)
	@$(BIN)/python -m tests.nodes

check: venv ## ruff (lint and format) and mypy --strict
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/mypy --explicit-package-bases tests bench

test: venv ## check, then every test that this machine can run
	@# Reports are looked at in a browser; `make demo` needs none.
	@if [ "$$(id -u)" = 0 ] && ! command -v chromium >/dev/null; then apt-get -qq update; \
	    DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends chromium >/dev/null; fi
	@# mypy takes one processor, and so does most of what makes the nodes.
	@if [ "$$(id -u)" = 0 ]; then $(MAKE) --no-print-directory --jobs=2 --output-sync check node; \
	else $(MAKE) --no-print-directory check; echo "make: not root, so tests that need nodes are skipped"; fi
	@# Emulated machines (one processor each, two at a time) starve beside other tests: they go first. What fails beside
	@# others runs once more, alone; the report says so. Files go whole to a worker, those with nodes first: xdist's own
	@# way hands out the first eighth of all tests, which is nearly every one with a node, to the first worker at once.
	@failed=0; \
	if [ "$$(id -u)" = 0 ]; then \
	    $(BIN)/pytest $(PYTEST_ARGS) $(MACHINE_ARGS) $(DIST) -m machine || { \
	        echo "make: once more, what failed in emulated machines"; \
	        $(BIN)/pytest -m machine --last-failed || failed=1; }; fi; \
	$(BIN)/pytest $(PYTEST_ARGS) $(DIST) -m "not machine" || { echo "make: once more, alone, what failed beside others"; \
	    $(BIN)/pytest -m "not machine" --last-failed || failed=1; }; \
	exit $$failed

test-gpu: ## the suite on this machine's real NVIDIA GPU (root; needs PyTorch, criu, runc, crun)
	$(GPU_PYTHON) -m pytest -v -s -p no:cacheprovider tests/gpu $(GPU_ARGS)

gpu-kit: venv ## build/gpu-kit.tar.xz: criu, runc, crun and packages for a GPU machine that has none
	$(BIN)/python -m tests.gpu.kit build/gpu-kit.tar.xz

demo: venv ## checkpoint a container, push it, restore it on another node (root)
	@$(BIN)/python -m tests.demo

bench: venv ## the benchmarks and how to run one
	@ls bench/*.py 2>/dev/null | sed 's|^|$(BIN)/python |' || echo "no benchmarks yet"

clean: ## remove everything that was built, but for .venv
	rm -rf .cache build dist *.egg-info .coverage .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
