//! `hull doctor`

use std::{fs, path::Path};

use clap::Args;
use sandbox::{Components, Directories, Runtime};
use serde::Serialize;

use crate::{image, output};

/// Check that this host can run containers, and say what to do where it can't.
#[derive(Debug, Args)]
pub struct Doctor {
    /// How to print: table or json
    #[arg(long, default_value = "table")]
    format: output::Format,
}

#[derive(Serialize)]
struct Check {
    check: &'static str,
    ok: bool,
    detail: String,
}

fn check(name: &'static str, result: anyhow::Result<String>) -> Check {
    match result {
        Ok(detail) => Check {
            check: name,
            ok: true,
            detail,
        },
        Err(error) => Check {
            check: name,
            ok: false,
            detail: format!("{error:#}"),
        },
    }
}

fn backend() -> &'static str {
    let flags = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let has = |flag: &str| {
        flags
            .lines()
            .any(|line| line.starts_with("flags") && line.split(' ').any(|f| f == flag))
    };
    if has("vmx") || has("svm") {
        "hardware virtualisation"
    } else {
        "no vmx or svm: pagetable-based (PVM)"
    }
}

fn free_memory() -> anyhow::Result<String> {
    let meminfo = fs::read_to_string("/proc/meminfo")?;
    let line = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib: u64 = line
        .and_then(|line| line.split_whitespace().next()?.parse().ok())
        .unwrap_or(0);
    anyhow::ensure!(
        kib >= 256 * 1024,
        "less than 256 MiB available; a microVM needs some"
    );
    Ok(format!("{} available", output::size(kib.saturating_mul(1024))))
}

fn shown(path: &Path) -> String {
    path.display().to_string()
}

impl Doctor {
    /// Prints the checks; 1 if one failed.
    pub fn execute(self) -> anyhow::Result<u8> {
        let directories = Directories::from_environment();
        let checks = [
            check(
                "/dev/kvm",
                sandbox::check_host()
                    .map(|()| backend().to_owned())
                    .map_err(Into::into),
            ),
            check(
                "hull-vmm",
                Components::find_vmm()
                    .map(|path| shown(&path))
                    .map_err(Into::into),
            ),
            check(
                "guest kernel",
                Components::find_kernel()
                    .map(|path| shown(&path))
                    .map_err(Into::into),
            ),
            check(
                "agent image",
                Components::find_agent_image()
                    .map(|path| shown(&path))
                    .map_err(Into::into),
            ),
            check(
                "run directory",
                Runtime::open(&directories)
                    .map(|_| shown(&directories.run))
                    .map_err(Into::into),
            ),
            check(
                "image store",
                image::open_store(&directories).map(|_| shown(&directories.root)),
            ),
            check("memory", free_memory()),
        ];
        let healthy = checks.iter().all(|check| check.ok);
        output::print(self.format, &["CHECK", "STATE", "DETAIL"], &checks, |check| {
            let state = if check.ok { "ok" } else { "MISSING" };
            vec![check.check.to_owned(), state.to_owned(), check.detail.clone()]
        })?;
        Ok(u8::from(!healthy))
    }
}
