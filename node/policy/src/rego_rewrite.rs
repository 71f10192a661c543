//! Rego put into the words that the register machine knows, before it is compiled.
//!
//! The engine's compiler lacks some of what Rego has: keywords as names of rules, constant keys and variables
//! in the middle of a rule's head, defaults of functions, `with`. Each is written as rules that say the same;
//! what two of the forms need at run time is in `rego_host`. A text that needs none of it is left as it is.
//! Every line stays where it was; what is added stands behind the last one and remembers where it came from.
//!
//! Names with [`RESERVED`] in them are made by the node and nowhere else: a text that holds one is refused.

use std::collections::{BTreeMap, BTreeSet};

use regorus::unstable::{AssignOp, Expr, Literal, LiteralStmt, Module, Query, Ref, Rule, RuleHead};
use regorus::{Engine, Value};

use crate::limits::{REGO_PATTERN_LEVELS_MAX, REGO_WITH_LEVELS_MAX, REGO_WITH_MAX};
use crate::rego_pattern::patterns;
use crate::rego_program::read;
use crate::rego_source::{constant, globals, path};
use crate::rego_text::{
    Edit, RESERVED, Text, apply, begins_with_keyword, is_name, key_name, keyword_name, keywords,
    quoted, unmade,
};
use crate::rego_walk::{
    binds, bounds, declared, for_each_every, for_each_expr, for_each_statement, in_expr,
    in_literal, in_query, in_rule, line, outside, place, scope, variables, whole, written,
};

/// Function that makes one document of the parts of a rule with a general head.
pub(crate) const MERGE: &str = "tidelock__merge";
/// Functions that evaluate a statement with other input or data: all its solutions, and whether it has none.
pub(crate) const SOME: &str = "tidelock__some_";
pub(crate) const NONE: &str = "tidelock__none_";
/// The rule that holds the statement.
pub(crate) const WITH: &str = "tidelock__with_";
/// Where the variables of the statement stand in its data, and the values of rules that it replaces.
pub(crate) const LOCALS: &str = "tidelock__locals";
pub(crate) const REPLACED: &str = "tidelock__replaced";
/// Functions that give the values of an object, or of each element of a collection, as a pattern asks for them;
/// and whether a collection holds a value under a key.
pub(crate) const FIELDS: &str = "tidelock__fields";
pub(crate) const EACH: &str = "tidelock__each";
pub(crate) const ENTRIES: &str = "tidelock__entries";
pub(crate) const MEMBER: &str = "tidelock__member";
const PART: &str = "tidelock__part_";
const ENTRY: &str = "tidelock__entry";
const DEFAULTED: &str = "tidelock__defaulted_";

/// What a `with` puts in another one's place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Target {
    /// The input, or a part of it.
    Input(Vec<String>),
    /// A part of the data.
    Data(Vec<String>),
    /// A rule.
    Rule(String),
}

/// One statement with `with`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Site {
    /// The rule that holds the statement.
    pub(crate) rule: String,
    pub(crate) targets: Vec<Target>,
}

/// What cannot be written in other words: file, line, why.
pub(crate) type Refusal = (String, usize, String);

/// One part of a rule's path.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Part {
    Name(String),
    /// An expression, as it is written; whether it is a constant.
    Key(String, bool),
}

/// The parts of a reference; nothing if it is none.
fn parts(expr: &Expr) -> Option<Vec<Part>> {
    match expr {
        Expr::Var {
            value: Value::String(name),
            ..
        } => Some(vec![Part::Name(name.to_string())]),
        Expr::RefDot {
            refr,
            field: (_, Value::String(name)),
            ..
        } => {
            let mut found = parts(refr)?;
            found.push(Part::Name(name.to_string()));
            Some(found)
        }
        Expr::RefBrack { refr, index, .. } => {
            let mut found = parts(refr)?;
            found.push(match index.as_ref() {
                Expr::String {
                    value: Value::String(name),
                    ..
                }
                | Expr::RawString {
                    value: Value::String(name),
                    ..
                } => Part::Name(name.to_string()),
                other => Part::Key(written(other.span()), constant(other)),
            });
            Some(found)
        }
        _ => None,
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Value,
    Set,
    Function,
    Default,
}

/// One definition of a rule.
struct Definition {
    module: usize,
    rule: usize,
    /// Names from the root of the data to the first key.
    ground: Vec<String>,
    keys: Vec<Part>,
    kind: Kind,
    package: usize,
}

fn package(module: &Module) -> Vec<String> {
    let names = parts(&module.package.refr).unwrap_or_default();
    names
        .into_iter()
        .map(|part| match part {
            Part::Name(name) | Part::Key(name, _) => name,
        })
        .collect()
}

fn definitions(modules: &[&Module]) -> Vec<Definition> {
    let mut found = Vec::new();
    for (number, module) in modules.iter().enumerate() {
        let package = package(module);
        for (rule, definition) in module.policy.iter().enumerate() {
            let (refr, kind) = match definition.as_ref() {
                Rule::Spec {
                    head: RuleHead::Compr { refr, .. },
                    ..
                } => (refr, Kind::Value),
                Rule::Spec {
                    head: RuleHead::Set { refr, .. },
                    ..
                } => (refr, Kind::Set),
                Rule::Spec {
                    head: RuleHead::Func { refr, .. },
                    ..
                } => (refr, Kind::Function),
                Rule::Default { refr, args, .. } => match args.is_empty() {
                    true => (refr, Kind::Default),
                    false => (refr, Kind::Function),
                },
            };
            let Some(parts) = parts(refr) else { continue };
            let names = parts
                .iter()
                .position(|part| matches!(part, Part::Key(..)))
                .unwrap_or(parts.len());
            let (names, keys) = parts.split_at(names);
            let names = names.iter().filter_map(|part| match part {
                Part::Name(name) => Some(name.clone()),
                Part::Key(..) => None,
            });
            found.push(Definition {
                module: number,
                rule,
                ground: package.iter().cloned().chain(names).collect(),
                keys: keys.to_vec(),
                kind,
                package: package.len(),
            });
        }
    }
    found
}

/// A head whose last part is a constant text: `p["x"]` is `p.x`. What is no name gets a made one, in heads
/// and wherever it is read. Keywords that have got made names somewhere get them however they are spelled.
fn constant_keys(texts: &mut [Text], modules: &[&Module], named: bool) -> bool {
    let mut made = BTreeSet::new();
    let mut edits: Vec<Vec<Edit>> = texts.iter().map(|_| Vec::new()).collect();
    let last = |expr: &Expr| match expr {
        Expr::RefBrack { refr, index, .. } => match index.as_ref() {
            Expr::String {
                span,
                value: Value::String(name),
                ..
            }
            | Expr::RawString {
                span,
                value: Value::String(name),
                ..
            } => Some((bounds(refr.span()), bounds(span), name.to_string())),
            _ => None,
        },
        _ => None,
    };
    let heads = |module: &Module| {
        let mut found = Vec::new();
        for rule in &module.policy {
            match rule.as_ref() {
                Rule::Spec {
                    head:
                        RuleHead::Compr { refr, .. }
                        | RuleHead::Set { refr, .. }
                        | RuleHead::Func { refr, .. },
                    ..
                }
                | Rule::Default { refr, .. } => found.extend(last(refr)),
            }
        }
        found
    };
    for module in modules {
        made.extend(
            heads(module)
                .into_iter()
                .map(|(_, _, name)| name)
                .filter(|name| !is_name(name)),
        );
    }
    for ((text, edits), module) in texts.iter().zip(&mut edits).zip(modules) {
        for (_, (from, to), name) in heads(module) {
            let name = match is_name(&name) {
                true => name,
                false => key_name(&name),
            };
            // From the bracket before the key to the one behind it.
            let (Some(open), Some(close)) = (
                text.text.get(..from).and_then(|text| text.rfind('[')),
                text.text.get(to..).and_then(|text| text.find(']')),
            ) else {
                continue;
            };
            edits.push(Edit {
                from: open,
                to: to + close + 1,
                with: format!(".{name}"),
            });
        }
        let mut read = |expr: &Expr| {
            if let Expr::RefBrack { index, .. } = expr
                && let Expr::String {
                    span,
                    value: Value::String(name),
                    ..
                }
                | Expr::RawString {
                    span,
                    value: Value::String(name),
                    ..
                } = index.as_ref()
            {
                // The compiler takes a text for a name only with quotation marks.
                let raw = matches!(index.as_ref(), Expr::RawString { .. });
                let with = match made.contains(name.as_ref()) {
                    true => format!("\"{}\"", key_name(name)),
                    false => match keyword_name(name).filter(|_| named) {
                        Some(name) => format!("\"{name}\""),
                        None if raw => quoted(name),
                        None => return,
                    },
                };
                let (from, to) = whole(&text.text, span);
                if !edits.iter().any(|edit| edit.from <= from && to <= edit.to) {
                    edits.push(Edit { from, to, with });
                }
            }
        };
        in_expr(&module.package.refr, &mut read);
        for import in &module.imports {
            in_expr(&import.refr, &mut read);
        }
        for rule in &module.policy {
            let (Rule::Spec {
                head:
                    RuleHead::Compr { refr, .. }
                    | RuleHead::Set { refr, .. }
                    | RuleHead::Func { refr, .. },
                ..
            }
            | Rule::Default { refr, .. }) = rule.as_ref();
            in_expr(refr, &mut read);
        }
        for_each_expr(module, &mut read);
    }
    let changed = edits.iter().any(|edits| !edits.is_empty());
    for (text, edits) in texts.iter_mut().zip(edits) {
        apply(&mut text.text, edits);
    }
    changed
}

/// What the compiler could take for new variables in the body of an `every`.
fn retaken(query: &Query) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    let mut called = BTreeSet::new();
    let mut each = |expr: &Expr| {
        let mut all =
            |expr: &Expr| in_expr(expr, &mut |part| variables(part, &mut names, &mut called));
        match expr {
            Expr::RefBrack { index, .. } => all(index),
            Expr::AssignExpr {
                op: AssignOp::Eq,
                lhs,
                rhs,
                ..
            } => {
                all(lhs);
                all(rhs);
            }
            Expr::Call { params, .. } if params.len() > 1 => {
                params.last().into_iter().for_each(|last| all(last));
            }
            _ => {}
        }
    };
    in_query(query, &mut each);
    names.remove("_");
    names
}

/// Gives the variables of `every` other names, and its body variables of the author's names: as an index or
/// beside `=` the compiler takes those of `every` itself for new ones. Variables from around the `every` stand in
/// its domain too: the compiler orders statements by the domain alone, and would take what is bound later for new.
fn everies(texts: &mut [Text], modules: &[&Module]) -> Result<bool, Refusal> {
    let mut count = 0_usize;
    let mut changed = false;
    for (text, module) in texts.iter_mut().zip(modules) {
        let global = globals(module);
        let mut edits = Vec::new();
        let mut unread = None;
        for rule in &module.policy {
            for_each_every(rule, &mut |statement, around| {
                let Literal::Every {
                    key,
                    value,
                    domain,
                    query,
                    ..
                } = &statement.literal
                else {
                    return;
                };
                let mut taken = retaken(query);
                let mut bound = String::new();
                for span in key.iter().chain([value]) {
                    let name = span.text();
                    if !taken.remove(name) {
                        continue;
                    }
                    let (from, to) = bounds(span);
                    let with = format!("{RESERVED}every_{count}");
                    bound.push_str(&format!(" {name} := {with};"));
                    edits.push(Edit { from, to, with });
                    count += 1;
                }
                let own = scope(query, &BTreeSet::new());
                taken.retain(|name| {
                    let outer = around.contains(name) && !own.contains(name);
                    outer && !global.contains(name) && !matches!(name.as_str(), "input" | "data")
                });
                let domain = place(&text.text, domain);
                let open = bounds(&query.span).0;
                let open = Some(open).filter(|open| {
                    text.text
                        .as_bytes()
                        .get(*open)
                        .is_some_and(|byte| *byte == b'{')
                });
                let (Some(open), Some((from, to))) = (open, domain) else {
                    unread = Some(line(&statement.span));
                    return;
                };
                edits.push(Edit {
                    from: open + 1,
                    to: open + 1,
                    with: bound,
                });
                if !taken.is_empty() {
                    let taken: Vec<String> = taken.into_iter().collect();
                    let (before, behind) = ("[".to_owned(), format!(", {}][0]", taken.join(", ")));
                    for (at, with) in [(from, before), (to, behind)] {
                        edits.push(Edit {
                            from: at,
                            to: at,
                            with,
                        });
                    }
                    changed = true;
                }
            });
        }
        if let Some(line) = unread {
            let why = "an `every` whose body could not be read".to_owned();
            return Err((text.path.clone(), line, why));
        }
        apply(&mut text.text, edits);
    }
    Ok(changed || count > 0)
}

/// A reference that spells the name of a rule otherwise than the rule is spelled by now would find nothing.
fn missed(texts: &[Text], modules: &[&Module]) -> Result<(), Refusal> {
    let found = definitions(modules);
    let made: Vec<(&[String], Vec<String>)> = found
        .iter()
        .map(|definition| definition.ground.as_slice())
        .filter(|ground| ground.iter().any(|name| unmade(name).is_some()))
        .map(|ground| (ground, authors(ground)))
        .collect();
    if made.is_empty() {
        return Ok(());
    }
    for (text, module) in texts.iter().zip(modules) {
        let own = package(module);
        let imports = imports(module);
        let mut fault = None;
        let mut look = |expr: &Expr| {
            let Some(Some((Part::Name(root), rest))) =
                parts(expr).map(|parts| parts.split_first().map(|(a, b)| (a.clone(), b.to_vec())))
            else {
                return;
            };
            let mut path = match (root.as_str(), imports.get(&root)) {
                ("data", _) => Vec::new(),
                (_, Some(path)) => path.clone(),
                _ => own.iter().cloned().chain([root]).collect(),
            };
            path.extend(rest.into_iter().map_while(|part| match part {
                Part::Name(name) => Some(name),
                Part::Key(..) => None,
            }));
            let said = authors(&path);
            if made
                .iter()
                .any(|(ground, name)| said.starts_with(name) && !path.starts_with(ground))
            {
                fault = Some(line(expr.span()));
            }
        };
        for import in &module.imports {
            look(&import.refr);
        }
        for_each_expr(module, &mut look);
        if let Some(line) = fault {
            let why =
                "a rule's name is spelled in another way than where it is defined: spell it alike";
            return Err((text.path.clone(), line, why.to_owned()));
        }
    }
    Ok(())
}

/// The default of a function: the function asks what the other definitions say, else says the default.
fn function_defaults(texts: &mut [Text], modules: &[&Module]) -> Result<bool, Refusal> {
    let mut defaults = BTreeMap::new();
    for (number, module) in modules.iter().enumerate() {
        let package = package(module);
        for rule in &module.policy {
            if let Rule::Default {
                span, refr, args, ..
            } = rule.as_ref()
                && !args.is_empty()
                && let Some(name) = path(refr)
            {
                let key = (package.clone(), name);
                let index = defaults.len();
                if defaults.insert(key, (index, number, args.len())).is_some() {
                    let at = texts.get(number).map(|text| text.path.clone());
                    return Err((
                        at.unwrap_or_default(),
                        line(span),
                        "a function has two defaults".to_owned(),
                    ));
                }
            }
        }
    }
    if defaults.is_empty() {
        return Ok(false);
    }
    let mut defined = BTreeSet::new();
    for (text, module) in texts.iter_mut().zip(modules) {
        let package = package(module);
        let mut edits = Vec::new();
        for rule in &module.policy {
            if let Rule::Spec {
                head: RuleHead::Func { refr, args, .. },
                ..
            } = rule.as_ref()
                && let Some(name) = path(refr)
                && let Some((index, _, takes)) = defaults.get(&(package.clone(), name))
            {
                if args.len() != *takes {
                    let why = "a default with another number of arguments than its function";
                    return Err((text.path.clone(), line(refr.span()), why.to_owned()));
                }
                defined.insert(*index);
                let (from, to) = bounds(refr.span());
                edits.push(Edit {
                    from,
                    to,
                    with: format!("{DEFAULTED}{index}"),
                });
            }
        }
        apply(&mut text.text, edits);
    }
    // What was edited has moved, so the defaults are looked for anew.
    let modules = parsed_by(&mut parse(texts)?);
    for (text, module) in texts.iter_mut().zip(refs(&modules)) {
        let package = package(module);
        let mut edits = Vec::new();
        for rule in &module.policy {
            let Rule::Default {
                span,
                refr,
                args,
                value,
                ..
            } = rule.as_ref()
            else {
                continue;
            };
            let Some(name) = path(refr).filter(|_| !args.is_empty()) else {
                continue;
            };
            let Some((index, _, takes)) = defaults.get(&(package.clone(), name.clone())) else {
                continue;
            };
            let names: Vec<String> = (0..*takes).map(|n| format!("{RESERVED}a{n}")).collect();
            let names = names.join(", ");
            let (from, to) = bounds(span);
            let (start, end) = whole(&text.text, value.span());
            let value = text.text.get(start..end).unwrap_or_default();
            let to = to.max(end);
            let with = match defined.contains(index) {
                true => format!(
                    "{name}({names}) := {RESERVED}v if {{ {RESERVED}v := {DEFAULTED}{index}({names}) }} else := {value}"
                ),
                false => format!("{name}({names}) := {value}"),
            };
            edits.push(Edit { from, to, with });
        }
        apply(&mut text.text, edits);
    }
    Ok(true)
}

/// Rules whose heads the machine cannot make one document of: each definition says its part, and the
/// document is made of the parts.
fn families(texts: &mut [Text], modules: &[&Module], entry: &[String]) -> Result<bool, Refusal> {
    let found = definitions(modules);
    let reads = reads(modules, entry);
    let documents: Vec<&Definition> = found
        .iter()
        .filter(|definition| definition.kind != Kind::Function)
        .collect();
    let refuse = |definition: &Definition, why: &str| {
        let at = texts.get(definition.module).map(|text| text.path.clone());
        let span = modules
            .get(definition.module)
            .and_then(|module| module.policy.get(definition.rule))
            .map_or(1, |rule| line(rule.span()));
        (at.unwrap_or_default(), span, why.to_owned())
    };
    let mut grounds: BTreeMap<&[String], Vec<&Definition>> = BTreeMap::new();
    for definition in &found {
        grounds
            .entry(definition.ground.as_slice())
            .or_default()
            .push(definition);
    }
    let deeper = |ground: &[String]| {
        use std::ops::Bound::{Excluded, Unbounded};
        grounds
            .range::<[String], _>((Excluded(ground), Unbounded))
            .next()
            .is_some_and(|(next, _)| next.starts_with(ground))
    };
    let mut roots: BTreeSet<&[String]> = BTreeSet::new();
    for definition in &documents {
        let own = definition.ground.as_slice();
        let alone = match (definition.kind, definition.keys.as_slice()) {
            (_, []) => true,
            (Kind::Value, [Part::Key(_, false)]) => {
                !deeper(own)
                    && grounds.get(own).is_none_or(|others| {
                        others
                            .iter()
                            .all(|other| other.kind == Kind::Value && other.keys.len() == 1)
                    })
            }
            _ => false,
        };
        if !alone {
            roots.insert(own);
        }
        // The engine takes what stands before the last name of a head for a rule of its own, with all that
        // begins so for its definitions. It must not be read.
        let first = own.get(..=definition.package).unwrap_or(own);
        let read = |shorter: &[String]| reads.contains(shorter);
        if first != own && (0..own.len()).any(|names| own.get(..names).is_some_and(read)) {
            roots.insert(first);
        }
    }
    for definition in &documents {
        let own = definition.ground.as_slice();
        let contradicts = definition.keys.is_empty()
            && (deeper(own)
                || (roots.contains(own) && definition.kind != Kind::Default)
                || grounds.get(own).is_some_and(|others| {
                    others.iter().any(|other| {
                        other.keys.is_empty()
                            && other.kind != definition.kind
                            && other.kind != Kind::Default
                            && definition.kind != Kind::Default
                    })
                }));
        if contradicts {
            return Err(refuse(
                definition,
                "another rule defines a part of this one: they contradict each other",
            ));
        }
    }
    let mut minimal: Vec<Vec<String>> = Vec::new();
    for root in roots {
        if !minimal.last().is_some_and(|last| root.starts_with(last)) {
            minimal.push(root.to_vec());
        }
    }
    if minimal.is_empty() {
        return Ok(false);
    }
    let called = found
        .iter()
        .filter(|definition| definition.kind == Kind::Function)
        .find(|definition| {
            minimal
                .iter()
                .any(|root| definition.ground.starts_with(root))
        });
    if let Some(function) = called {
        return Err(refuse(
            function,
            "its name begins with that of a document which is read as a whole",
        ));
    }
    let mut edits: Vec<Vec<Edit>> = texts.iter().map(|_| Vec::new()).collect();
    let mut tails: Vec<(usize, usize, String)> = Vec::new();
    for (number, root) in minimal.iter().enumerate() {
        let part = format!("{PART}{number}");
        let mut named: BTreeMap<&[String], usize> = BTreeMap::new();
        let mut home = None;
        for definition in documents
            .iter()
            .filter(|definition| definition.ground.starts_with(root))
        {
            let (at, package_names) = *home.get_or_insert((definition.module, definition.package));
            let own = modules.get(definition.module).map(|module| package(module));
            let first = modules.get(at).map(|module| package(module));
            if own != first || package_names >= root.len() {
                return Err(refuse(
                    definition,
                    "rules of two packages define one document",
                ));
            }
            let (Some(text), Some(rule), Some(edits)) = (
                texts.get(definition.module),
                modules
                    .get(definition.module)
                    .and_then(|module| module.policy.get(definition.rule)),
                edits.get_mut(definition.module),
            ) else {
                continue;
            };
            let below = definition.ground.get(root.len()..).unwrap_or_default();
            if definition.keys.is_empty() {
                let count = named.len();
                let index = *named.entry(definition.ground.as_slice()).or_insert(count);
                let name = format!("{part}_{index}");
                if index == count {
                    let keys: Vec<String> = below.iter().map(|name| quoted(name)).collect();
                    let keys = keys.join(", ");
                    let kind = match definition.kind {
                        Kind::Set => "union",
                        _ => "value",
                    };
                    tails.push((
                        at,
                        line(rule.span()),
                        format!("{part} contains [[{keys}], \"{kind}\", {name}]"),
                    ));
                }
                let refr = match rule.as_ref() {
                    Rule::Spec {
                        head:
                            RuleHead::Compr { refr, .. }
                            | RuleHead::Set { refr, .. }
                            | RuleHead::Func { refr, .. },
                        ..
                    }
                    | Rule::Default { refr, .. } => refr,
                };
                let (from, to) = bounds(refr.span());
                edits.push(Edit {
                    from,
                    to,
                    with: name,
                });
                continue;
            }
            let Rule::Spec { head, bodies, .. } = rule.as_ref() else {
                return Err(refuse(definition, "a default below a key that is no name"));
            };
            if bodies.iter().any(|body| body.is_else) || bodies.len() > 1 {
                return Err(refuse(definition, "`else` below a key that is no name"));
            }
            let keys: Vec<String> = below
                .iter()
                .map(|name| quoted(name))
                .chain(definition.keys.iter().map(|part| match part {
                    Part::Name(name) => quoted(name),
                    Part::Key(text, _) => text.clone(),
                }))
                .collect();
            let keys = keys.join(", ");
            let said = match head {
                RuleHead::Compr { span, assign, .. } => {
                    let value = assign.as_ref().and_then(|assign| {
                        let from = bounds(&assign.span).0;
                        let text = text.text.get(from..whole(&text.text, span).1)?.trim_start();
                        Some(
                            text.strip_prefix(":=")
                                .or_else(|| text.strip_prefix('='))
                                .unwrap_or(text)
                                .to_owned(),
                        )
                    });
                    Some((span, "value", value.unwrap_or_else(|| "true".to_owned())))
                }
                RuleHead::Set { span, refr, .. } => {
                    let behind = text
                        .text
                        .get(bounds(refr.span()).1..whole(&text.text, span).1)
                        .and_then(|text| text.split_once("contains"));
                    behind.map(|(_, key)| (span, "member", key.to_owned()))
                }
                RuleHead::Func { .. } => None,
            };
            let Some((span, kind, value)) = said else {
                return Err(refuse(definition, "a head that is not run here"));
            };
            let (from, to) = whole(&text.text, span);
            edits.push(Edit {
                from,
                to,
                with: format!("{part} contains [[{keys}], \"{kind}\", {}]", value.trim()),
            });
        }
        if let Some((module, package_names)) = home {
            let mut name = String::new();
            for (place, step) in root
                .get(package_names..)
                .unwrap_or_default()
                .iter()
                .enumerate()
            {
                match (place, is_name(step)) {
                    (0, _) => name.push_str(step),
                    (_, true) => name.push_str(&format!(".{step}")),
                    (_, false) => name.push_str(&format!(".{}", key_name(step))),
                }
            }
            let first = documents
                .iter()
                .find(|definition| definition.ground.starts_with(root));
            let at = first.map_or(1, |definition| refuse(definition, "").1);
            tails.push((module, at, format!("{name} := {MERGE}({part})")));
        }
    }
    for (text, edits) in texts.iter_mut().zip(edits) {
        apply(&mut text.text, edits);
    }
    for (module, at, rule) in tails {
        if let Some(text) = texts.get_mut(module) {
            text.append(&rule, at);
        }
    }
    Ok(true)
}

/// What references read, as far as their names say: from the root of the data.
fn reads(modules: &[&Module], entry: &[String]) -> BTreeSet<Vec<String>> {
    let names = |parts: &[Part]| -> Vec<String> {
        parts
            .iter()
            .map_while(|part| match part {
                Part::Name(name) => Some(name.clone()),
                Part::Key(..) => None,
            })
            .collect()
    };
    let mut found = BTreeSet::from([entry.to_vec()]);
    for module in modules {
        let package = package(module);
        let imports = imports(module);
        found.extend(imports.values().cloned());
        for rule in &module.policy {
            // The longest reference of those that begin at one place comes first.
            let mut seen = BTreeSet::new();
            in_rule(rule, &mut |expr| {
                let expr = match expr {
                    Expr::Call { fcn, .. } => {
                        seen.insert(fcn.span().start);
                        return;
                    }
                    Expr::Var { .. } | Expr::RefDot { .. } | Expr::RefBrack { .. } => expr,
                    _ => return,
                };
                if !seen.insert(expr.span().start) {
                    return;
                }
                let Some(parts) = parts(expr) else { return };
                let Some((Part::Name(root), rest)) = parts.split_first() else {
                    return;
                };
                if root == "input" {
                    return;
                }
                // A variable of the same name is taken for a reference too: that costs nothing but laziness.
                let own = package.iter().cloned().chain([root.clone()]).collect();
                let roots = match root.as_str() {
                    "data" => vec![Vec::new()],
                    root => [Some(own), imports.get(root).cloned()]
                        .into_iter()
                        .flatten()
                        .collect(),
                };
                for mut path in roots {
                    path.extend(names(rest));
                    found.insert(path);
                }
            });
        }
    }
    found
}

/// The names that the imports of a module make.
fn imported(module: &Module) -> BTreeSet<String> {
    let each = module.imports.iter().filter_map(|import| {
        let last = parts(&import.refr)?.pop()?;
        match (&import.r#as, last) {
            (Some(name), _) => Some(name.text().to_owned()),
            (None, Part::Name(last)) => Some(last),
            (None, Part::Key(..)) => None,
        }
    });
    each.collect()
}

/// A reference with a variable where names of rules are: what it reads of such a rule's value is written as
/// keys, because the compiler takes names for a longer rule's and does not find the one that is there.
fn dispatched(texts: &mut [Text], modules: &[&Module]) -> bool {
    let found = definitions(modules);
    let rules: BTreeSet<&[String]> = found
        .iter()
        .filter(|definition| definition.kind != Kind::Function)
        .map(|definition| definition.ground.as_slice())
        .collect();
    let mut changed = false;
    for (text, module) in texts.iter_mut().zip(modules) {
        let mut edits = Vec::new();
        let mut seen = BTreeSet::new();
        for_each_expr(module, &mut |expr| {
            if !matches!(expr, Expr::RefDot { .. } | Expr::RefBrack { .. })
                || !seen.insert(expr.span().start)
            {
                return;
            }
            let Some(parts) = parts(expr) else { return };
            let Some((Part::Name(root), path)) = parts.split_first() else {
                return;
            };
            let dynamic = path.iter().any(|part| matches!(part, Part::Key(..)));
            if root != "data" || !dynamic {
                return;
            }
            let fits = |rule: &&&[String]| {
                rule.len() < path.len()
                    && path
                        .iter()
                        .zip(rule.iter())
                        .any(|(part, _)| matches!(part, Part::Key(..)))
                    && path.iter().zip(rule.iter()).all(|(part, name)| match part {
                        Part::Name(part) => part == name,
                        Part::Key(..) => true,
                    })
            };
            let shortest = rules.iter().filter(fits).map(|rule| rule.len()).min();
            let Some(behind) = shortest else {
                return;
            };
            let mut node = expr;
            for part in path.iter().skip(behind).rev() {
                let refr = match node {
                    Expr::RefDot { refr, .. } | Expr::RefBrack { refr, .. } => refr,
                    _ => return,
                };
                if let Part::Name(name) = part {
                    edits.push(Edit {
                        from: bounds(refr.span()).1,
                        to: bounds(node.span()).1,
                        with: format!("[`{name}`]"),
                    });
                }
                node = refr;
            }
        });
        // A text in brackets that is raw already stays as it is.
        edits.retain(|edit| text.text.get(edit.from..edit.to) != Some(edit.with.as_str()));
        changed |= !edits.is_empty();
        apply(&mut text.text, edits);
    }
    changed
}

/// What the imports of a module stand for, by name: paths from the root of the data.
fn imports(module: &Module) -> BTreeMap<String, Vec<String>> {
    let each = module.imports.iter().filter_map(|import| {
        let names: Option<Vec<String>> = parts(&import.refr)?
            .into_iter()
            .map(|part| match part {
                Part::Name(name) => Some(name),
                Part::Key(..) => None,
            })
            .collect();
        let names = names?;
        let (root, path) = names.split_first()?;
        let name = import.r#as.as_ref().map_or_else(
            || names.last().cloned(),
            |name| Some(name.text().to_owned()),
        );
        (root == "data").then_some((name?, path.to_vec()))
    });
    each.collect()
}

/// Puts each statement with `with` into a rule of its own, the innermost first.
fn withs(texts: &mut [Text], modules: &[&Module], sites: &mut Vec<Site>) -> Result<bool, Refusal> {
    let found = definitions(modules);
    let functions: BTreeSet<&[String]> = found
        .iter()
        .filter(|definition| definition.kind == Kind::Function)
        .map(|definition| definition.ground.as_slice())
        .collect();
    let mut rules: BTreeSet<&[String]> = found
        .iter()
        .filter(|definition| definition.kind != Kind::Function)
        .map(|definition| definition.ground.as_slice())
        .collect();
    let packages: Vec<Vec<String>> = modules.iter().map(|module| package(module)).collect();
    rules.retain(|rule| {
        !rule
            .iter()
            .any(|name| name.starts_with(RESERVED) && unmade(name).is_none())
    });
    let mut changed = false;
    for (number, module) in modules.iter().enumerate() {
        let package = packages.get(number).cloned().unwrap_or_default();
        let imported = imported(module);
        let Some(text) = texts.get_mut(number) else {
            continue;
        };
        let mut edits = Vec::new();
        let mut tails = Vec::new();
        for rule in &module.policy {
            let mut statements = Vec::new();
            for_each_statement(rule, &mut |statement| {
                if !statement.with_mods.is_empty() {
                    statements.push(statement);
                }
            });
            let inner = |statement: &LiteralStmt| {
                let (from, to) = bounds(&statement.span);
                !statements.iter().any(|other| {
                    let (start, end) = bounds(&other.span);
                    from <= start && end <= to && (start, end) != (from, to)
                })
            };
            for statement in statements
                .iter()
                .copied()
                .filter(|statement| inner(statement))
            {
                let at = line(&statement.span);
                let refuse = |why: &str| {
                    (
                        text.path.clone(),
                        at,
                        format!("`with` is not allowed: {why}"),
                    )
                };
                if sites.len() >= REGO_WITH_MAX {
                    return Err(refuse(&format!("more than {REGO_WITH_MAX} in one bundle")));
                }
                let mut targets = Vec::new();
                let mut values = Vec::new();
                for modifier in &statement.with_mods {
                    targets.push(
                        target(&modifier.refr, &rules, &functions, &packages).map_err(refuse)?,
                    );
                    let (from, to) = (
                        bounds(modifier.refr.span()).1,
                        whole(&text.text, &modifier.span).1,
                    );
                    let value = text
                        .text
                        .get(from..to)
                        .map(str::trim_start)
                        .and_then(|text| text.strip_prefix("as"))
                        .filter(|text| {
                            text.starts_with(|c: char| !c.is_ascii_alphanumeric() && c != '_')
                        })
                        .ok_or_else(|| refuse("its value could not be read"))?;
                    values.push(value.trim().to_owned());
                }
                let (from, to) = whole(&text.text, &statement.span);
                let until = statement
                    .with_mods
                    .first()
                    .map_or(to, |modifier| bounds(&modifier.span).0);
                let stated = text.text.get(from..until).unwrap_or_default().trim_end();
                let (negated, body) = match &statement.literal {
                    Literal::NotExpr { .. } => (
                        true,
                        stated
                            .strip_prefix("not")
                            .ok_or_else(|| refuse("it could not be read"))?
                            .trim_start(),
                    ),
                    Literal::SomeVars { .. } => {
                        return Err(refuse("a declaration has nothing to replace"));
                    }
                    _ => (false, stated),
                };
                let is_global = |name: &str| {
                    let mut rule = package.clone();
                    rule.push(name.to_owned());
                    ["input", "data", "_"].contains(&name)
                        || imported.contains(name)
                        || rules
                            .iter()
                            .chain(&functions)
                            .any(|other| other.starts_with(&rule))
                };
                let mut local = BTreeSet::new();
                declared(rule, &mut local);
                local.remove("_");
                // Functions' names are none of its variables.
                let mut names = BTreeSet::new();
                let mut called = BTreeSet::new();
                in_literal(&statement.literal, &mut |expr| {
                    variables(expr, &mut names, &mut called)
                });
                if let Some(name) = names
                    .iter()
                    .find(|name| is_global(name) && local.contains(*name))
                {
                    return Err(refuse(&format!(
                        "`{name}` is a variable and a rule: rename one"
                    )));
                }
                names.retain(|name| !is_global(name));
                let mut own = BTreeSet::new();
                binds(&statement.literal, &mut own);
                let mut elsewhere = BTreeSet::new();
                let mut sure = BTreeSet::new();
                let mut doubtful = BTreeSet::new();
                outside(rule, statement, &mut elsewhere, &mut sure, &mut doubtful);
                let (mut captured, mut given) = (Vec::new(), Vec::new());
                for name in names.into_iter().filter(|name| elsewhere.contains(name)) {
                    if own.contains(&name) && !negated {
                        given.push(name);
                    } else if sure.contains(&name) || negated {
                        captured.push(name);
                    } else if doubtful.contains(&name) {
                        return Err(refuse(&format!(
                            "bind `{name}` with `:=` or `some … in` first"
                        )));
                    } else {
                        given.push(name);
                    }
                }
                let index = sites.len();
                let captured = captured.join(", ");
                let given = given.join(", ");
                let values = values.join(", ");
                let call = match negated {
                    true => format!("{NONE}{index}([{captured}], [{values}])"),
                    false if given.is_empty() => {
                        format!("some _ in {SOME}{index}([{captured}], [{values}])")
                    }
                    false => format!("some [{given}] in {SOME}{index}([{captured}], [{values}])"),
                };
                let locals = match captured.is_empty() {
                    true => String::new(),
                    false => format!("[{captured}] := data.{LOCALS}; "),
                };
                tails.push((
                    format!("{WITH}{index} := [[{given}] | {locals}{body}\n]"),
                    at,
                ));
                edits.push(Edit {
                    from,
                    to,
                    with: call,
                });
                let spelled = module.package.refr.span().text();
                sites.push(Site {
                    rule: format!("data.{spelled}.{WITH}{index}"),
                    targets,
                });
            }
        }
        changed |= !edits.is_empty();
        apply(&mut text.text, edits);
        for (rule, at) in tails {
            text.append(&rule, at);
        }
    }
    Ok(changed)
}

/// Names as their author wrote them.
fn authors(path: &[String]) -> Vec<String> {
    path.iter()
        .map(|name| unmade(name).unwrap_or_else(|| name.clone()))
        .collect()
}

/// What a modifier puts in another one's place.
fn target(
    refr: &Expr,
    rules: &BTreeSet<&[String]>,
    functions: &BTreeSet<&[String]>,
    packages: &[Vec<String>],
) -> Result<Target, &'static str> {
    let names: Option<Vec<String>> = parts(refr).and_then(|parts| {
        parts
            .into_iter()
            .map(|part| match part {
                Part::Name(name) => Some(name),
                Part::Key(..) => None,
            })
            .collect()
    });
    let names = names.ok_or("name what it replaces without variables")?;
    match names.split_first() {
        Some((root, path)) if root == "input" => Ok(Target::Input(authors(path))),
        Some((root, path)) if root == "data" && !path.is_empty() => {
            let shown = |path: &[String]| {
                let mut text = "data".to_owned();
                for name in path {
                    match is_name(name) {
                        true => text.push_str(&format!(".{name}")),
                        false => text.push_str(&format!("[\"{name}\"]")),
                    }
                }
                text
            };
            if functions.contains(path) {
                return Err("functions are not replaced");
            }
            if rules.contains(path) {
                return Ok(Target::Rule(shown(path)));
            }
            if rules.iter().any(|rule| rule.starts_with(path))
                || packages.iter().any(|package| package.starts_with(path))
            {
                return Err("a package is not replaced: name the rule");
            }
            if rules.iter().any(|rule| path.starts_with(rule)) {
                return Err("a part of a rule is not replaced: name the rule");
            }
            Ok(Target::Data(authors(path)))
        }
        Some((root, [])) if root == "data" => Err("all data at once are not replaced"),
        _ => Err("functions are not replaced, only input, data and rules"),
    }
}

/// What an engine has parsed.
fn parsed_by(engine: &mut Engine) -> Vec<Ref<Module>> {
    engine.get_modules().clone()
}

fn parse(texts: &[Text]) -> Result<Engine, Refusal> {
    read(texts).map_err(|fault| (fault.file, fault.line, fault.message))
}

/// What was made of texts.
pub(crate) struct Rewritten {
    pub(crate) texts: Vec<Text>,
    pub(crate) sites: Vec<Site>,
    /// What is asked.
    pub(crate) entry: String,
    /// Whether keywords have got made names.
    keywords: bool,
}

/// Names that are made here are not the author's to use.
fn reserved(texts: &[Text]) -> Result<(), Refusal> {
    for text in texts {
        for word in [RESERVED, "__builtin_"] {
            if let Some(at) = text.text.find(word) {
                let line = text
                    .text
                    .get(..at)
                    .unwrap_or_default()
                    .matches('\n')
                    .count()
                    + 1;
                let why = format!("`{word}` is not allowed: the name is reserved");
                return Err((text.path.clone(), line, why));
            }
        }
    }
    Ok(())
}

/// Names that stand in the place of keywords. First, because nothing parses before.
pub(crate) fn first(mut texts: Vec<Text>) -> Result<Rewritten, Refusal> {
    reserved(&texts)?;
    let found = texts.iter().any(|text| begins_with_keyword(&text.text));
    if found {
        for text in &mut texts {
            text.text = keywords(&text.text);
        }
    }
    Ok(Rewritten {
        texts,
        sites: Vec::new(),
        entry: String::new(),
        keywords: found,
    })
}

/// Whether something to ask is a rule, or a document of rules or in one.
enum Reached {
    Rule,
    Document,
}

fn reached(modules: &[&Module], entry: &[String]) -> Reached {
    let found = definitions(modules);
    let mut documents = found
        .iter()
        .filter(|definition| definition.kind != Kind::Function);
    let near = documents.clone().any(|definition| {
        definition.ground.starts_with(entry) || entry.starts_with(&definition.ground)
    });
    match near && !documents.any(|definition| definition.ground == entry) {
        true => Reached::Document,
        false => Reached::Rule,
    }
}

/// Everything else, of texts that an engine has parsed: with the engine that has parsed what was made of them.
pub(crate) fn rest(
    mut rewritten: Rewritten,
    mut engine: Engine,
    entry: &str,
) -> Result<(Rewritten, Engine), Refusal> {
    rewritten.entry = match rewritten.keywords {
        true => keywords(entry),
        false => entry.to_owned(),
    };
    let entry: Vec<String> = rewritten
        .entry
        .split('.')
        .skip(1)
        .map(str::to_owned)
        .collect();
    let texts = &mut rewritten.texts;
    let mut parsed = parsed_by(&mut engine);
    let (mut made, mut levels) = (0, 0);
    // Each turn writes what stands innermost.
    while patterns(texts, &refs(&parsed), &mut made)? {
        levels += 1;
        if levels > REGO_PATTERN_LEVELS_MAX {
            let first = texts.first().map(|text| text.path.clone());
            let why = format!(
                "memberships with keys stand in one another more than {REGO_PATTERN_LEVELS_MAX} deep"
            );
            return Err((first.unwrap_or_default(), 1, why));
        }
        engine = parse(texts)?;
        parsed = parsed_by(&mut engine);
    }
    if everies(texts, &refs(&parsed))? {
        engine = parse(texts)?;
        parsed = parsed_by(&mut engine);
    }
    if constant_keys(texts, &refs(&parsed), rewritten.keywords) {
        engine = parse(texts)?;
        parsed = parsed_by(&mut engine);
    }
    if function_defaults(texts, &refs(&parsed))? {
        engine = parse(texts)?;
        parsed = parsed_by(&mut engine);
    }
    if families(texts, &refs(&parsed), &entry)? {
        engine = parse(texts)?;
        parsed = parsed_by(&mut engine);
    }
    rewritten.entry = match reached(&refs(&parsed), &entry) {
        Reached::Rule => rewritten.entry,
        Reached::Document => {
            let rule = format!("package {ENTRY}\n\nvalue := {}\n", rewritten.entry);
            texts.push(Text::new(ENTRY, &rule));
            engine = parse(texts)?;
            parsed = parsed_by(&mut engine);
            format!("data.{ENTRY}.value")
        }
    };
    missed(texts, &refs(&parsed))?;
    if dispatched(texts, &refs(&parsed)) {
        engine = parse(texts)?;
        parsed = parsed_by(&mut engine);
    }
    let mut levels = 0;
    while withs(texts, &refs(&parsed), &mut rewritten.sites)? {
        levels += 1;
        if levels > REGO_WITH_LEVELS_MAX {
            let first = texts.first().map(|text| text.path.clone());
            let why = format!("`with` stands in `with` more than {REGO_WITH_LEVELS_MAX} deep");
            return Err((first.unwrap_or_default(), 1, why));
        }
        engine = parse(texts)?;
        parsed = parsed_by(&mut engine);
    }
    Ok((rewritten, engine))
}

fn refs(parsed: &[Ref<Module>]) -> Vec<&Module> {
    parsed.iter().map(AsRef::as_ref).collect()
}
