//! Podman with everything of its own: storage, state, networks, mount and network namespaces; and the runtime it is given.
//!
//! What podman reads from the machine is given to it here instead: its configuration allows for hosts where the limits of
//! processes can't be raised.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use tempfile::TempDir;

use crate::enclosure::{Enclosure, EngineRuntime, archive_of, runtime_for_engines};
use crate::hull::{Outcome, finish};

/// One podman, and the containers it made.
#[derive(Debug)]
pub struct Podman {
    // Dropped first: what it runs keeps the folder busy.
    enclosure: Enclosure,
    dir: TempDir,
    runtime: PathBuf,
}

impl Podman {
    /// With test images, or `None` where the test must be skipped.
    ///
    /// # Panics
    /// podman or an image is missing.
    pub fn with(runtime: EngineRuntime, images: &[&str]) -> Option<Self> {
        let program = runtime.program()?;
        let dir = tempfile::tempdir().expect("a temporary folder");
        let runtime = runtime_for_engines(&program, dir.path());
        write_configuration(dir.path());
        let podman = Self {
            enclosure: Enclosure::new(),
            dir,
            runtime,
        };
        for image in images {
            let archive = archive_of(image, &format!("localhost/{image}:latest"), podman.dir());
            podman.ok(&["load", "--quiet", "--input", &archive.display().to_string()]);
        }
        Some(podman)
    }

    /// Everything of this podman is below it, and what a test likes to put there.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// `podman ARGUMENTS`, not started yet.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let of = |name: &str| self.dir.path().join(name);
        let mut command = self.enclosure.command("podman");
        command
            .env("CONTAINERS_CONF", of("containers.conf"))
            .env("CONTAINERS_REGISTRIES_CONF", of("registries.conf"))
            .env("CONTAINERS_STORAGE_CONF", of("storage.conf"))
            .env("HOME", self.dir.path())
            .env("XDG_RUNTIME_DIR", of("xdg"))
            .env("TMPDIR", of("tmp"))
            .arg("--root")
            .arg(of("root"))
            .arg("--runroot")
            .arg(of("runroot"))
            .arg("--tmpdir")
            .arg(of("libpod"))
            .arg("--network-config-dir")
            .arg(of("networks"))
            .arg("--runtime")
            .arg(&self.runtime)
            .args(arguments);
        command
    }

    /// A program of the machine in podman's namespaces.
    pub fn beside(&self, program: &str) -> Command {
        self.enclosure.command(program)
    }

    /// Run to the end.
    pub fn run(&self, arguments: &[&str]) -> Outcome {
        finish(
            self.command(arguments)
                .spawn()
                .expect("`cargo xtask setup` installs podman"),
        )
    }

    /// Run to the end with bytes on standard input.
    pub fn run_with_input(&self, arguments: &[&str], input: &str) -> Outcome {
        let file = self.dir.path().join("input");
        fs::write(&file, input).expect("the folder is ours");
        let mut command = self.command(arguments);
        command.stdin(Stdio::from(fs::File::open(file).expect("just written")));
        finish(command.spawn().expect("`cargo xtask setup` installs podman"))
    }

    /// The standard output of what has to succeed.
    ///
    /// # Panics
    /// It doesn't.
    pub fn ok(&self, arguments: &[&str]) -> String {
        let outcome = self.run(arguments);
        assert_eq!(outcome.code(), 0, "podman {}: {outcome:?}", arguments.join(" "));
        outcome.text()
    }
}

impl Drop for Podman {
    fn drop(&mut self) {
        for arguments in [
            &["pod", "rm", "--all", "--force", "--time", "0"][..],
            &["rm", "--all", "--force", "--time", "0"],
        ] {
            let outcome = self.run(arguments);
            if !outcome.status.success() && !std::thread::panicking() {
                eprintln!("note: podman {}: {outcome:?}", arguments.join(" "));
            }
        }
    }
}

fn write_configuration(dir: &Path) {
    let put = |name: &str, text: &str| fs::write(dir.join(name), text).expect("the folder is ours");
    for name in ["tmp", "xdg", ".config", ".config/containers"] {
        fs::create_dir(dir.join(name)).expect("the folder is ours");
    }
    put(
        "containers.conf",
        "[containers]\n\
         default_ulimits = [\"nofile=20000:20000\", \"nproc=32768:32768\"]\n\
         [engine]\n\
         cgroup_manager = \"cgroupfs\"\n\
         events_logger = \"file\"\n\
         [network]\n\
         network_backend = \"netavark\"\n",
    );
    put("registries.conf", "unqualified-search-registries = []\n");
    put(
        "storage.conf",
        &format!(
            "[storage]\ndriver = \"overlay\"\ngraphroot = \"{0}/root\"\nrunroot = \"{0}/runroot\"\n",
            dir.display()
        ),
    );
    put(
        ".config/containers/policy.json",
        r#"{"default": [{"type": "insecureAcceptAnything"}]}"#,
    );
}
