//! What every measurement needs on this side: the guest's output, medians, the document.
//!
//! Called by all that measures. Knows nothing of what is measured.

use std::fs;
use std::io::{Write as _, stderr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::lab::machine::guest_command::GuestCommand;
use crate::lab::machine::kernels::Kernel;
use crate::lab::machine::vm::{self, Follower, Processors, Stream};
use crate::lab::progress::Step;
use crate::lab::tool;
use crate::lab::workspace::Workspace;

/// `--version` of a program that works takes no time at all.
const VERSION_DEADLINE: Duration = Duration::from_secs(20);

/// What is made up for one run, and gone after it.
pub(crate) struct Scratch {
    /// Where it is.
    pub(crate) directory: PathBuf,
}

impl Scratch {
    /// A new directory under `parent`, which bears the measurement's name.
    ///
    /// # Errors
    /// It cannot be made.
    pub(crate) fn new(parent: &Path, measurement: &str) -> Result<Self> {
        let directory = parent.join(format!("volnode-{measurement}-{}", std::process::id()));
        fs::create_dir(&directory).with_context(|| directory.display().to_string())?;
        Ok(Self { directory })
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.directory) {
            eprintln!("{}: {error}", self.directory.display());
        }
    }
}

/// Keeps what the guest prints, shows its progress.
#[derive(Default)]
pub(crate) struct Collector {
    /// All of it so far.
    pub(crate) stdout: Vec<u8>,
}

impl Follower for Collector {
    fn output(&mut self, stream: Stream, bytes: &[u8]) -> Result<()> {
        match stream {
            Stream::Stdout => self.stdout.extend(bytes),
            Stream::Stderr => stderr().write_all(bytes).context("passing on the progress")?,
        }
        Ok(())
    }
}

/// Runs a command that measures in a machine to its end; gives what it printed.
///
/// # Errors
/// The machine or the command failed: with all that was printed until then.
pub(crate) fn guest_output(
    workspace: &Workspace,
    kernel: &Kernel,
    command: &GuestCommand,
    processors: Processors,
    deadline: Duration,
) -> Result<String> {
    let mut collector = Collector::default();
    let step = Step::begin("measuring in the emulated machine");
    let ended = vm::run(workspace, kernel, command, processors, deadline, &mut collector);
    step.end();
    let stdout = String::from_utf8_lossy(&collector.stdout).into_owned();
    let ended = ended.with_context(|| format!("the guest had printed:\n{stdout}"))?;
    ensure!(ended.exit_code == 0, "measuring failed (exit code {})\n{stdout}", ended.exit_code);
    Ok(stdout)
}

/// How often what changes during a run is looked at.
pub(crate) const SAMPLE_INTERVAL: Duration = Duration::from_millis(50);

/// The first line by which a program tells its version.
///
/// # Errors
/// It is not there, or does not tell.
pub(crate) fn version(program: &str, option: &str) -> Result<String> {
    let text = tool::output(tool::command(program).arg(option), VERSION_DEADLINE)?;
    Ok(String::from_utf8_lossy(&text).lines().next().unwrap_or_default().trim().to_owned())
}

/// The name of the file system that a directory is on.
///
/// # Errors
/// `df` fails.
pub(crate) fn file_system(directory: &Path) -> Result<String> {
    let text = tool::output(tool::command("df").arg("--output=fstype").arg(directory), VERSION_DEADLINE)?;
    Ok(String::from_utf8_lossy(&text).lines().nth(1).unwrap_or_default().trim().to_owned())
}

/// One line that says on what the numbers were made; `release` is the guest kernel's.
///
/// # Errors
/// A tool does not say its version.
pub(crate) fn machine_line(release: &str) -> Result<String> {
    let version = |program: &str| version(program, "--version");
    let (fio, nbdkit, qemu) = (version("fio")?, version("nbdkit")?, version("qemu-system-x86_64")?);
    Ok(format!("Linux {release}, {fio}, {nbdkit}, {qemu}; volnode {}.\n", env!("CARGO_PKG_VERSION")))
}

/// Where measurements are kept, from the workspace's root.
pub(crate) const DOCUMENT: &str = "docs/performance.md";

/// Puts `text` between its markers in [`DOCUMENT`].
///
/// # Errors
/// The document lacks one of them, or cannot be written.
pub(crate) fn keep(workspace: &Workspace, begin: &str, end: &str, text: &str) -> Result<()> {
    let path = workspace.root.join(DOCUMENT);
    let document = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    let document = replaced(&document, begin, end, text)?;
    fs::write(&path, document).with_context(|| path.display().to_string())
}

/// The document with `text` between its markers.
///
/// # Errors
/// It lacks one of them.
pub(crate) fn replaced(document: &str, begin: &str, end: &str, text: &str) -> Result<String> {
    let (before, rest) = document.split_once(begin).context("the document lacks the marker of the begin")?;
    let (_, after) = rest.split_once(end).context("the document lacks the marker of the end")?;
    Ok(format!("{before}{begin}\n{text}\n{end}{after}"))
}

/// The largest value less the smallest, in per cent of the median.
pub(crate) fn spread_percent(values: Vec<f64>) -> f64 {
    let (low, high) =
        values.iter().fold((f64::MAX, 0.0_f64), |(low, high), &value| (low.min(value), high.max(value)));
    (high - low) / median(values) * 100.0
}

/// The middle value; of an even number of values the mean of the middle two.
pub(crate) fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    if values.len() % 2 == 1 { values[middle] } else { f64::midpoint(values[middle - 1], values[middle]) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_between_the_markers_is_replaced() {
        let (begin, end) = ("<!-- begin: x -->\n", "<!-- end: x -->\n");
        let document = format!("above\n{begin}old\n{end}below\n");
        let once = replaced(&document, begin, end, "new").unwrap();
        assert_eq!(once, format!("above\n{begin}\nnew\n{end}below\n"));
        assert!(replaced("no markers\n", begin, end, "new").is_err());
    }

    #[test]
    fn the_median_of_two_is_between_them() {
        assert_eq!(median(vec![3.0, 1.0]), 2.0);
        assert_eq!(median(vec![3.0, 1.0, 2.5]), 2.5);
    }
}
