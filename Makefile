# Everything happens in $(VENV): an editable installation, renewed when the C or the project file changes.
#
#   make demo     install and run the demonstration          make lint     ruff
#   make test     install and run the tests, in parallel     make typing   mypy --strict
#   make dev      install for development, C rebuilt         make bench    benchmarks against bare C
#   make clean    remove what was built                      make asan     kernel tests, C with AddressSanitizer
#   make kernel-coverage   which lines of the kernel the conformance suite reaches
#   make machine-mutants   the same kernel broken by machine, in hundreds of places
#   make kernels  the conformance suite on other kernels     make mutants  the same on kernels broken on purpose
#   make docs     the site, in build/docs
#   make dist     sdist and manylinux wheel in dist/, reproducible and checked
#   make verifytypes  pyright: are the types of all public names known?
#   make changelog   print the changelog made of the fragments in changes/
#   make soak     everything at once for SOAK_S seconds      make tsan     handler tests, C with ThreadSanitizer
#   make engine-mutants   the tests of the pitfalls on this library, broken on purpose
#   make free-threaded PYTHON=python3.14t   the tests on a free-threaded Python
#   make criu     the tests with a real CRIU, which it fetches from Debian
#   make qemu     the tests with guests of QEMU, which must be installed
#   make test-unprivileged   the tests as another user (run by root)
#   make test-refused        the tests where no userfaultfd can be opened

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
KERNELS_ARGS ?=
MUTANTS_ARGS ?=
COVERAGE_ARGS ?=
MACHINE_MUTANTS_ARGS ?=
ENGINE_MUTANTS_ARGS ?=
DIST_ARGS ?=
MYPY_ARGS ?= src tests
SOAK_S ?= 60

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
INSTALL := $(PIP) --no-build-isolation --editable
BUILD_INPUTS := pyproject.toml setup.py $(wildcard csrc/*.* csrc/*/*.*)
# Many tests mostly wait, so run two processes more than there are CPUs.
TEST_PROCESSES ?= $(shell expr $$(nproc) + 2)
RUN_TESTS := $(BIN)/python -m pytest -n $(TEST_PROCESSES) --maxprocesses 8 --dist worksteal

# Python itself is not instrumented, so the sanitizer's run-time library must be preloaded. Signals are left to Python and
# to the tests. Leaks are not checked, as Python never frees some memory. Modules in C++ (matplotlib's) throw exceptions
# through the library, which works only if libstdc++ is preloaded too.
ASAN_DIR := $(CURDIR)/build/asan
ASAN_ENV = LD_PRELOAD="$$($(CC) -print-file-name=libasan.so) $$($(CC) -print-file-name=libstdc++.so.6)" \
	ASAN_OPTIONS=detect_leaks=0:handle_segv=0:handle_sigbus=0:use_sigaltstack=0:abort_on_error=1 \
	PYTHONMALLOC=malloc PYUFFD_BUDGET_SCALE=6 PYUFFD_FRESH_CHILDREN=1 PYTHONPATH=$(ASAN_DIR)
# Not run with AddressSanitizer, which maps memory at any time. If that fails (limits, a full memory cgroup), it ends the
# process. Its mappings may fall into a gap that a test left or beside the test's mapping, and freed memory stays mapped.
# Its mlock() and mlockall() do nothing. Python's objects are in its memory, so a program has no heap for a snapshot, and its
# image spans terabytes. A fork's child waits forever if another thread was in the allocator at the fork.
ASAN_SUITE := tests/kernel/conformance/test_conformance.py::test
ASAN_WITHOUT := $(foreach name,COPY.ENOMEM MOVE.ENOMEM CONTINUE.ENOMEM ZEROPAGE.ENOMEM WRITEPROTECT.ENOMEM POISON.ENOMEM \
	REGISTER.ok.across-a-gap REGISTER.ok.between-gaps REGISTER.ok.fills-the-gap CONTINUE.EEXIST.page-can-go \
	COPY.EEXIST.frees-its-page MOVE.EBUSY.page-can-go,--deselect '$(ASAN_SUITE)[UFFDIO_$(name)') $(foreach name,test_diagnosis.py::test_too_many_mappings \
	test_handler_present.py::test_locked_memory test_regions_limits.py \
	test_source_like.py::test_what_is_not_content_is_refused_before_anything_is_registered \
	test_docstrings.py::test_examples_of_module[pyuffd.snapshot._restore] test_readme.py::test_program[docs/restore.md-0] \
	test_readme.py::test_program[docs/restore.md-1] test_readme.py::test_program[docs/snapshots.md-4] \
	test_restore_oracle.py::test_random_process test_unserve_parts.py::test_parts_of_forks,\
	--deselect 'tests/kernel/$(name)')

# As above. Accesses of Python, which is not instrumented, are ignored; the first report fails the test.
TSAN_DIR := $(CURDIR)/build/tsan
TSAN_ENV = LD_PRELOAD=$$($(CC) -print-file-name=libtsan.so) \
	TSAN_OPTIONS=ignore_noninstrumented_modules=1:die_after_fork=0:handle_segv=0:handle_sigbus=0:use_sigaltstack=0:halt_on_error=1:exitcode=66:suppressions=$(CURDIR)/tests/tsan.supp \
	PYUFFD_BUDGET_SCALE=4 PYUFFD_FRESH_CHILDREN=1 PYTHONPATH=$(TSAN_DIR)
TSAN_TESTS := tests/kernel/test_handler_*.py tests/kernel/test_layout_*.py tests/kernel/test_fault_races.py tests/kernel/test_thread_driver.py \
	tests/kernel/test_adopted_descriptors.py tests/kernel/test_async_source.py tests/process/test_forks.py \
	tests/process/test_stopping.py tests/process/test_pitfalls.py tests/process/test_process_driver*.py
# Not run with ThreadSanitizer, in this order: it turns vfork() into fork(), which sends an event that the test must not see;
# its mlockall() does nothing; 10,000 ranges take minutes; a thread that is left behind counts as a leak; and the
# ThreadSanitizer of gcc 12 fails an internal CHECK (tsan_clock.cpp:281, in a sem_post() of Python).
TSAN_WITHOUT := --deselect tests/process/test_process_driver.py::test_starts_without_a_fork \
	--deselect tests/kernel/test_handler_present.py::test_locked_memory \
	--deselect tests/kernel/test_handler_overlaps.py::test_many_ranges \
	--deselect tests/kernel/test_handler_checkpoint.py::test_stop_as_a_hold_waits \
	--deselect tests/kernel/test_handler_load.py::test_many_runs_and_a_hole

# Hundreds of short processes import the library and the tests, so cache the bytecode even if the environment forbids it.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: docs demo test test-unprivileged test-refused dev lint typing bench asan tsan soak kernels mutants kernel-coverage machine-mutants engine-mutants criu qemu free-threaded clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	$(BIN)/pyuffd demo

test: $(VENV)/.installed-test
	$(RUN_TESTS) $(PYTEST_ARGS)

# For root: the tests again as a user without capabilities, and where no userfaultfd can be opened. The latter skips nearly
# all tests, so it runs in one process: several would each have to collect all tests first.
test-unprivileged: $(VENV)/.installed-test
	tests/run_without_privilege $(PYTEST_ARGS)

test-refused: $(VENV)/.installed-test
	env -u PYUFFD_TESTS $(BIN)/python tests/seccomp_deny.py $(BIN)/python -m pytest -q tests/kernel tests/process $(PYTEST_ARGS)

dev: $(VENV)/.build-tools
	$(INSTALL) . --group dev
	$(BIN)/python csrc/build_stub.py
	@touch $(VENV)/.installed $(VENV)/.installed-test $(VENV)/.installed-dev

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

typing: $(VENV)/.installed-dev
	$(BIN)/mypy --strict $(MYPY_ARGS)

# Warnings are errors: a link without a target, a page that no other page leads to, a docstring that does not parse.
docs: $(VENV)/.installed-docs
	$(BIN)/sphinx-build --fail-on-warning --keep-going --quiet --jobs auto docs build/docs

.PHONY: dist changelog verifytypes
# DIST_ARGS='--try python3.11 python3.13' also installs both in clean environments of these interpreters;
# '--free-threaded python3.14t' also makes a wheel for that interpreter, which has no stable ABI.
dist: $(VENV)/.installed-release
	$(BIN)/python -m release.build $(DIST_ARGS)

# A type checker other than mypy must know the type of every public name.
verifytypes: $(VENV)/.installed-release
	cd src && PYTHONPATH=. ../$(BIN)/pyright --pythonpath ../$(BIN)/python --verifytypes pyuffd --ignoreexternal

changelog: $(VENV)/.installed-release
	$(BIN)/towncrier build --draft

bench: $(VENV)/.installed-test
	$(BIN)/python -m benchmarks.run

# Remove the build first: setuptools would also install modules that were since deleted.
asan: $(VENV)/.installed-test
	rm -rf $(ASAN_DIR) build/sanitize-address/lib*
	PYUFFD_SANITIZE=address $(PIP) --no-build-isolation --no-deps --target $(ASAN_DIR) .
	$(ASAN_ENV) $(BIN)/python -c 'import pyuffd._shim as s; assert "$(ASAN_DIR)" in s.__file__, s.__file__'
	$(ASAN_ENV) $(RUN_TESTS) tests/kernel $(ASAN_WITHOUT) $(PYTEST_ARGS)

tsan: $(VENV)/.installed-test
	rm -rf $(TSAN_DIR) build/sanitize-thread/lib*
	PYUFFD_SANITIZE=thread $(PIP) --no-build-isolation --no-deps --target $(TSAN_DIR) .
	$(TSAN_ENV) $(BIN)/python -c 'import pyuffd._shim as s; assert "$(TSAN_DIR)" in s.__file__, s.__file__'
	$(TSAN_ENV) $(RUN_TESTS) $(TSAN_TESTS) $(TSAN_WITHOUT) $(PYTEST_ARGS)

# An environment of its own: each Python finds the compiled module with its own suffix in the same tree.
FREE_THREADED_VENV ?= build/free-threaded
FREE_THREADED_TESTS ?= tests/unit tests/kernel tests/process

free-threaded:
	@$(PYTHON) -c 'import sys, sysconfig; sysconfig.get_config_var("Py_GIL_DISABLED") or sys.exit(f"PYTHON={sys.executable} has a GIL: name a free-threaded Python, as PYTHON=python3.14t")'
	$(MAKE) VENV=$(FREE_THREADED_VENV) $(FREE_THREADED_VENV)/.installed-test
	$(FREE_THREADED_VENV)/bin/python -W error -c 'import sys, pyuffd; assert not sys._is_gil_enabled()'
	$(FREE_THREADED_VENV)/bin/python -m pytest -n $(TEST_PROCESSES) --maxprocesses 8 --dist worksteal $(FREE_THREADED_TESTS) $(PYTEST_ARGS)

# PYUFFD_SEED repeats a run: a failure prints its seed.
soak: $(VENV)/.installed-test
	PYUFFD_SOAK_S=$(SOAK_S) $(BIN)/python -m pytest -m stress tests/stress/test_soak.py tests/stress/test_model.py tests/process/test_forks.py tests/kernel/test_restore_oracle.py \
		tests/process/test_changing_mappings.py $(PYTEST_ARGS)

# Both need QEMU and a long time; docs/kernels.md says how long, and what else they need.
kernels: $(VENV)/.installed-test
	$(BIN)/python -m tests.vm._matrix $(KERNELS_ARGS)

mutants: $(VENV)/.installed-test
	$(BIN)/python -m tests.vm._mutants $(MUTANTS_ARGS)

kernel-coverage: $(VENV)/.installed-test
	$(BIN)/python -m tests.vm._coverage $(COVERAGE_ARGS)

machine-mutants: $(VENV)/.installed-test
	$(BIN)/python -m tests.vm._machine_mutants $(MACHINE_MUTANTS_ARGS)

# Removes one fix of a pitfall at a time: docs/generated/engine-mutants.md lists the tests that notice.
engine-mutants: $(VENV)/.installed-test
	$(BIN)/python -m tests.engine_mutants $(ENGINE_MUTANTS_ARGS)

# Dump and restore real processes. CRIU is fetched into this user's cache; nothing is installed.
criu: $(VENV)/.installed-test
	$(BIN)/python -m tests.criu._get
	$(BIN)/python -m pytest -m "stress or not stress" tests/criu tests/process/test_criu_lazy_pages.py tests/unit/test_criu_images.py $(PYTEST_ARGS)

# Snapshots of QEMU guests (apt-get install qemu-system-x86): each kind of memory, each method.
qemu: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m "stress or not stress" tests/process/test_qemu.py $(PYTEST_ARGS)

clean:
	rm -rf $(VENV) build dist .tox .mypy_cache .pytest_cache .ruff_cache src/*.egg-info src/pyuffd/_shim*.so csrc/*.o csrc/*/*.o
	find src tests benchmarks examples -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

# Debian and Ubuntu package ensurepip separately, and without it `python3 -m venv` fails half-way.
$(BIN)/python:
	@$(PYTHON) csrc/build_checks.py
	@if $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null; then $(PYTHON) -m venv $(VENV); \
	elif $(PYTHON) -m virtualenv --version >/dev/null 2>&1; then $(PYTHON) -m virtualenv --quiet $(VENV); \
	else echo "$(PYTHON) cannot make a virtual environment: install python3-venv (apt-get install python3-venv)." >&2; \
	exit 1; fi

# The pip that comes with Python may be too old for dependency groups.
$(VENV)/.build-tools: pyproject.toml | $(BIN)/python
	$(PIP) --upgrade 'pip>=25.1' 'setuptools>=77' 'cffi>=1.17' wheel
	@touch $@

$(VENV)/.installed: $(VENV)/.build-tools $(BUILD_INPUTS)
	$(INSTALL) .
	@touch $@

# The C code is built once, by `.installed`; these targets add what others need.
$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP) --group test
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) --group dev
	@touch $(VENV)/.installed-test $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(PIP) --group docs
	@touch $@

$(VENV)/.installed-release: $(VENV)/.build-tools
	$(PIP) --group release
	@touch $@
