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
        let command = |words: Vec<String>| {
            let (program, arguments) = words.split_first().context("an empty command")?;
            let program = program.strip_prefix(INSTALLED_PROGRAMS).with_context(|| program.clone())?;
            let mut command = node.program(program);
            command.args(arguments);
            Ok(command)
        };
        self.words(key, instance)?.into_iter().map(command).collect()
    }

    /// The words of each command of `key`, where no file sets a variable.
    ///
    /// # Errors
    /// There is none, or it has a variable that the unit does not set.
    pub fn words(&self, key: &str, instance: &str) -> Result<Vec<Vec<String>>> {
        let lines: Vec<&str> = self.values(key).collect();
        anyhow::ensure!(!lines.is_empty(), "no {key}");
        let variable = |name: &str| {
            let mut set =
                self.values("Environment").filter_map(|line| line.strip_prefix(name)?.strip_prefix('='));
            set.next().with_context(|| format!("{key} has {name}, which nothing sets"))
        };
        let word = |word: &str| {
            let word = match word.strip_prefix("${").and_then(|word| word.strip_suffix('}')) {
                Some(name) => variable(name)?,
                None => word,
            };
            Ok(word.replace("%i", instance))
        };
        // A variable without braces that no EnvironmentFile sets is no word at all.
        let is_word = |word: &&str| !word.starts_with('$') || word.starts_with("${");
        lines.iter().map(|line| line.split_whitespace().filter(is_word).map(word).collect()).collect()
    }
}
