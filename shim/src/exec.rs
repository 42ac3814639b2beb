//! A further process in a container: remembered by `Exec`, started by `Start`, its bytes moved by a thread of its own.

use std::{
    os::{
        fd::{BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
    sync::mpsc,
    thread,
    time::Duration,
};

use oci_spec::runtime::Process as ProcessSpec;

use crate::{
    error::{Result, ShimError},
    process::{Exit, Process, Status},
    relay::{self, Channel, ExitSource},
    stdio::{KeptEnds, StreamNames},
};

/// How long an exec that is deleted may take to hand over the rest of its output.
const DELETE_PATIENCE: Duration = Duration::from_secs(3);
/// There may be hundreds of these threads.
const STACK_BYTES: usize = 128 * 1024;

/// Whether it was started.
#[derive(Debug)]
pub enum ExecPhase {
    New,
    Starting,
    Started {
        /// Its thread ends when this does.
        stop: Option<OwnedFd>,
        /// Ends when the thread has ended.
        done: mpsc::Receiver<()>,
    },
}

/// A further process.
#[derive(Debug)]
pub struct Exec {
    pub process: Process,
    pub names: StreamNames,
    pub phase: ExecPhase,
    /// What the guest calls it, which is never used again: containerd's name may be.
    pub guest_name: String,
    spec: ProcessSpec,
}

/// A process that runs in the guest, and what connects to it.
pub struct RunningExec {
    pub channels: Vec<Channel>,
    pub kept: KeptEnds,
    pub source: Box<dyn ExitSource<Exit = Exit> + Send>,
}

impl std::fmt::Debug for RunningExec {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("RunningExec")
            .field("channels", &self.channels)
            .finish_non_exhaustive()
    }
}

struct Source(Box<dyn ExitSource<Exit = Exit> + Send>);

impl ExitSource for Source {
    type Exit = Exit;

    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    fn hear(&mut self) -> Option<Exit> {
        self.0.hear()
    }
}

impl Exec {
    pub fn new(guest_name: String, spec: ProcessSpec, names: StreamNames) -> Self {
        Self {
            process: Process::new(0, KeptEnds::default()),
            names,
            phase: ExecPhase::New,
            guest_name,
            spec,
        }
    }

    /// Whether there is, or will be at once, a process in the guest.
    pub fn is_running(&self) -> bool {
        match self.phase {
            ExecPhase::New => false,
            ExecPhase::Starting => true,
            ExecPhase::Started { .. } => self.process.status != Status::Stopped,
        }
    }

    /// Marks it as being started; its name in the guest and what it takes.
    pub fn begin_start(&mut self, exec_id: &str) -> Result<(String, ProcessSpec, StreamNames)> {
        if !matches!(self.phase, ExecPhase::New) {
            return Err(ShimError::WrongState {
                what: format!("exec {exec_id:?}"),
                status: self.process.status.as_str(),
                refused: "it can be started once",
            });
        }
        self.phase = ExecPhase::Starting;
        Ok((self.guest_name.clone(), self.spec.clone(), self.names.clone()))
    }

    /// Starts the thread of a process that runs.
    pub fn run(
        &mut self,
        pid: u32,
        running: RunningExec,
        ended: impl FnOnce(Exit) + Send + 'static,
    ) -> Result<()> {
        let (stop_read, stop) = UnixStream::pair().map_err(ShimError::system("creating a socket pair"))?;
        let stop_read = OwnedFd::from(stop_read);
        let (alive, done) = mpsc::channel();
        let (channels, source, mut kept) = (running.channels, Source(running.source), running.kept);
        // Until all output is in them; then their readers see its end.
        let outputs = kept.take_outputs();
        thread::Builder::new()
            .name("exec".into())
            .stack_size(STACK_BYTES)
            .spawn(move || {
                relay::run(channels, source, &stop_read, ended);
                drop(outputs);
                drop::<mpsc::Sender<()>>(alive);
            })
            .map_err(ShimError::system("starting a thread"))?;
        self.process.pid = pid;
        self.process.status = Status::Running;
        self.process.keep(kept);
        self.phase = ExecPhase::Started {
            stop: Some(stop.into()),
            done,
        };
        Ok(())
    }

    /// Waits until all output has been handed over, within bounds; it must have ended.
    pub fn join(&mut self) {
        if let ExecPhase::Started { stop, done } = &mut self.phase {
            // An error is what is waited for: the thread has gone.
            let _ = done.recv_timeout(DELETE_PATIENCE);
            *stop = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read as _, Write as _},
        os::fd::AsFd as _,
        sync::mpsc::channel,
    };

    use super::*;

    struct Ends(UnixStream);

    impl ExitSource for Ends {
        type Exit = Exit;

        fn as_fd(&self) -> BorrowedFd<'_> {
            self.0.as_fd()
        }

        fn hear(&mut self) -> Option<Exit> {
            let mut byte = [0];
            self.0.read_exact(&mut byte).ok()?;
            Some(Exit {
                status: byte[0].into(),
                at: std::time::SystemTime::now(),
            })
        }
    }

    #[test]
    fn exec_is_started_once_and_told_to_have_ended() {
        let spec = ProcessSpec::default();
        let mut exec = Exec::new("e.1".into(), spec, StreamNames::default());
        assert!(!exec.is_running());
        exec.begin_start("e").unwrap();
        assert!(exec.is_running() && exec.begin_start("e").is_err());
        let (mut guest, source) = UnixStream::pair().unwrap();
        let running = RunningExec {
            channels: Vec::new(),
            kept: KeptEnds::default(),
            source: Box::new(Ends(source)),
        };
        let (sender, exits) = channel();
        exec.run(7, running, move |exit| sender.send(exit).unwrap())
            .unwrap();
        guest.write_all(&[5]).unwrap();
        let exit = exits.recv().unwrap();
        exec.process.ended(exit);
        exec.join();
        assert_eq!((exit.status, exec.is_running(), exec.process.pid), (5, false, 7));
    }
}
