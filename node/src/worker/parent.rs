//! How a worker is started, heard, and ended.

use std::{
    io,
    os::unix::process::{CommandExt as _, ExitStatusExt as _},
    process::{Child, Command, ExitStatus, Stdio},
    sync::mpsc,
    time::{Duration, Instant},
};

use rustix::process::Signal;

use super::{
    limits::{ANSWER_BYTES_MAX, CPU_SPARE_S},
    wire::{Answer, Ask, read_frame, write_frame},
};

/// The program that runs now, also where another lies in its place by now: what examines a bundle is
/// what will load it.
pub(super) const PROGRAM: &str = "/proc/self/exe";

/// Between two looks whether a worker that said nothing more has ended.
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// How a worker may spend its life.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Terms {
    /// From its start to its end by force.
    pub(crate) deadline: Duration,
    /// Whether it may go on where the kernel takes no filter of system calls.
    pub(crate) allow_without_seccomp: bool,
}

/// Why a worker gave no answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum WorkerError {
    #[error("the worker that compiles bundles cannot be started: {0}")]
    Unavailable(String),
    #[error("compiling did not end within {} ms, and was ended by force", .0.as_millis())]
    Timeout(Duration),
    #[error("the worker that compiled it ended without a word, {0}")]
    Crashed(String),
    #[error("the worker's answer cannot be understood: {0}")]
    Answer(String),
}

impl WorkerError {
    pub(super) fn code(&self) -> &'static str {
        match self {
            Self::Unavailable(_) => "BUNDLE_WORKER_UNAVAILABLE",
            Self::Timeout(_) => "BUNDLE_WORKER_TIMEOUT",
            Self::Crashed(_) => "BUNDLE_WORKER_CRASHED",
            Self::Answer(_) => "BUNDLE_WORKER_ANSWER",
        }
    }
}

/// Ended and buried whatever happens.
pub(super) struct Worker(pub(super) Child);

impl Worker {
    /// How it ended, if it does so soon.
    pub(super) fn ended_within(&mut self, patience: Duration) -> Option<ExitStatus> {
        let begun = Instant::now();
        loop {
            match self.0.try_wait() {
                Ok(Some(status)) => return Some(status),
                Ok(None) if begun.elapsed() < patience => std::thread::sleep(LOOK_EVERY),
                _ => return None,
            }
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // It may have ended by itself, which is as good.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// This program as a child with nothing but its pipes, which confines itself before it reads.
pub(super) fn command(cpu_s: u64, allow_without_seccomp: bool) -> Command {
    let mut command = Command::new(PROGRAM);
    command
        .arg0("tidelock")
        .args(["policy-worker", "--cpu-seconds", &cpu_s.to_string()])
        .env_clear()
        .current_dir("/")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null());
    if allow_without_seccomp {
        command.arg("--allow-without-seccomp");
    }
    command
}

/// Asks one worker one question.
pub(super) fn ask(ask: &Ask, archive: &[u8], terms: Terms) -> Result<Answer, WorkerError> {
    let unavailable = |why: &dyn std::fmt::Display| WorkerError::Unavailable(why.to_string());
    let ask = serde_json::to_vec(ask).map_err(|e| unavailable(&e))?;
    let cpu_s = terms.deadline.as_secs().saturating_add(CPU_SPARE_S);
    let mut command = command(cpu_s, terms.allow_without_seccomp);
    let begun = Instant::now();
    let mut worker = Worker(command.spawn().map_err(|e| unavailable(&e))?);
    let (Some(mut stdin), Some(mut stdout)) = (worker.0.stdin.take(), worker.0.stdout.take())
    else {
        return Err(unavailable(&"it has no pipes"));
    };
    std::thread::scope(|scope| {
        let (sender, heard) = mpsc::sync_channel(1);
        let spawn = |name: &str| std::thread::Builder::new().name(name.to_owned());
        // Both end with the worker, whose end of each pipe nobody else has.
        spawn("worker-question")
            .spawn_scoped(scope, move || {
                // A worker that does not listen to the end has an answer, or none: that is looked at.
                let _ =
                    write_frame(&mut stdin, &ask).and_then(|()| write_frame(&mut stdin, archive));
            })
            .map_err(|e| unavailable(&e))?;
        spawn("worker-answer")
            .spawn_scoped(scope, move || {
                let _ = sender.send(read_frame(&mut stdout, ANSWER_BYTES_MAX));
            })
            .map_err(|e| unavailable(&e))?;
        let left = terms.deadline.saturating_sub(begun.elapsed());
        let answer = match heard.recv_timeout(left) {
            Err(_) => Err(WorkerError::Timeout(terms.deadline)),
            Ok(Ok(bytes)) => {
                serde_json::from_slice(&bytes).map_err(|e| WorkerError::Answer(e.to_string()))
            }
            Ok(Err(error)) if error.kind() == io::ErrorKind::UnexpectedEof => {
                Err(how_it_ended(&mut worker.0, begun, terms.deadline))
            }
            Ok(Err(error)) => Err(WorkerError::Answer(error.to_string())),
        };
        // Before the threads are waited for: a worker that lives keeps them.
        drop(worker);
        answer
    })
}

/// What became of a worker that closed its answer without giving one.
fn how_it_ended(child: &mut Child, begun: Instant, deadline: Duration) -> WorkerError {
    while begun.elapsed() < deadline {
        match child.try_wait() {
            Ok(Some(status)) => return judge(status, deadline),
            Ok(None) => std::thread::sleep(LOOK_EVERY),
            Err(error) => return WorkerError::Crashed(error.to_string()),
        }
    }
    WorkerError::Timeout(deadline)
}

fn judge(status: ExitStatus, deadline: Duration) -> WorkerError {
    match status.signal() {
        Some(signal) if signal == Signal::XCPU.as_raw() => WorkerError::Timeout(deadline),
        // `signal: 6 (SIGABRT)`, or `exit status: 2`
        _ => WorkerError::Crashed(status.to_string()),
    }
}
