// SPDX-License-Identifier: GPL-2.0-only
/*
 * Stores, flushes and fences in a known order, between two marks, so that
 * run-guest can say what a power cut must leave.
 */
#include <linux/io.h>
#include <linux/irqflags.h>
#include <linux/mm.h>
#include <linux/module.h>

#include "pattern.h"

static unsigned long phys;
module_param(phys, ulong, 0444);
MODULE_PARM_DESC(phys, "guest-physical address of a page of persistent memory");

static int __init powercut_test_init(void)
{
	word *p = __va(phys), *alias;
	unsigned long flags;
	int i;

	/* A second, vmalloc-space address: no direct map, to be walked for. */
	alias = memremap(phys, PAGE_SIZE, MEMREMAP_WB);
	if (!alias || alias == p)
		return -ENOMEM;

	/* One vCPU, and no fence of an interrupt in between. */
	local_irq_save(flags);
	mark();

	for (i = 0; i < 10; i++)
		store_line(p, 0xa, i);
	clwb_line(p);
	clwb_line(p + 8);
	clwb_line(p + 16 + 3);		/* any address in the line will do */
	clflushopt_line(p + 24);
	clwb_line(p + 32);
	sfence();			/* fence 1: lines 0 to 4 */
	store_line(p, 0xb, 0);

	movnti_line(p, 0xc, 10);
	movnti_line(p, 0xc, 11);
	mfence();			/* fence 2: lines 10 and 11 */

	store_line(p, 0xe, 14);
	movnti_word(p, 0xf, 14, 2);
	sfence();			/* fence 3: one word of line 14 */

	store_line(alias, 0xa, 15);
	clwb_line(alias + 15 * 8);
	sfence();			/* fence 4: line 15 */

	store_line(p, 0xa, 16);
	clflush_line(p + 16 * 8);	/* needs no fence */

	clwb_line(p + 8);		/* clean */
	clwb_line(p + 40);		/* line 5, never fenced */
	clwb_line(p + 40);		/* again */
	movnti_line(p, 0xd, 12);	/* never fenced */
	movnti_line(p, 0xd, 13);

	mark();
	local_irq_restore(flags);
	memunmap((void *)alias);
	return 0;
}

static void __exit powercut_test_exit(void)
{
}

module_init(powercut_test_init);
module_exit(powercut_test_exit);
MODULE_DESCRIPTION("Known stores, flushes and fences for pmskb's power cut");
MODULE_LICENSE("GPL");
