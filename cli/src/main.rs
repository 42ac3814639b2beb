//! `hull`: containers, each in a microVM of its own, by the verbs people know from docker.
//!
//! One file per verb; each is thin on `sandbox` and `rootfs_builder`. There is no daemon: a command does its
//! work itself and first removes what a killed one left.
//!
//! Exit codes: those of docker. `run` and `exec` end with the container's own; 125 is ours, 126 a command that
//! can't be executed, 127 one that isn't found.

mod attach;
mod attached;
mod auth_file;
mod completion;
mod confinement_options;
mod container_inspect;
mod container_options;
mod cp;
mod create;
mod doctor;
mod exec;
mod format;
mod image;
mod image_command;
mod image_history;
mod image_inspect;
mod image_progress;
mod image_tag;
mod images;
mod import;
mod inspect;
mod kill;
mod log_reader;
mod login;
mod logout;
mod logs;
mod mount_options;
mod network_command;
mod network_options;
mod output;
mod pause;
mod prune;
mod ps;
mod pull;
#[cfg(test)]
mod reference;
mod rename;
mod restart;
mod resume;
mod rm;
mod rmi;
mod run;
mod sampler;
mod signal_name;
mod start;
mod stats;
mod stop;
mod terminal;
mod times;
mod top;
mod version;
mod volume;
mod wait;

use std::{io::Write as _, process::ExitCode, time::Instant};

use clap::{Parser, Subcommand, error::ErrorKind};
use sandbox::SandboxError;

/// Containers, each in a microVM of its own.
#[derive(Debug, Parser)]
#[command(
    name = "hull",
    version,
    disable_help_subcommand = true,
    subcommand_required = true
)]
struct Arguments {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    Run(Box<run::Run>),
    Create(Box<create::Create>),
    Start(start::Start),
    Exec(exec::Exec),
    Attach(attach::Attach),
    Ps(ps::Ps),
    Stats(stats::Stats),
    Wait(wait::Wait),
    Pause(pause::Pause),
    #[command(visible_alias = "unpause")]
    Resume(resume::Resume),
    Stop(stop::Stop),
    Restart(restart::Restart),
    Kill(kill::Kill),
    Rename(rename::Rename),
    Rm(rm::Rm),
    Logs(logs::Logs),
    Cp(cp::Cp),
    Inspect(inspect::Inspect),
    Images(images::Images),
    Pull(pull::Pull),
    Import(import::Import),
    Tag(image_tag::Tag),
    Rmi(rmi::Rmi),
    Image(image_command::Image),
    Volume(volume::Volume),
    Network(network_command::Network),
    Prune(prune::Prune),
    Top(top::Top),
    Login(login::Login),
    Logout(logout::Logout),
    Doctor(doctor::Doctor),
    Completion(completion::Completion),
    Version(version::Version),
}

/// What a verb came to, and the exit code its failures have.
type Finished = (anyhow::Result<u8>, fn(Option<&SandboxError>) -> u8);

/// Bad arguments and everything else that is ours.
const OURS: u8 = 125;

fn main() -> ExitCode {
    let started = Instant::now();
    if std::env::args_os()
        .nth(1)
        .is_some_and(|verb| verb == sandbox::monitor::VERB)
    {
        return sandbox::monitor::main();
    }
    completion::answer::<Arguments>();
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_env("HULL_LOG")
                .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("warn")),
        )
        .init();
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            // Help and version go to stdout and are no failure.
            drop(error.print());
            let asked = matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion);
            return ExitCode::from(if asked { 0 } else { OURS });
        }
    };
    let (result, failure): Finished = match arguments.verb {
        Verb::Run(run) => (run.execute(started), run::failure_code),
        Verb::Create(create) => (create.execute(), run::failure_code),
        Verb::Start(start) => (start.execute(started), |_| 1),
        Verb::Attach(attach) => (attach.execute(), |_| 1),
        Verb::Wait(wait) => (wait.execute(), |_| 1),
        Verb::Pause(pause) => (pause.execute(), |_| 1),
        Verb::Resume(resume) => (resume.execute(), |_| 1),
        Verb::Restart(restart) => (restart.execute(started), |_| 1),
        Verb::Rename(rename) => (rename.execute(), |_| 1),
        Verb::Exec(exec) => (exec.execute(), exec::failure_code),
        Verb::Ps(ps) => (ps.execute(), |_| 1),
        Verb::Stats(stats) => (stats.execute(), |_| 1),
        Verb::Stop(stop) => (stop.execute(), |_| 1),
        Verb::Kill(kill) => (kill.execute(), |_| 1),
        Verb::Rm(rm) => (rm.execute(), |_| 1),
        Verb::Images(images) => (images.execute(), |_| 1),
        Verb::Cp(cp) => (cp.execute(), |_| 1),
        Verb::Logs(logs) => (logs.execute(), |_| 1),
        Verb::Inspect(inspect) => (inspect.execute(), |_| 1),
        Verb::Pull(pull) => (pull.execute(), |_| 1),
        Verb::Import(import) => (import.execute(), |_| 1),
        Verb::Tag(tag) => (tag.execute(), |_| 1),
        Verb::Rmi(rmi) => (rmi.execute(), |_| 1),
        Verb::Image(image) => (image.execute(), |_| 1),
        Verb::Volume(volume) => (volume.execute(), |_| 1),
        Verb::Network(network) => (network.execute(), |_| 1),
        Verb::Prune(prune) => (prune.execute(), |_| 1),
        Verb::Top(top) => (top.execute(), |_| 1),
        Verb::Login(login) => (login.execute(), |_| 1),
        Verb::Logout(logout) => (logout.execute(), |_| 1),
        Verb::Doctor(doctor) => (doctor.execute(), |_| 1),
        Verb::Completion(completion) => (completion.execute(), |_| 1),
        Verb::Version(version) => (version.execute(), |_| 1),
    };
    match result {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            drop(writeln!(std::io::stderr(), "hull: {error:#}"));
            ExitCode::from(failure(error.downcast_ref()))
        }
    }
}
