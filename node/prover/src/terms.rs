//! Terms of one kind of request, and what is asserted of them.

use std::sync::Arc;

use cedar_policy_symcc::{
    CompiledPolicy, CompiledPolicySet, SymEnv, WellFormedAsserts, always_denies_asserts,
    implies_asserts, never_errors_asserts, never_matches_asserts,
    term::Term,
    term_factory::{and, not, or},
};

use crate::limits::PROOF_MODELS_MAX;

/// Terms of one kind of request.
pub(crate) struct Terms {
    pub(crate) symbols: SymEnv,
    /// The newer policies, and what cannot be as further forbids.
    pub(crate) permitted: CompiledPolicySet,
    /// The same for requests in which every entity is described, and in which none is: where to look first.
    pub(crate) described: CompiledPolicySet,
    pub(crate) strangers: CompiledPolicySet,
    /// The older ones; `None` where they permit nothing that they would know.
    pub(crate) older: Option<CompiledPolicySet>,
    pub(crate) newer_erring: Vec<CompiledPolicy>,
    pub(crate) older_erring: Vec<CompiledPolicy>,
    /// What the question without common policies is made of, where there are any.
    pub(crate) stronger: Option<Stronger>,
}

/// Terms of each bundle's own policies alone: the third shortcut of `shortcuts.rs`.
pub(crate) struct Stronger {
    /// Those of the newer bundle, and what cannot be as further forbids.
    pub(crate) newer: CompiledPolicySet,
    /// The same and a permit of everything: what no own forbid of the newer bundle forbids.
    pub(crate) open: CompiledPolicySet,
    pub(crate) older: CompiledPolicySet,
    pub(crate) older_forbids: Vec<CompiledPolicy>,
    pub(crate) newer_erring: Vec<CompiledPolicy>,
}

impl Stronger {
    /// What is satisfiable wherever something new is permitted.
    pub(crate) fn widened(&self, older_erring: &[CompiledPolicy]) -> Arc<Vec<Term>> {
        let own_permit = all(&implies_asserts(&self.newer, &self.older));
        let forbids = self.older_forbids.iter();
        let denies = forbids.map(|policy| all(&never_matches_asserts(policy)));
        let errs = older_erring.iter();
        let denies = denies.chain(errs.map(|policy| all(&never_errors_asserts(policy))));
        let denied = and(
            all(&always_denies_asserts(&self.open)),
            denies.fold(false.into(), or),
        );
        let mut asserts = no_error(&self.newer_erring);
        asserts.push(or(own_permit, denied));
        Arc::new(asserts)
    }
}

impl Terms {
    /// What is unsatisfiable if nothing new is permitted. Each list of asserts is taken as a whole: what it says of
    /// the entities of its own terms is true of every entity, so it may stand, or be missing, anywhere.
    pub(crate) fn widened(&self) -> Arc<Vec<Term>> {
        let mut asserts: Vec<Term> = always_denies_asserts(&self.permitted).asserts().to_vec();
        asserts.extend(no_error(&self.newer_erring));
        if let Some(older) = &self.older {
            let denied = all(&implies_asserts(&self.permitted, older));
            let errs = self.older_erring.iter();
            asserts.push(errs.fold(denied, |found, policy| {
                or(found, all(&never_errors_asserts(policy)))
            }));
        }
        Arc::new(asserts)
    }

    /// What to look for models of. They come near to [`widened`](Self::widened), which has none to give: what
    /// they find is asked of both bundles.
    pub(crate) fn models(&self) -> Vec<WellFormedAsserts<'_>> {
        let mut models = match &self.older {
            Some(older) => vec![
                implies_asserts(&self.described, older),
                implies_asserts(&self.permitted, older),
                // Of whom nothing is known, there the older one may err.
                always_denies_asserts(&self.strangers),
            ],
            None => vec![
                always_denies_asserts(&self.described),
                always_denies_asserts(&self.permitted),
            ],
        };
        let errs = self.older_erring.iter();
        models.extend(errs.map(never_errors_asserts));
        models.truncate(PROOF_MODELS_MAX);
        models
    }
}

/// That none of these policies errs.
fn no_error(policies: &[CompiledPolicy]) -> Vec<Term> {
    let policies = policies.iter();
    policies
        .map(|policy| not(all(&never_errors_asserts(policy))))
        .collect()
}

fn all(asserts: &WellFormedAsserts<'_>) -> Term {
    let terms = asserts.asserts().iter().cloned();
    terms.fold(true.into(), and)
}

/// Whether no solver has to be asked to know that it cannot be.
pub(crate) fn is_false(asserts: &WellFormedAsserts<'_>) -> bool {
    asserts.asserts().iter().any(|term| *term == false.into())
}
