//! `just bench [AREA]`: Tidelock beside its peers, interleaved in one run, as ratios.
//!
//! Prints a table and writes `target/bench/AREA.json`. Nothing here is asserted and nothing is
//! fetched; what cannot run says `not run` with its reason. `just bench segments --long` adds the
//! rows that fill 10 GiB and a million segments, `--only TEXT` runs the groups whose name has it.

mod decide;
mod peers;
mod report;
mod segments;
mod transport;

pub use report::{Row, cpu, median};

fn main() {
    let mut args: Vec<String> = std::env::args().skip(1).collect();
    if args.first().is_some_and(|first| first == "child") {
        // A process of its own, to be killed or weighed.
        return segments::child(&args[1..]);
    }
    let long = args.iter().any(|arg| arg == "--long");
    let only = args.iter().position(|arg| arg == "--only").map(|at| {
        let only = args.get(at + 1).cloned().unwrap_or_default();
        args.drain(at..(at + 2).min(args.len()));
        only
    });
    let wanted = args.iter().find(|arg| !arg.starts_with('-'));
    std::fs::create_dir_all("target").expect("target");
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    for area in ["decide", "segments", "transport"] {
        if wanted.is_some_and(|w| w != area) {
            continue;
        }
        let machine = report::machine();
        let rows = match area {
            "decide" => runtime.block_on(decide::rows()),
            "segments" => segments::rows(long, only.as_deref()),
            _ => runtime.block_on(transport::rows()),
        };
        report::publish(area, machine, &rows);
    }
}
