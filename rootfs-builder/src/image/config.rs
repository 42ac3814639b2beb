//! What an image says about the process to run: the part of its configuration a container needs.

use std::collections::BTreeMap;

use oci_spec::image::ImageConfiguration;
use serde::{Deserialize, Serialize};

use super::{ARCHITECTURE, ImageError};
use crate::digest::Digest;

/// An image's configuration, every absent field as its empty value.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct ImageConfig {
    /// `NAME=VALUE`, in the image's order.
    pub env: Vec<String>,
    pub entrypoint: Vec<String>,
    pub cmd: Vec<String>,
    /// Empty: the root directory.
    pub working_dir: String,
    /// `user[:group]`, names or numbers; empty: root.
    pub user: String,
    /// Paths, sorted.
    pub volumes: Vec<String>,
    /// `port/protocol`, sorted.
    pub exposed_ports: Vec<String>,
    pub stop_signal: Option<String>,
    pub labels: BTreeMap<String, String>,
    pub architecture: String,
    pub os: String,
    /// RFC 3339.
    pub created: Option<String>,
    pub author: Option<String>,
}

/// The configuration and the layers' digests it lists.
pub(super) fn parse(bytes: &[u8], name: &str) -> Result<(ImageConfig, Vec<Digest>), ImageError> {
    let document: ImageConfiguration =
        serde_json::from_slice(bytes).map_err(|source| ImageError::Malformed {
            name: name.to_owned(),
            source,
        })?;
    let diff_ids = document
        .rootfs()
        .diff_ids()
        .iter()
        .map(|text| {
            text.parse().map_err(|source| ImageError::Digest {
                place: "the image's configuration",
                source,
            })
        })
        .collect::<Result<Vec<Digest>, ImageError>>()?;
    let (architecture, os) = (document.architecture().to_string(), document.os().to_string());
    if os != "linux" || architecture != ARCHITECTURE {
        return Err(ImageError::Platform {
            found: format!("{os}/{architecture}"),
            wanted: platform(),
        });
    }
    let mut config = ImageConfig {
        architecture,
        os,
        created: document.created().clone(),
        author: document.author().clone(),
        ..ImageConfig::default()
    };
    if let Some(process) = document.config() {
        config.env = process.env().clone().unwrap_or_default();
        config.entrypoint = process.entrypoint().clone().unwrap_or_default();
        config.cmd = process.cmd().clone().unwrap_or_default();
        config.working_dir = process.working_dir().clone().unwrap_or_default();
        config.user = process.user().clone().unwrap_or_default();
        // The crate keeps these in a map's order, which changes from run to run.
        config.volumes = sorted(process.volumes().clone());
        config.exposed_ports = sorted(process.exposed_ports().clone());
        config.stop_signal = process.stop_signal().clone().filter(|signal| !signal.is_empty());
        config.labels = process.labels().clone().unwrap_or_default().into_iter().collect();
    }
    Ok((config, diff_ids))
}

/// What this machine runs.
pub(super) const fn platform() -> &'static str {
    if cfg!(target_arch = "aarch64") {
        "linux/arm64"
    } else {
        "linux/amd64"
    }
}

fn sorted(values: Option<Vec<String>>) -> Vec<String> {
    let mut values = values.unwrap_or_default();
    values.sort();
    values
}
