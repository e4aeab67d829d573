// SPDX-License-Identifier: GPL-2.0-only
/*
 * The same from user space: stores to a DAX mapping, whose flushes the plugin
 * has to find through the process's page tables.
 *
 * usage: user DEVICE OFFSET
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "pattern.h"

int main(int argc, char **argv)
{
	cpu_set_t one;
	word *p;
	int fd;

	if (argc != 3)
		return 2;
	fd = open(argv[1], O_RDWR);
	if (fd < 0) {
		perror(argv[1]);
		return 1;
	}
	p = mmap(NULL, 2 << 20, PROT_READ | PROT_WRITE, MAP_SHARED, fd,
		 strtoull(argv[2], NULL, 0));
	if (p == MAP_FAILED) {
		perror("mmap");
		return 1;
	}
	/* A fence drains the vCPU on which it runs. */
	CPU_ZERO(&one);
	CPU_SET(0, &one);
	if (sched_setaffinity(0, sizeof(one), &one)) {
		perror("sched_setaffinity");
		return 1;
	}

	mark();
	store_line(p, 0xa, 0);
	store_line(p, 0xa, 1);
	store_line(p, 0xa, 2);
	clwb_line(p);
	clflushopt_line(p + 8);
	movnti_line(p, 0xc, 3);
	sfence();
	mark();
	return 0;
}
