//! The `tidelock` program.

fn main() -> std::process::ExitCode {
    tidelock::cli::main()
}
