//! The node's two clocks, and the guard that keeps wall time sane (INV-18).
//!
//! [`TimeGuard`] is pure: it is told what the monotonic and the wall clock say and answers the
//! time that policy age, certificates and CRLs are judged by. Trusted time never goes back, across
//! restarts too, and never stands still: behind a wall clock that was set back it goes on with
//! monotonic time. A step forward past the sanity bound closes the node (posture `closed`) instead
//! of expiring everything silently, until an operator accepts it; a restart does not resolve it.

use std::{
    fs::File,
    os::unix::fs::FileExt as _,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use serde::{Deserialize, Serialize};

/// A wall clock that runs ahead of the monotonic one by more than this has jumped.
pub const SANITY_BOUND: Duration = Duration::from_secs(24 * 3_600);

/// A wall clock that stands more than this ahead of where the last run ended has jumped, or the
/// node was dark for so long that a person should look at its clock before it judges by it.
pub const DARK_BOUND: Duration = Duration::from_secs(30 * 24 * 3_600);

/// What the guard makes of one reading.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Trusted {
    /// The time to judge by, Unix milliseconds.
    pub unix_ms: u64,
    /// The clock has jumped forward and nobody has accepted it.
    pub suspect: bool,
}

/// The pure core. Trusted time is `anchor + monotonic time since + lead`; the lead grows as far as
/// the sanity bound and never shrinks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TimeGuard {
    anchor_mono: Duration,
    anchor_unix_ms: u64,
    lead_ms: u64,
    suspect: bool,
    last_unix_ms: u64,
}

/// What survives a restart.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PersistedFloor {
    /// Trusted time is never below this, Unix milliseconds.
    pub floor_unix_ms: u64,
    /// A jump was seen and not accepted.
    pub suspect: bool,
}

impl TimeGuard {
    /// Begins with what a restart kept; a floor of 0 is a first start.
    #[must_use]
    pub fn new(kept: PersistedFloor, now: Duration, wall_unix_ms: u64) -> Self {
        let floor = kept.floor_unix_ms;
        let dark = floor > 0 && wall_unix_ms > floor.saturating_add(millis(DARK_BOUND));
        let suspect = kept.suspect || dark;
        let anchor_unix_ms = if suspect {
            floor
        } else {
            floor.max(wall_unix_ms)
        };
        Self {
            anchor_mono: now,
            anchor_unix_ms,
            lead_ms: 0,
            suspect,
            last_unix_ms: anchor_unix_ms,
        }
    }

    /// Judges one reading of both clocks.
    pub fn observe(&mut self, now: Duration, wall_unix_ms: u64) -> Trusted {
        let elapsed_ms = millis(now.saturating_sub(self.anchor_mono));
        let expected = self.anchor_unix_ms.saturating_add(elapsed_ms);
        let ahead_ms = wall_unix_ms.saturating_sub(expected);
        if ahead_ms > millis(SANITY_BOUND) {
            // INV-18: the jump does not move time.
            self.suspect = true;
        } else if !self.suspect {
            self.lead_ms = self.lead_ms.max(ahead_ms);
        }
        // INV-18: a step back revives nothing.
        self.last_unix_ms = self.last_unix_ms.max(expected.saturating_add(self.lead_ms));
        Trusted {
            unix_ms: self.last_unix_ms,
            suspect: self.suspect,
        }
    }

    /// Raises the floor by a time that the policy authority or the CA signed (ruling 25).
    pub fn raise_by_signed(&mut self, now: Duration, unix_ms: u64) {
        if unix_ms > self.last_unix_ms {
            self.anchor_mono = now;
            self.anchor_unix_ms = unix_ms;
            self.lead_ms = 0;
            self.last_unix_ms = unix_ms;
        }
    }

    /// What was kept is damaged: nobody knows what time it may be.
    pub fn doubt(&mut self) {
        self.suspect = true;
    }

    /// An operator accepts what the wall clock says, backwards too; the caller records it.
    pub fn accept(&mut self, now: Duration, wall_unix_ms: u64) {
        let kept = PersistedFloor {
            floor_unix_ms: 0,
            suspect: false,
        };
        *self = Self::new(kept, now, wall_unix_ms);
    }

    /// What to keep over a restart.
    #[must_use]
    pub fn kept(&self) -> PersistedFloor {
        PersistedFloor {
            floor_unix_ms: self.last_unix_ms,
            suspect: self.suspect,
        }
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// The wall clock, Unix milliseconds. The one place in the node that reads it.
#[must_use]
pub fn wall_unix_ms() -> u64 {
    #[expect(
        clippy::disallowed_methods,
        reason = "the shell's one reading of the wall clock"
    )]
    let now = std::time::SystemTime::now();
    now.duration_since(std::time::UNIX_EPOCH).map_or(0, millis)
}

/// Time since boot, suspend included: a resumed machine has not jumped.
fn boot_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    Duration::new(
        u64::try_from(time.tv_sec).unwrap_or_default(),
        u32::try_from(time.tv_nsec).unwrap_or_default(),
    )
}

/// CPU time of the calling thread.
#[must_use]
pub fn thread_cpu() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::new(
        u64::try_from(time.tv_sec).unwrap_or_default(),
        u32::try_from(time.tv_nsec).unwrap_or_default(),
    )
}

/// The kernel's own account of one thread, which any other thread may read.
#[derive(Debug)]
pub struct ThreadAccount(File);

impl ThreadAccount {
    /// The account of the calling thread; none where the kernel keeps none.
    #[must_use]
    pub fn of_this_thread() -> Option<Self> {
        let account = Self(File::open("/proc/thread-self/schedstat").ok()?);
        account.cpu().map(|_| account)
    }

    /// The thread's CPU time, at most a scheduler tick old; none when it has ended.
    #[must_use]
    pub fn cpu(&self) -> Option<Duration> {
        // Nanoseconds on a processor stand first.
        let mut text = [0; 64];
        let read = self.0.read_at(&mut text, 0).ok()?;
        let text = std::str::from_utf8(text.get(..read)?).ok()?;
        let nanos = text.split_ascii_whitespace().next()?.parse().ok()?;
        Some(Duration::from_nanos(nanos))
    }
}

/// The shell around [`TimeGuard`], shared by every room of a running node.
#[derive(Debug)]
pub struct NodeClock {
    started: Duration,
    guard: Mutex<TimeGuard>,
    last_unix_ms: AtomicU64,
    suspect: AtomicBool,
}

impl NodeClock {
    /// Starts the clocks with what the root kept.
    #[must_use]
    pub fn new(kept: PersistedFloor) -> Self {
        let wall = wall_unix_ms();
        let clock = Self {
            started: boot_time(),
            guard: Mutex::new(TimeGuard::new(kept, Duration::ZERO, wall)),
            last_unix_ms: AtomicU64::new(0),
            suspect: AtomicBool::new(false),
        };
        clock.trusted();
        clock
    }

    fn guard(&self) -> std::sync::MutexGuard<'_, TimeGuard> {
        // The guard's fields are plain numbers: a panic elsewhere leaves them whole.
        self.guard.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Monotonic time since the process started.
    #[must_use]
    pub fn monotonic(&self) -> Duration {
        boot_time().saturating_sub(self.started)
    }

    /// Trusted wall time, judged now.
    pub fn trusted(&self) -> Trusted {
        let trusted = self.guard().observe(self.monotonic(), wall_unix_ms());
        self.last_unix_ms.store(trusted.unix_ms, Ordering::Relaxed);
        self.suspect.store(trusted.suspect, Ordering::Relaxed);
        trusted
    }

    /// Trusted wall time, Unix milliseconds.
    #[must_use]
    pub fn unix_ms(&self) -> u64 {
        self.trusted().unix_ms
    }

    /// Whether an unaccepted jump forward was seen.
    #[must_use]
    pub fn is_suspect(&self) -> bool {
        self.suspect.load(Ordering::Relaxed)
    }

    /// See [`TimeGuard::raise_by_signed`].
    pub fn raise_by_signed(&self, unix_ms: u64) {
        self.guard().raise_by_signed(self.monotonic(), unix_ms);
    }

    /// See [`TimeGuard::doubt`].
    pub fn doubt(&self) {
        self.guard().doubt();
    }

    /// See [`TimeGuard::accept`].
    pub fn accept(&self) {
        self.guard().accept(self.monotonic(), wall_unix_ms());
        self.trusted();
    }

    /// See [`TimeGuard::kept`].
    #[must_use]
    pub fn kept(&self) -> PersistedFloor {
        self.guard().kept()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const T0: u64 = 1_790_000_000_000;
    const HOUR_MS: u64 = 3_600_000;

    fn s(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn kept(floor_unix_ms: u64) -> PersistedFloor {
        PersistedFloor {
            floor_unix_ms,
            suspect: false,
        }
    }

    /// What keeps an engine to its budget while it runs.
    #[test]
    fn the_cpu_time_of_a_thread_can_be_read_by_another() {
        let stop = AtomicBool::new(false);
        let (sender, receiver) = std::sync::mpsc::channel();
        std::thread::scope(|scope| {
            let spinning = scope.spawn(|| {
                sender.send(ThreadAccount::of_this_thread()).unwrap();
                while !stop.load(Ordering::Relaxed) {
                    std::hint::spin_loop();
                }
                thread_cpu()
            });
            let Some(account) = receiver.recv().unwrap() else {
                println!("not run: this kernel keeps no account of threads");
                stop.store(true, Ordering::Relaxed);
                return;
            };
            let wanted = Duration::from_millis(20);
            while account.cpu().unwrap() < wanted {
                std::thread::sleep(Duration::from_millis(1));
            }
            let seen = account.cpu().unwrap();
            stop.store(true, Ordering::Relaxed);
            // The same measure as the thread's own.
            assert!(spinning.join().unwrap() >= seen);
            assert!(seen >= wanted);
        });
    }

    #[test]
    fn inv_18_a_step_back_revives_nothing_and_time_goes_on() {
        let mut guard = TimeGuard::new(kept(0), s(0), T0);
        assert_eq!(guard.observe(s(10), T0 + 10_000).unix_ms, T0 + 10_000);
        let back = guard.observe(s(20), T0 - 400 * HOUR_MS);
        assert_eq!(
            back,
            Trusted {
                unix_ms: T0 + 20_000,
                suspect: false
            }
        );
        // A dead battery: after the restart the wall clock is years behind, and policy still ages.
        let mut restarted = TimeGuard::new(guard.kept(), s(0), T0 - 9_000 * HOUR_MS);
        let later = restarted.observe(s(90 * 86_400), T0 - 9_000 * HOUR_MS + 90 * 24 * HOUR_MS);
        assert_eq!(later.unix_ms, T0 + 20_000 + 90 * 24 * HOUR_MS);
    }

    #[test]
    fn inv_18_a_jump_forward_closes_and_does_not_move_time() {
        let mut guard = TimeGuard::new(kept(0), s(0), T0);
        let near = guard.observe(s(1), T0 + 23 * HOUR_MS);
        assert_eq!(
            near,
            Trusted {
                unix_ms: T0 + 23 * HOUR_MS,
                suspect: false
            },
            "positive control"
        );
        let mut guard = TimeGuard::new(kept(0), s(0), T0);
        let jumped = guard.observe(s(60), T0 + 9_000 * HOUR_MS);
        assert_eq!(
            jumped,
            Trusted {
                unix_ms: T0 + 60_000,
                suspect: true
            }
        );
        assert!(
            guard.observe(s(61), T0 + 61_000).suspect,
            "only an operator resolves it"
        );
        let mut restarted = TimeGuard::new(guard.kept(), s(0), T0 + 9_000 * HOUR_MS);
        let after = restarted.observe(s(1), T0 + 9_000 * HOUR_MS + 1_000);
        assert_eq!(
            after,
            Trusted {
                unix_ms: T0 + 62_000,
                suspect: true
            },
            "a restart does not"
        );
        restarted.accept(s(2), T0 + 9_000 * HOUR_MS);
        let accepted = restarted.observe(s(3), T0 + 9_000 * HOUR_MS + 1_000);
        assert_eq!(
            accepted,
            Trusted {
                unix_ms: T0 + 9_000 * HOUR_MS + 1_000,
                suspect: false
            }
        );
        restarted.accept(s(4), T0);
        assert_eq!(
            restarted.observe(s(4), T0).unix_ms,
            T0,
            "accepted backwards too"
        );
    }

    #[test]
    fn inv_18_many_small_steps_are_one_big_one() {
        let mut guard = TimeGuard::new(kept(0), s(0), T0);
        assert!(
            !guard.observe(s(1), T0 + 20 * HOUR_MS).suspect,
            "positive control"
        );
        assert!(guard.observe(s(2), T0 + 40 * HOUR_MS).suspect);
    }

    #[test]
    fn inv_18_a_start_far_ahead_of_the_last_run_is_suspect() {
        let week = TimeGuard::new(kept(T0), s(0), T0 + 7 * 24 * HOUR_MS)
            .observe(s(0), T0 + 7 * 24 * HOUR_MS);
        assert_eq!(
            week,
            Trusted {
                unix_ms: T0 + 7 * 24 * HOUR_MS,
                suspect: false
            },
            "positive control"
        );
        let year = T0 + 365 * 24 * HOUR_MS;
        assert_eq!(
            TimeGuard::new(kept(T0), s(0), year).observe(s(0), year),
            Trusted {
                unix_ms: T0,
                suspect: true
            }
        );
    }

    #[test]
    fn inv_18_a_restart_in_1970_revives_nothing_and_one_in_2100_closes() {
        const IN_2100: u64 = 4_102_444_800_000;
        for (wall, suspect) in [(0, false), (T0 + 1_000, false), (IN_2100, true)] {
            let mut guard = TimeGuard::new(kept(T0), s(0), wall);
            let started = guard.observe(s(0), wall);
            assert_eq!(started.suspect, suspect, "{wall}");
            assert!((T0..=T0 + 1_000).contains(&started.unix_ms), "{wall}");
            // Time goes on at the pace of the monotonic clock, whatever the wall clock says.
            let later = guard.observe(s(3_600), wall);
            assert_eq!(later.unix_ms, started.unix_ms + HOUR_MS, "{wall}");
            assert_eq!(guard.kept().suspect, suspect, "a restart keeps it");
        }
    }

    #[test]
    fn inv_18_signed_time_raises_the_floor() {
        let mut guard = TimeGuard::new(kept(0), s(0), T0);
        guard.raise_by_signed(s(0), T0 + 5 * HOUR_MS);
        assert_eq!(guard.observe(s(1), T0).unix_ms, T0 + 5 * HOUR_MS + 1_000);
        guard.raise_by_signed(s(1), T0);
        assert_eq!(
            guard.observe(s(2), T0).unix_ms,
            T0 + 5 * HOUR_MS + 2_000,
            "never down"
        );
    }
}
