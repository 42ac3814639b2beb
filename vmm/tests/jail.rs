//! Tries to cross every layer of the jail.
//!
//! Each probe runs in a process of its own: this program starts itself with the probe's name, the child enters the jail with
//! the library's own functions, tries what must not work, and exits with 0 if it did not work. Probes of a seccomp filter
//! expect the child to die by `SIGSYS`, having named the call.
//!
//! Without root the layers are the same, inside a user namespace; as root both ways are tried.

#![expect(clippy::unwrap_used, reason = "test code: a panic is a failed test")]

#[path = "support/share_probes.rs"]
mod share_probes;
mod support;

use rustix::{
    fs::{Mode, OFlags, openat},
    io::Errno,
    process::{Resource, Rlimit, getrlimit, setrlimit},
};
use std::{
    fs::{self, File},
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    os::{
        fd::{AsFd, AsRawFd},
        linux::net::SocketAddrExt,
        unix::{
            net::{SocketAddr, UnixListener, UnixStream},
            process::{CommandExt, ExitStatusExt},
        },
    },
    process::{Command, ExitCode, Stdio},
    time::Instant,
};
use support::{Code, Guest, Vmm, kvm_is_usable};
use vmm::jail::{
    self, JailError, JailSpec, fds, limits,
    seccomp::{Filters, Role},
    signals,
};

const PROBE: &str = "HULL_JAIL_PROBE";
/// Any unprivileged user.
const USER: u32 = 1234;

type Outcome = Result<(), String>;
/// A name and what it tries.
type Probe = (&'static str, fn() -> Outcome);
/// A name, whose filter, the call it must stop, and how it is made.
type Denied = (&'static str, Role, i64, fn());

/// What a probe tries, in a process of its own.
const PROBES: &[Probe] = &[
    ("root_is_empty_and_read_only", root_is_empty_and_read_only),
    ("nothing_can_be_mounted", nothing_can_be_mounted),
    ("user_cannot_be_changed_back", user_cannot_be_changed_back),
    (
        "no_capability_is_left_or_comes_back",
        no_capability_is_left_or_comes_back,
    ),
    ("no_new_privileges_is_final", no_new_privileges_is_final),
    ("hosts_network_is_unreachable", hosts_network_is_unreachable),
    (
        "abstract_sockets_of_the_host_are_unreachable",
        abstract_sockets_of_the_host_are_unreachable,
    ),
    ("parent_cannot_be_signalled", parent_cannot_be_signalled),
    ("host_name_cannot_be_changed", host_name_cannot_be_changed),
    ("held_directory_opens_nothing", held_directory_opens_nothing),
    (
        "limits_bound_descriptors_and_cannot_be_raised",
        limits_bound_descriptors_and_cannot_be_raised,
    ),
    (
        "file_size_is_bounded_and_the_process_survives",
        file_size_is_bounded_and_the_process_survives,
    ),
    (
        "inherited_descriptors_are_closed",
        inherited_descriptors_are_closed,
    ),
];

/// Calls each filter must stop. The closure makes the call; it must not return.
const DENIED: &[Denied] = &[
    (
        "event_loop_opens_a_file",
        Role::EventLoop,
        libc::SYS_openat,
        || drop(File::open("/x")),
    ),
    ("vcpu_opens_a_file", Role::Vcpu, libc::SYS_openat, || {
        drop(File::open("/x"))
    }),
    ("control_opens_a_file", Role::Control, libc::SYS_openat, || {
        drop(File::open("/x"))
    }),
    ("disk_opens_a_file", Role::Disk, libc::SYS_openat, || {
        drop(File::open("/x"))
    }),
    ("shares_execute", Role::Shares, libc::SYS_execve, || {
        raw::call(libc::SYS_execve, [0, 0, 0])
    }),
    ("shares_mount", Role::Shares, libc::SYS_mount, || {
        raw::call(libc::SYS_mount, [0, 0, 0])
    }),
    ("shares_move_a_mount", Role::Shares, libc::SYS_move_mount, || {
        raw::call(libc::SYS_move_mount, [0, 0, 0])
    }),
    (
        "shares_open_by_handle",
        Role::Shares,
        libc::SYS_open_by_handle_at,
        || raw::call(libc::SYS_open_by_handle_at, [0, 0, 0]),
    ),
    ("shares_make_a_thread", Role::Shares, libc::SYS_clone3, || {
        raw::call(libc::SYS_clone3, [0; 3])
    }),
    ("shares_make_a_namespace", Role::Shares, libc::SYS_unshare, || {
        raw::call(libc::SYS_unshare, [0; 3])
    }),
    (
        "shares_receive_a_descriptor",
        Role::Shares,
        libc::SYS_recvmsg,
        // But from the host's orders, which are its standard input.
        || raw::call(libc::SYS_recvmsg, [3, 0, 0]),
    ),
    (
        "shares_take_a_descriptor",
        Role::Shares,
        libc::SYS_pidfd_getfd,
        || raw::call(libc::SYS_pidfd_getfd, [0; 3]),
    ),
    (
        "shares_set_up_a_ring",
        Role::Shares,
        libc::SYS_io_uring_setup,
        || raw::call(libc::SYS_io_uring_setup, [1, 0, 0]),
    ),
    ("shares_become_root", Role::Shares, libc::SYS_setresuid, || {
        raw::call(libc::SYS_setresuid, [0; 3])
    }),
    ("shares_change_root", Role::Shares, libc::SYS_chroot, || {
        raw::call(libc::SYS_chroot, [0; 3])
    }),
    ("shares_run_a_vcpu", Role::Shares, libc::SYS_ioctl, || {
        raw::ioctl(0xae80)
    }),
    ("disk_makes_a_thread", Role::Disk, libc::SYS_clone3, || {
        raw::call(libc::SYS_clone3, [0; 3])
    }),
    ("disk_runs_a_vcpu", Role::Disk, libc::SYS_ioctl, || {
        raw::ioctl(0xae80)
    }),
    ("setup_opens_a_file", Role::Setup, libc::SYS_openat, || {
        drop(File::open("/x"))
    }),
    (
        "event_loop_makes_a_socket",
        Role::EventLoop,
        libc::SYS_socket,
        || drop(UnixStream::connect("/x")),
    ),
    ("vcpu_makes_a_thread", Role::Vcpu, libc::SYS_clone3, || {
        raw::call(libc::SYS_clone3, [0; 3])
    }),
    (
        "event_loop_makes_a_thread",
        Role::EventLoop,
        libc::SYS_clone3,
        || raw::call(libc::SYS_clone3, [0; 3]),
    ),
    ("control_makes_a_thread", Role::Control, libc::SYS_clone3, || {
        raw::call(libc::SYS_clone3, [0; 3])
    }),
    (
        "event_loop_makes_memory_executable",
        Role::EventLoop,
        libc::SYS_mprotect,
        raw::protect_executable,
    ),
    (
        "vcpu_maps_executable_memory",
        Role::Vcpu,
        libc::SYS_mmap,
        raw::map_executable,
    ),
    (
        "setup_maps_executable_memory",
        Role::Setup,
        libc::SYS_mmap,
        raw::map_executable,
    ),
    ("event_loop_makes_a_vm", Role::EventLoop, libc::SYS_ioctl, || {
        raw::ioctl(0xae01)
    }),
    ("vcpu_makes_a_vm", Role::Vcpu, libc::SYS_ioctl, || {
        raw::ioctl(0xae01)
    }),
    ("vcpu_pushes_into_a_terminal", Role::Vcpu, libc::SYS_ioctl, || {
        raw::ioctl(libc::TIOCSTI)
    }),
    ("control_runs_a_vcpu", Role::Control, libc::SYS_ioctl, || {
        raw::ioctl(0xae80)
    }),
    ("vcpu_kills_another_process", Role::Vcpu, libc::SYS_kill, || {
        raw::call(libc::SYS_kill, [1, 9, 0])
    }),
    (
        "vcpu_signals_another_process",
        Role::Vcpu,
        libc::SYS_tgkill,
        || raw::call(libc::SYS_tgkill, [1, 1, 9]),
    ),
    ("event_loop_traces", Role::EventLoop, libc::SYS_ptrace, || {
        raw::call(libc::SYS_ptrace, [0, 0, 0])
    }),
    ("setup_executes", Role::Setup, libc::SYS_execve, || {
        raw::call(libc::SYS_execve, [0, 0, 0])
    }),
    (
        "event_loop_sets_up_a_ring",
        Role::EventLoop,
        libc::SYS_io_uring_setup,
        || {
            raw::call(libc::SYS_io_uring_setup, [1, 0, 0]);
        },
    ),
];

/// Whole processes, seen from outside.
const OUTSIDE: &[Probe] = &[
    (
        "running_vmm_is_confined_in_every_thread",
        running_vmm_is_confined_in_every_thread,
    ),
    (
        "only_root_takes_another_identity",
        only_root_takes_another_identity,
    ),
];

fn main() -> ExitCode {
    if let Ok(probe) = std::env::var(PROBE) {
        return run_probe(&probe);
    }
    let filter = std::env::args()
        .skip(1)
        .find(|argument| !argument.starts_with('-'));
    let wanted = |name: &str| {
        filter
            .as_ref()
            .is_none_or(|filter| name.contains(filter.as_str()))
    };
    let is_root = rustix::process::geteuid().is_root();
    let start_time = Instant::now();
    let (mut passed, mut failed) = (0, 0);
    let mut report = |name: &str, outcome: Outcome| match outcome {
        Ok(()) => {
            println!("test {name} ... ok");
            passed += 1;
        }
        Err(error) => {
            println!("test {name} ... FAILED: {error}");
            failed += 1;
        }
    };
    let probes = PROBES.iter().chain(share_probes::PROBES);
    for (name, _) in probes.filter(|(name, _)| wanted(name)) {
        report(name, expect_success(start(name, None)));
        if is_root {
            report(
                &format!("{name} (without root)"),
                expect_success(start(name, Some(USER))),
            );
        }
    }
    for (name, _, call, _) in DENIED.iter().filter(|(name, ..)| wanted(name)) {
        report(name, expect_sigsys(start(name, None), *call));
    }
    for (name, probe) in OUTSIDE.iter().filter(|(name, _)| wanted(name)) {
        report(name, probe());
    }
    let result = if failed == 0 { "ok" } else { "FAILED" };
    let elapsed = start_time.elapsed().as_secs_f64();
    println!(
        "\ntest result: {result}. {passed} passed; {failed} failed; 0 ignored; 0 measured; 0 filtered out; \
         finished in {elapsed:.2}s"
    );
    if failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// Starts this program as a probe, as root or as somebody else.
fn start(name: &str, user: Option<u32>) -> Result<(std::process::ExitStatus, String), String> {
    // A place every user may execute from.
    let program = std::env::current_exe().map_err(|error| error.to_string())?;
    let mut command = Command::new("/proc/self/exe");
    if user.is_some() {
        let copy = std::env::temp_dir().join(format!("hull-jail-probe-{}", std::process::id()));
        fs::copy(&program, &copy).map_err(|error| error.to_string())?;
        command = Command::new(&copy);
    }
    command
        .env(PROBE, name)
        .env("RUST_BACKTRACE", "0")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    if let Some(user) = user {
        command.uid(user).gid(user);
    }
    let mut child = command.spawn().map_err(|error| error.to_string())?;
    let mut stderr = String::new();
    child
        .stderr
        .take()
        .unwrap()
        .read_to_string(&mut stderr)
        .map_err(|error| error.to_string())?;
    let status = support::wait(&mut child);
    if user.is_some() {
        let _ = fs::remove_file(command.get_program());
    }
    Ok((status, stderr))
}

fn expect_success(result: Result<(std::process::ExitStatus, String), String>) -> Outcome {
    let (status, stderr) = result?;
    if status.success() {
        Ok(())
    } else {
        Err(format!("{status}: {stderr}"))
    }
}

fn expect_sigsys(result: Result<(std::process::ExitStatus, String), String>, call: i64) -> Outcome {
    let (status, stderr) = result?;
    let line = format!("system call {call} is not allowed");
    if status.signal() == Some(libc::SIGSYS) && stderr.contains(&line) {
        Ok(())
    } else {
        Err(format!("{status}: {stderr}"))
    }
}

fn run_probe(name: &str) -> ExitCode {
    let mut probes = PROBES.iter().chain(share_probes::PROBES);
    let outcome = if let Some((_, probe)) = probes.find(|(probe, _)| *probe == name) {
        probe()
    } else if let Some((_, role, _, call)) = DENIED.iter().find(|(probe, ..)| *probe == name) {
        enter().and_then(|()| {
            let filters = Filters::compile().map_err(|error| error.to_string())?;
            filters.of(*role).apply().map_err(|error| error.to_string())?;
            call();
            Err("the call was allowed".to_owned())
        })
    } else {
        Err(format!("no probe {name}"))
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn enter() -> Outcome {
    jail::enter(&JailSpec::new(None, None)).map_err(|error| vmm::control::driver::chain(&error))
}

fn must_fail<T, E: std::fmt::Display>(what: &str, result: Result<T, E>) -> Outcome {
    result.map_or(Ok(()), |_| Err(format!("{what} worked")))
}

fn root_is_empty_and_read_only() -> Outcome {
    enter()?;
    for path in [
        "/etc/passwd",
        "/proc/self/status",
        "/dev/kvm",
        "/dev/null",
        "/work",
        "/..",
    ] {
        must_fail(path, File::open(path).and_then(|mut file| file.read(&mut [0])))?;
    }
    must_fail(
        "listing /",
        fs::read_dir("/")
            .map_err(|e| e.to_string())
            .and_then(|mut entries| entries.next().map(|_| ()).ok_or_else(|| "empty".to_owned())),
    )?;
    must_fail("creating a file", File::create("/x"))?;
    must_fail("creating a directory", fs::create_dir("/x"))
}

fn nothing_can_be_mounted() -> Outcome {
    enter()?;
    let flags = rustix::mount::MountFlags::empty();
    must_fail(
        "mounting proc",
        rustix::mount::mount("proc", "/", "proc", flags, None),
    )?;
    must_fail(
        "mounting a tmpfs",
        rustix::mount::mount("tmpfs", "/", "tmpfs", flags, None),
    )?;
    must_fail("remounting", rustix::mount::mount_remount("/", flags, c""))
}

fn user_cannot_be_changed_back() -> Outcome {
    enter()?;
    let root = rustix::process::Uid::ROOT;
    if rustix::process::getuid().is_root() || rustix::process::geteuid().is_root() {
        return Err("still root".to_owned());
    }
    must_fail("setresuid", rustix::thread::set_thread_res_uid(root, root, root))?;
    must_fail(
        "setresgid",
        rustix::thread::set_thread_gid(rustix::process::Gid::ROOT),
    )?;
    must_fail(
        "setgroups",
        rustix::thread::set_thread_groups(&[rustix::process::Gid::ROOT]),
    )
}

fn no_capability_is_left_or_comes_back() -> Outcome {
    use caps::{CapSet, Capability};
    enter()?;
    for set in [
        CapSet::Effective,
        CapSet::Permitted,
        CapSet::Inheritable,
        CapSet::Ambient,
        CapSet::Bounding,
    ] {
        let left = caps::read(None, set).map_err(|error| error.to_string())?;
        if !left.is_empty() {
            return Err(format!("{set:?} has {left:?}"));
        }
    }
    must_fail(
        "raising a capability",
        caps::raise(None, CapSet::Permitted, Capability::CAP_SYS_ADMIN),
    )?;
    must_fail(
        "a new user namespace's capabilities",
        raw::new_user_namespace_with_mount(),
    )
}

fn no_new_privileges_is_final() -> Outcome {
    enter()?;
    if rustix::thread::no_new_privs() != Ok(true) {
        return Err("not set".to_owned());
    }
    must_fail("clearing it", rustix::thread::set_no_new_privs(false))
}

fn hosts_network_is_unreachable() -> Outcome {
    let listener = TcpListener::bind("127.0.0.1:0").map_err(|error| error.to_string())?;
    let address = listener.local_addr().map_err(|error| error.to_string())?;
    TcpStream::connect(address).map_err(|error| format!("before the jail: {error}"))?;
    enter()?;
    must_fail("connecting", TcpStream::connect(address))?;
    must_fail("listening", TcpListener::bind("127.0.0.1:0"))
}

fn abstract_sockets_of_the_host_are_unreachable() -> Outcome {
    let name = format!("hull-jail-probe-{}", std::process::id());
    let address = SocketAddr::from_abstract_name(name).map_err(|error| error.to_string())?;
    let _listener = UnixListener::bind_addr(&address).map_err(|error| error.to_string())?;
    enter()?;
    must_fail("connecting", UnixStream::connect_addr(&address))
}

fn parent_cannot_be_signalled() -> Outcome {
    let parent = rustix::process::getppid().ok_or("no parent")?;
    enter()?;
    must_fail("signalling", rustix::process::test_kill_process(parent))
}

fn host_name_cannot_be_changed() -> Outcome {
    enter()?;
    must_fail("sethostname", rustix::system::sethostname(b"x"))
}

/// A directory descriptor survives the change of root; Landlock stops what could be opened through it.
fn held_directory_opens_nothing() -> Outcome {
    let directory = File::open("/").map_err(|error| error.to_string())?;
    let open = || openat(&directory, "etc/passwd", OFlags::RDONLY, Mode::empty());
    open().map_err(|error| format!("before the jail: {error}"))?;
    if !raw::has_landlock() {
        eprintln!("skipped: this kernel has no Landlock");
        return Ok(());
    }
    enter()?;
    match open() {
        Err(Errno::ACCESS) => Ok(()),
        other => Err(format!("{other:?}")),
    }
}

fn limits_bound_descriptors_and_cannot_be_raised() -> Outcome {
    let file = tempfile::tempfile().map_err(|error| error.to_string())?;
    enter()?;
    let mut copies = Vec::new();
    while copies.len() < 10_000 {
        match file.try_clone() {
            Ok(copy) => copies.push(copy),
            Err(_) => break,
        }
    }
    if copies.len() > 2048 {
        return Err(format!("{} descriptors", copies.len()));
    }
    drop(copies);
    if getrlimit(Resource::Core)
        != (Rlimit {
            current: Some(0),
            maximum: Some(0),
        })
    {
        return Err("core dumps are possible".to_owned());
    }
    must_fail(
        "raising",
        setrlimit(
            Resource::Nofile,
            Rlimit {
                current: Some(4096),
                maximum: Some(4096),
            },
        ),
    )
}

fn file_size_is_bounded_and_the_process_survives() -> Outcome {
    let mut file = tempfile::tempfile().map_err(|error| error.to_string())?;
    signals::ignore_write_signals().map_err(|error| error.to_string())?;
    enter()?;
    let bound = 65 << 20;
    limits::bound_file_size(bound).map_err(|error| error.to_string())?;
    file.set_len(bound).map_err(|error| error.to_string())?;
    must_fail("growing the file", file.set_len(bound + 1))?;
    std::io::Seek::seek(&mut file, std::io::SeekFrom::Start(bound)).map_err(|error| error.to_string())?;
    must_fail("writing at its end", file.write(b"x"))
}

fn inherited_descriptors_are_closed() -> Outcome {
    let (kept, closed) = UnixStream::pair().map_err(|error| error.to_string())?;
    let (kept_number, closed_number) = (kept.as_raw_fd(), closed.as_raw_fd());
    // They are closed behind their owners' backs.
    std::mem::forget((kept, closed));
    fds::close_all_but(Some(kept_number)).map_err(|error| error.to_string())?;
    must_fail("taking the closed one", fds::inherited_socket(closed_number))?;
    fds::inherited_socket(kept_number)
        .map(|_| ())
        .map_err(|error| error.to_string())?;
    must_fail("taking stdin", fds::inherited_socket(0))?;
    fds::close_all_but(None).map_err(|error| error.to_string())
}

fn running_vmm_is_confined_in_every_thread() -> Outcome {
    if !kvm_is_usable() {
        return Ok(());
    }
    let guest = Guest::new(&Code::new().print("up").idle()).with("vcpu_count", 2.into());
    let image = guest.path("disk");
    fs::write(&image, [0; 4096]).map_err(|error| error.to_string())?;
    let disk = serde_json::json!({
        "id": "disk",
        "source": { "path": image },
        "read_only": true,
        "io_engine": "sync",
    });
    let guest = guest.with("blk", serde_json::json!([disk]));
    let vmm = Vmm::start(&guest);
    guest.wait_for_console("up");
    let process = format!("/proc/{}", vmm.pid());
    let mut threads = Vec::new();
    for task in fs::read_dir(format!("{process}/task")).map_err(|error| error.to_string())? {
        let task = task.map_err(|error| error.to_string())?.path();
        let status = fs::read_to_string(task.join("status")).map_err(|error| error.to_string())?;
        let name = status
            .lines()
            .next()
            .unwrap_or_default()
            .trim_start_matches("Name:\t")
            .to_owned();
        let expected = [
            "Seccomp:\t2",
            "NoNewPrivs:\t1",
            "CapEff:\t0000000000000000",
            "CapBnd:\t0000000000000000",
        ];
        if let Some(missing) = expected.iter().find(|line| !status.contains(**line)) {
            return Err(format!("thread {name} lacks {missing}: {status}"));
        }
        threads.push(name);
    }
    for thread in ["hull-vmm", "control", "vcpu0", "vcpu1", "disk"] {
        if !threads.iter().any(|name| name == thread) {
            return Err(format!("no thread {thread} among {threads:?}"));
        }
    }
    for namespace in ["mnt", "net", "ipc", "uts", "cgroup"] {
        let of = |process: &str| {
            fs::read_link(format!("{process}/ns/{namespace}")).map_err(|error| error.to_string())
        };
        if of(&process)? == of("/proc/self")? {
            return Err(format!("{namespace} namespace is the host's"));
        }
    }
    let entries = fs::read_dir(format!("{process}/root/"))
        .map_err(|error| error.to_string())?
        .count();
    if entries == 0 {
        Ok(())
    } else {
        Err(format!("{entries} entries in the root"))
    }
}

fn only_root_takes_another_identity() -> Outcome {
    // The jail is not entered, so this process stays as it is.
    let refused = |uid, gid| jail::enter(&JailSpec::new(uid, gid));
    match refused(Some(0), None) {
        Err(JailError::RootIdentity) => Ok(()),
        other => Err(format!("{other:?}")),
    }
}

#[expect(
    unsafe_code,
    reason = "calls no safe interface offers, because nobody should make them"
)]
mod raw {
    use super::{AsFd, AsRawFd};

    pub fn call(number: i64, arguments: [i64; 3]) {
        // SAFETY: a denied call; its arguments are never looked at.
        unsafe { libc::syscall(number, arguments[0], arguments[1], arguments[2]) };
    }

    pub fn ioctl(request: u64) {
        // SAFETY: on stdin, with an argument no request of these reads before it is denied.
        unsafe { libc::ioctl(std::io::stdin().as_fd().as_raw_fd(), request, 0) };
    }

    pub fn map_executable() {
        let protection = libc::PROT_READ | libc::PROT_EXEC;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a new mapping where the kernel likes.
        unsafe { libc::mmap(std::ptr::null_mut(), 4096, protection, flags, -1, 0) };
    }

    pub fn protect_executable() {
        // SAFETY: address 0 is not mapped; the call is denied before that matters.
        unsafe { libc::mprotect(std::ptr::null_mut(), 4096, libc::PROT_READ | libc::PROT_EXEC) };
    }

    /// A user namespace gives capabilities anew; what they are good for must still be refused.
    pub fn new_user_namespace_with_mount() -> std::io::Result<()> {
        // SAFETY: one thread; no descriptor table is unshared.
        if unsafe { libc::unshare(libc::CLONE_NEWUSER | libc::CLONE_NEWNS) } != 0 {
            return Err(std::io::Error::last_os_error());
        }
        let flags = rustix::mount::MountFlags::empty();
        Ok(rustix::mount::mount("proc", "/", "proc", flags, None)?)
    }

    /// Opens something by a handle that some filesystem may know.
    pub fn open_by_handle(directory: i32) -> Result<i32, rustix::io::Errno> {
        // Length of the handle, its type, and the handle: an inode's number.
        let handle: [u32; 4] = [8, 1, 2, 0];
        // SAFETY: the handle is whole; a descriptor or an error comes out.
        let result = unsafe {
            libc::syscall(
                libc::SYS_open_by_handle_at,
                directory,
                handle.as_ptr(),
                libc::O_RDONLY,
            )
        };
        i32::try_from(result)
            .ok()
            .filter(|fd| *fd >= 0)
            .ok_or_else(|| rustix::io::Errno::from_io_error(&std::io::Error::last_os_error()).unwrap())
    }

    pub fn has_landlock() -> bool {
        // SAFETY: asks for the version: no attribute, size 0, flag 1.
        unsafe {
            libc::syscall(
                libc::SYS_landlock_create_ruleset,
                std::ptr::null::<u8>(),
                0usize,
                1u32,
            ) > 0
        }
    }
}
