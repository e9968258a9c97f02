# `make run` and `make test` set up what they need. Plain `make` builds .venv; `make help` lists all targets.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; (3, 11) <= v <= (3, 13) or sys.exit(\
	  f"srsys needs Python 3.11, 3.12 or 3.13, and $(PYTHON) is {v[0]}.{v[1]}: try  make PYTHON=python3.11")'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@# The interpreter's bundled pip installs the locked pip and uv, checked by hash; uv then installs all of the lock.
	@test -x $(BIN)/uv || { awk '/^[a-z]/ {keep = /^(pip|uv)==/} keep' requirements.lock >.venv/bootstrap.lock && \
	  $(BIN)/python -m pip install -q --no-deps --require-hashes -r .venv/bootstrap.lock; }
	$(BIN)/uv pip install --python $(BIN)/python --compile-bytecode --require-hashes -r requirements.lock
	$(BIN)/uv pip install --python $(BIN)/python --no-deps --no-build-isolation -e .
	@test ! -e .git || git config core.hooksPath .githooks || true
	@touch $@

.PHONY: help run test lab docs export check train bench tables kpi soak lock airflow gate report promote deploy undo
help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' Makefile | expand -t 16

run: $(READY) ## start the app on http://127.0.0.1:7860 and MLflow on http://127.0.0.1:5001; Ctrl-C stops both
	@exec $(BIN)/srsys serve --mlflow-port 5001

test: $(READY) ## run all tests; fails below 95 % branch coverage. SLOW=1 adds the slow tests
	$(BIN)/python -m pytest --cov --cov-report=term-missing:skip-covered $(if $(SLOW),--slow)

soak: $(READY) ## run the long system tests and print their figures: 10,000 hostile files, 1,000 requests across model swaps
	$(BIN)/python -m pytest tests/system --slow -m slow -s

lab: $(READY) ## open the notebooks in JupyterLab, which cleans each notebook when it saves it
	@exec $(BIN)/jupyter lab --ServerApp.root_dir=. --LabApp.default_url=/lab/tree/nbs/index.ipynb \
	  --FileContentsManager.pre_save_hook=nbdev.clean.clean_jupyter

docs: $(READY) ## build the documentation from the outputs stored in the notebooks: _docs/index.html
	$(BIN)/python nbs/_pages/docs.py

airflow: .airflow/ready ## install Airflow 3 in .airflow, a separate environment that the tests of the DAGs use
.airflow/ready: scheduled/airflow/requirements.lock | $(READY)
	$(BIN)/uv venv -q --clear --python $(BIN)/python .airflow
	$(BIN)/uv pip install --python .airflow/bin/python --compile-bytecode --require-hashes -r scheduled/airflow/requirements.lock
	@touch $@

export: $(READY) ## generate package, tests, README and dashboards from the notebooks
	$(BIN)/python tests/generate.py
	$(BIN)/nbdev_export
	$(BIN)/ruff check -q --fix --select I srsys tests
	$(BIN)/ruff format -q srsys tests
	$(BIN)/python nbs/_pages/readme.py
	$(BIN)/python -c "from pathlib import Path; from srsys.monitor.dashboards import write_dashboards as w; w(Path('docker/monitoring/grafana/dashboards'))"

check: export ## check a commit: generated files up to date, notebooks clean, code linted and formatted
	$(BIN)/nbdev_clean
	@test ! -d scheduled || $(BIN)/nbdev_clean --fname scheduled
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache >/dev/null || $(BIN)/lint-imports --no-cache
	git diff --exit-code

train: $(READY) ## train a shipped model, or continue its training: make train MODEL=fast-x4 DATA=pictures/
	@exec $(BIN)/srsys train $(or $(MODEL),$(error set MODEL=photo-x4, photo-x2, fast-x4 or fast-x2)) \
	  --data $(or $(DATA),$(error set DATA to the folder of training pictures))

bench: $(READY) ## measure time, memory and pictures per minute on this machine; PEER=FILE also measures another network's weights
	@$(BIN)/srsys bench $(if $(PEER),--peer $(PEER))
	@exec $(BIN)/srsys load-test

tables: $(READY) ## score every model on every benchmark and update the pages: BENCHMARKS=folder [MODELS="file catalog:name"] [TRUST="sha256"] [TRACK=1]
	$(BIN)/srsys tables --benchmarks $(or $(BENCHMARKS),$(error set BENCHMARKS to the folder that holds Set5, Set14 and the others)) \
	  $(MODELS:%=--model %) $(TRUST:%=--trust %) $(if $(TRACK),--track) --crops nbs/images/tables.jpg
	$(BIN)/srsys kpi
	$(BIN)/jupyter nbconvert --log-level WARN --to notebook --execute --inplace nbs/evaluate/02_tables.ipynb nbs/index.ipynb
	$(BIN)/nbdev_clean
	$(BIN)/python nbs/_pages/readme.py

kpi: $(READY) ## print each goal with its measured figure; run `make bench` and `make tables` first
	@exec $(BIN)/srsys kpi

gate: $(READY) ## compare the challenger of MODEL with its champion and write gate.md; exits with status 1 if it is refused
	$(BIN)/srsys run evaluate -p model $(MODEL) -p least 60 -p stand_in false
	$(BIN)/python .ci/gate.py $(MODEL) gate.md

report: ## summarise the files of the CI jobs on one page of Markdown, report.md
	$(PYTHON) .ci/report.py junit.xml coverage.xml gate.md >report.md

promote: $(READY) ## make the challenger of MODEL that passed the gate the champion
	$(BIN)/srsys promote $(MODEL) --evidence .srsys/runs/$(MODEL).evidence.json

# TOKEN reaches smoke.py through the environment, so that it shows neither in CI's log nor among the processes.
export TOKEN
KUBECTL = kubectl $(if $(KUBE_CONTEXT),--context $(KUBE_CONTEXT)) -n srsys
deploy: ## deploy to a cluster, then restore a test picture: OVERLAY=cpu IMAGE=registry/srsys TAG=… ADDRESS=https://… [TOKEN=…]
	manifests=$$(kubectl kustomize docker/k8s/overlays/$(or $(OVERLAY),cpu)) && printf '%s\n' "$$manifests" | \
	  sed -E 's#image: srsys-([a-z]+):latest#image: $(or $(IMAGE),srsys)-\1:$(or $(TAG),latest)#' | $(KUBECTL) apply -f -
	$(KUBECTL) rollout status deployment/srsys --timeout=15m
	$(PYTHON) docker/smoke.py $(or $(ADDRESS),$(error set ADDRESS to the address of the service: https://…))

undo: ## return to the previous deployment
	$(KUBECTL) rollout undo deployment/srsys
	$(KUBECTL) rollout status deployment/srsys --timeout=15m

lock: ## pin all dependencies with their hashes after a change of pyproject.toml; UPGRADE=1 takes the newest versions
	$(BIN)/uv pip compile -q --universal --generate-hashes --no-header --no-annotate --all-extras --python-version 3.11 \
	  $(if $(UPGRADE),--upgrade) --output-file requirements.lock pyproject.toml
	$(BIN)/uv pip compile -q --universal --generate-hashes --no-header --no-annotate --python-version 3.11 \
	  $(if $(UPGRADE),--upgrade) --output-file scheduled/airflow/requirements.lock scheduled/airflow/requirements.in
