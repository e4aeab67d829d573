// SPDX-License-Identifier: GPL-2.0
/*
 * Promises about arrays of operations: conditions, several on one key, all or
 * nothing, truncation, several stores, several writers.
 */
#include "common.h"
#include "media.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <sys/ioctl.h>
#include <time.h>

#include "harness.h"
#include "objects.h"

#define ERRNO(call) ((call) < 0 ? errno : 0)

FIXTURE(ops) {
	struct store s;
	struct conn c;
	struct way way;
};

FIXTURE_VARIANT(ops) {
	enum dev dev;
	bool ioctl;
};

FIXTURE_VARIANT_ADD(ops, persist_pmem) { DEV_PMEM, false };
FIXTURE_VARIANT_ADD(ops, submit_dax) { DEV_DAX, true };

FIXTURE_SETUP(ops)
{
	struct net net = { AF_INET, LINK_LO };
	const char *why;

	if (!dev_path(variant->dev, &why))
		SKIP(return, "%s", why);
	ASSERT_EQ(0, store_make(&self->s, variant->dev, 0, 0));
	ASSERT_EQ(0, conn_make(&self->c, &net, self->s.fd, HOW_ACCEPTED_IOCTL));
	ASSERT_EQ(0, sock_mode(self->c.s, PMSKB_RX_DESC));
	self->way = (struct way) { self->s.fd, self->c.s, variant->ioctl };
}

FIXTURE_TEARDOWN(ops)
{
	struct pmskb_store_info info;

	conn_close(&self->c);
	EXPECT_EQ(0, store_quiet(&self->s, 5000, &info)) TH_LOG("frames are left behind");
	EXPECT_EQ(0, info.frames_held);
	EXPECT_EQ(0, store_close(&self->s));
}

/* ---- conditions ---- */

TEST_F(ops, a_condition_on_the_sequence_number_is_compare_and_set)
{
	struct pmskb_op put = op_put("k", 1, NULL, 0), del = op_delete("k", 1), op;
	struct way *w = &self->way;
	struct pmskb_sock_info si;
	struct pmskb_result r;
	static char buf[100];
	struct object o;
	int n;

	put.flags = del.flags = PMSKB_OP_IF_SEQ;
	put.seq = 1;
	EXPECT_EQ(-ESTALE, way_one(w, put, NULL)) TH_LOG("there is none");
	EXPECT_EQ(-ENOENT, way_one(w, del, NULL));
	put.seq = 0;
	EXPECT_EQ(1, way_one(w, put, &r));
	EXPECT_EQ(0, r.flags);
	EXPECT_EQ(-ESTALE, way_one(w, put, NULL)) TH_LOG("there is one");
	put.seq = 2;
	EXPECT_EQ(-ESTALE, way_one(w, put, NULL)) TH_LOG("too high");
	put.seq = 1;
	EXPECT_EQ(2, way_one(w, put, &r));
	EXPECT_EQ(PMSKB_RES_REPLACED, r.flags);
	EXPECT_EQ(-ESTALE, way_one(w, put, NULL)) TH_LOG("too low: it was replaced");
	/* Together with the other conditions. */
	op = put, op.flags |= PMSKB_OP_CREATE, op.seq = 2;
	EXPECT_EQ(-EEXIST, way_one(w, op, NULL));
	op = put, op.flags |= PMSKB_OP_REPLACE, op.seq = 2;
	EXPECT_EQ(3, way_one(w, op, NULL));
	del.seq = 2;
	EXPECT_EQ(-ESTALE, way_one(w, del, NULL));
	del.seq = 0;
	EXPECT_EQ(-ESTALE, way_one(w, del, NULL)) TH_LOG("only if there is none, and there is one");
	del.seq = 3;
	EXPECT_EQ(3, way_one(w, del, NULL)) TH_LOG("the number of what was removed");
	EXPECT_EQ(-ENOENT, way_one(w, del, NULL));
	op = put, op.flags |= PMSKB_OP_REPLACE, op.seq = 0;
	EXPECT_EQ(-ENOENT, way_one(w, op, NULL));
	op = put, op.flags |= PMSKB_OP_CREATE, op.seq = 0;
	EXPECT_EQ(4, way_one(w, op, NULL));
	/* Without a key there is nothing to compare; without the flag no use for a number. */
	op = put, op.key_len = 0;
	EXPECT_EQ(-EINVAL, way_one(w, op, NULL));
	op = put, op.flags = 0, op.seq = 4;
	EXPECT_EQ(-EINVAL, way_one(w, op, NULL));
	op = del, op.flags = 0, op.seq = 4;
	EXPECT_EQ(-EINVAL, way_one(w, op, NULL));
	/* What a refused put names is not used up. */
	n = receive(_metadata, &self->c, buf, sizeof(buf), 1);
	op = op_put("k", 1, e, n);
	op.flags = PMSKB_OP_IF_SEQ;
	op.seq = 3;
	EXPECT_EQ(-ESTALE, way_one(w, op, NULL));
	ASSERT_EQ(0, sock_info(self->c.s, &si));
	EXPECT_EQ(n, si.tokens);
	op.seq = 4;
	EXPECT_EQ(5, way_one(w, op, NULL));
	o = (struct object) { 5, "k", 1, buf, sizeof(buf) };
	store_holds(_metadata, &self->s, &self->c, variant->dev, &o, 1);
}

/* ---- several operations on one key ---- */

struct model {
	uint64_t next;		/* sequence number */
	uint64_t has[3];	/* of each key's record, or 0 */
	uint32_t at[3];		/* which part of the bytes */
};

/* What a random operation on one of three keys should answer, done alone. */
static int64_t model_do(struct model *m, const struct pmskb_op *op, int key, uint32_t at, uint32_t *flags)
{
	uint64_t has = m->has[key];

	*flags = 0;
	if (op->opcode == PMSKB_OP_DELETE) {
		if (!has)
			return -ENOENT;
		if (op->flags & PMSKB_OP_IF_SEQ && op->seq != has)
			return -ESTALE;
		m->has[key] = 0;
		return has;
	}
	if (op->flags & PMSKB_OP_CREATE && has)
		return -EEXIST;
	if (op->flags & PMSKB_OP_REPLACE && !has)
		return -ENOENT;
	if (op->flags & PMSKB_OP_IF_SEQ && op->seq != has)
		return -ESTALE;
	*flags = has ? PMSKB_RES_REPLACED : 0;
	m->at[key] = at;
	return m->has[key] = m->next++;
}

TEST_F(ops, several_operations_on_one_key_are_as_if_one_by_one)
{
	enum { NR = 48, ROUNDS = 24, LEN = 4000 };
	static struct pmskb_ext x[NR][4];
	static const char *const names[3] = { "a", "bb", "a longer key that needs more than eight bytes" };
	struct pmskb_store_info before, after;
	struct model m = { .next = 1 };
	struct pmskb_result r[NR];
	struct pmskb_op op[NR];
	int64_t want[NR];
	uint32_t flags[NR];
	static char buf[LEN];
	struct object o[3];
	int round, i, k, n, nr = 0, failed = 0, done = 0;

	srand(1);
	n = receive(_metadata, &self->c, buf, LEN, 2);
	for (round = 0; round < ROUNDS; round++) {
		for (i = 0; i < NR; i++) {
			int key = rand() % 3, at = rand() % (LEN - 80);

			if (rand() % 3) {
				k = exts_part(x[i], d, n, at, 80);
				ASSERT_LT(0, k);
				op[i] = op_put(names[key], strlen(names[key]), x[i], k);
				op[i].flags = PMSKB_OP_KEEP;
				if (rand() % 2)
					op[i].flags |= rand() % 2 ? PMSKB_OP_CREATE : PMSKB_OP_REPLACE;
			} else {
				op[i] = op_delete(names[key], strlen(names[key]));
			}
			if (rand() % 3 == 0) {
				op[i].flags |= PMSKB_OP_IF_SEQ;
				op[i].seq = rand() % 4 ? m.has[key] : rand() % m.next;
			}
			want[i] = model_do(&m, &op[i], key, at, &flags[i]);
		}
		ASSERT_EQ(0, store_info(&self->s, &before));
		ASSERT_EQ(0, way_submit(&self->way, op, r, NR, 0));
		ASSERT_EQ(0, store_info(&self->s, &after));
		for (i = 0; i < NR; i++) {
			ASSERT_EQ(want[i], r[i].res) TH_LOG("round %d, operation %d", round, i);
			ASSERT_EQ(flags[i], r[i].flags) TH_LOG("round %d, operation %d", round, i);
			failed += want[i] < 0;
			done += want[i] >= 0;
		}
		EXPECT_EQ(2, after.fences - before.fences) TH_LOG("round %d", round);
	}
	/* Neither is rare, or this would not have said much. */
	EXPECT_LT(NR * ROUNDS / 5, failed);
	EXPECT_LT(NR * ROUNDS / 5, done);
	ASSERT_EQ(0, desc_release_all(self->c.s, d, n));
	for (i = 0; i < 3; i++) {
		if (m.has[i])
			o[nr++] = (struct object) { m.has[i], names[i], strlen(names[i]), buf + m.at[i], 80 };
	}
	store_holds(_metadata, &self->s, &self->c, variant->dev, o, nr);
}

/* ---- all or nothing ---- */

TEST_F(ops, an_atomic_array_is_done_with_three_fences)
{
	static struct pmskb_ext x[4][16];
	struct pmskb_store_info a, b;
	struct pmskb_sock_info si;
	static char buf[4000], more[100];
	static struct pmskb_desc dd[8];
	struct pmskb_result r[6];
	struct pmskb_op op[6];
	struct object o[3];
	struct pmskb_ext rel;
	int n, i, k, m;

	op[0] = op_put("old", 3, NULL, 0);
	op[1] = op_put("dead", 4, NULL, 0);
	ASSERT_EQ(0, way_submit(&self->way, op, r, 2, 0));
	fill(more, sizeof(more), 4, 0);
	ASSERT_EQ(0, send_all(self->c.c, more, sizeof(more)));
	m = desc_recv_bytes(self->c.s, dd, 8, sizeof(more));
	ASSERT_EQ(1, m);
	n = receive(_metadata, &self->c, buf, sizeof(buf), 3);
	for (i = 0; i < 3; i++) {
		k = exts_part(x[i], d, n, i * 1000, 1000);
		ASSERT_LT(0, k);
		op[i] = op_put(i ? "new" : "old", 3, x[i], k);
	}
	op[2].key_len = 0;
	op[3] = op_delete("dead", 4);
	rel = (struct pmskb_ext) { .token = dd[0].token };
	op[4] = op_release(&rel, 1);
	op[5] = op_put("new", 3, x[0], op[0].nr_extents);
	op[5].flags = PMSKB_OP_REPLACE;
	ASSERT_EQ(0, store_info(&self->s, &a));
	ASSERT_EQ(0, way_submit(&self->way, op, r, 6, PMSKB_SUBMIT_ATOMIC));
	ASSERT_EQ(0, store_info(&self->s, &b));
	EXPECT_EQ(3, r[0].res);
	EXPECT_EQ(PMSKB_RES_REPLACED, r[0].flags);
	EXPECT_EQ(4, r[1].res);
	EXPECT_EQ(5, r[2].res);
	EXPECT_EQ(2, r[3].res);
	EXPECT_EQ(1, r[4].res);
	EXPECT_EQ(6, r[5].res);
	/* The third is after it is durable: the next array may be another CPU's. */
	EXPECT_EQ(3, b.fences - a.fences);
	EXPECT_EQ(1, b.submits - a.submits);
	EXPECT_EQ(6, b.durable_seq);
	ASSERT_EQ(0, sock_info(self->c.s, &si));
	EXPECT_EQ(0, desc_release_all(self->c.s, d, n) == 0 ? 0 : si.tokens) TH_LOG("tokens are left");
	o[0] = (struct object) { 3, "old", 3, buf, 1000 };
	o[1] = (struct object) { 6, "new", 3, buf, 1000 };
	o[2] = (struct object) { 5, "", 0, buf + 2000, 1000 };
	store_holds(_metadata, &self->s, &self->c, variant->dev, o, 3);
}

/* What an operation that fails, and an array that is cancelled, must leave as it is. */
static void same(struct __test_metadata *_metadata, const struct pmskb_store_info *a,
		 const struct pmskb_store_info *b, const char *what)
{
	EXPECT_EQ(a->records, b->records) TH_LOG("%s", what);
	EXPECT_EQ(a->keys, b->keys) TH_LOG("%s", what);
	EXPECT_EQ(a->live_bytes, b->live_bytes) TH_LOG("%s", what);
	EXPECT_EQ(a->record_bytes, b->record_bytes) TH_LOG("%s", what);
	EXPECT_EQ(a->tokens, b->tokens) TH_LOG("%s", what);
	EXPECT_EQ(a->durable_seq, b->durable_seq) TH_LOG("%s", what);
	EXPECT_EQ(a->trunc_seq, b->trunc_seq) TH_LOG("%s", what);
	EXPECT_EQ(a->frames_payload, b->frames_payload) TH_LOG("%s", what);
	EXPECT_EQ(a->frames_list, b->frames_list) TH_LOG("%s", what);
	EXPECT_EQ(a->frames_held, b->frames_held) TH_LOG("%s", what);
	EXPECT_EQ(a->fragmented_bytes, b->fragmented_bytes) TH_LOG("%s", what);
	/* Frames that were made ready for records and the index come back with the next commit. */
	EXPECT_EQ(a->frames_free + a->frames_limbo + a->frames_record + a->frames_index,
		  b->frames_free + b->frames_limbo + b->frames_record + b->frames_index) TH_LOG("%s", what);
}

TEST_F(ops, one_that_fails_takes_an_atomic_array_with_it)
{
	enum { GOOD = 5 };
	static struct pmskb_ext x[GOOD][8], bad_token, rel, none[1];
	struct pmskb_store_info a, b;
	static char buf[3000], more[10];
	struct pmskb_desc dd[4];
	struct pmskb_result r[GOOD + 1];
	struct pmskb_op good[GOOD], op[GOOD + 1];
	struct object o[2];
	int n, i, k, at, j;
	struct {
		const char *what;
		int err;
		struct pmskb_op op;
	} kinds[] = {
		{ "create of what exists", EEXIST, op_put("replaced", 8, NULL, 0) },
		{ "replace of what does not", ENOENT, op_put("bad", 3, NULL, 0) },
		{ "delete of what does not", ENOENT, op_delete("bad", 3) },
		{ "another sequence number", ESTALE, op_put("replaced", 8, NULL, 0) },
		{ "a token that is not held", ESTALE, op_put("bad", 3, &bad_token, 1) },
		{ "an unknown operation", EINVAL, op_put("bad", 3, NULL, 0) },
		{ "a key that is not mapped", EFAULT, op_put(BAD_PTR, 3, NULL, 0) },
		{ "a key too long", ENAMETOOLONG, op_put(buf, PMSKB_MAX_KEY + 1, NULL, 0) },
		{ "truncation", EINVAL, op_truncate(0) },
		{ "release of what is not held", ESTALE, op_release(none, 1) },
	};

	op[0] = op_put("stays", 5, NULL, 0);
	op[1] = op_put("replaced", 8, NULL, 0);
	ASSERT_EQ(0, way_submit(&self->way, op, r, 2, 0));
	ASSERT_EQ(0, send_all(self->c.c, more, sizeof(more)));
	ASSERT_EQ(1, desc_recv_bytes(self->c.s, dd, 4, sizeof(more)));
	n = receive(_metadata, &self->c, buf, sizeof(buf), 5);
	for (i = 0; i < 2; i++) {
		k = exts_part(x[i], d, n, i * 500, 500);
		ASSERT_LT(0, k);
		good[i] = op_put(i ? "made" : "replaced", i ? 4 : 8, x[i], k);
	}
	good[2] = op_delete("stays", 5);
	good[3] = op_put(NULL, 0, NULL, 0);
	rel = (struct pmskb_ext) { .token = dd[0].token };
	good[4] = op_release(&rel, 1);
	bad_token = (struct pmskb_ext) { d[n - 1].token + 1000, 0, 1, 0 };
	none[0] = (struct pmskb_ext) { .token = d[n - 1].token + 1000 };
	kinds[0].op.flags = PMSKB_OP_CREATE;
	kinds[1].op.flags = PMSKB_OP_REPLACE;
	kinds[3].op.flags = PMSKB_OP_IF_SEQ;
	kinds[3].op.seq = 1;
	kinds[5].op.opcode = 99;
	ASSERT_EQ(0, store_info(&self->s, &a));
	for (k = 0; k < (int)ARRAY_LEN(kinds); k++) {
		for (at = 0; at <= GOOD; at += at ? GOOD - 2 : 2) {
			for (i = j = 0; i <= GOOD; i++)
				op[i] = i == at ? kinds[k].op : good[j++];
			memset(r, 0x77, sizeof(r));
			ASSERT_EQ(0, way_submit(&self->way, op, r, GOOD + 1, PMSKB_SUBMIT_ATOMIC));
			for (i = 0; i <= GOOD; i++) {
				EXPECT_EQ(i == at ? -kinds[k].err : -ECANCELED, r[i].res) {
					TH_LOG("operation %d, with %s at %d", i, kinds[k].what, at);
				}
				EXPECT_EQ(0, r[i].flags | r[i].csum | r[i].csum_kind | r[i].reserved);
			}
			ASSERT_EQ(0, store_info(&self->s, &b));
			same(_metadata, &a, &b, kinds[k].what);
		}
	}
	/* Two that fail: each has its own. */
	op[0] = op_put("bad", 3, NULL, 0), op[0].opcode = 99;
	op[1] = op_put("good", 4, NULL, 0);
	op[2] = op_put(BAD_PTR, 3, NULL, 0);
	ASSERT_EQ(0, way_submit(&self->way, op, r, 3, PMSKB_SUBMIT_ATOMIC));
	EXPECT_EQ(-EINVAL, r[0].res);
	EXPECT_EQ(-ECANCELED, r[1].res);
	EXPECT_EQ(-EFAULT, r[2].res);
	/* And now, with none that fails. */
	ASSERT_EQ(0, way_submit(&self->way, good, r, GOOD, PMSKB_SUBMIT_ATOMIC));
	for (i = 0; i < GOOD; i++)
		EXPECT_LE(1, r[i].res) TH_LOG("operation %d", i);
	/* What the others had staged is long gone: one frame is open, one may wait. */
	op[0] = op_delete("made", 4);
	ASSERT_LT(0, way_one(&self->way, op[0], NULL));
	ASSERT_EQ(0, store_info(&self->s, &b));
	EXPECT_GE(3, b.frames_record);
	EXPECT_GE(a.frames_index + 1, b.frames_index);
	o[0] = (struct object) { r[0].res, "replaced", 8, buf, 500 };
	o[1] = (struct object) { r[3].res, "", 0, "", 0 };
	store_holds(_metadata, &self->s, &self->c, variant->dev, o, 2);
}

TEST_F(ops, a_release_does_not_fail_after_the_rest_of_an_atomic_array)
{
	struct pmskb_sock_info si;
	struct pmskb_result r[3];
	struct pmskb_op op[3];
	struct pmskb_ext rel;
	static char buf[64];
	int n;

	/* The token of a put, and twice the same. */
	n = receive(_metadata, &self->c, buf, sizeof(buf), 6);
	ASSERT_EQ(1, n);
	rel = (struct pmskb_ext) { .token = d[0].token };
	op[0] = op_put("k", 1, e, 1);
	op[1] = op_release(&rel, 1);
	op[2] = op_release(&rel, 1);
	ASSERT_EQ(0, way_submit(&self->way, op, r, 3, PMSKB_SUBMIT_ATOMIC));
	if (r[0].res >= 0) {
		EXPECT_LE(0, r[1].res) TH_LOG("the put was done");
		EXPECT_LE(0, r[2].res) TH_LOG("the put was done");
	} else {
		EXPECT_GT(0, r[1].res);
		EXPECT_GT(0, r[2].res);
	}
	ASSERT_EQ(0, sock_info(self->c.s, &si));
	EXPECT_EQ(r[0].res >= 0 ? 0 : 1, si.tokens);
}

TEST_F_TIMEOUT(ops, an_atomic_array_has_up_to_1024_operations, 60)
{
	static struct pmskb_result r[PMSKB_MAX_OPS];
	static struct pmskb_op op[PMSKB_MAX_OPS];
	static struct object o[PMSKB_MAX_OPS];
	static char keys[PMSKB_MAX_OPS][8], buf[2 * PMSKB_MAX_OPS];
	static struct pmskb_ext p[PMSKB_MAX_OPS];
	struct pmskb_store_info a, b;
	int n, i, round, half = PMSKB_MAX_OPS / 2;

	n = receive(_metadata, &self->c, buf, sizeof(buf), 7);
	for (i = 0; i < PMSKB_MAX_OPS; i++) {
		sprintf(keys[i], "%d", i);
		ASSERT_EQ(1, exts_part(&p[i], d, n, 2 * i, 2));
	}
	/* All new; all replaced; a half of each. */
	for (round = 0; round < 3; round++) {
		for (i = 0; i < PMSKB_MAX_OPS; i++) {
			op[i] = op_put(keys[i], strlen(keys[i]), &p[i], 1);
			op[i].flags = PMSKB_OP_KEEP | (round ? PMSKB_OP_REPLACE : PMSKB_OP_CREATE);
			if (round == 2 && i & 1)
				op[i] = op_delete(keys[i], strlen(keys[i]));
		}
		ASSERT_EQ(0, store_info(&self->s, &a));
		ASSERT_EQ(0, way_submit(&self->way, op, r, PMSKB_MAX_OPS, PMSKB_SUBMIT_ATOMIC));
		ASSERT_EQ(0, store_info(&self->s, &b));
		for (i = 0; i < PMSKB_MAX_OPS; i++) {
			uint64_t want = round * PMSKB_MAX_OPS + i + 1;

			if (round == 2)
				want = i & 1 ? want - PMSKB_MAX_OPS : 2 * PMSKB_MAX_OPS + i / 2 + 1;
			ASSERT_EQ(want, r[i].res) TH_LOG("round %d, operation %d", round, i);
			if (round == 2 && !(i & 1))
				o[i / 2] = (struct object) { want, keys[i], strlen(keys[i]), buf + 2 * i, 2 };
		}
		EXPECT_EQ(3, b.fences - a.fences);
	}
	/* The last of so many fails: then nothing was done. */
	ASSERT_EQ(0, store_info(&self->s, &a));
	for (i = 0; i < PMSKB_MAX_OPS; i++)
		op[i] = op_put(keys[i], strlen(keys[i]), NULL, 0);
	op[i - 1].flags = PMSKB_OP_REPLACE;
	ASSERT_EQ(0, way_submit(&self->way, op, r, PMSKB_MAX_OPS, PMSKB_SUBMIT_ATOMIC));
	EXPECT_EQ(-ENOENT, r[i - 1].res);
	EXPECT_EQ(-ECANCELED, r[0].res);
	ASSERT_EQ(0, store_info(&self->s, &b));
	same(_metadata, &a, &b, "1024 cancelled");
	ASSERT_EQ(o[0].seq, way_one(&self->way, op_delete(keys[0], 1), NULL));
	ASSERT_EQ(0, store_info(&self->s, &b));
	EXPECT_GE(a.frames_index + 1, b.frames_index);
	EXPECT_GE(a.frames_record + 1, b.frames_record);
	ASSERT_EQ(0, desc_release_all(self->c.s, d, n));
	store_holds(_metadata, &self->s, &self->c, variant->dev, o + 1, half - 1);
}

TEST_F(ops, unknown_flags_of_a_submit_are_einval)
{
	struct pmskb_op op = op_put("k", 1, NULL, 0);
	struct pmskb_store_info info;
	struct pmskb_result r;
	int bit;

	for (bit = 0; bit < 32; bit++) {
		if (1U << bit & (PMSKB_SUBMIT_ATOMIC | PMSKB_SUBMIT_FAIL))
			continue;
		EXPECT_EQ(-EINVAL, way_submit(&self->way, &op, &r, 1, 1U << bit));
		EXPECT_EQ(-EINVAL, way_submit(&self->way, &op, &r, 1, 1U << bit | PMSKB_SUBMIT_ATOMIC));
	}
	ASSERT_EQ(0, store_info(&self->s, &info));
	EXPECT_EQ(0, info.records);
	EXPECT_EQ(0, info.durable_seq);
}

/* ---- readers of the mapping ---- */

enum { HALF = 6 };

struct looker {
	const uint8_t *map;
	size_t len;
	bool use_word;
	volatile bool stop;
	unsigned long whole, torn, odd;
	int error;
};

/* Looks at all keys: one half is there, with numbers that follow each other, or it is torn. */
static bool look(struct looker *l)
{
	uint64_t seq[2 * HALF];
	struct hit hit;
	int i, n[2] = { 0, 0 }, half, got;
	char key[8];

	for (i = 0; i < 2 * HALF; i++) {
		seq[i] = 0;
		got = map_get(l->map, l->len, key, sprintf(key, "key-%d", i), &hit);
		if (got < 0) {
			l->error = got;
			return false;
		}
		if (got)
			seq[i] = hit.seq;
		n[i / HALF] += got;
	}
	half = n[1] > n[0];
	if (n[half] != HALF || n[!half])
		return false;
	for (i = 1; i < HALF; i++) {
		if (seq[half * HALF + i] != seq[half * HALF] + i)
			return false;
	}
	return true;
}

static void *looks(void *arg)
{
	struct looker *l = arg;

	while (!l->stop) {
		uint64_t before = map_snapshot(l->map);
		bool whole;

		if (l->use_word && before & 1) {
			l->odd++;
			continue;
		}
		whole = look(l);
		if (l->use_word && map_snapshot(l->map) != before) {
			l->odd++;
			continue;
		}
		if (whole)
			l->whole++;
		else
			l->torn++;
	}
	return NULL;
}

TEST_F_TIMEOUT(ops, readers_see_all_of_a_batch_or_nothing, 60)
{
	struct looker l[2] = { { self->s.map, self->s.map_len, true }, { self->s.map, self->s.map_len, false } };
	struct pmskb_result r[2 * HALF];
	struct pmskb_op op[2 * HALF];
	static char keys[2 * HALF][8];
	pthread_t thread[2];
	struct timespec start, now;
	int i, round;

	clock_gettime(CLOCK_MONOTONIC, &start);
	for (round = 0;; round++) {
		for (i = 0; i < 2 * HALF; i++) {
			sprintf(keys[i], "key-%d", i);
			/* One half comes, the other one goes. */
			if (i / HALF == round % 2)
				op[i] = op_put(keys[i], strlen(keys[i]), NULL, 0);
			else
				op[i] = op_delete(keys[i], strlen(keys[i]));
		}
		ASSERT_EQ(0, way_submit(&self->way, op, r, round ? 2 * HALF : HALF, PMSKB_SUBMIT_ATOMIC));
		for (i = 0; i < (round ? 2 * HALF : HALF); i++)
			ASSERT_LT(0, r[i].res) TH_LOG("round %d, operation %d", round, i);
		if (!round) {
			ASSERT_EQ(0, pthread_create(&thread[0], NULL, looks, &l[0]));
			ASSERT_EQ(0, pthread_create(&thread[1], NULL, looks, &l[1]));
		}
		/* Until both kinds were seen, but not for ever. */
		clock_gettime(CLOCK_MONOTONIC, &now);
		if ((round > 200 && l[0].whole > 500 && l[1].torn && l[0].odd) || now.tv_sec - start.tv_sec > 20)
			break;
		if (round % 4 == 0)
			usleep(200);
	}
	l[0].stop = l[1].stop = true;
	pthread_join(thread[0], NULL);
	pthread_join(thread[1], NULL);
	TH_LOG("%d batches; with the word %lu whole, %lu torn, %lu put off; without %lu whole, %lu torn", round,
	       l[0].whole, l[0].torn, l[0].odd, l[1].whole, l[1].torn);
	EXPECT_EQ(0, l[0].torn);
	EXPECT_LT(500, l[0].whole);
	EXPECT_LT(0, l[0].odd) TH_LOG("no batch came in between, so this has shown nothing");
	EXPECT_LT(0, l[1].torn) TH_LOG("without the word nothing was torn, so this has shown nothing");
	EXPECT_EQ(0, l[0].error);
	EXPECT_EQ(0, l[1].error);
}

/* ---- truncation ---- */

TEST_F(ops, truncation_removes_the_log_and_gives_its_space_back)
{
	enum { NR = 40, LEN = 3000 };
	static char buf[NR * LEN];
	static struct pmskb_ext x[16];
	struct pmskb_store_info a, b, c;
	struct way *w = &self->way;
	struct object o[NR];
	struct pmskb_op op;
	int n, i, k, nr = 0;

	n = receive(_metadata, &self->c, buf, sizeof(buf), 8);
	for (i = 0; i < NR; i++) {
		k = exts_part(x, d, n, i * LEN, LEN);
		ASSERT_LT(0, k);
		/* Each fourth has a key. */
		op = op_put(i % 4 ? NULL : &buf[i * LEN], i % 4 ? 0 : 8, x, k);
		op.flags = PMSKB_OP_KEEP;
		ASSERT_EQ(i + 1, way_one(w, op, NULL));
	}
	ASSERT_EQ(0, desc_release_all(self->c.s, d, n));
	ASSERT_EQ(0, store_quiet(&self->s, 5000, &a));
	EXPECT_EQ(NULL, info_wrong(&a, 0, false)) TH_LOG("%s", info_wrong(&a, 0, false));
	EXPECT_EQ(NR, a.records);

	EXPECT_EQ(24, way_one(w, op_truncate(24), NULL));
	ASSERT_EQ(0, store_info(&self->s, &b));
	EXPECT_EQ(24, b.trunc_seq);
	EXPECT_EQ(NR - 18, b.records) TH_LOG("those with a key stay");
	EXPECT_EQ(NR / 4, b.keys);
	EXPECT_EQ((NR - 18) * LEN, b.live_bytes);
	EXPECT_GT(a.frames_payload, b.frames_payload);
	EXPECT_EQ(NULL, info_wrong(&b, 0, false)) TH_LOG("%s", info_wrong(&b, 0, false));
	/* Again, and less: nothing, for no fence. */
	EXPECT_EQ(24, way_one(w, op_truncate(24), NULL));
	EXPECT_EQ(24, way_one(w, op_truncate(3), NULL));
	EXPECT_EQ(24, way_one(w, op_truncate(0), NULL));
	ASSERT_EQ(0, store_info(&self->s, &c));
	EXPECT_EQ(b.records, c.records);
	EXPECT_EQ(b.fences, c.fences);
	for (i = 0; i < NR; i++) {
		if (i >= 24 || i % 4 == 0)
			o[nr++] = (struct object) { i + 1, i % 4 ? "" : &buf[i * LEN], i % 4 ? 0 : 8, buf + i * LEN, LEN };
	}
	store_holds(_metadata, &self->s, &self->c, variant->dev, o, nr);
	ASSERT_EQ(0, store_info(&self->s, &c));
	EXPECT_EQ(24, c.trunc_seq) TH_LOG("after a new attach");
	EXPECT_EQ(b.frames_payload, c.frames_payload);
}

TEST_F(ops, truncation_ends_where_the_log_does)
{
	struct way w = self->way;
	struct pmskb_store_info info;
	struct pmskb_result r[4];
	struct pmskb_op op[4];
	struct object o[3];
	struct net net = { AF_INET, LINK_LO };
	int i;

	EXPECT_EQ(0, way_one(&w, op_truncate(7), NULL)) TH_LOG("of an empty store");
	for (i = 0; i < 3; i++)
		ASSERT_EQ(i + 1, way_one(&w, op_put(NULL, 0, NULL, 0), NULL));
	ASSERT_EQ(4, way_one(&w, op_put("key", 3, NULL, 0), NULL));
	/* Beyond the end: of what is there, and not of what is to come. */
	EXPECT_EQ(4, way_one(&w, op_truncate(~0ULL), NULL));
	ASSERT_EQ(0, store_info(&self->s, &info));
	EXPECT_EQ(4, info.trunc_seq);
	EXPECT_EQ(1, info.records);
	ASSERT_EQ(5, way_one(&w, op_put(NULL, 0, NULL, 0), NULL));
	/* In the middle of an array: in its order. */
	op[0] = op_put(NULL, 0, NULL, 0);
	op[1] = op_truncate(~0ULL);
	op[2] = op_put(NULL, 0, NULL, 0);
	op[3] = op_truncate(6);
	ASSERT_EQ(0, way_submit(&w, op, r, 4, 0));
	EXPECT_EQ(6, r[0].res);
	EXPECT_EQ(6, r[1].res);
	EXPECT_EQ(7, r[2].res);
	EXPECT_EQ(6, r[3].res);
	o[0] = (struct object) { 4, "key", 3, "", 0 };
	o[1] = (struct object) { 7, "", 0, "", 0 };
	store_holds(_metadata, &self->s, &self->c, variant->dev, o, 2);
	/* Also when the log is empty: no number is given out again. */
	ASSERT_EQ(0, conn_make(&self->c, &net, self->s.fd, HOW_ACCEPTED_IOCTL));
	w.store = self->s.fd, w.sock = self->c.s;
	EXPECT_EQ(7, way_one(&w, op_truncate(100), NULL));
	store_holds(_metadata, &self->s, &self->c, variant->dev, o, 1);
	ASSERT_EQ(0, conn_make(&self->c, &net, self->s.fd, HOW_ACCEPTED_IOCTL));
	w.store = self->s.fd, w.sock = self->c.s;
	ASSERT_EQ(8, way_one(&w, op_put(NULL, 0, NULL, 0), NULL));
	o[1].seq = 8;
	store_holds(_metadata, &self->s, &self->c, variant->dev, o, 2);
}

TEST_F(ops, a_malformed_truncation_is_einval)
{
	struct pmskb_ext x = { 0 };
	struct pmskb_op op;
	int i;

	ASSERT_EQ(1, way_one(&self->way, op_put(NULL, 0, NULL, 0), NULL));
	op = op_truncate(1), op.key = PTR("k"), op.key_len = 1;
	EXPECT_EQ(-EINVAL, way_one(&self->way, op, NULL)) TH_LOG("key");
	op = op_truncate(1), op.extents = PTR(&x), op.nr_extents = 1;
	EXPECT_EQ(-EINVAL, way_one(&self->way, op, NULL)) TH_LOG("extents");
	for (i = 0; i < 16; i++) {
		op = op_truncate(1), op.flags = 1 << i;
		EXPECT_EQ(-EINVAL, way_one(&self->way, op, NULL)) TH_LOG("flag bit %d", i);
	}
	for (i = 0; i < 3; i++) {
		op = op_truncate(1), op.reserved[i] = 1;
		EXPECT_EQ(-EINVAL, way_one(&self->way, op, NULL)) TH_LOG("reserved[%d]", i);
	}
	EXPECT_EQ(1, media_scan(self->s.map, self->s.map_len, NULL, NULL));
}

/* ---- two stores ---- */

TEST_F(ops, two_stores_keep_apart)
{
	struct net net = { AF_INET, LINK_LO };
	struct pmskb_store_info a, b;
	struct pmskb_result r[3];
	struct pmskb_op op[3];
	static char mine[2000], theirs[2000];
	struct object o, p;
	struct store other;
	const char *why;
	struct conn c;
	int n, i;

	if (!dev_path(!variant->dev, &why))
		SKIP(return, "there is no second device");
	ASSERT_EQ(0, store_make(&other, !variant->dev, 0, 0));
	ASSERT_EQ(0, conn_make(&c, &net, other.fd, HOW_ACCEPTED_IOCTL));
	ASSERT_EQ(0, sock_mode(c.s, PMSKB_RX_DESC));
	n = receive(_metadata, &c, theirs, sizeof(theirs), 9);
	ASSERT_EQ(0, store_info(&self->s, &a));
	/* Tokens of the other store's socket: alone, and in an array that is all or nothing. */
	op[0] = op_put("k", 1, NULL, 0);
	op[1] = op_put("x", 1, e, n);
	op[1].fd = c.s;
	op[2] = op_put("l", 1, NULL, 0);
	ASSERT_EQ(0, submit(self->s.fd, op + 1, r, 1));
	EXPECT_EQ(-EXDEV, r[0].res);
	{
		struct pmskb_submit s = { PTR(op), PTR(r), 3, PMSKB_SUBMIT_ATOMIC };

		ASSERT_EQ(0, ERRNO(ioctl(self->s.fd, PMSKB_IOC_SUBMIT, &s)));
	}
	EXPECT_EQ(-ECANCELED, r[0].res);
	EXPECT_EQ(-EXDEV, r[1].res);
	EXPECT_EQ(-ECANCELED, r[2].res);
	ASSERT_EQ(0, store_info(&self->s, &b));
	same(_metadata, &a, &b, "EXDEV");
	ASSERT_EQ(0, store_info(&other, &b));
	EXPECT_EQ(n, b.tokens);
	/* The same key in both is two records. */
	ASSERT_EQ(0, submit(other.fd, op + 1, r, 1));
	EXPECT_EQ(1, r[0].res);
	n = receive(_metadata, &self->c, mine, sizeof(mine), 10);
	for (i = 0; i < 4; i++)
		ASSERT_EQ(i + 1, way_one(&self->way, op_put(NULL, 0, NULL, 0), NULL));
	ASSERT_EQ(5, way_one(&self->way, op_put("x", 1, e, n), NULL));
	ASSERT_EQ(4, way_one(&self->way, op_truncate(4), NULL));
	p = (struct object) { 1, "x", 1, theirs, sizeof(theirs) };
	store_holds(_metadata, &other, &c, !variant->dev, &p, 1);
	o = (struct object) { 5, "x", 1, mine, sizeof(mine) };
	store_holds(_metadata, &self->s, &self->c, variant->dev, &o, 1);
	EXPECT_EQ(0, store_close(&other));
}

/* ---- two CPUs ---- */

struct writer {
	struct way way;
	int nr, rounds, fd, client;
	uint64_t has[64];	/* of this one's own keys */
	int failed, batches;
};

static void *writes(void *arg)
{
	enum { LEN = 2000, PER = 8 };
	struct writer *w = arg;
	unsigned int rnd = w->nr + 1;
	struct pmskb_desc dd[8];
	struct pmskb_ext x[PER][4];
	struct pmskb_result r[PER + 2];
	struct pmskb_op op[PER + 2];
	char keys[PER][16], buf[LEN];
	cpu_set_t set;
	int round, i, k, n, nr;

	CPU_ZERO(&set);
	CPU_SET(w->nr % sysconf(_SC_NPROCESSORS_ONLN), &set);
	if (sched_setaffinity(0, sizeof(set), &set))
		w->failed = __LINE__;
	for (round = 0; round < w->rounds && !w->failed; round++) {
		bool atomic = rand_r(&rnd) % 2;
		int slot[PER];

		fill(buf, LEN, 100 + w->nr, round * LEN);
		if (send_all(w->client, buf, LEN))
			w->failed = __LINE__;
		n = desc_recv_bytes(w->way.sock, dd, 8, LEN);
		if (n < 0) {
			w->failed = __LINE__;
			break;
		}
		/* Keys of one's own, each once in an array; and a pair that all write. */
		for (i = 0; i < PER; i++) {
			slot[i] = (rand_r(&rnd) % 8) * PER + i;
			sprintf(keys[i], "%d-%d", w->nr, slot[i]);
			k = exts_part(x[i], dd, n, rand_r(&rnd) % (LEN - 200), 1 + rand_r(&rnd) % 200);
			if (w->has[slot[i]] && rand_r(&rnd) % 3 == 0) {
				op[i] = op_delete(keys[i], strlen(keys[i]));
			} else {
				op[i] = op_put(keys[i], strlen(keys[i]), x[i], k);
				op[i].flags = w->has[slot[i]] ? PMSKB_OP_REPLACE : PMSKB_OP_CREATE;
			}
			if (op[i].opcode == PMSKB_OP_DELETE || rand_r(&rnd) % 2) {
				op[i].flags |= PMSKB_OP_IF_SEQ;
				op[i].seq = w->has[slot[i]];
			}
		}
		nr = PER;
		if (atomic) {
			op[nr++] = op_put("pair-1", 6, x[0], op[0].nr_extents);
			op[nr++] = op_put("pair-2", 6, x[0], op[0].nr_extents);
			w->batches++;
		}
		if (way_submit(&w->way, op, r, nr, atomic ? PMSKB_SUBMIT_ATOMIC : 0)) {
			w->failed = __LINE__;
			break;
		}
		for (i = 0; i < nr; i++) {
			if (r[i].res < 1)
				w->failed = 10000 - r[i].res;
			else if (i < PER)
				w->has[slot[i]] = op[i].opcode == PMSKB_OP_DELETE ? 0 : r[i].res;
		}
		/* Tokens that no put of this round named. */
		for (i = 0; i < n; i++)
			desc_release(w->way.sock, dd[i].token, 1);
	}
	return NULL;
}

struct tally {
	struct writer *w;
	uint64_t pair[2];
	int wrong, found;
};

static int check_written(struct record *r, void *arg)
{
	struct tally *t = arg;
	unsigned int nr, slot;
	char key[32] = "";

	memcpy(key, r->key, r->key_len < 31 ? r->key_len : 31);
	if (ntohs(rfc1071(r->bytes, r->len)) != r->csum)
		t->wrong++;
	if (sscanf(key, "pair-%u", &nr) == 1)
		t->pair[nr - 1] = r->seq;
	else if (sscanf(key, "%u-%u", &nr, &slot) == 2 && t->w[nr].has[slot] == r->seq)
		t->found++;
	else
		t->wrong++;
	return 0;
}

TEST_F_TIMEOUT(ops, two_cpus_write_at_once, 60)
{
	enum { NR = 2 };
	struct net net = { AF_INET, LINK_LO };
	struct pmskb_store_info info;
	static struct writer w[NR];
	pthread_t thread[NR];
	struct conn c[NR];
	int i, k, round, want = 0;

	for (i = 0; i < NR; i++) {
		ASSERT_EQ(0, conn_make(&c[i], &net, self->s.fd, HOW_ACCEPTED_IOCTL));
		ASSERT_EQ(0, sock_mode(c[i].s, PMSKB_RX_DESC));
		w[i] = (struct writer) { { self->s.fd, c[i].s, variant->ioctl }, i, 200, .client = c[i].c };
	}
	for (i = 0; i < NR; i++)
		ASSERT_EQ(0, pthread_create(&thread[i], NULL, writes, &w[i]));
	for (i = 0; i < NR; i++) {
		pthread_join(thread[i], NULL);
		EXPECT_EQ(0, w[i].failed);
		EXPECT_LT(50, w[i].batches);
		conn_close(&c[i]);
		for (k = 0; k < 64; k++)
			want += !!w[i].has[k];
	}
	for (round = 0; round < 2; round++) {
		struct tally t = { w };

		EXPECT_EQ(want + 2, media_scan(self->s.map, self->s.map_len, check_written, &t));
		EXPECT_EQ(want, t.found);
		EXPECT_EQ(0, t.wrong);
		EXPECT_EQ(t.pair[0] + 1, t.pair[1]) TH_LOG("half of a batch was overwritten");
		ASSERT_EQ(0, store_quiet(&self->s, 5000, &info));
		EXPECT_EQ(want + 2, info.records);
		EXPECT_EQ(NULL, info_wrong(&info, 0, true)) TH_LOG("%s", info_wrong(&info, 0, true));
		if (round)
			break;
		conn_close(&self->c);
		ASSERT_EQ(0, store_close(&self->s));
		ASSERT_EQ(0, store_open(&self->s, variant->dev));
	}
	/* All deleted, all comes back. */
	for (i = 0; i < NR; i++) {
		for (k = 0; k < 64; k++) {
			struct pmskb_result r;
			struct pmskb_op op;
			char key[16];

			op = op_delete(key, sprintf(key, "%d-%d", i, k));
			ASSERT_EQ(0, submit(self->s.fd, &op, &r, 1));
			EXPECT_EQ(w[i].has[k] ?: -ENOENT, r.res);
		}
	}
	for (i = 1; i <= 2; i++) {
		struct pmskb_result r;
		struct pmskb_op op = op_delete(i == 1 ? "pair-1" : "pair-2", 6);

		ASSERT_EQ(0, submit(self->s.fd, &op, &r, 1));
		EXPECT_LT(0, r.res);
	}
	ASSERT_EQ(0, store_quiet(&self->s, 5000, &info));
	EXPECT_EQ(0, info.records);
	EXPECT_EQ(0, info.live_bytes);
	EXPECT_EQ(0, info.frames_payload);
	EXPECT_EQ(0, info.fragmented_bytes);
	EXPECT_EQ(0, info.frames_held);
	EXPECT_EQ(0, info.frames_limbo) TH_LOG("the stack has some still");
}

TEST_HARNESS_MAIN
