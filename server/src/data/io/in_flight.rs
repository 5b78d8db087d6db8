//! What a request of a connection holds while it is served: its buffer or pages, and how far it is.
//!
//! Never: takes or gives back; `session_io.rs` does, its only user.

use proto::nbd::transmission::Request;

use crate::backend::VolumeOp;
use crate::data::io::buffers::Buffer;
use crate::data::io::page_pipes::PipeId;
use crate::data::io::ring::PayloadPlace;
use crate::volume::request::RequestProgress;

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
    /// What it does next, once a copy of the volume lets it.
    pub held: Option<VolumeOp>,
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
