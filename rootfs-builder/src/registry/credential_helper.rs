//! Credential helpers: programs named `docker-credential-NAME` that keep logins, in a key ring for instance.
//!
//! `get` takes the registry on standard input and answers `{"Username", "Secret"}`; a user named `<token>` has an identity token in
//! place of a password. The answer and the time it may take are bounded.

use std::io::{self, Read, Write};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use serde::Deserialize;

use super::{Credentials, RegistryError};

const ANSWER_MAX_BYTES: u64 = 64 << 10;
/// It may have to ask somebody to unlock a key ring.
const TIMEOUT: Duration = Duration::from_secs(60);
/// What helpers say if they have nothing, on standard output and with a failing status.
const NOT_FOUND: &str = "credentials not found";
const TOKEN_USER: &str = "<token>";

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Answer {
    #[serde(default)]
    username: String,
    #[serde(default)]
    secret: String,
}

/// What the helper `name` keeps for a registry.
pub(super) fn get(name: &str, registry: &str) -> Result<Option<Credentials>, RegistryError> {
    let program = format!("docker-credential-{name}");
    let failed = |problem: String| RegistryError::CredentialHelper {
        program: program.clone(),
        problem,
    };
    if !name
        .bytes()
        .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.'))
    {
        return Err(failed("is not a program's name".to_owned()));
    }
    let mut child = Command::new(&program)
        .arg("get")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|error| failed(format!("can't be started: {error}")))?;
    let answer = answer(&mut child, registry);
    if answer.is_err() {
        let _ = child.kill();
    }
    let status = child
        .wait()
        .map_err(|error| failed(format!("can't be waited for: {error}")))?;
    let text = answer.map_err(|error| failed(format!("gave no answer: {error}")))?;
    if !status.success() {
        if text.to_ascii_lowercase().contains(NOT_FOUND) {
            return Ok(None);
        }
        let shown: String = text
            .trim()
            .chars()
            .filter(|char| !char.is_control())
            .take(200)
            .collect();
        return Err(failed(format!("failed: {shown}")));
    }
    // Never shown: it holds the secret.
    let answer: Answer = serde_json::from_str(&text)
        .map_err(|_| failed("answered something that is not what helpers answer".to_owned()))?;
    if answer.secret.is_empty() {
        return Ok(None);
    }
    Ok(Some(if answer.username == TOKEN_USER {
        Credentials {
            identity_token: Some(answer.secret),
            ..Credentials::new("", "")
        }
    } else {
        Credentials::new(answer.username, answer.secret)
    }))
}

fn answer(child: &mut Child, registry: &str) -> io::Result<String> {
    let gone = || io::Error::from(io::ErrorKind::BrokenPipe);
    let mut stdin = child.stdin.take().ok_or_else(gone)?;
    let stdout = child.stdout.take().ok_or_else(gone)?;
    // A helper that doesn't read its input may still know the answer.
    let _ = stdin.write_all(registry.as_bytes());
    drop(stdin);
    let (sender, receiver) = mpsc::channel();
    // A thread, so that a helper which hangs can be given up.
    std::thread::Builder::new()
        .name("credential-helper".into())
        .spawn(move || {
            let mut text = String::new();
            let result = stdout
                .take(ANSWER_MAX_BYTES)
                .read_to_string(&mut text)
                .map(|_| text);
            let _ = sender.send(result);
        })?;
    receiver
        .recv_timeout(TIMEOUT)
        .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}
