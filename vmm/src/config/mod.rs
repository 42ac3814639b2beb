//! From the wire configuration to a validated one with open resources.
//!
//! Owner: the control driver (or `main` for `--config`). After [`VmSpec::open`] nothing is opened by name any more.

mod net;
mod resources;

pub use net::{NetResource, open_taps};
pub use resources::{Access, ResourceError, Resources};

use crate::{
    arch::x86_64::mptable,
    devices::virtio::{
        fs::Share,
        net::{NetError, TapError},
    },
    vstate::memory::{self, MemoryError},
};
use std::{
    collections::BTreeSet,
    fs::File,
    os::{
        fd::OwnedFd,
        unix::net::{UnixListener, UnixStream},
    },
    time::Duration,
};
use vmm_api::{BlkConfig, BootProtocol, HugePages, IoEngine, VmConfig};

/// Names of devices appear in metrics and messages.
const MAX_ID_BYTES: usize = 64;
const FIRST_GUEST_CID: u32 = 3;

/// Why a configuration can't be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// No such number of vCPUs.
    #[error("vcpu_count is {requested}: a microVM has 1 to {} vCPUs", mptable::MAX_VCPUS)]
    VcpuCount {
        /// As configured.
        requested: u8,
    },
    /// No such size of memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// A name that can't be one.
    #[error("device id {id:?}: 1 to {MAX_ID_BYTES} letters, digits, '-', '_' and '.' are needed")]
    DeviceId {
        /// As configured.
        id: String,
    },
    /// Two devices of one name.
    #[error("device id {id:?} is used twice")]
    DuplicateId {
        /// The name.
        id: String,
    },
    /// A reserved context id.
    #[error("vsock cid is {cid}: {FIRST_GUEST_CID} to {} are for guests", u32::MAX - 1)]
    Cid {
        /// As configured.
        cid: u32,
    },
    /// A network device that can't be.
    #[error(transparent)]
    Net(#[from] NetError),
    /// A descriptor that is no tap.
    #[error("net {id:?}")]
    Tap {
        /// The device.
        id: String,
        /// What is wrong with it.
        #[source]
        source: TapError,
    },
    /// An address that is none.
    #[error("net {id:?}: {mac:?} is no MAC address; write 02:00:00:00:00:01")]
    MacAddress {
        /// The device.
        id: String,
        /// As configured.
        mac: String,
    },
    /// Two streams for one port.
    #[error("vsock guest port {port} is listed twice")]
    DuplicatePort {
        /// The port.
        port: u32,
    },
    /// A resource can't be opened or isn't what it should be.
    #[error(transparent)]
    Resource(#[from] ResourceError),
}

/// A validated block device with its image.
#[derive(Debug)]
pub struct BlkResource {
    /// Name.
    pub id: String,
    /// The image, opened as `read_only` says.
    pub image: File,
    /// Whether the guest may only read.
    pub read_only: bool,
    /// Serial number.
    pub serial: Option<String>,
    /// Request queues.
    pub queues: u16,
    /// How it is read and written.
    pub io_engine: IoEngine,
}

/// The validated shares.
#[derive(Debug)]
pub struct FsResource {
    /// What the guest mounts by.
    pub tag: String,
    /// In order.
    pub shares: Vec<Share>,
    /// Where further ones come from.
    pub orders: Option<OwnedFd>,
}

/// The validated socket device.
#[derive(Debug)]
pub struct VsockResource {
    /// The guest's context id.
    pub cid: u32,
    /// Where the host connects.
    pub listener: UnixListener,
    /// What the guest may connect to.
    pub guest_ports: Vec<(u32, UnixStream)>,
}

/// The validated balloon.
#[derive(Debug, Clone, Copy)]
pub struct BalloonResource {
    /// Whether free pages are reported.
    pub free_page_reporting: bool,
    /// Whether the guest may deflate by itself.
    pub deflate_on_oom: bool,
    /// How often statistics are asked for.
    pub stats_interval: Option<Duration>,
}

/// A configuration that can be built.
#[derive(Debug)]
pub struct VmSpec {
    pub(crate) vcpu_count: u8,
    pub(crate) memory_mib: u64,
    pub(crate) huge_pages: bool,
    pub(crate) kernel: File,
    pub(crate) initrd: Option<File>,
    pub(crate) cmdline: String,
    pub(crate) protocol: BootProtocol,
    pub(crate) devices: DeviceResources,
}

/// The validated devices.
#[derive(Debug)]
pub(crate) struct DeviceResources {
    pub(crate) blk: Vec<BlkResource>,
    pub(crate) fs: Option<FsResource>,
    pub(crate) net: Vec<NetResource>,
    pub(crate) vsock: Option<VsockResource>,
    pub(crate) rng: bool,
    pub(crate) balloon: Option<BalloonResource>,
    pub(crate) serial: Option<File>,
    pub(crate) boot_timer: bool,
}

impl VmSpec {
    /// Validates `config` and takes what it names out of `resources`.
    ///
    /// # Errors
    /// [`ConfigError`], naming the field.
    pub fn open(config: VmConfig, resources: &mut Resources) -> Result<Self, ConfigError> {
        let requested = config.vcpu_count;
        if requested == 0 || requested > mptable::MAX_VCPUS {
            return Err(ConfigError::VcpuCount { requested });
        }
        memory::check_size(config.memory_mib)?;
        let kernel = resources.file(&config.kernel, Access::Read, "kernel")?;
        let initrd = config
            .initrd
            .map(|initrd| resources.file(&initrd, Access::Read, "initrd"))
            .transpose()?;
        let mut ids = BTreeSet::new();
        let blk = open_blk(config.blk, resources, &mut ids)?;
        let fs = config.fs.map(|fs| open_fs(fs, resources)).transpose()?;
        let net = net::open(config.net, resources, &mut ids)?;
        let vsock = config
            .vsock
            .map(|vsock| open_vsock(&vsock, resources))
            .transpose()?;
        let serial = config
            .serial
            .map(|serial| resources.file(&serial.output, Access::Append, "serial.output"))
            .transpose()?;
        let balloon = config.balloon.map(|balloon| BalloonResource {
            free_page_reporting: balloon.free_page_reporting,
            deflate_on_oom: balloon.deflate_on_oom,
            stats_interval: (balloon.stats_interval_s != 0)
                .then(|| Duration::from_secs(u64::from(balloon.stats_interval_s))),
        });
        Ok(Self {
            vcpu_count: requested,
            memory_mib: config.memory_mib,
            huge_pages: config.huge_pages == HugePages::Transparent,
            kernel,
            initrd,
            cmdline: config.cmdline,
            protocol: config.boot_protocol,
            devices: DeviceResources {
                blk,
                fs,
                net,
                vsock,
                rng: config.rng,
                balloon,
                serial,
                boot_timer: config.boot_timer,
            },
        })
    }

    /// Size of the largest writable disk; without a bound where there are shares, on which a file may grow to any size.
    pub(crate) fn largest_disk_bytes(&self) -> u64 {
        if self.devices.fs.is_some() {
            return u64::MAX;
        }
        let writable = self.devices.blk.iter().filter(|blk| !blk.read_only);
        writable
            .filter_map(|blk| blk.image.metadata().ok())
            .map(|metadata| metadata.len())
            .max()
            .unwrap_or(0)
    }

    /// Whether it has shares.
    #[must_use]
    pub fn has_shares(&self) -> bool {
        self.devices.fs.is_some()
    }

    /// Whether the guest's boot is timed.
    #[must_use]
    pub fn boot_timer(&self) -> bool {
        self.devices.boot_timer
    }
}

/// Checks a device's name, which must be its own.
fn claim_id(id: &str, ids: &mut BTreeSet<String>) -> Result<(), ConfigError> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let id = id.to_owned();
    if id.is_empty() || id.len() > MAX_ID_BYTES || !id.chars().all(allowed) {
        return Err(ConfigError::DeviceId { id });
    }
    if !ids.insert(id.clone()) {
        return Err(ConfigError::DuplicateId { id });
    }
    Ok(())
}

fn open_blk(
    configs: Vec<BlkConfig>,
    resources: &mut Resources,
    ids: &mut BTreeSet<String>,
) -> Result<Vec<BlkResource>, ConfigError> {
    let mut blk = Vec::with_capacity(configs.len());
    for config in configs {
        let BlkConfig {
            id,
            source,
            read_only,
            serial,
            queues,
            io_engine,
        } = config;
        claim_id(&id, ids)?;
        let access = if read_only {
            Access::ReadOnly
        } else {
            Access::ReadWrite
        };
        let image = resources.file(&source, access, &format!("blk {id:?}"))?;
        blk.push(BlkResource {
            id,
            image,
            read_only,
            serial,
            queues,
            io_engine,
        });
    }
    Ok(blk)
}

fn open_fs(config: vmm_api::FsConfig, resources: &mut Resources) -> Result<FsResource, ConfigError> {
    let shares = config
        .shares
        .iter()
        .enumerate()
        .map(|(index, share)| {
            let root = resources.share(&share.source, share.read_only, &format!("fs.shares[{index}]"))?;
            let marks = share
                .overlay_marks
                .as_ref()
                .map(|marks| resources.packet_socket(marks, &format!("fs.shares[{index}].overlay_marks")))
                .transpose()?;
            Ok(Share {
                root,
                exclusive: share.exclusive,
                marks,
            })
        })
        .collect::<Result<_, ConfigError>>()?;
    let orders = config
        .orders
        .map(|orders| resources.packet_socket(&orders, "fs.orders"))
        .transpose()?;
    Ok(FsResource {
        tag: config.tag,
        shares,
        orders,
    })
}

fn open_vsock(
    config: &vmm_api::VsockConfig,
    resources: &mut Resources,
) -> Result<VsockResource, ConfigError> {
    if config.cid < FIRST_GUEST_CID || config.cid == u32::MAX {
        return Err(ConfigError::Cid { cid: config.cid });
    }
    let listener = resources.listener(&config.listener, "vsock.listener")?;
    let mut ports = BTreeSet::new();
    let mut guest_ports = Vec::with_capacity(config.guest_ports.len());
    for entry in &config.guest_ports {
        if !ports.insert(entry.port) {
            return Err(ConfigError::DuplicatePort { port: entry.port });
        }
        let stream = resources.stream(&entry.stream, &format!("vsock.guest_ports[{}]", entry.port))?;
        guest_ports.push((entry.port, stream));
    }
    Ok(VsockResource {
        cid: config.cid,
        listener,
        guest_ports,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmm_api::ResourceRef;

    fn config() -> VmConfig {
        serde_json::from_str(r#"{"vcpu_count":1,"memory_mib":64,"kernel":{"fd":0}}"#).unwrap()
    }

    fn fds(count: usize) -> Resources {
        Resources::from_fds((0..count).map(|_| tempfile::tempfile().unwrap().into()).collect())
    }

    #[test]
    fn impossible_counts_and_sizes_name_their_field() {
        for (change, field) in [
            (
                VmConfig {
                    vcpu_count: 0,
                    ..config()
                },
                "vcpu_count",
            ),
            (
                VmConfig {
                    vcpu_count: 255,
                    ..config()
                },
                "vcpu_count",
            ),
            (
                VmConfig {
                    memory_mib: 0,
                    ..config()
                },
                "memory_mib",
            ),
            (
                VmConfig {
                    memory_mib: u64::MAX,
                    ..config()
                },
                "memory_mib",
            ),
        ] {
            let error = VmSpec::open(change, &mut fds(1)).unwrap_err().to_string();
            assert!(error.contains(field), "{error}");
        }
    }

    #[test]
    fn descriptor_is_used_once_and_must_exist() {
        let twice = VmConfig {
            initrd: Some(ResourceRef::Fd(0)),
            ..config()
        };
        assert!(
            VmSpec::open(twice, &mut fds(1))
                .unwrap_err()
                .to_string()
                .contains("initrd")
        );
        let beyond = VmConfig {
            kernel: ResourceRef::Fd(9),
            ..config()
        };
        assert!(
            VmSpec::open(beyond, &mut fds(1))
                .unwrap_err()
                .to_string()
                .contains('9')
        );
        VmSpec::open(config(), &mut fds(1)).unwrap();
    }

    #[test]
    fn paths_are_refused_over_the_control_socket() {
        let path = VmConfig {
            kernel: ResourceRef::Path("/etc/passwd".into()),
            ..config()
        };
        assert!(matches!(
            VmSpec::open(path, &mut fds(1)),
            Err(ConfigError::Resource(ResourceError::PathNotAllowed { .. }))
        ));
    }

    #[test]
    fn read_only_disk_must_not_come_with_a_writable_descriptor() {
        let blk = |read_only| {
            serde_json::from_value(serde_json::json!({"id":"root","source":{"fd":1},"read_only":read_only}))
                .unwrap()
        };
        let read_only = VmConfig {
            blk: vec![blk(true)],
            ..config()
        };
        let error = VmSpec::open(read_only, &mut fds(2)).unwrap_err();
        assert!(
            matches!(error, ConfigError::Resource(ResourceError::Writable { .. })),
            "{error}"
        );
        VmSpec::open(
            VmConfig {
                blk: vec![blk(false)],
                ..config()
            },
            &mut fds(2),
        )
        .unwrap();
        let twice = VmConfig {
            blk: vec![blk(false), blk(false)],
            ..config()
        };
        assert!(matches!(
            VmSpec::open(twice, &mut fds(2)),
            Err(ConfigError::DuplicateId { .. })
        ));
    }

    proptest::proptest! {
        #[test]
        fn no_configuration_panics_the_validation(
            vcpu_count: u8,
            memory_mib: u64,
            fds_named in proptest::collection::vec(0u32..6, 5),
            id in ".{0,80}",
            cid: u32,
            ports in proptest::collection::vec(proptest::num::u32::ANY, 0..3),
            read_only: bool,
            queues: u16,
        ) {
            let fd = |index: usize| ResourceRef::Fd(fds_named[index]);
            let config = VmConfig {
                vcpu_count,
                memory_mib,
                kernel: fd(0),
                initrd: Some(fd(1)),
                blk: vec![BlkConfig {
                    id,
                    source: fd(2),
                    read_only,
                    serial: None,
                    queues,
                    io_engine: IoEngine::Auto,
                }],
                vsock: Some(vmm_api::VsockConfig {
                    cid,
                    listener: fd(3),
                    guest_ports: ports
                        .into_iter()
                        .map(|port| vmm_api::GuestPortConfig { port, stream: fd(4) })
                        .collect(),
                }),
                ..config()
            };
            // Files serve for none of the sockets, so nothing of this can be good.
            proptest::prop_assert!(VmSpec::open(config, &mut fds(5)).is_err());
        }
    }
}
