//! A real server under containerd, from its image as it is, driven by its own client: the same under both shims.

use std::time::Duration;

use hull_tests::containerd::{Containerd, HULL, RUNC};
use hull_tests::hull::eventually;

/// A server needs a moment until it listens.
const PATIENCE: Duration = Duration::from_secs(120);

/// What the client is told, in order.
fn conversation(world: &Containerd, runtime: &str, id: &str) -> Vec<String> {
    let outcome = world.run(
        runtime,
        &["--detach"],
        "redis",
        id,
        &["redis-server", "--daemonize", "no", "--save", "", "--dir", "/tmp"],
    );
    assert!(outcome.status.success(), "{outcome:?}\n{}", world.log());
    let mut number = 0;
    let mut ask = |words: &[&str]| {
        number += 1;
        let command: Vec<&str> = ["redis-cli"].iter().chain(words).copied().collect();
        world.exec(id, &format!("ask{number}"), &command).text()
    };
    let listens = eventually(PATIENCE, || ask(&["PING"]) == "PONG");
    assert!(listens, "{}", world.log());
    let mut record = vec![
        ask(&["SET", "answer", "42"]),
        ask(&["GET", "answer"]),
        ask(&[
            "EVAL",
            "for i=1,1000 do redis.call('RPUSH','l',i) end return redis.call('LLEN','l')",
            "0",
        ]),
        ask(&["LRANGE", "l", "-3", "-1"]),
        ask(&["GET", "nothing"]),
    ];
    record.push(world.exec(id, "who", &["id", "-un"]).text());
    world.remove(id);
    record
}

#[test]
fn redis_says_the_same_under_both() {
    let Some(world) = Containerd::with_images(&["redis"]) else {
        return;
    };
    let expected = conversation(&world, RUNC, "r1");
    assert_eq!(expected[..2], ["OK", "42"]);
    assert_eq!(conversation(&world, HULL, "h1"), expected, "{}", world.log());
    assert_eq!(world.settle(&["r1", "h1"]), Vec::<String>::new());
}
