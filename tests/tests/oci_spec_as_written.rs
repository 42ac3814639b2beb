//! What `runc spec` writes, as it is, in the current directory: the first thing who knows runc tries.

use std::fs;
use std::process::{Command, Stdio};

use hull_tests::hull;

#[test]
fn specification_of_runc_runs_in_the_current_directory() {
    let (true, Some(runtime)) = (hull::available(), std::env::var_os("HULL_OCI")) else {
        eprintln!("skipped: HULL_OCI is not set, or there is no KVM");
        return;
    };
    let world = tempfile::tempdir().expect("a temporary folder");
    let bundle = world.path().join("bundle");
    fs::create_dir_all(bundle.join("rootfs/bin")).expect("a folder of our own");
    fs::copy("/bin/busybox", bundle.join("rootfs/bin/sh")).expect("busybox-static is installed");
    let written = Command::new("runc").arg("spec").current_dir(&bundle).status();
    assert!(written.is_ok_and(|status| status.success()), "runc is installed");
    let configuration = bundle.join("config.json");
    let text = fs::read_to_string(&configuration).expect("runc wrote it");
    assert!(text.contains("\"ambient\""), "{text}");
    // Only what needs a terminal, and a program that ends.
    let text = text.replacen("\"terminal\": true", "\"terminal\": false", 1);
    let text = text.replacen("\"sh\"", "\"sh\", \"-c\", \"echo here\"", 1);
    fs::write(&configuration, text).expect("the folder is writable");
    let mut outputs = Vec::new();
    for program in ["runc".as_ref(), runtime.as_os_str()] {
        let output = Command::new(program)
            .arg("--root")
            .arg(world.path().join("state"))
            .args(["run", "as-written"])
            .current_dir(&bundle)
            .stdin(Stdio::null())
            .output()
            .expect("the runtime can be started");
        outputs.push((
            output.status.code(),
            String::from_utf8_lossy(&output.stdout).into_owned(),
        ));
        assert_eq!(outputs[0], (Some(0), "here\n".to_owned()), "{output:?}");
    }
    assert_eq!(outputs[0], outputs[1]);
}
