//! The files docker and podman keep logins in; read by `rootfs_builder::registry`, written here.
//!
//! `{"auths": {"HOST": {"auth": base64 of "user:password"}}}`; whatever else is in them stays as it is. Written to a
//! temporary file that only its owner can read, then renamed: two writers can't mix, a killed one leaves the old file.

use std::{
    fs::{self, File},
    io::{ErrorKind, Write as _},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde_json::{Map, Value, json};

/// More than any real file of credentials.
const FILE_MAX_BYTES: u64 = 1 << 20;

/// One such file, there or not.
#[derive(Debug)]
pub struct AuthFile {
    path: PathBuf,
}

fn variable(name: &str) -> Option<PathBuf> {
    std::env::var_os(name)
        .filter(|value| !value.is_empty())
        .map(PathBuf::from)
}

impl AuthFile {
    /// All files a login may be in, the one to write first.
    pub fn all() -> Vec<Self> {
        let paths = match variable("REGISTRY_AUTH_FILE") {
            Some(file) => vec![file],
            None => {
                let podman = variable("XDG_RUNTIME_DIR").map(|dir| dir.join("containers/auth.json"));
                let docker =
                    variable("DOCKER_CONFIG").or_else(|| Some(std::env::home_dir()?.join(".docker")));
                let docker = docker.map(|dir| dir.join("config.json"));
                podman.into_iter().chain(docker).collect()
            }
        };
        paths.into_iter().map(|path| Self { path }).collect()
    }

    /// Where a login goes: `REGISTRY_AUTH_FILE`, the session's file as podman's, or docker's where there is no session.
    ///
    /// # Errors
    /// None of them can be named.
    pub fn to_write() -> anyhow::Result<Self> {
        Self::all()
            .into_iter()
            .next()
            .context("there is no place for credentials: set HOME or REGISTRY_AUTH_FILE")
    }

    /// Keeps credentials.
    ///
    /// # Errors
    /// The file can't be read or written, or is none of its kind.
    pub fn store(&self, host: &str, username: &str, password: &str) -> anyhow::Result<()> {
        let mut content = self.read()?.unwrap_or_default();
        let auth = STANDARD.encode(format!("{username}:{password}"));
        let auths = content.entry("auths").or_insert_with(|| json!({}));
        let Value::Object(auths) = auths else {
            bail!("{}: \"auths\" is no object", self.path.display());
        };
        auths.insert(host.to_owned(), json!({ "auth": auth }));
        self.write(&content)
    }

    /// Forgets the credentials of one registry; whether there were some.
    ///
    /// # Errors
    /// As [`AuthFile::store`].
    pub fn remove(&self, host: &str) -> anyhow::Result<bool> {
        self.change(|auths| auths.retain(|key, _| host_of(key) != host))
    }

    /// Forgets all credentials; whether there were some.
    ///
    /// # Errors
    /// As [`AuthFile::store`].
    pub fn clear(&self) -> anyhow::Result<bool> {
        self.change(Map::clear)
    }

    fn change(&self, act: impl FnOnce(&mut Map<String, Value>)) -> anyhow::Result<bool> {
        let Some(mut content) = self.read()? else {
            return Ok(false);
        };
        let Some(auths) = content.get_mut("auths").and_then(Value::as_object_mut) else {
            return Ok(false);
        };
        let before = auths.len();
        act(auths);
        if auths.len() == before {
            return Ok(false);
        }
        self.write(&content)?;
        Ok(true)
    }

    fn read(&self) -> anyhow::Result<Option<Map<String, Value>>> {
        let shown = || format!("reading the credentials in {}", self.path.display());
        match fs::metadata(&self.path) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error).with_context(shown),
            Ok(metadata) if metadata.len() > FILE_MAX_BYTES => bail!("{}: it is too large", shown()),
            Ok(_) => {}
        }
        let bytes = fs::read(&self.path).with_context(shown)?;
        if bytes.is_empty() {
            return Ok(None);
        }
        serde_json::from_slice(&bytes).with_context(shown)
    }

    fn write(&self, content: &Map<String, Value>) -> anyhow::Result<()> {
        // A link, as people make into a folder of settings, stays one.
        let path = fs::canonicalize(&self.path).unwrap_or_else(|_| self.path.clone());
        let shown = || format!("writing the credentials to {}", path.display());
        let folder = path.parent().unwrap_or(Path::new("/"));
        make_private(folder).with_context(shown)?;
        // Created with mode 0600.
        let mut file = tempfile::NamedTempFile::new_in(folder).with_context(shown)?;
        serde_json::to_writer_pretty(&mut file, content).with_context(shown)?;
        file.write_all(b"\n").with_context(shown)?;
        file.as_file().sync_all().with_context(shown)?;
        let _: File = file
            .persist(&path)
            .map_err(|error| error.error)
            .with_context(shown)?;
        Ok(())
    }
}

fn make_private(folder: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::DirBuilderExt as _;
    fs::DirBuilder::new().recursive(true).mode(0o700).create(folder)
}

/// Old entries are whole addresses.
fn host_of(key: &str) -> &str {
    let rest = key.split_once("://").map_or(key, |(_, rest)| rest);
    rest.split('/').next().unwrap_or(rest)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn file_in(dir: &tempfile::TempDir) -> AuthFile {
        AuthFile {
            path: dir.path().join("containers/auth.json"),
        }
    }

    #[test]
    fn login_is_kept_privately_and_forgotten() {
        let dir = tempfile::tempdir().unwrap();
        let file = file_in(&dir);
        file.store("registry.test:5000", "me", "pass:word").unwrap();
        let mode = fs::metadata(&file.path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let found = rootfs_builder::registry::Credentials::find_in(&file.path, "registry.test:5000").unwrap();
        let found = found.unwrap();
        assert_eq!(
            (found.username.as_str(), found.password.as_str()),
            ("me", "pass:word")
        );
        assert!(!file.remove("other.test").unwrap());
        assert!(file.remove("registry.test:5000").unwrap());
        assert!(!file.remove("registry.test:5000").unwrap());
    }

    #[test]
    fn everything_else_in_the_file_stays() {
        let dir = tempfile::tempdir().unwrap();
        let file = file_in(&dir);
        fs::create_dir(file.path.parent().unwrap()).unwrap();
        fs::write(
            &file.path,
            r#"{"credHelpers": {"a.test": "x"}, "auths": {"https://b.test/v1/": {"auth": "eDp5"}}}"#,
        )
        .unwrap();
        file.store("c.test", "u", "p").unwrap();
        assert!(file.remove("b.test").unwrap());
        let content = file.read().unwrap().unwrap();
        assert_eq!(content["credHelpers"]["a.test"], "x");
        assert_eq!(content["auths"].as_object().unwrap().len(), 1);
        assert!(file.clear().unwrap());
    }

    #[test]
    fn file_that_is_none_of_its_kind_is_named_and_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let file = file_in(&dir);
        fs::create_dir(file.path.parent().unwrap()).unwrap();
        fs::write(&file.path, "{").unwrap();
        let error = file.store("c.test", "u", "p").unwrap_err();
        assert!(error.to_string().contains("auth.json"), "{error:#}");
        assert_eq!(fs::read_to_string(&file.path).unwrap(), "{");
    }
}
