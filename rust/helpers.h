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

/* Files and regions. */
struct page;
struct file;
struct pipe_inode_info;
struct block_device;
bool pmskb_bdev_is_bad(struct block_device *bdev, u64 sector, u64 nr);
bool pmskb_bdev_is_dax(struct block_device *bdev);
u64 pmskb_bdev_bytes(struct block_device *bdev);
u64 pmskb_bdev_start(struct block_device *bdev);
bool pmskb_file_is_blk(const struct file *file);
bool pmskb_file_is_chr(const struct file *file);
bool pmskb_file_mode_has(const struct file *file, bool write);
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
void pmskb_page_ref_set(struct page *page, int count);
bool pmskb_page_ref_freeze(struct page *page, int count);
void pmskb_page_ref_unfreeze(struct page *page, int count);
void pmskb_page_get(struct page *page);
void pmskb_page_put(struct page *page);
void pmskb_local_bh_disable(void);
void pmskb_local_bh_enable(void);
int pmskb_cpu(void);
unsigned int pmskb_nr_cpus(void);
struct vm_area_struct;
bool pmskb_vma_make_readonly(struct vm_area_struct *vma);
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
u64 pmskb_now(void);
bool pmskb_signal_pending(void);
enum pmskb_cmd {
	PMSKB_CMD_FORMAT = PMSKB_IOC_FORMAT,
	PMSKB_CMD_ATTACH = PMSKB_IOC_ATTACH,
	PMSKB_CMD_DETACH = PMSKB_IOC_DETACH,
	PMSKB_CMD_INFO = PMSKB_IOC_INFO,
	PMSKB_CMD_ATTACH_SOCKET = PMSKB_IOC_ATTACH_SOCKET,
	PMSKB_CMD_SUBMIT = PMSKB_IOC_SUBMIT,
};
const char *pmskb_attach_param(void);

#endif
