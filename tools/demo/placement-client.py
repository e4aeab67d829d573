#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-only
"""PUTs bodies of several sizes over many connections at once, and asserts that almost
all of their packets were placed: by the module's counters, which the guest writes to
OUT/info.json again and again (`pmskbctl info --json`). If ENGINE is uring, also that the
server made few system calls: by the kernel's count, in OUT/calls. Prints TAP, without a plan.

    placement-client.py PORT OUT NIC ENGINE

Connections are made one after the other, for QEMU's user network queues only one
more, and stay for all sizes.
"""
import json
import os
import re
import selectors
import socket
import sys
import time

SIZES = (64, 1024, 4096, 65536)
CONNECTIONS = 64
BYTES = 16 << 20  # of each size, but
MOST = 1280  # requests of each size
AT_LEAST = 99.0  # percent
CALLS = 0.1  # system calls a request, at most, with io_uring
FEW_UP_TO = 4096  # bytes
LIMIT = 60  # seconds that nothing happens


def info(path):
    """What the guest says next: its current answer may be from before."""
    seen, changes, until = None, 0, time.monotonic() + LIMIT
    while changes < 3:
        try:
            now = os.stat(path)
            now = (now.st_ino, now.st_mtime_ns)
        except FileNotFoundError:
            now = seen  # it has not said anything yet
        if now != seen:
            seen, changes = now, changes + 1
        if time.monotonic() > until:
            sys.exit("Bail out! the guest says nothing any more")
        time.sleep(0.02)
    with open(path, encoding="utf-8") as f:
        return json.load(f)


def calls(out):
    """The server's system calls so far, by name. Reading the clock is one only where the kernel
    has no better clock than the HPET, as here."""
    with open(os.path.join(out, "calls"), encoding="utf-8") as f:
        found = re.findall(r"{ id: (?:sys_)?(\w+) .*} hitcount: +(\d+)", f.read())
    return {name: int(n) for name, n in found if name != "clock_gettime"}


class Connection:
    """One request after the other."""

    def __init__(self, port, nr):
        self.nr = nr
        self.sock = socket.create_connection(("127.0.0.1", port), LIMIT)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock.setblocking(False)
        self.out = memoryview(b"")
        self.answer = b""

    def put(self, size, nr):
        """Starts a request. Few keys, so that the store does not fill up."""
        head = f"PUT /{self.nr}.{nr % 4} HTTP/1.1\r\nHost: guest\r\nContent-Length: {size}\r\n\r\n"
        self.out = memoryview(head.encode() + bytes(size))
        self.answer = b""

    def go_on(self, events):
        """Sends and receives what is possible; whether the answer is there."""
        if events & selectors.EVENT_WRITE and self.out:
            self.out = self.out[self.sock.send(self.out) :]
        if events & selectors.EVENT_READ:
            got = self.sock.recv(65536)
            if not got:
                sys.exit("Bail out! the server closed a connection")
            self.answer += got
        if b"\r\n\r\n" not in self.answer:
            return False
        if not self.answer.startswith((b"HTTP/1.1 200", b"HTTP/1.1 201")):
            sys.exit(f"Bail out! the server answered {self.answer[:80]!r}")
        if b"content-length: 0\r\n" not in self.answer.lower() and not self.answer.endswith(b"\n"):
            return False
        return True


def send_all(connections, size):
    """PUTs on all connections at once; how many."""
    left = {c: min(MOST, BYTES // size) // len(connections) for c in connections}
    total = sum(left.values())
    both = selectors.EVENT_READ | selectors.EVENT_WRITE
    with selectors.DefaultSelector() as selector:
        for c in connections:
            c.put(size, left[c])
            selector.register(c.sock, both, c)
        while selector.get_map():
            ready = selector.select(LIMIT)
            if not ready:
                sys.exit("Bail out! the server does not answer any more")
            for key, events in ready:
                c = key.data
                done = c.go_on(events)
                if not done:
                    if not c.out:
                        selector.modify(c.sock, selectors.EVENT_READ, c)
                    continue
                left[c] -= 1
                if left[c]:
                    c.put(size, left[c])
                    selector.modify(c.sock, both, c)
                else:
                    selector.unregister(c.sock)
    return total


def main():
    """One test for each size."""
    port, out, nic, engine = int(sys.argv[1]), *sys.argv[2:5]
    path, name = os.path.join(out, "info.json"), f"{nic}, {engine}"
    # The server's listening sockets are attached too.
    listening = info(path)["sockets"]
    connections = [Connection(port, nr) for nr in range(CONNECTIONS)]
    before = info(path)
    called = calls(out)
    failed = False
    for size in SIZES:
        requests = send_all(connections, size)
        after = info(path)
        call = {n: c - called.get(n, 0) for n, c in calls(out).items() if c != called.get(n, 0)}
        called = calls(out)
        each = sum(call.values()) / requests
        count = {
            kind: after["counters"][kind] - before["counters"][kind]
            for kind in ("placed", "derived", "hardware", "computed", "mismatch")
        }
        left = {
            reason: n - before["counters"]["unplaced"][reason]
            for reason, n in after["counters"]["unplaced"].items()
        }
        share = 100 * count["placed"] / max(1, count["placed"] + sum(left.values()))
        print(
            f"# {name}, {size} bytes: {requests} PUTs over {after['sockets'] - listening} connections, "
            f"{count['placed']} packets placed ({share:.2f} %), "
            f"unplaced {({r: n for r, n in left.items() if n}) or 'none'}; checksums: "
            f"{count['derived']} derived, {count['hardware']} hardware, {count['computed']} computed; "
            f"{each:.3f} system calls a request {call}"
        )
        few = engine == "uring" and size <= FEW_UP_TO
        # A request is one packet at least.
        good = (
            share >= AT_LEAST
            and count["placed"] >= requests * AT_LEAST / 100
            and before["sockets"] == after["sockets"] == listening + CONNECTIONS
            and (not few or 0 < each <= CALLS)
        )
        failed |= not good
        print(f"{'ok' if good else 'not ok'} - {name} {size} bytes: {AT_LEAST:.0f} % are placed{f', at most {CALLS} system calls a request' if few else ''}", flush=True)
        before = after
    return failed


sys.exit(main())
