// SPDX-License-Identifier: GPL-2.0

//! What the program asks of callgrind when it runs under it; nothing otherwise.

use std::arch::asm;

const CALLGRIND: u64 = ((b'C' as u64) << 24) | ((b'T' as u64) << 16);

fn request(code: u64) {
    let args = [CALLGRIND + code, 0, 0, 0, 0, 0];
    // SAFETY: valgrind's documented client request for amd64. On a CPU it turns rdi
    // by 128 bits in all and exchanges rbx with itself: nothing changes. Under
    // valgrind it reads `args`, which is alive, and sets rdx.
    unsafe {
        asm!(
            "rol rdi, 3", "rol rdi, 13", "rol rdi, 61", "rol rdi, 51", "xchg rbx, rbx",
            in("rax") args.as_ptr(), inout("rdx") 0u64 => _, options(nostack)
        );
    }
}

/// Counts from here on. Until the first time, the program runs at a tolerable speed.
pub fn start() {
    request(4);
}

/// Ends counting and writes what was counted to the next `callgrind.out` part.
pub fn stop() {
    request(5);
    request(0);
}
