//! Shadow replay: how the actions that were recorded lately come out with another bundle.
//!
//! What is looked at is a number of actions and not of records, and a fair share of it for each caller and each
//! principal: nobody pushes the actions of others out by asking a lot, or by leaving records that are no actions.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::ControlFlow,
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use tidelock_interceptor::{NotReplayable, recorded_request};
use tidelock_policy::{
    BlockOn, ContentId, Engine, Evaluation, PolicyRequest, Posture, Verdict, VerifiedBundle,
    limits::{REPLAY_READ_BYTES_MAX, REPLAY_READ_FOR_EACH},
};

use super::{
    node::Node,
    plan::{AcceptedFlips, short_digest},
};

/// Decisions that come out otherwise and are listed one by one.
const FLIPS_LISTED_MAX: usize = 50;

/// What reading and asking may take. Policies have no deadline here as they have it for callers.
const REPLAY_MAX: Duration = Duration::from_secs(5);

impl Node {
    /// Asks both bundles what was asked lately. Engines are pure: nothing comes of it but the answer.
    pub(super) fn replay(
        &self,
        before: &Before<'_>,
        after: &VerifiedBundle,
        span: Span,
    ) -> Result<Replay, String> {
        let begun = Instant::now();
        let is_over = || begun.elapsed() >= REPLAY_MAX;
        let mut reading = Reading::new(span);
        let newer = match span.up_to {
            None => 0,
            Some(newest) => self.log.size().saturating_sub(newest),
        };
        let count = usize::try_from(reading.reads_max.saturating_add(newer)).unwrap_or(usize::MAX);
        self.log
            .newest_first(count, &mut |index, record| {
                reading.ended_early = is_over();
                match reading.ended_early {
                    true => ControlFlow::Break(()),
                    false => reading.read(index, record, before),
                }
            })
            .map_err(|error| error.to_string())?;
        let (mut seen, actions) = reading.chosen();
        // The newest first: they are what matters if time runs out.
        for (index, bytes) in actions {
            seen.ended_early |= is_over();
            if seen.ended_early {
                break;
            }
            let record: Value = serde_json::from_slice(&bytes).unwrap_or_default();
            if let Ok(request) = recorded_request(&record)
                && let Ok(now) = before.says(&record, &request)
            {
                seen.ask(index, &record, &now, &asked(after, &request));
            }
        }
        Ok(seen)
    }
}

/// What recorded actions come out like now.
pub(super) enum Before<'a> {
    /// As this bundle says.
    Bundle(&'a VerifiedBundle),
    /// As it was recorded while this content decided: none does now, and that nothing is allowed is no measure of
    /// what may be. With no content, nothing was ever decided.
    Recorded(Option<ContentId>),
}

impl Before<'_> {
    fn says(&self, record: &Value, request: &PolicyRequest) -> Result<Evaluation, &'static str> {
        match self {
            Self::Bundle(bundle) => Ok(asked(bundle, request)),
            Self::Recorded(content) => recorded(record, content.as_ref()),
        }
    }

    /// Whether it has a word on this record.
    fn measures(&self, record: &Value) -> Result<(), &'static str> {
        match self {
            Self::Bundle(_) => Ok(()),
            Self::Recorded(content) => recorded(record, content.as_ref()).map(drop),
        }
    }
}

/// What the policies of this content said when it was recorded. What posture, quotas, time or the lack of a
/// bundle decided is no word of theirs.
fn recorded(record: &Value, content: Option<&ContentId>) -> Result<Evaluation, &'static str> {
    let reason = record.get("reason").and_then(Value::as_str);
    let verdict = match reason.unwrap_or_default() {
        "POLICY_ALLOW" => Verdict::Permit,
        "POLICY_DENY" => Verdict::Forbid,
        "NO_MATCH" => Verdict::NoMatch,
        "EVALUATION_ERROR" => Verdict::Error,
        // A decision point is asked about what the policies permit.
        reason if reason.starts_with("CONSULT_") => Verdict::Permit,
        _ => return Err("no_verdict"),
    };
    let by = record.pointer("/bundle/hash").and_then(Value::as_str);
    if content.is_none_or(|content| by != Some(content.as_str())) {
        return Err("other_bundle");
    }
    let policies = record.get("policies").cloned().unwrap_or_default();
    Ok(Evaluation {
        verdict,
        policies: serde_json::from_value(policies).unwrap_or_default(),
        errors: Vec::new(),
    })
}

/// Which actions are asked.
#[derive(Debug, Clone, Copy)]
pub(super) struct Span {
    /// At most so many.
    pub(super) last: u64,
    /// Of records after this one.
    pub(super) after: Option<u64>,
    /// Of records up to this one.
    pub(super) up_to: Option<u64>,
}

impl Span {
    pub(super) fn newest(last: u64) -> Self {
        Self {
            last,
            after: None,
            up_to: None,
        }
    }
}

/// A number of items, shared fairly among callers, and for each among the principals that it names. The newest
/// come first, and where there is no room, whoever has most gives up its oldest.
struct Window<T> {
    most: usize,
    held: usize,
    callers: BTreeMap<String, Share<T>>,
}

struct Share<T> {
    held: usize,
    principals: BTreeMap<String, Vec<T>>,
}

impl<T> Window<T> {
    fn new(most: usize) -> Self {
        Self {
            most,
            held: 0,
            callers: BTreeMap::new(),
        }
    }

    /// Takes an item that is older than all before it, if its share has room; answers whether one was left out,
    /// it or another.
    fn take(&mut self, caller: &str, principal: &str, item: T) -> bool {
        let is_full = self.held >= self.most;
        if is_full && !self.make_room(caller, principal) {
            return true;
        }
        let share = self.callers.entry(caller.to_owned()).or_insert(Share {
            held: 0,
            principals: BTreeMap::new(),
        });
        let items = share.principals.entry(principal.to_owned()).or_default();
        items.push(item);
        share.held += 1;
        self.held += 1;
        is_full
    }

    /// Gives up an item of the greatest share, if the one that comes has less even with it.
    fn make_room(&mut self, caller: &str, principal: &str) -> bool {
        let own = self.callers.get(caller).map_or(0, |share| share.held);
        let greatest = self.callers.iter().max_by_key(|(_, share)| share.held);
        let victim = match greatest {
            Some((who, share)) if share.held > own + 1 => who.clone(),
            _ => caller.to_owned(),
        };
        let Some(share) = self.callers.get_mut(&victim) else {
            return false;
        };
        let own = match victim == caller {
            true => share.principals.get(principal).map_or(0, Vec::len) + 1,
            false => 0,
        };
        let greatest = share
            .principals
            .values_mut()
            .max_by_key(|items| items.len());
        let Some(items) = greatest.filter(|items| items.len() > own) else {
            return false;
        };
        items.pop();
        share.held -= 1;
        self.held -= 1;
        true
    }

    fn callers(&self) -> usize {
        let has = |share: &&Share<T>| share.held > 0;
        self.callers.values().filter(has).count()
    }

    fn into_items(self) -> impl Iterator<Item = T> {
        let shares = self.callers.into_values();
        shares.flat_map(|share| share.principals.into_values().flatten())
    }
}

/// Records on their way into a replay.
struct Reading {
    span: Span,
    reads_max: u64,
    newest: Option<u64>,
    read: u64,
    bytes: usize,
    window: Window<(u64, Vec<u8>)>,
    left_out: BTreeMap<&'static str, u64>,
    older_unread: bool,
    ended_early: bool,
}

impl Reading {
    fn new(span: Span) -> Self {
        Self {
            span,
            reads_max: span.last.saturating_mul(REPLAY_READ_FOR_EACH),
            newest: None,
            read: 0,
            bytes: 0,
            window: Window::new(usize::try_from(span.last).unwrap_or(usize::MAX)),
            left_out: BTreeMap::new(),
            older_unread: false,
            ended_early: false,
        }
    }

    fn read(&mut self, index: u64, bytes: Vec<u8>, before: &Before<'_>) -> ControlFlow<()> {
        if self.span.up_to.is_some_and(|newest| index > newest) {
            return ControlFlow::Continue(());
        }
        if self.span.after.is_some_and(|after| index <= after) {
            self.older_unread = false;
            return ControlFlow::Break(());
        }
        self.bytes = self.bytes.saturating_add(bytes.len());
        if self.read >= self.reads_max || self.bytes > REPLAY_READ_BYTES_MAX {
            self.older_unread = true;
            return ControlFlow::Break(());
        }
        self.newest = self.newest.or(Some(index));
        self.read += 1;
        self.older_unread = self.read >= self.reads_max && index > 0;
        let record: Value = serde_json::from_slice(&bytes).unwrap_or_default();
        let is_action = recorded_request(&record).map_err(NotReplayable::as_str);
        let left_out = match is_action.and_then(|_| before.measures(&record)) {
            Err(why) => Some(why),
            Ok(()) => {
                let who = |key: &str| record.get(key).map(who).unwrap_or_default();
                let (caller, principal) = (who("caller"), who("principal"));
                let is_full = self.window.take(&caller, &principal, (index, bytes));
                is_full.then_some("share")
            }
        };
        if let Some(why) = left_out {
            *self.left_out.entry(why).or_default() += 1;
        }
        ControlFlow::Continue(())
    }

    /// What is to be asked, the newest first.
    fn chosen(self) -> (Replay, Vec<(u64, Vec<u8>)>) {
        let seen = Replay {
            newest: self.newest,
            read: self.read,
            callers: self.window.callers(),
            left_out: self.left_out,
            older_unread: self.older_unread,
            ended_early: self.ended_early,
            ..Replay::default()
        };
        let mut actions: Vec<_> = self.window.into_items().collect();
        actions.sort_by(|(one, _), (other, _)| other.cmp(one));
        (seen, actions)
    }
}

/// A name for a caller or principal, whatever door it came by.
fn who(of: &Value) -> String {
    json!([of.get("type"), of.get("id")]).to_string()
}

/// What a bundle says to a recorded request, as if it were new and its node well.
fn asked(bundle: &VerifiedBundle, request: &PolicyRequest) -> Evaluation {
    let mut request = request.clone();
    match bundle.describe_node(&mut request, Posture::Normal, 0) {
        Ok(()) => bundle.evaluate(&request),
        Err(error) => Evaluation {
            verdict: Verdict::Error,
            policies: Vec::new(),
            errors: vec![error],
        },
    }
}

/// How recorded actions come out.
#[derive(Default)]
pub(super) struct Replay {
    /// The newest record that was looked at.
    newest: Option<u64>,
    /// Records that were looked at.
    read: u64,
    /// Whose actions were asked.
    callers: usize,
    same: u64,
    flips: Vec<Value>,
    to_allow: Flips,
    to_deny: Flips,
    left_out: BTreeMap<&'static str, u64>,
    older_unread: bool,
    ended_early: bool,
}

/// Actions that come out otherwise in one direction.
#[derive(Default)]
struct Flips {
    count: u64,
    /// Each as it is shown. The same action again is no other flip.
    shown: BTreeSet<String>,
}

impl Replay {
    fn ask(&mut self, index: u64, record: &Value, now: &Evaluation, then: &Evaluation) {
        let is_allowed = |said: &Evaluation| said.verdict == Verdict::Permit;
        let flips = match (is_allowed(now), is_allowed(then)) {
            (false, true) => &mut self.to_allow,
            (true, false) => &mut self.to_deny,
            _ => {
                self.same += 1;
                return;
            }
        };
        let part = |key: &str| record.get(key).cloned().unwrap_or_default();
        let mut flip = json!({
            "principal": part("principal"),
            "action": part("action"),
            "resource": part("resource"),
            "before": {"verdict": now.verdict, "policies": now.policies},
            "after": {"verdict": then.verdict, "policies": then.policies, "errors": then.errors},
        });
        flips.count += 1;
        flips.shown.insert(flip.to_string());
        if self.flips.len() < FLIPS_LISTED_MAX
            && let Some(fields) = flip.as_object_mut()
        {
            fields.insert("index".to_owned(), index.into());
            self.flips.push(flip);
        }
    }

    /// How many were asked.
    pub(super) fn asked(&self) -> u64 {
        self.same + self.to_allow.count + self.to_deny.count
    }

    /// Whether time ran out before all were asked.
    pub(super) fn ended_early(&self) -> bool {
        self.ended_early
    }

    /// Whether older records were left unread.
    pub(super) fn older_unread(&self) -> bool {
        self.older_unread
    }

    /// How many that were denied would be allowed, and the other way round.
    pub(super) fn flips(&self) -> (u64, u64) {
        (self.to_allow.count, self.to_deny.count)
    }

    /// Those that block by this rule, each as it is shown.
    pub(super) fn blocking(&self, block_on: BlockOn) -> impl Iterator<Item = &String> {
        let (to_allow, to_deny) = match block_on {
            BlockOn::None => (None, None),
            BlockOn::DenyToAllow => (Some(&self.to_allow), None),
            BlockOn::AnyFlip => (Some(&self.to_allow), Some(&self.to_deny)),
        };
        let both = to_allow.into_iter().chain(to_deny);
        both.flat_map(|flips| &flips.shown)
    }

    /// What an operator who accepts these accepts: up to which record, and a name of those that block.
    pub(super) fn acceptable(&self, block_on: BlockOn) -> AcceptedFlips {
        let text = match self.ended_early {
            // Not all were shown, and more than was shown was accepted.
            true => "ended early".to_owned(),
            false => {
                let lines = self.blocking(block_on).map(|flip| format!("{flip}\n"));
                lines.collect()
            }
        };
        AcceptedFlips {
            newest: self.newest.unwrap_or_default(),
            digest: short_digest(&text),
        }
    }

    /// Together with what was recorded since.
    pub(super) fn and(mut self, since: Self) -> Self {
        self.same += since.same;
        self.to_allow.count += since.to_allow.count;
        self.to_deny.count += since.to_deny.count;
        self.ended_early |= since.ended_early;
        self
    }

    /// How many came out otherwise.
    pub(super) fn counts(self) -> Value {
        json!({
            "asked": self.asked(), "deny_to_allow": self.to_allow.count, "allow_to_deny": self.to_deny.count,
            "ended_early": self.ended_early,
        })
    }

    pub(super) fn told(self) -> Value {
        json!({
            "records_read": self.read,
            "older_unread": self.older_unread,
            "asked": self.asked(),
            "callers": self.callers,
            "same": self.same,
            "deny_to_allow": self.to_allow.count,
            "allow_to_deny": self.to_deny.count,
            "flips": self.flips,
            "not_asked": self.left_out,
            "ended_early": self.ended_early,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How many of each caller and principal are left of a window.
    fn filled(most: usize, items: &[(&str, &str, usize)]) -> Vec<(String, usize)> {
        let mut window = Window::new(most);
        let mut left_out = 0;
        for (caller, principal, count) in items {
            for _ in 0..*count {
                let item = format!("{caller} {principal}");
                left_out += usize::from(window.take(caller, principal, item));
            }
        }
        let all: usize = items.iter().map(|(_, _, count)| count).sum();
        let mut held: BTreeMap<String, usize> = BTreeMap::new();
        for item in window.into_items() {
            *held.entry(item).or_default() += 1;
        }
        assert_eq!(held.values().sum::<usize>() + left_out, all);
        held.into_iter().collect()
    }

    fn of(counts: &[(&str, usize)]) -> Vec<(String, usize)> {
        let named = |(who, count): &(&str, usize)| ((*who).to_owned(), *count);
        counts.iter().map(named).collect()
    }

    #[test]
    fn no_caller_pushes_the_actions_of_others_out() {
        // The control: where there is room, all are taken.
        let few = [("a", "x", 3), ("b", "y", 7)];
        assert_eq!(filled(10, &few), of(&[("a x", 3), ("b y", 7)]));
        assert_eq!(filled(10, &[("a", "x", 90)]), of(&[("a x", 10)]));
        // One that asks a lot leaves the others their share, whether they came before it or after.
        let flood = [("a", "x", 1_000), ("b", "y", 9), ("c", "z", 2)];
        assert_eq!(
            filled(12, &flood),
            of(&[("a x", 5), ("b y", 5), ("c z", 2)])
        );
        let flood = [("c", "z", 2), ("b", "y", 9), ("a", "x", 1_000)];
        assert_eq!(
            filled(12, &flood),
            of(&[("a x", 5), ("b y", 5), ("c z", 2)])
        );
    }

    #[test]
    fn who_names_many_principals_has_one_share_of_a_caller() {
        let names: Vec<String> = (0..500).map(|n| format!("p{n:03}")).collect();
        let mut items: Vec<(&str, &str, usize)> =
            names.iter().map(|name| ("a", name.as_str(), 1)).collect();
        items.push(("b", "y", 6));
        let held = filled(12, &items);
        let of_b = held.iter().find(|(who, _)| who == "b y").unwrap();
        assert_eq!(of_b.1, 6);
        // Nor do the principals behind one proxy push each other out.
        let held = filled(12, &[("a", "x", 1_000), ("a", "y", 3)]);
        assert_eq!(held, of(&[("a x", 9), ("a y", 3)]));
    }

    #[test]
    fn inv_07_no_more_is_read_than_a_bound_and_that_is_told() {
        let event = || json!({"type": "event"}).to_string().into_bytes();
        let mut reading = Reading::new(Span::newest(2));
        for index in (0..reading.reads_max).rev() {
            assert!(
                reading
                    .read(index, event(), &Before::Recorded(None))
                    .is_continue()
            );
        }
        let (seen, actions) = reading.chosen();
        assert_eq!((seen.read, seen.older_unread), (40, false));
        assert!(actions.is_empty());
        assert_eq!(seen.left_out, BTreeMap::from([("no_decision", 40)]));
        // The control: with one more there would have been something older.
        let mut reading = Reading::new(Span::newest(2));
        for index in (1..=reading.reads_max).rev() {
            _ = reading.read(index, event(), &Before::Recorded(None));
        }
        assert!(reading.chosen().0.older_unread);
        let mut reading = Reading::new(Span::newest(1_000));
        let read = |reading: &mut Reading, index| {
            let long = vec![b' '; REPLAY_READ_BYTES_MAX / 2];
            reading.read(index, long, &Before::Recorded(None))
        };
        assert!(read(&mut reading, 9).is_continue());
        assert!(read(&mut reading, 8).is_continue());
        assert!(read(&mut reading, 7).is_break());
        assert!(reading.older_unread);
    }

    #[test]
    fn where_no_bundle_decides_the_word_of_the_last_one_is_the_measure() {
        let content = ContentId::of(b"the newest");
        let said = |reason: &str, by: &[u8]| {
            let record =
                json!({"reason": reason, "bundle": {"hash": ContentId::of(by)}, "policies": ["p"]});
            recorded(&record, Some(&content)).map(|said| said.verdict)
        };
        for (reason, verdict) in [
            ("POLICY_ALLOW", Ok(Verdict::Permit)),
            ("POLICY_DENY", Ok(Verdict::Forbid)),
            ("NO_MATCH", Ok(Verdict::NoMatch)),
            ("EVALUATION_ERROR", Ok(Verdict::Error)),
            ("CONSULT_DENIED", Ok(Verdict::Permit)),
            ("NO_POLICY", Err("no_verdict")),
            ("RATE_LIMIT_EXCEEDED", Err("no_verdict")),
            ("POSTURE_CLOSED", Err("no_verdict")),
            ("DEADLINE", Err("no_verdict")),
        ] {
            assert_eq!(said(reason, b"the newest"), verdict, "{reason}");
        }
        // What an older one said is not what the newest would have.
        assert_eq!(said("POLICY_ALLOW", b"an older one"), Err("other_bundle"));
        let record = json!({"reason": "POLICY_ALLOW"});
        assert_eq!(recorded(&record, Some(&content)), Err("other_bundle"));
        assert_eq!(recorded(&record, None), Err("other_bundle"));
    }

    #[test]
    fn a_span_is_read_between_its_ends() {
        let event = || json!({"type": "event"}).to_string().into_bytes();
        let read = |after, up_to| {
            let mut reading = Reading::new(Span {
                after,
                up_to,
                ..Span::newest(1)
            });
            let mut indexes = (0..50).rev();
            _ = indexes.try_for_each(|index| reading.read(index, event(), &Before::Recorded(None)));
            (reading.newest, reading.read, reading.older_unread)
        };
        assert_eq!(read(None, None), (Some(49), 20, true));
        assert_eq!(read(None, Some(9)), (Some(9), 10, false));
        assert_eq!(read(Some(40), None), (Some(49), 9, false));
        assert_eq!(read(Some(29), None), (Some(49), 20, false));
        assert_eq!(read(Some(28), None), (Some(49), 20, true));
        assert_eq!(read(Some(49), None), (None, 0, false));
    }
}
