//! A look at Rego text before, and at its syntax tree after, the engine's parser.
//!
//! The parser reads an open bracket once as a literal and once as a comprehension, so nested brackets
//! double its work at each level: 22 levels take seconds, a few dozen bytes. Operators chain into a tree
//! that is as high as they are many, and everything that walks over it recurses. The scanner bounds that
//! work and that height. The walk over the tree finds what the node does not run, with its line, so that an author reads
//! a list and not the first thing that a compiler happens to meet.

use std::collections::BTreeSet;

use regorus::Value;
use regorus::unstable::{AssignOp, Expr, Literal, Module, Query, Ref, Rule, RuleAssign, RuleHead};

use crate::limits::{EXPRESSION_DEPTH_MAX, REGO_ELSES_MAX, REGO_NESTING_MAX, REGO_PARSE_WORK_MAX};
use crate::rego_builtins::{guarded, refusal};
use crate::rego_pattern::{MEMBERS, PATTERN, objects, unwritten};
use crate::rego_text::RESERVED;
use crate::rego_walk::{bounds, declared_by_some, in_expr, pattern, scope};

/// Something in a policy that this node does not run.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Finding {
    /// Line, from 1.
    pub(crate) line: usize,
    /// The function or construct.
    pub(crate) name: String,
    /// Why it is refused.
    pub(crate) reason: String,
}

/// One open bracket, and an upper bound of the height of the tree inside it.
#[derive(Default)]
struct Level {
    /// Operators, accesses and calls of the expression so far.
    chain: usize,
    /// The highest bracket in it.
    highest: usize,
    /// The highest expression that has ended.
    most: usize,
    /// Whether the last token ends an operand: another one then begins an expression of its own.
    after_operand: bool,
}

impl Level {
    fn height(&self) -> usize {
        self.most.max(self.chain + self.highest)
    }

    fn end_expression(&mut self) {
        *self = Self {
            most: self.height(),
            ..Self::default()
        };
    }

    fn operand(&mut self) {
        if self.after_operand {
            self.end_expression();
        }
        self.after_operand = true;
    }

    fn operator(&mut self) {
        self.chain += 1;
        self.after_operand = false;
    }
}

/// Words that chain like signs do.
const OPERATOR_WORDS: [&str; 4] = ["in", "not", "with", "as"];

/// Bounds nesting, chains and the parser's work. The line and what is wrong with it, else nothing.
///
/// Where an expression ends is not decided by the line: an operator at its end goes on in the next. Two
/// operands without one between them are two expressions, and so is a bracket that does not touch the
/// operand before it.
pub(crate) fn scan(text: &str) -> Result<(), (usize, String)> {
    let mut line = 1;
    let mut work = 0_usize;
    let mut elses = 0_usize;
    let mut open: Vec<Level> = Vec::new();
    let mut level = Level::default();
    // Where the last token ended.
    let mut end = 0;
    let mut characters = text.char_indices().peekable();
    while let Some((at, character)) = characters.next() {
        match character {
            '\n' => {
                line += 1;
                continue;
            }
            _ if character.is_whitespace() => continue,
            '#' => {
                for (_, next) in characters.by_ref() {
                    if next == '\n' {
                        line += 1;
                        break;
                    }
                }
                continue;
            }
            '`' => {
                level.operand();
                for (_, next) in characters.by_ref() {
                    match next {
                        '`' => break,
                        '\n' => line += 1,
                        _ => {}
                    }
                }
            }
            '"' => {
                level.operand();
                let mut escaped = false;
                for (_, next) in characters.by_ref() {
                    match next {
                        '\n' => line += 1,
                        '"' if !escaped => break,
                        _ => {}
                    }
                    escaped = next == '\\' && !escaped;
                }
            }
            '(' | '[' | '{' => {
                let goes_on = level.after_operand && end == at && character != '{';
                if goes_on {
                    level.chain += 1;
                } else {
                    level.operand();
                }
                open.push(std::mem::take(&mut level));
                if open.len() > REGO_NESTING_MAX {
                    let message = format!("brackets nest deeper than {REGO_NESTING_MAX}");
                    return Err((line, message));
                }
                work += 1 << open.len();
                if work > REGO_PARSE_WORK_MAX {
                    let message = "too many deeply nested brackets in one file: name the inner \
                                   values in rules of their own";
                    return Err((line, message.to_owned()));
                }
            }
            ')' | ']' | '}' => {
                // A bracket that was never opened is the parser's to report.
                if let Some(outer) = open.pop() {
                    let height = level.height() + 1;
                    level = outer;
                    level.highest = level.highest.max(height);
                }
                level.after_operand = true;
            }
            ',' | ';' => level.end_expression(),
            _ if character.is_alphanumeric() || character == '_' => {
                let mut stop = at + character.len_utf8();
                while let Some((at, next)) =
                    characters.next_if(|(_, next)| next.is_alphanumeric() || *next == '_')
                {
                    stop = at + next.len_utf8();
                }
                match text.get(at..stop).unwrap_or_default() {
                    "else" => {
                        elses += 1;
                        level.end_expression();
                    }
                    word if OPERATOR_WORDS.contains(&word) => level.operator(),
                    _ => level.operand(),
                }
            }
            ':' if characters.peek().is_none_or(|(_, next)| *next != '=') => level.end_expression(),
            _ => level.operator(),
        }
        end = characters.peek().map_or(text.len(), |(next, _)| *next);
        if level.height() > EXPRESSION_DEPTH_MAX {
            let message = format!(
                "an expression is longer or deeper than {EXPRESSION_DEPTH_MAX} operators: name parts of \
                 it in rules of their own, or use a set"
            );
            return Err((line, message));
        }
        if elses > REGO_ELSES_MAX {
            let message =
                format!("more than {REGO_ELSES_MAX} `else` in one file: use rules of one name");
            return Err((line, message));
        }
    }
    Ok(())
}

/// The functions that modules define: their names are no built-ins. Each with how many arguments it takes.
pub(crate) fn defined<'m>(modules: impl Iterator<Item = &'m Module>) -> BTreeSet<(String, usize)> {
    let heads = modules
        .flat_map(|module| &module.policy)
        .filter_map(|rule| match rule.as_ref() {
            Rule::Spec {
                head: RuleHead::Func { refr, args, .. },
                ..
            }
            | Rule::Default { refr, args, .. } => Some((path(refr)?, args.len())),
            Rule::Spec { .. } => None,
        });
    heads.collect()
}

/// The names of a module's rules and imports.
pub(crate) fn globals(module: &Module) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    for import in &module.imports {
        let last = match import.refr.as_ref() {
            Expr::RefDot { field, .. } => field.0.text(),
            _ => "",
        };
        names.insert(
            import
                .r#as
                .as_ref()
                .map_or(last, |name| name.text())
                .to_owned(),
        );
    }
    for rule in &module.policy {
        let (Rule::Spec {
            head:
                RuleHead::Compr { refr, .. } | RuleHead::Set { refr, .. } | RuleHead::Func { refr, .. },
            ..
        }
        | Rule::Default { refr, .. }) = rule.as_ref();
        let mut root = refr.as_ref();
        while let Expr::RefDot { refr, .. } | Expr::RefBrack { refr, .. } = root {
            root = refr.as_ref();
        }
        pattern(root, &mut names);
    }
    names
}

/// What a module holds that this node does not run, by line.
pub(crate) fn findings(module: &Module, defined: &BTreeSet<(String, usize)>) -> Vec<Finding> {
    let mut walk = Walk {
        defined,
        found: Vec::new(),
        negated: false,
        held: false,
        global: globals(module),
        declared: BTreeSet::new(),
        renamed: BTreeSet::new(),
        known: BTreeSet::new(),
    };
    for import in &module.imports {
        let last = match import.refr.as_ref() {
            Expr::RefDot { field, .. } => field.0.text(),
            _ => "",
        };
        let name = import.r#as.as_ref().map_or(last, |name| name.text());
        walk.name(import.span.line, name);
        walk.renamed
            .extend(import.r#as.as_ref().map(|name| name.text().to_owned()));
    }
    for (line, why) in unwritten(module, &walk.global) {
        walk.found.push(Finding {
            line,
            name: PATTERN.to_owned(),
            reason: format!("{why}; {MEMBERS}"),
        });
    }
    for rule in &module.policy {
        walk.rule(rule);
    }
    walk.found.sort();
    walk.found.dedup();
    walk.found
}

struct Walk<'d> {
    defined: &'d BTreeSet<(String, usize)>,
    found: Vec<Finding>,
    /// Under `not`.
    negated: bool,
    /// In a comprehension under `not`: the compiler forgets there to compare what patterns say.
    held: bool,
    /// Names of rules and imports.
    global: BTreeSet<String>,
    /// Names that the rule declares itself.
    declared: BTreeSet<String>,
    /// Names that imports make themselves.
    renamed: BTreeSet<String>,
    /// Variables that the rule binds for sure.
    known: BTreeSet<String>,
}

/// How to write what is refused in a comprehension under `not`.
const HOLD: &str = "under `not` it would not be compared: give the comprehension a name before, `x := […]`, and write `not` with the name";

impl Walk<'_> {
    fn rule(&mut self, rule: &Rule) {
        self.known.clear();
        self.declared = declared_by_some(rule);
        if let Rule::Spec {
            head: RuleHead::Func { args, .. },
            ..
        } = rule
        {
            args.iter()
                .for_each(|argument| pattern(argument, &mut self.known));
        }
        match rule {
            Rule::Spec { head, bodies, .. } => {
                let arguments = self.known.clone();
                // What the head may count on is what every body binds that it belongs to.
                let own = bodies.iter().filter(|body| !body.is_else);
                let known = own.map(|body| scope(&body.query, &arguments));
                self.known = known
                    .reduce(|a, b| a.intersection(&b).cloned().collect())
                    .unwrap_or_default();
                match head {
                    RuleHead::Compr { refr, assign, .. } => {
                        self.expr(refr);
                        self.assign(assign.as_ref());
                    }
                    RuleHead::Set { refr, key, .. } => {
                        self.expr(refr);
                        self.exprs(key.as_ref());
                    }
                    RuleHead::Func {
                        refr, args, assign, ..
                    } => {
                        self.expr(refr);
                        for argument in args {
                            let mut names = BTreeSet::new();
                            pattern(argument, &mut names);
                            for name in &names {
                                self.name(argument.span().line, name);
                            }
                            self.matched(argument);
                        }
                        self.exprs(args);
                        self.assign(assign.as_ref());
                    }
                }
                for body in bodies {
                    self.known = scope(&body.query, &arguments);
                    self.assign(body.assign.as_ref());
                    self.query(&body.query);
                }
            }
            Rule::Default {
                span,
                refr,
                args,
                value,
                ..
            } => {
                // The compiler would take it for an empty value.
                if !constant(value) {
                    self.refuse(span.line, "default", "a default must be a constant");
                }
                self.expr(refr);
                self.exprs(args);
                self.expr(value);
            }
        }
    }

    fn assign(&mut self, assign: Option<&RuleAssign>) {
        if let Some(assign) = assign {
            self.expr(&assign.value);
        }
    }

    fn query(&mut self, query: &Query) {
        for statement in &query.stmts {
            for modifier in &statement.with_mods {
                let replaced = path(&modifier.refr);
                let root = replaced.as_deref().map(|path| path.split('.').next());
                if root.is_some_and(|root| !matches!(root, Some("input" | "data"))) {
                    self.refuse(
                        modifier.span.line,
                        "with",
                        "functions are not replaced, only input, data and rules",
                    );
                }
                self.expr(&modifier.refr);
                self.expr(&modifier.r#as);
            }
            match &statement.literal {
                Literal::SomeVars { vars, .. } => {
                    for span in vars {
                        self.name(span.line, span.text());
                    }
                }
                Literal::SomeIn {
                    key,
                    value,
                    collection,
                    ..
                } => {
                    key.iter().for_each(|key| self.matched(key));
                    self.matched(value);
                    self.exprs(key.as_ref());
                    self.expr(value);
                    self.expr(collection);
                }
                Literal::Expr { expr, .. } => self.expr(expr),
                Literal::NotExpr { expr, .. } => {
                    if wildcard(expr) {
                        self.refuse(
                            expr.span().line,
                            "_ under not",
                            "it stands for nothing there: write a rule with `some … in` and `not` with its name",
                        );
                    }
                    if let Expr::AssignExpr { lhs, rhs, .. } = expr.as_ref()
                        && (structured(lhs) || structured(rhs))
                    {
                        self.refuse(expr.span().line, "= under not", "write `==`");
                    }
                    let before = std::mem::replace(&mut self.negated, true);
                    self.expr(expr);
                    self.negated = before;
                }
                Literal::Every {
                    key,
                    value,
                    domain,
                    query,
                    ..
                } => {
                    for span in key.iter().chain([value]) {
                        self.name(span.line, span.text());
                    }
                    self.expr(domain);
                    let outer = self.known.clone();
                    let own = key.iter().chain([value]).map(|span| span.text().to_owned());
                    self.known.extend(own);
                    self.known = scope(query, &self.known);
                    self.query(query);
                    self.known = outer;
                }
            }
        }
    }

    fn exprs<'e>(&mut self, items: impl IntoIterator<Item = &'e Ref<Expr>>) {
        for item in items {
            self.expr(item);
        }
    }

    fn expr(&mut self, expr: &Expr) {
        match expr {
            // A name that is made here, spelled with escapes; those that are made by now are spelled without.
            Expr::String {
                span,
                value: Value::String(text),
                ..
            } => {
                for word in [RESERVED, "__builtin_"] {
                    if text.contains(word) && !span.text().contains(word) {
                        self.refuse(span.line, word, "the name is reserved");
                    }
                }
            }
            Expr::String { .. }
            | Expr::RawString { .. }
            | Expr::Number { .. }
            | Expr::Bool { .. }
            | Expr::Null { .. }
            | Expr::Var { .. } => {}
            Expr::Array { items, .. } | Expr::Set { items, .. } => self.exprs(items),
            Expr::Object { fields, span, .. } => {
                // The last of two values for one key would be kept, without an error.
                let mut keys = BTreeSet::new();
                let twice = fields.iter().any(|(_, key, _)| match key.as_ref() {
                    Expr::String { value, .. }
                    | Expr::RawString { value, .. }
                    | Expr::Number { value, .. } => !keys.insert(value.clone()),
                    _ => fields.len() > 1,
                });
                if twice {
                    self.refuse(
                        span.line,
                        "a key twice in {…}",
                        "keys that could be the same: write `{k: v | …}`, or name each key by a constant of its own",
                    );
                }
                for (_, key, value) in fields {
                    self.expr(key);
                    self.expr(value);
                }
            }
            Expr::ArrayCompr { term, query, .. } | Expr::SetCompr { term, query, .. } => {
                let before = std::mem::replace(&mut self.held, self.negated);
                let outer = self.known.clone();
                self.known = scope(query, &outer);
                self.expr(term);
                self.query(query);
                self.held = before;
                self.known = outer;
            }
            Expr::ObjectCompr {
                key, value, query, ..
            } => {
                let before = std::mem::replace(&mut self.held, self.negated);
                let outer = self.known.clone();
                self.known = scope(query, &outer);
                self.expr(key);
                self.expr(value);
                self.query(query);
                self.held = before;
                self.known = outer;
            }
            Expr::Call {
                span, fcn, params, ..
            } => {
                self.call(span.line, fcn);
                // What stands behind the arguments of a function is a pattern for its result.
                if let [_, .., last] = params.as_slice()
                    && self.takes(fcn, params.len() - 1)
                {
                    if objects(last) {
                        self.refuse(span.line, PATTERN, MEMBERS);
                    } else if self.held && !matches!(last.as_ref(), Expr::Var { .. }) {
                        self.refuse(span.line, HELD, HOLD);
                    }
                }
                self.exprs(params);
            }
            Expr::UnaryExpr { expr, .. } => self.expr(expr),
            Expr::RefDot { refr, .. } => self.expr(refr),
            Expr::RefBrack { refr, index, .. } => {
                if self.binding(index) {
                    self.refuse(index.span().line, PATTERN, MEMBERS);
                } else if self.held && structured(index) && !constant(index) {
                    self.refuse(index.span().line, HELD, HOLD);
                }
                self.expr(refr);
                self.expr(index);
            }
            // The compiler would not look whether there is a value.
            Expr::AssignExpr {
                op: AssignOp::ColEq,
                lhs,
                rhs,
                span,
                ..
            } if path(lhs).is_some_and(|name| name == "_") => {
                self.refuse(span.line, "_ :=", "write what stands behind it alone");
                self.expr(rhs);
            }
            Expr::AssignExpr {
                op, lhs, rhs, span, ..
            } => {
                match op {
                    AssignOp::ColEq => self.matched(lhs),
                    AssignOp::Eq if self.held => self.refuse(span.line, HELD, HOLD),
                    AssignOp::Eq => {}
                }
                self.expr(lhs);
                self.expr(rhs);
            }
            Expr::BinExpr { lhs, rhs, .. }
            | Expr::BoolExpr { lhs, rhs, .. }
            | Expr::ArithExpr { lhs, rhs, .. } => {
                self.expr(lhs);
                self.expr(rhs);
            }
            Expr::Membership {
                key,
                value,
                collection,
                ..
            } => {
                self.exprs(key.as_ref());
                self.expr(value);
                self.expr(collection);
            }
        }
    }

    /// Looks at a pattern.
    fn matched(&mut self, pattern: &Expr) {
        if self.held && !matches!(pattern, Expr::Var { .. }) {
            self.refuse(pattern.span().line, HELD, HOLD);
        }
    }

    /// Whether a literal with an object in it could bind a variable.
    fn binding(&self, literal: &Expr) -> bool {
        let mut names = BTreeSet::new();
        literal_variables(literal, &mut names);
        objects(literal)
            && names.iter().any(|name| {
                let global = self.global.contains(name) && !self.declared.contains(name);
                !self.known.contains(name) && !global
            })
    }

    /// Whether a function of a name can take so many arguments.
    fn takes(&self, function: &Expr, arguments: usize) -> bool {
        let last = match function {
            Expr::RefDot { field, .. } => field.0.text(),
            Expr::RefBrack { .. } => return true,
            other => other.span().text(),
        };
        let named = path(function);
        let first = named.as_deref().and_then(|name| name.split('.').next());
        if first.is_some_and(|first| self.renamed.contains(first)) {
            return self.defined.iter().any(|(_, takes)| *takes == arguments);
        }
        let built_in = named.and_then(|name| guarded(&name));
        built_in.is_some_and(|(_, takes)| usize::from(takes) == arguments)
            || self
                .defined
                .iter()
                .any(|(name, takes)| *takes == arguments && name.rsplit('.').next() == Some(last))
    }

    /// Looks at a name that is given to something.
    fn name(&mut self, line: u32, name: &str) {
        if matches!(name, "input" | "data") {
            self.refuse(
                line,
                "input and data as names",
                "the documents are called so: take another name",
            );
        }
    }

    fn refuse(&mut self, line: u32, name: &str, reason: &str) {
        self.found.push(Finding {
            line: usize::try_from(line).unwrap_or_default(),
            name: name.to_owned(),
            reason: reason.to_owned(),
        });
    }

    fn call(&mut self, line: u32, function: &Expr) {
        let Some(name) = path(function) else { return };
        if self.defined.iter().any(|(defined, _)| *defined == name) {
            return;
        }
        if let Some(reason) = refusal(&name) {
            self.refuse(line, &name, reason);
        }
    }
}

/// What is refused in a comprehension under `not`.
const HELD: &str = "a pattern or = in a comprehension under not";

fn structured(expr: &Expr) -> bool {
    matches!(
        expr,
        Expr::Array { .. } | Expr::Set { .. } | Expr::Object { .. }
    )
}

/// Adds the variables of a literal that a pattern could bind.
fn literal_variables(expr: &Expr, names: &mut BTreeSet<String>) {
    match expr {
        Expr::Array { items, .. } | Expr::Set { items, .. } => {
            items.iter().for_each(|item| literal_variables(item, names));
        }
        Expr::Object { fields, .. } => {
            for (_, key, value) in fields {
                literal_variables(key, names);
                literal_variables(value, names);
            }
        }
        _ => pattern(expr, names),
    }
}

/// Whether an expression has `_` in it, outside of comprehensions.
pub(crate) fn wildcard(expr: &Expr) -> bool {
    let mut inner = Vec::new();
    let mut found = Vec::new();
    in_expr(expr, &mut |part| match part {
        Expr::ArrayCompr { .. } | Expr::SetCompr { .. } | Expr::ObjectCompr { .. } => {
            inner.push(bounds(part.span()));
        }
        Expr::Var {
            span,
            value: Value::String(name),
            ..
        } if name.as_ref() == "_" => found.push(bounds(span)),
        _ => {}
    });
    found
        .iter()
        .any(|(at, _)| !inner.iter().any(|(from, to)| from <= at && at < to))
}

/// Whether a value is what it says, whatever the data are.
pub(crate) fn constant(value: &Expr) -> bool {
    match value {
        Expr::String { .. }
        | Expr::RawString { .. }
        | Expr::Number { .. }
        | Expr::Bool { .. }
        | Expr::Null { .. } => true,
        Expr::UnaryExpr { expr, .. } => constant(expr),
        Expr::Array { items, .. } | Expr::Set { items, .. } => {
            items.iter().all(|item| constant(item))
        }
        Expr::Object { fields, .. } => fields
            .iter()
            .all(|(_, key, value)| constant(key) && constant(value)),
        _ => false,
    }
}

/// A reference of names and dots, as text.
pub(crate) fn path(expr: &Expr) -> Option<String> {
    match expr {
        Expr::Var {
            value: Value::String(name),
            ..
        } => Some(name.to_string()),
        Expr::RefDot {
            refr,
            field: (_, Value::String(name)),
            ..
        } => Some(format!("{}.{name}", path(refr)?)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    /// regorus 0.14 takes seconds for this, at a depth of 22.
    #[test]
    fn nesting_is_bounded_before_the_parser_sees_it() {
        let nested = |open: &str, close: &str, depth: usize| {
            format!(
                "package t\nx := {}1{}",
                open.repeat(depth),
                close.repeat(depth)
            )
        };
        for (open, close) in [("[", "]"), ("{", "}"), ("(", ")")] {
            assert_eq!(scan(&nested(open, close, REGO_NESTING_MAX)), Ok(()));
            for depth in [REGO_NESTING_MAX + 1, 100, 100_000] {
                let (line, message) = scan(&nested(open, close, depth)).unwrap_err();
                assert_eq!(line, 2);
                assert!(message.contains("deeper than"), "{message}");
            }
        }
        let many = format!(
            "package t\n{}",
            "x := [[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]\n".repeat(100)
        );
        let (_, message) = scan(&many).unwrap_err();
        assert!(message.contains("too many"), "{message}");
        // Brackets in texts and comments are none.
        let quoted = format!(
            "package t\nx := \"\\\"{0}\"\ny := `{0}`\n# {0}\nz := [1]",
            "[".repeat(50)
        );
        assert_eq!(scan(&quoted), Ok(()));
    }

    #[test]
    fn chains_are_bounded_over_lines_and_lists_are_not() {
        let rule = |text: String| format!("package t\nallow if {{\n{text}\n}}\n");
        let long = |text: String| {
            let (_, message) = scan(&rule(text)).unwrap_err();
            assert!(message.contains("longer or deeper"), "{message}");
        };
        let chain =
            |operator: &str, n: usize| format!("{}1 == 2", format!("1{operator}").repeat(n));
        for operator in [" + ", " +\n", " |\n", "*", " in ", "\n- "] {
            assert_eq!(scan(&rule(chain(operator, 100))), Ok(()), "{operator}");
            for n in [200, 15_000, 70_000] {
                long(chain(operator, n));
            }
        }
        for n in [200, 3_000, 100_000] {
            long(format!("x == {}1", "-".repeat(n)));
            long(format!("input{}", "[\"a\"]".repeat(n)));
            long(format!("input{}", ".a".repeat(n)));
            long(format!("x{}", " with input.a as 1".repeat(n)));
            long(format!("{}x", "not ".repeat(n)));
        }
        // A chain in brackets counts for what follows them.
        let inner = |text: &str| format!("({text}{})", " + 1".repeat(80));
        assert_eq!(scan(&rule(inner(&inner("1")))), Ok(()));
        long(inner(&inner(&inner("1"))));
        // The controls: many short expressions, long lists, arrays at the beginning of lines.
        let lines =
            "x.y[_] + 1 == f(y)\n[a, b] := g(x, 1)\nnot x\nsome i in z\n{1} == s\n".repeat(2_000);
        assert_eq!(scan(&rule(lines)), Ok(()));
        let list = format!(
            "x in [{}]",
            vec!["{\"a\": 1, \"b\": -2.5}"; 10_000].join(",")
        );
        assert_eq!(scan(&rule(list)), Ok(()));
        let many = |n: usize| {
            format!(
                "package t\nx := 1 if input.a{}\n",
                "\nelse := 2 if input.b".repeat(n)
            )
        };
        assert_eq!(scan(&many(REGO_ELSES_MAX)), Ok(()));
        let (line, message) = scan(&many(REGO_ELSES_MAX + 1)).unwrap_err();
        assert!(
            message.contains("`else`") && line == REGO_ELSES_MAX + 3,
            "{line}: {message}"
        );
    }

    /// What the bound lets through is parsed in a time that nobody notices, even unoptimised.
    #[test]
    fn the_deepest_nesting_that_is_let_through_is_parsed_quickly() {
        let text = format!(
            "package t\nx := {}1{}\n",
            "[".repeat(REGO_NESTING_MAX),
            "]".repeat(REGO_NESTING_MAX)
        );
        let (sender, receiver) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let mut engine = regorus::Engine::new();
            sender.send(engine.add_policy("t.rego".to_owned(), text).is_ok())
        });
        assert_eq!(receiver.recv_timeout(Duration::from_mins(1)), Ok(true));
    }
}
