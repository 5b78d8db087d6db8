//! Test binaries of other crates that need ublk: their tests one by one, as tests of the VM.
//!
//! Called by the harness. A binary takes the options of any Rust test binary (libtest's), and is run once for each
//! test, so that each has the lab's deadline and its name in the lab's report. Which binaries there are, the
//! lab says in an environment variable.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

/// An error by which a test of another crate says that the kernel is too old for it. The newest series has all we
/// use, so there it is a failure; on others the test counts as skipped.
#[derive(Debug)]
pub(crate) struct KernelLacks(pub(crate) String);

impl std::fmt::Display for KernelLacks {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(&self.0)
    }
}

impl std::error::Error for KernelLacks {}

/// Names the binaries: `crate=/path`, separated by colons.
pub const BINARIES_VARIABLE: &str = "VOLNODE_LAB_TEST_BINARIES";

/// One binary.
pub(crate) struct LibtestBinary {
    crate_name: String,
    path: PathBuf,
}

impl LibtestBinary {
    /// The binaries the lab names.
    ///
    /// # Errors
    /// The variable holds something else.
    pub(crate) fn all() -> Result<Vec<Self>> {
        let named = std::env::var(BINARIES_VARIABLE).context(BINARIES_VARIABLE)?;
        let binary = |entry: &str| -> Result<Self> {
            let (crate_name, path) =
                entry.split_once('=').with_context(|| format!("{entry}: want crate=path"))?;
            Ok(Self { crate_name: crate_name.to_owned(), path: PathBuf::from(path) })
        };
        named.split(':').filter(|entry| !entry.is_empty()).map(binary).collect()
    }

    /// The crate whose tests these are.
    pub(crate) fn crate_name(&self) -> &str {
        &self.crate_name
    }

    /// The file.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The names of its tests.
    ///
    /// # Errors
    /// It cannot be run, or has none.
    pub(crate) fn tests(&self) -> Result<Vec<String>> {
        let listed = Command::new(&self.path).args(["--list", "--format", "terse"]).output();
        let listed = listed.with_context(|| format!("cannot run {}", self.path.display()))?;
        let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
        let tests: Vec<String> =
            listed.lines().filter_map(|line| line.strip_suffix(": test")).map(str::to_owned).collect();
        ensure!(!tests.is_empty(), "{} lists no test", self.path.display());
        Ok(tests)
    }
}

/// Runs one test of a binary.
///
/// # Errors
/// The test failed (what it said has been printed), or was ignored: [`KernelLacks`] with its reason.
pub(crate) fn run_one(binary: &Path, test: &str) -> Result<()> {
    let mut command = Command::new(binary);
    command.args([test, "--exact", "--test-threads", "1"]).stdin(Stdio::null()).stderr(Stdio::inherit());
    let output = command.output().with_context(|| format!("cannot run {}", binary.display()))?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    println!("{said}");
    verdict(&said, output.status.success())
}

/// What a run of one test came to.
fn verdict(said: &str, success: bool) -> Result<()> {
    let result = said.lines().find_map(|line| line.strip_prefix("test result: ")).unwrap_or_default();
    if success && result.contains(" 1 passed") {
        return Ok(());
    }
    if success && result.contains(" 1 ignored") {
        let ignored = said.lines().find_map(|line| line.split_once("... ignored"));
        let reason = ignored.map(|(_, reason)| reason.trim_matches([' ', ',', '(', ')'])).unwrap_or_default();
        return Err(KernelLacks(reason.trim_start_matches("SKIP ").to_owned()).into());
    }
    let failure: Vec<&str> = said.lines().skip_while(|line| *line != "failures:").collect();
    bail!("{}", if failure.is_empty() { "it ended without a result".to_owned() } else { failure.join("\n") })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_passed_test_passes_and_a_filter_that_hits_nothing_does_not() {
        let passed =
            "running 1 test\ntest x ... ok\n\ntest result: ok. 1 passed; 0 failed; 0 ignored; 0 measured\n";
        assert!(verdict(passed, true).is_ok());
        assert!(verdict(passed, false).is_err());
        let nothing = "running 0 tests\n\ntest result: ok. 0 passed; 0 failed; 0 ignored; 0 measured\n";
        assert!(verdict(nothing, true).is_err());
    }

    #[test]
    fn an_ignored_test_says_what_the_kernel_lacks() {
        let said = "test x ... ignored (SKIP this kernel lacks AUTO_BUF_REG)\n\n\
                    test result: ok. 0 passed; 0 failed; 1 ignored; 0 measured\n";
        let error = verdict(said, true).unwrap_err();
        assert_eq!(error.downcast_ref::<KernelLacks>().unwrap().0, "this kernel lacks AUTO_BUF_REG");
    }
}
