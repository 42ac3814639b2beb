//! One function per method: from the checked message to the containers and back.

use std::{
    fs::File,
    io::{self, BufReader, BufWriter, Read as _},
    sync::Arc,
};

use agent_protocol::{
    Archive, ArchiveRequest, CloseStdin, ConfigureNetwork, Connect, ConnectRequest, ConnectResponse,
    CreateContainer, CreateExec, DecodeError, Empty, Extract, ExtractRequest, FreezeContainer, GetStats,
    ListProcesses, ListProcessesResponse, Method, PROTOCOL_VERSION, PathStat, ProcessRef, RemoveContainer,
    ResizeTty, SERVICE, Shutdown, SignalProcess, StartProcess, StartProcessResponse, StatPath,
    UpdateContainer, WaitProcess, decode,
    envelope::Request,
    stdio::{Stream, StreamHeader},
};

/// One read or write of an archive.
const STREAM_BUFFER_BYTES: usize = 64 * 1024;

use super::{BootTimes, Responder};
use crate::{containers::Containers, error::AgentError, files, init, log::log, network};

/// One connection's state.
#[derive(Debug)]
pub(super) struct Connection {
    containers: Arc<Containers>,
    boot: BootTimes,
    /// The version was agreed on.
    connected: bool,
}

fn decode_as<M: Method>(request: &Request) -> Result<M::Request, AgentError> {
    decode::<M::Request>(&request.payload).map_err(|error| match error {
        DecodeError::Invalid(invalid) => AgentError::Invalid(invalid),
        _ => AgentError::Malformed,
    })
}

fn process_ref(container_id: &str, exec_id: &str) -> ProcessRef {
    ProcessRef {
        container_id: container_id.to_owned(),
        exec_id: exec_id.to_owned(),
        ..ProcessRef::default()
    }
}

impl Connection {
    pub(super) fn new(containers: Arc<Containers>, boot: BootTimes) -> Self {
        Self {
            containers,
            boot,
            connected: false,
        }
    }

    /// Handles one request; answers it unless it returns an error.
    pub(super) fn handle(&mut self, request: &Request, responder: &Responder) -> Result<(), AgentError> {
        let method = request.method.as_str();
        let unknown = || AgentError::UnknownMethod {
            method: format!("{}/{method}", request.service),
        };
        if request.service != SERVICE {
            return Err(unknown());
        }
        if method == Connect::NAME {
            let response = self.connect(&decode_as::<Connect>(request)?)?;
            responder.succeed(&response);
            return Ok(());
        }
        if !self.connected {
            return Err(AgentError::WrongState {
                id: method.to_owned(),
                state: "not allowed before Connect",
            });
        }
        let containers = &self.containers;
        match method {
            CreateContainer::NAME => {
                containers.create(decode_as::<CreateContainer>(request)?)?;
                responder.succeed(&Empty::default());
            }
            CreateExec::NAME => {
                containers.create_exec(&decode_as::<CreateExec>(request)?)?;
                responder.succeed(&Empty::default());
            }
            StartProcess::NAME => {
                let pid = containers.start(&decode_as::<StartProcess>(request)?)?;
                responder.succeed(&StartProcessResponse {
                    pid,
                    ..StartProcessResponse::default()
                });
            }
            SignalProcess::NAME => {
                let signal = decode_as::<SignalProcess>(request)?;
                let process = process_ref(&signal.container_id, &signal.exec_id);
                containers.signal(&process, signal.signal, signal.all)?;
                responder.succeed(&Empty::default());
            }
            WaitProcess::NAME => {
                let process = decode_as::<WaitProcess>(request)?;
                let responder = responder.clone();
                containers.wait(&process, Box::new(move |exit| responder.succeed(&exit)))?;
            }
            ResizeTty::NAME => {
                let resize = decode_as::<ResizeTty>(request)?;
                let process = process_ref(&resize.container_id, &resize.exec_id);
                containers.resize(&process, &resize.window_size)?;
                responder.succeed(&Empty::default());
            }
            CloseStdin::NAME => {
                containers.close_stdin(&decode_as::<CloseStdin>(request)?)?;
                responder.succeed(&Empty::default());
            }
            ListProcesses::NAME => {
                let id = decode_as::<ListProcesses>(request)?.container_id;
                responder.succeed(&ListProcessesResponse {
                    pids: containers.pids(&id)?,
                    processes: containers.processes(&id)?,
                    ..ListProcessesResponse::default()
                });
            }
            GetStats::NAME => {
                let stats = containers.stats(&decode_as::<GetStats>(request)?.container_id)?;
                responder.succeed(&stats);
            }
            UpdateContainer::NAME => {
                let update = decode_as::<UpdateContainer>(request)?;
                containers.update(&update.container_id, update.resources.get_or_default())?;
                responder.succeed(&Empty::default());
            }
            StatPath::NAME => {
                let asked = decode_as::<StatPath>(request)?;
                let root = containers.open_root(&asked.container_id)?;
                responder.succeed(&files::stat(&root, &asked.path, asked.follow)?);
            }
            Archive::NAME => {
                responder.send_waiting();
                responder.succeed(&self.archive(&decode_as::<Archive>(request)?)?);
            }
            Extract::NAME => {
                responder.send_waiting();
                self.extract(&decode_as::<Extract>(request)?)?;
                responder.succeed(&Empty::default());
            }
            ConfigureNetwork::NAME => {
                network::configure(&decode_as::<ConfigureNetwork>(request)?)?;
                responder.succeed(&Empty::default());
            }
            RemoveContainer::NAME => {
                containers.remove(&decode_as::<RemoveContainer>(request)?.container_id)?;
                responder.succeed(&Empty::default());
            }
            FreezeContainer::NAME => {
                let freeze = decode_as::<FreezeContainer>(request)?;
                containers.freeze(&freeze.container_id, freeze.frozen)?;
                responder.succeed(&Empty::default());
            }
            Shutdown::NAME => {
                containers.end_all();
                responder.succeed(&Empty::default());
                power_off();
            }
            _ => return Err(unknown()),
        }
        Ok(())
    }

    fn archive(&self, request: &ArchiveRequest) -> Result<PathStat, AgentError> {
        let (_, stream) = self.take_stream(&request.container_id, &request.stream_id, Stream::Stdout)?;
        let root = self.containers.open_root(&request.container_id)?;
        // The stream's end is the archive's, and comes before the answer.
        let to = BufWriter::with_capacity(STREAM_BUFFER_BYTES, &stream);
        files::pack(&root, &request.path, request.follow, to)
    }

    fn extract(&self, request: &ExtractRequest) -> Result<(), AgentError> {
        let (ahead, stream) = self.take_stream(&request.container_id, &request.stream_id, Stream::Stdin)?;
        let root = self.containers.open_root(&request.container_id)?;
        let rules = files::Rules {
            keep_kinds: request.keep_kinds,
            keep_owners: request.keep_owners,
        };
        let mut from = ahead
            .as_slice()
            .chain(BufReader::with_capacity(STREAM_BUFFER_BYTES, &stream));
        files::unpack(&root, &request.path, &rules, &mut from)?;
        // What follows the archive's end, so that the host isn't left writing.
        io::copy(&mut from, &mut io::sink()).map(drop).or(Ok(()))
    }

    fn take_stream(
        &self,
        container_id: &str,
        id: &str,
        stream: Stream,
    ) -> Result<(Vec<u8>, File), AgentError> {
        let header = StreamHeader {
            container_id: container_id.to_owned(),
            exec_id: id.to_owned(),
            stream,
        };
        self.containers.streams.take(&header)?.into_blocking()
    }

    fn connect(&mut self, request: &ConnectRequest) -> Result<ConnectResponse, AgentError> {
        if request.protocol_version != PROTOCOL_VERSION {
            return Err(AgentError::Version {
                host: request.protocol_version,
            });
        }
        if request.realtime_ns != 0
            && let Err(errno) = init::set_clock(request.realtime_ns)
        {
            log!("setting the clock: {errno}");
        }
        if !request.entropy.is_empty()
            && let Err(error) = init::seed_random(&request.entropy)
        {
            log!("seeding the random pool: {error}");
        }
        self.connected = true;
        let system = nix::sys::utsname::uname();
        let release = system.map(|system| system.release().to_string_lossy().into_owned());
        let (memory_total_bytes, cpu_count) = init::size();
        Ok(ConnectResponse {
            protocol_version: PROTOCOL_VERSION,
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            kernel_release: release.unwrap_or_default(),
            boot_to_agent_ns: self.boot.agent_ns,
            boot_to_ready_ns: self.boot.ready_ns,
            memory_total_bytes,
            cpu_count,
            ..ConnectResponse::default()
        })
    }
}

/// Flushes what is to be kept and ends the microVM, which the VMM sees as its orderly end.
fn power_off() {
    nix::unistd::sync();
    let Err(errno) = nix::sys::reboot::reboot(nix::sys::reboot::RebootMode::RB_AUTOBOOT);
    log!("reboot: {errno}");
}

#[cfg(test)]
mod tests {
    use std::{fs::File, io::Read as _};

    use agent_protocol::{Message as _, frame::HEADER_BYTES};

    use super::{super::Sender, *};

    fn connection() -> Connection {
        Connection::new(
            Arc::new(Containers::default()),
            BootTimes {
                agent_ns: 1,
                ready_ns: 2,
            },
        )
    }

    fn request<M: Method>(message: &M::Request) -> Request {
        Request {
            service: SERVICE.into(),
            method: M::NAME.into(),
            payload: message.write_to_bytes().unwrap(),
            ..Request::default()
        }
    }

    /// Handles a request; gives what was answered.
    fn handle(connection: &mut Connection, request: &Request) -> Result<Vec<u8>, AgentError> {
        let (mut read, write) = std::io::pipe().unwrap();
        let sender = Arc::new(Sender::new(File::from(std::os::fd::OwnedFd::from(write))));
        connection.handle(request, &Responder { sender, stream_id: 1 })?;
        let mut answer = Vec::new();
        read.read_to_end(&mut answer).unwrap();
        Ok(answer)
    }

    fn connect(version: u32) -> Request {
        request::<Connect>(&ConnectRequest {
            protocol_version: version,
            ..ConnectRequest::default()
        })
    }

    #[test]
    fn nothing_is_done_before_the_version_is_settled() {
        let list = request::<ListProcesses>(&agent_protocol::ContainerRef {
            container_id: "c".into(),
            ..Default::default()
        });
        let mut connection = connection();
        assert!(matches!(
            handle(&mut connection, &list),
            Err(AgentError::WrongState { .. })
        ));
        assert!(matches!(
            handle(&mut connection, &connect(PROTOCOL_VERSION + 1)),
            Err(AgentError::Version { .. })
        ));
        assert!(matches!(
            handle(&mut connection, &list),
            Err(AgentError::WrongState { .. })
        ));
        assert!(handle(&mut connection, &connect(PROTOCOL_VERSION)).unwrap().len() > HEADER_BYTES);
        assert!(matches!(
            handle(&mut connection, &list),
            Err(AgentError::NoContainer { .. })
        ));
    }

    #[test]
    fn message_out_of_bounds_is_refused_and_the_connection_goes_on() {
        let mut connection = connection();
        handle(&mut connection, &connect(PROTOCOL_VERSION)).unwrap();
        let bad = request::<GetStats>(&agent_protocol::ContainerRef {
            container_id: "../..".into(),
            ..Default::default()
        });
        assert!(matches!(
            handle(&mut connection, &bad),
            Err(AgentError::Invalid(_))
        ));
        let garbage = Request {
            payload: vec![0xff; 9],
            ..bad
        };
        assert!(matches!(
            handle(&mut connection, &garbage),
            Err(AgentError::Malformed)
        ));
        let unknown = Request {
            method: "Explode".into(),
            ..garbage
        };
        assert!(matches!(
            handle(&mut connection, &unknown),
            Err(AgentError::UnknownMethod { .. })
        ));
    }
}
