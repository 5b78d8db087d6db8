//! The core alone, with a catalog that is a few values: what it wants done, and in which order.

use std::sync::Arc;

use proto::export_name::{AttachmentExportName, PROBE_SLOT, Secret};

use super::*;
use crate::catalog::{AttachmentRecord, BackendKind, VolumeRecord};
use crate::data::admission::NotAdmitted;
use crate::data::gate::events::{Asked, CatalogFailed, NamedVolume};
use crate::tls::rights::Rights;

const VOLUME: Uuid = Uuid::from_u128(1);
const ATTACHMENT: Uuid = Uuid::from_u128(2);
/// Of the same volume, for tests in which it is shared.
const OTHER: Uuid = Uuid::from_u128(3);
const BOUNDS: Bounds = Bounds {
    open_timeout: Duration::from_secs(40),
    fence_timeout: Duration::from_secs(30),
    export_by_name: true,
};

/// A core, whose look-ups are answered from here.
struct Driver {
    core: Core,
    now: Instant,
    is_attached: bool,
    has_volume: bool,
    can_persist: bool,
    /// So many losses, the next ones, are recorded nowhere.
    unrecorded: u32,
    is_readable: bool,
    asked: u64,
}

fn secret(digit: &str) -> Secret {
    Secret::parse(&digit.repeat(64)).unwrap()
}

fn volume() -> VolumeRecord {
    VolumeRecord {
        name: "a".to_owned(),
        volume_uid: VOLUME,
        capacity_bytes: 1 << 20,
        block_size_bytes: 512,
        backend: BackendKind::File,
        write_cache_on: true,
        incarnation: 0,
        created_at_ms: 0,
        settings: Default::default(),
    }
}

fn attachment() -> AttachmentRecord {
    AttachmentRecord {
        attachment_id: ATTACHMENT,
        volume_uid: VOLUME,
        node_id: "node".to_owned(),
        read_only: false,
        secret: secret("a"),
        generation: 1,
        session_epoch: 0,
        created_at_ms: 0,
        boot_id: String::new(),
        is_shared: false,
    }
}

fn name(epoch: u64, slot: u32) -> String {
    AttachmentExportName { attachment_id: ATTACHMENT, secret: secret("a"), epoch, slot }.expose()
}

impl Driver {
    fn new() -> Self {
        let now = Instant::now();
        Self {
            core: Core::new(BOUNDS, now),
            now,
            is_attached: true,
            has_volume: true,
            can_persist: true,
            unrecorded: 0,
            is_readable: true,
            asked: 0,
        }
    }

    fn found<T>(&self, found: Option<T>) -> Result<Option<T>, CatalogFailed> {
        if self.is_readable { Ok(found) } else { Err(CatalogFailed) }
    }

    /// What the core wants, in words, all of it done but opening; in the order it was done.
    fn carry_out(&mut self, mut outputs: VecDeque<Output>) -> Vec<String> {
        let mut done = Vec::new();
        while let Some(output) = outputs.pop_front() {
            let (words, answer) = self.perform(output);
            done.push(words);
            if let Some(answer) = answer {
                self.core.handle(self.now, answer, &mut outputs);
            }
        }
        done
    }

    fn perform(&mut self, output: Output) -> (String, Option<Input>) {
        match output {
            Output::FindAttachment { asked, name } => {
                let is_it = self.is_attached && [ATTACHMENT, OTHER].contains(&name.attachment_id);
                let attachment = AttachmentRecord { attachment_id: name.attachment_id, ..attachment() };
                let found = self.found(is_it.then_some(attachment));
                ("find attachment".to_owned(), Some(Input::AttachmentFound { asked, name, found }))
            }
            Output::FindExport(claim) => {
                let found = self.found(self.has_volume.then(volume));
                ("find volume".to_owned(), Some(Input::ExportFound { claim, found }))
            }
            Output::FindName { asked, name } => {
                let found = (name == "a" && self.has_volume)
                    .then(|| NamedVolume { volume: volume(), is_attached: self.is_attached });
                ("find name".to_owned(), Some(Input::NameFound { asked, found: self.found(found) }))
            }
            Output::OpenedUnder { generation, .. } => (format!("opened under {generation}"), None),
            Output::Persist { attachment_id, epoch } => {
                let is_persisted = self.can_persist;
                let answer = Input::Persisted { attachment_id, epoch, is_persisted };
                (format!("persist {epoch}"), Some(answer))
            }
            Output::Open { .. } => ("open".to_owned(), None),
            Output::Answer(granted) => {
                let connection = granted.connection;
                let result = if self.has_volume { Ok(()) } else { Err(NotServed::Unknown) };
                (format!("answer {}", connection.0), Some(Input::Answered { connection, result }))
            }
            Output::Refuse { connection, refusal, .. } => {
                (format!("refuse {}: {}", connection.0, refusal.text()), None)
            }
            Output::Close { connection, .. } => (format!("close {}", connection.0), None),
            Output::RecordLoss { volume_uid, then } => {
                let is_recorded = self.unrecorded == 0;
                self.unrecorded = self.unrecorded.saturating_sub(1);
                let answer = Input::LossRecorded { volume_uid, is_recorded, then };
                ("record loss".to_owned(), Some(answer))
            }
            Output::LossKnown { .. } => ("loss known".to_owned(), None),
            Output::FailSyncs { errno, .. } => (format!("fail syncs: {errno}"), None),
            Output::RaiseIncarnation { call } => (format!("raise incarnation, call {}", call.0), None),
            Output::Mark { volume_uid, connection } => {
                let is_marked = self.can_persist;
                (
                    format!("mark for {}", connection.0),
                    Some(Input::Marked { volume_uid, connection, is_marked }),
                )
            }
            Output::GoOn { connection, is_marked, .. } => {
                (format!("go on {}: {is_marked}", connection.0), None)
            }
            Output::Retire { .. } => ("retire".to_owned(), None),
            Output::Fenced { call, result } => (format!("fenced, call {}: {}", call.0, result.is_ok()), None),
            Output::LookWhetherGone { attachment_id } => {
                let answer = (!self.is_attached).then_some(Input::AttachmentGone { attachment_id });
                ("look whether gone".to_owned(), answer)
            }
            Output::Released { call, result } => {
                (format!("released, call {}: {}", call.0, result.is_ok()), None)
            }
            Output::CopyAnswered { call, result, .. } => {
                (format!("copy answered, call {}: {result:?}", call.0), None)
            }
            Output::LossAnswered { call, is_recorded } => {
                (format!("loss answered, call {}: {is_recorded}", call.0), None)
            }
        }
    }

    fn tell(&mut self, input: Input) -> Vec<String> {
        let mut outputs = VecDeque::new();
        self.core.handle(self.now, input, &mut outputs);
        self.carry_out(outputs)
    }

    fn pass(&mut self, time: Duration) -> Vec<String> {
        self.now += time;
        let mut outputs = VecDeque::new();
        self.core.check_deadlines(self.now, &mut outputs);
        self.carry_out(outputs)
    }

    fn ask(&mut self, kind: OpenKind, name: String, beyond: Option<NotAdmitted>) -> Vec<String> {
        self.asked += 1;
        let (connection, rights) = (ConnectionId(self.asked), Arc::new(Rights::everything()));
        self.tell(Input::Open { asked: Asked { connection, ring: 0, kind, rights, beyond }, name })
    }

    fn go(&mut self, epoch: u64, slot: u32) -> Vec<String> {
        self.ask(OpenKind::Go, name(epoch, slot), None)
    }

    /// The same on the other attachment.
    fn go_other(&mut self, epoch: u64) -> Vec<String> {
        let other =
            AttachmentExportName { attachment_id: OTHER, secret: secret("a"), epoch, slot: 0 }.expose();
        self.ask(OpenKind::Go, other, None)
    }

    fn opened(&mut self) -> Vec<String> {
        self.tell(Input::VolumeOpened { volume_uid: VOLUME, result: Ok(()) })
    }

    fn closed(&mut self, connection: u64) -> Vec<String> {
        self.tell(Input::Closed { connection: ConnectionId(connection) })
    }

    fn lost_writes(&mut self) -> Vec<String> {
        self.tell(Input::LostWrites { volume_uid: VOLUME })
    }

    /// With connection 1 served in epoch 1, slot 0.
    fn serving() -> Self {
        let mut driver = Self::new();
        driver.go(1, 0);
        assert_eq!(driver.opened(), ["answer 1"]);
        driver
    }
}

#[test]
fn an_open_is_answered_once_its_epoch_is_recorded_and_its_volume_open() {
    let mut driver = Driver::new();
    let asked = driver.go(1, 0);
    assert_eq!(asked, ["find attachment", "find volume", "opened under 1", "persist 1", "open"]);
    assert_eq!(driver.go(1, 1), ["find attachment", "find volume", "opened under 1"], "it waits");
    assert_eq!(driver.opened(), ["answer 1", "answer 2"]);
    assert_eq!(driver.opened(), [""; 0], "nobody waits for it");
    assert_eq!((driver.core.connections_of(ATTACHMENT), driver.core.connections_of_volume(VOLUME)), (2, 2));
}

#[test]
fn a_wrong_secret_is_not_told_from_an_unknown_attachment() {
    let mut driver = Driver::new();
    let wrong = AttachmentExportName { attachment_id: ATTACHMENT, secret: secret("b"), epoch: 9, slot: 0 };
    let unknown = AttachmentExportName { attachment_id: Uuid::from_u128(9), ..wrong.clone() };
    assert_eq!(
        driver.ask(OpenKind::Go, wrong.expose(), None),
        ["find attachment", "refuse 1: no such export"]
    );
    assert_eq!(
        driver.ask(OpenKind::Go, unknown.expose(), None),
        ["find attachment", "refuse 2: no such export"]
    );
    assert_eq!(driver.core.connections_of_volume(VOLUME), 0);
}

#[test]
fn nobody_is_served_while_the_catalog_cannot_be_read_or_written() {
    let mut driver = Driver::new();
    driver.can_persist = false;
    let refused = driver.go(1, 0).pop().unwrap();
    assert_eq!(refused, "refuse 1: the server cannot record the session now");
    (driver.can_persist, driver.is_readable) = (true, false);
    let failed = "the server's catalog failed; try again";
    assert_eq!(driver.go(1, 0), ["find attachment".to_owned(), format!("refuse 2: {failed}")]);
    let named = driver.ask(OpenKind::Go, "a".to_owned(), None);
    assert_eq!(named, ["find name".to_owned(), format!("refuse 3: {failed}")]);
    driver.is_readable = true;
    assert_eq!(driver.go(1, 0).pop().unwrap(), "open", "it may be tried again");
}

#[test]
fn a_volume_that_is_deleted_while_it_is_opened_is_given_to_nobody() {
    let mut driver = Driver::new();
    driver.go(1, 0);
    driver.has_volume = false;
    assert_eq!(driver.opened(), ["answer 1", "refuse 1: no such export"]);
    assert_eq!((driver.core.connections_of(ATTACHMENT), driver.core.connections_of_volume(VOLUME)), (0, 0));
    let call = CallId(1);
    assert_eq!(
        driver.tell(Input::ReleaseVolume { volume_uid: VOLUME, call }),
        ["retire", "released, call 1: true"]
    );
}

#[test]
fn a_slot_is_taken_over_when_the_former_connection_has_drained() {
    let mut driver = Driver::serving();
    assert_eq!(driver.go(1, 0).pop().unwrap(), "close 1");
    assert_eq!(driver.closed(1), ["answer 2"]);
    assert_eq!(driver.go(2, 5), ["find attachment", "find volume", "opened under 1", "close 2"]);
    assert_eq!(driver.go(1, 1).pop().unwrap(), "refuse 4: a newer session of this attachment has begun");
    assert_eq!(driver.closed(2), ["persist 2", "answer 3"]);
}

#[test]
fn an_open_that_waits_too_long_is_refused_once_and_its_slot_is_free() {
    let mut driver = Driver::serving();
    driver.go(1, 0);
    assert_eq!(driver.core.next_deadline(), Some(driver.now + BOUNDS.open_timeout));
    assert_eq!(driver.pass(BOUNDS.open_timeout - Duration::from_millis(1)), [""; 0]);
    let late = "refuse 2: I/O of a former session has not finished yet; try again";
    assert_eq!(driver.pass(Duration::from_millis(1)), [late]);
    assert_eq!(driver.core.next_deadline(), None);
    assert_eq!(driver.closed(1), [""; 0], "nobody waits for it");
}

#[test]
fn a_volume_that_lost_writes_is_let_go_before_the_next_one_finds_it() {
    let mut driver = Driver::serving();
    assert_eq!(driver.lost_writes(), ["record loss", "loss known"]);
    assert_eq!(driver.go(1, 1).split_off(3), ["record loss", "loss known", "answer 2"], "another one has it");
    assert_eq!(driver.closed(2), [""; 0]);
    assert_eq!(driver.go(1, 0).pop().unwrap(), "close 1");
    assert_eq!(driver.closed(1), ["record loss", "retire", "open"]);
    assert_eq!(driver.opened(), ["answer 3"]);
    assert_eq!(driver.closed(3), [""; 0], "the new one lost nothing");
}

#[test]
fn of_several_writers_one_is_fenced_and_the_others_go_on() {
    let mut driver = Driver::serving();
    assert_eq!(driver.go_other(5).split_off(3), ["persist 5", "answer 2"], "an epoch of its own");
    assert_eq!(
        driver.go(2, 0).pop().unwrap(),
        "close 1",
        "a new session ends that of its own attachment alone"
    );
    assert_eq!(driver.closed(1), ["persist 2", "answer 3"]);
    let fence = Input::FenceAttachment { attachment_id: ATTACHMENT, generation: Some(1), call: CallId(7) };
    assert_eq!(driver.tell(fence), ["close 3"]);
    assert_eq!(driver.closed(3)[0], "fenced, call 7: true");
    assert_eq!(driver.go(3, 0).pop().unwrap(), "refuse 4: the attachment has been fenced");
    assert_eq!((driver.core.connections_of(ATTACHMENT), driver.core.connections_of(OTHER)), (0, 1));
    assert_eq!(driver.core.writers_of_volume(VOLUME), 1);
    assert_eq!(driver.go_other(6).pop().unwrap(), "close 2", "it is not fenced");
}

#[test]
fn a_loss_ends_the_connections_of_all_who_share_the_volume() {
    let mut driver = Driver::serving();
    driver.go_other(1);
    assert_eq!(driver.lost_writes(), ["record loss", "close 1", "close 2", "loss known"]);
    assert_eq!(driver.closed(1), [""; 0]);
    // The one that is quicker waits for the other: it would keep the volume as it is.
    assert_eq!(driver.go(1, 0).split_off(3), ["persist 1", "record loss"]);
    assert_eq!(driver.closed(2), ["record loss", "retire", "open"], "it is opened anew");
    assert_eq!(driver.go_other(1).split_off(3), ["persist 1"], "as soon as it is open");
    assert_eq!(driver.opened(), ["answer 3", "answer 4"]);
    assert_eq!(driver.closed(4), [""; 0], "it lost nothing");
}

#[test]
fn a_volume_of_which_a_sync_failed_while_it_was_opened_is_opened_once_more() {
    let mut driver = Driver::new();
    driver.go(1, 0);
    let failed = || Input::SyncFailed { volume_uid: VOLUME, errno: 5, call: CallId(2) };
    assert_eq!(driver.tell(failed()), ["raise incarnation, call 2"]);
    assert_eq!(driver.opened(), ["retire", "open"], "nobody is answered with what was looked at before");
    assert_eq!(driver.opened(), ["answer 1"]);
    let mut driver = Driver::new();
    driver.go(1, 0);
    driver.tell(failed());
    driver.tell(Input::VolumeOpened { volume_uid: VOLUME, result: Err(NotServed::Storage) });
    driver.go(1, 0);
    assert_eq!(driver.opened(), ["answer 2"], "of another opening it says nothing");
}

#[test]
fn a_loss_that_one_alone_heard_of_ends_its_connection_when_another_writer_comes() {
    let mut driver = Driver::serving();
    assert_eq!(driver.lost_writes(), ["record loss", "loss known"]);
    assert_eq!(driver.go_other(1).split_off(3), ["persist 1", "record loss", "close 1"]);
    assert_eq!(driver.closed(1), ["record loss", "retire", "open"], "it is opened anew");
    assert_eq!(driver.opened(), ["answer 2"]);
}

#[test]
fn who_waits_for_all_to_leave_is_refused_where_the_loss_is_recorded_nowhere() {
    let mut driver = Driver::serving();
    driver.go_other(1);
    driver.lost_writes();
    driver.closed(1);
    driver.go(1, 0);
    driver.unrecorded = 1;
    let refused = "refuse 3: the server cannot record that the volume lost writes";
    let done = driver.closed(2);
    assert_eq!(
        done,
        ["record loss", refused, "record loss", "retire"],
        "it is recorded when that one has left"
    );
}

#[test]
fn a_loss_that_is_recorded_nowhere_is_served_to_nobody() {
    let mut driver = Driver::serving();
    driver.unrecorded = 3;
    assert_eq!(driver.lost_writes(), ["record loss", "close 1"]);
    let refused = "refuse 2: the server cannot record that the volume lost writes";
    assert_eq!(driver.go(1, 1).split_off(3), ["record loss", refused]);
    assert_eq!(driver.closed(1), ["record loss"], "and it stays");
    assert_eq!(driver.go(1, 1).split_off(3), ["persist 1", "record loss", "retire", "open"]);
    assert_eq!(driver.opened(), ["answer 3"]);
}

#[test]
fn who_is_let_in_together_after_a_loss_finds_the_volume_opened_anew() {
    let mut driver = Driver::serving();
    driver.unrecorded = 2;
    driver.lost_writes();
    driver.go(2, 0);
    driver.go(2, 1);
    let done = driver.closed(1);
    assert_eq!(done, ["record loss", "persist 2", "record loss", "record loss", "retire", "open"]);
    assert_eq!(driver.opened(), ["answer 2", "answer 3"]);
}

#[test]
fn a_failed_sync_of_the_control_side_is_recorded_before_it_is_answered() {
    let mut driver = Driver::new();
    let failed = |call| Input::SyncFailed { volume_uid: VOLUME, errno: 5, call: CallId(call) };
    assert_eq!(driver.tell(failed(1)), ["raise incarnation, call 1"], "nobody has it open");
    driver.go(1, 0);
    driver.opened();
    let recorded = ["fail syncs: 5", "record loss", "loss known", "loss answered, call 2: true"];
    assert_eq!(driver.tell(failed(2)), recorded);
    driver.unrecorded = 1;
    let nowhere = ["fail syncs: 5", "record loss", "close 1", "loss answered, call 3: false"];
    assert_eq!(driver.tell(failed(3)), nowhere);
}

#[test]
fn beyond_the_limits_who_takes_a_slot_over_or_is_a_probe_is_let_in() {
    let mut driver = Driver::serving();
    let beyond = Some(NotAdmitted::TooMany(1));
    let mut last = |slot: u32, epoch: u64| driver.ask(OpenKind::Go, name(epoch, slot), beyond).pop().unwrap();
    let refused =
        "there are 1 connections, which is the limit (--connections-max); try again when others have left";
    assert_eq!(last(1, 1), format!("refuse 2: {refused}"));
    assert_eq!(last(PROBE_SLOT, 1), "answer 3");
    assert_eq!(last(0, 1), "close 1");
    let named = driver.ask(OpenKind::Go, "a".to_owned(), beyond);
    assert_eq!(named, [format!("refuse 5: {refused}")]);
    let in_the_old_way = driver.ask(OpenKind::ExportName, "a".to_owned(), beyond);
    assert_eq!(in_the_old_way, [format!("refuse 6: {refused}")]);
    assert_eq!(driver.ask(OpenKind::Info, "a".to_owned(), beyond), ["find name", "answer 7"]);
    assert_eq!(driver.core.connections_of_volume(VOLUME), 3, "who was only told has nothing");
}

#[test]
fn a_fence_is_answered_when_all_have_drained_or_too_late_and_lets_nobody_in() {
    let mut driver = Driver::serving();
    let fence =
        |call| Input::FenceAttachment { attachment_id: ATTACHMENT, generation: Some(1), call: CallId(call) };
    assert_eq!(driver.tell(fence(1)), ["close 1"]);
    assert_eq!(driver.core.next_deadline(), Some(driver.now + BOUNDS.fence_timeout));
    assert_eq!(driver.pass(BOUNDS.fence_timeout), ["fenced, call 1: false"]);
    assert_eq!(driver.go(2, 0).pop().unwrap(), "refuse 2: the attachment has been fenced");
    assert_eq!(driver.tell(fence(2)), [""; 0]);
    driver.is_attached = false;
    assert_eq!(driver.closed(1), ["fenced, call 2: true", "look whether gone"]);
    assert!(driver.core.fences.is_empty(), "the catalog refuses it from now on");
}

#[test]
fn writers_by_name_are_fenced_and_readers_stay() {
    let mut driver = Driver::new();
    driver.is_attached = false;
    driver.ask(OpenKind::Go, "a".to_owned(), None);
    driver.is_attached = true;
    driver.ask(OpenKind::Go, "a".to_owned(), None);
    assert_eq!(driver.opened(), ["answer 1", "answer 2"]);
    let call = CallId(1);
    assert_eq!(driver.tell(Input::FenceNamedWriters { volume_uid: VOLUME, call }), ["close 1"]);
    assert_eq!(driver.closed(1), ["fenced, call 1: true"]);
    let release = || Input::ReleaseVolume { volume_uid: VOLUME, call: CallId(2) };
    assert_eq!(driver.tell(release()), ["released, call 2: false"], "the reader has it");
    driver.closed(2);
    assert_eq!(driver.tell(release()), ["retire", "released, call 2: true"]);
}

#[test]
fn a_volume_is_not_released_while_it_is_being_opened() {
    let mut driver = Driver::new();
    driver.go(1, 0);
    driver.pass(BOUNDS.open_timeout);
    let release = || Input::ReleaseVolume { volume_uid: VOLUME, call: CallId(2) };
    assert_eq!(driver.tell(release()), ["released, call 2: false"]);
    driver.tell(Input::VolumeOpened { volume_uid: VOLUME, result: Err(NotServed::Storage) });
    assert_eq!(driver.tell(release()), ["released, call 2: true"]);
}

#[test]
fn those_who_come_again_are_closed_and_when_a_holder_left_is_known() {
    let mut driver = Driver::serving();
    driver.ask(OpenKind::Go, "a".to_owned(), None);
    let started = driver.now;
    driver.now += Duration::from_secs(5);
    assert_eq!(driver.core.holder_of(ATTACHMENT, driver.now), (1, driver.now - started));
    assert_eq!(driver.tell(Input::ReopenAttachments { volume_uid: VOLUME }), ["close 1"]);
    driver.closed(1);
    driver.now += Duration::from_secs(3);
    assert_eq!(driver.core.holder_of(ATTACHMENT, driver.now), (0, Duration::from_secs(3)));
    driver.tell(Input::HolderSeen { attachment_id: ATTACHMENT });
    assert_eq!(driver.core.holder_of(ATTACHMENT, driver.now), (0, Duration::ZERO));
}

#[test]
fn a_volume_is_opened_to_be_copied_and_not_released_meanwhile() {
    let mut driver = Driver::new();
    let copy = |call| Input::CopyVolume { volume_uid: VOLUME, call: CallId(call) };
    let release = |call| Input::ReleaseVolume { volume_uid: VOLUME, call: CallId(call) };
    assert_eq!(driver.tell(copy(1)), ["open"]);
    assert_eq!(driver.tell(copy(2)), [""; 0], "it waits for the same");
    assert_eq!(driver.tell(release(3)), ["released, call 3: false"]);
    let opened = driver.tell(Input::VolumeOpened { volume_uid: VOLUME, result: Ok(()) });
    assert_eq!(opened, ["copy answered, call 1: Ok(())", "copy answered, call 2: Ok(())"]);
    driver.tell(Input::CopyEnded { volume_uid: VOLUME });
    assert_eq!(driver.tell(release(4)), ["released, call 4: false"], "one goes on");
    driver.tell(Input::CopyEnded { volume_uid: VOLUME });
    assert_eq!(driver.tell(copy(5)), ["copy answered, call 5: Ok(())"], "it is open");
    driver.tell(Input::CopyEnded { volume_uid: VOLUME });
    assert_eq!(driver.tell(release(6)), ["retire", "released, call 6: true"]);
}

#[test]
fn who_wants_to_copy_is_told_why_not() {
    let mut driver = Driver::new();
    let copy = |call| Input::CopyVolume { volume_uid: VOLUME, call: CallId(call) };
    driver.tell(copy(1));
    let result = Err(NotServed::Storage);
    let told = driver.tell(Input::VolumeOpened { volume_uid: VOLUME, result });
    assert_eq!(told, ["copy answered, call 1: Err(NotServed(Storage))"]);
    driver.tell(copy(2));
    assert_eq!(driver.pass(BOUNDS.open_timeout), ["copy answered, call 2: Err(TooLate)"]);
    assert_eq!(driver.core.next_deadline(), None);
    driver.tell(Input::VolumeOpened { volume_uid: VOLUME, result: Ok(()) });
    driver.ask(OpenKind::Go, name(1, 0), None);
    driver.tell(Input::LostWrites { volume_uid: VOLUME });
    assert_eq!(driver.tell(copy(3)), ["copy answered, call 3: Err(LostWrites)"]);
}

#[test]
fn a_volume_that_lost_writes_and_nobody_has_is_opened_anew_to_be_copied() {
    let mut driver = Driver::serving();
    let copy = |call| Input::CopyVolume { volume_uid: VOLUME, call: CallId(call) };
    driver.closed(1);
    let errno = 5;
    driver.tell(Input::SyncFailed { volume_uid: VOLUME, errno, call: CallId(1) });
    driver.unrecorded = 1;
    let told = driver.tell(copy(2));
    assert_eq!(told, ["record loss", "copy answered, call 2: Err(NotServed(LossUnrecorded))"]);
    assert_eq!(driver.tell(copy(3)), ["record loss", "retire", "open"]);
    assert_eq!(driver.tell(copy(4)), [""; 0], "it waits for the same");
    let opened = driver.tell(Input::VolumeOpened { volume_uid: VOLUME, result: Ok(()) });
    assert_eq!(opened, ["copy answered, call 3: Ok(())", "copy answered, call 4: Ok(())"]);
}

/// A copier may notice what nobody who has the volume could: then there is nobody.
#[test]
fn who_is_about_to_get_a_volume_that_lost_writes_finds_it_opened_anew() {
    let mut driver = Driver::serving();
    driver.closed(1);
    let mut outputs = VecDeque::new();
    let rights = Arc::new(Rights::everything());
    let asked = Asked { connection: ConnectionId(2), ring: 0, kind: OpenKind::Go, rights, beyond: None };
    driver.core.handle(driver.now, Input::Open { asked, name: name(1, 0) }, &mut outputs);
    while !matches!(outputs.front(), Some(Output::Answer(_))) {
        let (_, answer) = driver.perform(outputs.pop_front().unwrap());
        if let Some(answer) = answer {
            driver.core.handle(driver.now, answer, &mut outputs);
        }
    }
    driver.core.handle(driver.now, Input::LostWrites { volume_uid: VOLUME }, &mut outputs);
    assert_eq!(driver.carry_out(outputs), ["record loss", "record loss", "retire", "open"]);
    assert_eq!(driver.opened(), ["answer 2"]);
}
