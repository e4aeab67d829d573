/* SPDX-License-Identifier: GPL-2.0 WITH Linux-syscall-note */
/*
 * pmskb: received packets as the durable form of application data.
 *
 * The whole interface between user space and the module: socket options and
 * control messages of an attached socket, ioctls of the control device
 * (/dev/pmskb) and of a store (/dev/pmskbN). Documentation/uapi.rst is the
 * reference, with every errno.
 *
 * All structures have the same layout for 32-bit and 64-bit callers. Reserved
 * fields and unknown flags must be zero (EINVAL).
 */
#ifndef _UAPI_LINUX_PMSKB_H
#define _UAPI_LINUX_PMSKB_H

#include <linux/ioctl.h>
#include <linux/types.h>

/** SOL_PMSKB - level of socket options and control messages. */
#define SOL_PMSKB		20557

/** PMSKB_ULP_NAME - name for setsockopt(fd, SOL_TCP, TCP_ULP, ...). */
#define PMSKB_ULP_NAME		"pmskb"

/** PMSKB_FRAME_SIZE - unit of allocation and reuse in a store, bytes. */
#define PMSKB_FRAME_SIZE	4096
/** PMSKB_MAX_KEY - longest key of a record, bytes. */
#define PMSKB_MAX_KEY		1024
/** PMSKB_MAX_OPS - most operations in one &struct pmskb_submit. */
#define PMSKB_MAX_OPS		1024
/** PMSKB_MAX_OBJECT - largest object, bytes. */
#define PMSKB_MAX_OBJECT	(1U << 30)
/** PMSKB_MAX_EXTENTS - most extents in one operation. */
#define PMSKB_MAX_EXTENTS	(1U << 18)
/** PMSKB_LABEL_LEN - bytes of a store's label, NUL padded. */
#define PMSKB_LABEL_LEN		32

/* ---- socket options, level SOL_PMSKB ---- */

/** PMSKB_ATTACH - set: int, a descriptor of an open store. */
#define PMSKB_ATTACH		1
/** PMSKB_RX_MODE - set, get: __u32, &enum pmskb_rx_mode. */
#define PMSKB_RX_MODE		2
/** PMSKB_PERSIST - set: &struct pmskb_submit; op.fd must be -1. */
#define PMSKB_PERSIST		3
/** PMSKB_RELEASE - set: an array of &struct pmskb_token_range. */
#define PMSKB_RELEASE		4
/** PMSKB_INFO - get: &struct pmskb_sock_info. */
#define PMSKB_INFO		5
/**
 * PMSKB_CRC32C - set, get: __u32, 0 or 1. With 1, packets get a CRC32C where they are
 * placed, and every put of the socket's tokens is as with PMSKB_OP_CRC32C. Accepted
 * sockets inherit it.
 */
#define PMSKB_CRC32C		6
/**
 * PMSKB_QUOTA - set, get: &struct pmskb_quota. More than is the store's default, and than
 * the socket has, needs CAP_NET_ADMIN (EPERM). Accepted sockets inherit it.
 */
#define PMSKB_QUOTA		8

/**
 * PMSKB_AUTO_PERSIST - set, get: __u32, 0 or 1. With 1, all that the socket receives
 * is in the log before a call returns it: a record a packet (of UDP a datagram),
 * without a key, with its checksum, time, flow and TCP sequence number. What nobody
 * reads gets its records soon after it came. Accepted sockets inherit it.
 */
#define PMSKB_AUTO_PERSIST	7

/** PMSKB_MAX_RX_COPY - most of PMSKB_RX_COPY, bytes. */
#define PMSKB_MAX_RX_COPY	65536
/**
 * PMSKB_RX_COPY - set, get: __u32, 0 to PMSKB_MAX_RX_COPY. Of what a receive in
 * descriptor mode describes, so many of the first bytes are copied to its iovec, too, as
 * far as there is room: a parser needs no mapping. The iovec's length then bounds nothing
 * else. Accepted sockets inherit it.
 */
#define PMSKB_RX_COPY		9

/**
 * enum pmskb_rx_mode - what receive calls return
 * @PMSKB_RX_BYTES: bytes, as on any socket (the default)
 * @PMSKB_RX_DESC: recvmsg() returns packet descriptors in control messages
 */
enum pmskb_rx_mode {
	PMSKB_RX_BYTES = 0,
	PMSKB_RX_DESC = 1,
};

/** PMSKB_MIN_FRAMES - least frames of a socket's quota. */
#define PMSKB_MIN_FRAMES	32
/** PMSKB_MIN_TOKENS - least tokens of a socket's quota. */
#define PMSKB_MIN_TOKENS	64
/** PMSKB_MAX_TOKENS - most tokens of a socket. */
#define PMSKB_MAX_TOKENS	65536

/**
 * struct pmskb_quota - what a socket may hold of its store
 * @frames: frames with what was received and is neither read nor persisted, and those
 *	that tokens hold; at least PMSKB_MIN_FRAMES. With as many, packets go on unplaced
 * @tokens: tokens; PMSKB_MIN_TOKENS to PMSKB_MAX_TOKENS. With as many, a receive of
 *	descriptors answers EDQUOT
 * @reserved: 0
 *
 * Set to 0 it is what the store says, now and later. What is got is what holds now.
 */
struct pmskb_quota {
	__u32 frames;
	__u32 tokens;
	__aligned_u64 reserved;
};

/* ---- control messages, level SOL_PMSKB ---- */

/** PMSKB_CMSG_DESC - of recvmsg(): one &struct pmskb_desc. */
#define PMSKB_CMSG_DESC		1
/** PMSKB_CMSG_SEND - of sendmsg(), TCP: one &struct pmskb_send. */
#define PMSKB_CMSG_SEND		2

/** PMSKB_MAX_SENDS - most &struct pmskb_send in one sendmsg(). */
#define PMSKB_MAX_SENDS		64

/**
 * enum pmskb_csum_kind - where an Internet checksum comes from
 * @PMSKB_CSUM_NONE: there is none
 * @PMSKB_CSUM_DERIVED: the sender's, from the packet's transport header
 * @PMSKB_CSUM_HARDWARE: from the sum that the device delivered
 * @PMSKB_CSUM_COMPUTED: computed by this host, in the copy or at persist
 */
enum pmskb_csum_kind {
	PMSKB_CSUM_NONE = 0,
	PMSKB_CSUM_DERIVED = 1,
	PMSKB_CSUM_HARDWARE = 2,
	PMSKB_CSUM_COMPUTED = 3,
};

/**
 * enum pmskb_time_source - where a timestamp comes from
 * @PMSKB_TIME_NONE: there is none
 * @PMSKB_TIME_HARDWARE: the device's stamp (its own clock)
 * @PMSKB_TIME_SOFTWARE: the stack's receive stamp (CLOCK_REALTIME)
 * @PMSKB_TIME_PLACEMENT: taken at placement or persist (CLOCK_REALTIME)
 */
enum pmskb_time_source {
	PMSKB_TIME_NONE = 0,
	PMSKB_TIME_HARDWARE = 1,
	PMSKB_TIME_SOFTWARE = 2,
	PMSKB_TIME_PLACEMENT = 3,
};

/** PMSKB_DESC_COPIED - the packet was not placed; it was copied on receive. */
#define PMSKB_DESC_COPIED	(1U << 0)
/** PMSKB_DESC_PARTIAL - the extent is a part of the packet's payload. */
#define PMSKB_DESC_PARTIAL	(1U << 1)

/**
 * struct pmskb_desc - packet descriptor: received bytes, named and not copied
 * @offset: of the extent's first byte in the store, for its mapping
 * @len: of the extent, bytes
 * @token: names the hold on the extent; valid on this socket until persisted
 *	without PMSKB_OP_KEEP, released, or the socket is closed
 * @store: minor number of the store (/dev/pmskbN's)
 * @flags: PMSKB_DESC_*
 * @time: nanoseconds since the epoch of the clock that @time_source names
 * @seq: TCP sequence number of the extent's first byte; of UDP 0
 * @pkt_len: payload bytes of the packet that the extent belongs to; of UDP, with
 *	those of all datagrams that arrived with this one as one packet
 * @pkt_off: where in that payload the extent starts
 * @csum: Internet checksum of the packet's whole payload, as in RFC 1071 (not
 *	complemented, network byte order)
 * @csum_kind: &enum pmskb_csum_kind
 * @time_source: &enum pmskb_time_source
 *
 * The first 24 bytes are those of struct dmabuf_cmsg.
 */
struct pmskb_desc {
	__u64 offset;
	__u32 len;
	__u32 token;
	__u32 store;
	__u32 flags;
	__u64 time;
	__u32 seq;
	__u32 pkt_len;
	__u32 pkt_off;
	__u16 csum;
	__u8 csum_kind;
	__u8 time_source;
};

/**
 * struct pmskb_token_range - consecutive tokens
 * @first: the first token
 * @count: how many; at least 1
 */
struct pmskb_token_range {
	__u32 first;
	__u32 count;
};

/**
 * struct pmskb_send - a range of a record, to be sent after the bytes of the iovec
 * @fd: of the record, open as a file (PMSKB_IOC_OPEN)
 * @reserved: 0
 * @offset: of the first byte in the object
 * @len: bytes; at least 1, and within the object (else EINVAL)
 *
 * Several go out in the order of their control messages, and none of their bytes is
 * copied. sendmsg() returns how many bytes it has sent, those of the iovec and of the
 * ranges together; they may be fewer than all, as of any stream.
 */
struct pmskb_send {
	__s32 fd;
	__u32 reserved;
	__aligned_u64 offset;
	__aligned_u64 len;
};

/* ---- operations ---- */

/**
 * enum pmskb_opcode - what an operation does
 * @PMSKB_OP_PUT: make extents durable and commit their record
 * @PMSKB_OP_DELETE: remove the record with a key
 * @PMSKB_OP_RELEASE: give tokens back without persisting
 * @PMSKB_OP_TRUNCATE: remove all records without a key whose sequence number is
 *	@seq or lower (of those in use); costs a write of the superblocks
 */
enum pmskb_opcode {
	PMSKB_OP_PUT = 1,
	PMSKB_OP_DELETE = 2,
	PMSKB_OP_RELEASE = 3,
	PMSKB_OP_TRUNCATE = 4,
};

/** PMSKB_OP_CREATE - put: only if the key has no record (else EEXIST). */
#define PMSKB_OP_CREATE		(1U << 0)
/** PMSKB_OP_REPLACE - put: only if the key has a record (else ENOENT). */
#define PMSKB_OP_REPLACE	(1U << 1)
/**
 * PMSKB_OP_KEEP - put: the tokens stay valid afterwards; of a buffer, its frames
 * stay mapped, for reading.
 */
#define PMSKB_OP_KEEP		(1U << 2)
/**
 * PMSKB_OP_KEY_EXTENTS - @key points to @key_len elements of &struct pmskb_ext
 * whose bytes are the key: it lies in the packets themselves.
 */
#define PMSKB_OP_KEY_EXTENTS	(1U << 3)
/**
 * PMSKB_OP_IF_SEQ - put, delete: only if the key's record has the sequence
 * number @seq, or with @seq 0 (put) only if it has none (else ESTALE)
 */
#define PMSKB_OP_IF_SEQ		(1U << 4)
/** PMSKB_OP_CRC32C - put: the record has a CRC32C of the object, too */
#define PMSKB_OP_CRC32C		(1U << 5)

/**
 * struct pmskb_ext - a part of what a token holds, or of a buffer
 * @token: the token; 0 for a buffer
 * @offset: of the first byte in the token's extent, or in the buffer
 * @len: bytes; at least 1
 * @reserved: 0
 */
struct pmskb_ext {
	__u32 token;
	__u32 offset;
	__u32 len;
	__u32 reserved;
};

/**
 * struct pmskb_op - one operation
 * @opcode: &enum pmskb_opcode
 * @flags: PMSKB_OP_*
 * @fd: socket whose tokens the extents name, or (in PMSKB_IOC_SUBMIT, to put) a
 *	buffer; -1 in PMSKB_PERSIST
 * @key: user pointer to the key, or to its extents
 * @key_len: bytes of the key, or with PMSKB_OP_KEY_EXTENTS number of elements;
 *	0: no key, the record is in the log only
 * @nr_extents: elements of @extents; 0 for an empty object
 * @extents: user pointer to &struct pmskb_ext, in the object's order; parts of
 *	one object must not overlap (EINVAL). For PMSKB_OP_RELEASE only the
 *	tokens count, @offset and @len are 0
 * @seq: for PMSKB_OP_IF_SEQ and PMSKB_OP_TRUNCATE, else 0
 * @reserved: 0
 */
struct pmskb_op {
	__u16 opcode;
	__u16 flags;
	__s32 fd;
	__aligned_u64 key;
	__u32 key_len;
	__u32 nr_extents;
	__aligned_u64 extents;
	__aligned_u64 seq;
	__aligned_u64 reserved[3];
};

/** PMSKB_RES_COPIED - some bytes had to be copied into frames at receive. */
#define PMSKB_RES_COPIED	(1U << 0)
/** PMSKB_RES_REPLACED - the key had a record, which this one replaces. */
#define PMSKB_RES_REPLACED	(1U << 1)

/**
 * struct pmskb_result - what became of one operation
 * @res: the record's sequence number (1 or more; for a release the number of
 *	tokens; for a truncation the sequence number up to which the log is
 *	empty), or a negative errno
 * @flags: PMSKB_RES_*
 * @csum: Internet checksum of the object, network byte order
 * @csum_kind: &enum pmskb_csum_kind
 * @reserved: 0
 */
struct pmskb_result {
	__s64 res;
	__u32 flags;
	__u16 csum;
	__u8 csum_kind;
	__u8 reserved;
};

/**
 * PMSKB_SUBMIT_ATOMIC - all operations or none, after a crash and for readers. If
 * one fails, the others' result is ECANCELED. No PMSKB_OP_TRUNCATE (EINVAL).
 */
#define PMSKB_SUBMIT_ATOMIC	(1U << 0)
/**
 * PMSKB_SUBMIT_FAIL - if operations fail, so does the call, with the errno of the
 * first of them (not ECANCELED; EAGAIN as EBUSY). Results are written as without
 * it, and what succeeded is done: what io_uring links to the call is cancelled.
 */
#define PMSKB_SUBMIT_FAIL	(1U << 1)

/**
 * struct pmskb_submit - an array of operations
 * @ops: user pointer to @nr &struct pmskb_op
 * @results: user pointer to @nr &struct pmskb_result, written before return
 * @nr: operations; 1 to PMSKB_MAX_OPS (else EINVAL, E2BIG)
 * @flags: PMSKB_SUBMIT_*
 * @reserved: 0
 *
 * The call fails as a whole only if the arrays themselves are unusable, and
 * then nothing was done (but see PMSKB_SUBMIT_FAIL); else it returns 0 and each
 * operation's fate is in its result. When it returns, all that succeeded is
 * durable.
 */
struct pmskb_submit {
	__aligned_u64 ops;
	__aligned_u64 results;
	__u32 nr;
	__u32 flags;
	__aligned_u64 reserved;
};

/**
 * struct pmskb_uring - what an io_uring command has at its end (&io_uring_sqe.cmd)
 * @arg: user pointer to &struct pmskb_submit
 * @reserved: 0
 *
 * For IORING_OP_URING_CMD on /dev/pmskbN with PMSKB_IOC_SUBMIT as its cmd_op. The
 * completion's res is what the ioctl would return.
 */
struct pmskb_uring {
	__aligned_u64 arg;
	__aligned_u64 reserved;
};

/* ---- why a packet was not placed ---- */

/**
 * enum pmskb_unplaced - index into the unplaced counters
 * @PMSKB_UNPLACED_NO_FRAME: no free data frame
 * @PMSKB_UNPLACED_NO_MEM: no kernel memory for the skb or its notes
 * @PMSKB_UNPLACED_SHAPE: a shape that is not handled (unreadable or device
 *	frags, GSO frag lists, headers that do not fit)
 * @PMSKB_UNPLACED_SIZE: more payload than one skb's frags can hold
 * @PMSKB_UNPLACED_COPY: the copy failed
 * @PMSKB_UNPLACED_QUOTA: the socket has as many frames as it may
 * @PMSKB_UNPLACED_STORE_QUOTA: all sockets together have as many as they may
 * @PMSKB_UNPLACED_NR: how many there are
 */
enum pmskb_unplaced {
	PMSKB_UNPLACED_NO_FRAME = 0,
	PMSKB_UNPLACED_NO_MEM = 1,
	PMSKB_UNPLACED_SHAPE = 2,
	PMSKB_UNPLACED_SIZE = 3,
	PMSKB_UNPLACED_COPY = 4,
	PMSKB_UNPLACED_QUOTA = 5,
	PMSKB_UNPLACED_STORE_QUOTA = 6,
	PMSKB_UNPLACED_NR = 7,
};

/**
 * struct pmskb_counters - of a socket, or of a store over all its sockets
 * @placed: packets placed
 * @placed_bytes: their payload bytes
 * @unplaced: packets that went on unplaced, by &enum pmskb_unplaced
 * @copied_bytes: bytes of unplaced packets copied into frames on receive
 * @derived: packets whose checksum was derived
 * @hardware: packets whose checksum came from the device's sum
 * @computed: packets whose checksum was computed
 * @computed_bytes: payload bytes read by the CPU for a checksum; those read for a
 *	CRC32C as well
 * @mismatch: samples where a derived checksum was not the computed one
 * @refused: receives of descriptors that the socket's quota ended (EDQUOT, if there was
 *	nothing before)
 * @logged_bytes: payload bytes of which PMSKB_AUTO_PERSIST made records
 * @heads_in_dram: packets placed whose heads are in DRAM, as the head area was full
 */
struct pmskb_counters {
	__u64 placed;
	__u64 placed_bytes;
	__u64 unplaced[PMSKB_UNPLACED_NR];
	__u64 copied_bytes;
	__u64 derived;
	__u64 hardware;
	__u64 computed;
	__u64 computed_bytes;
	__u64 mismatch;
	__u64 refused;
	__u64 logged_bytes;
	__u64 heads_in_dram;
};

/**
 * struct pmskb_sock_info - PMSKB_INFO of a socket
 * @store: minor number of the store, or ~0 when not attached
 * @rx_mode: &enum pmskb_rx_mode
 * @tokens: tokens held now
 * @frames: frames that count for its quota now
 * @quota_frames: most of them
 * @quota_tokens: most tokens
 * @counters: since the socket was attached
 */
struct pmskb_sock_info {
	__u32 store;
	__u32 rx_mode;
	__u32 tokens;
	__u32 frames;
	__u32 quota_frames;
	__u32 quota_tokens;
	struct pmskb_counters counters;
};

/* ---- ioctls of /dev/pmskb (CAP_SYS_ADMIN) ---- */

/** PMSKB_FORMAT_FORCE - format over whatever the region holds. */
#define PMSKB_FORMAT_FORCE	(1U << 0)
/** PMSKB_FORMAT_HEADS_DRAM - keep packet heads in DRAM, no head area. */
#define PMSKB_FORMAT_HEADS_DRAM	(1U << 1)

/**
 * struct pmskb_format - PMSKB_IOC_FORMAT
 * @fd: an open descriptor of the region's device (/dev/pmemN, /dev/daxN.M)
 * @flags: PMSKB_FORMAT_*
 * @uuid: in: the store's, or all zero for a random one; out: what it is
 * @label: NUL padded
 * @head_bytes: size of the head area, or 0 for the default (1/16 of the
 *	region, 1 MiB to 256 MiB)
 * @reserved: 0
 */
struct pmskb_format {
	__s32 fd;
	__u32 flags;
	__u8 uuid[16];
	__u8 label[PMSKB_LABEL_LEN];
	__aligned_u64 head_bytes;
	__aligned_u64 reserved[4];
};

/** PMSKB_ATTACH_READ_ONLY - nothing can be changed, no socket attached (EROFS). */
#define PMSKB_ATTACH_READ_ONLY	(1U << 0)
/** PMSKB_ATTACH_CRC32C - every put is as with PMSKB_OP_CRC32C, every socket with PMSKB_CRC32C. */
#define PMSKB_ATTACH_CRC32C	(1U << 1)

/**
 * struct pmskb_attach - PMSKB_IOC_ATTACH
 * @fd: an open descriptor of the region's device
 * @flags: PMSKB_ATTACH_*
 * @minor: out: N of /dev/pmskbN
 * @reserved: 0
 * @uuid: out: the store's
 */
struct pmskb_attach {
	__s32 fd;
	__u32 flags;
	__u32 minor;
	__u32 reserved;
	__u8 uuid[16];
};

/**
 * struct pmskb_detach - PMSKB_IOC_DETACH
 * @minor: N of /dev/pmskbN
 * @timeout_ms: how long to wait for frames that the stack still holds; 0: the
 *	default, 2000. EBUSY when it has passed, and the store stays attached
 * @reserved: 0
 */
struct pmskb_detach {
	__u32 minor;
	__u32 timeout_ms;
	__aligned_u64 reserved;
};

/* ---- ioctls of /dev/pmskbN ---- */

/** PMSKB_STORE_READ_ONLY - the store was attached to be read, or has failed. */
#define PMSKB_STORE_READ_ONLY	(1U << 0)
/** PMSKB_STORE_CRC32C - the store was attached with PMSKB_ATTACH_CRC32C. */
#define PMSKB_STORE_CRC32C	(1U << 1)

/**
 * struct pmskb_store_info - PMSKB_IOC_INFO
 * @uuid: of the store
 * @label: NUL padded
 * @minor: N of /dev/pmskbN
 * @flags: PMSKB_STORE_*
 * @region_len: bytes of the region
 * @map_len: bytes that a mapping or a read can reach from offset 0
 * @head_off: start of the head area (reads as zeros, cannot be mapped)
 * @head_len: bytes of the head area
 * @data_off: start of the data area
 * @frames_total: data frames; the sum of the following ones but @frames_reserve
 * @frames_free: of them, free now
 * @frames_payload: of them, with payload or keys of records
 * @frames_record: of them, with records
 * @frames_list: of them, with extent lists
 * @frames_index: of them, with the index
 * @frames_held: of them, held by tokens, open records or buffers, or being
 *	filled
 * @frames_limbo: of them, waiting until the stack lets go
 * @frames_bad: of them, never used because of media errors
 * @frames_reserve: of the free ones, those that only a delete, a compaction or an
 *	attach gets
 * @heads_total: frames of the head area
 * @heads_free: of them, free now
 * @records: live records
 * @keys: live records with a key
 * @live_bytes: payload bytes of live records
 * @record_bytes: of the record frames, bytes of live records
 * @fragmented_bytes: of the payload frames, bytes that no record uses; compaction
 *	brings them back. Bytes that several records use count for each
 * @reclaimable_bytes: dead, and free after the next submit: of replaced records'
 *	frames and of empty record frames
 * @trunc_seq: records without a key up to this one are gone
 * @moved_records: by compaction, since attach
 * @moved_bytes: by compaction, since attach
 * @durable_seq: highest sequence number known durable
 * @sockets: attached now
 * @tokens: held now, all sockets
 * @lines_flushed: since attach, by the module
 * @fences: since attach, by the module
 * @submits: submit calls since attach
 * @counters: since attach
 * @frames_sockets: frames that count for sockets' quotas now
 * @quota_store_frames: most of them, of all sockets together
 * @quota_socket_frames: of one socket, unless it has a quota of its own
 * @quota_socket_tokens: tokens of one socket, likewise
 */
struct pmskb_store_info {
	__u8 uuid[16];
	__u8 label[PMSKB_LABEL_LEN];
	__u32 minor;
	__u32 flags;
	__u64 region_len;
	__u64 map_len;
	__u64 head_off;
	__u64 head_len;
	__u64 data_off;
	__u64 frames_total;
	__u64 frames_free;
	__u64 frames_payload;
	__u64 frames_record;
	__u64 frames_list;
	__u64 frames_index;
	__u64 frames_held;
	__u64 frames_limbo;
	__u64 frames_bad;
	__u64 frames_reserve;
	__u64 heads_total;
	__u64 heads_free;
	__u64 records;
	__u64 keys;
	__u64 live_bytes;
	__u64 record_bytes;
	__u64 fragmented_bytes;
	__u64 reclaimable_bytes;
	__u64 trunc_seq;
	__u64 moved_records;
	__u64 moved_bytes;
	__u64 durable_seq;
	__u64 sockets;
	__u64 tokens;
	__u64 lines_flushed;
	__u64 fences;
	__u64 submits;
	struct pmskb_counters counters;
	__u64 frames_sockets;
	__u64 quota_store_frames;
	__u64 quota_socket_frames;
	__u64 quota_socket_tokens;
};

/**
 * struct pmskb_compact - PMSKB_IOC_COMPACT
 * @from: in: 0 to begin; out: to go on with
 * @steps: in: how many steps at most, 0: 16. Each moves at most 63 records and
 *	256 KiB, and keeps other changes waiting for so long
 * @done: out: 1 at the end of the log
 * @records: out: records moved
 * @bytes: out: payload bytes moved
 * @reserved: 0
 */
struct pmskb_compact {
	__aligned_u64 from;
	__u32 steps;
	__u32 done;
	__aligned_u64 records;
	__aligned_u64 bytes;
	__aligned_u64 reserved[2];
};

/**
 * struct pmskb_scrub_bad - a record that is not what it was
 * @seq: its sequence number
 * @error: EBADMSG its bytes have another checksum, EIO the media cannot be read,
 *	EUCLEAN its extents are damaged
 * @reserved: 0
 */
struct pmskb_scrub_bad {
	__u64 seq;
	__s32 error;
	__u32 reserved;
};

/**
 * struct pmskb_scrub - PMSKB_IOC_SCRUB
 * @from: in: sequence number to begin with; out: to go on with
 * @max_bytes: in: payload bytes to read, about; 0: 4 MiB
 * @bad: in: user pointer to &struct pmskb_scrub_bad
 * @nr_bad: in: how many there is room for, the call ends when they are used up;
 *	out: how many there are
 * @done: out: 1 at the end of the log
 * @records: out: records checked
 * @bytes: out: payload bytes read
 * @reserved: 0
 */
struct pmskb_scrub {
	__aligned_u64 from;
	__aligned_u64 max_bytes;
	__aligned_u64 bad;
	__u32 nr_bad;
	__u32 done;
	__aligned_u64 records;
	__aligned_u64 bytes;
	__aligned_u64 reserved[2];
};

/** PMSKB_OPEN_SEQ - look up by sequence number, not by key. */
#define PMSKB_OPEN_SEQ		(1U << 0)

/**
 * struct pmskb_open - PMSKB_IOC_OPEN
 * @key: user pointer to the key
 * @key_len: bytes of the key; 0 with PMSKB_OPEN_SEQ
 * @flags: PMSKB_OPEN_*
 * @seq: in: with PMSKB_OPEN_SEQ, the record's sequence number; out: the record's
 * @fd: out: a descriptor of the record's object, for reading, close-on-exec
 * @csum: out: Internet checksum of the object, network byte order
 * @csum_kind: out: &enum pmskb_csum_kind
 * @time_source: out: &enum pmskb_time_source
 * @len: out: bytes of the object
 * @time: out: nanoseconds since the epoch of the clock that @time_source names
 * @reserved: 0
 *
 * The bytes stay what they are until the last close, whether or not the record
 * is replaced or deleted meanwhile.
 */
struct pmskb_open {
	__aligned_u64 key;
	__u32 key_len;
	__u32 flags;
	__aligned_u64 seq;
	__s32 fd;
	__u16 csum;
	__u8 csum_kind;
	__u8 time_source;
	__aligned_u64 len;
	__aligned_u64 time;
	__aligned_u64 reserved[2];
};

/** PMSKB_MAX_BUFFER - largest buffer, bytes. */
#define PMSKB_MAX_BUFFER	(1U << 26)

/**
 * struct pmskb_alloc - PMSKB_IOC_ALLOC
 * @len: in: bytes, 1 to PMSKB_MAX_BUFFER; out: rounded up to frames
 * @fd: out: a descriptor of the buffer, close-on-exec
 * @flags: 0
 * @reserved: 0
 *
 * A buffer is frames for the application's own data, zeroed: map it
 * (MAP_SHARED), fill it, and name it as @fd of a put, whose extents are then
 * ranges of it. What is put cannot be written any more; frames that were not put
 * come back with the last close.
 */
struct pmskb_alloc {
	__aligned_u64 len;
	__s32 fd;
	__u32 flags;
	__aligned_u64 reserved[2];
};

#define PMSKB_IOC_MAGIC		0xBC
/** PMSKB_IOC_FORMAT - on /dev/pmskb */
#define PMSKB_IOC_FORMAT	_IOWR(PMSKB_IOC_MAGIC, 0x01, struct pmskb_format)
/** PMSKB_IOC_ATTACH - on /dev/pmskb */
#define PMSKB_IOC_ATTACH	_IOWR(PMSKB_IOC_MAGIC, 0x02, struct pmskb_attach)
/** PMSKB_IOC_DETACH - on /dev/pmskb */
#define PMSKB_IOC_DETACH	_IOW(PMSKB_IOC_MAGIC, 0x03, struct pmskb_detach)
/** PMSKB_IOC_INFO - on /dev/pmskbN */
#define PMSKB_IOC_INFO		_IOR(PMSKB_IOC_MAGIC, 0x10, struct pmskb_store_info)
/** PMSKB_IOC_ATTACH_SOCKET - on /dev/pmskbN; points to a socket's fd, TCP or UDP */
#define PMSKB_IOC_ATTACH_SOCKET	_IOW(PMSKB_IOC_MAGIC, 0x11, __s32)
/** PMSKB_IOC_SUBMIT - on /dev/pmskbN; op.fd names socket or buffer */
#define PMSKB_IOC_SUBMIT	_IOW(PMSKB_IOC_MAGIC, 0x12, struct pmskb_submit)
/** PMSKB_IOC_OPEN - on /dev/pmskbN, open for reading */
#define PMSKB_IOC_OPEN		_IOWR(PMSKB_IOC_MAGIC, 0x13, struct pmskb_open)
/** PMSKB_IOC_ALLOC - on /dev/pmskbN, open for writing */
#define PMSKB_IOC_ALLOC		_IOWR(PMSKB_IOC_MAGIC, 0x14, struct pmskb_alloc)
/** PMSKB_IOC_COMPACT - on /dev/pmskbN, opened for writing */
#define PMSKB_IOC_COMPACT	_IOWR(PMSKB_IOC_MAGIC, 0x15, struct pmskb_compact)
/** PMSKB_IOC_SCRUB - on /dev/pmskbN */
#define PMSKB_IOC_SCRUB		_IOWR(PMSKB_IOC_MAGIC, 0x16, struct pmskb_scrub)

#endif /* _UAPI_LINUX_PMSKB_H */
