//! A container's control group: its limits, its statistics, and the way to kill all of it.

use std::{
    fs::{self, File},
    io::Write as _,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use agent_protocol::{CgroupFile, Resources, StatsResponse};
use nix::errno::Errno;

use crate::{error::AgentError, init};

/// A control group of version 2. Dropping it removes it, which works once it is empty.
#[derive(Debug)]
pub struct Cgroup {
    dir: PathBuf,
}

fn io_errno(error: &std::io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::EIO, Errno::from_raw)
}

impl Cgroup {
    /// Creates the group of a container and sets its limits.
    pub fn create(container_id: &str, resources: &Resources) -> Result<Self, AgentError> {
        let dir = Path::new(init::CGROUP_DIR).join(format!("container-{container_id}"));
        let plain = [
            ("memory.max", resources.memory_max_bytes),
            ("pids.max", resources.pids_max),
        ];
        let plain = plain
            .into_iter()
            .filter(|(_, limit)| *limit != 0)
            .map(|(name, limit)| CgroupFile {
                name: name.to_owned(),
                value: limit.to_string(),
                ..CgroupFile::default()
            });
        let files: Vec<CgroupFile> = plain.chain(resources.files.iter().cloned()).collect();
        enable_controllers(&files)?;
        fs::create_dir(&dir)
            .map_err(|error| AgentError::setup("creating the control group")(io_errno(&error)))?;
        let this = Self { dir };
        this.set(&files)?;
        Ok(this)
    }

    /// Changes limits of a group that is there.
    pub fn update(&self, resources: &Resources) -> Result<(), AgentError> {
        enable_controllers(&resources.files)?;
        self.set(&resources.files)
    }

    /// Writes its files; their controllers are enabled.
    fn set(&self, files: &[CgroupFile]) -> Result<(), AgentError> {
        for CgroupFile {
            name,
            value,
            optional,
            ..
        } in files
        {
            let path = self.dir.join(name);
            if *optional && !path.exists() {
                continue;
            }
            // Never made: what isn't there is no limit of this kernel's.
            File::options()
                .write(true)
                .open(path)
                .and_then(|mut file| file.write_all(value.as_bytes()))
                .map_err(|error| {
                    AgentError::setup(format!("setting {name} of the control group to {value:?}"))(io_errno(
                        &error,
                    ))
                })?;
        }
        Ok(())
    }

    /// Its directory, for a process to be born in.
    pub fn open(&self) -> Result<OwnedFd, AgentError> {
        let file = File::open(&self.dir)
            .map_err(|error| AgentError::setup("opening the control group")(io_errno(&error)))?;
        Ok(file.into())
    }

    /// All processes in it, as the microVM numbers them.
    pub fn pids(&self) -> Vec<u32> {
        let text = fs::read_to_string(self.dir.join("cgroup.procs")).unwrap_or_default();
        text.lines().filter_map(|line| line.parse().ok()).collect()
    }

    /// Kills everything in it at once.
    pub fn kill(&self) -> Result<(), Errno> {
        fs::write(self.dir.join("cgroup.kill"), "1").map_err(|error| io_errno(&error))
    }

    /// Waits until it has no process any more.
    pub fn wait_empty(&self, patience: Duration) {
        let deadline = Instant::now() + patience;
        while !self.is_empty() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// How often the kernel killed something for want of memory: in it if it has a limit of its own, else in
    /// the microVM, which is the container's.
    pub fn oom_kills(&self) -> u64 {
        match fs::read_to_string(self.dir.join("memory.events")) {
            Ok(events) => keyed(&events, "oom_kill"),
            Err(_) => keyed(
                &fs::read_to_string("/proc/vmstat").unwrap_or_default(),
                "oom_kill",
            ),
        }
    }

    fn read(&self, file: &str) -> String {
        fs::read_to_string(self.dir.join(file)).unwrap_or_default()
    }

    fn number(&self, file: &str) -> u64 {
        self.read(file).trim().parse().unwrap_or(0)
    }

    /// The statistics, as the guest's kernel counts them; of the whole microVM where the group has no controller.
    pub fn stats(&self) -> StatsResponse {
        let (cpu, memory) = (self.read("cpu.stat"), self.read("memory.stat"));
        let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let kib = |key: &str| keyed(&meminfo, key).saturating_mul(1024);
        let (total, available) = (kib("MemTotal:"), kib("MemAvailable:"));
        let own = !memory.is_empty();
        let disks = fs::read_to_string("/proc/diskstats").unwrap_or_default();
        let (read, written) = disk_sectors(&disks);
        StatsResponse {
            cpu_usage_us: keyed(&cpu, "usage_usec"),
            cpu_user_us: keyed(&cpu, "user_usec"),
            cpu_system_us: keyed(&cpu, "system_usec"),
            memory_current_bytes: if own {
                self.number("memory.current")
            } else {
                total.saturating_sub(available)
            },
            memory_peak_bytes: self.number("memory.peak"),
            memory_file_bytes: if own {
                keyed(&memory, "file")
            } else {
                kib("Cached:")
            },
            memory_anon_bytes: if own {
                keyed(&memory, "anon")
            } else {
                kib("AnonPages:")
            },
            oom_kills: self.oom_kills(),
            pids_current: self.number("pids.current"),
            io_read_bytes: read.saturating_mul(SECTOR_BYTES),
            io_write_bytes: written.saturating_mul(SECTOR_BYTES),
            guest_memory_total_bytes: total,
            guest_memory_available_bytes: available,
            ..StatsResponse::default()
        }
    }
}

/// Enables the controllers that these files belong to; one that is only wished for may be missing.
fn enable_controllers(files: &[CgroupFile]) -> Result<(), AgentError> {
    let mut done = Vec::new();
    for file in files {
        let controller = file.name.split('.').next().unwrap_or_default();
        // The processes of every container are counted already.
        if controller == "pids" || done.contains(&controller) {
            continue;
        }
        done.push(controller);
        let enabled = init::enable_controller(controller);
        if !file.optional {
            enabled.map_err(|error| {
                AgentError::setup(format!(
                    "enabling the controller {controller:?} for {}",
                    file.name
                ))(io_errno(&error))
            })?;
        }
    }
    Ok(())
}

/// Control groups that stand still, until this is dropped.
#[derive(Debug)]
pub struct Standstill {
    dirs: Vec<PathBuf>,
}

impl Standstill {
    /// Begins to stop them.
    pub fn begin<'a>(groups: impl Iterator<Item = &'a Cgroup>) -> Result<Self, AgentError> {
        let mut this = Self { dirs: Vec::new() };
        for group in groups {
            freeze(&group.dir, true).map_err(stopping)?;
            this.dirs.push(group.dir.clone());
        }
        Ok(this)
    }

    /// Waits until nothing in them runs any more.
    pub fn wait(&self) -> Result<(), AgentError> {
        const PATIENCE: Duration = Duration::from_secs(10);
        let deadline = Instant::now() + PATIENCE;
        for dir in &self.dirs {
            loop {
                let events = fs::read_to_string(dir.join("cgroup.events")).unwrap_or_default();
                if keyed(&events, "frozen") != 0 || keyed(&events, "populated") == 0 {
                    break;
                }
                if Instant::now() >= deadline {
                    return Err(stopping(Errno::ETIMEDOUT.into()));
                }
                std::thread::sleep(Duration::from_micros(200));
            }
        }
        Ok(())
    }

    /// Leaves them as they are.
    pub fn keep(mut self) {
        self.dirs.clear();
    }
}

impl Drop for Standstill {
    fn drop(&mut self) {
        for dir in &self.dirs {
            let _ = freeze(dir, false);
        }
    }
}

/// A control group in which a further process of a container is born while the container stands still.
///
/// A container that may trace processes could look into one that has the agent's memory until it executes its program.
/// So nothing of the container runs meanwhile ([`Standstill`]), and the process joins it when it has become its own. What the
/// process has started by then is here, too, and joins with it.
#[derive(Debug)]
pub struct Staging {
    own: Cgroup,
    container: PathBuf,
}

impl Staging {
    /// For a process of this container.
    pub fn begin(container: &Cgroup, name: &str) -> Result<Self, AgentError> {
        let dir = Path::new(init::CGROUP_DIR).join(format!("staging-{name}"));
        fs::create_dir(&dir).map_err(stopping)?;
        Ok(Self {
            own: Cgroup { dir },
            container: container.dir.clone(),
        })
    }

    /// Where the process is to be born.
    pub fn open(&self) -> Result<OwnedFd, AgentError> {
        self.own.open()
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        // As long as one is left that could start another; frozen, it soon can't.
        const PATIENCE: Duration = Duration::from_secs(1);
        let deadline = Instant::now() + PATIENCE;
        let _ = freeze(&self.own.dir, true);
        loop {
            let pids = self.own.pids();
            for pid in &pids {
                let _ = fs::write(self.container.join("cgroup.procs"), pid.to_string());
            }
            if pids.is_empty() || Instant::now() >= deadline {
                break;
            }
        }
        drop(fs::remove_dir(&self.own.dir));
        self.own.dir = PathBuf::new();
    }
}

/// Stops what is in a control group, or lets it go on.
fn freeze(dir: &Path, frozen: bool) -> std::io::Result<()> {
    fs::write(dir.join("cgroup.freeze"), if frozen { "1" } else { "0" })
}

impl Cgroup {
    /// Lets what is in it go on.
    pub fn thaw(&self) -> Result<(), AgentError> {
        freeze(&self.dir, false).map_err(stopping)
    }

    /// Whether no process is in it.
    pub fn is_empty(&self) -> bool {
        keyed(&self.read("cgroup.events"), "populated") == 0
    }
}

fn stopping(error: std::io::Error) -> AgentError {
    AgentError::setup("stopping the container")(io_errno(&error))
}

/// Unit of /proc/diskstats.
const SECTOR_BYTES: u64 = 512;

/// Sectors read and written on all of the microVM's disks, which are one container's.
fn disk_sectors(diskstats: &str) -> (u64, u64) {
    let mut sums = (0_u64, 0_u64);
    for line in diskstats.lines() {
        let fields: Vec<&str> = line.split_whitespace().collect();
        if let [_, _, name, _, _, read, _, _, _, written, ..] = fields[..]
            && name.starts_with("vd")
        {
            sums.0 = sums.0.saturating_add(read.parse().unwrap_or(0));
            sums.1 = sums.1.saturating_add(written.parse().unwrap_or(0));
        }
    }
    sums
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        if self.dir.as_os_str().is_empty() {
            return;
        }
        let _ = self.kill();
        drop(fs::remove_dir(&self.dir));
    }
}

/// The number after `key` at the beginning of a line.
fn keyed(text: &str, key: &str) -> u64 {
    text.lines()
        .find_map(|line| {
            let mut words = line.split_whitespace();
            (words.next() == Some(key))
                .then(|| words.next().and_then(|word| word.parse().ok()))
                .flatten()
        })
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keyed_number_is_found_by_its_whole_key() {
        let text = "oom 3\noom_kill 2\noom_kill_x 9\n";
        assert_eq!(keyed(text, "oom_kill"), 2);
        assert_eq!(keyed(text, "absent"), 0);
    }

    #[test]
    fn io_of_all_disks_is_summed_and_of_nothing_else() {
        let text = " 254 0 vda 5 0 40 1 2 0 8 1 0 1 1\n 254 16 vdb 1 0 2 0 0 0 1 0 0 0 0\n 7 0 loop0 9 9 9 9 9 9 9 9 9 9 9\n";
        assert_eq!(disk_sectors(text), (42, 9));
    }
}
