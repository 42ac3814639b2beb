//! `--volume` and `--mount`: what of the host a container sees, in docker's syntax.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

use clap::Args;
use sandbox::{ContainerSpec, Directories, Runtime, SandboxError, ShareMount, ShareSpec, check_volume_name};

use crate::container_options::parse_bytes;

/// The options of a container's mounts.
#[derive(Debug, Args)]
pub struct MountOptions {
    /// Share a directory or file of the host, or a volume by its name: SOURCE:PATH[:ro]; what isn't there is made
    #[arg(short, long = "volume", value_name = "SOURCE:PATH[:OPTIONS]")]
    volumes: Vec<String>,
    /// Mount something: type=bind|volume|tmpfs,source=SOURCE,target=PATH[,readonly]
    #[arg(long = "mount", value_name = "OPTIONS")]
    mounts: Vec<String>,
}

/// A parsed mount.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Parsed {
    Bind {
        source: String,
        target: String,
        read_only: bool,
        recursive: bool,
        /// Make a directory of the source if nothing is there.
        create: bool,
        options: Vec<String>,
    },
    Volume {
        /// None: one without a name, for this container.
        name: Option<String>,
        target: String,
        read_only: bool,
        copy_up: bool,
        options: Vec<String>,
    },
    Tmpfs {
        target: String,
        options: Vec<String>,
    },
}

impl Parsed {
    fn target(&self) -> &str {
        match self {
            Self::Bind { target, .. } | Self::Volume { target, .. } | Self::Tmpfs { target, .. } => target,
        }
    }
}

fn check_target(target: &str) -> Result<(), String> {
    if !target.starts_with('/') {
        return Err(format!(
            "invalid mount path: '{target}' mount path must be absolute"
        ));
    }
    let real = target
        .split('/')
        .any(|part| !part.is_empty() && part != "." && part != "..");
    if real && !target.split('/').any(|part| part == "..") {
        Ok(())
    } else {
        Err(format!(
            "invalid mount path: '{target}' must be a path below /, without .."
        ))
    }
}

/// `HOST-PATH:PATH[:OPTIONS]`.
fn parse_volume(text: &str) -> Result<Parsed, String> {
    let parts: Vec<&str> = text.split(':').collect();
    let (source, target, options) = match parts.as_slice() {
        [source, target] => (*source, *target, ""),
        [source, target, options] => (*source, *target, *options),
        _ => return Err("expected SOURCE:PATH[:OPTIONS]".into()),
    };
    let is_path = source.starts_with('/');
    if !is_path {
        check_volume_name(source).map_err(|error| error.to_string())?;
    }
    check_target(target)?;
    let mut copy_up = true;
    let mut read_only = false;
    let mut recursive = true;
    let mut kept = Vec::new();
    for option in options.split(',').filter(|option| !option.is_empty()) {
        match option {
            "ro" | "readonly" => read_only = true,
            "rw" => read_only = false,
            "bind" => recursive = false,
            // Labels of SELinux, and how stale a client may be: nothing to do here.
            "rbind" | "z" | "Z" | "consistent" | "cached" | "delegated" => {}
            "nocopy" => copy_up = false,
            "private" | "rprivate" | "slave" | "rslave" => {}
            "shared" | "rshared" => {
                return Err(format!(
                    "invalid mode: {option}: mounts made in a microVM can't appear on the host"
                ));
            }
            "noexec" | "nosuid" | "nodev" | "exec" | "suid" => kept.push(option.to_owned()),
            _ => return Err(format!("invalid mode: {option}")),
        }
    }
    let target = target.to_owned();
    Ok(if is_path {
        Parsed::Bind {
            source: source.to_owned(),
            target,
            read_only,
            recursive,
            create: true,
            options: kept,
        }
    } else {
        Parsed::Volume {
            name: Some(source.to_owned()),
            target,
            read_only,
            copy_up,
            options: kept,
        }
    })
}

fn truth(key: &str, value: Option<&str>) -> Result<bool, String> {
    match value {
        None | Some("" | "1" | "true") => Ok(true),
        Some("0" | "false") => Ok(false),
        Some(value) => Err(format!("invalid value for {key}: {value}")),
    }
}

/// `type=…,source=…,target=…`.
fn parse_mount(text: &str) -> Result<Parsed, String> {
    // Docker's default.
    let mut kind = "volume";
    let mut copy_up = true;
    let (mut source, mut target) = (None, None);
    let (mut read_only, mut recursive) = (false, true);
    let mut tmpfs = Vec::new();
    for field in text.split(',') {
        let (key, value) = match field.split_once('=') {
            Some((key, value)) => (key.trim(), Some(value.trim())),
            None => (field.trim(), None),
        };
        let text_value = value.ok_or_else(|| format!("invalid field '{field}' must be a key=value pair"));
        match key {
            "type" => kind = text_value?,
            "source" | "src" => source = Some(text_value?),
            "target" | "destination" | "dst" => target = Some(text_value?),
            "readonly" | "ro" => read_only = truth(key, value)?,
            "bind-nonrecursive" => recursive = !truth(key, value)?,
            "bind-propagation"
                if matches!(text_value.clone()?, "private" | "rprivate" | "slave" | "rslave") => {}
            "consistency" => {}
            "volume-nocopy" => copy_up = !truth(key, value)?,
            "volume-driver" if text_value.clone()? == "local" => {}
            "tmpfs-size" => {
                let bytes = parse_bytes(text_value?).map_err(|error| format!("tmpfs-size: {error}"))?;
                tmpfs.push(format!("size={bytes}"));
            }
            "tmpfs-mode" => {
                let mode = u32::from_str_radix(text_value.clone()?, 8)
                    .map_err(|_| format!("invalid value for tmpfs-mode: {}", value.unwrap_or("")))?;
                tmpfs.push(format!("mode={mode:o}"));
            }
            _ => return Err(format!("unexpected key '{key}' in '{field}'")),
        }
    }
    let target = target.ok_or("target is required")?.to_owned();
    check_target(&target)?;
    match kind {
        "bind" => {
            let source = source.ok_or("source is required for a bind mount")?;
            if !source.starts_with('/') {
                return Err(format!("invalid host path: '{source}' must be absolute"));
            }
            if !tmpfs.is_empty() {
                return Err("cannot mix 'tmpfs-*' options with mount type 'bind'".into());
            }
            Ok(Parsed::Bind {
                source: source.to_owned(),
                target,
                read_only,
                recursive,
                create: false,
                options: Vec::new(),
            })
        }
        "volume" => {
            if !tmpfs.is_empty() {
                return Err("cannot mix 'tmpfs-*' options with mount type 'volume'".into());
            }
            if let Some(name) = source {
                check_volume_name(name).map_err(|error| error.to_string())?;
            }
            Ok(Parsed::Volume {
                name: source.map(str::to_owned),
                target,
                read_only,
                copy_up,
                options: Vec::new(),
            })
        }
        "tmpfs" if source.is_some() => Err("source must not be given for a tmpfs".into()),
        "tmpfs" => {
            if read_only {
                tmpfs.push("ro".into());
            }
            Ok(Parsed::Tmpfs {
                target,
                options: tmpfs,
            })
        }
        other => Err(format!(
            "unknown mount type {other:?}; there are bind, volume and tmpfs"
        )),
    }
}

impl MountOptions {
    fn parse(&self) -> Result<Vec<Parsed>, SandboxError> {
        let named = |option: &'static str, text: &str| {
            let text = text.to_owned();
            move |problem: String| SandboxError::InvalidOption {
                option,
                problem: format!("{text:?}: {problem}"),
            }
        };
        let volumes = self
            .volumes
            .iter()
            .map(|text| parse_volume(text).map_err(named("--volume", text)));
        let mounts = self
            .mounts
            .iter()
            .map(|text| parse_mount(text).map_err(named("--mount", text)));
        let parsed: Vec<Parsed> = volumes.chain(mounts).collect::<Result<_, _>>()?;
        let mut targets = BTreeSet::new();
        for mount in &parsed {
            if !targets.insert(mount.target().trim_end_matches('/')) {
                return Err(SandboxError::InvalidOption {
                    option: "--volume",
                    problem: format!("Duplicate mount point: {}", mount.target()),
                });
            }
        }
        Ok(parsed)
    }

    /// Adds them to a container.
    ///
    /// # Errors
    /// One is not understood, or its source is not there.
    pub fn apply(&self, spec: &mut ContainerSpec, directories: &Directories) -> Result<(), SandboxError> {
        for mount in self.parse()? {
            match mount {
                Parsed::Volume {
                    name,
                    target,
                    read_only,
                    copy_up,
                    options,
                } => {
                    let runtime = Runtime::open(directories)?;
                    let volume = runtime.create_volume(name.as_deref(), BTreeMap::new())?;
                    let mount = ShareMount {
                        destination: target,
                        options,
                        volume: Some(volume.record.name),
                        copy_up: copy_up && !read_only,
                        ..ShareMount::default()
                    };
                    add(spec, volume.data, (read_only, true), mount);
                }
                Parsed::Tmpfs { target, options } => spec.tmpfs.push((target, options)),
                Parsed::Bind {
                    source,
                    target,
                    read_only,
                    recursive,
                    create,
                    options,
                } => {
                    prepare_source(Path::new(&source), create)?;
                    let mount = ShareMount {
                        destination: target,
                        options,
                        ..ShareMount::default()
                    };
                    add(spec, source.into(), (read_only, recursive), mount);
                }
            }
        }
        Ok(())
    }
}

/// Adds a share and its mount.
fn add(
    spec: &mut ContainerSpec,
    source: PathBuf,
    (read_only, recursive): (bool, bool),
    mut mount: ShareMount,
) {
    if read_only {
        mount.options.push("ro".into());
    }
    mount.share = u32::try_from(spec.shares.len()).unwrap_or(u32::MAX);
    spec.share_mounts.push(mount);
    spec.shares.push(ShareSpec {
        source,
        read_only,
        recursive,
        exclusive: false,
        ..ShareSpec::default()
    });
}

/// As docker: `--volume` makes a missing directory, `--mount` doesn't.
fn prepare_source(source: &Path, create: bool) -> Result<(), SandboxError> {
    if source.exists() {
        return Ok(());
    }
    if !create {
        return Err(SandboxError::InvalidOption {
            option: "--mount",
            problem: format!("bind source path does not exist: {}", source.display()),
        });
    }
    fs::create_dir_all(source).map_err(|source_error| SandboxError::Io {
        action: "creating",
        path: source.to_owned(),
        source: source_error,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bind(text: &str) -> (String, String, bool) {
        match parse_volume(text).unwrap() {
            Parsed::Bind {
                source,
                target,
                read_only,
                ..
            } => (source, target, read_only),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn volumes_have_a_source_a_target_and_options() {
        assert_eq!(bind("/a:/b"), ("/a".into(), "/b".into(), false));
        assert_eq!(bind("/a:/b:ro"), ("/a".into(), "/b".into(), true));
        assert_eq!(bind("/a:/b:z,rw"), ("/a".into(), "/b".into(), false));
        let parsed = parse_volume("data:/b:nocopy").unwrap();
        assert!(matches!(
            parsed,
            Parsed::Volume { name: Some(name), copy_up: false, .. } if name == "data"
        ));
        for wrong in [
            "/a",
            "/a:b",
            "a/b:/c",
            "/a:/",
            "/a:/b:rshared",
            "/a:/b:xx",
            "/a:/b:ro:x",
            "/a:/b/..",
        ] {
            parse_volume(wrong).unwrap_err();
        }
    }

    #[test]
    fn mounts_are_key_value_pairs() {
        let parsed = parse_mount("type=bind,source=/a,target=/b,readonly").unwrap();
        assert!(matches!(
            parsed,
            Parsed::Bind {
                read_only: true,
                create: false,
                ..
            }
        ));
        let parsed = parse_mount("type=tmpfs,dst=/t,tmpfs-size=1m,tmpfs-mode=1777").unwrap();
        assert_eq!(
            parsed,
            Parsed::Tmpfs {
                target: "/t".into(),
                options: vec!["size=1048576".into(), "mode=1777".into()]
            }
        );
        for (wrong, part) in [
            ("type=bind,source=/a", "target is required"),
            ("type=bind,target=/a", "source is required"),
            ("type=bind,source,target=/a", "key=value"),
            ("type=bind,source=/a,target=/b,colour=red", "unexpected key"),
            ("type=volume,source=a/b,target=/b", "invalid characters"),
            ("type=npipe,target=/b", "unknown mount type"),
            ("type=tmpfs,source=/a,target=/b", "must not be given"),
        ] {
            let error = parse_mount(wrong).unwrap_err();
            assert!(error.contains(part), "{wrong}: {error}");
        }
    }

    #[test]
    fn one_place_is_mounted_once() {
        let options = MountOptions {
            volumes: vec!["/a:/b".into()],
            mounts: vec!["type=tmpfs,target=/b/".into()],
        };
        let error = options.parse().unwrap_err().to_string();
        assert!(error.contains("Duplicate mount point"), "{error}");
    }
}
