/* SPDX-License-Identifier: GPL-2.0 */
/* C that Rust cannot say: static inlines and macros of kernel headers. */
#ifndef _PMSKB_HELPERS_H
#define _PMSKB_HELPERS_H

#include <linux/blkdev.h>
#include <linux/miscdevice.h>
#include <linux/pmskb.h>
#include <linux/skbuff.h>

#define PMSKB_BLK_OPEN_RW 3U

void pmskb_wmb(void);
void pmskb_prefetch(void *addr, size_t len);

/* Files and regions. */
struct page;
struct file;
struct pipe_inode_info;
struct block_device;
bool pmskb_bdev_is_bad(struct block_device *bdev, u64 sector, u64 nr);
bool pmskb_bdev_is_dax(struct block_device *bdev);
bool pmskb_bdev_is_async(struct block_device *bdev);
u64 pmskb_bdev_bytes(struct block_device *bdev);
u64 pmskb_bdev_start(struct block_device *bdev);
bool pmskb_file_is_blk(const struct file *file);
bool pmskb_file_is_chr(const struct file *file);
bool pmskb_file_mode_has(const struct file *file, bool write);
void pmskb_file_by_position(struct file *file, loff_t size);
bool pmskb_module_get(struct module *module);
void pmskb_spin_lock_bh(spinlock_t *lock);
int pmskb_spin_trylock_bh(spinlock_t *lock);
void pmskb_spin_unlock_bh(spinlock_t *lock);
struct page *pmskb_pfn_to_page(unsigned long pfn);
unsigned long pmskb_page_to_pfn(const struct page *page);
bool pmskb_pfn_has_page(unsigned long pfn);
struct page *pmskb_virt_to_page(const void *addr);
void *pmskb_page_address(const struct page *page);
bool pmskb_page_is_idle_dax(struct page *page);
bool pmskb_page_is_poisoned(struct page *page);
int pmskb_page_ref_count(const struct page *page);
void pmskb_page_take(struct page *page);
void pmskb_page_give_back(struct page *page);
bool pmskb_page_ref_freeze(struct page *page, int count);
void pmskb_page_ref_unfreeze(struct page *page, int count);
void pmskb_page_get(struct page *page);
void pmskb_page_put(struct page *page);
void pmskb_local_bh_disable(void);
void pmskb_local_bh_enable(void);
int pmskb_cpu(void);
unsigned int pmskb_nr_cpus(void);
struct vm_area_struct;
struct vm_fault;
bool pmskb_vma_make_readonly(struct vm_area_struct *vma);
int pmskb_vma_make_shared(struct vm_area_struct *vma, unsigned long pages);
vm_fault_t pmskb_insert_shared(struct vm_fault *vmf, unsigned long pfn, bool write);
ssize_t pmskb_splice_page(struct pipe_inode_info *pipe, struct page *page,
			  unsigned int offset, unsigned int len);
size_t pmskb_pipe_room(struct pipe_inode_info *pipe);

/* The device of a store; device.rs owns it. */
struct pmskb_node {
	struct miscdevice misc;
	char name[16];
	u8 uuid[16];
	char label[33];
};

const struct attribute_group **pmskb_node_groups(void);

/* What a store's attributes in sysfs limit; device.rs has these two. */
enum pmskb_limit {
	PMSKB_LIMIT_STORE_FRAMES,
	PMSKB_LIMIT_SOCKET_FRAMES,
	PMSKB_LIMIT_SOCKET_TOKENS,
};

u32 pmskb_limit_get(struct pmskb_node *node, u32 which);
int pmskb_limit_set(struct pmskb_node *node, u32 which, u32 value);
u64 pmskb_now(void);
void pmskb_resched(void);
bool pmskb_signal_pending(void);
bool pmskb_killed(void);
int pmskb_flush_deferred_skbs(void);

enum pmskb_cmd {
	PMSKB_CMD_FORMAT = PMSKB_IOC_FORMAT,
	PMSKB_CMD_ATTACH = PMSKB_IOC_ATTACH,
	PMSKB_CMD_DETACH = PMSKB_IOC_DETACH,
	PMSKB_CMD_INFO = PMSKB_IOC_INFO,
	PMSKB_CMD_ATTACH_SOCKET = PMSKB_IOC_ATTACH_SOCKET,
	PMSKB_CMD_SUBMIT = PMSKB_IOC_SUBMIT,
	PMSKB_CMD_OPEN = PMSKB_IOC_OPEN,
	PMSKB_CMD_ALLOC = PMSKB_IOC_ALLOC,
	PMSKB_CMD_COMPACT = PMSKB_IOC_COMPACT,
	PMSKB_CMD_SCRUB = PMSKB_IOC_SCRUB,
};

const char *pmskb_attach_param(void);

/* Of builds for tests, see host.rs. */
bool pmskb_is_broken(const u8 *name, size_t len);

/* See inject.rs. */
enum pmskb_inject_kind {
	PMSKB_INJECT_MEMORY = 1,	/* allocations */
	PMSKB_INJECT_COPIES = 2,	/* copies from and to user memory */
	PMSKB_INJECT_MEDIA = 4,		/* reads of the media */
	PMSKB_INJECT_FRAMES = 8,	/* frames and heads */
};

#ifdef PMSKB_INJECT
bool pmskb_inject_fails(u32 kind);
#else
static inline bool pmskb_inject_fails(u32 kind)
{
	return false;
}
#endif

/* Sockets and packets. */
struct sock;
struct socket;
struct msghdr;
struct net;
struct tcp_ulp_ops;
struct nf_hook_state;
struct proto;
struct module;

/* What placement asks of a packet, read at once. */
struct pmskb_skb_facts {
	u64 hwtstamp;		/* device's stamp, 0: none */
	u64 tstamp;		/* CLOCK_REALTIME, 0: none */
	u32 csum;		/* for CHECKSUM_COMPLETE */
	int ifindex;
	int iif;		/* for the socket lookup */
	int sdif;
	u8 ip_summed;
	u8 csum_complete_sw;	/* csum was computed by this host */
	u8 merged;		/* GSO or GRO */
	u8 fragments;		/* IP fragments, in a list */
	u8 fraglist_gso;
	u8 readable;
	u8 shared;
	u8 encapsulated;
	u8 mac_set;
};

/* One part of a packet in a receive queue. */
struct pmskb_skb_part {
	struct page *page;	/* NULL: not in a page frag */
	u32 off;		/* in the page */
	u32 len;
};

/* Addresses as on the wire, ports as numbers. */
struct pmskb_flow {
	u8 version;
	u8 peer[16];
	u8 local[16];
	u16 peer_port;
	u16 local_port;
};

/* The constants of net/tcp_states.h, which some bindings have and some lack. */
#define PMSKB_TCP_CLOSE 7
#define PMSKB_TCP_LISTEN 10

/* Of other headers, for Rust. */
#define PMSKB_SOL_UDP 17
#define PMSKB_UDP_ENCAP 100
#define PMSKB_SOL_TCP 6
#define PMSKB_TCP_ZEROCOPY_RECEIVE 35
#define PMSKB_SOL_IPV6 41
#define PMSKB_IPV6_ADDRFORM 1

#define PMSKB_LAYOUT_NR 22
/*
 * After source NAT at LOCAL_IN (100), which changes what a socket is looked up by; before
 * what modules of rules, connection tracking helpers and its confirm do later.
 */
#define PMSKB_HOOK_PRIORITY 150

void pmskb_spin_lock_init(spinlock_t *lock);
/* 2 to the power of the order. */
#define PMSKB_TEST_ORDER 5
#define PMSKB_TEST_PAGES 32
struct page *pmskb_test_pages(void);
void pmskb_test_pages_free(struct page *first);
struct sk_buff *pmskb_test_skb(const void *bytes, size_t len, size_t linear);
void pmskb_test_skb_checksum(struct sk_buff *skb, u8 ip_summed, u32 csum);
void pmskb_skb_facts(struct sk_buff *skb, bool v6, struct pmskb_skb_facts *f);
bool pmskb_pskb_may_pull(struct sk_buff *skb, unsigned int len);
void *pmskb_skb_header_pointer(const struct sk_buff *skb, int off, int len, void *buf);
void pmskb_skb_add_rx_frag(struct sk_buff *skb, int i, struct page *page, int off,
			   int size, unsigned int truesize);
unsigned int pmskb_shinfo_size(void);
unsigned int pmskb_max_skb_frags(void);
void pmskb_skb_take_stamps(struct sk_buff *to, struct sk_buff *from);
void pmskb_skb_set_verified(struct sk_buff *skb);
int pmskb_skb_shared_state(const struct sk_buff *skb);
void pmskb_skb_part(const struct sk_buff *skb, u32 off, struct pmskb_skb_part *part);
void *pmskb_kmalloc_atomic(size_t size);
bool pmskb_sock_flag_done(const struct sock *sk);
bool pmskb_sock_urginline(const struct sock *sk);
long pmskb_sock_rcvtimeo(const struct sock *sk, bool noblock);
int pmskb_sock_error(struct sock *sk);
int pmskb_sock_intr_errno(long timeo);
struct sk_buff *pmskb_rx_tail(const struct sock *sk);
void pmskb_tcp_urg_passed(struct sock *sk);
bool pmskb_tcp_at_urg(const struct sock *sk);
u32 pmskb_tcp_urg_after(const struct sock *sk, u32 seq);
bool pmskb_tcp_in_repair(const struct sock *sk);
u32 pmskb_skb_seq(const struct sk_buff *skb);
bool pmskb_sk_is_mptcp(const struct sock *sk);
bool pmskb_sk_has_psock(const struct sock *sk);
struct net *pmskb_sock_net(const struct sock *sk);
void *pmskb_ulp_data(const struct sock *sk);
void pmskb_ulp_install(struct sock *sk, struct proto *prot, void *data,
		       const struct tcp_ulp_ops *ops);
void pmskb_sk_abort(struct sock *sk, int err);
void pmskb_bh_lock_sock(struct sock *sk);
void pmskb_bh_unlock_sock(struct sock *sk);
bool pmskb_skb_to_transport(struct sk_buff *skb, unsigned int off, unsigned int headers);
void pmskb_skb_to_network(struct sk_buff *skb, unsigned int off);
void pmskb_ulp_data_set(struct sock *sk, void *data);
const struct proto *pmskb_sk_prot(const struct sock *sk);
void pmskb_sock_get_zc_back(struct sock *sk);
int pmskb_copy_from_sockptr(void *to, sockptr_t from, size_t off, size_t len);
bool pmskb_compat_syscall(void);
struct cmsghdr *pmskb_cmsg_next(struct msghdr *msg, struct cmsghdr *at);
int pmskb_cmsg_check(struct sock *sk, struct msghdr *msg);
void pmskb_cmsg_no_stamps(struct msghdr *msg);
void pmskb_sk_flush_backlog(struct sock *sk);
bool pmskb_sk_sends_no_more(const struct sock *sk);
long pmskb_sock_sndtimeo(const struct sock *sk, bool noblock);
void pmskb_tcp_push(struct sock *sk);
bool pmskb_cmsg_room(const struct msghdr *msg, int len);
int pmskb_skb_copy_to(const struct sk_buff *skb, int off, struct msghdr *msg, int len);
size_t pmskb_msg_room(struct msghdr *msg);
void pmskb_msg_revert(struct msghdr *msg, size_t n);
unsigned int pmskb_skb_segment(const struct sk_buff *skb);
void pmskb_sk_tell_ready(struct sock *sk);
struct socket *pmskb_socket_get(int fd, int *err);
void pmskb_socket_put(struct socket *sock);
void pmskb_lock_sock(struct sock *sk);
void pmskb_module_put(struct module *module);
void pmskb_module_get_live(struct module *module);
int pmskb_set_ulp(struct socket *sock);
int pmskb_nla_put(struct sk_buff *skb, int type, int len, const void *data);
size_t pmskb_nla_size(int len);
int pmskb_net_start(void);
void pmskb_net_stop(void);
void pmskb_net_reap_later(void);
void pmskb_auto_run(void);
void pmskb_auto_came(struct sock *sk);
void pmskb_auto_queue(unsigned int ms);
void pmskb_auto_stop(void);
struct sk_buff *pmskb_rx_next(const struct sock *sk, const struct sk_buff *skb);
void pmskb_sk_busy_loop(struct sock *sk, bool nonblock);
bool pmskb_sk_has_socket(const struct sock *sk);
bool pmskb_trylock_sock(struct sock *sk);
int pmskb_sk_peek_off(const struct sock *sk);
void pmskb_sk_peek_moved(struct sock *sk, int n);
bool pmskb_tcp_urg_beyond(const struct sock *sk, u32 end);
void pmskb_mb(void);
unsigned long pmskb_jiffies(void);
unsigned long pmskb_ms(unsigned int ms);
bool pmskb_socket_nonblock(const struct socket *sock);
const struct proto_ops *pmskb_tcp_ops(bool v6);
int pmskb_tcp_guard(struct sock *sk, bool v6, const struct proto_ops *ours);
int pmskb_hooks_register(struct net *net);
void pmskb_hooks_unregister(struct net *net);
void pmskb_kfree_rcu_ctx(struct rcu_head *head, void *ctx);
void pmskb_layout(u32 *out);
void pmskb_migrate_disable(void);
void pmskb_migrate_enable(void);
void pmskb_rcu_settle(void);
u32 pmskb_wsum_add(u32 sum, u32 next, int offset);
void pmskb_skb_queued_facts(struct sk_buff *skb, bool tcp, struct pmskb_skb_facts *f);
struct sock *pmskb_full_sock(struct sock *sk);
void pmskb_flow(const struct sock *sk, struct pmskb_flow *flow);
bool pmskb_is_tcp(const struct socket *sock);
bool pmskb_is_udp(const struct socket *sock);
unsigned int pmskb_hook_v4(void *priv, struct sk_buff *skb, const struct nf_hook_state *state);
unsigned int pmskb_hook_v6(void *priv, struct sk_buff *skb, const struct nf_hook_state *state);
void pmskb_net_reap(void);
void pmskb_net_gone(struct net *net);
u8 pmskb_sk_state(const struct sock *sk);
bool pmskb_sk_rcv_shutdown(const struct sock *sk);
struct sock *pmskb_socket_sk(const struct socket *sock);
bool pmskb_sk_drop_queues(struct sock *sk);
bool pmskb_sock_tryget(struct sock *sk);
void pmskb_sk_prot_set(struct sock *sk, struct proto *prot);
void pmskb_ulp_forget(struct sock *sk, struct proto *prot);
void pmskb_sk_set_error(struct sock *sk, int err);

/* UDP. */
struct proto_ops;
/* By what a socket is called: UDP's own of a family, or ours. */
struct pmskb_udp_calls {
	struct proto *prot;
	const struct proto_ops *ops;
};

int pmskb_udp_learn(bool v6, struct pmskb_udp_calls *calls);
int pmskb_udp_install(struct socket *sock, const struct pmskb_udp_calls *udp,
		      const struct pmskb_udp_calls *ours, void *data);
int pmskb_udp_listen(struct sock *sk);
void pmskb_udp_restore(struct sock *sk, struct proto *udp);
bool pmskb_udp_data(const struct sock *sk, void **data);
void pmskb_udp_gone(void *data);
struct sock *pmskb_udp4_lookup(struct net *net, struct sk_buff *skb, __be32 saddr, __be16 sport,
			       __be32 daddr, __be16 dport, int dif, int sdif);
struct sock *pmskb_udp6_lookup(struct net *net, struct sk_buff *skb,
			       const struct in6_addr *saddr, __be16 sport,
			       const struct in6_addr *daddr, __be16 dport, int dif, int sdif);
void pmskb_skb_lend_sock(struct sk_buff *skb, struct sock *sk);
struct sk_buff *pmskb_udp_peek(struct sock *sk, int flags, int *off, int *err);
unsigned int pmskb_udp_after(struct sock *sk, const struct sk_buff *last, struct sk_buff **to,
			     unsigned int max);
struct sk_buff *pmskb_udp_before(struct sock *sk, const struct sk_buff *skb);
bool pmskb_udp_is_upto(struct sock *sk, const struct sk_buff *skb, const struct sk_buff *last);
bool pmskb_udp_is_right(struct sk_buff *skb);
void pmskb_udp_discard(struct sock *sk, struct sk_buff *skb);
bool pmskb_udp_take(struct sock *sk, struct sk_buff *skb);
void pmskb_udp_tell(struct sock *sk, struct msghdr *msg, struct sk_buff *skb, int off, int len,
		    bool peeked);
void pmskb_udp_lost(struct sock *sk, const struct sk_buff *skb);
bool pmskb_udp_tell_mtu(struct sock *sk, struct msghdr *msg);
void pmskb_udp_flow(const struct sk_buff *skb, struct pmskb_flow *flow);
bool pmskb_udp_drop_queues(struct sock *sk);

/* A command of io_uring. What may be memory that user space writes to is read once. */
struct io_uring_cmd;
struct pmskb_uring_facts {
	struct file *file;	/* open until the command is done */
	u64 arg;
	u64 reserved;
	u32 op;
	u32 flags;
	bool may_wait;
};

void pmskb_uring_facts(const struct io_uring_cmd *cmd, unsigned int issue_flags,
		       struct pmskb_uring_facts *f);

#endif
