# `just check` is the definition of done; CI runs the same commands.

# List the recipes.
default:
    @just --list --unsorted

# Format, lints, dependency rules, tests.
check: fmt-check lint deny test

# Formatting, as a question.
fmt-check:
    cargo fmt --all -- --check

# Formatting, done.
fmt:
    cargo fmt --all

# The lint table of Cargo.toml, warnings as errors.
lint:
    cargo clippy --workspace --all-targets --locked -- -D warnings

# Everything that needs no privileges.
test:
    cargo test --workspace --locked

# Every decoder over changed inputs for so many minutes; a fault is written into tests/corpus and told.
fuzz MINUTES:
    TIDELOCK_FUZZ_MINUTES={{MINUTES}} cargo test --release --locked -p tidelock-tests --test fuzz -- --nocapture

# Licences, bans and sources; works without a network. Advisories need their database: `just advisories`.
deny:
    cargo deny --locked --offline check bans licenses sources

# Known vulnerabilities of the locked dependencies; fetches the advisory database.
advisories:
    cargo deny --locked check advisories

# Three nodes on this machine, the whole story; arguments are passed on (`just demo --json`).
demo *ARGS:
    cargo run --release --locked -- demo {{ARGS}}

# Store and log on the real kernel: SIGKILL, every system call failing in turn, file systems cut off.
# Needs strace; root for the last. A tenth of ROUNDS are power cuts. Repeats a run: `TIDELOCK_KERNEL_SEED=7 just soak-kill`.
soak-kill ROUNDS="1000":
    TIDELOCK_KERNEL_ROUNDS={{ROUNDS}} cargo test --release --locked -p tidelock-segments --test kernel -- --ignored --nocapture --test-threads=1 soak_

# All of the soaks below, one after the other: 10,000 schedules, a thousand kills, the simulated disk. About two hours.
soak MINUTES="30": soak-sessions soak-kill (soak-disk MINUTES)

# Random schedules over the session machine: links, crashes, clocks, disks, papers, lies. Plays one again: `just soak-sessions-replay SEED`.
soak-sessions SCHEDULES="10000":
    TIDELOCK_SCHEDULES={{SCHEDULES}} cargo test --release --locked -p tidelock-transport --lib -- --nocapture whatever_happens_the_mesh_converges

# One of them again.
soak-sessions-replay SEED:
    TIDELOCK_SCHEDULE_SEED={{SEED}} cargo test --release --locked -p tidelock-transport --lib -- --nocapture whatever_happens_the_mesh_converges

# A node killed at half of so many MiB that come in ranges, as a process of its own: what is sent again. About 3 GiB of disk.
kill-at-half MIB="1024":
    TIDELOCK_KILL_MIB={{MIB}} cargo test --release --locked -p tidelock-transport --test mesh -- --nocapture inv_12_a_process_killed_at_half

# Two nodes whose link is down for so many seconds: how long from link-up to what was sealed meanwhile. Needs root and `ip`.
link-up OUTAGES="5 60 600":
    TIDELOCK_OUTAGES_S="{{OUTAGES}}" cargo test --release --locked -p tidelock-tests --test link_up -- --nocapture

# Tidelock beside its peers in one run: `just bench`, or one area: decide, segments, transport, policy; `just bench segments --long` fills 10 GiB.
bench *AREA:
    cargo build --release --locked
    cargo run --release --locked --manifest-path bench/Cargo.toml --target-dir target -- {{AREA}}

# The OpenAPI document against a real node, so many requests an operation and kind (needs schemathesis from PyPI; `cargo test` makes 10).
schemathesis EXAMPLES="100":
    TIDELOCK_EXAMPLES={{EXAMPLES}} cargo test --workspace --locked --test openapi -- --nocapture

# The peers of `just bench policy` that packages offer, into target/bench-peers; `wrk` is Debian's.
bench-peers:
    npm install --prefix target/bench-peers @cerbos/cerbos-linux-x64@0.55.0
    cargo install cedar-agent@0.2.0 --locked --root target/bench-peers
    wrk -v | head -1

# Congestion control on bad links, in virtual time: cubic, bbr and edge on six rungs, two flows on one link, and loopback.
ladder:
    cargo test --release --locked -p tidelock-transport --test congestion -- --ignored --nocapture --test-threads=1

# The book, into docs/book (needs mdbook).
book:
    mdbook build docs

# The whole crash check on a simulated disk, for so many minutes at least.
soak-disk MINUTES:
    cargo run --release --locked -p tidelock-segments --example soak -- --minutes {{MINUTES}}

# One random run of it again, bit for bit.
soak-disk-replay SEED:
    cargo run --release --locked -p tidelock-segments --example soak -- --seed {{SEED}}
