//! Requests to one repository of one registry, and being let in.

use std::io::Read;
use std::sync::{Mutex, PoisonError};

use serde::Deserialize;
use ureq::Body;
use ureq::http::{Response, header};

use super::auth::Challenge;
use super::reference::is_host;
use super::transport::{Headers, Transport, retry_after};
use super::{Configuration, Credentials, PullOptions, Reference, RegistryError};
use crate::digest::Digest;

/// What we can make something of.
const MANIFEST_TYPES: &str = "application/vnd.oci.image.index.v1+json, application/vnd.oci.image.manifest.v1+json, \
    application/vnd.docker.distribution.manifest.list.v2+json, application/vnd.docker.distribution.manifest.v2+json";
const TOKEN_MAX_BYTES: u64 = 1 << 20;

/// Check that a registry takes these credentials.
///
/// # Errors
/// It can't be reached, is no registry, or refuses them.
pub fn log_in(registry: &str, credentials: &Credentials, tls_verify: bool) -> Result<(), RegistryError> {
    if !is_host(registry) {
        return Err(RegistryError::Reference {
            text: registry.chars().take(300).collect(),
            problem: "the registry's name is not a host",
        });
    }
    // Whatever is in it: a rule for the host is what counts.
    let place = Configuration::load()?.place(&Reference::parse(&format!("{registry}/image"))?)?;
    let verify = tls_verify && !place.insecure;
    let session = Session::new(place.reference.registry(), Some(credentials.clone()), verify);
    let response = session.get("", &[], None, true)?;
    session.expect(&response, "its first page", "anything", &[200])
}

/// A registry and whatever it takes to be let in.
#[derive(Debug)]
struct Session {
    transport: Transport,
    registry: String,
    credentials: Option<Credentials>,
    /// The header the registry was satisfied with last.
    authorization: Mutex<Option<String>>,
}

#[derive(Deserialize)]
struct Token {
    token: Option<String>,
    access_token: Option<String>,
}

impl Session {
    fn new(registry: &str, credentials: Option<Credentials>, verify: bool) -> Self {
        Self {
            transport: Transport::new(registry, verify),
            registry: registry.to_owned(),
            credentials,
            authorization: Mutex::new(None),
        }
    }

    /// Ask for `path` below `/v2/`. A registry that wants to know who asks is told; a token that has expired is renewed.
    fn get(
        &self,
        path: &str,
        headers: &Headers<'_>,
        repository: Option<&str>,
        patient: bool,
    ) -> Result<Response<Body>, RegistryError> {
        let url = format!("{}/v2/{path}", self.transport.origin()?);
        let ask = |authorization: Option<&str>| {
            if patient {
                self.transport.get(&url, headers, authorization)
            } else {
                self.transport.get_once(&url, headers, authorization)
            }
        };
        let known = self
            .authorization
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        let response = ask(known.as_deref())?;
        if response.status().as_u16() != 401 {
            return Ok(response);
        }
        let challenges = response.headers().get_all(header::WWW_AUTHENTICATE);
        let challenge = challenges
            .iter()
            .filter_map(|value| value.to_str().ok())
            .find_map(Challenge::parse)
            .ok_or_else(|| {
                self.transport
                    .nonsense("it wants an unknown kind of authentication")
            })?;
        let authorization = match challenge {
            Challenge::Basic => self.basic(&url)?,
            Challenge::Bearer {
                realm,
                service,
                scope,
            } => {
                let scope =
                    scope.or_else(|| repository.map(|repository| format!("repository:{repository}:pull")));
                self.token(&realm, service.as_deref(), scope.as_deref())?
            }
        };
        let response = ask(Some(&authorization))?;
        if response.status().as_u16() != 401 {
            *self.authorization.lock().unwrap_or_else(PoisonError::into_inner) = Some(authorization);
        }
        Ok(response)
    }

    fn basic(&self, url: &str) -> Result<String, RegistryError> {
        let registry = self.registry.clone();
        let credentials = self
            .credentials
            .as_ref()
            .ok_or(RegistryError::LoginNeeded { registry })?;
        self.check_protected(url)?;
        Ok(credentials.basic())
    }

    /// Ask the registry's token service to let us in.
    fn token(
        &self,
        realm: &str,
        service: Option<&str>,
        scope: Option<&str>,
    ) -> Result<String, RegistryError> {
        self.check_protected(realm)?;
        let identity = self
            .credentials
            .as_ref()
            .and_then(|credentials| credentials.identity_token.as_deref());
        let response = if let Some(identity) = identity {
            let mut form = vec![
                ("grant_type", "refresh_token"),
                ("client_id", "hull"),
                ("refresh_token", identity),
            ];
            form.extend(service.map(|service| ("service", service)));
            form.extend(scope.map(|scope| ("scope", scope)));
            self.transport.post_form(realm, &form)?
        } else {
            let mut url = realm.to_owned();
            for (key, value) in [("service", service), ("scope", scope)] {
                if let Some(value) = value {
                    let separator = if url.contains('?') { '&' } else { '?' };
                    url = format!("{url}{separator}{key}={}", percent_encoded(value));
                }
            }
            let basic = self.credentials.as_ref().map(Credentials::basic);
            self.transport.get(&url, &[], basic.as_deref())?
        };
        self.expect(&response, "a token", "it", &[200])?;
        let bytes = self.read(response, TOKEN_MAX_BYTES, "a token")?;
        let token: Token =
            serde_json::from_slice(&bytes).map_err(|_| self.transport.nonsense("a token that is no JSON"))?;
        let token = token
            .token
            .or(token.access_token)
            .filter(|token| token.bytes().all(|byte| byte.is_ascii_graphic()))
            .ok_or_else(|| self.transport.nonsense("no token"))?;
        Ok(format!("Bearer {token}"))
    }

    fn check_protected(&self, url: &str) -> Result<(), RegistryError> {
        if self.transport.is_protected(url) {
            return Ok(());
        }
        Err(RegistryError::UnprotectedCredentials {
            registry: self.registry.clone(),
            realm: url.to_owned(),
        })
    }

    fn expect(
        &self,
        response: &Response<Body>,
        what: &str,
        repository: &str,
        wanted: &[u16],
    ) -> Result<(), RegistryError> {
        let status = response.status().as_u16();
        if wanted.contains(&status) {
            return Ok(());
        }
        let registry = self.registry.clone();
        let repository = repository.to_owned();
        Err(match status {
            401 if self.credentials.is_none() => RegistryError::LoginNeeded { registry },
            401 | 403 => RegistryError::Denied { registry, repository },
            404 => RegistryError::NotFound {
                registry,
                what: format!("{what} in {repository}"),
            },
            _ => RegistryError::Status {
                registry,
                status,
                what: what.to_owned(),
                retry_after: retry_after(response),
            },
        })
    }

    fn read(&self, response: Response<Body>, limit: u64, what: &str) -> Result<Vec<u8>, RegistryError> {
        let mut bytes = Vec::new();
        let mut reader = response.into_body().into_reader().take(limit + 1);
        reader
            .read_to_end(&mut bytes)
            .map_err(|source| RegistryError::Interrupted {
                what: what.to_owned(),
                bytes: 0,
                source,
            })?;
        if bytes.len() as u64 > limit {
            return Err(self.transport.nonsense("a document larger than any real one"));
        }
        Ok(bytes)
    }
}

/// A repository. Shared by the threads that fetch.
#[derive(Debug)]
pub(crate) struct Client {
    session: Session,
    /// What people call the image.
    reference: Reference,
    /// What it is where we ask.
    place: Reference,
}

impl Client {
    /// For an image that is asked for where `registries.conf` says.
    ///
    /// # Errors
    /// That can't be read, or says that the image is not to be had.
    pub fn new(reference: &Reference, options: &PullOptions) -> Result<Self, RegistryError> {
        let place = Configuration::load()?.place(reference)?;
        let verify = options.tls_verify && !place.insecure;
        Ok(Self {
            session: Session::new(place.reference.registry(), options.credentials.clone(), verify),
            place: place.reference,
            reference: reference.clone(),
        })
    }

    pub fn reference(&self) -> &Reference {
        &self.reference
    }

    /// The manifest the reference stands for, or that of a digest. Not checked against anything but `limit`.
    pub fn manifest(&self, digest: Option<&Digest>, limit: u64) -> Result<Vec<u8>, RegistryError> {
        let what = digest.map_or_else(|| self.place.wanted(), ToString::to_string);
        let accept = [("accept", MANIFEST_TYPES.to_owned())];
        let response = self.get("manifests", &what, &accept, true)?;
        self.expect(&response, &what, &[200])?;
        self.session.read(response, limit, &what)
    }

    /// A small blob.
    pub fn document(&self, digest: &Digest, limit: u64) -> Result<Vec<u8>, RegistryError> {
        let what = digest.to_string();
        let response = self.get("blobs", &what, &[], true)?;
        self.expect(&response, &what, &[200])?;
        self.session.read(response, limit, &what)
    }

    /// A blob from `offset` on; says from where it really comes.
    pub fn blob(&self, digest: &Digest, offset: u64) -> Result<(u64, impl Read + use<>), RegistryError> {
        let what = digest.to_string();
        let range = if offset > 0 {
            vec![("range", format!("bytes={offset}-"))]
        } else {
            Vec::new()
        };
        let response = self.get("blobs", &what, &range, false)?;
        self.expect(&response, &what, &[200, 206])?;
        let from = if response.status().as_u16() == 206 {
            range_start(&response)
        } else {
            Some(0)
        };
        let from = from
            .filter(|from| *from == 0 || *from == offset)
            .ok_or_else(|| self.session.transport.nonsense("a range nobody asked for"))?;
        Ok((from, response.into_body().into_reader()))
    }

    fn get(
        &self,
        kind: &str,
        what: &str,
        headers: &Headers<'_>,
        patient: bool,
    ) -> Result<Response<Body>, RegistryError> {
        let repository = self.place.repository();
        let path = format!("{repository}/{kind}/{what}");
        self.session.get(&path, headers, Some(repository), patient)
    }

    fn expect(&self, response: &Response<Body>, what: &str, wanted: &[u16]) -> Result<(), RegistryError> {
        self.session
            .expect(response, what, self.place.repository(), wanted)
    }
}

/// A value as part of a query.
fn percent_encoded(value: &str) -> String {
    value.bytes().fold(String::new(), |mut text, byte| {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~' | b'/' | b':') {
            text.push(char::from(byte));
        } else {
            text += &format!("%{byte:02X}");
        }
        text
    })
}

/// Where a partial answer begins: `Content-Range: bytes START-END/SIZE`.
fn range_start(response: &Response<Body>) -> Option<u64> {
    let value = response.headers().get(header::CONTENT_RANGE)?.to_str().ok()?;
    value
        .trim()
        .strip_prefix("bytes ")?
        .split('-')
        .next()?
        .trim()
        .parse()
        .ok()
}
