// SPDX-License-Identifier: GPL-2.0
/*
 * Promises about everything else that a TCP socket can do: zero copy in both
 * directions, options, TCP Fast Open, repair, splicing into files and into other
 * sockets. Every test also runs on a socket that is not attached (variant plain):
 * what that one does is what is right. What an attached socket refuses is in
 * attach.c, and here where it is an option of the socket.
 */
#include "common.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/errqueue.h>
#include <linux/io_uring.h>
#include <linux/sockios.h>
#include <linux/tcp.h>
#include <poll.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>

#include "harness.h"

#define ERRNO(call) ((call) < 0 ? errno : 0)
#ifndef SO_PEEK_OFF
#define SO_PEEK_OFF 42
#endif
/* Numbers of TCP's options, for TCP_REPAIR_OPTIONS. */
enum { OPT_MSS = 2, OPT_WINDOW = 3, OPT_SACK = 4, OPT_TIMESTAMP = 8 };
#ifndef TCPI_OPT_SYN_DATA
#define TCPI_OPT_SYN_DATA 32
#endif

FIXTURE(sockets) {
	struct store s;
	struct net net;
	struct conn c;
};

FIXTURE_VARIANT(sockets) {
	int family;
	enum dev dev;
	enum link link;
	enum how how;
};

FIXTURE_VARIANT_ADD(sockets, plain) { AF_INET, DEV_PMEM, LINK_VETH, HOW_PLAIN };
FIXTURE_VARIANT_ADD(sockets, plain_noffload) { AF_INET6, DEV_PMEM, LINK_PLAIN, HOW_PLAIN };
FIXTURE_VARIANT_ADD(sockets, v4_pmem_lo) { AF_INET, DEV_PMEM, LINK_LO, HOW_LISTENER_OPT };
FIXTURE_VARIANT_ADD(sockets, v4_dax_veth) { AF_INET, DEV_DAX, LINK_VETH, HOW_LISTENER_IOCTL };
FIXTURE_VARIANT_ADD(sockets, v6_pmem_noffload) { AF_INET6, DEV_PMEM, LINK_PLAIN, HOW_ACCEPTED_OPT };

FIXTURE_SETUP(sockets)
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
}

FIXTURE_TEARDOWN(sockets)
{
	conn_close(&self->c);
	/* Whatever was done with the frames, all of them have come back. */
	EXPECT_EQ(0, store_close(&self->s));
}

static bool attaches(enum how how)
{
	return how != HOW_PLAIN;
}

/* A listening socket, attached if the variant says so. */
static int listener(const struct net *net, int store_fd, enum how how, struct sockaddr_storage *addr,
		    socklen_t *len)
{
	int fd = net_listen(net, addr, len), err = 0;

	if (fd >= 0 && attaches(how))
		err = sock_attach_ioctl(fd, store_fd);
	if (err) {
		close(fd);
		return err;
	}
	return fd;
}

/* Waits until so many bytes can be read. */
static int arrived(int fd, int want)
{
	int n = 0, k;

	for (k = 0; k < 500 * slowness(); k++) {
		if (ioctl(fd, SIOCINQ, &n))
			return -errno;
		if (n >= want)
			return n;
		usleep(10000);
	}
	return n;
}

static uint64_t placed_bytes(const struct store *s)
{
	struct pmskb_store_info i;

	return store_info(s, &i) ? 0 : i.counters.placed_bytes;
}

/* ---- sending without a copy ---- */

/*
 * Completions of MSG_ZEROCOPY: waits for the one of send number `last`. How many sends the
 * kernel says that it had to copy.
 */
static int completed(int fd, uint32_t last)
{
	struct pollfd p = { .fd = fd };
	int k, copied = 0;

	for (k = 0; k < 100 * slowness(); k++) {
		char control[256];
		struct msghdr msg = { .msg_control = control, .msg_controllen = sizeof(control) };
		struct cmsghdr *c;

		if (recvmsg(fd, &msg, MSG_ERRQUEUE | MSG_DONTWAIT) < 0) {
			if (errno != EAGAIN)
				return -errno;
			poll(&p, 1, 50);
			continue;
		}
		for (c = CMSG_FIRSTHDR(&msg); c; c = CMSG_NXTHDR(&msg, c)) {
			struct sock_extended_err *e = (void *)CMSG_DATA(c);

			if (e->ee_origin != SO_EE_ORIGIN_ZEROCOPY || e->ee_errno)
				return -EBADMSG;
			if (e->ee_code & SO_EE_CODE_ZEROCOPY_COPIED)
				copied += e->ee_data - e->ee_info + 1;
			if (e->ee_data >= last)
				return copied;
		}
	}
	return -ETIMEDOUT;
}

/*
 * Sends without a copy, and what is received on the same host is copied: by the stack, which
 * says so, or by placement, which takes the bytes where the sender has them.
 */
static void send_zerocopy(struct __test_metadata *_metadata, int from, int to, bool placed, enum link link)
{
	enum { NR = 8, LEN = 60000 };
	static char out[NR * LEN], in[NR * LEN];
	int one = 1, k, copied;

	fill(out, sizeof(out), 21, 0);
	ASSERT_EQ(0, setsockopt(from, SOL_SOCKET, SO_ZEROCOPY, &one, sizeof(one)));
	for (k = 0; k < NR; k++) {
		/* A send that is cut short would be another one for the counter. */
		ASSERT_EQ(LEN, send(from, out + k * LEN, LEN, MSG_ZEROCOPY));
		ASSERT_EQ(0, recv_all(to, in + k * LEN, LEN));
	}
	EXPECT_EQ(-1, differs(in, sizeof(in), 21, 0));
	copied = completed(from, NR - 1);
	EXPECT_LE(0, copied) TH_LOG("%s", strerror(-copied));
	/* For a device that cannot gather, it is the sender that copies, more or less of it. */
	if (link != LINK_PLAIN) {
		EXPECT_EQ(placed ? 0 : NR, copied);
	}
}

TEST_F(sockets, msg_zerocopy_sends_and_completes)
{
	send_zerocopy(_metadata, self->c.s, self->c.c, false, variant->link);
}

TEST_F(sockets, what_was_sent_with_msg_zerocopy_is_placed_from_where_it_is)
{
	send_zerocopy(_metadata, self->c.c, self->c.s, attaches(variant->how), variant->link);
}

/* ---- a ring, as small as can be ---- */

struct ring {
	int fd;
	struct io_uring_params p;
	uint8_t *sq, *cq;
	struct io_uring_sqe *sqes;
	size_t sq_len, cq_len, sqes_len, cqe_len;
};

static int ring_make(struct ring *r, uint32_t flags)
{
	memset(r, 0, sizeof(*r));
	r->p.flags = flags;
	r->cqe_len = sizeof(struct io_uring_cqe) << !!(flags & IORING_SETUP_CQE32);
	r->fd = syscall(__NR_io_uring_setup, 8, &r->p);
	if (r->fd < 0)
		return -errno;
	r->sq_len = r->p.sq_off.array + r->p.sq_entries * sizeof(uint32_t);
	r->cq_len = r->p.cq_off.cqes + r->p.cq_entries * r->cqe_len;
	r->sqes_len = r->p.sq_entries * sizeof(struct io_uring_sqe);
	r->sq = mmap(NULL, r->sq_len, PROT_READ | PROT_WRITE, MAP_SHARED, r->fd, IORING_OFF_SQ_RING);
	r->cq = mmap(NULL, r->cq_len, PROT_READ | PROT_WRITE, MAP_SHARED, r->fd, IORING_OFF_CQ_RING);
	r->sqes = mmap(NULL, r->sqes_len, PROT_READ | PROT_WRITE, MAP_SHARED, r->fd, IORING_OFF_SQES);
	if (r->sq == MAP_FAILED || r->cq == MAP_FAILED || r->sqes == MAP_FAILED)
		return -errno;
	return 0;
}

static void ring_close(struct ring *r)
{
	munmap(r->sq, r->sq_len);
	munmap(r->cq, r->cq_len);
	munmap(r->sqes, r->sqes_len);
	close(r->fd);
}

static int ring_submit(struct ring *r, const struct io_uring_sqe *sqe)
{
	uint32_t *tail = (void *)(r->sq + r->p.sq_off.tail);
	uint32_t at = *tail & (r->p.sq_entries - 1);

	r->sqes[at] = *sqe;
	((uint32_t *)(r->sq + r->p.sq_off.array))[at] = at;
	__atomic_store_n(tail, *tail + 1, __ATOMIC_RELEASE);
	return syscall(__NR_io_uring_enter, r->fd, 1, 0, 0, NULL, 0) == 1 ? 0 : -errno;
}

static int ring_wait(struct ring *r, struct io_uring_cqe *cqe)
{
	uint32_t *head = (void *)(r->cq + r->p.cq_off.head);
	uint32_t *tail = (void *)(r->cq + r->p.cq_off.tail);

	if (*head == __atomic_load_n(tail, __ATOMIC_ACQUIRE) &&
	    syscall(__NR_io_uring_enter, r->fd, 0, 1, IORING_ENTER_GETEVENTS, NULL, 0) < 0)
		return -errno;
	if (*head == __atomic_load_n(tail, __ATOMIC_ACQUIRE))
		return -EAGAIN;
	memcpy(cqe, r->cq + r->p.cq_off.cqes + (*head & (r->p.cq_entries - 1)) * r->cqe_len, sizeof(*cqe));
	__atomic_store_n(head, *head + 1, __ATOMIC_RELEASE);
	return 0;
}

TEST_F(sockets, io_uring_sends_without_a_copy_and_receives)
{
	static char out[50000], in[50000];
	struct io_uring_sqe sqe = {
		.opcode = IORING_OP_SEND_ZC,
		.fd = self->c.s,
		.addr = PTR(out),
		.len = sizeof(out),
		/* All of it, though it may be more than the send buffer has room for. */
		.msg_flags = MSG_WAITALL,
	};
	struct io_uring_cqe cqe;
	struct ring r;
	int err;

	err = ring_make(&r, 0);
	if (r.fd < 0)
		SKIP(return, "no io_uring: %s", strerror(-err));
	ASSERT_EQ(0, err);
	fill(out, sizeof(out), 22, 0);
	ASSERT_EQ(0, ring_submit(&r, &sqe));
	ASSERT_EQ(0, ring_wait(&r, &cqe));
	ASSERT_EQ(sizeof(out), cqe.res) TH_LOG("%s", strerror(-cqe.res));
	EXPECT_TRUE(cqe.flags & IORING_CQE_F_MORE);
	ASSERT_EQ(0, recv_all(self->c.c, in, sizeof(in)));
	EXPECT_EQ(-1, differs(in, sizeof(in), 22, 0));
	if (cqe.flags & IORING_CQE_F_MORE) {
		ASSERT_EQ(0, ring_wait(&r, &cqe));
		EXPECT_TRUE(cqe.flags & IORING_CQE_F_NOTIF);
	}

	/* And the other way. */
	memset(in, 0, sizeof(in));
	ASSERT_EQ(0, send_all(self->c.c, out, 30000));
	ASSERT_LE(30000, arrived(self->c.s, 30000));
	sqe = (struct io_uring_sqe) {
		.opcode = IORING_OP_RECV,
		.fd = self->c.s,
		.addr = PTR(in),
		.len = sizeof(in),
	};
	ASSERT_EQ(0, ring_submit(&r, &sqe));
	ASSERT_EQ(0, ring_wait(&r, &cqe));
	EXPECT_EQ(30000, cqe.res) TH_LOG("%s", strerror(-cqe.res));
	EXPECT_EQ(-1, differs(in, 30000, 22, 0));
	ring_close(&r);
}

/* What <linux/io_uring.h> of this kernel has, and an older one has not. */
#define REGISTER_ZCRX_IFQ 32
#define OP_RECV_ZC 58
#define ZCRX_NODEV 2
struct zcrx_area {
	uint64_t addr, len, token;
	uint32_t flags, dmabuf_fd;
	uint64_t resv[2];
};
struct zcrx_region {
	uint64_t addr, size;
	uint32_t flags, id;
	uint64_t mmap_offset, resv[4];
};
struct zcrx_ifq {
	uint32_t if_idx, if_rxq, rq_entries, flags;
	uint64_t area, region;
	uint32_t head, tail, rqes, resv2;
	uint64_t resv3[2];
	uint32_t id, buf_len;
	uint64_t event, resv[2];
};

/* Without a device, so that it has memory of its own and copies; the sockets are the same. */
TEST_F(sockets, io_uring_zero_copy_receive_is_for_plain_sockets)
{
	enum { AREA = 1 << 17 };
	struct zcrx_area area = { .len = AREA };
	struct zcrx_region region = { .size = 8192, .flags = 1 /* memory of the user's */ };
	struct zcrx_ifq ifq = { .rq_entries = 64, .flags = ZCRX_NODEV, .area = PTR(&area), .region = PTR(&region) };
	struct io_uring_sqe sqe = { .opcode = OP_RECV_ZC, .fd = self->c.s, .ioprio = IORING_RECV_MULTISHOT };
	struct io_uring_cqe cqe;
	struct ring r;
	char buf[16];
	int err;

	err = ring_make(&r, IORING_SETUP_CQE32 | IORING_SETUP_DEFER_TASKRUN | IORING_SETUP_SINGLE_ISSUER);
	if (r.fd < 0)
		SKIP(return, "no io_uring: %s", strerror(-err));
	ASSERT_EQ(0, err);
	area.addr = PTR(mmap(NULL, AREA, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
	region.addr = PTR(mmap(NULL, region.size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
	if (syscall(__NR_io_uring_register, r.fd, REGISTER_ZCRX_IFQ, &ifq, 1)) {
		err = errno;
		ring_close(&r);
		SKIP(return, "no zero-copy receive without a device: %s", strerror(err));
	}
	sqe.splice_fd_in = ifq.id;
	ASSERT_EQ(0, send_all(self->c.c, "zero copies", 11));
	ASSERT_LE(11, arrived(self->c.s, 11));
	ASSERT_EQ(0, ring_submit(&r, &sqe));
	ASSERT_EQ(0, ring_wait(&r, &cqe));
	EXPECT_EQ(attaches(variant->how) ? -EPROTONOSUPPORT : 11, cqe.res) TH_LOG("%s", strerror(-cqe.res));
	if (!attaches(variant->how)) {
		/* It goes on receiving, until the socket is attached. */
		EXPECT_TRUE(cqe.flags & IORING_CQE_F_MORE);
		ASSERT_EQ(0, sock_attach_ioctl(self->c.s, self->s.fd));
		ASSERT_EQ(0, send_all(self->c.c, "zero copies", 11));
		ASSERT_LE(11, arrived(self->c.s, 11));
		ASSERT_EQ(0, ring_wait(&r, &cqe));
		EXPECT_EQ(-EPROTONOSUPPORT, cqe.res) TH_LOG("%s", strerror(-cqe.res));
	}
	/* Nothing is lost. */
	ASSERT_EQ(0, recv_all(self->c.s, buf, 11));
	EXPECT_EQ(0, memcmp(buf, "zero copies", 11));
	ring_close(&r);
}

/* ---- receiving without a copy ---- */

enum { ZC_LEN = 1 << 20 };

/*
 * Receives len bytes of stream `seed`, mapped where the kernel maps, else copied. How
 * many were mapped, or a negative errno.
 */
static ssize_t zerocopy_receive(int fd, uint8_t *map, size_t len, uint32_t seed, uint64_t pos)
{
	static uint8_t buf[ZC_LEN];
	size_t got = 0, mapped = 0;

	while (got < len) {
		struct tcp_zerocopy_receive zc = { .address = PTR(map + mapped), .length = ZC_LEN - mapped };
		socklen_t size = sizeof(zc);
		ssize_t n;

		if (getsockopt(fd, IPPROTO_TCP, TCP_ZEROCOPY_RECEIVE, &zc, &size))
			return -errno;
		if (zc.length) {
			if (differs(map + mapped, zc.length, seed, pos + got) >= 0)
				return -EBADMSG;
			mapped += zc.length;
			got += zc.length;
		}
		if (got >= len || !zc.recv_skip_hint)
			continue;
		n = zc.recv_skip_hint;
		if ((size_t)n > len - got)
			n = len - got;
		n = recv(fd, buf, n, 0);
		if (n <= 0)
			return n ? -errno : -EPIPE;
		if (differs(buf, n, seed, pos + got) >= 0)
			return -EBADMSG;
		got += n;
	}
	return mapped;
}

TEST_F_TIMEOUT(sockets, pages_that_are_mapped_on_receive_stay_what_they_are, 120)
{
	enum { LEN = 60000 };
	static uint8_t buf[ZC_LEN];
	struct pmskb_store_info info;
	int pipes[2], taken[16], k, n;
	ssize_t mapped;
	uint8_t *map;
	pid_t pid;
	int st;

	map = mmap(NULL, ZC_LEN, PROT_READ, MAP_SHARED, self->c.s, 0);
	ASSERT_NE(MAP_FAILED, (void *)map);
	/* What a receive buffer holds without being read. */
	fill(buf, LEN, 23, 0);
	ASSERT_EQ(0, send_all(self->c.c, buf, LEN));
	ASSERT_LE(LEN, arrived(self->c.s, LEN));
	mapped = zerocopy_receive(self->c.s, map, LEN, 23, 0);
	ASSERT_LE(0, mapped) TH_LOG("%s", strerror(-mapped));
	EXPECT_EQ(0, mapped % 4096);
	/* On a slow machine none may be as long as a page. */
	if (variant->link != LINK_PLAIN && attaches(variant->how) && slowness() == 1) {
		EXPECT_LT(0, mapped) TH_LOG("no frame was mapped");
	}
	if (!mapped) {
		/* No packet is as long as a page here; it was all right, and copied. */
		munmap(map, ZC_LEN);
		return;
	}

	/* It cannot be written to. */
	EXPECT_EQ(EACCES, ERRNO(mprotect(map, 4096, PROT_READ | PROT_WRITE)));
	/* The kernel may use it as memory of the process's. */
	ASSERT_EQ(0, pipe(pipes));
	ASSERT_EQ(4096, write(pipes[1], map, 4096));
	ASSERT_EQ(4096, read(pipes[0], buf, 4096));
	EXPECT_EQ(0, memcmp(map, buf, 4096));
	ASSERT_EQ(4096, vmsplice(pipes[1], &(struct iovec) { map, 4096 }, 1, 0));
	/* Its frames are not used again as long as it is there, here or in a child. */
	pid = fork();
	if (!pid) {
		usleep(300000);
		/* _exit: the harness's handlers are not ours. */
		_exit(memcmp(map, buf, 4096) ? 1 : 0);
	}
	n = attaches(variant->how) ? store_scarce(&self->s, 300, taken, ARRAY_LEN(taken)) : 0;
	ASSERT_LE(0, n);
	for (k = 0; k < 40; k++) {
		static uint8_t noise[60000];

		ASSERT_EQ(0, send_all(self->c.c, noise, sizeof(noise)));
		ASSERT_EQ(0, recv_all(self->c.s, noise, sizeof(noise)));
	}
	EXPECT_EQ(0, memcmp(map, buf, 4096)) TH_LOG("a frame was used again under its mapping");
	while (n > 0)
		close(taken[--n]);
	ASSERT_EQ(pid, waitpid(pid, &st, 0));
	EXPECT_EQ(0, st);
	/* The socket's end is not theirs; and a store with frames in use is not detached. */
	conn_close(&self->c);
	EXPECT_EQ(0, memcmp(map, buf, 4096));
	if (attaches(variant->how)) {
		store_let_go(&self->s);
		EXPECT_EQ(-EBUSY, dev_detach(self->s.ctl, self->s.minor, 300));
		self->s.fd = open(self->s.path, O_RDWR | O_CLOEXEC);
		ASSERT_LE(0, self->s.fd);
	}
	ASSERT_EQ(0, munmap(map, ZC_LEN));
	/* The pipe has the last of them. */
	ASSERT_EQ(4096, read(pipes[0], buf + 4096, 4096));
	EXPECT_EQ(0, memcmp(buf, buf + 4096, 4096));
	close(pipes[0]);
	close(pipes[1]);
	EXPECT_EQ(0, store_back(&self->s, 5000, &info));
}

/* ---- queues ---- */

TEST_F(sockets, peek_off_walks_through_the_queue)
{
	int zero = 0, off = -1;
	char buf[16] = "";
	socklen_t len = sizeof(off);

	ASSERT_EQ(0, send_all(self->c.c, "0123456789abcdef", 16));
	ASSERT_LE(16, arrived(self->c.s, 16));
	ASSERT_EQ(0, setsockopt(self->c.s, SOL_SOCKET, SO_PEEK_OFF, &zero, sizeof(zero)));
	ASSERT_EQ(4, recv(self->c.s, buf, 4, MSG_PEEK));
	EXPECT_EQ(0, memcmp(buf, "0123", 4));
	ASSERT_EQ(4, recv(self->c.s, buf, 4, MSG_PEEK));
	EXPECT_EQ(0, memcmp(buf, "4567", 4));
	ASSERT_EQ(0, getsockopt(self->c.s, SOL_SOCKET, SO_PEEK_OFF, &off, &len));
	EXPECT_EQ(8, off);
	/* A read takes from the front, and moves the mark. */
	ASSERT_EQ(2, recv(self->c.s, buf, 2, 0));
	EXPECT_EQ(0, memcmp(buf, "01", 2));
	ASSERT_EQ(4, recv(self->c.s, buf, 4, MSG_PEEK));
	EXPECT_EQ(0, memcmp(buf, "89ab", 4));
	ASSERT_EQ(14, recv(self->c.s, buf, 16, 0));
	EXPECT_EQ(0, memcmp(buf, "23456789abcdef", 14));
}

TEST_F(sockets, epoll_levels_last_until_all_is_read)
{
	struct epoll_event ev = { .events = EPOLLIN }, got;
	int ep = epoll_create1(EPOLL_CLOEXEC), k;
	char buf[4];

	ASSERT_EQ(0, epoll_ctl(ep, EPOLL_CTL_ADD, self->c.s, &ev));
	EXPECT_EQ(0, epoll_wait(ep, &got, 1, 0));
	ASSERT_EQ(0, send_all(self->c.c, "level", 5));
	for (k = 0; k < 5; k++) {
		EXPECT_EQ(1, epoll_wait(ep, &got, 1, 2000 * slowness()));
		EXPECT_EQ(1, recv(self->c.s, buf, 1, 0));
	}
	EXPECT_EQ(0, epoll_wait(ep, &got, 1, 0));
	close(ep);
}

static void set_queue(int fd, int queue, uint32_t seq)
{
	setsockopt(fd, IPPROTO_TCP, TCP_REPAIR_QUEUE, &queue, sizeof(queue));
	setsockopt(fd, IPPROTO_TCP, TCP_QUEUE_SEQ, &seq, sizeof(seq));
}

static uint32_t get_queue(int fd, int queue)
{
	socklen_t len = sizeof(uint32_t);
	uint32_t seq = 0;

	setsockopt(fd, IPPROTO_TCP, TCP_REPAIR_QUEUE, &queue, sizeof(queue));
	getsockopt(fd, IPPROTO_TCP, TCP_QUEUE_SEQ, &seq, &len);
	return seq;
}

TEST_F(sockets, a_connection_can_be_taken_out_and_put_into_another_socket)
{
	struct sockaddr_storage here = {}, there = {};
	socklen_t len = sizeof(here);
	uint32_t rcv, snd, clock;
	struct tcp_repair_window window;
	struct tcp_repair_opt options[4];
	struct tcp_info info;
	char buf[16] = "";
	int one = 1, off = TCP_REPAIR_OFF, queue = TCP_RECV_QUEUE, n = 0;
	socklen_t info_len = sizeof(info), window_len = sizeof(window), clock_len = sizeof(clock);

	ASSERT_EQ(0, send_all(self->c.c, "in the queue", 12));
	ASSERT_LE(12, arrived(self->c.s, 12));
	ASSERT_EQ(0, setsockopt(self->c.s, IPPROTO_TCP, TCP_REPAIR, &one, sizeof(one)));
	rcv = get_queue(self->c.s, TCP_RECV_QUEUE);
	snd = get_queue(self->c.s, TCP_SEND_QUEUE);
	ASSERT_EQ(0, setsockopt(self->c.s, IPPROTO_TCP, TCP_REPAIR_QUEUE, &queue, sizeof(queue)));
	ASSERT_EQ(EPERM, ERRNO(recv(self->c.s, buf, 16, 0)));
	ASSERT_EQ(12, recv(self->c.s, buf, 16, MSG_PEEK));
	EXPECT_EQ(0, memcmp(buf, "in the queue", 12));
	ASSERT_EQ(0, getsockopt(self->c.s, IPPROTO_TCP, TCP_INFO, &info, &info_len));
	ASSERT_EQ(0, getsockopt(self->c.s, IPPROTO_TCP, TCP_REPAIR_WINDOW, &window, &window_len));
	ASSERT_EQ(0, getsockopt(self->c.s, IPPROTO_TCP, TCP_TIMESTAMP, &clock, &clock_len));
	ASSERT_EQ(0, getsockname(self->c.s, (void *)&here, &len));
	len = sizeof(there);
	ASSERT_EQ(0, getpeername(self->c.s, (void *)&there, &len));
	/* Without a word to the peer. */
	close(self->c.s);

	self->c.s = socket(variant->family, SOCK_STREAM | SOCK_CLOEXEC, 0);
	ASSERT_LE(0, self->c.s);
	if (attaches(variant->how))
		ASSERT_EQ(0, sock_attach_ioctl(self->c.s, self->s.fd));
	ASSERT_EQ(0, setsockopt(self->c.s, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one)));
	ASSERT_EQ(0, setsockopt(self->c.s, IPPROTO_TCP, TCP_REPAIR, &one, sizeof(one)));
	set_queue(self->c.s, TCP_RECV_QUEUE, rcv - 12);
	set_queue(self->c.s, TCP_SEND_QUEUE, snd);
	ASSERT_EQ(0, bind(self->c.s, (void *)&here, len));
	ASSERT_EQ(0, connect(self->c.s, (void *)&there, len));
	options[n++] = (struct tcp_repair_opt) { OPT_MSS, info.tcpi_snd_mss };
	if (info.tcpi_options & TCPI_OPT_WSCALE)
		options[n++] = (struct tcp_repair_opt) { OPT_WINDOW,
			info.tcpi_snd_wscale | (uint32_t)info.tcpi_rcv_wscale << 16 };
	if (info.tcpi_options & TCPI_OPT_SACK)
		options[n++] = (struct tcp_repair_opt) { OPT_SACK, 0 };
	if (info.tcpi_options & TCPI_OPT_TIMESTAMPS)
		options[n++] = (struct tcp_repair_opt) { OPT_TIMESTAMP, 0 };
	ASSERT_EQ(0, setsockopt(self->c.s, IPPROTO_TCP, TCP_REPAIR_OPTIONS, options, n * sizeof(options[0])));
	/* Or what it sends is older than what it has sent. */
	ASSERT_EQ(0, setsockopt(self->c.s, IPPROTO_TCP, TCP_TIMESTAMP, &clock, sizeof(clock)));
	ASSERT_EQ(0, setsockopt(self->c.s, IPPROTO_TCP, TCP_REPAIR_QUEUE, &queue, sizeof(queue)));
	ASSERT_EQ(12, send(self->c.s, buf, 12, 0));
	ASSERT_EQ(0, setsockopt(self->c.s, IPPROTO_TCP, TCP_REPAIR_WINDOW, &window, sizeof(window)));
	ASSERT_EQ(0, setsockopt(self->c.s, IPPROTO_TCP, TCP_REPAIR, &off, sizeof(off)));
	ASSERT_EQ(0, timeout_set(self->c.s, 20000 * slowness()));

	memset(buf, 0, sizeof(buf));
	ASSERT_EQ(12, recv(self->c.s, buf, 16, 0));
	EXPECT_EQ(0, memcmp(buf, "in the queue", 12));
	ASSERT_EQ(0, send_all(self->c.c, "goes on", 7));
	ASSERT_EQ(0, recv_all(self->c.s, buf, 7));
	EXPECT_EQ(0, memcmp(buf, "goes on", 7));
	ASSERT_EQ(0, send_all(self->c.s, "both ways", 9));
	ASSERT_EQ(0, recv_all(self->c.c, buf, 9));
	EXPECT_EQ(0, memcmp(buf, "both ways", 9));
	if (attaches(variant->how)) {
		struct pmskb_sock_info i;

		ASSERT_EQ(0, sock_info(self->c.s, &i));
		EXPECT_EQ(7, i.counters.placed_bytes);
	}
}

/* ---- moving on what arrives ---- */

TEST_F(sockets, what_arrives_is_spliced_into_a_file)
{
	static char buf[300000];
	size_t len = sizeof(buf), got = 0;
	int file = memfd_create("spliced", MFD_CLOEXEC), pipes[2];
	struct sender snd;

	ASSERT_LE(0, file);
	ASSERT_EQ(0, pipe(pipes));
	ASSERT_EQ(0, sender_start(&snd, self->c.c, 24, len, 50000, true));
	while (got < len) {
		ssize_t n = splice(self->c.s, NULL, pipes[1], NULL, 65536, SPLICE_F_MOVE);

		ASSERT_LT(0, n);
		while (n > 0) {
			ssize_t m = splice(pipes[0], NULL, file, NULL, n, SPLICE_F_MOVE);

			ASSERT_LT(0, m);
			n -= m;
			got += m;
		}
	}
	EXPECT_EQ(0, sender_wait(&snd));
	ASSERT_EQ((ssize_t)len, pread(file, buf, len, 0));
	EXPECT_EQ(-1, differs(buf, len, 24, 0));
	close(file);
	close(pipes[0]);
	close(pipes[1]);
}

/* A proxy: frames of one socket go out on another, and are placed again where they arrive. */
TEST_F(sockets, what_arrives_is_spliced_into_another_socket)
{
	static char buf[300000];
	size_t len = sizeof(buf), moved = 0;
	struct sender snd;
	struct conn next;
	int pipes[2];
	pid_t pid;
	int st;

	ASSERT_EQ(0, conn_make(&next, &self->net, self->s.fd, variant->how));
	ASSERT_EQ(0, pipe(pipes));
	ASSERT_EQ(0, sender_start(&snd, self->c.c, 25, len, 50000, true));
	pid = fork();
	if (!pid) {
		while (moved < len) {
			ssize_t n = splice(self->c.s, NULL, pipes[1], NULL, 65536, SPLICE_F_MOVE);

			if (n <= 0)
				_exit(1);
			while (n > 0) {
				ssize_t m = splice(pipes[0], NULL, next.c, NULL, n, SPLICE_F_MOVE | SPLICE_F_MORE);

				if (m <= 0)
					_exit(2);
				n -= m;
				moved += m;
			}
		}
		_exit(shutdown(next.c, SHUT_WR) ? 3 : 0);
	}
	ASSERT_EQ(0, recv_all(next.s, buf, len));
	EXPECT_EQ(-1, differs(buf, len, 25, 0));
	EXPECT_EQ(0, recv(next.s, buf, 1, 0));
	ASSERT_EQ(pid, waitpid(pid, &st, 0));
	EXPECT_EQ(0, st);
	EXPECT_EQ(0, sender_wait(&snd));
	close(pipes[0]);
	close(pipes[1]);
	conn_close(&next);
}

/* ---- connections of other kinds ---- */

TEST_F(sockets, data_that_comes_with_the_syn_is_placed)
{
	struct sockaddr_storage addr;
	int l, c, s, backlog = 5, one = 1, was = 0;
	struct tcp_info info;
	socklen_t len, info_len = sizeof(info);
	uint64_t before;
	char buf[16];
	FILE *f;

	f = fopen("/proc/sys/net/ipv4/tcp_fastopen", "r+");
	ASSERT_NE(NULL, f);
	ASSERT_EQ(1, fscanf(f, "%d", &was));
	rewind(f);
	ASSERT_LT(0, fprintf(f, "%d", was | 3));
	ASSERT_EQ(0, fflush(f));
	l = listener(&self->net, self->s.fd, variant->how, &addr, &len);
	ASSERT_LE(0, l);
	ASSERT_EQ(0, setsockopt(l, IPPROTO_TCP, TCP_FASTOPEN, &backlog, sizeof(backlog)));
	ASSERT_EQ(0, setsockopt(l, IPPROTO_TCP, TCP_FASTOPEN_NO_COOKIE, &one, sizeof(one)));
	before = placed_bytes(&self->s);
	c = net_client(&self->net);
	ASSERT_LE(0, c);
	ASSERT_EQ(0, setsockopt(c, IPPROTO_TCP, TCP_FASTOPEN_NO_COOKIE, &one, sizeof(one)));
	ASSERT_EQ(10, sendto(c, "with a syn", 10, MSG_FASTOPEN, (void *)&addr, len)) TH_LOG("%m");
	s = accept(l, NULL, NULL);
	ASSERT_LE(0, s);
	ASSERT_EQ(0, timeout_set(s, 20000 * slowness()));
	ASSERT_EQ(0, recv_all(s, buf, 10));
	EXPECT_EQ(0, memcmp(buf, "with a syn", 10));
	ASSERT_EQ(0, getsockopt(c, IPPROTO_TCP, TCP_INFO, &info, &info_len));
	EXPECT_TRUE(info.tcpi_options & TCPI_OPT_SYN_DATA) TH_LOG("it did not come with the SYN");
	ASSERT_EQ(0, send_all(c, "after it", 8));
	ASSERT_EQ(0, recv_all(s, buf, 8));
	EXPECT_EQ(0, memcmp(buf, "after it", 8));
	EXPECT_EQ(attaches(variant->how) ? 18 : 0, placed_bytes(&self->s) - before);
	close(c);
	close(s);
	close(l);
	rewind(f);
	ASSERT_LT(0, fprintf(f, "%d", was));
	ASSERT_EQ(0, fclose(f));
}

TEST_F(sockets, deferred_accepts_wait_for_data)
{
	struct pollfd p = { .events = POLLIN };
	struct sockaddr_storage addr;
	int c, s, seconds = 5;
	uint64_t before;
	socklen_t len;
	char buf[8];

	p.fd = listener(&self->net, self->s.fd, variant->how, &addr, &len);
	ASSERT_LE(0, p.fd);
	ASSERT_EQ(0, setsockopt(p.fd, IPPROTO_TCP, TCP_DEFER_ACCEPT, &seconds, sizeof(seconds)));
	before = placed_bytes(&self->s);
	c = net_connect(&self->net, &addr, len);
	ASSERT_LE(0, c);
	EXPECT_EQ(0, poll(&p, 1, 200)) TH_LOG("accepted without data");
	ASSERT_EQ(0, send_all(c, "at last", 7));
	ASSERT_EQ(1, poll(&p, 1, 5000 * slowness()));
	s = accept(p.fd, NULL, NULL);
	ASSERT_LE(0, s);
	ASSERT_EQ(7, recv(s, buf, 8, MSG_DONTWAIT));
	EXPECT_EQ(0, memcmp(buf, "at last", 7));
	EXPECT_EQ(attaches(variant->how) ? 7 : 0, placed_bytes(&self->s) - before);
	close(c);
	close(s);
	close(p.fd);
}

TEST_F(sockets, of_two_listeners_on_a_port_each_has_its_own)
{
	enum { NR = 24 };
	struct sockaddr_storage addr;
	int l[2], c[NR], k, got[2] = {}, one = 1;
	socklen_t len;

	/* The first is attached, if the variant is; the other never. */
	for (k = 0; k < 2; k++) {
		if (!k) {
			int probe = net_listen(&self->net, &addr, &len);

			ASSERT_LE(0, probe);
			close(probe);
		}
		l[k] = socket(variant->family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
		ASSERT_LE(0, l[k]);
		ASSERT_EQ(0, setsockopt(l[k], SOL_SOCKET, SO_REUSEPORT, &one, sizeof(one)));
		if (!k && attaches(variant->how))
			ASSERT_EQ(0, sock_attach_opt(l[k], self->s.fd));
		ASSERT_EQ(0, bind(l[k], (void *)&addr, len));
		ASSERT_EQ(0, listen(l[k], 64));
	}
	for (k = 0; k < NR; k++) {
		c[k] = net_connect(&self->net, &addr, len);
		ASSERT_LE(0, c[k]);
		/* Before it is accepted. */
		ASSERT_EQ(0, send_all(c[k], "whose?", 6));
	}
	for (k = 0; k < 2; k++) {
		struct pmskb_sock_info i;
		char buf[8];
		int s;

		while ((s = accept(l[k], NULL, NULL)) >= 0) {
			got[k]++;
			ASSERT_EQ(0, timeout_set(s, 20000 * slowness()));
			ASSERT_EQ(0, recv_all(s, buf, 6));
			EXPECT_EQ(0, memcmp(buf, "whose?", 6));
			if (!k && attaches(variant->how)) {
				ASSERT_EQ(0, sock_info(s, &i));
				EXPECT_EQ(6, i.counters.placed_bytes);
			} else {
				EXPECT_NE(0, sock_info(s, &i)) TH_LOG("attached by the wrong listener");
			}
			close(s);
		}
	}
	EXPECT_EQ(NR, got[0] + got[1]);
	EXPECT_LT(0, got[0]);
	EXPECT_LT(0, got[1]);
	for (k = 0; k < NR; k++)
		close(c[k]);
	close(l[0]);
	close(l[1]);
}

TEST_F(sockets, a_socket_bound_to_a_device_receives_there)
{
	const char *dev = variant->link == LINK_LO ? "lo" : variant->link == LINK_VETH ? "pmskb-a" : "pmskb-p";
	struct sockaddr_storage addr;
	char buf[8], name[16] = "";
	struct pmskb_sock_info i;
	socklen_t len, name_len;
	int l, c, s;

	l = listener(&self->net, self->s.fd, variant->how, &addr, &len);
	ASSERT_LE(0, l);
	ASSERT_EQ(0, setsockopt(l, SOL_SOCKET, SO_BINDTODEVICE, dev, strlen(dev)));
	c = net_connect(&self->net, &addr, len);
	ASSERT_LE(0, c);
	ASSERT_EQ(0, send_all(c, "device", 6));
	s = accept(l, NULL, NULL);
	ASSERT_LE(0, s);
	name_len = sizeof(name);
	ASSERT_EQ(0, getsockopt(s, SOL_SOCKET, SO_BINDTODEVICE, name, &name_len));
	EXPECT_EQ(0, strcmp(dev, name));
	ASSERT_EQ(0, timeout_set(s, 20000 * slowness()));
	ASSERT_EQ(0, recv_all(s, buf, 6));
	EXPECT_EQ(0, memcmp(buf, "device", 6));
	if (attaches(variant->how)) {
		ASSERT_EQ(0, sock_info(s, &i));
		EXPECT_EQ(6, i.counters.placed_bytes);
	}
	close(c);
	close(s);
	close(l);
}

/* ---- what a socket says of itself ---- */

TEST_F(sockets, tcp_info_counts_what_arrived)
{
	static char buf[100000];
	struct tcp_info i = {};
	socklen_t len = sizeof(i);

	ASSERT_EQ(0, send_all(self->c.c, buf, sizeof(buf)));
	ASSERT_EQ(0, recv_all(self->c.s, buf, sizeof(buf)));
	ASSERT_EQ(0, send_all(self->c.s, buf, 77));
	ASSERT_EQ(0, recv_all(self->c.c, buf, 77));
	ASSERT_EQ(0, getsockopt(self->c.s, IPPROTO_TCP, TCP_INFO, &i, &len));
	EXPECT_EQ(1 /* TCP_ESTABLISHED */, i.tcpi_state);
	EXPECT_EQ(sizeof(buf), i.tcpi_bytes_received);
	EXPECT_EQ(77, i.tcpi_bytes_sent);
	EXPECT_LT(0, i.tcpi_data_segs_in);
}

TEST_F(sockets, the_napi_id_and_busy_polling_are_as_before)
{
	unsigned int id = 0;
	int us = 50, back = 0;
	socklen_t len = sizeof(id);
	char buf[4];

	/* Makes veth's receive a NAPI instance, for what comes without TSO. */
	if (variant->link == LINK_PLAIN)
		ASSERT_EQ(0, sh("ethtool -K pmskb-p gro on"));
	ASSERT_EQ(0, setsockopt(self->c.s, SOL_SOCKET, SO_BUSY_POLL, &us, sizeof(us)));
	ASSERT_EQ(0, send_all(self->c.c, "napi", 4));
	ASSERT_EQ(0, recv_all(self->c.s, buf, 4));
	ASSERT_EQ(0, send_all(self->c.c, "napi", 4));
	ASSERT_EQ(0, recv_all(self->c.s, buf, 4));
	EXPECT_EQ(0, memcmp(buf, "napi", 4));
	ASSERT_EQ(0, getsockopt(self->c.s, SOL_SOCKET, SO_INCOMING_NAPI_ID, &id, &len));
	if (variant->link == LINK_PLAIN) {
		EXPECT_LT(0, id);
		ASSERT_EQ(0, sh("ethtool -K pmskb-p gro off"));
	}
	len = sizeof(back);
	ASSERT_EQ(0, getsockopt(self->c.s, SOL_SOCKET, SO_BUSY_POLL, &back, &len));
	EXPECT_EQ(us, back);
}

/* A socket of IPv6 that has come to an IPv4 peer may be made one of IPv4: unless attached. */
TEST_F(sockets, an_attached_socket_stays_of_its_family)
{
	struct sockaddr_in6 addr = { .sin6_family = AF_INET6 };
	struct sockaddr_in to = { .sin_family = AF_INET };
	int l, c, s, family = AF_INET, zero = 0;
	struct pmskb_sock_info info;
	socklen_t len = sizeof(addr);
	char buf[4];

	l = socket(AF_INET6, SOCK_STREAM | SOCK_CLOEXEC, 0);
	ASSERT_LE(0, l);
	ASSERT_EQ(0, setsockopt(l, IPPROTO_IPV6, IPV6_V6ONLY, &zero, sizeof(zero)));
	ASSERT_EQ(0, bind(l, (void *)&addr, len));
	if (attaches(variant->how))
		ASSERT_EQ(0, sock_attach_ioctl(l, self->s.fd));
	ASSERT_EQ(0, listen(l, 5));
	ASSERT_EQ(0, getsockname(l, (void *)&addr, &len));
	c = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	to.sin_port = addr.sin6_port;
	to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	ASSERT_EQ(0, connect(c, (void *)&to, sizeof(to)));
	s = accept(l, NULL, NULL);
	ASSERT_LE(0, s);
	EXPECT_EQ(attaches(variant->how) ? EBUSY : 0,
		  ERRNO(setsockopt(s, IPPROTO_IPV6, IPV6_ADDRFORM, &family, sizeof(family))));
	/* Afterwards it is one of IPv4, and attached as such. */
	if (!attaches(variant->how))
		ASSERT_EQ(0, sock_attach_ioctl(s, self->s.fd));
	ASSERT_EQ(0, send_all(c, "abcd", 4));
	ASSERT_EQ(0, recv_all(s, buf, 4));
	EXPECT_EQ(0, memcmp(buf, "abcd", 4));
	ASSERT_EQ(0, sock_info(s, &info));
	EXPECT_EQ(4, info.counters.placed_bytes);
	close(c);
	close(s);
	close(l);
}

/* ---- a socket that could not be attached ---- */

#define INJECT "/sys/module/pmskb/parameters/inject"

/* In a module that was built for it, where every nth allocation fails: rust/inject.rs. */
static int inject(const char *nth)
{
	int fd = open(INJECT, O_WRONLY | O_CLOEXEC), err;

	if (fd < 0)
		return -errno;
	err = write(fd, nth, strlen(nth)) < 0 ? -errno : 0;
	close(fd);
	return err;
}

TEST(a_socket_that_could_not_be_attached_can_do_what_it_could)
{
	static char out[50000], in[50000];
	struct net net = { AF_INET, LINK_LO };
	struct io_uring_sqe sqe = { .opcode = IORING_OP_SEND_ZC, .addr = PTR(out), .len = sizeof(out) };
	struct io_uring_cqe cqe;
	const char *why;
	struct store s;
	struct conn c;
	struct ring r;

	if (access(INJECT, F_OK))
		SKIP(return, "the module was built without PMSKB_INJECT=1");
	if (!dev_path(DEV_PMEM, &why))
		SKIP(return, "%s", why);
	ASSERT_EQ(0, store_make(&s, DEV_PMEM, 0, 0));
	ASSERT_EQ(0, conn_make(&c, &net, -1, HOW_PLAIN));
	ASSERT_EQ(0, inject("1"));
	EXPECT_EQ(-ENOMEM, sock_attach_ioctl(c.s, s.fd));
	ASSERT_EQ(0, inject("0"));
	ASSERT_EQ(0, ring_make(&r, 0));
	fill(out, sizeof(out), 26, 0);
	sqe.fd = c.s;
	ASSERT_EQ(0, ring_submit(&r, &sqe));
	ASSERT_EQ(0, ring_wait(&r, &cqe));
	ASSERT_EQ(sizeof(out), cqe.res) TH_LOG("%s", strerror(-cqe.res));
	ASSERT_EQ(0, recv_all(c.c, in, sizeof(in)));
	EXPECT_EQ(-1, differs(in, sizeof(in), 26, 0));
	ring_close(&r);
	/* And be attached after all. */
	EXPECT_EQ(0, sock_attach_ioctl(c.s, s.fd));
	conn_close(&c);
	EXPECT_EQ(0, store_close(&s));
}

TEST_HARNESS_MAIN
