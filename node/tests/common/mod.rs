//! A site of one or more nodes, made with the program's own commands, and its processes.
//!
//! Nothing here links the node: what these tests know of it is its files, its exit codes, its
//! output and its doors, as an operator does.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "helpers of tests, outside of a #[test] function"
)]
#![allow(
    dead_code,
    reason = "each test file uses its own part of the common helpers"
)]

use std::{
    fs,
    io::Write as _,
    net::{SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::unix::{fs::PermissionsExt as _, net::UnixStream},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tempfile::TempDir;

/// Long enough for a loaded machine; a test that waits for it has failed.
pub(crate) const LONG: Duration = Duration::from_secs(20);

/// The shortest time after which a node denies because it waited in vain: for an engine (200 ms) or for
/// the record (250 ms).
const SHORTEST_WAIT: Duration = Duration::from_millis(200);
/// The domain of every site here.
pub(crate) const DOMAIN: &str = "harbour";

/// Says past the test runner that a test could not run; where CI can run everything, that is a failure.
pub(crate) fn not_run(test: &str, why: &str) {
    let mut past_the_runner = std::io::stderr();
    writeln!(past_the_runner, "not run: {test}: {why}").unwrap();
    let in_ci = std::env::var_os("CI").is_some_and(|ci| ci == "true");
    assert!(!in_ci, "{test} must run in CI: {why}");
}

/// What a command did.
#[derive(Debug)]
pub(crate) struct Ran {
    pub(crate) code: i32,
    pub(crate) out: String,
    pub(crate) err: String,
}

impl Ran {
    /// The one JSON document on standard output.
    #[track_caller]
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.out).unwrap_or_else(|e| panic!("no JSON ({e}): {self:?}"))
    }

    /// This, if the command ended with `code`.
    #[track_caller]
    pub(crate) fn ended(self, code: i32) -> Self {
        assert_eq!(self.code, code, "{self:?}");
        self
    }

    /// This, if standard error or output holds each of `words`.
    #[track_caller]
    pub(crate) fn says(self, words: &[&str]) -> Self {
        for word in words {
            let said = self.err.contains(word) || self.out.contains(word);
            assert!(said, "`{word}` is missing: {self:?}");
        }
        self
    }
}

/// Runs `command` to its end with `input` on its standard input.
pub(crate) fn run(command: &mut Command, input: &[u8]) -> Ran {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let input = input.to_vec();
    // A command that does not read its input closes the pipe: that is its choice.
    let writer = std::thread::spawn(move || drop(stdin.write_all(&input)));
    let output = child.wait_with_output().unwrap();
    writer.join().unwrap();
    Ran {
        code: output.status.code().unwrap_or(-1),
        out: String::from_utf8_lossy(&output.stdout).into_owned(),
        err: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

/// Runs openssl; a failure shows what it said.
#[track_caller]
pub(crate) fn openssl(dir: &Path, args: &[&str]) -> String {
    let ran = run(Command::new("openssl").current_dir(dir).args(args), b"");
    ran.ended(0).out
}

/// Runs the program in `dir`.
pub(crate) fn tidelock_in(dir: &Path, args: &[&str], input: &[u8]) -> Ran {
    in_time(
        || {
            let mut command = Command::new(env!("CARGO_BIN_EXE_tidelock"));
            run(command.current_dir(dir).args(args), input)
        },
        |ran| &ran.out,
    )
}

/// What `ask` answers, asked again where the node denied because this machine was busy with other
/// things: a disk that stalls for longer than a node waits for a record is no fault of the node. It
/// denies for the same reasons without having waited where its log is shut: that is told at once.
fn in_time<T>(mut ask: impl FnMut() -> T, text: impl Fn(&T) -> &str) -> T {
    let mut left = 20;
    loop {
        let begun = Instant::now();
        let answer = ask();
        let waited = begun.elapsed() >= SHORTEST_WAIT;
        let late = [
            "\"DEADLINE\"",
            "\"AUDIT_UNAVAILABLE\"",
            "deny DEADLINE",
            "deny AUDIT_UNAVAILABLE",
        ];
        let late = late.iter().any(|reason| text(&answer).contains(reason));
        if left == 0 || !(waited && late) {
            return answer;
        }
        left -= 1;
    }
}

/// A UDP address that nobody listens on.
pub(crate) fn free_udp() -> SocketAddr {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    socket.local_addr().unwrap()
}

/// A TCP address that nobody listens on.
pub(crate) fn free_tcp() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap()
}

/// Waits until `seen` answers something.
#[track_caller]
pub(crate) fn until<T>(what: &str, mut seen: impl FnMut() -> Option<T>) -> T {
    let begun = Instant::now();
    loop {
        if let Some(found) = seen() {
            return found;
        }
        assert!(begun.elapsed() < LONG, "waited in vain for: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Sets the mode of a file.
pub(crate) fn chmod(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

/// An action that the site's bundle decides: reading this file.
pub(crate) fn read_action(path: &str) -> Value {
    json!({
        "principal": {"type": "Agent", "id": "ops-1"},
        "action": "fs.read",
        "resource": {"type": "File", "id": path},
    })
}

/// One HTTP exchange: the status and the body.
fn exchange(
    stream: &mut (impl std::io::Read + std::io::Write),
    request: &[u8],
) -> Option<(u16, String)> {
    stream.write_all(request).ok()?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).ok()?;
    let answer = String::from_utf8_lossy(&answer).into_owned();
    let (head, body) = answer.split_once("\r\n\r\n")?;
    let status = head.split(' ').nth(1)?.parse().ok()?;
    Some((status, body.to_owned()))
}

/// The bytes of a request that asks for the connection to be closed after it.
pub(crate) fn request(method: &str, path: &str, headers: &[&str], body: &[u8]) -> Vec<u8> {
    let mut text = format!("{method} {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n");
    for header in headers {
        text.push_str(header);
        text.push_str("\r\n");
    }
    if method == "POST" {
        text.push_str("content-type: application/json\r\n");
        text.push_str(&format!("content-length: {}\r\n", body.len()));
    }
    text.push_str("\r\n");
    let mut bytes = text.into_bytes();
    bytes.extend_from_slice(body);
    bytes
}

/// One raw request over TCP.
pub(crate) fn over_tcp(address: SocketAddr, request: &[u8]) -> (u16, String) {
    let ask = || {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(LONG)).unwrap();
        exchange(&mut stream, request).unwrap()
    };
    in_time(ask, |(_, body)| body)
}

/// One raw request over a Unix socket; nothing where nobody answers.
pub(crate) fn over_unix(socket: &Path, request: &[u8]) -> Option<(u16, String)> {
    let mut stream = UnixStream::connect(socket).ok()?;
    stream.set_read_timeout(Some(LONG)).ok()?;
    exchange(&mut stream, request)
}

/// A directory with a CA, a policy authority, a trust file, and the papers of node `a`.
pub(crate) struct Site {
    dir: TempDir,
}

impl Site {
    /// Makes the site, and its bundle of epoch 1 as `site-1.tar`, signed.
    pub(crate) fn new() -> Self {
        // Short: the path of a Unix socket holds 108 bytes.
        let dir = tempfile::Builder::new().prefix("tl").tempdir().unwrap();
        let site = Self { dir };
        site.ok(&["ca", "init", "--dir", "ca", "--domain", DOMAIN]);
        site.ok(&["ca", "issue", "--dir", "ca", "--node", "a"]);
        fs::copy(site.path("ca/crl.pem"), site.path("site.crl")).unwrap();
        site.signing_key("policy.key");
        site.write("trust.toml", &site.trust("policy.key"));
        site.ok(&[
            "bundle", "new", "policy", "--name", "site", "--domain", DOMAIN,
        ]);
        site.bundle("site-1.tar", "policy.key", |_| {});
        site.write("tidelock.toml", &site.config());
        site
    }

    /// A path below the site.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Writes a text below the site.
    pub(crate) fn write(&self, name: &str, text: &str) {
        fs::write(self.path(name), text).unwrap();
    }

    /// Reads a text below the site.
    pub(crate) fn read(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap()
    }

    /// Runs the program in the site's directory.
    pub(crate) fn tidelock(&self, args: &[&str]) -> Ran {
        tidelock_in(self.dir.path(), args, b"")
    }

    /// Runs the program and demands success.
    #[track_caller]
    pub(crate) fn ok(&self, args: &[&str]) -> Ran {
        self.tidelock(args).ended(0)
    }

    /// Runs the program and demands success and JSON.
    #[track_caller]
    pub(crate) fn json(&self, args: &[&str]) -> Value {
        let mut args = args.to_vec();
        args.push("--json");
        self.ok(&args).json()
    }

    /// Asks the running node to decide `action`.
    pub(crate) fn decide(&self, action: &[u8]) -> Ran {
        tidelock_in(self.dir.path(), &["decide", "--json"], action)
    }

    /// Asks whether `path` may be read: the decision and its reason.
    #[track_caller]
    pub(crate) fn may_read(&self, path: &str) -> (String, String) {
        let answer = self.decide(read_action(path).to_string().as_bytes()).json();
        let word = |name: &str| answer[name].as_str().unwrap_or_default().to_owned();
        (word("decision"), word("reason"))
    }

    /// Demands that the node decides by its bundle: one allow, one deny.
    #[track_caller]
    pub(crate) fn decides(&self) {
        let word = |d: &str, r: &str| (d.to_owned(), r.to_owned());
        assert_eq!(self.may_read("/srv/a.txt"), word("allow", "POLICY_ALLOW"));
        assert_eq!(self.may_read("/etc/shadow"), word("deny", "NO_MATCH"));
    }

    /// An ECDSA P-256 key, made as a policy authority would.
    pub(crate) fn signing_key(&self, name: &str) {
        let dir = self.dir.path();
        let curve = "ec_paramgen_curve:P-256";
        openssl(
            dir,
            &[
                "genpkey",
                "-algorithm",
                "EC",
                "-pkeyopt",
                curve,
                "-out",
                name,
            ],
        );
    }

    /// The text of a trust file that believes one key.
    pub(crate) fn trust(&self, key: &str) -> String {
        let public = openssl(self.dir.path(), &["pkey", "-in", key, "-pubout"]);
        format!(
            "format = 1\ndomain = \"{DOMAIN}\"\nthreshold = 1\n\n[[keys]]\nid = \"harbour-master\"\n\
             public_key_pem = \"\"\"\n{public}\"\"\"\n"
        )
    }

    /// Lets `openssl ca` act with the site CA's key, for what `tidelock ca` refuses to make.
    fn foreign_hand(&self) -> PathBuf {
        let dir = self.path("ca");
        if !dir.join("openssl.cnf").exists() {
            fs::write(dir.join("index.txt"), "").unwrap();
            fs::write(
                dir.join("openssl.cnf"),
                "[ca]\ndefault_ca = site\n[site]\ndatabase = index.txt\nnew_certs_dir = .\n\
                 crlnumber = crlnumber\ncertificate = ca.crt\nprivate_key = ca.key\n\
                 default_md = sha256\npolicy = names\nrand_serial = yes\nunique_subject = no\n\
                 crl_extensions = crl\n[names]\ncommonName = supplied\n\
                 [crl]\nauthorityKeyIdentifier = keyid\n\
                 [node]\nbasicConstraints = critical,CA:FALSE\n\
                 extendedKeyUsage = serverAuth,clientAuth\n\
                 subjectAltName = URI:spiffe://harbour/domains/harbour/peers/a\n\
                 authorityKeyIdentifier = keyid\n[req]\ndistinguished_name = dn\n[dn]\n",
            )
            .unwrap();
        }
        dir
    }

    /// Replaces `site.crl` by one of the site's CA that expired in 2021.
    pub(crate) fn expired_crl(&self, number: u8) {
        let dir = self.foreign_hand();
        fs::write(dir.join("crlnumber"), format!("{number:02X}\n")).unwrap();
        let make = [
            "ca",
            "-gencrl",
            "-config",
            "openssl.cnf",
            "-out",
            "../site.crl",
        ];
        let dates = [
            "-crl_lastupdate",
            "200101000000Z",
            "-crl_nextupdate",
            "210101000000Z",
        ];
        openssl(&dir, &[make.as_slice(), &dates].concat());
    }

    /// Replaces the certificate of node `a` by one of the site's CA that expired in 2021.
    pub(crate) fn expired_certificate(&self) {
        let dir = self.foreign_hand();
        let ask = ["req", "-new", "-config", "openssl.cnf", "-key", "../a.key"];
        openssl(
            &dir,
            &[ask.as_slice(), &["-subj", "/CN=a", "-out", "a.csr"]].concat(),
        );
        let make = [
            "ca",
            "-batch",
            "-notext",
            "-config",
            "openssl.cnf",
            "-in",
            "a.csr",
        ];
        let rest = ["-extensions", "node", "-out", "../a.crt"];
        let dates = ["-startdate", "200101000000Z", "-enddate", "210101000000Z"];
        openssl(&dir, &[make.as_slice(), &rest, &dates].concat());
    }

    /// Builds the bundle directory with a changed manifest, and signs the archive.
    pub(crate) fn bundle(&self, archive: &str, key: &str, change: impl FnOnce(&mut Value)) {
        let original = self.read("policy/manifest.json");
        let mut manifest: Value = serde_json::from_str(&original).unwrap();
        change(&mut manifest);
        self.write("policy/manifest.json", &manifest.to_string());
        self.ok(&["bundle", "build", "policy", "--out", archive]);
        self.write("policy/manifest.json", &original);
        self.ok(&["bundle", "sign", archive, "--key", key]);
    }

    /// The config of node `a`.
    pub(crate) fn config(&self) -> String {
        format!(
            "[node]\nid = \"a\"\ndomain = \"{DOMAIN}\"\nroot = \"root\"\nceiling_bytes = \"32MiB\"\n\n\
             [identity]\ncertificate = \"a.crt\"\nkey = \"a.key\"\nca = \"ca/ca.crt\"\n\n\
             [revocation]\ncrls = [\"site.crl\"]\n\n[policy]\ntrust = \"trust.toml\"\n\n\
             [gateway]\nunix = \"s\"\n\n[audit]\ncustody = 0\n\n[mesh]\nlisten = \"{}\"\n",
            free_udp()
        )
    }

    /// Changes one place of the config; the place must be there.
    #[track_caller]
    pub(crate) fn configure(&self, from: &str, to: &str) {
        let text = self.read("tidelock.toml");
        assert!(text.contains(from), "no `{from}` in the config:\n{text}");
        self.write("tidelock.toml", &text.replace(from, to));
    }

    /// Starts node `a` and waits until it answers.
    #[track_caller]
    pub(crate) fn start(&self) -> Node<'_> {
        self.start_as(Path::new(env!("CARGO_BIN_EXE_tidelock")), &[])
    }

    /// Starts node `a` with these in its environment.
    #[track_caller]
    pub(crate) fn start_with(&self, environment: &[(&str, &str)]) -> Node<'_> {
        self.start_as(Path::new(env!("CARGO_BIN_EXE_tidelock")), environment)
    }

    /// Starts node `a` from this copy of the program, with these in its environment, and waits until
    /// it answers.
    #[track_caller]
    pub(crate) fn start_as(&self, program: &Path, environment: &[(&str, &str)]) -> Node<'_> {
        let log = fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.path("node.log"))
            .unwrap();
        let child = Command::new(program)
            .current_dir(self.dir.path())
            .args(["run", "-c", "tidelock.toml"])
            .envs(environment.iter().copied())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        let mut node = Node { site: self, child };
        until("the node to answer", || {
            if let Some(status) = node.child.try_wait().unwrap() {
                panic!("the node ended with {status}:\n{}", self.read("node.log"));
            }
            let (status, _) = over_unix(&self.path("s"), &request("GET", "/healthz", &[], b""))?;
            (status == 200).then_some(())
        });
        node
    }

    /// Starts node `a` with its bundle installed.
    #[track_caller]
    pub(crate) fn start_deciding(&self) -> Node<'_> {
        let node = self.start();
        self.ok(&["bundle", "install", "site-1.tar", "--apply"]);
        node
    }

    /// What keeps node `a` from starting.
    pub(crate) fn refused_start(&self) -> Ran {
        let ran = self.tidelock(&["run", "-c", "tidelock.toml"]);
        assert!(!ran.err.contains("panicked"), "{ran:?}");
        ran.ended(2)
    }

    /// What `status --json` answers.
    #[track_caller]
    pub(crate) fn status(&self) -> Value {
        self.json(&["status"])
    }

    /// Why the transport is closed, demanding that it is, and that status, doctor and the audit
    /// log all show it.
    #[track_caller]
    pub(crate) fn transport_closed(&self) -> String {
        let why = until("a closed transport", || {
            self.status()["mesh"]["reason"].as_str().map(str::to_owned)
        });
        assert_eq!(self.status()["mesh"]["enabled"], false);
        self.ok(&["status"]).says(&["closed", &why]);
        let doctor = self.tidelock(&["doctor"]).ended(1);
        doctor.says(&["the transport is closed", &why]);
        why
    }

    /// Demands that the transport is open.
    #[track_caller]
    pub(crate) fn transport_open(&self) {
        until("an open transport", || {
            (self.status()["mesh"]["enabled"] == true).then_some(())
        });
    }

    /// Every record of the running node's own log: index, leaf, record.
    #[track_caller]
    pub(crate) fn records(&self) -> Vec<Value> {
        let answer = self.json(&["audit", "tail", "--all"]);
        answer["records"].as_array().unwrap().clone()
    }

    /// The details of the events of one kind in the own log.
    #[track_caller]
    pub(crate) fn events(&self, kind: &str) -> Vec<Value> {
        self.records()
            .iter()
            .filter(|r| r["record"]["type"] == kind)
            .map(|r| r["record"]["detail"].clone())
            .collect()
    }

    /// One operator's operation that has no command of its own.
    #[track_caller]
    pub(crate) fn operate(&self, op: &str) -> Value {
        let request = request("POST", &format!("/v1/admin/{op}?apply=true"), &[], b"{}");
        let (status, body) = over_unix(&self.path("s"), &request).unwrap();
        assert_eq!(status, 200, "{body}");
        serde_json::from_str(&body).unwrap()
    }
}

/// A running node; killed where a test ends without stopping it.
pub(crate) struct Node<'s> {
    site: &'s Site,
    child: Child,
}

/// Every sync of file contents that a node asks for fails while this lives: strace, attached to the
/// running process.
pub(crate) struct FailingSyncs(Child);

impl FailingSyncs {
    /// From now on; otherwise why that cannot be had here.
    pub(crate) fn of(node: &Node<'_>) -> Result<Self, String> {
        let pid = node.child.id().to_string();
        let out = node.site.path("strace");
        // The message of having attached goes to a file: nobody would empty a pipe.
        let said = fs::File::create(&out).unwrap();
        let strace = Command::new("strace")
            .args(["-f", "-o", "/dev/null", "-e", "trace=fdatasync"])
            .args(["-e", "inject=fdatasync:error=EIO", "-p", &pid])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(said)
            .spawn()
            .map_err(|error| format!("strace: {error}"))?;
        let mut failing = Self(strace);
        until("strace to attach", || {
            if failing.0.try_wait().unwrap().is_some() {
                return Some(Err(fs::read_to_string(&out).unwrap()));
            }
            let attached = fs::read_to_string(&out).unwrap().contains("attached");
            attached.then_some(Ok(()))
        })?;
        Ok(failing)
    }

    /// The syncs succeed again. The process is not disturbed otherwise.
    pub(crate) fn end(mut self) {
        kill_process(Pid::from_child(&self.0), Signal::TERM).unwrap();
        until("strace to let go", || self.0.try_wait().unwrap());
    }
}

impl Drop for FailingSyncs {
    fn drop(&mut self) {
        // Gone already where the test came to its end.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Node<'_> {
    /// The process.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal to the process.
    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// Makes it reload and waits for the word on it: `reloaded` or `reload_refused`.
    #[track_caller]
    pub(crate) fn reload(&self, word: &str) -> Value {
        // Asked at the socket: the command line would read the very config that is broken.
        let seen = || -> Vec<Value> {
            let entries = self.site.operate("journal")["entries"].clone();
            let entries = entries.as_array().unwrap().iter();
            entries.filter(|e| e["event"] == word).cloned().collect()
        };
        let before = seen().len();
        self.signal(Signal::HUP);
        until(word, || {
            let events = seen();
            (events.len() > before).then(|| events.last().unwrap().clone())
        })
    }

    /// Stops it with SIGTERM.
    #[track_caller]
    pub(crate) fn stop(self) -> ExitStatus {
        self.end(Signal::TERM)
    }

    /// Sends a signal that ends it, and waits for that.
    #[track_caller]
    pub(crate) fn end(mut self, signal: Signal) -> ExitStatus {
        self.signal(signal);
        until("the node to end", || self.child.try_wait().unwrap())
    }
}

impl Drop for Node<'_> {
    fn drop(&mut self) {
        // Ended already, in a test that stopped it.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
