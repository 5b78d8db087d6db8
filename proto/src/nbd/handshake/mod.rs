//! The fixed newstyle handshake of both sides, as state machines that take bytes and give bytes.
//!
//! [`server::ServerHandshake`] and [`client::ClientHandshake`] never see a socket: their owners feed what arrived, send
//! what was put out, and close when an error comes back. Tests drive one against the other, a byte at a time.

pub mod client;
mod meta_context;
pub mod server;

/// Most bytes of data one option request or reply may carry, here and there; more is an attack or a mistake.
pub const OPTION_BYTES_MAX: usize = 64 << 10;

/// Takes `N` bytes from the front of `input` once they are all there.
fn take<const N: usize>(input: &[u8]) -> Option<[u8; N]> {
    input.get(..N).and_then(|bytes| bytes.try_into().ok())
}

#[cfg(test)]
mod tests {
    use super::super::{BlockSizes, ExportInfo, TransmissionFlags};
    use super::client::{ClientHandshake, ClientHandshakeError};
    use super::server::{Event, Refusal, ServerHandshake};

    fn export() -> ExportInfo {
        ExportInfo {
            size_bytes: 1 << 40,
            flags: TransmissionFlags::HAS_FLAGS.with(TransmissionFlags::SEND_FLUSH),
            block_sizes: Some(BlockSizes {
                minimum_bytes: 512,
                preferred_bytes: 4096,
                maximum_bytes: 1 << 25,
            }),
            description: Some("volnode/1 and so on".into()),
        }
    }

    /// Runs a client against a server, `step` bytes at a time each way.
    fn run(name: &str, step: usize, go_is_known: bool) -> Result<ExportInfo, ClientHandshakeError> {
        let (mut to_client, mut to_server) = (Vec::new(), Vec::new());
        let mut server = ServerHandshake::new(&mut to_client);
        let mut client = ClientHandshake::new(name).unwrap();
        for _ in 0..10_000 {
            let arrived: Vec<u8> = to_client.drain(..step.min(to_client.len())).collect();
            if let Some(info) = client.handle_bytes(&arrived, &mut to_server)? {
                assert!(client.leftover().is_empty());
                return Ok(info);
            }
            let mut arrived: Vec<u8> = to_server.drain(..step.min(to_server.len())).collect();
            if !go_is_known {
                // A server from before GO: rewrite the option number so that ours refuses it.
                if let Some(at) = arrived.windows(12).position(|w| w == b"IHAVEOPT\0\0\0\x07") {
                    arrived[at + 11] = 99;
                }
            }
            let mut event = server.handle_bytes(&arrived, &mut to_client).unwrap();
            while let Some(Event::Open(open)) = event {
                let answer =
                    if open.name == "good" { Ok(export()) } else { Err(Refusal::unknown("no such export")) };
                server.answer_open(answer.as_ref().map_err(Clone::clone), &mut to_client).unwrap();
                event = server.handle_bytes(&[], &mut to_client).unwrap();
            }
        }
        panic!("the handshake did not end");
    }

    #[test]
    fn client_and_server_agree_at_every_fragment_size() {
        for step in [1, 2, 3, 7, 16, 64, 4096] {
            assert_eq!(run("good", step, true), Ok(export()), "step {step}");
        }
    }

    #[test]
    fn unknown_export_is_refused_with_the_servers_words() {
        let refused = run("bad", 4096, true);
        let Err(ClientHandshakeError::Refused { text, .. }) = refused else { panic!("{refused:?}") };
        assert_eq!(text, "no such export");
    }
}
