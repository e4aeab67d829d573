// SPDX-License-Identifier: GPL-2.0
/*
 * Promises about regions and the control device: format, attach, detach, and
 * what they refuse.
 */
#include "common.h"
#include "media.h"

#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <linux/blkpg.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <time.h>

#include "harness.h"

#define ERRNO(call) ((call) < 0 ? errno : 0)

/* ---- without a region ---- */

TEST(only_the_administrator_may_open_the_control_device_by_default)
{
	struct stat st;

	ASSERT_EQ(0, stat("/dev/pmskb", &st));
	EXPECT_TRUE(S_ISCHR(st.st_mode));
	EXPECT_EQ(0, st.st_uid);
	EXPECT_EQ(0600, st.st_mode & 0777);
}

TEST(the_control_device_needs_cap_sys_admin_for_every_command)
{
	struct pmskb_format f = { .fd = -1 };
	struct pmskb_attach a = { .fd = -1 };
	struct pmskb_detach d = { .minor = 9999 };
	int ctl = ctl_open();

	ASSERT_LE(0, ctl);
	/* Opened by root, used by nobody. */
	ASSERT_EQ(0, setgroups(0, NULL));
	ASSERT_EQ(0, setresgid(65534, 65534, 65534));
	ASSERT_EQ(0, setresuid(65534, 65534, 65534));
	EXPECT_EQ(EPERM, ERRNO(ioctl(ctl, PMSKB_IOC_FORMAT, &f)));
	EXPECT_EQ(EPERM, ERRNO(ioctl(ctl, PMSKB_IOC_ATTACH, &a)));
	EXPECT_EQ(EPERM, ERRNO(ioctl(ctl, PMSKB_IOC_DETACH, &d)));
}

TEST(unknown_ioctls_of_the_control_device_are_enotty)
{
	int ctl = ctl_open();
	char buf[256] = {};

	ASSERT_LE(0, ctl);
	EXPECT_EQ(ENOTTY, ERRNO(ioctl(ctl, _IO(PMSKB_IOC_MAGIC, 0x7f), 0)));
	EXPECT_EQ(ENOTTY, ERRNO(ioctl(ctl, PMSKB_IOC_INFO, buf)));
	EXPECT_EQ(ENOTTY, ERRNO(ioctl(ctl, PMSKB_IOC_SUBMIT, buf)));
	/* The right number with another size is another command. */
	EXPECT_EQ(ENOTTY, ERRNO(ioctl(ctl, _IOWR(PMSKB_IOC_MAGIC, 0x01, char[64]), buf)));
	EXPECT_EQ(ENOTTY, ERRNO(ioctl(ctl, _IOW(PMSKB_IOC_MAGIC, 0x02, struct pmskb_attach), buf)));
	EXPECT_EQ(ENOTTY, ERRNO(ioctl(ctl, 0x5401 /* TCGETS */, buf)));
}

TEST(bad_pointers_to_the_control_device_are_efault)
{
	int ctl = ctl_open();

	ASSERT_LE(0, ctl);
	EXPECT_EQ(EFAULT, ERRNO(ioctl(ctl, PMSKB_IOC_FORMAT, BAD_PTR)));
	EXPECT_EQ(EFAULT, ERRNO(ioctl(ctl, PMSKB_IOC_ATTACH, BAD_PTR)));
	EXPECT_EQ(EFAULT, ERRNO(ioctl(ctl, PMSKB_IOC_DETACH, BAD_PTR)));
	EXPECT_EQ(EFAULT, ERRNO(ioctl(ctl, PMSKB_IOC_FORMAT, NULL)));
	/* The kernel's half of the address space. */
	EXPECT_EQ(EFAULT, ERRNO(ioctl(ctl, PMSKB_IOC_FORMAT, (void *)0xffff888000000000UL)));
}

TEST(detach_of_a_minor_that_is_no_store_is_enodev)
{
	int ctl = ctl_open();

	ASSERT_LE(0, ctl);
	EXPECT_EQ(-ENODEV, dev_detach(ctl, 9999, 0));
	EXPECT_EQ(-ENODEV, dev_detach(ctl, ~0U, 0));
}

TEST(reserved_fields_and_unknown_flags_of_detach_are_einval)
{
	struct pmskb_detach d = { .minor = 9999, .reserved = 1 };
	int ctl = ctl_open();

	ASSERT_LE(0, ctl);
	EXPECT_EQ(EINVAL, ERRNO(ioctl(ctl, PMSKB_IOC_DETACH, &d)));
}

static int both(int ctl, int fd, int *format)
{
	struct pmskb_attach a;

	*format = dev_format(ctl, fd, 0, 0);
	return dev_attach(ctl, fd, &a);
}

TEST(what_is_not_a_dax_device_is_refused_by_name_of_the_reason)
{
	int ctl = ctl_open(), fd, pipes[2], f;
	char name[] = "/tmp/pmskb-not-a-device-XXXXXX";

	ASSERT_LE(0, ctl);

	EXPECT_EQ(-EBADF, both(ctl, -1, &f));
	EXPECT_EQ(-EBADF, f);
	EXPECT_EQ(-EBADF, both(ctl, 1000, &f));
	EXPECT_EQ(-EBADF, f);

	fd = mkstemp(name);
	ASSERT_LE(0, fd);
	unlink(name);
	ASSERT_EQ(0, ftruncate(fd, 64 << 20));
	EXPECT_EQ(-ENOTBLK, both(ctl, fd, &f)) TH_LOG("a regular file");
	EXPECT_EQ(-ENOTBLK, f) TH_LOG("a regular file");
	close(fd);

	ASSERT_EQ(0, pipe(pipes));
	EXPECT_EQ(-ENOTBLK, both(ctl, socket(AF_INET, SOCK_STREAM, 0), &f)) TH_LOG("a socket");
	EXPECT_EQ(-ENOTBLK, f) TH_LOG("a socket");
	EXPECT_NE(0, both(ctl, pipes[1], &f)) TH_LOG("a pipe");
	EXPECT_NE(0, f) TH_LOG("a pipe");

	fd = open("/dev/null", O_RDWR);
	ASSERT_LE(0, fd);
	EXPECT_EQ(-ENODEV, both(ctl, fd, &f)) TH_LOG("/dev/null");
	EXPECT_EQ(-ENODEV, f) TH_LOG("/dev/null");
	close(fd);

	EXPECT_EQ(-ENODEV, both(ctl, ctl, &f)) TH_LOG("/dev/pmskb itself");
	EXPECT_EQ(-ENODEV, f) TH_LOG("/dev/pmskb itself");
}

/* ---- with one ---- */

FIXTURE(region) {
	const char *path;
	int ctl, dev;
};

FIXTURE_VARIANT(region) {
	enum dev dev;
};

FIXTURE_VARIANT_ADD(region, pmem) { .dev = DEV_PMEM };
FIXTURE_VARIANT_ADD(region, dax) { .dev = DEV_DAX };

FIXTURE_SETUP(region)
{
	const char *why;

	self->path = dev_path(variant->dev, &why);
	if (!self->path)
		SKIP(return, "%s", why);
	self->ctl = ctl_open();
	ASSERT_LE(0, self->ctl);
	self->dev = open(self->path, O_RDWR | O_CLOEXEC);
	ASSERT_LE(0, self->dev);
	dev_sweep(self->ctl);
}

FIXTURE_TEARDOWN(region)
{
	dev_sweep(self->ctl);
}

TEST_F(region, a_formatted_region_attaches_and_has_a_device_node_until_detached)
{
	struct pmskb_store_info info;
	struct pmskb_attach a;
	char path[40];
	struct stat st;
	int fd;

	ASSERT_EQ(0, dev_format(self->ctl, self->dev, PMSKB_FORMAT_FORCE, 0));
	ASSERT_EQ(0, dev_attach(self->ctl, self->dev, &a));
	snprintf(path, sizeof(path), "/dev/pmskb%u", a.minor);
	ASSERT_EQ(0, stat(path, &st)) TH_LOG("%s", path);
	EXPECT_TRUE(S_ISCHR(st.st_mode));
	EXPECT_EQ(0, st.st_mode & 07) TH_LOG("others may use it");
	EXPECT_EQ(0, st.st_uid);
	EXPECT_EQ(0, st.st_gid);

	fd = open(path, O_RDONLY);
	ASSERT_LE(0, fd);
	ASSERT_EQ(0, ioctl(fd, PMSKB_IOC_INFO, &info));
	EXPECT_EQ(a.minor, info.minor);
	EXPECT_EQ(0, info.flags);
	EXPECT_EQ(0, memcmp(a.uuid, info.uuid, 16));
	EXPECT_STREQ(TEST_LABEL, (char *)info.label);
	close(fd);

	ASSERT_EQ(0, dev_detach(self->ctl, a.minor, 0));
	EXPECT_EQ(-1, stat(path, &st));
	EXPECT_EQ(ENOENT, errno);
	EXPECT_EQ(-ENODEV, dev_detach(self->ctl, a.minor, 0));

	/* And again: the same store. */
	{
		uint8_t uuid[16];

		memcpy(uuid, a.uuid, 16);
		ASSERT_EQ(0, dev_attach(self->ctl, self->dev, &a));
		EXPECT_EQ(0, memcmp(uuid, a.uuid, 16));
		EXPECT_EQ(0, dev_detach(self->ctl, a.minor, 0));
	}
}

TEST_F(region, an_empty_store_accounts_for_all_of_its_region)
{
	struct pmskb_store_info i;
	struct pmskb_attach a;
	char path[40];
	int fd;

	ASSERT_EQ(0, dev_format(self->ctl, self->dev, PMSKB_FORMAT_FORCE, 0));
	ASSERT_EQ(0, dev_attach(self->ctl, self->dev, &a));
	snprintf(path, sizeof(path), "/dev/pmskb%u", a.minor);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	ASSERT_LE(0, fd);
	ASSERT_EQ(0, ioctl(fd, PMSKB_IOC_INFO, &i));
	close(fd);

	EXPECT_EQ(0, i.head_off % PMSKB_FRAME_SIZE);
	EXPECT_EQ(0, i.head_len % PMSKB_FRAME_SIZE);
	EXPECT_EQ(0, i.data_off % PMSKB_FRAME_SIZE);
	EXPECT_LE(i.head_off + i.head_len, i.data_off);
	EXPECT_LT(i.data_off, i.map_len);
	EXPECT_LE(i.map_len, i.region_len);
	EXPECT_EQ(i.head_len / PMSKB_FRAME_SIZE, i.heads_total);
	EXPECT_EQ(i.heads_total, i.heads_free);
	/* 1/16 of the region, rounded up for alignment. */
	EXPECT_LE(i.region_len / 16, i.head_len);
	EXPECT_GE(i.region_len / 16 + (4 << 20), i.head_len);
	EXPECT_GE(i.region_len - i.data_off, i.frames_total * PMSKB_FRAME_SIZE);
	EXPECT_LE(i.region_len - i.data_off - 64 * PMSKB_FRAME_SIZE, i.frames_total * PMSKB_FRAME_SIZE);
	EXPECT_EQ(i.frames_total, i.frames_free + i.frames_payload + i.frames_record +
		  i.frames_list + i.frames_index + i.frames_held + i.frames_limbo + i.frames_bad);
	EXPECT_EQ(0, i.records);
	EXPECT_EQ(0, i.keys);
	EXPECT_EQ(0, i.live_bytes);
	EXPECT_EQ(0, i.durable_seq);
	EXPECT_EQ(0, i.sockets);
	EXPECT_EQ(0, i.tokens);
	EXPECT_EQ(0, i.counters.placed);
}

TEST_F(region, format_keeps_to_uuid_label_and_size_of_the_head_area)
{
	struct pmskb_format f = {
		.fd = self->dev,
		.flags = PMSKB_FORMAT_FORCE,
		.uuid = { 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16 },
		.label = TEST_LABEL,
		.head_bytes = 10 << 20,
	};
	uint8_t given[16], random1[16];
	struct store s;

	memcpy(given, f.uuid, 16);
	ASSERT_EQ(0, ioctl(self->ctl, PMSKB_IOC_FORMAT, &f));
	EXPECT_EQ(0, memcmp(given, f.uuid, 16));
	ASSERT_EQ(0, store_open(&s, variant->dev));
	EXPECT_EQ(0, memcmp(given, s.uuid, 16));
	EXPECT_LE(10 << 20, s.info.head_len);
	EXPECT_GT(13 << 20, s.info.head_len);
	ASSERT_EQ(0, store_close(&s));

	memset(f.uuid, 0, 16);
	f.flags |= PMSKB_FORMAT_HEADS_DRAM;
	f.head_bytes = 0;
	ASSERT_EQ(0, ioctl(self->ctl, PMSKB_IOC_FORMAT, &f));
	memcpy(random1, f.uuid, 16);
	ASSERT_EQ(0, store_open(&s, variant->dev));
	EXPECT_EQ(0, memcmp(random1, s.uuid, 16)) TH_LOG("the uuid that format told is not the store's");
	EXPECT_EQ(0, s.info.head_len);
	EXPECT_EQ(0, s.info.heads_total);
	ASSERT_EQ(0, store_close(&s));

	memset(f.uuid, 0, 16);
	f.flags = PMSKB_FORMAT_FORCE;
	/* A label may use all of its bytes. */
	memset(f.label, 'x', sizeof(f.label));
	ASSERT_EQ(0, ioctl(self->ctl, PMSKB_IOC_FORMAT, &f));
	EXPECT_NE(0, memcmp(random1, f.uuid, 16)) TH_LOG("two random uuids are the same");
	ASSERT_EQ(0, store_open(&s, variant->dev));
	EXPECT_EQ(0, memcmp(f.label, s.info.label, sizeof(f.label)));
	ASSERT_EQ(0, store_close(&s));
}

TEST_F(region, uuid_and_label_are_in_sysfs)
{
	char path[128], uuid[64] = "", label[64] = "", want[64];
	struct store s;
	FILE *f;
	int i, n = 0;

	ASSERT_EQ(0, store_make(&s, variant->dev, 0, 0));
	snprintf(path, sizeof(path), "/sys/class/misc/pmskb%u/uuid", s.minor);
	f = fopen(path, "r");
	EXPECT_NE(NULL, f) TH_LOG("%s", path);
	if (f) {
		EXPECT_NE(NULL, fgets(uuid, sizeof(uuid), f));
		fclose(f);
	}
	for (i = 0; i < 16; i++)
		n += sprintf(want + n, "%s%02x", i == 4 || i == 6 || i == 8 || i == 10 ? "-" : "",
			     s.uuid[i]);
	strcat(want, "\n");
	EXPECT_STREQ(want, uuid);
	snprintf(path, sizeof(path), "/sys/class/misc/pmskb%u/label", s.minor);
	f = fopen(path, "r");
	EXPECT_NE(NULL, f) TH_LOG("%s", path);
	if (f) {
		EXPECT_NE(NULL, fgets(label, sizeof(label), f));
		fclose(f);
	}
	EXPECT_STREQ(TEST_LABEL "\n", label);
	EXPECT_EQ(0, store_close(&s));
	EXPECT_EQ(-1, access(path, F_OK));
}

TEST_F(region, format_refuses_what_holds_a_store_unless_forced)
{
	struct pmskb_attach a;

	ASSERT_EQ(0, dev_format(self->ctl, self->dev, PMSKB_FORMAT_FORCE, 0));
	EXPECT_EQ(-EEXIST, dev_format(self->ctl, self->dev, 0, 0));
	/* It was not harmed. */
	ASSERT_EQ(0, dev_attach(self->ctl, self->dev, &a));
	ASSERT_EQ(0, dev_detach(self->ctl, a.minor, 0));
}

TEST_F(region, reserved_fields_and_unknown_flags_of_format_are_einval)
{
	struct pmskb_format f, ok = { .fd = self->dev, .flags = PMSKB_FORMAT_FORCE, .label = TEST_LABEL };
	struct pmskb_attach a;
	uint8_t uuid[16];
	int i;

	ASSERT_EQ(0, dev_format(self->ctl, self->dev, PMSKB_FORMAT_FORCE, 0));
	ASSERT_EQ(0, dev_attach(self->ctl, self->dev, &a));
	memcpy(uuid, a.uuid, 16);
	ASSERT_EQ(0, dev_detach(self->ctl, a.minor, 0));

	for (i = 0; i < 4; i++) {
		f = ok;
		f.reserved[i] = 1ULL << 63;
		EXPECT_EQ(EINVAL, ERRNO(ioctl(self->ctl, PMSKB_IOC_FORMAT, &f)));
	}
	for (i = 2; i < 32; i++) {
		f = ok;
		f.flags |= 1U << i;
		EXPECT_EQ(EINVAL, ERRNO(ioctl(self->ctl, PMSKB_IOC_FORMAT, &f))) TH_LOG("bit %d", i);
	}
	f = ok;
	f.flags |= PMSKB_FORMAT_HEADS_DRAM;
	f.head_bytes = 1 << 20;
	EXPECT_EQ(EINVAL, ERRNO(ioctl(self->ctl, PMSKB_IOC_FORMAT, &f))) TH_LOG("a head area, and none");
	f = ok;
	f.label[PMSKB_LABEL_LEN - 1] = 'x';
	EXPECT_EQ(EINVAL, ERRNO(ioctl(self->ctl, PMSKB_IOC_FORMAT, &f))) TH_LOG("a label that goes on after its end");

	/* None of it has formatted anything. */
	ASSERT_EQ(0, dev_attach(self->ctl, self->dev, &a));
	EXPECT_EQ(0, memcmp(uuid, a.uuid, 16));
	ASSERT_EQ(0, dev_detach(self->ctl, a.minor, 0));
}

TEST_F(region, reserved_fields_and_unknown_flags_of_attach_are_einval)
{
	struct pmskb_attach a = { .fd = self->dev, .flags = PMSKB_ATTACH_CRC32C << 1 };

	ASSERT_EQ(0, dev_format(self->ctl, self->dev, PMSKB_FORMAT_FORCE, 0));
	EXPECT_EQ(EINVAL, ERRNO(ioctl(self->ctl, PMSKB_IOC_ATTACH, &a)));
	a.flags = 0;
	a.reserved = 1;
	EXPECT_EQ(EINVAL, ERRNO(ioctl(self->ctl, PMSKB_IOC_ATTACH, &a)));
}

TEST_F(region, a_head_area_that_leaves_no_room_is_enospc)
{
	struct store s;

	ASSERT_EQ(0, store_make(&s, variant->dev, 0, 0));
	ASSERT_EQ(0, store_close(&s));
	EXPECT_EQ(-ENOSPC, dev_format(self->ctl, self->dev, PMSKB_FORMAT_FORCE, s.info.region_len));
	EXPECT_EQ(-ENOSPC, dev_format(self->ctl, self->dev, PMSKB_FORMAT_FORCE, s.info.region_len / 4096 * 4096 - 4096));
	EXPECT_EQ(-ENOSPC, dev_format(self->ctl, self->dev, PMSKB_FORMAT_FORCE, ~0ULL - 4095));
	EXPECT_EQ(-ENOSPC, dev_format(self->ctl, self->dev, PMSKB_FORMAT_FORCE, 1ULL << 63));
	/* What was there is still there. */
	ASSERT_EQ(0, store_open(&s, variant->dev));
	ASSERT_EQ(0, store_close(&s));
}

TEST_F(region, a_store_cannot_be_attached_twice_or_formatted_under_way)
{
	struct pmskb_attach a, b;
	int second;

	ASSERT_EQ(0, dev_format(self->ctl, self->dev, PMSKB_FORMAT_FORCE, 0));
	ASSERT_EQ(0, dev_attach(self->ctl, self->dev, &a));
	EXPECT_EQ(-EBUSY, dev_attach(self->ctl, self->dev, &b));
	second = open(self->path, O_RDWR | O_CLOEXEC);
	if (second >= 0) {
		EXPECT_EQ(-EBUSY, dev_attach(self->ctl, second, &b));
		EXPECT_EQ(-EBUSY, dev_format(self->ctl, second, PMSKB_FORMAT_FORCE, 0));
		close(second);
	} else {
		EXPECT_EQ(EBUSY, errno);
	}
	EXPECT_EQ(-EBUSY, dev_format(self->ctl, self->dev, PMSKB_FORMAT_FORCE, 0));
	EXPECT_EQ(0, dev_detach(self->ctl, a.minor, 0));
}

TEST_F(region, a_descriptor_that_is_not_open_for_both_is_eacces)
{
	int fd = open(self->path, O_RDONLY | O_CLOEXEC);
	struct pmskb_attach a;

	ASSERT_LE(0, fd);
	ASSERT_EQ(0, dev_format(self->ctl, self->dev, PMSKB_FORMAT_FORCE, 0));
	EXPECT_EQ(-EACCES, dev_format(self->ctl, fd, PMSKB_FORMAT_FORCE, 0));
	EXPECT_EQ(-EACCES, dev_attach(self->ctl, fd, &a));
	close(fd);
}

TEST_F(region, the_device_can_be_closed_while_it_is_attached)
{
	struct pmskb_attach a;

	ASSERT_EQ(0, dev_format(self->ctl, self->dev, PMSKB_FORMAT_FORCE, 0));
	ASSERT_EQ(0, dev_attach(self->ctl, self->dev, &a));
	close(self->dev);
	self->dev = -1;
	close(self->ctl);
	self->ctl = ctl_open();
	EXPECT_EQ(0, dev_detach(self->ctl, a.minor, 0));
}

TEST_F(region, detach_with_an_open_descriptor_or_mapping_is_ebusy)
{
	struct store s;
	void *map;

	ASSERT_EQ(0, store_make(&s, variant->dev, 0, 0));
	EXPECT_EQ(-EBUSY, dev_detach(s.ctl, s.minor, 100)) TH_LOG("open and mapped");
	munmap((void *)s.map, s.map_len);
	EXPECT_EQ(-EBUSY, dev_detach(s.ctl, s.minor, 100)) TH_LOG("open");
	map = mmap(NULL, s.map_len, PROT_READ, MAP_SHARED, s.fd, 0);
	ASSERT_NE(MAP_FAILED, map);
	s.map = NULL;
	close(s.fd);
	EXPECT_EQ(-EBUSY, dev_detach(s.ctl, s.minor, 100)) TH_LOG("mapped, and closed");
	/* The mapping still works, and the store has not half gone. */
	EXPECT_EQ(0, memcmp((uint8_t *)map + SB_UUID, s.uuid, 16));
	s.fd = open(s.path, O_RDONLY | O_CLOEXEC);
	EXPECT_LE(0, s.fd);
	munmap(map, s.map_len);
	EXPECT_EQ(0, store_close(&s));
}

TEST_F(region, detach_with_an_attached_socket_is_ebusy)
{
	struct net net = { AF_INET, LINK_LO };
	struct store s;
	struct conn c;

	ASSERT_EQ(0, store_make(&s, variant->dev, 0, 0));
	ASSERT_EQ(0, conn_make(&c, &net, s.fd, HOW_ACCEPTED_IOCTL));
	store_let_go(&s);
	EXPECT_EQ(-EBUSY, dev_detach(s.ctl, s.minor, 100));
	conn_close(&c);
	EXPECT_EQ(0, store_close(&s));
}

TEST_F(region, an_attach_whose_answer_cannot_be_written_leaves_nothing_attached)
{
	struct pmskb_attach *a = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	ASSERT_NE(MAP_FAILED, a);
	ASSERT_EQ(0, dev_format(self->ctl, self->dev, PMSKB_FORMAT_FORCE, 0));
	a->fd = self->dev;
	ASSERT_EQ(0, mprotect(a, 4096, PROT_READ));
	EXPECT_EQ(EFAULT, ERRNO(ioctl(self->ctl, PMSKB_IOC_ATTACH, a)));
	/* Else: EBUSY. */
	EXPECT_EQ(0, dev_format(self->ctl, self->dev, PMSKB_FORMAT_FORCE, 0));
}

TEST_F(region, detach_with_no_time_out_given_waits_at_most_two_seconds_or_so)
{
	struct timespec t0, t1;
	struct store s;

	ASSERT_EQ(0, store_make(&s, variant->dev, 0, 0));
	clock_gettime(CLOCK_MONOTONIC, &t0);
	EXPECT_EQ(-EBUSY, dev_detach(s.ctl, s.minor, 0));
	clock_gettime(CLOCK_MONOTONIC, &t1);
	EXPECT_GE(10 * slowness(), t1.tv_sec - t0.tv_sec);
	EXPECT_EQ(0, store_close(&s));
}

/* ---- on media: block devices only ---- */

FIXTURE(media) {
	const char *path;
	int ctl, dev;
	int64_t size;
	uint64_t last;		/* offset of the last superblock */
	uint8_t uuid[16];
};

FIXTURE_SETUP(media)
{
	struct pmskb_store_info info;
	const char *why;
	struct store s;

	self->path = dev_path(DEV_PMEM, &why);
	if (!self->path)
		SKIP(return, "%s", why);
	self->ctl = ctl_open();
	ASSERT_LE(0, self->ctl);
	ASSERT_EQ(0, store_make(&s, DEV_PMEM, 0, 0));
	ASSERT_EQ(0, store_info(&s, &info));
	memcpy(self->uuid, s.uuid, 16);
	ASSERT_EQ(0, store_close(&s));
	self->dev = open(self->path, O_RDWR | O_CLOEXEC);
	ASSERT_LE(0, self->dev);
	self->size = media_size(self->path);
	ASSERT_LT(0, self->size);
	self->last = info.region_len - 4096;
}

FIXTURE_TEARDOWN(media)
{
	dev_sweep(self->ctl);
}

static int try_attach(int ctl, int dev, struct pmskb_attach *a)
{
	int err = dev_attach(ctl, dev, a);

	if (!err)
		err = dev_detach(ctl, a->minor, 0);
	return err;
}

TEST_F(media, format_writes_two_checksummed_superblocks)
{
	uint8_t first[4096], last[4096];

	ASSERT_EQ(0, media_read(self->path, 0, first, sizeof(first)));
	ASSERT_EQ(0, media_read(self->path, self->last, last, sizeof(last)));
	EXPECT_TRUE(sb_valid(first));
	EXPECT_TRUE(sb_valid(last));
	EXPECT_EQ(0, memcmp(first + SB_UUID, self->uuid, 16));
	EXPECT_EQ(0, memcmp(last + SB_UUID, self->uuid, 16));
	EXPECT_STREQ(TEST_LABEL, (char *)first + SB_LABEL);
	EXPECT_EQ(self->last + 4096, get64(first + SB_REGION_LEN));
	EXPECT_GE(self->size, get64(first + SB_REGION_LEN));
}

TEST_F(media, a_blank_region_is_emediumtype)
{
	struct pmskb_attach a;

	ASSERT_EQ(0, media_zero(self->path, 0, 128 << 10));
	ASSERT_EQ(0, media_zero(self->path, self->last - (60 << 10), 64 << 10));
	EXPECT_EQ(-EMEDIUMTYPE, dev_attach(self->ctl, self->dev, &a));
	/* It needs no force. */
	EXPECT_EQ(0, dev_format(self->ctl, self->dev, 0, 0));
	EXPECT_EQ(0, try_attach(self->ctl, self->dev, &a));
}

TEST_F(media, foreign_content_is_not_a_store_and_not_formatted_over_unless_forced)
{
	static const struct { const char *what; uint64_t off; } at[] = {
		{ "first sector", 0 }, { "ext4's superblock", 1024 }, { "XFS or LVM, 4 KiB", 4096 },
		{ "btrfs's superblock", 65536 }, { "second GPT", ~0ULL },
	};
	uint8_t page[4096], now[4096];
	struct pmskb_attach a;
	size_t i;

	for (i = 0; i < ARRAY_LEN(at); i++) {
		uint64_t off = at[i].off == ~0ULL ? self->last : at[i].off / 4096 * 4096;

		ASSERT_EQ(0, media_zero(self->path, 0, 128 << 10));
		ASSERT_EQ(0, media_zero(self->path, self->last - (60 << 10), 64 << 10));
		memset(page, 0, sizeof(page));
		memcpy(page + (at[i].off == ~0ULL ? 4096 - 512 : at[i].off % 4096), "EFI PART", 8);
		ASSERT_EQ(0, media_write(self->path, off, page, sizeof(page)));
		EXPECT_EQ(-EEXIST, dev_format(self->ctl, self->dev, 0, 0)) TH_LOG("%s", at[i].what);
		EXPECT_EQ(-EMEDIUMTYPE, dev_attach(self->ctl, self->dev, &a)) TH_LOG("%s", at[i].what);
		ASSERT_EQ(0, media_read(self->path, off, now, sizeof(now)));
		EXPECT_EQ(0, memcmp(page, now, sizeof(now))) TH_LOG("%s was changed", at[i].what);
	}
	EXPECT_EQ(0, dev_format(self->ctl, self->dev, PMSKB_FORMAT_FORCE, 0));
	EXPECT_EQ(0, try_attach(self->ctl, self->dev, &a));
}

TEST_F(media, one_damaged_superblock_is_made_again_from_the_other)
{
	uint8_t first[4096], last[4096];
	struct pmskb_attach a;
	int i;

	for (i = 0; i < 4; i++) {
		uint64_t bad = i & 1 ? self->last : 0;

		ASSERT_EQ(0, i < 2 ? sb_patch(self->path, bad, SB_LABEL, "X", 1, false) :
				     media_zero(self->path, bad, 4096));
		ASSERT_EQ(0, try_attach(self->ctl, self->dev, &a)) TH_LOG("damage %d", i);
		EXPECT_EQ(0, memcmp(a.uuid, self->uuid, 16));
		ASSERT_EQ(0, media_read(self->path, 0, first, sizeof(first)));
		ASSERT_EQ(0, media_read(self->path, self->last, last, sizeof(last)));
		EXPECT_TRUE(sb_valid(first)) TH_LOG("damage %d", i);
		EXPECT_TRUE(sb_valid(last)) TH_LOG("damage %d", i);
		EXPECT_EQ(get64(first + SB_UPDATE), get64(last + SB_UPDATE));
		EXPECT_STREQ(TEST_LABEL, (char *)first + SB_LABEL);
	}
}

TEST_F(media, two_damaged_superblocks_are_euclean_and_nothing_is_written)
{
	uint8_t before[4096], after[4096];
	struct pmskb_attach a;

	ASSERT_EQ(0, sb_patch(self->path, 0, SB_LABEL, "X", 1, false));
	ASSERT_EQ(0, sb_patch(self->path, self->last, SB_LABEL, "X", 1, false));
	ASSERT_EQ(0, media_read(self->path, 0, before, sizeof(before)));
	EXPECT_EQ(-EUCLEAN, dev_attach(self->ctl, self->dev, &a));
	ASSERT_EQ(0, media_read(self->path, 0, after, sizeof(after)));
	EXPECT_EQ(0, memcmp(before, after, sizeof(after)));
	/* Damaged is not blank. */
	EXPECT_EQ(-EEXIST, dev_format(self->ctl, self->dev, 0, 0));
}

static int patch_both(const char *path, uint64_t last, size_t at, uint64_t value, size_t len)
{
	uint8_t bytes[8];

	put64(bytes, value);
	return sb_patch(path, 0, at, bytes, len, true) ?: sb_patch(path, last, at, bytes, len, true);
}

TEST_F(media, a_newer_incompatible_store_is_refused_and_left_alone)
{
	uint8_t before[4096], after[4096];
	struct pmskb_attach a;
	uint32_t version;

	ASSERT_EQ(0, media_read(self->path, 0, before, sizeof(before)));
	version = get32(before + SB_VERSION);
	ASSERT_EQ(0, patch_both(self->path, self->last, SB_VERSION, 99, 4));
	ASSERT_EQ(0, media_read(self->path, 0, before, sizeof(before)));
	EXPECT_EQ(-EOPNOTSUPP, dev_attach(self->ctl, self->dev, &a)) TH_LOG("version 99");
	ASSERT_EQ(0, media_read(self->path, 0, after, sizeof(after)));
	EXPECT_EQ(0, memcmp(before, after, sizeof(after)));
	EXPECT_EQ(-EEXIST, dev_format(self->ctl, self->dev, 0, 0));

	ASSERT_EQ(0, patch_both(self->path, self->last, SB_VERSION, version, 4));
	ASSERT_EQ(0, patch_both(self->path, self->last, SB_INCOMPAT, 1ULL << 63, 8));
	EXPECT_EQ(-EOPNOTSUPP, dev_attach(self->ctl, self->dev, &a)) TH_LOG("incompatible feature");
	ASSERT_EQ(0, patch_both(self->path, self->last, SB_INCOMPAT, 0, 8));
	EXPECT_EQ(0, try_attach(self->ctl, self->dev, &a));
}

TEST_F(media, an_unknown_compatible_feature_does_not_matter)
{
	struct pmskb_attach a;
	uint8_t page[4096];

	ASSERT_EQ(0, patch_both(self->path, self->last, SB_COMPAT, 1ULL << 40, 8));
	EXPECT_EQ(0, try_attach(self->ctl, self->dev, &a));
	/* And is not lost. */
	ASSERT_EQ(0, media_read(self->path, 0, page, sizeof(page)));
	EXPECT_EQ(1ULL << 40, get64(page + SB_COMPAT));
}

TEST_F(media, an_unknown_read_only_feature_allows_no_writing)
{
	struct pmskb_op op = op_put("k", 1, NULL, 0);
	struct pmskb_result res = {};
	uint8_t before[4096], after[4096];
	struct store s;
	int err;

	ASSERT_EQ(0, patch_both(self->path, self->last, SB_RO_COMPAT, 1ULL << 40, 8));
	ASSERT_EQ(0, media_read(self->path, 0, before, sizeof(before)));
	close(self->dev);
	self->dev = -1;
	err = store_open(&s, DEV_PMEM);
	if (err == -EROFS) /* not at all is as good */
		return;
	ASSERT_EQ(0, err);
	err = submit(s.fd, &op, &res, 1);
	EXPECT_EQ(-EROFS, err ?: res.res);
	EXPECT_EQ(0, store_close(&s));
	ASSERT_EQ(0, media_read(self->path, 0, after, sizeof(after)));
	EXPECT_EQ(0, memcmp(before, after, sizeof(after)));
}

TEST_F(media, an_impossible_geometry_is_euclean_whatever_its_checksum)
{
	static const size_t at[] = { SB_REGION_LEN, SB_MAP_OFF, SB_MAP_LEN, SB_HEAD_OFF, SB_HEAD_LEN,
				     SB_DATA_OFF, SB_DATA_LEN };
	static const uint64_t values[] = { 0, 1, 4095, 1ULL << 32, 1ULL << 63, ~0ULL, ~0ULL - 4095 };
	struct pmskb_attach a;
	uint8_t good[4096];
	size_t i, j;

	ASSERT_EQ(0, media_read(self->path, 0, good, sizeof(good)));
	for (i = 0; i < ARRAY_LEN(at); i++) {
		for (j = 0; j < ARRAY_LEN(values); j++) {
			/* Heads in DRAM is a geometry of its own. */
			if (at[i] == SB_HEAD_LEN && !values[j])
				continue;
			ASSERT_EQ(0, patch_both(self->path, self->last, at[i], values[j], 8));
			EXPECT_EQ(-EUCLEAN, try_attach(self->ctl, self->dev, &a))
				TH_LOG("field at %zu is %#llx", at[i], (unsigned long long)values[j]);
		}
		ASSERT_EQ(0, patch_both(self->path, self->last, at[i], get64(good + at[i]), 8));
	}
	ASSERT_EQ(0, patch_both(self->path, self->last, SB_FRAME_SIZE, 8192, 4));
	EXPECT_EQ(-EUCLEAN, try_attach(self->ctl, self->dev, &a));
	ASSERT_EQ(0, patch_both(self->path, self->last, SB_FRAME_SIZE, 4096, 4));
	EXPECT_EQ(0, try_attach(self->ctl, self->dev, &a));
}

static int partition(int dev, int op, uint64_t start, uint64_t len)
{
	struct blkpg_partition p = { .start = start, .length = len, .pno = 7 };
	struct blkpg_ioctl_arg arg = { .op = op, .datalen = sizeof(p), .data = &p };

	return ioctl(dev, BLKPG, &arg) ? -errno : 0;
}

TEST_F(media, a_region_that_is_too_small_is_enospc_and_an_unaligned_one_erange)
{
	struct pmskb_attach a;
	char part[64];
	int fd;

	snprintf(part, sizeof(part), "%sp7", self->path);
	ASSERT_EQ(0, partition(self->dev, BLKPG_ADD_PARTITION, 2 << 20, 4 << 20));
	fd = open(part, O_RDWR | O_CLOEXEC);
	EXPECT_LE(0, fd) TH_LOG("%s", part);
	EXPECT_EQ(-ENOSPC, dev_format(self->ctl, fd, PMSKB_FORMAT_FORCE, 0));
	EXPECT_NE(0, dev_attach(self->ctl, fd, &a));
	close(fd);
	EXPECT_EQ(0, partition(self->dev, BLKPG_DEL_PARTITION, 0, 0));

	ASSERT_EQ(0, partition(self->dev, BLKPG_ADD_PARTITION, (2 << 20) + 512, 32 << 20));
	fd = open(part, O_RDWR | O_CLOEXEC);
	EXPECT_LE(0, fd) TH_LOG("%s", part);
	EXPECT_EQ(-ERANGE, dev_format(self->ctl, fd, PMSKB_FORMAT_FORCE, 0));
	EXPECT_EQ(-ERANGE, dev_attach(self->ctl, fd, &a));
	close(fd);
	EXPECT_EQ(0, partition(self->dev, BLKPG_DEL_PARTITION, 0, 0));

	/* A partition is a region like any other. */
	ASSERT_EQ(0, partition(self->dev, BLKPG_ADD_PARTITION, 2 << 20, 32 << 20));
	fd = open(part, O_RDWR | O_CLOEXEC);
	EXPECT_EQ(0, dev_format(self->ctl, fd, PMSKB_FORMAT_FORCE, 0));
	EXPECT_EQ(0, try_attach(self->ctl, fd, &a));
	close(fd);
	EXPECT_EQ(0, partition(self->dev, BLKPG_DEL_PARTITION, 0, 0));
}

TEST_F(media, the_device_is_usable_by_others_afterwards_and_not_taken_from_them)
{
	struct pmskb_attach a;
	int dax;

	if (!have_program("mkfs.ext4"))
		SKIP(return, "there is no mkfs.ext4");
	close(self->dev);
	ASSERT_EQ(0, sh("mkfs.ext4 -q -F -b 4096 %s >/dev/null", self->path));
	sh("mkdir -p /tmp/pmskb-mnt");
	dax = sh("mount -t ext4 -o dax=always %s /tmp/pmskb-mnt", self->path);
	EXPECT_EQ(0, dax) TH_LOG("not mountable with DAX");
	if (dax)
		return;
	EXPECT_EQ(0, sh("head -c 5000000 /dev/urandom > /tmp/pmskb-mnt/a && cp /tmp/pmskb-mnt/a /tmp/pmskb-a && "
			"sync && cmp /tmp/pmskb-a /tmp/pmskb-mnt/a"));
	self->dev = open(self->path, O_RDWR | O_CLOEXEC);
	if (self->dev >= 0) {
		EXPECT_EQ(-EBUSY, dev_format(self->ctl, self->dev, PMSKB_FORMAT_FORCE, 0)) TH_LOG("while mounted");
		EXPECT_EQ(-EBUSY, dev_attach(self->ctl, self->dev, &a)) TH_LOG("while mounted");
		close(self->dev);
	}
	EXPECT_EQ(0, sh("umount /tmp/pmskb-mnt && mount -t ext4 -o dax=always %s /tmp/pmskb-mnt && "
			"cmp /tmp/pmskb-a /tmp/pmskb-mnt/a; st=$?; umount /tmp/pmskb-mnt; rm -f /tmp/pmskb-a; "
			"exit $st", self->path));
	self->dev = open(self->path, O_RDWR | O_CLOEXEC);
	ASSERT_LE(0, self->dev);
	EXPECT_EQ(-EEXIST, dev_format(self->ctl, self->dev, 0, 0)) TH_LOG("a file system");
	EXPECT_EQ(0, dev_format(self->ctl, self->dev, PMSKB_FORMAT_FORCE, 0));
	EXPECT_EQ(0, try_attach(self->ctl, self->dev, &a));
}

TEST_HARNESS_MAIN
