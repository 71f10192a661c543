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

use super::{limits::MEMORY_BYTES, wire::Confinement};

/// Who a worker is where its node is root: the kernel's own overflow user, nobody.
const NOBODY: u32 = 65_534;

/// `ENOSYS`: what a call outside of the filter is answered. An error and not a kill, because C libraries try
/// newer calls first and go on with older ones: `clone3`, whose arguments no filter can see, then `clone`.
const NO_SUCH_CALL: u32 = 38;

/// `PROT_EXEC`.
const EXECUTABLE: u64 = 4;
/// `CLONE_THREAD`.
const THREAD: u64 = 0x0001_0000;

/// A confined process: the evidence of it stays open.
pub(super) struct Confined(File);

impl Confined {
    /// Confines this process, which must have one thread only: users, capabilities and the filter belong
    /// to threads, and are handed on to those that begin later.
    ///
    /// # Errors
    /// What could not be had. Without a filter of system calls it ends here unless
    /// `allow_without_seccomp`; whether there is one tells [`evidence`](Self::evidence).
    pub(super) fn new(cpu_s: u64, allow_without_seccomp: bool) -> Result<Self, String> {
        // The kernel's word on this process; nothing can be opened later.
        let status = File::open("/proc/self/status").map_err(|e| format!("/proc: {e}"))?;
        // When memory is short this process goes first. Not every container lets one say so.
        let _ = fs::write("/proc/self/oom_score_adj", "1000");
        chdir("/").map_err(|e| format!("working directory: {e}"))?;
        for (resource, most) in [
            (Resource::As, MEMORY_BYTES),
            (Resource::Cpu, cpu_s),
            (Resource::Core, 0),
            (Resource::Fsize, 0),
            (Resource::Nofile, 0),
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
        if let Err(error) = filter(status.as_raw_fd())
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
fn filter(status: i32) -> Result<(), String> {
    let rules = serde_json::to_vec(&rules(status)).map_err(|e| e.to_string())?;
    let architecture = TargetArch::try_from(std::env::consts::ARCH).map_err(|e| e.to_string())?;
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
    calls.extend(
        [
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
        ]
        .map(|call| json!({"syscall": call})),
    );
    json!({"worker": {
        "mismatch_action": {"errno": NO_SUCH_CALL},
        "match_action": "allow",
        "filter": calls,
    }})
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The names must exist on every machine that the program is built for.
    #[test]
    fn the_filter_compiles_on_every_target() {
        let rules = serde_json::to_vec(&rules(3)).unwrap();
        for architecture in [TargetArch::x86_64, TargetArch::aarch64] {
            let programs = compile_from_json(rules.as_slice(), architecture).unwrap();
            assert!(!programs["worker"].is_empty());
        }
    }
}
