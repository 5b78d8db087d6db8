//! What the lab says while it works: one line when a step begins, one every few seconds while it lasts, one when a long one has
//! ended.
//!
//! Everything that may take longer than two seconds is a [`Step`]: packages, kernels, builds, boots, measurements. The lines
//! go to stderr, apart from results. Cargo's own progress is read from its progress bar, which says how many of how
//! many crates are built; nothing else tells that (`term.progress`, the Cargo book).

use std::fs::{self, DirEntry};
use std::io::{Read, Write as _, stderr};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::tool;

/// How often a step that lasts is spoken of. A build server's log is read line by line, so there are no bars.
const SPEECH_INTERVAL: Duration = Duration::from_secs(10);

/// A step that took no longer needs no line for its end.
const SHORT_STEP: Duration = Duration::from_secs(2);

/// How wide cargo believes the terminal to be: its bar says the numbers from some sixty columns on.
const CARGO_PROGRESS_COLUMNS: &str = "100";

/// Says a line on stderr, in one piece: what others say at the same time does not come into it.
pub(crate) fn say(line: &str) {
    // Where nobody listens nothing is to be done about it.
    let _ = stderr().lock().write_all(format!("{line}\n").as_bytes());
}

/// Something that takes time, and is spoken of for as long as this value lives.
pub(crate) struct Step {
    what: String,
    began: Instant,
    how_far: Arc<Mutex<String>>,
    /// Dropped first: that ends the thread.
    ended: Option<Sender<()>>,
    speaker: Option<JoinHandle<()>>,
}

impl Step {
    /// Begins it, and says so: `lab: WHAT`.
    pub(crate) fn begin(what: &str) -> Self {
        Self::begin_watching(what, None)
    }

    /// The same for something that fetches files into `directory`: how far it is, is what is there already.
    pub(crate) fn begin_fetching(what: &str, directory: &Path) -> Self {
        Self::begin_watching(what, Some(directory.to_owned()))
    }

    fn begin_watching(what: &str, directory: Option<PathBuf>) -> Self {
        say(&format!("lab: {what}"));
        let (ended, waits) = mpsc::channel();
        let how_far = Arc::new(Mutex::new(String::new()));
        let began = Instant::now();
        let speaker = {
            // A list of packages need not be said every ten seconds.
            let (what, how_far) = (what.split(" (").next().unwrap_or(what).to_owned(), Arc::clone(&how_far));
            thread::spawn(move || {
                while waits.recv_timeout(SPEECH_INTERVAL) == Err(RecvTimeoutError::Timeout) {
                    let far = match &directory {
                        Some(directory) => format!("{} MiB so far", bytes_in(directory) >> 20),
                        None => how_far.lock().unwrap_or_else(PoisonError::into_inner).clone(),
                    };
                    let comma = if far.is_empty() { "" } else { ", " };
                    say(&format!("lab: … {what}: {} s{comma}{far}", began.elapsed().as_secs()));
                }
            })
        };
        Self { what: what.to_owned(), began, how_far, ended: Some(ended), speaker: Some(speaker) }
    }

    /// Notes how far it is, for the next line: `34 of 210`.
    pub(crate) fn is_at(&self, how_far: &str) {
        how_far.clone_into(&mut self.how_far.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// Ends it well; without this call it ends in silence, and an error tells more.
    pub(crate) fn end(self) {
        let took = self.began.elapsed();
        if took > SHORT_STEP {
            let what = self.what.split(" (").next().unwrap_or_default();
            say(&format!("lab: {what}: done in {:.0} s", took.as_secs_f64()));
        }
    }
}

impl Drop for Step {
    fn drop(&mut self) {
        drop(self.ended.take());
        if let Some(speaker) = self.speaker.take() {
            // It only prints, and has been told to end.
            let _ = speaker.join();
        }
    }
}

/// What the files of a directory hold, those in its own directories included.
fn bytes_in(directory: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(directory) else { return 0 };
    // What has gone in the meantime counts as nothing.
    let bytes = |entry: DirEntry| match entry.metadata() {
        Ok(metadata) if metadata.is_dir() => bytes_in(&entry.path()),
        Ok(metadata) => metadata.len(),
        Err(_) => 0,
    };
    entries.flatten().map(bytes).sum()
}

/// Runs a cargo command that builds, as a step that says how many of how many crates are done. What cargo says otherwise (its
/// warnings and errors) is passed on. `stdout` is what becomes of the command's output.
///
/// # Errors
/// Cargo cannot be run, or is not done in time, or the lab was interrupted; an exit status other than 0 is no error.
pub(crate) fn cargo(
    command: &mut Command,
    what: &str,
    stdout: Stdio,
    deadline: Duration,
) -> Result<(ExitStatus, Vec<u8>)> {
    let step = Step::begin(what);
    let mut child = spawn_cargo(command, stdout)?;
    let listener = listen(&mut child, &step);
    let reader = child.stdout.take().map(|mut pipe| {
        thread::spawn(move || {
            let mut bytes = Vec::new();
            // A pipe that breaks has said all it will say; the exit status tells the rest.
            let _ = pipe.read_to_end(&mut bytes);
            bytes
        })
    });
    let status = tool::wait(&mut child, deadline).context("cargo")?;
    let stdout = reader.and_then(|reader| reader.join().ok()).unwrap_or_default();
    if let Some(listener) = listener {
        // It ends with cargo's stderr.
        let _ = listener.join();
    }
    if status.success() {
        step.end();
    }
    Ok((status, stdout))
}

/// Starts cargo so that it draws its bar although nobody sees it.
pub(crate) fn spawn_cargo(command: &mut Command, stdout: Stdio) -> Result<Child> {
    command
        .env("CARGO_TERM_PROGRESS_WHEN", "always")
        .env("CARGO_TERM_PROGRESS_WIDTH", CARGO_PROGRESS_COLUMNS);
    command.env("CARGO_TERM_QUIET", "false").env("CARGO_TERM_VERBOSE", "false");
    command.stdin(Stdio::null()).stdout(stdout).stderr(Stdio::piped());
    command.spawn().context("cannot run cargo")
}

/// Follows a cargo's stderr: its bar becomes the step's `N of M`, its messages are passed on.
pub(crate) fn listen(child: &mut Child, step: &Step) -> Option<JoinHandle<()>> {
    let mut stderr = child.stderr.take()?;
    let how_far = Arc::clone(&step.how_far);
    Some(thread::spawn(move || {
        let mut line = Vec::new();
        let mut buffer = [0; 4096];
        while let Ok(length @ 1..) = stderr.read(&mut buffer) {
            for &byte in &buffer[..length] {
                if byte != b'\r' && byte != b'\n' {
                    line.push(byte);
                    continue;
                }
                let said = String::from_utf8_lossy(&std::mem::take(&mut line)).into_owned();
                match CargoLine::of(&said) {
                    CargoLine::Bar(far) => {
                        *how_far.lock().unwrap_or_else(PoisonError::into_inner) = far;
                    }
                    CargoLine::Noise => {}
                    CargoLine::Message(message) => say(&message),
                }
            }
        }
    }))
}

/// A piece of what cargo writes between returns.
#[derive(Debug, PartialEq, Eq)]
enum CargoLine {
    /// The bar: `N of M`, and what is being built.
    Bar(String),
    /// `Compiling x v1.0`: the bar says more.
    Noise,
    /// Whatever else, without terminal codes.
    Message(String),
}

/// Words with which cargo begins lines that only say that it works.
const NOISE: [&str; 13] = [
    "Compiling",
    "Checking",
    "Downloading",
    "Downloaded",
    "Updating",
    "Locking",
    "Adding",
    "Fresh",
    "Finished",
    "Installing",
    "Installed",
    "Running",
    "Executable",
];

impl CargoLine {
    fn of(text: &str) -> Self {
        let text = without_terminal_codes(text);
        let trimmed = text.trim();
        let word = trimmed.split(' ').next().unwrap_or_default();
        if trimmed.is_empty() {
            return Self::Noise;
        }
        if matches!(word, "Building" | "Fetch") && trimmed.contains('[') {
            return Self::Bar(how_far(trimmed).unwrap_or_default());
        }
        if NOISE.contains(&word) && text.starts_with(' ') {
            Self::Noise
        } else {
            Self::Message(text.to_owned())
        }
    }
}

/// `Building [=====>     ] 34/210: serde, tokio` → `34 of 210: serde, tokio`.
fn how_far(bar: &str) -> Option<String> {
    let (_, after) = bar.rsplit_once("] ")?;
    let (numbers, names) = after.split_once(": ").unwrap_or((after, ""));
    let (done, all) = numbers.split_once('/')?;
    let is_number = |text: &str| !text.is_empty() && text.chars().all(|c| c.is_ascii_digit());
    if !is_number(done) || !is_number(all) {
        return None;
    }
    let names = if names.is_empty() { String::new() } else { format!(": {names}") };
    Some(format!("{done} of {all}{names}"))
}

/// The text without the sequences that colour it or clear the line (ECMA-48 CSI).
fn without_terminal_codes(text: &str) -> String {
    let mut plain = String::new();
    let mut characters = text.chars();
    while let Some(character) = characters.next() {
        if character != '\u{1b}' {
            plain.push(character);
            continue;
        }
        if characters.next() == Some('[') {
            // The sequence ends with its first letter.
            characters.by_ref().find(|c| c.is_ascii_alphabetic());
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cargos_bar_is_read_and_its_messages_are_passed_on() {
        let bar = "    Building [=======>                 ] 34/210: serde, tokio(build)";
        assert_eq!(CargoLine::of(bar), CargoLine::Bar("34 of 210: serde, tokio(build)".to_owned()));
        assert_eq!(CargoLine::of("   Compiling serde v1.0.0"), CargoLine::Noise);
        assert_eq!(CargoLine::of("\u{1b}[K"), CargoLine::Noise);
        let error = "error[E0308]: mismatched types";
        assert_eq!(CargoLine::of(error), CargoLine::Message(error.to_owned()));
        // The source line of a diagnostic may begin with one of cargo's words.
        let quoted = "12 |     Compiling";
        assert_eq!(CargoLine::of(quoted), CargoLine::Message(quoted.to_owned()));
    }

    #[test]
    fn a_step_says_that_it_goes_on_until_it_ends() {
        let step = Step::begin("counting sheep");
        step.is_at("3 of 100");
        assert_eq!(*step.how_far.lock().unwrap(), "3 of 100");
        step.end();
    }
}
