//! `containerd-shim-hull-v2`: containerd's containers, each in a microVM of its own.
//!
//! ```text
//!  containerd ── exec ──► start, delete                      what this program is for a moment
//!      │
//!      └── ttRPC ──► resident shim ── sandbox ──► monitor ──► microVM      one monitor a container
//!            Task service │  one for a pod          the pid containerd is told
//!                         └── FIFOs ◄─► execs' streams
//! ```
//!
//! Thin on `sandbox`, which makes, finds and removes a bundle's microVM; what is here is containerd's view of it: the Task
//! service, events, FIFOs, mounts and pods. There is no state on disk but that of `sandbox` and what a bundle holds, so a shim
//! that is killed takes nothing along that `delete` couldn't find (`docs/adr/0013-the-shim.md`).

mod arguments;
mod delete;
mod error;
mod exec;
mod grouping;
mod layers;
mod log;
mod log_program;
mod metrics;
mod microvm;
mod orphans;
mod pause;
mod pod;
mod process;
mod publisher;
mod relay;
mod resident;
mod rootfs;
mod service;
mod start;
mod stdio;
mod task;

use std::{io::Write as _, process::ExitCode};

use containerd_shim_protos::{
    protobuf::{Message as _, MessageField},
    types::introspection::{RuntimeInfo, RuntimeVersion},
};

use crate::{
    arguments::{Action, Arguments},
    error::{Result, ShimError},
};

/// By which containerd knows us.
const RUNTIME: &str = "io.containerd.hull.v2";

fn main() -> ExitCode {
    match std::env::args_os().nth(1) {
        Some(verb) if verb == sandbox::monitor::VERB => return sandbox::monitor::main(),
        Some(verb) if verb == pause::VERB => return pause::main(),
        Some(verb) if verb == layers::VERB => return layers::main(),
        _ => {}
    }
    let words = std::env::args_os()
        .skip(1)
        .map(|word| word.to_string_lossy().into_owned());
    let done = Arguments::parse(words).and_then(|arguments| match arguments.action {
        Action::Start => start::run(&arguments),
        Action::Delete => delete::run(&arguments),
        Action::Serve => resident::run(&arguments),
        Action::Version => print(version().as_bytes()),
        Action::Info => print(&info()?),
    });
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            drop(writeln!(
                std::io::stderr(),
                "containerd-shim-hull-v2: {}",
                error.chain()
            ));
            ExitCode::FAILURE
        }
    }
}

fn version() -> String {
    format!(
        "containerd-shim-hull-v2:\n  Version:  {}\n",
        env!("CARGO_PKG_VERSION")
    )
}

fn info() -> Result<Vec<u8>> {
    let info = RuntimeInfo {
        name: RUNTIME.to_owned(),
        version: MessageField::some(RuntimeVersion {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ..RuntimeVersion::default()
        }),
        ..RuntimeInfo::default()
    };
    info.write_to_bytes().map_err(|error| ShimError::Message {
        what: "the answer",
        problem: error.to_string(),
    })
}

fn print(bytes: &[u8]) -> Result<()> {
    let mut stdout = std::io::stdout().lock();
    stdout
        .write_all(bytes)
        .and_then(|()| stdout.flush())
        .map_err(ShimError::system("printing"))
}
