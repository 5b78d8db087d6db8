//! The audit log: who called what of the management API, from where, and how that ended; a line of JSON for each call, but for
//! heartbeats that are heard (`audited.rs`).
//!
//! Owns: the lines, and the thread that appends them to the file. Never: looks at what a call does, or tells a secret: of a request a
//! line has the names that say what it is about, and of its answer the status.
//! A disk that hangs or is full keeps no call waiting: lines that cannot be kept are counted, and the next line that can be says how
//! many. The file is opened anew at SIGHUP, as logrotate wants it.
//! Called by: `audited.rs` (each call), `serve.rs` (opens and ends it).

use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::time::{Duration, Instant, SystemTime};

use serde_json::{Map, Value, json};
use tonic::{Code, Extensions, Status};

use super::listener::ApiPeer;

/// Lines that wait for the disk.
const WAITING_MAX: usize = 4096;
/// So long the end of the server waits for lines that are not in the file.
const END_LIMIT: Duration = Duration::from_secs(1);
/// Who may read it: the server's user, and its group.
const FILE_MODE: u32 = 0o640;

enum Message {
    Line(String),
    Reopen,
    End(SyncSender<()>),
}

/// Where the lines go; clones are of the same file.
#[derive(Debug, Clone)]
pub struct AuditLog {
    messages: SyncSender<Message>,
    lost: Arc<AtomicU64>,
}

impl AuditLog {
    /// Appends to the file, which is made if missing.
    ///
    /// # Errors
    /// It cannot be opened, or no thread be started.
    pub fn open(path: &Path) -> io::Result<Self> {
        let (messages, received) = mpsc::sync_channel(WAITING_MAX);
        let lost = Arc::new(AtomicU64::new(0));
        let writer =
            Writer { file: open(path)?, path: path.to_owned(), lost: Arc::clone(&lost), is_failing: false };
        std::thread::Builder::new().name("audit".into()).spawn(move || writer.run(&received))?;
        Ok(Self { messages, lost })
    }

    /// Goes on in the file that has the path now.
    pub fn reopen(&self) {
        // A thread that is behind by so much is told at the next SIGHUP.
        let _ = self.messages.try_send(Message::Reopen);
    }

    /// Waits a moment until what was told is in the file. Blocks.
    pub fn finish(&self) {
        let (done, ended) = mpsc::sync_channel(1);
        if self.messages.try_send(Message::End(done)).is_ok() {
            // What a disk that hangs does not take is lost.
            let _ = ended.recv_timeout(END_LIMIT);
        }
    }

    fn add(&self, line: String) {
        if self.messages.try_send(Message::Line(line)).is_err() {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
    }
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().create(true).append(true).mode(FILE_MODE).open(path)
}

struct Writer {
    file: File,
    path: PathBuf,
    lost: Arc<AtomicU64>,
    is_failing: bool,
}

impl Writer {
    fn run(mut self, received: &Receiver<Message>) {
        for message in received {
            match message {
                Message::Line(line) => self.write(&line),
                Message::Reopen => match open(&self.path) {
                    Ok(file) => self.file = file,
                    Err(error) => {
                        tracing::error!(%error, path = %self.path.display(), "cannot reopen the audit log: still writing to the former file");
                    }
                },
                Message::End(done) => {
                    // Who waited may have gone.
                    let _ = done.try_send(());
                }
            }
        }
    }

    fn write(&mut self, line: &str) {
        let lost = self.lost.swap(0, Ordering::Relaxed);
        let text = if lost == 0 {
            format!("{line}\n")
        } else {
            // What a full disk took of the last one is left as a line of its own, which is no JSON.
            format!("\n{}\n{line}\n", json!({ "time": now(), "lost_lines": lost }))
        };
        match self.file.write_all(text.as_bytes()) {
            Ok(()) => self.is_failing = false,
            Err(error) => {
                self.lost.fetch_add(lost + 1, Ordering::Relaxed);
                if !std::mem::replace(&mut self.is_failing, true) {
                    tracing::error!(%error, path = %self.path.display(), "cannot write the audit log: calls are answered without a record");
                }
            }
        }
    }
}

fn now() -> String {
    prost_types::Timestamp::from(SystemTime::now()).to_string()
}

/// One call, from its beginning to its end. One that is dropped before was given up by its caller.
pub(super) struct Entry {
    log: Option<AuditLog>,
    line: Map<String, Value>,
    began: Instant,
}

impl Entry {
    /// A call that begins; `subject` are the names of what it is about, by the names of their fields.
    pub(super) fn begin<const N: usize>(
        log: Option<&AuditLog>,
        call: &str,
        extensions: &Extensions,
        subject: impl FnOnce() -> [(&'static str, Value); N],
    ) -> Self {
        let Some(log) = log else {
            return Self { log: None, line: Map::new(), began: Instant::now() };
        };
        let mut line = Map::new();
        line.insert("time".to_owned(), now().into());
        line.insert("call".to_owned(), call.into());
        match extensions.get::<ApiPeer>() {
            Some(peer) => {
                line.insert("caller".to_owned(), peer.identity.caller.clone());
                line.insert("from".to_owned(), peer.identity.from.clone().into());
                let tenants = peer.rights.tenants();
                if !tenants.is_empty() {
                    line.insert("tenants".to_owned(), tenants.into_iter().collect());
                }
            }
            None => {
                line.insert("caller".to_owned(), Value::Null);
            }
        }
        let told = subject().into_iter().filter(|(_, value)| !is_empty(value));
        line.extend(told.map(|(name, value)| (name.to_owned(), value)));
        Self { log: Some(log.clone()), line, began: Instant::now() }
    }

    /// How the call ended.
    pub(super) fn end(mut self, outcome: Result<(), &Status>) {
        match outcome {
            Ok(()) => self.write(Code::Ok, ""),
            Err(status) => self.write(status.code(), status.message()),
        }
    }

    /// The call ended well, and is of a kind that has no line then.
    pub(super) fn leave_out(mut self) {
        self.log = None;
    }

    fn write(&mut self, code: Code, message: &str) {
        let Some(log) = self.log.take() else { return };
        self.line.insert("code".to_owned(), code_name(code).into());
        if !message.is_empty() {
            self.line.insert("message".to_owned(), message.into());
        }
        self.line.insert("duration_ms".to_owned(), (self.began.elapsed().as_millis() as u64).into());
        log.add(Value::Object(std::mem::take(&mut self.line)).to_string());
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.write(Code::Cancelled, "the caller hung up; what had begun is finished all the same");
    }
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::String(text) => text.is_empty(),
        Value::Array(values) => values.is_empty(),
        Value::Number(number) => number.as_u64() == Some(0),
        _ => false,
    }
}

/// As gRPC's own documents spell it.
fn code_name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(path: &Path) -> Vec<Value> {
        std::fs::read_to_string(path)
            .unwrap()
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    }

    fn call(log: &AuditLog, name: &str) -> Entry {
        Entry::begin(Some(log), "CreateVolume", &Extensions::new(), || {
            [("name", name.into()), ("size", 0.into())]
        })
    }

    #[test]
    fn a_call_has_one_line_however_it_ends() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("audit.jsonl");
        let log = AuditLog::open(&path).unwrap();
        call(&log, "a").end(Ok(()));
        call(&log, "line\nbreak").end(Err(&Status::not_found("none")));
        drop(call(&log, "c"));
        call(&log, "d").leave_out();
        log.finish();
        let lines = lines(&path);
        let told: Vec<_> = lines.iter().map(|line| (line["name"].as_str(), line["code"].as_str())).collect();
        assert_eq!(
            told,
            [
                (Some("a"), Some("OK")),
                (Some("line\nbreak"), Some("NOT_FOUND")),
                (Some("c"), Some("CANCELLED"))
            ]
        );
        assert_eq!((lines[1]["message"].as_str(), lines[0].get("size")), (Some("none"), None));
        drop(Entry::begin(None, "CreateVolume", &Extensions::new(), || -> [_; 0] { unreachable!() }));
    }

    #[test]
    fn what_was_moved_away_is_left_and_a_new_file_begun() {
        let dir = tempfile::tempdir().unwrap();
        let (path, old) = (dir.path().join("audit.jsonl"), dir.path().join("audit.jsonl.1"));
        let log = AuditLog::open(&path).unwrap();
        call(&log, "a").end(Ok(()));
        log.finish();
        std::fs::rename(&path, &old).unwrap();
        log.reopen();
        call(&log, "b").end(Ok(()));
        log.finish();
        assert_eq!((lines(&old).len(), lines(&path).len()), (1, 1));
    }

    #[test]
    fn lines_that_are_lost_are_counted_in_the_next_that_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("audit.jsonl");
        let (lost, full) =
            (Arc::new(AtomicU64::new(0)), OpenOptions::new().write(true).open("/dev/full").unwrap());
        let mut writer =
            Writer { file: full, path: path.clone(), lost: Arc::clone(&lost), is_failing: false };
        writer.write("{}");
        writer.write("{}");
        assert_eq!(lost.load(Ordering::Relaxed), 2);
        writer.file = open(&path).unwrap();
        writer.write("{}");
        let text = std::fs::read_to_string(&path).unwrap();
        let lines: Vec<&str> = text.lines().filter(|line| !line.is_empty()).collect();
        assert_eq!((lines.len(), lines[1]), (2, "{}"));
        assert!(lines[0].contains("\"lost_lines\":2"), "{text}");
        assert_eq!(lost.load(Ordering::Relaxed), 0);
    }
}
