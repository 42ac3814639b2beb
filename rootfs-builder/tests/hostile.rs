//! Images made to do harm: each is refused with an error that names the layer and the problem, and leaves nothing behind.

mod support;

use std::fs;
use std::path::Path;

use rootfs_builder::{ImageSource, Limits, NoProgress, Store};
use support::archive::{Layout, Member, archive, checksum, gzip, header, padded, pax_record, sha256};
use support::told;

const LAYER: &str = "application/vnd.oci.image.layer.v1.tar+gzip";

fn import_with(limits: Limits, layout: &Path) -> Result<(), String> {
    let scratch = tempfile::tempdir().expect("scratch directory");
    let store = Store::open(scratch.path()).expect("store").with_limits(limits);
    let source = ImageSource::OciLayout {
        dir: layout.to_path_buf(),
        tag: None,
    };
    let result = store
        .import(&source, Some("test"), &NoProgress)
        .map(|_| ())
        .map_err(|error| told(&error));
    if result.is_err() {
        assert!(
            store.list().expect("list").is_empty(),
            "a refused image is listed"
        );
        let images = scratch.path().join("images");
        for directory in ["tmp", "layers", "images", "names"] {
            let left: Vec<_> = fs::read_dir(images.join(directory))
                .expect("store directory")
                .map(|entry| entry.expect("entry").file_name().to_string_lossy().into_owned())
                .filter(|name| !name.ends_with(".lock"))
                .collect();
            assert!(left.is_empty(), "{directory} has {left:?}");
        }
    }
    result
}

/// The error an image of one layer gets; it must name the layer.
fn refusal_with(limits: Limits, tar: &[u8]) -> String {
    let scratch = tempfile::tempdir().expect("scratch directory");
    let mut layout = Layout::new(scratch.path());
    layout.layer(tar).write();
    let text = import_with(limits, scratch.path()).expect_err("a refusal");
    assert!(
        text.contains(&sha256(&gzip(tar))),
        "the layer isn't named: {text}"
    );
    text
}

fn refusal(members: &[Member]) -> String {
    refusal_with(Limits::default(), &archive(members))
}

fn accepts(members: &[Member]) {
    let scratch = tempfile::tempdir().expect("scratch directory");
    let mut layout = Layout::new(scratch.path());
    layout.layer(&archive(members)).write();
    import_with(Limits::default(), scratch.path()).unwrap_or_else(|text| panic!("{text}"));
}

#[test]
fn names_that_leave_the_root_are_refused() {
    for path in [
        "../escape",
        "a/../../escape",
        "/../escape",
        "..",
        "./../../etc/passwd",
    ] {
        assert!(
            refusal(&[Member::file(path, b"x")]).contains("leads out of the root"),
            "{path}"
        );
    }
    assert!(refusal(&[Member::hard_link("a", "../../etc/shadow")]).contains("leads out of the root"));
}

#[test]
fn absolute_names_and_links_stay_in_the_root() {
    // Buildpacks write absolute names; symbolic links are only text until a container follows them.
    accepts(&[
        Member::file("/etc/passwd", b"x"),
        Member::symlink("link", "../../../../etc"),
        Member::file("link/x", b"y"),
    ]);
    accepts(&[
        Member::symlink("self", "/"),
        Member::file("self/self/self/x", b"y"),
    ]);
}

#[test]
fn endless_links_are_refused() {
    let text = refusal(&[
        Member::symlink("a", "b"),
        Member::symlink("b", "a"),
        Member::file("a/x", b""),
    ]);
    assert!(text.contains("too many links"), "{text}");
    let text = refusal(&[Member::symlink("a", "a/a/a/a"), Member::file("a/x", b"")]);
    assert!(text.contains("too many links"), "{text}");
}

#[test]
fn hard_links_to_nothing_and_to_directories_are_refused() {
    assert!(refusal(&[Member::hard_link("a", "missing")]).contains("which is not there"));
    assert!(refusal(&[Member::dir("d"), Member::hard_link("a", "d")]).contains("hard link to a directory"));
    assert!(
        refusal(&[Member::file(".wh.gone", b""), Member::hard_link("a", "gone")])
            .contains("which is not there")
    );
}

#[test]
fn nonsense_members_are_refused() {
    assert!(refusal(&[Member::file("./", b"")]).contains("root can only be a directory"));
    assert!(refusal(&[Member::file("f", b""), Member::file("f/x", b"")]).contains("not a directory"));
    assert!(refusal(&[Member::file(".wh.", b"")]).contains("whiteout of nothing"));
    assert!(refusal(&[Member::file("a/.wh...", b"")]).contains("whiteout of nothing"));
    assert!(refusal(&[Member::file(".wh.a/b", b"")]).contains("whiteout cannot have anything below"));
    assert!(refusal(&[Member::new(b'Z', "odd")]).contains("does not belong into a layer"));
    assert!(refusal(&[Member::symlink("l", "")]).contains("symbolic link"));
    assert!(refusal(&[Member::symlink("l", "t".repeat(4096))]).contains("longer than Linux allows"));
    assert!(refusal(&[Member::device("d", b'3', (5000, 0))]).contains("no such device number"));
    assert!(refusal(&[Member::file("n".repeat(256), b"")]).contains("more than 255 bytes"));
    assert!(refusal(&[Member::file("o", b"").owner(u64::from(u32::MAX), 0)]).contains("out of range"));
    assert!(refusal(&[Member::file("o", b"").owner(0, 1 << 40)]).contains("out of range"));
    assert!(
        refusal(&[Member::file("x", b"").xattr("user.big", vec![0; 70_000])]).contains("extended attribute")
    );
}

#[test]
fn attributes_of_overlayfs_and_unknown_namespaces_are_left_out() {
    let scratch = tempfile::tempdir().expect("scratch directory");
    let mut layout = Layout::new(&scratch.path().join("layout"));
    let directory = Member::dir("d")
        .xattr("trusted.overlay.opaque", "y")
        .xattr("btrfs.x", "1")
        .xattr("user.kept", "2");
    layout.layer(&archive(&[directory])).write();
    let store = Store::open(&scratch.path().join("store")).expect("store");
    let source = ImageSource::OciLayout {
        dir: layout.dir.clone(),
        tag: None,
    };
    let image = store.import(&source, None, &NoProgress).expect("import");
    let file = fs::File::open(&image.layers[0].path).expect("blob");
    let reader = rootfs_builder::erofs::Reader::open(file).expect("image");
    let root = reader.root().expect("root");
    let directory = reader.lookup(&root, b"d").expect("readable").expect("there");
    let names: Vec<&[u8]> = directory.metadata.xattrs.keys().map(AsRef::as_ref).collect();
    assert_eq!(names, [b"user.kept".as_slice()]);
}

#[test]
fn one_bad_layer_takes_the_others_with_it() {
    let scratch = tempfile::tempdir().expect("scratch directory");
    let mut layout = Layout::new(scratch.path());
    for layer in 0..5 {
        layout.layer(&archive(&[Member::file(format!("{layer}"), vec![layer; 5000])]));
    }
    let bad = archive(&[Member::file("../out", b"")]);
    layout
        .layer(&bad)
        .layer(&archive(&[Member::file("top", b"")]))
        .write();
    let text = import_with(Limits::default(), scratch.path()).expect_err("a refusal");
    assert!(text.contains(&sha256(&gzip(&bad))), "{text}");
}

#[test]
fn damaged_archives_are_refused() {
    let tar = archive(&[Member::file("a", vec![1; 5000])]);
    let mut wrong_checksum = tar.clone();
    wrong_checksum[0] ^= 1;
    assert!(refusal_with(Limits::default(), &wrong_checksum).contains("checksum"));
    assert!(refusal_with(Limits::default(), &tar[..3000]).contains("ended after"));
    assert!(refusal_with(Limits::default(), &tar[..300]).contains("ends in the middle"));
    assert!(refusal_with(Limits::default(), b"this is no archive").contains("ends in the middle"));
    assert!(refusal_with(Limits::default(), &[b'x'; 2048]).contains("checksum"));
}

#[test]
fn absurd_headers_are_refused() {
    let with_size = |size: &[u8]| {
        let mut block = header(&Member::file("a", b""), 0);
        block[124..136].copy_from_slice(size);
        checksum(&mut block);
        [block, vec![0; 1024]].concat()
    };
    // -1 and 2^62 in binary, and no number at all.
    assert!(refusal_with(Limits::default(), &with_size(&[0xff; 12])).contains("out of range"));
    let huge = [&[0x80, 0, 0, 0, 0x40][..], &[0; 7]].concat();
    assert!(refusal_with(Limits::default(), &with_size(&huge)).contains("more than the limit"));
    assert!(refusal_with(Limits::default(), &with_size(b"99999999999\0")).contains("not a number"));

    let pax = |records: &[u8]| {
        [
            header(&Member::new(b'x', "p"), records.len() as u64),
            padded(records),
            archive(&[Member::file("a", b"")]),
        ]
        .concat()
    };
    assert!(refusal_with(Limits::default(), &pax(b"9999 path=x\n")).contains("malformed"));
    assert!(refusal_with(Limits::default(), &pax(b"-5 path=x\n")).contains("malformed"));
    assert!(refusal_with(Limits::default(), &pax(&pax_record(b"path", b"a\0b"))).contains("NUL"));
    assert!(refusal_with(Limits::default(), &pax(&pax_record(b"size", b"-1"))).contains("not a number"));
    assert!(refusal_with(Limits::default(), &pax(&pax_record(b"mtime", b"soon"))).contains("not a time"));
    let giant = header(&Member::new(b'x', "p"), 3 << 30);
    assert!(refusal_with(Limits::default(), &giant).contains("header extension of 3221225472 bytes"));
    let giant = header(&Member::new(b'L', "p"), 3 << 30);
    assert!(refusal_with(Limits::default(), &giant).contains("header extension of 3221225472 bytes"));
    let only_extension = [header(&Member::new(b'x', "p"), 0), vec![0; 1024]].concat();
    assert!(
        refusal_with(Limits::default(), &only_extension).contains("ends in the middle of an entry's headers")
    );
}

#[test]
fn absurd_sparse_maps_are_refused() {
    let sparse = |map: &str| {
        let records = [
            pax_record(b"GNU.sparse.size", b"1000"),
            pax_record(b"GNU.sparse.numblocks", b"1"),
            pax_record(b"GNU.sparse.map", map.as_bytes()),
        ]
        .concat();
        [
            header(&Member::new(b'x', "p"), records.len() as u64),
            padded(&records),
            archive(&[Member::file("a", b"12345")]),
        ]
        .concat()
    };
    for map in [
        "0,5000",
        "5,1,0,4",
        "999,5",
        "9223372036854775807,5",
        "0,4",
        "0",
        "0,5,x,1",
    ] {
        let text = refusal_with(Limits::default(), &sparse(map));
        assert!(text.contains("sparse file's map"), "{map}: {text}");
    }
}

#[test]
fn bombs_are_refused() {
    let zeroes = archive(&[Member::file("zeroes", vec![0; 8 << 20])]);
    let limits = Limits {
        layer_bytes: 1 << 20,
        ..Limits::default()
    };
    assert!(refusal_with(limits, &zeroes).contains("decompresses to more than the limit"));
    let limits = Limits {
        file_bytes: 1 << 20,
        ..Limits::default()
    };
    assert!(refusal_with(limits, &zeroes).contains("more than the limit of 1048576"));
    let many: Vec<Member> = (0..200)
        .map(|index| Member::file(format!("{index}"), b""))
        .collect();
    let limits = Limits {
        layer_entries: 100,
        ..Limits::default()
    };
    assert!(refusal_with(limits, &archive(&many)).contains("more than 100 entries"));
    let limits = Limits {
        layer_metadata_bytes: 300,
        ..Limits::default()
    };
    assert!(refusal_with(limits, &archive(&many)).contains("bytes of names"));
    let limits = Limits {
        reserve_bytes: u64::MAX,
        ..Limits::default()
    };
    assert!(refusal_with(limits, &archive(&many)).contains("not enough space"));
}

#[test]
fn a_compressed_archive_that_is_a_bomb_is_refused() {
    let scratch = tempfile::tempdir().expect("scratch directory");
    let path = scratch.path().join("bomb.tar.gz");
    fs::write(&path, gzip(&vec![0; 64 << 20])).expect("file");
    let import = |limits: Limits| {
        let store = Store::open(&scratch.path().join("store")).expect("store");
        let source = ImageSource::OciArchive {
            file: path.clone(),
            tag: None,
        };
        let error = store.with_limits(limits).import(&source, None, &NoProgress);
        told(&error.expect_err("a refusal"))
    };
    let usual = Limits::default();
    for (limits, problem) in [
        (
            Limits {
                ratio_free_bytes: 32 << 20,
                compression_ratio: 20,
                ..usual
            },
            "a decompression bomb",
        ),
        (
            Limits {
                layer_bytes: 20 << 20,
                ..usual
            },
            "more than the limit",
        ),
        (
            Limits {
                reserve_bytes: u64::MAX,
                ..usual
            },
            "not enough space in the image store",
        ),
    ] {
        let text = import(limits);
        assert!(text.contains(problem) && text.contains("bomb.tar.gz"), "{text}");
    }
}

#[test]
fn a_zstd_bomb_is_stopped_by_its_ratio() {
    let scratch = tempfile::tempdir().expect("scratch directory");
    let mut encoder = zstd::stream::write::Encoder::new(Vec::new(), 1).expect("encoder");
    let size: u64 = 64 << 20;
    let zeroes = vec![0; 1 << 20];
    std::io::Write::write_all(&mut encoder, &header(&Member::file("bomb", b""), size)).expect("memory");
    for _ in 0..size >> 20 {
        std::io::Write::write_all(&mut encoder, &zeroes).expect("memory");
    }
    let blob = encoder.finish().expect("memory");
    let mut layout = Layout::new(scratch.path());
    let descriptor = layout.blob(&blob, "application/vnd.oci.image.layer.v1.tar+zstd");
    layout.described(descriptor, sha256(b"never reached")).write();
    let limits = Limits {
        ratio_free_bytes: 8 << 20,
        ..Limits::default()
    };
    let text = import_with(limits, scratch.path()).expect_err("a refusal");
    assert!(
        text.contains("decompression bomb") && text.contains(&sha256(&blob)),
        "{text}"
    );
}

#[test]
fn blobs_that_are_not_what_the_manifest_says_are_refused() {
    let tar = archive(&[Member::file("a", vec![7; 100_000])]);
    let blob = gzip(&tar);
    let diff_id = sha256(&tar);
    let case = |change: &dyn Fn(&Layout, &mut serde_json::Value, &mut String)| {
        let scratch = tempfile::tempdir().expect("scratch directory");
        let mut layout = Layout::new(scratch.path());
        let mut descriptor = layout.blob(&blob, LAYER);
        let mut diff_id = diff_id.clone();
        change(&layout, &mut descriptor, &mut diff_id);
        layout.described(descriptor, diff_id).write();
        import_with(Limits::default(), scratch.path()).expect_err("a refusal")
    };
    let path = |layout: &Layout, digest: &str| layout.dir.join("blobs/sha256").join(&digest[7..]);
    let own = sha256(&blob);

    let text = case(&|layout, _, _| {
        let mut changed = blob.clone();
        let last = changed.len() - 1;
        changed[last] ^= 1;
        fs::write(path(layout, &own), changed).expect("blob");
    });
    assert!(
        text.contains(&own) && (text.contains("decompress") || text.contains("digest")),
        "{text}"
    );

    let text = case(&|layout, descriptor, _| {
        let other = sha256(b"something else");
        fs::write(path(layout, &other), &blob).expect("blob");
        descriptor["digest"] = other.into();
    });
    assert!(text.contains("the blob's digest is"), "{text}");

    let text = case(&|_, descriptor, _| descriptor["size"] = (blob.len() + 1).into());
    assert!(text.contains("bytes or more where the manifest says"), "{text}");

    let text = case(&|layout, _, _| fs::write(path(layout, &own), &blob[..blob.len() / 2]).expect("blob"));
    assert!(text.contains("where the manifest says"), "{text}");

    // Truncated, and the manifest agrees.
    let text = case(&|layout, descriptor, _| *descriptor = layout.blob(&blob[..blob.len() / 2], LAYER));
    assert!(text.contains("ends too early"), "{text}");

    let text = case(&|_, _, diff_id| *diff_id = sha256(b"another archive"));
    assert!(text.contains("the archive's digest is"), "{text}");

    let text = case(&|layout, _, _| fs::remove_file(path(layout, &own)).expect("blob"));
    assert!(text.contains("is missing from the image"), "{text}");

    let text = case(&|layout, descriptor, _| *descriptor = layout.blob(b"BZh91AY&SY", LAYER));
    assert!(text.contains("compressed with bzip2"), "{text}");

    // Something behind the compressed data.
    let text =
        case(&|layout, descriptor, _| *descriptor = layout.blob(&[&blob, &b"garbage"[..]].concat(), LAYER));
    assert!(
        text.contains("decompress") || text.contains("ends too early"),
        "{text}"
    );
}

#[test]
fn digests_cannot_be_paths() {
    for digest in [
        "sha256:../../../../etc/passwd",
        "sha256:",
        "../../index:json",
        "sha256:ABCDEF",
        "md5:d41d8cd98f00b204",
    ] {
        let scratch = tempfile::tempdir().expect("scratch directory");
        let mut layout = Layout::new(scratch.path());
        let descriptor = serde_json::json!({"mediaType": LAYER, "digest": digest, "size": 10});
        layout.described(descriptor, sha256(b"")).write();
        let text = import_with(Limits::default(), scratch.path()).expect_err("a refusal");
        assert!(
            text.contains("malformed") || text.contains("digest"),
            "{digest}: {text}"
        );
        assert!(!text.contains("root:"), "{text}");

        let layout = Layout::new(scratch.path());
        layout.index(serde_json::json!({"mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": digest, "size": 10}));
        import_with(Limits::default(), scratch.path()).expect_err("a refusal");
    }
}

#[test]
fn documents_that_are_wrong_are_refused() {
    let case = |write: &dyn Fn(&mut Layout)| {
        let scratch = tempfile::tempdir().expect("scratch directory");
        let mut layout = Layout::new(scratch.path());
        write(&mut layout);
        import_with(
            Limits {
                document_bytes: 100_000,
                layers: 3,
                ..Limits::default()
            },
            scratch.path(),
        )
        .expect_err("a refusal")
    };
    let manifest_type = "application/vnd.oci.image.manifest.v1+json";
    let text = case(&|_| {});
    assert!(text.contains("no index.json"), "{text}");
    let text = case(&|layout| fs::write(layout.dir.join("index.json"), "{").expect("index"));
    assert!(text.contains("index.json is malformed"), "{text}");
    let text = case(&|layout| fs::write(layout.dir.join("index.json"), vec![b' '; 200_000]).expect("index"));
    assert!(text.contains("more than the limit of 100000"), "{text}");
    let text = case(&|layout| {
        let mut descriptor = layout.blob(b"{}", manifest_type);
        descriptor["size"] = 3.into();
        layout.index(descriptor);
    });
    assert!(text.contains("has 2 bytes where its descriptor says 3"), "{text}");
    let text = case(&|layout| layout.index(layout.blob(b"{}", manifest_type)));
    assert!(text.contains("neither an index nor a manifest"), "{text}");
    let text = case(&|layout| {
        let mut manifest = layout.manifest();
        manifest["manifests"] = serde_json::json!([]);
        layout.index(layout.blob(manifest.to_string().as_bytes(), manifest_type));
    });
    assert!(text.contains("both an index and a manifest"), "{text}");
    let text = case(&|layout| {
        let mut manifest = layout.manifest();
        manifest["layers"] = serde_json::json!([layout.blob(b"", LAYER)]);
        layout.index(layout.blob(manifest.to_string().as_bytes(), manifest_type));
    });
    assert!(text.contains("lists 1 layers, the configuration 0"), "{text}");
    let text = case(&|layout| {
        let tar = archive(&[]);
        layout.layer(&tar).layer(&tar).layer(&tar).layer(&tar).write();
    });
    assert!(text.contains("4 layers, more than the limit of 3"), "{text}");
    let text = case(&|layout| {
        layout.config["architecture"] = "s390x".into();
        layout.write();
    });
    assert!(text.contains("linux/s390x"), "{text}");
    let text = case(&|layout| {
        let mut manifest = layout.manifest();
        manifest["config"]["mediaType"] = "application/vnd.example.model.v1+json".into();
        layout.index(layout.blob(manifest.to_string().as_bytes(), manifest_type));
    });
    assert!(text.contains("is not something a container is made of"), "{text}");
    let text = case(&|layout| {
        let descriptor = layout.blob(b"", "application/vnd.oci.image.layer.v1.tar+gzip+encrypted");
        layout.described(descriptor, sha256(b"")).write();
    });
    assert!(text.contains("is not something a container is made of"), "{text}");
}

#[test]
fn an_index_that_lists_itself_is_refused() {
    let scratch = tempfile::tempdir().expect("scratch directory");
    let layout = Layout::new(scratch.path());
    // A real cycle would need a hash collision; a deep nest is as good.
    let index_type = "application/vnd.oci.image.index.v1+json";
    layout.write();
    let mut descriptor = layout.blob(
        layout.manifest().to_string().as_bytes(),
        "application/vnd.oci.image.manifest.v1+json",
    );
    for _ in 0..10 {
        let index = serde_json::json!({"schemaVersion": 2, "manifests": [descriptor]});
        descriptor = layout.blob(index.to_string().as_bytes(), index_type);
    }
    layout.index(descriptor);
    let text = import_with(Limits::default(), scratch.path()).expect_err("a refusal");
    assert!(text.contains("nested too deeply"), "{text}");
}
