//! Configurations as engines write them, from `runc spec` to a privileged container of docker, and mutations of them.

mod fields;

use std::{fs, path::PathBuf};

use proptest::prelude::*;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::*;

const RUNC: &str = include_str!("tests/runc.json");
const DOCKER: &str = include_str!("tests/docker.json");
const DOCKER_PRIVILEGED: &str = include_str!("tests/docker_privileged.json");
const PODMAN: &str = include_str!("tests/podman.json");
const CONTAINERD: &str = include_str!("tests/containerd.json");
const CRI: &str = include_str!("tests/cri.json");

fn policy() -> Policy {
    Policy {
        host_cpus: 4,
        host_memory_mib: 8192,
        hostname: "the-host".into(),
        default_memory_mib: 256,
        systemd_cgroup: false,
    }
}

/// A bundle with a configuration and what it binds.
fn bundle(config: &Value) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for folder in ["rootfs", "data"] {
        fs::create_dir(dir.path().join(folder)).unwrap();
    }
    for file in ["hostname", "resolv.conf"] {
        fs::write(dir.path().join(file), "x").unwrap();
    }
    fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    dir
}

fn translated_with(config: &Value, policy: &Policy) -> Result<Translated> {
    let dir = bundle(config);
    let config = load(dir.path())?;
    let mut translated = translate(&config.spec, dir.path(), policy)?;
    translated.warnings.extend(config.warnings);
    Ok(translated)
}

fn translated(config: &Value) -> Result<Translated> {
    translated_with(config, &policy())
}

fn parse(text: &str) -> Value {
    serde_json::from_str(text).unwrap()
}

/// A configuration with one value replaced, by its JSON pointer; missing objects on the way are made.
fn with(text: &str, pointer: &str, value: Value) -> Value {
    let mut config = parse(text);
    let mut at = &mut config;
    for key in pointer.split('/').skip(1) {
        if at.is_null() {
            *at = json!({});
        }
        at = match at {
            Value::Array(list) => &mut list[key.parse::<usize>().unwrap()],
            other => &mut other[key],
        };
    }
    *at = value;
    config
}

#[test]
fn what_runc_spec_writes_is_taken() {
    let all = translated(&parse(RUNC)).unwrap();
    let process = &all.request.process;
    assert!(all.terminal && process.terminal && process.no_new_privileges);
    assert_eq!(all.request.hostname, "runc");
    assert_eq!((all.memory_mib, all.vcpus), (256, 1));
    assert_eq!(process.capabilities.ambient, 1 << 29 | 1 << 5 | 1 << 10);
    assert_eq!((process.rlimits[0].resource, process.rlimits[0].hard), (7, 1024));
    assert_eq!(all.network, Network::Private);
    // Nothing in it asks for a controller, a filter or a check of devices.
    assert!(all.request.resources.files.is_empty() && !all.request.device_filter);
    assert!(process.seccomp_programs.is_empty());
    assert_eq!(all.request.rootfs.share, Some(0));
    assert!(all.request.rootfs.read_only && all.shares[0].exclusive && !all.shares[0].read_only);
    assert!(all.warnings.is_empty(), "{:?}", all.warnings);
}

#[test]
fn dockers_defaults_run() {
    let all = translated(&parse(DOCKER)).unwrap();
    assert_eq!(all.memory_mib, 64 + 2 + 48);
    assert_eq!(all.vcpus, 1);
    let files: Vec<String> = all
        .request
        .resources
        .files
        .iter()
        .map(|file| format!("{}={}", file.name, file.value))
        .collect();
    assert_eq!(
        files,
        [
            "memory.max=67108864",
            "memory.swap.max=67108864",
            "cpu.max=50000 100000"
        ]
    );
    assert_eq!(all.hooks.prestart.len(), 1);
    assert_eq!(
        all.host_cgroup,
        Some(HostCgroup::Path("docker/5c1d8e1b2f3a".into()))
    );
    assert_eq!(all.request.process.seccomp_programs.len(), 1);
    assert_eq!(all.request.process.additional_gids, [0, 10]);
    assert!(!all.request.device_filter && !all.request.all_devices);
    let shared: Vec<(&str, Option<u32>)> = all
        .request
        .mounts
        .iter()
        .filter(|mount| mount.share.is_some())
        .map(|mount| (mount.destination.as_str(), mount.share))
        .collect();
    assert_eq!(
        shared,
        [
            ("/etc/resolv.conf", Some(0)),
            ("/etc/hostname", Some(1)),
            ("/data", Some(2))
        ]
    );
    assert!(all.shares[2].read_only && !all.shares[1].read_only && all.shares[2].recursive);
    assert_eq!(all.request.rootfs.share, Some(3));
    assert_eq!(all.shares.len(), 4);
    // The label is told to have no effect, and stands in nobody's way.
    assert!(
        all.warnings
            .iter()
            .any(|warning| warning.contains("docker-default"))
    );
}

#[test]
fn podmans_defaults_run() {
    let policy = Policy {
        systemd_cgroup: true,
        ..policy()
    };
    let all = translated_with(&parse(PODMAN), &policy).unwrap();
    assert_eq!(all.network, Network::Join("/run/netns/netns-1a2b".into()));
    assert_eq!(all.request.process.umask, Some(0o022));
    assert_eq!(
        all.host_cgroup,
        Some(HostCgroup::Systemd {
            slice: "machine.slice".into(),
            prefix: "libpod".into(),
            name: "3f7a".into()
        })
    );
    assert_eq!(all.annotations["io.container.manager"], "libpod");
    let volume = all
        .request
        .mounts
        .iter()
        .find(|mount| mount.destination == "/vol")
        .unwrap();
    assert_eq!(volume.options, ["nosuid", "nodev", "rprivate", "rw"]);
    assert!(
        translated(&parse(PODMAN))
            .unwrap_err()
            .to_string()
            .contains("--systemd-cgroup")
    );
}

#[test]
fn containerds_and_kubernetes_defaults_run() {
    let all = translated(&parse(CONTAINERD)).unwrap();
    assert_eq!(all.request.hostname, "the-host");
    let policy = Policy {
        systemd_cgroup: true,
        ..policy()
    };
    let all = translated_with(&parse(CRI), &policy).unwrap();
    assert_eq!((all.memory_mib, all.vcpus), (128 + 4 + 48, 2));
    assert_eq!(all.network, Network::Join("/var/run/netns/cni-5".into()));
    let own = nix::unistd::gethostname().unwrap();
    assert_eq!(all.request.hostname, own.to_string_lossy());
    assert!(
        all.request
            .resources
            .files
            .iter()
            .any(|file| file.name == "memory.oom.group")
    );
    assert!(all.warnings.iter().any(|warning| warning.contains("ipc")));
}

#[test]
fn privileged_container_gets_what_its_microvm_has() {
    let all = translated(&parse(DOCKER_PRIVILEGED)).unwrap();
    assert!(all.request.all_devices && !all.request.device_filter);
    assert_eq!(all.request.devices.len(), 1);
    assert!(all.request.masked_paths.is_empty());
    assert_eq!(
        all.warnings
            .iter()
            .filter(|warning| warning.contains("left out"))
            .count(),
        2
    );
}

#[test]
fn namespaces_of_the_host_are_refused_unless_private_ones_will_do() {
    for kind in ["pid", "network"] {
        let mut config = parse(DOCKER);
        config["linux"]["namespaces"]
            .as_array_mut()
            .unwrap()
            .retain(|one| one["type"] != kind);
        let error = translated(&config).unwrap_err().to_string();
        assert!(error.starts_with(&format!("linux.namespaces: {kind}")), "{error}");
        assert!(error.contains("io.hull.host_namespaces"), "{error}");
        config["annotations"] = json!({"io.hull.host_namespaces": "private"});
        assert_eq!(translated(&config).unwrap().network, Network::Private);
    }
    for kind in ["ipc", "cgroup", "mount"] {
        let mut config = parse(DOCKER);
        config["linux"]["namespaces"]
            .as_array_mut()
            .unwrap()
            .retain(|one| one["type"] != kind);
        translated(&config).unwrap();
    }
}

#[test]
fn user_namespace_takes_its_mappings_and_time_namespace_its_offsets() {
    let mut config = parse(RUNC);
    let namespaces = config["linux"]["namespaces"].as_array_mut().unwrap();
    namespaces.extend([json!({"type": "user"}), json!({"type": "time"})]);
    let map = json!([{"containerID": 0, "hostID": 1000, "size": 10}]);
    config["linux"]["uidMappings"] = map.clone();
    config["linux"]["gidMappings"] = map;
    config["linux"]["timeOffsets"] =
        json!({"monotonic": {"secs": -5, "nanosecs": 6}, "boottime": {"secs": 7}});
    let request = translated(&config).unwrap().request;
    assert_eq!(request.user_namespace.uid_mappings[0].host_id, 1000);
    assert_eq!(
        (
            request.time_namespace.monotonic.seconds,
            request.time_namespace.monotonic.nanoseconds
        ),
        (-5, 6)
    );
    assert_eq!(request.time_namespace.boottime.seconds, 7);
}

#[test]
fn exec_has_the_filter_of_its_container_and_cpus_of_its_own() {
    let config: Spec =
        serde_json::from_value(with(DOCKER, "/process/execCPUAffinity", json!({"initial": "1"}))).unwrap();
    let process = |value: Value| -> Process { serde_json::from_value(value).unwrap() };
    let plain = json!({"cwd": "/", "user": {"uid": 5, "gid": 6}, "args": ["id"]});
    let translated = translate_process(&process(plain.clone()), &config).unwrap();
    assert_eq!(translated.seccomp_programs.len(), 1);
    assert_eq!(
        (translated.cpus_initial, translated.cpus_final),
        (vec![2], vec![])
    );
    let mut own = plain;
    own["execCPUAffinity"] = json!({"initial": "0", "final": "0-1,9"});
    let translated = translate_process(&process(own), &config).unwrap();
    assert_eq!(
        (translated.cpus_initial, translated.cpus_final),
        (vec![1], vec![3, 2])
    );
}

/// One change to a configuration that must be refused, and with which field.
fn refusals() -> Vec<(&'static str, Value, &'static str)> {
    vec![
        ("/process", json!(null), "process"),
        ("/process/args", json!([]), "process.args"),
        ("/process/args", json!([""]), "process.args"),
        ("/process/commandLine", json!("x"), "process.commandLine"),
        ("/process/cwd", json!("tmp"), "process.cwd"),
        ("/process/user/username", json!("x"), "process.user.username"),
        (
            "/process/rlimits",
            json!([{"type": "RLIMIT_CORE", "soft": 1, "hard": 1}, {"type": "RLIMIT_CORE", "soft": 1, "hard": 1}]),
            "process.rlimits[1]",
        ),
        (
            "/process/rlimits",
            json!([{"type": "RLIMIT_CORE", "soft": 2, "hard": 1}]),
            "process.rlimits[0]",
        ),
        ("/process/oomScoreAdj", json!(1001), "process.oomScoreAdj"),
        (
            "/process/scheduler",
            json!({"policy": "SCHED_FIFO"}),
            "process.scheduler.priority",
        ),
        (
            "/process/scheduler",
            json!({"policy": "SCHED_OTHER", "priority": 4}),
            "process.scheduler.priority",
        ),
        (
            "/process/scheduler",
            json!({"policy": "SCHED_OTHER", "nice": 40}),
            "process.scheduler.nice",
        ),
        (
            "/process/scheduler",
            json!({"policy": "SCHED_OTHER", "runtime": 1}),
            "process.scheduler.runtime",
        ),
        (
            "/process/scheduler",
            json!({"policy": "SCHED_ISO"}),
            "process.scheduler.policy",
        ),
        (
            "/process/ioPriority",
            json!({"class": "IOPRIO_CLASS_BE", "priority": 8}),
            "process.ioPriority.priority",
        ),
        (
            "/process/capabilities/effective",
            json!(["CAP_SYS_ADMIN"]),
            "process.capabilities.effective",
        ),
        ("/root", json!(null), "root"),
        ("/root/path", json!("nowhere"), "root.path"),
        ("/root/path", json!("hostname"), "root.path"),
        ("/hostname", json!("x".repeat(65)), "hostname"),
        ("/domainname", json!("x".repeat(65)), "domainname"),
        ("/mounts/0/destination", json!("/"), "mounts[0].destination"),
        ("/mounts/0/type", json!("ext4"), "mounts[0].type"),
        ("/mounts/0/type", json!(null), "mounts[0].type"),
        (
            "/mounts/0",
            json!({"destination": "/x", "type": "bind", "source": "gone"}),
            "mounts[0].source",
        ),
        (
            "/mounts/0",
            json!({"destination": "/x", "type": "bind"}),
            "mounts[0].source",
        ),
        (
            "/mounts/0",
            json!({"destination": "/x", "type": "bind", "source": "/proc/self/status"}),
            "mounts[0].source",
        ),
        (
            "/mounts/0/uidMappings",
            json!([{"containerID": 0, "hostID": 1, "size": 1}]),
            "mounts[0].uidMappings",
        ),
        ("/mounts/0/options", json!(["idmap"]), "mounts[0].options"),
        (
            "/hooks",
            json!({"poststop": [{"path": "x"}]}),
            "hooks.poststop[0].path",
        ),
        ("/annotations", json!({"": "x"}), "annotations"),
        (
            "/linux/namespaces",
            json!([{"type": "pid"}, {"type": "pid"}]),
            "linux.namespaces[1].type",
        ),
        (
            "/linux/namespaces",
            json!([{"type": "pid", "path": "/proc/1/ns/pid"}]),
            "linux.namespaces: pid",
        ),
        (
            "/linux/namespaces",
            json!([{"type": "pid"}, {"type": "network", "path": "x"}]),
            "linux.namespaces[1].path",
        ),
        (
            "/linux/namespaces",
            json!([{"type": "pid"}, {"type": "network"}]),
            "hostname",
        ),
        (
            "/linux/uidMappings",
            json!([{"containerID": 0, "hostID": 1, "size": 1}]),
            "linux.uidMappings",
        ),
        (
            "/linux/timeOffsets",
            json!({"monotonic": {"secs": 1}}),
            "linux.timeOffsets",
        ),
        (
            "/linux/devices",
            json!([{"path": "/dev/x", "type": "b", "major": 8, "minor": 0}]),
            "linux.devices[0]",
        ),
        (
            "/linux/devices",
            json!([{"path": "x", "type": "c", "major": 1, "minor": 3}]),
            "linux.devices[0].path",
        ),
        (
            "/linux/sysctl",
            json!({"vm.swappiness": "1"}),
            "linux.sysctl.vm.swappiness",
        ),
        (
            "/linux/rootfsPropagation",
            json!("sideways"),
            "linux.rootfsPropagation",
        ),
        (
            "/linux/seccomp",
            json!({"defaultAction": "SCMP_ACT_NOTIFY"}),
            "linux.seccomp",
        ),
        ("/linux/intelRdt", json!({"closID": "x"}), "linux.intelRdt"),
        ("/linux/netDevices", json!({"eth0": {}}), "linux.netDevices"),
        (
            "/linux/memoryPolicy",
            json!({"mode": "MPOL_BIND", "nodes": "0"}),
            "linux.memoryPolicy",
        ),
        (
            "/linux/personality",
            json!({"domain": "LINUX", "flags": ["x"]}),
            "linux.personality.flags",
        ),
        ("/linux/maskedPaths", json!(["relative"]), "masked_paths"),
        (
            "/linux/sysctl",
            json!({"net/../../kernel/panic": "1"}),
            "linux.sysctl.net/../../kernel/panic",
        ),
        (
            "/linux/seccomp",
            json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": [], "action": "SCMP_ACT_LOG"}]}),
            "linux.seccomp.syscalls[0].names",
        ),
        (
            "/linux/seccomp",
            json!({"defaultAction": "SCMP_ACT_ALLOW",
                   "syscalls": [{"names": ["mkdir"], "action": "SCMP_ACT_KILL", "errnoRet": 1}]}),
            "linux.seccomp.syscalls[0].errnoRet",
        ),
        (
            "/linux/seccomp",
            json!({"defaultAction": "SCMP_ACT_ALLOW", "defaultErrnoRet": 1}),
            "linux.seccomp.defaultErrnoRet",
        ),
        ("/vm", json!({"kernel": {"path": "/x"}}), "vm"),
    ]
}

#[test]
fn other_platforms_are_told_to_have_no_effect() {
    let config = with(RUNC, "/solaris", json!({}));
    let all = translated(&config).unwrap();
    assert!(all.warnings[0].starts_with("solaris: "), "{:?}", all.warnings);
}

#[test]
fn what_cannot_be_had_is_refused_with_its_field() {
    translated(&parse(RUNC)).unwrap();
    for (pointer, value, field) in refusals() {
        let config = with(RUNC, pointer, value.clone());
        let Err(error) = translated(&config) else {
            panic!("{pointer} = {value} is taken");
        };
        let text = error.to_string();
        assert!(text.starts_with(field), "{pointer} = {value}: {text}");
    }
}

#[test]
fn shared_memory_of_an_engine_becomes_the_guests_own() {
    // /dev/shm of the machine that runs the test is such a filesystem.
    if !std::path::Path::new("/dev/shm").is_dir() {
        return;
    }
    let config = with(
        RUNC,
        "/mounts/0",
        json!({"destination": "/dev/shm", "type": "bind", "source": "/dev/shm", "options": ["rbind", "nosuid"]}),
    );
    let all = translated(&config).unwrap();
    let mount = &all.request.mounts[0];
    assert_eq!((mount.type_.as_str(), mount.share), ("tmpfs", None));
    assert!(mount.options.iter().any(|option| option.starts_with("size=")));
    assert_eq!(all.shares.len(), 1);
}

#[test]
fn kernel_interfaces_and_devices_are_the_microvms_own() {
    let config = with(
        RUNC,
        "/mounts/0",
        json!({"destination": "/sys", "type": "none", "source": "/sys", "options": ["rbind", "ro"]}),
    );
    let all = translated(&config).unwrap();
    assert_eq!(all.request.mounts[0].type_, "sysfs");
    let config = with(
        RUNC,
        "/mounts/0",
        json!({"destination": "/dev/nothing", "type": "bind", "source": "/dev/null"}),
    );
    let all = translated(&config).unwrap();
    assert_eq!(
        (all.request.devices[0].path.as_str(), all.request.devices[0].minor),
        ("/dev/nothing", 3)
    );
}

/// Where a value of a configuration can be replaced.
fn pointers(value: &Value, at: &str, found: &mut Vec<String>) {
    found.push(at.to_owned());
    let children: Vec<(String, &Value)> = match value {
        Value::Object(map) => map.iter().map(|(key, value)| (key.clone(), value)).collect(),
        Value::Array(list) => list
            .iter()
            .enumerate()
            .map(|(index, value)| (index.to_string(), value))
            .collect(),
        _ => Vec::new(),
    };
    for (key, child) in children {
        pointers(child, &format!("{at}/{key}"), found);
    }
}

fn junk() -> impl Strategy<Value = Value> {
    prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        ".{0,12}".prop_map(Value::from),
        "[a-z./:=-]{0,40}".prop_map(Value::from),
        Just(json!([])),
        Just(json!({})),
        proptest::collection::vec(any::<u32>().prop_map(Value::from), 0..4).prop_map(Value::from),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    /// Whatever a configuration says, it is decided without a panic, and what is decided keeps the protocol's bounds.
    #[test]
    fn no_configuration_breaks_the_bounds(
        which in 0..6_usize,
        changes in proptest::collection::vec((any::<proptest::sample::Index>(), junk()), 1..4),
    ) {
        let text = [RUNC, DOCKER, DOCKER_PRIVILEGED, PODMAN, CONTAINERD, CRI][which];
        let mut config = parse(text);
        for (index, value) in changes {
            let mut places = Vec::new();
            pointers(&config, "", &mut places);
            if let Some(place) = config.pointer_mut(&places[index.index(places.len())]) {
                *place = value;
            }
        }
        let dir = bundle(&config);
        if let Ok(loaded) = load(dir.path())
            && let Ok(all) = translate(&loaded.spec, dir.path(), &policy())
        {
            let mut request = all.request;
            request.container_id = "c".into();
            prop_assert!(request.check().is_ok());
            prop_assert!((1..=16).contains(&all.vcpus) && all.memory_mib >= 64);
        }
    }
}

#[test]
fn every_field_is_in_the_document() {
    let document = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../docs/oci-conformance.md");
    let text = fs::read_to_string(document).unwrap();
    let missing: Vec<String> = fields::of_configuration()
        .into_iter()
        .filter(|field| !text.contains(&format!("`{field}`")))
        .collect();
    assert!(missing.is_empty(), "docs/oci-conformance.md lacks {missing:#?}");
}
