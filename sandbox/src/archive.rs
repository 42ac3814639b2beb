//! Files and processes of a running container, asked from its agent.
//!
//! Archives travel as tar on a stream of their own. Both directions are bounded by what the reader takes: nothing is
//! kept in between.
//!
//! The guest is hostile: what an archive from it says is to be checked by who unpacks it.

use std::{
    io::{self, Read, Write as _},
    net::Shutdown,
    os::unix::net::UnixStream,
};

use agent_protocol::{
    Archive, ArchiveRequest, ContainerRef, ErrorKind, Extract, ExtractRequest, ListProcesses, PathRequest,
    PathStat, ProcessInfo, STDIO_PORT, StatPath,
    stdio::{Stream, StreamHeader},
};

use crate::{
    ContainerRecord, Result, Runtime, SandboxError,
    agent_client::{AgentClient, CALL_TIMEOUT, Pending},
    identity::random_bytes,
};

/// One read or write.
const BUFFER_BYTES: usize = 256 * 1024;

/// A tar archive as it comes out of a container. Its end is its end only if the container said so.
#[derive(Debug)]
pub struct ArchiveReader {
    stream: UnixStream,
    agent: AgentClient,
    answer: Option<Pending<Archive>>,
}

impl Read for ArchiveReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = self.stream.read(buffer)?;
        if length == 0
            && !buffer.is_empty()
            && let Some(answer) = self.answer.take()
        {
            self.agent
                .wait(&answer, Some(CALL_TIMEOUT))
                .map_err(io::Error::other)?;
        }
        Ok(length)
    }
}

fn connection(source: io::Error) -> SandboxError {
    SandboxError::AgentConnection { source }
}

impl Runtime {
    /// What is at a path of a container, `None` where nothing is. Links in the path are resolved in the container's
    /// root, the last one only with `follow`.
    ///
    /// # Errors
    ///
    /// The container isn't running, or the path can't be looked at.
    pub fn stat_path(&self, record: &ContainerRecord, path: &str, follow: bool) -> Result<Option<PathStat>> {
        let answer = self.connect_agent(record)?.call::<StatPath>(&PathRequest {
            container_id: record.id.as_str().to_owned(),
            path: path.to_owned(),
            follow,
            ..PathRequest::default()
        });
        match answer {
            Ok(stat) => Ok(Some(stat)),
            Err(SandboxError::Agent { detail, .. })
                if detail.kind.enum_value_or_default() == ErrorKind::NOT_FOUND =>
            {
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// A path of a container as a tar archive whose first entry is called as the path's last component.
    ///
    /// # Errors
    ///
    /// The container isn't running. What goes wrong later is an error of the reader.
    pub fn archive(&self, record: &ContainerRecord, path: &str, follow: bool) -> Result<ArchiveReader> {
        let mut agent = self.connect_agent(record)?;
        let (stream_id, stream) = self.open_stream(record, Stream::Stdout)?;
        let answer = agent.send::<Archive>(&ArchiveRequest {
            container_id: record.id.as_str().to_owned(),
            stream_id,
            path: path.to_owned(),
            follow,
            ..ArchiveRequest::default()
        })?;
        Ok(ArchiveReader {
            stream,
            agent,
            answer: Some(answer),
        })
    }

    /// Unpacks a tar archive into an existing directory of a container.
    ///
    /// # Errors
    ///
    /// The container isn't running, the archive can't be read, or it can't be unpacked there.
    pub fn extract(
        &self,
        record: &ContainerRecord,
        directory: &str,
        keep_owners: bool,
        mut from: impl Read,
    ) -> Result<()> {
        let mut agent = self.connect_agent(record)?;
        let (stream_id, mut stream) = self.open_stream(record, Stream::Stdin)?;
        let answer = agent.send::<Extract>(&ExtractRequest {
            container_id: record.id.as_str().to_owned(),
            stream_id,
            path: directory.to_owned(),
            keep_kinds: true,
            keep_owners,
            ..ExtractRequest::default()
        })?;
        let mut buffer = vec![0; BUFFER_BYTES];
        let copied = loop {
            let length = match from.read(&mut buffer) {
                Ok(0) => break Ok(()),
                Ok(length) => length,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => break Err(SandboxError::system("reading the archive")(error)),
            };
            // An agent that gave up says why in its answer.
            if stream.write_all(&buffer[..length]).is_err() {
                break Ok(());
            }
        };
        drop(stream.shutdown(Shutdown::Write));
        // However long the container takes to write what is under way.
        let answered = agent.wait(&answer, None).map(drop);
        copied.and(answered)
    }

    /// The processes of a container, as its guest's kernel counts them.
    ///
    /// # Errors
    ///
    /// The container isn't running.
    pub fn processes(&self, record: &ContainerRecord) -> Result<Vec<ProcessInfo>> {
        let answer = self.connect_agent(record)?.call::<ListProcesses>(&ContainerRef {
            container_id: record.id.as_str().to_owned(),
            ..ContainerRef::default()
        })?;
        Ok(answer.processes)
    }

    /// A stream of its own, and the name by which a request means it.
    fn open_stream(&self, record: &ContainerRecord, stream: Stream) -> Result<(String, UnixStream)> {
        let id = format!("{:016x}", u64::from_le_bytes(random_bytes()?));
        let mut connected = self
            .connect_ports(record, &[STDIO_PORT])?
            .pop()
            .ok_or_else(|| connection(io::ErrorKind::NotConnected.into()))?;
        let header = StreamHeader {
            container_id: record.id.as_str().to_owned(),
            exec_id: id.clone(),
            stream,
        };
        connected.write_all(&header.encode()?).map_err(connection)?;
        Ok((id, connected))
    }
}
