//! `hull run`

use std::{io::IsTerminal as _, time::Instant};

use anyhow::bail;
use clap::Args;
use sandbox::{
    Components, Directories, Runtime, Sandbox, SandboxError, Signals, StartOptions, Timing,
    attach::AttachOptions,
};

use crate::{container_options::ContainerOptions, output, terminal};

/// Run a command in a new container, in a microVM of its own.
///
/// IMAGE is the name or id of an image in the store (`hull images`), or where one is: oci:DIR[:TAG],
/// oci-archive:FILE[:TAG], docker-archive:FILE[:NAME].
#[derive(Debug, Args)]
pub struct Run {
    /// Say on stderr how long each step took
    #[arg(long, value_name = "FORMAT", num_args = 0..=1, require_equals = true, default_missing_value = "table")]
    timing: Option<output::Format>,
    #[command(flatten)]
    container: ContainerOptions,
}

/// Whatever goes wrong before the command runs and isn't the command's fault is 125.
pub fn failure_code(error: Option<&SandboxError>) -> u8 {
    error.map_or(125, SandboxError::exit_code)
}

impl Run {
    /// Runs it; the exit code is the command's.
    pub fn execute(self, started: Instant) -> anyhow::Result<u8> {
        if self.container.tty && self.container.interactive && !std::io::stdin().is_terminal() {
            bail!("the input device is not a terminal; leave --tty out");
        }
        let directories = Directories::from_environment();
        let runtime = Runtime::open(&directories)?;
        let components = Components::find()?;
        let spec = self.container.spec(&directories)?;
        // From here on a signal doesn't end this process but what it is doing.
        let signals = Signals::take()?;
        let options = StartOptions {
            signals: Some(&signals),
            client_time: started.elapsed(),
        };
        let mut sandbox = Sandbox::create(&runtime, &components, &spec, options)?;
        let attach = AttachOptions {
            signals: &signals,
            window: terminal::size,
        };
        let raw = if self.container.tty {
            terminal::RawMode::enter()
        } else {
            None
        };
        let result = sandbox.run(attach);
        drop(raw);
        let timing = sandbox.remove();
        if let Some(format) = self.timing {
            print_timing(format, &timing)?;
        }
        let exit = result?;
        if exit.oom_killed {
            eprintln!(
                "hull: the kernel ended the container's process for want of memory; give it more by --memory"
            );
        }
        Ok(exit.code)
    }
}

fn print_timing(format: output::Format, timing: &Timing) -> anyhow::Result<()> {
    if format == output::Format::Json {
        eprintln!("{}", serde_json::to_string(timing)?);
        return Ok(());
    }
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
    eprintln!("{}", output::table(&["STEP", "TIME"], rows.to_vec()));
    Ok(())
}
