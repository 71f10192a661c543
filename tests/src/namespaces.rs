//! Three hosts in network namespaces, each with its own address, joined by a switch of their own.
//! A cut is the link of a host going down, as when a cable is pulled.

use std::{
    io::{self, Write as _},
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::Path,
    process::{Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
};

use tidelock::demo::network::Network;

/// UDP port of every node; each has an address of its own.
const PORT: u16 = 7411;

/// Several tests of one process may have namespaces at once.
static MADE: AtomicU32 = AtomicU32::new(0);

/// The namespaces; they go when this is dropped.
#[derive(Debug)]
pub struct Namespaces {
    prefix: String,
    nodes: Vec<String>,
}

fn ip(arguments: &[&str]) -> io::Result<()> {
    let output = Command::new("ip").args(arguments).output()?;
    if output.status.success() {
        return Ok(());
    }
    Err(io::Error::other(format!(
        "ip {}: {}",
        arguments.join(" "),
        String::from_utf8_lossy(&output.stderr).trim()
    )))
}

/// Why namespaces cannot be had here, if so.
#[must_use]
pub fn why_not() -> Option<String> {
    if !rustix::process::geteuid().is_root() {
        return Some("network namespaces need root".to_owned());
    }
    // Several tests of one process may ask at once.
    let asked = MADE.fetch_add(1, Ordering::Relaxed);
    let probe = format!("tlprobe{}x{asked}", std::process::id());
    match ip(&["netns", "add", &probe]) {
        Ok(()) => {
            let _ = ip(&["netns", "del", &probe]);
            None
        }
        Err(error) => Some(error.to_string()),
    }
}

/// Why packets cannot be counted here, if so.
#[must_use]
pub fn why_no_nft() -> Option<String> {
    match Command::new("nft").arg("--version").output() {
        Ok(output) if output.status.success() => None,
        Ok(output) => Some(String::from_utf8_lossy(&output.stderr).into_owned()),
        Err(error) => Some(format!("nft (Debian: nftables): {error}")),
    }
}

impl Namespaces {
    /// Makes a namespace for each node, one for the switch, and the links.
    ///
    /// # Errors
    /// What `ip` said.
    pub fn new(nodes: &[&str]) -> io::Result<Self> {
        let made = Self {
            prefix: format!(
                "tl{}x{}",
                std::process::id(),
                MADE.fetch_add(1, Ordering::Relaxed)
            ),
            nodes: nodes.iter().map(|n| (*n).to_owned()).collect(),
        };
        let switch = made.namespace("sw");
        ip(&["netns", "add", &switch])?;
        ip(&["-n", &switch, "link", "add", "br0", "type", "bridge"])?;
        ip(&["-n", &switch, "link", "set", "br0", "up"])?;
        for node in nodes {
            let namespace = made.namespace(node);
            let port = format!("to-{node}");
            ip(&["netns", "add", &namespace])?;
            // The kernel's own IPv6 chatter is nobody's packet, and would be counted as a node's.
            let quiet = "f=/proc/sys/net/ipv6/conf/all/disable_ipv6; [ ! -e $f ] || echo 1 >$f";
            made.exec(node, "sh", &["-c", quiet], "")?;
            ip(&["-n", &namespace, "link", "set", "lo", "up"])?;
            ip(&[
                "-n", &switch, "link", "add", &port, "type", "veth", "peer", "name", "eth0",
                "netns", &namespace,
            ])?;
            ip(&["-n", &switch, "link", "set", &port, "master", "br0"])?;
            ip(&["-n", &switch, "link", "set", &port, "up"])?;
            let address = format!("{}/24", made.listen(node).ip());
            ip(&["-n", &namespace, "addr", "add", &address, "dev", "eth0"])?;
            ip(&["-n", &namespace, "link", "set", "eth0", "up"])?;
        }
        Ok(made)
    }

    fn namespace(&self, node: &str) -> String {
        format!("{}{node}", self.prefix)
    }

    /// Runs a program on the host of a node with a text on its standard input; its output.
    ///
    /// # Errors
    /// What the program said where it failed.
    pub fn exec(
        &self,
        node: &str,
        program: &str,
        arguments: &[&str],
        input: &str,
    ) -> io::Result<String> {
        let mut child = self
            .command(node, Path::new(program))
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        if let Some(mut stdin) = child.stdin.take() {
            stdin.write_all(input.as_bytes())?;
        }
        let output = child.wait_with_output()?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        Err(io::Error::other(format!(
            "{program} {}: {}",
            arguments.join(" "),
            String::from_utf8_lossy(&output.stderr).trim()
        )))
    }

    /// Loads nftables rules on the host of a node.
    ///
    /// # Errors
    /// What `nft` said.
    pub fn nft(&self, node: &str, rules: &str) -> io::Result<()> {
        self.exec(node, "nft", &["-f", "-"], rules).map(|_| ())
    }

    /// Counts from now on what leaves the host of a node: to these addresses (`inside`), to any other
    /// (`foreign`), and what an nftables expression names (`named`), which counts as neither.
    ///
    /// # Errors
    /// What `nft` said.
    pub fn watch(&self, node: &str, allowed: &[String], named: Option<&str>) -> io::Result<()> {
        let named = named
            .map(|named| format!("  {named} counter name \"named\" accept\n"))
            .unwrap_or_default();
        let rules = format!(
            "table inet watch {{\n counter inside {{}}\n counter named {{}}\n counter foreign {{}}\n \
             chain leaving {{\n  type filter hook output priority 0; policy accept;\n{named}  \
             ip daddr {{ {} }} counter name \"inside\" accept\n  counter name \"foreign\"\n }}\n}}\n",
            allowed.join(", ")
        );
        self.nft(node, &rules)
    }

    /// The packets that a counter of [`Namespaces::watch`] has seen on the host of a node.
    ///
    /// # Errors
    /// What `nft` said, or an answer without such a counter.
    pub fn packets(&self, node: &str, counter: &str) -> io::Result<u64> {
        let list = ["-j", "list", "counter", "inet", "watch", counter];
        let answer: serde_json::Value = serde_json::from_str(&self.exec(node, "nft", &list, "")?)?;
        answer
            .get("nftables")
            .and_then(|entries| entries.as_array())
            .and_then(|entries| {
                entries
                    .iter()
                    .find_map(|entry| entry.pointer("/counter/packets")?.as_u64())
            })
            .ok_or_else(|| io::Error::other(format!("no counter {counter}: {answer}")))
    }

    /// Sends one UDP datagram from the host of a node.
    ///
    /// # Errors
    /// What the system said.
    pub fn send_to(&self, node: &str, address: &str, port: u16) -> io::Result<()> {
        let line = format!("echo x > /dev/udp/{address}/{port}");
        self.exec(node, "bash", &["-c", &line], "").map(|_| ())
    }

    fn link(&self, node: &str, state: &str) -> io::Result<()> {
        ip(&[
            "-n",
            &self.namespace("sw"),
            "link",
            "set",
            &format!("to-{node}"),
            state,
        ])
    }
}

impl Drop for Namespaces {
    fn drop(&mut self) {
        for node in self.nodes.iter().map(String::as_str).chain(["sw"]) {
            let _ = ip(&["netns", "del", &self.namespace(node)]);
        }
    }
}

impl Network for Namespaces {
    fn name(&self) -> &'static str {
        "namespaces"
    }

    fn listen(&self, node: &str) -> SocketAddr {
        let last = self
            .nodes
            .iter()
            .zip(1_u8..)
            .find(|(n, _)| *n == node)
            .map_or(254, |(_, last)| last);
        SocketAddr::new(IpAddr::V4(Ipv4Addr::new(10, 77, 0, last)), PORT)
    }

    fn route(&self, _from: &str, to: &str) -> SocketAddr {
        self.listen(to)
    }

    fn command(&self, node: &str, program: &Path) -> Command {
        let mut command = Command::new("ip");
        command
            .args(["netns", "exec", &self.namespace(node)])
            .arg(program);
        command
    }

    fn cut(&self, node: &str) -> io::Result<()> {
        self.link(node, "down")
    }

    fn heal(&self, node: &str) -> io::Result<()> {
        self.link(node, "up")
    }

    fn swallowed(&self) -> Option<u64> {
        None
    }
}
