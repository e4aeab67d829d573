// SPDX-License-Identifier: GPL-2.0
/*
 * Promises about attaching sockets: both ways, inheritance, what is refused,
 * the options, and letting go.
 */
#include "common.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/bpf.h>
#include <linux/tls.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/un.h>

#include "harness.h"

#define ERRNO(call) ((call) < 0 ? errno : 0)
#ifndef IPPROTO_MPTCP
#define IPPROTO_MPTCP 262
#endif
#ifndef SOL_TLS
#define SOL_TLS 282
#endif

/* ---- every way, every place ---- */

FIXTURE(way) {
	struct store s;
	struct net net;
};

FIXTURE_VARIANT(way) {
	int family;
	enum dev dev;
	enum link link;
	enum how how;
};

FIXTURE_VARIANT_ADD(way, v4_pmem_lo_listener_opt)
	{ AF_INET, DEV_PMEM, LINK_LO, HOW_LISTENER_OPT };
FIXTURE_VARIANT_ADD(way, v6_dax_lo_listener_ioctl)
	{ AF_INET6, DEV_DAX, LINK_LO, HOW_LISTENER_IOCTL };
FIXTURE_VARIANT_ADD(way, v4_dax_veth_accepted_opt)
	{ AF_INET, DEV_DAX, LINK_VETH, HOW_ACCEPTED_OPT };
FIXTURE_VARIANT_ADD(way, v6_pmem_veth_listener_opt)
	{ AF_INET6, DEV_PMEM, LINK_VETH, HOW_LISTENER_OPT };
FIXTURE_VARIANT_ADD(way, v4_pmem_plain_listener_ioctl)
	{ AF_INET, DEV_PMEM, LINK_PLAIN, HOW_LISTENER_IOCTL };
FIXTURE_VARIANT_ADD(way, v6_pmem_plain_accepted_ioctl)
	{ AF_INET6, DEV_PMEM, LINK_PLAIN, HOW_ACCEPTED_IOCTL };

FIXTURE_SETUP(way)
{
	const char *why;

	if (!dev_path(variant->dev, &why))
		SKIP(return, "%s", why);
	why = net_up(variant->link);
	if (why)
		SKIP(return, "%s", why);
	self->net = (struct net) { variant->family, variant->link };
	ASSERT_EQ(0, store_make(&self->s, variant->dev, 0, 0));
}

FIXTURE_TEARDOWN(way)
{
	EXPECT_EQ(0, store_close(&self->s));
}

TEST_F(way, an_attached_socket_places_what_it_receives_and_says_so)
{
	struct pmskb_sock_info i;
	struct pmskb_store_info si;
	static char buf[100000];
	struct conn c;
	int k;

	ASSERT_EQ(0, conn_make(&c, &self->net, self->s.fd, variant->how));
	ASSERT_EQ(0, sock_info(c.s, &i));
	EXPECT_EQ(self->s.minor, i.store);
	EXPECT_EQ(PMSKB_RX_BYTES, i.rx_mode);
	EXPECT_EQ(0, i.tokens);
	EXPECT_GE(2, i.frames);
	EXPECT_EQ(0, i.counters.placed);

	for (k = 0; k < 20; k++) {
		fill(buf, sizeof(buf), 5, k * sizeof(buf));
		ASSERT_EQ(0, send_all(c.c, buf, sizeof(buf)));
		ASSERT_EQ(0, recv_all(c.s, buf, sizeof(buf)));
		ASSERT_EQ(-1, differs(buf, sizeof(buf), 5, k * sizeof(buf)));
	}
	ASSERT_EQ(0, sock_info(c.s, &i));
	EXPECT_LT(0, i.counters.placed);
	/* Nothing but shapes that cannot be handled may have gone by. */
	EXPECT_LE(20 * sizeof(buf), i.counters.placed_bytes);
	/* A segment sent twice is placed twice. */
	EXPECT_GE(21 * sizeof(buf), i.counters.placed_bytes);
	for (k = 0; k < PMSKB_UNPLACED_NR; k++) {
		EXPECT_EQ(0, i.counters.unplaced[k]) TH_LOG("unplaced, reason %d", k);
	}
	EXPECT_EQ(i.counters.placed, i.counters.derived + i.counters.hardware + i.counters.computed);
	EXPECT_EQ(0, i.counters.mismatch);
	if (variant->link == LINK_PLAIN) {
		EXPECT_LT(0, i.counters.derived) TH_LOG("packets with a checksum on the wire: %llu placed, %llu computed",
							i.counters.placed, i.counters.computed);
	}
	ASSERT_EQ(0, store_info(&self->s, &si));
	EXPECT_LE(1, si.sockets);
	EXPECT_EQ(i.counters.placed_bytes, si.counters.placed_bytes);
	conn_close(&c);
	/* All of it comes back. */
	EXPECT_EQ(0, store_back(&self->s, 5000, &si));
	EXPECT_GE(si.frames_free + STORE_SLACK, self->s.info.frames_free);
	EXPECT_GE(si.heads_free + STORE_SLACK, self->s.info.heads_free);
	EXPECT_EQ(0, si.sockets);
}

TEST_F(way, the_reply_goes_out_as_on_any_socket)
{
	static char buf[300000];
	struct sender snd;
	struct conn c;

	ASSERT_EQ(0, conn_make(&c, &self->net, self->s.fd, variant->how));
	ASSERT_EQ(0, sender_start(&snd, c.s, 6, sizeof(buf), 30000, true));
	ASSERT_EQ(0, recv_all(c.c, buf, sizeof(buf)));
	EXPECT_EQ(-1, differs(buf, sizeof(buf), 6, 0));
	EXPECT_EQ(0, sender_wait(&snd));
	EXPECT_EQ(0, recv(c.c, buf, 1, 0));
	conn_close(&c);
}

/* ---- one place is enough for the rest ---- */

FIXTURE(sock) {
	struct store s;
	struct net net;
};

FIXTURE_SETUP(sock)
{
	const char *why;

	if (!dev_path(DEV_PMEM, &why))
		SKIP(return, "%s", why);
	self->net = (struct net) { AF_INET, LINK_LO };
	ASSERT_EQ(0, store_make(&self->s, DEV_PMEM, 0, 0));
}

FIXTURE_TEARDOWN(sock)
{
	EXPECT_EQ(0, store_close(&self->s));
}

TEST_F(sock, accepted_sockets_inherit_store_and_mode_of_the_listener)
{
	struct sockaddr_storage addr;
	struct pmskb_sock_info i;
	socklen_t len;
	int l, c[3], s[3], k;

	l = net_listen(&self->net, &addr, &len);
	ASSERT_LE(0, l);
	ASSERT_EQ(0, sock_attach_opt(l, self->s.fd));
	ASSERT_EQ(0, sock_mode(l, PMSKB_RX_DESC));
	for (k = 0; k < 3; k++) {
		c[k] = net_connect(&self->net, &addr, len);
		ASSERT_LE(0, c[k]);
		s[k] = accept(l, NULL, NULL);
		ASSERT_LE(0, s[k]);
		ASSERT_EQ(0, sock_info(s[k], &i));
		EXPECT_EQ(self->s.minor, i.store);
		EXPECT_EQ(PMSKB_RX_DESC, i.rx_mode);
	}
	/* Independent of each other and of the listener from then on. */
	ASSERT_EQ(0, sock_mode(s[0], PMSKB_RX_BYTES));
	ASSERT_EQ(0, sock_info(s[1], &i));
	EXPECT_EQ(PMSKB_RX_DESC, i.rx_mode);
	ASSERT_EQ(0, sock_info(l, &i));
	EXPECT_EQ(PMSKB_RX_DESC, i.rx_mode);
	close(l);
	ASSERT_EQ(0, send_all(c[0], "hello", 5));
	{
		char buf[5];

		ASSERT_EQ(0, recv_all(s[0], buf, 5));
		EXPECT_EQ(0, memcmp(buf, "hello", 5));
	}
	for (k = 0; k < 3; k++) {
		close(c[k]);
		close(s[k]);
	}
}

TEST_F(sock, data_sent_before_accept_is_placed_too)
{
	struct sockaddr_storage addr;
	struct pmskb_sock_info i;
	struct pmskb_desc d[16];
	socklen_t len;
	int l, c, s, n;

	l = net_listen(&self->net, &addr, &len);
	ASSERT_LE(0, l);
	ASSERT_EQ(0, sock_attach_ioctl(l, self->s.fd));
	ASSERT_EQ(0, sock_mode(l, PMSKB_RX_DESC));
	c = net_connect(&self->net, &addr, len);
	ASSERT_LE(0, c);
	ASSERT_EQ(0, send_all(c, "early bytes", 11));
	usleep(50000);
	s = accept(l, NULL, NULL);
	ASSERT_LE(0, s);
	n = desc_recv_bytes(s, d, ARRAY_LEN(d), 11);
	ASSERT_LT(0, n);
	EXPECT_EQ(0, memcmp(self->s.map + d[0].offset, "early bytes", d[0].len));
	ASSERT_EQ(0, sock_info(s, &i));
	EXPECT_EQ(11, i.counters.placed_bytes);
	close(l);
	close(s);
	close(c);
}

TEST_F(sock, data_that_waited_when_the_socket_was_attached_is_copied)
{
	struct pmskb_desc d[16];
	struct conn c;
	int n;

	ASSERT_EQ(0, conn_make(&c, &self->net, -1, HOW_PLAIN));
	ASSERT_EQ(0, send_all(c.c, "before", 6));
	usleep(50000);
	ASSERT_EQ(0, sock_attach_ioctl(c.s, self->s.fd));
	ASSERT_EQ(0, sock_mode(c.s, PMSKB_RX_DESC));
	ASSERT_EQ(0, send_all(c.c, " after", 6));
	n = desc_recv_bytes(c.s, d, ARRAY_LEN(d), 12);
	ASSERT_LE(1, n);
	EXPECT_TRUE(d[0].flags & PMSKB_DESC_COPIED);
	EXPECT_EQ(0, memcmp(self->s.map + d[0].offset, "before", d[0].len < 6 ? d[0].len : 6));
	EXPECT_FALSE(d[n - 1].flags & PMSKB_DESC_COPIED);
	conn_close(&c);
}

TEST_F(sock, a_socket_is_attached_once)
{
	struct conn c;
	int fd = self->s.fd;

	ASSERT_EQ(0, conn_make(&c, &self->net, self->s.fd, HOW_ACCEPTED_IOCTL));
	EXPECT_EQ(-EALREADY, sock_attach_ioctl(c.s, self->s.fd));
	EXPECT_EQ(EALREADY, ERRNO(setsockopt(c.s, SOL_PMSKB, PMSKB_ATTACH, &fd, sizeof(fd))));
	EXPECT_EQ(-EEXIST, sock_ulp(c.s));
	/* To another store: busy. */
	{
		struct store other;
		const char *why;

		if (dev_path(DEV_DAX, &why)) {
			ASSERT_EQ(0, store_make(&other, DEV_DAX, 0, 0));
			EXPECT_EQ(-EBUSY, sock_attach_ioctl(c.s, other.fd));
			EXPECT_EQ(0, store_close(&other));
		}
	}
	/* It has not suffered. */
	ASSERT_EQ(0, send_all(c.c, "x", 1));
	{
		char b;

		EXPECT_EQ(1, recv(c.s, &b, 1, 0));
	}
	conn_close(&c);
}

TEST_F(sock, what_is_neither_tcp_nor_udp_is_refused)
{
	struct {
		const char *what;
		int fd, want;
	} t[] = {
		{ "not open", 1000, -EBADF },
		{ "negative", -1, -EBADF },
		{ "the store itself", self->s.fd, -ENOTSOCK },
		{ "a file", open("/proc/self/exe", O_RDONLY), -ENOTSOCK },
		{ "ping", socket(AF_INET, SOCK_DGRAM, IPPROTO_ICMP), -EOPNOTSUPP },
		{ "unix datagrams", socket(AF_UNIX, SOCK_DGRAM, 0), -EOPNOTSUPP },
		{ "unix stream", socket(AF_UNIX, SOCK_STREAM, 0), -EOPNOTSUPP },
		{ "netlink", socket(AF_NETLINK, SOCK_RAW, 0), -EOPNOTSUPP },
		{ "raw", socket(AF_INET, SOCK_RAW, IPPROTO_ICMP), -EOPNOTSUPP },
		{ "packet", socket(AF_PACKET, SOCK_RAW, 0), -EOPNOTSUPP },
	};
	size_t i;

	for (i = 0; i < ARRAY_LEN(t); i++) {
		if (i > 3 && t[i].fd < 0)
			continue;
		EXPECT_EQ(t[i].want, sock_attach_ioctl(t[i].fd, self->s.fd)) TH_LOG("%s", t[i].what);
	}
	for (i = 4; i < ARRAY_LEN(t); i++) {
		if (t[i].fd < 0)
			continue;
		EXPECT_NE(0, sock_ulp(t[i].fd)) TH_LOG("%s", t[i].what);
		close(t[i].fd);
	}
}

TEST_F(sock, an_attached_socket_stays_one_of_ipv6)
{
	struct sockaddr_in6 mapped = { .sin6_family = AF_INET6 };
	struct sockaddr_storage addr;
	int l, fd, to = AF_INET;
	socklen_t len;

	/* What IPV6_ADDRFORM would take: connected, and to an address of IPv4. */
	l = net_listen(&self->net, &addr, &len);
	ASSERT_LE(0, l);
	inet_pton(AF_INET6, "::ffff:127.0.0.1", &mapped.sin6_addr);
	mapped.sin6_port = ((struct sockaddr_in *)&addr)->sin_port;
	fd = socket(AF_INET6, SOCK_STREAM, 0);
	ASSERT_EQ(0, connect(fd, (void *)&mapped, sizeof(mapped)));
	ASSERT_EQ(0, sock_attach_ioctl(fd, self->s.fd));
	EXPECT_EQ(EBUSY, ERRNO(setsockopt(fd, IPPROTO_IPV6, IPV6_ADDRFORM, &to, sizeof(to))));
	close(fd);
	/* One that is not attached may. */
	fd = socket(AF_INET6, SOCK_STREAM, 0);
	ASSERT_EQ(0, connect(fd, (void *)&mapped, sizeof(mapped)));
	EXPECT_EQ(0, ERRNO(setsockopt(fd, IPPROTO_IPV6, IPV6_ADDRFORM, &to, sizeof(to))));
	close(fd);
	close(l);
}

TEST_F(sock, multipath_tcp_is_refused)
{
	int fd = socket(AF_INET, SOCK_STREAM, IPPROTO_MPTCP);

	if (fd < 0)
		SKIP(return, "no MPTCP");
	EXPECT_EQ(-EOPNOTSUPP, sock_attach_ioctl(fd, self->s.fd));
	EXPECT_NE(0, sock_ulp(fd));
	close(fd);
}

TEST_F(sock, a_socket_that_tls_owns_is_refused_and_the_other_way_round)
{
	struct conn c;

	ASSERT_EQ(0, conn_make(&c, &self->net, -1, HOW_PLAIN));
	if (setsockopt(c.s, SOL_TCP, TCP_ULP, "tls", 4)) {
		conn_close(&c);
		SKIP(return, "no kTLS: %s", strerror(errno));
	}
	EXPECT_EQ(-EBUSY, sock_attach_ioctl(c.s, self->s.fd));
	EXPECT_EQ(-EEXIST, sock_ulp(c.s));
	conn_close(&c);

	ASSERT_EQ(0, conn_make(&c, &self->net, self->s.fd, HOW_ACCEPTED_IOCTL));
	EXPECT_EQ(EEXIST, ERRNO(setsockopt(c.s, SOL_TCP, TCP_ULP, "tls", 4)));
	conn_close(&c);
}

static int sockmap(int fd)
{
	union bpf_attr attr = {
		.map_type = BPF_MAP_TYPE_SOCKMAP,
		.key_size = 4,
		.value_size = 4,
		.max_entries = 1,
	};
	int map = syscall(__NR_bpf, BPF_MAP_CREATE, &attr, sizeof(attr)), key = 0, err = 0;

	if (map < 0)
		return -errno;
	memset(&attr, 0, sizeof(attr));
	attr.map_fd = map;
	attr.key = PTR(&key);
	attr.value = PTR(&fd);
	if (syscall(__NR_bpf, BPF_MAP_UPDATE_ELEM, &attr, sizeof(attr)))
		err = -errno;
	return err ?: map;
}

TEST_F(sock, a_socket_in_a_sockmap_is_refused_and_the_other_way_round)
{
	struct conn c;
	int map;

	ASSERT_EQ(0, conn_make(&c, &self->net, -1, HOW_PLAIN));
	map = sockmap(c.s);
	if (map < 0) {
		conn_close(&c);
		SKIP(return, "no sockmap: %s", strerror(-map));
	}
	EXPECT_EQ(-EBUSY, sock_attach_ioctl(c.s, self->s.fd));
	close(map);
	conn_close(&c);

	ASSERT_EQ(0, conn_make(&c, &self->net, self->s.fd, HOW_ACCEPTED_IOCTL));
	map = sockmap(c.s);
	EXPECT_EQ(-EINVAL, map) TH_LOG("an attached socket was put into a sockmap");
	if (map >= 0)
		close(map);
	ASSERT_EQ(0, send_all(c.c, "x", 1));
	{
		char b;

		EXPECT_EQ(1, recv(c.s, &b, 1, 0));
	}
	conn_close(&c);
}

TEST_F(sock, a_socket_can_be_attached_in_every_state)
{
	struct sockaddr_in nowhere = { .sin_family = AF_INET };
	struct pmskb_sock_info i;
	struct tcp_info ti;
	socklen_t len = sizeof(ti);
	struct conn c;
	char b[4];
	int fd;

	/* FIN_WAIT: half closed by us; the other half goes on. */
	ASSERT_EQ(0, conn_make(&c, &self->net, -1, HOW_PLAIN));
	ASSERT_EQ(0, shutdown(c.s, SHUT_WR));
	usleep(20000);
	ASSERT_EQ(0, getsockopt(c.s, SOL_TCP, TCP_INFO, &ti, &len));
	EXPECT_EQ(5 /* TCP_FIN_WAIT2 */, ti.tcpi_state);
	EXPECT_EQ(0, sock_attach_ioctl(c.s, self->s.fd));
	ASSERT_EQ(0, send_all(c.c, "more", 4));
	ASSERT_EQ(0, recv_all(c.s, b, 4));
	EXPECT_EQ(0, memcmp(b, "more", 4));
	ASSERT_EQ(0, sock_info(c.s, &i));
	EXPECT_EQ(4, i.counters.placed_bytes);
	conn_close(&c);

	/* SYN_SENT, and it comes to nothing. */
	if (!net_up(LINK_VETH)) {
		fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
		inet_pton(AF_INET, "10.77.1.77", &nowhere.sin_addr);
		nowhere.sin_port = htons(9);
		EXPECT_EQ(EINPROGRESS, ERRNO(connect(fd, (void *)&nowhere, sizeof(nowhere))));
		EXPECT_EQ(0, sock_attach_ioctl(fd, self->s.fd));
		close(fd);
	}

	/* CLOSE_WAIT: the other end has closed; there may be data to read. */
	ASSERT_EQ(0, conn_make(&c, &self->net, -1, HOW_PLAIN));
	ASSERT_EQ(0, send_all(c.c, "last", 4));
	ASSERT_EQ(0, shutdown(c.c, SHUT_WR));
	usleep(50000);
	EXPECT_EQ(0, sock_attach_ioctl(c.s, self->s.fd));
	EXPECT_EQ(0, recv_all(c.s, b, 4));
	EXPECT_EQ(0, recv(c.s, b, 1, 0));
	conn_close(&c);

	/* Reset: closed for good. */
	{
		struct linger lin = { 1, 0 };

		ASSERT_EQ(0, conn_make(&c, &self->net, -1, HOW_PLAIN));
		ASSERT_EQ(0, setsockopt(c.c, SOL_SOCKET, SO_LINGER, &lin, sizeof(lin)));
		close(c.c);
		c.c = -1;
		usleep(20000);
		EXPECT_EQ(0, sock_attach_ioctl(c.s, self->s.fd));
		EXPECT_EQ(ECONNRESET, ERRNO(recv(c.s, b, 1, 0)));
		conn_close(&c);
	}
}

TEST_F(sock, a_client_attaches_before_it_connects_and_after)
{
	struct sockaddr_storage addr;
	struct pmskb_sock_info i;
	socklen_t len;
	int l, c, s;
	char buf[8];

	l = net_listen(&self->net, &addr, &len);
	ASSERT_LE(0, l);
	c = net_client(&self->net);
	ASSERT_EQ(0, sock_attach_opt(c, self->s.fd));
	ASSERT_EQ(0, connect(c, (void *)&addr, len));
	s = accept(l, NULL, NULL);
	ASSERT_LE(0, s);
	ASSERT_EQ(0, send_all(s, "welcome!", 8));
	ASSERT_EQ(0, recv_all(c, buf, 8));
	EXPECT_EQ(0, memcmp(buf, "welcome!", 8));
	ASSERT_EQ(0, sock_info(c, &i));
	EXPECT_EQ(8, i.counters.placed_bytes);
	/* disconnect: the ULP stays or goes, as the stack says; nothing crashes */
	{
		struct sockaddr sa = { .sa_family = AF_UNSPEC };

		connect(c, &sa, sizeof(sa));
		recv(c, buf, 1, MSG_DONTWAIT);
	}
	close(c);
	close(s);
	close(l);
}

TEST_F(sock, attach_wants_an_open_store)
{
	struct conn c;
	int fds[] = { -1, 1000, open("/dev/null", O_RDWR), self->s.ctl };
	int want[] = { EBADF, EBADF, EINVAL, EINVAL };
	struct pmskb_sock_info i;
	size_t k;

	ASSERT_EQ(0, conn_make(&c, &self->net, -1, HOW_PLAIN));
	ASSERT_EQ(0, sock_ulp(c.s));
	for (k = 0; k < ARRAY_LEN(fds); k++) {
		EXPECT_EQ(want[k], ERRNO(setsockopt(c.s, SOL_PMSKB, PMSKB_ATTACH, &fds[k], sizeof(int))))
			TH_LOG("fd %d", fds[k]);
	}
	ASSERT_EQ(0, sock_info(c.s, &i));
	EXPECT_EQ(~0U, i.store);
	/* A socket with the ULP and no store is a plain socket. */
	ASSERT_EQ(0, send_all(c.c, "x", 1));
	{
		char b = 0;

		EXPECT_EQ(1, recv(c.s, &b, 1, 0));
		EXPECT_EQ('x', b);
	}
	close(fds[2]);
	conn_close(&c);
}

TEST_F(sock, without_a_store_there_are_no_modes_tokens_or_operations)
{
	struct pmskb_op op = op_put("k", 1, NULL, 0);
	struct pmskb_result r;
	struct conn c;

	ASSERT_EQ(0, conn_make(&c, &self->net, -1, HOW_PLAIN));
	/* Without the ULP there is not even the level. */
	EXPECT_EQ(-ENOPROTOOPT, sock_mode(c.s, PMSKB_RX_DESC));
	ASSERT_EQ(0, sock_ulp(c.s));
	EXPECT_EQ(-EUNATCH, sock_mode(c.s, PMSKB_RX_DESC));
	EXPECT_EQ(-EUNATCH, desc_release(c.s, 1, 1));
	EXPECT_EQ(-EUNATCH, persist(c.s, &op, &r, 1));
	conn_close(&c);
}

TEST_F(sock, options_are_of_their_size_and_no_other)
{
	static const struct {
		int name;
		socklen_t size;
	} sized[] = {
		{ PMSKB_RX_MODE, 4 },
		{ PMSKB_PERSIST, sizeof(struct pmskb_submit) },
		{ PMSKB_ATTACH, 4 },
		{ PMSKB_RELEASE, sizeof(struct pmskb_token_range) },
	};
	char buf[256] = {};
	struct conn c;
	size_t i;

	ASSERT_EQ(0, conn_make(&c, &self->net, self->s.fd, HOW_ACCEPTED_IOCTL));
	for (i = 0; i < ARRAY_LEN(sized); i++) {
		EXPECT_EQ(EINVAL, ERRNO(setsockopt(c.s, SOL_PMSKB, sized[i].name, buf, 0))) TH_LOG("option %d", sized[i].name);
		EXPECT_EQ(EINVAL, ERRNO(setsockopt(c.s, SOL_PMSKB, sized[i].name, buf, sized[i].size - 1))) TH_LOG("option %d", sized[i].name);
		EXPECT_EQ(EINVAL, ERRNO(setsockopt(c.s, SOL_PMSKB, sized[i].name, buf, sized[i].size + 1))) TH_LOG("option %d", sized[i].name);
		EXPECT_EQ(EFAULT, ERRNO(setsockopt(c.s, SOL_PMSKB, sized[i].name, BAD_PTR, sized[i].size))) TH_LOG("option %d", sized[i].name);
	}
	EXPECT_EQ(EINVAL, ERRNO(setsockopt(c.s, SOL_PMSKB, PMSKB_RX_MODE, buf, -1)));
	conn_close(&c);
}

TEST_F(sock, unknown_options_are_enoprotoopt)
{
	socklen_t len = 64;
	char buf[64] = {};
	struct conn c;

	ASSERT_EQ(0, conn_make(&c, &self->net, self->s.fd, HOW_ACCEPTED_IOCTL));
	EXPECT_EQ(ENOPROTOOPT, ERRNO(setsockopt(c.s, SOL_PMSKB, 0, buf, 4)));
	EXPECT_EQ(ENOPROTOOPT, ERRNO(setsockopt(c.s, SOL_PMSKB, 99, buf, 4)));
	EXPECT_EQ(ENOPROTOOPT, ERRNO(setsockopt(c.s, SOL_PMSKB, -1, buf, 4)));
	EXPECT_EQ(ENOPROTOOPT, ERRNO(getsockopt(c.s, SOL_PMSKB, 99, buf, &len)));
	/* Each in its direction only. */
	EXPECT_EQ(ENOPROTOOPT, ERRNO(setsockopt(c.s, SOL_PMSKB, PMSKB_INFO, buf, 64)));
	EXPECT_EQ(ENOPROTOOPT, ERRNO(getsockopt(c.s, SOL_PMSKB, PMSKB_PERSIST, buf, &len)));
	EXPECT_EQ(ENOPROTOOPT, ERRNO(getsockopt(c.s, SOL_PMSKB, PMSKB_RELEASE, buf, &len)));
	/* Other levels are not ours to touch. */
	{
		int one = 1, v = 0;

		len = sizeof(v);
		EXPECT_EQ(0, setsockopt(c.s, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one)));
		EXPECT_EQ(0, getsockopt(c.s, IPPROTO_TCP, TCP_NODELAY, &v, &len));
		EXPECT_EQ(1, v);
		EXPECT_EQ(0, setsockopt(c.s, SOL_SOCKET, SO_KEEPALIVE, &one, sizeof(one)));
		EXPECT_EQ(0, setsockopt(c.s, IPPROTO_IP, IP_TOS, &one, sizeof(one)));
	}
	conn_close(&c);
}

TEST_F(sock, getsockopt_fills_what_is_asked_for_and_tells_the_size)
{
	struct pmskb_sock_info i;
	socklen_t len;
	uint32_t mode = 77;
	char big[512];
	struct conn c;

	ASSERT_EQ(0, conn_make(&c, &self->net, self->s.fd, HOW_ACCEPTED_IOCTL));
	len = sizeof(mode);
	EXPECT_EQ(0, getsockopt(c.s, SOL_PMSKB, PMSKB_RX_MODE, &mode, &len));
	EXPECT_EQ(PMSKB_RX_BYTES, mode);
	EXPECT_EQ(4, len);
	ASSERT_EQ(0, sock_mode(c.s, PMSKB_RX_DESC));
	EXPECT_EQ(0, getsockopt(c.s, SOL_PMSKB, PMSKB_RX_MODE, &mode, &len));
	EXPECT_EQ(PMSKB_RX_DESC, mode);

	len = sizeof(big);
	memset(big, 0x5a, sizeof(big));
	EXPECT_EQ(0, getsockopt(c.s, SOL_PMSKB, PMSKB_INFO, big, &len));
	EXPECT_EQ(sizeof(i), len);
	EXPECT_EQ(0x5a, big[sizeof(i)]);
	len = sizeof(i) - 1;
	EXPECT_EQ(EINVAL, ERRNO(getsockopt(c.s, SOL_PMSKB, PMSKB_INFO, &i, &len)));
	len = 3;
	EXPECT_EQ(EINVAL, ERRNO(getsockopt(c.s, SOL_PMSKB, PMSKB_RX_MODE, &mode, &len)));
	len = -1;
	EXPECT_EQ(EINVAL, ERRNO(getsockopt(c.s, SOL_PMSKB, PMSKB_RX_MODE, &mode, &len)));
	len = sizeof(i);
	EXPECT_EQ(EFAULT, ERRNO(getsockopt(c.s, SOL_PMSKB, PMSKB_INFO, BAD_PTR, &len)));
	EXPECT_EQ(EFAULT, ERRNO(getsockopt(c.s, SOL_PMSKB, PMSKB_INFO, &i, BAD_PTR)));
	conn_close(&c);
}

TEST_F(sock, unknown_modes_are_einval)
{
	struct pmskb_sock_info i;
	struct conn c;

	ASSERT_EQ(0, conn_make(&c, &self->net, self->s.fd, HOW_ACCEPTED_IOCTL));
	EXPECT_EQ(-EINVAL, sock_mode(c.s, 2));
	EXPECT_EQ(-EINVAL, sock_mode(c.s, ~0U));
	ASSERT_EQ(0, sock_info(c.s, &i));
	EXPECT_EQ(PMSKB_RX_BYTES, i.rx_mode);
	conn_close(&c);
}

TEST_F(sock, tokens_belong_to_the_socket_and_not_to_the_descriptor)
{
	struct pmskb_sock_info i;
	struct pmskb_desc d[16];
	struct conn c;
	int n, st, two;
	pid_t pid;

	ASSERT_EQ(0, conn_make(&c, &self->net, self->s.fd, HOW_ACCEPTED_IOCTL));
	ASSERT_EQ(0, sock_mode(c.s, PMSKB_RX_DESC));
	ASSERT_EQ(0, send_all(c.c, "abc", 3));
	n = desc_recv_bytes(c.s, d, ARRAY_LEN(d), 3);
	ASSERT_EQ(1, n);
	two = dup(c.s);
	close(c.s);
	c.s = two;
	ASSERT_EQ(0, sock_info(c.s, &i));
	EXPECT_EQ(1, i.tokens);
	/* A child that exits takes nothing with it. */
	pid = fork();
	if (!pid)
		_exit(0);
	ASSERT_EQ(pid, waitpid(pid, &st, 0));
	ASSERT_EQ(0, sock_info(c.s, &i));
	EXPECT_EQ(1, i.tokens);
	/* A child may use them. */
	pid = fork();
	if (!pid)
		_exit(desc_release(c.s, d[0].token, 1) ? 1 : 0);
	ASSERT_EQ(pid, waitpid(pid, &st, 0));
	EXPECT_EQ(0, st);
	ASSERT_EQ(0, sock_info(c.s, &i));
	EXPECT_EQ(0, i.tokens);
	conn_close(&c);
}

TEST_F(sock, a_socket_sent_to_another_process_is_still_attached)
{
	char control[CMSG_SPACE(sizeof(int))] = {}, byte = 0;
	struct iovec iov = { &byte, 1 };
	struct msghdr msg = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control,
			      .msg_controllen = sizeof(control) };
	struct cmsghdr *cmsg = CMSG_FIRSTHDR(&msg);
	struct pmskb_sock_info i;
	int pair[2], st;
	struct conn c;
	pid_t pid;

	ASSERT_EQ(0, conn_make(&c, &self->net, self->s.fd, HOW_ACCEPTED_IOCTL));
	ASSERT_EQ(0, socketpair(AF_UNIX, SOCK_STREAM, 0, pair));
	pid = fork();
	if (!pid) {
		int fd;

		close(c.s);
		if (recvmsg(pair[1], &msg, 0) != 1)
			_exit(1);
		memcpy(&fd, CMSG_DATA(CMSG_FIRSTHDR(&msg)), sizeof(fd));
		if (recv_all(fd, control, 5) || memcmp(control, "hello", 5))
			_exit(2);
		if (sock_info(fd, &i) || i.counters.placed_bytes != 5)
			_exit(3);
		_exit(0);
	}
	cmsg->cmsg_level = SOL_SOCKET;
	cmsg->cmsg_type = SCM_RIGHTS;
	cmsg->cmsg_len = CMSG_LEN(sizeof(int));
	memcpy(CMSG_DATA(cmsg), &c.s, sizeof(int));
	ASSERT_EQ(1, sendmsg(pair[0], &msg, 0));
	close(c.s);
	c.s = -1;
	ASSERT_EQ(0, send_all(c.c, "hello", 5));
	ASSERT_EQ(pid, waitpid(pid, &st, 0));
	EXPECT_EQ(0, st) TH_LOG("exit %d", WEXITSTATUS(st));
	close(pair[0]);
	close(pair[1]);
	conn_close(&c);
}

TEST_F(sock, close_lets_go_of_the_store_while_tcp_lingers)
{
	struct pmskb_desc d[64];
	static char buf[100000];
	struct conn c;
	int n;

	ASSERT_EQ(0, conn_make(&c, &self->net, self->s.fd, HOW_ACCEPTED_IOCTL));
	ASSERT_EQ(0, sock_mode(c.s, PMSKB_RX_DESC));
	ASSERT_EQ(0, send_all(c.c, buf, 1000));
	n = desc_recv_bytes(c.s, d, ARRAY_LEN(d), 1000);
	ASSERT_LT(0, n);
	/* A reply that the client does not read: the socket cannot go. */
	fcntl(c.s, F_SETFL, O_NONBLOCK);
	while (send(c.s, buf, sizeof(buf), MSG_NOSIGNAL) > 0)
		;
	close(c.s);
	c.s = -1;
	usleep(50000);
	store_let_go(&self->s);
	ASSERT_EQ(0, dev_detach(self->s.ctl, self->s.minor, 5000 * slowness())) TH_LOG("an orphaned socket holds the store");
	self->s.minor = ~0U;
	/* And what arrives for the orphan from now on harms nobody. */
	send(c.c, buf, 1000, MSG_NOSIGNAL);
	while (recv(c.c, buf, sizeof(buf), MSG_DONTWAIT) > 0)
		;
	conn_close(&c);
}

TEST_F(sock, a_time_wait_socket_does_not_hold_the_store)
{
	struct conn c;

	ASSERT_EQ(0, conn_make(&c, &self->net, self->s.fd, HOW_LISTENER_OPT));
	/* The server closes first: TIME_WAIT is with it. */
	close(c.s);
	c.s = -1;
	usleep(20000);
	close(c.c);
	c.c = -1;
	usleep(20000);
	store_let_go(&self->s);
	ASSERT_EQ(0, dev_detach(self->s.ctl, self->s.minor, 2000 * slowness()));
	self->s.minor = ~0U;
}

TEST_F(sock, a_listener_closed_with_waiting_connections_lets_go)
{
	struct sockaddr_storage addr;
	struct pmskb_store_info si;
	socklen_t len;
	int l, c[20], k;

	l = net_listen(&self->net, &addr, &len);
	ASSERT_LE(0, l);
	ASSERT_EQ(0, sock_attach_ioctl(l, self->s.fd));
	for (k = 0; k < 20; k++) {
		c[k] = net_connect(&self->net, &addr, len);
		ASSERT_LE(0, c[k]);
		ASSERT_EQ(0, send_all(c[k], "never read", 10));
	}
	close(l);
	for (k = 0; k < 20; k++)
		close(c[k]);
	EXPECT_EQ(0, store_back(&self->s, 5000, &si));
	EXPECT_EQ(0, si.sockets);
}

TEST_F(sock, ss_shows_the_ulp)
{
	struct conn c;

	if (!have_program("ss"))
		SKIP(return, "there is no ss");
	ASSERT_EQ(0, conn_make(&c, &self->net, self->s.fd, HOW_ACCEPTED_IOCTL));
	EXPECT_EQ(0, sh("ss -tin | grep -q 'ulp:pmskb\\|tcp-ulp-pmskb'"));
	conn_close(&c);
}

TEST_F(sock, a_plain_socket_beside_is_left_alone)
{
	struct pmskb_store_info a, b;
	struct conn plain, c;
	char buf[1000];

	ASSERT_EQ(0, conn_make(&c, &self->net, self->s.fd, HOW_ACCEPTED_IOCTL));
	ASSERT_EQ(0, conn_make(&plain, &self->net, -1, HOW_PLAIN));
	ASSERT_EQ(0, store_info(&self->s, &a));
	ASSERT_EQ(0, send_all(plain.c, buf, sizeof(buf)));
	ASSERT_EQ(0, recv_all(plain.s, buf, sizeof(buf)));
	ASSERT_EQ(0, store_info(&self->s, &b));
	EXPECT_EQ(a.counters.placed, b.counters.placed);
	EXPECT_EQ(a.frames_free, b.frames_free);
	conn_close(&plain);
	conn_close(&c);
}

TEST_HARNESS_MAIN
