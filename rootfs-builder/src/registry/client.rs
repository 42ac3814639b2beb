//! Requests to one repository of one registry.

use std::io::Read;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use serde::Deserialize;
use ureq::http::{Response, header};
use ureq::tls::{RootCerts, TlsConfig};
use ureq::{Agent, Body};

use super::auth::Challenge;
use super::reference::is_local;
use super::{Credentials, Reference, RegistryError};
use crate::digest::Digest;

/// What we can make something of.
const MANIFEST_TYPES: &str = "application/vnd.oci.image.index.v1+json, application/vnd.oci.image.manifest.v1+json, \
    application/vnd.docker.distribution.manifest.list.v2+json, application/vnd.docker.distribution.manifest.v2+json";
const TOKEN_MAX_BYTES: u64 = 1 << 20;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(15);
/// A registry that says nothing for so long has hung.
const READ_TIMEOUT: Duration = Duration::from_secs(60);

/// A connection to a repository, with whatever it takes to be let in. Shared by the threads that fetch.
#[derive(Debug)]
pub(crate) struct Client {
    agent: Agent,
    reference: Reference,
    base: String,
    credentials: Option<Credentials>,
    /// The header the registry was satisfied with last.
    authorization: Mutex<Option<String>>,
}

#[derive(Deserialize)]
struct Token {
    token: Option<String>,
    access_token: Option<String>,
}

impl Client {
    pub fn new(reference: &Reference, credentials: Option<Credentials>) -> Self {
        // Whoever installed a provider before us is welcome to it.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let agent = Agent::config_builder()
            .http_status_as_error(false)
            .user_agent(concat!("hull/", env!("CARGO_PKG_VERSION")))
            .tls_config(
                TlsConfig::builder()
                    .root_certs(RootCerts::PlatformVerifier)
                    .build(),
            )
            .timeout_connect(Some(CONNECT_TIMEOUT))
            .timeout_recv_response(Some(READ_TIMEOUT))
            .timeout_per_read(Some(READ_TIMEOUT))
            .build()
            .new_agent();
        let scheme = if reference.is_local() { "http" } else { "https" };
        Self {
            agent,
            reference: reference.clone(),
            base: format!(
                "{scheme}://{}/v2/{}",
                reference.registry(),
                reference.repository()
            ),
            credentials,
            authorization: Mutex::new(None),
        }
    }

    pub fn reference(&self) -> &Reference {
        &self.reference
    }

    /// The manifest the reference stands for, or that of a digest. Not checked against anything but `limit`.
    pub fn manifest(&self, digest: Option<&Digest>, limit: u64) -> Result<Vec<u8>, RegistryError> {
        let what = digest.map_or_else(|| self.reference.wanted(), ToString::to_string);
        let response = self.get(
            &format!("manifests/{what}"),
            &[("accept", MANIFEST_TYPES.to_owned())],
        )?;
        self.expect(&response, &what, &[200])?;
        self.read(response, limit, &what)
    }

    /// A small blob.
    pub fn document(&self, digest: &Digest, limit: u64) -> Result<Vec<u8>, RegistryError> {
        let what = digest.to_string();
        let response = self.get(&format!("blobs/{what}"), &[])?;
        self.expect(&response, &what, &[200])?;
        self.read(response, limit, &what)
    }

    /// A blob from `offset` on; says from where it really comes.
    pub fn blob(&self, digest: &Digest, offset: u64) -> Result<(u64, impl Read + use<>), RegistryError> {
        let what = digest.to_string();
        let range = if offset > 0 {
            vec![("range", format!("bytes={offset}-"))]
        } else {
            Vec::new()
        };
        let response = self.get(&format!("blobs/{what}"), &range)?;
        self.expect(&response, &what, &[200, 206])?;
        let from = if response.status().as_u16() == 206 {
            range_start(&response)
        } else {
            Some(0)
        };
        let from = from
            .filter(|from| *from == 0 || *from == offset)
            .ok_or_else(|| self.nonsense("a range nobody asked for"))?;
        Ok((from, response.into_body().into_reader()))
    }

    fn get(&self, path: &str, headers: &[(&str, String)]) -> Result<Response<Body>, RegistryError> {
        let url = format!("{}/{path}", self.base);
        let known = self
            .authorization
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        let response = self.send(&url, headers, known.as_deref())?;
        if response.status().as_u16() != 401 {
            return Ok(response);
        }
        let challenges = response.headers().get_all(header::WWW_AUTHENTICATE);
        let challenge = challenges
            .iter()
            .filter_map(|value| value.to_str().ok())
            .find_map(Challenge::parse);
        let authorization =
            match challenge.ok_or_else(|| self.nonsense("it wants an unknown kind of authentication"))? {
                Challenge::Basic => {
                    let credentials = self.credentials.as_ref();
                    let registry = self.reference.registry().to_owned();
                    credentials
                        .ok_or(RegistryError::LoginNeeded { registry })?
                        .basic()
                }
                Challenge::Bearer {
                    realm,
                    service,
                    scope,
                } => self.token(&realm, service.as_deref(), scope.as_deref())?,
            };
        let response = self.send(&url, headers, Some(&authorization))?;
        if response.status().is_success() {
            *self.authorization.lock().unwrap_or_else(PoisonError::into_inner) = Some(authorization);
        }
        Ok(response)
    }

    fn send(
        &self,
        url: &str,
        headers: &[(&str, String)],
        authorization: Option<&str>,
    ) -> Result<Response<Body>, RegistryError> {
        let mut request = self.agent.get(url);
        for (name, value) in headers {
            request = request.header(*name, value);
        }
        if let Some(authorization) = authorization {
            request = request.header("authorization", authorization);
        }
        request.call().map_err(|source| RegistryError::Connect {
            registry: self.reference.registry().to_owned(),
            source: Box::new(source),
        })
    }

    /// Ask the registry's token service to let us in.
    fn token(
        &self,
        realm: &str,
        service: Option<&str>,
        scope: Option<&str>,
    ) -> Result<String, RegistryError> {
        let host = realm
            .strip_prefix("http://")
            .map(|rest| rest.split('/').next().unwrap_or(rest));
        let protected = realm.starts_with("https://")
            || host.is_some_and(|host| self.reference.is_local() && is_local(host));
        if !protected {
            let registry = self.reference.registry().to_owned();
            return Err(RegistryError::UnprotectedCredentials {
                registry,
                realm: realm.to_owned(),
            });
        }
        let mut request = self.agent.get(realm);
        for (key, value) in [("service", service), ("scope", scope)] {
            if let Some(value) = value {
                request = request.query(key, value);
            }
        }
        if let Some(credentials) = &self.credentials {
            request = request.header("authorization", credentials.basic());
        }
        let registry = self.reference.registry().to_owned();
        let response = request.call().map_err(|source| RegistryError::Connect {
            registry,
            source: Box::new(source),
        })?;
        self.expect(&response, "a token", &[200])?;
        let bytes = self.read(response, TOKEN_MAX_BYTES, "a token")?;
        let token: Token =
            serde_json::from_slice(&bytes).map_err(|_| self.nonsense("a token that is no JSON"))?;
        let token = token
            .token
            .or(token.access_token)
            .ok_or_else(|| self.nonsense("no token"))?;
        Ok(format!("Bearer {token}"))
    }

    fn expect(&self, response: &Response<Body>, what: &str, wanted: &[u16]) -> Result<(), RegistryError> {
        let status = response.status().as_u16();
        if wanted.contains(&status) {
            return Ok(());
        }
        let registry = self.reference.registry().to_owned();
        let repository = self.reference.repository().to_owned();
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
            return Err(self.nonsense("a document larger than any real one"));
        }
        Ok(bytes)
    }

    fn nonsense(&self, problem: &'static str) -> RegistryError {
        RegistryError::Answer {
            registry: self.reference.registry().to_owned(),
            problem,
        }
    }
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
