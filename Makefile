# Three commands do everything: `make embedder`, `make quickstart`, `make test`. Each makes .venv, with the pinned versions.
PYTHON ?= python3
BIN := .venv/bin
# What loads, renders, trains, saves, embeds and evaluates.
CORE := added_tokens checkpoint config data entrypoints eval_models evaluation llm2vec mntp mteb_adapter packing packed_attention \
	sentence_transformer_loss simcse stage_I stage_II step tokenization trainer

.PHONY: quickstart embedder compare lab test test-slow test-lowest test-gpu gpu-check bench faults docs lint audit clean

quickstart: .venv/installed  ## the whole method, small, on this machine: about ten minutes after the install
	$(BIN)/python experiments/quickstart.py

embedder: .venv/installed  ## an embedder from a real language model: about an hour on 2 cores, minutes on a GPU
	$(BIN)/llm2vec embedder

compare: output/quickstart/base/run.json  ## every recipe on the quickstart's text, two seeds; about 50 minutes on 2 free cores
	$(BIN)/python experiments/compare.py train_configs/comparison/quickstart --seeds 42 43

lab: output/quickstart/base/run.json  ## rival pre-stages on the quickstart's text, three seeds; about four hours on 2 free cores
	$(BIN)/llm2vec compare train_configs/comparison/lab --seeds 42 43 44

output/quickstart/base/run.json: | .venv/installed  # as the quickstart makes it
	$(BIN)/python experiments/make_docstrings.py
	test -d output/quickstart/init || $(BIN)/python experiments/make_tiny_model.py
	$(BIN)/torchrun --standalone --nproc_per_node=2 experiments/run_lm.py train_configs/quickstart/pretrain.json

test: .venv/installed  ## all fast tests, offline
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadgroup

test-slow: .venv/installed  ## the tests that take longer, too
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadgroup -m "not gpu"

test-lowest: .venv-lowest/installed  ## the core's tests with the oldest libraries that setup.py allows
	OMP_NUM_THREADS=1 .venv-lowest/bin/python -m pytest -q -n 2 --dist loadgroup $(foreach name,$(CORE),$(wildcard tests/test_$(name).py tests/*/test_$(name).py))

test-gpu: .venv/installed  ## the tests that need a CUDA device
	$(BIN)/python -m pytest -q -m gpu

gpu-check:  ## is everything right and fast on this machine's GPU: ten minutes, by the python that is active
	$(PYTHON) -m benchmarks.gpu_check

bench: .venv/installed  ## speed and memory beside the release's steps and sentence-transformers; about an hour
	$(BIN)/python -m benchmarks.benchmark

faults: .venv/installed  ## breaks training runs in every way and writes docs/reliability.md's table; about 15 minutes
	$(BIN)/python -m benchmarks.faults

docs: .venv/installed  ## the documentation site, into output/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

audit: .venv-audit/installed  ## known vulnerabilities of the pinned versions, as PyPI reports them; needs the network
	.venv-audit/bin/pip-audit --disable-pip --no-deps -r constraints.txt

.venv-audit/installed:
	$(PYTHON) -m venv .venv-audit
	.venv-audit/bin/python -m pip install --quiet --disable-pip-version-check pip-audit
	touch $@

.venv/installed: constraints.txt setup.py
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[eval,base,quickstart,logging,data,bf16,docs,dev]"
	touch $@

.venv-lowest/installed: constraints-lowest.txt setup.py
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-lowest.txt -e ".[eval,quickstart,logging]" \
		pytest pytest-xdist hypothesis
	touch $@

clean:
	rm -rf .venv .venv-lowest .venv-audit output/quickstart cache/docstrings
