//! `hull version`

use std::process::Command;

use clap::Args;
use sandbox::Components;
use serde::Serialize;

use crate::output;

/// Show the versions of hull and its parts.
#[derive(Debug, Args)]
pub struct Version {
    /// How to print: table or json
    #[arg(long, default_value = "table")]
    format: output::Format,
}

#[derive(Serialize)]
struct Part {
    part: &'static str,
    version: String,
    path: String,
}

fn vmm_version(program: &std::path::Path) -> String {
    let output = Command::new(program).arg("--version").output();
    let text = output
        .map(|output| String::from_utf8_lossy(&output.stdout).into_owned())
        .unwrap_or_default();
    text.split_whitespace().last().unwrap_or("unknown").to_owned()
}

/// The release a kernel image says it is.
fn kernel_version(path: &std::path::Path) -> String {
    // The build driver leaves a manifest beside the image; an installed image may be a link into its cache.
    let real = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let text = std::fs::read_to_string(real.with_file_name("manifest.json")).unwrap_or_default();
    let manifest: serde_json::Value = serde_json::from_str(&text).unwrap_or_default();
    let field = |name: &str| manifest[name].as_str();
    match (field("linux_version"), field("input_hash")) {
        (Some(version), Some(hash)) => format!("{version} ({})", hash.get(..12).unwrap_or(hash)),
        (Some(version), None) => version.to_owned(),
        _ => "unknown".to_owned(),
    }
}

impl Version {
    /// Prints them.
    pub fn execute(self) -> anyhow::Result<u8> {
        let program = std::env::current_exe()
            .map(|path| path.display().to_string())
            .unwrap_or_default();
        let mut parts = vec![Part {
            part: "hull",
            version: env!("CARGO_PKG_VERSION").into(),
            path: program,
        }];
        let missing = |part, error: sandbox::SandboxError| Part {
            part,
            version: "missing".into(),
            path: error.to_string(),
        };
        parts.push(match Components::find_vmm() {
            Ok(path) => Part {
                part: "hull-vmm",
                version: vmm_version(&path),
                path: path.display().to_string(),
            },
            Err(error) => missing("hull-vmm", error),
        });
        parts.push(match Components::find_kernel() {
            Ok(path) => Part {
                part: "kernel",
                version: kernel_version(&path),
                path: path.display().to_string(),
            },
            Err(error) => missing("kernel", error),
        });
        parts.push(match Components::find_agent_image() {
            Ok(path) => Part {
                part: "agent image",
                version: format!("protocol {}", sandbox::AGENT_PROTOCOL_VERSION),
                path: path.display().to_string(),
            },
            Err(error) => missing("agent image", error),
        });
        output::print(self.format, &["PART", "VERSION", "PATH"], &parts, |part| {
            vec![part.part.to_owned(), part.version.clone(), part.path.clone()]
        })
    }
}
