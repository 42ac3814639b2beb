//! What one case has to itself: a folder, a state directory of the runtime, ids nobody else uses. Dropping it deletes every
//! container by force.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result, bail};
use serde_json::Value;
use tempfile::TempDir;

use crate::bundle::{Bundle, Programs};
use crate::container::Container;
use crate::runtime::{Output, Runtime, finish};

static IDS: AtomicU32 = AtomicU32::new(0);

/// A case's surroundings.
#[derive(Debug)]
pub struct World<'a> {
    pub runtime: &'a Runtime,
    pub programs: &'a Programs,
    dir: TempDir,
}

impl<'a> World<'a> {
    /// # Errors
    /// No temporary folder can be made.
    pub fn new(runtime: &'a Runtime, programs: &'a Programs, parent: &Path) -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("case-").tempdir_in(parent)?;
        std::fs::create_dir(dir.path().join("scratch"))?;
        Ok(Self {
            runtime,
            programs,
            dir,
        })
    }

    /// A folder of the case's own.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// The runtime's state directory.
    pub fn root(&self) -> PathBuf {
        self.dir.path().join("state")
    }

    /// A place for captured output.
    pub fn scratch(&self) -> PathBuf {
        self.dir.path().join("scratch")
    }

    /// An id no container of this host has.
    pub fn new_id(&self) -> String {
        let number = IDS.fetch_add(1, Ordering::Relaxed);
        format!("conf-{}-{number}", std::process::id())
    }

    /// A fresh bundle.
    ///
    /// # Errors
    /// It can't be made.
    pub fn bundle(&self) -> Result<Bundle> {
        let number = IDS.fetch_add(1, Ordering::Relaxed);
        Bundle::new(self.dir.path().join(format!("bundle-{number}")), self.programs)
            .context("cannot make a bundle")
    }

    /// The runtime with the case's state directory.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = self.runtime.command(&self.root());
        command.args(arguments).current_dir(self.dir.path());
        command
    }

    /// An invocation, run to its end.
    ///
    /// # Errors
    /// It can't be started, or hangs.
    pub fn invoke(&self, arguments: &[&str]) -> Result<Output> {
        finish(&mut self.command(arguments), &self.scratch())
    }

    /// Creates a container of a bundle.
    ///
    /// # Errors
    /// The runtime refuses.
    pub fn create(&self, bundle: &Bundle) -> Result<Container<'_>> {
        Container::create(self, bundle, &[])
    }

    /// Creates and starts a container whose process is the probe, waits for its end and deletes it.
    ///
    /// # Errors
    /// The runtime refuses a step, or the process fails.
    pub fn run(&self, bundle: &Bundle) -> Result<Vec<Value>> {
        let container = self.create(bundle)?;
        container.start()?;
        container.wait_stopped()?;
        let lines = container.lines();
        let lines = lines.with_context(|| format!("standard error: {:?}", container.stderr().trim()))?;
        container.delete()?;
        Ok(lines)
    }

    /// What these operations of the probe say, in a container of the bundle.
    ///
    /// # Errors
    /// As [`World::run`]; or an operation said nothing.
    pub fn probe(&self, bundle: &mut Bundle, operations: &[&str]) -> Result<Vec<Value>> {
        self.run(bundle.probe(operations))
    }

    /// What the process of a bundle sees.
    ///
    /// # Errors
    /// As [`World::run`].
    pub fn report(&self, bundle: &mut Bundle) -> Result<Value> {
        let lines = self.probe(bundle, &["report"])?;
        lines
            .into_iter()
            .next()
            .context("the container's process printed nothing")
    }

    /// A bundle that can't be honoured: the runtime has to say so, at `create` or at the latest at `start`, and to leave no
    /// container that can be started.
    ///
    /// # Errors
    /// It doesn't.
    pub fn refused(&self, bundle: &Bundle) -> Result<String> {
        let id = self.new_id();
        let output = Container::try_create(self, bundle, &id, &[])?;
        if !output.ok() {
            let message = output.expect_error()?;
            if self.invoke(&["state", &id])?.ok() {
                bail!("`create` failed, and the container exists; the message was {message}");
            }
            return Ok(message);
        }
        let started = self.invoke(&["start", &id])?;
        self.invoke(&["delete", "--force", &id])?;
        started
            .expect_error()
            .context("neither `create` nor `start` generated an error")
    }
}

impl Drop for World<'_> {
    fn drop(&mut self) {
        let Ok(list) = self.invoke(&["list", "--quiet"]) else {
            return;
        };
        for id in list.stdout.split_whitespace() {
            self.invoke(&["delete", "--force", id]).ok();
        }
    }
}
