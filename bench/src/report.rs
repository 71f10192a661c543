//! Rows, and where they go: a table on standard output and `target/bench/AREA.json`.

use std::{fs, path::Path, process::Command, time::Duration};

use serde::Serialize;

/// One line of the result.
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    pub id: &'static str,
    pub ours: Option<f64>,
    pub unit: &'static str,
    pub peer: String,
    pub theirs: Option<f64>,
    pub ratio: Option<f64>,
    pub aim: &'static str,
    pub met: serde_json::Value,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
    /// What else was measured on the way, for whoever looks for the reason.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub detail: Option<serde_json::Value>,
}

impl Row {
    pub fn measured(
        id: &'static str,
        unit: &'static str,
        (ours, peer, theirs): (f64, &str, f64),
        aim: &'static str,
        met: impl Fn(f64) -> bool,
    ) -> Self {
        let ratio = ours / theirs;
        let met = met(ratio);
        Self {
            id,
            ours: Some(ours),
            unit,
            peer: peer.to_owned(),
            theirs: Some(theirs),
            ratio: Some(ratio),
            aim,
            met: met.into(),
            why: (!met).then(|| format!("the ratio is {ratio:.2}")),
            detail: None,
        }
    }

    /// An aim that is a number of its own, beside a peer if there is one.
    pub fn absolute(
        id: &'static str,
        unit: &'static str,
        ours: f64,
        peer: Option<(&str, f64)>,
        aim: &'static str,
        met: bool,
    ) -> Self {
        Self {
            id,
            ours: Some(ours),
            unit,
            peer: peer.map(|(name, _)| name.to_owned()).unwrap_or_default(),
            theirs: peer.map(|(_, theirs)| theirs),
            ratio: peer.map(|(_, theirs)| ours / theirs),
            aim,
            met: met.into(),
            why: (!met).then(|| format!("it is {ours:.2} {unit}")),
            detail: None,
        }
    }

    pub fn not_run(id: &'static str, peer: &str, aim: &'static str, why: String) -> Self {
        Self {
            id,
            ours: None,
            unit: "",
            peer: peer.to_owned(),
            theirs: None,
            ratio: None,
            aim,
            met: "not run".into(),
            why: Some(why),
            detail: None,
        }
    }

    /// Says beside a missed aim what bounds it.
    pub fn noting(mut self, bound: String) -> Self {
        if let Some(why) = &mut self.why {
            why.push_str("; ");
            why.push_str(&bound);
        }
        self
    }

    pub fn with(mut self, detail: serde_json::Value) -> Self {
        self.detail = Some(detail);
        self
    }
}

pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// CPU time of this process, all threads.
pub fn cpu() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

#[derive(Serialize)]
struct Report<'a> {
    machine: serde_json::Value,
    commit: String,
    rows: &'a [Row],
}

/// The file system that the measured files lie on, and its device.
fn storage() -> Option<(String, String)> {
    let here = fs::canonicalize("target").ok()?;
    let mounts = fs::read_to_string("/proc/mounts").ok()?;
    let longest = mounts
        .lines()
        .map(|line| line.split(' ').collect::<Vec<_>>())
        .filter(|fields| fields.len() > 3 && here.starts_with(fields[1]))
        .max_by_key(|fields| fields[1].len())?;
    Some((
        longest[0].to_owned(),
        format!("{} {}", longest[2], longest[3]),
    ))
}

/// Facts of the machine, before the area runs: the load is that of others.
pub fn machine() -> serde_json::Value {
    let cpu = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpu
        .lines()
        .find_map(|l| l.strip_prefix("model name"))
        .map(|l| l.trim_start_matches([' ', '\t', ':']).to_owned());
    let memory = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let uname = rustix::system::uname();
    let storage = storage();
    serde_json::json!({
        "cpu": model,
        "cores": std::thread::available_parallelism().map(usize::from).ok(),
        "kernel": uname.release().to_string_lossy(),
        "memory": memory.lines().next().map(|l| l.trim_start_matches("MemTotal:").trim().to_owned()),
        "device": storage.as_ref().map(|s| s.0.clone()),
        "file_system": storage.map(|s| s.1),
        "load": fs::read_to_string("/proc/loadavg").unwrap_or_default().trim(),
    })
}

fn show(value: Option<f64>) -> String {
    value.map_or("-".to_owned(), |v| {
        if v >= 100.0 {
            format!("{v:.0}")
        } else {
            format!("{v:.2}")
        }
    })
}

/// Prints the table of an area and writes its file.
pub fn publish(area: &str, mut machine: serde_json::Value, rows: &[Row]) {
    if let serde_json::Value::Object(facts) = &mut machine {
        let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
        facts.insert("load_after".to_owned(), load.trim().into());
    }
    println!("{area}");
    println!(
        "  {:<24} {:>12} {:>12} {:>8}  {:<14} {:<22} {:<8} peer",
        "id", "ours", "theirs", "ratio", "unit", "aim", "met"
    );
    for row in rows {
        println!(
            "  {:<24} {:>12} {:>12} {:>8}  {:<14} {:<22} {:<8} {}{}",
            row.id,
            show(row.ours),
            show(row.theirs),
            show(row.ratio),
            row.unit,
            row.aim,
            row.met.to_string().trim_matches('"'),
            row.peer,
            row.why
                .as_ref()
                .map(|w| format!("  ({w})"))
                .unwrap_or_default()
        );
    }
    let commit = Command::new("git")
        .args(["rev-parse", "--short=12", "HEAD"])
        .output()
        .map(|o| String::from_utf8_lossy(&o.stdout).trim().to_owned())
        .unwrap_or_default();
    let dir = Path::new("target/bench");
    fs::create_dir_all(dir).expect("target/bench");
    fs::write(
        dir.join(format!("{area}.json")),
        serde_json::to_vec_pretty(&Report {
            machine,
            commit,
            rows,
        })
        .expect("a report"),
    )
    .expect("the report is written");
}
