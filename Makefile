# Each target sets up .venv first, once. Without make: python bootstrap.py lab|run|test|notebooks|setup
PYTHON ?= python3
unexport PYTHONDONTWRITEBYTECODE

setup lab run test notebooks:
	@$(PYTHON) bootstrap.py $@ $(ARGS)

.PHONY: setup lab run test notebooks
.DEFAULT_GOAL := setup
