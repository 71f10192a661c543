//! How commands speak: text for people, one JSON document for machines, errors on standard error.

use std::{
    error::Error,
    fmt::Display,
    io::{IsTerminal as _, Write as _},
    path::Path,
};

use serde::Serialize;

use super::Exit;

/// Work on fewer things is over before anybody can read how far it has come.
const PROGRESS_FROM: usize = 64;
/// Things between two lines of progress.
const PROGRESS_EVERY: usize = 16;

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

    /// Shows how far long work has come, where a person watches.
    pub fn progress(self, what: &str, done: usize, all: usize) {
        if self.shows_progress() && all > PROGRESS_FROM && done.is_multiple_of(PROGRESS_EVERY) {
            let _ = write!(std::io::stderr(), "\r\x1b[2K{what}: {done} of {all}");
        }
    }

    /// Clears what [`Output::progress`] has shown.
    pub fn progress_done(self) {
        if self.shows_progress() {
            let _ = write!(std::io::stderr(), "\r\x1b[2K");
        }
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
