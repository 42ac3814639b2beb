//! A docker daemon with everything of its own: data, state, socket, bridge, mount and network namespaces; and the runtime its
//! containers are given.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use nix::sys::signal::Signal;
use tempfile::TempDir;

use crate::enclosure::{Enclosure, EngineRuntime, archive_of, runtime_for_engines};
use crate::hull::{Outcome, PATIENCE, eventually, finish, signal, wait_for};

/// The distribution's client and daemon; other versions may be first in PATH.
const CLIENT: &str = "/usr/bin/docker";
const DAEMON: &str = "/usr/sbin/dockerd";

/// One daemon, and the containers it made.
#[derive(Debug)]
pub struct Docker {
    daemon: Child,
    // Dropped before the folder: what it runs keeps that busy.
    enclosure: Enclosure,
    dir: TempDir,
}

impl Docker {
    /// With test images, or `None` where the test must be skipped.
    ///
    /// # Panics
    /// The daemon does not start, or an image is missing.
    pub fn with(runtime: EngineRuntime, images: &[&str]) -> Option<Self> {
        let program = runtime.program()?;
        let dir = tempfile::tempdir().expect("a temporary folder");
        let runtime = runtime_for_engines(&program, dir.path());
        let enclosure = Enclosure::new();
        let of = |name: &str| dir.path().join(name);
        let log = fs::File::create(of("log")).expect("the folder is ours");
        let daemon = enclosure
            .command(DAEMON)
            .args(["--storage-driver", "overlay2", "--bip", "10.89.0.1/24"])
            .args([
                "--exec-opt",
                "native.cgroupdriver=cgroupfs",
                "--default-ulimit",
                "nofile=20000:20000",
            ])
            .arg("--data-root")
            .arg(of("data"))
            .arg("--exec-root")
            .arg(of("exec"))
            .arg("--pidfile")
            .arg(of("pid"))
            .arg("--host")
            .arg(format!("unix://{}", of("socket").display()))
            .arg("--add-runtime")
            .arg(format!("tested={}", runtime.display()))
            .args(["--default-runtime", "tested"])
            .env("TMPDIR", dir.path())
            .stdout(log.try_clone().expect("a descriptor can be copied"))
            .stderr(log)
            .spawn()
            .expect("`cargo xtask setup` installs docker.io");
        let docker = Self {
            daemon,
            enclosure,
            dir,
        };
        let ready = eventually(PATIENCE, || docker.run(&["version"]).status.success());
        assert!(ready, "the daemon did not get ready: {}", docker.log());
        for image in images {
            let archive = archive_of(image, &format!("{image}:latest"), docker.dir());
            docker.ok(&["load", "--quiet", "--input", &archive.display().to_string()]);
        }
        Some(docker)
    }

    /// Everything of this daemon is below it, and what a test likes to put there.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// What the daemon logged.
    pub fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }

    /// `docker ARGUMENTS`, not started yet.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = self.enclosure.command(CLIENT);
        command
            .env(
                "DOCKER_HOST",
                format!("unix://{}", self.dir.path().join("socket").display()),
            )
            .env("HOME", self.dir.path())
            .args(arguments);
        command
    }

    /// A program of the machine in the daemon's namespaces.
    pub fn beside(&self, program: &str) -> Command {
        self.enclosure.command(program)
    }

    /// Run to the end.
    pub fn run(&self, arguments: &[&str]) -> Outcome {
        finish(
            self.command(arguments)
                .spawn()
                .expect("`cargo xtask setup` installs docker.io"),
        )
    }

    /// Run to the end with bytes on standard input.
    pub fn run_with_input(&self, arguments: &[&str], input: &str) -> Outcome {
        let file = self.dir.path().join("input");
        fs::write(&file, input).expect("the folder is ours");
        let mut command = self.command(arguments);
        command.stdin(Stdio::from(fs::File::open(file).expect("just written")));
        finish(command.spawn().expect("`cargo xtask setup` installs docker.io"))
    }

    /// The standard output of what has to succeed.
    ///
    /// # Panics
    /// It doesn't.
    pub fn ok(&self, arguments: &[&str]) -> String {
        let outcome = self.run(arguments);
        assert_eq!(outcome.code(), 0, "docker {}: {outcome:?}", arguments.join(" "));
        outcome.text()
    }
}

impl Drop for Docker {
    fn drop(&mut self) {
        let ids = self.run(&["ps", "--all", "--quiet"]).text();
        let mut arguments = vec!["rm", "--force"];
        arguments.extend(ids.split_whitespace());
        if arguments.len() > 2 {
            self.run(&arguments);
        }
        // `nsenter` has become the daemon, which ends its own containerd.
        if let Ok(pid) = i32::try_from(self.daemon.id()) {
            signal(pid, Signal::SIGTERM);
        }
        if wait_for(&mut self.daemon, PATIENCE).is_none() {
            self.daemon.kill().ok();
            self.daemon.wait().ok();
        }
    }
}
