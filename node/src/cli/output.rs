//! How commands speak: text for people, one JSON document for machines, errors on standard error.

use std::{
    error::Error,
    fmt::Display,
    io::{IsTerminal as _, Write as _},
    path::Path,
    time::{Duration, Instant},
};

use serde::Serialize;
use tidelock_segments::offline::Progress;

use super::Exit;

/// Work that is over sooner than this shows no progress: nobody could read it.
const PROGRESS_FROM: Duration = Duration::from_millis(400);
/// Between two lines of progress.
const PROGRESS_EVERY: Duration = Duration::from_millis(100);
/// Characters of the bar.
const BAR_WIDTH: u64 = 24;

/// Where a command's result goes.
#[derive(Debug, Clone, Copy)]
pub struct Output {
    json: bool,
}

/// Why a command could not do its work; its message is for the person who must act.
#[derive(Debug)]
pub struct Failure {
    /// The exit code.
    pub exit: Exit,
    /// What, where, why, and the way out.
    pub message: String,
}

impl Failure {
    /// The command could not run.
    pub fn cannot_run(message: impl Into<String>) -> Self {
        Self {
            exit: Exit::CannotRun,
            message: message.into(),
        }
    }

    /// The command ran and the answer is no.
    pub fn failed(message: impl Into<String>) -> Self {
        Self {
            exit: Exit::Failed,
            message: message.into(),
        }
    }

    /// A file could not be used.
    pub fn at(path: &Path, error: &dyn Display) -> Self {
        Self::cannot_run(format!("{}: {error}", path.display()))
    }
}

impl<E: Error> From<E> for Failure {
    /// Prints the chain once, here at the edge.
    fn from(error: E) -> Self {
        let mut message = error.to_string();
        let mut source = error.source();
        while let Some(cause) = source {
            let text = cause.to_string();
            if !message.contains(&text) {
                message.push_str(": ");
                message.push_str(&text);
            }
            source = cause.source();
        }
        Self::cannot_run(message)
    }
}

impl Output {
    /// Text, or JSON.
    #[must_use]
    pub fn new(json: bool) -> Self {
        Self { json }
    }

    /// Whether a machine reads.
    #[must_use]
    pub fn is_json(self) -> bool {
        self.json
    }

    /// Whether a person watches, so that progress is worth showing.
    #[must_use]
    pub fn shows_progress(self) -> bool {
        std::io::stderr().is_terminal()
    }

    /// A bar for long work, where a person watches.
    #[must_use]
    pub(crate) fn bar(self, what: &'static str) -> Bar {
        Bar {
            on: self.shows_progress(),
            what,
            begun: Instant::now(),
            shown: None,
        }
    }

    /// Prints a part of a result that is too long to be held; `false` once nobody reads any more.
    pub(crate) fn part(self, text: &str) -> bool {
        // A closed pipe (`| head`) is the reader's choice and no failure of the command.
        std::io::stdout().write_all(text.as_bytes()).is_ok()
    }

    /// Prints the result in the form that was asked for.
    pub fn say<T: Serialize>(self, value: &T, text: impl FnOnce() -> String) {
        let line = if self.json {
            serde_json::to_string(value).unwrap_or_else(|e| format!("{{\"error\":\"{e}\"}}"))
        } else {
            text()
        };
        // A closed pipe (`| head`) is the reader's choice and no failure of the command.
        let _ = writeln!(std::io::stdout(), "{}", line.trim_end_matches('\n'));
    }

    /// Prints a failure: text on standard error; with `--json` a document on standard output too.
    pub fn failure(self, failure: &Failure) {
        if self.json {
            self.say(&serde_json::json!({"error": failure.message}), String::new);
        }
        let _ = writeln!(std::io::stderr(), "tidelock: {}", failure.message);
    }
}

/// Shows on a terminal how far long work has come: a bar, the rate, and what is left of the time.
#[derive(Debug)]
pub(crate) struct Bar {
    on: bool,
    what: &'static str,
    begun: Instant,
    shown: Option<Instant>,
}

impl Bar {
    /// Shows `progress`, unless something was shown a moment ago.
    pub(crate) fn show(&mut self, progress: Progress) {
        let now = Instant::now();
        let spent = now - self.begun;
        let due = match self.shown {
            None => spent >= PROGRESS_FROM,
            Some(shown) => now - shown >= PROGRESS_EVERY,
        };
        if self.on && due {
            self.shown = Some(now);
            let line = bar_line(self.what, progress, spent);
            let _ = write!(std::io::stderr(), "\r\x1b[2K{line}");
        }
    }

    /// How long the work has taken so far.
    pub(crate) fn spent(&self) -> Duration {
        self.begun.elapsed()
    }
}

impl Drop for Bar {
    /// Leaves the line clean for what comes next, a failure too.
    fn drop(&mut self) {
        if self.shown.is_some() {
            let _ = write!(std::io::stderr(), "\r\x1b[2K");
        }
    }
}

fn bar_line(what: &str, progress: Progress, spent: Duration) -> String {
    let all = progress.files_total.max(progress.files).max(1);
    let full = usize::try_from(progress.files.saturating_mul(BAR_WIDTH) / all).unwrap_or(0);
    let width = usize::try_from(BAR_WIDTH).unwrap_or(0);
    let mut line = format!(
        "{what} [{:<width$}] {} of {all} files, {}",
        "=".repeat(full),
        progress.files,
        rate(progress, spent),
    );
    let left = spent
        .as_millis()
        .saturating_mul((all - progress.files).into())
        .checked_div(progress.files.into());
    if let Some(left_ms) = left {
        line.push_str(&format!(", {} s left", left_ms.div_ceil(1_000)));
    }
    line
}

/// Bytes and records a second.
pub(crate) fn rate(progress: Progress, spent: Duration) -> String {
    let per_second = |count: u64| u128::from(count) * 1_000 / spent.as_millis().max(1);
    let bytes = u64::try_from(per_second(progress.bytes)).unwrap_or(u64::MAX);
    let mut text = format!("{}/s", human_bytes(bytes));
    if progress.records > 0 {
        text.push_str(&format!(", {} records/s", per_second(progress.records)));
    }
    text
}

/// A number of bytes with three digits or so: `1.4 MiB`.
pub(crate) fn human_bytes(bytes: u64) -> String {
    const UNITS: [&str; 4] = ["KiB", "MiB", "GiB", "TiB"];
    let mut text = format!("{bytes} B");
    let mut unit = 1_u64;
    for name in UNITS {
        unit = unit.saturating_mul(1_024);
        if bytes < unit {
            break;
        }
        let tenths = u128::from(bytes) * 10 / u128::from(unit);
        text = format!("{}.{} {name}", tenths / 10, tenths % 10);
    }
    text
}

/// A plain table with left-aligned columns.
#[must_use]
pub(crate) fn table(head: &[&str], rows: &[Vec<String>]) -> String {
    let mut widths: Vec<usize> = head.iter().map(|h| h.chars().count()).collect();
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let line = |cells: &mut dyn Iterator<Item = &str>| -> String {
        let padded: Vec<String> = cells
            .zip(&widths)
            .map(|(cell, width)| format!("{cell:<width$}"))
            .collect();
        padded.join("  ").trim_end().to_owned()
    };
    let mut out = vec![line(&mut head.iter().copied())];
    out.extend(
        rows.iter()
            .map(|row| line(&mut row.iter().map(String::as_str))),
    );
    out.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_and_bars_can_be_read() {
        assert_eq!(human_bytes(1_023), "1023 B");
        assert_eq!(human_bytes(1_024), "1.0 KiB");
        assert_eq!(human_bytes(32 << 20), "32.0 MiB");
        assert_eq!(human_bytes(u64::MAX), "16777215.9 TiB");
        let progress = Progress {
            files: 1,
            files_total: 4,
            bytes: 2_048,
            records: 10,
        };
        assert_eq!(
            bar_line("verifying", progress, Duration::from_secs(2)),
            "verifying [======                  ] 1 of 4 files, 1.0 KiB/s, 5 records/s, 6 s left"
        );
        let nothing = bar_line("verifying", Progress::default(), Duration::ZERO);
        assert!(nothing.contains("0 of 1 files, 0 B/s"), "{nothing}");
    }

    #[test]
    fn columns_line_up() {
        let text = table(
            &["id", "state"],
            &[
                vec!["alpha".into(), "x".into()],
                vec!["b".into(), "yy".into()],
            ],
        );
        assert_eq!(text, "id     state\nalpha  x\nb      yy");
    }
}
