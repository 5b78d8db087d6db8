//! What a request of a connection holds while it is served: its buffer or pages, and how far it is.
//!
//! Never: takes or gives back; `connection.rs` does, its only user.

use proto::nbd::transmission::Request;

use crate::buffers::Buffer;
use crate::page_pipes::PipeId;
use crate::ring::PayloadPlace;
use crate::volume::RequestProgress;

/// A slot of a connection; empty while no request has it.
#[derive(Debug, Default)]
pub struct InFlight {
    /// Of a request with a payload, or an answer, unless that is in place or in pages.
    pub buffer: Option<Buffer>,
    /// Of a READ whose data is not in a buffer.
    pub pages: Option<PipeId>,
    /// How much of the buffer the request uses.
    pub buffer_bytes: usize,
    /// How far the volume is with it.
    pub progress: Option<RequestProgress>,
}

impl InFlight {
    /// Where the payload of the request is, or belongs.
    pub fn place(&self, request: &Request) -> PayloadPlace<'_> {
        match self {
            Self { buffer: Some(buffer), .. } => PayloadPlace::Buffer(buffer),
            Self { pages: Some(pages), .. } => PayloadPlace::Pages(pages),
            _ => PayloadPlace::Volume(request.offset_bytes),
        }
    }
}
