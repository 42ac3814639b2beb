//! Pods that are one microVM: what their containers share, what each has of its own, and that one of them, or whatever makes
//! them on the host, ends without more than what depends on it.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::time::Duration;

use hull_tests::containerd::Programs;
use hull_tests::cri::{
    ContainerConfig, ContainerStatsResponse, Cri, Empty, ExecSyncResponse, HULL, LinuxResources, Mount,
    PodConfig, PodStatusResponse, RunPodRequest, RunPodResponse, UpdateContainerRequest,
};
use hull_tests::hull::{eventually, signal};
use nix::sys::signal::Signal;
use protobuf::MessageField;

const PATIENCE: Duration = Duration::from_secs(60);
const EXITED: i32 = 2;
const KILLED: i32 = 137;
const POD: &str = "io.hull.pod";

/// A daemon, and a pod of one microVM.
struct World {
    cri: Cri,
    pod: PodConfig,
    pod_id: String,
}

impl World {
    /// The first image runs as long as nobody ends it, which is what a pod's sandbox container is to do.
    fn new(name: &str) -> Option<Self> {
        Self::with(name, &[])
    }

    fn with(name: &str, annotations: &[(&str, &str)]) -> Option<Self> {
        Self::of(&["redis", "busybox"], name, annotations)
    }

    fn of(images: &[&str], name: &str, annotations: &[(&str, &str)]) -> Option<Self> {
        let cri = Cri::with_images(images)?;
        let mut pod = cri.pod(name);
        pod.annotations.insert(POD.to_owned(), "microvm".to_owned());
        for (key, value) in annotations {
            pod.annotations.insert((*key).to_owned(), (*value).to_owned());
        }
        let pod_id = cri.run_pod(HULL, &pod);
        Some(Self { cri, pod, pod_id })
    }

    /// A directory of the pod, as an `emptyDir` is.
    fn volume(&self, name: &str) -> PathBuf {
        let path = self.cri.containerd.path("volumes").join(name);
        fs::create_dir_all(&path).expect("a folder of our own");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o777)).expect("a folder of our own");
        path
    }

    fn start(&self, container: ContainerConfig) -> String {
        self.cri.start(&self.pod_id, &self.pod, container)
    }

    fn sleeper(&self, name: &str) -> String {
        self.start(Cri::container(name, "busybox", &["sleep", "1000"]))
    }

    /// What a command prints in a container.
    fn prints(&self, id: &str, script: &str) -> String {
        let (code, out, err) = self.cri.exec(id, &["sh", "-c", script]);
        assert_eq!(code, 0, "{script}: {out} {err}\n{}", self.cri.containerd.log());
        out
    }

    fn becomes(&self, id: &str, state: i32) {
        let became = eventually(PATIENCE, || self.cri.status(id).state == state);
        assert!(became, "{:?}\n{}", self.cri.status(id), self.cri.containerd.log());
    }

    fn vmms(&self) -> Vec<i32> {
        self.cri.containerd.processes_of("hull-vmm")
    }

    /// The process that stands for a container on the host.
    fn monitor(&self, id: &str) -> i32 {
        self.cri.containerd.task(id).expect("it has a task").0
    }

    fn is_ready(&self) -> bool {
        let answer: PodStatusResponse = self.cri.ask("PodSandboxStatus", &Cri::pod_request(&self.pod_id));
        answer.status.state == 0
    }

    /// Removes the pod; nothing is left.
    fn end(self, containers: &[&str]) {
        self.cri.remove_pod(&self.pod_id);
        let ids: Vec<&str> = containers.iter().copied().chain([self.pod_id.as_str()]).collect();
        assert_eq!(self.cri.containerd.settle(&ids), Vec::<String>::new());
    }
}

fn mounted(
    mut container: ContainerConfig,
    host: &std::path::Path,
    at: &str,
    readonly: bool,
) -> ContainerConfig {
    container.mounts.push(Mount {
        container_path: at.to_owned(),
        host_path: host.display().to_string(),
        readonly,
        ..Mount::default()
    });
    container
}

fn limited(mut container: ContainerConfig, memory_bytes: i64) -> ContainerConfig {
    if let Some(linux) = container.linux.as_mut() {
        linux.resources = MessageField::some(LinuxResources {
            memory_limit_in_bytes: memory_bytes,
            ..LinuxResources::default()
        });
    }
    container
}

#[test]
fn containers_share_the_pods_network_memory_and_name_and_no_root_or_processes() {
    let Some(world) = World::with("pair", &[("io.hull.memory_mib", "320")]) else {
        return;
    };
    let server =
        "mkdir /www; echo over localhost >/www/page; echo serving; exec httpd -f -p 127.0.0.1:8080 -h /www";
    let first = world.start(Cri::container("one", "busybox", &["sh", "-c", server]));
    let second = world.sleeper("two");
    assert_eq!(world.vmms().len(), 1, "one microVM for all of the pod");
    let boot = |id: &str| world.prints(id, "cat /proc/sys/kernel/random/boot_id");
    assert_eq!(boot(&first), boot(&second));
    // Of the microVM, less what its kernel keeps for itself.
    let total_kib: u64 = world
        .prints(&second, "awk '/^MemTotal:/ {print $2}' /proc/meminfo")
        .parse()
        .unwrap();
    assert!((250 << 10..320 << 10).contains(&total_kib), "{total_kib}");

    let log = world.cri.containerd.path("logs/pair/one.log");
    let serves = || fs::read_to_string(&log).is_ok_and(|text| text.contains(" stdout F serving"));
    assert!(eventually(PATIENCE, serves));
    let fetched = || {
        let (code, out, _) = world
            .cri
            .exec(&second, &["wget", "-q", "-O", "-", "http://127.0.0.1:8080/page"]);
        code == 0 && out == "over localhost"
    };
    assert!(eventually(PATIENCE, fetched), "{}", world.cri.containerd.log());
    let address = world.cri.address(&world.pod_id);
    for id in [&first, &second] {
        assert!(world.prints(id, "ip addr").contains(&address));
        assert_eq!(world.prints(id, "hostname"), "pair");
    }

    world.prints(&first, "echo remembered >/dev/shm/note; touch /dev/mqueue/queue");
    assert_eq!(world.prints(&second, "cat /dev/shm/note"), "remembered");
    assert_eq!(world.prints(&second, "ls /dev/mqueue"), "queue");
    let namespaces = "for n in ipc net uts; do readlink /proc/self/ns/$n; done";
    assert_eq!(
        world.prints(&first, namespaces),
        world.prints(&second, namespaces)
    );

    world.prints(&first, "echo mine >/only-here");
    assert_eq!(world.cri.exec(&second, &["cat", "/only-here"]).0, 1);
    let processes = world.prints(&second, "ps -o args");
    assert!(
        processes.contains("sleep 1000") && !processes.contains("httpd"),
        "{processes}"
    );
    let own = "for n in pid mnt cgroup; do readlink /proc/self/ns/$n; done";
    let (ours, theirs) = (world.prints(&first, own), world.prints(&second, own));
    assert!(ours.lines().zip(theirs.lines()).all(|(one, other)| one != other));
    world.cri.remove(&first);
    assert_eq!(world.prints(&second, "cat /dev/shm/note"), "remembered");
    world.end(&[&first, &second]);
}

#[test]
fn microvm_has_room_for_the_limits_of_all_containers_as_newer_daemons_tell_them() {
    let Some(programs) = Programs::of_suite("trixie") else {
        return;
    };
    let Some(cri) = Cri::of(programs, &["redis", "busybox"]) else {
        return;
    };
    let mut pod = cri.pod("sized");
    pod.annotations.insert(POD.to_owned(), "microvm".to_owned());
    pod.linux.mut_or_insert_default().resources = MessageField::some(LinuxResources {
        cpu_period: 100_000,
        cpu_quota: 150_000,
        memory_limit_in_bytes: 160 << 20,
        ..LinuxResources::default()
    });
    let pod_id = cri.run_pod(HULL, &pod);
    let start = |name: &str| {
        let container = Cri::container(name, "busybox", &["sleep", "1000"]);
        cri.start(&pod_id, &pod, limited(container, 80 << 20))
    };
    let (one, two) = (start("one"), start("two"));
    let size = "awk '/^MemTotal:/ {print $2}' /proc/meminfo";
    let (_, total_kib, _) = cri.exec(&one, &["sh", "-c", size]);
    // The limits, and what the guest's kernel needs beside, less what it keeps for itself.
    let total_kib: u64 = total_kib.parse().unwrap();
    assert!((160 << 10..224 << 10).contains(&total_kib), "{total_kib}");
    assert_eq!(cri.exec(&two, &["nproc"]).1, "2");
    cri.remove_pod(&pod_id);
    assert_eq!(
        cri.containerd.settle(&[&pod_id, &one, &two]),
        Vec::<String>::new()
    );
}

#[test]
fn volume_of_two_containers_is_one_directory_with_locks_between_them() {
    let Some(world) = World::of(&["redis", "debian-minimal"], "volumes", &[]) else {
        return;
    };
    let shared = world.volume("shared");
    let container = |name: &str, readonly: bool| {
        mounted(
            Cri::container(name, "debian-minimal", &["sleep", "1000"]),
            &shared,
            "/data",
            readonly,
        )
    };
    // The first one may only read, which is no hindrance to those that come later.
    let reader = world.start(container("reader", true));
    let (one, two) = (
        world.start(container("one", false)),
        world.start(container("two", false)),
    );
    world.prints(&one, "echo first >/data/file");
    for id in [&reader, &two] {
        assert_eq!(world.prints(id, "cat /data/file"), "first");
    }
    assert_eq!(fs::read_to_string(shared.join("file")).unwrap(), "first\n");
    assert_ne!(world.cri.exec(&reader, &["touch", "/data/no"]).0, 0);
    assert_eq!(
        world.prints(&one, "stat -c %d:%i /data/file"),
        world.prints(&two, "stat -c %d:%i /data/file")
    );

    // Held until its input ends, which is when the file that says so is there.
    let hold = "flock /data/lock sh -c 'touch /data/held; until [ -e /data/enough ]; do sleep 0.05; done' &";
    world.prints(&one, &format!("({hold}) >/dev/null 2>&1 </dev/null; true"));
    assert!(eventually(PATIENCE, || shared.join("held").exists()));
    assert_eq!(world.cri.exec(&two, &["flock", "-n", "/data/lock", "true"]).0, 1);
    fs::write(shared.join("enough"), "").unwrap();
    world.prints(&two, "flock /data/lock true");

    // What nobody has any more is given up, by the VMM too.
    let vmm = world.vmms()[0];
    let held = || {
        let entries = fs::read_dir(format!("/proc/{vmm}/task")).unwrap();
        let tables = entries.map(|task| task.unwrap().path().join("fd"));
        let links = tables.flat_map(|table| fs::read_dir(table).into_iter().flatten());
        links
            .filter_map(|link| fs::read_link(link.ok()?.path()).ok())
            .any(|target| target.ends_with("file"))
    };
    world.prints(&one, "sleep 1000 </data/file >/dev/null 2>&1 &");
    assert!(eventually(PATIENCE, held));
    for id in [&one, &reader, &two] {
        world.cri.remove(id);
    }
    assert!(!held(), "descriptors of a volume that no container has");
    // And shared anew for the next.
    let later = world.start(container("later", false));
    assert_eq!(world.prints(&later, "cat /data/file"), "first");
    world.end(&[&reader, &one, &two, &later]);
}

#[test]
fn each_container_has_its_own_exit_limits_statistics_and_stops() {
    let Some(world) = World::new("separate") else {
        return;
    };
    let limit = 48 << 20;
    let script = "until [ -e /go ]; do sleep 0.05; done; exec tail /dev/zero";
    let hog = world.start(limited(
        Cri::container("hog", "busybox", &["sh", "-c", script]),
        limit,
    ));
    let other = world.sleeper("other");
    assert_eq!(
        world.prints(&hog, "cat /sys/fs/cgroup/memory.max"),
        limit.to_string()
    );
    let used = |id: &str| -> u64 {
        let answer: ContainerStatsResponse = world.cri.ask("ContainerStats", &Cri::container_request(id));
        answer.stats.memory.working_set_bytes.value
    };
    let counted = || [&hog, &other].iter().all(|id| (1..64 << 20).contains(&used(id)));
    assert!(eventually(PATIENCE, counted), "{} {}", used(&hog), used(&other));
    world.cri.ask::<Empty>(
        "UpdateContainerResources",
        &UpdateContainerRequest {
            container_id: hog.clone(),
            linux: MessageField::some(LinuxResources {
                memory_limit_in_bytes: 64 << 20,
                ..LinuxResources::default()
            }),
            ..UpdateContainerRequest::default()
        },
    );
    assert_eq!(
        world.prints(&hog, "cat /sys/fs/cgroup/memory.max"),
        (64 << 20).to_string()
    );

    // One stands still, the other goes on.
    let ctr = |words: &[&str]| world.cri.containerd.ctr(words);
    ctr(&["task", "pause", &other]);
    assert_eq!(
        world.cri.containerd.task(&other).map(|task| task.1),
        Some("PAUSED".to_owned())
    );
    assert_eq!(world.prints(&hog, "echo on"), "on");
    ctr(&["task", "resume", &other]);
    assert_eq!(world.prints(&other, "echo on"), "on");

    world.prints(&hog, "touch /go");
    world.becomes(&hog, EXITED);
    let status = world.cri.status(&hog);
    assert_eq!((status.exit_code, status.reason.as_str()), (KILLED, "OOMKilled"));
    assert_eq!(world.prints(&other, "echo on"), "on");

    // Another in its place, as a kubelet restarts one; and again, with a code of its own.
    for code in [3, 4] {
        let exit = format!("exit {code}");
        let mut container = Cri::container("hog", "busybox", &["sh", "-c", &exit]);
        container.metadata.mut_or_insert_default().attempt = u32::try_from(code).unwrap();
        let again = world.start(container);
        world.becomes(&again, EXITED);
        assert_eq!(world.cri.status(&again).exit_code, code);
        world.cri.remove(&again);
    }
    assert_eq!(world.vmms().len(), 1);
    // In the order in which they came, and the reverse of that elsewhere.
    world.cri.remove(&hog);
    world.cri.remove(&other);
    assert!(world.is_ready());
    world.end(&[&hog, &other]);
}

#[test]
fn processes_are_shared_where_the_pod_asks_for_it() {
    let Some(world) = World::new("sharing") else {
        return;
    };
    let shared = |name: &str, command: &[&str]| {
        let mut container = Cri::container(name, "busybox", command);
        container.linux = None.into();
        world.start(container)
    };
    let first = shared("one", &["sh", "-c", "sleep 2000 & wait"]);
    let second = shared("two", &["sleep", "3000"]);
    let namespace = "readlink /proc/self/ns/pid";
    assert_eq!(world.prints(&first, namespace), world.prints(&second, namespace));
    let seen = || {
        let list = world.prints(&second, "ps -o pid,args");
        ["redis-server", "sleep 2000", "sleep 3000"]
            .iter()
            .all(|program| list.contains(program))
    };
    assert!(
        eventually(PATIENCE, seen),
        "{}",
        world.prints(&second, "ps -o pid,args")
    );
    // A signal from another container, which takes along what its first process had started.
    let list = world.prints(&second, "ps -o pid,args");
    let shell = list.lines().find(|line| line.contains("sleep 2000 & wait"));
    let pid = shell.and_then(|line| line.split_whitespace().next()).unwrap();
    world.prints(&second, &format!("kill -9 {pid}"));
    world.becomes(&first, EXITED);
    assert_eq!(world.cri.status(&first).exit_code, KILLED);
    let list = world.prints(&second, "ps -o pid,args");
    assert!(
        !list.contains("sleep 2000") && list.contains("sleep 3000"),
        "{list}"
    );

    // One that kills whatever is made, at any moment of its making: others are born all the same, and so is the next.
    let kill = "while :; do for p in /proc/[0-9]*; do p=${p#/proc/}; [ $p -gt $$ ] && kill -9 $p; done; done";
    let hammer = shared("hammer", &["sh", "-c", kill]);
    let mut victims = Vec::new();
    for number in 0..4 {
        let victim = shared(&format!("victim{number}"), &["sleep", "4000"]);
        for _ in 0..5 {
            // It may be killed, which is no error of the microVM's.
            let request = Cri::exec_request(&second, &["true"]);
            drop(world.cri.call::<ExecSyncResponse>("ExecSync", &request));
        }
        world.becomes(&victim, EXITED);
        assert_eq!(world.cri.status(&victim).exit_code, KILLED);
        victims.push(victim);
    }
    world.cri.remove(&hammer);
    assert_eq!(world.prints(&second, "echo on"), "on");
    let others = victims.iter().map(String::as_str);
    let all: Vec<&str> = others.chain([first.as_str(), &second, &hammer]).collect();
    world.end(&all);
}

#[test]
fn whatever_is_killed_takes_along_what_depends_on_it_and_nothing_else() {
    let Some(world) = World::new("crash") else {
        return;
    };
    let (one, two) = (world.sleeper("one"), world.sleeper("two"));
    let pids = |id: &str| world.prints(id, "ls -d /proc/[0-9]* | wc -l");
    assert!(pids(&two).parse::<u32>().unwrap() >= 1);

    // The monitor of one container.
    signal(world.monitor(&one), Signal::SIGKILL);
    world.becomes(&one, EXITED);
    assert_eq!(world.cri.status(&one).exit_code, KILLED);
    assert_eq!(world.prints(&two, "echo on"), "on");
    world.cri.remove(&one);
    let three = world.sleeper("three");
    assert_eq!(world.prints(&three, "echo on"), "on");

    // The VMM.
    signal(world.vmms()[0], Signal::SIGKILL);
    for id in [&two, &three] {
        world.becomes(id, EXITED);
        assert_eq!(world.cri.status(id).exit_code, KILLED);
    }
    assert!(eventually(PATIENCE, || !world.is_ready()));
    world.end(&[&one, &two, &three]);
}

#[test]
fn pod_whose_shim_or_monitor_is_killed_ends_with_all_of_its_containers() {
    for of_the_shim in [true, false] {
        let Some(world) = World::new("orphan") else {
            return;
        };
        let (one, two) = (world.sleeper("one"), world.sleeper("two"));
        if of_the_shim {
            for (pid, line) in world.cri.containerd.processes() {
                if line.contains(" -namespace k8s.io ") {
                    signal(pid, Signal::SIGKILL);
                }
            }
        } else {
            signal(world.monitor(&world.pod_id), Signal::SIGKILL);
        }
        for id in [&one, &two] {
            world.becomes(id, EXITED);
            // Whose shim has gone, has gone for an unknown reason, says containerd.
            let expected = if of_the_shim { 255 } else { KILLED };
            assert_eq!(world.cri.status(id).exit_code, expected);
        }
        assert!(eventually(PATIENCE, || !world.is_ready()));
        assert!(eventually(PATIENCE, || world.vmms().is_empty()));
        world.end(&[&one, &two]);
    }
}

#[test]
fn annotation_that_says_something_else_is_refused_and_nothing_is_left() {
    let Some(cri) = Cri::with_images(&["redis", "busybox"]) else {
        return;
    };
    let mut pod = cri.pod("wrong");
    pod.annotations.insert(POD.to_owned(), "yes".to_owned());
    let request = RunPodRequest {
        config: MessageField::some(pod),
        runtime_handler: HULL.to_owned(),
        ..RunPodRequest::default()
    };
    let refused = cri
        .call::<RunPodResponse>("RunPodSandbox", &request)
        .expect_err("there is no such pod");
    assert!(
        refused.message.contains("annotations.io.hull.pod") && refused.message.contains("microvm"),
        "{refused:?}"
    );
    // Of a container alone, whose pod didn't ask for it.
    let pod = cri.pod("late");
    let pod_id = cri.run_pod(HULL, &pod);
    let mut container = Cri::container("main", "busybox", &["sleep", "1000"]);
    container.annotations.insert(POD.to_owned(), "microvm".to_owned());
    let id = cri.create(&pod_id, &pod, container);
    let refused = cri
        .call::<Empty>("StartContainer", &Cri::container_request(&id))
        .expect_err("its pod isn't one microVM");
    assert!(refused.message.contains("annotations.io.hull.pod"), "{refused:?}");
    cri.remove_pod(&pod_id);
    assert_eq!(cri.containerd.settle(&[&pod_id, &id]), Vec::<String>::new());
}
