# PYTHON chooses the interpreter, JOBS how much runs at a time (one more than there are processors, for a third of a test is waiting),
# PYTEST_ARGUMENTS what pytest is told beside: make test PYTEST_ARGUMENTS="-k prune"
PYTHON = python3
JOBS = $(shell expr $$(nproc) + 1)
export PYTHONDONTWRITEBYTECODE = 1
export PYTEST_ARGUMENTS

.PHONY: help demo test test-all test-crash fuzz bench lint example release clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/\1|\2/p' Makefile | while IFS='|' read -r name text; do printf '  %-11s %s\n' "$$name" "$$text"; done

demo: ## deploy, fail, roll back: a real web application in a temporary directory
	@$(PYTHON) tests/demo/demo.py

test: ## run the tests, in virtual environments under .venvs, which are made with pytest
	$(PYTHON) tests/tools/run_suite.py --jobs $(JOBS)

test-all: ## run every case of them, and the same tests under every other Python from 3.6 to 3.14 that pyenv has
	$(PYTHON) tests/tools/run_suite.py --all --jobs $(JOBS)

test-crash: ## kill it, fail it and cut the power at every system call; damage every file of its state; what takes minutes
	$(PYTHON) tests/tools/crash_matrix.py --jobs $(JOBS)
	$(PYTHON) tests/tools/replay.py --states 10000 --jobs $(JOBS)
	$(PYTHON) tests/tools/damage.py --stride 5 --jobs $(JOBS)
	DEPLOY_TEST_SET=proof $(PYTHON) tests/tools/run_suite.py --jobs 1 -- -k "fifty or million or visitor or tick or attack or killed"

fuzz: ## unpack a million mutated archives
	$(PYTHON) tests/tools/fuzz.py --inputs 1000000 --jobs $(JOBS)

bench: ## measure the speed
	$(PYTHON) tests/tools/bench.py

lint: ## compile without warnings, Python 3.6 syntax, only permitted names at the top level
	$(PYTHON) -W error tests/tools/lint.py

example: ## write deploy.ini.example and what the README shows of deploy.py again
	$(PYTHON) deploy.py config --example > deploy.ini.example.new
	mv deploy.ini.example.new deploy.ini.example
	$(PYTHON) tests/tools/tables.py

release: ## write deploy.py.sha256, and say how to sign and publish it
	@sha256sum deploy.py > deploy.py.sha256
	@cat deploy.py.sha256
	@echo "sign:    minisign -S -s minisign.key -m deploy.py.sha256"
	@echo "check:   minisign -V -p minisign.pub -m deploy.py.sha256 && sha256sum -c deploy.py.sha256"
	@echo "publish: git tag -s v$$(sed -n 's/^VERSION = "\(.*\)"$$/\1/p' deploy.py), and under that tag deploy.py, deploy.py.sha256 and deploy.py.sha256.minisig;"
	@echo "         minisign.pub where it was found before, and nowhere beside them"

clean: ## remove what make made
	rm -rf .venvs .cache .pytest_cache deploy.ini.example.new deploy.py.sha256
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
