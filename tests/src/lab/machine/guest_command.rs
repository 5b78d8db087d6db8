//! A command for the guest: its words, directory and environment, as the shell script the second stage runs.
//!
//! Called by the subcommands, written into the share by `vm`. The environment is the user's wish list, not the
//! host's: only PATH, HOME, TERM and variables of ours and Rust's go in.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::lab::workspace::Workspace;

/// Variables with these prefixes are passed from the host to the guest.
const PASSED_PREFIXES: [&str; 3] = ["VOLNODE_", "RUST_", "NEXTEST_"];

/// One command to run in the guest.
pub(crate) struct GuestCommand {
    words: Vec<String>,
    directory: PathBuf,
    environment: Vec<(String, String)>,
    /// More files for the share.
    files: Vec<(&'static str, &'static str)>,
    power_off_max: Duration,
    /// See [`GuestCommand::sharing`].
    shared: Option<PathBuf>,
    /// See [`GuestCommand::reached_at`].
    ports: Vec<u16>,
}

/// From the guest's `exit` to QEMU's end, where nothing has to be stopped.
const POWER_OFF_DEADLINE: Duration = Duration::from_secs(30);

impl GuestCommand {
    /// A command that runs in the directory the lab was called in.
    ///
    /// # Errors
    /// The current directory or PATH cannot be expressed in the guest (not UTF-8).
    pub(crate) fn new(workspace: &Workspace, words: Vec<String>) -> Result<Self> {
        let directory = std::env::current_dir().context("the current directory")?;
        let mut environment = vec![
            ("PATH".to_owned(), workspace.search_path()?),
            ("HOME".to_owned(), "/root".to_owned()),
            ("LANG".to_owned(), "C.UTF-8".to_owned()),
        ];
        let passed =
            |name: &str| PASSED_PREFIXES.iter().any(|prefix| name.starts_with(prefix)) || name == "TERM";
        environment.extend(std::env::vars().filter(|(name, _)| passed(name)));
        Ok(Self {
            words,
            directory,
            environment,
            files: Vec::new(),
            power_off_max: POWER_OFF_DEADLINE,
            shared: None,
            ports: Vec::new(),
        })
    }

    /// A script that runs in a machine of systemd's, with our units installed and `server` for their storage server.
    ///
    /// # Errors
    /// As [`GuestCommand::new`].
    pub(crate) fn under_systemd(
        workspace: &Workspace,
        script: &str,
        server: &str,
        power_off_max: Duration,
    ) -> Result<Self> {
        let mut command = Self::new(workspace, ["bash", "-c", script].map(str::to_owned).to_vec())?
            .with_variable("PROGRAMS", &workspace.programs().display().to_string())
            .with_variable("UNITS", &workspace.root.join("deploy").display().to_string())
            .with_variable("SERVER", server);
        command.files = vec![
            ("prepare.sh", include_str!("guest/systemd/prepare.sh")),
            ("run.sh", include_str!("guest/systemd/run.sh")),
        ];
        command.power_off_max = power_off_max;
        Ok(command)
    }

    /// What else the share has, by name.
    pub(crate) fn files(&self) -> &[(&'static str, &'static str)] {
        &self.files
    }

    /// How long the machine may take to power off once the command has ended.
    pub(crate) fn power_off_max(&self) -> Duration {
        self.power_off_max
    }

    /// Adds a variable.
    pub(crate) fn with_variable(mut self, name: &str, value: &str) -> Self {
        self.environment.retain(|(present, _)| present != name);
        self.environment.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Sets the directory.
    pub(crate) fn in_directory(mut self, directory: &Path) -> Self {
        self.directory = directory.to_owned();
        self
    }

    /// Shares a directory of this machine's with the guest, for writing on both sides: its tag is `exchange`, and QEMU writes
    /// `qemu.pid` there.
    pub(crate) fn sharing(mut self, directory: &Path) -> Self {
        self.shared = Some(directory.to_owned());
        self
    }

    /// What [`GuestCommand::sharing`] shares.
    pub(crate) fn shared(&self) -> Option<&Path> {
        self.shared.as_deref()
    }

    /// Has a TCP port of the guest's answer at the same port of this machine's loopback.
    pub(crate) fn reached_at(mut self, port: u16) -> Self {
        self.ports.push(port);
        self
    }

    /// What [`GuestCommand::reached_at`] was told.
    pub(crate) fn ports(&self) -> &[u16] {
        &self.ports
    }

    /// Where it runs.
    pub(crate) fn directory(&self) -> &Path {
        &self.directory
    }

    /// The environment as `export` lines.
    pub(crate) fn environment_script(&self) -> String {
        self.environment.iter().map(|(name, value)| format!("export {name}={}\n", quoted(value))).collect()
    }

    /// The script: enters the directory and becomes the command.
    pub(crate) fn script(&self) -> String {
        let words: Vec<String> = self.words.iter().map(|word| quoted(word)).collect();
        format!("cd {} || exit 126\nexec {}\n", quoted(&self.directory.to_string_lossy()), words.join(" "))
    }

    /// The same command as a process of this machine.
    pub(crate) fn on_this_machine(&self) -> Result<std::process::Command> {
        let (program, arguments) = self.words.split_first().context("there is no command to run")?;
        let mut command = std::process::Command::new(program);
        command.args(arguments).current_dir(&self.directory);
        command.envs(self.environment.iter().filter(|(name, _)| name != "HOME").cloned());
        Ok(command)
    }
}

/// A word as POSIX shells read it literally.
pub(crate) fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::quoted;

    #[test]
    fn a_quoted_word_reaches_the_command_unchanged() {
        for word in ["", "plain", "two words", "it's", "$HOME `id` \"x\" \\", "new\nline"] {
            let mut shell = std::process::Command::new("sh");
            let output = shell.args(["-c", &format!("printf %s {}", quoted(word))]).output().unwrap();
            assert_eq!(String::from_utf8(output.stdout).unwrap(), word);
        }
    }
}
