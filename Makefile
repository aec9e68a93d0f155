# `make demo` runs the whole method on the embedded world, `make test` the tests, `make test-slow` those that
# take long, `make lint` the linters.
PYTHON ?= python3
export PATH := $(CURDIR)/.venv/bin:$(PATH)
INSTALLED := .venv/installed

.PHONY: demo test test-slow lint mutants reference

demo: $(INSTALLED)
	dvc repro baselines@recent_popularity baselines@item_knn
	python -m mllm_msr.cli evaluate baselines  # a first table, before any model runs
	dvc repro score encode_items
	# Baselines run on one core, so two series at once. Neither checks the stages before it, whose outputs
	# DVC would lock against the other. What fails here fails again below.
	dvc --wait-for-lock repro --single-item baselines & \
		dvc --wait-for-lock repro --single-item feature_baselines; wait
	dvc repro
	python -m mllm_msr.cli.evaluate show

test: $(INSTALLED)
	OMP_NUM_THREADS=1 python -m pytest -n 2 --dist loadfile

test-slow: $(INSTALLED)
	OMP_NUM_THREADS=1 python -m pytest -n 2 --dist loadfile -m slow

lint: $(INSTALLED)
	ruff check . && ruff format --check . && mypy && lint-imports

# Changes to the modules that pyproject.toml lists, one at a time, and those that no test notices.
# MUTANTS="mllm_msr.evaluation.metrics.*" takes one module.
mutants: $(INSTALLED)
	.venv/bin/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt --editable '.[mutation]'
	rm -rf mutants  # mutmut would not copy changed files again
	OMP_NUM_THREADS=1 mutmut run $(MUTANTS)
	mutmut results

# For maintainers: the figures of the last `make demo` become those that README and docs show.
reference: $(INSTALLED)
	dvc repro evaluate
	cp data/evaluate/metrics.json docs/reference/pocket_metrics.json
	cp data/evaluate/comparisons.parquet docs/reference/pocket_comparisons.parquet
	python -m mllm_msr.cli.evaluate show

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt --editable '.[baselines,test]'
	touch $@
