// SPDX-License-Identifier: GPL-2.0
/*
 * Promises about /dev/pmskbN as a file: mapping, reading, splicing, and what of
 * the kernel's nobody may see through it.
 */
#include "common.h"
#include "media.h"

#include <errno.h>
#include <fcntl.h>
#include <setjmp.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/uio.h>

#include "harness.h"

#define ERRNO(call) ((call) < 0 ? errno : 0)

static sigjmp_buf fault_jump;

static void on_fault(int sig)
{
	siglongjmp(fault_jump, sig);
}

/* The signal that reading a byte raises, or 0. */
static int touch(const volatile uint8_t *p)
{
	struct sigaction sa = { .sa_handler = on_fault, .sa_flags = SA_NODEFER }, old[2];
	volatile int sig;

	sigaction(SIGBUS, &sa, &old[0]);
	sigaction(SIGSEGV, &sa, &old[1]);
	sig = sigsetjmp(fault_jump, 1);
	if (!sig)
		(void)*p;
	sigaction(SIGBUS, &old[0], NULL);
	sigaction(SIGSEGV, &old[1], NULL);
	return sig;
}

FIXTURE(file) {
	struct store s;
};

FIXTURE_VARIANT(file) {
	enum dev dev;
	uint32_t flags;
};

FIXTURE_VARIANT_ADD(file, pmem) { .dev = DEV_PMEM };
FIXTURE_VARIANT_ADD(file, pmem_heads_dram) { .dev = DEV_PMEM, .flags = PMSKB_FORMAT_HEADS_DRAM };
FIXTURE_VARIANT_ADD(file, dax) { .dev = DEV_DAX };

FIXTURE_SETUP(file)
{
	const char *why;

	if (!dev_path(variant->dev, &why))
		SKIP(return, "%s", why);
	ASSERT_EQ(0, store_make(&self->s, variant->dev, variant->flags, 0));
}

FIXTURE_TEARDOWN(file)
{
	EXPECT_EQ(0, store_close(&self->s));
}

TEST_F(file, a_mapping_is_read_only_and_stays_so)
{
	struct store *s = &self->s;
	void *m;

	EXPECT_EQ(MAP_FAILED, mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, s->fd, 0));
	EXPECT_EQ(EPERM, errno);
	EXPECT_EQ(MAP_FAILED, mmap(NULL, 4096, PROT_WRITE, MAP_SHARED, s->fd, s->info.data_off));
	EXPECT_EQ(EPERM, errno);
	EXPECT_EQ(MAP_FAILED, mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE, s->fd, 0));
	EXPECT_EQ(EPERM, errno);
	EXPECT_EQ(-1, mprotect((void *)s->map, 4096, PROT_READ | PROT_WRITE));
	EXPECT_EQ(EACCES, errno);
	EXPECT_EQ(-1, mprotect((void *)s->map, 4096, PROT_READ | PROT_EXEC));
	EXPECT_EQ(EACCES, errno);
	m = mmap(NULL, 4096, PROT_READ, MAP_PRIVATE, s->fd, 0);
	if (m != MAP_FAILED) {
		EXPECT_EQ(-1, mprotect(m, 4096, PROT_READ | PROT_WRITE));
		munmap(m, 4096);
	}
	EXPECT_EQ(SIGSEGV, ({
		pid_t pid = fork();
		int st;

		if (!pid) {
			signal(SIGSEGV, SIG_DFL);
			*(volatile uint8_t *)s->map = 0;
			_exit(0);
		}
		waitpid(pid, &st, 0);
		WIFSIGNALED(st) ? WTERMSIG(st) : 0;
	}));
}

TEST_F(file, everything_but_the_head_area_can_be_read_through_the_mapping)
{
	struct store *s = &self->s;
	const struct pmskb_store_info *i = &s->info;
	uint64_t off;

	for (off = 0; off < i->map_len; off += i->map_len / 512 / 4096 * 4096 + 4096) {
		bool head = off >= i->head_off && off < i->head_off + i->head_len;

		EXPECT_EQ(head ? SIGBUS : 0, touch(s->map + off)) TH_LOG("offset %#lx", off);
	}
	EXPECT_EQ(0, touch(s->map));
	EXPECT_EQ(0, touch(s->map + i->data_off));
	EXPECT_EQ(0, touch(s->map + i->map_len - 1));
}

TEST_F(file, the_head_area_is_sigbus_at_both_ends_and_cannot_be_mapped_around)
{
	struct store *s = &self->s;
	const struct pmskb_store_info *i = &s->info;
	uint8_t *m, *n;

	if (!i->head_len)
		SKIP(return, "heads are in DRAM");
	EXPECT_EQ(0, touch(s->map + i->head_off - 1));
	EXPECT_EQ(SIGBUS, touch(s->map + i->head_off));
	EXPECT_EQ(SIGBUS, touch(s->map + i->head_off + i->head_len - 1));
	EXPECT_EQ(0, touch(s->map + i->head_off + i->head_len));

	/* By offset of the mapping. */
	m = mmap(NULL, 4096, PROT_READ, MAP_SHARED, s->fd, i->head_off);
	if (m != MAP_FAILED) {
		EXPECT_EQ(SIGBUS, touch(m));
		munmap(m, 4096);
	}
	m = mmap(NULL, 4 << 20, PROT_READ, MAP_SHARED | MAP_POPULATE, s->fd,
		 i->head_off & ~((2UL << 20) - 1));
	if (m != MAP_FAILED) {
		EXPECT_EQ(SIGBUS, touch(m + (i->head_off & ((2UL << 20) - 1))));
		munmap(m, 4 << 20);
	}
	/* mremap() to more than was mapped. */
	m = mmap(NULL, 4096, PROT_READ, MAP_SHARED, s->fd, i->head_off - 4096);
	ASSERT_NE(MAP_FAILED, m);
	n = mremap(m, 4096, 3 * 4096, MREMAP_MAYMOVE);
	if (n != MAP_FAILED) {
		EXPECT_EQ(SIGBUS, touch(n + 4096));
		munmap(n, 3 * 4096);
	} else {
		munmap(m, 4096);
	}
}

TEST_F(file, beyond_the_end_there_is_nothing)
{
	struct store *s = &self->s;
	uint8_t byte = 0, *m;

	m = mmap(NULL, s->map_len + (8 << 20), PROT_READ, MAP_SHARED, s->fd, 0);
	if (m != MAP_FAILED) {
		EXPECT_EQ(0, touch(m + s->map_len - 1));
		EXPECT_EQ(SIGBUS, touch(m + (s->map_len + 4095) / 4096 * 4096));
		EXPECT_EQ(SIGBUS, touch(m + s->map_len + (4 << 20)));
		munmap(m, s->map_len + (8 << 20));
	} else {
		EXPECT_EQ(EINVAL, errno);
	}
	m = mmap(NULL, 4096, PROT_READ, MAP_SHARED, s->fd, 1L << 50);
	if (m != MAP_FAILED) {
		EXPECT_EQ(SIGBUS, touch(m));
		munmap(m, 4096);
	}
	m = mmap(NULL, 8192, PROT_READ, MAP_SHARED, s->fd, 0x7ffffffffffff000L - 4096);
	if (m != MAP_FAILED) {
		EXPECT_EQ(SIGBUS, touch(m + 4096));
		munmap(m, 8192);
	}
	EXPECT_EQ(0, pread(s->fd, &byte, 1, s->map_len));
	EXPECT_EQ(0, pread(s->fd, &byte, 1, 1L << 50));
	EXPECT_EQ(0, pread(s->fd, &byte, 1, 0x7fffffffffff0000L));
	EXPECT_EQ(1, pread(s->fd, &byte, 1, s->map_len - 1));
}

TEST_F(file, pread_sees_what_the_mapping_sees_and_zeros_in_the_head_area)
{
	struct store *s = &self->s;
	const struct pmskb_store_info *i = &s->info;
	struct net net = { AF_INET, LINK_LO };
	static uint8_t buf[1 << 16], data[100000];
	struct pmskb_desc d[256];
	struct conn c;
	size_t k;
	int n;

	/* Something to see. */
	ASSERT_EQ(0, conn_make(&c, &net, s->fd, HOW_ACCEPTED_IOCTL));
	ASSERT_EQ(0, sock_mode(c.s, PMSKB_RX_DESC));
	fill(data, sizeof(data), 1, 0);
	ASSERT_EQ(0, send_all(c.c, data, sizeof(data)));
	n = desc_recv_bytes(c.s, d, ARRAY_LEN(d), sizeof(data));
	ASSERT_LT(0, n);
	for (k = 0; k < (size_t)n; k++) {
		ASSERT_EQ(d[k].len < sizeof(buf) ? d[k].len : sizeof(buf),
			  pread(s->fd, buf, d[k].len < sizeof(buf) ? d[k].len : sizeof(buf), d[k].offset));
		EXPECT_EQ(0, memcmp(buf, s->map + d[k].offset, d[k].len < sizeof(buf) ? d[k].len : sizeof(buf)));
	}
	ASSERT_EQ(4096, pread(s->fd, buf, 4096, 0));
	EXPECT_EQ(0, memcmp(buf, "pmskb\0SB", 8));
	if (i->head_len) {
		/* Across its start, and inside. */
		memset(buf, 0xff, sizeof(buf));
		ASSERT_EQ(8192, pread(s->fd, buf, 8192, i->head_off - 4096));
		for (k = 4096; k < 8192 && !buf[k]; k++)
			;
		EXPECT_EQ(8192, k) TH_LOG("byte %zu of the head area can be read", k - 4096);
		for (uint64_t off = i->head_off; off < i->head_off + i->head_len; off += sizeof(buf)) {
			ssize_t got = pread(s->fd, buf, sizeof(buf), off);

			ASSERT_LT(0, got);
			for (k = 0; k < (size_t)got && off + k < i->head_off + i->head_len && !buf[k]; k++)
				;
			EXPECT_TRUE(k == (size_t)got || off + k == i->head_off + i->head_len)
				TH_LOG("head area leaks at %#lx", off + k);
		}
	}
	conn_close(&c);
}

TEST_F(file, lseek_read_and_fstat_know_the_size)
{
	struct store *s = &self->s;
	struct stat st;
	uint8_t buf[64];

	ASSERT_EQ(0, fstat(s->fd, &st));
	EXPECT_TRUE(S_ISCHR(st.st_mode));
	EXPECT_EQ(s->minor, ({
		struct pmskb_store_info i;

		store_info(s, &i);
		i.minor;
	}));
	EXPECT_EQ(s->map_len, lseek(s->fd, 0, SEEK_END));
	EXPECT_EQ(s->map_len - 16, lseek(s->fd, -16, SEEK_END));
	EXPECT_EQ(16, read(s->fd, buf, sizeof(buf)));
	EXPECT_EQ(0, read(s->fd, buf, sizeof(buf)));
	EXPECT_EQ(0, lseek(s->fd, 0, SEEK_SET));
	EXPECT_EQ(64, read(s->fd, buf, sizeof(buf)));
	EXPECT_EQ(0, memcmp(buf, s->map, 64));
	EXPECT_EQ(64, lseek(s->fd, 0, SEEK_CUR));
	EXPECT_EQ(EINVAL, ERRNO(lseek(s->fd, -1, SEEK_SET)));
	EXPECT_EQ(EINVAL, ERRNO(lseek(s->fd, 0, 77)));
}

TEST_F(file, bad_buffers_are_efault)
{
	struct store *s = &self->s;
	struct iovec iov[2];
	char byte;

	EXPECT_EQ(EFAULT, ERRNO(pread(s->fd, BAD_PTR, 16, 0)));
	EXPECT_EQ(EFAULT, ERRNO(ioctl(s->fd, PMSKB_IOC_INFO, BAD_PTR)));
	EXPECT_EQ(EFAULT, ERRNO(ioctl(s->fd, PMSKB_IOC_SUBMIT, BAD_PTR)));
	EXPECT_EQ(EFAULT, ERRNO(ioctl(s->fd, PMSKB_IOC_ATTACH_SOCKET, BAD_PTR)));
	iov[0] = (struct iovec) { &byte, 1 };
	iov[1] = (struct iovec) { BAD_PTR, 1 };
	EXPECT_EQ(1, preadv(s->fd, iov, 2, 0));
}

TEST_F(file, a_store_cannot_be_written_or_truncated)
{
	EXPECT_EQ(EINVAL, ERRNO(pwrite(self->s.fd, "x", 1, 0)));
	EXPECT_EQ(EINVAL, ERRNO(ftruncate(self->s.fd, 0)));
}

TEST_F(file, unknown_ioctls_are_enotty)
{
	char buf[512] = {};

	EXPECT_EQ(ENOTTY, ERRNO(ioctl(self->s.fd, _IO(PMSKB_IOC_MAGIC, 0x7f), 0)));
	EXPECT_EQ(ENOTTY, ERRNO(ioctl(self->s.fd, PMSKB_IOC_FORMAT, buf)));
	EXPECT_EQ(ENOTTY, ERRNO(ioctl(self->s.fd, PMSKB_IOC_DETACH, buf)));
	EXPECT_EQ(ENOTTY, ERRNO(ioctl(self->s.fd, _IOR(PMSKB_IOC_MAGIC, 0x10, char[8]), buf)));
	EXPECT_EQ(ENOTTY, ERRNO(ioctl(self->s.fd, 0x5401 /* TCGETS */, buf)));
}

TEST_F(file, others_can_use_a_store_only_if_the_node_lets_them)
{
	struct pmskb_op op = op_put("by nobody", 9, NULL, 0);
	struct pmskb_result res = {};
	pid_t pid = fork();
	int st, fd;

	if (!pid) {
		if (setresgid(65534, 65534, 65534) || setresuid(65534, 65534, 65534))
			_exit(1);
		if (open(self->s.path, O_RDONLY) >= 0 || errno != EACCES)
			_exit(2);
		_exit(0);
	}
	ASSERT_EQ(pid, waitpid(pid, &st, 0));
	EXPECT_EQ(0, st) TH_LOG("exit %d", WEXITSTATUS(st));

	ASSERT_EQ(0, chmod(self->s.path, 0666));
	pid = fork();
	if (!pid) {
		if (setresgid(65534, 65534, 65534) || setresuid(65534, 65534, 65534))
			_exit(1);
		fd = open(self->s.path, O_RDWR);
		if (fd < 0)
			_exit(2);
		if (mmap(NULL, 4096, PROT_READ, MAP_SHARED, fd, 0) == MAP_FAILED)
			_exit(3);
		/* Use needs no privilege. */
		if (submit(fd, &op, &res, 1) || res.res < 1)
			_exit(4);
		_exit(0);
	}
	ASSERT_EQ(pid, waitpid(pid, &st, 0));
	EXPECT_EQ(0, st) TH_LOG("exit %d", WEXITSTATUS(st));
}

TEST_F(file, a_descriptor_open_for_reading_only_cannot_change_the_store)
{
	struct pmskb_op op = op_put("ro", 2, NULL, 0);
	struct pmskb_result res = {};
	struct pmskb_store_info i;
	int fd = open(self->s.path, O_RDONLY | O_CLOEXEC);
	int sk = socket(AF_INET, SOCK_STREAM, 0);

	ASSERT_LE(0, fd);
	EXPECT_EQ(0, ioctl(fd, PMSKB_IOC_INFO, &i));
	EXPECT_EQ(-EACCES, submit(fd, &op, &res, 1));
	EXPECT_EQ(-EACCES, sock_attach_ioctl(sk, fd));
	EXPECT_EQ(-EACCES, sock_attach_opt(sk, fd));
	ASSERT_EQ(0, store_info(&self->s, &i));
	EXPECT_EQ(0, i.records);
	close(sk);
	close(fd);
}

/* ---- sending ---- */

static int pull(int from, void *buf, size_t len)
{
	return recv_all(from, buf, len);
}

TEST_F(file, sendfile_and_splice_send_what_is_stored)
{
	struct store *s = &self->s;
	struct net net = { AF_INET, LINK_LO };
	static uint8_t data[200000], back[200000];
	struct pmskb_desc d[512];
	struct conn c, out;
	size_t got = 0;
	int n, k, pipes[2];

	ASSERT_EQ(0, conn_make(&c, &net, s->fd, HOW_ACCEPTED_OPT));
	ASSERT_EQ(0, conn_make(&out, &net, -1, HOW_PLAIN));
	ASSERT_EQ(0, sock_mode(c.s, PMSKB_RX_DESC));
	fill(data, sizeof(data), 2, 0);
	ASSERT_EQ(0, send_all(c.c, data, sizeof(data)));
	n = desc_recv_bytes(c.s, d, ARRAY_LEN(d), sizeof(data));
	ASSERT_LT(0, n);

	for (k = 0; k < n; k++) {
		off_t off = d[k].offset;
		size_t left = d[k].len;

		while (left) {
			ssize_t m = sendfile(out.s, s->fd, &off, left);

			ASSERT_LT(0, m);
			left -= m;
		}
		EXPECT_EQ(d[k].offset + d[k].len, off);
		ASSERT_EQ(0, pull(out.c, back + got, d[k].len));
		got += d[k].len;
	}
	EXPECT_EQ(-1, differs(back, sizeof(back), 2, 0)) TH_LOG("sendfile");

	ASSERT_EQ(0, pipe(pipes));
	for (k = 0, got = 0; k < n; k++) {
		loff_t off = d[k].offset;
		size_t left = d[k].len;

		while (left) {
			ssize_t m = splice(s->fd, &off, pipes[1], NULL, left, 0), r;

			ASSERT_LT(0, m);
			left -= m;
			for (r = 0; r < m;) {
				ssize_t w = splice(pipes[0], NULL, out.s, NULL, m - r, 0);

				ASSERT_LT(0, w);
				r += w;
			}
		}
		ASSERT_EQ(0, pull(out.c, back + got, d[k].len));
		got += d[k].len;
	}
	EXPECT_EQ(-1, differs(back, sizeof(back), 2, 0)) TH_LOG("splice");

	/* At the end there is nothing, as in a file. */
	{
		off_t off = s->map_len;

		EXPECT_EQ(0, sendfile(out.s, s->fd, &off, 100));
	}
	conn_close(&c);
	conn_close(&out);
}

TEST_F(file, the_head_area_cannot_be_sent)
{
	struct store *s = &self->s;
	uint8_t buf[4096];
	int pipes[2];
	loff_t off = s->info.head_off;
	ssize_t n, k;

	if (!s->info.head_len)
		SKIP(return, "heads are in DRAM");
	ASSERT_EQ(0, pipe(pipes));
	n = splice(s->fd, &off, pipes[1], NULL, 4096, 0);
	if (n > 0) {
		ASSERT_EQ(n, read(pipes[0], buf, n));
		for (k = 0; k < n && !buf[k]; k++)
			;
		EXPECT_EQ(n, k) TH_LOG("head area leaks through splice");
	}
}

/*
 * Frames that a record or token no longer needs must not be given to somebody
 * else while they are on their way to a peer that does not read.
 */
TEST_F(file, frames_in_a_pipe_are_neither_reused_nor_let_go)
{
	struct store *s = &self->s;
	struct net net = { AF_INET, LINK_LO };
	static uint8_t data[8192], back[8192];
	struct pmskb_desc d[64];
	int pipes[2], n, k;
	struct conn c;
	ssize_t in_pipe = 0, r;

	ASSERT_EQ(0, conn_make(&c, &net, s->fd, HOW_ACCEPTED_OPT));
	ASSERT_EQ(0, sock_mode(c.s, PMSKB_RX_DESC));
	fill(data, sizeof(data), 3, 0);
	ASSERT_EQ(0, send_all(c.c, data, sizeof(data)));
	n = desc_recv_bytes(c.s, d, ARRAY_LEN(d), sizeof(data));
	ASSERT_LT(0, n);
	ASSERT_EQ(0, pipe(pipes));
	for (k = 0; k < n; k++) {
		loff_t off = d[k].offset;
		size_t left = d[k].len;

		while (left) {
			r = splice(s->fd, &off, pipes[1], NULL, left, 0);
			ASSERT_LT(0, r);
			left -= r;
			in_pipe += r;
		}
	}
	ASSERT_EQ(sizeof(data), in_pipe);
	ASSERT_EQ(0, desc_release_all(c.s, d, n));
	conn_close(&c);

	/* Others receive as much as they can: not over these bytes. */
	ASSERT_EQ(0, conn_make(&c, &net, s->fd, HOW_ACCEPTED_OPT));
	for (k = 0; k < 64; k++) {
		static uint8_t other[65536];

		memset(other, 0xee, sizeof(other));
		ASSERT_EQ(0, send_all(c.c, other, sizeof(other)));
		ASSERT_EQ(0, recv_all(c.s, other, sizeof(other)));
	}
	conn_close(&c);

	store_let_go(s);
	EXPECT_EQ(-EBUSY, dev_detach(s->ctl, s->minor, 200)) TH_LOG("frames in a pipe");
	ASSERT_EQ(sizeof(back), read(pipes[0], back, sizeof(back)));
	EXPECT_EQ(-1, differs(back, sizeof(back), 3, 0)) TH_LOG("frames were reused in a pipe");
	/* The fixture detaches. */
}

/* ---- what must not be seen ---- */

static bool looks_like_kernel(uint64_t w)
{
	if (w == ~0ULL)
		return false;
	/* Direct map with 4 and 5 levels, vmemmap, vmalloc, text, modules. */
	return (w >> 44) == 0xffff8 || (w >> 44) == 0xffff9 || (w >> 44) == 0xffffc ||
	       (w >> 44) == 0xffffd || (w >> 44) == 0xffffe || (w >> 48) == 0xff11 ||
	       (w >> 48) == 0xffd4 || (w >> 48) == 0xffa0 || (w >> 32) == 0xffffffff;
}

struct word {
	uint64_t off, value;
};

/*
 * Words that look like addresses: at most max of them. What the region held
 * before the store was formatted may look like anything.
 */
static size_t suspects(const struct store *s, struct word *words, size_t max)
{
	uint64_t off;
	size_t n = 0;

	for (off = 0; off + 8 <= s->map_len && n < max; off += 8) {
		uint64_t w;

		if (off >= s->info.head_off && off < s->info.head_off + s->info.head_len) {
			off = s->info.head_off + s->info.head_len - 8;
			continue;
		}
		w = *(const uint64_t *)(s->map + off);
		/* The version of a node of the index begins with a random number. */
		if (off % 1024 == 0 && off + 16 <= s->map_len && get64(s->map + off + 8) >> 48 == 0x6e70)
			continue;
		if (looks_like_kernel(w))
			words[n++] = (struct word) { off, w };
	}
	return n;
}

/* Text cannot pass for an address, so none of this is by chance. */
static void say(int fd, size_t len)
{
	static char text[65536];

	memset(text, 'n', sizeof(text));
	while (len) {
		size_t n = len < sizeof(text) ? len : sizeof(text);

		if (send_all(fd, text, n))
			return;
		len -= n;
	}
}

TEST_F(file, no_kernel_address_is_anywhere_in_the_mapping_after_traffic)
{
	struct store *s = &self->s;
	struct net net = { AF_INET, LINK_LO };
	struct pmskb_result res[4];
	static struct word before[65536], after[65536];
	size_t had, has, k, m = 0, found = 0;
	struct pmskb_desc d[512];
	struct pmskb_ext e[512];
	struct conn c[4];
	int i, n;

	had = suspects(s, before, ARRAY_LEN(before));
	ASSERT_GT(ARRAY_LEN(before), had);
	for (i = 0; i < 4; i++) {
		struct pmskb_op op;

		ASSERT_EQ(0, conn_make(&c[i], &net, s->fd, HOW_LISTENER_OPT));
		ASSERT_EQ(0, sock_mode(c[i].s, PMSKB_RX_DESC));
		say(c[i].c, 50000 + i);
		n = desc_recv_bytes(c[i].s, d, ARRAY_LEN(d), 50000 + i);
		ASSERT_LT(0, n);
		exts_of(e, d, n);
		op = op_put("key", 3, e, i == 3 ? 0 : n);
		ASSERT_LT(0, persist_one(c[i].s, &op, &res[i]));
	}
	/* Packets that wait, unread, while the mapping is looked at. */
	say(c[0].c, 20000);
	say(c[1].c, 20);
	usleep(100000);
	has = suspects(s, after, ARRAY_LEN(after));
	for (k = 0; k < has; k++) {
		while (m < had && before[m].off < after[k].off)
			m++;
		if (m < had && before[m].off == after[k].off && before[m].value == after[k].value)
			continue;
		if (found++ < 5)
			TH_LOG("%#lx at %#lx", after[k].value, after[k].off);
	}
	EXPECT_EQ(0, found);
	for (i = 0; i < 4; i++)
		conn_close(&c[i]);
}

TEST_F(file, the_mapping_is_no_source_for_direct_io)
{
	struct store *s = &self->s;
	int pipes[2];
	struct iovec iov = { (void *)(s->map + s->info.data_off), 4096 };

	/* PFN mappings cannot be pinned; it has to fail, not crash. */
	ASSERT_EQ(0, pipe(pipes));
	EXPECT_EQ(EFAULT, ERRNO(vmsplice(pipes[1], &iov, 1, SPLICE_F_GIFT)));
	/* A copy works, of course. */
	EXPECT_EQ(4096, write(pipes[1], s->map + s->info.data_off, 4096));
}

TEST_F(file, a_child_inherits_the_mapping_and_many_can_map)
{
	struct store *s = &self->s;
	int i, st;

	for (i = 0; i < 4; i++) {
		pid_t pid = fork();

		if (!pid) {
			void *m = mmap(NULL, s->map_len, PROT_READ, MAP_SHARED, s->fd, 0);

			_exit(m == MAP_FAILED || memcmp(m, s->map, 4096) ? 1 : 0);
		}
		ASSERT_EQ(pid, waitpid(pid, &st, 0));
		EXPECT_EQ(0, st);
	}
}

TEST_HARNESS_MAIN
