//! Bulk transfer over loopback: sealed audit, verified and stored durably, beside a bare quinn
//! stream under the same TLS that verifies and stores nothing.

use std::{
    net::{Ipv4Addr, SocketAddr},
    ops::Range,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use tidelock::{ca::Ca, clock::wall_unix_ms};
use tidelock_quota::{MonotonicClock, Rate};
use tidelock_segments::{
    AuditLog, Charge, Compression, DomainId, Head, LogConfig, NodeId, Origin, Partial, PartialError, PutOutcome,
    RealDisk, RecordClass, Root, RootOptions, SealOptions, SegmentId, SegmentRef, Store, VerifiedSegment,
};
use tidelock_transport::{
    dial::PeerConfig,
    endorse::endorse,
    identity::IdentityRules,
    revocation::{Revocation, RevocationOptions, RevocationState},
    session::{Fault, KindSet, PeerLimits, PeerPosture, Refusal},
    shell::{Admitted, HelloFacts, Mesh, MeshConfig, MeshEvent, MeshHooks, QuotaConfig},
    tls::{Credentials, MeshTls, SERVER_NAME},
};

use crate::{Row, cpu, median};

const RECORDS: usize = 6_144;
const RECORD_BYTES: usize = 60_000;
const SLICES: usize = 3;
const YEAR: Duration = Duration::from_secs(365 * 86_400);

pub async fn rows() -> Vec<Row> {
    match bulk().await {
        Ok(rows) => rows,
        Err(why) => vec![Row::not_run("bulk-loopback", "bare quinn stream", ">= 0.7", why)],
    }
}

struct Hooks(Arc<Store>);

impl MeshHooks for Hooks {
    fn heads(&self) -> Vec<Head> {
        self.0.heads()
    }
    fn refs(&self, origin: &Origin, from: u64, to: u64, max: usize) -> Vec<SegmentRef> {
        self.0.refs(origin, from, to, max)
    }
    fn reference(&self, id: &SegmentId) -> Option<SegmentRef> {
        self.0.reference(id)
    }
    fn read(&self, id: &SegmentId) -> Option<Vec<u8>> {
        self.0.get(id).ok().map(VerifiedSegment::into_bytes)
    }
    fn wants_origin(&self, _: &Origin) -> bool {
        true
    }
    fn wants(&self, _: &SegmentRef) -> bool {
        true
    }
    fn admit(&self, _: &NodeId, segment: VerifiedSegment) -> Result<Admitted, Refusal> {
        match self.0.put(&segment, Charge::Normal) {
            Ok(PutOutcome::Stored) => Ok(Admitted::Stored),
            Ok(PutOutcome::AlreadyHeld) => Ok(Admitted::AlreadyHeld),
            Err(e) => Err(Refusal { code: "STORE", message: e.to_string(), fault: Fault::Local }),
        }
    }
    fn read_range(&self, id: &SegmentId, range: &Range<u64>) -> Option<Vec<u8>> {
        self.0.read_range_encoded(id, range).ok()
    }
    fn partial(&self, reference: &SegmentRef) -> Result<Partial, PartialError> {
        self.0.partial(reference, Charge::Normal)
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
                max_in_flight: tidelock_transport::limits::MAX_IN_FLIGHT,
            },
            posture: PeerPosture::Normal,
            endorsement: None,
        }
    }
    fn event(&self, _: MeshEvent) {}
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

struct Papers {
    domain: DomainId,
    ca: Ca,
}

impl Papers {
    fn tls(&mut self, dir: &Path, node: &str) -> Result<(NodeId, Credentials, Arc<MeshTls>), String> {
        let id = NodeId::new(node).map_err(text)?;
        let files = self.ca.issue(&id, dir, wall_unix_ms() / 1_000, YEAR).map_err(text)?;
        let credentials =
            Credentials::load(&files.certificate, &files.key, &self.ca.certificate_path()).map_err(text)?;
        let options = RevocationOptions { grace_ms: 0, allow_missing: true };
        let tls = MeshTls::new(
            IdentityRules { domain: self.domain.clone(), allow_without_domain: false },
            id.clone(),
            credentials.clone(),
            Arc::new(Revocation::new(RevocationState::new(options))),
            Arc::new(wall_unix_ms),
            None,
        );
        Ok((id, credentials, Arc::new(tls)))
    }
}

fn store(dir: &Path, domain: &DomainId) -> Result<(Arc<Root>, Arc<Store>), String> {
    let options = RootOptions { ceiling_bytes: 4 << 30, reserve_bytes: 1 << 20 };
    let root = Root::open(Arc::new(RealDisk), dir, options).map_err(text)?;
    root.ledger().set_custody_max(2 << 30);
    let store = Store::open(root.clone(), domain.clone()).map_err(text)?;
    Ok((root, store))
}

/// Fills a log with records and seals it; answers its bytes.
fn fill(
    root: Arc<Root>,
    store: &Arc<Store>,
    node: &NodeId,
    domain: &DomainId,
    credentials: &Credentials,
) -> Result<u64, String> {
    let config = LogConfig {
        domain: domain.clone(),
        node_id: node.clone(),
        segment_bytes: 8 << 20,
        segment_max_age_ms: 3_600_000,
        custody_required: 1,
        archives: std::collections::BTreeSet::new(),
        overwrite_oldest: false,
        min_retention_ms: 0,
        clock: Arc::new(wall_unix_ms),
        // Stored as appended, so that what travels has the size that the table states.
        seal: SealOptions {
            compression: Compression::Off,
            ..SealOptions::default()
        },
    };
    let (log, _) = AuditLog::open(root, store.clone(), config, &|key, incarnation| {
        Ok(endorse(credentials, node, key, incarnation)?)
    })
    .map_err(text)?;
    for n in 0..RECORDS {
        let mut record = n.to_string().into_bytes();
        record.resize(RECORD_BYTES, b'x');
        log.append_wait(RecordClass::Decision, record, Duration::from_secs(10)).map_err(text)?;
    }
    log.seal_now().map_err(text)?;
    log.close();
    Ok(store.list(None).iter().map(|s| s.size_bytes).sum())
}

fn mesh_config(listen: SocketAddr, peers: Vec<PeerConfig>) -> MeshConfig {
    let wide = Rate { per_second: 8 << 20, burst: 8 << 20 };
    MeshConfig {
        quotas: QuotaConfig { bulk_in_kib: wide, out_kib: wide, ..QuotaConfig::default() },
        ..MeshConfig::new(listen, peers)
    }
}

/// Seconds and CPU-seconds until everything that `from` holds is stored at a fresh node.
async fn ours(
    dir: &Path,
    slice: usize,
    papers: &mut Papers,
    (from, from_tls): (&Arc<Store>, &Arc<MeshTls>),
) -> Result<(f64, f64), String> {
    let (id, _, tls) = papers.tls(dir, &format!("taker-{slice}"))?;
    let (_root, to) = store(&dir.join(format!("taker-{slice}")), &papers.domain)?;
    to.set_own_node(&id);
    let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let server = Mesh::start(
        mesh_config(any, Vec::new()),
        from_tls.clone(),
        Arc::new(Hooks(from.clone())),
        MonotonicClock::default(),
    )
    .map_err(text)?;
    let peer = PeerConfig {
        node_id: from_tls.node_id().clone(),
        addresses: vec![server.local_addr().map_err(text)?],
    };
    let wanted = from.list(None).len();
    let cpu_begun = cpu();
    let client =
        Mesh::start(mesh_config(any, vec![peer]), tls, Arc::new(Hooks(to.clone())), MonotonicClock::default())
            .map_err(text)?;
    // The pace of dials is not the pace of transfers: the clock starts with the session, as it does
    // for the peer with its connection.
    while !client.peers().iter().any(|p| p.connected) {
        tokio::time::sleep(Duration::from_micros(200)).await;
    }
    let begun = Instant::now();
    while to.list(None).len() < wanted {
        if begun.elapsed() > Duration::from_secs(120) {
            return Err(format!("{} of {wanted} segments after 120 s", to.list(None).len()));
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let result = (begun.elapsed().as_secs_f64(), (cpu() - cpu_begun).as_secs_f64());
    client.shutdown(Duration::from_secs(2)).await;
    server.shutdown(Duration::from_secs(2)).await;
    Ok(result)
}

/// Seconds and CPU-seconds for as many bytes over one stream of quinn as it comes.
async fn bare(bytes: u64, a: &Arc<MeshTls>, b: &Arc<MeshTls>) -> Result<(f64, f64), String> {
    let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let config = quinn::ServerConfig::with_crypto(a.quic_server_config().map_err(text)?);
    let server = quinn::Endpoint::server(config, any).map_err(text)?;
    let client = quinn::Endpoint::client(any).map_err(text)?;
    let config =
        quinn::ClientConfig::new(b.quic_client_config(Some(a.node_id())).map_err(text)?);
    let address = server.local_addr().map_err(text)?;
    let cpu_begun = cpu();
    let sending = tokio::spawn(async move {
        let connection = server.accept().await.ok_or("no connection")?.await.map_err(text)?;
        let mut stream = connection.open_uni().await.map_err(text)?;
        let chunk = vec![7_u8; 64 * 1024];
        let mut left = bytes;
        while left > 0 {
            let now = left.min(chunk.len() as u64) as usize;
            stream.write_all(&chunk[..now]).await.map_err(text)?;
            left -= now as u64;
        }
        stream.finish().map_err(text)?;
        stream.stopped().await.map_err(text)?;
        Ok::<_, String>(())
    });
    let connection =
        client.connect_with(config, address, SERVER_NAME).map_err(text)?.await.map_err(text)?;
    let begun = Instant::now();
    let mut stream = connection.accept_uni().await.map_err(text)?;
    let mut got = 0_u64;
    while let Some(chunk) = stream.read_chunk(64 * 1024, true).await.map_err(text)? {
        got += chunk.bytes.len() as u64;
    }
    if got != bytes {
        return Err(format!("{got} of {bytes} bytes came"));
    }
    let result = (begun.elapsed().as_secs_f64(), (cpu() - cpu_begun).as_secs_f64());
    sending.await.map_err(text)??;
    Ok(result)
}

async fn bulk() -> Result<Vec<Row>, String> {
    let dir = tempfile::Builder::new().prefix("tlb").tempdir_in("target").map_err(text)?;
    let dir = dir.path().canonicalize().map_err(text)?;
    let domain = DomainId::new("bench").map_err(text)?;
    let ca = Ca::init(&dir.join("ca"), &domain, wall_unix_ms() / 1_000, YEAR, YEAR).map_err(text)?;
    let mut papers = Papers { domain: domain.clone(), ca };
    let (giver, credentials, giver_tls) = papers.tls(&dir, "giver")?;
    let (_, _, other_tls) = papers.tls(&dir, "other")?;
    let (root, from) = store(&dir.join("giver-root"), &domain)?;
    let bytes = fill(root, &from, &giver, &domain, &credentials)?;
    let (mut rates, mut cpus) = ((Vec::new(), Vec::new()), (Vec::new(), Vec::new()));
    for slice in 0..SLICES {
        let (seconds, cpu) = ours(&dir, slice, &mut papers, (&from, &giver_tls)).await?;
        rates.0.push(bytes as f64 / seconds / 1e6);
        cpus.0.push(cpu / bytes as f64 * f64::from(1 << 30));
        let (seconds, cpu) = bare(bytes, &giver_tls, &other_tls).await?;
        rates.1.push(bytes as f64 / seconds / 1e6);
        cpus.1.push(cpu / bytes as f64 * f64::from(1 << 30));
    }
    let peer = "bare quinn stream, nothing stored";
    Ok(vec![
        Row::measured("bulk-loopback", "MB/s", (median(rates.0), peer, median(rates.1)), ">= 0.7", |r| r >= 0.7),
        Row::measured("bulk-cpu", "CPU-s/GiB", (median(cpus.0), peer, median(cpus.1)), "<= 1.4", |r| r <= 1.4),
    ])
}
