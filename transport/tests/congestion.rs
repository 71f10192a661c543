//! Congestion control on bad links, in virtual time.

#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::cast_possible_truncation,
    reason = "helpers of tests: a panic is how a test fails, outside #[test] as well"
)]

#[path = "support/ca.rs"]
mod ca;
#[path = "support/pair.rs"]
mod pair;

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    time::{Duration, Instant},
};

use pair::{Flow, Outcome, Run, papers};
use tidelock_link::{Counters, Link, LinkConfig, Loss, Outage, Relay, Side};
use tidelock_quota::MonotonicClock;
use tidelock_transport::{
    congestion::{Congestion, PATH_MEMORY_AGE, PathMemory},
    shell::QuicConfig,
    tls::SERVER_NAME,
};

/// Runs of each line of the table.
const SEEDS: u64 = 3;

/// Datagrams lost in a row, on average.
const BURST: u32 = 4;

/// A rung of the ladder.
#[derive(Debug, Clone, Copy)]
struct Rung {
    name: &'static str,
    bytes_per_second: u64,
    round_trip_ms: u64,
    lost_ppm: u32,
    /// Length of a run, some hundred round trips.
    seconds: u64,
}

const fn rung(
    name: &'static str,
    kbit_per_second: u64,
    round_trip_ms: u64,
    lost_ppm: u32,
    seconds: u64,
) -> Rung {
    Rung {
        name,
        bytes_per_second: kbit_per_second * 125,
        round_trip_ms,
        lost_ppm,
        seconds,
    }
}

const LADDER: [Rung; 6] = [
    rung("100M 16ms 0.1%", 100_000, 16, 1_000, 10),
    rung("25M 40ms 1%", 25_000, 40, 10_000, 20),
    rung("8M 90ms 2%", 8_000, 90, 20_000, 30),
    rung("3M 200ms 3%", 3_000, 200, 30_000, 60),
    rung("0.8M 450ms 8%", 800, 450, 80_000, 120),
    rung("25M 600ms 1.5%", 25_000, 600, 15_000, 120),
];

impl Rung {
    fn held(self) -> u64 {
        self.bytes_per_second * self.round_trip_ms / 1_000
    }

    /// There with loss, back without: what is measured is the sender. A queue of as many per cent of
    /// what the path holds.
    fn links(self, queue_percent: u64) -> [LinkConfig; 2] {
        let there = LinkConfig {
            rate_bytes_per_second: Some(self.bytes_per_second),
            delay: Duration::from_millis(self.round_trip_ms / 2),
            queue_bytes: (self.held() * queue_percent / 100).max(16 * 1024),
            mtu_bytes: 1_472,
            loss: Loss::bursts(self.lost_ppm, BURST),
            ..LinkConfig::default()
        };
        let back = LinkConfig {
            loss: Loss::NONE,
            ..there.clone()
        };
        [there, back]
    }
}

fn quic(control: Congestion) -> QuicConfig {
    QuicConfig {
        congestion: control,
        ..QuicConfig::default()
    }
}

fn flow(control: Congestion, memory: Option<&PathMemory>) -> Flow {
    let client = quic(control)
        .client(&papers()[0], papers()[1].node_id(), None, memory)
        .unwrap();
    Flow {
        client,
        start: Duration::ZERO,
        bytes: None,
    }
}

/// What a rung showed, in thousandths.
#[derive(Debug, Clone, Copy)]
struct Shown {
    goodput_milli: u64,
    overhead_milli: u64,
    outcome: Outcome,
}

fn climb(rung: Rung, control: Congestion, queue_percent: u64, seed: u64) -> Shown {
    let [there, back] = rung.links(queue_percent);
    let mut run = Run::new(
        &there,
        &back,
        &quic(control),
        vec![flow(control, None)],
        seed,
    );
    let outcome = run.run(Duration::from_secs(rung.seconds))[0];
    let could = rung.bytes_per_second * rung.seconds;
    Shown {
        goodput_milli: outcome.received * 1_000 / could,
        overhead_milli: (u128::from(outcome.sent) * u128::from(1_000_000 - rung.lost_ppm)
            / (u128::from(outcome.received).max(1) * 1_000)) as u64,
        outcome,
    }
}

/// Two flows over one link without loss of its own: what each got in the second half, in thousandths
/// of what the link carries.
fn share(first: Congestion, second: Congestion, rung: Rung, queue_percent: u64) -> [u64; 2] {
    let [mut there, back] = rung.links(queue_percent);
    there.loss = Loss::NONE;
    let mut flows = vec![flow(first, None), flow(second, None)];
    flows[1].start = Duration::from_millis(20 * rung.round_trip_ms);
    let mut run = Run::new(&there, &back, &quic(first), flows, 1);
    let outcomes = run.run(Duration::from_secs(rung.seconds));
    let could = rung.bytes_per_second * rung.seconds / 2;
    [0, 1].map(|n| {
        let outcome: Outcome = outcomes[n];
        (outcome.received - outcome.received_at_half) * 1_000 / could
    })
}

#[test]
fn the_packets_of_an_ethernet_are_found_nearly_and_the_longest_ones_exactly() {
    // Over IPv4 and IPv6; the control is a path that carries everything.
    for (carries, found) in [(1_472, 1_446), (1_452, 1_446), (65_535, 6_500)] {
        let links = LADDER[0].links(100).map(|link| LinkConfig {
            mtu_bytes: carries,
            queue_bytes: link.queue_bytes.max(65_535),
            loss: Loss::NONE,
            ..link
        });
        let control = Congestion::Cubic;
        let flows = vec![flow(control, None)];
        let mut run = Run::new(&links[0], &links[1], &quic(control), flows, 1);
        run.run(Duration::from_secs(5));
        assert_eq!(run.packet_bytes(0), found, "of {carries}");
    }
}

#[test]
fn edge_fills_every_rung_and_sends_little_more_than_the_loss_forces() {
    for rung in LADDER {
        let shown = climb(rung, Congestion::Edge, 100, 1);
        assert!(shown.goodput_milli >= 800, "{rung:?}: {shown:?}");
        assert!(shown.overhead_milli <= 1_150, "{rung:?}: {shown:?}");
    }
    // The control: the same links, and a controller that takes loss for a full path.
    let shown = climb(LADDER[3], Congestion::Cubic, 100, 1);
    assert!(shown.goodput_milli < 600, "{shown:?}");
}

#[test]
fn a_seed_repeats_its_run_and_another_does_not() {
    let run = |seed| climb(LADDER[3], Congestion::Edge, 100, seed).outcome;
    assert_eq!(run(1), run(1));
    assert_ne!(run(1), run(2));
}

#[test]
fn edge_leaves_a_cubic_flow_its_half_and_gets_a_share() {
    let rung = rung("3M 200ms", 3_000, 200, 0, 120);
    for (first, second) in [
        (Congestion::Edge, Congestion::Cubic),
        (Congestion::Cubic, Congestion::Edge),
    ] {
        let mut shares = share(first, second, rung, 100);
        if first == Congestion::Cubic {
            shares.reverse();
        }
        let [edge, cubic] = shares;
        assert!(cubic >= 450, "cubic {cubic}, edge {edge}");
        assert!(edge >= 150, "cubic {cubic}, edge {edge}");
        assert!(edge + cubic >= 900, "cubic {cubic}, edge {edge}");
    }
    let [one, two] = share(Congestion::Edge, Congestion::Edge, rung, 100);
    assert!(one.min(two) >= 350 && one + two >= 900, "{one} and {two}");
}

#[test]
fn what_is_remembered_of_a_path_shortens_the_next_start() {
    let rung = Rung {
        seconds: 15,
        ..LADDER[5]
    };
    let memory = PathMemory::default();
    let [there, back] = rung.links(100);
    let mut received = [0, 1].map(|_| {
        let flows = vec![flow(Congestion::Edge, Some(&memory))];
        let mut run = Run::new(&there, &back, &quic(Congestion::Edge), flows, 1);
        run.run(Duration::from_secs(rung.seconds))[0].received
    });
    let [unknown, known] = &mut received;
    assert!(
        *known * 10 >= *unknown * 12,
        "{unknown} bytes, then {known}"
    );
    let now = Instant::now();
    let estimate = memory.recall(now).unwrap();
    let wanted = rung.bytes_per_second;
    assert!(
        estimate.bytes_per_second.abs_diff(wanted) * 5 <= wanted,
        "{estimate:?}"
    );
    assert_eq!(memory.recall(now + PATH_MEMORY_AGE * 2), None);
}

#[test]
fn edge_comes_back_after_an_outage() {
    let rung = rung("3M 200ms 3%", 3_000, 200, 30_000, 80);
    let outage = Outage {
        start: Duration::from_secs(20),
        end: Duration::from_secs(28),
    };
    let [mut there, mut back] = rung.links(100);
    there.outages = vec![outage];
    back.outages = vec![outage];
    let flows = vec![flow(Congestion::Edge, None)];
    let mut run = Run::new(&there, &back, &quic(Congestion::Edge), flows, 1);
    let outcome = run.run(Duration::from_secs(rung.seconds))[0];
    // The second half begins at 40 s.
    let could = rung.bytes_per_second * rung.seconds / 2;
    let later = outcome.received - outcome.received_at_half;
    assert!(later * 10 >= could * 8, "{later} of {could}: {outcome:?}");
}

#[test]
fn edge_stands_jitter() {
    let rung = LADDER[2];
    let [mut there, back] = rung.links(100);
    there.jitter = Duration::from_millis(10);
    let flows = vec![flow(Congestion::Edge, None)];
    let mut run = Run::new(&there, &back, &quic(Congestion::Edge), flows, 1);
    let outcome = run.run(Duration::from_secs(rung.seconds))[0];
    let could = rung.bytes_per_second * rung.seconds;
    assert!(outcome.received * 10 >= could * 8, "{outcome:?} of {could}");
}

/// Sends `bytes` over real sockets; how long it took, and what the relay carried if there is one.
async fn send(
    quic: &QuicConfig,
    bytes: usize,
    through: Option<[LinkConfig; 2]>,
) -> (Duration, Counters) {
    let local = IpAddr::V4(Ipv4Addr::LOCALHOST);
    let listen = SocketAddr::from((local, 0));
    let clock = MonotonicClock::new();
    let server = quic.open(listen, Some(pair::server(quic)), &clock).unwrap();
    let target = server.local_addr().unwrap();
    let relay = match through {
        None => None,
        Some([there, back]) => {
            let links = [(there, 1), (back, 2)].map(|(link, seed)| Link::new(link, seed).unwrap());
            let [there, back] = links;
            Some(Relay::start(local, target, there, back).await.unwrap())
        }
    };
    let address = relay.as_ref().map_or(target, Relay::address);
    let receiving = tokio::spawn(async move {
        let connection = server.accept().await.unwrap().await.unwrap();
        let mut stream = connection.accept_uni().await.unwrap();
        let mut received = 0;
        while let Some(chunk) = stream.read_chunk(usize::MAX, true).await.unwrap() {
            assert!(chunk.bytes.iter().all(|byte| *byte == 7));
            received += chunk.bytes.len();
        }
        (received, connection)
    });
    let client = quic.open(listen, None, &clock).unwrap();
    let config = quic.client(&papers()[0], papers()[1].node_id(), None, None);
    let connecting = client.connect_with(config.unwrap(), address, SERVER_NAME);
    let begun = Instant::now();
    let connection = connecting.unwrap().await.unwrap();
    let control = Congestion::of(connection.congestion_state());
    assert_eq!(control, Some(quic.congestion));
    let mut stream = connection.open_uni().await.unwrap();
    stream.write_all(&vec![7; bytes]).await.unwrap();
    stream.finish().unwrap();
    stream.stopped().await.unwrap();
    assert_eq!(receiving.await.unwrap().0, bytes);
    // Counted before the time is taken: whatever was counted had been sent by then.
    let counters = relay.map(|relay| relay.counters(Side::Out));
    (begun.elapsed(), counters.unwrap_or_default())
}

#[tokio::test]
async fn a_transfer_over_real_sockets_and_a_bad_link_ends() {
    let there = LinkConfig {
        rate_bytes_per_second: Some(4_000_000),
        delay: Duration::from_millis(5),
        queue_bytes: 64 * 1024,
        mtu_bytes: 1_472,
        loss: Loss::bursts(50_000, BURST),
        ..LinkConfig::default()
    };
    let back = LinkConfig {
        loss: Loss::NONE,
        ..there.clone()
    };
    let (_, counters) = send(&quic(Congestion::Edge), 1 << 20, Some([there, back])).await;
    assert!(counters.lost_packets > 0, "the link was bad: {counters:?}");
}

#[tokio::test]
async fn a_cap_is_kept_by_every_controller_on_a_short_path() {
    // A round trip of no time and no loss: no window would keep this cap.
    let cap = 200_000;
    for control in Congestion::ALL {
        let quic = QuicConfig {
            send_bytes_per_second: Some(cap),
            ..quic(control)
        };
        let link = LinkConfig::default();
        let (took, counters) = send(&quic, 150_000, Some([link.clone(), link])).await;
        let due = u128::from(cap) * took.as_nanos() / 1_000_000_000;
        // A burst: one datagram, as long as quinn makes them.
        let due = due + u128::from(quic.mtu_max);
        assert!(
            u128::from(counters.bytes_in) <= due + 1,
            "{control:?}: {counters:?}, {due} bytes were due in {took:?}"
        );
    }
}

#[tokio::test]
#[ignore = "prints how fast loopback is: `just ladder`"]
async fn loopback() {
    for turn in 0..3 {
        for control in Congestion::ALL {
            let (took, _) = send(&quic(control), 200 << 20, None).await;
            println!(
                "loopback | {turn} | {} | 200 MiB in {took:?}",
                control.name()
            );
        }
    }
}

#[test]
#[ignore = "prints the table of all rungs: `just ladder`"]
fn ladder() {
    println!("queue | rung | control | goodput mean (least), overhead mean (most)");
    for queue in [100, 25] {
        for rung in LADDER {
            for control in Congestion::ALL {
                let shown: Vec<Shown> = (1..=SEEDS)
                    .map(|seed| climb(rung, control, queue, seed))
                    .collect();
                let goodput = || shown.iter().map(|shown| shown.goodput_milli);
                let overhead = || shown.iter().map(|shown| shown.overhead_milli);
                let percent = |milli: u64| format!("{}.{} %", milli / 10, milli % 10);
                let times = |milli: u64| format!("{}.{:03}", milli / 1_000, milli % 1_000);
                println!(
                    "{queue} % | {} | {} | {} ({}), {} ({})",
                    rung.name,
                    control.name(),
                    percent(goodput().sum::<u64>() / SEEDS),
                    percent(goodput().min().unwrap()),
                    times(overhead().sum::<u64>() / SEEDS),
                    times(overhead().max().unwrap()),
                );
            }
        }
    }
}

#[test]
#[ignore = "prints the table of two flows on one link: `just ladder`"]
fn shares() {
    for (queue, rung) in [
        (50, rung("25M 40ms", 25_000, 40, 0, 60)),
        (100, rung("25M 40ms", 25_000, 40, 0, 60)),
        (400, rung("25M 40ms", 25_000, 40, 0, 60)),
        (100, rung("3M 200ms", 3_000, 200, 0, 240)),
    ] {
        for (first, second) in [
            (Congestion::Edge, Congestion::Cubic),
            (Congestion::Cubic, Congestion::Edge),
            (Congestion::Bbr, Congestion::Cubic),
            (Congestion::Edge, Congestion::Edge),
            (Congestion::Cubic, Congestion::Cubic),
        ] {
            let [one, two] = share(first, second, rung, queue);
            println!(
                "queue {queue:3} | {} | {} + {} | {}.{} % + {}.{} %",
                rung.name,
                first.name(),
                second.name(),
                one / 10,
                one % 10,
                two / 10,
                two % 10
            );
        }
    }
}
