//! The Rego engine: rules compiled once for the register machine, one fixed form of answer.
//!
//! The rule `data.tidelock.decision` must be an object with `allow`, a boolean, and may have `deny`, texts
//! that forbid, and `policies`, ids that a record shows as the grounds. Nothing else is an answer: what is
//! absent, undefined, of another type or has a further member is an error, and an error denies. Requests
//! are checked against `input-schema.json` before a rule sees them.

use std::collections::{BTreeMap, BTreeSet};

use regorus::Value;

use crate::archive::{DATA, DATA_DIR, Files, POLICIES_DIR, REGO};
use crate::error::{BundleError, clip};
use crate::input_schema::{InputSchema, convert};
use crate::json;
use crate::limits::{POLICY_ID_BYTES_MAX, REGO_GROUNDS_MAX};
use crate::rego_builtins::Stop;
use crate::rego_program::{Fault, Module, Rules};
use crate::request::{Engine, Evaluation, Failure, PolicyRequest, Verdict};

/// The rule that is asked.
pub const REGO_ENTRY: &str = "data.tidelock.decision";

/// Compiled Rego rules of one bundle. Made by loading a bundle; immutable.
pub struct RegoEngine {
    schema: InputSchema,
    rules: Rules,
    policy_ids: Vec<String>,
}

impl RegoEngine {
    /// Compiles the Rego files of an archive with its data and its input schema.
    pub(crate) fn compile(files: &Files) -> Result<Self, BundleError> {
        let schema = InputSchema::read(files)?;
        let mut modules = Vec::new();
        let mut policy_ids = Vec::new();
        for (path, bytes) in files {
            let Some(name) = rego_name(path) else {
                continue;
            };
            let text = std::str::from_utf8(bytes)
                .map_err(|_| BundleError::format(format!("`{path}` is not UTF-8")))?;
            modules.push(Module { path, text });
            policy_ids.push(name.to_owned());
        }
        if modules.is_empty() {
            return Err(BundleError::format("the bundle has no policies/*.rego"));
        }
        let rules = Rules::compile(&modules, data(files)?, REGO_ENTRY).map_err(compile_error)?;
        Ok(Self {
            schema,
            rules,
            policy_ids,
        })
    }

    /// Names of the policy files, sorted. The grounds of an answer are what its decision names.
    #[must_use]
    pub fn policy_ids(&self) -> &[String] {
        &self.policy_ids
    }

    /// Whether the context of requests for an action may have this member, and whether it is named.
    pub(crate) fn takes_context(&self, action: &str, member: &str) -> (bool, bool) {
        self.schema.takes_context(action, member)
    }

    /// The actions that the input schema declares.
    #[must_use]
    pub fn actions(&self) -> BTreeSet<String> {
        self.schema.actions()
    }
}

impl Engine for RegoEngine {
    fn evaluate(&self, request: &PolicyRequest) -> Evaluation {
        let input = match self.schema.input(request) {
            None => {
                let message = format!("unknown action `{}`", request.action);
                return Evaluation::failed(Failure::UnknownAction, &message);
            }
            Some(Err(message)) => return Evaluation::failed(Failure::Request, &message),
            Some(Ok(input)) => input,
        };
        match self.rules.run(input) {
            Ok(decision) => read(&decision)
                .unwrap_or_else(|message| Evaluation::failed(Failure::Decision, &message)),
            Err(Stop::Error(message)) => Evaluation::failed(Failure::Policy, &message),
            Err(Stop::Budget(message)) => Evaluation::failed(Failure::Budget, &message),
        }
    }
}

/// The name of a Rego file, from its path in the archive.
pub(crate) fn rego_name(path: &str) -> Option<&str> {
    path.strip_prefix(POLICIES_DIR)
        .filter(|name| name.ends_with(REGO))
}

fn compile_error(fault: Fault) -> BundleError {
    BundleError::Compile {
        file: fault.file,
        line: fault.line,
        message: clip(&fault.message),
    }
}

/// The data of a bundle: `data.json` is the document, `data/NAME.json` what stands at `NAME` in it.
fn data(files: &Files) -> Result<Value, BundleError> {
    let mut all = BTreeMap::new();
    for (path, bytes) in files {
        let at = if path == DATA {
            None
        } else if let Some(name) = path.strip_prefix(DATA_DIR) {
            Some(name.strip_suffix(".json").unwrap_or(name))
        } else {
            continue;
        };
        let value =
            json::parse(bytes).map_err(|error| BundleError::format(format!("{path}: {error}")))?;
        let fields = match (at, value) {
            (Some(name), value) => vec![(name.to_owned(), value)],
            (None, serde_json::Value::Object(map)) => map.into_iter().collect(),
            (None, _) => {
                return Err(BundleError::format(format!("{path} must be an object")));
            }
        };
        for (name, value) in fields {
            if all
                .insert(Value::from(name.as_str()), convert(&value))
                .is_some()
            {
                return Err(BundleError::format(format!(
                    "{path}: `{name}` is in another data file too"
                )));
            }
        }
    }
    Ok(Value::from(all))
}

/// Reads a decision, strictly.
fn read(decision: &Value) -> Result<Evaluation, String> {
    let fields = match decision {
        Value::Object(fields) => fields,
        Value::Undefined => return Err(format!("{REGO_ENTRY} is undefined")),
        _ => return Err(format!("{REGO_ENTRY} is not an object")),
    };
    let mut allow = None;
    let mut deny = Vec::new();
    let mut policies = Vec::new();
    for (name, value) in fields.iter_sorted() {
        let name = match name {
            Value::String(name) => name.as_ref(),
            _ => return Err("a member of the decision has a name that is no text".to_owned()),
        };
        match (name, value) {
            ("allow", Value::Bool(held)) => allow = Some(*held),
            ("allow", _) => return Err("`allow` is not a boolean".to_owned()),
            ("deny", value) => deny = texts("deny", value)?,
            ("policies", value) => policies = texts("policies", value)?,
            (other, _) => return Err(format!("`{other}` is no member of a decision")),
        }
    }
    let Some(allow) = allow else {
        return Err("`allow` is absent".to_owned());
    };
    let verdict = match (deny.is_empty(), allow) {
        (false, _) => Verdict::Forbid,
        (true, true) => Verdict::Permit,
        (true, false) => Verdict::NoMatch,
    };
    let mut grounds = match verdict {
        Verdict::NoMatch => Vec::new(),
        Verdict::Forbid => deny,
        _ if policies.is_empty() => vec![REGO_ENTRY.to_owned()],
        _ => policies,
    };
    grounds.sort_unstable();
    grounds.dedup();
    Ok(Evaluation {
        verdict,
        policies: grounds,
        errors: Vec::new(),
    })
}

/// A set or an array of texts; each is cut where it is longer than an id may be.
fn texts(name: &str, value: &Value) -> Result<Vec<String>, String> {
    let each = |item: &Value| match item {
        Value::String(text) if text.is_empty() => Err(format!("`{name}` holds an empty text")),
        Value::String(text) => Ok(cut(text)),
        _ => Err(format!("`{name}` holds something that is no text")),
    };
    let texts: Vec<String> = match value {
        Value::Array(items) if items.len() <= REGO_GROUNDS_MAX => {
            items.iter().map(each).collect::<Result<_, _>>()?
        }
        Value::Set(items) if items.len() <= REGO_GROUNDS_MAX => {
            items.iter().map(each).collect::<Result<_, _>>()?
        }
        Value::Array(_) | Value::Set(_) => {
            return Err(format!("`{name}` holds more than {REGO_GROUNDS_MAX} texts"));
        }
        _ => return Err(format!("`{name}` is neither a set nor an array")),
    };
    Ok(texts)
}

fn cut(text: &str) -> String {
    let mut end = text.len().min(POLICY_ID_BYTES_MAX);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.get(..end).unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(text: &str) -> Result<(Verdict, Vec<String>), String> {
        let value = Value::from_json_str(text).unwrap();
        read(&value).map(|evaluation| (evaluation.verdict, evaluation.policies))
    }

    #[test]
    fn only_the_fixed_form_is_an_answer() {
        let entry = REGO_ENTRY.to_owned();
        for (text, verdict, grounds) in [
            (r#"{"allow":true}"#, Verdict::Permit, vec![entry.clone()]),
            (r#"{"allow":true,"deny":[]}"#, Verdict::Permit, vec![entry]),
            (
                r#"{"allow":true,"policies":["b","a"]}"#,
                Verdict::Permit,
                vec!["a".into(), "b".into()],
            ),
            (r#"{"allow":false}"#, Verdict::NoMatch, vec![]),
            (
                r#"{"allow":false,"policies":["a"]}"#,
                Verdict::NoMatch,
                vec![],
            ),
            (
                r#"{"allow":true,"deny":["x"]}"#,
                Verdict::Forbid,
                vec!["x".into()],
            ),
            (
                r#"{"allow":false,"deny":["x","x"],"policies":["a"]}"#,
                Verdict::Forbid,
                vec!["x".into()],
            ),
        ] {
            assert_eq!(said(text), Ok((verdict, grounds)), "{text}");
        }
        for (text, word) in [
            ("true", "not an object"),
            ("null", "not an object"),
            (r#"[{"allow":true}]"#, "not an object"),
            ("{}", "`allow` is absent"),
            (r#"{"deny":[]}"#, "`allow` is absent"),
            (r#"{"allow":"true"}"#, "not a boolean"),
            (r#"{"allow":1}"#, "not a boolean"),
            (r#"{"allow":null}"#, "not a boolean"),
            (r#"{"allow":[true]}"#, "not a boolean"),
            (r#"{"allow":true,"Allow":true}"#, "no member"),
            (r#"{"allow":true,"reason":"x"}"#, "no member"),
            (r#"{"allow":true,"deny":"x"}"#, "neither"),
            (r#"{"allow":true,"deny":null}"#, "neither"),
            (r#"{"allow":true,"deny":{"x":true}}"#, "neither"),
            (r#"{"allow":true,"deny":[1]}"#, "no text"),
            (r#"{"allow":true,"deny":[""]}"#, "empty"),
            (r#"{"allow":true,"policies":[false]}"#, "no text"),
        ] {
            let message = said(text).unwrap_err();
            assert!(message.contains(word), "{text}: {message}");
        }
        assert!(read(&Value::Undefined).is_err());
        assert!(
            read(&Value::from(BTreeMap::from([(
                Value::from(1_u64),
                Value::Bool(true)
            )])))
            .is_err()
        );
        let many: Vec<Value> = (0..=REGO_GROUNDS_MAX)
            .map(|n| Value::from(n.to_string()))
            .collect();
        assert!(
            texts("deny", &Value::from(many))
                .unwrap_err()
                .contains("more than")
        );
        assert_eq!(cut(&"é".repeat(100)).len(), POLICY_ID_BYTES_MAX);
    }
}
