//! A container under test: the operations of the specification, and waiting for its process as an engine's monitor does.

use std::fs::{self, File};
use std::path::PathBuf;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::errno::Errno;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use serde_json::Value;

use crate::bundle::Bundle;
use crate::runtime::{Output, PATIENCE, shown, wait};
use crate::world::World;

/// A created container. What it prints goes to files.
#[derive(Debug)]
pub struct Container<'w> {
    world: &'w World<'w>,
    pub id: String,
    stdout: PathBuf,
    stderr: PathBuf,
    /// The process's id on the host, from the pid file.
    pub pid: i32,
}

impl<'w> Container<'w> {
    /// Creates one, with more options of `create`.
    ///
    /// # Errors
    /// The runtime refuses, or writes no pid file.
    pub fn create(world: &'w World<'w>, bundle: &Bundle, options: &[&str]) -> Result<Self> {
        let id = world.new_id();
        Self::try_create(world, bundle, &id, options)?.expect_ok()?;
        Self::of(world, &id)
    }

    /// The container with this id, which was created by [`Container::try_create`].
    ///
    /// # Errors
    /// There is no pid file.
    pub fn of(world: &'w World<'w>, id: &str) -> Result<Self> {
        let file = world.path().join(format!("{id}.pid"));
        let text = fs::read_to_string(&file).context("`create --pid-file` wrote no file")?;
        let pid = text
            .trim()
            .parse()
            .with_context(|| format!("the pid file holds {text:?}"))?;
        let of = |name: &str| world.path().join(format!("{id}.{name}"));
        Ok(Self {
            world,
            id: id.to_owned(),
            stdout: of("stdout"),
            stderr: of("stderr"),
            pid,
        })
    }

    /// `create`, whose outcome the caller judges. The process's output goes to files named by the id.
    ///
    /// # Errors
    /// The runtime can't be started, or hangs.
    pub fn try_create(world: &World<'_>, bundle: &Bundle, id: &str, options: &[&str]) -> Result<Output> {
        bundle.write()?;
        let of = |name: &str| world.path().join(format!("{id}.{name}"));
        let mut command = world.command(&["create", "--bundle"]);
        command
            .arg(bundle.path())
            .arg("--pid-file")
            .arg(of("pid"))
            .args(options)
            .arg(id);
        command
            .stdout(File::create(of("stdout"))?)
            .stderr(File::create(of("stderr"))?);
        command.stdin(Stdio::null());
        let line = shown(&command);
        let mut child = command
            .spawn()
            .with_context(|| format!("cannot start `{line}`"))?;
        let status = wait(&mut child, &line)?;
        let stderr = fs::read(of("stderr")).unwrap_or_default();
        Ok(Output {
            stdout: String::new(),
            stderr: String::from_utf8_lossy(&stderr).into_owned(),
            status,
            line,
        })
    }

    /// An operation on this container, judged by the caller.
    ///
    /// # Errors
    /// The runtime can't be started, or hangs.
    pub fn invoke(&self, verb: &str, more: &[&str]) -> Result<Output> {
        let mut arguments = vec![verb, self.id.as_str()];
        arguments.extend_from_slice(more);
        self.world.invoke(&arguments)
    }

    /// `start`.
    ///
    /// # Errors
    /// The runtime refuses.
    pub fn start(&self) -> Result<()> {
        self.invoke("start", &[])?.expect_ok()?;
        Ok(())
    }

    /// `kill`.
    ///
    /// # Errors
    /// The runtime refuses.
    pub fn kill(&self, signal: &str) -> Result<()> {
        self.invoke("kill", &[signal])?.expect_ok()?;
        Ok(())
    }

    /// `delete`.
    ///
    /// # Errors
    /// The runtime refuses.
    pub fn delete(&self) -> Result<()> {
        self.invoke("delete", &[])?.expect_ok()?;
        Ok(())
    }

    /// `state`, as JSON.
    ///
    /// # Errors
    /// The runtime refuses, or prints something else.
    pub fn state(&self) -> Result<Value> {
        let text = self.invoke("state", &[])?.expect_ok()?;
        serde_json::from_str(&text).with_context(|| format!("`state` printed {text:?}"))
    }

    /// The `status` of its state.
    ///
    /// # Errors
    /// As [`Container::state`].
    pub fn status(&self) -> Result<String> {
        let state = self.state()?;
        let status = state["status"].as_str().context("the state has no status")?;
        Ok(status.to_owned())
    }

    /// Waits for the process to end and for the runtime to say `stopped`; the process's exit status as its parent sees it.
    ///
    /// # Errors
    /// It takes too long.
    pub fn wait_stopped(&self) -> Result<WaitStatus> {
        let begin = Instant::now();
        let ended = loop {
            match waitpid(Pid::from_raw(self.pid), Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::StillAlive) => {}
                Ok(status) => break status,
                Err(Errno::ECHILD) if !self.process_exists() => break WaitStatus::StillAlive,
                // The runtime's own process is its parent until that ends.
                Err(_) => {}
            }
            if begin.elapsed() > PATIENCE {
                bail!(
                    "the process {} did not end; its output so far: {:?}",
                    self.pid,
                    self.stdout()
                );
            }
            std::thread::sleep(Duration::from_millis(2));
        };
        loop {
            let status = self.status()?;
            if status == "stopped" {
                return Ok(ended);
            }
            ensure!(
                begin.elapsed() < PATIENCE,
                "the process has ended, and the status stays {status}"
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Whether the process is there, be it as a zombie.
    pub fn process_exists(&self) -> bool {
        PathBuf::from(format!("/proc/{}", self.pid)).exists()
    }

    /// Waits until the process has printed a text.
    ///
    /// # Errors
    /// It does not.
    pub fn wait_printed(&self, text: &str) -> Result<()> {
        let begin = Instant::now();
        while !self.stdout().contains(text) {
            ensure!(
                begin.elapsed() < PATIENCE,
                "the process did not print {text:?}, but {:?} and {:?}",
                self.stdout(),
                self.stderr()
            );
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }

    /// What the process printed so far.
    pub fn stdout(&self) -> String {
        fs::read(&self.stdout)
            .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
            .unwrap_or_default()
    }

    /// Its standard error, after what `create` said.
    pub fn stderr(&self) -> String {
        fs::read(&self.stderr)
            .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
            .unwrap_or_default()
    }

    /// What the probe said so far, line by line.
    ///
    /// # Errors
    /// It printed something else, or nothing.
    pub fn lines(&self) -> Result<Vec<Value>> {
        let text = self.stdout();
        ensure!(!text.is_empty(), "the container's process printed nothing");
        text.lines()
            .map(|line| serde_json::from_str(line).with_context(|| format!("the process printed {line:?}")))
            .collect()
    }

    /// A namespace of the process of the pid file, as the link in `/proc` shows it.
    ///
    /// # Errors
    /// The process has ended.
    pub fn namespace(&self, kind: &str) -> Result<String> {
        let link = fs::read_link(format!("/proc/{}/ns/{kind}", self.pid))
            .with_context(|| format!("the process of the pid file has no namespace {kind}"))?;
        Ok(link.to_string_lossy().into_owned())
    }

    /// `exec` with a command; the process's output, judged by the caller.
    ///
    /// # Errors
    /// The runtime can't be started, or hangs.
    pub fn exec(&self, options: &[&str], command: &[&str]) -> Result<Output> {
        let mut arguments = vec!["exec"];
        arguments.extend_from_slice(options);
        arguments.push(&self.id);
        arguments.extend_from_slice(command);
        self.world.invoke(&arguments)
    }
}
