//! Moves a container's output to its log and to the clients attached to it.
//!
//! Thread: the monitor's only one; nothing here waits. A stream is read as long as every attached client takes its
//! bytes: a client that reads slowly slows the container down, as a pipe would. One that takes nothing for
//! [`STALL_PATIENCE`] while others are attached is let go, so that it can't stop them for ever.
//!
//! Invariant: no buffer is kept between two readings, but for what a slow client has not taken.

use std::{
    io,
    os::{
        fd::{AsFd as _, BorrowedFd},
        unix::net::UnixStream,
    },
    time::{Duration, Instant},
};

use rustix::{
    io::Errno,
    net::{RecvFlags, recv},
};

use crate::log_driver::{LogWriter, OutputStream};

use super::sink::Sink;

/// One reading. Its memory is fresh for each turn, which costs more than a further system call does.
const BUFFER_BYTES: usize = 64 * 1024;
/// Readings before others get their turn.
const READINGS: usize = 64;
/// How long a client may take nothing while others wait for it.
const STALL_PATIENCE: Duration = Duration::from_secs(10);
/// What is kept for a client of a container that has exited already: more than the guest can still have.
const LAST_BACKLOG_BYTES: usize = 8 << 20;

/// Which client; never used twice.
pub(crate) type Token = u64;

/// Something that a client should be told.
#[derive(Debug)]
pub(crate) enum OutputEvent {
    /// The log can't be written; it is tried on.
    LogFailed(io::Error),
    /// A client's descriptor takes no more.
    SinkFailed(Token, Errno),
    /// A client was let go.
    Stalled(Token),
}

#[derive(Debug)]
struct Source {
    stream: UnixStream,
    kind: OutputStream,
    ended: bool,
}

/// A client's descriptors.
#[derive(Debug)]
struct Attached {
    token: Token,
    owner: bool,
    stdout: Option<Sink>,
    stderr: Option<Sink>,
}

impl Attached {
    fn sink(&mut self, kind: OutputStream) -> &mut Option<Sink> {
        match kind {
            OutputStream::Stdout => &mut self.stdout,
            OutputStream::Stderr => &mut self.stderr,
        }
    }

    fn sinks(&self) -> impl Iterator<Item = (OutputStream, &Sink)> {
        let stdout = self.stdout.iter().map(|sink| (OutputStream::Stdout, sink));
        stdout.chain(self.stderr.iter().map(|sink| (OutputStream::Stderr, sink)))
    }
}

/// A container's output.
#[derive(Debug)]
pub(crate) struct Outputs {
    sources: Vec<Source>,
    attached: Vec<Attached>,
    log: LogWriter,
    events: Vec<OutputEvent>,
    /// The container has exited: what comes now is the last, and is taken however slow a client is.
    last: bool,
}

impl Outputs {
    pub(crate) fn new(streams: Vec<(OutputStream, UnixStream)>, log: LogWriter) -> Self {
        let source = |(kind, stream)| Source {
            stream,
            kind,
            ended: false,
        };
        Self {
            sources: streams.into_iter().map(source).collect(),
            attached: Vec::new(),
            log,
            events: Vec::new(),
            last: false,
        }
    }

    pub(crate) fn attach(&mut self, token: Token, owner: bool, stdout: Option<Sink>, stderr: Option<Sink>) {
        self.attached.push(Attached {
            token,
            owner,
            stdout,
            stderr,
        });
    }

    pub(crate) fn detach(&mut self, token: Token) {
        self.attached.retain(|attached| attached.token != token);
    }

    /// The streams to read, by number.
    pub(crate) fn wanted(&self) -> impl Iterator<Item = (usize, BorrowedFd<'_>)> {
        self.sources
            .iter()
            .enumerate()
            .filter(|(_, source)| !source.ended && !self.is_held(source.kind))
            .map(|(index, source)| (index, source.stream.as_fd()))
    }

    /// The descriptors that bytes wait for.
    pub(crate) fn blocked(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        let sinks = self.attached.iter().flat_map(Attached::sinks);
        sinks
            .filter(|(_, sink)| sink.backlog() > 0)
            .map(|(_, sink)| sink.as_fd())
    }

    fn is_held(&self, kind: OutputStream) -> bool {
        let limit = if self.last { LAST_BACKLOG_BYTES } else { 0 };
        let sinks = self.attached.iter().flat_map(Attached::sinks);
        sinks
            .filter(|(of, _)| *of == kind)
            .any(|(_, sink)| sink.backlog() > limit)
    }

    /// Whether every stream has come to its end.
    pub(crate) fn ended(&self) -> bool {
        self.sources.iter().all(|source| source.ended)
    }

    /// Whether a client's bytes wait.
    pub(crate) fn is_blocked(&self) -> bool {
        self.blocked().next().is_some()
    }

    /// Nothing holds back the rest any more.
    pub(crate) fn expect_last(&mut self) {
        self.last = true;
    }

    /// Reads what a stream has; call it when it is readable.
    pub(crate) fn pump(&mut self, index: usize) {
        let Some(kind) = self.sources.get(index).map(|source| source.kind) else {
            return;
        };
        let mut buffer = vec![0; BUFFER_BYTES];
        for _ in 0..READINGS {
            match recv(
                &self.sources[index].stream,
                buffer.as_mut_slice(),
                RecvFlags::DONTWAIT,
            ) {
                Ok((0, _)) => {
                    self.sources[index].ended = true;
                    return;
                }
                Ok((length, _)) => self.deliver(kind, &buffer[..length]),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return,
                // The VMM has gone.
                Err(_) => {
                    self.sources[index].ended = true;
                    return;
                }
            }
            if self.is_held(kind) {
                return;
            }
        }
    }

    fn deliver(&mut self, kind: OutputStream, bytes: &[u8]) {
        if let Some(error) = self.log.write(kind, bytes) {
            self.events.push(OutputEvent::LogFailed(error));
        }
        self.with_sinks(|of, sink| if of == kind { sink.push(bytes) } else { Ok(()) });
    }

    /// Writes what waits for descriptors; call it when one of them is writable.
    pub(crate) fn flush(&mut self) {
        self.with_sinks(|_, sink| sink.flush());
    }

    fn with_sinks(&mut self, mut act: impl FnMut(OutputStream, &mut Sink) -> Result<(), Errno>) {
        let mut readerless = Vec::new();
        for attached in &mut self.attached {
            for kind in [OutputStream::Stdout, OutputStream::Stderr] {
                let slot = attached.sink(kind);
                let Some(Err(errno)) = slot.as_mut().map(|sink| act(kind, sink)) else {
                    continue;
                };
                *slot = None;
                self.events.push(OutputEvent::SinkFailed(attached.token, errno));
                if attached.owner && errno == Errno::PIPE {
                    readerless.push(kind);
                }
            }
        }
        // The owner's reader has gone: the process learns it as it would without a container in between.
        for source in self
            .sources
            .iter()
            .filter(|source| readerless.contains(&source.kind))
        {
            drop(source.stream.shutdown(std::net::Shutdown::Both));
        }
    }

    /// When the first client will have stalled others for too long.
    pub(crate) fn next_stall(&self) -> Option<Instant> {
        if self.attached.len() < 2 {
            return None;
        }
        let sinks = self.attached.iter().flat_map(Attached::sinks);
        let since = sinks.filter_map(|(_, sink)| sink.stalled_since()).min()?;
        Some(since + STALL_PATIENCE)
    }

    /// Lets those go that stall others.
    pub(crate) fn drop_stalled(&mut self) {
        while self.next_stall().is_some_and(|when| when <= Instant::now()) {
            let oldest = self
                .attached
                .iter()
                .filter_map(|attached| {
                    let since = attached
                        .sinks()
                        .filter_map(|(_, sink)| sink.stalled_since())
                        .min()?;
                    Some((since, attached.token))
                })
                .min();
            let Some((_, token)) = oldest else { return };
            self.detach(token);
            self.events.push(OutputEvent::Stalled(token));
        }
    }

    /// Puts the rest of the last lines into the log.
    pub(crate) fn finish_log(&mut self) {
        if let Some(error) = self.log.finish() {
            self.events.push(OutputEvent::LogFailed(error));
        }
    }

    pub(crate) fn take_events(&mut self) -> Vec<OutputEvent> {
        std::mem::take(&mut self.events)
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};

    use rustix::pipe::{PipeFlags, pipe_with};

    use super::*;

    fn outputs() -> (Outputs, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (
            Outputs::new(vec![(OutputStream::Stdout, ours)], LogWriter::nowhere()),
            theirs,
        )
    }

    fn pipe() -> (std::fs::File, Sink) {
        let (read, write) = pipe_with(PipeFlags::NONBLOCK).unwrap();
        (read.into(), Sink::new(write))
    }

    #[test]
    fn every_client_gets_everything() {
        let (mut outputs, mut container) = outputs();
        let ((mut first, a), (mut second, b)) = (pipe(), pipe());
        outputs.attach(1, false, Some(a), None);
        outputs.attach(2, false, Some(b), None);
        container.write_all(b"hello").unwrap();
        outputs.pump(0);
        for reader in [&mut first, &mut second] {
            let mut buffer = [0; 5];
            reader.read_exact(&mut buffer).unwrap();
            assert_eq!(&buffer, b"hello");
        }
        drop(container);
        outputs.pump(0);
        assert!(outputs.ended());
    }

    #[test]
    fn slow_client_holds_the_stream_until_it_reads_or_detaches() {
        let (mut outputs, mut container) = outputs();
        let (_reader, sink) = pipe();
        outputs.attach(1, false, Some(sink), None);
        container.set_nonblocking(true).unwrap();
        while outputs.wanted().next().is_some() {
            drop(container.write(&[0; 65536]));
            outputs.pump(0);
        }
        assert!(outputs.is_blocked());
        // Alone it may take as long as it likes.
        assert_eq!(outputs.next_stall(), None);
        outputs.detach(1);
        assert!(outputs.wanted().next().is_some() && !outputs.is_blocked());
    }

    #[test]
    fn client_that_stalls_others_has_a_deadline() {
        let (mut outputs, mut container) = outputs();
        let ((_stalled, a), (_other, b)) = (pipe(), pipe());
        outputs.attach(1, false, Some(a), None);
        outputs.attach(2, false, None, Some(b));
        container.set_nonblocking(true).unwrap();
        while !outputs.is_blocked() {
            drop(container.write(&[0; 65536]));
            outputs.pump(0);
        }
        assert!(outputs.next_stall().is_some_and(|when| when > Instant::now()));
    }

    #[test]
    fn rest_of_an_exited_container_is_taken_although_a_client_is_slow() {
        let (mut outputs, mut container) = outputs();
        let (_reader, sink) = pipe();
        outputs.attach(1, false, Some(sink), None);
        container.set_nonblocking(true).unwrap();
        while !outputs.is_blocked() {
            drop(container.write(&[0; 65536]));
            outputs.pump(0);
        }
        drop(container);
        outputs.expect_last();
        while outputs.wanted().next().is_some() {
            outputs.pump(0);
        }
        assert!(outputs.ended() && outputs.is_blocked());
    }

    #[test]
    fn owner_without_a_reader_ends_the_stream_and_another_client_only_itself() {
        for owner in [false, true] {
            let (mut outputs, mut container) = outputs();
            let (reader, sink) = pipe();
            drop(reader);
            outputs.attach(1, owner, Some(sink), None);
            container.write_all(b"x").unwrap();
            outputs.pump(0);
            let events = outputs.take_events();
            assert!(
                matches!(events[..], [OutputEvent::SinkFailed(1, Errno::PIPE)]),
                "{events:?}"
            );
            assert_eq!(container.write_all(b"y").is_err(), owner);
        }
    }
}
