// SPDX-License-Identifier: GPL-2.0
/*
 * Promises about what many packets do together: networks that lose, reorder, duplicate and
 * corrupt, thousands of connections, little memory, and a store whose frames come and go. Plain
 * sockets are in each test for comparison.
 *
 * Each test has two network namespaces of its own, this one and the client's, that nobody
 * else can see, and that go when its process ends.
 */
#include "common.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/tcp.h>
#include <poll.h>
#include <sched.h>
#include <sys/ioctl.h>
#include <sys/resource.h>
#include <time.h>

#include "harness.h"

enum mode { PLAIN, BYTES, DESC, MODES };
static const char *const modes[] = { "plain", "bytes", "desc" };

enum { MAX_DESC = 8192, MAX_READ = 1 << 18 };
static struct pmskb_desc d[MAX_DESC];
static uint8_t buf[MAX_READ];

/* A store, and two network namespaces. */
struct field {
	struct store s;
	int here, there;
};

FIXTURE(load) {
	struct field f;
};

FIXTURE_VARIANT(load) {
	int family;
	enum dev dev;
	/* Without, each segment comes alone, with a checksum that nobody has looked at. */
	bool offload;
};

FIXTURE_VARIANT_ADD(load, v4_pmem) { AF_INET, DEV_PMEM, true };
FIXTURE_VARIANT_ADD(load, v6_dax_noffload) { AF_INET6, DEV_DAX, false };

static const char *field_up(int *here, int *there, bool offload)
{
	static const char off[] = "tx off rx off tso off gso off gro off sg off >/dev/null";
	int pid = getpid();

	if (!have_program("ip"))
		return "there is no ip program";
	if (unshare(CLONE_NEWNET))
		return "cannot make a network namespace";
	*there = open("/proc/thread-self/ns/net", O_RDONLY | O_CLOEXEC);
	if (sh("ip link set lo up") || unshare(CLONE_NEWNET))
		return "cannot make a network namespace";
	*here = open("/proc/thread-self/ns/net", O_RDONLY | O_CLOEXEC);
	if (sh("ip link set lo up && ip link add pmskb-c type veth peer name pmskb-d &&"
	       "ip link set pmskb-d netns /proc/%d/fd/%d", pid, *there))
		return "cannot make a veth pair";
	if (!offload && (!have_program("ethtool") || sh("ethtool -K pmskb-c %s", off)))
		return "cannot switch offloads off";
	if (sh("ip addr add 10.77.4.1/24 dev pmskb-c && ip addr add fd77:4::1/64 dev pmskb-c nodad && ip link set pmskb-c up"))
		return "cannot set addresses";
	if (setns(*there, CLONE_NEWNET))
		return "cannot enter a network namespace";
	if (!offload && sh("ethtool -K pmskb-d %s", off))
		return "cannot switch offloads off";
	if (sh("ip addr add 10.77.4.2/24 dev pmskb-d && ip addr add fd77:4::2/64 dev pmskb-d nodad && ip link set pmskb-d up"))
		return "cannot set addresses";
	if (setns(*here, CLONE_NEWNET))
		return "cannot enter a network namespace";
	return NULL;
}

FIXTURE_SETUP(load)
{
	const char *why;

	if (!dev_path(variant->dev, &why))
		SKIP(return, "%s", why);
	why = field_up(&self->f.here, &self->f.there, variant->offload);
	if (why)
		SKIP(return, "%s", why);
	ASSERT_EQ(0, store_make(&self->f.s, variant->dev, 0, 0));
}

FIXTURE_TEARDOWN(load)
{
	EXPECT_EQ(0, store_close(&self->f.s));
}

static int server(struct __test_metadata *_metadata, int family, struct sockaddr_storage *addr, socklen_t *len,
		  int rcvbuf)
{
	struct sockaddr_in6 *a6 = (void *)addr;
	struct sockaddr_in *a4 = (void *)addr;
	int fd, k, err = -1;

	memset(addr, 0, sizeof(*addr));
	addr->ss_family = family;
	*len = family == AF_INET ? sizeof(*a4) : sizeof(*a6);
	inet_pton(AF_INET, "10.77.4.1", &a4->sin_addr);
	if (family == AF_INET6) {
		memset(addr, 0, sizeof(*addr));
		addr->ss_family = family;
		inet_pton(AF_INET6, "fd77:4::1", &a6->sin6_addr);
	}
	fd = socket(family, SOCK_STREAM | SOCK_CLOEXEC, 0);
	ASSERT_LE(0, fd);
	if (rcvbuf)
		setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &rcvbuf, sizeof(rcvbuf));
	for (k = 0; k < 500 * slowness() && err; k++) {
		err = bind(fd, (void *)addr, *len);
		if (err)
			usleep(10000);
	}
	ASSERT_EQ(0, err) TH_LOG("%s", strerror(errno));
	ASSERT_EQ(0, listen(fd, 1024));
	ASSERT_EQ(0, getsockname(fd, (void *)addr, len));
	return fd;
}

/* A client of it, connected, in the other namespace. */
static int client(struct __test_metadata *_metadata, int here, int there, const struct sockaddr_storage *addr,
		  socklen_t len)
{
	int fd;

	ASSERT_EQ(0, setns(there, CLONE_NEWNET));
	fd = socket(addr->ss_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
	ASSERT_EQ(0, setns(here, CLONE_NEWNET));
	ASSERT_LE(0, fd);
	ASSERT_EQ(0, connect(fd, (const void *)addr, len)) TH_LOG("%s", strerror(errno));
	return fd;
}

/* A connection; the server's end is attached as `mode` says. */
static struct conn connection(struct __test_metadata *_metadata, const struct field *f, int family,
			      enum mode mode, int rcvbuf)
{
	struct sockaddr_storage addr;
	int l, one = 1;
	struct conn c;
	socklen_t len;

	l = server(_metadata, family, &addr, &len, rcvbuf);
	if (mode != PLAIN) {
		ASSERT_EQ(0, sock_attach_ioctl(l, f->s.fd));
	}
	if (mode == DESC) {
		ASSERT_EQ(0, sock_mode(l, PMSKB_RX_DESC));
	}
	c.c = client(_metadata, f->here, f->there, &addr, len);
	c.s = accept4(l, NULL, NULL, SOCK_CLOEXEC);
	ASSERT_LE(0, c.s);
	close(l);
	setsockopt(c.c, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
	timeout_set(c.s, 30000 * slowness());
	return c;
}

/*
 * One receive of up to max bytes, checked against stream seed at pos. How many, or -errno. Of
 * descriptors every 16th stays held, up to *held.
 */
static ssize_t take(struct __test_metadata *_metadata, const struct store *s, int fd, enum mode mode, size_t max,
		    uint32_t seed, uint64_t pos, unsigned int *held)
{
	static char control[256 * CMSG_SPACE(sizeof(struct pmskb_desc))];
	struct iovec iov = { buf, max };
	struct msghdr msg = {
		.msg_iov = &iov,
		.msg_iovlen = 1,
		.msg_control = control,
		.msg_controllen = sizeof(control),
	};
	struct cmsghdr *c;
	ssize_t n, sum = 0;

	n = recvmsg(fd, &msg, 0);
	if (n < 0)
		return -errno;
	if (mode != DESC) {
		EXPECT_EQ(-1, differs(buf, n, seed, pos)) TH_LOG("%s: at %lu", modes[mode], pos);
		return n;
	}
	for (c = CMSG_FIRSTHDR(&msg); c; c = CMSG_NXTHDR(&msg, c)) {
		struct pmskb_desc e;

		memcpy(&e, CMSG_DATA(c), sizeof(e));
		EXPECT_EQ(-1, differs(s->map + e.offset, e.len, seed, pos + sum))
			TH_LOG("desc: at %lu", pos + sum);
		sum += e.len;
		if (*held < MAX_DESC && e.token % 16 == 0)
			d[(*held)++] = e;
		else
			EXPECT_EQ(0, desc_release(fd, e.token, 1));
	}
	EXPECT_EQ(sum, n);
	return n;
}

static void all_back(struct __test_metadata *_metadata, const struct store *s, struct pmskb_store_info *now)
{
	ASSERT_EQ(0, store_back(s, 10000, now))
		TH_LOG("%llu sockets, %llu tokens, %llu frames held, %llu frames of %llu and %llu heads of %llu free",
		       now->sockets, now->tokens, now->frames_held, now->frames_free, s->info.frames_free,
		       now->heads_free, s->info.heads_free);
	ASSERT_EQ(0, store_drained(s, now)) TH_LOG("%llu frames held", now->frames_held);
}

/* Sends len bytes, receives them, and has everything back. */
static void transfer(struct __test_metadata *_metadata, const struct field *f, int family, enum mode mode,
		     const char *name, uint64_t len, size_t max_write)
{
	struct conn c = connection(_metadata, f, family, mode, 0);
	struct pmskb_store_info was, now;
	unsigned int held = 0;
	struct sender snd;
	uint64_t pos = 0;
	ssize_t n;

	ASSERT_EQ(0, store_info(&f->s, &was));
	ASSERT_EQ(0, sender_start(&snd, c.c, 31, len, max_write, true));
	close(c.c);
	c.c = -1;
	while ((n = take(_metadata, &f->s, c.s, mode, sizeof(buf), 31, pos, &held)) > 0 && !_metadata->exit_code)
		pos += n;
	EXPECT_EQ(0, n) TH_LOG("%s: after %lu bytes: %s", modes[mode], pos, strerror(-n));
	EXPECT_EQ(len, pos);
	conn_close(&c);
	EXPECT_EQ(0, sender_wait(&snd));
	all_back(_metadata, &f->s, &now);
	if (mode != PLAIN)
		ksft_print_msg("%s v%d %s: %s\n", name, family == AF_INET ? 4 : 6, modes[mode],
			       counters_since(&now.counters, &was.counters));
}

/* ---- a bad network ---- */

TEST_F_TIMEOUT(load, loss_reordering_duplication_and_corruption, 200)
{
	static const struct {
		const char *name, *what;
	} bad[] = {
		{ "loss", "loss 3%" },
		{ "reordering", "delay 1ms reorder 30% 50%" },
		{ "duplication", "duplicate 10%" },
		{ "corruption", "corrupt 10%" },
		{ "all", "delay 1ms reorder 20% 50% loss 1% duplicate 3% corrupt 1%" },
	};
	uint64_t len = env_number("PMSKB_TEST_NETEM_KB", 700) << 10;
	unsigned int k;
	enum mode mode;

	if (!have_program("tc"))
		SKIP(return, "there is no tc program");
	for (k = 0; k < ARRAY_LEN(bad); k++) {
		/* The sum that a device says is right cannot be proved wrong by corrupting the bytes. */
		if (variant->offload && strstr(bad[k].what, "corrupt"))
			continue;
		ASSERT_EQ(0, setns(self->f.there, CLONE_NEWNET));
		if (sh("tc qdisc replace dev pmskb-d root netem limit 10000 %s", bad[k].what))
			SKIP(return, "there is no netem");
		ASSERT_EQ(0, setns(self->f.here, CLONE_NEWNET));
		for (mode = BYTES; mode < MODES; mode++)
			transfer(_metadata, &self->f, variant->family, mode, bad[k].name, len, 20000);
	}
}

/* ---- many connections ---- */

/* Objects of kmalloc() in use. */
static unsigned long objects(void)
{
	unsigned long sum = 0, active;
	char line[512], name[64];
	FILE *f = fopen("/proc/slabinfo", "r");

	while (f && fgets(line, sizeof(line), f))
		if (sscanf(line, "%63s %lu", name, &active) == 2 && !strncmp(name, "kmalloc-", 8))
			sum += active;
	if (f)
		fclose(f);
	return sum;
}

static size_t of_connection(unsigned int k)
{
	return 1 + k * 7919 % 900;
}

static void many(struct __test_metadata *_metadata, const struct field *f, int family, unsigned int nr,
		 bool over_lo)
{
	struct conn *c = calloc(nr, sizeof(*c));
	struct pmskb_store_info was, now;
	struct sockaddr_storage addr;
	unsigned int k, held = 0;
	socklen_t len;
	ssize_t n;
	int l;

	ASSERT_EQ(0, store_info(&f->s, &was));
	l = server(_metadata, family, &addr, &len, 0);
	ASSERT_EQ(0, sock_attach_ioctl(l, f->s.fd));
	for (k = 0; k < nr; k++) {
		c[k].c = client(_metadata, f->here, over_lo ? f->here : f->there, &addr, len);
		fill(buf, of_connection(k), k, 0);
		/* Some before they are accepted. */
		if (k % 3 == 0)
			ASSERT_EQ(0, send_all(c[k].c, buf, of_connection(k)));
		c[k].s = accept4(l, NULL, NULL, SOCK_CLOEXEC);
		ASSERT_LE(0, c[k].s);
		if (k % 3)
			ASSERT_EQ(0, send_all(c[k].c, buf, of_connection(k)));
	}
	ASSERT_EQ(0, store_info(&f->s, &now));
	EXPECT_EQ(nr + 1, now.sockets);
	EXPECT_LE(nr, now.counters.placed - was.counters.placed);
	for (k = 0; k < nr; k++) {
		enum mode mode = k % 2 ? DESC : BYTES;
		size_t got = 0;

		if (mode == DESC)
			ASSERT_EQ(0, sock_mode(c[k].s, PMSKB_RX_DESC));
		timeout_set(c[k].s, 20000 * slowness());
		while (got < of_connection(k)) {
			n = take(_metadata, &f->s, c[k].s, mode, sizeof(buf), k, got, &held);
			ASSERT_LT(0, n) TH_LOG("connection %u: %s", k, strerror(-n));
			got += n;
		}
		EXPECT_EQ(of_connection(k), got);
	}
	for (k = 0; k < nr; k++) {
		/* Who is first; with a reset, some. */
		if (k % 5 == 0)
			send(c[k].c, "unread", 6, MSG_NOSIGNAL);
		close(k & 1 ? c[k].s : c[k].c);
		close(k & 1 ? c[k].c : c[k].s);
	}
	close(l);
	free(c);
	all_back(_metadata, &f->s, &now);
	ksft_print_msg("%u connections over %s: %s\n", nr, over_lo ? "lo" : "veth",
		       counters_since(&now.counters, &was.counters));
}

TEST_F_TIMEOUT(load, thousands_of_connections_at_once, 200)
{
	unsigned int nr = env_number("PMSKB_TEST_AT_ONCE", 5000), k;
	struct rlimit lim = { nr * 2 + 200, nr * 2 + 200 };
	long references = module_references();
	unsigned long before, after = 0, spare;
	bool over_lo = variant->offload;

	if (!variant->offload)
		nr /= 10;
	ASSERT_EQ(0, setrlimit(RLIMIT_NOFILE, &lim));
	/* What stays after the first ones is not lost. */
	many(_metadata, &self->f, variant->family, nr / 10, over_lo);
	spare = nr / 2 > 1500 ? nr / 2 : 1500;
	before = objects();
	many(_metadata, &self->f, variant->family, nr, over_lo);
	/* Less than one for two connections; of few it cannot be told, for slabs count as full. */
	for (k = 0; k < 200; k++) {
		after = objects();
		if (after < before + spare)
			break;
		usleep(20000);
	}
	/* KASAN keeps what was freed for a while; where kmemleak is, it finds what is lost. */
	if (access("/sys/kernel/debug/kmemleak", F_OK))
		EXPECT_GT(before + spare, after);
	ksft_print_msg("%u connections: %lu objects before, %lu after\n", nr, before, after);
	for (k = 0; k < 500 && module_references() != references; k++)
		usleep(20000);
	EXPECT_EQ(references, module_references());
}

/* ---- little memory ---- */

TEST_F_TIMEOUT(load, a_small_receive_buffer_and_a_slow_reader, 100)
{
	enum { LEN = 300000 };
	struct pmskb_store_info was, now;
	unsigned int k;
	enum mode mode;

	/* Reordered, so that much of it waits behind holes. */
	ASSERT_EQ(0, setns(self->f.there, CLONE_NEWNET));
	if (sh("tc qdisc replace dev pmskb-d root netem limit 10000 delay 1ms reorder 30%% 50%%"))
		SKIP(return, "there is no netem");
	ASSERT_EQ(0, setns(self->f.here, CLONE_NEWNET));
	for (mode = PLAIN; mode < MODES; mode++) {
		struct conn c = connection(_metadata, &self->f, variant->family, mode, 6000);
		unsigned int held = 0;
		struct sender snd;
		uint64_t pos = 0;
		ssize_t n = 1;

		ASSERT_EQ(0, store_info(&self->f.s, &was));
		ASSERT_EQ(0, sender_start(&snd, c.c, 32, LEN, 150, true));
		close(c.c);
		c.c = -1;
		for (k = 0; n > 0; k++, pos += n) {
			/* Now and then it lets things come to a stop. */
			if (k % 64 == 0)
				usleep(5000);
			n = take(_metadata, &self->f.s, c.s, mode, k % 5 ? 2000 : 17, 32, pos, &held);
			ASSERT_LE(0, n) TH_LOG("%s: after %lu bytes: %s", modes[mode], pos, strerror(-n));
		}
		EXPECT_EQ(LEN, pos);
		conn_close(&c);
		EXPECT_EQ(0, sender_wait(&snd));
		all_back(_metadata, &self->f.s, &now);
		if (mode != PLAIN)
			ksft_print_msg("small buffer %s: %s\n", modes[mode],
				       counters_since(&now.counters, &was.counters));
	}
}

/* Takes all frames, though others take some at the same time. */
static int frames_out(struct __test_metadata *_metadata, const struct store *s, int *fds, int nr)
{
	struct pmskb_store_info i;
	int n = 0, tries;

	for (tries = 0; tries < nr; tries++) {
		struct pmskb_alloc a = {};

		ASSERT_EQ(0, store_info(s, &i));
		if (i.frames_free <= i.frames_reserve)
			break;
		a.len = (i.frames_free - i.frames_reserve) * PMSKB_FRAME_SIZE;
		if (a.len > PMSKB_MAX_BUFFER)
			a.len = PMSKB_MAX_BUFFER;
		if (!ioctl(s->fd, PMSKB_IOC_ALLOC, &a))
			fds[n++] = a.fd;
		else
			ASSERT_EQ(ENOSPC, errno);
	}
	return n;
}

/* Frames run out and come back while data arrives; nothing is lost, and nothing stops. */
TEST_F_TIMEOUT(load, frames_that_come_and_go, 100)
{
	enum { LEN = 2000000 };
	int most[64], last[64], nr_most, nr_last = 0;
	struct pmskb_store_info was, now;
	enum mode mode;

	nr_most = store_scarce(&self->f.s, 300, most, ARRAY_LEN(most));
	ASSERT_LT(0, nr_most);
	for (mode = BYTES; mode < MODES; mode++) {
		struct conn c = connection(_metadata, &self->f, variant->family, mode, 0);
		unsigned int held = 0, k, short_of = 0;
		struct sender snd;
		uint64_t pos = 0;
		ssize_t n = 1;

		ASSERT_EQ(0, store_info(&self->f.s, &was));
		ASSERT_EQ(0, sender_start(&snd, c.c, 33, LEN, 30000, true));
		close(c.c);
		c.c = -1;
		for (k = 0; n; k++) {
			if (k % 10 == 0 && !nr_last)
				nr_last = frames_out(_metadata, &self->f.s, last, ARRAY_LEN(last));
			n = take(_metadata, &self->f.s, c.s, mode, 30000, 33, pos, &held);
			if (n == -ENOBUFS) {
				/* Nothing was consumed: as soon as there are frames, it goes on. */
				short_of++;
				EXPECT_EQ(DESC, mode);
				ASSERT_LT(0, nr_last + held) TH_LOG("there are frames");
				EXPECT_EQ(0, desc_release_all(c.s, d, held));
				held = 0;
			}
			if (n == -ENOBUFS || k % 10 == 5)
				while (nr_last > 0)
					close(last[--nr_last]);
			if (n == -ENOBUFS)
				continue;
			ASSERT_LE(0, n) TH_LOG("%s: after %lu bytes: %s", modes[mode], pos, strerror(-n));
			pos += n;
		}
		while (nr_last > 0)
			close(last[--nr_last]);
		EXPECT_EQ(LEN, pos);
		conn_close(&c);
		EXPECT_EQ(0, sender_wait(&snd));
		ASSERT_EQ(0, store_info(&self->f.s, &now));
		EXPECT_EQ(0, now.tokens);
		EXPECT_LT(was.counters.unplaced[PMSKB_UNPLACED_NO_FRAME], now.counters.unplaced[PMSKB_UNPLACED_NO_FRAME])
			TH_LOG("frames never ran out");
		ksft_print_msg("frames come and go %s: %s; %u times too few to describe\n", modes[mode],
			       counters_since(&now.counters, &was.counters), short_of);
	}
	while (nr_most > 0)
		close(most[--nr_most]);
	all_back(_metadata, &self->f.s, &now);
}

/* ---- speed ---- */

static double now_s(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec + t.tv_nsec / 1e9;
}

/* Nothing is asserted of time: a line says how attached sockets compare with plain ones. */
TEST_F_TIMEOUT(load, speed_beside_plain_sockets, 200)
{
	static const struct {
		size_t write;
		uint64_t len;
	} kinds[] = { { 200, 200000 }, { 256 * 1024, 4 << 20 } };
	unsigned int k, round, rounds = env_number("PMSKB_TEST_SPEED_ROUNDS", 2);
	enum mode mode;

	for (k = 0; k < ARRAY_LEN(kinds); k++) {
		double took[MODES] = {};
		uint64_t window[MODES] = {}, again[MODES] = {};

		for (round = 0; round < rounds; round++) {
			for (mode = PLAIN; mode < MODES; mode++) {
				struct conn c = connection(_metadata, &self->f, variant->family, mode, 0);
				struct tcp_info info = {};
				socklen_t size = sizeof(info);
				uint64_t pos = 0;
				unsigned int held = MAX_DESC;
				struct sender snd;
				double start = now_s();
				ssize_t n;

				ASSERT_EQ(0, sender_start(&snd, c.c, 34, kinds[k].len, kinds[k].write, true));
				while ((n = take(_metadata, &self->f.s, c.s, mode, sizeof(buf), 34, pos, &held)) > 0)
					pos += n;
				took[mode] += now_s() - start;
				EXPECT_EQ(kinds[k].len, pos);
				EXPECT_EQ(0, sender_wait(&snd));
				ASSERT_EQ(0, getsockopt(c.s, IPPROTO_TCP, TCP_INFO, &info, &size));
				if (info.tcpi_rcv_ssthresh > window[mode])
					window[mode] = info.tcpi_rcv_ssthresh;
				size = sizeof(info);
				ASSERT_EQ(0, getsockopt(c.c, IPPROTO_TCP, TCP_INFO, &info, &size));
				again[mode] += info.tcpi_total_retrans;
				conn_close(&c);
			}
		}
		ksft_print_msg("writes of up to %zu bytes: %.1f MB/s plain; bytes %.2f, desc %.2f of it; window %lu, %lu, %lu; sent again %lu, %lu, %lu\n",
			       kinds[k].write, rounds * kinds[k].len / took[PLAIN] / 1e6,
			       took[PLAIN] / took[BYTES], took[PLAIN] / took[DESC], window[PLAIN],
			       window[BYTES], window[DESC], again[PLAIN], again[BYTES], again[DESC]);
	}
}

TEST_HARNESS_MAIN
