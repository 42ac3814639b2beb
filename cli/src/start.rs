//! `hull start`

use std::time::Instant;

use anyhow::bail;
use clap::Args;
use sandbox::{
    Attachment, Components, ContainerRecord, DetachKeys, Directories, Runtime, Signals, StartOptions,
    monitor::Launcher,
};

use crate::{attached, output};

/// Start containers that were created or have ended.
///
/// A container's files are as it was created, unless its --storage-opt kept them.
#[derive(Debug, Args)]
pub struct Start {
    /// Attach its output and wait for its end; one container only
    #[arg(short, long)]
    attach: bool,
    /// Attach its input
    #[arg(short, long)]
    interactive: bool,
    /// Keys that detach from it
    #[arg(long, value_name = "KEYS", default_value = "ctrl-p,ctrl-q")]
    detach_keys: String,
    /// Hand signals on to it
    #[arg(long, value_name = "BOOL", default_value_t = true, action = clap::ArgAction::Set)]
    sig_proxy: bool,
    /// Names or ids
    #[arg(required = true)]
    containers: Vec<String>,
}

impl Start {
    /// Starts them.
    pub fn execute(self, started: Instant) -> anyhow::Result<u8> {
        let keys = DetachKeys::parse(&self.detach_keys)?;
        let runtime = Runtime::open(&Directories::from_environment())?;
        let components = Components::find()?;
        if !self.attach && !self.interactive {
            return Ok(output::each(&self.containers, |name| {
                let record = runtime.find(name)?;
                let options = StartOptions {
                    launcher: Launcher::spawn()?,
                    components: &components,
                    attachment: None,
                    signals: None,
                    client_time: started.elapsed(),
                };
                runtime.start(&record, options)?;
                Ok(())
            }));
        }
        let [name] = self.containers.as_slice() else {
            bail!("only one container can be attached to at a time");
        };
        let record = runtime.find(name)?;
        self.start_attached(&runtime, &components, &record, keys, started)
    }

    fn start_attached(
        &self,
        runtime: &Runtime,
        components: &Components,
        record: &ContainerRecord,
        keys: DetachKeys,
        started: Instant,
    ) -> anyhow::Result<u8> {
        let process = &record.spec.process;
        let attachment = Attachment {
            stdin: self.interactive && process.stdin,
            stdout: true,
            stderr: !process.terminal,
            owner: self.interactive,
            output_ends_it: false,
        };
        let launcher = Launcher::spawn()?;
        let signals = Signals::take()?;
        let options = StartOptions {
            launcher,
            components,
            attachment: Some(attachment),
            signals: Some(&signals),
            client_time: started.elapsed(),
        };
        let session = match runtime.start(record, options)? {
            Some(session) => session,
            // It runs already.
            None => runtime.attach(record, attachment)?,
        };
        let exit = attached::drive(
            runtime,
            record,
            session,
            attachment,
            &signals,
            (self.sig_proxy, keys),
        )?;
        Ok(exit.map_or(0, |exit| attached::report(&exit)))
    }
}
