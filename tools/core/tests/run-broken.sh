#!/bin/sh
# SPDX-License-Identifier: GPL-2.0
#
# Takes one flush or fence at a time out of the core, and sees to it that the
# crash tests fail without it. Needs a minute.
cd "$(dirname "$0")/.." || exit 1
export CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-../target}/broken"
missed=0
[ $# -gt 0 ] || set -- payload_flush fence1 record_flush fence2 kill_flush map_flush header_flush list_flush \
	batch_records batch_flush batch_kill batch_order epoch record_crc \
	superblock_order truncate_early compact_flush compact_fence
for what in "$@"; do
	if ! PMSKB_BREAK="$what" cargo test --quiet --release --test crash --no-run; then
		echo "$what: does not build"
		exit 1
	fi
	if PMSKB_BREAK="$what" cargo test --quiet --release --test crash >/dev/null 2>&1; then
		echo "$what: MISSED"
		missed=$((missed + 1))
	else
		echo "$what: caught"
	fi
done
[ "$missed" = 0 ]
