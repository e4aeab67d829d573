// SPDX-License-Identifier: GPL-2.0
/*
 * Promises about include/uapi/linux/pmskb.h that a program can check; the
 * Makefile compiles it in C and C++ besides (header-alone.c).
 */
#include "common.h"
#include "layout.h"

#include <sys/ioctl.h>

#include "harness.h"

struct field {
	const char *type, *name;
	size_t off, size, real_off, real_size;
};

static const struct field fields[] = {
#define SIZE_OF(s, size) { #s, NULL, 0, size, 0, sizeof(struct s) },
#define FIELD_OF(s, f, off, size) \
	{ #s, #f, off, size, offsetof(struct s, f), sizeof(((struct s *)0)->f) },
	LAYOUT_OF_PMSKB(SIZE_OF, FIELD_OF)
};

TEST(every_structure_has_the_documented_layout)
{
	size_t i;

	for (i = 0; i < ARRAY_LEN(fields); i++) {
		EXPECT_EQ(fields[i].off, fields[i].real_off)
			TH_LOG("offset of %s.%s", fields[i].type, fields[i].name);
		EXPECT_EQ(fields[i].size, fields[i].real_size)
			TH_LOG("size of %s %s", fields[i].type, fields[i].name ?: "");
	}
}

/*
 * Where i386 differs is alignment: 4 for 8-byte members unless they say
 * otherwise. Without a hole, and a size that is a multiple of 8 wherever there
 * is an 8-byte member, alignment cannot matter.
 */
TEST(layout_is_the_same_for_32_bit_callers)
{
	const struct field *type = NULL;
	size_t i, end = 0;

	for (i = 0; i < ARRAY_LEN(fields); i++) {
		const struct field *f = &fields[i];

		if (!f->name) {
			if (type) {
				EXPECT_EQ(type->size, end)
					TH_LOG("padding at the end of %s", type->type);
			}
			type = f;
			end = 0;
			continue;
		}
		EXPECT_EQ(end, f->real_off)
			TH_LOG("hole before %s.%s", f->type, f->name);
		if (f->size == 8) {
			EXPECT_EQ(0, f->real_off % 8);
		}
		end = f->real_off + f->real_size;
	}
	EXPECT_EQ(type->size, end);
}

TEST(a_descriptor_starts_like_a_dmabuf_cmsg)
{
	/* struct dmabuf_cmsg: frag_offset, frag_size, frag_token, dmabuf_id, flags */
	EXPECT_EQ(0, offsetof(struct pmskb_desc, offset));
	EXPECT_EQ(8, offsetof(struct pmskb_desc, len));
	EXPECT_EQ(12, offsetof(struct pmskb_desc, token));
	EXPECT_EQ(16, offsetof(struct pmskb_desc, store));
	EXPECT_EQ(20, offsetof(struct pmskb_desc, flags));
	EXPECT_EQ(24, offsetof(struct pmskb_desc, time));
}

TEST(commands_carry_direction_and_size)
{
	EXPECT_EQ(_IOC_READ | _IOC_WRITE, _IOC_DIR(PMSKB_IOC_FORMAT));
	EXPECT_EQ(_IOC_READ | _IOC_WRITE, _IOC_DIR(PMSKB_IOC_ATTACH));
	EXPECT_EQ(_IOC_WRITE, _IOC_DIR(PMSKB_IOC_DETACH));
	EXPECT_EQ(_IOC_READ, _IOC_DIR(PMSKB_IOC_INFO));
	EXPECT_EQ(_IOC_WRITE, _IOC_DIR(PMSKB_IOC_SUBMIT));
	EXPECT_EQ(_IOC_READ | _IOC_WRITE, _IOC_DIR(PMSKB_IOC_OPEN));
	EXPECT_EQ(_IOC_READ | _IOC_WRITE, _IOC_DIR(PMSKB_IOC_ALLOC));
	EXPECT_EQ(sizeof(struct pmskb_store_info), _IOC_SIZE(PMSKB_IOC_INFO));
}

TEST_HARNESS_MAIN
