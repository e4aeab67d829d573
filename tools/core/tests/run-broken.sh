#!/bin/sh
# SPDX-License-Identifier: GPL-2.0
#
# Takes one flush or fence at a time out of the core, and sees to it that the crash
# tests fail without it. Prints TAP. Needs a minute the first time; then what was
# built of the same sources is run again.
#
#     run-broken.sh [NAME]...
cd "$(dirname "$0")/.." || exit 1
export CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-../target}/broken"
[ $# -gt 0 ] || set -- payload_flush fence1 record_flush fence2 kill_flush map_flush header_flush list_flush

# In the name of what is kept, so that no other sources' is taken for it.
version=$({
	rustc --version
	find . ../../rust/core ../Cargo.toml ../Cargo.lock -name target -prune -o -type f -print | sort | xargs cat
} | sha256sum | cut -c 1-16)
kept=$CARGO_TARGET_DIR/kept
mkdir -p "$kept" || exit 1
find "$kept" -type f ! -name "*-$version" -delete

# build NAME: keeps the crash tests of a core without it.
build() {
	built=$(PMSKB_BREAK="$1" cargo test --locked --release --test crash --no-run 2>&1)
	test=$(printf '%s\n' "$built" | sed -n 's/^ *Executable .*(\(.*\))$/\1/p')
	if [ -z "$test" ]; then
		printf '%s\n' "$built" | sed 's/^/# /'
		return 1
	fi
	cp "$test" "$kept/$1-$version.new" && mv "$kept/$1-$version.new" "$kept/$1-$version"
}

echo 'TAP version 13'
echo "1..$#"
nr=0
missed=0
for what; do
	nr=$((nr + 1))
	if [ ! -x "$kept/$what-$version" ] && ! build "$what"; then
		missed=$((missed + 1))
		echo "not ok $nr - $what # does not build"
	elif "$kept/$what-$version" >"$kept/$what.log" 2>&1; then
		missed=$((missed + 1))
		echo "not ok $nr - $what # no crash test fails without it"
	elif ! grep -q '^test result: FAILED' "$kept/$what.log"; then
		# Killed, or not a program of this machine.
		missed=$((missed + 1))
		echo "not ok $nr - $what # the crash tests did not run"
	else
		echo "ok $nr - $what # $(sed -n 's/^test result: FAILED.* \([0-9]* failed\).*/\1/p' "$kept/$what.log")"
	fi
done
[ "$missed" = 0 ]
