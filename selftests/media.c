// SPDX-License-Identifier: GPL-2.0
#include "media.h"

#include <errno.h>
#include <fcntl.h>
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
