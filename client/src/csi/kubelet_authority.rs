//! Lets kubelet call us at the socket in `plugins_registry`, whose path it sends as `:authority`.
//!
//! kubelet 1.37 dials that socket by its bare path (`pluginmanager/operationexecutor/operation_generator.go`), and grpc-go makes
//! `%2Fvar%2Flib%2F…` of it. That is no authority of a URI, and our HTTP/2 refuses the whole stream (PROTOCOL_ERROR). At the
//! plugin's own socket kubelet says `localhost`, and so do the sidecars.
//!
//! Owns: the bytes that come from kubelet, in which each `:authority` becomes `localhost`; nothing else is changed. No Huffman code is
//! read for that, and no table kept: a value is replaced where it stands, so both ends count the same entries. Source: RFC 9113
//! section 4.1, RFC 7541 sections 5 and 6. Called by `serve`.

use std::io;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, copy, duplex, split};
use tokio::net::UnixStream;

/// What a client sends first (RFC 9113 section 3.4).
const PREFACE_BYTES: usize = 24;
const FRAME_HEADER_BYTES: usize = 9;
/// Larger frames are not sent to whoever has not asked for them.
const FRAME_BYTES_MAX: usize = 16 << 10;
/// A type of frame, and flags of it.
const HEADERS: u8 = 1;
const END_HEADERS: u8 = 0x4;
const PADDED: u8 = 0x8;
const PRIORITY: u8 = 0x20;
const PRIORITY_BYTES: usize = 5;
/// `:authority` in HPACK's static table.
const AUTHORITY: usize = 1;
/// What it becomes: a string of nine bytes that are no Huffman code.
const LOCALHOST: &[u8] = b"\x09localhost";
/// What is on its way in one direction.
const BUFFER_BYTES: usize = 64 << 10;

/// A connection with `kubelet` at its other end, for a server that knows authorities of URIs alone.
pub(super) fn understood(kubelet: UnixStream) -> DuplexStream {
    let (ours, for_server) = duplex(BUFFER_BYTES);
    tokio::spawn(async move {
        let (mut from_kubelet, mut to_kubelet) = kubelet.into_split();
        let (mut from_server, mut to_server) = split(ours);
        let inwards = async {
            let (mut rewriter, mut buffer, mut out) =
                (Rewriter::default(), vec![0; BUFFER_BYTES], Vec::new());
            loop {
                let read = from_kubelet.read(&mut buffer).await?;
                if read == 0 {
                    return to_server.shutdown().await;
                }
                let is_http = rewriter.push(&buffer[..read], &mut out);
                to_server.write_all(&out).await?;
                out.clear();
                is_http.ok_or(io::ErrorKind::InvalidData)?;
            }
        };
        let outwards = async {
            copy(&mut from_server, &mut to_kubelet).await?;
            to_kubelet.shutdown().await
        };
        if let Err(error) = tokio::try_join!(inwards, outwards) {
            tracing::debug!(%error, "a connection at the registration socket was cut off");
        }
    });
    for_server
}

/// Rewrites what a client sends.
#[derive(Default)]
struct Rewriter {
    /// How much of the preface has gone by.
    preface_bytes: usize,
    /// The beginning of a frame.
    pending: Vec<u8>,
}

impl Rewriter {
    /// Takes bytes, and appends to `out` what can be passed on. `None`: this is nothing that kubelet sends.
    fn push(&mut self, mut bytes: &[u8], out: &mut Vec<u8>) -> Option<()> {
        let preface = bytes.len().min(PREFACE_BYTES - self.preface_bytes);
        out.extend_from_slice(&bytes[..preface]);
        self.preface_bytes += preface;
        bytes = &bytes[preface..];
        self.pending.extend_from_slice(bytes);
        let mut done = 0;
        while let Some(header) = self.pending[done..].first_chunk::<FRAME_HEADER_BYTES>() {
            let length = usize::from(header[0]) << 16 | usize::from(header[1]) << 8 | usize::from(header[2]);
            if length > FRAME_BYTES_MAX {
                return None;
            }
            let end = done + FRAME_HEADER_BYTES + length;
            let Some(payload) = self.pending.get(done + FRAME_HEADER_BYTES..end) else { break };
            if header[3] == HEADERS {
                push_headers(header, payload, out)?;
            } else {
                out.extend_from_slice(&self.pending[done..end]);
            }
            done = end;
        }
        self.pending.drain(..done);
        Some(())
    }
}

/// Appends a frame of headers, with another authority.
fn push_headers(header: &[u8; FRAME_HEADER_BYTES], mut payload: &[u8], out: &mut Vec<u8>) -> Option<()> {
    let flags = header[4];
    // Some ten short fields are less than a frame.
    if flags & END_HEADERS == 0 {
        return None;
    }
    if flags & PADDED != 0 {
        let (padding, rest) = payload.split_first()?;
        payload = rest.get(..rest.len().checked_sub(usize::from(*padding))?)?;
    }
    if flags & PRIORITY != 0 {
        payload = payload.get(PRIORITY_BYTES..)?;
    }
    let block = rewritten(payload)?;
    let length = u32::try_from(block.len()).ok()?.to_be_bytes();
    out.extend_from_slice(&length[1..]);
    out.extend_from_slice(&[HEADERS, flags & !(PADDED | PRIORITY)]);
    out.extend_from_slice(&header[5..]);
    out.extend_from_slice(&block);
    Some(())
}

/// A block of header fields, in which the value of each `:authority` that is spelled out is [`LOCALHOST`].
fn rewritten(block: &[u8]) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(block.len() + LOCALHOST.len());
    let mut at = 0;
    while let Some(first) = block.get(at) {
        let (prefix_bits, has_value) = match first {
            0x80.. => (7, false),
            0x40.. => (6, true),
            0x20.. => (5, false),
            _ => (4, true),
        };
        let (index, mut end) = integer(block, at, prefix_bits)?;
        if !has_value {
            out.extend_from_slice(block.get(at..end)?);
            at = end;
            continue;
        }
        if index == 0 {
            end = after_string(block, end)?;
        }
        let after = after_string(block, end)?;
        if index == AUTHORITY {
            out.extend_from_slice(block.get(at..end)?);
            out.extend_from_slice(LOCALHOST);
        } else {
            out.extend_from_slice(block.get(at..after)?);
        }
        at = after;
    }
    Some(out)
}

/// Where the string that begins at `at` ends.
fn after_string(block: &[u8], at: usize) -> Option<usize> {
    let (length, begin) = integer(block, at, 7)?;
    let end = begin.checked_add(length)?;
    (end <= block.len()).then_some(end)
}

/// An integer with this many bits in its first byte, and where it ends (RFC 7541 section 5.1).
fn integer(block: &[u8], at: usize, prefix_bits: u32) -> Option<(usize, usize)> {
    let mask = (1_usize << prefix_bits) - 1;
    let mut value = usize::from(*block.get(at)?) & mask;
    let mut end = at + 1;
    if value < mask {
        return Some((value, end));
    }
    for shift in [0, 7, 14] {
        let byte = *block.get(end)?;
        end += 1;
        value += usize::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some((value, end));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `:method POST`, `:authority` as kubelet has it, and `te: trailers` with a name that is spelled out.
    fn block(authority: &[u8]) -> Vec<u8> {
        let length = u8::try_from(authority.len()).unwrap();
        let te = b"\x40\x02te\x08trailers";
        [&[0x83, 0x41, length][..], authority, &te[..], &[0xbe]].concat()
    }

    fn frame(kind: u8, flags: u8, payload: &[u8]) -> Vec<u8> {
        let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
        [&length[1..], &[kind, flags, 0, 0, 0, 1], payload].concat()
    }

    #[test]
    fn the_authority_is_replaced_and_nothing_else() {
        assert_eq!(rewritten(&block(b"%2Fvar%2Flib")).unwrap(), block(b"localhost"));
        assert_eq!(rewritten(&block(b"")).unwrap(), block(b"localhost"));
        // Not to be indexed, and with a length that takes two bytes.
        let long = [&[0x01, 0x7f, 0x49][..], &[b'x'; 200]].concat();
        assert_eq!(rewritten(&long).unwrap(), [&[0x01][..], LOCALHOST].concat());
    }

    #[test]
    fn frames_come_through_in_whatever_pieces_they_arrive() {
        let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
        let settings = frame(4, 0, &[0, 3, 0, 0, 0, 100]);
        let data = frame(0, 1, &[0; 5]);
        let stream = |headers: &[u8]| [&preface[..], &settings, headers, &data].concat();
        let plain = stream(&frame(HEADERS, END_HEADERS, &block(b"%2Frun%2Fx")));
        let padded = [&[3][..], &[0; PRIORITY_BYTES], &block(b"%2Frun%2Fx"), &[0; 3]].concat();
        let padded = stream(&frame(HEADERS, END_HEADERS | PADDED | PRIORITY, &padded));
        let expected = stream(&frame(HEADERS, END_HEADERS, &block(b"localhost")));
        for bytes in [plain, padded] {
            for pieces in [1, 2, 7, bytes.len()] {
                let (mut rewriter, mut out) = (Rewriter::default(), Vec::new());
                bytes.chunks(pieces).for_each(|piece| rewriter.push(piece, &mut out).unwrap());
                assert_eq!(out, expected, "{pieces}");
            }
        }
    }

    #[test]
    fn what_is_no_http_is_refused() {
        let preface = [b'x'; PREFACE_BYTES];
        for bytes in [
            frame(HEADERS, 0, &block(b"x")),
            frame(HEADERS, END_HEADERS, &[0x41, 0x7f]),
            frame(HEADERS, END_HEADERS | PADDED, &[9, 0x83]),
            frame(HEADERS, END_HEADERS, &[0x41, 0x7f, 0xff, 0xff, 0xff, 0xff]),
            vec![0xff; FRAME_HEADER_BYTES],
        ] {
            let mut rewriter = Rewriter::default();
            assert!(rewriter.push(&[&preface[..], &bytes].concat(), &mut Vec::new()).is_none(), "{bytes:?}");
        }
    }
}
