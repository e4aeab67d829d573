#!/bin/sh
# SPDX-License-Identifier: GPL-2.0
#
# Takes one flush, fence or check at a time out of the core, and sees to it that a test
# fails without it: the crash tests, or for a check that readers make, the model of
# their protocol, or for one against media errors or forged records, their tests. Prints TAP.
#
#     run-broken.sh [NAME]...
cd "$(dirname "$0")/.." || exit 1
export CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-../target}/broken"
all=$(sed -n 's/.*broken!("\([a-z0-9_]*\)").*/\1/p' ../../rust/core/*.rs | sort)
# shellcheck disable=SC2086 # words
[ $# -gt 0 ] || set -- $all
log=$CARGO_TARGET_DIR/logs
mkdir -p "$log" || exit 1

# build TEST: prints the program, which does without what PMSKB_BREAK says.
build() {
	PMSKB_BREAK=by_name cargo test --locked --release --test "$1" --no-run 2>&1 |
		tee "$log/build-$1.log" | sed -n 's/^ *Executable .*(\(.*\))$/\1/p'
}

crash=$(build crash)
model=$(build model)
media=$(build media)
store=$(build store)
if [ ! -x "$crash" ] || [ ! -x "$model" ] || [ ! -x "$media" ] || [ ! -x "$store" ]; then
	sed 's/^/# /' "$log"/build-*.log
	echo "Bail out! the tests do not build"
	exit 1
fi
echo 'TAP version 13'
echo "1..$(($# + 1))"
# What catches everything has to pass when nothing is missing.
if PMSKB_BREAK=nothing "$crash" >"$log/nothing.log" 2>&1; then
	echo "ok 1 - nothing # nothing is missed"
else
	echo "not ok 1 - nothing # the crash tests fail anyway, see $log/nothing.log"
fi
nr=1
missed=0
for what; do
	nr=$((nr + 1))
	case $what in
	# It stops at the first schedule that shows it.
	reader_*) set -- env PMSKB_SCHEDULES=500 "$model" readers_are ;;
	compact_unread) set -- "$media" ;;
	forged_records | undone_records) set -- "$store" ;;
	*) set -- "$crash" ;;
	esac
	if PMSKB_BREAK=$what "$@" >"$log/$what.log" 2>&1; then
		missed=$((missed + 1))
		echo "not ok $nr - $what # no test fails without it"
	elif ! grep -q '^test result: FAILED' "$log/$what.log"; then
		# Killed, or not a program of this machine.
		missed=$((missed + 1))
		echo "not ok $nr - $what # the tests did not run"
	else
		echo "ok $nr - $what # $(sed -n 's/^test result: FAILED.* \([0-9]* failed\).*/\1/p' "$log/$what.log")"
	fi
done
[ "$missed" = 0 ]
