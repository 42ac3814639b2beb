//! How long it takes to make an image usable: ours against `umoci unpack`, of the same image, taking turns.
//!
//! ```text
//! cargo bench -p rootfs-builder --bench conversion -- oci:DIR:TAG...
//! ```
//!
//! Prints, for each image: both times (`fsync` is part of ours, umoci does none), what a second import takes, the most memory either
//! used, and how long a writable layer takes with and without its template. Without arguments it uses the images of `HULL_TEST_IMAGES`.

use std::error::Error;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use rootfs_builder::writable::Size;
use rootfs_builder::{ImageSource, NoProgress, Store};

const ROUNDS: usize = 5;
/// Set for the child that imports, so that its memory can be measured.
const CHILD: &str = "HULL_BENCH_IMPORT";

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), Box<dyn Error>> {
    let mut images: Vec<String> = std::env::args()
        .skip(1)
        .filter(|argument| !argument.starts_with("--"))
        .collect();
    if let Some(store) = std::env::var_os(CHILD) {
        let image = images.first().ok_or("no image")?;
        Store::open(Path::new(&store))?.import(&ImageSource::parse(image)?, Some("bench"), &NoProgress)?;
        return Ok(());
    }
    if images.is_empty() {
        images = known_images();
    }
    if images.is_empty() {
        println!("skipped: name images, as oci:DIR:TAG, or set HULL_TEST_IMAGES");
    }
    for image in &images {
        compare(image)?;
    }
    writable_layers()
}

fn known_images() -> Vec<String> {
    let Some(directory) = std::env::var_os("HULL_TEST_IMAGES") else {
        return Vec::new();
    };
    let mut images: Vec<String> = std::fs::read_dir(directory)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path())
        // Each image is a link to the folder of its version.
        .filter(|path| path.is_symlink() && path.join("index.json").is_file())
        .map(|path| format!("oci:{}:latest", path.display()))
        .collect();
    images.sort();
    images
}

fn compare(image: &str) -> Result<(), Box<dyn Error>> {
    let layout = image.strip_prefix("oci:").ok_or("only oci: can be compared")?;
    let scratch = tempfile::tempdir()?;
    let (mut ours, mut again, mut theirs) = (Vec::new(), Vec::new(), Vec::new());
    let (mut our_memory, mut their_memory) = (0, 0);
    for round in 0..ROUNDS {
        let store = scratch.path().join(format!("store-{round}"));
        let import = || {
            let mut command = Command::new(std::env::current_exe()?);
            command.arg(image).env(CHILD, &store);
            measured(command)
        };
        let unpack = || {
            let mut command = Command::new("umoci");
            command.args(["unpack", "--image", layout]);
            command.arg(scratch.path().join(format!("bundle-{round}")));
            measured(command)
        };
        // Whoever goes first finds the image's blobs cold.
        let (our, their) = if round % 2 == 0 {
            let our = import()?;
            (our, unpack()?)
        } else {
            let their = unpack()?;
            (import()?, their)
        };
        ours.push(our.0);
        theirs.push(their.0);
        our_memory = our_memory.max(our.1);
        their_memory = their_memory.max(their.1);
        again.push(import()?.0);
        std::fs::remove_dir_all(&store)?;
        std::fs::remove_dir_all(scratch.path().join(format!("bundle-{round}")))?;
    }
    println!(
        "{image}: import {} (again {}, {} MB at most), umoci unpack {} ({} MB at most)",
        told(&mut ours),
        told(&mut again),
        our_memory >> 10,
        told(&mut theirs),
        their_memory >> 10,
    );
    Ok(())
}

/// Time, and the most memory in KiB.
fn measured(mut command: Command) -> Result<(Duration, i64), Box<dyn Error>> {
    let began = Instant::now();
    let child = command.stdout(Stdio::null()).spawn()?;
    let (status, usage) = wait(child.id())?;
    if !status.success() {
        return Err(format!("{command:?} failed").into());
    }
    Ok((began.elapsed(), usage))
}

fn wait(pid: u32) -> Result<(std::process::ExitStatus, i64), Box<dyn Error>> {
    // The kernel's count of the largest child would never go down again.
    let pid = nix::unistd::Pid::from_raw(i32::try_from(pid)?);
    let path = PathBuf::from(format!("/proc/{pid}/status"));
    let mut most = 0;
    loop {
        let text = std::fs::read_to_string(&path).unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let kib = line.and_then(|line| line.trim().trim_end_matches(" kB").parse().ok());
        most = most.max(kib.unwrap_or(0));
        let flags = Some(nix::sys::wait::WaitPidFlag::WNOHANG);
        match nix::sys::wait::waitpid(pid, flags)? {
            nix::sys::wait::WaitStatus::StillAlive => std::thread::sleep(Duration::from_millis(2)),
            nix::sys::wait::WaitStatus::Exited(_, code) => {
                return Ok((std::process::ExitStatus::from_raw(code << 8), most));
            }
            other => return Err(format!("{other:?}").into()),
        }
    }
}

fn writable_layers() -> Result<(), Box<dyn Error>> {
    let scratch = tempfile::tempdir()?;
    let (mut first, mut cloned) = (Vec::new(), Vec::new());
    for round in 0..20 {
        let store = Store::open(&scratch.path().join(format!("store-{round}")))?;
        for times in [&mut first, &mut cloned] {
            let path = scratch.path().join("writable");
            let began = Instant::now();
            store.create_writable(&path, Size::new(10 << 30)?)?;
            times.push(began.elapsed());
            std::fs::remove_file(&path)?;
        }
    }
    println!(
        "writable layer of 10 GiB: first of its size {}, others {}",
        told(&mut first),
        told(&mut cloned)
    );
    Ok(())
}

/// Median and extremes.
fn told(times: &mut [Duration]) -> String {
    times.sort();
    let at = |index: usize| times[index].as_secs_f64() * 1000.0;
    let last = times.len() - 1;
    format!("{:.1} ms ({:.1}–{:.1})", at(last / 2), at(0), at(last))
}
