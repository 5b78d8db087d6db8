//! How a VM test process tells the lab what it does: one line of JSON per event, on the test's own output.
//!
//! The lines are marked with the ASCII record separator (as RFC 7464 JSON text sequences are), so they stay in
//! order with whatever the tests print and can be told from it. The harness writes them, `lab`'s report
//! reads them. The plan comes first, so a machine that dies leaves no test unaccounted for: what was
//! planned and has no result did not pass.

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

/// ASCII record separator: the byte before every event.
pub const EVENT_MARK: char = '\u{1e}';

/// A test that is going to be run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PlannedTest {
    /// `module::behaviour`.
    pub name: String,
    /// Seconds after which the test counts as hung.
    pub deadline_seconds: u64,
}

/// What a test process reports.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// The first event: every test that will be run, in order.
    Planned {
        /// The tests.
        tests: Vec<PlannedTest>,
    },
    /// A test begins.
    Started {
        /// Its name.
        name: String,
    },
    /// A test ended as it should.
    Passed {
        /// Its name.
        name: String,
        /// How long it ran, by the clock of the machine it ran on.
        seconds: f64,
    },
    /// A test failed, panicked, hung, or could not be run because another hung.
    Failed {
        /// Its name.
        name: String,
        /// How long it ran.
        seconds: f64,
        /// The error with its causes.
        reason: String,
    },
    /// A test was not run because this machine lacks something nobody promised.
    Skipped {
        /// Its name.
        name: String,
        /// What is lacking.
        reason: String,
    },
    /// The last event: every planned test has its result.
    Finished,
}

impl Event {
    /// The event as a line to print, newline included.
    ///
    /// # Errors
    /// A number that JSON cannot express (a time that is not finite).
    pub fn to_line(&self) -> Result<String> {
        let json = serde_json::to_string(self).context("writing a test event as JSON")?;
        Ok(format!("{EVENT_MARK}{json}\n"))
    }

    /// Splits an output line into the text before the mark and the event after it, if there is one.
    ///
    /// # Errors
    /// Text after a mark that is not an event: the test process is of another build than this lab.
    pub fn parse_line(line: &str) -> Result<(&str, Option<Event>)> {
        let Some((text, json)) = line.split_once(EVENT_MARK) else { return Ok((line, None)) };
        let event = serde_json::from_str(json).with_context(|| format!("not a test event: {json}"))?;
        Ok((text, Some(event)))
    }
}

#[cfg(test)]
mod tests {
    use super::{Event, PlannedTest};

    #[test]
    fn an_event_survives_the_line_it_is_written_as() {
        let planned =
            Event::Planned { tests: vec![PlannedTest { name: "a::b".to_owned(), deadline_seconds: 180 }] };
        let failed = Event::Failed { name: "a::b".to_owned(), seconds: 1.5, reason: "two\nlines".to_owned() };
        for event in [planned, failed, Event::Finished] {
            let line = event.to_line().unwrap();
            assert_eq!(line.matches('\n').count(), 1, "one line per event: {line:?}");
            assert_eq!(Event::parse_line(line.trim_end()).unwrap(), ("", Some(event)));
        }
    }

    #[test]
    fn output_without_a_newline_before_an_event_is_kept() {
        let line = format!("progress 50%{}", Event::Finished.to_line().unwrap());
        assert_eq!(Event::parse_line(line.trim_end()).unwrap(), ("progress 50%", Some(Event::Finished)));
    }

    #[test]
    fn a_mark_with_anything_else_after_it_is_an_error() {
        assert!(Event::parse_line("\u{1e}{\"event\":\"danced\"}").is_err());
    }
}
