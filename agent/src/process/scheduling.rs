//! When and where a process runs: its scheduler, its priority for disks, its CPUs and its execution domain.
//!
//! [`Scheduling::apply`] runs in the new process and allocate nothing.

use agent_protocol::{IoPriority, Process, Scheduler};

use super::failure::{Failure, failed};
use crate::sys;

/// What of it a process asks for.
#[derive(Debug, Default)]
pub struct Scheduling {
    scheduler: Option<Scheduler>,
    io_priority: Option<IoPriority>,
    cpus_initial: Vec<u8>,
    cpus_final: Vec<u8>,
    personality: Option<u32>,
}

impl Scheduling {
    /// What a process asks for.
    pub fn new(process: &Process) -> Self {
        Self {
            scheduler: process.scheduler.as_ref().cloned(),
            io_priority: process.io_priority.as_ref().cloned(),
            cpus_initial: process.cpus_initial.clone(),
            cpus_final: process.cpus_final.clone(),
            personality: process.personality,
        }
    }

    /// What needs rights; of the calling process, or another.
    pub(super) fn apply(&self, pid: i32) -> Result<(), Failure> {
        if !self.cpus_initial.is_empty() {
            sys::set_affinity(pid, &self.cpus_initial)
                .map_err(failed("choosing CPUs (execCPUAffinity.initial)"))?;
        }
        if let Some(scheduler) = &self.scheduler {
            sys::set_scheduler(pid, scheduler).map_err(failed("setting the scheduler"))?;
        }
        if let Some(priority) = &self.io_priority {
            sys::set_io_priority(pid, priority.class, priority.level)
                .map_err(failed("setting the I/O priority"))?;
        }
        if !self.cpus_final.is_empty() {
            sys::set_affinity(pid, &self.cpus_final)
                .map_err(failed("choosing CPUs (execCPUAffinity.final)"))?;
        }
        Ok(())
    }

    /// Which kernel the calling process sees.
    pub(super) fn enter_domain(&self) -> Result<(), Failure> {
        match self.personality {
            Some(domain) => sys::set_personality(domain).map_err(failed("setting the personality")),
            None => Ok(()),
        }
    }
}
