//! Rules of a queue that the simulator does not come to: a server that leaves, one that promises nothing, the last FLUSH, buffers that are
//! registered by hand, silence.

use std::collections::HashSet;

use proto::nbd::transmission::{NbdError, REQUEST_BYTES, Request, SIMPLE_REPLY_BYTES, SimpleReply};

use super::*;
use crate::device::queue::connection::{Origin, PayloadSource};
use crate::device::queue::io::Pages;
use crate::device::queue::stream::Stretch;

const BOX_BYTES: usize = 64 << 10;
const LARGE_BYTES: u32 = 4096;

/// What was asked for, for one connection.
#[derive(Default)]
struct FakeWire {
    outbox: Vec<u8>,
    inbox: Vec<u8>,
    /// The receive that is out.
    receiving: Option<Range<usize>>,
    payload: Option<Pages>,
    /// Requests that left, by cookie.
    sent: Vec<Request>,
    is_shut_down: bool,
    sockets: u32,
}

/// A ring of which every operation waits until the test lets it complete; sends complete at once.
#[derive(Default)]
struct FakeIo {
    wires: Vec<FakeWire>,
    commits: Vec<(u16, i32)>,
    by_hand: bool,
    registered: HashSet<u16>,
    unacknowledged: Option<Duration>,
    /// Requests whose memory is free, or, without a reply, may still be read by a socket.
    released: Vec<(u16, bool)>,
    /// What was asked for was submitted beside the passes: how many commits that were, and how many losses were counted then.
    submitted: Vec<(usize, u64)>,
    unflushed: Option<Arc<Unflushed>>,
}

struct NoPayload;

impl PayloadSource for NoPayload {
    type Error = io::Error;

    fn gather(&mut self, _: u16, _: &mut [u8]) -> io::Result<()> {
        Ok(())
    }

    fn stage(&mut self, _: u16, _: u32) -> io::Result<Option<Origin>> {
        Ok(Some(Origin::Staging))
    }
}

impl QueueIo for FakeIo {
    type Socket = ();
    type Source<'a> = NoPayload;

    fn fetch(&mut self, _: u16) {}

    fn commit_and_fetch(&mut self, tag: u16, result: i32) {
        assert!(!self.registered.contains(&tag), "tag {tag} is given back while its pages are registered");
        self.commits.push((tag, result));
    }

    fn submit(&mut self) -> io::Result<()> {
        let losses = self.unflushed.as_ref().map_or(0, |unflushed| unflushed.losses());
        self.submitted.push((self.commits.len(), losses));
        Ok(())
    }

    fn needs_registration(&self, _: u16) -> bool {
        self.by_hand
    }

    fn register(&mut self, tag: u16) {
        assert!(self.registered.insert(tag));
    }

    fn unregister(&mut self, tag: u16) {
        assert!(self.registered.remove(&tag));
    }

    fn release(&mut self, tag: u16, has_reply: bool) {
        self.released.push((tag, has_reply));
    }

    fn copy_to_request(&mut self, _: u16, _: u32) -> io::Result<()> {
        Ok(())
    }

    fn inbox_bytes(&self) -> usize {
        BOX_BYTES
    }

    fn header(&self, connection: u16, place: Range<usize>) -> [u8; SIMPLE_REPLY_BYTES] {
        self.wires[usize::from(connection)].inbox[place].try_into().unwrap()
    }

    fn scatter(&mut self, _: u16, _: Range<usize>, _: u16) -> io::Result<()> {
        Ok(())
    }

    fn compact_inbox(&mut self, connection: u16, left: Range<usize>) {
        self.wires[usize::from(connection)].inbox.copy_within(left, 0);
    }

    fn receive_inbox(&mut self, connection: u16, part: Range<usize>, _: bool) {
        self.wires[usize::from(connection)].receiving = Some(part);
    }

    fn receive_payload(&mut self, connection: u16, pages: Pages) {
        assert_eq!(pages.by_hand, self.by_hand);
        self.wires[usize::from(connection)].payload = Some(pages);
    }

    fn outbox(&mut self, connection: u16) -> (&mut [u8], NoPayload) {
        (&mut self.wires[usize::from(connection)].outbox, NoPayload)
    }

    fn send_outbox_now(&mut self, connection: u16, start: usize, rest: Stretch, _: bool) -> io::Result<u32> {
        let wire = &mut self.wires[usize::from(connection)];
        let bytes = &wire.outbox[start..start + rest.rest_bytes() as usize];
        for header in bytes.chunks_exact(REQUEST_BYTES) {
            wire.sent.push(Request::decode(header.try_into().unwrap()).unwrap());
        }
        Ok(rest.rest_bytes())
    }

    fn send_staged_now(&mut self, _: u16, _: u16, rest: Stretch) -> io::Result<u32> {
        Ok(rest.rest_bytes())
    }

    fn wait_for_room(&mut self, _: u16) {}

    fn send_outbox(&mut self, _: u16, _: usize, _: Stretch, _: bool) {}

    fn send_payload(&mut self, _: u16, _: Pages, _: bool) {}

    fn shut_down(&mut self, connection: u16) {
        self.wires[usize::from(connection)].is_shut_down = true;
    }

    fn take_control_record(&mut self, _: u16) -> Option<String> {
        None
    }

    fn unacknowledged_for(&self, connection: u16) -> Option<Duration> {
        self.unacknowledged.filter(|_| connection == 1)
    }

    fn are_keys_worn(&self, _: u16) -> bool {
        false
    }

    fn drop_references(&mut self, _: u16) {}

    fn renew_staging(&mut self) {}

    fn replace_socket(&mut self, connection: u16, (): ()) -> io::Result<()> {
        let wire = &mut self.wires[usize::from(connection)];
        (wire.is_shut_down, wire.sockets) = (false, wire.sockets + 1);
        Ok(())
    }
}

/// A queue of four tags.
struct World {
    core: QueueCore,
    io: FakeIo,
    now: Instant,
}

impl World {
    fn new(nr_connections: u16, resend: Resend, by_hand: bool) -> Self {
        Self::with(Unflushed::new(1), nr_connections, resend, by_hand)
    }

    fn with(unflushed: Unflushed, nr_connections: u16, resend: Resend, by_hand: bool) -> Self {
        let now = Instant::now();
        let spec = QueueSpec {
            queue_id: 0,
            queue_depth: 4,
            nr_connections,
            small_bytes_max: 0,
            volatile_cache: true,
            resend,
            reply_timeout: Duration::from_secs(20),
            unflushed: Arc::new(unflushed),
        };
        let unflushed = Some(Arc::clone(&spec.unflushed));
        let wire =
            || FakeWire { outbox: vec![0; BOX_BYTES], inbox: vec![0; BOX_BYTES], ..FakeWire::default() };
        let wires = (0..nr_connections).map(|_| wire()).collect();
        let io = FakeIo { wires, by_hand, unflushed, ..FakeIo::default() };
        let mut world = Self { core: QueueCore::new(spec, now), io, now };
        world.core.start(&mut world.io);
        world
    }

    fn pass(&mut self) {
        let now = self.now;
        self.core.end_of_pass(&mut self.io, || now);
    }

    fn request(&mut self, tag: u16, command: Command) {
        let length_bytes = if command == Command::Flush { 0 } else { LARGE_BYTES };
        let request = BlockRequest { command, flags: CommandFlags::NONE, offset_bytes: 0, length_bytes };
        self.core.handle_request(&mut self.io, tag, Ok(request));
        self.pass();
    }

    /// The cookie of the request that was sent last on a connection.
    fn cookie(&self, connection: u16) -> u64 {
        self.io.wires[usize::from(connection)].sent.last().unwrap().cookie
    }

    /// The server answers; a READ's payload comes, too.
    fn reply(&mut self, connection: u16, cookie: u64, error: u32) {
        let wire = &mut self.io.wires[usize::from(connection)];
        let place = wire.receiving.take().expect("a receive is out");
        wire.inbox[place.start..][..SIMPLE_REPLY_BYTES]
            .copy_from_slice(&SimpleReply { error, cookie }.encode());
        self.core.handle_inbox(&mut self.io, connection, SIMPLE_REPLY_BYTES as i32);
        self.pass();
        if let Some(pages) = self.io.wires[usize::from(connection)].payload.take() {
            let bytes = pages.rest.rest_bytes() as i32;
            self.core.handle_payload(&mut self.io, connection, pages.tag, bytes);
            self.pass();
            // Held back for a payload that may follow.
            self.pass();
        }
    }

    /// The receives that are out end, as those of sockets that were shut down.
    fn reap(&mut self) {
        for connection in 0..self.io.wires.len() as u16 {
            let wire = &mut self.io.wires[usize::from(connection)];
            assert!(wire.is_shut_down);
            if wire.receiving.take().is_some() {
                self.core.handle_inbox(&mut self.io, connection, 0);
            }
        }
        self.pass();
    }

    fn lost(&mut self) -> Lost {
        match self.core.take_event() {
            Some(LinkEvent::Disconnected(lost)) => lost,
            other => panic!("not lost: {other:?}"),
        }
    }

    fn connect(&mut self) {
        let sockets = self.io.wires.iter().map(|_| ()).collect();
        self.core.connect(&mut self.io, sockets, self.now).unwrap();
        self.pass();
    }

    fn commits(&mut self) -> Vec<(u16, i32)> {
        std::mem::take(&mut self.io.commits)
    }
}

const EIO: i32 = -(NbdError::Eio as i32);

#[test]
fn a_server_that_leaves_gets_nothing_more_and_is_left_once_it_owes_nothing_on_any_connection() {
    let mut world = World::new(2, Resend::Everything, false);
    world.request(0, Command::Read);
    world.request(1, Command::Write);
    let (read, write) = (world.cookie(0), world.cookie(1));
    world.reply(1, write, NbdError::Eshutdown as u32);
    assert!(world.core.is_up() && world.commits().is_empty());
    world.request(2, Command::Write);
    world.request(3, Command::Write);
    assert!(world.io.wires.iter().all(|wire| wire.sent.len() == 1), "nothing more is sent");
    world.reply(0, read, 0);
    assert!(!world.core.is_up(), "the last that it owed has come");
    world.reap();
    assert_eq!(world.commits(), [(0, LARGE_BYTES as i32)]);
    let lost = world.lost();
    assert!(matches!(lost.loss, Loss::Leaving) && !lost.served_nothing);
    world.connect();
    let sent: usize = world.io.wires.iter().map(|wire| wire.sent.len()).sum();
    assert_eq!(sent, 2 + 3, "what was refused, and what waited");
}

#[test]
fn a_queue_that_is_to_leave_waits_for_what_it_is_owed_and_no_longer() {
    let mut world = World::new(2, Resend::ReadsOnly, false);
    world.request(0, Command::Write);
    let write = world.cookie(0);
    world.core.leave(&mut world.io);
    world.request(1, Command::Write);
    assert!(world.core.is_up(), "a reply is owed");
    world.reply(0, write, 0);
    world.reap();
    assert_eq!(world.commits(), [(0, LARGE_BYTES as i32)]);
    assert!(matches!(world.lost().loss, Loss::Leaving));
    world.core.leave(&mut world.io);
    world.connect();
    let sent: usize = world.io.wires.iter().map(|wire| wire.sent.len()).sum();
    assert_eq!(sent, 2, "what came meanwhile is sent now");
    world.core.disconnect(&mut world.io, "cut".to_owned());
    world.reap();
    world.connect();
    world.core.leave(&mut world.io);
    assert!(!world.core.is_up(), "nothing is owed");
}

#[test]
fn a_server_that_only_refuses_soon_after_it_was_reached_served_nothing() {
    let mut world = World::new(1, Resend::Everything, false);
    world.now += Duration::from_secs(2);
    world.request(0, Command::Write);
    world.reply(0, world.cookie(0), NbdError::Eshutdown as u32);
    world.reap();
    assert!(world.lost().served_nothing);
}

#[test]
fn after_a_loss_to_a_server_that_promises_nothing_the_next_flush_fails() {
    let mut world = World::new(1, Resend::ReadsOnly, false);
    world.request(0, Command::Write);
    world.reply(0, world.cookie(0), 0);
    world.request(1, Command::Write);
    world.request(2, Command::Read);
    world.core.disconnect(&mut world.io, "cut".to_owned());
    world.reap();
    assert_eq!(world.commits(), [(0, LARGE_BYTES as i32), (1, EIO)], "no WRITE is sent twice");
    assert!(matches!(world.lost().loss, Loss::Told(_)));
    world.connect();
    assert_eq!(world.io.wires[0].sent.len(), 4, "the READ is");
    world.request(0, Command::Flush);
    assert_eq!(world.commits(), [(0, EIO)]);
    world.request(0, Command::Flush);
    world.reply(0, world.cookie(0), 0);
    assert_eq!(world.commits(), [(0, 0)], "one");
}

#[test]
fn pages_that_are_registered_by_hand_are_given_back_unregistered() {
    let mut world = World::new(1, Resend::Everything, true);
    world.request(0, Command::Read);
    assert!(world.io.wires[0].sent.is_empty(), "the pages are not there yet");
    world.core.handle_registered(&mut world.io, 0, 0);
    world.pass();
    world.reply(0, world.cookie(0), 0);
    assert_eq!(world.commits(), [(0, LARGE_BYTES as i32)]);
    world.request(1, Command::Flush);
    world.reply(0, world.cookie(0), 0);
    assert_eq!(world.commits(), [(1, 0)], "without data none are needed");
    world.request(2, Command::Read);
    world.io.registered.remove(&2);
    world.core.handle_registered(&mut world.io, 2, -libc::ENOMEM);
    assert_eq!(world.commits(), [(2, EIO)]);
}

#[test]
fn requests_that_come_after_giving_up_fail_at_once_until_there_are_connections() {
    let mut world = World::new(1, Resend::Everything, true);
    world.core.disconnect(&mut world.io, "cut".to_owned());
    world.request(0, Command::Flush);
    world.core.give_up();
    world.request(1, Command::Flush);
    assert_eq!(world.commits(), [(1, EIO)], "late bytes may still come to the pages of the first");
    world.reap();
    assert_eq!(world.commits(), [(0, EIO)]);
    world.request(2, Command::Write);
    world.core.handle_registered(&mut world.io, 2, 0);
    assert_eq!(world.commits(), [(2, EIO)]);
    world.connect();
    world.request(3, Command::Flush);
    assert_eq!((world.commits(), world.io.wires[0].sent.len()), (vec![], 1));
}

#[test]
fn the_last_flush_is_sent_where_something_was_not_flushed() {
    let mut world = World::new(1, Resend::Everything, false);
    assert_eq!(world.core.begin_final_flush(), Ok(false), "nothing was written");
    world.request(0, Command::Write);
    world.reply(0, world.cookie(0), 0);
    assert_eq!(world.core.begin_final_flush(), Ok(true));
    world.pass();
    assert_eq!(world.io.wires[0].sent.last().unwrap().command, Command::Flush);
    assert_eq!(world.core.take_final_flush(), None);
    world.reply(0, world.cookie(0), 0);
    assert_eq!(world.core.take_final_flush(), Some(Ok(())));
    assert_eq!(world.core.begin_final_flush(), Ok(false), "it covered all");
    world.core.close(&mut world.io);
    world.reap();
    assert!(!world.core.has_operations_out());
    assert!(world.core.take_event().is_none(), "nobody is to dial for a device that is gone");
}

#[test]
fn a_server_that_may_have_forgotten_gets_no_last_flush() {
    let mut world = World::new(1, Resend::ReadsOnly, false);
    world.request(0, Command::Write);
    world.reply(0, world.cookie(0), 0);
    world.core.disconnect(&mut world.io, "cut".to_owned());
    world.reap();
    assert!(world.core.begin_final_flush().is_err());
}

#[test]
fn silence_is_told_from_half_of_the_time_out_on_and_its_end_once() {
    let mut world = World::new(2, Resend::Everything, false);
    world.request(0, Command::Write);
    for _ in 0..9 {
        world.core.handle_tick(&mut world.io);
    }
    assert!(world.core.take_event().is_none());
    world.core.handle_tick(&mut world.io);
    let Some(LinkEvent::Silent(Some(silence))) = world.core.take_event() else { panic!("it is not told") };
    assert_eq!(silence.silent, Duration::from_secs(10));
    let write = world.cookie(0);
    world.pass();
    assert_eq!(world.io.wires[0].sent.len(), 2, "it is pinged");
    world.reply(0, write, 0);
    world.core.handle_tick(&mut world.io);
    assert!(matches!(world.core.take_event(), Some(LinkEvent::Silent(None))));
    world.core.handle_tick(&mut world.io);
    assert!(world.core.take_event().is_none());
}

#[test]
fn a_network_that_acknowledges_nothing_is_left_where_nothing_comes_either() {
    let mut world = World::new(2, Resend::Everything, false);
    world.request(0, Command::Write);
    world.request(1, Command::Write);
    world.io.unacknowledged = Some(NETWORK_TIMEOUT);
    for _ in 0..4 {
        world.core.handle_tick(&mut world.io);
    }
    assert!(world.core.is_up(), "it may have come a moment ago");
    world.core.handle_tick(&mut world.io);
    world.reap();
    let lost = world.lost();
    assert!(matches!(lost.loss, Loss::Unacknowledged));
    assert_eq!((lost.connection, lost.oldest), (1, Some(Duration::from_secs(5))));
}

#[test]
fn who_breaks_the_protocol_gets_nothing_of_that_connection_twice() {
    let mut world = World::new(2, Resend::Everything, false);
    world.request(0, Command::Write);
    world.request(1, Command::Write);
    world.reply(1, 77 << 16, 0);
    world.reap();
    assert_eq!(world.commits(), [(1, EIO)]);
    assert!(matches!(world.lost().loss, Loss::Protocol(_)));
    world.connect();
    assert_eq!(world.io.wires[0].sent.len(), 2, "the other connection's is sent again");
}

#[test]
fn memory_is_free_again_only_where_the_server_has_replied() {
    let mut world = World::new(1, Resend::ReadsOnly, false);
    world.request(0, Command::Write);
    world.reply(0, world.cookie(0), NbdError::Eio as u32);
    world.request(1, Command::Write);
    world.core.disconnect(&mut world.io, "cut".to_owned());
    world.reap();
    assert_eq!(world.commits(), [(0, EIO), (1, EIO)]);
    assert_eq!(world.io.released, [(0, true), (1, false)]);
}

#[test]
fn what_was_answered_just_before_a_loss_counts_when_it_is_asked_what_a_server_may_have_forgotten() {
    let mut world = World::new(2, Resend::ReadsOnly, false);
    world.request(0, Command::Write);
    let write = world.cookie(0);
    let wire = &mut world.io.wires[0];
    let place = wire.receiving.take().expect("a receive is out");
    wire.inbox[place.start..][..SIMPLE_REPLY_BYTES]
        .copy_from_slice(&SimpleReply { error: 0, cookie: write }.encode());
    // Both in one pass.
    world.core.handle_inbox(&mut world.io, 0, SIMPLE_REPLY_BYTES as i32);
    world.core.disconnect(&mut world.io, "cut".to_owned());
    world.reap();
    assert_eq!(world.io.submitted, [(1, 0)], "its user knows of it before the loss is counted");
    assert_eq!(world.core.unflushed.losses(), 1);
    assert_eq!(world.commits(), [(0, LARGE_BYTES as i32)]);
    world.connect();
    world.request(1, Command::Flush);
    assert_eq!(world.commits(), [(1, EIO)], "the server may have forgotten the WRITE");
}

/// A loss that another queue has noticed, with something acknowledged that was not flushed.
fn another_queue_is_lost(world: &World) {
    world.core.unflushed.acknowledged(0);
    world.core.unflushed.connection_lost(0);
}

#[test]
fn the_failure_of_a_flush_that_may_have_begun_before_a_loss_does_not_tell_of_it() {
    let mut world = World::new(1, Resend::ReadsOnly, false);
    world.pass();
    another_queue_is_lost(&world);
    world.request(0, Command::Flush);
    assert_eq!(world.commits(), [(0, EIO)], "nobody knows whether the loss was before it");
    assert!(world.core.looks_again());
    world.pass();
    assert!(!world.core.looks_again());
    world.request(0, Command::Flush);
    assert_eq!(world.commits(), [(0, EIO)], "its users may have asked while the first one was on its way");
    world.request(0, Command::Flush);
    assert_eq!(world.commits(), [(0, EIO)], "this one began after it");
    world.request(0, Command::Flush);
    world.reply(0, world.cookie(0), 0);
    assert_eq!(world.commits(), [(0, 0)]);
}

#[test]
fn a_flush_that_is_answered_after_a_loss_is_not_believed_and_tells_nobody() {
    let mut world = World::new(1, Resend::ReadsOnly, false);
    world.request(0, Command::Flush);
    another_queue_is_lost(&world);
    world.reply(0, world.cookie(0), 0);
    assert_eq!(world.commits(), [(0, EIO)]);
    world.pass();
    for _ in 0..2 {
        world.request(0, Command::Flush);
        assert_eq!(world.commits(), [(0, EIO)]);
    }
    assert_eq!(world.core.begin_final_flush(), Ok(true));
    another_queue_is_lost(&world);
    world.pass();
    world.reply(0, world.cookie(0), 0);
    assert_eq!(world.core.take_final_flush(), Some(Err(-EIO)));
}

/// The block layer has one FLUSH under way on a queue: whoever asks for one meanwhile waits for the next.
#[test]
fn the_flush_after_one_that_a_loss_has_ended_does_not_tell_of_it() {
    let mut world = World::new(1, Resend::ReadsOnly, false);
    world.request(0, Command::Write);
    world.reply(0, world.cookie(0), 0);
    world.commits();
    world.request(1, Command::Flush);
    world.core.disconnect(&mut world.io, "cut".to_owned());
    world.reap();
    assert_eq!(world.commits(), [(1, EIO)]);
    world.connect();
    world.pass();
    for what in ["its users may have asked before the loss", "this one's have not"] {
        world.request(1, Command::Flush);
        assert_eq!(world.commits(), [(1, EIO)], "{what}");
    }
    world.request(1, Command::Flush);
    world.reply(0, world.cookie(0), 0);
    assert_eq!(world.commits(), [(1, 0)]);
}

#[test]
fn the_first_flush_after_the_end_of_a_device_process_does_not_tell_of_it() {
    let unflushed = Unflushed::new(1);
    unflushed.acknowledged(0);
    let mut world = World::with(unflushed, 1, Resend::ReadsOnly, false);
    world.core.disconnect(&mut world.io, "its sockets are nobody's".to_owned());
    world.reap();
    world.connect();
    world.pass();
    for what in ["it may have waited for one that failed with the process", "this one has not"] {
        world.request(0, Command::Flush);
        assert_eq!(world.commits(), [(0, EIO)], "{what}");
    }
    world.request(0, Command::Flush);
    world.reply(0, world.cookie(0), 0);
    assert_eq!(world.commits(), [(0, 0)]);
}

#[test]
fn a_queue_that_has_looked_after_a_loss_fails_one_flush() {
    let mut world = World::new(1, Resend::ReadsOnly, false);
    world.pass();
    another_queue_is_lost(&world);
    // Nothing but the main thread's word has it look.
    world.core.completion_came();
    world.pass();
    assert!(world.core.looks_again());
    world.pass();
    world.request(0, Command::Flush);
    assert_eq!(world.commits(), [(0, EIO)]);
    world.request(0, Command::Flush);
    world.reply(0, world.cookie(0), 0);
    assert_eq!(world.commits(), [(0, 0)], "one is enough");
}
