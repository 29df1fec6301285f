# All commands set everything up by themselves and may be repeated.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test app fix shapes gpu clean

demo: .venv/ready
	$(BIN)/dit-sparse demo

app: .venv/ready  ## the demo as a page on localhost
	$(BIN)/python app.py

test: .venv/ready .venv/beside/triton-3.6.0 .venv/beside/xformers-0.0.35
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -n auto --dist worksteal

fix: .venv/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

shapes: .venv/ready  ## train the bundled model on
	$(BIN)/python -m dit_sparse.bundled.shapes_wan.train --out runs/shapes --resume --start dit_sparse/assets/shapes-wan

gpu: .venv/ready  ## on a machine with an NVIDIA GPU: tests, benches, training, comparison
	$(BIN)/python -m dit_sparse.eval.bench.gpu_suite --out out/gpu

# Without an NVIDIA GPU the exact pin comes first: a range would fetch the newest CUDA build.
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip -c constraints.txt
	command -v nvidia-smi >/dev/null || $(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --editable '.[demo,dev]' -c constraints.txt
	touch $@

# For tests alone, in folders of their own: the oldest Triton that is allowed, and a package that complains when it is
# imported without its GPU code. Where one does not install, its tests are skipped; in CI they fail.
.venv/beside/%: .venv/ready
	-$(BIN)/pip install --quiet --no-deps --target $@ $(subst -,==,$*)

clean:
	rm -rf .venv build dist *.egg-info
