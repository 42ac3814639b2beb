//! `hull run`

use std::{io::IsTerminal as _, time::Instant};

use anyhow::bail;
use clap::{Args, ValueEnum};
use sandbox::{
    Attachment, Components, DetachKeys, Directories, Runtime, SandboxError, Signals, StartOptions, Timing,
    monitor::Launcher,
};

use crate::{attached, container_options::ContainerOptions, output};

/// Run a command in a new container, in a microVM of its own.
///
/// IMAGE is the name or id of an image in the store (`hull images`), one of a registry (HOST/NAME[:TAG]), or where one
/// is: oci:DIR[:TAG], oci-archive:FILE[:TAG], docker-archive:FILE[:NAME].
#[derive(Debug, Args)]
pub struct Run {
    /// Leave the container running and print its id
    #[arg(short, long)]
    detach: bool,
    /// Keys that detach from the container
    #[arg(long, value_name = "KEYS", default_value = "ctrl-p,ctrl-q")]
    detach_keys: String,
    /// Attach only these [default: stdout and stderr, and with --interactive stdin]
    #[arg(short, long, value_enum, value_name = "STREAM", conflicts_with = "detach")]
    attach: Vec<StreamName>,
    /// Hand signals on to the command
    #[arg(long, value_name = "BOOL", default_value_t = true, action = clap::ArgAction::Set)]
    sig_proxy: bool,
    /// Say on stderr how long each step took
    #[arg(long, value_name = "FORMAT", num_args = 0..=1, require_equals = true, default_missing_value = "table")]
    timing: Option<output::Format>,
    #[command(flatten)]
    container: ContainerOptions,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum StreamName {
    Stdin,
    Stdout,
    Stderr,
}

/// Whatever goes wrong before the command runs and isn't the command's fault is 125.
pub fn failure_code(error: Option<&SandboxError>) -> u8 {
    error.map_or(125, SandboxError::exit_code)
}

impl Run {
    /// Runs it; the exit code is the command's.
    pub fn execute(mut self, started: Instant) -> anyhow::Result<u8> {
        self.container.check()?;
        // Streams that aren't attached are still the container's: it may be attached to later.
        self.container.interactive |= self.attach.contains(&StreamName::Stdin);
        if !self.detach && self.container.tty && self.container.interactive && !std::io::stdin().is_terminal()
        {
            bail!("the input device is not a terminal; leave --tty out");
        }
        let keys = DetachKeys::parse(&self.detach_keys)?;
        let directories = Directories::from_environment();
        let runtime = Runtime::open(&directories)?;
        let components = Components::find()?;
        // It gets ready while the image is looked for.
        let launcher = Launcher::spawn()?;
        let spec = self.container.spec(&directories)?;
        let id_file = self.container.id_file()?;
        // From here on a signal doesn't end this process but what it is doing.
        let signals = Signals::take()?;
        let attachment = self.attachment();
        let options = StartOptions {
            launcher,
            components: &components,
            attachment,
            signals: Some(&signals),
            client_time: started.elapsed(),
        };
        let (record, session) = runtime.run(&spec, options)?;
        if let Some(file) = id_file {
            file.write(&record.id)?;
        }
        let Some(attachment) = attachment else {
            println!("{}", record.id);
            self.print_timing(session.timing())?;
            return Ok(0);
        };
        // What killed commands left is removed while this one's container works.
        runtime.recover()?;
        let exit = attached::drive(
            &runtime,
            &record,
            session,
            attachment,
            &signals,
            (self.sig_proxy, keys),
        )?;
        let Some(exit) = exit else { return Ok(0) };
        self.print_timing(&exit.timing)?;
        Ok(attached::report(&exit))
    }

    fn attachment(&self) -> Option<Attachment> {
        let container = &self.container;
        let wants = |stream| self.attach.is_empty() || self.attach.contains(&stream);
        (!self.detach).then(|| Attachment {
            stdin: container.interactive && wants(StreamName::Stdin),
            stdout: wants(StreamName::Stdout),
            stderr: wants(StreamName::Stderr) && !container.tty,
            owner: true,
            output_ends_it: container.rm,
        })
    }

    fn print_timing(&self, timing: &Timing) -> anyhow::Result<()> {
        match self.timing {
            None => {}
            Some(output::Format::Json) => eprintln!("{}", serde_json::to_string(timing)?),
            Some(output::Format::Table) => eprintln!("{}", timing_table(timing)),
        }
        Ok(())
    }
}

fn timing_table(timing: &Timing) -> String {
    let milliseconds = |us: u64| format!("{}.{:01} ms", us / 1000, us % 1000 / 100);
    let steps = [
        ("client", timing.client_us),
        ("microVM set up", timing.vm_setup_us),
        ("kernel", timing.kernel_us),
        ("agent", timing.agent_us),
        ("container", timing.container_us),
        ("command", timing.run_us),
        ("teardown", timing.teardown_us),
        ("all", timing.total_us()),
    ];
    let rows = steps.map(|(step, us)| vec![step.to_owned(), milliseconds(us)]);
    output::table(&["STEP", "TIME"], rows.to_vec())
}
