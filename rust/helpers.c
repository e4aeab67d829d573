// SPDX-License-Identifier: GPL-2.0
/* C that Rust cannot say: static inlines and macros of kernel headers. */
#include <linux/badblocks.h>
#include <linux/blkdev.h>
#include <linux/io_uring/cmd.h>
#include <linux/memremap.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/netdevice.h>
#include <linux/page_ref.h>
#include <linux/sched/signal.h>
#include <linux/pipe_fs_i.h>
#include <linux/prefetch.h>
#include <linux/splice.h>
#include <linux/compat.h>
#include <linux/ipv6.h>
#include <linux/net.h>
#include <linux/netfilter.h>
#include <linux/netfilter_ipv4.h>
#include <linux/netfilter_ipv6.h>
#include <linux/pmskb.h>
#include <linux/skmsg.h>
#include <linux/workqueue.h>
#include <net/busy_poll.h>
#include <net/inet_common.h>
#include <net/inet_sock.h>
#include <net/ip.h>
#include <net/ipv6.h>
#include <net/mptcp.h>
#include <net/net_namespace.h>
#include <net/netlink.h>
#include <net/request_sock.h>
#include <net/tcp.h>
#include <net/transp_v6.h>
#include <net/udp.h>
#include "helpers.h"

static_assert(PMSKB_BLK_OPEN_RW == (__force u32)(BLK_OPEN_READ | BLK_OPEN_WRITE));

void pmskb_wmb(void)
{
	/* Orders the write-backs before it: sfence. */
	wmb();
}

void pmskb_prefetch(void *addr, size_t len)
{
	void *end = addr + len;

	for (; addr < end; addr += L1_CACHE_BYTES)
		prefetch(addr);
}

/* ---- files and regions ---- */

static char *attach;
module_param(attach, charp, 0444);
MODULE_PARM_DESC(attach, "Devices to attach at load, separated by commas");

const char *pmskb_attach_param(void)
{
	return attach;
}

#ifdef PMSKB_BREAK
static char broken[32];
module_param_string(broken, broken, sizeof(broken), 0644);
MODULE_PARM_DESC(broken, "What the storage core does without, to see whether tests notice");

bool pmskb_is_broken(const u8 *name, size_t len)
{
	return len < sizeof(broken) && !memcmp(broken, name, len) &&
	       (!broken[len] || broken[len] == '\n');
}
#endif

/* The disk's list is the driver's: sectors of the whole disk. */
bool pmskb_bdev_is_bad(struct block_device *bdev, u64 sector, u64 nr)
{
	struct badblocks *bb = bdev->bd_disk->bb;
	sector_t first, bad;

	if (!bb || !bb->count)
		return false;
	return badblocks_check(bb, get_start_sect(bdev) + sector, nr, &first, &bad) != 0;
}

bool pmskb_bdev_is_dax(struct block_device *bdev)
{
	return blk_queue_dax(bdev->bd_disk->queue);
}

/*
 * dax_synchronous() is not enough: alloc_dax() does not clear the flags that an
 * earlier device has left in the same memory, so an asynchronous one may pass.
 * virtio-pmem is the only driver of x86 that makes such ones.
 */
bool pmskb_bdev_is_async(struct block_device *bdev)
{
	struct device *dev;

	for (dev = disk_to_dev(bdev->bd_disk); dev; dev = dev->parent)
		if (dev->driver && !strcmp(dev->driver->name, "virtio_pmem"))
			return true;
	return false;
}

u64 pmskb_bdev_bytes(struct block_device *bdev)
{
	return bdev_nr_bytes(bdev);
}

u64 pmskb_bdev_start(struct block_device *bdev)
{
	return (u64)get_start_sect(bdev) << SECTOR_SHIFT;
}

bool pmskb_file_is_blk(const struct file *file)
{
	return S_ISBLK(file_inode(file)->i_mode);
}

bool pmskb_file_is_chr(const struct file *file)
{
	return S_ISCHR(file_inode(file)->i_mode);
}

bool pmskb_file_mode_has(const struct file *file, bool write)
{
	return file->f_mode & (write ? FMODE_WRITE : FMODE_READ);
}

/* A new file that nobody has seen yet: what open() gives files that have a position. */
void pmskb_file_by_position(struct file *file, loff_t size)
{
	file->f_mode |= FMODE_LSEEK | FMODE_PREAD | FMODE_PWRITE;
	i_size_write(file_inode(file), size);
}

bool pmskb_module_get(struct module *module)
{
	return try_module_get(module);
}

void pmskb_spin_lock_bh(spinlock_t *lock)
{
	spin_lock_bh(lock);
}

int pmskb_spin_trylock_bh(spinlock_t *lock)
{
	return spin_trylock_bh(lock);
}

void pmskb_spin_unlock_bh(spinlock_t *lock)
{
	spin_unlock_bh(lock);
}

struct page *pmskb_pfn_to_page(unsigned long pfn)
{
	return pfn_to_page(pfn);
}

unsigned long pmskb_page_to_pfn(const struct page *page)
{
	return page_to_pfn(page);
}

bool pmskb_pfn_has_page(unsigned long pfn)
{
	return pfn_valid(pfn) && is_zone_device_page(pfn_to_page(pfn));
}

struct page *pmskb_virt_to_page(const void *addr)
{
	return virt_to_page(addr);
}

void *pmskb_page_address(const struct page *page)
{
	return page_address(page);
}

/* Nobody uses the page, and it is a page of its own. */
bool pmskb_page_is_idle_dax(struct page *page)
{
	return is_zone_device_page(page) && is_fsdax_page(page) &&
	       !page_ref_count(page) && !PageCompound(page) && !page->mapping;
}

bool pmskb_page_is_poisoned(struct page *page)
{
	return PageHWPoison(page);
}

int pmskb_page_ref_count(const struct page *page)
{
	return page_ref_count(page);
}

/*
 * An idle page gets its base reference. Those of a device are reserved, and VFIO maps what is, for
 * as long as it likes and without a reference: frames are not, as long as they are ours.
 */
void pmskb_page_take(struct page *page)
{
	if (is_zone_device_page(page))
		ClearPageReserved(page);
	set_page_count(page, 1);
}

/* A page whose base reference is gone, or was never used, is its driver's again. */
void pmskb_page_give_back(struct page *page)
{
	set_page_count(page, 0);
	if (is_zone_device_page(page))
		SetPageReserved(page);
}

bool pmskb_page_ref_freeze(struct page *page, int count)
{
	return page_ref_freeze(page, count);
}

void pmskb_page_ref_unfreeze(struct page *page, int count)
{
	page_ref_unfreeze(page, count);
}

void pmskb_page_get(struct page *page)
{
	get_page(page);
}

void pmskb_page_put(struct page *page)
{
	put_page(page);
}

void pmskb_local_bh_disable(void)
{
	local_bh_disable();
}

void pmskb_local_bh_enable(void)
{
	local_bh_enable();
}

/* A hint: the caller may be moved at once. */
int pmskb_cpu(void)
{
	return raw_smp_processor_id();
}

unsigned int pmskb_nr_cpus(void)
{
	return nr_cpu_ids;
}

/* Page frames without struct pages, as far as user space goes: no get_user_pages(). */
bool pmskb_vma_make_readonly(struct vm_area_struct *vma)
{
	if (vma->vm_flags & (VM_WRITE | VM_EXEC))
		return false;
	vm_flags_mod(vma, VM_PFNMAP | VM_DONTEXPAND | VM_DONTDUMP,
		     VM_MAYWRITE | VM_MAYEXEC);
	return true;
}

/* The same, but others see what is written. A private one would be copied from. */
int pmskb_vma_make_shared(struct vm_area_struct *vma, unsigned long pages)
{
	if (vma->vm_flags & VM_EXEC)
		return -EPERM;
	if (!(vma->vm_flags & VM_SHARED) || vma->vm_pgoff > pages ||
	    vma_pages(vma) > pages - vma->vm_pgoff)
		return -EINVAL;
	vm_flags_mod(vma, VM_PFNMAP | VM_DONTEXPAND | VM_DONTDUMP, VM_MAYEXEC);
	return 0;
}

/*
 * Not with vm_page_prot: it has no write bit, for pfn_mkwrite() is to be asked
 * first, and we have been.
 */
vm_fault_t pmskb_insert_shared(struct vm_fault *vmf, unsigned long pfn, bool write)
{
	struct vm_area_struct *vma = vmf->vma;
	vm_flags_t flags = vma->vm_flags;

	if (!write)
		flags &= ~(VM_WRITE | VM_SHARED);
	return vmf_insert_pfn_prot(vma, vmf->address, pfn, vm_get_page_prot(flags));
}

/* How many buffers a pipe has room for. The caller holds the pipe's mutex. */
size_t pmskb_pipe_room(struct pipe_inode_info *pipe)
{
	unsigned int used = pipe_occupancy(pipe->head, pipe->tail);

	return pipe->max_usage > used ? pipe->max_usage - used : 0;
}

/*
 * Puts a page into a pipe, with the caller's reference on it. The operations
 * are the kernel's own, so that the buffer may outlive this module.
 */
ssize_t pmskb_splice_page(struct pipe_inode_info *pipe, struct page *page,
			  unsigned int offset, unsigned int len)
{
	struct pipe_buffer buf = {
		.ops = &nosteal_pipe_buf_ops,
		.page = page,
		.offset = offset,
		.len = len,
	};

	return add_to_pipe(pipe, &buf);
}

/* A misc device's driver data is the misc device. */
static ssize_t uuid_show(struct device *dev, struct device_attribute *attr, char *buf)
{
	struct pmskb_node *node = container_of(dev_get_drvdata(dev), struct pmskb_node, misc);

	return sysfs_emit(buf, "%pUb\n", node->uuid);
}
static DEVICE_ATTR_RO(uuid);

static ssize_t label_show(struct device *dev, struct device_attribute *attr, char *buf)
{
	struct pmskb_node *node = container_of(dev_get_drvdata(dev), struct pmskb_node, misc);

	return sysfs_emit(buf, "%s\n", node->label);
}
static DEVICE_ATTR_RO(label);

/* One of a store's limits. */
struct pmskb_limit_attr {
	struct device_attribute attr;
	enum pmskb_limit which;
};

static ssize_t limit_show(struct device *dev, struct device_attribute *attr, char *buf)
{
	struct pmskb_node *node = container_of(dev_get_drvdata(dev), struct pmskb_node, misc);
	struct pmskb_limit_attr *limit = container_of(attr, struct pmskb_limit_attr, attr);

	return sysfs_emit(buf, "%u\n", pmskb_limit_get(node, limit->which));
}

static ssize_t limit_store(struct device *dev, struct device_attribute *attr, const char *buf,
			   size_t len)
{
	struct pmskb_limit_attr *limit = container_of(attr, struct pmskb_limit_attr, attr);
	struct pmskb_node *node = container_of(dev_get_drvdata(dev), struct pmskb_node, misc);
	u32 value;
	int err;

	err = kstrtou32(buf, 0, &value);
	if (err)
		return err;
	return pmskb_limit_set(node, limit->which, value) ?: len;
}

static struct pmskb_limit_attr quota_store_frames = {
	__ATTR(quota_store_frames, 0644, limit_show, limit_store), PMSKB_LIMIT_STORE_FRAMES
};

static struct pmskb_limit_attr quota_socket_frames = {
	__ATTR(quota_socket_frames, 0644, limit_show, limit_store), PMSKB_LIMIT_SOCKET_FRAMES
};

static struct pmskb_limit_attr quota_socket_tokens = {
	__ATTR(quota_socket_tokens, 0644, limit_show, limit_store), PMSKB_LIMIT_SOCKET_TOKENS
};

static struct attribute *pmskb_node_attrs[] = {
	&dev_attr_uuid.attr,
	&dev_attr_label.attr,
	&quota_store_frames.attr.attr,
	&quota_socket_frames.attr.attr,
	&quota_socket_tokens.attr.attr,
	NULL
};

static const struct attribute_group pmskb_node_group = {
	.attrs = pmskb_node_attrs,
};

const struct attribute_group **pmskb_node_groups(void)
{
	static const struct attribute_group *groups[] = { &pmskb_node_group, NULL };

	return groups;
}

u64 pmskb_now(void)
{
	return ktime_get_real_ns();
}

void pmskb_resched(void)
{
	cond_resched();
}

bool pmskb_killed(void)
{
	cond_resched();
	return fatal_signal_pending(current);
}

bool pmskb_signal_pending(void)
{
	return signal_pending(current);
}

/*
 * Freed skbs wait on the list of the CPU that allocated them until that CPU
 * next runs net_rx_action(), which on an idle machine is never. So make each
 * CPU run it, by a poll that has nothing to do. May sleep.
 */
static int pmskb_poll(struct napi_struct *napi, int budget)
{
	napi_complete_done(napi, 0);
	return 0;
}

static void pmskb_schedule_poll(void *napi)
{
	napi_schedule(napi);
}

int pmskb_flush_deferred_skbs(void)
{
	struct net_device *dev = alloc_netdev_dummy(sizeof(struct napi_struct));
	struct napi_struct *napi;
	int cpu;

	if (!dev)
		return -ENOMEM;
	napi = netdev_priv(dev);
	netif_napi_add(dev, napi, pmskb_poll);
	napi_enable(napi);
	cpus_read_lock();
	for_each_online_cpu(cpu) {
		smp_call_function_single(cpu, pmskb_schedule_poll, napi, true);
		napi_synchronize(napi);
	}
	cpus_read_unlock();
	napi_disable(napi);
	netif_napi_del(napi);
	free_netdev(dev);
	return 0;
}

/* ---- sockets and packets ---- */

void pmskb_spin_lock_init(spinlock_t *lock)
{
	spin_lock_init(lock);
}

#if IS_BUILTIN(CONFIG_KUNIT)
/*
 * For unit tests: a packet of these bytes, the data at the network header, @linear of
 * them in its head and the others in page fragments.
 */
struct sk_buff *pmskb_test_skb(const void *bytes, size_t len, size_t linear)
{
	struct sk_buff *skb;
	int err;

	skb = alloc_skb_with_frags(64 + linear, len - linear, 0, &err, GFP_KERNEL);
	if (!skb)
		return NULL;
	skb_reserve(skb, 64);
	skb_put(skb, linear);
	skb->data_len = len - linear;
	skb->len = len;
	skb_reset_network_header(skb);
	if (skb_store_bits(skb, 0, bytes, len)) {
		kfree_skb(skb);
		return NULL;
	}
	return skb;
}

void pmskb_test_skb_checksum(struct sk_buff *skb, u8 ip_summed, u32 csum)
{
	skb->ip_summed = ip_summed;
	skb->csum = (__force __wsum)csum;
}

/* For unit tests: pages in a row, each on its own, that nobody references. */
struct page *pmskb_test_pages(void)
{
	struct page *first = alloc_pages(GFP_KERNEL, PMSKB_TEST_ORDER);
	unsigned int at;

	if (!first)
		return NULL;
	split_page(first, PMSKB_TEST_ORDER);
	for (at = 0; at < PMSKB_TEST_PAGES; at++)
		set_page_count(first + at, 0);
	return first;
}

void pmskb_test_pages_free(struct page *first)
{
	unsigned int at;

	for (at = 0; at < PMSKB_TEST_PAGES; at++) {
		if (WARN_ON(page_ref_count(first + at)))
			continue;
		set_page_count(first + at, 1);
		__free_page(first + at);
	}
}
#endif

void pmskb_skb_facts(struct sk_buff *skb, bool v6, struct pmskb_skb_facts *f)
{
	const struct skb_shared_info *si = skb_shinfo(skb);

	memset(f, 0, sizeof(*f));
	f->readable = skb_frags_readable(skb);
	f->shared = skb_shared(skb);
	f->merged = skb_is_gso(skb);
	f->fragments = skb_has_frag_list(skb);
	f->fraglist_gso = !!(si->gso_type & SKB_GSO_FRAGLIST);
	f->encapsulated = skb->encapsulation;
	f->mac_set = skb_mac_header_was_set(skb);
	f->ip_summed = skb->ip_summed;
	f->csum = (__force u32)skb->csum;
	f->csum_complete_sw = skb->csum_complete_sw;
	f->ifindex = skb->skb_iif;
	f->iif = v6 ? inet6_iif(skb) : inet_iif(skb);
	f->sdif = v6 ? inet6_sdif(skb) : inet_sdif(skb);
	/* With a device that resolves its stamp later, only it can read this. */
	if (!(si->tx_flags & SKBTX_HW_TSTAMP_NETDEV))
		f->hwtstamp = ktime_to_ns(skb_hwtstamps(skb)->hwtstamp);
	/* A sender's departure time is still there on loopback. */
	if (skb->tstamp_type == SKB_CLOCK_REALTIME)
		f->tstamp = ktime_to_ns(skb->tstamp);
}

bool pmskb_pskb_may_pull(struct sk_buff *skb, unsigned int len)
{
	return pskb_may_pull(skb, len);
}

void *pmskb_skb_header_pointer(const struct sk_buff *skb, int off, int len, void *buf)
{
	return skb_header_pointer(skb, off, len, buf);
}

void pmskb_skb_add_rx_frag(struct sk_buff *skb, int i, struct page *page, int off,
			   int size, unsigned int truesize)
{
	skb_add_rx_frag(skb, i, page, off, size, truesize);
}

unsigned int pmskb_shinfo_size(void)
{
	return SKB_DATA_ALIGN(sizeof(struct skb_shared_info));
}

unsigned int pmskb_max_skb_frags(void)
{
	return MAX_SKB_FRAGS;
}

/* What skb_copy_header() leaves to its caller. */
void pmskb_skb_take_stamps(struct sk_buff *to, struct sk_buff *from)
{
	to->mac_len = from->mac_len;
	*skb_hwtstamps(to) = *skb_hwtstamps(from);
	skb_shinfo(to)->tx_flags = skb_shinfo(from)->tx_flags &
				   (SKBTX_HW_TSTAMP_NETDEV | SKBTX_ANY_TSTAMP);
	skb_shinfo(to)->tskey = skb_shinfo(from)->tskey;
}

void pmskb_skb_set_verified(struct sk_buff *skb)
{
	skb->ip_summed = CHECKSUM_UNNECESSARY;
	skb->csum_level = 0;
}

/* 0: the data is this packet's alone. */
int pmskb_skb_shared_state(const struct sk_buff *skb)
{
	return skb_cloned(skb) || skb_shared(skb);
}

/* Where the byte at off lies, and how many after it lie there too. */
void pmskb_skb_part(const struct sk_buff *skb, u32 off, struct pmskb_skb_part *part)
{
	const struct skb_shared_info *si = skb_shinfo(skb);
	u32 start = skb_headlen(skb);
	int i;

	part->page = NULL;
	part->off = 0;
	if (off < start) {
		part->len = start - off;
		return;
	}
	off -= start;
	for (i = 0; i < si->nr_frags; i++) {
		const skb_frag_t *frag = &si->frags[i];
		u32 size = skb_frag_size(frag);

		if (off < size) {
			u32 at = skb_frag_off(frag) + off;
			struct page *page = skb_frag_page(frag);

			part->len = size - off;
			if (!page)
				return;
			/* A frag may be larger than a page: name the page of this byte. */
			part->page = page + (at >> PAGE_SHIFT);
			part->off = offset_in_page(at);
			part->len = min_t(u32, part->len, PAGE_SIZE - part->off);
			return;
		}
		off -= size;
	}
	/* In the frag list. */
	part->len = U32_MAX;
}

void *pmskb_kmalloc_atomic(size_t size)
{
	if (pmskb_inject_fails(PMSKB_INJECT_MEMORY))
		return NULL;
	return kmalloc(size, GFP_ATOMIC | __GFP_NOWARN);
}

bool pmskb_sock_flag_done(const struct sock *sk)
{
	return sock_flag(sk, SOCK_DONE);
}

bool pmskb_sock_urginline(const struct sock *sk)
{
	return sock_flag(sk, SOCK_URGINLINE);
}

long pmskb_sock_rcvtimeo(const struct sock *sk, bool noblock)
{
	return sock_rcvtimeo(sk, noblock);
}

int pmskb_sock_error(struct sock *sk)
{
	return sock_error(sk);
}

int pmskb_sock_intr_errno(long timeo)
{
	return sock_intr_errno(timeo);
}

struct sk_buff *pmskb_rx_tail(const struct sock *sk)
{
	return skb_peek_tail(&sk->sk_receive_queue);
}

/* The one after @skb, or the first. */
struct sk_buff *pmskb_rx_next(const struct sock *sk, const struct sk_buff *skb)
{
	return skb ? skb_peek_next((struct sk_buff *)skb, &sk->sk_receive_queue) :
		     skb_peek(&sk->sk_receive_queue);
}

/* As tcp_recvmsg() does before it locks the socket. */
void pmskb_sk_busy_loop(struct sock *sk, bool nonblock)
{
	if (sk_can_busy_loop(sk) && skb_queue_empty_lockless(&sk->sk_receive_queue) &&
	    READ_ONCE(sk->sk_state) == TCP_ESTABLISHED)
		sk_busy_loop(sk, nonblock);
}

/* As lock_sock(), unless it is locked. */
bool pmskb_trylock_sock(struct sock *sk)
{
	bool got;

	spin_lock_bh(&sk->sk_lock.slock);
	got = !sock_owned_by_user_nocheck(sk);
	if (got)
		sk->sk_lock.owned = 1;
	spin_unlock_bh(&sk->sk_lock.slock);
	if (got)
		mutex_acquire(&sk->sk_lock.dep_map, 0, 1, _RET_IP_);
	return got;
}

int pmskb_sk_peek_off(const struct sock *sk)
{
	return READ_ONCE(sk->sk_peek_off);
}

/* Of so many received bytes from the next one on; those that were only looked at count as less. */
void pmskb_sk_peek_moved(struct sock *sk, int n)
{
	sk_peek_offset_bwd(sk, n);
}

bool pmskb_tcp_urg_beyond(const struct sock *sk, u32 end)
{
	const struct tcp_sock *tp = tcp_sk(sk);

	return tp->urg_data && tp->urg_data != TCP_URG_READ && !sock_flag(sk, SOCK_URGINLINE) &&
	       !before(tp->urg_seq, end);
}

void pmskb_mb(void)
{
	/* What it pairs with is said where it is called. */
	smp_mb();
}

unsigned long pmskb_jiffies(void)
{
	return jiffies;
}

unsigned long pmskb_ms(unsigned int ms)
{
	return msecs_to_jiffies(ms);
}

/* It has not, as long as nobody has accepted it. */
bool pmskb_sk_has_socket(const struct sock *sk)
{
	return READ_ONCE(sk->sk_socket);
}

bool pmskb_socket_nonblock(const struct socket *sock)
{
	return sock->file->f_flags & O_NONBLOCK;
}

const struct proto_ops *pmskb_tcp_ops(bool v6)
{
#if IS_ENABLED(CONFIG_IPV6)
	if (v6)
		return &inet6_stream_ops;
#endif
	return &inet_stream_ops;
}

/* The socket is locked, and open. What it accepts inherits its operations. */
int pmskb_tcp_guard(struct sock *sk, bool v6, const struct proto_ops *ours)
{
	struct socket *sock = sk->sk_socket;
	const struct proto_ops *now;

	if (!sock)
		return -EBUSY;
	now = READ_ONCE(sock->ops);
	if (now == ours)
		return 0;
	if (now != pmskb_tcp_ops(v6))
		return -EBUSY;
	/* Put by __sock_release(). */
	__module_get(ours->owner);
	WRITE_ONCE(sock->ops, ours);
	module_put(now->owner);
	return 0;
}

static void pmskb_auto_work_fn(struct work_struct *work)
{
	pmskb_auto_run();
}

static DECLARE_DELAYED_WORK(pmskb_auto_work, pmskb_auto_work_fn);

/* From any context. */
void pmskb_auto_queue(unsigned int ms)
{
	queue_delayed_work(system_dfl_wq, &pmskb_auto_work, msecs_to_jiffies(ms));
}

/* Nobody queues it any more but itself. */
void pmskb_auto_stop(void)
{
	cancel_delayed_work_sync(&pmskb_auto_work);
}

/* As tcp_recvmsg() does after each read. */
void pmskb_tcp_urg_passed(struct sock *sk)
{
	struct tcp_sock *tp = tcp_sk(sk);

	if (unlikely(tp->urg_data) && after(tp->copied_seq, tp->urg_seq)) {
		WRITE_ONCE(tp->urg_data, 0);
		tcp_fast_path_check(sk);
	}
}

bool pmskb_tcp_at_urg(const struct sock *sk)
{
	const struct tcp_sock *tp = tcp_sk(sk);

	return tp->urg_data && tp->urg_seq == tp->copied_seq;
}

/* How many bytes there are from that one to the urgent one; more than there can be if none. */
u32 pmskb_tcp_urg_after(const struct sock *sk, u32 seq)
{
	const struct tcp_sock *tp = tcp_sk(sk);

	return tp->urg_data ? tp->urg_seq - seq : U32_MAX;
}

bool pmskb_tcp_in_repair(const struct sock *sk)
{
	return tcp_sk(sk)->repair;
}

u32 pmskb_skb_seq(const struct sk_buff *skb)
{
	return TCP_SKB_CB(skb)->seq;
}

bool pmskb_sk_is_mptcp(const struct sock *sk)
{
	return sk_is_mptcp(sk);
}

bool pmskb_sk_has_psock(const struct sock *sk)
{
	bool has;

	rcu_read_lock();
	has = !!sk_psock(sk);
	rcu_read_unlock();
	return has;
}

struct net *pmskb_sock_net(const struct sock *sk)
{
	return sock_net(sk);
}

void *pmskb_ulp_data(const struct sock *sk)
{
	return READ_ONCE(inet_csk(sk)->icsk_ulp_data);
}

/* Data first: who sees the new operations finds it. */
void pmskb_ulp_install(struct sock *sk, struct proto *prot, void *data,
		       const struct tcp_ulp_ops *ops)
{
	write_lock_bh(&sk->sk_callback_lock);
	/* Pairs with READ_ONCE() in pmskb_ulp_data(), after the read of sk_prot. */
	smp_store_release(&inet_csk(sk)->icsk_ulp_data, data);
	/*
	 * sk_clone() copies a listener without its lock: who copies our sk_prot must find
	 * the operations too, or clone is not called. __tcp_set_ulp() sets them once more.
	 */
	smp_store_release(&inet_csk(sk)->icsk_ulp_ops, ops);
	/* Pairs with the reads of sk_prot without the socket lock. */
	smp_store_release(&sk->sk_prot, prot);
	write_unlock_bh(&sk->sk_callback_lock);
}

void pmskb_ulp_data_set(struct sock *sk, void *data)
{
	/* Pairs with pmskb_ulp_data(): the context is filled. */
	smp_store_release(&inet_csk(sk)->icsk_ulp_data, data);
}

const struct proto *pmskb_sk_prot(const struct sock *sk)
{
	/* Pairs with pmskb_ulp_install(). */
	return smp_load_acquire(&sk->sk_prot);
}

/* __tcp_set_ulp() takes it away; sending is as on any TCP socket here. */
void pmskb_sock_get_zc_back(struct sock *sk)
{
	if (sk->sk_socket)
		set_bit(SOCK_SUPPORT_ZC, &sk->sk_socket->flags);
}

int pmskb_copy_from_sockptr(void *to, sockptr_t from, size_t off, size_t len)
{
	return copy_from_sockptr_offset(to, from, off, len) ? -EFAULT : 0;
}

bool pmskb_compat_syscall(void)
{
	return in_compat_syscall();
}

/* put_cmsg() will not truncate. */
bool pmskb_cmsg_room(const struct msghdr *msg, int len)
{
	size_t need = CMSG_LEN(len);

#ifdef CONFIG_COMPAT
	if (msg->msg_flags & MSG_CMSG_COMPAT)
		need = sizeof(struct compat_cmsghdr) + len;
#endif
	return msg->msg_control && msg->msg_controllen >= need;
}

/*
 * The first control message of ours after @at, or at all, in what sendmsg() was given. NULL if
 * there is none; those after one that is not well formed are none.
 */
struct cmsghdr *pmskb_cmsg_next(struct msghdr *msg, struct cmsghdr *at)
{
	/* recvmsg() has it in user memory. */
	if (msg->msg_control_is_user)
		return NULL;
	for (at = at ? CMSG_NXTHDR(msg, at) : CMSG_FIRSTHDR(msg); at; at = CMSG_NXTHDR(msg, at)) {
		if (!CMSG_OK(msg, at))
			return NULL;
		if (at->cmsg_level == SOL_PMSKB)
			return at;
	}
	return NULL;
}

/* What a socket says to the control messages that are not ours. */
int pmskb_cmsg_check(struct sock *sk, struct msghdr *msg)
{
	struct sockcm_cookie cookie = { .tsflags = READ_ONCE(sk->sk_tsflags) };
	int err;

	err = sock_cmsg_send(sk, msg, &cookie);
	if (err)
		return err;
	/* The iovec is no memory of the process. */
	return cookie.dmabuf_id ? -EOPNOTSUPP : 0;
}

/* Control messages for what is not the end of a call: no timestamp of its last byte. */
void pmskb_cmsg_no_stamps(struct msghdr *msg)
{
	static const struct {
		struct cmsghdr head;
		u32 flags;
	} none = {
		.head = {
			.cmsg_len = CMSG_LEN(sizeof(u32)),
			.cmsg_level = SOL_SOCKET,
			.cmsg_type = SO_TIMESTAMPING_OLD,
		},
	};

	msg->msg_control = (void *)&none;
	msg->msg_controllen = sizeof(none);
}

/* What the peer has acknowledged while the socket was locked. */
void pmskb_sk_flush_backlog(struct sock *sk)
{
	sk_flush_backlog(sk);
}

bool pmskb_sk_sends_no_more(const struct sock *sk)
{
	return READ_ONCE(sk->sk_err) || (READ_ONCE(sk->sk_shutdown) & SEND_SHUTDOWN);
}

long pmskb_sock_sndtimeo(const struct sock *sk, bool noblock)
{
	return sock_sndtimeo(sk, noblock);
}

/* Sends what MSG_MORE has kept back. The socket is open, and not locked. */
void pmskb_tcp_push(struct sock *sk)
{
	pmskb_sk_prot(sk)->splice_eof(sk->sk_socket);
}

struct socket *pmskb_socket_get(int fd, int *err)
{
	return sockfd_lookup(fd, err);
}

void pmskb_socket_put(struct socket *sock)
{
	sockfd_put(sock);
}

void pmskb_lock_sock(struct sock *sk)
{
	lock_sock(sk);
}

void pmskb_module_put(struct module *module)
{
	module_put(module);
}

void pmskb_module_get_live(struct module *module)
{
	__module_get(module);
}

/* What setsockopt(TCP_ULP) does, security and BPF hooks included. */
int pmskb_set_ulp(struct socket *sock)
{
	char name[] = PMSKB_ULP_NAME;

	return do_sock_setsockopt(sock, false, SOL_TCP, TCP_ULP, KERNEL_SOCKPTR(name),
				  sizeof(name) - 1);
}

int pmskb_nla_put(struct sk_buff *skb, int type, int len, const void *data)
{
	return nla_put(skb, type, len, data);
}

size_t pmskb_nla_size(int len)
{
	return nla_total_size(len);
}

static const struct nf_hook_ops pmskb_hooks[] = {
	{
		.hook = pmskb_hook_v4,
		.pf = NFPROTO_IPV4,
		.hooknum = NF_INET_LOCAL_IN,
		.priority = PMSKB_HOOK_PRIORITY,
	}, {
		.hook = pmskb_hook_v6,
		.pf = NFPROTO_IPV6,
		.hooknum = NF_INET_LOCAL_IN,
		.priority = PMSKB_HOOK_PRIORITY,
	},
};

int pmskb_hooks_register(struct net *net)
{
	return nf_register_net_hooks(net, pmskb_hooks, ARRAY_SIZE(pmskb_hooks));
}

void pmskb_hooks_unregister(struct net *net)
{
	nf_unregister_net_hooks(net, pmskb_hooks, ARRAY_SIZE(pmskb_hooks));
}

static void pmskb_net_reap_work(struct work_struct *work)
{
	pmskb_net_reap();
}

static DECLARE_DELAYED_WORK(pmskb_net_work, pmskb_net_reap_work);

static struct pernet_operations pmskb_net_ops = {
	.pre_exit = pmskb_net_gone,
};

int pmskb_net_start(void)
{
	return register_pernet_subsys(&pmskb_net_ops);
}

/* No socket is attached any more; afterwards no hook runs. */
void pmskb_net_stop(void)
{
	unregister_pernet_subsys(&pmskb_net_ops);
	cancel_delayed_work_sync(&pmskb_net_work);
	synchronize_net();
}

/* From any context. Late, so that a server between two sockets keeps its hook. */
void pmskb_net_reap_later(void)
{
	mod_delayed_work(system_dfl_wq, &pmskb_net_work, HZ / 4);
}

void pmskb_kfree_rcu_ctx(struct rcu_head *head, void *ctx)
{
	/* Its type of head changed its name in 7.3. */
	kvfree_call_rcu((void *)head, ctx);
}

void pmskb_rcu_settle(void)
{
	synchronize_rcu();
	rcu_barrier();
}

/* The same in Rust is in attach.rs: bindgen and the compiler must agree. */
void pmskb_layout(u32 *out)
{
	const u32 layout[PMSKB_LAYOUT_NR] = {
		sizeof(struct sock),
		offsetof(struct sock, sk_receive_queue),
		offsetof(struct sock, sk_rcvlowat),
		offsetof(struct sock, sk_shutdown),
		offsetof(struct sock, sk_err),
		offsetof(struct sock, sk_protocol),
		offsetof(struct sock, sk_prot_creator),
		sizeof(struct inet_connection_sock),
		offsetof(struct inet_connection_sock, icsk_ulp_ops),
		offsetof(struct inet_connection_sock, icsk_ulp_data),
		sizeof(struct tcp_sock),
		offsetof(struct tcp_sock, copied_seq),
		sizeof(struct proto),
		offsetof(struct proto, recvmsg),
		offsetof(struct proto, setsockopt),
		offsetof(struct proto, owner),
		sizeof(struct tcp_ulp_ops),
		offsetof(struct tcp_ulp_ops, owner),
		sizeof(struct nf_hook_state),
		offsetof(struct nf_hook_state, net),
		sizeof(inet_dgram_ops),
		offsetof(typeof(inet_dgram_ops), owner),
	};

	memcpy(out, layout, sizeof(layout));
}

u32 pmskb_wsum_add(u32 sum, u32 next, int offset)
{
	return (__force u32)csum_block_add((__force __wsum)sum, (__force __wsum)next, offset);
}

void pmskb_skb_queued_facts(struct sk_buff *skb, bool tcp, struct pmskb_skb_facts *f)
{
	const struct skb_shared_info *si = skb_shinfo(skb);

	memset(f, 0, sizeof(*f));
	f->readable = skb_frags_readable(skb);
	if (!(si->tx_flags & SKBTX_HW_TSTAMP_NETDEV))
		f->hwtstamp = ktime_to_ns(skb_hwtstamps(skb)->hwtstamp);
	/* TCP has its own use for the field in between. */
	if ((!tcp || TCP_SKB_CB(skb)->has_rxtstamp) && skb->tstamp_type == SKB_CLOCK_REALTIME)
		f->tstamp = ktime_to_ns(skb->tstamp);
}

/* The socket itself, or a request's listener; NULL for a time-wait one. */
struct sock *pmskb_full_sock(struct sock *sk)
{
	if (sk_fullsock(sk))
		return sk;
	if (sk->sk_state == TCP_NEW_SYN_RECV)
		return READ_ONCE(inet_reqsk(sk)->rsk_listener);
	return NULL;
}

void pmskb_flow(const struct sock *sk, struct pmskb_flow *flow)
{
	const struct inet_sock *inet = inet_sk(sk);

	memset(flow, 0, sizeof(*flow));
	flow->peer_port = ntohs(inet->inet_dport);
	flow->local_port = ntohs(inet->inet_sport);
#if IS_ENABLED(CONFIG_IPV6)
	if (sk->sk_family == AF_INET6 && !ipv6_addr_v4mapped(&sk->sk_v6_daddr)) {
		flow->version = 6;
		memcpy(flow->peer, &sk->sk_v6_daddr, 16);
		memcpy(flow->local, &sk->sk_v6_rcv_saddr, 16);
		return;
	}
#endif
	flow->version = 4;
	memcpy(flow->peer, &inet->inet_daddr, 4);
	memcpy(flow->local, &inet->inet_rcv_saddr, 4);
}

bool pmskb_is_tcp(const struct socket *sock)
{
	const struct sock *sk = sock->sk;

	return sk && sk_is_tcp(sk) && sk->sk_protocol == IPPROTO_TCP;
}

bool pmskb_is_udp(const struct socket *sock)
{
	const struct sock *sk = sock->sk;

	return sk && sk_is_udp(sk) && sk->sk_protocol == IPPROTO_UDP;
}

static_assert(PMSKB_TCP_CLOSE == TCP_CLOSE && PMSKB_TCP_LISTEN == TCP_LISTEN);

u8 pmskb_sk_state(const struct sock *sk)
{
	return inet_sk_state_load(sk);
}

bool pmskb_sk_rcv_shutdown(const struct sock *sk)
{
	return READ_ONCE(sk->sk_shutdown) & RCV_SHUTDOWN;
}

struct sock *pmskb_socket_sk(const struct socket *sock)
{
	return sock->sk;
}

/* What was received and not read is lost. True if there was anything. */
bool pmskb_sk_drop_queues(struct sock *sk)
{
	struct tcp_sock *tp = tcp_sk(sk);
	struct sk_buff *skb;
	struct rb_node *node;
	bool any = false;

	while ((skb = __skb_dequeue(&sk->sk_receive_queue))) {
		kfree_skb(skb);
		any = true;
	}
	while ((node = rb_first(&tp->out_of_order_queue))) {
		skb = rb_to_skb(node);
		rb_erase(node, &tp->out_of_order_queue);
		kfree_skb(skb);
		any = true;
	}
	tp->ooo_last_skb = NULL;
	return any;
}

bool pmskb_sock_tryget(struct sock *sk)
{
	return refcount_inc_not_zero(&sk->sk_refcnt);
}

void pmskb_sk_prot_set(struct sock *sk, struct proto *prot)
{
	WRITE_ONCE(sk->sk_prot, prot);
}

/* A child that nobody knows yet becomes a plain TCP socket. */
void pmskb_ulp_forget(struct sock *sk, struct proto *prot)
{
	inet_csk(sk)->icsk_ulp_ops = NULL;
	WRITE_ONCE(sk->sk_prot, prot);
}

/*
 * Ends a locked connection whose queue was dropped, before anybody sees the hole: what is
 * in the backlog finds it closed.
 */
void pmskb_sk_abort(struct sock *sk, int err)
{
	if (sk->sk_state == TCP_CLOSE)
		return;
	sk->sk_prot->disconnect(sk, 0);
	WRITE_ONCE(sk->sk_err, err);
	sk_error_report(sk);
}

void pmskb_sk_set_error(struct sock *sk, int err)
{
	WRITE_ONCE(sk->sk_err, err);
	sk_error_report(sk);
}

/* Against those who take no notice of a socket's owner: inet_csk_listen_stop(). */
void pmskb_bh_lock_sock(struct sock *sk)
{
	local_bh_disable();
	bh_lock_sock(sk);
}

void pmskb_bh_unlock_sock(struct sock *sk)
{
	bh_unlock_sock(sk);
	local_bh_enable();
}

/* Data at the transport header, as where TCP looks a listener up. */
bool pmskb_skb_to_transport(struct sk_buff *skb, unsigned int off, unsigned int headers)
{
	if (!pskb_may_pull(skb, headers))
		return false;
	__skb_pull(skb, off);
	return true;
}

void pmskb_skb_to_network(struct sk_buff *skb, unsigned int off)
{
	__skb_push(skb, off);
}

void pmskb_migrate_disable(void)
{
	migrate_disable();
}

void pmskb_migrate_enable(void)
{
	migrate_enable();
}

/* ---- UDP ---- */

static_assert(PMSKB_SOL_UDP == SOL_UDP && PMSKB_UDP_ENCAP == UDP_ENCAP);
static_assert(PMSKB_SOL_IPV6 == SOL_IPV6 && PMSKB_IPV6_ADDRFORM == IPV6_ADDRFORM);

/* What a socket does when something has come, if nobody has changed that. */
static void (*pmskb_sock_ready)(struct sock *sk) __ro_after_init;

/* How UDP's sockets end, of IPv4 and IPv6. */
static void (*pmskb_udp_end[2])(struct sock *sk) __ro_after_init;

/*
 * The end of a socket that has not been closed by our operations: an IPV6_ADDRFORM that was under
 * way when they were put in has replaced them, and so nobody has put their reference.
 */
static void pmskb_udp_destruct(struct sock *sk, bool v6)
{
	pmskb_udp_gone(rcu_replace_pointer(sk->sk_user_data, NULL, true));
	pmskb_udp_end[v6](sk);
	/* Its end waits for RCU's callbacks, of which this is one. */
	module_put(THIS_MODULE);
}

static void pmskb_udp4_destruct(struct sock *sk)
{
	pmskb_udp_destruct(sk, false);
}

static void pmskb_udp6_destruct(struct sock *sk)
{
	pmskb_udp_destruct(sk, true);
}

/* Not all of it is exported, so a socket tells. At module init; may sleep. */
int pmskb_udp_learn(bool v6, struct pmskb_udp_calls *calls)
{
	struct socket *sock;
	int err;

	err = sock_create_kern(&init_net, v6 ? AF_INET6 : AF_INET, SOCK_DGRAM, IPPROTO_UDP, &sock);
	if (err)
		return err;
	calls->prot = sock->sk->sk_prot;
	calls->ops = sock->ops;
	pmskb_sock_ready = sock->sk->sk_data_ready;
	pmskb_udp_end[v6] = sock->sk->sk_destruct;
	sock_release(sock);
	return 0;
}

/* The socket is locked. Data first: who sees the new operations finds it. */
int pmskb_udp_install(struct socket *sock, const struct pmskb_udp_calls *udp,
		      const struct pmskb_udp_calls *ours, void *data)
{
	struct sock *sk = sock->sk;
	int err = -EBUSY;
	bool v6 = sk->sk_destruct == pmskb_udp_end[1];

	write_lock_bh(&sk->sk_callback_lock);
	if (sk->sk_prot == udp->prot && READ_ONCE(sock->ops) == udp->ops &&
	    (v6 || sk->sk_destruct == pmskb_udp_end[0]) &&
	    !sk->sk_user_data && !READ_ONCE(udp_sk(sk)->encap_type)) {
		/* Put by __sock_release(). */
		__module_get(ours->ops->owner);
		rcu_assign_sk_user_data(sk, data);
		/* Pairs with pmskb_udp_data(). */
		smp_store_release(&sk->sk_destruct, v6 ? pmskb_udp6_destruct : pmskb_udp4_destruct);
		/* Pairs with pmskb_sk_prot(). */
		smp_store_release(&sk->sk_prot, ours->prot);
		WRITE_ONCE(sock->ops, ours->ops);
		err = 0;
	}
	write_unlock_bh(&sk->sk_callback_lock);
	return err;
}

/* A datagram is in the queue. Softirq mostly, under RCU. */
static void pmskb_udp_ready(struct sock *sk)
{
	pmskb_auto_came(sk);
	pmskb_sock_ready(sk);
}

/* From here on pmskb_auto_came() hears of what comes to a socket of ours, which is locked. */
int pmskb_udp_listen(struct sock *sk)
{
	int err = 0;

	write_lock_bh(&sk->sk_callback_lock);
	if (sk->sk_data_ready == pmskb_sock_ready)
		WRITE_ONCE(sk->sk_data_ready, pmskb_udp_ready);
	else if (sk->sk_data_ready != pmskb_udp_ready)
		err = -EBUSY;
	write_unlock_bh(&sk->sk_callback_lock);
	return err;
}

/* The socket is locked, and about to be closed. */
void pmskb_udp_restore(struct sock *sk, struct proto *udp)
{
	write_lock_bh(&sk->sk_callback_lock);
	if (sk->sk_data_ready == pmskb_udp_ready)
		WRITE_ONCE(sk->sk_data_ready, pmskb_sock_ready);
	WRITE_ONCE(sk->sk_destruct, pmskb_udp_end[sk->sk_destruct == pmskb_udp6_destruct]);
	WRITE_ONCE(sk->sk_prot, udp);
	rcu_assign_sk_user_data(sk, NULL);
	write_unlock_bh(&sk->sk_callback_lock);
}

/* Whether it is one of ours, and then its data: a context, or NULL if it is being closed. */
bool pmskb_udp_data(const struct sock *sk, void **data)
{
	/* Pairs with pmskb_udp_install(). */
	void (*destruct)(struct sock *sk) = smp_load_acquire(&sk->sk_destruct);

	if (destruct != pmskb_udp4_destruct && destruct != pmskb_udp6_destruct)
		return false;
	*data = READ_ONCE(sk->sk_user_data);
	return true;
}

/* As UDP looks it up. What goes to several sockets goes to none. */
struct sock *pmskb_udp4_lookup(struct net *net, struct sk_buff *skb, __be32 saddr, __be16 sport,
			       __be32 daddr, __be16 dport, int dif, int sdif)
{
	const struct rtable *rt = skb_rtable(skb);

	if (!rt || rt->rt_flags & (RTCF_BROADCAST | RTCF_MULTICAST))
		return NULL;
	return __udp4_lib_lookup(net, saddr, sport, daddr, dport, dif, sdif, skb);
}

struct sock *pmskb_udp6_lookup(struct net *net, struct sk_buff *skb,
			       const struct in6_addr *saddr, __be16 sport,
			       const struct in6_addr *daddr, __be16 dport, int dif, int sdif)
{
#if IS_ENABLED(CONFIG_IPV6)
	if (!ipv6_addr_is_multicast(daddr))
		return __udp6_lib_lookup(net, saddr, sport, daddr, dport, dif, sdif, skb);
#endif
	return NULL;
}

/*
 * UDP takes a socket with a reference as it is. One without, which is what its own early demux
 * leaves, it takes too, but asks those who select among SO_REUSEPORT sockets again.
 */
void pmskb_skb_lend_sock(struct sk_buff *skb, struct sock *sk)
{
	if (!sk_is_refcounted(sk) && !sk->sk_reuseport) {
		skb->sk = sk;
		skb->destructor = sock_pfree;
	} else if (refcount_inc_not_zero(&sk->sk_refcnt)) {
		skb->sk = sk;
		skb->destructor = sock_edemux;
	}
}

/*
 * The datagram that comes next, with a reference; it stays in the queue, and is on reader_queue
 * then. With MSG_PEEK it is the one at SO_PEEK_OFF, and where in it that is. NULL and no error:
 * receiving was shut down.
 */
struct sk_buff *pmskb_udp_peek(struct sock *sk, int flags, int *off, int *err)
{
	*off = sk_peek_offset(sk, flags);
	if (*off < 0 || !(flags & MSG_PEEK))
		*off = -1;
	return __skb_recv_udp(sk, flags | MSG_PEEK, off, err);
}

/*
 * The one after that one, or the first. Both queues are locked, and stay as they are: who waits for
 * a datagram looks at sk_receive_queue alone before he sleeps, so only a reader may move any.
 */
static struct sk_buff *pmskb_udp_next(struct sock *sk, const struct sk_buff *skb)
{
	struct sk_buff_head *reader = &udp_sk(sk)->reader_queue;
	struct sk_buff *next = skb ? skb->next : reader->next;

	if (next == (struct sk_buff *)reader)
		next = sk->sk_receive_queue.next;
	return next == (struct sk_buff *)&sk->sk_receive_queue ? NULL : next;
}

/*
 * Datagrams that come after that one (from the first one on, if it is NULL or not in a queue any
 * more), at most max, with a reference of each. Their number.
 */
unsigned int pmskb_udp_after(struct sock *sk, const struct sk_buff *last, struct sk_buff **to,
			     unsigned int max)
{
	struct sk_buff_head *reader = &udp_sk(sk)->reader_queue;
	struct sk_buff *skb;
	unsigned int nr = 0;

	if (!sk_is_udp(sk))
		return 0;
	spin_lock_bh(&reader->lock);
	spin_lock(&sk->sk_receive_queue.lock);
	skb = pmskb_udp_next(sk, last && last->next ? last : NULL);
	for (; skb && nr < max; skb = pmskb_udp_next(sk, skb)) {
		/*
		 * Else a peek at an empty one puts a copy in its place, if there is another
		 * reference. With SO_PEEK_OFF it is passed over now.
		 */
		if (!skb->len && !skb->peeked) {
			if (WARN_ON_ONCE(skb_shared(skb)))
				break;
			skb->peeked = 1;
		}
		to[nr++] = skb_get(skb);
	}
	spin_unlock(&sk->sk_receive_queue.lock);
	spin_unlock_bh(&reader->lock);
	return nr;
}

/* The one before that one, of reader_queue, with a reference; NULL if that is the first. */
struct sk_buff *pmskb_udp_before(struct sock *sk, const struct sk_buff *skb)
{
	struct sk_buff_head *reader = &udp_sk(sk)->reader_queue;
	struct sk_buff *before = NULL;

	spin_lock_bh(&reader->lock);
	if (skb->next && skb->prev != (struct sk_buff *)reader)
		before = skb_get(skb->prev);
	spin_unlock_bh(&reader->lock);
	return before;
}

/* Whether a datagram comes before that one, or is it. Not if one of them is in no queue now. */
bool pmskb_udp_is_upto(struct sock *sk, const struct sk_buff *skb, const struct sk_buff *last)
{
	struct sk_buff_head *reader = &udp_sk(sk)->reader_queue;
	const struct sk_buff *at = NULL;

	spin_lock_bh(&reader->lock);
	spin_lock(&sk->sk_receive_queue.lock);
	if (last->next && skb->next) {
		do
			at = pmskb_udp_next(sk, at);
		while (at && at != skb && at != last);
	}
	spin_unlock(&sk->sk_receive_queue.lock);
	spin_unlock_bh(&reader->lock);
	return at == skb;
}

bool pmskb_udp_is_right(struct sk_buff *skb)
{
	return !udp_lib_checksum_complete(skb);
}

/*
 * Gives back what a datagram was charged, when it leaves reader_queue, whose lock is held. As
 * UDP does, in large portions while there are others.
 */
static void pmskb_udp_uncharge(struct sock *sk, struct sk_buff *skb)
{
	struct udp_sock *up = udp_sk(sk);
	int size = up->forward_deficit + skb->truesize;

	if (size < READ_ONCE(up->forward_threshold) && !skb_queue_empty(&up->reader_queue)) {
		up->forward_deficit = size;
		return;
	}
	up->forward_deficit = 0;
	/* It guards sk_forward_alloc, too. */
	spin_lock(&sk->sk_receive_queue.lock);
	sk_mem_uncharge(sk, size);
	atomic_sub(size, &sk->sk_rmem_alloc);
	spin_unlock(&sk->sk_receive_queue.lock);
}

/* A checksum was wrong. */
void pmskb_udp_discard(struct sock *sk, struct sk_buff *skb)
{
	bool v4 = skb->protocol == htons(ETH_P_IP);

	if (!__sk_queue_drop_skb(sk, &udp_sk(sk)->reader_queue, skb, MSG_PEEK,
				 pmskb_udp_uncharge)) {
		SNMP_INC_STATS(__UDPX_MIB(sk, v4), UDP_MIB_CSUMERRORS);
		SNMP_INC_STATS(__UDPX_MIB(sk, v4), UDP_MIB_INERRORS);
	}
}

/* Takes this one out of the queue; false if somebody else was faster. */
bool pmskb_udp_take(struct sock *sk, struct sk_buff *skb)
{
	struct sk_buff_head *queue = &udp_sk(sk)->reader_queue;
	bool ours = false;

	spin_lock_bh(&queue->lock);
	if (skb->next) {
		__skb_unlink(skb, queue);
		/* The queue's; there is that of the peek. */
		refcount_dec(&skb->users);
		pmskb_udp_uncharge(sk, skb);
		ours = true;
	}
	spin_unlock_bh(&queue->lock);
	return ours;
}

#if IS_ENABLED(CONFIG_IPV6)
static void pmskb_udp6_name(struct sock *sk, struct msghdr *msg, struct sk_buff *skb, bool v4)
{
	DECLARE_SOCKADDR(struct sockaddr_in6 *, sin6, msg->msg_name);

	sin6->sin6_family = AF_INET6;
	sin6->sin6_port = udp_hdr(skb)->source;
	sin6->sin6_flowinfo = 0;
	if (v4) {
		ipv6_addr_set_v4mapped(ip_hdr(skb)->saddr, &sin6->sin6_addr);
		sin6->sin6_scope_id = 0;
	} else {
		sin6->sin6_addr = ipv6_hdr(skb)->saddr;
		sin6->sin6_scope_id = ipv6_iface_scope_id(&sin6->sin6_addr, inet6_iif(skb));
	}
	msg->msg_namelen = sizeof(*sin6);
	BPF_CGROUP_RUN_PROG_UDP6_RECVMSG_LOCK(sk, (struct sockaddr *)sin6, &msg->msg_namelen);
}

/* ip6_datagram_recv_ctl() is for datagrams of IPv6. */
static void pmskb_udp6_mapped_info(struct sock *sk, struct msghdr *msg, struct sk_buff *skb)
{
	struct in6_pktinfo info = { .ipi6_ifindex = PKTINFO_SKB_CB(skb)->ipi_ifindex };

	if (!inet6_sk(sk)->rxopt.bits.rxinfo || info.ipi6_ifindex < 0)
		return;
	ipv6_addr_set_v4mapped(ip_hdr(skb)->daddr, &info.ipi6_addr);
	put_cmsg(msg, SOL_IPV6, IPV6_PKTINFO, sizeof(info), &info);
}
#endif

static void pmskb_udp4_name(struct sock *sk, struct msghdr *msg, struct sk_buff *skb)
{
	DECLARE_SOCKADDR(struct sockaddr_in *, sin, msg->msg_name);

	sin->sin_family = AF_INET;
	sin->sin_port = udp_hdr(skb)->source;
	sin->sin_addr.s_addr = ip_hdr(skb)->saddr;
	memset(sin->sin_zero, 0, sizeof(sin->sin_zero));
	msg->msg_namelen = sizeof(*sin);
	BPF_CGROUP_RUN_PROG_UDP4_RECVMSG_LOCK(sk, (struct sockaddr *)sin, &msg->msg_namelen);
}

/*
 * What UDP's recvmsg() tells of a datagram beside its bytes, in the same order; of one that was
 * peeked at, or taken out of the queue. The socket is not locked. len bytes from off were received.
 */
void pmskb_udp_tell(struct sock *sk, struct msghdr *msg, struct sk_buff *skb, int off, int len,
		    bool peeked)
{
	bool v4 = skb->protocol == htons(ETH_P_IP);
	bool v6_sock = sk->sk_family == AF_INET6;

	if (!peeked)
		SNMP_INC_STATS(__UDPX_MIB(sk, v4), UDP_MIB_INDATAGRAMS);
	sock_recv_cmsgs(msg, sk, skb);
	if (msg->msg_name && !v6_sock)
		pmskb_udp4_name(sk, msg, skb);
#if IS_ENABLED(CONFIG_IPV6)
	if (msg->msg_name && v6_sock)
		pmskb_udp6_name(sk, msg, skb, v4);
#endif
	if (udp_test_bit(GRO_ENABLED, sk))
		udp_cmsg_recv(msg, sk, skb);
#if IS_ENABLED(CONFIG_IPV6)
	if (v6_sock && inet6_sk(sk)->rxopt.all) {
		if (v4)
			pmskb_udp6_mapped_info(sk, msg, skb);
		else
			ip6_datagram_recv_ctl(sk, msg, skb);
	}
#endif
	if (v4 && inet_cmsg_flags(inet_sk(sk)))
		ip_cmsg_recv_offset(msg, sk, skb, sizeof(struct udphdr), off);
	if (unlikely(READ_ONCE(udp_sk(sk)->peeking_with_offset)))
		sk_peek_offset_bwd(sk, peeked ? -len : len);
}

/* A datagram was received whose bytes could not be given out; as UDP counts it. */
void pmskb_udp_lost(struct sock *sk, const struct sk_buff *skb)
{
	bool v4 = skb->protocol == htons(ETH_P_IP);

	udp_drops_inc(sk);
	SNMP_INC_STATS(__UDPX_MIB(sk, v4), UDP_MIB_INERRORS);
}

/* Received bytes for the caller, at the message's iterator. */
int pmskb_skb_copy_to(const struct sk_buff *skb, int off, struct msghdr *msg, int len)
{
	return skb_copy_datagram_msg(skb, off, msg, len);
}

size_t pmskb_msg_room(struct msghdr *msg)
{
	return msg_data_left(msg);
}

/* Takes back what was written last. */
void pmskb_msg_revert(struct msghdr *msg, size_t n)
{
	iov_iter_revert(&msg->msg_iter, n);
}

/*
 * Of a packet that is several datagrams, payload bytes of each but the last; else 0. Who makes one
 * for us (a guest, a tun device) may say anything.
 */
unsigned int pmskb_skb_segment(const struct sk_buff *skb)
{
	const struct skb_shared_info *info = skb_shinfo(skb);

	if (!(info->gso_type & SKB_GSO_UDP_L4) || !info->gso_size ||
	    DIV_ROUND_UP(skb->len, info->gso_size) > UDP_MAX_SEGMENTS)
		return 0;
	return info->gso_size;
}

/* There is something that can be received, though nothing has come. */
void pmskb_sk_tell_ready(struct sock *sk)
{
	void (*ready)(struct sock *sk) = READ_ONCE(sk->sk_data_ready);

	ready(sk);
}

/*
 * IPV6_RECVPATHMTU: that a path has a new MTU is an answer of its own, without a datagram, and
 * comes first.
 */
bool pmskb_udp_tell_mtu(struct sock *sk, struct msghdr *msg)
{
#if IS_ENABLED(CONFIG_IPV6)
	DECLARE_SOCKADDR(struct sockaddr_in6 *, sin6, msg->msg_name);
	struct ip6_mtuinfo info;
	struct ipv6_pinfo *np;
	struct sk_buff *skb;

	if (sk->sk_family != AF_INET6)
		return false;
	np = inet6_sk(sk);
	if (!np->rxopt.bits.rxpmtu || !READ_ONCE(np->rxpmtu))
		return false;
	skb = xchg(&np->rxpmtu, NULL);
	if (!skb)
		return false;
	sock_recv_timestamp(msg, sk, skb);
	memcpy(&info, IP6CBMTU(skb), sizeof(info));
	if (sin6) {
		*sin6 = (struct sockaddr_in6) {
			.sin6_family = AF_INET6,
			.sin6_addr = info.ip6m_addr.sin6_addr,
			.sin6_scope_id = info.ip6m_addr.sin6_scope_id,
		};
		msg->msg_namelen = sizeof(*sin6);
	}
	put_cmsg(msg, SOL_IPV6, IPV6_PATHMTU, sizeof(info), &info);
	kfree_skb(skb);
	return true;
#else
	return false;
#endif
}

void pmskb_udp_flow(const struct sk_buff *skb, struct pmskb_flow *flow)
{
	memset(flow, 0, sizeof(*flow));
	flow->peer_port = ntohs(udp_hdr(skb)->source);
	flow->local_port = ntohs(udp_hdr(skb)->dest);
	if (skb->protocol == htons(ETH_P_IPV6)) {
		flow->version = 6;
		memcpy(flow->peer, &ipv6_hdr(skb)->saddr, 16);
		memcpy(flow->local, &ipv6_hdr(skb)->daddr, 16);
	} else {
		flow->version = 4;
		memcpy(flow->peer, &ip_hdr(skb)->saddr, 4);
		memcpy(flow->local, &ip_hdr(skb)->daddr, 4);
	}
}

/* What was received and not read is lost, and counted. True if there was anything. */
bool pmskb_udp_drop_queues(struct sock *sk)
{
	struct sk_buff_head *queue = &udp_sk(sk)->reader_queue;
	struct sk_buff *skb;
	int size = 0;
	bool any;

	spin_lock_bh(&queue->lock);
	spin_lock(&sk->sk_receive_queue.lock);
	skb_queue_splice_tail_init(&sk->sk_receive_queue, queue);
	any = !skb_queue_empty(queue);
	/* One by one: who peeks at one is to see that it is on no list. */
	while ((skb = __skb_dequeue(queue))) {
		size += skb->truesize;
		udp_drops_inc(sk);
		kfree_skb(skb);
	}
	sk_mem_uncharge(sk, size);
	atomic_sub(size, &sk->sk_rmem_alloc);
	spin_unlock(&sk->sk_receive_queue.lock);
	spin_unlock_bh(&queue->lock);
	return any;
}

/*
 * When a command is first issued, its sqe is the one in the ring, which user space may be
 * writing to; later, a copy. The other fields were copied when it was prepared.
 */
void pmskb_uring_facts(const struct io_uring_cmd *cmd, unsigned int issue_flags,
		       struct pmskb_uring_facts *f)
{
	const struct pmskb_uring *u = io_uring_sqe_cmd(cmd->sqe, struct pmskb_uring);

	f->file = cmd->file;
	f->arg = READ_ONCE(u->arg);
	f->reserved = READ_ONCE(u->reserved);
	f->op = cmd->cmd_op;
	f->flags = cmd->flags & IORING_URING_CMD_MASK;
	f->may_wait = !(issue_flags & IO_URING_F_NONBLOCK);
}
