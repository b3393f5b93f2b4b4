# Everything a newcomer needs. Each target does its own set-up: Python 3.11 or 3.12, make and a package index.
SHELL := /bin/sh
VENV := .venv
BIN := $(VENV)/bin
CONSTRAINTS := conf/constraints.txt
STAMP := $(VENV)/.installed

.PHONY: help setup demo run test docs drills soak check format bench bench-bytecodes bench-smtp bench-tracking bench-engagement clean

help:  ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' Makefile

setup: $(STAMP)  ## Make the virtual environment in .venv

$(STAMP): setup.cfg setup.py $(CONSTRAINTS)
	@python=''; for candidate in $(BIN)/python $(PYTHON) python3.12 python3.11 python3; do \
	  if $$candidate -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' 2>/dev/null; then python=$$candidate; break; fi; \
	done; \
	if [ -z "$$python" ]; then echo 'Relay needs Python 3.11 or 3.12; install one, or say make PYTHON=/path/to/python3.12' >&2; exit 1; fi; \
	echo "setting up $(VENV) with $$($$python --version)"; \
	[ "$$python" = $(BIN)/python ] || $$python -m venv --clear $(VENV)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c $(CONSTRAINTS) setuptools wheel
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-build-isolation -c $(CONSTRAINTS) -e '.[test,check,docs]'
	@touch $(STAMP)

demo: $(STAMP)  ## Start everything, send three mails, show what became of them, stop everything
	@$(BIN)/python scripts/demo.py

run: $(STAMP)  ## Development stack in the foreground (NATS 4222, SMTP 1025, health 8080); Ctrl-C stops it
	@$(BIN)/relayctl start --dev --foreground

test: $(STAMP)  ## Run every fast test
	@$(BIN)/python -m pytest -n 2 --dist loadfile

docs: $(STAMP)  ## Build the documentation into var/site; a broken link fails
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

drills: $(STAMP)  ## Play faults on the whole relay, 12 minutes at most (one: make drills ARGS=ses; at full length: --whole)
	@$(BIN)/python -m scripts.drills.run $(ARGS)

soak: $(STAMP)  ## Ask for twice what can be done for 10 minutes; memory stays flat (shorter: make soak ARGS="--seconds 60")
	@$(BIN)/python -m scripts.drills.soak $(ARGS)

check: $(STAMP)  ## Lint, types, formatting, import rules
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/python -m pytest tests/test_imports.py

format: $(STAMP)  ## Format the code
	@$(BIN)/ruff check --fix --exit-zero --quiet .
	@$(BIN)/ruff format --quiet .

bench: $(STAMP)  ## Measure the whole path beside Postfix's smtp-source (needs Postfix; two minutes: make bench ARGS=--quick)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-build-isolation -c $(CONSTRAINTS) -e '.[bench,bench-smtp]'
	@$(BIN)/python scripts/bench/run.py $(ARGS)

bench-bytecodes: $(STAMP)  ## Count the bytecodes and calls of a tracked mail, by function (needs Postfix)
	@$(BIN)/python scripts/bench/bytecodes.py $(ARGS)

bench-smtp: $(STAMP)  ## Measure the SMTP layer alone, beside others and with a smarthost 20 ms away (needs Postfix)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-build-isolation -c $(CONSTRAINTS) -e '.[bench-smtp]'
	@$(BIN)/python scripts/bench/smtp.py $(ARGS)

bench-tracking: $(STAMP)  ## Measure tracking: a group of 100,000 beside one of 10, and what a mail costs nats-server
	@$(BIN)/python scripts/bench/tracking.py $(ARGS)

bench-engagement: $(STAMP)  ## Measure engagement events: CPU of each, and the rate beside boto3's bare receive and delete loop
	@$(BIN)/python scripts/bench/engagement.py $(ARGS)

clean:  ## Remove what was made, the virtual environment too
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
