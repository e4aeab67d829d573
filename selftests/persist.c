// SPDX-License-Identifier: GPL-2.0
/*
 * Promises about operations: put, release, their results, and that what was
 * acknowledged is there after the store was detached and attached again, read
 * by code (media.c) that shares nothing with the module.
 */
#include "common.h"
#include "media.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>

#include "harness.h"
#include "objects.h"

#define ERRNO(call) ((call) < 0 ? errno : 0)
FIXTURE(persist) {
	struct store s;
	struct conn c;
	struct net net;
};

FIXTURE_VARIANT(persist) {
	int family;
	enum dev dev;
	enum link link;
	enum how how;
};

FIXTURE_VARIANT_ADD(persist, v4_pmem_lo) { AF_INET, DEV_PMEM, LINK_LO, HOW_LISTENER_OPT };
FIXTURE_VARIANT_ADD(persist, v6_dax_noffload) { AF_INET6, DEV_DAX, LINK_PLAIN, HOW_ACCEPTED_IOCTL };
FIXTURE_VARIANT_ADD(persist, v6_pmem_veth) { AF_INET6, DEV_PMEM, LINK_VETH, HOW_LISTENER_IOCTL };

FIXTURE_SETUP(persist)
{
	const char *why;

	if (!dev_path(variant->dev, &why))
		SKIP(return, "%s", why);
	why = net_up(variant->link);
	if (why)
		SKIP(return, "%s", why);
	self->net = (struct net) { variant->family, variant->link };
	ASSERT_EQ(0, store_make(&self->s, variant->dev, 0, 0));
	ASSERT_EQ(0, conn_make(&self->c, &self->net, self->s.fd, variant->how));
	ASSERT_EQ(0, sock_mode(self->c.s, PMSKB_RX_DESC));
}

FIXTURE_TEARDOWN(persist)
{
	struct pmskb_store_info info;

	conn_close(&self->c);
	EXPECT_EQ(0, store_quiet(&self->s, 5000, &info)) TH_LOG("frames are left behind");
	EXPECT_EQ(0, store_close(&self->s));
}

/* ---- put ---- */

TEST_F(persist, an_object_with_a_key_is_there_for_good)
{
	static char buf[5000];
	struct pmskb_sock_info si;
	struct pmskb_result r;
	struct object o;
	struct pmskb_op op;
	int n;

	n = receive(_metadata, &self->c, buf, sizeof(buf), 41);
	op = op_put("the key", 7, e, n);
	ASSERT_EQ(1, persist_one(self->c.s, &op, &r)) TH_LOG("the first record of a store is number 1");
	EXPECT_EQ(0, r.flags);
	EXPECT_EQ(0, r.reserved);
	EXPECT_EQ(rfc1071(buf, sizeof(buf)), r.csum);
	EXPECT_LE(PMSKB_CSUM_DERIVED, r.csum_kind);
	EXPECT_GE(PMSKB_CSUM_COMPUTED, r.csum_kind);
	/* The tokens were used. */
	ASSERT_EQ(0, sock_info(self->c.s, &si));
	EXPECT_EQ(0, si.tokens);
	EXPECT_EQ(-ESTALE, persist_one(self->c.s, &op, &r));
	EXPECT_EQ(-ESTALE, desc_release(self->c.s, d[0].token, 1));
	o = (struct object) { 1, "the key", 7, buf, sizeof(buf) };
	store_holds(_metadata, &self->s, &self->c, variant->dev, &o, 1);
}

TEST_F(persist, an_object_without_a_key_is_in_the_log)
{
	static char buf[3000];
	struct object o[3];
	struct pmskb_op op;
	int n, i;

	for (i = 0; i < 3; i++) {
		n = receive(_metadata, &self->c, buf + i * 1000, 1000, 42 + i);
		op = op_put(NULL, 0, e, n);
		o[i] = (struct object) { i + 1, "", 0, buf + i * 1000, 1000 };
		ASSERT_EQ(i + 1, persist_one(self->c.s, &op, NULL));
	}
	store_holds(_metadata, &self->s, &self->c, variant->dev, o, 3);
}

TEST_F(persist, empty_objects_exist)
{
	struct pmskb_op op = op_put("empty", 5, NULL, 0);
	struct object o[2] = { { 1, "empty", 5, "", 0 }, { 2, "", 0, "", 0 } };
	struct pmskb_result r;

	ASSERT_EQ(1, persist_one(self->c.s, &op, &r));
	EXPECT_EQ(0, r.csum);
	op = op_put(NULL, 0, NULL, 0);
	ASSERT_EQ(2, persist_one(self->c.s, &op, NULL));
	store_holds(_metadata, &self->s, &self->c, variant->dev, o, 2);
}

TEST_F(persist, a_part_of_a_packet_has_the_sum_of_that_part)
{
	static const uint32_t from[] = { 0, 1, 2, 3, 63, 64, 65, 499, 998, 999 };
	static const uint32_t len[] = { 1, 2, 3, 7, 64, 129, 500, 501 };
	static struct object o[ARRAY_LEN(from) * ARRAY_LEN(len)];
	static struct pmskb_ext p[MAX_DESC];
	static char buf[1000];
	struct pmskb_result r;
	struct pmskb_op op;
	size_t i, k;
	int n, m, nr = 0;

	n = receive(_metadata, &self->c, buf, sizeof(buf), 43);
	for (i = 0; i < ARRAY_LEN(from); i++)
		for (k = 0; k < ARRAY_LEN(len); k++) {
			if (from[i] + len[k] > sizeof(buf))
				continue;
			m = exts_part(p, d, n, from[i], len[k]);
			ASSERT_LT(0, m);
			op = op_put(NULL, 0, p, m);
			op.flags = PMSKB_OP_KEEP;
			ASSERT_EQ(nr + 1, persist_one(self->c.s, &op, &r));
			EXPECT_EQ(rfc1071(buf + from[i], len[k]), r.csum) TH_LOG("%u bytes at %u", len[k], from[i]);
			o[nr] = (struct object) { nr + 1, "", 0, buf + from[i], len[k] };
			nr++;
		}
	ASSERT_EQ(0, desc_release_all(self->c.s, d, n));
	store_holds(_metadata, &self->s, &self->c, variant->dev, o, nr);
}

TEST_F(persist, several_packets_make_one_object_in_any_order)
{
	static char buf[20 * 777], mixed[20 * 777];
	static struct pmskb_ext p[MAX_DESC];
	struct object o[2];
	struct pmskb_result r;
	struct pmskb_op op;
	int n = 0, i, m, nr = 0;

	fill(buf, sizeof(buf), 44, 0);
	for (i = 0; i < 20; i++) {
		ASSERT_EQ(0, send_all(self->c.c, buf + i * 777, 777));
		m = desc_recv_bytes(self->c.s, d + n, MAX_DESC - n, 777);
		ASSERT_LT(0, m);
		n += m;
	}
	/* Odd pieces, so that sums change places; last packet first. */
	for (i = 19; i >= 0; i--) {
		memcpy(mixed + (19 - i) * 777, buf + i * 777, 777);
		m = exts_part(p + nr, d, n, i * 777, 777);
		ASSERT_LT(0, m);
		nr += m;
	}
	op = op_put("mixed", 5, p, nr);
	op.flags = PMSKB_OP_KEEP;
	ASSERT_EQ(1, persist_one(self->c.s, &op, &r));
	EXPECT_EQ(rfc1071(mixed, sizeof(mixed)), r.csum);
	o[0] = (struct object) { 1, "mixed", 5, mixed, sizeof(mixed) };
	/* In order it is one run of frames, or nearly. */
	exts_of(e, d, n);
	op = op_put("in order", 8, e, n);
	ASSERT_EQ(2, persist_one(self->c.s, &op, &r));
	EXPECT_EQ(rfc1071(buf, sizeof(buf)), r.csum);
	o[1] = (struct object) { 2, "in order", 8, buf, sizeof(buf) };
	store_holds(_metadata, &self->s, &self->c, variant->dev, o, 2);
}

TEST_F(persist, several_objects_share_a_packet_and_its_frames)
{
	static char buf[900];
	struct pmskb_store_info before, after;
	static struct pmskb_ext p[3][16];
	struct pmskb_result r[3];
	struct pmskb_op op[3];
	struct object o[3];
	int n, i, m;

	n = receive(_metadata, &self->c, buf, sizeof(buf), 45);
	for (i = 0; i < 3; i++) {
		m = exts_part(p[i], d, n, i * 300, 300);
		ASSERT_LT(0, m);
		op[i] = op_put(&"abc"[i], 1, p[i], m);
		op[i].flags = PMSKB_OP_KEEP;
		o[i] = (struct object) { i + 1, &"abc"[i], 1, buf + i * 300, 300 };
	}
	ASSERT_EQ(0, persist(self->c.s, op, r, 3));
	for (i = 0; i < 3; i++) {
		ASSERT_EQ(i + 1, r[i].res);
		EXPECT_EQ(rfc1071(buf + i * 300, 300), r[i].csum);
	}
	ASSERT_EQ(0, desc_release_all(self->c.s, d, n));
	/* Replace two of them: the frame is the third's still. */
	ASSERT_EQ(0, store_info(&self->s, &before));
	op[0] = op_put("a", 1, NULL, 0);
	op[1] = op_put("c", 1, NULL, 0);
	ASSERT_EQ(0, persist(self->c.s, op, r, 2));
	EXPECT_EQ(PMSKB_RES_REPLACED, r[0].flags);
	EXPECT_EQ(4, r[0].res);
	EXPECT_EQ(5, r[1].res);
	ASSERT_EQ(0, store_info(&self->s, &after));
	EXPECT_EQ(before.live_bytes - 600, after.live_bytes);
	o[0] = (struct object) { 4, "a", 1, "", 0 };
	o[2] = (struct object) { 5, "c", 1, "", 0 };
	store_holds(_metadata, &self->s, &self->c, variant->dev, o, 3);
}

TEST_F(persist, a_key_may_lie_in_the_packet_itself)
{
	static char buf[4000];
	struct pmskb_ext key[4], body[64];
	struct pmskb_result r;
	struct object o[1];
	struct pmskb_op op;
	int n, k, m;

	n = receive(_metadata, &self->c, buf, sizeof(buf), 46);
	k = exts_part(key, d, n, 4, 20);
	m = exts_part(body, d, n, 100, 3000);
	ASSERT_LT(0, k);
	ASSERT_LT(0, m);
	op = op_put(key, k, body, m);
	op.flags = PMSKB_OP_KEY_EXTENTS;
	ASSERT_EQ(1, persist_one(self->c.s, &op, &r));
	EXPECT_EQ(rfc1071(buf + 100, 3000), r.csum) TH_LOG("the key is no part of the object");
	/* It is that key, wherever its bytes are. */
	op = op_put(buf + 4, 20, NULL, 0);
	op.flags = PMSKB_OP_CREATE;
	EXPECT_EQ(-EEXIST, persist_one(self->c.s, &op, NULL));
	o[0] = (struct object) { 1, buf + 4, 20, buf + 100, 3000 };
	store_holds(_metadata, &self->s, &self->c, variant->dev, o, 1);
}

TEST_F(persist, a_key_may_straddle_packets_and_come_in_pieces)
{
	static char a[3000], b[3000];
	static struct pmskb_desc first[64];
	struct pmskb_ext key[8];
	char want[60];
	struct object o[1];
	struct pmskb_op op;
	int n, m, k;

	fill(a, sizeof(a), 47, 0);
	ASSERT_EQ(0, send_all(self->c.c, a, sizeof(a)));
	n = desc_recv_bytes(self->c.s, first, 64, sizeof(a));
	ASSERT_LT(0, n);
	m = receive(_metadata, &self->c, b, sizeof(b), 48);
	/* The end of the one, the start of the other, and one byte again. */
	k = exts_part(key, first, n, sizeof(a) - 29, 29);
	ASSERT_LT(0, k);
	k += exts_part(key + k, d, m, 0, 30);
	key[k++] = (struct pmskb_ext) { d[0].token, 7, 1, 0 };
	memcpy(want, a + sizeof(a) - 29, 29);
	memcpy(want + 29, b, 30);
	want[59] = b[7];
	op = op_put(key, k, e, m);
	op.flags = PMSKB_OP_KEY_EXTENTS;
	ASSERT_EQ(1, persist_one(self->c.s, &op, NULL));
	/* The tokens of the key were used as well. */
	o[0] = (struct object) { 1, want, 60, b, sizeof(b) };
	store_holds(_metadata, &self->s, &self->c, variant->dev, o, 1);
}

TEST_F(persist, create_replace_and_upsert)
{
	struct object o[2] = { { 3, "k", 1, "", 0 }, { 5, "n", 1, "", 0 } };
	struct pmskb_op op = op_put("k", 1, NULL, 0);
	struct pmskb_result r;

	op.flags = PMSKB_OP_REPLACE;
	EXPECT_EQ(-ENOENT, persist_one(self->c.s, &op, NULL));
	op.flags = PMSKB_OP_CREATE;
	EXPECT_EQ(1, persist_one(self->c.s, &op, &r));
	EXPECT_EQ(0, r.flags);
	EXPECT_EQ(-EEXIST, persist_one(self->c.s, &op, NULL));
	op.flags = PMSKB_OP_REPLACE;
	EXPECT_EQ(2, persist_one(self->c.s, &op, &r));
	EXPECT_EQ(PMSKB_RES_REPLACED, r.flags);
	op.flags = 0;
	EXPECT_EQ(3, persist_one(self->c.s, &op, &r));
	EXPECT_EQ(PMSKB_RES_REPLACED, r.flags);
	/* Within one array the first counts for the second. */
	{
		struct pmskb_op two[3] = { op_put("n", 1, NULL, 0), op_put("n", 1, NULL, 0), op_put("n", 1, NULL, 0) };
		struct pmskb_result rr[3];

		two[0].flags = two[1].flags = PMSKB_OP_CREATE;
		two[2].flags = PMSKB_OP_REPLACE;
		ASSERT_EQ(0, persist(self->c.s, two, rr, 3));
		EXPECT_EQ(4, rr[0].res);
		EXPECT_EQ(-EEXIST, rr[1].res);
		EXPECT_EQ(5, rr[2].res);
		EXPECT_EQ(PMSKB_RES_REPLACED, rr[2].flags);
	}
	store_holds(_metadata, &self->s, &self->c, variant->dev, o, 2);
}

TEST_F(persist, keys_of_every_length_and_byte_are_told_apart)
{
	static uint8_t key[PMSKB_MAX_KEY];
	static struct object o[64];
	static uint8_t keys[64][PMSKB_MAX_KEY];
	static const uint32_t lens[] = { 1, 2, 7, 8, 9, 15, 16, 17, 63, 64, 65, 127, 128, 255, 256, 257,
					 511, 512, 1000, 1023, 1024 };
	struct pmskb_op op;
	size_t i;
	int nr = 0;

	/* Zeros are bytes as good as others: each is a prefix of the next. */
	for (i = 0; i < ARRAY_LEN(lens); i++) {
		op = op_put(key, lens[i], NULL, 0);
		op.flags = PMSKB_OP_CREATE;
		ASSERT_EQ(nr + 1, persist_one(self->c.s, &op, NULL)) TH_LOG("%u bytes", lens[i]);
		o[nr] = (struct object) { nr + 1, keys[nr], lens[i], "", 0 };
		nr++;
	}
	/* The same lengths with another last byte. */
	for (i = 0; i < ARRAY_LEN(lens); i++) {
		memset(keys[nr], 0, sizeof(keys[nr]));
		keys[nr][lens[i] - 1] = 0xff;
		op = op_put(keys[nr], lens[i], NULL, 0);
		op.flags = PMSKB_OP_CREATE;
		ASSERT_EQ(nr + 1, persist_one(self->c.s, &op, NULL)) TH_LOG("%u bytes", lens[i]);
		o[nr] = (struct object) { nr + 1, keys[nr], lens[i], "", 0 };
		nr++;
	}
	store_holds(_metadata, &self->s, &self->c, variant->dev, o, nr);
}

TEST_F(persist, keep_keeps_the_tokens)
{
	static char buf[2000];
	struct pmskb_store_info info;
	struct pmskb_sock_info si;
	struct pmskb_op op;
	struct object o[2];
	int n;

	n = receive(_metadata, &self->c, buf, sizeof(buf), 49);
	op = op_put("one", 3, e, n);
	op.flags = PMSKB_OP_KEEP;
	ASSERT_EQ(1, persist_one(self->c.s, &op, NULL));
	ASSERT_EQ(0, sock_info(self->c.s, &si));
	EXPECT_EQ(n, si.tokens);
	op = op_put("two", 3, e, n);
	ASSERT_EQ(2, persist_one(self->c.s, &op, NULL));
	ASSERT_EQ(0, sock_info(self->c.s, &si));
	EXPECT_EQ(0, si.tokens);
	/* The bytes are stored once. */
	ASSERT_EQ(0, store_info(&self->s, &info));
	EXPECT_LE(info.frames_payload + info.frames_held, 3);
	o[0] = (struct object) { 1, "one", 3, buf, sizeof(buf) };
	o[1] = (struct object) { 2, "two", 3, buf, sizeof(buf) };
	store_holds(_metadata, &self->s, &self->c, variant->dev, o, 2);
}

TEST_F(persist, what_is_replaced_gives_its_space_back)
{
	static char buf[100000];
	struct pmskb_store_info info;
	uint64_t total = 0, room = self->s.info.frames_total * PMSKB_FRAME_SIZE;
	unsigned long rounds = env_number("PMSKB_TEST_REPLACE", 300), i;
	struct pmskb_op op;
	struct object o;
	int64_t seq = 0;
	int n;

	for (i = 0; i < rounds; i++) {
		n = receive(_metadata, &self->c, buf, sizeof(buf), 1000 + i);
		op = op_put("again", 5, e, n);
		seq = persist_one(self->c.s, &op, NULL);
		ASSERT_EQ(i + 1, seq) TH_LOG("after %lu of %lu bytes", total, room);
		total += sizeof(buf);
	}
	ASSERT_EQ(0, store_info(&self->s, &info));
	EXPECT_GE(200, info.frames_payload + info.frames_held);
	EXPECT_EQ(1, info.records);
	o = (struct object) { seq, "again", 5, buf, sizeof(buf) };
	store_holds(_metadata, &self->s, &self->c, variant->dev, &o, 1);
}

TEST_F(persist, unplaced_data_is_copied_and_the_caller_sees_a_flag)
{
	struct pmskb_result r;
	static char buf[3000];
	struct pmskb_op op;
	struct object o;
	struct conn c;
	int n;

	ASSERT_EQ(0, conn_make(&c, &self->net, -1, HOW_PLAIN));
	fill(buf, sizeof(buf), 50, 0);
	ASSERT_EQ(0, send_all(c.c, buf, sizeof(buf)));
	usleep(50000);
	ASSERT_EQ(0, sock_attach_ioctl(c.s, self->s.fd));
	ASSERT_EQ(0, sock_mode(c.s, PMSKB_RX_DESC));
	n = desc_recv_bytes(c.s, d, MAX_DESC, sizeof(buf));
	ASSERT_LT(0, n);
	EXPECT_TRUE(d[0].flags & PMSKB_DESC_COPIED);
	exts_of(e, d, n);
	op = op_put("copied", 6, e, n);
	ASSERT_EQ(1, persist_one(c.s, &op, &r));
	EXPECT_EQ(PMSKB_RES_COPIED, r.flags);
	EXPECT_EQ(rfc1071(buf, sizeof(buf)), r.csum);
	conn_close(&c);
	o = (struct object) { 1, "copied", 6, buf, sizeof(buf) };
	store_holds(_metadata, &self->s, &self->c, variant->dev, &o, 1);
}

/* What a record says besides: time, flow, sequence number. */
static int keep_record(struct record *r, void *arg)
{
	memcpy(arg, r, sizeof(*r));
	return 0;
}

TEST_F(persist, a_record_tells_where_and_when_its_bytes_came_from)
{
	static struct record r;
	struct sockaddr_storage peer, self_addr;
	socklen_t len = sizeof(peer);
	struct pmskb_op op;
	static char buf[500];
	int n;

	n = receive(_metadata, &self->c, buf, sizeof(buf), 51);
	op = op_put("flow", 4, e, n);
	ASSERT_EQ(1, persist_one(self->c.s, &op, NULL));
	ASSERT_EQ(0, getpeername(self->c.s, (void *)&peer, &len));
	len = sizeof(self_addr);
	ASSERT_EQ(0, getsockname(self->c.s, (void *)&self_addr, &len));
	ASSERT_EQ(1, media_scan(self->s.map, self->s.map_len, keep_record, &r));
	EXPECT_EQ(d[0].time, r.time);
	EXPECT_EQ(d[0].seq, r.tcp_seq);
	EXPECT_EQ(d[0].time_source, REC_TIME_SOURCE(r.flags));
	EXPECT_EQ(d[0].csum_kind, REC_CSUM_KIND(r.flags));
	if (variant->family == AF_INET) {
		struct sockaddr_in *p = (void *)&peer, *q = (void *)&self_addr;

		EXPECT_EQ(4, r.family);
		EXPECT_EQ(0, memcmp(r.remote, &p->sin_addr, 4));
		EXPECT_EQ(0, memcmp(r.local, &q->sin_addr, 4));
		EXPECT_EQ(ntohs(p->sin_port), r.remote_port);
		EXPECT_EQ(ntohs(q->sin_port), r.local_port);
	} else {
		struct sockaddr_in6 *p = (void *)&peer, *q = (void *)&self_addr;

		EXPECT_EQ(6, r.family);
		EXPECT_EQ(0, memcmp(r.remote, &p->sin6_addr, 16));
		EXPECT_EQ(0, memcmp(r.local, &q->sin6_addr, 16));
		EXPECT_EQ(ntohs(p->sin6_port), r.remote_port);
		EXPECT_EQ(ntohs(q->sin6_port), r.local_port);
	}
}

TEST_F_TIMEOUT(persist, a_large_object_of_very_many_extents, 120)
{
	enum { LEN = 1 << 20 };
	static char buf[LEN], odd[LEN / 2];
	static struct pmskb_ext p[LEN / 128];
	static struct pmskb_desc all[MAX_DESC];
	struct object o[2];
	struct sender snd;
	struct pmskb_result r;
	struct pmskb_op op;
	int n, i, m = 0;

	fill(buf, LEN, 52, 0);
	ASSERT_EQ(0, sender_start(&snd, self->c.c, 52, LEN, 100000, false));
	n = desc_recv_bytes(self->c.s, all, MAX_DESC, LEN);
	ASSERT_LT(0, n);
	EXPECT_EQ(0, sender_wait(&snd));
	/* Every second 100 bytes: nothing is adjacent, lists are needed. */
	for (i = 0; i + 200 <= LEN; i += 200) {
		int k = exts_part(p + m, all, n, i, 100);

		ASSERT_LT(0, k);
		m += k;
		memcpy(odd + i / 2, buf + i, 100);
	}
	ASSERT_LT(5000, m);
	op = op_put("sieve", 5, p, m);
	op.flags = PMSKB_OP_KEEP;
	ASSERT_EQ(1, persist_one(self->c.s, &op, &r));
	o[0] = (struct object) { 1, "sieve", 5, odd, i / 2 };
	EXPECT_EQ(rfc1071(odd, i / 2), r.csum);
	for (i = 0; i < n; i++)
		p[i] = ext_of(&all[i]);
	op = op_put("whole", 5, p, n);
	ASSERT_EQ(2, persist_one(self->c.s, &op, &r));
	EXPECT_EQ(rfc1071(buf, LEN), r.csum);
	o[1] = (struct object) { 2, "whole", 5, buf, LEN };
	store_holds(_metadata, &self->s, &self->c, variant->dev, o, 2);
}

/* ---- arrays ---- */

TEST_F_TIMEOUT(persist, arrays_hold_up_to_1024_operations, 120)
{
	static struct pmskb_result r[PMSKB_MAX_OPS + 1];
	static struct pmskb_op op[PMSKB_MAX_OPS + 1];
	static struct object o[PMSKB_MAX_OPS];
	static char keys[PMSKB_MAX_OPS + 1][8], buf[PMSKB_MAX_OPS];
	static struct pmskb_ext p[PMSKB_MAX_OPS];
	struct pmskb_store_info a, b;
	int n, i;

	n = receive(_metadata, &self->c, buf, sizeof(buf), 53);
	for (i = 0; i <= PMSKB_MAX_OPS; i++) {
		sprintf(keys[i], "%d", i);
		op[i] = op_put(keys[i], strlen(keys[i]), NULL, 0);
	}
	for (i = 0; i < PMSKB_MAX_OPS; i++) {
		ASSERT_EQ(1, exts_part(&p[i], d, n, i, 1));
		op[i] = op_put(keys[i], strlen(keys[i]), &p[i], 1);
		op[i].flags = PMSKB_OP_KEEP;
		o[i] = (struct object) { i + 1, keys[i], strlen(keys[i]), buf + i, 1 };
	}
	memset(r, 0x77, sizeof(r));
	EXPECT_EQ(-E2BIG, persist(self->c.s, op, r, PMSKB_MAX_OPS + 1));
	EXPECT_EQ(-E2BIG, persist(self->c.s, op, r, ~0U));
	EXPECT_EQ(-EINVAL, persist(self->c.s, op, r, 0));
	EXPECT_EQ(0x77, ((uint8_t *)r)[0]);
	ASSERT_EQ(0, store_info(&self->s, &a));
	EXPECT_EQ(0, a.records);
	ASSERT_EQ(0, persist(self->c.s, op, r, PMSKB_MAX_OPS));
	for (i = 0; i < PMSKB_MAX_OPS; i++) {
		ASSERT_EQ(i + 1, r[i].res);
		ASSERT_EQ(rfc1071(buf + i, 1), r[i].csum);
	}
	EXPECT_EQ(0x77, ((uint8_t *)&r[PMSKB_MAX_OPS])[0]) TH_LOG("a result too many was written");
	ASSERT_EQ(0, store_info(&self->s, &b));
	/* Two for the array; record frames and index nodes may need a few more. */
	EXPECT_LE(2, b.fences - a.fences);
	EXPECT_GE(8, b.fences - a.fences) TH_LOG("%llu fences", b.fences - a.fences);
	EXPECT_EQ(1, b.submits - a.submits);
	ASSERT_EQ(0, desc_release_all(self->c.s, d, n));
	store_holds(_metadata, &self->s, &self->c, variant->dev, o, PMSKB_MAX_OPS);
}

TEST_F(persist, a_put_costs_two_fences)
{
	struct pmskb_store_info a, b;
	struct pmskb_op op[20];
	struct pmskb_result r[20];
	static char buf[1000];
	int n, i;

	/* The first may have to make frames for records. */
	op[0] = op_put("a", 1, NULL, 0);
	ASSERT_LT(0, persist_one(self->c.s, &op[0], NULL));
	n = receive(_metadata, &self->c, buf, sizeof(buf), 54);
	op[0] = op_put("b", 1, e, n);
	ASSERT_EQ(0, store_info(&self->s, &a));
	ASSERT_LT(0, persist_one(self->c.s, &op[0], NULL));
	ASSERT_EQ(0, store_info(&self->s, &b));
	EXPECT_EQ(2, b.fences - a.fences);
	/* 1000 bytes are at most 17 lines, a record 2 or 3, the live page one or two. */
	EXPECT_LE(16, b.lines_flushed - a.lines_flushed);
	EXPECT_GE(30, b.lines_flushed - a.lines_flushed);
	for (i = 0; i < 20; i++)
		op[i] = op_put(&"cdefghijklmnopqrstuvwxyz"[i], 1, NULL, 0);
	ASSERT_EQ(0, persist(self->c.s, op, r, 20));
	ASSERT_EQ(0, store_info(&self->s, &a));
	/* No bytes to be durable first: one may do. */
	EXPECT_LE(1, a.fences - b.fences) TH_LOG("20 puts in an array");
	EXPECT_GE(2, a.fences - b.fences) TH_LOG("20 puts in an array");
}

TEST_F(persist, each_operation_has_its_own_fate)
{
	static char buf[100];
	struct pmskb_result r[6];
	struct pmskb_op op[6];
	struct object o[3];
	int n;

	n = receive(_metadata, &self->c, buf, sizeof(buf), 55);
	op[0] = op_put("good", 4, e, n);
	op[0].flags = PMSKB_OP_KEEP;
	op[1] = op_put("bad", 3, e, n);
	op[1].opcode = 77;
	op[2] = op_put("good", 4, NULL, 0);
	op[2].flags = PMSKB_OP_CREATE;
	op[3] = op_put(BAD_PTR, 4, NULL, 0);
	op[4] = op_put("fine", 4, e, n);
	/* Tokens go when the array is done: several operations may name one. */
	op[5] = op_put("also", 4, e, n);
	ASSERT_EQ(0, persist(self->c.s, op, r, 6));
	EXPECT_EQ(1, r[0].res);
	EXPECT_EQ(-EINVAL, r[1].res);
	EXPECT_EQ(-EEXIST, r[2].res);
	EXPECT_EQ(-EFAULT, r[3].res);
	EXPECT_EQ(2, r[4].res);
	EXPECT_EQ(3, r[5].res);
	EXPECT_EQ(0, r[1].flags);
	EXPECT_EQ(-ESTALE, persist_one(self->c.s, &op[5], NULL));
	o[0] = (struct object) { 1, "good", 4, buf, sizeof(buf) };
	o[1] = (struct object) { 2, "fine", 4, buf, sizeof(buf) };
	o[2] = (struct object) { 3, "also", 4, buf, sizeof(buf) };
	store_holds(_metadata, &self->s, &self->c, variant->dev, o, 3);
}

TEST_F(persist, release_is_an_operation_too)
{
	static char buf[4 * 50];
	struct pmskb_sock_info si;
	struct pmskb_result r[2];
	struct pmskb_op op[2];
	int n, i;

	for (i = 0; i < 4; i++) {
		ASSERT_EQ(0, send_all(self->c.c, buf + i * 50, 50));
		usleep(10000);
	}
	n = desc_recv_bytes(self->c.s, d, MAX_DESC, sizeof(buf));
	ASSERT_LT(0, n);
	for (i = 0; i < n; i++)
		e[i] = (struct pmskb_ext) { .token = d[i].token };
	op[0] = op_put(NULL, 0, e, n);
	op[0].opcode = PMSKB_OP_RELEASE;
	op[1] = op[0];
	ASSERT_EQ(0, persist(self->c.s, op, r, 2));
	EXPECT_EQ(n, r[0].res);
	EXPECT_EQ(-ESTALE, r[1].res);
	ASSERT_EQ(0, sock_info(self->c.s, &si));
	EXPECT_EQ(0, si.tokens);
}

TEST_F(persist, what_is_deleted_is_gone_for_good)
{
	static char buf[20000];
	struct pmskb_store_info info;
	struct pmskb_result r[3];
	struct pmskb_op op[3];
	struct object o[2];
	int n;

	n = receive(_metadata, &self->c, buf, sizeof(buf), 65);
	op[0] = op_put("gone", 4, e, n);
	op[1] = op_put("stays", 5, NULL, 0);
	op[2] = op_put("gone too", 8, NULL, 0);
	ASSERT_EQ(0, persist(self->c.s, op, r, 3));
	op[0] = op_put("gone", 4, NULL, 0);
	op[0].opcode = PMSKB_OP_DELETE;
	EXPECT_EQ(1, persist_one(self->c.s, &op[0], &r[0])) TH_LOG("the number of the record that was removed");
	EXPECT_EQ(0, r[0].flags);
	EXPECT_EQ(-ENOENT, persist_one(self->c.s, &op[0], NULL));
	op[0] = op_put("never there", 11, NULL, 0);
	op[0].opcode = PMSKB_OP_DELETE;
	EXPECT_EQ(-ENOENT, persist_one(self->c.s, &op[0], NULL));
	/* Delete and put in one array, in order; and by a key in a packet. */
	n = receive(_metadata, &self->c, buf, 100, 66);
	op[0] = op_put("gone too", 8, NULL, 0);
	op[0].opcode = PMSKB_OP_DELETE;
	op[1] = op_put("gone too", 8, e, n);
	op[1].flags = PMSKB_OP_CREATE;
	ASSERT_EQ(0, persist(self->c.s, op, r, 2));
	EXPECT_EQ(3, r[0].res);
	ASSERT_LT(3, r[1].res);
	EXPECT_EQ(0, store_quiet(&self->s, 5000, &info));
	EXPECT_GE(2, info.frames_payload + info.frames_held) TH_LOG("a deleted record keeps its frames");
	/* Malformed. */
	op[0].key_len = 0;
	EXPECT_EQ(-EINVAL, persist_one(self->c.s, &op[0], NULL)) TH_LOG("no key");
	op[0].key_len = 8;
	op[0].flags = PMSKB_OP_KEEP;
	EXPECT_EQ(-EINVAL, persist_one(self->c.s, &op[0], NULL)) TH_LOG("keep");
	o[0] = (struct object) { 2, "stays", 5, "", 0 };
	o[1] = (struct object) { r[1].res, "gone too", 8, buf, 100 };
	store_holds(_metadata, &self->s, &self->c, variant->dev, o, 2);
}

/* ---- bad input ---- */

TEST_F(persist, malformed_operations_are_einval_and_change_nothing)
{
	static char buf[100];
	struct pmskb_sock_info si;
	struct pmskb_ext x[3];
	struct pmskb_op op, ok;
	int n, i;

	n = receive(_metadata, &self->c, buf, sizeof(buf), 56);
	ok = op_put("k", 1, e, n);
	op = ok, op.opcode = 0;
	EXPECT_EQ(-EINVAL, persist_one(self->c.s, &op, NULL));
	op = ok, op.opcode = 0xffff;
	EXPECT_EQ(-EINVAL, persist_one(self->c.s, &op, NULL));
	for (i = 6; i < 16; i++) {
		op = ok, op.flags = 1 << i;
		EXPECT_EQ(-EINVAL, persist_one(self->c.s, &op, NULL)) TH_LOG("flag bit %d", i);
	}
	op = ok, op.flags = PMSKB_OP_CREATE | PMSKB_OP_REPLACE;
	EXPECT_EQ(-EINVAL, persist_one(self->c.s, &op, NULL));
	op = ok, op.flags = PMSKB_OP_CREATE, op.key_len = 0;
	EXPECT_EQ(-EINVAL, persist_one(self->c.s, &op, NULL)) TH_LOG("create without a key");
	op = ok, op.flags = PMSKB_OP_REPLACE, op.key_len = 0;
	EXPECT_EQ(-EINVAL, persist_one(self->c.s, &op, NULL)) TH_LOG("replace without a key");
	op = ok, op.flags = PMSKB_OP_KEY_EXTENTS, op.key_len = 0;
	EXPECT_EQ(-EINVAL, persist_one(self->c.s, &op, NULL)) TH_LOG("key extents, but none");
	for (i = 0; i < 3; i++) {
		op = ok, op.reserved[i] = 1;
		EXPECT_EQ(-EINVAL, persist_one(self->c.s, &op, NULL)) TH_LOG("reserved[%d]", i);
	}
	op = ok, op.seq = 1;
	EXPECT_EQ(-EINVAL, persist_one(self->c.s, &op, NULL)) TH_LOG("seq without a use");
	op = ok, op.fd = 0;
	EXPECT_EQ(-EINVAL, persist_one(self->c.s, &op, NULL)) TH_LOG("fd in PMSKB_PERSIST");
	op = ok, op.fd = self->c.s;
	EXPECT_EQ(-EINVAL, persist_one(self->c.s, &op, NULL)) TH_LOG("fd in PMSKB_PERSIST");

	op = op_put("k", 1, NULL, 0), op.fd = 0;
	EXPECT_EQ(-EINVAL, persist_one(self->c.s, &op, NULL)) TH_LOG("fd in PMSKB_PERSIST, and no extents");

	/* Extents. */
	op = op_put("k", 1, x, 1);
	x[0] = e[0], x[0].len = 0;
	EXPECT_EQ(-EINVAL, persist_one(self->c.s, &op, NULL)) TH_LOG("zero length");
	x[0] = e[0], x[0].len++;
	EXPECT_EQ(-EINVAL, persist_one(self->c.s, &op, NULL)) TH_LOG("one byte too long");
	x[0] = e[0], x[0].offset = 1;
	EXPECT_EQ(-EINVAL, persist_one(self->c.s, &op, NULL)) TH_LOG("ends one byte too late");
	x[0] = e[0], x[0].offset = x[0].len, x[0].len = 1;
	EXPECT_EQ(-EINVAL, persist_one(self->c.s, &op, NULL)) TH_LOG("starts at the end");
	x[0] = e[0], x[0].offset = ~0U, x[0].len = 2;
	EXPECT_EQ(-EINVAL, persist_one(self->c.s, &op, NULL)) TH_LOG("overflow");
	x[0] = e[0], x[0].offset = ~0U, x[0].len = 1 << 30;
	EXPECT_EQ(-EINVAL, persist_one(self->c.s, &op, NULL)) TH_LOG("overflow");
	x[0] = e[0], x[0].offset = 1, x[0].len = ~0U;
	EXPECT_EQ(-EFBIG, persist_one(self->c.s, &op, NULL)) TH_LOG("4 GiB");
	x[0] = e[0], x[0].reserved = 1;
	EXPECT_EQ(-EINVAL, persist_one(self->c.s, &op, NULL)) TH_LOG("reserved");
	/* Overlap: the same twice, by one byte, one inside the other, not neighbours in the array. */
	op.nr_extents = 2;
	x[0] = x[1] = e[0];
	EXPECT_EQ(-EINVAL, persist_one(self->c.s, &op, NULL)) TH_LOG("twice the same");
	x[0] = (struct pmskb_ext) { d[0].token, 0, 11, 0 };
	x[1] = (struct pmskb_ext) { d[0].token, 10, 10, 0 };
	EXPECT_EQ(-EINVAL, persist_one(self->c.s, &op, NULL)) TH_LOG("by a byte");
	x[0] = (struct pmskb_ext) { d[0].token, 5, 1, 0 };
	x[1] = (struct pmskb_ext) { d[0].token, 0, 20, 0 };
	EXPECT_EQ(-EINVAL, persist_one(self->c.s, &op, NULL)) TH_LOG("inside");
	op.nr_extents = 3;
	x[0] = (struct pmskb_ext) { d[0].token, 0, 10, 0 };
	x[1] = (struct pmskb_ext) { d[0].token, 20, 10, 0 };
	x[2] = (struct pmskb_ext) { d[0].token, 9, 2, 0 };
	EXPECT_EQ(-EINVAL, persist_one(self->c.s, &op, NULL)) TH_LOG("first and third");

	ASSERT_EQ(0, sock_info(self->c.s, &si));
	EXPECT_EQ(n, si.tokens) TH_LOG("a failed put used tokens");
	/* And touching, in the wrong order, is no overlap. */
	op.nr_extents = 2;
	x[0] = (struct pmskb_ext) { d[0].token, 10, 10, 0 };
	x[1] = (struct pmskb_ext) { d[0].token, 0, 10, 0 };
	EXPECT_LT(0, persist_one(self->c.s, &op, NULL));
}

TEST_F(persist, a_key_too_long_is_enametoolong_and_a_list_too_long_e2big)
{
	static char key[PMSKB_MAX_KEY + 1], buf[PMSKB_MAX_KEY + 1];
	struct pmskb_op op = op_put(key, PMSKB_MAX_KEY + 1, NULL, 0);
	struct pmskb_ext x[64];
	int n, k;

	EXPECT_EQ(-ENAMETOOLONG, persist_one(self->c.s, &op, NULL));
	op.key_len = ~0U;
	EXPECT_EQ(-ENAMETOOLONG, persist_one(self->c.s, &op, NULL));
	n = receive(_metadata, &self->c, buf, sizeof(buf), 57);
	k = exts_part(x, d, n, 0, sizeof(buf));
	ASSERT_LT(0, k);
	op = op_put(x, k, NULL, 0);
	op.flags = PMSKB_OP_KEY_EXTENTS;
	EXPECT_EQ(-ENAMETOOLONG, persist_one(self->c.s, &op, NULL));
	op.key_len = ~0U;
	EXPECT_GT(0, persist_one(self->c.s, &op, NULL)) TH_LOG("four thousand million elements");
	k = exts_part(x, d, n, 1, PMSKB_MAX_KEY);
	ASSERT_LT(0, k);
	op = op_put(x, k, NULL, 0);
	op.flags = PMSKB_OP_KEY_EXTENTS;
	EXPECT_EQ(1, persist_one(self->c.s, &op, NULL)) TH_LOG("just long enough");

	op = op_put("k", 1, e, PMSKB_MAX_EXTENTS + 1);
	EXPECT_EQ(-E2BIG, persist_one(self->c.s, &op, NULL));
	op = op_put("k", 1, e, ~0U);
	EXPECT_EQ(-E2BIG, persist_one(self->c.s, &op, NULL));
}

TEST_F(persist, tokens_that_are_not_held_are_estale)
{
	struct pmskb_desc theirs[8];
	struct pmskb_ext x[2];
	static char buf[100];
	struct conn other;
	struct pmskb_op op;
	int n;

	ASSERT_EQ(0, conn_make(&other, &self->net, self->s.fd, variant->how));
	ASSERT_EQ(0, sock_mode(other.s, PMSKB_RX_DESC));
	ASSERT_EQ(0, send_all(other.c, "theirs", 6));
	ASSERT_EQ(1, desc_recv_bytes(other.s, theirs, 8, 6));
	/* No token yet at all. */
	x[0] = ext_of(&theirs[0]);
	op = op_put("k", 1, x, 1);
	EXPECT_EQ(-ESTALE, persist_one(self->c.s, &op, NULL)) TH_LOG("foreign");
	n = receive(_metadata, &self->c, buf, sizeof(buf), 58);
	x[0] = e[0], x[0].token += 1000;
	EXPECT_EQ(-ESTALE, persist_one(self->c.s, &op, NULL)) TH_LOG("never given out");
	/* A good one and a bad one: the good one is not used up. */
	x[0] = e[0];
	x[1] = (struct pmskb_ext) { e[0].token + 1000, 0, 1, 0 };
	op.nr_extents = 2;
	EXPECT_EQ(-ESTALE, persist_one(self->c.s, &op, NULL)) TH_LOG("one of two");
	ASSERT_EQ(0, desc_release(self->c.s, d[0].token, 1));
	op.nr_extents = 1;
	EXPECT_EQ(-ESTALE, persist_one(self->c.s, &op, NULL)) TH_LOG("released");
	op.flags = PMSKB_OP_KEY_EXTENTS;
	op.key = PTR(x), op.key_len = 1, op.nr_extents = 0;
	EXPECT_EQ(-ESTALE, persist_one(self->c.s, &op, NULL)) TH_LOG("in the key");
	if (n > 1)
		desc_release_all(self->c.s, d + 1, n - 1);
	conn_close(&other);
}

TEST_F(persist, bad_pointers_are_efault_before_anything_is_done)
{
	uint8_t *page = mmap(NULL, 3 * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	struct pmskb_store_info info;
	struct pmskb_sock_info si;
	struct pmskb_result r, *rp;
	struct pmskb_op op, *opp;
	static char buf[100];
	struct pmskb_ext *xp;
	int n;

	ASSERT_NE(MAP_FAILED, page);
	ASSERT_EQ(0, munmap(page + 4096, 4096));
	n = receive(_metadata, &self->c, buf, sizeof(buf), 59);
	op = op_put("k", 1, e, n);

	EXPECT_EQ(-EFAULT, persist(self->c.s, BAD_PTR, &r, 1)) TH_LOG("operations");
	EXPECT_EQ(-EFAULT, persist(self->c.s, &op, BAD_PTR, 1)) TH_LOG("results");
	EXPECT_EQ(-EFAULT, persist(self->c.s, &op, NULL, 1)) TH_LOG("results");
	EXPECT_EQ(-EFAULT, persist(self->c.s, &op, (void *)0xffff888000000000UL, 1)) TH_LOG("results in the kernel");
	EXPECT_EQ(-EFAULT, submit(self->s.fd, (void *)0xffff888000000000UL, &r, 1)) TH_LOG("operations in the kernel");
	/* The array runs into the hole. */
	opp = (void *)(page + 4096 - sizeof(op));
	*opp = op;
	EXPECT_EQ(-EFAULT, persist(self->c.s, opp, (void *)(page + 8192), 2)) TH_LOG("second operation");
	rp = (void *)(page + 4096 - sizeof(r));
	{
		struct pmskb_op two[2] = { op, op_put("l", 1, NULL, 0) };

		EXPECT_EQ(-EFAULT, persist(self->c.s, two, rp, 2)) TH_LOG("second result");
	}
	/* Results that can be read only. */
	ASSERT_EQ(0, mprotect(page, 4096, PROT_READ));
	EXPECT_EQ(-EFAULT, persist(self->c.s, &op, (void *)page, 1)) TH_LOG("read-only results");
	ASSERT_EQ(0, mprotect(page, 4096, PROT_READ | PROT_WRITE));

	ASSERT_EQ(0, store_info(&self->s, &info));
	EXPECT_EQ(0, info.records) TH_LOG("something was done");
	ASSERT_EQ(0, sock_info(self->c.s, &si));
	EXPECT_EQ(n, si.tokens);

	/* What an operation points to is its own affair. */
	op = op_put(BAD_PTR, 1, e, n);
	EXPECT_EQ(-EFAULT, persist_one(self->c.s, &op, NULL)) TH_LOG("key");
	op = op_put("k", 1, BAD_PTR, 1);
	EXPECT_EQ(-EFAULT, persist_one(self->c.s, &op, NULL)) TH_LOG("extents");
	op = op_put(BAD_PTR, 1, e, n);
	op.flags = PMSKB_OP_KEY_EXTENTS;
	EXPECT_EQ(-EFAULT, persist_one(self->c.s, &op, NULL)) TH_LOG("key's extents");
	xp = (void *)(page + 4096 - sizeof(*xp));
	*xp = e[0];
	op = op_put("k", 1, xp, 2);
	EXPECT_EQ(-EFAULT, persist_one(self->c.s, &op, NULL)) TH_LOG("second extent");
	op = op_put(page + 4096 - 10, 11, e, n);
	EXPECT_EQ(-EFAULT, persist_one(self->c.s, &op, NULL)) TH_LOG("key's last byte");
	ASSERT_EQ(0, store_info(&self->s, &info));
	EXPECT_EQ(0, info.records);
	op = op_put("k", 1, e, n);
	EXPECT_EQ(1, persist_one(self->c.s, &op, NULL)) TH_LOG("after all that");
}

TEST_F(persist, reserved_fields_and_flags_of_a_submit_are_einval)
{
	struct pmskb_op op = op_put("k", 1, NULL, 0);
	struct pmskb_result r;
	struct pmskb_submit s = { .ops = PTR(&op), .results = PTR(&r), .nr = 1 };

	s.flags = PMSKB_SUBMIT_FAIL << 1;
	EXPECT_EQ(EINVAL, ERRNO(setsockopt(self->c.s, SOL_PMSKB, PMSKB_PERSIST, &s, sizeof(s))));
	EXPECT_EQ(EINVAL, ERRNO(ioctl(self->s.fd, PMSKB_IOC_SUBMIT, &s)));
	s.flags = 0;
	s.reserved = 1;
	EXPECT_EQ(EINVAL, ERRNO(setsockopt(self->c.s, SOL_PMSKB, PMSKB_PERSIST, &s, sizeof(s))));
	EXPECT_EQ(EINVAL, ERRNO(ioctl(self->s.fd, PMSKB_IOC_SUBMIT, &s)));
}

/* ---- the store's ioctl ---- */

TEST_F(persist, one_array_takes_operations_of_several_sockets)
{
	enum { NR = 8 };
	static struct pmskb_ext x[NR][8];
	static char buf[NR][300];
	struct pmskb_result r[NR];
	struct pmskb_op op[NR];
	struct pmskb_desc dd[8];
	struct object o[NR];
	struct conn c[NR];
	int i, n;

	for (i = 0; i < NR; i++) {
		ASSERT_EQ(0, conn_make(&c[i], &self->net, self->s.fd, variant->how));
		ASSERT_EQ(0, sock_mode(c[i].s, PMSKB_RX_DESC));
		fill(buf[i], 300, 60 + i, 0);
		ASSERT_EQ(0, send_all(c[i].c, buf[i], 300));
		n = desc_recv_bytes(c[i].s, dd, 8, 300);
		ASSERT_LT(0, n);
		exts_of(x[i], dd, n);
		op[i] = op_put(&"ABCDEFGH"[i], 1, x[i], n);
		op[i].fd = c[i].s;
		o[i] = (struct object) { i + 1, &"ABCDEFGH"[i], 1, buf[i], 300 };
	}
	ASSERT_EQ(0, submit(self->s.fd, op, r, NR));
	for (i = 0; i < NR; i++) {
		EXPECT_EQ(i + 1, r[i].res);
		EXPECT_EQ(rfc1071(buf[i], 300), r[i].csum);
		conn_close(&c[i]);
	}
	store_holds(_metadata, &self->s, &self->c, variant->dev, o, NR);
}

TEST_F(persist, a_submit_names_a_socket_of_this_store)
{
	struct pmskb_op op, ok;
	struct pmskb_result r;
	static char buf[10];
	struct conn plain;
	int n;

	n = receive(_metadata, &self->c, buf, sizeof(buf), 61);
	ok = op_put("k", 1, e, n);
	op = ok, op.fd = 1000;
	ASSERT_EQ(0, submit(self->s.fd, &op, &r, 1));
	EXPECT_EQ(-EBADF, r.res);
	op = ok, op.fd = -1;
	ASSERT_EQ(0, submit(self->s.fd, &op, &r, 1));
	EXPECT_EQ(-EBADF, r.res) TH_LOG("extents, and no socket");
	op = ok, op.fd = self->s.fd;
	ASSERT_EQ(0, submit(self->s.fd, &op, &r, 1));
	EXPECT_EQ(-ENOTSOCK, r.res);
	ASSERT_EQ(0, conn_make(&plain, &self->net, -1, HOW_PLAIN));
	ASSERT_EQ(0, sock_ulp(plain.s));
	op = ok, op.fd = plain.s;
	ASSERT_EQ(0, submit(self->s.fd, &op, &r, 1));
	EXPECT_EQ(-EUNATCH, r.res) TH_LOG("the ULP and no store");
	conn_close(&plain);
	ASSERT_EQ(0, conn_make(&plain, &self->net, -1, HOW_PLAIN));
	op = ok, op.fd = plain.s;
	ASSERT_EQ(0, submit(self->s.fd, &op, &r, 1));
	EXPECT_EQ(-EUNATCH, r.res) TH_LOG("not even the ULP");
	conn_close(&plain);
	/* Without extents no socket is needed. */
	op = op_put("nothing", 7, NULL, 0);
	ASSERT_EQ(0, submit(self->s.fd, &op, &r, 1));
	EXPECT_EQ(1, r.res);
	op = ok, op.fd = self->c.s;
	ASSERT_EQ(0, submit(self->s.fd, &op, &r, 1));
	EXPECT_EQ(2, r.res);
}

TEST_F(persist, a_socket_of_another_store_is_exdev)
{
	struct pmskb_op op;
	struct pmskb_result r;
	static char buf[10];
	struct store other;
	const char *why;
	int n, err;

	if (!dev_path(!variant->dev, &why))
		SKIP(return, "there is no second device");
	err = store_make(&other, !variant->dev, 0, 0);
	ASSERT_EQ(0, err);
	n = receive(_metadata, &self->c, buf, sizeof(buf), 62);
	op = op_put("k", 1, e, n);
	op.fd = self->c.s;
	ASSERT_EQ(0, submit(other.fd, &op, &r, 1));
	EXPECT_EQ(-EXDEV, r.res);
	ASSERT_EQ(0, submit(self->s.fd, &op, &r, 1));
	EXPECT_EQ(1, r.res);
	EXPECT_EQ(0, store_close(&other));
}

TEST_F_TIMEOUT(persist, many_processes_persist_at_once, 120)
{
	enum { NR = 4, EACH = 40 };
	pid_t pid[NR];
	struct pmskb_store_info info;
	int i, k, st, n;

	for (i = 0; i < NR; i++) {
		pid[i] = fork();
		if (pid[i])
			continue;
		for (k = 0; k < EACH; k++) {
			static char buf[3000];
			struct conn c;
			struct pmskb_op op;
			char key[32];

			if (conn_make(&c, &self->net, self->s.fd, variant->how) || sock_mode(c.s, PMSKB_RX_DESC))
				_exit(1);
			fill(buf, sizeof(buf), i * 1000 + k, 0);
			if (send_all(c.c, buf, sizeof(buf)))
				_exit(2);
			n = desc_recv_bytes(c.s, d, MAX_DESC, sizeof(buf));
			if (n <= 0)
				_exit(3);
			exts_of(e, d, n);
			/* Half of the keys are fought over. */
			if (k & 1)
				sprintf(key, "%d-%d", i, k);
			else
				sprintf(key, "all-%d", k);
			op = op_put(key, strlen(key), e, n);
			if (persist_one(c.s, &op, NULL) < 1)
				_exit(4);
			conn_close(&c);
		}
		_exit(0);
	}
	for (i = 0; i < NR; i++) {
		ASSERT_EQ(pid[i], waitpid(pid[i], &st, 0));
		EXPECT_EQ(0, st) TH_LOG("exit %d", WEXITSTATUS(st));
	}
	conn_close(&self->c);
	for (i = 0; i < 2; i++) {
		ASSERT_EQ(0, store_info(&self->s, &info));
		EXPECT_EQ(NR * EACH / 2 + EACH / 2, info.records);
		EXPECT_EQ(info.records, media_scan(self->s.map, self->s.map_len, NULL, NULL));
		EXPECT_LE(NR * EACH, info.durable_seq);
		if (!i) {
			ASSERT_EQ(0, store_close(&self->s));
			ASSERT_EQ(0, store_open(&self->s, variant->dev));
		}
	}
}

/* ---- full ---- */

FIXTURE(full) {
	struct store s;
	struct conn c;
};

FIXTURE_SETUP(full)
{
	struct net net = { AF_INET, LINK_LO };
	const char *why;
	uint64_t len;

	if (!dev_path(DEV_PMEM, &why))
		SKIP(return, "%s", why);
	ASSERT_EQ(0, store_make(&self->s, DEV_PMEM, 0, 0));
	len = self->s.info.region_len;
	ASSERT_EQ(0, store_close(&self->s));
	ASSERT_EQ(0, store_make(&self->s, DEV_PMEM, 0, ((len >> 20) - 12) << 20));
	ASSERT_GT(4096, self->s.info.frames_total);
	ASSERT_EQ(0, conn_make(&self->c, &net, self->s.fd, HOW_ACCEPTED_IOCTL));
	ASSERT_EQ(0, sock_mode(self->c.s, PMSKB_RX_DESC));
}

FIXTURE_TEARDOWN(full)
{
	conn_close(&self->c);
	EXPECT_EQ(0, store_close(&self->s));
}

static int check_stream(struct record *r, void *arg)
{
	unsigned int k;

	if (r->len && (sscanf((char *)r->key, "key-%u", &k) != 1 || differs(r->bytes, r->len, 70, (uint64_t)k * r->len) >= 0))
		++*(int *)arg;
	return 0;
}

TEST_F_TIMEOUT(full, a_full_store_is_enospc_keeps_what_it_has_and_goes_on, 240)
{
	enum { LEN = 50000 };
	struct pmskb_store_info info;
	struct pmskb_result r;
	static char buf[LEN];
	uint64_t records = 0;
	struct pmskb_op op;
	int n = 0, bad = 0, k, enospc = 0;
	int64_t res = 0;
	char key[32];

	/* With data, until there are no frames for it. */
	for (k = 0; k < 1000; k++) {
		fill(buf, LEN, 70, (uint64_t)k * LEN);
		ASSERT_EQ(0, send_all(self->c.c, buf, LEN));
		n = desc_recv_bytes(self->c.s, d, MAX_DESC, LEN);
		if (n < 0)
			break;
		exts_of(e, d, n);
		memset(key, 0, sizeof(key));
		op = op_put(key, sprintf(key, "key-%u", k), e, n);
		res = persist_one(self->c.s, &op, NULL);
		if (res < 0)
			break;
		records++;
	}
	ASSERT_GT(1000, k);
	EXPECT_TRUE(n == -ENOBUFS || res == -ENOSPC) TH_LOG("receive %d, put %ld", n, (long)res);
	EXPECT_LE(100, records) TH_LOG("5 of 8 MiB at the very least");
	enospc = res == -ENOSPC;
	/* Records without data, until there is no room for those. */
	for (k = 0; k < 20000 && !enospc; k++) {
		op = op_put(key, sprintf(key, "empty-%u", k), NULL, 0);
		res = submit(self->s.fd, &op, &r, 1) ?: r.res;
		if (res < 0)
			break;
		records++;
	}
	EXPECT_EQ(-ENOSPC, res);
	ASSERT_EQ(0, store_info(&self->s, &info));
	EXPECT_EQ(records, info.records);
	EXPECT_EQ(records, media_scan(self->s.map, self->s.map_len, check_stream, &bad));
	EXPECT_EQ(0, bad);

	/* Service goes on: byte mode needs no frames. */
	{
		struct net net = { AF_INET, LINK_LO };
		struct conn c;

		ASSERT_EQ(0, conn_make(&c, &net, self->s.fd, HOW_ACCEPTED_IOCTL));
		for (k = 0; k < 20; k++) {
			fill(buf, LEN, 71, (uint64_t)k * LEN);
			ASSERT_EQ(0, send_all(c.c, buf, LEN));
			memset(buf, 0, LEN);
			ASSERT_EQ(0, recv_all(c.s, buf, LEN));
			ASSERT_EQ(-1, differs(buf, LEN, 71, (uint64_t)k * LEN));
		}
		conn_close(&c);
	}
	/* And a full store can be attached. */
	conn_close(&self->c);
	ASSERT_EQ(0, store_close(&self->s));
	ASSERT_EQ(0, store_open(&self->s, DEV_PMEM));
	ASSERT_EQ(0, store_info(&self->s, &info));
	EXPECT_EQ(records, info.records);
	EXPECT_EQ(records, media_scan(self->s.map, self->s.map_len, check_stream, &bad));
	EXPECT_EQ(0, bad);
}

TEST_HARNESS_MAIN
