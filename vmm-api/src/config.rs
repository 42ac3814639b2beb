//! The wire configuration of one microVM. The VMM validates it into its own types (`vmm::config`) before use.

use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// Everything `hull-vmm` needs to assemble one microVM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmConfig {
    /// Number of virtual processors.
    pub vcpu_count: u8,
    /// Guest memory.
    pub memory_mib: u64,
    /// Huge pages of the host behind guest memory.
    #[serde(default)]
    pub huge_pages: HugePages,
    /// An ELF `vmlinux` (or, for the `linux64` protocol, a bzImage).
    pub kernel: ResourceRef,
    /// An initial RAM disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initrd: Option<ResourceRef>,
    /// The kernel command line; the VMM appends what describes its devices.
    #[serde(default)]
    pub cmdline: String,
    /// How the kernel is entered.
    #[serde(default)]
    pub boot_protocol: BootProtocol,
    /// Block devices, in the order the guest shall see them.
    #[serde(default)]
    pub blk: Vec<BlkConfig>,
    /// Directories and files of the host as a file system of the guest. `hull-vmm` must have been started with `--shares`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fs: Option<FsConfig>,
    /// Network devices, in the order the guest shall see them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub net: Vec<NetConfig>,
    /// The socket device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsock: Option<VsockConfig>,
    /// An entropy device.
    #[serde(default)]
    pub rng: bool,
    /// The memory balloon.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub balloon: Option<BalloonConfig>,
    /// The debugging UART (COM1).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial: Option<SerialConfig>,
    /// Whether the guest's boot phase marks are taken and reported.
    #[serde(default)]
    pub boot_timer: bool,
}

/// Huge pages of the host behind guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HugePages {
    /// Small pages only.
    None,
    /// Transparent huge pages are asked for.
    #[default]
    Transparent,
}

/// How the kernel is entered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BootProtocol {
    /// The 64-bit Linux boot protocol, with page tables a PVM host can use natively.
    #[default]
    Linux64,
    /// PVH: 32-bit protected mode at the address of the ELF note.
    Pvh,
    /// The entry state another VMM (Firecracker) gives: 64-bit, page tables without the user bit, empty IDT. For tests.
    Firecracker,
}

/// What a resource is opened from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum ResourceRef {
    /// Index into the file descriptors that came with the frame.
    Fd(u32),
    /// A path; accepted only from the command line's `--config`, never over the control socket.
    Path(PathBuf),
}

/// One virtio block device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlkConfig {
    /// Name of the device in metrics and messages; unique.
    pub id: String,
    /// The image.
    pub source: ResourceRef,
    /// Whether the guest may only read. The image must then also be opened read-only.
    pub read_only: bool,
    /// Serial number the guest sees (at most 20 bytes).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial: Option<String>,
    /// Number of request queues.
    #[serde(default = "one_queue")]
    pub queues: u16,
    /// How the image is read and written.
    #[serde(default)]
    pub io_engine: IoEngine,
}

/// One virtio network device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetConfig {
    /// Name of the device in metrics and messages; unique.
    pub id: String,
    /// The interface's address, such as `02:00:00:00:00:01`. The guest may give itself another.
    pub mac: String,
    /// The MTU the guest is told; without, it decides.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u16>,
    /// Number of queues each way, up to 8.
    #[serde(default = "one_queue")]
    pub queue_pairs: u16,
    /// The tap, by one open descriptor for each queue pair (`IFF_TAP`, `IFF_NO_PI`, `IFF_VNET_HDR`, with
    /// `IFF_MULTI_QUEUE` if there are several; header of 12 bytes). Without, the link is down until one is attached
    /// ([`crate::RequestBody::AttachNet`]).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub taps: Vec<ResourceRef>,
    /// Limits of what the guest receives.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rx_limit: Option<RateLimit>,
    /// Limits of what the guest sends.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tx_limit: Option<RateLimit>,
}

/// Limits of one direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RateLimit {
    /// Bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes: Option<TokenBucket>,
    /// Packets.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub packets: Option<TokenBucket>,
}

/// A rate with a burst.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenBucket {
    /// Bytes or packets a second.
    pub per_second: u64,
    /// Bytes or packets at once after a pause.
    pub burst: u64,
}

fn one_queue() -> u16 {
    1
}

/// How a disk image is read and written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum IoEngine {
    /// `io_uring` where the host offers it, else synchronous.
    #[default]
    Auto,
    /// `io_uring`, or refuse to start.
    IoUring,
    /// `preadv`/`pwritev` on a thread of the disk's own.
    Sync,
}

/// The virtio file system device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FsConfig {
    /// What the guest mounts it by; at most 36 bytes.
    #[serde(default = "default_tag")]
    pub tag: String,
    /// The shares; the root the guest mounts lists them as `0`, `1`, and so on.
    pub shares: Vec<FsShareConfig>,
    /// One end of a connected `SOCK_SEQPACKET` pair, over which [`ShareOrder`](crate::ShareOrder)s come while the guest runs.
    #[serde(default)]
    pub orders: Option<ResourceRef>,
}

fn default_tag() -> String {
    "hull".to_owned()
}

/// One directory or file of the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FsShareConfig {
    /// An `O_PATH` descriptor, best of a detached mount made for it: then nothing leads out of it, and the mount's flags
    /// (read-only, no devices) are the host kernel's to enforce.
    pub source: ResourceRef,
    /// Whether the guest may only read. The descriptor's mount must then be read-only.
    #[serde(default)]
    pub read_only: bool,
    /// Nobody but the guest changes it, so that the guest may rely on what it knows for some seconds.
    #[serde(default)]
    pub exclusive: bool,
    /// Makes it the upper layer of an overlay: two directories, [`UPPER_DIR`] and [`WORK_DIR`], beside which nothing can be
    /// made. At this socket (a connected one of packets) somebody reads and writes overlayfs' marks: see [`crate::marks`].
    #[serde(default)]
    pub overlay_marks: Option<ResourceRef>,
}

/// Where the upper layer is in a share that is one.
pub const UPPER_DIR: &str = "fs";
/// The directory that overlayfs works in, beside it.
pub const WORK_DIR: &str = "work";

/// The virtio socket device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockConfig {
    /// The guest's context id, 3 or more.
    #[serde(default = "first_guest_cid")]
    pub cid: u32,
    /// A listening Unix stream: the host connects, writes `CONNECT <port>\n` and reads `OK <host port>\n`.
    pub listener: ResourceRef,
    /// Ports on the host the guest may connect to; all others are refused.
    #[serde(default)]
    pub guest_ports: Vec<GuestPortConfig>,
}

fn first_guest_cid() -> u32 {
    3
}

/// One port the guest may connect to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GuestPortConfig {
    /// Port number on the host's side (CID 2).
    pub port: u32,
    /// A connected Unix stream. It serves the first connection to the port; later ones are refused.
    pub stream: ResourceRef,
}

/// The virtio memory balloon.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BalloonConfig {
    /// Whether the guest reports free pages, which go back to the host at once.
    #[serde(default = "enabled")]
    pub free_page_reporting: bool,
    /// Whether the guest may take pages back when it would otherwise run out of memory.
    #[serde(default = "enabled")]
    pub deflate_on_oom: bool,
    /// Interval at which the guest's memory statistics are asked for; 0 turns them off.
    #[serde(default)]
    pub stats_interval_s: u16,
}

fn enabled() -> bool {
    true
}

/// The debugging UART.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SerialConfig {
    /// Where the guest's output goes.
    pub output: ResourceRef,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn minimal_config_takes_the_documented_defaults() {
        let config: VmConfig =
            serde_json::from_str(r#"{"vcpu_count":1,"memory_mib":128,"kernel":{"path":"/k"}}"#).unwrap();
        assert_eq!(config.huge_pages, HugePages::Transparent);
        assert_eq!(config.boot_protocol, BootProtocol::Linux64);
        assert!(config.blk.is_empty() && config.vsock.is_none() && !config.rng && !config.boot_timer);
    }

    #[test]
    fn unknown_field_is_refused_with_its_name() {
        let error = serde_json::from_str::<VmConfig>(
            r#"{"vcpu_count":1,"memory_mib":128,"kernel":{"fd":0},"memroy_mib":1}"#,
        )
        .unwrap_err();
        assert!(error.to_string().contains("memroy_mib"), "{error}");
    }

    #[test]
    fn resource_is_a_descriptor_or_a_path() {
        assert_eq!(
            serde_json::from_str::<ResourceRef>(r#"{"fd":3}"#).unwrap(),
            ResourceRef::Fd(3)
        );
        assert!(serde_json::from_str::<ResourceRef>(r#"{"url":"x"}"#).is_err());
        assert!(serde_json::from_str::<ResourceRef>(r#"{"fd":-1}"#).is_err());
    }
}
