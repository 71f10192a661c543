//! The trust chain and freshness statements: what follows, what does not, what survives a restart.
#![cfg(test)]

use std::sync::Arc;

use serde_json::{Value, json};
use tidelock_policy::testing::{Authority, MemorySlots, NODE_VERSION, template_builder};
use tidelock_policy::{
    Extended, Freshness, HintedSignature, LoadContext, NewestTrust, PolicyRequest, Posture, Role,
    SignedDocument, SlotStorage, Slots, StatementError, TrustChain, TrustFile, Verdict,
    VerifiedBundle,
};

const CREATED: u64 = 1_769_860_800_000;
const DAY: u64 = 24 * 3600 * 1000;
const DOMAIN: &str = "site-1";
const BOTH: &[Role] = &[Role::Policy, Role::Trust];

/// Four keys; which of them hold is for each test to say.
struct Keys(Authority);

impl Keys {
    fn new() -> Self {
        Self(Authority::new(DOMAIN, 4).unwrap())
    }

    /// A trust file in which these keys hold both roles, `threshold` of them needed for `trust`.
    fn file(&self, keys: &[usize], threshold: usize) -> TrustFile {
        let roles: Vec<&[Role]> = (0..4)
            .map(|number| if keys.contains(&number) { BOTH } else { &[] })
            .collect();
        let text = self
            .0
            .roles_toml(&[(Role::Policy, 1), (Role::Trust, threshold)], &roles);
        TrustFile::parse(&text).unwrap()
    }

    fn sign(&self, document: Vec<u8>, keys: &[usize]) -> SignedDocument {
        let signatures = self.0.signatures(&document, keys).unwrap();
        SignedDocument {
            signatures: signatures
                .into_iter()
                .zip(keys)
                .map(|(der, number)| HintedSignature {
                    der,
                    key_hint: Some(format!("key-{number}")),
                })
                .collect(),
            document,
        }
    }

    /// The version after `before`, held by `keys`, signed by `by`.
    fn next(&self, before: &TrustChain, keys: &[usize], by: &[usize]) -> SignedDocument {
        let at = CREATED + before.current().version() * DAY;
        let id = before.current_id().clone();
        let next = self.file(keys, 2).following(before.current(), id, at);
        self.sign(next.document().unwrap(), by)
    }
}

fn chain(root: TrustFile) -> TrustChain {
    TrustChain::new(root).unwrap()
}

#[test]
fn keys_are_replaced_by_documents_that_old_and_new_keys_sign() {
    let keys = Keys::new();
    let mut ours = chain(keys.file(&[0, 1], 2));
    let second = keys.next(&ours, &[1, 2], &[0, 1, 2]);
    assert_eq!(ours.extend(second.clone()), Ok(Extended::Forward));
    assert_eq!(ours.current().version(), 2);
    assert_eq!(ours.extend(second.clone()), Ok(Extended::Known));
    let third = keys.next(&ours, &[2, 3], &[1, 2, 3]);
    assert_eq!(ours.extend(third.clone()), Ok(Extended::Forward));
    assert_eq!(
        ours.current().key_ids().collect::<Vec<_>>(),
        ["key-2", "key-3"]
    );

    // A node that was dark over both walks from one to the next, and cannot leap.
    let mut dark = chain(keys.file(&[0, 1], 2));
    assert_eq!(
        dark.extend(third.clone()),
        Err(StatementError::Gap {
            current: 1,
            offered: 3
        })
    );
    dark.extend(second).unwrap();
    dark.extend(third).unwrap();
    assert_eq!(dark.current_id(), ours.current_id());

    // What holds for bundles follows: a key that was replaced signs nothing any more.
    let load = |trust: &TrustFile, key: usize| {
        let archive = template_builder("base", DOMAIN, CREATED).unwrap();
        let package = keys.0.sign(archive.build().unwrap(), &[key]).unwrap();
        let context = LoadContext::new(DOMAIN, NODE_VERSION).unwrap();
        VerifiedBundle::load(package, trust, &context).map(|bundle| bundle.signers().to_vec())
    };
    assert_eq!(load(ours.current(), 3).unwrap(), ["key-3"]);
    assert_eq!(
        load(ours.current(), 0).unwrap_err().code(),
        "BUNDLE_SIGNATURE"
    );
}

#[test]
fn a_document_that_does_not_follow_is_refused() {
    let keys = Keys::new();
    let ours = chain(keys.file(&[0, 1], 2));
    let code = |signed: SignedDocument| {
        let mut tried = ours.clone();
        let code = tried.extend(signed).map_err(|error| error.code());
        assert_eq!(tried.current_id() == ours.current_id(), code.is_err());
        code
    };
    assert_eq!(
        code(keys.next(&ours, &[1, 2], &[0, 1, 2])),
        Ok(Extended::Forward)
    );
    // Old keys alone, new keys alone, one old key twice, strangers.
    for by in [&[0, 1][..], &[1, 2], &[2, 3], &[0, 0, 2], &[]] {
        assert_eq!(
            code(keys.next(&ours, &[1, 2], by)),
            Err("STATEMENT_SIGNATURE"),
            "{by:?}"
        );
    }
    // Another beginning, another domain, no role to go on with, a time before.
    let other = chain(keys.file(&[0, 1, 3], 2));
    assert_eq!(
        code(keys.next(&other, &[1, 2], &[0, 1, 2])),
        Err("TRUST_CHAIN")
    );
    let change = |from: &str, to: &str| {
        let next = keys.next(&ours, &[1, 2], &[]);
        let text = String::from_utf8(next.document).unwrap();
        assert!(text.contains(from), "{text}");
        keys.sign(text.replace(from, to).into_bytes(), &[0, 1, 2])
    };
    assert_eq!(
        code(change("\"site-1\"", "\"site-2\"")),
        Err("STATEMENT_DOMAIN")
    );
    assert_eq!(
        code(change("\"version\": 2", "\"version\": 4")),
        Err("TRUST_GAP")
    );
    assert_eq!(
        code(change("\"version\": 2", "\"version\": 1")),
        Err("TRUST_CONFLICT")
    );
    assert_eq!(
        code(change("\"version\": 2", "\"version\": 2 ")),
        Err("STATEMENT_FORMAT")
    );
    let next = keys
        .file(&[1, 2], 2)
        .following(ours.current(), ours.current_id().clone(), CREATED);
    let endless = TrustFile::parse(
        &next
            .to_toml()
            .unwrap()
            .replace("trust = 2\n", "")
            .replace(", \"trust\"", ""),
    )
    .unwrap();
    assert_eq!(
        code(keys.sign(endless.document().unwrap(), &[0, 1, 2])),
        Err("STATEMENT_FORMAT")
    );
    // INV-16: after a rotation neither the version before nor another of the same number.
    let mut ours = ours;
    let rival = keys.next(&ours, &[1, 3], &[0, 1, 3]);
    ours.extend(keys.next(&ours, &[1, 2], &[0, 1, 2])).unwrap();
    assert_eq!(ours.extend(rival).unwrap_err().code(), "TRUST_CONFLICT");
    // A peer that makes one up raises no such alarm.
    let junk = keys.next(&chain(keys.file(&[0, 1], 2)), &[1, 3], &[2, 3]);
    assert_eq!(ours.extend(junk).unwrap_err().code(), "STATEMENT_SIGNATURE");
    // A file of the first format has no role that could replace it.
    let first = TrustFile::parse(&keys.0.trust_toml(1)).unwrap();
    let mut first = chain(first);
    let next = keys.next(&first, &[1, 2], &[0, 1, 2]);
    assert_eq!(
        first.extend(next),
        Err(StatementError::Signature {
            role: Role::Trust,
            valid: 0,
            needed: None
        })
    );
}

#[test]
fn a_kept_chain_is_walked_again_and_held_against_the_configured_file() {
    let keys = Keys::new();
    let root = || keys.file(&[0, 1], 2);
    let mut ours = chain(root());
    ours.extend(keys.next(&ours, &[1, 2], &[0, 1, 2])).unwrap();
    let kept = ours.encode().unwrap();
    let again = TrustChain::decode(&kept).unwrap();
    assert_eq!(again.current_id(), ours.current_id());
    assert_eq!(again.links().count(), 1);
    let mut flipped = kept.clone();
    flipped[40] ^= 1;
    assert_eq!(
        TrustChain::decode(&flipped).unwrap_err().code(),
        "TRUST_DAMAGED"
    );

    // The file that it began with, and the current document as a file, change nothing.
    assert_eq!(
        again.clone().reconcile(root()).unwrap().current_id(),
        ours.current_id()
    );
    let current = TrustFile::parse(&ours.current().to_toml().unwrap()).unwrap();
    assert_eq!(
        again.clone().reconcile(current).unwrap().current_id(),
        ours.current_id()
    );
    // Another file contradicts it; one of a higher version begins anew.
    let other = || keys.file(&[2, 3], 1);
    let error = again.clone().reconcile(other()).unwrap_err();
    assert_eq!(error.code(), "TRUST_CONTRADICTION");
    let higher = other()
        .to_toml()
        .unwrap()
        .replace("version = 1", "version = 3");
    let higher = TrustFile::parse(&higher).unwrap();
    assert_eq!(again.reconcile(higher).unwrap().current().version(), 3);
    // Without any rotation the operator's file is the operator's to change.
    assert!(chain(root()).reconcile(other()).is_ok());
}

struct Node {
    keys: Keys,
    trust: TrustFile,
    storage: Arc<MemorySlots>,
}

impl Node {
    fn new() -> Self {
        let keys = Keys::new();
        let trust = keys.file(&[0, 1], 1);
        Self {
            keys,
            trust,
            storage: MemorySlots::new(),
        }
    }

    fn open(&self) -> Slots {
        let storage = Arc::clone(&self.storage) as Arc<dyn SlotStorage>;
        let context = LoadContext::new(DOMAIN, NODE_VERSION).unwrap();
        Slots::open(storage, &self.trust, &context).0
    }

    fn bundle(&self, name: &str, epoch: u64) -> VerifiedBundle {
        let archive = template_builder(name, DOMAIN, CREATED)
            .unwrap()
            .epoch(epoch)
            .build()
            .unwrap();
        let package = self.keys.0.sign(archive, &[0]).unwrap();
        let context = LoadContext::new(DOMAIN, NODE_VERSION).unwrap();
        VerifiedBundle::load(package, &self.trust, &context).unwrap()
    }

    /// A statement that this bundle is in force at this time, signed by these keys.
    fn fresh(&self, bundle: &VerifiedBundle, at: u64, by: &[usize]) -> SignedDocument {
        let freshness = Freshness {
            domain: DOMAIN.to_owned(),
            bundle: bundle.manifest().name.clone(),
            epoch: bundle.epoch(),
            content_id: bundle.content_id().clone(),
            issued_unix_ms: at,
        };
        self.keys.sign(freshness.document().unwrap(), by)
    }
}

#[test]
fn ruling_15_only_the_authority_makes_a_policy_younger() {
    let node = Node::new();
    let slots = node.open();
    let bundle = node.bundle("base", 3);
    let at = |days: u64| CREATED + days * DAY;
    let posture = |slots: &Slots, days| slots.current().unwrap().posture("fs.read", at(days));
    let statement = node.fresh(&bundle, at(20), &[0]);
    slots.activate(bundle).unwrap();
    // The template: stale after 7 days, restricted after 30, closed after 180.
    assert_eq!(posture(&slots, 8), Posture::Stale);
    assert_eq!(posture(&slots, 31), Posture::Restricted);
    slots.confirm(&statement, &node.trust).unwrap();
    assert_eq!(posture(&slots, 26), Posture::Normal);
    assert_eq!(posture(&slots, 31), Posture::Stale);
    assert_eq!(slots.current().unwrap().age_s(at(21)), DAY / 1000);
    // Neither a restart nor the same bundle again resets it or loses it.
    for slots in [node.open(), slots] {
        assert_eq!(posture(&slots, 31), Posture::Stale);
        slots.activate(node.bundle("base", 3)).unwrap();
        assert_eq!(posture(&slots, 31), Posture::Stale);
        assert_eq!(posture(&slots, 50), Posture::Restricted);
        assert_eq!(slots.freshness().unwrap().issued_unix_ms, at(20));
    }
}

#[test]
fn policies_see_posture_and_age_and_callers_cannot_forge_them() {
    let node = Node::new();
    let schema = "entity Agent; entity File;\n\
        action \"fs.read\" appliesTo { principal: [Agent], resource: [File],\n\
        context: { tidelock: { posture: String, policy_age_s: Long } } };\n\
        action \"fs.write\" appliesTo { principal: [Agent], resource: [File] };";
    let policy = "permit (principal, action == Action::\"fs.read\", resource)\n\
        when { context.tidelock.policy_age_s < 3600 && context.tidelock.posture == \"normal\" };\n\
        permit (principal, action == Action::\"fs.write\", resource);";
    let archive = template_builder("base", DOMAIN, CREATED)
        .unwrap()
        .file("schema.cedarschema", schema.into())
        .file("policies/base.cedar", policy.into())
        .file("tests/base.json", b"[]".to_vec())
        .build()
        .unwrap();
    let package = node.keys.0.sign(archive, &[0]).unwrap();
    let context = LoadContext::new(DOMAIN, NODE_VERSION).unwrap();
    let slots = node.open();
    slots
        .activate(VerifiedBundle::load(package, &node.trust, &context).unwrap())
        .unwrap();
    let policy = slots.current().unwrap();
    let judge = |action: &str, posture: Posture, age_s: u64, context: Value| {
        let mut request = PolicyRequest {
            principal_type: "Agent".into(),
            principal_id: "a".into(),
            action: action.into(),
            resource_type: "File".into(),
            resource_id: "/srv/a".into(),
            resource_attributes: serde_json::Map::new(),
            params: Value::Null,
            context,
        };
        policy
            .describe_node(&mut request, posture, CREATED + age_s * 1000)
            .map(|()| policy.engine().evaluate(&request).verdict)
    };
    for context in [Value::Null, json!({})] {
        assert_eq!(
            judge("fs.read", Posture::Normal, 3_599, context),
            Ok(Verdict::Permit)
        );
    }
    assert_eq!(
        judge("fs.read", Posture::Normal, 3_600, json!({})),
        Ok(Verdict::NoMatch)
    );
    assert_eq!(
        judge("fs.read", Posture::Stale, 0, json!({})),
        Ok(Verdict::NoMatch)
    );
    // Where the schema does not declare it nothing is added, so nothing is a mismatch.
    assert_eq!(
        judge("fs.write", Posture::Stale, 0, json!({})),
        Ok(Verdict::Permit)
    );
    let forged = json!({"tidelock": {"posture": "normal", "policy_age_s": 0}});
    for action in ["fs.read", "fs.write"] {
        let error = judge(action, Posture::Stale, 9_999, forged.clone()).unwrap_err();
        assert!(error.starts_with("REQUEST_MISMATCH: "), "{error}");
    }
}

#[test]
fn freeze_an_old_or_foreign_statement_makes_nothing_younger() {
    let node = Node::new();
    let slots = node.open();
    let bundle = node.bundle("base", 3);
    let at = |days: u64| CREATED + days * DAY;
    let code = |signed: &SignedDocument| {
        slots
            .confirm(signed, &node.trust)
            .map(|fresh| fresh.issued_unix_ms)
            .map_err(|error| error.code())
    };
    let good = node.fresh(&bundle, at(20), &[0]);
    assert_eq!(code(&good), Err("FRESHNESS_OTHER_BUNDLE"), "no bundle yet");
    let replayed = node.fresh(&bundle, at(10), &[0]);
    let unsigned = node.fresh(&bundle, at(25), &[]);
    let by_stranger = node.fresh(&bundle, at(25), &[2]);
    let newer = node.fresh(&bundle, at(25), &[1]);
    // Mix and match: another epoch, another name, other content of the same name and epoch.
    let others = [
        node.fresh(&node.bundle("base", 4), at(25), &[0]),
        node.fresh(&node.bundle("other", 3), at(25), &[0]),
        node.keys.sign(
            String::from_utf8(newer.document.clone())
                .unwrap()
                .replace(
                    bundle.content_id().as_str(),
                    node.bundle("base", 4).content_id().as_str(),
                )
                .into_bytes(),
            &[0],
        ),
    ];
    slots.activate(bundle).unwrap();
    assert_eq!(code(&good), Ok(at(20)));
    assert_eq!(code(&good), Ok(at(20)), "the same again");
    assert_eq!(code(&replayed), Err("FRESHNESS_OLDER"));
    assert_eq!(code(&unsigned), Err("STATEMENT_SIGNATURE"));
    assert_eq!(code(&by_stranger), Err("STATEMENT_SIGNATURE"));
    for other in &others {
        assert_eq!(code(other), Err("FRESHNESS_OTHER_BUNDLE"));
    }
    // The signatures of one statement under the time of another.
    let swapped = SignedDocument {
        document: newer.document.clone(),
        signatures: good.signatures,
    };
    assert_eq!(code(&swapped), Err("STATEMENT_SIGNATURE"));
    let audience = String::from_utf8(newer.document.clone())
        .unwrap()
        .replace(DOMAIN, "site-2");
    let audience = node.keys.sign(audience.into_bytes(), &[0]);
    assert_eq!(code(&audience), Err("STATEMENT_DOMAIN"));
    assert_eq!(slots.freshness().unwrap().issued_unix_ms, at(20));
    assert_eq!(code(&newer), Ok(at(25)));
    // A bundle of a higher epoch is not confirmed by what was said of the one before.
    slots.activate(node.bundle("base", 4)).unwrap();
    assert_eq!(slots.freshness(), None);
    assert_eq!(slots.current().unwrap().confirmed_unix_ms(), CREATED);
}

#[test]
fn a_statement_that_is_damaged_on_disk_makes_the_policy_older_again() {
    let node = Node::new();
    let slots = node.open();
    let bundle = node.bundle("base", 1);
    let statement = node.fresh(&bundle, CREATED + 20 * DAY, &[0]);
    slots.activate(bundle).unwrap();
    node.storage.fail("freshness", true);
    assert_eq!(
        slots.confirm(&statement, &node.trust).unwrap_err().code(),
        "STATEMENT_STORAGE"
    );
    assert_eq!(slots.current().unwrap().confirmed_unix_ms(), CREATED);
    node.storage.fail("freshness", false);
    slots.confirm(&statement, &node.trust).unwrap();
    node.storage.damage("freshness");
    let storage = Arc::clone(&node.storage) as Arc<dyn SlotStorage>;
    let context = LoadContext::new(DOMAIN, NODE_VERSION).unwrap();
    let (slots, faults) = Slots::open(storage, &node.trust, &context);
    assert_eq!(faults.len(), 1);
    assert_eq!(faults[0].slot, "freshness");
    assert_eq!(slots.current().unwrap().confirmed_unix_ms(), CREATED);
}

/// A chain whose file was damaged was made again from the segment store. Where that had lost the newest
/// document, the node went back to the keys that it had replaced, and nobody was told.
#[test]
fn inv_16_a_chain_that_is_made_again_without_its_newest_document_is_known_to_lack_it() {
    let keys = Keys::new();
    let first = chain(keys.file(&[0, 1], 2));
    let mut whole = first.clone();
    let second = keys.next(&whole, &[1, 2], &[0, 1, 2]);
    whole.extend(second.clone()).unwrap();
    let third = keys.next(&whole, &[2, 3], &[1, 2, 3]);
    whole.extend(third.clone()).unwrap();
    let newest = whole.newest();
    assert_eq!(newest.version, 3);
    assert_eq!(
        NewestTrust::decode(&newest.encode().unwrap()).as_ref(),
        Ok(&newest)
    );
    let mut flipped = newest.encode().unwrap();
    let digit = flipped.iter().rposition(|byte| *byte == b'3').unwrap();
    flipped[digit] = b'2';
    assert!(NewestTrust::decode(&flipped).is_err());

    let mut again = first;
    assert_eq!(again.lacks(&newest), Ok(true));
    again.extend(second).unwrap();
    assert_eq!(again.lacks(&newest), Ok(true));
    // A document of the same version that is another one does not make up for it.
    let mut forked = again.clone();
    let rival = keys.next(&forked, &[0, 2], &[0, 1, 2]);
    forked.extend(rival).unwrap();
    assert_eq!(forked.lacks(&newest).unwrap_err().code(), "TRUST_CONFLICT");
    // The controls: the very document, and an operator's beginning beyond it.
    again.extend(third).unwrap();
    assert_eq!(again.lacks(&newest), Ok(false));
    let beyond = keys.file(&[0, 1], 2);
    let beyond = (1..5).fold(beyond, |file, _| {
        let id = file.id().unwrap();
        keys.file(&[0, 1], 2).following(&file, id, CREATED)
    });
    assert_eq!(chain(beyond).lacks(&newest), Ok(false));
}
