//! The same image under `runc`: an ordinary container on the host's kernel, to compare a microVM's results with.
//!
//! Each [`Bundle`] is one image unpacked by umoci into a folder of its own and is used once or more; its containers' state is
//! in that folder too, so that nothing of it is seen by other users of runc.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::hull::{Outcome, finish};

/// An image as a root filesystem and a configuration runc takes.
#[derive(Debug)]
pub struct Bundle {
    dir: TempDir,
}

impl Bundle {
    /// Unpack the image named so among the test images.
    ///
    /// # Panics
    /// If it can't be unpacked; `cargo xtask setup` installs what that takes.
    pub fn of(image: &str) -> Self {
        let images = PathBuf::from(std::env::var_os("HULL_TEST_IMAGES").expect("checked by available()"));
        let bundle = Self {
            dir: tempfile::tempdir().expect("a temporary folder"),
        };
        let layout = format!("{}:latest", images.join(image).display());
        let mut command = Command::new("umoci");
        command.args(["unpack", "--image", &layout]).arg(bundle.path());
        let status = command.stdout(Stdio::null()).stderr(Stdio::null()).status();
        assert!(
            status.is_ok_and(|status| status.success()),
            "umoci can't unpack {layout}"
        );
        bundle
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("bundle")
    }

    /// Run a command in a container of the image and wait for its end.
    ///
    /// # Panics
    /// If runc can't be started.
    pub fn run(&self, arguments: &[&str]) -> Outcome {
        let path = self.path().join("config.json");
        let text = fs::read(&path).expect("umoci writes a configuration");
        let mut config: Value = serde_json::from_slice(&text).expect("umoci writes JSON");
        config["process"]["terminal"] = json!(false);
        config["process"]["args"] = json!(arguments);
        config["root"]["readonly"] = json!(false);
        fs::write(&path, config.to_string()).expect("the bundle is writable");
        let mut command = self.command();
        command
            .arg("run")
            .arg("--bundle")
            .arg(self.path())
            .arg(format!("hull-tests-{}", unique(self.dir.path())));
        finish(
            command
                .stdin(Stdio::null())
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn()
                .expect("runc is installed"),
        )
    }

    fn command(&self) -> Command {
        let mut command = Command::new("runc");
        command.arg("--root").arg(self.dir.path().join("state"));
        command
    }
}

/// The random part of a temporary folder's name; cgroups are named by it, which all of runc's users share.
fn unique(dir: &Path) -> String {
    dir.file_name()
        .map(|name| name.to_string_lossy().replace('.', ""))
        .unwrap_or_default()
}
