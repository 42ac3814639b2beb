//! Being attached to a container, the same for `run`, `start --attach` and `attach`.

use std::io::IsTerminal as _;

use sandbox::{
    Attachment, ContainerExit, ContainerRecord, DetachKeys, Ended, Runtime, Session, SessionOptions, Signals,
    Window,
};

use crate::terminal;

/// Tells the user something while everything goes on. The terminal may be in raw mode, where a line needs both ends.
fn warn(message: &str) {
    eprint!("hull: {message}\r\n");
}

/// Stays attached until the container has ended or the user detaches: `None`.
pub fn drive(
    runtime: &Runtime,
    record: &ContainerRecord,
    session: Session,
    attachment: Attachment,
    signals: &Signals,
    (proxy_signals, detach_keys): (bool, DetachKeys),
) -> anyhow::Result<Option<ContainerExit>> {
    let tty = record.spec.process.terminal;
    let typed = tty && attachment.stdin && std::io::stdin().is_terminal();
    let raw = if typed { terminal::RawMode::enter() } else { None };
    let ended = session.drive(SessionOptions {
        signals,
        proxy_signals,
        window: tty.then_some(terminal::size as Window),
        detach_keys: typed.then_some(detach_keys),
        warn,
    });
    drop(raw);
    match ended? {
        Ended::Exited(exit) => Ok(Some(exit)),
        Ended::Unknown => Ok(Some(runtime.last_exit(&record.id)?)),
        Ended::Detached => Ok(None),
    }
}

/// The exit code of a front-end whose container has ended; says what people should know about it.
pub fn report(exit: &ContainerExit) -> u8 {
    if let Some(error) = &exit.error {
        eprintln!("hull: {error}");
    } else if exit.oom_killed {
        eprintln!(
            "hull: the kernel ended the container's process for want of memory; give it more by --memory"
        );
    }
    exit.code
}
