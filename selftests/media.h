/* SPDX-License-Identifier: GPL-2.0 */
/*
 * The media as Documentation/format.rst describes it, read by code that shares
 * nothing with the module: an independent check of both. For regions that are
 * block devices (/dev/pmemN), and only while they are detached; and the mapping of an
 * attached one.
 */
#ifndef PMSKB_SELFTESTS_MEDIA_H
#define PMSKB_SELFTESTS_MEDIA_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define SB_SIZE 512
#define SB_MAGIC 0
#define SB_CRC 8
#define SB_VERSION 12
#define SB_COMPAT 16
#define SB_RO_COMPAT 24
#define SB_INCOMPAT 32
#define SB_UUID 40
#define SB_LABEL 56
#define SB_REGION_LEN 88
#define SB_FRAME_SIZE 96
#define SB_LINE_SIZE 100
#define SB_MAP_OFF 104
#define SB_MAP_LEN 112
#define SB_HEAD_OFF 120
#define SB_HEAD_LEN 128
#define SB_DATA_OFF 136
#define SB_DATA_LEN 144
#define SB_UPDATE 152
#define SB_TRUNC_SEQ 176

uint32_t crc32c(uint32_t crc, const void *buf, size_t len);

uint32_t get32(const void *p);
uint64_t get64(const void *p);
void put32(void *p, uint32_t v);
void put64(void *p, uint64_t v);

/* Offset and length are multiples of 4096. 0 or -errno. */
int media_read(const char *dev, uint64_t off, void *buf, size_t len);
int media_write(const char *dev, uint64_t off, const void *buf, size_t len);
int64_t media_size(const char *dev);
int media_zero(const char *dev, uint64_t off, size_t len);

/* A superblock's page (4096 bytes) at off. */
bool sb_valid(const uint8_t *page);
void sb_seal(uint8_t *page);
/* Changes bytes of the superblock at off; sealed again if so wanted. */
int sb_patch(const char *dev, uint64_t off, size_t at, const void *bytes, size_t len, bool seal);

/* ---- records ---- */

struct record {
	uint64_t seq, time;
	uint32_t len, nr_extents, tcp_seq;
	uint32_t payload_crc;		/* with REC_PAYLOAD_CRC; media_scan() has checked it */
	uint16_t flags, csum;		/* csum as a number */
	uint16_t remote_port, local_port;
	uint8_t family;			/* 0: none, 4, 6 */
	uint8_t remote[16], local[16];
	bool keyed;
	uint16_t key_len;
	uint8_t key[1024];
	uint8_t *bytes;			/* malloc()ed; len bytes */
};

#define REC_COPIED (1 << 8)
#define REC_PAYLOAD_CRC (1 << 9)
#define REC_UDP (1 << 10)
#define REC_CSUM_KIND(flags) ((flags) & 3)
#define REC_TIME_SOURCE(flags) ((flags) >> 2 & 3)

/*
 * All live records of a region that is mapped or in memory: their number, or
 * -EUCLEAN if something is damaged. Calls each() for each, in order of their
 * keys, then those without; stops when that returns something else than 0.
 */
int media_scan(const uint8_t *base, size_t len, int (*each)(struct record *r, void *arg), void *arg);

/* ---- the mapping of an attached store, while it changes ---- */

#define MAP_EXTENTS 64

/* A record that was its key's at some instant during map_get(). */
struct hit {
	uint64_t loc, word, seq, at;
	uint32_t len, nr_extents;
	uint64_t extents[MAP_EXTENTS];
};

/* Looks a key up without locks: 1, 0 if there is none, -EUCLEAN, -EBUSY after very many tries. */
int map_get(const uint8_t *base, size_t len, const void *key, uint32_t key_len, struct hit *hit);
/*
 * Copies the object's bytes: 0, or -ESTALE if the record died meanwhile, and
 * what was copied may be anything.
 */
int map_bytes(const uint8_t *base, size_t len, const struct hit *hit, void *buf);
/* The word that is odd while an atomic batch comes into view. */
uint64_t map_snapshot(const uint8_t *base);

#endif
