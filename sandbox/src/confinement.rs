//! How a container's processes are confined inside its microVM, as a user asks for it.
//!
//! Everything here is kept with the container, so that a later `exec` and a restart get the same. Names are
//! checked when they are parsed; what becomes of them in the guest is in `spec`.

use serde::{Deserialize, Serialize};

use crate::{Result, SandboxError};

/// Largest seccomp profile that is read.
pub const MAX_PROFILE_BYTES: usize = 1 << 20;

/// A limit of `setrlimit`, by docker's name (`nofile`). `u64::MAX` is none.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ulimit {
    /// Docker's name of the resource.
    pub name: String,
    /// What a process may raise it to by itself is `hard`.
    pub soft: u64,
    /// The ceiling.
    pub hard: u64,
}

/// Which system calls a container may make.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SeccompSpec {
    /// Docker's default profile.
    #[default]
    Default,
    /// All of them.
    Unconfined,
    /// What a profile in docker's or runc's JSON format says; its text.
    Profile(String),
}

/// A device of the microVM that the container is given.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceSpec {
    /// Its path in the microVM, `/dev/fuse`.
    pub path: String,
    /// Its path in the container.
    pub container_path: String,
}

/// What a container's processes may do.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Confinement {
    /// Capabilities beside the default ones, without `CAP_`; or `ALL`.
    pub cap_add: Vec<String>,
    /// Capabilities taken away; or `ALL`.
    pub cap_drop: Vec<String>,
    /// The system calls allowed.
    pub seccomp: SeccompSpec,
    /// Whether a setuid program gains nothing.
    pub no_new_privileges: bool,
    /// Resource limits beside the default ones.
    pub ulimits: Vec<Ulimit>,
    /// Further groups of the first process, by name or number.
    pub group_add: Vec<String>,
    /// Whether the kernel interfaces that show the machine can be seen and written.
    pub unmasked_paths: bool,
    /// Everything that a container can be allowed inside its microVM.
    pub privileged: bool,
    /// How much sooner than others the kernel ends it for want of memory.
    pub oom_score_adj: Option<i32>,
    /// File mode creation mask.
    pub umask: Option<u32>,
}

fn invalid(option: &'static str, problem: String) -> SandboxError {
    SandboxError::InvalidOption { option, problem }
}

impl Confinement {
    /// Applies one `--security-opt`. Profiles are read by `read`, which is given the path.
    ///
    /// # Errors
    ///
    /// The option is unknown or asks for something a microVM doesn't have.
    pub fn apply_security_opt(
        &mut self,
        option: &str,
        read: impl FnOnce(&str) -> std::io::Result<String>,
    ) -> Result<()> {
        const OPTION: &str = "--security-opt";
        // `name:value` is docker's old form.
        let (name, value) = option
            .split_once('=')
            .or_else(|| option.split_once(':'))
            .unwrap_or((option, ""));
        match (name, value) {
            ("no-new-privileges", "" | "true") => self.no_new_privileges = true,
            ("no-new-privileges", "false") => self.no_new_privileges = false,
            ("no-new-privileges", other) => {
                return Err(invalid(
                    OPTION,
                    format!("no-new-privileges is true or false, not {other:?}"),
                ));
            }
            ("seccomp", "unconfined") => self.seccomp = SeccompSpec::Unconfined,
            ("seccomp", "builtin" | "default") => self.seccomp = SeccompSpec::Default,
            ("seccomp", "") => {
                return Err(invalid(
                    OPTION,
                    "seccomp needs a profile: seccomp=FILE or seccomp=unconfined".into(),
                ));
            }
            ("seccomp", path) => {
                let text = read(path).map_err(|error| invalid(OPTION, format!("seccomp={path}: {error}")))?;
                if text.len() > MAX_PROFILE_BYTES {
                    return Err(invalid(OPTION, format!("seccomp={path} is larger than 1 MiB")));
                }
                self.seccomp = SeccompSpec::Profile(text);
            }
            ("systempaths", "unconfined") => self.unmasked_paths = true,
            // The guest has no such module: to switch it off is what is the case already.
            ("label", "disable") | ("apparmor", "unconfined") => {}
            ("label" | "apparmor", _) => {
                return Err(invalid(
                    OPTION,
                    format!(
                        "{name}={value}: the microVM's kernel has no {}; the container is confined by the microVM. \
                         Leave the option out",
                        if name == "label" { "SELinux" } else { "AppArmor" },
                    ),
                ));
            }
            _ => {
                return Err(invalid(
                    OPTION,
                    format!(
                        "{option:?} is not known; there are seccomp=FILE|unconfined and no-new-privileges"
                    ),
                ));
            }
        }
        Ok(())
    }
}
