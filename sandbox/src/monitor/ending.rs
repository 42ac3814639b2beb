//! The end of a container: its microVM goes, its record says so, everybody who waits is told.
//!
//! Invariant: what clients are told about the end is told after the record says it and nothing is left of the microVM.

use rustix::{
    event::{PollFd, PollFlags, poll},
    io::Errno,
};

use std::os::fd::AsFd as _;

use crate::{ContainerRecord, Status, attach::ExitStatus, container_record::now_ms, container_store::Home};

use super::{
    output::Outputs,
    protocol::{ExitReport, Incoming, Reply, Request},
    server::{Client, KILLED, Server},
};

impl Server {
    /// Ends the microVM, records the exit, tells everybody.
    pub(super) fn finish(mut self) {
        self.vm.begin_end();
        self.outputs.finish_log();
        self.tell_output_events();
        let Self {
            home,
            mut record,
            vm,
            listener,
            mut outputs,
            mut clients,
            exit,
            ..
        } = self;
        drop(listener);
        let exit = exit.unwrap_or(ExitStatus {
            code: KILLED,
            oom_killed: false,
        });
        record.status = Status::Exited;
        record.finished_ms = Some(now_ms());
        record.exit_code = Some(exit.code);
        record.oom_killed = exit.oom_killed;
        record.run = None;
        record.endpoint = None;
        let timing = vm.finish();
        let report = ExitReport {
            code: exit.code,
            oom_killed: exit.oom_killed,
            error: record.error.clone(),
            timing,
        };
        settle(home, &record);
        clients.retain(|client| client.waits);
        deliver_rest(&mut outputs, &mut clients);
        // Whoever reads the other end of a pipe sees its end as soon as it is told.
        drop(outputs);
        for client in clients {
            drop(client.connection.send(&Reply::Exited(report.clone()), &[]));
        }
    }
}

/// Leaves the home as its container wants it: with the exit recorded, or not at all.
fn settle(home: Home, record: &ContainerRecord) {
    let settled = if record.spec.auto_remove {
        home.remove(&record.name)
    } else {
        home.write(record)
    };
    if let Err(error) = settled {
        // The next command finds a record that says "running" and no owner, and records what it can.
        tracing::error!(%error, "recording the container's end");
    }
}

/// Writes what slow clients have not taken yet, as long as they are there.
fn deliver_rest(outputs: &mut Outputs, clients: &mut Vec<Client>) {
    while outputs.is_blocked() {
        let mut fds: Vec<PollFd<'_>> = outputs
            .blocked()
            .map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::OUT))
            .collect();
        let writable = fds.len();
        fds.extend(
            clients
                .iter()
                .map(|client| PollFd::from_borrowed_fd(client.connection.as_fd(), PollFlags::IN)),
        );
        if poll(&mut fds, None).is_err_and(|errno| errno != Errno::INTR) {
            return;
        }
        let gone: Vec<bool> = fds[writable..]
            .iter()
            .map(|fd| !fd.revents().is_empty())
            .collect();
        drop(fds);
        outputs.flush();
        let mut gone = gone.into_iter();
        clients.retain_mut(|client| {
            let gone = gone.next().unwrap_or(false)
                && matches!(client.connection.receive::<Request>(), Incoming::Closed);
            if gone {
                outputs.detach(client.token);
            }
            !gone
        });
    }
}
