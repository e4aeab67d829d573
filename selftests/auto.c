// SPDX-License-Identifier: GPL-2.0
/*
 * Promises about PMSKB_AUTO_PERSIST: what a call returns has its record before it returns, by
 * whichever call; what nobody reads has one soon; the record says where in which stream it was.
 * The log is read by media_scan(), from the mapping.
 */
#include "common.h"
#include "media.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/io_uring.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>

#include "harness.h"

#define ERRNO(call) ((call) < 0 ? errno : 0)
#define SEED 77

FIXTURE(automatic) {
	struct store s;
	struct conn c;
	struct net net;
	struct sockaddr_storage local, peer;
};

FIXTURE_VARIANT(automatic) {
	int family;
	enum dev dev;
	enum link link;
	enum how how;
};

FIXTURE_VARIANT_ADD(automatic, v4_pmem_lo) { AF_INET, DEV_PMEM, LINK_LO, HOW_ACCEPTED_OPT };
FIXTURE_VARIANT_ADD(automatic, v6_dax_veth) { AF_INET6, DEV_DAX, LINK_VETH, HOW_LISTENER_IOCTL };
FIXTURE_VARIANT_ADD(automatic, v4_pmem_noffload) { AF_INET, DEV_PMEM, LINK_PLAIN, HOW_LISTENER_OPT };

static int get_auto(int fd)
{
	uint32_t on = 99;
	socklen_t len = sizeof(on);

	return getsockopt(fd, SOL_PMSKB, PMSKB_AUTO_PERSIST, &on, &len) ? -errno : (int)on;
}

/* A connection whose server's end has it; inherited, if it is attached that way. */
static void connect_to(struct __test_metadata *_metadata, struct net *net, int store_fd, enum how how,
		       struct conn *c)
{
	struct sockaddr_storage addr;
	socklen_t len = sizeof(addr);
	int l;

	if (how != HOW_LISTENER_IOCTL) {
		ASSERT_EQ(0, conn_make(c, net, store_fd, how));
		ASSERT_EQ(0, get_auto(c->s));
		ASSERT_EQ(0, set_auto(c->s, 1));
		return;
	}
	l = net_listen(net, &addr, &len);
	ASSERT_LE(0, l);
	ASSERT_EQ(0, sock_attach_ioctl(l, store_fd));
	ASSERT_EQ(0, set_auto(l, 1));
	c->c = net_connect(net, &addr, len);
	ASSERT_LE(0, c->c);
	c->s = accept(l, NULL, NULL);
	ASSERT_LE(0, c->s);
	close(l);
	timeout_set(c->s, 20000 * slowness());
	timeout_set(c->c, 20000 * slowness());
}

FIXTURE_SETUP(automatic)
{
	socklen_t len = sizeof(self->local);
	const char *why;

	self->net = (struct net) { variant->family, variant->link };
	if (!dev_path(variant->dev, &why))
		SKIP(return, "%s", why);
	why = net_up(variant->link);
	if (why)
		SKIP(return, "%s", why);
	ASSERT_EQ(0, store_make(&self->s, variant->dev, 0, 0));
	connect_to(_metadata, &self->net, self->s.fd, variant->how, &self->c);
	ASSERT_EQ(1, get_auto(self->c.s));
	ASSERT_EQ(0, getsockname(self->c.s, (void *)&self->local, &len));
	len = sizeof(self->peer);
	ASSERT_EQ(0, getpeername(self->c.s, (void *)&self->peer, &len));
}

FIXTURE_TEARDOWN(automatic)
{
	struct pmskb_store_info info;

	conn_close(&self->c);
	EXPECT_EQ(0, store_quiet(&self->s, 5000 * slowness(), &info));
	EXPECT_EQ(0, info.frames_held);
	EXPECT_EQ(0, store_close(&self->s));
}

/* ---- what the log has ---- */

struct piece {
	uint64_t seq;
	uint32_t tcp_seq, len;
	uint8_t *bytes;
};

struct stream {
	struct __test_metadata *_metadata;
	const struct sockaddr_storage *local, *peer;
	struct piece piece[8192];
	int nr, others;
};

static bool same_end(const struct sockaddr_storage *at, const struct record *r, bool remote)
{
	const uint8_t *addr = remote ? r->remote : r->local;
	uint16_t port = remote ? r->remote_port : r->local_port;

	if (at->ss_family == AF_INET) {
		const struct sockaddr_in *in = (const void *)at;

		return r->family == 4 && ntohs(in->sin_port) == port && !memcmp(&in->sin_addr, addr, 4);
	}
	const struct sockaddr_in6 *in6 = (const void *)at;

	return r->family == 6 && ntohs(in6->sin6_port) == port && !memcmp(&in6->sin6_addr, addr, 16);
}

static int collect(struct record *r, void *arg)
{
	struct stream *s = arg;
	struct __test_metadata *_metadata = s->_metadata;

	EXPECT_FALSE(r->keyed);
	EXPECT_EQ(ntohs(rfc1071(r->bytes, r->len)), r->csum) TH_LOG("record %lu", r->seq);
	EXPECT_NE(0, REC_TIME_SOURCE(r->flags));
	if (!same_end(s->peer, r, true) || !same_end(s->local, r, false)) {
		s->others++;
		return 0;
	}
	ASSERT_GT(ARRAY_LEN(s->piece), s->nr) return -1;
	s->piece[s->nr++] = (struct piece) { r->seq, r->tcp_seq, r->len, memcpy(malloc(r->len), r->bytes, r->len) };
	return 0;
}

static int by_seq(const void *a, const void *b)
{
	const struct piece *x = a, *y = b;

	return x->seq < y->seq ? -1 : x->seq > y->seq;
}

/*
 * How many bytes of the connection the log has, each once, in order and right from the first on;
 * -1 if not. *nr is the number of records.
 */
static int64_t logged_of(struct __test_metadata *_metadata, const struct store *s,
			 const struct sockaddr_storage *local, const struct sockaddr_storage *peer, int *nr)
{
	static struct stream st;
	int64_t bytes = 0;
	bool right = true;
	uint32_t next = 0;
	int i;

	st = (struct stream) { ._metadata = _metadata, .local = local, .peer = peer };
	if (media_scan(s->map, s->map_len, collect, &st) < 0)
		return -1;
	qsort(st.piece, st.nr, sizeof(st.piece[0]), by_seq);
	for (i = 0; i < st.nr; i++) {
		struct piece *p = &st.piece[i];

		if ((i && p->tcp_seq != next) || differs(p->bytes, p->len, SEED, bytes) >= 0) {
			TH_LOG("record %lu: sequence %u, expected %u, at %ld", p->seq, p->tcp_seq, next, bytes);
			right = false;
		}
		next = p->tcp_seq + p->len;
		bytes += p->len;
		free(p->bytes);
	}
	if (nr)
		*nr = st.nr;
	return right ? bytes : -1;
}

#define LOGGED() logged_of(_metadata, &self->s, &self->local, &self->peer, NULL)
#define RECORDS() ({ int nr_; logged_of(_metadata, &self->s, &self->local, &self->peer, &nr_); nr_; })

/* Sends len bytes of the stream, which is at pos. */
static void put(struct __test_metadata *_metadata, int fd, size_t pos, size_t len)
{
	static char buf[1 << 20];

	ASSERT_GE(sizeof(buf), len);
	fill(buf, len, SEED, pos);
	ASSERT_EQ(0, send_all(fd, buf, len));
}

/* Waits until so many bytes can be read. */
static bool waits(int fd, int bytes)
{
	int i, n = 0;

	for (i = 0; i < 5000 * slowness(); i++) {
		if (ioctl(fd, FIONREAD, &n) || n >= bytes)
			break;
		usleep(1000);
	}
	return n >= bytes;
}

/* ---- the promises ---- */

TEST_F(automatic, what_a_receive_returns_has_its_record)
{
	static char buf[70000];
	size_t sizes[] = { 1, 7, 1448, 100, 5000, 65536, 3 }, got = 0, sent = 0;
	unsigned int i;

	for (i = 0; i < ARRAY_LEN(sizes); i++) {
		put(_metadata, self->c.c, sent, sizes[i]);
		sent += sizes[i];
		while (got < sent) {
			/* Less than a packet, and more. */
			size_t want = i % 2 ? 999 : sizeof(buf);
			ssize_t n = recv(self->c.s, buf, want, 0);

			ASSERT_LT(0, n);
			EXPECT_LE(got + n, logged_bytes(self->c.s));
			EXPECT_EQ(-1, differs(buf, n, SEED, got));
			got += n;
		}
		ASSERT_EQ(got, LOGGED());
	}
	EXPECT_EQ(sent, logged_bytes(self->c.s));
}

TEST_F(automatic, a_packet_is_a_record_and_its_checksum_costs_nothing)
{
	enum { NR = 20, LEN = 500 };
	struct pmskb_store_info before, after;
	char buf[LEN];
	int i;

	ASSERT_EQ(0, store_info(&self->s, &before));
	for (i = 0; i < NR; i++) {
		put(_metadata, self->c.c, i * LEN, LEN);
		ASSERT_EQ(0, recv_all(self->c.s, buf, LEN));
	}
	ASSERT_EQ(NR * LEN, LOGGED());
	EXPECT_EQ(NR, RECORDS());
	ASSERT_EQ(0, store_info(&self->s, &after));
	EXPECT_EQ(NR, after.counters.placed - before.counters.placed);
	/* Placement reads each once at most; records would be a second time. */
	EXPECT_GE(NR * LEN, after.counters.computed_bytes - before.counters.computed_bytes)
		TH_LOG("records read what they are of");
}

TEST_F(automatic, what_nobody_reads_has_its_record_soon)
{
	char buf[5000];

	put(_metadata, self->c.c, 0, 5000);
	ASSERT_TRUE(waits(self->c.s, 5000));
	ASSERT_TRUE(comes_to(self->c.s, 5000));
	ASSERT_EQ(5000, LOGGED());
	/* And once only: neither by what comes later, nor by the receive. */
	put(_metadata, self->c.c, 5000, 3000);
	ASSERT_TRUE(comes_to(self->c.s, 8000));
	ASSERT_EQ(0, recv_all(self->c.s, buf, 5000));
	EXPECT_EQ(-1, differs(buf, 5000, SEED, 0));
	EXPECT_EQ(8000, LOGGED());
	ASSERT_EQ(0, recv_all(self->c.s, buf, 3000));
	EXPECT_EQ(8000, LOGGED());
}

TEST_F(automatic, what_is_closed_unread_has_its_record)
{
	struct pmskb_store_info info;

	/* At once: the work item for sockets that nobody reads has hardly begun. */
	put(_metadata, self->c.c, 0, 20000);
	ASSERT_TRUE(waits(self->c.s, 20000));
	close(self->c.s);
	self->c.s = -1;
	EXPECT_EQ(20000, LOGGED());
	ASSERT_EQ(0, store_info(&self->s, &info));
	EXPECT_EQ(20000, info.counters.logged_bytes);
}

TEST_F(automatic, what_is_disconnected_unread_has_its_record)
{
	struct sockaddr none = { .sa_family = AF_UNSPEC };

	put(_metadata, self->c.c, 0, 20000);
	ASSERT_TRUE(waits(self->c.s, 20000));
	ASSERT_EQ(0, connect(self->c.s, &none, sizeof(none)));
	EXPECT_EQ(20000, LOGGED());
}

TEST_F(automatic, what_came_before_a_reset_has_its_record)
{
	struct linger now = { 1, 0 };
	char buf[2000];

	put(_metadata, self->c.c, 0, 2000);
	ASSERT_TRUE(waits(self->c.s, 2000));
	ASSERT_EQ(0, setsockopt(self->c.c, SOL_SOCKET, SO_LINGER, &now, sizeof(now)));
	close(self->c.c);
	self->c.c = -1;
	usleep(100000);
	/* As from a plain socket: what was received, then the error. */
	ASSERT_TRUE(comes_to(self->c.s, 2000));
	if (recv(self->c.s, buf, sizeof(buf), MSG_DONTWAIT) == 2000)
		EXPECT_EQ(-1, differs(buf, 2000, SEED, 0));
	EXPECT_EQ(2000, LOGGED());
}

TEST_F(automatic, the_records_are_there_after_the_store_was_attached_anew)
{
	char buf[3000];

	put(_metadata, self->c.c, 0, 3000);
	ASSERT_EQ(0, recv_all(self->c.s, buf, 3000));
	conn_close(&self->c);
	ASSERT_EQ(0, store_close(&self->s));
	ASSERT_EQ(0, store_open(&self->s, variant->dev));
	EXPECT_EQ(3000, LOGGED());
}

TEST_F(automatic, it_is_a_socket_like_any_other)
{
	static char buf[30000];
	struct iovec iov[2] = { { buf, 10 }, { buf + 10, 20 } };
	struct pollfd pfd = { .fd = self->c.s, .events = POLLIN };
	struct timeval tv = { 0, 50000 };
	int low = 100;

	EXPECT_EQ(0, poll(&pfd, 1, 0));
	EXPECT_EQ(EAGAIN, ERRNO(recv(self->c.s, buf, 1, MSG_DONTWAIT)));
	ASSERT_EQ(0, setsockopt(self->c.s, SOL_SOCKET, SO_RCVTIMEO, &tv, sizeof(tv)));
	EXPECT_EQ(EAGAIN, ERRNO(recv(self->c.s, buf, 1, 0)));

	put(_metadata, self->c.c, 0, 1000);
	ASSERT_TRUE(waits(self->c.s, 1000));
	EXPECT_EQ(1, poll(&pfd, 1, 0));
	/* A look, and again. */
	EXPECT_EQ(500, recv(self->c.s, buf, 500, MSG_PEEK));
	EXPECT_EQ(-1, differs(buf, 500, SEED, 0));
	EXPECT_EQ(1000, recv(self->c.s, buf, sizeof(buf), MSG_PEEK));
	EXPECT_EQ(30, readv(self->c.s, iov, 2));
	EXPECT_EQ(-1, differs(buf, 30, SEED, 0));
	EXPECT_EQ(70, recv(self->c.s, NULL, 70, MSG_TRUNC));
	EXPECT_EQ(0, recv(self->c.s, buf, 0, 0));
	/* Waits for the rest until the time is over. */
	EXPECT_EQ(900, recv(self->c.s, buf, 2000, MSG_WAITALL));
	EXPECT_EQ(-1, differs(buf, 900, SEED, 100));
	EXPECT_EQ(1000, LOGGED());

	/* Not before there are 100. */
	ASSERT_EQ(0, setsockopt(self->c.s, SOL_SOCKET, SO_RCVLOWAT, &low, sizeof(low)));
	put(_metadata, self->c.c, 1000, 99);
	ASSERT_TRUE(waits(self->c.s, 99));
	EXPECT_EQ(0, poll(&pfd, 1, 0));
	EXPECT_EQ(99, recv(self->c.s, buf, sizeof(buf), 0));
	low = 1;
	ASSERT_EQ(0, setsockopt(self->c.s, SOL_SOCKET, SO_RCVLOWAT, &low, sizeof(low)));

	/* More than can be unread at once. */
	tv.tv_sec = 20 * slowness();
	ASSERT_EQ(0, setsockopt(self->c.s, SOL_SOCKET, SO_RCVTIMEO, &tv, sizeof(tv)));
	for (size_t at = 0; at < 1 << 20; at += sizeof(buf)) {
		put(_metadata, self->c.c, 1099 + at, sizeof(buf));
		ASSERT_EQ(sizeof(buf), recv(self->c.s, buf, sizeof(buf), MSG_WAITALL));
		ASSERT_EQ(-1, differs(buf, sizeof(buf), SEED, 1099 + at));
	}
	shutdown(self->c.c, SHUT_WR);
	EXPECT_EQ(0, recv(self->c.s, buf, sizeof(buf), 0));
	EXPECT_EQ(1, poll(&pfd, 1, 0));
	EXPECT_LT(1 << 20, LOGGED());
}

static void on_alarm(int sig)
{
}

TEST_F(automatic, a_waiting_receive_ends_with_a_signal_or_with_what_comes)
{
	struct sigaction act = { .sa_handler = on_alarm };
	struct itimerval soon = { .it_value = { 0, 50000 } };
	char buf[100];
	pid_t pid;

	ASSERT_EQ(0, sigaction(SIGALRM, &act, NULL));
	ASSERT_EQ(0, setitimer(ITIMER_REAL, &soon, NULL));
	EXPECT_EQ(EINTR, ERRNO(recv(self->c.s, buf, sizeof(buf), 0)));
	pid = fork();
	if (!pid) {
		usleep(50000);
		fill(buf, 100, SEED, 0);
		_exit(send_all(self->c.c, buf, 100) ? 1 : 0);
	}
	EXPECT_EQ(100, recv(self->c.s, buf, sizeof(buf), MSG_WAITALL));
	EXPECT_EQ(100, logged_bytes(self->c.s));
	waitpid(pid, NULL, 0);
}

TEST_F(automatic, splice_gives_out_what_has_its_record)
{
	static char buf[40000];
	size_t got = 0;
	int p[2];

	ASSERT_EQ(0, pipe(p));
	ASSERT_EQ(0, fcntl(self->c.s, F_SETFL, O_NONBLOCK));
	EXPECT_EQ(EAGAIN, ERRNO(splice(self->c.s, NULL, p[1], NULL, 100, 0)));
	ASSERT_EQ(0, fcntl(self->c.s, F_SETFL, 0));
	put(_metadata, self->c.c, 0, 40000);
	while (got < 40000) {
		ssize_t n = splice(self->c.s, NULL, p[1], NULL, 12345, 0);
		ssize_t m;

		ASSERT_LT(0, n);
		EXPECT_LE(got + n, logged_bytes(self->c.s));
		for (m = 0; m < n;) {
			ssize_t r = read(p[0], buf + got + m, n - m);

			ASSERT_LT(0, r);
			m += r;
		}
		got += n;
	}
	EXPECT_EQ(-1, differs(buf, got, SEED, 0));
	EXPECT_EQ(40000, LOGGED());
	shutdown(self->c.c, SHUT_WR);
	EXPECT_EQ(0, splice(self->c.s, NULL, p[1], NULL, 100, 0));
	close(p[0]);
	close(p[1]);
}

TEST_F(automatic, descriptors_have_their_record)
{
	static struct pmskb_desc d[512];
	int n, i;
	size_t len = 0;

	ASSERT_EQ(0, sock_mode(self->c.s, PMSKB_RX_DESC));
	put(_metadata, self->c.c, 0, 30000);
	while (len < 30000) {
		n = desc_recv_flags(self->c.s, d, 5, 0, NULL, NULL);
		ASSERT_LT(0, n);
		for (i = 0; i < n; i++) {
			EXPECT_EQ(-1, differs(self->s.map + d[i].offset, d[i].len, SEED, len));
			len += d[i].len;
		}
		EXPECT_LE(len, logged_bytes(self->c.s));
		EXPECT_EQ(0, desc_release_all(self->c.s, d, n));
	}
	EXPECT_EQ(30000, LOGGED());
}

TEST_F(automatic, what_was_there_when_it_was_switched_on_counts)
{
	char buf[3000];

	ASSERT_EQ(0, set_auto(self->c.s, 0));
	put(_metadata, self->c.c, 0, 3000);
	ASSERT_TRUE(waits(self->c.s, 3000));
	usleep(50000);
	EXPECT_EQ(0, logged_bytes(self->c.s));
	ASSERT_EQ(0, set_auto(self->c.s, 1));
	ASSERT_TRUE(comes_to(self->c.s, 3000));
	ASSERT_EQ(0, recv_all(self->c.s, buf, 3000));
	EXPECT_EQ(3000, LOGGED());
	/* And off again. */
	ASSERT_EQ(0, set_auto(self->c.s, 0));
	put(_metadata, self->c.c, 3000, 3000);
	ASSERT_EQ(0, recv_all(self->c.s, buf, 3000));
	EXPECT_EQ(3000, LOGGED());
	EXPECT_EQ(3000, logged_bytes(self->c.s));
}

TEST_F(automatic, urgent_data_has_its_record)
{
	char buf[300], oob[10];

	put(_metadata, self->c.c, 0, 100);
	fill(buf, 100, SEED, 100);
	ASSERT_EQ(100, send(self->c.c, buf, 100, MSG_OOB));
	ASSERT_TRUE(waits(self->c.s, 199));
	usleep(20000);
	EXPECT_EQ(1, recv(self->c.s, oob, sizeof(oob), MSG_OOB));
	EXPECT_EQ(-1, differs(oob, 1, SEED, 199));
	EXPECT_EQ(200, logged_bytes(self->c.s));
	EXPECT_EQ(199, recv(self->c.s, buf, sizeof(buf), 0));
	EXPECT_EQ(-1, differs(buf, 199, SEED, 0));
	put(_metadata, self->c.c, 200, 50);
	/* Past the mark, where nothing but the urgent byte may be for a moment. */
	EXPECT_EQ(50, recv(self->c.s, buf, sizeof(buf), 0));
	EXPECT_EQ(-1, differs(buf, 50, SEED, 200));
	EXPECT_EQ(250, LOGGED());
}

struct reader {
	int fd;
	uint64_t *sum;
	uint64_t early;
	pthread_t thread;
};

static void *read_on(void *arg)
{
	struct reader *r = arg;
	char buf[3000];
	ssize_t n;

	while ((n = recv(r->fd, buf, sizeof(buf), 0)) > 0) {
		uint64_t sum = __atomic_add_fetch(r->sum, n, __ATOMIC_SEQ_CST);

		if (logged_bytes(r->fd) < sum)
			r->early++;
	}
	return NULL;
}

TEST_F_TIMEOUT(automatic, several_threads_read_what_has_its_record, 120)
{
	struct reader r[4];
	struct sender snd;
	uint64_t sum = 0;
	int i;

	ASSERT_EQ(0, sender_start(&snd, self->c.c, SEED, 1 << 19, 7000, true));
	for (i = 0; i < 4; i++) {
		r[i] = (struct reader) { self->c.s, &sum };
		ASSERT_EQ(0, pthread_create(&r[i].thread, NULL, read_on, &r[i]));
	}
	for (i = 0; i < 4; i++) {
		pthread_join(r[i].thread, NULL);
		EXPECT_EQ(0, r[i].early);
	}
	EXPECT_EQ(0, sender_wait(&snd));
	EXPECT_EQ(1 << 19, sum);
	EXPECT_EQ(1 << 19, LOGGED());
}

TEST_F_TIMEOUT(automatic, what_comes_twice_or_out_of_order_has_one_record, 240)
{
	static char buf[65536];
	uint64_t len = 300000, pos = 0;
	struct sender snd;

	if (variant->link == LINK_LO)
		SKIP(return, "not on lo");
	if (sh("ip netns exec pmskb-client tc qdisc add dev %s root netem loss 1%% delay 2ms reorder 20%% duplicate 5%%",
	       variant->link == LINK_VETH ? "pmskb-b" : "pmskb-q"))
		SKIP(return, "no netem");
	ASSERT_EQ(0, sender_start(&snd, self->c.c, SEED, len, 30000, true));
	while (pos < len) {
		ssize_t n = recv(self->c.s, buf, sizeof(buf), 0);

		EXPECT_LT(0, n);
		if (n <= 0)
			break;
		EXPECT_EQ(-1, differs(buf, n, SEED, pos));
		pos += n;
		EXPECT_LE(pos, logged_bytes(self->c.s));
	}
	sh("ip netns exec pmskb-client tc qdisc del dev %s root",
	   variant->link == LINK_VETH ? "pmskb-b" : "pmskb-q");
	EXPECT_EQ(0, sender_wait(&snd));
	EXPECT_EQ(len, LOGGED());
}

TEST_F(automatic, what_cannot_be_answered_for_is_refused)
{
	struct tcp_zerocopy_receive zc = {};
	socklen_t len = sizeof(zc);
	uint32_t bad = 2;
	uint8_t one = 1;
	int fd;

	EXPECT_EQ(EOPNOTSUPP, ERRNO(getsockopt(self->c.s, SOL_TCP, TCP_ZEROCOPY_RECEIVE, &zc, &len)));
	EXPECT_EQ(EINVAL, set_auto(self->c.s, 2));
	EXPECT_EQ(EINVAL, ERRNO(setsockopt(self->c.s, SOL_PMSKB, PMSKB_AUTO_PERSIST, &one, 1)));
	EXPECT_EQ(EINVAL, ERRNO(setsockopt(self->c.s, SOL_PMSKB, PMSKB_AUTO_PERSIST, &bad, 0)));
	EXPECT_EQ(EFAULT, ERRNO(setsockopt(self->c.s, SOL_PMSKB, PMSKB_AUTO_PERSIST, BAD_PTR, 4)));
	EXPECT_EQ(1, get_auto(self->c.s));
	fd = socket(AF_INET, SOCK_STREAM, 0);
	ASSERT_EQ(0, sock_ulp(fd));
	EXPECT_EQ(EUNATCH, set_auto(fd, 1));
	close(fd);
	/* Off, it is as before. */
	ASSERT_EQ(0, set_auto(self->c.s, 0));
	len = sizeof(zc);
	EXPECT_NE(EOPNOTSUPP, ERRNO(getsockopt(self->c.s, SOL_TCP, TCP_ZEROCOPY_RECEIVE, &zc, &len)));
}

TEST_F_TIMEOUT(automatic, out_of_frames_nothing_is_given_out_and_nothing_lost, 120)
{
	enum { LEN = 1 << 20 };
	static int fds[64];
	static char buf[60000];
	int n, got = 0, err = 0;
	struct sender snd;

	n = store_scarce(&self->s, 60, fds, ARRAY_LEN(fds));
	ASSERT_LT(0, n);
	ASSERT_EQ(0, sender_start(&snd, self->c.c, SEED, LEN, 30000, true));
	while (got < LEN) {
		ssize_t m = recv(self->c.s, buf, sizeof(buf), 0);

		if (m < 0) {
			err = errno;
			break;
		}
		EXPECT_EQ(-1, differs(buf, m, SEED, got));
		got += m;
		EXPECT_LE(got, logged_bytes(self->c.s));
	}
	EXPECT_GT(LEN, got) TH_LOG("there were frames for all of it");
	EXPECT_TRUE(err == ENOBUFS || err == ENOSPC) TH_LOG("%s", strerror(err));
	EXPECT_EQ(got, LOGGED());
	while (n)
		close(fds[--n]);
	while (got < LEN) {
		ssize_t m = recv(self->c.s, buf, sizeof(buf), 0);

		/* Those that were closed are not free at once. */
		if (m < 0 && (errno == ENOBUFS || errno == ENOSPC) && n++ < 1000 * slowness()) {
			usleep(1000);
			continue;
		}
		ASSERT_LT(0, m) TH_LOG("%s", strerror(errno));
		EXPECT_EQ(-1, differs(buf, m, SEED, got));
		got += m;
	}
	EXPECT_EQ(0, sender_wait(&snd));
	EXPECT_EQ(LEN, LOGGED());
}

TEST_HARNESS_MAIN
