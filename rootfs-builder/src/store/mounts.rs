//! Which images of layers a container mounts: all of an image's layers, or, if they are too many, some of them merged.

use std::fs::File;
use std::ops::Range;

use super::Error;
use super::files::{Directories, at};
use super::record::{ImageLayer, LayerRecord, VERSION};
use crate::digest::Digest;
use crate::erofs::Reader;
use crate::layer::{LayerError, RootMetadata, merge};

/// As many disks a microVM has room for beside its other devices, with some to spare.
pub(super) const MOUNTS_MAX: usize = 12;

/// The layers to mount, or nothing if they are the image's own; and the root's metadata, if any layer has some.
pub(super) fn choose(
    directories: &Directories,
    layers: &[ImageLayer],
    max: usize,
) -> Result<(Option<Vec<ImageLayer>>, Option<RootMetadata>), Error> {
    let mut records = Vec::with_capacity(layers.len());
    for layer in layers {
        let missing = || Error::MissingLayer {
            image: String::new(),
            diff_id: layer.diff_id.to_string(),
        };
        records.push(directories.layer(&layer.key)?.ok_or_else(missing)?);
    }
    let root = records.iter().rev().find_map(|record| record.root);
    if layers.len() <= max {
        return Ok((None, root));
    }
    // What a layer hides altogether is not mounted.
    let bottom = records.iter().rposition(|record| record.hides_lower).unwrap_or(0);
    let (layers, records) = (&layers[bottom..], &records[bottom..]);
    if layers.len() <= max {
        return Ok((Some(layers.to_vec()), root));
    }
    let sizes: Vec<u64> = layers.iter().map(|layer| layer.size_bytes).collect();
    let run = cheapest_run(&sizes, layers.len() - max + 1);
    let merged = merged_layer(
        directories,
        &layers[run.clone()],
        &records[run.clone()],
        run.start == 0,
    )?;
    let mut mounts = layers[..run.start].to_vec();
    mounts.push(merged);
    mounts.extend_from_slice(&layers[run.end..]);
    Ok((Some(mounts), root))
}

/// The neighbours whose merging copies least; of equals the uppermost, because lower layers are shared more.
fn cheapest_run(sizes: &[u64], len: usize) -> Range<usize> {
    let best = sizes
        .windows(len)
        .map(|window| window.iter().sum::<u64>())
        .enumerate()
        .rev()
        .min_by_key(|(_, sum)| *sum);
    let start = best.map_or(0, |(start, _)| start);
    start..start + len
}

/// Find the merged layer, or make it.
fn merged_layer(
    directories: &Directories,
    layers: &[ImageLayer],
    records: &[LayerRecord],
    is_bottom: bool,
) -> Result<ImageLayer, Error> {
    let keys: Vec<&str> = layers.iter().map(|layer| layer.key.as_str()).collect();
    let digest = Digest::sha256_of(format!("{is_bottom} {}", keys.join(" ")).as_bytes());
    let key = format!("merged-{}", digest.hex());
    let as_layer = |size_bytes| ImageLayer {
        key: key.clone(),
        digest: digest.clone(),
        diff_id: digest.clone(),
        size_bytes,
        blob_bytes: None,
    };
    if let Ok(Some(record)) = directories.layer(&key) {
        return Ok(as_layer(record.size_bytes));
    }
    let _lock = directories.lock_layer(&key)?;
    if let Ok(Some(record)) = directories.layer(&key) {
        return Ok(as_layer(record.size_bytes));
    }
    let failed = |source| Error::Layer {
        digest: digest.to_string(),
        source: LayerError::from(source),
    };
    let mut readers = Vec::with_capacity(layers.len());
    for layer in layers {
        let path = directories.layer_blob(&layer.key);
        readers.push(Reader::open(File::open(&path).map_err(at(&path))?).map_err(failed)?);
    }
    let output = directories.temporary_file()?;
    let file = output.reopen().map_err(at(output.path()))?;
    let mut uuid = [0; 16];
    uuid.copy_from_slice(&digest.hex().as_bytes()[..16]);
    let written =
        merge(&readers, is_bottom, (file, directories.temporary.as_path()), uuid).map_err(failed)?;
    let record = LayerRecord {
        version: VERSION,
        diff_id: digest.clone(),
        size_bytes: written.size_bytes,
        archive_bytes: records.iter().map(|record| record.archive_bytes).sum(),
        entries: records.iter().map(|record| record.entries).sum(),
        inodes: written.inodes,
        root: records.iter().rev().find_map(|record| record.root),
        hides_lower: false,
    };
    directories.publish(output, &directories.layer_blob(&key), 0o444)?;
    directories.write_json(&directories.layer_record(&key), &record)?;
    Ok(as_layer(written.size_bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_smallest_neighbours_are_merged_and_of_equals_the_upper_ones() {
        assert_eq!(cheapest_run(&[100, 1, 1, 50, 1], 2), 1..3);
        assert_eq!(cheapest_run(&[5, 5, 5, 5], 2), 2..4);
        assert_eq!(cheapest_run(&[1, 2, 3], 3), 0..3);
    }
}
