//! A container as docker describes it, and its microVM.
//!
//! Fields that docker has and that mean something here have docker's names and values; what only a microVM has is in
//! `MicroVM`. Fields without a meaning here are left out rather than made up.

use std::collections::BTreeMap;

use sandbox::{
    ContainerRecord, Runtime, Status,
    confinement::SeccompSpec,
    log_driver::LogConfig,
    network::{NetworkMode, NetworkSpec},
};
use serde::Serialize;
use serde_json::{Map, Value, json};

use crate::times;

/// What docker prints for a time that has not come.
const NEVER: &str = "0001-01-01T00:00:00Z";

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct Described {
    id: String,
    created: String,
    path: String,
    args: Vec<String>,
    state: State,
    image: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    size_rw: Option<u64>,
    log_path: String,
    name: String,
    driver: &'static str,
    platform: &'static str,
    host_config: Value,
    graph_driver: Value,
    mounts: Vec<Value>,
    config: Value,
    network_settings: Value,
    #[serde(rename = "MicroVM")]
    micro_vm: Value,
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct State {
    status: String,
    running: bool,
    paused: bool,
    restarting: bool,
    #[serde(rename = "OOMKilled")]
    oom_killed: bool,
    dead: bool,
    /// The process on this host that stands for the container: its VMM.
    pid: i32,
    exit_code: u8,
    error: String,
    started_at: String,
    finished_at: String,
}

fn time(ms: Option<u64>) -> String {
    ms.map_or_else(|| NEVER.to_owned(), times::rfc3339)
}

fn vmm_pid(record: &ContainerRecord) -> Option<i32> {
    let run = record.run.as_ref().filter(|_| record.status.is_live())?;
    run.vmm.map(|vmm| vmm.pid)
}

fn state(record: &ContainerRecord) -> State {
    State {
        status: record.status.to_string(),
        // A paused container runs, for docker.
        running: record.status.is_live(),
        paused: record.status == Status::Paused,
        restarting: false,
        oom_killed: record.oom_killed,
        dead: false,
        pid: vmm_pid(record).unwrap_or(0),
        exit_code: record.exit_code.filter(|_| !record.status.is_live()).unwrap_or(0),
        error: record.error.clone().unwrap_or_default(),
        started_at: time(record.started_ms),
        finished_at: time(record.finished_ms.filter(|_| !record.status.is_live())),
    }
}

fn log_config(config: &LogConfig) -> Value {
    match config {
        LogConfig::JsonFile { max_bytes, max_files } => json!({
            "Type": "json-file",
            "Config": {"max-size": max_bytes.to_string(), "max-file": max_files.to_string()},
        }),
        LogConfig::Journald { tag } => {
            let tag: Map<String, Value> = tag.iter().map(|tag| ("tag".to_owned(), json!(tag))).collect();
            json!({"Type": "journald", "Config": tag})
        }
        LogConfig::None => json!({"Type": "none", "Config": {}}),
    }
}

fn host_config(record: &ContainerRecord) -> Value {
    let spec = &record.spec;
    let confinement = &spec.confinement;
    let mut security: Vec<String> = Vec::new();
    if confinement.no_new_privileges {
        security.push("no-new-privileges".to_owned());
    }
    match &confinement.seccomp {
        SeccompSpec::Default => {}
        SeccompSpec::Unconfined => security.push("seccomp=unconfined".to_owned()),
        SeccompSpec::Profile(profile) => security.push(format!("seccomp={profile}")),
    }
    let tmpfs: BTreeMap<&String, String> = spec
        .tmpfs
        .iter()
        .map(|(path, options)| (path, options.join(",")))
        .collect();
    let ulimits: Vec<Value> = confinement
        .ulimits
        .iter()
        .map(|limit| json!({"Name": limit.name, "Soft": limit.soft, "Hard": limit.hard}))
        .collect();
    let devices: Vec<Value> = spec
        .devices
        .iter()
        .map(|device| json!({"PathOnHost": device.path, "PathInContainer": device.container_path}))
        .collect();
    json!({
        "AutoRemove": spec.auto_remove,
        "CapAdd": confinement.cap_add,
        "CapDrop": confinement.cap_drop,
        "Devices": devices,
        "GroupAdd": confinement.group_add,
        "LogConfig": log_config(&spec.log),
        "Memory": spec.memory_mib.saturating_mul(1 << 20),
        "NanoCpus": u64::from(spec.cpu_limit_milli.unwrap_or(u32::from(spec.vcpus) * 1000)) * 1_000_000,
        "NetworkMode": network_mode(&spec.network),
        "OomScoreAdj": confinement.oom_score_adj.unwrap_or(0),
        "PidsLimit": spec.pids_limit,
        "Privileged": confinement.privileged,
        "ReadonlyRootfs": spec.read_only,
        "RestartPolicy": {"Name": "no", "MaximumRetryCount": 0},
        "SecurityOpt": security,
        "ShmSize": spec.shm_bytes.unwrap_or(64 << 20),
        "StorageOpt": spec.storage_bytes.map(|bytes| json!({"size": bytes.to_string()})),
        "Sysctls": spec.sysctls,
        "Tmpfs": tmpfs,
        "Ulimits": ulimits,
    })
}

fn network_mode(network: &NetworkSpec) -> String {
    match &network.mode {
        NetworkMode::None => "none".to_owned(),
        NetworkMode::Network { name } => name.clone(),
        NetworkMode::Namespace { path, .. } => format!("ns:{}", path.display()),
    }
}

/// Where the container is while it runs, in docker's words.
fn network_settings(record: &ContainerRecord) -> Value {
    let Some(endpoint) = &record.endpoint else {
        return json!({"Networks": {}, "Ports": {}});
    };
    let mut ports: BTreeMap<String, Vec<Value>> = BTreeMap::new();
    for port in &endpoint.ports {
        let address = port.host_address.unwrap_or(std::net::Ipv4Addr::UNSPECIFIED);
        ports
            .entry(format!("{}/{}", port.container_port, port.transport))
            .or_default()
            .push(json!({"HostIp": address, "HostPort": port.host_port.to_string()}));
    }
    let network = json!({
        "IPAddress": endpoint.address,
        "IPPrefixLen": endpoint.prefix_length,
        "Gateway": endpoint.gateway,
        "MacAddress": endpoint.mac,
        "Aliases": record.spec.network.aliases,
    });
    json!({
        "IPAddress": endpoint.address,
        "IPPrefixLen": endpoint.prefix_length,
        "Gateway": endpoint.gateway,
        "MacAddress": endpoint.mac,
        "Ports": ports,
        "Networks": {&endpoint.network: network},
    })
}

fn config(record: &ContainerRecord) -> Value {
    let spec = &record.spec;
    let process = &spec.process;
    let hostname = spec
        .hostname
        .clone()
        .unwrap_or_else(|| record.id.short().to_owned());
    json!({
        "Hostname": hostname,
        "User": process.user,
        "Tty": process.terminal,
        "OpenStdin": process.stdin,
        "Env": process.env,
        "Cmd": process.args,
        "Image": spec.image,
        "WorkingDir": process.cwd,
        "Labels": spec.labels,
        "StopSignal": spec.stop_signal.map(|signal| signal.to_string()),
        "StopTimeout": spec.stop_timeout_s,
    })
}

fn graph_driver(record: &ContainerRecord) -> Value {
    let layers: Vec<String> = record
        .spec
        .rootfs
        .layers
        .iter()
        .map(|path| path.display().to_string())
        .collect();
    let writable = if record.spec.storage_bytes.is_some() {
        "kept on disk until the container is removed"
    } else {
        "in the microVM's memory, gone when the container ends"
    };
    json!({"Name": "erofs", "Data": {"Layers": layers, "WritableLayer": writable}})
}

fn mounts(record: &ContainerRecord) -> Vec<Value> {
    let spec = &record.spec;
    let shares = spec.share_mounts.iter().filter_map(|mount| {
        let share = spec.shares.get(usize::try_from(mount.share).ok()?)?;
        let mut described = json!({
            "Type": "bind",
            "Source": share.source,
            "Destination": mount.destination,
            "Mode": mount.options.join(","),
            "RW": !share.read_only,
            "Propagation": "rprivate",
        });
        if let (Some(name), Some(fields)) = (&mount.volume, described.as_object_mut()) {
            fields.insert("Type".to_owned(), json!("volume"));
            fields.insert("Name".to_owned(), json!(name));
            fields.insert("Driver".to_owned(), json!("local"));
            fields.insert("Propagation".to_owned(), json!(""));
        }
        Some(described)
    });
    let tmpfs = spec.tmpfs.iter().map(|(path, options)| {
        json!({"Type": "tmpfs", "Destination": path, "Mode": options.join(","), "RW": true})
    });
    shares.chain(tmpfs).collect()
}

/// Space that a sparse file takes on disk.
fn allocated(path: &std::path::Path) -> Option<u64> {
    use std::os::unix::fs::MetadataExt as _;
    std::fs::metadata(path)
        .ok()
        .map(|metadata| metadata.blocks().saturating_mul(512))
}

/// One container as JSON.
///
/// # Errors
/// It can't be described.
pub fn describe(runtime: &Runtime, record: &ContainerRecord, size: bool) -> anyhow::Result<Value> {
    let mut command = record.spec.process.args.iter().cloned();
    let has_files = matches!(record.spec.log, LogConfig::JsonFile { .. });
    let home = runtime.home(&record.id);
    let run = record.run.as_ref().filter(|_| record.status.is_live());
    let described = Described {
        id: record.id.as_str().to_owned(),
        created: times::rfc3339(record.created_ms),
        path: command.next().unwrap_or_default(),
        args: command.collect(),
        state: state(record),
        image: format!("sha256:{}", record.spec.image_id),
        size_rw: size.then(|| allocated(&home.join("writable.ext4")).unwrap_or(0)),
        log_path: if has_files {
            runtime.log_path(&record.id).display().to_string()
        } else {
            String::new()
        },
        name: format!("/{}", record.name),
        driver: "erofs",
        platform: "linux",
        host_config: host_config(record),
        graph_driver: graph_driver(record),
        mounts: mounts(record),
        config: config(record),
        network_settings: network_settings(record),
        micro_vm: json!({
            "VCPUs": record.spec.vcpus,
            "MemoryMiB": record.spec.memory_mib,
            "VMMPid": vmm_pid(record),
            "MonitorPid": run.map(|run| run.monitor.pid),
            "JailUID": record.jail_uid(),
            "Home": home.display().to_string(),
        }),
    };
    Ok(serde_json::to_value(described)?)
}
