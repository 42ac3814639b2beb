//! Pulling from a real registry server on loopback: login, resuming, broken connections, wrong data.
//!
//! Needs `docker-registry` and `skopeo`; says so and passes where they are missing.

#![cfg(feature = "registry")]

mod support;

use std::cell::RefCell;
use std::fs;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Shutdown, TcpListener, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use rootfs_builder::registry::{Credentials, PullOptions, Reference};
use rootfs_builder::{LayerOutcome, NoProgress, PreparedImage, Progress, ProgressEvent, Store};
use support::archive::{Layout, Member, archive, noise};
use support::{has, run, told};

/// `hull:secret`, as `htpasswd -nbB` writes it.
const HTPASSWD: &str = "hull:$2y$04$GKsREbNOrBvcBeplRdFW8.nlkx.BfW/17cESXRx5DM6jh26v2gHIq\n";

struct Registry {
    child: Child,
    port: u16,
}

impl Registry {
    /// Start a server on this machine's loopback that keeps everything in `dir`; nothing if there is no server to start.
    fn start(dir: &Path, login: bool) -> Option<Self> {
        let htpasswd = dir.join("htpasswd");
        fs::write(&htpasswd, HTPASSWD).expect("file");
        let auth = format!(
            "auth: {{htpasswd: {{realm: test, path: {}}}}}\n",
            htpasswd.display()
        );
        Self::serve(
            dir,
            Ipv4Addr::LOCALHOST.into(),
            None,
            if login { &auth } else { "" },
        )
    }

    /// With a certificate, it speaks TLS.
    fn serve(dir: &Path, address: IpAddr, certificate: Option<&Path>, more: &str) -> Option<Self> {
        if !has("docker-registry") || !has("skopeo") {
            return None;
        }
        let port = TcpListener::bind((address, 0))
            .expect("a port")
            .local_addr()
            .expect("address")
            .port();
        let tls = certificate.map_or_else(String::new, |path| {
            let key = path.with_extension("key");
            format!(
                ", tls: {{certificate: {}, key: {}}}",
                path.display(),
                key.display()
            )
        });
        let config = format!(
            "version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {}}}}}\nhttp: {{addr: \"{address}:{port}\"{tls}}}\n{more}",
            dir.join("data").display()
        );
        let path = dir.join(format!("registry-{port}.yml"));
        fs::write(&path, config).expect("file");
        let child = Command::new("docker-registry")
            .arg("serve")
            .arg(&path)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("registry");
        let registry = Self { child, port };
        for _ in 0..200 {
            if TcpStream::connect((address, port)).is_ok() {
                return Some(registry);
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        panic!("the registry doesn't answer");
    }

    fn push(&self, layout: &Path, name: &str, login: bool) {
        let mut command = Command::new("skopeo");
        command.args(["--insecure-policy", "copy", "--dest-tls-verify=false", "-q"]);
        if login {
            command.args(["--dest-creds", "hull:secret"]);
        }
        command
            .arg(format!("oci:{}:latest", layout.display()))
            .arg(format!("docker://127.0.0.1:{}/{name}", self.port));
        run(&mut command);
    }

    fn reference(&self, name: &str) -> Reference {
        Reference::parse(&format!("127.0.0.1:{}/{name}", self.port)).expect("reference")
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn pulled(store: &Store, reference: &Reference, options: &PullOptions) -> PreparedImage {
    store
        .pull(reference, None, options, &NoProgress)
        .unwrap_or_else(|error| panic!("{}", told(&error)))
}

fn layout(dir: &Path, layers: u64) -> Layout {
    let mut layout = Layout::new(dir);
    for layer in 0..layers {
        layout.layer(&archive(&[Member::file(
            format!("file-{layer}"),
            noise(layer + 1, 700_000),
        )]));
    }
    layout.write();
    layout
}

#[derive(Default)]
struct Watched {
    converted: RefCell<Vec<bool>>,
    fetched: RefCell<Vec<(usize, u64)>>,
}

impl Progress for Watched {
    fn event(&self, event: ProgressEvent<'_>) {
        if let ProgressEvent::LayerFinished { outcome, .. } = event {
            self.converted
                .borrow_mut()
                .push(matches!(outcome, LayerOutcome::Converted { .. }));
        }
    }

    fn fetched(&self, index: usize, bytes_done: u64, bytes: u64) {
        assert!(bytes_done <= bytes);
        self.fetched.borrow_mut().push((index, bytes_done));
    }
}

#[test]
fn an_image_is_pulled_and_only_once() {
    let scratch = tempfile::tempdir().expect("scratch directory");
    let Some(registry) = Registry::start(scratch.path(), false) else {
        return;
    };
    let layout = layout(&scratch.path().join("layout"), 6);
    registry.push(&layout.dir, "team/app:1", false);
    let store = Store::open(&scratch.path().join("store")).expect("store");
    let reference = registry.reference("team/app:1");
    let watched = Watched::default();
    let image = store
        .pull(&reference, None, &PullOptions::new(), &watched)
        .unwrap_or_else(|error| panic!("{}", told(&error)));
    assert_eq!(*watched.converted.borrow(), [true; 6]);
    assert!(watched.fetched.borrow().iter().any(|(_, bytes)| *bytes > 0));
    assert_eq!(image.names, [reference.to_string()]);
    assert_eq!(store.resolve(&reference.to_string()).expect("there").id, image.id);

    let again = Watched::default();
    let by_digest = registry.reference(&format!("team/app@{}", image.manifest_digest));
    store
        .pull(&by_digest, Some("mine"), &PullOptions::new(), &again)
        .unwrap_or_else(|error| panic!("{}", told(&error)));
    assert_eq!(*again.converted.borrow(), [false; 6]);
    let left = fs::read_dir(scratch.path().join("store/images/downloads/blobs/sha256"))
        .expect("downloads")
        .count();
    assert_eq!(left, 0);

    let text = told(
        &store
            .pull(
                &registry.reference("team/app:2"),
                None,
                &PullOptions::new(),
                &NoProgress,
            )
            .expect_err("no such tag"),
    );
    assert!(text.contains("does not have 2 in team/app"), "{text}");
}

#[test]
fn a_login_is_asked_for_and_used() {
    let scratch = tempfile::tempdir().expect("scratch directory");
    let Some(registry) = Registry::start(scratch.path(), true) else {
        return;
    };
    let layout = layout(&scratch.path().join("layout"), 1);
    registry.push(&layout.dir, "app", true);
    let store = Store::open(&scratch.path().join("store")).expect("store");
    let reference = registry.reference("app");
    let text = told(
        &store
            .pull(&reference, None, &PullOptions::new(), &NoProgress)
            .expect_err("no credentials"),
    );
    assert!(text.contains("log in first"), "{text}");
    let wrong = Credentials::new("hull", "wrong");
    let text = told(
        &store
            .pull(
                &reference,
                None,
                &PullOptions::new().credentials(Some(wrong)),
                &NoProgress,
            )
            .expect_err("wrong password"),
    );
    assert!(
        text.contains("refuses the credentials") && !text.contains("wrong"),
        "{text}"
    );
    let right = Credentials::new("hull", "secret");
    store
        .pull(
            &reference,
            None,
            &PullOptions::new().credentials(Some(right)),
            &NoProgress,
        )
        .unwrap_or_else(|error| panic!("{}", told(&error)));
}

#[test]
fn a_pull_goes_on_where_an_earlier_one_stopped() {
    let scratch = tempfile::tempdir().expect("scratch directory");
    let Some(registry) = Registry::start(scratch.path(), false) else {
        return;
    };
    let layout = layout(&scratch.path().join("layout"), 1);
    registry.push(&layout.dir, "app", false);
    let manifest: serde_json::Value = layout.manifest();
    let digest = manifest["layers"][0]["digest"]
        .as_str()
        .expect("digest")
        .to_owned();
    let blob = fs::read(layout.dir.join("blobs/sha256").join(&digest[7..])).expect("blob");
    let store = Store::open(&scratch.path().join("store")).expect("store");
    let downloads = scratch.path().join("store/images/downloads");
    fs::create_dir_all(&downloads).expect("downloads");
    let partial = downloads.join(format!("sha256-{}.partial", &digest[7..]));

    // Half of it is there: only the rest is fetched.
    let half = blob.len() / 2;
    fs::write(&partial, &blob[..half]).expect("file");
    let (port, counts) = relay(registry.port, 0, Duration::ZERO);
    let through = Reference::parse(&format!("127.0.0.1:{port}/app")).expect("reference");
    pulled(&store, &through, &PullOptions::new());
    assert!(!partial.exists());
    let passed = counts.bytes.load(Ordering::Relaxed);
    assert!(passed < blob.len() - half / 2, "{passed} bytes of {}", blob.len());

    // A wrong beginning is noticed in the end, and the layer is fetched once more, all of it.
    store.remove(&through.to_string()).expect("remove");
    fs::write(&partial, vec![0x1f; half]).expect("file");
    pulled(&store, &registry.reference("app"), &PullOptions::new());
    assert!(!partial.exists());
}

/// What went through a relay.
#[derive(Default)]
struct Counts {
    cut: AtomicUsize,
    bytes: AtomicUsize,
}

/// Passes connections on, pausing now and then, but cuts each of the first `cuts` answers short.
fn relay(to: u16, cuts: usize, pause: Duration) -> (u16, Arc<Counts>) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = listener.local_addr().expect("address").port();
    let counts = Arc::new(Counts::default());
    let shared = Arc::clone(&counts);
    std::thread::spawn(move || {
        for client in listener.incoming().flatten() {
            let counts = Arc::clone(&shared);
            std::thread::spawn(move || -> std::io::Result<()> {
                let mut client = client;
                let mut server = TcpStream::connect(("127.0.0.1", to))?;
                let (mut from_client, mut to_server) = (client.try_clone()?, server.try_clone()?);
                std::thread::spawn(move || std::io::copy(&mut from_client, &mut to_server));
                let mut buffer = vec![0; 16 << 10];
                let mut passed = 0;
                loop {
                    let read = server.read(&mut buffer)?;
                    if read == 0 {
                        return client.shutdown(Shutdown::Both);
                    }
                    client.write_all(&buffer[..read])?;
                    std::thread::sleep(pause);
                    passed += read;
                    counts.bytes.fetch_add(read, Ordering::Relaxed);
                    // Documents are smaller than this: only layers are cut.
                    if passed > 200_000 && counts.cut.fetch_add(1, Ordering::Relaxed) < cuts {
                        server.shutdown(Shutdown::Both)?;
                        return client.shutdown(Shutdown::Both);
                    }
                }
            });
        }
    });
    (port, counts)
}

#[test]
fn broken_connections_are_taken_up_again() {
    let scratch = tempfile::tempdir().expect("scratch directory");
    let Some(registry) = Registry::start(scratch.path(), false) else {
        return;
    };
    let layout = layout(&scratch.path().join("layout"), 3);
    registry.push(&layout.dir, "app", false);
    let (port, counts) = relay(registry.port, 5, Duration::ZERO);
    let store = Store::open(&scratch.path().join("store")).expect("store");
    let reference = Reference::parse(&format!("127.0.0.1:{port}/app")).expect("reference");
    let image = store
        .pull(&reference, None, &PullOptions::new(), &NoProgress)
        .unwrap_or_else(|error| panic!("{}", told(&error)));
    assert_eq!(image.layers.len(), 3);
    assert!(counts.cut.load(Ordering::Relaxed) >= 5, "no connection was cut");
}

#[test]
fn a_registry_that_is_not_there_is_named() {
    let scratch = tempfile::tempdir().expect("scratch directory");
    let store = Store::open(&scratch.path().join("store")).expect("store");
    let port = TcpListener::bind("127.0.0.1:0")
        .expect("a port")
        .local_addr()
        .expect("address")
        .port();
    let reference = Reference::parse(&format!("127.0.0.1:{port}/app")).expect("reference");
    let text = told(
        &store
            .pull(&reference, None, &PullOptions::new(), &NoProgress)
            .expect_err("nobody there"),
    );
    assert!(text.contains(&format!("cannot reach 127.0.0.1:{port}")), "{text}");
}

/// Answers every request with the same bytes.
fn answering(answer: String) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = listener.local_addr().expect("address").port();
    std::thread::spawn(move || {
        for mut client in listener.incoming().flatten() {
            let mut request = [0; 4096];
            let _ = client.read(&mut request);
            let _ = client.write_all(answer.as_bytes());
            let _ = client.shutdown(Shutdown::Both);
        }
    });
    port
}

#[test]
fn hostile_registries_get_nowhere() {
    let scratch = tempfile::tempdir().expect("scratch directory");
    let store = Store::open(&scratch.path().join("store")).expect("store");
    let options = PullOptions::new().credentials(Some(Credentials::new("me", "hunter2")));
    let case = |answer: String| {
        let reference = Reference::parse(&format!("127.0.0.1:{}/app", answering(answer))).expect("reference");
        told(
            &store
                .pull(&reference, None, &options, &NoProgress)
                .expect_err("a refusal"),
        )
    };
    let with = |head: &str, body: &str| {
        format!(
            "HTTP/1.1 {head}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
            body.len()
        )
    };
    // Send the password somewhere else, unprotected.
    let challenge = "401 Unauthorized\r\nWWW-Authenticate: Bearer realm=\"http://elsewhere.test/token\"";
    assert!(case(with(challenge, "")).contains("unprotected"));
    assert!(
        case(with("401 Unauthorized\r\nWWW-Authenticate: Negotiate", ""))
            .contains("unknown kind of authentication")
    );
    assert!(case(with("200 OK", "{}")).contains("malformed"));
    assert!(case(with("200 OK", "not json")).contains("malformed"));
    assert!(case(with("418 I'm a teapot", "")).contains("answered 418"));
    let index = r#"{"schemaVersion":2,"manifests":[]}"#;
    assert!(case(with("200 OK", index)).contains("this machine runs"));
    let config = "sha256:../../../../etc/passwd";
    let manifest = format!(
        r#"{{"schemaVersion":2,"config":{{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"{config}","size":1}},"layers":[]}}"#
    );
    let text = case(with("200 OK", &manifest));
    assert!(text.contains("malformed") || text.contains("digest"), "{text}");
    // The same answer for manifest and configuration: the digest can't be right.
    let digest = format!("sha256:{}", "0".repeat(64));
    let text = case(with("200 OK", &manifest.replace(config, &digest)));
    assert!(
        text.contains("bytes where its descriptor says") || text.contains("does not have the digest"),
        "{text}"
    );
}

/// Not a test of its own: the next one starts it with the certificate to trust.
#[test]
#[ignore = "run by a_registry_is_trusted_by_its_certificate_only"]
fn pulls_over_tls() {
    let Some(reference) = std::env::var("HULL_TEST_TLS_REFERENCE").ok() else {
        return;
    };
    let scratch = tempfile::tempdir().expect("scratch directory");
    let store = Store::open(scratch.path()).expect("store");
    let reference = Reference::parse(&reference).expect("reference");
    store
        .pull(&reference, None, &PullOptions::new(), &NoProgress)
        .unwrap_or_else(|error| panic!("{}", told(&error)));
}

/// `NAME.pem` and `NAME.key`, signed by themselves or by another certificate made here.
fn certificate(dir: &Path, name: &str, extensions: &str, signer: Option<&str>) -> PathBuf {
    let config = dir.join(format!("{name}.cnf"));
    let text = format!(
        "[req]\ndistinguished_name=name\nx509_extensions=extensions\n[name]\n[extensions]\n{extensions}\n"
    );
    fs::write(&config, text).expect("file");
    let path = dir.join(format!("{name}.pem"));
    let mut command = Command::new("openssl");
    command.args([
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
        "-days",
        "2",
    ]);
    command
        .args(["-subj", &format!("/CN={name}"), "-config"])
        .arg(&config);
    if let Some(signer) = signer {
        command
            .arg("-CA")
            .arg(dir.join(format!("{signer}.pem")))
            .arg("-CAkey")
            .arg(dir.join(format!("{signer}.key")));
    }
    run(command
        .arg("-keyout")
        .arg(path.with_extension("key"))
        .arg("-out")
        .arg(&path));
    path
}

/// An address of this machine that isn't loopback: TLS is a must there. Nothing is sent to find it.
fn own_address() -> Option<IpAddr> {
    let own = UdpSocket::bind("0.0.0.0:0").and_then(|socket| {
        socket.connect("192.0.2.1:9")?;
        socket.local_addr()
    });
    let address = own.ok().map(|address| address.ip());
    let address = address.filter(|address| !address.is_loopback());
    if address.is_none() {
        println!("skipped: this machine has no address but loopback");
    }
    address
}

/// A certificate for an address, and the authority that vouches for it.
fn certified(dir: &Path, address: IpAddr) -> (PathBuf, PathBuf) {
    let authority = certificate(dir, "authority", "basicConstraints=critical,CA:true", None);
    let leaf = format!("basicConstraints=CA:false\nsubjectAltName=IP:{address}");
    (certificate(dir, "server", &leaf, Some("authority")), authority)
}

#[test]
fn a_registry_is_trusted_by_its_certificate_only() {
    let scratch = tempfile::tempdir().expect("scratch directory");
    let Some(address) = own_address() else { return };
    if !has("openssl") {
        return;
    }
    let Some(registry) = Registry::start(scratch.path(), false) else {
        return;
    };
    registry.push(&layout(&scratch.path().join("layout"), 2).dir, "app", false);
    let (server, authority) = certified(scratch.path(), address);
    let Some(secure) = Registry::serve(scratch.path(), address, Some(&server), "") else {
        return;
    };
    let name = format!("{address}:{}/app", secure.port);
    let pull = |trusted: &Path| {
        let mut command = Command::new(std::env::current_exe().expect("this program"));
        command.args(["--exact", "pulls_over_tls", "--ignored", "--nocapture"]);
        command
            .env("HULL_TEST_TLS_REFERENCE", &name)
            .env("SSL_CERT_FILE", trusted);
        let output = command.output().expect("child");
        (
            output.status.success(),
            String::from_utf8_lossy(&output.stderr).into_owned(),
        )
    };
    let (trusted, text) = pull(&authority);
    assert!(trusted, "{text}");
    let other = certificate(scratch.path(), "other", "basicConstraints=critical,CA:true", None);
    let (trusted, text) = pull(&other);
    assert!(
        !trusted && text.contains("cannot reach") && text.contains("ertificate"),
        "{text}"
    );
    // Unless the caller doesn't care.
    let store = Store::open(&scratch.path().join("store")).expect("store");
    let reference = Reference::parse(&name).expect("reference");
    pulled(&store, &reference, &PullOptions::new().tls_verify(false));
}

#[test]
fn a_registry_on_this_machine_may_speak_tls_too() {
    let scratch = tempfile::tempdir().expect("scratch directory");
    if !has("openssl") {
        return;
    }
    let Some(registry) = Registry::start(scratch.path(), false) else {
        return;
    };
    registry.push(&layout(&scratch.path().join("layout"), 1).dir, "app", false);
    let loopback = Ipv4Addr::LOCALHOST.into();
    let (server, _) = certified(scratch.path(), loopback);
    let Some(secure) = Registry::serve(scratch.path(), loopback, Some(&server), "") else {
        return;
    };
    let store = Store::open(&scratch.path().join("store")).expect("store");
    let error = store
        .pull(&secure.reference("app"), None, &PullOptions::new(), &NoProgress)
        .expect_err("nobody vouches for it");
    assert!(told(&error).contains("ertificate"), "{}", told(&error));
    pulled(
        &store,
        &secure.reference("app"),
        &PullOptions::new().tls_verify(false),
    );
}

#[test]
fn plain_http_elsewhere_has_to_be_asked_for() {
    let scratch = tempfile::tempdir().expect("scratch directory");
    let Some(address) = own_address() else { return };
    let Some(registry) = Registry::start(scratch.path(), false) else {
        return;
    };
    registry.push(&layout(&scratch.path().join("layout"), 1).dir, "app", false);
    let Some(plain) = Registry::serve(scratch.path(), address, None, "") else {
        return;
    };
    let store = Store::open(&scratch.path().join("store")).expect("store");
    let reference = Reference::parse(&format!("{address}:{}/app", plain.port)).expect("reference");
    let error = store
        .pull(&reference, None, &PullOptions::new(), &NoProgress)
        .expect_err("no TLS");
    assert!(told(&error).contains("cannot reach"), "{}", told(&error));
    pulled(&store, &reference, &PullOptions::new().tls_verify(false));
}

/// Not a test of its own: what the next one starts and kills.
#[test]
#[ignore = "run by a_pull_killed_at_any_moment_is_gone_on_with"]
fn pulls_once() {
    let (Some(root), Ok(reference)) = (
        std::env::var_os("HULL_TEST_KILLED_PULL"),
        std::env::var("HULL_TEST_REFERENCE"),
    ) else {
        return;
    };
    let store = Store::open(Path::new(&root)).expect("store");
    let reference = Reference::parse(&reference).expect("reference");
    pulled(&store, &reference, &PullOptions::new());
}

#[test]
fn a_pull_killed_at_any_moment_is_gone_on_with() {
    let scratch = tempfile::tempdir().expect("scratch directory");
    let Some(registry) = Registry::start(scratch.path(), false) else {
        return;
    };
    let mut image = Layout::new(&scratch.path().join("layout"));
    let layers = 6;
    let mut bytes = 0;
    for layer in 0..layers {
        let content = noise(layer + 1, 500_000);
        bytes += content.len();
        image.layer(&archive(&[Member::file(format!("{layer}"), content)]));
    }
    image.write();
    registry.push(&image.dir, "app", false);
    // So slow that hardly anything is under way between the two ends.
    let (port, counts) = relay(registry.port, 0, Duration::from_millis(3));
    let name = format!("127.0.0.1:{port}/app");
    let root = scratch.path().join("store");
    let mut kills = 0;
    let finished = (0..40).any(|round| {
        let before = counts.bytes.load(Ordering::Relaxed);
        let mut child = Command::new(std::env::current_exe().expect("this program"))
            .args(["--exact", "pulls_once", "--ignored"])
            .env("HULL_TEST_KILLED_PULL", &root)
            .env("HULL_TEST_REFERENCE", &name)
            .stdout(Stdio::null())
            .spawn()
            .expect("child");
        // As soon as it has got some more.
        let enough = before + bytes / 8 + round * 4000;
        let status = loop {
            if let Some(status) = child.try_wait().expect("child") {
                break Some(status);
            }
            if counts.bytes.load(Ordering::Relaxed) > enough {
                break None;
            }
            std::thread::sleep(Duration::from_millis(1));
        };
        if status.is_none() {
            child.kill().expect("kill");
            child.wait().expect("wait");
            kills += 1;
        }
        let store = Store::open(&root).expect("store");
        assert_eq!(
            fs::read_dir(root.join("images/tmp")).expect("tmp").count(),
            0,
            "round {round}"
        );
        let there = store.resolve(&name).is_ok();
        assert!(there || status.is_none_or(|status| !status.success()));
        there
    });
    assert!(finished && kills >= 2, "{kills} kills");
    let store = Store::open(&root).expect("store");
    let reference = Reference::parse(&name).expect("reference");
    assert_eq!(pulled(&store, &reference, &PullOptions::new()).layers.len(), 6);
    // What was under way at each kill is lost, and no more.
    let passed = counts.bytes.load(Ordering::Relaxed);
    assert!(passed < bytes * 2, "{passed} bytes for an image of {bytes}");
}
