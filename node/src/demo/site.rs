//! The site of the story: a CA, a policy authority, three nodes with their files and processes.

use std::{
    fmt::Write as _,
    fs, io,
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Child, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use serde_json::Value;
use tidelock_gateway::{Client, client::Door};
use tidelock_policy::{BundleBuilder, Package, sign};
use tidelock_segments::{DomainId, NodeId};

use super::{network::Network, until};
use crate::{
    ca::{Ca, IdentityFiles},
    cli::{Failure, new_token},
    clock::wall_unix_ms,
};

/// The nodes of the story.
pub const NODES: [&str; 3] = ["a", "b", "c"];
/// Their domain.
pub const DOMAIN: &str = "harbour";
/// The bundle's age at which answers say `stale`, seconds. The demo uses seconds; sites use days.
pub const STALE_AFTER_S: u64 = 12;
/// The ceiling that the nodes begin with, bytes.
pub const CEILING_BYTES: u64 = 96 << 20;

const YEAR: Duration = Duration::from_secs(365 * 86_400);
/// How long a node may take to answer its door.
const START_LIMIT: Duration = Duration::from_secs(20);

/// A story cannot go on.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Broken(pub String);

/// Shorthand for a step that did not show what it must.
pub fn broken(message: impl Into<String>) -> Broken {
    Broken(message.into())
}

/// The bundle of the story, as files: its policies are those of `tests/data/bundle`.
macro_rules! bundle_files {
    ($($path:literal),* $(,)?) => {
        &[$(($path, include_bytes!(concat!("../../../tests/data/bundle/", $path)).as_slice())),*]
    };
}

include!("bundle_files.rs");

/// One node: its files, and its process while that runs.
#[derive(Debug)]
pub struct Node {
    /// Node id.
    pub id: &'static str,
    /// Its directory.
    pub dir: PathBuf,
    ceiling_bytes: u64,
    client: Arc<Client>,
    operator: Client,
    child: Option<Child>,
}

/// Everything that the story is played with.
pub struct Site<'n> {
    /// Where all of it lies.
    pub dir: PathBuf,
    /// The ground.
    pub network: &'n dyn Network,
    /// The CA.
    pub ca: Ca,
    /// The nodes.
    pub nodes: Vec<Node>,
    program: PathBuf,
    policy_key_pem: String,
}

fn now_s() -> u64 {
    wall_unix_ms() / 1_000
}

impl<'n> Site<'n> {
    /// Makes the CA with its first CRL, the policy authority's key, and the files of the nodes `ids`.
    ///
    /// # Errors
    /// What the system said.
    pub fn prepare(
        dir: &Path,
        program: &Path,
        network: &'n dyn Network,
        ids: &[&'static str],
    ) -> Result<Self, Failure> {
        let domain = DomainId::new(DOMAIN)?;
        let mut ca = Ca::init(&dir.join("ca"), &domain, now_s(), YEAR, YEAR)?;
        let policy_key = rcgen::KeyPair::generate()?;
        let policy_key_pem = policy_key.serialize_pem();
        let policy_key_path = dir.join("policy.key");
        crate::ca::replace(&policy_key_path, policy_key_pem.as_bytes(), 0o600)?;
        let trust = format!(
            "format = 1\ndomain = \"{DOMAIN}\"\nthreshold = 1\n\n[[keys]]\nid = \"harbour-master\"\npublic_key_pem = \"\"\"\n{}\"\"\"\n",
            policy_key.public_key_pem()
        );
        fs::write(dir.join("trust.toml"), trust)?;
        let mut nodes = Vec::new();
        for id in ids {
            let node_dir = dir.join(id);
            fs::create_dir_all(&node_dir)?;
            ca.issue(&NodeId::new(id)?, &node_dir, now_s(), YEAR)?;
            fs::copy(ca.crl_path(), node_dir.join("site.crl"))?;
            let (token, entry) = new_token("Service::story", true, None)?;
            crate::ca::replace(
                &node_dir.join("tokens.toml"),
                format!("format = 1\n\n{entry}").as_bytes(),
                0o600,
            )?;
            let door = Door::Unix(node_dir.join("s"));
            let node = Node {
                id,
                client: Arc::new(Client::new(door.clone(), Some(&token))?),
                operator: Client::new(door, None)?,
                dir: node_dir,
                ceiling_bytes: CEILING_BYTES,
                child: None,
            };
            nodes.push(node);
        }
        let site = Self {
            dir: dir.to_owned(),
            network,
            ca,
            nodes,
            program: program.to_owned(),
            policy_key_pem,
        };
        for node in &site.nodes {
            site.write_config(node)?;
        }
        Ok(site)
    }

    fn write_config(&self, node: &Node) -> Result<(), Failure> {
        let mut text = format!(
            "# written by tidelock demo\n[node]\nid = \"{id}\"\ndomain = \"{DOMAIN}\"\nroot = \"root\"\n\
             ceiling_bytes = {ceiling}\nreserve_bytes = 6291456\n\n\
             [identity]\ncertificate = \"{id}.crt\"\nkey = \"{id}.key\"\nca = \"../ca/ca.crt\"\n\n\
             [revocation]\ncrls = [\"site.crl\"]\n\n[policy]\ntrust = \"../trust.toml\"\n\n\
             [gateway]\nunix = \"s\"\ntokens = \"tokens.toml\"\n\n\
             [audit]\nsegment_bytes = \"256KiB\"\nsegment_max_age_s = 3600\ncustody = {custody}\n\n\
             [quota]\nactions_per_second = 200000\nactions_burst = 200000\n\n\
             [log]\nlevel = \"info\"\n\n\
             [mesh]\nlisten = \"{listen}\"\nredial_base_ms = 50\nredial_cap_ms = 500\n\
             keep_alive_ms = 250\nidle_timeout_ms = 1500\n",
            id = node.id,
            ceiling = node.ceiling_bytes,
            custody = self.nodes.len().saturating_sub(1).min(2),
            listen = self.network.listen(node.id),
        );
        for peer in self.nodes.iter().map(|n| n.id).filter(|p| *p != node.id) {
            let address = self.network.route(node.id, peer);
            let _ = write!(
                text,
                "\n[[mesh.peers]]\nid = \"{peer}\"\naddress = \"{address}\"\n"
            );
        }
        fs::write(node.config_path(), text)?;
        Ok(())
    }

    /// One node by its id.
    ///
    /// # Errors
    /// A name that no node has.
    pub fn node(&self, id: &str) -> Result<&Node, Broken> {
        self.nodes
            .iter()
            .find(|n| n.id == id)
            .ok_or_else(|| broken(format!("no node {id}")))
    }

    fn node_mut(&mut self, id: &str) -> Result<&mut Node, Broken> {
        self.nodes
            .iter_mut()
            .find(|n| n.id == id)
            .ok_or_else(|| broken(format!("no node {id}")))
    }

    /// Changes a node's ceiling in its config and makes the node reload.
    ///
    /// # Errors
    /// What the system said.
    pub fn set_ceiling(&mut self, id: &str, ceiling_bytes: u64) -> Result<(), Failure> {
        self.node_mut(id)?.ceiling_bytes = ceiling_bytes;
        self.write_config(self.node(id)?)?;
        self.node(id)?.signal(rustix::process::Signal::HUP)?;
        Ok(())
    }

    /// Starts a node's process and waits until it answers; answers how long that took.
    ///
    /// # Errors
    /// The process that ended or did not answer, with the end of its log.
    pub async fn start(&mut self, id: &str) -> Result<Duration, Failure> {
        let node = self.node(id)?;
        let mut command = self.network.command(id, &self.program);
        let log = fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(node.log_path())?;
        command
            .args(["run", "-c"])
            .arg(node.config_path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .process_group(0);
        let begun = Instant::now();
        let child = command.spawn()?;
        self.node_mut(id)?.child = Some(child);
        loop {
            let node = self.node_mut(id)?;
            if let Some(child) = &mut node.child
                && let Some(status) = child.try_wait()?
            {
                let tail = node.log_tail();
                return Err(Failure::failed(format!(
                    "node {id} ended with {status}:\n{tail}"
                )));
            }
            if let Ok((200, _)) = node.operator.get("/healthz").await {
                return Ok(begun.elapsed());
            }
            if begun.elapsed() > START_LIMIT {
                let tail = node.log_tail();
                return Err(Failure::failed(format!(
                    "node {id} does not answer:\n{tail}"
                )));
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    /// Kills a node's process with SIGKILL.
    ///
    /// # Errors
    /// What the system said.
    pub fn kill(&mut self, id: &str) -> Result<(), Failure> {
        if let Some(mut child) = self.node_mut(id)?.child.take() {
            child.kill()?;
            child.wait()?;
        }
        Ok(())
    }

    /// Builds and signs the story's bundle at `epoch`.
    ///
    /// # Errors
    /// What the bundle maker said.
    pub fn bundle(&self, epoch: u64) -> Result<Package, Failure> {
        let mut builder = BundleBuilder::new();
        for (path, bytes) in BUNDLE_FILES {
            builder = builder.file(path, bytes.to_vec());
        }
        let archive = builder
            .domain(DOMAIN)
            .epoch(epoch)
            .created_unix_ms(wall_unix_ms())
            .build()?;
        let signature = sign(&archive, &self.policy_key_pem)?;
        Ok(Package {
            archive,
            signatures: vec![signature],
        })
    }

    /// Issues a new certificate under a new key to a node and makes it reload.
    ///
    /// # Errors
    /// What the CA or the system said.
    pub fn reissue(&mut self, id: &str) -> Result<IdentityFiles, Failure> {
        let dir = self.node(id)?.dir.clone();
        let files = self.ca.issue(&NodeId::new(id)?, &dir, now_s(), YEAR)?;
        self.node(id)?.signal(rustix::process::Signal::HUP)?;
        Ok(files)
    }

    /// Revokes every certificate of a node and writes the next CRL; answers it with its number.
    ///
    /// # Errors
    /// What the CA said.
    pub fn revoke(&mut self, id: &str) -> Result<(u64, Vec<u8>), Failure> {
        self.ca.revoke(id, now_s())?;
        let number = self.ca.write_crl(now_s(), YEAR)?;
        Ok((number, fs::read(self.ca.crl_path())?))
    }

    /// Runs an offline command of the program on a node's files.
    ///
    /// # Errors
    /// What the system said.
    pub async fn tidelock(&self, id: &str, arguments: &[&str]) -> Result<(bool, Value), Failure> {
        let node = self.node(id)?;
        let output = tokio::process::Command::new(&self.program)
            .args(arguments)
            .arg("--json")
            .arg("-c")
            .arg(node.config_path())
            .stdin(Stdio::null())
            .output()
            .await?;
        let value = serde_json::from_slice(&output.stdout).map_err(|e| {
            Failure::failed(format!(
                "tidelock {} printed no JSON ({e}): {}",
                arguments.join(" "),
                String::from_utf8_lossy(&output.stderr)
            ))
        })?;
        Ok((output.status.success(), value))
    }
}

impl Drop for Site<'_> {
    fn drop(&mut self) {
        for node in &mut self.nodes {
            if let Some(mut child) = node.child.take() {
                let _ = child.kill();
                let _ = child.wait();
            }
        }
    }
}

impl Node {
    /// Its config file.
    #[must_use]
    pub fn config_path(&self) -> PathBuf {
        self.dir.join("tidelock.toml")
    }

    /// Its root.
    #[must_use]
    pub fn root(&self) -> PathBuf {
        self.dir.join("root")
    }

    /// What it logs.
    #[must_use]
    pub fn log_path(&self) -> PathBuf {
        self.dir.join("node.log")
    }

    fn log_tail(&self) -> String {
        let text = fs::read_to_string(self.log_path()).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines
            .get(lines.len().saturating_sub(12)..)
            .unwrap_or_default()
            .join("\n")
    }

    /// A caller at its door, with the story's token.
    #[must_use]
    pub fn client(&self) -> Arc<Client> {
        self.client.clone()
    }

    /// Its process, while that runs.
    #[must_use]
    pub fn process_id(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    /// Sends a signal to its process.
    ///
    /// # Errors
    /// What the system said; a process that is gone.
    pub fn signal(&self, signal: rustix::process::Signal) -> io::Result<()> {
        let id = self.child.as_ref().map(Child::id).unwrap_or_default();
        let pid = i32::try_from(id)
            .ok()
            .and_then(rustix::process::Pid::from_raw)
            .ok_or(io::ErrorKind::NotFound)?;
        Ok(rustix::process::kill_process(pid, signal)?)
    }

    /// What `/v1/status` answers.
    ///
    /// # Errors
    /// Where the node does not answer with a document.
    pub async fn status(&self) -> Result<Value, Broken> {
        let (status, body) = self
            .operator
            .get("/v1/status")
            .await
            .map_err(|e| broken(format!("node {} does not answer: {e}", self.id)))?;
        if status != 200 {
            return Err(broken(format!("node {} answered status {status}", self.id)));
        }
        serde_json::from_slice(&body).map_err(|e| broken(format!("node {}: {e}", self.id)))
    }

    /// One operator's operation, applied.
    ///
    /// # Errors
    /// What the node said.
    pub async fn operate(&self, op: &str, body: &Value) -> Result<Value, Broken> {
        let path = format!("/v1/admin/{op}?apply=true");
        let bytes = serde_json::to_vec(body).map_err(|e| broken(e.to_string()))?;
        let (status, answer) = self
            .operator
            .post_json(&path, bytes)
            .await
            .map_err(|e| broken(format!("node {} does not answer: {e}", self.id)))?;
        let value: Value = serde_json::from_slice(&answer).unwrap_or_default();
        if status == 200 {
            Ok(value)
        } else {
            Err(broken(format!("{op} at {}: {status} {value}", self.id)))
        }
    }

    /// Waits until a value of the status satisfies `good`; answers that status.
    ///
    /// # Errors
    /// The last status seen, where the time ran out.
    pub async fn await_status(
        &self,
        what: &str,
        limit: Duration,
        good: impl Fn(&Value) -> bool,
    ) -> Result<Value, Broken> {
        let found = until(limit, || async {
            self.status().await.ok().filter(|status| good(status))
        })
        .await;
        match found {
            Some(status) => Ok(status),
            None => {
                let last = self.status().await.map_or_else(|e| e.0, |s| s.to_string());
                Err(broken(format!(
                    "node {} did not come to `{what}` within {} s; its status: {last}",
                    self.id,
                    limit.as_secs()
                )))
            }
        }
    }
}

/// The bytes that the file system allocates to a directory and all in it: what `du` counts.
#[must_use]
pub fn allocated_bytes(dir: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt as _;
    let own = fs::symlink_metadata(dir).map_or(0, |m| m.blocks() * 512);
    let Ok(entries) = fs::read_dir(dir) else {
        return own;
    };
    entries.flatten().fold(own, |sum, entry| {
        let path = entry.path();
        sum + match entry.file_type() {
            Ok(kind) if kind.is_dir() => allocated_bytes(&path),
            _ => fs::symlink_metadata(&path).map_or(0, |m| m.blocks() * 512),
        }
    })
}
