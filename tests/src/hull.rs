//! Driving the `hull` program as a person does, in a world of its own that is checked for leftovers.
//!
//! Each [`Hull`] has its own image store and its own run-time state, so tests run side by side and what one leaves behind is
//! found by looking only at what is its own: processes that carry its directories in their environment, files in them, mounts
//! below them.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use tempfile::TempDir;

/// Nothing a test runs takes this long, on a busy machine neither; what does has hung.
const TIMEOUT: Duration = Duration::from_secs(600);

/// How long what a test waits for may take on a machine that does ten other things. It bounds a hang and judges no speed.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// What a run printed and how it ended.
#[derive(Debug)]
pub struct Outcome {
    pub stdout: Vec<u8>,
    pub stderr: String,
    pub status: ExitStatus,
}

impl Outcome {
    /// Exit code; a death by signal panics with what was printed.
    pub fn code(&self) -> i32 {
        self.status
            .code()
            .unwrap_or_else(|| panic!("ended by a signal: {self:?}"))
    }

    /// Standard output as text, without the last line break.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout)
            .trim_end_matches('\n')
            .to_owned()
    }
}

/// One store, one state directory, and the products under test.
#[derive(Debug)]
pub struct Hull {
    program: PathBuf,
    images: PathBuf,
    root: TempDir,
}

/// A test that fails, or leaves containers on purpose, leaves no process behind.
impl Drop for Hull {
    fn drop(&mut self) {
        let Ok(listed) = self.command(&["ps", "--all", "--quiet"]).output() else {
            return;
        };
        let ids = String::from_utf8_lossy(&listed.stdout).into_owned();
        let ids: Vec<&str> = ids.split_whitespace().collect();
        if !ids.is_empty() {
            let mut arguments = vec!["rm", "--force"];
            arguments.extend(ids);
            drop(self.command(&arguments).output());
        }
    }
}

/// Whether this machine can boot a microVM and the products were built; says why where not.
///
/// # Panics
/// With `HULL_REQUIRE_KVM=1`, if it can't: the run declared KVM present, so a skip would hide a failure.
pub fn available() -> bool {
    static ANSWER: OnceLock<Option<String>> = OnceLock::new();
    let missing = ANSWER.get_or_init(|| {
        if !Path::new("/dev/kvm").exists() {
            return Some("/dev/kvm is not there".to_owned());
        }
        [
            "HULL_BIN",
            "HULL_VMM",
            "HULL_KERNEL",
            "HULL_AGENT_IMAGE",
            "HULL_TEST_IMAGES",
        ]
        .iter()
        .find(|name| std::env::var_os(name).is_none())
        .map(|name| format!("{name} is not set; `cargo xtask test` builds everything and sets it"))
    });
    if let Some(why) = missing {
        assert!(
            std::env::var_os("HULL_REQUIRE_KVM").is_none_or(|v| v != "1"),
            "a microVM is required: {why}"
        );
        eprintln!("skipped: {why}");
    }
    missing.is_none()
}

impl Hull {
    /// A fresh world with the named images imported, or `None` where the test must be skipped.
    pub fn with_images(images: &[&str]) -> Option<Self> {
        if !available() {
            return None;
        }
        let variable = |name: &str| PathBuf::from(std::env::var_os(name).expect("checked by available()"));
        let hull = Self {
            program: variable("HULL_BIN"),
            images: variable("HULL_TEST_IMAGES"),
            root: tempfile::tempdir().expect("a temporary folder"),
        };
        fs::create_dir(hull.temporary_dir()).expect("a folder of our own");
        for image in images {
            let outcome = hull.run(&["import", &hull.layout(image), image]);
            assert_eq!(outcome.code(), 0, "import of {image} failed: {outcome:?}");
        }
        Some(hull)
    }

    /// `oci:DIR:latest` of a test image.
    pub fn layout(&self, image: &str) -> String {
        format!("oci:{}:latest", self.images.join(image).display())
    }

    /// The folder everything of this world lies below.
    pub fn root_dir(&self) -> &Path {
        self.root.path()
    }

    /// Where this world keeps its run-time state.
    pub fn runtime_dir(&self) -> PathBuf {
        self.root.path().join("run")
    }

    /// Where this world keeps its images.
    pub fn store_dir(&self) -> PathBuf {
        self.root.path().join("store")
    }

    /// Where this world's programs put temporary files.
    pub fn temporary_dir(&self) -> PathBuf {
        self.root.path().join("tmp")
    }

    /// `hull ARGUMENTS`, not started yet.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command
            .args(arguments)
            .env("HULL_ROOT", self.store_dir())
            .env("HULL_RUNTIME_DIR", self.runtime_dir())
            .env("TMPDIR", self.temporary_dir())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    /// Run to the end.
    pub fn run(&self, arguments: &[&str]) -> Outcome {
        finish(self.command(arguments).spawn().expect("hull starts"))
    }

    /// Run to the end with bytes on standard input.
    pub fn run_with_input(&self, arguments: &[&str], input: Vec<u8>) -> Outcome {
        let mut child = self
            .command(arguments)
            .stdin(Stdio::piped())
            .spawn()
            .expect("hull starts");
        let mut stdin = child.stdin.take().expect("piped");
        let writer = std::thread::spawn(move || {
            use std::io::Write;
            // The reader may end before it has read everything; that is not the writer's failure.
            stdin.write_all(&input).ok();
        });
        let outcome = finish(child);
        writer.join().expect("the writer does not panic");
        outcome
    }

    /// Processes of this world other than those the test itself holds.
    pub fn processes(&self) -> Vec<(i32, String)> {
        processes_with(&self.root.path().display().to_string())
    }

    /// The VMM processes of this world.
    pub fn vmms(&self) -> Vec<i32> {
        self.processes()
            .into_iter()
            .filter(|(_, line)| line.contains("hull-vmm"))
            .map(|(pid, _)| pid)
            .collect()
    }

    /// The monitors of this world: one process a running container, which outlives the command that started it.
    pub fn monitors(&self) -> Vec<i32> {
        self.processes()
            .into_iter()
            .filter(|(_, line)| line.split_whitespace().nth(1) == Some("monitor"))
            .map(|(pid, _)| pid)
            .collect()
    }

    /// Everything that should not be there once no container runs. Empty is good.
    pub fn leftovers(&self) -> Vec<String> {
        let mut found: Vec<String> = self
            .processes()
            .into_iter()
            .map(|(pid, line)| format!("process {pid}: {line}"))
            .collect();
        let marker = self.root.path().display().to_string();
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        found.extend(
            mounts
                .lines()
                .filter(|line| line.contains(&marker))
                .map(|line| format!("mount {line}")),
        );
        files_below(&self.runtime_dir(), &mut found);
        files_below(&self.temporary_dir(), &mut found);
        found
    }

    /// Wait until nothing is left; what will not go is returned.
    pub fn settle(&self) -> Vec<String> {
        let mut left = Vec::new();
        eventually(PATIENCE, || {
            left = self.leftovers();
            left.is_empty()
        });
        left
    }
}

/// Processes, other than this one, that carry a text in their command line or environment; with their command lines.
pub fn processes_with(marker: &str) -> Vec<(i32, String)> {
    let Ok(entries) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok())
        .filter(|pid| *pid != i32::try_from(std::process::id()).unwrap_or(-1))
        .filter_map(|pid| {
            let read = |name: &str| fs::read(format!("/proc/{pid}/{name}")).unwrap_or_default();
            let environment = String::from_utf8_lossy(&read("environ")).into_owned();
            let line = String::from_utf8_lossy(&read("cmdline")).replace('\0', " ");
            // A zombie has neither; it waits for its parent, who is ours to look at.
            (environment.contains(marker) || line.contains(marker)).then_some((pid, line))
        })
        .collect()
}

/// Files and folders of sandboxes; a lock file at the top that outlives its users holds nothing.
pub fn files_below(directory: &Path, found: &mut Vec<String>) {
    let Ok(entries) = fs::read_dir(directory) else {
        return;
    };
    for entry in entries.flatten() {
        let path = entry.path();
        if path.is_file() && path.file_name().is_some_and(|name| name == "lock") {
            continue;
        }
        if path.is_dir() {
            let before = found.len();
            files_below(&path, found);
            if found.len() == before && path.parent().is_some_and(|parent| parent != directory) {
                continue;
            }
        } else {
            found.push(format!("file {}", path.display()));
        }
    }
}

/// Wait for a child that has pipes, without letting it hang the test.
pub fn finish(child: Child) -> Outcome {
    finish_within(child, TIMEOUT)
}

/// Wait for a child that has pipes; one that takes longer has hung.
///
/// # Panics
/// It has hung.
pub fn finish_within(mut child: Child, timeout: Duration) -> Outcome {
    let drain = |pipe: Option<Box<dyn Read + Send>>| {
        std::thread::spawn(move || {
            let mut bytes = Vec::new();
            if let Some(mut pipe) = pipe {
                pipe.read_to_end(&mut bytes).ok();
            }
            bytes
        })
    };
    let stdout = drain(child.stdout.take().map(|pipe| Box::new(pipe) as _));
    let stderr = drain(child.stderr.take().map(|pipe| Box::new(pipe) as _));
    let status = wait_for(&mut child, timeout);
    let status = status.unwrap_or_else(|| {
        child.kill().ok();
        child.wait().ok();
        panic!("hung for {} s", timeout.as_secs())
    });
    Outcome {
        stdout: stdout.join().expect("the reader does not panic"),
        stderr: String::from_utf8_lossy(&stderr.join().expect("the reader does not panic")).into_owned(),
        status,
    }
}

/// The exit status, or `None` when the time is over.
pub fn wait_for(child: &mut Child, timeout: Duration) -> Option<ExitStatus> {
    let begin = Instant::now();
    loop {
        if let Some(status) = child.try_wait().expect("the child is ours") {
            return Some(status);
        }
        if begin.elapsed() > timeout {
            return None;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Wait until a condition holds; `false` when the time is over.
pub fn eventually(timeout: Duration, mut condition: impl FnMut() -> bool) -> bool {
    let begin = Instant::now();
    while !condition() {
        if begin.elapsed() > timeout {
            return false;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    true
}

/// Send a signal to a process this test started.
pub fn signal(pid: i32, signal: nix::sys::signal::Signal) {
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), signal).ok();
}
