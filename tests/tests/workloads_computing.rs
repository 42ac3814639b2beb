//! Real programs computing in a microVM, and the same image under runc: what comes out must be the same.

use hull_tests::hull::{Hull, Outcome};
use hull_tests::runc::Bundle;

/// Run a script of an image in a microVM and under runc; both must succeed and say the same. Returns what they said.
fn same_in_both(image: &str, program: &[&str], options: &[&str]) -> Option<String> {
    let hull = Hull::with_images(&[image])?;
    let arguments = [&["run", "--rm"], options, &[image], program].concat();
    let in_microvm = hull.run(&arguments);
    assert_eq!(in_microvm.code(), 0, "{in_microvm:?}");
    assert_eq!(hull.settle(), Vec::<String>::new());
    let plain = Bundle::of(image).run(program);
    assert_eq!(plain.code(), 0, "under runc: {plain:?}");
    assert_eq!(in_microvm.text(), plain.text(), "hull (left) and runc differ");
    Some(in_microvm.text())
}

fn succeed(outcome: &Outcome) -> String {
    assert_eq!(outcome.code(), 0, "{outcome:?}");
    outcome.text()
}

#[test]
fn busybox_applets_do_what_they_do_under_runc() {
    const SCRIPT: &str = r#"
        set -e; cd /tmp; export LC_ALL=C
        seq 1 2000 | awk '{ s += $1 * $1 } END { print s }'
        seq 1 500 | sed -n '/7$/p' | sort -rn | head -n 3 | tr '\n' ' '; echo
        mkdir -p tree/a/b tree/c; seq 1 9999 >tree/a/numbers; cp tree/a/numbers tree/a/b/copy; ln -s ../a tree/c/link
        chmod 4750 tree/a/b/copy; mkfifo tree/fifo; ln tree/a/numbers tree/c/hard
        tar -cf - tree | gzip -9 | gunzip | tar -xf - -C /root
        find /root/tree | sort | while read -r f; do stat -c '%n %F %a %h' "$f"; done
        md5sum /root/tree/a/b/copy; sha256sum <tree/c/link/numbers; cmp tree/a/numbers /root/tree/c/hard && echo same
        diff tree/a/numbers tree/a/b/copy && echo no difference
        dd if=/dev/zero bs=64k count=32 2>/dev/null | tr '\0' 'x' | sha1sum
        echo '2^127-1' | bc; printf '%s\n' one two three | xargs -n 1 echo item
        (for i in 1 2 3 4 5 6 7 8; do (sleep 0.05; echo $i >>order) & done; wait); sort order | tr '\n' ' '; echo
        cat tree/fifo & echo through a fifo >tree/fifo; wait
        trap 'echo caught' USR1; kill -USR1 $$; sh -c 'kill -TERM $$' || echo status $?
        timeout 0.2 sleep 1000 || echo timed out; sleep 1000 & kill -0 $! && echo alive; kill $!; wait $! || echo status $?
        echo hello | cpio -o -H newc 2>/dev/null | wc -c; find tree -name numbers | cpio -o -H newc 2>/dev/null | cpio -t 2>/dev/null
        vi --help 2>&1 | head -n 1 | grep -c BusyBox; ash -c 'echo $((0x7fffffff + 1))'; expr 17 \* 3
        mkdir www; echo page >www/index.html; httpd -f -p 127.0.0.1:8080 -h www & server=$!
        until wget -q -O - http://127.0.0.1:8080/ 2>/dev/null; do sleep 0.05; done; kill $server; wait $server || echo status $?
        nc -l -p 9999 -e cat & server=$!; until echo there and back | nc 127.0.0.1 9999 2>/dev/null; do sleep 0.05; done; wait $server
        id -u; hostname | wc -l; cat /proc/self/cgroup | wc -l | awk '{ print ($1 > 0) }'; ps | grep -c '[s]h'  | awk '{ print ($1 > 0) }'
    "#;
    same_in_both("busybox", &["/bin/sh", "-c", SCRIPT], &["--tmpfs", "/tmp"]);
}

#[test]
fn numpy_solves_linear_systems_as_it_does_under_runc() {
    // Two threads in both, so that sums are split alike; the library picks its kernels by CPUID.
    const SCRIPT: &str = r#"
import hashlib, os
os.environ["OPENBLAS_NUM_THREADS"] = "2"
import numpy as np

def digest(a): return hashlib.sha256(np.ascontiguousarray(a).tobytes()).hexdigest()
rng = np.random.default_rng(20250101)
a, b = rng.standard_normal((256, 256)), rng.standard_normal(256)
x = np.linalg.solve(a, b)
assert np.abs(a @ x - b).max() < 1e-9
u, s, v = np.linalg.svd(a)
assert np.abs((u * s) @ v - a).max() < 1e-9
w = np.linalg.eigvalsh(a @ a.T)
assert np.allclose(np.sort(s ** 2), w)
q, r = np.linalg.qr(a)
assert np.abs(q @ r - a).max() < 1e-10
f = np.fft.ifft(np.fft.fft(b))
assert np.abs(f - b).max() < 1e-12
i = np.arange(90000).reshape(300, 300) % 97
print("integers", int((i @ i).sum()))
print("product", digest(a @ a))
print("singular values", digest(np.round(s, 9)))
print("sorted", digest(np.sort(rng.integers(0, 1 << 40, 200000))))
"#;
    let Some(text) = same_in_both("python", &["python3", "-c", SCRIPT], &["--cpus", "2"]) else {
        return;
    };
    // Exact arithmetic by hand: the sum over k of (column sums)(row sums) of i mod 97.
    let expected: u64 = {
        let at = |row: u64, column: u64| (row * 300 + column) % 97;
        (0..300)
            .map(|k| {
                let column: u64 = (0..300).map(|row| at(row, k)).sum();
                let row: u64 = (0..300).map(|column| at(k, column)).sum();
                column * row
            })
            .sum()
    };
    assert!(text.contains(&format!("integers {expected}\n")), "{text}");
}

#[test]
fn python_does_files_processes_and_threads_as_under_runc() {
    const SCRIPT: &str = r#"
import concurrent.futures, multiprocessing, os, signal, socket, sqlite3, subprocess, sys, tempfile, time, zlib, ctypes, mmap, select, json, decimal
print(subprocess.run(["sh", "-c", "echo child; exit 3"], capture_output=True))
with concurrent.futures.ThreadPoolExecutor(8) as pool: print(sum(pool.map(lambda n: n * n, range(1000))))
with multiprocessing.get_context("fork").Pool(4) as pool: print(sum(pool.map(abs, range(-500, 500))))
with tempfile.TemporaryFile() as f:
    f.truncate(1 << 20); m = mmap.mmap(f.fileno(), 0); m[4096:4101] = b"hello"; m.flush(); f.seek(4096); print(f.read(5))
hits = []
signal.signal(signal.SIGALRM, lambda *_: hits.append(1)); signal.setitimer(signal.ITIMER_REAL, 0.05)
while not hits: time.sleep(0.01)
print("alarm", len(hits))
server = socket.create_server(("127.0.0.1", 0)); pid = os.fork()
if pid == 0:
    c = socket.create_connection(server.getsockname()); c.sendall(zlib.compress(b"payload" * 100000)); c.close(); os._exit(7)
c, _ = server.accept(); data = b"".join(iter(lambda: c.recv(65536), b"")); print(zlib.crc32(zlib.decompress(data)), os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
db = sqlite3.connect("/tmp/x.db"); db.execute("create table t (a int, b text)"); db.executemany("insert into t values (?, ?)", ((i, str(i)) for i in range(5000))); db.commit()
print(db.execute("select count(*), sum(a), max(b) from t").fetchone(), db.execute("pragma integrity_check").fetchone())
print(decimal.Decimal(2).sqrt(decimal.Context(prec=60)), json.dumps(sys.float_info.max), ctypes.sizeof(ctypes.c_void_p))
"#;
    same_in_both("python", &["python3", "-c", SCRIPT], &["--tmpfs", "/tmp"]);
}

#[test]
fn node_computes_digests_and_threads_as_under_runc() {
    const SCRIPT: &str = r#"
const { Worker } = require("worker_threads"), crypto = require("crypto"), zlib = require("zlib"), http = require("http"), fs = require("fs"), { execFileSync } = require("child_process");
const work = `const { parentPort, workerData } = require("worker_threads"); let n = 0;
  outer: for (let i = workerData[0]; i < workerData[1]; i++) { if (i < 2) continue; for (let d = 2; d * d <= i; d++) if (i % d === 0) continue outer; n++; }
  parentPort.postMessage(n);`;
const count = (from, to) => new Promise((done, failed) => { const w = new Worker(work, { eval: true, workerData: [from, to] }); w.on("message", done); w.on("error", failed); });
(async () => {
  const parts = await Promise.all([0, 1, 2, 3].map(i => count(i * 50000, (i + 1) * 50000)));
  console.log("primes below 200000", parts.reduce((a, b) => a + b));
  const data = crypto.createHash("shake256", { outputLength: 1 << 20 }).update("seed").digest();
  console.log("sha256", crypto.createHash("sha256").update(data).digest("hex"));
  console.log("scrypt", crypto.scryptSync("password", "salt", 32, { N: 4096 }).toString("hex"));
  const key = Buffer.alloc(32, 7), c = crypto.createCipheriv("aes-256-gcm", key, Buffer.alloc(12, 1));
  const sealed = Buffer.concat([c.update(data), c.final()]); console.log("gcm", c.getAuthTag().toString("hex"));
  console.log("brotli", zlib.brotliDecompressSync(zlib.brotliCompressSync(data, { params: { [zlib.constants.BROTLI_PARAM_QUALITY]: 4 } })).equals(data));
  const { publicKey, privateKey } = crypto.generateKeyPairSync("ed25519");
  console.log("signature", crypto.verify(null, data, publicKey, crypto.sign(null, data, privateKey)));
  let h = 0; for (let round = 0; round < 3; round++) for (let i = 0; i < 5e6; i++) h = (Math.imul(h, 31) + i) | 0; console.log("loop", h);
  console.log("big", (3n ** 2000n % 1000000007n).toString(), JSON.stringify([0.1 + 0.2, -0, 1e21]));
  await fs.promises.writeFile("/tmp/file", data); console.log("file", (await fs.promises.stat("/tmp/file")).size, execFileSync("sha256sum", ["/tmp/file"]).toString().split(" ")[0]);
  const server = http.createServer((_, answer) => fs.createReadStream("/tmp/file").pipe(answer)).listen(0, "127.0.0.1", async () => {
    const got = await Promise.all([1, 2, 3, 4].map(async () => Buffer.from(await (await fetch("http://127.0.0.1:" + server.address().port)).arrayBuffer())));
    console.log("http", got.every(b => b.equals(data))); server.close(); server.closeAllConnections();
  });
})();
"#;
    let Some(text) = same_in_both(
        "node",
        &["node", "-e", SCRIPT],
        &["--cpus", "2", "--tmpfs", "/tmp"],
    ) else {
        return;
    };
    // π(200000), and what must hold anywhere.
    assert!(text.contains("primes below 200000 17984\n"), "{text}");
    for line in ["brotli true", "signature true", "http true"] {
        assert!(text.contains(line), "{line}: {text}");
    }
}

#[test]
fn gcc_compiles_bzip2_and_lua_to_the_same_bytes_as_under_runc() {
    // bzip2's `make` compresses and expands its samples with what it has built and compares them with what it brings.
    const SCRIPT: &str = r#"
set -e
cd /usr/src/bzip2; make -j2 >/tmp/log 2>&1 || { cat /tmp/log >&2; exit 1; }
make check >/tmp/check 2>&1 || { cat /tmp/check >&2; exit 1; }
cmp sample1.rb2 sample1.bz2; cmp sample3.tst sample3.ref; sha256sum bzip2 libbz2.a
cd /usr/src/lua5.4; make -j2 linux CFLAGS='-std=gnu99 -O0 -DLUA_COMPAT_5_3 -DLUA_USE_LINUX' >/tmp/log 2>&1 || { cat /tmp/log >&2; exit 1; }
sha256sum src/lua
src/lua -e 'local t = {} for i = 1, 200000 do t[i] = (i * 7919) % 200003 end table.sort(t)
  local s = 0 for i, v in ipairs(t) do s = (s * 31 + v * i) % 1000000007 end
  print(_VERSION, s, string.format("%.17g", math.sin(1e6)), #string.rep("x", 1 << 20))'
printf 'int main(void) { volatile int *p = 0; return *p; }' >/tmp/crash.c; gcc -o /tmp/crash /tmp/crash.c; /tmp/crash || echo status $?
"#;
    let options = ["--cpus", "2", "--memory", "1g"];
    let Some(text) = same_in_both("gcc", &["/bin/bash", "-c", SCRIPT], &options) else {
        return;
    };
    assert!(text.ends_with("status 139"), "{text}");
}

#[test]
fn speed_test_of_sqlite_verifies_as_under_runc() {
    const SCRIPT: &str = r#"
set -e
speedtest1 --size 2 --verify --journal wal /tmp/speed.db >/tmp/log || { cat /tmp/log >&2; exit 1; }
grep '^Verification Hash' /tmp/log
sqlite3 /tmp/speed.db 'pragma integrity_check; select count(*) from sqlite_master'
sqlite3 /tmp/other.db 'create table t (n int); insert into t select value from generate_series(1, 20000)' 2>/dev/null ||
    sqlite3 /tmp/other.db 'create table t (n int); with recursive c(x) as (select 1 union all select x + 1 from c where x < 20000) insert into t select x from c'
sqlite3 /tmp/other.db 'select count(*), sum(n) from t; .dump' | sha256sum
"#;
    let Some(text) = same_in_both("sqlite", &["/bin/bash", "-c", SCRIPT], &[]) else {
        return;
    };
    assert!(text.contains("\nok\n"), "{text}");
}

#[test]
fn openssl_measures_itself_and_gets_its_digests_right() {
    const SCRIPT: &str = r#"
set -e; cd /tmp
head -c 3000000 /dev/zero | openssl enc -aes-256-ctr -pass pass:hull -pbkdf2 -nosalt >stream 2>/dev/null
for digest in sha256 sha3-512 blake2b512 md5; do openssl dgst -$digest stream; done
openssl enc -aes-256-cbc -pass pass:x -pbkdf2 -in stream -out sealed; openssl enc -d -aes-256-cbc -pass pass:x -pbkdf2 -in sealed | cmp - stream && echo cbc round trip
for kind in 'RSA -pkeyopt rsa_keygen_bits:2048' 'EC -pkeyopt ec_paramgen_curve:P-256'; do
    openssl genpkey -algorithm $kind -out key 2>/dev/null; openssl pkey -in key -pubout -out public
    openssl dgst -sha256 -sign key -out signature stream; openssl dgst -sha256 -verify public -signature signature stream
done
openssl prime 170141183460469231731687303715884105727 | cut -d' ' -f3-
"#;
    let Some(text) = same_in_both("openssl", &["/bin/bash", "-c", SCRIPT], &["--tmpfs", "/tmp"]) else {
        return;
    };
    assert!(
        text.contains("cbc round trip\nVerified OK\nVerified OK"),
        "{text}"
    );
    let Some(hull) = Hull::with_images(&["openssl"]) else {
        return;
    };
    for cipher in ["aes-256-gcm", "sha256", "chacha20-poly1305"] {
        let speed = [
            "run", "--rm", "openssl", "openssl", "speed", "-seconds", "1", "-bytes", "8192", "-mr", "-evp",
            cipher,
        ];
        let text = succeed(&hull.run(&speed));
        // +F:22:AES-256-GCM:3207184384.00
        let rate = text
            .lines()
            .filter(|line| line.starts_with("+F:"))
            .find_map(|line| line.rsplit(':').next());
        let rate: f64 = rate
            .and_then(|rate| rate.parse().ok())
            .unwrap_or_else(|| panic!("no rate in {text}"));
        assert!(rate > 0.0, "{text}");
    }
}
