//! A site CA for sites that have none: issues, renews, revokes, and writes CRLs.
//!
//! Its state is one directory: `ca.crt`, `ca.key` (0600), `crl.pem` (the newest CRL) and
//! `index.json` (every serial issued, every revocation, the last CRL number). Nodes do not need
//! this CA: any X.509 CA that writes the same URI SAN serves as well (docs/src/identity.md).

use std::{
    fs,
    io::{self, Write as _},
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    time::Duration,
};

use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, DistinguishedName,
    DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyIdMethod, KeyPair, KeyUsagePurpose,
    RevocationReason, RevokedCertParams, SanType, SerialNumber, string::Ia5String,
};
use serde::{Deserialize, Serialize};
use tidelock_segments::{DomainId, NodeId};
use time::OffsetDateTime;

/// How far back new certificates begin, so that a node whose clock is slow can use one at once.
const BACKDATE: Duration = Duration::from_secs(300);
/// The format of `index.json`.
const INDEX_FORMAT: u32 = 1;

/// Why a CA operation did nothing.
#[derive(Debug, thiserror::Error)]
pub enum CaError {
    /// A file could not be read or written.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// There is a CA already.
    #[error("{0} holds a CA already; choose another --dir, nothing was overwritten")]
    Exists(PathBuf),
    /// The key can be read by others.
    #[error("{path} has mode {mode:04o}; make it readable by its owner only: chmod 600 {path}")]
    LooseKey {
        /// The key file.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// `index.json` is not ours.
    #[error("{path} is not a CA index of format {INDEX_FORMAT}: {why}")]
    Index {
        /// The file.
        path: PathBuf,
        /// What the parser said.
        why: String,
    },
    /// Nothing to revoke.
    #[error("no unrevoked certificate matches `{0}`; `tidelock ca list` shows what was issued")]
    NoMatch(String),
    /// Certificate making failed.
    #[error("cannot make the certificate: {0}")]
    Certificate(#[from] rcgen::Error),
    /// The system has no randomness to give.
    #[error("the system gave no random bytes")]
    Random,
}

fn io_at(path: &Path) -> impl FnOnce(io::Error) -> CaError + '_ {
    move |source| CaError::Io {
        path: path.to_owned(),
        source,
    }
}

/// One certificate this CA has issued.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Issued {
    /// Serial number, lower-case hexadecimal.
    pub serial: String,
    /// The node it names.
    pub node: NodeId,
    /// notAfter, Unix seconds.
    pub not_after_unix_s: u64,
    /// When it was revoked, Unix seconds.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub revoked_unix_s: Option<u64>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Index {
    format: u32,
    domain: DomainId,
    crl_number: u64,
    issued: Vec<Issued>,
}

/// An opened CA directory.
#[derive(Debug)]
pub struct Ca {
    dir: PathBuf,
    index: Index,
    issuer: Issuer<'static, KeyPair>,
}

/// Where an issued identity was written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct IdentityFiles {
    /// Certificate, PEM.
    pub certificate: PathBuf,
    /// Private key, PKCS#8 PEM, 0600.
    pub key: PathBuf,
    /// Serial number, hexadecimal.
    pub serial: String,
}

impl Ca {
    /// Makes a new CA in `dir` (created, mode 0700), with an empty first CRL.
    ///
    /// # Errors
    /// [`CaError::Exists`] where a CA is; otherwise what the system or the certificate maker said.
    pub fn init(
        dir: &Path,
        domain: &DomainId,
        now_unix_s: u64,
        lifetime: Duration,
        crl_lifetime: Duration,
    ) -> Result<Self, CaError> {
        if dir.join("ca.crt").exists() || dir.join("ca.key").exists() {
            return Err(CaError::Exists(dir.to_owned()));
        }
        create_private_dir(dir)?;
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::default();
        params.distinguished_name = name(&format!("Tidelock site CA {domain}"));
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.serial_number = Some(new_serial()?);
        set_validity(&mut params, now_unix_s, lifetime);
        let certificate = params.self_signed(&key)?;
        write_new(&dir.join("ca.key"), key.serialize_pem().as_bytes(), 0o600)?;
        write_new(&dir.join("ca.crt"), certificate.pem().as_bytes(), 0o644)?;
        let mut ca = Self {
            dir: dir.to_owned(),
            index: Index {
                format: INDEX_FORMAT,
                domain: domain.clone(),
                crl_number: 0,
                issued: Vec::new(),
            },
            issuer: Issuer::new(params, key),
        };
        ca.write_crl(now_unix_s, crl_lifetime)?;
        Ok(ca)
    }

    /// Opens an existing CA.
    ///
    /// # Errors
    /// Missing or foreign files, or a key that others can read.
    pub fn open(dir: &Path) -> Result<Self, CaError> {
        let key_path = dir.join("ca.key");
        let mode = fs::metadata(&key_path).map_err(io_at(&key_path))?.mode() & 0o7777;
        if mode & 0o077 != 0 {
            return Err(CaError::LooseKey {
                path: key_path,
                mode,
            });
        }
        let key = KeyPair::from_pem(&fs::read_to_string(&key_path).map_err(io_at(&key_path))?)?;
        let crt_path = dir.join("ca.crt");
        let crt = fs::read_to_string(&crt_path).map_err(io_at(&crt_path))?;
        let index_path = dir.join("index.json");
        let text = fs::read(&index_path).map_err(io_at(&index_path))?;
        let index: Index = serde_json::from_slice(&text).map_err(|e| CaError::Index {
            path: index_path.clone(),
            why: e.to_string(),
        })?;
        if index.format != INDEX_FORMAT {
            return Err(CaError::Index {
                path: index_path,
                why: format!("its format is {}", index.format),
            });
        }
        Ok(Self {
            dir: dir.to_owned(),
            index,
            issuer: Issuer::from_ca_cert_pem(&crt, key)?,
        })
    }

    /// The domain that its certificates name.
    #[must_use]
    pub fn domain(&self) -> &DomainId {
        &self.index.domain
    }

    /// Every certificate issued, oldest first.
    #[must_use]
    pub fn issued(&self) -> &[Issued] {
        &self.index.issued
    }

    /// The CA certificate.
    #[must_use]
    pub fn certificate_path(&self) -> PathBuf {
        self.dir.join("ca.crt")
    }

    /// The newest CRL.
    #[must_use]
    pub fn crl_path(&self) -> PathBuf {
        self.dir.join("crl.pem")
    }

    /// Issues a certificate for `node` under a new key and writes `<out>/<node>.crt` and `.key`.
    /// An existing pair is replaced as a whole, key first renamed into place, so that a node that
    /// reloads in between keeps its old pair.
    ///
    /// # Errors
    /// What the system or the certificate maker said; the index names nothing that was not written.
    pub fn issue(
        &mut self,
        node: &NodeId,
        out: &Path,
        now_unix_s: u64,
        lifetime: Duration,
    ) -> Result<IdentityFiles, CaError> {
        fs::create_dir_all(out).map_err(io_at(out))?;
        let key = KeyPair::generate()?;
        let serial = new_serial()?;
        let mut params = CertificateParams::default();
        params.distinguished_name = name(node.as_str());
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        let domain = &self.index.domain;
        params.subject_alt_names = vec![SanType::URI(Ia5String::try_from(format!(
            "spiffe://{domain}/domains/{domain}/peers/{node}"
        ))?)];
        params.use_authority_key_identifier_extension = true;
        params.serial_number = Some(serial.clone());
        set_validity(&mut params, now_unix_s, lifetime);
        let certificate = params.signed_by(&key, &self.issuer)?;
        let serial = hex(&serial.to_bytes());
        self.index.issued.push(Issued {
            serial: serial.clone(),
            node: node.clone(),
            not_after_unix_s: now_unix_s.saturating_add(lifetime.as_secs()),
            revoked_unix_s: None,
        });
        self.write_index()?;
        let files = IdentityFiles {
            certificate: out.join(format!("{node}.crt")),
            key: out.join(format!("{node}.key")),
            serial,
        };
        replace(&files.key, key.serialize_pem().as_bytes(), 0o600)?;
        replace(&files.certificate, certificate.pem().as_bytes(), 0o644)?;
        Ok(files)
    }

    /// The unrevoked certificates that `what` (a node id or a serial number) names.
    #[must_use]
    pub fn matching(&self, what: &str) -> Vec<Issued> {
        self.index
            .issued
            .iter()
            .filter(|i| i.revoked_unix_s.is_none())
            .filter(|i| i.node.as_str() == what || i.serial == what)
            .cloned()
            .collect()
    }

    /// Marks what `what` names as revoked; the next CRL carries it.
    ///
    /// # Errors
    /// [`CaError::NoMatch`], or a failed write.
    pub fn revoke(&mut self, what: &str, now_unix_s: u64) -> Result<Vec<Issued>, CaError> {
        let chosen = self.matching(what);
        if chosen.is_empty() {
            return Err(CaError::NoMatch(what.to_owned()));
        }
        for issued in &mut self.index.issued {
            if chosen.iter().any(|c| c.serial == issued.serial) {
                issued.revoked_unix_s = Some(now_unix_s);
            }
        }
        self.write_index()?;
        Ok(chosen)
    }

    /// Writes the next CRL to `crl.pem` and answers its number.
    ///
    /// # Errors
    /// What the system or the CRL maker said; the old CRL stays in that case.
    pub fn write_crl(&mut self, now_unix_s: u64, lifetime: Duration) -> Result<u64, CaError> {
        let number = self.index.crl_number.saturating_add(1);
        let revoked_certs = self
            .index
            .issued
            .iter()
            .filter_map(|i| Some((i, i.revoked_unix_s?)))
            .map(|(i, at)| RevokedCertParams {
                serial_number: SerialNumber::from_slice(&unhex(&i.serial)),
                revocation_time: at_unix(at),
                reason_code: Some(RevocationReason::Unspecified),
                invalidity_date: None,
            })
            .collect();
        let crl = CertificateRevocationListParams {
            this_update: at_unix(now_unix_s),
            next_update: at_unix(now_unix_s.saturating_add(lifetime.as_secs())),
            crl_number: SerialNumber::from(number),
            issuing_distribution_point: None,
            revoked_certs,
            key_identifier_method: KeyIdMethod::Sha256,
        }
        .signed_by(&self.issuer)?;
        self.index.crl_number = number;
        self.write_index()?;
        replace(&self.crl_path(), crl.pem()?.as_bytes(), 0o644)?;
        Ok(number)
    }

    fn write_index(&self) -> Result<(), CaError> {
        let path = self.dir.join("index.json");
        let text = serde_json::to_vec_pretty(&self.index).map_err(|e| CaError::Index {
            path: path.clone(),
            why: e.to_string(),
        })?;
        replace(&path, &text, 0o600)
    }
}

fn name(common: &str) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    name.push(DnType::CommonName, common);
    name
}

fn set_validity(params: &mut CertificateParams, now_unix_s: u64, lifetime: Duration) {
    params.not_before = at_unix(now_unix_s.saturating_sub(BACKDATE.as_secs()));
    params.not_after = at_unix(now_unix_s.saturating_add(lifetime.as_secs()));
}

/// RFC 5280 ends at the year 9999; later times become its last day.
fn at_unix(unix_s: u64) -> OffsetDateTime {
    const LAST_UNIX_S: u64 = 253_402_214_400;
    OffsetDateTime::UNIX_EPOCH + Duration::from_secs(unix_s.min(LAST_UNIX_S))
}

/// 128 random bits, positive and never zero (RFC 5280 4.1.2.2).
fn new_serial() -> Result<SerialNumber, CaError> {
    let mut bytes = [0_u8; 16];
    aws_lc_rs::rand::fill(&mut bytes).map_err(|_| CaError::Random)?;
    bytes[0] = (bytes[0] & 0x7f) | 0x40;
    Ok(SerialNumber::from_slice(&bytes))
}

/// Lower-case hexadecimal.
fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn unhex(text: &str) -> Vec<u8> {
    text.as_bytes()
        .chunks(2)
        .filter_map(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok())
        .collect()
}

fn create_private_dir(dir: &Path) -> Result<(), CaError> {
    use std::os::unix::fs::DirBuilderExt as _;
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .map_err(io_at(dir))
}

fn write_new(path: &Path, bytes: &[u8], mode: u32) -> Result<(), CaError> {
    let mut file = fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(path)
        .map_err(io_at(path))?;
    file.write_all(bytes)
        .and_then(|()| file.sync_all())
        .map_err(io_at(path))
}

/// Replaces `path` as a whole: a reader sees the old bytes or the new ones, never a part.
///
/// # Errors
/// What the system said; the old file stays in that case.
pub fn replace(path: &Path, bytes: &[u8], mode: u32) -> Result<(), CaError> {
    let temporary = path.with_extension("new");
    match fs::remove_file(&temporary) {
        Ok(()) => {}
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        Err(e) => return Err(io_at(&temporary)(e)),
    }
    write_new(&temporary, bytes, mode)?;
    fs::rename(&temporary, path).map_err(io_at(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: u64 = 1_790_000_000;
    const YEAR: Duration = Duration::from_secs(365 * 86_400);

    fn ca(dir: &Path) -> Ca {
        Ca::init(dir, &DomainId::new("harbour").unwrap(), NOW, YEAR, YEAR).unwrap()
    }

    #[test]
    fn init_never_overwrites() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ca");
        ca(&path);
        let before = fs::read(path.join("ca.key")).unwrap();
        let again = Ca::init(&path, &DomainId::new("x").unwrap(), NOW, YEAR, YEAR);
        assert!(matches!(again, Err(CaError::Exists(_))));
        assert_eq!(fs::read(path.join("ca.key")).unwrap(), before);
    }

    #[test]
    fn revoked_serials_stand_in_the_next_crl_and_numbers_only_rise() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ca");
        let mut ca = ca(&path);
        let node = NodeId::new("b").unwrap();
        let files = ca.issue(&node, &path.join("out"), NOW, YEAR).unwrap();
        assert!(matches!(ca.revoke("nobody", NOW), Err(CaError::NoMatch(_))));
        assert_eq!(ca.revoke("b", NOW).unwrap().len(), 1);
        let mut ca = Ca::open(&path).unwrap();
        assert_eq!(ca.write_crl(NOW + 1, YEAR).unwrap(), 2);
        let pem = fs::read(ca.crl_path()).unwrap();
        let (_, pem) = x509_parser::pem::parse_x509_pem(&pem).unwrap();
        let (_, crl) = x509_parser::parse_x509_crl(&pem.contents).unwrap();
        let serials: Vec<String> = crl
            .iter_revoked_certificates()
            .map(|r| hex(r.raw_serial()))
            .collect();
        assert_eq!(serials, [files.serial]);
        assert!(ca.matching("b").is_empty());
    }

    #[test]
    fn a_key_that_others_can_read_is_refused() {
        use std::os::unix::fs::PermissionsExt as _;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ca");
        ca(&path);
        assert!(Ca::open(&path).is_ok(), "positive control");
        fs::set_permissions(path.join("ca.key"), fs::Permissions::from_mode(0o640)).unwrap();
        assert!(matches!(Ca::open(&path), Err(CaError::LooseKey { .. })));
    }
}
