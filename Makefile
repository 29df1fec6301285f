# Every command creates the environment first if it is missing.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test app fix shapes solids gpu docs clean

demo: .venv/ready
	$(BIN)/dit-sparse demo

app: .venv/ready  ## the demo as a page on localhost
	$(BIN)/dit-sparse app

PACKAGES := triton-3.6.0 xformers-0.0.35 cvvdp-0.5.7 stlpips_pytorch-0.0.2

test: .venv/ready $(addprefix .venv/packages/, $(PACKAGES))
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -n auto --dist worksteal

fix: .venv/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

shapes: .venv/ready  ## continue the training of shapes-wan-i2v
	$(BIN)/python -m dit_sparse.bundled.shapes_wan.train --out runs/shapes --resume --start dit_sparse/assets/shapes-wan-i2v

solids: .venv/ready  ## continue the training of shapes-3d
	$(BIN)/python -m dit_sparse.bundled.shapes_3d.train --out runs/shapes-3d --resume --start eval/models/shapes-3d

gpu: .venv/ready  ## with an NVIDIA GPU: tests, benchmarks, training, comparison
	$(BIN)/python -m dit_sparse.eval.bench.gpu_suite --out out/gpu

# With --quiet, MkDocs would not count warnings, and --strict would have no effect.
docs: .venv/ready  ## the documentation site, in build/site
	$(BIN)/python docs/_site/assemble.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --config-file build/docs/mkdocs.yml

# Without an NVIDIA GPU, PyTorch is installed first, at the pinned version.
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip -c constraints.txt
	command -v nvidia-smi >/dev/null || $(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --editable '.[demo,dev,docs,ray,three-d]' -c constraints.txt
	touch $@

# Only for tests, outside of site-packages: the oldest supported Triton, xFormers, which warns at import on a CPU, and
# measures that require torchvision. If one cannot be installed, its tests are skipped; in CI they fail.
.venv/packages/%: .venv/ready
	-$(BIN)/pip install --quiet --no-deps --target $@ $(subst -,==,$*)

clean:
	rm -rf .venv build dist *.egg-info
