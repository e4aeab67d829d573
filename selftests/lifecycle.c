// SPDX-License-Identifier: GPL-2.0
/*
 * Promises about coming and going: references that are exact however sockets
 * end, detach, the device's driver leaving, and packet filters on the way.
 * What needs the module unloaded is in shell.sh.
 */
#include "common.h"
#include "media.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/sockios.h>
#include <linux/tcp.h>
#include <poll.h>
#include <sched.h>
#include <setjmp.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <time.h>

#include "harness.h"

#define ERRNO(call) ((call) < 0 ? errno : 0)

FIXTURE(life) {
	struct store s;
	long references;
};

FIXTURE_VARIANT(life) {
	int family;
	enum dev dev;
	enum link link;
};

FIXTURE_VARIANT_ADD(life, v4_pmem_lo) { AF_INET, DEV_PMEM, LINK_LO };
FIXTURE_VARIANT_ADD(life, v6_dax_veth) { AF_INET6, DEV_DAX, LINK_VETH };

FIXTURE_SETUP(life)
{
	const char *why;

	if (!dev_path(variant->dev, &why))
		SKIP(return, "%s", why);
	why = net_up(variant->link);
	if (why)
		SKIP(return, "%s", why);
	ASSERT_EQ(0, store_make(&self->s, variant->dev, 0, 0));
	self->references = module_references();
}

FIXTURE_TEARDOWN(life)
{
	EXPECT_EQ(0, store_close(&self->s));
}

/* All that sockets had is back. */
static void all_back(struct __test_metadata *_metadata, struct store *s, long references)
{
	struct pmskb_store_info info;
	int k;

	EXPECT_EQ(0, store_back(s, 10000, &info));
	EXPECT_EQ(0, info.sockets);
	EXPECT_EQ(0, info.tokens);
	EXPECT_GE(info.frames_free + STORE_SLACK, s->info.frames_free);
	EXPECT_GE(info.heads_free + STORE_SLACK, s->info.heads_free);
	for (k = 0; k < 500 && module_references() != references; k++)
		usleep(20000);
	EXPECT_EQ(references, module_references()) TH_LOG("references to the module");
}

/* Attaches, in a process that is killed after so many microseconds; whether there is a store then. */
static bool attached_when_killed(struct __test_metadata *_metadata, const char *dev, int64_t us)
{
	pid_t pid = fork();
	unsigned int minor;
	int ctl, status;

	ASSERT_LE(0, pid);
	if (!pid) {
		struct pmskb_attach a;

		_exit(dev_attach(ctl_open(), open(dev, O_RDWR), &a) ? 1 : 0);
	}
	usleep(us);
	kill(pid, SIGKILL);
	ASSERT_EQ(pid, waitpid(pid, &status, 0));
	EXPECT_TRUE(WIFSIGNALED(status) || !WEXITSTATUS(status)) TH_LOG("status %d", status);
	ctl = ctl_open();
	ASSERT_LE(0, ctl);
	for (minor = 0; minor < 8 && dev_detach(ctl, minor, 4000 * slowness()); minor++)
		;
	close(ctl);
	return minor < 8;
}

TEST_F_TIMEOUT(life, an_attach_that_is_killed_leaves_nothing_behind, 300)
{
	enum { NR = 60, EACH = 1000, TRIES = 24 };
	static struct pmskb_result res[EACH];
	static struct pmskb_op ops[EACH];
	static char keys[EACH][16];
	struct timespec from, to;
	const char *dev, *why;
	int i, k, none = 0;
	int64_t whole;

	for (i = 0; i < NR; i++) {
		for (k = 0; k < EACH; k++) {
			ops[k] = (struct pmskb_op) {
				.opcode = PMSKB_OP_PUT, .fd = -1, .key = (uint64_t)keys[k],
				.key_len = snprintf(keys[k], sizeof(keys[k]), "%d/%d", k, i),
			};
		}
		ASSERT_EQ(0, submit(self->s.fd, ops, res, EACH));
		ASSERT_LT(0, res[EACH - 1].res);
	}
	ASSERT_EQ(0, store_close(&self->s));
	dev = dev_path(variant->dev, &why);
	clock_gettime(CLOCK_MONOTONIC, &from);
	ASSERT_EQ(0, store_open(&self->s, variant->dev));
	clock_gettime(CLOCK_MONOTONIC, &to);
	ASSERT_EQ(0, store_close(&self->s));
	whole = (to.tv_sec - from.tv_sec) * 1000000LL + (to.tv_nsec - from.tv_nsec) / 1000;
	for (k = 1; k < TRIES; k++)
		none += !attached_when_killed(_metadata, dev, whole * k / TRIES);
	TH_LOG("attaching took %lld us; %d of %d were killed before", (long long)whole, none, TRIES - 1);
	EXPECT_LT(TRIES / 4, none);
	ASSERT_EQ(0, store_open(&self->s, variant->dev));
	EXPECT_EQ(NR * EACH, self->s.info.records);
}

TEST_F_TIMEOUT(life, references_are_exact_over_thousands_of_accepts_and_closes, 600)
{
	unsigned long nr = env_number("PMSKB_TEST_CONNS", 2000), i;
	struct net net = { variant->family, variant->link };
	struct linger lin = { 1, 0 };
	struct sockaddr_storage addr;
	struct pmskb_desc d[8];
	socklen_t len;
	int l, c, s;

	if (variant->link != LINK_LO)
		nr /= 4;
	l = net_listen(&net, &addr, &len);
	ASSERT_LE(0, l);
	ASSERT_EQ(0, sock_attach_opt(l, self->s.fd));
	ASSERT_EQ(0, sock_mode(l, PMSKB_RX_DESC));
	for (i = 0; i < nr; i++) {
		c = net_connect(&net, &addr, len);
		ASSERT_LE(0, c) TH_LOG("connection %lu: %s", i, strerror(-c));
		switch (i % 8) {
		case 0: /* the client leaves before it is accepted */
			if (i % 16)
				setsockopt(c, SOL_SOCKET, SO_LINGER, &lin, sizeof(lin));
			send(c, "x", 1, MSG_NOSIGNAL);
			close(c);
			s = accept(l, NULL, NULL);
			if (s >= 0)
				close(s);
			continue;
		case 1: /* bytes unread: closing resets */
			send_all(c, "unread", 6);
			break;
		case 2: /* tokens held */
			send_all(c, "held", 4);
			break;
		}
		s = accept(l, NULL, NULL);
		ASSERT_LE(0, s);
		switch (i % 8) {
		case 2:
			ASSERT_EQ(1, desc_recv_bytes(s, d, 8, 4));
			close(s);
			close(c);
			break;
		case 3: /* the server resets */
			setsockopt(s, SOL_SOCKET, SO_LINGER, &lin, sizeof(lin));
			close(s);
			close(c);
			break;
		case 4: /* the client resets */
			setsockopt(c, SOL_SOCKET, SO_LINGER, &lin, sizeof(lin));
			close(c);
			close(s);
			break;
		case 5: /* the client first: no TIME_WAIT here */
			close(c);
			close(s);
			break;
		default: /* the server first: TIME_WAIT here */
			close(s);
			close(c);
		}
	}
	close(l);
	all_back(_metadata, &self->s, self->references);
}

TEST_F_TIMEOUT(life, listeners_that_come_and_go_with_full_queues_leave_nothing, 240)
{
	struct net net = { variant->family, variant->link };
	struct sockaddr_storage addr;
	socklen_t len;
	int i, k, l, c[30];

	for (i = 0; i < 20; i++) {
		l = net_listen(&net, &addr, &len);
		ASSERT_LE(0, l);
		ASSERT_EQ(0, sock_attach_ioctl(l, self->s.fd));
		for (k = 0; k < 30; k++) {
			c[k] = net_connect(&net, &addr, len);
			ASSERT_LE(0, c[k]);
			send(c[k], "waiting", 7, MSG_NOSIGNAL);
		}
		if (i & 1)
			shutdown(l, SHUT_RDWR);
		close(l);
		for (k = 0; k < 30; k++)
			close(c[k]);
	}
	all_back(_metadata, &self->s, self->references);
}

TEST_F_TIMEOUT(life, detach_is_ebusy_while_a_pipe_has_frames_and_fine_when_it_is_drained, 60)
{
	struct net net = { variant->family, variant->link };
	static char buf[8000];
	size_t in_pipe = 0;
	struct conn c;
	int pipes[2];

	ASSERT_EQ(0, conn_make(&c, &net, self->s.fd, HOW_LISTENER_OPT));
	ASSERT_EQ(0, pipe(pipes));
	fill(buf, sizeof(buf), 81, 0);
	ASSERT_EQ(0, send_all(c.c, buf, sizeof(buf)));
	while (in_pipe < sizeof(buf)) {
		ssize_t n = splice(c.s, NULL, pipes[1], NULL, sizeof(buf) - in_pipe, 0);

		ASSERT_LT(0, n);
		in_pipe += n;
	}
	conn_close(&c);
	store_let_go(&self->s);
	EXPECT_EQ(-EBUSY, dev_detach(self->s.ctl, self->s.minor, 300));
	EXPECT_EQ(-EBUSY, dev_detach(self->s.ctl, self->s.minor, 1));
	memset(buf, 0, sizeof(buf));
	for (in_pipe = 0; in_pipe < sizeof(buf);) {
		ssize_t n = read(pipes[0], buf + in_pipe, sizeof(buf) - in_pipe);

		ASSERT_LT(0, n);
		in_pipe += n;
	}
	EXPECT_EQ(-1, differs(buf, sizeof(buf), 81, 0));
	EXPECT_EQ(0, dev_detach(self->s.ctl, self->s.minor, 5000));
	self->s.minor = ~0U;
}

static void nothing(int sig)
{
	(void)sig;
}

TEST_F_TIMEOUT(life, waiting_in_detach_ends_with_a_signal_and_the_store_goes_on, 60)
{
	struct sigaction sa = { .sa_handler = nothing };
	struct net net = { variant->family, variant->link };
	struct pmskb_store_info info;
	struct timespec t0, t1;
	struct conn c;
	int pipes[2];
	char byte;

	/* Something that keeps it waiting. */
	ASSERT_EQ(0, conn_make(&c, &net, self->s.fd, HOW_LISTENER_OPT));
	ASSERT_EQ(0, pipe(pipes));
	ASSERT_EQ(0, send_all(c.c, "x", 1));
	ASSERT_EQ(1, splice(c.s, NULL, pipes[1], NULL, 1, 0));
	conn_close(&c);
	store_let_go(&self->s);
	sigaction(SIGALRM, &sa, NULL);
	alarm(1);
	clock_gettime(CLOCK_MONOTONIC, &t0);
	EXPECT_EQ(-EINTR, dev_detach(self->s.ctl, self->s.minor, 20000));
	clock_gettime(CLOCK_MONOTONIC, &t1);
	EXPECT_GE(10 * slowness(), t1.tv_sec - t0.tv_sec);
	self->s.fd = open(self->s.path, O_RDWR | O_CLOEXEC);
	ASSERT_LE(0, self->s.fd);
	EXPECT_EQ(0, store_info(&self->s, &info));
	EXPECT_EQ(1, read(pipes[0], &byte, 1));
	EXPECT_EQ('x', byte);
}

TEST_F_TIMEOUT(life, after_a_detach_that_was_refused_the_store_works_as_before, 60)
{
	struct net net = { variant->family, variant->link };
	char buf[1000] = {};
	struct conn c;
	int i;

	ASSERT_EQ(0, conn_make(&c, &net, self->s.fd, HOW_ACCEPTED_OPT));
	for (i = 0; i < 5; i++) {
		EXPECT_EQ(-EBUSY, dev_detach(self->s.ctl, self->s.minor, 50));
		ASSERT_EQ(0, send_all(c.c, buf, sizeof(buf)));
		ASSERT_EQ(0, recv_all(c.s, buf, sizeof(buf)));
	}
	{
		struct pmskb_sock_info si;

		ASSERT_EQ(0, sock_info(c.s, &si));
		EXPECT_LE(5 * sizeof(buf), si.counters.placed_bytes);
	}
	conn_close(&c);
}

TEST_F_TIMEOUT(life, attach_and_detach_many_times, 240)
{
	unsigned long nr = env_number("PMSKB_TEST_ATTACHES", 20), i;
	struct pmskb_attach a;

	store_let_go(&self->s);
	ASSERT_EQ(0, dev_detach(self->s.ctl, self->s.minor, 5000));
	for (i = 0; i < nr; i++) {
		ASSERT_EQ(0, dev_attach(self->s.ctl, self->s.dev, &a));
		ASSERT_EQ(0, dev_detach(self->s.ctl, a.minor, 5000));
	}
	self->s.minor = ~0U;
}

/* ---- filters and taps ---- */

#define TABLE "pmskb_selftest"

TEST_F_TIMEOUT(life, connection_tracking_and_later_hooks_see_every_packet, 120)
{
	struct net net = { variant->family, LINK_VETH };
	static char buf[1 << 20];
	const char *why = net_up(LINK_VETH);
	long established, late, fresh;
	struct pmskb_sock_info si;
	struct conn c;
	FILE *p;

	if (why)
		SKIP(return, "%s", why);
	if (!have_program("nft"))
		SKIP(return, "there is no nft");
	sh("nft delete table inet " TABLE " 2>/dev/null");
	if (sh("nft -f - <<'END'\n"
	       "table inet " TABLE " {\n"
	       " counter established { }\n counter fresh { }\n counter late { }\n"
	       " chain early { type filter hook input priority -10; policy accept;\n"
	       "  iifname \"pmskb-a\" ct state established counter name established accept\n"
	       "  iifname \"pmskb-a\" tcp flags & (syn|ack) == syn ct state new counter name fresh accept\n"
	       "  iifname \"pmskb-a\" meta l4proto tcp drop\n"
	       " }\n"
	       " chain late { type filter hook input priority 2000000000; policy accept;\n"
	       "  iifname \"pmskb-a\" meta l4proto tcp counter name late\n"
	       " }\n"
	       "}\nEND"))
		SKIP(return, "nft cannot load the rules");
	EXPECT_EQ(0, conn_make(&c, &net, self->s.fd, HOW_LISTENER_OPT));
	if (c.s >= 0) {
		struct sender snd;

		EXPECT_EQ(0, sender_start(&snd, c.c, 82, sizeof(buf), 50000, false));
		EXPECT_EQ(0, recv_all(c.s, buf, sizeof(buf)));
		EXPECT_EQ(-1, differs(buf, sizeof(buf), 82, 0));
		EXPECT_EQ(0, sender_wait(&snd));
		EXPECT_EQ(0, sock_info(c.s, &si));
		EXPECT_LE(sizeof(buf), si.counters.placed_bytes);
	}
	p = popen("nft list counters table inet " TABLE " | awk '/counter/ { n = $2 } "
		  "/bytes/ { print n, $4 }' | sort", "r");
	established = fresh = late = -1;
	if (p) {
		if (fscanf(p, "established %ld fresh %ld late %ld", &established, &fresh, &late) != 3)
			TH_LOG("cannot read nft's counters");
		pclose(p);
	}
	EXPECT_LT(0, fresh);
	EXPECT_LE(sizeof(buf), established) TH_LOG("bytes with ct state established");
	EXPECT_LE(sizeof(buf), late) TH_LOG("bytes that a hook after placement saw");
	sh("nft delete table inet " TABLE);
	if (have_program("conntrack") && c.s >= 0) {
		struct sockaddr_storage a;
		socklen_t len = sizeof(a);

		getpeername(c.s, (void *)&a, &len);
		/* Confirmed, or it would not be in the table. */
		EXPECT_EQ(0, sh("conntrack -L -f %s -p tcp --sport %u 2>/dev/null | grep -q ESTABLISHED",
				variant->family == AF_INET ? "ipv4" : "ipv6",
				ntohs(((struct sockaddr_in *)&a)->sin_port)));
	}
	conn_close(&c);
}

TEST_F_TIMEOUT(life, a_running_tcpdump_changes_nothing_and_sees_everything, 120)
{
	struct net net = { variant->family, variant->link };
	static char buf[500000];
	struct pmskb_desc *d;
	struct conn c;
	int n, i, k;
	uint64_t pos = 0;

	if (!have_program("tcpdump"))
		SKIP(return, "there is no tcpdump");
	d = calloc(4096, sizeof(*d));
	sh("rm -f /tmp/pmskb.pcap; tcpdump -Z root -i %s -U -s 0 -w /tmp/pmskb.pcap tcp >/tmp/pmskb.log 2>&1 & "
	   "echo $! > /tmp/pmskb.pid; sleep 1",
	   variant->link == LINK_LO ? "lo" : "pmskb-a");
	ASSERT_EQ(0, conn_make(&c, &net, self->s.fd, HOW_LISTENER_OPT));
	ASSERT_EQ(0, sock_mode(c.s, PMSKB_RX_DESC));
	for (k = 0; k < 4; k++) {
		struct sender snd;

		ASSERT_EQ(0, sender_start(&snd, c.c, 83 + k, sizeof(buf), 50000, false));
		n = desc_recv_bytes(c.s, d, 4096, sizeof(buf));
		EXPECT_LT(0, n);
		for (i = 0, pos = 0; i < n; i++) {
			EXPECT_EQ(-1, differs(self->s.map + d[i].offset, d[i].len, 83 + k, pos));
			pos += d[i].len;
		}
		EXPECT_EQ(0, desc_release_all(c.s, d, n));
		EXPECT_EQ(0, sender_wait(&snd));
	}
	sh("sleep 1; kill $(cat /tmp/pmskb.pid); wait");
	EXPECT_EQ(0, sh("test $(stat -c %%s /tmp/pmskb.pcap) -gt 100000 || { sed 's/^/# /' /tmp/pmskb.log; false; }"))
		TH_LOG("the dump is empty");
	sh("rm -f /tmp/pmskb.pcap /tmp/pmskb.pid /tmp/pmskb.log");
	conn_close(&c);
	free(d);
}

/* ---- failing allocations ---- */

static int inject(unsigned int nth)
{
	char number[16];
	int fd = open(PARAMETERS "inject", O_WRONLY | O_CLOEXEC), err = 0, n;

	if (fd < 0)
		return -errno;
	n = snprintf(number, sizeof(number), "%u", nth);
	if (write(fd, number, n) != n)
		err = -errno;
	close(fd);
	return err;
}

/*
 * The module's own: rust/inject.rs, in a module that was built for it. A connection
 * gets through it all as best it can; what TCP has acknowledged arrives, whatever fails.
 */
TEST_F_TIMEOUT(life, every_nth_allocation_fails_and_nothing_stays_behind, 1800)
{
	static const unsigned int nths[] = { 1, 2, 3, 5, 8, 13, 34, 144 };
	unsigned long nr = env_number("PMSKB_TEST_CONNS", 2000), i, whole = 0, attached = 0, kept = 0;
	struct net net = { variant->family, variant->link };
	struct linger lin = { 1, 0 };
	struct sockaddr_storage addr;
	static struct pmskb_desc d[64];
	static struct pmskb_ext e[64];
	static char out[6000], in[6000];
	struct pmskb_sock_info si;
	struct pmskb_op op;
	long before = 0, failed;
	socklen_t len;
	int l, c, s, n, err, a;

	if (access(PARAMETERS "inject", F_OK))
		SKIP(return, "the module was built without PMSKB_INJECT=1");
	fill(out, sizeof(out), 90, 0);
	l = net_listen(&net, &addr, &len);
	ASSERT_LE(0, l);
	ASSERT_EQ(0, sock_attach_opt(l, self->s.fd));
	for (i = 0; i < nr; i++) {
		/* Each for an equal share of the connections. */
		if (i % (nr / ARRAY_LEN(nths) + 1) == 0) {
			before = read_number(PARAMETERS "injected");
			ASSERT_EQ(0, inject(nths[i / (nr / ARRAY_LEN(nths) + 1)]));
		}
		/* When all ports are in TIME_WAIT, some will be free soon. */
		for (n = 0; n < 900; n++) {
			c = net_connect(&net, &addr, len);
			if (c != -EADDRNOTAVAIL)
				break;
			usleep(100000);
		}
		ASSERT_LE(0, c) TH_LOG("connection %lu: %s", i, strerror(-c));
		s = accept(l, NULL, NULL);
		ASSERT_LE(0, s);
		timeout_set(s, 20000 * slowness());
		/* One that has not inherited the store is to be had again. */
		err = sock_info(s, &si);
		a = err ? sock_attach_ioctl(s, self->s.fd) : 0;
		EXPECT_TRUE(a == 0 || a == -ENOMEM) TH_LOG("connection %lu: attach says %d", i, a);
		attached += !a;
		ASSERT_EQ(0, send_all(c, out, i % 3 ? 200 : sizeof(out)));
		switch (i % 8) {
		case 0: /* the client resets what was not read */
			setsockopt(c, SOL_SOCKET, SO_LINGER, &lin, sizeof(lin));
			break;
		case 1: /* the server does */
			break;
		case 2: /* tokens: some held, some persisted, or none for want of memory */
		case 3:
			if (a || sock_mode(s, PMSKB_RX_DESC))
				break;
			n = desc_recv_flags(s, d, ARRAY_LEN(d), 0, NULL, NULL);
			EXPECT_TRUE(n > 0 || n == -ENOMEM || n == -ENOBUFS)
				TH_LOG("connection %lu: descriptors: %d", i, n);
			if (n <= 0 || i % 8 == 2)
				break;
			exts_of(e, d, n);
			op = op_put("one", 3, e, n);
			err = persist_one(s, &op, NULL);
			EXPECT_TRUE(err > 0 || err == -ENOSPC || err == -ENOMEM || err == CALL_FAILED(-ENOMEM))
				TH_LOG("connection %lu: put: %d", i, err);
			kept += err > 0;
			break;
		default:
			ASSERT_EQ(0, recv_all(s, in, i % 3 ? 200 : sizeof(in)));
			ASSERT_EQ(-1, differs(in, i % 3 ? 200 : sizeof(in), 90, 0)) TH_LOG("connection %lu", i);
			whole++;
		}
		if (i & 8)
			close(s);
		close(c);
		if (!(i & 8))
			close(s);
		if ((i + 1) % (nr / ARRAY_LEN(nths) + 1) == 0 || i + 1 == nr) {
			failed = read_number(PARAMETERS "injected") - before;
			EXPECT_LT(0, failed) TH_LOG("before connection %lu nothing has failed", i);
		}
	}
	ASSERT_EQ(0, inject(0));
	TH_LOG("%ld allocations failed; of %lu connections %lu were attached, %lu arrived whole, %lu were kept",
	       read_number(PARAMETERS "injected"), nr, attached, whole, kept);
	EXPECT_LT(nr / 2, attached);
	EXPECT_GT(nr, attached);
	EXPECT_LT(0, kept);
	close(l);
	all_back(_metadata, &self->s, self->references);
}

/* ---- the driver leaves ---- */

static sigjmp_buf fault_jump;

static void on_fault(int sig)
{
	siglongjmp(fault_jump, sig);
}

TEST_F_TIMEOUT(life, unbinding_the_driver_under_traffic_ends_in_errors_and_not_in_tears, 120)
{
	struct net net = { variant->family, variant->link };
	enum { NR = 4 };
	struct sender snd[NR], drain[NR];
	char driver[PATH_MAX], name[PATH_MAX];
	struct pmskb_op op = op_put("after", 5, NULL, 0);
	struct pmskb_store_info info;
	struct conn c[NR + 1];
	struct pmskb_desc d[16];
	struct pmskb_result r;
	struct store again;
	volatile int sig;
	int i, n, err;
	char buf[100];

	if (driver_of(variant->dev, driver, name, PATH_MAX))
		SKIP(return, "cannot find the device's driver");
	ASSERT_EQ(1, ({
		int64_t seq;

		err = submit(self->s.fd, &(struct pmskb_op) { .opcode = PMSKB_OP_PUT, .fd = -1, .key = PTR("before"),
			     .key_len = 6 }, &r, 1);
		seq = err ? err : r.res;
		seq;
	}));
	for (i = 0; i < NR; i++) {
		ASSERT_EQ(0, conn_make(&c[i], &net, self->s.fd, HOW_LISTENER_OPT));
		ASSERT_EQ(0, sender_start(&snd[i], c[i].c, i, 1ULL << 40, 60000, false));
		drain[i].pid = fork();
		if (!drain[i].pid) {
			static char sink[65536];

			while (recv(c[i].s, sink, sizeof(sink), 0) > 0)
				;
			_exit(0);
		}
	}
	/* One that holds tokens, and has bytes unread. */
	ASSERT_EQ(0, conn_make(&c[NR], &net, self->s.fd, HOW_ACCEPTED_IOCTL));
	ASSERT_EQ(0, sock_mode(c[NR].s, PMSKB_RX_DESC));
	ASSERT_EQ(0, send_all(c[NR].c, "held", 4));
	n = desc_recv_bytes(c[NR].s, d, 16, 4);
	ASSERT_EQ(1, n);
	ASSERT_EQ(0, send_all(c[NR].c, "unread", 6));
	usleep(300000);

	ASSERT_EQ(0, dev_unbind(driver, name));

	/* Mappings are gone. */
	signal(SIGBUS, on_fault);
	signal(SIGSEGV, on_fault);
	sig = sigsetjmp(fault_jump, 1);
	if (!sig)
		sig = *(volatile uint8_t *)(self->s.map + d[0].offset) ? 0 : 0;
	EXPECT_EQ(SIGBUS, sig) TH_LOG("the mapping outlives the memory");
	signal(SIGBUS, SIG_DFL);
	signal(SIGSEGV, SIG_DFL);
	/* Operations are EIO. */
	err = submit(self->s.fd, &op, &r, 1);
	EXPECT_EQ(-EIO, err ?: r.res);
	EXPECT_EQ(EIO, ERRNO(pread(self->s.fd, buf, 16, 0)));
	err = ioctl(self->s.fd, PMSKB_IOC_INFO, &info) ? -errno : 0;
	EXPECT_TRUE(err == 0 || err == -EIO) TH_LOG("%d", err);
	/* New sockets are refused. */
	{
		int fd = socket(AF_INET, SOCK_STREAM, 0);

		EXPECT_EQ(-EIO, sock_attach_ioctl(fd, self->s.fd));
		close(fd);
	}
	/* Attached ones answer, one way or another, and do not hang. */
	timeout_set(c[NR].s, 1000);
	desc_recv_flags(c[NR].s, d, 16, 0, NULL, NULL);
	send(c[NR].c, "more", 4, MSG_NOSIGNAL);
	desc_release(c[NR].s, d[0].token, 1);

	for (i = 0; i < NR; i++) {
		kill(snd[i].pid, SIGKILL);
		waitpid(snd[i].pid, NULL, 0);
		kill(drain[i].pid, SIGKILL);
		waitpid(drain[i].pid, NULL, 0);
	}
	for (i = 0; i <= NR; i++)
		conn_close(&c[i]);
	store_let_go(&self->s);
	err = dev_detach(self->s.ctl, self->s.minor, 5000);
	EXPECT_TRUE(err == 0 || err == -ENODEV) TH_LOG("detaching what is gone: %d", err);
	self->s.minor = ~0U;
	close(self->s.dev);
	self->s.dev = -1;

	/* It comes back, and has what was acknowledged. */
	ASSERT_EQ(0, dev_bind(variant->dev, driver, name)) TH_LOG("cannot bind %s to %s again", name, driver);
	err = store_open(&again, variant->dev);
	ASSERT_EQ(0, err);
	EXPECT_EQ(1, media_scan(again.map, again.map_len, NULL, NULL));
	EXPECT_EQ(0, store_close(&again));
}

/*
 * TCP_ZEROCOPY_RECEIVE maps frames where nobody can find them. They are memory of the
 * process's until it says otherwise, and the device stays until then.
 */
TEST_F_TIMEOUT(life, a_frame_that_tcp_has_mapped_holds_up_the_removal, 120)
{
	enum { LEN = 60000, MAP = 1 << 17 };
	/* In segments of many pages: only whole ones are mapped. */
	struct net net = { variant->family, LINK_LO };
	struct tcp_zerocopy_receive zc = { .length = MAP };
	char driver[PATH_MAX], name[PATH_MAX];
	static uint8_t buf[LEN];
	socklen_t len = sizeof(zc);
	int k, n = 0, st, err;
	struct conn c;
	uint8_t *map;
	pid_t pid;

	if (driver_of(variant->dev, driver, name, PATH_MAX))
		SKIP(return, "cannot find the device's driver");
	ASSERT_EQ(0, conn_make(&c, &net, self->s.fd, HOW_LISTENER_OPT));
	map = mmap(NULL, MAP, PROT_READ, MAP_SHARED, c.s, 0);
	ASSERT_NE(MAP_FAILED, (void *)map);
	fill(buf, LEN, 91, 0);
	ASSERT_EQ(0, send_all(c.c, buf, LEN));
	for (k = 0; k < 500 * slowness() && n < LEN; k++) {
		usleep(10000);
		ASSERT_EQ(0, ioctl(c.s, SIOCINQ, &n));
	}
	zc.address = PTR(map);
	ASSERT_EQ(0, getsockopt(c.s, IPPROTO_TCP, TCP_ZEROCOPY_RECEIVE, &zc, &len));
	ASSERT_LT(0, zc.length) TH_LOG("nothing was mapped");
	ASSERT_EQ(0, memcmp(map, buf, zc.length));

	pid = fork();
	if (!pid) {
		/* The mapping is its parent's alone. */
		munmap(map, MAP);
		_exit(dev_unbind(driver, name) ? 1 : 0);
	}
	usleep(700000);
	ASSERT_EQ(0, waitpid(pid, &st, WNOHANG)) TH_LOG("the device went from under a mapping");
	EXPECT_EQ(0, memcmp(map, buf, zc.length));
	ASSERT_EQ(0, munmap(map, MAP));
	for (k = 0; k < 3000; k++) {
		if (waitpid(pid, &st, WNOHANG) == pid)
			break;
		usleep(10000);
	}
	ASSERT_GT(3000, k) TH_LOG("the removal goes on for ever");
	EXPECT_EQ(0, st);
	conn_close(&c);
	store_let_go(&self->s);
	err = dev_detach(self->s.ctl, self->s.minor, 5000);
	EXPECT_TRUE(err == 0 || err == -ENODEV) TH_LOG("%d", err);
	self->s.minor = ~0U;
	close(self->s.dev);
	self->s.dev = -1;
	ASSERT_EQ(0, dev_bind(variant->dev, driver, name));
}

/* Receives until there is an error or an end, in a process of its own. */
static pid_t receiver_start(int fd, bool descriptors)
{
	static char sink[65536];
	struct pmskb_desc d[64];
	pid_t pid = fork();
	int n;

	if (pid)
		return pid;
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	if (!descriptors)
		while (recv(fd, sink, sizeof(sink), 0) > 0)
			;
	else
		do
			n = desc_recv_flags(fd, d, ARRAY_LEN(d), 0, NULL, NULL);
		while (n > 0 && !desc_release_all(fd, d, n));
	_exit(0);
}

/*
 * Removal races with receivers in the middle of recvmsg() and with softirqs that
 * place packets: where they meet is another place each time. What went wrong is
 * in the kernel's log, and there alone.
 */
TEST_F_TIMEOUT(life, unbinding_again_and_again_under_traffic_on_every_cpu, 1800)
{
	unsigned long rounds = env_number("PMSKB_TEST_ROUNDS", 10), r;
	int cpus = sysconf(_SC_NPROCESSORS_ONLN), i, k;
	struct net net = { variant->family, variant->link };
	char driver[PATH_MAX], name[PATH_MAX];
	struct pmskb_sock_info si;
	enum { NR = 4 };
	struct sender snd[NR];
	struct conn c[NR];
	pid_t receiver[NR];

	if (driver_of(variant->dev, driver, name, PATH_MAX))
		SKIP(return, "cannot find the device's driver");
	for (r = 0; r < rounds; r++) {
		for (i = 0; i < NR; i++) {
			ASSERT_EQ(0, conn_make(&c[i], &net, self->s.fd, HOW_LISTENER_OPT));
			ASSERT_EQ(0, sock_mode(c[i].s, i & 1 ? PMSKB_RX_DESC : PMSKB_RX_BYTES));
			/* Who sends places, on lo and veth; who receives is elsewhere. */
			run_on(i / 2 % cpus);
			ASSERT_EQ(0, sender_start(&snd[i], c[i].c, i, 1ULL << 40, 60000, false));
			run_on((i / 2 + 1) % cpus);
			receiver[i] = receiver_start(c[i].s, i & 1);
		}
		run_on(-1);
		usleep(50000 + r * 7919 % 50000);
		for (i = 0; i < NR; i++) {
			for (k = 0; k < 200 * slowness(); k++) {
				ASSERT_EQ(0, sock_info(c[i].s, &si));
				if (si.counters.placed)
					break;
				usleep(10000);
			}
			EXPECT_LT(0, si.counters.placed) TH_LOG("round %lu: connection %d has no traffic", r, i);
		}
		ASSERT_EQ(0, dev_unbind(driver, name)) TH_LOG("round %lu", r);
		for (i = 0; i < NR; i++) {
			kill(snd[i].pid, SIGKILL);
			waitpid(snd[i].pid, NULL, 0);
			kill(receiver[i], SIGKILL);
			waitpid(receiver[i], NULL, 0);
			conn_close(&c[i]);
		}
		store_close(&self->s);
		ASSERT_EQ(0, dev_bind(variant->dev, driver, name)) TH_LOG("round %lu", r);
		ASSERT_EQ(0, store_make(&self->s, variant->dev, 0, 0)) TH_LOG("round %lu", r);
	}
	for (i = 0; i < 500 && module_references() != self->references; i++)
		usleep(20000);
	EXPECT_EQ(self->references, module_references());
}

/* ---- media errors ---- */

/*
 * The disk's list of bad blocks is what a driver fills from the device's own; here
 * it is written to, which the block layer lets root do. Only fsdax has one: what
 * fsdev_dax knows is struct pages marked as poisoned.
 */
TEST(frames_with_errors_known_at_attach_are_counted_and_never_used)
{
	/* Sectors from the start of a frame: one, a run, and two that share an error. */
	static const struct { int frame, sector, nr; } errors[] = {
		{ 5, 3, 1 }, { 100, 0, 24 }, { 200, 7, 2 }, { -1, 0, 8 },
	};
	static const int bad_frames[] = { 5, 100, 101, 102, 200, 201, -1 };
	char driver[PATH_MAX], name[PATH_MAX], file[PATH_MAX], line[64];
	struct net net = { AF_INET, LINK_LO };
	static struct pmskb_desc d[8192];
	static bool used[8192];
	struct pmskb_store_info info;
	uint64_t total, len, k, of;
	const char *why, *path;
	static char buf[50000];
	int n = 0, got, fd, i;
	struct store s;
	struct conn c;

	path = dev_path(DEV_PMEM, &why);
	if (!path)
		SKIP(return, "%s", why);
	ASSERT_EQ(0, driver_of(DEV_PMEM, driver, name, PATH_MAX));
	snprintf(file, sizeof(file), "/sys/block/%s/badblocks", strrchr(path, '/') + 1);
	fd = open(file, O_WRONLY | O_CLOEXEC);
	if (fd < 0)
		SKIP(return, "the disk has no list of bad blocks");
	/* A data area that is soon full. */
	ASSERT_EQ(0, store_make(&s, DEV_PMEM, 0, 0));
	len = s.info.region_len;
	ASSERT_EQ(0, store_close(&s));
	ASSERT_EQ(0, store_make(&s, DEV_PMEM, 0, ((len >> 20) - 12) << 20));
	total = s.info.frames_total;
	ASSERT_GT(ARRAY_LEN(used), total);
	ASSERT_LT(1000, total);
	EXPECT_EQ(0, s.info.frames_bad);
	ASSERT_EQ(0, store_close(&s));
	for (i = 0; i < (int)ARRAY_LEN(errors); i++) {
		of = errors[i].frame < 0 ? total + errors[i].frame : errors[i].frame;
		of = (s.info.data_off + of * PMSKB_FRAME_SIZE) / 512 + errors[i].sector;
		n = snprintf(line, sizeof(line), "%lu %d\n", of, errors[i].nr);
		ASSERT_EQ(n, write(fd, line, n));
	}
	close(fd);

	ASSERT_EQ(0, store_open(&s, DEV_PMEM));
	EXPECT_EQ(ARRAY_LEN(bad_frames), s.info.frames_bad);
	ASSERT_EQ(0, store_unlimited(&s));
	ASSERT_EQ(0, conn_make(&c, &net, s.fd, HOW_ACCEPTED_IOCTL));
	ASSERT_EQ(0, sock_mode(c.s, PMSKB_RX_DESC));
	/* All frames but those, held by tokens. */
	for (n = 0;;) {
		ASSERT_EQ(0, send_all(c.c, buf, sizeof(buf)));
		got = desc_recv_bytes(c.s, d + n, ARRAY_LEN(d) - n, sizeof(buf));
		if (got < 0)
			break;
		n += got;
	}
	EXPECT_EQ(-ENOBUFS, got);
	ASSERT_GT(ARRAY_LEN(d) - 64, n);
	for (i = 0; i < n; i++) {
		EXPECT_EQ(0, d[i].flags & PMSKB_DESC_COPIED);
		ASSERT_LE(s.info.data_off, d[i].offset);
		of = (d[i].offset - s.info.data_off) / PMSKB_FRAME_SIZE;
		k = (d[i].offset + d[i].len - 1 - s.info.data_off) / PMSKB_FRAME_SIZE;
		ASSERT_GT(total, k);
		for (; of <= k; of++)
			used[of] = true;
	}
	for (i = 0, k = 0; i < (int)total; i++)
		k += used[i];
	/* The last call has taken some of which it did not get to tell. */
	EXPECT_LE(total - 64, k) TH_LOG("only %lu of %lu frames were used", k, total);
	for (i = 0; i < (int)ARRAY_LEN(bad_frames); i++)
		EXPECT_FALSE(used[bad_frames[i] < 0 ? total + bad_frames[i] : bad_frames[i]])
			TH_LOG("frame %d", bad_frames[i]);
	ASSERT_EQ(0, store_info(&s, &info));
	EXPECT_EQ(ARRAY_LEN(bad_frames), info.frames_bad);
	EXPECT_GT(16, info.frames_free - info.frames_reserve);
	conn_close(&c);
	EXPECT_EQ(0, store_close(&s));
	/* The driver reads the device's own list again. */
	ASSERT_EQ(0, dev_unbind(driver, name));
	ASSERT_EQ(0, dev_bind(DEV_PMEM, driver, name));
	ASSERT_EQ(0, store_open(&s, DEV_PMEM));
	EXPECT_EQ(0, s.info.frames_bad);
	EXPECT_EQ(0, store_close(&s));
}

TEST_HARNESS_MAIN
