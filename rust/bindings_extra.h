/* SPDX-License-Identifier: GPL-2.0 */
/* What bindgen reads: C types and functions that kernel::bindings lacks. */
#include <linux/dax.h>
#include <linux/badblocks.h>
#include <linux/libnvdimm.h>
#include <linux/netfilter.h>
#include <linux/netfilter_ipv4.h>
#include <linux/netfilter_ipv6.h>
#include <linux/anon_inodes.h>
#include <linux/splice.h>
#include <linux/pipe_fs_i.h>
#include <linux/crc32c.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/tcp.h>
#include <linux/miscdevice.h>
#include <net/ip.h>
#include <net/ipv6.h>
#include <net/inet_hashtables.h>
#include <net/inet6_hashtables.h>
#include <net/sock.h>
#include <net/tcp.h>
#include <net/transp_v6.h>
#include <net/checksum.h>
#include <linux/pmskb.h>
#include "helpers.h"
