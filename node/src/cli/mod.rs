//! The command line: what a person types, and what a machine reads with `--json`.
//!
//! Everything that changes a node's live state, revokes, imports, evicts or clears prints its plan
//! and acts only with `--apply`. Exit codes are part of the interface: see [`Exit`].

mod audit;
mod bundle;
mod ca;
mod caller;
mod decide;
mod doctor;
mod keys;
mod media;
mod medium;
mod node;
mod output;
mod policy;
mod proof;
mod qlog;
mod release;
mod schema;
mod segment;
mod stat;
mod trust;

use std::{path::PathBuf, process::ExitCode};

use clap::{Args, CommandFactory as _, Parser, Subcommand, ValueHint};

pub use self::output::{Failure, Output};
pub(crate) use self::{node::new_token, output::table};

/// What a command's end means to the script that called it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// Done; for `decide`: allow.
    Done,
    /// The command ran and the answer is no: a check failed, a damaged log, a story step missed.
    Failed,
    /// The command could not run: usage, config, an unreadable file, no node to talk to.
    CannotRun,
    /// `decide`: deny.
    Denied,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        match exit {
            Exit::Done => Self::SUCCESS,
            Exit::Failed => Self::from(1),
            Exit::CannotRun => Self::from(2),
            Exit::Denied => Self::from(3),
        }
    }
}

/// A mesh of peer edge nodes that decide, record and exchange when the control plane is gone.
#[derive(Debug, Parser)]
#[command(
    name = "tidelock",
    version,
    propagate_version = true,
    after_help = "Start with:\n  tidelock demo                          the whole story on this machine\n  \
                  tidelock ca init --dir ca --domain harbour\n  tidelock config check -c tidelock.toml\n  \
                  tidelock run -c tidelock.toml\n\nExit codes: 0 done or allow, 1 the answer is no, \
                  2 could not run, 3 deny."
)]
pub struct Cli {
    /// Print one JSON document on standard output instead of text.
    #[arg(long, global = true)]
    pub json: bool,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// Where the node's config is.
#[derive(Debug, Args)]
pub struct ConfigArg {
    /// The node's config file.
    #[arg(short = 'c', long = "config", default_value = "tidelock.toml", value_hint = ValueHint::FilePath)]
    pub config: PathBuf,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run the node until SIGINT or SIGTERM; SIGHUP reloads.
    #[command(after_help = "Example:\n  tidelock run -c /etc/tidelock/tidelock.toml")]
    Run(ConfigArg),
    /// Play the whole story with three real node processes on this machine.
    #[command(
        after_help = "Examples:\n  tidelock demo\n  tidelock demo --keep /tmp/harbour --json"
    )]
    Demo {
        /// Keep certificates, bundles, logs and stores in this directory.
        #[arg(long, value_hint = ValueHint::DirPath)]
        keep: Option<PathBuf>,
    },
    /// A site CA for sites that have none.
    #[command(subcommand)]
    Ca(ca::CaCommand),
    /// Make, sign, check and install policy bundles.
    #[command(subcommand)]
    Bundle(bundle::BundleCommand),
    /// Plan and activate what a running node decides by, and compare bundles.
    #[command(subcommand)]
    Policy(policy::PolicyCommand),
    /// Whose signatures count, for what, and how their keys are replaced.
    #[command(subcommand)]
    Trust(trust::TrustCommand),
    /// Verify a release of this program on disk or media.
    #[command(subcommand)]
    Release(release::ReleaseCommand),
    /// Import a CRL into a running node.
    #[command(subcommand)]
    Crl(node::CrlCommand),
    /// Decide one action at a running node: exit 0 allow, 3 deny, 2 error.
    #[command(
        after_help = "Example:\n  echo '{\"principal\":{\"type\":\"Agent\",\"id\":\"ops-1\"},\"action\":\"fs.read\",\
                      \"resource\":{\"type\":\"File\",\"id\":\"/srv/app/README.md\"}}' | tidelock decide"
    )]
    Decide(decide::DecideArgs),
    /// Tell a running node what became of an action that it allowed: once, by the same caller, within
    /// 24 hours. Index and leaf are those of the decision's answer.
    #[command(
        after_help = "Example:\n  tidelock report 4711 sha256:5f… executed --detail '{\"bytes\": 512}'"
    )]
    Report(decide::ReportArgs),
    /// What a running node is doing.
    Status(ConfigArg),
    /// The quotas of actions of a running node: what each kind of bucket lets pass, and what it did
    /// since the start. They are changed in the config, by `[quota]` and SIGHUP.
    #[command(
        after_help = "Examples:\n  tidelock quota\n  tidelock quota --json -c /etc/tidelock/tidelock.toml"
    )]
    Quota(ConfigArg),
    /// What happened at a running node lately: sessions, transfers, refusals. No evidence, that is
    /// the audit log.
    #[command(after_help = "Example:\n  tidelock journal --since 120 --json")]
    Journal {
        /// Only entries after this line.
        #[arg(long, default_value_t = 0)]
        since: u64,
        /// The node's config.
        #[command(flatten)]
        config: ConfigArg,
    },
    /// The peers of a running node: which are connected and why others are not, how far they are
    /// behind, what was lost on the way.
    #[command(
        args_conflicts_with_subcommands = true,
        after_help = "Examples:\n  tidelock peers\n  tidelock peers why blake3:5f… harbour-b\n  tidelock peers quota harbour-b --bytes-per-second 2MiB --bytes-per-day 10GiB --apply\n  tidelock peers qlog harbour-b --seconds 60 > harbour-b.sqlog"
    )]
    Peers {
        /// Without one, the table of all peers.
        #[command(subcommand)]
        command: Option<node::PeersCommand>,
        /// The node's config.
        #[command(flatten)]
        config: ConfigArg,
    },
    /// Read and verify audit logs, on a running or a stopped node.
    #[command(subcommand)]
    Audit(audit::AuditCommand),
    /// List, show, verify, check and repair what lies below the root, on a running or a stopped node.
    #[command(subcommand)]
    Segment(segment::SegmentCommand),
    /// Check this host, the config, the keys, the CRLs and the node, and say what to mend.
    Doctor(ConfigArg),
    /// Check a config file.
    #[command(subcommand)]
    Config(node::ConfigCommand),
    /// Accept the wall clock after it was found to have jumped.
    #[command(subcommand)]
    Clock(node::ClockCommand),
    /// Say as whom a token, certificate or key would be taken.
    #[command(subcommand)]
    Caller(caller::CallerCommand),
    /// Make a bearer token and the line that admits it.
    #[command(subcommand)]
    Token(node::TokenCommand),
    /// Compile one bundle for a node, confined: started by the node itself.
    #[command(hide = true)]
    PolicyWorker {
        /// CPU seconds after which the kernel ends it.
        #[arg(long)]
        cpu_seconds: u64,
        /// Go on where the kernel takes no filter of system calls.
        #[arg(long)]
        allow_without_seccomp: bool,
        /// Become this solver, confined.
        #[arg(long)]
        solver: Option<PathBuf>,
    },
    /// Print the JSON Schema (draft 2020-12) of something that people or programs write.
    #[command(
        after_help = "Example:\n  tidelock schema manifest > manifest.schema.json\n\nWhat editors do with \
                      them: docs/src/authoring.md"
    )]
    Schema {
        /// Of what.
        #[arg(value_enum)]
        what: schema::What,
    },
    /// Print shell completions.
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
    /// Write the manual pages.
    Man {
        /// The directory to write them to.
        #[arg(long, value_hint = ValueHint::DirPath)]
        dir: PathBuf,
    },
}

/// Runs one command and answers its exit code.
#[must_use]
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let output = Output::new(cli.json);
    match run(cli.command, &output) {
        Ok(exit) => exit.into(),
        Err(failure) => {
            output.failure(&failure);
            failure.exit.into()
        }
    }
}

fn run(command: Command, output: &Output) -> Result<Exit, Failure> {
    match command {
        Command::Run(args) => node::run(&args),
        Command::Demo { keep } => crate::demo::run(keep, output),
        Command::Ca(command) => ca::run(command, output),
        Command::Bundle(command) => bundle::run(command, output),
        Command::Policy(command) => policy::run(command, output),
        Command::Trust(command) => trust::run(command, output),
        Command::Release(command) => release::run(command, output),
        Command::Crl(command) => node::crl(command, output),
        Command::Decide(args) => decide::run(&args, output),
        Command::Report(args) => decide::report(&args, output),
        Command::Status(args) => node::status(&args, output),
        Command::Quota(args) => node::quota(&args, output),
        Command::Journal { since, config } => node::journal(&config, since, output),
        Command::Peers { command, config } => node::peers(command, &config, output),
        Command::Audit(command) => audit::run(command, output),
        Command::Segment(command) => segment::run(command, output),
        Command::Doctor(args) => doctor::run(&args, output),
        Command::Config(command) => node::config(command, output),
        Command::Clock(command) => node::clock(command, output),
        Command::Caller(command) => caller::run(command, output),
        Command::Token(command) => node::token(command, output),
        Command::Schema { what } => schema::run(what, output),
        Command::PolicyWorker {
            cpu_seconds,
            allow_without_seccomp,
            solver: Some(solver),
        } => {
            match crate::worker::child::become_solver(&solver, cpu_seconds, allow_without_seccomp)? {}
        }
        Command::PolicyWorker {
            cpu_seconds,
            allow_without_seccomp,
            solver: None,
        } => {
            crate::worker::child::main(cpu_seconds, allow_without_seccomp)?;
            Ok(Exit::Done)
        }
        Command::Completions { shell } => {
            clap_complete::generate(
                shell,
                &mut Cli::command(),
                "tidelock",
                &mut std::io::stdout(),
            );
            Ok(Exit::Done)
        }
        Command::Man { dir } => man(&dir, output),
    }
}

fn man(dir: &std::path::Path, output: &Output) -> Result<Exit, Failure> {
    std::fs::create_dir_all(dir).map_err(|e| Failure::at(dir, &e))?;
    clap_mangen::generate_to(Cli::command(), dir).map_err(|e| Failure::at(dir, &e))?;
    output.say(&serde_json::json!({"dir": dir}), || {
        format!("manual pages written to {}", dir.display())
    });
    Ok(Exit::Done)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
    }
}
