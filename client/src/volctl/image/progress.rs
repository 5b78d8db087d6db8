//! How far a copy is, on stderr: a bar on a terminal, else a line now and then.

use std::cell::Cell;
use std::io::{IsTerminal as _, Write as _};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

use crate::size::human_size;

/// Between two lines where there is no terminal.
const LINE_INTERVAL: Duration = Duration::from_secs(10);

pub(super) struct Progress {
    what: &'static str,
    size_bytes: u64,
    bar: Option<ProgressBar>,
    begun: Instant,
    /// What an earlier run has copied: says nothing about this one's speed.
    begun_bytes: u64,
    told: Cell<Instant>,
}

impl Progress {
    pub(super) fn new(what: &'static str, size_bytes: u64, begun_bytes: u64) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| bar(what, size_bytes, begun_bytes));
        let now = Instant::now();
        Self { what, size_bytes, bar, begun: now, begun_bytes, told: Cell::new(now) }
    }

    pub(super) fn at(&self, done_bytes: u64) {
        if let Some(bar) = &self.bar {
            bar.set_position(done_bytes);
        } else if self.told.get().elapsed() >= LINE_INTERVAL {
            self.told.set(Instant::now());
            let line = line(
                self.what,
                done_bytes,
                self.size_bytes,
                done_bytes - self.begun_bytes,
                self.begun.elapsed(),
            );
            // Whoever closed stderr does not want to know.
            std::io::stderr().write_all(line.as_bytes()).ok();
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

fn bar(what: &'static str, size_bytes: u64, begun_bytes: u64) -> ProgressBar {
    let bar = ProgressBar::new(size_bytes).with_message(what).with_position(begun_bytes);
    bar.reset_eta();
    let style = "{msg} [{bar:30}] {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} {eta}";
    match ProgressStyle::with_template(style) {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}

/// `copying: 512M of 2G, 100M/s, 15 s left`
fn line(what: &str, done_bytes: u64, size_bytes: u64, now_bytes: u64, elapsed: Duration) -> String {
    let rate = (now_bytes as f64 / elapsed.as_secs_f64().max(0.001)) as u64;
    let left = (size_bytes - done_bytes.min(size_bytes)).checked_div(rate);
    let left = left.map_or_else(String::new, |left| format!(", {left} s left"));
    let (done, size) = (human_size(done_bytes), human_size(size_bytes));
    format!("{what}: {done} of {size}, {}/s{left}\n", human_size(rate))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_tells_the_rate_of_this_run_and_the_time_left() {
        let told = line("copying", 1 << 30, 2 << 30, 100 << 20, Duration::from_secs(1));
        assert_eq!(told, "copying: 1G of 2G, 100M/s, 10 s left\n");
        let told = line("copying", 1 << 30, 2 << 30, 0, Duration::from_secs(1));
        assert_eq!(told, "copying: 1G of 2G, 0/s\n", "nobody knows");
    }
}
