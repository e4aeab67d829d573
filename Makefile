# SPDX-License-Identifier: GPL-2.0
ifneq ($(KERNELRELEASE),)
# Read by kbuild, out of tree and in tree alike.

obj-$(CONFIG_PMSKB) += rust/

else
# Read by make in this directory.

ifdef KDIR
# With a kernel build tree of the machine's own: the module, nothing else.

all: modules
modules modules_install:
	$(MAKE) -C $(KDIR) M=$(CURDIR) CONFIG_PMSKB=m $@
clean:
	$(MAKE) -C $(KDIR) M=$(CURDIR) CONFIG_PMSKB=m clean
.PHONY: all modules modules_install clean

else
# Everything else happens in the lab, which brings its own tool chain.

LAB := tools/lab/lab
export KERNEL ?= 7.2
ifdef PMSKB_BUILD
export PMSKB_BUILD
endif
ifdef MINUTES
export MINUTES
endif
CUTS ?= 200
SEED ?= 1
export SEED
IMAGES ?= 100000

all:
	@$(LAB) all

root kernel module tools selftests docs rootfs:
	@$(LAB) $@

vm:
	@$(LAB) shell

demo:
	@$(LAB) build
	@tools/demo/demo

bite:
	@$(LAB) build
	@tools/demo/bite

torture:
	@$(LAB) build
	@tools/demo/torture --cuts $(CUTS) --seed $(SEED)

test:
	@$(LAB) $@ $(if $(AGAIN),--again)

test-debug test-faults lint fuzz fuzz-kernel:
	@$(LAB) $@

crash:
	@$(LAB) crash

crash-trace:
	@$(LAB) build
	@tools/trace/trace --images $(IMAGES) --seed $(SEED) $(if $(BROKEN),--broken)

bench:
	@tools/bench/bench $(if $(QUICK),--quick)

bench-core:
	@$(LAB) bench-core $(if $(QUICK),--quick)

clean distclean:
	@$(LAB) $@

help:
	@echo 'pmskb: received packets as the durable form of application data'
	@echo
	@echo 'In the lab (as root, on Debian 12 or 13; fetches what it needs, all in build/):'
	@echo '  make             the module and the tools'
	@echo '  make demo        PUTs over a real NIC, a power cut, and every object found again'
	@echo '  make bite        the demo with one write-back or fence taken out: it must fail'
	@echo '  make torture     power cuts at moments that SEED=s (1) chooses, CUTS=n of them (200)'
	@echo '  make test        every check; ends with "N passed, N failed" (AGAIN=1: those, too,'
	@echo '                   that passed before and for which nothing has changed since)'
	@echo '  make test-debug  the self-tests on a kernel with KASAN, lockdep, kmemleak and failing'
	@echo '                   allocations, which is built first (once)'
	@echo '  make test-faults the self-tests while every 211th allocation of the module fails; with'
	@echo '                   KERNEL=$(KERNEL)-debug on that kernel'
	@echo '  make lint        rustfmt, clippy, checkpatch, shellcheck'
	@echo '  make bench       what persisting received data costs, beside what people use today: counted'
	@echo '                   instructions, and throughput (half an hour; QUICK=1: counts only, 5 minutes)'
	@echo '  make bench-core  what the core costs, beside LMDB and RocksDB (5 minutes; QUICK=1: 10 s)'
	@echo '  make crash       every crash state of every short history of the store; an hour'
	@echo '  make crash-trace IMAGES=n (100000) images of crashes between stores that the module made, SEED=s;'
	@echo '                   BROKEN=1: with one flush or fence after the other taken out of the module'
	@echo '  make fuzz        damaged images and random operations; MINUTES=n for each target (30)'
	@echo '  make fuzz-kernel calls, damaged images and packets, at the module in a guest; MINUTES=n for'
	@echo '                   each (10), SEED=s (1); KERNEL=$(KERNEL)-debug on a debug kernel'
	@echo '  make vm          a shell in a virtual machine with a store attached'
	@echo '  make kernel      the kernel to build against; also: root rootfs'
	@echo '  make module      pmskb.ko; also: tools selftests docs'
	@echo '  make clean       remove what was built from these files'
	@echo '  make distclean   remove all of build/, kernels and build root included'
	@echo 'Settings:'
	@echo '  KERNEL=7.2|7.3   kernel series (now $(KERNEL))'
	@echo '  PMSKB_BUILD=DIR  build there and not in build/'
	@echo
	@echo 'With a kernel of your own, no lab (CONFIG_RUST=y, its rustc and bindgen installed):'
	@echo '  make KDIR=/lib/modules/$$(uname -r)/build            pmskb.ko'
	@echo '  make KDIR=... modules_install                       install it'
	@echo
	@echo 'More: README.md, tools/lab/README.md'

.PHONY: all root kernel module tools selftests docs rootfs vm demo bite torture test test-debug test-faults lint crash crash-trace fuzz fuzz-kernel bench bench-core clean distclean help
endif

endif
