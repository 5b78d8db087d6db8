//! The two options about metadata contexts: what they ask for, and the answer once their export was looked up.
//!
//! Called by `server.rs`, whose state and negotiation this changes.

use super::super::super::block_status::{
    ALLOCATION_CONTEXT, ALLOCATION_CONTEXT_ID, BITMAPS_MAX, Contexts, DIRTY_BITMAP_PREFIX, bitmap_id,
};
use super::super::super::{ExportInfo, HeaderStyle, option, reply};
use super::super::meta_context::{self, QueryKind};
use super::{Event, Open, OpenKind, Progress, Refusal, ServerHandshake, State, put_reply};

impl ServerHandshake {
    pub(super) fn query_contexts(&mut self, kind: QueryKind, data: &[u8], out: &mut Vec<u8>) -> Progress {
        if kind == QueryKind::Set {
            // Replaces what was selected before, also when it fails.
            self.negotiation.select(None, Contexts::NONE, Vec::new());
        }
        let parsed = if self.negotiation.headers == HeaderStyle::Simple {
            Err((reply::ERR_INVALID, "ask for structured replies or extended headers first"))
        } else {
            meta_context::parse(data, kind)
        };
        match parsed {
            Ok(request) => {
                self.state = State::Querying { kind };
                let name = request.export.clone();
                self.negotiation.query = Some(request);
                Progress::Event(Event::Open(Open { kind: OpenKind::Info, name }))
            }
            Err((error, text)) => {
                put_reply(out, kind.option(), error, text.as_bytes());
                Progress::Done
            }
        }
    }

    /// The export that a question about contexts names was looked up.
    pub(super) fn answer_query(
        &mut self,
        kind: QueryKind,
        answer: Result<&ExportInfo, Refusal>,
        out: &mut Vec<u8>,
    ) {
        self.state = State::Options;
        let (query, offered) = (self.negotiation.query.take(), std::mem::take(&mut self.offered_bitmaps));
        if let Err(refusal) = answer {
            return put_reply(out, kind.option(), refusal.reply, refusal.text.as_bytes());
        }
        let Some(query) = query else { panic!("answer_query: nobody asked") };
        let bitmaps: Vec<String> = offered.into_iter().filter(|name| query.matches_bitmap(name)).collect();
        let is_set = kind == QueryKind::Set;
        if is_set && bitmaps.len() > BITMAPS_MAX {
            let words = format!("at most {BITMAPS_MAX} bitmaps can be selected at once");
            return put_reply(out, kind.option(), reply::ERR_TOO_BIG, words.as_bytes());
        }
        let mut put = |id: u32, name: &str| {
            // In a list the id is reserved.
            let id = if is_set { id } else { 0 };
            put_reply(
                out,
                kind.option(),
                reply::META_CONTEXT,
                &[&id.to_be_bytes()[..], name.as_bytes()].concat(),
            );
        };
        if query.matches_allocation {
            put(ALLOCATION_CONTEXT_ID, ALLOCATION_CONTEXT);
        }
        for (index, name) in bitmaps.iter().enumerate() {
            put(bitmap_id(index), &format!("{DIRTY_BITMAP_PREFIX}{name}"));
        }
        put_reply(out, kind.option(), reply::ACK, &[]);
        if is_set {
            let allocation = if query.matches_allocation { Contexts::ALLOCATION } else { Contexts::NONE };
            let contexts = allocation.with_bitmaps(bitmaps.len());
            self.negotiation.select(Some(query.export), contexts, bitmaps);
        }
    }
}

impl QueryKind {
    fn option(self) -> u32 {
        match self {
            Self::List => option::LIST_META_CONTEXT,
            Self::Set => option::SET_META_CONTEXT,
        }
    }
}
