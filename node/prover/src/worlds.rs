//! What can be, and what no node can meet: the compiler's world is larger than the real one.

use std::collections::{BTreeMap, BTreeSet};
use std::str::FromStr as _;

use cedar_policy::{EntityTypeName, PolicySet, RequestEnv};
use cedar_policy_core::ast::{BinaryOp, Expr, ExprKind};
use tidelock_policy::NODE_MEMBER;

use crate::limits::PROOF_SUPPOSED_MAX;
use crate::shapes::Shapes;

/// What the node says of its posture.
pub(crate) const POSTURES: [&str; 4] = ["normal", "stale", "restricted", "closed"];

/// What policies look at.
#[derive(Default)]
struct Looked {
    /// Names of attributes, of whatever.
    attributes: BTreeSet<String>,
    /// Expressions that may be entities whose attributes, tags or groups are asked for, with what else is said of
    /// the same one.
    at: BTreeMap<String, Asked>,
}

#[derive(Default)]
struct Asked {
    within: BTreeSet<String>,
    tags: BTreeSet<String>,
}

impl Looked {
    fn into(policies: [&PolicySet; 2]) -> Self {
        let mut looked = Self::default();
        for policy in policies.into_iter().flat_map(PolicySet::policies) {
            for expr in policy.as_ref().condition().subexpressions() {
                looked.note(expr);
            }
        }
        looked
    }

    fn note(&mut self, expr: &Expr) {
        match expr.expr_kind() {
            ExprKind::GetAttr { expr, attr } | ExprKind::HasAttr { expr, attr } => {
                self.asked(expr);
                self.attributes.insert(attr.to_string());
            }
            ExprKind::ExtHasAttr { expr, attrs } => {
                self.asked(expr);
                self.attributes
                    .extend(attrs.iter().map(ToString::to_string));
            }
            ExprKind::BinaryApp { op, arg1, arg2 } => match op {
                BinaryOp::In => _ = self.asked(arg1).within.insert(arg2.to_string()),
                BinaryOp::HasTag | BinaryOp::GetTag => {
                    _ = self.asked(arg1).tags.insert(arg2.to_string());
                }
                _ => {}
            },
            _ => {}
        }
    }

    fn asked(&mut self, expr: &Expr) -> &mut Asked {
        self.at.entry(expr.to_string()).or_default()
    }
}

/// Conditions on requests, in the words of policies. Those that have no sense for a kind of request do not
/// compile, and are left out.
#[derive(Default)]
pub(crate) struct Worlds {
    /// What no node can meet: an entity with some of its required attributes, or with none of them and
    /// something else; a resource that lacks one; a posture that is none.
    pub(crate) impossible: Vec<String>,
    /// That an entity is one that nobody described.
    pub(crate) strangers: Vec<String>,
    /// That an entity is one that somebody did.
    pub(crate) described: Vec<String>,
}

impl Worlds {
    fn note(&mut self, condition: String) {
        if self.impossible.len() < PROOF_SUPPOSED_MAX {
            self.impossible.push(condition);
        }
    }

    pub(crate) fn of(policies: [&PolicySet; 2], shapes: &Shapes, kind: &RequestEnv) -> Self {
        let looked = Looked::into(policies);
        let mut worlds = Self::default();
        let split = |name: &EntityTypeName| {
            let empty = BTreeMap::new();
            let attributes = shapes.attributes.get(&name.to_string()).unwrap_or(&empty);
            let looked_at = attributes
                .iter()
                .filter(|(name, _)| looked.attributes.contains(*name));
            let (required, optional): (Vec<_>, Vec<_>) =
                looked_at.partition(|(_, required)| **required);
            let quoted = |list: Vec<(&String, &bool)>| -> Vec<String> {
                list.iter()
                    .map(|(name, _)| format!("\"{}\"", name.escape_debug()))
                    .collect()
            };
            (quoted(required), quoted(optional))
        };
        for attribute in split(kind.resource()).0 {
            worlds.note(format!("!(resource has {attribute})"));
        }
        for (expr, asked) in &looked.at {
            let types: Vec<EntityTypeName> = match expr.as_str() {
                "principal" => vec![kind.principal().clone()],
                // These are never absent.
                "resource" | "context" | "action" => continue,
                _ => shapes
                    .attributes
                    .keys()
                    .filter_map(|name| EntityTypeName::from_str(name).ok())
                    .collect(),
            };
            for name in types {
                let (required, optional) = split(&name);
                let Some((first, others)) = required.split_first() else {
                    continue;
                };
                let is = match expr.as_str() {
                    "principal" => String::new(),
                    _ => format!("({expr}) is {name} && "),
                };
                let has = format!("{is}({expr}) has {first}");
                let absent = format!("{is}!(({expr}) has {first})");
                if worlds.strangers.len() < PROOF_SUPPOSED_MAX {
                    worlds.strangers.push(absent.clone());
                    worlds.described.push(has);
                }
                for other in others {
                    worlds.note(format!(
                        "{is}(({expr}) has {first}) != (({expr}) has {other})"
                    ));
                }
                for other in optional {
                    worlds.note(format!("{absent} && ({expr}) has {other}"));
                }
                for group in &asked.within {
                    worlds.note(format!(
                        "{absent} && ({expr}) in ({group}) && ({expr}) != ({group})"
                    ));
                    worlds.note(format!(
                        "{absent} && ({expr}) in ({group}) && !(({group}).contains({expr}))"
                    ));
                }
                for tag in &asked.tags {
                    worlds.note(format!("{absent} && ({expr}).hasTag({tag})"));
                }
            }
        }
        let postures = POSTURES.map(|posture| format!("\"{posture}\"")).join(", ");
        worlds.note(format!(
            "!([{postures}].contains(context.{NODE_MEMBER}.posture))"
        ));
        worlds.note(format!("context.{NODE_MEMBER}.policy_age_s < 0"));
        worlds
    }
}
