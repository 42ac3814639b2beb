//! `docs/cli-reference.md` is made from the command line itself; a test keeps it so.

use std::path::Path;

use clap::CommandFactory as _;
use clap_markdown::MarkdownOptions;

use crate::Arguments;

const UPDATE: &str = "HULL_UPDATE_DOCS";

fn reference() -> String {
    let options = MarkdownOptions::new()
        .title("Command line reference".to_owned())
        .show_footer(false);
    let text = clap_markdown::help_markdown_command_custom(&Arguments::command(), &options);
    let note = format!(
        "<!-- Made from the program: `{UPDATE}=1 cargo test -p cli reference` writes it anew. -->\n\n"
    );
    let lines = text.lines().map(str::trim_end);
    note + lines.collect::<Vec<_>>().join("\n").trim_end() + "\n"
}

#[test]
fn reference_describes_the_program_as_it_is() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/cli-reference.md");
    let now = reference();
    if std::env::var_os(UPDATE).is_some() {
        std::fs::write(&path, &now).unwrap();
    }
    let written = std::fs::read_to_string(&path).unwrap_or_default();
    let differs = written
        .lines()
        .zip(now.lines())
        .find(|(written, now)| written != now);
    assert!(
        written == now,
        "{} is out of date, first at {differs:?}; write it anew with {UPDATE}=1",
        path.display()
    );
}

#[test]
fn every_verb_says_what_it_does_and_every_option_too() {
    fn check(command: &clap::Command) {
        assert!(command.get_about().is_some(), "{}", command.get_name());
        for argument in command.get_arguments().filter(|argument| !argument.is_hide_set()) {
            assert!(
                argument.get_help().is_some(),
                "{} {}",
                command.get_name(),
                argument.get_id()
            );
        }
        command.get_subcommands().for_each(check);
    }
    let mut command = Arguments::command();
    command.build();
    check(&command);
}
