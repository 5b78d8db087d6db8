//! The device process's control socket: one line in, one line out, one thread.
//!
//! The thread only reads requests; `attachment.rs` answers them, one at a time, on the process's main thread. The
//! format is `contract/mod.rs`'s.

use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::Duration;

use crate::contract::{CONTRACT_VERSION, ControlCommand, ControlRequest, ControlResponse};

/// Longest request line, in bytes.
const LINE_BYTES_MAX: u64 = 64 << 10;
/// How long a client may take to send its line or to take the answer.
const CLIENT_TIMEOUT: Duration = Duration::from_secs(5);

/// A request that waits for its answer.
#[derive(Debug)]
pub struct PendingRequest {
    /// What is asked.
    pub command: ControlCommand,
    client: UnixStream,
}

impl PendingRequest {
    /// Answers and hangs up. A client that went away is not an error.
    pub fn answer(self, response: &ControlResponse) {
        send(&self.client, response);
    }
}

/// Listens at `path` (replacing what is there) and hands each request to `on_request`, on a thread of its own that lives
/// as long as the process.
///
/// # Errors
/// Those of bind(2) and of starting a thread.
pub fn listen(path: &Path, on_request: impl Fn(PendingRequest) + Send + 'static) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    std::thread::Builder::new().name("control".into()).spawn(move || {
        for client in listener.incoming() {
            match client.and_then(read_request) {
                Ok(request) => on_request(request),
                Err(error) => tracing::warn!(%error, "a control client did not send a request"),
            }
        }
    })?;
    Ok(())
}

fn read_request(client: UnixStream) -> io::Result<PendingRequest> {
    client.set_read_timeout(Some(CLIENT_TIMEOUT))?;
    client.set_write_timeout(Some(CLIENT_TIMEOUT))?;
    let mut line = String::new();
    BufReader::new((&client).take(LINE_BYTES_MAX)).read_line(&mut line)?;
    let refuse = |message: String| {
        send(&client, &ControlResponse::Error { message: message.clone() });
        io::Error::other(message)
    };
    let request: ControlRequest =
        serde_json::from_str(&line).map_err(|error| refuse(format!("not a control request: {error}")))?;
    if request.version > CONTRACT_VERSION {
        let version = request.version;
        return Err(refuse(format!(
            "control version {version} is newer than this device process's {CONTRACT_VERSION}"
        )));
    }
    Ok(PendingRequest { command: request.command, client })
}

fn send(mut client: &UnixStream, response: &ControlResponse) {
    let sent = serde_json::to_vec(response).map_err(io::Error::other).and_then(|mut line| {
        line.push(b'\n');
        client.write_all(&line)
    });
    if let Err(error) = sent {
        tracing::debug!(%error, "a control client went away before its answer");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(path: &Path, line: &str) -> ControlResponse {
        let mut client = UnixStream::connect(path).unwrap();
        client.write_all(line.as_bytes()).unwrap();
        let mut answer = String::new();
        client.read_to_string(&mut answer).unwrap();
        serde_json::from_str(&answer).unwrap()
    }

    #[test]
    fn requests_are_answered_and_nonsense_is_refused() {
        // Not below TMPDIR, which may be too long for a socket's name.
        let dir = tempfile::tempdir_in("/tmp").unwrap();
        let path = dir.path().join("control.sock");
        listen(&path, |request| {
            assert_eq!(request.command, ControlCommand::Stop);
            request.answer(&ControlResponse::Busy { holders: vec!["you".into()] });
        })
        .unwrap();
        let busy = ask(&path, "{\"version\":1,\"command\":\"stop\"}\n");
        assert_eq!(busy, ControlResponse::Busy { holders: vec!["you".into()] });
        for nonsense in ["\n", "{}\n", "{\"version\":2,\"command\":\"stop\"}\n"] {
            assert!(matches!(ask(&path, nonsense), ControlResponse::Error { .. }), "{nonsense}");
        }
    }
}
