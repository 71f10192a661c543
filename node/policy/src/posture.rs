//! How much an ageing bundle still permits.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::manifest::ClassLimits;

/// What connectivity, policy age, clock and disk permit just now; this crate judges the age.
///
/// Ordered from the freest to the strictest, so the worse of two is their maximum.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(rename_all = "lowercase")]
pub enum Posture {
    /// Everything is within its limits.
    #[default]
    Normal,
    /// The bundle is older than it should be; it still decides, and every answer says so.
    Stale,
    /// Only classes that the bundle does not mark `when_restricted: deny` are still decided.
    Restricted,
    /// Nothing of the class is permitted.
    Closed,
}

impl Posture {
    /// The word that records, answers and metrics carry.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Normal => "normal",
            Self::Stale => "stale",
            Self::Restricted => "restricted",
            Self::Closed => "closed",
        }
    }
}

impl fmt::Display for Posture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Posture of an action class whose bundle was made, or last confirmed by its authority, at
/// `created_unix_ms`, and never better than `floor`.
///
/// A clock behind that time makes the age zero: a node whose clock was never set goes on deciding,
/// and whether the clock itself can be trusted is judged by the time floor, not here.
#[must_use]
pub fn posture(
    created_unix_ms: u64,
    trusted_now_unix_ms: u64,
    limits: &ClassLimits,
    floor: Posture,
) -> Posture {
    let age_s = trusted_now_unix_ms.saturating_sub(created_unix_ms) / 1000;
    let by_age = if age_s >= limits.close_after_s {
        Posture::Closed
    } else if age_s >= limits.restrict_after_s {
        Posture::Restricted
    } else if age_s >= limits.stale_after_s {
        Posture::Stale
    } else {
        Posture::Normal
    };
    by_age.max(floor)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manifest::WhenRestricted;

    const CREATED: u64 = 1_700_000_000_000;

    fn at(now: u64, floor: Posture) -> Posture {
        let limits = ClassLimits {
            actions: Vec::new(),
            stale_after_s: 10,
            restrict_after_s: 20,
            close_after_s: 30,
            when_restricted: WhenRestricted::Deny,
            consult: None,
        };
        posture(CREATED, now, &limits, floor)
    }

    #[test]
    fn posture_moves_with_age() {
        for (age_ms, expected) in [
            (0, Posture::Normal),
            (9_999, Posture::Normal),
            (10_000, Posture::Stale),
            (19_999, Posture::Stale),
            (20_000, Posture::Restricted),
            (29_999, Posture::Restricted),
            (30_000, Posture::Closed),
            (u64::MAX - CREATED, Posture::Closed),
        ] {
            assert_eq!(at(CREATED + age_ms, Posture::Normal), expected, "{age_ms}");
        }
    }

    #[test]
    fn a_clock_behind_created_at_makes_the_age_zero() {
        assert_eq!(at(0, Posture::Normal), Posture::Normal);
        assert_eq!(at(CREATED - 1, Posture::Normal), Posture::Normal);
        // The floor holds all the same.
        assert_eq!(at(0, Posture::Restricted), Posture::Restricted);
    }

    #[test]
    fn the_floor_only_worsens() {
        assert_eq!(at(CREATED, Posture::Stale), Posture::Stale);
        assert_eq!(at(CREATED + 15_000, Posture::Normal), Posture::Stale);
        assert_eq!(
            at(CREATED + 15_000, Posture::Restricted),
            Posture::Restricted
        );
        assert_eq!(at(CREATED + 60_000, Posture::Restricted), Posture::Closed);
    }

    #[test]
    fn words_are_the_same_everywhere() {
        for posture in [
            Posture::Normal,
            Posture::Stale,
            Posture::Restricted,
            Posture::Closed,
        ] {
            let json = serde_json::to_string(&posture).unwrap();
            assert_eq!(json, format!("\"{posture}\""));
            assert_eq!(serde_json::from_str::<Posture>(&json).unwrap(), posture);
        }
        assert!(Posture::Normal < Posture::Stale && Posture::Restricted < Posture::Closed);
    }
}
