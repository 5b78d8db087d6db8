//! Lines on their way to a descriptor that may not take them.
//!
//! Owns: the lines that wait, how many were dropped, and how a descriptor is written to. Never: makes a thread. Called by
//! `lib.rs`.

use std::os::fd::BorrowedFd;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

/// Lines that may wait, in bytes: some two thousand, more than an outage of a hundred disks says.
pub(crate) const WAITING_BYTES_MAX: usize = 256 << 10;

/// Of it, what only last words may take: why a process ends is worth more than the rest of its log.
const LAST_WORDS_BYTES: usize = 16 << 10;

/// What is written at once, so that a descriptor that is slow can be told from one that takes nothing.
const PIECE_BYTES: usize = 4 << 10;

/// Lines that wait for one thread to write them.
#[derive(Debug)]
pub(crate) struct Lines {
    state: Mutex<State>,
    pushed: Condvar,
    taken: Condvar,
}

#[derive(Debug)]
struct State {
    waiting: Vec<u8>,
    dropped: u64,
    has_writer: bool,
    /// Whether the writer has lines in its hands.
    is_writing: bool,
    /// How many pieces the descriptor has taken.
    pieces: u64,
}

impl Lines {
    pub(crate) const fn new() -> Self {
        let state =
            State { waiting: Vec::new(), dropped: 0, has_writer: false, is_writing: false, pieces: 0 };
        Self { state: Mutex::new(state), pushed: Condvar::new(), taken: Condvar::new() }
    }

    /// Takes a line, with its end; drops it where too many wait already.
    pub(crate) fn push(&self, line: &[u8]) {
        self.push_up_to(WAITING_BYTES_MAX - LAST_WORDS_BYTES, line);
    }

    /// The same for a process's last words, for which room is kept.
    pub(crate) fn push_last_words(&self, line: &[u8]) {
        self.push_up_to(WAITING_BYTES_MAX, line);
    }

    fn push_up_to(&self, bytes_max: usize, line: &[u8]) {
        let mut state = self.lock();
        if state.waiting.len() + line.len() > bytes_max {
            state.dropped += 1;
            return;
        }
        let room_bytes = WAITING_BYTES_MAX - state.waiting.len();
        state.waiting.reserve_exact(room_bytes);
        state.waiting.extend_from_slice(line);
        drop(state);
        self.pushed.notify_one();
    }

    /// True: the caller is to be the writer. There is one.
    pub(crate) fn take_writers_place(&self) -> bool {
        !std::mem::replace(&mut self.lock().has_writer, true)
    }

    /// The caller cannot be the writer.
    pub(crate) fn give_writers_place_back(&self) {
        self.lock().has_writer = false;
    }

    /// Writes what is pushed, for ever. What the descriptor does not take is dropped.
    pub(crate) fn write_all_to(&self, out: BorrowedFd<'_>) {
        let mut lines = Vec::with_capacity(WAITING_BYTES_MAX);
        loop {
            let dropped = self.wait_for_lines(&mut lines);
            let dropped = write_lines(out, &lines, dropped, &|| self.piece_taken());
            lines.clear();
            self.written(dropped);
        }
    }

    /// Waits until there is something to write, and takes it; gives how many lines were dropped since the last time.
    fn wait_for_lines(&self, lines: &mut Vec<u8>) -> u64 {
        let is_idle = |state: &mut State| state.waiting.is_empty();
        let waited = self.pushed.wait_while(self.lock(), is_idle);
        let mut state = waited.unwrap_or_else(PoisonError::into_inner);
        std::mem::swap(&mut state.waiting, lines);
        state.is_writing = true;
        std::mem::take(&mut state.dropped)
    }

    fn written(&self, dropped: u64) {
        let mut state = self.lock();
        state.is_writing = false;
        state.dropped += dropped;
        drop(state);
        self.taken.notify_all();
    }

    fn piece_taken(&self) {
        self.lock().pieces += 1;
        self.taken.notify_all();
    }

    /// Waits until no line is on its way, until nothing was taken for as long as `limit`, or for `total` in all.
    pub(crate) fn wait_until_taken(&self, limit: Duration, total: Duration) {
        let began = Instant::now();
        let is_on_its_way = |state: &State| state.is_writing || !state.waiting.is_empty();
        let mut state = self.lock();
        while is_on_its_way(&state) && began.elapsed() < total {
            let pieces = state.pieces;
            let is_waited_for = |state: &mut State| is_on_its_way(state) && state.pieces == pieces;
            let waited = self.taken.wait_timeout_while(state, limit, is_waited_for);
            let (after, outcome) = waited.unwrap_or_else(PoisonError::into_inner);
            if outcome.timed_out() {
                return;
            }
            state = after;
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Writes lines, and then how many were dropped, if any; gives how many that are now, of which nobody was told.
fn write_lines(out: BorrowedFd<'_>, lines: &[u8], dropped: u64, taken: &dyn Fn()) -> u64 {
    let written_bytes = write(out, lines, taken);
    let left = lines.get(written_bytes..).unwrap_or_default();
    let dropped = dropped + left.iter().filter(|byte| **byte == b'\n').count() as u64;
    if dropped == 0 || !left.is_empty() {
        return dropped;
    }
    let told = format!("{dropped} lines of this log were dropped: nobody took them\n");
    if write(out, told.as_bytes(), taken) == told.len() { 0 } else { dropped }
}

/// Writes until all is written or the descriptor fails; gives how many bytes it took, and says `taken` for each piece.
fn write(out: BorrowedFd<'_>, bytes: &[u8], taken: &dyn Fn()) -> usize {
    let mut written_bytes = 0;
    while let Some(rest) = bytes.get(written_bytes..).filter(|rest| !rest.is_empty()) {
        match rustix::io::write(out, &rest[..rest.len().min(PIECE_BYTES)]) {
            Ok(0) => break,
            Ok(bytes) => {
                written_bytes += bytes;
                taken();
            }
            Err(Errno::INTR) => {}
            // Whoever shares the descriptor may have made it so.
            Err(Errno::AGAIN) => wait_for_room(out),
            Err(_) => break,
        }
    }
    written_bytes
}

fn wait_for_room(out: BorrowedFd<'_>) {
    // If it fails, the next write tells why.
    let _ = poll(&mut [PollFd::new(&out, PollFlags::OUT)], None);
}

#[cfg(test)]
#[allow(clippy::unwrap_used)] // A test says what went wrong by panicking.
mod tests {
    use rustix::fs::{OFlags, fcntl_setfl};
    use rustix::pipe::{PipeFlags, pipe_with};
    use std::fs::File;
    use std::io::{BufRead as _, BufReader};
    use std::os::fd::{AsFd as _, OwnedFd};

    use super::*;

    /// More than a machine that is busy takes to write a few lines.
    const LIMIT: Duration = Duration::from_secs(20);

    /// Lines with a writer on `out`, which lives as long as the test.
    fn lines_to(out: OwnedFd) -> &'static Lines {
        let lines: &'static Lines = Box::leak(Box::new(Lines::new()));
        assert!(lines.take_writers_place() && !lines.take_writers_place(), "there is one writer");
        std::thread::spawn(move || lines.write_all_to(out.as_fd()));
        lines
    }

    fn pipe() -> (OwnedFd, OwnedFd) {
        pipe_with(PipeFlags::CLOEXEC).unwrap()
    }

    fn line(number: usize) -> String {
        format!("{number:0>99}\n")
    }

    /// How many lines can be read, or are told to have been dropped, until that is `said` or nothing comes any more.
    fn read_or_dropped(reader: &OwnedFd, said: usize) -> usize {
        let (mut count, mut text) = (0, Vec::new());
        while count < said
            && poll(&mut [PollFd::new(reader, PollFlags::IN)], Some(&LIMIT.try_into().unwrap())) == Ok(1)
        {
            let mut piece = [0; 4096];
            let bytes = rustix::io::read(reader, &mut piece).unwrap();
            text.extend_from_slice(&piece[..bytes]);
            while let Some(end) = text.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = text.drain(..=end).collect();
                let dropped =
                    std::str::from_utf8(&line).unwrap().split_once(" lines of this log were dropped");
                count += dropped.map_or(1, |(dropped, _)| dropped.parse().unwrap());
            }
        }
        count
    }

    #[test]
    fn lines_arrive_in_order_and_the_end_waits_for_them() {
        let (reader, writer) = pipe();
        let lines = lines_to(writer);
        (0..100).for_each(|number| lines.push(line(number).as_bytes()));
        lines.wait_until_taken(LIMIT, LIMIT);
        let read: Vec<String> =
            BufReader::new(File::from(reader)).lines().take(100).map(Result::unwrap).collect();
        assert!((0..100).all(|number| format!("{}\n", read[number]) == line(number)));
    }

    /// Every line is either read or counted, however long nobody reads, and whether the descriptor blocks or not.
    #[test]
    fn lines_that_nobody_reads_are_dropped_counted_and_told_of() {
        for is_non_blocking in [false, true] {
            let (reader, writer) = pipe();
            if is_non_blocking {
                fcntl_setfl(&writer, OFlags::WRONLY | OFlags::NONBLOCK).unwrap();
            }
            let lines = lines_to(writer);
            let began = Instant::now();
            // Ten times what may wait.
            let said = 10 * WAITING_BYTES_MAX / line(0).len();
            (0..said).for_each(|number| lines.push(line(number).as_bytes()));
            assert!(lines.lock().waiting.capacity() <= WAITING_BYTES_MAX);
            lines.wait_until_taken(Duration::from_millis(10), LIMIT);
            assert!(began.elapsed() < LIMIT, "a line was waited for");
            assert_eq!(read_or_dropped(&reader, said), said);
        }
    }

    #[test]
    fn a_descriptor_that_fails_costs_its_lines_and_nothing_else() {
        let (reader, broken) = pipe();
        drop(reader);
        let full = File::options().write(true).open("/dev/full").unwrap();
        for out in [broken, full.into()] {
            let lines = lines_to(out);
            for number in 0..1000 {
                lines.push(line(number).as_bytes());
                if number % 100 == 0 {
                    lines.wait_until_taken(LIMIT, LIMIT);
                }
            }
            lines.wait_until_taken(LIMIT, LIMIT);
            assert_eq!(lines.lock().dropped, 1000, "each is counted");
        }
    }

    #[test]
    fn last_words_have_room_where_the_log_has_none_and_a_slow_reader_is_waited_for() {
        let (reader, writer) = pipe();
        let lines: &'static Lines = Box::leak(Box::new(Lines::new()));
        (0..WAITING_BYTES_MAX / line(0).len()).for_each(|number| lines.push(line(number).as_bytes()));
        assert!(lines.lock().dropped > 0, "the log is full");
        lines.push_last_words(b"why it ends\n");
        std::thread::spawn(move || lines.write_all_to(writer.as_fd()));
        // Each piece comes sooner than the limit, all of them later.
        let slow = std::thread::spawn(move || {
            let (mut text, mut piece) = (Vec::new(), [0; 16 << 10]);
            while !String::from_utf8_lossy(&text).contains("why it ends\n") {
                std::thread::sleep(Duration::from_millis(50));
                let bytes = rustix::io::read(&reader, &mut piece).unwrap();
                text.extend_from_slice(&piece[..bytes]);
            }
        });
        let began = Instant::now();
        lines.wait_until_taken(Duration::from_secs(5), LIMIT);
        assert!(began.elapsed() > Duration::from_millis(300), "it was not waited for");
        assert!(!lines.lock().is_writing && lines.lock().waiting.is_empty());
        slow.join().unwrap();
    }
}
