//! `cargo xtask lint`: formatting, clippy, dependency rules, licences and the repository's own hygiene.
//!
//! The dependency rules are those of ARCHITECTURE.md ("Who may link whom"); they are read off `cargo metadata`, so a new
//! edge in the graph fails here and not in review.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use crate::process::{cargo, check, output, step, workspace_root};

/// A crate, and what must not be reachable from it through normal or build dependencies.
struct Rule {
    package: &'static str,
    never: &'static [&'static str],
    why: &'static str,
}

const ASYNC: &[&str] = &["tokio", "async-std", "smol"];

const RULES: &[Rule] = &[
    Rule {
        package: "vmm",
        never: &[
            "oci-spec",
            "agent",
            "agent-protocol",
            "sandbox",
            "rootfs-builder",
            "containerd-shim",
            "ttrpc",
            "tokio",
            "async-std",
            "smol",
        ],
        why: "the VMM knows nothing of OCI, containerd or the agent, and has a small system call surface",
    },
    Rule {
        package: "vmm-api",
        never: &["kvm-ioctls", "vm-memory", "vmm"],
        why: "the VMM's wire types are linked by both sides",
    },
    Rule {
        package: "sandbox",
        never: &["vmm", "agent", "kvm-ioctls"],
        why: "the sandbox speaks to both only by protocol",
    },
    Rule {
        package: "agent",
        never: &["vmm", "vmm-api", "sandbox", "rootfs-builder", "cli", "kvm-ioctls"],
        why: "the agent is built for the guest",
    },
    Rule {
        package: "agent-protocol",
        never: &["vmm", "sandbox", "agent"],
        why: "messages only",
    },
    Rule {
        package: "cli",
        never: &["vmm", "kvm-ioctls", "agent"],
        why: "front-ends use `sandbox`",
    },
    Rule {
        package: "oci-runtime",
        never: &["vmm", "kvm-ioctls", "agent", "tokio"],
        why: "front-ends use `sandbox`",
    },
    Rule {
        package: "shim",
        never: &["vmm", "kvm-ioctls", "agent", "cli", "tokio"],
        why: "front-ends use `sandbox`, and a resident shim is small",
    },
    Rule {
        package: "benches",
        never: &["vmm", "kvm-ioctls", "agent"],
        why: "benchmarks use `sandbox` or whole commands",
    },
    Rule {
        package: "guest-kernel",
        never: &["vmm", "kvm-ioctls"],
        why: "it emits a hashed manifest, it does not run it",
    },
    Rule {
        package: "rootfs-builder",
        never: &["vmm", "kvm-ioctls"],
        why: "it emits hashed blobs, it does not run them",
    },
];

/// Test code is linked by nobody.
const TEST_ONLY: &[&str] = &["hull-tests", "hull-conformance", "benches", "xtask"];

/// These must stand in the lock file exactly once: two versions of guest memory do not fit together.
const ONE_VERSION: &[&str] = &[
    "event-manager",
    "kvm-bindings",
    "kvm-ioctls",
    "linux-loader",
    "seccompiler",
    "virtio-bindings",
    "virtio-queue",
    "vm-memory",
    "vm-superio",
    "vmm-sys-util",
];

#[derive(Deserialize)]
struct Metadata {
    packages: Vec<Package>,
    workspace_members: Vec<String>,
    resolve: Resolve,
}
#[derive(Deserialize)]
struct Package {
    id: String,
    name: String,
    version: String,
}
#[derive(Deserialize)]
struct Resolve {
    nodes: Vec<Node>,
}
#[derive(Deserialize)]
struct Node {
    id: String,
    deps: Vec<NodeDep>,
}
#[derive(Deserialize)]
struct NodeDep {
    pkg: String,
    dep_kinds: Vec<DepKind>,
}
#[derive(Deserialize)]
struct DepKind {
    kind: Option<String>,
}

pub fn run() -> Result<()> {
    crate::setup::run(crate::setup::Purpose::Everything)?;
    step("lint: formatting");
    check(cargo().args(["fmt", "--all", "--check"]))?;
    step("lint: clippy");
    check(cargo().args([
        "clippy",
        "--workspace",
        "--all-targets",
        "--quiet",
        "--",
        "-D",
        "warnings",
    ]))?;
    // Off by default until a verb uses it; checked all the same.
    check(cargo().args([
        "clippy",
        "--package",
        "rootfs-builder",
        "--features",
        "registry",
        "--all-targets",
        "--quiet",
        "--",
        "-D",
        "warnings",
    ]))?;
    step("lint: dependency rules");
    dependency_rules()?;
    step("lint: repository");
    repository_hygiene(&workspace_root())?;
    step("lint: licences and sources");
    licences()?;
    step("lint: all good");
    Ok(())
}

fn dependency_rules() -> Result<()> {
    let text = output(cargo().args(["metadata", "--format-version", "1", "--locked"]))?;
    let metadata: Metadata =
        serde_json::from_str(&text).context("cannot read the output of cargo metadata")?;
    let mut faults = Vec::new();
    let names: BTreeMap<&str, &str> = metadata
        .packages
        .iter()
        .map(|p| (p.id.as_str(), p.name.as_str()))
        .collect();
    let edges: BTreeMap<&str, Vec<&str>> = metadata
        .resolve
        .nodes
        .iter()
        .map(|node| (node.id.as_str(), linked(node)))
        .collect();

    for id in &metadata.workspace_members {
        let Some(name) = names.get(id.as_str()) else {
            continue;
        };
        let reached: BTreeSet<&str> = reachable(id, &edges)
            .into_iter()
            .filter_map(|id| names.get(id).copied())
            .collect();
        for rule in RULES.iter().filter(|rule| rule.package == *name) {
            for banned in rule.never.iter().filter(|banned| reached.contains(**banned)) {
                faults.push(format!("`{name}` links `{banned}`: {}", rule.why));
            }
        }
        if !TEST_ONLY.contains(name) {
            for banned in TEST_ONLY.iter().filter(|banned| reached.contains(**banned)) {
                faults.push(format!(
                    "product crate `{name}` links `{banned}`, which is for tests and tools"
                ));
            }
        }
    }
    for crate_name in ONE_VERSION {
        let versions: Vec<&str> = metadata
            .packages
            .iter()
            .filter(|p| p.name == *crate_name)
            .map(|p| p.version.as_str())
            .collect();
        if versions.len() > 1 {
            faults.push(format!(
                "`{crate_name}` stands in the lock file {} times: {}",
                versions.len(),
                versions.join(", ")
            ));
        }
    }
    if metadata.packages.iter().any(|p| ASYNC.contains(&p.name.as_str())) {
        eprintln!(
            "    note: an async runtime is in the lock file; no product crate above may reach it unless ARCHITECTURE.md says so"
        );
    }
    report(&faults)
}

/// What is linked into (or run to build) a package: dev-dependencies don't count.
fn linked(node: &Node) -> Vec<&str> {
    node.deps
        .iter()
        .filter(|dep| {
            dep.dep_kinds
                .iter()
                .any(|kind| kind.kind.as_deref() != Some("dev"))
        })
        .map(|dep| dep.pkg.as_str())
        .collect()
}

fn reachable<'a>(from: &'a str, edges: &BTreeMap<&'a str, Vec<&'a str>>) -> BTreeSet<&'a str> {
    let mut seen = BTreeSet::new();
    let mut queue: Vec<&str> = edges.get(from).cloned().unwrap_or_default();
    while let Some(id) = queue.pop() {
        if seen.insert(id) {
            queue.extend(edges.get(id).into_iter().flatten());
        }
    }
    seen
}

/// Rules a compiler doesn't know: file sizes, leftovers, module comments.
fn repository_hygiene(root: &Path) -> Result<()> {
    let files = output(Command::new("git").current_dir(root).args(["ls-files", "-z"]))?;
    let mut faults = Vec::new();
    for file in files.split('\0').filter(|file| file.ends_with(".rs")) {
        let Ok(text) = std::fs::read_to_string(root.join(file)) else {
            continue;
        };
        let product_lines = text
            .lines()
            .take_while(|line| !line.starts_with("#[cfg(test)]"))
            .count();
        if product_lines > 700 && !is_test_file(file) {
            faults.push(format!("{file}: {product_lines} lines of non-test code; split it (house rule: about 500, never over 700)"));
        }
        let leftovers = [
            concat!("todo", "!("),
            concat!("unimplemented", "!("),
            concat!("dbg", "!("),
        ];
        for (number, line) in text.lines().enumerate() {
            if leftovers.iter().any(|left| line.contains(left)) {
                faults.push(format!("{file}:{}: unfinished: {}", number + 1, line.trim()));
            }
        }
        let opens_with_comment = text
            .lines()
            .find(|line| !line.is_empty() && !line.starts_with("#!["))
            .is_some_and(|line| line.starts_with("//!"));
        if !opens_with_comment && !is_test_file(file) {
            faults.push(format!(
                "{file}: a module opens with a `//!` comment that says its purpose"
            ));
        }
    }
    report(&faults)
}

fn is_test_file(file: &str) -> bool {
    file.ends_with("tests.rs") || file.contains("/tests/") || file.starts_with("tests/")
}

/// `cargo deny`, offline: what is linked, under which licence, from which registry.
fn licences() -> Result<()> {
    let present = Command::new("cargo-deny")
        .arg("--version")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    if !present.is_ok_and(|status| status.success()) {
        step("lint: installing cargo-deny (once)");
        check(cargo().args(["install", "--locked", "--quiet", "cargo-deny"]))?;
    }
    check(cargo().args([
        "deny",
        "--log-level",
        "error",
        "check",
        "bans",
        "licenses",
        "sources",
    ]))
}

fn report(faults: &[String]) -> Result<()> {
    for fault in faults {
        eprintln!("    {fault}");
    }
    if !faults.is_empty() {
        bail!("{} fault(s) found by lint", faults.len());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reachable_follows_edges_once_and_survives_cycles() {
        let edges = BTreeMap::from([("a", vec!["b"]), ("b", vec!["c", "a"]), ("c", vec![])]);
        assert_eq!(reachable("a", &edges), BTreeSet::from(["a", "b", "c"]));
        assert!(reachable("c", &edges).is_empty());
    }

    #[test]
    fn dev_dependencies_are_not_linked() {
        let dep = |pkg: &str, kind: Option<&str>| NodeDep {
            pkg: pkg.into(),
            dep_kinds: vec![DepKind {
                kind: kind.map(Into::into),
            }],
        };
        let node = Node {
            id: "x".into(),
            deps: vec![
                dep("normal", None),
                dep("dev", Some("dev")),
                dep("build", Some("build")),
            ],
        };
        assert_eq!(linked(&node), ["normal", "build"]);
    }
}
