//! `hull run`

use std::{fs, io::IsTerminal as _, path::PathBuf, time::Instant};

use anyhow::{Context as _, bail};
use clap::Args;
use sandbox::{
    Components, ContainerSpec, Directories, ProcessSpec, Runtime, Sandbox, SandboxError, Signals,
    StartOptions, Timing, attach::AttachOptions, rootfs::RootfsSpec,
};

use crate::{image, output, terminal};

/// Memory of a microVM unless told otherwise. What the guest doesn't use, or frees, stays with the host.
const DEFAULT_MEMORY: &str = "512m";

/// Run a command in a new container, in a microVM of its own.
///
/// IMAGE is the name or id of an image in the store (`hull images`), or where one is: oci:DIR[:TAG],
/// oci-archive:FILE[:TAG], docker-archive:FILE[:NAME]. The container, its files included, is gone when the
/// command has ended.
#[derive(Debug, Args)]
pub struct Run {
    /// Keep stdin open: the command reads what hull reads
    #[arg(short, long)]
    interactive: bool,
    /// Give the command a terminal
    #[arg(short, long)]
    tty: bool,
    /// Remove the container when it ends; always done, as it is kept in memory only
    #[arg(long)]
    rm: bool,
    /// Name of the container
    #[arg(long)]
    name: Option<String>,
    /// Memory of the microVM, in bytes or with a suffix b, k, m, g; the guest gives back what it doesn't use
    #[arg(short, long, default_value = DEFAULT_MEMORY, value_parser = parse_memory)]
    memory: Memory,
    /// CPUs; the microVM has that many vCPUs, rounded up
    #[arg(long, default_value = "1", value_parser = parse_cpus)]
    cpus: Cpus,
    /// Set an environment variable: NAME=VALUE, or NAME to take it from here
    #[arg(short, long)]
    env: Vec<String>,
    /// Read environment variables from a file, one a line
    #[arg(long)]
    env_file: Vec<PathBuf>,
    /// Working directory of the command
    #[arg(short, long)]
    workdir: Option<String>,
    /// User, and group, of the command: NAME|UID[:GROUP|GID]
    #[arg(short, long)]
    user: Option<String>,
    /// Program to run in place of the image's entrypoint
    #[arg(long)]
    entrypoint: Option<String>,
    /// Hostname of the container
    #[arg(long)]
    hostname: Option<String>,
    /// Mount the container's root filesystem read-only
    #[arg(long)]
    read_only: bool,
    /// Mount a tmpfs: PATH[:OPTIONS]
    #[arg(long)]
    tmpfs: Vec<String>,
    /// Say on stderr how long each step took
    #[arg(long, value_name = "FORMAT", num_args = 0..=1, require_equals = true, default_missing_value = "table")]
    timing: Option<output::Format>,
    /// The image, and the command to run in place of the image's
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true, value_names = ["IMAGE", "COMMAND"], num_args = 1..)]
    image_and_command: Vec<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Memory {
    mib: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Cpus {
    vcpus: u8,
}

fn parse_memory(text: &str) -> Result<Memory, String> {
    let lower = text.to_ascii_lowercase();
    let lower = lower.strip_suffix('b').unwrap_or(&lower);
    let lower = lower.strip_suffix('i').unwrap_or(lower);
    let digits = lower.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit: u64 = match &lower[digits.len()..] {
        "" => 1,
        "k" => 1 << 10,
        "m" => 1 << 20,
        "g" => 1 << 30,
        "t" => 1 << 40,
        _ => return Err("expected a number with a suffix b, k, m or g, as in 512m".into()),
    };
    let number: u64 = digits
        .parse()
        .map_err(|_| "expected a number with a suffix b, k, m or g, as in 512m")?;
    let bytes = number.checked_mul(unit).ok_or("more than can be counted")?;
    Ok(Memory {
        mib: bytes.div_ceil(1 << 20),
    })
}

fn parse_cpus(text: &str) -> Result<Cpus, String> {
    let number: f64 = text.parse().map_err(|_| "expected a number, as in 1.5")?;
    if !(number > 0.0 && number <= 16.0) {
        return Err("expected a number above 0 and up to 16".into());
    }
    let vcpus = (1..=16_u8)
        .find(|vcpus| f64::from(*vcpus) >= number)
        .unwrap_or(16);
    Ok(Cpus { vcpus })
}

/// Reads variables as docker does: comments and empty lines are skipped, a bare name is taken from here.
fn read_env_file(path: &PathBuf) -> anyhow::Result<Vec<String>> {
    let text = fs::read_to_string(path).with_context(|| format!("--env-file {}", path.display()))?;
    let lines = text
        .lines()
        .map(str::trim_start)
        .filter(|line| !line.is_empty() && !line.starts_with('#'));
    Ok(lines.map(str::to_owned).collect())
}

/// A bare name takes its value from here, and vanishes if there is none.
pub fn resolve_env(entries: &[String]) -> Vec<String> {
    let resolve = |entry: &String| {
        if entry.contains('=') {
            return Some(entry.clone());
        }
        std::env::var(entry).ok().map(|value| format!("{entry}={value}"))
    };
    entries.iter().filter_map(resolve).collect()
}

fn parse_tmpfs(text: &str) -> Result<(String, Vec<String>), SandboxError> {
    let (path, options) = text.split_once(':').unwrap_or((text, ""));
    if !path.starts_with('/') {
        return Err(SandboxError::InvalidOption {
            option: "--tmpfs",
            problem: format!("{path:?} is not an absolute path"),
        });
    }
    Ok((
        path.to_owned(),
        options
            .split(',')
            .filter(|option| !option.is_empty())
            .map(str::to_owned)
            .collect(),
    ))
}

/// Whatever goes wrong before the command runs and isn't the command's fault is 125.
pub fn failure_code(error: Option<&SandboxError>) -> u8 {
    error.map_or(125, SandboxError::exit_code)
}

impl Run {
    /// Runs it; the exit code is the command's.
    pub fn execute(self, started: Instant) -> anyhow::Result<u8> {
        if self.tty && self.interactive && !std::io::stdin().is_terminal() {
            bail!("the input device is not a terminal; leave --tty out");
        }
        let directories = Directories::from_environment();
        let runtime = Runtime::open(&directories)?;
        let components = Components::find()?;
        let spec = self.container_spec(&directories)?;
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
        let raw = if self.tty {
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

    fn container_spec(&self, directories: &Directories) -> anyhow::Result<ContainerSpec> {
        let (name, command) = self.image_and_command.split_first().context("no image given")?;
        let image = image::find_or_import(directories, name)?;
        let mut env = Vec::new();
        for path in &self.env_file {
            env.extend(read_env_file(path)?);
        }
        env.extend_from_slice(&self.env);
        let entrypoint = self.entrypoint.as_ref().map(|program| {
            // An empty one takes the image's away, as with docker.
            if program.is_empty() {
                Vec::new()
            } else {
                vec![program.clone()]
            }
        });
        let process = ProcessSpec::compose(
            &image::defaults(&image.config),
            entrypoint,
            command.to_vec(),
            &resolve_env(&env),
            self.workdir.clone(),
            self.user.clone(),
        )?;
        let window = if self.tty { terminal::size() } else { None };
        Ok(ContainerSpec {
            name: self.name.clone(),
            image: name.clone(),
            image_id: image.id.clone(),
            rootfs: RootfsSpec::from(&image),
            process: ProcessSpec {
                terminal: self.tty,
                stdin: self.interactive,
                window,
                ..process
            },
            hostname: self.hostname.clone(),
            read_only: self.read_only,
            tmpfs: self
                .tmpfs
                .iter()
                .map(|text| parse_tmpfs(text))
                .collect::<Result<_, _>>()?,
            vcpus: self.cpus.vcpus,
            memory_mib: self.memory.mib,
            ..ContainerSpec::default()
        })
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_takes_the_suffixes_of_docker() {
        assert_eq!(parse_memory("512m"), Ok(Memory { mib: 512 }));
        assert_eq!(parse_memory("1G"), Ok(Memory { mib: 1024 }));
        assert_eq!(parse_memory("1048577"), Ok(Memory { mib: 2 }));
        assert_eq!(parse_memory("2GiB"), Ok(Memory { mib: 2048 }));
        assert!(parse_memory("much").is_err());
        assert!(parse_memory("99999999999999999999g").is_err());
        assert!(parse_memory("-1m").is_err());
    }

    #[test]
    fn fractions_of_cpus_are_rounded_up() {
        assert_eq!(parse_cpus("0.5"), Ok(Cpus { vcpus: 1 }));
        assert_eq!(parse_cpus("1.5"), Ok(Cpus { vcpus: 2 }));
        assert!(parse_cpus("0").is_err());
        assert!(parse_cpus("NaN").is_err());
        assert!(parse_cpus("17").is_err());
    }

    #[test]
    fn tmpfs_has_a_path_and_options() {
        let (path, options) = parse_tmpfs("/run:size=1m,mode=700").unwrap();
        assert_eq!((path.as_str(), options.len()), ("/run", 2));
        assert!(parse_tmpfs("run").is_err());
    }
}
