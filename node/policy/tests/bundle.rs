//! Every way in which a bundle is refused, each beside the bundle that is accepted.
#![cfg(test)]

use serde_json::{Value, json};
use tidelock_policy::testing::{Authority, NODE_VERSION, template_builder};
use tidelock_policy::{
    BuildError, BundleBuilder, BundleError, Engine, LoadContext, Package, PolicyRequest, TrustFile,
    Verdict, VerifiedBundle, build_dir, examine, inspect, limits, run_tests, template,
};

const CREATED: u64 = 1_769_860_800_000;
const DOMAIN: &str = "site-1";

struct Site {
    authority: Authority,
    trust: TrustFile,
    context: LoadContext,
}

impl Site {
    fn new(keys: usize, threshold: usize) -> Self {
        let authority = Authority::new(DOMAIN, keys).unwrap();
        let trust = TrustFile::parse(&authority.trust_toml(threshold)).unwrap();
        let context = LoadContext::new(DOMAIN, NODE_VERSION).unwrap();
        Self {
            authority,
            trust,
            context,
        }
    }

    fn sign(&self, archive: Vec<u8>, keys: &[usize]) -> Package {
        self.authority.sign(archive, keys).unwrap()
    }

    fn load(&self, package: Package) -> Result<VerifiedBundle, BundleError> {
        VerifiedBundle::load(package, &self.trust, &self.context)
    }

    fn load_built(&self, builder: BundleBuilder) -> Result<VerifiedBundle, BundleError> {
        let archive = builder.build().unwrap();
        // Ruling 18: what a worker says on half the stack is what the node finds on the whole.
        let examined = examine(&archive, &self.context);
        let loaded = self.load(self.sign(archive, &[0]));
        match (&examined, &loaded) {
            (Ok(examined), Ok(loaded)) => {
                assert_eq!(examined.content_id, *loaded.content_id());
                assert_eq!(examined.epoch, loaded.epoch());
                assert_eq!(examined.policies, loaded.policy_ids().len());
                assert_eq!(examined.tests_passed, loaded.tests_passed());
            }
            (Err(examined), Err(loaded)) => assert_eq!(examined, loaded),
            (examined, loaded) => panic!("{examined:?}, but {loaded:?}"),
        }
        loaded
    }
}

fn base() -> BundleBuilder {
    template_builder("base", DOMAIN, CREATED).unwrap()
}

/// The template with its manifest changed behind the builder's back.
fn with_manifest(change: impl FnOnce(&mut Value)) -> BundleBuilder {
    let files = template("base", DOMAIN, CREATED).unwrap();
    let mut manifest: Value = serde_json::from_slice(&files[0].1).unwrap();
    change(&mut manifest);
    base().file("manifest.json", manifest.to_string().into_bytes())
}

fn with_policy(text: &str) -> BundleBuilder {
    base()
        .file("policies/base.cedar", text.into())
        .file("tests/base.json", b"[]".to_vec())
}

fn read_srv() -> PolicyRequest {
    PolicyRequest {
        principal_type: "Agent".into(),
        principal_id: "builder".into(),
        action: "fs.read".into(),
        resource_type: "File".into(),
        resource_id: "/srv/a".into(),
        resource_attributes: json!({"path": "/srv/a"}).as_object().unwrap().clone(),
        params: Value::Null,
        context: Value::Null,
    }
}

#[test]
fn a_good_bundle_loads_and_decides() {
    let site = Site::new(2, 2);
    let archive = base().build().unwrap();
    let bundle = site.load(site.sign(archive.clone(), &[0, 1])).unwrap();
    assert_eq!(bundle.signers(), ["key-0", "key-1"]);
    assert_eq!(bundle.manifest().name, "base");
    assert_eq!(bundle.manifest().created_unix_ms, CREATED);
    assert_eq!(bundle.tests_passed(), 13);
    assert_eq!(bundle.warnings(), <[String; 0]>::default());
    assert_eq!(bundle.evaluate(&read_srv()).verdict, Verdict::Permit);
    assert_eq!(bundle.evaluate(&read_srv()).policies, ["read-srv"]);
    // The identity does not depend on who signed.
    assert_eq!(bundle.content_id(), &site.sign(archive, &[]).content_id());
}

#[test]
fn below_the_threshold_is_refused() {
    let site = Site::new(3, 2);
    let archive = base().build().unwrap();
    assert!(site.load(site.sign(archive.clone(), &[0, 2])).is_ok());
    for keys in [&[][..], &[0], &[2]] {
        assert_eq!(
            site.load(site.sign(archive.clone(), keys)).unwrap_err(),
            BundleError::Signature {
                valid: keys.len(),
                needed: 2,
                unknown: 0
            }
        );
    }
}

#[test]
fn one_signer_counts_once_however_often_it_signs() {
    let site = Site::new(2, 2);
    let archive = base().build().unwrap();
    assert!(site.load(site.sign(archive.clone(), &[0, 1])).is_ok());
    let twice = site.sign(archive, &[1, 1, 1]);
    // ECDSA is randomised: these are three different signatures by one key.
    assert_ne!(twice.signatures[0], twice.signatures[1]);
    assert_eq!(
        site.load(twice).unwrap_err(),
        BundleError::Signature {
            valid: 1,
            needed: 2,
            unknown: 0
        }
    );
}

#[test]
fn a_bad_or_foreign_signature_is_refused_before_anything_is_parsed() {
    let site = Site::new(1, 1);
    let other = Site::new(1, 1);
    let archive = base().build().unwrap();
    assert!(site.load(site.sign(archive.clone(), &[0])).is_ok());
    let refused = BundleError::Signature {
        valid: 0,
        needed: 1,
        unknown: 1,
    };
    assert_eq!(
        site.load(other.sign(archive.clone(), &[0])).unwrap_err(),
        refused
    );
    let mut swapped = site.sign(archive.clone(), &[0]);
    swapped.archive = base().epoch(2).build().unwrap();
    assert_eq!(site.load(swapped).unwrap_err(), refused);
    let mut garbage = site.sign(archive.clone(), &[0]);
    garbage.archive = b"not an archive".to_vec();
    assert_eq!(site.load(garbage).unwrap_err(), refused);
    // A signature by a key that is not trusted does no harm beside enough trusted ones.
    let mut extra = site.sign(archive, &[0]);
    extra
        .signatures
        .extend(other.sign(extra.archive.clone(), &[0]).signatures);
    assert_eq!(site.load(extra).unwrap().signers(), ["key-0"]);
}

#[test]
fn a_bundle_of_another_domain_is_refused() {
    let site = Site::new(1, 1);
    assert!(site.load_built(base().domain(DOMAIN)).is_ok());
    let error = site.load_built(base().domain("site-2")).unwrap_err();
    assert_eq!(error.code(), "BUNDLE_DOMAIN");
    assert!(
        error
            .to_string()
            .contains("the bundle is of domain `site-2`"),
        "{error}"
    );
    // So is a trust file of another domain.
    let context = LoadContext::new("site-3", NODE_VERSION).unwrap();
    let package = site.sign(base().domain("site-3").build().unwrap(), &[0]);
    let error = VerifiedBundle::load(package, &site.trust, &context).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("the trust file is of domain `site-1`"),
        "{error}"
    );
}

#[test]
fn a_bundle_for_a_newer_node_is_refused() {
    let site = Site::new(1, 1);
    let needs =
        |version: &str| with_manifest(|manifest| manifest["min_node_version"] = version.into());
    assert!(site.load_built(needs("0.1.0")).is_ok());
    assert!(site.load_built(needs("0.0.9")).is_ok());
    for newer in ["0.1.1", "0.2.0", "1.0.0-rc.1"] {
        let error = site.load_built(needs(newer)).unwrap_err();
        assert_eq!(
            error,
            BundleError::NodeVersion {
                needed: newer.into(),
                running: NODE_VERSION.into()
            }
        );
        assert_eq!(error.code(), "BUNDLE_NODE_VERSION");
    }
}

#[test]
fn another_engine_is_refused() {
    let site = Site::new(1, 1);
    let error = site
        .load_built(with_manifest(|m| m["engine"] = "wasm".into()))
        .unwrap_err();
    assert_eq!(error, BundleError::Engine("wasm".into()));
    assert_eq!(error.code(), "BUNDLE_ENGINE");
}

#[test]
fn policies_that_do_not_compile_are_refused_with_file_and_line() {
    let site = Site::new(1, 1);
    assert!(
        site.load_built(with_policy("permit(principal, action, resource);"))
            .is_ok()
    );
    let good = "permit(principal, action, resource);\n";
    for (text, line, word) in [
        (
            format!("{good}// one\nforbid(principal, action resource);"),
            3,
            "unexpected token",
        ),
        (format!("{good}permit(principal, action, resource)"), 2, ""),
        (format!("{good}{good}nonsense"), 3, ""),
        (
            "permit(principal == ?principal, action, resource);".into(),
            0,
            "no policy",
        ),
        (
            "permit(principal == ?resource, action, resource);".into(),
            1,
            "",
        ),
        (
            format!("@id(\"a\")\n{good}@id(\"a\")\n{good}"),
            3,
            "`a` stands twice",
        ),
        (format!("@id(\"\")\n{good}"), 1, "@id must be"),
        (format!("@id(\"a\\nb\")\n{good}"), 1, "@id must be"),
        (
            "permit(principal, action, resource) when { \"open };".into(),
            1,
            "",
        ),
        (String::new(), 0, "no policy"),
        ("// nothing here".into(), 0, "no policy"),
    ] {
        match site.load_built(with_policy(&text)).unwrap_err() {
            error @ BundleError::Compile { .. } => {
                assert_eq!(error.code(), "BUNDLE_COMPILE");
                let shown = error.to_string();
                assert!(shown.contains(&format!("line {line}: ")), "{text}: {shown}");
                assert!(shown.contains(word), "{text}: {shown}");
            }
            other => panic!("{text}: {other:?}"),
        }
    }
    let error = site
        .load_built(base().file("policies/base.cedar", b"permit(\xff);".to_vec()))
        .unwrap_err();
    assert!(error.to_string().contains("not UTF-8"), "{error}");
}

#[test]
fn deep_parentheses_are_refused_before_the_parser() {
    let site = Site::new(1, 1);
    let nested = |depth: usize| {
        let (open, close) = ("(".repeat(depth), ")".repeat(depth));
        with_policy(&format!(
            "permit(principal, action, resource) when {{ {open}true{close} }};"
        ))
    };
    assert!(site.load_built(nested(limits::NESTING_MAX - 1)).is_ok());
    for depth in [limits::NESTING_MAX, 10_000, 500_000] {
        let error = site.load_built(nested(depth)).unwrap_err();
        assert_eq!(error.code(), "BUNDLE_COMPILE");
        assert!(error.to_string().contains("nest deeper"), "{error}");
    }
    let schema = |depth: usize| {
        let (open, close) = ("Set<".repeat(depth), ">".repeat(depth));
        let text = format!(
            "entity Agent; entity File = {{ path: {open}String{close} }};\n\
             action \"fs.read\" appliesTo {{ principal: Agent, resource: File }};"
        );
        with_policy("permit(principal, action, resource);").file("schema.cedarschema", text.into())
    };
    assert!(site.load_built(schema(60)).is_ok());
    let error = site.load_built(schema(100_000)).unwrap_err();
    assert_eq!(error.code(), "BUNDLE_SCHEMA");
    assert!(error.to_string().contains("nest deeper"), "{error}");
}

/// The bound on depth is only worth something if what it lets through fits the stacks: compiling
/// happens on a thread of fixed size, evaluating on whatever thread a caller has.
#[test]
fn what_the_depth_limit_allows_evaluates_on_a_small_stack() {
    let site = Site::new(1, 1);
    let chain =
        |operator: &str, count: usize| vec!["resource.path == \"/none\""; count].join(operator);
    let parens = limits::NESTING_MAX - 1;
    let long = limits::EXPRESSION_DEPTH_MAX - 20;
    let mut expressions = vec![
        chain(" || ", long),
        chain(" && ", long),
        format!("{}true{}", "(".repeat(parens), ")".repeat(parens)),
        format!("{}false", "if false then true else ".repeat(long / 7)),
    ];
    // Brackets and chains together, as high as both limits allow.
    let mut mixed = "resource.path == \"/none\"".to_owned();
    for _ in 0..parens - 20 {
        mixed = format!("({mixed} || false)");
    }
    expressions.push(mixed);
    for expression in expressions {
        let text = format!(
            "permit(principal, action == Action::\"fs.read\", resource is File)\n\
             when {{ {expression} || true }};"
        );
        let bundle = match site.load_built(with_policy(&text)) {
            Ok(bundle) => bundle,
            Err(error) => panic!("{}…: {error}", &expression[..40.min(expression.len())]),
        };
        let evaluation = std::thread::Builder::new()
            .stack_size(1024 * 1024)
            .spawn(move || {
                let evaluation = bundle.evaluate(&read_srv());
                drop(bundle);
                evaluation
            })
            .unwrap()
            .join()
            .unwrap();
        assert_eq!(evaluation.verdict, Verdict::Permit, "{evaluation:?}");
    }
}

#[test]
fn policies_and_entities_that_do_not_fit_the_schema_are_refused() {
    let site = Site::new(1, 1);
    let error = |builder: BundleBuilder| {
        let error = site.load_built(builder).unwrap_err();
        assert_eq!(error.code(), "BUNDLE_SCHEMA", "{error}");
        error.to_string()
    };
    let when = |text: &str| {
        with_policy(&format!(
            "permit(principal, action == Action::\"fs.read\", resource) when {{ {text} }};"
        ))
    };
    assert!(site.load_built(when("resource.path == \"/a\"")).is_ok());
    assert!(error(when("resource.pth == \"/a\"")).contains("pth"));
    assert!(error(when("resource.path == 1")).contains("type"));
    assert!(
        error(when("resource.ext == \"rs\"")).contains("ext"),
        "optional and not guarded"
    );
    assert!(error(when("context.params.x")).contains("params"));
    assert!(
        error(with_policy(
            "permit(principal, action == Action::\"fs.raed\", resource);"
        ))
        .contains("fs.raed")
    );
    assert!(error(with_policy("permit(principal is Robot, action, resource);")).contains("Robot"));

    let entities = |text: &str| base().file("entities.json", text.into());
    let good = r#"[{"uid": {"type": "Agent", "id": "a"}, "attrs": {},
                    "parents": [{"type": "Team", "id": "t"}]}]"#;
    assert!(site.load_built(entities(good)).is_ok());
    assert!(error(entities(&good.replace("{}", "{\"level\": 1}"))).contains("level"));
    assert!(error(entities(&good.replace("Team", "File"))).contains("File"));
    assert!(error(entities(&good.replace("Agent", "Robot"))).contains("Robot"));
    let twice = good.replace("\"attrs\": {}", "\"attrs\": {}, \"attrs\": {}");
    let refused = site.load_built(entities(&twice)).unwrap_err();
    assert_eq!(refused.code(), "BUNDLE_FORMAT");
    assert!(refused.to_string().contains("stands twice"), "{refused}");

    let schema = |text: &str| base().file("schema.cedarschema", text.into());
    assert!(error(schema("entity Agent")).contains("schema"));
    assert!(error(schema("namespace X { entity Agent; }")).contains("namespace"));
    // Names are read by people, and by a solver.
    for name in ["x\\r(exit)", "x\\n", "x\\u{7f}"] {
        let text = format!("entity Agent = {{ \"{name}\": String }};");
        assert!(error(schema(&text)).contains("control character"), "{text}");
        let text = format!("entity Agent enum [\"{name}\"];");
        assert!(error(schema(&text)).contains("control character"), "{text}");
    }
    // The prover brings Cedar's extensions into the program; bundles do not get them.
    for extension in [
        "ipaddr",
        "decimal",
        "datetime",
        "duration",
        "__cedar::ipaddr",
    ] {
        let text = format!("entity Agent; entity Host = {{ at: {extension} }};");
        assert!(error(schema(&text)).contains("extension types"), "{text}");
        let text = format!("type At = Set<{extension}>; entity Agent; entity Host = {{ at: At }};");
        assert!(error(schema(&text)).contains("extension types"), "{text}");
    }
    let mut files = template("base", DOMAIN, CREATED).unwrap();
    files.retain(|(path, _)| path != "schema.cedarschema");
    let bare = files
        .into_iter()
        .fold(BundleBuilder::new(), |b, (path, bytes)| {
            b.file(&path, bytes)
        });
    assert!(error(bare).contains("no schema"));
}

#[test]
fn classes_must_cover_the_schema() {
    let site = Site::new(1, 1);
    let error = site
        .load_built(with_manifest(|manifest| {
            manifest.as_object_mut().unwrap().remove("default_class");
        }))
        .unwrap_err();
    assert_eq!(error.code(), "BUNDLE_SCHEMA");
    assert!(error.to_string().contains("is in no class"), "{error}");
    let error = site
        .load_built(with_manifest(|manifest| {
            manifest["classes"]["observe"]["actions"] = json!(["fs.red"]);
        }))
        .unwrap_err();
    assert!(
        error.to_string().contains("names action `fs.red`"),
        "{error}"
    );
}

#[test]
fn a_bundle_that_fails_its_own_tests_is_refused() {
    let site = Site::new(1, 1);
    let case = |expect: &str, more: &str| {
        let text = format!(
            r#"[{{"name": "probe", "request": {{
                "principal": {{"type": "Agent", "id": "a"}}, "action": "fs.read",
                "resource": {{"type": "File", "id": "/srv/a", "attributes": {{"path": "/srv/a"}}}}
            }}, "expect": "{expect}"{more}}}]"#
        );
        base().file("tests/more.json", text.into())
    };
    assert_eq!(
        site.load_built(case("allow", "")).unwrap().tests_passed(),
        14
    );
    let by = r#", "policies": ["read-srv"]"#;
    assert!(site.load_built(case("allow", by)).is_ok());
    for builder in [
        case("deny", ""),
        case("error", ""),
        case("allow", r#", "policies": ["other"]"#),
        case("allow", r#", "policies": []"#),
    ] {
        let archive = builder.build().unwrap();
        let report = run_tests(&archive).unwrap();
        assert_eq!((report.passed, report.failed), (13, 1));
        let error = site.load(site.sign(archive, &[0])).unwrap_err();
        assert_eq!(error.code(), "BUNDLE_TESTS");
        assert!(
            error
                .to_string()
                .contains("tests/more.json: `probe` expects"),
            "{error}"
        );
    }
    let error = site
        .load_built(case("allow", r#", "colour": 1"#))
        .unwrap_err();
    assert_eq!(error.code(), "BUNDLE_FORMAT");
    assert!(
        error.to_string().contains("unknown field `colour`"),
        "{error}"
    );
}

/// A table says `given`; `request` is the older word, which bundles that stand have.
#[test]
fn a_test_says_what_is_given_by_either_word_and_never_by_both() {
    let site = Site::new(1, 1);
    let asked = |path: &str| {
        json!({"principal": {"type": "Agent", "id": "a"}, "action": "fs.read",
            "resource": {"type": "File", "id": path, "attributes": {"path": path}}})
    };
    let case = |given: Value| {
        let mut case = json!({"name": "probe", "expect": "allow"});
        let members = given.as_object().unwrap().clone();
        case.as_object_mut().unwrap().extend(members);
        base().file("tests/more.json", json!([case]).to_string().into_bytes())
    };
    for word in ["given", "request"] {
        let tested = |path: &str| site.load_built(case(json!({word: asked(path)})));
        assert_eq!(tested("/srv/a").unwrap().tests_passed(), 14, "{word}");
        // The control: what stands there is what is asked.
        assert_eq!(tested("/etc/a").unwrap_err().code(), "BUNDLE_TESTS");
    }
    for (given, words) in [
        (
            json!({"given": asked("/srv/a"), "request": asked("/srv/a")}),
            "both `given` and `request`",
        ),
        (json!({}), "`probe` has no `given`"),
        (json!({"given": null, "request": asked("/srv/a")}), "null"),
        (json!({"given": asked("/srv/a"), "request": null}), "null"),
    ] {
        let error = site.load_built(case(given)).unwrap_err();
        assert_eq!(error.code(), "BUNDLE_FORMAT");
        let error = error.to_string();
        assert!(
            error.contains("tests/more.json") && error.contains(words),
            "{error}"
        );
    }
}

/// A test that expects a deny must not pass because its request was written wrongly.
#[test]
fn an_error_does_not_pass_for_an_expected_deny() {
    let site = Site::new(1, 1);
    let case = |expect: &str| {
        let text = format!(
            r#"[{{"name": "no path", "request": {{
                "principal": {{"type": "Agent", "id": "a"}}, "action": "fs.read",
                "resource": {{"type": "File", "id": "/etc/a"}}
            }}, "expect": "{expect}"}}]"#
        );
        base().file("tests/more.json", text.into())
    };
    assert!(site.load_built(case("error")).is_ok());
    assert_eq!(
        site.load_built(case("deny")).unwrap_err().code(),
        "BUNDLE_TESTS"
    );
}

#[test]
fn digests_and_file_lists_must_match() {
    let site = Site::new(1, 1);
    let archive = base().build().unwrap();
    // Rebuild the archive by hand with one file or digest exchanged: well-formed, signed, wrong.
    type Entries = Vec<(String, Vec<u8>)>;
    let forge = |change: &dyn Fn(&mut Entries)| {
        let mut reader = tar::Archive::new(archive.as_slice());
        let mut files: Entries = reader
            .entries()
            .unwrap()
            .map(|entry| {
                let mut entry = entry.unwrap();
                let mut bytes = Vec::new();
                std::io::Read::read_to_end(&mut entry, &mut bytes).unwrap();
                (entry.path().unwrap().display().to_string(), bytes)
            })
            .collect();
        change(&mut files);
        files.sort();
        let mut builder = tar::Builder::new(Vec::new());
        for (path, bytes) in &files {
            let mut header = tar::Header::new_ustar();
            header.set_path(path).unwrap();
            header.set_size(bytes.len() as u64);
            header.set_mode(0o644);
            header.set_uid(0);
            header.set_gid(0);
            header.set_mtime(0);
            header.set_entry_type(tar::EntryType::Regular);
            header.set_cksum();
            builder.append(&header, bytes.as_slice()).unwrap();
        }
        site.sign(builder.into_inner().unwrap(), &[0])
    };
    assert_eq!(forge(&|_| ()).archive, archive);
    assert!(site.load(forge(&|_| ())).is_ok());
    let changed = forge(&|files| {
        for (path, bytes) in files {
            if path == "policies/base.cedar" {
                bytes.push(b'\n');
            }
        }
    });
    assert_eq!(
        site.load(changed).unwrap_err(),
        BundleError::Digest {
            file: "policies/base.cedar".into()
        }
    );
    let unlisted = forge(&|files| files.push(("tests/z.json".into(), b"[]".to_vec())));
    assert!(
        site.load(unlisted)
            .unwrap_err()
            .to_string()
            .contains("is not listed")
    );
    let missing = forge(&|files| files.retain(|(path, _)| path != "tests/base.json"));
    assert!(
        site.load(missing)
            .unwrap_err()
            .to_string()
            .contains("not in the archive")
    );
    let no_manifest = forge(&|files| files.retain(|(path, _)| path != "manifest.json"));
    assert!(
        site.load(no_manifest)
            .unwrap_err()
            .to_string()
            .contains("has no manifest.json")
    );
}

/// INV-06: whether a bundle passes depends on the trust file, the node and the bytes. Neither the
/// time of making nor anything outside the arguments matters; age is posture's business.
#[test]
fn inv_06_loading_depends_on_its_arguments_alone() {
    let site = Site::new(1, 1);
    for created in [0, CREATED, 4_102_444_800_000] {
        let archive = base().created_unix_ms(created).build().unwrap();
        let package = site.sign(archive, &[0]);
        let first = site.load(package.clone()).unwrap();
        let second = site.load(package.clone()).unwrap();
        assert_eq!(first.content_id(), second.content_id());
        assert_eq!(first.manifest(), second.manifest());
        // The same bytes under another trust file: refused, whatever happened before.
        let other = Site::new(1, 1);
        assert_eq!(other.load(package).unwrap_err().code(), "BUNDLE_SIGNATURE");
    }
}

#[test]
fn building_is_deterministic_and_refuses_strangers() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    for (path, bytes) in template("base", DOMAIN, CREATED).unwrap() {
        let path = root.join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, bytes).unwrap();
    }
    let archive = build_dir(root).unwrap();
    assert_eq!(archive, build_dir(root).unwrap());
    assert_eq!(archive, base().build().unwrap());
    let package = Package {
        archive,
        signatures: Vec::new(),
    };
    let inspection = inspect(&package).unwrap();
    assert_eq!(inspection.content_id, package.content_id());
    assert_eq!(inspection.tests.passed, 13);
    assert!(inspection.policies.contains(&"no-keys".to_owned()));
    assert!(inspection.actions.contains("tool.call"));

    std::fs::write(root.join("signing.pem"), "secret").unwrap();
    let error = build_dir(root).unwrap_err();
    assert!(matches!(error, BuildError::Bundle(_)), "{error}");
    assert!(
        error
            .to_string()
            .contains("signing.pem has no place in a bundle"),
        "{error}"
    );
    std::fs::remove_file(root.join("signing.pem")).unwrap();
    std::os::unix::fs::symlink("/etc/hostname", root.join("policies/link.cedar")).unwrap();
    assert!(
        build_dir(root)
            .unwrap_err()
            .to_string()
            .contains("link.cedar has no place")
    );
    std::fs::remove_file(root.join("policies/link.cedar")).unwrap();
    std::fs::create_dir(root.join("policies/sub")).unwrap();
    assert!(
        build_dir(root)
            .unwrap_err()
            .to_string()
            .contains("sub has no place")
    );
    assert!(matches!(
        build_dir(&root.join("none")).unwrap_err(),
        BuildError::Read { .. }
    ));
}

/// A small signed bundle must not cost every node that it reaches all its memory.
#[test]
fn hierarchies_are_bounded_before_they_are_built() {
    let site = Site::new(1, 1);
    let nested = |depth: usize| {
        let schema = "entity Agent; entity Folder in [Folder];\n\
                      action \"fs.read\" appliesTo { principal: Agent, resource: Folder };";
        let folder = |n: usize| json!({"type": "Folder", "id": n.to_string()});
        let entities: Vec<Value> = (0..depth)
            .map(|n| json!({"uid": folder(n), "attrs": {}, "parents": [folder(n + 1)]}))
            .collect();
        with_policy("permit(principal, action, resource);")
            .file("schema.cedarschema", schema.into())
            .file(
                "entities.json",
                Value::Array(entities).to_string().into_bytes(),
            )
    };
    assert!(site.load_built(nested(300)).is_ok());
    let error = site.load_built(nested(limits::ENTITIES_MAX)).unwrap_err();
    assert!(
        error.to_string().contains("make the hierarchy flatter"),
        "{error}"
    );
    let error = site
        .load_built(nested(limits::ENTITIES_MAX + 1))
        .unwrap_err();
    assert!(error.to_string().contains("10001 entities"), "{error}");

    let schema = |types: usize| {
        let mut text = "entity Agent; entity T0;\n\
                        action \"fs.read\" appliesTo { principal: Agent, resource: T0 };"
            .to_owned();
        for n in 2..types {
            text.push_str(&format!("entity T{n} in [T0];\n"));
        }
        with_policy("permit(principal, action, resource);").file("schema.cedarschema", text.into())
    };
    assert!(site.load_built(schema(limits::SCHEMA_NAMES_MAX)).is_ok());
    let error = site
        .load_built(schema(limits::SCHEMA_NAMES_MAX + 1))
        .unwrap_err();
    assert_eq!(error.code(), "BUNDLE_SCHEMA");
    assert!(error.to_string().contains("513 entity types"), "{error}");
}
