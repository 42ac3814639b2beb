//! `hull doctor`
//!
//! Each check says what there is, or what is missing and the way out. What is essential decides over the exit code; the
//! rest costs speed, density or an option, and is a warning.

mod host;

use std::{fs, path::Path};

use anyhow::Context as _;
use clap::Args;
use sandbox::{Components, Directories, Runtime};
use serde::Serialize;

use crate::{format::PrintFormat, image, output};

/// Check that this host can run containers, and say what to do where it can't.
#[derive(Debug, Args)]
pub struct Doctor {
    /// How to print: table, json, or a Go template
    #[arg(long, default_value = "table")]
    format: PrintFormat,
}

/// How a check came out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum State {
    Ok,
    /// Something is slower, or an option is missing.
    Warning,
    /// No container runs.
    Missing,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
struct Check {
    check: &'static str,
    state: State,
    detail: String,
    /// The way out, empty where all is well.
    remedy: String,
}

impl Check {
    fn ok(check: &'static str, detail: impl Into<String>) -> Self {
        Self {
            check,
            state: State::Ok,
            detail: detail.into(),
            remedy: String::new(),
        }
    }

    fn warning(check: &'static str, detail: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self {
            check,
            state: State::Warning,
            detail: detail.into(),
            remedy: remedy.into(),
        }
    }

    fn missing(check: &'static str, detail: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self {
            state: State::Missing,
            ..Self::warning(check, detail, remedy)
        }
    }

    /// An essential one that comes from somewhere whose errors carry the way out.
    fn essential<E: Into<anyhow::Error>>(check: &'static str, result: Result<String, E>) -> Self {
        match result {
            Ok(detail) => Self::ok(check, detail),
            Err(error) => Self::missing(check, format!("{:#}", error.into()), ""),
        }
    }
}

fn shown(path: &Path) -> String {
    path.display().to_string()
}

/// The VMM's program, started: one built for another C library, say, is there and of no use.
fn vmm() -> Check {
    const NAME: &str = "hull-vmm";
    let path = match Components::find_vmm() {
        Ok(path) => path,
        Err(error) => return Check::essential(NAME, Err(error)),
    };
    let output = std::process::Command::new(&path).arg("--version").output();
    match output {
        Ok(output) if output.status.success() => {
            let version = String::from_utf8_lossy(&output.stdout).trim().to_owned();
            Check::ok(NAME, format!("{version}, {}", path.display()))
        }
        Ok(output) => Check::missing(
            NAME,
            format!(
                "{} does not run: {}",
                path.display(),
                output::printable(String::from_utf8_lossy(&output.stderr).trim())
            ),
            "build it on this machine: `cargo xtask build`",
        ),
        Err(error) => Check::missing(
            NAME,
            format!("{} can't be started: {error}", path.display()),
            "give the file its execute permission, or build it on this machine: `cargo xtask build`",
        ),
    }
}

fn kernel() -> Check {
    let found = Components::find_kernel()
        .map_err(anyhow::Error::from)
        .and_then(|path| {
            // It is handed to the VMM as an open file.
            fs::File::open(&path)
                .map(|_| shown(&path))
                .with_context(|| format!("opening {}", path.display()))
        });
    Check::essential("guest kernel", found)
}

fn agent_image() -> Check {
    let found = Components::find_agent_image()
        .map_err(anyhow::Error::from)
        .and_then(|path| {
            fs::File::open(&path)
                .map(|_| shown(&path))
                .with_context(|| format!("opening {}", path.display()))
        });
    Check::essential("agent image", found)
}

fn run_directory(directories: &Directories) -> Check {
    const NAME: &str = "run directory";
    match Runtime::open(directories) {
        Ok(_) => Check::ok(NAME, shown(&directories.run)),
        Err(error) => Check::missing(
            NAME,
            format!("{:#}", anyhow::Error::from(error)),
            "make it yours, or set HULL_RUNTIME_DIR",
        ),
    }
}

fn store(directories: &Directories) -> Check {
    /// Less than this, and the next image may not fit.
    const LOW_BYTES: u64 = 1 << 30;
    const NAME: &str = "image store";
    if let Err(error) = image::open_store(directories) {
        return Check::missing(NAME, format!("{error:#}"), "make it yours, or set HULL_ROOT");
    }
    match rustix::fs::statvfs(&directories.root) {
        Ok(space) => {
            let free = space.f_bavail.saturating_mul(space.f_frsize);
            let detail = format!("{}, {} free", directories.root.display(), output::size(free));
            if free < LOW_BYTES {
                Check::warning(
                    NAME,
                    detail,
                    "remove what isn't needed: `hull prune -a`, or set HULL_ROOT",
                )
            } else {
                Check::ok(NAME, detail)
            }
        }
        Err(error) => Check::missing(
            NAME,
            format!("{}: {error}", directories.root.display()),
            "set HULL_ROOT",
        ),
    }
}

/// All checks, the essential ones first.
fn checks(directories: &Directories) -> Vec<Check> {
    let mut checks = vec![
        host::kvm(),
        vmm(),
        kernel(),
        agent_image(),
        run_directory(directories),
        store(directories),
        host::memory(),
        host::user_ids(),
        host::seccomp(),
    ];
    checks.extend([
        host::landlock(),
        host::io_uring(),
        host::open_files(),
        host::cgroups(),
        host::huge_pages(),
        host::clock_source(),
        host::mkfs(),
        host::journal(),
        host::taps(),
        host::firewall(),
    ]);
    checks
}

impl Doctor {
    /// Prints the checks; 1 if an essential one failed.
    pub fn execute(self) -> anyhow::Result<u8> {
        let checks = checks(&Directories::from_environment());
        let healthy = checks.iter().all(|check| check.state != State::Missing);
        self.format
            .print(&["CHECK", "STATE", "DETAIL"], &checks, |check| {
                let state = match check.state {
                    State::Ok => "ok",
                    State::Warning => "warning",
                    State::Missing => "MISSING",
                };
                let detail = if check.remedy.is_empty() {
                    check.detail.clone()
                } else {
                    format!("{}; {}", check.detail, check.remedy)
                };
                vec![check.check.to_owned(), state.to_owned(), detail]
            })?;
        Ok(u8::from(!healthy))
    }
}
