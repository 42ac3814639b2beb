//! `docker save`'s archive: `manifest.json` names a configuration and uncompressed layers by their members' names.

use serde::Deserialize;

use super::storage::normal;
use super::{ImageError, LayerSource, OpenImage, Storage, config};
use crate::digest::Digest;
use crate::limits::Limits;

/// The archive's table of contents.
pub(super) const MANIFEST: &str = "manifest.json";

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Image {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    #[serde(default)]
    layers: Vec<String>,
}

/// Find the image that goes by `tag` (`NAME:TAG`), or the only one there is.
pub(super) fn open(storage: Storage, tag: Option<&str>, limits: &Limits) -> Result<OpenImage, ImageError> {
    if !storage.contains(MANIFEST) {
        let problem = "it has no manifest.json, so `docker save` didn't write it";
        return Err(ImageError::NotAnImage {
            path: storage.path().to_path_buf(),
            problem,
        });
    }
    let bytes = storage.read_document(MANIFEST, limits)?;
    let images: Vec<Image> = serde_json::from_slice(&bytes).map_err(|source| ImageError::Malformed {
        name: MANIFEST.to_owned(),
        source,
    })?;
    let image = choose(images, tag)?;

    let raw_config = storage.read_document(&member(&image.config)?, limits)?;
    let id = Digest::sha256_of(&raw_config);
    // The file is named by its digest: `<hex>.json`, or `blobs/sha256/<hex>` nowadays.
    let named = image
        .config
        .rsplit('/')
        .next()
        .unwrap_or_default()
        .trim_end_matches(".json");
    if named.len() == id.hex().len() && named != id.hex() {
        return Err(ImageError::WrongDigest { name: image.config });
    }
    let (config, diff_ids) = config::parse(&raw_config, &image.config)?;
    let raw_config = String::from_utf8(raw_config).map_err(|_| ImageError::Invalid {
        name: image.config.clone(),
        problem: "not UTF-8 text",
    })?;
    if image.layers.len() > limits.layers {
        return Err(ImageError::TooManyLayers {
            layers: image.layers.len(),
            limit: limits.layers,
        });
    }
    if image.layers.len() != diff_ids.len() {
        return Err(ImageError::LayerCount {
            layers: image.layers.len(),
            diff_ids: diff_ids.len(),
        });
    }
    let mut layers = Vec::with_capacity(diff_ids.len());
    for (name, diff_id) in image.layers.iter().zip(diff_ids) {
        // The format has no digest of the blob: what it decompresses to is what counts.
        layers.push(LayerSource {
            name: member(name)?,
            blob: None,
            diff_id,
        });
    }
    let tags = image.repo_tags.unwrap_or_default();
    let suggested_name = tag
        .map(str::to_owned)
        .or_else(|| tags.first().cloned())
        .unwrap_or_else(|| {
            let stem = storage
                .path()
                .file_stem()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned();
            format!("{}:latest", stem.trim_end_matches(".tar"))
        });
    Ok(OpenImage {
        storage,
        id,
        manifest: None,
        config,
        raw_config,
        layers,
        suggested_name,
    })
}

fn choose(images: Vec<Image>, tag: Option<&str>) -> Result<Image, ImageError> {
    let known = || {
        let names: Vec<String> = images
            .iter()
            .flat_map(|image| image.repo_tags.clone().unwrap_or_default())
            .collect();
        if names.is_empty() {
            "none".to_owned()
        } else {
            names.join(", ")
        }
    };
    let Some(tag) = tag else {
        if images.len() > 1 {
            return Err(ImageError::Ambiguous { known: known() });
        }
        let empty = ImageError::Invalid {
            name: MANIFEST.to_owned(),
            problem: "it lists no image",
        };
        return images.into_iter().next().ok_or(empty);
    };
    let error = ImageError::NoSuchTag {
        tag: tag.to_owned(),
        known: known(),
    };
    let goes_by = |image: &Image| {
        let tags = image.repo_tags.iter().flatten();
        let mut names = tags.map(String::as_str);
        names.any(|name| {
            name == tag
                || name
                    .rsplit_once(':')
                    .is_some_and(|(name, last)| name == tag || last == tag)
        })
    };
    images.into_iter().find(goes_by).ok_or(error)
}

fn member(name: &str) -> Result<String, ImageError> {
    normal(name).ok_or_else(|| ImageError::Invalid {
        name: MANIFEST.to_owned(),
        problem: "a file's path leads nowhere",
    })
}
