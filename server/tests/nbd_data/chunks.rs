//! A blocking NBD client that asks for replies in chunks, reads the wire by itself and trusts nothing in it.
//!
//! Independent of the codec under test: bytes are written and read here as the specification has them, and every rule of a
//! reply that can be checked is (magic, cookie, offset, DONE once and last, lengths, data inside the request).

use std::collections::HashMap;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use proto::nbd::transmission::{Command, CommandFlags};
use proto::nbd::{HeaderStyle, TransmissionFlags};

use super::client::ANSWER_LIMIT;

/// The server looks for extents no longer than this, if it has found one.
const LOOK_LIMIT: Duration = Duration::from_millis(50);

/// What a client asks for before GO.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Offer {
    pub(crate) headers: HeaderStyle,
    pub(crate) allocation_context: bool,
}

/// What came back for a request, chunk by chunk.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct ChunkedAnswer {
    /// Bytes of data chunks with their offsets.
    pub(crate) data: Vec<(u64, Vec<u8>)>,
    /// Length and state of each extent.
    pub(crate) extents: Vec<(u64, u64)>,
    /// Error number, words, and offset if there was one.
    pub(crate) error: Option<(u32, String, Option<u64>)>,
}

/// A connection in the transmission phase.
pub(crate) struct ChunkClient {
    pub(crate) stream: TcpStream,
    pub(crate) flags: TransmissionFlags,
    pub(crate) size_bytes: u64,
    /// Of `base:allocation`, if it was selected.
    pub(crate) context_id: u32,
    headers: HeaderStyle,
    next_cookie: u64,
    in_flight: HashMap<u64, InFlight>,
}

/// A request whose reply has not ended.
#[derive(Debug)]
struct InFlight {
    command: Command,
    offset: u64,
    length: u64,
    answer: ChunkedAnswer,
}

/// Sends an option of the handshake.
pub(crate) fn send_option(stream: &mut TcpStream, option: u32, data: &[u8]) {
    let header = [&b"IHAVEOPT"[..], &option.to_be_bytes(), &(data.len() as u32).to_be_bytes(), data];
    stream.write_all(&header.concat()).unwrap();
}

/// Takes one reply to an option: its type and data.
pub(crate) fn receive_option_reply(stream: &mut TcpStream, option: u32) -> (u32, Vec<u8>) {
    let header = take::<20>(stream);
    assert_eq!(header[..8], [0x00, 0x03, 0xe8, 0x89, 0x04, 0x55, 0x65, 0xa9]);
    assert_eq!(be_u32(&header[8..]), option, "a reply to another option");
    let mut data = vec![0; be_u32(&header[16..]) as usize];
    stream.read_exact(&mut data).unwrap();
    (be_u32(&header[12..]), data)
}

/// Connects and exchanges flags.
pub(crate) fn greet(address: SocketAddr, client_flags: u32) -> TcpStream {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_nodelay(true).unwrap();
    stream.set_read_timeout(Some(ANSWER_LIMIT)).unwrap();
    let greeting = take::<18>(&mut stream);
    assert_eq!(&greeting[..16], b"NBDMAGICIHAVEOPT");
    assert_eq!(greeting[16..], [0, 3], "fixed newstyle, no zeroes, nothing else");
    stream.write_all(&client_flags.to_be_bytes()).unwrap();
    stream
}

/// The data of SET_META_CONTEXT and LIST_META_CONTEXT.
pub(crate) fn meta_context_query(export: &str, queries: &[&str]) -> Vec<u8> {
    let string = |text: &str| [&(text.len() as u32).to_be_bytes()[..], text.as_bytes()].concat();
    let count = (queries.len() as u32).to_be_bytes().to_vec();
    let queries = queries.iter().map(|query| string(query));
    [string(export), count].into_iter().chain(queries).collect::<Vec<_>>().concat()
}

fn take<const N: usize>(stream: &mut TcpStream) -> [u8; N] {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes).unwrap();
    bytes
}

fn be_u16(bytes: &[u8]) -> u16 {
    u16::from_be_bytes(bytes[..2].try_into().unwrap())
}

fn be_u32(bytes: &[u8]) -> u32 {
    u32::from_be_bytes(bytes[..4].try_into().unwrap())
}

fn be_u64(bytes: &[u8]) -> u64 {
    u64::from_be_bytes(bytes[..8].try_into().unwrap())
}

impl ChunkClient {
    pub(crate) fn open(address: SocketAddr, export: &str, offer: Offer) -> Self {
        Self::open_after_selecting(address, export, export, offer)
    }

    /// Opens one export after having selected the context for maybe another.
    pub(crate) fn open_after_selecting(
        address: SocketAddr,
        selected: &str,
        export: &str,
        offer: Offer,
    ) -> Self {
        let mut stream = greet(address, 3);
        let headers = match offer.headers {
            HeaderStyle::Simple => None,
            HeaderStyle::Structured => Some(8),
            HeaderStyle::Extended => Some(11),
        };
        if let Some(option) = headers {
            send_option(&mut stream, option, &[]);
            assert_eq!(receive_option_reply(&mut stream, option), (1, vec![]));
        }
        let mut context_id = 0;
        if offer.allocation_context {
            send_option(&mut stream, 10, &meta_context_query(selected, &["base:allocation"]));
            let (kind, data) = receive_option_reply(&mut stream, 10);
            assert_eq!((kind, &data[4..]), (4, &b"base:allocation"[..]));
            context_id = be_u32(&data);
            assert_eq!(receive_option_reply(&mut stream, 10), (1, vec![]));
        }
        let go = [&(export.len() as u32).to_be_bytes()[..], export.as_bytes(), &[0, 1, 0, 3]].concat();
        send_option(&mut stream, 7, &go);
        let mut told = None;
        loop {
            match receive_option_reply(&mut stream, 7) {
                (1, data) => {
                    assert!(data.is_empty());
                    break;
                }
                (3, data) if be_u16(&data) == 0 => {
                    assert_eq!(data.len(), 12);
                    told = Some((be_u64(&data[2..]), TransmissionFlags(be_u16(&data[10..]))));
                }
                (3, _) => {}
                other => panic!("GO was answered with {other:?}"),
            }
        }
        let (size_bytes, flags) = told.expect("GO told the size");
        Self {
            stream,
            flags,
            size_bytes,
            context_id,
            headers: offer.headers,
            next_cookie: 0x0102_0304_0506_0708,
            in_flight: HashMap::new(),
        }
    }

    /// Sends a request as it is; gives its cookie. `length` is what the header says.
    pub(crate) fn send(
        &mut self,
        command: Command,
        flags: CommandFlags,
        offset: u64,
        length: u64,
        payload: &[u8],
    ) -> u64 {
        self.next_cookie += 1;
        let mut header = match self.headers {
            HeaderStyle::Extended => vec![0x21, 0xe4, 0x1c, 0x71],
            _ => vec![0x25, 0x60, 0x95, 0x13],
        };
        header.extend(flags.0.to_be_bytes());
        header.extend(command.to_wire().to_be_bytes());
        header.extend(self.next_cookie.to_be_bytes());
        header.extend(offset.to_be_bytes());
        match self.headers {
            HeaderStyle::Extended => header.extend(length.to_be_bytes()),
            _ => header.extend(u32::try_from(length).unwrap().to_be_bytes()),
        }
        header.extend(payload);
        self.stream.write_all(&header).unwrap();
        let answer = ChunkedAnswer::default();
        self.in_flight.insert(self.next_cookie, InFlight { command, offset, length, answer });
        self.next_cookie
    }

    /// Takes chunks until the reply to a request is whole; gives its cookie too.
    pub(crate) fn receive(&mut self) -> (u64, ChunkedAnswer) {
        loop {
            let magic = take::<4>(&mut self.stream);
            if magic == [0x67, 0x44, 0x66, 0x98] {
                return self.receive_simple();
            }
            let rest = take::<16>(&mut self.stream);
            let (flags, kind, cookie) = (be_u16(&rest), be_u16(&rest[2..]), be_u64(&rest[4..]));
            assert_eq!(flags & !1, 0, "unknown reply flags");
            let mut request = self.in_flight.remove(&cookie).expect("a reply to nothing");
            let payload_bytes = if self.headers == HeaderStyle::Extended {
                assert_eq!(magic, [0x6e, 0x8a, 0x27, 0x8c]);
                let more = take::<12>(&mut self.stream);
                let offset = u64::from(be_u32(&rest[12..])) << 32 | u64::from(be_u32(&more));
                assert_eq!(offset, request.offset, "the offset is the request's");
                be_u64(&more[4..])
            } else {
                assert_eq!(magic, [0x66, 0x8e, 0x33, 0xef]);
                u64::from(be_u32(&rest[12..]))
            };
            assert!(payload_bytes <= (32 << 20) + 8, "a chunk of {payload_bytes} bytes");
            let mut payload = vec![0; payload_bytes as usize];
            self.stream.read_exact(&mut payload).unwrap();
            self.take_chunk(kind, &payload, &mut request);
            if flags & 1 == 1 {
                return (cookie, request.answer);
            }
            assert_ne!(kind, 0, "NONE without DONE");
            self.in_flight.insert(cookie, request);
        }
    }

    fn receive_simple(&mut self) -> (u64, ChunkedAnswer) {
        assert_ne!(self.headers, HeaderStyle::Extended, "a simple reply with extended headers");
        let rest = take::<12>(&mut self.stream);
        let (error, cookie) = (be_u32(&rest), be_u64(&rest[4..]));
        let mut request = self.in_flight.remove(&cookie).expect("a reply to nothing");
        assert!(!matches!(request.command, Command::Read | Command::BlockStatus), "{request:?}");
        assert_eq!(error, 0, "errors come in chunks, with words");
        request.answer.error = None;
        (cookie, request.answer)
    }

    fn take_chunk(&self, kind: u16, payload: &[u8], request: &mut InFlight) {
        let InFlight { offset, length, answer, .. } = request;
        let (offset, length) = (*offset, *length);
        match kind {
            0 => assert!(payload.is_empty()),
            1 => {
                assert!(payload.len() >= 9, "an empty data chunk");
                let (at, data) = (be_u64(payload), &payload[8..]);
                assert!(
                    at >= offset && at + data.len() as u64 <= offset + length,
                    "data outside the request"
                );
                answer.data.push((at, data.to_vec()));
            }
            5 | 6 => {
                assert!(answer.extents.is_empty(), "one status chunk for each context");
                answer.extents = self.extents_of(kind, payload);
            }
            0x8001 | 0x8002 => {
                let words_bytes = usize::from(be_u16(&payload[4..]));
                let tail_bytes = if kind == 0x8002 { 8 } else { 0 };
                assert_eq!(payload.len(), 6 + words_bytes + tail_bytes);
                let words = String::from_utf8(payload[6..6 + words_bytes].to_vec()).unwrap();
                let at = (kind == 0x8002).then(|| be_u64(&payload[6 + words_bytes..]));
                assert!(at.is_none_or(|at| at >= offset && at < offset + length), "an offset outside");
                assert_ne!(be_u32(payload), 0);
                assert!(answer.error.is_none(), "two errors");
                answer.error = Some((be_u32(payload), words, at));
            }
            other => panic!("a chunk of type {other:#x}"),
        }
    }

    fn extents_of(&self, kind: u16, payload: &[u8]) -> Vec<(u64, u64)> {
        let is_extended = kind == 6;
        assert_eq!(is_extended, self.headers == HeaderStyle::Extended);
        assert_eq!(be_u32(payload), self.context_id);
        let (head, entry) = if is_extended { (8, 16) } else { (4, 8) };
        assert!(payload.len() > head && (payload.len() - head).is_multiple_of(entry));
        if is_extended {
            assert_eq!(be_u32(&payload[4..]) as usize, (payload.len() - head) / entry);
        }
        let extents = payload[head..].chunks_exact(entry).map(|entry| match entry.len() {
            16 => (be_u64(entry), be_u64(&entry[8..])),
            _ => (u64::from(be_u32(entry)), u64::from(be_u32(&entry[4..]))),
        });
        let extents: Vec<_> = extents.collect();
        assert!(extents.iter().all(|(length, _)| *length > 0));
        extents
    }

    /// One request and its reply: what it brought, or the error number.
    pub(crate) fn call(
        &mut self,
        command: Command,
        flags: CommandFlags,
        offset: u64,
        length: u64,
        payload: &[u8],
    ) -> Result<ChunkedAnswer, u32> {
        let cookie = self.send(command, flags, offset, length, payload);
        let (answered, answer) = self.receive();
        assert_eq!(answered, cookie);
        match answer.error {
            None => Ok(answer),
            Some((error, _, _)) => Err(error),
        }
    }

    pub(crate) fn read(&mut self, offset: u64, length: u64) -> Result<Vec<u8>, u32> {
        let answer = self.call(Command::Read, CommandFlags::NONE, offset, length, &[])?;
        let mut at = offset;
        let mut all = Vec::new();
        for (start, data) in answer.data {
            assert_eq!(start, at, "chunks in order and without gaps");
            at += data.len() as u64;
            all.extend(data);
        }
        assert_eq!(all.len() as u64, length);
        Ok(all)
    }

    pub(crate) fn write(&mut self, offset: u64, data: &[u8]) -> Result<(), u32> {
        let flags = match self.headers {
            HeaderStyle::Extended => CommandFlags::PAYLOAD_LEN,
            _ => CommandFlags::NONE,
        };
        self.call(Command::Write, flags, offset, data.len() as u64, data).map(drop)
    }

    /// BLOCK_STATUS: length and state of each extent. An answer in part, which a server that has looked for long enough may
    /// give, is followed by a question for the rest.
    pub(crate) fn extents(
        &mut self,
        flags: CommandFlags,
        offset: u64,
        length: u64,
    ) -> Result<Vec<(u64, u64)>, u32> {
        let asked_at = Instant::now();
        let mut extents = self.call(Command::BlockStatus, flags, offset, length, &[])?.extents;
        let told: u64 = extents.iter().map(|(length, _)| length).sum();
        assert!(told > 0 && told <= length, "{extents:?}");
        if flags.contains(CommandFlags::REQ_ONE) {
            assert_eq!(extents.len(), 1);
        } else if told < length {
            let looked_for = asked_at.elapsed();
            assert!(looked_for >= LOOK_LIMIT, "{extents:?} after {looked_for:?}");
            extents.extend(self.extents(flags, offset + told, length - told)?);
        }
        Ok(extents)
    }

    /// BLOCK_STATUS with a payload.
    pub(crate) fn extents_by(
        &mut self,
        flags: CommandFlags,
        offset: u64,
        payload: &[u8],
    ) -> Result<Vec<(u64, u64)>, u32> {
        self.call(Command::BlockStatus, flags, offset, payload.len() as u64, payload)
            .map(|found| found.extents)
    }

    /// Whether the server has closed the connection; waits for it.
    pub(crate) fn is_closed_by_server(&mut self) -> bool {
        is_closed(&mut self.stream)
    }
}

/// Whether the peer has closed the connection without another word; waits for it.
pub(crate) fn is_closed(stream: &mut TcpStream) -> bool {
    match stream.read(&mut [0; 64]) {
        Ok(bytes) => bytes == 0,
        Err(error) => error.kind() == std::io::ErrorKind::ConnectionReset,
    }
}
