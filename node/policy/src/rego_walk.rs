//! Walks over the engine's syntax tree: every expression, every statement, every variable of a rule.

use std::collections::BTreeSet;

use regorus::Value;
use regorus::unstable::{
    AssignOp, Expr, Literal, LiteralStmt, Module, Query, Rule, RuleHead, Span,
};

pub(crate) fn bounds(span: &Span) -> (usize, usize) {
    (
        usize::try_from(span.start).unwrap_or_default(),
        usize::try_from(span.end).unwrap_or_default(),
    )
}

/// Where an expression is in its text. The engine's spans of texts leave out the quotation marks.
pub(crate) fn whole(text: &str, span: &Span) -> (usize, usize) {
    let (from, to) = bounds(span);
    let quote = |byte: Option<&u8>| matches!(byte, Some(b'"' | b'`'));
    let bytes = text.as_bytes();
    let before = from.checked_sub(1);
    (
        match before {
            Some(before) if quote(bytes.get(before)) => before,
            _ => from,
        },
        to + usize::from(quote(bytes.get(to))),
    )
}

/// Where an expression is in its text; nothing if that is not certain. The engine's spans of objects begin at their
/// last field: the brace stands before the first one, with nothing but spaces and comments between.
pub(crate) fn place(text: &str, expr: &Expr) -> Option<(usize, usize)> {
    let (from, to) = whole(text, expr.span());
    let Expr::Object { fields, .. } = expr else {
        return Some((from, to));
    };
    let Some((_, key, _)) = fields.first() else {
        return Some((from, to));
    };
    let (first, _) = place(text, key)?;
    let before = text.get(..first)?;
    let brace = before.rfind('{')?;
    let line_start = before.get(..brace)?.rfind('\n').map_or(0, |at| at + 1);
    let in_comment = before.get(line_start..brace)?.contains('#');
    let blank = |line: &str| line.trim_start().is_empty() || line.trim_start().starts_with('#');
    let between = before.get(brace + 1..)?;
    (!in_comment && between.lines().all(blank)).then_some((brace, to))
}

/// An expression as it is written, an object too; nothing if that is not certain.
pub(crate) fn spelled(text: &str, expr: &Expr) -> Option<String> {
    let (from, to) = place(text, expr)?;
    text.get(from..to).map(str::to_owned)
}

pub(crate) fn line(span: &Span) -> usize {
    usize::try_from(span.line).unwrap_or_default()
}

/// An expression as it is written.
pub(crate) fn written(span: &Span) -> String {
    let text = span.source.get_contents();
    let (from, to) = whole(text, span);
    text.get(from..to).unwrap_or_default().to_owned()
}

/// Calls a function for each part of an expression, the expression first.
pub(crate) fn in_expr<'m>(expr: &'m Expr, each: &mut dyn FnMut(&'m Expr)) {
    each(expr);
    match expr {
        Expr::String { .. }
        | Expr::RawString { .. }
        | Expr::Number { .. }
        | Expr::Bool { .. }
        | Expr::Null { .. }
        | Expr::Var { .. } => {}
        Expr::Array { items, .. } | Expr::Set { items, .. } => {
            items.iter().for_each(|item| in_expr(item, each));
        }
        Expr::Object { fields, .. } => {
            for (_, key, value) in fields {
                in_expr(key, each);
                in_expr(value, each);
            }
        }
        Expr::ArrayCompr { term, query, .. } | Expr::SetCompr { term, query, .. } => {
            in_expr(term, each);
            in_query(query, each);
        }
        Expr::ObjectCompr {
            key, value, query, ..
        } => {
            in_expr(key, each);
            in_expr(value, each);
            in_query(query, each);
        }
        Expr::Call { fcn, params, .. } => {
            in_expr(fcn, each);
            params.iter().for_each(|item| in_expr(item, each));
        }
        Expr::UnaryExpr { expr, .. } => in_expr(expr, each),
        Expr::RefDot { refr, .. } => in_expr(refr, each),
        Expr::RefBrack { refr, index, .. } => {
            in_expr(refr, each);
            in_expr(index, each);
        }
        Expr::BinExpr { lhs, rhs, .. }
        | Expr::BoolExpr { lhs, rhs, .. }
        | Expr::ArithExpr { lhs, rhs, .. }
        | Expr::AssignExpr { lhs, rhs, .. } => {
            in_expr(lhs, each);
            in_expr(rhs, each);
        }
        Expr::Membership {
            key,
            value,
            collection,
            ..
        } => {
            key.iter().for_each(|key| in_expr(key, each));
            in_expr(value, each);
            in_expr(collection, each);
        }
    }
}

pub(crate) fn in_literal<'m>(literal: &'m Literal, each: &mut dyn FnMut(&'m Expr)) {
    match literal {
        Literal::SomeVars { .. } => {}
        Literal::SomeIn {
            key,
            value,
            collection,
            ..
        } => {
            key.iter().for_each(|key| in_expr(key, each));
            in_expr(value, each);
            in_expr(collection, each);
        }
        Literal::Expr { expr, .. } | Literal::NotExpr { expr, .. } => in_expr(expr, each),
        Literal::Every { domain, query, .. } => {
            in_expr(domain, each);
            in_query(query, each);
        }
    }
}

pub(crate) fn in_query<'m>(query: &'m Query, each: &mut dyn FnMut(&'m Expr)) {
    for statement in &query.stmts {
        in_literal(&statement.literal, each);
        for modifier in &statement.with_mods {
            in_expr(&modifier.refr, each);
            in_expr(&modifier.r#as, each);
        }
    }
}

/// Calls a function for each expression of a rule; for those of its head first, without the name.
pub(crate) fn in_rule<'m>(rule: &'m Rule, each: &mut dyn FnMut(&'m Expr)) {
    fn keys<'m>(refr: &'m Expr, each: &mut dyn FnMut(&'m Expr)) {
        match refr {
            Expr::RefDot { refr, .. } => keys(refr, each),
            Expr::RefBrack { refr, index, .. } => {
                keys(refr, each);
                in_expr(index, each);
            }
            _ => {}
        }
    }
    match rule {
        Rule::Spec { head, bodies, .. } => {
            match head {
                RuleHead::Compr { refr, assign, .. } => {
                    keys(refr, each);
                    assign
                        .iter()
                        .for_each(|assign| in_expr(&assign.value, each));
                }
                RuleHead::Set { refr, key, .. } => {
                    keys(refr, each);
                    key.iter().for_each(|key| in_expr(key, each));
                }
                RuleHead::Func {
                    refr, args, assign, ..
                } => {
                    keys(refr, each);
                    args.iter().for_each(|argument| in_expr(argument, each));
                    assign
                        .iter()
                        .for_each(|assign| in_expr(&assign.value, each));
                }
            }
            for body in bodies {
                body.assign
                    .iter()
                    .for_each(|assign| in_expr(&assign.value, each));
                in_query(&body.query, each);
            }
        }
        Rule::Default { value, .. } => in_expr(value, each),
    }
}

pub(crate) fn for_each_expr<'m>(module: &'m Module, each: &mut dyn FnMut(&'m Expr)) {
    for rule in &module.policy {
        in_rule(rule, each);
    }
}

/// Every variable in an expression that stands for a pattern.
pub(crate) fn pattern(expr: &Expr, names: &mut BTreeSet<String>) {
    match expr {
        Expr::Var {
            value: Value::String(name),
            ..
        } => _ = names.insert(name.to_string()),
        Expr::Array { items, .. } => items.iter().for_each(|item| pattern(item, names)),
        Expr::Object { fields, .. } => fields
            .iter()
            .for_each(|(_, _, value)| pattern(value, names)),
        _ => {}
    }
}

/// The variables that a statement declares for sure.
pub(crate) fn binds(literal: &Literal, names: &mut BTreeSet<String>) {
    match literal {
        Literal::SomeIn { key, value, .. } => {
            key.iter().for_each(|key| pattern(key, names));
            pattern(value, names);
        }
        Literal::Expr { expr, .. } => {
            if let Expr::AssignExpr {
                op: AssignOp::ColEq,
                lhs,
                ..
            } = expr.as_ref()
            {
                pattern(lhs, names);
            }
        }
        Literal::Every { key, value, .. } => {
            names.extend(key.iter().map(|span| span.text().to_owned()));
            names.insert(value.text().to_owned());
        }
        Literal::SomeVars { .. } | Literal::NotExpr { .. } => {}
    }
}

/// Calls a function for each statement of a rule, in comprehensions and `every` too.
pub(crate) fn for_each_statement<'m>(rule: &'m Rule, each: &mut dyn FnMut(&'m LiteralStmt)) {
    fn nested<'m>(query: &'m Query, each: &mut dyn FnMut(&'m LiteralStmt)) {
        for statement in &query.stmts {
            each(statement);
            if let Literal::Every { query, .. } = &statement.literal {
                nested(query, each);
            }
        }
    }
    let mut queries: Vec<&'m Query> = Vec::new();
    if let Rule::Spec { bodies, .. } = rule {
        queries.extend(bodies.iter().map(|body| body.query.as_ref()));
    }
    in_rule(rule, &mut |expr| match expr {
        Expr::ArrayCompr { query, .. }
        | Expr::SetCompr { query, .. }
        | Expr::ObjectCompr { query, .. } => queries.push(query),
        _ => {}
    });
    for query in queries {
        nested(query, each);
    }
}

/// Calls a function for each part of an expression, without the statements of comprehensions and without parts
/// of parts.
pub(crate) fn children<'m>(expr: &'m Expr, each: &mut dyn FnMut(&'m Expr)) {
    match expr {
        Expr::String { .. }
        | Expr::RawString { .. }
        | Expr::Number { .. }
        | Expr::Bool { .. }
        | Expr::Null { .. }
        | Expr::Var { .. } => {}
        Expr::Array { items, .. } | Expr::Set { items, .. } => {
            items.iter().for_each(|item| each(item));
        }
        Expr::Object { fields, .. } => {
            for (_, key, value) in fields {
                each(key);
                each(value);
            }
        }
        Expr::ArrayCompr { term, .. } | Expr::SetCompr { term, .. } => each(term),
        Expr::ObjectCompr { key, value, .. } => {
            each(key);
            each(value);
        }
        Expr::Call { fcn, params, .. } => {
            each(fcn);
            params.iter().for_each(|item| each(item));
        }
        Expr::UnaryExpr { expr, .. } => each(expr),
        Expr::RefDot { refr, .. } => each(refr),
        Expr::RefBrack { refr, index, .. } => {
            each(refr);
            each(index);
        }
        Expr::BinExpr { lhs, rhs, .. }
        | Expr::BoolExpr { lhs, rhs, .. }
        | Expr::ArithExpr { lhs, rhs, .. }
        | Expr::AssignExpr { lhs, rhs, .. } => {
            each(lhs);
            each(rhs);
        }
        Expr::Membership {
            key,
            value,
            collection,
            ..
        } => {
            key.iter().for_each(|key| each(key));
            each(value);
            each(collection);
        }
    }
}

/// The names that have a value for sure in the statements of a body, given those around it. The variables of an
/// `every` are its own, and what `some` declares is a new one until something binds it.
pub(crate) fn scope(query: &Query, around: &BTreeSet<String>) -> BTreeSet<String> {
    let mut known = around.clone();
    for statement in &query.stmts {
        if let Literal::SomeVars { vars, .. } = &statement.literal {
            for span in vars {
                known.remove(span.text());
            }
        }
    }
    for statement in &query.stmts {
        if !matches!(statement.literal, Literal::Every { .. }) {
            binds(&statement.literal, &mut known);
        }
    }
    known
}

/// Calls a function for each `every` of a rule, with the names that what stands around it mentions: the arguments, and
/// the statements that it is beside or inside of, without those of other comprehensions and of other `every`.
pub(crate) fn for_each_every<'m>(
    rule: &'m Rule,
    each: &mut dyn FnMut(&'m LiteralStmt, &BTreeSet<String>),
) {
    let mut around = BTreeSet::new();
    let Rule::Spec { head, bodies, .. } = rule else {
        return;
    };
    let mut values: Vec<&'m Expr> = Vec::new();
    match head {
        RuleHead::Compr { refr, assign, .. } => {
            values.push(refr);
            values.extend(assign.iter().map(|assign| assign.value.as_ref()));
        }
        RuleHead::Set { refr, key, .. } => {
            values.push(refr);
            values.extend(key.iter().map(AsRef::as_ref));
        }
        RuleHead::Func { args, assign, .. } => {
            args.iter()
                .for_each(|argument| pattern(argument, &mut around));
            values.extend(assign.iter().map(|assign| assign.value.as_ref()));
        }
    }
    for body in bodies {
        values.extend(body.assign.iter().map(|assign| assign.value.as_ref()));
        everies_of(&body.query, &around, each);
    }
    // What is in comprehensions of a head may see what the bodies bind.
    for body in bodies {
        let mut around = around.clone();
        beside(&body.query, None, &mut around);
        for value in &values {
            inside(value, &around, each);
        }
    }
    if bodies.is_empty() {
        values.iter().for_each(|value| inside(value, &around, each));
    }
}

fn everies_of<'m>(
    query: &'m Query,
    around: &BTreeSet<String>,
    each: &mut dyn FnMut(&'m LiteralStmt, &BTreeSet<String>),
) {
    for (number, statement) in query.stmts.iter().enumerate() {
        let mut names = around.clone();
        beside(query, Some(number), &mut names);
        if let Literal::Every {
            key, value, query, ..
        } = &statement.literal
        {
            each(statement, &names);
            let mut inner = names.clone();
            inner.extend(key.iter().chain([value]).map(|span| span.text().to_owned()));
            everies_of(query, &inner, each);
        }
        own_level(&statement.literal, &mut names);
        for expr in expressions(statement) {
            inside(expr, &names, each);
        }
    }
}

/// The `every` in the comprehensions of an expression.
fn inside<'m>(
    expr: &'m Expr,
    around: &BTreeSet<String>,
    each: &mut dyn FnMut(&'m LiteralStmt, &BTreeSet<String>),
) {
    let mut around = around.clone();
    if let Expr::ArrayCompr { query, .. }
    | Expr::SetCompr { query, .. }
    | Expr::ObjectCompr { query, .. } = expr
    {
        everies_of(query, &around, each);
        beside(query, None, &mut around);
    }
    let mut parts = Vec::new();
    children(expr, &mut |part| parts.push(part));
    parts
        .into_iter()
        .for_each(|part| inside(part, &around, each));
}

/// Adds what the statements of a body mention, all but one.
fn beside(query: &Query, but: Option<usize>, names: &mut BTreeSet<String>) {
    for (number, statement) in query.stmts.iter().enumerate() {
        if Some(number) != but {
            own_level(&statement.literal, names);
            for modifier in &statement.with_mods {
                mentioned(&modifier.r#as, names);
            }
        }
    }
}

/// Adds what a statement mentions, without what its comprehensions and its `every` are about.
fn own_level(literal: &Literal, names: &mut BTreeSet<String>) {
    match literal {
        Literal::SomeVars { vars, .. } => {
            names.extend(vars.iter().map(|span| span.text().to_owned()));
        }
        Literal::SomeIn {
            key,
            value,
            collection,
            ..
        } => {
            key.iter().for_each(|key| mentioned(key, names));
            mentioned(value, names);
            mentioned(collection, names);
        }
        Literal::Expr { expr, .. } | Literal::NotExpr { expr, .. } => mentioned(expr, names),
        Literal::Every { domain, .. } => mentioned(domain, names),
    }
}

fn mentioned(expr: &Expr, names: &mut BTreeSet<String>) {
    let comprehension = matches!(
        expr,
        Expr::ArrayCompr { .. } | Expr::SetCompr { .. } | Expr::ObjectCompr { .. }
    );
    if let Expr::Var {
        value: Value::String(name),
        ..
    } = expr
    {
        names.insert(name.to_string());
    }
    if !comprehension {
        children(expr, &mut |part| mentioned(part, names));
    }
}

fn expressions(statement: &LiteralStmt) -> Vec<&Expr> {
    let mut found: Vec<&Expr> = match &statement.literal {
        Literal::SomeVars { .. } => Vec::new(),
        Literal::SomeIn {
            key,
            value,
            collection,
            ..
        } => {
            let key = key.iter().map(AsRef::as_ref);
            key.chain([value.as_ref(), collection.as_ref()]).collect()
        }
        Literal::Expr { expr, .. } | Literal::NotExpr { expr, .. } => vec![expr],
        Literal::Every { domain, .. } => vec![domain],
    };
    for modifier in &statement.with_mods {
        found.extend([modifier.refr.as_ref(), modifier.r#as.as_ref()]);
    }
    found
}

/// The names that a rule declares with `some` alone.
pub(crate) fn declared_by_some(rule: &Rule) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    for_each_statement(rule, &mut |statement| {
        if let Literal::SomeVars { vars, .. } = &statement.literal {
            names.extend(vars.iter().map(|span| span.text().to_owned()));
        }
    });
    names
}

/// Every name that a rule declares somewhere.
pub(crate) fn declared(rule: &Rule, names: &mut BTreeSet<String>) {
    if let Rule::Spec {
        head: RuleHead::Func { args, .. },
        ..
    } = rule
    {
        args.iter().for_each(|argument| pattern(argument, names));
    }
    for_each_statement(rule, &mut |statement| {
        binds(&statement.literal, names);
        if let Literal::SomeVars { vars, .. } = &statement.literal {
            names.extend(vars.iter().map(|span| span.text().to_owned()));
        }
    });
}

/// Adds the variables of an expression; the name of a function that is called is none.
pub(crate) fn variables(expr: &Expr, names: &mut BTreeSet<String>, called: &mut BTreeSet<u32>) {
    match expr {
        Expr::Call { fcn, .. } => {
            let mut root = fcn.as_ref();
            while let Expr::RefDot { refr, .. } | Expr::RefBrack { refr, .. } = root {
                root = refr.as_ref();
            }
            called.insert(root.span().start);
        }
        Expr::Var {
            span,
            value: Value::String(name),
            ..
        } if !called.contains(&span.start) => _ = names.insert(name.to_string()),
        _ => {}
    }
}

/// What a rule says of variables outside one statement: all that it mentions, those that something binds for
/// sure, and those that something may bind.
pub(crate) fn outside(
    rule: &Rule,
    statement: &LiteralStmt,
    mentioned: &mut BTreeSet<String>,
    sure: &mut BTreeSet<String>,
    doubtful: &mut BTreeSet<String>,
) {
    let (from, to) = bounds(&statement.span);
    let until = statement
        .with_mods
        .first()
        .map_or(to, |modifier| bounds(&modifier.span).0);
    let apart = |expr: &Expr| {
        let (start, end) = bounds(expr.span());
        end <= from || start >= until
    };
    let mut called = BTreeSet::new();
    let mut doubts: Vec<&Expr> = Vec::new();
    in_rule(rule, &mut |expr| {
        if !apart(expr) {
            return;
        }
        variables(expr, mentioned, &mut called);
        match expr {
            Expr::AssignExpr {
                op: AssignOp::Eq,
                lhs,
                rhs,
                ..
            } => doubts.extend([lhs.as_ref(), rhs.as_ref()]),
            Expr::RefBrack { index, .. } => doubts.push(index.as_ref()),
            Expr::Call { params, .. } => doubts.extend(params.last().map(AsRef::as_ref)),
            _ => {}
        }
    });
    for doubt in doubts {
        pattern(doubt, doubtful);
    }
    if let Rule::Spec {
        head: RuleHead::Func { args, .. },
        ..
    } = rule
    {
        args.iter().for_each(|argument| pattern(argument, sure));
    }
    for_each_statement(rule, &mut |other| {
        if bounds(&other.span) != (from, to) {
            binds(&other.literal, sure);
            if let Literal::Every { .. } = &other.literal {
                let mut own = BTreeSet::new();
                binds(&other.literal, &mut own);
                mentioned.extend(own);
            }
        }
    });
}
