# make compare   train and evaluate the quick set, print the table, save the plot   (a few minutes on a laptop CPU)
# make test      run every test
# make tpu       compile the steps of every mechanism for a TPU that need not be there
# make lint      ruff and mypy
# make docs      write the tables of docs/ that list what is registered
# Each makes .venv from the pinned requirements if it is not there.
# make requirements                      compile the pins from pyproject.toml; those that still fit stay (needs the network)
# make requirements UPGRADE=--upgrade    the same with the newest releases that pyproject.toml allows

PYTHON ?= python3
WORKDIR ?= runs/compare
PIP = .venv/bin/python -m pip install --quiet --disable-pip-version-check
# Large temporaries in huge pages: a quarter faster on Linux, ignored elsewhere.
export GLIBC_TUNABLES = glibc.malloc.hugetlb=1

.PHONY: compare test tpu lint docs format requirements clean

compare: .venv/.run
	.venv/bin/python sweep.py --config=configs/sweeps/compare.py --workdir=$(WORKDIR)

test: .venv/.test
	.venv/bin/python -m pytest -n 2 --dist loadscope

tpu: .venv/.test
	.venv/bin/python benchmarks/tpu_compiles.py

lint: .venv/.test
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

docs: .venv/.run
	.venv/bin/python docs/tables.py

format: .venv/.test
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

# One file for all Pythons and platforms: where versions differ, the lines carry markers.
COMPILE = UV_CUSTOM_COMPILE_COMMAND="make requirements" .venv/bin/uv pip compile --quiet --universal --python-version 3.11 \
	--no-annotate $(UPGRADE) pyproject.toml

requirements: .venv/.run
	$(PIP) 'uv>=0.13,<0.14'
	$(COMPILE) -o requirements.txt
	$(COMPILE) --extra test -c requirements.txt -o requirements-test.txt

.venv/.run: requirements.txt
	@$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed (make PYTHON=python3.11 ...)"'
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	$(PIP) -r requirements.txt
	@touch $@

.venv/.test: .venv/.run requirements-test.txt
	$(PIP) -r requirements-test.txt
	@touch $@

clean:
	rm -rf .venv runs
