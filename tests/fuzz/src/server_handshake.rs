//! The server's handshake: any client.

use proto::nbd::handshake::server::{ListedExport, OpenKind, Refusal, TlsState};
use proto::nbd::validate::RequestLimits;
use proto::nbd::{BlockSizes, ExportInfo, Negotiated};
use server::data::session::{Action, Session};

use crate::{EXPORT_NAME, export, pieces, split_first};

/// How one conversation went.
#[derive(Debug, Default, PartialEq, Eq)]
struct Outcome {
    sent: Vec<u8>,
    opened: Vec<OpenKindName>,
    is_transmitting: bool,
    error: Option<String>,
}

type OpenKindName = &'static str;

/// The first byte says how the stream is cut (low bits) and whether TLS is required (highest); the rest is the stream.
///
/// # Panics
/// When the outcome depends on the cuts, or anything is opened or listed before TLS where TLS is required.
pub fn server_handshake(bytes: &[u8]) {
    let (control, stream) = split_first(bytes);
    if control & 0x80 != 0 {
        // What comes behind STARTTLS is judged by when it comes, so there are no two ways to compare.
        converse(stream, control, TlsState::Required);
        return;
    }
    assert_eq!(converse(stream, control, TlsState::Off), converse(stream, 0, TlsState::Off));
}

fn converse(stream: &[u8], cut: u8, tls: TlsState) -> Outcome {
    let mut session = Session::new().with_tls(tls);
    let mut outcome = Outcome::default();
    let mut is_trusted = tls == TlsState::Off;
    for piece in pieces(stream, cut) {
        let mut rest = piece;
        while !session.is_transmitting() {
            let (used, action) = match session.advance(rest) {
                Ok(step) => step,
                Err(error) => return outcome.end(&mut session, Some(error.to_string())),
            };
            rest = &rest[used..];
            match action {
                Action::NeedsBytes => break,
                Action::End => return outcome.end(&mut session, None),
                Action::StartTls => {
                    is_trusted = true;
                    session.tls_started().expect("it was asked for");
                }
                Action::List => {
                    assert!(is_trusted, "exports are listed before TLS");
                    let listed =
                        ListedExport { name: EXPORT_NAME.to_owned(), description: "a volume".to_owned() };
                    session.listed(&[listed]).expect("it was asked for");
                }
                Action::Open(open) => {
                    assert!(is_trusted, "an export is opened before TLS");
                    outcome.opened.push(match open.kind {
                        OpenKind::Info => "info",
                        OpenKind::Go => "go",
                        OpenKind::ExportName => "export name",
                    });
                    let export = export();
                    let limits = limits_of(&export);
                    let answer = match open.name.as_str() {
                        EXPORT_NAME => Ok((&export, limits)),
                        _ => Err(Refusal::unknown("no such export")),
                    };
                    if let Err(error) = session.opened(answer) {
                        return outcome.end(&mut session, Some(error.to_string()));
                    }
                }
                other => panic!("{other:?} in a handshake"),
            }
        }
    }
    outcome.end(&mut session, None)
}

impl Outcome {
    fn end(mut self, session: &mut Session, error: Option<String>) -> Self {
        self.sent = session.take_output();
        self.is_transmitting = session.is_transmitting();
        self.error = error;
        // A greeting, and at most 64 options of which each is answered with a few lines.
        assert!(self.sent.len() < 256 << 10, "{} bytes were sent", self.sent.len());
        self
    }
}

/// What requests to `export` are checked against.
pub(crate) fn limits_of(export: &ExportInfo) -> RequestLimits {
    let nothing_announced = BlockSizes { minimum_bytes: 1, preferred_bytes: 4096, maximum_bytes: 32 << 20 };
    RequestLimits {
        size_bytes: export.size_bytes,
        flags: export.flags,
        block_sizes: export.block_sizes.unwrap_or(nothing_announced),
        negotiated: Negotiated::default(),
    }
}
