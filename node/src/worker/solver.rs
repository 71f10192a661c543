//! The solver: a program of somebody else's, run confined, that reads a script and writes answers.

use std::{
    fs,
    io::{Read as _, Write as _},
    os::unix::{
        fs::{MetadataExt as _, PermissionsExt as _},
        process::ExitStatusExt as _,
    },
    path::{Path, PathBuf},
    sync::mpsc,
    time::Duration,
};

use rustix::process::geteuid;
use tidelock_prover::{WhyUnproven, Widening};

use super::{
    limits::{CPU_SPARE_S, SOLVER_OUTPUT_BYTES_MAX},
    parent::{Terms, Worker, command},
};

/// Where a solver is looked for if the config names none. Never on the caller's `PATH`.
const PLACES: [&str; 2] = ["/usr/bin/cvc5", "/usr/local/bin/cvc5"];

/// A solver that nobody but root and this user can have put there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Solver(PathBuf);

impl Solver {
    /// The one that the config names, else the first in the system's places.
    ///
    /// # Errors
    /// There is none, or one that others may write to.
    pub(crate) fn find(named: Option<&Path>) -> Result<Self, String> {
        let path = match named {
            Some(path) => path,
            None => PLACES
                .iter()
                .map(Path::new)
                .find(|path| path.exists())
                .ok_or_else(|| {
                    "no solver: install `cvc5`, or name it as policy.solver".to_owned()
                })?,
        };
        let failed = |why: &dyn std::fmt::Display| format!("solver {}: {why}", path.display());
        let real = fs::canonicalize(path).map_err(|e| failed(&e))?;
        for (number, part) in real.ancestors().enumerate() {
            let meta = fs::metadata(part).map_err(|e| failed(&e))?;
            let mode = meta.permissions().mode();
            if number == 0 && (!meta.is_file() || mode & 0o111 == 0) {
                return Err(failed(&"it is no program"));
            }
            // A directory for everybody in which each owns what is theirs does no harm.
            let is_shared = number > 0 && mode & 0o1000 != 0;
            if mode & 0o022 != 0 && !is_shared {
                let why = format!(
                    "group or others may write to {}: chmod go-w it, or name another",
                    part.display()
                );
                return Err(failed(&why));
            }
            if meta.uid() != 0 && meta.uid() != geteuid().as_raw() {
                let why = format!("{} belongs to another user than root", part.display());
                return Err(failed(&why));
            }
        }
        Ok(Self(real))
    }

    /// Where it lies.
    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    /// What it writes when it reads this script.
    ///
    /// # Errors
    /// [`Widening::Unproven`]: it cannot be started, takes too long, writes too much, or fails.
    pub(super) fn run(&self, script: &str, terms: Terms) -> Result<String, Widening> {
        let failed = |why: &dyn std::fmt::Display| {
            Widening::unproven(
                WhyUnproven::SolverFailed,
                format!("solver {}: {why}", self.0.display()),
            )
        };
        if terms.deadline.is_zero() {
            return Err(timeout());
        }
        let cpu_s = terms.deadline.as_secs().saturating_add(CPU_SPARE_S);
        let mut command = command(cpu_s, terms.allow_without_seccomp);
        command.arg("--solver").arg(&self.0);
        let mut child = Worker(command.spawn().map_err(|e| failed(&e))?);
        let (Some(mut stdin), Some(stdout)) = (child.0.stdin.take(), child.0.stdout.take()) else {
            return Err(failed(&"it has no pipes"));
        };
        std::thread::scope(|scope| {
            let (sender, heard) = mpsc::sync_channel(1);
            let spawn = |name: &str| std::thread::Builder::new().name(name.to_owned());
            spawn("solver-script")
                .spawn_scoped(scope, move || {
                    // One that does not read to the end has said what it has to say, or nothing.
                    let _ = stdin.write_all(script.as_bytes());
                })
                .map_err(|e| failed(&e))?;
            spawn("solver-answer")
                .spawn_scoped(scope, move || {
                    let mut said = Vec::new();
                    let most = SOLVER_OUTPUT_BYTES_MAX as u64 + 1;
                    let read = stdout.take(most).read_to_end(&mut said);
                    let _ = sender.send(read.map(|_| said));
                })
                .map_err(|e| failed(&e))?;
            let said = match heard.recv_timeout(terms.deadline) {
                Err(_) => Err(timeout()),
                Ok(Err(error)) => Err(failed(&error)),
                Ok(Ok(said)) if said.len() > SOLVER_OUTPUT_BYTES_MAX => Err(failed(&format!(
                    "it wrote more than {SOLVER_OUTPUT_BYTES_MAX} bytes"
                ))),
                // Its output is closed: what it wrote counts if it ends well, which it does now or never.
                Ok(Ok(said)) => match child.ended_within(ENDS_WITHIN) {
                    Some(status) if status.success() => {
                        String::from_utf8(said).map_err(|e| failed(&e))
                    }
                    Some(status) if status.signal() == Some(XCPU) => Err(timeout()),
                    Some(status) => Err(failed(&status)),
                    None => Err(timeout()),
                },
            };
            // Before the threads are waited for: a solver that lives keeps them.
            drop(child);
            said
        })
    }
}

/// How long a solver that closed its output may take to end.
const ENDS_WITHIN: Duration = Duration::from_secs(1);

const XCPU: i32 = rustix::process::Signal::XCPU.as_raw();

fn timeout() -> Widening {
    Widening::unproven(
        WhyUnproven::SolverTimeout,
        "the proof did not end in time; a longer policy.proof_deadline_ms may help",
    )
}

/// What a solver says of its version, for people.
///
/// # Errors
/// It cannot be run.
pub(crate) fn version(solver: &Solver, terms: Terms) -> Result<String, String> {
    let said = solver
        .run("(get-info :version)\n", terms)
        .map_err(|widening| widening.to_string())?;
    said.trim()
        .strip_prefix("(:version \"")
        .and_then(|rest| rest.strip_suffix("\")"))
        .filter(|version| version.len() < 64 && !version.contains(char::is_control))
        .map(str::to_owned)
        .ok_or_else(|| "it does not tell its version as a solver does".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_solver_that_others_may_change_is_none() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("cvc5");
        fs::write(&path, "#!/bin/sh\n").unwrap();
        let mode = |mode| fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        for (bits, good) in [
            (0o755, true),
            (0o700, true),
            (0o775, false),
            (0o757, false),
            (0o644, false),
        ] {
            mode(bits);
            assert_eq!(Solver::find(Some(&path)).is_ok(), good, "{bits:o}");
        }
        mode(0o755);
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o777)).unwrap();
        assert!(Solver::find(Some(&path)).unwrap_err().contains("may write"));
        assert!(Solver::find(Some(Path::new("/nowhere/cvc5"))).is_err());
        assert!(Solver::find(Some(dir.path())).is_err());
    }
}
