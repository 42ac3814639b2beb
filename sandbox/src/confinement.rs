//! How a container's processes are confined inside its microVM, as a user asks for it.
//!
//! Everything here is kept with the container, so that a later `exec` and a restart get the same. Names are
//! checked when they are parsed; what becomes of them in the guest is in `spec`.

use agent_protocol::{Capabilities, Process, Rlimit};
use serde::{Deserialize, Serialize};

use crate::{Result, SandboxError, capabilities, defaults, seccomp};

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

/// Docker's names of the limits, by their number.
const LIMITS: [&str; 16] = [
    "cpu",
    "fsize",
    "data",
    "stack",
    "core",
    "rss",
    "nproc",
    "nofile",
    "memlock",
    "as",
    "locks",
    "sigpending",
    "msgqueue",
    "nice",
    "rtprio",
    "rttime",
];

impl Ulimit {
    /// Reads `NAME=SOFT[:HARD]`, -1 or `unlimited` being no limit.
    ///
    /// # Errors
    ///
    /// Says what is wrong with it.
    pub fn parse(text: &str) -> Result<Self> {
        let wrong = |problem: String| invalid("--ulimit", problem);
        let (name, limits) = text.split_once('=').ok_or_else(|| {
            wrong(format!(
                "{text:?} is not NAME=SOFT[:HARD], as in nofile=1024:4096"
            ))
        })?;
        if !LIMITS.contains(&name) {
            return Err(wrong(format!("{name:?} is not one of {}", LIMITS.join(", "))));
        }
        let number = |text: &str| match text {
            "-1" | "unlimited" => Ok(u64::MAX),
            _ => text
                .parse()
                .map_err(|_| wrong(format!("{text:?} is not a number"))),
        };
        let (soft, hard) = limits.split_once(':').unwrap_or((limits, limits));
        let (soft, hard) = (number(soft)?, number(hard)?);
        if soft > hard {
            return Err(wrong(format!("{text:?} has a soft limit above its hard limit")));
        }
        Ok(Self {
            name: name.to_owned(),
            soft,
            hard,
        })
    }

    fn for_agent(&self) -> Result<Rlimit> {
        let position = LIMITS.iter().position(|name| *name == self.name);
        let resource = position
            .and_then(|position| u32::try_from(position).ok())
            .ok_or_else(|| invalid("--ulimit", format!("{:?} is not a limit", self.name)))?;
        Ok(Rlimit {
            resource,
            soft: self.soft,
            hard: self.hard,
            ..Rlimit::default()
        })
    }
}

fn invalid(option: &'static str, problem: String) -> SandboxError {
    SandboxError::InvalidOption { option, problem }
}

impl Confinement {
    /// Confines a process that the agent is asked for.
    ///
    /// # Errors
    ///
    /// A capability, a limit or the seccomp profile is not what it should be.
    pub(crate) fn apply(&self, process: &mut Process) -> Result<()> {
        let bounding = capabilities::bounding(self)?;
        process.capabilities = Some(Capabilities {
            bounding,
            effective: bounding,
            permitted: bounding,
            // A user other than root has what a program's file capabilities give it, within the bounding set.
            root_only: true,
            ..Capabilities::default()
        })
        .into();
        let mut rlimits = defaults::rlimits();
        for ulimit in &self.ulimits {
            let limit = ulimit.for_agent()?;
            rlimits.retain(|have| have.resource != limit.resource);
            rlimits.push(limit);
        }
        process.rlimits = rlimits;
        process.no_new_privileges = self.no_new_privileges;
        process.additional_groups.clone_from(&self.group_add);
        process.oom_score_adj = self.oom_score_adj;
        process.umask = self.umask;
        let unconfined = self.privileged && self.seccomp == SeccompSpec::Default;
        if !unconfined {
            process.seccomp_programs = seccomp::programs(&self.seccomp, bounding)?;
        }
        Ok(())
    }

    /// Whether its processes can mount filesystems.
    pub(crate) fn may_mount(&self) -> Result<bool> {
        const SYS_ADMIN: u32 = 21;
        Ok(capabilities::bounding(self)? & (1 << SYS_ADMIN) != 0)
    }

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

#[cfg(test)]
mod tests {
    use super::*;

    fn with(options: &[&str]) -> Result<Confinement> {
        let mut confinement = Confinement::default();
        for option in options {
            confinement.apply_security_opt(option, |path| match path {
                "p.json" => Ok("{}".into()),
                _ => Err(std::io::ErrorKind::NotFound.into()),
            })?;
        }
        Ok(confinement)
    }

    #[test]
    fn security_options_are_dockers() {
        assert!(with(&["no-new-privileges"]).unwrap().no_new_privileges);
        assert!(with(&["no-new-privileges:true"]).unwrap().no_new_privileges);
        assert!(!with(&["no-new-privileges=false"]).unwrap().no_new_privileges);
        assert_eq!(
            with(&["seccomp=unconfined"]).unwrap().seccomp,
            SeccompSpec::Unconfined
        );
        assert_eq!(
            with(&["seccomp:p.json"]).unwrap().seccomp,
            SeccompSpec::Profile("{}".into())
        );
        assert!(with(&["systempaths=unconfined"]).unwrap().unmasked_paths);
        with(&["label=disable", "apparmor=unconfined"]).unwrap();
    }

    #[test]
    fn security_option_that_cannot_be_kept_is_refused_with_the_reason() {
        for (option, word) in [
            ("seccomp=gone.json", "gone.json"),
            ("apparmor=docker-default", "AppArmor"),
            ("label=type:x", "SELinux"),
            ("fly=yes", "fly"),
        ] {
            let error = with(&[option]).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
    }

    #[test]
    fn ulimits_have_names_and_order() {
        let limit = Ulimit::parse("nofile=1024:2048").unwrap();
        assert_eq!((limit.soft, limit.hard), (1024, 2048));
        assert_eq!(limit.for_agent().unwrap().resource, 7);
        assert_eq!(Ulimit::parse("core=-1").unwrap().hard, u64::MAX);
        for wrong in ["nofile", "nofiles=1", "nofile=2:1", "nofile=x"] {
            assert!(Ulimit::parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn given_limit_replaces_the_default_and_privileges_lift_the_filter() {
        let mut process = Process::default();
        let mut confinement = Confinement {
            ulimits: vec![Ulimit::parse("nofile=5:6").unwrap()],
            ..Confinement::default()
        };
        confinement.apply(&mut process).unwrap();
        assert_eq!((process.rlimits.len(), process.rlimits[0].soft), (1, 5));
        assert_eq!(process.seccomp_programs.len(), 1);
        let mut process = Process::default();
        confinement.privileged = true;
        confinement.apply(&mut process).unwrap();
        assert!(process.seccomp_programs.is_empty());
        assert_eq!(process.capabilities.bounding, (1 << 41) - 1);
    }
}
