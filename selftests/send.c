// SPDX-License-Identifier: GPL-2.0
/*
 * Promises about PMSKB_CMSG_SEND: sendmsg() of bytes and, after them, ranges of records, whose
 * bytes are not copied.
 */
#include "common.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/errqueue.h>
#include <linux/net_tstamp.h>
#include <linux/sockios.h>
#include <linux/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <time.h>

#include "harness.h"
#include "objects.h"

#define ERRNO(call) ((call) < 0 ? errno : 0)
#define FRAME PMSKB_FRAME_SIZE
#define RANGES(s) (s), ARRAY_LEN(s)

static uint8_t data[1 << 22], back[1 << 22];

FIXTURE(send) {
	struct store s;
	struct conn c;		/* what is sent comes from c.s */
	struct net net;
};

FIXTURE_VARIANT(send) {
	int family;
	enum dev dev;
	enum link link;
	enum how how;
};

FIXTURE_VARIANT_ADD(send, v4_pmem_lo) { AF_INET, DEV_PMEM, LINK_LO, HOW_ACCEPTED_IOCTL };
FIXTURE_VARIANT_ADD(send, v6_dax_veth) { AF_INET6, DEV_DAX, LINK_VETH, HOW_LISTENER_OPT };
FIXTURE_VARIANT_ADD(send, v4_pmem_noffload) { AF_INET, DEV_PMEM, LINK_PLAIN, HOW_LISTENER_IOCTL };

/* What does not depend on device and link. */
#define ONCE "as over lo"
/* There TCP copies what it is given, as it does for sendfile. */
#define COPIED "the device cannot gather"

FIXTURE_SETUP(send)
{
	const char *why;

	self->c = (struct conn) { -1, -1 };
	self->s.ctl = self->s.dev = self->s.fd = -1;
	self->s.minor = ~0U;
	if (!dev_path(variant->dev, &why))
		SKIP(return, "%s", why);
	why = net_up(variant->link);
	if (why)
		SKIP(return, "%s", why);
	self->net = (struct net) { variant->family, variant->link };
	ASSERT_EQ(0, store_make(&self->s, variant->dev, 0, 0));
	ASSERT_EQ(0, conn_make(&self->c, &self->net, self->s.fd, variant->how));
}

/* Detach is exact: it is EBUSY if a frame or a file is left behind. */
FIXTURE_TEARDOWN(send)
{
	struct pmskb_store_info info;

	conn_close(&self->c);
	if (self->s.fd >= 0)
		EXPECT_EQ(0, store_quiet(&self->s, 5000, &info)) TH_LOG("frames are left behind");
	EXPECT_EQ(0, store_close(&self->s));
}

/* ---- records ---- */

/* A record of len bytes of stream seed, in parts of so many bytes that lie in any order; its file. */
static int record(const struct store *s, const char *key, uint32_t seed, uint32_t len, uint32_t step)
{
	struct pmskb_alloc a = { .len = len };
	struct pmskb_open o = { .key = PTR(key), .key_len = strlen(key) };
	uint32_t nr = (len + step - 1) / step, at = 0, i;
	static struct pmskb_ext ext[4096];
	struct pmskb_result r = {};
	struct pmskb_op op;
	int err;

	if (nr > ARRAY_LEN(ext))
		return -E2BIG;
	if (ioctl(s->fd, PMSKB_IOC_ALLOC, &a))
		return -errno;
	/* The last part is the first of the buffer. */
	for (i = nr; i--;) {
		uint32_t now = i == nr - 1 ? len - i * step : step;

		fill(data, now, seed, (uint64_t)i * step);
		if (pwrite(a.fd, data, now, at) != now)
			return -errno;
		ext[i] = (struct pmskb_ext) { .offset = at, .len = now };
		at += now;
	}
	op = op_put(key, strlen(key), ext, nr);
	op.fd = a.fd;
	err = submit(s->fd, &op, &r, 1);
	close(a.fd);
	if (err || r.res < 0)
		return err ?: r.res;
	return ioctl(s->fd, PMSKB_IOC_OPEN, &o) ? -errno : o.fd;
}

static int64_t del(const struct store *s, const char *key)
{
	struct pmskb_op op = op_delete(key, strlen(key));
	struct pmskb_result r = {};
	int err = submit(s->fd, &op, &r, 1);

	return err ?: r.res;
}

static uint64_t sum(const struct pmskb_send *s, int nr)
{
	uint64_t len = 0;

	while (nr--)
		len += s[nr].len;
	return len;
}

/* What is left of bytes and ranges when so many were sent. */
static void rest(const void **head, size_t *len, struct pmskb_send **s, int *nr, size_t sent)
{
	size_t n = sent < *len ? sent : *len;

	*head = (const char *)*head + n;
	*len -= n;
	for (sent -= n; sent; sent -= n) {
		n = sent < (*s)->len ? sent : (*s)->len;
		(*s)->offset += n;
		(*s)->len -= n;
		if (!(*s)->len) {
			(*s)++;
			(*nr)--;
		}
	}
}

static uint64_t ms(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000ULL + t.tv_nsec / 1000000;
}

static int queued(int fd, int what)
{
	int n = -1;

	return ioctl(fd, what, &n) ? -errno : n;
}

static void buffer_size(int fd, int bytes)
{
	setsockopt(fd, SOL_SOCKET, SO_SNDBUFFORCE, &bytes, sizeof(bytes));
}

static pid_t in_child(void (*what)(void *), void *arg)
{
	pid_t pid = fork();

	if (!pid) {
		what(arg);
		_exit(0);
	}
	return pid;
}

static int child_status(pid_t pid)
{
	int st;

	return waitpid(pid, &st, 0) == pid ? st : -1;
}

/* Nothing is on its way but this. */
static void nothing_else(struct __test_metadata *_metadata, const struct conn *conn)
{
	char end[4] = "";

	ASSERT_EQ(0, send_all(conn->s, "end", 3));
	ASSERT_EQ(0, recv_all(conn->c, end, 3));
	EXPECT_EQ(0, memcmp(end, "end", 4)) TH_LOG("something was sent");
}

/* ---- bytes ---- */

TEST_F(send, the_header_is_followed_by_the_ranges_in_their_order)
{
	static const char header[] = "HTTP/1.1 200 OK\r\n\r\n";
	static char got[30000];
	struct conn in;
	struct pmskb_open o;
	struct pmskb_op op;
	int one, small, packets, n, i;
	size_t total, at;

	one = record(&self->s, "one", 1, 300001, 300001);
	ASSERT_LE(0, one);
	/* Parts of less than a frame, across frames. */
	small = record(&self->s, "small", 2, 50000, 997);
	ASSERT_LE(0, small);
	/* As it was received. */
	ASSERT_EQ(0, conn_make(&in, &self->net, self->s.fd, HOW_ACCEPTED_IOCTL));
	ASSERT_EQ(0, sock_mode(in.s, PMSKB_RX_DESC));
	n = receive(_metadata, &in, got, sizeof(got), 3);
	op = op_put("packets", 7, e, n);
	ASSERT_LT(0, persist_one(in.s, &op, NULL));
	conn_close(&in);
	o = (struct pmskb_open) { .key = PTR("packets"), .key_len = 7 };
	ASSERT_EQ(0, ioctl(self->s.fd, PMSKB_IOC_OPEN, &o));
	packets = o.fd;
	{
		const struct {
			struct pmskb_send s;
			uint32_t seed;
		} sends[] = {
			{ { .fd = one, .offset = 0, .len = 300001 }, 1 },
			{ { .fd = one, .offset = 4095, .len = 2 }, 1 },
			{ { .fd = small, .offset = 0, .len = 50000 }, 2 },
			{ { .fd = packets, .offset = 1, .len = 29999 }, 3 },
			{ { .fd = small, .offset = 49999, .len = 1 }, 2 },
			{ { .fd = small, .offset = 996, .len = 2000 }, 2 },
			{ { .fd = one, .offset = 150000, .len = 150001 }, 1 },
			{ { .fd = one, .offset = 300000, .len = 1 }, 1 },
		};
		struct pmskb_send s[ARRAY_LEN(sends)];
		const size_t heads[] = { sizeof(header) - 1, 0, 1 << 20, 1 };

		for (i = 0; i < (int)ARRAY_LEN(sends); i++)
			s[i] = sends[i].s;
		for (n = 0; n < (int)ARRAY_LEN(heads); n++) {
			const struct pmskb_send *from = n & 1 ? s + 1 : s;
			int nr = n & 1 ? 3 : (int)ARRAY_LEN(s);
			size_t head = heads[n];
			pid_t pid;

			fill(data, head, 9, n);
			if (!n)
				memcpy(data, header, head);
			total = head + sum(from, nr);
			pid = fork();
			if (!pid)
				_exit(send_ranges(self->c.s, data, head, from, nr, 0) != (ssize_t)total);
			ASSERT_EQ(0, recv_all(self->c.c, back, total));
			ASSERT_EQ(0, child_status(pid)) TH_LOG("header of %zu bytes", head);
			EXPECT_EQ(0, memcmp(data, back, head));
			for (at = head, i = 0; i < nr; at += from[i++].len) {
				EXPECT_EQ(-1, differs(back + at, from[i].len, sends[from - s + i].seed, from[i].offset))
					TH_LOG("header of %zu bytes, range %d", head, i);
			}
		}
	}
	/* And what it was before is what it is. */
	nothing_else(_metadata, &self->c);
	EXPECT_EQ(50000, pread(small, back, sizeof(back), 0));
	EXPECT_EQ(-1, differs(back, 50000, 2, 0));
	close(one);
	close(small);
	close(packets);
}

TEST_F(send, as_many_ranges_as_are_allowed_go_out_and_not_one_more)
{
	struct pmskb_send s[PMSKB_MAX_SENDS + 1];
	int fd, i;

	if (variant->link != LINK_LO)
		SKIP(return, ONCE);
	fd = record(&self->s, "k", 1, 100000, 100000);
	ASSERT_LE(0, fd);
	for (i = 0; i < (int)ARRAY_LEN(s); i++)
		s[i] = (struct pmskb_send) { .fd = fd, .offset = 1000 * i + 7, .len = 1000 };
	EXPECT_EQ(-E2BIG, send_ranges(self->c.s, "x", 1, s, PMSKB_MAX_SENDS + 1, 0));
	ASSERT_EQ(1000 * PMSKB_MAX_SENDS, send_ranges(self->c.s, NULL, 0, s, PMSKB_MAX_SENDS, 0));
	ASSERT_EQ(0, recv_all(self->c.c, back, 1000 * PMSKB_MAX_SENDS));
	EXPECT_EQ(-1, differs(back, 1000 * PMSKB_MAX_SENDS, 1, 7));
	nothing_else(_metadata, &self->c);
	close(fd);
}

/* ---- frames ---- */

TEST_F(send, no_byte_is_copied_and_the_frames_stay_until_the_peer_has_them)
{
	enum { FRAMES = 40 };
	struct pmskb_send s = { .offset = 0, .len = FRAMES * FRAME };
	struct pmskb_store_info before, info;
	int tries;

	if (variant->link == LINK_PLAIN)
		SKIP(return, COPIED);
	s.fd = record(&self->s, "k", 1, FRAMES * FRAME, FRAMES * FRAME);
	ASSERT_LE(0, s.fd);
	ASSERT_EQ(0, store_info(&self->s, &before));
	EXPECT_EQ(FRAMES, before.frames_payload);
	EXPECT_EQ(0, before.frames_limbo);
	ASSERT_EQ(6 + s.len, send_ranges(self->c.s, "header", 6, &s, 1, 0));
	close(s.fd);
	ASSERT_LT(0, del(&self->s, "k"));
	ASSERT_EQ(-ENOENT, del(&self->s, "k"));
	/* No record and no file has them any more, so it is TCP that does: in its queues. */
	ASSERT_EQ(0, store_info(&self->s, &info));
	EXPECT_EQ(0, info.frames_payload);
	EXPECT_EQ(0, info.frames_held);
	EXPECT_EQ(FRAMES, info.frames_limbo) TH_LOG("TCP has copies");
	EXPECT_LT(0, store_flood(&self->s));
	ASSERT_EQ(0, recv_all(self->c.c, back, 6 + s.len));
	EXPECT_EQ(0, memcmp(back, "header", 6));
	EXPECT_EQ(-1, differs(back + 6, s.len, 1, 0)) TH_LOG("frames were reused");
	/* With the last acknowledgement they are free. */
	for (tries = 0; tries < 250 * slowness() && info.frames_limbo; tries++) {
		usleep(20000);
		ASSERT_EQ(0, store_info(&self->s, &info));
	}
	EXPECT_EQ(0, info.frames_limbo) TH_LOG("frames do not come back");
	EXPECT_EQ(before.frames_free + FRAMES + before.frames_record, info.frames_free + info.frames_record);
}

TEST_F_TIMEOUT(send, what_is_lost_is_sent_again_after_the_record_is_gone, 120)
{
	enum { LEN = 1 << 20 };
	struct pmskb_send s[] = { { .offset = 0, .len = LEN / 2 }, { .offset = LEN / 2 + 1, .len = LEN / 2 - 1 } };
	struct pmskb_store_info info;
	int tries;
	pid_t pid;

	if (variant->link != LINK_VETH)
		SKIP(return, "on another link");
	s[0].fd = s[1].fd = record(&self->s, "k", 1, LEN, LEN);
	ASSERT_LE(0, s[0].fd);
	if (sh("tc qdisc add dev pmskb-a root netem loss 10%% delay 2ms reorder 20%% duplicate 1%%"))
		SKIP(return, "no netem");
	buffer_size(self->c.s, 8 << 20);
	ASSERT_EQ(3 + sum(RANGES(s)), send_ranges(self->c.s, "abc", 3, RANGES(s), 0));
	close(s[0].fd);
	EXPECT_LT(0, del(&self->s, "k"));
	EXPECT_LT(0, store_flood(&self->s));
	pid = fork();
	if (!pid) {
		/* Others go on using what is free. */
		for (;;)
			store_flood(&self->s);
	}
	EXPECT_EQ(0, recv_all(self->c.c, back, 3 + sum(RANGES(s))));
	kill(pid, SIGKILL);
	child_status(pid);
	sh("tc qdisc del dev pmskb-a root");
	EXPECT_EQ(-1, differs(back + 3, LEN / 2, 1, 0));
	EXPECT_EQ(-1, differs(back + 3 + LEN / 2, LEN / 2 - 1, 1, LEN / 2 + 1));
	for (tries = 0; tries < 250 * slowness(); tries++) {
		ASSERT_EQ(0, store_info(&self->s, &info));
		if (!info.frames_limbo && !info.frames_held)
			break;
		usleep(20000);
	}
	EXPECT_EQ(0, info.frames_limbo);
	EXPECT_EQ(0, info.frames_held);
}

struct closing {
	const struct store *s;
	int fd, sock, ret;
};

static void *close_soon(void *arg)
{
	struct closing *c = arg;

	usleep(300000);
	c->ret = close(c->fd) || del(c->s, "k") <= 0 || store_flood(c->s) <= 0;
	return NULL;
}

TEST_F(send, a_record_that_is_closed_and_deleted_while_it_is_sent_is_sent_whole)
{
	enum { LEN = 3 << 20 };
	struct pmskb_send s = { .offset = 1, .len = LEN - 1 };
	struct closing c = { .s = &self->s };
	pthread_t thread;
	pid_t pid;

	s.fd = c.fd = record(&self->s, "k", 1, LEN, LEN);
	ASSERT_LE(0, s.fd);
	buffer_size(self->c.s, 100000);
	pid = fork();
	if (!pid) {
		close(s.fd);
		sleep(1);
		_exit(recv_all(self->c.c, back, LEN - 1) || differs(back, LEN - 1, 1, 1) >= 0);
	}
	ASSERT_EQ(0, pthread_create(&thread, NULL, close_soon, &c));
	EXPECT_EQ(LEN - 1, send_ranges(self->c.s, NULL, 0, &s, 1, 0));
	pthread_join(thread, NULL);
	EXPECT_EQ(0, c.ret);
	EXPECT_EQ(0, child_status(pid)) TH_LOG("the peer has got something else");
}

TEST_F(send, a_record_of_another_store_is_sent_as_well)
{
	struct pmskb_send s = { .offset = 3, .len = 20000 };
	struct store other;
	const char *why;
	enum dev dev = variant->dev == DEV_PMEM ? DEV_DAX : DEV_PMEM;

	if (variant->link == LINK_PLAIN)
		SKIP(return, COPIED);
	if (!dev_path(dev, &why))
		SKIP(return, "%s", why);
	ASSERT_EQ(0, store_make(&other, dev, 0, 0));
	s.fd = record(&other, "k", 1, 30000, 30000);
	ASSERT_LE(0, s.fd);
	EXPECT_EQ(2 + s.len, send_ranges(self->c.s, "ab", 2, &s, 1, 0));
	close(s.fd);
	EXPECT_EQ(0, recv_all(self->c.c, back, 2 + s.len));
	EXPECT_EQ(-1, differs(back + 2, s.len, 1, 3));
	EXPECT_EQ(0, store_close(&other));
}

/* ---- as sendmsg() does ---- */

struct one_of_several {
	int sock, nr;
	uint32_t who;
	bool plain;
	struct pmskb_send s[3];
	pthread_barrier_t *begin;
	int failed;
};

struct piece {
	uint32_t who, nr;
};

#define PIECE 20000

static void *send_several(void *arg)
{
	struct one_of_several *o = arg;
	static uint8_t plain[sizeof(struct piece) + PIECE];
	struct piece p = { .who = o->who };

	if (o->plain)
		fill(plain + sizeof(p), PIECE, o->who, 0);
	pthread_barrier_wait(o->begin);
	for (; (int)p.nr < o->nr; p.nr++) {
		ssize_t n;

		memcpy(plain, &p, o->plain ? sizeof(p) : 0);
		n = o->plain ? send(o->sock, plain, sizeof(plain), 0) :
			       send_ranges(o->sock, &p, sizeof(p), RANGES(o->s), 0);
		o->failed += n != sizeof(p) + PIECE;
	}
	return NULL;
}

TEST_F(send, what_other_threads_send_does_not_come_between)
{
	enum { NR = 60, WHO = 3 };
	struct one_of_several o[WHO];
	pthread_barrier_t begin;
	pthread_t thread[WHO];
	uint32_t seen[WHO] = {}, i;
	int fd[WHO];

	/* So that nobody has to wait for room. */
	buffer_size(self->c.s, 16 << 20);
	ASSERT_EQ(0, pthread_barrier_init(&begin, NULL, WHO));
	for (i = 0; i < WHO; i++) {
		char key[2] = { 'a' + i };

		fd[i] = record(&self->s, key, i, PIECE, 1000);
		ASSERT_LE(0, fd[i]);
		o[i] = (struct one_of_several) { self->c.s, NR, i, i == WHO - 1, {
				{ .fd = fd[i], .offset = 0, .len = 5001 },
				{ .fd = fd[i], .offset = 5001, .len = 1 },
				{ .fd = fd[i], .offset = 5002, .len = PIECE - 5002 },
			}, &begin };
		ASSERT_EQ(0, pthread_create(&thread[i], NULL, send_several, &o[i]));
	}
	for (i = 0; i < WHO * NR; i++) {
		struct piece p;

		ASSERT_EQ(0, recv_all(self->c.c, &p, sizeof(p)));
		ASSERT_GT(WHO, p.who) TH_LOG("piece %u", i);
		ASSERT_EQ(seen[p.who], p.nr) TH_LOG("piece %u", i);
		ASSERT_EQ(0, recv_all(self->c.c, back, PIECE));
		ASSERT_EQ(-1, differs(back, PIECE, p.who, 0)) TH_LOG("piece %u has something of another", i);
		seen[p.who]++;
	}
	for (i = 0; i < WHO; i++) {
		pthread_join(thread[i], NULL);
		EXPECT_EQ(0, o[i].failed);
		close(fd[i]);
	}
}

TEST_F(send, without_room_it_sends_a_part_and_the_rest_can_be_computed_from_that)
{
	enum { LEN = 1500000 };
	const size_t heads[] = { 100, 700000 };
	int fd, k;

	fd = record(&self->s, "k", 1, LEN, 333333);
	ASSERT_LE(0, fd);
	for (k = 0; k < 2; k++) {
		struct pmskb_send s[] = {
			{ .fd = fd, .offset = 1, .len = LEN - 1 }, { .fd = fd, .offset = 0, .len = 1 },
			{ .fd = fd, .offset = 4096, .len = 400000 },
		}, *left = s;
		size_t head = heads[k], total = head + sum(RANGES(s)), done = 0, got = 0;
		const void *from = data;
		int nr = ARRAY_LEN(s), parts = 0;

		buffer_size(self->c.s, k ? 200000 : 30000);
		fill(data, head, 2, 0);
		while (done < total) {
			ssize_t n = send_ranges(self->c.s, from, head, left, nr, MSG_DONTWAIT);

			if (n == -EAGAIN) {
				ssize_t m = recv(self->c.c, back + got, sizeof(back) - got, MSG_DONTWAIT);
				struct pollfd p[2] = { { self->c.s, POLLOUT }, { self->c.c, POLLIN } };

				ASSERT_LT(0, poll(p, 2, 10000 * slowness())) TH_LOG("neither end goes on");
				got += m > 0 ? m : 0;
				continue;
			}
			ASSERT_LT(0, n);
			ASSERT_GE(total - done, n);
			if (!parts++) {
				EXPECT_GT(total, n) TH_LOG("all of it had room");
			}
			done += n;
			rest(&from, &head, &left, &nr, n);
		}
		EXPECT_LT(1, parts);
		ASSERT_EQ(0, recv_all(self->c.c, back + got, total - got));
		EXPECT_EQ(-1, differs(back, heads[k], 2, 0));
		EXPECT_EQ(-1, differs(back + heads[k], LEN - 1, 1, 1));
		EXPECT_EQ(-1, differs(back + heads[k] + LEN - 1, 1, 1, 0));
		EXPECT_EQ(-1, differs(back + heads[k] + LEN, 400000, 1, 4096));
	}
	close(fd);
}

struct slow_reader {
	int sock;
	uint32_t bytes, ms;
};

static void read_slowly(void *arg)
{
	struct slow_reader *r = arg;

	do
		usleep(r->ms * 1000);
	while (recv(r->sock, back, r->bytes, 0) > 0);
}

TEST_F(send, a_timeout_is_for_the_whole_call)
{
	enum { LEN = 4 << 20, MS = 600 };
	struct pmskb_send s[] = { { .len = LEN }, { .len = LEN }, { .len = LEN }, { .len = LEN }, { .len = LEN } };
	const struct timeval limit = { .tv_usec = MS * 1000 };
	struct slow_reader r = { self->c.c, 20000, 50 };
	uint64_t begin;
	ssize_t n;
	pid_t pid;
	size_t i;

	if (variant->link != LINK_LO)
		SKIP(return, ONCE);
	s[0].fd = record(&self->s, "k", 1, LEN, LEN);
	ASSERT_LE(0, s[0].fd);
	for (i = 1; i < ARRAY_LEN(s); i++)
		s[i].fd = s[0].fd;
	buffer_size(self->c.s, 200000);
	ASSERT_EQ(0, setsockopt(self->c.s, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof(limit)));
	pid = in_child(read_slowly, &r);
	begin = ms();
	n = send_ranges(self->c.s, "abc", 3, RANGES(s), 0);
	EXPECT_LT(3, n);
	EXPECT_GT(3 + sum(RANGES(s)), n);
	EXPECT_LE(MS - 10, ms() - begin);
	EXPECT_GT(3 * MS * slowness(), ms() - begin) TH_LOG("each part has a timeout of its own");
	kill(pid, SIGKILL);
	child_status(pid);
	/* Full, and nobody reads: nothing is sent. */
	while (send_ranges(self->c.s, NULL, 0, s, 1, MSG_DONTWAIT) > 0)
		usleep(10000);
	begin = ms();
	EXPECT_EQ(-EAGAIN, send_ranges(self->c.s, NULL, 0, s, 1, 0));
	EXPECT_LE(MS - 10, ms() - begin);
	close(s[0].fd);
}

static void on_alarm(int sig)
{
}

TEST_F(send, a_signal_ends_it_with_what_was_sent)
{
	enum { LEN = 8 << 20 };
	struct sigaction sa = { .sa_handler = on_alarm };
	struct itimerval soon = { .it_value.tv_usec = 300000 };
	struct pmskb_send s = { .len = LEN };
	ssize_t n;

	if (variant->link != LINK_LO)
		SKIP(return, ONCE);
	s.fd = record(&self->s, "k", 1, LEN / 4, LEN / 4);
	ASSERT_LE(0, s.fd);
	s.len = LEN / 4;
	buffer_size(self->c.s, 100000);
	ASSERT_EQ(0, sigaction(SIGALRM, &sa, NULL));
	/* As much as the receiver takes as well. */
	for (n = 1; n > 0;) {
		ASSERT_EQ(0, setitimer(ITIMER_REAL, &soon, NULL));
		n = send_ranges(self->c.s, NULL, 0, &s, 1, 0);
		if (n > 0 && n < (ssize_t)s.len)
			break;
	}
	EXPECT_LT(0, n) TH_LOG("nothing of it was sent");
	while (send_ranges(self->c.s, NULL, 0, &s, 1, MSG_DONTWAIT) > 0)
		usleep(10000);
	ASSERT_EQ(0, setitimer(ITIMER_REAL, &soon, NULL));
	EXPECT_EQ(-EINTR, send_ranges(self->c.s, NULL, 0, &s, 1, 0));
	close(s.fd);
}

static void *reset_soon(void *arg)
{
	struct closing *c = arg;

	usleep(300000);
	/* It has not read: a reset. */
	c->ret = close(c->sock);
	return NULL;
}

TEST_F(send, a_connection_that_breaks_is_an_error_of_the_next_call)
{
	enum { LEN = 3 << 20 };
	struct pmskb_send s = { .len = LEN };
	struct closing c = { .sock = self->c.c };
	struct sigaction sa = { .sa_handler = on_alarm };
	pthread_t thread;
	ssize_t n;
	int k;

	s.fd = record(&self->s, "k", 1, LEN, LEN);
	ASSERT_LE(0, s.fd);
	buffer_size(self->c.s, 100000);
	ASSERT_EQ(0, pthread_create(&thread, NULL, reset_soon, &c));
	n = send_ranges(self->c.s, "abc", 3, &s, 1, 0);
	pthread_join(thread, NULL);
	self->c.c = -1;
	EXPECT_LT(0, n);
	EXPECT_GT(LEN, n);
	EXPECT_EQ(-ECONNRESET, send_ranges(self->c.s, NULL, 0, &s, 1, 0)) TH_LOG("the error was lost");
	EXPECT_EQ(-EPIPE, send_ranges(self->c.s, NULL, 0, &s, 1, MSG_NOSIGNAL));
	/* Without that flag there is a signal, which interrupts. */
	for (k = 0; k < 2; k++) {
		sigset_t set, was;
		siginfo_t info;

		sigemptyset(&set);
		sigaddset(&set, SIGPIPE);
		sigaction(SIGPIPE, &sa, NULL);
		sigprocmask(SIG_BLOCK, &set, &was);
		EXPECT_EQ(-EPIPE, send_ranges(self->c.s, "abc", k * 3, &s, 1, 0));
		EXPECT_EQ(SIGPIPE, sigtimedwait(&set, &info, &(struct timespec) {}));
		EXPECT_EQ(-EPIPE, send_ranges(self->c.s, "abc", k * 3, &s, 1, MSG_NOSIGNAL));
		EXPECT_EQ(-1, sigtimedwait(&set, &info, &(struct timespec) {}));
		sigprocmask(SIG_SETMASK, &was, NULL);
	}
	close(s.fd);
}

static uint32_t segments(int fd)
{
	struct tcp_info info = {};
	socklen_t len = sizeof(info);

	getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &len);
	return info.tcpi_data_segs_out;
}

TEST_F(send, header_and_payload_are_one_segment_and_msg_more_keeps_them_back)
{
	struct pmskb_send s[] = { { .offset = 5, .len = 300 }, { .offset = 1, .len = 400 } };
	uint32_t before = segments(self->c.s);
	ssize_t n;

	s[0].fd = s[1].fd = record(&self->s, "k", 1, 1000, 1000);
	ASSERT_LE(0, s[0].fd);
	ASSERT_EQ(703, send_ranges(self->c.s, "abc", 3, RANGES(s), 0));
	ASSERT_EQ(0, recv_all(self->c.c, back, 703));
	EXPECT_EQ(before + 1, segments(self->c.s));
	EXPECT_EQ(-1, differs(back + 3, 300, 1, 5));
	EXPECT_EQ(-1, differs(back + 303, 400, 1, 1));

	ASSERT_EQ(703, send_ranges(self->c.s, "abc", 3, RANGES(s), MSG_MORE));
	EXPECT_EQ(703, queued(self->c.s, SIOCOUTQNSD));
	EXPECT_EQ(EAGAIN, ERRNO(recv(self->c.c, back, 1, MSG_DONTWAIT)));
	ASSERT_EQ(703, send_ranges(self->c.s, "def", 3, RANGES(s), 0));
	ASSERT_EQ(0, recv_all(self->c.c, back, 1406));
	EXPECT_EQ(before + 2, segments(self->c.s));
	EXPECT_EQ(0, memcmp(back + 703, "def", 3));
	EXPECT_EQ(-1, differs(back + 706, 300, 1, 5));

	/* The end of a record of the application's is the end of a segment. */
	n = send_ranges(self->c.s, "abc", 3, RANGES(s), MSG_MORE | MSG_EOR);
	ASSERT_EQ(703, n);
	ASSERT_EQ(703, send_ranges(self->c.s, "def", 3, RANGES(s), 0));
	ASSERT_EQ(0, recv_all(self->c.c, back, 1406));
	EXPECT_EQ(before + 4, segments(self->c.s)) TH_LOG("MSG_EOR had no effect");
	close(s[0].fd);
}

TEST_F(send, what_ends_early_is_not_kept_back)
{
	/* Less than a segment: an acknowledgement would push the rest. */
	enum { GOOD = 48 << 10 };
	struct pmskb_send s = { .len = 1000 };
	uint8_t *page = mmap(NULL, GOOD + 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	uint64_t begin;
	ssize_t n;

	if (variant->link != LINK_LO)
		SKIP(return, ONCE);
	ASSERT_NE(MAP_FAILED, page);
	ASSERT_EQ(0, munmap(page + GOOD, 4096));
	s.fd = record(&self->s, "k", 1, 1000, 1000);
	ASSERT_LE(0, s.fd);
	fill(page, GOOD, 2, 0);
	/* So that there is a copy of less than half of the window first, and another one then. */
	ASSERT_EQ(0, send_all(self->c.s, page, 4000));
	ASSERT_EQ(0, recv_all(self->c.c, back, 4000));
	/* Not all of the header can be read. */
	begin = ms();
	n = send_ranges(self->c.s, page, GOOD + 1, &s, 1, 0);
	EXPECT_LT(0, n);
	EXPECT_GE(GOOD, n);
	EXPECT_EQ(0, queued(self->c.s, SIOCOUTQNSD)) TH_LOG("of %zd bytes some are kept back", n);
	ASSERT_EQ(0, recv_all(self->c.c, back, n));
	EXPECT_EQ(-1, differs(back, n, 2, 0));
	/* There are timers that would have sent it later. */
	EXPECT_GT(150 * slowness(), ms() - begin) TH_LOG("it was kept back");
	EXPECT_EQ(-EFAULT, send_ranges(self->c.s, BAD_PTR, 16, &s, 1, 0));
	nothing_else(_metadata, &self->c);
	munmap(page, GOOD);
	close(s.fd);
}

/* ---- with other control messages and flags ---- */

/* A message with one control message of any kind, before a range or after it. */
static ssize_t send_with(int fd, const char *head, const struct pmskb_send *s, bool first, int level, int type,
			 const void *value, size_t len, int flags)
{
	char control[256] = {};
	struct iovec iov = { (void *)head, strlen(head) };
	struct msghdr msg = {
		.msg_iov = &iov,
		.msg_iovlen = 1,
		.msg_control = control,
		.msg_controllen = (s ? CMSG_SPACE(sizeof(*s)) : 0) + CMSG_SPACE(len),
	};
	struct cmsghdr *c = CMSG_FIRSTHDR(&msg);
	ssize_t n;
	int i;

	for (i = 0; i < 1 + !!s; i++, c = CMSG_NXTHDR(&msg, c)) {
		bool ours = s && first != !i;

		c->cmsg_level = ours ? SOL_PMSKB : level;
		c->cmsg_type = ours ? PMSKB_CMSG_SEND : type;
		c->cmsg_len = CMSG_LEN(ours ? sizeof(*s) : len);
		memcpy(CMSG_DATA(c), ours ? s : value, ours ? sizeof(*s) : len);
	}
	n = sendmsg(fd, &msg, flags);
	return n < 0 ? -errno : n;
}

/* What the error queue tells next: the number of a timestamp or of a completion; -errno. */
static int64_t told(int fd, int ms_to_wait, int *origin)
{
	char control[512];
	struct msghdr msg = { .msg_control = control, .msg_controllen = sizeof(control) };
	struct pollfd p = { fd, 0 };
	struct cmsghdr *c;

	if (poll(&p, 1, ms_to_wait) <= 0)
		return -EAGAIN;
	if (recvmsg(fd, &msg, MSG_ERRQUEUE) < 0)
		return -errno;
	for (c = CMSG_FIRSTHDR(&msg); c; c = CMSG_NXTHDR(&msg, c)) {
		struct sock_extended_err *err = (void *)CMSG_DATA(c);

		if ((c->cmsg_level == SOL_IP && c->cmsg_type == IP_RECVERR) ||
		    (c->cmsg_level == SOL_IPV6 && c->cmsg_type == IPV6_RECVERR)) {
			*origin = err->ee_origin;
			return err->ee_data;
		}
	}
	return -ENOMSG;
}

TEST_F(send, a_timestamp_is_that_of_the_last_byte)
{
	enum { LEN = 1 << 20 };
	uint32_t how = SOF_TIMESTAMPING_SOFTWARE | SOF_TIMESTAMPING_OPT_ID | SOF_TIMESTAMPING_OPT_TSONLY;
	uint32_t what = SOF_TIMESTAMPING_TX_ACK, none = 0;
	struct pmskb_send s = { .len = LEN };
	struct slow_reader r = { self->c.c, 65536, 0 };
	int origin = 0, k;
	pid_t pid;

	s.fd = record(&self->s, "k", 1, LEN, LEN);
	ASSERT_LE(0, s.fd);
	buffer_size(self->c.s, 8 << 20);
	pid = in_child(read_slowly, &r);
	ASSERT_EQ(0, setsockopt(self->c.s, SOL_SOCKET, SO_TIMESTAMPING, &how, sizeof(how)));
	/* Asked for by the message, wherever in it. */
	for (k = 0; k < 2; k++) {
		ASSERT_EQ(3 + LEN, send_with(self->c.s, "abc", &s, k, SOL_SOCKET, SO_TIMESTAMPING, &what, sizeof(what), 0));
		EXPECT_EQ((k + 1) * (3 + LEN) - 1, told(self->c.s, 5000 * slowness(), &origin));
		EXPECT_EQ(SO_EE_ORIGIN_TIMESTAMPING, origin);
		EXPECT_EQ(-EAGAIN, told(self->c.s, 200, &origin)) TH_LOG("there is another one");
	}
	/* And by the socket. */
	how |= what;
	ASSERT_EQ(0, setsockopt(self->c.s, SOL_SOCKET, SO_TIMESTAMPING, &how, sizeof(how)));
	ASSERT_EQ(3 + LEN, send_ranges(self->c.s, "abc", 3, &s, 1, 0));
	EXPECT_EQ(3 * (3 + LEN) - 1, told(self->c.s, 5000 * slowness(), &origin));
	EXPECT_EQ(-EAGAIN, told(self->c.s, 200, &origin)) TH_LOG("there is another one");
	ASSERT_EQ(3 + LEN, send_with(self->c.s, "abc", &s, true, SOL_SOCKET, SO_TIMESTAMPING, &none, sizeof(none), 0));
	EXPECT_EQ(-EAGAIN, told(self->c.s, 200, &origin));
	kill(pid, SIGKILL);
	child_status(pid);
	close(s.fd);
}

TEST_F(send, other_control_messages_are_the_sockets)
{
	struct pmskb_send s = { .len = 1000 };
	uint32_t value = 1;
	uint64_t when = 0;
	int k;

	if (variant->link != LINK_LO)
		SKIP(return, ONCE);
	s.fd = record(&self->s, "k", 1, 1000, 1000);
	ASSERT_LE(0, s.fd);
	for (k = 0; k < 2; k++) {
#define WITH(level, type, value) send_with(self->c.s, "abc", &s, k, level, type, &(value), sizeof(value), 0)
		/* Of another level: not TCP's. */
		EXPECT_EQ(1003, WITH(SOL_IP, IP_TOS, value));
		EXPECT_EQ(1003, WITH(SOL_SOCKET, SO_MARK, value));
		EXPECT_EQ(0, recv_all(self->c.c, back, 2006));
		EXPECT_EQ(-1, differs(back + 1006, 1000, 1, 0));
		/* As without ours. */
		EXPECT_EQ(-EINVAL, WITH(SOL_SOCKET, SO_MARK, when));
		EXPECT_EQ(-EINVAL, WITH(SOL_SOCKET, SCM_TXTIME, when));
		EXPECT_EQ(-EINVAL, WITH(SOL_SOCKET, 0x7fff, value));
		nothing_else(_metadata, &self->c);
	}
	close(s.fd);
}

TEST_F(send, msg_zerocopy_is_for_the_header)
{
	struct pmskb_send s = { .offset = 1, .len = 100000 };
	const int on = 1;
	int origin = 0, k;

	if (variant->link != LINK_LO)
		SKIP(return, ONCE);
	s.fd = record(&self->s, "k", 1, 100001, 100001);
	ASSERT_LE(0, s.fd);
	ASSERT_EQ(0, setsockopt(self->c.s, SOL_SOCKET, SO_ZEROCOPY, &on, sizeof(on)));
	buffer_size(self->c.s, 8 << 20);
	fill(data, 50000, 2, 0);
	for (k = 0; k < 2; k++) {
		ASSERT_EQ(150000, send_ranges(self->c.s, data, 50000, &s, 1, MSG_ZEROCOPY));
		ASSERT_EQ(0, recv_all(self->c.c, back, 150000));
		EXPECT_EQ(-1, differs(back, 50000, 2, 0));
		EXPECT_EQ(-1, differs(back + 50000, 100000, 1, 1));
		EXPECT_EQ(k, told(self->c.s, 5000 * slowness(), &origin));
		EXPECT_EQ(SO_EE_ORIGIN_ZEROCOPY, origin);
	}
	/* Without one there is nothing to be told. */
	ASSERT_EQ(100000, send_ranges(self->c.s, NULL, 0, &s, 1, MSG_ZEROCOPY));
	ASSERT_EQ(0, recv_all(self->c.c, back, 100000));
	EXPECT_EQ(-1, differs(back, 100000, 1, 1));
	EXPECT_EQ(-EAGAIN, told(self->c.s, 200, &origin));
	close(s.fd);
}

TEST_F(send, msg_fastopen_connects_and_sends)
{
	struct pmskb_send s = { .offset = 1, .len = 100000 };
	const int on = 1;
	int l, k, fd;

	if (variant->link == LINK_PLAIN)
		SKIP(return, "as over others");
	s.fd = record(&self->s, "k", 1, 100001, 100001);
	ASSERT_LE(0, s.fd);
	/* From here to the client's place; both ends have Fast Open. */
	write_file("/proc/sys/net/ipv4", "tcp_fastopen", "519");
	for (k = 0; k < 6; k++) {
		struct sockaddr_storage addr;
		struct net here = { variant->family, LINK_LO };
		char head[4] = {};
		char control[CMSG_SPACE(sizeof(s))] = {};
		struct iovec iov = { "abc", 3 };
		struct msghdr msg = {
			.msg_name = &addr, .msg_iov = &iov, .msg_iovlen = k % 3 < 2,
			.msg_control = control, .msg_controllen = sizeof(control),
		};
		struct cmsghdr *c = CMSG_FIRSTHDR(&msg);
		struct conn two = { -1, -1 };
		size_t len = k % 3 < 2 ? 3 : 0;

		c->cmsg_level = SOL_PMSKB;
		c->cmsg_type = PMSKB_CMSG_SEND;
		c->cmsg_len = CMSG_LEN(sizeof(s));
		memcpy(CMSG_DATA(c), &s, sizeof(s));
		l = net_listen(&here, &addr, &msg.msg_namelen);
		ASSERT_LE(0, l);
		setsockopt(l, IPPROTO_TCP, TCP_FASTOPEN, &on, sizeof(on));
		fd = net_client(&here);
		ASSERT_LE(0, fd);
		ASSERT_EQ(0, sock_attach_ioctl(fd, self->s.fd));
		two.s = fd;
		if (k >= 3) {
			/* By an option, and then any send. */
			ASSERT_EQ(0, setsockopt(fd, IPPROTO_TCP, TCP_FASTOPEN_CONNECT, &on, sizeof(on)));
			ASSERT_EQ(0, connect(fd, msg.msg_name, msg.msg_namelen));
			msg.msg_name = NULL;
			msg.msg_namelen = 0;
		}
		EXPECT_EQ((ssize_t)(len + s.len), sendmsg(fd, &msg, k < 3 ? MSG_FASTOPEN : 0)) TH_LOG("%d: %m", k);
		two.c = accept(l, NULL, NULL);
		ASSERT_LE(0, two.c);
		timeout_set(two.c, 10000 * slowness());
		EXPECT_EQ(0, recv_all(two.c, head, len));
		EXPECT_EQ(0, memcmp(head, "abc", len));
		EXPECT_EQ(0, recv_all(two.c, back, s.len));
		EXPECT_EQ(-1, differs(back, s.len, 1, 1)) TH_LOG("%d", k);
		conn_close(&two);
		close(l);
	}
	write_file("/proc/sys/net/ipv4", "tcp_fastopen", "1");
	close(s.fd);
}

/* ---- what is refused ---- */

TEST_F(send, what_cannot_be_sent_says_why_and_nothing_is_sent)
{
	struct pmskb_send good = { .len = 1000 }, two[2];
	struct pmskb_store_info before, info;
	int fd, path, pipes[2];
	char longer[sizeof(good) + 8] = {};

	if (variant->link != LINK_LO)
		SKIP(return, ONCE);
	fd = good.fd = record(&self->s, "k", 1, 1000, 1000);
	ASSERT_LE(0, fd);
	ASSERT_EQ(0, store_quiet(&self->s, 5000, &before));
#define SEND(...) \
	send_ranges(self->c.s, "abc", 3, &(struct pmskb_send) { __VA_ARGS__ }, 1, 0)
	EXPECT_EQ(-EINVAL, SEND(.fd = fd, .len = 0));
	EXPECT_EQ(-EINVAL, SEND(.fd = fd, .offset = 1000, .len = 0));
	EXPECT_EQ(-EINVAL, SEND(.fd = fd, .len = 1001));
	EXPECT_EQ(-EINVAL, SEND(.fd = fd, .offset = 1, .len = 1000));
	EXPECT_EQ(-EINVAL, SEND(.fd = fd, .offset = 1000, .len = 1));
	EXPECT_EQ(-EINVAL, SEND(.fd = fd, .offset = ~0ULL, .len = 1));
	EXPECT_EQ(-EINVAL, SEND(.fd = fd, .offset = 1, .len = ~0ULL));
	EXPECT_EQ(-EINVAL, SEND(.fd = fd, .offset = 1ULL << 63, .len = 1ULL << 63));
	EXPECT_EQ(-EINVAL, SEND(.fd = fd, .reserved = 1, .len = 1));
	EXPECT_EQ(-EBADF, SEND(.fd = -1, .len = 1));
	EXPECT_EQ(-EBADF, SEND(.fd = 1 << 20, .len = 1));
	EXPECT_EQ(-EBADF, SEND(.fd = INT_MIN, .len = 1));
	path = open("/", O_PATH | O_CLOEXEC);
	EXPECT_EQ(-EBADF, SEND(.fd = path, .len = 1));
	close(path);
	EXPECT_EQ(-EBADF, SEND(.fd = path, .len = 1));
	/* No records. */
	EXPECT_EQ(-EINVAL, SEND(.fd = self->s.fd, .len = 1));
	EXPECT_EQ(-EINVAL, SEND(.fd = self->c.s, .len = 1));
	ASSERT_EQ(0, pipe(pipes));
	EXPECT_EQ(-EINVAL, SEND(.fd = pipes[0], .len = 1));
	close(pipes[0]);
	close(pipes[1]);
	/* One of several. */
	two[0] = good;
	two[1] = (struct pmskb_send) { .fd = fd, .offset = 1, .len = 1000 };
	EXPECT_EQ(-EINVAL, send_ranges(self->c.s, "abc", 3, RANGES(two), 0));
	/* Another size, another type. */
#define OURS(type, value, len) send_with(self->c.s, "abc", NULL, false, SOL_PMSKB, type, value, len, 0)
	memcpy(longer, &good, sizeof(good));
	EXPECT_EQ(-EINVAL, OURS(PMSKB_CMSG_SEND, &good, sizeof(good) - 1));
	EXPECT_EQ(-EINVAL, OURS(PMSKB_CMSG_SEND, longer, sizeof(longer)));
	EXPECT_EQ(-EINVAL, OURS(PMSKB_CMSG_SEND, NULL, 0));
	EXPECT_EQ(-EINVAL, OURS(PMSKB_CMSG_DESC, &good, sizeof(good)));
	EXPECT_EQ(-EINVAL, OURS(-1, &good, sizeof(good)));
	EXPECT_EQ(1003, OURS(PMSKB_CMSG_SEND, &good, sizeof(good)));
	ASSERT_EQ(0, recv_all(self->c.c, back, 1003));
	/* Urgent would be the last byte: one of the record. */
	EXPECT_EQ(-EOPNOTSUPP, send_ranges(self->c.s, "abc", 3, &good, 1, MSG_OOB));
	nothing_else(_metadata, &self->c);
	/* A length of a control message that leads out of them, or nowhere. */
	{
		const size_t lens[] = { 0, 1, sizeof(struct cmsghdr) - 1, CMSG_SPACE(sizeof(good)) + 1, 1UL << 62, ~0UL };
		size_t i;

		for (i = 0; i < ARRAY_LEN(lens); i++) {
			char control[2 * CMSG_SPACE(sizeof(good))] = {};
			struct iovec iov = { "abc", 3 };
			struct msghdr msg = {
				.msg_iov = &iov, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof(control),
			};
			struct cmsghdr *c = CMSG_FIRSTHDR(&msg);

			*c = (struct cmsghdr) { CMSG_LEN(sizeof(good)), SOL_PMSKB, PMSKB_CMSG_SEND };
			memcpy(CMSG_DATA(c), &good, sizeof(good));
			c = CMSG_NXTHDR(&msg, c);
			*c = (struct cmsghdr) { lens[i], SOL_PMSKB, PMSKB_CMSG_SEND };
			EXPECT_EQ(-EINVAL, ERRNO(sendmsg(self->c.s, &msg, 0)) * -1) TH_LOG("a length of %#lx", lens[i]);
		}
	}
	nothing_else(_metadata, &self->c);
	/* Not connected, and listening. */
	{
		struct sockaddr_storage addr;
		socklen_t len;
		int l = net_listen(&self->net, &addr, &len), alone = net_client(&self->net);

		ASSERT_EQ(0, sock_attach_ioctl(l, self->s.fd));
		ASSERT_EQ(0, sock_attach_ioctl(alone, self->s.fd));
		EXPECT_EQ(-EPIPE, send_ranges(l, "abc", 3, &good, 1, MSG_NOSIGNAL));
		EXPECT_EQ(-EPIPE, send_ranges(alone, "abc", 3, &good, 1, MSG_NOSIGNAL));
		EXPECT_EQ(-EPIPE, send_ranges(alone, NULL, 0, &good, 1, MSG_NOSIGNAL));
		close(l);
		close(alone);
	}
	ASSERT_EQ(0, shutdown(self->c.s, SHUT_WR));
	EXPECT_EQ(-EPIPE, send_ranges(self->c.s, "abc", 3, &good, 1, MSG_NOSIGNAL));
	EXPECT_EQ(-EPIPE, send_ranges(self->c.s, NULL, 0, &good, 1, MSG_NOSIGNAL));
	ASSERT_EQ(0, store_quiet(&self->s, 5000, &info));
	EXPECT_EQ(before.frames_held, info.frames_held);
	close(fd);
}

TEST_F(send, on_a_plain_socket_it_means_nothing)
{
	struct pmskb_send bad = { .fd = -1, .len = 5 };
	struct conn plain;

	if (variant->link != LINK_LO)
		SKIP(return, ONCE);
	ASSERT_EQ(0, conn_make(&plain, &self->net, -1, HOW_PLAIN));
	EXPECT_EQ(3, send_ranges(plain.s, "abc", 3, &bad, 1, 0));
	ASSERT_EQ(0, recv_all(plain.c, back, 3));
	nothing_else(_metadata, &plain);
	/* With the protocol alone, and no store, it is ours. */
	ASSERT_EQ(0, sock_ulp(plain.s));
	EXPECT_EQ(-EBADF, send_ranges(plain.s, "abc", 3, &bad, 1, 0));
	bad.fd = record(&self->s, "k", 1, 5, 5);
	EXPECT_EQ(8, send_ranges(plain.s, "abc", 3, &bad, 1, 0));
	ASSERT_EQ(0, recv_all(plain.c, back, 8));
	EXPECT_EQ(-1, differs(back + 3, 5, 1, 0));
	close(bad.fd);
	conn_close(&plain);
}

TEST_F(send, datagrams_have_no_room_for_it)
{
	struct net net = { variant->family, LINK_LO, SOCK_DGRAM };
	struct sockaddr_storage addr;
	struct pmskb_send s = { .len = 5 };
	uint32_t value = 0;
	socklen_t len;
	int in, out;

	if (variant->link == LINK_PLAIN)
		SKIP(return, "as over others");
	in = net_listen(&net, &addr, &len);
	ASSERT_LE(0, in);
	out = net_connect(&net, &addr, len);
	ASSERT_LE(0, out);
	s.fd = record(&self->s, "k", 1, 5, 5);
	ASSERT_LE(0, s.fd);
	EXPECT_EQ(3, send_ranges(out, "abc", 3, &s, 1, 0));
	ASSERT_EQ(0, sock_attach_ioctl(out, self->s.fd));
	EXPECT_EQ(-EOPNOTSUPP, send_ranges(out, "def", 3, &s, 1, 0));
	EXPECT_EQ(-EOPNOTSUPP, send_ranges(out, NULL, 0, &s, 1, 0));
	/* Others, and none, are UDP's. */
	EXPECT_EQ(3, send_with(out, "ghi", NULL, false, SOL_SOCKET, SO_TIMESTAMPING, &value, sizeof(value), 0));
	EXPECT_EQ(3, send(out, "jkl", 3, 0));
	timeout_set(in, 5000 * slowness());
	EXPECT_EQ(3, recv(in, back, 10, 0));
	EXPECT_EQ(3, recv(in, back + 3, 10, 0));
	EXPECT_EQ(3, recv(in, back + 6, 10, 0));
	EXPECT_EQ(0, memcmp(back, "abcghijkl", 9));
	EXPECT_EQ(EAGAIN, ERRNO(recv(in, back, 10, MSG_DONTWAIT)));
	close(s.fd);
	close(in);
	close(out);
}

TEST_HARNESS_MAIN
