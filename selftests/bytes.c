// SPDX-License-Identifier: GPL-2.0
/*
 * Promises about byte mode: an attached socket is a TCP socket. Every test also
 * runs on a socket that is not attached (variant plain): what that one does is
 * what is right.
 */
#include "common.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/sockios.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/uio.h>
#include <time.h>

#include "harness.h"

#define ERRNO(call) ((call) < 0 ? errno : 0)

FIXTURE(bytes) {
	struct store s;
	struct conn c;
};

FIXTURE_VARIANT(bytes) {
	int family;
	enum dev dev;
	enum link link;
	enum how how;
};

FIXTURE_VARIANT_ADD(bytes, plain) { AF_INET, DEV_PMEM, LINK_LO, HOW_PLAIN };
FIXTURE_VARIANT_ADD(bytes, v4_pmem_lo) { AF_INET, DEV_PMEM, LINK_LO, HOW_LISTENER_OPT };
FIXTURE_VARIANT_ADD(bytes, v6_dax_lo) { AF_INET6, DEV_DAX, LINK_LO, HOW_ACCEPTED_OPT };
FIXTURE_VARIANT_ADD(bytes, v6_pmem_veth) { AF_INET6, DEV_PMEM, LINK_VETH, HOW_LISTENER_IOCTL };
FIXTURE_VARIANT_ADD(bytes, v4_dax_veth) { AF_INET, DEV_DAX, LINK_VETH, HOW_LISTENER_OPT };
FIXTURE_VARIANT_ADD(bytes, v4_pmem_noffload) { AF_INET, DEV_PMEM, LINK_PLAIN, HOW_ACCEPTED_IOCTL };
FIXTURE_VARIANT_ADD(bytes, v6_dax_noffload) { AF_INET6, DEV_DAX, LINK_PLAIN, HOW_LISTENER_OPT };

FIXTURE_SETUP(bytes)
{
	struct net net = { variant->family, variant->link };
	const char *why;

	if (!dev_path(variant->dev, &why))
		SKIP(return, "%s", why);
	why = net_up(variant->link);
	if (why)
		SKIP(return, "%s", why);
	ASSERT_EQ(0, store_make(&self->s, variant->dev, 0, 0));
	ASSERT_EQ(0, conn_make(&self->c, &net, self->s.fd, variant->how));
}

FIXTURE_TEARDOWN(bytes)
{
	conn_close(&self->c);
	EXPECT_EQ(0, store_close(&self->s));
}

/* Sanity of the fixture: the attached variants do place. */
TEST_F(bytes, the_bytes_were_placed_if_the_socket_is_attached)
{
	struct pmskb_sock_info i;
	char buf[5000] = {};

	ASSERT_EQ(0, send_all(self->c.c, buf, sizeof(buf)));
	ASSERT_EQ(0, recv_all(self->c.s, buf, sizeof(buf)));
	if (variant->how == HOW_PLAIN) {
		EXPECT_NE(0, sock_info(self->c.s, &i));
	} else {
		ASSERT_EQ(0, sock_info(self->c.s, &i));
		EXPECT_LE(sizeof(buf), i.counters.placed_bytes);
	}
}

TEST_F_TIMEOUT(bytes, a_long_stream_of_random_sizes_arrives_whole, 300)
{
	static char buf[200000];
	uint64_t len = env_number("PMSKB_TEST_MB", variant->link == LINK_LO ? 64 : 16) << 20;
	uint64_t pos = 0;
	struct sender snd;
	unsigned int r = 1;

	if (variant->how == HOW_PLAIN)
		len = 4 << 20;
	ASSERT_EQ(0, sender_start(&snd, self->c.c, 11, len, 150000, true));
	while (pos < len) {
		ssize_t n;

		r = r * 1103515245 + 12345;
		/* Mostly large reads; now and then a few bytes. */
		n = recv(self->c.s, buf, r >> 16 & 7 ? sizeof(buf) : 1 + (r >> 20) % 100, 0);
		ASSERT_LT(0, n);
		ASSERT_EQ(-1, differs(buf, n, 11, pos)) TH_LOG("in the read at %lu", pos);
		pos += n;
	}
	EXPECT_EQ(0, recv(self->c.s, buf, sizeof(buf), 0)) TH_LOG("no end of file");
	EXPECT_EQ(0, sender_wait(&snd));
	if (variant->how != HOW_PLAIN) {
		struct pmskb_store_info info;

		conn_close(&self->c);
		EXPECT_EQ(0, store_back(&self->s, 5000, &info));
		EXPECT_GE(info.frames_free + STORE_SLACK, self->s.info.frames_free);
	}
}

TEST_F_TIMEOUT(bytes, both_directions_at_once, 120)
{
	static char buf[65536];
	uint64_t len = 4 << 20, pos = 0;
	struct sender a, b;
	pid_t pid;
	int st;

	ASSERT_EQ(0, sender_start(&a, self->c.c, 1, len, 40000, true));
	ASSERT_EQ(0, sender_start(&b, self->c.s, 2, len, 40000, true));
	pid = fork();
	if (!pid) {
		for (; pos < len;) {
			ssize_t n = recv(self->c.c, buf, sizeof(buf), 0);

			if (n <= 0 || differs(buf, n, 2, pos) >= 0)
				_exit(1);
			pos += n;
		}
		_exit(0);
	}
	while (pos < len) {
		ssize_t n = recv(self->c.s, buf, sizeof(buf), 0);

		ASSERT_LT(0, n);
		ASSERT_EQ(-1, differs(buf, n, 1, pos));
		pos += n;
	}
	ASSERT_EQ(pid, waitpid(pid, &st, 0));
	EXPECT_EQ(0, st);
	EXPECT_EQ(0, sender_wait(&a));
	EXPECT_EQ(0, sender_wait(&b));
}

TEST_F(bytes, single_bytes_arrive_in_order)
{
	char out, in[300];
	int i;

	for (i = 0; i < 300; i++) {
		out = i;
		ASSERT_EQ(1, send(self->c.c, &out, 1, 0));
	}
	ASSERT_EQ(0, recv_all(self->c.s, in, sizeof(in)));
	for (i = 0; i < 300; i++) {
		ASSERT_EQ((char)i, in[i]);
	}
}

TEST_F(bytes, peek_does_not_consume)
{
	char buf[16] = "";
	int k;

	ASSERT_EQ(0, send_all(self->c.c, "0123456789", 10));
	for (k = 0; k < 3; k++) {
		ASSERT_EQ(4, recv(self->c.s, buf, 4, MSG_PEEK));
		EXPECT_EQ(0, memcmp(buf, "0123", 4));
	}
	ASSERT_EQ(4, recv(self->c.s, buf, 4, 0));
	EXPECT_EQ(0, memcmp(buf, "0123", 4));
	ASSERT_EQ(6, recv(self->c.s, buf, 16, MSG_PEEK));
	EXPECT_EQ(0, memcmp(buf, "456789", 6));
	ASSERT_EQ(6, recv(self->c.s, buf, 16, 0));
	EXPECT_EQ(0, memcmp(buf, "456789", 6));
}

TEST_F(bytes, waitall_waits_for_all)
{
	static char data[100000], buf[100000];
	struct sender snd;

	/* In small pieces, so that a receive would return early. */
	ASSERT_EQ(0, sender_start(&snd, self->c.c, 3, sizeof(data), 3000, false));
	ASSERT_EQ(sizeof(buf), recv(self->c.s, buf, sizeof(buf), MSG_WAITALL));
	EXPECT_EQ(-1, differs(buf, sizeof(buf), 3, 0));
	EXPECT_EQ(0, sender_wait(&snd));
	/* Less, if the other end closes. */
	ASSERT_EQ(0, send_all(self->c.c, "last", 4));
	ASSERT_EQ(0, shutdown(self->c.c, SHUT_WR));
	EXPECT_EQ(4, recv(self->c.s, buf, 100, MSG_WAITALL));
}

TEST_F(bytes, read_readv_recvmsg_and_trunc)
{
	char a[3] = "", b[5] = "", buf[32];
	struct iovec iov[2] = { { a, sizeof(a) }, { b, sizeof(b) } };
	struct msghdr msg = { .msg_iov = iov, .msg_iovlen = 2 };

	ASSERT_EQ(0, send_all(self->c.c, "abcdefgh12345678ABCDEFGH", 24));
	usleep(20000);
	ASSERT_EQ(8, readv(self->c.s, iov, 2));
	EXPECT_EQ(0, memcmp(a, "abc", 3));
	EXPECT_EQ(0, memcmp(b, "defgh", 5));
	ASSERT_EQ(8, recvmsg(self->c.s, &msg, 0));
	EXPECT_EQ(0, memcmp(b, "45678", 5));
	EXPECT_EQ(0, msg.msg_flags & ~MSG_CMSG_CLOEXEC);
	/* MSG_TRUNC throws away. */
	EXPECT_EQ(4, recv(self->c.s, NULL, 4, MSG_TRUNC));
	EXPECT_EQ(4, read(self->c.s, buf, sizeof(buf)));
	EXPECT_EQ(0, memcmp(buf, "EFGH", 4));
}

TEST_F(bytes, a_bad_buffer_is_efault_and_loses_nothing)
{
	char buf[16];

	ASSERT_EQ(0, send_all(self->c.c, "precious", 8));
	usleep(20000);
	EXPECT_EQ(EFAULT, ERRNO(recv(self->c.s, BAD_PTR, 8, 0)));
	ASSERT_EQ(8, recv(self->c.s, buf, sizeof(buf), 0));
	EXPECT_EQ(0, memcmp(buf, "precious", 8));
}

TEST_F(bytes, half_close_leaves_the_other_half)
{
	char buf[8];

	ASSERT_EQ(0, send_all(self->c.c, "bye", 3));
	ASSERT_EQ(0, shutdown(self->c.c, SHUT_WR));
	ASSERT_EQ(0, recv_all(self->c.s, buf, 3));
	EXPECT_EQ(0, recv(self->c.s, buf, sizeof(buf), 0));
	EXPECT_EQ(0, recv(self->c.s, buf, sizeof(buf), 0));
	ASSERT_EQ(0, send_all(self->c.s, "reply", 5));
	ASSERT_EQ(0, recv_all(self->c.c, buf, 5));
	EXPECT_EQ(0, memcmp(buf, "reply", 5));
	/* Our own half: nothing more is received. */
	ASSERT_EQ(0, shutdown(self->c.s, SHUT_RD));
	EXPECT_EQ(0, recv(self->c.s, buf, sizeof(buf), 0));
}

TEST_F(bytes, a_reset_is_econnreset_once_and_then_the_end)
{
	struct linger lin = { 1, 0 };
	char buf[8];

	ASSERT_EQ(0, setsockopt(self->c.c, SOL_SOCKET, SO_LINGER, &lin, sizeof(lin)));
	close(self->c.c);
	self->c.c = -1;
	EXPECT_EQ(ECONNRESET, ERRNO(recv(self->c.s, buf, sizeof(buf), 0)));
	EXPECT_EQ(0, recv(self->c.s, buf, sizeof(buf), 0));
	signal(SIGPIPE, SIG_IGN);
	EXPECT_EQ(EPIPE, ERRNO(send(self->c.s, "x", 1, MSG_NOSIGNAL)));
}

TEST_F(bytes, urgent_data_is_out_of_band_and_in_line)
{
	char buf[16] = "", oob = 0;
	int at = -1, one = 1;

	ASSERT_EQ(0, send_all(self->c.c, "abc", 3));
	ASSERT_EQ(1, send(self->c.c, "!", 1, MSG_OOB));
	ASSERT_EQ(0, send_all(self->c.c, "def", 3));
	usleep(50000);
	/* A read stops at the mark. */
	ASSERT_EQ(3, recv(self->c.s, buf, sizeof(buf), 0));
	EXPECT_EQ(0, memcmp(buf, "abc", 3));
	EXPECT_EQ(0, ioctl(self->c.s, SIOCATMARK, &at));
	EXPECT_EQ(1, at);
	EXPECT_EQ(1, recv(self->c.s, &oob, 1, MSG_OOB));
	EXPECT_EQ('!', oob);
	ASSERT_EQ(3, recv(self->c.s, buf, sizeof(buf), 0));
	EXPECT_EQ(0, memcmp(buf, "def", 3));

	ASSERT_EQ(0, setsockopt(self->c.s, SOL_SOCKET, SO_OOBINLINE, &one, sizeof(one)));
	ASSERT_EQ(1, send(self->c.c, "?", 1, MSG_OOB));
	ASSERT_EQ(1, recv(self->c.s, buf, 1, 0));
	EXPECT_EQ('?', buf[0]);
}

TEST_F(bytes, fionread_and_poll_tell_what_is_there)
{
	struct pollfd p = { .fd = self->c.s, .events = POLLIN | POLLRDHUP };
	char buf[100];
	int n = -1;

	EXPECT_EQ(0, poll(&p, 1, 0));
	EXPECT_EQ(0, ioctl(self->c.s, SIOCINQ, &n));
	EXPECT_EQ(0, n);
	ASSERT_EQ(0, send_all(self->c.c, buf, 77));
	ASSERT_EQ(1, poll(&p, 1, 2000));
	EXPECT_EQ(POLLIN, p.revents);
	EXPECT_EQ(0, ioctl(self->c.s, SIOCINQ, &n));
	EXPECT_EQ(77, n);
	ASSERT_EQ(0, recv_all(self->c.s, buf, 77));
	EXPECT_EQ(0, poll(&p, 1, 0));
	ASSERT_EQ(0, shutdown(self->c.c, SHUT_WR));
	ASSERT_EQ(1, poll(&p, 1, 2000));
	EXPECT_EQ(POLLIN | POLLRDHUP, p.revents);
}

TEST_F(bytes, epoll_edges_come_once_for_each_arrival)
{
	struct epoll_event ev = { .events = EPOLLIN | EPOLLET }, got[4];
	int ep = epoll_create1(0), k;
	char buf[16];

	ASSERT_EQ(0, epoll_ctl(ep, EPOLL_CTL_ADD, self->c.s, &ev));
	EXPECT_EQ(0, epoll_wait(ep, got, 4, 0));
	for (k = 0; k < 5; k++) {
		ASSERT_EQ(0, send_all(self->c.c, "edge", 4));
		EXPECT_EQ(1, epoll_wait(ep, got, 4, 2000));
		EXPECT_EQ(0, epoll_wait(ep, got, 4, 0));
	}
	ASSERT_EQ(16, recv(self->c.s, buf, 16, 0));
	close(ep);
}

TEST_F(bytes, rcvlowat_holds_poll_back)
{
	struct pollfd p = { .fd = self->c.s, .events = POLLIN };
	char buf[1000];
	int low = 500;

	ASSERT_EQ(0, setsockopt(self->c.s, SOL_SOCKET, SO_RCVLOWAT, &low, sizeof(low)));
	ASSERT_EQ(0, send_all(self->c.c, buf, 400));
	EXPECT_EQ(0, poll(&p, 1, 300)) TH_LOG("ready with 400 of 500");
	ASSERT_EQ(0, send_all(self->c.c, buf, 200));
	EXPECT_EQ(1, poll(&p, 1, 2000)) TH_LOG("not ready with 600 of 500");
	EXPECT_EQ(600, recv(self->c.s, buf, sizeof(buf), 0));
}

static long ms_since(const struct timespec *t)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (now.tv_sec - t->tv_sec) * 1000 + (now.tv_nsec - t->tv_nsec) / 1000000;
}

TEST_F(bytes, timeouts_and_dontwait)
{
	struct timespec t;
	char buf[4];

	EXPECT_EQ(EAGAIN, ERRNO(recv(self->c.s, buf, 4, MSG_DONTWAIT)));
	ASSERT_EQ(0, timeout_set(self->c.s, 200));
	clock_gettime(CLOCK_MONOTONIC, &t);
	EXPECT_EQ(EAGAIN, ERRNO(recv(self->c.s, buf, 4, 0)));
	EXPECT_LE(150, ms_since(&t));
	EXPECT_GE(5000 * slowness(), ms_since(&t));
	fcntl(self->c.s, F_SETFL, O_NONBLOCK);
	EXPECT_EQ(EAGAIN, ERRNO(read(self->c.s, buf, 4)));
}

static void nothing(int sig)
{
	(void)sig;
}

TEST_F(bytes, a_signal_interrupts)
{
	struct sigaction sa = { .sa_handler = nothing };
	char buf[4];
	pid_t pid;

	sigaction(SIGUSR1, &sa, NULL);
	/* Without a timeout: with one, a receive is not restarted anyway. */
	ASSERT_EQ(0, timeout_set(self->c.s, 0));
	pid = fork();
	if (!pid) {
		int k;

		/* Again and again: the first may come before the receive. */
		for (k = 0; k < 20; k++) {
			usleep(100000);
			kill(getppid(), SIGUSR1);
		}
		_exit(0);
	}
	EXPECT_EQ(EINTR, ERRNO(recv(self->c.s, buf, 4, 0)));
	kill(pid, SIGKILL);
	waitpid(pid, NULL, 0);
}

TEST_F(bytes, splice_moves_what_arrives)
{
	static char back[300000];
	size_t len = sizeof(back), got = 0;
	struct sender snd;
	int pipes[2];

	ASSERT_EQ(0, pipe(pipes));
	ASSERT_EQ(0, sender_start(&snd, self->c.c, 4, len, 50000, true));
	while (got < len) {
		ssize_t n = splice(self->c.s, NULL, pipes[1], NULL, 65536, SPLICE_F_MOVE), r = 0;

		ASSERT_LT(0, n);
		while (r < n) {
			ssize_t m = read(pipes[0], back + got + r, n - r);

			ASSERT_LT(0, m);
			r += m;
		}
		got += n;
	}
	EXPECT_EQ(-1, differs(back, len, 4, 0));
	EXPECT_EQ(0, splice(self->c.s, NULL, pipes[1], NULL, 65536, 0));
	EXPECT_EQ(0, sender_wait(&snd));
}

TEST_F(bytes, bytes_spliced_into_a_pipe_stay_what_they_are)
{
	static char back[20000], noise[60000];
	size_t in_pipe = 0;
	int pipes[2], taken[16], n = 0, k;

	ASSERT_EQ(0, pipe(pipes));
	fill(back, sizeof(back), 9, 0);
	ASSERT_EQ(0, send_all(self->c.c, back, sizeof(back)));
	while (in_pipe < sizeof(back)) {
		ssize_t n = splice(self->c.s, NULL, pipes[1], NULL, sizeof(back) - in_pipe, 0);

		ASSERT_LT(0, n);
		in_pipe += n;
	}
	/* With few frames, for they are used one after the other. */
	if (variant->how != HOW_PLAIN)
		n = store_scarce(&self->s, 300, taken, ARRAY_LEN(taken));
	ASSERT_LE(0, n);
	for (k = 0; k < 40; k++) {
		ASSERT_EQ(0, send_all(self->c.c, noise, sizeof(noise)));
		ASSERT_EQ(0, recv_all(self->c.s, noise, sizeof(noise)));
	}
	while (n > 0)
		close(taken[--n]);
	ASSERT_EQ(sizeof(back), ({
		size_t got = 0;
		ssize_t n;

		while (got < sizeof(back) && (n = read(pipes[0], back + got, sizeof(back) - got)) > 0)
			got += n;
		got;
	}));
	EXPECT_EQ(-1, differs(back, sizeof(back), 9, 0)) TH_LOG("frames were reused in a pipe");
}

TEST_F(bytes, sendfile_from_the_socket_is_refused_as_on_any)
{
	int out = open("/dev/null", O_WRONLY);

	/* Whatever a plain socket says; it must not hang. */
	ASSERT_EQ(0, send_all(self->c.c, "x", 1));
	fcntl(self->c.s, F_SETFL, O_NONBLOCK);
	EXPECT_EQ(EINVAL, ERRNO(syscall(__NR_sendfile, out, self->c.s, NULL, 1)));
	close(out);
}

TEST_F(bytes, timestamps_are_delivered_when_asked_for)
{
	char control[256] = {}, buf[8];
	struct iovec iov = { buf, sizeof(buf) };
	struct msghdr msg = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control,
			      .msg_controllen = sizeof(control) };
	struct cmsghdr *cmsg;
	struct timespec now, ts = {};
	int one = 1, found = 0, try;

	ASSERT_EQ(0, setsockopt(self->c.s, SOL_SOCKET, SO_TIMESTAMPNS, &one, sizeof(one)));
	/* The clock of packets is started by a work item, a moment later. */
	for (try = 0; try < 100 && !found; try++) {
		usleep(20000);
		ASSERT_EQ(0, send_all(self->c.c, "when?", 5));
		usleep(20000);
		msg.msg_controllen = sizeof(control);
		ASSERT_EQ(5, recvmsg(self->c.s, &msg, 0));
		for (cmsg = CMSG_FIRSTHDR(&msg); cmsg; cmsg = CMSG_NXTHDR(&msg, cmsg))
			if (cmsg->cmsg_level == SOL_SOCKET && cmsg->cmsg_type == SO_TIMESTAMPNS) {
				memcpy(&ts, CMSG_DATA(cmsg), sizeof(ts));
				found = 1;
			}
	}
	EXPECT_EQ(1, found);
	clock_gettime(CLOCK_REALTIME, &now);
	EXPECT_GE(10, labs(now.tv_sec - ts.tv_sec));
}

TEST_F_TIMEOUT(bytes, a_slow_reader_slows_the_sender_and_loses_nothing, 120)
{
	static char buf[100000];
	uint64_t len = 3 << 20, pos = 0;
	struct sender snd;
	int k = 0, small = 65536;

	ASSERT_EQ(0, setsockopt(self->c.s, SOL_SOCKET, SO_RCVBUF, &small, sizeof(small)));
	ASSERT_EQ(0, sender_start(&snd, self->c.c, 12, len, 100000, true));
	while (pos < len) {
		ssize_t n = recv(self->c.s, buf, 30000, 0);

		ASSERT_LT(0, n);
		ASSERT_EQ(-1, differs(buf, n, 12, pos));
		pos += n;
		if (k++ % 20 == 0)
			usleep(20000);
	}
	EXPECT_EQ(0, sender_wait(&snd));
}

/* The window must not collapse because small packets are charged for frames. */
TEST_F_TIMEOUT(bytes, many_small_packets_unread_are_all_kept, 120)
{
	enum { NR = 2000, LEN = 37 };
	static char buf[NR * LEN];
	int k;

	for (k = 0; k < NR; k++) {
		fill(buf, LEN, 13, (uint64_t)k * LEN);
		ASSERT_EQ(0, send_all(self->c.c, buf, LEN));
	}
	ASSERT_EQ(0, recv_all(self->c.s, buf, sizeof(buf)));
	EXPECT_EQ(-1, differs(buf, sizeof(buf), 13, 0));
}

TEST_F_TIMEOUT(bytes, loss_and_reordering_change_nothing, 240)
{
	static char buf[65536];
	uint64_t len = 2 << 20, pos = 0;
	struct sender snd;

	if (variant->link == LINK_LO)
		SKIP(return, "not on lo");
	if (sh("ip netns exec pmskb-client tc qdisc add dev %s root netem loss 1%% delay 2ms reorder 20%% duplicate 1%%",
	       variant->link == LINK_VETH ? "pmskb-b" : "pmskb-q"))
		SKIP(return, "no netem");
	ASSERT_EQ(0, sender_start(&snd, self->c.c, 14, len, 30000, true));
	while (pos < len) {
		ssize_t n = recv(self->c.s, buf, sizeof(buf), 0);
		ssize_t bad = n > 0 ? differs(buf, n, 14, pos) : 0;

		EXPECT_LT(0, n);
		EXPECT_EQ(-1, bad) TH_LOG("at %lu", pos + bad);
		if (n <= 0 || bad >= 0)
			break;
		pos += n;
	}
	sh("ip netns exec pmskb-client tc qdisc del dev %s root",
	   variant->link == LINK_VETH ? "pmskb-b" : "pmskb-q");
	EXPECT_EQ(0, sender_wait(&snd));
}

TEST_HARNESS_MAIN
