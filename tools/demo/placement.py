#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-only
"""Prints what placement did, from `pmskbctl info --json`."""
import json
import sys


def find(tree, key):
    """The first value with a key, anywhere in the tree."""
    if isinstance(tree, dict):
        if key in tree:
            return tree[key]
        tree = list(tree.values())
    if isinstance(tree, list):
        for value in tree:
            found = find(value, key)
            if found is not None:
                return found
    return None


with open(sys.argv[1], encoding="utf-8") as f:
    info = json.load(f)
counters = find(info, "counters") or info
placed = counters["placed"]
unplaced = counters["unplaced"]
if isinstance(unplaced, list):
    unplaced = {str(nr): n for nr, n in enumerate(unplaced)}
left = {reason: n for reason, n in unplaced.items() if n}
share = 100 * placed / max(1, placed + sum(left.values()))
print(
    f"placement: {placed} packets placed ({share:.2f} %), unplaced {left or 'none'}; "
    f"checksums: {counters['derived']} derived, {counters['hardware']} hardware, "
    f"{counters['computed']} computed"
)
