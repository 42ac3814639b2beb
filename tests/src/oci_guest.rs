//! Containers by their OCI configuration, made by the real agent in one microVM after the other way of starting one has
//! booted it: what is tested is what the configuration becomes in the guest, whoever will start it.
//!
//! The root filesystem is that of the image `busybox`, whose layer the microVM has.

use std::cell::Cell;
use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::thread;

use agent_protocol::stdio::{Stream, StreamHeader};
use agent_protocol::wait_process_response::Outcome;
use agent_protocol::{
    Connect, ConnectRequest, CreateContainer, CreateExec, CreateExecRequest, PROTOCOL_VERSION, Process,
    ProcessRef, RPC_PORT, Rootfs, STDIO_PORT, StartProcess, WaitProcess, rootfs,
};
use sandbox::agent_client::AgentClient;
use sandbox::oci_spec::{self, Policy};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::hull::Hull;

/// A microVM that takes configurations.
#[derive(Debug)]
pub struct OciGuest {
    hull: Hull,
    socket: PathBuf,
    bundle: TempDir,
    count: Cell<u32>,
}

/// What a process did.
#[derive(Debug)]
pub struct Ran {
    pub stdout: String,
    pub stderr: String,
    /// 128 + the signal where one ended it.
    pub code: u32,
}

/// A container that runs.
#[derive(Debug)]
pub struct Running {
    id: String,
    agent: AgentClient,
    spec: PathBuf,
}

/// A configuration that runs a shell script as root with docker's mounts, to be changed by a test.
pub fn shell(script: &str) -> Value {
    let mount = |destination: &str, kind: &str, options: &[&str]| json!({"destination": destination, "type": kind, "source": kind, "options": options});
    json!({
        "ociVersion": "1.2.0",
        "process": {
            "user": {"uid": 0, "gid": 0},
            "args": ["/bin/sh", "-c", script],
            "env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
            "cwd": "/",
            "capabilities": {
                "bounding": ["CAP_KILL", "CAP_CHOWN", "CAP_MKNOD"],
                "effective": ["CAP_KILL", "CAP_CHOWN", "CAP_MKNOD"],
                "permitted": ["CAP_KILL", "CAP_CHOWN", "CAP_MKNOD"]
            }
        },
        "root": {"path": "rootfs"},
        "hostname": "box",
        "mounts": [
            mount("/proc", "proc", &[]),
            mount("/dev", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
            mount("/dev/pts", "devpts", &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]),
            mount("/sys", "sysfs", &["nosuid", "noexec", "nodev", "ro"]),
            mount("/sys/fs/cgroup", "cgroup", &["nosuid", "noexec", "nodev", "relatime", "ro"]),
            mount("/dev/mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
            mount("/dev/shm", "tmpfs", &["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"])
        ],
        "linux": {
            "resources": {"devices": [{"allow": false, "access": "rwm"}]},
            "namespaces": [
                {"type": "pid"}, {"type": "network"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}, {"type": "cgroup"}
            ],
            "maskedPaths": ["/proc/kcore", "/sys/firmware"],
            "readonlyPaths": ["/proc/sys", "/proc/sysrq-trigger"]
        }
    })
}

impl OciGuest {
    /// Boots the microVM; `None` where tests of this kind are skipped.
    pub fn start() -> Option<Self> {
        let hull = Hull::with_images(&["busybox"])?;
        let sleep = ["busybox", "/bin/sleep", "100000"];
        let outcome = hull.run(
            &[
                &["run", "-d", "--rm", "--name", "carrier", "--cpus", "2"][..],
                &sleep,
            ]
            .concat(),
        );
        assert_eq!(outcome.code(), 0, "{outcome:?}");
        let socket = hull
            .runtime_dir()
            .join("sandboxes")
            .join(outcome.text())
            .join("vsock.sock");
        let bundle = tempfile::tempdir().expect("a temporary folder");
        fs::create_dir(bundle.path().join("rootfs")).expect("a folder of our own");
        Some(Self {
            hull,
            socket,
            bundle,
            count: Cell::new(0),
        })
    }

    fn connect(&self, port: u32) -> UnixStream {
        let mut stream = UnixStream::connect(&self.socket).expect("the microVM runs");
        writeln!(stream, "CONNECT {port}").expect("the microVM runs");
        // Byte by byte: what follows is somebody else's.
        let mut byte = [0];
        while byte[0] != b'\n' {
            stream.read_exact(&mut byte).expect("the microVM answers");
        }
        stream
    }

    fn agent(&self) -> AgentClient {
        let mut agent = AgentClient::new(self.connect(RPC_PORT));
        let hello = ConnectRequest {
            protocol_version: PROTOCOL_VERSION,
            ..ConnectRequest::default()
        };
        agent.call::<Connect>(&hello).expect("the agent is ours");
        agent
    }

    fn streams(&self, id: &str, exec_id: &str) -> [UnixStream; 2] {
        [Stream::Stdout, Stream::Stderr].map(|stream| {
            let header = StreamHeader {
                container_id: id.to_owned(),
                exec_id: exec_id.to_owned(),
                stream,
            };
            let mut connection = self.connect(STDIO_PORT);
            let header = header.encode().expect("ids of ours");
            connection.write_all(&header).expect("the microVM runs");
            connection
        })
    }

    /// Makes a container and starts its process, with its outputs attached.
    fn begin(&self, config: &Value) -> Result<(Running, [UnixStream; 2]), String> {
        let number = self.count.get() + 1;
        self.count.set(number);
        let id = format!("oci{number}");
        let spec = self.bundle.path().join("config.json");
        fs::write(&spec, config.to_string()).expect("a file of our own");
        let text = |error: &dyn std::fmt::Display| error.to_string();
        let loaded = oci_spec::load(self.bundle.path()).map_err(|error| text(&error))?;
        let policy = Policy::of_host();
        let mut all =
            oci_spec::translate(&loaded.spec, self.bundle.path(), &policy).map_err(|error| text(&error))?;
        let request = &mut all.request;
        request.container_id.clone_from(&id);
        request.hook_state = json!({"ociVersion": "1.2.0", "id": id, "status": "created"})
            .to_string()
            .into_bytes();
        request.rootfs = Some(Rootfs {
            layer_serials: vec!["layer0".into()],
            upper: Some(rootfs::Upper::TmpfsBytes(16 << 20)),
            read_only: request.rootfs.read_only,
            ..Rootfs::default()
        })
        .into();
        outputs_only(request.process.mut_or_insert_default());
        let mut agent = self.agent();
        let created = agent.call::<CreateContainer>(request);
        created.map_err(|error| text(&error))?;
        let streams = self.streams(&id, "");
        let started = agent.call::<StartProcess>(&reference(&id, ""));
        started.map_err(|error| text(&error))?;
        // Each container keeps its configuration, for execs.
        let kept = self.bundle.path().join(&id);
        fs::create_dir(&kept).expect("a folder of our own");
        fs::write(kept.join("config.json"), config.to_string()).expect("a file of our own");
        let running = Running {
            id,
            agent,
            spec: kept,
        };
        Ok((running, streams))
    }

    /// Runs a configuration's process to its end; or the error's text.
    pub fn run(&self, config: &Value) -> Result<Ran, String> {
        let (mut running, streams) = self.begin(config)?;
        Ok(finish(&mut running.agent, &reference(&running.id, ""), streams))
    }

    /// What a configuration's process prints; it succeeds.
    pub fn says(&self, config: &Value) -> String {
        let ran = self.run(config).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(ran.code, 0, "{ran:?}");
        ran.stdout.trim_end().to_owned()
    }

    /// Starts a configuration's process.
    pub fn begin_running(&self, config: &Value) -> Running {
        self.begin(config).unwrap_or_else(|error| panic!("{error}")).0
    }

    /// Executes a process in a running container.
    pub fn exec(&self, container: &mut Running, process: &Value) -> Result<Ran, String> {
        let number = self.count.get() + 1;
        self.count.set(number);
        let exec_id = format!("exec{number}");
        let path = self.bundle.path().join("process.json");
        fs::write(&path, process.to_string()).expect("a file of our own");
        let text = |error: &dyn std::fmt::Display| error.to_string();
        let loaded = oci_spec::load_process(&path).map_err(|error| text(&error))?;
        let spec = oci_spec::load(&container.spec)
            .map_err(|error| text(&error))?
            .spec;
        let mut process =
            oci_spec::translate_process(&loaded.process, &spec).map_err(|error| text(&error))?;
        outputs_only(&mut process);
        let request = CreateExecRequest {
            container_id: container.id.clone(),
            exec_id: exec_id.clone(),
            process: Some(process).into(),
            ..CreateExecRequest::default()
        };
        let created = container.agent.call::<CreateExec>(&request);
        created.map_err(|error| text(&error))?;
        let streams = self.streams(&container.id, &exec_id);
        let process = reference(&container.id, &exec_id);
        let started = container.agent.call::<StartProcess>(&process);
        started.map_err(|error| text(&error))?;
        Ok(finish(&mut container.agent, &process, streams))
    }

    /// Ends the microVM; nothing is left.
    pub fn end(self) {
        assert_eq!(self.hull.run(&["rm", "-f", "carrier"]).code(), 0);
        assert_eq!(self.hull.settle(), Vec::<String>::new());
    }
}

fn outputs_only(process: &mut Process) {
    process.attach_stdin = false;
    process.attach_stdout = true;
    process.attach_stderr = true;
}

fn reference(container_id: &str, exec_id: &str) -> ProcessRef {
    ProcessRef {
        container_id: container_id.to_owned(),
        exec_id: exec_id.to_owned(),
        ..ProcessRef::default()
    }
}

fn finish(agent: &mut AgentClient, process: &ProcessRef, streams: [UnixStream; 2]) -> Ran {
    let [stdout, stderr] = streams.map(|mut stream| {
        thread::spawn(move || {
            let mut text = String::new();
            stream.read_to_string(&mut text).expect("text from the guest");
            text
        })
    });
    let pending = agent.send::<WaitProcess>(process).expect("the agent is ours");
    let exit = agent.wait(&pending, None).expect("the agent is ours");
    let code = match exit.outcome {
        Some(Outcome::ExitCode(code)) => code,
        Some(Outcome::Signal(signal)) => 128 + signal,
        other => panic!("no outcome: {other:?}"),
    };
    let text = |reader: thread::JoinHandle<String>| reader.join().expect("the reader ends");
    Ran {
        stdout: text(stdout),
        stderr: text(stderr),
        code,
    }
}
