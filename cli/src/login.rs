//! `hull login`

use std::io::{IsTerminal as _, Read as _};

use anyhow::{Context as _, bail};
use clap::Args;
use rootfs_builder::registry::{self, Credentials};

use crate::{auth_file::AuthFile, pull::Access};

/// More than any real password.
const PASSWORD_MAX_BYTES: u64 = 64 << 10;

/// Log in to a registry: the credentials are checked and kept where docker and podman keep theirs.
#[derive(Debug, Args)]
pub struct Login {
    /// User name; asked for where it isn't given
    #[arg(short, long)]
    username: Option<String>,
    /// Password; other users can see it in the list of processes, so --password-stdin is better
    #[arg(short, long, conflicts_with = "password_stdin")]
    password: Option<String>,
    /// Read the password from stdin
    #[arg(long)]
    password_stdin: bool,
    /// Only say who is logged in
    #[arg(long, conflicts_with_all = ["username", "password", "password_stdin"])]
    get_login: bool,
    #[command(flatten)]
    access: Access,
    /// HOST[:PORT]
    registry: String,
}

/// A registry as the files name it: a host, and nothing else.
///
/// # Errors
/// It is empty or no host.
pub fn registry_host(text: &str) -> anyhow::Result<&str> {
    let host = text
        .strip_prefix("https://")
        .or_else(|| text.strip_prefix("http://"))
        .unwrap_or(text);
    let host = host.trim_end_matches('/');
    if host.is_empty() || host.contains(['/', ' ', '@']) {
        bail!("{text:?} is no registry: expected HOST[:PORT]");
    }
    Ok(host)
}

impl Login {
    /// Checks the credentials and keeps them.
    pub fn execute(self) -> anyhow::Result<u8> {
        let host = registry_host(&self.registry)?;
        if self.get_login {
            let found = Credentials::find(host)?.with_context(|| format!("not logged in to {host}"))?;
            println!("{}", found.username);
            return Ok(0);
        }
        let username = match &self.username {
            Some(name) => name.clone(),
            None if self.password_stdin => bail!("--password-stdin needs --username"),
            None => ask("Username: ")?,
        };
        let password = match &self.password {
            Some(password) => password.clone(),
            None if self.password_stdin => read_password()?,
            None => {
                require_terminal()?;
                rpassword::prompt_password("Password: ").context("reading the password")?
            }
        };
        if username.is_empty() || password.is_empty() {
            bail!("a login needs a user name and a password");
        }
        let credentials = Credentials::new(username, password);
        registry::log_in(host, &credentials, self.access.tls_verify)?;
        let file = AuthFile::to_write()?;
        file.store(host, &credentials.username, &credentials.password)?;
        println!("Login Succeeded!");
        Ok(0)
    }
}

fn require_terminal() -> anyhow::Result<()> {
    if std::io::stdin().is_terminal() {
        return Ok(());
    }
    bail!("can't ask for credentials without a terminal; use --username and --password-stdin")
}

fn ask(question: &str) -> anyhow::Result<String> {
    require_terminal()?;
    eprint!("{question}");
    let mut line = String::new();
    std::io::stdin()
        .read_line(&mut line)
        .context("reading the user name")?;
    Ok(line.trim().to_owned())
}

/// All of stdin, but for the line break that `echo` adds.
fn read_password() -> anyhow::Result<String> {
    let mut text = String::new();
    let mut stdin = std::io::stdin().lock().take(PASSWORD_MAX_BYTES);
    stdin
        .read_to_string(&mut text)
        .context("reading the password from stdin")?;
    Ok(text.trim_end_matches(['\n', '\r']).to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registry_is_a_host_however_it_is_typed() {
        assert_eq!(
            registry_host("https://registry.test:5000/").unwrap(),
            "registry.test:5000"
        );
        assert!(registry_host("registry.test/team").is_err());
        assert!(registry_host("").is_err());
    }
}
