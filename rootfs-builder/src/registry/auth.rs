//! Credentials, and the challenges registries answer with when they want some.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;

use super::{Reference, RegistryError, credential_helper, path_variable as variable};

/// More than any real file of credentials.
const FILE_MAX_BYTES: u64 = 1 << 20;

/// A user's name and password, or a token in place of one.
#[derive(Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Credentials {
    pub username: String,
    pub password: String,
    /// What a login left in place of the password; exchanged for tokens that last for minutes.
    pub identity_token: Option<String>,
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
#[serde(rename_all = "camelCase")]
struct AuthFile {
    #[serde(default)]
    auths: BTreeMap<String, AuthEntry>,
    /// The helper for each of some registries.
    #[serde(default)]
    cred_helpers: BTreeMap<String, String>,
    /// The helper for all others.
    #[serde(default)]
    creds_store: Option<String>,
}

#[derive(Deserialize)]
struct AuthEntry {
    auth: Option<String>,
    identitytoken: Option<String>,
}

impl Credentials {
    pub fn new(username: impl Into<String>, password: impl Into<String>) -> Self {
        Self {
            username: username.into(),
            password: password.into(),
            identity_token: None,
        }
    }

    /// What a login left for this registry, in the file `REGISTRY_AUTH_FILE` names, podman's, or docker's, or with the credential
    /// helper such a file names.
    ///
    /// # Errors
    /// A file is there but can't be understood, or a helper fails.
    pub fn find(registry: &str) -> Result<Option<Self>, RegistryError> {
        Self::find_first(&[registry.to_owned()])
    }

    /// As [`Credentials::find`]; an entry for the repository, or for a folder it is in, comes before the registry's.
    ///
    /// # Errors
    /// As [`Credentials::find`].
    pub fn find_for(reference: &Reference) -> Result<Option<Self>, RegistryError> {
        Self::find_first(&keys(reference))
    }

    /// As [`Credentials::find`], in one file.
    ///
    /// # Errors
    /// As [`Credentials::find`].
    pub fn find_in(path: &Path, registry: &str) -> Result<Option<Self>, RegistryError> {
        Self::in_file(path, &[registry.to_owned()])
    }

    fn find_first(keys: &[String]) -> Result<Option<Self>, RegistryError> {
        for path in auth_files() {
            if let Some(credentials) = Self::in_file(&path, keys)? {
                return Ok(Some(credentials));
            }
        }
        Ok(None)
    }

    /// `keys`: the most specific one first, the registry last.
    fn in_file(path: &Path, keys: &[String]) -> Result<Option<Self>, RegistryError> {
        let wrong = |problem: String| RegistryError::CredentialsFile {
            path: path.to_path_buf(),
            problem,
        };
        let Some(text) = read_bounded(path).map_err(|error| wrong(error.to_string()))? else {
            return Ok(None);
        };
        let file: AuthFile = serde_json::from_slice(&text).map_err(|error| wrong(error.to_string()))?;
        let registry = keys.last().map_or("", String::as_str);
        let helper = file
            .cred_helpers
            .get(registry)
            .or(file.creds_store.as_ref())
            .filter(|helper| !helper.is_empty());
        if let Some(helper) = helper
            && let Some(credentials) = credential_helper::get(helper, registry)?
        {
            return Ok(Some(credentials));
        }
        for key in keys {
            let entry = file.auths.iter().find(|(name, _)| entry_key(name) == key);
            if let Some((_, entry)) = entry
                && let Some(credentials) = Self::from_entry(entry).map_err(wrong)?
            {
                return Ok(Some(credentials));
            }
        }
        Ok(None)
    }

    fn from_entry(entry: &AuthEntry) -> Result<Option<Self>, String> {
        let identity_token = entry.identitytoken.clone().filter(|token| !token.is_empty());
        let auth = entry
            .auth
            .as_deref()
            .map(str::trim)
            .filter(|auth| !auth.is_empty());
        let Some(auth) = auth else {
            return Ok(identity_token.map(|token| Self {
                identity_token: Some(token),
                ..Self::new("", "")
            }));
        };
        let decoded = STANDARD.decode(auth).map_err(|error| error.to_string())?;
        let decoded = String::from_utf8(decoded).map_err(|error| error.to_string())?;
        let (username, password) = decoded.split_once(':').ok_or("an entry has no password")?;
        Ok(Some(Self {
            identity_token,
            // Docker fills up with zeroes.
            ..Self::new(username, password.trim_end_matches('\0'))
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

/// The keys an entry for this image may go by.
fn keys(reference: &Reference) -> Vec<String> {
    let mut path = format!("{}/{}", reference.registry(), reference.repository());
    let mut keys = vec![path.clone()];
    while let Some(slash) = path.rfind('/') {
        path.truncate(slash);
        keys.push(path.clone());
    }
    keys
}

/// Old entries are whole addresses, of which only the host counts.
fn entry_key(name: &str) -> &str {
    match name.split_once("://") {
        Some((_, rest)) => rest.split('/').next().unwrap_or(rest),
        None => name.strip_suffix("/v1/").unwrap_or(name),
    }
}

/// A file that may not be there.
fn read_bounded(path: &Path) -> io::Result<Option<Vec<u8>>> {
    let file = match fs::File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut text = Vec::new();
    io::Read::read_to_end(&mut io::Read::take(file, FILE_MAX_BYTES + 1), &mut text)?;
    if text.len() as u64 > FILE_MAX_BYTES {
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, "it is too large"));
    }
    Ok(Some(text))
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

    #[test]
    fn the_most_specific_entry_counts() {
        let scratch = tempfile::tempdir().expect("scratch directory");
        let path = scratch.path().join("auth.json");
        let auth = |user: &str| STANDARD.encode(format!("{user}:x"));
        let entries = serde_json::json!({"auths": {
            "registry.test": {"auth": auth("all")},
            "registry.test/team": {"auth": auth("team")},
            "registry.test/team/app": {"auth": auth("app")},
            "token.test": {"identitytoken": "refresh", "auth": ""},
        }});
        fs::write(&path, entries.to_string()).expect("file");
        for (reference, user) in [
            ("registry.test/other", "all"),
            ("registry.test/teams/app", "all"),
            ("registry.test/team/other", "team"),
            ("registry.test/team/app:1", "app"),
        ] {
            let reference = Reference::parse(reference).expect("reference");
            let found = Credentials::in_file(&path, &keys(&reference)).expect("readable");
            assert_eq!(found.expect("there").username, user, "{reference}");
        }
        let token = Credentials::find_in(&path, "token.test")
            .expect("readable")
            .expect("there");
        assert_eq!(token.identity_token.as_deref(), Some("refresh"));
    }
}
