//! `hull image inspect`, and the images among `hull inspect`.

use std::collections::BTreeMap;

use clap::Args;
use rootfs_builder::{ImageDetails, Store};
use sandbox::Directories;
use serde::Serialize;
use serde_json::{Value, json};

use crate::{image, inspect, times};

/// Show everything about images.
#[derive(Debug, Args)]
pub struct ImageInspect {
    /// How to print: json, or a Go template such as '{{.Config.Cmd}}'
    #[arg(short, long)]
    format: Option<String>,
    /// Names or ids
    #[arg(required = true)]
    images: Vec<String>,
}

/// An image as docker describes it, and what Hull knows beside that.
#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct Described {
    id: String,
    repo_tags: Vec<String>,
    repo_digests: Vec<String>,
    digest: String,
    created: String,
    author: String,
    architecture: String,
    os: String,
    size: u64,
    config: Config,
    #[serde(rename = "RootFS")]
    root_fs: Value,
    layers: Vec<Layer>,
    imported: String,
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct Config {
    user: String,
    env: Vec<String>,
    entrypoint: Vec<String>,
    cmd: Vec<String>,
    working_dir: String,
    volumes: BTreeMap<String, Value>,
    exposed_ports: BTreeMap<String, Value>,
    labels: BTreeMap<String, String>,
    stop_signal: Option<String>,
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct Layer {
    digest: String,
    #[serde(rename = "DiffID")]
    diff_id: String,
    blob_bytes: Option<u64>,
    archive_bytes: Option<u64>,
    size_bytes: u64,
}

fn described(image: ImageDetails) -> Described {
    let set = |names: Vec<String>| names.into_iter().map(|name| (name, json!({}))).collect();
    let diff_ids: Vec<String> = image.layers.iter().map(|layer| layer.diff_id.clone()).collect();
    Described {
        id: format!("sha256:{}", image.id),
        repo_tags: image.names,
        repo_digests: image.repo_digests,
        digest: image.manifest_digest,
        created: image.config.created.unwrap_or_default(),
        author: image.config.author.unwrap_or_default(),
        architecture: image.config.architecture,
        os: image.config.os,
        size: image.size_bytes,
        config: Config {
            user: image.config.user,
            env: image.config.env,
            entrypoint: image.config.entrypoint,
            cmd: image.config.cmd,
            working_dir: image.config.working_dir,
            volumes: set(image.config.volumes),
            exposed_ports: set(image.config.exposed_ports),
            labels: image.config.labels,
            stop_signal: image.config.stop_signal,
        },
        root_fs: json!({"Type": "layers", "Layers": diff_ids}),
        layers: image
            .layers
            .into_iter()
            .map(|layer| Layer {
                digest: layer.digest,
                diff_id: layer.diff_id,
                blob_bytes: layer.blob_bytes,
                archive_bytes: layer.archive_bytes,
                size_bytes: layer.size_bytes,
            })
            .collect(),
        imported: times::rfc3339(image.imported_at.saturating_mul(1000)),
    }
}

/// One image as JSON.
///
/// # Errors
/// There is none of this name.
pub fn describe(store: &Store, name: &str) -> anyhow::Result<Value> {
    Ok(serde_json::to_value(described(store.inspect(name)?))?)
}

impl ImageInspect {
    /// Prints them.
    pub fn execute(self) -> anyhow::Result<u8> {
        let store = image::open_store(&Directories::from_environment())?;
        inspect::print(&self.images, self.format.as_deref(), |name| {
            describe(&store, name)
        })
    }
}
