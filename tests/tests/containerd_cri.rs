//! Pods by Kubernetes' interface: what a kubelet asks of containerd, with our shim as the runtime's handler.

use std::fs;
use std::time::Duration;

use hull_tests::cri::{Cri, HULL, RUNC};
use hull_tests::hull::eventually;

const PATIENCE: Duration = Duration::from_secs(60);
const RUNNING: i32 = 1;
const EXITED: i32 = 2;

/// Wait until a container has a state.
fn becomes(cri: &Cri, id: &str, state: i32) {
    let became = eventually(PATIENCE, || cri.status(id).state == state);
    assert!(became, "{:?}\n{}", cri.status(id), cri.containerd.log());
}

#[test]
fn pod_and_its_container_run_print_execute_count_and_go() {
    let Some(cri) = Cri::with_images(&["busybox"]) else {
        return;
    };
    let pod = cri.pod("web");
    let pod_id = cri.run_pod(HULL, &pod);
    assert!(
        cri.address(&pod_id).starts_with("10.88."),
        "{}",
        cri.address(&pod_id)
    );
    let script = "echo hello; echo oops >&2; exec sleep 1000";
    let id = cri.start(
        &pod_id,
        &pod,
        Cri::container("main", "busybox", &["sh", "-c", script]),
    );
    becomes(&cri, &id, RUNNING);

    assert_eq!(
        cri.exec(&id, &["sh", "-c", "echo in; echo bad >&2; exit 4"]),
        (4, "in".into(), "bad".into())
    );
    assert_eq!(cri.exec(&id, &["hostname"]).1, "web");
    assert!(cri.exec(&id, &["cat", "/etc/hosts"]).1.contains("localhost"));
    let log = cri.containerd.path("logs/web/main.log");
    let logged = eventually(PATIENCE, || {
        let text = fs::read_to_string(&log).unwrap_or_default();
        text.contains(" stdout F hello") && text.contains(" stderr F oops")
    });
    assert!(logged, "{:?}", fs::read_to_string(&log));
    let counted = eventually(PATIENCE, || {
        let answer: hull_tests::cri::ContainerStatsResponse =
            cri.ask("ContainerStats", &Cri::container_request(&id));
        let stats = answer.stats.unwrap_or_default();
        stats.memory.working_set_bytes.value > 0 && stats.cpu.usage_core_nano_seconds.value > 0
    });
    assert!(counted, "{}", cri.containerd.log());

    cri.remove(&id);
    cri.remove_pod(&pod_id);
    assert_eq!(cri.containerd.settle(&[&pod_id, &id]), Vec::<String>::new());
}

#[test]
fn container_that_ends_is_reported_with_its_code_and_can_be_followed_by_another() {
    let Some(cri) = Cri::with_images(&["busybox"]) else {
        return;
    };
    let pod = cri.pod("job");
    let pod_id = cri.run_pod(HULL, &pod);
    let first = cri.start(
        &pod_id,
        &pod,
        Cri::container("first", "busybox", &["sh", "-c", "exit 9"]),
    );
    becomes(&cri, &first, EXITED);
    let status = cri.status(&first);
    assert_eq!((status.exit_code, status.reason.as_str()), (9, "Error"));
    // The end is the microVM's word, the start containerd's own, taken when its call has returned: either may be first.
    assert!(status.finished_at > 0 && status.started_at > 0);
    let second = cri.start(&pod_id, &pod, Cri::container("second", "busybox", &["true"]));
    becomes(&cri, &second, EXITED);
    assert_eq!(
        (cri.status(&second).exit_code, cri.status(&second).reason.as_str()),
        (0, "Completed")
    );
    cri.remove_pod(&pod_id);
    assert_eq!(
        cri.containerd.settle(&[&pod_id, &first, &second]),
        Vec::<String>::new()
    );
}

#[test]
fn pods_shim_serves_all_of_its_containers_and_a_microvm_is_each_ones_own() {
    let Some(cri) = Cri::with_images(&["busybox"]) else {
        return;
    };
    let pod = cri.pod("pair");
    let pod_id = cri.run_pod(HULL, &pod);
    // The pod itself needs none.
    assert_eq!(cri.containerd.processes_of("hull-vmm").len(), 0);
    let start = |name: &str| cri.start(&pod_id, &pod, Cri::container(name, "busybox", &["sleep", "1000"]));
    let (first, second) = (start("one"), start("two"));
    assert_eq!(cri.containerd.processes_of("hull-vmm").len(), 2);
    let shims = |cri: &Cri| {
        let all = cri.containerd.processes();
        all.into_iter()
            .filter(|(_, line)| line.contains(" -namespace k8s.io "))
            .count()
    };
    assert_eq!(shims(&cri), 1);
    let boot = |id: &str| cri.exec(id, &["cat", "/proc/sys/kernel/random/boot_id"]).1;
    assert_ne!(boot(&first), boot(&second));
    cri.remove(&first);
    assert_eq!(cri.exec(&second, &["true"]).0, 0);
    cri.remove_pod(&pod_id);
    assert_eq!(
        cri.containerd.settle(&[&pod_id, &first, &second]),
        Vec::<String>::new()
    );
}

#[test]
fn pods_of_both_runtimes_live_beside_each_other() {
    let Some(cri) = Cri::with_images(&["redis", "busybox"]) else {
        return;
    };
    let (ours, theirs) = (cri.pod("ours"), cri.pod("theirs"));
    let (our_pod, their_pod) = (cri.run_pod(HULL, &ours), cri.run_pod(RUNC, &theirs));
    let sleeper = || Cri::container("main", "busybox", &["sleep", "1000"]);
    let our = cri.start(&our_pod, &ours, sleeper());
    let their = cri.start(&their_pod, &theirs, sleeper());
    let kernel = |id: &str| cri.exec(id, &["uname", "-r"]).1;
    assert_ne!(kernel(&our), kernel(&their));
    cri.remove_pod(&their_pod);
    assert_eq!(cri.exec(&our, &["true"]).0, 0);
    cri.remove_pod(&our_pod);
    assert_eq!(
        cri.containerd.settle(&[&our_pod, &their_pod, &our, &their]),
        Vec::<String>::new()
    );
}

#[test]
fn pod_alone_is_a_process_in_its_network_and_survives_a_restart() {
    let Some(mut cri) = Cri::with_images(&["busybox"]) else {
        return;
    };
    let pod = cri.pod("lonely");
    let pod_id = cri.run_pod(HULL, &pod);
    let address = cri.address(&pod_id);
    assert!(address.starts_with("10.88."), "{address}");
    let processes = cri.containerd.processes();
    let pauses = processes
        .iter()
        .filter(|(_, line)| line.contains(" pause /"))
        .count();
    assert_eq!(pauses, 1, "{processes:?}");
    cri.containerd.restart(nix::sys::signal::Signal::SIGKILL);
    assert_eq!(cri.address(&pod_id), address);
    cri.remove_pod(&pod_id);
    assert_eq!(cri.containerd.settle(&[&pod_id]), Vec::<String>::new());
}

#[test]
fn pod_whose_shim_is_killed_is_not_ready_and_can_be_removed() {
    let Some(cri) = Cri::with_images(&["busybox"]) else {
        return;
    };
    let pod = cri.pod("orphan");
    let pod_id = cri.run_pod(HULL, &pod);
    for (pid, line) in cri.containerd.processes() {
        if line.contains(" -namespace k8s.io ") {
            hull_tests::hull::signal(pid, nix::sys::signal::Signal::SIGKILL);
        }
    }
    let not_ready = eventually(PATIENCE, || {
        let answer: hull_tests::cri::PodStatusResponse =
            cri.ask("PodSandboxStatus", &Cri::pod_request(&pod_id));
        answer.status.state != 0
    });
    assert!(not_ready, "{}", cri.containerd.log());
    cri.remove_pod(&pod_id);
    assert_eq!(cri.containerd.settle(&[&pod_id]), Vec::<String>::new());
}

#[test]
fn processes_that_a_pod_wants_to_share_are_refused_by_name() {
    let Some(cri) = Cri::with_images(&["busybox"]) else {
        return;
    };
    let pod = cri.pod("sharing");
    let pod_id = cri.run_pod(HULL, &pod);
    let mut container = Cri::container("main", "busybox", &["sleep", "1000"]);
    container.linux = None.into();
    let id = cri.create(&pod_id, &pod, container);
    let refused = cri
        .call::<hull_tests::cri::Empty>("StartContainer", &Cri::container_request(&id))
        .expect_err("it can't be started");
    assert!(refused.message.contains("linux.namespaces: pid"), "{refused:?}");
    cri.remove_pod(&pod_id);
    assert_eq!(cri.containerd.settle(&[&pod_id, &id]), Vec::<String>::new());
}
