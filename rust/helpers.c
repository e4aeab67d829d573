// SPDX-License-Identifier: GPL-2.0
/* C that Rust cannot say: static inlines and macros of kernel headers. */
#include <linux/badblocks.h>
#include <linux/blkdev.h>
#include <linux/memremap.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/page_ref.h>
#include <linux/sched/signal.h>
#include <linux/pipe_fs_i.h>
#include <linux/splice.h>
#include "helpers.h"

static_assert(PMSKB_BLK_OPEN_RW == (__force u32)(BLK_OPEN_READ | BLK_OPEN_WRITE));

void pmskb_wmb(void)
{
	wmb();
}

/* ---- files and regions ---- */

static char *attach;
module_param(attach, charp, 0444);
MODULE_PARM_DESC(attach, "Devices to attach at load, separated by commas");

const char *pmskb_attach_param(void)
{
	return attach;
}

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

void pmskb_page_ref_set(struct page *page, int count)
{
	set_page_count(page, count);
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
	if (vma->vm_flags & VM_WRITE)
		return false;
	vm_flags_mod(vma, VM_PFNMAP | VM_DONTEXPAND | VM_DONTDUMP,
		     VM_MAYWRITE | VM_MAYEXEC);
	return true;
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

static struct attribute *pmskb_node_attrs[] = {
	&dev_attr_uuid.attr,
	&dev_attr_label.attr,
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

bool pmskb_signal_pending(void)
{
	return signal_pending(current);
}
