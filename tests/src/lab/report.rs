//! What came of the tests: prints each by name as it ends, counts them by part, and has the last word.
//!
//! Fed by `host_tests` (libtest's own result lines), `vm_tests` (events), `systemd_machine` and `cost::gate`; parts may run at the
//! same time. Invariant: every planned test ends as passed, failed or skipped; a part that ran nothing, or ended in any way
//! but its own, is a failure.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use testlab::events::{Event, PlannedTest};
use testlab::selection::Selection;

/// Longer than a hung test's own deadline: the time the harness has to report it from inside.
const HARNESS_GRACE: Duration = Duration::from_secs(60);

/// Lines of a failed test's output that are shown; the beginning is dropped.
const OUTPUT_LINES_SHOWN: usize = 200;

/// How many of the slowest tests are named at the end.
const SLOWEST_SHOWN: usize = 20;

/// A test that says nothing is spoken of so often, seconds.
const SPEECH_INTERVAL: Duration = Duration::from_secs(10);

/// The tests of one machine.
pub(crate) struct PartReport {
    title: String,
    /// Before each line where several parts run at once.
    prefix: String,
    began: Instant,
    /// Set when it is added to the report.
    took: Duration,
    passed: usize,
    skipped: usize,
    /// Names, with the seconds they took.
    times: Vec<(String, f64)>,
    /// Names, with the reasons.
    failed: Vec<(String, String)>,
}

/// All parts.
pub(crate) struct Report {
    /// Which tests were wanted.
    selection: Selection,
    parts: Vec<PartReport>,
    /// What else took its time: set-up, builds.
    phases: Vec<(String, Duration)>,
}

impl Report {
    pub(crate) fn new(selection: Selection) -> Self {
        Self { selection, parts: Vec::new(), phases: Vec::new() }
    }

    /// Takes a finished part.
    pub(crate) fn add(&mut self, mut part: PartReport) {
        // With a filter a part may have nothing to do; that no part has is caught at the end.
        if part.ran() == 0 && !self.selection.leaves_out() {
            part.fail("any test at all", "this part ran no test");
        }
        self.parts.push(part.ended());
    }

    /// Takes the time of a phase without tests.
    pub(crate) fn add_phase(&mut self, name: &str, took: Duration) {
        self.phases.push((name.to_owned(), took));
    }

    /// Prints the totals; true if everything is well.
    pub(crate) fn close(mut self, elapsed: Duration) -> bool {
        if self.parts.iter().all(|part| part.ran() == 0) {
            let mut none = PartReport::begin("nothing ran");
            none.fail("any test at all", "no test has a name like that");
            self.parts.push(none);
        }
        self.print_slowest();
        println!();
        for part in &self.parts {
            for (name, reason) in &part.failed {
                println!("failed: {}: {name}: {}", part.title, reason.lines().next().unwrap_or_default());
            }
        }
        for (name, took) in &self.phases {
            println!("{name:<40} {} s", took.as_secs());
        }
        for part in &self.parts {
            let totals = totals(part.passed, part.failed.len(), part.skipped);
            println!("{:<40} {} s: {totals}", part.title, part.took.as_secs());
        }
        let sum = |count: fn(&PartReport) -> usize| self.parts.iter().map(count).sum::<usize>();
        let failed = sum(|part| part.failed.len());
        println!("in {} min {} s", elapsed.as_secs() / 60, elapsed.as_secs() % 60);
        println!("{}", totals(sum(|part| part.passed), failed, sum(|part| part.skipped)));
        failed == 0
    }

    fn print_slowest(&self) {
        let named = |part: &PartReport| -> Vec<(f64, String)> {
            part.times.iter().map(|(name, seconds)| (*seconds, format!("{name}  [{}]", part.title))).collect()
        };
        let mut times: Vec<(f64, String)> = self.parts.iter().flat_map(named).collect();
        times.sort_by(|one, other| other.0.total_cmp(&one.0));
        times.truncate(SLOWEST_SHOWN);
        println!("\nthe {} slowest tests:", times.len());
        for (seconds, name) in times {
            println!("{seconds:>8.1} s  {name}");
        }
    }
}

fn totals(passed: usize, failed: usize, skipped: usize) -> String {
    let skipped = if skipped == 0 { String::new() } else { format!(", {skipped} skipped") };
    format!("{passed} passed, {failed} failed{skipped}")
}

impl PartReport {
    /// Begins a part and says so.
    pub(crate) fn begin(title: &str) -> Self {
        println!("\n== {title} ==");
        Self {
            title: title.to_owned(),
            prefix: String::new(),
            began: Instant::now(),
            took: Duration::ZERO,
            passed: 0,
            skipped: 0,
            times: Vec::new(),
            failed: Vec::new(),
        }
    }

    /// Puts `name` before each line of this part: others run at the same time.
    pub(crate) fn beside_others(mut self, name: &str) -> Self {
        self.prefix = format!("{name}: ");
        self
    }

    /// Prints text, each line with the part's prefix.
    pub(crate) fn say(&self, text: &str) {
        let lines: String = text.lines().map(|line| format!("{}{line}\n", self.prefix)).collect();
        // At once, so that lines of other parts do not come between.
        print!("{lines}");
    }

    /// Counts a failure that is no test's own: a machine that died, a program that does not build.
    pub(crate) fn fail(&mut self, name: &str, reason: &str) {
        self.say(&format!("FAILED {name}: {reason}"));
        self.failed.push((name.to_owned(), reason.to_owned()));
    }

    /// Prints and counts a test's end.
    pub(crate) fn end(&mut self, name: &str, seconds: f64, failure: Option<&str>) {
        match failure {
            None => {
                self.say(&format!("test {name} ... ok ({seconds:.1} s)"));
                self.passed += 1;
            }
            Some(reason) => {
                let reason_shown = reason.replace('\n', "\n    ");
                self.say(&format!("test {name} ... FAILED ({seconds:.1} s)\n    {reason_shown}"));
                self.failed.push((name.to_owned(), reason.to_owned()));
            }
        }
        self.times.push((name.to_owned(), seconds));
    }

    /// Prints and counts a test that was not run.
    pub(crate) fn skip(&mut self, name: &str, reason: &str) {
        self.say(&format!("test {name} ... SKIP {reason}"));
        self.skipped += 1;
    }

    /// Counts what cargo's `test result:` line says; false if the line is another.
    pub(crate) fn count_cargo_result(&mut self, line: &str) -> bool {
        let Some(result) = line.strip_prefix("test result: ") else { return false };
        let counts = result.split_once(". ").map(|(_, counts)| counts).unwrap_or_default();
        for count in counts.split("; ") {
            match count.split_once(' ') {
                Some((number, "passed")) => self.passed += number.parse().unwrap_or(0),
                Some((number, "ignored")) => self.skipped += number.parse().unwrap_or(0),
                _ => {}
            }
        }
        true
    }

    /// Counts one failed test of cargo's.
    pub(crate) fn count_cargo_failure(&mut self, name: &str) {
        self.failed.push((name.to_owned(), "see above".to_owned()));
    }

    /// Notes how long a test took that is counted otherwise.
    pub(crate) fn took(&mut self, name: &str, seconds: f64) {
        self.times.push((name.to_owned(), seconds));
    }

    /// True if something failed.
    pub(crate) fn has_failed(&self) -> bool {
        !self.failed.is_empty()
    }

    /// How many tests have failed.
    pub(crate) fn failures(&self) -> usize {
        self.failed.len()
    }

    /// How many tests have a result.
    pub(crate) fn results(&self) -> usize {
        self.ran() + self.skipped
    }

    fn ran(&self) -> usize {
        self.passed + self.failed.len()
    }

    /// The part with its time, which runs no longer.
    pub(crate) fn ended(mut self) -> Self {
        if self.took == Duration::ZERO {
            self.took = self.began.elapsed();
        }
        self
    }
}

/// Reads a VM test process's output: events go into the report, text is kept for the test it belongs to.
pub(crate) struct EventReader<'a> {
    part: &'a mut PartReport,
    show_output: bool,
    /// The line that has not ended yet.
    partial: Vec<u8>,
    /// The running test's output.
    text: VecDeque<String>,
    waiting: VecDeque<PlannedTest>,
    running: Option<(PlannedTest, Instant)>,
    /// How many tests have begun, of how many.
    begun: (usize, usize),
    /// When the running test was last spoken of.
    spoke_at: Instant,
    finished_at: Option<Instant>,
}

impl<'a> EventReader<'a> {
    pub(crate) fn new(part: &'a mut PartReport, show_output: bool) -> Self {
        Self {
            part,
            show_output,
            partial: Vec::new(),
            text: VecDeque::new(),
            waiting: VecDeque::new(),
            running: None,
            begun: (0, 0),
            spoke_at: Instant::now(),
            finished_at: None,
        }
    }

    /// Takes output.
    ///
    /// # Errors
    /// An event that cannot be understood.
    pub(crate) fn read(&mut self, bytes: &[u8]) -> Result<()> {
        for piece in bytes.split_inclusive(|byte| *byte == b'\n') {
            self.partial.extend_from_slice(piece);
            if piece.ends_with(b"\n") {
                let line = String::from_utf8_lossy(&std::mem::take(&mut self.partial)).into_owned();
                self.read_line(line.trim_end())?;
            }
        }
        Ok(())
    }

    /// Fails if the running test is past its deadline and the harness has not said so, or if the process does not
    /// end although its tests have.
    ///
    /// # Errors
    /// As above; the machine is to be killed then.
    pub(crate) fn check_deadlines(&mut self) -> Result<()> {
        if let Some((test, since)) = &self.running {
            if since.elapsed() > SPEECH_INTERVAL && self.spoke_at.elapsed() > SPEECH_INTERVAL {
                self.spoke_at = Instant::now();
                let (begun, of) = self.begun;
                let took = since.elapsed().as_secs();
                self.part.say(&format!("… {} has run for {took} s ({begun} of {of})", test.name));
            }
            let deadline = Duration::from_secs(test.deadline_seconds) + HARNESS_GRACE;
            if since.elapsed() > deadline {
                bail!("{} hung, and the machine with it: nothing for {} s", test.name, deadline.as_secs());
            }
        }
        if self.finished_at.is_some_and(|at| at.elapsed() > HARNESS_GRACE) {
            bail!("the tests have ended, but not their process: a task that cannot be killed?");
        }
        Ok(())
    }

    /// Accounts for tests without a result and says whether the process finished by itself.
    pub(crate) fn close(mut self) -> bool {
        if let Some((test, since)) = self.running.take() {
            let reason = "the machine ended while it ran";
            self.end(&test.name, since.elapsed().as_secs_f64(), Some(reason));
        }
        while let Some(test) = self.waiting.pop_front() {
            self.end(&test.name, 0.0, Some("not run: the machine ended before"));
        }
        for line in self.text.drain(..) {
            self.part.say(&format!("    {line}"));
        }
        self.finished_at.is_some()
    }

    fn read_line(&mut self, line: &str) -> Result<()> {
        let (text, event) = Event::parse_line(line)?;
        if !text.is_empty() {
            if self.show_output {
                self.part.say(&format!("    {text}"));
            } else {
                self.text.push_back(text.to_owned());
                if self.text.len() > OUTPUT_LINES_SHOWN {
                    self.text.pop_front();
                }
            }
        }
        match event {
            None => {}
            Some(Event::Planned { tests }) => {
                self.part.say(&format!("running {} tests", tests.len()));
                self.begun = (0, tests.len());
                self.waiting = tests.into();
            }
            Some(Event::Started { name }) => {
                let position = self.waiting.iter().position(|test| test.name == name);
                let Some(test) = position.and_then(|position| self.waiting.remove(position)) else {
                    bail!("the test {name} was started but not planned");
                };
                self.begun.0 += 1;
                self.running = Some((test, Instant::now()));
            }
            Some(Event::Passed { name, seconds }) => self.end(&name, seconds, None),
            Some(Event::Failed { name, seconds, reason }) => self.end(&name, seconds, Some(&reason)),
            Some(Event::Skipped { name, reason }) => {
                self.forget(&name);
                self.part.skip(&name, &reason);
            }
            Some(Event::Finished) => self.finished_at = Some(Instant::now()),
        }
        Ok(())
    }

    /// A test's end; its output is shown if it failed.
    fn end(&mut self, name: &str, seconds: f64, failure: Option<&str>) {
        self.forget(name);
        self.part.end(name, seconds, failure);
        if failure.is_some() {
            for line in &self.text {
                self.part.say(&format!("    | {line}"));
            }
        }
        self.text.clear();
    }

    fn forget(&mut self, name: &str) {
        self.waiting.retain(|test| test.name != name);
        if self.running.as_ref().is_some_and(|(test, _)| test.name == name) {
            self.running = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn feed(events: &[Event]) -> (PartReport, bool) {
        let mut part = PartReport::begin("a part");
        let mut reader = EventReader::new(&mut part, false);
        for event in events {
            reader.read(event.to_line().unwrap().as_bytes()).unwrap();
        }
        let finished = reader.close();
        (part, finished)
    }

    fn planned(names: &[&str]) -> Event {
        let test = |name: &&str| PlannedTest { name: (*name).to_owned(), deadline_seconds: 180 };
        Event::Planned { tests: names.iter().map(test).collect() }
    }

    fn started(name: &str) -> Event {
        Event::Started { name: name.to_owned() }
    }

    fn passed(name: &str) -> Event {
        Event::Passed { name: name.to_owned(), seconds: 1.0 }
    }

    #[test]
    fn a_machine_that_dies_fails_the_running_test_and_those_not_run() {
        let (part, finished) = feed(&[planned(&["a", "b", "c"]), started("a"), passed("a"), started("b")]);
        assert!(!finished);
        assert_eq!(part.passed, 1);
        let names: Vec<&str> = part.failed.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["b", "c"]);
    }

    #[test]
    fn a_finished_process_leaves_no_test_unaccounted_for() {
        let (part, finished) = feed(&[planned(&["a"]), started("a"), passed("a"), Event::Finished]);
        assert!(finished && part.failed.is_empty());
        assert_eq!(part.passed, 1);
    }

    #[test]
    fn a_part_without_a_test_is_a_failure() {
        let mut report = Report::new(Selection::default());
        report.add(PartReport::begin("empty"));
        assert!(!report.close(Duration::ZERO));
    }

    #[test]
    fn a_filter_that_matches_nothing_anywhere_is_a_failure() {
        let filter = Some("no such test".to_owned());
        let mut report = Report::new(Selection { filter, ..Selection::default() });
        report.add(PartReport::begin("empty"));
        assert!(!report.close(Duration::ZERO));
    }

    #[test]
    fn cargos_result_lines_are_counted() {
        let mut part = PartReport::begin("host");
        let line =
            "test result: ok. 12 passed; 0 failed; 3 ignored; 0 measured; 0 filtered out; finished in 0.10s";
        assert!(part.count_cargo_result(line));
        assert!(!part.count_cargo_result("test lab::tests::x ... ok"));
        assert_eq!((part.passed, part.skipped), (12, 3));
        assert!(part.count_cargo_result(line));
        assert_eq!((part.passed, part.skipped), (24, 6));
    }
}
