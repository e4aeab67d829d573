/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Only compiled: the interface's header before anything else, in C and C++,
 * 64-bit and 32-bit, and with LAYOUT its layout as static assertions.
 */
#include <linux/pmskb.h>

#ifdef LAYOUT
#include <stddef.h>
#include "layout.h"

#ifndef __cplusplus
#define static_assert _Static_assert
#endif
#define SIZE_IS(s, size) \
	static_assert(sizeof(struct s) == (size), "size of " #s);
#define FIELD_IS(s, f, off, size) \
	static_assert(offsetof(struct s, f) == (off), "offset of " #s "." #f); \
	static_assert(sizeof(((struct s *)0)->f) == (size), "size of " #s "." #f);
#define DIRECTION(cmd, dir, type) \
	static_assert(_IOC_DIR(cmd) == (dir) && _IOC_SIZE(cmd) == sizeof(type) && \
		      _IOC_TYPE(cmd) == PMSKB_IOC_MAGIC, #cmd);

LAYOUT_OF_PMSKB(SIZE_IS, FIELD_IS)

DIRECTION(PMSKB_IOC_FORMAT, _IOC_READ | _IOC_WRITE, struct pmskb_format)
DIRECTION(PMSKB_IOC_ATTACH, _IOC_READ | _IOC_WRITE, struct pmskb_attach)
DIRECTION(PMSKB_IOC_DETACH, _IOC_WRITE, struct pmskb_detach)
DIRECTION(PMSKB_IOC_INFO, _IOC_READ, struct pmskb_store_info)
DIRECTION(PMSKB_IOC_ATTACH_SOCKET, _IOC_WRITE, __s32)
DIRECTION(PMSKB_IOC_SUBMIT, _IOC_WRITE, struct pmskb_submit)

/* The first 24 bytes of a descriptor are a struct dmabuf_cmsg. */
static_assert(offsetof(struct pmskb_desc, time) == 24, "struct dmabuf_cmsg first");

/* Every name can be used. */
unsigned int names_of_pmskb(void);
unsigned int names_of_pmskb(void)
{
	return SOL_PMSKB + sizeof(PMSKB_ULP_NAME) + PMSKB_FRAME_SIZE + PMSKB_MAX_KEY +
	       PMSKB_MAX_OPS + PMSKB_MAX_OBJECT + PMSKB_MAX_EXTENTS + PMSKB_LABEL_LEN +
	       PMSKB_ATTACH + PMSKB_RX_MODE + PMSKB_PERSIST + PMSKB_RELEASE + PMSKB_INFO +
	       PMSKB_RX_BYTES + PMSKB_RX_DESC + PMSKB_CMSG_DESC + PMSKB_CMSG_SEND + PMSKB_MAX_SENDS + PMSKB_CSUM_NONE +
	       PMSKB_CSUM_DERIVED + PMSKB_CSUM_HARDWARE + PMSKB_CSUM_COMPUTED +
	       PMSKB_TIME_NONE + PMSKB_TIME_HARDWARE + PMSKB_TIME_SOFTWARE +
	       PMSKB_TIME_PLACEMENT + PMSKB_DESC_COPIED + PMSKB_DESC_PARTIAL +
	       PMSKB_OP_PUT + PMSKB_OP_DELETE + PMSKB_OP_RELEASE + PMSKB_OP_CREATE +
	       PMSKB_OP_REPLACE + PMSKB_OP_KEEP + PMSKB_OP_KEY_EXTENTS + PMSKB_RES_COPIED +
	       PMSKB_RES_REPLACED + PMSKB_UNPLACED_NR + PMSKB_FORMAT_FORCE +
	       PMSKB_FORMAT_HEADS_DRAM;
}
#endif
