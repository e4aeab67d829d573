/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Failures on purpose: the Nth thing that can fail, of what this thread does in the kernel,
 * fails, and no other. By the kernel's own fault injection where there is one, else by that of
 * a module built with PMSKB_INJECT=1 (rust/inject.rs).
 */
#ifndef PMSKB_SELFTESTS_INJECT_H
#define PMSKB_SELFTESTS_INJECT_H

#include <stdbool.h>

/* The kernel's has the first two, always both; the module's has all, of its own. */
#define INJECT_MEMORY 1U	/* allocations */
#define INJECT_COPIES 2U	/* copies from and to user memory */
#define INJECT_MEDIA 4U		/* reads of the media */
#define INJECT_FRAMES 8U	/* frames and heads; there are none for a moment */

/* Makes things of these kinds fail from then on: NULL, or why it cannot be had here. */
const char *inject_open(unsigned int kinds);
void inject_arm(unsigned int nth);
/* Nothing fails any more. Whether something did since inject_arm(). */
bool inject_disarm(void);

/*
 * In the background: every so manieth allocation, frame or head of the module fails, in any
 * context; 0 ends it. Only the module can do that. NULL, or why not.
 */
const char *inject_every(unsigned int nth);

#endif
