//! The allow-lists. Each group says what needs it.

use super::{Condition, Role};
use Condition::{Always, OneOf, OwnSignals, Without};

type Call = (i64, Condition);

/// Memory may be mapped and protected, never made executable.
const NO_EXEC: Condition = Without(2, libc::PROT_EXEC.unsigned_abs() as u64);

/// Every thread: memory, locks, time, its own end, log lines.
const EVERY_THREAD: &[Call] = &[
    (libc::SYS_brk, Always),
    (libc::SYS_mmap, NO_EXEC),
    (libc::SYS_mprotect, NO_EXEC),
    (libc::SYS_mremap, Always),
    (libc::SYS_munmap, Always),
    (libc::SYS_madvise, Always),
    (libc::SYS_futex, Always),
    (libc::SYS_sched_yield, Always),
    (libc::SYS_clock_gettime, Always),
    (libc::SYS_clock_nanosleep, Always),
    (libc::SYS_getrandom, Always),
    (libc::SYS_gettid, Always),
    (libc::SYS_getpid, Always),
    (libc::SYS_tgkill, OwnSignals),
    (libc::SYS_rt_sigreturn, Always),
    (libc::SYS_rt_sigprocmask, Always),
    (libc::SYS_restart_syscall, Always),
    (libc::SYS_sigaltstack, Always),
    (libc::SYS_read, Always),
    (libc::SYS_write, Always),
    (libc::SYS_writev, Always),
    // Whether stderr takes a log line now.
    (libc::SYS_poll, Always),
    (libc::SYS_ppoll, Always),
    (libc::SYS_close, Always),
    // The standard library of a debug build checks descriptors before it closes them.
    (libc::SYS_fcntl, OneOf(1, &[libc::F_GETFD.unsigned_abs() as u64])),
    (libc::SYS_exit, Always),
    (libc::SYS_exit_group, Always),
];

/// Devices on the event loop.
const DEVICES: &[Call] = &[
    // Waiting.
    (libc::SYS_epoll_wait, Always),
    (libc::SYS_epoll_pwait, Always),
    (libc::SYS_epoll_ctl, Always),
    (libc::SYS_timerfd_settime, Always),
    // Disks.
    (libc::SYS_io_uring_enter, Always),
    (libc::SYS_readv, Always),
    (libc::SYS_lseek, Always),
    (libc::SYS_fstat, Always),
    (libc::SYS_statx, Always),
    // Streams of vsock; what is accepted was connected to the one listening socket.
    (libc::SYS_accept4, Always),
    (libc::SYS_recvfrom, Always),
    (libc::SYS_recvmsg, Always),
    (libc::SYS_sendto, Always),
    (libc::SYS_sendmsg, Always),
    (libc::SYS_shutdown, Always),
    (libc::SYS_getsockopt, Always),
    (
        libc::SYS_fcntl,
        OneOf(
            1,
            &[
                libc::F_GETFL.unsigned_abs() as u64,
                libc::F_SETFL.unsigned_abs() as u64,
                libc::F_SETFD.unsigned_abs() as u64,
                libc::F_DUPFD_CLOEXEC.unsigned_abs() as u64,
            ],
        ),
    ),
    (
        libc::SYS_ioctl,
        OneOf(
            1,
            &[
                kvm::IRQ_LINE,
                libc::FIONBIO,
                // A tap that comes while the guest runs is looked at, and set up as the driver wants it.
                libc::TUNGETIFF,
                libc::TUNGETVNETHDRSZ,
                libc::TUNSETOFFLOAD,
                libc::TUNSETQUEUE,
            ],
        ),
    ),
];

/// Requests of a disk: all that its own thread does, and what io_uring leaves half done.
const DISK: &[Call] = &[
    (libc::SYS_pread64, Always),
    (libc::SYS_pwrite64, Always),
    (libc::SYS_preadv, Always),
    (libc::SYS_pwritev, Always),
    (libc::SYS_fsync, Always),
    (libc::SYS_fdatasync, Always),
    (libc::SYS_fallocate, Always),
];

/// The guest, and what a device does when its driver activates or resets it.
const VCPU: &[Call] = &[
    (
        libc::SYS_ioctl,
        OneOf(
            1,
            &[
                // The one that counts comes first.
                kvm::RUN,
                kvm::GET_REGS,
                kvm::SET_REGS,
                kvm::GET_SREGS,
                kvm::SET_SREGS,
                kvm::GET_MP_STATE,
                kvm::SET_MP_STATE,
                kvm::GET_MSRS,
                kvm::GET_VCPU_EVENTS,
                kvm::TRANSLATE,
                kvm::IRQ_LINE,
            ],
        ),
    ),
    (libc::SYS_epoll_ctl, Always),
    (libc::SYS_timerfd_settime, Always),
    (libc::SYS_io_uring_enter, Always),
    (libc::SYS_shutdown, Always),
    (libc::SYS_recvfrom, Always),
    (libc::SYS_sendto, Always),
    (libc::SYS_recvmsg, Always),
    (libc::SYS_sendmsg, Always),
];

/// The control socket.
const CONTROL: &[Call] = &[
    (libc::SYS_accept4, Always),
    (libc::SYS_recvmsg, Always),
    (libc::SYS_sendmsg, Always),
    (libc::SYS_ioctl, OneOf(1, &[libc::FIONBIO])),
    (
        libc::SYS_fcntl,
        OneOf(
            1,
            &[
                libc::F_GETFL.unsigned_abs() as u64,
                libc::F_SETFL.unsigned_abs() as u64,
            ],
        ),
    ),
];

/// Files beneath the shares, by descriptor; [`crate::devices::virtio::fs`] says why these.
const SHARES: &[Call] = &[
    (libc::SYS_openat, Always),
    (libc::SYS_statx, Always),
    (libc::SYS_fstatfs, Always),
    (libc::SYS_getdents64, Always),
    (libc::SYS_lseek, Always),
    (libc::SYS_readlinkat, Always),
    (libc::SYS_mkdirat, Always),
    (libc::SYS_mknodat, Always),
    (libc::SYS_symlinkat, Always),
    (libc::SYS_linkat, Always),
    (libc::SYS_unlinkat, Always),
    (libc::SYS_renameat, Always),
    (libc::SYS_renameat2, Always),
    (libc::SYS_fchmodat, Always),
    (libc::SYS_fchownat, Always),
    (libc::SYS_utimensat, Always),
    (libc::SYS_ftruncate, Always),
    (libc::SYS_getxattr, Always),
    (libc::SYS_setxattr, Always),
    (libc::SYS_listxattr, Always),
    (libc::SYS_removexattr, Always),
    // Passing a directory to whoever deals with the marks of an overlay. The one other socket there may be in its table is that
    // of orders, whose other end takes no descriptors.
    (libc::SYS_sendmsg, Always),
    // File system ids of this thread, and giving up a capability for one call.
    (libc::SYS_setfsuid, Always),
    (libc::SYS_setfsgid, Always),
    (libc::SYS_capget, Always),
    (libc::SYS_capset, Always),
    // Further shares: from the one socket in this thread's table, whose other end is the host's.
    (libc::SYS_recvmsg, OneOf(0, &[0])),
    (libc::SYS_ioctl, OneOf(1, &[kvm::IRQ_LINE])),
    (
        libc::SYS_fcntl,
        OneOf(1, &[libc::F_DUPFD_CLOEXEC.unsigned_abs() as u64]),
    ),
];

/// Building a microVM and starting its threads.
const SETUP: &[Call] = &[
    (
        libc::SYS_ioctl,
        OneOf(
            1,
            &[
                kvm::GET_API_VERSION,
                kvm::CREATE_VM,
                kvm::CHECK_EXTENSION,
                kvm::GET_VCPU_MMAP_SIZE,
                kvm::GET_SUPPORTED_CPUID,
                kvm::CREATE_VCPU,
                kvm::SET_USER_MEMORY_REGION,
                kvm::SET_TSS_ADDR,
                kvm::SET_IDENTITY_MAP_ADDR,
                kvm::CREATE_IRQCHIP,
                kvm::CREATE_PIT2,
                kvm::IRQFD,
                kvm::IOEVENTFD,
                kvm::SET_CPUID2,
                kvm::SET_MSRS,
                kvm::SET_FPU,
                kvm::GET_LAPIC,
                kvm::SET_LAPIC,
                kvm::GET_TSC_KHZ,
            ],
        ),
    ),
    (libc::SYS_clone, Always),
    (libc::SYS_clone3, Always),
    (libc::SYS_set_robust_list, Always),
    (libc::SYS_rseq, Always),
    (libc::SYS_sched_getaffinity, Always),
    (libc::SYS_rt_sigaction, Always),
    // Naming threads; stacking filters.
    (libc::SYS_prctl, Always),
    (libc::SYS_seccomp, Always),
    // Bounding file sizes once disks are known; the kernel lets it only lower.
    (libc::SYS_prlimit64, Always),
    (libc::SYS_getrlimit, Always),
    (libc::SYS_sysinfo, Always),
    // Whether a share's mount is read-only.
    (libc::SYS_fstatfs, Always),
    (libc::SYS_eventfd2, Always),
    (libc::SYS_epoll_create1, Always),
    (libc::SYS_timerfd_create, Always),
    (libc::SYS_memfd_create, Always),
    (libc::SYS_ftruncate, Always),
    (libc::SYS_io_uring_setup, Always),
    (libc::SYS_io_uring_register, Always),
    (libc::SYS_getsockname, Always),
    (libc::SYS_getpeername, Always),
    (libc::SYS_dup, Always),
];

/// The lists that make up a role's filter.
pub(super) fn of(role: Role) -> &'static [&'static [Call]] {
    match role {
        Role::Setup => &[VCPU, EVERY_THREAD, DEVICES, DISK, SETUP],
        Role::EventLoop => &[EVERY_THREAD, DEVICES, DISK],
        Role::Disk => &[EVERY_THREAD, DISK],
        Role::Shares => &[EVERY_THREAD, DISK, SHARES],
        Role::Vcpu => &[EVERY_THREAD, VCPU],
        Role::Control => &[EVERY_THREAD, CONTROL],
    }
}

/// Request numbers of `linux/kvm.h`, which the bindings don't carry.
mod kvm {
    const KVM: u64 = 0xae00;
    const WRITE: u64 = 1 << 30;
    const READ: u64 = 2 << 30;

    const fn request(direction: u64, number: u64, size_bytes: usize) -> u64 {
        direction | (size_bytes as u64) << 16 | KVM | number
    }

    use kvm_bindings as b;
    use std::mem::size_of;

    pub(super) const GET_API_VERSION: u64 = request(0, 0x00, 0);
    pub(super) const CREATE_VM: u64 = request(0, 0x01, 0);
    pub(super) const CHECK_EXTENSION: u64 = request(0, 0x03, 0);
    pub(super) const GET_VCPU_MMAP_SIZE: u64 = request(0, 0x04, 0);
    pub(super) const GET_SUPPORTED_CPUID: u64 = request(READ | WRITE, 0x05, size_of::<b::kvm_cpuid2>());
    pub(super) const CREATE_VCPU: u64 = request(0, 0x41, 0);
    pub(super) const SET_USER_MEMORY_REGION: u64 =
        request(WRITE, 0x46, size_of::<b::kvm_userspace_memory_region>());
    pub(super) const SET_TSS_ADDR: u64 = request(0, 0x47, 0);
    pub(super) const SET_IDENTITY_MAP_ADDR: u64 = request(WRITE, 0x48, 8);
    pub(super) const CREATE_IRQCHIP: u64 = request(0, 0x60, 0);
    pub(super) const IRQFD: u64 = request(WRITE, 0x76, size_of::<b::kvm_irqfd>());
    pub(super) const IRQ_LINE: u64 = request(WRITE, 0x61, size_of::<b::kvm_irq_level>());
    pub(super) const CREATE_PIT2: u64 = request(WRITE, 0x77, size_of::<b::kvm_pit_config>());
    pub(super) const IOEVENTFD: u64 = request(WRITE, 0x79, size_of::<b::kvm_ioeventfd>());
    pub(super) const RUN: u64 = request(0, 0x80, 0);
    pub(super) const GET_REGS: u64 = request(READ, 0x81, size_of::<b::kvm_regs>());
    pub(super) const SET_REGS: u64 = request(WRITE, 0x82, size_of::<b::kvm_regs>());
    pub(super) const GET_SREGS: u64 = request(READ, 0x83, size_of::<b::kvm_sregs>());
    pub(super) const SET_SREGS: u64 = request(WRITE, 0x84, size_of::<b::kvm_sregs>());
    pub(super) const TRANSLATE: u64 = request(READ | WRITE, 0x85, size_of::<b::kvm_translation>());
    pub(super) const GET_MSRS: u64 = request(READ | WRITE, 0x88, size_of::<b::kvm_msrs>());
    pub(super) const SET_MSRS: u64 = request(WRITE, 0x89, size_of::<b::kvm_msrs>());
    pub(super) const SET_FPU: u64 = request(WRITE, 0x8d, size_of::<b::kvm_fpu>());
    pub(super) const GET_LAPIC: u64 = request(READ, 0x8e, size_of::<b::kvm_lapic_state>());
    pub(super) const SET_LAPIC: u64 = request(WRITE, 0x8f, size_of::<b::kvm_lapic_state>());
    pub(super) const SET_CPUID2: u64 = request(WRITE, 0x90, size_of::<b::kvm_cpuid2>());
    pub(super) const GET_MP_STATE: u64 = request(READ, 0x98, size_of::<b::kvm_mp_state>());
    pub(super) const SET_MP_STATE: u64 = request(WRITE, 0x99, size_of::<b::kvm_mp_state>());
    pub(super) const GET_VCPU_EVENTS: u64 = request(READ, 0x9f, size_of::<b::kvm_vcpu_events>());
    pub(super) const GET_TSC_KHZ: u64 = request(0, 0xa3, 0);
}
