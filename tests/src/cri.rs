//! A kubelet as small as can be: pods and containers by Kubernetes' Container Runtime Interface.
//!
//! Its calls are gRPC, which is HTTP/2 with a frame of five bytes around each message, and trailers that say how it went; curl
//! speaks that over a Unix socket, so no HTTP stack is linked for the few calls the tests make.

#[allow(missing_docs, missing_debug_implementations, clippy::pedantic, clippy::all)]
mod messages {
    include!(concat!(env!("OUT_DIR"), "/messages/mod.rs"));
}

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use protobuf::{Message, MessageField};

use crate::containerd::{Containerd, Options, Programs, reference};
use crate::hull::finish_within;

pub use messages::cri::{
    ContainerConfig, ContainerMetadata, ContainerRequest, ContainerSecurity, ContainerStatsResponse,
    ContainerStatus, ContainerStatusResponse, CreateContainerRequest, CreateContainerResponse, Empty,
    ExecSyncRequest, ExecSyncResponse, ImageSpec, KeyValue, LinuxContainer, LinuxPod, LinuxResources, Mount,
    NamespaceOptions, PodConfig, PodMetadata, PodRequest, PodSecurity, PodStatusResponse, RunPodRequest,
    RunPodResponse, UpdateContainerRequest,
};

/// One call; a pod's may set up networks.
const TIMEOUT: Duration = Duration::from_secs(180);
/// The handlers' names in the configuration.
pub const HULL: &str = "hull";
pub const RUNC: &str = "runc";
/// A namespace of the container's own; zero would be the pod's.
const OF_THE_CONTAINER: i32 = 1;
/// Where the distribution has the network plugins.
const PLUGINS: &str = "/usr/lib/cni";

/// A daemon that serves the interface, with a network of its own.
#[derive(Debug)]
pub struct Cri {
    pub containerd: Containerd,
}

/// Why a call failed: gRPC's code and words.
#[derive(Debug)]
pub struct Refused {
    pub code: String,
    pub message: String,
}

impl Cri {
    /// With the test images imported, the first of which stands for pods under runc; `None` where the test must be skipped.
    pub fn with_images(images: &[&str]) -> Option<Self> {
        Self::of(Programs::installed(), images)
    }

    /// The same, by other programs.
    pub fn of(programs: Programs, images: &[&str]) -> Option<Self> {
        let folder = tempfile::tempdir().expect("a temporary folder").keep();
        let configuration = configuration(&folder, images.first().copied().unwrap_or("busybox"));
        let options = Options {
            cri: Some(configuration),
            folder: Some(folder),
            ..Options::default()
        };
        let containerd = Containerd::start(programs, options)?;
        for image in images {
            containerd.import(image);
        }
        Some(Self { containerd })
    }

    /// Make a call.
    ///
    /// # Errors
    /// What the daemon says.
    ///
    /// # Panics
    /// The answer can't be understood.
    pub fn call<Answer: Message>(&self, method: &str, request: &impl Message) -> Result<Answer, Refused> {
        let body = request.write_to_bytes().expect("a message of ours");
        let length = u32::try_from(body.len()).expect("a short message");
        let framed = [&[0][..], &length.to_be_bytes(), &body].concat();
        let work = tempfile::tempdir_in(self.containerd.path("tmp")).expect("a temporary folder");
        let path = |name: &str| work.path().join(name);
        fs::write(path("request"), framed).expect("the folder is writable");
        let mut command = Command::new("curl");
        command
            .args([
                "--silent",
                "--show-error",
                "--http2-prior-knowledge",
                "--unix-socket",
            ])
            .arg(self.containerd.address())
            .args([
                "-H",
                "content-type: application/grpc",
                "-H",
                "te: trailers",
                "-H",
                "accept:",
                "-H",
                "expect:",
            ])
            .arg("--data-binary")
            .arg(format!("@{}", path("request").display()))
            .arg("--dump-header")
            .arg(path("headers"))
            .arg("--output")
            .arg(path("answer"))
            .arg(format!("http://localhost/runtime.v1.RuntimeService/{method}"));
        let child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("curl is installed");
        let outcome = finish_within(child, TIMEOUT);
        let headers = fs::read_to_string(path("headers")).unwrap_or_default();
        let header = |name: &str| {
            let value = headers
                .lines()
                .find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
            value.unwrap_or_default().trim().to_owned()
        };
        let code = header("grpc-status");
        if code != "0" {
            let message = header("grpc-message");
            assert!(
                !code.is_empty(),
                "{method}: {outcome:?} {headers}\n{}",
                self.containerd.log()
            );
            return Err(Refused { code, message });
        }
        let answer = fs::read(path("answer")).unwrap_or_default();
        let message = answer.get(5..).unwrap_or_default();
        Ok(Answer::parse_from_bytes(message).expect("an answer of the interface"))
    }

    /// Make a call that is to succeed.
    ///
    /// # Panics
    /// It doesn't; with the daemon's last words.
    pub fn ask<Answer: Message>(&self, method: &str, request: &impl Message) -> Answer {
        self.call(method, request)
            .unwrap_or_else(|refused| panic!("{method}: {refused:?}\n{}", self.containerd.log()))
    }

    /// A pod's configuration, to be changed and run.
    pub fn pod(&self, name: &str) -> PodConfig {
        let logs = self.containerd.path("logs").join(name);
        fs::create_dir_all(&logs).expect("the folder is writable");
        PodConfig {
            metadata: MessageField::some(PodMetadata {
                name: name.to_owned(),
                uid: format!("{name}-uid"),
                namespace: "default".to_owned(),
                ..PodMetadata::default()
            }),
            hostname: name.to_owned(),
            log_directory: logs.display().to_string(),
            linux: MessageField::some(LinuxPod {
                cgroup_parent: format!("/{}", self.containerd.name()),
                ..LinuxPod::default()
            }),
            ..PodConfig::default()
        }
    }

    /// Run a pod; its id.
    pub fn run_pod(&self, handler: &str, pod: &PodConfig) -> String {
        let request = RunPodRequest {
            config: MessageField::some(pod.clone()),
            runtime_handler: handler.to_owned(),
            ..RunPodRequest::default()
        };
        self.ask::<RunPodResponse>("RunPodSandbox", &request)
            .pod_sandbox_id
    }

    /// A container's configuration, to be changed and created.
    pub fn container(name: &str, image: &str, command: &[&str]) -> ContainerConfig {
        ContainerConfig {
            metadata: MessageField::some(ContainerMetadata {
                name: name.to_owned(),
                ..ContainerMetadata::default()
            }),
            image: MessageField::some(ImageSpec {
                image: reference(image),
                ..ImageSpec::default()
            }),
            command: command.iter().map(|word| (*word).to_owned()).collect(),
            log_path: format!("{name}.log"),
            linux: MessageField::some(LinuxContainer {
                security_context: MessageField::some(ContainerSecurity {
                    // As kubelet has it, unless the pod asks to share its processes.
                    namespace_options: MessageField::some(NamespaceOptions {
                        pid: OF_THE_CONTAINER,
                        ..NamespaceOptions::default()
                    }),
                    ..ContainerSecurity::default()
                }),
                ..LinuxContainer::default()
            }),
            ..ContainerConfig::default()
        }
    }

    /// Create a container and start it; its id.
    pub fn start(&self, pod_id: &str, pod: &PodConfig, container: ContainerConfig) -> String {
        let id = self.create(pod_id, pod, container);
        self.ask::<Empty>("StartContainer", &Self::container_request(&id));
        id
    }

    /// Create a container; its id.
    pub fn create(&self, pod_id: &str, pod: &PodConfig, container: ContainerConfig) -> String {
        let request = CreateContainerRequest {
            pod_sandbox_id: pod_id.to_owned(),
            config: MessageField::some(container),
            sandbox_config: MessageField::some(pod.clone()),
            ..CreateContainerRequest::default()
        };
        self.ask::<CreateContainerResponse>("CreateContainer", &request)
            .container_id
    }

    /// What most calls about a container take.
    pub fn container_request(id: &str) -> ContainerRequest {
        ContainerRequest {
            container_id: id.to_owned(),
            ..ContainerRequest::default()
        }
    }

    /// What `ExecSync` takes.
    pub fn exec_request(id: &str, command: &[&str]) -> ExecSyncRequest {
        ExecSyncRequest {
            container_id: id.to_owned(),
            cmd: command.iter().map(|word| (*word).to_owned()).collect(),
            timeout: 120,
            ..ExecSyncRequest::default()
        }
    }

    /// Run a command in a container: its exit code, stdout and stderr.
    pub fn exec(&self, id: &str, command: &[&str]) -> (i32, String, String) {
        let request = Self::exec_request(id, command);
        let answer: ExecSyncResponse = self.ask("ExecSync", &request);
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).trim_end().to_owned();
        (answer.exit_code, text(answer.stdout), text(answer.stderr))
    }

    /// What the daemon knows of a container.
    pub fn status(&self, id: &str) -> ContainerStatus {
        let answer: ContainerStatusResponse = self.ask("ContainerStatus", &Self::container_request(id));
        answer.status.unwrap_or_default()
    }

    /// A pod's address.
    pub fn address(&self, pod_id: &str) -> String {
        let answer: PodStatusResponse = self.ask("PodSandboxStatus", &Self::pod_request(pod_id));
        answer.status.network.ip.clone()
    }

    /// What calls about a pod take.
    pub fn pod_request(id: &str) -> PodRequest {
        PodRequest {
            pod_sandbox_id: id.to_owned(),
            ..PodRequest::default()
        }
    }

    /// Stop a container, whatever it does, and remove it.
    pub fn remove(&self, id: &str) {
        self.ask::<Empty>("StopContainer", &Self::container_request(id));
        self.ask::<Empty>("RemoveContainer", &Self::container_request(id));
    }

    /// Stop a pod and remove it with all of its containers.
    pub fn remove_pod(&self, id: &str) {
        self.ask::<Empty>("StopPodSandbox", &Self::pod_request(id));
        self.ask::<Empty>("RemovePodSandbox", &Self::pod_request(id));
    }
}

/// The daemon's part about the interface: both handlers, and a bridge in the daemon's own network namespace.
fn configuration(folder: &std::path::Path, pause: &str) -> String {
    let networks: PathBuf = folder.join("net.d");
    fs::create_dir_all(&networks).expect("the folder is writable");
    let network = serde_json::json!({
        "cniVersion": "1.0.0",
        "name": "test",
        "plugins": [
            {"type": "bridge", "bridge": "cni0", "isGateway": true, "ipMasq": false,
             "ipam": {"type": "host-local", "dataDir": folder.join("addresses"),
                      "ranges": [[{"subnet": "10.88.0.0/16"}]], "routes": [{"dst": "0.0.0.0/0"}]}},
        ],
    });
    fs::write(networks.join("10-test.conflist"), network.to_string()).expect("the folder is writable");
    let plugin = "[plugins.\"io.containerd.grpc.v1.cri\"";
    format!(
        "{plugin}]\nsandbox_image = \"{image}\"\nrestrict_oom_score_adj = true\ndisable_apparmor = true\n\
         stream_server_address = \"127.0.0.1\"\nstream_server_port = \"0\"\n\
         {plugin}.cni]\nbin_dir = \"{PLUGINS}\"\nconf_dir = \"{networks}\"\n\
         {plugin}.containerd]\ndefault_runtime_name = \"runc\"\n\
         {plugin}.containerd.runtimes.runc]\nruntime_type = \"io.containerd.runc.v2\"\n\
         {plugin}.containerd.runtimes.hull]\nruntime_type = \"io.containerd.hull.v2\"\n\
         pod_annotations = [\"io.hull.*\"]\ncontainer_annotations = [\"io.hull.*\"]\n",
        image = reference(pause),
        networks = networks.display(),
    )
}
