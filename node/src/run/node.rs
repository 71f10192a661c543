//! The opened rooms of one node, joined.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    io,
    path::{Path, PathBuf},
    sync::{
        Arc, Condvar, Mutex, OnceLock, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc,
    },
    time::Duration,
};

use arc_swap::{ArcSwap, ArcSwapOption};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::{Value, json};
use tidelock_interceptor::{
    Clock, Interceptor, InterceptorConfig, KeptAnswers, QuotaRates, ThreadCpu,
};
use tidelock_policy::{LoadContext, Posture, Slots, TrustChain, TrustFile};
use tidelock_quota::Rate;
use tidelock_segments::{
    AuditLog, Charge, Endorsement, Ladder, LogConfig, LogPublicKey, NodeId, Origin, RealDisk,
    Recovery, Root, RootOptions, ScrubPace, SegmentId, SegmentRef, Sha256Hash, Store,
    offline::{REPAIRS_PATH, RepairNote},
};
use tidelock_transport::{
    endorse::endorse,
    identity::IdentityRules,
    revocation::{Revocation, RevocationOptions, RevocationState, SpkiHash},
    shell::MeshHandle,
    tls::{Credentials, CredentialsError, MeshTls, RefusalObserver},
    verifier::Trust,
};

use super::{
    activate::Looking,
    admit::{Denied, OwnAhead},
    callers::{CRL_FLOORS_FILE, CrlFloors, DoorPapers, Doorkeeper, proxies},
    consult::{ANSWERS_FILE, Consulting},
    disk::{Change, DiskWatch, own_share},
    journal::Journal,
    media::Parts,
    papers::{PaperLooks, Papers},
    policy::{RestoreAgain, RootSlots, SlotsAgain},
    quotas::{KeptQuotas, OwnQuotas, QUOTAS_FILE},
    rejections::Rejections,
    scheduled::Scheduled,
    seen::Seen,
    trust::{keep_chain, missing_trust, open_chain},
    waiting::Waiting,
};
use crate::{
    cli::Failure,
    clock::{NodeClock, PersistedFloor, ThreadAccount, thread_cpu},
    config::{Config, GatewaySection, QuotaSection},
    sealing::seal_options,
    worker::{For, KeptPasses, ProofTerms, Prover, Terms, Vetter},
};

/// How long an operator's act waits for its record.
const ACT_RECORD_LIMIT: Duration = Duration::from_secs(2);
/// Where the time floor lies below the root.
const CLOCK_FILE: &str = "clock";
/// Where the keys of revoked certificates lie below the root.
const REVOKED_KEYS_FILE: &str = "revocation/keys";
/// Which logs of known nodes an operator has accepted.
pub(super) const ACCEPTED_LOGS_FILE: &str = "state/accepted-logs";
/// Whose root it is, below the root.
const OWNER_FILE: &str = "owner";
/// Which bundles this very program has compiled without fault, below the root.
const PASSES_FILE: &str = "policy/passed";
/// Where the newest endorsement of the own log key lies below the root.
const ENDORSEMENT_FILE: &str = "keys/endorsement";
/// Most steps of one repair that its record names; the plan's digest covers all of them.
const REPAIR_STEPS_RECORDED: usize = 64;
/// Most quarantined files that one record names; it has the count of all.
const PUT_ASIDE_NAMED: usize = 64;
/// Distinct (peer, reason) pairs of refusals counted in one window (INV-07).
const REFUSALS_MAX: usize = 256;

/// Refused peers by (peer, reason), in the open window.
type Refusals = Mutex<BTreeMap<(String, String), u64>>;

/// Events that are on their way into the log.
#[derive(Default)]
struct Unsettled {
    count: Mutex<u64>,
    changed: Condvar,
}

impl Unsettled {
    fn begin(&self) {
        *self.count.lock().unwrap_or_else(PoisonError::into_inner) += 1;
    }

    fn end(&self) {
        let mut count = self.count.lock().unwrap_or_else(PoisonError::into_inner);
        *count = count.saturating_sub(1);
        self.changed.notify_all();
    }

    fn wait(&self, limit: Duration) {
        let count = self.count.lock().unwrap_or_else(PoisonError::into_inner);
        // Past the limit the answer goes out all the same; the log's own state says why.
        drop(
            self.changed
                .wait_timeout_while(count, limit, |count| *count > 0),
        );
    }
}

/// One node.
pub(super) struct Node {
    pub(super) config_path: PathBuf,
    pub(super) config: ArcSwap<Config>,
    pub(super) clock: Arc<NodeClock>,
    pub(super) root: Arc<Root>,
    pub(super) store: Arc<Store>,
    pub(super) log: Arc<AuditLog>,
    pub(super) interceptor: Interceptor,
    /// The decision points that bundles refer actions to.
    pub(super) consulting: Arc<Consulting>,
    /// From when their answers may be written again.
    pub(super) keep_answers_from: Mutex<Duration>,
    /// Incarnation of the own log when this run began, and how many records it had.
    pub(super) began_at: (u64, u64),
    pub(super) slots: Arc<Slots>,
    pub(super) policy_trust: ArcSwapOption<TrustFile>,
    /// The documents that lead from the configured trust file to `policy_trust`.
    pub(super) trust_chain: Mutex<Option<TrustChain>>,
    /// Segments of the newest of them that were looked at.
    pub(super) trust_seen: Mutex<VecDeque<SegmentId>>,
    pub(super) context: LoadContext,
    /// Every bundle is compiled in a worker before it is compiled here.
    pub(super) vetter: Vetter,
    pub(super) prover: Prover,
    pub(super) authorities: ArcSwapOption<Trust>,
    pub(super) revocation: Arc<Revocation>,
    pub(super) tls: ArcSwapOption<MeshTls>,
    pub(super) identity_fault: ArcSwapOption<String>,
    pub(super) journal: Arc<Journal>,
    pub(super) mesh: OnceLock<MeshHandle>,
    /// Held while the mesh is started: a hang-up and the watch of papers may both be about to.
    pub(super) mesh_start: Mutex<()>,
    /// Log keys that peers have vouched for in an authenticated Hello.
    pub(super) endorsements: Mutex<BTreeMap<(NodeId, LogPublicKey), Endorsement>>,
    /// Audit origins that contradict what is held; nothing more of them is taken.
    pub(super) forked: Mutex<BTreeSet<Origin>>,
    /// Audit origins that an operator has accepted all the same.
    pub(super) accepted: Mutex<BTreeSet<Origin>>,
    refusals: Arc<Refusals>,
    rejections: Rejections,
    pub(super) seen: Arc<Seen>,
    unsettled: Arc<Unsettled>,
    kept_keys: Mutex<BTreeSet<SpkiHash>>,
    kept_floor: Mutex<PersistedFloor>,
    kept_passes: Mutex<KeptPasses>,
    /// Of peers: what an operator set, and what was owed when it was last written.
    pub(super) quotas: OwnQuotas,
    /// What peers hold of this node's own logs and it does not.
    pub(super) own_ahead: Mutex<OwnAhead>,
    /// Stored segments that were found damaged since the start.
    pub(super) damaged: AtomicU64,
    /// Some of them were not asked for again yet.
    damage_waits: AtomicBool,
    /// Receipts of revoked custodians count still, because the disk did not let them go.
    pub(super) revoked_receipts_wait: AtomicBool,
    /// How many files that the store put aside are recorded.
    aside_recorded: Mutex<usize>,
    pub(super) disk_watch: Mutex<DiskWatch>,
    scrub_pace: Mutex<ScrubPace>,
    /// Policy comes from the operator, from peers and from the store; one at a time. Held for what is over
    /// soon: whoever withdraws something waits for it.
    pub(super) activating: Mutex<()>,
    /// Taken before it, and never after.
    pub(super) looking: Looking,
    /// Where a worker failed over the slots: when they are read again.
    pub(super) slots_again: Mutex<SlotsAgain>,
    pub(super) restore_again: Mutex<RestoreAgain>,
    /// Bundles of peers that this site's own rules keep out.
    pub(super) waiting: Waiting,
    /// Bundles that wait for their time.
    pub(super) scheduled: Scheduled,
    pub(super) papers: Mutex<Papers>,
    /// Set once the gateway is there.
    pub(super) doorkeeper: OnceLock<Doorkeeper>,
    pub(super) kept_crl_floors: Mutex<CrlFloors>,
    /// Held by whoever takes config or papers into use.
    pub(super) reloading: Mutex<()>,
    /// A long segment on its way in from media.
    pub(super) parts: Mutex<Option<Parts>>,
}

/// The node's clocks, as the interceptor reads them.
struct InterceptorClock(Arc<NodeClock>);

impl Clock for InterceptorClock {
    fn now(&self) -> Duration {
        self.0.monotonic()
    }

    fn unix_ms(&self) -> u64 {
        self.0.unix_ms()
    }

    fn thread_cpu(&self) -> Duration {
        thread_cpu()
    }

    fn thread_cpu_from_outside(&self) -> Option<ThreadCpu> {
        let account = ThreadAccount::of_this_thread()?;
        Some(Box::new(move || account.cpu()))
    }
}

/// How bundles are compiled by this config.
pub(super) fn worker_terms(config: &Config) -> Terms {
    Terms {
        deadline: Duration::from_millis(config.policy.worker_deadline_ms),
        allow_without_seccomp: config.policy.allow_worker_without_seccomp,
    }
}

/// How bundles are proved by this config.
pub(super) fn proof_terms(config: &Config) -> ProofTerms {
    ProofTerms {
        deadline: Duration::from_millis(config.policy.proof_deadline_ms),
        allow_without_seccomp: config.policy.allow_worker_without_seccomp,
        solver: config.policy.solver.clone(),
    }
}

pub(super) fn identity_rules(config: &Config) -> IdentityRules {
    IdentityRules {
        domain: config.node.domain.clone(),
        allow_without_domain: config.identity.allow_without_domain,
    }
}

/// What of the gateway a running node cannot change.
fn fixed_of(section: &GatewaySection) -> GatewaySection {
    GatewaySection {
        proxies: Vec::new(),
        // It only says what the rest of the section may be.
        allow_shared_principal_types: Vec::new(),
        ..section.clone()
    }
}

fn revocation_options(config: &Config) -> RevocationOptions {
    RevocationOptions {
        grace_ms: config.revocation.grace_s.saturating_mul(1_000),
        allow_missing: config.revocation.allow_missing,
    }
}

pub(super) fn load_credentials(config: &Config) -> Result<Credentials, CredentialsError> {
    let identity = &config.identity;
    Credentials::load(&identity.certificate, &identity.key, &identity.ca)
}

fn load_authorities(config: &Config) -> Result<Trust, String> {
    let path = &config.identity.ca;
    let pem = std::fs::read(path).map_err(|e| format!("{}: {e}", path.display()))?;
    Trust::from_pem(&pem).map_err(|e| format!("{}: {e}", path.display()))
}

fn load_policy_trust(config: &Config) -> Result<TrustFile, String> {
    let path = &config.policy.trust;
    let text = std::fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()))?;
    let trust = TrustFile::parse(&text).map_err(|e| format!("{}: {e}", path.display()))?;
    if trust.domain() != config.node.domain.as_str() {
        return Err(format!(
            "{}: is for domain {}, this node is of {}",
            path.display(),
            trust.domain(),
            config.node.domain
        ));
    }
    Ok(trust)
}

/// A state file with its check: what does not match is damaged, and never taken for the truth.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Checked<T> {
    check: Sha256Hash,
    value: T,
}

/// What reading a state file came to.
enum State<T> {
    Kept(T),
    Absent,
    Damaged(String),
}

impl<T: Default> State<T> {
    fn value_or_default(self) -> T {
        match self {
            Self::Kept(value) => value,
            Self::Absent | Self::Damaged(_) => T::default(),
        }
    }
}

fn read_state<T: DeserializeOwned + Serialize>(root: &Root, path: &str) -> State<T> {
    match root.read(path) {
        Ok(None) => State::Absent,
        Ok(Some(bytes)) => match serde_json::from_slice::<Checked<T>>(&bytes) {
            Ok(file) if check_of(&file.value).is_ok_and(|check| check == file.check) => {
                State::Kept(file.value)
            }
            Ok(_) => State::Damaged("its check does not match".to_owned()),
            Err(error) => State::Damaged(error.to_string()),
        },
        Err(error) => State::Damaged(error.to_string()),
    }
}

fn damage<T>(state: &State<T>) -> Option<String> {
    match state {
        State::Damaged(why) => Some(why.clone()),
        State::Kept(_) | State::Absent => None,
    }
}

fn check_of<T: Serialize>(value: &T) -> Result<Sha256Hash, serde_json::Error> {
    Ok(Sha256Hash::of(&serde_json::to_vec(value)?))
}

/// Writes a state file with its check, durably; whether that was possible.
pub(super) fn write_state<T: Serialize>(root: &Arc<Root>, path: &str, value: &T) -> bool {
    let written = check_of(value)
        .and_then(|check| serde_json::to_vec(&Checked { check, value }))
        .map_err(|e| e.to_string())
        .and_then(|bytes| {
            root.write_atomic(path, &bytes, Charge::Reserve)
                .map_err(|e| e.to_string())
        });
    if let Err(why) = &written {
        tracing::error!(path, why, "state file cannot be written");
    }
    written.is_ok()
}

impl Node {
    /// Opens the rooms in order. Only a loose key, an unsafe root, a held lock or an unusable log
    /// keep a node from starting (ruling 12); other faults close the transport or deny actions.
    pub(super) fn open(config_path: &Path, config: Config) -> Result<Arc<Self>, Failure> {
        let looks = PaperLooks::of(&config);
        let credentials = match load_credentials(&config) {
            Err(loose @ CredentialsError::KeyMode { .. }) => return Err(loose.into()),
            other => other,
        };
        let root = Root::open(
            Arc::new(RealDisk),
            &config.node.root,
            RootOptions {
                ceiling_bytes: config.node.ceiling_bytes,
                reserve_bytes: config.node.reserve_bytes,
            },
        )?;
        claim_root(&config, &root)?;
        root.ledger()
            .set_custody_max(config.audit.custody_max_bytes);
        let kept_clock: State<PersistedFloor> = read_state(&root, CLOCK_FILE);
        let kept_keys: State<Vec<[u8; 32]>> = read_state(&root, REVOKED_KEYS_FILE);
        let accepted: State<BTreeSet<Origin>> = read_state(&root, ACCEPTED_LOGS_FILE);
        let kept_quotas: State<KeptQuotas> = read_state(&root, QUOTAS_FILE);
        let kept_passes: State<KeptPasses> = read_state(&root, PASSES_FILE);
        let kept_answers: State<KeptAnswers> = read_state(&root, ANSWERS_FILE);
        let kept_floors: State<CrlFloors> = read_state(&root, CRL_FLOORS_FILE);
        let mut damaged = Vec::new();
        for (path, why) in [
            (PASSES_FILE, damage(&kept_passes)),
            (CLOCK_FILE, damage(&kept_clock)),
            (REVOKED_KEYS_FILE, damage(&kept_keys)),
            (ACCEPTED_LOGS_FILE, damage(&accepted)),
            (QUOTAS_FILE, damage(&kept_quotas)),
            (ANSWERS_FILE, damage(&kept_answers)),
            (CRL_FLOORS_FILE, damage(&kept_floors)),
        ] {
            damaged.extend(why.map(|why| (path, why)));
        }
        let doubt = matches!(kept_clock, State::Damaged(_));
        let clock = Arc::new(NodeClock::new(kept_clock.value_or_default()));
        if doubt {
            clock.doubt();
        }
        // A damaged file grants nothing (INV-13).
        let quotas = match kept_quotas {
            State::Damaged(_) => KeptQuotas::lost(&config, clock.unix_ms()),
            kept => kept.value_or_default(),
        };
        let store = Store::open(root.clone(), config.node.domain.clone())?;
        store.set_own_node(&config.node.id);
        let log = open_log(&config, &root, &store, &clock, &credentials)?;
        let journal = Arc::new(Journal::default());
        let revocation = Arc::new(Revocation::new(RevocationState::new(revocation_options(
            &config,
        ))));
        let revoked_keys = kept_keys.value_or_default();
        revocation.add_revoked_keys(revoked_keys.into_iter().map(SpkiHash::from_bytes));
        let context = LoadContext::new(config.node.domain.as_str(), env!("CARGO_PKG_VERSION"))?;
        let policy_trust = load_policy_trust(&config)
            .and_then(|configured| open_chain(&RootSlots(root.clone()), &store, configured));
        let missing = policy_trust
            .as_ref()
            .ok()
            .and_then(|chain| missing_trust(&RootSlots(root.clone()), chain));
        let trusted = match (&policy_trust, &missing) {
            (Ok(chain), None) => Some(chain.current().clone()),
            _ => None,
        };
        // Without a trust file nothing verifies: an empty one says the same with one code path less.
        let trust = trusted
            .clone()
            .unwrap_or_else(|| TrustFile::nobody(config.node.domain.as_str()));
        let vetter = Vetter::new(kept_passes.value_or_default());
        let terms = worker_terms(&config);
        let (slots, faults) =
            Slots::open_by(Arc::new(RootSlots(root.clone())), &trust, &|package| {
                vetter
                    .vet(package, &trust, &context, For::Slots, terms)?
                    .load(&trust, &context)
            });
        let slots = Arc::new(slots);
        let began_at = (log.incarnation(), log.size());
        let interceptor = open_interceptor(&config, &clock, &slots, &log)?;
        let tls_clock = clock.clone();
        let consulting = Consulting::open(
            &config.consult.upstreams,
            root.clone(),
            Arc::new(move || tls_clock.unix_ms()),
        )?;
        // A damaged file has no answers.
        interceptor.restore_answers(kept_answers.value_or_default());
        interceptor.set_upstreams(consulting.clone());
        let node = Arc::new(Self {
            config_path: config_path.to_owned(),
            clock,
            root,
            store,
            log,
            interceptor,
            consulting,
            keep_answers_from: Mutex::default(),
            began_at,
            slots,
            policy_trust: ArcSwapOption::from_pointee(trusted),
            trust_chain: Mutex::new(policy_trust.as_ref().ok().cloned()),
            trust_seen: Mutex::default(),
            context,
            vetter,
            prover: Prover::default(),
            authorities: ArcSwapOption::empty(),
            revocation,
            tls: ArcSwapOption::empty(),
            identity_fault: ArcSwapOption::empty(),
            journal,
            mesh: OnceLock::new(),
            mesh_start: Mutex::default(),
            endorsements: Mutex::default(),
            forked: Mutex::default(),
            accepted: Mutex::new(accepted.value_or_default()),
            refusals: Arc::default(),
            rejections: Rejections::default(),
            seen: Arc::default(),
            unsettled: Arc::default(),
            kept_keys: Mutex::default(),
            kept_floor: Mutex::default(),
            kept_passes: Mutex::default(),
            quotas: OwnQuotas::new(quotas),
            own_ahead: Mutex::default(),
            damaged: AtomicU64::new(0),
            damage_waits: AtomicBool::new(false),
            revoked_receipts_wait: AtomicBool::new(false),
            aside_recorded: Mutex::default(),
            disk_watch: Mutex::default(),
            scrub_pace: Mutex::new(ScrubPace::new(config.store.scrub_bytes_per_second)),
            activating: Mutex::default(),
            looking: Looking::default(),
            slots_again: Mutex::default(),
            restore_again: Mutex::default(),
            waiting: Waiting::default(),
            scheduled: Scheduled::default(),
            papers: Mutex::default(),
            doorkeeper: OnceLock::new(),
            kept_crl_floors: Mutex::new(kept_floors.value_or_default()),
            reloading: Mutex::default(),
            parts: Mutex::default(),
            config: ArcSwap::from_pointee(config),
        });
        // Weak, for the node owns the store, which owns the hook.
        let watched = Arc::downgrade(&node);
        node.store.set_on_damage(move |reference| {
            if let Some(node) = watched.upgrade() {
                node.note_damage(reference);
            }
        });
        for (path, why) in damaged {
            node.event("state_damaged", json!({"file": path, "why": why}));
        }
        node.record_put_aside();
        node.record_repairs();
        if let Some(policy) = node.slots.current() {
            // A lost floor is made up for by what the authority has signed.
            node.clock.raise_by_signed(policy.confirmed_unix_ms());
        }
        for (name, why) in node.consulting.faults() {
            node.event("upstream_unusable", json!({"upstream": name, "why": why}));
        }
        if let Some(why) = policy_trust.err().or(missing) {
            node.event("policy_trust_unusable", json!({"why": why}));
        }
        node.taking_papers(looks);
        node.take_identity(credentials);
        node.load_crls();
        node.warn_of_endings();
        node.slot_faults(&faults);
        // The process was stopped between the switch and the end of the check.
        if node.slots.is_on_trial()
            && let Err(denied) = node.finish_trial()
        {
            tracing::error!(%denied, "the bundle that was on trial");
        }
        node.restore_policy();
        node.restore_standby();
        node.review_schedule();
        node.keep_passes();
        Ok(node)
    }

    /// Tells the audit log of the repairs that were made while no node ran. The note of them goes
    /// when the log has them durably, and not before.
    fn record_repairs(&self) {
        let bytes = match self.root.read(REPAIRS_PATH) {
            Ok(None) => return,
            Ok(Some(bytes)) => bytes,
            Err(error) => {
                tracing::error!(%error, "cannot read what was repaired");
                return;
            }
        };
        let recorded = match serde_json::from_slice::<Vec<RepairNote>>(&bytes) {
            Ok(notes) => notes
                .iter()
                .try_for_each(|note| self.record_act("repaired", repaired(note))),
            Err(error) => self.record_act(
                "state_damaged",
                json!({
                    "file": REPAIRS_PATH,
                    "why": error.to_string(),
                    "bytes": bytes.len(),
                    "sha256": Sha256Hash::of(&bytes),
                }),
            ),
        };
        let settled =
            recorded.and_then(|()| self.root.remove(REPAIRS_PATH).map_err(|e| e.to_string()));
        if let Err(why) = settled {
            tracing::error!(
                why,
                "a repair is not recorded yet; tried again at the next start"
            );
        }
    }

    /// A stored segment turned out damaged and is out of use: recorded, counted, and asked for again.
    /// Called by whoever read it, so it only notes; the next tick asks the connected peers.
    fn note_damage(&self, reference: &SegmentRef) {
        self.damaged.fetch_add(1, Ordering::Relaxed);
        self.damage_waits.store(true, Ordering::Release);
        self.event(
            "segment_damaged",
            json!({
                "segment": reference.id, "kind": reference.kind, "origin": reference.origin,
                "sequence": reference.sequence,
            }),
        );
    }

    /// Records the files that the store has put aside unasked: what it found when it was opened, or built
    /// its index again. No reference of them was known, so nobody was told of them by then.
    pub(super) fn record_put_aside(&self) {
        let files = self.store.recovery().quarantined;
        let mut recorded = self
            .aside_recorded
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let fresh = files.get(*recorded..).unwrap_or_default();
        // A log that is shut takes no record: told when it is open again.
        if fresh.is_empty() || self.log.latched().is_some() {
            return;
        }
        let count = u64::try_from(fresh.len()).unwrap_or(u64::MAX);
        self.damaged.fetch_add(count, Ordering::Relaxed);
        self.damage_waits.store(true, Ordering::Release);
        let named: Vec<&String> = fresh.iter().take(PUT_ASIDE_NAMED).collect();
        self.event("files_quarantined", json!({"files": named, "count": count}));
        *recorded = files.len();
    }

    /// Asks the connected peers for what damage took; others are asked when they are met.
    fn ask_again(&self) {
        if self.damage_waits.swap(false, Ordering::AcqRel)
            && let Some(mesh) = self.mesh.get()
        {
            mesh.refresh();
        }
    }

    /// Begins the next incarnation of a superseded log, endorsed with the certificate in use.
    pub(super) fn begin_incarnation(&self) -> Result<Recovery, String> {
        let node_id = self.config.load().node.id.clone();
        let tls = self.tls.load_full().ok_or("no certificate is in use")?;
        let credentials = tls.credentials();
        self.log
            .succeed(&|key, incarnation| {
                let endorsement = endorse(&credentials, &node_id, key, incarnation)?;
                keep_endorsement(&self.root, &endorsement);
                Ok(endorsement)
            })
            .map_err(|e| e.to_string())
    }

    /// Notes an event in the journal and in the audit log.
    pub(super) fn event(&self, kind: &str, detail: Value) {
        let unsettled = self.unsettled.clone();
        unsettled.begin();
        let name = kind.to_owned();
        self.interceptor.record_event_then(
            kind,
            &detail,
            Box::new(move |result| {
                if let Err(error) = result {
                    tracing::error!(event = name, %error, "an event could not be recorded");
                }
                unsettled.end();
            }),
        );
        self.journal.note(self.clock.unix_ms(), kind, detail);
    }

    /// Waits until the events so far are recorded or lost, so that an operator who has his answer
    /// finds them in the log.
    pub(super) fn settle(&self) {
        self.unsettled.wait(ACT_RECORD_LIMIT);
    }

    /// Records an operator's act before it happens (INV-14 for operators): without a durable record
    /// there is no act.
    pub(super) fn record_act(&self, kind: &str, detail: Value) -> Result<(), String> {
        let (sender, receiver) = mpsc::sync_channel(1);
        self.interceptor.record_event_then(
            kind,
            &detail,
            // A receiver that has given up is no reason to fail here.
            Box::new(move |result| drop(sender.try_send(result))),
        );
        match receiver.recv_timeout(ACT_RECORD_LIMIT) {
            Ok(Ok(_)) => {
                self.journal.note(self.clock.unix_ms(), kind, detail);
                Ok(())
            }
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => Err("the audit log did not answer in time".to_owned()),
        }
    }

    /// Takes credentials into use, or says why the transport stays closed.
    pub(super) fn take_identity(&self, credentials: Result<Credentials, CredentialsError>) {
        let config = self.config.load();
        // One reading of the CA file for TLS and CRLs alike; without credentials at least CRLs can be
        // judged.
        match credentials.as_ref().map(|found| found.trust().clone()) {
            Ok(trust) => self.authorities.store(Some(Arc::new(trust))),
            Err(_) => match load_authorities(&config) {
                Ok(trust) => self.authorities.store(Some(Arc::new(trust))),
                Err(why) => self.event("authorities_unusable", json!({"why": why})),
            },
        }
        match credentials {
            Ok(credentials) => {
                self.identity_fault.store(None);
                self.endorse_log(&credentials);
                match self.tls.load_full() {
                    Some(tls) => tls.replace_credentials(credentials),
                    None => {
                        let clock = self.clock.clone();
                        self.tls.store(Some(Arc::new(MeshTls::new(
                            identity_rules(&config),
                            config.node.id.clone(),
                            credentials,
                            self.revocation.clone(),
                            Arc::new(move || clock.unix_ms()),
                            Some(self.refusal_observer()),
                        ))));
                    }
                }
            }
            Err(error) => {
                self.event("identity_unusable", json!({"why": error.to_string()}));
                self.identity_fault.store(Some(Arc::new(error.to_string())));
            }
        }
    }

    /// Notes refusals from inside handshakes. It holds what it needs and not the node, which would
    /// then never be dropped.
    fn refusal_observer(&self) -> RefusalObserver {
        let (journal, clock, refusals, seen) = (
            self.journal.clone(),
            self.clock.clone(),
            self.refusals.clone(),
            self.seen.clone(),
        );
        Arc::new(move |refusal, role| {
            let reason = refusal.code().to_lowercase();
            journal.note(
                clock.unix_ms(),
                "peer_refused",
                json!({
                    "reason": reason,
                    "detail": refusal.to_string(),
                    "role": format!("{role:?}").to_lowercase(),
                }),
            );
            seen.peer_refused(&reason);
            count(&refusals, "(in handshake)", &reason);
        })
    }

    /// Endorses the log key with new credentials, so that what is sealed from now on stands on them.
    fn endorse_log(&self, credentials: &Credentials) {
        let current = self.log.endorsement();
        let same_chain = current
            .chain
            .iter()
            .map(Vec::as_slice)
            .eq(credentials.chain().iter().map(AsRef::as_ref));
        if same_chain {
            return;
        }
        let config = self.config.load();
        let made = endorse(
            credentials,
            &config.node.id,
            &self.log.public_key(),
            self.log.incarnation(),
        );
        let kept = made.map_err(|e| e.to_string()).and_then(|endorsement| {
            keep_endorsement(&self.root, &endorsement);
            self.log
                .set_endorsement(endorsement)
                .map_err(|e| e.to_string())
        });
        match kept {
            Ok(()) => self.event("log_key_endorsed", json!({})),
            Err(why) => self.event("log_key_not_endorsed", json!({"why": why})),
        }
    }

    /// Reads config, certificate, key, CA, CRLs, trust file and tokens again. All or nothing: where
    /// one of them is unusable, all of the old stays. Who may call goes to `take_auth`.
    pub(super) fn reload(&self) -> Result<(), Failure> {
        let _turn = self
            .reloading
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let mut new = Config::load(&self.config_path)?;
        let old = self.config.load_full();
        new.keep_derived_sizes(&old);
        let fixed = [
            (new.node.id != old.node.id, "node.id"),
            (new.node.domain != old.node.domain, "node.domain"),
            (new.node.root != old.node.root, "node.root"),
            (
                new.node.reserve_bytes != old.node.reserve_bytes,
                "node.reserve_bytes",
            ),
            (
                new.identity.allow_without_domain != old.identity.allow_without_domain,
                "identity.allow_without_domain",
            ),
            (new.mesh != old.mesh, "mesh"),
            (new.beacon != old.beacon, "beacon"),
            (fixed_of(&new.gateway) != fixed_of(&old.gateway), "gateway"),
            (
                new.audit.segment_bytes != old.audit.segment_bytes,
                "audit.segment_bytes",
            ),
            (
                new.audit.segment_max_age_s != old.audit.segment_max_age_s,
                "audit.segment_max_age_s",
            ),
            (new.audit.custody != old.audit.custody, "audit.custody"),
            (
                new.audit.retention_min_s != old.audit.retention_min_s,
                "audit.retention_min_s",
            ),
            (new.audit.archives != old.audit.archives, "audit.archives"),
            (
                new.audit.overwrite_oldest != old.audit.overwrite_oldest,
                "audit.overwrite_oldest",
            ),
            (new.log != old.log, "log"),
        ];
        let changed: Vec<&str> = fixed.iter().filter(|(c, _)| *c).map(|(_, n)| *n).collect();
        if !changed.is_empty() {
            return Err(Failure::cannot_run(format!(
                "{} changed; restart the node to change it, nothing was taken over",
                changed.join(", ")
            )));
        }
        let looks = PaperLooks::of(&new);
        let credentials = load_credentials(&new)?;
        let auth = super::auth_config(&new, super::callers::time(&self.clock))?;
        let papers = DoorPapers::of(&new.gateway, self.clock.unix_ms(), &self.crl_floors())?;
        let upstreams = self.consulting.prepare(&new.consult.upstreams)?;
        // No bundle is judged by the old trust file meanwhile, and no key is replaced.
        let turn = self
            .activating
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let chain = load_policy_trust(&new)
            .and_then(|configured| self.chain_with(configured))
            .and_then(
                |chain| match missing_trust(&RootSlots(self.root.clone()), &chain) {
                    None => Ok(chain),
                    Some(why) => Err(why),
                },
            )
            .map_err(Failure::cannot_run)?;
        // A config whose quotas make no sense has been refused above; nothing else can fail in it.
        self.interceptor
            .set_quotas(&action_quotas(&new.quota))
            .map_err(|error| Failure::cannot_run(error.to_string()))?;
        // From here on nothing can fail.
        if let Some(keeper) = self.doorkeeper.get() {
            keeper.gateway.set_auth(auth);
            keeper.gateway.set_proxies(proxies(&new.gateway));
            keeper.gateway.set_requests(rate(new.quota.requests));
        }
        self.take_door(papers);
        self.take_upstreams(upstreams);
        let trust = chain.current().clone();
        if let Err(why) = keep_chain(&RootSlots(self.root.clone()), &chain) {
            tracing::error!(why, "the trust chain is kept in memory only");
        }
        *self
            .trust_chain
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = Some(chain);
        self.root.ledger().set_ceiling(new.node.ceiling_bytes);
        self.root
            .ledger()
            .set_custody_max(new.audit.custody_max_bytes);
        self.revocation.set_options(revocation_options(&new));
        *self
            .scrub_pace
            .lock()
            .unwrap_or_else(PoisonError::into_inner) =
            ScrubPace::new(new.store.scrub_bytes_per_second);
        self.config.store(Arc::new(new));
        self.taking_papers(looks);
        self.slot_faults(&self.slots.reload_by(&trust, &|package| {
            self.load_package(package, &trust, For::Slots)
        }));
        self.policy_trust.store(Some(Arc::new(trust)));
        self.waiting.clear();
        drop(turn);
        self.take_identity(Ok(credentials));
        self.load_crls();
        self.restore_policy();
        self.look_for_policy();
        if let Some(mesh) = self.mesh.get() {
            mesh.credentials_changed();
        }
        self.event("reloaded", json!({}));
        Ok(())
    }

    /// Why the transport is closed, if it is (ruling 12).
    pub(super) fn transport_fault(&self) -> Option<String> {
        match (self.identity_fault.load_full(), self.mesh.get()) {
            (Some(fault), _) => Some(fault.to_string()),
            (None, None) => Some("no identity".to_owned()),
            (None, Some(mesh)) => mesh.closed_because(),
        }
    }

    /// What time and disk demand of every decision, whatever the bundle's age.
    fn posture_floor(&self) -> Posture {
        if self.clock.trusted().suspect {
            // INV-18: a jump closes instead of expiring everything silently.
            Posture::Closed
        } else if self.root.ledger().ladder() >= Ladder::Restricted {
            Posture::Restricted
        } else {
            Posture::Normal
        }
    }

    /// Several times a second: ends overdue waits, seals by age, evicts what is licensed.
    pub(super) fn tick(&self) {
        let floor = self.posture_floor();
        if floor != self.interceptor.posture_floor() {
            self.event("posture_floor", json!({"posture": floor.as_str()}));
            self.interceptor.set_posture_floor(floor);
            if floor == Posture::Closed {
                // What closed has no answers after a restart either.
                self.consulting.keep_soon();
            }
        }
        self.interceptor.tick();
    }

    /// Once a second: what may wait.
    pub(super) fn slow_tick(&self) {
        self.log.tick(self.clock.unix_ms());
        self.succeed_log();
        self.try_trial_again();
        self.ask_for_waiting();
        self.ask_again();
        self.watch_disk();
        self.keep_revoked_keys();
        self.keep_crl_floors();
        self.keep_answers(false);
        self.scrub();
    }

    /// Reads stored segments again, at a bounded rate, and looks for foreign files.
    fn scrub(&self) {
        let mut pace = self
            .scrub_pace
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let budget = pace.budget_bytes(self.clock.monotonic());
        if budget == 0 {
            return;
        }
        let foreign_before = self.root.ledger().usage().foreign_bytes;
        match self.store.scrub(budget) {
            // What it found damaged was told when it was found.
            Ok(report) => pace.spent(report.charged_bytes),
            Err(error) => tracing::warn!(%error, "the store cannot be scrubbed now"),
        }
        let foreign = self.store.foreign();
        if foreign.bytes != foreign_before {
            self.event(
                "foreign_files",
                json!({"bytes": foreign.bytes, "paths": foreign.paths}),
            );
        }
    }

    /// Every state of the ladder is told when it begins, `warn` early enough to act on it.
    fn watch_disk(&self) {
        let ledger = self.root.ledger();
        let usage = ledger.usage();
        let (used_bytes, limit_bytes) = own_share(&usage);
        let now_s = self.clock.monotonic().as_secs();
        let (change, seconds_to_full) = {
            let mut watch = self
                .disk_watch
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            let change = watch.observe(now_s, ledger.ladder(), used_bytes);
            (change, watch.seconds_to_full(limit_bytes))
        };
        if let Some(Change { from, to }) = change {
            self.event(
                "disk_ladder",
                json!({
                    "from": from, "to": to, "own_bytes": used_bytes, "own_limit_bytes": limit_bytes,
                    "seconds_to_full": seconds_to_full,
                }),
            );
        }
    }

    /// Seconds until the own share is full at the rate of the last hour, if it grows.
    pub(super) fn seconds_to_full(&self) -> Option<u64> {
        let (_, limit_bytes) = own_share(&self.root.ledger().usage());
        self.disk_watch
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .seconds_to_full(limit_bytes)
    }

    /// Once a minute, and at the end: the time floor, what peers owe, and counted refusals as one record.
    pub(super) fn minute_tick(&self) {
        self.warn_of_endings();
        self.drop_stale_parts();
        self.keep_quotas();
        self.record_put_aside();
        if self.revoked_receipts_wait.load(Ordering::Relaxed) {
            self.drop_receipts_of_the_revoked();
        }
        let floor = self.clock.kept();
        let mut kept = self
            .kept_floor
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if *kept != floor && self.write_state(CLOCK_FILE, &floor) {
            *kept = floor;
        }
        drop(kept);
        let counted =
            std::mem::take(&mut *self.refusals.lock().unwrap_or_else(PoisonError::into_inner));
        if !counted.is_empty() {
            let list: Vec<Value> = counted
                .into_iter()
                .map(|((peer, reason), count)| json!({"peer": peer, "reason": reason, "count": count}))
                .collect();
            self.interceptor
                .record_event("peers_refused", &json!({"refused": list}));
        }
        self.rejections.begin_window();
    }

    /// Counts a refused peer; the counts become one bounded record a window.
    pub(super) fn count_refusal(&self, peer: &str, reason: &str) {
        self.seen.peer_refused(reason);
        count(&self.refusals, peer, reason);
    }

    /// Records that something of a peer was rejected: one by one up to a number a window, then counted.
    pub(super) fn rejected(
        &self,
        kind: &'static str,
        peer: &NodeId,
        denied: &Denied,
        detail: Value,
    ) {
        if self.rejections.may_record() {
            self.event(kind, detail);
        } else {
            count(&self.refusals, peer.as_str(), denied.code);
        }
    }

    pub(super) fn write_state<T: Serialize>(&self, path: &str, value: &T) -> bool {
        write_state(&self.root, path, value)
    }

    /// Keeps what has passed a worker, for the next start of this program.
    pub(super) fn keep_passes(&self) {
        let passes = self.vetter.kept();
        let mut kept = self
            .kept_passes
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if *kept != passes && self.write_state(PASSES_FILE, &passes) {
            *kept = passes;
        }
    }

    fn keep_revoked_keys(&self) {
        let state = self.revocation.state();
        let mut kept = self
            .kept_keys
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if *kept != *state.revoked_keys() {
            let keys: Vec<&[u8; 32]> = state
                .revoked_keys()
                .iter()
                .map(SpkiHash::as_bytes)
                .collect();
            if self.write_state(REVOKED_KEYS_FILE, &keys) {
                kept.clone_from(state.revoked_keys());
            }
        }
    }

    /// Tells the mesh that a segment is held now.
    pub(super) fn offered(&self, reference: SegmentRef) {
        if let Some(mesh) = self.mesh.get() {
            mesh.notify_stored(&reference);
        }
    }

    /// The own sealed segments that have fewer custodians than the config asks for.
    pub(super) fn unlicensed_segments(&self) -> usize {
        let config = self.config.load();
        let needed = usize::try_from(config.audit.custody).unwrap_or(usize::MAX);
        let lacking = self.store.lacking_custody_count(&config.node.id, needed);
        usize::try_from(lacking).unwrap_or(usize::MAX)
    }

    /// Closes what was opened, in the opposite order.
    pub(super) fn close(&self) {
        self.interceptor.flush_summary();
        self.keep_answers(true);
        self.keep_crl_floors();
        self.event("stopped", json!({}));
        self.minute_tick();
        self.log.close();
    }
}

fn count(refusals: &Refusals, peer: &str, reason: &str) {
    let mut refusals = refusals.lock().unwrap_or_else(PoisonError::into_inner);
    let key = (peer.to_owned(), reason.to_owned());
    let key = if refusals.len() < REFUSALS_MAX || refusals.contains_key(&key) {
        key
    } else {
        ("(others)".to_owned(), "(others)".to_owned())
    };
    *refusals.entry(key).or_default() += 1;
}

/// A root belongs to the node that began it: under another name or domain its log would be cut off
/// and its segments would all look damaged.
/// A repair as the audit log tells of it.
fn repaired(note: &RepairNote) -> Value {
    let steps: Vec<Value> = note
        .steps
        .iter()
        .take(REPAIR_STEPS_RECORDED)
        .map(|step| {
            json!({"action": step.action, "path": step.path, "to": step.to, "code": step.code})
        })
        .collect();
    json!({
        "plan": note.plan,
        "begun_unix_ms": note.unix_ms,
        "complete": note.complete,
        "steps": steps,
        "steps_total": note.steps.len(),
    })
}

fn claim_root(config: &Config, root: &Arc<Root>) -> Result<(), Failure> {
    let claim = format!("{} of domain {}\n", config.node.id, config.node.domain);
    match root.read(OWNER_FILE)? {
        Some(owner) if owner == claim.as_bytes() => Ok(()),
        Some(owner) => Err(Failure::cannot_run(format!(
            "{} belongs to node {} (its file `{OWNER_FILE}` says so); mend node.id and node.domain, \
             or choose another root; nothing was touched",
            root.path().display(),
            String::from_utf8_lossy(&owner).trim_end()
        ))),
        None => Ok(root.write_atomic(OWNER_FILE, claim.as_bytes(), Charge::Reserve)?),
    }
}

pub(super) fn rate((per_second, burst): (u32, u32)) -> Rate {
    Rate { per_second, burst }
}

/// The quotas of actions, where 0 a second is no bound.
fn action_quotas(section: &QuotaSection) -> QuotaRates {
    let bound = |pair: (u32, u32)| (pair.0 > 0).then(|| rate(pair));
    QuotaRates {
        principal_action: bound(section.principal_action),
        principal_resource: bound(section.principal_resource),
        principal: rate((section.actions_per_second, section.actions_burst)),
        caller: bound(section.caller),
        action: bound(section.action),
        total: bound(section.total),
        evict_after: Duration::from_secs(section.evict_after_s),
    }
}

fn open_interceptor(
    config: &Config,
    clock: &Arc<NodeClock>,
    slots: &Arc<Slots>,
    log: &Arc<AuditLog>,
) -> Result<Interceptor, Failure> {
    let mut settings = InterceptorConfig::new(config.node.id.clone());
    settings.quotas = action_quotas(&config.quota);
    let slots = slots.clone();
    Ok(Interceptor::new(
        settings,
        Arc::new(InterceptorClock(clock.clone())),
        Arc::new(move || slots.current()),
        log.clone(),
    )?)
}

fn open_log(
    config: &Config,
    root: &Arc<Root>,
    store: &Arc<Store>,
    clock: &Arc<NodeClock>,
    credentials: &Result<Credentials, CredentialsError>,
) -> Result<Arc<AuditLog>, Failure> {
    let log_clock = clock.clone();
    let settings = LogConfig {
        domain: config.node.domain.clone(),
        node_id: config.node.id.clone(),
        segment_bytes: config.audit.segment_bytes,
        segment_max_age_ms: config.audit.segment_max_age_s.saturating_mul(1_000),
        custody_required: usize::try_from(config.audit.custody).unwrap_or(usize::MAX),
        archives: config.audit.archives.clone(),
        overwrite_oldest: config.audit.overwrite_oldest,
        min_retention_ms: config.audit.retention_min_s.saturating_mul(1_000),
        clock: Arc::new(move || log_clock.unix_ms()),
        seal: seal_options(&config.audit)?,
    };
    let (log, recovery) = AuditLog::open(
        root.clone(),
        store.clone(),
        settings,
        &|key, incarnation| {
            let endorsement = match credentials {
                Ok(credentials) => endorse(credentials, &config.node.id, key, incarnation)?,
                Err(why) => kept_endorsement(root, key, incarnation)
                    .map_err(|e| io::Error::other(format!("{why}: {e}")))?,
            };
            keep_endorsement(root, &endorsement);
            Ok(endorsement)
        },
    )?;
    tracing::info!(?recovery, "audit log open");
    Ok(log)
}

/// Keeps the endorsement, so that the node can open its log while its certificate is unusable.
fn keep_endorsement(root: &Arc<Root>, endorsement: &Endorsement) {
    let kept = endorsement
        .encode()
        .map_err(|e| e.to_string())
        .and_then(|bytes| {
            root.write_atomic(ENDORSEMENT_FILE, &bytes, Charge::Reserve)
                .map_err(|e| e.to_string())
        });
    if let Err(why) = kept {
        tracing::warn!(why, "the endorsement of the log key could not be kept");
    }
}

fn kept_endorsement(root: &Root, key: &LogPublicKey, incarnation: u64) -> io::Result<Endorsement> {
    let missing = || {
        io::Error::other(
            "no earlier endorsement of the log key is kept; a node needs a certificate for its \
             first start and for each new incarnation",
        )
    };
    let bytes = root
        .read(ENDORSEMENT_FILE)
        .map_err(io::Error::other)?
        .ok_or_else(missing)?;
    let endorsement = Endorsement::decode(&bytes).map_err(io::Error::other)?;
    if endorsement.log_key == *key && endorsement.incarnation == incarnation {
        Ok(endorsement)
    } else {
        Err(missing())
    }
}
