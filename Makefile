# Two commands set everything up: `make run` and `make test`. Plain `make` builds .venv. `make help` lists the rest.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; (3, 11) <= v <= (3, 13) or sys.exit(\
	  f"srsys needs Python 3.11, 3.12 or 3.13, and $(PYTHON) is {v[0]}.{v[1]}: try  make PYTHON=python3.11")'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@test -x $(BIN)/uv || { awk '/^[a-z]/ {mine = /^uv==/} mine' requirements.lock >.venv/uv.lock && \
	  $(BIN)/python -m pip install -q --no-deps --require-hashes -r .venv/uv.lock; }
	$(BIN)/uv pip install --python $(BIN)/python --compile-bytecode --require-hashes -r requirements.lock
	$(BIN)/uv pip install --python $(BIN)/python --no-deps --no-build-isolation -e .
	@test ! -e .git || git config core.hooksPath .githooks || true
	@touch $@

.PHONY: help run test lab docs export check train bench tables kpi soak lock airflow gate report promote deploy undo
help: ## this list
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' Makefile | expand -t 16

run: $(READY) ## the app on http://127.0.0.1:7860 and MLflow on http://127.0.0.1:5001, both ended by one Ctrl-C
	@exec $(BIN)/srsys serve --mlflow-port 5001

test: $(READY) ## every test, with branch coverage of at least 95 %; SLOW=1 adds the slow ones
	$(BIN)/python -m pytest --cov --cov-report=term-missing:skip-covered $(if $(SLOW),--slow)

soak: $(READY) ## the long forms of the system tests, with their figures: ten thousand hostile files, a thousand requests across swaps
	$(BIN)/python -m pytest tests/system --slow -m slow -s

lab: $(READY) ## the notebooks in JupyterLab, which cleans each as it saves it
	@exec $(BIN)/jupyter lab --ServerApp.root_dir=. --LabApp.default_url=/lab/tree/nbs/index.ipynb \
	  --FileContentsManager.pre_save_hook=nbdev.clean.clean_jupyter

docs: $(READY) ## the pages, from the outputs stored in the notebooks, in _docs/index.html
	$(BIN)/python nbs/_pages/docs.py

airflow: .airflow/ready ## Airflow 3 in .airflow, an environment of its own, with which the DAG is tested
.airflow/ready: scheduled/airflow/requirements.lock | $(READY)
	$(BIN)/uv venv -q --clear --python $(BIN)/python .airflow
	$(BIN)/uv pip install --python .airflow/bin/python --compile-bytecode --require-hashes -r scheduled/airflow/requirements.lock
	@touch $@

export: $(READY) ## package, tests, README and dashboards from the notebooks
	$(BIN)/python tests/generate.py
	$(BIN)/nbdev_export
	$(BIN)/ruff check -q --fix --select I srsys tests
	$(BIN)/ruff format -q srsys tests
	$(BIN)/python nbs/_pages/readme.py
	$(BIN)/python -c "from pathlib import Path; from srsys.monitor.dashboards import write_dashboards as w; w(Path('docker/monitoring/grafana/dashboards'))"

check: export ## what a commit must pass: exported, clean, linted
	$(BIN)/nbdev_clean
	@test ! -d scheduled || $(BIN)/nbdev_clean --fname scheduled
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports --no-cache >/dev/null || $(BIN)/lint-imports --no-cache
	git diff --exit-code

train: $(READY) ## a shipped model, or more of one: make train MODEL=fast-x4 DATA=pictures/
	@exec $(BIN)/srsys train $(or $(MODEL),$(error say which: MODEL=photo-x4, photo-x2, fast-x4 or fast-x2)) \
	  --data $(or $(DATA),$(error say where the training pictures are: DATA=folder))

bench: $(READY) ## seconds, megabytes and pictures a minute on this machine, beside PEER=weights of another network
	@$(BIN)/srsys bench $(if $(PEER),--peer $(PEER))
	@exec $(BIN)/srsys load-test

tables: $(READY) ## every model on every benchmark, and the pages that show it: BENCHMARKS=folder [MODELS="file catalog:name"] [TRUST="sha256"] [TRACK=1]
	$(BIN)/srsys tables --benchmarks $(or $(BENCHMARKS),$(error say where Set5, Set14 and the others lie: BENCHMARKS=folder)) \
	  $(MODELS:%=--model %) $(TRUST:%=--trust %) $(if $(TRACK),--track) --crops nbs/images/tables.jpg
	$(BIN)/srsys kpi
	$(BIN)/jupyter nbconvert --log-level WARN --to notebook --execute --inplace nbs/evaluate/02_tables.ipynb nbs/index.ipynb
	$(BIN)/nbdev_clean
	$(BIN)/python nbs/_pages/readme.py

kpi: $(READY) ## each goal with its figure, after `make bench` and `make tables`
	@exec $(BIN)/srsys kpi

gate: $(READY) ## the challenger of MODEL is judged beside its champion, in gate.md; status 1 if it is refused
	$(BIN)/srsys run evaluate -p model $(MODEL) -p least 60 -p stand_in false
	$(BIN)/python .ci/gate.py $(MODEL) gate.md

report: ## what CI's jobs left, on one page of Markdown
	$(PYTHON) .ci/report.py junit.xml coverage.xml gate.md >report.md

promote: $(READY) ## the challenger of MODEL that passed the gate becomes champion
	$(BIN)/srsys promote $(MODEL) --evidence .srsys/runs/$(MODEL).evidence.json

KUBECTL = kubectl $(if $(KUBE_CONTEXT),--context $(KUBE_CONTEXT)) -n srsys
deploy: ## to a cluster: OVERLAY=cpu IMAGE=registry/srsys TAG=…; then a picture goes to ADDRESS
	manifests=$$(kubectl kustomize docker/k8s/overlays/$(or $(OVERLAY),cpu)) && printf '%s\n' "$$manifests" | \
	  sed -E 's#image: srsys-([a-z]+):latest#image: $(or $(IMAGE),srsys)-\1:$(or $(TAG),latest)#' | $(KUBECTL) apply -f -
	$(KUBECTL) rollout status deployment/srsys --timeout=15m
	$(PYTHON) docker/smoke.py $(or $(ADDRESS),$(error say where it answers: ADDRESS=https://…)) $(TOKEN)

undo: ## the deployment before the last one
	$(KUBECTL) rollout undo deployment/srsys
	$(KUBECTL) rollout status deployment/srsys --timeout=15m

lock: ## the newest versions that fit together, with their hashes
	$(BIN)/uv pip compile -q --universal --generate-hashes --no-header --no-annotate --all-extras --python-version 3.11 \
	  $(if $(UPGRADE),--upgrade) --output-file requirements.lock pyproject.toml
	$(BIN)/uv pip compile -q --universal --generate-hashes --no-header --no-annotate --python-version 3.11 \
	  $(if $(UPGRADE),--upgrade) --output-file scheduled/airflow/requirements.lock scheduled/airflow/requirements.in
