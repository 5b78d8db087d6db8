//! The log of a daemon: lines on stderr that the thread which says them never waits for.
//!
//! Owns: the lines on their way to stderr, the thread that writes them, and what is said when a thread panics. Never: blocks
//! or ends anything because of stderr, whatever that is: a pipe that nobody reads, a file on a full disk, a terminal that is
//! gone. Lines that nobody takes are dropped and counted, and the log says how many as soon as it takes lines again.
//! Called by: the `main` of `volserver` and `volclient`; a device process starts the writer itself, when it is protected.
//!
//! ```text
//!   any thread ──push──► waiting lines (at most 256 KiB) ──taken whole──► the writer's lines ──write(2)──► stderr
//!                └─full──► counted                                               └─error──► counted
//! ```
//! Invariants: the lock is held for as long as it takes to copy a line, never during a system call on stderr; memory is
//! bounded by twice `WAITING_BYTES_MAX` and set aside by then.

mod lines;

use std::backtrace::{Backtrace, BacktraceStatus};
use std::io::{self, IsTerminal as _, Write};
use std::os::fd::AsFd as _;
use std::panic::PanicHookInfo;
use std::sync::{Arc, Mutex, mpsc};
use std::thread::Builder;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tracing_subscriber::EnvFilter;

use lines::Lines;

/// How long the end of a process waits for its last lines to be taken.
const LAST_LINES_LIMIT: Duration = Duration::from_secs(1);

static LINES: Lines = Lines::new();

/// Sends what `filter` lets through to stderr, and what a panic says. The lines wait until [`start_writer`].
pub fn start(filter: EnvFilter) {
    std::panic::set_hook(Box::new(say_panic));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(|| ToLines)
        // They would be told on stderr, by whoever logs.
        .log_internal_errors(false)
        .with_ansi(io::stderr().is_terminal())
        .init();
}

/// Starts the thread that writes the lines; a second call does nothing. Not part of [`start`], because a thread keeps what the
/// process was when it began: its mounts, and how memory is found for it.
///
/// # Errors
/// No thread can be made; the lines go on waiting.
pub fn start_writer() -> io::Result<()> {
    if !LINES.take_writers_place() {
        return Ok(());
    }
    let writer = Builder::new().name("log".into()).spawn(|| LINES.write_all_to(io::stderr().as_fd()));
    if writer.is_err() {
        LINES.give_writers_place_back();
    }
    writer.map(drop)
}

/// Whether this process may have so many more threads; tokio, which makes its own, panics where it may not.
///
/// # Errors
/// It may not, with the limits that can be the reason.
pub fn try_threads(count: usize) -> io::Result<()> {
    let (all_made, made) = mpsc::channel::<()>();
    let made = Arc::new(Mutex::new(made));
    let wait = || {
        let made = Arc::clone(&made);
        // Ends when the other end is gone; by then there are all of them at once.
        move || drop(made.lock().map(|made| made.recv()))
    };
    let threads: io::Result<Vec<_>> =
        (0..count).map(|_| Builder::new().name("trial".into()).spawn(wait())).collect();
    drop(all_made);
    let threads =
        threads.map_err(|error| io::Error::new(error.kind(), format!("{error}; {THREAD_LIMITS}")))?;
    for thread in threads {
        // It cannot have panicked.
        let _ = thread.join();
    }
    Ok(())
}

/// What may keep a process from having another thread, and how it is raised.
pub const THREAD_LIMITS: &str =
    "there may be no more threads: raise TasksMax= of the unit, ulimit -u, or a container's limit of pids";

/// Says a line that is not part of the log, such as why the process ends.
pub fn say(line: &str) {
    LINES.push_last_words(format!("{line}\n").as_bytes());
}

/// Passes a line on, with its end, that another process has logged: it is part of the log as it is.
pub fn pass_on(line: &[u8]) {
    LINES.push(line);
}

/// Waits until everything that was said has been taken, until nothing was for a second, or for five in all. Call it before the
/// process ends.
pub fn finish() {
    // Without a thread there is nobody who could write, and nothing to wait for.
    if start_writer().is_ok() {
        LINES.wait_until_taken(LAST_LINES_LIMIT, 5 * LAST_LINES_LIMIT);
    }
}

/// Prints a line on stdout, for whoever started the daemon; a thread of its own waits until it is taken. Where there can be none, it
/// is printed at once if there is room for it.
///
/// # Errors
/// No thread can be made, and nobody takes the line.
pub fn announce(line: String) -> io::Result<()> {
    let printer = {
        let line = line.clone();
        move || print(&line)
    };
    Builder::new().name("announce".into()).spawn(printer).map(drop).or_else(|no_thread| {
        let stdout = io::stdout();
        // A line is short enough to be taken whole.
        let ready = poll(&mut [PollFd::new(&stdout, PollFlags::OUT)], Some(&Timespec::default()));
        if !ready.is_ok_and(|ready| ready > 0) {
            return Err(no_thread);
        }
        print(&line);
        Ok(())
    })
}

fn print(line: &str) {
    let mut stdout = io::stdout();
    if let Err(error) = writeln!(stdout, "{line}").and_then(|()| stdout.flush()) {
        tracing::warn!(%error, "stdout is closed");
    }
}

/// In a panic's place the process may be about to be aborted: its words have to be out by then.
fn say_panic(panic: &PanicHookInfo<'_>) {
    let thread = std::thread::current();
    let backtrace = Backtrace::capture();
    let backtrace = match backtrace.status() {
        BacktraceStatus::Captured => format!("\n{backtrace}"),
        _ => String::new(),
    };
    say(&format!("thread {:?}: {panic}{backtrace}", thread.name().unwrap_or("without a name")));
    finish();
}

/// Where the subscriber writes each event, in one piece.
struct ToLines;

impl Write for ToLines {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        LINES.push(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
