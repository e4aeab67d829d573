/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Receiving of what is to be persisted, and what should then be in the store.
 * For programs that include kselftest_harness.h: it must come first.
 */
#ifndef PMSKB_SELFTESTS_OBJECTS_H
#define PMSKB_SELFTESTS_OBJECTS_H

#include "common.h"
#include "media.h"

#include <arpa/inet.h>
#include <string.h>

#define MAX_DESC 4096

/* The last that were received, and all of them as extents. */
static struct pmskb_desc d[MAX_DESC];
static struct pmskb_ext e[MAX_DESC];

/* ---- what should be in the store ---- */

struct object {
	uint64_t seq;
	const void *key;
	uint32_t key_len;
	const void *bytes;
	uint32_t len;
	bool found;
};

struct ledger {
	struct object *objects;
	int nr, wrong;
	struct __test_metadata *_metadata;
};

static inline int compare(struct record *r, void *arg)
{
	struct ledger *l = arg;
	struct __test_metadata *_metadata = l->_metadata;
	int i;

	for (i = 0; i < l->nr; i++) {
		struct object *o = &l->objects[i];

		if (o->seq != r->seq)
			continue;
		EXPECT_FALSE(o->found) TH_LOG("record %lu is there twice", r->seq);
		o->found = true;
		EXPECT_EQ(o->key_len, r->key_len);
		EXPECT_EQ(!!o->key_len, r->keyed);
		EXPECT_TRUE(o->key_len == r->key_len && !memcmp(o->key, r->key, r->key_len)) TH_LOG("key of %lu", r->seq);
		EXPECT_EQ(o->len, r->len);
		EXPECT_TRUE(o->len == r->len && !memcmp(o->bytes, r->bytes, r->len)) TH_LOG("bytes of %lu", r->seq);
		EXPECT_EQ(ntohs(rfc1071(r->bytes, r->len)), r->csum) TH_LOG("checksum of %lu", r->seq);
		return 0;
	}
	l->wrong++;
	TH_LOG("record %lu, key '%.*s', is in the store and should not be", r->seq, r->key_len, r->key);
	return 0;
}

/* The store holds just these records; first as it is, then detached and attached. */
static inline void store_holds(struct __test_metadata *_metadata, struct store *s, struct conn *c,
			       enum dev dev, struct object *objects, int nr)
{
	struct pmskb_store_info info;
	uint64_t last = 0, keys = 0, bytes = 0;
	int round, i, n;

	for (i = 0; i < nr; i++) {
		last = objects[i].seq > last ? objects[i].seq : last;
		keys += !!objects[i].key_len;
		bytes += objects[i].len;
	}
	for (round = 0; round < 2; round++) {
		struct ledger l = { objects, nr, 0, _metadata };

		for (i = 0; i < nr; i++)
			objects[i].found = false;
		n = media_scan(s->map, s->map_len, compare, &l);
		EXPECT_EQ(nr, n) TH_LOG("records in the store, %s", round ? "attached again" : "at once");
		for (i = 0; i < nr; i++) {
			EXPECT_TRUE(objects[i].found) TH_LOG("record %lu is lost, %s", objects[i].seq,
							     round ? "attached again" : "at once");
		}
		EXPECT_EQ(0, l.wrong);
		ASSERT_EQ(0, store_info(s, &info));
		EXPECT_EQ(nr, info.records);
		EXPECT_EQ(keys, info.keys);
		EXPECT_EQ(bytes, info.live_bytes);
		EXPECT_LE(last, info.durable_seq);
		/* The tools' reader has the core's code; this one here has not. */
		if (have_program("pmskbctl")) {
			EXPECT_EQ(0, sh("pmskbctl verify pmskb%u >/dev/null", s->minor)) TH_LOG("pmskbctl verify");
		}
		if (round)
			break;
		if (c)
			conn_close(c);
		ASSERT_EQ(0, store_close(s));
		ASSERT_EQ(0, store_open(s, dev));
	}
}

/* Sends len bytes of stream seed and takes their descriptors. */
static inline int receive(struct __test_metadata *_metadata, struct conn *c, void *buf, size_t len,
			  uint32_t seed)
{
	int n;

	fill(buf, len, seed, 0);
	ASSERT_EQ(0, send_all(c->c, buf, len));
	n = desc_recv_bytes(c->s, d, MAX_DESC, len);
	ASSERT_LT(0, n) TH_LOG("receiving %zu bytes: %s", len, strerror(-n));
	exts_of(e, d, n);
	return n;
}

#endif
