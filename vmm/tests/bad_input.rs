//! What a user gets wrong: one clear error, the documented exit status, nothing left behind.

mod support;

use std::{
    fs,
    os::unix::{fs::PermissionsExt, process::CommandExt},
    path::Path,
    process::Command,
};
use support::{Code, Finished, Guest, VMM, kvm_is_usable, run};

fn guest() -> Guest {
    Guest::new(&Code::new().triple_fault())
}

/// One line that begins with the program's name and has all of `parts`.
fn assert_one_error(finished: &Finished, status: i32, parts: &[&str]) {
    assert_eq!(finished.status.code(), Some(status), "{finished:?}");
    let lines: Vec<_> = finished.stderr.lines().collect();
    assert_eq!(lines.len(), 1, "{finished:?}");
    assert!(lines[0].starts_with("hull-vmm: "), "{finished:?}");
    for part in parts {
        assert!(lines[0].contains(part), "{part:?} is not in {:?}", lines[0]);
    }
}

#[test]
fn command_line_mistakes_exit_with_two() {
    assert_one_error(&run(&mut Command::new(VMM)), 2, &["--config", "--help"]);
    assert_one_error(&run(Command::new(VMM).arg("--frob")), 2, &["--frob"]);
    assert_one_error(
        &run(Command::new(VMM).args(["--control-fd", "77"])),
        2,
        &["--control-fd 77", "not an open"],
    );
    assert_one_error(
        &run(Command::new(VMM).args(["--control-fd", "1"])),
        2,
        &["--control-fd 1"],
    );
    assert_one_error(
        &run(Command::new(VMM).args(["--config", "/nowhere.json"])),
        2,
        &["/nowhere.json", "No such file"],
    );
    assert_one_error(
        &run(Command::new(VMM).args(["--control-socket", "/nowhere/x"])),
        2,
        &["/nowhere/x"],
    );
}

#[test]
fn configuration_mistakes_name_the_field() {
    let cases: [(&str, serde_json::Value, &[&str]); 8] = [
        ("vcpu_count", 0.into(), &["vcpu_count is 0", "1 to 37"]),
        ("vcpu_count", 200.into(), &["vcpu_count is 200"]),
        ("vcpu_count", 1000.into(), &["config.json"]),
        ("memory_mib", 1.into(), &["memory_mib is 1", "16 MiB"]),
        (
            "memory_mib",
            100_000_000.into(),
            &["memory_mib is 100000000", "this host has"],
        ),
        ("memroy", 1.into(), &["unknown field `memroy`"]),
        (
            "kernel",
            serde_json::json!({"path": "/nowhere/vmlinux"}),
            &["kernel", "/nowhere/vmlinux", "No such file"],
        ),
        ("kernel", serde_json::json!({"fd": 0}), &["kernel", "path"]),
    ];
    for (field, value, parts) in cases {
        assert_one_error(&guest().with(field, value).run(), 2, parts);
    }
    let directory = guest();
    let path = directory.directory.path().to_owned();
    assert_one_error(
        &directory
            .with("kernel", serde_json::json!({ "path": path }))
            .run(),
        2,
        &["kernel", "regular file"],
    );
}

#[test]
fn unusable_kernels_are_told_apart() {
    if !kvm_is_usable() {
        return;
    }
    let whole = Code::new().print("x").triple_fault().elf();
    let mut arm = whole.clone();
    arm[18] = 183;
    let mut compressed = vec![0; 4096];
    compressed[0x202..0x206].copy_from_slice(b"HdrS");
    let mut high = whole.clone();
    high[88..96].copy_from_slice(&0x4000_0000u64.to_le_bytes());
    for (bytes, parts) in [
        (&b""[..], &["an empty file", "vmlinux"][..]),
        (&b"#!/bin/sh"[..], &["not an ELF file"]),
        (&arm, &["another architecture"]),
        (&compressed, &["bzImage"]),
        (&whole[..whole.len() - 3], &["truncated"]),
        (&whole[..70], &["truncated"]),
        (&high, &["raise memory_mib"]),
    ] {
        let guest = guest();
        support::write_file(&guest.path("kernel"), bytes);
        assert_one_error(&guest.run(), 1, parts);
    }
}

fn with_disk(make: impl FnOnce(&Path), read_only: bool) -> Finished {
    let guest = guest();
    let path = guest.path("disk");
    make(&path);
    let disk = serde_json::json!([{ "id": "data", "source": { "path": path }, "read_only": read_only }]);
    guest.with("blk", disk).run()
}

#[test]
fn unusable_disks_are_told_apart() {
    if !kvm_is_usable() {
        return;
    }
    assert_one_error(&with_disk(|_| (), true), 2, &["data", "No such file"]);
    assert_one_error(
        &with_disk(|path| fs::create_dir(path).unwrap(), true),
        2,
        &["data", "regular file"],
    );
    assert_one_error(
        &with_disk(|path| support::write_file(path, b""), true),
        1,
        &["data"],
    );
    assert_one_error(
        &with_disk(|path| support::write_file(path, b"odd"), false),
        1,
        &["data"],
    );
    assert!(
        with_disk(|path| support::write_file(path, &[0; 512]), true)
            .status
            .success()
    );
}

#[test]
fn read_only_disk_file_cannot_be_attached_writable() {
    if rustix::process::geteuid().is_root() {
        // Root may write to anything: the mode is no obstacle, so there is nothing to refuse.
        return;
    }
    let finished = with_disk(
        |path| {
            support::write_file(path, &[0; 512]);
            fs::set_permissions(path, fs::Permissions::from_mode(0o444)).unwrap();
        },
        false,
    );
    assert_one_error(&finished, 2, &["data", "Permission denied"]);
}

#[test]
fn user_without_access_to_kvm_is_told_what_to_do() {
    let accessible =
        fs::metadata("/dev/kvm").is_ok_and(|metadata| metadata.permissions().mode() & 0o006 != 0);
    if !rustix::process::geteuid().is_root() || !Path::new("/dev/kvm").exists() || accessible {
        eprintln!("skipped: needs root and a /dev/kvm for root only");
        return;
    }
    let guest = guest();
    fs::set_permissions(guest.directory.path(), fs::Permissions::from_mode(0o777)).unwrap();
    let config = guest.path("config.json");
    fs::write(&config, guest.config.to_string()).unwrap();
    let copy = guest.path("hull-vmm");
    fs::copy(VMM, &copy).unwrap();
    let finished = run(Command::new(copy).arg("--config").arg(config).uid(1234).gid(1234));
    assert_one_error(&finished, 1, &["/dev/kvm", "no permission", "group"]);
}

#[test]
fn host_without_kvm_is_told_what_is_missing() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: needs root, to cover /dev in a mount namespace");
        return;
    }
    let guest = guest();
    let config = guest.path("config.json");
    fs::write(&config, guest.config.to_string()).unwrap();
    let mut command = Command::new(VMM);
    command.arg("--config").arg(config);
    cover_dev(&mut command);
    assert_one_error(
        &run(&mut command),
        1,
        &["/dev/kvm does not exist", "virtualisation"],
    );
}

/// The command gets an empty /dev.
#[expect(unsafe_code, reason = "mounts between fork and exec")]
fn cover_dev(command: &mut Command) {
    use rustix::{
        mount::{MountFlags, MountPropagationFlags, mount, mount_change},
        thread::{UnshareFlags, unshare_unsafe},
    };
    // SAFETY: system calls only; the descriptor table is not unshared.
    unsafe {
        command.pre_exec(|| {
            unshare_unsafe(UnshareFlags::NEWNS)?;
            mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
            mount("tmpfs", "/dev", "tmpfs", MountFlags::empty(), None)?;
            Ok(())
        });
    }
}
