// SPDX-License-Identifier: GPL-2.0
/*
 * Promises about records that are open as files (PMSKB_IOC_OPEN): their bytes,
 * their size, and that they stay what they are until the last close.
 */
#include "common.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <sys/wait.h>

#include "harness.h"

#define ERRNO(call) ((call) < 0 ? errno : 0)
#define MAX_DESC 4096

static struct pmskb_desc d[MAX_DESC];
static struct pmskb_ext e[MAX_DESC];
static uint8_t data[1 << 20], back[1 << 20];
/* Descriptors of the last put. */
static int parts;

FIXTURE(object) {
	struct store s;
	struct conn c;
	struct net net;
};

FIXTURE_VARIANT(object) {
	int family;
	enum dev dev;
	enum link link;
};

FIXTURE_VARIANT_ADD(object, v4_pmem_lo) { AF_INET, DEV_PMEM, LINK_LO };
FIXTURE_VARIANT_ADD(object, v6_dax_noffload) { AF_INET6, DEV_DAX, LINK_PLAIN };

FIXTURE_SETUP(object)
{
	const char *why;

	if (!dev_path(variant->dev, &why))
		SKIP(return, "%s", why);
	why = net_up(variant->link);
	if (why)
		SKIP(return, "%s", why);
	self->net = (struct net) { variant->family, variant->link };
	ASSERT_EQ(0, store_make(&self->s, variant->dev, 0, 0));
	ASSERT_EQ(0, conn_make(&self->c, &self->net, self->s.fd, HOW_ACCEPTED_IOCTL));
	ASSERT_EQ(0, sock_mode(self->c.s, PMSKB_RX_DESC));
}

FIXTURE_TEARDOWN(object)
{
	struct pmskb_store_info info;

	conn_close(&self->c);
	if (self->s.fd >= 0)
		EXPECT_EQ(0, store_quiet(&self->s, 5000, &info)) TH_LOG("frames are left behind");
	EXPECT_EQ(0, store_close(&self->s));
}

/* Receives len bytes of stream seed and puts them; the sequence number. */
static int64_t put(struct conn *c, const void *key, uint32_t key_len, uint32_t seed, size_t len)
{
	struct pmskb_op op;
	struct sender snd;
	int n, err;

	err = sender_start(&snd, c->c, seed, len, 9000, false);
	if (err)
		return err;
	n = desc_recv_bytes(c->s, d, MAX_DESC, len);
	err = sender_wait(&snd);
	if (n < 0 || err)
		return n < 0 ? n : -ECHILD;
	parts = n;
	exts_of(e, d, n);
	op = op_put(key, key_len, e, n);
	return persist_one(c->s, &op, NULL);
}

static int64_t del(const struct store *s, const char *key)
{
	struct pmskb_op op = { .opcode = PMSKB_OP_DELETE, .fd = -1, .key = PTR(key), .key_len = strlen(key) };
	struct pmskb_result r = {};
	int err = submit(s->fd, &op, &r, 1);

	return err ?: r.res;
}

static int open_key(const struct store *s, const void *key, uint32_t len, struct pmskb_open *o)
{
	*o = (struct pmskb_open) { .key = PTR(key), .key_len = len, .fd = -1 };
	return ioctl(s->fd, PMSKB_IOC_OPEN, o) ? -errno : o->fd;
}

static int open_seq(const struct store *s, uint64_t seq, struct pmskb_open *o)
{
	*o = (struct pmskb_open) { .flags = PMSKB_OPEN_SEQ, .seq = seq, .fd = -1 };
	return ioctl(s->fd, PMSKB_IOC_OPEN, o) ? -errno : o->fd;
}

/* Whether fd has just these bytes of stream seed. */
static bool has(int fd, uint32_t seed, size_t len)
{
	size_t got = 0;
	ssize_t n;

	while ((n = pread(fd, back + got, sizeof(back) - got, got)) > 0)
		got += n;
	return !n && got == len && differs(back, len, seed, 0) < 0;
}

TEST_F(object, it_has_the_bytes_the_size_and_what_the_record_says)
{
	static const size_t sizes[] = { 0, 1, 2, 4095, 4096, 4097, 70001, 1 << 20 };
	struct pmskb_open k, q;
	struct pmskb_desc last;
	struct stat st;
	char key[16];
	int64_t seq;
	size_t i;
	int fd;

	for (i = 0; i < ARRAY_LEN(sizes); i++) {
		size_t len = sizes[i];

		snprintf(key, sizeof(key), "key %zu", i);
		seq = put(&self->c, key, strlen(key), i, len);
		ASSERT_LT(0, seq) TH_LOG("%zu bytes", len);
		last = d[parts ? parts - 1 : 0];
		fill(data, len, i, 0);
		ASSERT_LE(0, open_key(&self->s, key, strlen(key), &k));
		ASSERT_LE(0, open_seq(&self->s, seq, &q));
		EXPECT_NE(k.fd, q.fd);
		for (fd = k.fd;; fd = q.fd) {
			const struct pmskb_open *o = fd == k.fd ? &k : &q;

			EXPECT_TRUE(has(fd, i, len)) TH_LOG("%zu bytes", len);
			EXPECT_EQ(seq, o->seq);
			EXPECT_EQ(len, o->len);
			EXPECT_EQ(rfc1071(data, len), o->csum) TH_LOG("%zu bytes", len);
			EXPECT_NE(PMSKB_CSUM_NONE, o->csum_kind);
			/* It is there when its last packet has come. */
			if (len) {
				EXPECT_EQ(last.time, o->time);
				EXPECT_EQ(last.time_source, o->time_source);
			}
			EXPECT_NE(0, o->time);
			EXPECT_NE(PMSKB_TIME_NONE, o->time_source);
			ASSERT_EQ(0, fstat(fd, &st));
			EXPECT_EQ(len, st.st_size);
			EXPECT_EQ(FD_CLOEXEC, fcntl(fd, F_GETFD));
			EXPECT_EQ(O_RDONLY, fcntl(fd, F_GETFL) & O_ACCMODE);
			if (fd == q.fd)
				break;
		}
		EXPECT_EQ(0, close(k.fd));
		EXPECT_TRUE(has(q.fd, i, len));
		EXPECT_EQ(0, close(q.fd));
	}
}

TEST_F(object, it_is_read_at_any_place_and_sought_in)
{
	enum { LEN = 70001 };
	struct iovec iov[3];
	struct pmskb_open o;
	uint8_t buf[64];
	size_t at, n;
	int fd;

	ASSERT_LT(0, put(&self->c, "k", 1, 5, LEN));
	fd = open_key(&self->s, "k", 1, &o);
	ASSERT_LE(0, fd);
	for (at = 0; at < LEN; at += 997) {
		for (n = 1; n < 9000; n = n * 3 + 1) {
			size_t want = n < LEN - at ? n : LEN - at;

			ASSERT_EQ(want, pread(fd, back, n, at));
			ASSERT_EQ(-1, differs(back, want, 5, at)) TH_LOG("%zu bytes at %zu", n, at);
		}
	}
	EXPECT_EQ(0, pread(fd, back, 1, LEN));
	EXPECT_EQ(0, pread(fd, back, 1, 0x7fffffffffff0000L));
	EXPECT_EQ(EINVAL, ERRNO(pread(fd, back, 1, -1)));
	/* With a position. */
	EXPECT_EQ(LEN, lseek(fd, 0, SEEK_END));
	EXPECT_EQ(0, read(fd, buf, sizeof(buf)));
	EXPECT_EQ(LEN - 10, lseek(fd, -10, SEEK_END));
	EXPECT_EQ(10, read(fd, buf, sizeof(buf)));
	EXPECT_EQ(-1, differs(buf, 10, 5, LEN - 10));
	EXPECT_EQ(4000, lseek(fd, 4000, SEEK_SET));
	iov[0] = (struct iovec) { back, 90 };
	iov[1] = (struct iovec) { back + 90, 0 };
	iov[2] = (struct iovec) { back + 90, 5000 };
	EXPECT_EQ(5090, readv(fd, iov, 3));
	EXPECT_EQ(-1, differs(back, 5090, 5, 4000));
	EXPECT_EQ(9090, lseek(fd, 0, SEEK_CUR));
	EXPECT_EQ(EINVAL, ERRNO(lseek(fd, -1, SEEK_SET)));
	/* Bad memory, at once and later. */
	EXPECT_EQ(EFAULT, ERRNO(pread(fd, BAD_PTR, 16, 0)));
	iov[1] = (struct iovec) { BAD_PTR, 16 };
	EXPECT_EQ(90, preadv(fd, iov, 2, 0));
	/* For reading only, and not to be mapped: the store's mapping is there for that. */
	EXPECT_EQ(EBADF, ERRNO(pwrite(fd, "x", 1, 0)));
	EXPECT_EQ(EINVAL, ERRNO(ftruncate(fd, 0)));
	EXPECT_EQ(MAP_FAILED, mmap(NULL, 4096, PROT_READ, MAP_SHARED, fd, 0));
	EXPECT_EQ(ENODEV, errno);
	EXPECT_EQ(ENOTTY, ERRNO(ioctl(fd, PMSKB_IOC_OPEN, &o)));
	snprintf((char *)buf, sizeof(buf), "/proc/self/fd/%d", fd);
	EXPECT_EQ(-1, open((char *)buf, O_RDWR)) TH_LOG("opened again, for writing");
	close(fd);
}

/* As many bytes as asked for, to the other end of a connection. */
static int send_file(int out, int fd, off_t off, size_t len)
{
	while (len) {
		ssize_t n = sendfile(out, fd, &off, len);

		if (n <= 0)
			return n ? -errno : -EPIPE;
		len -= n;
	}
	return 0;
}

TEST_F(object, it_is_sent_and_spliced)
{
	enum { LEN = 300001 };
	int pipes[2], fd, st;
	struct pmskb_open o;
	struct conn out;
	size_t got = 0;
	loff_t off = 1;
	pid_t pid;

	ASSERT_LT(0, put(&self->c, "k", 1, 6, LEN));
	fd = open_key(&self->s, "k", 1, &o);
	ASSERT_LE(0, fd);
	ASSERT_EQ(0, conn_make(&out, &self->net, -1, HOW_PLAIN));
	pid = fork();
	if (!pid)
		_exit(send_file(out.s, fd, 0, LEN) || send_file(out.s, fd, 4090, 8200));
	ASSERT_EQ(0, recv_all(out.c, back, LEN));
	EXPECT_EQ(-1, differs(back, LEN, 6, 0));
	ASSERT_EQ(0, recv_all(out.c, back, 8200));
	EXPECT_EQ(-1, differs(back, 8200, 6, 4090));
	ASSERT_EQ(pid, waitpid(pid, &st, 0));
	EXPECT_EQ(0, st);
	conn_close(&out);

	ASSERT_EQ(0, pipe(pipes));
	while (got < LEN - 1) {
		ssize_t n = splice(fd, &off, pipes[1], NULL, LEN, 0);

		ASSERT_LT(0, n);
		ASSERT_GE(LEN - 1, got + n);
		ASSERT_EQ(n, read(pipes[0], back + got, n));
		got += n;
	}
	EXPECT_EQ(-1, differs(back, LEN - 1, 6, 1));
	EXPECT_EQ(0, splice(fd, &off, pipes[1], NULL, LEN, 0)) TH_LOG("there is more after the end");
	close(pipes[0]);
	close(pipes[1]);
	close(fd);
}

TEST_F(object, the_bytes_stay_when_the_record_is_replaced_or_deleted)
{
	enum { LEN = 200000 };
	struct pmskb_store_info before, info;
	int replaced, deleted, now;
	struct pmskb_open o;
	int64_t seq;

	ASSERT_EQ(0, store_quiet(&self->s, 5000, &before));
	seq = put(&self->c, "replaced", 8, 1, LEN);
	ASSERT_LT(0, seq);
	ASSERT_LT(0, put(&self->c, "deleted", 7, 2, LEN));
	replaced = open_key(&self->s, "replaced", 8, &o);
	deleted = open_key(&self->s, "deleted", 7, &o);
	ASSERT_LE(0, replaced);
	ASSERT_LE(0, deleted);
	ASSERT_LT(0, put(&self->c, "replaced", 8, 3, LEN));
	/* It waits to be killed with the next array, but has lost its key. */
	EXPECT_EQ(-ENOENT, open_seq(&self->s, seq, &o));
	ASSERT_LT(0, del(&self->s, "deleted"));
	ASSERT_LT(0, put(&self->c, "other", 5, 4, 1));
	EXPECT_EQ(-ENOENT, open_key(&self->s, "deleted", 7, &o));
	EXPECT_EQ(-ENOENT, open_seq(&self->s, seq, &o));
	now = open_key(&self->s, "replaced", 8, &o);
	ASSERT_LE(0, now);

	ASSERT_EQ(0, store_quiet(&self->s, 5000, &info));
	EXPECT_LE(info.frames_free, info.frames_reserve + store_flood(&self->s));
	EXPECT_TRUE(has(replaced, 1, LEN)) TH_LOG("frames of a replaced record were reused");
	EXPECT_TRUE(has(deleted, 2, LEN)) TH_LOG("frames of a deleted record were reused");
	EXPECT_TRUE(has(now, 3, LEN));

	/* All three are still there; then two of them go. */
	ASSERT_EQ(0, store_quiet(&self->s, 5000, &info));
	EXPECT_LE(3 * LEN / PMSKB_FRAME_SIZE, before.frames_free - info.frames_free);
	close(replaced);
	close(deleted);
	ASSERT_EQ(0, store_quiet(&self->s, 5000, &info));
	EXPECT_GT(2 * LEN / PMSKB_FRAME_SIZE, before.frames_free - info.frames_free)
		TH_LOG("%llu frames do not come back", before.frames_free - info.frames_free);
	EXPECT_TRUE(has(now, 3, LEN));
	close(now);
}

TEST_F(object, the_last_close_is_the_one_that_counts)
{
	struct pmskb_open o;
	int fd, copy, st, i, go[2];
	pid_t pid;
	char byte;

	ASSERT_LT(0, put(&self->c, "k", 1, 7, 50000));
	fd = open_key(&self->s, "k", 1, &o);
	ASSERT_LE(0, fd);
	copy = dup(fd);
	ASSERT_EQ(0, pipe(go));
	pid = fork();
	if (!pid)
		_exit(read(go[0], &byte, 1) != 1 || !has(fd, 7, 50000));
	ASSERT_LT(0, del(&self->s, "k"));
	ASSERT_LT(0, put(&self->c, "other", 5, 8, 1));
	close(fd);
	EXPECT_TRUE(has(copy, 7, 50000));
	close(copy);
	/* The child has the last one. */
	EXPECT_LT(0, store_flood(&self->s));
	ASSERT_EQ(1, write(go[1], "g", 1));
	ASSERT_EQ(pid, waitpid(pid, &st, 0));
	EXPECT_EQ(0, st);
	close(go[0]);
	close(go[1]);

	/* The same record many times over: holds are counted. */
	ASSERT_LT(0, put(&self->c, "k", 1, 9, 5000));
	for (i = 0; i < 2000; i++) {
		fd = open_key(&self->s, "k", 1, &o);
		ASSERT_LE(0, fd);
		ASSERT_EQ(0, close(fd));
	}
	fd = open_key(&self->s, "k", 1, &o);
	EXPECT_TRUE(has(fd, 9, 5000));
	close(fd);
}

TEST_F(object, what_cannot_be_opened_says_why)
{
	struct pmskb_store_info before, info;
	struct rlimit limit, none;
	char long_key[1025] = {};
	struct pmskb_open o;
	int64_t seq;
	int fd;

	seq = put(&self->c, "k", 1, 1, 5000);
	ASSERT_LT(0, seq);
	ASSERT_EQ(0, store_quiet(&self->s, 5000, &before));
#define OPEN(...) ERRNO(ioctl(self->s.fd, PMSKB_IOC_OPEN, &(struct pmskb_open) { __VA_ARGS__ }))
	EXPECT_EQ(ENOENT, OPEN(.key = PTR("x"), .key_len = 1));
	EXPECT_EQ(ENOENT, OPEN(.key = PTR("kk"), .key_len = 2));
	EXPECT_EQ(ENOENT, OPEN(.key = PTR(long_key), .key_len = 1024));
	EXPECT_EQ(ENAMETOOLONG, OPEN(.key = PTR(long_key), .key_len = 1025));
	EXPECT_EQ(ENAMETOOLONG, OPEN(.key = PTR(long_key), .key_len = ~0U));
	EXPECT_EQ(EINVAL, OPEN(.key = PTR("k")));
	EXPECT_EQ(EINVAL, OPEN(.key = PTR("k"), .key_len = 1, .flags = 1U << 1));
	EXPECT_EQ(EINVAL, OPEN(.key = PTR("k"), .key_len = 1, .flags = 1U << 31));
	EXPECT_EQ(EINVAL, OPEN(.key = PTR("k"), .key_len = 1, .reserved = { 1 }));
	EXPECT_EQ(EINVAL, OPEN(.key = PTR("k"), .key_len = 1, .reserved = { 0, 1 }));
	EXPECT_EQ(EINVAL, OPEN(.key = PTR("k"), .key_len = 1, .seq = seq, .flags = PMSKB_OPEN_SEQ));
	EXPECT_EQ(ENOENT, OPEN(.seq = 0, .flags = PMSKB_OPEN_SEQ));
	EXPECT_EQ(ENOENT, OPEN(.seq = seq + 1, .flags = PMSKB_OPEN_SEQ));
	EXPECT_EQ(ENOENT, OPEN(.seq = ~0ULL, .flags = PMSKB_OPEN_SEQ));
	EXPECT_EQ(EFAULT, OPEN(.key = PTR(BAD_PTR), .key_len = 1));
	EXPECT_EQ(EFAULT, ERRNO(ioctl(self->s.fd, PMSKB_IOC_OPEN, BAD_PTR)));

	/* It was found and held, but the answer cannot be written. */
	{
		struct pmskb_open *ro = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		int next = dup(0);

		close(next);
		ASSERT_NE(MAP_FAILED, ro);
		*ro = (struct pmskb_open) { .key = PTR("k"), .key_len = 1 };
		ASSERT_EQ(0, mprotect(ro, 4096, PROT_READ));
		EXPECT_EQ(EFAULT, ERRNO(ioctl(self->s.fd, PMSKB_IOC_OPEN, ro)));
		fd = dup(0);
		EXPECT_EQ(next, fd) TH_LOG("a descriptor is left behind");
		close(fd);
		munmap(ro, 4096);
	}

	ASSERT_EQ(0, getrlimit(RLIMIT_NOFILE, &limit));
	fd = dup(0);
	none = (struct rlimit) { fd, limit.rlim_max };
	close(fd);
	ASSERT_EQ(0, setrlimit(RLIMIT_NOFILE, &none));
	EXPECT_EQ(EMFILE, OPEN(.key = PTR("k"), .key_len = 1));
	ASSERT_EQ(0, setrlimit(RLIMIT_NOFILE, &limit));

	fd = open(self->s.path, O_WRONLY | O_CLOEXEC);
	ASSERT_LE(0, fd);
	o = (struct pmskb_open) { .key = PTR("k"), .key_len = 1 };
	EXPECT_EQ(EACCES, ERRNO(ioctl(fd, PMSKB_IOC_OPEN, &o)));
	close(fd);
	/* Who may only read may open. */
	fd = open(self->s.path, O_RDONLY | O_CLOEXEC);
	ASSERT_LE(0, fd);
	EXPECT_EQ(0, ERRNO(ioctl(fd, PMSKB_IOC_OPEN, &o)));
	EXPECT_TRUE(has(o.fd, 1, 5000));
	close(o.fd);
	close(fd);

	/* Nothing of this holds anything. */
	ASSERT_LT(0, del(&self->s, "k"));
	ASSERT_EQ(0, store_quiet(&self->s, 5000, &info));
	EXPECT_LE(before.frames_free, info.frames_free) TH_LOG("a failed open holds frames");
}

TEST_F(object, an_open_record_keeps_the_store)
{
	struct pmskb_open o;
	int fd;

	ASSERT_LT(0, put(&self->c, "k", 1, 3, 10000));
	fd = open_key(&self->s, "k", 1, &o);
	ASSERT_LE(0, fd);
	conn_close(&self->c);
	store_let_go(&self->s);
	EXPECT_EQ(-EBUSY, dev_detach(self->s.ctl, self->s.minor, 100));
	EXPECT_TRUE(has(fd, 3, 10000));
	close(fd);
	/* The fixture detaches. */
	self->c = (struct conn) { -1, -1 };
}

TEST_F(object, records_are_opened_while_they_are_replaced)
{
	enum { LEN = 20000, READERS = 3, ROUNDS = 150 };
	pid_t pid[READERS];
	struct pmskb_open o;
	int i, st, round;

	ASSERT_LT(0, put(&self->c, "k", 1, 0, LEN));
	for (i = 0; i < READERS; i++) {
		pid[i] = fork();
		if (pid[i])
			continue;
		for (;;) {
			int fd = open_key(&self->s, "k", 1, &o);
			uint8_t first[8];
			uint32_t seed;

			if (fd < 0 || o.len != LEN || pread(fd, first, 8, 0) != 8)
				_exit(1);
			/* Any version, but one, and whole. */
			for (seed = 0; seed <= ROUNDS && differs(first, 8, seed, 0) >= 0; seed++)
				;
			if (seed > ROUNDS || !has(fd, seed, LEN))
				_exit(2);
			if (seed == ROUNDS)
				_exit(0);
			close(fd);
		}
	}
	for (round = 1; round <= ROUNDS; round++)
		ASSERT_LT(0, put(&self->c, "k", 1, round, LEN));
	for (i = 0; i < READERS; i++) {
		ASSERT_EQ(pid[i], waitpid(pid[i], &st, 0));
		EXPECT_EQ(0, st) TH_LOG("reader %d: %x", i, st);
	}
}

TEST_HARNESS_MAIN
