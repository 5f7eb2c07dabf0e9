# Two groups codistil on real text:   make demo
# Prediction churn, Table 1:          make churn
# Lint and the whole test suite:      make test
# On SLURM and on object stores:      make test_cluster
# A figure of the paper in small:     make study STUDY=lm_codistillation
# The benchmarks, docs/benchmarks.md: make bench
# All that a GPU is for:              make gpu_kit, there: make gpu
# The documentation, a site:         make docs
# All do all set-up, in .venv.

PYTHON ?= python3
DEMO ?= runs/demo
CHURN ?= runs/churn
DEVICE ?= cpu
STUDY ?= lm_codistillation
SCALE ?= cpu
JOBS ?= 2
RUN = .venv/bin/python -m

INSTALL = .venv/bin/pip install --quiet --disable-pip-version-check --editable

.PHONY: demo churn study test test_cluster test_python bench gpu gpu_kit docs lint clean

# Made again when the requirements change; `touch` comes last, so an
# interrupted installation is repeated.
.venv/demo: requirements.txt setup.py
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python 3.11 or newer is needed; set PYTHON=python3.11")'
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	$(INSTALL) '.[demo]'
	touch $@

# And what tests and lint need: TensorFlow, for one, which nothing else does.
.venv/test: .venv/demo
	$(INSTALL) '.[test]'
	touch $@

demo: .venv/demo
	$(RUN) experiments.prepare_data --source=bible \
	    --vocab_size=512 --output=data/bible
	$(RUN) experiments.train_local --workdir=$(DEMO)/codistillation \
	    --num_groups=2 --gin_file=gin_configs/tasks/bible_lm.gin --noreport
	$(RUN) experiments.train_local --workdir=$(DEMO)/baseline \
	    --num_groups=1 --gin_file=gin_configs/tasks/bible_lm.gin --noreport
	$(RUN) experiments.evaluate --workdir=$(DEMO)/codistillation \
	    --workdir=$(DEMO)/baseline
	$(RUN) experiments.sample --workdir=$(DEMO)/codistillation \
	    --workdir=$(DEMO)/baseline --prompt='In the beginning' --pieces=60 \
	    --temperature=0.7
	$(RUN) experiments.report --workdir=$(DEMO)/codistillation \
	    --workdir=$(DEMO)/baseline --output=$(DEMO)/report

churn: .venv/demo
	$(RUN) experiments.churn --workdir=$(CHURN) --jobs=2 \
	    --gin_file=gin_configs/tasks/flights_dnn.gin \
	    --retrains=5 --weights=1,1.5,2,3,6

study: .venv/demo
	$(RUN) experiments.prepare_data --source=bible \
	    --vocab_size=1024 --output=data/study
	$(RUN) experiments.reproduce --study=$(STUDY) --scale=$(SCALE) \
	    --jobs=$(JOBS)

lint: .venv/test
	.venv/bin/ruff check .
	.venv/bin/pyink --check --quiet .
	.venv/bin/mypy

# Three processes on two cores: tests of processes wait much of their time.
test: lint
	$(RUN) pytest -n 3 --dist loadfile --no-loadscope-reorder

# On a SLURM of two nodes and on object stores, all of them on this machine; a
# test whose engine is not installed (slurm-wlm and munge, in Debian) is skipped.
test_cluster: .venv/test
	$(RUN) pytest -m cluster -rs -n 2 --dist loadfile

# A part of the suite, three minutes of it, on another Python with the newest
# releases that the bounds allow: make test_python PYTHON=python3.13
PART = frozen base losses step replicas group resume gin_utils readme packaging
test_python:
	$(PYTHON) -m venv .venv-other
	.venv-other/bin/pip install --quiet --disable-pip-version-check \
	    '.[demo,pytest,s3]'
	.venv-other/bin/python -m pytest -n 2 --dist loadfile \
	    $(PART:%=tests/%_test.py)

# Other frameworks and loaders, PyTorch and grain for two, which nothing else
# needs. Ends with an error unless the page is whole; at most 40 minutes.
.venv/bench: .venv/demo
	$(INSTALL) '.[bench]'
	touch $@

bench: .venv/bench
	$(RUN) benchmarks.run_all --device=$(DEVICE)

# For a machine with a GPU and no network, which has jax, flax, optax, orbax and
# PyTorch: carry this clone along with its data/ there. Nine minutes; see
# benchmarks/gpu.py for what it writes to runs/gpu.
KIT = gin-config psutil rich sentencepiece tensorboardX tqdm
gpu_kit: .venv/demo
	$(RUN) experiments.prepare_data --source=bible \
	    --vocab_size=1024 --output=data/study
	.venv/bin/pip download --quiet --dest data/wheels $(KIT)

gpu:
	$(PYTHON) -m venv --system-site-packages .venv-gpu
	.venv-gpu/bin/pip install --quiet --no-index --find-links=data/wheels $(KIT)
	.venv-gpu/bin/python -m benchmarks.gpu --device=gpu

# A warning is an error; the notebooks run too (less than a minute of processor
# time). The site is in docs/_build.
.venv/docs: .venv/demo
	$(INSTALL) '.[docs]'
	touch $@

docs: .venv/docs
	$(RUN) sphinx -W --keep-going --quiet -D nb_execution_mode=force \
	    -b html docs docs/_build

clean:
	rm -rf .venv runs data docs/_build
