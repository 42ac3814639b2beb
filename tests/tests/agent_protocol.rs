//! A hostile peer of the agent: frames of every wrong kind on many connections. The agent refuses them and goes on; neither it nor
//! what it serves is harmed.
//!
//! The frames are encoded here by hand, so that a mistake of the protocol's own code can't hide itself. What each run sends follows
//! from its seed, which a failure prints.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use hull_tests::hull::{Hull, PATIENCE, eventually};

const RPC_PORT: u32 = 1024;
const STDIO_PORT: u32 = 1025;
const METHODS: [&str; 13] = [
    "Connect",
    "CreateExec",
    "StartProcess",
    "WaitProcess",
    "ResizeTty",
    "CloseStdin",
    "ListProcesses",
    "GetStats",
    "StatPath",
    "Archive",
    "Extract",
    "CreateContainer",
    "Explode",
];

/// A generator of numbers that is the same everywhere.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    fn bytes(&mut self, most: u64) -> Vec<u8> {
        let length = self.below(most + 1);
        (0..length).map(|_| self.next().to_le_bytes()[3]).collect()
    }
}

/// A field of protobuf that is a string or a message.
fn field(number: u8, bytes: &[u8]) -> Vec<u8> {
    let mut encoded = vec![number << 3 | 2];
    let mut length = bytes.len();
    while length >= 0x80 {
        encoded.push(u8::try_from(length & 0x7f).expect("as this test set it up") | 0x80);
        length >>= 7;
    }
    encoded.push(u8::try_from(length).expect("as this test set it up"));
    encoded.extend(bytes);
    encoded
}

fn request(method: &str, payload: &[u8]) -> Vec<u8> {
    [
        field(1, b"hull.agent.v1.Agent"),
        field(2, method.as_bytes()),
        field(3, payload),
    ]
    .concat()
}

fn frame(stream: u32, kind: u8, flags: u8, payload: &[u8]) -> Vec<u8> {
    let mut frame = u32::try_from(payload.len())
        .expect("as this test set it up")
        .to_be_bytes()
        .to_vec();
    frame.extend(stream.to_be_bytes());
    frame.extend([kind, flags]);
    frame.extend(payload);
    frame
}

/// `ConnectRequest { protocol_version }`, without a time, so that the guest's clock stays.
fn hello() -> Vec<u8> {
    let version = u8::try_from(agent_protocol::PROTOCOL_VERSION).expect("it is small");
    frame(1, 1, 0, &request("Connect", &[0x08, version]))
}

/// Without this everything else would be refused for want of it.
fn is_welcome(socket: &PathBuf) {
    let mut stream = connect(socket, RPC_PORT);
    stream
        .set_read_timeout(Some(PATIENCE))
        .expect("as this test set it up");
    stream.write_all(&hello()).expect("as this test set it up");
    let mut answer = [0; 11];
    stream.read_exact(&mut answer).expect("an answer");
    // A response, which begins with its payload: an error would begin with its status.
    assert_eq!((answer[8], answer[10]), (2, 2 << 3 | 2), "{answer:?}");
}

/// Something wrong, seldom something right.
fn nasty(numbers: &mut Numbers, container: &str) -> Vec<u8> {
    let method =
        METHODS[usize::try_from(numbers.below(METHODS.len() as u64)).expect("as this test set it up")];
    let stream = u32::try_from(numbers.below(9)).expect("as this test set it up");
    match numbers.below(9) {
        0 => numbers.bytes(200),
        // A frame that announces more than any may have.
        1 => [0x7f, 0xff, 0xff, 0xff, 0, 0, 0, 1, 1, 0].to_vec(),
        // One that is longer than what follows.
        2 => frame(1, 1, 0, &numbers.bytes(64))
            .into_iter()
            .chain([0, 0x3f, 0xff, 0xff, 0, 0, 0, 1, 1, 0])
            .collect(),
        3 => frame(
            stream,
            u8::try_from(numbers.below(256)).expect("as this test set it up"),
            u8::try_from(numbers.below(4)).expect("as this test set it up"),
            &numbers.bytes(99),
        ),
        4 => frame(stream, 1, 0, &numbers.bytes(300)),
        5 => frame(stream, 1, 0, &request(method, &numbers.bytes(300))),
        6 => frame(stream, 1, 0, &request(method, &field(1, container.as_bytes()))),
        // Ids and paths of odd shapes.
        7 => {
            let text = numbers.bytes(5000);
            let payload = [
                field(1, container.as_bytes()),
                field(2, &text),
                field(3, b"/proc/1/mem"),
            ]
            .concat();
            frame(stream, 1, 0, &request(method, &payload))
        }
        // A length in protobuf that is a lie.
        _ => {
            let mut payload = request(method, &field(1, container.as_bytes()));
            let at = usize::try_from(numbers.below(payload.len() as u64)).expect("as this test set it up");
            payload[at] = payload[at]
                .wrapping_add(u8::try_from(numbers.below(255)).expect("as this test set it up") + 1);
            frame(stream, 1, 0, &payload)
        }
    }
}

fn connect(socket: &PathBuf, port: u32) -> UnixStream {
    let mut stream = UnixStream::connect(socket).expect("as this test set it up");
    writeln!(stream, "CONNECT {port}").expect("as this test set it up");
    let mut answer = String::new();
    BufReader::new(stream.try_clone().expect("as this test set it up"))
        .read_line(&mut answer)
        .expect("as this test set it up");
    assert!(answer.starts_with("OK "), "{answer:?}");
    stream
        .set_read_timeout(Some(Duration::from_millis(20)))
        .expect("as this test set it up");
    stream
        .set_write_timeout(Some(PATIENCE))
        .expect("as this test set it up");
    stream
}

/// The running container's id and where its microVM's sockets are.
fn started(hull: &Hull) -> (String, PathBuf) {
    let outcome = hull.run(&[
        "run",
        "-d",
        "--rm",
        "--name",
        "victim",
        "busybox",
        "/bin/sleep",
        "1000",
    ]);
    assert_eq!(outcome.code(), 0, "{outcome:?}");
    let id = outcome.text();
    let socket = hull.runtime_dir().join("sandboxes").join(&id).join("vsock.sock");
    (id, socket)
}

fn still_serves(hull: &Hull) {
    let outcome = hull.run(&["exec", "victim", "/bin/echo", "here"]);
    assert_eq!(
        (outcome.code(), outcome.text().as_str()),
        (0, "here"),
        "{outcome:?}"
    );
}

#[test]
fn no_sequence_of_frames_harms_the_agent() {
    let Some(hull) = Hull::with_images(&["busybox"]) else {
        return;
    };
    let (id, socket) = started(&hull);
    let seed = u64::from(std::process::id()) << 20 | 0x9e37;
    println!("seed {seed}");
    let mut numbers = Numbers(seed);
    is_welcome(&socket);
    for _ in 0..60 {
        let mut stream = connect(&socket, RPC_PORT);
        if numbers.below(4) > 0 {
            stream.write_all(&hello()).expect("as this test set it up");
        }
        for _ in 0..numbers.below(30) {
            // It may end the connection, by right.
            if stream.write_all(&nasty(&mut numbers, &id)).is_err() {
                break;
            }
        }
        let mut answers = [0; 4096];
        let _ = stream.read(&mut answers);
    }
    for _ in 0..40 {
        let mut stream = connect(&socket, STDIO_PORT);
        let mut header = b"HIO1".to_vec();
        header.extend(numbers.bytes(300));
        let _ = stream.write_all(if numbers.below(2) == 0 {
            &header
        } else {
            &header[4..]
        });
    }
    still_serves(&hull);
    assert_eq!(hull.run(&["rm", "-f", "victim"]).code(), 0);
    assert_eq!(hull.settle(), Vec::<String>::new());
}

#[test]
fn connections_that_stall_hold_up_nobody() {
    let Some(hull) = Hull::with_images(&["busybox"]) else {
        return;
    };
    let (_, socket) = started(&hull);
    let mut held: Vec<UnixStream> = (0..100).map(|_| connect(&socket, RPC_PORT)).collect();
    for (index, stream) in held.iter_mut().enumerate() {
        // Half a header, or a header without its payload.
        let part: &[u8] = if index % 2 == 0 {
            &[0, 0, 0, 9, 0]
        } else {
            &[0, 0x3f, 0, 0, 0, 0, 0, 1, 1, 0, 7]
        };
        stream.write_all(part).expect("as this test set it up");
    }
    still_serves(&hull);
    drop(held);
    assert!(eventually(PATIENCE, || hull
        .run(&["exec", "victim", "/bin/true"])
        .code()
        == 0));
    assert_eq!(hull.run(&["rm", "-f", "victim"]).code(), 0);
    assert_eq!(hull.settle(), Vec::<String>::new());
}

#[test]
fn agent_is_static_and_small() {
    let Some(image) = std::env::var_os("HULL_AGENT_IMAGE") else {
        eprintln!("skipped: HULL_AGENT_IMAGE is not set; `cargo xtask test` builds everything and sets it");
        return;
    };
    // The image holds the agent and six empty directories.
    let bytes = std::fs::metadata(image).expect("as this test set it up").len();
    assert!(bytes < 3 << 20, "{bytes} bytes");
}
