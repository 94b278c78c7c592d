# make demo: install, download Fashion-MNIST, train I-JEPA, evaluate. make test: the test suite.
# make lint: ruff and pyrefly. make test-long, make test-faults: the tests that `make test` skips.
# Another interpreter than python3: make PYTHON=python3.12 demo
.PHONY: setup demo test test-faults test-long lint bench clean
RUN ?= runs/ijepa_fashion_mnist

setup:
	@PYTHON="$(PYTHON)" scripts/setup.sh

demo: setup
	.venv/bin/jepax train ijepa_fashion_mnist --run-dir $(RUN)

test:
	@PYTHON="$(PYTHON)" scripts/setup.sh test
	.venv/bin/python -m pytest -n 2 --dist loadfile

test-faults:
	@PYTHON="$(PYTHON)" scripts/setup.sh test
	.venv/bin/python -m pytest tests/faults -m "fault or slow_fault"

test-long:
	@PYTHON="$(PYTHON)" scripts/setup.sh test
	.venv/bin/python -m pytest -n 2 --dist loadfile -m long

lint:
	@PYTHON="$(PYTHON)" scripts/setup.sh test
	.venv/bin/ruff check . && .venv/bin/ruff format --check . && .venv/bin/pyrefly check

bench:
	@PYTHON="$(PYTHON)" scripts/setup.sh bench
	.venv/bin/python benchmarks/step_vs_torch.py

clean:
	rm -rf .venv build *.egg-info
