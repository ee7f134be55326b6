# `make help` lists what there is. Everything runs in .venv, which `make install` fills.
PYTHON ?= python3
ARGS ?=
BIN := .venv/bin
# A link that leads nowhere and a page that the navigation leaves out are errors; the variable silences an advertisement of the theme's.
MKDOCS := NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
# Computed once, so that every rank and every restart of one `make train` writes to the same folder.
RUN_DIR := runs/tiny_moe-$(shell date +%Y%m%d-%H%M%S)

.PHONY: help install model-check train test check docs kernels test-gpu bench bench-gpu parity reshard chaos fused-schedules study-rounding test-slurm \
  study-precision clean

help:
	@echo "make install   make .venv and install Moesaic with its development tools (once; PYTHON=python3.12 chooses the Python)"
	@echo "make train     train the demonstration, recipe=tiny_moe, on two processes; ARGS='train.steps=100 ...' overrides knobs"
	@echo "make test      run the tests that need no GPU; ARGS='-k name' passes options to pytest"
	@echo "make check     formatting, lint, types, structure, and the documentation's build"
	@echo "make docs      the documentation as a site, in site/, which opens from a disk: site/index.html"
	@echo "make kernels   compile every Triton kernel for every target, no GPU needed; the tables of docs/kernels.md; fails on a spill"
	@echo "make test-gpu  run the kernels' tests on a GPU; make bench-gpu times them there"
	@echo "make test-slurm   a Slurm of its own on this machine: submit, train two ranks, preempt, queue again, go on; needs root and apt"
	@echo "               install slurm-wlm munge; some seven minutes, most of them Slurm's waits"
	@echo "make bench     run every file in benchmarks/"
	@echo "make model-check   SPIN on the protocol of the fused kernels, all states of small sizes, samples of larger ones; some 15 minutes, 5 GB; needs spin and gcc"
	@echo "make parity    every way to spread a model against one process, and the tables of docs/parity.md; up to half an hour on two cores"
	@echo "make reshard   a checkpoint of every layout, loaded into every other one; some minutes on two cores"
	@echo "make chaos     FAULTS=200 faults of SEED=0, each met by a small run that must go on as if nothing had happened; FROM=n goes on"
	@echo "               where a campaign was left, ONLY='kind,kind' chooses; some 3 s a fault on one core"
	@echo "make fused-schedules   COUNT=2000 schedules from SEED=0 of the fused kernels, several programs a rank; some 2 s each on one core"
	@echo "make study-rounding   what token rounding costs in quality, over seeds; about half an hour on two cores"
	@echo "make study-precision  what each recipe of low precision costs in quality, over seeds; hours on two cores, goes on where it"
	@echo "               stopped; ARGS='tokens=3000000 seeds=3 start=0 runs=main'"
	@echo "make clean     remove .venv, caches and build products; runs/ stays"

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: PYTHON=$(PYTHON): must be Python 3.11 or newer; name one, as in: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "error: PYTHON=$(PYTHON): has no venv module; install it (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[dev]'
	@touch $@

.venv/installed-bench: .venv/installed
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[bench]'
	@touch $@

# torchrun gives each rank one thread unless told otherwise; two ranks share the machine.
train: install
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-$$($(BIN)/python -c 'import os; print(max(1, (os.cpu_count() or 2) // 2))')} \
	  $(BIN)/torchrun --standalone --nproc-per-node 2 launch/train.py recipe=tiny_moe run_dir=$(RUN_DIR) $(ARGS)

# Two test processes of one thread each: more threads than cores make everything slower.
# loadgroup: tests that share ranks run in one of them.
test: install
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadgroup $(ARGS)

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest -q tests/test_structure.py
	$(MKDOCS)

docs: install
	$(MKDOCS)
	@echo site/index.html

kernels: install
	$(BIN)/python -m moesaic.kernels.targets --page docs/kernels.md $(ARGS)

# Beside those marked as needing a GPU: tests that run kernels interpreted or, with TRITON_INTERPRET=0, compiled.
GPU_TESTS := $(patsubst %,tests/kernels/test_%.py,cross_entropy_triton rope grouped_gemm experts fused_ep)

# Both say in one line that there is no GPU, where there is none, and fail.
test-gpu: install
	@$(BIN)/python -m moesaic.kernels.bench --only-check-gpu
	TRITON_INTERPRET=0 $(BIN)/pytest -m gpu $(ARGS)
	TRITON_INTERPRET=0 $(BIN)/pytest $(GPU_TESTS) $(ARGS)

bench-gpu: install
	@TRITON_INTERPRET=0 $(BIN)/python -m moesaic.kernels.bench $(ARGS)

# A file that only others import, and studies, which take long, are no benchmarks.
bench: .venv/installed-bench
	@set -e; for file in $(filter-out benchmarks/compare.py benchmarks/study_%.py,$(wildcard benchmarks/*.py)); do \
	  $(BIN)/python $$file; done

model-check: install
	$(BIN)/python -m tests.kernels.spin

test-slurm: install
	OMP_NUM_THREADS=1 $(BIN)/pytest -m slow tests/launch/test_slurm.py $(ARGS)

parity: install
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.parallel.report $(ARGS)

reshard: install
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "slow or not slow" tests/parallel/test_reshard.py $(ARGS)

FAULTS ?= 200
SEED ?= 0
FROM ?= 0
ONLY ?=
COUNT ?= 2000
chaos: install
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.launch.chaos faults=$(FAULTS) seed=$(SEED) from=$(FROM) 'only=$(ONLY)'

fused-schedules: install
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.kernels.schedules --count $(COUNT) --seed $(SEED)

study-rounding: install
	$(BIN)/python benchmarks/study_rounding.py $(ARGS)

study-precision: install
	$(BIN)/python benchmarks/study_precision.py $(ARGS)

clean:
	rm -rf .venv build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
