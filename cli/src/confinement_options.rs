//! What `run` and `create` say about what a container's processes may do; names and meaning as docker's.

use std::{collections::BTreeMap, fs};

use clap::Args;
use sandbox::{
    ContainerSpec, SandboxError,
    confinement::{Confinement, DeviceSpec, Ulimit},
};

use crate::container_options::parse_bytes;

/// The options of a container's confinement.
#[derive(Debug, Args)]
pub struct ConfinementOptions {
    /// Give a capability, such as NET_ADMIN; ALL gives all
    #[arg(long, value_name = "CAPABILITY", value_delimiter = ',')]
    cap_add: Vec<String>,
    /// Take a capability away; ALL takes all
    #[arg(long, value_name = "CAPABILITY", value_delimiter = ',')]
    cap_drop: Vec<String>,
    /// seccomp=FILE, seccomp=unconfined, no-new-privileges, systempaths=unconfined
    #[arg(long, value_name = "OPTION")]
    security_opt: Vec<String>,
    /// Everything a container can be allowed in its microVM; the host stays out of its reach
    #[arg(long)]
    privileged: bool,
    /// Limit of a resource: NAME=SOFT[:HARD], as in nofile=1024:4096
    #[arg(long, value_name = "LIMIT")]
    ulimit: Vec<String>,
    /// Run the command in a further group, by name or number
    #[arg(long, value_name = "GROUP")]
    group_add: Vec<String>,
    /// Size of /dev/shm [default: 64m]
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes)]
    shm_size: Option<u64>,
    /// Set a kernel parameter: NAME=VALUE
    #[arg(long, value_name = "NAME=VALUE")]
    sysctl: Vec<String>,
    /// Most processes and threads at once; -1 for no limit
    #[arg(long, value_name = "NUMBER", allow_hyphen_values = true)]
    pids_limit: Option<i64>,
    /// How much sooner than others the kernel ends it for want of memory, -1000 to 1000
    #[arg(long, value_name = "NUMBER", allow_hyphen_values = true, value_parser = clap::value_parser!(i32).range(-1000..=1000))]
    oom_score_adj: Option<i32>,
    /// File mode creation mask, octal [default: 0022]
    #[arg(long, value_parser = parse_umask)]
    umask: Option<u32>,
    /// Give a device of the microVM, such as /dev/fuse: PATH[:PATH-IN-CONTAINER]
    #[arg(long, value_name = "DEVICE")]
    device: Vec<String>,
}

fn parse_umask(text: &str) -> Result<u32, String> {
    u32::from_str_radix(text, 8)
        .ok()
        .filter(|mask| *mask <= 0o777)
        .ok_or_else(|| "expected an octal number up to 0777".into())
}

fn parse_sysctl(text: &str) -> Result<(String, String), SandboxError> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err(SandboxError::InvalidOption {
            option: "--sysctl",
            problem: format!("{text:?} is not NAME=VALUE, as in net.core.somaxconn=1024"),
        }),
    }
}

fn parse_device(text: &str) -> Result<DeviceSpec, SandboxError> {
    let mut parts = text.split(':');
    let path = parts.next().unwrap_or_default();
    // A third part, the permissions, can't be less than all here.
    let container_path = parts.next().filter(|part| part.starts_with('/')).unwrap_or(path);
    if !path.starts_with("/dev/") || path.contains("..") {
        return Err(SandboxError::InvalidOption {
            option: "--device",
            problem: format!("{path:?} is not a path below /dev of the microVM, as in /dev/fuse"),
        });
    }
    Ok(DeviceSpec {
        path: path.to_owned(),
        container_path: container_path.to_owned(),
    })
}

impl ConfinementOptions {
    /// Writes them into a container's specification.
    pub fn apply(&self, spec: &mut ContainerSpec) -> Result<(), SandboxError> {
        let mut confinement = Confinement {
            cap_add: self.cap_add.clone(),
            cap_drop: self.cap_drop.clone(),
            privileged: self.privileged,
            ulimits: self
                .ulimit
                .iter()
                .map(|text| Ulimit::parse(text))
                .collect::<Result<_, _>>()?,
            group_add: self.group_add.clone(),
            oom_score_adj: self.oom_score_adj,
            umask: self.umask,
            ..Confinement::default()
        };
        for option in &self.security_opt {
            confinement.apply_security_opt(option, |path| fs::read_to_string(path))?;
        }
        spec.confinement = confinement;
        spec.shm_bytes = self.shm_size;
        spec.sysctls = self
            .sysctl
            .iter()
            .map(|text| parse_sysctl(text))
            .collect::<Result<BTreeMap<_, _>, _>>()?;
        spec.pids_limit = self
            .pids_limit
            .and_then(|limit| u64::try_from(limit).ok())
            .filter(|limit| *limit > 0);
        spec.devices = self
            .device
            .iter()
            .map(|text| parse_device(text))
            .collect::<Result<_, _>>()?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_has_a_place_in_the_container() {
        let device = |text| parse_device(text).map(|device| (device.path, device.container_path));
        assert_eq!(
            device("/dev/fuse").unwrap(),
            ("/dev/fuse".into(), "/dev/fuse".into())
        );
        assert_eq!(device("/dev/fuse:/dev/x:rwm").unwrap().1, "/dev/x");
        assert_eq!(device("/dev/fuse:rwm").unwrap().1, "/dev/fuse");
        assert!(device("/etc/passwd").is_err());
        assert!(device("/dev/../etc/passwd").is_err());
    }

    #[test]
    fn mask_is_octal() {
        assert_eq!(parse_umask("0027"), Ok(0o27));
        assert!(parse_umask("1000").is_err());
        assert!(parse_umask("9").is_err());
    }
}
