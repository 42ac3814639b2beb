//! One container containerd has a task of: its microVM (or a pod's process), its first process and its execs.
//!
//! Threads: ttRPC's, which call; one that waits for the container's end; one for each exec that runs. All of them meet at the
//! state's lock, and events are given to the publisher under it: what containerd hears is in the order it happened.
//!
//! Invariant: a container's end is told after the ends of its execs, and nothing is told before the start it belongs to.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    process::Child,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant, SystemTime},
};

use containerd_shim_protos::{
    events::task::{TaskExecAdded, TaskExecStarted, TaskExit, TaskOOM, TaskPaused, TaskResumed, TaskStart},
    protobuf::MessageField,
    topics,
};
use oci_spec::runtime::{LinuxResources, Process as ProcessSpec};

use crate::{
    error::{Result, ShimError},
    exec::{Exec, ExecPhase},
    microvm::MicroVm,
    process::{Exit, Process, Status, Waiter},
    publisher::{Publisher, timestamp},
    stdio::StreamNames,
};

/// When a container has ended, how long its execs may take to notice that their microVM has gone.
const EXEC_PATIENCE: Duration = Duration::from_secs(10);
const SIGKILL: u32 = 9;
/// 128 and SIGKILL.
pub const KILLED: u32 = 137;

/// What a container is made of.
#[derive(Debug)]
pub enum Body {
    MicroVm(MicroVm),
    /// A pod's process.
    Pod(Mutex<Child>),
}

/// One container.
#[derive(Debug)]
pub struct Task {
    pub id: String,
    /// The containerd namespace.
    pub namespace: String,
    pub bundle: PathBuf,
    pub names: StreamNames,
    body: Body,
    state: Mutex<State>,
    exec_ended: Condvar,
    publisher: Publisher,
}

#[derive(Debug)]
pub struct State {
    pub init: Process,
    pub execs: BTreeMap<String, Exec>,
    /// How many there have been.
    exec_count: u64,
}

impl State {
    /// The container's first process, or an exec.
    pub fn process(&mut self, id: &str, exec_id: &str) -> Result<&mut Process> {
        if exec_id.is_empty() {
            return Ok(&mut self.init);
        }
        self.exec(id, exec_id).map(|exec| &mut exec.process)
    }

    /// What the guest calls an exec; nothing for the container's first process.
    fn guest_name(&self, exec_id: &str) -> Option<String> {
        self.execs.get(exec_id).map(|exec| exec.guest_name.clone())
    }

    pub fn exec(&mut self, id: &str, exec_id: &str) -> Result<&mut Exec> {
        self.execs.get_mut(exec_id).ok_or_else(|| ShimError::NoProcess {
            id: id.to_owned(),
            exec_id: exec_id.to_owned(),
        })
    }
}

/// What a new task is given.
#[derive(Debug)]
pub struct NewTask {
    pub id: String,
    pub namespace: String,
    pub bundle: PathBuf,
    pub names: StreamNames,
    pub body: Body,
    pub init: Process,
}

impl Task {
    /// Takes over a container that was created.
    pub fn new(new: NewTask, publisher: Publisher) -> Arc<Self> {
        Arc::new(Self {
            id: new.id,
            namespace: new.namespace,
            bundle: new.bundle,
            names: new.names,
            body: new.body,
            state: Mutex::new(State {
                init: new.init,
                execs: BTreeMap::new(),
                exec_count: 0,
            }),
            exec_ended: Condvar::new(),
            publisher,
        })
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn what(&self) -> String {
        format!("container {:?}", self.id)
    }

    /// Its microVM, where it has one.
    pub fn microvm(&self, refused: &'static str) -> Result<&MicroVm> {
        match &self.body {
            Body::MicroVm(microvm) => Ok(microvm),
            Body::Pod(_) => Err(ShimError::Unsupported { what: refused }),
        }
    }

    /// Starts the thread that waits for the container's end; `ended` is called at the very end.
    pub fn watch(self: &Arc<Self>, ended: impl FnOnce(&Self) + Send + 'static) -> Result<()> {
        let task = self.clone();
        thread::Builder::new()
            .name("container".into())
            .stack_size(256 * 1024)
            .spawn(move || {
                let (exit, oom_killed) = task.await_end();
                task.finish(exit, oom_killed);
                ended(&task);
            })
            .map(drop)
            .map_err(ShimError::system("starting a thread"))
    }

    fn await_end(&self) -> (Exit, bool) {
        match &self.body {
            Body::MicroVm(microvm) => microvm.wait(),
            Body::Pod(child) => (await_child(child), false),
        }
    }

    /// The container has ended.
    fn finish(&self, exit: Exit, oom_killed: bool) {
        let mut state = self.state();
        if oom_killed {
            self.publish(
                topics::TASK_OOM_EVENT_TOPIC,
                &TaskOOM {
                    container_id: self.id.clone(),
                    ..TaskOOM::default()
                },
            );
        }
        let deadline = Instant::now() + EXEC_PATIENCE;
        while state.execs.values().any(Exec::is_running) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                tracing::warn!(id = self.id, "execs have not noticed the end of their container");
                break;
            }
            let waited = self.exec_ended.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        self.publish_exit("", state.init.pid, exit);
        state.init.ended(exit);
    }

    fn publish_exit(&self, exec_id: &str, pid: u32, exit: Exit) {
        let id = if exec_id.is_empty() { &self.id } else { exec_id };
        self.publish(
            topics::TASK_EXIT_EVENT_TOPIC,
            &TaskExit {
                container_id: self.id.clone(),
                id: id.to_owned(),
                pid,
                exit_status: exit.status,
                exited_at: MessageField::some(timestamp(exit.at)),
                ..TaskExit::default()
            },
        );
    }

    pub fn publish(&self, topic: &str, event: &dyn containerd_shim_protos::protobuf::MessageDyn) {
        self.publisher.publish(topic, event);
    }

    /// Lets the container's first process run; its pid.
    pub fn start(&self) -> Result<u32> {
        let mut state = self.state();
        state
            .init
            .expect(Status::Created, &self.what(), "it can be started once")?;
        if let Body::MicroVm(microvm) = &self.body {
            microvm.start()?;
        }
        state.init.status = Status::Running;
        let pid = state.init.pid;
        self.publish(
            topics::TASK_START_EVENT_TOPIC,
            &TaskStart {
                container_id: self.id.clone(),
                pid,
                ..TaskStart::default()
            },
        );
        Ok(pid)
    }

    /// Remembers a process that is to be started in the container.
    pub fn add_exec(&self, exec_id: &str, spec: ProcessSpec, names: StreamNames) -> Result<()> {
        self.microvm("a pod's sandbox runs no programs")?;
        let mut state = self.state();
        if state.execs.contains_key(exec_id) {
            return Err(ShimError::Exists {
                what: "exec",
                id: exec_id.to_owned(),
            });
        }
        state
            .init
            .expect(Status::Running, &self.what(), "nothing can be executed in it")?;
        state.exec_count += 1;
        let guest_name = format!("{exec_id}.{}", state.exec_count);
        let exec = Exec::new(guest_name, spec, names);
        state.execs.insert(exec_id.to_owned(), exec);
        self.publish(
            topics::TASK_EXEC_ADDED_EVENT_TOPIC,
            &TaskExecAdded {
                container_id: self.id.clone(),
                exec_id: exec_id.to_owned(),
                ..TaskExecAdded::default()
            },
        );
        Ok(())
    }

    /// Starts a remembered process; its pid, which is that of the container.
    pub fn start_exec(self: &Arc<Self>, exec_id: &str) -> Result<u32> {
        let microvm = self.microvm("a pod's sandbox runs no programs")?;
        let (guest_name, spec, names) = {
            let mut state = self.state();
            state
                .init
                .expect(Status::Running, &self.what(), "nothing can be executed in it")?;
            state.exec(&self.id, exec_id)?.begin_start(exec_id)?
        };
        // Without the lock: many may be started at once, and the guest takes its time.
        let started = names
            .open((&self.id, &self.namespace))
            .and_then(|streams| microvm.exec(&guest_name, &spec, streams));
        let mut state = self.state();
        let ended = state.init.status == Status::Stopped;
        let pid = state.init.pid;
        let exec = state.exec(&self.id, exec_id)?;
        let running = match started {
            Ok(running) if !ended => running,
            Ok(_) => {
                exec.phase = ExecPhase::New;
                return Err(ShimError::WrongState {
                    what: self.what(),
                    status: "stopped",
                    refused: "it ended while a process was started in it",
                });
            }
            Err(error) => {
                exec.phase = ExecPhase::New;
                return Err(error);
            }
        };
        let (task, name) = (self.clone(), exec_id.to_owned());
        exec.run(pid, running, move |exit| task.exec_ended(&name, exit))?;
        self.publish(
            topics::TASK_EXEC_STARTED_EVENT_TOPIC,
            &TaskExecStarted {
                container_id: self.id.clone(),
                exec_id: exec_id.to_owned(),
                pid,
                ..TaskExecStarted::default()
            },
        );
        Ok(pid)
    }

    fn exec_ended(&self, exec_id: &str, exit: Exit) {
        let mut state = self.state();
        let Some(exec) = state.execs.get_mut(exec_id) else {
            return;
        };
        self.publish_exit(exec_id, exec.process.pid, exit);
        exec.process.ended(exit);
        self.exec_ended.notify_all();
    }

    /// Takes an exec away that doesn't run; how it ended.
    pub fn delete_exec(&self, exec_id: &str) -> Result<(u32, Option<Exit>)> {
        let mut exec = {
            let mut state = self.state();
            let exec = state.exec(&self.id, exec_id)?;
            if exec.is_running() {
                return Err(ShimError::WrongState {
                    what: format!("exec {exec_id:?}"),
                    status: exec.process.status.as_str(),
                    refused: "it has to be stopped before it can be deleted",
                });
            }
            state.execs.remove(exec_id)
        };
        let Some(exec) = exec.as_mut() else {
            return Err(ShimError::Finished);
        };
        exec.join();
        Ok((exec.process.pid, exec.process.exit))
    }

    /// Removes everything of the container but what containerd made; it must not run. How it ended.
    pub fn delete(&self) -> Result<(u32, Exit)> {
        let (pid, exit) = {
            let state = self.state();
            let (init, what) = (&state.init, self.what());
            if matches!(init.status, Status::Running | Status::Paused) {
                return Err(ShimError::WrongState {
                    what,
                    status: init.status.as_str(),
                    refused: "it has to be stopped before it can be deleted",
                });
            }
            let never = Exit {
                status: 0,
                at: SystemTime::now(),
            };
            (init.pid, init.exit.unwrap_or(never))
        };
        match &self.body {
            Body::MicroVm(microvm) => microvm.delete()?,
            Body::Pod(_) => {
                crate::pause::end_remembered(&self.bundle);
            }
        }
        crate::rootfs::unmount_all(&self.bundle);
        Ok((pid, exit))
    }

    /// Sends a signal to a process, or to all of the container.
    pub fn kill(&self, exec_id: &str, signal: u32, all: bool) -> Result<()> {
        let guest_name = {
            let mut state = self.state();
            let process = state.process(&self.id, exec_id)?;
            if process.status == Status::Stopped {
                return Err(ShimError::Finished);
            }
            if !exec_id.is_empty() && process.status == Status::Created {
                return Err(ShimError::WrongState {
                    what: format!("exec {exec_id:?}"),
                    status: "created",
                    refused: "there is no process yet",
                });
            }
            state.guest_name(exec_id)
        };
        match &self.body {
            Body::MicroVm(microvm) => match guest_name {
                None => microvm.signal(signal, all),
                Some(name) => microvm.signal_exec(&name, signal),
            },
            Body::Pod(child) => signal_child(child, signal),
        }
    }

    pub fn pause(&self) -> Result<()> {
        let microvm = self.microvm("a pod's sandbox can't be paused")?;
        let mut state = self.state();
        state
            .init
            .expect(Status::Running, &self.what(), "it can't be paused")?;
        microvm.pause()?;
        state.init.status = Status::Paused;
        self.publish(
            topics::TASK_PAUSED_EVENT_TOPIC,
            &TaskPaused {
                container_id: self.id.clone(),
                ..TaskPaused::default()
            },
        );
        Ok(())
    }

    pub fn resume(&self) -> Result<()> {
        let microvm = self.microvm("a pod's sandbox can't be paused")?;
        let mut state = self.state();
        state
            .init
            .expect(Status::Paused, &self.what(), "it can't be resumed")?;
        microvm.resume()?;
        state.init.status = Status::Running;
        self.publish(
            topics::TASK_RESUMED_EVENT_TOPIC,
            &TaskResumed {
                container_id: self.id.clone(),
                ..TaskResumed::default()
            },
        );
        Ok(())
    }

    /// Gives the terminal of a process another size.
    pub fn resize(&self, exec_id: &str, rows: u16, columns: u16) -> Result<()> {
        let guest_name = {
            let mut state = self.state();
            let names = match exec_id {
                "" => &self.names,
                _ => &state.exec(&self.id, exec_id)?.names,
            };
            if !names.terminal {
                return Err(ShimError::Refused {
                    field: "size".into(),
                    problem: "the process has no terminal".into(),
                });
            }
            let process = state.process(&self.id, exec_id)?;
            if process.status == Status::Stopped {
                return Err(ShimError::Finished);
            }
            state.guest_name(exec_id)
        };
        self.microvm("a pod's sandbox has no terminal")?
            .resize(guest_name.as_deref(), rows, columns)
    }

    /// The process's input ends when its writers have gone.
    pub fn close_input(&self, exec_id: &str) -> Result<()> {
        self.state().process(&self.id, exec_id)?.close_input();
        Ok(())
    }

    pub fn wait(&self, exec_id: &str, waiter: Waiter) -> Result<()> {
        self.state().process(&self.id, exec_id)?.wait(waiter);
        Ok(())
    }

    pub fn update(&self, resources: &LinuxResources) -> Result<()> {
        match &self.body {
            Body::MicroVm(microvm) => microvm.update(resources),
            // A pod's process needs nothing; its limits are its containers'.
            Body::Pod(_) => Ok(()),
        }
    }

    pub fn stats(&self) -> Result<agent_protocol::StatsResponse> {
        match &self.body {
            Body::MicroVm(microvm) => microvm.stats(),
            Body::Pod(_) => Ok(agent_protocol::StatsResponse {
                pids_current: 1,
                ..agent_protocol::StatsResponse::default()
            }),
        }
    }
}

/// Waits for a child without keeping others from signalling it.
fn await_child(child: &Mutex<Child>) -> Exit {
    use std::os::unix::process::ExitStatusExt as _;
    let pid = child.lock().unwrap_or_else(PoisonError::into_inner).id();
    let status = i32::try_from(pid)
        .ok()
        .and_then(rustix::process::Pid::from_raw)
        .and_then(|pid| rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).ok())
        .and_then(|pidfd| {
            let mut fds = [rustix::event::PollFd::new(&pidfd, rustix::event::PollFlags::IN)];
            while rustix::event::poll(&mut fds, None).is_err_and(|errno| errno == rustix::io::Errno::INTR) {}
            child.lock().unwrap_or_else(PoisonError::into_inner).wait().ok()
        });
    let code = status.map_or(KILLED, |status| match (status.code(), status.signal()) {
        (Some(code), _) => u32::try_from(code).unwrap_or(KILLED),
        (None, Some(signal)) => 128 + u32::try_from(signal).unwrap_or(SIGKILL),
        (None, None) => KILLED,
    });
    Exit {
        status: code,
        at: SystemTime::now(),
    }
}

fn signal_child(child: &Mutex<Child>, signal: u32) -> Result<()> {
    let mut child = child.lock().unwrap_or_else(PoisonError::into_inner);
    if child.try_wait().is_ok_and(|status| status.is_some()) {
        return Err(ShimError::Finished);
    }
    let signal = i32::try_from(signal)
        .ok()
        .and_then(|number| nix::sys::signal::Signal::try_from(number).ok());
    let signal = signal.ok_or_else(|| ShimError::Refused {
        field: "signal".into(),
        problem: "there is no such signal".into(),
    })?;
    let pid = nix::unistd::Pid::from_raw(i32::try_from(child.id()).unwrap_or(0));
    nix::sys::signal::kill(pid, signal).map_err(ShimError::system("signalling the pod's process"))
}
