//! Patterns with objects and memberships with keys, in words that the register machine compares by.
//!
//! The engine's compiler lets a pattern with an object match bigger objects and ignores the key of a membership.
//! Here `{"a": x} := v` becomes `[x] := fields(v)`: a function that is defined only for an object with exactly
//! these keys and gives its values in their order, so that arrays are all that the compiler has to compare.
//! One statement stays one statement. What has no such form is found for the author to write otherwise.

use std::collections::{BTreeMap, BTreeSet};

use regorus::Value;
use regorus::unstable::{
    AssignOp, Expr, Literal, LiteralStmt, Module, Query, Ref, Rule, RuleBody, RuleHead, Span,
};

use crate::rego_rewrite::{EACH, ENTRIES, FIELDS, MEMBER, Refusal};
use crate::rego_source::{constant, globals, wildcard};
use crate::rego_text::{Edit, RESERVED, Text, apply};
use crate::rego_walk::{
    bounds, children, declared_by_some, in_expr, line, outside, pattern, place, scope, spelled,
    whole, written,
};

/// Functions that ask for the values of a pattern; the number of a module and of a pattern follow.
const ASK: &str = "tidelock__ask_";
/// Definitions of functions whose arguments are patterns, by the arrays that these became.
const CASE: &str = "tidelock__case_";

/// What is refused for a pattern with an object in it.
pub(crate) const PATTERN: &str = "{…} as a pattern";
/// How to write it.
pub(crate) const MEMBERS: &str = "name the members one by one (`x := y.member`), and compare with `==`: bigger objects would match too";
const KEYS: &str = "its keys must be constants";
const PARTS: &str = "its values must be variables, constants, references, arrays or objects";
const NEVER: &str = "the two sides are never equal";
const READ: &str = "where it begins could not be read";
const BOUND: &str = "bind the other side with `:=` or `some … in` first";

/// Line and reason.
pub(crate) type Unwritten = (usize, &'static str);

/// Whether an expression is, or holds as a literal, an object.
pub(crate) fn objects(expr: &Expr) -> bool {
    match expr {
        Expr::Object { .. } => true,
        Expr::Array { items, .. } | Expr::Set { items, .. } => {
            items.iter().any(|item| objects(item))
        }
        _ => false,
    }
}

/// Whether a literal has a variable where a pattern could bind it, or where it is a key.
fn open(expr: &Expr) -> bool {
    match expr {
        Expr::Var {
            value: Value::String(name),
            ..
        } => !matches!(name.as_ref(), "input" | "data"),
        Expr::Array { items, .. } | Expr::Set { items, .. } => items.iter().any(|item| open(item)),
        Expr::Object { fields, .. } => fields.iter().any(|(_, _, value)| open(value)),
        _ => false,
    }
}

/// Whether the compiler could take an expression for a pattern.
fn bindable(expr: &Expr) -> bool {
    let name = match expr {
        Expr::Var {
            value: Value::String(name),
            ..
        } => name.as_ref(),
        _ => "",
    };
    name != "_" && open(expr)
}

/// Whether a literal has an object with a key that is no constant.
fn computed(expr: &Expr) -> bool {
    match expr {
        Expr::Array { items, .. } => items.iter().any(|item| computed(item)),
        Expr::Object { fields, .. } => fields
            .iter()
            .any(|(_, key, value)| !scalar(key) || computed(value)),
        _ => false,
    }
}

fn scalar(expr: &Expr) -> bool {
    matches!(
        expr,
        Expr::String { .. }
            | Expr::RawString { .. }
            | Expr::Number { .. }
            | Expr::Bool { .. }
            | Expr::Null { .. }
    )
}

/// The value of a key.
fn key(expr: &Expr) -> Option<Value> {
    match expr {
        Expr::String { value, .. }
        | Expr::RawString { value, .. }
        | Expr::Number { value, .. }
        | Expr::Bool { value, .. } => Some(value.clone()),
        Expr::Null { .. } => Some(Value::Null),
        _ => None,
    }
}

/// A reference that has one value: nothing in its brackets but constants.
fn single(expr: &Expr) -> bool {
    match expr {
        Expr::Var { .. } => true,
        Expr::RefDot { refr, .. } => single(refr),
        Expr::RefBrack { refr, index, .. } => single(refr) && scalar(index),
        _ => false,
    }
}

/// An expression as it is written.
fn own(expr: &Expr) -> Result<String, Unwritten> {
    let text = expr.span().source.get_contents();
    spelled(text, expr).ok_or_else(|| (line(expr.span()), READ))
}

/// A pattern in other words: what is bound, and what the value is asked for.
#[derive(Clone, PartialEq, Eq)]
struct Words {
    bound: String,
    asked: Vec<String>,
}

/// The words of a pattern: each object an array of its values.
fn words(expr: &Expr) -> Result<Words, Unwritten> {
    let at = line(expr.span());
    let joined = |head: Vec<String>, parts: Vec<(Option<String>, Words)>| {
        let mut asked = head;
        asked.push(parts.len().to_string());
        let mut bound = Vec::new();
        for (key, part) in parts {
            asked.extend(key);
            asked.extend(part.asked);
            bound.push(part.bound);
        }
        Words {
            bound: format!("[{}]", bound.join(", ")),
            asked,
        }
    };
    match expr {
        Expr::Object { fields, .. } => {
            let parts: Result<Vec<_>, Unwritten> = fields
                .iter()
                .map(|(_, key, value)| match scalar(key) {
                    true => Ok((Some(own(key)?), words(value)?)),
                    false => Err((at, KEYS)),
                })
                .collect();
            Ok(joined(vec!["\"object\"".to_owned()], parts?))
        }
        Expr::Array { items, .. } => {
            let parts: Result<Vec<_>, Unwritten> =
                items.iter().map(|item| Ok((None, words(item)?))).collect();
            Ok(joined(vec!["\"array\"".to_owned()], parts?))
        }
        other if single(other) || constant(other) => Ok(Words {
            bound: own(other)?,
            asked: vec!["\"value\"".to_owned()],
        }),
        _ => Err((at, PARTS)),
    }
}

/// What is certain of names.
struct Known<'k> {
    /// Whether a name has a value whatever the statement says.
    valued: &'k dyn Fn(&str) -> bool,
    /// Whether nothing but the statement can give a name its value.
    only_here: &'k dyn Fn(&str) -> bool,
}

/// The two sides of `=`, where they differ from what is written.
#[derive(Clone, PartialEq, Eq)]
enum Sides {
    Alike,
    /// No variable is bound by them: `==`.
    Compared,
    /// Texts of the left and the right side.
    Other(Side, Side),
}

/// One side of `=` in other words.
#[derive(Clone, PartialEq, Eq)]
enum Side {
    Text(String),
    /// The value of an expression, as a pattern asks for it.
    Asked(String, Vec<String>),
    /// Several sides, as an array.
    Array(Vec<Side>),
}

/// The sides of `=` in other words.
fn sides(left: &Expr, right: &Expr, known: &Known<'_>) -> Result<Sides, Unwritten> {
    if !objects(left) && !objects(right) {
        return Ok(Sides::Alike);
    }
    let literal = |side: &Expr| matches!(side, Expr::Array { .. } | Expr::Object { .. });
    if !open(left) && !open(right) {
        let both = literal(left) && literal(right);
        return match both && (computed(left) || computed(right)) {
            true => Ok(Sides::Compared),
            false => Ok(Sides::Alike),
        };
    }
    let (one, other) = pair(left, right, known)?;
    match one.is_made() || other.is_made() || one.differs(left)? || other.differs(right)? {
        false => Ok(Sides::Alike),
        true => Ok(Sides::Other(one, other)),
    }
}

impl Side {
    fn is_made(&self) -> bool {
        !matches!(self, Self::Text(_))
    }

    fn differs(&self, expr: &Expr) -> Result<bool, Unwritten> {
        Ok(*self != Self::Text(own(expr)?))
    }
}

fn pair(left: &Expr, right: &Expr, known: &Known<'_>) -> Result<(Side, Side), Unwritten> {
    let text = |expr: &Expr| Ok::<_, Unwritten>(Side::Text(own(expr)?));
    let never = Err((line(left.span()), NEVER));
    if !objects(left) && !objects(right) {
        return Ok((text(left)?, text(right)?));
    }
    match (left, right) {
        (Expr::Array { items: one, .. }, Expr::Array { items: other, .. }) => {
            if one.len() != other.len() {
                return never;
            }
            let (one, other) = all(one.iter().zip(other), known)?;
            // Arrays of which nothing has other words stay as they are.
            match (&one, &other) {
                (Side::Array(a), Side::Array(b)) if !a.iter().chain(b).any(Side::is_made) => {
                    Ok((text(left)?, text(right)?))
                }
                _ => Ok((one, other)),
            }
        }
        (Expr::Object { fields: one, .. }, Expr::Object { fields: other, .. }) => {
            let named =
                |fields: &[(_, Ref<Expr>, Ref<Expr>)]| -> Option<BTreeMap<Value, Ref<Expr>>> {
                    let each = fields.iter();
                    each.map(|(_, name, value)| Some((key(name)?, value.clone())))
                        .collect()
                };
            let (Some(one), Some(other)) = (named(one), named(other)) else {
                return Err((line(left.span()), KEYS));
            };
            if !one.keys().eq(other.keys()) {
                return never;
            }
            all(one.values().zip(other.values()), known)
        }
        (Expr::Array { .. } | Expr::Object { .. }, other) if objects(left) => {
            against(left, other, known)
        }
        (other, Expr::Array { .. } | Expr::Object { .. }) if objects(right) => {
            let (pattern, value) = against(right, other, known)?;
            Ok((value, pattern))
        }
        // A set with an object in it binds nothing.
        _ => Ok((text(left)?, text(right)?)),
    }
}

fn all<'e>(
    pairs: impl Iterator<Item = (&'e Ref<Expr>, &'e Ref<Expr>)>,
    known: &Known<'_>,
) -> Result<(Side, Side), Unwritten> {
    let pairs: Result<Vec<_>, Unwritten> = pairs
        .map(|(left, right)| pair(left, right, known))
        .collect();
    let (left, right) = pairs?.into_iter().unzip();
    Ok((Side::Array(left), Side::Array(right)))
}

/// A literal with an object in it beside something that is no such literal.
fn against(literal: &Expr, other: &Expr, known: &Known<'_>) -> Result<(Side, Side), Unwritten> {
    let at = line(literal.span());
    let kept = |expr: &Expr| Ok::<_, Unwritten>(Side::Text(own(expr)?));
    if let Expr::Var {
        value: Value::String(name),
        ..
    } = other
        && !(known.valued)(name)
    {
        let mut names = BTreeSet::new();
        pattern(literal, &mut names);
        // The literal is a value that is given to the variable, which has none yet.
        let valued = names.iter().all(|name| (known.valued)(name));
        return match (valued || (known.only_here)(name)) && !in_sets(literal) {
            true => Ok((kept(literal)?, kept(other)?)),
            false => Err((at, BOUND)),
        };
    }
    if scalar(other) || matches!(other, Expr::Array { .. } | Expr::Object { .. }) {
        return Err((at, NEVER));
    }
    let Words { bound, asked } = words(literal)?;
    Ok((Side::Text(bound), Side::Asked(own(other)?, asked)))
}

/// Whether a literal has a set with variables in it.
fn in_sets(expr: &Expr) -> bool {
    match expr {
        Expr::Set { .. } => !constant(expr),
        Expr::Array { items, .. } => items.iter().any(|item| in_sets(item)),
        Expr::Object { fields, .. } => fields.iter().any(|(_, _, value)| in_sets(value)),
        _ => false,
    }
}

/// One place that is written in other words.
struct Place {
    from: usize,
    to: usize,
    edits: Vec<Edit>,
    /// Rules to stand behind the text, with their lines.
    tails: Vec<(String, usize)>,
}

/// A look at one module: what is to be written in other words, and what cannot be.
struct Look<'t> {
    text: &'t str,
    module: usize,
    global: &'t BTreeSet<String>,
    /// The rule that is looked at.
    rule: Option<&'t Rule>,
    /// Names that it declares itself.
    declared: BTreeSet<String>,
    places: Vec<Place>,
    /// The tails of the next place.
    tails: Vec<(String, usize)>,
    unwritten: Vec<Unwritten>,
    /// How many names are made.
    made: usize,
}

/// What of a module's patterns has no other words.
pub(crate) fn unwritten(module: &Module, global: &BTreeSet<String>) -> Vec<Unwritten> {
    let mut look = Look::new(module.package.span.source.get_contents(), 0, 0, global);
    look.rules(module);
    look.unwritten
}

/// Writes what stands innermost in other words. Whether there was something.
pub(crate) fn patterns(
    texts: &mut [Text],
    modules: &[&Module],
    made: &mut usize,
) -> Result<bool, Refusal> {
    let mut changed = false;
    for (number, (text, module)) in texts.iter_mut().zip(modules).enumerate() {
        let global = globals(module);
        let mut look = Look::new(&text.text, number, *made, &global);
        look.rules(module);
        if let Some((line, why)) = look.unwritten.first() {
            let why = format!("`{PATTERN}` is not allowed: {why}; {MEMBERS}");
            return Err((text.path.clone(), *line, why));
        }
        *made = look.made;
        let places = look.places;
        changed |= !places.is_empty();
        let inner = |place: &Place| {
            !places.iter().any(|other| {
                let within = place.from <= other.from && other.to <= place.to;
                within && (place.from, place.to) != (other.from, other.to)
            })
        };
        let kept: Vec<bool> = places.iter().map(inner).collect();
        let (mut edits, mut tails) = (Vec::new(), Vec::new());
        for (place, kept) in places.into_iter().zip(kept) {
            if kept {
                edits.extend(place.edits);
                tails.extend(place.tails);
            }
        }
        apply(&mut text.text, edits);
        for (rule, line) in tails {
            text.append(&rule, line);
        }
    }
    Ok(changed)
}

impl<'t> Look<'t> {
    fn new(text: &'t str, module: usize, made: usize, global: &'t BTreeSet<String>) -> Self {
        Self {
            text,
            module,
            global,
            rule: None,
            declared: BTreeSet::new(),
            places: Vec::new(),
            tails: Vec::new(),
            unwritten: Vec::new(),
            made,
        }
    }

    fn rules(&mut self, module: &'t Module) {
        for rule in &module.policy {
            let Rule::Spec { head, bodies, .. } = rule.as_ref() else {
                continue;
            };
            self.rule = Some(rule);
            self.declared = declared_by_some(rule);
            let mut known = BTreeSet::new();
            if let RuleHead::Func { args, .. } = head {
                args.iter()
                    .for_each(|argument| pattern(argument, &mut known));
            }
            self.head(head, bodies, &known);
            for body in bodies {
                self.body(body, &known);
            }
        }
    }

    fn head(&mut self, head: &RuleHead, bodies: &[RuleBody], known: &BTreeSet<String>) {
        let (span, refr, value) = match head {
            RuleHead::Compr { span, refr, assign } => (span, refr, assign.as_ref()),
            RuleHead::Set { span, refr, key } => {
                key.iter().for_each(|key| self.expr(key, known));
                (span, refr, None)
            }
            RuleHead::Func {
                span,
                refr,
                args,
                assign,
            } => {
                if args.iter().any(|argument| objects(argument)) {
                    self.arguments(refr, args);
                }
                (span, refr, assign.as_ref())
            }
        };
        self.expr(refr, known);
        if let Some(value) = value {
            self.expr(&value.value, known);
        }
        // The compiler looks for what `_` stands for where there is a body only.
        let set = matches!(head, RuleHead::Set { key: Some(key), .. } if wildcard(key));
        if bodies.is_empty() && (set || value.is_some_and(|value| wildcard(&value.value))) {
            self.holds(whole(self.text, span).1);
        }
    }

    fn body(&mut self, body: &RuleBody, known: &BTreeSet<String>) {
        if let Some(assign) = &body.assign {
            self.expr(&assign.value, known);
            if body.query.stmts.is_empty() && wildcard(&assign.value) {
                self.holds(whole(self.text, &body.span).1);
            }
        }
        self.query(&body.query, known);
    }

    /// A body that always holds.
    fn holds(&mut self, at: usize) {
        let with = " if true".to_owned();
        self.place(at, at, vec![self.edit(at, at, with)]);
    }

    fn query(&mut self, query: &Query, known: &BTreeSet<String>) {
        let known = scope(query, known);
        for statement in &query.stmts {
            self.statement(statement, &known);
        }
    }

    fn statement(&mut self, statement: &LiteralStmt, known: &BTreeSet<String>) {
        for modifier in &statement.with_mods {
            self.expr(&modifier.refr, known);
            self.expr(&modifier.r#as, known);
        }
        match &statement.literal {
            Literal::SomeVars { .. } => {}
            Literal::SomeIn {
                key,
                value,
                collection,
                ..
            } => {
                if objects(value) || key.as_ref().is_some_and(|key| objects(key)) {
                    self.some_in(key.as_ref(), value, collection);
                }
                key.iter().for_each(|key| self.expr(key, known));
                self.expr(value, known);
                self.expr(collection, known);
            }
            Literal::Expr { expr, .. } => {
                if let Expr::AssignExpr { .. } = expr.as_ref()
                    && let Some(rule) = self.rule
                {
                    self.assignment(rule, statement, expr, known);
                }
                self.expr(expr, known);
            }
            Literal::NotExpr { expr, .. } => {
                self.negated(expr);
                self.expr(expr, known);
            }
            Literal::Every {
                key,
                value,
                domain,
                query,
                ..
            } => {
                self.expr(domain, known);
                let mut inner = known.clone();
                inner.extend(key.iter().chain([value]).map(|span| span.text().to_owned()));
                self.query(query, &inner);
            }
        }
    }

    /// Looks for memberships with keys, and into comprehensions.
    fn expr(&mut self, expr: &Expr, known: &BTreeSet<String>) {
        if let Expr::Membership {
            span,
            key: Some(key),
            value,
            collection,
            ..
        } = expr
        {
            self.member(span, [key, value, collection]);
        }
        let mut inner = None;
        if let Expr::ArrayCompr { query, .. }
        | Expr::SetCompr { query, .. }
        | Expr::ObjectCompr { query, .. } = expr
        {
            self.query(query, known);
            inner = Some(scope(query, known));
        }
        let mut parts = Vec::new();
        children(expr, &mut |part| parts.push(part));
        for part in parts {
            self.expr(part, inner.as_ref().unwrap_or(known));
        }
    }

    /// The name of a function that the text is made to call.
    fn ask(&mut self, function: &str, arguments: &str, at: usize) -> String {
        let name = format!("{ASK}{}_{}", self.module, self.made);
        self.made += 1;
        self.tails
            .push((format!("{name}({arguments}) := {function}"), at));
        name
    }

    /// A call of a function that asks a value for what a pattern wants of it.
    fn asked(&mut self, function: &str, value: &str, wanted: &[String], at: usize) -> String {
        let argument = format!("{RESERVED}v");
        let does = format!("{function}({argument}, [{}])", wanted.join(", "));
        let name = self.ask(&does, &argument, at);
        format!("{name}({value})")
    }

    fn member(&mut self, span: &Span, parts: [&Expr; 3]) {
        let (from, to) = whole(self.text, span);
        let names = ["k", "v", "c"].map(|name| format!("{RESERVED}{name}"));
        let names = names.join(", ");
        let name = self.ask(&format!("{MEMBER}([{names}], true)"), &names, line(span));
        // In parentheses, so that none of them becomes a membership with the one before it.
        let values: Result<Vec<String>, Unwritten> = parts
            .into_iter()
            .map(|part| Ok(format!("({})", own(part)?)))
            .collect();
        match values {
            Ok(values) => self.replace(from, to, format!("{name}({})", values.join(", "))),
            Err(unwritten) => self.unwritten.push(unwritten),
        }
    }

    fn some_in(&mut self, key: Option<&Ref<Expr>>, value: &Expr, collection: &Expr) {
        let at = line(value.span());
        let made = match key {
            None => words(value).map(|value| (EACH, value)),
            Some(key) => words(key).and_then(|key| {
                let value = words(value)?;
                let bound = format!("[{}, {}]", key.bound, value.bound);
                let asked = [key.asked, value.asked].concat();
                Ok((ENTRIES, Words { bound, asked }))
            }),
        };
        let (function, Words { bound, asked }) = match made {
            Ok(made) => made,
            Err(unwritten) => return self.unwritten.push(unwritten),
        };
        let first = place(self.text, key.map_or(value, AsRef::as_ref));
        let (Some((from, _)), Some((start, to)), Ok(all)) =
            (first, place(self.text, collection), own(collection))
        else {
            return self.unwritten.push((at, READ));
        };
        let behind = whole(self.text, value.span()).1;
        let call = self.asked(function, &all, &asked, at);
        let edits = vec![self.edit(from, behind, bound), self.edit(start, to, call)];
        self.place(from, to, edits);
    }

    fn assignment(
        &mut self,
        rule: &Rule,
        statement: &LiteralStmt,
        expr: &Expr,
        known: &BTreeSet<String>,
    ) {
        let Expr::AssignExpr {
            span, op, lhs, rhs, ..
        } = expr
        else {
            return;
        };
        let (global, declared) = (self.global, &self.declared);
        let is_known = |name: &str| {
            let global = global.contains(name) && !declared.contains(name);
            name == "input" || known.contains(name) || global
        };
        let only_here = |name: &str| {
            let (mut mentioned, mut sure, mut doubtful) =
                (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
            outside(rule, statement, &mut mentioned, &mut sure, &mut doubtful);
            let mut times = 0;
            in_expr(expr, &mut |part| {
                times += usize::from(
                    matches!(part, Expr::Var { value: Value::String(other), .. } if other.as_ref() == name),
                );
            });
            times == 1 && !sure.contains(name) && !doubtful.contains(name)
        };
        let known = Known {
            valued: &is_known,
            only_here: &only_here,
        };
        let made = match op {
            AssignOp::ColEq if !objects(lhs) => return,
            AssignOp::ColEq => words(lhs).and_then(|Words { bound, asked }| {
                Ok(Sides::Other(
                    Side::Text(bound),
                    Side::Asked(own(rhs)?, asked),
                ))
            }),
            AssignOp::Eq => sides(lhs, rhs, &known),
        };
        let (from, to) = whole(self.text, span);
        let sign = match op {
            AssignOp::ColEq => ":=",
            AssignOp::Eq => "=",
        };
        match made {
            Err(unwritten) => self.unwritten.push(unwritten),
            Ok(Sides::Alike) => {}
            Ok(Sides::Compared) => {
                let behind = whole(self.text, lhs.span()).1;
                let sign = self.text.get(behind..to).and_then(|text| text.find('='));
                let at = behind + sign.unwrap_or_default();
                self.replace(at, at + 1, "==".to_owned());
            }
            Ok(Sides::Other(left, right)) => {
                let at = line(span);
                let (left, right) = (self.side(left, at), self.side(right, at));
                self.replace(from, to, format!("{left} {sign} {right}"));
            }
        }
    }

    /// Nothing is bound under `not`. The compiler would take a variable as an index, beside `=` or as a last argument
    /// for a new one, where what binds it stands behind: it is written as a value.
    fn negated(&mut self, expr: &Expr) {
        match expr {
            Expr::AssignExpr {
                op: AssignOp::Eq,
                lhs,
                ..
            } => {
                let sign = place(self.text, lhs).and_then(|(_, behind)| {
                    let sign = self.text.get(behind..)?.find('=')?;
                    Some(behind + sign)
                });
                match sign {
                    Some(at) => self.replace(at, at + 1, "==".to_owned()),
                    None => self.unwritten.push((line(expr.span()), READ)),
                }
            }
            Expr::RefBrack { index, .. } if bindable(index) => self.value(index),
            Expr::Call { params, .. } if params.len() > 1 => {
                let last = params.last().filter(|last| bindable(last));
                last.into_iter().for_each(|last| self.value(last));
            }
            _ => {}
        }
        if let Expr::ArrayCompr { .. } | Expr::SetCompr { .. } | Expr::ObjectCompr { .. } = expr {
            return;
        }
        let mut parts = Vec::new();
        children(expr, &mut |part| parts.push(part));
        parts.into_iter().for_each(|part| self.negated(part));
    }

    /// An expression that cannot be taken for a pattern.
    fn value(&mut self, expr: &Expr) {
        match (place(self.text, expr), own(expr)) {
            (Some((from, to)), Ok(text)) => self.replace(from, to, format!("[{text}][0]")),
            _ => self.unwritten.push((line(expr.span()), READ)),
        }
    }

    fn side(&mut self, side: Side, at: usize) -> String {
        match side {
            Side::Text(text) => text,
            Side::Asked(value, wanted) => self.asked(FIELDS, &value, &wanted, at),
            Side::Array(sides) => {
                let sides: Vec<String> =
                    sides.into_iter().map(|side| self.side(side, at)).collect();
                format!("[{}]", sides.join(", "))
            }
        }
    }

    /// A definition whose arguments are patterns: it takes what they ask for, and the function asks it.
    fn arguments(&mut self, refr: &Expr, args: &[Ref<Expr>]) {
        let at = line(refr.span());
        let name = format!("{CASE}{}_{}", self.module, self.made);
        self.made += 1;
        let (from, behind) = bounds(refr.span());
        let mut edits = vec![self.edit(from, behind, name.clone())];
        let (mut taken, mut given, mut to) = (Vec::new(), Vec::new(), behind);
        for (number, argument) in args.iter().enumerate() {
            let name_of = format!("{RESERVED}a{number}");
            to = whole(self.text, argument.span()).1;
            if objects(argument) {
                match (words(argument), place(self.text, argument)) {
                    (Err(unwritten), _) => self.unwritten.push(unwritten),
                    (_, None) => self.unwritten.push((at, READ)),
                    (Ok(Words { bound, asked }), Some((start, end))) => {
                        given.push(self.asked(FIELDS, &name_of, &asked, at));
                        edits.push(self.edit(start, end, bound));
                    }
                }
            } else {
                given.push(name_of.clone());
            }
            taken.push(name_of);
        }
        let (taken, given) = (taken.join(", "), given.join(", "));
        let spelled = written(refr.span());
        self.tails
            .push((format!("{spelled}({taken}) := {name}({given})"), at));
        self.place(from, to, edits);
    }

    fn replace(&mut self, from: usize, to: usize, with: String) {
        let edits = vec![self.edit(from, to, with)];
        self.place(from, to, edits);
    }

    fn place(&mut self, from: usize, to: usize, edits: Vec<Edit>) {
        let tails = std::mem::take(&mut self.tails);
        self.places.push(Place {
            from,
            to,
            edits,
            tails,
        });
    }

    /// An edit that keeps its lines within its own brackets, so that what stands behind it stays beside it.
    fn edit(&self, from: usize, to: usize, mut with: String) -> Edit {
        let lines = |text: &str| text.matches('\n').count();
        let old = self.text.get(from..to).map_or(0, lines);
        let missing = old.saturating_sub(lines(&with));
        let open = with.find(['[', '(', '"', '`']);
        if let Some(open) = open.filter(|open| !with.get(*open..).is_some_and(quoted)) {
            with.insert_str(open + 1, &"\n".repeat(missing));
        }
        Edit { from, to, with }
    }
}

fn quoted(text: &str) -> bool {
    text.starts_with(['"', '`'])
}
