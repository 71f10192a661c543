//! A certificate authority played by the `openssl` command line: what a site that has one would do.
//!
//! Every date is absolute, and the clocks in the tests of this crate are injected. What is good from
//! [`BEFORE`] to [`AFTER`] serves real nodes too.
#![allow(
    dead_code,
    reason = "each test file uses its own part of the authority"
)]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

/// 2030-06-01T00:00:00Z: "now" in these tests.
pub(crate) const NOW: u64 = 1_906_502_400_000;
/// One day.
pub(crate) const DAY: u64 = 24 * 60 * 60 * 1000;

/// The first day of a month of 2030 (or of another year), as openssl wants it.
pub(crate) const BEFORE: &str = "200101000000Z";
pub(crate) const AFTER: &str = "400101000000Z";
pub(crate) const MAY: &str = "300501000000Z";
pub(crate) const JULY: &str = "300701000000Z";

/// Runs openssl and returns its standard output; a failure shows what it said.
pub(crate) fn openssl(args: &[&str]) -> Vec<u8> {
    let output = Command::new("openssl")
        .args(args)
        .output()
        .expect("openssl must be installed");
    assert!(
        output.status.success(),
        "openssl {args:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    output.stdout
}

fn path(p: &Path) -> &str {
    p.to_str().unwrap()
}

#[derive(Debug, Clone, Copy)]
pub(crate) enum Key {
    P256,
    P384,
    P521,
    Ed25519,
    Rsa1024,
    Rsa2048,
}

impl Key {
    fn generate(self, out: &Path) {
        let (algorithm, option) = match self {
            Self::P256 => ("EC", Some("ec_paramgen_curve:P-256")),
            Self::P384 => ("EC", Some("ec_paramgen_curve:P-384")),
            Self::P521 => ("EC", Some("ec_paramgen_curve:P-521")),
            Self::Ed25519 => ("ED25519", None),
            Self::Rsa1024 => ("RSA", Some("rsa_keygen_bits:1024")),
            Self::Rsa2048 => ("RSA", Some("rsa_keygen_bits:2048")),
        };
        let mut args = vec!["genpkey", "-algorithm", algorithm, "-out", path(out)];
        if let Some(option) = option {
            args.extend(["-pkeyopt", option]);
        }
        openssl(&args);
        fs::set_permissions(out, fs::Permissions::from_mode(0o600)).unwrap();
    }

    fn digest(self) -> &'static str {
        match self {
            Self::Ed25519 => "default",
            Self::P384 => "sha384",
            _ => "sha256",
        }
    }
}

/// A certificate and its key, as files.
#[derive(Debug, Clone)]
pub(crate) struct Issued {
    pub(crate) cert: PathBuf,
    pub(crate) key: PathBuf,
    /// The certificate file of a node: the certificate, then the intermediates.
    pub(crate) chain: PathBuf,
}

impl Issued {
    pub(crate) fn chain_pem(&self) -> Vec<u8> {
        fs::read(&self.chain).unwrap()
    }

    pub(crate) fn key_pem(&self) -> Vec<u8> {
        fs::read(&self.key).unwrap()
    }
}

/// What to issue.
#[derive(Debug, Clone)]
pub(crate) struct Request<'a> {
    pub(crate) cn: &'a str,
    pub(crate) san: Option<String>,
    pub(crate) eku: Option<&'a str>,
    pub(crate) start: &'a str,
    pub(crate) end: &'a str,
    pub(crate) kind: Key,
    /// Certify this key again instead of a new one.
    pub(crate) reuse: Option<&'a Issued>,
    pub(crate) is_ca: bool,
    /// Authorities that may stand below this one, where that is limited.
    pub(crate) path_length: Option<u8>,
    /// Further lines of extensions.
    pub(crate) more: &'a str,
}

impl<'a> Request<'a> {
    /// A node of a domain, as the documentation says to make it.
    pub(crate) fn node(domain: &str, node: &'a str) -> Self {
        Self {
            cn: node,
            san: Some(format!(
                "URI:spiffe://example.org/domains/{domain}/peers/{node}"
            )),
            eku: Some("serverAuth,clientAuth"),
            start: BEFORE,
            end: AFTER,
            kind: Key::P256,
            reuse: None,
            is_ca: false,
            path_length: None,
            more: "",
        }
    }
}

/// An authority with its own directory: key, certificate, database, CRL number.
#[derive(Debug)]
pub(crate) struct Ca {
    dir: PathBuf,
    kind: Key,
    /// Intermediates to send after a leaf, this CA first; empty for a root.
    above: Vec<PathBuf>,
    issued: std::cell::Cell<u32>,
}

impl Ca {
    fn prepare(dir: PathBuf, kind: Key) -> Self {
        fs::create_dir_all(dir.join("new")).unwrap();
        fs::write(dir.join("index.txt"), "").unwrap();
        fs::write(dir.join("index.txt.attr"), "unique_subject = no\n").unwrap();
        let d = path(&dir);
        let digest = kind.digest();
        fs::write(
            dir.join("openssl.cnf"),
            format!(
                "[ca]\ndefault_ca = site\n\
                 [site]\ndatabase = {d}/index.txt\nnew_certs_dir = {d}/new\n\
                 crlnumber = {d}/crlnumber\ncertificate = {d}/ca.pem\nprivate_key = {d}/ca.key\n\
                 default_md = {digest}\npolicy = names\nrand_serial = yes\ncopy_extensions = none\n\
                 unique_subject = no\n\
                 [names]\ncommonName = supplied\n\
                 [full]\nauthorityKeyIdentifier = keyid\n\
                 [delta]\n2.5.29.27 = critical,DER:020101\n\
                 [indirect]\nissuingDistributionPoint = critical,@idp_indirect\n\
                 [idp_indirect]\nindirectCRL = TRUE\n\
                 [users]\nissuingDistributionPoint = critical,@idp_users\n\
                 [idp_users]\nonlyuser = TRUE\n\
                 [cas]\nissuingDistributionPoint = critical,@idp_cas\n\
                 [idp_cas]\nonlyCA = TRUE\n\
                 [reasons]\nissuingDistributionPoint = critical,@idp_reasons\n\
                 [idp_reasons]\nonlysomereasons = keyCompromise\n\
                 [point]\nissuingDistributionPoint = critical,@idp_point\n\
                 [idp_point]\nfullname = URI:http://ca.invalid/crl\n\
                 [other_point]\nissuingDistributionPoint = critical,@idp_other\n\
                 [idp_other]\nfullname = URI:http://ca.invalid/crl-2\n\
                 [critical]\n1.2.3.4 = critical,DER:0500\n"
            ),
        )
        .unwrap();
        Self {
            dir,
            kind,
            above: Vec::new(),
            issued: std::cell::Cell::new(0),
        }
    }

    /// A root with this name.
    pub(crate) fn root(dir: &TempDir, directory: &str, name: &str, kind: Key) -> Self {
        let ca = Self::prepare(dir.path().join(directory), kind);
        kind.generate(&ca.key());
        let request = ca.dir.join("ca.csr");
        openssl(&[
            "req",
            "-new",
            "-key",
            path(&ca.key()),
            "-subj",
            &format!("/CN={name}"),
            "-out",
            path(&request),
        ]);
        let extensions = ca.dir.join("ca.ext");
        fs::write(
            &extensions,
            "basicConstraints = critical,CA:TRUE\nkeyUsage = critical,keyCertSign,cRLSign\n\
             subjectKeyIdentifier = hash\n",
        )
        .unwrap();
        openssl(&[
            "ca",
            "-batch",
            "-notext",
            "-selfsign",
            "-config",
            path(&ca.config()),
            "-in",
            path(&request),
            "-out",
            path(&ca.cert()),
            "-startdate",
            BEFORE,
            "-enddate",
            AFTER,
            "-extfile",
            path(&extensions),
        ]);
        ca
    }

    /// An intermediate under this CA.
    pub(crate) fn intermediate(&self, name: &str, kind: Key) -> Self {
        self.intermediate_with(name, kind, None)
    }

    /// An intermediate that may have so many below it.
    pub(crate) fn intermediate_with(&self, name: &str, kind: Key, path_length: Option<u8>) -> Self {
        let request = Request {
            is_ca: true,
            kind,
            path_length,
            ..Request::node("none", name)
        };
        self.with_papers(name, kind, &self.issue(&request))
    }

    /// Whoever has these papers, which this CA issued, as an authority below it. It does not matter to
    /// openssl whether they allow that.
    pub(crate) fn with_papers(&self, name: &str, kind: Key, issued: &Issued) -> Self {
        let mut ca = Self::prepare(self.dir.join(name), kind);
        fs::copy(&issued.cert, ca.cert()).unwrap();
        fs::copy(&issued.key, ca.key()).unwrap();
        ca.above = std::iter::once(ca.cert())
            .chain(self.above.iter().cloned())
            .collect();
        ca
    }

    pub(crate) fn config(&self) -> PathBuf {
        self.dir.join("openssl.cnf")
    }

    pub(crate) fn cert(&self) -> PathBuf {
        self.dir.join("ca.pem")
    }

    pub(crate) fn key(&self) -> PathBuf {
        self.dir.join("ca.key")
    }

    pub(crate) fn pem(&self) -> Vec<u8> {
        fs::read(self.cert()).unwrap()
    }

    /// Issues a certificate.
    pub(crate) fn issue(&self, request: &Request<'_>) -> Issued {
        let n = self.issued.replace(self.issued.get() + 1);
        let file = |extension: &str| self.dir.join(format!("{}-{n}.{extension}", request.cn));
        let (key, csr, cert, chain, ext) = (
            file("key"),
            file("csr"),
            file("pem"),
            file("chain.pem"),
            file("ext"),
        );
        match request.reuse {
            Some(before) => {
                fs::copy(&before.key, &key).unwrap();
            }
            None => request.kind.generate(&key),
        }
        openssl(&[
            "req",
            "-new",
            "-key",
            path(&key),
            "-subj",
            &format!("/CN={}", request.cn),
            "-out",
            path(&csr),
        ]);
        let mut extensions = if request.is_ca {
            let limit = request.path_length.map(|most| format!(",pathlen:{most}"));
            format!(
                "basicConstraints = critical,CA:TRUE{}\nkeyUsage = critical,keyCertSign,cRLSign\n\
                 subjectKeyIdentifier = hash\n",
                limit.unwrap_or_default()
            )
        } else {
            let mut text = "basicConstraints = critical,CA:FALSE\n".to_owned();
            if let Some(eku) = request.eku {
                text += &format!("extendedKeyUsage = {eku}\n");
            }
            if let Some(san) = &request.san {
                text += &format!("subjectAltName = {san}\n");
            }
            text
        };
        extensions += request.more;
        extensions += "authorityKeyIdentifier = keyid\n";
        fs::write(&ext, extensions).unwrap();
        openssl(&[
            "ca",
            "-batch",
            "-notext",
            "-config",
            path(&self.config()),
            "-in",
            path(&csr),
            "-out",
            path(&cert),
            "-startdate",
            request.start,
            "-enddate",
            request.end,
            "-extfile",
            path(&ext),
            "-md",
            self.kind.digest(),
        ]);
        let mut pem = fs::read(&cert).unwrap();
        for above in &self.above {
            pem.extend(fs::read(above).unwrap());
        }
        fs::write(&chain, pem).unwrap();
        Issued { cert, key, chain }
    }

    /// Revokes a certificate in the CA's database; the next CRL has it.
    pub(crate) fn revoke(&self, cert: &Path, reason: Option<&str>) {
        let config = self.config();
        let mut args = vec!["ca", "-config", path(&config), "-revoke", path(cert)];
        if let Some(reason) = reason {
            args.extend(["-crl_reason", reason]);
        }
        openssl(&args);
    }

    /// Writes foreign entries into the CA's database: `count` revoked serials from `first` on.
    pub(crate) fn revoke_serials(&self, first: u32, count: u32) {
        use std::fmt::Write as _;
        let mut index = fs::read_to_string(self.dir.join("index.txt")).unwrap();
        for serial in first..first + count {
            writeln!(
                index,
                "R\t310101000000Z\t300101000000Z\t{serial:08X}\tunknown\t/CN=x"
            )
            .unwrap();
        }
        fs::write(self.dir.join("index.txt"), index).unwrap();
    }

    /// A CRL with everything revoked so far, in DER.
    pub(crate) fn crl(&self, number: u64, this_update: &str, next_update: &str) -> Vec<u8> {
        self.crl_with("full", number, this_update, next_update)
    }

    /// A CRL with the extensions of this section, in DER.
    pub(crate) fn crl_with(&self, section: &str, number: u64, this: &str, next: &str) -> Vec<u8> {
        let hex = format!("{number:X}");
        let hex = if hex.len() % 2 == 0 {
            hex
        } else {
            format!("0{hex}")
        };
        fs::write(self.dir.join("crlnumber"), format!("{hex}\n")).unwrap();
        let pem = self.dir.join(format!("crl-{number}.pem"));
        openssl(&[
            "ca",
            "-gencrl",
            "-config",
            path(&self.config()),
            "-crlexts",
            section,
            "-crl_lastupdate",
            this,
            "-crl_nextupdate",
            next,
            "-out",
            path(&pem),
        ]);
        openssl(&["crl", "-in", path(&pem), "-outform", "DER"])
    }

    /// The ordinary CRL of these tests: May to July.
    pub(crate) fn crl_now(&self, number: u64) -> Vec<u8> {
        self.crl(number, MAY, JULY)
    }
}
