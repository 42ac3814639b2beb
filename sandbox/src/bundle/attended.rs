//! A container in the foreground: its caller's signals are its own, and its caller's terminal has its size.

use std::os::fd::AsFd as _;

use rustix::event::PollFlags;

use super::{
    control::Bundles,
    error::Result,
    protocol::{Reply, Request},
    record::BundleExit,
    server::ready,
};
use crate::{SignalEvent, Signals, Window, monitor::Incoming};

/// What is waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Source {
    Monitor,
    Signals,
}

impl Bundles {
    /// Hands signals and sizes on until a container has stopped.
    ///
    /// # Errors
    ///
    /// There is no such container.
    pub fn attend(&self, id: &str, signals: &Signals, window: Option<Window>) -> Result<BundleExit> {
        let Some(mut connection) = self.connect(id)? else {
            return self.wait(id);
        };
        let resize = || {
            let (rows, columns) = window?()?;
            Some(Request::Resize { rows, columns })
        };
        if connection.send(&Request::Wait, &[]).is_err() {
            return self.wait(id);
        }
        if let Some(request) = resize() {
            drop(connection.send(&request, &[]));
        }
        loop {
            match connection.receive::<Reply>() {
                Incoming::Message(Reply::Exited(exit), _) => return Ok(exit),
                // What became of a signal is seen by what the container does.
                Incoming::Message(..) => continue,
                Incoming::Closed => return self.wait(id),
                Incoming::Nothing => {}
            }
            let entries = [
                (Source::Monitor, connection.as_fd(), PollFlags::IN),
                (Source::Signals, signals.as_fd(), PollFlags::IN),
            ];
            if !ready(&entries, None).contains(&Source::Signals) {
                continue;
            }
            while let Some(event) = signals.next() {
                let request = match event {
                    SignalEvent::Resized => resize(),
                    SignalEvent::Forward(signal) => Some(Request::Signal { signal, all: false }),
                };
                if let Some(request) = request {
                    drop(connection.send(&request, &[]));
                }
            }
        }
    }
}
