//! `hull cp`: files between this host and a container, by docker's rules.
//!
//! ```text
//! container ── tar over vsock ──► unpack ──► files of this host      confined to the destination, see `unpack`
//! files of this host ──► pack ── tar over vsock ──► container        confined to the container's root by the agent
//! ```

mod pack;
mod unpack;

use std::{
    ffi::{OsStr, OsString},
    io::{self, IsTerminal as _},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail};
use clap::Args;
use rustix::fs::FileType;
use sandbox::{ContainerRecord, Directories, Runtime};

use self::{
    pack::{Packing, pack},
    unpack::Destination,
};

/// Copy files between a container and this host.
///
/// One of SOURCE and DESTINATION is CONTAINER:PATH; the other is a path here, or - for a tar archive on stdin or stdout. As with
/// docker, a directory goes into a destination that is one, SOURCE/. copies its content only, and DESTINATION/ must be there.
#[derive(Debug, Args)]
pub struct Cp {
    /// Keep owners, and set-id bits; otherwise files belong to you here, and to root in the container
    #[arg(short, long)]
    archive: bool,
    /// Copy what SOURCE points to if it is a link
    #[arg(short = 'L', long)]
    follow_link: bool,
    /// Say nothing; accepted for docker's sake
    #[arg(short, long)]
    quiet: bool,
    /// CONTAINER:PATH, PATH or -
    source: String,
    /// CONTAINER:PATH, PATH or -
    destination: String,
}

/// One side of a copy.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Side {
    Container { name: String, path: String },
    Host(PathBuf),
    Stream,
}

impl Side {
    /// As docker: what begins with a slash or a dot is a path of this host, colons or not.
    fn parse(text: &str) -> Self {
        if text == "-" {
            return Self::Stream;
        }
        match text.split_once(':') {
            Some((name, path)) if !name.is_empty() && !name.contains('/') && !name.starts_with('.') => {
                Self::Container {
                    name: name.to_owned(),
                    path: absolute(path),
                }
            }
            _ => Self::Host(text.into()),
        }
    }
}

/// Paths of a container are relative to its root.
fn absolute(path: &str) -> String {
    if path.starts_with('/') {
        path.to_owned()
    } else {
        format!("/{path}")
    }
}

/// Whether only the content of a directory is meant.
fn means_content(path: &str) -> bool {
    path.ends_with("/.") || path == "."
}

/// Whether a path can only be a directory.
fn must_be_directory(path: &str) -> bool {
    path.ends_with('/') || means_content(path)
}

/// A container's path without what its end says about it; at least the root.
fn trimmed(path: &str) -> &str {
    let path = path.strip_suffix("/.").unwrap_or(path);
    let path = path.trim_end_matches('/');
    if path.is_empty() { "/" } else { path }
}

/// The last component of a container's path; nothing for the root.
fn base_name(path: &str) -> Option<&str> {
    trimmed(path).rsplit('/').next().filter(|name| !name.is_empty())
}

fn parent(path: &str) -> &str {
    match trimmed(path).rsplit_once('/') {
        Some(("", _)) | None => "/",
        Some((parent, _)) => parent,
    }
}

/// What is at a path of a container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum There {
    Directory,
    Other,
}

fn look(
    runtime: &Runtime,
    record: &ContainerRecord,
    path: &str,
    follow: bool,
) -> anyhow::Result<Option<There>> {
    let stat = runtime.stat_path(record, trimmed(path), follow)?;
    Ok(stat.map(|stat| match FileType::from_raw_mode(stat.mode) {
        FileType::Directory => There::Directory,
        _ => There::Other,
    }))
}

fn tell_skipped(skipped: &[PathBuf]) {
    for path in skipped {
        eprintln!(
            "hull: {} was left out: device nodes and sockets are not copied",
            path.display()
        );
    }
}

impl Cp {
    /// Copies.
    pub fn execute(self) -> anyhow::Result<u8> {
        let runtime = Runtime::open(&Directories::from_environment())?;
        match (Side::parse(&self.source), Side::parse(&self.destination)) {
            (Side::Container { name, path }, Side::Host(to)) => {
                self.to_host(&runtime, &runtime.find(&name)?, &path, &to)?;
            }
            (Side::Container { name, path }, Side::Stream) => {
                if io::stdout().is_terminal() {
                    bail!("refusing to write an archive to a terminal; redirect stdout");
                }
                let mut archive = runtime.archive(&runtime.find(&name)?, trimmed(&path), self.follow_link)?;
                io::copy(&mut archive, &mut io::stdout().lock()).context("copying the archive to stdout")?;
            }
            (Side::Host(from), Side::Container { name, path }) => {
                self.to_container(&runtime, &runtime.find(&name)?, &from, &path)?;
            }
            (Side::Stream, Side::Container { name, path }) => {
                let record = runtime.find(&name)?;
                match look(&runtime, &record, &path, true)? {
                    Some(There::Directory) => {}
                    Some(There::Other) => bail!("{name}:{path} is not a directory; an archive needs one"),
                    None => bail!("{name}:{path} does not exist; an archive needs a directory"),
                }
                runtime.extract(&record, trimmed(&path), self.archive, io::stdin())?;
            }
            (Side::Container { .. }, Side::Container { .. }) => {
                bail!("copying between containers is not supported; copy to this host first")
            }
            _ => bail!("must specify at least one container source: CONTAINER:PATH on one side"),
        }
        Ok(0)
    }

    fn to_host(
        &self,
        runtime: &Runtime,
        record: &ContainerRecord,
        from: &str,
        to: &Path,
    ) -> anyhow::Result<()> {
        // A slash at the end goes through a link.
        let follow = self.follow_link || must_be_directory(from);
        let Some(there) = look(runtime, record, from, follow)? else {
            bail!("could not find the file {from} in container {}", record.name);
        };
        let source_is_directory = there == There::Directory;
        if must_be_directory(from) && !source_is_directory {
            bail!("{}:{from} is not a directory", record.name);
        }
        let (directory, name) = host_target(from, source_is_directory, to)?;
        let destination = Destination::open(&directory, name, self.archive)
            .with_context(|| format!("opening {}", directory.display()))?;
        let archive = runtime.archive(record, trimmed(from), follow)?;
        let skipped = destination
            .unpack(archive)
            .with_context(|| format!("copying to {}", to.display()))?;
        tell_skipped(&skipped);
        Ok(())
    }

    fn to_container(
        &self,
        runtime: &Runtime,
        record: &ContainerRecord,
        from: &Path,
        to: &str,
    ) -> anyhow::Result<()> {
        let shown = from.to_string_lossy();
        let follow = self.follow_link || must_be_directory(&shown);
        let found = if follow {
            from.metadata()
        } else {
            from.symlink_metadata()
        };
        let found = found.with_context(|| format!("copying {shown}"))?;
        if must_be_directory(&shown) && !found.is_dir() {
            bail!("{shown} is not a directory");
        }
        let there = look(runtime, record, to, true)?;
        let (directory, name) = container_target(record, &shown, from, found.is_dir(), to, there)?;
        let packing = Packing {
            name: name.as_deref(),
            follow,
            keep_owners: self.archive,
        };
        let (reader, writer) = io::pipe().context("making a pipe")?;
        std::thread::scope(|scope| {
            let packer = scope.spawn(|| pack(writer, from, packing));
            let extracted = runtime.extract(record, &directory, self.archive, reader);
            let packed = packer
                .join()
                .unwrap_or_else(|_| Err(io::Error::other("packing panicked")));
            // Where the container refuses, the packer only sees that nobody reads any more.
            match (packed, extracted) {
                (Err(error), Ok(())) => Err(error).with_context(|| format!("reading {shown}")),
                (Err(error), Err(_)) if error.kind() != io::ErrorKind::BrokenPipe => {
                    Err(error).with_context(|| format!("reading {shown}"))
                }
                (_, Err(error)) => Err(error.into()),
                (Ok(skipped), Ok(())) => {
                    tell_skipped(&skipped);
                    Ok(())
                }
            }
        })
    }
}

/// The directory of this host that an archive is unpacked in, and what its first entry is called there; nothing if its content
/// goes into the directory itself.
fn host_target(
    from: &str,
    source_is_directory: bool,
    to: &Path,
) -> anyhow::Result<(PathBuf, Option<OsString>)> {
    let shown = to.to_string_lossy();
    // The user's own links are followed: this is about what the destination is, the archive comes later.
    match to.metadata() {
        Ok(found) if found.is_dir() => {
            // The root has no name to go by: its content goes into the directory.
            let name = base_name(from).filter(|_| !(means_content(from) && source_is_directory));
            Ok((to.to_owned(), name.map(OsString::from)))
        }
        Ok(_) if source_is_directory => bail!("cannot copy a directory to the file {shown}"),
        Ok(_) if must_be_directory(&shown) => bail!("{shown} is not a directory"),
        Ok(_) => {
            let real = to.canonicalize().with_context(|| shown.clone().into_owned())?;
            let name = real.file_name().map(OsStr::to_owned);
            Ok((real.parent().unwrap_or(Path::new("/")).to_owned(), name))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            if must_be_directory(&shown) && !source_is_directory {
                bail!("the directory {shown} does not exist");
            }
            let name = to
                .file_name()
                .with_context(|| format!("{shown} does not exist"))?;
            let directory = match to.parent() {
                Some(parent) if !parent.as_os_str().is_empty() => parent,
                _ => Path::new("."),
            };
            if !directory.is_dir() {
                bail!(
                    "the directory {} does not exist; make it first",
                    directory.display()
                );
            }
            Ok((directory.to_owned(), Some(name.to_owned())))
        }
        Err(error) => Err(error).context(shown.into_owned()),
    }
}

/// The directory of a container that an archive is unpacked in, and what the source is called there; nothing if its content
/// goes into the directory itself.
fn container_target(
    record: &ContainerRecord,
    shown: &str,
    from: &Path,
    source_is_directory: bool,
    to: &str,
    there: Option<There>,
) -> anyhow::Result<(String, Option<OsString>)> {
    let named = format!("{}:{to}", record.name);
    match there {
        Some(There::Directory) => {
            if source_is_directory && means_content(shown) {
                return Ok((trimmed(to).to_owned(), None));
            }
            let real = from.canonicalize().with_context(|| format!("copying {shown}"))?;
            // Nothing for this host's root: then it is its content.
            let name = from.file_name().or(real.file_name());
            Ok((trimmed(to).to_owned(), name.map(OsStr::to_owned)))
        }
        Some(_) if source_is_directory => bail!("cannot copy a directory to the file {named}"),
        Some(_) if must_be_directory(to) => bail!("{named} is not a directory"),
        None if must_be_directory(to) && !source_is_directory => {
            bail!("the directory {named} does not exist")
        }
        _ => {
            let name = base_name(to).with_context(|| format!("{named} does not exist"))?;
            Ok((parent(to).to_owned(), Some(name.into())))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sides_are_told_apart_as_docker_does() {
        let container = |name: &str, path: &str| Side::Container {
            name: name.into(),
            path: path.into(),
        };
        for (text, side) in [
            ("-", Side::Stream),
            ("box:/etc", container("box", "/etc")),
            ("box:etc", container("box", "/etc")),
            ("box:/a:b", container("box", "/a:b")),
            ("/a:b", Side::Host("/a:b".into())),
            ("./a:b", Side::Host("./a:b".into())),
            ("dir/a:b", Side::Host("dir/a:b".into())),
            ("file", Side::Host("file".into())),
            (":x", Side::Host(":x".into())),
        ] {
            assert_eq!(Side::parse(text), side, "{text}");
        }
    }

    #[test]
    fn end_of_a_path_says_what_is_meant() {
        assert!(means_content("/etc/.") && must_be_directory("/etc/"));
        assert!(!means_content("/etc/a.") && !must_be_directory("/etc"));
        assert_eq!(
            (trimmed("/etc/."), trimmed("/"), trimmed("/.")),
            ("/etc", "/", "/")
        );
        assert_eq!((base_name("/a/b/"), base_name("/")), (Some("b"), None));
        assert_eq!((parent("/a/b"), parent("/a"), parent("/")), ("/a", "/", "/"));
    }

    #[test]
    fn destination_here_follows_dockers_rules() {
        let scratch = tempfile::tempdir().unwrap();
        let dir = scratch.path().join("dir");
        let file = scratch.path().join("file");
        std::fs::create_dir(&dir).unwrap();
        std::fs::write(&file, "").unwrap();
        let some = |name: &str| Some(OsString::from(name));
        let new = scratch.path().join("new");
        // A file: into a directory, over a file, to a new name.
        assert_eq!(
            host_target("/a/x", false, &dir).unwrap(),
            (dir.clone(), some("x"))
        );
        assert_eq!(host_target("/a/x", false, &file).unwrap().1, some("file"));
        assert_eq!(host_target("/a/x", false, &new).unwrap().1, some("new"));
        // A directory: into a directory, as a new one, its content.
        assert_eq!(host_target("/a/x", true, &dir).unwrap(), (dir.clone(), some("x")));
        assert_eq!(host_target("/a/x/.", true, &dir).unwrap(), (dir.clone(), None));
        assert_eq!(host_target("/a/x/.", true, &new).unwrap().1, some("new"));
        assert!(host_target("/a/x", true, &file).is_err());
        // What can't be.
        let slash = scratch.path().join("new/");
        assert!(host_target("/a/x", false, &slash).is_err());
        assert!(host_target("/a/x", false, &scratch.path().join("no/new")).is_err());
    }
}
