# Every verb sets up what it needs in .venv. PYTHON chooses the interpreter (3.11 to 3.14), VENV another place for it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml CMakeLists.txt $(wildcard csrc/*) dfengine/stages/_boxes.pyx

.PHONY: demo test lint bench train-default clean

# The package alone: no torch, no GPU, no compiler but the system's.
$(VENV)/base.stamp: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

# And what tests, training and benchmarks need. facenet-pytorch pins a torch of 2024, hence --no-deps.
$(VENV)/dev.stamp: $(VENV)/base.stamp
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps facenet-pytorch==2.6.0
	touch $@

# A clip made from a public-domain portrait (NASA's photograph of Eileen Collins), scored with the default bundle.
demo: $(VENV)/base.stamp
	$(BIN)/python -m pip install --quiet scikit-image
	$(BIN)/python scripts/make_demo.py build/demo.mp4
	$(BIN)/dfengine score build/demo.mp4

test: $(VENV)/dev.stamp
	$(BIN)/python -m pytest

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror csrc/*
	$(BIN)/mypy
	$(BIN)/lint-imports

# The benchmarks need videos: make bench VIDEOS=path/to/folder
bench: $(VENV)/dev.stamp
	$(BIN)/python -m benchmarks.ops
	$(BIN)/python -m benchmarks.stages --videos $(VIDEOS)
	$(BIN)/python -m benchmarks.engine --videos $(VIDEOS)
	$(BIN)/python -m benchmarks.kaggle --videos $(VIDEOS)
	$(BIN)/python -m benchmarks.soak --videos $(VIDEOS)
	$(BIN)/python scripts/update_readme.py

# The default bundle, from photos alone: make train-default PHOTOS=path/to/portraits (see training/README.md). The same
# command goes on where it was stopped. OPTIONS="--set train.epochs=1" and the like change the recipe.
# PERSON tells who is in a photo where the folder has no index of people: by default as the portraits are named that the
# packaged bundle was trained on (training/README.md).
PERSON ?= --person '_front_(?P<london>\d+)_|^us-(?:house|senate)/(?:.*-)?(?P<congress>[^-/]+)\.jpg$$'
RUNS ?= runs
BUNDLE ?= dfengine/bundles/default
train-default: $(VENV)/dev.stamp
	$(BIN)/python -m training.faces $(PHOTOS) --out $(RUNS)/faces --split identity:0.06:0.09 $(PERSON)
	$(BIN)/python -m training.train training/recipes/default.toml --faces $(RUNS)/faces --out $(RUNS)/default \
	  --resume $(OPTIONS)
	$(BIN)/python -m training.heldout $(RUNS)/default/face144_?/best.safetensors --faces $(RUNS)/faces \
	  --out $(RUNS)/default/evaluation
	$(BIN)/python scripts/make_demo.py build/demo.mp4
	$(BIN)/python -m training.export $(RUNS)/default/face144_?/best.safetensors --faces $(RUNS)/faces \
	  --video build/demo.mp4 --evaluation $(RUNS)/default/evaluation/evaluation.json --out $(BUNDLE)

clean:
	rm -rf build $(VENV)
