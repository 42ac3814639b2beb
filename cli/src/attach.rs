//! `hull attach`

use clap::Args;
use sandbox::{Attachment, DetachKeys, Directories, Runtime, Signals};

use crate::attached;

/// Attach to a running container: its output comes here, what is typed goes there.
#[derive(Debug, Args)]
pub struct Attach {
    /// Leave its input alone
    #[arg(long)]
    no_stdin: bool,
    /// Keys that detach from it
    #[arg(long, value_name = "KEYS", default_value = "ctrl-p,ctrl-q")]
    detach_keys: String,
    /// Hand signals on to it
    #[arg(long, value_name = "BOOL", default_value_t = true, action = clap::ArgAction::Set)]
    sig_proxy: bool,
    /// Name or id
    container: String,
}

impl Attach {
    /// Attaches; the exit code is the container's, or 0 when detached.
    pub fn execute(self) -> anyhow::Result<u8> {
        let keys = DetachKeys::parse(&self.detach_keys)?;
        let runtime = Runtime::open(&Directories::from_environment())?;
        let record = runtime.find(&self.container)?;
        let signals = Signals::take()?;
        let attachment = Attachment {
            stdin: !self.no_stdin && record.spec.process.stdin,
            stdout: true,
            stderr: !record.spec.process.terminal,
            owner: false,
            output_ends_it: false,
        };
        let session = runtime.attach(&record, attachment)?;
        let exit = attached::drive(
            &runtime,
            &record,
            session,
            attachment,
            &signals,
            (self.sig_proxy, keys),
        )?;
        Ok(exit.map_or(0, |exit| attached::report(&exit)))
    }
}
