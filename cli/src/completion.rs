//! `hull completion`, and what a shell is answered when it completes a command line.
//!
//! The script a shell sources calls `hull` itself, with `COMPLETE=SHELL` in the environment, so completions are those of the
//! program that is there, names of containers and images included.

use clap::{Args, Command, CommandFactory, ValueEnum};
use clap_complete::{
    CompleteEnv,
    engine::{ArgValueCandidates, CompletionCandidate},
    env::Shells,
};
use sandbox::{Directories, Runtime};

use crate::{format, image};

/// The variable by which a shell says that it completes.
const VARIABLE: &str = "COMPLETE";

/// Print the script that makes a shell complete hull's commands.
///
/// bash: source <(hull completion bash); zsh: source <(hull completion zsh); fish: hull completion fish | source. Put the line
/// into ~/.bashrc, ~/.zshrc or ~/.config/fish/config.fish.
#[derive(Debug, Args)]
pub struct Completion {
    /// The shell
    #[arg(value_enum)]
    shell: Shell,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Shell {
    /// GNU Bash
    Bash,
    /// Z shell
    Zsh,
    /// Fish
    Fish,
}

impl Completion {
    /// Prints it.
    pub fn execute(self) -> anyhow::Result<u8> {
        let name = match self.shell {
            Shell::Bash => "bash",
            Shell::Zsh => "zsh",
            Shell::Fish => "fish",
        };
        let mut script = Vec::new();
        if let Some(shell) = Shells::builtins().completer(name) {
            shell.write_registration(VARIABLE, "hull", "hull", "hull", &mut script)?;
        }
        format::write_out(&String::from_utf8_lossy(&script))
    }
}

/// Answers a shell that completes, and ends the program; returns at once otherwise.
pub fn answer<C: CommandFactory>() {
    CompleteEnv::with_factory(|| with_names(C::command()))
        .var(VARIABLE)
        .complete();
}

/// What an argument may be.
type Candidates = fn() -> Vec<CompletionCandidate>;

/// Lets arguments that are names be completed by the names there are.
fn with_names(command: Command) -> Command {
    let arguments: Vec<(clap::Id, Candidates)> = command
        .get_arguments()
        .filter_map(|argument| {
            let candidates: Candidates = match argument.get_id().as_str() {
                "container" | "containers" | "container_and_command" | "names" => containers,
                "image" | "images" | "image_and_command" => images,
                _ => return None,
            };
            Some((argument.get_id().clone(), candidates))
        })
        .collect();
    let mut command = command;
    for (id, candidates) in arguments {
        command = command.mut_arg(id, |argument| argument.add(ArgValueCandidates::new(candidates)));
    }
    let verbs: Vec<String> = command
        .get_subcommands()
        .map(|verb| verb.get_name().to_owned())
        .collect();
    for verb in verbs {
        command = command.mut_subcommand(verb, with_names);
    }
    command
}

/// Nobody wants to read an error while pressing the tabulator: what can't be listed isn't.
fn containers() -> Vec<CompletionCandidate> {
    let records = Runtime::open(&Directories::from_environment()).and_then(|runtime| runtime.list());
    records
        .unwrap_or_default()
        .into_iter()
        .map(|record| CompletionCandidate::new(record.name))
        .collect()
}

fn images() -> Vec<CompletionCandidate> {
    let images = image::open_store(&Directories::from_environment()).and_then(|store| Ok(store.list()?));
    images
        .unwrap_or_default()
        .into_iter()
        .flat_map(|image| image.names)
        .map(CompletionCandidate::new)
        .collect()
}
