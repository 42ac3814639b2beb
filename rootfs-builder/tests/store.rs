//! The store: what is shared, what is found again, what is cleaned up, and that several processes get along.

mod support;

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;

use rootfs_builder::erofs::{FileKind, Reader};
use rootfs_builder::{
    Error, ImageSource, LayerOutcome, NoProgress, PreparedImage, Progress, ProgressEvent, PruneOptions,
    RemoveOptions, Store,
};
use support::archive::{Layout, Member, archive, gzip, sha256};

fn layout(dir: &Path, layers: &[Vec<Member>]) -> ImageSource {
    let mut layout = Layout::new(dir);
    for members in layers {
        layout.layer(&archive(members));
    }
    layout.write();
    ImageSource::OciLayout {
        dir: dir.to_path_buf(),
        tag: None,
    }
}

fn read(image: &PreparedImage, layer: usize, path: &str) -> Option<Vec<u8>> {
    let reader = Reader::open(fs::File::open(&image.layers[layer].path).expect("blob")).expect("image");
    let mut stat = reader.root().expect("root");
    for name in path.split('/') {
        stat = reader.lookup(&stat, name.as_bytes()).expect("readable")?;
    }
    if stat.kind != FileKind::Regular {
        return Some(Vec::new());
    }
    let mut content = Vec::new();
    std::io::Read::read_to_end(&mut reader.data(&stat), &mut content).expect("readable");
    Some(content)
}

#[derive(Default)]
struct Outcomes(RefCell<Vec<bool>>);

impl Progress for Outcomes {
    fn event(&self, event: ProgressEvent<'_>) {
        if let ProgressEvent::LayerFinished { outcome, .. } = event {
            self.0
                .borrow_mut()
                .push(matches!(outcome, LayerOutcome::Converted { .. }));
        }
    }
}

#[test]
fn images_share_layers_and_import_only_what_is_new() {
    let scratch = tempfile::tempdir().expect("scratch directory");
    let store = Store::open(&scratch.path().join("store")).expect("store");
    let base = vec![
        Member::dir("./"),
        Member::dir("etc"),
        Member::file("etc/base", b"base"),
    ];
    let one = layout(
        &scratch.path().join("one"),
        &[
            base.clone(),
            vec![Member::dir("etc"), Member::file("etc/one", b"1")],
        ],
    );
    let two = layout(
        &scratch.path().join("two"),
        &[base, vec![Member::dir("etc"), Member::file("etc/two", b"2")]],
    );

    let first = Outcomes::default();
    let one = store.import(&one, Some("one"), &first).expect("import");
    assert_eq!(*first.0.borrow(), [true, true]);
    let second = Outcomes::default();
    let two_image = store.import(&two, Some("two"), &second).expect("import");
    assert_eq!(*second.0.borrow(), [false, true]);
    let third = Outcomes::default();
    store.import(&two, Some("two-again"), &third).expect("import");
    assert_eq!(*third.0.borrow(), [false, false]);

    assert_eq!(one.layers[0].path, two_image.layers[0].path);
    assert_eq!(read(&one, 1, "etc/one").as_deref(), Some(&b"1"[..]));
    assert_eq!(one.layers[0].size_bytes % 4096, 0);
    assert_eq!(store.list().expect("list").len(), 2);
}

#[test]
fn a_layer_that_leaves_things_to_those_below_is_not_shared_wrongly() {
    let scratch = tempfile::tempdir().expect("scratch directory");
    let store = Store::open(&scratch.path().join("store")).expect("store");
    // The same layer on bases that differ in what it doesn't say.
    let top = vec![Member::file("tmp/x", b"x"), Member::hard_link("linked", "target")];
    let base = |mode, content: &[u8]| vec![Member::dir("tmp").mode(mode), Member::file("target", content)];
    let one = layout(&scratch.path().join("one"), &[base(0o1777, b"one"), top.clone()]);
    let two = layout(&scratch.path().join("two"), &[base(0o700, b"two"), top]);
    let one = store.import(&one, Some("one"), &NoProgress).expect("import");
    let two = store.import(&two, Some("two"), &NoProgress).expect("import");
    assert_eq!(one.layers[1].diff_id, two.layers[1].diff_id);
    let mode = |image: &PreparedImage| {
        let reader = Reader::open(fs::File::open(&image.layers[1].path).expect("blob")).expect("image");
        let root = reader.root().expect("root");
        reader
            .lookup(&root, b"tmp")
            .expect("readable")
            .expect("there")
            .metadata
            .mode
    };
    assert_eq!((mode(&one), mode(&two)), (0o1777, 0o700));
    assert_eq!(read(&one, 1, "linked").as_deref(), Some(&b"one"[..]));
    assert_eq!(read(&two, 1, "linked").as_deref(), Some(&b"two"[..]));
}

#[test]
fn the_same_input_makes_the_same_bytes() {
    let members: Vec<Member> = (0..500)
        .map(|index| Member::file(format!("f{index}"), vec![1; index * 37]))
        .collect();
    let blobs: BTreeSet<Vec<u8>> = (0..2)
        .map(|_| {
            let scratch = tempfile::tempdir().expect("scratch directory");
            let store = Store::open(&scratch.path().join("store")).expect("store");
            let source = layout(&scratch.path().join("layout"), std::slice::from_ref(&members));
            let image = store.import(&source, Some("x"), &NoProgress).expect("import");
            fs::read(&image.layers[0].path).expect("blob")
        })
        .collect();
    assert_eq!(blobs.len(), 1);
}

#[test]
fn images_are_found_by_name_id_and_beginning_of_an_id() {
    let scratch = tempfile::tempdir().expect("scratch directory");
    let store = Store::open(&scratch.path().join("store")).expect("store");
    let source = layout(&scratch.path().join("layout"), &[vec![Member::file("a", b"")]]);
    let image = store.import(&source, None, &NoProgress).expect("import");
    assert_eq!(image.names, ["layout:latest"]);
    assert_eq!(image.config.cmd, ["/bin/sh"]);
    for name in [
        "layout",
        "layout:latest",
        &image.id,
        &image.id[..12],
        &format!("sha256:{}", image.id),
    ] {
        assert_eq!(store.resolve(name).expect(name).id, image.id);
    }
    for name in ["other", "layout:other", "../layout", "", "abc"] {
        assert!(
            matches!(store.resolve(name), Err(Error::NotFound { .. })),
            "{name}"
        );
    }
    assert!(store.raw_config("layout").expect("config").contains("/bin/sh"));
}

#[test]
fn names_move_and_images_go_with_their_last_one() {
    let scratch = tempfile::tempdir().expect("scratch directory");
    let store = Store::open(&scratch.path().join("store")).expect("store");
    let one = layout(&scratch.path().join("one"), &[vec![Member::file("a", b"1")]]);
    let two = layout(&scratch.path().join("two"), &[vec![Member::file("a", b"2")]]);
    let one = store.import(&one, Some("app"), &NoProgress).expect("import");
    store.tag("app", "app:1").expect("tag");
    let two = store.import(&two, Some("app"), &NoProgress).expect("import");
    assert_eq!(store.resolve("app").expect("there").id, two.id);
    assert_eq!(store.resolve("app:1").expect("there").id, one.id);

    let removed = store.remove("app:1").expect("remove");
    assert_eq!(
        (removed.untagged.as_slice(), removed.deleted.as_ref()),
        (&["app:1".to_owned()][..], Some(&one.id))
    );
    assert!(!one.layers[0].path.exists() && two.layers[0].path.exists());
    store.tag("app", "second").expect("tag");
    let removed = store.remove(&two.id[..12]).expect("remove");
    assert_eq!(removed.untagged, ["app:latest", "second:latest"]);
    assert!(store.list().expect("list").is_empty());
    assert!(!two.layers[0].path.exists());
    assert!(matches!(store.remove("app"), Err(Error::NotFound { .. })));
}

#[test]
fn prune_takes_what_has_no_name_and_spares_what_is_kept() {
    let scratch = tempfile::tempdir().expect("scratch directory");
    let store = Store::open(&scratch.path().join("store")).expect("store");
    let ids: Vec<String> = ["1", "2", "3"]
        .iter()
        .map(|content| {
            let source = layout(&scratch.path().join(content), &[vec![Member::file("a", content)]]);
            store
                .import(&source, Some("app"), &NoProgress)
                .expect("import")
                .id
        })
        .collect();
    let options = PruneOptions {
        in_use: &ids[..1],
        ..PruneOptions::default()
    };
    let looked = store
        .prune(&PruneOptions {
            dry_run: true,
            ..options
        })
        .expect("a look");
    let pruned = store.prune(&options).expect("prune");
    assert_eq!(looked, pruned);
    assert_eq!((pruned.images.len(), pruned.layers), (1, 1));
    assert!(pruned.bytes >= 4096);
    assert!(
        store.resolve(&ids[0]).is_ok() && store.resolve(&ids[1]).is_err() && store.resolve(&ids[2]).is_ok()
    );
}

#[test]
fn what_is_in_use_or_has_several_names_is_only_removed_by_force() {
    let scratch = tempfile::tempdir().expect("scratch directory");
    let store = Store::open(&scratch.path().join("store")).expect("store");
    let source = layout(&scratch.path().join("layout"), &[vec![Member::file("a", b"1")]]);
    let image = store.import(&source, Some("one"), &NoProgress).expect("import");
    store.tag("one", "two").expect("tag");
    let in_use = [image.id.clone()];
    let careful = RemoveOptions {
        in_use: &in_use,
        force: false,
    };
    let forced = RemoveOptions {
        force: true,
        ..careful
    };
    match store.remove_with(&image.id[..12], &careful) {
        Err(Error::SeveralNames { names, .. }) => assert_eq!(names, ["one:latest", "two:latest"]),
        other => panic!("{other:?}"),
    }
    // One name of two may go whatever the image is used for.
    let removed = store.remove_with("two", &careful).expect("a name");
    assert_eq!(
        (removed.untagged.as_slice(), removed.deleted),
        (&["two:latest".to_owned()][..], None)
    );
    assert!(matches!(
        store.remove_with("one", &careful),
        Err(Error::InUse { .. })
    ));
    assert_eq!(store.resolve("one").expect("unchanged").names, ["one:latest"]);
    let removed = store.remove_with("one", &forced).expect("forced");
    assert_eq!((removed.deleted, removed.bytes), (None, 0));
    assert!(store.resolve(&image.id).expect("still there").names.is_empty());
    let pruned = store
        .prune(&PruneOptions {
            in_use: &in_use,
            ..PruneOptions::default()
        })
        .expect("prune");
    assert!(pruned.images.is_empty());
    let removed = store
        .remove_with(&image.id, &RemoveOptions::default())
        .expect("unused now");
    assert_eq!(removed.deleted, Some(image.id));
    assert_eq!(removed.layers, [image.layers[0].diff_id.clone()]);
    assert!(removed.bytes >= 4096 && !image.layers[0].path.exists());
}

#[test]
fn prune_takes_named_images_if_told_to_and_damaged_ones() {
    let scratch = tempfile::tempdir().expect("scratch directory");
    let root = scratch.path().join("store");
    let store = Store::open(&root).expect("store");
    let import = |name: &str| {
        let members = vec![Member::file(name, name.as_bytes())];
        let source = layout(&scratch.path().join(name), &[members]);
        store.import(&source, Some(name), &NoProgress).expect("import")
    };
    let (kept, gone, damaged) = (import("kept"), import("gone"), import("damaged"));
    store.tag("gone", "gone:2").expect("tag");
    store.untag("gone:2").expect("untag");
    assert!(matches!(store.untag("gone:2"), Err(Error::NotFound { .. })));
    fs::write(root.join(format!("images/images/{}.json", damaged.id)), b"{").expect("file");
    assert!(matches!(store.resolve("damaged"), Err(Error::Damaged { .. })));
    assert_eq!(store.list().expect("the others").len(), 2);
    let pruned = store
        .prune(&PruneOptions {
            in_use: std::slice::from_ref(&kept.id),
            all: true,
            dry_run: false,
        })
        .expect("prune");
    let mut names: Vec<_> = pruned.images.iter().flat_map(|image| &image.names).collect();
    names.sort();
    assert_eq!(names, ["damaged:latest", "gone:latest"]);
    assert_eq!(pruned.layers, 2);
    assert!(store.resolve(&gone.id).is_err() && store.resolve("kept").is_ok());
    // A damaged one can also be removed by hand.
    let damaged = import("damaged");
    fs::write(root.join(format!("images/images/{}.json", damaged.id)), b"{").expect("file");
    assert_eq!(store.remove("damaged").expect("remove").deleted, Some(damaged.id));
}

#[test]
fn an_image_can_be_looked_at() {
    let scratch = tempfile::tempdir().expect("scratch directory");
    let store = Store::open(&scratch.path().join("store")).expect("store");
    let dir = scratch.path().join("layout");
    let mut layout = Layout::new(&dir);
    let (below, above) = (
        archive(&[Member::file("a", vec![1; 9000])]),
        archive(&[Member::file("b", b"2")]),
    );
    layout.layer(&below).layer(&above);
    layout.config["config"]["Labels"] = serde_json::json!({"purpose": "test"});
    layout.config["history"] = serde_json::json!([
        {"created": "2026-01-01T00:00:00Z", "created_by": "COPY a"},
        {"created_by": "ENV x=y", "empty_layer": true},
        {"created_by": "COPY b", "comment": "last"},
    ]);
    layout.write();
    let source = ImageSource::OciLayout { dir, tag: None };
    store.import(&source, Some("app"), &NoProgress).expect("import");
    let details = store.inspect("app").expect("there");
    assert_eq!(details.names, ["app:latest"]);
    assert_eq!(details.config.labels["purpose"], "test");
    let diff_ids: Vec<_> = details.layers.iter().map(|layer| layer.diff_id.clone()).collect();
    assert_eq!(diff_ids, [sha256(&below), sha256(&above)]);
    let layer = &details.layers[0];
    assert_eq!(layer.archive_bytes, Some(below.len() as u64));
    assert_eq!(layer.blob_bytes, Some(gzip(&below).len() as u64));
    assert!(layer.size_bytes >= 9000 && layer.digest != layer.diff_id);
    let steps: Vec<_> = details
        .history
        .iter()
        .map(|step| (step.empty_layer, step.size_bytes))
        .collect();
    let sizes: Vec<u64> = details.layers.iter().map(|layer| layer.size_bytes).collect();
    assert_eq!(steps, [(false, sizes[0]), (true, 0), (false, sizes[1])]);
    assert_eq!(details.size_bytes, sizes.iter().sum::<u64>());
    let listed = store.list().expect("list");
    assert_eq!(listed[0].labels, details.config.labels);
}

#[test]
fn what_a_killed_process_left_is_removed_by_the_next_one() {
    let scratch = tempfile::tempdir().expect("scratch directory");
    let root = scratch.path().join("store");
    let store = Store::open(&root).expect("store");
    let source = layout(&scratch.path().join("layout"), &[vec![Member::file("a", b"1")]]);
    let image = store.import(&source, Some("app"), &NoProgress).expect("import");
    let (half_made, orphan) = (
        root.join("images/tmp/new-half"),
        root.join("images/layers/sha256-00.erofs"),
    );
    fs::write(&half_made, b"half").expect("file");
    fs::write(&orphan, b"no record").expect("file");
    Store::open(&root).expect("store");
    assert!(!half_made.exists() && !orphan.exists());
    assert!(image.layers[0].path.exists());
}

#[test]
fn a_damaged_layer_is_reported_and_made_again() {
    let scratch = tempfile::tempdir().expect("scratch directory");
    let store = Store::open(&scratch.path().join("store")).expect("store");
    let source = layout(&scratch.path().join("layout"), &[vec![Member::file("a", b"1")]]);
    let image = store.import(&source, Some("app"), &NoProgress).expect("import");
    fs::remove_file(&image.layers[0].path).expect("blob");
    assert!(matches!(store.resolve("app"), Err(Error::MissingLayer { .. })));
    store.import(&source, Some("app"), &NoProgress).expect("import");
    assert_eq!(read(&image, 0, "a").as_deref(), Some(&b"1"[..]));
}

#[test]
fn many_importers_at_once_convert_a_layer_once() {
    let scratch = tempfile::tempdir().expect("scratch directory");
    let root = scratch.path().join("store");
    let members: Vec<Member> = (0..300)
        .map(|index| Member::file(format!("f{index}"), vec![3; 3000]))
        .collect();
    let source = layout(&scratch.path().join("layout"), &[members]);
    let converted: usize = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..8)
            .map(|index| {
                let (root, source) = (&root, &source);
                scope.spawn(move || {
                    let outcomes = Outcomes::default();
                    let store = Store::open(root).expect("store");
                    store
                        .import(source, Some(&format!("name-{index}")), &outcomes)
                        .expect("import");
                    outcomes
                        .0
                        .into_inner()
                        .into_iter()
                        .filter(|converted| *converted)
                        .count()
                })
            })
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().expect("importer"))
            .sum()
    });
    assert_eq!(converted, 1);
    assert_eq!(
        Store::open(&root).expect("store").list().expect("list")[0]
            .names
            .len(),
        8
    );
}

#[test]
fn an_image_without_layers_is_an_image() {
    let scratch = tempfile::tempdir().expect("scratch directory");
    let store = Store::open(&scratch.path().join("store")).expect("store");
    let image = store
        .import(&layout(&scratch.path().join("layout"), &[]), None, &NoProgress)
        .expect("import");
    assert!(image.layers.is_empty());
    assert_eq!(image.root.mode, 0o755);
}

#[test]
fn a_layer_that_hides_everything_below_replaces_it() {
    let scratch = tempfile::tempdir().expect("scratch directory");
    let store = Store::open(&scratch.path().join("store")).expect("store");
    let layers = [
        vec![Member::dir("./").mode(0o700), Member::file("below", b"")],
        vec![Member::file(".wh..wh..opq", b""), Member::file("above", b"")],
    ];
    let image = store
        .import(
            &layout(&scratch.path().join("layout"), &layers),
            None,
            &NoProgress,
        )
        .expect("import");
    assert_eq!(image.layers.len(), 1);
    assert!(read(&image, 0, "above").is_some() && read(&image, 0, "below").is_none());
    assert_eq!(image.root.mode, 0o700);
}

#[test]
fn archives_of_either_kind_give_the_same_layers() {
    let scratch = tempfile::tempdir().expect("scratch directory");
    let store = Store::open(&scratch.path().join("store")).expect("store");
    let tar = archive(&[Member::dir("d"), Member::file("d/f", vec![5; 70_000])]);
    let mut plain = Layout::new(&scratch.path().join("plain"));
    plain.layer(&tar).write();
    let config = plain.manifest()["config"]["digest"].as_str().expect("digest")[7..].to_owned();
    let config_bytes = fs::read(plain.dir.join("blobs/sha256").join(&config)).expect("config");

    let mut members = vec![Member::dir("blobs"), Member::dir("blobs/sha256")];
    for file in ["index.json", "oci-layout"] {
        members.push(Member::file(file, fs::read(plain.dir.join(file)).expect("file")));
    }
    for entry in fs::read_dir(plain.dir.join("blobs/sha256")).expect("blobs") {
        let path = entry.expect("entry").path();
        let name = path.file_name().expect("name").to_string_lossy().into_owned();
        members.push(Member::file(
            format!("./blobs/sha256/{name}"),
            fs::read(path).expect("blob"),
        ));
    }
    let oci = scratch.path().join("oci.tar");
    fs::write(&oci, archive(&members)).expect("archive");
    let compressed = scratch.path().join("oci.tar.gz");
    fs::write(&compressed, gzip(&archive(&members))).expect("archive");

    // `docker save` before version 25 linked equal layers to each other.
    let manifest = serde_json::json!([{
        "Config": format!("{config}.json"), "RepoTags": ["example.test/app:2"], "Layers": ["two/layer.tar"],
    }]);
    let docker = scratch.path().join("docker.tar");
    let members = [
        Member::dir("one"),
        Member::file("one/layer.tar", &tar),
        Member::dir("two"),
        Member::symlink("two/layer.tar", "../one/layer.tar"),
        Member::file(format!("{config}.json"), config_bytes),
        Member::file("manifest.json", manifest.to_string()),
    ];
    fs::write(&docker, archive(&members)).expect("archive");

    let mut seen = BTreeSet::new();
    let mut names = Vec::new();
    for text in [
        format!("oci:{}", plain.dir.display()),
        format!("{}", oci.display()),
        format!("oci-archive:{}:latest", compressed.display()),
        format!("docker-archive:{}", docker.display()),
        format!("docker-archive:{}:example.test/app:2", docker.display()),
    ] {
        let source = ImageSource::parse(&text).unwrap_or_else(|error| panic!("{text}: {error}"));
        let image = store
            .import(&source, None, &NoProgress)
            .unwrap_or_else(|error| panic!("{text}: {error:?}"));
        seen.insert((
            image.id,
            image.layers[0].path.clone(),
            image.layers[0].diff_id.clone(),
        ));
        names.push(image.names);
    }
    assert_eq!(seen.len(), 1, "{seen:?}");
    assert!(names[4].contains(&"example.test/app:2".to_owned()), "{names:?}");
    assert_eq!(seen.first().expect("one").2, sha256(&tar));
    let missing =
        ImageSource::parse(&format!("docker-archive:{}:other:1", docker.display())).expect("source");
    assert!(store.import(&missing, None, &NoProgress).is_err());
}

#[test]
fn a_store_that_cannot_be_written_to_says_which_path() {
    let scratch = tempfile::tempdir().expect("scratch directory");
    let file = scratch.path().join("file");
    fs::write(&file, b"").expect("file");
    match Store::open(&file.join("below")) {
        Err(Error::Store { path, .. }) => assert!(path.starts_with(&file)),
        other => panic!("{other:?}"),
    }
}

/// What GNU tar makes of sparse files, in each of its encodings.
#[test]
fn sparse_files_of_gnu_tar_survive() {
    if !support::has("tar") {
        return;
    }
    let scratch = tempfile::tempdir().expect("scratch directory");
    let input = scratch.path().join("input");
    fs::create_dir(&input).expect("directory");
    let file = fs::File::create(input.join("sparse")).expect("file");
    let size: u64 = (5 << 30) + 12_345;
    file.set_len(size).expect("length");
    // Enough runs for the old format's map to go on in further blocks.
    let runs: Vec<u64> = (0..60).map(|index| index * 80_000_000 + 4096).collect();
    for at in &runs {
        std::os::unix::fs::FileExt::write_all_at(&file, format!("run at {at}").as_bytes(), *at)
            .expect("write");
    }
    drop(file);
    for format in [
        &["--format=gnu"][..],
        &["--format=pax", "--sparse-version=0.0"],
        &["--format=pax", "--sparse-version=0.1"],
        &["--format=pax", "--sparse-version=1.0"],
    ] {
        let path = scratch.path().join("sparse.tar");
        support::run(
            Command::new("tar")
                .arg("-C")
                .arg(&input)
                .args(["--sparse", "-cf"])
                .arg(&path)
                .args(format)
                .arg("."),
        );
        let tar = fs::read(&path).expect("archive");
        assert!(tar.len() < 10 << 20, "{format:?}: tar didn't find the holes");
        let mut layout = Layout::new(&scratch.path().join("layout"));
        layout.layer(&tar).write();
        let store = Store::open(&scratch.path().join("store")).expect("store");
        let source = ImageSource::OciLayout {
            dir: layout.dir.clone(),
            tag: None,
        };
        let image = store
            .import(&source, None, &NoProgress)
            .unwrap_or_else(|error| panic!("{format:?}: {error:?}"));
        assert!(
            image.layers[0].size_bytes < 64 << 20,
            "{format:?}: holes take {} bytes",
            image.layers[0].size_bytes
        );
        let reader = Reader::open(fs::File::open(&image.layers[0].path).expect("blob")).expect("image");
        let root = reader.root().expect("root");
        let stat = reader.lookup(&root, b"sparse").expect("readable").expect("there");
        assert_eq!(stat.size, size, "{format:?}");
        for at in &runs {
            let expected = format!("run at {at}");
            let mut data = reader.data(&stat);
            data.seek_to(*at - 8);
            let mut found = vec![1; expected.len() + 16];
            std::io::Read::read_exact(&mut data, &mut found).expect("readable");
            assert_eq!(
                found,
                [&[0; 8], expected.as_bytes(), &[0; 8]].concat(),
                "{format:?}"
            );
        }
        store.remove("layout").expect("remove");
    }
}

#[test]
fn images_of_many_layers_need_few_mounts() {
    let scratch = tempfile::tempdir().expect("scratch directory");
    let store = Store::open(&scratch.path().join("store")).expect("store");
    let layers: Vec<Vec<Member>> = (0..100)
        .map(|layer| {
            let size = if layer == 0 { 500_000 } else { 10 };
            vec![
                Member::dir("d"),
                Member::file(format!("d/{layer}"), vec![1; size]),
                Member::file("d/last", layer.to_string()),
            ]
        })
        .collect();
    let source = layout(&scratch.path().join("layout"), &layers);
    let image = store.import(&source, Some("many"), &NoProgress).expect("import");
    assert_eq!(image.layers.len(), 12);
    // The big layer at the bottom stays what other images share.
    assert!(image.layers[0].size_bytes > 500_000);
    assert_eq!(read(&image, 11, "d/last").as_deref(), Some(&b"99"[..]));
    let again = Outcomes::default();
    store.import(&source, Some("many"), &again).expect("import");
    assert_eq!(*again.0.borrow(), [false; 100]);
    // The single layers that were merged are not needed any more.
    let pruned = store.prune(&PruneOptions::default()).expect("prune");
    assert_eq!(pruned.layers, 89);
    assert_eq!(store.resolve("many").expect("still there").layers, image.layers);
    store.import(&source, Some("many"), &NoProgress).expect("import");
}

#[test]
fn a_full_disk_is_said_to_be_full_and_nothing_is_left_on_it() {
    if support::cannot_mount() {
        return;
    }
    let scratch = tempfile::tempdir().expect("scratch directory");
    let disk = support::small_disk(&scratch.path().join("disk"), "size=3m");
    let members: Vec<Member> = (0..100)
        .map(|index| Member::file(format!("f{index}"), vec![index | 1; 100_000]))
        .collect();
    let source = layout(&scratch.path().join("layout"), &[members]);
    let free = |path: &Path| {
        rustix::fs::statvfs(path)
            .map(|status| status.f_bavail)
            .expect("statvfs")
    };
    for reserve_bytes in [0, 64 << 20] {
        let limits = rootfs_builder::Limits {
            reserve_bytes,
            ..rootfs_builder::Limits::default()
        };
        let store = Store::open(&disk.0.join("store"))
            .expect("store")
            .with_limits(limits);
        let before = free(&disk.0);
        let error = store.import(&source, None, &NoProgress).expect_err("no space");
        let text = format!("{error:?}");
        assert!(text.contains("NoSpace") || text.contains("StoreFull"), "{text}");
        Store::open(&disk.0.join("store")).expect("store");
        assert!(free(&disk.0) >= before.saturating_sub(2), "something was left");
    }
}

#[test]
fn a_store_on_a_read_only_disk_can_be_used_but_not_changed() {
    if support::cannot_mount() {
        return;
    }
    let scratch = tempfile::tempdir().expect("scratch directory");
    let disk = support::small_disk(&scratch.path().join("disk"), "size=64m");
    let source = layout(&scratch.path().join("layout"), &[vec![Member::file("a", b"1")]]);
    let other = layout(&scratch.path().join("other"), &[vec![Member::file("a", b"2")]]);
    let limits = rootfs_builder::Limits {
        reserve_bytes: 0,
        ..rootfs_builder::Limits::default()
    };
    let store = Store::open(&disk.0).expect("store").with_limits(limits);
    let image = store.import(&source, Some("app"), &NoProgress).expect("import");
    support::run(Command::new("mount").args(["-o", "remount,ro"]).arg(&disk.0));
    let store = Store::open(&disk.0).expect("a store that can be read");
    assert_eq!(store.resolve("app").expect("there").id, image.id);
    assert_eq!(
        read(&store.resolve("app").expect("there"), 0, "a").as_deref(),
        Some(&b"1"[..])
    );
    let error = store
        .import(&other, Some("other"), &NoProgress)
        .expect_err("read-only");
    assert!(
        matches!(&error, Error::Store { source, .. } if source.kind() == std::io::ErrorKind::ReadOnlyFilesystem),
        "{error:?}"
    );
    assert!(store.remove("app").is_err());
    assert!(store.resolve("app").is_ok());
}

/// Not a test of its own: the next one starts it, to see how much memory it takes.
#[test]
#[ignore = "run by large_layers_take_little_memory"]
fn imports_once() {
    let Some(root) = std::env::var_os("HULL_TEST_IMPORT") else {
        return;
    };
    let root = Path::new(&root);
    let store = Store::open(&root.join("store")).expect("store");
    let source = ImageSource::OciLayout {
        dir: root.join("layout"),
        tag: None,
    };
    store.import(&source, Some("app"), &NoProgress).expect("import");
    let status = fs::read_to_string("/proc/self/status").expect("status");
    let most = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib: u64 = most
        .and_then(|most| most.trim().trim_end_matches(" kB").parse().ok())
        .expect("a number");
    println!("{kib} KiB");
    assert!(kib < 100_000, "importing took {kib} KiB");
}

/// Four layers at a time, each with one large file and many small ones.
#[test]
fn large_layers_take_little_memory() {
    let scratch = tempfile::tempdir().expect("scratch directory");
    let mut image = Layout::new(&scratch.path().join("layout"));
    let pattern: Vec<u8> = (0..=255).collect();
    for layer in 0..4_u8 {
        let mut members = vec![Member::file("large", pattern.repeat(100_000))];
        members.extend((0..5000).map(|file| Member::file(format!("{layer}/{file}"), vec![layer | 1; 1500])));
        image.layer(&archive(&members));
    }
    image.write();
    let output = Command::new(std::env::current_exe().expect("this program"))
        .args(["--exact", "imports_once", "--ignored", "--nocapture"])
        .env("HULL_TEST_IMPORT", scratch.path())
        .output()
        .expect("child");
    println!("{}", String::from_utf8_lossy(&output.stdout));
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
}
