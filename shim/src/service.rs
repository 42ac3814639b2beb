//! The Task service: containerd's seventeen calls, each thin on [`Task`].
//!
//! Threads: ttRPC's pool, which grows while calls wait. `Wait` itself takes none: its answer is sent when there is one.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use containerd_shim_protos::Task as TaskService;
use containerd_shim_protos::{
    api, create_task,
    events::task::{TaskCreate, TaskDelete, TaskIO},
    protobuf::{Message as _, MessageField, well_known_types::any::Any},
    topics,
    ttrpc::{self, Code, MethodHandler, Request, Response, TtrpcContext},
    types::{empty::Empty, task::ProcessInfo},
};
use oci_spec::runtime::{LinuxResources, Process as ProcessSpec, Spec};
use sandbox::bundle::PodRole;
use serde::de::DeserializeOwned;

use crate::{
    error::{Result, ShimError},
    layers,
    metrics::{self, Form},
    microvm::{MicroVms, NewMicroVm},
    pause,
    pod::{self, Interfaces, Role},
    process::{Exit, Process, Waiter},
    publisher::{Publisher, timestamp},
    rootfs,
    stdio::StreamNames,
    task::{Body, NewTask, Task},
};

/// The service's two names; the messages are the same.
const SERVICES: [&str; 2] = ["containerd.task.v2.Task", "containerd.task.v3.Task"];
/// What the generated code calls it.
const GENERATED: &str = "containerd.task.v3.Task";

/// All containers of one shim.
#[derive(Debug)]
pub struct Service {
    namespace: String,
    microvms: MicroVms,
    publisher: Publisher,
    interfaces: Arc<Interfaces>,
    /// `None`: being made.
    tasks: Mutex<BTreeMap<String, Option<Arc<Task>>>>,
    on_shutdown: Box<dyn Shutdown>,
}

/// What ends the shim.
pub trait Shutdown: Send + Sync + std::fmt::Debug {
    fn shut_down(&self);
}

type Methods = std::collections::HashMap<String, Box<dyn MethodHandler + Send + Sync>>;

impl Service {
    pub fn new(
        namespace: &str,
        microvms: MicroVms,
        publisher: Publisher,
        on_shutdown: Box<dyn Shutdown>,
    ) -> Arc<Self> {
        Arc::new(Self {
            namespace: namespace.to_owned(),
            microvms,
            publisher,
            interfaces: Arc::default(),
            tasks: Mutex::default(),
            on_shutdown,
        })
    }

    /// What a server registers: every call under both names.
    pub fn methods(self: &Arc<Self>) -> Methods {
        let mut methods = Methods::new();
        for service in SERVICES {
            for (path, handler) in create_task(self.clone()) {
                methods.insert(path.replacen(GENERATED, service, 1), handler);
            }
            let wait = WaitMethod(self.clone());
            methods.insert(format!("/{service}/Wait"), Box::new(wait));
        }
        methods
    }

    fn tasks(&self) -> MutexGuard<'_, BTreeMap<String, Option<Arc<Task>>>> {
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn task(&self, id: &str) -> Result<Arc<Task>> {
        let task = self.tasks().get(id).cloned().flatten();
        task.ok_or_else(|| ShimError::NoContainer { id: id.to_owned() })
    }

    /// Makes a container; its place is taken until it is there or has failed.
    fn make(&self, request: &api::CreateTaskRequest) -> Result<Arc<Task>> {
        if !request.checkpoint.is_empty() {
            return Err(ShimError::Unsupported {
                what: "a container can't be restored from a checkpoint yet",
            });
        }
        {
            let mut tasks = self.tasks();
            if tasks.contains_key(&request.id) {
                return Err(ShimError::Exists {
                    what: "container",
                    id: request.id.clone(),
                });
            }
            tasks.insert(request.id.clone(), None);
        }
        let made = self.make_in_place(request);
        match &made {
            Ok(task) => {
                self.tasks().insert(request.id.clone(), Some(task.clone()));
            }
            Err(_) => {
                self.tasks().remove(&request.id);
                self.interfaces.release(&request.id);
                rootfs::unmount_all(&PathBuf::from(&request.bundle));
            }
        }
        made
    }

    fn make_in_place(&self, request: &api::CreateTaskRequest) -> Result<Arc<Task>> {
        let bundle = PathBuf::from(&request.bundle);
        let path = bundle.join("config.json");
        let text = std::fs::read(&path).map_err(ShimError::io("reading", &path))?;
        let mut spec: Spec =
            serde_json::from_slice(&text).map_err(|source| ShimError::Config { path, source })?;
        let names = StreamNames {
            stdin: request.stdin.clone(),
            stdout: request.stdout.clone(),
            stderr: request.stderr.clone(),
            terminal: request.terminal,
        };
        let role = Role::of(&spec);
        let in_pod = pod::role_in_microvm(&spec, role, |sandbox| self.microvms.is_pods(sandbox))?;
        let (body, init) = if role == Role::Sandbox && in_pod == PodRole::Alone {
            let pod = pause::Pod {
                id: &request.id,
                hostname: spec.hostname().as_deref(),
                network: pod::network_namespace(&spec),
            };
            let child = pause::start(&bundle, &pod)?;
            let init = Process::new(child.id(), crate::stdio::KeptEnds::default());
            (Body::Pod(Mutex::new(child)), init)
        } else {
            if role == Role::Member && in_pod == PodRole::Alone {
                pod::separate(&mut spec, &request.id, &self.interfaces);
            }
            // Containers of a pod's microVM get their shares while it runs, and no disks.
            let mut plan = match in_pod {
                PodRole::Alone => layers::Plan::of(&spec, &request.rootfs),
                _ => layers::Plan::default(),
            };
            match plan.layers {
                Some(_) => rootfs::prepare(&bundle)?,
                None => rootfs::mount_all(&bundle, &request.rootfs)?,
            }
            let mut streams = names.open((&request.id, &self.namespace))?;
            let kept = std::mem::take(&mut streams.kept);
            let made = NewMicroVm {
                id: &request.id,
                bundle: &bundle,
                spec,
                pod: in_pod,
                layers: plan.layers.take(),
            };
            let (microvm, pid) = self.microvms.create(made, streams)?;
            plan.finish();
            (Body::MicroVm(microvm), Process::new(pid, kept))
        };
        let pid = init.pid;
        let new = NewTask {
            id: request.id.clone(),
            namespace: self.namespace.clone(),
            bundle,
            names,
            body,
            init,
        };
        let task = Task::new(new, self.publisher.clone());
        task.publish(topics::TASK_CREATE_EVENT_TOPIC, &created(request, pid));
        let interfaces = self.interfaces.clone();
        task.watch(move |task| interfaces.release(&task.id))?;
        Ok(task)
    }

    fn remove(&self, request: &api::DeleteRequest) -> Result<(u32, Option<Exit>)> {
        let task = self.task(&request.id)?;
        if !request.exec_id.is_empty() {
            return task.delete_exec(&request.exec_id);
        }
        let (pid, exit) = task.delete()?;
        self.tasks().remove(&request.id);
        task.publish(
            topics::TASK_DELETE_EVENT_TOPIC,
            &TaskDelete {
                container_id: request.id.clone(),
                pid,
                exit_status: exit.status,
                exited_at: MessageField::some(timestamp(exit.at)),
                ..TaskDelete::default()
            },
        );
        Ok((pid, Some(exit)))
    }

    fn describe(&self, request: &api::StateRequest) -> Result<api::StateResponse> {
        let task = self.task(&request.id)?;
        let mut state = task.state();
        let names = match request.exec_id.as_str() {
            "" => task.names.clone(),
            exec_id => state.exec(&request.id, exec_id)?.names.clone(),
        };
        let process = state.process(&request.id, &request.exec_id)?;
        Ok(api::StateResponse {
            id: request.id.clone(),
            bundle: task.bundle.display().to_string(),
            pid: process.pid,
            status: process.status.to_wire(),
            stdin: names.stdin,
            stdout: names.stdout,
            stderr: names.stderr,
            terminal: names.terminal,
            exit_status: process.exit.map_or(0, |exit| exit.status),
            exited_at: process.exit.map(|exit| timestamp(exit.at)).into(),
            exec_id: request.exec_id.clone(),
            ..api::StateResponse::default()
        })
    }
}

fn created(request: &api::CreateTaskRequest, pid: u32) -> TaskCreate {
    TaskCreate {
        container_id: request.id.clone(),
        bundle: request.bundle.clone(),
        rootfs: request.rootfs.clone(),
        io: MessageField::some(TaskIO {
            stdin: request.stdin.clone(),
            stdout: request.stdout.clone(),
            stderr: request.stderr.clone(),
            terminal: request.terminal,
            ..TaskIO::default()
        }),
        checkpoint: request.checkpoint.clone(),
        pid,
        ..TaskCreate::default()
    }
}

/// A message that containerd passes as JSON in an `Any`.
fn from_json<T: DeserializeOwned>(any: Option<&Any>, what: &'static str) -> Result<T> {
    let problem = |problem: String| ShimError::Message { what, problem };
    let any = any.ok_or_else(|| problem("there is none".into()))?;
    serde_json::from_slice(&any.value).map_err(|error| problem(error.to_string()))
}

fn size(value: u32) -> u16 {
    u16::try_from(value).unwrap_or(u16::MAX)
}

type Answer<T> = ttrpc::Result<T>;

impl TaskService for Service {
    fn state(&self, _: &TtrpcContext, request: api::StateRequest) -> Answer<api::StateResponse> {
        Ok(self.describe(&request)?)
    }

    fn create(&self, _: &TtrpcContext, request: api::CreateTaskRequest) -> Answer<api::CreateTaskResponse> {
        let task = self.make(&request)?;
        tracing::debug!(id = request.id, "created");
        let pid = task.state().init.pid;
        Ok(api::CreateTaskResponse {
            pid,
            ..api::CreateTaskResponse::default()
        })
    }

    fn start(&self, _: &TtrpcContext, request: api::StartRequest) -> Answer<api::StartResponse> {
        let task = self.task(&request.id)?;
        let pid = match request.exec_id.as_str() {
            "" => task.start()?,
            exec_id => task.start_exec(exec_id)?,
        };
        Ok(api::StartResponse {
            pid,
            ..api::StartResponse::default()
        })
    }

    fn delete(&self, _: &TtrpcContext, request: api::DeleteRequest) -> Answer<api::DeleteResponse> {
        let (pid, exit) = self.remove(&request)?;
        Ok(api::DeleteResponse {
            pid,
            exit_status: exit.map_or(0, |exit| exit.status),
            exited_at: exit.map(|exit| timestamp(exit.at)).into(),
            ..api::DeleteResponse::default()
        })
    }

    /// What runs in the guest has no process on the host; the container as a whole has one.
    fn pids(&self, _: &TtrpcContext, request: api::PidsRequest) -> Answer<api::PidsResponse> {
        let task = self.task(&request.id)?;
        let pid = task.state().init.pid;
        Ok(api::PidsResponse {
            processes: vec![ProcessInfo {
                pid,
                ..ProcessInfo::default()
            }],
            ..api::PidsResponse::default()
        })
    }

    fn pause(&self, _: &TtrpcContext, request: api::PauseRequest) -> Answer<Empty> {
        self.task(&request.id)?.pause()?;
        Ok(Empty::default())
    }

    fn resume(&self, _: &TtrpcContext, request: api::ResumeRequest) -> Answer<Empty> {
        self.task(&request.id)?.resume()?;
        Ok(Empty::default())
    }

    fn checkpoint(&self, _: &TtrpcContext, request: api::CheckpointTaskRequest) -> Answer<Empty> {
        self.task(&request.id)?;
        Err(ShimError::Unsupported {
            what: "checkpoints are not supported yet",
        }
        .into())
    }

    fn kill(&self, _: &TtrpcContext, request: api::KillRequest) -> Answer<Empty> {
        self.task(&request.id)?
            .kill(&request.exec_id, request.signal, request.all)?;
        Ok(Empty::default())
    }

    fn exec(&self, _: &TtrpcContext, request: api::ExecProcessRequest) -> Answer<Empty> {
        let spec: ProcessSpec = from_json(request.spec.as_ref(), "the process to execute")?;
        let names = StreamNames {
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
            terminal: request.terminal,
        };
        self.task(&request.id)?.add_exec(&request.exec_id, spec, names)?;
        Ok(Empty::default())
    }

    fn resize_pty(&self, _: &TtrpcContext, request: api::ResizePtyRequest) -> Answer<Empty> {
        let (rows, columns) = (size(request.height), size(request.width));
        self.task(&request.id)?.resize(&request.exec_id, rows, columns)?;
        Ok(Empty::default())
    }

    fn close_io(&self, _: &TtrpcContext, request: api::CloseIORequest) -> Answer<Empty> {
        if request.stdin {
            self.task(&request.id)?.close_input(&request.exec_id)?;
        }
        Ok(Empty::default())
    }

    fn update(&self, _: &TtrpcContext, request: api::UpdateTaskRequest) -> Answer<Empty> {
        let resources: LinuxResources = from_json(request.resources.as_ref(), "the resources")?;
        self.task(&request.id)?.update(&resources)?;
        Ok(Empty::default())
    }

    fn stats(&self, _: &TtrpcContext, request: api::StatsRequest) -> Answer<api::StatsResponse> {
        let stats = self.task(&request.id)?.stats()?;
        Ok(api::StatsResponse {
            stats: MessageField::some(metrics::encode(&stats, Form::of_host())?),
            ..api::StatsResponse::default()
        })
    }

    fn connect(&self, _: &TtrpcContext, request: api::ConnectRequest) -> Answer<api::ConnectResponse> {
        // A shim without the container answers too: containerd asks before it creates one.
        let task_pid = self.task(&request.id).map_or(0, |task| task.state().init.pid);
        Ok(api::ConnectResponse {
            shim_pid: std::process::id(),
            task_pid,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ..api::ConnectResponse::default()
        })
    }

    fn shutdown(&self, _: &TtrpcContext, request: api::ShutdownRequest) -> Answer<Empty> {
        // Others of the group go on.
        if request.now || self.tasks().is_empty() {
            self.on_shutdown.shut_down();
        }
        Ok(Empty::default())
    }
}

/// `Wait`, whose answer comes when the process has ended; until then no thread is kept.
#[derive(Debug)]
struct WaitMethod(Arc<Service>);

impl MethodHandler for WaitMethod {
    fn handler(&self, context: TtrpcContext, request: Request) -> ttrpc::Result<()> {
        let refuse = |error: ShimError| match ttrpc::Error::from(error) {
            ttrpc::Error::RpcStatus(status) => status,
            other => ttrpc::get_status(Code::UNKNOWN, other.to_string()),
        };
        let stream_id = context.mh.stream_id;
        let found = api::WaitRequest::parse_from_bytes(&request.payload)
            .map_err(|error| ShimError::Message {
                what: "a request to wait",
                problem: error.to_string(),
            })
            .and_then(|request| Ok((self.0.task(&request.id)?, request.exec_id)));
        let (task, exec_id) = match found {
            Ok(found) => found,
            Err(error) => return context.respond(stream_id, failed(refuse(error))),
        };
        // Found before, so that the context isn't needed for an error when the waiter has it.
        if let Err(error) = task.state().process(&task.id, &exec_id).map(drop) {
            return context.respond(stream_id, failed(refuse(error)));
        }
        let connection = context.cancel_rx.clone();
        let waiter = Waiter {
            tell: Box::new(move |exit| {
                // A client that has gone is no loss.
                drop(context.respond(stream_id, waited(exit)));
            }),
            // The connection's reader has ended when its channel has no sender any more: it never sends.
            is_gone: Box::new(move || connection.try_recv().is_err_and(|error| error.is_disconnected())),
        };
        // The process may have been deleted since: the waiter is dropped, and containerd has its answer by the deletion.
        drop(task.wait(&exec_id, waiter));
        Ok(())
    }
}

fn failed(status: ttrpc::Status) -> Response {
    Response {
        status: MessageField::some(status),
        ..Response::default()
    }
}

fn waited(exit: Exit) -> Response {
    let response = api::WaitResponse {
        exit_status: exit.status,
        exited_at: MessageField::some(timestamp(exit.at)),
        ..api::WaitResponse::default()
    };
    match response.write_to_bytes() {
        Ok(payload) => Response {
            status: MessageField::some(ttrpc::get_status(Code::OK, "")),
            payload,
            ..Response::default()
        },
        Err(error) => failed(ttrpc::get_status(Code::UNKNOWN, error.to_string())),
    }
}
