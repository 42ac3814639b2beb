//! Credentials, and the challenges registries answer with when they want some.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;

use super::RegistryError;

/// More than any real file of credentials.
const FILE_MAX_BYTES: u64 = 1 << 20;

/// A user's name and password, or a token in place of one.
#[derive(Clone, PartialEq, Eq)]
pub struct Credentials {
    pub username: String,
    pub password: String,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Credentials")
            .field("username", &self.username)
            .finish_non_exhaustive()
    }
}

/// The file `docker login`, `podman login` and `skopeo login` write.
#[derive(Deserialize)]
struct AuthFile {
    #[serde(default)]
    auths: BTreeMap<String, AuthEntry>,
}

#[derive(Deserialize)]
struct AuthEntry {
    auth: Option<String>,
}

impl Credentials {
    /// What a login left for this registry, in the file `REGISTRY_AUTH_FILE` names, podman's, or docker's.
    ///
    /// # Errors
    /// A file is there but can't be understood.
    pub fn find(registry: &str) -> Result<Option<Self>, RegistryError> {
        for path in auth_files() {
            if let Some(credentials) = Self::find_in(&path, registry)? {
                return Ok(Some(credentials));
            }
        }
        Ok(None)
    }

    /// As [`Credentials::find`], in one file.
    ///
    /// # Errors
    /// The file is there but can't be understood.
    pub fn find_in(path: &Path, registry: &str) -> Result<Option<Self>, RegistryError> {
        let wrong = |problem: String| RegistryError::CredentialsFile {
            path: path.to_path_buf(),
            problem,
        };
        match fs::metadata(path) {
            Ok(metadata) if metadata.len() > FILE_MAX_BYTES => {
                return Err(wrong("it is too large".to_owned()));
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            _ => {}
        }
        let text = fs::read(path).map_err(|error| wrong(error.to_string()))?;
        let file: AuthFile = serde_json::from_slice(&text).map_err(|error| wrong(error.to_string()))?;
        let entry = file.auths.into_iter().find(|(host, _)| host_of(host) == registry);
        let Some(auth) = entry
            .and_then(|(_, entry)| entry.auth)
            .filter(|auth| !auth.is_empty())
        else {
            return Ok(None);
        };
        let decoded = STANDARD
            .decode(auth.trim())
            .map_err(|error| wrong(error.to_string()))?;
        let decoded = String::from_utf8(decoded).map_err(|error| wrong(error.to_string()))?;
        let (username, password) = decoded
            .split_once(':')
            .ok_or_else(|| wrong("an entry has no password".to_owned()))?;
        Ok(Some(Self {
            username: username.to_owned(),
            password: password.to_owned(),
        }))
    }

    /// The header's value for basic authentication.
    pub(super) fn basic(&self) -> String {
        format!(
            "Basic {}",
            STANDARD.encode(format!("{}:{}", self.username, self.password))
        )
    }
}

fn auth_files() -> Vec<PathBuf> {
    let variable = |name| {
        std::env::var_os(name)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    };
    if let Some(file) = variable("REGISTRY_AUTH_FILE") {
        return vec![file];
    }
    let docker = variable("DOCKER_CONFIG").or_else(|| Some(variable("HOME")?.join(".docker")));
    let podman = variable("XDG_RUNTIME_DIR").map(|dir| dir.join("containers/auth.json"));
    podman
        .into_iter()
        .chain(docker.map(|dir| dir.join("config.json")))
        .collect()
}

/// Old entries are whole addresses.
fn host_of(key: &str) -> &str {
    let rest = key.split_once("://").map_or(key, |(_, rest)| rest);
    rest.split('/').next().unwrap_or(rest)
}

/// What a `WWW-Authenticate` header asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Challenge {
    Basic,
    Bearer {
        realm: String,
        service: Option<String>,
        scope: Option<String>,
    },
}

impl Challenge {
    pub fn parse(header: &str) -> Option<Self> {
        let (scheme, rest) = header.trim().split_once(' ').unwrap_or((header.trim(), ""));
        if scheme.eq_ignore_ascii_case("basic") {
            return Some(Self::Basic);
        }
        if !scheme.eq_ignore_ascii_case("bearer") {
            return None;
        }
        let mut parameters = parameters(rest);
        Some(Self::Bearer {
            realm: parameters.remove("realm")?,
            service: parameters.remove("service"),
            scope: parameters.remove("scope"),
        })
    }
}

/// `key="value",key=value`; a quoted value may hold commas and escaped quotes.
fn parameters(text: &str) -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    let mut rest = text;
    while let Some((key, after)) = rest.split_once('=') {
        let key = key.trim_matches([' ', ',']).to_ascii_lowercase();
        let mut value = String::new();
        match after.strip_prefix('"') {
            Some(quoted) => {
                let mut chars = quoted.char_indices();
                let mut end = quoted.len();
                while let Some((at, char)) = chars.next() {
                    match char {
                        '"' => {
                            end = at + 1;
                            break;
                        }
                        '\\' => value.extend(chars.next().map(|(_, char)| char)),
                        char => value.push(char),
                    }
                }
                rest = &quoted[end..];
            }
            None => {
                let end = after.find(',').unwrap_or(after.len());
                after[..end].trim().clone_into(&mut value);
                rest = &after[end..];
            }
        }
        found.insert(key, value);
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn challenges_are_understood() {
        let header = r#"Bearer realm="https://auth.test/token?a=b",service="registry.test",scope="repository:a/b:pull,push""#;
        assert_eq!(
            Challenge::parse(header),
            Some(Challenge::Bearer {
                realm: "https://auth.test/token?a=b".to_owned(),
                service: Some("registry.test".to_owned()),
                scope: Some("repository:a/b:pull,push".to_owned()),
            })
        );
        assert_eq!(Challenge::parse(r#"basic realm="x""#), Some(Challenge::Basic));
        for header in [
            "",
            "Bearer",
            r#"Bearer service="x""#,
            "Negotiate",
            "Bearer realm",
            r#"Bearer x="#,
        ] {
            assert_eq!(Challenge::parse(header), None, "{header}");
        }
        assert!(Challenge::parse(r#"Bearer realm="unfinished\"#).is_some());
    }

    #[test]
    fn credentials_come_from_the_file_a_login_writes() {
        let scratch = tempfile::tempdir().expect("scratch directory");
        let path = scratch.path().join("auth.json");
        let auth = STANDARD.encode("me:pass:word");
        fs::write(
            &path,
            format!(r#"{{"auths":{{"https://registry.test/v1/":{{"auth":"{auth}"}},"other.test":{{}}}}}}"#),
        )
        .expect("file");
        let found = Credentials::find_in(&path, "registry.test")
            .expect("readable")
            .expect("there");
        assert_eq!(
            (found.username.as_str(), found.password.as_str()),
            ("me", "pass:word")
        );
        assert!(!format!("{found:?}").contains("word"));
        assert_eq!(Credentials::find_in(&path, "other.test").expect("readable"), None);
        assert_eq!(
            Credentials::find_in(&scratch.path().join("none"), "registry.test").expect("fine"),
            None
        );
        fs::write(&path, "{").expect("file");
        assert!(Credentials::find_in(&path, "registry.test").is_err());
    }
}
