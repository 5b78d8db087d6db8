//! What must hold of the parsers that face the network, whatever the peer sends.
//!
//! Each function takes what a fuzzer, or a file of a corpus, makes of a peer's bytes, and panics where a promise is
//! broken. They look for more than a crash:
//! - [`server_handshake`], [`client_handshake`]: the outcome does not depend on how TCP cuts the stream; nothing is asked
//!   or told before TLS where TLS is wanted.
//! - [`server_requests`]: a request reaches the volume only if it lies inside the export, is aligned and allowed; every
//!   request gets one reply.
//! - [`client_replies`]: a block request ends once, as the server told, and a READ with the bytes that came for it, whatever else the
//!   server says on whichever connection, and however often these are lost; who breaks the protocol is left.
//!
//! No sockets, no clock: the state machines of `proto`, `server` and `client` are driven directly. `cargo lab fuzz` runs
//! libFuzzer over the programs in `targets/`; the corpora in `corpus/` are replayed by the tests below.

mod client_handshake;
mod client_replies;
mod queue_io;
mod server_handshake;
mod server_requests;

pub use client_handshake::client_handshake;
pub use client_replies::client_replies;
pub use server_handshake::server_handshake;
pub use server_requests::server_requests;

use proto::nbd::{BlockSizes, ExportInfo, TransmissionFlags};

/// The only export there is.
const EXPORT_NAME: &str = "vol";

/// A disk of 1 MiB that can do everything, in blocks of 512 bytes and payloads of up to 64 KiB.
fn export() -> ExportInfo {
    let flags = [
        TransmissionFlags::SEND_FLUSH,
        TransmissionFlags::SEND_FUA,
        TransmissionFlags::SEND_TRIM,
        TransmissionFlags::SEND_WRITE_ZEROES,
        TransmissionFlags::SEND_CACHE,
        TransmissionFlags::SEND_FAST_ZERO,
        TransmissionFlags::CAN_MULTI_CONN,
    ];
    ExportInfo {
        size_bytes: 1 << 20,
        flags: flags.into_iter().fold(TransmissionFlags::HAS_FLAGS, TransmissionFlags::with),
        block_sizes: Some(BlockSizes { minimum_bytes: 512, preferred_bytes: 4096, maximum_bytes: 64 << 10 }),
        description: Some("a volume".to_owned()),
    }
}

/// Takes the first byte: what the rest is about. The rest of nothing is nothing.
fn split_first(bytes: &[u8]) -> (u8, &[u8]) {
    bytes.split_first().map_or((0, &[][..]), |(first, rest)| (*first, rest))
}

/// The stream in pieces, as TCP may cut it: of 1 to 16 bytes for the low four bits of `cut`, in one where they are 0.
fn pieces(stream: &[u8], cut: u8) -> impl Iterator<Item = &[u8]> {
    let piece_bytes = if cut & 15 == 0 { stream.len().max(1) } else { usize::from(cut & 15) };
    stream.chunks(piece_bytes)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    fn replay(target: &str, run: fn(&[u8])) {
        let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target);
        let mut count = 0;
        for entry in std::fs::read_dir(&directory).unwrap() {
            let path = entry.unwrap().path();
            // Shown when it fails: the last one is the one that did.
            println!("{}", path.display());
            run(&std::fs::read(&path).unwrap());
            count += 1;
        }
        assert!(count > 10, "{} holds only {count} files", directory.display());
    }

    #[test]
    fn the_corpus_of_server_handshake_holds() {
        replay("server_handshake", super::server_handshake);
    }

    #[test]
    fn the_corpus_of_server_requests_holds() {
        replay("server_requests", super::server_requests);
    }

    #[test]
    fn the_corpus_of_client_handshake_holds() {
        replay("client_handshake", super::client_handshake);
    }

    #[test]
    fn the_corpus_of_client_replies_holds() {
        replay("client_replies", super::client_replies);
    }

    /// More than a corpus has, of the target with the most states: always the same.
    #[test]
    fn a_queue_holds_whatever_a_server_sends() {
        let mut state = 1u64;
        let mut next = || {
            // Knuth's MMIX generator; the low bits are poor.
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 56) as u8
        };
        for _ in 0..20_000 {
            let mut input = vec![next()];
            for _ in 0..60 {
                let (which, argument) = (next(), next());
                input.extend(match which % 16 {
                    0..=4 => [[0, 8, 16][usize::from(which / 16) % 3], argument],
                    5..=8 => [[2, 130][usize::from(which / 16) % 2], argument],
                    // As many bytes as a READ has.
                    9..=11 => [5, argument - argument % 13 + if argument < 247 { 11 } else { 0 }],
                    12 => [[3, 131][usize::from(which / 16) % 2], argument],
                    // A connection breaks, they come back, time passes.
                    13 | 14 => [5, argument - argument % 13],
                    _ => [next(), argument],
                });
            }
            super::client_replies(&input);
        }
    }
}
