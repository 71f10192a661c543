//! Every bound of this crate, with what it costs in the worst case.

/// Bytes of one bundle archive. A node holds at most three in memory at once (active, last known
/// good, the one being loaded): 12 MiB.
pub const ARCHIVE_BYTES_MAX: usize = 4 * 1024 * 1024;

/// Bytes of one file in an archive. Bounds what a single parser run is given.
pub const FILE_BYTES_MAX: usize = 2 * 1024 * 1024;

/// Files in one archive. Bounds the digests of a manifest to about 150 KiB.
pub const FILES_MAX: usize = 1024;

/// Bytes of a file's path; it fits the name field of a ustar header without a prefix.
pub const PATH_BYTES_MAX: usize = 100;

/// Bytes of a bundle's name, a class's name or a domain.
pub const NAME_BYTES_MAX: usize = 63;

/// What no bundle's name contains: segments of statements about bundles and trust bear such names.
pub const RESERVED_NAMES: &str = ".tidelock.";

/// Highest epoch: the largest integer that every JSON reader keeps exactly, because epochs are
/// written into audit records.
pub const EPOCH_MAX: u64 = (1 << 53) - 1;

/// Seconds of an age limit: a hundred years. Keeps sums of times far from overflow.
pub const AGE_S_MAX: u64 = 100 * 366 * 24 * 3600;

/// Action classes in one manifest.
pub const CLASSES_MAX: usize = 256;

/// Policies in one bundle, templates counted, and with those that are linked from templates. Each
/// costs about 2 KiB compiled, once in the whole set and once in the set of its scope: 40 MiB.
pub const POLICIES_MAX: usize = 10_000;

/// Bytes of a policy's id.
pub const POLICY_ID_BYTES_MAX: usize = 128;

/// Entity types, and actions, in one schema. The compiler keeps every pair of descendant and
/// ancestor: a chain of this length has 131,000 of them, about 10 MiB.
pub const SCHEMA_NAMES_MAX: usize = 512;

/// Entities in one bundle. Each costs about 1 KiB, its ancestors not counted: 10 MiB.
pub const ENTITIES_MAX: usize = 10_000;

/// Entities of the bundle that one request may reach. They are copied for each evaluation.
pub const REACHED_ENTITIES_MAX: usize = 512;

/// Entities that one entity of the bundle may reach over its attributes and tags, in as many steps as
/// the policies look: a request has a principal and a resource, and may mention more.
pub const REACHED_FROM_ONE_MAX: usize = REACHED_ENTITIES_MAX / 4;

/// Pairs of entity and ancestor in one bundle, which the compiler keeps in full. Without this bound
/// a signed bundle of two megabytes could exhaust the memory of every node that it reaches. About
/// 80 bytes each: 20 MiB.
pub const ANCESTORS_MAX: usize = 256 * 1024;

/// Entries of the index from action to policy sets of one scope. A bundle that would need more has
/// one index for all actions instead of one for each. About 400 bytes an entry: 20 MiB; while it is made
/// another 60 MiB, if each policy of the most admits half of the most actions.
pub const INDEX_ENTRIES_MAX: usize = 48 * 1024;

/// Steps from entity to entity that a policy may look: `principal.team.lead.name` looks three. With
/// the entities that a request mentions it bounds what is copied for a request.
pub const LEVEL_MAX: u32 = 8;

/// Tests in one bundle. Each runs once at load.
pub const TESTS_MAX: usize = 10_000;

/// How deep brackets may nest in policies and schema. Checked before any parser of the engine
/// sees the text.
pub const NESTING_MAX: usize = 100;

/// Upper bound of a policy's syntax tree depth: brackets plus chained operators of one statement, in
/// Rego of one expression.
/// With this bound compiling fits [`COMPILE_STACK_BYTES`] and evaluating fits 1 MiB, both in
/// unoptimised builds (tested).
pub const EXPRESSION_DEPTH_MAX: usize = 180;

/// Stack of the thread that compiles a bundle, the same on every node and in every command.
pub const COMPILE_STACK_BYTES: usize = 8 * 1024 * 1024;

/// Names that one list of a difference between two bundles holds; policies are listed with their
/// texts, so a difference stays below the size of the two bundles.
pub const DIFFERENCES_LISTED_MAX: usize = 200;

/// Stack of the same thread in a worker (ruling 18): what passes there has as much again in the node.
pub const WORKER_COMPILE_STACK_BYTES: usize = COMPILE_STACK_BYTES / 2;

/// Warnings of the compiler that [`examine`](crate::examine) keeps: with [`MESSAGE_BYTES_MAX`] 20 KiB.
pub const WARNINGS_LISTED_MAX: usize = 20;

/// How deep JSON values of a request may nest before the engine refuses them.
pub const VALUE_DEPTH_MAX: usize = 64;

/// How deep brackets may nest in Rego: its parser's work doubles with each level.
pub const REGO_NESTING_MAX: usize = 16;

/// Steps of backtracking that the brackets of one Rego file may cost its parser: about a second.
pub const REGO_PARSE_WORK_MAX: usize = 1 << 22;

/// `else` in one Rego file: the engine's work grows with the square of a chain of them.
pub const REGO_ELSES_MAX: usize = 500;

/// Characters of one line of Rego.
pub const REGO_LINE_CHARACTERS_MAX: u32 = 8192;

/// Instructions of one evaluation in the Rego lane. With at most about 100 bytes each: 10 MiB.
pub const REGO_FUEL: usize = 100_000;

/// Bytes that the functions called by one evaluation may make, in all. With the engine's threads this
/// bounds what evaluations hold at once.
pub const REGO_ALLOCATED_BYTES_MAX: usize = 8 * 1024 * 1024;

/// Bytes of one text that a function takes or makes, and steps of one search for a pattern.
pub const REGO_TEXT_BYTES_MAX: usize = 1024 * 1024;

/// Elements of one collection that a function takes or makes.
pub const REGO_COLLECTION_MAX: usize = 32 * 1024;

/// Parts, down to the leaves, of the values of one call that walks them.
pub const REGO_NODES_MAX: usize = 64 * 1024;

/// Bytes of a regular expression or glob; the engine bounds a compiled expression to 100 KiB.
pub const REGO_PATTERN_BYTES_MAX: usize = 512;

/// Numbers that one `numbers.range` makes.
pub const REGO_RANGE_MAX: usize = 10_000;

/// Bits of a shift to the left.
pub const REGO_SHIFT_BITS_MAX: usize = 256;

/// Bytes of a text that is read as a number, and factors of one `product`.
pub const REGO_NUMBER_BYTES_MAX: usize = 64;

/// Digits of a width in `sprintf`.
pub const REGO_WIDTH_DIGITS_MAX: usize = 3;

/// How deep rules may refer to rules. Each level takes up to two calls of the machine on the stack of the
/// evaluating thread (tested on 1 MiB, unoptimised).
pub const REGO_RULE_DEPTH_MAX: usize = 32;

/// Statements with `with` in one bundle. Each is an entry point and two names of the compiler.
pub const REGO_WITH_MAX: usize = 256;

/// How deep `with` may stand in `with`: the texts are parsed once more for each level.
pub const REGO_WITH_LEVELS_MAX: usize = 4;

/// How deep memberships with keys may stand in one another, in patterns and under `not`: the texts are parsed once
/// more for each level.
pub const REGO_PATTERN_LEVELS_MAX: usize = 4;

/// How often one evaluation may evaluate statements with `with`. Each costs a machine, and a walk over the
/// names of the bundle's rules.
pub const REGO_WITH_RUNS_MAX: usize = 64;

/// Instructions of one evaluation of a statement with `with`: with [`REGO_WITH_RUNS_MAX`] of them, at most
/// 640,000 beside [`REGO_FUEL`].
pub const REGO_WITH_FUEL: usize = 10_000;

/// What a `with` counts among the rules that refer to rules: a machine calls another one.
pub const REGO_WITH_DEPTH: usize = 4;

/// Texts in `deny` and ids in `policies` of one decision.
pub const REGO_GROUNDS_MAX: usize = 64;

/// How deep a schema of `input-schema.json` may nest.
pub const INPUT_SCHEMA_DEPTH_MAX: usize = 16;

/// Bytes of an OPA bundle as it comes, compressed.
pub const OPA_BYTES_MAX: usize = 16 * 1024 * 1024;

/// Bytes of an OPA bundle's archive, unpacked: read in a stream, so a bomb costs this and no more.
pub const OPA_UNPACKED_BYTES_MAX: usize = 16 * 1024 * 1024;

/// Entries of an OPA bundle's archive, directories counted.
pub const OPA_ENTRIES_MAX: usize = 4 * FILES_MAX;

/// Bytes of a path in an OPA bundle.
pub const OPA_PATH_BYTES_MAX: usize = 256;

/// Signatures on one package.
pub const SIGNATURES_MAX: usize = 16;

/// Bytes of one DER signature: two integers of at most 33 bytes with their headers.
pub const SIGNATURE_BYTES_MAX: usize = 72;

/// Bytes of a signature file in the Sigstore form, certificate chain and log proof included.
pub const SIGNATURE_FILE_BYTES_MAX: usize = 64 * 1024;

/// Keys in a trust file. With [`SIGNATURES_MAX`] it bounds the verifications of one load to 256.
pub const TRUST_KEYS_MAX: usize = 16;

/// Bytes of a trust file.
pub const TRUST_FILE_BYTES_MAX: usize = 64 * 1024;

/// Seconds from the making of a break-glass bundle to its end: three days. What an emergency key that was
/// stolen can do ends with it.
pub const BREAK_GLASS_S_MAX: u64 = 72 * 3600;

/// Bytes of one signed document: a trust document is the largest.
pub const DOCUMENT_BYTES_MAX: usize = TRUST_FILE_BYTES_MAX;

/// Bytes of a key id that a signature names.
pub const KEY_HINT_BYTES_MAX: usize = NAME_BYTES_MAX;

/// Trust documents after the first that one node keeps: 4 MiB in the slot, and as many segments.
pub const TRUST_LINKS_MAX: usize = 64;

/// Blobs of one release, its manifests and signatures counted. Their descriptors take 1 MiB at most.
pub const RELEASE_BLOBS_MAX: usize = 256;

/// Bytes of the blobs of one release: what one verification reads at most.
pub const RELEASE_BYTES_MAX: u64 = 8 * 1024 * 1024 * 1024;

/// Bytes of an index, a manifest, a payload or a lock file of a release, which are read whole. At most
/// [`SIGNATURES_MAX`] payloads are held at once: 16 MiB.
pub const RELEASE_JSON_BYTES_MAX: u64 = 1024 * 1024;

/// How deep indexes of a release may nest.
pub const RELEASE_DEPTH_MAX: usize = 4;

/// Bytes of one encoded package: the body of a policy segment and the content of a slot.
pub const PACKAGE_BYTES_MAX: usize =
    ARCHIVE_BYTES_MAX + SIGNATURES_MAX * (SIGNATURE_BYTES_MAX + 2) + 16;

/// Shortest deadline of a question to an upstream decision point, in milliseconds.
pub const CONSULT_DEADLINE_MS_MIN: u64 = 10;

/// Longest deadline of such a question, in milliseconds. A caller holds its slot for as long.
pub const CONSULT_DEADLINE_MS_MAX: u64 = 5_000;

/// Longest time for which a decision point's answer may serve again, in seconds: 30 days.
pub const CONSULT_LIFETIME_S_MAX: u64 = 30 * 24 * 3600;

/// Failures that a report lists by name; the rest is counted.
pub const FAILURES_LISTED_MAX: usize = 20;

/// Bytes of one message that reaches records and answers.
pub const MESSAGE_BYTES_MAX: usize = 1024;

const _: () = assert!(FILE_BYTES_MAX < ARCHIVE_BYTES_MAX);
const _: () = assert!(
    ARCHIVE_BYTES_MAX <= u32::MAX as usize,
    "the package stores a u32 length"
);
const _: () = assert!(
    SIGNATURES_MAX <= u8::MAX as usize,
    "the package stores a u8 count"
);
const _: () = assert!(
    SIGNATURE_BYTES_MAX <= u8::MAX as usize,
    "the package stores a u8 length"
);
const _: () = assert!(NESTING_MAX <= EXPRESSION_DEPTH_MAX);
const _: () = assert!(REGO_NESTING_MAX < usize::BITS as usize);
const _: () = assert!(REGO_TEXT_BYTES_MAX <= REGO_ALLOCATED_BYTES_MAX);
const _: () = assert!(POLICIES_MAX <= INDEX_ENTRIES_MAX);
const _: () = assert!(CONSULT_DEADLINE_MS_MIN < CONSULT_DEADLINE_MS_MAX);
const _: () = assert!(EPOCH_MAX < i64::MAX as u64);
const _: () = assert!(AGE_S_MAX < u64::MAX / 1000 / 1000);

/// Permits that an explanation looks at, by their scopes: below a millisecond.
pub const EXPLAINED_POLICIES_MAX: usize = 2_048;

/// Permits that an explanation names.
pub const EXPLAINED_MAX: usize = 8;

/// Conditions of each of them that an explanation evaluates.
pub const EXPLAINED_CONDITIONS_MAX: usize = 8;

/// Tests of its own that a bundle is asked on the serving engines after the switch: at 200 ms, what one may
/// wait for an engine, they end within 13 s at the worst, and within a millisecond each on an idle machine.
pub const SELF_CHECK_CASES_MAX: usize = 64;

/// Recorded actions that a new bundle is asked, at most.
pub const REPLAY_RECORDS_MAX: u64 = 1_000;

/// Records that are read for each of them: between the decisions lies what is none, and whoever decides a lot
/// is only given a share.
pub const REPLAY_READ_FOR_EACH: u64 = 20;

/// Bytes of all records that are read for a replay, and so of those that are held meanwhile.
pub const REPLAY_READ_BYTES_MAX: usize = 32 * 1024 * 1024;
