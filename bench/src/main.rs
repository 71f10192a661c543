//! `just bench [AREA]`: Tidelock beside its peers, interleaved in one run, as ratios.
//!
//! Prints a table and writes `target/bench/AREA.json`. Nothing here is asserted and nothing is
//! fetched; what cannot run says `not run` with its reason.

mod decide;
mod transport;

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
        }
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

fn machine() -> serde_json::Value {
    let cpu = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpu
        .lines()
        .find_map(|l| l.strip_prefix("model name"))
        .map(|l| l.trim_start_matches([' ', '\t', ':']).to_owned());
    let uname = rustix::system::uname();
    serde_json::json!({
        "cpu": model,
        "cores": std::thread::available_parallelism().map(usize::from).ok(),
        "kernel": uname.release().to_string_lossy(),
        "load": fs::read_to_string("/proc/loadavg").unwrap_or_default().trim(),
    })
}

fn show(value: Option<f64>) -> String {
    value.map_or("-".to_owned(), |v| if v >= 100.0 { format!("{v:.0}") } else { format!("{v:.2}") })
}

fn main() {
    let wanted = std::env::args().nth(1);
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    for area in ["decide", "transport"] {
        if wanted.as_deref().is_some_and(|w| w != area) {
            continue;
        }
        let rows = runtime.block_on(async {
            match area {
                "decide" => decide::rows().await,
                _ => transport::rows().await,
            }
        });
        println!("{area}");
        println!(
            "  {:<22} {:>12} {:>12} {:>8}  {:<12} {:<10} {:<8} peer",
            "id", "ours", "theirs", "ratio", "unit", "aim", "met"
        );
        for row in &rows {
            println!(
                "  {:<22} {:>12} {:>12} {:>8}  {:<12} {:<10} {:<8} {}{}",
                row.id,
                show(row.ours),
                show(row.theirs),
                show(row.ratio),
                row.unit,
                row.aim,
                row.met.to_string().trim_matches('"'),
                row.peer,
                row.why.as_ref().map(|w| format!("  ({w})")).unwrap_or_default()
            );
        }
        let commit = Command::new("git")
            .args(["rev-parse", "--short=12", "HEAD"])
            .output()
            .map(|o| String::from_utf8_lossy(&o.stdout).trim().to_owned())
            .unwrap_or_default();
        let dir = Path::new("target/bench");
        fs::create_dir_all(dir).expect("target/bench");
        let report = Report { machine: machine(), commit, rows: &rows };
        fs::write(
            dir.join(format!("{area}.json")),
            serde_json::to_vec_pretty(&report).expect("a report"),
        )
        .expect("the report is written");
    }
}
