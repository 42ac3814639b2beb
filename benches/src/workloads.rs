//! `hull-bench workloads`: what real programs say of their own speed, in a microVM and under runc on the same image.
//!
//! Each workload is a script that prints `FIGURE name value`; a name ends in its unit. Start-up of the container is not in the
//! figures: the script takes its times itself. Both sides have the machine's processors and a writable layer in memory.

use std::path::Path;
use std::process::Stdio;

use anyhow::{Context, Result, bail};
use clap::Args;

use crate::bundle::Bundle;
use crate::harness::{Contender, Figures, interleave};
use crate::report::{RunContext, emit};
use crate::world::{World, succeed};

#[derive(Debug, Args)]
pub struct WorkloadsArgs {
    /// Rounds that count
    #[arg(long, default_value_t = 5)]
    rounds: u32,
    /// Rounds before, not counted
    #[arg(long, default_value_t = 1)]
    warmup: u32,
    /// Only these, by their image
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// vCPUs of each microVM
    #[arg(long, default_value_t = 2)]
    cpus: u8,
}

struct Workload {
    image: &'static str,
    script: &'static str,
}

/// Before each script: `took NAME SINCE` prints the seconds since a reading of the clock.
const PRELUDE: &str = r#"set -e
now() { date +%s.%N; }
took() { echo "FIGURE $1 $(awk "BEGIN { print $(now) - $2 }")"; }
"#;

const WORKLOADS: &[Workload] = &[
    Workload {
        image: "redis",
        script: r#"cd /tmp; redis-server --bind 127.0.0.1 --dir /tmp --save '' --daemonize yes >/dev/null
for i in $(seq 300); do redis-cli ping 2>/dev/null | grep -q PONG && break; sleep 0.1; done
redis-benchmark -q --csv -n 20000 -c 20 -t set,get | tr -d '"' | awk -F, '/^(SET|GET)/ { print "FIGURE redis_" tolower($1) "_per_s " $2 }'
redis-benchmark -q --csv -n 100000 -c 20 -P 16 -t set,get | tr -d '"' | awk -F, '/^(SET|GET)/ { print "FIGURE redis_pipelined_" tolower($1) "_per_s " $2 }'
redis-cli shutdown nosave || true"#,
    },
    Workload {
        image: "postgres",
        script: r#"t=$(now); initdb -U postgres --auth=trust -D "$PGDATA" >/dev/null 2>&1; took postgres_initdb_s $t
pg_ctl -w -l /tmp/log -o '-c listen_addresses=' start >/dev/null; pgbench -U postgres -i -s 2 -q postgres >/dev/null 2>&1
pgbench -U postgres -c 4 -j 2 -T 3 postgres 2>/dev/null | awk '/^tps/ { print "FIGURE pgbench_per_s " $3 }'
pgbench -U postgres -S -c 4 -j 2 -T 3 postgres 2>/dev/null | awk '/^tps/ { print "FIGURE pgbench_read_only_per_s " $3 }'
pg_ctl -w -m fast stop >/dev/null"#,
    },
    Workload {
        image: "openssl",
        script: r#"for what in aes-256-gcm sha256 chacha20-poly1305; do
openssl speed -seconds 1 -bytes 8192 -mr -evp $what 2>/dev/null | awk -F: -v what=$what '/^\+F/ { gsub("-", "_", what); print "FIGURE openssl_" what "_mb_per_s " $4 / 1e6 }'; done
openssl speed -seconds 1 -mr rsa2048 2>/dev/null | awk -F: '/^\+F2/ { print "FIGURE openssl_rsa2048_sign_per_s " ($4 < 1 ? 1 / $4 : $4) }'"#,
    },
    Workload {
        image: "gcc",
        script: r#"cd /usr/src/bzip2; t=$(now); make -j2 >/dev/null 2>&1; took gcc_bzip2_s $t
cd /usr/src/lua5.4; t=$(now); make -j2 linux >/dev/null 2>&1; took gcc_lua_s $t"#,
    },
    Workload {
        image: "sqlite",
        script: r#"t=$(now); speedtest1 --size 5 /tmp/speed.db >/dev/null; took sqlite_speedtest1_s $t"#,
    },
    Workload {
        image: "python",
        script: r#"python3 - <<'EOF'
import time
def took(name, work):
    begin = time.monotonic(); work(); print("FIGURE", name, time.monotonic() - begin)
import numpy as np
a = np.random.default_rng(1).standard_normal((1000, 1000))
took("numpy_matmul_s", lambda: [a @ a for _ in range(5)])
took("numpy_svd_s", lambda: np.linalg.svd(a[:300, :300]))
took("numpy_sort_s", lambda: np.sort(a.ravel()))
def loop():
    n = 0
    for i in range(2000000): n += i % 7
took("python_loop_s", loop)
EOF"#,
    },
    Workload {
        image: "node",
        script: r#"cat >/tmp/bench.js <<'EOF'
const { Worker } = require("worker_threads"), crypto = require("crypto");
const took = async (name, work) => { const t = process.hrtime.bigint(); await work(); console.log("FIGURE", name, Number(process.hrtime.bigint() - t) / 1e9); };
(async () => {
  await took("node_loop_s", () => { let h = 0; for (let i = 0; i < 2e8; i++) h = (Math.imul(h, 31) + i) | 0; return h; });
  await took("node_sha256_s", () => { const b = Buffer.alloc(1 << 20, 1); for (let i = 0; i < 200; i++) crypto.createHash("sha256").update(b).digest(); });
  await took("node_workers_s", () => Promise.all([0, 1, 2, 3].map(() => new Promise((done, failed) => {
    const w = new Worker("let s = 0; for (let i = 0; i < 5e7; i++) s += i % 7; require('worker_threads').parentPort.postMessage(s)", { eval: true });
    w.on("exit", done); w.on("error", failed); }))));
})();
EOF
t=$(now); node -e 0; took node_start_s $t; node /tmp/bench.js"#,
    },
    Workload {
        image: "nginx",
        script: r#"sed -i 's/access_log .*/access_log off;/' /etc/nginx/nginx.conf; nginx; sleep 0.5
ab -q -k -n 20000 -c 8 http://127.0.0.1/ 2>/dev/null | awk '/^Requests per second/ { print "FIGURE nginx_keepalive_per_s " $4 }'
ab -q -n 3000 -c 8 http://127.0.0.1/ 2>/dev/null | awk '/^Requests per second/ { print "FIGURE nginx_connections_per_s " $4 }'
nginx -s quit"#,
    },
];

/// # Errors
/// A workload fails, or the report can't be written.
pub fn run(args: &WorkloadsArgs, out: &Path) -> Result<()> {
    hull_conformance::host::own_mounts()?;
    let chosen: Vec<&Workload> = WORKLOADS
        .iter()
        .filter(|workload| args.only.is_empty() || args.only.iter().any(|name| name == workload.image))
        .collect();
    if chosen.is_empty() {
        bail!(
            "--only names no workload; there are {}",
            WORKLOADS.iter().map(|w| w.image).collect::<Vec<_>>().join(", ")
        );
    }
    let kernel = crate::artifact("HULL_KERNEL")?;
    let images: Vec<&str> = chosen.iter().map(|workload| workload.image).collect();
    let world = World::with_images(&images)?;
    let mut contenders = [
        Contender {
            name: "hull".to_owned(),
            run: Box::new(|| all(&chosen, |workload| in_microvm(&world, workload, args.cpus))),
        },
        Contender {
            name: "runc".to_owned(),
            run: Box::new(|| all(&chosen, under_runc)),
        },
    ];
    let series = interleave(&mut contenders, args.warmup, args.rounds)?;
    drop(contenders);
    let plotted = series
        .values()
        .flat_map(|figures| figures.keys())
        .next()
        .cloned()
        .unwrap_or_default();
    let context = RunContext {
        benchmark: "workloads",
        baseline: "runc",
        guest_kernel: &crate::kernel_hash(&kernel),
        plotted: &plotted,
    };
    for path in emit(&context, &series, out)? {
        println!("  {}", path.display());
    }
    Ok(())
}

fn all(chosen: &[&Workload], run: impl Fn(&Workload) -> Result<String>) -> Result<Figures> {
    let mut figures = Figures::new();
    for workload in chosen {
        let said = run(workload).with_context(|| format!("workload {}", workload.image))?;
        let found = figures_in(&said)?;
        if found.is_empty() {
            bail!("workload {} printed no figure: {said}", workload.image);
        }
        figures.extend(found);
    }
    Ok(figures)
}

fn figures_in(said: &str) -> Result<Figures> {
    let mut figures = Figures::new();
    for line in said.lines() {
        let mut words = line.split_whitespace();
        if words.next() != Some("FIGURE") {
            continue;
        }
        let (name, value) = words
            .next()
            .zip(words.next())
            .with_context(|| format!("{line:?} is no figure"))?;
        let value = value.parse().with_context(|| format!("{line:?} is no figure"))?;
        figures.insert(name.to_owned(), value);
    }
    Ok(figures)
}

fn in_microvm(world: &World, workload: &Workload, cpus: u8) -> Result<String> {
    let script = format!("{PRELUDE}{}", workload.script);
    let cpus = cpus.to_string();
    let output = world.succeed(&[
        "run",
        "--rm",
        "--cpus",
        &cpus,
        "--memory",
        "1g",
        "--entrypoint",
        "/bin/bash",
        workload.image,
        "-c",
        &script,
    ])?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn under_runc(workload: &Workload) -> Result<String> {
    let script = format!("{PRELUDE}{}", workload.script);
    // Unpacked anew, so that no round finds what another has written.
    let bundle = Bundle::of(workload.image)?;
    bundle.configure(&["/bin/bash", "-c", &script])?;
    let output = succeed(bundle.run("runc").stderr(Stdio::piped()))?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_found_among_other_output() {
        let figures = figures_in("hello\nFIGURE a_s 1.5\nFIGURE b_per_s 2e3\n").unwrap();
        assert_eq!(
            figures.into_iter().collect::<Vec<_>>(),
            [("a_s".into(), 1.5), ("b_per_s".into(), 2000.0)]
        );
        assert!(figures_in("FIGURE a_s many").is_err());
    }
}
