# Each target sets up .venv first, once. Without make: python bootstrap.py lab|run|test|bench|notebooks|setup
PYTHON ?= python3
unexport PYTHONDONTWRITEBYTECODE

setup lab run test bench notebooks:
	@$(PYTHON) bootstrap.py $@ $(ARGS)

.PHONY: setup lab run test bench notebooks
.DEFAULT_GOAL := setup
