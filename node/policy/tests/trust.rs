//! Trust by role: who may sign what, and every way around it. Each refusal stands beside its control.
#![cfg(test)]

use std::sync::Arc;

use serde_json::{Value, json};
use tidelock_policy::testing::{Authority, MemorySlots, NODE_VERSION, template_builder};
use tidelock_policy::{
    ActivateError, ActivationRules, AsideCause, BlockOn, BundleBuilder, BundleError, LoadContext,
    Package, Posture, Role, SlotStorage, Slots, TrustFile, VerifiedBundle, template,
};

const CREATED: u64 = 1_769_860_800_000;
const HOUR: u64 = 3600 * 1000;
const DOMAIN: &str = "site-1";

/// Five keys: two for policy (both needed), two for emergencies (one is enough), one for releases.
struct Site {
    authority: Authority,
    trust: TrustFile,
}

impl Site {
    fn new() -> Self {
        let authority = Authority::new(DOMAIN, 5).unwrap();
        let text = authority.roles_toml(
            &[(Role::Policy, 2), (Role::BreakGlass, 1), (Role::Release, 1)],
            &[
                &[Role::Policy],
                &[Role::Policy],
                &[Role::BreakGlass],
                &[Role::BreakGlass],
                &[Role::Release],
            ],
        );
        let trust = TrustFile::parse(&text).unwrap();
        Self { authority, trust }
    }

    fn sign(&self, archive: Vec<u8>, keys: &[usize]) -> Package {
        self.authority.sign(archive, keys).unwrap()
    }

    fn load(&self, package: Package) -> Result<VerifiedBundle, BundleError> {
        load(package, &self.trust)
    }

    fn built(&self, builder: BundleBuilder, keys: &[usize]) -> Result<VerifiedBundle, BundleError> {
        self.load(self.sign(builder.build().unwrap(), keys))
    }

    fn slots(&self) -> Slots {
        let storage = MemorySlots::new() as Arc<dyn SlotStorage>;
        let context = LoadContext::new(DOMAIN, NODE_VERSION).unwrap();
        let (slots, faults) = Slots::open(storage, &self.trust, &context);
        assert_eq!(faults, []);
        slots
    }
}

fn load(package: Package, trust: &TrustFile) -> Result<VerifiedBundle, BundleError> {
    VerifiedBundle::load(
        package,
        trust,
        &LoadContext::new(DOMAIN, NODE_VERSION).unwrap(),
    )
}

fn base(epoch: u64) -> BundleBuilder {
    template_builder("base", DOMAIN, CREATED)
        .unwrap()
        .epoch(epoch)
}

/// The template with further members in its manifest.
fn with(epoch: u64, members: &Value) -> BundleBuilder {
    let files = template("base", DOMAIN, CREATED).unwrap();
    let mut manifest: Value = serde_json::from_slice(&files[0].1).unwrap();
    for (key, value) in members.as_object().unwrap() {
        manifest[key] = value.clone();
    }
    base(epoch)
        .file("manifest.json", manifest.to_string().into_bytes())
        .epoch(epoch)
}

fn glass(epoch: u64) -> BundleBuilder {
    with(
        epoch,
        &json!({"role": "break-glass", "expires_at": "2026-01-31T18:00:00Z"}),
    )
}

fn code(loaded: Result<VerifiedBundle, BundleError>) -> &'static str {
    loaded.unwrap_err().code()
}

#[test]
fn wrong_role_a_bundle_needs_keys_of_the_role_that_it_states() {
    let site = Site::new();
    // The controls: each kind by its own keys.
    assert_eq!(
        site.built(base(1), &[0, 1]).unwrap().signers(),
        ["key-0", "key-1"]
    );
    assert_eq!(site.built(glass(1), &[2]).unwrap().signers(), ["key-2"]);
    // A key of another role adds nothing and harms nothing.
    assert_eq!(
        site.built(base(1), &[0, 1, 2, 4]).unwrap().signers(),
        ["key-0", "key-1"]
    );
    // An emergency key makes no ordinary bundle, nor do ordinary keys make an emergency one.
    assert_eq!(code(site.built(base(1), &[2, 3])), "BUNDLE_ROLE");
    assert_eq!(
        site.built(glass(1), &[0, 1]).unwrap_err(),
        BundleError::Role {
            stated: Role::BreakGlass,
            valid: 0,
            needed: Some(1)
        }
    );
    assert_eq!(
        site.built(base(1), &[0, 2]).unwrap_err(),
        BundleError::Role {
            stated: Role::Policy,
            valid: 1,
            needed: Some(2)
        }
    );
    // A key for releases signs no policy at all: nothing of the archive is read.
    assert_eq!(code(site.built(base(1), &[4])), "BUNDLE_SIGNATURE");
    // Nor does a file of the first format make its keys more than policy keys.
    let first = TrustFile::parse(&site.authority.trust_toml(1)).unwrap();
    let package = |builder: BundleBuilder| site.sign(builder.build().unwrap(), &[2]);
    assert!(load(package(base(1)), &first).is_ok());
    assert_eq!(code(load(package(glass(1)), &first)), "BUNDLE_ROLE");
    for role in [Role::BreakGlass, Role::Release, Role::Trust] {
        let signatures = site.authority.signatures(b"x", &[0, 1, 2, 3, 4]).unwrap();
        assert!(!first.quorum(role, b"x", &signatures, None).is_reached());
    }
}

#[test]
fn signatures_that_count_are_told_from_those_that_do_not() {
    let site = Site::new();
    let archive = base(1).build().unwrap();
    let strangers = Authority::new("harbour", 2).unwrap();
    let junk = strangers.signatures(&archive, &[0, 1]).unwrap();
    let mut package = site.sign(archive.clone(), &[0, 3]);
    let good = package.signatures.clone();
    package.signatures.extend(junk);
    // One key, however many signatures it made.
    package
        .signatures
        .extend(site.sign(archive, &[0]).signatures);
    let counted = site.trust.signatures_of(&package);
    assert_eq!(counted.keys().collect::<Vec<_>>(), ["key-0", "key-3"]);
    assert!(good.contains(&counted["key-3"]));
}

#[test]
fn duplicate_signer_one_key_counts_once_in_each_role() {
    let site = Site::new();
    assert!(site.built(base(1), &[0, 1]).is_ok());
    assert_eq!(
        site.built(base(1), &[0, 0, 0]).unwrap_err(),
        BundleError::Signature {
            valid: 1,
            needed: 2,
            unknown: 0
        }
    );
    // One key with two roles is still one key in each.
    let authority = Authority::new(DOMAIN, 2).unwrap();
    let text = authority.roles_toml(
        &[(Role::Policy, 2), (Role::BreakGlass, 2)],
        &[
            &[Role::Policy, Role::BreakGlass],
            &[Role::Policy, Role::BreakGlass],
        ],
    );
    let trust = TrustFile::parse(&text).unwrap();
    let archive = base(1).build().unwrap();
    let by = |keys: &[usize]| load(authority.sign(archive.clone(), keys).unwrap(), &trust);
    assert!(by(&[0, 1]).is_ok());
    assert_eq!(code(by(&[0, 0])), "BUNDLE_SIGNATURE");
}

#[test]
fn wrong_audience_a_bundle_of_another_domain_is_refused_whoever_signed() {
    let site = Site::new();
    assert!(site.built(base(1), &[0, 1]).is_ok());
    assert_eq!(
        code(site.built(base(1).domain("site-2"), &[0, 1])),
        "BUNDLE_DOMAIN"
    );
    // The same keys in a trust file of another domain: not this node's.
    let text = site.authority.trust_toml(1).replace(DOMAIN, "site-2");
    let other = TrustFile::parse(&text).unwrap();
    let package = site.sign(base(1).build().unwrap(), &[0]);
    assert_eq!(code(load(package, &other)), "BUNDLE_DOMAIN");
}

#[test]
fn mix_and_match_signatures_hold_for_their_own_bytes_only() {
    let site = Site::new();
    let (one, two) = (base(1).build().unwrap(), base(2).build().unwrap());
    let signed_one = site.sign(one.clone(), &[0, 1]);
    let signed_two = site.sign(two.clone(), &[0, 1]);
    assert!(site.load(signed_one.clone()).is_ok());
    assert!(site.load(signed_two.clone()).is_ok());
    // The newer archive under the older one's signatures.
    let swapped = Package {
        archive: two.clone(),
        signatures: signed_one.signatures.clone(),
    };
    assert_eq!(
        site.load(swapped).unwrap_err(),
        BundleError::Signature {
            valid: 0,
            needed: 2,
            unknown: 2
        }
    );
    // One signature over each of two archives is no quorum for either.
    for archive in [one, two] {
        let halves = Package {
            archive,
            signatures: vec![
                signed_one.signatures[0].clone(),
                signed_two.signatures[1].clone(),
            ],
        };
        assert_eq!(code(site.load(halves)), "BUNDLE_SIGNATURE");
    }
}

#[test]
fn rollback_no_role_lowers_the_floor() {
    let site = Site::new();
    let slots = site.slots();
    slots
        .activate(site.built(base(5), &[0, 1]).unwrap())
        .unwrap();
    for older in [
        site.built(base(4), &[0, 1]).unwrap(),
        site.built(glass(4), &[2]).unwrap(),
    ] {
        let refused = slots.activate(older).unwrap_err();
        assert!(matches!(
            refused,
            ActivateError::Refused(BundleError::Epoch {
                floor: 5,
                offered: 4
            })
        ));
    }
    // Other content of the same epoch is no way around it, nor is another name.
    assert_eq!(
        slots
            .activate(site.built(glass(5), &[2]).unwrap())
            .unwrap_err()
            .code(),
        "BUNDLE_CONFLICT"
    );
    let other_name = with(4, &json!({"name": "other"}));
    assert_eq!(
        slots
            .activate(site.built(other_name, &[0, 1]).unwrap())
            .unwrap_err()
            .code(),
        "BUNDLE_EPOCH"
    );
    // An emergency moves it forward like any other bundle, and what follows must be above it.
    slots.activate(site.built(glass(6), &[2]).unwrap()).unwrap();
    assert_eq!(slots.floor().unwrap().epoch, 6);
    assert!(
        slots
            .activate(site.built(base(5), &[0, 1]).unwrap())
            .is_err()
    );
    assert!(
        slots
            .activate(site.built(base(7), &[0, 1]).unwrap())
            .is_ok()
    );
}

#[test]
fn break_glass_shows_in_the_posture_and_ends_closed() {
    let site = Site::new();
    let slots = site.slots();
    slots.activate(site.built(glass(1), &[3]).unwrap()).unwrap();
    let at = |now: u64| slots.current().unwrap().posture("fs.read", now);
    // 2026-01-31T18:00:00Z is six hours after its making.
    assert_eq!(at(CREATED), Posture::Stale);
    assert_eq!(at(CREATED + 6 * HOUR - 1), Posture::Stale);
    assert_eq!(at(CREATED + 6 * HOUR), Posture::Closed);
    assert_eq!(
        slots.current().unwrap().overall_posture(CREATED + 6 * HOUR),
        Posture::Closed
    );
    // The control: the same bundle without the role.
    slots
        .activate(site.built(base(2), &[0, 1]).unwrap())
        .unwrap();
    assert_eq!(
        slots.current().unwrap().posture("fs.read", CREATED + HOUR),
        Posture::Normal
    );
}

/// An emergency that is over does not come back, and forbids nothing for ever.
#[test]
fn an_emergency_leaves_nothing_behind() {
    let site = Site::new();
    let storage = MemorySlots::new();
    let open = || {
        let context = LoadContext::new(DOMAIN, NODE_VERSION).unwrap();
        Slots::open(
            Arc::clone(&storage) as Arc<dyn SlotStorage>,
            &site.trust,
            &context,
        )
        .0
    };
    let slots = open();
    let kept = || {
        Package::decode(&storage.get("lkg").unwrap())
            .unwrap()
            .content_id()
    };
    let first = site.built(base(1), &[0, 1]).unwrap();
    let first_id = first.content_id().clone();
    slots.activate(first).unwrap();
    slots.settle().unwrap();
    slots
        .activate(site.built(glass(2).min_fallback_epoch(2), &[2]).unwrap())
        .unwrap();
    assert_eq!(kept(), first_id);
    assert_eq!(slots.floor().unwrap().min_fallback_epoch, 0);
    let third = site.built(base(3), &[0, 1]).unwrap();
    let third_id = third.content_id().clone();
    slots.activate(third).unwrap();
    assert_eq!(kept(), first_id, "not the emergency");
    storage.damage("active");
    let serving = open().current().unwrap();
    assert_eq!(serving.bundle().content_id(), &first_id);
    // The control: any other bundle is kept, and may forbid its forerunners.
    let slots = {
        let slots = open();
        slots
            .activate(site.built(base(3), &[0, 1]).unwrap())
            .unwrap();
        slots.settle().unwrap();
        slots
    };
    slots
        .activate(site.built(base(4).min_fallback_epoch(3), &[0, 1]).unwrap())
        .unwrap();
    assert_eq!(kept(), third_id);
    assert_eq!(slots.floor().unwrap().min_fallback_epoch, 3);
}

#[test]
fn a_bundle_decides_within_its_own_time_only() {
    let site = Site::new();
    let slots = site.slots();
    let window = json!({
        "not_before": "2026-01-31T13:00:00Z", "expires_at": "2026-01-31T14:00:00Z",
        "when_expired": "restrict",
    });
    // Loading asks no clock (INV-06).
    let bundle = site.built(with(1, &window), &[0, 1]).unwrap();
    let validity = bundle.manifest().validity;
    assert_eq!(
        validity.check_now(CREATED).unwrap_err().code(),
        "BUNDLE_NOT_YET"
    );
    assert_eq!(validity.check_now(CREATED + HOUR), Ok(()));
    assert_eq!(
        validity.check_now(CREATED + 2 * HOUR).unwrap_err().code(),
        "BUNDLE_EXPIRED"
    );
    slots.activate(bundle).unwrap();
    let policy = slots.current().unwrap();
    for (now, posture) in [
        (CREATED, Posture::Closed),
        (CREATED + HOUR, Posture::Normal),
        (CREATED + 2 * HOUR, Posture::Restricted),
    ] {
        assert_eq!(policy.posture("fs.read", now), posture);
        assert_eq!(policy.posture("shell.exec", now), posture);
    }
}

#[test]
fn keys_sign_what_says_that_it_was_made_in_their_time() {
    let authority = Authority::new(DOMAIN, 1).unwrap();
    let text = authority.roles_toml(&[(Role::Policy, 1)], &[&[Role::Policy]]);
    let window = |from: &str, to: &str| {
        let times = format!("not_before = \"{from}\"\nnot_after = \"{to}\"\npublic_key_pem");
        TrustFile::parse(&text.replace("public_key_pem", &times))
    };
    let package = authority.sign(base(1).build().unwrap(), &[0]).unwrap();
    let by = |from: &str, to: &str| load(package.clone(), &window(from, to).unwrap());
    assert!(by("2026-01-31T12:00:00Z", "2026-01-31T12:00:00Z").is_ok());
    assert_eq!(
        code(by("2026-01-31T12:00:01Z", "2027-01-01T00:00:00Z")),
        "BUNDLE_KEY_TIME"
    );
    assert_eq!(
        code(by("2025-01-01T00:00:00Z", "2026-01-31T11:59:59Z")),
        "BUNDLE_KEY_TIME"
    );
    let error = window("2027-01-01T00:00:00Z", "2026-01-01T00:00:00Z").unwrap_err();
    assert!(
        error.problems[0].contains("ends before it begins"),
        "{error}"
    );
}

#[test]
fn every_mistake_in_roles_is_reported() {
    let authority = Authority::new(DOMAIN, 2).unwrap();
    let good = authority.roles_toml(
        &[(Role::Policy, 2), (Role::Trust, 1)],
        &[&[Role::Policy, Role::Trust], &[Role::Policy]],
    );
    let trust = TrustFile::parse(&good).unwrap();
    assert_eq!((trust.threshold(), trust.version()), (2, 1));
    assert_eq!(trust.threshold_of(Role::Release), None);
    for (from, to, word) in [
        ("policy = 2", "policy = 3", "number of its keys, 2"),
        ("policy = 2", "policy = 0", "number of its keys, 2"),
        ("policy = 2\n", "", "no threshold for role `policy`"),
        (
            "trust = 1\n",
            "",
            "has role `trust`, which has no threshold",
        ),
        ("trust = 1", "release = 1", "number of its keys, 0"),
        ("trust = 1", "root = 1", "unknown key `root`"),
        ("trust = 1", "trust = \"1\"", "must be an integer"),
        ("[\"policy\"]", "[]", "has no role"),
        ("[\"policy\"]", "[\"root\"]", "roles must be a list of"),
        ("[\"policy\"]", "\"policy\"", "roles must be a list of"),
        ("roles = [\"policy\"]\n", "", "`roles` is missing"),
        (
            "[thresholds]",
            "threshold = 1\n[thresholds]",
            "unknown key `threshold`",
        ),
        ("format = 2", "format = 2\nversion = 0", "version must be"),
        ("format = 2", "format = 2\nversion = -1", "version must be"),
        (
            "format = 2",
            "format = 2\nprevious = \"x\"",
            "previous must be",
        ),
        (
            "format = 2",
            "format = 2\ncreated_at = \"x\"",
            "created_at must be",
        ),
    ] {
        assert!(good.contains(from), "{from}");
        let error = TrustFile::parse(&good.replacen(from, to, 1)).unwrap_err();
        assert!(
            error.problems.iter().any(|problem| problem.contains(word)),
            "{to}: {error}"
        );
    }
}

#[test]
fn a_trust_file_and_its_document_are_one() {
    let authority = Authority::new(DOMAIN, 2).unwrap();
    let text = authority.roles_toml(
        &[(Role::Policy, 1), (Role::Trust, 2)],
        &[&[Role::Policy, Role::Trust], &[Role::Trust]],
    );
    let text = text.replacen(
        "roles",
        "not_before = \"2026-01-01T00:00:00Z\"\nnot_after = \"2027-01-01T00:00:00Z\"\nroles",
        1,
    );
    let file = TrustFile::parse(&format!("# a comment\n{text}")).unwrap();
    let document = file.document().unwrap();
    let read = TrustFile::from_document(&document).unwrap();
    assert_eq!(read.id().unwrap(), file.id().unwrap());
    assert_eq!(
        TrustFile::parse(&file.to_toml().unwrap())
            .unwrap()
            .document()
            .unwrap(),
        document
    );
    // A file of the first format has a document too: the operator's file is where the chain begins.
    let first = TrustFile::parse(&authority.trust_toml(2)).unwrap();
    let again = TrustFile::from_document(&first.document().unwrap()).unwrap();
    assert_eq!(again.threshold(), 2);

    let value: Value = serde_json::from_slice(&document).unwrap();
    let compact = serde_json::to_vec(&value).unwrap();
    let error = TrustFile::from_document(&compact).unwrap_err();
    assert!(error.problems[0].contains("one form"), "{error}");
    for (pointer, wrong, word) in [
        ("/type", json!("tidelock-bundle"), "type must be"),
        ("/format", json!(1), "type must be"),
        ("/domain", json!("a b"), "domain must be"),
        ("/version", json!(0), "version must be"),
        ("/created_at", json!("x"), "is not a time"),
        ("/thresholds", json!({}), "no threshold for role `policy`"),
        (
            "/keys/0/public_key",
            json!("AA=="),
            "not an ECDSA P-256 key",
        ),
        ("/keys/0/public_key", json!("?"), "not base64"),
        ("/keys/1/id", json!("key-0"), "stands twice"),
        ("/keys/1/colour", json!(1), "unknown field"),
        ("/previous", json!("blake3:00"), "sha256:"),
    ] {
        let mut wrong_value = value.clone();
        match wrong_value.pointer_mut(pointer) {
            Some(place) => *place = wrong,
            None => {
                let (parent, key) = pointer.rsplit_once('/').unwrap();
                wrong_value.pointer_mut(parent).unwrap()[key] = wrong;
            }
        }
        let bytes = serde_json::to_vec(&wrong_value).unwrap();
        let error = TrustFile::from_document(&bytes).unwrap_err();
        assert!(
            error.problems.iter().any(|problem| problem.contains(word)),
            "{pointer}: {error}"
        );
    }
    let mut same = value;
    same["keys"][1]["public_key"] = same["keys"][0]["public_key"].clone();
    let error = TrustFile::from_document(same.to_string().as_bytes()).unwrap_err();
    assert!(error.problems[0].contains("are the same key"), "{error}");
}

/// A trust file with these rules of activation, and what is wrong with it.
fn with_rules(trust: &TrustFile, rules: &str) -> Result<TrustFile, String> {
    let text = trust.to_toml().unwrap();
    let table = format!("[activation]\n{rules}\n\n[[keys]]");
    TrustFile::parse(&text.replacen("[[keys]]", &table, 1)).map_err(|error| error.to_string())
}

#[test]
fn rules_of_activation_say_what_they_mean_and_nothing_else() {
    let plain = Site::new().trust;
    let rules = |block_on, replay_records, widening_threshold| ActivationRules {
        block_on,
        replay_records,
        widening_threshold,
    };
    for (text, read) in [
        ("", rules(BlockOn::None, None, None)),
        ("block_on = \"none\"", rules(BlockOn::None, None, None)),
        ("widening_signatures = 0", rules(BlockOn::None, None, None)),
        (
            "block_on = \"any_flip\"",
            rules(BlockOn::AnyFlip, None, None),
        ),
        (
            "block_on = \"deny_to_allow\"\nreplay_records = 200\nwidening_signatures = 2",
            rules(BlockOn::DenyToAllow, Some(200), Some(2)),
        ),
    ] {
        let file = with_rules(&plain, text).unwrap();
        assert_eq!(*file.activation(), read, "{text}");
        let document = file.document().unwrap();
        let again = TrustFile::from_document(&document).unwrap();
        assert_eq!(*again.activation(), read, "{text}");
        let again = TrustFile::parse(&file.to_toml().unwrap()).unwrap();
        assert_eq!(again.document().unwrap(), document, "{text}");
        // Rules that ask for nothing make no other document.
        let is_plain = document == plain.document().unwrap();
        assert_eq!(is_plain, read.is_empty(), "{text}");
    }
    for (text, word) in [
        ("block_on = \"flips\"", "must be one of: none, any_flip"),
        ("block_on = true", "must be a text"),
        ("block_on = \"any_flip\"\nreplay_records = 0", "1 to 1000"),
        (
            "block_on = \"any_flip\"\nreplay_records = 1001",
            "1 to 1000",
        ),
        ("block_on = \"any_flip\"\nreplay_records = -1", "1 to 1000"),
        ("replay_records = 9", "`block_on` is `none`"),
        // The site has two keys of role `policy`.
        ("widening_signatures = 3", "keys of role `policy`, 2"),
        ("widening_signatures = -1", "keys of role `policy`, 2"),
        ("widening = 1", "unknown key `widening`"),
    ] {
        let problem = with_rules(&plain, text).unwrap_err();
        assert!(problem.contains(word), "{text}: {problem}");
    }
}

#[test]
fn an_emergency_ends_by_going_back_and_never_comes_back_as_last_known_good() {
    let site = Site::new();
    let storage = MemorySlots::new();
    let context = LoadContext::new(DOMAIN, NODE_VERSION).unwrap();
    let open = || {
        Slots::open(
            storage.clone() as Arc<dyn SlotStorage>,
            &site.trust,
            &context,
        )
    };
    let back = |slots: &Slots| {
        let load = |package| VerifiedBundle::load(package, &site.trust, &context);
        slots.set_aside_by(AsideCause::Operator, "", CREATED, &load)
    };
    let (slots, _) = open();
    slots
        .activate(site.built(base(1), &[0, 1]).unwrap())
        .unwrap();
    slots.settle().unwrap();
    slots.activate(site.built(glass(2), &[2]).unwrap()).unwrap();
    assert_eq!(back(&slots).unwrap().serves.unwrap().epoch, 1);
    slots
        .reinstate(site.built(glass(2), &[2]).unwrap())
        .unwrap();
    slots
        .activate(site.built(base(3), &[0, 1]).unwrap())
        .unwrap();
    // The emergency is over: behind it stands what was there before.
    assert_eq!(back(&slots).unwrap().serves.unwrap().epoch, 1);
    // Nor by a hand that puts it into the slot.
    let glass = site.built(glass(2), &[2]).unwrap();
    storage.set("lkg", Some(glass.package().encode().unwrap()));
    let (slots, faults) = open();
    assert!(faults.iter().any(|fault| fault.code == "LKG_BREAK_GLASS"));
    assert!(slots.current().is_none());
    assert_eq!(slots.standby(), None);
}
