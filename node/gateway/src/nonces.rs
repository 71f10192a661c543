//! Nonces of signed requests that were seen, so that none counts twice.
//!
//! A nonce is held until the signature that brought it has expired, and is never forgotten before:
//! where there is no room the request is refused. Only a signature that verified takes room.
//!
//! What was made before the window began is refused, because its nonce may have been seen then: by an
//! earlier run of the process, or before an operator set the clock back.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, PoisonError};

use aws_lc_rs::digest::{SHA256, digest};

use crate::credentials::CredentialFault;
use crate::limits::{NONCES_MAX, NONCES_PER_KEY_MAX, SIGNATURE_SKEW_MS};

/// A nonce of a key, as 16 bytes that nobody can make collide at will.
type Seen = [u8; 16];

/// All nonces that are held.
#[derive(Debug, Default)]
pub(crate) struct NonceWindow(Mutex<Held>);

#[derive(Debug, Default)]
struct Held {
    /// Since when every nonce is known, and the latest time seen.
    began_unix_ms: Option<u64>,
    latest_unix_ms: u64,
    /// Until when each is held, and whose it is.
    seen: BTreeMap<Seen, (u64, String)>,
    by_end: BTreeSet<(u64, Seen)>,
    of_key: BTreeMap<String, usize>,
}

fn mark(key_id: &str, nonce: &str) -> Seen {
    // A key's name holds no line break, so that no pair reads as another.
    let hash = digest(&SHA256, format!("{key_id}\n{nonce}").as_bytes());
    let mut seen = Seen::default();
    for (slot, byte) in seen.iter_mut().zip(hash.as_ref()) {
        *slot = *byte;
    }
    seen
}

/// When a signature was made and when it ends, Unix milliseconds.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Lasts {
    pub(crate) created_unix_ms: u64,
    pub(crate) ends_unix_ms: u64,
}

impl NonceWindow {
    /// Begins now, or begins anew where time has gone back since; not by a clock in doubt. The clock is read
    /// under the lock here and below: whoever read it earlier and came later would look like time going back.
    pub(crate) fn begin(&self, now_unix_ms: impl FnOnce() -> Result<u64, CredentialFault>) {
        let mut held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Ok(now_unix_ms) = now_unix_ms() {
            held.observe(now_unix_ms);
        }
    }

    /// Takes a nonce that was not seen before and holds it until its signature has ended.
    ///
    /// # Errors
    /// It was seen or may have been, or there is no room for it.
    // INV-07: at most NONCES_MAX, and NONCES_PER_KEY_MAX of one key.
    pub(crate) fn take(
        &self,
        key_id: &str,
        nonce: &str,
        lasts: Lasts,
        now_unix_ms: impl FnOnce() -> Result<u64, CredentialFault>,
    ) -> Result<(), CredentialFault> {
        let mut held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let now_unix_ms = now_unix_ms()?;
        // Another thread may have let go of it since its end was looked at.
        if lasts.ends_unix_ms < now_unix_ms {
            return Err(CredentialFault::SignatureExpired);
        }
        let began_unix_ms = held.observe(now_unix_ms);
        // Earlier signatures were taken although they were made up to the skew ahead.
        if lasts.created_unix_ms <= began_unix_ms.saturating_add(SIGNATURE_SKEW_MS) {
            return Err(CredentialFault::SignatureBeforeStart);
        }
        let ends_unix_ms = lasts.ends_unix_ms;
        held.drop_ended(now_unix_ms);
        let mark = mark(key_id, nonce);
        if held.seen.contains_key(&mark) {
            return Err(CredentialFault::SignatureReplayed);
        }
        let of_key = held.of_key.get(key_id).copied().unwrap_or(0);
        if of_key >= NONCES_PER_KEY_MAX || held.seen.len() >= NONCES_MAX {
            return Err(CredentialFault::NonceWindowFull);
        }
        held.seen.insert(mark, (ends_unix_ms, key_id.to_owned()));
        held.by_end.insert((ends_unix_ms, mark));
        *held.of_key.entry(key_id.to_owned()).or_default() += 1;
        Ok(())
    }

    #[cfg(test)]
    fn len(&self) -> usize {
        self.0.lock().unwrap().seen.len()
    }
}

impl Held {
    fn observe(&mut self, now_unix_ms: u64) -> u64 {
        let gone_back = now_unix_ms < self.latest_unix_ms;
        self.latest_unix_ms = now_unix_ms;
        match self.began_unix_ms {
            Some(began) if !gone_back => began,
            _ => *self.began_unix_ms.insert(now_unix_ms),
        }
    }

    fn drop_ended(&mut self, now_unix_ms: u64) {
        while let Some((end, mark)) = self.by_end.first().copied()
            && end < now_unix_ms
        {
            self.by_end.pop_first();
            let Some((_, key_id)) = self.seen.remove(&mark) else {
                continue;
            };
            if let Some(count) = self.of_key.get_mut(&key_id) {
                *count = count.saturating_sub(1);
                if *count == 0 {
                    self.of_key.remove(&key_id);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Long after the window began at 0.
    const T: u64 = 1_000_000;

    fn begun() -> NonceWindow {
        let window = NonceWindow::default();
        window.begin(|| Ok(0));
        window
    }

    fn take(
        window: &NonceWindow,
        (key, nonce): (&str, &str),
        ends_unix_ms: u64,
        now_unix_ms: u64,
    ) -> Result<(), CredentialFault> {
        let lasts = Lasts {
            created_unix_ms: T,
            ends_unix_ms,
        };
        window.take(key, nonce, lasts, || Ok(now_unix_ms))
    }

    #[test]
    fn inv_07_nonces_are_bounded_and_only_what_has_ended_is_forgotten() {
        let window = begun();
        for at in 0..NONCES_PER_KEY_MAX {
            assert_eq!(take(&window, ("a", &at.to_string()), T + 1, T), Ok(()));
        }
        let full = Err(CredentialFault::NonceWindowFull);
        assert_eq!(take(&window, ("a", "more"), T + 1, T), full);
        // One key's flood costs another nothing, until all is full.
        for key in 1..NONCES_MAX / NONCES_PER_KEY_MAX {
            let key = format!("b{key}");
            for at in 0..NONCES_PER_KEY_MAX {
                assert_eq!(take(&window, (&key, &at.to_string()), T + 9, T), Ok(()));
            }
        }
        assert_eq!(take(&window, ("c", "1"), T + 1, T), full);
        // Nothing was pushed out: what was seen is still refused as such.
        let replayed = Err(CredentialFault::SignatureReplayed);
        assert_eq!(take(&window, ("a", "0"), T + 1, T + 1), replayed);
        // Those of `a` have ended.
        assert_eq!(take(&window, ("c", "1"), T + 9, T + 2), Ok(()));
        assert_eq!(take(&window, ("b1", "0"), T + 9, T + 2), replayed);
        assert_eq!(window.len(), NONCES_MAX - NONCES_PER_KEY_MAX + 1);
    }

    #[test]
    fn of_several_at_once_exactly_one_passes() {
        for round in 0..50 {
            let window = begun();
            let nonce = round.to_string();
            let passed = std::sync::atomic::AtomicUsize::new(0);
            std::thread::scope(|scope| {
                for _ in 0..4 {
                    scope.spawn(|| {
                        if take(&window, ("a", &nonce), T + 1, T).is_ok() {
                            passed.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
                        }
                    });
                }
            });
            assert_eq!(passed.into_inner(), 1);
        }
    }

    /// Another thread went on to a later time and let go of the nonce, while this one stood before the lock.
    #[test]
    fn what_ended_before_the_lock_was_had_is_not_taken_again() {
        let window = begun();
        assert_eq!(take(&window, ("a", "1"), T + 1, T), Ok(()));
        assert_eq!(take(&window, ("a", "2"), T + 9, T + 2), Ok(()));
        assert_eq!(window.len(), 1, "the first has ended");
        assert_eq!(
            take(&window, ("a", "1"), T + 1, T + 2),
            Err(CredentialFault::SignatureExpired)
        );
    }

    #[test]
    fn inv_18_what_may_have_been_seen_before_the_window_began_is_refused() {
        let before = Err(CredentialFault::SignatureBeforeStart);
        let window = NonceWindow::default();
        window.begin(|| Ok(T - SIGNATURE_SKEW_MS));
        assert_eq!(take(&window, ("a", "1"), T + 9, T), before);
        let window = NonceWindow::default();
        window.begin(|| Ok(T - SIGNATURE_SKEW_MS - 1));
        assert_eq!(
            take(&window, ("a", "1"), T + 9, T),
            Ok(()),
            "positive control"
        );
        // An operator sets the clock back after the nonce was forgotten.
        assert_eq!(take(&window, ("a", "2"), T + 19, T + 10), Ok(()));
        assert_eq!(take(&window, ("a", "1"), T + 9, T), before);
        // A window that never heard of a time begins with the first one.
        assert_eq!(take(&NonceWindow::default(), ("a", "1"), T + 9, T), before);
    }

    proptest! {
        /// Against the plain truth: a nonce passes if it is not among those whose end has not passed.
        #[test]
        fn a_nonce_passes_once_within_its_time_whatever_the_order(
            steps in proptest::collection::vec((0_u8..3, 0_u8..6, 0_u64..40, 0_u64..15), 1..120),
        ) {
            let window = begun();
            let mut truth: BTreeMap<(u8, u8), u64> = BTreeMap::new();
            let mut now = T;
            for (key, nonce, lasts, passes) in steps {
                now += passes;
                truth.retain(|_, end| *end >= now);
                let fresh = !truth.contains_key(&(key, nonce));
                let named = (&*key.to_string(), &*nonce.to_string());
                let took = take(&window, named, now + lasts, now);
                prop_assert_eq!(took.is_ok(), fresh);
                if fresh {
                    truth.insert((key, nonce), now + lasts);
                }
                prop_assert_eq!(window.len(), truth.len());
            }
        }
    }
}
