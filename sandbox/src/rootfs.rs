//! A container's root filesystem, as the host sees it: which files become which disks of the microVM.

use std::{
    fs::File,
    path::{Path, PathBuf},
};

use agent_protocol::rootfs::Upper;
use rootfs_builder::{PreparedImage, Store};
use serde::{Deserialize, Serialize};

use crate::{Result, SandboxError, vmm_client::Disk};

/// Serial number of the microVM's own root, the agent's image.
const AGENT_SERIAL: &str = "hull-agent";
/// Serial number of the disk that holds the writable layer.
const WRITABLE_SERIAL: &str = "writable";
/// Layers of one image: one disk each, beside the microVM's other devices.
pub const MAX_LAYERS: usize = 15;

/// Read-only layers and what the writable one on top begins with.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RootfsSpec {
    /// EROFS blobs, lowest first.
    pub layers: Vec<PathBuf>,
    /// Mode of the root directory.
    pub root_mode: u32,
    /// Owner of the root directory.
    pub root_uid: u32,
    /// Group of the root directory.
    pub root_gid: u32,
    /// The share that is the whole of it, by index; then there are no layers and no writable one.
    #[serde(default)]
    pub share: Option<u32>,
}

/// Where the writable layer is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Writable {
    /// In the microVM's memory.
    Memory {
        /// How much it may hold.
        bytes: u64,
    },
    /// On a disk of its own.
    Disk,
    /// In a snapshot of the host, which is this share.
    Snapshot {
        /// Its index.
        share: u32,
    },
}

/// Makes the disk of a container's writable layer: sparse, with a filesystem on it.
pub(crate) fn create_writable(root: &Path, path: &Path, bytes: u64) -> Result<()> {
    let create = || {
        let size = rootfs_builder::writable::Size::new(bytes)?;
        Store::open(root)?.create_writable(path, size)?;
        Ok(())
    };
    create()
        .map_err(|source: Box<dyn std::error::Error + Send + Sync>| SandboxError::WritableLayer { source })
}

/// Opens the disk of a container's writable layer.
pub(crate) fn open_writable(path: &Path) -> Result<Disk> {
    let image = File::options()
        .read(true)
        .write(true)
        .open(path)
        .map_err(SandboxError::io("opening", path))?;
    Ok(Disk {
        serial: WRITABLE_SERIAL.to_owned(),
        image,
        read_only: false,
    })
}

impl From<&PreparedImage> for RootfsSpec {
    fn from(image: &PreparedImage) -> Self {
        Self {
            layers: image.layers.iter().map(|layer| layer.path.clone()).collect(),
            root_mode: u32::from(image.root.mode) & 0o7777,
            root_uid: image.root.uid,
            root_gid: image.root.gid,
            share: None,
        }
    }
}

impl RootfsSpec {
    /// Opens the agent's image and the layers, read-only: the guest can't write what the host didn't open for it.
    pub(crate) fn open_disks(&self, agent_image: &PathBuf) -> Result<Vec<Disk>> {
        if self.layers.len() > MAX_LAYERS {
            return Err(SandboxError::InvalidOption {
                option: "IMAGE",
                problem: format!(
                    "has {} layers; at most {MAX_LAYERS} can be given to a microVM",
                    self.layers.len()
                ),
            });
        }
        let serials = std::iter::once(AGENT_SERIAL.to_owned()).chain(self.layer_serials());
        serials
            .zip(std::iter::once(agent_image).chain(&self.layers))
            .map(|(serial, path)| {
                let image = File::open(path).map_err(SandboxError::io("opening", path))?;
                Ok(Disk {
                    serial,
                    image,
                    read_only: true,
                })
            })
            .collect()
    }

    fn layer_serials(&self) -> impl Iterator<Item = String> {
        (0..self.layers.len()).map(|index| format!("layer{index}"))
    }

    /// What the agent is told.
    pub(crate) fn for_agent(&self, read_only: bool, writable: Writable) -> agent_protocol::Rootfs {
        let upper = match writable {
            Writable::Memory { bytes } => Upper::TmpfsBytes(bytes),
            Writable::Disk => Upper::BlockSerial(WRITABLE_SERIAL.into()),
            Writable::Snapshot { share } => Upper::UpperShare(share),
        };
        if self.share.is_some() {
            return agent_protocol::Rootfs {
                share: self.share,
                read_only,
                ..agent_protocol::Rootfs::default()
            };
        }
        agent_protocol::Rootfs {
            layer_serials: self.layer_serials().collect(),
            upper: Some(upper),
            read_only,
            root_mode: self.root_mode,
            root_uid: self.root_uid,
            root_gid: self.root_gid,
            ..agent_protocol::Rootfs::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(layers: usize, path: &str) -> RootfsSpec {
        RootfsSpec {
            layers: vec![path.into(); layers],
            root_mode: 0o755,
            root_uid: 0,
            root_gid: 0,
            share: None,
        }
    }

    #[test]
    fn too_many_layers_are_refused_before_a_microvm_is_made() {
        let error = spec(MAX_LAYERS + 1, "/dev/null")
            .open_disks(&"/dev/null".into())
            .unwrap_err();
        assert!(error.to_string().contains("16 layers"), "{error}");
    }

    #[test]
    fn disks_are_the_agent_and_the_layers_in_order() {
        let disks = spec(2, "/dev/null").open_disks(&"/dev/null".into()).unwrap();
        let serials: Vec<&str> = disks.iter().map(|disk| disk.serial.as_str()).collect();
        assert_eq!(serials, ["hull-agent", "layer0", "layer1"]);
        assert!(disks.iter().all(|disk| disk.read_only));
    }
}
