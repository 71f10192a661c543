//! In whose name a bundle speaks, from when and until when.

use serde::{Deserialize, Serialize};

use crate::error::BundleError;
use crate::limits::BREAK_GLASS_S_MAX;
use crate::posture::Posture;
use crate::trust::Role;

/// What the end of a bundle's time does.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WhenExpired {
    /// Nothing is permitted any more.
    #[default]
    Close,
    /// Posture `restricted` at best: each class's `when_restricted` says what still is.
    Restrict,
}

/// The checked limits of a bundle in time, as its manifest states them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Validity {
    /// The role whose keys must have signed it.
    pub role: Role,
    /// Before this trusted time it decides nothing, Unix milliseconds.
    pub not_before_unix_ms: Option<u64>,
    /// From this trusted time on it has expired, Unix milliseconds.
    pub expires_unix_ms: Option<u64>,
    /// What that does.
    pub when_expired: WhenExpired,
}

impl Validity {
    /// Posture of every class at this trusted time, whatever the bundle's age.
    #[must_use]
    pub fn posture(&self, trusted_now_unix_ms: u64) -> Posture {
        let early = self
            .not_before_unix_ms
            .is_some_and(|from| trusted_now_unix_ms < from);
        let late = self
            .expires_unix_ms
            .is_some_and(|end| trusted_now_unix_ms >= end);
        match (early, late, self.when_expired) {
            (true, _, _) | (_, true, WhenExpired::Close) => Posture::Closed,
            (_, true, WhenExpired::Restrict) => Posture::Restricted,
            // An emergency never looks like every day.
            _ if self.role == Role::BreakGlass => Posture::Stale,
            _ => Posture::Normal,
        }
    }

    /// Whether a bundle may begin to decide at this trusted time.
    ///
    /// # Errors
    /// [`BundleError::NotYet`] or [`BundleError::Expired`].
    pub fn check_now(&self, trusted_now_unix_ms: u64) -> Result<(), BundleError> {
        match (self.not_before_unix_ms, self.expires_unix_ms) {
            (Some(from), _) if trusted_now_unix_ms < from => Err(BundleError::NotYet {
                seconds: (from - trusted_now_unix_ms).div_ceil(1000),
            }),
            (_, Some(end)) if trusted_now_unix_ms >= end => Err(BundleError::Expired {
                seconds: (trusted_now_unix_ms - end) / 1000,
            }),
            _ => Ok(()),
        }
    }

    /// What makes no sense about it, for a bundle made at this time.
    pub(crate) fn problems(&self, created_unix_ms: u64) -> Vec<String> {
        let mut problems = Vec::new();
        let begins = self.not_before_unix_ms.unwrap_or(created_unix_ms);
        if let Some(end) = self.expires_unix_ms
            && end <= begins.max(created_unix_ms)
        {
            problems.push("expires_at must lie after created_at and not_before".to_owned());
        }
        if self.when_expired == WhenExpired::Restrict && self.expires_unix_ms.is_none() {
            problems.push("when_expired says what expires_at does, and there is none".to_owned());
        }
        match self.role {
            Role::Policy => {}
            Role::BreakGlass => {
                let end_max = created_unix_ms.saturating_add(BREAK_GLASS_S_MAX * 1000);
                if self.expires_unix_ms.is_none_or(|end| end > end_max) {
                    problems.push(format!(
                        "a break-glass bundle must have expires_at, at most {} hours after created_at",
                        BREAK_GLASS_S_MAX / 3600
                    ));
                }
                if self.when_expired != WhenExpired::Close {
                    problems.push("a break-glass bundle ends with when_expired `close`".to_owned());
                }
            }
            Role::Release | Role::Trust => {
                problems.push(format!(
                    "role must be `policy` or `break-glass`, not `{}`",
                    self.role
                ));
            }
        }
        problems
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const T: u64 = 1_769_860_800_000;

    fn window(role: Role, when_expired: WhenExpired) -> Validity {
        Validity {
            role,
            not_before_unix_ms: Some(T),
            expires_unix_ms: Some(T + 10_000),
            when_expired,
        }
    }

    #[test]
    fn outside_its_time_a_bundle_is_closed_or_restricted_as_it_says() {
        let close = window(Role::Policy, WhenExpired::Close);
        let restrict = window(Role::Policy, WhenExpired::Restrict);
        for (now, closes, restricts) in [
            (0, Posture::Closed, Posture::Closed),
            (T - 1, Posture::Closed, Posture::Closed),
            (T, Posture::Normal, Posture::Normal),
            (T + 9_999, Posture::Normal, Posture::Normal),
            (T + 10_000, Posture::Closed, Posture::Restricted),
            (u64::MAX, Posture::Closed, Posture::Restricted),
        ] {
            assert_eq!(close.posture(now), closes, "{now}");
            assert_eq!(restrict.posture(now), restricts, "{now}");
        }
        assert_eq!(close.check_now(T - 1).unwrap_err().code(), "BUNDLE_NOT_YET");
        assert_eq!(close.check_now(T), Ok(()));
        let late = restrict.check_now(T + 12_000).unwrap_err();
        assert_eq!(late, BundleError::Expired { seconds: 2 });
        // Without limits there are none.
        assert_eq!(Validity::default().posture(u64::MAX), Posture::Normal);
        assert_eq!(Validity::default().check_now(0), Ok(()));
    }

    #[test]
    fn break_glass_is_short_loud_and_ends_closed() {
        let glass = window(Role::BreakGlass, WhenExpired::Close);
        assert_eq!(glass.problems(T), Vec::<String>::new());
        assert_eq!(glass.posture(T), Posture::Stale);
        assert_eq!(glass.posture(T + 10_000), Posture::Closed);
        let longest = T + BREAK_GLASS_S_MAX * 1000;
        for (expires_unix_ms, when_expired, good) in [
            (Some(longest), WhenExpired::Close, true),
            (Some(longest + 1), WhenExpired::Close, false),
            (None, WhenExpired::Close, false),
            (Some(T + 1), WhenExpired::Restrict, false),
        ] {
            let glass = Validity {
                expires_unix_ms,
                when_expired,
                ..glass
            };
            assert_eq!(glass.problems(T).is_empty(), good, "{glass:?}");
        }
        for role in [Role::Release, Role::Trust] {
            assert!(!window(role, WhenExpired::Close).problems(T).is_empty());
        }
    }
}
