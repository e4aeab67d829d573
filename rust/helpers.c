// SPDX-License-Identifier: GPL-2.0
/* C that Rust cannot say: static inlines and macros of kernel headers. */
#include "helpers.h"

void pmskb_wmb(void)
{
	wmb();
}
