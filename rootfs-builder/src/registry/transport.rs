//! HTTP to one registry: which scheme it speaks, where its redirects may lead, and what is worth another try.
//!
//! Invariants: credentials only ever go to the host they were meant for; nothing is sent unprotected unless the registry is on this
//! machine or the caller gave up verification; a redirect never leads from HTTPS to HTTP.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use ureq::http::{Response, Uri, header};
use ureq::tls::{RootCerts, TlsConfig};
use ureq::{Agent, Body};

use super::RegistryError;
use super::reference::is_local;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(15);
/// A registry that says nothing for so long has hung.
const READ_TIMEOUT: Duration = Duration::from_secs(30);
const REDIRECTS_MAX: usize = 5;
/// Attempts at a document; layers have their own count.
const ATTEMPTS: u32 = 5;
const FIRST_PAUSE: Duration = Duration::from_millis(300);
/// However long a registry asks us to stay away.
const PAUSE_MAX: Duration = Duration::from_secs(20);

/// Names and values of a request's headers.
pub(super) type Headers<'a> = [(&'a str, String)];

/// The way to a registry. Shared by the threads that fetch; they share its connections, too.
#[derive(Debug)]
pub(super) struct Transport {
    agent: Agent,
    registry: String,
    verify: bool,
    /// `SCHEME://HOST[:PORT]`, once it is known.
    origin: Mutex<Option<String>>,
}

impl Transport {
    /// `verify`: insist on HTTPS and a certificate we trust, unless the registry is on this machine.
    pub fn new(registry: &str, verify: bool) -> Self {
        // Whoever installed a provider before us is welcome to it.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let tls = TlsConfig::builder()
            .root_certs(RootCerts::PlatformVerifier)
            .disable_verification(!verify)
            .build();
        let mut config = Agent::config_builder()
            .http_status_as_error(false)
            // Redirects are followed here: the library would take them anywhere.
            .max_redirects(0)
            .max_redirects_will_error(false)
            .user_agent(concat!("hull/", env!("CARGO_PKG_VERSION")))
            .tls_config(tls)
            .timeout_connect(Some(CONNECT_TIMEOUT))
            .timeout_recv_response(Some(READ_TIMEOUT))
            .timeout_per_read(Some(READ_TIMEOUT));
        if is_local(registry) {
            config = config.proxy(None);
        }
        Self {
            agent: config.build().new_agent(),
            registry: registry.to_owned(),
            verify,
            origin: Mutex::new(None),
        }
    }

    /// `SCHEME://HOST[:PORT]`: HTTPS, but a registry on this machine, or one that isn't verified, may speak plain HTTP.
    pub fn origin(&self) -> Result<String, RegistryError> {
        let mut known = self.origin.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(origin) = &*known {
            return Ok(origin.clone());
        }
        let secure = format!("https://{}", self.registry);
        let plain = format!("http://{}", self.registry);
        let origin = if is_local(&self.registry) {
            match self.probe(&plain) {
                // What servers answer to a plain request where they speak TLS.
                Ok(400) => secure,
                Ok(_) => plain,
                Err(error) if is_unreachable(&error) => return Err(self.unreachable(error)),
                Err(_) => secure,
            }
        } else if self.verify {
            secure
        } else {
            match self.probe(&secure) {
                Ok(_) => secure,
                Err(_) if self.probe(&plain).is_ok() => plain,
                Err(error) => return Err(self.unreachable(error)),
            }
        };
        *known = Some(origin.clone());
        Ok(origin)
    }

    fn probe(&self, origin: &str) -> Result<u16, ureq::Error> {
        let response = self.agent.get(format!("{origin}/v2/")).call()?;
        Ok(response.status().as_u16())
    }

    /// Ask once, following redirects; any status is an answer.
    pub fn get_once(
        &self,
        asked: &str,
        headers: &Headers<'_>,
        authorization: Option<&str>,
    ) -> Result<Response<Body>, RegistryError> {
        let mut url = asked.to_owned();
        let mut authorization = authorization;
        for _ in 0..=REDIRECTS_MAX {
            let mut request = self.agent.get(&url);
            for (name, value) in headers {
                request = request.header(*name, value);
            }
            if let Some(authorization) = authorization {
                request = request.header("authorization", authorization);
            }
            let response = request.call().map_err(|error| self.unreachable(error))?;
            let status = response.status().as_u16();
            if status == 401 && origin_of(&url) != origin_of(asked) {
                // Whoever the registry sent us to has no say in where credentials go.
                return Err(self.nonsense("a redirect to where we are not let in"));
            }
            if !matches!(status, 301 | 302 | 303 | 307 | 308) {
                return Ok(response);
            }
            let target = response
                .headers()
                .get(header::LOCATION)
                .and_then(|value| value.to_str().ok())
                .and_then(|location| absolute(&url, location))
                .ok_or_else(|| self.nonsense("a redirect to nowhere"))?;
            if !self.may_lead(&url, &target) {
                return Err(RegistryError::UnprotectedRedirect {
                    registry: self.registry.clone(),
                    target,
                });
            }
            if origin_of(&url) != origin_of(&target) {
                authorization = None;
            }
            url = target;
        }
        Err(self.nonsense("redirects without end"))
    }

    /// As [`Transport::get_once`], again after a while if the registry is busy.
    pub fn get(
        &self,
        url: &str,
        headers: &Headers<'_>,
        authorization: Option<&str>,
    ) -> Result<Response<Body>, RegistryError> {
        let mut attempt = 0;
        loop {
            let response = self.get_once(url, headers, authorization)?;
            attempt += 1;
            if !is_busy(response.status().as_u16()) || attempt >= ATTEMPTS {
                return Ok(response);
            }
            std::thread::sleep(pause(attempt - 1, retry_after(&response)));
        }
    }

    /// Send a form, without following redirects.
    pub fn post_form(&self, url: &str, form: &[(&str, &str)]) -> Result<Response<Body>, RegistryError> {
        self.agent
            .post(url)
            .send_form(form.iter().copied())
            .map_err(|error| self.unreachable(error))
    }

    /// Whether credentials may go there.
    pub fn is_protected(&self, url: &str) -> bool {
        match url.split_once("://") {
            Some(("https", _)) => true,
            Some(("http", rest)) => {
                let host = rest.split(['/', '?', '#']).next().unwrap_or(rest);
                (is_local(&self.registry) && is_local(host)) || (!self.verify && host == self.registry)
            }
            _ => false,
        }
    }

    /// Whether a redirect may lead from `url` to `target`.
    fn may_lead(&self, url: &str, target: &str) -> bool {
        target.starts_with("https://")
            || (url.starts_with("http://") && (!self.verify || self.is_protected(target)))
    }

    fn unreachable(&self, source: ureq::Error) -> RegistryError {
        RegistryError::Connect {
            registry: self.registry.clone(),
            source: Box::new(source),
        }
    }

    pub fn nonsense(&self, problem: &'static str) -> RegistryError {
        RegistryError::Answer {
            registry: self.registry.clone(),
            problem,
        }
    }
}

/// Nobody is there: no use to try the other scheme.
fn is_unreachable(error: &ureq::Error) -> bool {
    match error {
        ureq::Error::HostNotFound | ureq::Error::Timeout(_) => true,
        ureq::Error::Io(error) => error.kind() == std::io::ErrorKind::ConnectionRefused,
        _ => false,
    }
}

/// Statuses that may be another the next time.
pub(super) const fn is_busy(status: u16) -> bool {
    status == 429 || (status >= 500 && status != 501)
}

/// What the registry asks for, in seconds; dates are not worth the trouble.
pub(super) fn retry_after(response: &Response<Body>) -> Option<Duration> {
    let value = response.headers().get(header::RETRY_AFTER)?.to_str().ok()?;
    value.trim().parse().ok().map(Duration::from_secs)
}

/// How long to wait before the next attempt.
pub(super) fn pause(attempt: u32, asked: Option<Duration>) -> Duration {
    let usual = FIRST_PAUSE * 2_u32.saturating_pow(attempt.min(6));
    asked.unwrap_or(usual).max(usual).min(PAUSE_MAX)
}

/// A redirect's target as a whole address.
fn absolute(base: &str, location: &str) -> Option<String> {
    let location = location.trim();
    if location.starts_with("https://") || location.starts_with("http://") {
        location.parse::<Uri>().ok()?;
        return Some(location.to_owned());
    }
    let origin = origin_of(base)?;
    let target = if location.starts_with("//") {
        format!("{}:{location}", base.split_once(':')?.0)
    } else if location.starts_with('/') {
        format!("{origin}{location}")
    } else if location.is_empty() || location.contains(':') {
        return None;
    } else {
        let path = base.split(['?', '#']).next().unwrap_or(base);
        let directory = path.rsplit_once('/').map_or(path, |(directory, _)| directory);
        format!("{directory}/{location}")
    };
    target.parse::<Uri>().ok()?;
    Some(target)
}

/// Scheme, host and port, in one spelling.
fn origin_of(url: &str) -> Option<String> {
    let uri: Uri = url.parse().ok()?;
    let scheme = uri.scheme_str()?.to_ascii_lowercase();
    let default = if scheme == "https" { 443 } else { 80 };
    let port = uri.port_u16().unwrap_or(default);
    let host = uri.host()?.to_ascii_lowercase();
    Some(format!("{scheme}://{host}:{port}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn redirects_are_read_relative_to_where_they_come_from() {
        let base = "https://registry.test:5000/v2/app/blobs/x?y=/z";
        for (location, target) in [
            ("https://cdn.test/blob?sig=1", Some("https://cdn.test/blob?sig=1")),
            ("/other", Some("https://registry.test:5000/other")),
            ("//cdn.test/blob", Some("https://cdn.test/blob")),
            ("y", Some("https://registry.test:5000/v2/app/blobs/y")),
            ("ftp://cdn.test/blob", None),
            ("file:///etc/passwd", None),
            ("", None),
            ("https://bad host/", None),
        ] {
            // A path on the same origin keeps the port as it was written.
            let found = absolute(base, location).map(|url| url.replace(":443", ""));
            assert_eq!(found.as_deref(), target, "{location}");
        }
        assert_eq!(
            origin_of("HTTPS://Registry.test/a"),
            origin_of("https://registry.test:443/b")
        );
        assert_ne!(
            origin_of("https://registry.test/a"),
            origin_of("https://registry.test:444/a")
        );
    }

    #[test]
    fn redirects_never_lead_into_the_open() {
        let remote = Transport::new("registry.test", true);
        let local = Transport::new("127.0.0.1:5000", true);
        let careless = Transport::new("registry.test", false);
        for (transport, from, to, allowed) in [
            (&remote, "https://registry.test/a", "https://cdn.test/a", true),
            (
                &remote,
                "https://registry.test/a",
                "http://registry.test/a",
                false,
            ),
            (&remote, "https://registry.test/a", "http://127.0.0.1/a", false),
            (&local, "http://127.0.0.1:5000/a", "http://127.0.0.1:6000/a", true),
            (&local, "http://127.0.0.1:5000/a", "http://cdn.test/a", false),
            (
                &local,
                "https://127.0.0.1:5000/a",
                "http://127.0.0.1:6000/a",
                false,
            ),
            (&careless, "http://registry.test/a", "http://cdn.test/a", true),
            (&careless, "https://registry.test/a", "http://cdn.test/a", false),
        ] {
            assert_eq!(transport.may_lead(from, to), allowed, "{from} to {to}");
        }
        assert!(!careless.is_protected("http://cdn.test/token"));
        assert!(careless.is_protected("http://registry.test/token"));
        assert!(!remote.is_protected("http://registry.test/token"));
    }

    #[test]
    fn pauses_grow_and_are_bounded() {
        assert!(pause(1, None) > pause(0, None));
        assert_eq!(pause(0, Some(Duration::from_secs(3600))), PAUSE_MAX);
        assert!(pause(3, Some(Duration::from_secs(0))) >= pause(3, None));
        assert!(is_busy(503) && is_busy(429) && !is_busy(404) && !is_busy(501));
    }
}
