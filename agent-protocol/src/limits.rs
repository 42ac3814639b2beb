//! The bounds of every message, checked by the sender and again by the receiver.
//!
//! A frame is bounded as a whole (`frame.rs`); these rules bound the parts, so that nothing a peer sends
//! makes the other side build a mount table of a million entries or a path no kernel takes.

mod container;
mod network;
mod process;

pub use container::{MAX_CGROUP_FILES, MAX_DEVICE_RULES, MAX_HOOK_STATE_BYTES, MAX_ID_MAPPINGS};
pub use network::{MAX_INTERFACES, MAX_ROUTES};
pub use process::MAX_CPU_MASK_BYTES;

use crate::{
    ArchiveRequest, ConnectRequest, ConnectResponse, ContainerRef, CreateExecRequest, Empty, ExtractRequest,
    ListProcessesResponse, PathRequest, PathStat, ProcessRef, ResizeTtyRequest, Rootfs, SignalProcessRequest,
    StartProcessResponse, StatsResponse, WaitProcessResponse, rootfs,
};

/// Longest id of a container or an exec.
pub const MAX_ID_BYTES: usize = 128;
/// Longest path, as the kernel has it.
pub const MAX_PATH_BYTES: usize = 4096;
/// Most layers of a root filesystem.
pub const MAX_LAYERS: usize = 128;
/// Longest serial number of a virtio block device.
pub const MAX_SERIAL_BYTES: usize = 20;
/// Most entries of each list.
pub const MAX_LIST_ENTRIES: usize = 1024;
/// Most arguments or environment entries of a process.
pub const MAX_STRINGS: usize = 32 * 1024;
/// Longest single argument or environment entry, as the kernel has it (`MAX_ARG_STRLEN`).
pub const MAX_STRING_BYTES: usize = 128 * 1024;
/// All arguments and environment entries together.
pub const MAX_STRINGS_BYTES: usize = 2 << 20;
/// Largest seccomp program: 4096 instructions.
pub const MAX_SECCOMP_BYTES: usize = 4096 * 8;
/// Most seccomp programs of a process.
pub const MAX_SECCOMP_PROGRAMS: usize = 16;
/// Largest file given with a container.
pub const MAX_FILE_BYTES: usize = 256 * 1024;
/// Most entropy of one call.
pub const MAX_ENTROPY_BYTES: usize = 512;
/// Longest command line of a process that is told.
pub const MAX_COMMAND_BYTES: usize = 1024;
/// Most process ids of one answer.
pub const MAX_PIDS: usize = 128 * 1024;
/// Highest capability bit that may be set (`CAP_CHECKPOINT_RESTORE` is 40).
pub const CAPABILITY_MASK: u64 = (1 << 41) - 1;

/// Which field breaks which rule.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field} {rule}")]
pub struct InvalidMessage {
    /// The field, as in `agent.proto`.
    pub field: &'static str,
    /// The rule it breaks.
    pub rule: &'static str,
}

impl InvalidMessage {
    pub(crate) fn new(field: &'static str, rule: &'static str) -> Self {
        Self { field, rule }
    }
}

/// A message with bounds.
pub trait Bounded {
    /// Checks every bound of the message.
    ///
    /// # Errors
    ///
    /// Names the first field that breaks a rule.
    fn check(&self) -> Result<(), InvalidMessage>;
}

fn require(holds: bool, field: &'static str, rule: &'static str) -> Result<(), InvalidMessage> {
    if holds {
        Ok(())
    } else {
        Err(InvalidMessage::new(field, rule))
    }
}

/// Ids name directories, cgroups and sockets: letters, digits, `_`, `.`, `-`, not beginning with a dot or dash.
///
/// # Errors
///
/// The id breaks the rule.
pub fn check_id(field: &'static str, id: &str) -> Result<(), InvalidMessage> {
    let bytes = id.as_bytes();
    require(!bytes.is_empty(), field, "is empty")?;
    require(bytes.len() <= MAX_ID_BYTES, field, "is longer than 128 bytes")?;
    require(
        bytes[0].is_ascii_alphanumeric(),
        field,
        "doesn't begin with a letter or digit",
    )?;
    let allowed = |byte: &u8| byte.is_ascii_alphanumeric() || b"_.-".contains(byte);
    require(
        bytes.iter().all(allowed),
        field,
        "has a character other than a-z A-Z 0-9 _ . -",
    )
}

/// As [`check_id`], with the empty id allowed.
///
/// # Errors
///
/// The id breaks the rule.
pub fn check_optional_id(field: &'static str, id: &str) -> Result<(), InvalidMessage> {
    if id.is_empty() {
        Ok(())
    } else {
        check_id(field, id)
    }
}

fn check_text(field: &'static str, text: &str, limit: usize) -> Result<(), InvalidMessage> {
    require(text.len() <= limit, field, "is too long")?;
    require(!text.as_bytes().contains(&0), field, "has a zero byte in it")
}

fn check_path(field: &'static str, path: &str) -> Result<(), InvalidMessage> {
    require(path.starts_with('/'), field, "is not an absolute path")?;
    check_text(field, path, MAX_PATH_BYTES - 1)
}

fn check_serial(field: &'static str, serial: &str) -> Result<(), InvalidMessage> {
    require(
        !serial.is_empty() && serial.len() <= MAX_SERIAL_BYTES,
        field,
        "is not 1 to 20 bytes long",
    )?;
    require(
        serial.bytes().all(|byte| byte.is_ascii_graphic()),
        field,
        "has a character that is not graphic",
    )
}

fn check_list<T>(field: &'static str, list: &[T], limit: usize) -> Result<(), InvalidMessage> {
    require(list.len() <= limit, field, "has too many entries")
}

fn check_strings(field: &'static str, strings: &[String]) -> Result<(), InvalidMessage> {
    check_list(field, strings, MAX_STRINGS)?;
    let total: usize = strings.iter().map(|string| string.len() + 1).sum();
    require(total <= MAX_STRINGS_BYTES, field, "is more than 2 MiB in all")?;
    strings
        .iter()
        .try_for_each(|string| check_text(field, string, MAX_STRING_BYTES - 1))
}

impl Bounded for Empty {
    fn check(&self) -> Result<(), InvalidMessage> {
        Ok(())
    }
}

impl Bounded for ConnectRequest {
    fn check(&self) -> Result<(), InvalidMessage> {
        require(
            self.entropy.len() <= MAX_ENTROPY_BYTES,
            "entropy",
            "is longer than 512 bytes",
        )?;
        let limit = u64::try_from(i64::MAX).unwrap_or(0);
        require(
            self.realtime_ns <= limit,
            "realtime_ns",
            "is beyond what a clock holds",
        )
    }
}

impl Bounded for ConnectResponse {
    fn check(&self) -> Result<(), InvalidMessage> {
        check_text("agent_version", &self.agent_version, 64)?;
        check_text("kernel_release", &self.kernel_release, 65)
    }
}

impl Bounded for ContainerRef {
    fn check(&self) -> Result<(), InvalidMessage> {
        check_id("container_id", &self.container_id)
    }
}

impl Bounded for crate::FreezeContainerRequest {
    fn check(&self) -> Result<(), InvalidMessage> {
        check_id("container_id", &self.container_id)
    }
}

impl Bounded for ProcessRef {
    fn check(&self) -> Result<(), InvalidMessage> {
        check_id("container_id", &self.container_id)?;
        check_optional_id("exec_id", &self.exec_id)
    }
}

impl Bounded for Rootfs {
    fn check(&self) -> Result<(), InvalidMessage> {
        check_list("rootfs.layer_serials", &self.layer_serials, MAX_LAYERS)?;
        require(
            self.root_mode <= 0o7777,
            "rootfs.root_mode",
            "has bits above 07777",
        )?;
        self.layer_serials
            .iter()
            .try_for_each(|serial| check_serial("rootfs.layer_serials", serial))?;
        match &self.upper {
            Some(rootfs::Upper::BlockSerial(serial)) => check_serial("rootfs.block_serial", serial),
            Some(rootfs::Upper::TmpfsBytes(bytes)) => require(
                *bytes > 0,
                "rootfs.tmpfs_bytes",
                "is zero, which would be no limit",
            ),
            Some(rootfs::Upper::UpperShare(_)) => Ok(()),
            None => require(
                self.read_only || self.share.is_some(),
                "rootfs.upper",
                "is missing from a writable root filesystem",
            ),
        }
    }
}

fn check_window(size: &crate::WindowSize) -> Result<(), InvalidMessage> {
    let limit = u32::from(u16::MAX);
    require(
        size.rows <= limit && size.columns <= limit,
        "window_size",
        "is above 65535",
    )
}

impl Bounded for CreateExecRequest {
    fn check(&self) -> Result<(), InvalidMessage> {
        check_id("container_id", &self.container_id)?;
        check_id("exec_id", &self.exec_id)?;
        self.process
            .as_ref()
            .ok_or(InvalidMessage::new("process", "is missing"))?
            .check()
    }
}

impl Bounded for StartProcessResponse {
    fn check(&self) -> Result<(), InvalidMessage> {
        require(self.pid <= i32::MAX.cast_unsigned(), "pid", "is not a process id")
    }
}

impl Bounded for SignalProcessRequest {
    fn check(&self) -> Result<(), InvalidMessage> {
        check_id("container_id", &self.container_id)?;
        check_optional_id("exec_id", &self.exec_id)?;
        require(self.signal <= 64, "signal", "is not a signal number")
    }
}

impl Bounded for WaitProcessResponse {
    fn check(&self) -> Result<(), InvalidMessage> {
        use crate::wait_process_response::Outcome;
        match self.outcome {
            Some(Outcome::ExitCode(code)) => require(code <= 255, "exit_code", "is above 255"),
            Some(Outcome::Signal(signal)) => require(signal <= 64, "signal", "is not a signal number"),
            None => Err(InvalidMessage::new("outcome", "is missing")),
        }
    }
}

impl Bounded for ResizeTtyRequest {
    fn check(&self) -> Result<(), InvalidMessage> {
        check_id("container_id", &self.container_id)?;
        check_optional_id("exec_id", &self.exec_id)?;
        check_window(
            self.window_size
                .as_ref()
                .ok_or(InvalidMessage::new("window_size", "is missing"))?,
        )
    }
}

impl Bounded for ListProcessesResponse {
    fn check(&self) -> Result<(), InvalidMessage> {
        check_list("pids", &self.pids, MAX_PIDS)?;
        check_list("processes", &self.processes, MAX_PIDS)?;
        for process in &self.processes {
            check_text("processes.user", &process.user, 256)?;
            check_text("processes.state", &process.state, 8)?;
            check_text("processes.command", &process.command, MAX_COMMAND_BYTES)?;
        }
        Ok(())
    }
}

impl Bounded for PathRequest {
    fn check(&self) -> Result<(), InvalidMessage> {
        check_id("container_id", &self.container_id)?;
        check_path("path", &self.path)
    }
}

impl Bounded for PathStat {
    fn check(&self) -> Result<(), InvalidMessage> {
        check_text("name", &self.name, 255)?;
        require(
            !self.name.contains('/') && self.name != "..",
            "name",
            "is not a file's name",
        )?;
        require(self.mtime_ns < 1_000_000_000, "mtime_ns", "is a second or more")?;
        check_text("link_target", &self.link_target, MAX_PATH_BYTES)
    }
}

impl Bounded for ArchiveRequest {
    fn check(&self) -> Result<(), InvalidMessage> {
        check_id("container_id", &self.container_id)?;
        check_id("stream_id", &self.stream_id)?;
        check_path("path", &self.path)
    }
}

impl Bounded for ExtractRequest {
    fn check(&self) -> Result<(), InvalidMessage> {
        check_id("container_id", &self.container_id)?;
        check_id("stream_id", &self.stream_id)?;
        check_path("path", &self.path)
    }
}

impl Bounded for StatsResponse {
    fn check(&self) -> Result<(), InvalidMessage> {
        Ok(())
    }
}
