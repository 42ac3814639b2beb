//! The OCI image layout: `index.json` → manifest → configuration and layers, each named by its digest.

use oci_spec::image::{Descriptor, ImageIndex, ImageManifest, MediaType};
use serde::Deserialize;
use serde::de::IgnoredAny;

use super::{ARCHITECTURE, ImageError, LayerSource, OpenImage, Storage, config};
use crate::digest::Digest;
use crate::limits::Limits;

const INDEX: &str = "index.json";
const REF_NAME: &str = "org.opencontainers.image.ref.name";
/// An index may list indexes; nobody nests them deeper than this.
const NESTING_MAX: usize = 4;

/// Find the image tagged `tag`, or the only one there is.
pub(super) fn open(storage: Storage, tag: Option<&str>, limits: &Limits) -> Result<OpenImage, ImageError> {
    if !storage.contains(INDEX) {
        let problem = "it has no index.json, so it isn't an OCI image layout";
        return Err(ImageError::NotAnImage {
            path: storage.path().to_path_buf(),
            problem,
        });
    }
    let index: ImageIndex = parse(&storage.read_document(INDEX, limits)?, INDEX)?;
    let candidates = tagged(index.manifests(), tag)?;
    let suggested_name = suggested_name(&storage, tag, candidates.first());
    let (manifest_digest, manifest) = descend(&storage, candidates, limits)?;
    describe(storage, manifest_digest, &manifest, suggested_name, limits)
}

/// The image of a manifest that is in the storage already, checked.
#[cfg(feature = "registry")]
pub(crate) fn open_manifest(
    storage: Storage,
    digest: &Digest,
    suggested_name: String,
    limits: &Limits,
) -> Result<OpenImage, ImageError> {
    let bytes = storage.read_document(&blob_name(digest), limits)?;
    let name = digest.to_string();
    match Shape::of(&bytes, &name)? {
        Shape::Manifest => describe(
            storage,
            digest.clone(),
            &parse(&bytes, &name)?,
            suggested_name,
            limits,
        ),
        Shape::Index => Err(ImageError::Invalid {
            name,
            problem: "an index where a manifest should be",
        }),
    }
}

/// What a registry answers when asked for an image.
#[cfg(feature = "registry")]
pub(crate) enum Document {
    /// The digest of the manifest, or index, for this machine.
    Index(Digest),
    Manifest {
        config: Digest,
    },
}

#[cfg(feature = "registry")]
impl Document {
    pub fn parse(bytes: &[u8], name: &str) -> Result<Self, ImageError> {
        match Shape::of(bytes, name)? {
            Shape::Index => {
                let index: ImageIndex = parse(bytes, name)?;
                let manifest = for_this_machine(index.manifests())?;
                Ok(Self::Index(digest_of(manifest, "the index")?))
            }
            Shape::Manifest => {
                let manifest: ImageManifest = parse(bytes, name)?;
                let config = digest_of(manifest.config(), "the manifest")?;
                Ok(Self::Manifest { config })
            }
        }
    }
}

/// Configuration and layers of a manifest.
fn describe(
    storage: Storage,
    manifest_digest: Digest,
    manifest: &ImageManifest,
    suggested_name: String,
    limits: &Limits,
) -> Result<OpenImage, ImageError> {
    if !is_config(manifest.config().media_type()) {
        return Err(ImageError::MediaType {
            media_type: manifest.config().media_type().to_string(),
        });
    }
    let id = digest_of(manifest.config(), "the manifest")?;
    let raw_config = read_blob(&storage, manifest.config(), limits)?;
    let (config, diff_ids) = config::parse(&raw_config, &id.to_string())?;
    let raw_config = String::from_utf8(raw_config).map_err(|_| ImageError::Invalid {
        name: id.to_string(),
        problem: "not UTF-8 text",
    })?;
    let layers = layers(manifest, diff_ids, limits)?;
    Ok(OpenImage {
        storage,
        id,
        manifest: Some(manifest_digest),
        config,
        raw_config,
        layers,
        suggested_name,
    })
}

/// The descriptors that go by the wanted tag.
fn tagged(manifests: &[Descriptor], tag: Option<&str>) -> Result<Vec<Descriptor>, ImageError> {
    let wanted = tag.unwrap_or("latest");
    let named: Vec<Descriptor> = manifests
        .iter()
        .filter(|descriptor| name_of(descriptor).is_some_and(|name| matches(name, wanted)))
        .cloned()
        .collect();
    if !named.is_empty() {
        return Ok(named);
    }
    let mut known: Vec<&str> = manifests.iter().filter_map(name_of).collect();
    known.sort_unstable();
    known.dedup();
    let known_text = if known.is_empty() {
        "none".to_owned()
    } else {
        known.join(", ")
    };
    match tag {
        // Without tags, several manifests are the platforms of one image.
        None if known.len() <= 1 && !manifests.is_empty() => Ok(manifests.to_vec()),
        None if known.is_empty() => Err(ImageError::Invalid {
            name: INDEX.to_owned(),
            problem: "it lists no image",
        }),
        None => Err(ImageError::Ambiguous { known: known_text }),
        Some(tag) => Err(ImageError::NoSuchTag {
            tag: tag.to_owned(),
            known: known_text,
        }),
    }
}

fn name_of(descriptor: &Descriptor) -> Option<&str> {
    descriptor
        .annotations()
        .as_ref()?
        .get(REF_NAME)
        .map(String::as_str)
}

/// Some tools put the whole name into the annotation, most only the tag.
fn matches(name: &str, tag: &str) -> bool {
    name == tag
        || name
            .rsplit_once(':')
            .is_some_and(|(_, last)| last == tag && !last.contains('/'))
}

fn suggested_name(storage: &Storage, tag: Option<&str>, first: Option<&Descriptor>) -> String {
    let annotated = first.and_then(name_of);
    if let Some(name) = annotated.filter(|name| name.contains([':', '/'])) {
        return name.to_owned();
    }
    let path = storage.path();
    let stem = path
        .file_name()
        .or_else(|| path.parent()?.file_name())
        .unwrap_or_default()
        .to_string_lossy();
    let stem = [".tar.gz", ".tar.zst", ".tar", ".tgz"]
        .iter()
        .find_map(|suffix| stem.strip_suffix(suffix))
        .unwrap_or(&stem);
    format!("{stem}:{}", tag.or(annotated).unwrap_or("latest"))
}

/// Go through indexes to the manifest for this machine.
fn descend(
    storage: &Storage,
    mut candidates: Vec<Descriptor>,
    limits: &Limits,
) -> Result<(Digest, ImageManifest), ImageError> {
    for _ in 0..NESTING_MAX {
        let descriptor = for_this_machine(&candidates)?;
        let digest = digest_of(descriptor, "the index")?;
        let bytes = read_blob(storage, descriptor, limits)?;
        let name = digest.to_string();
        match Shape::of(&bytes, &name)? {
            Shape::Manifest => return Ok((digest, parse(&bytes, &name)?)),
            Shape::Index => {
                let index: ImageIndex = parse(&bytes, &name)?;
                candidates = index.manifests().clone();
            }
        }
    }
    Err(ImageError::Invalid {
        name: INDEX.to_owned(),
        problem: "indexes are nested too deeply",
    })
}

fn for_this_machine(candidates: &[Descriptor]) -> Result<&Descriptor, ImageError> {
    let fits = |descriptor: &&Descriptor| {
        descriptor.platform().as_ref().is_none_or(|platform| {
            platform.os().to_string() == "linux" && platform.architecture().to_string() == ARCHITECTURE
        })
    };
    // A variant may want a newer processor than this one: of several, one that says nothing is taken.
    let plain = |descriptor: &&Descriptor| {
        let platform = descriptor.platform().as_ref();
        platform.is_none_or(|platform| {
            let variant = platform.variant().as_deref().unwrap_or_default();
            matches!(variant, "" | "v1") || (ARCHITECTURE == "arm64" && variant == "v8")
        })
    };
    let mut fitting = candidates.iter().filter(fits);
    let best = fitting.clone().find(plain).or_else(|| fitting.next());
    best.ok_or_else(|| {
        let found: Vec<String> = candidates
            .iter()
            .filter_map(|descriptor| descriptor.platform().as_ref())
            .map(|platform| format!("{}/{}", platform.os(), platform.architecture()))
            .collect();
        let found = if found.is_empty() {
            "nothing at all".to_owned()
        } else {
            found.join(", ")
        };
        ImageError::Platform {
            found,
            wanted: config::platform(),
        }
    })
}

/// An index or a manifest: media types may be missing, so the document itself decides, and must not be both.
enum Shape {
    Index,
    Manifest,
}

impl Shape {
    fn of(bytes: &[u8], name: &str) -> Result<Self, ImageError> {
        #[derive(Deserialize)]
        struct Probe {
            manifests: Option<IgnoredAny>,
            layers: Option<IgnoredAny>,
            config: Option<IgnoredAny>,
            #[serde(rename = "schemaVersion")]
            version: Option<u64>,
        }
        let probe: Probe = parse(bytes, name)?;
        let invalid = |problem| ImageError::Invalid {
            name: name.to_owned(),
            problem,
        };
        if probe.version == Some(1) {
            return Err(invalid(
                "it is in Docker's first image format, which nobody writes any more; push it again",
            ));
        }
        match (
            probe.manifests.is_some(),
            probe.layers.is_some() || probe.config.is_some(),
        ) {
            (true, false) => Ok(Self::Index),
            (false, true) => Ok(Self::Manifest),
            (true, true) => Err(invalid("it claims to be both an index and a manifest")),
            (false, false) => Err(invalid("neither an index nor a manifest")),
        }
    }
}

/// The layers with the digests of what they decompress to.
fn layers(
    manifest: &ImageManifest,
    diff_ids: Vec<Digest>,
    limits: &Limits,
) -> Result<Vec<LayerSource>, ImageError> {
    let count = manifest.layers().len();
    if count > limits.layers {
        return Err(ImageError::TooManyLayers {
            layers: count,
            limit: limits.layers,
        });
    }
    if count != diff_ids.len() {
        return Err(ImageError::LayerCount {
            layers: count,
            diff_ids: diff_ids.len(),
        });
    }
    let mut layers = Vec::with_capacity(count);
    for (descriptor, diff_id) in manifest.layers().iter().zip(diff_ids) {
        if !is_layer(descriptor.media_type()) {
            return Err(ImageError::MediaType {
                media_type: descriptor.media_type().to_string(),
            });
        }
        let digest = digest_of(descriptor, "a layer's descriptor")?;
        layers.push(LayerSource {
            name: blob_name(&digest),
            blob: Some((digest, descriptor.size())),
            diff_id,
        });
    }
    Ok(layers)
}

fn is_config(media_type: &MediaType) -> bool {
    matches!(media_type, MediaType::ImageConfig)
        || media_type.to_string() == "application/vnd.docker.container.image.v1+json"
}

/// Archives of files, compressed or not; how is seen in the blob itself.
fn is_layer(media_type: &MediaType) -> bool {
    let text = media_type.to_string();
    let known = text.starts_with("application/vnd.oci.image.layer.")
        || text.starts_with("application/vnd.docker.image.rootfs.");
    known && text.contains(".tar") && !text.contains("encrypted")
}

fn digest_of(descriptor: &Descriptor, place: &'static str) -> Result<Digest, ImageError> {
    descriptor
        .digest()
        .to_string()
        .parse()
        .map_err(|source| ImageError::Digest { place, source })
}

/// Where in a layout a blob is.
pub(crate) fn blob_name(digest: &Digest) -> String {
    format!("blobs/{}/{}", digest.algorithm_name(), digest.hex())
}

/// A document that must be exactly what its descriptor says.
fn read_blob(storage: &Storage, descriptor: &Descriptor, limits: &Limits) -> Result<Vec<u8>, ImageError> {
    let digest = digest_of(descriptor, "a descriptor")?;
    let name = digest.to_string();
    if descriptor.size() > limits.document_bytes {
        return Err(ImageError::DocumentTooLarge {
            name,
            bytes: descriptor.size(),
            limit: limits.document_bytes,
        });
    }
    let bytes = storage.read_document(&blob_name(&digest), limits)?;
    if bytes.len() as u64 != descriptor.size() {
        return Err(ImageError::WrongSize {
            name,
            expected: descriptor.size(),
            actual: bytes.len() as u64,
        });
    }
    if !digest.matches(&bytes) {
        return Err(ImageError::WrongDigest { name });
    }
    Ok(bytes)
}

fn parse<'a, T: Deserialize<'a>>(bytes: &'a [u8], name: &str) -> Result<T, ImageError> {
    serde_json::from_slice(bytes).map_err(|source| ImageError::Malformed {
        name: name.to_owned(),
        source,
    })
}
