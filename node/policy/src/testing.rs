//! For tests of what stands around this crate: an engine that follows a script, slots in memory, a
//! signed bundle out of nothing. Not for production: the key exists for the length of a call.

use std::collections::{HashMap, HashSet};
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair, KeyPair};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::Value;

use crate::archive::MANIFEST;
use crate::bundle::{BundleBuilder, LoadContext, VerifiedBundle};
use crate::error::{BundleError, KeyError};
use crate::input_schema::convert;
use crate::package::Package;
use crate::rego_program::{Module, Rules};
use crate::request::{Engine, Evaluation, PolicyRequest};
use crate::slots::{ActivePolicy, SlotStorage, Source};
use crate::template::template;
use crate::trust::{Role, SPKI_PREFIX, TrustFile};

/// Node version that test bundles are loaded with.
pub const NODE_VERSION: &str = "0.1.0";

/// An engine whose answers a test chooses, panics and delays included.
pub struct ScriptedEngine(Box<dyn Fn(&PolicyRequest) -> Evaluation + Send + Sync>);

impl ScriptedEngine {
    /// Follows the given function.
    pub fn new(script: impl Fn(&PolicyRequest) -> Evaluation + Send + Sync + 'static) -> Self {
        Self(Box::new(script))
    }
}

impl Engine for ScriptedEngine {
    fn evaluate(&self, request: &PolicyRequest) -> Evaluation {
        (self.0)(request)
    }
}

/// Slots in memory that survive a "restart" (another [`Slots::open`](crate::Slots::open) on the
/// same value), can be damaged and can be made to fail.
#[derive(Default)]
pub struct MemorySlots {
    slots: Mutex<HashMap<String, Vec<u8>>>,
    failing: Mutex<HashSet<String>>,
}

impl MemorySlots {
    /// Empty slots.
    #[must_use]
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// Content of a slot.
    #[must_use]
    pub fn get(&self, slot: &str) -> Option<Vec<u8>> {
        held(&self.slots).get(slot).cloned()
    }

    /// Replaces a slot behind the node's back; `None` removes it.
    pub fn set(&self, slot: &str, bytes: Option<Vec<u8>>) {
        match bytes {
            Some(bytes) => _ = held(&self.slots).insert(slot.to_owned(), bytes),
            None => _ = held(&self.slots).remove(slot),
        }
    }

    /// Flips one bit in the middle of a slot.
    pub fn damage(&self, slot: &str) {
        if let Some(bytes) = held(&self.slots).get_mut(slot) {
            let middle = bytes.len() / 2;
            if let Some(byte) = bytes.get_mut(middle) {
                *byte ^= 1;
            }
        }
    }

    /// Makes reads and writes of a slot fail, or work again.
    pub fn fail(&self, slot: &str, fails: bool) {
        if fails {
            held(&self.failing).insert(slot.to_owned());
        } else {
            held(&self.failing).remove(slot);
        }
    }

    fn check(&self, slot: &str) -> io::Result<()> {
        if held(&self.failing).contains(slot) {
            return Err(io::Error::other("injected"));
        }
        Ok(())
    }
}

impl SlotStorage for MemorySlots {
    fn read(&self, slot: &str) -> io::Result<Option<Vec<u8>>> {
        self.check(slot)?;
        Ok(self.get(slot))
    }

    fn write(&self, slot: &str, bytes: &[u8]) -> io::Result<()> {
        self.check(slot)?;
        self.set(slot, Some(bytes.to_vec()));
        Ok(())
    }
}

fn held<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A policy authority for one test.
pub struct Authority {
    domain: String,
    keys: Vec<EcdsaKeyPair>,
}

impl Authority {
    /// An authority with some fresh keys, called `key-0`, `key-1`, ….
    ///
    /// # Errors
    /// [`KeyError::Signing`] if the random generator fails.
    pub fn new(domain: &str, keys: usize) -> Result<Self, KeyError> {
        let keys = (0..keys)
            .map(|_| EcdsaKeyPair::generate(&ECDSA_P256_SHA256_ASN1_SIGNING))
            .collect::<Result<_, _>>()
            .map_err(|_| KeyError::Signing)?;
        Ok(Self {
            domain: domain.to_owned(),
            keys,
        })
    }

    /// The text of a trust file that names all keys.
    #[must_use]
    pub fn trust_toml(&self, threshold: usize) -> String {
        let mut text = format!(
            "format = 1\ndomain = \"{}\"\nthreshold = {threshold}\n",
            self.domain
        );
        for (number, key) in self.keys.iter().enumerate() {
            let der = [SPKI_PREFIX, key.public_key().as_ref()].concat();
            text.push_str(&format!(
                "\n[[keys]]\nid = \"key-{number}\"\npublic_key_pem = \"\"\"\n\
                 -----BEGIN PUBLIC KEY-----\n{}\n-----END PUBLIC KEY-----\n\"\"\"\n",
                STANDARD.encode(der)
            ));
        }
        text
    }

    /// The text of a trust file of format 2: each key with its roles, each role with its threshold.
    /// A key without roles is left out.
    #[must_use]
    pub fn roles_toml(&self, thresholds: &[(Role, usize)], roles: &[&[Role]]) -> String {
        let mut text = format!("format = 2\ndomain = \"{}\"\n\n[thresholds]\n", self.domain);
        for (role, threshold) in thresholds {
            text.push_str(&format!("{role} = {threshold}\n"));
        }
        for (number, (key, roles)) in self.keys.iter().zip(roles).enumerate() {
            if roles.is_empty() {
                continue;
            }
            let der = [SPKI_PREFIX, key.public_key().as_ref()].concat();
            let roles: Vec<String> = roles.iter().map(|role| format!("\"{role}\"")).collect();
            text.push_str(&format!(
                "\n[[keys]]\nid = \"key-{number}\"\nroles = [{}]\npublic_key_pem = \"\"\"\n\
                 -----BEGIN PUBLIC KEY-----\n{}\n-----END PUBLIC KEY-----\n\"\"\"\n",
                roles.join(", "),
                STANDARD.encode(der)
            ));
        }
        text
    }

    /// Detached signatures over bytes, with the keys of these numbers.
    ///
    /// # Errors
    /// [`KeyError::Signing`] for a number without a key.
    pub fn signatures(&self, bytes: &[u8], keys: &[usize]) -> Result<Vec<Vec<u8>>, KeyError> {
        keys.iter()
            .map(|number| {
                let key = self.keys.get(*number).ok_or(KeyError::Signing)?;
                let signature = key
                    .sign(&SystemRandom::new(), bytes)
                    .map_err(|_| KeyError::Signing)?;
                Ok(signature.as_ref().to_vec())
            })
            .collect()
    }

    /// Signs an archive with the keys of these numbers.
    ///
    /// # Errors
    /// [`KeyError::Signing`] for a number without a key.
    pub fn sign(&self, archive: Vec<u8>, keys: &[usize]) -> Result<Package, KeyError> {
        let signatures = self.signatures(&archive, keys)?;
        Ok(Package {
            archive,
            signatures,
        })
    }

    /// Builds, signs with the first key and loads a bundle, by a trust file with threshold 1.
    ///
    /// # Errors
    /// [`BundleError`] if the bundle does not pass.
    pub fn load(&self, builder: BundleBuilder) -> Result<VerifiedBundle, BundleError> {
        let failed = |error: &dyn std::fmt::Display| BundleError::Compiler(error.to_string());
        let package = self
            .sign(builder.build()?, &[0])
            .map_err(|error| failed(&error))?;
        let trust = TrustFile::parse(&self.trust_toml(1)).map_err(|error| failed(&error))?;
        VerifiedBundle::load(
            package,
            &trust,
            &LoadContext::new(&self.domain, NODE_VERSION)?,
        )
    }
}

/// Rego rules outside any bundle, run as a bundle's would be: for conformance with what others expect of
/// the language.
pub struct RegoRules(Rules);

impl RegoRules {
    /// Compiles modules, path and text, with data, for one rule such as `data.test.p`.
    ///
    /// # Errors
    /// What does not compile, or is not run here, with file and line.
    pub fn compile(modules: &[(&str, &str)], data: &Value, entry: &str) -> Result<Self, String> {
        let modules: Vec<Module<'_>> = modules
            .iter()
            .map(|(path, text)| Module { path, text })
            .collect();
        Rules::compile(&modules, convert(data), entry)
            .map(Self)
            .map_err(|fault| format!("{}, line {}: {}", fault.file, fault.line, fault.message))
    }

    /// The value of the rule for an input; `None` where it is undefined.
    ///
    /// # Errors
    /// What stopped the evaluation.
    pub fn run(&self, input: Option<&Value>) -> Result<Option<Value>, String> {
        self.ask(input.map_or(regorus::Value::Undefined, convert))
    }

    /// The value of the rule for an input that is written in Rego, and may hold sets.
    ///
    /// # Errors
    /// What stopped the evaluation, or keeps the input from being read.
    pub fn run_term(&self, input: &str) -> Result<Option<Value>, String> {
        let text = format!("package input_term\n\nvalue := {input}\n");
        let module = Module {
            path: "input",
            text: &text,
        };
        let none = regorus::Value::new_object();
        let term = Rules::compile(&[module], none, "data.input_term.value")
            .map_err(|fault| fault.message)?;
        let term = term
            .run(regorus::Value::Undefined)
            .map_err(|stop| format!("{stop:?}"))?;
        self.ask(term)
    }

    fn ask(&self, input: regorus::Value) -> Result<Option<Value>, String> {
        let said = self.0.run(input).map_err(|stop| format!("{stop:?}"))?;
        if said == regorus::Value::Undefined {
            return Ok(None);
        }
        let text = said.to_json_str().map_err(|error| error.to_string())?;
        serde_json::from_str(&text)
            .map(Some)
            .map_err(|error| error.to_string())
    }
}

/// The template bundle, ready to be changed.
///
/// # Errors
/// [`BundleError`] if name or domain are not names.
pub fn template_builder(
    name: &str,
    domain: &str,
    created_unix_ms: u64,
) -> Result<BundleBuilder, BundleError> {
    let files = template(name, domain, created_unix_ms)?;
    Ok(files
        .into_iter()
        .fold(BundleBuilder::new(), |builder, (path, bytes)| {
            builder.file(&path, bytes)
        }))
}

/// The template bundle (domain `test`, epoch 1) as active policy, with its own engine or another.
///
/// # Errors
/// [`BundleError`] if the random generator fails.
pub fn active_policy(
    engine: Option<Arc<dyn Engine>>,
    source: Source,
    created_unix_ms: u64,
) -> Result<ActivePolicy, BundleError> {
    active_policy_with(engine, source, created_unix_ms, |_| {})
}

/// As [`active_policy`], with a changed manifest.
///
/// # Errors
/// [`BundleError`] if the changed bundle does not pass.
pub fn active_policy_with(
    engine: Option<Arc<dyn Engine>>,
    source: Source,
    created_unix_ms: u64,
    change: impl Fn(&mut Value),
) -> Result<ActivePolicy, BundleError> {
    let authority =
        Authority::new("test", 1).map_err(|error| BundleError::Compiler(error.to_string()))?;
    let mut files = template("template", "test", created_unix_ms)?;
    for (_, bytes) in files.iter_mut().filter(|(path, _)| path == MANIFEST) {
        let format = |error: serde_json::Error| BundleError::format(error.to_string());
        let mut manifest: Value = serde_json::from_slice(bytes).map_err(format)?;
        change(&mut manifest);
        *bytes = serde_json::to_vec(&manifest).map_err(format)?;
    }
    let builder = files
        .into_iter()
        .fold(BundleBuilder::new(), |builder, (path, bytes)| {
            builder.file(&path, bytes)
        });
    let bundle = authority.load(builder)?;
    let engine = engine.unwrap_or_else(|| bundle.engine());
    Ok(ActivePolicy::with_engine(bundle, source, engine))
}
