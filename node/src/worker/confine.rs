//! How a worker gives up what it does not need, before it reads a byte.

use std::{
    fs::{self, File},
    io::{Read as _, Seek as _},
    os::fd::AsRawFd as _,
};

use rustix::{
    process::{
        DumpableBehavior, Gid, Resource, Rlimit, Signal, Uid, chdir, geteuid, getpid, getrlimit,
        set_dumpable_behavior, set_parent_process_death_signal, setrlimit,
    },
    thread::{
        CapabilitySet, CapabilitySets, set_capabilities, set_no_new_privs, set_thread_groups,
        set_thread_res_gid, set_thread_res_uid,
    },
};
use seccompiler::{BpfProgram, TargetArch, apply_filter, compile_from_json};
use serde_json::{Value, json};

use super::{
    limits::{MEMORY_BYTES, SOLVER_FILES_MAX, SOLVER_MEMORY_BYTES},
    wire::Confinement,
};

/// Who a worker is where its node is root: the kernel's own overflow user, nobody.
const NOBODY: u32 = 65_534;

/// `ENOSYS`: what a call outside of the filter is answered. An error and not a kill, because C libraries try
/// newer calls first and go on with older ones: `clone3`, whose arguments no filter can see, then `clone`.
const NO_SUCH_CALL: u32 = 38;

/// `PROT_EXEC`.
const EXECUTABLE: u64 = 4;
/// `CLONE_THREAD`.
const THREAD: u64 = 0x0001_0000;

/// What a process is confined for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ToBe {
    /// To go on as this program.
    Worker,
    /// To become another one, a solver.
    Solver,
}

/// A confined process: the evidence of it stays open.
pub(super) struct Confined(File);

impl Confined {
    /// Confines this process, which must have one thread only: users, capabilities and the filter belong
    /// to threads, and are handed on to those that begin later.
    ///
    /// # Errors
    /// What could not be had. Without a filter of system calls it ends here unless
    /// `allow_without_seccomp`; whether there is one tells [`evidence`](Self::evidence).
    pub(super) fn new(
        cpu_s: u64,
        allow_without_seccomp: bool,
        to_be: ToBe,
    ) -> Result<Self, String> {
        // The kernel's word on this process; nothing can be opened later.
        let status = File::open("/proc/self/status").map_err(|e| format!("/proc: {e}"))?;
        // When memory is short this process goes first. Not every container lets one say so.
        let _ = fs::write("/proc/self/oom_score_adj", "1000");
        chdir("/").map_err(|e| format!("working directory: {e}"))?;
        let (memory_bytes, files) = match to_be {
            ToBe::Worker => (MEMORY_BYTES, 0),
            ToBe::Solver => (SOLVER_MEMORY_BYTES, SOLVER_FILES_MAX),
        };
        for (resource, most) in [
            (Resource::As, memory_bytes),
            (Resource::Cpu, cpu_s),
            (Resource::Core, 0),
            (Resource::Fsize, 0),
            (Resource::Nofile, files),
        ] {
            limit(resource, most).map_err(|e| format!("limit {resource:?}: {e}"))?;
        }
        if geteuid().is_root() {
            // Refused where the container knows no such user. No capability survives either way.
            let _ = become_nobody();
        }
        set_capabilities(
            None,
            CapabilitySets {
                effective: CapabilitySet::empty(),
                permitted: CapabilitySet::empty(),
                inheritable: CapabilitySet::empty(),
            },
        )
        .map_err(|e| format!("capabilities: {e}"))?;
        // After the change of user, which clears it.
        set_parent_process_death_signal(Some(Signal::KILL))
            .map_err(|e| format!("death signal: {e}"))?;
        // No core file, and none through a pipe of the host either: policy stays here.
        set_dumpable_behavior(DumpableBehavior::NotDumpable)
            .map_err(|e| format!("dumpable: {e}"))?;
        set_no_new_privs(true).map_err(|e| format!("no_new_privs: {e}"))?;
        if let Err(error) = filter(status.as_raw_fd(), to_be)
            && !allow_without_seccomp
        {
            return Err(format!(
                "this kernel takes no filter of system calls ({error}); \
                 policy.allow_worker_without_seccomp goes without"
            ));
        }
        Ok(Self(status))
    }

    /// What the kernel says of this process now.
    pub(super) fn evidence(&mut self) -> Confinement {
        let mut text = String::new();
        // Where the kernel says nothing, nothing is claimed.
        if self.0.rewind().is_err() || self.0.read_to_string(&mut text).is_err() {
            return Confinement::default();
        }
        let field = |name: &str| {
            text.lines()
                .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
                .and_then(|rest| rest.split_whitespace().next())
                .unwrap_or_default()
        };
        Confinement {
            no_new_privs: field("NoNewPrivs") == "1",
            seccomp: field("Seccomp") == "2",
            no_capabilities: u64::from_str_radix(field("CapPrm"), 16) == Ok(0),
            uid: field("Uid").parse().unwrap_or(u32::MAX),
        }
    }
}

/// Lowers a limit; one that is lower already stays.
fn limit(resource: Resource, most: u64) -> rustix::io::Result<()> {
    let held = getrlimit(resource);
    let maximum = held.maximum.map_or(most, |held| held.min(most));
    // The soft limit of CPU time asks, the hard one kills: a second between them tells the two apart.
    let (current, maximum) = match resource {
        Resource::Cpu => (
            maximum,
            held.maximum.map_or(most + 1, |held| held.min(most + 1)),
        ),
        _ => (maximum, maximum),
    };
    setrlimit(
        resource,
        Rlimit {
            current: Some(current),
            maximum: Some(maximum),
        },
    )
}

fn become_nobody() -> rustix::io::Result<()> {
    let (uid, gid) = (Uid::from_raw(NOBODY), Gid::from_raw(NOBODY));
    set_thread_groups(&[])?;
    set_thread_res_gid(gid, gid, gid)?;
    set_thread_res_uid(uid, uid, uid)
}

/// Installs the filter of system calls.
fn filter(status: i32, to_be: ToBe) -> Result<(), String> {
    let architecture = TargetArch::try_from(std::env::consts::ARCH).map_err(|e| e.to_string())?;
    let rules = match to_be {
        ToBe::Worker => rules(status),
        ToBe::Solver => solver_rules(architecture),
    };
    let rules = serde_json::to_vec(&rules).map_err(|e| e.to_string())?;
    let programs = compile_from_json(rules.as_slice(), architecture).map_err(|e| e.to_string())?;
    let program: &BpfProgram = programs.get("worker").ok_or("no program")?;
    apply_filter(program).map_err(|e| e.to_string())
}

/// What a worker may still ask of the kernel: memory that is never code, threads of its own, and the
/// three descriptors that it has been told of. Whatever else was inherited cannot be used; nothing can be opened,
/// executed, connected, or sent a signal but itself.
fn rules(status: i32) -> Value {
    let only = |call: &str, index: u8, kind: &str, value: u64| json!({"syscall": call, "args": [{"index": index, "type": kind, "op": "eq", "val": value}]});
    let bits = |call: &str, index: u8, mask: u64, value: u64| {
        json!({"syscall": call,
               "args": [{"index": index, "type": "qword", "op": {"masked_eq": mask}, "val": value}]})
    };
    let mut calls = vec![
        only("read", 0, "dword", 0),
        only(
            "read",
            0,
            "dword",
            u64::try_from(status).unwrap_or_default(),
        ),
        only(
            "lseek",
            0,
            "dword",
            u64::try_from(status).unwrap_or_default(),
        ),
        only("write", 0, "dword", 1),
        only("write", 0, "dword", 2),
        bits("mmap", 2, EXECUTABLE, 0),
        bits("mprotect", 2, EXECUTABLE, 0),
        bits("clone", 0, THREAD, THREAD),
        // A panic that cannot be caught ends by a signal to itself.
        only(
            "tgkill",
            0,
            "dword",
            u64::try_from(getpid().as_raw_pid()).unwrap_or_default(),
        ),
    ];
    calls.extend(HARMLESS.map(|call| json!({"syscall": call})));
    json!({"worker": {
        "mismatch_action": {"errno": NO_SUCH_CALL},
        "match_action": "allow",
        "filter": calls,
    }})
}

/// Calls that reach nothing outside of a process.
const HARMLESS: [&str; 21] = [
    "brk",
    "clock_gettime",
    "close",
    "exit",
    "exit_group",
    "futex",
    "getpid",
    "getrandom",
    "gettid",
    "madvise",
    "mremap",
    "munmap",
    "restart_syscall",
    "rseq",
    "rt_sigaction",
    "rt_sigprocmask",
    "rt_sigreturn",
    "sched_getaffinity",
    "sched_yield",
    "set_robust_list",
    "sigaltstack",
];

/// `O_WRONLY | O_RDWR | O_CREAT | O_TRUNC`.
const WRITING: u64 = 0o1103;

/// What a solver may ask besides, which is a program of its own that has yet to be started: to be
/// executed, and to read its libraries. It writes to its output and nowhere else, and connects to nothing.
fn solver_rules(architecture: TargetArch) -> Value {
    let only = |call: &str, value: u64| json!({"syscall": call, "args": [{"index": 0, "type": "dword", "op": "eq", "val": value}]});
    let mut calls = vec![
        only("write", 1),
        only("write", 2),
        // Of itself only: limits of other processes of its user are not its business, to read or to set.
        only("prlimit64", 0),
        json!({"syscall": "openat",
               "args": [{"index": 2, "type": "dword", "op": {"masked_eq": WRITING}, "val": 0}]}),
        json!({"syscall": "clone",
               "args": [{"index": 0, "type": "qword", "op": {"masked_eq": THREAD}, "val": THREAD}]}),
    ];
    // F_DUPFD, F_GETFD, F_SETFD, F_GETFL and F_DUPFD_CLOEXEC, for a solver that a script starts.
    calls.extend([0, 1, 2, 3, 1_030].map(|command| {
        json!({"syscall": "fcntl",
               "args": [{"index": 1, "type": "dword", "op": "eq", "val": command}]})
    }));
    calls.extend(HARMLESS.map(|call| json!({"syscall": call})));
    let mut besides = vec![
        "execve",
        "faccessat",
        "fstat",
        "getcwd",
        "getrusage",
        "lseek",
        "mmap",
        "mprotect",
        "newfstatat",
        "pread64",
        "read",
        "readlinkat",
        "set_tid_address",
        "uname",
    ];
    if architecture == TargetArch::x86_64 {
        besides.extend(["access", "arch_prctl", "readlink", "stat"]);
    }
    calls.extend(besides.into_iter().map(|call| json!({"syscall": call})));
    json!({"worker": {
        "mismatch_action": {"errno": NO_SUCH_CALL},
        "match_action": "allow",
        "filter": calls,
    }})
}

#[cfg(test)]
mod tests {
    use rustix::{
        io::Errno,
        process::{Pid, prlimit},
    };

    use super::*;

    /// The filter holds for one thread, so the test does without a process of its own.
    #[test]
    fn a_solver_asks_for_the_limits_of_itself_and_of_nobody_else() {
        let mut other = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .unwrap();
        let pid = Pid::from_child(&other);
        let limits = getrlimit(Resource::Nofile);
        let of = |whom: Option<Pid>| prlimit(whom, Resource::Nofile, limits).map(|_| ());
        let seen = std::thread::scope(|scope| {
            let confined = scope.spawn(|| {
                // The control: what is refused below is possible here.
                let before = [of(None), of(Some(pid))];
                set_no_new_privs(true).unwrap();
                filter(0, ToBe::Solver).unwrap();
                (before, [of(None), of(Some(pid))])
            });
            confined.join().unwrap()
        });
        other.kill().unwrap();
        other.wait().unwrap();
        assert_eq!(seen, ([Ok(()); 2], [Ok(()), Err(Errno::NOSYS)]));
    }

    /// The names must exist on every machine that the program is built for.
    #[test]
    fn the_filter_compiles_on_every_target() {
        for architecture in [TargetArch::x86_64, TargetArch::aarch64] {
            for rules in [rules(3), solver_rules(architecture)] {
                let rules = serde_json::to_vec(&rules).unwrap();
                let programs = compile_from_json(rules.as_slice(), architecture).unwrap();
                assert!(!programs["worker"].is_empty());
            }
        }
    }
}
