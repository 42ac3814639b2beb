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

    /// What needs privileges that are about to go.
    pub(super) fn apply(&self) -> Result<(), Failure> {
        if !self.cpus_initial.is_empty() {
            sys::set_affinity(&self.cpus_initial)
                .map_err(failed("choosing CPUs (execCPUAffinity.initial)"))?;
        }
        if let Some(scheduler) = &self.scheduler {
            sys::set_scheduler(scheduler).map_err(failed("setting the scheduler"))?;
        }
        if let Some(priority) = &self.io_priority {
            sys::set_io_priority(priority.class, priority.level)
                .map_err(failed("setting the I/O priority"))?;
        }
        if let Some(domain) = self.personality {
            sys::set_personality(domain).map_err(failed("setting the personality"))?;
        }
        if !self.cpus_final.is_empty() {
            sys::set_affinity(&self.cpus_final).map_err(failed("choosing CPUs (execCPUAffinity.final)"))?;
        }
        Ok(())
    }
}
