// SPDX-License-Identifier: GPL-2.0
/*
 * Promises about the CRC32C of objects: that a record has one if the call, the socket or
 * the store asks for it, that it is right, and what it costs. media_scan() computes each that
 * it finds again, by code of its own.
 */
#include "common.h"
#include "media.h"

#include <errno.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

#include "harness.h"
#include "objects.h"

#define ERRNO(call) ((call) < 0 ? errno : 0)

FIXTURE(crc) {
	struct store s;
	struct conn c;
	struct way way;
};

FIXTURE_VARIANT(crc) {
	enum dev dev;
	enum how how;
	bool ioctl;
};

FIXTURE_VARIANT_ADD(crc, persist_pmem) { DEV_PMEM, HOW_ACCEPTED_OPT, false };
FIXTURE_VARIANT_ADD(crc, submit_dax) { DEV_DAX, HOW_LISTENER_IOCTL, true };

static void connect_to(struct __test_metadata *_metadata, struct store *s, struct conn *c, enum how how)
{
	struct net net = { AF_INET, LINK_LO };

	ASSERT_EQ(0, conn_make(c, &net, s->fd, how));
	ASSERT_EQ(0, sock_mode(c->s, PMSKB_RX_DESC));
}

#define CONNECT() do { \
	connect_to(_metadata, &self->s, &self->c, variant->how); \
	self->way = (struct way) { self->s.fd, self->c.s, variant->ioctl }; \
} while (0)

FIXTURE_SETUP(crc)
{
	const char *why;

	if (!dev_path(variant->dev, &why))
		SKIP(return, "%s", why);
	ASSERT_EQ(0, store_make(&self->s, variant->dev, 0, 0));
	CONNECT();
}

FIXTURE_TEARDOWN(crc)
{
	struct pmskb_store_info info;

	conn_close(&self->c);
	EXPECT_EQ(0, store_quiet(&self->s, 5000, &info)) TH_LOG("frames are left behind");
	EXPECT_EQ(0, info.frames_held);
	EXPECT_EQ(0, store_close(&self->s));
}

static int sock_crc(int fd, uint32_t on)
{
	return ERRNO(setsockopt(fd, SOL_PMSKB, PMSKB_CRC32C, &on, sizeof(on)));
}

/* Records whose keys begin with 'c' have a CRC32C, others have none. */
struct counted {
	struct __test_metadata *_metadata;
	int with, without;
};

static int count(struct record *r, void *arg)
{
	struct counted *n = arg;
	struct __test_metadata *_metadata = n->_metadata;
	bool has = r->flags & REC_PAYLOAD_CRC;

	EXPECT_EQ(r->keyed && r->key[0] == 'c', has) TH_LOG("record %lu, %.*s", r->seq, r->key_len, r->key);
	if (has)
		EXPECT_EQ(crc32c(0, r->bytes, r->len), r->payload_crc);
	*(has ? &n->with : &n->without) += 1;
	return 0;
}

static void has(struct __test_metadata *_metadata, struct store *s, int with, int without)
{
	struct counted n = { _metadata, 0, 0 };

	EXPECT_EQ(with + without, media_scan(s->map, s->map_len, count, &n)) TH_LOG("a CRC32C is wrong");
	EXPECT_EQ(with, n.with);
	EXPECT_EQ(without, n.without);
}

static uint64_t bytes_read(struct __test_metadata *_metadata, struct store *s)
{
	struct pmskb_store_info info;

	ASSERT_EQ(0, store_info(s, &info)) return 0;
	return info.counters.computed_bytes;
}

/*
 * Puts all of it, a part, and an object of every other packet, and keeps the tokens. And one
 * without bytes, unless it is the socket that asks: that one has none of its tokens.
 */
static int put_many(struct __test_metadata *_metadata, struct way *w, int n, uint16_t flags, char letter,
		    bool empty)
{
	struct pmskb_ext part[MAX_DESC];
	struct pmskb_op op;
	char key[3] = { letter, '0' };
	int i, puts = 0;

	op = op_put(key, 2, e, n);
	op.flags = flags | PMSKB_OP_KEEP;
	EXPECT_LT(0, way_one(w, op, NULL));
	puts++;
	memcpy(part, e, n * sizeof(*e));
	part[0].offset++;
	part[0].len--;
	part[n - 1].len--;
	key[1]++;
	op.extents = PTR(part);
	EXPECT_LT(0, way_one(w, op, NULL));
	puts++;
	for (i = 0; i < n / 2; i++)
		part[i] = e[2 * i];
	key[1]++;
	op.nr_extents = n / 2;
	EXPECT_LT(0, way_one(w, op, NULL));
	puts++;
	if (!empty)
		return puts;
	key[1]++;
	op.nr_extents = 0;
	EXPECT_LT(0, way_one(w, op, NULL)) TH_LOG("an empty object");
	return puts + 1;
}

TEST_F(crc, a_put_that_asks_for_one_has_it)
{
	enum { LEN = 30000 };
	static char buf[LEN];
	uint64_t before;
	int n, a, b;

	n = receive(_metadata, &self->c, buf, LEN, 1);
	ASSERT_LT(3, n);
	before = bytes_read(_metadata, &self->s);
	a = put_many(_metadata, &self->way, n, PMSKB_OP_CRC32C, 'c', true);
	EXPECT_LE(before + LEN, bytes_read(_metadata, &self->s)) TH_LOG("nobody had computed it before");
	b = put_many(_metadata, &self->way, n, 0, 'n', true);
	has(_metadata, &self->s, a, b);
	EXPECT_EQ(0, desc_release_all(self->c.s, d, n));
	conn_close(&self->c);
	ASSERT_EQ(0, store_close(&self->s));
	ASSERT_EQ(0, store_open(&self->s, variant->dev));
	has(_metadata, &self->s, a, b);
	CONNECT();
}

TEST_F(crc, with_the_option_packets_have_one_from_where_they_are_placed)
{
	enum { LEN = 30000 };
	struct pmskb_op op;
	static char buf[LEN];
	uint64_t before, after;
	uint32_t on = 7;
	socklen_t len = sizeof(on);
	int n, a, b;

	EXPECT_EQ(EINVAL, sock_crc(self->c.s, 2));
	EXPECT_EQ(EINVAL, ERRNO(setsockopt(self->c.s, SOL_PMSKB, PMSKB_CRC32C, &on, 3)));
	EXPECT_EQ(ENOPROTOOPT, sock_crc(self->c.c, 1)) TH_LOG("not one of ours");
	ASSERT_EQ(0, getsockopt(self->c.s, SOL_PMSKB, PMSKB_CRC32C, &on, &len));
	EXPECT_EQ(0, on);
	ASSERT_EQ(0, sock_crc(self->c.s, 1));
	ASSERT_EQ(0, getsockopt(self->c.s, SOL_PMSKB, PMSKB_CRC32C, &on, &len));
	EXPECT_EQ(1, on);
	EXPECT_EQ(4, len);

	n = receive(_metadata, &self->c, buf, LEN, 2);
	before = bytes_read(_metadata, &self->s);
	EXPECT_LE(LEN, before) TH_LOG("placement reads each byte once for it");
	op = op_put("call", 4, e, n);
	op.flags = PMSKB_OP_KEEP;
	EXPECT_LT(0, way_one(&self->way, op, NULL));
	after = bytes_read(_metadata, &self->s);
	EXPECT_EQ(before, after) TH_LOG("of what was placed whole, a put reads nothing");
	a = put_many(_metadata, &self->way, n, 0, 'c', false);
	ASSERT_EQ(0, sock_crc(self->c.s, 0));
	b = put_many(_metadata, &self->way, n, 0, 'n', true);
	has(_metadata, &self->s, a + 1, b);
	EXPECT_EQ(0, desc_release_all(self->c.s, d, n));
}

TEST_F(crc, in_a_store_attached_for_it_all_have_one)
{
	enum { LEN = 9000 };
	struct pmskb_alloc alloc = { .len = LEN };
	struct pmskb_ext ext = { .offset = 5, .len = LEN - 5 };
	struct pmskb_result res;
	struct pmskb_op op;
	static char buf[LEN];
	uint8_t *map;
	int n, a, b;

	n = receive(_metadata, &self->c, buf, LEN, 3);
	b = put_many(_metadata, &self->way, n, 0, 'n', true);
	conn_close(&self->c);
	ASSERT_EQ(0, store_close(&self->s));
	ASSERT_EQ(0, store_open_as(&self->s, variant->dev, PMSKB_ATTACH_CRC32C));
	EXPECT_EQ(PMSKB_STORE_CRC32C, self->s.info.flags);
	CONNECT();
	n = receive(_metadata, &self->c, buf, LEN, 4);
	a = put_many(_metadata, &self->way, n, 0, 'c', true);
	/* The application's own data, too. */
	ASSERT_EQ(0, ioctl(self->s.fd, PMSKB_IOC_ALLOC, &alloc));
	map = mmap(NULL, alloc.len, PROT_READ | PROT_WRITE, MAP_SHARED, alloc.fd, 0);
	ASSERT_NE(MAP_FAILED, map);
	fill(map, LEN, 5, 0);
	op = op_put("c-own", 5, &ext, 1);
	op.fd = alloc.fd;
	EXPECT_EQ(0, submit(self->s.fd, &op, &res, 1));
	EXPECT_LT(0, res.res);
	munmap(map, alloc.len);
	close(alloc.fd);
	has(_metadata, &self->s, a + 1, b);
	EXPECT_EQ(0, desc_release_all(self->c.s, d, n));
}

static int scrub(struct store *s, struct pmskb_scrub_bad *bad)
{
	struct pmskb_scrub c = { .bad = PTR(bad), .nr_bad = 1, .max_bytes = 1 << 20 };

	return ioctl(s->fd, PMSKB_IOC_SCRUB, &c) ? -errno : c.nr_bad;
}

static int find(struct record *r, void *arg)
{
	*(struct record *)arg = *r;
	return 0;
}

/* Two words in the wrong order have the same Internet checksum. */
TEST_F(crc, it_sees_what_the_internet_checksum_does_not)
{
	static uint8_t page[4096];
	static struct record r;
	struct pmskb_scrub_bad bad;
	const char *why, *dev = dev_path(variant->dev, &why);
	struct pmskb_op op;
	static char buf[1000];
	uint64_t off;
	int n, with;

	if (variant->dev != DEV_PMEM)
		SKIP(return, "only of a block device are bytes changed from outside");
	for (with = 0; with < 2; with++) {
		n = receive(_metadata, &self->c, buf, sizeof(buf), 6);
		off = d[0].offset;
		op = op_put("k", 1, e, n);
		op.flags = with ? PMSKB_OP_CRC32C : 0;
		ASSERT_LT(0, way_one(&self->way, op, NULL));
		EXPECT_EQ(0, scrub(&self->s, &bad));
		ASSERT_EQ(1, media_scan(self->s.map, self->s.map_len, find, &r));
		conn_close(&self->c);
		ASSERT_EQ(0, store_close(&self->s));
		off += off & 1;
		ASSERT_EQ(0, media_read(dev, off & ~4095ULL, page, sizeof(page)));
		memcpy(buf, page + (off & 4095), 2);
		memcpy(page + (off & 4095), page + (off & 4095) + 2, 2);
		memcpy(page + (off & 4095) + 2, buf, 2);
		ASSERT_EQ(0, media_write(dev, off & ~4095ULL, page, sizeof(page)));
		ASSERT_EQ(0, store_open(&self->s, variant->dev));
		EXPECT_EQ(with, scrub(&self->s, &bad));
		if (with) {
			EXPECT_EQ(r.seq, bad.seq);
			EXPECT_EQ(EBADMSG, bad.error < 0 ? -bad.error : bad.error);
		}
		CONNECT();
	}
}

TEST_HARNESS_MAIN
