//! A real registry server on loopback, filled by a real client.
//!
//! Needs Debian's `docker-registry` and `skopeo`, which `cargo xtask setup` installs.

use std::fs::{self, File};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use crate::hull::{PATIENCE, eventually};

/// `hull:secret`, as `htpasswd -nbB` writes it.
const HTPASSWD: &str = "hull:$2y$04$GKsREbNOrBvcBeplRdFW8.nlkx.BfW/17cESXRx5DM6jh26v2gHIq\n";

/// A server that ends with the test.
#[derive(Debug)]
pub struct Registry {
    child: Child,
    port: u16,
    login: bool,
}

fn is_installed(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|folder| folder.join(program).is_file())
}

/// `… msg="listening on 127.0.0.1:34503" …`, once the line is whole.
fn port_in(log: &str) -> Option<u16> {
    let (_, rest) = log.split_once("listening on 127.0.0.1:")?;
    let (port, _) = rest.split_once('"')?;
    port.parse().ok()
}

impl Registry {
    /// Starts one that keeps everything below `dir`; `None` where the programs are missing, which it says.
    ///
    /// # Panics
    /// The server is there but doesn't start.
    pub fn start(dir: &Path, login: bool) -> Option<Self> {
        for program in ["docker-registry", "skopeo"] {
            if !is_installed(program) {
                eprintln!("skipped: {program} is not installed; `cargo xtask setup` installs it");
                return None;
            }
        }
        let htpasswd = dir.join("htpasswd");
        fs::write(&htpasswd, HTPASSWD).expect("the scratch folder can be written to");
        let auth = if login {
            format!(
                "auth: {{htpasswd: {{realm: test, path: {}}}}}\n",
                htpasswd.display()
            )
        } else {
            String::new()
        };
        let config = dir.join("registry.yml");
        let log = dir.join("registry.log");
        let text = format!(
            "version: 0.1\nlog: {{level: info, accesslog: {{disabled: true}}}}\nstorage: {{filesystem: {{rootdirectory: {}}}}}\nhttp: {{addr: \"127.0.0.1:0\"}}\n{auth}",
            dir.join("data").display()
        );
        fs::write(&config, text).expect("the scratch folder can be written to");
        let child = Command::new("docker-registry")
            .arg("serve")
            .arg(&config)
            .stdout(Stdio::null())
            .stderr(File::create(&log).expect("the scratch folder can be written to"))
            .spawn()
            .expect("docker-registry starts");
        let mut registry = Self {
            child,
            port: 0,
            login,
        };
        // It takes a free port itself, so nobody can take it in between, and says which once it listens.
        let listens = eventually(PATIENCE, || {
            let said = fs::read_to_string(&log).unwrap_or_default();
            registry.port = port_in(&said).unwrap_or(0);
            registry.port != 0
        });
        let said = fs::read_to_string(&log).unwrap_or_default();
        assert!(listens, "docker-registry doesn't listen: {said}");
        Some(registry)
    }

    /// Where it listens.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// `127.0.0.1:PORT`.
    pub fn host(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// Puts an image (`oci:DIR:TAG`) into it and returns its reference there.
    ///
    /// # Panics
    /// It can't be done.
    pub fn push(&self, image: &str, name: &str) -> String {
        let reference = format!("{}/{name}", self.host());
        let mut command = Command::new("skopeo");
        command.args(["--insecure-policy", "copy", "--dest-tls-verify=false", "-q"]);
        if self.login {
            command.args(["--dest-creds", "hull:secret"]);
        }
        let status = command
            .arg(image)
            .arg(format!("docker://{reference}"))
            .status()
            .expect("skopeo starts");
        assert!(status.success(), "skopeo can't push {image}");
        reference
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}
