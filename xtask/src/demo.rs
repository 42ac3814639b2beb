//! `cargo xtask demo`: from nothing to real images running in microVMs, and what each step took.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::artifacts::Artifacts;
use crate::process::{check, output, step};

/// How long redis may take until it answers; far beyond what it takes, so that only a failure reaches it.
const REDIS_TIMEOUT: Duration = Duration::from_secs(60);
const REDIS_NAME: &str = "hull-demo-redis";

/// Steps and how long they took, for the verdict.
#[derive(Default)]
struct Diary {
    lines: Vec<(String, Duration)>,
}

impl Diary {
    fn time<T>(&mut self, what: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
        let begin = Instant::now();
        let outcome = work().with_context(|| format!("this step failed: {what}"))?;
        self.lines.push((what.to_owned(), begin.elapsed()));
        Ok(outcome)
    }
}

/// # Errors
/// The first step that fails, by name.
pub fn run() -> Result<()> {
    if !Path::new("/dev/kvm").exists() {
        bail!(
            "/dev/kvm is not there: this machine offers no KVM (a VM needs nested virtualisation, or the kvm module is not loaded)"
        );
    }
    let mut diary = Diary::default();
    diary.time("install what is missing", || {
        crate::setup::run(crate::setup::Purpose::Demo)
    })?;
    let artifacts = diary.time(
        "guest kernel, agent, VMM, command line",
        crate::artifacts::build_all,
    )?;
    let images = diary.time("images from distribution packages", crate::images::all)?;

    step("import the images: one read-only EROFS blob a layer");
    for image in ["debian-minimal", "redis"] {
        diary.time(&format!("import {image}"), || {
            let source = format!("oci:{}:latest", images.join(image).display());
            check(hull(&artifacts).args(["import", &source, image]))
        })?;
    }
    step("a Debian command in its own microVM");
    let script = "echo \"kernel $(uname -r), $(nproc) vCPU, $(awk '/MemTotal/ {print int($2/1024)}' /proc/meminfo) MiB, \
                  $(. /etc/os-release; echo $PRETTY_NAME), pid $$, user $(id -un)\"";
    let said = diary.time("run debian-minimal", || {
        output(hull(&artifacts).args(["run", "--rm", "debian-minimal", "/bin/sh", "-c", script]))
    })?;
    print!("    {said}");
    step("the same once more, with the time of each part");
    diary.time("run debian-minimal --timing", || {
        check(hull(&artifacts).args(["run", "--rm", "--timing", "debian-minimal", "/bin/true"]))
    })?;
    step("redis in its own microVM");
    diary.time("redis: start, PING, SET, GET, stop", || redis(&artifacts))?;

    println!(
        "\nWhat ran where: host kernel {}",
        std::fs::read_to_string("/proc/sys/kernel/osrelease")?.trim()
    );
    println!("{artifacts}");
    println!("images        {}\n", images.display());
    for (what, took) in &diary.lines {
        println!("{:>9.2} s  {what}", took.as_secs_f64());
    }
    println!("\nverdict: a real image's command and a redis ran, each in its own microVM");
    Ok(())
}

fn hull(artifacts: &Artifacts) -> Command {
    let mut command = Command::new(&artifacts.hull);
    artifacts.environment(&mut command);
    command
}

/// A server that is killed when the demo stops half-way.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        // `hull` removes the microVM when it gets the signal; after a clean end both calls find nothing to do.
        if let Ok(pid) = i32::try_from(self.0.id())
            && self.0.try_wait().is_ok_and(|status| status.is_none())
        {
            nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGTERM).ok();
        }
        self.0.wait().ok();
    }
}

fn redis(artifacts: &Artifacts) -> Result<()> {
    let mut server = Server(
        hull(artifacts)
            .args(["run", "--rm", "--name", REDIS_NAME, "redis"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .context("cannot start hull")?,
    );
    let client = |arguments: &[&str]| {
        let mut command = hull(artifacts);
        command.args(["exec", REDIS_NAME, "redis-cli"]).args(arguments);
        command
    };
    let begin = Instant::now();
    loop {
        let answer = client(&["ping"])
            .stderr(Stdio::null())
            .output()
            .context("cannot start hull")?;
        if answer.stdout == b"PONG\n" {
            break;
        }
        if let Some(status) = server.0.try_wait()? {
            bail!("the redis container ended early: {status}");
        }
        if begin.elapsed() > REDIS_TIMEOUT {
            bail!("redis did not answer PING in {} s", REDIS_TIMEOUT.as_secs());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    println!(
        "    PING: PONG after {:.0} ms",
        begin.elapsed().as_secs_f64() * 1000.0
    );
    let value = format!("kept by a microVM at {}", std::process::id());
    let set = output(&mut client(&["set", "demo", &value]))?;
    let got = output(&mut client(&["get", "demo"]))?;
    println!("    SET: {}  GET: {}", set.trim(), got.trim());
    if got.trim() != value {
        bail!("redis returned {got:?} for {value:?}");
    }
    Ok(())
}
