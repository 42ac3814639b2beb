//! `journald`: the journal's native protocol, one datagram an entry.
//!
//! The fields are those docker's driver sets. A value with a line break in it, or that isn't text, is written with its
//! length. An entry that the journal doesn't take at once is dropped: it must not hold up a container.

use std::{io, os::unix::net::UnixDatagram, path::Path};

use crate::{ContainerRecord, SandboxError};

/// Where the journal listens.
pub(crate) const SOCKET: &str = "/run/systemd/journal/socket";

/// A connection to the journal.
#[derive(Debug)]
pub(crate) struct Journald {
    socket: UnixDatagram,
    /// The fields every entry has.
    common: Vec<u8>,
}

fn field(out: &mut Vec<u8>, name: &str, value: &[u8]) {
    out.extend_from_slice(name.as_bytes());
    if value.contains(&b'\n') {
        out.push(b'\n');
        out.extend_from_slice(&(value.len() as u64).to_le_bytes());
    } else {
        out.push(b'=');
    }
    out.extend_from_slice(value);
    out.push(b'\n');
}

impl Journald {
    pub(crate) fn connect(
        path: &Path,
        record: &ContainerRecord,
        tag: Option<&str>,
    ) -> Result<Self, SandboxError> {
        let error = |source: io::Error| SandboxError::Io {
            action: "--log-driver journald: connecting to",
            path: path.to_owned(),
            source,
        };
        let socket = UnixDatagram::unbound().map_err(error)?;
        socket.connect(path).map_err(error)?;
        socket.set_nonblocking(true).map_err(error)?;
        let mut common = Vec::new();
        for (name, value) in [
            ("SYSLOG_IDENTIFIER", tag.unwrap_or(record.id.short())),
            ("CONTAINER_ID", record.id.short()),
            ("CONTAINER_ID_FULL", record.id.as_str()),
            ("CONTAINER_NAME", &record.name),
            ("CONTAINER_TAG", tag.unwrap_or(record.id.short())),
            ("IMAGE_NAME", &record.spec.image),
        ] {
            field(&mut common, name, value.as_bytes());
        }
        Ok(Self { socket, common })
    }

    /// Writes one line, or a piece of a long one.
    pub(crate) fn write(&self, is_stderr: bool, piece: &[u8]) -> io::Result<()> {
        let (text, partial) = match piece.strip_suffix(b"\n") {
            Some(text) => (text, false),
            None => (piece, true),
        };
        let mut entry = self.common.clone();
        // Docker's: errors for stderr, information for the rest.
        field(&mut entry, "PRIORITY", if is_stderr { b"3" } else { b"6" });
        if partial {
            field(&mut entry, "CONTAINER_PARTIAL_MESSAGE", b"true");
        }
        field(&mut entry, "MESSAGE", text);
        self.socket.send(&entry).map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::container_store::tests::{spec, world};

    #[test]
    fn entry_has_the_fields_of_docker_and_the_message() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let journal = UnixDatagram::bind(&path).unwrap();
        let world = world();
        let (_home, record) = world
            .store
            .create(&world.run.lock().unwrap(), &spec("web"), None)
            .unwrap();
        let log = Journald::connect(&path, &record, Some("tag")).unwrap();
        log.write(true, b"hello\n").unwrap();
        let mut buffer = [0; 4096];
        let length = journal.recv(&mut buffer).unwrap();
        let text = String::from_utf8_lossy(&buffer[..length]);
        for expected in [
            "CONTAINER_NAME=web\n",
            "SYSLOG_IDENTIFIER=tag\n",
            "PRIORITY=3\n",
            "MESSAGE=hello\n",
        ] {
            assert!(text.contains(expected), "{expected} is not in {text}");
        }
        assert!(!text.contains("PARTIAL"));
        log.write(false, b"no end").unwrap();
        let length = journal.recv(&mut buffer).unwrap();
        assert!(String::from_utf8_lossy(&buffer[..length]).contains("CONTAINER_PARTIAL_MESSAGE=true\n"));
    }

    #[test]
    fn value_with_a_line_break_is_written_with_its_length() {
        let mut out = Vec::new();
        field(&mut out, "MESSAGE", b"a\nb");
        assert_eq!(out, b"MESSAGE\n\x03\0\0\0\0\0\0\0a\nb\n");
    }
}
