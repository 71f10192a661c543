//! `tidelock run`: config, logging, rooms, doors, mesh, run, drain.
//!
//! The order is fixed, and so is its reverse at the end. Nothing is accepted before everything that
//! can keep a node from starting has been opened, so that there is no partial start.

mod activate;
mod admit;
pub(crate) mod callers;
pub(crate) mod consult;
mod disk;
mod doors;
mod hooks;
mod journal;
mod links;
pub(crate) mod media;
mod node;
pub(crate) mod papers;
mod plan;
mod policy;
mod quotas;
mod rejections;
mod replay;
mod rollback;
mod scheduled;
mod seen;
mod self_check;
mod trust;
mod waiting;
mod widening;

use std::{path::Path, sync::Arc, time::Duration};

use serde_json::json;
use tidelock_gateway::{
    AuthConfig, CallerTime, Gateway, GatewayConfig, GatewayLimits, GatewayParts, Grant,
    RefusalWindow, Scopes, TlsDoor, TokenSet, UnixDoor, limits::HANDSHAKES_DEFAULT,
};
use tidelock_quota::Rate;
use tidelock_transport::tls::provider;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

use self::{callers::Doorkeeper, doors::Doors, node::Node};
use crate::{
    cli::{Exit, Failure},
    config::{
        Config, LogSection,
        callers::{ANONYMOUS_TYPE, shared_types},
    },
};

/// How long open requests and sessions may take to end.
const DRAIN_LIMIT: Duration = Duration::from_secs(8);
/// Often enough that an append of 250 ms is given up in time.
const TICK: Duration = Duration::from_millis(25);
/// Between two slow ticks, in ticks.
const SLOW_TICKS: u64 = 8;
/// Ticks between two looks at the files of papers: a second.
const PAPER_TICKS: u64 = 40;
/// Between two minute ticks, in ticks.
const MINUTE_TICKS: u64 = 2_400;

/// Runs a node until it is told to stop.
///
/// # Errors
/// What keeps it from starting; nothing was accepted in that case.
pub fn main(config_path: &Path) -> Result<Exit, Failure> {
    let config = Config::load(config_path)?;
    start_logging(&config.log)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    let result = runtime.block_on(run(config_path, config));
    // Blocking tasks are disk work of refused or abandoned transfers: nobody waits for them.
    runtime.shutdown_timeout(Duration::from_secs(1));
    result
}

fn start_logging(log: &LogSection) -> Result<(), Failure> {
    let filter = EnvFilter::try_new(&log.level)?;
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()));
    let started = if log.json {
        builder.json().try_init()
    } else {
        builder.try_init()
    };
    started.map_err(|e| Failure::cannot_run(e.to_string()))
}

async fn run(config_path: &Path, config: Config) -> Result<Exit, Failure> {
    // Signals first: one that comes while the rooms are opened must not kill half a node.
    let mut hangup = signal(SignalKind::hangup())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;

    // A key that others can read keeps a node from starting, whatever else is wrong with its papers.
    hooks::beacon_config(&config.beacon)?;
    let gateway_section = config.gateway.clone();
    let requests = node::rate(config.quota.requests);
    let path = config_path.to_owned();
    let node = tokio::task::spawn_blocking(move || Node::open(&path, config)).await??;
    let doors = Arc::new(Doors(node.clone()));
    let refused_node = node.clone();
    let certified = node.open_door(&gateway_section)?;
    let mut gateway = Gateway::bind(
        gateway_config(&node.config.load(), requests, callers::time(&node.clock))?,
        GatewayParts {
            decider: doors.clone(),
            operator: Some(doors),
            on_refused: Arc::new(move |window: RefusalWindow| {
                refused_node
                    .interceptor
                    .record_event("callers_refused", &json!(window));
            }),
        },
    )
    .await?;
    if let (Some(tls), Some(callers)) = (&gateway_section.tls, &certified) {
        let door = TlsDoor {
            address: tls.listen,
            provider: Arc::new(provider()),
            callers: callers.clone(),
        };
        gateway.open_tls(door).await?;
    }
    let keeper = Doorkeeper {
        gateway: gateway.handle(),
        certified,
    };
    // There is one gateway a run.
    let _ = node.doorkeeper.set(keeper);
    node.keep_crl_floors();
    node.warn_of_endings();
    hooks::ensure_mesh(&node).await?;
    links::watch(&node);
    node.event(
        "started",
        json!({"version": env!("CARGO_PKG_VERSION"), "loosened": node.config.load().loosened()}),
    );

    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let serving = tokio::spawn(gateway.serve(async move {
        // An error means that the sender is gone: the same as being told.
        let _ = stopped.await;
    }));
    let mut ticks = tokio::time::interval(TICK);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut count = 0_u64;
    let mut slow = None;
    let mut papers = None;
    let mut slots = None;
    let mut hung_up = false;
    let mut reloading = None;
    loop {
        if hung_up && !is_busy(reloading.as_ref()) {
            hung_up = false;
            reloading = Some(tokio::spawn(reload(node.clone())));
        }
        tokio::select! {
            _ = ticks.tick() => {
                count += 1;
                node.tick();
                if count.is_multiple_of(SLOW_TICKS) {
                    slow = slow_work(&node, count, slow).await;
                }
                if count.is_multiple_of(PAPER_TICKS) {
                    papers = watch_papers(&node, papers);
                    slots = tend_policy(&node, slots);
                }
            }
            _ = hangup.recv() => hung_up = true,
            _ = interrupt.recv() => break,
            _ = terminate.recv() => break,
        }
    }

    tracing::info!("draining");
    let _ = stop.send(());
    if let Some(reloading) = reloading
        && tokio::time::timeout(DRAIN_LIMIT, reloading).await.is_err()
    {
        tracing::warn!("a reload was cut off at the deadline");
    }
    if let Some(mesh) = node.mesh.get() {
        mesh.shutdown(DRAIN_LIMIT).await;
    }
    let drained = tokio::time::timeout(DRAIN_LIMIT, serving).await;
    if drained.is_err() {
        tracing::warn!("open requests were cut off at the deadline");
    }
    tokio::task::spawn_blocking(move || node.close()).await?;
    Ok(Exit::Done)
}

/// Takes config and papers into use again, beside the loop: it may wait for a bundle that is taken just now, and
/// no tick waits for that. A hang-up that comes meanwhile is answered by another one.
async fn reload(node: Arc<Node>) {
    let reloading = node.clone();
    let reload = move || reloading.reload();
    match tokio::task::spawn_blocking(reload).await {
        Ok(Ok(())) => {}
        Ok(Err(failure)) => node.event("reload_refused", json!({"why": failure.message})),
        Err(error) => node.event("reload_refused", json!({"why": error.to_string()})),
    }
    // A node that decides is never stopped by its mesh; `doctor` shows why it is closed.
    if let Err(failure) = hooks::ensure_mesh(&node).await {
        node.event("mesh_not_started", json!({"why": failure.message}));
    }
}

/// Whether what was begun beside the loop has not ended.
fn is_busy(running: Option<&tokio::task::JoinHandle<()>>) -> bool {
    running.is_some_and(|running| !running.is_finished())
}

/// Looks at the files of the node's papers beside the loop, unless the last look has not ended: a
/// stalled file system stops no tick.
fn watch_papers(
    node: &Arc<Node>,
    running: Option<tokio::task::JoinHandle<()>>,
) -> Option<tokio::task::JoinHandle<()>> {
    if is_busy(running.as_ref()) {
        return running;
    }
    let node = node.clone();
    Some(tokio::spawn(async move {
        let looking = node.clone();
        let taken = tokio::task::spawn_blocking(move || looking.watch_papers()).await;
        // A node that began without usable papers has no mesh yet.
        if taken.unwrap_or(false)
            && let Err(failure) = hooks::ensure_mesh(&node).await
        {
            node.event("mesh_not_started", json!({"why": failure.message}));
        }
    }))
}

/// Reads the policy slots again and activates what has waited for its time, beside the loop and where that is
/// due; a worker may take its time over it.
fn tend_policy(
    node: &Arc<Node>,
    running: Option<tokio::task::JoinHandle<()>>,
) -> Option<tokio::task::JoinHandle<()>> {
    if is_busy(running.as_ref()) {
        return running;
    }
    let tending = node.clone();
    Some(tokio::task::spawn_blocking(move || {
        tending.read_slots_again();
        tending.restore_again();
        tending.tend_schedule();
    }))
}

/// Starts the periodic disk work beside the loop, unless the last one still runs: on a stalled disk
/// the loop goes on giving overdue callers up and hearing signals.
async fn slow_work(
    node: &Arc<Node>,
    count: u64,
    running: Option<tokio::task::JoinHandle<()>>,
) -> Option<tokio::task::JoinHandle<()>> {
    if let Some(running) = running {
        if !running.is_finished() {
            return Some(running);
        }
        if let Err(error) = running.await {
            tracing::error!(%error, "a periodic task ended abnormally");
        }
    }
    let working = node.clone();
    Some(tokio::task::spawn_blocking(move || {
        working.slow_tick();
        if count.is_multiple_of(MINUTE_TICKS) {
            working.minute_tick();
        }
    }))
}

/// Who may call; the token file is read at start and on reload.
pub(crate) fn auth_config(config: &Config, time: CallerTime) -> Result<AuthConfig, Failure> {
    let section = &config.gateway;
    let mut auth = AuthConfig::default()
        .time(time)
        .signature_tag(config.node.id.as_str());
    let tokens = section.tokens.as_deref().map(TokenSet::load).transpose()?;
    // Without the file of tokens the config has been asked for this already.
    let shared = shared_types(section, tokens.as_ref());
    if !shared.is_empty() {
        let told: Vec<String> = shared
            .into_iter()
            .map(|(key, message)| format!("gateway.{key}: {message}"))
            .collect();
        return Err(Failure::cannot_run(told.join("\n")));
    }
    if let Some(tokens) = tokens {
        auth = auth.tokens(tokens);
    }
    for user in &section.users {
        let (kind, id) = user
            .principal
            .split_once("::")
            .unwrap_or(("", &user.principal));
        let scopes = Scopes {
            decide: true,
            explain: true,
            act_as: user.act_as,
        };
        auth = auth.unix_peer(user.uid, Grant::new(kind, id, scopes)?)?;
    }
    if section.allow_anonymous_loopback {
        auth = auth.allow_anonymous_loopback(Grant::new(ANONYMOUS_TYPE, "anonymous", Scopes::ALL)?);
    }
    callers::with_others(auth, section)
}

fn gateway_config(
    config: &Config,
    requests: Rate,
    time: CallerTime,
) -> Result<GatewayConfig, Failure> {
    let section = &config.gateway;
    Ok(GatewayConfig {
        public_url: section.public_url.clone(),
        proxies: callers::proxies(section),
        tcp: section.tcp,
        unix: Some(UnixDoor::new(section.unix.clone())),
        limits: GatewayLimits {
            slots: usize::try_from(section.concurrent_max).unwrap_or(usize::MAX),
            requests,
            handshakes: section.tls.as_ref().map_or(HANDSHAKES_DEFAULT, |tls| Rate {
                per_second: tls.handshakes_per_second,
                burst: tls.handshakes_per_second.saturating_mul(4),
            }),
            ..GatewayLimits::default()
        },
        auth: auth_config(config, time)?,
    })
}
