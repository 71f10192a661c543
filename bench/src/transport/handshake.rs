//! What a handshake costs both ends, by the length of the CRL, beside rustls with its own verifiers.

use std::{path::Path, sync::Arc, time::Duration};

use rustls::{
    ClientConfig, ClientConnection, RootCertStore, ServerConfig, ServerConnection,
    client::{Resumption, WebPkiServerVerifier},
    pki_types::{CertificateRevocationListDer, PrivateKeyDer, ServerName},
    server::WebPkiClientVerifier,
};
use serde_json::json;
use tidelock::clock::wall_unix_ms;
use tidelock_transport::{
    revocation::VerifiedCrl,
    tls::{MeshTls, SERVER_NAME},
};
use tokio::runtime::Runtime;

use super::site::{Paper, Site, mesh_tls, named};
use crate::{Row, cpu, median, peers::text};

const SIZES: [(&str, u64); 4] = [
    ("handshake-crl-0", 0),
    ("handshake-crl-1k", 1_000),
    ("handshake-crl-10k", 10_000),
    ("handshake-crl-100k", 100_000),
];
const SLICES: usize = 9;
/// CPU time of one slice of one system with one list.
const SLICE: Duration = Duration::from_millis(150);
const STOCK: &str = "rustls 0.23, its own verifiers";
const AIM: &str = "<= 1.10 x no CRL";
const AIM_LOAD: &str = "<= 50 ms";

pub fn rows(_: &Runtime, _: &Path) -> Vec<Row> {
    measure().unwrap_or_else(|why| vec![Row::not_run("handshake-crl-100k", STOCK, AIM, why)])
}

/// Both sides of a handshake.
struct Pair {
    client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
}

impl Pair {
    fn shake(&self) -> Result<(), String> {
        let name = ServerName::try_from(SERVER_NAME).map_err(text)?;
        let mut client = ClientConnection::new(self.client.clone(), name).map_err(text)?;
        let mut server = ServerConnection::new(self.server.clone()).map_err(text)?;
        let mut wire = Vec::new();
        while client.is_handshaking() || server.is_handshaking() {
            wire.clear();
            while client.wants_write() {
                client.write_tls(&mut wire).map_err(text)?;
            }
            let mut sent = wire.as_slice();
            while !sent.is_empty() {
                server.read_tls(&mut sent).map_err(text)?;
                server.process_new_packets().map_err(text)?;
            }
            wire.clear();
            while server.wants_write() {
                server.write_tls(&mut wire).map_err(text)?;
            }
            let mut sent = wire.as_slice();
            while !sent.is_empty() {
                client.read_tls(&mut sent).map_err(text)?;
                client.process_new_packets().map_err(text)?;
            }
        }
        Ok(())
    }

    /// CPU microseconds of one.
    fn cost(&self) -> Result<f64, String> {
        let begun = cpu();
        let mut shaken = 0.0;
        while cpu() - begun < SLICE {
            self.shake()?;
            shaken += 1.0;
        }
        Ok((cpu() - begun).as_secs_f64() * 1e6 / shaken)
    }
}

fn ours(
    site: &Site,
    papers: [&Paper; 2],
    crl: Option<&CertificateRevocationListDer<'static>>,
) -> Result<Pair, String> {
    let make = |name: &str, paper: &Paper| -> Result<Arc<MeshTls>, String> {
        let tls = mesh_tls(named(name)?, site.credentials(paper)?);
        if let Some(crl) = crl {
            load(&tls, crl)?;
        }
        Ok(tls)
    };
    let (server, client) = (make("server", papers[0])?, make("client", papers[1])?);
    Ok(Pair {
        server: Arc::new(server.server_config().map_err(text)?),
        client: Arc::new(client.client_config(Some(server.node_id())).map_err(text)?),
    })
}

fn load(tls: &MeshTls, crl: &CertificateRevocationListDer<'static>) -> Result<(), String> {
    let credentials = tls.credentials();
    let crl = VerifiedCrl::verify(crl, credentials.trust()).map_err(text)?;
    let imported = tls.revocation().import(crl, wall_unix_ms());
    imported.map(drop).map_err(text)
}

fn stock(
    site: &Site,
    papers: [&Paper; 2],
    crl: Option<&CertificateRevocationListDer<'static>>,
) -> Result<Pair, String> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut roots = RootCertStore::empty();
    roots.add(site.ca_der.clone()).map_err(text)?;
    let roots = Arc::new(roots);
    let crls = || crl.into_iter().cloned();
    let [server, client] = papers.map(|paper| {
        let key = PrivateKeyDer::Pkcs8(paper.key.serialize_der().into());
        (vec![paper.der.clone()], key)
    });
    let verifier = WebPkiClientVerifier::builder_with_provider(roots.clone(), provider.clone())
        .with_crls(crls())
        .build()
        .map_err(text)?;
    let mut server_config = ServerConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(text)?
        .with_client_cert_verifier(verifier)
        .with_single_cert(server.0, server.1)
        .map_err(text)?;
    server_config.send_tls13_tickets = 0;
    let verifier = WebPkiServerVerifier::builder_with_provider(roots, provider.clone())
        .with_crls(crls())
        .build()
        .map_err(text)?;
    let mut client_config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(text)?
        .with_webpki_verifier(verifier)
        .with_client_auth_cert(client.0, client.1)
        .map_err(text)?;
    client_config.resumption = Resumption::disabled();
    Ok(Pair {
        server: Arc::new(server_config),
        client: Arc::new(client_config),
    })
}

fn measure() -> Result<Vec<Row>, String> {
    let site = Site::new()?;
    let server = site.paper(&named("server")?, Some(SERVER_NAME))?;
    let client = site.paper(&named("client")?, Some(SERVER_NAME))?;
    let papers = [&server, &client];
    let lists = SIZES.map(|(_, entries)| site.crl(1, 1..=entries));
    let lists = lists.into_iter().collect::<Result<Vec<_>, _>>()?;
    let without = [ours(&site, papers, None)?, stock(&site, papers, None)?];
    let mut pairs = Vec::new();
    for crl in &lists {
        pairs.push([
            ours(&site, papers, Some(crl))?,
            stock(&site, papers, Some(crl))?,
        ]);
    }
    // Whoever is on the list is refused by both, and so the rest may be timed.
    let long = site.crl(1, (1..100_000).chain([client.serial]))?;
    for (pair, who) in [
        (ours(&site, papers, Some(&long))?, "ours"),
        (stock(&site, papers, Some(&long))?, STOCK),
    ] {
        if pair.shake().is_ok() {
            return Err(format!("{who}: a revoked certificate got through"));
        }
    }
    let mut none = [Vec::new(), Vec::new()];
    let mut costs: Vec<[Vec<f64>; 2]> = SIZES.iter().map(|_| Default::default()).collect();
    let mut loads = [Vec::new(), Vec::new()];
    for _ in 0..SLICES {
        for (system, pair) in without.iter().enumerate() {
            none[system].push(pair.cost()?);
        }
        for (pairs, costs) in pairs.iter().zip(&mut costs) {
            for (pair, costs) in pairs.iter().zip(costs) {
                costs.push(pair.cost()?);
            }
        }
        let fresh = mesh_tls(named("server")?, site.credentials(&server)?);
        let begun = cpu();
        load(&fresh, &lists[3])?;
        loads[0].push((cpu() - begun).as_secs_f64() * 1e3);
        let mut roots = RootCertStore::empty();
        roots.add(site.ca_der.clone()).map_err(text)?;
        let builder = WebPkiClientVerifier::builder_with_provider(
            Arc::new(roots),
            Arc::new(rustls::crypto::aws_lc_rs::default_provider()),
        );
        let builder = builder.with_crls([lists[3].clone()]);
        let begun = cpu();
        let _verifier = builder.build().map_err(text)?;
        loads[1].push((cpu() - begun).as_secs_f64() * 1e3);
    }
    // Each slice beside its own: what else the machine does changes from one to the next.
    let tax_of = |with: &[f64], without: &[f64]| {
        median(with.iter().zip(without).map(|(a, b)| a / b).collect())
    };
    let mut rows = Vec::new();
    for ((id, entries), [ours, theirs]) in SIZES.into_iter().zip(costs) {
        let tax = [tax_of(&ours, &none[0]), tax_of(&theirs, &none[1])];
        let (ours, theirs) = (median(ours), median(theirs));
        let mut row = Row::absolute(
            id,
            "CPU-us",
            ours,
            Some((STOCK, theirs)),
            AIM,
            tax[0] <= 1.10,
        );
        row.why = (tax[0] > 1.10).then(|| format!("it is {:.2} x no CRL", tax[0]));
        rows.push(row.with(json!({
            "entries": entries,
            "no_crl_us": {"ours": median(none[0].clone()), "theirs": median(none[1].clone())},
            "of_no_crl": {"ours": tax[0], "theirs": tax[1]},
            "what": "TLS 1.3, both ends, certificates on both sides, in memory",
        })));
    }
    let [ours, theirs] = loads.map(median);
    rows.push(
        Row::absolute("crl-load-100k", "ms", ours, Some((STOCK, theirs)), AIM_LOAD, ours <= 50.0)
            .with(json!({"bytes": lists[3].len(), "what": "CPU: parsed, signature checked, in force; theirs is parsed only"})),
    );
    Ok(rows)
}
