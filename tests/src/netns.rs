//! Network namespaces of a test's own: what is made in them is gone with them, and the machine's own network is never
//! touched.

use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crate::hull::{Hull, Outcome, eventually, finish};

/// A network namespace, kept by a process that does nothing else.
#[derive(Debug)]
pub struct Netns {
    keeper: Child,
}

impl Default for Netns {
    fn default() -> Self {
        Self::new()
    }
}

impl Netns {
    /// A fresh one with its loopback up.
    ///
    /// # Panics
    /// If this user may not make one.
    pub fn new() -> Self {
        let keeper = Command::new("unshare")
            .args([
                "--net",
                "--",
                "sh",
                "-c",
                "ip link set lo up && exec sleep 1000000",
            ])
            .stdin(Stdio::null())
            .spawn()
            .expect("unshare is there");
        let netns = Self { keeper };
        let ready = eventually(Duration::from_secs(10), || {
            let link = netns.run("cat /proc/net/dev_snmp6/lo >/dev/null && ip -o link show lo up");
            std::fs::read_link(netns.path()).ok() != std::fs::read_link("/proc/self/ns/net").ok()
                && link.text().contains("UP")
        });
        assert!(ready, "no network namespace: this test needs root");
        netns
    }

    /// Its file.
    pub fn path(&self) -> String {
        format!("/proc/{}/ns/net", self.keeper.id())
    }

    /// Its keeper, which stands for it in `ip link … netns PID`.
    pub fn pid(&self) -> u32 {
        self.keeper.id()
    }

    /// A program in it, not started yet.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command
            .arg(format!("--net={}", self.path()))
            .arg("--")
            .arg(program)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    /// A line of shell in it, to its end.
    pub fn run(&self, line: &str) -> Outcome {
        let child = self.command("sh").args(["-c", line]).spawn();
        finish(child.expect("nsenter is there"))
    }

    /// The same; it must succeed.
    ///
    /// # Panics
    /// If it fails.
    pub fn must(&self, line: &str) -> String {
        let outcome = self.run(line);
        assert_eq!(outcome.code(), 0, "{line}: {outcome:?}");
        outcome.text()
    }

    /// `hull ARGUMENTS` in it, not started yet.
    pub fn hull(&self, hull: &Hull, arguments: &[&str]) -> Command {
        let inner = hull.command(arguments);
        let mut command = self.command(&inner.get_program().to_string_lossy());
        command.args(inner.get_args());
        for (name, value) in inner.get_envs() {
            if let Some(value) = value {
                command.env(name, value);
            }
        }
        command
    }

    /// `hull ARGUMENTS` in it, to its end.
    pub fn run_hull(&self, hull: &Hull, arguments: &[&str]) -> Outcome {
        finish(self.hull(hull, arguments).spawn().expect("hull starts"))
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        drop(self.keeper.kill());
        drop(self.keeper.wait());
    }
}
