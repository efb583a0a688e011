# Everything runs in .venv, which is made when it is missing: `make demo` and `make test` each work as a first command.
PYTHON ?= python3
BIN    := $(CURDIR)/.venv/bin
NEEDS  := $(CURDIR)/.venv/installed
SITE   := $(if $(shell command -v quarto),,$(CURDIR)/.ci/bin:)# a stand-in where Quarto is not installed

.DEFAULT_GOAL := help
.PHONY: help demo test test-browser bench bench-gpu wheels clean-check sync-check lab docs readme outputs outputs-check clean

help: ## what there is to make
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' Makefile

$(NEEDS): settings.ini setup.py
	@$(PYTHON) -c "import sys; sys.exit('acl_nb needs Python 3.11 or newer; name one: make PYTHON=/path/to/python' if sys.version_info < (3, 11) else 0)"
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[dev]'
	touch $@

demo: $(NEEDS) ## train ACL on long-tailed digits (half a minute) and write runs/digits_lt/report.html
	@$(BIN)/acl_train

test: $(NEEDS) clean-check sync-check ## notebooks clean, modules in sync, every notebook, every test
	OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers 2
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -n 2 --dist loadfile

test-browser: $(NEEDS) ## the explorers and the site in a real browser, which must be there (screenshots: runs/browser)
	ACL_NB_BROWSER=1 $(BIN)/python -m pytest tests/test_live.py tests/test_site.py

# Both checks work on a copy, so that a check changes nothing and needs no commit.
COPY = t=$$(mktemp -d) && trap 'rm -rf $$t' EXIT && cp -r settings.ini nbs bench $$t && cd $$t
SKIP = -x live.js -x templates -x py.typed -x __pycache__ -x .ipynb_checkpoints -x runs

clean-check: $(NEEDS)
	@$(COPY) && $(BIN)/nbdev_clean && diff -rq $(SKIP) $(CURDIR)/nbs nbs || { echo 'notebooks are not clean: run nbdev_clean'; exit 1; }

sync-check: $(NEEDS)
	@$(COPY) && $(BIN)/nbdev_export && diff -r $(SKIP) $(CURDIR)/acl_nb acl_nb || { echo 'acl_nb/ differs from what the notebooks export: edit nbs/, then run nbdev_export'; exit 1; }

PEERS = $(shell sed -n 's/^bench_requirements = //p' settings.ini)

bench: $(NEEDS) ## speed and memory against limits and peers, into bench/*.json; then execute nbs/studies/speed.ipynb
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps $(PEERS)
	OMP_NUM_THREADS=1 $(BIN)/python tests/bench_losses.py
	OMP_NUM_THREADS=1 $(BIN)/python tests/bench_views.py
	OMP_NUM_THREADS=1 $(BIN)/python tests/bench_step.py
	OMP_NUM_THREADS=1 $(BIN)/python tests/bench_loading.py
	OMP_NUM_THREADS=2 $(BIN)/python tests/bench_widgets.py
	OMP_NUM_THREADS=1 $(BIN)/python tests/bench_import.py

bench-gpu: ## all that a GPU is to show, into bench/gpu.json; ARGS="--only right,loss" chooses
	@PYTHON='$(PYTHON)' .ci/bench-gpu $(ARGS)

TARGET = 3.12
wheels: $(NEEDS) ## into .wheels/: what a machine with torch and no network lacks (make wheels TARGET=3.12)
	@$(BIN)/python .ci/wheels.py $(TARGET)

lab: $(NEEDS) ## JupyterLab on the notebooks
	$(BIN)/jupyter lab nbs

docs: $(NEEDS) ## the site, in _docs/, with each page as Markdown and llms.txt
	rm -rf _docs _proc
	PATH="$(SITE)$(BIN):$$PATH" PYTHONPATH="$(CURDIR)/.ci" nbdev_docs
	$(BIN)/python .ci/llms.py

readme: $(NEEDS) ## README.md from nbs/index.ipynb, and the list of recipes that acl_train --list prints
	$(BIN)/python -c "from acl_nb.cli import _table_of_recipes; print(_table_of_recipes())" > acl_nb/templates/recipes.txt
	PATH="$(CURDIR)/.ci/bin:$(BIN):$$PATH" PYTHONPATH="$(CURDIR)/.ci" nbdev_readme

NOTEBOOKS = $$(find nbs -name '*.ipynb' -not -path '*/.*' | sort)
CONVERT = OMP_NUM_THREADS=1 $(BIN)/python -m nbconvert --log-level WARN --to notebook --inplace
EXECUTE = for nb in $(NOTEBOOKS); do $(CONVERT) --execute --ExecutePreprocessor.store_widget_state=False $$nb || exit 1; done && \
	$(CONVERT) --coalesce-streams $(NOTEBOOKS) && $(BIN)/nbdev_clean        # what is printed in pieces is one output, whatever the timing

outputs: $(NEEDS) ## execute every notebook anew and keep its outputs
	$(BIN)/nbdev_export
	$(EXECUTE)

outputs-check: $(NEEDS) ## execute every notebook in a copy: are the stored outputs what the code gives?
	@$(COPY) && { $(EXECUTE); } && diff -rq $(SKIP) $(CURDIR)/nbs nbs || { echo 'stored outputs are not what the code gives here: run make outputs'; exit 1; }

clean: ## remove what can be made again (not .venv, runs or data)
	rm -rf _docs _proc build dist *.egg-info .pytest_cache .hypothesis nbs/nbdev.yml
	find acl_nb tests -name __pycache__ -prune -exec rm -rf {} +
