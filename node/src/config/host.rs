//! What a config says of this host and only the host can confirm: directories that must be there, and
//! the token file. `config check` asks; a start finds the same out by doing it.

use std::path::Path;

use tidelock_gateway::{Jwks, TokenSet};

use super::{Config, Mistake, callers::shared_types};

impl Config {
    /// Mistakes that show only on the host that the config is for.
    #[must_use]
    pub fn host_mistakes(&self) -> Vec<Mistake> {
        let mut found = Vec::new();
        let mut add = |key: &str, message: String| {
            found.push(Mistake {
                line: 0,
                key: key.to_owned(),
                message,
            });
        };
        let mut parent_is_there = |key: &str, path: &Path| {
            if let Some(parent) = path.parent()
                && !parent.is_dir()
            {
                add(key, format!("{} is not there; make it", parent.display()));
            }
        };
        parent_is_there("node.root", &self.node.root);
        // A socket in the root itself is made after the root.
        if self.gateway.unix.parent() != Some(self.node.root.as_path()) {
            parent_is_there("gateway.unix", &self.gateway.unix);
        }
        for (key, path) in [
            ("identity.certificate", &self.identity.certificate),
            ("identity.key", &self.identity.key),
            ("identity.ca", &self.identity.ca),
            ("policy.trust", &self.policy.trust),
        ] {
            if let Err(error) = std::fs::File::open(path) {
                add(key, format!("cannot read {}: {error}", path.display()));
            }
        }
        if let (true, Some(path)) = (self.beacon.enabled, &self.beacon.key_file)
            && let Err(error) = crate::sealing::key_bytes(path)
        {
            add("beacon.key_file", error.to_string());
        }
        match self.gateway.tokens.as_deref().map(TokenSet::load) {
            Some(Err(error)) => add("gateway.tokens", error.to_string()),
            Some(Ok(tokens)) => {
                for (key, message) in shared_types(&self.gateway, Some(&tokens)) {
                    add(&format!("gateway.{key}"), message);
                }
            }
            None => {}
        }
        if let Some(tls) = &self.gateway.tls {
            for error in crate::run::callers::papers_mistakes(tls) {
                add(error.key, error.message);
            }
        }
        for issuer in &self.gateway.oidc {
            if let Err(error) = Jwks::load(&issuer.jwks) {
                add("gateway.oidc.jwks", error.to_string());
            }
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt as _};

    use super::*;

    #[test]
    fn what_is_not_on_the_host_is_named_by_key_and_what_is_there_is_good() {
        let dir = tempfile::tempdir().unwrap();
        let text = "[node]\nid = \"a\"\ndomain = \"harbour\"\nroot = \"in/state\"\n\
                    [identity]\ncertificate = \"a.crt\"\nkey = \"a.key\"\nca = \"ca.crt\"\n\
                    [revocation]\ncrls = [\"site.crl\"]\n[policy]\ntrust = \"trust.toml\"\n\
                    [mesh]\nlisten = \"127.0.0.1:0\"\n\
                    [gateway]\nunix = \"run/s.sock\"\ntokens = \"tokens.toml\"\n[audit]\ncustody = 0\n";
        let config = Config::parse(text, dir.path()).unwrap();
        let keys: Vec<String> = config.host_mistakes().into_iter().map(|m| m.key).collect();
        assert_eq!(
            keys,
            [
                "node.root",
                "gateway.unix",
                "identity.certificate",
                "identity.key",
                "identity.ca",
                "policy.trust",
                "gateway.tokens",
            ]
        );
        for made in ["in", "run"] {
            fs::create_dir(dir.path().join(made)).unwrap();
        }
        for file in ["a.crt", "a.key", "ca.crt", "trust.toml"] {
            fs::write(dir.path().join(file), "").unwrap();
        }
        let without_tokens = text.replace("tokens = \"tokens.toml\"\n", "");
        let config = Config::parse(&without_tokens, dir.path()).unwrap();
        assert_eq!(config.host_mistakes(), []);
        // The beacon's key, only where beacons are on.
        let beacon = format!("{without_tokens}[beacon]\nkey_file = \"site.beacon\"\n");
        let config = Config::parse(&beacon, dir.path()).unwrap();
        assert_eq!(config.host_mistakes(), []);
        let config = Config::parse(&format!("{beacon}enabled = true\n"), dir.path()).unwrap();
        let mistakes = || config.host_mistakes().into_iter().map(|m| m.key);
        assert_eq!(mistakes().collect::<Vec<_>>(), ["beacon.key_file"]);
        let path = dir.path().join("site.beacon");
        fs::write(&path, [1; 32]).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        assert_eq!(mistakes().count(), 1, "others can read it");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        assert_eq!(mistakes().count(), 0);
    }
}
