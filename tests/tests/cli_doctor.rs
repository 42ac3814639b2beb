//! What a host lacks is named, with the way out: by `hull doctor`, and by `hull run` in one line.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::PathBuf;
use std::process::{Command, Stdio};

use hull_tests::hull::{Hull, Outcome, finish};
use serde_json::Value;

/// A user without any rights.
const NOBODY: u32 = 65534;

fn checks(outcome: &Outcome) -> Vec<Value> {
    let lines = outcome.text();
    lines
        .lines()
        .map(|line| serde_json::from_str(line).expect("a JSON object a line"))
        .collect()
}

#[test]
fn healthy_host_passes_every_essential_check() {
    let Some(hull) = Hull::with_images(&[]) else {
        return;
    };
    let outcome = hull.run(&["doctor", "--format", "json"]);
    assert_eq!(outcome.code(), 0, "{outcome:?}");
    let checks = checks(&outcome);
    assert!(
        checks.iter().all(|check| check["State"] != "missing"),
        "{checks:?}"
    );
    for name in [
        "/dev/kvm",
        "hull-vmm",
        "guest kernel",
        "agent image",
        "image store",
    ] {
        assert!(checks.iter().any(|check| check["Check"] == name), "{name}");
    }
}

#[test]
fn missing_part_is_named_and_is_a_failure() {
    let Some(hull) = Hull::with_images(&["busybox"]) else {
        return;
    };
    for (variable, check) in [
        ("HULL_VMM", "hull-vmm"),
        ("HULL_KERNEL", "guest kernel"),
        ("HULL_AGENT_IMAGE", "agent image"),
    ] {
        let without = |arguments: &[&str]| {
            let mut command = hull.command(arguments);
            command.env(variable, "/nonexistent/part");
            finish(command.spawn().expect("hull starts"))
        };
        let outcome = without(&["doctor", "--format", "json"]);
        assert_eq!(outcome.code(), 1, "{outcome:?}");
        let found = checks(&outcome);
        let found = found
            .iter()
            .find(|found| found["Check"] == check)
            .expect("the check");
        assert_eq!(found["State"], "missing", "{found}");
        let run = without(&["run", "--rm", "busybox", "true"]);
        assert_eq!((run.code(), run.stderr.lines().count()), (125, 1), "{run:?}");
        assert!(run.stderr.contains(variable), "{run:?}");
    }
    assert_eq!(hull.settle(), Vec::<String>::new());
}

/// A world of its own for a user without rights, with copies of the programs that this user can read.
struct Unprivileged {
    home: tempfile::TempDir,
}

impl Unprivileged {
    fn new() -> Self {
        let home = tempfile::tempdir().expect("a temporary folder");
        for (variable, file) in [
            ("HULL_BIN", "hull"),
            ("HULL_VMM", "hull-vmm"),
            ("HULL_KERNEL", "vmlinux"),
            ("HULL_AGENT_IMAGE", "agent-root.erofs"),
        ] {
            let from = PathBuf::from(std::env::var_os(variable).expect("checked by with_images"));
            fs::copy(from, home.path().join(file)).expect("a copy");
        }
        fs::set_permissions(home.path(), fs::Permissions::from_mode(0o755)).expect("our own folder");
        chown(home.path(), Some(NOBODY), Some(NOBODY)).expect("as root");
        Self { home }
    }

    fn run(&self, arguments: &[&str]) -> Outcome {
        let path = |name: &str| self.home.path().join(name);
        let id = NOBODY.to_string();
        let command = Command::new("setpriv")
            .args(["--reuid", &id, "--regid", &id, "--clear-groups"])
            .arg(path("hull"))
            .args(arguments)
            .env("HULL_VMM", path("hull-vmm"))
            .env("HULL_KERNEL", path("vmlinux"))
            .env("HULL_AGENT_IMAGE", path("agent-root.erofs"))
            .env("HULL_ROOT", path("root"))
            .env("HULL_RUNTIME_DIR", path("run"))
            .env("HOME", self.home.path())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn();
        finish(command.expect("setpriv starts"))
    }
}

#[test]
fn user_without_access_to_kvm_is_told_of_the_group_and_of_udev() {
    let Some(hull) = Hull::with_images(&[]) else {
        return;
    };
    let device = fs::metadata("/dev/kvm").expect("checked by with_images");
    if device.mode() & 0o006 == 0o006 || !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: everybody may use /dev/kvm here, or this isn't root, who could be nobody");
        return;
    }
    let nobody = Unprivileged::new();
    let doctor = nobody.run(&["doctor", "--format", "json"]);
    assert_eq!(doctor.code(), 1, "{doctor:?}");
    let kvm = &checks(&doctor)[0];
    assert_eq!(
        (&kvm["Check"], &kvm["State"]),
        (&"/dev/kvm".into(), &"missing".into())
    );

    // The test's images are root's own: an archive of one is this user's.
    let archive = nobody.home.path().join("busybox.tar");
    let layout = hull.layout("busybox");
    let folder = layout.trim_start_matches("oci:").trim_end_matches(":latest");
    let packed = Command::new("tar")
        .args(["-C", folder, "-cf"])
        .arg(&archive)
        .arg(".")
        .status();
    assert!(packed.expect("tar starts").success());
    let source = format!("oci-archive:{}", archive.display());
    let imported = nobody.run(&["import", "-q", &source, "busybox"]);
    assert_eq!(imported.code(), 0, "{imported:?}");

    for arguments in [
        &["run", "--rm", "busybox", "true"][..],
        &["run", "-d", "--rm", "busybox", "true"][..],
    ] {
        let run = nobody.run(arguments);
        assert_eq!((run.code(), run.stderr.lines().count()), (125, 1), "{run:?}");
        for word in ["/dev/kvm", "permission denied", "group", "udev"] {
            assert!(run.stderr.contains(word), "{word}: {run:?}");
        }
        assert_eq!(nobody.run(&["ps", "-aq"]).text(), "", "something was left");
    }
}
