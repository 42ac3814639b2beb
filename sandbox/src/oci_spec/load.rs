//! Reads `config.json` and `process.json`: bounded, with the place of every mistake.

use std::{
    fs::OpenOptions,
    io::{self, Read as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

use ::oci_spec::runtime::{Process, Spec};
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::{
    error::{Result, SpecError},
    warnings::Warnings,
};
use crate::capabilities;

/// Largest file that is read. Engines write some 10 KiB; what is large in one is its environment, which the kernel bounds.
pub const MAX_CONFIG_BYTES: u64 = 4 << 20;

const CAPABILITY_SETS: [&str; 5] = ["bounding", "effective", "inheritable", "permitted", "ambient"];

/// A bundle's configuration.
#[derive(Debug, Clone)]
pub struct Config {
    /// Everything in it that the specification knows; the rest is left out, as it says.
    pub spec: Spec,
    /// What an operator should be told.
    pub warnings: Vec<String>,
}

/// A process to be executed in a container.
#[derive(Debug, Clone)]
pub struct LoadedProcess {
    /// As the file says it.
    pub process: Process,
    /// What an operator should be told.
    pub warnings: Vec<String>,
}

/// Reads the configuration of the bundle in the directory `bundle`.
///
/// # Errors
///
/// It can't be read, isn't a configuration, or is one of another major version.
pub fn load(bundle: &Path) -> Result<Config> {
    let path = bundle.join("config.json");
    let mut document = read(&path)?;
    let mut warnings = Warnings::default();
    if let Some(process) = document.get_mut("process") {
        drop_unknown_capabilities(process, &mut warnings);
    }
    let spec: Spec = parse(&path, document)?;
    check_version(&path, spec.version())?;
    Ok(Config {
        spec,
        warnings: warnings.into(),
    })
}

/// Reads a file with a process, as `exec --process` takes it.
///
/// # Errors
///
/// It can't be read, or isn't one.
pub fn load_process(path: &Path) -> Result<LoadedProcess> {
    let mut document = read(path)?;
    let mut warnings = Warnings::default();
    drop_unknown_capabilities(&mut document, &mut warnings);
    Ok(LoadedProcess {
        process: parse(path, document)?,
        warnings: warnings.into(),
    })
}

fn read(path: &Path) -> Result<Value> {
    let unreadable = |source| SpecError::Unreadable {
        path: path.to_owned(),
        source,
    };
    // A FIFO in its place would be waited for.
    let mut options = OpenOptions::new();
    let options = options.read(true).custom_flags(nix::libc::O_NONBLOCK);
    let file = options.open(path).map_err(unreadable)?;
    if !file.metadata().map_err(unreadable)?.is_file() {
        return Err(unreadable(io::Error::other("not a regular file")));
    }
    let mut text = Vec::new();
    file.take(MAX_CONFIG_BYTES + 1)
        .read_to_end(&mut text)
        .map_err(unreadable)?;
    if text.len() as u64 > MAX_CONFIG_BYTES {
        return Err(SpecError::TooLarge {
            path: path.to_owned(),
            limit: MAX_CONFIG_BYTES,
        });
    }
    serde_json::from_slice(&text).map_err(|error| malformed(path, ".", &error))
}

fn malformed(path: &Path, field: &str, error: &serde_json::Error) -> SpecError {
    SpecError::Malformed {
        path: path.to_owned(),
        field: field.to_owned(),
        problem: error.to_string(),
    }
}

fn parse<T: DeserializeOwned>(path: &Path, document: Value) -> Result<T> {
    serde_path_to_error::deserialize(document)
        .map_err(|error| malformed(path, &error.path().to_string(), error.inner()))
}

/// A capability that no kernel here has can't be granted, which is no reason to fail, says the specification.
fn drop_unknown_capabilities(process: &mut Value, warnings: &mut Warnings) {
    let Some(sets) = process.get_mut("capabilities") else {
        return;
    };
    for set in CAPABILITY_SETS {
        let Some(Value::Array(names)) = sets.get_mut(set) else {
            continue;
        };
        names.retain(|name| {
            let Some(name) = name.as_str() else { return true };
            let known = capabilities::number(name).is_some();
            if !known {
                warnings.add(format!(
                    "process.capabilities.{set}: {name:?} is not a capability and is left out"
                ));
            }
            known
        });
    }
}

/// Versions are compatible within the first number.
fn check_version(path: &Path, version: &str) -> Result<()> {
    let wrong = |problem: String| SpecError::Malformed {
        path: PathBuf::from(path),
        field: "ociVersion".into(),
        problem,
    };
    if version.is_empty() {
        return Err(wrong("is missing".into()));
    }
    let parsed = semver::Version::parse(version)
        .map_err(|error| wrong(format!("{version:?} is not a version as in 1.2.0: {error}")))?;
    if parsed.major != 1 {
        return Err(wrong(format!(
            "{version} is not supported; this runtime takes 1.x"
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn loaded(text: &str) -> Result<Config> {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("config.json"), text).unwrap();
        load(dir.path())
    }

    #[test]
    fn versions_are_compatible_within_the_first_number() {
        for version in ["1.0.0", "1.0.2-dev", "1.2.1", "1.99.0+build"] {
            loaded(&format!(r#"{{"ociVersion": "{version}"}}"#)).unwrap();
        }
        for version in ["", "2.0.0", "0.9.0", "1.0", "one"] {
            let error = loaded(&format!(r#"{{"ociVersion": "{version}"}}"#)).unwrap_err();
            assert!(error.to_string().contains("ociVersion"), "{error}");
        }
        assert!(loaded("{}").is_err());
    }

    #[test]
    fn unknown_fields_are_no_mistake() {
        let config = loaded(
            r#"{"ociVersion": "1.2.0", "tomorrow": {"x": 1}, "process": {"cwd": "/", "user": {}, "y": 2}}"#,
        );
        assert_eq!(
            config.unwrap().spec.process().as_ref().unwrap().cwd(),
            Path::new("/")
        );
    }

    #[test]
    fn mistake_is_told_with_its_field() {
        let error = loaded(
            r#"{"ociVersion": "1.2.0", "process": {"cwd": "/", "user": {}, "rlimits": [{"type": "RLIMIT_X", "soft": 1, "hard": 1}]}}"#,
        )
        .unwrap_err()
        .to_string();
        assert!(
            error.contains("process.rlimits[0].type") && error.contains("RLIMIT_X"),
            "{error}"
        );
        let error = loaded(r#"{"ociVersion": "1.2.0", "mounts": {}}"#)
            .unwrap_err()
            .to_string();
        assert!(error.contains("mounts"), "{error}");
        assert!(loaded("{").unwrap_err().to_string().contains("config.json"));
    }

    #[test]
    fn unknown_capability_is_left_out_and_told() {
        let config = loaded(
            r#"{"ociVersion": "1.2.0", "process": {"cwd": "/", "user": {},
                "capabilities": {"bounding": ["CAP_KILL", "CAP_FLY"], "ambient": null}}}"#,
        )
        .unwrap();
        assert_eq!(config.warnings.len(), 1);
        assert!(config.warnings[0].contains("CAP_FLY"));
    }

    #[test]
    fn file_is_bounded_and_regular() {
        let text = format!(r#"{{"ociVersion": "1.2.0", "x": "{}"}}"#, "y".repeat(5 << 20));
        assert!(matches!(loaded(&text), Err(SpecError::TooLarge { .. })));
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.json");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::from_bits_truncate(0o600)).unwrap();
        assert!(matches!(load(dir.path()), Err(SpecError::Unreadable { .. })));
    }
}
