//! Driving an OCI runtime as an engine does: `hull-oci`, and runc beside it to compare with.
//!
//! Each [`Runtime`] has a state directory of its own, each [`OciBundle`] a root filesystem unpacked from a test image. A
//! container's output goes to a file, as a pipe would be waited for until the container ends.

use std::fs::{self, File};
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::Duration;

use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::hull::{Outcome, available, eventually, finish};

/// Nothing a test waits for takes this long; what does has hung.
const PATIENCE: Duration = Duration::from_secs(120);

/// An OCI runtime with a state of its own.
#[derive(Debug)]
pub struct Runtime {
    program: PathBuf,
    dir: TempDir,
}

/// `hull-oci`, or `None` where the test must be skipped.
///
/// # Panics
/// It isn't built although everything else is.
pub fn hull_oci() -> Option<Runtime> {
    if !available() {
        return None;
    }
    // What a command leaves behind is this process's child, as it is an engine's.
    nix::sys::prctl::set_child_subreaper(true).expect("any process may");
    let program = std::env::var_os("HULL_OCI").expect("`cargo xtask test` builds it and sets HULL_OCI");
    Some(Runtime::of(program))
}

impl Runtime {
    /// Another runtime.
    ///
    /// # Panics
    /// No temporary folder can be made.
    pub fn of(program: impl Into<PathBuf>) -> Self {
        Self {
            program: program.into(),
            dir: tempfile::tempdir().expect("a temporary folder"),
        }
    }

    /// Everything of this runtime is below it.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Its state.
    pub fn root(&self) -> PathBuf {
        self.dir.path().join("state")
    }

    /// A command, not started yet.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command
            .arg("--root")
            .arg(self.root())
            .args(arguments)
            // What is this runtime's is told by it.
            .env("HULL_TEST_WORLD", self.dir.path())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    /// A command that leaves nothing behind which holds its output.
    ///
    /// # Panics
    /// It can't be started, or hangs.
    pub fn run(&self, arguments: &[&str]) -> Outcome {
        finish(self.command(arguments).spawn().expect("the runtime starts"))
    }

    /// Runs a command that must succeed; what it printed.
    ///
    /// # Panics
    /// It fails.
    pub fn ok(&self, arguments: &[&str]) -> String {
        let outcome = self.run(arguments);
        assert_eq!(outcome.code(), 0, "{arguments:?}: {outcome:?}");
        outcome.text()
    }

    /// A file for a container's output, and one for what the command says.
    pub fn output_path(&self, id: &str) -> PathBuf {
        self.dir.path().join(format!("{id}.out"))
    }

    /// What a container has printed.
    pub fn output(&self, id: &str) -> String {
        fs::read_to_string(self.output_path(id)).unwrap_or_default()
    }

    /// Starts a command whose container keeps its output: it goes to a file.
    ///
    /// # Panics
    /// It can't be started.
    pub fn with_output(&self, id: &str, arguments: &[&str]) -> Outcome {
        let out = File::create(self.output_path(id)).expect("a file for the output");
        let said = self.dir.path().join(format!("{id}.said"));
        let mut command = self.command(&[]);
        command.arg("--log").arg(&said).args(arguments);
        let status = command
            .stdout(out.try_clone().expect("another descriptor"))
            .stderr(out)
            .status()
            .expect("the runtime starts");
        Outcome {
            stdout: Vec::new(),
            stderr: fs::read_to_string(said).unwrap_or_default(),
            status,
        }
    }

    /// Creates a container.
    ///
    /// # Panics
    /// It can't be created.
    pub fn create(&self, bundle: &OciBundle, id: &str) -> i32 {
        let pid_file = self.dir.path().join(format!("{id}.pid"));
        let arguments = [
            "create",
            "--bundle",
            bundle.text(),
            "--pid-file",
            pid_file.to_str().expect("text"),
            id,
        ];
        let outcome = self.with_output(id, &arguments);
        assert!(outcome.status.success(), "{outcome:?} {}", self.output(id));
        let text = fs::read_to_string(&pid_file).expect("a pid file");
        text.parse().expect("a number")
    }

    /// Creates a container and starts it.
    ///
    /// # Panics
    /// It can't be.
    pub fn start_new(&self, bundle: &OciBundle, id: &str) -> i32 {
        let pid = self.create(bundle, id);
        self.ok(&["start", id]);
        pid
    }

    /// The state of a container.
    ///
    /// # Panics
    /// There is none.
    pub fn state(&self, id: &str) -> Value {
        serde_json::from_str(&self.ok(&["state", id])).expect("JSON")
    }

    /// The status of a container, or what `state` says is wrong.
    pub fn status(&self, id: &str) -> String {
        let outcome = self.run(&["state", id]);
        match serde_json::from_slice::<Value>(&outcome.stdout) {
            Ok(state) => state["status"].as_str().unwrap_or_default().to_owned(),
            Err(_) => message(&outcome),
        }
    }

    /// Waits until a container has printed a text.
    ///
    /// # Panics
    /// It doesn't.
    pub fn expect_output(&self, id: &str, text: &str) {
        let printed = eventually(PATIENCE, || self.output(id).contains(text));
        assert!(printed, "{id} has not printed {text:?}: {:?}", self.output(id));
    }

    /// Waits until a container has stopped.
    ///
    /// # Panics
    /// It doesn't.
    pub fn expect_stopped(&self, id: &str) {
        let stopped = eventually(PATIENCE, || self.status(id) == "stopped");
        assert!(stopped, "{id} is {}", self.status(id));
    }

    /// What is left of its containers: folders of the state, processes, control groups. Empty is good.
    pub fn leftovers(&self) -> Vec<String> {
        let mut found = Vec::new();
        for entry in fs::read_dir(self.root()).into_iter().flatten().flatten() {
            let path = entry.path();
            let count = fs::read_dir(&path).map_or(0, Iterator::count);
            if entry.file_name() != ".jail-uids" || count != 0 {
                found.push(format!("state {} of {count} entries", path.display()));
            }
        }
        let marker = self.dir.path().display().to_string();
        for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
            let Some(pid) = entry
                .file_name()
                .to_str()
                .and_then(|name| name.parse::<i32>().ok())
            else {
                continue;
            };
            let environ = fs::read(entry.path().join("environ")).unwrap_or_default();
            if pid != nix::unistd::getpid().as_raw()
                && String::from_utf8_lossy(&environ).contains(&format!("HULL_TEST_WORLD={marker}"))
            {
                found.push(format!("process {pid}"));
            }
        }
        found
    }
}

/// A test that fails leaves no container behind.
impl Drop for Runtime {
    fn drop(&mut self) {
        let listed = self.run(&["list", "--quiet"]).text();
        for id in listed.split_whitespace() {
            drop(self.run(&["delete", "--force", id]));
        }
    }
}

/// The message of a command that failed, as people and programs look for it.
pub fn message(outcome: &Outcome) -> String {
    let last = outcome.stderr.lines().last().unwrap_or_default();
    if let Ok(line) = serde_json::from_str::<Value>(last) {
        return line["msg"].as_str().unwrap_or_default().to_owned();
    }
    // time="…" level=error msg="…"
    let quoted = last.split_once(" msg=").map_or(last, |(_, message)| message);
    let text = serde_json::from_str::<String>(quoted).unwrap_or_else(|_| quoted.to_owned());
    text.trim().to_owned()
}

/// Waits for a process that was left to this one.
///
/// # Panics
/// It isn't.
pub fn reap(pid: i32) -> ExitStatus {
    match waitpid(Pid::from_raw(pid), None).expect("a child") {
        WaitStatus::Exited(_, code) => ExitStatus::from_raw(code << 8),
        WaitStatus::Signaled(_, signal, _) => ExitStatus::from_raw(signal as i32),
        other => panic!("{other:?}"),
    }
}

/// An image as a bundle.
#[derive(Debug)]
pub struct OciBundle {
    _dir: TempDir,
    path: PathBuf,
}

impl OciBundle {
    /// Unpacks a test image.
    ///
    /// # Panics
    /// It can't be unpacked; `cargo xtask setup` installs what that takes.
    pub fn of(image: &str) -> Self {
        let images = PathBuf::from(std::env::var_os("HULL_TEST_IMAGES").expect("checked by available()"));
        let dir = tempfile::tempdir().expect("a temporary folder");
        let path = dir.path().join("bundle");
        let layout = format!("{}:latest", images.join(image).display());
        let mut command = Command::new("umoci");
        command.args(["unpack", "--image", &layout]).arg(&path);
        let status = command.stdout(Stdio::null()).stderr(Stdio::null()).status();
        assert!(
            status.is_ok_and(|status| status.success()),
            "umoci can't unpack {layout}"
        );
        // Control groups are the whole host's: another runtime's container of the same id would be in the same one.
        let unique = dir.path().file_name().unwrap_or_default().to_string_lossy();
        let group = format!("/hull-tests-{}", unique.replace('.', ""));
        let bundle = Self { _dir: dir, path };
        bundle.configure(|config| {
            config["process"]["terminal"] = json!(false);
            config["root"]["readonly"] = json!(false);
            // A limit that the test's own process may not exceed.
            config["process"]["rlimits"] = json!([]);
            config["linux"]["cgroupsPath"] = json!(group);
        });
        bundle
    }

    /// The same whose container runs a shell script.
    ///
    /// # Panics
    /// As [`OciBundle::of`].
    pub fn script(script: &str) -> Self {
        let bundle = Self::of("busybox");
        bundle.configure(|config| config["process"]["args"] = json!(["/bin/sh", "-c", script]));
        bundle
    }

    /// The same for several containers at once, whose control groups have their ids, which must be unique.
    #[must_use]
    pub fn for_several(self) -> Self {
        self.configure(|config| {
            drop(
                config["linux"]
                    .as_object_mut()
                    .map(|linux| linux.remove("cgroupsPath")),
            )
        });
        self
    }

    /// Its folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its folder, for a command line.
    pub fn text(&self) -> &str {
        self.path.to_str().expect("text")
    }

    /// Changes its configuration.
    ///
    /// # Panics
    /// It has none.
    pub fn configure(&self, change: impl FnOnce(&mut Value)) {
        let path = self.path.join("config.json");
        let text = fs::read(&path).expect("umoci writes a configuration");
        let mut config: Value = serde_json::from_slice(&text).expect("umoci writes JSON");
        change(&mut config);
        fs::write(&path, config.to_string()).expect("the bundle is writable");
    }
}
