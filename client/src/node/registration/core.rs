//! What this node says next to its storage server, and when: a decision without clock and I/O.
//!
//! ```text
//!             Heard                        Heard: in about 10 s, or within a second of a change
//! Register ──────────▶ Heartbeat, at once ──────────────────────────────────────────────────────▶ Heartbeat
//!    ▲                     │ NotKnown, or Heard by another server
//!    └─────────────────────┘
//! Away, Failed: the same again, after 1 s, 2 s, 4 s, 8 s, 10 s, 10 s …   Refused: in a minute   Unsupported: Register, in a minute
//! ```
//! A server that can keeps a heartbeat waiting for something that it asks; what becomes other here meanwhile is told by another call in its
//! place. Where it has waited, the next call follows at once.
//! Times are since any moment, as the caller's clock has them. Each pause is up to a tenth longer or shorter, as the caller draws it:
//! nodes that began together do not go on together. What becomes other is news once. Called by the parent module.

use std::collections::BTreeMap;
use std::time::Duration;

/// Between two heartbeats. A server's users take a node for silent after six of them.
const HEARTBEAT_INTERVAL: Duration = Duration::from_secs(10);
/// Between two heartbeats at least, however often disks change.
const GAP: Duration = Duration::from_secs(1);
/// The answer of a heartbeat that comes later was kept by the server.
const KEPT_MIN: Duration = Duration::from_secs(9);
/// After the first call that did not reach the server, or failed there; doubled from then on, up to [`HEARTBEAT_INTERVAL`].
const FIRST_RETRY: Duration = Duration::from_secs(1);
/// After a refusal: somebody has to issue another certificate first, or to mend the server.
const REFUSED_PAUSE: Duration = Duration::from_secs(60);
/// After an answer of a server that knows no nodes: it has to be upgraded first.
const UNSUPPORTED_PAUSE: Duration = Duration::from_secs(60);
/// A registration that was forgotten sooner is not made again at once: another machine has the same node id, or several servers
/// answer in turn.
const REGISTRATION_MIN: Duration = Duration::from_secs(5);
/// Between two lines about such a thing, of one kind and one server.
const FORGOTTEN_SILENCE: Duration = Duration::from_secs(600);

/// What is said to the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Call {
    /// Who this node is.
    Register,
    /// How it is.
    Heartbeat,
}

/// What came of a call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Answer {
    /// The server of this id heard it; empty where it did not say.
    Heard(String),
    /// The server does not know this node, or this boot of it.
    NotKnown,
    /// The server is older than this call.
    Unsupported,
    /// The server refused, until somebody changes something.
    Refused(Refusal),
    /// The server answered that it cannot now, with these words.
    Failed(String),
    /// The server did not answer, because of this.
    Away(String),
}

/// What is told of a refusal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Refusal {
    /// The server's words.
    pub(super) why: String,
    /// What is to be done, for people; empty: nobody said.
    pub(super) next: String,
}

/// What is to be told in the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum News {
    /// The server knows this node, and hears it.
    Registered,
    /// It did not know it any more; it is registered again.
    Forgotten,
    /// Another server answers; the node is registered there.
    OtherServer,
    /// As the answer.
    Unsupported,
    /// As the answer.
    Refused(Refusal),
    /// The server did not answer, or cannot now.
    Away(String),
}

/// What the log was told last.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Told {
    Nothing,
    Registered,
    Unsupported,
    Refused(Refusal),
    Failed,
    Away,
}

/// How this node stands with its server.
#[derive(Debug)]
pub(super) struct Registration {
    /// Whose it is; `None`: nobody's, as far as is known.
    server_id: Option<String>,
    registered_at: Option<Duration>,
    due: Duration,
    sent_at: Option<Duration>,
    /// Calls in a row that were not heard.
    failures: u32,
    told: Told,
    /// When it was told last that a server (of this id) has forgotten this node, or (true) answers in place of another.
    forgotten_told_at: BTreeMap<(bool, String), Duration>,
}

impl Registration {
    /// Of a daemon that starts: it registers at once.
    pub(super) fn new() -> Self {
        Self {
            server_id: None,
            registered_at: None,
            due: Duration::ZERO,
            sent_at: None,
            failures: 0,
            told: Told::Nothing,
            forgotten_told_at: BTreeMap::new(),
        }
    }

    /// What is to be said next, and when.
    pub(super) fn next(&self) -> (Call, Duration) {
        (if self.server_id.is_some() { Call::Heartbeat } else { Call::Register }, self.due)
    }

    /// The server that knows this node.
    pub(super) fn server_id(&self) -> Option<&str> {
        self.server_id.as_deref()
    }

    /// Whether a change would be told at once, so that it is worth looking for one.
    pub(super) fn is_heard(&self) -> bool {
        self.server_id.is_some() && self.failures == 0
    }

    /// The disks, or what is wrong here, are not as they were told.
    pub(super) fn changed(&mut self, now: Duration) {
        if self.is_heard() {
            let soonest = self.sent_at.map_or(now, |sent_at| now.max(sent_at + GAP));
            self.due = self.due.min(soonest);
        }
    }

    /// So long the server may keep the next heartbeat waiting. `jitter` is drawn from 0 to 1.
    pub(super) fn wait(&self, jitter: f64) -> Duration {
        if self.is_heard() { spread(HEARTBEAT_INTERVAL, jitter) } else { Duration::ZERO }
    }

    /// Whether a change of the disks is to be told in place of a heartbeat that was sent then and is kept waiting.
    pub(super) fn may_replace(&self, sent_at: Duration, now: Duration) -> bool {
        self.is_heard() && now >= sent_at + GAP
    }

    /// The heartbeat that was sent then is not waited for: something is to be told at once.
    pub(super) fn replaced(&mut self, sent_at: Duration, now: Duration) {
        (self.sent_at, self.due) = (Some(sent_at), now);
    }

    /// What the server has asked for has begun, which is told at once.
    pub(super) fn has_begun(&mut self, now: Duration) {
        self.due = now;
    }

    /// The call that [`Self::next`] gave was made at `sent_at`, and answered by `now`. `jitter` is drawn from 0 to 1.
    pub(super) fn answered(
        &mut self,
        call: Call,
        answer: Answer,
        sent_at: Duration,
        now: Duration,
        jitter: f64,
    ) -> Option<News> {
        self.sent_at = Some(sent_at);
        let pause = match &answer {
            Answer::Heard(_) => HEARTBEAT_INTERVAL,
            Answer::Unsupported => UNSUPPORTED_PAUSE,
            Answer::Refused(_) => REFUSED_PAUSE,
            Answer::NotKnown if call == Call::Register => REFUSED_PAUSE,
            Answer::NotKnown => HEARTBEAT_INTERVAL,
            Answer::Failed(_) | Answer::Away(_) => {
                HEARTBEAT_INTERVAL.min(FIRST_RETRY * 2u32.pow(self.failures.min(8)))
            }
        };
        self.due = match &answer {
            // As often, whatever the server has kept it waiting.
            Answer::Heard(_) if now >= sent_at + KEPT_MIN => now,
            Answer::Heard(_) => now.max(sent_at + spread(pause, jitter)),
            _ => now + spread(pause, jitter),
        };
        self.failures = match answer {
            Answer::Heard(_) => 0,
            _ => self.failures.saturating_add(1),
        };
        match (call, answer) {
            (Call::Register, Answer::Heard(server_id)) => {
                // How it is follows at once.
                (self.server_id, self.registered_at, self.due) = (Some(server_id), Some(now), now);
                self.tell(Told::Registered, News::Registered)
            }
            (Call::Heartbeat, Answer::Heard(server_id)) => {
                let is_other = !server_id.is_empty() && self.server_id.as_ref() != Some(&server_id);
                if is_other {
                    self.forgotten(now, (true, server_id), News::OtherServer)
                } else {
                    self.tell(Told::Registered, News::Registered)
                }
            }
            (Call::Heartbeat, Answer::NotKnown) => {
                let by = self.server_id.clone().unwrap_or_default();
                self.forgotten(now, (false, by), News::Forgotten)
            }
            (_, Answer::Unsupported) => {
                self.server_id = None;
                self.tell(Told::Unsupported, News::Unsupported)
            }
            (Call::Register, Answer::NotKnown) => {
                let why = "it does not know the node that registers".to_owned();
                let refusal = Refusal { why, next: String::new() };
                self.tell(Told::Refused(refusal.clone()), News::Refused(refusal))
            }
            (_, Answer::Refused(refusal)) => {
                self.tell(Told::Refused(refusal.clone()), News::Refused(refusal))
            }
            (_, Answer::Failed(words)) => self.tell(Told::Failed, News::Away(words)),
            (_, Answer::Away(cause)) => self.tell(Told::Away, News::Away(cause)),
        }
    }

    /// Registers again: at once, unless that did not help for long the last time.
    fn forgotten(&mut self, now: Duration, what: (bool, String), news: News) -> Option<News> {
        self.server_id = None;
        if self.registered_at.is_none_or(|at| now >= at + REGISTRATION_MIN) {
            self.due = now;
        }
        self.forgotten_told_at.retain(|_, at| now < *at + FORGOTTEN_SILENCE);
        if self.forgotten_told_at.contains_key(&what) {
            return None;
        }
        self.forgotten_told_at.insert(what, now);
        Some(news)
    }

    fn tell(&mut self, told: Told, news: News) -> Option<News> {
        (std::mem::replace(&mut self.told, told.clone()) != told).then_some(news)
    }
}

/// A tenth less to a tenth more.
fn spread(pause: Duration, jitter: f64) -> Duration {
    pause.mul_f64(0.9 + 0.2 * jitter.clamp(0.0, 1.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIDDLE: f64 = 0.5;

    fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn heard(server_id: &str) -> Answer {
        Answer::Heard(server_id.to_owned())
    }

    fn away() -> Answer {
        Answer::Away("refused".to_owned())
    }

    /// Makes the next call when it is due, and has it answered at once; when that was, and what is news.
    fn step(registration: &mut Registration, call: Call, answer: Answer) -> (Duration, Option<News>) {
        let (next, due) = registration.next();
        assert_eq!(next, call);
        (due, registration.answered(call, answer, due, due, MIDDLE))
    }

    /// Registered with `s`, and heard once, at 0.
    fn registered() -> Registration {
        let mut registration = Registration::new();
        let first = step(&mut registration, Call::Register, heard("s"));
        assert_eq!(first, (Duration::ZERO, Some(News::Registered)));
        assert_eq!(step(&mut registration, Call::Heartbeat, heard("s")), (Duration::ZERO, None));
        registration
    }

    #[test]
    fn it_registers_at_once_then_tells_how_it_is_and_goes_on_so() {
        let mut registration = registered();
        for beat in 1..5 {
            assert_eq!(step(&mut registration, Call::Heartbeat, heard("s")), (seconds(10 * beat), None));
        }
        assert_eq!(registration.server_id(), Some("s"));
    }

    #[test]
    fn pauses_are_a_tenth_longer_or_shorter_at_most() {
        for (jitter, pause_ms) in [(0.0, 9_000), (0.5, 10_000), (1.0, 11_000), (7.0, 11_000)] {
            assert_eq!(spread(HEARTBEAT_INTERVAL, jitter), Duration::from_millis(pause_ms), "{jitter}");
        }
    }

    #[test]
    fn a_change_is_told_at_once_and_at_most_once_a_second() {
        let mut registration = registered();
        registration.changed(seconds(5));
        assert_eq!(step(&mut registration, Call::Heartbeat, heard("s")), (seconds(5), None));
        registration.changed(Duration::from_millis(5_400));
        assert_eq!(registration.next(), (Call::Heartbeat, seconds(6)));
        registration.changed(Duration::from_millis(5_800));
        assert_eq!(step(&mut registration, Call::Heartbeat, heard("s")), (seconds(6), None));
        // One that is due sooner is not put off.
        registration.changed(seconds(16));
        assert_eq!(registration.next(), (Call::Heartbeat, seconds(16)));
    }

    #[test]
    fn a_second_counts_from_when_a_call_was_sent() {
        let mut registration = registered();
        let slow = registration.answered(Call::Heartbeat, heard("s"), seconds(10), seconds(13), MIDDLE);
        assert_eq!(slow, None);
        registration.changed(seconds(13));
        assert_eq!(registration.next(), (Call::Heartbeat, seconds(13)));
    }

    #[test]
    fn a_server_that_keeps_a_heartbeat_waiting_has_the_next_at_once() {
        let mut registration = registered();
        assert_eq!(registration.wait(MIDDLE), seconds(10));
        let (sent_at, kept_until) = (seconds(10), seconds(20));
        registration.answered(Call::Heartbeat, heard("s"), sent_at, kept_until, MIDDLE);
        assert_eq!(registration.next(), (Call::Heartbeat, kept_until));
        // One that had something to ask before, and is told at once what has begun.
        registration.answered(Call::Heartbeat, heard("s"), seconds(20), seconds(23), MIDDLE);
        assert_eq!(registration.next(), (Call::Heartbeat, seconds(30)));
        registration.has_begun(seconds(23));
        assert_eq!(registration.next(), (Call::Heartbeat, seconds(23)));
        // What changes meanwhile is told in its place, and not twice in a second.
        assert!(!registration.may_replace(seconds(23), Duration::from_millis(23_900)));
        assert!(registration.may_replace(seconds(23), seconds(24)));
        registration.replaced(seconds(23), seconds(24));
        assert_eq!(registration.next(), (Call::Heartbeat, seconds(24)));
        registration.answered(Call::Heartbeat, away(), seconds(24), seconds(25), MIDDLE);
        assert_eq!(registration.wait(MIDDLE), Duration::ZERO, "whether it is there is to be known soon");
        assert!(!registration.may_replace(seconds(24), seconds(40)));
    }

    #[test]
    fn a_server_that_is_away_is_asked_less_and_less_and_told_once() {
        let mut registration = Registration::new();
        let mut at = Vec::new();
        let mut told = Vec::new();
        for _ in 0..7 {
            let (due, news) = step(&mut registration, Call::Register, away());
            at.push(due.as_secs());
            told.extend(news);
        }
        assert_eq!(at, [0, 1, 3, 7, 15, 25, 35]);
        assert_eq!(told, [News::Away("refused".to_owned())]);
        assert!(!registration.is_heard(), "nobody looks for changes meanwhile");
        assert_eq!(step(&mut registration, Call::Register, heard("s")).1, Some(News::Registered));
        assert_eq!(
            step(&mut registration, Call::Heartbeat, away()).1,
            Some(News::Away("refused".to_owned()))
        );
        // It may know this node still, and is asked soon again, whatever changes.
        let due = registration.next().1;
        registration.changed(Duration::ZERO);
        assert_eq!(registration.next(), (Call::Heartbeat, due));
        assert_eq!(step(&mut registration, Call::Heartbeat, heard("s")), (due, Some(News::Registered)));
    }

    #[test]
    fn a_server_that_cannot_now_is_asked_as_one_that_is_away_and_told_apart_from_it() {
        let mut registration = Registration::new();
        let failed = |words: &str| Answer::Failed(words.to_owned());
        assert!(step(&mut registration, Call::Register, away()).1.is_some());
        assert_eq!(
            step(&mut registration, Call::Register, failed("full")),
            (seconds(1), Some(News::Away("full".to_owned())))
        );
        // Words may have numbers in them that change.
        assert_eq!(step(&mut registration, Call::Register, failed("fuller")), (seconds(3), None));
        assert_eq!(step(&mut registration, Call::Register, failed("full")), (seconds(7), None));
        assert_eq!(step(&mut registration, Call::Register, failed("full")), (seconds(15), None));
        assert_eq!(
            step(&mut registration, Call::Register, heard("s")),
            (seconds(25), Some(News::Registered))
        );
    }

    #[test]
    fn many_failures_are_no_overflow() {
        let mut registration = Registration::new();
        for _ in 0..100 {
            step(&mut registration, Call::Register, away());
        }
        registration.failures = u32::MAX;
        let (due, _) = step(&mut registration, Call::Register, away());
        assert_eq!(registration.next().1, due + seconds(10));
    }

    #[test]
    fn a_server_that_knows_no_nodes_is_told_once_and_asked_each_minute() {
        let mut registration = Registration::new();
        let first = step(&mut registration, Call::Register, Answer::Unsupported);
        assert_eq!(first, (Duration::ZERO, Some(News::Unsupported)));
        assert_eq!(step(&mut registration, Call::Register, Answer::Unsupported), (seconds(60), None));
        // One that was put back to before nodes: whoever comes next has to be told who this is.
        let mut registration = registered();
        let news = step(&mut registration, Call::Heartbeat, Answer::Unsupported);
        assert_eq!(news, (seconds(10), Some(News::Unsupported)));
        assert_eq!(registration.next(), (Call::Register, seconds(70)));
    }

    #[test]
    fn a_refusal_is_told_once_in_its_words_and_asked_again_in_a_minute() {
        let mut registration = Registration::new();
        let refusal = |why: &str| Refusal { why: why.to_owned(), next: "do it".to_owned() };
        let refused = |why: &str| Answer::Refused(refusal(why));
        let told = |why: &str| Some(News::Refused(refusal(why)));
        assert_eq!(step(&mut registration, Call::Register, refused("a")), (Duration::ZERO, told("a")));
        assert_eq!(step(&mut registration, Call::Register, refused("a")), (seconds(60), None));
        assert_eq!(step(&mut registration, Call::Register, refused("b")), (seconds(120), told("b")));
        assert_eq!(
            step(&mut registration, Call::Register, heard("s")),
            (seconds(180), Some(News::Registered))
        );
        let odd =
            Registration::new().answered(Call::Register, Answer::NotKnown, seconds(0), seconds(0), MIDDLE);
        assert!(matches!(odd, Some(News::Refused(_))), "{odd:?}");
    }

    #[test]
    fn who_is_forgotten_registers_at_once() {
        let mut registration = registered();
        assert_eq!(
            step(&mut registration, Call::Heartbeat, Answer::NotKnown),
            (seconds(10), Some(News::Forgotten))
        );
        assert_eq!(step(&mut registration, Call::Register, heard("s")), (seconds(10), None));
        assert_eq!(step(&mut registration, Call::Heartbeat, heard("s")), (seconds(10), None));
        assert_eq!(step(&mut registration, Call::Heartbeat, heard("s")), (seconds(20), None));
    }

    #[test]
    fn another_server_is_registered_with_and_one_that_does_not_say_is_the_same() {
        let mut registration = registered();
        assert_eq!(step(&mut registration, Call::Heartbeat, heard("")), (seconds(10), None));
        assert_eq!(
            step(&mut registration, Call::Heartbeat, heard("t")),
            (seconds(20), Some(News::OtherServer))
        );
        assert_eq!(registration.server_id(), None);
        assert_eq!(step(&mut registration, Call::Register, heard("t")), (seconds(20), None));
        assert_eq!(step(&mut registration, Call::Heartbeat, heard("t")), (seconds(20), None));
    }

    #[test]
    fn each_other_server_is_told_whatever_was_forgotten_before_and_once() {
        let mut registration = registered();
        let mut told = |call, answer| step(&mut registration, call, answer).1;
        assert_eq!(told(Call::Heartbeat, Answer::NotKnown), Some(News::Forgotten));
        assert_eq!(told(Call::Register, heard("s")), None);
        assert_eq!(told(Call::Heartbeat, heard("t")), Some(News::OtherServer));
        assert_eq!(told(Call::Register, heard("t")), None);
        assert_eq!(told(Call::Heartbeat, Answer::NotKnown), Some(News::Forgotten), "by another");
        assert_eq!(told(Call::Register, heard("t")), None);
        assert_eq!(told(Call::Heartbeat, heard("u")), Some(News::OtherServer));
        // Those that answer in turn are told once each.
        for _ in 0..3 {
            assert_eq!(told(Call::Register, heard("u")), None);
            assert_eq!(told(Call::Heartbeat, heard("t")), None);
        }
    }

    #[test]
    fn two_that_take_the_registration_from_each_other_make_no_haste_and_few_lines() {
        let mut registration = registered();
        let (mut calls, mut lines) = (0, 0);
        // The other one registers right after each of ours.
        while registration.next().1 < seconds(600) {
            let (call, _) = registration.next();
            let answer = if call == Call::Register { heard("s") } else { Answer::NotKnown };
            lines += u32::from(step(&mut registration, call, answer).1.is_some());
            calls += 1;
        }
        assert!(calls <= 125, "{calls} calls in ten minutes");
        assert_eq!(lines, 1);
        let mut told = |call, answer| step(&mut registration, call, answer).1;
        assert_eq!(told(Call::Register, heard("s")), None);
        assert_eq!(told(Call::Heartbeat, Answer::NotKnown), None);
        assert_eq!(told(Call::Register, heard("s")), None);
        assert_eq!(told(Call::Heartbeat, Answer::NotKnown), Some(News::Forgotten), "ten minutes later");
    }
}
