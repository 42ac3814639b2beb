//! What PID 1 does before it serves: mounts, loopback, control groups; and what a host gives a fresh
//! microVM when it connects: the time and entropy.

use std::{fs, os::fd::AsFd as _, path::Path};

use nix::{
    errno::Errno,
    mount::{MsFlags, mount},
    sys::resource::{Resource, setrlimit},
    time::{ClockId, clock_gettime, clock_settime},
};

use crate::{log::log, sys};

/// Directory of everything the agent makes, on a tmpfs that no container sees.
pub const RUN_DIR: &str = "/run/hull";
/// Where the agent sees the control groups.
pub const CGROUP_DIR: &str = "/sys/fs/cgroup";

/// The steps, in order: (source, target, type, flags, data).
const MOUNTS: [(&str, &str, &str, MsFlags, &str); 6] = [
    ("proc", "/proc", "proc", NO_EXEC, ""),
    ("sysfs", "/sys", "sysfs", NO_EXEC, ""),
    ("devtmpfs", "/dev", "devtmpfs", MsFlags::MS_NOSUID, "mode=0755"),
    ("tmpfs", "/run", "tmpfs", NO_DEV, "mode=0755"),
    ("tmpfs", "/tmp", "tmpfs", NO_DEV, "mode=1777"),
    ("cgroup2", CGROUP_DIR, "cgroup2", NO_EXEC, ""),
];
const NO_EXEC: MsFlags = MsFlags::MS_NOSUID
    .union(MsFlags::MS_NODEV)
    .union(MsFlags::MS_NOEXEC);
/// What the agent may have open; a process gets the usual limit (`process::credentials`).
const OPEN_FILES: u64 = 16_384;
const NO_DEV: MsFlags = MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV);

/// Prepares the microVM. A step that fails is logged and not fatal: what it was for will fail with a clear
/// error when it is asked for.
pub fn prepare() {
    // A process that is being made has this one's memory; see `process::child`.
    if let Err(errno) = nix::sys::prctl::set_dumpable(false) {
        log!("making the agent undumpable: {errno}");
    }
    // Three streams, a process and a connection each, for as many execs as the host may have at once.
    if let Err(errno) = setrlimit(Resource::RLIMIT_NOFILE, OPEN_FILES, OPEN_FILES) {
        log!("raising the limit of open files: {errno}");
    }
    for (source, target, kind, flags, data) in MOUNTS {
        match mount(Some(source), target, Some(kind), flags, Some(data)) {
            // The kernel mounts /dev itself where it is configured to.
            Ok(()) | Err(Errno::EBUSY) => {}
            Err(errno) => log!("mounting {kind} on {target}: {errno}"),
        }
    }
    // Nothing of a container may come back to the agent's mount namespace.
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    if let Err(errno) = mount(None::<&str>, "/", None::<&str>, private, None::<&str>) {
        log!("making mounts private: {errno}");
    }
    if let Err(error) = fs::create_dir_all(RUN_DIR) {
        log!("creating {RUN_DIR}: {error}");
    }
    enable_controllers();
    // Compiling a filter takes 2 MiB of memory for good, and calls that a filter always allows don't run it.
    let _ = fs::write("/proc/sys/net/core/bpf_jit_enable", "0");
    if let Err(errno) = sys::interface_up("lo") {
        log!("bringing the loopback interface up: {errno}");
    }
}

/// Every container's processes are counted; CPU time is counted without a controller. The others are enabled when
/// a limit needs them: each costs a running kernel milliseconds at first, the memory controller tens of them, and
/// the microVM's own size is a container's usual limit.
fn enable_controllers() {
    if let Err(error) = enable_controller("pids") {
        log!("enabling the pids controller: {error}");
    }
}

/// Makes a controller available to containers.
pub fn enable_controller(controller: &str) -> std::io::Result<()> {
    fs::write(
        Path::new(CGROUP_DIR).join("cgroup.subtree_control"),
        format!("+{controller}"),
    )
}

/// Time since the kernel started, in nanoseconds.
pub fn boot_time_ns() -> u64 {
    let Ok(time) = clock_gettime(ClockId::CLOCK_BOOTTIME) else {
        return 0;
    };
    let seconds = u64::try_from(time.tv_sec()).unwrap_or(0);
    seconds
        .saturating_mul(1_000_000_000)
        .saturating_add(u64::try_from(time.tv_nsec()).unwrap_or(0))
}

/// Sets the clock to the host's, unless it is within a millisecond already (kvm-clock gives seconds only at boot).
pub fn set_clock(realtime_ns: u64) -> Result<(), Errno> {
    const TOLERANCE_NS: i64 = 1_000_000;
    let host_ns = i64::try_from(realtime_ns).map_err(|_| Errno::EINVAL)?;
    let now = clock_gettime(ClockId::CLOCK_REALTIME)?;
    let now_ns = now
        .tv_sec()
        .saturating_mul(1_000_000_000)
        .saturating_add(now.tv_nsec());
    if host_ns.abs_diff(now_ns) <= TOLERANCE_NS.unsigned_abs() {
        return Ok(());
    }
    clock_settime(
        ClockId::CLOCK_REALTIME,
        std::time::Duration::from_nanos(realtime_ns).into(),
    )
}

/// Credits the host's entropy, so that nothing in the container blocks or repeats another microVM's numbers.
pub fn seed_random(entropy: &[u8]) -> std::io::Result<()> {
    let random = fs::OpenOptions::new().write(true).open("/dev/urandom")?;
    sys::add_entropy(random.as_fd(), entropy)?;
    Ok(())
}

/// The microVM's memory in bytes and its number of CPUs, as the kernel sees them.
pub fn size() -> (u64, u32) {
    let memory = nix::sys::sysinfo::sysinfo().map_or(0, |info| info.ram_total());
    let cpus = nix::unistd::sysconf(nix::unistd::SysconfVar::_NPROCESSORS_ONLN)
        .ok()
        .flatten();
    (
        memory,
        cpus.and_then(|count| u32::try_from(count).ok()).unwrap_or(1),
    )
}
