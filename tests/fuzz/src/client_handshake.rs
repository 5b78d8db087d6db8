//! The client's handshake: any server.

use proto::nbd::ExportInfo;
use proto::nbd::handshake::client::ClientHandshake;

use crate::{pieces, split_first};

/// Carries a secret; nobody may see it before TLS.
const SECRET_NAME: &str = "attachment.secret";

/// The first byte says how the stream is cut (low bits) and whether the client wants TLS (highest); the rest is what the
/// server sends.
///
/// # Panics
/// When the outcome depends on the cuts, or the export is named before TLS where TLS is wanted.
pub fn client_handshake(bytes: &[u8]) {
    let (control, stream) = split_first(bytes);
    if control & 0x80 != 0 {
        // What comes behind the answer to STARTTLS is judged by when it comes: no two ways to compare.
        converse(stream, control, true);
        return;
    }
    assert_eq!(converse(stream, control, false), converse(stream, 0, false));
}

/// What was sent, and the export, an error, or neither yet.
fn converse(stream: &[u8], cut: u8, wants_tls: bool) -> (Vec<u8>, Option<Result<ExportInfo, String>>) {
    let mut client = ClientHandshake::new(SECRET_NAME).expect("a name that is short enough");
    if wants_tls {
        client = client.with_tls();
    }
    let (mut sent, mut ended, mut is_trusted) = (Vec::new(), None, !wants_tls);
    for piece in pieces(stream, cut) {
        match client.handle_bytes(piece, &mut sent) {
            Ok(None) => {}
            Ok(Some(export)) => {
                assert!(is_trusted, "an export was opened before TLS");
                let description_bytes = export.description.as_ref().map_or(0, String::len);
                assert!(description_bytes <= 64 << 10, "a description of {description_bytes} bytes");
                if let Some(sizes) = export.block_sizes {
                    assert!(sizes.minimum_bytes.is_power_of_two(), "{sizes:?}");
                    assert!(sizes.maximum_bytes >= sizes.minimum_bytes, "{sizes:?}");
                }
                ended = Some(Ok(export));
                break;
            }
            Err(error) => {
                ended = Some(Err(error.to_string()));
                break;
            }
        }
        if client.is_tls_acknowledged() {
            is_trusted = true;
            client.tls_started(&mut sent);
        }
        let is_named = sent.windows(SECRET_NAME.len()).any(|window| window == SECRET_NAME.as_bytes());
        assert!(is_trusted || !is_named, "the export was named before TLS");
    }
    assert!(sent.len() < 4096, "{} bytes were sent", sent.len());
    (sent, ended)
}
