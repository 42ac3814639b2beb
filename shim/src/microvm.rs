//! The way to `sandbox`: a container's microVM, made of a bundle.

use std::{
    fmt::Write as _,
    os::fd::{AsFd, BorrowedFd},
    path::{Path, PathBuf},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use agent_protocol::{StatsResponse, WaitProcess, WaitProcessResponse, wait_process_response::Outcome};
use oci_spec::runtime::{LinuxResources, Process as ProcessSpec, Spec};
use rustix::process::{Pid, WaitOptions, waitpid};
use sandbox::{
    Components, Directories,
    agent_client::{AgentClient, CALL_TIMEOUT, Pending},
    bundle::{BundleError, BundleExit, BundleStdio, Bundles, CreateBundle, PodRole},
    layers::LayeredRootfs,
    log_driver::OutputStream,
};
use sha2::{Digest as _, Sha256};

use crate::{
    arguments::Arguments,
    error::{Result, ShimError},
    exec::RunningExec,
    process::Exit,
    relay::{Channel, ExitSource},
    stdio::Streams,
    task::KILLED,
};

/// Below the run directory.
const FOLDER: &str = "containerd";
/// Enough of a hash to keep the containers of several daemons apart; sockets' paths must stay short.
const DAEMON_HASH_BYTES: usize = 4;

/// All microVMs of one containerd namespace of one daemon.
#[derive(Debug, Clone)]
pub struct MicroVms {
    bundles: Bundles,
}

/// What one is made of.
#[derive(Debug)]
pub struct NewMicroVm<'a> {
    pub id: &'a str,
    pub bundle: &'a Path,
    pub spec: Spec,
    /// Whether it is a pod's.
    pub pod: PodRole,
    /// Its root filesystem, if that isn't what is mounted in the bundle.
    pub layers: Option<LayeredRootfs>,
}

/// Where their state is.
fn root(run: &Path, arguments: &Arguments) -> PathBuf {
    let mut name = String::new();
    for byte in Sha256::digest(&arguments.address).iter().take(DAEMON_HASH_BYTES) {
        // Writing to a string can't fail.
        let _ = write!(name, "{byte:02x}");
    }
    run.join(FOLDER).join(name).join(&arguments.namespace)
}

impl MicroVms {
    /// Those the command line is about; nothing is looked for yet.
    pub fn open(arguments: &Arguments) -> Result<Self> {
        let run = Directories::from_environment().run;
        Ok(Self {
            bundles: Bundles::open(&root(&run, arguments))?,
        })
    }

    /// Makes one with the container in it, or the container in that of its pod; its process waits to be started. The pid of the
    /// process that stands for it.
    pub fn create(&self, new: NewMicroVm<'_>, streams: Streams) -> Result<(MicroVm, u32)> {
        let NewMicroVm { id, bundle, spec, .. } = new;
        // containerd gives an id anew only when it knows of no other container of it.
        if !matches!(self.bundles.state(id), Err(BundleError::NotExist)) {
            self.remove(id)?;
        }
        if let Some(stdin) = &streams.stdin {
            // Whoever reads it waits for what comes.
            rustix::io::ioctl_fionbio(stdin, false).map_err(ShimError::system("preparing stdin"))?;
        }
        let state = self.bundles.create(CreateBundle {
            id,
            bundle,
            spec: &spec,
            stdio: BundleStdio {
                stdin: streams.stdin,
                stdout: streams.stdout,
                stderr: streams.stderr,
                console_socket: None,
            },
            systemd_cgroup: names_a_scope(&spec),
            pod: new.pod,
            layers: new.layers,
            components: &Components::find()?,
        })?;
        let pid = u32::try_from(state.pid).unwrap_or(0);
        let microvm = MicroVm {
            bundles: self.bundles.clone(),
            id: id.to_owned(),
            monitor: Pid::from_raw(state.pid),
        };
        Ok((microvm, pid))
    }

    /// Whether a container's microVM is that of a pod, for others to be in.
    pub fn is_pods(&self, id: &str) -> bool {
        self.bundles
            .state(id)
            .is_ok_and(|state| state.pod == PodRole::Sandbox)
    }

    /// The ids of those there are, or of which something is left.
    pub fn ids(&self) -> Result<Vec<String>> {
        Ok(self.bundles.ids()?)
    }

    /// The bundle of one; nothing where it has none.
    pub fn bundle(&self, id: &str) -> Option<PathBuf> {
        self.bundles.state(id).ok().map(|state| state.bundle)
    }

    /// Ends and removes one, whatever state it is in; the pid it had, and how it ended if it has by itself.
    pub fn remove(&self, id: &str) -> Result<Option<(u32, Option<Exit>)>> {
        let state = match self.bundles.state(id) {
            Ok(state) => Some(state),
            Err(BundleError::NotExist) => None,
            Err(error) => {
                tracing::warn!(id, %error, "a container's state can't be read");
                None
            }
        };
        match self.bundles.delete(id, true) {
            Ok(()) | Err(BundleError::NotExist) => {}
            Err(error) => return Err(error.into()),
        }
        Ok(state.map(|state| {
            let exit = state.exit.as_ref().map(exit_of);
            (u32::try_from(state.pid).unwrap_or(0), exit)
        }))
    }
}

/// Whether the control groups' path is `SLICE:PREFIX:NAME`. containerd says it by runc's options only, or not at all.
fn names_a_scope(spec: &Spec) -> bool {
    let linux = spec.linux().as_ref();
    let path = linux.and_then(|linux| linux.cgroups_path().as_ref());
    let parts: Vec<&str> = path
        .and_then(|path| path.to_str())
        .unwrap_or_default()
        .split(':')
        .collect();
    parts.len() == 3 && parts[0].ends_with(".slice")
}

fn exit_of(exit: &BundleExit) -> Exit {
    Exit {
        status: exit.status.code().into(),
        at: UNIX_EPOCH + Duration::from_nanos(exit.at_ns),
    }
}

/// One.
#[derive(Debug)]
pub struct MicroVm {
    bundles: Bundles,
    id: String,
    /// A child of this process.
    monitor: Option<Pid>,
}

impl MicroVm {
    pub fn start(&self) -> Result<()> {
        Ok(self.bundles.start(&self.id)?)
    }

    /// Waits until the container has ended and nothing of it runs; whether it was for want of memory.
    pub fn wait(&self) -> (Exit, bool) {
        let exit = self.bundles.wait(&self.id);
        // It ends when the last output is delivered, and is nobody else's to collect.
        if let Some(monitor) = self.monitor {
            while waitpid(Some(monitor), WaitOptions::empty())
                .is_err_and(|errno| errno == rustix::io::Errno::INTR)
            {}
        }
        match exit {
            Ok(exit) => (exit_of(&exit), exit.oom_killed),
            Err(error) => {
                tracing::warn!(id = self.id, %error, "how the container ended is not known");
                (killed_now(), false)
            }
        }
    }

    /// Removes what there is of it.
    pub fn delete(&self) -> Result<()> {
        match self.bundles.delete(&self.id, true) {
            Ok(()) | Err(BundleError::NotExist) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    pub fn signal(&self, signal: u32, all: bool) -> Result<()> {
        Ok(self.bundles.signal(&self.id, number(signal), all)?)
    }

    pub fn signal_exec(&self, exec_id: &str, signal: u32) -> Result<()> {
        Ok(self.bundles.signal_exec(&self.id, exec_id, number(signal))?)
    }

    pub fn pause(&self) -> Result<()> {
        Ok(self.bundles.pause(&self.id)?)
    }

    pub fn resume(&self) -> Result<()> {
        Ok(self.bundles.resume(&self.id)?)
    }

    pub fn resize(&self, exec_id: Option<&str>, rows: u16, columns: u16) -> Result<()> {
        Ok(self.bundles.resize(&self.id, exec_id, (rows, columns))?)
    }

    pub fn stats(&self) -> Result<StatsResponse> {
        Ok(self.bundles.stats(&self.id)?)
    }

    pub fn update(&self, resources: &LinuxResources) -> Result<()> {
        Ok(self.bundles.update(&self.id, resources)?)
    }

    /// Starts a further process, and connects its streams.
    pub fn exec(&self, exec_id: &str, process: &ProcessSpec, streams: Streams) -> Result<RunningExec> {
        let opened = self
            .bundles
            .open_exec(&self.id, exec_id, process, streams.stdin.is_some())?;
        let connecting = ShimError::system("connecting an exec's streams");
        let mut channels = Vec::new();
        let connect = || -> std::io::Result<()> {
            if let (Some(fifo), Some(stream)) = (streams.stdin, opened.input) {
                channels.push(Channel::input(fifo, stream)?);
            }
            let (mut stdout, mut stderr) = (streams.stdout, streams.stderr);
            for (kind, stream) in opened.outputs {
                let fifo = match kind {
                    OutputStream::Stderr => stderr.take(),
                    _ => stdout.take(),
                };
                channels.push(Channel::output(stream, fifo)?);
            }
            Ok(())
        };
        connect().map_err(connecting)?;
        Ok(RunningExec {
            channels,
            kept: streams.kept,
            source: Box::new(AgentSource {
                agent: opened.agent,
                wait: opened.wait,
            }),
        })
    }
}

fn number(signal: u32) -> i32 {
    i32::try_from(signal).unwrap_or(i32::MAX)
}

fn killed_now() -> Exit {
    Exit {
        status: KILLED,
        at: SystemTime::now(),
    }
}

/// The agent's connection of an exec, on which the answer comes when it has ended.
#[derive(Debug)]
struct AgentSource {
    agent: AgentClient,
    wait: Pending<WaitProcess>,
}

impl ExitSource for AgentSource {
    type Exit = Exit;

    fn as_fd(&self) -> BorrowedFd<'_> {
        self.agent.as_fd()
    }

    fn hear(&mut self) -> Option<Exit> {
        let heard = self.agent.receive(Some(Instant::now() + CALL_TIMEOUT));
        match heard.and_then(|()| self.agent.take(&self.wait)) {
            Ok(answer) => answer.as_ref().map(exec_exit),
            Err(error) => {
                // The microVM has gone, and the process with it.
                tracing::debug!(%error, "an exec's connection has ended");
                Some(killed_now())
            }
        }
    }
}

fn exec_exit(response: &WaitProcessResponse) -> Exit {
    let status = match response.outcome {
        // A guest's words: a code has eight bits, a signal fewer.
        Some(Outcome::ExitCode(code)) => code.min(255),
        Some(Outcome::Signal(signal)) => 128 + signal.min(127),
        _ => 255,
    };
    Exit {
        status,
        at: SystemTime::now(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn daemons_and_namespaces_are_kept_apart() {
        let arguments = |address: &str, namespace: &str| {
            let words = ["-address", address, "-namespace", namespace, "-id", "x", "delete"];
            Arguments::parse(words.map(str::to_owned)).unwrap()
        };
        let run = Path::new("/run/hull");
        let first = root(run, &arguments("/run/a.sock", "default"));
        assert!(first.starts_with("/run/hull/containerd") && first.ends_with("default"));
        assert_ne!(first, root(run, &arguments("/run/b.sock", "default")));
        assert_ne!(first, root(run, &arguments("/run/a.sock", "k8s.io")));
    }

    #[test]
    fn scope_of_systemd_is_told_from_a_path() {
        for (path, expected) in [
            ("kubepods-pod1.slice:cri-containerd:c1", true),
            ("/kubepods/pod1/c1", false),
            ("/a:b:c", false),
        ] {
            let text = format!(r#"{{"ociVersion":"1.1.0","linux":{{"cgroupsPath":"{path}"}}}}"#);
            let spec: Spec = serde_json::from_str(&text).unwrap();
            assert_eq!(names_a_scope(&spec), expected, "{path}");
        }
    }

    #[test]
    fn what_a_guest_says_of_an_exit_stays_an_exit_status() {
        let response = |outcome| WaitProcessResponse {
            outcome: Some(outcome),
            ..WaitProcessResponse::default()
        };
        assert_eq!(exec_exit(&response(Outcome::ExitCode(7))).status, 7);
        assert_eq!(exec_exit(&response(Outcome::Signal(9))).status, KILLED);
        assert_eq!(exec_exit(&response(Outcome::Signal(u32::MAX))).status, 255);
    }
}
