// SPDX-License-Identifier: GPL-2.0
/*
 * Promises about space: info adds up, what is removed comes back, a full store,
 * compaction; and about what looks after a store: scrub, attaching to read.
 */
#include "common.h"
#include "media.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>

#include "harness.h"
#include "objects.h"

#define ERRNO(call) ((call) < 0 ? errno : 0)
/* How much is sent at a time: it fits every socket's buffers. */
#define CHUNK 49152

static const struct net lo = { AF_INET, LINK_LO };

/* A store with so many MiB for data, all else being head area; 0: as the device is. */
static int small_store(struct store *s, unsigned int mib)
{
	const char *why, *path = dev_path(DEV_PMEM, &why);
	int64_t size = media_size(path);

	if (size < 0)
		return size;
	return store_make(s, DEV_PMEM, 0, mib ? ((size >> 20) - 2 - mib) << 20 : 0);
}

static int connect_to(struct store *s, struct conn *c)
{
	return conn_make(c, &lo, s->fd, HOW_ACCEPTED_IOCTL) ?: sock_mode(c->s, PMSKB_RX_DESC);
}

static double seconds(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec + t.tv_nsec / 1e9;
}

/*
 * Objects that can be told: number k has len bytes of stream `seed` from k * len
 * on, and the key "k<number>".
 */
struct lot {
	unsigned int seed, len;
};

static int key_of(char *key, unsigned int k)
{
	return sprintf(key, "k%u", k);
}

/* Puts the objects from first on, until nr are there or one fails: how many; *err its errno. */
static unsigned int put_lot(struct conn *c, struct lot lot, unsigned int first, unsigned int nr, int *err)
{
	static char buf[CHUNK], keys[PMSKB_MAX_OPS][16];
	static struct pmskb_result r[PMSKB_MAX_OPS];
	static struct pmskb_op op[PMSKB_MAX_OPS];
	static struct pmskb_ext x[PMSKB_MAX_OPS][8];
	unsigned int done = 0, now, i, per = CHUNK / lot.len;
	int n, k;

	*err = 0;
	if (per > PMSKB_MAX_OPS)
		per = PMSKB_MAX_OPS;
	while (done < nr) {
		now = nr - done < per ? nr - done : per;
		fill(buf, now * lot.len, lot.seed, (uint64_t)(first + done) * lot.len);
		*err = send_all(c->c, buf, now * lot.len);
		if (*err)
			return done;
		n = desc_recv_bytes(c->s, d, MAX_DESC, now * lot.len);
		if (n < 0) {
			*err = n;
			return done;
		}
		for (i = 0; i < now; i++) {
			k = exts_part(x[i], d, n, i * lot.len, lot.len);
			op[i] = op_put(keys[i], key_of(keys[i], first + done + i), x[i], k);
		}
		*err = persist(c->s, op, r, now);
		for (i = 0; i < now && !*err; i++) {
			if (r[i].res < 0)
				*err = r[i].res;
			else
				done++;
		}
		if (*err) {
			/* Of what failed; the others are gone already. */
			for (k = 0; k < n; k++)
				desc_release(c->s, d[k].token, 1);
			return done;
		}
	}
	return done;
}

/* Deletes those of [first, first + nr) that are not number `but` of each `of`: how many it did. */
static unsigned int delete_lot(int store, unsigned int first, unsigned int nr, unsigned int of, unsigned int but)
{
	static char keys[PMSKB_MAX_OPS][16];
	static struct pmskb_result r[PMSKB_MAX_OPS];
	static struct pmskb_op op[PMSKB_MAX_OPS];
	unsigned int k, i, now = 0, done = 0;

	for (k = first; k < first + nr || now; k++) {
		if (k < first + nr && (!of || k % of != but)) {
			op[now] = op_delete(keys[now], key_of(keys[now], k));
			now++;
		}
		if (now == PMSKB_MAX_OPS || (now && k >= first + nr - 1)) {
			if (submit(store, op, r, now))
				return done;
			for (i = 0; i < now; i++)
				done += r[i].res > 0;
			now = 0;
		}
	}
	return done;
}

struct tally {
	struct lot lot;
	unsigned int right, wrong, others;
};

static int check_lot(struct record *r, void *arg)
{
	struct tally *t = arg;
	unsigned int k;

	if (r->key_len < 2 || r->key_len > 15 || r->key[0] != 'k') {
		t->others++;
		return 0;
	}
	k = strtoul((char *)r->key + 1, NULL, 10);
	if (r->len == t->lot.len && differs(r->bytes, r->len, t->lot.seed, (uint64_t)k * r->len) < 0)
		t->right++;
	else
		t->wrong++;
	return 0;
}

/* All of a lot's records that are left have their bytes. */
static void lot_is(struct __test_metadata *_metadata, struct store *s, struct lot lot, unsigned int nr)
{
	struct tally t = { lot };

	EXPECT_EQ(nr, media_scan(s->map, s->map_len, check_lot, &t)) TH_LOG("records");
	EXPECT_EQ(nr, t.right);
	EXPECT_EQ(0, t.wrong + t.others);
}

static int compact(int fd, uint64_t *from, unsigned int steps, struct pmskb_compact *c)
{
	memset(c, 0, sizeof(*c));
	c->from = *from;
	c->steps = steps;
	if (ioctl(fd, PMSKB_IOC_COMPACT, c))
		return -errno;
	*from = c->from;
	return 0;
}

#define ADDS_UP(info, key_bytes, shared) do { \
	const char *why_ = info_wrong(info, key_bytes, shared); \
	EXPECT_EQ(NULL, why_) TH_LOG("%s", why_); \
} while (0)

FIXTURE(space) {
	struct store s;
	struct conn c;
};

FIXTURE_VARIANT(space) {
	unsigned int mib;
};

/* What needs no small store has a whole one; the others are named for their size. */
FIXTURE_VARIANT_ADD(space, whole) { 0 };

FIXTURE_SETUP(space)
{
	const char *why;

	if (!dev_path(DEV_PMEM, &why))
		SKIP(return, "%s", why);
	ASSERT_EQ(0, small_store(&self->s, variant->mib));
	ASSERT_EQ(0, connect_to(&self->s, &self->c));
}

FIXTURE_TEARDOWN(space)
{
	conn_close(&self->c);
	EXPECT_EQ(0, store_close(&self->s));
}

/* ---- info ---- */

TEST_F(space, info_adds_up_at_each_step)
{
	static struct pmskb_ext x[700];
	static char buf[40000];
	struct pmskb_store_info a, b, z;
	struct pmskb_sock_info si;
	struct pmskb_op op;
	uint64_t live = 0;
	char key[8];
	int n, i, k, nr;

	ASSERT_EQ(0, store_info(&self->s, &z));
	ADDS_UP(&z, 0, false);
	EXPECT_EQ(z.frames_total, z.frames_free + z.frames_index);
	EXPECT_LT(0, z.frames_reserve);
	EXPECT_GT(z.frames_free, z.frames_reserve);
	EXPECT_EQ(0, z.record_bytes);
	/* Held by tokens, and the frame that the socket fills. */
	n = receive(_metadata, &self->c, buf, sizeof(buf), 1);
	ASSERT_EQ(0, store_info(&self->s, &a));
	ADDS_UP(&a, 0, false);
	EXPECT_EQ(n, a.tokens);
	EXPECT_LE(10, a.frames_held);
	EXPECT_GE(10 + n + 1, a.frames_held);
	EXPECT_EQ(0, a.frames_payload);
	/* Each byte once: sizes from 1 byte to 7 KB. */
	for (i = 0; i < 7; i++) {
		static const unsigned int len[7] = { 1, 63, 500, 4096, 7000, 3333, 12000 };

		k = exts_part(x, d, n, live, len[i]);
		ASSERT_LT(0, k);
		op = op_put(key, sprintf(key, "%d", i), x, k);
		op.flags = PMSKB_OP_KEEP;
		ASSERT_EQ(i + 1, persist_one(self->c.s, &op, NULL));
		live += len[i];
		ASSERT_EQ(0, store_info(&self->s, &b));
		ADDS_UP(&b, 0, false);
		EXPECT_EQ(live, b.live_bytes);
		/* One line, the key, and extents beyond the first. */
		EXPECT_EQ(i + 1, b.record_bytes / 128) TH_LOG("%llu bytes", b.record_bytes);
	}
	/* A key in the payload is no object's bytes, and uses some. */
	k = exts_part(x, d, n, live, 20);
	ASSERT_EQ(1, k);
	op = op_put(x, 1, NULL, 0);
	op.flags = PMSKB_OP_KEY_EXTENTS | PMSKB_OP_KEEP;
	ASSERT_EQ(8, persist_one(self->c.s, &op, NULL));
	ASSERT_EQ(0, store_info(&self->s, &b));
	ADDS_UP(&b, 20, false);
	/* 600 extents of 10 bytes need two lists. */
	for (i = nr = 0; i < 600; i++) {
		k = exts_part(&x[nr], d, n, live + 100 + 20 * i, 10);
		ASSERT_LT(0, k);
		nr += k;
	}
	op = op_put(NULL, 0, x, nr);
	ASSERT_EQ(9, persist_one(self->c.s, &op, NULL));
	live += 6000;
	desc_release_all(self->c.s, d, n);
	for (i = 0; i < n; i++)
		desc_release(self->c.s, d[i].token, 1);
	ASSERT_EQ(0, sock_info(self->c.s, &si));
	EXPECT_EQ(0, si.tokens);
	conn_close(&self->c);
	EXPECT_EQ(0, store_quiet(&self->s, 5000, &b));
	ADDS_UP(&b, 20, false);
	EXPECT_EQ(2, b.frames_list);
	EXPECT_EQ(live, b.live_bytes);
	EXPECT_EQ(0, b.frames_held) TH_LOG("nobody holds anything");
	EXPECT_EQ(0, b.reclaimable_bytes);
	/* Replaced bytes come back with the next commit, and are counted until then. */
	op = op_put("4", 1, NULL, 0);
	{
		struct pmskb_result r;

		ASSERT_EQ(0, submit(self->s.fd, &op, &r, 1));
		ASSERT_EQ(10, r.res);
		ASSERT_EQ(0, store_info(&self->s, &a));
		EXPECT_EQ(live - 7000, a.live_bytes);
		EXPECT_EQ(7000, a.reclaimable_bytes);
		EXPECT_EQ(a.frames_payload * PMSKB_FRAME_SIZE, a.live_bytes + 7000 + 20 + a.fragmented_bytes);
		op = op_truncate(~0ULL);
		ASSERT_EQ(0, submit(self->s.fd, &op, &r, 1));
		op = op_put("5", 1, NULL, 0);
		ASSERT_EQ(0, submit(self->s.fd, &op, &r, 1));
		op = op_delete("5", 1);
		ASSERT_EQ(0, submit(self->s.fd, &op, &r, 1));
	}
	live -= 7000 + 6000 + 3333;
	ASSERT_EQ(0, store_info(&self->s, &b));
	ADDS_UP(&b, 20, false);
	EXPECT_EQ(live, b.live_bytes);
	EXPECT_EQ(0, b.frames_list);
	EXPECT_EQ(0, b.reclaimable_bytes);
	EXPECT_EQ(7, b.records);
}

/* ---- everything comes back ---- */

FIXTURE(small) {
	struct store s;
	struct conn c;
};

FIXTURE_VARIANT(small) {
	unsigned int mib;
};

FIXTURE_VARIANT_ADD(small, of_16_mib) { 16 };

FIXTURE_SETUP(small)
{
	const char *why;

	if (!dev_path(DEV_PMEM, &why))
		SKIP(return, "%s", why);
	ASSERT_EQ(0, small_store(&self->s, variant->mib));
	ASSERT_GT((variant->mib + 4) << 8, self->s.info.frames_total);
	ASSERT_EQ(0, connect_to(&self->s, &self->c));
}

FIXTURE_TEARDOWN(small)
{
	conn_close(&self->c);
	EXPECT_EQ(0, store_close(&self->s));
}

TEST_F_TIMEOUT(small, is_empty_again_after_very_many_cycles, 7200)
{
	enum { KEYS = 500, PER = 64, MAX = 8000 };
	unsigned long cycles = env_number("PMSKB_TEST_CYCLES", 5000), i = 0;
	static struct { uint64_t seq, at; uint32_t len, seed; } has[KEYS];
	static struct pmskb_ext x[PER][8];
	static struct pmskb_result r[PER];
	static struct pmskb_op op[PER];
	static char buf[CHUNK], keys[PER][8], *copy;
	struct pmskb_store_info info;
	uint64_t written = 0, live = 0, deleted = 0;
	uint32_t seed = 3;
	int n, k, nr, want;

	srand(2);
	copy = malloc(CHUNK);
	ASSERT_NE(NULL, copy);
	while (i < cycles) {
		uint32_t at = 0;
		int slot[PER], start = rand() % KEYS;

		n = receive(_metadata, &self->c, buf, CHUNK, ++seed);
		for (nr = 0; nr < PER; nr++) {
			uint32_t len = rand() % (1 + rand() % MAX);

			k = slot[nr] = (start + nr) % KEYS;
			sprintf(keys[nr], "%d", k);
			if (has[k].seq && rand() % 5 < 2) {
				op[nr] = op_delete(keys[nr], strlen(keys[nr]));
				continue;
			}
			if (at + len > CHUNK)
				break;
			op[nr] = op_put(keys[nr], strlen(keys[nr]), x[nr], exts_part(x[nr], d, n, at, len));
			op[nr].flags = has[k].seq ? PMSKB_OP_REPLACE : PMSKB_OP_CREATE;
			has[k].at = at;
			has[k].seed = seed;
			live += len;
			live -= has[k].seq ? has[k].len : 0;
			has[k].len = len;
			at += len;
			written += len;
		}
		ASSERT_EQ(0, way_submit(&(struct way){ self->s.fd, self->c.s, i & 1 }, op, r, nr,
					rand() % 2 ? PMSKB_SUBMIT_ATOMIC : 0));
		for (k = 0; k < nr; k++) {
			ASSERT_LT(0, r[k].res) TH_LOG("after %lu cycles, %lu bytes live", i, live);
			if (op[k].opcode == PMSKB_OP_DELETE) {
				live -= has[slot[k]].len;
				deleted++;
			}
			has[slot[k]].seq = op[k].opcode == PMSKB_OP_DELETE ? 0 : r[k].res;
		}
		for (k = 0; k < n; k++)
			desc_release(self->c.s, d[k].token, 1);
		i += nr;
		if (i % 1000 < PER) {
			ASSERT_EQ(0, store_info(&self->s, &info));
			ADDS_UP(&info, 0, true);
			ASSERT_EQ(live, info.live_bytes);
		}
	}
	EXPECT_LT(cycles / 10, deleted);
	for (k = want = 0; k < KEYS; k++)
		want += !!has[k].seq;
	EXPECT_EQ(want, media_scan(self->s.map, self->s.map_len, NULL, NULL));
	for (k = 0; k < KEYS; k++) {
		static struct hit hit;

		sprintf(keys[0], "%d", k);
		n = map_get(self->s.map, self->s.map_len, keys[0], strlen(keys[0]), &hit);
		ASSERT_EQ(!!has[k].seq, n);
		if (!n)
			continue;
		ASSERT_EQ(has[k].seq, hit.seq);
		ASSERT_EQ(has[k].len, hit.len);
		ASSERT_EQ(0, map_bytes(self->s.map, self->s.map_len, &hit, copy));
		ASSERT_EQ(-1, differs(copy, hit.len, has[k].seed, has[k].at)) TH_LOG("bytes of %d", k);
		op[0] = op_delete(keys[0], strlen(keys[0]));
		ASSERT_EQ(0, submit(self->s.fd, op, r, 1));
		ASSERT_EQ(has[k].seq, r[0].res);
	}
	conn_close(&self->c);
	{
		struct pmskb_compact c;
		uint64_t from = 0;

		/* What the last commit made free comes back with this. */
		ASSERT_EQ(0, compact(self->s.fd, &from, 4096, &c));
		EXPECT_EQ(1, c.done);
	}
	EXPECT_EQ(0, store_back(&self->s, 5000, &info));
	TH_LOG("%lu cycles, %lu bytes in all; %llu of %llu frames free, %llu of records, %llu of the index", i,
	       written, info.frames_free, info.frames_total, info.frames_record, info.frames_index);
	ADDS_UP(&info, 0, false);
	EXPECT_EQ(0, info.records);
	EXPECT_EQ(0, info.live_bytes);
	EXPECT_EQ(0, info.frames_payload);
	EXPECT_EQ(0, info.frames_list);
	EXPECT_EQ(0, info.frames_held);
	EXPECT_EQ(0, info.fragmented_bytes);
	EXPECT_EQ(0, info.reclaimable_bytes);
	EXPECT_GE(1, info.frames_record) TH_LOG("only the one that is being filled");
	EXPECT_GE(4, info.frames_index);
	ASSERT_EQ(0, store_close(&self->s));
	ASSERT_EQ(0, store_open(&self->s, DEV_PMEM));
	EXPECT_EQ(self->s.info.frames_total - self->s.info.frames_index, self->s.info.frames_free);
	EXPECT_EQ(0, self->s.info.records);
	free(copy);
}

/* ---- a full store ---- */

FIXTURE(tiny) {
	struct store s;
	struct conn c;
};

FIXTURE_SETUP(tiny)
{
	const char *why;

	if (!dev_path(DEV_PMEM, &why))
		SKIP(return, "%s", why);
	ASSERT_EQ(0, small_store(&self->s, 6));
	ASSERT_GT(10 << 8, self->s.info.frames_total);
	ASSERT_EQ(0, connect_to(&self->s, &self->c));
}

FIXTURE_TEARDOWN(tiny)
{
	conn_close(&self->c);
	EXPECT_EQ(0, store_close(&self->s));
}

TEST_F_TIMEOUT(tiny, a_full_store_refuses_deletes_compacts_and_goes_on, 60)
{
	enum { LEN = 512, NR = 40000 };
	const struct lot lot = { 4, LEN };
	static char keys[64][16], buf[20000];
	struct pmskb_store_info a, b;
	struct pmskb_result r[64];
	struct pmskb_op op[64];
	struct pmskb_compact c;
	unsigned int there, deleted, more, empties = 0, i;
	uint64_t from = 0, unplaced;
	int err, full = 0;

	/* Data, until there are no frames for it; then records alone. */
	there = put_lot(&self->c, lot, 0, NR, &err);
	EXPECT_TRUE(err == -ENOBUFS || err == -ENOSPC) TH_LOG("%d after %u", err, there);
	EXPECT_LT(4 << 20, there * LEN);
	conn_close(&self->c);
	while (!full && empties < NR) {
		for (i = 0; i < 64; i++)
			op[i] = op_put(keys[i], sprintf(keys[i], "e%u", empties + i), NULL, 0);
		ASSERT_EQ(0, submit(self->s.fd, op, r, 64));
		for (i = 0; i < 64; i++) {
			if (r[i].res > 0)
				empties++;
			else
				full++;
			EXPECT_TRUE(r[i].res > 0 || r[i].res == -ENOSPC);
		}
	}
	ASSERT_LT(0, full);
	/* Nothing is changed by what fails, alone or with others that would not. */
	op[0] = op_put("none", 4, NULL, 0);
	ASSERT_EQ(0, submit(self->s.fd, op, r, 1));
	ASSERT_EQ(-ENOSPC, r[0].res);
	ASSERT_EQ(0, store_info(&self->s, &a));
	op[0] = op_delete("k0", 2);
	for (i = 1; i < 64; i++)
		op[i] = op_put(keys[i], sprintf(keys[i], "f%u", i), NULL, 0);
	ASSERT_EQ(0, way_submit(&(struct way){ self->s.fd, -1, true }, op, r, 64, PMSKB_SUBMIT_ATOMIC));
	for (i = 0, full = 0; i < 64; i++) {
		EXPECT_TRUE(r[i].res == -ENOSPC || r[i].res == -ECANCELED) TH_LOG("%lld", r[i].res);
		full += r[i].res == -ENOSPC;
	}
	EXPECT_EQ(1, full);
	ASSERT_EQ(0, store_info(&self->s, &b));
	EXPECT_EQ(there + empties, b.records);
	EXPECT_EQ(a.records, b.records);
	EXPECT_EQ(a.live_bytes, b.live_bytes);
	EXPECT_EQ((uint64_t)there * LEN, b.live_bytes);
	EXPECT_EQ(a.frames_payload, b.frames_payload);
	EXPECT_EQ(a.frames_record, b.frames_record);
	ADDS_UP(&b, 0, false);
	/* The reserve is what is left. */
	EXPECT_LT(0, b.frames_reserve);
	EXPECT_LE(b.frames_reserve, b.frames_free + b.frames_limbo);
	EXPECT_GE(b.frames_reserve + 2, b.frames_free + b.frames_limbo);
	/* Service goes on: what arrives is not placed, and arrives. */
	ASSERT_EQ(0, conn_make(&self->c, &lo, self->s.fd, HOW_ACCEPTED_IOCTL));
	unplaced = b.counters.unplaced[PMSKB_UNPLACED_NO_FRAME];
	fill(buf, sizeof(buf), 5, 0);
	ASSERT_EQ(0, send_all(self->c.c, buf, sizeof(buf)));
	memset(buf, 0, sizeof(buf));
	ASSERT_EQ(0, recv_all(self->c.s, buf, sizeof(buf)));
	EXPECT_EQ(-1, differs(buf, sizeof(buf), 5, 0));
	ASSERT_EQ(0, store_info(&self->s, &a));
	EXPECT_LT(unplaced, a.counters.unplaced[PMSKB_UNPLACED_NO_FRAME]);
	EXPECT_EQ(b.counters.placed, a.counters.placed);
	conn_close(&self->c);

	/* Deletes work: five of eight, which frees nearly no frame. */
	deleted = 0;
	for (i = 0; i < 5; i++) {
		unsigned int k;

		for (k = i; k < there; k += 8 * 64) {
			unsigned int m, now = 0;

			for (m = k; m < there && now < 64; m += 8, now++)
				op[now] = op_delete(keys[now], key_of(keys[now], m));
			ASSERT_EQ(0, submit(self->s.fd, op, r, now));
			for (m = 0; m < now; m++) {
				ASSERT_LT(0, r[m].res) TH_LOG("delete in a full store");
				deleted++;
			}
		}
	}
	ASSERT_EQ(0, store_info(&self->s, &a));
	ADDS_UP(&a, 0, false);
	EXPECT_EQ(there + empties - deleted, a.records);
	EXPECT_LT(2 << 20, a.fragmented_bytes);
	EXPECT_GT(a.frames_total / 8, a.frames_free) TH_LOG("frees nearly nothing, or else this shows nothing");
	/* Compaction finds the room that it needs, and makes some. */
	for (i = 0; i < 10000; i++) {
		ASSERT_EQ(0, compact(self->s.fd, &from, 0, &c));
		if (c.done)
			break;
	}
	ASSERT_EQ(0, store_info(&self->s, &b));
	ADDS_UP(&b, 0, false);
	TH_LOG("%u objects and %u empty ones; compaction: free %llu -> %llu, payload %llu -> %llu, records %llu -> %llu of %llu",
	       there, empties, a.frames_free, b.frames_free, a.frames_payload, b.frames_payload, a.frames_record,
	       b.frames_record, b.frames_total);
	EXPECT_LT(a.frames_total / 4, b.frames_free - a.frames_free);
	EXPECT_EQ(a.records, b.records);
	EXPECT_EQ(a.live_bytes, b.live_bytes);
	/* And it takes data again. */
	ASSERT_EQ(0, connect_to(&self->s, &self->c));
	more = put_lot(&self->c, lot, NR, 1000, &err);
	EXPECT_EQ(1000, more) TH_LOG("%d", err);
	{
		struct tally t = { lot };
		int round;

		for (round = 0; round < 2; round++) {
			memset(&t, 0, sizeof(t));
			t.lot = lot;
			EXPECT_EQ(a.records + more, media_scan(self->s.map, self->s.map_len, check_lot, &t));
			EXPECT_EQ(there - deleted + more, t.right);
			EXPECT_EQ(0, t.wrong);
			EXPECT_EQ(empties, t.others);
			if (round)
				break;
			conn_close(&self->c);
			ASSERT_EQ(0, store_close(&self->s));
			ASSERT_EQ(0, store_open(&self->s, DEV_PMEM));
		}
	}
}

/* ---- compaction ---- */

struct reader {
	const uint8_t *map;
	size_t len;
	struct lot lot;
	unsigned int nr, of;
	volatile bool stop;
	unsigned long good, again, bad;
};

/* Reads what must be there all the time, without locks. */
static void *reads(void *arg)
{
	struct reader *r = arg;
	static char buf[8192];
	struct hit hit;
	char key[16];
	unsigned int k = 0;
	int got;

	while (!r->stop) {
		got = map_get(r->map, r->len, key, key_of(key, k), &hit);
		if (got == 1 && hit.len <= sizeof(buf))
			got = map_bytes(r->map, r->len, &hit, buf);
		else
			got = -EIO;
		if (got == -ESTALE) {
			r->again++;
			continue;
		}
		if (got || hit.len != r->lot.len || differs(buf, hit.len, r->lot.seed, (uint64_t)k * hit.len) >= 0)
			r->bad++;
		else
			r->good++;
		k = (k + r->of) % r->nr;
	}
	return NULL;
}

struct churner {
	int store;
	volatile bool stop;
	unsigned long done;
	int failed;
};

/* Puts, replaces and deletes what nobody else looks at. */
static void *churns(void *arg)
{
	struct churner *c = arg;
	struct pmskb_result r[32];
	struct pmskb_op op[32];
	char keys[32][8];
	int i, round;

	for (round = 0; !c->stop || round % 4; round++) {
		for (i = 0; i < 32; i++) {
			sprintf(keys[i], "c%d", i);
			op[i] = round % 4 == 3 ? op_delete(keys[i], strlen(keys[i])) :
				op_put(keys[i], strlen(keys[i]), NULL, 0);
		}
		if (way_submit(&(struct way){ c->store, -1, true }, op, r, 32, round & 1 ? PMSKB_SUBMIT_ATOMIC : 0))
			c->failed = __LINE__;
		for (i = 0; i < 32; i++) {
			if (r[i].res < 1)
				c->failed = r[i].res;
		}
		if (c->failed)
			break;
		c->done++;
	}
	return NULL;
}

TEST_F_TIMEOUT(space, compaction_goes_on_among_readers_and_writers, 60)
{
	enum { NR = 4000, LEN = 400, OF = 10 };
	const struct lot lot = { 6, LEN };
	struct reader rd = { self->s.map, self->s.map_len, lot, NR, OF };
	struct churner ch = { self->s.fd };
	struct pmskb_store_info a, b;
	uint64_t from = 0, before = 0, records = 0, bytes = 0;
	struct pmskb_compact c;
	pthread_t thread[2];
	unsigned long seen;
	int err, steps, ms;

	ASSERT_EQ(NR, put_lot(&self->c, lot, 0, NR, &err)) TH_LOG("%d", err);
	ASSERT_EQ(NR - NR / OF, delete_lot(self->s.fd, 0, NR, OF, 0));
	conn_close(&self->c);
	ASSERT_EQ(0, store_quiet(&self->s, 5000, &a));
	ADDS_UP(&a, 0, false);
	EXPECT_EQ(0, a.moved_records);
	ASSERT_EQ(0, pthread_create(&thread[0], NULL, reads, &rd));
	ASSERT_EQ(0, pthread_create(&thread[1], NULL, churns, &ch));
	for (steps = 0; steps < 100000; steps++) {
		/* Between two steps the reader goes on, or this shows nothing. */
		seen = rd.good;
		for (ms = 0; rd.good < seen + NR / OF / 4 && ms < 1000; ms++)
			usleep(1000);
		ASSERT_EQ(0, compact(self->s.fd, &from, 1, &c));
		records += c.records;
		bytes += c.bytes;
		if (c.done)
			break;
		EXPECT_LE(before, from) TH_LOG("back from %lu to %lu", before, from);
		EXPECT_GE(63, c.records);
		EXPECT_GE(512 << 10, c.bytes);
		before = from;
	}
	EXPECT_EQ(1, c.done);
	rd.stop = ch.stop = true;
	pthread_join(thread[0], NULL);
	pthread_join(thread[1], NULL);
	ASSERT_EQ(0, store_quiet(&self->s, 5000, &b));
	TH_LOG("%d steps moved %lu records and %lu bytes; payload frames %llu -> %llu; %lu reads, %lu of them again; %lu arrays",
	       steps + 1, records, bytes, a.frames_payload, b.frames_payload, rd.good, rd.again, ch.done);
	EXPECT_EQ(0, rd.bad);
	EXPECT_LT(NR / OF, rd.good);
	EXPECT_EQ(0, ch.failed);
	EXPECT_LT(4, ch.done);
	EXPECT_EQ(records, b.moved_records);
	EXPECT_EQ(bytes, b.moved_bytes);
	EXPECT_LE(NR / OF, records);
	EXPECT_LE((NR / OF - 20) * LEN, bytes);
	EXPECT_LT(NR / OF * LEN / PMSKB_FRAME_SIZE, b.frames_payload);
	EXPECT_GT(a.frames_payload / 4, b.frames_payload);
	EXPECT_LT(a.frames_payload / 2, b.frames_free - a.frames_free);
	EXPECT_GT(a.frames_record, b.frames_record);
	EXPECT_EQ(a.live_bytes, b.live_bytes);
	EXPECT_EQ(NR / OF, b.records);
	/* One frame is being filled by compaction. */
	EXPECT_GE(1, b.frames_held);
	ADDS_UP(&b, 0, false);
	lot_is(_metadata, &self->s, lot, NR / OF);
	ASSERT_EQ(0, store_close(&self->s));
	ASSERT_EQ(0, store_open(&self->s, DEV_PMEM));
	lot_is(_metadata, &self->s, lot, NR / OF);
	EXPECT_EQ(b.frames_payload, self->s.info.frames_payload);
	/* There is nothing left to move. */
	from = 0;
	ASSERT_EQ(0, compact(self->s.fd, &from, 4096, &c));
	EXPECT_EQ(1, c.done);
	EXPECT_GE(20 * LEN, c.bytes);
}

TEST_F(space, compact_and_scrub_check_what_they_are_told)
{
	struct pmskb_scrub_bad bad;
	struct pmskb_compact c;
	struct pmskb_scrub s;
	int fd, i;

	fd = open(self->s.path, O_RDONLY | O_CLOEXEC);
	ASSERT_LE(0, fd);
	memset(&c, 0, sizeof(c));
	EXPECT_EQ(EACCES, ERRNO(ioctl(fd, PMSKB_IOC_COMPACT, &c)));
	memset(&s, 0, sizeof(s));
	EXPECT_EQ(0, ERRNO(ioctl(fd, PMSKB_IOC_SCRUB, &s))) TH_LOG("scrub only reads");
	EXPECT_EQ(1, s.done);
	close(fd);
	EXPECT_EQ(0, ERRNO(ioctl(self->s.fd, PMSKB_IOC_COMPACT, &c)));
	EXPECT_EQ(1, c.done) TH_LOG("of an empty store");
	for (i = 0; i < 2; i++) {
		memset(&c, 0, sizeof(c));
		c.reserved[i] = 1;
		EXPECT_EQ(EINVAL, ERRNO(ioctl(self->s.fd, PMSKB_IOC_COMPACT, &c)));
		memset(&s, 0, sizeof(s));
		s.reserved[i] = 1;
		EXPECT_EQ(EINVAL, ERRNO(ioctl(self->s.fd, PMSKB_IOC_SCRUB, &s)));
	}
	memset(&c, 0, sizeof(c));
	c.steps = 4097;
	EXPECT_EQ(EINVAL, ERRNO(ioctl(self->s.fd, PMSKB_IOC_COMPACT, &c)));
	EXPECT_EQ(EFAULT, ERRNO(ioctl(self->s.fd, PMSKB_IOC_COMPACT, BAD_PTR)));
	EXPECT_EQ(EFAULT, ERRNO(ioctl(self->s.fd, PMSKB_IOC_SCRUB, BAD_PTR)));
	memset(&c, 0, sizeof(c));
	c.from = ~0ULL;
	EXPECT_EQ(0, ERRNO(ioctl(self->s.fd, PMSKB_IOC_COMPACT, &c)));
	EXPECT_EQ(1, c.done);
	memset(&s, 0, sizeof(s));
	s.from = ~0ULL, s.nr_bad = ~0U, s.bad = PTR(&bad), s.max_bytes = ~0ULL;
	EXPECT_EQ(0, ERRNO(ioctl(self->s.fd, PMSKB_IOC_SCRUB, &s)));
	EXPECT_EQ(1, s.done);
	EXPECT_EQ(0, s.nr_bad);
}

/* Makes a store short of space, with much to gain: 9 of 16 MiB, three of four deleted. */
#define SHORT_NR 9216
static const struct lot short_lot = { 7, 1024 };

static unsigned int make_short(struct store *s, struct conn *c, unsigned int of)
{
	int err;

	if (put_lot(c, short_lot, 0, SHORT_NR, &err) != SHORT_NR)
		return 0;
	return delete_lot(s->fd, 0, SHORT_NR, of, 0);
}

TEST_F_TIMEOUT(small, compacts_itself_when_space_is_short, 60)
{
	struct pmskb_store_info a, b;
	double until;

	ASSERT_EQ(SHORT_NR - SHORT_NR / 4, make_short(&self->s, &self->c, 4));
	ASSERT_EQ(0, store_info(&self->s, &a));
	conn_close(&self->c);
	/* Nobody asks for it. */
	until = seconds() + 15;
	do {
		usleep(20000);
		ASSERT_EQ(0, store_info(&self->s, &b));
	} while ((!b.moved_records || b.frames_free < b.frames_total * 3 / 5) && seconds() < until);
	TH_LOG("free %llu -> %llu of %llu frames, %llu records moved, %llu bytes fragmented", a.frames_free,
	       b.frames_free, b.frames_total, b.moved_records, b.fragmented_bytes);
	EXPECT_LT(0, b.moved_records);
	EXPECT_LE(b.frames_total * 3 / 5, b.frames_free);
	EXPECT_EQ(SHORT_NR / 4, b.records);
	lot_is(_metadata, &self->s, short_lot, SHORT_NR / 4);
	ASSERT_EQ(0, store_close(&self->s));
	ASSERT_EQ(0, store_open(&self->s, DEV_PMEM));
	lot_is(_metadata, &self->s, short_lot, SHORT_NR / 4);
}

TEST_F_TIMEOUT(small, can_be_detached_while_it_compacts, 60)
{
	struct pmskb_store_info b;
	unsigned int left = SHORT_NR / 4;
	double until;
	int tries;

	/* If it is through before it is seen to have begun, this shows nothing: again. */
	for (tries = 0; tries < 5; tries++) {
		ASSERT_EQ(SHORT_NR - left, make_short(&self->s, &self->c, 4));
		conn_close(&self->c);
		until = seconds() + 10;
		do {
			ASSERT_EQ(0, store_info(&self->s, &b));
		} while (!b.moved_records && seconds() < until);
		ASSERT_EQ(0, store_close(&self->s));
		TH_LOG("%llu records moved shortly before", b.moved_records);
		ASSERT_LT(0, b.moved_records);
		if (b.moved_records < left)
			break;
		ASSERT_EQ(0, small_store(&self->s, variant->mib));
		ASSERT_EQ(0, connect_to(&self->s, &self->c));
	}
	ASSERT_GT(5, tries);
	ASSERT_EQ(0, store_open(&self->s, DEV_PMEM));
	lot_is(_metadata, &self->s, short_lot, left);
	ADDS_UP(&self->s.info, 0, false);
	/* And the module can go at once after the store. */
	ASSERT_EQ(left / 2, delete_lot(self->s.fd, 0, SHORT_NR, 8, 0));
	ASSERT_EQ(0, store_close(&self->s));
	EXPECT_EQ(0, sh("rmmod pmskb && { if [ -n \"$PMSKB_KO\" ]; then insmod \"$PMSKB_KO\"; else modprobe pmskb; fi; } && "
			"for i in 1 2 3 4 5 6 7 8 9 10; do [ -e /dev/pmskb ] && exit 0; sleep 0.1; done; exit 1"));
	ASSERT_EQ(0, store_open(&self->s, DEV_PMEM));
	lot_is(_metadata, &self->s, short_lot, left / 2);
	ADDS_UP(&self->s.info, 0, false);
}

/* ---- scrub ---- */

static int scrub(int fd, uint64_t *from, uint64_t max, struct pmskb_scrub_bad *bad, uint32_t nr, struct pmskb_scrub *s)
{
	memset(s, 0, sizeof(*s));
	s->from = *from;
	s->max_bytes = max;
	s->bad = PTR(bad);
	s->nr_bad = nr;
	if (ioctl(fd, PMSKB_IOC_SCRUB, s))
		return -errno;
	*from = s->from;
	return 0;
}

TEST_F(space, scrub_names_the_records_that_are_damaged_and_no_others)
{
	enum { NR = 300, LEN = 700 };
	static const unsigned int victims[] = { 7, 100, 101, 299 };
	const struct lot lot = { 8, LEN };
	struct pmskb_scrub_bad bad[8];
	uint64_t from = 0, records = 0, bytes = 0, seq[4], at[4];
	struct pmskb_scrub s;
	static uint8_t page[4096];
	const char *why;
	struct hit hit;
	char key[16], buf[LEN];
	unsigned int i, calls = 0;
	int err;

	ASSERT_EQ(NR, put_lot(&self->c, lot, 0, NR, &err));
	conn_close(&self->c);
	/* All is well; a little at a time. */
	do {
		ASSERT_EQ(0, scrub(self->s.fd, &from, 20 * LEN, bad, 8, &s));
		EXPECT_EQ(0, s.nr_bad);
		EXPECT_GE(21, s.records);
		records += s.records;
		bytes += s.bytes;
	} while (!s.done && ++calls < 100);
	EXPECT_EQ(1, s.done);
	EXPECT_EQ(NR, records);
	EXPECT_EQ(NR * LEN, bytes);
	EXPECT_LE(NR / 21, calls);

	/* A bit each, on the media. */
	for (i = 0; i < 4; i++) {
		ASSERT_EQ(1, map_get(self->s.map, self->s.map_len, key, key_of(key, victims[i]), &hit));
		seq[i] = hit.seq;
		at[i] = (hit.extents[0] >> 20) + i;
	}
	ASSERT_EQ(0, store_close(&self->s));
	for (i = 0; i < 4; i++) {
		ASSERT_EQ(0, media_read(dev_path(DEV_PMEM, &why), at[i] & ~4095ULL, page, 4096));
		page[at[i] & 4095] ^= 1 << i;
		ASSERT_EQ(0, media_write(dev_path(DEV_PMEM, &why), at[i] & ~4095ULL, page, 4096));
	}
	ASSERT_EQ(0, store_open(&self->s, DEV_PMEM));
	EXPECT_EQ(NR, self->s.info.records);
	from = 0;
	ASSERT_EQ(0, scrub(self->s.fd, &from, 0, bad, 8, &s));
	EXPECT_EQ(1, s.done);
	EXPECT_EQ(NR, s.records);
	ASSERT_EQ(4, s.nr_bad);
	for (i = 0; i < 4; i++) {
		EXPECT_EQ(seq[i], bad[i].seq);
		EXPECT_EQ(EBADMSG, bad[i].error);
		EXPECT_EQ(0, bad[i].reserved);
	}
	/* With room for one at a time; and for none, it does not get past the first. */
	from = 0;
	for (i = 0; i < 4; i++) {
		memset(bad, 0x55, sizeof(bad));
		ASSERT_EQ(0, scrub(self->s.fd, &from, 0, bad, 1, &s));
		ASSERT_EQ(1, s.nr_bad);
		EXPECT_EQ(seq[i], bad[0].seq);
		EXPECT_EQ(0x5555555555555555, bad[1].seq);
		EXPECT_EQ(i == 3, s.done);
	}
	from = 0;
	ASSERT_EQ(0, scrub(self->s.fd, &from, 0, NULL, 0, &s));
	EXPECT_EQ(0, s.done);
	EXPECT_EQ(seq[0], from);
	EXPECT_EQ(0, s.nr_bad);
	from = seq[0];
	EXPECT_EQ(-EFAULT, scrub(self->s.fd, &from, 0, BAD_PTR, 1, &s));
	/* The rest works: reading, writing, compaction, which leaves them where they are. */
	for (i = 0; i < NR; i++) {
		bool victim = i == 7 || i == 100 || i == 101 || i == 299;

		ASSERT_EQ(1, map_get(self->s.map, self->s.map_len, key, key_of(key, i), &hit));
		ASSERT_EQ(0, map_bytes(self->s.map, self->s.map_len, &hit, buf));
		EXPECT_EQ(victim, differs(buf, LEN, lot.seed, i * LEN) >= 0) TH_LOG("object %u", i);
	}
	ASSERT_EQ(180, delete_lot(self->s.fd, 110, 180, 0, 0));
	from = 0;
	{
		struct pmskb_compact c;

		ASSERT_EQ(0, compact(self->s.fd, &from, 4096, &c));
		EXPECT_EQ(1, c.done);
	}
	from = 0;
	ASSERT_EQ(0, scrub(self->s.fd, &from, 0, bad, 8, &s));
	EXPECT_EQ(4, s.nr_bad);
	EXPECT_EQ(NR - 180, s.records);
	/* Replaced and deleted, they are gone. */
	{
		struct pmskb_op op[2] = { op_put("k7", 2, NULL, 0), op_delete("k100", 4) };
		struct pmskb_result r[2];

		ASSERT_EQ(0, submit(self->s.fd, op, r, 2));
		ASSERT_LT(0, r[0].res);
		ASSERT_LT(0, r[1].res);
	}
	from = 0;
	ASSERT_EQ(0, scrub(self->s.fd, &from, 0, bad, 8, &s));
	ASSERT_EQ(2, s.nr_bad);
	EXPECT_EQ(seq[2], bad[0].seq);
	EXPECT_EQ(seq[3], bad[1].seq);
}

/* ---- attached to be read ---- */

static int attach_as(struct store *s, uint32_t flags, struct pmskb_attach *a)
{
	memset(a, 0, sizeof(*a));
	a->fd = s->dev;
	a->flags = flags;
	return ioctl(s->ctl, PMSKB_IOC_ATTACH, a) ? -errno : 0;
}

TEST_F_TIMEOUT(tiny, attached_to_be_read_nothing_is_changed, 60)
{
	enum { NR = 300, LEN = 900 };
	const struct lot lot = { 9, LEN };
	uint64_t head, data, len, from = 0, off, index = 0;
	uint8_t *before, *after;
	struct pmskb_store_info info;
	struct pmskb_compact cmp;
	struct pmskb_attach a;
	struct pmskb_result r[4];
	struct pmskb_op op[4];
	struct pmskb_scrub s;
	struct conn c;
	const char *why, *dev = dev_path(DEV_PMEM, &why);
	static char page[4096];
	int err, i, fd;

	ASSERT_EQ(NR, put_lot(&self->c, lot, 0, NR, &err));
	ASSERT_EQ(NR / 3 * 2, delete_lot(self->s.fd, 0, NR, 3, 0));
	conn_close(&self->c);
	head = self->s.info.head_off;
	data = self->s.info.data_off;
	len = self->s.info.region_len;
	store_let_go(&self->s);
	ASSERT_EQ(0, dev_detach(self->s.ctl, self->s.minor, 4000));
	self->s.minor = ~0U;
	before = malloc(head + len - data);
	after = malloc(head + len - data);
	ASSERT_TRUE(before && after);
	ASSERT_EQ(0, media_read(dev, 0, before, head));
	ASSERT_EQ(0, media_read(dev, data, before + head, len - data));

	EXPECT_EQ(-EINVAL, attach_as(&self->s, 4, &a));
	EXPECT_EQ(-EINVAL, attach_as(&self->s, PMSKB_ATTACH_READ_ONLY | 1U << 31, &a));
	ASSERT_EQ(0, attach_as(&self->s, PMSKB_ATTACH_READ_ONLY, &a));
	self->s.minor = a.minor;
	snprintf(self->s.path, sizeof(self->s.path), "/dev/pmskb%u", a.minor);
	fd = self->s.fd = open(self->s.path, O_RDWR | O_CLOEXEC);
	ASSERT_LE(0, fd);
	self->s.map = mmap(NULL, self->s.map_len, PROT_READ, MAP_SHARED, fd, 0);
	ASSERT_NE(MAP_FAILED, self->s.map);
	ASSERT_EQ(0, store_info(&self->s, &info));
	EXPECT_EQ(PMSKB_STORE_READ_ONLY, info.flags);
	EXPECT_EQ(0, self->s.info.flags) TH_LOG("and before it was not");
	EXPECT_EQ(NR / 3, info.records);
	ADDS_UP(&info, 0, false);
	/* Reading. */
	lot_is(_metadata, &self->s, lot, NR / 3);
	for (i = 0; i < NR; i++) {
		struct hit hit;
		char key[16];

		ASSERT_EQ(i % 3 == 0, map_get(self->s.map, self->s.map_len, key, key_of(key, i), &hit));
		if (i % 3)
			continue;
		ASSERT_EQ(0, map_bytes(self->s.map, self->s.map_len, &hit, page));
		ASSERT_EQ(-1, differs(page, LEN, lot.seed, i * LEN));
		ASSERT_LT(0, pread(fd, page, 16, hit.extents[0] >> 20));
		ASSERT_EQ(-1, differs(page, 16, lot.seed, i * LEN));
	}
	ASSERT_EQ(0, scrub(fd, &from, 0, NULL, 0, &s));
	EXPECT_EQ(1, s.done);
	EXPECT_EQ(NR / 3, s.records);
	/* Changing. */
	op[0] = op_put("new", 3, NULL, 0);
	op[1] = op_delete("k0", 2);
	op[2] = op_truncate(~0ULL);
	op[3] = op_put(NULL, 0, NULL, 0);
	for (i = 0; i < 2; i++) {
		ASSERT_EQ(0, way_submit(&(struct way){ fd, -1, true }, op, r, i ? 2 : 4, i ? PMSKB_SUBMIT_ATOMIC : 0));
		EXPECT_EQ(-EROFS, r[0].res);
		EXPECT_TRUE(r[1].res == -EROFS || (i && r[1].res == -ECANCELED)) TH_LOG("%lld", r[1].res);
		if (!i) {
			EXPECT_EQ(-EROFS, r[2].res);
			EXPECT_EQ(-EROFS, r[3].res);
		}
	}
	from = 0;
	EXPECT_EQ(-EROFS, compact(fd, &from, 0, &cmp));
	EXPECT_EQ(EROFS, ERRNO(ioctl(fd, PMSKB_IOC_ALLOC, &(struct pmskb_alloc){ .len = 4096 })));
	ASSERT_EQ(0, conn_make(&c, &lo, -1, HOW_PLAIN));
	EXPECT_EQ(-EROFS, sock_attach_ioctl(c.s, fd));
	EXPECT_EQ(-EROFS, sock_attach_opt(c.s, fd));
	conn_close(&c);
	ASSERT_EQ(0, store_info(&self->s, &info));
	EXPECT_EQ(NR / 3, info.records);
	EXPECT_EQ(0, info.sockets);
	store_let_go(&self->s);
	ASSERT_EQ(0, dev_detach(self->s.ctl, self->s.minor, 4000));
	self->s.minor = ~0U;

	/* On the media: the live page is volatile, and so are nodes of the index. */
	ASSERT_EQ(0, media_read(dev, 0, after, head));
	ASSERT_EQ(0, media_read(dev, data, after + head, len - data));
	for (off = 0; off < head + len - data; off += 4096) {
		bool node = false;

		if (off == 4096 || !memcmp(before + off, after + off, 4096))
			continue;
		for (i = 0; i < 4; i++)
			node |= get64(after + off + i * 1024 + 8) >> 48 == 0x6e70;
		EXPECT_TRUE(off >= head && node) TH_LOG("page at %lu has changed", off < head ? off : off - head + data);
		/* Where no record was. */
		EXPECT_NE(0, memcmp(before + off + 4, "PKrf", 4));
		index++;
	}
	EXPECT_GE(20, index);
	free(before);
	free(after);
	/* And for writing again. */
	ASSERT_EQ(0, attach_as(&self->s, 0, &a));
	self->s.minor = a.minor;
	snprintf(self->s.path, sizeof(self->s.path), "/dev/pmskb%u", a.minor);
	self->s.fd = open(self->s.path, O_RDWR | O_CLOEXEC);
	ASSERT_EQ(0, store_info(&self->s, &info));
	EXPECT_EQ(0, info.flags);
	ASSERT_EQ(0, submit(self->s.fd, op, r, 1));
	EXPECT_EQ(NR + 1, r[0].res);
}

/* ---- under load ---- */

struct drainer {
	int fd;
	uint64_t len;
	uint32_t seed;
	ssize_t wrong;
	volatile bool done;
};

static void *drains(void *arg)
{
	struct drainer *dr = arg;
	static char buf[65536];
	uint64_t pos = 0;
	ssize_t n;

	dr->wrong = -1;
	while (pos < dr->len) {
		n = recv(dr->fd, buf, sizeof(buf), 0);
		if (n <= 0) {
			dr->wrong = -2;
			break;
		}
		if (differs(buf, n, dr->seed, pos) >= 0) {
			dr->wrong = pos;
			break;
		}
		pos += n;
	}
	dr->done = true;
	return NULL;
}

TEST_F_TIMEOUT(small, space_comes_back_under_network_load, 120)
{
	enum { LEN = 1024, PER = 192 };
	const struct lot lot = { 10, LEN };
	uint64_t total = env_number("PMSKB_TEST_MB", 12) << 20, from = 0;
	struct pmskb_store_info a, b;
	struct drainer dr = { .len = total, .seed = 11 };
	struct pmskb_compact cmp;
	struct sender snd;
	struct conn c;
	pthread_t thread;
	int rounds = 0, err, i;

	ASSERT_EQ(0, conn_make(&c, &lo, self->s.fd, HOW_ACCEPTED_IOCTL));
	dr.fd = c.s;
	ASSERT_EQ(0, store_info(&self->s, &a));
	ASSERT_EQ(0, sender_start(&snd, c.c, 11, total, 60000, false));
	ASSERT_EQ(0, pthread_create(&thread, NULL, drains, &dr));
	do {
		/* Put, replaced, three of four deleted, compacted, all deleted. */
		for (i = 0; i < 2; i++)
			ASSERT_EQ(PER, put_lot(&self->c, lot, 0, PER, &err)) TH_LOG("%d in round %d", err, rounds);
		ASSERT_EQ(PER * 3 / 4, delete_lot(self->s.fd, 0, PER, 4, 0));
		from = 0;
		ASSERT_EQ(0, compact(self->s.fd, &from, 64, &cmp));
		ASSERT_EQ(PER / 4, delete_lot(self->s.fd, 0, PER, 0, 0));
		rounds++;
	} while (!dr.done);
	pthread_join(thread, NULL);
	EXPECT_EQ(0, sender_wait(&snd));
	EXPECT_EQ(-1, dr.wrong);
	ASSERT_EQ(0, store_info(&self->s, &b));
	TH_LOG("%d rounds; %llu packets placed, %llu not for want of frames", rounds, b.counters.placed,
	       b.counters.unplaced[PMSKB_UNPLACED_NO_FRAME]);
	EXPECT_LE(3, rounds);
	EXPECT_LT(total / 2, b.counters.placed_bytes);
	conn_close(&c);
	conn_close(&self->c);
	from = 0;
	ASSERT_EQ(0, compact(self->s.fd, &from, 64, &cmp));
	EXPECT_EQ(0, store_back(&self->s, 10000, &b));
	ADDS_UP(&b, 0, false);
	EXPECT_EQ(0, b.records);
	EXPECT_EQ(0, b.sockets);
	EXPECT_EQ(0, b.tokens);
	EXPECT_EQ(0, b.frames_payload);
	EXPECT_EQ(0, b.live_bytes);
	EXPECT_EQ(0, b.fragmented_bytes);
	EXPECT_GE(1, b.frames_held) TH_LOG("but for the frame that compaction fills");
	EXPECT_GE(1, b.frames_record);
	EXPECT_GE(a.frames_index + 4, b.frames_index);
	ASSERT_EQ(0, store_close(&self->s));
	ASSERT_EQ(0, store_open(&self->s, DEV_PMEM));
	EXPECT_EQ(self->s.info.frames_total - self->s.info.frames_index, self->s.info.frames_free);
}

TEST_HARNESS_MAIN
