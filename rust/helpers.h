/* SPDX-License-Identifier: GPL-2.0 */
/* C that Rust cannot say: static inlines and macros of kernel headers. */
#ifndef _PMSKB_HELPERS_H
#define _PMSKB_HELPERS_H

#include <linux/skbuff.h>

void pmskb_wmb(void);

#endif
