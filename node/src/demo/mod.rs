//! The story that Tidelock exists for, played for real: three node processes, real certificates,
//! real UDP, a cut link, a killed process, a revoked peer, damaged disks and a full one.
//!
//! [`Story`](steps::Story) is independent of the ground it is played on ([`network::Network`]):
//! `tidelock demo` plays it over loopback addresses, the `tests/` package in network namespaces.

pub mod network;
pub mod site;
pub mod steps;

use std::{
    io::Write as _,
    path::PathBuf,
    time::{Duration, Instant},
};

use serde::Serialize;
use serde_json::{Map, Value};

use crate::cli::{Exit, Failure, Output};

/// What one step showed.
#[derive(Debug, Clone, Serialize)]
pub struct StepReport {
    /// From 1.
    pub step: u32,
    /// In a few words.
    pub name: &'static str,
    /// Whether it showed what it must.
    pub ok: bool,
    /// How long it took.
    pub seconds: f64,
    /// What was measured; on failure `why`.
    pub facts: Map<String, Value>,
}

/// What the whole story showed.
#[derive(Debug, Clone, Serialize)]
pub struct StoryReport {
    /// Every step is there and showed what it must.
    pub ok: bool,
    /// The ground it was played on.
    pub network: &'static str,
    /// The steps, in order.
    pub steps: Vec<StepReport>,
}

/// Where the story is told while it is played.
pub trait Listener {
    /// A step has begun or come to this point.
    fn progress(&mut self, step: u32, what: &str);
    /// A step has ended.
    fn ended(&mut self, report: &StepReport);
}

/// Tells the story on a terminal, one line a step.
struct Teller {
    quiet: bool,
    progress: bool,
}

impl Listener for Teller {
    fn progress(&mut self, step: u32, what: &str) {
        if self.progress {
            let _ = write!(std::io::stderr(), "\r\x1b[2K  {step}  {what} …");
        }
    }

    fn ended(&mut self, report: &StepReport) {
        if self.progress {
            let _ = write!(std::io::stderr(), "\r\x1b[2K");
        }
        if !self.quiet {
            let _ = writeln!(std::io::stdout(), "{}", line(report));
        }
    }
}

fn line(report: &StepReport) -> String {
    let facts: Vec<String> = report
        .facts
        .iter()
        .map(|(key, value)| match value {
            Value::String(text) => format!("{key} {text}"),
            other => format!("{key} {other}"),
        })
        .collect();
    format!(
        "{} {}. {}  {:.2} s  {}",
        if report.ok { "ok    " } else { "FAILED" },
        report.step,
        report.name,
        report.seconds,
        facts.join(", ")
    )
}

/// Plays the story over loopback and reports.
///
/// # Errors
/// Where the ground could not be prepared; a step that fails is a report, not an error.
pub fn run(keep: Option<PathBuf>, output: &Output) -> Result<Exit, Failure> {
    let program = std::env::current_exe()?;
    let temporary;
    let dir = match keep {
        Some(dir) => {
            std::fs::create_dir_all(&dir).map_err(|e| Failure::at(&dir, &e))?;
            if std::fs::read_dir(&dir)
                .map_err(|e| Failure::at(&dir, &e))?
                .next()
                .is_some()
            {
                return Err(Failure::cannot_run(format!(
                    "{} is not empty; name a new directory with --keep",
                    dir.display()
                )));
            }
            std::path::absolute(&dir)?
        }
        None => {
            temporary = tempfile::Builder::new()
                .prefix("tidelock-demo-")
                .tempdir()?;
            temporary.path().to_owned()
        }
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    let mut teller = Teller {
        quiet: output.is_json(),
        progress: output.shows_progress(),
    };
    let report = runtime.block_on(async {
        let network = network::Loopback::new(&site::NODES).await?;
        steps::play(&dir, &program, &network, &mut teller).await
    })?;
    output.say(&report, || summary(&report));
    Ok(if report.ok { Exit::Done } else { Exit::Failed })
}

fn summary(report: &StoryReport) -> String {
    let rows: Vec<Vec<String>> = report
        .steps
        .iter()
        .map(|s| {
            vec![
                s.step.to_string(),
                s.name.to_owned(),
                if s.ok { "ok" } else { "FAILED" }.to_owned(),
                format!("{:.2}", s.seconds),
            ]
        })
        .collect();
    let seconds: f64 = report.steps.iter().map(|s| s.seconds).sum();
    format!(
        "\n{}\n\n{} of {} steps showed what they must, {seconds:.1} s",
        crate::cli::table(&["step", "what", "result", "seconds"], &rows),
        report.steps.iter().filter(|s| s.ok).count(),
        steps::STEPS,
    )
}

/// Waits until `check` answers something, at most `limit`.
pub(crate) async fn until<T, F: Future<Output = Option<T>>>(
    limit: Duration,
    mut check: impl FnMut() -> F,
) -> Option<T> {
    let end = Instant::now() + limit;
    loop {
        if let Some(found) = check().await {
            return Some(found);
        }
        if Instant::now() >= end {
            return None;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
