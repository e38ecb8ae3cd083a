# The commands of doppel's development; meson and ninja do the work below.
#
#   make            build/doppel
#   make run        boots Debian's kernel to a shell on this terminal; in a pipe, runs the script on
#                   stdin in the guest (make fails when it fails; scripts/run has its status)
#   make test       unit, cpu and guest tests; the last line is "N passed, N failed"
#   make test-kvm   all tests of the KVM engine, one level down, under QEMU; `make test` has a few
#   make bench      each benchmark with its peer beside it
#   make lint       clang-format, clang-tidy, cppcheck
#   make install    to DESTDIR and PREFIX (/usr/local)
#   make clean
#
# Each installs the Debian packages that it needs and that are missing (scripts/deps).

BUILD ?= build
PREFIX ?= /usr/local
DESTDIR ?=

.PHONY: all build run test test-kvm bench lint format install clean
.DEFAULT_GOAL := all

all: build

build:
	@scripts/deps build
	@test -f $(BUILD)/build.ninja || meson setup $(BUILD)
	@ninja -C $(BUILD)

run: build
	@scripts/deps run
	@scripts/run

# The option sticks in the build folder, so that the next plain `make` builds the tests as well.
test:
	@scripts/deps build test
	@test -f $(BUILD)/build.ninja || meson setup -Dtests=true $(BUILD)
	@test -f $(BUILD)/.with-tests || meson configure -Dtests=true $(BUILD)
	@touch $(BUILD)/.with-tests
	@$(MAKE) --no-print-directory build
	@tests/run $(BUILD)

test-kvm:
	@scripts/deps build test bench
	@test -f $(BUILD)/build.ninja || meson setup -Dtests=true $(BUILD)
	@test -f $(BUILD)/.with-tests || meson configure -Dtests=true $(BUILD)
	@touch $(BUILD)/.with-tests
	@$(MAKE) --no-print-directory build
	@DOPPEL=$(BUILD)/doppel tests/kvm/nested.py --all --program $(BUILD)/tests/kvm/test_engine \
		--program $(BUILD)/tests/kvm/test_move \
		$(BUILD)/guests/*.elf

bench: build
	@scripts/deps bench
	@bench/run

lint:
	@scripts/deps build test lint
	@scripts/lint

format:
	@scripts/deps lint
	@git ls-files '*.c' '*.h' | xargs clang-format -i

# Under sudo the build folder is another user's: what root writes there, they can't build over.
install:
	@if [ -O . ] || [ ! -x $(BUILD)/doppel ]; then $(MAKE) --no-print-directory build; fi
	install -D -m 755 $(BUILD)/doppel "$(DESTDIR)$(PREFIX)/bin/doppel"

clean:
	@rm -rf $(BUILD) build-asan build-tsan build-lint
