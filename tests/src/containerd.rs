//! A containerd of the test's own: its root, state, sockets and network namespace, driven by `ctr` as a person does.
//!
//! Nothing is shared with a containerd that may run on the machine. The daemon's network namespace is its own, so no bridge or
//! address of a test shows on the host; containers of the daemon are in a containerd namespace that is named after the world, and
//! so are their control groups. Everything a world starts carries its folder in the command line or the environment, which is how
//! leftovers are found and, in the end, ended by their process ids.

mod suite;

use std::fmt::Write as _;
use std::fs;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use nix::sys::signal::Signal;
use sha2::{Digest, Sha256};
use tempfile::TempDir;

use crate::hull::{self, Outcome, eventually, finish_within, signal, wait_for};

pub use suite::Programs;

/// Our shim, by the name containerd looks it up on its PATH.
pub const HULL: &str = "io.containerd.hull.v2";
/// The distribution's shim for runc.
pub const RUNC: &str = "io.containerd.runc.v2";

/// Nothing `ctr` is asked takes this long, on a busy machine neither.
const CTR_TIMEOUT: Duration = Duration::from_secs(180);
/// Until the daemon listens.
const START_TIMEOUT: Duration = Duration::from_secs(120);
/// Where shims have their sockets, by the field's convention.
const SHIM_SOCKETS: &str = "/run/containerd/s";

/// What a world's daemon is configured with, beside its folders.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// The CRI plugin's configuration; off without.
    pub cri: Option<String>,
    /// A folder of that configuration, to be removed with the world.
    pub folder: Option<PathBuf>,
    /// Images are unpacked for this snapshotter, if not for the daemon's own choice.
    pub snapshotter: Option<&'static str>,
}

/// One daemon and everything it keeps.
#[derive(Debug)]
pub struct Containerd {
    root: TempDir,
    programs: Programs,
    options: Options,
    daemon: Option<Child>,
}

/// Whether containers of our shim can be run here; says why where not.
///
/// # Panics
/// As [`hull::available`].
pub fn available() -> bool {
    if !hull::available() {
        return false;
    }
    if std::env::var_os("HULL_SHIM").is_none() {
        eprintln!("skipped: HULL_SHIM is not set; `cargo xtask test` builds everything and sets it");
        return false;
    }
    true
}

impl Containerd {
    /// The distribution's own, with the named test images imported; `None` where the test must be skipped.
    pub fn with_images(images: &[&str]) -> Option<Self> {
        let world = Self::start(Programs::installed(), Options::default())?;
        for image in images {
            world.import(image);
        }
        Some(world)
    }

    /// A daemon of these programs; `None` where the test must be skipped.
    pub fn start(programs: Programs, options: Options) -> Option<Self> {
        if !available() {
            return None;
        }
        let mut world = Self {
            root: tempfile::Builder::new()
                .prefix("hull-containerd-")
                .tempdir()
                .expect("a temporary folder"),
            programs,
            options,
            daemon: None,
        };
        fs::create_dir(world.path("tmp")).expect("a folder of our own");
        world.launch();
        Some(world)
    }

    /// The folder everything of this world lies below.
    pub fn root_dir(&self) -> &Path {
        self.root.path()
    }

    /// A path in this world's folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    /// The daemon's socket.
    pub fn address(&self) -> PathBuf {
        self.path("containerd.sock")
    }

    /// What nothing else on the machine is called; the control groups of this world's containers lie below it.
    pub fn name(&self) -> String {
        let name = self.root.path().file_name().unwrap_or_default().to_string_lossy();
        name.replace('.', "")
    }

    /// The containerd namespace of this world's containers.
    pub fn namespace(&self) -> String {
        if self.options.cri.is_some() {
            return "k8s.io".to_owned();
        }
        self.name()
    }

    /// The daemon's process.
    pub fn pid(&self) -> i32 {
        let id = self.daemon.as_ref().map_or(0, Child::id);
        i32::try_from(id).expect("a process id")
    }

    fn configuration(&self) -> String {
        let disabled = if self.options.cri.is_some() {
            ""
        } else {
            "\"io.containerd.grpc.v1.cri\", "
        };
        let mut text = format!(
            "version = 2\nroot = \"{root}/root\"\nstate = \"{root}/state\"\n\
             disabled_plugins = [{disabled}\"io.containerd.snapshotter.v1.btrfs\", \
             \"io.containerd.snapshotter.v1.zfs\", \"io.containerd.snapshotter.v1.devmapper\", \
             \"io.containerd.snapshotter.v1.aufs\", \"io.containerd.nri.v1.nri\"]\n\
             [grpc]\naddress = \"{root}/containerd.sock\"\n[ttrpc]\naddress = \"{root}/containerd.sock.ttrpc\"\n\
             [debug]\nlevel = \"debug\"\n",
            root = self.root.path().display()
        );
        if let Some(cri) = &self.options.cri {
            text.push_str(cri);
        }
        text
    }

    /// Start the daemon and wait until it answers.
    fn launch(&mut self) {
        let configuration = self.path("config.toml");
        fs::write(&configuration, self.configuration()).expect("the folder is writable");
        let log = fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.path("daemon.log"))
            .expect("the folder is writable");
        let shim = PathBuf::from(std::env::var_os("HULL_SHIM").expect("checked by available()"));
        let folders = [
            shim.parent().unwrap_or(Path::new("/")).to_owned(),
            self.programs.folder.clone(),
        ];
        let path = std::env::var("PATH").unwrap_or_default();
        let path = std::env::join_paths(folders.into_iter().chain(std::env::split_paths(&path)))
            .expect("no colon in these paths");
        let script = "ip link set lo up; exec \"$0\" \"$@\"";
        let mut command = Command::new("unshare");
        command
            .args(["--net", "--", "sh", "-c", script])
            .arg(self.programs.folder.join("containerd"))
            .arg("--config")
            .arg(configuration)
            .env("PATH", path)
            .env("TMPDIR", self.path("tmp"))
            .env("HULL_RUNTIME_DIR", self.path("hull"))
            .env("HULL_ROOT", self.path("store"))
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a copy of a descriptor"))
            .stderr(log);
        self.daemon = Some(command.spawn().expect("unshare is installed"));
        let listens = eventually(START_TIMEOUT, || {
            let ended = self
                .daemon
                .as_mut()
                .is_some_and(|daemon| daemon.try_wait().expect("the daemon is our child").is_some());
            assert!(!ended, "containerd ended: {}", self.log());
            UnixStream::connect(self.address()).is_ok()
        });
        assert!(listens, "containerd does not listen: {}", self.log());
        // The socket is there before the plugins are.
        let answers = eventually(START_TIMEOUT, || self.try_ctr(&["version"]).status.success());
        assert!(answers, "containerd does not answer: {}", self.log());
    }

    /// What the daemon said, its last lines.
    pub fn log(&self) -> String {
        let text = fs::read(self.path("daemon.log")).unwrap_or_default();
        let text = String::from_utf8_lossy(&text).into_owned();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(40)..].join("\n")
    }

    /// End the daemon, with a signal, and wait until it is gone.
    pub fn stop_daemon(&mut self, with: Signal) {
        let Some(mut daemon) = self.daemon.take() else {
            return;
        };
        signal(i32::try_from(daemon.id()).expect("a process id"), with);
        if wait_for(&mut daemon, Duration::from_secs(60)).is_none() {
            daemon.kill().ok();
            daemon.wait().ok();
        }
    }

    /// End the daemon and start it again on what it left.
    pub fn restart(&mut self, with: Signal) {
        self.stop_daemon(with);
        self.launch();
    }

    /// Import a test image as `docker.io/library/NAME:latest`.
    pub fn import(&self, image: &str) {
        let images = PathBuf::from(std::env::var_os("HULL_TEST_IMAGES").expect("checked by available()"));
        self.import_layout(&images.join(image), image);
    }

    /// Import the image in an OCI layout, as `docker.io/library/NAME:latest`.
    pub fn import_layout(&self, layout: &Path, image: &str) {
        let archive = self.path(&format!("tmp/{image}.tar"));
        let packed = Command::new("tar")
            .arg("-C")
            .arg(layout)
            .arg("-cf")
            .arg(&archive)
            .arg(".")
            .status();
        assert!(
            packed.is_ok_and(|status| status.success()),
            "tar can't pack the image {image}"
        );
        let name = format!("docker.io/library/{image}");
        let archive_name = archive.display().to_string();
        let mut arguments = vec!["images", "import", "--base-name", &name];
        if self.programs.imports_locally {
            arguments.push("--local");
        }
        if let Some(snapshotter) = self.options.snapshotter {
            arguments.extend(["--snapshotter", snapshotter]);
        }
        arguments.push(&archive_name);
        self.ctr(&arguments);
        fs::remove_file(archive).expect("written just now");
    }

    /// `ctr ARGUMENTS`, not started yet.
    pub fn ctr_command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(self.programs.folder.join("ctr"));
        command
            .arg("--address")
            .arg(self.address())
            .arg("--namespace")
            .arg(self.namespace())
            .args(arguments)
            // Its streams' FIFOs.
            .env("TMPDIR", self.path("tmp"))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    /// Run `ctr` to its end, whatever that is.
    pub fn try_ctr(&self, arguments: &[&str]) -> Outcome {
        let child = self.ctr_command(arguments).spawn().expect("ctr is installed");
        finish_within(child, CTR_TIMEOUT)
    }

    /// Run `ctr` to its end, which is to be a good one.
    ///
    /// # Panics
    /// It fails; with the daemon's last words.
    pub fn ctr(&self, arguments: &[&str]) -> String {
        let outcome = self.try_ctr(arguments);
        assert!(
            outcome.status.success(),
            "ctr {arguments:?}: {outcome:?}\n{}",
            self.log()
        );
        outcome.text()
    }

    /// `ctr run OPTIONS docker.io/library/IMAGE:latest ID COMMAND`.
    pub fn run(&self, runtime: &str, options: &[&str], image: &str, id: &str, command: &[&str]) -> Outcome {
        let reference = reference(image);
        let mut arguments = vec!["run", "--runtime", runtime];
        arguments.extend(options);
        arguments.extend([reference.as_str(), id]);
        arguments.extend(command);
        self.try_ctr(&arguments)
    }

    /// Start a container that is left to itself.
    ///
    /// # Panics
    /// It can't be started.
    pub fn run_detached(&self, runtime: &str, image: &str, id: &str, command: &[&str]) {
        let outcome = self.run(runtime, &["--detach"], image, id, command);
        assert!(outcome.status.success(), "{outcome:?}\n{}", self.log());
    }

    /// `ctr tasks exec` of a command, with the exec's name.
    pub fn exec(&self, id: &str, name: &str, command: &[&str]) -> Outcome {
        let mut arguments = vec!["tasks", "exec", "--exec-id", name, id];
        arguments.extend(command);
        self.try_ctr(&arguments)
    }

    /// What `ctr tasks ls` says of a task: its pid and status.
    pub fn task(&self, id: &str) -> Option<(i32, String)> {
        let text = self.ctr(&["tasks", "ls"]);
        text.lines().find_map(|line| {
            let mut words = line.split_whitespace();
            (words.next() == Some(id)).then_some(())?;
            Some((words.next()?.parse().ok()?, words.next()?.to_owned()))
        })
    }

    /// Delete a task that has stopped; its exit code, which `ctr` says in words.
    ///
    /// # Panics
    /// It can't be deleted.
    pub fn delete_task(&self, id: &str) -> i32 {
        let outcome = self.try_ctr(&["tasks", "delete", id]);
        let words = outcome.stderr.split_once("exit code ").map(|(_, rest)| rest);
        let code = words.and_then(|rest| {
            let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
            digits.parse().ok()
        });
        assert!(
            outcome.status.success() || code.is_some(),
            "{outcome:?}\n{}",
            self.log()
        );
        code.unwrap_or(0)
    }

    /// Kill a task, wait for its end, and remove it and its container.
    pub fn remove(&self, id: &str) {
        self.try_ctr(&["tasks", "kill", "--all", "--signal", "SIGKILL", id]);
        let stopped = eventually(Duration::from_secs(60), || {
            self.task(id).is_none_or(|(_, status)| status == "STOPPED")
        });
        assert!(stopped, "{id} does not stop: {}", self.log());
        self.try_ctr(&["tasks", "delete", id]);
        self.ctr(&["containers", "delete", id]);
    }

    /// The address of a task's shim, as containerd derives it for tasks that share none.
    pub fn shim_socket(&self, id: &str) -> PathBuf {
        let name = self.address().join(self.namespace()).join(id);
        let mut hexadecimal = String::new();
        for byte in Sha256::digest(name.display().to_string()) {
            write!(hexadecimal, "{byte:02x}").expect("a string takes what is written");
        }
        Path::new(SHIM_SOCKETS).join(hexadecimal)
    }

    /// Processes of this world other than its daemon and what the test itself holds.
    pub fn processes(&self) -> Vec<(i32, String)> {
        let marker = self.root.path().display().to_string();
        let own = [self.pid(), i32::try_from(std::process::id()).unwrap_or(-1)];
        hull::processes_with(&marker)
            .into_iter()
            .filter(|(pid, _)| !own.contains(pid))
            .collect()
    }

    /// The processes of this world whose command line names a program so.
    pub fn processes_of(&self, program: &str) -> Vec<i32> {
        self.processes()
            .into_iter()
            .filter(|(_, line)| {
                line.split_whitespace()
                    .next()
                    .is_some_and(|word| word.ends_with(program))
            })
            .map(|(pid, _)| pid)
            .collect()
    }

    /// What is there although no task is; the ids are those the world's containers had.
    pub fn leftovers(&self, ids: &[&str]) -> Vec<String> {
        let mut found: Vec<String> = self
            .processes()
            .into_iter()
            .map(|(pid, line)| format!("process {pid}: {line}"))
            .collect();
        let marker = self.root.path().display().to_string();
        let mut mounts = vec![PathBuf::from("/proc/self/mountinfo")];
        if self.daemon.is_some() {
            mounts.push(PathBuf::from(format!("/proc/{}/mountinfo", self.pid())));
        }
        for table in mounts {
            let text = fs::read_to_string(table).unwrap_or_default();
            let ours = text
                .lines()
                .filter(|line| line.contains(&marker) && !is_containerds(line));
            found.extend(ours.map(|line| format!("mount {line}")));
        }
        for task_folder in [
            "state/io.containerd.runtime.v2.task",
            "root/io.containerd.runtime.v2.task",
        ] {
            let folder = self.path(task_folder).join(self.namespace());
            for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
                found.push(format!("bundle {}", entry.path().display()));
            }
        }
        hull::files_below(&self.path("hull"), &mut found);
        for id in ids {
            let socket = self.shim_socket(id);
            if socket.exists() {
                found.push(format!("socket {}", socket.display()));
            }
            found.extend(self.control_groups(id));
        }
        found
    }

    fn control_groups(&self, id: &str) -> Vec<String> {
        let name = self.name();
        fs::read_dir("/sys/fs/cgroup")
            .into_iter()
            .flatten()
            .flatten()
            .map(|hierarchy| hierarchy.path().join(&name).join(id))
            .chain(std::iter::once(Path::new("/sys/fs/cgroup").join(&name).join(id)))
            .filter(|path| path.exists())
            .map(|path| format!("control group {}", path.display()))
            .collect()
    }

    /// Wait until nothing is left; what remains after a while is returned.
    pub fn settle(&self, ids: &[&str]) -> Vec<String> {
        let mut left = Vec::new();
        eventually(Duration::from_secs(10), || {
            left = self.leftovers(ids);
            left.is_empty()
        });
        left
    }
}

/// The name a test image has in containerd.
pub fn reference(image: &str) -> String {
    format!("docker.io/library/{image}:latest")
}

/// Mounts the daemon itself makes and keeps: a pod's shared memory until the pod goes, and layers of a snapshotter.
fn is_containerds(line: &str) -> bool {
    (line.contains("/sandboxes/") && line.contains("/shm "))
        || line.contains("/io.containerd.snapshotter.v1.")
            && !line.contains("/io.containerd.runtime.v2.task/")
}

/// A world that ends leaves nothing on the machine, whatever its test did.
impl Drop for Containerd {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the daemon's last words:\n{}", self.log());
        }
        self.stop_daemon(Signal::SIGKILL);
        let gone = eventually(Duration::from_secs(20), || {
            let left = self.processes();
            for (pid, _) in &left {
                signal(*pid, Signal::SIGKILL);
            }
            left.is_empty()
        });
        if !gone {
            eprintln!("these can't be ended: {:?}", self.processes());
        }
        unmount_below(self.root.path());
        remove_control_groups(&self.name());
        if let Some(folder) = &self.options.folder {
            fs::remove_dir_all(folder).ok();
        }
    }
}

/// Take down every mount below a folder, the innermost first.
fn unmount_below(folder: &Path) {
    let marker = folder.display().to_string();
    let text = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let points = text.lines().filter_map(|line| line.split_whitespace().nth(4));
    let mut points: Vec<&str> = points.filter(|point| point.starts_with(&marker)).collect();
    points.reverse();
    for point in points {
        nix::mount::umount2(point, nix::mount::MntFlags::MNT_DETACH).ok();
    }
}

/// Remove the folders of a name directly below a hierarchy's root, which runtimes leave there.
fn remove_control_groups(name: &str) {
    for hierarchy in fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten() {
        let parent = hierarchy.path().join(name);
        for child in fs::read_dir(&parent).into_iter().flatten().flatten() {
            fs::remove_dir(child.path()).ok();
        }
        fs::remove_dir(parent).ok();
    }
}
