//! Events for containerd: in the order they were given, by one thread, over containerd's ttRPC socket.
//!
//! containerd may be restarted at any time. An event that can't be delivered is tried again until [`PATIENCE`] has passed; those
//! behind it wait, so the order stands. A containerd that is away for longer asks every shim for its state when it comes back.

use std::{
    sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel},
    thread,
    time::{Duration, Instant, SystemTime},
};

use containerd_shim_protos::{
    Client, EventsClient,
    protobuf::{
        MessageDyn, MessageField,
        well_known_types::{any::Any, timestamp::Timestamp},
    },
    shim::{event::Envelope, events::ForwardRequest},
    ttrpc::{self, context},
};

use crate::error::{Result, ShimError};

/// Events that may wait for a containerd that is away; as many as other shims keep.
const MAX_WAITING: usize = 2048;
/// How long one event is tried.
const PATIENCE: Duration = Duration::from_secs(60);
/// Between tries.
const PAUSE: Duration = Duration::from_millis(200);
/// One delivery.
const CALL_TIMEOUT: Duration = Duration::from_secs(5);

/// The way to containerd's ears.
#[derive(Debug, Clone)]
pub struct Publisher {
    events: SyncSender<Envelope>,
    namespace: String,
}

/// A moment as protobuf has it.
pub fn timestamp(time: SystemTime) -> Timestamp {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    Timestamp {
        seconds: i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(since.subsec_nanos()).unwrap_or(0),
        ..Timestamp::default()
    }
}

/// A message with its type's name, as containerd's `typeurl` has it: without a host.
pub fn any(message: &dyn MessageDyn) -> Result<Any> {
    let value = message.write_to_bytes_dyn().map_err(|error| ShimError::Message {
        what: "an answer",
        problem: error.to_string(),
    })?;
    Ok(Any {
        type_url: message.descriptor_dyn().full_name().to_owned(),
        value,
        ..Any::default()
    })
}

impl Publisher {
    /// Starts the thread; an empty address swallows everything.
    pub fn start(address: &str, namespace: &str) -> Result<Self> {
        let (events, waiting) = sync_channel(MAX_WAITING);
        let address = address.to_owned();
        thread::Builder::new()
            .name("events".into())
            .spawn(move || deliver(&address, &waiting))
            .map_err(ShimError::system("starting a thread"))?;
        Ok(Self {
            events,
            namespace: namespace.to_owned(),
        })
    }

    /// Gives an event to the thread. Never waits: an event too many is dropped, and said so.
    pub fn publish(&self, topic: &str, event: &dyn MessageDyn) {
        let event = match any(event) {
            Ok(event) => event,
            Err(error) => return tracing::error!(topic, error = error.chain(), "an event can't be encoded"),
        };
        let envelope = Envelope {
            timestamp: MessageField::some(timestamp(SystemTime::now())),
            namespace: self.namespace.clone(),
            topic: topic.to_owned(),
            event: MessageField::some(event),
            ..Envelope::default()
        };
        if let Err(TrySendError::Full(envelope)) = self.events.try_send(envelope) {
            tracing::error!(topic = envelope.topic, "containerd takes no events; one is lost");
        }
    }
}

fn deliver(address: &str, waiting: &Receiver<Envelope>) {
    if address.is_empty() {
        tracing::warn!("containerd gave no address for events; there will be none");
        while waiting.recv().is_ok() {}
        return;
    }
    let mut client = None;
    while let Ok(envelope) = waiting.recv() {
        let deadline = Instant::now() + PATIENCE;
        let topic = envelope.topic.clone();
        let request = ForwardRequest {
            envelope: MessageField::some(envelope),
            ..ForwardRequest::default()
        };
        while let Err(error) = try_deliver(address, &mut client, &request) {
            client = None;
            if Instant::now() >= deadline {
                tracing::error!(topic, %error, "an event can't be delivered");
                break;
            }
            thread::sleep(PAUSE);
        }
    }
}

fn try_deliver(
    address: &str,
    client: &mut Option<EventsClient>,
    request: &ForwardRequest,
) -> ttrpc::Result<()> {
    let connected = match client {
        Some(client) => client,
        None => {
            let socket = match address.strip_prefix("unix://") {
                Some(_) => address.to_owned(),
                None => format!("unix://{address}"),
            };
            client.insert(EventsClient::new(Client::connect(&socket)?))
        }
    };
    connected
        .forward(context::with_duration(CALL_TIMEOUT), request)
        .map(drop)
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use containerd_shim_protos::{
        Events, create_events, topics,
        ttrpc::{Server, TtrpcContext},
        types::empty::Empty,
    };

    use super::*;

    #[derive(Default)]
    struct Ears(Mutex<Vec<String>>);

    impl Events for Ears {
        fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
            let envelope = request.envelope.unwrap_or_default();
            self.0
                .lock()
                .unwrap()
                .push(format!("{} {}", envelope.namespace, envelope.topic));
            Ok(Empty::default())
        }
    }

    #[test]
    fn events_arrive_in_order_although_containerd_was_away_at_first() {
        let folder = tempfile::tempdir().unwrap();
        let address = format!("unix://{}", folder.path().join("s").display());
        let publisher = Publisher::start(&address, "ns").unwrap();
        let event = containerd_shim_protos::events::task::TaskStart::default();
        for topic in [
            topics::TASK_CREATE_EVENT_TOPIC,
            topics::TASK_START_EVENT_TOPIC,
            topics::TASK_EXIT_EVENT_TOPIC,
        ] {
            publisher.publish(topic, &event);
        }
        let ears = Arc::new(Ears::default());
        let mut server = Server::new()
            .bind(&address)
            .unwrap()
            .register_service(create_events(ears.clone()));
        server.start().unwrap();
        let begin = Instant::now();
        while ears.0.lock().unwrap().len() < 3 && begin.elapsed() < Duration::from_secs(30) {
            thread::sleep(Duration::from_millis(10));
        }
        assert_eq!(
            *ears.0.lock().unwrap(),
            ["ns /tasks/create", "ns /tasks/start", "ns /tasks/exit"]
        );
        server.shutdown();
    }

    #[test]
    fn type_names_have_no_host() {
        let any = any(&containerd_shim_protos::events::task::TaskExit::default()).unwrap();
        assert_eq!(any.type_url, "containerd.events.TaskExit");
    }
}
