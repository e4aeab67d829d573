// SPDX-License-Identifier: GPL-2.0
/*
 * Promises about buffers (PMSKB_IOC_ALLOC): frames that a program fills and puts,
 * that nobody changes once they are put, and that come back if they are not.
 */
#include "common.h"
#include "media.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <sched.h>
#include <setjmp.h>
#include <signal.h>
#include <stdatomic.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <sys/wait.h>

#include "harness.h"

#define ERRNO(call) ((call) < 0 ? errno : 0)
#define FRAME ((size_t)PMSKB_FRAME_SIZE)

static __thread sigjmp_buf fault_jump;

static void on_fault(int sig)
{
	siglongjmp(fault_jump, sig);
}

static void catch_faults(void)
{
	struct sigaction sa = { .sa_handler = on_fault, .sa_flags = SA_NODEFER };

	sigaction(SIGBUS, &sa, NULL);
	sigaction(SIGSEGV, &sa, NULL);
}

/* The signal that reading a byte raises, or 0. */
static int peek(const volatile void *p)
{
	volatile int sig = sigsetjmp(fault_jump, 1);

	if (!sig)
		(void)*(const volatile uint8_t *)p;
	return sig;
}

/* The same for writing it. */
static int poke(volatile void *p, uint8_t byte)
{
	volatile int sig = sigsetjmp(fault_jump, 1);

	if (!sig)
		*(volatile uint8_t *)p = byte;
	return sig;
}

FIXTURE(buffer) {
	struct store s;
};

FIXTURE_VARIANT(buffer) {
	enum dev dev;
};

FIXTURE_VARIANT_ADD(buffer, pmem) { DEV_PMEM };
FIXTURE_VARIANT_ADD(buffer, dax) { DEV_DAX };

FIXTURE_SETUP(buffer)
{
	const char *why;

	if (!dev_path(variant->dev, &why))
		SKIP(return, "%s", why);
	ASSERT_EQ(0, store_make(&self->s, variant->dev, 0, 0));
	catch_faults();
}

FIXTURE_TEARDOWN(buffer)
{
	struct pmskb_store_info info;

	if (self->s.fd >= 0)
		EXPECT_EQ(0, store_quiet(&self->s, 5000, &info)) TH_LOG("frames are left behind");
	EXPECT_EQ(0, store_close(&self->s));
}

static int alloc(const struct store *s, uint64_t len)
{
	struct pmskb_alloc a = { .len = len, .fd = -1 };

	return ioctl(s->fd, PMSKB_IOC_ALLOC, &a) ? -errno : a.fd;
}

static uint8_t *map(int fd, size_t len)
{
	void *m = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);

	return m == MAP_FAILED ? NULL : m;
}

/* One put of nr ranges of a buffer: the record's number. */
static int64_t put_ranges(const struct store *s, int fd, const char *key, const struct pmskb_ext *e, uint32_t nr,
			  uint16_t flags, struct pmskb_result *out)
{
	struct pmskb_op op = op_put(key, key ? strlen(key) : 0, e, nr);
	struct pmskb_result r = {};
	int err;

	op.fd = fd;
	op.flags = flags;
	err = submit(s->fd, &op, &r, 1);
	if (out)
		*out = r;
	return err ? CALL_FAILED(err) : r.res;
}

static int64_t put(const struct store *s, int fd, const char *key, uint32_t offset, uint32_t len, uint16_t flags)
{
	struct pmskb_ext e = { .offset = offset, .len = len };

	return put_ranges(s, fd, key, &e, 1, flags, NULL);
}

static int64_t del(const struct store *s, const char *key)
{
	struct pmskb_op op = { .opcode = PMSKB_OP_DELETE, .fd = -1, .key = PTR(key), .key_len = strlen(key) };
	struct pmskb_result r = {};
	int err = submit(s->fd, &op, &r, 1);

	return err ?: r.res;
}

/* Whether the record with a key has just these bytes, and their sum. */
static bool holds(const struct store *s, const char *key, const void *bytes, size_t len)
{
	struct pmskb_open o = { .key = PTR(key), .key_len = strlen(key) };
	uint8_t *back = malloc(len + 1);
	bool same = false;

	if (!ioctl(s->fd, PMSKB_IOC_OPEN, &o)) {
		same = o.len == len && pread(o.fd, back, len + 1, 0) == (ssize_t)len && !memcmp(back, bytes, len) &&
		       o.csum == rfc1071(bytes, len) && o.csum_kind == PMSKB_CSUM_COMPUTED &&
		       o.time_source == PMSKB_TIME_PLACEMENT;
		close(o.fd);
	}
	free(back);
	return same;
}

/* Frames that are neither free nor waiting to be. */
static uint64_t used(const struct store *s)
{
	struct pmskb_store_info i;

	return store_quiet(s, 5000, &i) ? ~0ULL : i.frames_total - i.frames_free;
}

TEST_F(buffer, what_is_put_is_what_was_written)
{
	static const size_t sizes[] = { 1, 2, 4095, 4096, 4097, 70001, 4 << 20 };
	struct pmskb_result r;
	char key[16];
	size_t i;

	for (i = 0; i < ARRAY_LEN(sizes); i++) {
		size_t len = sizes[i];
		int fd = alloc(&self->s, len);
		uint8_t *copy = malloc(len), *m;
		struct pmskb_ext e = { .len = len };
		struct stat st;

		ASSERT_LE(0, fd);
		ASSERT_EQ(0, fstat(fd, &st));
		EXPECT_EQ((len + FRAME - 1) / FRAME * FRAME, st.st_size);
		EXPECT_EQ(FD_CLOEXEC, fcntl(fd, F_GETFD));
		m = map(fd, st.st_size);
		ASSERT_TRUE(m != NULL);
		fill(copy, len, i, 0);
		memcpy(m, copy, len);
		snprintf(key, sizeof(key), "key %zu", i);
		ASSERT_LT(0, put_ranges(&self->s, fd, key, &e, 1, 0, &r));
		EXPECT_EQ(rfc1071(copy, len), r.csum);
		EXPECT_EQ(PMSKB_CSUM_COMPUTED, r.csum_kind);
		EXPECT_EQ(0, r.flags);
		EXPECT_TRUE(holds(&self->s, key, copy, len)) TH_LOG("%zu bytes", len);
		munmap(m, st.st_size);
		close(fd);
		EXPECT_TRUE(holds(&self->s, key, copy, len)) TH_LOG("%zu bytes, buffer closed", len);
		free(copy);
	}
}

struct seen {
	const char *key;
	const uint8_t *bytes;
	size_t len;
	int nr;
};

static int look(struct record *r, void *arg)
{
	struct seen *s = arg;

	if (r->key_len == strlen(s->key) && !memcmp(r->key, s->key, r->key_len) && r->len == s->len &&
	    !memcmp(r->bytes, s->bytes, s->len) && ntohs(rfc1071(s->bytes, s->len)) == r->csum &&
	    REC_CSUM_KIND(r->flags) == PMSKB_CSUM_COMPUTED && REC_TIME_SOURCE(r->flags) == PMSKB_TIME_PLACEMENT &&
	    !r->family && !(r->flags & REC_COPIED))
		s->nr++;
	return 0;
}

TEST_F(buffer, it_is_there_when_the_store_is_attached_again)
{
	enum { LEN = 9000 };
	static uint8_t copy[LEN];
	struct seen seen = { "there", copy, LEN };
	int fd = alloc(&self->s, LEN), i;
	uint8_t *m = map(fd, LEN);

	ASSERT_TRUE(m != NULL);
	fill(copy, LEN, 1, 0);
	memcpy(m, copy, LEN);
	ASSERT_LT(0, put(&self->s, fd, "there", 0, LEN, 0));
	/* Not put, so not there. */
	i = alloc(&self->s, LEN);
	ASSERT_EQ(LEN, pwrite(i, copy, LEN, 0));
	close(i);
	munmap(m, LEN);
	close(fd);
	for (i = 0; i < 2; i++) {
		seen.nr = 0;
		EXPECT_EQ(1, media_scan(self->s.map, self->s.map_len, look, &seen));
		EXPECT_EQ(1, seen.nr) TH_LOG("%s", i ? "attached again" : "at once");
		if (!i) {
			ASSERT_EQ(0, store_close(&self->s));
			ASSERT_EQ(0, store_open(&self->s, variant->dev));
		}
	}
}

TEST_F(buffer, ranges_make_objects_in_their_order)
{
	/* The second starts in the first's last page, and one lies before. */
	struct pmskb_ext e[] = {
		{ .offset = 5000, .len = 5000 }, { .offset = 10000, .len = 1 }, { .offset = 3, .len = 300 },
		{ .offset = 20000, .len = 12000 },
	}, k[] = { { .offset = 100, .len = 3 }, { .offset = 4095, .len = 2 } };
	static uint8_t all[32768], want[17301];
	struct pmskb_op op;
	struct pmskb_result r;
	int fd = alloc(&self->s, sizeof(all));
	uint8_t *m = map(fd, sizeof(all));
	char key[6] = {};
	size_t at = 0, i;

	ASSERT_TRUE(m != NULL);
	fill(all, sizeof(all), 2, 0);
	memcpy(all + 100, "abc", 3);
	memcpy(all + 4095, "de", 2);
	memcpy(m, all, sizeof(all));
	for (i = 0; i < ARRAY_LEN(e); i++) {
		memcpy(want + at, all + e[i].offset, e[i].len);
		at += e[i].len;
	}
	ASSERT_EQ(sizeof(want), at);
	ASSERT_LT(0, put_ranges(&self->s, fd, "k", e, ARRAY_LEN(e), PMSKB_OP_KEEP, NULL));
	EXPECT_TRUE(holds(&self->s, "k", want, sizeof(want)));

	/* The key in the buffer: gathered from two, and where it lies. */
	op = op_put(NULL, 0, e, ARRAY_LEN(e));
	op.fd = fd;
	op.key = PTR(k);
	op.key_len = 2;
	op.flags = PMSKB_OP_KEEP | PMSKB_OP_KEY_EXTENTS;
	ASSERT_EQ(0, submit(self->s.fd, &op, &r, 1));
	EXPECT_LT(0, r.res);
	memcpy(key, "abcde", 5);
	EXPECT_TRUE(holds(&self->s, key, want, sizeof(want)));
	op.key_len = 1;
	op.flags = PMSKB_OP_KEY_EXTENTS;
	ASSERT_EQ(0, submit(self->s.fd, &op, &r, 1));
	EXPECT_LT(0, r.res);
	EXPECT_TRUE(holds(&self->s, "abc", want, sizeof(want)));

	/* What all of this did not name is there still, and writable. */
	EXPECT_EQ(0, poke(m + 16384 - 4096, 1));
	EXPECT_EQ(SIGBUS, peek(m + 4096));
	munmap(m, sizeof(all));
	close(fd);
	EXPECT_TRUE(holds(&self->s, "abc", want, sizeof(want)));
}

TEST_F(buffer, frames_are_zero_whatever_they_held)
{
	enum { BIG = 64 << 20 };
	struct pmskb_store_info i;
	uint64_t frames = 0, at;
	int fds[64], n, round;
	uint8_t *m;

	ASSERT_EQ(0, store_quiet(&self->s, 5000, &i));
	for (round = 0; round < 2; round++) {
		/* All that there is: so a frame that was dirty is among them. */
		for (n = 0; n < (int)ARRAY_LEN(fds); n++) {
			uint64_t len = BIG;

			while (len >= FRAME && (fds[n] = alloc(&self->s, len)) == -ENOSPC)
				len /= 2;
			if (len < FRAME)
				break;
			ASSERT_LE(0, fds[n]);
			m = map(fds[n], len);
			ASSERT_TRUE(m != NULL);
			for (at = 0; at < len; at += 8)
				if (*(uint64_t *)(m + at))
					break;
			EXPECT_EQ(len, at) TH_LOG("stale bytes at %lu of buffer %d", at, n);
			memset(m, 0xee, len);
			munmap(m, len);
			frames += len / FRAME;
		}
		EXPECT_LE(i.frames_free, frames + i.frames_reserve) TH_LOG("frames that nobody can have");
		EXPECT_EQ(-ENOSPC, alloc(&self->s, 1));
		frames = 0;
		while (n--)
			ASSERT_EQ(0, close(fds[n]));
	}
	EXPECT_EQ(i.frames_total - i.frames_free, used(&self->s));
}

TEST_F(buffer, bytes_that_were_never_written_are_zeros_in_the_object)
{
	static const uint8_t zeros[3 * 4096];
	int fd = alloc(&self->s, sizeof(zeros));

	ASSERT_LT(0, put(&self->s, fd, "zeros", 0, sizeof(zeros), 0));
	EXPECT_TRUE(holds(&self->s, "zeros", zeros, sizeof(zeros)));
	close(fd);
}

TEST_F(buffer, what_is_put_cannot_be_touched)
{
	enum { NR = 4 };
	int fd = alloc(&self->s, NR * FRAME), i;
	uint8_t *m = map(fd, NR * FRAME), *other = map(fd, NR * FRAME), *late, want[FRAME];

	ASSERT_TRUE(m && other);
	for (i = 0; i < NR; i++) {
		memset(m + i * FRAME, 'a' + i, FRAME);
		EXPECT_EQ('a' + i, other[i * FRAME]);
	}
	memset(want, 'b', FRAME);
	ASSERT_LT(0, put(&self->s, fd, "b", FRAME, FRAME, 0));
	for (i = 0; i < NR; i++) {
		EXPECT_EQ(i == 1 ? SIGBUS : 0, peek(m + i * FRAME)) TH_LOG("page %d", i);
		EXPECT_EQ(i == 1 ? SIGBUS : 0, poke(m + i * FRAME, 'x')) TH_LOG("page %d", i);
		EXPECT_EQ(i == 1 ? SIGBUS : 0, peek(other + i * FRAME)) TH_LOG("page %d", i);
	}
	late = map(fd, NR * FRAME);
	ASSERT_TRUE(late != NULL);
	EXPECT_EQ(SIGBUS, poke(late + FRAME, 'x'));
	EXPECT_EQ(0, poke(late, 'x'));
	EXPECT_EQ(EPERM, ERRNO(pwrite(fd, "x", 1, FRAME + 7)));
	EXPECT_EQ(1, pwrite(fd, "x", 1, 2 * FRAME - 1 + 1));
	/* A range that was put is no longer the buffer's to put, whole or in part. */
	EXPECT_EQ(-ESTALE, put(&self->s, fd, "b", FRAME, FRAME, 0));
	EXPECT_EQ(-ESTALE, put(&self->s, fd, "b", 0, NR * FRAME, 0));
	EXPECT_EQ(-ESTALE, put(&self->s, fd, "b", FRAME - 1, 2, PMSKB_OP_KEEP));
	EXPECT_EQ(0, poke(m, 'y')) TH_LOG("a put that failed has sealed pages");
	EXPECT_TRUE(holds(&self->s, "b", want, FRAME));

	/* One byte takes its whole frame. */
	ASSERT_LT(0, put(&self->s, fd, "one", 3 * FRAME + 5, 1, 0));
	EXPECT_EQ(SIGBUS, peek(m + 3 * FRAME));
	munmap(m, NR * FRAME);
	munmap(other, NR * FRAME);
	munmap(late, NR * FRAME);
	close(fd);
}

TEST_F(buffer, what_is_kept_can_be_read)
{
	enum { NR = 3 };
	int fd = alloc(&self->s, NR * FRAME);
	uint8_t *m = map(fd, NR * FRAME), want[FRAME], *ro;

	ASSERT_TRUE(m != NULL);
	memset(want, 'k', FRAME);
	memcpy(m + FRAME, want, FRAME);
	ASSERT_LT(0, put(&self->s, fd, "k", FRAME, FRAME, PMSKB_OP_KEEP));
	EXPECT_EQ(0, peek(m + FRAME));
	EXPECT_EQ('k', m[FRAME]);
	EXPECT_EQ(SIGBUS, poke(m + FRAME, 'x')) TH_LOG("mapped for reading before");
	EXPECT_EQ(EPERM, ERRNO(pwrite(fd, "x", 1, FRAME)));
	EXPECT_TRUE(holds(&self->s, "k", want, FRAME));
	/* By another way to a writable entry. */
	ro = mmap(NULL, NR * FRAME, PROT_READ, MAP_SHARED, fd, 0);
	ASSERT_NE(MAP_FAILED, ro);
	EXPECT_EQ(0, peek(ro + FRAME));
	EXPECT_EQ(0, peek(ro));
	EXPECT_EQ(0, mprotect(ro, NR * FRAME, PROT_READ | PROT_WRITE));
	EXPECT_EQ(SIGBUS, poke(ro + FRAME, 'x')) TH_LOG("mprotect");
	EXPECT_EQ(0, poke(ro, 'z')) TH_LOG("mprotect of a page that is not put");
	EXPECT_EQ('z', m[0]);
	EXPECT_EQ(0, mprotect(m, NR * FRAME, PROT_READ));
	EXPECT_EQ(0, mprotect(m, NR * FRAME, PROT_READ | PROT_WRITE));
	EXPECT_EQ(SIGBUS, poke(m + FRAME, 'x'));
	EXPECT_EQ(0, poke(m, 'z'));
	EXPECT_TRUE(holds(&self->s, "k", want, FRAME));

	/* It can be put again, and its frame outlives the record. */
	ASSERT_LT(0, put(&self->s, fd, "k2", FRAME, 100, PMSKB_OP_KEEP));
	EXPECT_TRUE(holds(&self->s, "k2", want, 100));
	ASSERT_LT(0, del(&self->s, "k"));
	ASSERT_LT(0, del(&self->s, "k2"));
	EXPECT_EQ('k', m[FRAME]);
	EXPECT_EQ('k', ro[2 * FRAME - 1]);
	/* The last put takes it. */
	ASSERT_LT(0, put(&self->s, fd, "k3", FRAME, FRAME, 0));
	EXPECT_EQ(SIGBUS, peek(m + FRAME));
	EXPECT_EQ(SIGBUS, peek(ro + FRAME));
	EXPECT_TRUE(holds(&self->s, "k3", want, FRAME));
	munmap(m, NR * FRAME);
	munmap(ro, NR * FRAME);
	close(fd);
}

TEST_F(buffer, a_put_that_fails_leaves_the_buffer_as_it_was)
{
	int fd = alloc(&self->s, 2 * FRAME);
	uint8_t *m = map(fd, 2 * FRAME);
	struct pmskb_ext overlap[] = { { .len = 100 }, { .offset = 99, .len = 1 } };

	ASSERT_TRUE(m != NULL);
	m[0] = 1;
	EXPECT_EQ(-ENOENT, put(&self->s, fd, "no", 0, FRAME, PMSKB_OP_REPLACE));
	EXPECT_EQ(0, poke(m, 2));
	EXPECT_EQ(-ENOENT, put(&self->s, fd, "no", 0, FRAME, PMSKB_OP_REPLACE | PMSKB_OP_KEEP));
	/* Mapped for reading first. */
	EXPECT_EQ(0, peek(m));
	EXPECT_EQ(0, poke(m, 3));
	EXPECT_EQ(-EINVAL, put_ranges(&self->s, fd, "no", overlap, 2, 0, NULL));
	EXPECT_EQ(0, poke(m, 4));
	EXPECT_EQ(-ENAMETOOLONG, ({
		struct pmskb_op op = op_put("", 1025, overlap, 1);
		struct pmskb_result r;

		op.fd = fd;
		submit(self->s.fd, &op, &r, 1) ?: r.res;
	}));
	EXPECT_EQ(0, poke(m, 5));
	ASSERT_LT(0, put(&self->s, fd, "yes", 0, 1, 0));
	EXPECT_TRUE(holds(&self->s, "yes", "\5", 1));
	munmap(m, 2 * FRAME);
	close(fd);
}

TEST_F(buffer, frames_come_back_when_they_are_not_put)
{
	uint64_t before = used(&self->s), now;
	int fd = alloc(&self->s, 100 * FRAME), copy;
	uint8_t *m = map(fd, 100 * FRAME);

	ASSERT_TRUE(m != NULL);
	memset(m, 1, 100 * FRAME);
	EXPECT_LE(before + 100, used(&self->s));
	ASSERT_LT(0, put(&self->s, fd, "k", 10 * FRAME, 40 * FRAME, 0));
	copy = dup(fd);
	close(fd);
	EXPECT_LE(before + 100, used(&self->s)) TH_LOG("closed, but not for the last time");
	close(copy);
	/* A mapping keeps them, too. */
	EXPECT_LE(before + 100, used(&self->s));
	EXPECT_EQ(1, m[0]);
	munmap(m, 100 * FRAME);
	now = used(&self->s);
	EXPECT_LE(before + 40, now);
	EXPECT_GT(before + 50, now) TH_LOG("%lu frames do not come back", now - before - 40);
	ASSERT_LT(0, del(&self->s, "k"));
	/* The delete's own frames aside. */
	EXPECT_GT(before + 10, used(&self->s));
}

TEST_F(buffer, it_is_mapped_shared_within_its_size_and_never_executed)
{
	int fd = alloc(&self->s, 2 * FRAME), bad;
	uint8_t *m, *n;

#define MAP(len, prot, flags, off) ({ \
		void *p = mmap(NULL, len, prot, flags, fd, off); \
		int e = p == MAP_FAILED ? errno : 0; \
		if (!e) \
			munmap(p, len); \
		e; \
	})
	EXPECT_EQ(0, MAP(2 * FRAME, PROT_READ | PROT_WRITE, MAP_SHARED, 0));
	EXPECT_EQ(0, MAP(FRAME, PROT_READ | PROT_WRITE, MAP_SHARED, FRAME));
	EXPECT_EQ(0, MAP(FRAME, PROT_NONE, MAP_SHARED, 0));
	EXPECT_EQ(EINVAL, MAP(3 * FRAME, PROT_READ, MAP_SHARED, 0));
	EXPECT_EQ(EINVAL, MAP(FRAME, PROT_READ, MAP_SHARED, 2 * FRAME));
	EXPECT_EQ(EINVAL, MAP(2 * FRAME, PROT_READ, MAP_SHARED, FRAME));
	EXPECT_EQ(EINVAL, MAP(FRAME, PROT_READ, MAP_SHARED, 1L << 50));
	EXPECT_EQ(EINVAL, MAP(FRAME, PROT_READ | PROT_WRITE, MAP_PRIVATE, 0));
	EXPECT_EQ(EINVAL, MAP(FRAME, PROT_READ, MAP_PRIVATE, 0));
	EXPECT_EQ(EPERM, MAP(FRAME, PROT_READ | PROT_EXEC, MAP_SHARED, 0));
	m = map(fd, 2 * FRAME);
	ASSERT_TRUE(m != NULL);
	EXPECT_EQ(EACCES, ERRNO(mprotect(m, FRAME, PROT_READ | PROT_EXEC)));
	/* It cannot grow, but it can move, and is zapped where it is. */
	EXPECT_EQ(MAP_FAILED, mremap(m, 2 * FRAME, 4 * FRAME, MREMAP_MAYMOVE));
	m[FRAME] = 7;
	n = mmap(NULL, 2 * FRAME, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	n = mremap(m, 2 * FRAME, 2 * FRAME, MREMAP_MAYMOVE | MREMAP_FIXED, n);
	ASSERT_NE(MAP_FAILED, n);
	EXPECT_EQ(7, n[FRAME]);
	ASSERT_LT(0, put(&self->s, fd, "k", FRAME, 1, 0));
	EXPECT_EQ(SIGBUS, poke(n + FRAME, 8));
	EXPECT_TRUE(holds(&self->s, "k", "\7", 1));
	munmap(n, 2 * FRAME);

	/* Nobody else can have its pages either: not by direct I/O, nor by vmsplice. */
	m = map(fd, FRAME);
	ASSERT_TRUE(m != NULL);
	bad = open("/dev/zero", O_RDONLY);
	EXPECT_EQ(FRAME, read(bad, m, FRAME)) TH_LOG("an ordinary read into it");
	close(bad);
	{
		struct iovec iov = { m, FRAME };
		int p[2];

		ASSERT_EQ(0, pipe(p));
		EXPECT_EQ(EFAULT, ERRNO(vmsplice(p[1], &iov, 1, 0)));
		close(p[0]);
		close(p[1]);
	}
	munmap(m, FRAME);
	close(fd);
}

TEST_F(buffer, it_is_written_by_position_as_well)
{
	static uint8_t data[3 * 4096 + 77];
	int fd = alloc(&self->s, 4 * FRAME);
	struct iovec iov[2] = { { data, 10 }, { BAD_PTR, 10 } };

	fill(data, sizeof(data), 4, 0);
	EXPECT_EQ(1000, write(fd, data, 1000));
	EXPECT_EQ(sizeof(data) - 1000, write(fd, data + 1000, sizeof(data) - 1000));
	EXPECT_EQ(sizeof(data), lseek(fd, 0, SEEK_CUR));
	ASSERT_LT(0, put(&self->s, fd, "k", 0, sizeof(data), PMSKB_OP_KEEP));
	EXPECT_TRUE(holds(&self->s, "k", data, sizeof(data)));
	close(fd);
	fd = alloc(&self->s, 2 * FRAME);
	EXPECT_EQ(100, pwrite(fd, data, sizeof(data), 2 * FRAME - 100)) TH_LOG("to the end, and not beyond");
	EXPECT_EQ(ENOSPC, ERRNO(pwrite(fd, data, 1, 2 * FRAME)));
	EXPECT_EQ(ENOSPC, ERRNO(pwrite(fd, data, 1, 1L << 50)));
	EXPECT_EQ(EFAULT, ERRNO(pwrite(fd, BAD_PTR, 1, 0)));
	EXPECT_EQ(10, pwritev(fd, iov, 2, 0));
	EXPECT_EQ(EINVAL, ERRNO(read(fd, data, 1)));
	EXPECT_EQ(2 * FRAME, lseek(fd, 0, SEEK_END));
	/* Out of its own mapping: the lock is not held while that is read. */
	{
		uint8_t *m = map(fd, 2 * FRAME);

		ASSERT_TRUE(m != NULL);
		EXPECT_EQ(FRAME, pwrite(fd, m, FRAME, FRAME));
		munmap(m, 2 * FRAME);
	}
	close(fd);
}

TEST_F(buffer, what_cannot_be_done_says_why)
{
	uint64_t before = used(&self->s);
	struct rlimit limit, none;
	struct pmskb_result r;
	struct pmskb_op op;
	struct pmskb_ext e = { .len = 10 };
	int fd, ro, next;

#define ALLOC(...) ERRNO(ioctl(self->s.fd, PMSKB_IOC_ALLOC, &(struct pmskb_alloc) { __VA_ARGS__ }))
	EXPECT_EQ(EINVAL, ALLOC(.len = 0));
	EXPECT_EQ(EINVAL, ALLOC(.len = PMSKB_MAX_BUFFER + 1));
	EXPECT_EQ(EINVAL, ALLOC(.len = ~0ULL));
	EXPECT_EQ(EINVAL, ALLOC(.len = 1, .flags = 1));
	EXPECT_EQ(EINVAL, ALLOC(.len = 1, .reserved = { 1 }));
	EXPECT_EQ(EINVAL, ALLOC(.len = 1, .reserved = { 0, 1 }));
	EXPECT_EQ(EFAULT, ERRNO(ioctl(self->s.fd, PMSKB_IOC_ALLOC, BAD_PTR)));
	{
		struct pmskb_alloc *a = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

		*a = (struct pmskb_alloc) { .len = FRAME };
		ASSERT_EQ(0, mprotect(a, 4096, PROT_READ));
		next = dup(0);
		close(next);
		EXPECT_EQ(EFAULT, ERRNO(ioctl(self->s.fd, PMSKB_IOC_ALLOC, a)));
		fd = dup(0);
		EXPECT_EQ(next, fd);
		close(fd);
		munmap(a, 4096);
	}
	ASSERT_EQ(0, getrlimit(RLIMIT_NOFILE, &limit));
	none = (struct rlimit) { next, limit.rlim_max };
	ASSERT_EQ(0, setrlimit(RLIMIT_NOFILE, &none));
	EXPECT_EQ(EMFILE, ALLOC(.len = 1));
	ASSERT_EQ(0, setrlimit(RLIMIT_NOFILE, &limit));
	ro = open(self->s.path, O_RDONLY | O_CLOEXEC);
	EXPECT_EQ(EACCES, ERRNO(ioctl(ro, PMSKB_IOC_ALLOC, &(struct pmskb_alloc) { .len = 1 })));
	close(ro);
	EXPECT_EQ(before, used(&self->s)) TH_LOG("a failed allocation holds frames");

	fd = alloc(&self->s, 2 * FRAME);
	ASSERT_LE(0, fd);
#define PUT(...) put_ranges(&self->s, fd, "k", &(struct pmskb_ext) { __VA_ARGS__ }, 1, 0, NULL)
	EXPECT_EQ(-EINVAL, PUT(.len = 0));
	EXPECT_EQ(-EINVAL, PUT(.len = 2 * FRAME + 1));
	EXPECT_EQ(-EINVAL, PUT(.offset = 2 * FRAME, .len = 1));
	EXPECT_EQ(-EINVAL, PUT(.offset = ~0U, .len = 1));
	EXPECT_EQ(-EINVAL, PUT(.offset = ~0U, .len = 1 << 20));
	EXPECT_EQ(-EINVAL, PUT(.token = 1, .len = 1));
	EXPECT_EQ(-EINVAL, PUT(.reserved = 1, .len = 1));
	/* Release is close(). */
	op = (struct pmskb_op) { .opcode = PMSKB_OP_RELEASE, .fd = fd, .extents = PTR(&e), .nr_extents = 1 };
	e.len = 0;
	ASSERT_EQ(0, submit(self->s.fd, &op, &r, 1));
	EXPECT_EQ(-EINVAL, r.res);
	/* A buffer is none of a socket's. */
	e.len = 1;
	op = op_put("k", 1, &e, 1);
	{
		struct net net = { AF_INET, LINK_LO };
		struct conn c;

		ASSERT_EQ(0, conn_make(&c, &net, self->s.fd, HOW_ACCEPTED_OPT));
		op.fd = fd;
		EXPECT_EQ(-EINVAL, persist_one(c.s, &op, NULL));
		conn_close(&c);
	}
	EXPECT_EQ(0, PUT(.len = 1) < 1);
	close(fd);
	EXPECT_EQ(-EBADF, PUT(.len = 1));
}

TEST_F(buffer, a_buffer_of_one_store_is_none_of_another)
{
	enum dev other = variant->dev == DEV_PMEM ? DEV_DAX : DEV_PMEM;
	const char *why;
	struct store two;
	uint8_t *m;
	int fd;

	if (!dev_path(other, &why))
		SKIP(return, "%s", why);
	ASSERT_EQ(0, store_make(&two, other, 0, 0));
	fd = alloc(&two, FRAME);
	m = map(fd, FRAME);
	ASSERT_TRUE(m != NULL);
	EXPECT_EQ(-EXDEV, put(&self->s, fd, "k", 0, 1, 0));
	EXPECT_EQ(0, poke(m, 1));
	munmap(m, FRAME);
	close(fd);
	EXPECT_EQ(0, store_close(&two));
}

TEST_F(buffer, one_array_may_name_a_frame_many_times_and_mix_with_packets)
{
	enum { NR = 512 };
	static struct pmskb_ext e[NR];
	static struct pmskb_op ops[NR + 1];
	static struct pmskb_result r[NR + 1];
	static uint64_t keys[NR];
	struct net net = { AF_INET, LINK_LO };
	int fd = alloc(&self->s, 2 * FRAME), i, n;
	uint8_t *m = map(fd, 2 * FRAME);
	struct pmskb_store_info info;
	struct pmskb_desc d[16];
	struct pmskb_ext packet;
	struct conn c;

	ASSERT_TRUE(m != NULL);
	ASSERT_EQ(0, conn_make(&c, &net, self->s.fd, HOW_ACCEPTED_OPT));
	ASSERT_EQ(0, sock_mode(c.s, PMSKB_RX_DESC));
	ASSERT_EQ(0, send_all(c.c, "packet", 6));
	n = desc_recv_bytes(c.s, d, 16, 6);
	ASSERT_EQ(1, n);
	fill(m, 2 * FRAME, 3, 0);
	for (i = 0; i < NR; i++) {
		e[i] = (struct pmskb_ext) { .offset = i * 16, .len = 16 };
		keys[i] = i;
		ops[i] = op_put(&keys[i], 8, &e[i], 1);
		ops[i].fd = fd;
	}
	packet = ext_of(d);
	ops[NR] = op_put("packet", 6, &packet, 1);
	ops[NR].fd = c.s;
	ASSERT_EQ(0, submit(self->s.fd, ops, r, NR + 1));
	for (i = 0; i <= NR; i++)
		ASSERT_LT(0, r[i].res) TH_LOG("operation %d", i);
	EXPECT_EQ(SIGBUS, peek(m));
	for (i = 0; i < NR; i++) {
		struct pmskb_open o = { .flags = PMSKB_OPEN_SEQ, .seq = r[i].res };
		uint8_t back[17];

		ASSERT_EQ(0, ioctl(self->s.fd, PMSKB_IOC_OPEN, &o));
		ASSERT_EQ(16, pread(o.fd, back, 17, 0));
		ASSERT_EQ(-1, differs(back, 16, 3, i * 16));
		close(o.fd);
	}
	ASSERT_EQ(0, store_info(&self->s, &info));
	EXPECT_EQ(NR + 1, info.records);
	munmap(m, 2 * FRAME);
	close(fd);
	conn_close(&c);

	/* More frames than an array may name, by naming the same ones again and again. */
	fd = alloc(&self->s, PMSKB_MAX_BUFFER);
	ASSERT_LE(0, fd);
	e[0] = (struct pmskb_ext) { .len = PMSKB_MAX_BUFFER };
	n = PMSKB_MAX_EXTENTS / (PMSKB_MAX_BUFFER / FRAME);
	for (i = 0; i <= n; i++) {
		ops[i] = op_put(&keys[i], 8, e, 1);
		ops[i].flags = PMSKB_OP_REPLACE | PMSKB_OP_KEEP;
		keys[i] = ~0ULL - i;
		ops[i].fd = fd;
	}
	ASSERT_EQ(0, submit(self->s.fd, ops, r, n + 1));
	for (i = 0; i <= n; i++)
		EXPECT_EQ(i < n ? -ENOENT : -E2BIG, r[i].res) TH_LOG("operation %d", i);
	close(fd);
}

TEST_F(buffer, a_child_sees_the_seal_too)
{
	int fd = alloc(&self->s, 2 * FRAME), st, go[2], seen[2];
	uint8_t *m = map(fd, 2 * FRAME);
	char byte;
	pid_t pid;

	ASSERT_TRUE(m != NULL);
	m[0] = 'p';
	m[FRAME] = 'q';
	ASSERT_EQ(0, pipe(go));
	ASSERT_EQ(0, pipe(seen));
	pid = fork();
	if (!pid) {
		/* With an entry of its own. */
		if (m[0] != 'p' || write(seen[1], "s", 1) != 1 || read(go[0], &byte, 1) != 1)
			_exit(1);
		_exit(poke(m, 'x') != SIGBUS || poke(m + FRAME, 'r') ? 2 : 0);
	}
	ASSERT_EQ(1, read(seen[0], &byte, 1));
	ASSERT_LT(0, put(&self->s, fd, "k", 0, 1, 0));
	ASSERT_EQ(1, write(go[1], "g", 1));
	ASSERT_EQ(pid, waitpid(pid, &st, 0));
	EXPECT_EQ(0, st) TH_LOG("exit %d", WEXITSTATUS(st));
	EXPECT_EQ('r', m[FRAME]);
	EXPECT_TRUE(holds(&self->s, "k", "p", 1));
	munmap(m, 2 * FRAME);
	close(fd);
	close(go[0]);
	close(go[1]);
	close(seen[0]);
	close(seen[1]);
}

/* ---- at the same time ---- */

struct race {
	uint8_t *m;
	size_t len;
	atomic_bool stop;
	atomic_ulong written;
};

/* Writes wherever it may, for as long as it can. */
static void *scribble(void *arg)
{
	struct race *r = arg;
	unsigned long n = 0;
	size_t at = 0;

	while (!atomic_load(&r->stop)) {
		at = (at + 4099) % r->len;
		if (!poke(r->m + at, ++n))
			atomic_fetch_add(&r->written, 1);
	}
	return NULL;
}

/*
 * The sum is that of the bytes that everybody sees afterwards: nobody has
 * changed them between.
 */
TEST_F_TIMEOUT(buffer, nobody_changes_bytes_after_they_were_summed, 60)
{
	enum { PAGES = 16, ROUNDS = 150, WRITERS = 2 };
	pthread_t t[WRITERS];
	unsigned long written = 0;
	int round, i, flags;

	for (round = 0; round < ROUNDS; round++) {
		int fd = alloc(&self->s, PAGES * FRAME);
		struct race r = { map(fd, PAGES * FRAME), PAGES * FRAME };
		struct pmskb_open o = { .key = PTR("race"), .key_len = 4 };
		static uint8_t first[PAGES * 4096], second[PAGES * 4096];

		ASSERT_TRUE(r.m != NULL);
		flags = round % 2 ? PMSKB_OP_KEEP : 0;
		for (i = 0; i < WRITERS; i++)
			ASSERT_EQ(0, pthread_create(&t[i], NULL, scribble, &r));
		while (atomic_load(&r.written) < 20)
			sched_yield();
		ASSERT_LT(0, put(&self->s, fd, "race", 0, PAGES * FRAME, flags));
		ASSERT_EQ(0, ioctl(self->s.fd, PMSKB_IOC_OPEN, &o));
		ASSERT_EQ(PAGES * FRAME, pread(o.fd, first, sizeof(first), 0));
		sched_yield();
		ASSERT_EQ(PAGES * FRAME, pread(o.fd, second, sizeof(second), 0));
		atomic_store(&r.stop, true);
		for (i = 0; i < WRITERS; i++)
			pthread_join(t[i], NULL);
		ASSERT_EQ(0, memcmp(first, second, sizeof(first))) TH_LOG("round %d", round);
		ASSERT_EQ(rfc1071(first, sizeof(first)), o.csum) TH_LOG("round %d", round);
		written += r.written;
		munmap(r.m, r.len);
		close(fd);
		close(o.fd);
	}
	EXPECT_LT(ROUNDS * 20, written) TH_LOG("nobody wrote");
}

struct putter {
	const struct store *s;
	int fd, nr;
	uint32_t pages;
	int64_t done, stale, other;
};

static void *put_some(void *arg)
{
	struct putter *p = arg;
	uint32_t at;
	char key[32];

	for (at = 0; at + 1 < p->pages; at++) {
		int64_t res;

		snprintf(key, sizeof(key), "%d/%u", p->nr, at);
		/* Overlapping: each page twice by each thread. */
		res = put(p->s, p->fd, key, at * FRAME, 2 * FRAME, at % 3 ? PMSKB_OP_KEEP : 0);
		if (res > 0)
			p->done++;
		else if (res == -ESTALE)
			p->stale++;
		else
			p->other = res;
	}
	return NULL;
}

TEST_F_TIMEOUT(buffer, threads_may_put_the_same_ranges, 60)
{
	enum { THREADS = 3, PAGES = 200 };
	uint64_t before = used(&self->s);
	struct putter p[THREADS];
	pthread_t t[THREADS];
	int fd = alloc(&self->s, PAGES * FRAME), i;
	uint8_t *m = map(fd, PAGES * FRAME);
	char key[32];
	uint32_t at;
	int64_t done = 0;

	ASSERT_TRUE(m != NULL);
	fill(m, PAGES * FRAME, 9, 0);
	for (i = 0; i < THREADS; i++) {
		p[i] = (struct putter) { &self->s, fd, i, PAGES };
		ASSERT_EQ(0, pthread_create(&t[i], NULL, put_some, &p[i]));
	}
	for (i = 0; i < THREADS; i++) {
		pthread_join(t[i], NULL);
		EXPECT_EQ(0, p[i].other);
		done += p[i].done;
	}
	EXPECT_LT(PAGES / 3, done);
	munmap(m, PAGES * FRAME);
	close(fd);
	/* What was acknowledged is right; and nothing is held twice or not at all. */
	for (i = 0; i < THREADS; i++) {
		for (at = 0; at + 1 < PAGES; at++) {
			struct pmskb_open o = { .key = PTR(key), .key_len = snprintf(key, sizeof(key), "%d/%u", i, at) };
			static uint8_t back[2 * 4096 + 1];

			if (ioctl(self->s.fd, PMSKB_IOC_OPEN, &o)) {
				ASSERT_EQ(ENOENT, errno);
				continue;
			}
			done--;
			ASSERT_EQ(2 * FRAME, pread(o.fd, back, sizeof(back), 0));
			ASSERT_EQ(-1, differs(back, 2 * FRAME, 9, at * FRAME)) TH_LOG("%s", key);
			close(o.fd);
			ASSERT_LT(0, del(&self->s, key));
		}
	}
	EXPECT_EQ(0, done);
	EXPECT_GT(before + 20, used(&self->s)) TH_LOG("frames are lost");
}

TEST_F(buffer, a_buffer_keeps_the_store)
{
	int fd = alloc(&self->s, FRAME);
	uint8_t *m = map(fd, FRAME);

	ASSERT_TRUE(m != NULL);
	close(fd);
	store_let_go(&self->s);
	EXPECT_EQ(-EBUSY, dev_detach(self->s.ctl, self->s.minor, 100));
	EXPECT_EQ(0, poke(m, 1));
	munmap(m, FRAME);
	/* The fixture detaches. */
}

TEST_F_TIMEOUT(buffer, a_device_that_goes_takes_buffers_and_open_records_with_it, 120)
{
	char driver[PATH_MAX], name[PATH_MAX];
	int fd = alloc(&self->s, 4 * FRAME), k, p[2];
	uint8_t *m = map(fd, 4 * FRAME), byte;
	struct pmskb_open o = { .key = PTR("k"), .key_len = 1 }, again = o;
	struct store back;
	loff_t off = 0;

	if (driver_of(variant->dev, driver, name, PATH_MAX))
		SKIP(return, "cannot find the device's driver");
	ASSERT_TRUE(m != NULL);
	memset(m, 'x', 4 * FRAME);
	ASSERT_LT(0, put(&self->s, fd, "k", 0, 10, PMSKB_OP_KEEP));
	ASSERT_EQ(0, ioctl(self->s.fd, PMSKB_IOC_OPEN, &o));
	EXPECT_EQ(0, peek(m));
	EXPECT_EQ(0, poke(m + FRAME, 'y'));
	close(self->s.dev);
	self->s.dev = -1;
	ASSERT_EQ(0, sh("echo %s >%s/unbind", name, driver));

	EXPECT_EQ(SIGBUS, peek(m)) TH_LOG("the mapping outlives the memory");
	EXPECT_EQ(SIGBUS, poke(m + FRAME, 'z'));
	EXPECT_EQ(EIO, ERRNO(pwrite(fd, "x", 1, FRAME)));
	EXPECT_EQ(-EIO, put(&self->s, fd, "late", FRAME, 1, 0));
	EXPECT_EQ(-EIO, alloc(&self->s, 1));
	EXPECT_EQ(EIO, ERRNO(pread(o.fd, &byte, 1, 0)));
	EXPECT_EQ(EIO, ERRNO(ioctl(self->s.fd, PMSKB_IOC_OPEN, &again)));
	EXPECT_EQ(MAP_FAILED, mmap(NULL, FRAME, PROT_READ, MAP_SHARED, fd, 0));
	EXPECT_EQ(EIO, errno);
	ASSERT_EQ(0, pipe(p));
	EXPECT_EQ(EIO, ERRNO(splice(o.fd, &off, p[1], NULL, 1, 0)));
	close(p[0]);
	close(p[1]);
	EXPECT_EQ(10, lseek(o.fd, 0, SEEK_END));
	store_let_go(&self->s);
	EXPECT_EQ(-EBUSY, dev_detach(self->s.ctl, self->s.minor, 100));
	munmap(m, 4 * FRAME);
	close(fd);
	close(o.fd);
	EXPECT_EQ(0, dev_detach(self->s.ctl, self->s.minor, 5000 * slowness()));
	self->s.minor = ~0U;
	close(self->s.ctl);
	self->s.ctl = -1;

	ASSERT_EQ(0, sh("echo %s >%s/bind", name, driver));
	for (k = 0; k < 100; k++) {
		const char *why, *path = dev_path(variant->dev, &why);

		if (path && !access(path, R_OK))
			break;
		usleep(50000);
	}
	ASSERT_EQ(0, store_open(&back, variant->dev));
	EXPECT_TRUE(holds(&back, "k", "xxxxxxxxxx", 10));
	EXPECT_EQ(0, store_close(&back));
}

TEST_HARNESS_MAIN
