// SPDX-License-Identifier: GPL-2.0

//! Makes the raw interface from the uapi header: one source of truth.

use std::{env, path::PathBuf};

const HEADER: &str = "../../include/uapi/linux/pmskb.h";

/// Request numbers are expressions with casts, which bindgen does not evaluate
/// as macros, but does as constants.
const REQUESTS: [&str; 10] = [
    "FORMAT",
    "ATTACH",
    "DETACH",
    "INFO",
    "ATTACH_SOCKET",
    "SUBMIT",
    "OPEN",
    "ALLOC",
    "COMPACT",
    "SCRUB",
];

fn main() {
    println!("cargo::rerun-if-changed={HEADER}");
    println!("cargo::rerun-if-changed=build.rs");

    let header = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").unwrap()).join(HEADER);
    let mut source = format!("#include \"{}\"\n", header.display());
    for request in REQUESTS {
        source += &format!("static const unsigned int IOC_{request} = PMSKB_IOC_{request};\n");
    }

    let out = PathBuf::from(env::var_os("OUT_DIR").unwrap()).join("sys.rs");
    bindgen::Builder::default()
        .header_contents("pmskb_wrapper.h", &source)
        .allowlist_item("(PMSKB|pmskb|SOL_PMSKB|IOC)_?.*")
        .prepend_enum_name(false)
        .default_enum_style(bindgen::EnumVariation::Consts)
        .derive_default(true)
        .derive_debug(true)
        .layout_tests(true)
        .generate_comments(false)
        .generate()
        .unwrap_or_else(|e| panic!("{HEADER}: {e}"))
        .write_to_file(out)
        .expect("OUT_DIR is writable");
}
