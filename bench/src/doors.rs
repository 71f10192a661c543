//! Decisions over HTTP beside other decision points: the same hundred rules in each, the same
//! questions in the same order, `wrk` in turn at each of them. Ours writes its durable record before
//! each answer; Cerbos writes its decision log to a file; cedar-agent writes nothing.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use serde_json::{Value, json};
use tidelock::demo::{network::Loopback, site::Site};
use tidelock_policy::{BundleBuilder, Package, sign};

use crate::{
    Row, median,
    peers::{Log as _, raw::Raw},
    policy::{SCHEMA, manifest, questions, rules},
};

const RULES: usize = 100;
const SLICES: usize = 5;
const SLICE_S: u64 = 2;
const STARTS: usize = 9;
/// How long a server may take until it answers.
const START_LIMIT: Duration = Duration::from_secs(20);
/// What a node without peers and without callers settles in.
const SETTLE: Duration = Duration::from_secs(5);

const CERBOS: &str = "Cerbos 0.55";
const CEDAR_AGENT: &str = "cedar-agent 0.2";

type Result<T> = std::result::Result<T, String>;

fn text(error: impl ToString) -> String {
    error.to_string()
}

/// A program of a peer: where `just bench-peers` puts it, or named by `variable`.
fn program(variable: &str, place: &str) -> Result<PathBuf> {
    let path = std::env::var_os(variable).map_or_else(|| PathBuf::from(place), PathBuf::from);
    path.canonicalize()
        .map_err(|_| format!("{} is not there: just bench-peers", path.display()))
}

/// An address that nobody listens on just now.
fn free() -> Result<SocketAddr> {
    let socket = TcpListener::bind("127.0.0.1:0").map_err(text)?;
    socket.local_addr().map_err(text)
}

/// A process that ends with its owner.
struct Process(Child);

impl Process {
    fn start(command: &mut Command, log: &Path) -> Result<Self> {
        let log = fs::File::create(log).map_err(text)?;
        let log_too = log.try_clone().map_err(text)?;
        let command = command.stdin(Stdio::null()).stdout(log).stderr(log_too);
        command.spawn().map(Self).map_err(text)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// One server, and how it is asked.
struct Server {
    address: SocketAddr,
    path: &'static str,
    headers: Vec<String>,
    /// Questions, and whether they are allowed.
    bodies: Vec<(String, bool)>,
    allowed: fn(&Value) -> Option<bool>,
}

impl Server {
    /// One request on a connection of its own.
    fn send(&self, method: &str, path: &str, body: &str) -> Result<(u16, Vec<u8>)> {
        let mut stream = TcpStream::connect(self.address).map_err(text)?;
        stream
            .set_read_timeout(Some(Duration::from_secs(5)))
            .map_err(text)?;
        let mut head = format!(
            "{method} {path} HTTP/1.1\r\nhost: {}\r\nconnection: close\r\ncontent-length: {}\r\n",
            self.address,
            body.len()
        );
        for header in &self.headers {
            head.push_str(&format!("{header}\r\n"));
        }
        stream
            .write_all(format!("{head}\r\n{body}").as_bytes())
            .map_err(text)?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).map_err(text)?;
        let end = answer
            .windows(4)
            .position(|w| w == b"\r\n\r\n")
            .ok_or("no answer")?;
        let status = std::str::from_utf8(&answer[..end])
            .ok()
            .and_then(|head| head.split(' ').nth(1)?.parse().ok())
            .ok_or("no status")?;
        Ok((status, answer.split_off(end + 4)))
    }

    fn ask(&self, body: &str) -> Result<bool> {
        let (status, answer) = self.send("POST", self.path, body)?;
        let value: Value = serde_json::from_slice(&answer).unwrap_or_default();
        (self.allowed)(&value)
            .ok_or_else(|| format!("status {status}: {}", String::from_utf8_lossy(&answer)))
    }

    /// Asks until there is an answer.
    fn await_answer(&self) -> Result<()> {
        let begun = Instant::now();
        let (body, _) = &self.bodies[0];
        loop {
            match self.ask(body) {
                Ok(true) => return Ok(()),
                _ if begun.elapsed() < START_LIMIT => {
                    std::thread::sleep(Duration::from_micros(500));
                }
                Ok(false) => return Err("denied what is allowed".to_owned()),
                Err(why) => return Err(why),
            }
        }
    }

    /// Answers are checked before they are timed.
    fn check(&self) -> Result<()> {
        for (body, allowed) in &self.bodies {
            if self.ask(body)? != *allowed {
                return Err(format!("{} answers otherwise to {body}", self.path));
            }
        }
        Ok(())
    }
}

/// What `wrk` saw in one slice.
struct Seen {
    p50_ms: f64,
    p99_ms: f64,
    per_s: f64,
}

const SCRIPT: &str = r#"
local requests, at = {}, 0
init = function(args)
  for line in io.lines(args[1]) do
    requests[#requests + 1] = wrk.format("POST", nil, nil, line)
  end
  if #requests == 0 then requests[1] = wrk.format("GET") end
end
request = function() at = at % #requests + 1; return requests[at] end
done = function(summary, latency)
  local e = summary.errors
  io.write(string.format('\n{"p50":%d,"p99":%d,"requests":%d,"us":%d,"errors":%d}\n',
    latency:percentile(50), latency:percentile(99), summary.requests, summary.duration,
    e.connect + e.read + e.write + e.status + e.timeout))
end
"#;

/// One slice of `wrk` at a server.
fn wrk(server: &Server, dir: &Path, connections: usize) -> Result<Seen> {
    let (script, questions) = (dir.join("wrk.lua"), dir.join("questions"));
    let lines: Vec<&str> = server
        .bodies
        .iter()
        .map(|(body, _)| body.as_str())
        .collect();
    fs::write(&script, SCRIPT).map_err(text)?;
    fs::write(&questions, lines.join("\n")).map_err(text)?;
    let mut command = Command::new("wrk");
    command.args([
        "-t1",
        &format!("-c{connections}"),
        &format!("-d{SLICE_S}s"),
        "-s",
    ]);
    command.arg(&script);
    for header in &server.headers {
        command.args(["-H", header]);
    }
    command.arg(format!("http://{}{}", server.address, server.path));
    let output = command
        .arg("--")
        .arg(&questions)
        .output()
        .map_err(|e| format!("wrk: {e} (Debian's package wrk)"))?;
    let printed = String::from_utf8_lossy(&output.stdout);
    let line = printed.lines().rev().find(|line| line.starts_with('{'));
    let seen: Value = line
        .and_then(|line| serde_json::from_str(line).ok())
        .ok_or_else(|| format!("wrk said nothing: {printed}"))?;
    let number = |key: &str| seen[key].as_f64().unwrap_or_default();
    if number("errors") > 0.0 || number("requests") < 1.0 {
        return Err(format!("wrk at {}: {line:?}", server.path));
    }
    Ok(Seen {
        p50_ms: number("p50") / 1e3,
        p99_ms: number("p99") / 1e3,
        per_s: number("requests") / (number("us") / 1e6),
    })
}

/// The groups of this area are called from no runtime.
fn block_on<T>(run: impl Future<Output = Result<T>>) -> Result<T> {
    tokio::runtime::Runtime::new().map_err(text)?.block_on(run)
}

/// The path of a question's resource.
fn path_of(n: usize) -> String {
    format!("/srv/team-{n}/src/main.rs")
}

/// A node with the hundred rules, at a TCP door.
struct Ours<'n> {
    site: Site<'n>,
    server: Server,
}

impl<'n> Ours<'n> {
    async fn start(dir: &Path, network: &'n Loopback) -> Result<Self> {
        let tidelock = program("TIDELOCK", "target/release/tidelock")?;
        let mut site = Site::prepare(dir, &tidelock, network, &["a"]).map_err(|f| f.message)?;
        let address = free()?;
        let config = site.node("a").map_err(text)?.config_path();
        let with_door = fs::read_to_string(&config).map_err(text)?.replace(
            "unix = \"s\"",
            &format!("unix = \"s\"\ntcp = \"{address}\""),
        );
        fs::write(&config, with_door).map_err(text)?;
        let minted = Command::new(&tidelock)
            .args([
                "token",
                "new",
                "--json",
                "--act-as",
                "--principal",
                "Service::bench",
            ])
            .output()
            .map_err(text)?;
        let minted: Value = serde_json::from_slice(&minted.stdout).map_err(text)?;
        let part = |key: &str| minted[key].as_str().unwrap_or_default().to_owned();
        // The token file was written with its mode; what stands in it is replaced.
        fs::write(
            dir.join("a/tokens.toml"),
            format!("format = 1\n\n{}", part("entry")),
        )
        .map_err(text)?;
        site.start("a").await.map_err(|f| f.message)?;
        let archive = BundleBuilder::new()
            .file("manifest.json", manifest("cedar"))
            .file("schema.cedarschema", SCHEMA.into())
            .file("policies/all.cedar", rules(RULES).into())
            .created_unix_ms(now_ms())
            .build()
            .map_err(text)?;
        let key = fs::read_to_string(dir.join("policy.key")).map_err(text)?;
        let package = Package {
            signatures: vec![sign(&archive, &key).map_err(text)?],
            archive,
        };
        let body = json!({"package": BASE64_STANDARD.encode(package.encode().map_err(text)?)});
        let node = site.node("a").map_err(text)?;
        node.operate("bundle.install", &body).await.map_err(text)?;
        let bodies = questions(RULES).map(|(n, allowed)| {
            let body = json!({
                "subject": {"type": "Agent", "id": format!("agent-{n}")},
                "action": {"name": "fs.read"},
                "resource": {"type": "File", "id": path_of(n)},
            });
            (body.to_string(), allowed)
        });
        let server = Server {
            address,
            path: "/access/v1/evaluation",
            headers: vec![
                "content-type: application/json".to_owned(),
                format!("authorization: Bearer {}", part("token")),
            ],
            bodies: bodies.collect(),
            allowed: |value| value["decision"].as_bool(),
        };
        Ok(Self { site, server })
    }
}

fn now_ms() -> u64 {
    std::time::UNIX_EPOCH
        .elapsed()
        .map_or(0, |since| since.as_millis() as u64)
}

fn cerbos(dir: &Path) -> Result<(Command, Server)> {
    let program = program(
        "CERBOS",
        "target/bench-peers/node_modules/@cerbos/cerbos-linux-x64/cerbos-linux-x64",
    )?;
    let policies = dir.join("policies");
    fs::create_dir_all(&policies).map_err(text)?;
    let mut policy = "apiVersion: api.cerbos.dev/v1\nresourcePolicy:\n  resource: file\n  version: default\n  rules:\n"
        .to_owned();
    for n in 0..RULES {
        policy.push_str(&format!(
            "    - actions: [\"read\"]\n      effect: EFFECT_ALLOW\n      roles: [\"agent\"]\n      condition:\n        \
             match:\n          all:\n            of:\n              - expr: P.id == \"agent-{n}\"\n              \
             - expr: R.attr.path.startsWith(\"/srv/team-{n}/\")\n"
        ));
    }
    fs::write(policies.join("file.yaml"), policy).map_err(text)?;
    let (http, grpc) = (free()?, free()?);
    let config = dir.join("cerbos.yaml");
    fs::write(
        &config,
        format!(
            "server:\n  httpListenAddr: \"{http}\"\n  grpcListenAddr: \"{grpc}\"\n\
             storage:\n  driver: disk\n  disk:\n    directory: {}\n    watchForChanges: false\n\
             telemetry:\n  disabled: true\n\
             audit:\n  enabled: true\n  accessLogsEnabled: false\n  decisionLogsEnabled: true\n  backend: file\n  \
             file:\n    path: {}\n",
            policies.display(),
            dir.join("audit.log").display()
        ),
    )
    .map_err(text)?;
    let mut command = Command::new(program);
    command.args(["server", "--log-level=error"]);
    command.arg(format!("--config={}", config.display()));
    let bodies = questions(RULES).map(|(n, allowed)| {
        let body = json!({
            "principal": {"id": format!("agent-{n}"), "roles": ["agent"]},
            "resources": [{
                "resource": {"kind": "file", "id": path_of(n), "attr": {"path": path_of(n)}},
                "actions": ["read"],
            }],
        });
        (body.to_string(), allowed)
    });
    let server = Server {
        address: http,
        path: "/api/check/resources",
        headers: vec!["content-type: application/json".to_owned()],
        bodies: bodies.collect(),
        allowed: |value| Some(value.pointer("/results/0/actions/read")? == "EFFECT_ALLOW"),
    };
    Ok((command, server))
}

fn cedar_agent(dir: &Path) -> Result<(Command, Server)> {
    let program = program("CEDAR_AGENT", "target/bench-peers/bin/cedar-agent")?;
    let address = free()?;
    let policies: Vec<Value> = rules(RULES)
        .lines()
        .enumerate()
        .map(|(n, rule)| json!({"id": format!("p{n}"), "content": rule}))
        .collect();
    let file = dir.join("policies.json");
    fs::write(&file, Value::from(policies).to_string()).map_err(text)?;
    let mut command = Command::new(program);
    command
        .args(["--addr", "127.0.0.1", "--log-level", "off", "--port"])
        .arg(address.port().to_string())
        .arg("--policies")
        .arg(file);
    let bodies = questions(RULES).map(|(n, allowed)| {
        let path = path_of(n);
        let body = json!({
            "principal": format!("Agent::\"agent-{n}\""),
            "action": "Action::\"fs.read\"",
            "resource": format!("File::\"{path}\""),
            "context": {},
            "additional_entities": [
                {"uid": {"type": "File", "id": path}, "parents": [],
                 "attrs": {"path": path, "name": "main.rs", "dir": format!("/srv/team-{n}/src")}},
            ],
        });
        (body.to_string(), allowed)
    });
    let server = Server {
        address,
        path: "/v1/is_authorized",
        headers: vec!["content-type: application/json".to_owned()],
        bodies: bodies.collect(),
        allowed: |value| Some(value["decision"].as_str()? == "Allow"),
    };
    Ok((command, server))
}

fn place(dir: &Path, name: &str) -> Result<PathBuf> {
    let dir = dir.join(name);
    fs::create_dir_all(&dir).map_err(text)?;
    Ok(dir)
}

/// What one server came to over all slices.
#[derive(Default)]
struct Slices {
    p50_ms: Vec<f64>,
    p99_ms: Vec<f64>,
    per_s: Vec<f64>,
}

impl Slices {
    fn add(&mut self, seen: Seen) {
        self.p50_ms.push(seen.p50_ms);
        self.p99_ms.push(seen.p99_ms);
        self.per_s.push(seen.per_s);
    }

    fn medians(self) -> (f64, f64, f64) {
        (median(self.p50_ms), median(self.p99_ms), median(self.per_s))
    }
}

/// Each server's slices with so many connections, in turn.
fn interleaved<const N: usize>(
    servers: [&Server; N],
    dir: &Path,
    connections: usize,
) -> Result<[(f64, f64, f64); N]> {
    let mut slices: [Slices; N] = std::array::from_fn(|_| Slices::default());
    for server in servers {
        wrk(server, dir, connections)?;
    }
    for _ in 0..SLICES {
        for (server, slices) in servers.iter().zip(&mut slices) {
            slices.add(wrk(server, dir, connections)?);
        }
    }
    Ok(slices.map(Slices::medians))
}

/// What no decision of ours can be faster than here: the way to the same server and back for an answer
/// that needs nothing, and a lone write with its sync. Median and 99th of a hundred, in milliseconds.
struct Floor {
    http: (f64, f64),
    sync: (f64, f64),
}

impl Floor {
    fn detail(&self) -> Value {
        json!({"http_without_decision_ms": {"p50": self.http.0, "p99": self.http.1},
               "write_and_sync_ms": {"p50": self.sync.0, "p99": self.sync.1}})
    }
}

/// One write of 512 bytes and its sync after another.
fn lone_syncs(dir: &Path) -> Result<(f64, f64)> {
    const COUNT: usize = 4_000;
    let raw = Raw::open(dir)?;
    let mut took_ms = Vec::with_capacity(COUNT);
    for _ in 0..COUNT {
        let begun = Instant::now();
        raw.append(0, &[7; 512])?;
        took_ms.push(begun.elapsed().as_secs_f64() * 1e3);
    }
    took_ms.sort_by(f64::total_cmp);
    Ok((took_ms[COUNT / 2], took_ms[COUNT * 99 / 100]))
}

/// The rows over HTTP.
pub fn over_http(dir: &Path) -> Vec<Row> {
    const IDS: [(&str, &str, &str); 4] = [
        ("authzen-1-p50", CERBOS, "<= 0.2"),
        ("authzen-1-p99", CERBOS, "<= 0.1"),
        ("authzen-16", CERBOS, ">= 6"),
        ("authzen-1-cedar-agent", CEDAR_AGENT, "<= 0.4"),
    ];
    let run = async {
        let network = Loopback::new(&["a"]).await.map_err(text)?;
        let ours = Ours::start(dir, &network).await?;
        let (mut command, cerbos) = cerbos(&place(dir, "cerbos")?)?;
        let _cerbos = Process::start(&mut command, &dir.join("cerbos.log"))?;
        let (mut command, agent) = cedar_agent(&place(dir, "cedar-agent")?)?;
        let _agent = Process::start(&mut command, &dir.join("cedar-agent.log"))?;
        let all = [&ours.server, &cerbos, &agent];
        for server in all {
            server.await_answer()?;
            server.check()?;
        }
        let bare = Server {
            address: ours.server.address,
            path: "/.well-known/authzen-configuration",
            headers: Vec::new(),
            bodies: Vec::new(),
            allowed: |_| None,
        };
        let [ours_one, cerbos_one, agent_one, bare_one] =
            interleaved([&ours.server, &cerbos, &agent, &bare], dir, 1)?;
        let one = [ours_one, cerbos_one, agent_one];
        let floor = Floor {
            http: (bare_one.0, bare_one.1),
            sync: lone_syncs(&place(dir, "syncs")?)?,
        };
        let many = interleaved(all, dir, 16)?;
        drop(ours);
        // A node always writes its records: without a log is with one that lies in memory.
        let memory = tempfile::tempdir_in("/dev/shm").map_err(text)?;
        let network = Loopback::new(&["a"]).await.map_err(text)?;
        let ours = Ours::start(memory.path(), &network).await?;
        ours.server.check()?;
        let unlogged = interleaved([&ours.server, &agent], dir, 1)?;
        Ok::<_, String>((one, many, unlogged, floor))
    };
    match block_on(run) {
        Ok((
            [one, cerbos_one, agent_logged],
            [many, cerbos_many, agent_many],
            [unlogged, agent_one],
            floor,
        )) => vec![
            Row::measured(IDS[0].0, "ms p50", (one.0, CERBOS, cerbos_one.0), IDS[0].2, |r| {
                r <= 0.2
            })
            .noting(format!(
                "an answer without a decision takes {:.2} ms, a write and its sync {:.2}",
                floor.http.0, floor.sync.0
            ))
            .with(floor.detail()),
            Row::measured(IDS[1].0, "ms p99", (one.1, CERBOS, cerbos_one.1), IDS[1].2, |r| {
                r <= 0.1
            })
            .noting(format!(
                "an answer without a decision takes {:.2} ms, a write and its sync {:.2}",
                floor.http.1, floor.sync.1
            )),
            Row::measured(IDS[2].0, "per s", (many.2, CERBOS, cerbos_many.2), IDS[2].2, |r| {
                r >= 6.0
            })
            .with(json!({"p50_ms": {"ours": many.0, "cerbos": cerbos_many.0, "cedar_agent": agent_many.0},
                         "p99_ms": {"ours": many.1, "cerbos": cerbos_many.1, "cedar_agent": agent_many.1},
                         "cedar_agent_per_s": agent_many.2})),
            Row::measured(
                IDS[3].0,
                "ms p50",
                (unlogged.0, CEDAR_AGENT, agent_one.0),
                IDS[3].2,
                |r| r <= 0.4,
            )
            .noting(format!("an answer without a decision takes {:.2} ms", floor.http.0))
            .with(json!({"p99_ms": {"ours": unlogged.1, "cedar_agent": agent_one.1},
                         "on_disk_p50_ms": {"ours": one.0, "cedar_agent": agent_logged.0}})),
        ],
        Err(why) => IDS
            .iter()
            .map(|(id, peer, aim)| Row::not_run(id, peer, aim, why.clone()))
            .collect(),
    }
}

fn resident_mib(process: u32) -> Result<f64> {
    let status = fs::read_to_string(format!("/proc/{process}/status")).map_err(text)?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:"));
    line.and_then(|l| l.trim().trim_end_matches(" kB").parse::<f64>().ok())
        .map(|kib| kib / 1_024.0)
        .ok_or_else(|| "no VmRSS".to_owned())
}

/// From the start of the process to the first decision, and what it holds when nobody asks.
pub fn start(dir: &Path) -> Vec<Row> {
    const IDS: [(&str, &str, &str); 2] = [
        ("start-to-decision", CERBOS, "<= 60 ms"),
        ("idle-rss-100-rules", CERBOS, "<= 40 MiB"),
    ];
    let run = async {
        let network = Loopback::new(&["a"]).await.map_err(text)?;
        let mut ours = Ours::start(dir, &network).await?;
        ours.server.await_answer()?;
        let peer_dir = place(dir, "cerbos")?;
        let (mut command, cerbos) = cerbos(&peer_dir)?;
        let tidelock = program("TIDELOCK", "target/release/tidelock")?;
        let config = ours.site.node("a").map_err(text)?.config_path();
        ours.site.kill("a").map_err(|f| f.message)?;
        let (mut own_ms, mut cerbos_ms) = (Vec::new(), Vec::new());
        let (mut own_mib, mut cerbos_mib) = (0.0, 0.0);
        for n in 0..STARTS {
            let last = n + 1 == STARTS;
            let mut own = Command::new(&tidelock);
            own.arg("run").arg("-c").arg(&config);
            for (command, server, times, mib) in [
                (&mut own, &ours.server, &mut own_ms, &mut own_mib),
                (&mut command, &cerbos, &mut cerbos_ms, &mut cerbos_mib),
            ] {
                let begun = Instant::now();
                let process = Process::start(command, &dir.join("start.log"))?;
                server.await_answer()?;
                times.push(begun.elapsed().as_secs_f64() * 1e3);
                if last {
                    server.check()?;
                    std::thread::sleep(SETTLE);
                    *mib = resident_mib(process.0.id())?;
                }
            }
        }
        Ok::<_, String>((median(own_ms), median(cerbos_ms), own_mib, cerbos_mib))
    };
    match block_on(run) {
        Ok((own_ms, cerbos_ms, own_mib, cerbos_mib)) => vec![
            Row::absolute(
                IDS[0].0,
                "ms",
                own_ms,
                Some((CERBOS, cerbos_ms)),
                IDS[0].2,
                own_ms <= 60.0,
            ),
            Row::absolute(
                IDS[1].0,
                "MiB",
                own_mib,
                Some((CERBOS, cerbos_mib)),
                IDS[1].2,
                own_mib <= 40.0,
            ),
        ],
        Err(why) => IDS
            .iter()
            .map(|(id, peer, aim)| Row::not_run(id, peer, aim, why.clone()))
            .collect(),
    }
}
