//! The README's five-minute tour, as it is written there.
//!
//! Its commands run one after the other in a clean shell, with a store and a home of their own. A comment `# → TEXT` says what
//! its line prints; every line must succeed.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use hull_tests::hull::{Hull, finish};

/// The first shell block of the section "Five minutes".
fn tour() -> Vec<String> {
    let readme = Path::new(env!("CARGO_MANIFEST_DIR")).join("../README.md");
    let text = fs::read_to_string(readme).expect("the README");
    let section = text
        .split("\n## ")
        .find(|section| section.starts_with("Five minutes"))
        .expect("a section \"Five minutes\"");
    let block = section.split("```sh\n").nth(1).expect("a shell block");
    let block = block.split("```").next().unwrap_or(block);
    block
        .lines()
        .filter(|line| !line.trim().is_empty())
        .map(str::to_owned)
        .collect()
}

/// What a line says that it prints.
fn promised(line: &str) -> Option<&str> {
    let (_, promise) = line.split_once("# → ")?;
    // What follows a colon explains it.
    Some(promise.split(':').next().unwrap_or(promise).trim())
}

#[test]
fn every_command_of_the_tour_does_what_the_readme_says() {
    let Some(hull) = Hull::with_images(&[]) else {
        return;
    };
    let lines = tour();
    assert!(lines.len() >= 10, "the tour is too short to be one: {lines:?}");
    let here = tempfile::tempdir().expect("a temporary folder");
    let from = |variable: &str| PathBuf::from(std::env::var_os(variable).expect("checked by with_images"));
    // As after `cargo xtask demo`: programs in target/release, images in ~/.cache/hull/images.
    fs::create_dir_all(here.path().join("target")).expect("our own folder");
    let programs = from("HULL_BIN");
    let programs = programs.parent().expect("a program is in a folder");
    symlink(programs, here.path().join("target/release")).expect("our own folder");
    fs::create_dir_all(here.path().join(".cache/hull")).expect("our own folder");
    symlink(from("HULL_TEST_IMAGES"), here.path().join(".cache/hull/images")).expect("our own folder");

    let mut script = String::from("set -eu -o pipefail\n");
    for (number, line) in lines.iter().enumerate() {
        script += &format!("{line}\necho \"@@ {number} done\"\n");
    }
    let mut shell = Command::new("bash");
    shell
        .args(["--noprofile", "--norc", "-c", &script])
        .current_dir(here.path())
        .env_clear()
        .env("PATH", std::env::var_os("PATH").unwrap_or_default())
        .env("HOME", here.path())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    for variable in ["HULL_VMM", "HULL_KERNEL", "HULL_AGENT_IMAGE"] {
        shell.env(variable, from(variable));
    }
    for (name, value) in hull.command(&[]).get_envs() {
        if let Some(value) = value {
            shell.env(name, value);
        }
    }
    let outcome = finish(shell.spawn().expect("bash starts"));
    let mut rest = String::from_utf8_lossy(&outcome.stdout).into_owned();
    for (number, line) in lines.iter().enumerate() {
        let marker = format!("@@ {number} done\n");
        let Some((printed, after)) = rest.split_once(&marker) else {
            panic!("failed: {line}\nit printed: {rest}\n{}", outcome.stderr);
        };
        if let Some(promise) = promised(line) {
            assert!(printed.contains(promise), "{line}\nprinted: {printed}");
        }
        rest = after.to_owned();
    }
    assert_eq!(outcome.code(), 0, "{}", outcome.stderr);
    assert_eq!(hull.settle(), Vec::<String>::new());
}
