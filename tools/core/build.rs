// SPDX-License-Identifier: GPL-2.0

//! `PMSKB_BREAK=by_name` at build time makes a core that does without a check, a flush
//! or a fence when it runs with `PMSKB_BREAK=NAME`; see tests/run-broken.sh.

fn main() {
    println!("cargo::rerun-if-env-changed=PMSKB_BREAK");
    if std::env::var("PMSKB_BREAK").is_ok_and(|name| name == "by_name") {
        println!("cargo::rustc-cfg=pmskb_break=\"by_name\"");
    }
}
