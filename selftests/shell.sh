#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
#
# Promises that need other programs, or the module unloaded: transfers by socat,
# curl and iperf3 on attached sockets (pmskb-run attaches them), unloading with
# and without sockets, namespaces of the wrong mode. Run by ./run.
#
#   shell.sh [-t TEST]
#
# shellcheck disable=SC2317 # the tests are called by name

cd "$(dirname "$0")" || exit 2
keep=$(mktemp -d)
tmp=$keep/tmp
mkdir "$tmp"
trap 'rm -rf "$keep"' EXIT
mb=${PMSKB_TEST_TRANSFER_MB:-100}

have() { command -v "$1" >/dev/null 2>&1; }
skip() { printf '%s' "$*" >"$tmp/skip"; exit 4; }
fail() { echo "# $*"; exit 1; }

ctl() { have pmskbctl || skip "there is no pmskbctl"; pmskbctl "$@"; }

# attach DEVICE: formats and attaches; sets store.
attach() {
	ctl format --force --label selftest "$1" >/dev/null || fail "pmskbctl format $1"
	ctl attach "$1" >/dev/null || fail "pmskbctl attach $1"
	store=
	for s in /dev/pmskb[0-9]*; do store=$s; done
	[ -c "$store" ] || fail "no store appeared"
}

detach() {
	for _ in 1 2 3 4 5 6 7 8 9 10; do
		ctl detach "${store##*/}" >"$tmp/detach" 2>&1 && return
		sleep 1
	done
	sed 's/^/# /' "$tmp/detach"
	fail "cannot detach $store"
}

need_pmem() { [ -e "${PMSKB_DEV_PMEM:-/nonexistent}" ] || skip "PMSKB_DEV_PMEM is not set"; }
need_dax() { [ -e "${PMSKB_DEV_DAX:-/nonexistent}" ] || skip "PMSKB_DEV_DAX is not set"; }

# attached PROGRAM...: on attached sockets.
attached() {
	have pmskb-run || skip "there is no pmskb-run"
	pmskb-run --store "$store" --require "$@"
}
# The same in the background: $! is the program.
attached_server() { exec pmskb-run --store "$store" --require "$@"; }

wait_for_port() {
	for _ in $(seq 100); do
		ss -Htln "sport = :$1" 2>/dev/null | grep -q . && return
		sleep 0.1
	done
	fail "nothing listens on port $1"
}

# Made once: randomness is slow on emulated machines.
blob() {
	local i
	if [ ! -e "$keep/blob" ]; then
		head -c 1048576 /dev/urandom >"$keep/block"
		# No two blocks are alike, and none starts where a page does.
		for i in $(seq "$mb"); do echo "$i" && cat "$keep/block"; done | head -c "$((mb << 20))" >"$keep/blob"
	fi
	ln -sf "$keep/blob" "$tmp/blob"
}

placed() { pmskbctl info --json "${store##*/}" 2>/dev/null | tr -d ' \n' | sed -n 's/.*"placed_bytes":\([0-9]*\).*/\1/p'; }

# The transfer was really through frames.
was_placed() {
	local p
	p=$(placed)
	[ -n "$p" ] || return 0
	[ "$p" -ge "$(($1 * 9 / 10))" ] || fail "only $p of $1 bytes were placed"
}

socat_transfer_arrives_whole() {
	need_pmem
	have socat || skip "there is no socat"
	attach "$PMSKB_DEV_PMEM"
	blob
	attached_server socat -u TCP-LISTEN:7001,reuseaddr,bind=127.0.0.1 "CREATE:$tmp/out" &
	local server=$!
	wait_for_port 7001
	socat -u "FILE:$tmp/blob" TCP:127.0.0.1:7001 || fail "the client failed"
	wait "$server" || fail "the server failed"
	cmp "$tmp/blob" "$tmp/out" || fail "other bytes arrived"
	was_placed $((mb << 20))
	detach
}

socat_over_ipv6_and_fsdev_arrives_whole() {
	need_dax
	have socat || skip "there is no socat"
	attach "$PMSKB_DEV_DAX"
	blob
	attached_server socat -u 'TCP6-LISTEN:7002,reuseaddr,bind=[::1]' "CREATE:$tmp/out" &
	local server=$!
	wait_for_port 7002
	socat -u "FILE:$tmp/blob" 'TCP6:[::1]:7002' || fail "the client failed"
	wait "$server" || fail "the server failed"
	cmp "$tmp/blob" "$tmp/out" || fail "other bytes arrived"
	was_placed $((mb << 20))
	detach
}

curl_download_arrives_whole() {
	need_pmem
	have curl || skip "there is no curl"
	have socat || skip "there is no socat"
	attach "$PMSKB_DEV_PMEM"
	blob
	# A server in one line; it is the client that is attached here.
	{
		printf 'HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n' $((mb << 20))
		cat "$tmp/blob"
	} >"$tmp/reply"
	socat "TCP-LISTEN:7003,reuseaddr,bind=127.0.0.1" "SYSTEM:head -n1 >/dev/null; cat $tmp/reply" &
	local server=$!
	wait_for_port 7003
	attached curl -sS -m 300 -o "$tmp/out" http://127.0.0.1:7003/ || fail "curl failed: $?"
	kill "$server" 2>/dev/null
	wait "$server" 2>/dev/null
	cmp "$tmp/blob" "$tmp/out" || fail "other bytes arrived"
	was_placed $((mb << 20))
	detach
}

iperf3_runs_both_ways() {
	need_pmem
	have iperf3 || skip "there is no iperf3"
	attach "$PMSKB_DEV_PMEM"
	attached_server iperf3 -s -p 7004 -B 127.0.0.1 -1 >"$tmp/server" 2>&1 &
	local server=$!
	wait_for_port 7004
	iperf3 -c 127.0.0.1 -p 7004 -n "${mb}M" -P 2 >"$tmp/client" 2>&1 || { sed 's/^/# /' "$tmp/client"; fail "iperf3 failed"; }
	wait "$server"
	was_placed $((mb << 20))
	attached_server iperf3 -s -p 7005 -B 127.0.0.1 -1 >"$tmp/server" 2>&1 &
	server=$!
	wait_for_port 7005
	iperf3 -c 127.0.0.1 -p 7005 -n "${mb}M" -R >"$tmp/client" 2>&1 || { sed 's/^/# /' "$tmp/client"; fail "iperf3 -R failed"; }
	wait "$server"
	detach
}

# --- the module ------------------------------------------------------------

unload() { rmmod pmskb 2>"$tmp/rmmod"; }
load() {
	if [ -n "$PMSKB_KO" ]; then insmod "$PMSKB_KO" "$@"; else modprobe pmskb "$@"; fi || fail "cannot load the module"
	for _ in $(seq 50); do [ -e /dev/pmskb ] && return; sleep 0.1; done
	fail "no /dev/pmskb"
}
builtin() { [ ! -e /sys/module/pmskb/refcnt ]; }

the_module_unloads_and_loads() {
	builtin && skip "the module is built in"
	for _ in 1 2 3; do
		unload || { sed 's/^/# /' "$tmp/rmmod"; fail "rmmod"; }
		[ ! -e /dev/pmskb ] || fail "/dev/pmskb is still there"
		load
	done
}

unloading_with_an_open_store_is_refused() {
	need_pmem
	builtin && skip "the module is built in"
	attach "$PMSKB_DEV_PMEM"
	exec 9<"$store"
	if unload; then fail "the module was unloaded under an open file"; fi
	[ -e "$store" ] || fail "$store is gone"
	exec 9<&-
	detach
	unload || { sed 's/^/# /' "$tmp/rmmod"; fail "rmmod afterwards"; }
	load
}

unloading_with_an_attached_socket_is_refused() {
	need_pmem
	builtin && skip "the module is built in"
	have socat || skip "there is no socat"
	attach "$PMSKB_DEV_PMEM"
	attached_server socat -u TCP-LISTEN:7006,reuseaddr,bind=127.0.0.1 /dev/null &
	local server=$!
	wait_for_port 7006
	if unload; then fail "the module was unloaded under a socket"; fi
	kill "$server"
	wait "$server" 2>/dev/null
	detach
	unload || { sed 's/^/# /' "$tmp/rmmod"; fail "rmmod afterwards"; }
	load
}

time_wait_sockets_do_not_keep_the_module_nor_crash_without_it() {
	need_pmem
	builtin && skip "the module is built in"
	have socat || skip "there is no socat"
	attach "$PMSKB_DEV_PMEM"
	attached_server socat -U TCP-LISTEN:7007,reuseaddr,bind=127.0.0.1,fork SYSTEM:'echo bye' 2>/dev/null &
	local server=$!
	wait_for_port 7007
	# The server closes first: TIME_WAIT is with sockets that were attached.
	for _ in $(seq 50); do socat -u TCP:127.0.0.1:7007 - >/dev/null 2>&1; done
	kill "$server"
	wait "$server" 2>/dev/null
	echo "# $(ss -Htan state time-wait 'sport = :7007' | wc -l) in TIME_WAIT"
	detach
	unload || { sed 's/^/# /' "$tmp/rmmod"; fail "rmmod with TIME_WAIT sockets"; }
	# They end 60 s after they began, or when they are told to: now.
	ss -K -tn state time-wait 'sport = :7007' >/dev/null 2>&1
	if ss -Htan state time-wait 'sport = :7007' | grep -q .; then
		echo "# ss cannot end them, waiting"
		sleep 65
	fi
	load
}

the_attach_parameter_attaches_at_load() {
	need_pmem
	builtin && skip "the module is built in"
	attach "$PMSKB_DEV_PMEM"
	detach
	unload || fail "rmmod"
	load "attach=$PMSKB_DEV_PMEM"
	store=
	for s in /dev/pmskb[0-9]*; do [ -c "$s" ] && store=$s; done
	[ -n "$store" ] || fail "nothing is attached"
	detach
	# What cannot be attached is no reason not to load.
	unload || fail "rmmod"
	load attach=/dev/null,/nonexistent
}

# --- the wrong devices -------------------------------------------------------

# Creating namespaces takes the devices away from under the other tests: last.

a_raw_namespace_is_refused() {
	need_pmem
	have ndctl || skip "there is no ndctl"
	local ns dev st
	ns=$(basename "$(realpath "/sys/block/${PMSKB_DEV_PMEM##*/}/device")")
	case $ns in namespace*) ;; *) ns=namespace${ns#pfn} ;; esac
	dev=${PMSKB_DEV_PMEM##*/}
	ns=$(ndctl list -N 2>/dev/null | tr -d ' \n' | sed 's/},{/}\n{/g' |
		sed -n "s/.*\"dev\":\"\\(namespace[0-9.]*\\)\".*\"blockdev\":\"$dev\".*/\\1/p" | head -n1)
	[ -n "$ns" ] || skip "no namespace found for $dev"
	ndctl create-namespace -f -e "$ns" -m raw >/dev/null 2>&1 || skip "ndctl cannot make a raw namespace"
	dev=/dev/$dev
	[ -e "$dev" ] || sleep 1
	ctl format --force "$dev" >"$tmp/raw" 2>&1
	st=$?
	ndctl create-namespace -f -e "$ns" -m fsdax -M mem >/dev/null 2>&1 || fail "cannot make it fsdax again"
	[ "$st" != 0 ] || fail "a raw namespace was formatted"
	grep -qi 'not supported\|EOPNOTSUPP' "$tmp/raw" || { sed 's/^/# /' "$tmp/raw"; fail "no EOPNOTSUPP"; }
}

a_dax_device_of_the_other_driver_is_refused() {
	need_dax
	local name=${PMSKB_DEV_DAX##*/} d=/sys/bus/dax/drivers st
	[ -e "$d/fsdev_dax/$name" ] || skip "$name is not bound to fsdev_dax"
	echo "$name" >"$d"/fsdev_dax/unbind || fail "unbind"
	echo "$name" >"$d"/device_dax/bind 2>/dev/null || echo "$name" >"$d"/device_dax/new_id
	sleep 1
	ctl format --force "$PMSKB_DEV_DAX" >"$tmp/dev" 2>&1
	st=$?
	echo "$name" >"$d"/device_dax/unbind
	echo "$name" >"$d"/fsdev_dax/bind 2>/dev/null || echo "$name" >"$d"/fsdev_dax/new_id
	[ "$st" != 0 ] || fail "it was formatted"
	grep -qi 'protocol driver not attached\|EUNATCH' "$tmp/dev" || { sed 's/^/# /' "$tmp/dev"; fail "no EUNATCH"; }
}

# without WHAT: the lab's guest has it, unless somebody started one without.
without() {
	[ ! -e /pmskb-run/env ] || fail "$1; tools/lab/tests.d/05-selftests says how to start a guest that has it"
	skip "$1"
}

# refused DEVICE MESSAGE: by format, forced or not, and by attach.
refused() {
	local what
	for what in "format" "format --force" attach; do
		# shellcheck disable=SC2086 # words
		if ctl $what "$1" >"$tmp/refused" 2>&1; then fail "$what of $1 is not refused"; fi
		grep -q "$2" "$tmp/refused" || { sed 's/^/# /' "$tmp/refused"; fail "$what: not for the right reason"; }
	done
}

a_region_whose_writes_need_the_host_is_refused() {
	local d dev=
	modprobe -q virtio_pmem
	for _ in $(seq 30); do
		for d in /sys/block/pmem*; do
			case $(realpath "$d") in */virtio[0-9]*) dev=/dev/${d##*/} ;; esac
		done
		[ ! -e "$dev" ] || break
		sleep 0.1
	done
	[ -n "$dev" ] || without "there is no virtio-pmem device"
	# DAX it does: that is not why.
	[ "$(cat "/sys/block/${dev##*/}/queue/dax")" = 1 ] || fail "$dev does no DAX at all"
	refused "$dev" 'No such device or address'
}

# dax_device SIZE: makes one of the region in $region; sets device.
dax_device() {
	local d
	echo 1 >"$region/create" || fail "cannot make a DAX device"
	device=
	for d in "$region"/../dax*; do [ "$(cat "$d/size")" != 0 ] || device=${d##*/}; done
	echo "$1" >"/sys/bus/dax/devices/$device/size" || fail "cannot make a DAX device of $1 bytes"
}

# fsdev DEVICE: binds it to fsdev_dax, whatever has it.
fsdev() {
	local d=/sys/bus/dax/drivers
	modprobe -q fsdev_dax
	[ ! -e "/sys/bus/dax/devices/$1/driver" ] || echo "$1" >"/sys/bus/dax/devices/$1/driver/unbind"
	echo "$1" >"$d"/fsdev_dax/new_id
	[ -e "$d/fsdev_dax/$1" ] || fail "fsdev_dax does not take $1"
	[ -e "/dev/$1" ] || sleep 1
}

a_device_of_two_ranges_is_refused() {
	local region='' device first second d
	modprobe -q dax_hmem region_idle=1
	for d in /sys/bus/platform/devices/hmem.*/dax_region; do [ -e "$d/create" ] && region=$d; done
	[ -n "$region" ] || without "there is no soft-reserved memory"
	dax_device $((16 << 20))
	first=$device
	dax_device $((32 << 20))
	second=$device
	# What is behind it is taken, so the rest lies elsewhere.
	echo $((48 << 20)) >"/sys/bus/dax/devices/$first/size" || fail "cannot enlarge $first"
	[ -e "/sys/bus/dax/devices/$first/mapping1" ] || fail "$first is still one range"
	fsdev "$first"
	fsdev "$second"
	refused "/dev/$first" 'Invalid cross-device link'
	# With one range, of the same memory, there is nothing to refuse.
	attach "/dev/$second"
	detach
}

# --- TAP -----------------------------------------------------------------

tests="the_module_unloads_and_loads
socat_transfer_arrives_whole
socat_over_ipv6_and_fsdev_arrives_whole
curl_download_arrives_whole
iperf3_runs_both_ways
unloading_with_an_open_store_is_refused
unloading_with_an_attached_socket_is_refused
the_attach_parameter_attaches_at_load
time_wait_sockets_do_not_keep_the_module_nor_crash_without_it
a_region_whose_writes_need_the_host_is_refused
a_device_of_two_ranges_is_refused
a_dax_device_of_the_other_driver_is_refused
a_raw_namespace_is_refused"

[ "$1" != -t ] || tests=$2
# shellcheck disable=SC2086 # words
set -- $tests
echo "TAP version 13"
echo "1..$#"
n=0 status=0
for t; do
	n=$((n + 1))
	rm -f "$tmp"/*
	("$t")
	case $? in
	0) echo "ok $n $t" ;;
	4) echo "ok $n $t # SKIP $(cat "$tmp/skip")" ;;
	*)
		echo "not ok $n $t"
		status=1
		# Nothing of it may be in the way of the next.
		for s in /dev/pmskb[0-9]*; do
			[ -c "$s" ] && have pmskbctl && pmskbctl detach "${s##*/}" >/dev/null 2>&1
		done
		[ -e /dev/pmskb ] || modprobe pmskb 2>/dev/null
		;;
	esac
done
exit $status
