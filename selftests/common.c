// SPDX-License-Identifier: GPL-2.0
#include "common.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <libgen.h>
#include <limits.h>
#include <net/if.h>
#include <netinet/tcp.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

/* A function, or the compiler would know better. */
void *bad_ptr(void)
{
	static volatile uintptr_t address = 8;

	return (void *)address;
}

/* ---- devices and stores ---- */

const char *dev_path(enum dev dev, const char **why)
{
	const char *name = dev == DEV_PMEM ? "PMSKB_DEV_PMEM" : "PMSKB_DEV_DAX";
	const char *path = getenv(name);

	if (!path || !*path) {
		*why = dev == DEV_PMEM ? "PMSKB_DEV_PMEM is not set" : "PMSKB_DEV_DAX is not set";
		return NULL;
	}
	if (access(path, F_OK)) {
		*why = "the device does not exist";
		return NULL;
	}
	return path;
}

int ctl_open(void)
{
	int fd = open("/dev/pmskb", O_RDWR | O_CLOEXEC);

	return fd < 0 ? -errno : fd;
}

int dev_format(int ctl, int devfd, uint32_t flags, uint64_t head_bytes)
{
	struct pmskb_format f = {
		.fd = devfd,
		.flags = flags,
		.label = TEST_LABEL,
		.head_bytes = head_bytes,
	};

	return ioctl(ctl, PMSKB_IOC_FORMAT, &f) ? -errno : 0;
}

int dev_attach(int ctl, int devfd, struct pmskb_attach *a)
{
	memset(a, 0, sizeof(*a));
	a->fd = devfd;
	return ioctl(ctl, PMSKB_IOC_ATTACH, a) ? -errno : 0;
}

int dev_detach(int ctl, unsigned int minor, unsigned int timeout_ms)
{
	struct pmskb_detach d = { .minor = minor, .timeout_ms = timeout_ms };

	return ioctl(ctl, PMSKB_IOC_DETACH, &d) ? -errno : 0;
}

void dev_sweep(int ctl)
{
	struct pmskb_store_info info;
	unsigned int minor;
	char path[40];
	bool ours;
	int fd;

	for (minor = 0; minor < 64; minor++) {
		snprintf(path, sizeof(path), "/dev/pmskb%u", minor);
		fd = open(path, O_RDONLY | O_CLOEXEC);
		if (fd < 0)
			continue;
		memset(&info, 0, sizeof(info));
		ours = !ioctl(fd, PMSKB_IOC_INFO, &info) &&
		       !strncmp((char *)info.label, TEST_LABEL, sizeof(info.label));
		close(fd);
		if (ours)
			dev_detach(ctl, minor, 1000);
	}
}

/* What a child that only sends has no business to keep. */
static void *last_map;
static size_t last_len;

static int store_map(struct store *s)
{
	void *map;

	snprintf(s->path, sizeof(s->path), "/dev/pmskb%u", s->minor);
	s->fd = open(s->path, O_RDWR | O_CLOEXEC);
	if (s->fd < 0)
		return -errno;
	if (ioctl(s->fd, PMSKB_IOC_INFO, &s->info))
		return -errno;
	s->map_len = s->info.map_len;
	map = mmap(NULL, s->map_len, PROT_READ, MAP_SHARED, s->fd, 0);
	if (map == MAP_FAILED)
		return -errno;
	s->map = map;
	last_map = map;
	last_len = s->map_len;
	return 0;
}

static int store_begin(struct store *s, enum dev dev)
{
	const char *why, *path = dev_path(dev, &why);

	memset(s, 0, sizeof(*s));
	s->fd = s->dev = s->ctl = -1;
	s->minor = ~0U;
	if (!path)
		return -ENODEV;
	s->ctl = ctl_open();
	if (s->ctl < 0)
		return s->ctl;
	s->dev = open(path, O_RDWR | O_CLOEXEC);
	if (s->dev < 0)
		return -errno;
	return 0;
}

static int store_attach(struct store *s, uint32_t flags)
{
	struct pmskb_attach a = { .fd = s->dev, .flags = flags };

	if (ioctl(s->ctl, PMSKB_IOC_ATTACH, &a))
		return -errno;
	s->minor = a.minor;
	memcpy(s->uuid, a.uuid, sizeof(s->uuid));
	return store_map(s);
}

int store_make(struct store *s, enum dev dev, uint32_t flags, uint64_t head_bytes)
{
	int err = store_begin(s, dev), tries;

	if (err)
		return err;
	flags |= PMSKB_FORMAT_FORCE;
	/* A test before this one may have been killed, and is still going. */
	for (tries = 0; tries < 100; tries++) {
		err = dev_format(s->ctl, s->dev, flags, head_bytes);
		if (err != -EBUSY)
			break;
		dev_sweep(s->ctl);
		usleep(100000);
	}
	return err ?: store_attach(s, 0);
}

int store_open_as(struct store *s, enum dev dev, uint32_t flags)
{
	return store_begin(s, dev) ?: store_attach(s, flags);
}

int store_open(struct store *s, enum dev dev)
{
	return store_open_as(s, dev, 0);
}

void store_let_go(struct store *s)
{
	if (s->map)
		munmap((void *)s->map, s->map_len);
	if (last_map == s->map)
		last_map = NULL;
	s->map = NULL;
	if (s->fd >= 0)
		close(s->fd);
	s->fd = -1;
}

int store_close(struct store *s)
{
	int err = 0;

	store_let_go(s);
	if (s->minor != ~0U)
		err = dev_detach(s->ctl, s->minor, 4000 * slowness());
	s->minor = ~0U;
	if (s->dev >= 0)
		close(s->dev);
	if (s->ctl >= 0)
		close(s->ctl);
	s->dev = s->ctl = -1;
	return err;
}

int store_info(const struct store *s, struct pmskb_store_info *info)
{
	memset(info, 0xa5, sizeof(*info));
	return ioctl(s->fd, PMSKB_IOC_INFO, info) ? -errno : 0;
}

int store_quiet(const struct store *s, int ms, struct pmskb_store_info *info)
{
	int err;

	for (;; ms -= 20) {
		err = store_info(s, info);
		if (err)
			return err;
		/*
		 * Limbo is looked through only when frames run short; what is
		 * in it counts as back, and detach tells if it is.
		 */
		if (!info->tokens &&
		    info->frames_free + info->frames_limbo + info->frames_payload +
		    info->frames_record + info->frames_list + info->frames_index +
		    info->frames_held + info->frames_bad == info->frames_total) {
			info->frames_free += info->frames_limbo;
			return 0;
		}
		if (ms <= 0)
			return -ETIMEDOUT;
		usleep(20000);
	}
}

int store_scarce(const struct store *s, uint64_t left, int *fds, int nr)
{
	struct pmskb_store_info i;
	int n = 0, err;

	while (!(err = store_info(s, &i)) && n < nr && i.frames_free > left + i.frames_reserve) {
		uint64_t len = (i.frames_free - left - i.frames_reserve) * PMSKB_FRAME_SIZE;
		struct pmskb_alloc a = { .len = len < 64 << 20 ? len : 64 << 20 };

		if (ioctl(s->fd, PMSKB_IOC_ALLOC, &a))
			return -errno;
		fds[n++] = a.fd;
	}
	return err ?: n;
}

int store_limit(const struct store *s, const char *what, unsigned long value)
{
	char dir[64], text[32];

	snprintf(dir, sizeof(dir), "/sys/class/misc/pmskb%u", s->minor);
	snprintf(text, sizeof(text), "%lu\n", value);
	return write_file(dir, what, text);
}

int store_unlimited(const struct store *s)
{
	return store_limit(s, "quota_store_frames", UINT32_MAX) ?:
	       store_limit(s, "quota_socket_frames", UINT32_MAX);
}

int sock_quota(int fd, uint32_t frames, uint32_t tokens)
{
	struct pmskb_quota q = { .frames = frames, .tokens = tokens };

	return setsockopt(fd, SOL_PMSKB, PMSKB_QUOTA, &q, sizeof(q)) < 0 ? -errno : 0;
}

int store_back(const struct store *s, int ms, struct pmskb_store_info *info)
{
	for (ms *= slowness();; ms -= 20) {
		int err = store_quiet(s, 0, info);

		if (err && err != -ETIMEDOUT)
			return err;
		if (!err && !info->sockets && info->frames_free + STORE_SLACK >= s->info.frames_free &&
		    info->heads_free + STORE_SLACK >= s->info.heads_free)
			return 0;
		if (ms <= 0)
			return -ETIMEDOUT;
		usleep(20000);
	}
}

int store_flood(const struct store *s)
{
	struct pmskb_alloc a = { .len = PMSKB_MAX_BUFFER };
	int fds[64], nr = 0, frames = 0;

	while (nr < (int)ARRAY_LEN(fds) && a.len >= PMSKB_FRAME_SIZE) {
		if (ioctl(s->fd, PMSKB_IOC_ALLOC, &a)) {
			if (errno != ENOSPC)
				break;
			a.len /= 2;
			continue;
		}
		fds[nr++] = a.fd;
		frames += a.len / PMSKB_FRAME_SIZE;
	}
	while (nr)
		close(fds[--nr]);
	return frames;
}

int store_drained(const struct store *s, struct pmskb_store_info *info)
{
	int k, err;

	for (k = 0; k < 500 * slowness(); k++) {
		err = store_info(s, info);
		if (err || (!info->sockets && !info->tokens && !info->frames_held))
			return err;
		usleep(20000);
	}
	return -ETIMEDOUT;
}

const char *counters_since(const struct pmskb_counters *now, const struct pmskb_counters *was)
{
	static const char *const why[] = { "no_frame", "no_mem", "shape", "size", "copy" };
	static char text[256];
	int n, k;

	n = snprintf(text, sizeof(text), "placed %llu, %llu bytes; unplaced",
		     now->placed - was->placed, now->placed_bytes - was->placed_bytes);
	for (k = 0; k < PMSKB_UNPLACED_NR; k++) {
		if (now->unplaced[k] == was->unplaced[k])
			continue;
		n += snprintf(text + n, sizeof(text) - n, " %s=%llu",
			      k < (int)ARRAY_LEN(why) ? why[k] : "?", now->unplaced[k] - was->unplaced[k]);
	}
	if (!memcmp(now->unplaced, was->unplaced, sizeof(now->unplaced)))
		n += snprintf(text + n, sizeof(text) - n, " none");
	if (now->copied_bytes != was->copied_bytes)
		snprintf(text + n, sizeof(text) - n, "; copied %llu bytes",
			 now->copied_bytes - was->copied_bytes);
	return text;
}

const char *info_wrong(const struct pmskb_store_info *info, uint64_t key_bytes, bool shared)
{
	static char why[200];
	uint64_t sum = info->frames_free + info->frames_payload + info->frames_record +
		info->frames_list + info->frames_index + info->frames_held + info->frames_limbo +
		info->frames_bad;

	if (sum != info->frames_total) {
		snprintf(why, sizeof(why), "%llu frames, but %lu by what they are used for",
			 info->frames_total, sum);
		return why;
	}
	sum = info->live_bytes + key_bytes + info->fragmented_bytes;
	if (!shared && info->frames_payload * PMSKB_FRAME_SIZE != sum) {
		snprintf(why, sizeof(why), "%llu payload frames have %llu bytes; %llu live, %lu of keys, %llu fragmented: %lu",
			 info->frames_payload, info->frames_payload * PMSKB_FRAME_SIZE, info->live_bytes,
			 key_bytes, info->fragmented_bytes, sum);
		return why;
	}
	sum = info->frames_record * PMSKB_FRAME_SIZE;
	if (info->record_bytes > sum || info->keys > info->records) {
		snprintf(why, sizeof(why), "%llu records, %llu keys, %llu bytes of records in %llu frames",
			 info->records, info->keys, info->record_bytes, info->frames_record);
		return why;
	}
	return NULL;
}

/* ---- network ---- */

#define NETNS "pmskb-client"

int sh(const char *fmt, ...)
{
	char cmd[2048];
	va_list ap;
	int st;

	va_start(ap, fmt);
	vsnprintf(cmd, sizeof(cmd), fmt, ap);
	va_end(ap);
	st = system(cmd);
	return WIFEXITED(st) ? WEXITSTATUS(st) : 128;
}

bool have_program(const char *name)
{
	return sh("command -v %s >/dev/null 2>&1", name) == 0;
}

unsigned long env_number(const char *name, unsigned long otherwise)
{
	const char *v = getenv(name);

	return v && *v ? strtoul(v, NULL, 0) : otherwise;
}

int slowness(void)
{
	static int times;

	if (!times)
		times = env_number("PMSKB_TEST_SLOWNESS", 1);
	return times;
}

static const struct {
	const char *here, *there;
	const char *server4, *client4, *server6, *client6;
} links[] = {
	[LINK_LO] = { "lo", "lo", "127.0.0.1", "127.0.0.1", "::1", "::1" },
	[LINK_VETH] = { "pmskb-a", "pmskb-b", "10.77.1.1", "10.77.1.2", "fd77:1::1", "fd77:1::2" },
	[LINK_PLAIN] = { "pmskb-p", "pmskb-q", "10.77.2.1", "10.77.2.2", "fd77:2::1", "fd77:2::2" },
};

const char *net_up(enum link link)
{
	if (link == LINK_LO)
		return NULL;
	if (if_nametoindex(links[link].here))
		return NULL;
	if (!have_program("ip"))
		return "there is no ip program";
	if (access("/run/netns/" NETNS, F_OK) &&
	    sh("ip netns add " NETNS " && ip -n " NETNS " link set lo up"))
		return "cannot make a network namespace";
	if (sh("ip link add %s type veth peer name %s netns " NETNS,
	       links[link].here, links[link].there))
		return "cannot make a veth pair";
	if (link == LINK_PLAIN &&
	    (!have_program("ethtool") ||
	     sh("ethtool -K %s tx off rx off tso off gso off gro off sg off >/dev/null && "
		"ip netns exec " NETNS " ethtool -K %s tx off rx off tso off gso off gro off sg off >/dev/null",
		links[link].here, links[link].there))) {
		sh("ip link del %s", links[link].here);
		return "cannot switch offloads off";
	}
	/* Or a link that goes down, in one program, has lost them when another begins. */
	if (sh("sysctl -qw net.ipv6.conf.%s.keep_addr_on_down=1 && "
	       "ip netns exec " NETNS " sysctl -qw net.ipv6.conf.%s.keep_addr_on_down=1",
	       links[link].here, links[link].there))
		return "cannot keep addresses";
	if (sh("ip addr add %s/24 dev %s && ip addr add %s/64 dev %s nodad && ip link set %s up",
	       links[link].server4, links[link].here,
	       links[link].server6, links[link].here, links[link].here) ||
	    sh("ip -n " NETNS " addr add %s/24 dev %s && ip -n " NETNS
	       " addr add %s/64 dev %s nodad && ip -n " NETNS " link set %s up",
	       links[link].client4, links[link].there,
	       links[link].client6, links[link].there, links[link].there))
		return "cannot set addresses";
	return NULL;
}

int net_listen(const struct net *net, struct sockaddr_storage *addr, socklen_t *len)
{
	struct sockaddr_in6 *a6 = (void *)addr;
	struct sockaddr_in *a4 = (void *)addr;
	int fd, one = 1;

	memset(addr, 0, sizeof(*addr));
	addr->ss_family = net->family;
	if (net->family == AF_INET) {
		inet_pton(AF_INET, links[net->link].server4, &a4->sin_addr);
		*len = sizeof(*a4);
	} else {
		inet_pton(AF_INET6, links[net->link].server6, &a6->sin6_addr);
		*len = sizeof(*a6);
	}
	fd = socket(net->family, (net->type ?: SOCK_STREAM) | SOCK_CLOEXEC, 0);
	if (fd < 0)
		return -errno;
	setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
	if (bind(fd, (void *)addr, *len) || (net->type != SOCK_DGRAM && listen(fd, 512)) ||
	    getsockname(fd, (void *)addr, len)) {
		int err = -errno;

		close(fd);
		return err;
	}
	return fd;
}

int net_client(const struct net *net)
{
	int fd, here = -1, there, err = 0;

	if (net->link != LINK_LO) {
		here = open("/proc/thread-self/ns/net", O_RDONLY | O_CLOEXEC);
		there = open("/run/netns/" NETNS, O_RDONLY | O_CLOEXEC);
		if (here < 0 || there < 0 || setns(there, CLONE_NEWNET))
			err = -errno;
		if (there >= 0)
			close(there);
		if (err)
			return err;
	}
	fd = socket(net->family, (net->type ?: SOCK_STREAM) | SOCK_CLOEXEC, 0);
	if (fd < 0)
		err = -errno;
	if (here >= 0) {
		if (setns(here, CLONE_NEWNET))
			abort();
		close(here);
	}
	return err ?: fd;
}

int net_connect(const struct net *net, const struct sockaddr_storage *addr, socklen_t len)
{
	int fd = net_client(net);

	if (fd >= 0 && connect(fd, (const void *)addr, len)) {
		int err = -errno;

		close(fd);
		return err;
	}
	return fd;
}

/* ---- sockets ---- */

int sock_ulp(int fd)
{
	return setsockopt(fd, SOL_TCP, TCP_ULP, PMSKB_ULP_NAME, sizeof(PMSKB_ULP_NAME)) ? -errno : 0;
}

int sock_attach_opt(int fd, int store_fd)
{
	int err = sock_ulp(fd);

	if (err)
		return err;
	return setsockopt(fd, SOL_PMSKB, PMSKB_ATTACH, &store_fd, sizeof(store_fd)) ? -errno : 0;
}

int sock_attach_ioctl(int fd, int store_fd)
{
	__s32 arg = fd;

	/* As the number says: the argument is the descriptor itself. */
	return ioctl(store_fd, PMSKB_IOC_ATTACH_SOCKET, &arg) ? -errno : 0;
}

int sock_mode(int fd, uint32_t mode)
{
	return setsockopt(fd, SOL_PMSKB, PMSKB_RX_MODE, &mode, sizeof(mode)) ? -errno : 0;
}

int sock_info(int fd, struct pmskb_sock_info *info)
{
	socklen_t len = sizeof(*info);

	memset(info, 0xa5, sizeof(*info));
	if (getsockopt(fd, SOL_PMSKB, PMSKB_INFO, info, &len))
		return -errno;
	return len == sizeof(*info) ? 0 : -EMSGSIZE;
}

int set_auto(int fd, uint32_t on)
{
	return setsockopt(fd, SOL_PMSKB, PMSKB_AUTO_PERSIST, &on, sizeof(on)) ? errno : 0;
}

uint64_t logged_bytes(int fd)
{
	struct pmskb_sock_info i;

	return sock_info(fd, &i) ? 0 : i.counters.logged_bytes;
}

bool comes_to(int fd, uint64_t bytes)
{
	int i;

	for (i = 0; i < 3000 * slowness() && logged_bytes(fd) < bytes; i++)
		usleep(1000);
	return logged_bytes(fd) == bytes;
}

int timeout_set(int fd, int ms)
{
	struct timeval tv = { ms / 1000, ms % 1000 * 1000 };

	return setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &tv, sizeof(tv)) ? -errno : 0;
}

int conn_make(struct conn *c, const struct net *net, int store_fd, enum how how)
{
	struct sockaddr_storage addr;
	int err = 0, l, one = 1;
	socklen_t len;

	c->s = c->c = -1;
	l = net_listen(net, &addr, &len);
	if (l < 0)
		return l;
	if (how == HOW_LISTENER_OPT)
		err = sock_attach_opt(l, store_fd);
	else if (how == HOW_LISTENER_IOCTL)
		err = sock_attach_ioctl(l, store_fd);
	if (!err) {
		c->c = net_connect(net, &addr, len);
		if (c->c < 0)
			err = c->c;
	}
	if (!err) {
		c->s = accept4(l, NULL, NULL, SOCK_CLOEXEC);
		if (c->s < 0)
			err = -errno;
	}
	close(l);
	if (!err && how == HOW_ACCEPTED_OPT)
		err = sock_attach_opt(c->s, store_fd);
	else if (!err && how == HOW_ACCEPTED_IOCTL)
		err = sock_attach_ioctl(c->s, store_fd);
	if (err) {
		conn_close(c);
		return err;
	}
	setsockopt(c->c, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
	/* A test that would hang fails instead. */
	timeout_set(c->s, 20000 * slowness());
	timeout_set(c->c, 20000 * slowness());
	return 0;
}

void conn_close(struct conn *c)
{
	if (c->c >= 0)
		close(c->c);
	if (c->s >= 0)
		close(c->s);
	c->c = c->s = -1;
}

/* ---- data ---- */

static inline uint64_t mix(uint64_t x)
{
	x += 0x9e3779b97f4a7c15ULL;
	x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
	x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
	return x ^ (x >> 31);
}

static inline uint64_t word(uint32_t seed, uint64_t n)
{
	return mix(((uint64_t)seed << 40) ^ n);
}

void fill(void *buf, size_t len, uint32_t seed, uint64_t pos)
{
	uint8_t *p = buf;

	while (len) {
		uint64_t w = word(seed, pos / 8);
		size_t off = pos % 8, n = 8 - off;

		if (n > len)
			n = len;
		memcpy(p, (uint8_t *)&w + off, n);
		p += n;
		pos += n;
		len -= n;
	}
}

ssize_t differs(const void *buf, size_t len, uint32_t seed, uint64_t pos)
{
	const uint8_t *p = buf;
	uint64_t start = pos;

	while (len) {
		uint64_t w = word(seed, pos / 8);
		size_t off = pos % 8, n = 8 - off, i;

		if (n > len)
			n = len;
		if (memcmp(p, (uint8_t *)&w + off, n))
			for (i = 0; i < n; i++)
				if (p[i] != ((uint8_t *)&w)[off + i])
					return pos - start + i;
		p += n;
		pos += n;
		len -= n;
	}
	return -1;
}

uint16_t rfc1071_norm(uint16_t sum)
{
	return sum == 0xffff ? 0 : sum;
}

uint16_t rfc1071(const void *buf, size_t len)
{
	const uint8_t *p = buf;
	uint64_t sum = 0;
	size_t i;

	for (i = 0; i + 1 < len; i += 2)
		sum += (uint32_t)p[i] << 8 | p[i + 1];
	if (len & 1)
		sum += (uint32_t)p[len - 1] << 8;
	while (sum >> 16)
		sum = (sum & 0xffff) + (sum >> 16);
	return rfc1071_norm(htons(sum));
}

int send_all(int fd, const void *buf, size_t len)
{
	const uint8_t *p = buf;

	while (len) {
		ssize_t n = send(fd, p, len, MSG_NOSIGNAL);

		if (n < 0) {
			if (errno == EINTR)
				continue;
			return -errno;
		}
		p += n;
		len -= n;
	}
	return 0;
}

ssize_t send_ranges(int fd, const void *head, size_t len, const struct pmskb_send *s, int nr, int flags)
{
	char control[(PMSKB_MAX_SENDS + 1) * CMSG_SPACE(sizeof(*s))] = {};
	struct iovec iov = { (void *)head, len };
	struct msghdr msg = {
		.msg_iov = &iov,
		.msg_iovlen = 1,
		.msg_control = control,
		.msg_controllen = nr * CMSG_SPACE(sizeof(*s)),
	};
	struct cmsghdr *c = CMSG_FIRSTHDR(&msg);
	ssize_t n;
	int i;

	for (i = 0; i < nr; i++, c = CMSG_NXTHDR(&msg, c)) {
		c->cmsg_level = SOL_PMSKB;
		c->cmsg_type = PMSKB_CMSG_SEND;
		c->cmsg_len = CMSG_LEN(sizeof(*s));
		memcpy(CMSG_DATA(c), &s[i], sizeof(*s));
	}
	n = sendmsg(fd, &msg, flags);
	return n < 0 ? -errno : n;
}

int recv_all(int fd, void *buf, size_t len)
{
	uint8_t *p = buf;

	while (len) {
		ssize_t n = recv(fd, p, len, 0);

		if (n < 0)
			return -errno;
		if (!n)
			return -EPIPE;
		p += n;
		len -= n;
	}
	return 0;
}

int sender_start(struct sender *s, int fd, uint32_t seed, uint64_t len, size_t max_write, bool shut)
{
	static uint8_t buf[256 * 1024];
	uint64_t pos = 0;

	s->pid = fork();
	if (s->pid < 0)
		return -errno;
	if (s->pid)
		return 0;
	/* If the test fails, nothing of this may hold the store or outlive it. */
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	if (last_map)
		munmap(last_map, last_len);
	if (fd > 3)
		close_range(3, fd - 1, 0);
	close_range(fd + 1, ~0U, 0);
	while (pos < len) {
		uint64_t n = max_write > sizeof(buf) ? sizeof(buf) : max_write;

		/* Every size up to the largest, in no order. */
		n = 1 + mix(seed + pos) % n;
		if (n > len - pos)
			n = len - pos;
		fill(buf, n, seed, pos);
		if (send_all(fd, buf, n))
			_exit(1);
		pos += n;
	}
	if (shut && shutdown(fd, SHUT_WR))
		_exit(2);
	_exit(0);
}

int sender_wait(struct sender *s)
{
	int st;

	if (waitpid(s->pid, &st, 0) != s->pid)
		return -errno;
	return WIFEXITED(st) ? WEXITSTATUS(st) : 128;
}

/* ---- descriptors ---- */

int desc_recv_flags(int fd, struct pmskb_desc *d, int max, int flags, ssize_t *bytes, int *msg_flags)
{
	size_t room = max * CMSG_SPACE(sizeof(*d));
	char *control = calloc(1, room ?: 1);
	/* No buffers for bytes: there is no bound then. */
	struct msghdr msg = {
		.msg_control = control,
		.msg_controllen = room,
	};
	struct cmsghdr *cmsg;
	ssize_t ret;
	int n = 0;

	ret = recvmsg(fd, &msg, flags);
	if (bytes)
		*bytes = ret;
	if (msg_flags)
		*msg_flags = msg.msg_flags;
	if (ret < 0) {
		n = -errno;
		free(control);
		return n;
	}
	for (cmsg = CMSG_FIRSTHDR(&msg); cmsg; cmsg = CMSG_NXTHDR(&msg, cmsg)) {
		if (cmsg->cmsg_level != SOL_PMSKB || cmsg->cmsg_type != PMSKB_CMSG_DESC)
			continue;
		if (cmsg->cmsg_len != CMSG_LEN(sizeof(*d)) || n >= max) {
			free(control);
			return -EBADMSG;
		}
		memcpy(&d[n++], CMSG_DATA(cmsg), sizeof(*d));
	}
	free(control);
	return n;
}

int desc_recv_bytes(int fd, struct pmskb_desc *d, int max, size_t len)
{
	size_t have = 0;
	ssize_t bytes;
	int n = 0, got, i;

	while (have < len) {
		if (n == max)
			return -ENOBUFS;
		got = desc_recv_flags(fd, d + n, max - n < 64 ? max - n : 64, 0, &bytes, NULL);
		if (got < 0)
			return got;
		if (!got)
			return bytes ? -EBADMSG : -EPIPE;
		for (i = 0; i < got; i++)
			have += d[n + i].len;
		n += got;
	}
	return have == len ? n : -EOVERFLOW;
}

int desc_release(int fd, uint32_t first, uint32_t count)
{
	struct pmskb_token_range r = { first, count };

	return setsockopt(fd, SOL_PMSKB, PMSKB_RELEASE, &r, sizeof(r)) < 0 ? -errno : 0;
}

int desc_release_all(int fd, const struct pmskb_desc *d, int n)
{
	struct pmskb_token_range r[64];
	int i = 0, nr = 0;

	while (i < n) {
		nr = 0;
		for (; i < n; i++) {
			if (nr && r[nr - 1].first + r[nr - 1].count == d[i].token) {
				r[nr - 1].count++;
				continue;
			}
			if (nr == (int)ARRAY_LEN(r))
				break;
			r[nr].first = d[i].token;
			r[nr++].count = 1;
		}
		if (setsockopt(fd, SOL_PMSKB, PMSKB_RELEASE, r, nr * sizeof(r[0])) < 0)
			return -errno;
	}
	return 0;
}

/* ---- operations ---- */

int submit(int store_fd, const struct pmskb_op *ops, struct pmskb_result *res, uint32_t nr)
{
	struct pmskb_submit s = { .ops = PTR(ops), .results = PTR(res), .nr = nr };

	return ioctl(store_fd, PMSKB_IOC_SUBMIT, &s) < 0 ? -errno : 0;
}

int persist(int fd, const struct pmskb_op *ops, struct pmskb_result *res, uint32_t nr)
{
	struct pmskb_submit s = { .ops = PTR(ops), .results = PTR(res), .nr = nr };

	return setsockopt(fd, SOL_PMSKB, PMSKB_PERSIST, &s, sizeof(s)) < 0 ? -errno : 0;
}

int64_t persist_one(int fd, const struct pmskb_op *op, struct pmskb_result *res)
{
	struct pmskb_result r;
	int err;

	memset(&r, 0xa5, sizeof(r));
	err = persist(fd, op, &r, 1);
	if (res)
		*res = r;
	return err ? CALL_FAILED(err) : r.res;
}

struct pmskb_op op_put(const void *key, uint32_t key_len, const struct pmskb_ext *ext, uint32_t nr)
{
	struct pmskb_op op = {
		.opcode = PMSKB_OP_PUT,
		.fd = -1,
		.key = PTR(key),
		.key_len = key_len,
		.nr_extents = nr,
		.extents = PTR(ext),
	};

	return op;
}

struct pmskb_op op_delete(const void *key, uint32_t key_len)
{
	struct pmskb_op op = op_put(key, key_len, NULL, 0);

	op.opcode = PMSKB_OP_DELETE;
	return op;
}

struct pmskb_op op_release(const struct pmskb_ext *ext, uint32_t nr)
{
	struct pmskb_op op = op_put(NULL, 0, ext, nr);

	op.opcode = PMSKB_OP_RELEASE;
	return op;
}

struct pmskb_op op_truncate(uint64_t seq)
{
	struct pmskb_op op = op_put(NULL, 0, NULL, 0);

	op.opcode = PMSKB_OP_TRUNCATE;
	op.seq = seq;
	return op;
}

int way_submit(const struct way *w, struct pmskb_op *ops, struct pmskb_result *res, uint32_t nr, uint32_t flags)
{
	struct pmskb_submit s = { .ops = PTR(ops), .results = PTR(res), .nr = nr, .flags = flags };
	uint32_t i;

	for (i = 0; i < nr; i++)
		ops[i].fd = w->ioctl && ops[i].nr_extents ? w->sock : -1;
	if (w->ioctl)
		return ioctl(w->store, PMSKB_IOC_SUBMIT, &s) < 0 ? -errno : 0;
	return setsockopt(w->sock, SOL_PMSKB, PMSKB_PERSIST, &s, sizeof(s)) < 0 ? -errno : 0;
}

int64_t way_one(const struct way *w, struct pmskb_op op, struct pmskb_result *res)
{
	struct pmskb_result r;
	int err;

	memset(&r, 0xa5, sizeof(r));
	err = way_submit(w, &op, &r, 1, 0);
	if (res)
		*res = r;
	return err ? CALL_FAILED(err) : r.res;
}

struct pmskb_ext ext_of(const struct pmskb_desc *d)
{
	struct pmskb_ext e = { .token = d->token, .len = d->len };

	return e;
}

void exts_of(struct pmskb_ext *e, const struct pmskb_desc *d, int n)
{
	int i;

	for (i = 0; i < n; i++)
		e[i] = ext_of(&d[i]);
}

int exts_part(struct pmskb_ext *out, const struct pmskb_desc *d, int n, uint64_t from, uint64_t len)
{
	uint64_t at = 0;
	int i, m = 0;

	for (i = 0; i < n && len; at += d[i].len, i++) {
		uint64_t off, take;

		if (from >= at + d[i].len)
			continue;
		off = from - at;
		take = d[i].len - off < len ? d[i].len - off : len;
		out[m++] = (struct pmskb_ext) { d[i].token, off, take, 0 };
		from += take;
		len -= take;
	}
	return len ? -1 : m;
}

int driver_of(enum dev dev, char *driver, char *name, size_t size)
{
	const char *why, *path = dev_path(dev, &why);
	char link[PATH_MAX], real[PATH_MAX];

	if (!path)
		return -ENODEV;
	path = strrchr(path, '/') + 1;
	if (dev == DEV_PMEM)
		snprintf(link, sizeof(link), "/sys/block/%s/device", path);
	else
		snprintf(link, sizeof(link), "/sys/bus/dax/devices/%s", path);
	if (!realpath(link, real))
		return -errno;
	snprintf(name, size, "%s", basename(real));
	strncat(link, "/driver", sizeof(link) - strlen(link) - 1);
	if (!realpath(link, real))
		return -errno;
	snprintf(driver, size, "%s", real);
	return 0;
}

int write_file(const char *dir, const char *file, const char *text)
{
	char path[PATH_MAX];
	int fd, err;

	snprintf(path, sizeof(path), "%s/%s", dir, file);
	fd = open(path, O_WRONLY | O_CLOEXEC);
	if (fd < 0)
		return -errno;
	err = write(fd, text, strlen(text)) < 0 ? -errno : 0;
	close(fd);
	return err;
}

int dev_unbind(const char *driver, const char *name)
{
	pid_t pid = fork();
	int k, st;

	if (!pid)
		_exit(write_file(driver, "unbind", name) ? 1 : 0);
	for (k = 0; k < 3000 * slowness(); k++) {
		if (waitpid(pid, &st, WNOHANG) == pid)
			return st ? -EIO : 0;
		usleep(10000);
	}
	return -ETIMEDOUT;
}

int dev_bind(enum dev dev, const char *driver, const char *name)
{
	const char *why, *path;
	int err = write_file(driver, "bind", name), k, fd;

	for (k = 0; !err && k < 500 * slowness(); k++) {
		path = dev_path(dev, &why);
		fd = path ? open(path, O_RDWR | O_CLOEXEC) : -1;
		if (fd >= 0) {
			close(fd);
			return 0;
		}
		usleep(10000);
	}
	return err ?: -ENODEV;
}

long read_number(const char *path)
{
	FILE *f = fopen(path, "r");
	long v = -1;

	if (!f)
		return -1;
	if (fscanf(f, "%ld", &v) != 1)
		v = -1;
	fclose(f);
	return v;
}

long module_references(void)
{
	return read_number("/sys/module/pmskb/refcnt");
}

void run_on(int cpu)
{
	cpu_set_t set;
	int i;

	CPU_ZERO(&set);
	for (i = 0; i < CPU_SETSIZE; i++)
		if (cpu < 0 || i == cpu)
			CPU_SET(i, &set);
	sched_setaffinity(0, sizeof(set), &set);
}
