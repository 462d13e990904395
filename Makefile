# Everything a newcomer needs, from a machine with Python 3.10+, a C++20 compiler and make.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
CMAKE  ?= $(shell command -v $(BIN)/cmake || command -v cmake)

.PHONY: help native
help:
	@echo "make native      build the operator library into build/native (development)"

native:
	@mkdir -p build/native
	@cmake -S . -B build/native -G Ninja -DCMAKE_BUILD_TYPE=Release >/dev/null
	@cmake --build build/native
