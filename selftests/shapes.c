// SPDX-License-Identifier: GPL-2.0
/*
 * Promises about segments that no well-behaved TCP sends: out of order, overlapping, in
 * fragments, with odd headers, after the window, with wrong checksums. The peer is this
 * program itself, behind a tun device in a network namespace of its own: a packet that is
 * written to the device has been through the whole stack when write() returns, so nothing
 * here waits for a clock.
 *
 * Each shape is sent four times: to a plain socket, to an attached one that receives
 * bytes, to an attached one that receives descriptors, and to one with auto-persist. What is
 * received, with which errno and events, and what TCP answers is written down as text; the
 * plain socket's is what is right. Of the last one, the log must have each byte once.
 */
#include "common.h"
#include "media.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/if_tun.h>
#include <linux/sockios.h>
#include <linux/virtio_net.h>
#include <net/if.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sched.h>
#include <stdarg.h>
#include <sys/ioctl.h>

#include "harness.h"

#define SERVER4 "10.77.3.1"
#define PEER4 "10.77.3.2"
#define SERVER6 "fd77:3::1"
#define PEER6 "fd77:3::2"
#define TUN "pmskb-t"

enum { FIN = 1, SYN = 2, RST = 4, PSH = 8, ACK = 16, URG = 32 };
enum { MAX_STREAM = 1 << 20, MAX_TOKENS = 16384, MAX_RECV = 4096, MAX_TEXT = 1 << 16 };

enum mode { PLAIN, BYTES, DESC, AUTO, MODES };
static const char *const modes[] = { "plain", "bytes", "desc", "auto" };

FIXTURE(shapes) {
	struct store s;
	int tun;
};

FIXTURE_VARIANT(shapes) {
	int family;
	enum dev dev;
	uint32_t flags;
	/* The device says that checksums are to be filled in yet, and merges large segments. */
	bool partial;
};

FIXTURE_VARIANT_ADD(shapes, v4_pmem) { AF_INET, DEV_PMEM, 0, false };
FIXTURE_VARIANT_ADD(shapes, v6_dax) { AF_INET6, DEV_DAX, 0, false };
FIXTURE_VARIANT_ADD(shapes, v4_partial) { AF_INET, DEV_PMEM, PMSKB_FORMAT_HEADS_DRAM, true };

/* One end of a connection that is made by hand, and the other end's sockets. */
struct peer {
	const char *name;
	enum mode mode;
	int family, tun;
	const struct store *store;
	bool partial;
	bool late;		/* attach the accepted socket, not the listener */
	bool quiet;		/* nothing is written down */
	bool gaps;		/* a byte is not in the stream that is received */
	bool fold;		/* upper case is as good as lower case */
	uint32_t seed;
	int l, s;		/* listener, accepted socket */
	uint16_t sport, dport;	/* the peer's, the socket's */
	uint32_t iss;		/* the number before that of the stream's first byte */
	uint32_t next;		/* expected from the socket */
	uint32_t irs;
	/* What the socket's TCP has said last. */
	uint32_t acked;		/* bytes of the stream, and its end */
	uint32_t window;
	unsigned int replies;
	bool rst, fin;
	uint32_t sack[8];
	unsigned int sacks;
	uint32_t stamp;		/* its timestamp, to be echoed */
	/* What was received. */
	uint8_t *got;
	size_t have;
	struct pmskb_desc *d;	/* whose tokens are held */
	size_t *at;		/* where in got */
	struct pmskb_desc last;
	unsigned int held;
	char *text;
	size_t written;
};

static void __attribute__((format(printf, 2, 3))) say(struct peer *p, const char *fmt, ...)
{
	va_list ap;

	if (p->quiet)
		return;
	va_start(ap, fmt);
	p->written += vsnprintf(p->text + p->written, MAX_TEXT - p->written, fmt, ap);
	va_end(ap);
	if (p->written >= MAX_TEXT)
		p->written = MAX_TEXT - 1;
}

/* The stream: lower case; what is sent in its place, upper case. */
static uint8_t letter(size_t at, bool other)
{
	return (other ? 'A' : 'a') + at % 23;
}

/* ---- packets ---- */

struct seg {
	uint32_t at, len;	/* in the stream */
	uint8_t flags;		/* besides ACK, which is left out with SYN alone, and PSH */
	bool other;		/* other bytes than the stream's */
	bool bad;		/* a wrong checksum */
	uint16_t urgent;
	const uint8_t *opt;	/* of TCP, padded */
	uint8_t opt_len;
	const uint8_t *ip;	/* options of IPv4; extension headers, the first is an ip_next */
	uint8_t ip_len, ip_next;
	/* Bytes in a fragment, 0 for none. The last one first, or those at odd places first. */
	uint16_t frag;
	enum { IN_ORDER, LAST_FIRST, ODD_FIRST } order;
	uint8_t inner_len;	/* of the extension headers, those that are fragmented too */
};

static uint32_t sum_add(uint32_t sum, const uint8_t *p, size_t len)
{
	size_t i;

	for (i = 0; i < len; i++)
		sum += i & 1 ? p[i] : (uint32_t)p[i] << 8;
	while (sum >> 16)
		sum = (sum & 0xffff) + (sum >> 16);
	return sum;
}

static void put_be16(uint8_t *p, uint16_t v)
{
	p[0] = v >> 8;
	p[1] = v;
}

static void put_be32(uint8_t *p, uint32_t v)
{
	put_be16(p, v >> 16);
	put_be16(p + 2, v);
}

static uint16_t get_be16(const uint8_t *p)
{
	return p[0] << 8 | p[1];
}

static uint32_t get_be32(const uint8_t *p)
{
	return (uint32_t)get_be16(p) << 16 | get_be16(p + 2);
}

static void addresses(int family, uint8_t *peer, uint8_t *server)
{
	inet_pton(family, family == AF_INET ? PEER4 : PEER6, peer);
	inet_pton(family, family == AF_INET ? SERVER4 : SERVER6, server);
}

/* Sends len bytes of a transport header and what follows, as one packet or in fragments. */
static void emit(struct __test_metadata *_metadata, struct peer *p, const struct seg *g,
		 const uint8_t *body, size_t len)
{
	static uint8_t packet[sizeof(struct virtio_net_hdr) + 70000];
	static uint32_t id = 1;
	struct virtio_net_hdr *v = (void *)packet;
	size_t front = p->partial ? sizeof(*v) : 0;
	size_t outer = g->ip_len - g->inner_len, piece = g->frag ?: len, nr, k;
	bool v4 = p->family == AF_INET;
	uint8_t a[2][16];

	addresses(p->family, a[0], a[1]);
	id++;
	nr = (len + piece - 1) / piece;
	for (k = 0; k < nr; k++) {
		size_t n = k, off, left, head;
		uint8_t *h = packet + front;

		if (g->order == LAST_FIRST)
			n = nr - 1 - k;
		else if (g->order == ODD_FIRST)
			n = k < nr / 2 ? 2 * k + 1 : 2 * (k - nr / 2);
		off = n * piece;
		left = len - off < piece ? len - off : piece;
		memset(packet, 0, front + 128);
		if (v4) {
			head = 20 + g->ip_len;
			h[0] = 0x40 | head / 4;
			put_be16(h + 2, head + left);
			put_be16(h + 4, id);
			put_be16(h + 6, off / 8 | (off + left < len ? 0x2000 : 0));
			h[8] = 64;
			h[9] = IPPROTO_TCP;
			memcpy(h + 12, a[0], 4);
			memcpy(h + 16, a[1], 4);
			if (g->ip_len)
				memcpy(h + 20, g->ip, g->ip_len);
			put_be16(h + 10, ~sum_add(0, h, head));
		} else {
			uint8_t first = g->ip_len ? g->ip_next : IPPROTO_TCP;

			head = 40 + outer;
			h[0] = 0x60;
			h[6] = first;
			h[7] = 64;
			memcpy(h + 8, a[0], 16);
			memcpy(h + 24, a[1], 16);
			if (outer)
				memcpy(h + 40, g->ip, outer);
			if (g->frag) {
				uint8_t *to = outer ? h + 40 : h + 6, *f = h + head;

				/* The last of those before it says what comes next. */
				if (outer) {
					while (to + (to[1] + 1) * 8 < f)
						to += (to[1] + 1) * 8;
				}
				f[0] = *to;
				*to = IPPROTO_FRAGMENT;
				put_be16(f + 2, off | (off + left < len));
				put_be32(f + 4, id);
				head += 8;
			}
			put_be16(h + 4, head - 40 + left);
		}
		memcpy(h + head, body + off, left);
		if (front && !g->frag && !g->bad) {
			v->flags = VIRTIO_NET_HDR_F_NEEDS_CSUM;
			v->csum_start = head + g->inner_len;
			v->csum_offset = 16;
			/* As a device that has merged them. */
			if (g->len > 300 && !g->ip_len && !(g->flags & (SYN | URG | RST))) {
				v->gso_type = v4 ? VIRTIO_NET_HDR_GSO_TCPV4 : VIRTIO_NET_HDR_GSO_TCPV6;
				v->gso_size = 200;
				v->hdr_len = head + 20 + g->opt_len;
			}
		}
		ASSERT_EQ(front + head + left, write(p->tun, packet, front + head + left))
			TH_LOG("%s", strerror(errno));
	}
}

static void segment(struct __test_metadata *_metadata, struct peer *p, struct seg g)
{
	static uint8_t body[66000];
	uint8_t pseudo[36], a[2][16], flags = g.flags;
	size_t inner = p->family == AF_INET ? 0 : g.inner_len, head, n, i;
	size_t alen = p->family == AF_INET ? 4 : 16;
	uint8_t *t = body + inner;
	uint32_t sum;

	if (flags != SYN && !(flags & 0x80))
		flags |= ACK;
	flags &= 0x7f;
	head = 20 + g.opt_len;
	n = head + g.len;
	if (inner)
		memcpy(body, g.ip + g.ip_len - inner, inner);
	memset(t, 0, 20);
	put_be16(t, p->sport);
	put_be16(t + 2, p->dport);
	put_be32(t + 4, p->iss + g.at + (flags & SYN ? 0 : 1));
	if (flags & ACK)
		put_be32(t + 8, p->next);
	t[12] = head / 4 << 4;
	t[13] = flags | (g.len ? PSH : 0);
	put_be16(t + 14, 60000);
	put_be16(t + 18, g.urgent);
	if (g.opt_len)
		memcpy(t + 20, g.opt, g.opt_len);
	for (i = 0; i < g.len; i++)
		t[head + i] = letter(g.at + i, g.other);
	addresses(p->family, a[0], a[1]);
	sum = sum_add(0, a[0], alen);
	sum = sum_add(sum, a[1], alen);
	memset(pseudo, 0, 8);
	put_be32(pseudo, n);
	pseudo[7] = IPPROTO_TCP;
	sum = sum_add(sum, pseudo, 8);
	/* What a device is to fill in yet begins with the pseudo header's. */
	if (p->partial && !g.frag && !g.bad)
		put_be16(t + 16, sum);
	else
		put_be16(t + 16, ~sum_add(sum, t, n) + (g.bad ? 0x0101 : 0));
	emit(_metadata, p, &g, body, inner + n);
	if (p->mode == AUTO && p->s >= 0) {
		struct pmskb_sock_info info;

		/* Whoever persists in the background has the socket locked, and what came waits for that. */
		sock_info(p->s, &info);
	}
}

/* Reads what the stack has sent to the peer. */
static void listen_to(struct peer *p)
{
	size_t front = p->partial ? sizeof(struct virtio_net_hdr) : 0;
	static uint8_t packet[70000];
	ssize_t len;

	while ((len = read(p->tun, packet, sizeof(packet))) > 0) {
		const uint8_t *h = packet + front, *t, *o;
		size_t total = len - front, head;
		uint32_t payload;

		if (h[0] >> 4 == 4) {
			if (h[9] != IPPROTO_TCP)
				continue;
			head = (h[0] & 15) * 4;
			total = get_be16(h + 2);
		} else {
			if (h[6] != IPPROTO_TCP)
				continue;
			head = 40;
			total = 40 + get_be16(h + 4);
		}
		t = h + head;
		if (get_be16(t) != p->dport || get_be16(t + 2) != p->sport)
			continue;
		p->replies++;
		payload = total - head - (t[12] >> 4) * 4;
		if (t[13] & RST) {
			p->rst = true;
			continue;
		}
		if (t[13] & SYN)
			p->irs = get_be32(t + 4);
		if (t[13] & FIN)
			p->fin = true;
		if (t[13] & ACK)
			p->acked = get_be32(t + 8) - p->iss - 1;
		p->window = get_be16(t + 14);
		payload += (t[13] & SYN ? 1 : 0) + (t[13] & FIN ? 1 : 0);
		if (payload)
			p->next = get_be32(t + 4) + payload;
		p->sacks = 0;
		for (o = t + 20; o < t + (t[12] >> 4) * 4 && o[0]; o += o[0] == 1 ? 1 : o[1]) {
			unsigned int k;

			if (o[0] == 1)
				continue;
			if (o[1] < 2)
				break;
			if (o[0] == 8)
				p->stamp = get_be32(o + 2);
			for (k = 2; o[0] == 5 && k + 8 <= o[1]; k += 8) {
				p->sack[p->sacks++] = get_be32(o + k) - p->iss - 1;
				p->sack[p->sacks++] = get_be32(o + k + 4) - p->iss - 1;
			}
		}
	}
}

/*
 * Waits until there were so many replies. They come at once, unless another CPU is sending
 * something on the device at that moment.
 */
static bool hear(struct peer *p, unsigned int replies)
{
	struct pollfd f = { p->tun, POLLIN, 0 };
	int k;

	for (k = 0; k < 500 * slowness(); k++) {
		listen_to(p);
		if (p->replies >= replies)
			return true;
		poll(&f, 1, 10);
	}
	return false;
}

/* ---- the socket's side ---- */

static int attached(struct peer *p, int fd)
{
	uint32_t on = 1;
	int err;

	if (p->mode == PLAIN)
		return 0;
	err = sock_attach_ioctl(fd, p->store->fd);
	if (!err && p->mode == AUTO && setsockopt(fd, SOL_PMSKB, PMSKB_AUTO_PERSIST, &on, sizeof(on)))
		err = -errno;
	return err;
}

/* A listening socket, attached if it is to be. */
static void serve(struct __test_metadata *_metadata, struct peer *p, int rcvbuf)
{
	struct sockaddr_storage addr = { .ss_family = p->family };
	struct sockaddr_in6 *a6 = (void *)&addr;
	struct sockaddr_in *a4 = (void *)&addr;
	socklen_t len = p->family == AF_INET ? sizeof(*a4) : sizeof(*a6);
	static uint16_t port = 2000;

	inet_pton(p->family, p->family == AF_INET ? SERVER4 : SERVER6,
		  p->family == AF_INET ? (void *)&a4->sin_addr : (void *)&a6->sin6_addr);
	p->l = socket(p->family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	ASSERT_LE(0, p->l);
	if (rcvbuf) {
		ASSERT_EQ(0, setsockopt(p->l, SOL_SOCKET, SO_RCVBUF, &rcvbuf, sizeof(rcvbuf)));
	}
	ASSERT_EQ(0, bind(p->l, (void *)&addr, len));
	ASSERT_EQ(0, listen(p->l, 8));
	ASSERT_EQ(0, getsockname(p->l, (void *)&addr, &len));
	if (!p->late) {
		ASSERT_EQ(0, attached(p, p->l));
	}
	p->dport = ntohs(a4->sin_port);
	p->sport = port++;
	p->iss = 0xfffffe00;
}

/* Options of a SYN: MSS 1400, selective acknowledgements. */
static const uint8_t of_syn[] = { 2, 4, 1400 >> 8, 1400 & 255, 1, 1, 4, 2 };

static void syn(struct __test_metadata *_metadata, struct peer *p)
{
	segment(_metadata, p, (struct seg){ .flags = SYN, .opt = of_syn, .opt_len = sizeof(of_syn) });
	ASSERT_TRUE(hear(p, 1)) TH_LOG("%s: SYN is not answered", p->name);
	ASSERT_FALSE(p->rst);
}

static void take(struct __test_metadata *_metadata, struct peer *p)
{
	p->s = accept4(p->l, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
	ASSERT_LE(0, p->s) TH_LOG("%s: %s", p->name, strerror(errno));
	if (p->late) {
		ASSERT_EQ(0, attached(p, p->s));
	}
	if (p->mode == DESC) {
		ASSERT_EQ(0, sock_mode(p->s, PMSKB_RX_DESC));
	}
}

static void establish(struct __test_metadata *_metadata, struct peer *p)
{
	serve(_metadata, p, 0);
	syn(_metadata, p);
	segment(_metadata, p, (struct seg){});
	take(_metadata, p);
}

static uint32_t hash(const uint8_t *b, size_t len)
{
	uint32_t h = 2166136261;

	while (len--)
		h = (h ^ *b++) * 16777619;
	return h;
}

/* Checks descriptors of the stream from where got ends, and appends their bytes to it. */
static size_t described(struct __test_metadata *_metadata, struct peer *p, struct msghdr *msg)
{
	struct pmskb_desc last = p->last;
	size_t before = p->have;
	struct cmsghdr *c;

	for (c = CMSG_FIRSTHDR(msg); c; c = CMSG_NXTHDR(msg, c)) {
		struct pmskb_desc d;
		const uint8_t *bytes;

		ASSERT_EQ(PMSKB_CMSG_DESC, c->cmsg_type);
		memcpy(&d, CMSG_DATA(c), sizeof(d));
		ASSERT_LE(p->store->info.data_off, d.offset);
		ASSERT_LE(d.offset + d.len, p->store->map_len);
		ASSERT_GE(MAX_STREAM, p->have + d.len);
		ASSERT_LE((uint64_t)d.pkt_off + d.len, d.pkt_len);
		if (!p->gaps) {
			EXPECT_EQ((uint32_t)(p->iss + 1 + p->have), d.seq);
		}
		/* Of the same packet, it goes on where the last one ended. */
		if (last.len && !(d.flags & PMSKB_DESC_COPIED) && last.time == d.time &&
		    last.pkt_len == d.pkt_len && last.seq + last.len == d.seq) {
			EXPECT_EQ(last.pkt_off + last.len, d.pkt_off)
				TH_LOG("%s: of %u bytes", p->name, d.pkt_len);
		}
		last = d;
		bytes = p->store->map + d.offset;
		if (d.len == d.pkt_len) {
			EXPECT_EQ(rfc1071(bytes, d.len), d.csum)
				TH_LOG("%s: sum of %u bytes, kind %u", p->name, d.len, d.csum_kind);
		}
		memcpy(p->got + p->have, bytes, d.len);
		ASSERT_GT(MAX_TOKENS, p->held);
		p->d[p->held] = d;
		p->at[p->held++] = p->have;
		p->have += d.len;
	}
	p->last = last;
	return p->have - before;
}

/* One receive of up to max bytes, which never waits: as many as there were, or -errno. */
static ssize_t receive(struct __test_metadata *_metadata, struct peer *p, size_t max)
{
	static char control[MAX_RECV * CMSG_SPACE(sizeof(struct pmskb_desc))];
	struct iovec iov = { p->got + p->have, max };
	struct msghdr msg = {
		.msg_iov = &iov,
		.msg_iovlen = 1,
		.msg_control = control,
		.msg_controllen = sizeof(control),
	};
	size_t from = p->have, held = p->held, i;
	ssize_t n;

	ASSERT_GE(MAX_STREAM, p->have + max);
	n = recvmsg(p->s, &msg, MSG_DONTWAIT);
	if (n < 0) {
		say(p, "recv: errno %d\n", errno);
		return -errno;
	}
	if (p->mode == DESC) {
		EXPECT_EQ(n, described(_metadata, p, &msg));
		/* Some go at once. */
		if (p->held > held && p->held % 3 == 0) {
			EXPECT_EQ(0, desc_release(p->s, p->d[p->held - 1].token, 1));
			p->held--;
		}
	} else {
		p->have += n;
	}
	for (i = from; p->fold && i < p->have; i++)
		p->got[i] |= 0x20;
	say(p, "recv: %zd bytes, %08x", n, hash(p->got + from, n));
	if (n <= 60)
		say(p, " %.*s", (int)n, p->got + from);
	say(p, "\n");
	return n;
}

/* Receives all that is there. 0: the end; or -errno. */
static ssize_t receive_all(struct __test_metadata *_metadata, struct peer *p)
{
	ssize_t n;

	do {
		n = receive(_metadata, p, MAX_STREAM - p->have < 65536 ? MAX_STREAM - p->have : 65536);
	} while (n > 0);
	return n;
}

/* Writes down what a program can see of the socket. */
static void look(struct peer *p)
{
	struct pollfd f = { p->s, POLLIN | POLLPRI | POLLRDHUP | POLLOUT, 0 };
	struct tcp_info info = {};
	socklen_t len = sizeof(info);
	int n = -1, mark = -1;

	poll(&f, 1, 0);
	ioctl(p->s, SIOCINQ, &n);
	ioctl(p->s, SIOCATMARK, &mark);
	getsockopt(p->s, IPPROTO_TCP, TCP_INFO, &info, &len);
	say(p, "seen: events %x, %d bytes, mark %d, state %d\n", f.revents, n, mark, info.tcpi_state);
}

/* The stream's first n bytes, and no others, were received. */
static void stream_is(struct __test_metadata *_metadata, struct peer *p, size_t n)
{
	size_t i;

	EXPECT_EQ(n, p->have) TH_LOG("%s: %zu bytes of %zu", p->name, p->have, n);
	for (i = 0; i < n && i < p->have; i++) {
		ASSERT_EQ(letter(i, false), p->got[i]) TH_LOG("%s: at %zu of %zu", p->name, i, n);
	}
}

static void data(struct __test_metadata *_metadata, struct peer *p, uint32_t at, uint32_t len)
{
	segment(_metadata, p, (struct seg){ .at = at, .len = len });
}

/* The same place in the stream, other bytes. */
static void other(struct __test_metadata *_metadata, struct peer *p, uint32_t at, uint32_t len)
{
	segment(_metadata, p, (struct seg){ .at = at, .len = len, .other = true });
}

/*
 * Writes down what TCP has answered. A byte that it has already makes it answer now, and not
 * when a timer says so; it says which one that was (RFC 2883).
 */
static void answers(struct __test_metadata *_metadata, struct peer *p)
{
	uint32_t probe;
	unsigned int k, tries = 0;

	/* Again if it turns out that it had not answered what came before. */
	do {
		listen_to(p);
		probe = p->acked;
		p->sacks = 0;
		if (!p->rst)
			other(_metadata, p, probe - 1, 1);
		listen_to(p);
		while (!p->rst && !(p->sacks && p->sack[0] == probe - 1 && p->sack[1] == probe)) {
			if (!hear(p, p->replies + 1)) {
				say(p, "no answer\n");
				break;
			}
		}
	} while (!p->rst && p->acked != probe && ++tries < 5);
	say(p, "answer: ack %u%s%s", p->acked, p->rst ? " reset" : "", p->fin ? " end" : "");
	for (k = 0; k < p->sacks; k += 2)
		say(p, " %u-%u", p->sack[k], p->sack[k + 1]);
	say(p, "\n");
}

/* The peer's end of the stream, so that what was sent is all there. */
static void finish(struct __test_metadata *_metadata, struct peer *p, uint32_t at)
{
	segment(_metadata, p, (struct seg){ .at = at, .flags = FIN });
	EXPECT_EQ(0, receive_all(_metadata, p)) TH_LOG("%s: no end", p->name);
	look(p);
}

/* All that is held becomes one object: its sum is put together of those of the packets. */
static void put(struct __test_metadata *_metadata, struct peer *p)
{
	struct pmskb_ext *e = malloc(p->held * sizeof(*e));
	struct pmskb_op op = op_put("shape", 5, e, p->held);
	struct pmskb_result res;
	uint8_t *bytes = malloc(MAX_STREAM);
	size_t len = 0;
	unsigned int k;

	exts_of(e, p->d, p->held);
	for (k = 0; k < p->held; k++) {
		memcpy(bytes + len, p->store->map + p->d[k].offset, p->d[k].len);
		len += p->d[k].len;
	}
	op.flags = PMSKB_OP_KEEP;
	EXPECT_LT(0, persist_one(p->s, &op, &res)) TH_LOG("%s", strerror(-res.res));
	EXPECT_EQ(rfc1071(bytes, len), res.csum) TH_LOG("of %u parts, kind %u", p->held, res.csum_kind);
	op = op_delete("shape", 5);
	EXPECT_LT(0, persist_one(p->s, &op, &res));
	free(bytes);
	free(e);
}

/* ---- the log of auto-persist ---- */

struct logged {
	const struct peer *p;
	struct { uint64_t seq; uint32_t at, len; uint8_t *bytes; } record[4096];
	unsigned int nr;
};

static int collect(struct record *r, void *arg)
{
	struct logged *l = arg;

	if (r->remote_port != l->p->sport || r->local_port != l->p->dport || l->nr == ARRAY_LEN(l->record))
		return r->remote_port == l->p->sport;
	l->record[l->nr].seq = r->seq;
	l->record[l->nr].at = r->tcp_seq - l->p->iss - 1;
	l->record[l->nr].len = r->len;
	l->record[l->nr].bytes = r->len ? memcpy(malloc(r->len), r->bytes, r->len) : NULL;
	l->nr++;
	return 0;
}

/* Each byte that was received, once and in order; and then the log is emptied. */
static void log_is_right(struct __test_metadata *_metadata, struct peer *p)
{
	static struct logged l;
	struct pmskb_result res;
	struct pmskb_op op;
	uint64_t last = 0, most = 0;
	uint32_t next;
	unsigned int k, nr;

	l.p = p;
	l.nr = 0;
	ASSERT_LE(0, media_scan(p->store->map, p->store->map_len, collect, &l));
	next = l.nr ? ~0U : 0;
	for (nr = 0; nr < l.nr; nr++) {
		/* The log's order. */
		unsigned int first = l.nr;

		for (k = 0; k < l.nr; k++) {
			if (l.record[k].seq > last && (first == l.nr || l.record[k].seq < l.record[first].seq))
				first = k;
		}
		ASSERT_GT(l.nr, first);
		last = l.record[first].seq;
		if (nr) {
			EXPECT_EQ(next, l.record[first].at) TH_LOG("%s: record %lu", p->name, last);
		}
		next = l.record[first].at + l.record[first].len;
		for (k = 0; !p->fold && !p->gaps && k < l.record[first].len; k++) {
			uint32_t at = l.record[first].at + k;

			if (at < p->have && l.record[first].bytes[k] != p->got[at]) {
				EXPECT_EQ(p->got[at], l.record[first].bytes[k]) TH_LOG("%s: at %u", p->name, at);
				break;
			}
		}
		most = last;
	}
	for (k = 0; k < l.nr; k++)
		free(l.record[k].bytes);
	if (!p->gaps && !p->late) {
		EXPECT_LE(p->have, next) TH_LOG("%s: received and not logged", p->name);
	}
	if (most) {
		op = op_truncate(most);
		ASSERT_EQ(0, submit(p->store->fd, &op, &res, 1));
		ASSERT_LE(0, res.res);
	}
}

static void peer_close(struct __test_metadata *_metadata, struct peer *p)
{
	struct pmskb_sock_info info;
	unsigned int k;

	if (p->s >= 0 && p->mode == DESC) {
		ASSERT_EQ(0, sock_info(p->s, &info));
		EXPECT_EQ(p->held, info.tokens);
		for (k = 0; k < p->held; k++) {
			EXPECT_TRUE(p->fold ||
				    !memcmp(p->store->map + p->d[k].offset, p->got + p->at[k], p->d[k].len))
				TH_LOG("%s: descriptor %u has other bytes now", p->name, k);
		}
		if (p->held)
			put(_metadata, p);
		/* Some go now, the others with the socket. */
		EXPECT_EQ(0, desc_release_all(p->s, p->d, p->held / 2));
	}
	if (p->s >= 0)
		close(p->s);
	if (p->l >= 0)
		close(p->l);
	if (p->mode == AUTO)
		log_is_right(_metadata, p);
	p->s = p->l = -1;
	if (!p->dport)
		return;
	/* Nothing waits for the peer any more. */
	listen_to(p);
	segment(_metadata, p, (struct seg){ .at = p->acked, .flags = RST });
}

typedef void shape(struct __test_metadata *_metadata, struct peer *p);

static void compare(struct __test_metadata *_metadata, const struct peer *like, const char *name, shape *run)
{
	struct pmskb_store_info was, now;
	char *plain = NULL;
	enum mode mode;

	for (mode = PLAIN; mode < MODES; mode++) {
		struct peer p = *like;

		p.name = modes[mode];
		p.mode = mode;
		p.l = p.s = -1;
		p.got = malloc(MAX_STREAM);
		p.d = malloc(MAX_TOKENS * sizeof(struct pmskb_desc));
		p.at = malloc(MAX_TOKENS * sizeof(size_t));
		p.text = calloc(1, MAX_TEXT);
		ASSERT_EQ(0, store_info(like->store, &was));
		run(_metadata, &p);
		peer_close(_metadata, &p);
		ASSERT_EQ(0, store_back(like->store, 5000, &now))
			TH_LOG("%s: %llu sockets, %llu tokens, %llu frames held", p.name, now.sockets,
			       now.tokens, now.frames_held);
		ASSERT_EQ(0, store_drained(like->store, &now)) TH_LOG("%s: %llu frames held", p.name, now.frames_held);
		if (mode == PLAIN) {
			plain = p.text;
			EXPECT_EQ(was.counters.placed, now.counters.placed);
		} else {
			EXPECT_STREQ(plain, p.text) TH_LOG("%s differs from plain", p.name);
			if (name)
				ksft_print_msg("%s %s %s: %s\n", name, like->family == AF_INET ? "v4" : "v6",
					       p.name, counters_since(&now.counters, &was.counters));
			free(p.text);
		}
		free(p.at);
		free(p.d);
		free(p.got);
	}
	free(plain);
}

#define LIKE { .family = variant->family, .tun = self->tun, .store = &self->s, .partial = variant->partial }
#define SHAPE_LATE(name, is_late) \
	static void name(struct __test_metadata *_metadata, struct peer *p); \
	TEST_F(shapes, name) \
	{ \
		struct peer like = LIKE; \
		like.late = is_late; \
		compare(_metadata, &like, #name, name); \
	} \
	static void name(struct __test_metadata *_metadata, struct peer *p)
#define SHAPE(name) SHAPE_LATE(name, false)

/* Addresses, by hand: a shell for each test would take longer than all that it sends. */
static int tun_addresses(void)
{
	struct { struct in6_addr addr; uint32_t prefix; int index; } a6 = { .prefix = 64 };
	struct ifreq ifr = { .ifr_mtu = 9000 };
	struct sockaddr_in *a4 = (void *)&ifr.ifr_addr;
	int s = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	int s6 = socket(AF_INET6, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	struct sockaddr_in6 sin6 = { .sin6_family = AF_INET6 };
	int err, k;

	memcpy(ifr.ifr_name, TUN, sizeof(TUN));
	err = ioctl(s, SIOCSIFMTU, &ifr);
	a4->sin_family = AF_INET;
	inet_pton(AF_INET, SERVER4, &a4->sin_addr);
	err = err ?: ioctl(s, SIOCSIFADDR, &ifr);
	inet_pton(AF_INET, "255.255.255.0", &a4->sin_addr);
	err = err ?: ioctl(s, SIOCSIFNETMASK, &ifr);
	ifr.ifr_flags = IFF_UP | IFF_RUNNING;
	err = err ?: ioctl(s, SIOCSIFFLAGS, &ifr);
	inet_pton(AF_INET6, SERVER6, &a6.addr);
	a6.index = if_nametoindex(TUN);
	err = err ?: ioctl(s6, SIOCSIFADDR, &a6);
	/* A worker makes it usable. */
	sin6.sin6_addr = a6.addr;
	for (k = 0; !err && k < 5000 * slowness() && bind(s6, (void *)&sin6, sizeof(sin6)); k++)
		usleep(1000);
	close(s);
	close(s6);
	return err;
}

static const char *tun_up(int *tun, bool headers)
{
	struct ifreq ifr = { .ifr_flags = IFF_TUN | IFF_NO_PI | (headers ? IFF_VNET_HDR : 0) };

	if (access("/dev/net/tun", F_OK))
		sh("modprobe tun");
	/* Goes with the last process of it, this one, and so does the device. */
	if (unshare(CLONE_NEWNET))
		return "cannot make a network namespace";
	*tun = open("/dev/net/tun", O_RDWR | O_CLOEXEC | O_NONBLOCK);
	if (*tun < 0)
		return "there is no /dev/net/tun";
	memcpy(ifr.ifr_name, TUN, sizeof(TUN));
	if (ioctl(*tun, TUNSETIFF, &ifr))
		return "cannot make a tun device";
	if (tun_addresses())
		return "cannot set addresses";
	/* Each segment is answered at once. */
	write_file("/proc/sys/net/ipv4", "tcp_comp_sack_nr", "0");
	write_file("/proc/sys/net/ipv4", "tcp_invalid_ratelimit", "0");
	return NULL;
}

FIXTURE_SETUP(shapes)
{
	const char *why;

	self->tun = -1;
	if (!dev_path(variant->dev, &why))
		SKIP(return, "%s", why);
	why = tun_up(&self->tun, variant->partial);
	if (why)
		SKIP(return, "%s", why);
	ASSERT_EQ(0, store_make(&self->s, variant->dev, variant->flags, 0));
}

FIXTURE_TEARDOWN(shapes)
{
	/* Whatever was sent, nothing of it is left. */
	EXPECT_EQ(0, store_close(&self->s));
	close(self->tun);
}

/* ---- order ---- */

SHAPE(in_order)
{
	establish(_metadata, p);
	data(_metadata, p, 0, 10);
	data(_metadata, p, 10, 1400);
	data(_metadata, p, 1410, 5000);
	look(p);
	finish(_metadata, p, 6410);
	answers(_metadata, p);
	stream_is(_metadata, p, 6410);
}

SHAPE(out_of_order)
{
	static const uint8_t orders[][4] = {
		{ 3, 2, 1, 0 }, { 1, 0, 3, 2 }, { 2, 3, 0, 1 }, { 3, 0, 2, 1 }, { 0, 2, 1, 3 },
	};
	unsigned int k, i, base = 0, len;

	establish(_metadata, p);
	for (k = 0; k < ARRAY_LEN(orders); k++) {
		len = 1 + k * 333;
		for (i = 0; i < 4; i++) {
			data(_metadata, p, base + orders[k][i] * len, len);
			answers(_metadata, p);
			look(p);
		}
		base += 4 * len;
		receive(_metadata, p, 65536);
	}
	finish(_metadata, p, base);
	stream_is(_metadata, p, base);
}

SHAPE(every_second_segment_first)
{
	enum { NR = 200, LEN = 77 };
	int k;

	establish(_metadata, p);
	for (k = NR - 1; k > 0; k -= 2)
		data(_metadata, p, k * LEN, LEN);
	look(p);
	for (k = 0; k < NR; k += 2)
		data(_metadata, p, k * LEN, LEN);
	look(p);
	finish(_metadata, p, NR * LEN);
	stream_is(_metadata, p, NR * LEN);
}

/* ---- overlap ---- */

/* What came first counts, or what plain sockets take. */
SHAPE(overlap)
{
	static const struct {
		uint16_t at, len;
	} parts[][5] = {
		{ { 10, 10 }, { 5, 10 }, { 0, 10 } },		/* before */
		{ { 10, 10 }, { 15, 10 }, { 0, 10 } },		/* after */
		{ { 10, 10 }, { 5, 20 }, { 0, 5 } },		/* both sides */
		{ { 10, 20 }, { 15, 5 }, { 0, 12 } },		/* inside */
		{ { 10, 10 }, { 30, 10 }, { 15, 20 }, { 0, 12 } },	/* two of them */
		{ { 0, 20 }, { 10, 20 } },			/* what was received */
		{ { 0, 20 }, { 10, 10 }, { 0, 40 } },
		{ { 20, 20 }, { 10, 20 }, { 0, 40 } },
		{ { 10, 10 }, { 10, 10 }, { 10, 11 }, { 0, 10 } },	/* the same again */
		{ { 10, 1400 }, { 0, 30 }, { 700, 1400 } },
	};
	unsigned int k, i, base = 0;

	establish(_metadata, p);
	for (k = 0; k < ARRAY_LEN(parts); k++) {
		unsigned int len = 0;

		for (i = 0; i < ARRAY_LEN(parts[k]) && parts[k][i].len; i++) {
			segment(_metadata, p, (struct seg){
				.at = base + parts[k][i].at,
				.len = parts[k][i].len,
				.other = i & 1,
			});
			answers(_metadata, p);
			look(p);
			if (len < (unsigned int)parts[k][i].at + parts[k][i].len)
				len = parts[k][i].at + parts[k][i].len;
		}
		base += len;
		EXPECT_LT(0, receive(_metadata, p, k % 3 ? 65536 : 7));
	}
	finish(_metadata, p, base);
	EXPECT_EQ(base, p->have);
}

SHAPE(retransmission)
{
	establish(_metadata, p);
	data(_metadata, p, 0, 1000);
	other(_metadata, p, 0, 1000);
	answers(_metadata, p);
	other(_metadata, p, 0, 500);
	answers(_metadata, p);
	receive(_metadata, p, 300);
	/* All of it, half received; and with something new at its end. */
	other(_metadata, p, 200, 800);
	segment(_metadata, p, (struct seg){ .at = 500, .len = 500, .other = true });
	answers(_metadata, p);
	data(_metadata, p, 500, 1000);
	answers(_metadata, p);
	receive(_metadata, p, 65536);
	data(_metadata, p, 0, 1500);
	look(p);
	receive(_metadata, p, 65536);
	data(_metadata, p, 1499, 2);
	finish(_metadata, p, 1501);
	stream_is(_metadata, p, 1501);
}

static uint32_t state;

static uint32_t draw(uint32_t below)
{
	state = state * 1664525 + 1013904223;
	return (uint64_t)state * below >> 32;
}

/*
 * Segments of any place and size in any order, and reads. Other bytes than the stream's are
 * sent again for what was acknowledged; every second time, for anything: which ones count
 * depends on what TCP could merge before, so they are not told apart then.
 */
static void any(struct __test_metadata *_metadata, struct peer *p)
{
	uint32_t total = 500 + p->seed % 7 * 900, at, len;
	bool upper;
	int k;

	state = p->seed;
	p->fold = p->seed % 2;
	establish(_metadata, p);
	for (k = 0; k < 40; k++) {
		at = draw(total);
		len = 1 + draw(draw(4) ? 60 : 1400);
		if (at + len > total)
			len = total - at;
		listen_to(p);
		upper = draw(2) && (p->fold || at + len <= p->acked);
		segment(_metadata, p, (struct seg){
			.at = at,
			.len = len,
			.other = upper,
			.bad = draw(20) == 0,
			/* The end is always at the same place, with data or in a hole's other side. */
			.flags = at + len == total && draw(2) ? FIN : 0,
		});
		if (!draw(6))
			receive(_metadata, p, 1 + draw(2000));
	}
	look(p);
	for (at = 0; at < total; at += 100)
		data(_metadata, p, at, total - at < 100 ? total - at : 100);
	answers(_metadata, p);
	finish(_metadata, p, total);
	stream_is(_metadata, p, total);
}

TEST_F_TIMEOUT(shapes, anything_in_any_order, 120)
{
	unsigned long rounds = env_number("PMSKB_TEST_SHAPES", 10), seed = env_number("PMSKB_TEST_SEED", 1);
	static const struct pmskb_counters none;
	struct pmskb_store_info info;
	struct peer like = LIKE;

	for (; rounds && !_metadata->exit_code; rounds--) {
		like.seed = seed++;
		compare(_metadata, &like, NULL, any);
	}
	ASSERT_EQ(0, store_info(&self->s, &info));
	ksft_print_msg("anything_in_any_order: %s\n", counters_since(&info.counters, &none));
}

/* ---- small and wrong ---- */

SHAPE(single_bytes)
{
	enum { NR = 150 };
	int k;

	establish(_metadata, p);
	for (k = 0; k < NR; k++)
		data(_metadata, p, k, 1);
	/* And the other way round. */
	for (k = 2 * NR - 1; k >= NR; k--)
		data(_metadata, p, k, 1);
	look(p);
	receive(_metadata, p, 10);
	finish(_metadata, p, 2 * NR);
	stream_is(_metadata, p, 2 * NR);
}

SHAPE(a_wrong_checksum)
{
	int k;

	establish(_metadata, p);
	/* More than a socket is trusted with, see place.rs. */
	for (k = 0; k < 20; k++) {
		segment(_metadata, p, (struct seg){ .at = k * 100, .len = 100, .bad = true, .other = true });
		look(p);
		EXPECT_EQ(-EAGAIN, receive(_metadata, p, 1000));
		data(_metadata, p, k * 100, 100);
		answers(_metadata, p);
		/* Behind a hole, too. */
		segment(_metadata, p, (struct seg){ .at = k * 100 + 150, .len = 100, .bad = true, .other = true });
		EXPECT_EQ(100, receive(_metadata, p, 1000));
	}
	finish(_metadata, p, 2000);
	stream_is(_metadata, p, 2000);
}

SHAPE(outside_of_the_window)
{
	establish(_metadata, p);
	data(_metadata, p, 0, 100);
	other(_metadata, p, 1 << 30, 100);
	answers(_metadata, p);
	other(_metadata, p, -(1 << 30), 100);
	answers(_metadata, p);
	/* One that begins before what was received, and ends there; one without end in it. */
	other(_metadata, p, -100, 100);
	answers(_metadata, p);
	other(_metadata, p, 100000, 1000);
	answers(_metadata, p);
	look(p);
	segment(_metadata, p, (struct seg){ .at = 1 << 30, .len = 10, .flags = FIN });
	answers(_metadata, p);
	data(_metadata, p, 100, 100);
	finish(_metadata, p, 200);
	stream_is(_metadata, p, 200);
}

/* ---- urgent data ---- */

static void out_of_band(struct peer *p)
{
	char c = '-';
	ssize_t n = recv(p->s, &c, 1, MSG_OOB | MSG_DONTWAIT);

	say(p, "urgent: %zd, errno %d, %c\n", n, n < 0 ? errno : 0, c);
}

static void urgent(struct __test_metadata *_metadata, struct peer *p, bool in_line)
{
	int one = 1, k;

	establish(_metadata, p);
	p->gaps = !in_line;
	if (in_line) {
		ASSERT_EQ(0, setsockopt(p->s, SOL_SOCKET, SO_OOBINLINE, &one, sizeof(one)));
	}
	data(_metadata, p, 0, 10);
	segment(_metadata, p, (struct seg){ .at = 10, .len = 10, .flags = URG, .urgent = 5 });
	look(p);
	receive(_metadata, p, 100);
	look(p);
	out_of_band(p);
	receive(_metadata, p, 100);
	out_of_band(p);
	look(p);
	/* Its first byte, its last, alone; fetched before and after what is before it. */
	segment(_metadata, p, (struct seg){ .at = 20, .len = 10, .flags = URG, .urgent = 1 });
	look(p);
	out_of_band(p);
	receive(_metadata, p, 100);
	receive(_metadata, p, 100);
	segment(_metadata, p, (struct seg){ .at = 30, .len = 10, .flags = URG, .urgent = 10 });
	receive(_metadata, p, 100);
	look(p);
	receive(_metadata, p, 100);
	data(_metadata, p, 40, 5);
	receive(_metadata, p, 100);
	out_of_band(p);
	segment(_metadata, p, (struct seg){ .at = 45, .len = 1, .flags = URG, .urgent = 1 });
	look(p);
	receive(_metadata, p, 100);
	out_of_band(p);
	/* Announced before it comes; behind a hole; a second one while the first is there. */
	segment(_metadata, p, (struct seg){ .at = 46, .len = 10, .flags = URG, .urgent = 20 });
	look(p);
	out_of_band(p);
	receive(_metadata, p, 100);
	segment(_metadata, p, (struct seg){ .at = 61, .len = 10, .flags = URG, .urgent = 5 });
	look(p);
	segment(_metadata, p, (struct seg){ .at = 56, .len = 5 });
	look(p);
	segment(_metadata, p, (struct seg){ .at = 71, .len = 10, .flags = URG, .urgent = 3 });
	for (k = 0; k < 4; k++) {
		receive(_metadata, p, 3 + k * 10);
		look(p);
	}
	out_of_band(p);
	/* At the end of the stream, with nothing before it. */
	segment(_metadata, p, (struct seg){ .at = 81, .len = 1, .flags = URG | FIN, .urgent = 1 });
	look(p);
	for (k = 0; k < 3; k++)
		receive(_metadata, p, 100);
	out_of_band(p);
	answers(_metadata, p);
}

SHAPE(urgent_data)
{
	urgent(_metadata, p, false);
}

SHAPE(urgent_data_in_line)
{
	urgent(_metadata, p, true);
}

/* ---- begin and end ---- */

SHAPE(the_end_with_data)
{
	establish(_metadata, p);
	data(_metadata, p, 0, 100);
	segment(_metadata, p, (struct seg){ .at = 200, .len = 100, .flags = FIN });
	answers(_metadata, p);
	look(p);
	segment(_metadata, p, (struct seg){ .at = 100, .len = 100 });
	answers(_metadata, p);
	look(p);
	/* Once more, and more than there is. */
	segment(_metadata, p, (struct seg){ .at = 200, .len = 100, .flags = FIN, .other = true });
	other(_metadata, p, 250, 100);
	other(_metadata, p, 301, 10);
	answers(_metadata, p);
	EXPECT_EQ(0, receive_all(_metadata, p));
	look(p);
	answers(_metadata, p);
	stream_is(_metadata, p, 300);
}

static void with_the_handshake(struct __test_metadata *_metadata, struct peer *p)
{
	serve(_metadata, p, 0);
	syn(_metadata, p);
	data(_metadata, p, 0, 100);
	data(_metadata, p, 200, 1000);
	data(_metadata, p, 100, 100);
	answers(_metadata, p);
	take(_metadata, p);
	look(p);
	receive(_metadata, p, 50);
	data(_metadata, p, 1200, 100);
	finish(_metadata, p, 1300);
	stream_is(_metadata, p, 1300);
}

SHAPE(data_with_the_handshake)
{
	with_the_handshake(_metadata, p);
}

SHAPE_LATE(data_with_the_handshake_attached_late, true)
{
	with_the_handshake(_metadata, p);
}

static void ends_before_accept(struct __test_metadata *_metadata, struct peer *p)
{
	serve(_metadata, p, 0);
	syn(_metadata, p);
	segment(_metadata, p, (struct seg){});
	data(_metadata, p, 0, 3000);
	segment(_metadata, p, (struct seg){ .at = 3000, .len = 10, .flags = FIN });
	take(_metadata, p);
	look(p);
	EXPECT_EQ(0, receive_all(_metadata, p));
	stream_is(_metadata, p, 3010);
}

SHAPE(all_before_accept)
{
	ends_before_accept(_metadata, p);
}

SHAPE_LATE(all_before_accept_attached_late, true)
{
	ends_before_accept(_metadata, p);
}

SHAPE(reset_before_accept)
{
	serve(_metadata, p, 0);
	syn(_metadata, p);
	segment(_metadata, p, (struct seg){});
	data(_metadata, p, 0, 3000);
	segment(_metadata, p, (struct seg){ .at = 3000, .flags = RST });
	take(_metadata, p);
	look(p);
	receive_all(_metadata, p);
	receive_all(_metadata, p);
}

/* What nobody accepts goes with the listener, with data behind a hole, too. */
SHAPE(never_accepted)
{
	serve(_metadata, p, 0);
	syn(_metadata, p);
	data(_metadata, p, 0, 3000);
	data(_metadata, p, 4000, 3000);
	answers(_metadata, p);
	close(p->l);
	p->l = -1;
	answers(_metadata, p);
}

SHAPE(data_with_the_syn)
{
	serve(_metadata, p, 0);
	/* Not what a listener takes, unless it is told to. */
	segment(_metadata, p, (struct seg){
		.flags = SYN, .opt = of_syn, .opt_len = sizeof(of_syn), .len = 200, .other = true,
	});
	ASSERT_TRUE(hear(p, 1));
	EXPECT_EQ(0, p->acked);
	data(_metadata, p, 0, 500);
	take(_metadata, p);
	look(p);
	finish(_metadata, p, 500);
	stream_is(_metadata, p, 500);
}

SHAPE(fast_open)
{
	int queue = 8;

	ASSERT_EQ(0, write_file("/proc/sys/net/ipv4", "tcp_fastopen", "0x202"));
	serve(_metadata, p, 0);
	ASSERT_EQ(0, setsockopt(p->l, IPPROTO_TCP, TCP_FASTOPEN, &queue, sizeof(queue)));
	segment(_metadata, p, (struct seg){
		.flags = SYN, .opt = of_syn, .opt_len = sizeof(of_syn), .len = 200,
	});
	hear(p, 1);
	EXPECT_EQ(200, p->acked) TH_LOG("%s: the SYN's data was not taken", p->name);
	/* The handshake is not over. */
	take(_metadata, p);
	look(p);
	EXPECT_EQ(50, receive(_metadata, p, 50));
	/* The SYN once more; then more data, as the handshake's end. */
	segment(_metadata, p, (struct seg){
		.flags = SYN, .opt = of_syn, .opt_len = sizeof(of_syn), .len = 200, .other = true,
	});
	segment(_metadata, p, (struct seg){ .at = 150, .len = 300 });
	answers(_metadata, p);
	finish(_metadata, p, 450);
	stream_is(_metadata, p, 450);
}

SHAPE(syn_cookies)
{
	/* Not every kernel has them. */
	if (access("/proc/sys/net/ipv4/tcp_syncookies", F_OK))
		return;
	ASSERT_EQ(0, write_file("/proc/sys/net/ipv4", "tcp_syncookies", "2"));
	serve(_metadata, p, 0);
	syn(_metadata, p);
	/* A wrong one. */
	p->next += 1000;
	data(_metadata, p, 0, 100);
	hear(p, p->replies + !p->rst);
	EXPECT_TRUE(p->rst);
	p->rst = false;
	p->next -= 1000;
	data(_metadata, p, 0, 100);
	data(_metadata, p, 100, 1000);
	take(_metadata, p);
	look(p);
	finish(_metadata, p, 1100);
	stream_is(_metadata, p, 1100);
}

SHAPE(reset_with_unread_data)
{
	establish(_metadata, p);
	data(_metadata, p, 0, 2000);
	data(_metadata, p, 3000, 500);
	receive(_metadata, p, 100);
	/* Not where it should be: TCP asks whether it was meant. */
	segment(_metadata, p, (struct seg){ .at = 2500, .flags = RST });
	answers(_metadata, p);
	segment(_metadata, p, (struct seg){ .at = 1 << 30, .flags = RST });
	answers(_metadata, p);
	look(p);
	receive(_metadata, p, 100);
	segment(_metadata, p, (struct seg){ .at = 2000, .len = 10, .flags = RST });
	look(p);
	receive(_metadata, p, 100);
	look(p);
	receive_all(_metadata, p);
	receive_all(_metadata, p);
	EXPECT_LE(200, p->have);
}

SHAPE(closed_with_unread_data)
{
	establish(_metadata, p);
	data(_metadata, p, 0, 2000);
	data(_metadata, p, 3000, 500);
	receive(_metadata, p, 100);
	shutdown(p->s, SHUT_RD);
	data(_metadata, p, 2000, 100);
	look(p);
	receive(_metadata, p, 100);
	close(p->s);
	p->s = -1;
	answers(_metadata, p);
	EXPECT_TRUE(p->rst);
	data(_metadata, p, 2100, 100);
	answers(_metadata, p);
}

/* ---- headers ---- */

SHAPE(options_of_any_size)
{
	/* One that nobody knows, and no-operations up to 40 bytes. */
	static const uint8_t odd[40] = { 253, 3, 0, 1, 254, 4, 1, 2, 1, 253, 3, 7, 1, 1, 1, 1, 254, 2, 1, 1,
		1, 1, 253, 2, 253, 4, 0, 0, 1, 1, 1, 1, 253, 8, 0, 0, 0, 0, 0, 0 };
	static const uint8_t broken[4] = { 253, 40, 1, 1 };
	uint32_t at = 0;
	int len;

	establish(_metadata, p);
	/* Up to where one of them ends. */
	for (len = 0; len <= 40; len += len == 32 ? 8 : 4) {
		segment(_metadata, p, (struct seg){ .at = at, .len = 41, .opt = odd, .opt_len = len });
		answers(_metadata, p);
		at += 41;
	}
	/* One that is longer than the header. */
	segment(_metadata, p, (struct seg){
		.at = at, .len = 41, .opt = broken, .opt_len = 4,
	});
	answers(_metadata, p);
	data(_metadata, p, at, 41);
	finish(_metadata, p, at + 41);
	stream_is(_metadata, p, at + 41);
}

SHAPE(timestamps)
{
	uint8_t opt[16] = { 2, 4, 1400 >> 8, 1400 & 255, 1, 1, 8, 10 };
	uint32_t k;

	serve(_metadata, p, 0);
	put_be32(opt + 8, 1000);
	segment(_metadata, p, (struct seg){ .flags = SYN, .opt = opt, .opt_len = 16 });
	ASSERT_TRUE(hear(p, 1));
	for (k = 0; k < 20; k++) {
		put_be32(opt + 8, 1001 + k);
		put_be32(opt + 12, p->stamp);
		segment(_metadata, p, (struct seg){ .at = k * 100, .len = 100, .opt = opt + 4, .opt_len = 12 });
		if (!k)
			take(_metadata, p);
		/* Too old to be true, with the next data. */
		put_be32(opt + 8, 1);
		segment(_metadata, p, (struct seg){
			.at = k * 100 + 100, .len = 100, .opt = opt + 4, .opt_len = 12, .other = true,
		});
		listen_to(p);
	}
	look(p);
	put_be32(opt + 8, 2000);
	segment(_metadata, p, (struct seg){ .at = 2000, .flags = FIN, .opt = opt + 4, .opt_len = 12 });
	EXPECT_EQ(0, receive_all(_metadata, p));
	stream_is(_metadata, p, 2000);
}

/* Of IPv4: options; of IPv6: extension headers. What is in front of TCP's header. */
static const struct front {
	uint8_t len, next, inner;
	uint8_t bytes[40];
} fronts4[] = {
	{ 4, 0, 0, { 0x94, 4, 0, 0 } },				/* router alert */
	{ 12, 0, 0, { 7, 11, 4 } },				/* record route */
	{ 12, 0, 0, { 68, 12, 5, 0 } },				/* timestamp */
	{ 40, 0, 0, { 1, 1, 1, 1, 1, 1, 1, 1, 130, 11, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1 } },
}, fronts6[] = {
	{ 8, 0, 0, { 6, 0, 1, 4 } },				/* hop by hop */
	{ 8, 60, 8, { 6, 0, 1, 4 } },				/* destination options */
	{ 40, 60, 40, { 6, 4, 0x1e, 36 } },
	{ 24, 0, 16, { 60, 0, 1, 4, 0, 0, 0, 0, 6, 1, 0x1e, 12 } },	/* both */
};

static void in_front(struct __test_metadata *_metadata, struct peer *p, uint16_t frag)
{
	const struct front *f = p->family == AF_INET ? fronts4 : fronts6;
	static const uint16_t lens[] = { 1, 10, 40, 333, 1400, 4000 };
	uint32_t at = 0;
	unsigned int k, i;

	establish(_metadata, p);
	for (k = 0; k < ARRAY_LEN(fronts4); k++) {
		for (i = 0; i < ARRAY_LEN(lens); i++) {
			segment(_metadata, p, (struct seg){
				.at = at, .len = lens[i], .frag = frag, .order = i % 3,
				.ip = f[k].bytes, .ip_len = f[k].len, .ip_next = f[k].next,
				.inner_len = f[k].inner,
			});
			at += lens[i];
			look(p);
		}
		receive(_metadata, p, 65536);
	}
	/* Of IPv6 the first must have all headers. */
	for (i = p->family == AF_INET ? 0 : 2; frag && i < 9; i++, at += 1000)
		segment(_metadata, p, (struct seg){ .at = at, .len = 1000, .frag = 8 << i, .order = i % 3 });
	finish(_metadata, p, at);
	stream_is(_metadata, p, at);
}

SHAPE(headers_in_front)
{
	in_front(_metadata, p, 0);
}

SHAPE(fragments)
{
	in_front(_metadata, p, 400);
}

SHAPE(fragments_and_the_rest)
{
	establish(_metadata, p);
	/* Out of order, overlapping, wrong, and together with whole segments. */
	segment(_metadata, p, (struct seg){ .at = 1000, .len = 2000, .frag = 512, .order = LAST_FIRST });
	answers(_metadata, p);
	segment(_metadata, p, (struct seg){ .at = 0, .len = 500, .frag = 64, .order = ODD_FIRST, .bad = true });
	answers(_metadata, p);
	segment(_metadata, p, (struct seg){ .at = 500, .len = 1000, .frag = 128, .other = true });
	answers(_metadata, p);
	data(_metadata, p, 0, 700);
	answers(_metadata, p);
	receive(_metadata, p, 800);
	segment(_metadata, p, (struct seg){ .at = 2900, .len = 3000, .frag = 1024, .flags = FIN });
	answers(_metadata, p);
	EXPECT_EQ(0, receive_all(_metadata, p));
	EXPECT_EQ(5900, p->have);
}

/* ---- little room ---- */

SHAPE(zero_window)
{
	enum { TOTAL = 40000 };
	unsigned int k, zeros = 0, replies;
	uint32_t at = 0, n;

	serve(_metadata, p, 8192);
	syn(_metadata, p);
	segment(_metadata, p, (struct seg){});
	take(_metadata, p);
	p->quiet = true;
	for (k = 0; k < 2000 && at < TOTAL; k++) {
		int32_t room = p->acked + p->window - at;

		listen_to(p);
		if (room > 0) {
			n = room < 700 ? room : 700;
			n = n < TOTAL - at ? n : TOTAL - at;
			data(_metadata, p, at, n);
			at += n;
			continue;
		}
		/* After what was sent already, so that nothing else is to be answered, one byte more. */
		answers(_metadata, p);
		replies = p->replies;
		data(_metadata, p, at, 1);
		EXPECT_TRUE(hear(p, replies + 1)) TH_LOG("%s: a probe without an answer", p->name);
		at = p->acked;
		if (p->window)
			continue;
		zeros++;
		receive_all(_metadata, p);
		hear(p, p->replies + !p->window);
		ASSERT_LT(0, p->window) TH_LOG("%s: the window stays closed after %u bytes", p->name, at);
	}
	p->quiet = false;
	EXPECT_LT(0, zeros) TH_LOG("%s: the window was always open", p->name);
	say(p, "at %u\n", at);
	p->quiet = true;
	finish(_metadata, p, TOTAL);
	stream_is(_metadata, p, TOTAL);
}

/* A counter of TcpExt in this namespace. */
static unsigned long tcp_counter(const char *name)
{
	static char names[16384], values[16384];
	FILE *f = fopen("/proc/net/netstat", "r");
	char *n, *v, *sn, *sv;
	unsigned long value = 0;

	if (!f)
		return 0;
	if (fgets(names, sizeof(names), f) && fgets(values, sizeof(values), f)) {
		n = strtok_r(names, "\n ", &sn);
		v = strtok_r(values, "\n ", &sv);
		while (n && v && strcmp(n, name)) {
			n = strtok_r(NULL, "\n ", &sn);
			v = strtok_r(NULL, "\n ", &sv);
		}
		if (n && v)
			value = strtoul(v, NULL, 10);
	}
	fclose(f);
	return value;
}

/* Nobody reads, and small segments with holes between them come, more than there is room for. */
SHAPE(pruned_and_collapsed)
{
	enum { TOTAL = 30000, LEN = 13 };
	unsigned long prunes = tcp_counter("PruneCalled"), collapsed = tcp_counter("TCPRcvCollapsed");
	unsigned long dropped = tcp_counter("OfoPruned");
	uint32_t at = 0, n, limit, stuck = 0;
	unsigned int k;

	serve(_metadata, p, 16384);
	syn(_metadata, p);
	segment(_metadata, p, (struct seg){});
	take(_metadata, p);
	p->quiet = true;
	for (k = 0; k < 10000 && p->acked < TOTAL; k++) {
		listen_to(p);
		at = p->acked;
		limit = at + p->window < TOTAL ? at + p->window : TOTAL;
		if (k % 4 == 0) {
			/* Behind a hole, from the window's end to its begin. */
			for (n = limit; n > at + 2 * LEN; n -= 2 * LEN)
				data(_metadata, p, n - LEN, LEN);
		}
		/* In order, as one that goes on from what was acknowledged. */
		for (n = at; n < limit; n += LEN)
			data(_metadata, p, n, limit - n < LEN ? limit - n : LEN);
		listen_to(p);
		if (p->acked == at || !p->window) {
			ASSERT_GT(100, stuck++) TH_LOG("%s: no more than %u bytes get through", p->name, at);
			receive(_metadata, p, 5000);
			segment(_metadata, p, (struct seg){ .at = p->acked - 1 });
		} else {
			stuck = 0;
		}
	}
	finish(_metadata, p, TOTAL);
	stream_is(_metadata, p, TOTAL);
	prunes = tcp_counter("PruneCalled") - prunes;
	collapsed = tcp_counter("TCPRcvCollapsed") - collapsed;
	dropped = tcp_counter("OfoPruned") - dropped;
	EXPECT_LT(0, prunes) TH_LOG("%s: there was always room", p->name);
	ksft_print_msg("pruned_and_collapsed %s: pruned %lu times, %lu collapsed, %lu dropped\n", p->name,
		       prunes, collapsed, dropped);
}

/* The store's frames run out in mid-stream, and come back. */
SHAPE(frames_run_out_and_come_back)
{
	struct pmskb_store_info was, now;
	int fds[64], n = 0, k, round;
	uint32_t at = 0;

	/* It takes its time to fill a store. And what auto-persist does then is in auto.c. */
	if (p->partial || p->mode == AUTO)
		return;
	establish(_metadata, p);
	p->quiet = true;
	for (round = 0; round < 2; round++) {
		ASSERT_EQ(0, store_info(p->store, &was));
		if (p->mode != PLAIN) {
			n = store_scarce(p->store, round ? 0 : 3, fds, ARRAY_LEN(fds));
			ASSERT_LT(0, n);
		}
		for (k = 0; k < 20; k++, at += 1000) {
			/* Some of it behind a hole. */
			data(_metadata, p, at + 500, 500);
			data(_metadata, p, at, 500);
		}
		ASSERT_EQ(0, store_info(p->store, &now));
		if (p->mode != PLAIN) {
			EXPECT_LT(was.counters.unplaced[PMSKB_UNPLACED_NO_FRAME],
				  now.counters.unplaced[PMSKB_UNPLACED_NO_FRAME]);
		}
		if (p->mode == DESC) {
			/* What was placed is described; then it says so, and nothing is lost. */
			EXPECT_EQ(-ENOBUFS, receive_all(_metadata, p));
			EXPECT_GT(at, p->have);
			EXPECT_EQ(-ENOBUFS, receive_all(_metadata, p));
		} else {
			EXPECT_EQ(-EAGAIN, receive_all(_metadata, p));
			EXPECT_EQ(at, p->have);
		}
		while (n > 0)
			close(fds[--n]);
		EXPECT_EQ(-EAGAIN, receive_all(_metadata, p));
		EXPECT_EQ(at, p->have);
		/* And it is placed again. */
		ASSERT_EQ(0, store_info(p->store, &was));
		data(_metadata, p, at, 1000);
		at += 1000;
		ASSERT_EQ(0, store_info(p->store, &now));
		EXPECT_EQ(p->mode == PLAIN ? 0 : 1000, now.counters.placed_bytes - was.counters.placed_bytes);
		EXPECT_EQ(-EAGAIN, receive_all(_metadata, p));
	}
	finish(_metadata, p, at);
	stream_is(_metadata, p, at);
}

TEST_HARNESS_MAIN
