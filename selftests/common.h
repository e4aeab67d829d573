/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What the tests of pmskb share: stores on the devices that the environment
 * names, connections over lo and over veth into a network namespace, receiving
 * of packet descriptors, submitting.
 *
 * Functions return 0 or more, or a negative errno, unless said otherwise.
 */
#ifndef PMSKB_SELFTESTS_COMMON_H
#define PMSKB_SELFTESTS_COMMON_H

#include <netinet/in.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/socket.h>
#include <sys/types.h>

#include <linux/pmskb.h>

#ifndef TCP_ULP
#define TCP_ULP 31
#endif
#ifndef SOL_TCP
#define SOL_TCP 6
#endif

#define ARRAY_LEN(a) (sizeof(a) / sizeof((a)[0]))
#define PTR(p) ((uint64_t)(uintptr_t)(p))
/* An address that no process has mapped, and access_ok() lets pass. */
#define BAD_PTR bad_ptr()
void *bad_ptr(void);
#define TEST_LABEL "selftest"

/*
 * How much longer everything may take: PMSKB_TEST_SLOWNESS, for kernels that check what
 * they do. A limit that only keeps a test from hanging is multiplied by it.
 */
int slowness(void);

/* ---- devices and stores ---- */

enum dev { DEV_PMEM, DEV_DAX };

struct store {
	int ctl;		/* /dev/pmskb */
	int dev;		/* the region's device */
	int fd;			/* /dev/pmskbN */
	unsigned int minor;
	char path[40];
	uint8_t uuid[16];
	const uint8_t *map;
	size_t map_len;
	struct pmskb_store_info info;	/* as of the attach */
};

/* Name of the device, or NULL with *why set: then the test is skipped. */
const char *dev_path(enum dev dev, const char **why);
int ctl_open(void);

int dev_format(int ctl, int devfd, uint32_t flags, uint64_t head_bytes);
int dev_attach(int ctl, int devfd, struct pmskb_attach *a);
int dev_detach(int ctl, unsigned int minor, unsigned int timeout_ms);
/* Detaches stores that earlier tests left behind (label TEST_LABEL only). */
void dev_sweep(int ctl);

/* Formats and attaches, opens and maps. */
int store_make(struct store *s, enum dev dev, uint32_t flags, uint64_t head_bytes);
/* Attaches what is there, opens and maps. */
int store_open(struct store *s, enum dev dev);
/* With flags of struct pmskb_attach. */
int store_open_as(struct store *s, enum dev dev, uint32_t flags);
/* Unmaps and closes; then detaches, and returns what detach said. */
int store_close(struct store *s);
void store_let_go(struct store *s);
int store_info(const struct store *s, struct pmskb_store_info *info);
/* Waits until no frame is held by a token any more; limbo counts as free in info. */
int store_quiet(const struct store *s, int ms, struct pmskb_store_info *info);
/*
 * Waits until all frames and heads are free that were when it was attached, and
 * no socket is. All but a few: freed packets stay on lists of the CPUs until
 * something happens there. It is detach that is exact.
 */
#define STORE_SLACK 128
int store_back(const struct store *s, int ms, struct pmskb_store_info *info);
/*
 * Takes frames away until about `left` are free, so that they are used again soon. How many
 * descriptors it has put into fds; closing them gives the frames back.
 */
int store_scarce(const struct store *s, uint64_t left, int *fds, int nr);
/* Others use every frame that is free, and write to it. Their number. */
int store_flood(const struct store *s);
/* Sets a limit of the store, quota_* in sysfs; returns 0 or -errno. */
int store_limit(const struct store *s, const char *what, unsigned long value);
/* Sockets may have all frames: for tests that want none left. */
int store_unlimited(const struct store *s);
int sock_quota(int fd, uint32_t frames, uint32_t tokens);
/* Waits until nothing is left of sockets but records. */
int store_drained(const struct store *s, struct pmskb_store_info *info);

/* What was placed and what was not, and why, since `was`: a static text. */
const char *counters_since(const struct pmskb_counters *now, const struct pmskb_counters *was);

/* What does not add up in info, or NULL. Without `shared`, no record has bytes of another. */
const char *info_wrong(const struct pmskb_store_info *info, uint64_t key_bytes, bool shared);

/* The directory in sysfs of the driver of a region's device, and the device's name in it. */
int driver_of(enum dev dev, char *driver, char *name, size_t size);
/* Takes the driver off. In a process of its own: should that hang, this is -ETIMEDOUT. */
int dev_unbind(const char *driver, const char *name);
/* Binds the driver again, and waits for the device's node. */
int dev_bind(enum dev dev, const char *driver, const char *name);

/* A number in a file, or -1. */
long read_number(const char *path);
/* Writes text to DIR/FILE. */
int write_file(const char *dir, const char *file, const char *text);
#define PARAMETERS "/sys/module/pmskb/parameters/"
long module_references(void);
/* This process and those that it starts, on one CPU; on any for -1. */
void run_on(int cpu);

/* ---- network ---- */

enum link { LINK_LO, LINK_VETH, LINK_PLAIN };

struct net {
	int family;		/* AF_INET, AF_INET6 */
	enum link link;		/* where the client is */
	int type;		/* SOCK_DGRAM; 0: SOCK_STREAM */
};

/* Makes namespace and interfaces, once; NULL or why not. */
const char *net_up(enum link link);
/* A bound socket; of streams it listens. */
int net_listen(const struct net *net, struct sockaddr_storage *addr, socklen_t *len);
/* A socket in the client's place, not connected. */
int net_client(const struct net *net);
int net_connect(const struct net *net, const struct sockaddr_storage *addr, socklen_t len);
/* Runs a shell command; its exit status. */
int sh(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
bool have_program(const char *name);
unsigned long env_number(const char *name, unsigned long otherwise);

/* ---- sockets ---- */

enum how {
	HOW_LISTENER_OPT,	/* setsockopt pair on the listener, inherited */
	HOW_LISTENER_IOCTL,	/* ioctl on the listener, inherited */
	HOW_ACCEPTED_OPT,	/* setsockopt pair on the accepted socket */
	HOW_ACCEPTED_IOCTL,	/* ioctl on the accepted socket */
	HOW_PLAIN,		/* not attached */
};

struct conn {
	int s;			/* server's end, the attached one */
	int c;			/* client's end */
};

int sock_ulp(int fd);
int sock_attach_opt(int fd, int store_fd);
int sock_attach_ioctl(int fd, int store_fd);
int sock_mode(int fd, uint32_t mode);
int sock_info(int fd, struct pmskb_sock_info *info);
/* PMSKB_AUTO_PERSIST; 0 or an errno. */
int set_auto(int fd, uint32_t on);
/* Bytes that auto-persist has made records of. */
uint64_t logged_bytes(int fd);
/* Waits for the log to have so many bytes, and no more. */
bool comes_to(int fd, uint64_t bytes);
int conn_make(struct conn *c, const struct net *net, int store_fd, enum how how);
void conn_close(struct conn *c);
int timeout_set(int fd, int ms);

/* ---- data ---- */

/* The byte at position pos of stream seed. */
void fill(void *buf, size_t len, uint32_t seed, uint64_t pos);
/* Where buf first differs from the stream, or -1. */
ssize_t differs(const void *buf, size_t len, uint32_t seed, uint64_t pos);
/* Internet checksum (RFC 1071, not complemented, 0xffff as 0) in network order. */
uint16_t rfc1071(const void *buf, size_t len);
uint16_t rfc1071_norm(uint16_t sum_be);
int send_all(int fd, const void *buf, size_t len);
/*
 * One sendmsg() of bytes and, in nr control messages, ranges of records: how many bytes it has
 * sent, or -errno.
 */
ssize_t send_ranges(int fd, const void *head, size_t len, const struct pmskb_send *s, int nr, int flags);
int recv_all(int fd, void *buf, size_t len);
/* Sends len bytes of stream seed in a child process that then exits. */
struct sender {
	pid_t pid;
};
int sender_start(struct sender *s, int fd, uint32_t seed, uint64_t len, size_t max_write, bool shut);
int sender_wait(struct sender *s);

/* ---- descriptors ---- */

/* One recvmsg() with a control buffer for max descriptors: their number, or
 * -errno; *bytes what the call returned. */
int desc_recv_flags(int fd, struct pmskb_desc *d, int max, int flags, ssize_t *bytes, int *msg_flags);
/* Receives until len bytes are described; number of descriptors. */
int desc_recv_bytes(int fd, struct pmskb_desc *d, int max, size_t len);
int desc_release(int fd, uint32_t first, uint32_t count);
/* Releases all of them, neighbours in one range. */
int desc_release_all(int fd, const struct pmskb_desc *d, int n);

/* ---- operations ---- */

/* res.res of one operation; or the call's -errno with 1000 subtracted. */
#define CALL_FAILED(err) (-1000 + (err))
int64_t persist_one(int fd, const struct pmskb_op *op, struct pmskb_result *res);
int submit(int store_fd, const struct pmskb_op *ops, struct pmskb_result *res, uint32_t nr);
int persist(int fd, const struct pmskb_op *ops, struct pmskb_result *res, uint32_t nr);
/* One array by either way: PMSKB_PERSIST on sock, or PMSKB_IOC_SUBMIT on store. */
struct way {
	int store, sock;
	bool ioctl;
};
int way_submit(const struct way *w, struct pmskb_op *ops, struct pmskb_result *res, uint32_t nr, uint32_t flags);
/* As persist_one(). */
int64_t way_one(const struct way *w, struct pmskb_op op, struct pmskb_result *res);
struct pmskb_op op_put(const void *key, uint32_t key_len, const struct pmskb_ext *ext, uint32_t nr);
struct pmskb_op op_delete(const void *key, uint32_t key_len);
/* Only the tokens of the extents count. */
struct pmskb_op op_release(const struct pmskb_ext *ext, uint32_t nr);
struct pmskb_op op_truncate(uint64_t seq);
struct pmskb_ext ext_of(const struct pmskb_desc *d);
/* All of n descriptors as extents. */
void exts_of(struct pmskb_ext *e, const struct pmskb_desc *d, int n);
/* Bytes [from, from + len) of what n descriptors describe: number of extents, or -1. */
int exts_part(struct pmskb_ext *out, const struct pmskb_desc *d, int n, uint64_t from, uint64_t len);

#endif
