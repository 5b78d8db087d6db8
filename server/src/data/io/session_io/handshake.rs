//! A connection's way to its volume: the answers to what its handshake asked for.

use std::sync::Arc;
use std::time::Instant;

use proto::nbd::handshake::server::{ListedExport, Refusal};
use tls::stream::Carrier;
use tracing::{debug, info};

use super::{Phase, SessionIo, Tls};
use crate::data::io::ring::Ring;
use crate::data::mailbox::Opened;
use crate::limits::BULK_BYTES;
use crate::tls::Secured;
use crate::tls::rights::Rights;

impl SessionIo {
    /// The open was answered.
    pub fn opened(&mut self, ring: &mut Ring, answer: Result<Opened, Refusal>) {
        if self.phase != Phase::Open {
            return;
        }
        if let Ok(opened) = &answer {
            // Of what its certificate does not name, a client learns nothing.
            let bases = opened.bitmaps.iter().flat_map(|offered| &offered.bases);
            let open = bases.filter(|base| self.rights.may_open(&base.export_name, None));
            self.session.offer_bitmaps(open.map(|base| base.name.clone()).collect());
        }
        let result = match &answer {
            Ok(opened) => self.session.opened(Ok((&opened.export, opened.limits))),
            Err(refusal) => self.session.opened(Err(refusal.clone())),
        };
        match (result, answer) {
            (Ok(false), _) => {}
            (Ok(true), Ok(Opened { volume: Some(volume), attachment_id, is_probe, bitmaps, .. })) => {
                let selected = self.session.selected_bitmaps();
                if let Some(offered) = bitmaps.filter(|_| !selected.is_empty()) {
                    self.bitmaps = Some(Arc::new(offered.select(selected)));
                }
                if !is_probe {
                    self.place.settle();
                    self.place.widen(self.wire.socket());
                }
                if attachment_id.is_some() {
                    self.peer.notice_when_gone(self.wire.socket());
                }
                (self.attachment_id, self.is_probe) = (attachment_id, is_probe);
                self.wire.set_volume(volume);
                self.put_back_leftover(ring);
            }
            (Err(error), _) => {
                info!(peer = %self.peer, %error, "connection ends");
                self.finish(ring);
            }
            // A GO is never answered without a volume.
            (Ok(true), _) => self.close(ring),
        }
    }

    /// The list was answered.
    pub fn listed(&mut self, ring: &mut Ring, exports: &[ListedExport]) {
        if self.phase != Phase::Open {
            return;
        }
        if let Err(error) = self.session.listed(exports) {
            info!(peer = %self.peer, %error, "connection ends");
            self.finish(ring);
        }
    }

    /// What its client may open.
    pub fn rights(&self) -> &Arc<Rights> {
        &self.rights
    }

    /// When the handshake has to be over.
    pub fn handshake_deadline(&self) -> Instant {
        self.handshake_deadline
    }

    /// The TLS handshake has ended.
    pub fn tls_started(&mut self, ring: &mut Ring, secured: Option<Secured>) {
        if self.phase != Phase::Open {
            return;
        }
        self.tls = Tls::Idle;
        let Some(Secured { carrier, rights }) = secured else { return self.close(ring) };
        if matches!(carrier, Carrier::Relay(_)) {
            // Later it is not the connection's any more.
            self.place.widen(self.wire.socket());
            self.peer.notice_when_gone(self.wire.socket());
        }
        if let Err(error) = self.wire.set_carrier(carrier) {
            debug!(peer = %self.peer, %error, "TLS cannot be used");
            return self.close(ring);
        }
        self.rights = rights;
        if let Err(error) = self.session.tls_started() {
            info!(peer = %self.peer, %error, "connection ends");
            self.close(ring);
        }
    }

    /// Bytes that the handshake took in and that belong to the transmission phase go back to where they are parsed.
    fn put_back_leftover(&mut self, ring: &mut Ring) {
        let leftover = self.session.leftover();
        if leftover.len() > BULK_BYTES {
            // Cannot be: they came in one receive, the last before the open.
            self.close(ring);
            return;
        }
        self.wire.bulk_mut()[..leftover.len()].copy_from_slice(&leftover);
        (self.bulk_start, self.bulk_end) = (0, leftover.len());
    }
}
