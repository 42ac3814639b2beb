//! The bounds of a process.

use super::{
    Bounded, CAPABILITY_MASK, InvalidMessage, MAX_LIST_ENTRIES, MAX_SECCOMP_BYTES, MAX_SECCOMP_PROGRAMS,
    check_list, check_path, check_strings, check_text, check_window, require,
};
use crate::{Process, process};

/// Longest mask of CPUs: 8192 of them.
pub const MAX_CPU_MASK_BYTES: usize = 1024;

impl Bounded for Process {
    fn check(&self) -> Result<(), InvalidMessage> {
        check_strings("process.args", &self.args)?;
        require(
            self.args.first().is_some_and(|arg| !arg.is_empty()),
            "process.args",
            "names no command",
        )?;
        check_strings("process.env", &self.env)?;
        check_path("process.cwd", &self.cwd)?;
        if let Some(process::User::UserName(name)) = &self.user {
            check_text("process.user_name", name, 256)?;
        }
        check_list("process.additional_gids", &self.additional_gids, MAX_LIST_ENTRIES)?;
        check_list("process.rlimits", &self.rlimits, 32)?;
        for rlimit in &self.rlimits {
            require(rlimit.resource < 16, "process.rlimits", "has an unknown resource")?;
            require(
                rlimit.soft <= rlimit.hard,
                "process.rlimits",
                "has a soft limit above its hard limit",
            )?;
        }
        if let Some(size) = self.window_size.as_ref() {
            check_window(size)?;
        }
        if let Some(caps) = self.capabilities.as_ref() {
            let all = caps.bounding | caps.effective | caps.permitted | caps.inheritable | caps.ambient;
            require(
                all & !CAPABILITY_MASK == 0,
                "process.capabilities",
                "has an unknown capability",
            )?;
        }
        check_list(
            "process.seccomp_programs",
            &self.seccomp_programs,
            MAX_SECCOMP_PROGRAMS,
        )?;
        for program in &self.seccomp_programs {
            require(
                !program.is_empty() && program.len() <= MAX_SECCOMP_BYTES && program.len().is_multiple_of(8),
                "process.seccomp_programs",
                "is not a whole number of at most 4096 instructions",
            )?;
        }
        check_list(
            "process.additional_groups",
            &self.additional_groups,
            MAX_LIST_ENTRIES,
        )?;
        self.additional_groups
            .iter()
            .try_for_each(|group| check_text("process.additional_groups", group, 256))?;
        if let Some(umask) = self.umask {
            require(umask <= 0o777, "process.umask", "has bits above 0777")?;
        }
        if let Some(adjustment) = self.oom_score_adj {
            require(
                (-1000..=1000).contains(&adjustment),
                "process.oom_score_adj",
                "is not in -1000..1000",
            )?;
        }
        check_scheduling(self)
    }
}

fn check_scheduling(process: &Process) -> Result<(), InvalidMessage> {
    if let Some(scheduler) = process.scheduler.as_ref() {
        require(
            scheduler.policy <= 7,
            "process.scheduler.policy",
            "is not a policy of the kernel's",
        )?;
        require(
            (-20..=19).contains(&scheduler.nice),
            "process.scheduler.nice",
            "is not in -20..19",
        )?;
        require(
            scheduler.priority <= 99,
            "process.scheduler.priority",
            "is above 99",
        )?;
    }
    if let Some(priority) = process.io_priority.as_ref() {
        require(
            priority.class <= 3,
            "process.io_priority.class",
            "is not a class of the kernel's",
        )?;
        require(priority.level <= 7, "process.io_priority.level", "is above 7")?;
    }
    for (field, mask) in [
        ("process.cpus_initial", &process.cpus_initial),
        ("process.cpus_final", &process.cpus_final),
    ] {
        require(
            mask.len() <= MAX_CPU_MASK_BYTES,
            field,
            "is longer than 1024 bytes",
        )?;
        require(
            mask.is_empty() || mask.iter().any(|byte| *byte != 0),
            field,
            "has no CPU in it",
        )?;
    }
    Ok(())
}
