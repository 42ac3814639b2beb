//! Pulling from registries with manners of their own: tokens that expire, redirects, too much to do, silence, lies.

#![cfg(feature = "registry")]

mod support;

use std::cell::Cell;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use rootfs_builder::registry::{Credentials, PullOptions, Reference, RegistryError, log_in};
use rootfs_builder::{Error, LayerOutcome, NoProgress, PreparedImage, Progress, ProgressEvent, Store};
use support::archive::{Layout, Member, archive, noise, sha256};
use support::server::{Request, Response, Server, image};
use support::told;

struct Scratch {
    dir: tempfile::TempDir,
    store: Store,
}

impl Scratch {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("scratch directory");
        let store = Store::open(&dir.path().join("store")).expect("store");
        Self { dir, store }
    }

    /// An image of some layers, compressed in every way there is.
    fn layout(&self, layers: u64) -> Layout {
        let mut layout = Layout::new(&self.dir.path().join("layout"));
        for layer in 0..layers {
            let tar = archive(&[Member::file(format!("file-{layer}"), noise(layer + 1, 150_000))]);
            match layer % 3 {
                0 => {
                    layout.layer(&tar);
                }
                1 => {
                    let blob = zstd::encode_all(&tar[..], 1).expect("memory");
                    let described = layout.blob(&blob, "application/vnd.oci.image.layer.v1.tar+zstd");
                    layout.described(described, sha256(&tar));
                }
                _ => {
                    let described = layout.blob(&tar, "application/vnd.oci.image.layer.v1.tar");
                    layout.described(described, sha256(&tar));
                }
            }
        }
        layout.write();
        layout
    }

    fn pull(&self, server: &Server, options: &PullOptions) -> Result<PreparedImage, String> {
        self.store
            .pull(&reference(server), None, options, &NoProgress)
            .map_err(|error| told(&error))
    }
}

fn reference(server: &Server) -> Reference {
    Reference::parse(&format!("127.0.0.1:{}/team/app:1", server.port)).expect("reference")
}

fn me() -> PullOptions {
    PullOptions::new().credentials(Some(Credentials::new("me", "hunter2")))
}

#[test]
fn every_kind_of_compression_arrives() {
    let scratch = Scratch::new();
    let server = Server::start(image(&scratch.layout(3).dir));
    let pulled = scratch.pull(&server, &PullOptions::new()).expect("pull");
    assert_eq!(pulled.layers.len(), 3);
    let digest = &pulled.manifest_digest;
    assert_eq!(
        pulled.repo_digests,
        [format!("127.0.0.1:{}/team/app@{digest}", server.port)]
    );
    // Known by its digest, too, and under a second registry's name once it came from there.
    let by_digest = scratch.store.resolve(&pulled.repo_digests[0]).expect("there");
    assert_eq!(by_digest.id, pulled.id);
    let other = Server::start(image(&scratch.dir.path().join("layout")));
    let again = scratch.pull(&other, &PullOptions::new()).expect("pull");
    assert_eq!(again.repo_digests.len(), 2);
    assert_eq!(
        other.count(|request| request.is_blob()),
        1,
        "only the configuration"
    );
}

#[test]
fn redirects_are_followed_without_credentials() {
    let scratch = Scratch::new();
    let layout = scratch.layout(2);
    let storage = Server::start(image(&layout.dir));
    let to = storage.port;
    let registry = image(&layout.dir);
    let server = Server::start(move |request: &Request| {
        if !request.header("authorization").starts_with("Basic ") {
            return Response::new(401, "").with("WWW-Authenticate", "Basic realm=x");
        }
        if request.is_blob() {
            let target = format!("http://127.0.0.1:{to}{}?signature=1", request.path);
            return Response::new(307, "").with("Location", target);
        }
        registry(request)
    });
    let pulled = scratch.pull(&server, &me()).expect("pull");
    assert_eq!(pulled.layers.len(), 2);
    let requests = storage.requests();
    assert_eq!(requests.len(), 3, "{requests:?}");
    assert!(
        requests
            .iter()
            .all(|request| request.header("authorization").is_empty())
    );
    assert!(
        server
            .requests()
            .iter()
            .any(|request| !request.header("authorization").is_empty())
    );
}

#[test]
fn a_redirect_keeps_the_range_of_a_resumed_layer() {
    let scratch = Scratch::new();
    let layout = scratch.layout(1);
    let digest = layout.manifest()["layers"][0]["digest"]
        .as_str()
        .expect("digest")
        .to_owned();
    let blob = fs::read(layout.dir.join("blobs/sha256").join(&digest[7..])).expect("blob");
    let storage = Server::start(image(&layout.dir));
    let to = storage.port;
    let registry = image(&layout.dir);
    let server = Server::start(move |request: &Request| {
        if request.is_blob() {
            let target = format!("http://127.0.0.1:{to}{}", request.path);
            return Response::new(302, "").with("Location", target);
        }
        registry(request)
    });
    let downloads = scratch.dir.path().join("store/images/downloads");
    fs::create_dir_all(&downloads).expect("downloads");
    let partial = downloads.join(format!("sha256-{}.partial", &digest[7..]));
    fs::write(&partial, &blob[..1000]).expect("file");
    scratch.pull(&server, &PullOptions::new()).expect("pull");
    assert_eq!(
        storage.count(|request| request.header("range") == "bytes=1000-"),
        1
    );
}

#[test]
fn redirects_and_challenges_that_lead_astray_are_refused() {
    let scratch = Scratch::new();
    let to = |target: &str| {
        let target = target.to_owned();
        Server::start(move |_: &Request| Response::new(302, "").with("Location", target.clone()))
    };
    let text = scratch
        .pull(&to("http://elsewhere.test/"), &me())
        .expect_err("plain");
    assert!(text.contains("unprotected"), "{text}");
    let text = scratch.pull(&to("/v2/again"), &me()).expect_err("a circle");
    assert!(text.contains("redirects without end"), "{text}");
    let text = scratch
        .pull(&to("file:///etc/passwd"), &me())
        .expect_err("a file");
    assert!(text.contains("redirect to nowhere"), "{text}");
    // Whoever a redirect leads to can't ask for the password.
    let thief =
        Server::start(|_: &Request| Response::new(401, "").with("WWW-Authenticate", "Basic realm=gimme"));
    let text = scratch
        .pull(&to(&format!("http://127.0.0.1:{}/", thief.port)), &me())
        .expect_err("a thief");
    assert!(text.contains("not let in"), "{text}");
    assert_eq!(
        thief.count(|request| !request.header("authorization").is_empty()),
        0
    );
}

/// A registry whose tokens are good for a few requests each.
fn forgetful(layout: &Path, requests_per_token: usize) -> Server {
    let registry = image(layout);
    let (issued, left) = (AtomicUsize::new(0), AtomicUsize::new(0));
    Server::start(move |request: &Request| {
        let host = request.header("host").to_owned();
        if request.path.starts_with("/token") {
            let right = request.header("authorization") == "Basic bWU6aHVudGVyMg=="
                || request.body.contains("refresh_token=refresh-me");
            if !right {
                return Response::new(401, "");
            }
            let number = issued.fetch_add(1, Ordering::SeqCst) + 1;
            left.store(requests_per_token, Ordering::SeqCst);
            return Response::new(200, format!(r#"{{"token":"number-{number}"}}"#));
        }
        let current = format!("Bearer number-{}", issued.load(Ordering::SeqCst));
        let spend = |left: usize| left.checked_sub(1);
        if request.header("authorization") != current
            || left
                .fetch_update(Ordering::SeqCst, Ordering::SeqCst, spend)
                .is_err()
        {
            let challenge = format!(
                r#"Bearer realm="http://{host}/token?kind=a",service="the registry",scope="repository:team/app:pull""#
            );
            return Response::new(401, "").with("WWW-Authenticate", challenge);
        }
        registry(request)
    })
}

#[test]
fn tokens_are_fetched_and_renewed_when_they_expire() {
    let scratch = Scratch::new();
    let layout = scratch.layout(4);
    let server = forgetful(&layout.dir, 2);
    scratch.pull(&server, &me().parallel(1)).expect("pull");
    let tokens: Vec<Request> = server
        .requests()
        .into_iter()
        .filter(|request| request.path.starts_with("/token"))
        .collect();
    assert!(tokens.len() >= 3, "{}", tokens.len());
    assert_eq!(
        tokens[0].path,
        "/token?kind=a&service=the%20registry&scope=repository:team/app:pull"
    );

    let text = scratch
        .pull(&server, &PullOptions::new())
        .expect_err("nobody in particular");
    assert!(text.contains("log in first"), "{text}");
    let mut by_token = Credentials::new("", "");
    by_token.identity_token = Some("refresh-me".to_owned());
    let options = PullOptions::new().credentials(Some(by_token));
    scratch.pull(&server, &options).expect("pull");
    let posted = server
        .requests()
        .into_iter()
        .rfind(|request| request.method == "POST");
    let body = posted.expect("a form").body;
    assert!(
        body.contains("grant_type=refresh_token") && body.contains("service=the"),
        "{body}"
    );
}

#[test]
fn a_login_is_checked() {
    let scratch = Scratch::new();
    let layout = scratch.layout(1);
    let bearer = forgetful(&layout.dir, 1);
    let basic = Server::start(|request: &Request| {
        if request.header("authorization") == "Basic bWU6aHVudGVyMg==" {
            Response::new(200, "{}")
        } else {
            Response::new(401, "").with("WWW-Authenticate", "Basic realm=x")
        }
    });
    for server in [&bearer, &basic] {
        let registry = format!("127.0.0.1:{}", server.port);
        log_in(&registry, &Credentials::new("me", "hunter2"), true).expect("login");
        let error = log_in(&registry, &Credentials::new("me", "wrong"), true).expect_err("wrong");
        assert!(matches!(error, RegistryError::Denied { .. }), "{error}");
        assert!(!error.to_string().contains("wrong"));
    }
    let no_registry = Server::start(|_: &Request| Response::new(404, ""));
    let registry = format!("127.0.0.1:{}", no_registry.port);
    assert!(log_in(&registry, &Credentials::new("me", "x"), true).is_err());
    assert!(log_in("bad host/", &Credentials::new("me", "x"), true).is_err());
}

#[test]
fn a_busy_registry_is_asked_again() {
    let scratch = Scratch::new();
    let layout = scratch.layout(2);
    let registry = image(&layout.dir);
    let asked = AtomicUsize::new(0);
    let server = Server::start(move |request: &Request| {
        // Every second request, beginning with the first.
        if asked.fetch_add(1, Ordering::SeqCst) % 2 == 1 && request.path != "/v2/" {
            return Response::new(429, "").with("Retry-After", "0");
        }
        registry(request)
    });
    scratch.pull(&server, &PullOptions::new()).expect("pull");
    let refuses = Server::start(|request: &Request| {
        if request.path == "/v2/" {
            return Response::new(200, "{}");
        }
        Response::new(403, "")
    });
    let text = scratch.pull(&refuses, &PullOptions::new()).expect_err("refused");
    assert!(text.contains("refuses"), "{text}");
    assert_eq!(refuses.count(|request| request.path != "/v2/"), 1, "asked once");
}

/// An index of manifests, each for a platform.
fn index(layout: &Layout, entries: &[(&str, &str, &str, &serde_json::Value)]) -> Vec<u8> {
    let manifests: Vec<serde_json::Value> = entries
        .iter()
        .map(|(os, architecture, variant, manifest)| {
            let bytes = manifest.to_string();
            let mut descriptor = layout.blob(bytes.as_bytes(), "application/vnd.oci.image.manifest.v1+json");
            descriptor["platform"] = serde_json::json!({"os": os, "architecture": architecture});
            if !variant.is_empty() {
                descriptor["platform"]["variant"] = (*variant).into();
            }
            descriptor
        })
        .collect();
    serde_json::json!({"schemaVersion": 2, "manifests": manifests})
        .to_string()
        .into_bytes()
}

/// A registry where every tag is this document.
fn tagged(layout: &Path, document: Vec<u8>) -> Server {
    let registry = image(layout);
    Server::start(move |request: &Request| {
        if request.path.ends_with("/manifests/1") {
            return Response::new(200, document.clone());
        }
        registry(request)
    })
}

#[test]
fn the_manifest_for_this_machine_is_taken() {
    let scratch = Scratch::new();
    let layout = scratch.layout(1);
    let here = if cfg!(target_arch = "aarch64") {
        "arm64"
    } else {
        "amd64"
    };
    let wanted = layout.manifest();
    let other = serde_json::json!({"schemaVersion": 2, "config": {}, "layers": []});
    let document = index(
        &layout,
        &[
            ("unknown", "unknown", "", &other),
            ("linux", "riscv64", "", &other),
            ("linux", here, "v4", &other),
            ("linux", here, "", &wanted),
            ("windows", here, "", &other),
        ],
    );
    let pulled = scratch
        .pull(&tagged(&layout.dir, document), &PullOptions::new())
        .expect("pull");
    assert_eq!(pulled.manifest_digest, sha256(wanted.to_string().as_bytes()));
    let document = index(&layout, &[("linux", "riscv64", "", &other)]);
    let text = scratch
        .pull(&tagged(&layout.dir, document), &PullOptions::new())
        .expect_err("another machine");
    assert!(text.contains("for linux/riscv64; this machine runs"), "{text}");
    let old = br#"{"schemaVersion":1,"name":"a","fsLayers":[],"history":[]}"#.to_vec();
    let text = scratch
        .pull(&tagged(&layout.dir, old), &PullOptions::new())
        .expect_err("the first format");
    assert!(text.contains("first image format"), "{text}");
    let both = br#"{"schemaVersion":2,"manifests":[],"layers":[],"config":{}}"#.to_vec();
    let text = scratch
        .pull(&tagged(&layout.dir, both), &PullOptions::new())
        .expect_err("both");
    assert!(text.contains("both an index and a manifest"), "{text}");
}

#[test]
fn what_does_not_have_its_digest_is_refused_and_forgotten() {
    let scratch = Scratch::new();
    let layout = scratch.layout(2);
    for (kind, part) in [("manifest", "/manifests/sha256:"), ("blob", "/blobs/")] {
        let registry = image(&layout.dir);
        let server = Server::start(move |request: &Request| {
            let mut response = registry(request);
            if request.path.contains(part)
                && let Some(byte) = response.body.last_mut()
            {
                *byte ^= 1;
            }
            response
        });
        let digest = layout.blob(layout.manifest().to_string().as_bytes(), "")["digest"]
            .as_str()
            .expect("digest")
            .to_owned();
        let text = format!("127.0.0.1:{}/app@{digest}", server.port);
        let reference = Reference::parse(&text).expect("reference");
        let error = scratch
            .store
            .pull(&reference, None, &PullOptions::new(), &NoProgress)
            .expect_err(kind);
        let text = told(&error);
        assert!(text.contains("digest"), "{kind}: {text}");
        assert!(scratch.store.list().expect("list").is_empty());
    }
    // The same from an honest registry: nothing wrong was kept.
    scratch
        .pull(&Server::start(image(&layout.dir)), &PullOptions::new())
        .expect("pull");
}

#[derive(Default)]
struct Converted(Cell<usize>);

impl Progress for Converted {
    fn event(&self, event: ProgressEvent<'_>) {
        if let ProgressEvent::LayerFinished { outcome, .. } = event
            && matches!(outcome, LayerOutcome::Converted { .. })
        {
            self.0.set(self.0.get() + 1);
        }
    }
}

#[test]
fn a_layer_that_is_there_twice_is_fetched_and_converted_once() {
    let scratch = Scratch::new();
    let mut layout = Layout::new(&scratch.dir.path().join("layout"));
    let twice = archive(&[Member::file("twice", noise(1, 400_000))]);
    let once = archive(&[Member::file("once", b"")]);
    layout
        .layer(&twice)
        .layer(&once)
        .layer(&twice)
        .layer(&twice)
        .write();
    let server = Server::start(image(&layout.dir));
    let converted = Converted::default();
    let pulled = scratch
        .store
        .pull(&reference(&server), None, &PullOptions::new(), &converted)
        .unwrap_or_else(|error| panic!("{}", told(&error)));
    assert_eq!(pulled.layers.len(), 4);
    assert_eq!(converted.0.get(), 2);
    let digest = layout.manifest()["layers"][0]["digest"]
        .as_str()
        .expect("digest")
        .to_owned();
    assert_eq!(server.count(|request| request.path.ends_with(&digest)), 1);
}

#[test]
fn two_pulls_at_once_fetch_each_layer_once() {
    let scratch = Scratch::new();
    let layout = scratch.layout(5);
    let server = Server::start(image(&layout.dir));
    let root = scratch.dir.path().join("store");
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let store = Store::open(&root).expect("store");
                store
                    .pull(&reference(&server), None, &PullOptions::new(), &NoProgress)
                    .unwrap_or_else(|error| panic!("{}", told(&error)));
            });
        }
    });
    for layer in layout.manifest()["layers"].as_array().expect("layers") {
        let digest = layer["digest"].as_str().expect("digest");
        assert_eq!(
            server.count(|request| request.path.ends_with(digest)),
            1,
            "{digest}"
        );
    }
    let downloads = root.join("images/downloads");
    let left: Vec<_> = fs::read_dir(&downloads)
        .expect("downloads")
        .chain(fs::read_dir(downloads.join("blobs/sha256")).expect("blobs"))
        .map(|entry| entry.expect("entry").path())
        .filter(|path| path.is_file())
        .collect();
    assert!(left.is_empty(), "{left:?}");
}

/// Gives up as soon as something was fetched.
#[derive(Default)]
struct Impatient {
    fetched: Cell<bool>,
}

impl Progress for Impatient {
    fn event(&self, _event: ProgressEvent<'_>) {}

    fn fetched(&self, _index: usize, bytes_done: u64, _bytes: u64) {
        if bytes_done > 0 {
            self.fetched.set(true);
        }
    }

    fn cancelled(&self) -> bool {
        self.fetched.get()
    }
}

#[test]
fn a_pull_that_waits_for_ever_can_be_cancelled_and_gone_on_with() {
    let scratch = Scratch::new();
    let layout = scratch.layout(1);
    let registry = image(&layout.dir);
    let stalls = Arc::new(AtomicUsize::new(1));
    let left = Arc::clone(&stalls);
    let digest = layout.manifest()["layers"][0]["digest"]
        .as_str()
        .expect("digest")
        .to_owned();
    let server = Server::start(move |request: &Request| {
        let mut response = registry(request);
        let stall = |left: usize| left.checked_sub(1);
        if request.path.ends_with(&digest)
            && left
                .fetch_update(Ordering::SeqCst, Ordering::SeqCst, stall)
                .is_ok()
        {
            response.stall_after = Some(50_000);
        }
        response
    });
    let error = scratch
        .store
        .pull(
            &reference(&server),
            None,
            &PullOptions::new(),
            &Impatient::default(),
        )
        .expect_err("cancelled");
    assert!(matches!(error, Error::Cancelled), "{error:?}");
    assert_eq!(stalls.load(Ordering::SeqCst), 0);
    let tmp = fs::read_dir(scratch.dir.path().join("store/images/tmp")).expect("tmp");
    let left = tmp.filter(|entry| {
        let name = entry.as_ref().expect("entry").file_name();
        name.to_string_lossy().starts_with("new-")
    });
    assert_eq!(left.count(), 0);
}

/// Not a test of its own: the next one starts it with a registries.conf.
#[test]
#[ignore = "run by short_names_and_moved_registries_are_found"]
fn pulls_by_name() {
    let Ok(name) = std::env::var("HULL_TEST_NAME") else {
        return;
    };
    let scratch = Scratch::new();
    let references = Reference::candidates(&name).expect("configured");
    let pulled = scratch
        .store
        .pull(&references[0], None, &PullOptions::new(), &NoProgress)
        .unwrap_or_else(|error| panic!("{}", told(&error)));
    // It keeps the name people know it by.
    assert_eq!(pulled.names, ["public.test/team/app:1"]);
}

#[test]
fn short_names_and_moved_registries_are_found() {
    let scratch = Scratch::new();
    let server = Server::start(image(&scratch.layout(1).dir));
    let path = scratch.dir.path().join("registries.conf");
    let text = format!(
        "unqualified-search-registries = [\"public.test\"]\n[[registry]]\nprefix = \"public.test\"\nlocation = \"127.0.0.1:{}\"\n",
        server.port
    );
    fs::write(&path, text).expect("file");
    for name in ["public.test/team/app:1", "team/app:1"] {
        let output = Command::new(std::env::current_exe().expect("this program"))
            .args(["--exact", "pulls_by_name", "--ignored", "--nocapture"])
            .env("CONTAINERS_REGISTRIES_CONF", &path)
            .env("HULL_TEST_NAME", name)
            .output()
            .expect("child");
        assert!(
            output.status.success(),
            "{name}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
    assert!(server.count(|request| request.path.contains("/team/app/manifests/1")) >= 2);
}

/// Not a test of its own: the next one starts it with helpers to find.
#[test]
#[ignore = "run by credential_helpers_are_asked"]
fn finds_credentials() {
    let Some(expected) = std::env::var("HULL_TEST_EXPECTED").ok() else {
        return;
    };
    let found = match Credentials::find("registry.test") {
        Ok(Some(found)) => format!(
            "{}:{}:{}",
            found.username,
            found.password,
            found.identity_token.unwrap_or_default()
        ),
        Ok(None) => "none".to_owned(),
        Err(error) => error.to_string(),
    };
    assert_eq!(found, expected);
}

#[test]
fn credential_helpers_are_asked() {
    let scratch = tempfile::tempdir().expect("scratch directory");
    let helper = |name: &str, script: &str| {
        let path = scratch.path().join(format!("docker-credential-{name}"));
        fs::write(&path, format!("#!/bin/sh\n{script}\n")).expect("file");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("mode");
    };
    helper(
        "good",
        r#"read host; [ "$1" = get ] && echo "{\"ServerURL\":\"$host\",\"Username\":\"me@$host\",\"Secret\":\"s3cret\"}""#,
    );
    helper("token", r#"echo '{"Username":"<token>","Secret":"refresh-me"}'"#);
    helper("empty", "echo credentials not found in native keychain; exit 1");
    helper("broken", "echo the key ring is locked; exit 3");
    helper("chatty", "echo s3cret is not JSON");
    let file = |text: &str| {
        let path = scratch.path().join("config.json");
        fs::write(&path, text).expect("file");
        path
    };
    // Base64 of `file:file`.
    let auths = r#""auths":{"registry.test":{"auth":"ZmlsZTpmaWxl"}}"#;
    for (config, expected) in [
        (
            r#"{"credHelpers":{"registry.test":"good"},"credsStore":"broken"}"#.to_owned(),
            "me@registry.test:s3cret:",
        ),
        (r#"{"credsStore":"token"}"#.to_owned(), "::refresh-me"),
        (format!(r#"{{"credsStore":"empty",{auths}}}"#), "file:file:"),
        (r#"{"credsStore":"empty"}"#.to_owned(), "none"),
        (
            format!(r#"{{"credHelpers":{{"other.test":"broken"}},{auths}}}"#),
            "file:file:",
        ),
        (
            r#"{"credsStore":"broken"}"#.to_owned(),
            "the credential helper docker-credential-broken failed: the key ring is locked",
        ),
        (
            r#"{"credsStore":"chatty"}"#.to_owned(),
            "the credential helper docker-credential-chatty answered something that is not what helpers answer",
        ),
        (
            r#"{"credsStore":"../good"}"#.to_owned(),
            "the credential helper docker-credential-../good is not a program's name",
        ),
    ] {
        let output = Command::new(std::env::current_exe().expect("this program"))
            .args(["--exact", "finds_credentials", "--ignored", "--nocapture"])
            .env("REGISTRY_AUTH_FILE", file(&config))
            .env("PATH", format!("{}:/usr/bin:/bin", scratch.path().display()))
            .env("HULL_TEST_EXPECTED", expected)
            .output()
            .expect("child");
        assert!(
            output.status.success(),
            "{config}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
}
