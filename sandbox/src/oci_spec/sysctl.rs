//! `linux.sysctl`: kernel parameters of the container's namespaces.

use ::oci_spec::runtime::{LinuxNamespaceType, Spec};
use agent_protocol::Sysctl;

use super::{
    error::{Result, invalid, unsupported},
    namespaces::has_own,
};

/// Most parameters, as the protocol bounds them.
const MAX_SYSCTLS: usize = 256;

/// Parameters of an IPC namespace beside those below `fs.mqueue`.
const IPC: [&str; 8] = [
    "kernel.msgmax",
    "kernel.msgmnb",
    "kernel.msgmni",
    "kernel.sem",
    "kernel.shmall",
    "kernel.shmmax",
    "kernel.shmmni",
    "kernel.shm_rmid_forced",
];

pub(super) fn translate(spec: &Spec) -> Result<Vec<Sysctl>> {
    let given = spec.linux().as_ref().and_then(|linux| linux.sysctl().as_ref());
    let mut sysctls = given
        .into_iter()
        .flatten()
        .map(|(name, value)| one(spec, name, value))
        .collect::<Result<Vec<_>>>()?;
    if sysctls.len() > MAX_SYSCTLS {
        return invalid("linux.sysctl", format!("has more than {MAX_SYSCTLS} entries"));
    }
    sysctls.sort_unstable_by(|one, other| one.name.cmp(&other.name));
    Ok(sysctls)
}

/// Both `net.ipv4.ip_forward` and `net/ipv4/ip_forward` are in use; an interface's name may have dots in the latter.
fn dotted(name: &str) -> String {
    let first = name.find(['.', '/']).map(|position| name.as_bytes()[position]);
    if first == Some(b'/') {
        name.chars()
            .map(|c| match c {
                '/' => '.',
                '.' => '/',
                other => other,
            })
            .collect()
    } else {
        name.to_owned()
    }
}

fn one(spec: &Spec, name: &str, value: &str) -> Result<Sysctl> {
    let field = || format!("linux.sysctl.{name}");
    let dotted = dotted(name);
    let needs = |kind: LinuxNamespaceType, what: &str| {
        if has_own(spec, kind) {
            Ok(())
        } else {
            invalid(
                field(),
                format!("is a parameter of {what}, and the container has none of its own"),
            )
        }
    };
    match dotted.as_str() {
        "kernel.hostname" => return invalid(field(), "is set by `hostname`"),
        "kernel.domainname" => needs(LinuxNamespaceType::Uts, "a UTS namespace")?,
        name if IPC.contains(&name) || name.starts_with("fs.mqueue.") => {
            needs(LinuxNamespaceType::Ipc, "an IPC namespace")?;
        }
        // The network of a container is its microVM's, whoever wired it.
        name if name.starts_with("net.") => {}
        name if name.starts_with("user.") => needs(LinuxNamespaceType::User, "a user namespace")?,
        _ => {
            return unsupported(
                field(),
                "is not a parameter of a namespace; the annotation io.hull.kernel_params sets those of the microVM's \
                 kernel, as in sysctl.vm.max_map_count=262144",
            );
        }
    }
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"._-/".contains(&byte);
    // A part that is empty, or two dots, would lead elsewhere.
    let odd = ["..", "//"].iter().any(|odd| dotted.contains(odd));
    if !dotted.bytes().all(allowed) || odd {
        return invalid(field(), "is not the name of a parameter");
    }
    Ok(Sysctl {
        name: dotted,
        value: value.to_owned(),
        ..Sysctl::default()
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn sysctls(name: &str, namespaces: &[&str]) -> Result<Vec<Sysctl>> {
        let namespaces: Vec<_> = namespaces.iter().map(|kind| json!({"type": kind})).collect();
        let spec = json!({"ociVersion": "1.2.0", "linux": {"namespaces": namespaces, "sysctl": {name: "1"}}});
        translate(&serde_json::from_value(spec).unwrap())
    }

    #[test]
    fn parameters_of_namespaces_are_set_and_others_refused() {
        let own = ["ipc", "uts", "network"];
        for name in [
            "net.ipv4.ip_forward",
            "kernel.shmmax",
            "fs.mqueue.msg_max",
            "kernel.domainname",
        ] {
            assert_eq!(sysctls(name, &own).unwrap()[0].name, name);
        }
        for name in [
            "vm.max_map_count",
            "kernel.hostname",
            "fs.file-max",
            "user.max_user_namespaces",
            "kernel.panic",
        ] {
            let error = sysctls(name, &own).unwrap_err().to_string();
            assert!(error.starts_with(&format!("linux.sysctl.{name}: ")), "{error}");
        }
        assert!(sysctls("kernel.shmmax", &["uts"]).is_err());
    }

    #[test]
    fn slashes_separate_as_dots_do() {
        let name = |given: &str| sysctls(given, &["network"]).unwrap()[0].name.clone();
        assert_eq!(
            name("net/ipv4/conf/eth0.1/forwarding"),
            "net.ipv4.conf.eth0/1.forwarding"
        );
        assert_eq!(
            name("net.ipv4.conf.all.forwarding"),
            "net.ipv4.conf.all.forwarding"
        );
    }
}
