//! Tar archives and image layouts for tests, well-formed or deliberately not.

#![allow(dead_code, reason = "each test program uses its own part of this")]

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

/// One member of an archive.
#[derive(Clone)]
pub struct Member {
    pub path: Vec<u8>,
    pub kind: u8,
    pub mode: u32,
    pub uid: u64,
    pub gid: u64,
    pub mtime: (i64, u32),
    pub link: Vec<u8>,
    pub content: Vec<u8>,
    pub device: (u32, u32),
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

impl std::fmt::Debug for Member {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let text = |bytes: &[u8]| bytes.escape_ascii().to_string();
        let (kind, path, link) = (char::from(self.kind), text(&self.path), text(&self.link));
        write!(
            formatter,
            "{kind} {path} -> {link:?} {:o}, {} bytes",
            self.mode,
            self.content.len()
        )
    }
}

impl Member {
    pub fn new(kind: u8, path: impl AsRef<[u8]>) -> Self {
        Self {
            path: path.as_ref().to_vec(),
            kind,
            mode: if kind == b'5' { 0o755 } else { 0o644 },
            uid: 0,
            gid: 0,
            mtime: (1_700_000_000, 0),
            link: Vec::new(),
            content: Vec::new(),
            device: (0, 0),
            xattrs: Vec::new(),
        }
    }

    pub fn file(path: impl AsRef<[u8]>, content: impl AsRef<[u8]>) -> Self {
        Self {
            content: content.as_ref().to_vec(),
            ..Self::new(b'0', path)
        }
    }

    pub fn dir(path: impl AsRef<[u8]>) -> Self {
        Self::new(b'5', path)
    }

    pub fn symlink(path: impl AsRef<[u8]>, target: impl AsRef<[u8]>) -> Self {
        Self {
            link: target.as_ref().to_vec(),
            ..Self::new(b'2', path)
        }
    }

    pub fn hard_link(path: impl AsRef<[u8]>, target: impl AsRef<[u8]>) -> Self {
        Self {
            link: target.as_ref().to_vec(),
            ..Self::new(b'1', path)
        }
    }

    pub fn device(path: impl AsRef<[u8]>, kind: u8, device: (u32, u32)) -> Self {
        Self {
            device,
            ..Self::new(kind, path)
        }
    }

    #[must_use]
    pub fn mode(mut self, mode: u32) -> Self {
        self.mode = mode;
        self
    }

    #[must_use]
    pub fn owner(mut self, uid: u64, gid: u64) -> Self {
        (self.uid, self.gid) = (uid, gid);
        self
    }

    #[must_use]
    pub fn mtime(mut self, secs: i64, nanos: u32) -> Self {
        self.mtime = (secs, nanos);
        self
    }

    #[must_use]
    pub fn xattr(mut self, name: impl AsRef<[u8]>, value: impl AsRef<[u8]>) -> Self {
        self.xattrs
            .push((name.as_ref().to_vec(), value.as_ref().to_vec()));
        self
    }

    /// The member's headers and contents.
    pub fn encode(&self) -> Vec<u8> {
        let mut records = Vec::new();
        if self.path.len() > 100 {
            records.extend(pax_record(b"path", &self.path));
        }
        if self.link.len() > 100 {
            records.extend(pax_record(b"linkpath", &self.link));
        }
        if self.mtime.1 != 0 || self.mtime.0 < 0 {
            records.extend(pax_record(b"mtime", pax_time(self.mtime).as_bytes()));
        }
        for (key, value) in [("uid", self.uid), ("gid", self.gid)] {
            if value > 0o777_7777 {
                records.extend(pax_record(key.as_bytes(), value.to_string().as_bytes()));
            }
        }
        for (name, value) in &self.xattrs {
            records.extend(pax_record(&[b"SCHILY.xattr.", name.as_slice()].concat(), value));
        }
        let mut out = Vec::new();
        if !records.is_empty() {
            out.extend(header(&Member::new(b'x', "PaxHeaders/x"), records.len() as u64));
            out.extend(padded(&records));
        }
        let size = if matches!(self.kind, 0 | b'0' | b'7') {
            self.content.len() as u64
        } else {
            0
        };
        out.extend(header(self, size));
        if size > 0 {
            out.extend(padded(&self.content));
        }
        out
    }
}

/// An archive of these members, with the end mark.
pub fn archive(members: &[Member]) -> Vec<u8> {
    let mut out: Vec<u8> = members.iter().flat_map(Member::encode).collect();
    out.extend([0; 1024]);
    out
}

/// `LENGTH KEY=VALUE\n`.
pub fn pax_record(key: &[u8], value: &[u8]) -> Vec<u8> {
    let body = key.len() + value.len() + 3;
    let mut length = body + body.to_string().len();
    while length.to_string().len() + body != length {
        length = length.to_string().len() + body;
    }
    [length.to_string().as_bytes(), b" ", key, b"=", value, b"\n"].concat()
}

fn pax_time((secs, nanos): (i64, u32)) -> String {
    if secs < 0 && nanos > 0 {
        let whole = secs + 1;
        let sign = if whole == 0 { "-" } else { "" };
        format!("{sign}{whole}.{:09}", 1_000_000_000 - nanos)
    } else {
        format!("{secs}.{nanos:09}")
    }
}

/// A ustar header with a right checksum.
pub fn header(member: &Member, size: u64) -> Vec<u8> {
    let mut block = vec![0_u8; 512];
    let put =
        |block: &mut Vec<u8>, at: usize, bytes: &[u8]| block[at..at + bytes.len()].copy_from_slice(bytes);
    put(&mut block, 0, &member.path[..member.path.len().min(100)]);
    put(&mut block, 100, format!("{:07o}", member.mode).as_bytes());
    put(
        &mut block,
        108,
        format!("{:07o}", member.uid.min(0o777_7777)).as_bytes(),
    );
    put(
        &mut block,
        116,
        format!("{:07o}", member.gid.min(0o777_7777)).as_bytes(),
    );
    put(&mut block, 124, format!("{size:011o}").as_bytes());
    put(
        &mut block,
        136,
        format!("{:011o}", member.mtime.0.max(0)).as_bytes(),
    );
    block[156] = member.kind;
    put(&mut block, 157, &member.link[..member.link.len().min(100)]);
    put(&mut block, 257, b"ustar\x0000");
    put(&mut block, 329, format!("{:07o}", member.device.0).as_bytes());
    put(&mut block, 337, format!("{:07o}", member.device.1).as_bytes());
    checksum(&mut block);
    block
}

/// Make a header's checksum right.
pub fn checksum(block: &mut [u8]) {
    block[148..156].fill(b' ');
    let sum: u32 = block[..512].iter().map(|byte| u32::from(*byte)).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
}

/// Contents filled up to whole records.
pub fn padded(bytes: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    bytes
}

pub fn sha256(bytes: &[u8]) -> String {
    let digest = Sha256::digest(bytes);
    digest
        .iter()
        .fold("sha256:".to_owned(), |text, byte| text + &format!("{byte:02x}"))
}

pub fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).expect("memory takes everything");
    encoder.finish().expect("memory takes everything")
}

/// An OCI image layout in a directory.
pub struct Layout {
    pub dir: PathBuf,
    layers: Vec<(serde_json::Value, String)>,
    pub config: serde_json::Value,
}

impl Layout {
    pub fn new(dir: &Path) -> Self {
        fs::create_dir_all(dir.join("blobs/sha256")).expect("scratch directory");
        fs::write(dir.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).expect("scratch directory");
        Self {
            dir: dir.to_path_buf(),
            layers: Vec::new(),
            config: serde_json::json!({"architecture": "amd64", "os": "linux", "config": {"Cmd": ["/bin/sh"]}}),
        }
    }

    /// Store bytes under their digest; gives the descriptor.
    pub fn blob(&self, bytes: &[u8], media_type: &str) -> serde_json::Value {
        let digest = sha256(bytes);
        fs::write(self.dir.join("blobs/sha256").join(&digest[7..]), bytes).expect("scratch directory");
        serde_json::json!({"mediaType": media_type, "digest": digest, "size": bytes.len()})
    }

    /// A layer, gzip-compressed.
    pub fn layer(&mut self, archive: &[u8]) -> &mut Self {
        let descriptor = self.blob(&gzip(archive), "application/vnd.oci.image.layer.v1.tar+gzip");
        self.described(descriptor, sha256(archive))
    }

    /// A layer whose blob and descriptor the test made.
    pub fn described(&mut self, descriptor: serde_json::Value, diff_id: String) -> &mut Self {
        self.layers.push((descriptor, diff_id));
        self
    }

    /// The manifest, without writing the index.
    pub fn manifest(&self) -> serde_json::Value {
        let mut config = self.config.clone();
        let diff_ids: Vec<&String> = self.layers.iter().map(|(_, diff_id)| diff_id).collect();
        config["rootfs"] = serde_json::json!({"type": "layers", "diff_ids": diff_ids});
        let config = self.blob(
            config.to_string().as_bytes(),
            "application/vnd.oci.image.config.v1+json",
        );
        let layers: Vec<&serde_json::Value> = self.layers.iter().map(|(descriptor, _)| descriptor).collect();
        serde_json::json!({"schemaVersion": 2, "config": config, "layers": layers})
    }

    /// Write configuration, manifest and index; the tag is `latest`.
    pub fn write(&self) {
        let descriptor = self.blob(
            self.manifest().to_string().as_bytes(),
            "application/vnd.oci.image.manifest.v1+json",
        );
        self.index(descriptor);
    }

    /// Write the index alone.
    pub fn index(&self, mut descriptor: serde_json::Value) {
        descriptor["annotations"] = serde_json::json!({"org.opencontainers.image.ref.name": "latest"});
        let index = serde_json::json!({"schemaVersion": 2, "manifests": [descriptor]});
        fs::write(self.dir.join("index.json"), index.to_string()).expect("scratch directory");
    }
}

/// Data that doesn't compress: blobs of some size.
pub fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()[0]
    })
    .take(len)
    .collect()
}
