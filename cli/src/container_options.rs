//! What `run` and `create` say about a container, and the specification made of it.

use std::{collections::BTreeMap, fs, io::Write as _, path::PathBuf};

use anyhow::{Context as _, bail};
use clap::{Args, ValueEnum};
use sandbox::{
    ContainerSpec, Directories, ProcessSpec, SandboxError, SandboxId, ShareSpec, log_driver::LogConfig,
    rootfs::RootfsSpec,
};

use crate::{
    confinement_options::ConfinementOptions, image, mount_options::MountOptions,
    network_options::NetworkOptions, signal_name, terminal,
};

/// Memory of a microVM unless told otherwise. What the guest doesn't use, or frees, stays with the host.
const DEFAULT_MEMORY: &str = "512m";

/// When an image is fetched.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Pull {
    /// If it isn't in the store
    Missing,
    /// Not at all
    Never,
    /// Each time
    Always,
}

/// The options of a container, the same for `run` and `create`.
#[derive(Debug, Args)]
pub struct ContainerOptions {
    /// Keep stdin open: the command reads what hull reads
    #[arg(short, long)]
    pub interactive: bool,
    /// Give the command a terminal
    #[arg(short, long)]
    pub tty: bool,
    /// Remove the container when it ends
    #[arg(long)]
    pub rm: bool,
    /// Name of the container
    #[arg(long)]
    pub name: Option<String>,
    /// Write the container's id to a file, which must not exist
    #[arg(long, value_name = "FILE")]
    pub cidfile: Option<PathBuf>,
    /// When to fetch the image
    #[arg(long, value_enum, default_value = "missing")]
    pub pull: Pull,
    /// Memory of the microVM, in bytes or with a suffix b, k, m, g; the guest gives back what it doesn't use
    #[arg(short, long, default_value = DEFAULT_MEMORY, value_parser = parse_memory)]
    memory: Memory,
    /// CPUs; the microVM has that many vCPUs, rounded up, and a fraction bounds their time
    #[arg(long, default_value = "1", value_parser = parse_cpus)]
    cpus: Cpus,
    /// Set an environment variable: NAME=VALUE, or NAME to take it from here
    #[arg(short, long)]
    env: Vec<String>,
    /// Read environment variables from a file, one a line
    #[arg(long, value_name = "FILE")]
    env_file: Vec<PathBuf>,
    /// Working directory of the command
    #[arg(short, long, value_name = "DIR")]
    workdir: Option<String>,
    /// User, and group, of the command: NAME|UID[:GROUP|GID]
    #[arg(short, long)]
    user: Option<String>,
    /// Program to run in place of the image's entrypoint
    #[arg(long, value_name = "PROGRAM")]
    entrypoint: Option<String>,
    /// Hostname of the container
    #[arg(long)]
    hostname: Option<String>,
    /// Mount the container's root filesystem read-only
    #[arg(long)]
    read_only: bool,
    /// IMAGE is a directory of the host, which becomes the root filesystem as it is
    #[arg(long)]
    rootfs: bool,
    #[command(flatten)]
    mounts: MountOptions,
    /// Mount a tmpfs: PATH[:OPTIONS]
    #[arg(long, value_name = "PATH")]
    tmpfs: Vec<String>,
    /// Label the container: NAME or NAME=VALUE
    #[arg(short, long)]
    label: Vec<String>,
    /// Signal that asks the container to end; the image's, or TERM
    #[arg(long, value_name = "SIGNAL", value_parser = signal_name::parse)]
    stop_signal: Option<i32>,
    /// Seconds `hull stop` waits before it kills the container [default: 10]
    #[arg(long, value_name = "SECONDS")]
    stop_timeout: Option<u64>,
    /// Where its output is kept: json-file, journald or none
    #[arg(long, value_name = "DRIVER", default_value = "json-file")]
    log_driver: String,
    /// Option of the log driver: max-size=10m, max-file=3 (json-file); tag=NAME (journald)
    #[arg(long, value_name = "NAME=VALUE")]
    log_opt: Vec<String>,
    /// size=N keeps the container's files on disk, in a layer that may grow to N, until it is removed;
    /// otherwise they are in memory, and gone when it ends
    #[arg(long, value_name = "size=N")]
    storage_opt: Vec<String>,
    #[command(flatten)]
    confinement: ConfinementOptions,
    #[command(flatten)]
    network: NetworkOptions,
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
    /// Thousandths of a CPU, where that isn't all of the vCPUs.
    limit_milli: Option<u32>,
}

pub fn parse_bytes(text: &str) -> Result<u64, String> {
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
    Ok(number.checked_mul(unit).ok_or("more than can be counted")?)
}

fn parse_memory(text: &str) -> Result<Memory, String> {
    parse_bytes(text).map(|bytes| Memory {
        mib: bytes.div_ceil(1 << 20),
    })
}

fn parse_cpus(text: &str) -> Result<Cpus, String> {
    let number: f64 = text.parse().map_err(|_| "expected a number, as in 1.5")?;
    if !(0.01..=16.0).contains(&number) {
        return Err("expected a number from 0.01 to 16".into());
    }
    // What the kernel counts by; docker rounds so, too.
    let milli = (1..=16_000_u32).find(|milli| f64::from(*milli) >= number * 1000.0);
    let vcpus = (1..=16_u8).find(|vcpus| f64::from(*vcpus) >= number);
    let vcpus = vcpus.unwrap_or(16);
    Ok(Cpus {
        vcpus,
        limit_milli: milli.filter(|milli| *milli < u32::from(vcpus) * 1000),
    })
}

/// What a container is made from.
#[derive(Debug, Default)]
struct Root {
    id: String,
    rootfs: RootfsSpec,
    defaults: sandbox::ImageDefaults,
    stop_signal: Option<i32>,
}

/// Where `--cidfile` puts the id: made before the container, so that a file in the way stops nothing half-way.
#[derive(Debug)]
pub struct IdFile {
    path: PathBuf,
    file: fs::File,
}

impl IdFile {
    /// Writes the id.
    pub fn write(mut self, id: &SandboxId) -> anyhow::Result<()> {
        self.file
            .write_all(id.as_str().as_bytes())
            .with_context(|| format!("--cidfile {}", self.path.display()))
    }
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

/// The variables of files and options, the options' last.
pub fn read_env(files: &[PathBuf], options: &[String]) -> anyhow::Result<Vec<String>> {
    let mut env = Vec::new();
    for path in files {
        env.extend(read_env_file(path)?);
    }
    env.extend_from_slice(options);
    Ok(env)
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

pub fn parse_label(text: &str) -> Result<(String, String), SandboxError> {
    let (name, value) = text.split_once('=').unwrap_or((text, ""));
    if name.is_empty() {
        return Err(SandboxError::InvalidOption {
            option: "--label",
            problem: format!("{text:?} has no name"),
        });
    }
    Ok((name.to_owned(), value.to_owned()))
}

fn parse_storage(options: &[String]) -> Result<Option<u64>, SandboxError> {
    let mut size = None;
    for option in options {
        let invalid = |problem: String| SandboxError::InvalidOption {
            option: "--storage-opt",
            problem: format!("{option:?}: {problem}"),
        };
        let Some(("size", value)) = option.split_once('=') else {
            return Err(invalid("expected size=N, as in size=10g".into()));
        };
        size = Some(parse_bytes(value).map_err(invalid)?);
    }
    Ok(size)
}

impl ContainerOptions {
    /// The image as the user named it.
    fn image(&self) -> &str {
        self.image_and_command.first().map_or("", String::as_str)
    }

    /// Refuses what can't be done before anything is.
    pub fn check(&self) -> anyhow::Result<()> {
        if let Some(path) = self.cidfile.as_ref().filter(|path| path.exists()) {
            bail!(
                "--cidfile {} exists already; remove it or choose another file",
                path.display()
            );
        }
        Ok(())
    }

    /// Makes the file of `--cidfile`, empty.
    pub fn id_file(&self) -> anyhow::Result<Option<IdFile>> {
        let Some(path) = self.cidfile.clone() else {
            return Ok(None);
        };
        let file = fs::File::create_new(&path).with_context(|| format!("--cidfile {}", path.display()))?;
        Ok(Some(IdFile { path, file }))
    }

    fn process(&self, defaults: &sandbox::ImageDefaults) -> anyhow::Result<ProcessSpec> {
        let env = read_env(&self.env_file, &self.env)?;
        let entrypoint = self.entrypoint.as_ref().map(|program| {
            // An empty one takes the image's away, as with docker.
            if program.is_empty() {
                Vec::new()
            } else {
                vec![program.clone()]
            }
        });
        let process = ProcessSpec::compose(
            defaults,
            entrypoint,
            self.image_and_command.get(1..).unwrap_or_default().to_vec(),
            &resolve_env(&env),
            self.workdir.clone(),
            self.user.clone(),
        )?;
        Ok(ProcessSpec {
            terminal: self.tty,
            stdin: self.interactive,
            window: if self.tty { terminal::size() } else { None },
            ..process
        })
    }

    /// Finds or fetches the image, or takes a directory in its place.
    fn root(&self, directories: &Directories, base: &mut ContainerSpec) -> anyhow::Result<Root> {
        if !self.rootfs {
            let image = image::obtain(directories, self.image(), self.pull)?;
            let stop_signal = image.config.stop_signal.as_ref();
            return Ok(Root {
                stop_signal: stop_signal.and_then(|name| signal_name::parse(name).ok()),
                defaults: image::defaults(&image.config),
                rootfs: RootfsSpec::from(&image),
                id: image.id,
            });
        }
        let source = fs::canonicalize(self.image())
            .with_context(|| format!("--rootfs {}: can't find it", self.image()))?;
        let share = u32::try_from(base.shares.len())?;
        base.shares.push(ShareSpec {
            source,
            read_only: self.read_only,
            recursive: true,
            exclusive: true,
            ..ShareSpec::default()
        });
        Ok(Root {
            rootfs: RootfsSpec {
                share: Some(share),
                ..RootfsSpec::default()
            },
            ..Root::default()
        })
    }

    /// Finds or fetches the image, and composes the container.
    pub fn spec(&self, directories: &Directories) -> anyhow::Result<ContainerSpec> {
        // What needs no image is checked before one is fetched.
        let log = LogConfig::parse(&self.log_driver, &self.log_opt)?;
        let storage_bytes = parse_storage(&self.storage_opt)?;
        let tmpfs = self.tmpfs.iter().map(|text| parse_tmpfs(text));
        let tmpfs = tmpfs.collect::<Result<Vec<_>, _>>()?;
        let labels = self.label.iter().map(|text| parse_label(text));
        let labels = labels.collect::<Result<BTreeMap<_, _>, _>>()?;
        let network = self.network.spec(directories)?;
        let mut base = ContainerSpec::default();
        self.confinement.apply(&mut base)?;
        self.mounts.apply(&mut base, directories)?;
        let image = self.root(directories, &mut base)?;
        Ok(ContainerSpec {
            name: self.name.clone(),
            image: self.image().to_owned(),
            image_id: image.id,
            rootfs: image.rootfs,
            process: self.process(&image.defaults)?,
            hostname: self.hostname.clone(),
            read_only: self.read_only,
            tmpfs: tmpfs.into_iter().chain(std::mem::take(&mut base.tmpfs)).collect(),
            labels,
            vcpus: self.cpus.vcpus,
            cpu_limit_milli: self.cpus.limit_milli,
            memory_mib: self.memory.mib,
            log,
            storage_bytes,
            stop_signal: self.stop_signal.or(image.stop_signal),
            stop_timeout_s: self.stop_timeout,
            auto_remove: self.rm,
            network,
            ..base
        })
    }
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
    fn fraction_of_a_cpu_is_a_whole_one_with_a_limit() {
        let cpus = |vcpus, limit_milli| Ok(Cpus { vcpus, limit_milli });
        assert_eq!(parse_cpus("0.5"), cpus(1, Some(500)));
        assert_eq!(parse_cpus("1.5"), cpus(2, Some(1500)));
        assert_eq!(parse_cpus("0.01"), cpus(1, Some(10)));
        assert_eq!(parse_cpus("2"), cpus(2, None));
        assert_eq!(parse_cpus("16"), cpus(16, None));
        assert!(parse_cpus("0.001").is_err());
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

    #[test]
    fn labels_and_storage_are_checked_by_name() {
        assert_eq!(parse_label("a=b=c").unwrap(), ("a".into(), "b=c".into()));
        assert_eq!(parse_label("a").unwrap(), ("a".into(), String::new()));
        assert!(parse_label("=b").is_err());
        assert_eq!(parse_storage(&["size=1g".into()]).unwrap(), Some(1 << 30));
        assert!(parse_storage(&["dm.size=1g".into()]).is_err());
        assert!(parse_storage(&["size=big".into()]).is_err());
    }
}
