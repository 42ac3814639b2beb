//! config-linux.md, "Namespaces", "User namespace mappings", "Offset for Time Namespace".

use std::fs;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::json;

use super::{equal, mounts_of, text, worked};
use crate::case::{Case, must, skip};
use crate::host::own_namespace;
use crate::runtime::PATIENCE;
use crate::world::World;

const NAMESPACES: &str = "config-linux.md#namespaces";
/// The name in a configuration and the one in `/proc/PID/ns`.
const KINDS: [(&str, &str); 6] = [
    ("pid", "pid"),
    ("network", "net"),
    ("mount", "mnt"),
    ("ipc", "ipc"),
    ("uts", "uts"),
    ("cgroup", "cgroup"),
];

pub fn cases() -> Vec<Case> {
    let mut cases = vec![
        must("namespaces.pid_shows_only_the_container", NAMESPACES,
            "pid: processes inside the container will only be able to see other processes inside the same container",
            |world| {
                let mut bundle = world.bundle()?;
                let lines = world.probe(&mut bundle, &["list", "/proc", "report"])?;
                let names = lines[0]["names"].as_array().context("no list")?;
                let pids: Vec<&str> = names.iter().filter_map(|name| name.as_str()).filter(|name| name.parse::<u32>().is_ok()).collect();
                equal("processes", pids, ["1"])
            }),
        must("namespaces.network_has_its_own_stack", NAMESPACES, "network: the container will have its own network stack", |world| {
            let report = world.report(&mut world.bundle()?)?;
            equal("interfaces", interfaces(text(&report, "interfaces")?), ["lo"])
        }),
        must("namespaces.mount_is_isolated", NAMESPACES, "mount: the container will have an isolated mount table", |world| {
            let mut bundle = world.bundle()?;
            bundle.mount("/data", "tmpfs", "tmpfs", &[]).probe(&["report", "pause"]);
            let container = world.create(&bundle)?;
            container.start()?;
            container.wait_printed("pause")?;
            let own = fs::read_to_string("/proc/self/mountinfo")?;
            ensure!(!own.contains(&bundle.rootfs("data").display().to_string()), "the container's mounts show on the host");
            let inside = mounts_of(&container.lines()?[0])?;
            ensure!(!inside.iter().any(|mount| mount.point.starts_with("/work") || mount.point.starts_with("/boot")),
                "the host's mounts show inside");
            Ok(())
        }),
        must("namespaces.ipc_is_isolated", NAMESPACES,
            "ipc: processes inside the container will only be able to communicate to other processes inside the same container via system level IPC",
            ipc),
        must("namespaces.cgroup_is_isolated", NAMESPACES, "cgroup: the container will have an isolated view of the cgroup hierarchy", |world| {
            let mut bundle = world.bundle()?;
            bundle.push("/linux/namespaces", json!({"type": "cgroup"}));
            let report = world.report(&mut bundle)?;
            for line in text(&report, "cgroup")?.lines() {
                ensure!(line.ends_with(":/"), "the process sees itself in {line}");
            }
            Ok(())
        }),
        must("namespaces.duplicates_are_an_error", NAMESPACES,
            "If a namespaces field contains duplicated namespaces with same type, the runtime MUST generate an error",
            |world| {
                let mut bundle = world.bundle()?;
                bundle.push("/linux/namespaces", json!({"type": "ipc"}));
                world.refused(&bundle).map(drop)
            }),
        must("namespaces.unknown_type_is_an_error", "config.md#valid-values",
            "Runtimes MUST generate an error when invalid or unsupported values are encountered",
            |world| {
                let mut bundle = world.bundle()?;
                bundle.push("/linux/namespaces", json!({"type": "galaxy"}));
                world.refused(&bundle).map(drop)
            }),
        must("namespaces.path_of_another_type_is_an_error", NAMESPACES,
            "The runtime MUST generate an error if path is not associated with a namespace of type type",
            |world| {
                let mut bundle = world.bundle()?;
                bundle.without_namespace("network");
                bundle.push("/linux/namespaces", json!({"type": "network", "path": "/proc/self/ns/uts"}));
                world.refused(&bundle).map(drop)
            }),
        must("namespaces.path_that_is_not_there_is_an_error", NAMESPACES,
            "The runtime MUST place the container process in the namespace associated with that path",
            |world| {
                let mut bundle = world.bundle()?;
                bundle.without_namespace("network");
                bundle.push("/linux/namespaces", json!({"type": "network", "path": "/run/netns/no-such"}));
                world.refused(&bundle).map(drop)
            }),
        must("namespaces.relative_path_is_an_error", NAMESPACES,
            "path: this value MUST be an absolute path in the runtime mount namespace",
            |world| {
                let mut bundle = world.bundle()?;
                bundle.without_namespace("network");
                bundle.push("/linux/namespaces", json!({"type": "network", "path": "ns/net"}));
                fs::create_dir(bundle.path().join("ns"))?;
                fs::File::create(bundle.path().join("ns/net"))?;
                world.refused(&bundle).map(drop)
            }),
        must("namespaces.network_of_a_path_is_joined", NAMESPACES,
            "The runtime MUST place the container process in the namespace associated with that path",
            join_network),
        must("namespaces.uts_of_a_path_is_joined", NAMESPACES,
            "The runtime MUST place the container process in the namespace associated with that path",
            |world| {
                let holder = Holder::new(&["--uts"], "hostname joined-name")?;
                let mut bundle = world.bundle()?;
                bundle.remove("/hostname").without_namespace("uts");
                bundle.push("/linux/namespaces", json!({"type": "uts", "path": holder.path("uts")}));
                equal("hostname", world.report(&mut bundle)?["hostname"].clone(), "joined-name")
            }),
        must("namespaces.uts_not_listed_is_the_runtimes", NAMESPACES,
            "If a namespace type is not specified in the namespaces array, the container MUST inherit the runtime namespace of that type",
            |world| {
                let mut bundle = world.bundle()?;
                bundle.remove("/hostname").without_namespace("uts");
                let own = nix::unistd::gethostname()?.to_string_lossy().into_owned();
                equal("hostname", world.report(&mut bundle)?["hostname"].clone(), own)
            }),
        must("namespaces.network_not_listed_is_the_runtimes", NAMESPACES,
            "If a namespace type is not specified in the namespaces array, the container MUST inherit the runtime namespace of that type",
            |world| {
                let mut bundle = world.bundle()?;
                bundle.without_namespace("network");
                let own = fs::read_to_string("/proc/net/dev")?;
                let report = world.report(&mut bundle)?;
                equal("interfaces", interfaces(text(&report, "interfaces")?), interfaces(&own))
            }).on_host(),
        must("user_namespace.mappings", "config-linux.md#user-namespace-mappings",
            "uidMappings and gidMappings describe the user namespace uid and gid mappings from the host to the container",
            mappings),
        must("user_namespace.files_of_the_process_belong_to_the_hosts_id", "config-linux.md#user-namespace-mappings",
            "hostID is the starting uid/gid on the host to be mapped to containerID",
            |world| {
                let mut bundle = world.bundle()?;
                mapped(world, &mut bundle)?;
                let lines = world.probe(&mut bundle, &["write", "/new", "x", "stat", "/new"])?;
                worked(&lines[0])?;
                equal("the owner inside", lines[1]["uid"].clone(), 0)?;
                let found = fs::metadata(bundle.rootfs("new"))?;
                equal("the owner on the host", std::os::unix::fs::MetadataExt::uid(&found), 100_000)
            }),
        must("time_namespace.offsets", "config-linux.md#offset-for-time-namespace",
            "timeOffsets sets the offset for Time Namespace; the name of the clock is the entry key",
            |world| {
                let mut bundle = world.bundle()?;
                bundle.push("/linux/namespaces", json!({"type": "time"}));
                bundle.set("/linux/timeOffsets", json!({"boottime": {"secs": 1_000_000}, "monotonic": {"secs": 2_000_000}}));
                let lines = world.probe(&mut bundle, &["clocks"])?;
                let seconds = |name: &str| lines[0][name].as_i64().unwrap_or_default();
                ensure!(seconds("boottime") >= 1_000_000, "boottime is {}", seconds("boottime"));
                ensure!(seconds("monotonic") >= 2_000_000, "monotonic is {}", seconds("monotonic"));
                Ok(())
            }),
    ];
    for (kind, link) in KINDS {
        cases.push(
            must(
                format!("namespaces.{kind}_is_new"),
                NAMESPACES,
                "If path is not specified, the runtime MUST create a new container namespace of type type",
                move |world| is_new(world, kind, link),
            )
            .on_host(),
        );
        if ["ipc", "network", "uts", "pid"].contains(&kind) {
            cases.push(
                must(
                    format!("namespaces.{kind}_path_is_the_processs_namespace"),
                    NAMESPACES,
                    "The runtime MUST place the container process in the namespace associated with that path",
                    move |world| joined(world, kind, link),
                )
                .on_host(),
            );
            cases.push(must(
                format!("namespaces.{kind}_not_listed_is_the_processs_parents"),
                NAMESPACES,
                "If a namespace type is not specified in the namespaces array, the container MUST inherit the runtime namespace of that type",
                move |world| inherited(world, kind, link),
            ).on_host());
        }
    }
    cases
}

/// The interfaces in a `/proc/net/dev`, sorted.
fn interfaces(table: &str) -> Vec<String> {
    let mut names: Vec<String> = table
        .lines()
        .skip(2)
        .filter_map(|line| line.split_once(':'))
        .map(|(name, _)| name.trim().to_owned())
        .collect();
    names.sort();
    names
}

/// A process that holds namespaces, until it is dropped.
struct Holder(Child);

impl Holder {
    /// With these options of `unshare`, after a command in the new namespaces.
    fn new(options: &[&str], prepare: &str) -> Result<Self> {
        let mut command = Command::new("unshare");
        command
            .args(options)
            .args(["sh", "-c", &format!("{prepare}; exec sleep 1000")]);
        let holder = Self(
            command
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .spawn()
                .context("cannot start unshare")?,
        );
        // It is ready when it has become `sleep`.
        let begin = Instant::now();
        while !fs::read_to_string(format!("/proc/{}/comm", holder.0.id()))
            .is_ok_and(|name| name.trim() == "sleep")
        {
            ensure!(
                begin.elapsed() < PATIENCE,
                "the holder of namespaces did not get ready"
            );
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(holder)
    }

    fn path(&self, link: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/ns/{link}", self.0.id()))
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

fn is_new(world: &World<'_>, kind: &str, link: &str) -> Result<()> {
    let mut bundle = world.bundle()?;
    if kind == "cgroup" {
        bundle.push("/linux/namespaces", json!({"type": "cgroup"}));
    }
    let container = world.create(&bundle)?;
    let (found, own) = (container.namespace(link)?, own_namespace(link)?);
    ensure!(
        found != own,
        "the process is in the runtime's {link} namespace {own}"
    );
    Ok(())
}

fn joined(world: &World<'_>, kind: &str, link: &str) -> Result<()> {
    let mut bundle = world.bundle()?;
    bundle.without_namespace(kind);
    if kind == "uts" {
        bundle.remove("/hostname");
    }
    // A pid namespace lives as long as its first process, which is the child of the one that asked for it.
    let options: &[&str] = match kind {
        "pid" => &["--pid", "--fork"],
        "ipc" => &["--ipc"],
        "uts" => &["--uts"],
        _ => &["--net"],
    };
    let (holder, path);
    if kind == "pid" {
        holder = Holder::forked(options)?;
        path = PathBuf::from(format!("/proc/{}/ns/pid_for_children", holder.0.id()));
    } else {
        holder = Holder::new(options, "true")?;
        path = holder.path(link);
    }
    bundle.push("/linux/namespaces", json!({"type": kind, "path": path}));
    let container = world.create(&bundle)?;
    let wanted = fs::read_link(&path)?.to_string_lossy().into_owned();
    equal(link, container.namespace(link)?, wanted)
}

impl Holder {
    /// One whose child is the first process of a new pid namespace.
    fn forked(options: &[&str]) -> Result<Self> {
        let mut command = Command::new("unshare");
        command.args(options).args(["--kill-child", "sleep", "1000"]);
        let holder = Self(
            command
                .stdin(Stdio::null())
                .spawn()
                .context("cannot start unshare")?,
        );
        let begin = Instant::now();
        let children = format!("/proc/{0}/task/{0}/children", holder.0.id());
        while fs::read_link(holder.path("pid_for_children")).is_err()
            || fs::read_to_string(&children).is_ok_and(|list| list.trim().is_empty())
        {
            ensure!(
                begin.elapsed() < PATIENCE,
                "the holder of a pid namespace did not get ready"
            );
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(holder)
    }
}

fn inherited(world: &World<'_>, kind: &str, link: &str) -> Result<()> {
    let mut bundle = world.bundle()?;
    bundle.without_namespace(kind);
    if kind == "uts" {
        bundle.remove("/hostname");
    }
    let container = world.create(&bundle)?;
    equal(link, container.namespace(link)?, own_namespace(link)?)
}

fn join_network(world: &World<'_>) -> Result<()> {
    let prepare = "ip link set lo up && ip link add conf0 type veth peer name conf1 && ip addr add 10.203.0.2/24 dev conf0 \
                   && ip link set conf0 up && ip link set conf1 up";
    let holder = Holder::new(&["--net"], prepare)?;
    let mut bundle = world.bundle()?;
    bundle.without_namespace("network");
    bundle.push(
        "/linux/namespaces",
        json!({"type": "network", "path": holder.path("net")}),
    );
    bundle.shell("ip -o -4 addr show dev conf0");
    let container = world.create(&bundle)?;
    container.start()?;
    container.wait_stopped()?;
    let shown = container.stdout();
    ensure!(
        shown.contains("10.203.0.2/24"),
        "inside, conf0 has {shown:?} ({})",
        container.stderr().trim()
    );
    Ok(())
}

fn ipc(world: &World<'_>) -> Result<()> {
    let queue = |number: &str, arguments: &[&str]| -> Result<serde_json::Value> {
        let output = Command::new(world.programs.probe())
            .args(["syscall", number])
            .args(arguments)
            .arg(".")
            .output()?;
        Ok(serde_json::from_slice(&output.stdout)?)
    };
    // A message queue of the host: msgget(IPC_PRIVATE, 0600), removed below by msgctl(id, IPC_RMID).
    let made = queue("68", &["0", "0x180"])?;
    let id = made["result"].as_i64().context("no message queue")?;
    if id < 0 {
        return skip("this host has no System V message queues");
    }
    let mut bundle = world.bundle()?;
    let lines = world.probe(&mut bundle, &["read", "/proc/sysvipc/msg"]);
    queue("71", &[&id.to_string(), "0"])?;
    let table = lines?[0]["data"]
        .as_str()
        .context("no table of queues")?
        .to_owned();
    equal("queues seen inside", table.lines().count() - 1, 0)
}

/// Maps 0.. of the container to 100000.. of the host, and gives the root filesystem to them.
fn mapped(world: &World<'_>, bundle: &mut crate::bundle::Bundle) -> Result<()> {
    let mapping = json!([{"containerID": 0, "hostID": 100_000, "size": 65_536}]);
    bundle.push("/linux/namespaces", json!({"type": "user"}));
    bundle
        .set("/linux/uidMappings", mapping.clone())
        .set("/linux/gidMappings", mapping);
    // The process has to get to its root through folders that are not its own.
    for dir in [
        world.path(),
        bundle.path(),
        world.path().parent().unwrap_or(world.path()),
    ] {
        fs::set_permissions(dir, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    }
    let mut folders = vec![bundle.rootfs("")];
    while let Some(folder) = folders.pop() {
        std::os::unix::fs::lchown(&folder, Some(100_000), Some(100_000))?;
        for entry in fs::read_dir(&folder)?.flatten() {
            if entry.file_type()?.is_dir() {
                folders.push(entry.path());
            } else if entry.path().parent() != Some(&bundle.rootfs("bin")) {
                // The programs are links that all bundles share.
                std::os::unix::fs::lchown(entry.path(), Some(100_000), Some(100_000))?;
            }
        }
    }
    Ok(())
}

fn mappings(world: &World<'_>) -> Result<()> {
    let mut bundle = world.bundle()?;
    mapped(world, &mut bundle)?;
    let report = world.report(&mut bundle)?;
    for name in ["uid_map", "gid_map"] {
        let fields: Vec<&str> = text(&report, name)?.split_whitespace().collect();
        equal(name, fields, ["0", "100000", "65536"])?;
    }
    equal("uid", report["uid"].clone(), 0)
}
