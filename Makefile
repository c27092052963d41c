# Two commands do everything on a fresh machine with Python >= 3.11 and a C compiler:
#   make compare   train and compare the four families, end in runs/compare/report.html
#   make test      the whole suite
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
LOG    := $(VENV)/install.log
READY  := $(VENV)/.ready
PIP    := $(BIN)/python -m pip --disable-pip-version-check --no-input install --quiet --constraint constraints.txt

.PHONY: help install compare test test-slow reproduce lint docs clean

help:
	@grep -E '^# ?' Makefile | sed 's/^# \{0,1\}//'
	@echo "  also: install, test-slow, reproduce, lint, docs, clean"

install: $(READY)

$(READY): pyproject.toml constraints.txt Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "metaicl needs Python >= 3.11; choose one with: make install PYTHON=python3.11"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@: > $(LOG)
	@echo "[1/3] installing metaicl and its extras into $(VENV)"
	@$(PIP) setuptools wheel cython hatchling editables >> $(LOG) 2>&1 || { tail -n 20 $(LOG); exit 1; }
	@$(PIP) --no-build-isolation --editable '.[sklearn,retrieval,dataframe,tensorboard,test]' >> $(LOG) 2>&1 \
	  || { tail -n 20 $(LOG); exit 1; }
# learn2learn 0.2.0 ships C code generated for old Pythons: generate it again. Its declared dependencies pin
# numpy < 2 through qpth, which is not needed, so what it really imports is installed by name.
	@echo "[2/3] building learn2learn"
	@$(PIP) --no-build-isolation --use-pep517 -C--global-option=build_ext --no-deps learn2learn >> $(LOG) 2>&1 \
	  || { tail -n 20 $(LOG); exit 1; }
	@echo "[3/3] installing what learn2learn imports"
	@$(PIP) --no-deps gym torchvision >> $(LOG) 2>&1 || { tail -n 20 $(LOG); exit 1; }
	@$(PIP) requests scipy pillow cloudpickle gym-notices >> $(LOG) 2>&1 || { tail -n 20 $(LOG); exit 1; }
	@touch $(READY)
	@echo "ready: $(BIN)/python"

compare: install
	@$(BIN)/python recipes/compare_families.py --out runs/compare

# Two processes, a thread each: rounding depends on the number of threads.
test: install
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow"

test-slow: install
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

# Full-size claims; each ends in a verdict. DATA says where Omniglot, MNIST and the texts come from.
CLAIMS         := gaussian_bayes finn_2017_sinusoid gradient_family gradient_calibration leakage_controls \
                  von_oswald_2022_gd von_oswald_2023_mesa zhang_2023_trained_lsa gatmiry_2024_looped \
                  huang_2023_softmax_convergence dai_2022_dual_form fast_weight_ladder associative_recall \
                  garg_2022_linear akyurek_2022_which_algorithm icl_vs_gradient explanations_world \
                  demonstration_retrieval demonstration_draws benchmark_meta_step benchmark_gradient benchmark_memory \
                  benchmark_in_context benchmark_processes
CLAIMS_ON_DATA := few_shot_intents few_shot_headlines omniglot omniglot_heads omniglot_gradient \
                  federated_reconnaissance susana_losses raml_text benchmark_metric_retrieval
DATA           ?= --download
# The five class splits of the protocol; each takes as long as the recipe's default of one.
OPTIONS_few_shot_intents := --splits 01 02 03 04 05
reproduce: install
	@for recipe in $(CLAIMS); do \
	  echo "== $$recipe"; $(BIN)/python recipes/$$recipe.py --out runs/$$recipe || exit 1; done
	@$(foreach recipe,$(CLAIMS_ON_DATA),echo "== $(recipe)"; \
	  $(BIN)/python recipes/$(recipe).py $(DATA) $(OPTIONS_$(recipe)) --out runs/$(recipe) || exit 1;)

lint: install
	@$(PIP) --no-build-isolation --editable '.[lint]' >> $(LOG) 2>&1
	@$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/pyright

docs: install
	@$(PIP) --no-build-isolation --editable '.[docs]' >> $(LOG) 2>&1
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

clean:
	rm -rf $(VENV) build dist site .pytest_cache .ruff_cache .hypothesis
