// SPDX-License-Identifier: GPL-2.0
/*
 * Promises about media errors: a frame hit by one fails only its records (EIO).
 *
 * The errors are the kernel's own: hard_offline_page calls memory_failure(), and
 * that the driver's failure notification, as a machine check does. The memory can
 * be read as before, so what fails does so because the module knows. The list of
 * bad blocks of the disk stands for errors that are known at attach.
 */
#include "common.h"
#include "media.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/sendfile.h>

#include "kselftest_harness.h"
#include "objects.h"

#define ERRNO(call) ((call) < 0 ? errno : 0)
#define FRAME ((size_t)PMSKB_FRAME_SIZE)
#define SEED 77
#define HARD_OFFLINE "/sys/devices/system/memory/hard_offline_page"
/* MiB of data area: soon full. */
#define DATA_MIB 12

static sigjmp_buf fault_jump;

static void on_fault(int sig)
{
	siglongjmp(fault_jump, sig);
}

/* The signal that reading a byte raises, or 0. */
static int peek(const volatile void *p)
{
	volatile int sig = sigsetjmp(fault_jump, 1);

	if (!sig)
		(void)*(const volatile uint8_t *)p;
	return sig;
}

static int poke(volatile void *p)
{
	volatile int sig = sigsetjmp(fault_jump, 1);

	if (!sig)
		*(volatile uint8_t *)p = 1;
	return sig;
}

/* Physical address of a region, or 0. */
static uint64_t physical(enum dev dev)
{
	const char *why, *path = dev_path(dev, &why);
	char file[PATH_MAX], text[64] = "";
	int fd;

	if (!path)
		return 0;
	path = strrchr(path, '/') + 1;
	if (dev == DEV_PMEM)
		snprintf(file, sizeof(file), "/sys/block/%s/device/resource", path);
	else
		snprintf(file, sizeof(file), "/sys/bus/dax/devices/%s/resource", path);
	fd = open(file, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return 0;
	if (read(fd, text, sizeof(text) - 1) < 0)
		text[0] = 0;
	close(fd);
	return strtoull(text, NULL, 0);
}

FIXTURE(media_error) {
	struct store s;
	uint64_t phys;
	char driver[PATH_MAX], name[PATH_MAX];
	bool listed;
};

FIXTURE_VARIANT(media_error) {
	enum dev dev;
};

FIXTURE_VARIANT_ADD(media_error, pmem) { DEV_PMEM };
FIXTURE_VARIANT_ADD(media_error, dax) { DEV_DAX };

FIXTURE_SETUP(media_error)
{
	struct sigaction sa = { .sa_handler = on_fault, .sa_flags = SA_NODEFER };
	const char *why;
	uint64_t len;

	self->s.ctl = self->s.dev = self->s.fd = -1;
	self->s.minor = ~0U;
	if (!dev_path(variant->dev, &why))
		SKIP(return, "%s", why);
	if (access(HARD_OFFLINE, W_OK))
		SKIP(return, "this kernel has no " HARD_OFFLINE);
	self->phys = physical(variant->dev);
	ASSERT_NE(0, self->phys);
	ASSERT_EQ(0, driver_of(variant->dev, self->driver, self->name, PATH_MAX));
	ASSERT_EQ(0, store_make(&self->s, variant->dev, 0, 0));
	len = self->s.info.region_len;
	ASSERT_EQ(0, store_close(&self->s));
	ASSERT_EQ(0, store_make(&self->s, variant->dev, 0, ((len >> 20) - 2 - DATA_MIB) << 20));
	EXPECT_EQ(0, self->s.info.frames_bad);
	sigaction(SIGBUS, &sa, NULL);
}

FIXTURE_TEARDOWN(media_error)
{
	int tries;

	EXPECT_EQ(0, store_close(&self->s));
	if (!self->listed)
		return;
	/* The driver reads the device's own list of errors again. */
	EXPECT_EQ(0, write_file(self->driver, "unbind", self->name));
	for (tries = 0; tries < 100 && write_file(self->driver, "bind", self->name); tries++)
		usleep(20000);
	EXPECT_GT(100, tries);
}

/* An error in the page at an offset of the region: what memory_failure() said. */
static int hit(uint64_t phys, uint64_t off)
{
	char text[32];

	snprintf(text, sizeof(text), "%#lx", phys + (off & ~(FRAME - 1)));
	return write_file("/sys/devices/system/memory", "hard_offline_page", text);
}

#define HIT(off) ASSERT_EQ(-EIO, hit(self->phys, off)) TH_LOG("the failure was not handled by the module")

/* From the next attach on: only pmem has a list that can be written. */
static int list_bad(uint64_t off, unsigned int frames)
{
	const char *why, *path = dev_path(DEV_PMEM, &why);
	char dir[PATH_MAX], text[64];

	snprintf(dir, sizeof(dir), "/sys/block/%s", strrchr(path, '/') + 1);
	snprintf(text, sizeof(text), "%lu %u\n", (off & ~(FRAME - 1)) / 512, 8 * frames);
	return write_file(dir, "badblocks", text);
}

/* ---- records, each in frames of its own ---- */

static int alloc(const struct store *s, uint64_t len)
{
	struct pmskb_alloc a = { .len = len, .fd = -1 };

	return ioctl(s->fd, PMSKB_IOC_ALLOC, &a) ? -errno : a.fd;
}

static int64_t put_from(const struct store *s, int fd, const char *key, uint32_t len)
{
	struct pmskb_ext e = { .len = len };
	struct pmskb_op op = op_put(key, key ? strlen(key) : 0, &e, 1);
	struct pmskb_result r = {};
	int err;

	op.fd = fd;
	err = submit(s->fd, &op, &r, 1);
	return err ? CALL_FAILED(err) : r.res;
}

/* An object of len bytes of stream SEED + n: its number. */
static int64_t put(const struct store *s, const char *key, unsigned int n, uint32_t len)
{
	static char bytes[64 * PMSKB_FRAME_SIZE];
	int fd = alloc(s, len);
	int64_t seq;

	if (fd < 0)
		return fd;
	fill(bytes, len, SEED + n, 0);
	seq = pwrite(fd, bytes, len, 0) == (ssize_t)len ? put_from(s, fd, key, len) : -errno;
	close(fd);
	return seq;
}

static const char *key_of(unsigned int n)
{
	static char key[16];

	snprintf(key, sizeof(key), "%08u", n);
	return key;
}

static int64_t del(const struct store *s, const char *key)
{
	struct pmskb_op op = op_delete(key, strlen(key));
	struct pmskb_result r = {};
	int err = submit(s->fd, &op, &r, 1);

	return err ? CALL_FAILED(err) : r.res;
}

static int64_t truncate_to(const struct store *s, uint64_t seq)
{
	struct pmskb_op op = op_truncate(seq);
	struct pmskb_result r = {};
	int err = submit(s->fd, &op, &r, 1);

	return err ? CALL_FAILED(err) : r.res;
}

static int open_key(const struct store *s, const char *key, struct pmskb_open *o)
{
	*o = (struct pmskb_open) { .key = PTR(key), .key_len = strlen(key), .fd = -1 };
	return ioctl(s->fd, PMSKB_IOC_OPEN, o) ? -errno : o->fd;
}

/* Reads an object through its file: 0 if it is that of number n, else -errno; -EILSEQ for other bytes. */
static int get(const struct store *s, const char *key, unsigned int n)
{
	static char bytes[64 * PMSKB_FRAME_SIZE];
	struct pmskb_open o;
	size_t have = 0;
	ssize_t now;
	int err = open_key(s, key, &o);

	if (err < 0)
		return err;
	do {
		now = read(o.fd, bytes + have, sizeof(bytes) - have);
		err = now < 0 ? -errno : 0;
		have += now > 0 ? now : 0;
	} while (now > 0);
	close(o.fd);
	if (err)
		return err;
	return have == o.len && differs(bytes, have, SEED + n, 0) < 0 ? 0 : -EILSEQ;
}

/* Where the first byte of a key's object is, or 0. */
static uint64_t where(const struct store *s, const char *key, struct hit *h)
{
	return map_get(s->map, s->map_len, key, strlen(key), h) == 1 && h->nr_extents ? h->extents[0] >> 20 : 0;
}

/* The object is read by sendfile into a pipe: bytes, or -errno. */
static ssize_t splice_all(int fd, off_t off, size_t len)
{
	int p[2];
	ssize_t n;

	if (pipe(p))
		return -errno;
	n = sendfile(p[1], fd, &off, len);
	if (n < 0)
		n = -errno;
	close(p[0]);
	close(p[1]);
	return n;
}

static int scrub_all(const struct store *s, struct pmskb_scrub_bad *bad, unsigned int room, uint64_t *records)
{
	struct pmskb_scrub c = {};
	unsigned int nr = 0, calls;

	*records = 0;
	for (calls = 0; !c.done && calls < 1000; calls++) {
		c.bad = PTR(bad + nr);
		c.nr_bad = room - nr;
		if (ioctl(s->fd, PMSKB_IOC_SCRUB, &c))
			return -errno;
		nr += c.nr_bad;
		*records += c.records;
	}
	return c.done ? (int)nr : -ELOOP;
}

static int compact_all(const struct store *s)
{
	struct pmskb_compact c = {};
	unsigned int calls;

	for (calls = 0; !c.done && calls < 1000; calls++) {
		c.steps = 64;
		if (ioctl(s->fd, PMSKB_IOC_COMPACT, &c))
			return -errno;
	}
	return c.done ? 0 : -ELOOP;
}

/* Fills the store with records of 16 frames until it is full: how many; -1 if one has bytes in the frame at off. */
static int fill_up(struct store *s, uint64_t off)
{
	enum { LEN = 16 * PMSKB_FRAME_SIZE };
	char key[16];
	struct hit h;
	unsigned int n, i;
	int64_t seq;
	int fd;

	for (n = 0; n < 10000; n++) {
		fd = alloc(s, LEN);
		if (fd < 0)
			return fd == -ENOSPC ? (int)n : fd;
		snprintf(key, sizeof(key), "fill%u", n);
		seq = put_from(s, fd, key, LEN);
		close(fd);
		if (seq == -ENOSPC)
			return n;
		if (seq < 0)
			return seq;
		if (!where(s, key, &h))
			return -ENOENT;
		for (i = 0; i < h.nr_extents; i++) {
			uint64_t from = h.extents[i] >> 20, len = (h.extents[i] & 0xfffff) + 1;

			if (off >= from && off < from + len)
				return -EADDRINUSE;
		}
	}
	return -ELOOP;
}

/* Empties it again, and looks that frames come back. */
static void empty_up(struct __test_metadata *_metadata, struct store *s, int n)
{
	char key[16];
	int i;

	for (i = 0; i < n; i++) {
		snprintf(key, sizeof(key), "fill%d", i);
		ASSERT_LT(0, del(s, key));
	}
}

#define NR 40

static void put_all(struct __test_metadata *_metadata, struct store *s, uint64_t *seq)
{
	int i;

	for (i = 0; i < NR; i++) {
		seq[i] = put(s, key_of(i), i, 2 * FRAME);
		ASSERT_LT(0, (int64_t)seq[i]) TH_LOG("record %d: %s", i, strerror(-seq[i]));
	}
}

/* All but those from bad to bad + nr are whole; these answer err. */
static void all_but(struct __test_metadata *_metadata, struct store *s, int bad, int nr, int err)
{
	int i;

	for (i = 0; i < NR; i++) {
		EXPECT_EQ(i >= bad && i < bad + nr ? err : 0, get(s, key_of(i), i)) TH_LOG("record %d", i);
	}
}

TEST_F(media_error, a_frame_fails_only_its_records)
{
	static char bytes[2 * PMSKB_FRAME_SIZE];
	struct pmskb_scrub_bad bad[8];
	struct pmskb_store_info info;
	uint64_t seq[NR], records, at;
	const struct net lo = { AF_INET, LINK_LO };
	struct pmskb_open o, early;
	struct pmskb_send range;
	struct conn c;
	struct hit h;
	int n, page;

	put_all(_metadata, &self->s, seq);
	at = where(&self->s, key_of(17), &h);
	ASSERT_NE(0, at);
	ASSERT_EQ(1, h.nr_extents);
	/* One that was opened, and one that was mapped before. */
	ASSERT_LE(0, open_key(&self->s, key_of(17), &early));
	EXPECT_EQ(0, peek(self->s.map + at));
	EXPECT_EQ(0, peek(self->s.map + at + FRAME));
	/* Its second frame. */
	HIT(at + FRAME);

	all_but(_metadata, &self->s, 17, 1, -EIO);
	for (n = 0; n < 2; n++) {
		int fd = early.fd;

		if (n) {
			/* What is known of it can be told. */
			ASSERT_LE(0, open_key(&self->s, key_of(17), &o));
			EXPECT_EQ(seq[17], o.seq);
			EXPECT_EQ(2 * FRAME, o.len);
			fd = o.fd;
		}
		/* The other frame's bytes, and not one more. */
		EXPECT_EQ(FRAME, pread(fd, bytes, sizeof(bytes), 0));
		EXPECT_EQ(-1, differs(bytes, FRAME, SEED + 17, 0));
		EXPECT_EQ(-1, pread(fd, bytes, 1, FRAME));
		EXPECT_EQ(EIO, errno);
		EXPECT_EQ(FRAME, splice_all(fd, 0, 2 * FRAME));
		EXPECT_EQ(-EIO, splice_all(fd, FRAME, FRAME));
		ASSERT_EQ(0, conn_make(&c, &lo, self->s.fd, HOW_ACCEPTED_IOCTL));
		range = (struct pmskb_send) { .fd = fd, .offset = 1, .len = 2 * FRAME - 1 };
		EXPECT_EQ(FRAME - 1, send_ranges(c.s, NULL, 0, &range, 1, 0));
		range.offset = FRAME;
		range.len = 1;
		EXPECT_EQ(-EIO, send_ranges(c.s, NULL, 0, &range, 1, 0));
		EXPECT_EQ(3, send_ranges(c.s, "abc", 3, &range, 1, 0));
		ASSERT_EQ(0, recv_all(c.c, bytes, FRAME + 2));
		EXPECT_EQ(-1, differs(bytes, FRAME - 1, SEED + 17, 1));
		EXPECT_EQ(0, memcmp(bytes + FRAME - 1, "abc", 3));
		conn_close(&c);
		close(fd);
	}
	/* The store's device. */
	EXPECT_EQ(-1, pread(self->s.fd, bytes, 1, at + FRAME));
	EXPECT_EQ(EIO, errno);
	EXPECT_EQ(FRAME, pread(self->s.fd, bytes, 2 * FRAME, at));
	EXPECT_EQ(FRAME, pread(self->s.fd, bytes, FRAME, at + 2 * FRAME));
	EXPECT_EQ(-EIO, splice_all(self->s.fd, at + FRAME, FRAME));
	/* Mapped before, and after. */
	for (page = -1; page <= 2; page++) {
		EXPECT_EQ(page == 1 ? SIGBUS : 0, peek(self->s.map + at + page * FRAME)) TH_LOG("page %d", page);
	}
	{
		uint8_t *again = mmap(NULL, self->s.map_len, PROT_READ, MAP_SHARED, self->s.fd, 0);

		ASSERT_NE(MAP_FAILED, again);
		for (page = -1; page <= 2; page++) {
			EXPECT_EQ(page == 1 ? SIGBUS : 0, peek(again + at + page * FRAME)) TH_LOG("page %d", page);
		}
		munmap(again, self->s.map_len);
	}
	ASSERT_EQ(0, store_info(&self->s, &info));
	EXPECT_EQ(1, info.frames_bad);
	/* It is in use still. */
	EXPECT_EQ(2 * NR, info.frames_payload);
	EXPECT_EQ(0, info.frames_held);
	EXPECT_EQ(0, info.flags & PMSKB_STORE_READ_ONLY);
	EXPECT_EQ(info.frames_total + 1, info.frames_free + info.frames_payload + info.frames_record +
		  info.frames_list + info.frames_index + info.frames_held + info.frames_limbo + info.frames_bad);

	/* Scrub names it and goes on; compaction leaves it. */
	ASSERT_EQ(1, scrub_all(&self->s, bad, 8, &records));
	EXPECT_EQ(seq[17], bad[0].seq);
	EXPECT_EQ(EIO, bad[0].error);
	EXPECT_EQ(NR, records);
	EXPECT_EQ(0, compact_all(&self->s));
	all_but(_metadata, &self->s, 17, 1, -EIO);

	/* Everything goes on: records beside it, a replacement, listing. */
	for (n = 0; n < 200; n++) {
		ASSERT_LT(0, put(&self->s, "more", n, FRAME));
	}
	EXPECT_LT(0, del(&self->s, key_of(16)));
	EXPECT_LT(0, put(&self->s, key_of(16), 16, 2 * FRAME));
	if (have_program("pmskbctl")) {
		EXPECT_EQ(0, sh("test $(pmskbctl ls pmskb%u | grep -c 0000) = %d", self->s.minor, NR));
		EXPECT_EQ(0, sh("pmskbctl get --store pmskb%u %s 2>&1 >/dev/null | grep -q 'cannot be read'",
				self->s.minor, key_of(17)));
		EXPECT_EQ(0, sh("pmskbctl get --store pmskb%u %s >/dev/null", self->s.minor, key_of(18)));
	}
	/* It can be deleted, and its frame is not used again. */
	EXPECT_LT(0, del(&self->s, key_of(17)));
	EXPECT_EQ(-ENOENT, get(&self->s, key_of(17), 17));
	EXPECT_LT(0, put(&self->s, key_of(17), 17, 2 * FRAME));
	all_but(_metadata, &self->s, 0, 0, 0);
	EXPECT_EQ(0, scrub_all(&self->s, bad, 8, &records));
	n = fill_up(&self->s, at + FRAME);
	EXPECT_LT(DATA_MIB * 256 / 16 / 2, n);
	empty_up(_metadata, &self->s, n);
	ASSERT_EQ(0, store_info(&self->s, &info));
	EXPECT_EQ(1, info.frames_bad);
	EXPECT_EQ(NULL, info_wrong(&info, 0, false)) TH_LOG("%s", info_wrong(&info, 0, false));
	EXPECT_EQ(0, info.frames_held);
	all_but(_metadata, &self->s, 0, 0, 0);
}

TEST_F(media_error, a_frame_with_a_record_stays_bad_when_attached_again)
{
	struct pmskb_store_info info;
	uint64_t seq[NR], records, at;
	struct pmskb_scrub_bad bad[8];
	struct hit h;
	int n;

	if (variant->dev != DEV_PMEM)
		SKIP(return, "only pmem has a list of bad blocks that can be written");
	put_all(_metadata, &self->s, seq);
	at = where(&self->s, key_of(5), &h);
	ASSERT_NE(0, at);
	HIT(at);
	ASSERT_EQ(0, store_close(&self->s));
	/* What the platform's driver does when the machine check arrives. */
	self->listed = true;
	ASSERT_EQ(0, list_bad(at, 1));
	ASSERT_EQ(0, store_open(&self->s, variant->dev));
	ASSERT_EQ(0, store_info(&self->s, &info));
	EXPECT_EQ(1, info.frames_bad);
	EXPECT_EQ(NR, info.records);
	EXPECT_EQ(2 * NR, info.frames_payload);
	all_but(_metadata, &self->s, 5, 1, -EIO);
	/* Which the memory here gives back. */
	EXPECT_EQ(0, scrub_all(&self->s, bad, 8, &records));
	EXPECT_EQ(NR, records);
	EXPECT_EQ(SIGBUS, peek(self->s.map + at));
	EXPECT_EQ(0, peek(self->s.map + at + FRAME));
	EXPECT_LT(0, put(&self->s, key_of(5), 5, 2 * FRAME));
	all_but(_metadata, &self->s, 0, 0, 0);
	n = fill_up(&self->s, at);
	EXPECT_LT(DATA_MIB * 256 / 16 / 2, n);
	empty_up(_metadata, &self->s, n);
	ASSERT_EQ(0, store_info(&self->s, &info));
	EXPECT_EQ(1, info.frames_bad);
	EXPECT_EQ(NULL, info_wrong(&info, 0, false)) TH_LOG("%s", info_wrong(&info, 0, false));
}

TEST_F(media_error, a_free_frame_is_never_given_out)
{
	struct pmskb_store_info info;
	uint64_t at = self->s.info.data_off + 1000 * FRAME;
	int n;

	HIT(at);
	/* The same once more is no other one. */
	HIT(at);
	ASSERT_EQ(0, store_info(&self->s, &info));
	EXPECT_EQ(1, info.frames_bad);
	EXPECT_EQ(self->s.info.frames_free - 1, info.frames_free);
	EXPECT_EQ(NULL, info_wrong(&info, 0, false)) TH_LOG("%s", info_wrong(&info, 0, false));
	n = fill_up(&self->s, at);
	EXPECT_LT(DATA_MIB * 256 / 16 / 2, n);
	empty_up(_metadata, &self->s, n);
}

TEST_F(media_error, a_buffer_is_not_put)
{
	struct pmskb_store_info info;
	static char bytes[4 * PMSKB_FRAME_SIZE];
	uint64_t seq[NR], at = 0, off;
	struct hit h;
	uint8_t *m;
	int fd;

	put_all(_metadata, &self->s, seq);
	fd = alloc(&self->s, 4 * FRAME);
	ASSERT_LE(0, fd);
	fill(bytes, sizeof(bytes), 1, 0);
	ASSERT_EQ(sizeof(bytes), pwrite(fd, bytes, sizeof(bytes), 0));
	m = mmap(NULL, 4 * FRAME, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	ASSERT_NE(MAP_FAILED, m);
	EXPECT_EQ(0, poke(m + FRAME));
	/* Which frames it has is in no answer: found by what is in them. */
	fill(m, FRAME, 2, 0);
	fill(bytes, FRAME, 2, 0);
	for (off = self->s.info.data_off; off + FRAME <= self->s.map_len; off += FRAME) {
		if (!memcmp(self->s.map + off, bytes, FRAME))
			at = off;
	}
	ASSERT_NE(0, at);
	HIT(at);
	EXPECT_EQ(SIGBUS, poke(m));
	EXPECT_EQ(0, poke(m + FRAME));
	EXPECT_EQ(-1, pwrite(fd, bytes, 1, 0));
	EXPECT_EQ(EIO, errno);
	EXPECT_EQ(-EIO, put_from(&self->s, fd, "new", 4 * FRAME));
	EXPECT_EQ(-EIO, put_from(&self->s, fd, key_of(3), 4 * FRAME));
	EXPECT_EQ(-ENOENT, get(&self->s, "new", 0));
	/* Its other frames can be. */
	{
		struct pmskb_ext e = { .offset = 2 * FRAME, .len = 2 * FRAME };
		struct pmskb_op op = op_put("rest", 4, &e, 1);
		struct pmskb_result r = {};

		op.fd = fd;
		ASSERT_EQ(0, submit(self->s.fd, &op, &r, 1));
		EXPECT_LT(0, r.res);
	}
	munmap(m, 4 * FRAME);
	close(fd);
	/* Nothing is lost, and nothing leaks. */
	all_but(_metadata, &self->s, 0, 0, 0);
	EXPECT_LT(0, put(&self->s, "next", 9, FRAME));
	EXPECT_EQ(0, get(&self->s, "next", 9));
	EXPECT_NE(at, where(&self->s, "next", &h));
	ASSERT_EQ(0, store_info(&self->s, &info));
	EXPECT_EQ(0, info.frames_held);
	EXPECT_EQ(1, info.frames_bad);
	EXPECT_EQ(NULL, info_wrong(&info, 0, false)) TH_LOG("%s", info_wrong(&info, 0, false));
}

/* Offset of the record frame that has a key's record. */
static uint64_t record_frame(const struct store *s, const char *key)
{
	struct hit h;

	return where(s, key, &h) ? h.loc & ~(FRAME - 1) : 0;
}

TEST_F(media_error, a_frame_of_records_fails_those_and_new_ones_go_elsewhere)
{
	enum { FEW = 600, TAIL = 40 };
	struct pmskb_scrub_bad bad[8];
	unsigned int i, lost = 0, last = 0;
	uint64_t frame, records, last_seq = 0, first_seq = 0;
	struct pmskb_store_info info;
	static uint64_t seqs[FEW];
	static bool in[FEW];
	int err, n;

	for (i = 0; i < FEW; i++) {
		int64_t seq = put(&self->s, key_of(i), i, 100);

		ASSERT_LT(0, seq);
		last_seq = seqs[i] = seq;
	}
	/* Neither the first nor the open one. */
	frame = record_frame(&self->s, key_of(FEW / 2));
	ASSERT_NE(0, frame);
	for (i = 0; i < FEW; i++) {
		in[i] = record_frame(&self->s, key_of(i)) == frame;
		if (in[i]) {
			first_seq = lost ? first_seq : seqs[i];
			last = i;
			lost++;
		}
	}
	ASSERT_LT(10, lost);
	ASSERT_GT(FEW - 100, last);
	HIT(frame);
	for (i = 0; i < FEW; i++) {
		err = get(&self->s, key_of(i), i);
		EXPECT_EQ(in[i] ? -EIO : 0, err) TH_LOG("record %u", i);
	}
	/* Scrub says where, once, and goes on to the end. */
	ASSERT_EQ(1, scrub_all(&self->s, bad, 8, &records));
	EXPECT_EQ(EIO, bad[0].error);
	EXPECT_EQ(first_seq, bad[0].seq);
	EXPECT_EQ(FEW - lost, records);
	EXPECT_EQ(0, compact_all(&self->s));
	/* The log can be cut beyond it. */
	EXPECT_LE(0, truncate_to(&self->s, last_seq));
	for (i = 0; i < TAIL; i++) {
		ASSERT_LT(0, put(&self->s, NULL, i, 100));
	}
	ASSERT_EQ(0, store_info(&self->s, &info));
	EXPECT_EQ(0, info.flags & PMSKB_STORE_READ_ONLY);
	EXPECT_EQ(1, info.frames_bad);
	EXPECT_LE(0, truncate_to(&self->s, ~0ULL >> 2));
	/* With the next attach there is what the media gives back: here, all of it. */
	ASSERT_EQ(0, store_close(&self->s));
	if (variant->dev == DEV_PMEM) {
		self->listed = true;
		ASSERT_EQ(0, list_bad(frame, 1));
	}
	ASSERT_EQ(0, store_open(&self->s, variant->dev));
	EXPECT_EQ(FEW, self->s.info.records);
	EXPECT_EQ(self->listed, self->s.info.frames_bad);
	for (i = 0; i < FEW; i++) {
		EXPECT_EQ(0, get(&self->s, key_of(i), i)) TH_LOG("record %u", i);
	}
	for (i = 0; i < FEW; i++) {
		ASSERT_LT(0, put(&self->s, key_of(i), i, 100));
	}
	EXPECT_EQ(0, scrub_all(&self->s, bad, 8, &records));
	EXPECT_EQ(FEW, records);
	EXPECT_EQ(0, compact_all(&self->s));
	ASSERT_EQ(0, store_info(&self->s, &info));
	EXPECT_EQ(FEW, info.records);
	EXPECT_EQ(self->listed, info.frames_bad);
	if (self->listed) {
		n = fill_up(&self->s, frame);
		EXPECT_LT(10, n);
		empty_up(_metadata, &self->s, n);
	}
}

TEST_F(media_error, the_frame_that_records_go_into_is_left_for_another)
{
	struct pmskb_store_info info;
	uint64_t frame;
	unsigned int i;

	ASSERT_LT(0, put(&self->s, "before", 0, 100));
	frame = record_frame(&self->s, "before");
	ASSERT_NE(0, frame);
	HIT(frame);
	EXPECT_EQ(-EIO, get(&self->s, "before", 0));
	for (i = 0; i < 200; i++) {
		ASSERT_LT(0, put(&self->s, NULL, i, 100)) TH_LOG("record %u", i);
	}
	ASSERT_EQ(0, store_info(&self->s, &info));
	EXPECT_EQ(0, info.flags & PMSKB_STORE_READ_ONLY);
	EXPECT_EQ(201, info.records);
	EXPECT_EQ(1, info.frames_bad);
}

/* A leaf of the index of keys, two levels high: the one in the middle. */
static uint64_t leaf(const struct store *s)
{
	uint64_t word = get64(s->map + 4096 + 24), root = (word & 0x3ffffffffULL) * 1024;
	unsigned int count = get64(s->map + root + 8) & 0xffff;

	return (word >> 34 & 63) == 2 ? get64(s->map + root + 64 + count / 2 * 24 + 16) : 0;
}

TEST_F(media_error, a_frame_of_the_index_is_made_anew_elsewhere_at_the_next_attach)
{
	enum { FEW = 600 };
	struct pmskb_store_info info;
	unsigned int i, eio = 0;
	uint64_t frame;
	int64_t res;
	int err;

	for (i = 0; i < FEW; i++) {
		ASSERT_LT(0, put(&self->s, key_of(i), i, 100));
	}
	frame = leaf(&self->s) & ~(FRAME - 1);
	ASSERT_NE(0, frame);
	HIT(frame);
	/* An answer, or EIO; never a wrong one. */
	for (i = 0; i < FEW; i++) {
		err = get(&self->s, key_of(i), i);
		EXPECT_TRUE(!err || err == -EIO) TH_LOG("record %u: %d", i, err);
		eio += err == -EIO;
	}
	EXPECT_LT(0, eio);
	for (i = FEW; i < FEW + 20; i++) {
		res = put(&self->s, key_of(i), i, 100);
		EXPECT_TRUE(res > 0 || res == -EIO) TH_LOG("record %u: %ld", i, res);
		if (res < 0)
			break;
	}
	ASSERT_EQ(0, store_info(&self->s, &info));
	EXPECT_EQ(1, info.frames_bad);
	ASSERT_EQ(0, store_close(&self->s));
	if (variant->dev == DEV_PMEM) {
		self->listed = true;
		ASSERT_EQ(0, list_bad(frame, 1));
	}
	ASSERT_EQ(0, store_open(&self->s, variant->dev));
	EXPECT_LE(i, self->s.info.records);
	EXPECT_EQ(self->listed, self->s.info.frames_bad);
	while (i--) {
		EXPECT_EQ(0, get(&self->s, key_of(i), i)) TH_LOG("record %u", i);
	}
	EXPECT_LT(0, put(&self->s, "after", 1, FRAME));
}

static void traffic(struct __test_metadata *_metadata, struct conn *c, uint64_t len)
{
	static char buf[65536];
	struct sender snd;
	uint64_t have = 0;
	ssize_t n;

	ASSERT_EQ(0, sender_start(&snd, c->c, 3, len, 30000, false));
	while (have < len) {
		n = recv(c->s, buf, sizeof(buf), 0);
		ASSERT_LT(0, n);
		ASSERT_EQ(-1, differs(buf, n, 3, have));
		have += n;
	}
	EXPECT_EQ(0, sender_wait(&snd));
}

TEST_F(media_error, heads_and_what_has_no_frame_do_not_stop_the_store)
{
	struct net net = { AF_INET, LINK_LO };
	struct pmskb_store_info info;
	struct pmskb_sock_info si;
	uint64_t seq[NR], at, placed;
	struct conn c;

	ASSERT_EQ(0, store_close(&self->s));
	ASSERT_EQ(0, store_make(&self->s, variant->dev, 0, 1 << 20));
	put_all(_metadata, &self->s, seq);
	ASSERT_EQ(0, conn_make(&c, &net, self->s.fd, HOW_ACCEPTED_IOCTL));
	traffic(_metadata, &c, 1 << 20);
	/* Every other page of the head area: as if it were smaller. */
	for (at = 0; at < self->s.info.head_len; at += 2 * FRAME) {
		HIT(self->s.info.head_off + at);
	}
	ASSERT_EQ(0, store_info(&self->s, &info));
	EXPECT_GE(info.heads_total / 2, info.heads_free);
	EXPECT_LT(info.heads_total / 4, info.heads_free);
	traffic(_metadata, &c, 4 << 20);
	ASSERT_EQ(0, sock_info(c.s, &si));
	placed = si.counters.placed;
	EXPECT_LT(0, placed);
	EXPECT_EQ(0, si.counters.heads_in_dram);
	/* All of them: heads are in DRAM. */
	for (at = FRAME; at < self->s.info.head_len; at += 2 * FRAME) {
		HIT(self->s.info.head_off + at);
	}
	traffic(_metadata, &c, 1 << 20);
	ASSERT_EQ(0, sock_info(c.s, &si));
	EXPECT_LT(placed, si.counters.placed);
	EXPECT_EQ(si.counters.placed - placed, si.counters.heads_in_dram);
	conn_close(&c);
	/* The second superblock, and the batch areas. */
	HIT(self->s.info.region_len - FRAME);
	HIT(2 * FRAME);
	HIT(7 * FRAME);
	EXPECT_EQ(SIGBUS, peek(self->s.map + self->s.info.region_len - FRAME));
	EXPECT_EQ(SIGBUS, peek(self->s.map + 2 * FRAME));
	EXPECT_EQ(-EIO, splice_all(self->s.fd, 7 * FRAME, FRAME));
	all_but(_metadata, &self->s, 0, 0, 0);
	EXPECT_LT(0, put(&self->s, "after", 1, FRAME));
	EXPECT_EQ(0, get(&self->s, "after", 1));
	ASSERT_EQ(0, store_info(&self->s, &info));
	/* Of the data area there is none. */
	EXPECT_EQ(0, info.frames_bad);
	EXPECT_EQ(0, info.flags & PMSKB_STORE_READ_ONLY);
	ASSERT_EQ(0, store_close(&self->s));
	ASSERT_EQ(0, store_open(&self->s, variant->dev));
	all_but(_metadata, &self->s, 0, 0, 0);
}

TEST_F(media_error, what_was_received_into_a_frame_is_not_persisted)
{
	struct net net = { AF_INET, LINK_LO };
	struct pmskb_result r[2] = {};
	struct pmskb_op op[2];
	struct pmskb_ext x[2][8];
	static char buf[3 * PMSKB_FRAME_SIZE];
	uint64_t bad[2];
	struct conn c;
	int n, i, j, k[2];

	ASSERT_EQ(0, conn_make(&c, &net, self->s.fd, HOW_ACCEPTED_IOCTL));
	ASSERT_EQ(0, sock_mode(c.s, PMSKB_RX_DESC));
	n = receive(_metadata, &c, buf, sizeof(buf), 4);
	HIT(d[0].offset);
	k[0] = exts_part(x[0], d, n, 0, 100);
	k[1] = exts_part(x[1], d, n, sizeof(buf) - 100, 100);
	op[0] = op_put("lost", 4, x[0], k[0]);
	op[1] = op_put("kept", 4, x[1], k[1]);
	ASSERT_EQ(0, persist(c.s, op, r, 2));
	EXPECT_EQ(-EIO, r[0].res);
	EXPECT_LT(0, r[1].res);
	EXPECT_EQ(-ENOENT, get(&self->s, "lost", 0));
	EXPECT_NE(-ENOENT, get(&self->s, "kept", 0));
	/* The connection goes on, elsewhere; from a frame that it has begun to fill, too. */
	bad[0] = d[0].offset & ~(FRAME - 1);
	desc_release_all(c.s, d, n);
	n = receive(_metadata, &c, buf, 100, 5);
	bad[1] = d[n - 1].offset & ~(FRAME - 1);
	HIT(bad[1]);
	desc_release_all(c.s, d, n);
	for (i = 0; i < 50; i++) {
		n = receive(_metadata, &c, buf, sizeof(buf) - 100 * i, i);
		for (j = 0; j < 2 * n; j++) {
			EXPECT_TRUE(d[j / 2].offset + d[j / 2].len <= bad[j % 2] ||
				    d[j / 2].offset >= bad[j % 2] + FRAME) TH_LOG("chunk %d", i);
		}
		desc_release_all(c.s, d, n);
	}
	conn_close(&c);
}

struct hitter {
	uint64_t phys, from;
	volatile bool stop;
	unsigned int nr;
};

static void *hit_on(void *arg)
{
	struct hitter *h = arg;

	/* Every 16th frame, until half of the store has been passed. */
	while (!h->stop && h->nr < DATA_MIB * 256 / 32) {
		if (hit(h->phys, h->from + h->nr * 16 * FRAME) != -EIO)
			break;
		h->nr++;
		usleep(2000);
	}
	return NULL;
}

TEST_F_TIMEOUT(media_error, traffic_goes_on_while_frames_go_bad, 60)
{
	struct hitter h = { self->phys, self->s.info.data_off };
	struct net net = { AF_INET, LINK_LO };
	struct pmskb_store_info info;
	uint64_t seq[NR];
	struct conn c;
	pthread_t t;
	int n;

	ASSERT_EQ(0, conn_make(&c, &net, self->s.fd, HOW_ACCEPTED_IOCTL));
	ASSERT_EQ(0, pthread_create(&t, NULL, hit_on, &h));
	traffic(_metadata, &c, 16 << 20);
	h.stop = true;
	pthread_join(t, NULL);
	EXPECT_LT(0, h.nr);
	conn_close(&c);
	put_all(_metadata, &self->s, seq);
	all_but(_metadata, &self->s, 0, 0, 0);
	n = fill_up(&self->s, self->s.info.data_off);
	EXPECT_LT(10, n);
	empty_up(_metadata, &self->s, n);
	ASSERT_EQ(0, store_info(&self->s, &info));
	EXPECT_EQ(h.nr, info.frames_bad);
	EXPECT_EQ(NULL, info_wrong(&info, 0, false)) TH_LOG("%s", info_wrong(&info, 0, false));
}

TEST_HARNESS_MAIN
