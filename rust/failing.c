// SPDX-License-Identifier: GPL-2.0
/*
 * What fails on purpose, in builds for tests only: see inject.rs. The linker (--wrap, in the
 * Makefile) makes the module's calls of these functions calls of ours.
 */
#include <linux/anon_inodes.h>
#include <linux/blkdev.h>
#include <linux/err.h>
#include <linux/file.h>
#include <linux/fs.h>
#include <linux/miscdevice.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/netdevice.h>
#include <linux/netfilter.h>
#include <linux/sched.h>
#include <linux/skbuff.h>
#include <linux/uaccess.h>
#include <linux/uio.h>
#include <net/sock.h>
#include "helpers.h"

static uint inject;
module_param(inject, uint, 0644);
MODULE_PARM_DESC(inject, "Every so manieth thing fails, 0: none");
static uint inject_kinds = PMSKB_INJECT_MEMORY | PMSKB_INJECT_FRAMES;
module_param(inject_kinds, uint, 0644);
MODULE_PARM_DESC(inject_kinds,
		 "What fails: 1 allocations, 2 copies of user memory, 4 reads of the media, 8 frames and heads");
static atomic_t injected = ATOMIC_INIT(0);
module_param_named(injected, injected.counter, int, 0444);
MODULE_PARM_DESC(injected, "How many have failed");

/* Whose Nth fails, and how many are left until then: one task at a time. */
static struct task_struct *nth_task;
static uint nth_left;

static int inject_nth_set(const char *val, const struct kernel_param *kp)
{
	uint nth;
	int err = kstrtouint(val, 0, &nth);

	if (err)
		return err;
	nth_left = nth;
	WRITE_ONCE(nth_task, nth ? current : NULL);
	return 0;
}

static const struct kernel_param_ops inject_nth_ops = { .set = inject_nth_set };
module_param_cb(inject_nth, &inject_nth_ops, NULL, 0200);
MODULE_PARM_DESC(inject_nth, "The Nth thing fails from now on in this task, and in softirqs on it; 0: none");

bool pmskb_inject_fails(u32 kind)
{
	static atomic_t asked = ATOMIC_INIT(0);
	uint nth = READ_ONCE(inject);
	bool fails = false;

	if (!(READ_ONCE(inject_kinds) & kind))
		return false;
	if (nth && (uint)atomic_inc_return(&asked) % nth == 0)
		fails = true;
	else if (READ_ONCE(nth_task) == current && nth_left && !--nth_left)
		fails = true;
	if (fails)
		atomic_inc(&injected);
	return fails;
}

#define FAILS(kind) pmskb_inject_fails(PMSKB_INJECT_##kind)

/* The functions themselves, as the linker calls them, and what is called instead. */
__typeof__(napi_build_skb) __real_napi_build_skb, __wrap_napi_build_skb;
__typeof__(slab_build_skb) __real_slab_build_skb, __wrap_slab_build_skb;
__typeof__(alloc_netdev_dummy) __real_alloc_netdev_dummy, __wrap_alloc_netdev_dummy;
__typeof__(anon_inode_create_getfile) __real_anon_inode_create_getfile;
__typeof__(anon_inode_create_getfile) __wrap_anon_inode_create_getfile;
__typeof__(bdev_file_open_by_dev) __real_bdev_file_open_by_dev, __wrap_bdev_file_open_by_dev;
__typeof__(misc_register) __real_misc_register, __wrap_misc_register;
__typeof__(nf_register_net_hooks) __real_nf_register_net_hooks, __wrap_nf_register_net_hooks;
__typeof__(do_sock_setsockopt) __real_do_sock_setsockopt, __wrap_do_sock_setsockopt;
__typeof__(copy_splice_read) __real_copy_splice_read, __wrap_copy_splice_read;
__typeof__(vmf_insert_pfn) __real_vmf_insert_pfn, __wrap_vmf_insert_pfn;
__typeof__(vmf_insert_pfn_prot) __real_vmf_insert_pfn_prot, __wrap_vmf_insert_pfn_prot;
__typeof__(_copy_from_user) __real__copy_from_user, __wrap__copy_from_user;
__typeof__(_copy_to_user) __real__copy_to_user, __wrap__copy_to_user;
__typeof__(_copy_from_iter) __real__copy_from_iter, __wrap__copy_from_iter;
__typeof__(_copy_mc_to_iter) __real__copy_mc_to_iter, __wrap__copy_mc_to_iter;
__typeof__(put_cmsg) __real_put_cmsg, __wrap_put_cmsg;
__typeof__(copy_mc_to_kernel) __real_copy_mc_to_kernel, __wrap_copy_mc_to_kernel;

/* FAILING(kind, what it answers then, type, function, (parameters), (arguments)). */
#define FAILING(kind, otherwise, type, function, parameters, arguments)	\
	type __wrap_##function parameters				\
	{								\
		if (FAILS(kind))					\
			return otherwise;				\
		return __real_##function arguments;			\
	}								\
	struct pmskb_takes_a_semicolon

/* What the kernel has for Rust, of which C knows nothing. A size of 0 frees. */
void *pmskb_realloc(const void *old, size_t size, unsigned long align, gfp_t flags, int node);
__typeof__(pmskb_realloc) __real_rust_helper_krealloc_node_align;
__typeof__(pmskb_realloc) __wrap_rust_helper_krealloc_node_align;
void *__wrap_rust_helper_krealloc_node_align(const void *old, size_t size, unsigned long align,
					     gfp_t flags, int node)
{
	if (size && FAILS(MEMORY))
		return NULL;
	return __real_rust_helper_krealloc_node_align(old, size, align, flags, node);
}

__typeof__(pmskb_realloc) __real_rust_helper_kvrealloc_node_align;
__typeof__(pmskb_realloc) __wrap_rust_helper_kvrealloc_node_align;
void *__wrap_rust_helper_kvrealloc_node_align(const void *old, size_t size, unsigned long align,
					      gfp_t flags, int node)
{
	if (size && FAILS(MEMORY))
		return NULL;
	return __real_rust_helper_kvrealloc_node_align(old, size, align, flags, node);
}

FAILING(MEMORY, NULL, struct sk_buff *, napi_build_skb,
	(void *data, unsigned int size), (data, size));
FAILING(MEMORY, NULL, struct sk_buff *, slab_build_skb, (void *data), (data));
FAILING(MEMORY, NULL, struct net_device *, alloc_netdev_dummy, (int size), (size));
FAILING(MEMORY, ERR_PTR(-ENOMEM), struct file *, anon_inode_create_getfile,
	(const char *name, const struct file_operations *fops, void *priv, int flags,
	 const struct inode *inode),
	(name, fops, priv, flags, inode));
FAILING(MEMORY, ERR_PTR(-ENOMEM), struct file *, bdev_file_open_by_dev,
	(dev_t dev, blk_mode_t mode, void *holder, const struct blk_holder_ops *ops),
	(dev, mode, holder, ops));
FAILING(MEMORY, -ENOMEM, int, misc_register, (struct miscdevice *misc), (misc));
FAILING(MEMORY, -ENOMEM, int, nf_register_net_hooks,
	(struct net *net, const struct nf_hook_ops *ops, unsigned int nr), (net, ops, nr));
FAILING(MEMORY, -ENOMEM, int, do_sock_setsockopt,
	(struct socket *sock, bool compat, int level, int name, sockptr_t value, int len),
	(sock, compat, level, name, value, len));
FAILING(MEMORY, -ENOMEM, ssize_t, copy_splice_read,
	(struct file *in, loff_t *pos, struct pipe_inode_info *pipe, size_t len,
	 unsigned int flags),
	(in, pos, pipe, len, flags));
FAILING(MEMORY, VM_FAULT_OOM, vm_fault_t, vmf_insert_pfn,
	(struct vm_area_struct *vma, unsigned long addr, unsigned long pfn), (vma, addr, pfn));
FAILING(MEMORY, VM_FAULT_OOM, vm_fault_t, vmf_insert_pfn_prot,
	(struct vm_area_struct *vma, unsigned long addr, unsigned long pfn, pgprot_t prot),
	(vma, addr, pfn, prot));

FAILING(COPIES, n, unsigned long, _copy_from_user,
	(void *to, const void __user *from, unsigned long n),
	(to, from, n));
FAILING(COPIES, n, unsigned long, _copy_to_user,
	(void __user *to, const void *from, unsigned long n),
	(to, from, n));
FAILING(COPIES, 0, size_t, _copy_from_iter,
	(void *to, size_t len, struct iov_iter *i), (to, len, i));
FAILING(COPIES, 0, size_t, _copy_mc_to_iter, (const void *from, size_t len, struct iov_iter *i),
	(from, len, i));
FAILING(COPIES, -EFAULT, int, put_cmsg,
	(struct msghdr *msg, int level, int type, int len, void *data),
	(msg, level, type, len, data));

FAILING(MEDIA, len, unsigned long, copy_mc_to_kernel,
	(void *to, const void *from, unsigned int len), (to, from, len));
