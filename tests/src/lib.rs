//! What tests of more than one crate share: the built program, a site of it, and network namespaces.
//!
//! Not a test itself: look in `tests/tests/`.

pub mod fuzz;
pub mod namespaces;
pub mod site;

use std::{io, path::PathBuf, process::Command};

/// Builds the `tidelock` program in the profile of the running test and answers where it is.
///
/// # Errors
/// Where cargo cannot be run or the build fails.
pub fn program() -> io::Result<PathBuf> {
    let test = std::env::current_exe()?;
    // target/<profile>/deps/<test>
    let profile_dir = test
        .parent()
        .and_then(|deps| deps.parent())
        .ok_or(io::ErrorKind::NotFound)?;
    let mut command = Command::new(env!("CARGO"));
    command.args([
        "build",
        "--quiet",
        "--package",
        "tidelock",
        "--bin",
        "tidelock",
    ]);
    if profile_dir
        .file_name()
        .is_some_and(|name| name == "release")
    {
        command.arg("--release");
    }
    if !command.status()?.success() {
        return Err(io::Error::other("the program does not build"));
    }
    Ok(profile_dir.join("tidelock"))
}

/// Says on standard error that a test could not run. Written past the test runner, which would keep
/// what a test prints that does not fail; where CI says that it can run everything, it is a failure.
///
/// # Errors
/// Under `CI=true`.
pub fn not_run(test: &str, why: &str) -> io::Result<()> {
    use std::io::Write as _;
    writeln!(io::stderr(), "not run: {test}: {why}")?;
    if std::env::var_os("CI").is_some_and(|ci| ci == "true") {
        return Err(io::Error::other(format!("{test} must run in CI: {why}")));
    }
    Ok(())
}
