//! The built-in functions that a Rego policy may call, and the guard around each.
//!
//! Two things are not left to the engine. Its register machine treats an error inside a rule as if
//! the rule had not matched, so a `deny` that errs would be skipped and the request allowed; behind the
//! guard every error stops the evaluation. And a built-in runs to its end whatever it is given, so
//! arguments and results that could cost much are bounded before and after each call.

use std::cell::RefCell;

use regorus::rvm::vm::VmError;
use regorus::unstable::{ArithOp, BUILTINS, BuiltinFcn, Expr, Ref, Span, numbers, sets};
use regorus::{LimitError, Value};

use crate::error::clip;
use crate::limits::{
    REGO_ALLOCATED_BYTES_MAX, REGO_COLLECTION_MAX, REGO_NODES_MAX, REGO_NUMBER_BYTES_MAX,
    REGO_PATTERN_BYTES_MAX, REGO_RANGE_MAX, REGO_SHIFT_BITS_MAX, REGO_TEXT_BYTES_MAX,
    REGO_WIDTH_DIGITS_MAX,
};
use crate::rego_host::{self, HOST};

/// Why an evaluation stopped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Stop {
    /// A rule erred.
    Error(String),
    /// A bound of the evaluation was reached.
    Budget(String),
}

impl Stop {
    /// What the machine's own error means.
    pub(crate) fn of(error: &VmError) -> Self {
        match error {
            VmError::InstructionLimitExceeded { limit, .. } => {
                Self::Budget(format!("more than {limit} instructions"))
            }
            VmError::RegexSizeLimitExceeded { limit, .. } => {
                Self::Budget(format!("a pattern takes more than {limit} bytes"))
            }
            error => Self::Error(clip(&error.to_string())),
        }
    }
}

#[derive(Default)]
struct Run {
    allocated_bytes: usize,
    stop: Option<Stop>,
}

thread_local! {
    /// What the guards of the evaluation on this thread have seen: a built-in is a plain function, there
    /// is no other way to reach them. Emptied before each evaluation.
    static RUN: RefCell<Run> = RefCell::default();
}

/// Forgets what the last evaluation on this thread left.
pub(crate) fn begin() {
    RUN.with_borrow_mut(|run| *run = Run::default());
    rego_host::begin();
}

/// Why the evaluation on this thread was stopped by a guard, if it was.
pub(crate) fn stopped() -> Option<Stop> {
    RUN.with_borrow_mut(|run| run.stop.take())
}

/// What is bounded before a built-in is called.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Check {
    /// Nothing: linear in values that are bounded already.
    Linear,
    /// Walks values to their leaves.
    Deep,
    /// Reads a number from a text.
    Number,
    /// Joins texts or arrays.
    Join,
    /// Puts one text for another.
    Replace,
    /// Formats.
    Format,
    /// First argument is a pattern, the one of this number is searched.
    Pattern(usize),
    /// [`Check::Pattern`] that puts a text for each match.
    PatternReplace,
    /// Compares each with each.
    Pairs,
    /// Multiplies.
    Product,
    /// Makes as many values as a difference says.
    Range,
    /// Shifts to the left.
    Shift,
}

macro_rules! allowed {
    ($($name:literal => $check:expr),* $(,)?) => {
        /// Every built-in that a policy may call by name, sorted.
        pub(crate) const ALLOWED: &[&str] = &[$($name),*];

        /// The guarded built-in of a name, with its number of arguments.
        pub(crate) fn guarded(name: &str) -> Option<BuiltinFcn> {
            let (_, arguments) = BUILTINS.get(name)?;
            let guard: BuiltinFcn = match name {
                $($name => (
                    |span, params, values, _| run($name, $check, span, params, values),
                    *arguments,
                ),)*
                "__builtin_sets.union" => (
                    |span, params, values, _| run("__builtin_sets.union", Check::Join, span, params, values),
                    *arguments,
                ),
                "__builtin_sets.intersection" => (
                    |span, params, values, _| {
                        run("__builtin_sets.intersection", Check::Linear, span, params, values)
                    },
                    *arguments,
                ),
                _ => return None,
            };
            Some(guard)
        }
    };
}

allowed! {
    "abs" => Check::Linear,
    "array.concat" => Check::Join,
    "array.reverse" => Check::Linear,
    "array.slice" => Check::Linear,
    "base64.decode" => Check::Linear,
    "base64.encode" => Check::Linear,
    "base64.is_valid" => Check::Linear,
    "base64url.decode" => Check::Linear,
    "base64url.encode" => Check::Linear,
    "base64url.encode_no_pad" => Check::Linear,
    "bits.and" => Check::Linear,
    "bits.lsh" => Check::Shift,
    "bits.negate" => Check::Linear,
    "bits.or" => Check::Linear,
    "bits.rsh" => Check::Linear,
    "bits.xor" => Check::Linear,
    "ceil" => Check::Linear,
    "concat" => Check::Join,
    "contains" => Check::Linear,
    "count" => Check::Linear,
    "endswith" => Check::Linear,
    "floor" => Check::Linear,
    "format_int" => Check::Linear,
    "glob.match" => Check::Pattern(2),
    "glob.quote_meta" => Check::Pattern(0),
    "graph.reachable" => Check::Deep,
    "hex.decode" => Check::Linear,
    "hex.encode" => Check::Linear,
    "indexof" => Check::Linear,
    "indexof_n" => Check::Linear,
    "intersection" => Check::Deep,
    "is_array" => Check::Linear,
    "is_boolean" => Check::Linear,
    "is_null" => Check::Linear,
    "is_number" => Check::Linear,
    "is_object" => Check::Linear,
    "is_set" => Check::Linear,
    "is_string" => Check::Linear,
    "json.filter" => Check::Deep,
    "json.is_valid" => Check::Linear,
    "json.marshal" => Check::Deep,
    "json.remove" => Check::Deep,
    "json.unmarshal" => Check::Linear,
    "lower" => Check::Linear,
    "max" => Check::Deep,
    "min" => Check::Deep,
    "numbers.range" => Check::Range,
    "numbers.range_step" => Check::Range,
    "object.filter" => Check::Deep,
    "object.get" => Check::Linear,
    "object.keys" => Check::Linear,
    "object.remove" => Check::Deep,
    "object.subset" => Check::Deep,
    "object.union" => Check::Deep,
    "object.union_n" => Check::Deep,
    "product" => Check::Product,
    "regex.find_all_string_submatch_n" => Check::Pattern(1),
    "regex.find_n" => Check::Pattern(1),
    "regex.is_valid" => Check::Pattern(0),
    "regex.match" => Check::Pattern(1),
    "regex.replace" => Check::PatternReplace,
    "regex.split" => Check::Pattern(1),
    "regex.template_match" => Check::Pattern(1),
    "replace" => Check::Replace,
    "round" => Check::Linear,
    "semver.compare" => Check::Linear,
    "semver.is_valid" => Check::Linear,
    "sort" => Check::Deep,
    "split" => Check::Linear,
    "sprintf" => Check::Format,
    "startswith" => Check::Linear,
    "strings.any_prefix_match" => Check::Pairs,
    "strings.any_suffix_match" => Check::Pairs,
    "strings.count" => Check::Linear,
    "strings.reverse" => Check::Linear,
    "substring" => Check::Linear,
    "sum" => Check::Linear,
    "to_number" => Check::Number,
    "trim" => Check::Linear,
    "trim_left" => Check::Linear,
    "trim_prefix" => Check::Linear,
    "trim_right" => Check::Linear,
    "trim_space" => Check::Linear,
    "trim_suffix" => Check::Linear,
    "type_name" => Check::Linear,
    "union" => Check::Deep,
    "units.parse" => Check::Number,
    "units.parse_bytes" => Check::Number,
    "upper" => Check::Linear,
}

/// Functions that take the place of instructions of the machine, with their number of arguments.
/// Their names cannot be written in Rego.
pub(crate) const OPERATORS: [(&str, BuiltinFcn); 16] = [
    ("+", (|s, p, v, _| arithmetic(&ArithOp::Add, s, p, v), 2)),
    ("-", (|s, p, v, _| minus(s, p, v), 2)),
    ("*", (|s, p, v, _| arithmetic(&ArithOp::Mul, s, p, v), 2)),
    ("/", (|s, p, v, _| arithmetic(&ArithOp::Div, s, p, v), 2)),
    ("%", (|s, p, v, _| arithmetic(&ArithOp::Mod, s, p, v), 2)),
    ("<", (|_, _, v, _| compare("<", v, |a, b| a < b), 2)),
    ("<=", (|_, _, v, _| compare("<=", v, |a, b| a <= b), 2)),
    (">", (|_, _, v, _| compare(">", v, |a, b| a > b), 2)),
    (">=", (|_, _, v, _| compare(">=", v, |a, b| a >= b), 2)),
    ("#one", (|_, _, v, _| one(v), 2)),
    ("#same", (|_, _, v, _| same(v), 2)),
    ("#value", (|_, _, v, _| single(v), 2)),
    ("#given", (|_, _, v, _| given(v), 2)),
    ("#length", (|_, _, v, _| Ok(array_length(v)), 2)),
    (HOST, (|_, _, v, _| host(v), 2)),
    ("#defined", (|_, _, v, _| shown(v), 2)),
];

/// Stops the evaluation. The machine lets only a breach of its own limits through, so every stop is
/// dressed as one; what really happened is kept for the answer.
fn stop(why: Stop) -> anyhow::Error {
    RUN.with_borrow_mut(|run| {
        run.stop.get_or_insert(why);
    });
    anyhow::Error::new(LimitError::MemoryLimitExceeded { usage: 0, limit: 0 })
}

fn error(name: &str, message: impl std::fmt::Display) -> anyhow::Error {
    stop(Stop::Error(clip(&format!("{name}: {message}"))))
}

fn budget(name: &str, message: impl std::fmt::Display) -> anyhow::Error {
    stop(Stop::Budget(clip(&format!("{name}: {message}"))))
}

fn run(
    name: &'static str,
    check: Check,
    span: &Span,
    params: &[Ref<Expr>],
    values: &[Value],
) -> anyhow::Result<Value> {
    if let Err(why) = affordable(check, values) {
        return Err(budget(name, why));
    }
    // Where the engine differs from what Rego says: it panics on an empty text to count, counts texts
    // that overlap, counts emoji twice, and takes a version that is no text for an error.
    match (name, values) {
        ("strings.count", [Value::String(text), Value::String(sought)]) => {
            let found = match sought.is_empty() {
                true => text.chars().count() + 1,
                false => text.matches(sought.as_ref()).count(),
            };
            return Ok(Value::from(found));
        }
        // The engine counts the units of UTF-16.
        ("count", [Value::String(text)]) => return Ok(Value::from(text.chars().count())),
        ("semver.is_valid", [other]) if !matches!(other, Value::String(_)) => {
            return Ok(Value::Bool(false));
        }
        _ => {}
    }
    let Some((function, _)) = BUILTINS.get(name) else {
        return Err(error(name, "is not there"));
    };
    match function(span, params, values, true) {
        Ok(value) => made(name, value),
        Err(failure) if failure.is::<LimitError>() => Err(budget(name, failure)),
        Err(failure) => Err(error(name, first_line(&failure))),
    }
}

/// The engine writes a picture of the source around its messages, of a source that it does not know here.
fn first_line(failure: &anyhow::Error) -> String {
    let text = failure.to_string();
    let message = text
        .lines()
        .rev()
        .find_map(|line| line.trim().strip_prefix("error: "));
    message.unwrap_or(&text).to_owned()
}

/// Counts what a function made against the evaluation's memory.
fn made(name: &str, value: Value) -> anyhow::Result<Value> {
    let bytes = match &value {
        Value::String(text) => text.len(),
        other => 32 * length(other),
    };
    if bytes > REGO_TEXT_BYTES_MAX.max(32 * REGO_COLLECTION_MAX) {
        return Err(budget(name, "makes too large a value"));
    }
    charge(name, bytes)?;
    Ok(value)
}

/// Counts bytes against the evaluation's memory.
fn charge(name: &str, bytes: usize) -> anyhow::Result<()> {
    let total = RUN.with_borrow_mut(|run| {
        run.allocated_bytes = run.allocated_bytes.saturating_add(bytes);
        run.allocated_bytes
    });
    if total > REGO_ALLOCATED_BYTES_MAX {
        return Err(budget(
            name,
            format_args!("functions made more than {REGO_ALLOCATED_BYTES_MAX} bytes"),
        ));
    }
    Ok(())
}

fn length(value: &Value) -> usize {
    match value {
        Value::String(text) => text.len(),
        Value::Array(items) => items.len(),
        Value::Set(items) => items.len(),
        Value::Object(fields) => fields.len(),
        _ => 0,
    }
}

/// Whether arguments may be handed to a built-in of a kind.
fn affordable(check: Check, values: &[Value]) -> Result<(), String> {
    let at = |number: usize| values.get(number).unwrap_or(&Value::Undefined);
    let limit = |what: &str, found: usize, most: usize| {
        if found > most {
            return Err(format!("{what} is {found}, at most {most} is allowed"));
        }
        Ok(())
    };
    for value in values {
        match value {
            Value::String(text) => limit("the length of a text", text.len(), REGO_TEXT_BYTES_MAX)?,
            other => limit(
                "the length of a collection",
                length(other),
                REGO_COLLECTION_MAX,
            )?,
        }
    }
    match check {
        Check::Linear => Ok(()),
        Check::Deep => {
            let mut left = REGO_NODES_MAX;
            values.iter().try_for_each(|value| count(value, &mut left))
        }
        Check::Number => {
            limit(
                "the length of a number",
                length(at(0)),
                REGO_NUMBER_BYTES_MAX,
            )?;
            // An exponent of a few digits is a number of a few gigabytes.
            match at(0) {
                Value::String(text) if exponent(text) > 308 => {
                    Err("the exponent is too large".to_owned())
                }
                _ => Ok(()),
            }
        }
        Check::Join => {
            // concat(delimiter, texts), array.concat(a, b): the sum of what is joined.
            let mut total = 0_usize;
            for value in values {
                total = total.saturating_add(length(value));
                let each = |text: &Value| length(text).saturating_add(length(at(0)));
                match (at(0), value) {
                    (Value::String(_), Value::Array(items)) => {
                        total = items.iter().map(each).fold(total, usize::saturating_add);
                    }
                    (Value::String(_), Value::Set(items)) => {
                        total = items.iter().map(each).fold(total, usize::saturating_add);
                    }
                    _ => {}
                }
            }
            let most = match at(0) {
                Value::String(_) => REGO_TEXT_BYTES_MAX,
                _ => REGO_COLLECTION_MAX,
            };
            limit("the length of the result", total, most)
        }
        Check::Replace => {
            let places = length(at(0)) / length(at(1)).max(1) + 1;
            let total = places.saturating_mul(length(at(2)).max(1));
            limit("the length of the result", total, REGO_TEXT_BYTES_MAX)
        }
        Check::Format => {
            let mut left = REGO_NODES_MAX;
            count(at(1), &mut left)?;
            let wide = match at(0) {
                Value::String(text) => longest_digits(text),
                _ => 0,
            };
            limit(
                "the number of digits of a width",
                wide,
                REGO_WIDTH_DIGITS_MAX,
            )
        }
        Check::Pattern(text) => {
            limit(
                "the length of the pattern",
                length(at(0)),
                REGO_PATTERN_BYTES_MAX,
            )?;
            if text == 0 {
                return Ok(());
            }
            // What is searched costs the length of the pattern for each of its characters.
            let work = length(at(0)).saturating_mul(length(at(text)));
            limit("pattern times text", work, REGO_TEXT_BYTES_MAX)
        }
        Check::PatternReplace => {
            limit(
                "the length of the pattern",
                length(at(1)),
                REGO_PATTERN_BYTES_MAX,
            )?;
            let work = length(at(1)).saturating_mul(length(at(0)));
            limit("pattern times text", work, REGO_TEXT_BYTES_MAX)?;
            let groups = match at(2) {
                Value::String(text) => text.matches('$').count(),
                _ => 0,
            };
            let each = length(at(2)).saturating_add(groups.saturating_mul(length(at(0))));
            let total = each.saturating_mul(length(at(0)) + 1);
            limit("the length of the result", total, REGO_TEXT_BYTES_MAX)
        }
        Check::Pairs => {
            let each = |value: &Value| match value {
                Value::String(_) => 1,
                other => length(other),
            };
            let pairs = each(at(0)).saturating_mul(each(at(1)));
            limit("the number of comparisons", pairs, REGO_COLLECTION_MAX)
        }
        Check::Product => limit(
            "the number of factors",
            length(at(0)),
            REGO_NUMBER_BYTES_MAX,
        ),
        Check::Range => {
            let (Ok(from), Ok(to)) = (at(0).as_i64(), at(1).as_i64()) else {
                return match (at(0), at(1)) {
                    (Value::Number(_), Value::Number(_)) => {
                        Err("the bounds are too large".to_owned())
                    }
                    _ => Ok(()),
                };
            };
            let wide = usize::try_from(from.abs_diff(to)).unwrap_or(usize::MAX);
            limit("the length of the range", wide, REGO_RANGE_MAX)
        }
        Check::Shift => match (at(0), at(1).as_u64()) {
            (Value::Number(_), Ok(bits)) => {
                let bits = usize::try_from(bits).unwrap_or(usize::MAX);
                limit("the shift", bits, REGO_SHIFT_BITS_MAX)?;
                small(at(0))
            }
            (_, Err(_)) if matches!(at(1), Value::Number(_)) => Ok(()),
            _ => Ok(()),
        },
    }
}

/// Counts the parts of a value, a shared part as often as it occurs, down to nothing left.
fn count(value: &Value, left: &mut usize) -> Result<(), String> {
    let own = match value {
        Value::String(text) => 1 + text.len() / 16,
        _ => 1,
    };
    *left = left
        .checked_sub(own)
        .ok_or_else(|| format!("a value has more than {REGO_NODES_MAX} parts"))?;
    match value {
        Value::Array(items) => items.iter().try_for_each(|item| count(item, left)),
        Value::Set(items) => items.iter().try_for_each(|item| count(item, left)),
        Value::Object(fields) => fields.iter().try_for_each(|(key, field)| {
            count(key, left)?;
            count(field, left)
        }),
        _ => Ok(()),
    }
}

/// The digits behind an `e`; a letter without digits is a unit.
fn exponent(text: &str) -> u32 {
    let Some((_, behind)) = text.rsplit_once(['e', 'E']) else {
        return 0;
    };
    let digits: String = behind.chars().filter(char::is_ascii_digit).collect();
    if digits.is_empty() {
        return 0;
    }
    digits.parse().unwrap_or(u32::MAX)
}

fn longest_digits(text: &str) -> usize {
    let runs = text.split(|character: char| !character.is_numeric());
    runs.map(|digits| digits.chars().count())
        .max()
        .unwrap_or_default()
}

/// Integers grow without a bound in the engine, floating-point numbers do not.
fn small(value: &Value) -> Result<(), String> {
    match value {
        Value::Number(_) if value.as_i128().is_err() && !fits_float(value) => {
            Err("an integer is too large".to_owned())
        }
        _ => Ok(()),
    }
}

/// Whether a number is exactly what its floating-point form says.
fn fits_float(value: &Value) -> bool {
    value
        .as_f64()
        .is_ok_and(|float| Value::from(float) == *value)
}

fn arithmetic(
    op: &ArithOp,
    span: &Span,
    params: &[Ref<Expr>],
    values: &[Value],
) -> anyhow::Result<Value> {
    let name = match op {
        ArithOp::Add => "+",
        ArithOp::Sub => "-",
        ArithOp::Mul => "*",
        ArithOp::Div => "/",
        ArithOp::Mod => "%",
    };
    let ([a, b], [left, right, ..]) = (values, params) else {
        return Err(error(name, "needs two operands"));
    };
    if let Err(why) = small(a).and_then(|()| small(b)) {
        return Err(budget(name, why));
    }
    match numbers::arithmetic_operation(span, op, left, right, a.clone(), b.clone(), true) {
        Ok(value) => Ok(value),
        Err(failure) => Err(error(name, first_line(&failure))),
    }
}

fn minus(span: &Span, params: &[Ref<Expr>], values: &[Value]) -> anyhow::Result<Value> {
    match (values, params) {
        ([a @ Value::Set(_), b @ Value::Set(_)], [left, right, ..]) => {
            match sets::difference(left, right, a.clone(), b.clone()) {
                Ok(value) => made("-", value),
                Err(failure) => Err(error("-", first_line(&failure))),
            }
        }
        _ => arithmetic(&ArithOp::Sub, span, params, values),
    }
}

/// Orders two values of one type. Rego orders values of different types too, so that the text
/// `"0"` is greater than any number: a policy that compares them says what nobody means.
fn compare(
    name: &'static str,
    values: &[Value],
    holds: impl Fn(&Value, &Value) -> bool,
) -> anyhow::Result<Value> {
    match values {
        [a, b] if std::mem::discriminant(a) == std::mem::discriminant(b) => {
            Ok(Value::Bool(holds(a, b)))
        }
        [a, b] => Err(error(
            name,
            format_args!("cannot order {} and {}", kind(a), kind(b)),
        )),
        _ => Err(error(name, "needs two operands")),
    }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Set(_) => "a set",
        Value::Object(_) => "an object",
        Value::Undefined => "undefined",
    }
}

/// What two definitions of one rule say together; each is null or an array of one value.
fn one(values: &[Value]) -> anyhow::Result<Value> {
    match values {
        [Value::Null, other] | [other, Value::Null] => Ok(other.clone()),
        [a, b] if a == b => Ok(a.clone()),
        _ => Err(error("rule", "two definitions give different values")),
    }
}

/// What a rule says already beside what it says again.
fn single(values: &[Value]) -> anyhow::Result<Value> {
    match values {
        [a, b] if a == b => Ok(Value::Bool(true)),
        _ => Err(error("rule", "two definitions give different values")),
    }
}

/// What an object holds already beside what it is to hold under the same key.
fn same(values: &[Value]) -> anyhow::Result<Value> {
    match values {
        [a, b] if a == b => Ok(Value::Bool(true)),
        _ => Err(error("object", "one key gets two different values")),
    }
}

/// What a function says of arguments that are all there.
fn given(values: &[Value]) -> anyhow::Result<Value> {
    match values {
        [said, _] => Ok(said.clone()),
        _ => Err(error("function", "a call of nothing")),
    }
}

/// How long an array is that a pattern is to fit; undefined if it is none.
fn array_length(values: &[Value]) -> Value {
    match values {
        [Value::Array(items), ..] => Value::from(items.len()),
        _ => Value::Undefined,
    }
}

/// What a rewritten rule asks of the node.
fn host(values: &[Value]) -> anyhow::Result<Value> {
    match rego_host::answer(values) {
        Ok((value, parts)) => {
            charge("pattern", 32 * parts)?;
            made("with", value)
        }
        Err(why) => Err(stop(why)),
    }
}

/// A package as a document holds the rules that have a value.
fn shown(values: &[Value]) -> anyhow::Result<Value> {
    match values {
        [value, shape] => {
            let mut left = REGO_NODES_MAX;
            count(value, &mut left).map_err(|why| budget("data", why))?;
            charge("data", 32 * (REGO_NODES_MAX - left))?;
            Ok(rego_host::defined(value, shape))
        }
        _ => Err(error("data", "a call of nothing")),
    }
}

/// Why a name that is no rule cannot be called, for the author.
pub(crate) fn refusal(name: &str) -> Option<&'static str> {
    if ALLOWED.binary_search(&name).is_ok() {
        return None;
    }
    let reason = |text: &'static str| Some(text);
    match name {
        "http.send" => return reason("a decision opens no connection"),
        "opa.runtime" => return reason("a decision does not see the process"),
        "rand.intn" | "uuid.rfc4122" => return reason("every node must decide alike"),
        "trace" | "print" => return reason("a decision writes nothing: remove the call"),
        "json.patch" | "graph.reachable_paths" | "strings.replace_n" | "regex.globs_match" => {
            return reason("what it costs cannot be bounded beforehand");
        }
        "walk" => return reason("the register machine does not run it"),
        "json.match_schema" | "json.verify_schema" => {
            return reason("requests are checked against input-schema.json");
        }
        "json.marshal_with_options" => return reason("use json.marshal"),
        "array.flatten" => return reason("it is not compiled in"),
        _ => {}
    }
    let family = name.split('.').next().unwrap_or(name);
    match family {
        "time" => reason("a decision reads no clock, and time zones are not compiled in"),
        "net" => reason("names and networks are not compiled in"),
        "http" | "providers" => reason("a decision opens no connection"),
        "crypto" | "io" => reason("no cryptography is compiled into the engine"),
        "graphql" | "rego" | "yaml" | "urlquery" | "uuid" | "opa" | "rand" | "internal"
            if name.contains('.') =>
        {
            reason("it is not compiled in")
        }
        "cast_array" | "cast_boolean" | "cast_null" | "cast_object" | "cast_set"
        | "cast_string" | "re_match" | "set_diff" | "all" | "any" => {
            reason("it is deprecated in Rego and not compiled in")
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_allowed_name_is_there_and_sorted() {
        assert!(ALLOWED.is_sorted(), "{ALLOWED:?}");
        for name in ALLOWED {
            assert!(guarded(name).is_some(), "{name} is not in the engine");
            assert_eq!(refusal(name), None, "{name}");
        }
        // What the engine has beyond the list is known by name, with a reason.
        for name in BUILTINS.keys().filter(|name| !name.starts_with("__")) {
            assert!(
                guarded(name).is_some() || refusal(name).is_some(),
                "{name} is neither allowed nor refused"
            );
        }
        for impure in [
            "http.send",
            "rand.intn",
            "time.now_ns",
            "opa.runtime",
            "uuid.rfc4122",
            "net.lookup_ip_addr",
        ] {
            assert!(!BUILTINS.contains_key(impure), "{impure} is compiled in");
            assert!(refusal(impure).is_some(), "{impure}");
        }
    }

    #[test]
    fn the_book_lists_every_allowed_name() {
        let book = include_str!("../../../docs/src/rego.md");
        for name in ALLOWED {
            assert!(
                book.contains(&format!("`{name}`")),
                "{name} is not in rego.md"
            );
        }
    }
}
