//! `just bench [AREA]`: Tidelock beside its peers, interleaved in one run, as ratios.
//!
//! Prints a table and writes `target/bench/AREA.json`. Nothing here is asserted and nothing is
//! fetched; what cannot run says `not run` with its reason. `tidelock-bench --help` tells the rest.

mod activation;
mod decide;
mod doors;
mod peers;
mod policy;
mod proof;
mod report;
mod segments;
mod transport;

use std::process::ExitCode;

pub use report::{Row, cpu, median};

const AREAS: [&str; 4] = ["decide", "segments", "transport", "policy"];

const USAGE: &str = "usage: tidelock-bench [AREA] [--long] [--only TEXT]";

fn help() -> String {
    let list = |area| groups(area).join(", ");
    format!(
        "Tidelock beside its peers, interleaved in one run, as ratios. Prints a table and writes\n\
         target/bench/AREA.json. Nothing is asserted, nothing is fetched.\n\n\
         {USAGE}\n\n\
         Areas (all of them if none is named): {}\n\n\
         \x20 --long       segments: also the rows that fill 10 GiB and a million segments\n\
         \x20 --only TEXT  segments, transport, policy: only the groups whose name has TEXT:\n\
         \x20              segments: {}\n\
         \x20              transport: {}\n\
         \x20              policy: {}\n\
         \x20 -h, --help   this text\n\n\
         Examples:\n\
         \x20 tidelock-bench                            everything but what --long adds\n\
         \x20 tidelock-bench decide                     one area\n\
         \x20 tidelock-bench segments --only append     one group of it\n\
         \x20 tidelock-bench transport --only bulk      one group of it\n\
         \x20 just bench segments --long                built first, then the great stores too\n",
        AREAS.join(", "),
        list("segments"),
        list("transport"),
        list("policy"),
    )
}

/// The groups of rows that `--only` chooses among.
fn groups(area: &str) -> Vec<&'static str> {
    match area {
        "segments" => segments::groups().collect(),
        "transport" => transport::groups().collect(),
        "policy" => policy::groups().collect(),
        _ => Vec::new(),
    }
}

/// What the command line asks for.
#[derive(Debug, Default, PartialEq, Eq)]
struct Wanted {
    help: bool,
    area: Option<&'static str>,
    long: bool,
    only: Option<String>,
}

impl Wanted {
    fn parse(args: impl IntoIterator<Item = String>) -> Result<Self, String> {
        let mut wanted = Self::default();
        let mut args = args.into_iter();
        while let Some(arg) = args.next() {
            match arg.as_str() {
                "-h" | "--help" => wanted.help = true,
                "--long" => wanted.long = true,
                "--only" => {
                    let only = args.next().ok_or("--only needs a part of a group's name")?;
                    wanted.only = Some(only);
                }
                option if option.starts_with('-') => {
                    return Err(format!("there is no option {option}"));
                }
                name => {
                    let area = AREAS.into_iter().find(|area| *area == name);
                    let area = area.ok_or_else(|| {
                        format!("there is no area {name}; there are {}", AREAS.join(", "))
                    })?;
                    if wanted.area.replace(area).is_some() {
                        return Err("name one area, or none for all of them".to_owned());
                    }
                }
            }
        }
        let elsewhere = wanted.area.is_some_and(|area| area != "segments");
        if let Some(only) = &wanted.only {
            let known = wanted.area.map(groups).unwrap_or_default();
            if known.is_empty() {
                return Err(
                    "--only chooses among groups of `segments`, `transport` or `policy`: name one"
                        .to_owned(),
                );
            }
            if only.is_empty() || !known.iter().any(|name| name.contains(only)) {
                return Err(format!(
                    "no group has `{only}` in its name; there are {}",
                    known.join(", ")
                ));
            }
        }
        if wanted.long && elsewhere {
            return Err("--long adds rows to `segments` only".to_owned());
        }
        Ok(wanted)
    }
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if let Some(("child", rest)) = args
        .split_first()
        .map(|(first, rest)| (first.as_str(), rest))
    {
        // A process of its own, to be killed or weighed.
        if rest
            .first()
            .is_some_and(|name| name.starts_with("transport-"))
        {
            transport::child(rest);
        } else {
            segments::child(rest);
        }
        return ExitCode::SUCCESS;
    }
    let wanted = match Wanted::parse(args) {
        Ok(wanted) => wanted,
        Err(why) => {
            eprintln!("tidelock-bench: {why}\n{USAGE}; --help says more");
            return ExitCode::from(2);
        }
    };
    if wanted.help {
        print!("{}", help());
        return ExitCode::SUCCESS;
    }
    if wanted.area.is_none_or(|area| area == "transport")
        && let Some(why) = transport::with_steady_allocator()
    {
        eprintln!("tidelock-bench: {why}");
        return ExitCode::FAILURE;
    }
    std::fs::create_dir_all("target").expect("target");
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    for area in AREAS {
        if wanted.area.is_some_and(|only| only != area) {
            continue;
        }
        let machine = report::machine();
        let rows = match area {
            "decide" => runtime.block_on(decide::rows()),
            "segments" => segments::rows(wanted.long, wanted.only.as_deref()),
            "transport" => transport::rows(wanted.only.as_deref()),
            _ => policy::rows(wanted.only.as_deref()),
        };
        report::publish(area, machine, &rows);
    }
    ExitCode::SUCCESS
}

/// Runs the groups that are wanted, each in a directory of its own.
fn in_turn<G>(
    groups: &[(&'static str, G)],
    only: Option<&str>,
    run: impl Fn(&G, &std::path::Path) -> Vec<Row>,
) -> Vec<Row> {
    let mut rows = Vec::new();
    for (name, group) in groups {
        if only.is_some_and(|only| !name.contains(only)) {
            continue;
        }
        let begun = std::time::Instant::now();
        let dir = tempfile::Builder::new()
            .prefix("tlb")
            .tempdir_in("target")
            .expect("a directory in target");
        let path = dir.path().canonicalize().expect("a path");
        rows.extend(run(group, &path));
        drop(dir);
        eprintln!("  {name}: {:.0} s", begun.elapsed().as_secs_f64());
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Wanted, String> {
        Wanted::parse(line.split_whitespace().map(str::to_owned))
    }

    #[test]
    fn what_is_not_known_is_refused() {
        let segments = Wanted {
            area: Some("segments"),
            long: true,
            only: Some("memo".to_owned()),
            help: false,
        };
        assert_eq!(parse("segments --only memo --long"), Ok(segments));
        assert!(parse("transport --only bulk").is_ok());
        assert_eq!(parse(""), Ok(Wanted::default()));
        assert!(parse("--help").is_ok_and(|wanted| wanted.help));
        for line in [
            "segment",
            "--fast",
            "segments decide",
            "segments --only",
            "segments --only nothing",
            "--only memory",
            "decide --only memory",
            "transport --only memory",
            "decide --long",
        ] {
            assert!(parse(line).is_err(), "{line}");
        }
        assert!(help().contains("device-bytes"));
    }
}
