// SPDX-License-Identifier: GPL-2.0-only

//! `pmskb-run` where there is no store, and the library in programs of this machine. What needs
//! a store is in `tests/guest`.

use std::{
    path::PathBuf,
    process::{Command, Output},
};

fn run(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_pmskb-run"))
        .args(args)
        .output()
        .unwrap()
}

/// The library, beside the program.
fn library() -> PathBuf {
    let library =
        PathBuf::from(env!("CARGO_BIN_EXE_pmskb-run")).with_file_name("libpmskb_preload.so");
    assert!(library.exists(), "{} was not built", library.display());
    library
}

/// A shell with the library, and a store that does not exist.
fn shell(script: &str, more: &[(&str, &str)]) -> Output {
    Command::new("bash")
        .args(["-c", script])
        .env("LD_PRELOAD", library())
        .env("PMSKB_RUN_STORE", "/nonexistent/pmskb0")
        .envs(more.iter().copied())
        .output()
        .unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn help_is_a_page_and_mistakes_are_125() {
    let help = run(&["--help"]);
    assert!(help.status.success());
    for option in ["--store", "--verbose", "--stats", "--require"] {
        assert!(text(&help.stdout).contains(option), "{option}");
    }
    assert_eq!(run(&[]).status.code(), Some(125));
    assert_eq!(run(&["--nonsense", "true"]).status.code(), Some(125));
}

#[test]
fn without_a_store_nothing_is_run_and_it_is_said_why() {
    let out = run(&["--store", "pmskb999999", "touch", "/nonexistent/x"]);
    assert_eq!(out.status.code(), Some(125));
    assert!(text(&out.stderr).contains("pmskbctl attach"), "{out:?}");
    // What is no store is none.
    let out = run(&["--store", "/dev/null", "true"]);
    assert_eq!(out.status.code(), Some(125));
    assert!(text(&out.stderr).starts_with("pmskb-run: "), "{out:?}");
}

/// A connection to a port where nobody listens: what the program sees of it is the same.
const REFUSED: &str = "exec 3<>/dev/tcp/127.0.0.1/1";

#[test]
fn a_store_that_cannot_be_opened_changes_nothing_and_says_nothing() {
    let plain = Command::new("bash").args(["-c", REFUSED]).output().unwrap();
    let with = shell(REFUSED, &[]);
    assert_eq!(plain.status.code(), with.status.code());
    assert_eq!(text(&plain.stderr), text(&with.stderr));
    assert!(
        text(&with.stderr).contains("Connection refused"),
        "{with:?}"
    );
}

#[test]
fn it_is_said_if_asked_for_and_fails_the_call_if_required() {
    let said = shell(REFUSED, &[("PMSKB_RUN_VERBOSE", "1")]);
    let error = text(&said.stderr);
    // ENOENT
    assert!(error.contains(": not attached, errno 2\n"), "{error}");
    assert!(error.contains("Connection refused"), "{error}");
    let failed = shell(REFUSED, &[("PMSKB_RUN_REQUIRE", "1")]);
    let error = text(&failed.stderr);
    assert!(error.contains("No such file or directory"), "{error}");
    assert!(!error.contains("Connection refused"), "{error}");
}

#[test]
fn nothing_is_said_to_what_has_become_of_the_standard_error() {
    let script = format!("exec 4>&2 2>/dev/null 2>&1; {REFUSED} 2>&4");
    let out = shell(&script, &[("PMSKB_RUN_VERBOSE", "1")]);
    assert!(!text(&out.stdout).contains("pmskb-run"), "{out:?}");
}

#[test]
fn without_its_environment_the_library_does_nothing() {
    let out = Command::new("bash")
        .args(["-c", REFUSED])
        .env("LD_PRELOAD", library())
        .env("PMSKB_RUN_REQUIRE", "1")
        .env("PMSKB_RUN_VERBOSE", "1")
        .output()
        .unwrap();
    let error = text(&out.stderr);
    assert!(error.contains("Connection refused"), "{error}");
    assert!(!error.contains("pmskb-run"), "{error}");
}
