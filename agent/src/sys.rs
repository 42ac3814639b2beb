#![expect(unsafe_code, reason = "system calls that nix doesn't wrap, and clone")]
//! Thin wrappers of the system calls the agent needs and `nix` lacks. Each checks its result, none keeps state.

use std::{
    ffi::{CStr, CString},
    os::fd::{AsRawFd, BorrowedFd, FromRawFd as _, OwnedFd, RawFd},
    sync::atomic::AtomicI32,
};

use nix::{errno::Errno, sched::CloneFlags};

/// What `clone3` reads: `struct clone_args` up to the control group.
#[repr(C, align(8))]
#[derive(Default)]
struct CloneArguments {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
    cgroup: u64,
}

/// Makes this thread one that doesn't take the processor from others when it wakes up, or an ordinary one again.
pub fn set_batch(batch: bool) -> Result<(), Errno> {
    let policy = if batch {
        libc::SCHED_BATCH
    } else {
        libc::SCHED_OTHER
    };
    // SAFETY: a plain structure of integers, for which zeroes are values.
    let parameters: libc::sched_param = unsafe { std::mem::zeroed() };
    // SAFETY: the parameters live until the call returns; 0 is the calling thread.
    Errno::result(unsafe { libc::sched_setscheduler(0, policy, &raw const parameters) }).map(drop)
}

/// How a process is born.
#[derive(Debug, Clone, Copy)]
pub struct Birth<'a> {
    /// The namespaces it gets for itself.
    pub namespaces: CloneFlags,
    /// Its control group; that of its maker where there is none.
    pub cgroup: Option<BorrowedFd<'a>>,
    /// Where its id is written before it runs.
    pub pid: Option<&'a AtomicI32>,
    /// It gets a copy of the memory: what the kernel demands of a process that joins a time namespace.
    pub own_memory: bool,
}

impl Birth<'_> {
    /// In the namespaces and the control group of its maker.
    pub fn plain() -> Self {
        Self {
            namespaces: CloneFlags::empty(),
            cgroup: None,
            pid: None,
            own_memory: false,
        }
    }
}

/// Runs `body` in a new process that borrows this one's memory and stack; returns its id, once it has executed a program
/// or ended.
///
/// Nothing is copied, unless the process is to have its own memory; that is what makes this quick where page tables are
/// shadowed.
///
/// # Safety
///
/// Until `body` has executed a program it writes to this process's memory while other threads run. It must not
/// panic, must not touch a lock that another thread may hold, and what it allocates or drops is allocated or
/// dropped here.
pub unsafe fn clone_vfork(
    birth: &Birth<'_>,
    body: unsafe extern "C" fn(*mut libc::c_void) -> !,
    argument: *mut libc::c_void,
) -> Result<i32, Errno> {
    const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;
    let mut sharing = libc::CLONE_VFORK;
    if !birth.own_memory {
        sharing |= libc::CLONE_VM;
    }
    let mut arguments = CloneArguments {
        flags: u64::from(birth.namespaces.bits().cast_unsigned()) | u64::from(sharing.cast_unsigned()),
        exit_signal: u64::from(libc::SIGCHLD.unsigned_abs()),
        ..CloneArguments::default()
    };
    if let Some(cgroup) = birth.cgroup {
        arguments.flags |= CLONE_INTO_CGROUP;
        arguments.cgroup = u64::from(cgroup.as_raw_fd().unsigned_abs());
    }
    if let Some(pid) = birth.pid {
        arguments.flags |= u64::from(libc::CLONE_PARENT_SETTID.cast_unsigned());
        arguments.parent_tid = pid.as_ptr().expose_provenance() as u64;
    }
    let result: i64;
    // SAFETY: the child runs on this stack below the current frame, which it never returns to, while the kernel
    // keeps this thread from running; when it goes on, its registers are as they were. The rest is the caller's.
    unsafe {
        std::arch::asm!(
            "syscall",
            "test rax, rax",
            "jnz 2f",
            "xor ebp, ebp",
            "mov rdi, r12",
            "call r13",
            "ud2",
            "2:",
            inlateout("rax") libc::SYS_clone3 => result,
            in("rdi") &raw const arguments,
            in("rsi") size_of::<CloneArguments>(),
            in("r12") argument,
            in("r13") body,
            lateout("rcx") _,
            lateout("r11") _,
        );
    }
    match i32::try_from(result) {
        Ok(pid) if pid > 0 => Ok(pid),
        Ok(negative) => Err(Errno::from_raw(negative.wrapping_neg())),
        Err(_) => Err(Errno::EOVERFLOW),
    }
}

/// Ends a child without running the parent's exit handlers.
pub fn exit_now(code: i32) -> ! {
    // SAFETY: `_exit` has no preconditions.
    unsafe { libc::_exit(code) }
}

/// A pidfd of a living process.
pub fn pidfd_open(pid: i32) -> Result<OwnedFd, Errno> {
    // SAFETY: plain integers in, a new descriptor or an error out.
    unsafe { owned(libc::syscall(libc::SYS_pidfd_open, pid, 0)) }
}

/// Sends a signal, a real-time one too; 0 only asks whether the process is there.
pub fn kill(pid: i32, signal: i32) -> Result<(), Errno> {
    // SAFETY: plain integers; whom it reaches is the caller's choice.
    Errno::result(unsafe { libc::kill(pid, signal) }).map(drop)
}

/// How a child ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// By itself, with this code.
    Code(i32),
    /// By a signal, which may be a real-time one; and whether it left a core.
    Signal(i32, bool),
}

/// Waits for a child, or for any, to end: which, and how. `None` where `flags` say not to wait and none has.
pub fn wait_ended(child: Option<i32>, flags: i32) -> Result<Option<(i32, Ended)>, Errno> {
    let (kind, id) = match child {
        Some(pid) => (libc::P_PID, pid.unsigned_abs()),
        None => (libc::P_ALL, 0),
    };
    let mut info = std::mem::MaybeUninit::<libc::siginfo_t>::zeroed();
    // SAFETY: `info` is large enough for what the kernel writes, and all zeroes before.
    let (pid, status, code) = unsafe {
        Errno::result(libc::waitid(kind, id, info.as_mut_ptr(), libc::WEXITED | flags))?;
        let info = info.assume_init();
        (info.si_pid(), info.si_status(), info.si_code)
    };
    let ended = match code {
        _ if pid == 0 => return Ok(None),
        libc::CLD_EXITED => Ended::Code(status),
        code => Ended::Signal(status, code == libc::CLD_DUMPED),
    };
    Ok(Some((pid, ended)))
}

/// Marks all descriptors from `first` on close-on-exec.
pub fn cloexec_from(first: RawFd) -> Result<(), Errno> {
    close_range(first, libc::CLOSE_RANGE_CLOEXEC)
}

fn close_range(first: RawFd, flags: u32) -> Result<(), Errno> {
    // SAFETY: plain integers; the callers document which descriptors they give up.
    Errno::result(unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, flags) }).map(drop)
}

/// Whether a path is a directory, links followed. Allocates nothing.
pub fn is_directory(path: &CStr) -> bool {
    nix::sys::stat::stat(path).is_ok_and(|found| found.st_mode & libc::S_IFMT == libc::S_IFDIR)
}

/// Sets the calling thread's capability sets.
pub fn set_capabilities(effective: u64, permitted: u64, inheritable: u64) -> Result<(), Errno> {
    #[repr(C)]
    struct Header {
        version: u32,
        pid: i32,
    }
    #[repr(C)]
    struct Data {
        effective: u32,
        permitted: u32,
        inheritable: u32,
    }
    const VERSION_3: u32 = 0x2008_0522;
    let half = |mask: u64, upper: bool| {
        u32::try_from(if upper { mask >> 32 } else { mask & 0xffff_ffff }).unwrap_or(0)
    };
    let header = Header {
        version: VERSION_3,
        pid: 0,
    };
    let data = [false, true].map(|upper| Data {
        effective: half(effective, upper),
        permitted: half(permitted, upper),
        inheritable: half(inheritable, upper),
    });
    // SAFETY: version 3 takes a header and two data structures, which live across the call.
    Errno::result(unsafe { libc::syscall(libc::SYS_capset, &raw const header, data.as_ptr()) }).map(drop)
}

/// Drops a capability from the bounding set.
pub fn drop_bounding(capability: u32) -> Result<(), Errno> {
    // SAFETY: plain integers.
    Errno::result(unsafe { libc::prctl(libc::PR_CAPBSET_DROP, libc::c_ulong::from(capability), 0, 0, 0) })
        .map(drop)
}

/// Raises a capability in the ambient set.
pub fn raise_ambient(capability: u32) -> Result<(), Errno> {
    // SAFETY: plain integers.
    Errno::result(unsafe {
        libc::prctl(
            libc::PR_CAP_AMBIENT,
            libc::PR_CAP_AMBIENT_RAISE,
            libc::c_ulong::from(capability),
            0,
            0,
        )
    })
    .map(drop)
}

/// Classic BPF instructions from their bytes.
pub fn bpf_program(bytes: &[u8]) -> Vec<libc::sock_filter> {
    let instruction = |bytes: &[u8]| libc::sock_filter {
        code: u16::from_ne_bytes([bytes[0], bytes[1]]),
        jt: bytes[2],
        jf: bytes[3],
        k: u32::from_ne_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]),
    };
    bytes.chunks_exact(8).map(instruction).collect()
}

/// Installs a seccomp filter.
pub fn set_seccomp(instructions: &[libc::sock_filter], flags: u32) -> Result<(), Errno> {
    let filter = libc::sock_fprog {
        len: u16::try_from(instructions.len()).map_err(|_| Errno::EINVAL)?,
        filter: instructions.as_ptr().cast_mut(),
    };
    // SAFETY: `filter` points to `len` instructions which live across the call; the kernel copies them.
    Errno::result(unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            flags,
            &raw const filter,
        )
    })
    .map(drop)
}

/// Takes over what a system call has returned.
///
/// # Safety
///
/// It is an error or a descriptor that nobody else owns.
unsafe fn owned(result: libc::c_long) -> Result<OwnedFd, Errno> {
    let fd = RawFd::try_from(Errno::result(result)?).map_err(|_| Errno::EBADF)?;
    // SAFETY: the caller's promise.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Makes a terminal the controlling one of the calling session leader.
pub fn set_controlling_terminal(terminal: BorrowedFd<'_>) -> Result<(), Errno> {
    // SAFETY: the request takes an integer.
    Errno::result(unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSCTTY, 0) }).map(drop)
}

/// Sets a terminal's size.
pub fn set_window_size(terminal: BorrowedFd<'_>, rows: u16, columns: u16) -> Result<(), Errno> {
    let size = libc::winsize {
        ws_row: rows,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: the request reads one `winsize`, which lives across the call.
    Errno::result(unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) }).map(drop)
}

/// Unlocks a pseudo-terminal and opens its other end, without going through a path that a container could forge.
/// Also says its number in its devpts.
pub fn open_terminal_peer(master: BorrowedFd<'_>) -> Result<(OwnedFd, u32), Errno> {
    let unlock: libc::c_int = 0;
    let mut number: libc::c_uint = 0;
    let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
    // SAFETY: the requests read one int, write one unsigned int and take an integer; the former live across the calls.
    let peer = unsafe {
        Errno::result(libc::ioctl(
            master.as_raw_fd(),
            libc::TIOCSPTLCK,
            &raw const unlock,
        ))?;
        Errno::result(libc::ioctl(master.as_raw_fd(), libc::TIOCGPTN, &raw mut number))?;
        Errno::result(libc::ioctl(master.as_raw_fd(), libc::TIOCGPTPEER, flags))?
    };
    // SAFETY: the kernel has just given us this descriptor; nobody else owns it.
    Ok((unsafe { OwnedFd::from_raw_fd(peer) }, number))
}

/// Mixes bytes into the kernel's random pool and credits them.
pub fn add_entropy(random: BorrowedFd<'_>, bytes: &[u8]) -> Result<(), Errno> {
    // _IOW('R', 0x03, int[2])
    const RNDADDENTROPY: libc::c_ulong = 0x4008_5203;
    // _IO('R', 0x07)
    const RNDRESEEDCRNG: libc::c_ulong = 0x5207;
    let length = i32::try_from(bytes.len()).map_err(|_| Errno::EINVAL)?;
    let mut message = Vec::with_capacity(8 + bytes.len());
    message.extend((length.saturating_mul(8)).to_ne_bytes());
    message.extend(length.to_ne_bytes());
    message.extend(bytes);
    // SAFETY: the request reads two ints, the second of which says how many bytes follow; both are true.
    unsafe {
        Errno::result(libc::ioctl(random.as_raw_fd(), RNDADDENTROPY, message.as_ptr()))?;
        Errno::result(libc::ioctl(random.as_raw_fd(), RNDRESEEDCRNG))?;
    }
    Ok(())
}

/// Brings a network interface up.
pub fn interface_up(name: &str) -> Result<(), Errno> {
    let socket = nix::sys::socket::socket(
        nix::sys::socket::AddressFamily::Inet,
        nix::sys::socket::SockType::Datagram,
        nix::sys::socket::SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    // SAFETY: `ifreq` is a plain C structure for which all zeroes is a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.len() >= request.ifr_name.len() {
        return Err(Errno::EINVAL);
    }
    for (slot, byte) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *slot = byte.cast_signed();
    }
    let up = libc::c_short::try_from(libc::IFF_UP | libc::IFF_RUNNING).map_err(|_| Errno::EINVAL)?;
    // SAFETY: both requests take one `ifreq`, which lives across the calls; the union's flags were filled by the first.
    unsafe {
        Errno::result(libc::ioctl(
            socket.as_raw_fd(),
            libc::SIOCGIFFLAGS,
            &raw mut request,
        ))?;
        request.ifr_ifru.ifru_flags |= up;
        Errno::result(libc::ioctl(
            socket.as_raw_fd(),
            libc::SIOCSIFFLAGS,
            &raw const request,
        ))?;
    }
    Ok(())
}

/// Strings as `execve` takes them.
#[derive(Debug)]
pub struct StringArray {
    /// Owns what `pointers` point to; neither is changed after construction.
    _strings: Vec<CString>,
    pointers: Vec<*const libc::c_char>,
}

impl StringArray {
    /// Keeps the strings and an array of their addresses.
    pub fn new(strings: Vec<CString>) -> Self {
        let pointers = strings
            .iter()
            .map(|string| string.as_ptr())
            .chain([std::ptr::null()])
            .collect();
        Self {
            _strings: strings,
            pointers,
        }
    }
}

// SAFETY: the pointers are to heap memory that the value owns and never changes.
unsafe impl Send for StringArray {}

/// Replaces the program. Returns only on failure; allocates nothing.
pub fn execve(path: &CStr, args: &StringArray, env: &StringArray) -> Errno {
    // SAFETY: a NUL-terminated path and two NULL-terminated arrays of such strings, all of which live across the call.
    unsafe { libc::execve(path.as_ptr(), args.pointers.as_ptr(), env.pointers.as_ptr()) };
    Errno::last()
}

/// Lets a process (zero: the calling one) run on these CPUs only, bit n of byte m being CPU 8m + n.
pub fn set_affinity(pid: i32, mask: &[u8]) -> Result<(), Errno> {
    // SAFETY: the mask lives across the call with its length.
    Errno::result(unsafe { libc::syscall(libc::SYS_sched_setaffinity, pid, mask.len(), mask.as_ptr()) })
        .map(drop)
}

/// What `sched_setattr` reads, up to the parameters of deadlines.
#[repr(C)]
struct SchedulerAttributes {
    size: u32,
    policy: u32,
    flags: u64,
    nice: i32,
    priority: u32,
    runtime_ns: u64,
    deadline_ns: u64,
    period_ns: u64,
}

/// Sets a process's scheduler.
pub fn set_scheduler(pid: i32, scheduler: &agent_protocol::Scheduler) -> Result<(), Errno> {
    let attributes = SchedulerAttributes {
        size: u32::try_from(size_of::<SchedulerAttributes>()).unwrap_or(0),
        policy: scheduler.policy,
        flags: scheduler.flags,
        nice: scheduler.nice,
        priority: scheduler.priority,
        runtime_ns: scheduler.runtime_ns,
        deadline_ns: scheduler.deadline_ns,
        period_ns: scheduler.period_ns,
    };
    // SAFETY: the attributes say their size and live across the call.
    Errno::result(unsafe { libc::syscall(libc::SYS_sched_setattr, pid, &raw const attributes, 0) }).map(drop)
}

/// Sets a process's priority for disks.
pub fn set_io_priority(pid: i32, class: u32, level: u32) -> Result<(), Errno> {
    const WHO_PROCESS: u32 = 1;
    const CLASS_SHIFT: u32 = 13;
    let priority = class << CLASS_SHIFT | level;
    // SAFETY: plain integers.
    Errno::result(unsafe { libc::syscall(libc::SYS_ioprio_set, WHO_PROCESS, pid, priority) }).map(drop)
}

/// Sets the calling process's execution domain.
pub fn set_personality(domain: u32) -> Result<(), Errno> {
    // SAFETY: a plain integer.
    Errno::result(unsafe { libc::personality(libc::c_ulong::from(domain)) }).map(drop)
}

/// Sets a resource limit of a process (zero: the calling one).
pub fn set_rlimit(pid: i32, resource: u32, limit: &libc::rlimit) -> Result<(), Errno> {
    // SAFETY: the limit lives across the call; an unknown resource is an error.
    Errno::result(unsafe { libc::prlimit(pid, resource, limit, std::ptr::null_mut()) }).map(drop)
}

/// Sets the domain's name of the calling process's UTS namespace.
pub fn set_domain_name(name: &str) -> Result<(), Errno> {
    // SAFETY: the bytes live across the call with their length.
    Errno::result(unsafe { libc::setdomainname(name.as_ptr().cast(), name.len()) }).map(drop)
}

/// Sets the calling task's identity, of this task alone: libc's functions of these names change all threads of the
/// process whose memory it shares, and wait for them.
pub fn set_identity(uid: u32, gid: u32, groups: &[u32]) -> Result<(), Errno> {
    // SAFETY: plain integers, and an array that lives across the call with its length.
    unsafe {
        Errno::result(libc::syscall(libc::SYS_setgroups, groups.len(), groups.as_ptr()))?;
        Errno::result(libc::syscall(libc::SYS_setresgid, gid, gid, gid))?;
        Errno::result(libc::syscall(libc::SYS_setresuid, uid, uid, uid))?;
    }
    Ok(())
}

/// Sets how the calling process takes a signal; only to what needs no handler.
pub fn set_signal(
    signal: nix::sys::signal::Signal,
    handler: nix::sys::signal::SigHandler,
) -> Result<(), Errno> {
    debug_assert!(
        !matches!(handler, nix::sys::signal::SigHandler::Handler(_)),
        "no handlers here"
    );
    // SAFETY: ignoring a signal or taking its default installs no code.
    unsafe { nix::sys::signal::signal(signal, handler) }.map(drop)
}

/// Makes `target` a copy of `fd` that stays open across `execve`. Only for a forked child, which gives up what `target` was.
pub fn duplicate_to(fd: BorrowedFd<'_>, target: RawFd) -> Result<(), Errno> {
    // SAFETY: plain integers; the caller gives up `target`.
    Errno::result(unsafe { libc::dup2(fd.as_raw_fd(), target) }).map(drop)
}

#[cfg(test)]
mod waiting {
    use super::*;

    #[test]
    #[expect(clippy::zombie_processes, reason = "waiting for it is what is tested")]
    fn child_that_ends_by_a_real_time_signal_is_told_as_others() {
        for (script, ended) in [
            ("exit 3", Ended::Code(3)),
            ("kill -40 $$", Ended::Signal(40, false)),
            ("kill -9 $$", Ended::Signal(9, false)),
        ] {
            let child = std::process::Command::new("/bin/sh")
                .args(["-c", script])
                .spawn()
                .unwrap();
            let pid = i32::try_from(child.id()).unwrap();
            assert_eq!(wait_ended(Some(pid), 0), Ok(Some((pid, ended))), "{script}");
        }
    }
}
