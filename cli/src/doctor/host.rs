//! What the host's kernel and its settings offer.

use std::{fs, os::unix::fs::MetadataExt as _, path::Path};

use super::Check;
use crate::output;

/// First user id of jailed VMMs, and how many there are: `sandbox` derives each from its container's id.
const JAIL_UIDS: (u32, u32) = (0x6800_0000, 0x0100_0000);

fn read(path: &str) -> Option<String> {
    fs::read_to_string(path).ok().map(|text| text.trim().to_owned())
}

/// Which kind of KVM this is, from what the processor says it has.
fn backend() -> &'static str {
    let info = read("/proc/cpuinfo").unwrap_or_default();
    let flags = info.lines().find(|line| line.starts_with("flags")).unwrap_or("");
    let has = |flag: &str| flags.split_whitespace().any(|word| word == flag);
    match (has("vmx"), has("svm")) {
        (true, _) => "hardware virtualisation (VMX)",
        (_, true) => "hardware virtualisation (SVM)",
        _ => "neither VMX nor SVM: pagetable-based (PVM)",
    }
}

/// The name of a group, or its number.
fn group_name(gid: u32) -> String {
    let groups = read("/etc/group").unwrap_or_default();
    let named = groups.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)?.parse() == Ok(gid)).then(|| name.to_owned())
    });
    named.unwrap_or_else(|| gid.to_string())
}

pub(super) fn kvm() -> Check {
    const NAME: &str = "/dev/kvm";
    let Err(error) = sandbox::check_host() else {
        return Check::ok(NAME, backend());
    };
    // The error itself ends with the way out; who owns the device says which of them it is.
    let owner = fs::metadata(NAME)
        .map(|metadata| {
            format!(
                "it belongs to group {}, mode {:o}",
                group_name(metadata.gid()),
                metadata.mode() & 0o777
            )
        })
        .unwrap_or_default();
    Check::missing(NAME, format!("{:#}", anyhow::Error::from(error)), owner)
}

pub(super) fn memory() -> Check {
    const NAME: &str = "memory";
    let meminfo = read("/proc/meminfo").unwrap_or_default();
    let kib: u64 = meminfo
        .lines()
        .find_map(|line| {
            line.strip_prefix("MemAvailable:")?
                .split_whitespace()
                .next()?
                .parse()
                .ok()
        })
        .unwrap_or(0);
    let detail = format!("{} available", output::size(kib.saturating_mul(1024)));
    if kib < 64 * 1024 {
        Check::missing(NAME, detail, "the smallest microVM needs 64 MiB; stop something")
    } else if kib < 512 * 1024 {
        Check::warning(
            NAME,
            detail,
            "a microVM that uses all the memory it is given has 512 MiB; give less by --memory",
        )
    } else {
        Check::ok(NAME, detail)
    }
}

/// Whether `FIRST COUNT` lies in one of the ranges of a `/proc/self/uid_map`.
fn is_mapped(map: &str, first: u64, count: u64) -> bool {
    map.lines().any(|line| {
        let mut numbers = line
            .split_whitespace()
            .filter_map(|word| word.parse::<u64>().ok());
        let (Some(inside), Some(_), Some(length)) = (numbers.next(), numbers.next(), numbers.next()) else {
            return false;
        };
        inside <= first && first + count <= inside.saturating_add(length)
    })
}

/// As root, every VMM gets a user id of its own; otherwise all run as the caller, in user namespaces.
pub(super) fn user_ids() -> Check {
    const NAME: &str = "user ids of jails";
    let (first, count) = JAIL_UIDS;
    let map = read("/proc/self/uid_map").unwrap_or_default();
    if rustix::process::geteuid().is_root() {
        if is_mapped(&map, first.into(), count.into()) {
            return Check::ok(NAME, format!("one for each microVM, from {first} on"));
        }
        return Check::missing(
            NAME,
            format!(
                "{first} to {} are not mapped in this user namespace",
                first + count - 1
            ),
            "run hull outside of the container it is in, or map these ids into it",
        );
    }
    let forbidden = read("/proc/sys/kernel/unprivileged_userns_clone").is_some_and(|value| value == "0")
        || read("/proc/sys/user/max_user_namespaces").is_some_and(|value| value == "0");
    if forbidden {
        return Check::missing(
            NAME,
            "user namespaces are forbidden to users other than root",
            "`sysctl -w kernel.unprivileged_userns_clone=1 user.max_user_namespaces=10000`, or run hull as root",
        );
    }
    Check::warning(
        NAME,
        "not root: all microVMs run as this user, each in a user namespace",
        "run hull as root to give each microVM a user id of its own",
    )
}

pub(super) fn seccomp() -> Check {
    const NAME: &str = "seccomp";
    match read("/proc/sys/kernel/seccomp/actions_avail") {
        Some(actions) if actions.split(' ').any(|action| action == "kill_process") => {
            Check::ok(NAME, "filters can kill a process")
        }
        _ => Check::missing(
            NAME,
            "the kernel can't filter system calls",
            "use a kernel with CONFIG_SECCOMP_FILTER",
        ),
    }
}

pub(super) fn landlock() -> Check {
    use landlock::{AccessFs, CompatLevel, Compatible as _, Ruleset, RulesetAttr as _};
    const NAME: &str = "Landlock";
    // Making a ruleset restricts nothing until it is enforced.
    let made = Ruleset::default()
        .set_compatibility(CompatLevel::HardRequirement)
        .handle_access(AccessFs::Execute)
        .map(|ruleset| ruleset.create().is_ok());
    match made {
        Ok(true) => Check::ok(NAME, "available to the jail"),
        _ => Check::warning(
            NAME,
            "the kernel doesn't offer it; the jail has one layer less",
            "boot with landlock in the list of lsm=, on a kernel with CONFIG_SECURITY_LANDLOCK",
        ),
    }
}

pub(super) fn io_uring() -> Check {
    const NAME: &str = "io_uring";
    let remedy = "`sysctl -w kernel.io_uring_disabled=0`";
    match read("/proc/sys/kernel/io_uring_disabled").as_deref() {
        Some("0") | None => Check::ok(NAME, "not disabled"),
        Some("1") if rustix::process::geteuid().is_root() => Check::ok(NAME, "for root"),
        Some(_) => Check::warning(NAME, "disabled: disks are slower", remedy),
    }
}

pub(super) fn open_files() -> Check {
    /// What `hull run` needs, with room for a container's streams.
    const LEAST: u64 = 1024;
    const NAME: &str = "open files";
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    let unlimited =
        |value: Option<u64>| value.map_or_else(|| "unlimited".to_owned(), |value| value.to_string());
    let detail = format!(
        "limit {}, may be raised to {}",
        unlimited(limit.current),
        unlimited(limit.maximum)
    );
    if limit.current.is_some_and(|current| current < LEAST) {
        return Check::warning(NAME, detail, format!("`ulimit -n {LEAST}` or more"));
    }
    Check::ok(NAME, detail)
}

pub(super) fn cgroups() -> Check {
    const NAME: &str = "cgroups";
    let root = Path::new("/sys/fs/cgroup");
    if root.join("cgroup.controllers").exists() {
        return Check::ok(NAME, "version 2");
    }
    if root.join("memory").exists() || root.join("cpu").exists() {
        // Limits are the microVM's own, set by its size; the host's groups are only read.
        return Check::ok(NAME, "version 1; not needed, a microVM's size is its limit");
    }
    Check::ok(NAME, "none; not needed, a microVM's size is its limit")
}

pub(super) fn huge_pages() -> Check {
    const NAME: &str = "huge pages";
    let setting = read("/sys/kernel/mm/transparent_hugepage/enabled").unwrap_or_default();
    let chosen = setting
        .split_once('[')
        .and_then(|(_, rest)| rest.split_once(']'))
        .map_or("not in this kernel", |(chosen, _)| chosen);
    if matches!(chosen, "always" | "madvise") {
        return Check::ok(NAME, format!("transparent, {chosen}"));
    }
    Check::warning(
        NAME,
        format!("transparent, {chosen}: guests that use much memory are slower"),
        "`echo madvise > /sys/kernel/mm/transparent_hugepage/enabled`",
    )
}

pub(super) fn clock_source() -> Check {
    const NAME: &str = "clock source";
    let current = read("/sys/devices/system/clocksource/clocksource0/current_clocksource");
    match current.as_deref() {
        Some("tsc" | "kvm-clock" | "hyperv_clocksource_tsc_page" | "arch_sys_counter") => {
            Check::ok(NAME, current.unwrap_or_default())
        }
        Some(slow) => Check::warning(
            NAME,
            format!("{slow}: reading the time takes microseconds"),
            "see `dmesg | grep -i tsc` for why the TSC isn't trusted",
        ),
        None => Check::warning(NAME, "unknown", "mount /sys"),
    }
}

/// `--storage-opt size=N` makes an ext4 file.
pub(super) fn mkfs() -> Check {
    const NAME: &str = "mkfs.ext4";
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::env::split_paths(&path).chain(["/usr/sbin".into(), "/sbin".into()]);
    let found = folders.map(|folder| folder.join(NAME)).find(|path| path.exists());
    match found {
        Some(path) => Check::ok(NAME, path.display().to_string()),
        None => Check::warning(NAME, "not found: no --storage-opt size=", "install e2fsprogs"),
    }
}

/// Taps need no interface to be tried: the device opens or doesn't.
pub(super) fn taps() -> Check {
    const NAME: &str = "/dev/net/tun";
    match fs::File::options().read(true).write(true).open(NAME) {
        Ok(_) => Check::ok(NAME, "opens"),
        Err(error) => Check::warning(
            NAME,
            format!("{error}: no --network"),
            "load the module tun, and run hull as root",
        ),
    }
}

/// The program, and the kernel behind it, which it asks.
pub(super) fn firewall() -> Check {
    const NAME: &str = "nft";
    let path = std::env::var("PATH").unwrap_or_default();
    let output = std::process::Command::new("nft")
        .args(["list", "tables"])
        .env("PATH", format!("{path}:/usr/sbin:/sbin"))
        .output();
    match output {
        Ok(output) if output.status.success() => Check::ok(NAME, "nftables answers"),
        Ok(output) => Check::warning(
            NAME,
            format!(
                "{}: no --network",
                output::printable(String::from_utf8_lossy(&output.stderr).trim())
            ),
            "run hull as root, on a kernel with nf_tables",
        ),
        Err(error) => Check::warning(NAME, format!("{error}: no --network"), "install nftables"),
    }
}

pub(super) fn journal() -> Check {
    const NAME: &str = "journal";
    const SOCKET: &str = "/run/systemd/journal/socket";
    if Path::new(SOCKET).exists() {
        return Check::ok(NAME, SOCKET);
    }
    Check::warning(
        NAME,
        "no journald runs: no --log-driver journald",
        "start systemd-journald, or keep to json-file",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn user_ids_outside_of_the_namespace_are_noticed() {
        let whole = "         0          0 4294967295\n";
        assert!(is_mapped(whole, 0x6855_0000, 0x1_0000));
        let rootless = "         0       1000          1\n         1     100000      65536\n";
        assert!(!is_mapped(rootless, 0x6855_0000, 0x1_0000));
        assert!(is_mapped(rootless, 1, 65536));
        assert!(!is_mapped(rootless, 2, 65536));
    }

    #[test]
    fn group_without_a_name_is_its_number() {
        assert_eq!(group_name(0), "root");
        assert_eq!(group_name(u32::MAX - 7), (u32::MAX - 7).to_string());
    }
}
