//! What rewritten rules ask of the node while they run: one document of its parts, and the solutions of a
//! statement with other input or data.
//!
//! A statement with `with` stands in a rule of its own. It is evaluated by a machine of its own, with the same
//! program, the changed input and data and nothing remembered, within bounds of its own. What stops it stops
//! all.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use regorus::Value;
use regorus::rvm::Program;
use regorus::rvm::vm::VmError;

use crate::limits::{REGO_FUEL, REGO_NODES_MAX, REGO_WITH_FUEL, REGO_WITH_RUNS_MAX};
use crate::rego_builtins::{Stop, stopped};
use crate::rego_program::machine;
use crate::rego_rewrite::{
    EACH, ENTRIES, FIELDS, LOCALS, MEMBER, MERGE, NONE, REPLACED, SOME, Site, Target,
};

/// The name of the function in programs; it cannot be written in Rego.
pub(crate) const HOST: &str = "#host";

/// What every evaluation of one bundle's rules has in common.
pub(crate) struct Shared {
    pub(crate) program: Arc<Program>,
    pub(crate) sites: Vec<Site>,
}

/// What one machine was given.
#[derive(Clone)]
struct Frame {
    shared: Arc<Shared>,
    data: Value,
    input: Value,
}

#[derive(Default)]
struct Frames {
    open: Vec<Frame>,
    runs: usize,
}

thread_local! {
    /// The machines that are running on this thread, the innermost last. Emptied before each evaluation.
    static FRAMES: RefCell<Frames> = RefCell::default();
}

/// Forgets what the last evaluation on this thread left.
pub(crate) fn begin() {
    FRAMES.with_borrow_mut(|frames| *frames = Frames::default());
}

/// Evaluates one entry point.
pub(crate) fn within(
    shared: &Arc<Shared>,
    data: &Value,
    input: Value,
    entry: usize,
) -> Result<Value, VmError> {
    let mut machine = machine(&shared.program, data.clone())?;
    machine.set_max_instructions(match entry {
        0 => REGO_FUEL,
        _ => REGO_WITH_FUEL,
    });
    machine.set_input(input.clone());
    if shared.sites.is_empty() {
        return machine.execute_entry_point_by_index(entry);
    }
    FRAMES.with_borrow_mut(|frames| {
        frames.open.push(Frame {
            shared: Arc::clone(shared),
            data: data.clone(),
            input,
        });
    });
    let said = machine.execute_entry_point_by_index(entry);
    FRAMES.with_borrow_mut(|frames| frames.open.pop());
    said
}

/// Answers a rewritten rule; with how many parts it made beside those of its outermost value.
pub(crate) fn answer(values: &[Value]) -> Result<(Value, usize), Stop> {
    let [Value::Array(arguments), Value::String(name)] = values else {
        return Err(Stop::Error("a call of nothing".to_owned()));
    };
    let kind = match name.as_ref() {
        FIELDS => Ask::Fields,
        EACH => Ask::Each,
        ENTRIES => Ask::Entries,
        MEMBER => return Ok((member(arguments.as_slice())?, 0)),
        _ => return Ok((solved(values)?, 0)),
    };
    match arguments.as_slice() {
        [value, Value::Array(wanted)] => ask(kind, value, wanted.as_slice()),
        _ => Err(Stop::Error("a call of nothing".to_owned())),
    }
}

/// What a pattern asks for.
enum Ask {
    /// The values of one object.
    Fields,
    /// Those of each element of a collection.
    Each,
    /// Those of each key and each element.
    Entries,
}

/// A pattern, read from its words.
enum Wanted {
    Value,
    Array(Vec<Wanted>),
    Object(Vec<(Value, Wanted)>),
}

impl Wanted {
    /// Reads one pattern, and what stands behind it.
    fn read(words: &[Value]) -> Option<(Self, &[Value])> {
        let (Value::String(kind), mut rest) = words.split_first()? else {
            return None;
        };
        if kind.as_ref() == "value" {
            return Some((Self::Value, rest));
        }
        let (count, behind) = rest.split_first()?;
        rest = behind;
        let count = count.as_u64().ok()?;
        let (mut items, mut fields) = (Vec::new(), Vec::new());
        for _ in 0..count {
            let named = match kind.as_ref() {
                "object" => {
                    let (key, behind) = rest.split_first()?;
                    rest = behind;
                    Some(key.clone())
                }
                _ => None,
            };
            let (wanted, behind) = Self::read(rest)?;
            rest = behind;
            match named {
                Some(key) => fields.push((key, wanted)),
                None => items.push(wanted),
            }
        }
        match kind.as_ref() {
            "array" => Some((Self::Array(items), rest)),
            "object" => Some((Self::Object(fields), rest)),
            _ => None,
        }
    }

    /// What a value gives; nothing if the pattern does not fit it. Counts what it makes.
    fn of(&self, value: &Value, parts: &mut usize) -> Option<Value> {
        *parts += 1;
        match (self, value) {
            (Self::Value, Value::Undefined) => None,
            (Self::Value, value) => Some(value.clone()),
            (Self::Array(wanted), Value::Array(items)) if wanted.len() == items.len() => {
                let each = wanted.iter().zip(items.iter());
                let given: Option<Vec<Value>> =
                    each.map(|(wanted, item)| wanted.of(item, parts)).collect();
                given.map(Value::from)
            }
            (Self::Object(wanted), Value::Object(fields)) if wanted.len() == fields.len() => {
                let each = wanted.iter();
                let given: Option<Vec<Value>> = each
                    .map(|(key, wanted)| wanted.of(fields.get(key)?, parts))
                    .collect();
                given.map(Value::from)
            }
            (Self::Array(_) | Self::Object(_), _) => None,
        }
    }
}

/// What a pattern asks a value for; undefined if that has none of it.
fn ask(kind: Ask, value: &Value, words: &[Value]) -> Result<(Value, usize), Stop> {
    let nothing = || Stop::Error("a call of nothing".to_owned());
    let (first, rest) = Wanted::read(words).ok_or_else(nothing)?;
    let second = Wanted::read(rest).map(|(second, _)| second);
    let mut parts = 0;
    if let Ask::Fields = kind {
        let given = first.of(value, &mut parts);
        return Ok((given.unwrap_or(Value::Undefined), parts));
    }
    let entries: Vec<(Value, Value)> = match value {
        Value::Array(items) => {
            let items = items.iter().enumerate();
            items
                .map(|(at, item)| (Value::from(at), item.clone()))
                .collect()
        }
        Value::Set(items) => items
            .iter()
            .map(|item| (item.clone(), item.clone()))
            .collect(),
        Value::Object(fields) => {
            let fields = fields.iter_sorted();
            fields
                .map(|(key, field)| (key.clone(), field.clone()))
                .collect()
        }
        // There is nothing in what is no collection.
        _ => Vec::new(),
    };
    let mut given = Vec::new();
    for (key, item) in &entries {
        let found = match (&kind, &second) {
            (Ask::Entries, Some(second)) => first
                .of(key, &mut parts)
                .zip(second.of(item, &mut parts))
                .map(|(key, item)| Value::from(vec![key, item])),
            (Ask::Entries, None) => return Err(nothing()),
            _ => first.of(item, &mut parts),
        };
        given.extend(found);
        if parts > REGO_NODES_MAX {
            let message = format!("a pattern asks for more than {REGO_NODES_MAX} parts");
            return Err(Stop::Budget(message));
        }
    }
    Ok((Value::from(given), parts))
}

/// Whether a collection holds a value under a key. In a set each element is its own key.
fn member(arguments: &[Value]) -> Result<Value, Stop> {
    let asked = match arguments {
        [Value::Array(asked), Value::Bool(true)] => asked.as_slice(),
        _ => &[],
    };
    let [key, value, collection] = asked else {
        return Err(Stop::Error("a call of nothing".to_owned()));
    };
    let found = match collection {
        Value::Array(items) => {
            let at = key.as_u64().ok().and_then(|at| usize::try_from(at).ok());
            at.and_then(|at| items.get(at)) == Some(value)
        }
        Value::Object(fields) => fields.get(key) == Some(value),
        Value::Set(items) => key == value && items.contains(key),
        _ => false,
    };
    Ok(Value::Bool(found))
}

/// One document of its parts, or the solutions of a statement.
fn solved(values: &[Value]) -> Result<Value, Stop> {
    let [Value::Array(arguments), Value::String(name)] = values else {
        return Err(Stop::Error("a call of nothing".to_owned()));
    };
    let arguments = arguments.as_slice();
    match (name.as_ref(), arguments) {
        (MERGE, [parts]) => merge(parts),
        (name, [captured, given]) => {
            let site = name.strip_prefix(SOME).or_else(|| name.strip_prefix(NONE));
            let site = site.and_then(|number| number.parse().ok());
            let said = replaced(site.unwrap_or(usize::MAX), captured, given)?;
            match (name.starts_with(NONE), &said) {
                (true, Value::Array(solutions)) => Ok(Value::Bool(solutions.is_empty())),
                (false, Value::Array(_)) => Ok(said),
                _ => Err(Stop::Error(
                    "a statement with `with` has no answer".to_owned(),
                )),
            }
        }
        _ => Err(Stop::Error("a call of nothing".to_owned())),
    }
}

/// The solutions of a statement with other input or data.
fn replaced(number: usize, captured: &Value, given: &Value) -> Result<Value, Stop> {
    let (frame, runs) = FRAMES.with_borrow_mut(|frames| {
        frames.runs += 1;
        (frames.open.last().cloned(), frames.runs)
    });
    if runs > REGO_WITH_RUNS_MAX {
        let message = format!("more than {REGO_WITH_RUNS_MAX} evaluations of `with`");
        return Err(Stop::Budget(message));
    }
    let Some(Frame {
        shared,
        mut data,
        mut input,
    }) = frame
    else {
        return Err(Stop::Error("a call of nothing".to_owned()));
    };
    let (Some(site), Value::Array(given)) = (shared.sites.get(number), given) else {
        return Err(Stop::Error("a call of nothing".to_owned()));
    };
    if site.targets.len() != given.len() {
        return Err(Stop::Error("a call of nothing".to_owned()));
    }
    put(&mut data, &[LOCALS], captured.clone());
    for (target, value) in site.targets.iter().zip(given.iter()) {
        match target {
            Target::Input(path) => put(&mut input, &borrowed(path), value.clone()),
            Target::Data(path) => put(&mut data, &borrowed(path), value.clone()),
            Target::Rule(name) => put(&mut data, &[REPLACED, name], value.clone()),
        }
    }
    within(&shared, &data, input, number + 1)
        .map_err(|error| stopped().unwrap_or_else(|| Stop::of(&error)))
}

fn borrowed(path: &[String]) -> Vec<&str> {
    path.iter().map(String::as_str).collect()
}

/// Puts a value where a path leads; what is no object on the way becomes one.
fn put(place: &mut Value, path: &[&str], value: Value) {
    let Some((name, rest)) = path.split_first() else {
        *place = value;
        return;
    };
    let mut fields: BTreeMap<Value, Value> = match &*place {
        Value::Object(fields) => fields
            .iter()
            .map(|(name, field)| (name.clone(), field.clone()))
            .collect(),
        _ => BTreeMap::new(),
    };
    put(
        fields.entry(Value::from(*name)).or_insert(Value::Undefined),
        rest,
        value,
    );
    *place = Value::from(fields);
}

/// A document while it is being made.
enum Node {
    Value(Value),
    Members(BTreeSet<Value>),
    Fields(BTreeMap<Value, Node>),
}

impl Node {
    fn finish(self) -> Value {
        match self {
            Self::Value(value) => value,
            Self::Members(members) => Value::from(members),
            Self::Fields(fields) => {
                let fields = fields.into_iter().map(|(key, node)| (key, node.finish()));
                Value::from(fields.collect::<BTreeMap<_, _>>())
            }
        }
    }
}

/// One document of parts: each an array of keys, a kind and a value. Parts that contradict each other stop.
fn merge(parts: &Value) -> Result<Value, Stop> {
    let contradiction = || Stop::Error("rule: two definitions give different values".to_owned());
    let Value::Set(parts) = parts else {
        return Err(Stop::Error("a call of nothing".to_owned()));
    };
    let mut root = Node::Fields(BTreeMap::new());
    let mut steps = 0_usize;
    for part in parts.iter() {
        let Value::Array(part) = part else {
            return Err(Stop::Error("a call of nothing".to_owned()));
        };
        let [Value::Array(keys), Value::String(kind), value] = part.as_slice() else {
            return Err(Stop::Error("a call of nothing".to_owned()));
        };
        let members: Option<BTreeSet<Value>> = match (kind.as_ref(), value) {
            ("value", _) => None,
            ("member", member) => Some(BTreeSet::from([member.clone()])),
            ("union", Value::Set(members)) => Some(members.iter().cloned().collect()),
            _ => return Err(Stop::Error("a call of nothing".to_owned())),
        };
        steps += keys.len() + members.as_ref().map_or(1, BTreeSet::len);
        if steps > REGO_NODES_MAX {
            let message = format!("a rule makes a document of more than {REGO_NODES_MAX} parts");
            return Err(Stop::Budget(message));
        }
        let Some((last, way)) = keys.as_slice().split_last() else {
            return Err(contradiction());
        };
        let mut fields = match &mut root {
            Node::Fields(fields) => fields,
            _ => return Err(contradiction()),
        };
        for key in way {
            let next = fields
                .entry(key.clone())
                .or_insert_with(|| Node::Fields(BTreeMap::new()));
            fields = match next {
                Node::Fields(fields) => fields,
                _ => return Err(contradiction()),
            };
        }
        match (fields.get_mut(last), members) {
            (None, None) => _ = fields.insert(last.clone(), Node::Value(value.clone())),
            (None, Some(members)) => _ = fields.insert(last.clone(), Node::Members(members)),
            (Some(Node::Value(held)), None) if held == value => {}
            (Some(Node::Members(held)), Some(members)) => held.extend(members),
            _ => return Err(contradiction()),
        }
    }
    Ok(root.finish())
}

/// What the engine shows of a package, without its rules that are undefined. The shape says where rules are.
pub(crate) fn defined(value: &Value, shape: &Value) -> Value {
    let (Value::Object(fields), Value::Object(places)) = (value, shape) else {
        return value.clone();
    };
    let kept = fields.iter().filter_map(|(name, field)| {
        let field = match places.get(name) {
            None => field.clone(),
            Some(_) if *field == Value::Undefined => return None,
            Some(shape) => defined(field, shape),
        };
        Some((name.clone(), field))
    });
    Value::from(kept.collect::<BTreeMap<_, _>>())
}
