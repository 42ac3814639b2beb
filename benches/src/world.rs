//! A store and a state directory of a benchmark's own, and `hull` in it.

use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use tempfile::TempDir;

/// A container that takes longer until it answers has failed.
const PATIENCE: Duration = Duration::from_secs(60);

/// Where one benchmark's images and containers live.
#[derive(Debug)]
pub struct World {
    program: PathBuf,
    root: TempDir,
}

impl World {
    /// A fresh one with these images imported.
    ///
    /// # Errors
    /// The products or images are not named in the environment, or an import fails.
    pub fn with_images(images: &[&str]) -> Result<Self> {
        let world = Self {
            program: crate::artifact("HULL_BIN")?,
            root: tempfile::tempdir().context("cannot make a temporary folder")?,
        };
        for image in images {
            let layout = format!(
                "oci:{}:latest",
                crate::artifact("HULL_TEST_IMAGES")?.join(image).display()
            );
            world.succeed(&["import", &layout, image])?;
        }
        Ok(world)
    }

    /// The folder all of it is in.
    pub fn root(&self) -> &std::path::Path {
        self.root.path()
    }

    /// `hull ARGUMENTS` in this world.
    pub fn hull(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command
            .args(arguments)
            .env("HULL_ROOT", self.root.path().join("store"))
            .env("HULL_RUNTIME_DIR", self.root.path().join("run"))
            .stdin(Stdio::null());
        command
    }

    /// Run to the end; an exit code other than 0 is an error.
    ///
    /// # Errors
    /// It can't be started, or fails.
    pub fn succeed(&self, arguments: &[&str]) -> Result<Output> {
        succeed(&mut self.hull(arguments))
    }

    /// A busybox that waits until it is dropped.
    ///
    /// # Errors
    /// It can't be started, or never answers.
    pub fn waiting(&self, name: &str, options: &[&str]) -> Result<Waiting<'_>> {
        let arguments = [
            &["run", "--rm", "--name", name],
            options,
            &["busybox", "sleep", "100000"],
        ]
        .concat();
        let child = self
            .hull(&arguments)
            .stdout(Stdio::null())
            .spawn()
            .context("cannot start hull")?;
        let mut waiting = Waiting {
            world: self,
            name: name.to_owned(),
            child,
        };
        let begin = Instant::now();
        while self.succeed(&["exec", name, "true"]).is_err() {
            if let Some(status) = waiting.child.try_wait()? {
                bail!("the container {name} ended early: {status}");
            }
            if begin.elapsed() > PATIENCE {
                bail!("the container {name} never answered");
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(waiting)
    }

    /// What processes of this world carry in their environment.
    pub fn marker(&self) -> String {
        self.root.path().display().to_string()
    }
}

/// A container, ended when this goes.
#[derive(Debug)]
pub struct Waiting<'a> {
    world: &'a World,
    name: String,
    child: Child,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.world.succeed(&["kill", &self.name]).ok();
        self.child.wait().ok();
    }
}

/// Run to the end with its output kept; an exit code other than 0 is an error that says what was printed.
///
/// # Errors
/// It can't be started, or fails.
pub fn succeed(command: &mut Command) -> Result<Output> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command.output().with_context(|| format!("cannot start {name}"))?;
    if !output.status.success() {
        bail!(
            "{name} ended with {}: {}",
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(output)
}
