//! Containers in networks of ours, in a network namespace that each test makes: reached from the host, from each other and
//! by name, kept to their own addresses, and gone without a trace.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::time::Duration;

use hull_tests::hull::{Hull, Outcome, eventually, signal};
use hull_tests::netns::Netns;
use nix::sys::signal::Signal;
use serde_json::Value;

const PATIENCE: Duration = Duration::from_secs(60);

/// A world with a namespace of its own.
struct World {
    // Dropped first: containers end before the namespace goes.
    hull: Hull,
    netns: Netns,
}

impl World {
    fn new(images: &[&str]) -> Option<Self> {
        let hull = Hull::with_images(images)?;
        Some(Self {
            hull,
            netns: Netns::new(),
        })
    }

    fn run(&self, arguments: &[&str]) -> Outcome {
        self.netns.run_hull(&self.hull, arguments)
    }

    fn must(&self, arguments: &[&str]) -> String {
        let outcome = self.run(arguments);
        assert_eq!(outcome.code(), 0, "{arguments:?}: {outcome:?}");
        outcome.text()
    }

    /// A container that does nothing, with more options.
    fn idle(&self, name: &str, options: &[&str]) {
        let begin = ["run", "--detach", "--rm", "--name", name];
        let end = ["busybox", "sleep", "1000000"];
        self.must(&[&begin, options, &end[..]].concat());
    }

    fn exec(&self, name: &str, line: &str) -> Outcome {
        self.run(&["exec", name, "sh", "-c", line])
    }

    fn must_exec(&self, name: &str, line: &str) -> String {
        let outcome = self.exec(name, line);
        assert_eq!(outcome.code(), 0, "{name}: {line}: {outcome:?}");
        outcome.text()
    }

    fn inspect(&self, name: &str) -> Value {
        let text = self.must(&["inspect", name]);
        serde_json::from_str::<Value>(&text).unwrap()[0]["NetworkSettings"].clone()
    }

    fn address(&self, name: &str) -> String {
        self.inspect(name)["IPAddress"].as_str().unwrap().to_owned()
    }

    /// What is left of containers in namespace and state: taps, leases, elements of sets.
    fn traces(&self) -> Vec<String> {
        let links = self.netns.must("ip -o link show");
        let mut traces: Vec<String> = links
            .lines()
            .filter(|line| line.contains(": hv"))
            .map(str::to_owned)
            .collect();
        let rules = self.netns.must("nft list ruleset");
        traces.extend(
            rules
                .lines()
                .filter(|line| line.contains("\"hv"))
                .map(str::to_owned),
        );
        let leases = self.hull.store_dir().join("networks/hull0/leases");
        traces.extend(
            std::fs::read_dir(leases)
                .into_iter()
                .flatten()
                .map(|entry| entry.unwrap().path().display().to_string()),
        );
        traces
    }
}

#[test]
fn published_nginx_is_fetched_whole_from_the_host() {
    let Some(world) = World::new(&["nginx"]) else {
        return;
    };
    world.must(&[
        "run",
        "--detach",
        "--name",
        "web",
        "--memory",
        "768m",
        "-p",
        "8080:80",
        "-p",
        "127.0.0.1:8081:80",
        "nginx",
    ]);
    let make = "head -c 268435456 /dev/urandom >/var/www/html/big && sha256sum </var/www/html/big";
    let digest = world.must_exec("web", make);
    let address = world.address("web");
    for url in [
        "127.0.0.1:8080",
        "127.0.0.1:8081",
        address.as_str(),
        "$(hostname -I | cut -d' ' -f1):8080",
    ] {
        let url = url.replace("$(hostname -I | cut -d' ' -f1)", &gateway(&world));
        let fetched = world
            .netns
            .must(&format!("curl -sf --max-time 120 http://{url}/big | sha256sum"));
        assert_eq!(fetched, digest, "{url}");
    }
    // Only at the address it was published at.
    let elsewhere = world
        .netns
        .run(&format!("curl -sf --max-time 3 http://{}:8081/", gateway(&world)));
    assert_ne!(elsewhere.code(), 0);
    let taken = world.run(&["run", "--rm", "-p", "8080:80", "nginx"]);
    assert_eq!(taken.code(), 125);
    assert!(taken.stderr.contains("8080"), "{taken:?}");
    let ports = &world.inspect("web")["Ports"]["80/tcp"];
    assert_eq!(ports[0]["HostPort"], "8080");
    world.must(&["rm", "--force", "web"]);
    assert_eq!(world.traces(), Vec::<String>::new());
    world.must(&["network", "rm", "hull0"]);
    let left = world.netns.must("ip -o link show; nft list tables");
    assert!(!left.contains("hull"), "{left}");
}

fn gateway(world: &World) -> String {
    let text = world.must(&["network", "inspect", "hull0"]);
    let value: Value = serde_json::from_str(&text).unwrap();
    value[0]["IPAM"]["Config"][0]["Gateway"]
        .as_str()
        .unwrap()
        .to_owned()
}

#[test]
fn datagrams_reach_a_published_port_and_come_back() {
    let Some(world) = World::new(&["python"]) else {
        return;
    };
    const ECHO: &str = "import socket\ns = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\ns.bind(('', 53))\n\
                        while True:\n    data, peer = s.recvfrom(65536)\n    s.sendto(data[::-1], peer)";
    const ASK: &str = "import socket, sys\ns = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\ns.settimeout(2)\n\
                       s.connect((sys.argv[1], 5353))\ns.send(bytes(range(256)) * 40)\n\
                       print(s.recv(65536) == (bytes(range(256)) * 40)[::-1])";
    let run = ["run", "--detach", "--rm", "--name", "echo", "-p", "5353:53/udp"];
    world.must(&[&run[..], &["--entrypoint", "python3", "python", "-c", ECHO]].concat());
    let gateway = gateway(&world);
    for address in ["127.0.0.1", &gateway] {
        let answered = eventually(PATIENCE, || {
            let mut ask = world.netns.command("python3");
            let output = ask.args(["-c", ASK, address]).output().unwrap();
            output.stdout == b"True\n"
        });
        assert!(answered, "{address}");
    }
}

#[test]
fn containers_find_each_other_by_address_and_by_name() {
    let Some(world) = World::new(&["busybox"]) else {
        return;
    };
    world.must(&["network", "create", "--subnet", "10.77.0.0/24", "back"]);
    world.idle(
        "first",
        &[
            "--network",
            "back",
            "--network-alias",
            "store",
            "--ip",
            "10.77.0.77",
        ],
    );
    world.idle(
        "second",
        &["--network", "back", "--add-host", "host.internal:host-gateway"],
    );
    for name in ["first", "store", "10.77.0.77", "host.internal"] {
        world.must_exec("second", &format!("ping -c 1 -W 5 {name}"));
    }
    let back = world.address("second");
    world.must_exec("first", &format!("ping -c 1 -W 5 {back}"));
    // Another network is another world.
    world.idle("stranger", &["--network", "default"]);
    assert_ne!(world.exec("stranger", "ping -c 1 -W 2 10.77.0.77").code(), 0);
    let busy = world.run(&["network", "rm", "back"]);
    assert!(
        busy.code() == 1 && busy.stderr.contains("2 containers"),
        "{busy:?}"
    );
    let same = world.run(&[
        "run",
        "--rm",
        "--network",
        "back",
        "--ip",
        "10.77.0.77",
        "busybox",
        "true",
    ]);
    assert!(same.code() == 125 && same.stderr.contains("--ip"), "{same:?}");
}

#[test]
fn guest_is_kept_to_its_own_addresses_and_off_the_metadata() {
    let Some(world) = World::new(&["busybox"]) else {
        return;
    };
    world.idle("good", &["--network", "hull0"]);
    world.idle("evil", &["--network", "hull0", "--privileged"]);
    let (good, gateway) = (world.address("good"), gateway(&world));
    // The host could be asked for it; nothing may get there.
    world.netns.must("ip address add 169.254.169.254/32 dev lo");
    world
        .netns
        .must("ping -c 1 -W 2 169.254.169.254 >/dev/null 2>&1 || busybox ping -c 1 -W 2 169.254.169.254");
    world.must_exec(
        "evil",
        &format!("ping -c 1 -W 5 {good} && ping -c 1 -W 5 {gateway}"),
    );
    assert_ne!(world.exec("evil", "ping -c 1 -W 2 169.254.169.254").code(), 0);
    // Another address of the same network, and a neighbour's.
    let stolen = format!("{}.250.250", good.rsplitn(3, '.').last().unwrap());
    for address in [stolen.as_str(), good.as_str()] {
        let spoof = format!(
            "ip address add {address}/32 dev eth0; ping -c 1 -W 2 -I {address} {gateway}; code=$?; \
             arping -c 1 -w 2 -I eth0 -s {address} {gateway}; arp=$?; \
             ip address del {address}/32 dev eth0; [ $code -ne 0 ] && [ $arp -ne 0 ]"
        );
        world.must_exec("evil", &spoof);
    }
    // Another MAC.
    let mac = "old=$(cat /sys/class/net/eth0/address); ip link set eth0 address 02:00:00:00:00:99; \
               ping -c 1 -W 2 GATEWAY; code=$?; ip link set eth0 address $old; [ $code -ne 0 ]";
    world.must_exec("evil", &mac.replace("GATEWAY", &gateway));
    // What loops back on the host.
    let local = world.exec(
        "evil",
        "ip route add 127.0.0.2/32 via GATEWAY 2>/dev/null; ping -c 1 -W 2 -I eth0 127.0.0.2",
    );
    assert_ne!(local.code(), 0);
    world.must_exec("evil", &format!("ping -c 1 -W 5 {good}"));
}

#[test]
fn mtu_is_that_of_the_network() {
    let Some(world) = World::new(&["busybox"]) else {
        return;
    };
    for mtu in [9000_u32, 1280] {
        let name = format!("mtu{mtu}");
        world.must(&["network", "create", "--mtu", &mtu.to_string(), &name]);
        world.idle(&format!("a{mtu}"), &["--network", &name]);
        let b = format!("b{mtu}");
        world.idle(&b, &["--network", &name]);
        assert_eq!(
            world.must_exec(&b, "cat /sys/class/net/eth0/mtu"),
            mtu.to_string()
        );
        // The largest that fits; and a larger one in pieces. (Where the host filters bridges by its IP tables too, its kernel
        // can't put pieces of more than 1500 bytes together again between two ports.)
        world.must_exec(&b, &format!("ping -c 1 -W 5 -s {} a{mtu}", mtu - 28));
        let gateway = world.inspect(&b)["Gateway"].as_str().unwrap().to_owned();
        world.must_exec(&b, &format!("ping -c 1 -W 5 -s 20000 {gateway}"));
    }
}

#[test]
fn many_containers_share_a_bridge() {
    let Some(world) = World::new(&["busybox"]) else {
        return;
    };
    let names: Vec<String> = (0..8).map(|index| format!("c{index}")).collect();
    for name in &names {
        world.idle(name, &["--network", "hull0", "--memory", "96m"]);
    }
    let addresses: Vec<String> = names.iter().map(|name| world.address(name)).collect();
    let mut distinct = addresses.clone();
    distinct.sort();
    distinct.dedup();
    assert_eq!(distinct.len(), names.len());
    let line = addresses
        .iter()
        .map(|address| format!("ping -c 1 -W 5 {address}"))
        .collect::<Vec<_>>()
        .join(" && ");
    for name in &names {
        world.must_exec(name, &line);
    }
}

#[test]
fn nothing_is_left_of_what_was_killed() {
    let Some(world) = World::new(&["busybox"]) else {
        return;
    };
    for victim in ["monitor", "vmm", "both"] {
        world.idle("doomed", &["-p", "9000:90"]);
        assert!(!world.traces().is_empty());
        if victim != "vmm" {
            world
                .hull
                .monitors()
                .iter()
                .for_each(|pid| signal(*pid, Signal::SIGKILL));
        }
        if victim != "monitor" {
            world
                .hull
                .vmms()
                .iter()
                .for_each(|pid| signal(*pid, Signal::SIGKILL));
        }
        assert!(eventually(PATIENCE, || world.hull.vmms().is_empty()));
        let clean = eventually(PATIENCE, || {
            world.must(&["ps", "--all", "--quiet"]).is_empty() && world.traces().is_empty()
        });
        assert!(clean, "{victim}: {:?}", world.traces());
    }
    // The host's own rules are as they were.
    world
        .netns
        .must("nft add table inet mine && nft add chain inet mine c");
    world.idle("last", &["-p", "9000:90"]);
    world.must(&["rm", "--force", "last"]);
    world.must(&["network", "rm", "hull0"]);
    assert_eq!(world.netns.must("nft list tables"), "table inet mine");
}

/// As a CNI plugin leaves it: a namespace whose only interface is one end of a veth pair.
fn pod(mtu: u32) -> (Netns, Netns) {
    let (pod, host) = (Netns::new(), Netns::new());
    host.must(&format!(
        "ip link add veth0 mtu {mtu} type veth peer name eth0 mtu {mtu} netns {} && ip address add 10.1.0.1/24 dev veth0 \
         && ip -6 address add fd01::1/64 dev veth0 nodad && ip link set veth0 up",
        pod.pid()
    ));
    pod.must(
        "ip link set eth0 address 0a:58:0a:01:00:05 && ip address add 10.1.0.5/24 dev eth0 && ip link set eth0 up \
         && ip -6 address add fd01::5/64 dev eth0 nodad && ip route add default via 10.1.0.1 \
         && ip -6 route add default via fd01::1 && ip route add 10.9.0.0/16 via 10.1.0.1 metric 50 \
         && ip neighbour add 10.1.0.9 lladdr 02:00:00:00:00:09 dev eth0 nud permanent",
    );
    (pod, host)
}

#[test]
fn interfaces_of_a_given_namespace_are_the_guests() {
    let Some(world) = World::new(&["busybox"]) else {
        return;
    };
    let (pod, host) = pod(1400);
    let network = format!("ns:{}", pod.path());
    world.idle("pod", &["--network", &network, "--privileged"]);
    let shown = world.must_exec(
        "pod",
        "ip address show eth0; ip route; ip -6 route; ip neigh show nud permanent",
    );
    for part in [
        "0a:58:0a:01:00:05",
        "10.1.0.5/24",
        "fd01::5/64",
        "mtu 1400",
        "default via 10.1.0.1",
        "10.9.0.0/16 via 10.1.0.1",
        "default via fd01::1",
        "10.1.0.9",
    ] {
        assert!(shown.contains(part), "{part}: {shown}");
    }
    world.must_exec(
        "pod",
        "ping -c 1 -W 5 10.1.0.1 && ping -6 -c 1 -W 5 fd01::1 && ping -c 1 -W 5 -s 6000 10.1.0.1",
    );
    host.must("busybox ping -c 1 -W 5 10.1.0.5 && busybox ping -6 -c 1 -W 5 fd01::5");
    // A second microVM can't have the same interface.
    let second = world.run(&["run", "--rm", "--network", &network, "busybox", "true"]);
    assert!(
        second.code() == 125 && second.stderr.contains("eth0"),
        "{second:?}"
    );
    host.must("busybox ping -c 1 -W 5 10.1.0.5");
    let bytes = "head -c 50000000 /dev/urandom | tee /tmp/sent | sha256sum";
    let digest = world.must_exec("pod", bytes);
    world.must_exec("pod", "busybox httpd -p 7000 -h /tmp");
    let fetched = host.must("curl -sf --max-time 120 http://10.1.0.5:7000/sent | sha256sum");
    assert_eq!(fetched, digest);
    world.must(&["rm", "--force", "pod"]);
    let left = pod.must(
        "ip -o link show; tc qdisc show dev eth0; tc filter show dev eth0 parent ffff: 2>/dev/null; true",
    );
    assert!(
        !left.contains("hulltap") && !left.contains("ingress") && !left.contains("mirred"),
        "{left}"
    );
    // The namespace's own stack has its interface back.
    pod.must("busybox ping -c 1 -W 5 10.1.0.1");
}

#[test]
fn killed_microvm_gives_the_namespace_back() {
    let Some(world) = World::new(&["busybox"]) else {
        return;
    };
    let (pod, _host) = pod(1500);
    let network = format!("ns:{}", pod.path());
    world.idle("pod", &["--network", &network]);
    let pids = [world.hull.monitors(), world.hull.vmms()].concat();
    pids.iter().for_each(|pid| signal(*pid, Signal::SIGKILL));
    assert!(eventually(PATIENCE, || world.hull.processes().is_empty()));
    let given_back = eventually(PATIENCE, || {
        world.must(&["ps", "--all"]);
        let left = pod.must("ip -o link show; tc qdisc show dev eth0");
        !left.contains("hulltap") && !left.contains("ingress")
    });
    assert!(given_back);
    pod.must("busybox ping -c 1 -W 5 10.1.0.1");
    world.idle("pod", &["--network", &network]);
    world.must_exec("pod", "ping -c 1 -W 5 10.1.0.1");
}
