//! The product's programs, built with the profile that this test was built with.

use std::path::PathBuf;
use std::process::Command;

use testlab::harness::LAB_VARIABLE;

/// The directory with `volserver` and `volctl`, brought up to date; `cargo lab test` has built them already.
pub(crate) fn directory() -> PathBuf {
    let own = std::env::current_exe().unwrap();
    // target/PROFILE/deps/TEST
    let directory = own.ancestors().nth(2).unwrap().to_owned();
    if std::env::var_os(LAB_VARIABLE).is_some() {
        return directory;
    }
    let profile = match directory.file_name().and_then(|name| name.to_str()).unwrap() {
        "debug" => "dev",
        other => other,
    };
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut build = Command::new(cargo);
    build.args([
        "build",
        "--quiet",
        "--profile",
        profile,
        "--package",
        "server",
        "--package",
        "client",
        "--bins",
    ]);
    let status = build.current_dir(env!("CARGO_MANIFEST_DIR")).status().unwrap();
    assert!(status.success(), "the product does not build");
    directory
}
