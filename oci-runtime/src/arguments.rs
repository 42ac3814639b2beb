//! The spellings that runc takes and `clap` doesn't: long flags with one dash (`-root`), as Go has them.

use std::ffi::OsString;

use clap::Command;

/// Verbs whose arguments behind the container's id are another program's.
const FOREIGN_ARGUMENTS: [&str; 2] = ["exec", "ps"];

/// Whether `command` has a long flag of this name, and whether it takes a value of its own.
fn flag(command: &Command, name: &str) -> Option<bool> {
    let found = command.get_arguments().find(|argument| {
        let long = argument.get_long() == Some(name);
        long || argument
            .get_all_aliases()
            .is_some_and(|aliases| aliases.contains(&name))
    })?;
    Some(found.get_action().takes_values() && !found.is_require_equals_set())
}

/// Whether a short flag takes a value of its own.
fn short_takes_value(command: &Command, name: char) -> bool {
    let found = command
        .get_arguments()
        .find(|argument| argument.get_short() == Some(name));
    found.is_some_and(|argument| argument.get_action().takes_values() && !argument.is_require_equals_set())
}

/// The arguments with every long flag in two dashes. What belongs to another program stays as it is.
pub(crate) fn normalised(root: &Command, given: Vec<OsString>) -> Vec<OsString> {
    let mut command = root;
    let mut result = Vec::with_capacity(given.len());
    let mut given = given.into_iter();
    result.extend(given.next());
    let mut verb: Option<String> = None;
    while let Some(argument) = given.next() {
        let text = argument.to_str().map(str::to_owned);
        let Some(text) = text.filter(|text| text != "--") else {
            result.push(argument);
            break;
        };
        if !text.starts_with('-') || text == "-" {
            result.push(argument);
            match &verb {
                None => {
                    if let Some(found) = command.find_subcommand(&text) {
                        command = found;
                    }
                    verb = Some(text);
                }
                Some(verb) if FOREIGN_ARGUMENTS.contains(&verb.as_str()) => break,
                Some(_) => {}
            }
            continue;
        }
        let name = text.trim_start_matches('-');
        let bare = name.split('=').next().unwrap_or_default();
        let takes_next = if let Some(takes) = flag(command, bare) {
            result.push(format!("--{name}").into());
            takes && !name.contains('=')
        } else {
            result.push(argument);
            let mut letters = name.chars();
            match (letters.next(), letters.next()) {
                (Some(letter), None) => short_takes_value(command, letter),
                _ => false,
            }
        };
        if takes_next {
            result.extend(given.next());
        }
    }
    result.extend(given);
    result
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;
    use crate::Arguments;

    fn normalise(given: &[&str]) -> Vec<String> {
        let given = given.iter().map(OsString::from).collect();
        normalised(&Arguments::command(), given)
            .into_iter()
            .map(|argument| argument.into_string().unwrap())
            .collect()
    }

    #[test]
    fn long_flags_may_have_one_dash() {
        assert_eq!(
            normalise(&["hull-oci", "-root", "/r", "delete", "-force", "x"]),
            ["hull-oci", "--root", "/r", "delete", "--force", "x"]
        );
        assert_eq!(
            normalise(&["hull-oci", "-log=/l", "kill", "x", "-all"]),
            ["hull-oci", "--log=/l", "kill", "x", "--all"]
        );
    }

    #[test]
    fn arguments_of_another_program_are_left_alone() {
        let given = [
            "hull-oci", "exec", "-tty", "-u", "1:1", "id", "ls", "-tty", "-root",
        ];
        let expected = [
            "hull-oci", "exec", "--tty", "-u", "1:1", "id", "ls", "-tty", "-root",
        ];
        assert_eq!(normalise(&given), expected);
        let given = ["hull-oci", "exec", "-pid-file", "exec", "id", "x", "-pid-file"];
        assert_eq!(normalise(&given)[2], "--pid-file");
        assert_eq!(normalise(&given)[6], "-pid-file");
    }

    #[test]
    fn every_verb_parses_what_its_drivers_say() {
        let parse = |line: &str| {
            let given = line.split(' ').map(OsString::from).collect();
            Arguments::command().try_get_matches_from(normalised(&Arguments::command(), given))
        };
        for line in [
            "hull-oci --root /r --log /l --log-format json --systemd-cgroup create --bundle /b --pid-file /p --console-socket /c id",
            "hull-oci --root /r --rootless=true --debug create -b /b --no-pivot --no-new-keyring --preserve-fds 2 id",
            "hull-oci --debug=true start id",
            "hull-oci kill --all id 9",
            "hull-oci kill id SIGTERM",
            "hull-oci delete --force id",
            "hull-oci exec --process /p --detach --pid-file /p --console-socket /c id",
            "hull-oci exec -d -t -u 1:2 --additional-gids 3 -g 4 --cap CAP_SYS_ADMIN --cwd /tmp -e A=b --no-new-privs id ls -l --all",
            "hull-oci exec --apparmor p --process-label l --ignore-paused --cgroup x --preserve-fds=1 id sh",
            "hull-oci ps --format json id",
            "hull-oci update --resources=- id",
            "hull-oci update --memory 64m --cpu-quota 1000 --pids-limit 5 id",
            "hull-oci events --stats id",
            "hull-oci events --interval 1s id",
            "hull-oci list --format json -q",
            "hull-oci spec --bundle /b --rootless",
            "hull-oci checkpoint --image-path /i --work-path /w --leave-running id",
            "hull-oci restore -d --bundle /b --image-path /i --pid-file /p id",
            "hull-oci run -d --keep --no-subreaper --pid-file /p -b /b id",
            "hull-oci features",
            "hull-oci -v",
        ] {
            assert!(parse(line).is_ok(), "{line}: {:?}", parse(line).err());
        }
        assert!(parse("hull-oci create --nonsense id").is_err());
    }
}
