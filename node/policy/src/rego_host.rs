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
use crate::rego_rewrite::{LOCALS, MERGE, NONE, REPLACED, SOME, Site, Target};

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

/// Answers a rewritten rule.
pub(crate) fn answer(values: &[Value]) -> Result<Value, Stop> {
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
