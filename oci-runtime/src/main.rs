//! `hull-oci`: the command line of `runc`, word for word, with each container in a microVM of its own.
//!
//! Podman, Docker, CRI-O and containerd's own shim drive it as they drive runc. One file per verb; each is thin on
//! `sandbox::bundle`. What can't be the same in a microVM is said in `docs/oci-runtime.md`.
//!
//! Exit codes: runc's. 1 for whatever fails, 255 for an exec that does, and a container's own for `run` and `exec`.

mod arguments;
mod checkpoint;
mod console;
mod create;
mod delete;
mod events;
mod exec;
mod features;
mod kill;
mod list;
mod log;
mod pause;
mod pid_file;
mod ps;
mod resume;
mod run;
mod signal_name;
mod spec;
mod start;
mod state;
mod update;

use std::{path::PathBuf, process::ExitCode};

use anyhow::Result;
use clap::{ArgAction, Args, CommandFactory as _, FromArgMatches as _, Parser, Subcommand, error::ErrorKind};
use sandbox::bundle::Bundles;

/// The specification this runtime is written for.
const SPEC_VERSION: &str = "1.2.1";

/// Open Container Initiative runtime: each container in a microVM of its own.
#[derive(Debug, Parser)]
#[command(
    name = "hull-oci",
    disable_version_flag = true,
    disable_help_subcommand = true,
    subcommand_required = false,
    args_override_self = true
)]
struct Arguments {
    #[command(flatten)]
    global: Global,
    /// Print the version
    #[arg(long, short = 'v', action = ArgAction::SetTrue)]
    version: bool,
    #[command(subcommand)]
    verb: Option<Verb>,
}

/// What stands before the verb.
#[derive(Debug, Args)]
struct Global {
    /// Where the state of containers is kept
    #[arg(long, default_value = "/run/hull-oci", value_name = "DIR")]
    root: PathBuf,
    /// Where messages go; to standard error where it isn't given
    #[arg(long, value_name = "FILE")]
    log: Option<PathBuf>,
    /// How messages are written
    #[arg(long, default_value = "text", value_name = "text|json")]
    log_format: String,
    /// Say more
    #[arg(long, num_args = 0..=1, require_equals = true, default_value_t = false, default_missing_value = "true")]
    debug: bool,
    /// `linux.cgroupsPath` is `slice:prefix:name`; the group is made where systemd would make it
    #[arg(long, num_args = 0..=1, require_equals = true, default_value_t = false, default_missing_value = "true")]
    systemd_cgroup: bool,
    /// Accepted: what the user may not do is left out, whoever the user is
    #[arg(long, default_value = "auto", value_name = "true|false|auto")]
    rootless: String,
    /// Accepted and not used: there is no checkpoint by CRIU
    #[arg(long, hide = true)]
    criu: Option<String>,
}

#[derive(Debug, Subcommand)]
enum Verb {
    Checkpoint(checkpoint::Checkpoint),
    Create(create::Create),
    Delete(delete::Delete),
    Events(events::Events),
    Exec(Box<exec::Exec>),
    Features(features::Features),
    Kill(kill::Kill),
    List(list::List),
    Pause(pause::Pause),
    Ps(ps::Ps),
    Restore(checkpoint::Restore),
    Resume(resume::Resume),
    Run(run::Run),
    Spec(spec::Spec),
    Start(start::Start),
    State(state::State),
    Update(Box<update::Update>),
}

impl Global {
    fn bundles(&self) -> Result<Bundles> {
        Ok(Bundles::open(&self.root)?)
    }
}

fn main() -> ExitCode {
    if std::env::args_os()
        .nth(1)
        .is_some_and(|verb| verb == sandbox::monitor::VERB)
    {
        return sandbox::monitor::main();
    }
    let given = arguments::normalised(&Arguments::command(), std::env::args_os().collect());
    let parsed = Arguments::command()
        .try_get_matches_from(given)
        .and_then(|matches| Arguments::from_arg_matches(&matches));
    let arguments = match parsed {
        Ok(arguments) => arguments,
        Err(error) => {
            drop(error.print());
            let asked = matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion);
            return ExitCode::from(u8::from(!asked));
        }
    };
    if arguments.version {
        println!(
            "hull-oci version {}\nspec: {SPEC_VERSION}\nprotocol: agent {}",
            env!("CARGO_PKG_VERSION"),
            sandbox::AGENT_PROTOCOL_VERSION
        );
        return ExitCode::SUCCESS;
    }
    let Some(verb) = arguments.verb else {
        drop(Arguments::command().print_help());
        return ExitCode::SUCCESS;
    };
    let log = match log::open(&arguments.global) {
        Ok(log) => log,
        Err(error) => {
            eprintln!("{error:#}");
            return ExitCode::FAILURE;
        }
    };
    let failure = if matches!(verb, Verb::Exec(_)) { 255 } else { 1 };
    match execute(verb, &arguments.global) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            log.fatal(&format!("{error:#}"));
            ExitCode::from(failure)
        }
    }
}

fn execute(verb: Verb, global: &Global) -> Result<u8> {
    match verb {
        Verb::Checkpoint(checkpoint) => checkpoint.execute(),
        Verb::Create(create) => create.execute(global),
        Verb::Delete(delete) => delete.execute(global),
        Verb::Events(events) => events.execute(global),
        Verb::Exec(exec) => exec.execute(global),
        Verb::Features(features) => features.execute(),
        Verb::Kill(kill) => kill.execute(global),
        Verb::List(list) => list.execute(global),
        Verb::Pause(pause) => pause.execute(global),
        Verb::Ps(ps) => ps.execute(global),
        Verb::Restore(restore) => restore.execute(),
        Verb::Resume(resume) => resume.execute(global),
        Verb::Run(run) => run.execute(global),
        Verb::Spec(spec) => spec.execute(),
        Verb::Start(start) => start.execute(global),
        Verb::State(state) => state.execute(global),
        Verb::Update(update) => update.execute(global),
    }
}
