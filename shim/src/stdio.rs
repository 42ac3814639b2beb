//! A process's standard streams as containerd names them: FIFOs, files, or a logging program.
//!
//! | form | meaning |
//! |---|---|
//! | empty | the stream is not wanted |
//! | `/path`, `fifo:///path` | a FIFO that containerd or its client has made |
//! | `file:///path` | a file, appended to |
//! | `binary:///path?key=value` | a program that is given both outputs, descriptors 3 and 4 |
//!
//! Whoever reads a FIFO may go and come back, as a restarted containerd does: for as long as the process lives somebody here holds
//! the other end too, so neither side sees an end that isn't one. Input ends when its writers have gone *and* containerd has said
//! so by `CloseIO`.
//!
//! Nothing is waited for: an end that nobody has opened yet is opened by us first.

use std::{
    fs::{File, OpenOptions},
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

use rustix::fs::{FileType, Mode, OFlags, fstat, open};

use crate::{
    error::{Result, ShimError},
    log_program::LogProgram,
};

/// What containerd names.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StreamNames {
    pub stdin: String,
    pub stdout: String,
    pub stderr: String,
    pub terminal: bool,
}

/// The descriptors of a process that is to be started.
#[derive(Debug, Default)]
pub struct Streams {
    pub stdin: Option<OwnedFd>,
    pub stdout: Option<OwnedFd>,
    pub stderr: Option<OwnedFd>,
    pub kept: KeptEnds,
}

/// The ends that are held for as long as the process lives.
#[derive(Debug, Default)]
pub struct KeptEnds {
    /// Of stdin's FIFO, until `CloseIO`.
    input: Option<OwnedFd>,
    /// Of the outputs' FIFOs.
    outputs: Vec<OwnedFd>,
    /// What the outputs go to.
    logger: Option<LogProgram>,
}

impl KeptEnds {
    /// Lets the input end when its other writers have gone.
    pub fn close_input(&mut self) {
        self.input = None;
    }

    /// Those of the outputs, to be held by whoever writes them.
    pub fn take_outputs(&mut self) -> Self {
        Self {
            input: None,
            outputs: std::mem::take(&mut self.outputs),
            logger: self.logger.take(),
        }
    }
}

/// Where an output goes.
#[derive(Debug, PartialEq, Eq)]
enum Target<'a> {
    None,
    Fifo(&'a Path),
    File(&'a Path),
    Program(&'a str),
}

impl<'a> Target<'a> {
    fn of(name: &'a str) -> Result<Self> {
        let Some((scheme, rest)) = name.split_once("://") else {
            return Ok(if name.is_empty() {
                Self::None
            } else {
                Self::Fifo(Path::new(name))
            });
        };
        match scheme {
            "fifo" => Ok(Self::Fifo(Path::new(rest))),
            "file" => Ok(Self::File(Path::new(rest))),
            "binary" => Ok(Self::Program(rest)),
            _ => Err(ShimError::Refused {
                field: format!("output {name:?}"),
                problem: "is neither a FIFO, nor file:// or binary://".into(),
            }),
        }
    }
}

impl StreamNames {
    /// Opens what is named; `context` is the container's id and its containerd namespace, for a logging program.
    pub fn open(&self, context: (&str, &str)) -> Result<Streams> {
        let mut streams = Streams::default();
        if !self.stdin.is_empty() {
            let path = self.stdin.strip_prefix("fifo://").unwrap_or(&self.stdin);
            let (read, write) = open_fifo(Path::new(path))?;
            streams.stdin = Some(read);
            streams.kept.input = Some(write);
        }
        if let Target::Program(program) = Target::of(&self.stdout)? {
            let (logger, stdout, stderr) = LogProgram::start(program, context)?;
            streams.stdout = Some(stdout);
            streams.stderr = (!self.terminal).then_some(stderr);
            streams.kept.logger = Some(logger);
            return Ok(streams);
        }
        streams.stdout = open_output(&self.stdout, &mut streams.kept)?;
        if !self.terminal {
            streams.stderr = open_output(&self.stderr, &mut streams.kept)?;
        }
        Ok(streams)
    }
}

fn open_output(name: &str, kept: &mut KeptEnds) -> Result<Option<OwnedFd>> {
    match Target::of(name)? {
        Target::None => Ok(None),
        Target::Fifo(path) => {
            let (read, write) = open_fifo(path)?;
            kept.outputs.push(read);
            Ok(Some(write))
        }
        Target::File(path) => {
            if let Some(folder) = path.parent() {
                std::fs::create_dir_all(folder).map_err(ShimError::io("creating", folder))?;
            }
            let file: File = OpenOptions::new()
                .append(true)
                .create(true)
                .open(path)
                .map_err(ShimError::io("opening", path))?;
            Ok(Some(file.into()))
        }
        Target::Program(_) => Err(ShimError::Refused {
            field: format!("output {name:?}"),
            problem: "a logging program is for both outputs, and is named as stdout".into(),
        }),
    }
}

/// Both ends of a FIFO: reading, writing. Neither blocks, which is a matter of these two descriptors only.
fn open_fifo(path: &Path) -> Result<(OwnedFd, OwnedFd)> {
    let open = |flags: OFlags| {
        let flags = flags | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOCTTY;
        open(path, flags, Mode::empty()).map_err(|errno| ShimError::io("opening", path)(errno.into()))
    };
    // Opened for reading first: opening for writing fails as long as there is no reader.
    let read = open(OFlags::RDONLY)?;
    let stat = fstat(&read).map_err(|errno| ShimError::io("looking at", path)(errno.into()))?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::Fifo {
        return Err(ShimError::Refused {
            field: format!("stream {}", PathBuf::from(path).display()),
            problem: "is no FIFO".into(),
        });
    }
    Ok((read, open(OFlags::WRONLY)?))
}

#[cfg(test)]
mod tests {
    use std::io::{ErrorKind, Read as _, Write as _};

    use super::*;

    fn fifo(folder: &Path, name: &str) -> String {
        let path = folder.join(name);
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        path.display().to_string()
    }

    #[test]
    fn opening_waits_for_nobody_and_a_reader_may_come_back() {
        let folder = tempfile::tempdir().unwrap();
        let names = StreamNames {
            stdout: fifo(folder.path(), "out"),
            ..StreamNames::default()
        };
        let streams = names.open(("c", "ns")).unwrap();
        let mut process = File::from(streams.stdout.unwrap());
        process.write_all(b"one").unwrap();
        let mut buffer = [0; 3];
        File::open(&names.stdout)
            .unwrap()
            .read_exact(&mut buffer)
            .unwrap();
        // That reader has gone; what is written now is there for the next.
        process.write_all(b"two").unwrap();
        File::open(&names.stdout)
            .unwrap()
            .read_exact(&mut buffer)
            .unwrap();
        assert_eq!(&buffer, b"two");
    }

    #[test]
    fn input_ends_only_when_it_is_closed_too() {
        let folder = tempfile::tempdir().unwrap();
        let names = StreamNames {
            stdin: fifo(folder.path(), "in"),
            ..StreamNames::default()
        };
        let mut streams = names.open(("c", "ns")).unwrap();
        let mut process = File::from(streams.stdin.take().unwrap());
        let mut client = OpenOptions::new().write(true).open(&names.stdin).unwrap();
        client.write_all(b"x").unwrap();
        drop(client);
        let mut buffer = [0; 8];
        assert_eq!(process.read(&mut buffer).unwrap(), 1);
        assert_eq!(
            process.read(&mut buffer).unwrap_err().kind(),
            ErrorKind::WouldBlock
        );
        streams.kept.close_input();
        assert_eq!(process.read(&mut buffer).unwrap(), 0);
    }

    #[test]
    fn file_is_appended_to_and_other_schemes_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("logs/c.log");
        let names = StreamNames {
            stdout: format!("file://{}", path.display()),
            stderr: format!("file://{}", path.display()),
            ..StreamNames::default()
        };
        let streams = names.open(("c", "ns")).unwrap();
        File::from(streams.stdout.unwrap()).write_all(b"a").unwrap();
        File::from(streams.stderr.unwrap()).write_all(b"b").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"ab");
        let names = StreamNames {
            stdout: "npipe:///x".into(),
            ..StreamNames::default()
        };
        assert!(names.open(("c", "ns")).unwrap_err().to_string().contains("npipe"));
    }

    #[test]
    fn something_that_is_no_fifo_is_refused() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let names = StreamNames {
            stdin: file.path().display().to_string(),
            ..StreamNames::default()
        };
        assert!(
            names
                .open(("c", "ns"))
                .unwrap_err()
                .to_string()
                .contains("no FIFO")
        );
    }
}
