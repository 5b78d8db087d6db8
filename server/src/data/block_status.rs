//! BLOCK_STATUS: which parts of a volume are allocated, asked of its backend, and which have changed, off the ring.
//!
//! Owns: one thread for each ring, and another where maps of a thin pool are read (`dirty_bitmaps.rs`), for which no other question waits; because `lseek(SEEK_HOLE)` may read a file system's metadata, or wait for its locks, and
//! io_uring has no such operation; other backends may wait in the same way. Never: touches a ring or a connection; its answer goes through the mailbox.
//! Called by: `ring.rs` (asks; counts the question as an operation in flight, so that the connection and the volume outlive
//! it), `io/run.rs` (gets the answer).
//!
//! Invariants: what is reported as a hole was one at a moment between the request's arrival and its reply, so a write that
//! was answered before is never reported as a hole; edges that are not aligned to the export's blocks are data; where the
//! file system does not tell, all is data; a question takes bounded time, and is answered at least in part; no more than
//! `ANSWERS_MAX` answers are on their way to the ring at once.
//! Source: `lseek(2)`; NBD `doc/proto.md`, "`base:allocation` metadata context".

use std::fs::File;
use std::io;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use proto::nbd::HeaderStyle;
use proto::nbd::block_status::{Contexts, ExtentState, StatusExtents, bitmap_index};
use proto::nbd::replies::ReplyHead;
use proto::nbd::transmission::Request;
use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;
use tracing::warn;

use crate::backend::callback::CallbackBackend;
use crate::backend::preallocated::{Space, first_run};
use crate::data::dirty_bitmaps::{SelectedBitmaps, StatusAnswer, Wanted};
use crate::data::mailbox::{Mailbox, RingMessage};
use crate::ids::RequestSlot;
use crate::limits::ANSWERS_MAX;
use crate::volume::{Backend, Volume};

/// How long one question may look for extents. Others of the ring wait behind it; what is not found by then, the client
/// asks for again.
const LOOK_LIMIT: Duration = Duration::from_millis(50);

/// What a BLOCK_STATUS asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StatusQuery {
    /// From where.
    pub offset_bytes: u64,
    /// How far; not 0, and inside the volume.
    pub length_bytes: u64,
    /// Extents that the reply has room for, of each context.
    pub extents_max: usize,
    /// Multiple of which extents begin and end.
    pub alignment_bytes: u64,
    /// How the reply is encoded.
    pub headers: HeaderStyle,
    /// About which contexts.
    pub contexts: Contexts,
    /// What the heads of further chunks are made of.
    pub request: Request,
}

struct Question {
    connection: u32,
    slot: RequestSlot,
    volume: Arc<Volume>,
    bitmaps: Option<Arc<SelectedBitmaps>>,
    query: StatusQuery,
    asked_at: Instant,
}

impl Question {
    fn bitmap_indices(&self) -> impl Iterator<Item = usize> + use<> {
        let contexts = self.query.contexts;
        contexts.ids().filter_map(bitmap_index)
    }

    fn has_to_read(&self) -> bool {
        let bitmaps = self.bitmaps.as_ref();
        bitmaps.is_some_and(|bitmaps| bitmaps.has_to_read(self.bitmap_indices(), &self.volume))
    }
}

/// The thread that answers one ring's questions; it ends when this is dropped.
#[derive(Debug)]
pub struct ExtentFinder {
    ring: usize,
    questions: Sender<Question>,
    /// Those for which maps are to be read first, which takes as long as a minute: their thread, once there was one.
    unread: OnceLock<Sender<Question>>,
    /// One for each answer that may be made.
    permits: Sender<()>,
}

impl ExtentFinder {
    /// Starts the thread for ring number `ring`; answers go to its mailbox.
    ///
    /// # Errors
    /// `EAGAIN`: no more threads.
    pub fn start(ring: usize, mailbox: Arc<Mailbox>) -> io::Result<Self> {
        let ((questions, asked), (permits, permitted)) = (channel(), channel());
        std::thread::Builder::new()
            .name(format!("extents-{ring}"))
            .spawn(move || answer(&asked, &permitted, &mailbox))?;
        let finder = Self { ring, questions, unread: OnceLock::new(), permits };
        (0..ANSWERS_MAX).for_each(|_| finder.answer_taken());
        Ok(finder)
    }

    /// An answer was taken from the mailbox: one more may be made.
    pub fn answer_taken(&self) {
        // The thread ends only after this sender.
        let _ = self.permits.send(());
    }

    /// Asks; the answer comes as [`RingMessage::ExtentsFound`].
    pub fn ask(
        &self,
        connection: u32,
        slot: RequestSlot,
        volume: Arc<Volume>,
        bitmaps: Option<Arc<SelectedBitmaps>>,
        query: StatusQuery,
    ) {
        let question = Question { connection, slot, volume, bitmaps, query, asked_at: Instant::now() };
        let thread = if question.has_to_read() { self.maps_thread() } else { &self.questions };
        // The threads end only after this sender.
        let _ = thread.send(question);
    }

    /// The thread that reads maps, and hands the questions over when that is done. Where there can be none, they are answered with an error.
    fn maps_thread(&self) -> &Sender<Question> {
        if let Some(thread) = self.unread.get() {
            return thread;
        }
        let ((unread, asked), questions) = (channel::<Question>(), self.questions.clone());
        let read = move || {
            for question in asked {
                if let Some(bitmaps) = &question.bitmaps {
                    // What could not be read is found out by whoever answers.
                    let _ = bitmaps.read_maps(question.bitmap_indices(), &question.volume, question.asked_at);
                }
                if questions.send(question).is_err() {
                    return;
                }
            }
        };
        match std::thread::Builder::new().name(format!("maps-{}", self.ring)).spawn(read) {
            Ok(_) => self.unread.get_or_init(|| unread),
            Err(error) => {
                warn!(%error, "no thread can be started to read what changed of a snapshot");
                &self.questions
            }
        }
    }
}

fn answer(asked: &Receiver<Question>, permitted: &Receiver<()>, mailbox: &Mailbox) {
    while let (Ok(question), Ok(())) = (asked.recv(), permitted.recv()) {
        let Question { connection, slot, volume, bitmaps, query, .. } = question;
        let answer = found(&volume, bitmaps.as_deref(), &query);
        let answer = answer.map_err(|error| {
            warn!(volume_uid = %volume.volume_uid, %error, "what changed of a snapshot is not known");
        });
        // Let go of before the ring is told: it may be the last to hold the volume.
        drop((volume, bitmaps));
        mailbox.post(RingMessage::ExtentsFound { connection, slot, answer: answer.ok() });
    }
}

/// The extents of all contexts that are asked for. Each has its own time, so that each is answered at least in part.
fn found(
    volume: &Volume,
    bitmaps: Option<&SelectedBitmaps>,
    query: &StatusQuery,
) -> io::Result<StatusAnswer> {
    let (mut payload, mut first_bytes) = (Vec::new(), 0);
    for (number, id) in query.contexts.ids().enumerate() {
        let deadline = Instant::now() + LOOK_LIMIT;
        let extents = match bitmap_index(id) {
            None => allocated(volume, query, deadline),
            Some(index) => {
                let bytes = query.offset_bytes..query.offset_bytes + query.length_bytes;
                let (extents_max, alignment_bytes) = (query.extents_max, query.alignment_bytes);
                let wanted = Wanted { bytes, extents_max, alignment_bytes };
                bitmaps.ok_or(io::ErrorKind::NotFound)?.find(index, volume, &wanted, deadline)?
            }
        };
        let chunk = extents.encode(id, query.headers);
        if number == 0 {
            first_bytes = chunk.len() as u32;
        } else {
            let is_last = number + 1 == query.contexts.count();
            let mut head = ReplyHead::default();
            head.put_status(query.headers, &query.request, chunk.len() as u32, is_last);
            payload.extend_from_slice(head.bytes());
        }
        payload.extend_from_slice(&chunk);
    }
    Ok(StatusAnswer { payload, first_bytes })
}

fn allocated(volume: &Volume, query: &StatusQuery, deadline: Instant) -> StatusExtents {
    match &volume.backend {
        Backend::File(file) => find(file.file(), query, deadline),
        Backend::Memory(memory) => find(memory.file(), query, deadline),
        Backend::Callback(backend) => find_told(backend.as_ref(), query, deadline),
    }
}

/// The same as [`find`] of a backend that tells its extents, whose edges may be anywhere.
fn find_told(backend: &dyn CallbackBackend, query: &StatusQuery, deadline: Instant) -> StatusExtents {
    let (begin, end) = (query.offset_bytes, query.offset_bytes + query.length_bytes);
    let mut extents = StatusExtents::new(query.length_bytes, query.extents_max);
    // What is added, and what was told: between them is data.
    let (mut added_end, mut told_end) = (begin, begin);
    let (mut is_full, mut is_late) = (false, false);
    let asked = backend.extents(begin..end, &mut |length_bytes, state| {
        if length_bytes == 0 {
            // Tells nothing, so that time cannot be up with it: an answer has an extent.
            return true;
        }
        let start = told_end;
        told_end = start.saturating_add(length_bytes).min(end);
        let first = if start == begin { begin } else { start.next_multiple_of(query.alignment_bytes) };
        let last = if told_end == end { end } else { told_end - told_end % query.alignment_bytes };
        if state != ExtentState::DATA && first < last {
            is_full =
                !(extents.push(first - added_end, ExtentState::DATA) && extents.push(last - first, state));
            added_end = last;
        }
        is_late = Instant::now() >= deadline;
        !is_full && !is_late
    });
    if !is_full {
        let known_end = if asked.is_ok() && is_late { told_end } else { end };
        let known_end = known_end.next_multiple_of(query.alignment_bytes).min(end);
        extents.push(known_end - added_end, ExtentState::DATA);
    }
    extents
}

/// Finds extents until there are enough, or until the deadline and one.
fn find(file: &File, query: &StatusQuery, deadline: Instant) -> StatusExtents {
    let end = query.offset_bytes + query.length_bytes;
    let mut extents = StatusExtents::new(query.length_bytes, query.extents_max);
    let mut at = query.offset_bytes;
    let mut data = next_data(file, at, end, query.alignment_bytes);
    loop {
        let (run_end, state) = if at < data.start {
            zero_run(file, at, data.start, query.alignment_bytes)
        } else {
            (data.end, ExtentState::DATA)
        };
        if !extents.push(run_end - at, state) || Instant::now() >= deadline {
            return extents;
        }
        at = run_end;
        if at == data.end {
            data = next_data(file, at, end, query.alignment_bytes);
        }
    }
}

/// The first run inside a range without data, which begins and ends at a block: preallocated, or a hole.
fn zero_run(file: &File, at: u64, end: u64, alignment_bytes: u64) -> (u64, ExtentState) {
    let (run_end, space) = first_run(file, at, end);
    let whole_blocks_end = if run_end == end { end } else { run_end - run_end % alignment_bytes };
    match space {
        // Written between the two questions.
        Space::Written => (run_end.next_multiple_of(alignment_bytes).min(end), ExtentState::DATA),
        Space::Preallocated if whole_blocks_end > at => (whole_blocks_end, ExtentState::ALLOCATED_ZEROES),
        // What is a hole in part may need space.
        Space::Preallocated | Space::Missing => {
            (run_end.next_multiple_of(alignment_bytes).min(end), ExtentState::HOLE)
        }
    }
}

/// The first run of data from `at` on, which may be empty at `end`; one that is not empty ends after `at`.
fn next_data(file: &File, at: u64, end: u64, alignment_bytes: u64) -> std::ops::Range<u64> {
    let first = match seek(file, SeekFrom::Data(at)) {
        Ok(first) => first.max(at),
        // Nothing but a hole up to the end of the file.
        Err(Errno::NXIO) => return end..end,
        // The file system cannot tell, or failed: then all may be data.
        Err(_) => return at..end,
    };
    if first >= end {
        return end..end;
    }
    let start = (first - first % alignment_bytes).max(at);
    // Another's TRIM may have made a hole of it meanwhile; it counts as data for one block, so that there is progress.
    let after = seek(file, SeekFrom::Hole(first)).unwrap_or(end).max(first + 1);
    start..after.next_multiple_of(alignment_bytes).min(end)
}

#[cfg(test)]
mod tests {
    use std::ops::Range;
    use std::os::unix::fs::FileExt as _;
    use std::path::PathBuf;

    use proto::nbd::block_status::Extent;
    use proto::nbd::transmission::{Command, CommandFlags};

    use super::*;
    use crate::backend::callback::Operation;
    use crate::backend::file::FileVolume;
    use crate::backend::lvm::stand_in::{Pool, Volumes};
    use crate::backend::lvm::{Lvm, PoolName, Thin};
    use crate::data::dirty_bitmaps::{BitmapBase, OfferedBitmaps};
    use crate::data::maps::Maps;
    use crate::descriptors::Descriptors;
    use crate::volume::snapshot::files::CopyFiles;
    use crate::volume::{Faults, LossRecorder};

    const MIB: u64 = 1 << 20;

    /// An empty file of a file system that tells holes to the page: one on disk if there is one, and else one in memory.
    fn empty_file() -> File {
        // The source's, which may be read-only, and that for temporary files, which may be in memory.
        let on_disk = [PathBuf::from("."), std::env::temp_dir()]
            .into_iter()
            .filter_map(|dir| tempfile::tempfile_in(dir).ok());
        let in_memory = std::iter::once_with(|| {
            let flags = rustix::fs::MemfdFlags::CLOEXEC;
            File::from(rustix::fs::memfd_create("extents", flags).unwrap())
        });
        on_disk
            .chain(in_memory)
            .find(tells_holes)
            .unwrap_or_else(|| panic!("no file system here tells holes"))
    }

    /// Tries it, and leaves the file as it was.
    fn tells_holes(file: &File) -> bool {
        file.set_len(MIB).unwrap();
        file.write_all_at(&[1; 4096], MIB / 2).unwrap();
        let told = found_in(file, &query(0, MIB));
        file.set_len(0).unwrap();
        told == [(MIB / 2, HOLE), (4096, DATA), (MIB / 2 - 4096, HOLE)]
    }

    /// A file with data at 1 MiB (64 KiB) and at 4 MiB (4 KiB), 8 MiB long.
    fn file() -> File {
        let file = empty_file();
        file.set_len(8 * MIB).unwrap();
        file.write_all_at(&[1; 65536], MIB).unwrap();
        file.write_all_at(&[1; 4096], 4 * MIB).unwrap();
        file
    }

    fn query(offset_bytes: u64, length_bytes: u64) -> StatusQuery {
        let headers = HeaderStyle::Structured;
        let (flags, command, cookie) = (CommandFlags::NONE, Command::BlockStatus, 7);
        let request = Request { flags, command, cookie, offset_bytes, length_bytes };
        let contexts = Contexts::ALLOCATION;
        StatusQuery {
            offset_bytes,
            length_bytes,
            extents_max: 100,
            alignment_bytes: 512,
            headers,
            contexts,
            request,
        }
    }

    fn found_in(file: &File, query: &StatusQuery) -> Vec<(u64, ExtentState)> {
        let extents = find(file, query, Instant::now() + Duration::from_secs(600));
        extents.as_slice().iter().map(|Extent { length_bytes, state }| (*length_bytes, *state)).collect()
    }

    const DATA: ExtentState = ExtentState::DATA;
    const HOLE: ExtentState = ExtentState::HOLE;

    /// Tells these extents, and then fails or not.
    #[derive(Debug)]
    struct Told(Vec<(u64, ExtentState)>, bool);

    impl CallbackBackend for Told {
        fn submit(&self, _: Operation) {}

        fn extents(&self, _: Range<u64>, tell: &mut dyn FnMut(u64, ExtentState) -> bool) -> io::Result<()> {
            let goes_on = self.0.iter().all(|(length_bytes, state)| tell(*length_bytes, *state));
            if goes_on && self.1 { Err(io::ErrorKind::Other.into()) } else { Ok(()) }
        }

        fn describe(&self) -> &'static str {
            "told"
        }
    }

    fn found_told(told: &Told, query: &StatusQuery, limit: Duration) -> Vec<(u64, ExtentState)> {
        let extents = find_told(told, query, Instant::now() + limit);
        extents.as_slice().iter().map(|Extent { length_bytes, state }| (*length_bytes, *state)).collect()
    }

    /// Whose the next answer is, and whether there is one.
    fn next_answer(mailbox: &Mailbox) -> (u32, bool) {
        let give_up = Instant::now() + Duration::from_secs(60);
        loop {
            if let Some(RingMessage::ExtentsFound { connection, answer, .. }) = mailbox.take().pop() {
                return (connection, answer.is_some());
            }
            assert!(Instant::now() < give_up, "nothing is answered");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    #[test]
    fn no_other_answer_waits_while_maps_are_read_from_a_thin_pool() {
        let dir = tempfile::tempdir().unwrap();
        let name: PoolName = "vg/pool".parse().unwrap();
        let pool = Pool::new(name.clone(), Volumes::new());
        let lvm = Lvm::start_with(name, uuid::Uuid::nil(), dir.path(), Box::new(pool.clone())).unwrap();
        let [snapshot_uid, target_uid] = [1, 2].map(uuid::Uuid::from_u128);
        for uid in [snapshot_uid, target_uid] {
            lvm.create(Thin::Snapshot(uid), MIB).unwrap();
        }
        let (go_on, goes_on) = channel::<()>();
        pool.at_read(move |_| {
            // An error: it may go on.
            let _ = goes_on.recv_timeout(Duration::from_secs(60));
        });
        let files = CopyFiles::new(dir.path().join("volumes"));
        let maps = Maps::new(files, Descriptors::new(100)).with_pool(Some(Arc::new(lvm)));
        let (base, export_name) = ("s".to_owned(), "v@s".to_owned());
        let bases = vec![BitmapBase { name: base.clone(), export_name, snapshot_uid, capacity_bytes: MIB }];
        let bitmaps = Arc::new(OfferedBitmaps { bases, maps }.select(&[base]));
        let backend = Backend::File(FileVolume::as_block_device(file(), MIB));
        let recorder = LossRecorder::new(|| true);
        let volume = Arc::new(Volume::new(target_uid, MIB, backend, true, Faults::default(), recorder));
        let mailbox = Arc::new(Mailbox::new().unwrap());
        let finder = ExtentFinder::start(0, Arc::clone(&mailbox)).unwrap();
        let of_bitmap = StatusQuery { contexts: Contexts::NONE.with_bitmaps(1), ..query(0, MIB) };
        let ask = |connection, bitmaps, query| {
            finder.ask(connection, RequestSlot(0), Arc::clone(&volume), bitmaps, query);
        };
        ask(1, Some(Arc::clone(&bitmaps)), of_bitmap);
        ask(2, None, query(0, MIB));
        assert_eq!(next_answer(&mailbox), (2, true), "it waits for another's map");
        drop(go_on);
        assert_eq!(next_answer(&mailbox), (1, true));
        // What is read by now is answered at once.
        ask(3, Some(bitmaps), of_bitmap);
        assert_eq!(next_answer(&mailbox), (3, true));
    }

    #[test]
    fn what_a_backend_tells_is_rounded_to_blocks_and_what_it_does_not_tell_is_data() {
        let long = Duration::from_secs(600);
        let told = Told(vec![(1000, HOLE), (1000, DATA), (3000, HOLE), (3192, DATA)], false);
        let all = [(512, HOLE), (1536, DATA), (2560, HOLE), (3584, DATA)];
        assert_eq!(found_told(&told, &query(0, 8192), long), all);
        let fails = Told(told.0.clone(), true);
        assert_eq!(found_told(&fails, &query(0, 8192), long), all);
        let short = Told(told.0[..3].to_vec(), false);
        assert_eq!(found_told(&short, &query(0, 8192), long), all, "what was not told");
        let too_long = Told(vec![(512, DATA), (u64::MAX, HOLE)], false);
        assert_eq!(found_told(&too_long, &query(4096, 1024), long), [(512, DATA), (512, HOLE)]);
        assert_eq!(found_told(&Told(Vec::new(), true), &query(0, 8192), long), [(8192, DATA)]);
    }

    #[test]
    fn what_a_backend_tells_stops_where_the_reply_is_full_or_time_is_up() {
        let told = Told(vec![(1024, DATA), (1024, HOLE), (1024, DATA), (1024, HOLE), (4096, DATA)], false);
        let long = Duration::from_secs(600);
        for (extents_max, expected) in [
            (1, &[(1024, DATA)][..]),
            (2, &[(1024, DATA), (1024, HOLE)]),
            (3, &[(1024, DATA), (1024, HOLE), (1024, DATA)]),
        ] {
            assert_eq!(found_told(&told, &StatusQuery { extents_max, ..query(0, 8192) }, long), expected);
        }
        assert_eq!(found_told(&told, &query(0, 8192), Duration::ZERO), [(1024, DATA)], "at least in part");
        let begins_with_nothing = Told(vec![(0, HOLE), (0, DATA), (1024, HOLE), (1024, DATA)], false);
        assert_eq!(found_told(&begins_with_nothing, &query(0, 8192), Duration::ZERO), [(1024, HOLE)]);
        let only_nothing = Told(vec![(0, DATA)], false);
        assert_eq!(found_told(&only_nothing, &query(0, 8192), Duration::ZERO), [(8192, DATA)]);
        let less_than_a_block = Told(vec![(100, HOLE), (8092, HOLE)], false);
        assert_eq!(found_told(&less_than_a_block, &query(0, 8192), Duration::ZERO), [(512, DATA)]);
    }

    #[test]
    fn extents_follow_the_files_holes() {
        let file = file();
        let all = [(MIB, HOLE), (65536, DATA), (3 * MIB - 65536, HOLE), (4096, DATA), (4 * MIB - 4096, HOLE)];
        assert_eq!(found_in(&file, &query(0, 8 * MIB)), all);
        assert_eq!(found_in(&file, &query(MIB + 512, 1024)), [(1024, DATA)]);
        assert_eq!(found_in(&file, &query(MIB - 512, 1024)), [(512, HOLE), (512, DATA)]);
        assert_eq!(found_in(&file, &query(7 * MIB, MIB)), [(MIB, HOLE)]);
    }

    #[test]
    fn extents_stop_where_the_reply_is_full() {
        let mut one = query(0, 8 * MIB);
        one.extents_max = 1;
        assert_eq!(found_in(&file(), &one), [(MIB, HOLE)]);
        one.offset_bytes = MIB;
        one.length_bytes = MIB;
        assert_eq!(found_in(&file(), &one), [(65536, DATA)]);
    }

    #[test]
    fn a_question_out_of_time_is_answered_in_part() {
        let extents = find(&file(), &query(0, 8 * MIB), Instant::now());
        let told: u64 = extents.as_slice().iter().map(|extent| extent.length_bytes).sum();
        assert_eq!(told, MIB, "the first extent");
    }

    #[test]
    fn edges_inside_a_block_are_data() {
        let mut coarse = query(0, 8 * MIB);
        coarse.alignment_bytes = 2 * MIB;
        assert_eq!(
            found_in(&file(), &coarse),
            [(2 * MIB, DATA), (2 * MIB, HOLE), (2 * MIB, DATA), (2 * MIB, HOLE)]
        );
    }

    #[test]
    fn what_cannot_be_asked_is_data() {
        let (pipe, _writer) = std::io::pipe().unwrap();
        let file = File::from(std::os::fd::OwnedFd::from(pipe));
        assert_eq!(found_in(&file, &query(0, 8 * MIB)), [(8 * MIB, DATA)]);
    }

    #[test]
    fn a_write_that_has_ended_is_never_reported_as_a_hole() {
        let file = Arc::new(empty_file());
        let blocks = 2048u64;
        file.set_len(blocks * 4096).unwrap();
        let written = Arc::new(std::sync::atomic::AtomicU64::new(0));
        let writer = std::thread::spawn({
            let (file, written) = (Arc::clone(&file), Arc::clone(&written));
            move || {
                for block in (0..blocks).rev().step_by(2) {
                    file.write_all_at(&[1; 4096], block * 4096).unwrap();
                    written.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
                }
            }
        });
        let mut is_over = false;
        while !is_over {
            is_over = writer.is_finished();
            let before = written.load(std::sync::atomic::Ordering::SeqCst);
            let mut all = query(0, blocks * 4096);
            all.extents_max = 1 << 20;
            let data: u64 =
                found_in(&file, &all).iter().filter(|(_, state)| *state == DATA).map(|e| e.0).sum();
            assert!(data >= before * 4096, "{data} bytes of data after {before} blocks were written");
        }
        writer.join().unwrap();
    }

    #[test]
    fn preallocated_space_is_no_hole_and_reads_as_zeroes() {
        let file = file();
        let reserved = rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::KEEP_SIZE, 2 * MIB, MIB);
        if reserved.is_err() || first_run(&file, 2 * MIB, 3 * MIB).1 != Space::Preallocated {
            return println!("SKIP nothing is preallocated here");
        }
        let zeroes = ExtentState::ALLOCATED_ZEROES;
        let expected = [(MIB, zeroes), (MIB, HOLE), (4096, DATA)];
        assert_eq!(found_in(&file, &query(2 * MIB, 2 * MIB + 4096)), expected);
        let mut coarse = query(0, 4 * MIB);
        coarse.alignment_bytes = 1 << 16;
        let expected = [(MIB, HOLE), (65536, DATA), (MIB - 65536, HOLE), (MIB, zeroes), (MIB, HOLE)];
        assert_eq!(found_in(&file, &coarse), expected);
        file.write_all_at(&[1; 4096], 2 * MIB + 65536).unwrap();
        let expected = [(65536, zeroes), (4096, DATA), (MIB - 65536 - 4096, zeroes)];
        assert_eq!(found_in(&file, &query(2 * MIB, MIB)), expected);
    }
}
