//! `process`: what runs, as whom, with which rights, limits and priorities. The same for a container's first process
//! and for one that is executed in it.

use std::collections::BTreeSet;

use ::oci_spec::runtime::{
    Capabilities as Set, ExecCPUAffinity, IOPriorityClass, LinuxCapabilities, LinuxIOPriority,
    LinuxPersonality, LinuxPersonalityDomain, LinuxSchedulerFlag, LinuxSchedulerPolicy, PosixRlimit,
    PosixRlimitType, Process, Scheduler, Spec,
};
use agent_protocol::{Capabilities, IoPriority, Rlimit, UserIds, WindowSize, process};

use super::{
    error::{Result, invalid, unsupported},
    seccomp,
    warnings::Warnings,
};
use crate::capabilities;

/// Most CPUs that an affinity can name, as many as any guest kernel has.
const MAX_CPUS: u32 = 8192;

/// The process as the agent is asked for it; `container` is the configuration of the container it runs in.
pub(super) fn translate(
    process: &Process,
    container: &Spec,
    warnings: &mut Warnings,
) -> Result<agent_protocol::Process> {
    let args = process.args().clone().unwrap_or_default();
    if args.first().is_none_or(String::is_empty) {
        return invalid("process.args", "names no program to run");
    }
    if process
        .command_line()
        .as_deref()
        .is_some_and(|line| !line.is_empty())
    {
        return unsupported("process.commandLine", "is for Windows; use process.args");
    }
    let cwd = process.cwd().to_string_lossy().into_owned();
    if !cwd.starts_with('/') {
        return invalid("process.cwd", format!("{cwd:?} is not an absolute path"));
    }
    let user = process.user();
    if user.username().as_deref().is_some_and(|name| !name.is_empty()) {
        return unsupported(
            "process.user.username",
            "is for Windows; use process.user.uid and process.user.gid",
        );
    }
    warn_of_labels(process, warnings);
    let terminal = process.terminal().unwrap_or(false);
    let mut translated = agent_protocol::Process {
        args,
        env: process.env().clone().unwrap_or_default(),
        cwd,
        user: Some(process::User::UserIds(UserIds {
            uid: user.uid(),
            gid: user.gid(),
            ..UserIds::default()
        })),
        additional_gids: user.additional_gids().clone().unwrap_or_default(),
        umask: user.umask(),
        terminal,
        window_size: if terminal { window(process) } else { None }.into(),
        capabilities: Some(capability_sets(process.capabilities().as_ref())?).into(),
        no_new_privileges: process.no_new_privileges().unwrap_or(false),
        rlimits: rlimits(process.rlimits().as_deref().unwrap_or_default())?,
        oom_score_adj: process.oom_score_adj(),
        scheduler: process.scheduler().as_ref().map(scheduler).transpose()?.into(),
        io_priority: process
            .io_priority()
            .as_ref()
            .map(io_priority)
            .transpose()?
            .into(),
        attach_stdin: true,
        attach_stdout: true,
        attach_stderr: !terminal,
        ..agent_protocol::Process::default()
    };
    if let Some(adjustment) = translated.oom_score_adj
        && !(-1000..=1000).contains(&adjustment)
    {
        return invalid(
            "process.oomScoreAdj",
            format!("{adjustment} is not between -1000 and 1000"),
        );
    }
    if let Some(linux) = container.linux() {
        translated.personality = linux.personality().as_ref().map(personality).transpose()?;
        if let Some(profile) = linux.seccomp() {
            let filter = seccomp::translate(profile)?;
            translated.seccomp_programs = filter.programs;
            translated.seccomp_flags = filter.flags;
        }
    }
    Ok(translated)
}

/// The CPUs of a process that is executed in a container: its own, else those the container's configuration gives.
pub(super) fn affinity(
    process: &Process,
    container: &Spec,
    translated: &mut agent_protocol::Process,
) -> Result<()> {
    let of = |process: &Process| process.exec_cpu_affinity().clone();
    let Some(affinity): Option<ExecCPUAffinity> =
        of(process).or_else(|| container.process().as_ref().and_then(of))
    else {
        return Ok(());
    };
    let mask = |field: &str, list: &Option<String>| {
        list.as_deref().filter(|list| !list.is_empty()).map_or_else(
            || Ok(Vec::new()),
            |list| cpu_mask(&format!("process.execCPUAffinity.{field}"), list),
        )
    };
    translated.cpus_initial = mask("initial", affinity.initial())?;
    translated.cpus_final = mask("final", affinity.cpu_affinity_final())?;
    Ok(())
}

/// The numbers of a list as `0-3,7`.
pub(super) fn cpu_list(field: &str, list: &str) -> Result<BTreeSet<u32>> {
    let wrong = || invalid(field, format!("{list:?} is not a list of CPUs as in 0-3,7"));
    let mut cpus = BTreeSet::new();
    for part in list.split(',').map(str::trim) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (Ok(first), Ok(last)) = (first.trim().parse::<u32>(), last.trim().parse::<u32>()) else {
            return wrong();
        };
        if first > last || last >= MAX_CPUS {
            return wrong();
        }
        cpus.extend(first..=last);
    }
    Ok(cpus)
}

fn cpu_mask(field: &str, list: &str) -> Result<Vec<u8>> {
    let mut mask = Vec::new();
    for cpu in cpu_list(field, list)? {
        let byte = cpu as usize / 8;
        if mask.len() <= byte {
            mask.resize(byte + 1, 0);
        }
        mask[byte] |= 1 << (cpu % 8);
    }
    Ok(mask)
}

/// The microVM's kernel has neither module: the container is confined by its microVM whatever the label says.
fn warn_of_labels(process: &Process, warnings: &mut Warnings) {
    for (field, label) in [
        ("process.apparmorProfile", process.apparmor_profile()),
        ("process.selinuxLabel", process.selinux_label()),
    ] {
        if let Some(label) = label
            .as_deref()
            .filter(|label| !label.is_empty() && *label != "unconfined")
        {
            warnings.add(format!(
                "{field}: {label:?} has no effect: the microVM confines the container, and its kernel has no such module"
            ));
        }
    }
}

fn window(process: &Process) -> Option<WindowSize> {
    let size = process.console_size()?;
    let clamp = |value: u64| u32::from(u16::try_from(value).unwrap_or(u16::MAX));
    Some(WindowSize {
        rows: clamp(size.height()),
        columns: clamp(size.width()),
        ..WindowSize::default()
    })
}

fn capability_sets(sets: Option<&LinuxCapabilities>) -> Result<Capabilities> {
    let Some(sets) = sets else {
        return Ok(Capabilities::default());
    };
    let mask = |field: &str, set: &Option<Set>| -> Result<u64> {
        set.iter().flatten().try_fold(0, |mask, capability| {
            let name = capability.to_string();
            capabilities::number(&name).map_or_else(
                || {
                    invalid(
                        format!("process.capabilities.{field}"),
                        format!("{name:?} is not a capability"),
                    )
                },
                |number| Ok(mask | 1 << number),
            )
        })
    };
    let sets = Capabilities {
        bounding: mask("bounding", sets.bounding())?,
        effective: mask("effective", sets.effective())?,
        permitted: mask("permitted", sets.permitted())?,
        inheritable: mask("inheritable", sets.inheritable())?,
        ambient: mask("ambient", sets.ambient())?,
        ..Capabilities::default()
    };
    if sets.effective & !sets.permitted != 0 {
        return invalid(
            "process.capabilities.effective",
            "has a capability that is not in process.capabilities.permitted",
        );
    }
    Ok(sets)
}

fn resource(kind: PosixRlimitType) -> u32 {
    match kind {
        PosixRlimitType::RlimitCpu => 0,
        PosixRlimitType::RlimitFsize => 1,
        PosixRlimitType::RlimitData => 2,
        PosixRlimitType::RlimitStack => 3,
        PosixRlimitType::RlimitCore => 4,
        PosixRlimitType::RlimitRss => 5,
        PosixRlimitType::RlimitNproc => 6,
        PosixRlimitType::RlimitNofile => 7,
        PosixRlimitType::RlimitMemlock => 8,
        PosixRlimitType::RlimitAs => 9,
        PosixRlimitType::RlimitLocks => 10,
        PosixRlimitType::RlimitSigpending => 11,
        PosixRlimitType::RlimitMsgqueue => 12,
        PosixRlimitType::RlimitNice => 13,
        PosixRlimitType::RlimitRtprio => 14,
        PosixRlimitType::RlimitRttime => 15,
    }
}

fn rlimits(limits: &[PosixRlimit]) -> Result<Vec<Rlimit>> {
    let mut seen = BTreeSet::new();
    limits
        .iter()
        .enumerate()
        .map(|(index, limit)| {
            let field = || format!("process.rlimits[{index}]");
            let resource = resource(limit.typ());
            if !seen.insert(resource) {
                return invalid(field(), format!("{} is given twice", limit.typ()));
            }
            if limit.soft() > limit.hard() {
                return invalid(
                    field(),
                    format!(
                        "the soft limit {} is above the hard one {}",
                        limit.soft(),
                        limit.hard()
                    ),
                );
            }
            Ok(Rlimit {
                resource,
                soft: limit.soft(),
                hard: limit.hard(),
                ..Rlimit::default()
            })
        })
        .collect()
}

fn scheduler(scheduler: &Scheduler) -> Result<agent_protocol::Scheduler> {
    const FIELD: &str = "process.scheduler";
    let policy = match scheduler.policy() {
        LinuxSchedulerPolicy::SchedOther => 0,
        LinuxSchedulerPolicy::SchedFifo => 1,
        LinuxSchedulerPolicy::SchedRr => 2,
        LinuxSchedulerPolicy::SchedBatch => 3,
        LinuxSchedulerPolicy::SchedIso => {
            return unsupported(format!("{FIELD}.policy"), "no kernel has SCHED_ISO");
        }
        LinuxSchedulerPolicy::SchedIdle => 5,
        LinuxSchedulerPolicy::SchedDeadline => 6,
    };
    let (realtime, deadline) = (matches!(policy, 1 | 2), policy == 6);
    let nice = scheduler.nice().unwrap_or(0);
    if !(-20..=19).contains(&nice) {
        return invalid(
            format!("{FIELD}.nice"),
            format!("{nice} is not between -20 and 19"),
        );
    }
    let priority = scheduler.priority().unwrap_or(0);
    if priority != 0 && !realtime || realtime && !(1..=99).contains(&priority) {
        return invalid(
            format!("{FIELD}.priority"),
            format!("{priority}: SCHED_FIFO and SCHED_RR have one between 1 and 99, other policies none"),
        );
    }
    let times = [scheduler.runtime(), scheduler.deadline(), scheduler.period()].map(|time| time.unwrap_or(0));
    if times != [0; 3] && !deadline {
        return invalid(
            format!("{FIELD}.runtime, deadline, period"),
            "only SCHED_DEADLINE has them",
        );
    }
    let mut flags = 0;
    for flag in scheduler.flags().iter().flatten() {
        flags |= match flag {
            LinuxSchedulerFlag::SchedResetOnFork => 0x01,
            LinuxSchedulerFlag::SchedFlagReclaim => 0x02,
            LinuxSchedulerFlag::SchedFlagDLOverrun => 0x04,
            LinuxSchedulerFlag::SchedFlagKeepPolicy => 0x08,
            LinuxSchedulerFlag::SchedFlagKeepParams => 0x10,
            LinuxSchedulerFlag::SchedFlagUtilClampMin | LinuxSchedulerFlag::SchedFlagUtilClampMax => {
                return unsupported(
                    format!("{FIELD}.flags"),
                    "the microVM's kernel doesn't clamp utilization",
                );
            }
        };
    }
    let [runtime_ns, deadline_ns, period_ns] = times;
    Ok(agent_protocol::Scheduler {
        policy,
        nice,
        priority: priority.unsigned_abs(),
        flags,
        runtime_ns,
        deadline_ns,
        period_ns,
        ..agent_protocol::Scheduler::default()
    })
}

fn io_priority(priority: &LinuxIOPriority) -> Result<IoPriority> {
    let level = u32::try_from(priority.priority()).ok().filter(|level| *level < 8);
    let Some(level) = level else {
        return invalid(
            "process.ioPriority.priority",
            format!("{} is not between 0 and 7", priority.priority()),
        );
    };
    let class = match priority.class() {
        IOPriorityClass::IoprioClassRt => 1,
        IOPriorityClass::IoprioClassBe => 2,
        IOPriorityClass::IoprioClassIdle => 3,
    };
    Ok(IoPriority {
        class,
        level,
        ..IoPriority::default()
    })
}

fn personality(personality: &LinuxPersonality) -> Result<u32> {
    if personality
        .flags()
        .as_ref()
        .is_some_and(|flags| !flags.is_empty())
    {
        return unsupported(
            "linux.personality.flags",
            "the specification has no flags; leave the list empty",
        );
    }
    Ok(match personality.domain() {
        LinuxPersonalityDomain::PerLinux => 0,
        LinuxPersonalityDomain::PerLinux32 => 8,
    })
}
