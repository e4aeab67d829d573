// SPDX-License-Identifier: GPL-2.0
/*
 * Promises about UDP sockets: placed and described as TCP's are, a datagram at a
 * time, and in everything else what UDP sockets are.
 */
#include "common.h"
#include "media.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/bpf.h>
#include <linux/errqueue.h>
#include <linux/filter.h>
#include <linux/udp.h>
#include <linux/userfaultfd.h>
#include <netinet/ip.h>
#include <poll.h>
#include <pthread.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>

#include "harness.h"

#define ERRNO(call) ((call) < 0 ? errno : 0)
#define MAX_DESC 64
/* The largest payload of IPv4. */
#define MAX_LEN 65507

#ifndef SO_TIMESTAMPNS
#define SO_TIMESTAMPNS 35
#endif
#ifndef SO_ATTACH_REUSEPORT_CBPF
#define SO_ATTACH_REUSEPORT_CBPF 51
#endif
#ifndef SO_MEMINFO
#define SO_MEMINFO 55
#endif
#ifndef SOL_UDP
#define SOL_UDP 17
#endif

/* What one receive says. */
struct got {
	ssize_t len;			/* or -errno */
	int n;				/* descriptors */
	struct pmskb_desc d[MAX_DESC];
	struct sockaddr_storage from;
	socklen_t from_len;
	int flags;
	int gso;			/* of UDP_GRO, 0 without */
	bool info, stamp;		/* IP_PKTINFO or IPV6_PKTINFO; SO_TIMESTAMPNS */
	struct in6_addr to;		/* of the former; IPv4 ones mapped */
};

static void take_cmsgs(struct got *g, struct msghdr *msg)
{
	struct cmsghdr *cmsg;

	for (cmsg = CMSG_FIRSTHDR(msg); cmsg; cmsg = CMSG_NXTHDR(msg, cmsg)) {
		if (cmsg->cmsg_level == SOL_PMSKB && cmsg->cmsg_type == PMSKB_CMSG_DESC && g->n < MAX_DESC)
			memcpy(&g->d[g->n++], CMSG_DATA(cmsg), sizeof(g->d[0]));
		if (cmsg->cmsg_level == SOL_UDP && cmsg->cmsg_type == UDP_GRO)
			memcpy(&g->gso, CMSG_DATA(cmsg), sizeof(g->gso));
		if (cmsg->cmsg_level == SOL_SOCKET && cmsg->cmsg_type == SO_TIMESTAMPNS)
			g->stamp = true;
		if (cmsg->cmsg_level == IPPROTO_IP && cmsg->cmsg_type == IP_PKTINFO) {
			struct in_pktinfo info;

			memcpy(&info, CMSG_DATA(cmsg), sizeof(info));
			memset(&g->to, 0, 10);
			memset(g->to.s6_addr + 10, 0xff, 2);
			memcpy(g->to.s6_addr + 12, &info.ipi_addr, 4);
			g->info = true;
		}
		if (cmsg->cmsg_level == IPPROTO_IPV6 && cmsg->cmsg_type == IPV6_PKTINFO) {
			struct in6_pktinfo info;

			memcpy(&info, CMSG_DATA(cmsg), sizeof(info));
			g->to = info.ipi6_addr;
			g->info = true;
		}
	}
}

/* One recvmsg() with so much room for control messages; what it returned. */
static ssize_t get_room(int fd, struct got *g, size_t room, int flags)
{
	static char control[16384];
	struct msghdr msg = { .msg_name = &g->from, .msg_namelen = sizeof(g->from), .msg_control = control,
			      .msg_controllen = room };

	memset(g, 0, sizeof(*g));
	g->len = recvmsg(fd, &msg, flags);
	if (g->len < 0)
		return g->len = -errno;
	g->from_len = msg.msg_namelen;
	g->flags = msg.msg_flags;
	take_cmsgs(g, &msg);
	return g->len;
}

static ssize_t get(int fd, struct got *g, int flags)
{
	return get_room(fd, g, 16384, flags);
}

static int release(int fd, const struct got *g)
{
	return g->n ? desc_release_all(fd, g->d, g->n) : 0;
}

static bool same_address(const struct sockaddr_storage *a, const struct sockaddr_storage *b)
{
	const struct sockaddr_in6 *a6 = (void *)a, *b6 = (void *)b;
	const struct sockaddr_in *a4 = (void *)a, *b4 = (void *)b;

	if (a->ss_family != b->ss_family)
		return false;
	if (a->ss_family == AF_INET)
		return a4->sin_port == b4->sin_port && a4->sin_addr.s_addr == b4->sin_addr.s_addr;
	return a6->sin6_port == b6->sin6_port && !memcmp(&a6->sin6_addr, &b6->sin6_addr, 16);
}

/* Two ends: s is bound, c connected to it. */
struct pair {
	int s, c;
	struct sockaddr_storage addr, from;	/* of s, of c */
	socklen_t len;
};

static int pair_make(struct pair *p, const struct net *net, bool connected)
{
	struct net dgram = { net->family, net->link, SOCK_DGRAM };
	int size = 4 << 20;
	socklen_t len = sizeof(p->from);

	p->s = net_listen(&dgram, &p->addr, &p->len);
	if (p->s < 0)
		return p->s;
	p->c = net_connect(&dgram, &p->addr, p->len);
	if (p->c < 0)
		return p->c;
	if (getsockname(p->c, (void *)&p->from, &len))
		return -errno;
	if (connected && connect(p->s, (void *)&p->from, len))
		return -errno;
	setsockopt(p->s, SOL_SOCKET, SO_RCVBUFFORCE, &size, sizeof(size));
	/* A test that would hang fails instead. */
	timeout_set(p->s, 20000 * slowness());
	timeout_set(p->c, 20000 * slowness());
	return 0;
}

static void pair_close(struct pair *p)
{
	if (p->c >= 0)
		close(p->c);
	if (p->s >= 0)
		close(p->s);
	p->c = p->s = -1;
}

FIXTURE(udp) {
	struct store s;
	struct pair p;
	struct net net;
	long references;
};

FIXTURE_VARIANT(udp) {
	int family;
	enum dev dev;
	enum link link;
	bool connected;
	uint32_t flags;
};

FIXTURE_VARIANT_ADD(udp, v4_pmem_lo) { AF_INET, DEV_PMEM, LINK_LO, false };
FIXTURE_VARIANT_ADD(udp, v6_dax_lo_connected) { AF_INET6, DEV_DAX, LINK_LO, true };
FIXTURE_VARIANT_ADD(udp, v6_pmem_veth) { AF_INET6, DEV_PMEM, LINK_VETH, false, PMSKB_FORMAT_HEADS_DRAM };
FIXTURE_VARIANT_ADD(udp, v4_dax_noffload_connected) { AF_INET, DEV_DAX, LINK_PLAIN, true };
FIXTURE_VARIANT_ADD(udp, v6_pmem_noffload) { AF_INET6, DEV_PMEM, LINK_PLAIN, false };

FIXTURE_SETUP(udp)
{
	const char *why;

	if (!dev_path(variant->dev, &why))
		SKIP(return, "%s", why);
	why = net_up(variant->link);
	if (why)
		SKIP(return, "%s", why);
	self->net = (struct net) { variant->family, variant->link, SOCK_DGRAM };
	ASSERT_EQ(0, store_make(&self->s, variant->dev, variant->flags, 0));
	self->references = module_references();
	ASSERT_EQ(0, pair_make(&self->p, &self->net, variant->connected));
	ASSERT_EQ(0, sock_attach_ioctl(self->p.s, self->s.fd));
	ASSERT_EQ(0, sock_mode(self->p.s, PMSKB_RX_DESC));
}

FIXTURE_TEARDOWN(udp)
{
	struct pmskb_store_info info;
	int k;

	pair_close(&self->p);
	EXPECT_EQ(0, store_back(&self->s, 5000, &info)) TH_LOG("something is left behind");
	for (k = 0; k < 100 && module_references() != self->references; k++)
		usleep(20000);
	EXPECT_EQ(self->references, module_references()) TH_LOG("references to the module");
	EXPECT_EQ(0, store_close(&self->s));
}

/*
 * IPv6 puts fragments together behind the hook, so that they are not placed; unless
 * connection tracking has done it before.
 */
static bool comes_too_late(const struct net *net, size_t len)
{
	return net->family == AF_INET6 && 40 + 8 + len > (net->link == LINK_LO ? 65536 : 1500);
}

/* All that holds for a datagram of stream seed from pos. */
static void check(struct __test_metadata *_metadata, const struct store *s, const struct got *g, size_t len,
		  uint32_t seed, uint64_t pos)
{
	static uint8_t packet[MAX_LEN];
	size_t sum = 0, start = 0;
	int i;

	EXPECT_EQ(len, g->len);
	EXPECT_EQ(0, g->flags & (MSG_TRUNC | MSG_CTRUNC));
	for (i = 0; i < g->n; i++) {
		const struct pmskb_desc *d = &g->d[i];

		EXPECT_LT(0, d->len);
		EXPECT_EQ(0, d->seq);
		EXPECT_EQ(s->minor, d->store);
		EXPECT_EQ(0, d->flags & ~(PMSKB_DESC_COPIED | PMSKB_DESC_PARTIAL));
		ASSERT_LE(s->info.data_off, d->offset);
		ASSERT_LE(d->offset + d->len, s->map_len);
		ASSERT_LE(sum + d->len, len);
		EXPECT_EQ(-1, differs(s->map + d->offset, d->len, seed, pos + sum))
			TH_LOG("descriptor %d of %d of %zu bytes", i, g->n, len);
		EXPECT_EQ(d->len != d->pkt_len, !!(d->flags & PMSKB_DESC_PARTIAL));
		if (!d->pkt_off)
			start = sum;
		EXPECT_EQ(sum - start, d->pkt_off);
		memcpy(packet + sum, s->map + d->offset, d->len);
		sum += d->len;
		EXPECT_NE(0xffff, d->csum);
		if (d->pkt_off + d->len == d->pkt_len) {
			EXPECT_EQ(rfc1071(packet + start, sum - start), d->csum)
				TH_LOG("kind %u, %u bytes", d->csum_kind, d->pkt_len);
		}
	}
	EXPECT_EQ(len, sum);
}

TEST_F(udp, a_datagram_of_any_length_is_placed_and_described)
{
	static uint8_t buf[MAX_LEN];
	struct pmskb_sock_info info;
	struct timespec a, b;
	uint64_t total = 0, copied = 0;
	struct got g;
	size_t len;
	int i, nr = 0;

	/* Up to the MTU one by one; beyond it in fragments, but on lo. */
	for (len = 1; len <= MAX_LEN; len += len < 70 ? 1 : len < 1400 ? 97 : 8012) {
		size_t real = len + 8012 > MAX_LEN ? MAX_LEN : len;
		bool late = comes_too_late(&self->net, real);

		fill(buf, real, 22, real);
		clock_gettime(CLOCK_REALTIME, &a);
		ASSERT_EQ(real, send(self->p.c, buf, real, 0));
		ASSERT_EQ(real, get(self->p.s, &g, 0));
		clock_gettime(CLOCK_REALTIME, &b);
		check(_metadata, &self->s, &g, real, 22, real);
		EXPECT_TRUE(same_address(&self->p.from, &g.from)) TH_LOG("from somebody else");
		for (i = 0; i < g.n; i++) {
			if (late && g.d[i].flags & PMSKB_DESC_COPIED)
				continue;
			EXPECT_EQ(real, g.d[i].pkt_len);
			EXPECT_EQ(0, g.d[i].flags & PMSKB_DESC_COPIED);
			EXPECT_EQ(variant->link == LINK_PLAIN ? PMSKB_CSUM_DERIVED : g.d[i].csum_kind, g.d[i].csum_kind)
				TH_LOG("%zu bytes with a checksum on the wire: kind %u", real, g.d[i].csum_kind);
			/* The kernel's coarse clock may lag by a tick. */
			EXPECT_LE(a.tv_sec * 1000000000ULL + a.tv_nsec - 20000000, g.d[i].time);
			EXPECT_GE(b.tv_sec * 1000000000ULL + b.tv_nsec, g.d[i].time);
		}
		EXPECT_GE(17, g.n);
		if (g.d[0].flags & PMSKB_DESC_COPIED) {
			copied += real;
		} else {
			total += real;
			nr++;
		}
		ASSERT_EQ(0, release(self->p.s, &g));
	}
	ASSERT_EQ(0, sock_info(self->p.s, &info));
	EXPECT_EQ(total, info.counters.placed_bytes);
	EXPECT_EQ(nr, info.counters.placed);
	EXPECT_EQ(copied, info.counters.copied_bytes);
	EXPECT_EQ(0, info.counters.mismatch);
	EXPECT_EQ(0, info.tokens);
	for (i = 0; i < PMSKB_UNPLACED_NR; i++) {
		EXPECT_EQ(0, info.counters.unplaced[i]) TH_LOG("unplaced, reason %d", i);
	}
}

TEST_F(udp, payloads_whose_sum_is_zero_in_either_form_are_summed_right)
{
	static uint8_t buf[64];
	struct got g;
	size_t len;

	for (len = 1; len <= sizeof(buf); len++) {
		memset(buf, len % 2 ? 0 : 0xff, len);
		ASSERT_EQ(len, send(self->p.c, buf, len, 0));
		ASSERT_EQ(len, get(self->p.s, &g, 0));
		ASSERT_LE(1, g.n);
		EXPECT_EQ(0, g.d[0].csum) TH_LOG("%zu bytes, kind %u", len, g.d[0].csum_kind);
		ASSERT_EQ(0, release(self->p.s, &g));
	}
}

/* What the socket is charged for datagrams that it has; SK_MEMINFO_RMEM_ALLOC is the first. */
static uint32_t charged(int fd)
{
	uint32_t mem[16] = { ~0U };
	socklen_t len = sizeof(mem);

	getsockopt(fd, SOL_SOCKET, SO_MEMINFO, mem, &len);
	return mem[0];
}

/* By recvmmsg(), several at a time; the long run on lo, where both ends are fast. */
TEST_F_TIMEOUT(udp, twenty_thousand_datagrams_arrive_as_they_were_sent, 240)
{
	enum { BATCH = 32, ROOM = 18 * CMSG_SPACE(sizeof(struct pmskb_desc)) };
	int nr = variant->link == LINK_LO && variant->family == AF_INET ? 20000 : 500;
	/* Up to two fragments, where those are placed. */
	int most = comes_too_late(&self->net, 3000) ? 1400 : 3000;
	static char control[BATCH][ROOM];
	static struct sockaddr_storage from[BATCH];
	static struct pmskb_token_range r[BATCH * 17];
	struct mmsghdr out[BATCH], in[BATCH];
	static uint8_t buf[BATCH][3000];
	struct iovec iov[BATCH];
	struct pmskb_sock_info info;
	uint64_t pos = 0, at = 0;
	static struct got g;
	int i, k, n, done, got, m, nr_r;

	for (done = 0; done < nr; done += n) {
		n = nr - done < BATCH ? nr - done : BATCH;
		memset(out, 0, sizeof(out));
		for (i = 0; i < n; i++) {
			/* Of all lengths; some are empty. */
			iov[i] = (struct iovec) { buf[i], (done + i) * 7919 % most };
			fill(buf[i], iov[i].iov_len, 31, pos);
			pos += iov[i].iov_len;
			out[i].msg_hdr.msg_iov = &iov[i];
			out[i].msg_hdr.msg_iovlen = 1;
		}
		for (i = 0; i < n; i += k) {
			k = sendmmsg(self->p.c, out + i, n - i, 0);
			ASSERT_LT(0, k);
		}
		for (got = 0, nr_r = 0; got < n; got += m) {
			memset(in, 0, sizeof(in));
			for (i = 0; i < n - got; i++) {
				in[i].msg_hdr.msg_control = control[i];
				in[i].msg_hdr.msg_controllen = ROOM;
				in[i].msg_hdr.msg_name = &from[i];
				in[i].msg_hdr.msg_namelen = sizeof(from[i]);
			}
			m = recvmmsg(self->p.s, in, n - got, MSG_WAITFORONE, NULL);
			ASSERT_LT(0, m) TH_LOG("after %d of %d: %s", done + got, nr, strerror(errno));
			for (i = 0; i < m; i++) {
				memset(&g, 0, sizeof(g));
				g.len = in[i].msg_len;
				g.flags = in[i].msg_hdr.msg_flags;
				take_cmsgs(&g, &in[i].msg_hdr);
				ASSERT_EQ((done + got + i) * 7919 % most, g.len) TH_LOG("datagram %d", done + got + i);
				check(_metadata, &self->s, &g, g.len, 31, at);
				EXPECT_TRUE(same_address(&self->p.from, &from[i]));
				at += g.len;
				for (k = 0; k < g.n; k++)
					r[nr_r++] = (struct pmskb_token_range) { g.d[k].token, 1 };
			}
		}
		ASSERT_EQ(nr_r, setsockopt(self->p.s, SOL_PMSKB, PMSKB_RELEASE, r, nr_r * sizeof(r[0])));
	}
	EXPECT_EQ(pos, at);
	EXPECT_EQ(0, charged(self->p.s));
	ASSERT_EQ(0, send(self->p.c, "", 0, 0));
	usleep(20000);
	EXPECT_LT(0, charged(self->p.s));
	ASSERT_EQ(0, get(self->p.s, &g, 0));
	EXPECT_EQ(0, charged(self->p.s));
	ASSERT_EQ(0, sock_info(self->p.s, &info));
	EXPECT_EQ(pos, info.counters.placed_bytes);
	EXPECT_EQ(0, info.counters.copied_bytes);
	EXPECT_EQ(0, info.tokens);
}

TEST_F(udp, an_empty_datagram_is_received_without_a_descriptor)
{
	struct pollfd p = { .fd = self->p.s, .events = POLLIN };
	struct got g;

	ASSERT_EQ(0, send(self->p.c, "", 0, 0));
	EXPECT_EQ(1, poll(&p, 1, 2000));
	/* Nor is room for one needed. */
	ASSERT_EQ(0, get_room(self->p.s, &g, 0, 0));
	EXPECT_EQ(0, g.n);
	EXPECT_TRUE(same_address(&self->p.from, &g.from));
	EXPECT_EQ(0, poll(&p, 1, 0));
	EXPECT_EQ(-EAGAIN, get(self->p.s, &g, MSG_DONTWAIT));
}

TEST_F(udp, what_does_not_fit_the_control_buffer_is_not_consumed)
{
	size_t one = CMSG_SPACE(sizeof(struct pmskb_desc));
	struct pmskb_sock_info info;
	static uint8_t buf[20000];
	int times, want;
	struct got g;
	char b;

	fill(buf, sizeof(buf), 40, 0);
	ASSERT_EQ(sizeof(buf), send(self->p.c, buf, sizeof(buf), 0));
	ASSERT_EQ(5, send(self->p.c, "after", 5, 0));
	usleep(50000);
	for (times = 0; times < 3; times++) {
		for (want = 0; want < 5; want++)
			EXPECT_EQ(-EMSGSIZE, get_room(self->p.s, &g, one * want, 0)) TH_LOG("room for %d", want);
	}
	/* A plain read has no room at all. */
	EXPECT_EQ(EMSGSIZE, ERRNO(read(self->p.s, &b, 1)));
	ASSERT_EQ(0, sock_info(self->p.s, &info));
	EXPECT_EQ(0, info.tokens) TH_LOG("tokens of what was not received");
	ASSERT_EQ(sizeof(buf), get(self->p.s, &g, 0));
	EXPECT_LE(5, g.n);
	check(_metadata, &self->s, &g, sizeof(buf), 40, 0);
	ASSERT_EQ(0, sock_info(self->p.s, &info));
	EXPECT_EQ(g.n, info.tokens);
	ASSERT_EQ(5, get_room(self->p.s, &g, one, 0));
	EXPECT_EQ(0, memcmp(self->s.map + g.d[0].offset, "after", 5));
}

TEST_F(udp, a_control_buffer_that_faults_loses_nothing)
{
	struct msghdr msg = { .msg_control = BAD_PTR, .msg_controllen = 4096 };
	struct pmskb_sock_info info;
	struct got g;

	ASSERT_EQ(8, send(self->p.c, "precious", 8, 0));
	usleep(30000);
	EXPECT_EQ(EFAULT, ERRNO(recvmsg(self->p.s, &msg, 0)));
	ASSERT_EQ(0, sock_info(self->p.s, &info));
	EXPECT_EQ(0, info.tokens);
	ASSERT_EQ(8, get(self->p.s, &g, 0));
	EXPECT_EQ(0, memcmp(self->s.map + g.d[0].offset, "precious", 8));
}

TEST_F(udp, buffers_are_not_touched_and_their_length_does_not_matter)
{
	char control[256], data[3] = "abc";
	struct iovec iov = { data, 1 };
	struct msghdr msg = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control,
			      .msg_controllen = sizeof(control) };
	int flags;

	for (flags = 0; flags <= MSG_TRUNC; flags += MSG_TRUNC) {
		msg.msg_controllen = sizeof(control);
		ASSERT_EQ(100, send(self->p.c, control, 100, 0));
		EXPECT_EQ(100, recvmsg(self->p.s, &msg, flags));
		EXPECT_EQ(0, msg.msg_flags & MSG_TRUNC);
		EXPECT_EQ(0, memcmp(data, "abc", 3));
	}
}

TEST_F(udp, the_first_bytes_are_copied_too_if_that_is_wanted)
{
	char head[16], more[16], control[4096];
	struct iovec iov[2] = { { head, 5 }, { more, 3 } };
	uint32_t bad = PMSKB_MAX_RX_COPY + 1, bytes;
	socklen_t len = sizeof(bytes);
	struct got g;
	int i;

	ASSERT_EQ(0, getsockopt(self->p.s, SOL_PMSKB, PMSKB_RX_COPY, &bytes, &len));
	EXPECT_EQ(0, bytes);
	EXPECT_EQ(EINVAL, ERRNO(setsockopt(self->p.s, SOL_PMSKB, PMSKB_RX_COPY, &bad, sizeof(bad))));
	for (i = 0; i < 4; i++) {
		struct msghdr msg = { .msg_iov = iov, .msg_iovlen = 2, .msg_control = control,
				      .msg_controllen = sizeof(control) };
		/* More than there is of the datagram, than there is room, and less. */
		static const uint32_t want[] = { 20, 7, 100, 0 };
		size_t n = want[i] < 8 ? want[i] : 8;
		char both[9] = "........";
		ssize_t got;

		ASSERT_EQ(0, setsockopt(self->p.s, SOL_PMSKB, PMSKB_RX_COPY, &want[i], 4));
		ASSERT_EQ(0, getsockopt(self->p.s, SOL_PMSKB, PMSKB_RX_COPY, &bytes, &len));
		EXPECT_EQ(want[i], bytes);
		memset(head, '.', sizeof(head));
		memset(more, '.', sizeof(more));
		ASSERT_EQ(10, send(self->p.c, "0123456789", 10, 0));
		got = recvmsg(self->p.s, &msg, 0);
		EXPECT_EQ(10, got);
		EXPECT_EQ(0, msg.msg_flags & MSG_TRUNC);
		memset(&g, 0, sizeof(g));
		take_cmsgs(&g, &msg);
		ASSERT_EQ(1, g.n);
		EXPECT_EQ(10, g.d[0].len);
		EXPECT_EQ(0, memcmp(self->s.map + g.d[0].offset, "0123456789", 10));
		memcpy(both, head, 5);
		memcpy(both + 5, more, 3);
		EXPECT_EQ(0, memcmp(both, "01234567", n)) TH_LOG("%u wanted: %s", want[i], both);
		EXPECT_EQ(0, memcmp(both + n, "........", 8 - n)) TH_LOG("%u wanted: %s", want[i], both);
		EXPECT_EQ('.', head[5]);
		EXPECT_EQ('.', more[3]);
		ASSERT_EQ(0, release(self->p.s, &g));
	}
	/* What cannot be copied is not received. */
	ASSERT_EQ(0, setsockopt(self->p.s, SOL_PMSKB, PMSKB_RX_COPY, &(uint32_t) { 4 }, 4));
	ASSERT_EQ(4, send(self->p.c, "here", 4, 0));
	iov[0] = (struct iovec) { BAD_PTR, 4 };
	EXPECT_EQ(EFAULT, ERRNO(recvmsg(self->p.s, &(struct msghdr) { .msg_iov = iov, .msg_iovlen = 1,
		.msg_control = control, .msg_controllen = sizeof(control) }, 0)));
	ASSERT_EQ(4, get(self->p.s, &g, 0));
	EXPECT_EQ(0, memcmp(self->s.map + g.d[0].offset, "here", 4));
}

TEST_F(udp, waiting_flags_timeouts_poll_and_peek)
{
	struct pollfd p = { .fd = self->p.s, .events = POLLIN };
	struct timespec a, b;
	int waiting = -1, st, i;
	uint32_t token = 0;
	struct got g;
	pid_t pid;
	long ms;

	EXPECT_EQ(-EAGAIN, get(self->p.s, &g, MSG_DONTWAIT));
	EXPECT_EQ(0, poll(&p, 1, 0));
	ASSERT_EQ(0, timeout_set(self->p.s, 100));
	clock_gettime(CLOCK_MONOTONIC, &a);
	EXPECT_EQ(-EAGAIN, get(self->p.s, &g, 0));
	clock_gettime(CLOCK_MONOTONIC, &b);
	ms = (b.tv_sec - a.tv_sec) * 1000 + (b.tv_nsec - a.tv_nsec) / 1000000;
	/* Ticks that a busy host has held back come at once: it has waited, no more can be said. */
	EXPECT_LT(0, ms);
	EXPECT_GE(5000 * slowness(), ms);
	ASSERT_EQ(0, timeout_set(self->p.s, 20000 * slowness()));
	pid = fork();
	if (!pid) {
		usleep(100000);
		_exit(send(self->p.c, "late", 4, 0) != 4);
	}
	ASSERT_EQ(4, get(self->p.s, &g, 0));
	EXPECT_EQ(0, memcmp(self->s.map + g.d[0].offset, "late", 4));
	waitpid(pid, &st, 0);
	EXPECT_EQ(0, st);

	ASSERT_EQ(6, send(self->p.c, "peeked", 6, 0));
	EXPECT_EQ(1, poll(&p, 1, 2000));
	for (i = 0; i < 3; i++) {
		/* Each look has a token of its own, for the same bytes. */
		ASSERT_EQ(6, get(self->p.s, &g, MSG_PEEK));
		ASSERT_EQ(1, g.n);
		EXPECT_EQ(0, memcmp(self->s.map + g.d[0].offset, "peeked", 6));
		EXPECT_TRUE(same_address(&self->p.from, &g.from));
		if (i)
			EXPECT_NE(token, g.d[0].token);
		token = g.d[0].token;
	}
	ASSERT_EQ(0, ioctl(self->p.s, FIONREAD, &waiting));
	EXPECT_EQ(6, waiting);
	ASSERT_EQ(6, get(self->p.s, &g, MSG_DONTWAIT));
	EXPECT_EQ(0, poll(&p, 1, 0));
	/* From where SO_PEEK_OFF says, one after the other. */
	ASSERT_EQ(0, setsockopt(self->p.s, SOL_SOCKET, SO_PEEK_OFF, &(int) { 2 }, sizeof(int)));
	ASSERT_EQ(5, send(self->p.c, "first", 5, 0));
	ASSERT_EQ(6, send(self->p.c, "second", 6, 0));
	ASSERT_EQ(3, get(self->p.s, &g, MSG_PEEK));
	EXPECT_EQ(0, memcmp(self->s.map + g.d[0].offset, "rst", 3));
	ASSERT_EQ(6, get(self->p.s, &g, MSG_PEEK));
	EXPECT_EQ(0, memcmp(self->s.map + g.d[0].offset, "second", 6));
	EXPECT_EQ(-EAGAIN, get(self->p.s, &g, MSG_PEEK | MSG_DONTWAIT));
	ASSERT_EQ(5, get(self->p.s, &g, 0));
	ASSERT_EQ(3, send(self->p.c, "end", 3, 0));
	ASSERT_EQ(3, get(self->p.s, &g, MSG_PEEK));
	EXPECT_EQ(0, memcmp(self->s.map + g.d[0].offset, "end", 3));
	ASSERT_EQ(0, setsockopt(self->p.s, SOL_SOCKET, SO_PEEK_OFF, &(int) { -1 }, sizeof(int)));
	ASSERT_EQ(6, get(self->p.s, &g, MSG_DONTWAIT));
	ASSERT_EQ(3, get(self->p.s, &g, MSG_DONTWAIT));

	/* Shutting down ends a receive with nothing, as with UDP's own; of a connected one only. */
	if (variant->connected) {
		ASSERT_EQ(0, shutdown(self->p.s, SHUT_RD));
		EXPECT_EQ(0, get(self->p.s, &g, 0));
		EXPECT_EQ(0, g.n);
	}
}

TEST_F(udp, other_control_messages_come_beside_the_descriptors)
{
	size_t one = CMSG_SPACE(sizeof(struct pmskb_desc));
	struct sockaddr_in6 *a6 = (void *)&self->p.addr;
	struct sockaddr_in *a4 = (void *)&self->p.addr;
	struct in6_addr to;
	int on = 1, i, k;
	struct got g;

	memset(&to, 0, sizeof(to));
	if (variant->family == AF_INET) {
		ASSERT_EQ(0, setsockopt(self->p.s, IPPROTO_IP, IP_PKTINFO, &on, sizeof(on)));
		memset(to.s6_addr + 10, 0xff, 2);
		memcpy(to.s6_addr + 12, &a4->sin_addr, 4);
	} else {
		ASSERT_EQ(0, setsockopt(self->p.s, IPPROTO_IPV6, IPV6_RECVPKTINFO, &on, sizeof(on)));
		to = a6->sin6_addr;
	}
	ASSERT_EQ(0, setsockopt(self->p.s, SOL_SOCKET, SO_TIMESTAMPNS, &on, sizeof(on)));
	/* The kernel begins to stamp a moment later. */
	for (k = 0; k < 200; k++) {
		ASSERT_EQ(4, send(self->p.c, "when", 4, 0));
		ASSERT_EQ(4, get(self->p.s, &g, 0));
		if (g.d[0].time_source == PMSKB_TIME_SOFTWARE)
			break;
		usleep(10000);
	}
	for (i = 0; i < 3; i++) {
		ASSERT_EQ(4, send(self->p.c, "info", 4, 0));
		/* Enough for all; for the first only; for one descriptor alone. */
		ASSERT_EQ(4, get_room(self->p.s, &g, i == 0 ? 4096 : i == 1 ? one + CMSG_SPACE(16) : one, 0));
		ASSERT_EQ(1, g.n);
		EXPECT_EQ(0, memcmp(self->s.map + g.d[0].offset, "info", 4));
		EXPECT_EQ(i < 2, g.stamp);
		EXPECT_EQ(i < 1, g.info);
		EXPECT_EQ(i > 0, !!(g.flags & MSG_CTRUNC));
		if (!i) {
			EXPECT_EQ(0, memcmp(&g.to, &to, sizeof(to)));
		}
		EXPECT_EQ(PMSKB_TIME_SOFTWARE, g.d[0].time_source);
	}
}

/* Everything that byte mode may be asked, and what came of it, as text. */
static void bytes_say(const struct pair *p, char *out, size_t size)
{
	char data[16], control[256];
	struct iovec iov = { data, 4 };
	struct sockaddr_storage from;
	struct pollfd poll_s = { .fd = p->s, .events = POLLIN };
	size_t at = 0;
	int flags[] = { 0, MSG_TRUNC, MSG_PEEK, MSG_PEEK | MSG_TRUNC, MSG_DONTWAIT, 0, MSG_DONTWAIT, MSG_ERRQUEUE };
	static const char * const texts[] = { "ab", "", "abcdefgh", "12", "0123456789" };
	size_t i;
	int waiting;

	for (i = 0; i < ARRAY_LEN(texts); i++)
		if (send(p->c, texts[i], strlen(texts[i]), 0) < 0)
			at += snprintf(out + at, size - at, "send %d;", errno);
	usleep(50000);
	for (i = 0; i < ARRAY_LEN(flags); i++) {
		struct msghdr msg = { .msg_iov = &iov, .msg_iovlen = 1, .msg_name = &from,
				      .msg_namelen = sizeof(from), .msg_control = control,
				      .msg_controllen = sizeof(control) };
		ssize_t n;

		memset(data, 0, sizeof(data));
		memset(&from, 0, sizeof(from));
		ioctl(p->s, FIONREAD, &waiting);
		n = recvmsg(p->s, &msg, flags[i]);
		at += snprintf(out + at, size - at, "%zd %d %s %x %u %zu %d %d;", n, n < 0 ? errno : 0, data,
			       msg.msg_flags, msg.msg_namelen, msg.msg_controllen, waiting,
			       poll(&poll_s, 1, 0));
		if (n >= 0 && !same_address(&from, &p->from))
			at += snprintf(out + at, size - at, "not from there;");
	}
}

TEST_F(udp, bytes_are_received_as_on_any_udp_socket)
{
	char plain[2000], ours[2000];
	struct pmskb_sock_info info;
	struct pair p;

	ASSERT_EQ(0, pair_make(&p, &self->net, variant->connected));
	bytes_say(&p, plain, sizeof(plain));
	pair_close(&p);
	ASSERT_EQ(0, sock_mode(self->p.s, PMSKB_RX_BYTES));
	bytes_say(&self->p, ours, sizeof(ours));
	EXPECT_EQ(0, strcmp(plain, ours)) TH_LOG("\n  plain    %s\n  attached %s", plain, ours);
	ASSERT_EQ(0, sock_info(self->p.s, &info));
	EXPECT_EQ(2 + 8 + 2 + 10, info.counters.placed_bytes);
}

TEST_F(udp, modes_can_be_switched_between_any_two_datagrams)
{
	char buf[100];
	struct got g;
	int i;

	for (i = 0; i < 20; i++)
		ASSERT_EQ(2, send(self->p.c, &(char[2]) { i, i + 1 }, 2, 0));
	for (i = 0; i < 20; i++) {
		ASSERT_EQ(0, sock_mode(self->p.s, i & 1 ? PMSKB_RX_DESC : PMSKB_RX_BYTES));
		if (i & 1) {
			ASSERT_EQ(2, get(self->p.s, &g, 0));
			EXPECT_EQ(i, *(self->s.map + g.d[0].offset));
		} else {
			ASSERT_EQ(2, recv(self->p.s, buf, sizeof(buf), 0));
			EXPECT_EQ(i, buf[0]);
		}
	}
}

static int open_record(int store, const char *key, struct pmskb_open *o)
{
	*o = (struct pmskb_open) { .key = PTR(key), .key_len = strlen(key) };
	return ioctl(store, PMSKB_IOC_OPEN, o) ? -errno : 0;
}

struct kept {
	struct record r;
	int nr;
};

static int keep_record(struct record *r, void *arg)
{
	struct kept *kept = arg;

	kept->r = *r;
	kept->nr++;
	return 0;
}

TEST_F(udp, a_record_has_the_datagrams_bytes_sum_time_and_source)
{
	struct way ways[2] = { { self->s.fd, self->p.s, false }, { self->s.fd, self->p.s, true } };
	struct pmskb_ext e[MAX_DESC];
	static uint8_t buf[1400], back[1400];
	struct pmskb_result res;
	struct pmskb_open o;
	struct kept kept = {};
	struct got g;
	int i;

	fill(buf, sizeof(buf), 50, 0);
	for (i = 0; i < 2; i++) {
		ASSERT_EQ(sizeof(buf), send(self->p.c, buf, sizeof(buf), 0));
		ASSERT_EQ(sizeof(buf), get(self->p.s, &g, 0));
		exts_of(e, g.d, g.n);
		ASSERT_EQ(i + 1, way_one(&ways[i], op_put("datagram", 8, e, g.n), &res));
		EXPECT_EQ(i ? PMSKB_RES_REPLACED : 0, res.flags);
		EXPECT_EQ(rfc1071(buf, sizeof(buf)), res.csum);
		EXPECT_EQ(g.d[0].csum_kind, res.csum_kind);
		/* Its tokens are gone. */
		EXPECT_EQ(-ESTALE, desc_release(self->p.s, g.d[0].token, 1));
	}
	/* After the next attach, too. */
	pair_close(&self->p);
	ASSERT_EQ(0, store_close(&self->s));
	ASSERT_EQ(0, store_open(&self->s, variant->dev));
	self->references = module_references();
	ASSERT_EQ(0, open_record(self->s.fd, "datagram", &o));
	EXPECT_EQ(2, o.seq);
	EXPECT_EQ(g.d[0].time, o.time);
	ASSERT_EQ(sizeof(buf), read(o.fd, back, sizeof(back)));
	EXPECT_EQ(0, memcmp(buf, back, sizeof(buf)));
	close(o.fd);
	ASSERT_EQ(1, media_scan(self->s.map, self->s.map_len, keep_record, &kept));
	ASSERT_EQ(1, kept.nr);
	EXPECT_TRUE(kept.r.flags & REC_UDP);
	EXPECT_EQ(0, kept.r.tcp_seq);
	EXPECT_EQ(g.d[0].csum_kind, REC_CSUM_KIND(kept.r.flags));
	EXPECT_EQ(g.d[0].time_source, REC_TIME_SOURCE(kept.r.flags));
	if (variant->family == AF_INET) {
		struct sockaddr_in *p = (void *)&self->p.from, *q = (void *)&self->p.addr;

		EXPECT_EQ(4, kept.r.family);
		EXPECT_EQ(0, memcmp(kept.r.remote, &p->sin_addr, 4));
		EXPECT_EQ(0, memcmp(kept.r.local, &q->sin_addr, 4));
		EXPECT_EQ(ntohs(p->sin_port), kept.r.remote_port);
		EXPECT_EQ(ntohs(q->sin_port), kept.r.local_port);
	} else {
		struct sockaddr_in6 *p = (void *)&self->p.from, *q = (void *)&self->p.addr;

		EXPECT_EQ(6, kept.r.family);
		EXPECT_EQ(0, memcmp(kept.r.remote, &p->sin6_addr, 16));
		EXPECT_EQ(0, memcmp(kept.r.local, &q->sin6_addr, 16));
		EXPECT_EQ(ntohs(p->sin6_port), kept.r.remote_port);
		EXPECT_EQ(ntohs(q->sin6_port), kept.r.local_port);
	}
}

/* ---- auto-persist ---- */

struct logged {
	struct __test_metadata *_metadata;
	const struct pair *p;
	struct record r[4096];
	int nr;
};

static int collect(struct record *r, void *arg)
{
	struct logged *l = arg;
	struct __test_metadata *_metadata = l->_metadata;
	const struct sockaddr_in6 *six = (void *)&l->p->from;
	const struct sockaddr_in *four = (void *)&l->p->from;

	EXPECT_FALSE(r->keyed);
	EXPECT_TRUE(r->flags & REC_UDP);
	EXPECT_EQ(0, r->tcp_seq);
	EXPECT_NE(0, REC_TIME_SOURCE(r->flags));
	EXPECT_EQ(ntohs(rfc1071(r->bytes, r->len)), r->csum) TH_LOG("record %lu", r->seq);
	/* Those of a raw socket have the port only. */
	EXPECT_EQ(ntohs(r->family == 4 ? four->sin_port : six->sin6_port), r->remote_port);
	ASSERT_GT(ARRAY_LEN(l->r), l->nr) return -1;
	l->r[l->nr] = *r;
	l->r[l->nr++].bytes = memcpy(malloc(r->len + 1), r->bytes, r->len);
	return 0;
}

static int by_number(const void *a, const void *b)
{
	const struct record *x = a, *y = b;

	return x->seq < y->seq ? -1 : x->seq > y->seq;
}

/* The records, in their order. Of all that the pair's server has received. */
static struct logged *log_of(struct __test_metadata *_metadata, const struct store *s, const struct pair *p)
{
	static struct logged l;

	while (l.nr)
		free(l.r[--l.nr].bytes);
	l._metadata = _metadata;
	l.p = p;
	EXPECT_LE(0, media_scan(s->map, s->map_len, collect, &l));
	qsort(l.r, l.nr, sizeof(l.r[0]), by_number);
	return &l;
}

/* One each, of these lengths, with the bytes of stream seed. */
static void expect_log(struct __test_metadata *_metadata, const struct store *s, const struct pair *p,
		       const size_t *len, int nr, uint32_t seed)
{
	struct logged *l = log_of(_metadata, s, p);
	uint64_t pos = 0;
	int i;

	EXPECT_EQ(nr, l->nr);
	for (i = 0; i < nr && i < l->nr; i++) {
		EXPECT_EQ(len[i], l->r[i].len) TH_LOG("record %d", i);
		EXPECT_EQ(-1, differs(l->r[i].bytes, l->r[i].len, seed, pos)) TH_LOG("record %d", i);
		pos += len[i];
	}
}

/* Sends one of each length; the bytes of all of them. */
static uint64_t send_each(struct __test_metadata *_metadata, int fd, const size_t *len, int nr, uint32_t seed)
{
	static uint8_t buf[MAX_LEN];
	uint64_t pos = 0;
	int i;

	for (i = 0; i < nr; i++) {
		fill(buf, len[i], seed, pos);
		EXPECT_EQ(len[i], send(fd, buf, len[i], 0));
		pos += len[i];
	}
	return pos;
}

static const size_t lengths[] = { 1, 1400, 0, 7, 1000, 3, 0, 0, 900, 40 };

TEST_F(udp, with_auto_persist_what_a_receive_returns_has_its_record)
{
	static uint8_t buf[MAX_LEN];
	uint64_t pos = 0, all;
	struct got g;
	size_t i;

	ASSERT_EQ(0, set_auto(self->p.s, 1));
	for (i = 0; i < ARRAY_LEN(lengths); i++) {
		fill(buf, lengths[i], 70, pos);
		ASSERT_EQ(lengths[i], send(self->p.c, buf, lengths[i], 0));
		if (i % 2) {
			ASSERT_EQ(0, sock_mode(self->p.s, PMSKB_RX_DESC));
			ASSERT_EQ(lengths[i], get(self->p.s, &g, 0));
			check(_metadata, &self->s, &g, lengths[i], 70, pos);
			ASSERT_EQ(0, release(self->p.s, &g));
		} else {
			ASSERT_EQ(0, sock_mode(self->p.s, PMSKB_RX_BYTES));
			memset(buf, 0, sizeof(buf));
			ASSERT_EQ(lengths[i], recv(self->p.s, buf, sizeof(buf), 0));
			EXPECT_EQ(-1, differs(buf, lengths[i], 70, pos));
		}
		pos += lengths[i];
		EXPECT_LE(pos, logged_bytes(self->p.s));
		/* Also one that has no bytes. */
		EXPECT_EQ(i + 1, log_of(_metadata, &self->s, &self->p)->nr);
	}
	expect_log(_metadata, &self->s, &self->p, lengths, ARRAY_LEN(lengths), 70);
	EXPECT_EQ(pos, logged_bytes(self->p.s));
	/* Several at once, and after a restart. */
	all = send_each(_metadata, self->p.c, lengths, ARRAY_LEN(lengths), 70);
	ASSERT_EQ(0, sock_mode(self->p.s, PMSKB_RX_BYTES));
	for (i = 0; i < ARRAY_LEN(lengths); i++)
		ASSERT_EQ(lengths[i], recv(self->p.s, buf, sizeof(buf), 0));
	EXPECT_EQ(pos + all, logged_bytes(self->p.s));
	EXPECT_EQ(0, charged(self->p.s));
	pair_close(&self->p);
	ASSERT_EQ(0, store_close(&self->s));
	ASSERT_EQ(0, store_open(&self->s, variant->dev));
	self->references = module_references();
	EXPECT_EQ(2 * ARRAY_LEN(lengths), log_of(_metadata, &self->s, &self->p)->nr);
}

TEST_F(udp, with_auto_persist_bytes_are_received_as_on_any_udp_socket)
{
	char plain[2000], ours[2000];
	struct pair p;

	ASSERT_EQ(0, pair_make(&p, &self->net, variant->connected));
	bytes_say(&p, plain, sizeof(plain));
	pair_close(&p);
	ASSERT_EQ(0, sock_mode(self->p.s, PMSKB_RX_BYTES));
	ASSERT_EQ(0, set_auto(self->p.s, 1));
	bytes_say(&self->p, ours, sizeof(ours));
	EXPECT_EQ(0, strcmp(plain, ours)) TH_LOG("\n  plain  %s\n  logged %s", plain, ours);
	EXPECT_EQ(2 + 8 + 2 + 10, logged_bytes(self->p.s));
	EXPECT_EQ(5, log_of(_metadata, &self->s, &self->p)->nr);
}

TEST_F(udp, with_auto_persist_what_nobody_reads_has_its_record_soon)
{
	uint64_t bytes;
	char buf[2000];
	size_t i;

	ASSERT_EQ(0, sock_mode(self->p.s, PMSKB_RX_BYTES));
	ASSERT_EQ(0, set_auto(self->p.s, 1));
	/* Not by what is done when it is switched on. */
	usleep(50000);
	bytes = send_each(_metadata, self->p.c, lengths, ARRAY_LEN(lengths), 71);
	EXPECT_TRUE(comes_to(self->p.s, bytes));
	expect_log(_metadata, &self->s, &self->p, lengths, ARRAY_LEN(lengths), 71);
	/* Once only. */
	for (i = 0; i < ARRAY_LEN(lengths); i++)
		ASSERT_EQ(lengths[i], recv(self->p.s, buf, sizeof(buf), i % 2 ? MSG_DONTWAIT : 0));
	EXPECT_EQ(-1, recv(self->p.s, buf, sizeof(buf), MSG_DONTWAIT));
	expect_log(_metadata, &self->s, &self->p, lengths, ARRAY_LEN(lengths), 71);
}

TEST_F(udp, with_auto_persist_what_is_closed_unread_has_its_record)
{
	uint64_t bytes;
	int waiting = 0, k;

	ASSERT_EQ(0, set_auto(self->p.s, 1));
	bytes = send_each(_metadata, self->p.c, lengths, ARRAY_LEN(lengths), 72);
	for (k = 0; k < 1000 && charged(self->p.s) < bytes; k++)
		usleep(1000);
	ASSERT_EQ(0, ioctl(self->p.s, FIONREAD, &waiting));
	close(self->p.s);
	self->p.s = -1;
	expect_log(_metadata, &self->s, &self->p, lengths, ARRAY_LEN(lengths), 72);
}

TEST_F(udp, with_auto_persist_a_look_has_its_record_and_makes_no_other)
{
	static const size_t len[] = { 5, 6, 0, 7 };
	char buf[100];
	struct got g;
	int i;

	ASSERT_EQ(0, sock_mode(self->p.s, PMSKB_RX_BYTES));
	ASSERT_EQ(0, set_auto(self->p.s, 1));
	send_each(_metadata, self->p.c, len, 4, 73);
	ASSERT_EQ(0, setsockopt(self->p.s, SOL_SOCKET, SO_PEEK_OFF, &(int) { 2 }, sizeof(int)));
	EXPECT_EQ(3, recv(self->p.s, buf, sizeof(buf), MSG_PEEK));
	EXPECT_EQ(-1, differs(buf, 3, 73, 2));
	EXPECT_EQ(6, recv(self->p.s, buf, sizeof(buf), MSG_PEEK));
	EXPECT_EQ(-1, differs(buf, 6, 73, 5));
	EXPECT_LE(11, logged_bytes(self->p.s));
	ASSERT_EQ(0, setsockopt(self->p.s, SOL_SOCKET, SO_PEEK_OFF, &(int) { -1 }, sizeof(int)));
	for (i = 0; i < 4; i++) {
		EXPECT_EQ(len[i], recv(self->p.s, buf, sizeof(buf), MSG_PEEK));
		ASSERT_EQ(0, sock_mode(self->p.s, PMSKB_RX_DESC));
		EXPECT_EQ(len[i], get(self->p.s, &g, MSG_PEEK));
		ASSERT_EQ(0, release(self->p.s, &g));
		ASSERT_EQ(0, sock_mode(self->p.s, PMSKB_RX_BYTES));
		EXPECT_EQ(len[i], recv(self->p.s, buf, sizeof(buf), 0));
	}
	expect_log(_metadata, &self->s, &self->p, len, 4, 73);
}

TEST_F(udp, with_auto_persist_merged_datagrams_have_a_record_each)
{
	static const size_t len[] = { 1000, 1000, 1000, 1000, 500 };
	static uint8_t buf[10000];
	int on = 1;

	ASSERT_EQ(0, setsockopt(self->p.s, SOL_UDP, UDP_GRO, &on, sizeof(on)));
	ASSERT_EQ(0, setsockopt(self->p.c, SOL_UDP, UDP_SEGMENT, &(int) { 1000 }, sizeof(int)));
	ASSERT_EQ(0, set_auto(self->p.s, 1));
	fill(buf, 4500, 74, 0);
	ASSERT_EQ(4500, send(self->p.c, buf, 4500, 0));
	EXPECT_TRUE(comes_to(self->p.s, 4500));
	expect_log(_metadata, &self->s, &self->p, len, 5, 74);
}

TEST_F(udp, with_auto_persist_what_waited_when_it_was_switched_on_counts)
{
	uint64_t bytes;
	char buf[10];
	int i;

	/* From before the socket had a store, and after. */
	bytes = send_each(_metadata, self->p.c, lengths, ARRAY_LEN(lengths), 75);
	usleep(20000);
	EXPECT_EQ(0, logged_bytes(self->p.s));
	ASSERT_EQ(0, set_auto(self->p.s, 1));
	EXPECT_TRUE(comes_to(self->p.s, bytes));
	expect_log(_metadata, &self->s, &self->p, lengths, ARRAY_LEN(lengths), 75);
	/* And off again. */
	ASSERT_EQ(0, set_auto(self->p.s, 0));
	ASSERT_EQ(0, sock_mode(self->p.s, PMSKB_RX_BYTES));
	ASSERT_EQ(5, send(self->p.c, "plain", 5, 0));
	for (i = 0; i < (int)ARRAY_LEN(lengths) + 1; i++)
		ASSERT_LE(0, recv(self->p.s, buf, sizeof(buf), 0));
	EXPECT_EQ(bytes, logged_bytes(self->p.s));
}

struct reading {
	int fd;
	uint64_t *bytes, early, nr;
	pthread_t thread;
};

static void *read_on(void *arg)
{
	struct reading *r = arg;
	char buf[3000];
	ssize_t n;

	while ((n = recv(r->fd, buf, sizeof(buf), 0)) > 0) {
		uint64_t sum = __atomic_add_fetch(r->bytes, n, __ATOMIC_SEQ_CST);

		r->early += logged_bytes(r->fd) < sum;
		r->nr++;
	}
	return NULL;
}

TEST_F_TIMEOUT(udp, with_auto_persist_several_threads_read_what_has_its_record, 120)
{
	enum { NR = 3, SENDS = 600 };
	struct reading r[NR];
	uint64_t bytes = 0, sent = 0, nr = 0, i;
	char buf[500];

	ASSERT_EQ(0, sock_mode(self->p.s, PMSKB_RX_BYTES));
	ASSERT_EQ(0, set_auto(self->p.s, 1));
	for (i = 0; i < NR; i++) {
		r[i] = (struct reading) { self->p.s, &bytes };
		ASSERT_EQ(0, pthread_create(&r[i].thread, NULL, read_on, &r[i]));
	}
	for (i = 0; i < SENDS; i++) {
		size_t len = 1 + i % sizeof(buf);

		fill(buf, len, 76, sent);
		ASSERT_EQ(len, send(self->p.c, buf, len, 0));
		sent += len;
		if (i % 50 == 49)
			usleep(2000);
	}
	for (i = 0; i < NR; i++)
		ASSERT_EQ(0, send(self->p.c, "", 0, 0));
	for (i = 0; i < NR; i++) {
		pthread_join(r[i].thread, NULL);
		EXPECT_EQ(0, r[i].early);
		nr += r[i].nr;
	}
	EXPECT_EQ(SENDS, nr);
	EXPECT_EQ(sent, bytes);
	EXPECT_EQ(sent, logged_bytes(self->p.s));
	EXPECT_EQ(SENDS + NR, log_of(_metadata, &self->s, &self->p)->nr);
}

TEST_F(udp, datagrams_that_are_alike_are_told_apart)
{
	struct pmskb_ext e[4];
	struct pmskb_result res;
	struct pmskb_op op;
	struct got g[2];
	char buf[100];
	int i;

	/* The first half of one, the second of the other: not the whole of either. */
	for (i = 0; i < 50; i++)
		buf[i] = 3 * i;
	memset(buf + 50, 1, 50);
	for (i = 0; i < 2; i++)
		ASSERT_EQ(100, send(self->p.c, buf, 100, 0));
	for (i = 0; i < 2; i++) {
		ASSERT_EQ(100, get(self->p.s, &g[i], 0));
		ASSERT_EQ(1, g[i].n) TH_LOG("a datagram lies in two frames");
	}
	e[0] = (struct pmskb_ext) { g[0].d[0].token, 0, 50, 0 };
	e[1] = (struct pmskb_ext) { g[1].d[0].token, 50, 50, 0 };
	op = op_put("halves", 6, e, 2);
	ASSERT_EQ(1, persist_one(self->p.s, &op, &res));
	EXPECT_EQ(rfc1071(buf, 100), res.csum);
	EXPECT_EQ(PMSKB_CSUM_COMPUTED, res.csum_kind);
}

TEST_F(udp, without_a_checksum_the_sum_is_computed_and_the_record_says_so)
{
	struct pmskb_sock_info before, after;
	struct pmskb_ext e[MAX_DESC];
	struct pmskb_result res;
	struct pmskb_op op;
	static uint8_t buf[700];
	int on = 1;
	struct got g;

	fill(buf, sizeof(buf), 60, 0);
	if (variant->family == AF_INET) {
		ASSERT_EQ(0, setsockopt(self->p.c, SOL_SOCKET, SO_NO_CHECK, &on, sizeof(on)));
	} else {
		ASSERT_EQ(0, setsockopt(self->p.c, SOL_UDP, UDP_NO_CHECK6_TX, &on, sizeof(on)));
		/* Which is refused, unless it is asked for. */
		ASSERT_EQ(3, send(self->p.c, "not", 3, 0));
		usleep(50000);
		EXPECT_EQ(-EAGAIN, get(self->p.s, &g, MSG_DONTWAIT));
		ASSERT_EQ(0, setsockopt(self->p.s, SOL_UDP, UDP_NO_CHECK6_RX, &on, sizeof(on)));
	}
	ASSERT_EQ(0, sock_info(self->p.s, &before));
	ASSERT_EQ(sizeof(buf), send(self->p.c, buf, sizeof(buf), 0));
	ASSERT_EQ(sizeof(buf), get(self->p.s, &g, 0));
	check(_metadata, &self->s, &g, sizeof(buf), 60, 0);
	EXPECT_EQ(PMSKB_CSUM_COMPUTED, g.d[0].csum_kind);
	exts_of(e, g.d, g.n);
	op = op_put("k", 1, e, g.n);
	ASSERT_EQ(1, persist_one(self->p.s, &op, &res));
	EXPECT_EQ(PMSKB_CSUM_COMPUTED, res.csum_kind);
	EXPECT_EQ(rfc1071(buf, sizeof(buf)), res.csum);
	ASSERT_EQ(0, sock_info(self->p.s, &after));
	EXPECT_EQ(before.counters.computed + 1, after.counters.computed);
}

/* A datagram with a checksum of our own making; IPv4, from the client's place. */
static int send_raw(int raw, const struct pair *p, const void *data, size_t len, bool right)
{
	const struct sockaddr_in *to = (void *)&p->addr, *from = (void *)&p->from;
	uint8_t packet[2000], *udp = packet + 12;
	struct sockaddr_in name = *to;
	uint16_t sum;

	/* The pseudo header first. */
	memcpy(packet, &from->sin_addr, 4);
	memcpy(packet + 4, &to->sin_addr, 4);
	packet[8] = 0;
	packet[9] = IPPROTO_UDP;
	memcpy(packet + 10, &(uint16_t) { htons(8 + len) }, 2);
	memcpy(udp, &from->sin_port, 2);
	memcpy(udp + 2, &to->sin_port, 2);
	memcpy(udp + 4, packet + 10, 2);
	memset(udp + 6, 0, 2);
	memcpy(udp + 8, data, len);
	sum = ~rfc1071(packet, 20 + len);
	if (!right)
		sum ^= htons(0x0100);
	memcpy(udp + 6, &sum, 2);
	name.sin_port = 0;
	return sendto(raw, udp, 8 + len, 0, (void *)&name, sizeof(name)) == (ssize_t)(8 + len) ? 0 : -errno;
}

/* A connected socket to a port where nobody is. */
static int refused_say(struct __test_metadata *_metadata, const struct net *net, int store)
{
	struct net dgram = { net->family, net->link, SOCK_DGRAM };
	union {
		char buf[512];
		struct cmsghdr align;
	} control;
	char data[16];
	struct iovec iov = { data, sizeof(data) };
	struct msghdr msg = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = &control,
			      .msg_controllen = sizeof(control) };
	struct sock_extended_err err;
	struct sockaddr_storage addr;
	struct cmsghdr *cmsg;
	struct got g;
	socklen_t len;
	int l, fd, on = 1, k, said;

	l = net_listen(&dgram, &addr, &len);
	ASSERT_LE(0, l);
	close(l);
	fd = socket(net->family, SOCK_DGRAM, 0);
	ASSERT_EQ(0, connect(fd, (void *)&addr, len));
	timeout_set(fd, 5000 * slowness());
	if (store >= 0) {
		ASSERT_EQ(0, sock_attach_ioctl(fd, store));
		ASSERT_EQ(0, sock_mode(fd, PMSKB_RX_DESC));
	}
	ASSERT_EQ(1, send(fd, "x", 1, 0));
	said = store >= 0 ? -get(fd, &g, 0) : ERRNO(recv(fd, data, 1, 0));
	if (net->family == AF_INET) {
		ASSERT_EQ(0, setsockopt(fd, IPPROTO_IP, IP_RECVERR, &on, sizeof(on)));
	} else {
		ASSERT_EQ(0, setsockopt(fd, IPPROTO_IPV6, IPV6_RECVERR, &on, sizeof(on)));
	}
	ASSERT_EQ(8, send(fd, "12345678", 8, 0));
	for (k = 0; k < 500; k++) {
		if (recvmsg(fd, &msg, MSG_ERRQUEUE | MSG_DONTWAIT) >= 0)
			break;
		usleep(10000);
	}
	ASSERT_GT(500, k) TH_LOG("nothing in the error queue");
	EXPECT_TRUE(msg.msg_flags & MSG_ERRQUEUE);
	EXPECT_EQ(0, memcmp(data, "12345678", 8));
	memset(&err, 0, sizeof(err));
	for (cmsg = CMSG_FIRSTHDR(&msg); cmsg; cmsg = CMSG_NXTHDR(&msg, cmsg))
		if ((cmsg->cmsg_level == IPPROTO_IP && cmsg->cmsg_type == IP_RECVERR) ||
		    (cmsg->cmsg_level == IPPROTO_IPV6 && cmsg->cmsg_type == IPV6_RECVERR))
			memcpy(&err, CMSG_DATA(cmsg), sizeof(err));
	EXPECT_EQ(ECONNREFUSED, err.ee_errno);
	EXPECT_EQ(net->family == AF_INET ? SO_EE_ORIGIN_ICMP : SO_EE_ORIGIN_ICMP6, err.ee_origin);
	close(fd);
	return said;
}

TEST_F(udp, held_bytes_do_not_change_under_later_traffic)
{
	static uint8_t buf[1000];
	struct got held, g;
	int i;

	fill(buf, sizeof(buf), 70, 0);
	ASSERT_EQ(sizeof(buf), send(self->p.c, buf, sizeof(buf), 0));
	ASSERT_EQ(sizeof(buf), get(self->p.s, &held, 0));
	memset(buf, 0xee, sizeof(buf));
	for (i = 0; i < 300; i++) {
		ASSERT_EQ(sizeof(buf), send(self->p.c, buf, sizeof(buf), 0));
		ASSERT_EQ(sizeof(buf), get(self->p.s, &g, 0));
		ASSERT_EQ(0, release(self->p.s, &g));
	}
	check(_metadata, &self->s, &held, sizeof(buf), 70, 0);
}

TEST_F(udp, what_waited_when_the_socket_was_attached_is_copied)
{
	static uint8_t buf[10000];
	struct pmskb_sock_info info;
	struct pair p;
	struct got g;
	int i;

	ASSERT_EQ(0, pair_make(&p, &self->net, variant->connected));
	fill(buf, sizeof(buf), 80, 0);
	ASSERT_EQ(sizeof(buf), send(p.c, buf, sizeof(buf), 0));
	usleep(50000);
	ASSERT_EQ(0, sock_attach_ioctl(p.s, self->s.fd));
	ASSERT_EQ(0, sock_mode(p.s, PMSKB_RX_DESC));
	ASSERT_EQ(1000, send(p.c, buf, 1000, 0));
	ASSERT_EQ(sizeof(buf), get(p.s, &g, 0));
	check(_metadata, &self->s, &g, sizeof(buf), 80, 0);
	for (i = 0; i < g.n; i++) {
		EXPECT_TRUE(g.d[i].flags & PMSKB_DESC_COPIED);
		EXPECT_EQ(PMSKB_CSUM_COMPUTED, g.d[i].csum_kind);
	}
	ASSERT_EQ(1000, get(p.s, &g, 0));
	check(_metadata, &self->s, &g, 1000, 80, 0);
	for (i = 0; i < g.n; i++) {
		EXPECT_FALSE(g.d[i].flags & PMSKB_DESC_COPIED);
	}
	ASSERT_EQ(0, sock_info(p.s, &info));
	EXPECT_EQ(sizeof(buf), info.counters.copied_bytes);
	EXPECT_EQ(1000, info.counters.placed_bytes);
	pair_close(&p);
}

/* Datagrams that were sent at once travel as one packet as far as they can. */
TEST_F(udp, datagrams_that_were_merged_come_apart_where_they_were_one)
{
	uint16_t size = 1000;
	static uint8_t buf[10000];
	struct got g;
	uint64_t pos;
	int on = 1, i;

	ASSERT_EQ(0, setsockopt(self->p.c, SOL_UDP, UDP_SEGMENT, &(int) { size }, sizeof(int)));
	fill(buf, sizeof(buf), 90, 0);
	ASSERT_EQ(9500, send(self->p.c, buf, 9500, 0));
	/* One at a time. */
	for (pos = 0, i = 0; i < 10; i++, pos += size) {
		uint64_t want = i < 9 ? size : 500, have = 0;
		int k;

		ASSERT_EQ(want, get(self->p.s, &g, 0));
		for (k = 0; k < g.n; k++) {
			EXPECT_EQ(-1, differs(self->s.map + g.d[k].offset, g.d[k].len, 90, pos + have));
			/* Its place in what arrived as one. */
			EXPECT_GE(g.d[k].pkt_len, g.d[k].pkt_off + g.d[k].len);
			have += g.d[k].len;
		}
		EXPECT_EQ(want, have);
		EXPECT_EQ(0, g.gso);
		ASSERT_EQ(0, release(self->p.s, &g));
	}
	EXPECT_EQ(-EAGAIN, get(self->p.s, &g, MSG_DONTWAIT));
	/* Together, and UDP says how long each is. */
	ASSERT_EQ(0, setsockopt(self->p.s, SOL_UDP, UDP_GRO, &on, sizeof(on)));
	ASSERT_EQ(9500, send(self->p.c, buf, 9500, 0));
	for (pos = 0; pos < 9500; pos += g.len) {
		ASSERT_LT(0, get(self->p.s, &g, 0));
		check(_metadata, &self->s, &g, g.len, 90, pos);
		if (g.len > size) {
			EXPECT_EQ(size, g.gso);
		}
	}
	if (variant->link == LINK_LO) {
		EXPECT_EQ(9500, g.len) TH_LOG("nothing on lo takes it apart");
	}
}

TEST_F(udp, several_receivers_get_each_datagram_once)
{
	enum { NR = 4, SENDS = 512 };
	uint32_t seen[SENDS] = {};
	int pipes[2], i, k, st;
	pid_t pid[NR];
	struct got g;
	uint32_t n;

	ASSERT_EQ(0, pipe(pipes));
	for (i = 0; i < NR; i++) {
		pid[i] = fork();
		if (pid[i])
			continue;
		while (get(self->p.s, &g, 0) == sizeof(n)) {
			memcpy(&n, self->s.map + g.d[0].offset, sizeof(n));
			if (n == ~0U)
				_exit(0);
			if (write(pipes[1], &n, sizeof(n)) != sizeof(n) || release(self->p.s, &g))
				_exit(1);
		}
		_exit(2);
	}
	for (n = 0; n < SENDS; n++) {
		ASSERT_EQ(sizeof(n), send(self->p.c, &n, sizeof(n), 0));
		if (n % 64 == 63)
			for (k = 0; k < 64; k++) {
				uint32_t one;

				ASSERT_EQ(sizeof(one), read(pipes[0], &one, sizeof(one)));
				ASSERT_GT(SENDS, one);
				seen[one]++;
			}
	}
	n = ~0U;
	for (i = 0; i < NR; i++)
		ASSERT_EQ(sizeof(n), send(self->p.c, &n, sizeof(n), 0));
	for (i = 0; i < NR; i++) {
		waitpid(pid[i], &st, 0);
		EXPECT_EQ(0, st);
	}
	close(pipes[1]);
	while (read(pipes[0], &n, sizeof(n)) == sizeof(n))
		seen[n]++;
	for (n = 0; n < SENDS; n++) {
		EXPECT_EQ(1, seen[n]) TH_LOG("datagram %u", n);
	}
	close(pipes[0]);
}

TEST_F(udp, detach_is_ebusy_while_a_socket_is_attached_and_close_lets_go)
{
	struct pmskb_store_info info;
	static uint8_t buf[30000];
	struct got g;
	int k;

	EXPECT_EQ(self->references + 1, module_references());
	ASSERT_EQ(sizeof(buf), send(self->p.c, buf, sizeof(buf), 0));
	ASSERT_EQ(sizeof(buf), get(self->p.s, &g, 0));
	/* Another one unread. */
	ASSERT_EQ(sizeof(buf), send(self->p.c, buf, sizeof(buf), 0));
	usleep(50000);
	ASSERT_EQ(0, store_info(&self->s, &info));
	EXPECT_EQ(1, info.sockets);
	EXPECT_EQ(g.n, info.tokens);
	store_let_go(&self->s);
	EXPECT_EQ(-EBUSY, dev_detach(self->s.ctl, self->s.minor, 100));
	close(self->p.s);
	self->p.s = -1;
	EXPECT_EQ(0, dev_detach(self->s.ctl, self->s.minor, 4000));
	self->s.minor = ~0U;
	EXPECT_EQ(0, store_close(&self->s));
	ASSERT_EQ(0, store_open(&self->s, variant->dev));
	for (k = 0; k < 100 && module_references() != self->references; k++)
		usleep(20000);
}

TEST_F(udp, a_socket_sent_to_another_process_is_still_attached)
{
	char control[CMSG_SPACE(sizeof(int))] = {}, byte = 0;
	struct iovec iov = { &byte, 1 };
	struct msghdr msg = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control,
			      .msg_controllen = sizeof(control) };
	struct cmsghdr *cmsg = CMSG_FIRSTHDR(&msg);
	int link[2], st;
	pid_t pid;

	ASSERT_EQ(0, socketpair(AF_UNIX, SOCK_STREAM, 0, link));
	pid = fork();
	if (!pid) {
		struct got g;
		int fd;

		close(self->p.s);
		if (recvmsg(link[1], &msg, 0) != 1)
			_exit(1);
		memcpy(&fd, CMSG_DATA(CMSG_FIRSTHDR(&msg)), sizeof(fd));
		if (get(fd, &g, 0) != 5 || g.n != 1 || memcmp(self->s.map + g.d[0].offset, "hello", 5))
			_exit(2);
		/* Tokens are the socket's, whoever has it. */
		if (desc_release(fd, g.d[0].token, 1))
			_exit(3);
		_exit(0);
	}
	cmsg->cmsg_level = SOL_SOCKET;
	cmsg->cmsg_type = SCM_RIGHTS;
	cmsg->cmsg_len = CMSG_LEN(sizeof(int));
	memcpy(CMSG_DATA(cmsg), &self->p.s, sizeof(int));
	ASSERT_EQ(1, sendmsg(link[0], &msg, 0));
	close(self->p.s);
	self->p.s = -1;
	ASSERT_EQ(5, send(self->p.c, "hello", 5, 0));
	ASSERT_EQ(pid, waitpid(pid, &st, 0));
	EXPECT_EQ(0, st) TH_LOG("exit %d", WEXITSTATUS(st));
	close(link[0]);
	close(link[1]);
}

/* ---- one place is enough for the rest ---- */

FIXTURE(dgram) {
	struct store s;
	struct net net;
};

FIXTURE_SETUP(dgram)
{
	const char *why;

	if (!dev_path(DEV_PMEM, &why))
		SKIP(return, "%s", why);
	self->net = (struct net) { AF_INET, LINK_LO, SOCK_DGRAM };
	ASSERT_EQ(0, store_make(&self->s, DEV_PMEM, 0, 0));
}

FIXTURE_TEARDOWN(dgram)
{
	EXPECT_EQ(0, store_close(&self->s));
}

TEST_F(dgram, attaching_once_and_options)
{
	int fd = socket(AF_INET, SOCK_DGRAM, 0), store = self->s.fd, value = 1;
	struct pmskb_sock_info info;
	struct store other;
	const char *why;

	/* Not attached, it has none of our options. */
	EXPECT_EQ(ENOPROTOOPT, ERRNO(setsockopt(fd, SOL_PMSKB, PMSKB_ATTACH, &store, sizeof(store))));
	EXPECT_EQ(-ENOPROTOOPT, sock_mode(fd, PMSKB_RX_DESC));
	EXPECT_NE(0, sock_info(fd, &info));
	EXPECT_NE(0, sock_ulp(fd));
	ASSERT_EQ(0, sock_attach_ioctl(fd, self->s.fd));
	EXPECT_EQ(-EALREADY, sock_attach_ioctl(fd, self->s.fd));
	EXPECT_EQ(EALREADY, ERRNO(setsockopt(fd, SOL_PMSKB, PMSKB_ATTACH, &store, sizeof(store))));
	EXPECT_EQ(ENOPROTOOPT, ERRNO(setsockopt(fd, SOL_PMSKB, 77, &value, sizeof(value))));
	EXPECT_EQ(-EINVAL, sock_mode(fd, 2));
	EXPECT_EQ(-ESTALE, desc_release(fd, 1, 1));
	ASSERT_EQ(0, sock_info(fd, &info));
	EXPECT_EQ(self->s.minor, info.store);
	EXPECT_EQ(PMSKB_RX_BYTES, info.rx_mode);
	if (dev_path(DEV_DAX, &why)) {
		ASSERT_EQ(0, store_make(&other, DEV_DAX, 0, 0));
		EXPECT_EQ(-EBUSY, sock_attach_ioctl(fd, other.fd));
		EXPECT_EQ(0, store_close(&other));
	}
	/* UDP's own options go on. */
	EXPECT_EQ(0, setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &(int) { 100000 }, sizeof(int)));
	EXPECT_EQ(0, setsockopt(fd, SOL_UDP, UDP_CORK, &(int) { 0 }, sizeof(int)));
	close(fd);
}

TEST_F(dgram, what_belongs_to_something_else_is_ebusy_and_the_other_way_round)
{
	int fd, encap = UDP_ENCAP_L2TPINUDP, none = 0, key = 0, map, array;
	union bpf_attr sockmap = { .map_type = BPF_MAP_TYPE_SOCKMAP, .key_size = 4, .value_size = 4,
				   .max_entries = 1 };
	union bpf_attr reuse = { .map_type = BPF_MAP_TYPE_REUSEPORT_SOCKARRAY, .key_size = 4, .value_size = 8,
				 .max_entries = 1 };
	uint64_t value;
	int one = 1;

	/* A tunnel. */
	fd = socket(AF_INET, SOCK_DGRAM, 0);
	ASSERT_EQ(0, setsockopt(fd, SOL_UDP, UDP_ENCAP, &encap, sizeof(encap)));
	EXPECT_EQ(-EBUSY, sock_attach_ioctl(fd, self->s.fd));
	close(fd);
	fd = socket(AF_INET, SOCK_DGRAM, 0);
	ASSERT_EQ(0, sock_attach_ioctl(fd, self->s.fd));
	EXPECT_EQ(EBUSY, ERRNO(setsockopt(fd, SOL_UDP, UDP_ENCAP, &encap, sizeof(encap))));
	EXPECT_EQ(EBUSY, ERRNO(setsockopt(fd, SOL_UDP, UDP_ENCAP, &none, sizeof(none))));
	close(fd);

	/* sockmap. */
	map = syscall(__NR_bpf, BPF_MAP_CREATE, &sockmap, sizeof(sockmap));
	array = syscall(__NR_bpf, BPF_MAP_CREATE, &reuse, sizeof(reuse));
	if (map < 0 || array < 0)
		SKIP(return, "no BPF maps of sockets");
	memset(&sockmap, 0, sizeof(sockmap));
	sockmap.map_fd = map;
	sockmap.key = PTR(&key);
	sockmap.value = PTR(&fd);
	for (key = 0, one = 0; one < 2; one++) {
		struct sockaddr_in any = { .sin_family = AF_INET };
		int on = 1, attached;

		/* The other one first. */
		fd = socket(AF_INET, SOCK_DGRAM, 0);
		ASSERT_EQ(0, setsockopt(fd, SOL_SOCKET, SO_REUSEPORT, &on, sizeof(on)));
		ASSERT_EQ(0, bind(fd, (void *)&any, sizeof(any)));
		value = fd;
		memset(&reuse, 0, sizeof(reuse));
		reuse.map_fd = array;
		reuse.key = PTR(&key);
		reuse.value = PTR(&value);
		EXPECT_EQ(0, ERRNO(syscall(__NR_bpf, BPF_MAP_UPDATE_ELEM, one ? &reuse : &sockmap, sizeof(reuse))));
		EXPECT_EQ(-EBUSY, sock_attach_ioctl(fd, self->s.fd)) TH_LOG("%s", one ? "sockarray" : "sockmap");
		close(fd);
		/* We first. */
		fd = socket(AF_INET, SOCK_DGRAM, 0);
		ASSERT_EQ(0, setsockopt(fd, SOL_SOCKET, SO_REUSEPORT, &on, sizeof(on)));
		ASSERT_EQ(0, bind(fd, (void *)&any, sizeof(any)));
		attached = sock_attach_ioctl(fd, self->s.fd);
		ASSERT_EQ(0, attached);
		value = fd;
		EXPECT_EQ(EBUSY, ERRNO(syscall(__NR_bpf, BPF_MAP_UPDATE_ELEM, one ? &reuse : &sockmap, sizeof(reuse))))
			TH_LOG("%s", one ? "sockarray" : "sockmap");
		close(fd);
	}
	close(map);
	close(array);
}

struct form {
	int fd, err;
	void *value;
};

static void *change_form(void *arg)
{
	struct form *f = arg;

	f->err = ERRNO(setsockopt(f->fd, IPPROTO_IPV6, IPV6_ADDRFORM, f->value, sizeof(int)));
	return NULL;
}

/* The kernel has looked at the socket's operations, and waits for the option's value. */
TEST_F(dgram, an_addrform_that_is_under_way_when_it_is_attached_leaves_nothing_behind)
{
	struct uffdio_api api = { .api = UFFD_API };
	struct uffdio_register range = { .mode = UFFDIO_REGISTER_MODE_MISSING };
	int page = sysconf(_SC_PAGESIZE), uffd, value = AF_INET;
	struct sockaddr_in6 addr = { .sin6_family = AF_INET6 };
	struct uffd_msg msg;
	struct form f = {};
	pthread_t thread;
	socklen_t len = sizeof(addr);
	struct pmskb_store_info info;
	long references;
	void *from;
	int c, k;

	uffd = syscall(SYS_userfaultfd, O_CLOEXEC);
	if (uffd < 0)
		SKIP(return, "no userfaultfd");
	ASSERT_EQ(0, ioctl(uffd, UFFDIO_API, &api));
	f.value = mmap(NULL, page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	from = aligned_alloc(page, page);
	memcpy(from, &value, sizeof(value));
	range.range = (struct uffdio_range) { PTR(f.value), page };
	ASSERT_EQ(0, ioctl(uffd, UFFDIO_REGISTER, &range));

	/* Two ends in IPv6 sockets, over IPv4. */
	inet_pton(AF_INET6, "::ffff:127.0.0.1", &addr.sin6_addr);
	f.fd = socket(AF_INET6, SOCK_DGRAM, 0);
	c = socket(AF_INET6, SOCK_DGRAM, 0);
	ASSERT_EQ(0, bind(f.fd, (void *)&addr, sizeof(addr)));
	ASSERT_EQ(0, getsockname(f.fd, (void *)&addr, &len));
	ASSERT_EQ(0, connect(c, (void *)&addr, sizeof(addr)));
	ASSERT_EQ(0, getsockname(c, (void *)&addr, &len));
	ASSERT_EQ(0, connect(f.fd, (void *)&addr, sizeof(addr)));
	timeout_set(f.fd, 20000 * slowness());
	ASSERT_EQ(0, pthread_create(&thread, NULL, change_form, &f));
	ASSERT_EQ(sizeof(msg), read(uffd, &msg, sizeof(msg)));
	ASSERT_EQ(0, sock_attach_ioctl(f.fd, self->s.fd));
	references = module_references();
	ASSERT_EQ(0, set_auto(f.fd, 1));
	ASSERT_EQ(5, send(c, "first", 5, 0));
	EXPECT_TRUE(comes_to(f.fd, 5));
	ASSERT_EQ(0, ioctl(uffd, UFFDIO_COPY, &(struct uffdio_copy) {
		.dst = PTR(f.value), .src = PTR(from), .len = page }));
	pthread_join(thread, NULL);
	EXPECT_EQ(0, f.err) TH_LOG("%s", strerror(f.err));
	/* It is a plain one of IPv4 now, but for what comes to it. */
	ASSERT_EQ(6, send(c, "second", 6, 0));
	EXPECT_EQ(ENOPROTOOPT, set_auto(f.fd, 1));
	close(f.fd);
	close(c);
	close(uffd);
	/* It ends when RCU lets it. */
	for (k = 0; k < 500 * slowness(); k++) {
		ASSERT_EQ(0, store_info(&self->s, &info));
		if (!info.sockets && module_references() < references)
			break;
		usleep(10000);
	}
	EXPECT_EQ(0, info.sockets);
	EXPECT_EQ(references - 1, module_references());
	free(from);
	munmap(f.value, page);
}

struct array {
	int fd;				/* a socket; or a store */
	bool store;
	struct pmskb_op *ops;
	struct pmskb_result res[2];
	int err;
	uint32_t nr;
};

static void *submit_array(void *arg)
{
	struct array *a = arg;

	a->err = (a->store ? submit : persist)(a->fd, a->ops, a->res, a->nr);
	return NULL;
}

/*
 * The array has resolved its first put, and waits for the socket of its second one, which another
 * call has locked that waits for a page. Meanwhile the first one's descriptor names another socket.
 */
TEST_F(dgram, a_put_releases_the_token_of_the_socket_that_it_named)
{
	struct uffdio_api api = { .api = UFFD_API };
	struct uffdio_register range = { .mode = UFFDIO_REGISTER_MODE_MISSING };
	int page = sysconf(_SC_PAGESIZE), uffd, i;
	struct pair p[3];			/* the first one, the one that is locked, the other one */
	struct pmskb_ext ext[2], wrong = { .token = 0x7fffffff };
	struct array puts = { .store = true, .nr = 2 }, locks = { .nr = 1 };
	struct pmskb_op ops[2], own, *from = aligned_alloc(page, page);
	pthread_t holder, writer;
	struct uffd_msg msg;
	struct got g[3];

	uffd = syscall(SYS_userfaultfd, O_CLOEXEC);
	if (uffd < 0)
		SKIP(return, "no userfaultfd");
	ASSERT_EQ(0, ioctl(uffd, UFFDIO_API, &api));
	for (i = 0; i < 3; i++) {
		ASSERT_EQ(0, pair_make(&p[i], &self->net, true));
		ASSERT_EQ(0, sock_attach_ioctl(p[i].s, self->s.fd));
		ASSERT_EQ(0, sock_mode(p[i].s, PMSKB_RX_DESC));
		ASSERT_EQ(5, send(p[i].c, "token", 5, 0));
		ASSERT_EQ(5, get(p[i].s, &g[i], 0));
		ASSERT_EQ(g[0].d[0].token, g[i].d[0].token) TH_LOG("numbers do not begin alike");
	}
	locks.fd = p[1].s;
	locks.ops = mmap(NULL, page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	range.range = (struct uffdio_range) { PTR(locks.ops), page };
	ASSERT_EQ(0, ioctl(uffd, UFFDIO_REGISTER, &range));
	ASSERT_EQ(0, pthread_create(&holder, NULL, submit_array, &locks));
	ASSERT_EQ(sizeof(msg), read(uffd, &msg, sizeof(msg)));
	puts.fd = self->s.fd;
	puts.ops = ops;
	for (i = 0; i < 2; i++) {
		ext[i] = ext_of(&g[i].d[0]);
		ops[i] = op_put(i ? "two" : "one", 3, &ext[i], 1);
		ops[i].fd = p[i].s;
	}
	ASSERT_EQ(0, pthread_create(&writer, NULL, submit_array, &puts));
	usleep(200000 * slowness());
	ASSERT_EQ(p[0].s, dup2(p[2].s, p[0].s));
	*from = op_release(&wrong, 1);
	ASSERT_EQ(0, ioctl(uffd, UFFDIO_COPY, &(struct uffdio_copy) {
		.dst = PTR(locks.ops), .src = PTR(from), .len = page }));
	pthread_join(holder, NULL);
	pthread_join(writer, NULL);
	EXPECT_EQ(0, locks.err);
	ASSERT_EQ(0, puts.err);
	EXPECT_LT(0, puts.res[0].res);
	EXPECT_LT(0, puts.res[1].res);
	/* The other one's is still there. */
	own = op_release(&(struct pmskb_ext) { .token = g[2].d[0].token }, 1);
	EXPECT_EQ(1, persist_one(p[2].s, &own, NULL));
	for (i = 0; i < 3; i++)
		pair_close(&p[i]);
	close(uffd);
	free(from);
	munmap(locks.ops, page);
}

TEST_F(dgram, an_attached_socket_stays_one_of_ipv6_and_receives_ipv4)
{
	struct sockaddr_in6 any = { .sin6_family = AF_INET6 }, mapped = { .sin6_family = AF_INET6 };
	struct sockaddr_in6 *from;
	struct sockaddr_in to = { .sin_family = AF_INET };
	socklen_t len = sizeof(any);
	int fd, c, form = AF_INET, on = 1;
	struct got g;

	fd = socket(AF_INET6, SOCK_DGRAM, 0);
	ASSERT_EQ(0, bind(fd, (void *)&any, sizeof(any)));
	ASSERT_EQ(0, getsockname(fd, (void *)&any, &len));
	ASSERT_EQ(0, setsockopt(fd, IPPROTO_IPV6, IPV6_RECVPKTINFO, &on, sizeof(on)));
	ASSERT_EQ(0, sock_attach_ioctl(fd, self->s.fd));
	ASSERT_EQ(0, sock_mode(fd, PMSKB_RX_DESC));
	timeout_set(fd, 5000 * slowness());
	c = socket(AF_INET, SOCK_DGRAM, 0);
	inet_pton(AF_INET, "127.0.0.1", &to.sin_addr);
	to.sin_port = any.sin6_port;
	ASSERT_EQ(0, connect(c, (void *)&to, sizeof(to)));
	ASSERT_EQ(6, send(c, "mapped", 6, 0));
	ASSERT_EQ(6, get(fd, &g, 0));
	ASSERT_EQ(1, g.n);
	EXPECT_EQ(0, g.d[0].flags & PMSKB_DESC_COPIED);
	EXPECT_EQ(0, memcmp(self->s.map + g.d[0].offset, "mapped", 6));
	from = (void *)&g.from;
	EXPECT_EQ(AF_INET6, from->sin6_family);
	EXPECT_TRUE(IN6_IS_ADDR_V4MAPPED(&from->sin6_addr));
	EXPECT_TRUE(g.info);
	EXPECT_TRUE(IN6_IS_ADDR_V4MAPPED(&g.to));

	/* What IPV6_ADDRFORM would take: connected, and to an address of IPv4. */
	inet_pton(AF_INET6, "::ffff:127.0.0.1", &mapped.sin6_addr);
	mapped.sin6_port = htons(9);
	ASSERT_EQ(0, connect(fd, (void *)&mapped, sizeof(mapped)));
	EXPECT_EQ(EBUSY, ERRNO(setsockopt(fd, IPPROTO_IPV6, IPV6_ADDRFORM, &form, sizeof(form))));
	close(fd);
	/* One that was changed before is one of IPv4, and can be attached. */
	fd = socket(AF_INET6, SOCK_DGRAM, 0);
	ASSERT_EQ(0, connect(fd, (void *)&mapped, sizeof(mapped)));
	ASSERT_EQ(0, setsockopt(fd, IPPROTO_IPV6, IPV6_ADDRFORM, &form, sizeof(form)));
	EXPECT_EQ(0, sock_attach_ioctl(fd, self->s.fd));
	close(fd);
	close(c);
}

TEST_F(dgram, a_wrong_checksum_is_dropped_as_by_udp)
{
	struct pollfd poll_s = { .events = POLLIN };
	struct pair p;
	struct got g;
	int raw;

	ASSERT_EQ(0, pair_make(&p, &self->net, false));
	ASSERT_EQ(0, sock_attach_ioctl(p.s, self->s.fd));
	ASSERT_EQ(0, sock_mode(p.s, PMSKB_RX_DESC));
	poll_s.fd = p.s;
	raw = socket(AF_INET, SOCK_RAW, IPPROTO_UDP);
	ASSERT_LE(0, raw);
	ASSERT_EQ(0, send_raw(raw, &p, "right", 5, true));
	ASSERT_EQ(5, get(p.s, &g, 0));
	EXPECT_EQ(PMSKB_CSUM_DERIVED, g.d[0].csum_kind);
	EXPECT_TRUE(same_address(&p.from, &g.from));
	ASSERT_EQ(0, send_raw(raw, &p, "wrong", 5, false));
	usleep(20000);
	EXPECT_EQ(-EAGAIN, get(p.s, &g, MSG_DONTWAIT));
	EXPECT_EQ(0, poll(&poll_s, 1, 0));
	/* It is not in the way of what comes after it; UDP looks at a long one when it is received. */
	ASSERT_EQ(0, send_raw(raw, &p, "wrong", 5, false));
	ASSERT_EQ(0, send_raw(raw, &p, (char[700]) { "wrong" }, 700, false));
	ASSERT_EQ(0, send_raw(raw, &p, "right", 5, true));
	ASSERT_EQ(5, get(p.s, &g, 0));
	EXPECT_EQ(0, memcmp(self->s.map + g.d[0].offset, "right", 5));
	close(raw);
	pair_close(&p);
}

TEST_F(dgram, with_auto_persist_a_wrong_checksum_leaves_no_record)
{
	/* UDP looks at short ones when they come. */
	static const size_t len[] = { 500, 600 };
	uint8_t text[1100];
	char buf[1000];
	struct pair p;
	int raw, i;

	fill(text, sizeof(text), 77, 0);
	ASSERT_EQ(0, pair_make(&p, &self->net, false));
	ASSERT_EQ(0, sock_attach_ioctl(p.s, self->s.fd));
	raw = socket(AF_INET, SOCK_RAW, IPPROTO_UDP);
	ASSERT_LE(0, raw);
	/* Unread, then read, then closed. */
	for (i = 0; i < 3; i++)
		ASSERT_EQ(0, send_raw(raw, &p, text, 400, false));
	ASSERT_EQ(0, set_auto(p.s, 1));
	ASSERT_EQ(0, send_raw(raw, &p, text, 500, true));
	EXPECT_TRUE(comes_to(p.s, 500));
	ASSERT_EQ(0, send_raw(raw, &p, text, 400, false));
	ASSERT_EQ(0, send_raw(raw, &p, text + 500, 600, true));
	ASSERT_EQ(0, send_raw(raw, &p, text, 400, false));
	EXPECT_EQ(500, recv(p.s, buf, sizeof(buf), 0));
	EXPECT_EQ(600, recv(p.s, buf, sizeof(buf), 0));
	EXPECT_EQ(0, memcmp(buf, text + 500, 600));
	EXPECT_EQ(EAGAIN, ERRNO(recv(p.s, buf, sizeof(buf), MSG_DONTWAIT)));
	for (i = 0; i < 3; i++)
		ASSERT_EQ(0, send_raw(raw, &p, text, 400, false));
	usleep(30000);
	close(raw);
	close(p.s);
	p.s = -1;
	expect_log(_metadata, &self->s, &p, len, 2, 77);
	pair_close(&p);
}

TEST_F(dgram, with_auto_persist_a_wrong_checksum_that_is_looked_at_makes_no_records_anew)
{
	static const size_t len[] = { 500, 300, 100 };
	uint8_t text[900];
	char buf[1000];
	struct pair p;
	int raw;

	fill(text, sizeof(text), 79, 0);
	ASSERT_EQ(0, pair_make(&p, &self->net, false));
	ASSERT_EQ(0, sock_attach_ioctl(p.s, self->s.fd));
	raw = socket(AF_INET, SOCK_RAW, IPPROTO_UDP);
	ASSERT_LE(0, raw);
	ASSERT_EQ(0, set_auto(p.s, 1));
	ASSERT_EQ(0, setsockopt(p.s, SOL_SOCKET, SO_PEEK_OFF, &(int) { 0 }, sizeof(int)));
	ASSERT_EQ(0, send_raw(raw, &p, text, 500, true));
	ASSERT_EQ(0, send_raw(raw, &p, text + 500, 300, true));
	ASSERT_EQ(0, send_raw(raw, &p, text, 400, false));
	EXPECT_TRUE(comes_to(p.s, 800));
	EXPECT_EQ(500, recv(p.s, buf, sizeof(buf), MSG_PEEK));
	EXPECT_EQ(300, recv(p.s, buf, sizeof(buf), MSG_PEEK));
	EXPECT_EQ(EAGAIN, ERRNO(recv(p.s, buf, sizeof(buf), MSG_PEEK | MSG_DONTWAIT)));
	ASSERT_EQ(0, send_raw(raw, &p, text + 800, 100, true));
	EXPECT_EQ(100, recv(p.s, buf, sizeof(buf), MSG_PEEK));
	EXPECT_EQ(500, recv(p.s, buf, sizeof(buf), 0));
	close(raw);
	close(p.s);
	p.s = -1;
	expect_log(_metadata, &self->s, &p, len, 3, 79);
	pair_close(&p);
}

TEST_F(dgram, icmp_errors_are_those_of_any_udp_socket)
{
	struct net net = { AF_INET, LINK_LO };
	int i;

	for (i = 0; i < 2; i++) {
		net.family = i ? AF_INET6 : AF_INET;
		EXPECT_EQ(ECONNREFUSED, refused_say(_metadata, &net, -1));
		EXPECT_EQ(ECONNREFUSED, refused_say(_metadata, &net, self->s.fd));
	}
}

TEST_F(dgram, that_a_path_has_another_mtu_is_told_before_datagrams)
{
	union {
		char buf[512];
		struct cmsghdr align;
	} control;
	struct msghdr msg = { .msg_control = &control, .msg_controllen = sizeof(control) };
	struct sockaddr_storage name;
	static char buf[60000];
	struct cmsghdr *cmsg;
	bool told = false;
	struct net net = { AF_INET6, LINK_VETH };
	const char *why = net_up(LINK_VETH);
	struct pair p;
	struct got g;
	int on = 1;

	if (why)
		SKIP(return, "%s", why);
	ASSERT_EQ(0, pair_make(&p, &net, true));
	ASSERT_EQ(0, sock_attach_ioctl(p.s, self->s.fd));
	ASSERT_EQ(0, sock_mode(p.s, PMSKB_RX_DESC));
	ASSERT_EQ(0, setsockopt(p.s, IPPROTO_IPV6, IPV6_RECVPATHMTU, &on, sizeof(on)));
	ASSERT_EQ(0, setsockopt(p.s, IPPROTO_IPV6, IPV6_DONTFRAG, &on, sizeof(on)));
	ASSERT_EQ(4, send(p.c, "data", 4, 0));
	usleep(50000);
	EXPECT_EQ(EMSGSIZE, ERRNO(send(p.s, buf, sizeof(buf), 0)));
	msg.msg_name = &name;
	msg.msg_namelen = sizeof(name);
	ASSERT_EQ(0, recvmsg(p.s, &msg, MSG_DONTWAIT));
	for (cmsg = CMSG_FIRSTHDR(&msg); cmsg; cmsg = CMSG_NXTHDR(&msg, cmsg)) {
		EXPECT_NE(SOL_PMSKB, cmsg->cmsg_level);
		told |= cmsg->cmsg_level == IPPROTO_IPV6 && cmsg->cmsg_type == IPV6_PATHMTU;
	}
	EXPECT_TRUE(told);
	ASSERT_EQ(4, get(p.s, &g, MSG_DONTWAIT));
	EXPECT_EQ(0, memcmp(self->s.map + g.d[0].offset, "data", 4));
	pair_close(&p);
}

/* Two attached sockets of a multicast group; the one that sends to it is the answer. */
static int join(struct __test_metadata *_metadata, const struct store *store, int s[2], struct sockaddr_in *group)
{
	struct ip_mreqn member = { .imr_ifindex = 1 };
	socklen_t len = sizeof(*group);
	int c, one = 1, i;

	*group = (struct sockaddr_in) { .sin_family = AF_INET };
	inet_pton(AF_INET, "239.7.7.7", &group->sin_addr);
	inet_pton(AF_INET, "127.0.0.1", &member.imr_address);
	member.imr_multiaddr = group->sin_addr;
	for (i = 0; i < 2; i++) {
		s[i] = socket(AF_INET, SOCK_DGRAM, 0);
		EXPECT_EQ(0, setsockopt(s[i], SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one)));
		EXPECT_EQ(0, bind(s[i], (void *)group, sizeof(*group)));
		EXPECT_EQ(0, getsockname(s[i], (void *)group, &len));
		EXPECT_EQ(0, setsockopt(s[i], IPPROTO_IP, IP_ADD_MEMBERSHIP, &member, sizeof(member)));
		EXPECT_EQ(0, sock_attach_ioctl(s[i], store->fd));
	}
	c = socket(AF_INET, SOCK_DGRAM, 0);
	EXPECT_EQ(0, setsockopt(c, IPPROTO_IP, IP_MULTICAST_IF, &member, sizeof(member)));
	return c;
}

TEST_F(dgram, a_datagram_for_several_sockets_reaches_each)
{
	struct sockaddr_in group;
	int s[2], c, i;
	struct got g;

	c = join(_metadata, &self->s, s, &group);
	for (i = 0; i < 2; i++) {
		ASSERT_EQ(0, sock_mode(s[i], PMSKB_RX_DESC));
		timeout_set(s[i], 5000 * slowness());
	}
	ASSERT_EQ(8, sendto(c, "everyone", 8, 0, (void *)&group, sizeof(group)));
	for (i = 0; i < 2; i++) {
		ASSERT_EQ(8, get(s[i], &g, 0));
		ASSERT_EQ(1, g.n);
		EXPECT_EQ(0, memcmp(self->s.map + g.d[0].offset, "everyone", 8));
		EXPECT_TRUE(g.d[0].flags & PMSKB_DESC_COPIED);
	}
	close(s[0]);
	close(s[1]);
	close(c);
}

TEST_F(dgram, with_auto_persist_what_is_for_several_sockets_has_a_record_of_each)
{
	struct sockaddr_in group;
	struct pair p = { -1, -1 };
	socklen_t len;
	int s[2], c, i;

	c = join(_metadata, &self->s, s, &group);
	for (i = 0; i < 2; i++) {
		ASSERT_EQ(0, set_auto(s[i], 1));
	}
	usleep(50000);
	ASSERT_EQ(8, sendto(c, "everyone", 8, 0, (void *)&group, sizeof(group)));
	/* Nobody reads; and no hook has seen whose they are. */
	for (i = 0; i < 2; i++)
		EXPECT_TRUE(comes_to(s[i], 8));
	len = sizeof(p.from);
	ASSERT_EQ(0, getsockname(c, (void *)&p.from, &len));
	EXPECT_EQ(2, log_of(_metadata, &self->s, &p)->nr);
	close(s[0]);
	close(s[1]);
	close(c);
}

/* With `merged`, five of them arrive as one packet and are received as one. */
static void out_of_frames(struct __test_metadata *_metadata, struct store *s, const struct net *net, bool merged)
{
	enum { NR = 200, LEN = 1400, MERGED = 5, SINGLE = 8 };
	static uint8_t buf[LEN * MERGED];
	static size_t len[NR];
	static int fds[64];
	size_t size = merged ? sizeof(buf) : LEN;
	uint64_t pos, at, all = (uint64_t)NR * LEN;
	int n, err = 0, k, t, on = 1, single[SINGLE], parts = 0;
	struct pair p;

	ASSERT_EQ(0, store_unlimited(s));
	for (k = 0; k < SINGLE; k++) {
		struct pmskb_alloc a = { .len = PMSKB_FRAME_SIZE };

		ASSERT_EQ(0, ioctl(s->fd, PMSKB_IOC_ALLOC, &a));
		single[k] = a.fd;
	}
	ASSERT_EQ(0, pair_make(&p, net, true));
	ASSERT_EQ(0, sock_attach_ioctl(p.s, s->fd));
	if (merged) {
		ASSERT_EQ(0, setsockopt(p.s, SOL_UDP, UDP_GRO, &on, sizeof(on)));
		ASSERT_EQ(0, setsockopt(p.c, SOL_UDP, UDP_SEGMENT, &(int) { LEN }, sizeof(int)));
	}
	ASSERT_EQ(0, set_auto(p.s, 1));
	for (k = 0; k < NR; k++)
		len[k] = LEN;
	/* The log has its first frames. */
	fill(buf, size, 78, 0);
	ASSERT_EQ(size, send(p.c, buf, size, 0));
	ASSERT_EQ(size, recv(p.s, buf, size, 0));
	n = store_scarce(s, 30, fds, ARRAY_LEN(fds));
	ASSERT_LT(0, n);
	for (at = size; at < all; at += size) {
		fill(buf, size, 78, at);
		ASSERT_EQ(size, send(p.c, buf, size, 0));
	}
	/* The work item tries as well, again and again. */
	for (pos = size; pos < all; pos += size) {
		if (recv(p.s, buf, size, MSG_DONTWAIT) != (ssize_t)size) {
			err = errno;
			break;
		}
		EXPECT_EQ(-1, differs(buf, size, 78, pos));
		EXPECT_LE(pos + size, logged_bytes(p.s));
	}
	EXPECT_GT(all, pos) TH_LOG("there were frames for all of it");
	EXPECT_TRUE(err == ENOBUFS || err == ENOSPC) TH_LOG("%s", strerror(err));
	for (k = 0; k < 20; k++)
		EXPECT_GT(0, recv(p.s, buf, size, MSG_DONTWAIT));
	/* A frame at a time: of a packet's datagrams there is room for two records. */
	for (k = 0; k < SINGLE; k++) {
		close(single[k]);
		for (t = 0; t < 20; t++) {
			if (recv(p.s, buf, size, MSG_DONTWAIT) == (ssize_t)size) {
				EXPECT_EQ(-1, differs(buf, size, 78, pos));
				pos += size;
			}
			parts += logged_bytes(p.s) % size != 0;
			usleep(2000);
		}
	}
	EXPECT_TRUE(!merged || parts) TH_LOG("all of a packet or nothing each time");
	while (n)
		close(fds[--n]);
	for (k = 0; pos < all;) {
		ssize_t m = recv(p.s, buf, size, 0);

		/* Those that were closed are not free at once. */
		if (m < 0 && (errno == ENOBUFS || errno == ENOSPC) && k++ < 1000 * slowness()) {
			usleep(1000);
			continue;
		}
		ASSERT_EQ(size, m) TH_LOG("%s", strerror(errno));
		EXPECT_EQ(-1, differs(buf, size, 78, pos));
		pos += size;
	}
	expect_log(_metadata, s, &p, len, NR, 78);
	pair_close(&p);
}

TEST_F_TIMEOUT(dgram, with_auto_persist_out_of_frames_nothing_is_given_out_and_nothing_lost, 120)
{
	out_of_frames(_metadata, &self->s, &self->net, false);
}

TEST_F_TIMEOUT(dgram, with_auto_persist_out_of_frames_none_of_a_packet_has_two_records, 120)
{
	out_of_frames(_metadata, &self->s, &self->net, true);
}

/* Two frames of small datagrams, that is many notes, in one that is not placed. */
TEST_F(dgram, what_is_sent_from_the_store_has_room_whatever_its_frames_have_held)
{
	enum { NR = 80, LEN = 113, SENT = 2 * PMSKB_FRAME_SIZE, BEFORE = 40 };
	static uint8_t buf[LEN], want[SENT], much[4000];
	struct pmskb_store_info info;
	struct pmskb_sock_info si;
	struct pair small, p;
	off_t off;
	uint64_t placed;
	uint32_t sum;
	struct got g;
	int i;

	ASSERT_EQ(0, pair_make(&small, &self->net, true));
	ASSERT_EQ(0, sock_attach_ioctl(small.s, self->s.fd));
	ASSERT_EQ(0, sock_mode(small.s, PMSKB_RX_DESC));
	for (i = 0; i < NR; i++) {
		fill(buf, LEN, 81, (uint64_t)i * LEN);
		ASSERT_EQ(LEN, send(small.c, buf, LEN, 0));
	}
	ASSERT_EQ(LEN, get(small.s, &g, MSG_PEEK));
	ASSERT_EQ(0, g.d[0].offset % PMSKB_FRAME_SIZE);
	off = g.d[0].offset;
	ASSERT_EQ(SENT, pread(self->s.fd, want, SENT, off));
	EXPECT_EQ(-1, differs(want, 36 * LEN, 81, 0));
	EXPECT_EQ(-1, differs(want + PMSKB_FRAME_SIZE, 36 * LEN, 81, 36 * LEN));
	ASSERT_EQ(0, release(small.s, &g));

	ASSERT_EQ(0, pair_make(&p, &self->net, true));
	ASSERT_EQ(0, sock_attach_ioctl(p.s, self->s.fd));
	ASSERT_EQ(0, sock_mode(p.s, PMSKB_RX_DESC));
	/* So that it is not placed. */
	ASSERT_EQ(0, sock_quota(p.s, 32, 1000));
	for (i = 0; i < BEFORE; i++)
		ASSERT_EQ(sizeof(much), send(p.c, much, sizeof(much), 0));
	ASSERT_EQ(0, sock_info(p.s, &si));
	placed = si.counters.placed;
	ASSERT_EQ(SENT, sendfile(p.c, self->s.fd, &off, SENT));
	ASSERT_EQ(0, sock_info(p.s, &si));
	EXPECT_EQ(placed, si.counters.placed);
	for (i = 0; i < BEFORE; i++) {
		ASSERT_EQ(sizeof(much), get(p.s, &g, 0));
		ASSERT_EQ(0, release(p.s, &g));
	}
	ASSERT_EQ(SENT, get(p.s, &g, 0));
	EXPECT_GE(36, g.n);
	for (i = 0, sum = 0; i < g.n; sum += g.d[i++].len) {
		ASSERT_GE(SENT, sum + g.d[i].len);
		EXPECT_EQ(0, memcmp(self->s.map + g.d[i].offset, want + sum, g.d[i].len));
	}
	EXPECT_EQ(SENT, sum);
	ASSERT_EQ(0, release(p.s, &g));
	pair_close(&small);
	pair_close(&p);
	EXPECT_EQ(0, store_back(&self->s, 10000, &info));
}

TEST_F(dgram, each_socket_of_a_reuseport_group_has_its_own)
{
	enum { NR = 3, SENDS = 300 };
	/* A selection that nobody can foresee: who asks twice hears different answers. */
	struct sock_filter code[] = {
		{ BPF_LD | BPF_W | BPF_ABS, 0, 0, SKF_AD_OFF + SKF_AD_RANDOM },
		{ BPF_ALU | BPF_MOD | BPF_K, 0, 0, NR },
		{ BPF_RET | BPF_A, 0, 0, 0 },
	};
	struct sock_fprog prog = { ARRAY_LEN(code), code };
	struct sockaddr_storage addr;
	struct pmskb_sock_info info;
	int s[NR], c, one = 1, i, all = 0;
	socklen_t len;
	struct got g;

	s[0] = net_listen(&self->net, &addr, &len);
	ASSERT_LE(0, s[0]);
	close(s[0]);
	for (i = 0; i < NR; i++) {
		s[i] = socket(AF_INET, SOCK_DGRAM, 0);
		ASSERT_EQ(0, setsockopt(s[i], SOL_SOCKET, SO_REUSEPORT, &one, sizeof(one)));
		ASSERT_EQ(0, bind(s[i], (void *)&addr, len));
		ASSERT_EQ(0, sock_attach_ioctl(s[i], self->s.fd));
		ASSERT_EQ(0, sock_mode(s[i], PMSKB_RX_DESC));
	}
	ASSERT_EQ(0, setsockopt(s[0], SOL_SOCKET, SO_ATTACH_REUSEPORT_CBPF, &prog, sizeof(prog)));
	c = net_connect(&self->net, &addr, len);
	ASSERT_LE(0, c);
	for (i = 0; i < SENDS; i++)
		ASSERT_EQ(4, send(c, "each", 4, 0));
	usleep(100000);
	for (i = 0; i < NR; i++) {
		int mine = 0;

		while (get(s[i], &g, MSG_DONTWAIT) == 4)
			mine++;
		ASSERT_EQ(0, sock_info(s[i], &info));
		EXPECT_LT(0, mine);
		EXPECT_EQ(mine, info.counters.placed) TH_LOG("placed as another's");
		EXPECT_EQ(0, info.counters.copied_bytes);
		all += mine;
		close(s[i]);
	}
	EXPECT_EQ(SENDS, all);
	close(c);
}

TEST_F(dgram, a_plain_socket_beside_is_left_alone)
{
	struct pmskb_sock_info info;
	struct pair ours, plain;
	char buf[10];

	ASSERT_EQ(0, pair_make(&ours, &self->net, false));
	ASSERT_EQ(0, pair_make(&plain, &self->net, false));
	ASSERT_EQ(0, sock_attach_ioctl(ours.s, self->s.fd));
	ASSERT_EQ(5, send(plain.c, "plain", 5, 0));
	ASSERT_EQ(5, recv(plain.s, buf, sizeof(buf), 0));
	ASSERT_EQ(4, send(ours.c, "ours", 4, 0));
	ASSERT_EQ(4, recv(ours.s, buf, sizeof(buf), 0));
	ASSERT_EQ(0, sock_info(ours.s, &info));
	EXPECT_EQ(1, info.counters.placed);
	pair_close(&ours);
	pair_close(&plain);
}

TEST_F_TIMEOUT(dgram, out_of_frames_nothing_is_lost, 120)
{
	uint64_t len = self->s.info.region_len;
	static struct pmskb_token_range all = { 0, ~0U };
	static uint8_t buf[60000];
	struct pmskb_sock_info info;
	int full = 0, i, copied = 0;
	struct pair p;
	struct got g;

	ASSERT_EQ(0, store_close(&self->s));
	/* At most 12 MiB of data frames. */
	ASSERT_EQ(0, store_make(&self->s, DEV_PMEM, 0, ((len >> 20) - 12) << 20));
	ASSERT_EQ(0, store_unlimited(&self->s));
	ASSERT_EQ(0, pair_make(&p, &self->net, true));
	ASSERT_EQ(0, sock_attach_ioctl(p.s, self->s.fd));
	ASSERT_EQ(0, sock_mode(p.s, PMSKB_RX_DESC));
	for (i = 0; i < 220; i++) {
		fill(buf, sizeof(buf), 95, i * sizeof(buf));
		ASSERT_EQ(sizeof(buf), send(p.c, buf, sizeof(buf), 0));
		while (get(p.s, &g, 0) == -ENOBUFS) {
			full++;
			ASSERT_EQ(0, sock_info(p.s, &info));
			ASSERT_LT(0, info.tokens) TH_LOG("no frames, and none are held");
			ASSERT_LT(0, setsockopt(p.s, SOL_PMSKB, PMSKB_RELEASE, &all, sizeof(all)));
		}
		check(_metadata, &self->s, &g, sizeof(buf), 95, i * sizeof(buf));
		copied += g.n && g.d[0].flags & PMSKB_DESC_COPIED;
	}
	EXPECT_LE(1, full) TH_LOG("13 MB were held in 12 MiB");
	EXPECT_LE(1, copied);
	ASSERT_EQ(0, sock_info(p.s, &info));
	EXPECT_LT(0, info.counters.unplaced[PMSKB_UNPLACED_NO_FRAME]);
	pair_close(&p);
}

TEST_F_TIMEOUT(dgram, unbinding_the_driver_under_traffic_ends_in_eio, 120)
{
	char driver[PATH_MAX], name[PATH_MAX], buf[2000];
	struct pair p[3];
	pid_t sender[3], reader;
	struct pmskb_sock_info info;
	struct got g, held;
	struct pmskb_op op;
	struct pmskb_ext e;
	int i, k;

	if (driver_of(DEV_PMEM, driver, name, PATH_MAX))
		SKIP(return, "cannot find the device's driver");
	for (i = 0; i < 3; i++) {
		ASSERT_EQ(0, pair_make(&p[i], &self->net, i & 1));
		ASSERT_EQ(0, sock_attach_ioctl(p[i].s, self->s.fd));
		ASSERT_EQ(0, sock_mode(p[i].s, i < 2 ? PMSKB_RX_DESC : PMSKB_RX_BYTES));
	}
	/* Tokens held, and datagrams unread, of the first; readers of the others. */
	ASSERT_EQ(4, send(p[0].c, "held", 4, 0));
	ASSERT_EQ(4, get(p[0].s, &held, 0));
	reader = fork();
	if (!reader) {
		while (get(p[1].s, &g, 0) >= 0)
			release(p[1].s, &g);
		_exit(g.len == -EIO ? 0 : 1);
	}
	for (i = 0; i < 3; i++) {
		sender[i] = fork();
		if (!sender[i])
			for (;;)
				send(p[i].c, buf, sizeof(buf), 0);
	}
	for (i = 0; i < 3; i++) {
		for (k = 0; k < 300 * slowness(); k++) {
			ASSERT_EQ(0, sock_info(p[i].s, &info));
			if (info.counters.placed > 20)
				break;
			usleep(10000);
		}
		EXPECT_LT(20, info.counters.placed);
	}
	ASSERT_EQ(0, dev_unbind(driver, name));
	for (i = 0; i < 3; i++) {
		kill(sender[i], SIGKILL);
		waitpid(sender[i], NULL, 0);
	}
	ASSERT_EQ(reader, waitpid(reader, &k, 0));
	EXPECT_EQ(0, k) TH_LOG("the reader did not end with EIO");
	/* Descriptors are EIO from now on; nothing is held. */
	for (i = 0; i < 3; i++)
		EXPECT_EQ(-EIO, get(p[0].s, &g, MSG_DONTWAIT));
	EXPECT_EQ(-EIO, desc_release(p[0].s, held.d[0].token, 1));
	e = ext_of(&held.d[0]);
	op = op_put("k", 1, &e, 1);
	EXPECT_EQ(CALL_FAILED(-EIO), persist_one(p[0].s, &op, NULL));
	ASSERT_EQ(0, sock_info(p[0].s, &info));
	EXPECT_EQ(~0U, info.store);
	EXPECT_EQ(0, info.tokens);
	/* Bytes go on, after an error that tells of those that are lost. */
	EXPECT_EQ(EIO, ERRNO(recv(p[2].s, buf, sizeof(buf), MSG_DONTWAIT)));
	while (recv(p[2].s, buf, sizeof(buf), MSG_DONTWAIT) > 0)
		;
	ASSERT_EQ(2, send(p[2].c, "on", 2, 0));
	ASSERT_EQ(2, recv(p[2].s, buf, sizeof(buf), 0));
	for (i = 0; i < 3; i++)
		pair_close(&p[i]);
	k = socket(AF_INET, SOCK_DGRAM, 0);
	EXPECT_EQ(-EIO, sock_attach_ioctl(k, self->s.fd));
	close(k);
	store_close(&self->s);
	ASSERT_EQ(0, dev_bind(DEV_PMEM, driver, name));
	ASSERT_EQ(0, store_open(&self->s, DEV_PMEM));
}

TEST_HARNESS_MAIN
