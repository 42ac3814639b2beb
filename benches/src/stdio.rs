//! `hull-bench stdio`: how fast bytes go into and out of a container, by `run` and by `exec`, beside runc.
//!
//! The container says "go" when it is ready and the time is taken from there: to the last byte read from it, or to its word
//! that it has read the last byte given to it. What it prints is text in lines, as of a program that logs; zeroes, of which the
//! log's JSON makes six bytes each, and no log at all are shown beside.

use std::io::{BufRead, BufReader, Read, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use clap::Args;

use crate::bundle::Bundle;
use crate::harness::{Contender, Figures, interleave};
use crate::report::{RunContext, emit};
use crate::world::World;

#[derive(Debug, Args)]
pub struct StdioArgs {
    /// Rounds that count
    #[arg(long, default_value_t = 10)]
    rounds: u32,
    /// Rounds before, not counted
    #[arg(long, default_value_t = 1)]
    warmup: u32,
    /// Bytes each way, in MiB
    #[arg(long, default_value_t = 256)]
    mib: u32,
}

/// # Errors
/// A contender fails, or the report can't be written.
pub fn run(args: &StdioArgs, out: &Path) -> Result<()> {
    hull_conformance::host::own_mounts()?;
    let kernel = crate::artifact("HULL_KERNEL")?;
    let world = World::with_images(&["busybox"])?;
    let _hull_waits = world.waiting("bench", &[])?;
    // One bundle for the container that waits, one for those that come and go.
    let [waits, comes] = [Bundle::of("busybox")?, Bundle::of("busybox")?];
    let _runc_waits = waits.waiting("runc")?;
    let id = waits.id("runc");
    let mib = args.mib;
    let blocks = u64::from(mib) * 16;
    let zeroes = format!("echo go; exec dd if=/dev/zero bs=64k count={blocks} 2>/dev/null");
    let text = format!(
        "yes '2026-01-02T03:04:05 INFO worker=7 handled GET /index.html in 1234 us' | head -c 8388608 >/dev/shm/text; \
         echo go; i=0; while [ $i -lt {} ]; do cat /dev/shm/text; i=$((i+1)); done; rm /dev/shm/text",
        mib / 8
    );
    let scripts = Scripts { zeroes, text };
    let take = "echo go; cat >/dev/null; echo done";
    let mut contenders = [
        Contender {
            name: "hull".to_owned(),
            run: Box::new(|| {
                let run = |script: &str| world.hull(&["run", "--rm", "-i", "busybox", "sh", "-c", script]);
                let exec = |script: &str| world.hull(&["exec", "-i", "bench", "sh", "-c", script]);
                let mut figures = all(mib, &scripts, take, run, exec)?;
                let mut unlogged = world.hull(&[
                    "run",
                    "--rm",
                    "--log-driver",
                    "none",
                    "busybox",
                    "sh",
                    "-c",
                    &scripts.text,
                ]);
                figures.insert(
                    "run_stdout_unlogged_mb_per_s".to_owned(),
                    out_of(&mut unlogged, mib)?,
                );
                Ok(figures)
            }),
        },
        Contender {
            name: "runc".to_owned(),
            run: Box::new(|| {
                let run = |script: &str| {
                    // A failure shows when runc reads it.
                    comes.configure(&["sh", "-c", script]).ok();
                    comes.run("runc")
                };
                let exec = |script: &str| waits.command("runc", &["exec", &id, "sh", "-c", script]);
                all(mib, &scripts, take, run, exec)
            }),
        },
    ];
    let series = interleave(&mut contenders, args.warmup, args.rounds)?;
    drop(contenders);
    let context = RunContext {
        benchmark: "stdio",
        baseline: "runc",
        guest_kernel: &crate::kernel_hash(&kernel),
        plotted: "run_stdout_mb_per_s",
    };
    for path in emit(&context, &series, out)? {
        println!("  {}", path.display());
    }
    Ok(())
}

/// What a container prints.
struct Scripts {
    zeroes: String,
    text: String,
}

fn all(
    mib: u32,
    scripts: &Scripts,
    take: &str,
    run: impl Fn(&str) -> Command,
    exec: impl Fn(&str) -> Command,
) -> Result<Figures> {
    let mut figures = Figures::new();
    let mut insert = |name: &str, rate: f64| figures.insert(format!("{name}_mb_per_s"), rate);
    insert("run_stdout", out_of(&mut run(&scripts.text), mib)?);
    insert("run_stdout_zeroes", out_of(&mut run(&scripts.zeroes), mib)?);
    insert("run_stdin", into(&mut run(take), mib)?);
    insert("exec_stdout", out_of(&mut exec(&scripts.text), mib)?);
    insert("exec_stdout_zeroes", out_of(&mut exec(&scripts.zeroes), mib)?);
    insert("exec_stdin", into(&mut exec(take), mib)?);
    Ok(figures)
}

fn rate(mib: u32, begin: Instant) -> f64 {
    f64::from(mib) * f64::from(1_u32 << 20) / 1e6 / begin.elapsed().as_secs_f64()
}

/// Read everything a command prints after "go".
fn out_of(command: &mut Command, mib: u32) -> Result<f64> {
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start the container")?;
    let mut pipe = child.stdout.take().context("no pipe")?;
    let mut word = [0; 3];
    pipe.read_exact(&mut word).context("the container said nothing")?;
    let begin = Instant::now();
    let mut buffer = vec![0; 1 << 18];
    let mut got = 0_u64;
    loop {
        match pipe.read(&mut buffer).context("cannot read from the container")? {
            0 => break,
            n => got += n as u64,
        }
    }
    let rate = rate(mib, begin);
    ensure!(child.wait()?.success(), "the container failed");
    ensure!(got == u64::from(mib) << 20, "{got} bytes came of {mib} MiB");
    Ok(rate)
}

/// Write into a command that has said "go", until it has said "done".
fn into(command: &mut Command, mib: u32) -> Result<f64> {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start the container")?;
    let mut pipe = child.stdin.take().context("no pipe")?;
    let mut said = BufReader::new(child.stdout.take().context("no pipe")?);
    let mut line = String::new();
    said.read_line(&mut line).context("the container said nothing")?;
    ensure!(line == "go\n", "the container said {line:?}");
    let begin = Instant::now();
    let block = vec![0; 1 << 18];
    for _ in 0..u64::from(mib) * 4 {
        pipe.write_all(&block).context("cannot write to the container")?;
    }
    drop(pipe);
    line.clear();
    said.read_line(&mut line).context("the container said nothing")?;
    let rate = rate(mib, begin);
    ensure!(
        child.wait()?.success() && line == "done\n",
        "the container failed"
    );
    Ok(rate)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_counted_both_ways() {
        let give = |script: &str| {
            let mut command = Command::new("sh");
            command.args(["-c", script]);
            command
        };
        assert!(out_of(&mut give("echo go; head -c 1048576 /dev/zero"), 1).unwrap() > 0.0);
        assert!(out_of(&mut give("echo go; head -c 1000 /dev/zero"), 1).is_err());
        assert!(into(&mut give("echo go; cat >/dev/null; echo done"), 1).unwrap() > 0.0);
        assert!(into(&mut give("echo no"), 1).is_err());
    }
}
