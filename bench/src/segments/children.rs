//! Processes of their own: to be killed in the middle of their work, or to be weighed.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Instant,
};

use serde_json::{Value, json};

use super::{append::RECORD_BYTES, great};
use crate::peers::{Node, decision};

/// What `bench child ...` does; every answer is a line of JSON.
pub fn child(args: &[String]) {
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    let number = |text: &str| text.parse().expect("a number");
    let done = match words.as_slice() {
        ["hold", dir, bytes] => hold(Path::new(dir), number(bytes)),
        ["make", dir, from, to] => great::make(Path::new(dir), number(from), number(to)),
        ["weigh", dir, known] => great::weigh(Path::new(dir), number(known)),
        _ => Err(format!("unknown: {words:?}")),
    };
    if let Err(why) = done {
        say(&json!({"failed": why}));
        std::process::exit(1);
    }
}

pub fn say(answer: &Value) {
    let mut out = std::io::stdout().lock();
    let _ = writeln!(out, "{answer}");
    let _ = out.flush();
}

/// Opens the log and says how long that took, fills it up to `bytes`, says so, and then appends
/// from eight writers until it is killed.
fn hold(dir: &Path, bytes: u64) -> Result<(), String> {
    let begun = Instant::now();
    let node = Node::open(dir)?;
    let open_ms = begun.elapsed().as_secs_f64() * 1e3;
    node.append(&decision(0, RECORD_BYTES))?;
    let first_ms = begun.elapsed().as_secs_f64() * 1e3;
    say(&json!({
        "open_ms": open_ms,
        "first_append_ms": first_ms,
        "records": node.recovery.records,
        "truncated_bytes": node.recovery.truncated_bytes,
        "new_incarnation": node.recovery.new_incarnation,
    }));
    let held = |node: &Node| {
        node.store
            .list(None)
            .iter()
            .map(|s| s.size_bytes)
            .sum::<u64>()
    };
    let mut n = 1 << 40;
    while held(&node) < bytes {
        let missing = (bytes - held(&node)) / great::BIG_BYTES as u64 + 1;
        super::space::fill(&node, (n..n + missing.min(2_000)).map(great::noise))?;
        n += missing.min(2_000);
        if missing < 2_000 {
            node.log.seal_now().map_err(crate::peers::text)?;
        }
    }
    say(&json!({"sealed_bytes": held(&node), "segments": node.store.list(None).len()}));
    std::thread::scope(|scope| {
        for writer in 0..8_u64 {
            let node = &node;
            scope.spawn(move || {
                (writer << 32..).try_for_each(|n| node.append(&decision(n, RECORD_BYTES)))
            });
        }
    });
    Err("the log refused a record".to_owned())
}

/// A child that is killed, at the latest when its parent lets go of it.
pub struct Running {
    child: Child,
    lines: BufReader<std::process::ChildStdout>,
}

impl Running {
    pub fn start(args: &[&str], dir: &Path) -> Result<Self, String> {
        let program: PathBuf = std::env::current_exe().map_err(crate::peers::text)?;
        let mut command = Command::new(program);
        command
            .arg("child")
            .arg(args[0])
            .arg(dir)
            .args(&args[1..])
            .stdout(Stdio::piped());
        let mut child = command.spawn().map_err(crate::peers::text)?;
        let lines = BufReader::new(child.stdout.take().ok_or("no standard output")?);
        Ok(Self { child, lines })
    }

    pub fn next(&mut self) -> Result<Value, String> {
        let mut line = String::new();
        self.lines
            .read_line(&mut line)
            .map_err(crate::peers::text)?;
        let answer: Value =
            serde_json::from_str(&line).map_err(|e| format!("a child said {line:?}: {e}"))?;
        match answer.get("failed").and_then(Value::as_str) {
            Some(why) => Err(why.to_owned()),
            None => Ok(answer),
        }
    }
}

impl Drop for Running {
    /// SIGKILL.
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
