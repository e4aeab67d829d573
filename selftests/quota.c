// SPDX-License-Identifier: GPL-2.0
/*
 * Promises about quotas: what a socket, and all sockets, may hold of a store; that
 * nobody else notices one who does not read; that nothing is lost by it.
 */
#include "common.h"

#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>

#include <linux/capability.h>

#include "harness.h"

#define ERRNO(call) ((call) < 0 ? errno : 0)
#define MAX_DESC 4096
/* A quota that is soon used up; and what both cursors are at. */
#define FEW 40
#define CURSORS 2

static struct pmskb_desc d[MAX_DESC];
static struct pmskb_ext e[MAX_DESC];

/* Attached or not, with a receive buffer that is no limit here. */
static int pair(struct conn *c, const struct net *net, int store_fd)
{
	struct sockaddr_storage addr;
	int size = 16 << 20, one = 1, err;
	socklen_t len;

	if (net->type != SOCK_DGRAM) {
		err = conn_make(c, net, -1, HOW_PLAIN);
	} else {
		c->s = net_listen(net, &addr, &len);
		c->c = c->s < 0 ? c->s : net_connect(net, &addr, len);
		err = c->c < 0 ? c->c : 0;
		timeout_set(c->s, 20000 * slowness());
	}
	if (err)
		return err;
	setsockopt(c->s, SOL_SOCKET, SO_RCVBUFFORCE, &size, sizeof(size));
	setsockopt(c->c, SOL_TCP, TCP_NODELAY, &one, sizeof(one));
	timeout_set(c->c, 2000 * slowness());
	return store_fd < 0 ? 0 : sock_attach_ioctl(c->s, store_fd);
}

/*
 * Waits until no frame is charged to sockets, which are closed; how many are. The stack may
 * have some on a CPU's list until something happens there.
 */
static int64_t charged(const struct store *s)
{
	struct pmskb_store_info info;
	int k, err;

	for (k = 0;; k++) {
		err = store_info(s, &info);
		if (err)
			return err;
		if (!info.frames_sockets || k == 250 * slowness())
			return info.frames_sockets;
		usleep(20000);
	}
}

FIXTURE(quota) {
	struct store s;
	struct conn c, other;
	struct net net;
	bool desc;
};

FIXTURE_VARIANT(quota) {
	int family, type;
	enum dev dev;
	enum link link;
	uint32_t mode, flags;
};

FIXTURE_VARIANT_ADD(quota, tcp_bytes) { AF_INET, SOCK_STREAM, DEV_PMEM, LINK_LO, PMSKB_RX_BYTES };
FIXTURE_VARIANT_ADD(quota, tcp_desc) { AF_INET6, SOCK_STREAM, DEV_DAX, LINK_VETH, PMSKB_RX_DESC };
FIXTURE_VARIANT_ADD(quota, udp_bytes) { AF_INET, SOCK_DGRAM, DEV_DAX, LINK_LO, PMSKB_RX_BYTES };
FIXTURE_VARIANT_ADD(quota, udp_desc) { AF_INET6, SOCK_DGRAM, DEV_PMEM, LINK_LO, PMSKB_RX_DESC, PMSKB_FORMAT_HEADS_DRAM };

FIXTURE_SETUP(quota)
{
	const char *why;

	if (!dev_path(variant->dev, &why))
		SKIP(return, "%s", why);
	why = net_up(variant->link);
	if (why)
		SKIP(return, "%s", why);
	self->net = (struct net) { variant->family, variant->link, variant->type };
	self->desc = variant->mode == PMSKB_RX_DESC;
	ASSERT_EQ(0, store_make(&self->s, variant->dev, variant->flags, 0));
	ASSERT_EQ(0, pair(&self->c, &self->net, self->s.fd));
	ASSERT_EQ(0, sock_mode(self->c.s, variant->mode));
	ASSERT_EQ(0, pair(&self->other, &self->net, self->s.fd));
	ASSERT_EQ(0, sock_mode(self->other.s, variant->mode));
}

FIXTURE_TEARDOWN(quota)
{
	struct pmskb_store_info info;

	conn_close(&self->c);
	conn_close(&self->other);
	EXPECT_EQ(0, store_back(&self->s, 5000, &info)) TH_LOG("something is left behind");
	EXPECT_EQ(0, charged(&self->s)) TH_LOG("frames of sockets that are closed");
	EXPECT_EQ(0, store_close(&self->s));
}

/* Sends len bytes of stream seed from *pos, `size` at a time. */
static int push(const struct conn *c, uint32_t seed, uint64_t *pos, uint64_t len, size_t size)
{
	static uint8_t buf[65536];
	int err;

	for (len += *pos; *pos < len; *pos += size) {
		fill(buf, size, seed, *pos);
		err = send_all(c->c, buf, size);
		if (err)
			return err;
	}
	return 0;
}

/*
 * Receives what comes at once, and checks it against the stream; without `keep` gives it back.
 * How many bytes, or what it ended with if there was nothing. *nr descriptors are in d.
 */
static int64_t pull(const struct store *s, int fd, bool desc, uint32_t seed, uint64_t *pos, uint64_t len, int *nr)
{
	static uint8_t buf[65536];
	uint64_t start = *pos;
	int got, i, n = nr ? *nr : 0;
	ssize_t bytes;

	while (*pos < start + len) {
		if (!desc) {
			bytes = recv(fd, buf, sizeof(buf), MSG_DONTWAIT);
			if (bytes <= 0)
				return *pos > start ? (int64_t)(*pos - start) : bytes ? -errno : 0;
			if (differs(buf, bytes, seed, *pos) >= 0)
				return -EBADMSG;
			*pos += bytes;
			continue;
		}
		if (n > MAX_DESC - 64)
			return -E2BIG;
		got = desc_recv_flags(fd, d + n, 64, MSG_DONTWAIT, &bytes, NULL);
		if (got <= 0) {
			if (nr)
				*nr = n;
			return *pos > start ? (int64_t)(*pos - start) : got;
		}
		for (i = n; i < n + got; i++) {
			if (differs(s->map + d[i].offset, d[i].len, seed, *pos) >= 0)
				return -EBADMSG;
			*pos += d[i].len;
		}
		if (nr)
			n += got;
		else if (desc_release_all(fd, d, got))
			return -EBADF;
	}
	if (nr)
		*nr = n;
	return *pos - start;
}

static uint64_t unplaced(const struct pmskb_counters *c)
{
	uint64_t sum = 0;
	int i;

	for (i = 0; i < PMSKB_UNPLACED_NR; i++)
		sum += c->unplaced[i];
	return sum;
}

/* Waits until so many packets, placed or not, have come. */
static int arrived(int fd, uint64_t bytes, struct pmskb_sock_info *info)
{
	int k, err;

	for (k = 0; k < 200 * slowness(); k++) {
		err = sock_info(fd, info);
		if (err || info->counters.placed_bytes >= bytes)
			return err;
		usleep(10000);
	}
	return -ETIMEDOUT;
}

TEST_F(quota, defaults_are_shares_of_the_store)
{
	struct pmskb_store_info *i = &self->s.info;
	struct pmskb_sock_info si;

	EXPECT_EQ(i->frames_total / 2, i->quota_store_frames);
	EXPECT_EQ(i->frames_total / 8, i->quota_socket_frames);
	EXPECT_EQ(PMSKB_MAX_TOKENS, i->quota_socket_tokens);
	EXPECT_EQ(0, i->frames_sockets);
	ASSERT_EQ(0, sock_info(self->c.s, &si));
	EXPECT_EQ(i->quota_socket_frames, si.quota_frames);
	EXPECT_EQ(i->quota_socket_tokens, si.quota_tokens);
	EXPECT_EQ(0, si.frames);
}

/* One that does not read has its quota; what comes beyond is not lost, and not placed. */
TEST_F_TIMEOUT(quota, who_does_not_read_takes_no_more_and_others_go_on, 60)
{
	uint64_t sent = 0, read = 0, theirs = 0, got = 0;
	struct pmskb_store_info info;
	struct pmskb_sock_info a, b;
	int k;

	ASSERT_EQ(0, store_limit(&self->s, "quota_socket_frames", FEW));
	ASSERT_EQ(0, push(&self->c, 1, &sent, 10 * FEW * 4096, 8192));
	for (k = 0; k < 500; k++) {
		ASSERT_EQ(0, push(&self->other, 2, &theirs, 16384, 8192));
		while (got < theirs) {
			int64_t n = pull(&self->s, self->other.s, self->desc, 2, &got, theirs - got, NULL);

			ASSERT_TRUE(n > 0 || n == -EAGAIN) TH_LOG("%ld", n);
		}
	}
	ASSERT_EQ(0, sock_info(self->c.s, &a));
	EXPECT_GE(FEW, a.frames);
	EXPECT_LE(FEW - 18, a.frames) TH_LOG("a whole packet did not fit");
	EXPECT_LT(0, a.counters.unplaced[PMSKB_UNPLACED_QUOTA]);
	EXPECT_EQ(unplaced(&a.counters), a.counters.unplaced[PMSKB_UNPLACED_QUOTA]);
	ASSERT_EQ(0, sock_info(self->other.s, &b));
	EXPECT_EQ(0, unplaced(&b.counters)) TH_LOG("others pay for it");
	/* TCP may have sent something twice. */
	EXPECT_LE(theirs, b.counters.placed_bytes);
	EXPECT_GE(FEW, b.frames);
	ASSERT_EQ(0, store_info(&self->s, &info));
	/* That has looked at all of limbo. */
	ASSERT_EQ(0, sock_info(self->other.s, &b));
	EXPECT_GE(CURSORS, b.frames);
	EXPECT_EQ(a.frames + b.frames, info.frames_sockets);
	EXPECT_EQ(a.counters.unplaced[PMSKB_UNPLACED_QUOTA], info.counters.unplaced[PMSKB_UNPLACED_QUOTA]);
	/* When it reads it gets all, and goes on. */
	while (read < sent) {
		int64_t n = pull(&self->s, self->c.s, self->desc, 1, &read, sent - read, NULL);

		ASSERT_TRUE(n > 0 || n == -EAGAIN) TH_LOG("%ld at %lu of %lu", n, read, sent);
	}
	ASSERT_EQ(0, store_info(&self->s, &info));
	ASSERT_EQ(0, sock_info(self->c.s, &a));
	EXPECT_GE(CURSORS, a.frames);
	/* Of descriptors a call may have ended early; but none of them failed. */
	if (!self->desc) {
		EXPECT_EQ(0, a.counters.refused);
	}
	ASSERT_EQ(0, push(&self->c, 1, &sent, 16384, 4096));
	ASSERT_EQ(0, arrived(self->c.s, a.counters.placed_bytes + 16384, &b));
	EXPECT_EQ(a.counters.unplaced[PMSKB_UNPLACED_QUOTA], b.counters.unplaced[PMSKB_UNPLACED_QUOTA]);
}

TEST_F_TIMEOUT(quota, all_sockets_together_have_a_limit_and_the_rest_is_for_others, 60)
{
	struct pmskb_alloc alloc = { .len = 64 << 10 };
	uint64_t sent[2] = { 0 }, read[2] = { 0 };
	struct pmskb_sock_info a, b;
	struct pmskb_store_info info;
	struct pmskb_result r;
	struct pmskb_op op;
	int i;

	ASSERT_EQ(0, store_limit(&self->s, "quota_store_frames", FEW + FEW / 2));
	ASSERT_EQ(0, store_limit(&self->s, "quota_socket_frames", FEW));
	ASSERT_EQ(0, push(&self->c, 3, &sent[0], 2 * FEW * 4096, 4096));
	ASSERT_EQ(0, push(&self->other, 4, &sent[1], 2 * FEW * 4096, 4096));
	ASSERT_EQ(0, sock_info(self->c.s, &a));
	ASSERT_EQ(0, sock_info(self->other.s, &b));
	EXPECT_GE(FEW + FEW / 2, a.frames + b.frames);
	EXPECT_LE(FEW + FEW / 2 - 2 * 18, a.frames + b.frames);
	EXPECT_LT(0, a.counters.unplaced[PMSKB_UNPLACED_QUOTA]);
	EXPECT_EQ(0, a.counters.unplaced[PMSKB_UNPLACED_STORE_QUOTA]);
	EXPECT_LT(0, b.counters.unplaced[PMSKB_UNPLACED_STORE_QUOTA]);
	EXPECT_EQ(0, b.counters.unplaced[PMSKB_UNPLACED_QUOTA]);
	ASSERT_EQ(0, store_info(&self->s, &info));
	EXPECT_EQ(a.frames + b.frames, info.frames_sockets);
	EXPECT_EQ(FEW + FEW / 2, info.quota_store_frames);
	EXPECT_EQ(FEW, info.quota_socket_frames);
	/* Buffers and puts do not count. */
	ASSERT_EQ(0, ERRNO(ioctl(self->s.fd, PMSKB_IOC_ALLOC, &alloc)));
	op = op_put("key", 3, e, 1);
	e[0] = (struct pmskb_ext) { .len = 64 << 10 };
	op.fd = alloc.fd;
	ASSERT_EQ(0, submit(self->s.fd, &op, &r, 1));
	EXPECT_EQ(1, r.res);
	close(alloc.fd);
	/* The second could not read descriptors while the first has it all, but for one at a time. */
	for (i = 1; i >= 0; i--) {
		while (read[i] < sent[i]) {
			int64_t n = pull(&self->s, i ? self->other.s : self->c.s, self->desc, 3 + i,
					 &read[i], sent[i] - read[i], NULL);

			ASSERT_TRUE(n > 0 || n == -EAGAIN) TH_LOG("socket %d: %ld", i, n);
		}
	}
	ASSERT_EQ(0, store_info(&self->s, &info));
	EXPECT_GE(2 * CURSORS, info.frames_sockets);
}

TEST_F(quota, what_was_not_read_goes_with_the_socket)
{
	struct pmskb_store_info info;
	uint64_t sent = 0, read = 0;
	int n = 0;

	ASSERT_EQ(0, push(&self->c, 5, &sent, 200 * 4096, 8192));
	/* Of descriptors some are held then. */
	ASSERT_LT(0, pull(&self->s, self->c.s, self->desc, 5, &read, 20000, &n));
	ASSERT_EQ(0, store_info(&self->s, &info));
	EXPECT_LE(150, info.frames_sockets);
	EXPECT_GE(200 + CURSORS, info.frames_sockets);
	conn_close(&self->c);
	EXPECT_EQ(0, charged(&self->s));
}

/* ---- descriptors ---- */

FIXTURE(described) {
	struct store s;
	struct conn c;
	struct net net;
};

FIXTURE_VARIANT(described) {
	int family, type;
	enum dev dev;
};

FIXTURE_VARIANT_ADD(described, tcp) { AF_INET, SOCK_STREAM, DEV_PMEM };
FIXTURE_VARIANT_ADD(described, udp) { AF_INET6, SOCK_DGRAM, DEV_DAX };

FIXTURE_SETUP(described)
{
	const char *why;

	if (!dev_path(variant->dev, &why))
		SKIP(return, "%s", why);
	self->net = (struct net) { variant->family, LINK_LO, variant->type };
	ASSERT_EQ(0, store_make(&self->s, variant->dev, 0, 0));
	ASSERT_EQ(0, pair(&self->c, &self->net, self->s.fd));
	ASSERT_EQ(0, sock_mode(self->c.s, PMSKB_RX_DESC));
}

FIXTURE_TEARDOWN(described)
{
	struct pmskb_store_info info;

	conn_close(&self->c);
	EXPECT_EQ(0, store_quiet(&self->s, 5000, &info));
	EXPECT_EQ(0, charged(&self->s)) TH_LOG("frames of sockets that are closed");
	EXPECT_EQ(0, store_close(&self->s));
}

TEST_F(described, with_its_tokens_held_a_receive_is_edquot_and_loses_nothing)
{
	enum { TOKENS = PMSKB_MIN_TOKENS, SIZE = 100 };
	uint64_t sent = 0, read = 0, before;
	struct pmskb_store_info store;
	struct pmskb_sock_info info;
	int n = 0, k;

	ASSERT_EQ(0, sock_quota(self->c.s, 0, TOKENS));
	ASSERT_EQ(0, push(&self->c, 6, &sent, 3 * TOKENS * SIZE, SIZE));
	while (read < sent && n < TOKENS)
		ASSERT_LT(0, pull(&self->s, self->c.s, true, 6, &read, 1, &n));
	ASSERT_EQ(TOKENS, n);
	ASSERT_LT(read, sent);
	for (k = 0; k < 3; k++) {
		before = read;
		ASSERT_EQ(-EDQUOT, pull(&self->s, self->c.s, true, 6, &read, 1, &n));
		ASSERT_EQ(before, read);
		ASSERT_EQ(0, sock_info(self->c.s, &info));
		EXPECT_EQ(TOKENS, info.tokens);
	}
	EXPECT_LE(3, info.counters.refused);
	EXPECT_GE(3 + TOKENS, info.counters.refused);
	ASSERT_EQ(0, store_info(&self->s, &store));
	EXPECT_EQ(info.counters.refused, store.counters.refused);
	/* As many as are given back. */
	ASSERT_EQ(0, desc_release_all(self->c.s, d, 10));
	n = 10;
	while (pull(&self->s, self->c.s, true, 6, &read, 1, &n) > 0)
		;
	EXPECT_EQ(20, n);
	ASSERT_EQ(0, sock_info(self->c.s, &info));
	EXPECT_EQ(TOKENS, info.tokens);
	/* Raised, there is no end of them; lowered below what is held nothing is taken away. */
	ASSERT_EQ(0, sock_quota(self->c.s, 0, 0));
	ASSERT_LT(0, pull(&self->s, self->c.s, true, 6, &read, sent - read, &n));
	EXPECT_EQ(sent, read);
	ASSERT_EQ(0, sock_quota(self->c.s, 0, TOKENS));
	ASSERT_EQ(0, push(&self->c, 6, &sent, SIZE, SIZE));
	ASSERT_EQ(-EDQUOT, pull(&self->s, self->c.s, true, 6, &read, 1, &n));
	ASSERT_EQ(0, desc_release(self->c.s, 0, ~0U));
	EXPECT_EQ(SIZE, pull(&self->s, self->c.s, true, 6, &read, 1, NULL));
}

TEST_F(described, with_its_frames_held_a_copy_is_edquot_and_loses_nothing)
{
	uint64_t sent = 0, read = 0, before, copied = 0;
	struct pmskb_sock_info info;
	int n = 0, refused = 0, was, i;
	int64_t got;

	ASSERT_EQ(0, sock_quota(self->c.s, PMSKB_MIN_FRAMES, 0));
	/* All at once, and kept when it is received: what does not fit has to be copied. */
	ASSERT_EQ(0, push(&self->c, 7, &sent, 4 * PMSKB_MIN_FRAMES * 4096, 4096));
	ASSERT_EQ(0, sock_info(self->c.s, &info));
	EXPECT_LT(0, info.counters.unplaced[PMSKB_UNPLACED_QUOTA]);
	while (read < sent) {
		before = read, was = n;
		got = pull(&self->s, self->c.s, true, 7, &read, sent - read, &n);
		for (i = was; i < n; i++)
			copied += d[i].flags & PMSKB_DESC_COPIED ? d[i].len : 0;
		if (got == -EAGAIN)
			continue;
		if (got == -EDQUOT) {
			refused++;
			ASSERT_EQ(before, read);
			ASSERT_EQ(0, sock_info(self->c.s, &info));
			ASSERT_LT(0, info.tokens) TH_LOG("nothing is held");
			/* A datagram may have one more, if it came when nothing was held. */
			ASSERT_GE(PMSKB_MIN_FRAMES + CURSORS, info.frames);
			ASSERT_EQ(0, desc_release_all(self->c.s, d, n));
			n = 0;
			continue;
		}
		ASSERT_LT(0, got) TH_LOG("%s at %lu", strerror(-got), read);
	}
	EXPECT_LE(3, refused) TH_LOG("four times the quota was held");
	ASSERT_EQ(0, sock_info(self->c.s, &info));
	EXPECT_LE(refused, info.counters.refused);
	EXPECT_LT(2 * PMSKB_MIN_FRAMES * 4096, copied);
	/* Of a datagram that was refused a part may have been copied. */
	EXPECT_LE(copied, info.counters.copied_bytes);
	ASSERT_EQ(0, desc_release_all(self->c.s, d, n));
}

/* What fills the quota comes later than what has to be copied. */
TEST_F(described, a_full_queue_is_no_obstacle_to_its_first_packet)
{
	uint64_t sent = 0, read = 0;
	struct pmskb_sock_info info;
	int n = 0;

	conn_close(&self->c);
	ASSERT_EQ(0, pair(&self->c, &self->net, -1));
	ASSERT_EQ(0, push(&self->c, 8, &sent, 10 * 4096, 4096));
	ASSERT_EQ(0, sock_attach_ioctl(self->c.s, self->s.fd));
	ASSERT_EQ(0, sock_mode(self->c.s, PMSKB_RX_DESC));
	ASSERT_EQ(0, sock_quota(self->c.s, PMSKB_MIN_FRAMES, 0));
	ASSERT_EQ(0, push(&self->c, 8, &sent, 2 * PMSKB_MIN_FRAMES * 4096, 4096));
	ASSERT_EQ(0, sock_info(self->c.s, &info));
	EXPECT_LE(PMSKB_MIN_FRAMES - 1, info.frames);
	EXPECT_LT(0, info.counters.unplaced[PMSKB_UNPLACED_QUOTA]);
	while (read < 10 * 4096) {
		/* One is let through while nothing is held; with it held no other. */
		ASSERT_LT(0, pull(&self->s, self->c.s, true, 8, &read, 1, &n)) TH_LOG("at %lu", read);
		EXPECT_TRUE(d[0].flags & PMSKB_DESC_COPIED);
		if (read < 10 * 4096) {
			ASSERT_EQ(-EDQUOT, pull(&self->s, self->c.s, true, 8, &read, 1, &n)) TH_LOG("at %lu", read);
		}
		ASSERT_EQ(0, sock_info(self->c.s, &info));
		EXPECT_GE(PMSKB_MIN_FRAMES + CURSORS, info.frames);
		ASSERT_EQ(0, desc_release_all(self->c.s, d, n));
		n = 0;
	}
	while (read < sent)
		ASSERT_LT(0, pull(&self->s, self->c.s, true, 8, &read, sent - read, NULL));
}

/* A frame with a record is the store's, not the socket's; until the record goes. */
TEST_F(described, what_is_persisted_does_not_count)
{
	enum { FRAMES = 50 };
	uint64_t sent = 0, read = 0;
	struct pmskb_sock_info info;
	struct pmskb_store_info si;
	struct pmskb_op op;
	int n = 0;

	ASSERT_EQ(0, push(&self->c, 9, &sent, FRAMES * 4096, 4096));
	while (read < sent)
		ASSERT_LT(0, pull(&self->s, self->c.s, true, 9, &read, sent - read, &n));
	ASSERT_EQ(0, sock_info(self->c.s, &info));
	EXPECT_LE(FRAMES, info.frames);
	EXPECT_GE(FRAMES + CURSORS, info.frames);
	exts_of(e, d, n);
	op = op_put("k", 1, e, n);
	op.flags = PMSKB_OP_KEEP;
	ASSERT_EQ(1, persist_one(self->c.s, &op, NULL));
	ASSERT_EQ(0, sock_info(self->c.s, &info));
	EXPECT_GE(CURSORS, info.frames);
	/* Tokens hold them still when the record is gone: what was deleted goes with the next commit. */
	op = op_delete("k", 1);
	ASSERT_EQ(1, persist_one(self->c.s, &op, NULL));
	op = op_put("l", 1, NULL, 0);
	ASSERT_EQ(2, persist_one(self->c.s, &op, NULL));
	ASSERT_EQ(0, sock_info(self->c.s, &info));
	EXPECT_LE(FRAMES, info.frames);
	/* Without: the record has them, and then nobody. */
	op = op_put("k", 1, e, n);
	ASSERT_EQ(3, persist_one(self->c.s, &op, NULL));
	ASSERT_EQ(0, sock_info(self->c.s, &info));
	EXPECT_GE(CURSORS, info.frames);
	op = op_delete("k", 1);
	ASSERT_EQ(3, persist_one(self->c.s, &op, NULL));
	op = op_delete("l", 1);
	ASSERT_EQ(2, persist_one(self->c.s, &op, NULL));
	ASSERT_EQ(0, sock_info(self->c.s, &info));
	EXPECT_GE(CURSORS, info.frames);
	ASSERT_EQ(0, store_info(&self->s, &si));
	EXPECT_EQ(info.frames, si.frames_sockets);
}

/* ---- the option, and the store's limits ---- */

FIXTURE(option) {
	struct store s;
	struct conn c;
};

FIXTURE_SETUP(option)
{
	struct net net = { AF_INET, LINK_LO };
	const char *why;

	if (!dev_path(DEV_PMEM, &why))
		SKIP(return, "%s", why);
	ASSERT_EQ(0, store_make(&self->s, DEV_PMEM, 0, 0));
	ASSERT_EQ(0, conn_make(&self->c, &net, self->s.fd, HOW_ACCEPTED_OPT));
}

FIXTURE_TEARDOWN(option)
{
	conn_close(&self->c);
	EXPECT_EQ(0, store_close(&self->s));
}

static int get_quota(int fd, struct pmskb_quota *q)
{
	socklen_t len = sizeof(*q);

	memset(q, 0xa5, sizeof(*q));
	if (getsockopt(fd, SOL_PMSKB, PMSKB_QUOTA, q, &len))
		return -errno;
	return len == sizeof(*q) && !q->reserved ? 0 : -EBADMSG;
}

#define QUOTA_IS(fd, f, t) do { \
	struct pmskb_quota q_; \
	ASSERT_EQ(0, get_quota(fd, &q_)); \
	EXPECT_EQ(f, q_.frames); \
	EXPECT_EQ(t, q_.tokens); \
} while (0)

TEST_F(option, is_what_was_set_and_0_is_the_stores)
{
	unsigned int frames = self->s.info.quota_socket_frames;
	struct pmskb_sock_info info;

	QUOTA_IS(self->c.s, frames, PMSKB_MAX_TOKENS);
	ASSERT_EQ(0, sock_quota(self->c.s, 100, 200));
	QUOTA_IS(self->c.s, 100, 200);
	ASSERT_EQ(0, sock_info(self->c.s, &info));
	EXPECT_EQ(100, info.quota_frames);
	EXPECT_EQ(200, info.quota_tokens);
	/* The store's are for those who have none. */
	ASSERT_EQ(0, store_limit(&self->s, "quota_socket_frames", 77));
	ASSERT_EQ(0, store_limit(&self->s, "quota_socket_tokens", 88));
	QUOTA_IS(self->c.s, 100, 200);
	ASSERT_EQ(0, sock_quota(self->c.s, 0, 200));
	QUOTA_IS(self->c.s, 77, 200);
	ASSERT_EQ(0, sock_quota(self->c.s, 0, 0));
	QUOTA_IS(self->c.s, 77, 88);
	ASSERT_EQ(0, store_limit(&self->s, "quota_socket_frames", 1234));
	QUOTA_IS(self->c.s, 1234, 88);
}

TEST_F(option, what_cannot_be_is_refused_and_changes_nothing)
{
	static const struct pmskb_quota bad[] = {
		{ 1 }, { PMSKB_MIN_FRAMES - 1 }, { 0, 1 }, { 0, PMSKB_MIN_TOKENS - 1 },
		{ 0, PMSKB_MAX_TOKENS + 1 }, { 0, ~0U }, { 50, 1 }, { 1, 70 }, { 50, 70, 1 },
	};
	struct pmskb_quota q = { 50, 70 };
	struct net net = { AF_INET, LINK_LO };
	struct conn plain;
	char big[32] = { 0 };
	socklen_t len;
	unsigned int i;

	ASSERT_EQ(0, sock_quota(self->c.s, 60, 80));
	for (i = 0; i < ARRAY_LEN(bad); i++) {
		EXPECT_EQ(EINVAL, ERRNO(setsockopt(self->c.s, SOL_PMSKB, PMSKB_QUOTA, &bad[i], sizeof(bad[i]))))
			TH_LOG("bad[%u]", i);
	}
	for (i = 0; i < sizeof(big); i++) {
		if (i == sizeof(q))
			continue;
		EXPECT_EQ(EINVAL, ERRNO(setsockopt(self->c.s, SOL_PMSKB, PMSKB_QUOTA, big, i)))
			TH_LOG("%u bytes", i);
	}
	EXPECT_EQ(EFAULT, ERRNO(setsockopt(self->c.s, SOL_PMSKB, PMSKB_QUOTA, BAD_PTR, sizeof(q))));
	QUOTA_IS(self->c.s, 60, 80);
	len = sizeof(q) - 1;
	EXPECT_EQ(EINVAL, ERRNO(getsockopt(self->c.s, SOL_PMSKB, PMSKB_QUOTA, &q, &len)));
	len = sizeof(q);
	EXPECT_EQ(EFAULT, ERRNO(getsockopt(self->c.s, SOL_PMSKB, PMSKB_QUOTA, BAD_PTR, &len)));
	len = sizeof(big);
	EXPECT_EQ(0, ERRNO(getsockopt(self->c.s, SOL_PMSKB, PMSKB_QUOTA, big, &len)));
	EXPECT_EQ(sizeof(q), len);
	/* The least, and the most tokens. */
	EXPECT_EQ(0, sock_quota(self->c.s, PMSKB_MIN_FRAMES, PMSKB_MIN_TOKENS));
	EXPECT_EQ(0, sock_quota(self->c.s, ~0U, PMSKB_MAX_TOKENS));
	QUOTA_IS(self->c.s, ~0U, PMSKB_MAX_TOKENS);
	/* One that has no store, and one that could not have one. */
	ASSERT_EQ(0, conn_make(&plain, &net, -1, HOW_PLAIN));
	EXPECT_EQ(-ENOPROTOOPT, sock_quota(plain.s, 50, 70));
	ASSERT_EQ(0, sock_ulp(plain.s));
	EXPECT_EQ(-EUNATCH, sock_quota(plain.s, 50, 70));
	EXPECT_EQ(-EUNATCH, get_quota(plain.s, &q));
	conn_close(&plain);
}

/* In a process without the capability: 0, or what was not as it should be. */
static int unprivileged(struct store *s, int fd)
{
	struct __user_cap_header_struct h = { _LINUX_CAPABILITY_VERSION_3 };
	struct __user_cap_data_struct data[2];
	unsigned int frames = s->info.quota_socket_frames;

	if (syscall(SYS_capget, &h, data))
		return 1;
	data[0].effective &= ~(1U << CAP_NET_ADMIN);
	data[0].permitted &= ~(1U << CAP_NET_ADMIN);
	if (syscall(SYS_capset, &h, data))
		return 2;
	/* What it has, by somebody else's favour, it may keep, but not get again. */
	if (sock_quota(fd, frames + 100, 0) || sock_quota(fd, frames + 101, 0) != -EPERM)
		return 3;
	if (sock_quota(fd, frames + 99, 100))
		return 4;
	if (sock_quota(fd, frames + 100, 100) != -EPERM || sock_quota(fd, ~0U, 0) != -EPERM)
		return 5;
	if (sock_quota(fd, 50, 80) || sock_quota(fd, frames, 0) || sock_quota(fd, frames + 1, 0) != -EPERM)
		return 6;
	if (sock_quota(fd, 50, 200) || sock_quota(fd, 50, 201) != -EPERM || sock_quota(fd, 0, 0))
		return 7;
	return 0;
}

TEST_F(option, more_than_the_stores_needs_a_capability)
{
	int st;
	pid_t pid;

	ASSERT_EQ(0, store_limit(&self->s, "quota_socket_tokens", 200));
	ASSERT_EQ(0, sock_quota(self->c.s, self->s.info.quota_socket_frames + 100, 0));
	pid = fork();
	ASSERT_LE(0, pid);
	if (!pid)
		_exit(unprivileged(&self->s, self->c.s));
	ASSERT_EQ(pid, waitpid(pid, &st, 0));
	EXPECT_EQ(0, st) TH_LOG("step %d", WEXITSTATUS(st));
	QUOTA_IS(self->c.s, self->s.info.quota_socket_frames, 200);
	EXPECT_EQ(0, sock_quota(self->c.s, 0, 300));
}

TEST_F(option, accepted_sockets_have_their_listeners)
{
	struct net net = { AF_INET, LINK_LO };
	struct sockaddr_storage addr;
	struct pmskb_sock_info info;
	struct conn c;
	socklen_t len;
	int l, size = 16 << 20;
	uint64_t pos = 0;

	l = net_listen(&net, &addr, &len);
	ASSERT_LE(0, l);
	ASSERT_EQ(0, sock_attach_ioctl(l, self->s.fd));
	ASSERT_EQ(0, sock_quota(l, 40, 90));
	c.c = net_connect(&net, &addr, len);
	ASSERT_LE(0, c.c);
	/* By now there is a child, whatever becomes of the listener. */
	usleep(50000);
	ASSERT_EQ(0, sock_quota(l, 0, 0));
	c.s = accept(l, NULL, NULL);
	ASSERT_LE(0, c.s);
	QUOTA_IS(c.s, 40, 90);
	QUOTA_IS(l, self->s.info.quota_socket_frames, PMSKB_MAX_TOKENS);
	/* And it holds. */
	setsockopt(c.s, SOL_SOCKET, SO_RCVBUFFORCE, &size, sizeof(size));
	ASSERT_EQ(0, push(&c, 10, &pos, 80 * 4096, 8192));
	ASSERT_EQ(0, sock_info(c.s, &info));
	EXPECT_GE(40, info.frames);
	EXPECT_LT(0, info.counters.unplaced[PMSKB_UNPLACED_QUOTA]);
	conn_close(&c);
	close(l);
}

TEST_F(option, the_stores_limits_are_numbers_within_bounds)
{
	static const struct {
		const char *name;
		unsigned long low, high;
	} limits[] = {
		{ "quota_store_frames", PMSKB_MIN_FRAMES, UINT32_MAX },
		{ "quota_socket_frames", PMSKB_MIN_FRAMES, UINT32_MAX },
		{ "quota_socket_tokens", PMSKB_MIN_TOKENS, PMSKB_MAX_TOKENS },
	};
	char path[100], dir[80];
	struct stat st;
	unsigned int i;

	snprintf(dir, sizeof(dir), "/sys/class/misc/pmskb%u", self->s.minor);
	for (i = 0; i < ARRAY_LEN(limits); i++) {
		snprintf(path, sizeof(path), "%s/%s", dir, limits[i].name);
		ASSERT_EQ(0, stat(path, &st));
		EXPECT_EQ(0644, st.st_mode & 07777);
		EXPECT_EQ(0, store_limit(&self->s, limits[i].name, limits[i].low));
		EXPECT_EQ(limits[i].low, read_number(path));
		EXPECT_EQ(-EINVAL, store_limit(&self->s, limits[i].name, limits[i].low - 1));
		EXPECT_EQ(-EINVAL, store_limit(&self->s, limits[i].name, 0));
		EXPECT_EQ(-EINVAL, write_file(dir, limits[i].name, "many\n"));
		EXPECT_EQ(-EINVAL, write_file(dir, limits[i].name, "-1\n"));
		EXPECT_EQ(-ERANGE, write_file(dir, limits[i].name, "4294967296\n"));
		EXPECT_EQ(limits[i].low, read_number(path));
		EXPECT_EQ(0, store_limit(&self->s, limits[i].name, limits[i].high));
		EXPECT_EQ(limits[i].high, read_number(path));
		if (limits[i].high != UINT32_MAX) {
			EXPECT_EQ(-EINVAL, store_limit(&self->s, limits[i].name, limits[i].high + 1));
		}
	}
}

/* ---- two stores ---- */

TEST_F(option, two_stores_in_one_process_count_apart)
{
	struct net net = { AF_INET, LINK_LO };
	uint64_t sent = 0, theirs = 0, read = 0;
	struct pmskb_store_info a, b;
	struct pmskb_sock_info info;
	struct store other;
	const char *why;
	struct conn c[2];
	int k;

	if (!dev_path(DEV_DAX, &why))
		SKIP(return, "there is no second device");
	ASSERT_EQ(0, store_make(&other, DEV_DAX, 0, 0));
	ASSERT_EQ(0, pair(&c[0], &net, self->s.fd));
	ASSERT_EQ(0, pair(&c[1], &net, other.fd));
	ASSERT_EQ(0, store_limit(&self->s, "quota_store_frames", FEW));
	ASSERT_EQ(0, push(&c[0], 11, &sent, 3 * FEW * 4096, 8192));
	ASSERT_EQ(0, push(&c[1], 12, &theirs, 3 * FEW * 4096, 8192));
	ASSERT_EQ(0, sock_info(c[0].s, &info));
	EXPECT_EQ(self->s.minor, info.store);
	EXPECT_GE(FEW, info.frames);
	EXPECT_LT(0, info.counters.unplaced[PMSKB_UNPLACED_STORE_QUOTA]);
	ASSERT_EQ(0, sock_info(c[1].s, &info));
	EXPECT_EQ(other.minor, info.store);
	EXPECT_LE(3 * FEW, info.frames);
	EXPECT_EQ(0, unplaced(&info.counters));
	EXPECT_LE(theirs, info.counters.placed_bytes);
	ASSERT_EQ(0, store_info(&self->s, &a));
	ASSERT_EQ(0, store_info(&other, &b));
	EXPECT_GE(FEW, a.frames_sockets);
	EXPECT_EQ(info.frames, b.frames_sockets);
	for (k = 0; k < 2; k++) {
		uint64_t len = k ? theirs : sent;

		read = 0;
		while (read < len)
			ASSERT_LT(0, pull(NULL, c[k].s, false, 11 + k, &read, len - read, NULL));
		conn_close(&c[k]);
	}
	EXPECT_EQ(0, store_close(&other));
}

TEST_HARNESS_MAIN
