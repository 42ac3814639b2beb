//! `linux.namespaces` and what belongs to them: id mappings, clock offsets, names.
//!
//! A container always has mount, PID, IPC, UTS and control group namespaces of its own inside its microVM, because what
//! they would be shared with otherwise is the agent. What an engine may ask for beside that, and what becomes of it, is
//! decided here; `docs/oci-conformance.md` says why.

use std::{
    collections::BTreeMap,
    fs::File,
    path::{Path, PathBuf},
    thread,
};

use ::oci_spec::runtime::{LinuxIdMapping, LinuxNamespaceType, LinuxTimeOffset, Spec};
use agent_protocol::{ClockOffset, IdMapping, JoinedNamespaces, TimeNamespace, UserNamespace};
use nix::sched::{CloneFlags, setns};

use super::{
    Policy,
    annotations::HOST_NAMESPACES,
    error::{Result, invalid, unsupported},
    pod::{self, PodPart},
    warnings::Warnings,
};

const FIELD: &str = "linux.namespaces";
/// As many extents as the kernel takes.
const MAX_MAPPINGS: usize = 340;
/// Longest name of a host, as the kernel has it.
const MAX_NAME_BYTES: usize = 64;

/// Where the container's network is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Network {
    /// Its own: the loopback interface of its microVM, and nothing else.
    Private,
    /// What is in a network namespace of the host when the container is started.
    Join(PathBuf),
}

/// What the namespaces come to.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Namespaces {
    pub(super) network: Network,
    pub(super) hostname: String,
    pub(super) domainname: String,
    pub(super) user: Option<UserNamespace>,
    pub(super) time: Option<TimeNamespace>,
    /// Those of other containers of its pod.
    pub(super) joined: JoinedNamespaces,
}

/// By type: absent, or with the path given.
type Asked<'a> = BTreeMap<&'static str, Option<&'a Path>>;

fn name(kind: LinuxNamespaceType) -> &'static str {
    match kind {
        LinuxNamespaceType::Mount => "mount",
        LinuxNamespaceType::Cgroup => "cgroup",
        LinuxNamespaceType::Uts => "uts",
        LinuxNamespaceType::Ipc => "ipc",
        LinuxNamespaceType::User => "user",
        LinuxNamespaceType::Pid => "pid",
        LinuxNamespaceType::Network => "network",
        LinuxNamespaceType::Time => "time",
    }
}

fn asked(spec: &Spec) -> Result<Asked<'_>> {
    let mut asked = Asked::new();
    let namespaces = spec
        .linux()
        .as_ref()
        .and_then(|linux| linux.namespaces().as_ref());
    for (index, namespace) in namespaces.into_iter().flatten().enumerate() {
        let path = namespace
            .path()
            .as_deref()
            .filter(|path| !path.as_os_str().is_empty());
        if path.is_some_and(|path| !path.is_absolute()) {
            return invalid(format!("{FIELD}[{index}].path"), "is not an absolute path");
        }
        let name = name(namespace.typ());
        if asked.insert(name, path).is_some() {
            return invalid(
                format!("{FIELD}[{index}].type"),
                format!("{name:?} is given twice"),
            );
        }
    }
    Ok(asked)
}

/// Whether a container has a namespace of its own of a kind, as its configuration says it.
pub(super) fn has_own(spec: &Spec, kind: LinuxNamespaceType) -> bool {
    asked(spec).is_ok_and(|asked| asked.get(name(kind)) == Some(&None))
}

pub(super) fn translate(
    spec: &Spec,
    private_for_host: bool,
    (policy, part): (&Policy, Option<&PodPart>),
    warnings: &mut Warnings,
) -> Result<Namespaces> {
    let mut asked = asked(spec)?;
    let joined = match part {
        Some(part @ PodPart::Member { .. }) => {
            let path_of = |kind: &str| asked.get(kind).copied().flatten().map(Path::to_path_buf);
            let joined = pod::joined(part, path_of)?;
            // What is joined is settled.
            for kind in ["ipc", "uts", "pid"] {
                asked.entry(kind).and_modify(|path| *path = None);
            }
            joined
        }
        _ => JoinedNamespaces::default(),
    };
    for kind in ["pid", "mount", "cgroup", "user", "time"] {
        if let Some(Some(path)) = asked.get(kind) {
            return unsupported(
                format!("{FIELD}: {kind}"),
                format!(
                    "the container can't join {}: what is in there runs on the host's kernel, or in another microVM; \
                     leave the path out",
                    path.display()
                ),
            );
        }
    }
    if let Some(Some(path)) = asked.get("ipc") {
        warnings.add(format!(
            "{FIELD}: ipc: {}: System V IPC, message queues and shared memory stay within this container's microVM",
            path.display()
        ));
    }
    if !asked.contains_key("pid") && !private_for_host {
        return unsupported(
            format!("{FIELD}: pid"),
            format!(
                "the container would see the host's processes, which a microVM can't show; ask for a PID namespace, or \
                 set the annotation {HOST_NAMESPACES}=private to have one all the same"
            ),
        );
    }
    let network = match asked.get("network") {
        Some(Some(path)) => Network::Join(path.to_path_buf()),
        None if !private_for_host => {
            return unsupported(
                format!("{FIELD}: network"),
                format!(
                    "the container would use the host's network, which a microVM can't; ask for a network namespace, or \
                     set the annotation {HOST_NAMESPACES}=private to have one with a loopback interface only"
                ),
            );
        }
        Some(None) | None => Network::Private,
    };
    let (hostname, domainname) = names(spec, &asked, policy)?;
    Ok(Namespaces {
        network,
        hostname,
        domainname,
        user: user_namespace(spec, asked.contains_key("user"))?,
        time: time_namespace(spec, asked.contains_key("time"))?,
        joined,
    })
}

/// The host's and the domain's name: as given, else those of the namespace that would be shared.
fn names(spec: &Spec, asked: &Asked<'_>, policy: &Policy) -> Result<(String, String)> {
    let given = |field: &'static str, name: &Option<String>| -> Result<Option<String>> {
        let Some(name) = name.clone().filter(|name| !name.is_empty()) else {
            return Ok(None);
        };
        if !asked.contains_key("uts") {
            return invalid(
                field,
                "is given, but linux.namespaces has no UTS namespace to set it in",
            );
        }
        if name.len() > MAX_NAME_BYTES {
            return invalid(field, format!("is longer than {MAX_NAME_BYTES} bytes"));
        }
        Ok(Some(name))
    };
    let hostname = given("hostname", spec.hostname())?;
    let domainname = given("domainname", spec.domainname())?;
    let (shared, shared_domain) = match asked.get("uts") {
        Some(Some(path)) if hostname.is_none() => names_of(path)?,
        _ => (policy.hostname.clone(), String::new()),
    };
    Ok((hostname.unwrap_or(shared), domainname.unwrap_or(shared_domain)))
}

/// The names in a UTS namespace of the host, as they are now.
fn names_of(path: &Path) -> Result<(String, String)> {
    let looked = thread::scope(|scope| {
        // A thread of its own, which has joined the namespace until it ends.
        let look = || -> std::io::Result<(String, String)> {
            setns(File::open(path)?, CloneFlags::CLONE_NEWUTS)?;
            let names = nix::sys::utsname::uname()?;
            let text = |name: &std::ffi::OsStr| name.to_string_lossy().into_owned();
            Ok((text(names.nodename()), text(names.domainname())))
        };
        scope.spawn(look).join()
    });
    let problem = match looked {
        Ok(Ok((hostname, domainname))) => {
            // What the kernel says where nobody has set one.
            let domainname = Some(domainname)
                .filter(|name| name != "(none)")
                .unwrap_or_default();
            return Ok((hostname, domainname));
        }
        Ok(Err(error)) => error.to_string(),
        Err(_) => "the thread that looks it up has died".to_owned(),
    };
    invalid(format!("{FIELD}: uts"), format!("{}: {problem}", path.display()))
}

fn mappings(field: &str, list: &[LinuxIdMapping]) -> Result<Vec<IdMapping>> {
    if list.len() > MAX_MAPPINGS {
        return invalid(field, format!("has more than {MAX_MAPPINGS} entries"));
    }
    list.iter()
        .map(|mapping| {
            let fits = |first: u32| first.checked_add(mapping.size()).is_some();
            if mapping.size() == 0 || !fits(mapping.container_id()) || !fits(mapping.host_id()) {
                return invalid(
                    field,
                    "has an entry whose size is zero or goes beyond the last id",
                );
            }
            Ok(IdMapping {
                container_id: mapping.container_id(),
                host_id: mapping.host_id(),
                size: mapping.size(),
                ..IdMapping::default()
            })
        })
        .collect()
}

fn user_namespace(spec: &Spec, asked: bool) -> Result<Option<UserNamespace>> {
    let linux = spec.linux().as_ref();
    let list = |of: Option<&Option<Vec<LinuxIdMapping>>>| of.cloned().flatten().unwrap_or_default();
    let uids = mappings(
        "linux.uidMappings",
        &list(linux.map(|linux| linux.uid_mappings())),
    )?;
    let gids = mappings(
        "linux.gidMappings",
        &list(linux.map(|linux| linux.gid_mappings())),
    )?;
    match (asked, uids.is_empty(), gids.is_empty()) {
        (false, true, true) => Ok(None),
        (false, ..) => invalid(
            "linux.uidMappings, linux.gidMappings",
            "are for a user namespace, and linux.namespaces has none",
        ),
        (true, false, false) => Ok(Some(UserNamespace {
            uid_mappings: uids,
            gid_mappings: gids,
            ..UserNamespace::default()
        })),
        (true, ..) => invalid(
            "linux.uidMappings, linux.gidMappings",
            "a user namespace needs both, or nobody can be anybody in it",
        ),
    }
}

fn time_namespace(spec: &Spec, asked: bool) -> Result<Option<TimeNamespace>> {
    const FIELD: &str = "linux.timeOffsets";
    let offsets = spec
        .linux()
        .as_ref()
        .and_then(|linux| linux.time_offsets().as_ref());
    let offsets = offsets.filter(|offsets| !offsets.is_empty());
    if !asked {
        return match offsets {
            Some(_) => invalid(FIELD, "are for a time namespace, and linux.namespaces has none"),
            None => Ok(None),
        };
    }
    let mut namespace = TimeNamespace::default();
    for (clock, offset) in offsets.into_iter().flatten() {
        let offset = Some(clock_offset(clock, offset)?).into();
        match clock.as_str() {
            "monotonic" => namespace.monotonic = offset,
            "boottime" => namespace.boottime = offset,
            other => {
                return invalid(
                    format!("{FIELD}.{other}"),
                    "is not a clock of a time namespace; there are monotonic and boottime",
                );
            }
        }
    }
    Ok(Some(namespace))
}

fn clock_offset(clock: &str, offset: &LinuxTimeOffset) -> Result<ClockOffset> {
    let nanoseconds = offset.nanosecs().unwrap_or(0);
    if nanoseconds >= 1_000_000_000 {
        return invalid(
            format!("linux.timeOffsets.{clock}.nanosecs"),
            "is a second or more",
        );
    }
    Ok(ClockOffset {
        seconds: offset.secs().unwrap_or(0),
        nanoseconds,
        ..ClockOffset::default()
    })
}
