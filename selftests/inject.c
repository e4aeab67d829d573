// SPDX-License-Identifier: GPL-2.0
#include "inject.h"

#include "common.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* The kernel's count, of this thread; else the module's. */
static int kernel = -1, module = -1;
static long before;

static int put_number(int fd, unsigned int n)
{
	char text[16];
	int len = snprintf(text, sizeof(text), "%u", n);

	return pwrite(fd, text, len, 0) == len ? 0 : -errno;
}

#define DEBUGFS "/sys/kernel/debug/"

/* What the kernel would leave out by default, and without a backtrace of each in its log. */
static void kernel_settings(void)
{
	static const char *const kinds[] = { "failslab", "fail_page_alloc", "fail_usercopy" };
	char dir[64];
	size_t i;

	for (i = 0; i < ARRAY_LEN(kinds); i++) {
		snprintf(dir, sizeof(dir), DEBUGFS "%s", kinds[i]);
		write_file(dir, "verbose", "0");
		write_file(dir, "ignore-gfp-wait", "N");
		write_file(dir, "ignore-gfp-highmem", "N");
		write_file(dir, "min-order", "0");
	}
}

static const char *kinds_set(unsigned int kinds)
{
	char text[16];

	snprintf(text, sizeof(text), "%u", kinds);
	return write_file(PARAMETERS, "inject_kinds", text) ? "the module was built without PMSKB_INJECT=1" : NULL;
}

const char *inject_open(unsigned int kinds)
{
	kernel = module = -1;
	if (!(kinds & ~(INJECT_MEMORY | INJECT_COPIES)))
		kernel = open("/proc/thread-self/fail-nth", O_RDWR | O_CLOEXEC);
	if (kernel >= 0) {
		kernel_settings();
		return NULL;
	}
	module = open(PARAMETERS "inject_nth", O_WRONLY | O_CLOEXEC);
	if (module < 0)
		return "the kernel has no fault injection, and the module was built without PMSKB_INJECT=1";
	return kinds_set(kinds);
}

void inject_arm(unsigned int nth)
{
	int err;

	if (kernel >= 0) {
		err = put_number(kernel, nth);
	} else {
		before = read_number(PARAMETERS "injected");
		err = put_number(module, nth);
	}
	if (err)
		abort();
}

bool inject_disarm(void)
{
	char text[16] = "";
	ssize_t n;
	int tries;

	if (kernel < 0) {
		if (put_number(module, 0))
			abort();
		return read_number(PARAMETERS "injected") != before;
	}
	/* What is left of the count; if it is 1, the copy of this number is what fails. */
	n = pread(kernel, text, sizeof(text) - 1, 0);
	/* And if more, it may be the copy of the next. */
	for (tries = 0; tries < 2 && put_number(kernel, 0); tries++)
		;
	return n > 0 && !atoi(text);
}

const char *inject_every(unsigned int nth)
{
	const char *why = kinds_set(INJECT_MEMORY | INJECT_FRAMES);
	char text[16];

	snprintf(text, sizeof(text), "%u", nth);
	if (!why && write_file(PARAMETERS, "inject", text))
		why = "the module does not take it";
	return why;
}
