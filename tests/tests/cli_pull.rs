//! Images from a registry: pull, login, and `run` of an image that isn't here yet.

use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Command;

use hull_tests::hull::{Hull, Outcome, PATIENCE, eventually, finish, signal};
use hull_tests::registry::Registry;
use hull_tests::relay::Relay;
use nix::sys::signal::Signal;

struct World {
    hull: Hull,
    registry: Registry,
    scratch: tempfile::TempDir,
}

impl World {
    fn new(login: bool) -> Option<Self> {
        let hull = Hull::with_images(&[])?;
        let scratch = tempfile::tempdir().expect("a temporary folder");
        let registry = Registry::start(scratch.path(), login)?;
        Some(Self {
            hull,
            registry,
            scratch,
        })
    }

    /// `hull` with credentials of its own, not those of whoever runs the tests.
    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = self.hull.command(arguments);
        command
            .env("HOME", self.scratch.path())
            .env("XDG_RUNTIME_DIR", self.scratch.path())
            .env_remove("REGISTRY_AUTH_FILE")
            .env_remove("DOCKER_CONFIG");
        command
    }

    fn run(&self, arguments: &[&str]) -> Outcome {
        finish(self.command(arguments).spawn().expect("hull starts"))
    }

    fn auth_file(&self) -> std::path::PathBuf {
        self.scratch.path().join("containers/auth.json")
    }
}

fn one_line(outcome: &Outcome) -> &str {
    let text = outcome.stderr.trim_end();
    assert!(!text.contains('\n') && text.starts_with("hull: "), "{outcome:?}");
    text
}

#[test]
fn image_is_pulled_by_run_and_then_is_there() {
    let Some(world) = World::new(false) else { return };
    let reference = world
        .registry
        .push(&world.hull.layout("busybox"), "team/busybox:1");
    let never = world.run(&["run", "--rm", "--pull=never", &reference, "true"]);
    assert_eq!(never.code(), 125);
    assert!(one_line(&never).contains("unable to find image"), "{never:?}");

    let first = world.run(&["run", "--rm", &reference, "echo", "hi"]);
    assert_eq!((first.code(), first.text().as_str()), (0, "hi"), "{first:?}");
    let second = world.run(&["run", "--rm", &reference, "echo", "again"]);
    assert_eq!((second.code(), second.stderr.as_str()), (0, ""), "{second:?}");

    let images = world.run(&["images", "--format", "{{.Repository}} {{.Tag}} {{.Digest}}"]);
    let expected = format!("{}/team/busybox 1 sha256:", world.registry.host());
    assert!(images.text().starts_with(&expected), "{images:?}");

    // By its digest, which is the same image.
    let inspect = world.run(&["image", "inspect", "-f", "{{index .RepoDigests 0}}", &reference]);
    let by_digest = inspect.text();
    let pulled = world.run(&["pull", "-q", &by_digest]);
    let id = world.run(&["images", "-q", "--no-trunc"]).text();
    assert_eq!(format!("sha256:{}", pulled.text()), id, "{pulled:?}");
    assert_eq!(world.hull.settle(), Vec::<String>::new());
}

#[test]
fn what_is_not_in_the_registry_is_named_and_leaves_nothing() {
    let Some(world) = World::new(false) else { return };
    let missing = format!("{}/nothing:1", world.registry.host());
    for arguments in [
        vec!["pull", &missing],
        vec!["run", "--rm", &missing, "true"],
        vec!["create", &missing, "true"],
    ] {
        let outcome = world.run(&arguments);
        let code = if arguments[0] == "pull" { 1 } else { 125 };
        assert_eq!(outcome.code(), code, "{outcome:?}");
        assert!(outcome.stderr.contains("nothing"), "{outcome:?}");
    }
    assert_eq!(world.run(&["images", "-q"]).text(), "");
    assert_eq!(world.run(&["ps", "-aq"]).text(), "");
}

#[test]
fn bad_references_are_refused_in_one_line_with_the_way_out() {
    let Some(world) = World::new(false) else { return };
    for (arguments, says) in [
        (vec!["pull", "redis"], "HOST/redis"),
        (vec!["pull", "localhost:1/UPPER"], "lower-case"),
        (vec!["pull", "localhost:1/x"], "localhost:1"),
        (
            vec!["pull", "--all-platforms", "localhost:1/x"],
            "--all-platforms",
        ),
        (
            vec!["pull", "--platform", "linux/s390x", "localhost:1/x"],
            "--platform",
        ),
    ] {
        let outcome = world.run(&arguments);
        assert_eq!(outcome.code(), 1, "{outcome:?}");
        assert!(one_line(&outcome).contains(says), "{outcome:?}");
    }
}

#[test]
fn login_is_checked_kept_privately_used_and_forgotten() {
    let Some(world) = World::new(true) else { return };
    let host = world.registry.host();
    let reference = world.registry.push(&world.hull.layout("busybox"), "busybox:1");
    let refused = world.run(&["pull", "-q", &reference]);
    assert_eq!(refused.code(), 1);
    assert!(one_line(&refused).contains("log in"), "{refused:?}");

    let wrong = world.run(&["login", "-u", "hull", "-p", "wrong", &host]);
    assert_eq!(wrong.code(), 1, "{wrong:?}");
    one_line(&wrong);
    assert!(!world.auth_file().exists());

    let mut login = world.command(&["login", "-u", "hull", "--password-stdin", &host]);
    let password = world.scratch.path().join("password");
    std::fs::write(&password, "secret\n").expect("our own folder");
    login.stdin(std::fs::File::open(&password).expect("just written"));
    let login = finish(login.spawn().expect("hull starts"));
    assert_eq!(login.code(), 0, "{login:?}");
    let mode = mode(&world.auth_file());
    assert_eq!(mode, 0o600, "others can read the password");
    assert_eq!(world.run(&["login", "--get-login", &host]).text(), "hull");

    let pulled = world.run(&["pull", "-q", &reference]);
    assert_eq!(pulled.code(), 0, "{pulled:?}");
    assert_eq!(world.run(&["logout", &host]).code(), 0);
    assert_eq!(world.run(&["logout", &host]).code(), 1);
    assert_eq!(world.run(&["login", "--get-login", &host]).code(), 1);
    let again = world.run(&["run", "--rm", "--pull=always", &reference, "true"]);
    assert_eq!(again.code(), 125, "{again:?}");
}

fn mode(path: &Path) -> u32 {
    let metadata = std::fs::metadata(path).expect("the login was kept");
    metadata.permissions().mode() & 0o777
}

#[test]
fn pull_that_is_interrupted_leaves_no_image_and_the_next_goes_on() {
    let Some(world) = World::new(false) else { return };
    world
        .registry
        .push(&world.hull.layout("busybox"), "team/busybox:1");
    let relay = Relay::start(world.registry.port());
    let reference = format!("127.0.0.1:{}/team/busybox:1", relay.port());
    // Before the registry has said anything, and in the middle of the layer.
    for (how, bytes) in [
        (Signal::SIGINT, 0),
        (Signal::SIGINT, 200_000),
        (Signal::SIGTERM, 300_000),
        (Signal::SIGKILL, 100_000),
    ] {
        let before = relay.held_up();
        relay.hold_after(bytes);
        let child = world
            .command(&["pull", "-q", &reference])
            .spawn()
            .expect("hull starts");
        assert!(eventually(PATIENCE, || relay.held_up() > before));
        signal(i32::try_from(child.id()).expect("pids are small"), how);
        let outcome = finish(child);
        // What a shell makes 128 and the signal's number of.
        assert_eq!(outcome.status.signal(), Some(how as i32), "{outcome:?}");
        assert_eq!(outcome.stderr, "", "{outcome:?}");
        assert_eq!(
            world.run(&["images", "-aq"]).text(),
            "",
            "{how} after {bytes} bytes"
        );
        assert_eq!(world.hull.settle(), Vec::<String>::new());
    }
    relay.open();
    let pulled = world.run(&["pull", "-q", &reference]);
    assert_eq!(pulled.code(), 0, "{pulled:?}");
    assert_eq!(world.run(&["run", "--rm", &reference, "true"]).code(), 0);
    assert_eq!(world.hull.settle(), Vec::<String>::new());
}
