//! `tidelock audit stat`: what is held of each log, from the index of the store, or from headers.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;
use tidelock_segments::{
    Ladder, NodeId, Origin, Usage,
    offline::{Offline, OwnLog, Progress, Source},
};

use super::{
    Exit, Failure, Output,
    output::{human_bytes, table},
    segment::Rooted,
};
use crate::{clock::wall_unix_ms, config::Config};

/// What is held of one log.
#[derive(Debug, Default, Serialize)]
struct LogStat {
    /// Whether it is a log of this node.
    own: bool,
    /// Whether it is the log that this node writes now.
    current: bool,
    /// Whether a peer was seen to hold a later part of it, so that the next incarnation follows.
    superseded: bool,
    incarnation: u64,
    segments: u64,
    sealed_records: u64,
    unsealed_records: u64,
    /// Lowest index held; none where nothing is.
    first_index: Option<u64>,
    last_index: Option<u64>,
    /// Records below it were evicted under licence.
    min_index: u64,
    stored_bytes: u64,
    /// Bytes before compression, where headers were read.
    raw_bytes: Option<u64>,
    /// Stored bytes of a sealed record, index and proofs included.
    bytes_per_record: Option<u64>,
    /// Of own logs: records that fewer custodians hold than `audit.custody` demands, at least one.
    unreplicated_records: u64,
    oldest_unreplicated_unix_ms: Option<u64>,
    oldest_unreplicated_age_s: Option<u64>,
    /// Segments by custodian.
    custodians: BTreeMap<NodeId, u64>,
}

/// What the ceiling leaves.
#[derive(Debug, Serialize)]
struct DiskStat {
    #[serde(flatten)]
    usage: Usage,
    ladder: Ladder,
    /// What the own logs take an hour, by the sealed segments of the last day.
    own_bytes_per_hour: Option<u64>,
    /// When the own share is full at that rate and nothing is evicted.
    hours_to_full: Option<u64>,
}

#[derive(Debug, Serialize)]
struct Stat {
    logs: BTreeMap<Origin, LogStat>,
    disk: DiskStat,
}

/// How far back the rate of growth looks.
const RATE_WINDOW_MS: u64 = 24 * 60 * 60 * 1_000;
const HOUR_MS: u64 = 60 * 60 * 1_000;

pub(super) fn run(rooted: &Rooted, headers: bool, output: &Output) -> Result<Exit, Failure> {
    let offline = rooted.offline()?;
    let source = match headers {
        true => Source::Headers,
        false => Source::Index,
    };
    let stat = collect(&offline, rooted, source, *output)?;
    output.say(&stat, || text(&stat));
    Ok(Exit::Done)
}

fn collect(
    offline: &Offline<'_>,
    rooted: &Rooted,
    source: Source,
    output: Output,
) -> Result<Stat, Failure> {
    let config = &rooted.config;
    let now = wall_unix_ms();
    let own = offline.own_log()?;
    let custodians = offline.custodians()?;
    let mut bar = output.bar("reading");
    let mut progress = Progress::default();
    let mut logs: BTreeMap<Origin, LogStat> = BTreeMap::new();
    let mut grown: BTreeMap<u64, u64> = BTreeMap::new();
    // What cannot be described is for `segment fsck` to say.
    offline.audit_segments(source, &mut |held, total| {
        progress.files += 1;
        progress.files_total = total;
        bar.show(progress);
        let (id, origin) = (&held.reference.id, &held.reference.origin);
        let log = entry(&mut logs, origin, config, own.as_ref());
        log.segments += 1;
        log.sealed_records += held.records();
        log.stored_bytes += held.reference.size_bytes;
        log.raw_bytes = match log.segments {
            1 => held.raw_bytes,
            _ => log.raw_bytes.zip(held.raw_bytes).map(|(a, b)| a + b),
        };
        log.hold(held.span.first, held.span.last);
        let by: BTreeSet<&NodeId> = custodians.get(id).into_iter().flatten().collect();
        for custodian in &by {
            *log.custodians.entry((*custodian).clone()).or_default() += 1;
        }
        if log.own {
            if by.len() < usize::try_from(config.audit.custody.max(1)).unwrap_or(usize::MAX) {
                log.lacks(held.records(), held.created_unix_ms, now);
            }
            if now.saturating_sub(held.created_unix_ms) <= RATE_WINDOW_MS {
                *grown.entry(held.created_unix_ms).or_default() += held.allocated_bytes;
            }
        }
    })?;
    drop(bar);
    if let Some(own) = &own {
        let log = entry(&mut logs, &own.origin, config, Some(own));
        for file in offline.log_files(&own.origin)? {
            log.unsealed_records += file.records;
            if let Some(more) = file.records.checked_sub(1) {
                log.hold(file.first_index, file.first_index.saturating_add(more));
                log.lacks(file.records, file.created_unix_ms, now);
            }
        }
    }
    for log in logs.values_mut() {
        log.bytes_per_record = log.stored_bytes.checked_div(log.sealed_records);
    }
    let (usage, ladder) = offline.usage_of(&rooted.fsck_options())?;
    let own_bytes_per_hour = per_hour(&grown);
    let limit = usage
        .ceiling_bytes
        .saturating_sub(usage.reserve_bytes)
        .saturating_sub(usage.custody_max_bytes);
    let used = usage.allocated_bytes.saturating_sub(usage.custody_bytes);
    Ok(Stat {
        logs,
        disk: DiskStat {
            usage,
            ladder,
            own_bytes_per_hour,
            hours_to_full: own_bytes_per_hour
                .and_then(|rate| limit.saturating_sub(used).checked_div(rate)),
        },
    })
}

fn entry<'l>(
    logs: &'l mut BTreeMap<Origin, LogStat>,
    origin: &Origin,
    config: &Config,
    own: Option<&OwnLog>,
) -> &'l mut LogStat {
    logs.entry(origin.clone()).or_insert_with(|| LogStat {
        own: origin.audit_node() == Some(config.node.id.as_str()),
        current: own.is_some_and(|own| own.origin == *origin),
        superseded: own.is_some_and(|own| own.superseded && own.origin == *origin),
        incarnation: origin.audit_parts().map_or(0, |parts| parts.2),
        min_index: own.map_or(0, |own| own.min_index(origin)),
        ..LogStat::default()
    })
}

impl LogStat {
    fn hold(&mut self, first: u64, last: u64) {
        self.first_index = Some(self.first_index.map_or(first, |held| held.min(first)));
        self.last_index = Some(self.last_index.map_or(last, |held| held.max(last)));
    }

    fn lacks(&mut self, records: u64, since_unix_ms: u64, now_unix_ms: u64) {
        self.unreplicated_records += records;
        let oldest = self
            .oldest_unreplicated_unix_ms
            .map_or(since_unix_ms, |oldest| oldest.min(since_unix_ms));
        self.oldest_unreplicated_unix_ms = Some(oldest);
        self.oldest_unreplicated_age_s = Some(now_unix_ms.saturating_sub(oldest) / 1_000);
    }
}

/// Bytes an hour of what was sealed at these times; none where there is no span of time to speak of.
fn per_hour(grown: &BTreeMap<u64, u64>) -> Option<u64> {
    let (first, _) = grown.first_key_value()?;
    let (last, _) = grown.last_key_value()?;
    let spent_ms = last.checked_sub(*first).filter(|spent| *spent > 0)?;
    // The first was filled before the span began.
    let bytes: u64 = grown.values().skip(1).sum();
    let rate = u128::from(bytes) * u128::from(HOUR_MS) / u128::from(spent_ms);
    u64::try_from(rate).ok()
}

fn text(stat: &Stat) -> String {
    let number = |value: Option<u64>| value.map_or_else(|| "-".to_owned(), |n| n.to_string());
    let rows: Vec<Vec<String>> = stat
        .logs
        .iter()
        .map(|(origin, log)| {
            let custodians: Vec<String> = log
                .custodians
                .iter()
                .map(|(custodian, segments)| format!("{custodian}:{segments}"))
                .collect();
            vec![
                format!(
                    "{origin}{}",
                    match (log.current, log.superseded) {
                        (_, true) => " (own, superseded)",
                        (true, false) => " (own)",
                        (false, false) => "",
                    }
                ),
                log.segments.to_string(),
                log.sealed_records.to_string(),
                log.unsealed_records.to_string(),
                format!("{}-{}", number(log.first_index), number(log.last_index)),
                log.min_index.to_string(),
                human_bytes(log.stored_bytes),
                log.raw_bytes.map_or_else(|| "-".to_owned(), human_bytes),
                number(log.bytes_per_record),
                if log.own {
                    log.unreplicated_records.to_string()
                } else {
                    "-".to_owned()
                },
                number(log.oldest_unreplicated_age_s),
                custodians.join(" "),
            ]
        })
        .collect();
    let head = [
        "log",
        "segments",
        "sealed",
        "unsealed",
        "indexes",
        "evicted below",
        "stored",
        "raw",
        "B/record",
        "unreplicated",
        "oldest s",
        "custodians",
    ];
    let disk = &stat.disk;
    let full = match (disk.own_bytes_per_hour, disk.hours_to_full) {
        (Some(rate), Some(hours)) => {
            format!(
                "{}/h, full in {hours} h if nothing is evicted",
                human_bytes(rate)
            )
        }
        _ => "too little was sealed in the last day to say when it is full".to_owned(),
    };
    format!(
        "{}\n\n{} of {} used, ladder {:?}; {full}",
        table(&head, &rows),
        human_bytes(disk.usage.allocated_bytes),
        human_bytes(disk.usage.ceiling_bytes),
        disk.ladder,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn growth_is_told_from_two_seals_on() {
        let mut grown = BTreeMap::new();
        assert_eq!(per_hour(&grown), None);
        grown.insert(1_000, 77);
        assert_eq!(per_hour(&grown), None);
        grown.insert(1_000 + HOUR_MS / 2, 100);
        assert_eq!(per_hour(&grown), Some(200));
    }
}
