//! A look at Rego text before, and at its syntax tree after, the engine's parser.
//!
//! The parser reads an open bracket once as a literal and once as a comprehension, so nested brackets
//! double its work at each level: 22 levels take seconds, a few dozen bytes. The scanner bounds that
//! work. The walk over the tree finds what the node does not run, with its line, so that an author reads
//! a list and not the first thing that a compiler happens to meet.

use std::collections::BTreeSet;

use regorus::Value;
use regorus::unstable::{AssignOp, Expr, Literal, Module, Query, Ref, Rule, RuleAssign, RuleHead};

use crate::limits::{REGO_NESTING_MAX, REGO_PARSE_WORK_MAX};
use crate::rego_builtins::refusal;

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

/// Bounds nesting and the parser's work. The line and what is wrong with it, else nothing.
pub(crate) fn scan(text: &str) -> Result<(), (usize, String)> {
    let mut line = 1;
    let mut depth = 0_usize;
    let mut work = 0_usize;
    let mut characters = text.chars();
    while let Some(character) = characters.next() {
        match character {
            '\n' => line += 1,
            '#' => line += usize::from(characters.by_ref().any(|next| next == '\n')),
            '`' => {
                for next in characters.by_ref() {
                    match next {
                        '`' => break,
                        '\n' => line += 1,
                        _ => {}
                    }
                }
            }
            '"' => {
                let mut escaped = false;
                for next in characters.by_ref() {
                    match next {
                        '\n' => line += 1,
                        '"' if !escaped => break,
                        _ => {}
                    }
                    escaped = next == '\\' && !escaped;
                }
            }
            '(' | '[' | '{' => {
                depth += 1;
                if depth > REGO_NESTING_MAX {
                    let message = format!("brackets nest deeper than {REGO_NESTING_MAX}");
                    return Err((line, message));
                }
                work += 1 << depth;
                if work > REGO_PARSE_WORK_MAX {
                    let message = "too many deeply nested brackets in one file: name the inner \
                                   values in rules of their own";
                    return Err((line, message.to_owned()));
                }
            }
            ')' | ']' | '}' => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    Ok(())
}

/// The functions that modules define: their names are no built-ins.
pub(crate) fn defined<'m>(modules: impl Iterator<Item = &'m Module>) -> BTreeSet<String> {
    let heads = modules
        .flat_map(|module| &module.policy)
        .filter_map(|rule| match rule.as_ref() {
            Rule::Spec {
                head: RuleHead::Func { refr, .. },
                ..
            } => path(refr),
            _ => None,
        });
    heads.collect()
}

/// What a module holds that this node does not run, by line.
pub(crate) fn findings(module: &Module, defined: &BTreeSet<String>) -> Vec<Finding> {
    let mut walk = Walk {
        defined,
        found: Vec::new(),
    };
    for rule in &module.policy {
        walk.rule(rule);
    }
    walk.found.sort();
    walk.found.dedup();
    walk.found
}

struct Walk<'d> {
    defined: &'d BTreeSet<String>,
    found: Vec<Finding>,
}

impl Walk<'_> {
    fn rule(&mut self, rule: &Rule) {
        match rule {
            Rule::Spec { head, bodies, .. } => {
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
                        self.exprs(args);
                        self.assign(assign.as_ref());
                    }
                }
                for body in bodies {
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
                Literal::SomeVars { .. } => {}
                Literal::SomeIn {
                    key,
                    value,
                    collection,
                    ..
                } => {
                    self.exprs(key.as_ref());
                    self.expr(value);
                    self.expr(collection);
                }
                Literal::Expr { expr, .. } | Literal::NotExpr { expr, .. } => self.expr(expr),
                Literal::Every { domain, query, .. } => {
                    self.expr(domain);
                    self.query(query);
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
            Expr::String { .. }
            | Expr::RawString { .. }
            | Expr::Number { .. }
            | Expr::Bool { .. }
            | Expr::Null { .. }
            | Expr::Var { .. } => {}
            Expr::Array { items, .. } | Expr::Set { items, .. } => self.exprs(items),
            Expr::Object { fields, .. } => {
                for (_, key, value) in fields {
                    self.expr(key);
                    self.expr(value);
                }
            }
            Expr::ArrayCompr { term, query, .. } | Expr::SetCompr { term, query, .. } => {
                self.expr(term);
                self.query(query);
            }
            Expr::ObjectCompr {
                key, value, query, ..
            } => {
                self.expr(key);
                self.expr(value);
                self.query(query);
            }
            Expr::Call {
                span, fcn, params, ..
            } => {
                self.call(span.line, fcn);
                self.exprs(params);
            }
            Expr::UnaryExpr { expr, .. } => self.expr(expr),
            Expr::RefDot { refr, .. } => self.expr(refr),
            Expr::RefBrack { refr, index, .. } => {
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
            Expr::BinExpr { lhs, rhs, .. }
            | Expr::BoolExpr { lhs, rhs, .. }
            | Expr::ArithExpr { lhs, rhs, .. }
            | Expr::AssignExpr { lhs, rhs, .. } => {
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

    fn refuse(&mut self, line: u32, name: &str, reason: &str) {
        self.found.push(Finding {
            line: usize::try_from(line).unwrap_or_default(),
            name: name.to_owned(),
            reason: reason.to_owned(),
        });
    }

    fn call(&mut self, line: u32, function: &Expr) {
        let Some(name) = path(function) else { return };
        if self.defined.contains(&name) {
            return;
        }
        if let Some(reason) = refusal(&name) {
            self.refuse(line, &name, reason);
        }
    }
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
