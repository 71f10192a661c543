//! What the rows share: a CA in memory and the papers that it gives, the node's side of a mesh, and
//! a process's memory.

use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, SocketAddr},
    ops::Range,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
        mpsc,
    },
    time::{Duration, Instant},
};

use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyIdMethod, KeyPair, KeyUsagePurpose,
    RevokedCertParams, SanType, SerialNumber, date_time_ymd,
};
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer};
use tidelock::clock::wall_unix_ms;
use tidelock_quota::MonotonicClock;
use tidelock_segments::{
    Charge, Head, NodeId, Origin, Partial, PartialError, PutOutcome, RealDisk, Root, RootOptions,
    SegmentId, SegmentRef, Store, StoreError, VerifiedSegment,
};
use tidelock_transport::{
    identity::IdentityRules,
    limits::MAX_IN_FLIGHT,
    revocation::{Revocation, RevocationOptions, RevocationState, VerifiedCrl},
    session::{Fault, KindSet, PeerLimits, PeerPosture, Refusal},
    shell::{Admitted, HelloFacts, Mesh, MeshConfig, MeshEvent, MeshHandle, MeshHooks},
    tls::{Credentials, MeshTls},
};

use crate::peers::{domain, text};

pub const ANY: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The 127.1.x.y of a peer: each has an address of its own, as in life, where quotas are counted.
pub fn address_of(peer: usize) -> SocketAddr {
    let [high, low] = u16::try_from(peer).unwrap_or(u16::MAX).to_be_bytes();
    SocketAddr::from((Ipv4Addr::new(127, 1, high, low), 0))
}

/// The value below which 99 of 100 lie.
pub fn p99(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[(values.len() * 99).div_ceil(100) - 1]
}

/// A certificate and its key.
pub struct Paper {
    pub certificate: String,
    pub key: KeyPair,
    pub der: CertificateDer<'static>,
    pub serial: u64,
}

/// A domain with its CA.
pub struct Site {
    issuer: Issuer<'static, KeyPair>,
    pub ca: String,
    pub ca_der: CertificateDer<'static>,
    serial: AtomicU64,
}

/// 128 bits, as real ones are.
fn serial_of(number: u64) -> SerialNumber {
    let mut bytes = [0x5a_u8; 16];
    bytes[8..].copy_from_slice(&number.to_be_bytes());
    SerialNumber::from_slice(&bytes)
}

impl Site {
    pub fn new() -> Result<Self, String> {
        let key = KeyPair::generate().map_err(text)?;
        let mut params = CertificateParams::default();
        params
            .distinguished_name
            .push(DnType::CommonName, "Tidelock bench CA");
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let certificate = params.self_signed(&key).map_err(text)?;
        Ok(Self {
            ca: certificate.pem(),
            ca_der: certificate.der().clone(),
            issuer: Issuer::new(params, key),
            serial: AtomicU64::new(1 << 40),
        })
    }

    /// A certificate as `tidelock ca` issues them; `dns` beside the node's name, for those who look
    /// for one.
    pub fn paper(&self, node: &NodeId, dns: Option<&str>) -> Result<Paper, String> {
        let key = KeyPair::generate().map_err(text)?;
        let serial = self.serial.fetch_add(1, Ordering::Relaxed);
        let mut params = CertificateParams::default();
        params
            .distinguished_name
            .push(DnType::CommonName, node.as_str());
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        let domain = domain();
        let uri = format!("spiffe://{domain}/domains/{domain}/peers/{node}");
        params.subject_alt_names = vec![SanType::URI(uri.try_into().map_err(text)?)];
        if let Some(dns) = dns {
            let name = dns.try_into().map_err(text)?;
            params.subject_alt_names.push(SanType::DnsName(name));
        }
        params.use_authority_key_identifier_extension = true;
        params.serial_number = Some(serial_of(serial));
        (params.not_before, params.not_after) =
            (date_time_ymd(2025, 1, 1), date_time_ymd(2045, 1, 1));
        let certificate = params.signed_by(&key, &self.issuer).map_err(text)?;
        Ok(Paper {
            certificate: certificate.pem(),
            der: certificate.der().clone(),
            key,
            serial,
        })
    }

    pub fn credentials(&self, paper: &Paper) -> Result<Credentials, String> {
        Credentials::from_pem(
            paper.certificate.as_bytes(),
            paper.key.serialize_pem().as_bytes(),
            self.ca.as_bytes(),
        )
        .map_err(text)
    }

    /// A node's TLS, and the serial number of its certificate.
    pub fn tls(&self, name: &str) -> Result<(u64, Arc<MeshTls>), String> {
        let node = NodeId::new(name).map_err(text)?;
        let paper = self.paper(&node, None)?;
        Ok((paper.serial, mesh_tls(node, self.credentials(&paper)?)))
    }

    /// The CA's list of this number, with these serials revoked.
    pub fn crl(
        &self,
        number: u64,
        revoked: impl Iterator<Item = u64>,
    ) -> Result<CertificateRevocationListDer<'static>, String> {
        let revoked_certs = revoked
            .map(|serial| RevokedCertParams {
                serial_number: serial_of(serial),
                revocation_time: date_time_ymd(2025, 6, 1),
                reason_code: None,
                invalidity_date: None,
            })
            .collect();
        let list = CertificateRevocationListParams {
            this_update: date_time_ymd(2025, 6, 1),
            next_update: date_time_ymd(2045, 1, 1),
            crl_number: SerialNumber::from(number),
            issuing_distribution_point: None,
            revoked_certs,
            key_identifier_method: KeyIdMethod::Sha256,
        };
        let list = list.signed_by(&self.issuer).map_err(text)?;
        Ok(list.der().clone())
    }
}

/// TLS of a node that has no CRL yet and meets others all the same.
pub fn mesh_tls(node: NodeId, credentials: Credentials) -> Arc<MeshTls> {
    let options = RevocationOptions {
        grace_ms: 0,
        allow_missing: true,
    };
    Arc::new(MeshTls::new(
        IdentityRules {
            domain: domain(),
            allow_without_domain: false,
        },
        node,
        credentials,
        Arc::new(Revocation::new(RevocationState::new(options))),
        Arc::new(wall_unix_ms),
        None,
    ))
}

/// A store on the disk below `dir`.
pub fn store(dir: &std::path::Path, node: &NodeId) -> Result<Arc<Store>, String> {
    std::fs::create_dir_all(dir).map_err(text)?;
    let options = RootOptions {
        ceiling_bytes: 4 << 30,
        reserve_bytes: 1 << 20,
    };
    let root = Root::open(Arc::new(RealDisk), dir, options).map_err(text)?;
    root.ledger().set_custody_max(2 << 30);
    let store = Store::open(root, domain()).map_err(text)?;
    store.set_own_node(node);
    Ok(store)
}

type Small = BTreeMap<(Origin, u64), (SegmentRef, Vec<u8>)>;

/// Where a node keeps segments.
pub enum Kept {
    Disk(Arc<Store>),
    /// Small ones only; for nodes of which there are a thousand.
    Memory(Mutex<Small>),
}

/// What a node says.
pub enum Said {
    Event(MeshEvent),
    /// All bytes of a CRL are here and verified.
    CrlHere,
}

/// Who, when, what.
pub type Note = (usize, Instant, Said);

/// The node's side of a mesh.
pub struct Hooks {
    pub kept: Kept,
    /// Whose revocation list to bring up to date.
    pub tls: Arc<MeshTls>,
    /// Who listens to this node, and under which number.
    pub notes: Option<(usize, mpsc::Sender<Note>)>,
    /// Told of a revocation before the list is stored, as a node does it; none: the mesh sees to it
    /// after that. Whoever sets it takes it out again: the mesh holds the hooks.
    pub mesh: Mutex<Option<MeshHandle>>,
}

impl Hooks {
    pub fn disk(store: &Arc<Store>, tls: &Arc<MeshTls>) -> Self {
        Self {
            kept: Kept::Disk(store.clone()),
            tls: tls.clone(),
            notes: None,
            mesh: Mutex::default(),
        }
    }

    pub fn memory(tls: &Arc<MeshTls>, notes: Option<(usize, mpsc::Sender<Note>)>) -> Self {
        Self {
            kept: Kept::Memory(Mutex::default()),
            tls: tls.clone(),
            notes,
            mesh: Mutex::default(),
        }
    }

    fn say(&self, said: Said) {
        if let Some((who, notes)) = &self.notes {
            let _ = notes.send((*who, Instant::now(), said));
        }
    }

    /// As a node does: in force first, stored afterwards.
    pub fn take_crl(&self, segment: &VerifiedSegment) -> Result<(), Refusal> {
        let refused = |e: tidelock_transport::revocation::CrlError| Refusal {
            code: e.code(),
            message: e.to_string(),
            fault: Fault::Peer,
        };
        let credentials = self.tls.credentials();
        let crl = VerifiedCrl::from_segment(segment, credentials.trust()).map_err(refused)?;
        let imported = self.tls.revocation().import(crl, wall_unix_ms());
        imported.map_err(refused)?;
        if let Some(mesh) = lock(&self.mesh).as_ref() {
            mesh.revocation_changed();
        }
        Ok(())
    }
}

fn stored(put: Result<PutOutcome, StoreError>) -> Result<Admitted, Refusal> {
    match put {
        Ok(PutOutcome::Stored) => Ok(Admitted::Stored),
        Ok(PutOutcome::AlreadyHeld) => Ok(Admitted::AlreadyHeld),
        Err(e) => Err(Refusal {
            code: "STORE",
            message: e.to_string(),
            fault: Fault::Local,
        }),
    }
}

impl MeshHooks for Hooks {
    fn heads(&self) -> Vec<Head> {
        match &self.kept {
            Kept::Disk(store) => store.heads(),
            Kept::Memory(kept) => {
                let kept = lock(kept);
                let mut origins: BTreeMap<&Origin, Vec<&SegmentRef>> = BTreeMap::new();
                for ((origin, _), (reference, _)) in kept.iter() {
                    origins.entry(origin).or_default().push(reference);
                }
                origins
                    .into_iter()
                    .filter_map(|(origin, refs)| {
                        let sequences = refs.iter().map(|r| r.sequence);
                        let last = refs.last()?.id;
                        Some(Head::from_sequences(origin.clone(), sequences, last))
                    })
                    .collect()
            }
        }
    }
    fn refs(&self, origin: &Origin, from: u64, to: u64, max: usize) -> Vec<SegmentRef> {
        match &self.kept {
            Kept::Disk(store) => store.refs(origin, from, to, max),
            Kept::Memory(kept) => lock(kept)
                .range((origin.clone(), from)..=(origin.clone(), to))
                .map(|(_, (reference, _))| reference.clone())
                .take(max)
                .collect(),
        }
    }
    fn reference(&self, id: &SegmentId) -> Option<SegmentRef> {
        match &self.kept {
            Kept::Disk(store) => store.reference(id),
            Kept::Memory(kept) => lock(kept)
                .values()
                .map(|(reference, _)| reference)
                .find(|reference| reference.id == *id)
                .cloned(),
        }
    }
    fn read(&self, id: &SegmentId) -> Option<Vec<u8>> {
        match &self.kept {
            Kept::Disk(store) => store.get(id).ok().map(VerifiedSegment::into_bytes),
            Kept::Memory(kept) => lock(kept)
                .values()
                .find(|(reference, _)| reference.id == *id)
                .map(|(_, bytes)| bytes.clone()),
        }
    }
    fn wants_origin(&self, _: &Origin) -> bool {
        true
    }
    fn wants(&self, _: &SegmentRef) -> bool {
        true
    }
    fn admit(&self, _: &NodeId, segment: VerifiedSegment) -> Result<Admitted, Refusal> {
        if segment.header().kind == tidelock_segments::Kind::Revocation {
            self.say(Said::CrlHere);
            self.take_crl(&segment)?;
        }
        match &self.kept {
            Kept::Disk(store) => stored(store.put(&segment, Charge::Normal)),
            Kept::Memory(kept) => {
                let reference = segment.reference();
                let key = (reference.origin.clone(), reference.sequence);
                match lock(kept).insert(key, (reference, segment.into_bytes())) {
                    None => Ok(Admitted::Stored),
                    Some(_) => Ok(Admitted::AlreadyHeld),
                }
            }
        }
    }
    fn admit_all(
        &self,
        peer: &NodeId,
        segments: Vec<VerifiedSegment>,
        _: &dyn Fn() -> Result<(), Refusal>,
    ) -> Vec<Result<Admitted, Refusal>> {
        match &self.kept {
            // A CRL comes alone.
            Kept::Disk(store) if segments.len() > 1 => {
                let group: Vec<&VerifiedSegment> = segments.iter().collect();
                let outcomes = store.put_group(&group, Charge::Normal);
                outcomes.into_iter().map(stored).collect()
            }
            Kept::Disk(_) | Kept::Memory(_) => segments
                .into_iter()
                .map(|segment| self.admit(peer, segment))
                .collect(),
        }
    }
    fn read_range(&self, id: &SegmentId, range: &Range<u64>) -> Option<Vec<u8>> {
        match &self.kept {
            Kept::Disk(store) => store.read_range_encoded(id, range).ok(),
            Kept::Memory(_) => None,
        }
    }
    fn partial(&self, reference: &SegmentRef) -> Result<Partial, PartialError> {
        match &self.kept {
            Kept::Disk(store) => store.partial(reference, Charge::Normal),
            Kept::Memory(_) => Err(PartialError::Claim {
                id: reference.id,
                why: "it is kept in memory",
            }),
        }
    }
    fn admit_partial(
        &self,
        _: &NodeId,
        partial: &Partial,
    ) -> Result<(SegmentRef, Admitted), Refusal> {
        match partial.finish()? {
            (segment, PutOutcome::Stored) => Ok((segment.reference(), Admitted::Stored)),
            (segment, PutOutcome::AlreadyHeld) => Ok((segment.reference(), Admitted::AlreadyHeld)),
        }
    }
    fn receipt_for(&self, _: &SegmentId) -> Option<Vec<u8>> {
        None
    }
    fn receipt_wants(&self, _: &NodeId) -> Vec<SegmentId> {
        Vec::new()
    }
    fn take_receipt(&self, _: &NodeId, _: &[u8]) -> Result<(), Refusal> {
        Ok(())
    }
    fn hello_local(&self) -> HelloFacts {
        HelloFacts {
            limits: PeerLimits {
                kinds: KindSet::ALL,
                max_segment_bytes: tidelock_segments::limits::MAX_SEGMENT_BYTES,
                custody_free_bytes: u64::MAX,
                max_in_flight: MAX_IN_FLIGHT,
            },
            posture: PeerPosture::Normal,
            endorsement: None,
        }
    }
    fn event(&self, event: MeshEvent) {
        self.say(Said::Event(event));
    }
}

pub fn start(
    config: MeshConfig,
    tls: &Arc<MeshTls>,
    hooks: Arc<Hooks>,
) -> Result<MeshHandle, String> {
    Mesh::start(config, tls.clone(), hooks, MonotonicClock::default()).map_err(text)
}

/// A node's id.
pub fn named(name: &str) -> Result<NodeId, String> {
    NodeId::new(name).map_err(text)
}

/// Resident KiB of this process.
pub fn resident_kib() -> Result<f64, String> {
    let status = std::fs::read_to_string("/proc/self/status").map_err(text)?;
    status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))
        .and_then(|rest| rest.trim().trim_end_matches(" kB").parse().ok())
        .ok_or("no VmRSS".to_owned())
}

/// Looks until it is so.
pub async fn until(
    within: Duration,
    what: &str,
    mut is_so: impl FnMut() -> bool,
) -> Result<(), String> {
    let begun = Instant::now();
    while !is_so() {
        if begun.elapsed() > within {
            return Err(format!("{what}: not within {} s", within.as_secs()));
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    Ok(())
}
