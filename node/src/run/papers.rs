//! The papers of the node, of its callers' doors and of decision points: files are read again when they
//! change on the disk, and their ends are told in time.

use std::{
    collections::BTreeMap,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::PoisonError,
};

use serde_json::{Value, json};

use super::{
    callers::DoorPapers,
    node::{Node, load_credentials},
};
use crate::{cli::Failure, config::Config};

/// From so many days before its end on a paper is worth a word, and again from each later number.
const WARN_DAYS: [u64; 6] = [30, 14, 7, 3, 1, 0];
const DAY_MS: u64 = 86_400_000;

/// What one look saw of each file; equal looks mean that nothing was written meanwhile.
type Looks = BTreeMap<PathBuf, Option<FileLook>>;

/// A file that was replaced, written to or renamed differs in at least one of these. A link is
/// followed, so that turning a link to another set counts as a change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct FileLook {
    device: u64,
    inode: u64,
    bytes: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

fn look<'a>(paths: impl IntoIterator<Item = &'a PathBuf>) -> Looks {
    let look = |path: &Path| {
        let stat = std::fs::metadata(path).ok()?;
        Some(FileLook {
            device: stat.dev(),
            inode: stat.ino(),
            bytes: stat.len(),
            modified: (stat.mtime(), stat.mtime_nsec()),
            changed: (stat.ctime(), stat.ctime_nsec()),
        })
    };
    paths
        .into_iter()
        .map(|path| (path.clone(), look(path)))
        .collect()
}

/// A look at all papers that a config names.
#[derive(Debug)]
pub(super) struct PaperLooks {
    identity: Looks,
    crls: Looks,
    callers: Looks,
    door: Looks,
    upstreams: Looks,
}

impl PaperLooks {
    /// To be taken before the files are read: what is written after it is seen by the next look.
    pub(super) fn of(config: &Config) -> Self {
        let (identity, gateway) = (&config.identity, &config.gateway);
        let tls = gateway.tls.iter();
        let domains = tls.clone().flat_map(|tls| &tls.trust_domains);
        let upstreams = config.consult.upstreams.iter();
        Self {
            identity: look([&identity.certificate, &identity.key, &identity.ca]),
            crls: look(&config.revocation.crls),
            callers: look(
                gateway
                    .tokens
                    .iter()
                    .chain(gateway.oidc.iter().map(|oidc| &oidc.jwks)),
            ),
            door: look(
                tls.flat_map(|tls| [&tls.certificate, &tls.key])
                    .chain(domains.flat_map(|domain| domain.crls.iter().chain([&domain.ca]))),
            ),
            upstreams: look(upstreams.flat_map(|upstream| {
                let own = [&upstream.certificate, &upstream.key, &upstream.ca];
                let more = upstream.crls.iter().chain(&upstream.answer_key);
                own.into_iter().chain(more)
            })),
        }
    }
}

/// Finds the moment at which changed files are worth reading.
#[derive(Debug, Default)]
struct FileWatch {
    taken: Looks,
    last: Looks,
}

impl FileWatch {
    /// Whether files differ from those taken last and have stood still since the look before: whoever
    /// copies a certificate and then its key is not caught between the two.
    fn settled(&mut self, now: Looks) -> bool {
        let settled = now == self.last && now != self.taken;
        self.last = now;
        if settled {
            self.taken.clone_from(&self.last);
        }
        settled
    }

    /// These are being read now, whatever comes of it: a faulty set is told of once and not at every
    /// look.
    fn taking(&mut self, now: Looks) {
        self.taken.clone_from(&now);
        self.last = now;
    }
}

/// A paper that ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Ending {
    /// `certificate`, `ca`, `crl` or `signing key`; of the TLS door or a decision point with `door` or
    /// `upstream` before it.
    pub(crate) paper: &'static str,
    /// Whose.
    pub(crate) name: String,
    pub(crate) ends_unix_ms: u64,
}

impl Ending {
    /// Whole days that are left; `None` once it has ended.
    fn days_left(&self, now_unix_ms: u64) -> Option<u64> {
        Some(
            self.ends_unix_ms
                .checked_sub(now_unix_ms)
                .filter(|left| *left > 0)?
                / DAY_MS,
        )
    }

    /// The step of [`WARN_DAYS`] that it has reached; 0 once it has ended or within its last day.
    fn step(&self, now_unix_ms: u64) -> Option<u64> {
        let days = self.days_left(now_unix_ms).unwrap_or(0);
        WARN_DAYS.into_iter().rfind(|step| days <= *step)
    }

    fn json(&self, now_unix_ms: u64) -> Value {
        json!({
            "paper": self.paper,
            "name": self.name,
            "ends_unix_ms": self.ends_unix_ms,
            "days_left": self.days_left(now_unix_ms),
            "warn": self.step(now_unix_ms).is_some(),
        })
    }
}

/// What the node remembers of its papers.
#[derive(Debug, Default)]
pub(super) struct Papers {
    identity: FileWatch,
    crls: FileWatch,
    callers: FileWatch,
    door: FileWatch,
    upstreams: FileWatch,
    /// Why what lies there now was not taken, by set.
    refused: BTreeMap<&'static str, String>,
    /// The step at which the end of a paper was told last.
    told: BTreeMap<(&'static str, String, u64), u64>,
}

impl Node {
    fn papers(&self) -> std::sync::MutexGuard<'_, Papers> {
        // Looks and texts, whole at any time.
        self.papers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says that the files were read as these looks saw them.
    pub(super) fn taking_papers(&self, looks: PaperLooks) {
        let mut papers = self.papers();
        papers.identity.taking(looks.identity);
        papers.crls.taking(looks.crls);
        papers.callers.taking(looks.callers);
        papers.door.taking(looks.door);
        papers.upstreams.taking(looks.upstreams);
        papers.refused.clear();
    }

    /// Reads changed papers again. Each set is taken as one or not at all, the node's certificate, key and
    /// CA file say; CRLs are judged one by one, for a revocation must not wait for another file to be
    /// mended. Tells whether the mesh may have to be started.
    pub(super) fn watch_papers(&self) -> bool {
        // A reload by signal and this one never mix.
        let _turn = self
            .reloading
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let config = self.config.load_full();
        let looks = PaperLooks::of(&config);
        let mut papers = self.papers();
        let new_identity = papers.identity.settled(looks.identity);
        let new_crls = papers.crls.settled(looks.crls);
        let new_callers = papers.callers.settled(looks.callers);
        let new_door = papers.door.settled(looks.door);
        let new_upstreams = papers.upstreams.settled(looks.upstreams);
        drop(papers);
        if new_callers {
            self.took("callers", self.take_changed_callers(&config));
        }
        if new_door {
            self.took("door", self.take_changed_door(&config));
        }
        if new_upstreams {
            let opened = self.consulting.prepare(&config.consult.upstreams);
            self.took(
                "upstreams",
                opened.map(|opened| self.take_upstreams(opened)),
            );
        }
        if !new_identity && !new_crls {
            return false;
        }
        let mut taken = false;
        if new_identity {
            let loaded = load_credentials(&config).map(|credentials| {
                self.take_identity(Ok(credentials));
                taken = true;
            });
            let outcome =
                loaded.map_err(|error| Failure::cannot_run(format!("{}: {error}", error.code())));
            self.took("identity", outcome);
        }
        self.load_crls();
        if taken && let Some(mesh) = self.mesh.get() {
            mesh.credentials_changed();
        }
        taken
    }

    /// Tells what came of a set of files that had changed.
    fn took(&self, set: &'static str, outcome: Result<(), Failure>) {
        match outcome {
            Ok(()) => {
                self.papers().refused.remove(set);
                self.event("papers_taken", json!({"set": set}));
            }
            Err(failure) => {
                // INV-01: the old set stays, whole.
                let why = failure.message;
                self.event("papers_refused", json!({"set": set, "why": why}));
                self.papers().refused.insert(set, why);
            }
        }
    }

    /// Tokens and key sets, which are one: what a reload would make of them.
    fn take_changed_callers(&self, config: &Config) -> Result<(), Failure> {
        let auth = super::auth_config(config, super::callers::time(&self.clock))?;
        if let Some(keeper) = self.doorkeeper.get() {
            keeper.gateway.set_auth(auth);
        }
        Ok(())
    }

    fn take_changed_door(&self, config: &Config) -> Result<(), Failure> {
        match DoorPapers::of(&config.gateway, self.clock.unix_ms(), &self.crl_floors()) {
            Ok(papers) => {
                self.take_door(papers);
                Ok(())
            }
            Err(failure) => {
                // The other files stay as they were; what is revoked is revoked all the same.
                if let (Some(keeper), Some(tls)) = (self.doorkeeper.get(), &config.gateway.tls) {
                    keeper.take_crls(tls, self.clock.unix_ms(), &self.crl_floors());
                    self.keep_crl_floors();
                }
                Err(failure)
            }
        }
    }

    fn endings(&self, now_unix_ms: u64) -> Vec<Ending> {
        let mut endings = self.consulting.endings();
        if let Some(keeper) = self.doorkeeper.get() {
            endings.extend(keeper.endings(now_unix_ms));
        }
        if let Some(credentials) = self.tls.load_full().map(|tls| tls.credentials())
            && let Some(ends_unix_ms) = credentials.not_after_unix_ms()
        {
            endings.push(Ending {
                paper: "certificate",
                name: self.config.load().node.id.to_string(),
                ends_unix_ms,
            });
        }
        if let Some(trust) = self.authorities.load_full() {
            endings.extend(trust.authorities().iter().map(|authority| Ending {
                paper: "ca",
                name: authority.name().to_owned(),
                ends_unix_ms: authority.not_after_unix_ms(),
            }));
        }
        let issuers = self.revocation.state().issuers(now_unix_ms);
        endings.extend(issuers.into_iter().filter_map(|issuer| {
            Some(Ending {
                paper: "crl",
                name: issuer.name,
                ends_unix_ms: issuer.next_update_unix_ms?,
            })
        }));
        // A key whose time is over signs no new bundle, statement or release.
        let trust = self.policy_trust.load_full();
        let keys = trust.map(|trust| trust.keys()).unwrap_or_default();
        endings.extend(keys.into_iter().filter_map(|key| {
            Some(Ending {
                paper: "signing key",
                name: key.id,
                ends_unix_ms: key.not_after_unix_ms?,
            })
        }));
        endings
    }

    /// Tells of papers that come to their end: at each step once, in the log and the journal.
    pub(super) fn warn_of_endings(&self) {
        let now_unix_ms = self.clock.trusted().unix_ms;
        let endings = self.endings(now_unix_ms);
        let key = |ending: &Ending| (ending.paper, ending.name.clone(), ending.ends_unix_ms);
        let mut papers = self.papers();
        // What was renewed is forgotten, so this never grows past the papers there are.
        let mut told = std::mem::take(&mut papers.told);
        told.retain(|known, _| endings.iter().any(|ending| key(ending) == *known));
        let mut due = Vec::new();
        for ending in &endings {
            if let Some(step) = ending.step(now_unix_ms)
                && told.get(&key(ending)).is_none_or(|before| step < *before)
            {
                told.insert(key(ending), step);
                due.push(ending.json(now_unix_ms));
            }
        }
        papers.told = told;
        drop(papers);
        for detail in due {
            self.event("paper_ends", detail);
        }
    }

    /// For the status: every paper with its end, and why the files that lie there were not taken.
    pub(super) fn papers_json(&self) -> Value {
        let now_unix_ms = self.clock.trusted().unix_ms;
        let endings: Vec<Value> = self
            .endings(now_unix_ms)
            .iter()
            .map(|ending| ending.json(now_unix_ms))
            .collect();
        let refused: Vec<String> = self
            .papers()
            .refused
            .iter()
            .map(|(set, why)| format!("{set}: {why}"))
            .collect();
        let refused = (!refused.is_empty()).then(|| refused.join("; "));
        json!({"refused": refused, "endings": endings})
    }

    /// For the metrics: when each paper ends, in seconds since 1970.
    pub(super) fn papers_metrics(&self) -> String {
        let name = "tidelock_paper_ends_timestamp_seconds";
        let mut text = format!(
            "# HELP {name} When a certificate or CRL of this node ends.\n# TYPE {name} gauge\n"
        );
        for ending in self.endings(self.clock.trusted().unix_ms) {
            let whose = ending.name.replace('\\', "\\\\").replace('"', "\\\"");
            text.push_str(&format!(
                "{name}{{paper=\"{}\",name=\"{whose}\"}} {}\n",
                ending.paper,
                ending.ends_unix_ms / 1_000
            ));
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn looks(versions: [i64; 2]) -> Looks {
        let one = |name: &str, version| {
            let look = FileLook {
                device: 1,
                inode: 2,
                bytes: 3,
                modified: (version, 0),
                changed: (version, 0),
            };
            (PathBuf::from(name), (version >= 0).then_some(look))
        };
        [one("node.pem", versions[0]), one("node.key", versions[1])].into()
    }

    #[test]
    fn a_change_counts_once_it_has_stood_still() {
        let mut watch = FileWatch::default();
        watch.taking(looks([1, 1]));
        assert!(!watch.settled(looks([1, 1])), "nothing has changed");
        assert!(!watch.settled(looks([2, 1])), "the key is not there yet");
        assert!(!watch.settled(looks([2, 2])), "it has only just come");
        assert!(watch.settled(looks([2, 2])));
        assert!(!watch.settled(looks([2, 2])), "once");
        assert!(!watch.settled(looks([2, -1])));
        assert!(
            watch.settled(looks([2, -1])),
            "a file that went is a change"
        );
    }

    #[test]
    fn what_came_and_went_between_two_looks_is_no_change() {
        let mut watch = FileWatch::default();
        watch.taking(looks([1, 1]));
        assert!(!watch.settled(looks([2, 1])));
        assert!(!watch.settled(looks([1, 1])));
        assert!(!watch.settled(looks([1, 1])));
    }

    #[test]
    fn the_steps_begin_at_thirty_days_and_end_with_the_paper() {
        let ending = Ending {
            paper: "ca",
            name: "Ship 7 CA".to_owned(),
            ends_unix_ms: 100 * DAY_MS,
        };
        let steps: Vec<_> = [0, 69, 70, 86, 93, 97, 99, 100, 200]
            .into_iter()
            .map(|day| ending.step(day * DAY_MS))
            .collect();
        let some = |days: u64| Some(days);
        assert_eq!(
            steps,
            [
                None,
                None,
                some(30),
                some(14),
                some(7),
                some(3),
                some(1),
                some(0),
                some(0)
            ]
        );
        assert_eq!(ending.days_left(100 * DAY_MS), None);
        assert_eq!(ending.days_left(100 * DAY_MS - 1), Some(0));
    }
}
