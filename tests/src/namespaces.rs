//! Three hosts in network namespaces, each with its own address, joined by a switch of their own.
//! A cut is the link of a host going down, as when a cable is pulled.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::Path,
    process::Command,
};

use tidelock::demo::network::Network;

/// UDP port of every node; each has an address of its own.
const PORT: u16 = 7411;

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
    let probe = format!("tlprobe{}", std::process::id());
    match ip(&["netns", "add", &probe]) {
        Ok(()) => {
            let _ = ip(&["netns", "del", &probe]);
            None
        }
        Err(error) => Some(error.to_string()),
    }
}

impl Namespaces {
    /// Makes a namespace for each node, one for the switch, and the links.
    ///
    /// # Errors
    /// What `ip` said.
    pub fn new(nodes: &[&str]) -> io::Result<Self> {
        let made = Self {
            prefix: format!("tl{}", std::process::id()),
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
