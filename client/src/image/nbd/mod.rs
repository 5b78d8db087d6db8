//! An NBD client that copies: one connection with many requests on their way, in a tokio runtime.
//!
//! Owns the socket after `device/connect/dial.rs` has opened the export, with TLS or without. Requests are sent whole, one after the
//! other; a task of its own reads the replies, so that a server that answers before it reads on never stands still. What
//! a reply says is `replies.rs`'s to judge. A connection that broke fails everything that waits, and is not made again: whoever
//! copies begins where the journal ends.

mod replies;

use std::collections::HashMap;
use std::io;
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use proto::nbd::block_status::Extent;
use proto::nbd::handshake::client::ClientNegotiated;
use proto::nbd::replies::{ChunkHead, STRUCTURED_CHUNK_BYTES};
use proto::nbd::transmission::{CommandFlags, SIMPLE_REPLY_BYTES, SimpleReply};
use proto::nbd::{ExportInfo, STRUCTURED_REPLY_MAGIC};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::oneshot;

use self::replies::{Answer, Command, Replies};
use crate::causes::with_sources;
use crate::device::connect::dial::{self, DialError, OPEN_TIMEOUT};
use crate::tls_spec::TlsSpec;

/// A server that says nothing for so long, while it was asked something, is given up. A FLUSH of much may take minutes.
const PATIENCE: Duration = Duration::from_secs(300);

/// How long a server may take to close when it is told to.
const FAREWELL: Duration = Duration::from_secs(5);

/// An export, as it is opened.
#[derive(Debug, Clone)]
pub struct Opening {
    /// `host:port` or `unix:/path`, tried in order.
    pub addresses: Vec<String>,
    /// May hold a secret.
    pub export_name: String,
    /// The metadata context that [`NbdClient::extents`] tells of; `base:allocation`.
    pub context: String,
    /// How TLS is spoken; `None`: it is not.
    pub tls: Option<TlsSpec>,
}

/// A request, or the connection, failed.
#[derive(Debug, Clone, thiserror::Error)]
pub enum NbdClientError {
    /// The server refuses a request; the connection lives.
    #[error("the NBD server cannot {what} at byte {offset_bytes}: {}", told(*errno, words))]
    Refused {
        /// `read`, `write` and so on.
        what: &'static str,
        /// Where.
        offset_bytes: u64,
        /// Linux's, positive.
        errno: i32,
        /// The server's; may be empty.
        words: String,
    },
    /// There is no connection any more.
    #[error("the connection to the NBD server is lost: {0}")]
    Lost(Arc<str>),
}

fn told(errno: i32, words: &str) -> String {
    let reason = io::Error::from_raw_os_error(errno);
    if words.is_empty() { reason.to_string() } else { format!("{words} ({reason})") }
}

/// An open export. Closed when dropped; [`NbdClient::disconnect`] says farewell.
#[derive(Debug)]
pub struct NbdClient {
    /// What the server told of it.
    pub export: ExportInfo,
    negotiated: ClientNegotiated,
    shared: Arc<Shared>,
    /// Held while a request is sent.
    sending: tokio::sync::Mutex<OwnedWriteHalf>,
    reader: tokio::task::JoinHandle<()>,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    /// The same socket, to end it for whoever sends.
    socket: std::os::unix::net::UnixStream,
}

#[derive(Debug)]
struct State {
    replies: Replies,
    waiting: HashMap<u64, oneshot::Sender<Answer>>,
    /// Why there is no connection any more.
    lost: Option<Arc<str>>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Nobody panics while it is held; and if, the state is whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lose(&self, why: &str) {
        let mut state = self.lock();
        state.lost.get_or_insert_with(|| Arc::from(why));
        state.waiting.clear();
        // Whoever sends to a server that reads nothing more ends as well. What is closed already needs no end.
        let _ = self.socket.shutdown(Shutdown::Both);
    }
}

impl NbdClient {
    /// Opens an export: at the first address that gives it.
    ///
    /// # Errors
    /// [`DialError`] of the last address that was tried.
    pub async fn open(opening: Opening) -> Result<Self, DialError> {
        let dialled = tokio::task::spawn_blocking(move || {
            let Opening { addresses, export_name, context, tls } = &opening;
            let mut attempts = dial::attempts_with_context(
                addresses,
                export_name,
                Some(context),
                tls.as_ref(),
                OPEN_TIMEOUT,
            )?;
            let mut failed = None;
            attempts
                .find_map(|attempt| attempt.map_err(|error| failed = Some(error)).ok())
                .ok_or_else(|| failed.unwrap_or_else(|| io_error(io::ErrorKind::AddrNotAvailable.into())))
        });
        let dialled = dialled.await.map_err(|error| io_error(io::Error::other(error)))??;
        let socket = dialled.socket;
        socket.set_nonblocking().map_err(io_error)?;
        // Of whatever family it is: the type stands for a stream socket, and asks for nothing that TCP does not have.
        Self::of(OwnedFd::from(socket).into(), dialled.export, dialled.negotiated).map_err(io_error)
    }

    /// Of a socket that does not block, whose server has opened the export.
    fn of(
        socket: std::os::unix::net::UnixStream,
        export: ExportInfo,
        negotiated: ClientNegotiated,
    ) -> io::Result<Self> {
        let the_same = socket.try_clone()?;
        let (mut receiving, sending) = UnixStream::from_std(socket)?.into_split();
        let state =
            State { replies: Replies::new(negotiated.context_id), waiting: HashMap::new(), lost: None };
        let shared = Arc::new(Shared { state: Mutex::new(state), socket: the_same });
        let reader = tokio::spawn({
            let shared = Arc::clone(&shared);
            async move {
                let error = match read_replies(&mut receiving, &shared).await {
                    Err(error) => error.to_string(),
                    Ok(never) => match never {},
                };
                shared.lose(&error);
            }
        });
        Ok(Self { export, negotiated, shared, sending: tokio::sync::Mutex::new(sending), reader })
    }

    /// Whether [`NbdClient::extents`] can be asked.
    pub fn tells_extents(&self) -> bool {
        self.negotiated.context_id.is_some()
    }

    /// Reads so many bytes, however the server cuts them up.
    ///
    /// # Errors
    /// [`NbdClientError`]
    pub async fn read(&self, offset_bytes: u64, length_bytes: u32) -> Result<Vec<u8>, NbdClientError> {
        let asked = self.ask(Command::Read, CommandFlags::NONE, offset_bytes, u64::from(length_bytes), &[]);
        match asked.await? {
            Answer::Data(data) => Ok(data),
            answer => Err(self.failure("read", offset_bytes, answer)),
        }
    }

    /// Writes bytes, which are durable after the next flush.
    ///
    /// # Errors
    /// [`NbdClientError`]
    pub async fn write(&self, offset_bytes: u64, bytes: &[u8]) -> Result<(), NbdClientError> {
        let length_bytes = bytes.len() as u64;
        let asked = self.ask(Command::Write, CommandFlags::NONE, offset_bytes, length_bytes, bytes);
        self.done("write", offset_bytes, asked.await?)
    }

    /// Makes bytes read as zeroes, with a hole where the server can.
    ///
    /// # Errors
    /// [`NbdClientError`]
    pub async fn write_zeroes(&self, offset_bytes: u64, length_bytes: u32) -> Result<(), NbdClientError> {
        let (command, length_bytes) = (Command::WriteZeroes, u64::from(length_bytes));
        let asked = self.ask(command, CommandFlags::NONE, offset_bytes, length_bytes, &[]);
        self.done("write zeroes", offset_bytes, asked.await?)
    }

    /// Makes durable what was answered before.
    ///
    /// # Errors
    /// [`NbdClientError`]
    pub async fn flush(&self) -> Result<(), NbdClientError> {
        let asked = self.ask(Command::Flush, CommandFlags::NONE, 0, 0, &[]);
        self.done("flush", 0, asked.await?)
    }

    /// What is allocated there: at least one extent, of any length.
    ///
    /// # Errors
    /// [`NbdClientError`]
    pub async fn extents(&self, offset_bytes: u64, length_bytes: u32) -> Result<Vec<Extent>, NbdClientError> {
        let (command, length_bytes) = (Command::BlockStatus, u64::from(length_bytes));
        let asked = self.ask(command, CommandFlags::NONE, offset_bytes, length_bytes, &[]);
        match asked.await? {
            Answer::Extents(extents) => Ok(extents),
            answer => Err(self.failure("tell what is allocated", offset_bytes, answer)),
        }
    }

    /// Says farewell, and waits until the server has closed, so that nothing of this connection is left there.
    pub async fn disconnect(mut self) {
        let request = self.shared.lock().replies.begin(Command::Disconnect, CommandFlags::NONE, 0, 0);
        let farewell = async {
            self.sending.lock().await.write_all(&request.encode()).await?;
            // The reader ends when the server closes.
            (&mut self.reader).await.map_err(io::Error::other)
        };
        // Whatever comes of it: the connection ends.
        let _ = tokio::time::timeout(FAREWELL, farewell).await;
    }

    async fn ask(
        &self,
        command: Command,
        flags: CommandFlags,
        offset_bytes: u64,
        length_bytes: u64,
        payload: &[u8],
    ) -> Result<Answer, NbdClientError> {
        let (sender, receiver) = oneshot::channel();
        let mut sending = self.sending.lock().await;
        let request = {
            let mut state = self.shared.lock();
            if let Some(lost) = &state.lost {
                return Err(NbdClientError::Lost(Arc::clone(lost)));
            }
            let request = state.replies.begin(command, flags, offset_bytes, length_bytes);
            state.waiting.insert(request.cookie, sender);
            request
        };
        let sent = async {
            sending.write_all(&request.encode()).await?;
            sending.write_all(payload).await
        };
        if let Err(error) = sent.await {
            self.shared.lose(&error.to_string());
        }
        drop(sending);
        receiver.await.map_err(|_| self.lost())
    }

    fn done(&self, what: &'static str, offset_bytes: u64, answer: Answer) -> Result<(), NbdClientError> {
        match answer {
            Answer::Done => Ok(()),
            answer => Err(self.failure(what, offset_bytes, answer)),
        }
    }

    fn failure(&self, what: &'static str, offset_bytes: u64, answer: Answer) -> NbdClientError {
        match answer {
            Answer::Error(errno, words) => NbdClientError::Refused { what, offset_bytes, errno, words },
            _ => NbdClientError::Lost(Arc::from("an answer to another question")),
        }
    }

    fn lost(&self) -> NbdClientError {
        let lost = self.shared.lock().lost.clone();
        NbdClientError::Lost(lost.unwrap_or_else(|| Arc::from("it was closed")))
    }
}

impl Drop for NbdClient {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

fn io_error(source: io::Error) -> DialError {
    DialError::Connect { address: "the NBD server".to_owned(), source }
}

/// Why no more replies come.
#[derive(Debug, thiserror::Error)]
enum ReadError {
    #[error("it was closed")]
    Closed,
    #[error("no answer within {} s", PATIENCE.as_secs())]
    Silent,
    #[error("{}", with_sources(.0))]
    Io(io::Error),
    #[error("the server breaks the protocol: {0}")]
    Protocol(String),
}

impl From<&'static str> for ReadError {
    fn from(what: &'static str) -> Self {
        Self::Protocol(what.to_owned())
    }
}

enum Never {}

async fn read_replies(socket: &mut OwnedReadHalf, shared: &Shared) -> Result<Never, ReadError> {
    loop {
        let mut head = [0; STRUCTURED_CHUNK_BYTES];
        let (first, rest) = head.split_at_mut(SIMPLE_REPLY_BYTES);
        read_exact(socket, shared, first).await?;
        let answered = if first[..4] == STRUCTURED_REPLY_MAGIC.to_be_bytes() {
            read_exact(socket, shared, rest).await?;
            let head = ChunkHead::decode(&head).map_err(|error| ReadError::Protocol(error.to_string()))?;
            shared.lock().replies.check_chunk(&head)?;
            let mut payload = vec![0; head.length_bytes as usize];
            read_exact(socket, shared, &mut payload).await?;
            shared.lock().replies.take_chunk(&head, &payload)?
        } else {
            let mut simple = [0; SIMPLE_REPLY_BYTES];
            simple.copy_from_slice(first);
            let reply =
                SimpleReply::decode(&simple).map_err(|error| ReadError::Protocol(error.to_string()))?;
            let payload_bytes = shared.lock().replies.simple_payload_bytes(&reply)?;
            let mut payload = vec![0; payload_bytes];
            read_exact(socket, shared, &mut payload).await?;
            Some(shared.lock().replies.take_simple(&reply, payload)?)
        };
        if let Some((cookie, answer)) = answered
            && let Some(waiting) = shared.lock().waiting.remove(&cookie)
        {
            // Who asked may have given up.
            let _ = waiting.send(answer);
        }
    }
}

/// Fills `into`. While nothing was asked the server may be silent for as long as it likes.
async fn read_exact(
    socket: &mut OwnedReadHalf,
    shared: &Shared,
    mut into: &mut [u8],
) -> Result<(), ReadError> {
    while !into.is_empty() {
        let arrived = match tokio::time::timeout(PATIENCE, socket.read(into)).await {
            Ok(arrived) => arrived.map_err(ReadError::Io)?,
            Err(_) if shared.lock().replies.is_empty() => continue,
            Err(_) => return Err(ReadError::Silent),
        };
        if arrived == 0 {
            return Err(ReadError::Closed);
        }
        into = &mut into[arrived..];
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use proto::nbd::TransmissionFlags;

    use super::*;

    #[tokio::test]
    async fn a_connection_that_is_lost_ends_for_whoever_sends_too() {
        let (ours, mut theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let flags = TransmissionFlags::HAS_FLAGS;
        let export = ExportInfo { size_bytes: 1 << 30, flags, block_sizes: None, description: None };
        let client = NbdClient::of(ours, export, ClientNegotiated::default()).unwrap();
        // More than a socket holds, to a server that reads none of it and talks nonsense.
        let bytes = vec![1; 32 << 20];
        let patience = Duration::from_secs(60);
        let written = async { tokio::join!(client.write(0, &bytes), async { theirs.write_all(&[7; 64]) }) };
        let (written, said) = tokio::time::timeout(patience, written).await.unwrap();
        said.unwrap();
        let error = written.unwrap_err();
        assert!(error.to_string().contains("breaks the protocol"), "{error}");
    }
}
