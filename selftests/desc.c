// SPDX-License-Identifier: GPL-2.0
/*
 * Promises about descriptor mode: what recvmsg() says about bytes that it does
 * not copy, and the tokens that hold them.
 */
#include "common.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/ioctl.h>
#include <sys/resource.h>
#include <time.h>

#include "harness.h"

#define ERRNO(call) ((call) < 0 ? errno : 0)
#define MAX_DESC 4096

FIXTURE(desc) {
	struct store s;
	struct conn c;
	struct net net;
};

FIXTURE_VARIANT(desc) {
	int family;
	enum dev dev;
	enum link link;
	enum how how;
	uint32_t flags;
};

FIXTURE_VARIANT_ADD(desc, v4_pmem_lo) { AF_INET, DEV_PMEM, LINK_LO, HOW_LISTENER_OPT };
FIXTURE_VARIANT_ADD(desc, v6_dax_lo) { AF_INET6, DEV_DAX, LINK_LO, HOW_ACCEPTED_OPT };
FIXTURE_VARIANT_ADD(desc, v6_pmem_veth) { AF_INET6, DEV_PMEM, LINK_VETH, HOW_LISTENER_IOCTL, PMSKB_FORMAT_HEADS_DRAM };
FIXTURE_VARIANT_ADD(desc, v4_dax_veth) { AF_INET, DEV_DAX, LINK_VETH, HOW_LISTENER_OPT };
FIXTURE_VARIANT_ADD(desc, v4_pmem_noffload) { AF_INET, DEV_PMEM, LINK_PLAIN, HOW_ACCEPTED_IOCTL };
FIXTURE_VARIANT_ADD(desc, v6_dax_noffload) { AF_INET6, DEV_DAX, LINK_PLAIN, HOW_LISTENER_OPT };

static struct pmskb_desc d[MAX_DESC];

FIXTURE_SETUP(desc)
{
	const char *why;

	if (!dev_path(variant->dev, &why))
		SKIP(return, "%s", why);
	why = net_up(variant->link);
	if (why)
		SKIP(return, "%s", why);
	self->net = (struct net) { variant->family, variant->link };
	ASSERT_EQ(0, store_make(&self->s, variant->dev, variant->flags, 0));
	ASSERT_EQ(0, conn_make(&self->c, &self->net, self->s.fd, variant->how));
	ASSERT_EQ(0, sock_mode(self->c.s, PMSKB_RX_DESC));
}

FIXTURE_TEARDOWN(desc)
{
	struct pmskb_store_info info;

	conn_close(&self->c);
	EXPECT_EQ(0, store_quiet(&self->s, 5000, &info)) TH_LOG("frames are left behind");
	EXPECT_EQ(0, store_close(&self->s));
}

/* Checks all that must hold for any descriptors; the sum of their lengths. */
static uint64_t check(struct __test_metadata *_metadata, const struct store *s,
		      const struct pmskb_desc *d, int n, uint32_t seed, uint64_t pos)
{
	static uint8_t packet[1 << 20];
	uint64_t sum = 0;
	int i;

	for (i = 0; i < n; i++) {
		EXPECT_LT(0, d[i].len);
		EXPECT_EQ(s->minor, d[i].store);
		EXPECT_EQ(0, d[i].flags & ~(PMSKB_DESC_COPIED | PMSKB_DESC_PARTIAL));
		ASSERT_LE(s->info.data_off, d[i].offset);
		ASSERT_LE(d[i].offset + d[i].len, s->map_len);
		EXPECT_EQ(-1, differs(s->map + d[i].offset, d[i].len, seed, pos + sum))
			TH_LOG("descriptor %d of %d: other bytes than were sent", i, n);
		ASSERT_LE((uint64_t)d[i].pkt_off + d[i].len, d[i].pkt_len);
		EXPECT_EQ(d[i].len != d[i].pkt_len, !!(d[i].flags & PMSKB_DESC_PARTIAL))
			TH_LOG("%u of %u bytes", d[i].len, d[i].pkt_len);
		if (i) {
			EXPECT_EQ(d[i - 1].seq + d[i - 1].len, d[i].seq) TH_LOG("a hole before %d", i);
			/* Either the same packet goes on, or a new one begins. */
			if (d[i - 1].pkt_off + d[i - 1].len < d[i - 1].pkt_len) {
				EXPECT_EQ(d[i - 1].pkt_off + d[i - 1].len, d[i].pkt_off);
				EXPECT_EQ(d[i - 1].pkt_len, d[i].pkt_len);
				EXPECT_EQ(d[i - 1].csum, d[i].csum);
				EXPECT_EQ(d[i - 1].csum_kind, d[i].csum_kind);
				EXPECT_EQ(d[i - 1].time, d[i].time);
			} else {
				EXPECT_EQ(0, d[i].pkt_off);
			}
		}
		EXPECT_NE(0xffff, d[i].csum) TH_LOG("zero has two forms");
		EXPECT_LE(PMSKB_CSUM_DERIVED, d[i].csum_kind);
		EXPECT_GE(PMSKB_CSUM_COMPUTED, d[i].csum_kind);
		/* The sum of a packet that lies here whole. */
		if (d[i].pkt_len <= sizeof(packet) && d[i].pkt_off + d[i].len == d[i].pkt_len) {
			uint32_t have = 0;
			int k = i;

			while (k >= 0 && d[k].pkt_off && d[k].pkt_len == d[i].pkt_len)
				k--;
			if (k >= 0 && !d[k].pkt_off) {
				for (; k <= i; k++) {
					memcpy(packet + have, s->map + d[k].offset, d[k].len);
					have += d[k].len;
				}
				ASSERT_EQ(d[i].pkt_len, have);
				EXPECT_EQ(rfc1071(packet, have), d[i].csum)
					TH_LOG("kind %u, %u bytes", d[i].csum_kind, have);
			}
		}
		sum += d[i].len;
	}
	return sum;
}

TEST_F_TIMEOUT(desc, descriptors_name_the_bytes_that_were_sent, 120)
{
	uint64_t len = 8 << 20, pos = 0;
	struct pmskb_sock_info info;
	struct sender snd;
	ssize_t bytes;
	int n;

	ASSERT_EQ(0, sender_start(&snd, self->c.c, 21, len, 100000, true));
	for (;;) {
		uint64_t sum;

		n = desc_recv_flags(self->c.s, d, 64, 0, &bytes, NULL);
		ASSERT_LE(0, n);
		if (!n)
			break;
		sum = check(_metadata, &self->s, d, n, 21, pos);
		EXPECT_EQ(bytes, sum) TH_LOG("recvmsg() returns what its descriptors describe");
		pos += sum;
		ASSERT_EQ(0, desc_release_all(self->c.s, d, n));
	}
	EXPECT_EQ(0, bytes);
	EXPECT_EQ(len, pos);
	EXPECT_EQ(0, sender_wait(&snd));
	ASSERT_EQ(0, sock_info(self->c.s, &info));
	EXPECT_LE(len, info.counters.placed_bytes + info.counters.copied_bytes);
	EXPECT_EQ(0, info.counters.copied_bytes);
	EXPECT_EQ(0, info.tokens);
	EXPECT_EQ(0, info.counters.mismatch);
}

TEST_F(desc, every_length_of_a_packet_is_summed_right)
{
	static uint8_t buf[1500];
	uint64_t pos = 0;
	size_t len;

	for (len = 1; len < 1400; len += len < 70 ? 1 : 61) {
		int n;

		fill(buf, len, 22, pos);
		/* Also sums of 0 in both forms. */
		if (len % 7 == 0)
			memset(buf, len % 2 ? 0 : 0xff, len);
		ASSERT_EQ(0, send_all(self->c.c, buf, len));
		n = desc_recv_bytes(self->c.s, d, MAX_DESC, len);
		ASSERT_LT(0, n);
		EXPECT_EQ(len, d[0].pkt_len);
		EXPECT_EQ(rfc1071(buf, len), d[0].csum) TH_LOG("%zu bytes, kind %u", len, d[0].csum_kind);
		EXPECT_EQ(0, memcmp(self->s.map + d[0].offset, buf, d[0].len));
		ASSERT_EQ(0, desc_release_all(self->c.s, d, n));
		pos += len;
	}
}

TEST_F(desc, in_order_packets_lie_densely)
{
	static uint8_t buf[20 * 100];
	int n, i, adjacent = 0;

	for (i = 0; i < 20; i++) {
		fill(buf + i * 100, 100, 23, i * 100);
		ASSERT_EQ(0, send_all(self->c.c, buf + i * 100, 100));
		usleep(2000);
	}
	n = desc_recv_bytes(self->c.s, d, MAX_DESC, sizeof(buf));
	ASSERT_LT(0, n);
	check(_metadata, &self->s, d, n, 23, 0);
	for (i = 1; i < n; i++)
		adjacent += d[i].offset == d[i - 1].offset + d[i - 1].len;
	/* Others may use a frame's rest, so not each of them must. */
	EXPECT_LE(n - 1 - 2, adjacent) TH_LOG("%d of %d", adjacent, n - 1);
}

TEST_F(desc, timestamps_are_between_send_and_receive_and_name_their_clock)
{
	struct timespec a, b;
	int n, i;

	clock_gettime(CLOCK_REALTIME, &a);
	ASSERT_EQ(0, send_all(self->c.c, "now", 3));
	n = desc_recv_bytes(self->c.s, d, MAX_DESC, 3);
	clock_gettime(CLOCK_REALTIME, &b);
	ASSERT_LT(0, n);
	for (i = 0; i < n; i++) {
		EXPECT_TRUE(d[i].time_source == PMSKB_TIME_SOFTWARE || d[i].time_source == PMSKB_TIME_PLACEMENT)
			TH_LOG("source %u", d[i].time_source);
		/* The kernel's coarse clock may lag by a tick. */
		EXPECT_LE(a.tv_sec * 1000000000ULL + a.tv_nsec - 20000000, d[i].time);
		EXPECT_GE(b.tv_sec * 1000000000ULL + b.tv_nsec, d[i].time);
	}
}

TEST_F(desc, a_small_control_buffer_loses_nothing)
{
	uint64_t len = 300000, pos = 0;
	struct sender snd;
	ssize_t bytes;
	int n, flags;

	ASSERT_EQ(0, sender_start(&snd, self->c.c, 24, len, 1000, true));
	while (pos < len) {
		/* One at a time, now and then two. */
		n = desc_recv_flags(self->c.s, d, 1 + pos % 5 / 4, 0, &bytes, &flags);
		ASSERT_LT(0, n);
		EXPECT_EQ(0, flags & (MSG_CTRUNC | MSG_TRUNC));
		pos += check(_metadata, &self->s, d, n, 24, pos);
		ASSERT_EQ(0, desc_release_all(self->c.s, d, n));
	}
	EXPECT_EQ(len, pos);
	EXPECT_EQ(0, sender_wait(&snd));
}

TEST_F(desc, no_room_for_a_descriptor_is_emsgsize_and_consumes_nothing)
{
	char data[16], control[CMSG_SPACE(sizeof(struct pmskb_desc)) - 1];
	struct iovec iov = { data, sizeof(data) };
	struct msghdr msg = { .msg_iov = &iov, .msg_iovlen = 1 };
	struct pmskb_sock_info info;
	char b;

	ASSERT_EQ(0, send_all(self->c.c, "precious", 8));
	usleep(30000);
	EXPECT_EQ(EMSGSIZE, ERRNO(recvmsg(self->c.s, &msg, 0)));
	msg.msg_control = control;
	msg.msg_controllen = CMSG_LEN(sizeof(struct pmskb_desc)) - 1;
	EXPECT_EQ(EMSGSIZE, ERRNO(recvmsg(self->c.s, &msg, 0)));
	/* A plain read has no room at all. */
	EXPECT_EQ(EMSGSIZE, ERRNO(read(self->c.s, &b, 1)));
	ASSERT_EQ(0, sock_info(self->c.s, &info));
	EXPECT_EQ(0, info.tokens);
	ASSERT_EQ(1, desc_recv_bytes(self->c.s, d, 8, 8));
	EXPECT_EQ(0, memcmp(self->s.map + d[0].offset, "precious", 8));
}

TEST_F(desc, a_control_buffer_that_faults_loses_nothing)
{
	char data[16];
	struct iovec iov = { data, sizeof(data) };
	struct msghdr msg = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = BAD_PTR, .msg_controllen = 4096 };
	struct pmskb_sock_info info;

	ASSERT_EQ(0, send_all(self->c.c, "precious", 8));
	usleep(30000);
	EXPECT_EQ(EFAULT, ERRNO(recvmsg(self->c.s, &msg, 0)));
	ASSERT_EQ(0, sock_info(self->c.s, &info));
	EXPECT_EQ(0, info.tokens);
	ASSERT_EQ(1, desc_recv_bytes(self->c.s, d, 8, 8));
	EXPECT_EQ(0, memcmp(self->s.map + d[0].offset, "precious", 8));
}

TEST_F(desc, tokens_are_unique_and_counted)
{
	struct pmskb_store_info si;
	struct pmskb_sock_info info;
	static char buf[200 * 50];
	int n, i, k;

	for (i = 0; i < 200; i++) {
		ASSERT_EQ(0, send_all(self->c.c, buf + i * 50, 50));
	}
	n = desc_recv_bytes(self->c.s, d, MAX_DESC, sizeof(buf));
	ASSERT_LT(0, n);
	for (i = 0; i < n; i++)
		for (k = 0; k < i; k++) {
			ASSERT_NE(d[i].token, d[k].token);
		}
	ASSERT_EQ(0, sock_info(self->c.s, &info));
	EXPECT_EQ(n, info.tokens);
	ASSERT_EQ(0, store_info(&self->s, &si));
	EXPECT_EQ(n, si.tokens);
	for (i = 0; i < n; i++) {
		ASSERT_EQ(0, desc_release(self->c.s, d[i].token, 1));
		ASSERT_EQ(0, sock_info(self->c.s, &info));
		ASSERT_EQ(n - 1 - i, info.tokens);
	}
	/* All but the one that the socket is filling. */
	EXPECT_EQ(0, store_quiet(&self->s, 5000, &si));
	EXPECT_LE(self->s.info.frames_free - 2, si.frames_free);
}

TEST_F(desc, held_bytes_do_not_change_under_later_traffic)
{
	static char held[30000], buf[60000];
	int n, i, k;
	struct pmskb_desc *more = d + 1024;
	uint64_t pos = 0;

	fill(held, sizeof(held), 25, 0);
	ASSERT_EQ(0, send_all(self->c.c, held, sizeof(held)));
	n = desc_recv_bytes(self->c.s, d, 1024, sizeof(held));
	ASSERT_LT(0, n);
	for (i = 0; i < 100; i++) {
		ASSERT_EQ(0, send_all(self->c.c, buf, sizeof(buf)));
		k = desc_recv_bytes(self->c.s, more, 1024, sizeof(buf));
		ASSERT_LT(0, k);
		ASSERT_EQ(0, desc_release_all(self->c.s, more, k));
	}
	for (i = 0; i < n; i++) {
		EXPECT_EQ(-1, differs(self->s.map + d[i].offset, d[i].len, 25, pos));
		pos += d[i].len;
	}
}

TEST_F(desc, a_release_counts_what_it_found_and_is_estale_if_that_is_nothing)
{
	struct pmskb_token_range r[3];
	struct pmskb_sock_info info;

	ASSERT_EQ(0, send_all(self->c.c, "a", 1));
	ASSERT_EQ(1, desc_recv_bytes(self->c.s, d, 8, 1));
	EXPECT_EQ(-ESTALE, desc_release(self->c.s, d[0].token + 1, 1));
	EXPECT_EQ(-ESTALE, desc_release(self->c.s, d[0].token + 0x10000, 1));
	EXPECT_EQ(-ESTALE, desc_release(self->c.s, ~0U, 1));
	EXPECT_EQ(-ESTALE, desc_release(self->c.s, ~0U, 2));
	EXPECT_EQ(-EINVAL, desc_release(self->c.s, d[0].token, 0));
	/* Something wrong behind something right: nothing is released. */
	r[0] = (struct pmskb_token_range) { d[0].token, 1 };
	r[1] = (struct pmskb_token_range) { d[0].token, 0 };
	EXPECT_EQ(EINVAL, ERRNO(setsockopt(self->c.s, SOL_PMSKB, PMSKB_RELEASE, r, 2 * sizeof(r[0]))));
	ASSERT_EQ(0, sock_info(self->c.s, &info));
	EXPECT_EQ(1, info.tokens);
	/* Twice the same, and others that are not held: one was. */
	r[1] = r[0];
	r[2] = (struct pmskb_token_range) { d[0].token + 5, 1 };
	EXPECT_EQ(1, setsockopt(self->c.s, SOL_PMSKB, PMSKB_RELEASE, r, sizeof(r)));
	EXPECT_EQ(-ESTALE, desc_release(self->c.s, d[0].token, 1));
	/* All that there can be, in bounded time. */
	ASSERT_EQ(0, send_all(self->c.c, "b", 1));
	ASSERT_EQ(1, desc_recv_bytes(self->c.s, d, 8, 1));
	r[0] = (struct pmskb_token_range) { 0, ~0U };
	EXPECT_EQ(1, setsockopt(self->c.s, SOL_PMSKB, PMSKB_RELEASE, r, sizeof(r[0])));
}

TEST_F(desc, the_buffers_length_bounds_the_bytes_and_their_contents_stay)
{
	char control[64 * CMSG_SPACE(sizeof(struct pmskb_desc))], data[100], more[50];
	struct iovec iov[2] = { { data, sizeof(data) }, { more, sizeof(more) } };
	static char buf[1000];
	uint64_t pos = 0;

	fill(buf, sizeof(buf), 28, 0);
	ASSERT_EQ(0, send_all(self->c.c, buf, sizeof(buf)));
	memset(data, 0x33, sizeof(data));
	memset(more, 0x33, sizeof(more));
	while (pos < sizeof(buf)) {
		struct msghdr msg = { .msg_iov = iov, .msg_iovlen = 2, .msg_control = control,
				      .msg_controllen = sizeof(control) };
		struct cmsghdr *cmsg;
		struct pmskb_desc one;
		ssize_t n = recvmsg(self->c.s, &msg, 0), sum = 0;

		ASSERT_LT(0, n);
		EXPECT_GE(150, n);
		for (cmsg = CMSG_FIRSTHDR(&msg); cmsg; cmsg = CMSG_NXTHDR(&msg, cmsg)) {
			memcpy(&one, CMSG_DATA(cmsg), sizeof(one));
			EXPECT_EQ(-1, differs(self->s.map + one.offset, one.len, 28, pos + sum));
			sum += one.len;
			ASSERT_EQ(0, desc_release(self->c.s, one.token, 1));
		}
		ASSERT_EQ(n, sum);
		pos += n;
	}
	EXPECT_EQ(sizeof(buf), pos);
	EXPECT_EQ(0x33, data[0]);
	EXPECT_EQ(0x33, more[49]);
}

TEST_F(desc, a_release_of_too_many_ranges_is_e2big)
{
	static struct pmskb_token_range r[PMSKB_MAX_OPS + 1];
	size_t i;

	for (i = 0; i < ARRAY_LEN(r); i++)
		r[i] = (struct pmskb_token_range) { 0x700000 + i, 1 };
	EXPECT_EQ(E2BIG, ERRNO(setsockopt(self->c.s, SOL_PMSKB, PMSKB_RELEASE, r, sizeof(r))));
	EXPECT_EQ(ESTALE, ERRNO(setsockopt(self->c.s, SOL_PMSKB, PMSKB_RELEASE, r, sizeof(r) - sizeof(r[0]))));
}

TEST_F(desc, tokens_of_one_socket_mean_nothing_to_another)
{
	struct pmskb_desc e[8];
	struct conn other;

	ASSERT_EQ(0, conn_make(&other, &self->net, self->s.fd, variant->how));
	ASSERT_EQ(0, sock_mode(other.s, PMSKB_RX_DESC));
	ASSERT_EQ(0, send_all(self->c.c, "mine!", 5));
	ASSERT_EQ(1, desc_recv_bytes(self->c.s, d, 8, 5));
	EXPECT_EQ(-ESTALE, desc_release(other.s, d[0].token, 1));
	/* Even if it has tokens of its own. */
	ASSERT_EQ(0, send_all(other.c, "yours", 5));
	ASSERT_EQ(1, desc_recv_bytes(other.s, e, 8, 5));
	if (e[0].token != d[0].token) {
		EXPECT_EQ(-ESTALE, desc_release(other.s, d[0].token, 1));
	}
	EXPECT_EQ(0, desc_release(self->c.s, d[0].token, 1));
	EXPECT_EQ(0, memcmp(self->s.map + e[0].offset, "yours", 5));
	conn_close(&other);
}

TEST_F(desc, close_releases_what_is_held)
{
	struct pmskb_store_info si;
	static char buf[100000];
	int n;

	ASSERT_EQ(0, send_all(self->c.c, buf, sizeof(buf)));
	n = desc_recv_bytes(self->c.s, d, MAX_DESC, sizeof(buf) / 2 * 2);
	ASSERT_LT(0, n);
	ASSERT_EQ(0, store_info(&self->s, &si));
	EXPECT_EQ(n, si.tokens);
	EXPECT_GT(self->s.info.frames_free, si.frames_free);
	/* And unread packets besides. */
	ASSERT_EQ(0, send_all(self->c.c, buf, 30000));
	close(self->c.s);
	self->c.s = -1;
	EXPECT_EQ(0, store_back(&self->s, 5000, &si));
	EXPECT_EQ(0, si.tokens);
	EXPECT_EQ(0, si.sockets);
	EXPECT_GE(si.frames_free + STORE_SLACK, self->s.info.frames_free);
	EXPECT_GE(si.heads_free + STORE_SLACK, self->s.info.heads_free);
}

TEST_F(desc, dontwait_timeouts_and_poll)
{
	struct pollfd p = { .fd = self->c.s, .events = POLLIN };

	EXPECT_EQ(-EAGAIN, desc_recv_flags(self->c.s, d, 8, MSG_DONTWAIT, NULL, NULL));
	EXPECT_EQ(0, poll(&p, 1, 0));
	ASSERT_EQ(0, timeout_set(self->c.s, 100));
	EXPECT_EQ(-EAGAIN, desc_recv_flags(self->c.s, d, 8, 0, NULL, NULL));
	ASSERT_EQ(0, send_all(self->c.c, "x", 1));
	EXPECT_EQ(1, poll(&p, 1, 2000));
	EXPECT_EQ(1, desc_recv_flags(self->c.s, d, 8, MSG_DONTWAIT, NULL, NULL));
	EXPECT_EQ(0, poll(&p, 1, 0));
	EXPECT_EQ(-EAGAIN, desc_recv_flags(self->c.s, d, 8, MSG_DONTWAIT, NULL, NULL));
}

TEST_F(desc, a_receive_blocks_until_something_comes)
{
	pid_t pid = fork();
	int st;

	if (!pid) {
		usleep(200000);
		_exit(send_all(self->c.c, "late", 4) ? 1 : 0);
	}
	EXPECT_EQ(1, desc_recv_bytes(self->c.s, d, 8, 4));
	waitpid(pid, &st, 0);
	EXPECT_EQ(0, st);
}

TEST_F(desc, the_end_is_0_and_a_reset_is_econnreset)
{
	struct linger lin = { 1, 0 };
	struct conn other;
	ssize_t bytes = -1;

	ASSERT_EQ(0, send_all(self->c.c, "last", 4));
	ASSERT_EQ(0, shutdown(self->c.c, SHUT_WR));
	EXPECT_EQ(1, desc_recv_bytes(self->c.s, d, 8, 4));
	EXPECT_EQ(0, desc_recv_flags(self->c.s, d, 8, 0, &bytes, NULL));
	EXPECT_EQ(0, bytes);
	EXPECT_EQ(0, desc_recv_flags(self->c.s, d, 8, 0, &bytes, NULL));
	EXPECT_EQ(0, bytes);

	ASSERT_EQ(0, conn_make(&other, &self->net, self->s.fd, variant->how));
	ASSERT_EQ(0, sock_mode(other.s, PMSKB_RX_DESC));
	ASSERT_EQ(0, setsockopt(other.c, SOL_SOCKET, SO_LINGER, &lin, sizeof(lin)));
	close(other.c);
	other.c = -1;
	EXPECT_EQ(-ECONNRESET, desc_recv_flags(other.s, d, 8, 0, NULL, NULL));
	EXPECT_EQ(0, desc_recv_flags(other.s, d, 8, 0, &bytes, NULL));
	conn_close(&other);
}

TEST_F(desc, a_listener_and_an_unconnected_socket_are_enotconn)
{
	struct sockaddr_storage addr;
	socklen_t len;
	int l = net_listen(&self->net, &addr, &len);

	ASSERT_LE(0, l);
	ASSERT_EQ(0, sock_attach_ioctl(l, self->s.fd));
	ASSERT_EQ(0, sock_mode(l, PMSKB_RX_DESC));
	EXPECT_EQ(-ENOTCONN, desc_recv_flags(l, d, 8, 0, NULL, NULL));
	close(l);
}

TEST_F(desc, urgent_data_ends_a_receive_and_is_not_part_of_it)
{
	char oob = 0;
	ssize_t bytes;
	int n, at = 0, k;
	char text[32];

	ASSERT_EQ(0, send_all(self->c.c, "abc", 3));
	ASSERT_EQ(1, send(self->c.c, "!", 1, MSG_OOB));
	ASSERT_EQ(0, send_all(self->c.c, "def", 3));
	usleep(50000);
	n = desc_recv_flags(self->c.s, d, 64, 0, &bytes, NULL);
	ASSERT_LT(0, n);
	EXPECT_EQ(3, bytes) TH_LOG("a receive ends at the mark");
	EXPECT_EQ(0, memcmp(self->s.map + d[0].offset, "abc", 3));
	EXPECT_EQ(1, recv(self->c.s, &oob, 1, MSG_OOB));
	EXPECT_EQ('!', oob);
	n = desc_recv_flags(self->c.s, d, 64, MSG_DONTWAIT, &bytes, NULL);
	ASSERT_LT(0, n);
	for (k = 0; k < n; k++) {
		memcpy(text + at, self->s.map + d[k].offset, d[k].len);
		at += d[k].len;
	}
	EXPECT_EQ(3, at);
	EXPECT_EQ(0, memcmp(text, "def", 3)) TH_LOG("the urgent byte is in the data");
}

/* Bytes that n descriptors describe: whether they are those of text. */
static bool says(const struct store *s, const struct pmskb_desc *d, int n, const char *text)
{
	size_t at = 0;
	int k;

	for (k = 0; k < n; at += d[k++].len)
		if (at + d[k].len > strlen(text) || memcmp(s->map + d[k].offset, text + at, d[k].len))
			return false;
	return at == strlen(text);
}

TEST_F(desc, a_look_describes_and_consumes_nothing)
{
	struct pmskb_sock_info before, after;
	int n, k, off = 2, waiting = 0;
	struct pmskb_desc other[8];
	ssize_t bytes;

	ASSERT_EQ(0, send_all(self->c.c, "abcdefgh", 8));
	for (k = 0; k < 3; k++) {
		n = desc_recv_flags(self->c.s, d, 8, MSG_PEEK, &bytes, NULL);
		ASSERT_LT(0, n);
		EXPECT_EQ(8, bytes);
		EXPECT_TRUE(says(&self->s, d, n, "abcdefgh"));
		/* With tokens of its own. */
		ASSERT_EQ(1, desc_recv_flags(self->c.s, other, 8, MSG_PEEK, NULL, NULL));
		EXPECT_NE(d[0].token, other[0].token);
		EXPECT_EQ(d[0].offset, other[0].offset);
		ASSERT_EQ(0, sock_info(self->c.s, &before));
		ASSERT_EQ(0, desc_release_all(self->c.s, d, n));
		ASSERT_EQ(0, desc_release_all(self->c.s, other, 1));
		ASSERT_EQ(0, sock_info(self->c.s, &after));
		EXPECT_EQ(before.tokens - n - 1, after.tokens);
	}
	ASSERT_EQ(0, ioctl(self->c.s, FIONREAD, &waiting));
	EXPECT_EQ(8, waiting);
	/* From where SO_PEEK_OFF says; each look goes on, and what is consumed comes off. */
	ASSERT_EQ(0, setsockopt(self->c.s, SOL_SOCKET, SO_PEEK_OFF, &off, sizeof(off)));
	n = desc_recv_flags(self->c.s, d, 8, MSG_PEEK, &bytes, NULL);
	EXPECT_TRUE(says(&self->s, d, n, "cdefgh"));
	EXPECT_EQ(-EAGAIN, desc_recv_flags(self->c.s, d, 8, MSG_PEEK | MSG_DONTWAIT, NULL, NULL));
	ASSERT_EQ(0, send_all(self->c.c, "ijk", 3));
	n = desc_recv_flags(self->c.s, d, 8, MSG_PEEK, &bytes, NULL);
	EXPECT_TRUE(says(&self->s, d, n, "ijk"));
	ASSERT_LT(0, desc_recv_bytes(self->c.s, d, 8, 11));
	ASSERT_EQ(0, timeout_set(self->c.s, 2000));
	ASSERT_EQ(0, send_all(self->c.c, "lmn", 3));
	n = desc_recv_flags(self->c.s, d, 8, MSG_PEEK, &bytes, NULL);
	EXPECT_TRUE(says(&self->s, d, n, "lmn"));
	ASSERT_LT(0, desc_recv_bytes(self->c.s, d, 8, 3));
	/* All that was asked for, or until the time is over. */
	off = -1;
	ASSERT_EQ(0, setsockopt(self->c.s, SOL_SOCKET, SO_PEEK_OFF, &off, sizeof(off)));
	ASSERT_EQ(0, timeout_set(self->c.s, 50));
	ASSERT_EQ(0, send_all(self->c.c, "xyz", 3));
	n = desc_recv_flags(self->c.s, d, 8, MSG_PEEK | MSG_WAITALL, &bytes, NULL);
	EXPECT_TRUE(says(&self->s, d, n, "xyz"));
	EXPECT_EQ(3, bytes);
}

TEST_F(desc, a_look_stops_at_urgent_data_as_a_receive_does)
{
	ssize_t bytes;
	int n, on = 1;

	ASSERT_EQ(0, send_all(self->c.c, "abc", 3));
	ASSERT_EQ(1, send(self->c.c, "!", 1, MSG_OOB));
	ASSERT_EQ(0, send_all(self->c.c, "def", 3));
	usleep(50000);
	n = desc_recv_flags(self->c.s, d, 64, MSG_PEEK, &bytes, NULL);
	EXPECT_TRUE(says(&self->s, d, n, "abc"));
	ASSERT_EQ(3, bytes);
	n = desc_recv_flags(self->c.s, d, 64, 0, &bytes, NULL);
	ASSERT_EQ(3, bytes);
	n = desc_recv_flags(self->c.s, d, 64, MSG_PEEK, &bytes, NULL);
	EXPECT_TRUE(says(&self->s, d, n, "def")) TH_LOG("%zd bytes", bytes);
	ASSERT_EQ(0, setsockopt(self->c.s, SOL_SOCKET, SO_OOBINLINE, &on, sizeof(on)));
	n = desc_recv_flags(self->c.s, d, 64, MSG_PEEK, &bytes, NULL);
	EXPECT_TRUE(says(&self->s, d, n, "!def")) TH_LOG("%zd bytes", bytes);
	n = desc_recv_flags(self->c.s, d, 64, 0, &bytes, NULL);
	EXPECT_TRUE(says(&self->s, d, n, "!def")) TH_LOG("%zd bytes", bytes);
}

TEST_F(desc, the_first_bytes_are_copied_too_if_that_is_wanted)
{
	static char data[20000], head[5000], control[8192];
	struct iovec iov[2] = { { head, 100 }, { head + 1000, 3000 } };
	uint32_t want, bad = PMSKB_MAX_RX_COPY + 1, got;
	static const uint32_t wants[] = { 1, 50, 100, 101, 2000, 3100, 60000 };
	socklen_t len = sizeof(got);
	uint64_t pos = 0;
	size_t i;

	fill(data, sizeof(data), 81, 0);
	EXPECT_EQ(EINVAL, ERRNO(setsockopt(self->c.s, SOL_PMSKB, PMSKB_RX_COPY, &bad, sizeof(bad))));
	EXPECT_EQ(EINVAL, ERRNO(setsockopt(self->c.s, SOL_PMSKB, PMSKB_RX_COPY, &bad, 2)));
	for (i = 0; i < ARRAY_LEN(wants); i++) {
		struct msghdr msg = { .msg_iov = iov, .msg_iovlen = 2, .msg_control = control,
				      .msg_controllen = sizeof(control) };
		size_t n, first, k;
		ssize_t all;

		want = wants[i];
		ASSERT_EQ(0, setsockopt(self->c.s, SOL_PMSKB, PMSKB_RX_COPY, &want, sizeof(want)));
		ASSERT_EQ(0, getsockopt(self->c.s, SOL_PMSKB, PMSKB_RX_COPY, &got, &len));
		ASSERT_EQ(want, got);
		memset(head, 0xee, sizeof(head));
		fill(data, 4000, 81, pos);
		ASSERT_EQ(0, send_all(self->c.c, data, 4000));
		/* All that has come, however long the iovec is; it may come in several packets. */
		for (k = 0; k < 2000; k++) {
			int waiting = 0;

			ioctl(self->c.s, FIONREAD, &waiting);
			if (waiting == 4000)
				break;
			usleep(1000);
		}
		all = recvmsg(self->c.s, &msg, 0);
		ASSERT_EQ(4000, all);
		n = want < 3100 ? want : 3100;
		first = n < 100 ? n : 100;
		EXPECT_EQ(-1, differs(head, first, 81, pos)) TH_LOG("%u", want);
		EXPECT_EQ((char)0xee, head[first]);
		EXPECT_EQ(-1, differs(head + 1000, n - first, 81, pos + first)) TH_LOG("%u", want);
		EXPECT_EQ((char)0xee, head[1000 + n - first]);
		EXPECT_EQ(0, desc_release(self->c.s, 0, ~0U));
		pos += all;
	}
	/* What cannot be copied is not consumed. */
	iov[0] = (struct iovec) { BAD_PTR, 100 };
	ASSERT_EQ(0, send_all(self->c.c, "here", 4));
	EXPECT_EQ(EFAULT, ERRNO(recvmsg(self->c.s, &(struct msghdr) { .msg_iov = iov, .msg_iovlen = 1,
		.msg_control = control, .msg_controllen = sizeof(control) }, 0)));
	want = 0;
	ASSERT_EQ(0, setsockopt(self->c.s, SOL_PMSKB, PMSKB_RX_COPY, &want, sizeof(want)));
	ASSERT_EQ(1, desc_recv_bytes(self->c.s, d, 8, 4));
	EXPECT_TRUE(says(&self->s, d, 1, "here"));
}

TEST_F(desc, the_error_queue_is_still_one)
{
	char control[256], data[1];
	struct iovec iov = { data, 1 };
	struct msghdr msg = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control,
			      .msg_controllen = sizeof(control) };

	ASSERT_EQ(0, send_all(self->c.c, "x", 1));
	usleep(20000);
	EXPECT_EQ(EAGAIN, ERRNO(recvmsg(self->c.s, &msg, MSG_ERRQUEUE | MSG_DONTWAIT)));
	EXPECT_EQ(1, desc_recv_bytes(self->c.s, d, 8, 1));
}

TEST_F(desc, splice_moves_bytes_in_either_mode)
{
	char buf[8];
	int pipes[2];

	ASSERT_EQ(0, pipe(pipes));
	ASSERT_EQ(0, send_all(self->c.c, "1234567", 7));
	usleep(20000);
	ASSERT_EQ(4, splice(self->c.s, NULL, pipes[1], NULL, 4, 0));
	ASSERT_EQ(4, read(pipes[0], buf, 4));
	EXPECT_EQ(0, memcmp(buf, "1234", 4));
	ASSERT_EQ(1, desc_recv_bytes(self->c.s, d, 8, 3));
	EXPECT_EQ(0, memcmp(self->s.map + d[0].offset, "567", 3));
	close(pipes[0]);
	close(pipes[1]);
}

TEST_F(desc, modes_can_be_switched_between_any_two_bytes)
{
	static char data[60000], buf[1000];
	uint64_t pos = 0;
	int n, k;

	fill(data, sizeof(data), 26, 0);
	ASSERT_EQ(0, send_all(self->c.c, data, sizeof(data)));
	while (pos < sizeof(data)) {
		size_t want = sizeof(data) - pos < 999 ? sizeof(data) - pos : 999;

		ASSERT_EQ(0, sock_mode(self->c.s, PMSKB_RX_BYTES));
		ASSERT_EQ(0, recv_all(self->c.s, buf, want));
		ASSERT_EQ(-1, differs(buf, want, 26, pos));
		pos += want;
		if (pos == sizeof(data))
			break;
		ASSERT_EQ(0, sock_mode(self->c.s, PMSKB_RX_DESC));
		n = desc_recv_flags(self->c.s, d, 1, 0, NULL, NULL);
		ASSERT_EQ(1, n);
		for (k = 0; k < n; k++) {
			ASSERT_EQ(-1, differs(self->s.map + d[k].offset, d[k].len, 26, pos));
			/* The rest of a packet says so, and where it starts. */
			if (d[k].pkt_off) {
				EXPECT_TRUE(d[k].flags & PMSKB_DESC_PARTIAL);
			}
			pos += d[k].len;
		}
		ASSERT_EQ(0, desc_release_all(self->c.s, d, n));
	}
}

TEST_F_TIMEOUT(desc, out_of_order_and_repeated_segments_are_told_apart, 240)
{
	const char *dev = variant->link == LINK_VETH ? "pmskb-b" : "pmskb-q";
	uint64_t len = 1 << 20, pos = 0;
	struct sender snd;
	int n;

	if (variant->link == LINK_LO)
		SKIP(return, "not on lo");
	if (sh("ip netns exec pmskb-client tc qdisc add dev %s root netem loss 1%% delay 2ms reorder 20%% duplicate 2%%", dev))
		SKIP(return, "no netem");
	ASSERT_EQ(0, sender_start(&snd, self->c.c, 27, len, 20000, true));
	while (pos < len) {
		int i;

		n = desc_recv_flags(self->c.s, d, 64, 0, NULL, NULL);
		EXPECT_LT(0, n) TH_LOG("after %lu: %s", pos, strerror(-n));
		if (n <= 0)
			break;
		for (i = 0; i < n; i++) {
			EXPECT_EQ(-1, differs(self->s.map + d[i].offset, d[i].len, 27, pos)) TH_LOG("at %lu", pos);
			/* A whole packet's sum, however it came. */
			if (!(d[i].flags & PMSKB_DESC_PARTIAL)) {
				EXPECT_EQ(rfc1071(self->s.map + d[i].offset, d[i].len), d[i].csum);
			}
			pos += d[i].len;
		}
		if (desc_release_all(self->c.s, d, n))
			break;
	}
	sh("ip netns exec pmskb-client tc qdisc del dev %s root", dev);
	EXPECT_EQ(len, pos);
	EXPECT_EQ(0, sender_wait(&snd));
}

TEST_F_TIMEOUT(desc, many_sockets_at_once_keep_to_their_own_bytes, 120)
{
	enum { NR = 64, LEN = 20000 };
	static struct conn c[NR];
	static char buf[LEN];
	int i, n, k;

	for (i = 0; i < NR; i++) {
		ASSERT_EQ(0, conn_make(&c[i], &self->net, self->s.fd, variant->how));
		ASSERT_EQ(0, sock_mode(c[i].s, PMSKB_RX_DESC));
	}
	for (k = 0; k < LEN; k += LEN / 10)
		for (i = 0; i < NR; i++) {
			fill(buf, LEN / 10, 100 + i, k);
			ASSERT_EQ(0, send_all(c[i].c, buf, LEN / 10));
		}
	for (i = 0; i < NR; i++) {
		n = desc_recv_bytes(c[i].s, d, MAX_DESC, LEN);
		ASSERT_LT(0, n);
		ASSERT_EQ(LEN, check(_metadata, &self->s, d, n, 100 + i, 0));
	}
	for (i = 0; i < NR; i++)
		conn_close(&c[i]);
}

/* ---- a store with little room ---- */

FIXTURE(tight) {
	struct store s;
	struct conn c;
};

FIXTURE_SETUP(tight)
{
	struct net net = { AF_INET, LINK_LO };
	const char *why;
	uint64_t len;

	if (!dev_path(DEV_PMEM, &why))
		SKIP(return, "%s", why);
	ASSERT_EQ(0, store_make(&self->s, DEV_PMEM, 0, 0));
	len = self->s.info.region_len;
	ASSERT_EQ(0, store_close(&self->s));
	/* About 8 MiB of data frames, 2000 of them. */
	ASSERT_EQ(0, store_make(&self->s, DEV_PMEM, 0, ((len >> 20) - 12) << 20));
	ASSERT_GT(4096, self->s.info.frames_total);
	ASSERT_EQ(0, store_unlimited(&self->s));
	ASSERT_EQ(0, conn_make(&self->c, &net, self->s.fd, HOW_ACCEPTED_IOCTL));
	ASSERT_EQ(0, sock_mode(self->c.s, PMSKB_RX_DESC));
}

FIXTURE_TEARDOWN(tight)
{
	conn_close(&self->c);
	EXPECT_EQ(0, store_close(&self->s));
}

TEST_F_TIMEOUT(tight, out_of_frames_a_receive_is_enobufs_and_goes_on_when_some_are_back, 120)
{
	uint64_t len = 16 << 20, pos = 0, held = 0;
	static struct pmskb_desc all[MAX_DESC * 4];
	struct pmskb_sock_info info;
	struct sender snd;
	int n = 0, got, i, times = 0, waited = 0;
	uint64_t copied = 0;

	ASSERT_EQ(0, sender_start(&snd, self->c.c, 31, len, 100000, true));
	while (pos < len) {
		got = desc_recv_flags(self->c.s, all + n, 64, 0, NULL, NULL);
		if (got == -ENOBUFS) {
			if (!n) {
				/* Those given back last are in use until the CPUs have freed the packets. */
				ASSERT_GT(2000 * slowness(), ++waited) TH_LOG("no frames, and none are held");
				usleep(1000);
				continue;
			}
			times++;
			/* Nothing of what is held was overwritten for want of room. */
			for (i = 0, held = pos; i < n; i++)
				held -= all[i].len;
			for (i = 0; i < n; i++) {
				ASSERT_EQ(-1, differs(self->s.map + all[i].offset, all[i].len, 31, held));
				held += all[i].len;
			}
			ASSERT_EQ(0, desc_release_all(self->c.s, all, n));
			n = 0;
			continue;
		}
		ASSERT_LT(0, got) TH_LOG("at %lu: %s", pos, strerror(-got));
		for (i = n; i < n + got; i++) {
			ASSERT_EQ(-1, differs(self->s.map + all[i].offset, all[i].len, 31, pos));
			pos += all[i].len;
			copied += all[i].flags & PMSKB_DESC_COPIED ? all[i].len : 0;
		}
		n += got;
		ASSERT_GT(ARRAY_LEN(all) - 64, n);
	}
	EXPECT_EQ(0, sender_wait(&snd));
	EXPECT_LE(1, times) TH_LOG("16 MiB were held in 8");
	ASSERT_EQ(0, sock_info(self->c.s, &info));
	EXPECT_LT(0, info.counters.unplaced[PMSKB_UNPLACED_NO_FRAME]);
	/* What could not be placed was copied, and its descriptors said so. */
	EXPECT_LT(0, copied);
	EXPECT_EQ(copied, info.counters.copied_bytes);
	EXPECT_LE(len, info.counters.placed_bytes + info.counters.copied_bytes);
	ASSERT_EQ(0, desc_release_all(self->c.s, all, n));
}

TEST_F_TIMEOUT(tight, out_of_frames_byte_mode_notices_nothing, 120)
{
	struct net net = { AF_INET, LINK_LO };
	uint64_t len = 8 << 20, pos = 0;
	static struct pmskb_desc all[MAX_DESC * 2];
	static char buf[100000];
	struct pmskb_sock_info info;
	struct sender snd;
	struct conn other;
	int n = 0, got;

	/* One socket takes all frames and keeps them. */
	ASSERT_EQ(0, sender_start(&snd, self->c.c, 32, 32 << 20, 100000, false));
	while ((got = desc_recv_flags(self->c.s, all + n, 64, 0, NULL, NULL)) > 0) {
		n += got;
		ASSERT_GT(ARRAY_LEN(all) - 64, n);
	}
	ASSERT_EQ(-ENOBUFS, got);
	/* Another one reads bytes. */
	ASSERT_EQ(0, conn_make(&other, &net, self->s.fd, HOW_ACCEPTED_IOCTL));
	kill(snd.pid, SIGSTOP);
	{
		struct sender snd2;

		ASSERT_EQ(0, sender_start(&snd2, other.c, 33, len, 100000, true));
		while (pos < len) {
			ssize_t m = recv(other.s, buf, sizeof(buf), 0);

			ASSERT_LT(0, m);
			ASSERT_EQ(-1, differs(buf, m, 33, pos));
			pos += m;
		}
		EXPECT_EQ(0, sender_wait(&snd2));
	}
	ASSERT_EQ(0, sock_info(other.s, &info));
	EXPECT_LT(0, info.counters.unplaced[PMSKB_UNPLACED_NO_FRAME]);
	conn_close(&other);
	kill(snd.pid, SIGKILL);
	sender_wait(&snd);
}

FIXTURE(headless) {
	struct store s;
	struct conn c;
};

FIXTURE_SETUP(headless)
{
	struct net net = { AF_INET, LINK_LO };
	const char *why;

	if (!dev_path(DEV_PMEM, &why))
		SKIP(return, "%s", why);
	/* The smallest head area: alignment makes it up to 2 MiB, 512 heads. */
	ASSERT_EQ(0, store_make(&self->s, DEV_PMEM, 0, 4096));
	ASSERT_GE(512, self->s.info.heads_total);
	ASSERT_EQ(0, conn_make(&self->c, &net, self->s.fd, HOW_ACCEPTED_IOCTL));
}

FIXTURE_TEARDOWN(headless)
{
	conn_close(&self->c);
	EXPECT_EQ(0, store_close(&self->s));
}

/* Packets that nobody reads keep their heads; one for each socket, or they are merged. */
TEST_F_TIMEOUT(headless, out_of_heads_packets_have_theirs_in_dram_and_are_placed, 300)
{
	enum { MAX = 8000, LEN = 20 };
	struct rlimit files = { 2 * MAX + 100, 2 * MAX + 100 };
	struct net net = { AF_INET, LINK_LO };
	struct pmskb_sock_info first, last;
	struct sockaddr_storage addr;
	struct pmskb_store_info si;
	static int c[MAX], s[MAX];
	uint64_t in_dram = 0;
	socklen_t len;
	char buf[LEN];
	int i, l, nr;

	if (setrlimit(RLIMIT_NOFILE, &files))
		SKIP(return, "cannot have %d files open", 2 * MAX + 100);
	l = net_listen(&net, &addr, &len);
	ASSERT_LE(0, l);
	ASSERT_EQ(0, sock_attach_ioctl(l, self->s.fd));
	for (nr = 0; nr < MAX && in_dram < 50; nr++) {
		c[nr] = net_connect(&net, &addr, len);
		ASSERT_LE(0, c[nr]);
		s[nr] = accept(l, NULL, NULL);
		ASSERT_LE(0, s[nr]);
		fill(buf, LEN, 40, (uint64_t)nr * LEN);
		ASSERT_EQ(0, send_all(c[nr], buf, LEN));
		if (nr % 50 == 49) {
			ASSERT_EQ(0, store_info(&self->s, &si));
			in_dram = si.counters.heads_in_dram;
		}
	}
	EXPECT_LE(50, in_dram) TH_LOG("%d packets, heads free %llu", nr, si.heads_free);
	ASSERT_EQ(0, sock_info(s[0], &first));
	ASSERT_EQ(0, sock_info(s[nr - 1], &last));
	EXPECT_EQ(LEN, first.counters.placed_bytes);
	EXPECT_EQ(0, first.counters.heads_in_dram);
	EXPECT_EQ(LEN, last.counters.placed_bytes);
	EXPECT_EQ(1, last.counters.heads_in_dram);
	for (i = 0; i < nr; i++) {
		ASSERT_EQ(0, recv_all(s[i], buf, LEN));
		EXPECT_EQ(-1, differs(buf, LEN, 40, (uint64_t)i * LEN));
		close(c[i]);
		close(s[i]);
	}
	close(l);
	conn_close(&self->c);
	EXPECT_EQ(0, store_back(&self->s, 10000, &si));
}

TEST_HARNESS_MAIN
