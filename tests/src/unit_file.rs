//! The systemd units of `deploy/`, as far as tests need them: their text, and their commands to run.
//!
//! Used by the host tests, which have systemd check them, and the VM tests, which run the very commands that systemd would. Source:
//! systemd.service(5).

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::storage_node::StorageNode;

/// Where the units expect the programs.
pub const INSTALLED_PROGRAMS: &str = "/usr/local/bin/";

/// One file.
#[derive(Debug)]
pub struct UnitFile {
    text: String,
}

impl UnitFile {
    /// Where the units lie.
    pub fn directory() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).with_file_name("deploy")
    }

    /// Reads `deploy/<name>`.
    ///
    /// # Errors
    /// There is no such file.
    pub fn read(name: &str) -> Result<Self> {
        let path = Self::directory().join(name);
        let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        Ok(Self { text })
    }

    /// As it is.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// What the unit says of `key`, line by line.
    pub fn values(&self, key: &str) -> impl Iterator<Item = &str> {
        self.text.lines().filter_map(move |line| line.strip_prefix(key)?.strip_prefix('='))
    }

    /// How long its stop may take.
    ///
    /// # Errors
    /// It does not say, or not in seconds.
    pub fn timeout_stop(&self) -> Result<Duration> {
        let seconds = self.values("TimeoutStopSec").next().context("no TimeoutStopSec")?;
        Ok(Duration::from_secs(seconds.parse().with_context(|| seconds.to_owned())?))
    }

    /// The commands of `key`, such as `ExecStop`, of this instance and against this node.
    ///
    /// # Errors
    /// There is none, or it is of a form that the units do not use.
    pub fn commands(&self, key: &str, instance: &str, node: &StorageNode) -> Result<Vec<Command>> {
        let lines: Vec<&str> = self.values(key).collect();
        anyhow::ensure!(!lines.is_empty(), "no {key}");
        let command = |line: &&str| {
            let mut words = line.split_whitespace();
            let program = words.next().and_then(|program| program.strip_prefix(INSTALLED_PROGRAMS));
            let mut command = node.program(program.with_context(|| format!("{key}={line}"))?);
            // A variable that no EnvironmentFile sets is no word at all.
            command
                .args(words.filter(|word| !word.starts_with('$')).map(|word| word.replace("%i", instance)));
            Ok(command)
        };
        lines.iter().map(command).collect()
    }
}
