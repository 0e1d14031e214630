# Every target makes .venv from constraints.txt first. PYTHON=python3.12 picks another interpreter.
PYTHON ?= python3
BIN := .venv/bin
SOURCES := pyproject.toml setup.py constraints.txt CMakeLists.txt $(wildcard csrc/*/*.h csrc/*/*.cpp csrc/*/*/*.h python/*)

.PHONY: train test bench bench-gpu results lint cuda-check docs clean

train: .venv/installed
	$(BIN)/fastmoe train tiny

# what works in processes of its own runs beside the rest, on the time that is left over
test: .venv/installed-test
	mkdir -p build
	nice -n 19 $(BIN)/python -m pytest -m apart > build/apart.log 2>&1 & \
	$(BIN)/python -m pytest -m "not apart"; rest=$$?; \
	wait $$!; apart=$$?; cat build/apart.log; exit $$((rest | apart))

bench: .venv/installed-bench
	$(BIN)/python -m benchmarks.run
	$(BIN)/python -m benchmarks.report

bench-gpu: .venv/installed-bench
	$(BIN)/python -m benchmarks.run --device cuda
	$(BIN)/python -m benchmarks.report

results: .venv/installed-bench
	$(BIN)/python -m benchmarks.report

lint: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'python/*')

cuda-check: .venv/installed
	$(BIN)/cmake -S . -B build/cuda -G Ninja -DFM_PYTHON=OFF
	$(BIN)/cmake --build build/cuda --target cuda_check

docs: .venv/installed-docs
	$(BIN)/pdoc fastmoe -o build/docs

clean:
	rm -rf .venv build fastmoe/_C*.so

.venv/tools: constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt setuptools wheel pybind11 cmake ninja
	touch $@

.venv/installed: .venv/tools $(SOURCES)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pip install -q -c constraints.txt --no-build-isolation -e .
	touch $@

.venv/installed-%: .venv/installed
	$(BIN)/pip install -q -c constraints.txt --no-build-isolation -e '.[$*]'
	touch $@
