//! Property: whatever happens to the bytes of a signed bundle on their way, the loader neither
//! panics nor accepts them.
#![cfg(test)]

use std::sync::LazyLock;

use proptest::prelude::*;
use serde_json::{Map, Value};
use tidelock_policy::testing::{Authority, NODE_VERSION, template_builder};
use tidelock_policy::{
    Engine, LoadContext, Package, PolicyRequest, TrustFile, Verdict, VerifiedBundle, inspect,
};

const DOMAIN: &str = "site-1";

struct Fixture {
    authority: Authority,
    trust: TrustFile,
    context: LoadContext,
    package: Package,
    encoded: Vec<u8>,
}

static FIXTURE: LazyLock<Fixture> = LazyLock::new(|| {
    let authority = Authority::new(DOMAIN, 1).unwrap();
    let trust = TrustFile::parse(&authority.trust_toml(1)).unwrap();
    let context = LoadContext::new(DOMAIN, NODE_VERSION).unwrap();
    let archive = template_builder("base", DOMAIN, 0)
        .unwrap()
        .build()
        .unwrap();
    let package = authority.sign(archive, &[0]).unwrap();
    let encoded = package.encode().unwrap();
    Fixture {
        authority,
        trust,
        context,
        package,
        encoded,
    }
});

static BUNDLE: LazyLock<VerifiedBundle> = LazyLock::new(|| {
    let package = FIXTURE.package.clone();
    VerifiedBundle::load(package, &FIXTURE.trust, &FIXTURE.context).unwrap()
});

fn json_value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        ".{0,8}".prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 16, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::Array),
            prop::collection::vec((key(), inner), 0..4)
                .prop_map(|entries| Value::Object(entries.into_iter().collect())),
        ]
    })
}

fn key() -> impl Strategy<Value = String> {
    let known = [
        "path", "host", "branch", "program", "args", "force", "__entity", "__extn", "type", "id",
    ];
    prop_oneof![4 => prop::sample::select(known.to_vec()).prop_map(str::to_owned), 1 => ".{0,4}"]
}

fn object() -> impl Strategy<Value = Map<String, Value>> {
    prop::collection::vec((key(), json_value()), 0..4)
        .prop_map(|entries| entries.into_iter().collect())
}

#[derive(Debug, Clone)]
enum Mutation {
    Flip(usize, u8),
    Cut(usize),
    Insert(usize, Vec<u8>),
    Remove(usize, usize),
    Swap(usize, usize, usize),
}

impl Mutation {
    fn apply(&self, bytes: &[u8]) -> Vec<u8> {
        let mut bytes = bytes.to_vec();
        let at = |position: usize| position % bytes.len().max(1);
        match self {
            Self::Flip(position, mask) => {
                let position = at(*position);
                if let Some(byte) = bytes.get_mut(position) {
                    *byte ^= mask;
                }
            }
            Self::Cut(position) => bytes.truncate(at(*position)),
            Self::Insert(position, extra) => {
                let position = at(*position);
                bytes.splice(position..position, extra.iter().copied());
            }
            Self::Remove(position, len) => {
                let position = at(*position);
                let end = (position + len).min(bytes.len());
                bytes.drain(position..end);
            }
            Self::Swap(a, b, blocks) => {
                // Whole tar blocks: the kind of damage that leaves headers intact.
                let count = bytes.len() / 512;
                for offset in 0..(*blocks).min(count) {
                    let (a, b) = ((a + offset) % count.max(1), (b + offset) % count.max(1));
                    for byte in 0..512 {
                        bytes.swap(a * 512 + byte, b * 512 + byte);
                    }
                }
            }
        }
        bytes
    }
}

fn mutation() -> impl Strategy<Value = Mutation> {
    prop_oneof![
        (any::<usize>(), 1..=u8::MAX).prop_map(|(at, mask)| Mutation::Flip(at, mask)),
        any::<usize>().prop_map(Mutation::Cut),
        (any::<usize>(), prop::collection::vec(any::<u8>(), 1..600))
            .prop_map(|(at, extra)| Mutation::Insert(at, extra)),
        (any::<usize>(), 1..600_usize).prop_map(|(at, len)| Mutation::Remove(at, len)),
        (any::<u16>(), any::<u16>(), 1..4_usize).prop_map(|(a, b, n)| Mutation::Swap(
            a.into(),
            b.into(),
            n
        )),
    ]
}

fn mutate(bytes: &[u8], mutations: &[Mutation]) -> Vec<u8> {
    mutations
        .iter()
        .fold(bytes.to_vec(), |bytes, mutation| mutation.apply(&bytes))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..Default::default() })]

    #[test]
    fn a_mutated_package_never_verifies(mutations in prop::collection::vec(mutation(), 1..4)) {
        let fixture = &*FIXTURE;
        let bytes = mutate(&fixture.encoded, &mutations);
        prop_assume!(bytes != fixture.encoded);
        if let Ok(package) = Package::decode(&bytes) {
            // Nothing but the one encoding decodes.
            prop_assert_eq!(package.encode().unwrap(), bytes);
            if package.archive != fixture.package.archive {
                let loaded = VerifiedBundle::load(package, &fixture.trust, &fixture.context);
                prop_assert_eq!(loaded.unwrap_err().code(), "BUNDLE_SIGNATURE");
            }
        }
    }

    /// Behind the signature check: even an archive that somebody signed is read without a panic,
    /// and accepted only in its one form.
    #[test]
    fn a_mutated_archive_never_panics_the_reader(
        mutations in prop::collection::vec(mutation(), 1..4),
    ) {
        let fixture = &*FIXTURE;
        let archive = mutate(&fixture.package.archive, &mutations);
        prop_assume!(archive != fixture.package.archive);
        let package = fixture.authority.sign(archive, &[0]).unwrap();
        // Digests and form catch every change but one of the manifest that leaves it a manifest.
        if let Ok(seen) = inspect(&package) {
            let original = inspect(&fixture.package).unwrap();
            prop_assert_eq!(seen.manifest.files, original.manifest.files);
            prop_assert_ne!(seen.content_id, original.content_id);
        }
        let _ = VerifiedBundle::load(package, &fixture.trust, &fixture.context);
    }

    /// Whatever is asked, the engine answers, and says yes only where a policy does.
    #[test]
    fn random_requests_never_panic(
        (kind, resource) in (0..7_usize, 0..7_usize),
        id in ".{0,12}",
        action in prop::sample::select(vec!["fs.read", "repo.push", "process.exec", "tool.call", "x"]),
        attributes in object(),
        params in json_value(),
        context in json_value(),
    ) {
        let types = ["Agent", "File", "Repo", "Command", "Tool", "Action", ""];
        let evaluation = BUNDLE.evaluate(&PolicyRequest {
            principal_type: types[kind].to_owned(),
            principal_id: id.clone(),
            action: action.to_owned(),
            resource_type: types[resource].to_owned(),
            resource_id: id,
            resource_attributes: attributes,
            params,
            context,
        });
        let permitted = evaluation.verdict == Verdict::Permit;
        prop_assert!(!permitted || !evaluation.policies.is_empty());
        prop_assert_eq!(evaluation.verdict == Verdict::Error, !evaluation.errors.is_empty());
    }

    #[test]
    fn random_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..2048)) {
        prop_assert!(Package::decode(&bytes).is_err());
        let package = Package { archive: bytes, signatures: Vec::new() };
        prop_assert!(inspect(&package).is_err());
    }
}

/// The positive control of the properties above.
#[test]
fn the_unmutated_package_verifies() {
    let fixture = &*FIXTURE;
    let package = Package::decode(&fixture.encoded).unwrap();
    assert_eq!(package, fixture.package);
    assert!(VerifiedBundle::load(package, &fixture.trust, &fixture.context).is_ok());
}
