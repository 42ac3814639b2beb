//! System calls each thread may make, as allow-lists. Anything else ends the process with `SIGSYS`, after a line on stderr has
//! named the call.
//!
//! The filter of a thread is stacked on that of the thread that started it. The event loop has two: [`Role::Setup`] until the
//! guest starts, which allows what builds a microVM (and all that its vCPU threads will need), and then
//! [`Role::EventLoop`] on top.
//!
//! Invariant: no list has a call that opens a file by name, makes a process, changes a credential, or maps executable memory. The
//! one exception is [`Role::Shares`], whose thread has an empty root and sees only its shares: it opens files beneath their
//! descriptors, and makes them as the guest's users.

use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};
use std::{collections::BTreeMap, sync::Arc};
use vmm_sys_util::signal::SIGRTMIN;

mod calls;
mod report;

/// Which thread a filter is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The event loop while it may still configure and start the microVM.
    Setup,
    /// The event loop once the microVM runs.
    EventLoop,
    /// A vCPU.
    Vcpu,
    /// The control socket.
    Control,
    /// A disk without io_uring.
    Disk,
    /// Shares.
    Shares,
}

const ROLES: [Role; 6] = [
    Role::Setup,
    Role::EventLoop,
    Role::Vcpu,
    Role::Control,
    Role::Disk,
    Role::Shares,
];

/// Why a filter can't be used.
#[derive(Debug, thiserror::Error)]
pub enum SeccompError {
    /// The list is wrong.
    #[error("can't compile a seccomp filter")]
    Compile(#[from] BackendError),
    /// The kernel refuses it.
    #[error("can't install a seccomp filter")]
    Install(#[source] seccompiler::Error),
    /// The handler that names denied calls.
    #[error("can't handle SIGSYS")]
    Handler(#[source] std::io::Error),
}

/// One thread's filter, or none outside the jail.
#[derive(Debug, Clone, Default)]
pub struct Filter(Option<Arc<BpfProgram>>);

impl Filter {
    /// Confines the calling thread for good.
    ///
    /// # Errors
    /// [`SeccompError`].
    pub fn apply(&self) -> Result<(), SeccompError> {
        self.0.as_ref().map_or(Ok(()), |program| {
            seccompiler::apply_filter(program).map_err(SeccompError::Install)
        })
    }
}

/// All filters of the process.
#[derive(Debug, Clone, Default)]
pub struct Filters {
    filters: [Filter; ROLES.len()],
}

impl Filters {
    /// No confinement, for tests and `--no-jail`.
    #[must_use]
    pub fn none() -> Self {
        Self::default()
    }

    /// Compiles the filters and installs the handler that names denied calls.
    ///
    /// # Errors
    /// [`SeccompError`].
    pub fn compile() -> Result<Self, SeccompError> {
        report::install_handler().map_err(SeccompError::Handler)?;
        let mut filters = Self::default();
        for role in ROLES {
            filters.filters[role as usize] = Filter(Some(Arc::new(compile(role)?)));
        }
        Ok(filters)
    }

    /// Whether there are any.
    #[must_use]
    pub fn is_confined(&self) -> bool {
        self.filters.iter().any(|filter| filter.0.is_some())
    }

    /// The filter of one kind of thread.
    #[must_use]
    pub fn of(&self, role: Role) -> Filter {
        self.filters[role as usize].clone()
    }
}

/// When a call is allowed.
#[derive(Debug, Clone, Copy)]
enum Condition {
    Always,
    /// The argument has one of these values.
    OneOf(u8, &'static [u64]),
    /// The argument has none of these bits.
    Without(u8, u64),
    /// Signals to the process's own threads: the vCPU kick and abort.
    OwnSignals,
}

fn condition(argument: u8, operator: SeccompCmpOp, value: u64) -> Result<SeccompRule, BackendError> {
    SeccompRule::new(vec![SeccompCondition::new(
        argument,
        SeccompCmpArgLen::Dword,
        operator,
        value,
    )?])
}

fn rules(condition_: Condition) -> Result<Vec<SeccompRule>, BackendError> {
    match condition_ {
        Condition::Always => Ok(Vec::new()),
        Condition::OneOf(argument, values) => values
            .iter()
            .map(|value| condition(argument, SeccompCmpOp::Eq, *value))
            .collect(),
        Condition::Without(argument, bits) => Ok(vec![condition(argument, SeccompCmpOp::MaskedEq(bits), 0)?]),
        Condition::OwnSignals => {
            let signals = [SIGRTMIN(), libc::SIGABRT];
            let process = u64::from(std::process::id());
            signals
                .into_iter()
                .map(|signal| {
                    SeccompRule::new(vec![
                        SeccompCondition::new(0, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, process)?,
                        SeccompCondition::new(
                            2,
                            SeccompCmpArgLen::Dword,
                            SeccompCmpOp::Eq,
                            u64::from(signal.unsigned_abs()),
                        )?,
                    ])
                })
                .collect()
        }
    }
}

fn compile(role: Role) -> Result<BpfProgram, SeccompError> {
    let mut table: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    let mut unconditional = std::collections::BTreeSet::new();
    for list in calls::of(role) {
        for (call, condition) in *list {
            let rules = rules(*condition)?;
            if rules.is_empty() {
                unconditional.insert(*call);
            }
            table.entry(*call).or_default().extend(rules);
        }
    }
    for call in unconditional {
        // An empty list of rules allows the call whatever its arguments are.
        table.insert(call, Vec::new());
    }
    // `Trap`, not `KillProcess`: the handler names the call and then lets the second signal kill.
    let filter = SeccompFilter::new(
        table,
        SeccompAction::Trap,
        SeccompAction::Allow,
        TargetArch::x86_64,
    )?;
    Ok(filter.try_into()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_role_compiles_to_a_filter_the_kernel_can_take() {
        for role in ROLES {
            let program = compile(role).unwrap();
            assert!(program.len() < 4096, "{role:?}: {}", program.len());
        }
    }

    #[test]
    fn no_role_may_open_files_make_processes_or_change_credentials() {
        let forbidden = [
            libc::SYS_open,
            libc::SYS_openat,
            libc::SYS_openat2,
            libc::SYS_creat,
            libc::SYS_execve,
            libc::SYS_execveat,
            libc::SYS_fork,
            libc::SYS_vfork,
            libc::SYS_setuid,
            libc::SYS_setresuid,
            libc::SYS_capset,
            libc::SYS_ptrace,
            libc::SYS_process_vm_readv,
            libc::SYS_kill,
            libc::SYS_socket,
            libc::SYS_connect,
            libc::SYS_mount,
            libc::SYS_unshare,
            libc::SYS_setns,
            libc::SYS_bpf,
            libc::SYS_userfaultfd,
            libc::SYS_perf_event_open,
            libc::SYS_keyctl,
        ];
        let of_a_file_server = [libc::SYS_openat, libc::SYS_capset];
        for role in ROLES {
            let forbidden: Vec<_> = forbidden
                .iter()
                .filter(|call| role != Role::Shares || !of_a_file_server.contains(call))
                .collect();
            for (call, _) in calls::of(role).iter().flat_map(|list| list.iter()) {
                assert!(!forbidden.contains(&call), "{role:?} allows system call {call}");
            }
        }
    }

    #[test]
    fn only_setup_may_make_threads() {
        for role in [
            Role::EventLoop,
            Role::Vcpu,
            Role::Control,
            Role::Disk,
            Role::Shares,
        ] {
            for (call, _) in calls::of(role).iter().flat_map(|list| list.iter()) {
                assert!(![libc::SYS_clone, libc::SYS_clone3].contains(call), "{role:?}");
            }
        }
    }

    #[test]
    fn what_a_vcpu_may_do_its_creator_may_do() {
        let allowed = |role| -> std::collections::BTreeSet<i64> {
            calls::of(role)
                .iter()
                .flat_map(|list| list.iter().map(|(call, _)| *call))
                .collect()
        };
        assert!(allowed(Role::Vcpu).is_subset(&allowed(Role::Setup)));
        assert!(allowed(Role::EventLoop).is_subset(&allowed(Role::Setup)));
        assert!(allowed(Role::Disk).is_subset(&allowed(Role::Setup)));
    }
}
