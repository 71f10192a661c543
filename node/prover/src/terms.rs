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
    /// The parts of the question that is asked first.
    pub(crate) first: Vec<First>,
}

/// One part of the stronger question, in terms of each bundle's own policies: the third shortcut of `shortcuts.rs`.
/// What is permitted newly satisfies one of them.
pub(crate) enum First {
    /// An own permit of one scope matches where no own permit of that scope did.
    Permits {
        /// The permits and all own forbids of the newer bundle, and what cannot be as further forbids.
        newer: Box<CompiledPolicySet>,
        /// The same where every entity is described.
        described: Box<CompiledPolicySet>,
        /// Permits of the older bundle, and nothing else.
        older: Box<CompiledPolicySet>,
        /// Policies of `newer` that may err.
        erring: Vec<CompiledPolicy>,
    },
    /// An own policy of the older bundle denied what no own forbid of the newer one forbids.
    Denies {
        /// A permit of everything, the own forbids of the newer bundle, and what cannot be as further forbids.
        open: Box<CompiledPolicySet>,
        /// Own forbids of the older bundle.
        denying: Vec<CompiledPolicy>,
        /// Own policies of the older bundle that may err.
        older_erring: Vec<CompiledPolicy>,
        /// Own policies of the newer bundle that may err.
        erring: Vec<CompiledPolicy>,
    },
}

impl First {
    /// What is unsatisfiable if nothing is permitted newly for this reason.
    pub(crate) fn widened(&self) -> Arc<Vec<Term>> {
        let (erring, reason) = match self {
            Self::Permits {
                newer,
                older,
                erring,
                ..
            } => (erring, all(&implies_asserts(newer, older))),
            Self::Denies {
                open,
                denying,
                older_erring,
                erring,
            } => {
                let matches = denying
                    .iter()
                    .map(|policy| all(&never_matches_asserts(policy)));
                let errs = older_erring.iter();
                let errs = errs.map(|policy| all(&never_errors_asserts(policy)));
                let denied = matches.chain(errs).fold(false.into(), or);
                (erring, and(all(&always_denies_asserts(open)), denied))
            }
        };
        let mut asserts = no_error(erring);
        asserts.push(reason);
        Arc::new(asserts)
    }

    /// What to look for a model of, where both bundles are worth asking about it.
    pub(crate) fn model(&self) -> Option<WellFormedAsserts<'_>> {
        match self {
            Self::Permits {
                described, older, ..
            } => Some(implies_asserts(described, older)),
            Self::Denies { .. } => None,
        }
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
