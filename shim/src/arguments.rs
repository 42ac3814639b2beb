//! The command line containerd gives a shim, in the syntax of Go's flag package.
//!
//! `-name value`, `-name=value`, one dash or two; flags that are switches take no value of their own. The first word that is no
//! flag is the action, and what follows it is ignored, as Go's package does.

use std::path::PathBuf;

use crate::error::{Result, ShimError};

/// What the shim is asked to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Make sure a shim serves this container, and print its address.
    Start,
    /// Remove what a container left, and print how it ended.
    Delete,
    /// Be the resident shim; its listening socket is standard input.
    Serve,
    /// Print the version.
    Version,
    /// Print what the runtime is, for containerd 2.
    Info,
}

/// What stands on the command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Arguments {
    pub action: Action,
    pub namespace: String,
    pub id: String,
    /// containerd's own address.
    pub address: String,
    /// The container's bundle; the working directory without.
    pub bundle: Option<PathBuf>,
    /// containerd's program. Events go over its ttRPC socket instead.
    pub publish_binary: String,
    pub debug: bool,
}

impl Arguments {
    /// Reads the words after the program's name.
    pub fn parse(words: impl IntoIterator<Item = String>) -> Result<Self> {
        let mut arguments = Self {
            action: Action::Serve,
            namespace: String::new(),
            id: String::new(),
            address: String::new(),
            bundle: None,
            publish_binary: String::new(),
            debug: false,
        };
        let mut words = words.into_iter();
        while let Some(word) = words.next() {
            let Some(flag) = word.strip_prefix("--").or_else(|| word.strip_prefix('-')) else {
                arguments.action = action(&word)?;
                break;
            };
            let (name, value) = match flag.split_once('=') {
                Some((name, value)) => (name, Some(value.to_owned())),
                None => (flag, None),
            };
            match name {
                "debug" => arguments.debug = switch(name, value.as_deref())?,
                "v" | "version" if switch(name, value.as_deref())? => arguments.action = Action::Version,
                "info" if switch(name, value.as_deref())? => arguments.action = Action::Info,
                "v" | "version" | "info" => {}
                _ => {
                    let value = value.or_else(|| words.next());
                    arguments.set(
                        name,
                        value.ok_or_else(|| usage(format!("-{name} needs a value")))?,
                    )?;
                }
            }
            if matches!(arguments.action, Action::Version | Action::Info) {
                return Ok(arguments);
            }
        }
        for (flag, value) in [("namespace", &arguments.namespace), ("id", &arguments.id)] {
            if value.is_empty() {
                return Err(usage(format!("-{flag} is missing")));
            }
            // They become names of folders.
            if value.contains('/') || value.starts_with('.') || value.contains('\0') {
                return Err(usage(format!("-{flag} {value:?} can't be the name of a folder")));
            }
        }
        Ok(arguments)
    }

    fn set(&mut self, name: &str, value: String) -> Result<()> {
        match name {
            "namespace" => self.namespace = value,
            "id" => self.id = value,
            "address" => self.address = value,
            "bundle" => self.bundle = Some(PathBuf::from(value)),
            "publish-binary" => self.publish_binary = value,
            // The socket of shims that bind it themselves; ours is inherited.
            "socket" => {}
            _ => return Err(usage(format!("there is no flag -{name}"))),
        }
        Ok(())
    }
}

fn action(word: &str) -> Result<Action> {
    match word {
        "start" => Ok(Action::Start),
        "delete" => Ok(Action::Delete),
        _ => Err(usage(format!(
            "there is no action {word:?}, only start and delete"
        ))),
    }
}

fn switch(name: &str, value: Option<&str>) -> Result<bool> {
    match value {
        None | Some("true" | "1" | "t" | "T") => Ok(true),
        Some("false" | "0" | "f" | "F") => Ok(false),
        Some(value) => Err(usage(format!("-{name}={value} is neither true nor false"))),
    }
}

fn usage(problem: String) -> ShimError {
    ShimError::Usage { problem }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Arguments> {
        Arguments::parse(line.split(' ').filter(|word| !word.is_empty()).map(str::to_owned))
    }

    #[test]
    fn line_of_containerd_is_understood() {
        let line =
            "-namespace default -address /run/c.sock -publish-binary /usr/bin/containerd -id c1 -debug start";
        let arguments = parse(line).unwrap();
        assert_eq!(arguments.action, Action::Start);
        assert_eq!(
            (
                arguments.namespace.as_str(),
                arguments.id.as_str(),
                arguments.debug
            ),
            ("default", "c1", true)
        );
    }

    #[test]
    fn values_may_follow_an_equals_sign_and_two_dashes() {
        let arguments = parse("--namespace=k8s.io -id=x -bundle /b -debug=false delete").unwrap();
        assert_eq!(arguments.bundle.as_deref(), Some(std::path::Path::new("/b")));
        assert!(!arguments.debug && arguments.action == Action::Delete);
    }

    #[test]
    fn version_and_info_need_nothing_else() {
        assert_eq!(parse("-v").unwrap().action, Action::Version);
        assert_eq!(parse("-info").unwrap().action, Action::Info);
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (line, named) in [
            ("-namespace n start", "-id"),
            ("-namespace n -id c1 stop", "stop"),
            ("-namespace n -id ../c1 start", "../c1"),
            ("-colour red", "-colour"),
            ("-namespace", "-namespace"),
        ] {
            let message = parse(line).unwrap_err().to_string();
            assert!(message.contains(named), "{line}: {message}");
        }
    }

    proptest::proptest! {
        #[test]
        fn no_command_line_makes_the_parser_panic(words in proptest::collection::vec(".{0,12}", 0..8)) {
            drop(Arguments::parse(words));
        }
    }
}
