//! Copying an image from one store to another, and reading it back.
//!
//! Owns the loop: it does what the plan says, with many chunks on their way, and lets the destination make durable what was copied
//! before the journal says so. Copying goes on meanwhile. A check is the same loop without a destination: its digests are compared
//! with those that the journal has.
//! Called by volctl. Whoever calls may drop the future at any time: the journal is then as it would be after a kill.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use futures_util::future::LocalBoxFuture;
use futures_util::stream::FuturesUnordered;

use super::CHUNK_BYTES;
use super::changes::Changes;
use super::content::{ChunkContent, Digest, ImageDigest, UNREAD, digest, look_at, zeroes_between};
use super::journal::{Journal, JournalError};
use super::overlay::{Overlay, Readable};
use super::plan::{IN_FLIGHT_MAX, Piece, Plan, Run, Step};
use super::store::{Store, StoreError};

/// What an interrupted copy does once more, at most, and how often a destination is asked to flush.
const CHECKPOINT_INTERVAL: Duration = Duration::from_secs(5);

/// A copy failed; what the journal has stays copied.
#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    /// Reading the source.
    #[error("the source: {0}")]
    Source(StoreError),
    /// Writing or reading the destination.
    #[error("the destination: {0}")]
    Destination(StoreError),
    /// The journal.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// What was read back is not what was copied.
    #[error("what was read back differs from what was copied, in the MiB at byte {0}")]
    Differs(u64),
    /// A store tells nothing of what it has.
    #[error("the {0} does not tell what it has at byte {1}")]
    NothingFound(&'static str, u64),
}

/// A pass over an image.
#[derive(Debug, Clone, Copy)]
pub struct Pass<'a> {
    /// What is read.
    pub from: Readable<'a>,
    /// What is written; `None`: what is read is compared with the journal.
    pub to: Option<&'a Store>,
    /// The destination reads as zeroes where it was not written: zeroes are not written.
    pub is_zero: bool,
    /// Of the image.
    pub size_bytes: u64,
    /// After so many bytes they are made durable, if not for the time.
    pub checkpoint_bytes: u64,
    /// Only there is anything written, zeroes as well, in whole clusters; `None`: everywhere.
    pub changes: Option<&'a Changes>,
    /// Chunks without changes are read as well, for their digests; else they have [`UNREAD`].
    pub reads_all: bool,
}

enum Outcome {
    Found(Result<Vec<Run>, StoreError>, u64),
    Ended(u64, Vec<Piece>),
    Failed(CopyError),
    Flushed(Vec<Piece>),
}

/// Copies what the journal does not have yet, and tells it after some seconds or `checkpoint_bytes`. Everything is durable, and in the journal, when it returns.
///
/// # Errors
/// [`CopyError`], by cause.
pub async fn copy(pass: &Pass<'_>, journal: &mut Journal, progress: &dyn Fn(u64)) -> Result<(), CopyError> {
    let mut plan = Plan::new(pass.size_bytes, journal.chunks());
    pass.run(&mut plan, progress, |pieces| Ok(journal.append(pieces)?)).await
}

/// Reads the image back, and compares it with the digests in the journal. Tells the digest of all that was read.
///
/// # Errors
/// [`CopyError::Differs`], and those of reading.
pub async fn verify(
    destination: Readable<'_>,
    size_bytes: u64,
    journal: &Journal,
    progress: &dyn Fn(u64),
) -> Result<String, CopyError> {
    destination.forget_cache().await;
    let mut plan = Plan::new(size_bytes, 0);
    let mut expected = Expected { pieces: journal.pieces(), used: 0, chunk: 0 };
    let mut found = ImageDigest::default();
    let read = reading(destination, size_bytes);
    read.run(&mut plan, progress, |pieces| {
        expected.compare(pieces)?;
        pieces.iter().for_each(|piece| found.add(piece.count, &piece.digest));
        Ok(())
    })
    .await?;
    Ok(found.finish())
}

/// The digest of what a store has.
///
/// # Errors
/// Those of reading, as a destination's.
pub async fn digest_of(
    store: Readable<'_>,
    size_bytes: u64,
    progress: &dyn Fn(u64),
) -> Result<String, CopyError> {
    let mut plan = Plan::new(size_bytes, 0);
    let mut found = ImageDigest::default();
    let read = reading(store, size_bytes);
    read.run(&mut plan, progress, |pieces| {
        pieces.iter().for_each(|piece| found.add(piece.count, &piece.digest));
        Ok(())
    })
    .await?;
    Ok(found.finish())
}

/// The digest of an overlay's base, as far as the overlay goes. `pieces` are the overlay's own, of all chunks: where nothing lies above the
/// base they are the base's, too, and it is not read.
///
/// # Errors
/// Those of reading, as a source's.
pub async fn base_digest(overlay: &Overlay, pieces: &[Piece], size_bytes: u64) -> Result<String, CopyError> {
    let chunks = pieces.iter().flat_map(|piece| (0..piece.count).map(|_| piece.digest));
    let of_chunk = |(chunk, of_overlay): (usize, Digest)| async move {
        let start = chunk as u64 * CHUNK_BYTES;
        let range = start..(start + CHUNK_BYTES).min(size_bytes);
        if overlay.changes().touch(range.clone()) {
            let bytes = overlay.read_base(range.start, range.end - range.start).await;
            bytes.map(|bytes| digest(&bytes)).map_err(CopyError::Source)
        } else {
            Ok(of_overlay)
        }
    };
    let mut digests = futures_util::stream::iter(chunks.enumerate()).map(of_chunk).buffered(IN_FLIGHT_MAX);
    let mut found = ImageDigest::default();
    while let Some(digest) = digests.next().await {
        found.add(1, &digest?);
    }
    Ok(found.finish())
}

/// A pass that only reads.
fn reading(store: Readable<'_>, size_bytes: u64) -> Pass<'_> {
    Pass {
        from: store,
        to: None,
        is_zero: false,
        size_bytes,
        checkpoint_bytes: CHUNK_BYTES,
        changes: None,
        reads_all: true,
    }
}

/// The digests that are still to be found.
struct Expected<'a> {
    pieces: &'a [Piece],
    /// Of the first piece.
    used: u64,
    chunk: u64,
}

impl Expected<'_> {
    fn compare(&mut self, found: &[Piece]) -> Result<(), CopyError> {
        for piece in found {
            let mut left = piece.count;
            while left > 0 {
                let is_same = |expected: &&Piece| [piece.digest, UNREAD].contains(&expected.digest);
                let Some(expected) = self.pieces.first().filter(is_same) else {
                    return Err(CopyError::Differs(self.chunk * CHUNK_BYTES));
                };
                let same = left.min(expected.count - self.used);
                (left, self.chunk, self.used) = (left - same, self.chunk + same, self.used + same);
                if self.used == expected.count {
                    (self.pieces, self.used) = (&self.pieces[1..], 0);
                }
            }
        }
        Ok(())
    }
}

impl Pass<'_> {
    async fn run(
        &self,
        plan: &mut Plan,
        progress: &dyn Fn(u64),
        mut record: impl FnMut(&[Piece]) -> Result<(), CopyError>,
    ) -> Result<(), CopyError> {
        let mut tasks: FuturesUnordered<LocalBoxFuture<'_, Outcome>> = FuturesUnordered::new();
        let mut is_flushing = false;
        let (mut flushed_at, mut flushed_bytes) = (Instant::now(), plan.ended_bytes());
        loop {
            let is_finished = loop {
                match plan.next_step() {
                    Step::Wait => break false,
                    Step::Finished => break true,
                    step => tasks.push(self.take(step, plan)),
                }
            };
            let is_due = is_finished
                || flushed_at.elapsed() >= CHECKPOINT_INTERVAL
                || plan.ended_bytes() - flushed_bytes >= self.checkpoint_bytes;
            if is_due && plan.has_unrecorded() && !is_flushing {
                is_flushing = true;
                (flushed_at, flushed_bytes) = (Instant::now(), plan.ended_bytes());
                tasks.push(Box::pin(self.flush(plan.take_unrecorded())));
            }
            match tasks.next().await {
                None => return Ok(()),
                Some(Outcome::Found(runs, offset_bytes)) => {
                    let runs = runs.map_err(|error| self.reading_failed(error))?;
                    if runs.iter().all(|run| run.length_bytes == 0) {
                        let which = if self.to.is_some() { "source" } else { "destination" };
                        return Err(CopyError::NothingFound(which, offset_bytes));
                    }
                    plan.found(&runs);
                }
                Some(Outcome::Ended(first, pieces)) => {
                    plan.ended(first, pieces);
                    progress(plan.ended_bytes());
                }
                Some(Outcome::Failed(error)) => return Err(error),
                Some(Outcome::Flushed(pieces)) => {
                    is_flushing = false;
                    record(&pieces)?;
                }
            }
        }
    }

    fn take<'a>(&'a self, step: Step, plan: &Plan) -> LocalBoxFuture<'a, Outcome> {
        match step {
            Step::Look { offset_bytes, length_bytes } => Box::pin(async move {
                Outcome::Found(self.from.look(offset_bytes, length_bytes).await, offset_bytes)
            }),
            Step::Copy { chunk } => {
                let length_bytes = plan.chunk_bytes(chunk);
                let start = chunk * CHUNK_BYTES;
                let is_changed = |changes: &Changes| changes.touch(start..start + length_bytes);
                if !self.reads_all && !self.changes.is_none_or(is_changed) {
                    let unread = Piece { count: 1, digest: UNREAD };
                    return Box::pin(async move { Outcome::Ended(chunk, vec![unread]) });
                }
                Box::pin(async move {
                    match self.copy_chunk(chunk, length_bytes).await {
                        Ok(piece) => Outcome::Ended(chunk, vec![piece]),
                        Err(error) => Outcome::Failed(error),
                    }
                })
            }
            Step::Zeroes { first, count } => {
                let pieces = plan.zero_pieces(first, count);
                let length_bytes = (count - 1) * CHUNK_BYTES + plan.chunk_bytes(first + count - 1);
                Box::pin(async move {
                    match self.zero_chunks(first * CHUNK_BYTES, length_bytes).await {
                        Ok(()) => Outcome::Ended(first, pieces),
                        Err(error) => Outcome::Failed(error),
                    }
                })
            }
            Step::Wait | Step::Finished => Box::pin(async { Outcome::Flushed(Vec::new()) }),
        }
    }

    async fn copy_chunk(&self, chunk: u64, length_bytes: u64) -> Result<Piece, CopyError> {
        let offset_bytes = chunk * CHUNK_BYTES;
        let bytes =
            self.from.read(offset_bytes, length_bytes).await.map_err(|error| self.reading_failed(error))?;
        let bytes = Arc::new(bytes);
        let ChunkContent { digest, data } = {
            let bytes = Arc::clone(&bytes);
            let looked = tokio::task::spawn_blocking(move || look_at(&bytes)).await;
            looked.map_err(|error| {
                let source = std::io::Error::other(error);
                self.reading_failed(StoreError::File { what: "look at", source })
            })?
        };
        if let Some(to) = self.to {
            let (data, zeroes) = match self.changes {
                None => (data.clone(), zeroes_between(&data, bytes.len())),
                Some(changes) => changes.split(offset_bytes, bytes.len(), &data),
            };
            for range in data {
                to.write(offset_bytes, &bytes, range).await.map_err(CopyError::Destination)?;
            }
            for range in zeroes {
                self.zero(offset_bytes + range.start as u64, range.len() as u64).await?;
            }
        }
        Ok(Piece { count: 1, digest })
    }

    /// The source has only zeroes there.
    async fn zero_chunks(&self, offset_bytes: u64, length_bytes: u64) -> Result<(), CopyError> {
        let Some(changes) = self.changes else { return self.zero(offset_bytes, length_bytes).await };
        for range in changes.within(offset_bytes..offset_bytes + length_bytes) {
            self.zero(range.start, range.end - range.start).await?;
        }
        Ok(())
    }

    async fn zero(&self, offset_bytes: u64, length_bytes: u64) -> Result<(), CopyError> {
        match self.to {
            // Above a base, zeroes hide what it has.
            Some(to) if !self.is_zero || self.changes.is_some() => {
                to.zero(offset_bytes, length_bytes).await.map_err(CopyError::Destination)
            }
            _ => Ok(()),
        }
    }

    async fn flush(&self, pieces: Vec<Piece>) -> Outcome {
        let Some(to) = self.to else { return Outcome::Flushed(pieces) };
        match to.flush().await {
            Ok(()) => Outcome::Flushed(pieces),
            Err(error) => Outcome::Failed(CopyError::Destination(error)),
        }
    }

    fn reading_failed(&self, error: StoreError) -> CopyError {
        if self.to.is_some() { CopyError::Source(error) } else { CopyError::Destination(error) }
    }
}
