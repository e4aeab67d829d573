// SPDX-License-Identifier: GPL-2.0
#include "media.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <linux/fs.h>

uint32_t crc32c(uint32_t crc, const void *buf, size_t len)
{
	static uint32_t table[256];
	const uint8_t *p = buf;

	if (!table[1]) {
		for (uint32_t i = 0; i < 256; i++) {
			uint32_t c = i;

			for (int k = 0; k < 8; k++)
				c = c & 1 ? c >> 1 ^ 0x82f63b78 : c >> 1;
			table[i] = c;
		}
	}
	crc = ~crc;
	while (len--)
		crc = table[(crc ^ *p++) & 0xff] ^ crc >> 8;
	return ~crc;
}

uint32_t get32(const void *p)
{
	const uint8_t *b = p;

	return b[0] | b[1] << 8 | b[2] << 16 | (uint32_t)b[3] << 24;
}

uint64_t get64(const void *p)
{
	return get32(p) | (uint64_t)get32((const uint8_t *)p + 4) << 32;
}

void put32(void *p, uint32_t v)
{
	uint8_t *b = p;

	for (int i = 0; i < 4; i++)
		b[i] = v >> 8 * i;
}

void put64(void *p, uint64_t v)
{
	put32(p, v);
	put32((uint8_t *)p + 4, v >> 32);
}

/* O_DIRECT: the module does not go through the block device's page cache. */
static int transfer(const char *dev, uint64_t off, void *buf, size_t len, bool write)
{
	int fd = open(dev, (write ? O_WRONLY : O_RDONLY) | O_DIRECT | O_CLOEXEC);
	void *page = NULL;
	int err = 0;
	ssize_t n;

	if (fd < 0)
		return -errno;
	if (posix_memalign(&page, 4096, len)) {
		close(fd);
		return -ENOMEM;
	}
	if (write) {
		memcpy(page, buf, len);
		n = pwrite(fd, page, len, off);
	} else {
		n = pread(fd, page, len, off);
		memcpy(buf, page, len);
	}
	if (n < 0)
		err = -errno;
	else if ((size_t)n != len)
		err = -EIO;
	free(page);
	close(fd);
	return err;
}

int media_read(const char *dev, uint64_t off, void *buf, size_t len)
{
	return transfer(dev, off, buf, len, false);
}

int media_write(const char *dev, uint64_t off, const void *buf, size_t len)
{
	return transfer(dev, off, (void *)buf, len, true);
}

int64_t media_size(const char *dev)
{
	int fd = open(dev, O_RDONLY | O_CLOEXEC);
	uint64_t size = 0;
	int64_t ret;

	if (fd < 0)
		return -errno;
	ret = ioctl(fd, BLKGETSIZE64, &size) ? -errno : (int64_t)size;
	close(fd);
	return ret;
}

int media_zero(const char *dev, uint64_t off, size_t len)
{
	void *zeros = calloc(1, len);
	int err = zeros ? media_write(dev, off, zeros, len) : -ENOMEM;

	free(zeros);
	return err;
}

bool sb_valid(const uint8_t *page)
{
	return !memcmp(page, "pmskb\0SB", 8) &&
	       get32(page + SB_CRC) == crc32c(0, page + SB_VERSION, SB_SIZE - SB_VERSION);
}

void sb_seal(uint8_t *page)
{
	put32(page + SB_CRC, crc32c(0, page + SB_VERSION, SB_SIZE - SB_VERSION));
}

int sb_patch(const char *dev, uint64_t off, size_t at, const void *bytes, size_t len, bool seal)
{
	uint8_t page[4096];
	int err = media_read(dev, off, page, sizeof(page));

	if (err)
		return err;
	memcpy(page + at, bytes, len);
	if (seal)
		sb_seal(page);
	return media_write(dev, off, page, sizeof(page));
}

/* ---- records ---- */

#define LINE 64
#define TYPE_PUT 1
#define F_KEY_EXTENT (1 << 6)
#define F_EXT_LIST (1 << 7)
#define F_PAYLOAD_CRC (1 << 9)
#define F_KEYED (1 << 12)
#define PER_LIST ((4096 - LINE) / 8)

struct place {
	const uint8_t *base;
	size_t len;
};

static const uint8_t *bytes_at(const struct place *p, uint64_t off, uint64_t len)
{
	return off <= p->len && len <= p->len - off ? p->base + off : NULL;
}

static int add_extent(const struct place *p, struct record *r, uint32_t *have, uint64_t word)
{
	uint64_t off = word >> 20, len = (word & 0xfffff) + 1;
	const uint8_t *from = bytes_at(p, off, len);

	if (!from || len > r->len - *have)
		return -EUCLEAN;
	memcpy(r->bytes + *have, from, len);
	*have += len;
	return 0;
}

static int parse_record(const struct place *p, const uint8_t *frame, unsigned int line, struct record *r)
{
	const uint8_t *m = frame + line * LINE, *at;
	uint32_t nonce = get32(frame + 48), crc, have = 0, i, n;
	unsigned int lines = m[5];
	uint64_t first;
	int err = 0;

	memset(r, 0, offsetof(struct record, key));
	r->flags = m[6] | m[7] << 8;
	r->seq = get64(m + 8);
	r->time = get64(m + 16);
	r->len = get32(m + 24);
	r->csum = m[28] | m[29] << 8;
	r->key_len = m[30] | m[31] << 8;
	first = get64(m + 32);
	r->nr_extents = get32(m + 40);
	r->tcp_seq = get32(m + 44);
	r->payload_crc = get32(m + 60);
	r->remote_port = m[48] | m[49] << 8;
	r->local_port = m[50] | m[51] << 8;
	r->keyed = r->flags & F_KEYED;
	/* Cut short, or the rest of something else: not a record. */
	if (r->key_len > sizeof(r->key) || lines > 26)
		return 1;

	at = m + LINE;
	switch (r->flags >> 4 & 3) {
	case 1:
		r->family = 4;
		memcpy(r->remote, m + 52, 4);
		memcpy(r->local, m + 56, 4);
		break;
	case 2:
		r->family = 6;
		memcpy(r->remote, at, 16);
		memcpy(r->local, at + 16, 16);
		at += 32;
		break;
	}
	crc = crc32c(nonce, m + 4, lines * LINE - 4);
	if (r->flags & F_KEY_EXTENT) {
		const uint8_t *key = bytes_at(p, get64(at) >> 20, r->key_len);

		if (!key || (get64(at) & 0xfffff) + 1 != r->key_len)
			return 1;
		memcpy(r->key, key, r->key_len);
		crc = crc32c(crc, key, r->key_len);
		at += 8;
	} else {
		memcpy(r->key, at, r->key_len);
		at += (r->key_len + 7) / 8 * 8;
	}
	if (crc != get32(m))
		return 1;

	r->bytes = malloc(r->len ? r->len : 1);
	if (!r->bytes)
		return -ENOMEM;
	if (!(r->flags & F_EXT_LIST)) {
		for (i = 0; i < r->nr_extents && !err; i++)
			err = add_extent(p, r, &have, i ? get64(at + (i - 1) * 8) : first);
	} else {
		uint32_t index = 0, left = r->nr_extents;

		while (left && !err) {
			const uint8_t *list = bytes_at(p, first, 4096);

			n = left < PER_LIST ? left : PER_LIST;
			if (!list || memcmp(list + 4, "PKel", 4) || get64(list + 8) != first ||
			    get64(list + 16) != r->seq || get32(list + 32) != n ||
			    get32(list + 36) != index++ ||
			    get32(list) != crc32c(nonce, list + 4, LINE - 4 + (n + 7) / 8 * LINE)) {
				err = -EUCLEAN;
				break;
			}
			for (i = 0; i < n && !err; i++)
				err = add_extent(p, r, &have, get64(list + LINE + i * 8));
			left -= n;
			first = get64(list + 24);
		}
	}
	if (!err && have != r->len)
		err = -EUCLEAN;
	if (!err && (r->flags & F_PAYLOAD_CRC) && crc32c(0, r->bytes, r->len) != get32(m + 60))
		err = -EUCLEAN;
	if (err)
		free(r->bytes);
	return err;
}

struct found {
	struct record r;
	bool superseded;
};

/* By key, then by number; without a key last, by number. */
static int by_key(const void *a, const void *b)
{
	const struct record *x = &(*(struct found *const *)a)->r, *y = &(*(struct found *const *)b)->r;
	int c;

	if (x->keyed != y->keyed)
		return x->keyed ? -1 : 1;
	c = memcmp(x->key, y->key, x->key_len < y->key_len ? x->key_len : y->key_len);
	if (!c && x->key_len != y->key_len)
		c = x->key_len < y->key_len ? -1 : 1;
	if (!c || !x->keyed)
		c = x->seq < y->seq ? -1 : x->seq > y->seq;
	return c;
}

static int scan_frame(const struct place *p, const uint8_t *f, struct found ***all, int *n)
{
	unsigned int line;

	for (line = 1; line < 64;) {
		const uint8_t *m = f + line * LINE;
		struct found *one;
		int err;

		if (!m[5] || line + m[5] > 64 || m[4] != TYPE_PUT) {
			line++;
			continue;
		}
		one = calloc(1, sizeof(*one));
		err = one ? parse_record(p, f, line, &one->r) : -ENOMEM;
		if (err) {
			free(one);
			if (err < 0)
				return err;
			line++;
			continue;
		}
		if (!(*n & (*n + 1)))
			*all = realloc(*all, (2 * (*n + 1)) * sizeof(**all));
		(*all)[(*n)++] = one;
		line += m[5];
	}
	return 0;
}

int media_scan(const uint8_t *base, size_t len, int (*each)(struct record *r, void *arg), void *arg)
{
	struct place p = { base, len };
	struct found **all = NULL;
	uint64_t off, data, end, truncated;
	const uint8_t *map;
	int n = 0, live = 0, err = 0, i;

	if (!sb_valid(base))
		return -EUCLEAN;
	truncated = get64(base + SB_TRUNC_SEQ);
	data = get64(base + SB_DATA_OFF);
	end = data + get64(base + SB_DATA_LEN);
	map = base + get64(base + SB_MAP_OFF);
	if (end > len)
		end = len;
	for (off = data; off + 4096 <= end && !err; off += 4096) {
		const uint8_t *f = base + off;
		unsigned int frame = off / 4096;

		/* The frame map says which frames have records. */
		if (!(map[frame / 8] >> frame % 8 & 1))
			continue;
		if (memcmp(f + 4, "PKrf", 4) || get64(f + 8) != off ||
		    memcmp(f + 24, base + SB_UUID, 16) || get32(f) != crc32c(0, f + 4, LINE - 4))
			continue;
		err = scan_frame(&p, f, &all, &n);
	}
	/*
	 * A record whose key has a later one is replaced, whether or not it was
	 * killed yet.
	 */
	if (n)
		qsort(all, n, sizeof(*all), by_key);
	for (i = 0; i + 1 < n; i++) {
		const struct record *x = &all[i]->r, *y = &all[i + 1]->r;

		all[i]->superseded = x->keyed && y->keyed && x->key_len == y->key_len &&
				     !memcmp(x->key, y->key, x->key_len);
	}
	for (i = 0; i < n; i++) {
		const struct record *x = &all[i]->r;

		if (!err && !all[i]->superseded && (x->keyed || x->seq > truncated)) {
			live++;
			err = each ? each(&all[i]->r, arg) : 0;
		}
		free(all[i]->r.bytes);
		free(all[i]);
	}
	free(all);
	return err ? err : live;
}

/* ---- the mapping of an attached store ---- */

#define LIVE 4096
#define LIVE_KEY_ROOT (LIVE + 24)
#define LIVE_SNAPSHOT (LIVE + 88)
#define TYPE_KILLED 0xdd
#define NODE 1024
#define MAX_KEY 1024
#define TRIES 100000

/* What is written meanwhile: eight bytes at once, and nothing later before it. */
static uint64_t load(const struct place *p, uint64_t off)
{
	return __atomic_load_n((const uint64_t *)(p->base + off), __ATOMIC_ACQUIRE);
}

static void acquire(void)
{
	__atomic_thread_fence(__ATOMIC_ACQUIRE);
}

/* Nothing but the data area is followed: the head area cannot be read. */
static bool in_data(const struct place *p, uint64_t off, uint64_t len)
{
	uint64_t data = get64(p->base + SB_DATA_OFF), end = data + get64(p->base + SB_DATA_LEN);

	if (end > p->len)
		end = p->len;
	return off >= data && off <= end && len <= end - off;
}

/* Compares a key with that of the record at loc; 2 if there is nothing of the kind. */
static int key_cmp(const struct place *p, const void *key, uint32_t key_len, uint64_t loc)
{
	uint32_t flags, len;
	uint64_t at;
	int c;

	if (!in_data(p, loc, LINE) || loc % LINE)
		return 2;
	flags = load(p, loc) >> 48;
	len = load(p, loc + 24) >> 48;
	at = loc + LINE + ((flags >> 4 & 3) == 2 ? 32 : 0);
	if (flags & F_KEY_EXTENT) {
		if (!in_data(p, at, 8))
			return 2;
		at = load(p, at) >> 20;
	}
	if (len > MAX_KEY || !in_data(p, at, len))
		return 2;
	c = memcmp(key, p->base + at, key_len < len ? key_len : len);
	if (!c)
		c = key_len < len ? -1 : key_len > len;
	return c < 0 ? -1 : c > 0;
}

/* One walk down: 1 with the locator and its node's version, 0, or -EAGAIN. */
static int find_key(const struct place *p, const void *key, uint32_t key_len,
		    uint64_t *loc, uint64_t *node, uint64_t *version)
{
	uint64_t root = load(p, LIVE_KEY_ROOT), at, v;
	int level, lo, hi, mid, c, count, size;

	level = (int)(root >> 34 & 63) - 1;
	if (level < 0)
		return 0;
	at = (root & 0x3ffffffffULL) * NODE;
	if (!in_data(p, at, NODE))
		return -EAGAIN;
	v = load(p, at);
	if (v & 1 || load(p, LIVE_KEY_ROOT) != root)
		return -EAGAIN;
	for (;; level--) {
		uint64_t head = load(p, at + 8), child, v2;

		count = head & 0xffff;
		size = level ? 24 : 16;
		if (head >> 48 != 0x6e70 || (int)(head >> 16 & 0xff) != level || count > (level ? 40 : 60))
			return -EAGAIN;
		/* The last entry that is not above the key. */
		lo = level ? 0 : -1;
		hi = count;
		while (hi - lo > 1) {
			mid = (lo + hi) / 2;
			c = key_cmp(p, key, key_len, load(p, at + LINE + mid * size + 8));
			if (c == 2)
				return -EAGAIN;
			if (c < 0)
				hi = mid;
			else
				lo = mid;
		}
		if (!level)
			break;
		child = load(p, at + LINE + lo * size + 16);
		acquire();
		if (load(p, at) != v || !in_data(p, child, NODE) || child % NODE)
			return -EAGAIN;
		v2 = load(p, child);
		acquire();
		if (v2 & 1 || load(p, at) != v)
			return -EAGAIN;
		at = child;
		v = v2;
	}
	c = 1;
	if (lo >= 0) {
		*loc = load(p, at + LINE + lo * size + 8);
		c = key_cmp(p, key, key_len, *loc);
	}
	acquire();
	if (load(p, at) != v || c == 2)
		return -EAGAIN;
	*node = at;
	*version = v;
	return !c;
}

int map_get(const uint8_t *base, size_t len, const void *key, uint32_t key_len, struct hit *hit)
{
	struct place p = { base, len };
	uint64_t node, version;
	int tries, found, i;

	for (tries = 0; tries < TRIES; tries++) {
		/* The writer may be waiting for this very CPU. */
		if (tries % 256 == 255)
			sched_yield();
		found = find_key(&p, key, key_len, &hit->loc, &node, &version);
		if (found < 0)
			continue;
		if (!found)
			return 0;
		hit->word = load(&p, hit->loc);
		hit->seq = load(&p, hit->loc + 8);
		hit->len = load(&p, hit->loc + 24);
		hit->nr_extents = load(&p, hit->loc + 40);
		hit->at = hit->loc + LINE + ((hit->word >> 52 & 3) == 2 ? 32 : 0) +
			(hit->word >> 48 & F_KEY_EXTENT ? 8 : (key_len + 7) / 8 * 8);
		for (i = 0; i < (int)hit->nr_extents && i < MAP_EXTENTS; i++)
			hit->extents[i] = load(&p, i ? hit->at + (i - 1) * 8 : hit->loc + 32);
		acquire();
		/* The index changes before the record's place is given back. */
		if (load(&p, node) != version || load(&p, hit->loc) != hit->word)
			continue;
		switch (hit->word >> 32 & 0xff) {
		case TYPE_PUT:
			return 1;
		case TYPE_KILLED:
			return 0;
		default:
			return -EUCLEAN;
		}
	}
	return -EBUSY;
}

int map_bytes(const uint8_t *base, size_t len, const struct hit *hit, void *buf)
{
	struct place p = { base, len };
	uint32_t have = 0, i;

	if (hit->nr_extents > MAP_EXTENTS)
		return -E2BIG;
	for (i = 0; i < hit->nr_extents; i++) {
		uint64_t off = hit->extents[i] >> 20, n = (hit->extents[i] & 0xfffff) + 1;

		if (!in_data(&p, off, n) || n > hit->len - have)
			return -EUCLEAN;
		memcpy((uint8_t *)buf + have, base + off, n);
		have += n;
	}
	acquire();
	if (load(&p, hit->loc) != hit->word || load(&p, hit->loc + 8) != hit->seq)
		return -ESTALE;
	return have == hit->len ? 0 : -EUCLEAN;
}

uint64_t map_snapshot(const uint8_t *base)
{
	struct place p = { base, 2 * LIVE };

	acquire();
	return load(&p, LIVE_SNAPSHOT);
}
