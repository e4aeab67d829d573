// SPDX-License-Identifier: GPL-2.0
/*
 * Promises about what happens in the middle of something else: signals, close, shutdown,
 * detach, rmmod, the end of a network namespace, a link that goes down, a driver that is
 * unbound; against traffic that is being made durable, on every CPU. What was acknowledged is
 * in the store, the counts go back to zero; what else went wrong is in the kernel's log.
 *
 * PMSKB_TEST_ROUNDS for more of each.
 */
#include "common.h"
#include "media.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <net/if.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>

#include "harness.h"

/* ---- traffic that is made durable ---- */

enum { NR = 4, SLOTS = 8, DESCS = 32 };

/*
 * What a key should have: len bytes of the stream from pos. Or, if try_len is not 0, perhaps
 * those that were submitted last and are not acknowledged.
 */
struct slot {
	uint64_t pos, try_pos;
	uint32_t len, try_len;
};

/* What the processes of a test share. */
struct shared {
	struct slot slots[NR][SLOTS];
	uint64_t acked[NR];
	char wrong[NR][100];
	int stop;
};

static struct shared *shared;

struct traffic {
	struct conn c;
	struct sender sender;
	pid_t pid;		/* who makes it durable */
};

static const char *key_of(int id, unsigned int slot)
{
	static __thread char key[16];

	snprintf(key, sizeof(key), "race%d.%u", id, slot);
	return key;
}

static void nothing(int sig)
{
	(void)sig;
}

/* Errnos with which a connection or a store ends, as it does in these tests. */
static bool is_end(int err)
{
	switch (-err) {
	case EIO:
	case EBADF:
	case EUNATCH:
	case ENOTCONN:
	case ECONNRESET:
	case ECONNABORTED:
	case EPIPE:
		return true;
	}
	return false;
}

/*
 * Receives descriptors and puts them until that ends: 0, or 1 with shared->wrong set. An end by
 * an errno is right for some tests and not for others: *end has it.
 */
static int make_durable(int id, const struct store *s, int fd, int *end)
{
	struct pmskb_ext e[DESCS];
	struct pmskb_desc d[DESCS];
	struct pmskb_result r;
	uint64_t pos = 0;
	unsigned int nth;
	int n, i, err;
	ssize_t bytes;

	*end = 0;
	for (nth = 0; !shared->stop; nth++) {
		struct slot *slot = &shared->slots[id][nth % SLOTS];
		const char *key = key_of(id, nth % SLOTS);
		struct pmskb_op op;

		n = desc_recv_flags(fd, d, DESCS, 0, &bytes, NULL);
		if (n == -EINTR || n == -ENOBUFS)
			continue;
		if (n <= 0) {
			*end = n;
			return 0;
		}
		for (i = 0; i < n; i++)
			e[i] = ext_of(&d[i]);
		op = op_put(key, strlen(key), e, n);
		slot->try_pos = pos;
		__atomic_store_n(&slot->try_len, bytes, __ATOMIC_SEQ_CST);
		memset(&r, 0, sizeof(r));
		/* Both ways. */
		if (nth & 1) {
			op.fd = fd;
			err = submit(s->fd, &op, &r, 1);
		} else {
			err = persist(fd, &op, &r, 1);
		}
		err = err ?: r.res < 0 ? r.res : 0;
		if (err && err != -ENOSPC) {
			*end = err;
			if (is_end(err))
				return 0;
			snprintf(shared->wrong[id], sizeof(shared->wrong[id]), "put %u: %s", nth, strerror(-err));
			return 1;
		}
		if (!err) {
			slot->pos = slot->try_pos;
			slot->len = slot->try_len;
			shared->acked[id]++;
		} else {
			desc_release_all(fd, d, n);
		}
		__atomic_store_n(&slot->try_len, 0, __ATOMIC_SEQ_CST);
		pos += bytes;
	}
	return 0;
}

/* A child has no descriptors but two: a socket that is closed elsewhere is closed then. */
static void keep_only(int a, int b)
{
	int low = a < b ? a : b, high = a < b ? b : a;

	if (low > 3)
		close_range(3, low - 1, 0);
	if (high > low + 1)
		close_range(low + 1, high - 1, 0);
	close_range(high + 1, ~0U, 0);
}

/* A process that does. */
static pid_t durable_start(int id, const struct store *s, int fd)
{
	pid_t pid;
	int end;

	fflush(stdout);
	pid = fork();
	if (pid)
		return pid;
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	keep_only(s->fd, fd);
	_exit(make_durable(id, s, fd, &end) ?: end ? 2 : 0);
}

static void traffic_start(struct __test_metadata *_metadata, struct traffic *t, int id, const struct net *net,
			  const struct store *s)
{
	int cpus = sysconf(_SC_NPROCESSORS_ONLN);

	ASSERT_EQ(0, conn_make(&t->c, net, s->fd, id & 1 ? HOW_LISTENER_OPT : HOW_ACCEPTED_IOCTL));
	ASSERT_EQ(0, sock_mode(t->c.s, PMSKB_RX_DESC));
	/* Who sends places, on lo and veth; who receives is elsewhere. */
	run_on(id / 2 % cpus);
	ASSERT_EQ(0, sender_start(&t->sender, t->c.c, id, 1ULL << 40, 30000, false));
	run_on((id / 2 + 1) % cpus);
	t->pid = durable_start(id, s, t->c.s);
	ASSERT_LT(0, t->pid);
	run_on(-1);
}

/* Until each has put something more: TCP waits twice as long after each loss. */
static void traffic_flows(struct __test_metadata *_metadata, const char *when)
{
	uint64_t before[NR];
	int id, k;

	for (id = 0; id < NR; id++)
		before[id] = shared->acked[id];
	for (id = 0; id < NR; id++) {
		for (k = 0; k < 4000 * slowness() && shared->acked[id] == before[id]; k++)
			usleep(5000);
		ASSERT_LT(before[id], shared->acked[id]) TH_LOG("%s: connection %d has no traffic %s", when, id,
								shared->wrong[id]);
	}
}

/* Ends it: the status of who made it durable, 0 if the stream ended as streams do. */
static int traffic_stop(struct traffic *t)
{
	int st = -1;

	kill(t->sender.pid, SIGKILL);
	waitpid(t->sender.pid, NULL, 0);
	if (t->c.c >= 0)
		shutdown(t->c.c, SHUT_WR);
	waitpid(t->pid, &st, 0);
	conn_close(&t->c);
	return WIFEXITED(st) ? WEXITSTATUS(st) : 128 + WTERMSIG(st);
}

static bool has(const struct store *s, const struct hit *h, int id, uint64_t pos, uint32_t len)
{
	static uint8_t bytes[1 << 20];

	return h->len == len && len <= sizeof(bytes) && !map_bytes(s->map, s->map_len, h, bytes) &&
	       differs(bytes, len, id, pos) < 0;
}

/*
 * Each key of a connection has what was acknowledged last, or what was being put when its process
 * ended: then it is settled which. Nobody puts there meanwhile.
 */
static void acknowledged(struct __test_metadata *_metadata, const struct store *s, int id, const char *when)
{
	struct hit h;
	int k, n;

	EXPECT_EQ(0, shared->wrong[id][0]) TH_LOG("%s: connection %d: %s", when, id, shared->wrong[id]);
	for (k = 0; k < SLOTS; k++) {
		struct slot *slot = &shared->slots[id][k];
		const char *key = key_of(id, k);

		if (!slot->len && !slot->try_len)
			continue;
		n = map_get(s->map, s->map_len, key, strlen(key), &h);
		if (slot->try_len && n == 1 && has(s, &h, id, slot->try_pos, slot->try_len)) {
			slot->pos = slot->try_pos;
			slot->len = slot->try_len;
		}
		slot->try_len = 0;
		if (!n && !slot->len)
			continue;
		EXPECT_EQ(1, n) TH_LOG("%s: %s is lost", when, key);
		if (n != 1)
			continue;
		EXPECT_TRUE(has(s, &h, id, slot->pos, slot->len))
			TH_LOG("%s: %s has %u other bytes than the %u at %lu", when, key, h.len, slot->len, slot->pos);
	}
}

static void all_acknowledged(struct __test_metadata *_metadata, const struct store *s, const char *when)
{
	int id;

	for (id = 0; id < NR; id++)
		acknowledged(_metadata, s, id, when);
}

/* ---- the tests ---- */

FIXTURE(race) {
	struct store s;
	long references;
	unsigned long rounds;
};

FIXTURE_VARIANT(race) {
	enum dev dev;
	enum link link;
	int family;
};

FIXTURE_VARIANT_ADD(race, v4_pmem_veth) { DEV_PMEM, LINK_VETH, AF_INET };
FIXTURE_VARIANT_ADD(race, v6_dax_lo) { DEV_DAX, LINK_LO, AF_INET6 };

FIXTURE_SETUP(race)
{
	/* Those that it starts have this from their first moment. */
	struct sigaction sa = { .sa_handler = nothing };
	const char *why;

	self->s.ctl = self->s.dev = self->s.fd = -1;
	self->s.minor = ~0U;
	if (!dev_path(variant->dev, &why))
		SKIP(return, "%s", why);
	why = net_up(variant->link);
	if (why)
		SKIP(return, "%s", why);
	sigaction(SIGUSR1, &sa, NULL);
	shared = mmap(NULL, sizeof(*shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	ASSERT_NE(MAP_FAILED, shared);
	self->rounds = env_number("PMSKB_TEST_ROUNDS", 2);
	ASSERT_EQ(0, store_make(&self->s, variant->dev, 0, 0));
	self->references = module_references();
}

/* Nothing of the stack's is left: detach is exact. And all is there after it. */
FIXTURE_TEARDOWN(race)
{
	struct pmskb_store_info info;
	int k;

	ASSERT_EQ(0, store_drained(&self->s, &info)) TH_LOG("%llu sockets, %llu tokens, %llu frames held", info.sockets,
						      info.tokens, info.frames_held);
	for (k = 0; k < 500 && module_references() != self->references; k++)
		usleep(20000);
	EXPECT_EQ(self->references, module_references()) TH_LOG("references to the module");
	all_acknowledged(_metadata, &self->s, "at the end");
	ASSERT_EQ(0, store_close(&self->s));
	ASSERT_EQ(0, store_open(&self->s, variant->dev));
	all_acknowledged(_metadata, &self->s, "attached again");
	EXPECT_LE(0, media_scan(self->s.map, self->s.map_len, NULL, NULL));
	EXPECT_EQ(0, store_close(&self->s));
}

/* Some time up to so many milliseconds, another one each time. */
static void a_while(unsigned int ms)
{
	usleep(1000 + rand() % (ms * 1000));
}

TEST_F_TIMEOUT(race, signals_end_calls_and_lose_nothing, 300)
{
	struct net net = { variant->family, variant->link };
	struct traffic t[NR];
	unsigned long r;
	int i, k;

	for (i = 0; i < NR; i++)
		traffic_start(_metadata, &t[i], i, &net, &self->s);
	for (r = 0; r < self->rounds; r++) {
		for (k = 0; k < 50; k++) {
			kill(t[k % NR].pid, SIGUSR1);
			usleep(rand() % 3000);
		}
		traffic_flows(_metadata, "after signals");
	}
	for (i = 0; i < NR; i++) {
		EXPECT_EQ(0, traffic_stop(&t[i])) TH_LOG("connection %d: %s", i, shared->wrong[i]);
	}
}

/* A second thread of who receives and puts: takes the socket away. */
struct thief {
	int fd;
	bool shut;
};

static void *steal(void *arg)
{
	struct thief *thief = arg;

	a_while(30);
	if (thief->shut)
		shutdown(thief->fd, SHUT_RDWR);
	else
		close(thief->fd);
	return NULL;
}

static pid_t robbed_start(int id, const struct store *s, int fd, bool shut)
{
	struct thief thief = { fd, shut };
	pthread_t thread;
	pid_t pid;
	int end;

	fflush(stdout);
	pid = fork();
	if (pid)
		return pid;
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	srand(getpid());
	keep_only(s->fd, fd);
	if (pthread_create(&thread, NULL, steal, &thief))
		_exit(3);
	/* Whatever number the closed one has, nobody takes it. */
	_exit(make_durable(id, s, fd, &end));
}

TEST_F_TIMEOUT(race, close_shutdown_and_reset_in_the_middle_leave_nothing, 600)
{
	struct net net = { variant->family, variant->link };
	struct linger lin = { 1, 0 };
	struct pmskb_store_info info;
	struct traffic t[NR];
	unsigned long r;
	int i;

	for (r = 0; r < 2 * self->rounds; r++) {
		for (i = 0; i < NR; i++)
			traffic_start(_metadata, &t[i], i, &net, &self->s);
		/* Two of them by another thread of the same process. */
		for (i = 0; i < 2; i++) {
			kill(t[i].pid, SIGKILL);
			waitpid(t[i].pid, NULL, 0);
			acknowledged(_metadata, &self->s, i, "killed");
			conn_close(&t[i].c);
			kill(t[i].sender.pid, SIGKILL);
			waitpid(t[i].sender.pid, NULL, 0);
			ASSERT_EQ(0, conn_make(&t[i].c, &net, self->s.fd, HOW_LISTENER_OPT));
			ASSERT_EQ(0, sock_mode(t[i].c.s, PMSKB_RX_DESC));
			ASSERT_EQ(0, sender_start(&t[i].sender, t[i].c.c, i, 1ULL << 40, 30000, false));
			t[i].pid = robbed_start(i, &self->s, t[i].c.s, i);
			ASSERT_LT(0, t[i].pid);
			/* The last descriptor is theirs. */
			close(t[i].c.s);
			t[i].c.s = -1;
		}
		a_while(40);
		/* Killed in the middle, and the peer's reset. */
		kill(t[2].pid, SIGKILL);
		kill(t[3].sender.pid, SIGKILL);
		setsockopt(t[3].c.c, SOL_SOCKET, SO_LINGER, &lin, sizeof(lin));
		close(t[3].c.c);
		t[3].c.c = -1;
		for (i = 0; i < NR; i++) {
			int st = traffic_stop(&t[i]);

			EXPECT_NE(1, st) TH_LOG("connection %d: %s", i, shared->wrong[i]);
		}
		ASSERT_EQ(0, store_drained(&self->s, &info)) TH_LOG("round %lu: %llu sockets, %llu tokens, %llu frames held", r,
							      info.sockets, info.tokens, info.frames_held);
		all_acknowledged(_metadata, &self->s, "after close");
	}
}

/* ---- detach ---- */

/* Opens the store and uses it a little, again and again: 0, or an errno that it may not have. */
static int user(const char *path, int nth)
{
	int fd, s, err = 0;
	char byte;

	while (!shared->stop) {
		struct pmskb_alloc a = { .len = 5000, .fd = -1 };

		fd = open(path, O_RDWR | O_CLOEXEC);
		if (fd < 0) {
			/* While there is none, or it is about to go. */
			if (errno != ENOENT && errno != ENODEV && errno != ENXIO)
				return errno;
			continue;
		}
		/* Who has it open keeps it. */
		switch (nth) {
		case 0:
			s = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
			err = sock_attach_ioctl(s, fd);
			close(s);
			break;
		case 1:
			err = ioctl(fd, PMSKB_IOC_ALLOC, &a) ? -errno : 0;
			if (!err)
				close(a.fd);
			break;
		default:
			err = pread(fd, &byte, 1, 0) == 1 ? 0 : -errno;
		}
		close(fd);
		if (err)
			return -err;
		shared->acked[nth]++;
	}
	return 0;
}

TEST_F_TIMEOUT(race, detach_is_not_noticed_by_who_uses_the_store, 300)
{
	unsigned long done = 0, busy = 0, tries;
	int cpus = sysconf(_SC_NPROCESSORS_ONLN);
	struct pmskb_attach a;
	pid_t pid[3];
	int i, err, st;

	store_let_go(&self->s);
	for (i = 0; i < 3; i++) {
		run_on(i % cpus);
		fflush(stdout);
		pid[i] = fork();
		if (!pid[i]) {
			prctl(PR_SET_PDEATHSIG, SIGKILL);
			_exit(user(self->s.path, i));
		}
	}
	run_on(-1);
	for (tries = 0; done < 5 * self->rounds && tries < 1000000; tries++) {
		err = dev_detach(self->s.ctl, self->s.minor, 1);
		if (err) {
			ASSERT_EQ(-EBUSY, err);
			busy++;
			/* Somewhere else in what they do, each time. */
			usleep(rand() % 300);
			continue;
		}
		self->s.minor = ~0U;
		done++;
		err = dev_attach(self->s.ctl, self->s.dev, &a);
		ASSERT_EQ(0, err) TH_LOG("after detach %lu: %s", done, strerror(-err));
		self->s.minor = a.minor;
	}
	shared->stop = 1;
	for (i = 0; i < 3; i++) {
		ASSERT_EQ(pid[i], waitpid(pid[i], &st, 0));
		EXPECT_EQ(0, st) TH_LOG("user %d: %s", i, WIFEXITED(st) ? strerror(WEXITSTATUS(st)) : "killed");
		EXPECT_LT(0, shared->acked[i]) TH_LOG("user %d never had it", i);
	}
	printf("# detached %lu times, refused %lu times\n", done, busy);
	EXPECT_EQ(5 * self->rounds, done);
	self->s.fd = open(self->s.path, O_RDWR | O_CLOEXEC);
	ASSERT_LE(0, self->s.fd);
	self->s.map = mmap(NULL, self->s.map_len, PROT_READ, MAP_SHARED, self->s.fd, 0);
	ASSERT_NE(MAP_FAILED, self->s.map);
}

/* ---- rmmod ---- */

static void socket_user(void)
{
	while (!shared->stop) {
		int s = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);

		if (!sock_ulp(s))
			shared->acked[0]++;
		close(s);
	}
	_exit(0);
}

static void control_user(void)
{
	struct pmskb_detach none = { .minor = 77 };

	while (!shared->stop) {
		int fd = open("/dev/pmskb", O_RDWR | O_CLOEXEC);

		if (fd < 0)
			continue;
		if (!ioctl(fd, PMSKB_IOC_DETACH, &none) || errno != ENODEV)
			_exit(1);
		close(fd);
		shared->acked[1]++;
	}
	_exit(0);
}

TEST_F_TIMEOUT(race, the_module_goes_between_two_users_and_not_under_one, 300)
{
	unsigned long r, tries, refused = 0;
	pid_t pid[2];
	int i, k, st;

	if (!have_program("modprobe"))
		SKIP(return, "there is no modprobe");
	ASSERT_EQ(0, store_close(&self->s));
	/* What the kernel would load, when a socket asks for it, has another name. */
	for (i = 0; i < 2; i++) {
		run_on(i);
		fflush(stdout);
		pid[i] = fork();
		if (!pid[i]) {
			prctl(PR_SET_PDEATHSIG, SIGKILL);
			if (i)
				control_user();
			else
				socket_user();
		}
	}
	run_on(-1);
	for (r = 0; r < self->rounds; r++) {
		for (tries = 0; syscall(SYS_delete_module, "pmskb", O_NONBLOCK); tries++) {
			ASSERT_TRUE(errno == EAGAIN || errno == EBUSY) TH_LOG("rmmod: %s", strerror(errno));
			ASSERT_GT(1000000, tries);
			refused++;
		}
		ASSERT_EQ(0, sh("modprobe pmskb"));
		for (k = 0; k < 1000 && access("/dev/pmskb", F_OK); k++)
			usleep(10000);
		a_while(20);
	}
	shared->stop = 1;
	for (i = 0; i < 2; i++) {
		ASSERT_EQ(pid[i], waitpid(pid[i], &st, 0));
		EXPECT_EQ(0, st);
		EXPECT_LT(0, shared->acked[i]);
		shared->acked[i] = 0;
	}
	printf("# unloaded %lu times, refused %lu times\n", r, refused);
	ASSERT_EQ(0, store_open(&self->s, variant->dev));
	self->references = module_references();
}

/* ---- network namespaces and links ---- */

static int link_up(const char *name, bool up)
{
	struct ifreq ifr = {};
	int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0), err = 0;

	snprintf(ifr.ifr_name, sizeof(ifr.ifr_name), "%s", name);
	if (ioctl(fd, SIOCGIFFLAGS, &ifr))
		err = -errno;
	ifr.ifr_flags = up ? ifr.ifr_flags | IFF_UP : ifr.ifr_flags & ~IFF_UP;
	if (!err && ioctl(fd, SIOCSIFFLAGS, &ifr))
		err = -errno;
	close(fd);
	return err;
}

/* A namespace that ends with the processes in it, in the middle of their traffic. */
TEST_F_TIMEOUT(race, a_network_namespace_ends_under_traffic, 300)
{
	struct net net = { variant->family, LINK_LO };
	struct pmskb_store_info info;
	unsigned long r;
	pid_t pid;
	int i;

	for (r = 0; r < 2 * self->rounds; r++) {
		fflush(stdout);
		pid = fork();
		ASSERT_LE(0, pid);
		if (!pid) {
			struct traffic t[NR];

			prctl(PR_SET_PDEATHSIG, SIGKILL);
			if (unshare(CLONE_NEWNET) || link_up("lo", true))
				_exit(1);
			for (i = 0; i < NR; i++)
				traffic_start(_metadata, &t[i], i, &net, &self->s);
			pause();
			_exit(0);
		}
		traffic_flows(_metadata, "in a namespace");
		a_while(20);
		/* All that are in it: their parent's death is theirs. */
		kill(pid, SIGKILL);
		ASSERT_EQ(pid, waitpid(pid, NULL, 0));
		ASSERT_EQ(0, store_drained(&self->s, &info)) TH_LOG("round %lu", r);
		all_acknowledged(_metadata, &self->s, "after a namespace");
	}
}

TEST_F_TIMEOUT(race, a_link_goes_down_and_up_and_the_stream_goes_on, 300)
{
	struct net net = { variant->family, variant->link };
	struct traffic t[NR];
	unsigned long r;
	int i, k;

	if (variant->link != LINK_VETH || variant->family != AF_INET)
		SKIP(return, "there is no link, or it loses its addresses");
	/*
	 * The link's own route goes with it. Over a default route somebody may answer who does not
	 * know the connection, and resets it.
	 */
	ASSERT_EQ(0, sh("ip route replace blackhole 10.77.1.0/24 metric 1000"));
	for (i = 0; i < NR; i++)
		traffic_start(_metadata, &t[i], i, &net, &self->s);
	traffic_flows(_metadata, "at first");
	for (r = 0; r < self->rounds; r++) {
		for (k = 0; k < 5; k++) {
			ASSERT_EQ(0, link_up("pmskb-a", false));
			a_while(10);
			ASSERT_EQ(0, link_up("pmskb-a", true));
			a_while(30);
		}
		traffic_flows(_metadata, "after the link was down");
	}
	for (i = 0; i < NR; i++) {
		EXPECT_EQ(0, traffic_stop(&t[i])) TH_LOG("connection %d: %s", i, shared->wrong[i]);
	}
	sh("ip route del blackhole 10.77.1.0/24 metric 1000");
}

/* ---- the driver leaves ---- */

TEST_F_TIMEOUT(race, unbinding_waits_for_a_frame_in_a_pipe_and_for_nothing_else, 600)
{
	struct net net = { variant->family, variant->link };
	char driver[PATH_MAX], name[PATH_MAX], buf[8];
	struct traffic t[NR];
	unsigned long r;
	struct conn c;
	int i, st, p[2];
	pid_t pid;

	if (driver_of(variant->dev, driver, name, PATH_MAX))
		SKIP(return, "cannot find the device's driver");
	for (r = 0; r < self->rounds; r++) {
		for (i = 0; i < NR; i++)
			traffic_start(_metadata, &t[i], i, &net, &self->s);
		ASSERT_EQ(0, conn_make(&c, &net, self->s.fd, HOW_ACCEPTED_IOCTL));
		ASSERT_EQ(0, pipe2(p, O_CLOEXEC));
		ASSERT_EQ(0, send_all(c.c, "in pipe", 7));
		ASSERT_EQ(7, splice(c.s, NULL, p[1], NULL, 7, 0));
		traffic_flows(_metadata, "before");
		run_on(r % sysconf(_SC_NPROCESSORS_ONLN));
		fflush(stdout);
		pid = fork();
		if (!pid)
			_exit(write_file(driver, "unbind", name) ? 1 : 0);
		run_on(-1);
		usleep(200000 + rand() % 100000);
		ASSERT_EQ(0, waitpid(pid, &st, WNOHANG)) TH_LOG("the frame in the pipe was not waited for");
		/* Meanwhile whoever asks hears that it is going, and is not kept. */
		EXPECT_EQ(-EBUSY, dev_detach(self->s.ctl, self->s.minor, 1));
		EXPECT_EQ(-1, pread(self->s.fd, buf, 1, 0));
		EXPECT_EQ(EIO, errno);
		EXPECT_EQ(-1, open(self->s.path, O_RDWR));
		EXPECT_EQ(ENODEV, errno);
		/* Its sockets have let go, so who received has ended. */
		for (i = 0; i < NR; i++) {
			st = traffic_stop(&t[i]);
			EXPECT_EQ(2, st) TH_LOG("connection %d ended with %d: %s", i, st, shared->wrong[i]);
		}
		ASSERT_EQ(0, waitpid(pid, &st, WNOHANG)) TH_LOG("the frame in the pipe was not waited for");
		ASSERT_EQ(7, read(p[0], buf, 7));
		EXPECT_EQ(0, memcmp(buf, "in pipe", 7));
		for (i = 0; i < 1000 * slowness() && !waitpid(pid, &st, WNOHANG); i++)
			usleep(10000);
		ASSERT_GT(1000 * slowness(), i) TH_LOG("nothing of it is left, and it waits");
		EXPECT_EQ(0, st);
		close(p[0]);
		close(p[1]);
		conn_close(&c);
		store_close(&self->s);
		ASSERT_EQ(0, dev_bind(variant->dev, driver, name)) TH_LOG("round %lu", r);
		ASSERT_EQ(0, store_open(&self->s, variant->dev)) TH_LOG("round %lu", r);
		all_acknowledged(_metadata, &self->s, "bound again");
	}
	self->references = module_references();
}

TEST_HARNESS_MAIN
