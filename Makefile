# Two commands that work from a bare clone: `make quickstart` and `make test`.
# They need Python 3.11 or newer, make and a package index.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
INSTALLED := $(VENV)/installed

DATA ?= ../shared/data

# The small experiment with few labels. Each method is a target, so that make runs two at once; three of them need the noise
# predictor that small-pretrained trains.
SMALL = OMP_NUM_THREADS=1 $(RUN) -m scripts.experiments.label_efficiency --data $(DATA) --output runs/label-efficiency-small \
	--sets wbc --labels 2 10 --seeds 0 --steps 200 --pretraining-steps 1600
FROM_PRETRAINED := small-pretrained_self_training small-joint small-pixel_classifier
METHODS := small-pretrained small-unimatch small-self_training small-imagenet small-scratch small-monai $(FROM_PRETRAINED)

.PHONY: quickstart test test-slow lint label-efficiency-small $(METHODS) docs clean

quickstart: $(INSTALLED)  ## train on digits, generate, segment; images in runs/quickstart
	$(RUN) scripts/quickstart.py

test: $(INSTALLED) lint  ## the default tests
	$(RUN) -m pytest -n auto --maxprocesses 4 --dist worksteal

test-slow: $(INSTALLED)  ## the tests that take longer: killed runs, several processes, installed wheels
	$(RUN) -m pytest -m slow -n auto --maxprocesses 2 --dist worksteal

# Types and the direction of imports are checked on the package as a wheel lays it out, with pipelines/ inside.
lint: $(INSTALLED)  ## ruff, mypy and import-linter
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	rm -rf build/checked
	$(RUN) -c "import setuptools; setuptools.setup()" --quiet build_py --build-lib build/checked
	cd build/checked && ../../$(RUN) -m mypy --cache-dir ../../.mypy_cache --config-file ../../pyproject.toml
	cd build/checked && PYTHONPATH=. ../../$(VENV)/bin/lint-imports --no-cache ../../pyproject.toml

label-efficiency-small: $(INSTALLED)  ## masks from 2 and 10 labels by all methods, one set, one seed; DATA is the folder of the sets
	$(MAKE) --jobs 2 $(METHODS)
	$(SMALL)

$(FROM_PRETRAINED): small-pretrained
$(METHODS): small-%: $(INSTALLED)
	$(SMALL) --methods $* > /dev/null

docs: $(INSTALLED)  ## the documentation as a site, in build/site
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict

# torch comes first and pinned, since an open range may install gigabytes of CUDA on a machine without a GPU.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --constraint constraints.txt torch
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $(INSTALLED)

clean:  ## remove the environment, not the runs
	rm -rf $(VENV)
