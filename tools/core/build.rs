// SPDX-License-Identifier: GPL-2.0

//! `PMSKB_BREAK=name` takes one flush or fence out, for tests/run-broken.sh.

fn main() {
    println!("cargo::rerun-if-env-changed=PMSKB_BREAK");
    if let Ok(name) = std::env::var("PMSKB_BREAK") {
        println!("cargo::rustc-cfg=pmskb_break=\"{name}\"");
    }
}
