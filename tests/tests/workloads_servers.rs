//! Servers in a microVM, used as people use them: started, asked by clients, stopped, and what they keep is there again.

use std::process::Child;
use std::time::Duration;

use hull_tests::hull::{Hull, Outcome, PATIENCE, eventually, signal, wait_for};
use hull_tests::runc::Bundle;
use nix::sys::signal::Signal;

fn succeed(outcome: &Outcome) -> String {
    assert_eq!(outcome.code(), 0, "{outcome:?}");
    outcome.text()
}

/// A server in the foreground, with `hull exec` into it.
struct Server<'a> {
    hull: &'a Hull,
    name: &'static str,
    child: Child,
}

impl<'a> Server<'a> {
    fn start(hull: &'a Hull, name: &'static str, arguments: &[&str], ready: &[&str]) -> Self {
        let arguments = [&["run", "--rm", "--name", name], arguments].concat();
        let child = hull.command(&arguments).spawn().expect("hull starts");
        let server = Self { hull, name, child };
        let up = eventually(PATIENCE, || server.exec(ready).status.success());
        assert!(up, "{name} never answered");
        server
    }

    fn exec(&self, command: &[&str]) -> Outcome {
        self.hull.run(&[&["exec", self.name], command].concat())
    }

    /// End it as the image says it wants to be ended, and return its exit code.
    fn stop(mut self) -> Option<i32> {
        // A server that logs to its output must not find the pipe full.
        let drained = self
            .child
            .stdout
            .take()
            .zip(self.child.stderr.take())
            .map(|pipes| {
                std::thread::spawn(move || {
                    let (mut out, mut err) = pipes;
                    std::io::copy(&mut out, &mut std::io::sink()).ok();
                    std::io::copy(&mut err, &mut std::io::sink()).ok();
                })
            });
        succeed(&self.hull.run(&["stop", self.name]));
        let status = wait_for(&mut self.child, PATIENCE);
        if let Some(thread) = drained {
            thread.join().ok();
        }
        status.and_then(|status| status.code())
    }
}

#[test]
fn redis_keeps_its_data_across_restarts_of_the_server() {
    let Some(hull) = Hull::with_images(&["redis"]) else {
        return;
    };
    // One container, three lives of the server: its append-only file, then its snapshot, bring everything back.
    const SCRIPT: &str = r#"
set -e; cd /data
start() { redis-server --bind 127.0.0.1 --daemonize yes --dir /data --logfile /data/log "$@" >/dev/null; until redis-cli ping 2>/dev/null | grep -q PONG; do sleep 0.1; done; }
sum() { redis-cli eval "local s = 0 for i = 1, 5000 do s = s + redis.call('get', 'key:' .. i) * i end return s" 0; }
start --appendonly yes --appendfsync always
i=1; while [ $i -le 5000 ]; do echo "set key:$i $((i * 3))"; i=$((i + 1)); done | redis-cli --pipe | tail -n 1
redis-cli rpush list a b c; redis-cli zadd scores 1 one 2 two; redis-cli hset hash f v; sum
kill -9 "$(pidof redis-server)"; while pidof redis-server >/dev/null; do sleep 0.1; done
start --appendonly yes; redis-cli dbsize; sum; redis-cli lrange list 0 -1; redis-cli save; redis-cli shutdown nosave || true
while pidof redis-server >/dev/null; do sleep 0.1; done
rm -r appendonlydir; start --appendonly no; redis-cli dbsize; sum; redis-cli zscore scores two; redis-cli shutdown nosave || true
"#;
    let text = succeed(&hull.run(&["run", "--rm", "--entrypoint", "/bin/sh", "redis", "-c", SCRIPT]));
    let sum: u64 = (1..=5000_u64).map(|i| i * 3 * i).sum();
    let lines: Vec<&str> = text.lines().filter(|line| !line.is_empty()).collect();
    let sum = sum.to_string();
    assert_eq!(
        lines,
        [
            "errors: 0, replies: 5000",
            "3",
            "2",
            "1",
            &sum,
            "5003",
            &sum,
            "a",
            "b",
            "c",
            "OK",
            "5003",
            &sum,
            "2"
        ]
    );
    assert_eq!(hull.settle(), Vec::<String>::new());
}

#[test]
fn redis_serves_many_clients_at_once() {
    let Some(hull) = Hull::with_images(&["redis"]) else {
        return;
    };
    let server = Server::start(&hull, "cache", &["redis"], &["redis-cli", "ping"]);
    let benchmark = [
        "redis-benchmark",
        "-q",
        "-n",
        "5000",
        "-c",
        "50",
        "-P",
        "8",
        "-t",
        "set,get,incr,lpush",
    ];
    let text = succeed(&server.exec(&benchmark));
    assert_eq!(text.matches("requests per second").count(), 4, "{text}");
    assert_eq!(
        succeed(&server.exec(&["redis-cli", "get", "counter:__rand_int__"])),
        "5000"
    );
    assert_eq!(succeed(&server.exec(&["redis-cli", "llen", "mylist"])), "5000");
    assert_eq!(server.stop(), Some(0));
    assert_eq!(hull.settle(), Vec::<String>::new());
}

/// A bank in which money is only moved: whatever pgbench did, the sums of its tables agree.
const POSTGRES: &str = r#"
set -e
initdb -U postgres --auth=trust -D "$PGDATA" >/tmp/initdb 2>&1 || { cat /tmp/initdb >&2; exit 1; }
pg_ctl -w -t 80 -l /tmp/log -o '-c listen_addresses=' start >/dev/null || { cat /tmp/log >&2; exit 1; }
pgbench -U postgres -i -s 1 -q postgres 2>/dev/null
pgbench -U postgres -c 4 -j 2 -t 50 postgres 2>&1 | grep -E 'actually processed|failed'
psql -U postgres -At -c "select (select sum(abalance) from pgbench_accounts) = (select sum(delta) from pgbench_history),
  (select sum(bbalance) from pgbench_branches) = (select sum(tbalance) from pgbench_tellers), (select count(*) from pgbench_history)"
psql -U postgres -At -c "create table t as select i, md5(i::text) as m from generate_series(1, 20000) i" -c "create index on t (m)" \
  -c "select md5(string_agg(m, '' order by m)), count(distinct m) from t" -c "select round(sum(sqrt(i))::numeric, 6) from t"
pg_ctl -w -m immediate stop >/dev/null
pg_ctl -w -t 80 -l /tmp/log -o '-c listen_addresses=' start >/dev/null || { cat /tmp/log >&2; exit 1; }
psql -U postgres -At -c "select count(*) from t" -c "select count(*) from pgbench_history"
grep -c 'database system was not properly shut down' /tmp/log
pg_ctl -w -m fast stop >/dev/null; pg_controldata | grep 'cluster state'
"#;

#[test]
fn postgres_loses_no_money_and_recovers_from_a_crash_as_under_runc() {
    let Some(hull) = Hull::with_images(&["postgres"]) else {
        return;
    };
    let program = ["/bin/bash", "-c", POSTGRES];
    let arguments = [&["run", "--rm", "--cpus", "2", "postgres"], &program[..]].concat();
    let in_microvm = succeed(&hull.run(&arguments));
    assert!(in_microvm.contains("actually processed: 200/200"), "{in_microvm}");
    assert!(in_microvm.contains("\nt|t|200\n"), "{in_microvm}");
    assert_eq!(
        in_microvm,
        succeed(&Bundle::of("postgres").run(&program)),
        "hull (left) and runc differ"
    );
    assert_eq!(hull.settle(), Vec::<String>::new());
}

#[test]
fn nginx_serves_the_bytes_it_was_given() {
    let Some(hull) = Hull::with_images(&["nginx"]) else {
        return;
    };
    let ready = ["busybox", "wget", "-q", "-O", "/dev/null", "http://127.0.0.1/"];
    let server = Server::start(&hull, "web", &["--cpus", "2", "nginx"], &ready);
    let make = "head -c 20000000 /dev/urandom >/var/www/html/big && sha256sum </var/www/html/big";
    let digest = succeed(&server.exec(&["sh", "-c", make]));
    let fetch = "for i in 1 2 3 4; do busybox wget -q -O - http://127.0.0.1/big | sha256sum & done; wait";
    let fetched = succeed(&server.exec(&["sh", "-c", fetch]));
    assert_eq!(fetched.lines().collect::<Vec<_>>(), [digest.as_str(); 4]);
    let text = succeed(&server.exec(&["ab", "-q", "-k", "-n", "400", "-c", "8", "http://127.0.0.1/"]));
    assert!(text.contains("Complete requests:      400"), "{text}");
    assert!(text.contains("Failed requests:        0"), "{text}");
    let missing = succeed(&server.exec(&["sh", "-c", "busybox wget -O - http://127.0.0.1/none 2>&1; true"]));
    assert!(missing.contains("404"), "{missing}");
    // SIGQUIT, which the image names: nginx finishes what it serves and ends by itself.
    assert_eq!(server.stop(), Some(0));
    assert_eq!(hull.settle(), Vec::<String>::new());
}

#[test]
fn server_killed_in_the_middle_of_its_work_leaves_nothing() {
    let Some(hull) = Hull::with_images(&["redis"]) else {
        return;
    };
    let server = Server::start(&hull, "doomed", &["redis"], &["redis-cli", "ping"]);
    let client = hull
        .command(&[
            "exec",
            "doomed",
            "redis-benchmark",
            "-q",
            "-n",
            "100000000",
            "-t",
            "set",
        ])
        .spawn()
        .expect("hull starts");
    std::thread::sleep(Duration::from_millis(300));
    for pid in hull.vmms() {
        signal(pid, Signal::SIGKILL);
    }
    let client = hull_tests::hull::finish(client);
    assert_ne!(client.status.code(), Some(0), "{client:?}");
    let mut child = server.child;
    let status = wait_for(&mut child, PATIENCE).expect("hull ends with its microVM");
    assert_ne!(status.code(), Some(0));
    assert_eq!(hull.settle(), Vec::<String>::new());
}

#[test]
fn redis_keeps_its_data_across_restarts_of_its_container_and_a_power_cut() {
    let Some(hull) = Hull::with_images(&["redis"]) else {
        return;
    };
    let client = |arguments: &[&str]| hull.run(&[&["exec", "db", "redis-cli"], arguments].concat());
    let up = || {
        assert!(
            eventually(PATIENCE, || client(&["ping"]).text() == "PONG"),
            "redis never answered"
        )
    };
    let options = ["run", "-d", "--name", "db", "--storage-opt", "size=64m", "redis"];
    let server = ["--dir", "/data", "--appendonly", "yes", "--appendfsync", "always"];
    succeed(&hull.run(&[&options[..], &server[..]].concat()));
    up();
    assert_eq!(succeed(&client(&["set", "life", "first"])), "OK");
    succeed(&hull.run(&["stop", "db"]));
    assert_eq!(hull.settle(), Vec::<String>::new());
    succeed(&hull.run(&["start", "db"]));
    up();
    assert_eq!(succeed(&client(&["get", "life"])), "first");
    // What was acknowledged is on the host's disk: the microVM may be cut off at any moment after.
    assert_eq!(succeed(&client(&["set", "life", "second"])), "OK");
    for pid in hull.vmms() {
        signal(pid, Signal::SIGKILL);
    }
    assert!(eventually(PATIENCE, || hull.run(&["ps", "-q"]).text().is_empty()));
    succeed(&hull.run(&["start", "db"]));
    up();
    assert_eq!(succeed(&client(&["get", "life"])), "second");
    succeed(&hull.run(&["rm", "-f", "db"]));
    assert_eq!(hull.settle(), Vec::<String>::new());
}
