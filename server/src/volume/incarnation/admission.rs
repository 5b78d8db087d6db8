//! How a volume that is being opened is compared with what is remembered of it: one step after the other, each carried out outside.
//!
//! ```text
//!   Lock → (AskWriteBack) → Look → (EndAttachment) → (DropCache) → Write → Settle → (Remove) → Done
//!           at the start:   Look → (EndAttachment)               → Write → Settle → (Remove) → Done
//! ```
//! A server may be killed between any two steps, and the order is made for that: the storage is looked at when no predecessor's I/O
//! can change it any more; what the cache has and the disk may not is dropped before the record is written anew, which says so; the
//! record is written before the catalog. Where neither takes a loss, the former record stays, here and in its file:
//! the next one notices it again. Between [`Step::Write`] and [`Writing::written`] nobody else may be heard.
//! Never: does I/O or reads a clock. `mod.rs` carries the steps out, and so does the simulator.

use uuid::Uuid;

use super::core::Core;
use super::history::{Loss, Record, Seen, Verdict, judge};

/// Why a volume is not served that could be looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Withheld {
    /// It is not what its holder knows, whose attachment has ended.
    #[error("{0}: the volume's attachment has ended")]
    RolledBack(Loss),
    /// A loss of writes was recorded while it was being opened.
    #[error("a sync of the volume failed while it was being opened")]
    Changed,
    /// It lost writes, and that can be written down nowhere.
    #[error(
        "the volume lost writes ({0}), which can be recorded neither in the catalog nor in the runtime directory"
    )]
    Unrecorded(Loss),
}

/// What is to be done next.
#[derive(Debug)]
pub enum Step {
    /// Wait for the lock of the volume's file.
    Lock(Locking),
    /// Ask whether the file system failed to write something back before this process opened a volume.
    AskWriteBack(Asking),
    /// Look at the storage, and at what the catalog has.
    Look(Looking),
    /// End the volume's attachment, whose holder knows another volume.
    EndAttachment(Ending),
    /// Drop what the page cache has of the file.
    DropCache(Judged),
    /// Write the record to a file of its own, in the place of the former one.
    Write(Record, Writing),
    /// Raise the number that the catalog has to what is known.
    Settle(Settling),
    /// Remove the former record, which could not be replaced: it would be held against whoever writes from now on.
    Remove(Removing),
    /// It may be served, or not.
    Done(Result<(), Withheld>),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Purpose {
    /// The volume is being opened.
    Opening,
    /// The server has just started.
    Start,
}

/// What was known when it began.
#[derive(Debug)]
struct Before {
    volume_uid: Uuid,
    purpose: Purpose,
    record: Option<Record>,
    incarnation: u64,
}

/// The file's lock is waited for.
#[derive(Debug)]
pub struct Locking {
    volume_uid: Uuid,
}

/// The file system is being asked.
#[derive(Debug)]
pub struct Asking(Before);

/// The storage is being looked at.
#[derive(Debug)]
pub struct Looking {
    before: Before,
    write_back_failed: bool,
}

/// The attachment is being ended.
#[derive(Debug)]
pub struct Ending {
    /// Later attachments have a higher generation than this.
    pub generation: u64,
    judged: Judged,
}

/// It is known what is to be made of what was seen.
#[derive(Debug)]
pub struct Judged {
    before: Before,
    seen: Seen,
    verdict: Verdict,
}

/// The record is being written.
#[derive(Debug)]
pub struct Writing {
    before: Before,
    loss: Option<Loss>,
}

/// The catalog is being told.
#[derive(Debug)]
pub struct Settling {
    before: Before,
    loss: Option<Loss>,
    is_in_file: bool,
}

/// The former record is being removed.
#[derive(Debug)]
pub struct Removing(Result<(), Withheld>);

impl Core {
    /// Begins to admit a volume, whose file is open.
    pub fn admit(&self, volume_uid: Uuid) -> Step {
        Step::Lock(Locking { volume_uid })
    }

    /// Begins to look at a volume that something is remembered of, before anybody opens or asks for it: what is noticed then is told
    /// from the start. A failed sync has raised it already; the rest of that is for the opening.
    pub fn look(&self, volume_uid: Uuid) -> Step {
        let before = self.before(volume_uid, Purpose::Start);
        Step::Look(Looking { before, write_back_failed: false })
    }

    fn before(&self, volume_uid: Uuid, purpose: Purpose) -> Before {
        let record = self.volumes.get(&volume_uid).and_then(|known| known.record.clone());
        Before { volume_uid, purpose, record, incarnation: self.incarnation(volume_uid) }
    }
}

impl Locking {
    /// No predecessor's I/O is under way any more.
    pub fn locked(self, core: &Core) -> Step {
        let before = core.before(self.volume_uid, Purpose::Opening);
        let is_admitted = core.volumes.get(&self.volume_uid).is_some_and(|known| known.is_admitted);
        if !is_admitted && core.may_have_failed_write_back() {
            return Step::AskWriteBack(Asking(before));
        }
        Step::Look(Looking { before, write_back_failed: false })
    }
}

impl Asking {
    /// Whether somebody had the volume open in this boot. What nobody had, nobody has written to.
    pub fn is_remembered(&self) -> bool {
        self.0.record.is_some()
    }

    /// Whether it did.
    pub fn answered(self, write_back_failed: bool) -> Step {
        Step::Look(Looking { before: self.0, write_back_failed })
    }
}

impl Looking {
    /// What is seen, but for what the file system was asked. With what is made of it, where
    /// clients are to be told of a loss from now on.
    pub fn seen(self, seen: Seen, core: &mut Core) -> (Option<Verdict>, Step) {
        let Self { before, write_back_failed } = self;
        // What was told and could be recorded nowhere counts as well.
        let incarnation = seen.incarnation.max(before.incarnation);
        let seen = Seen { incarnation, write_back_failed, ..seen };
        let verdict = judge(before.record.as_ref(), &seen);
        let is_news = !matches!(verdict.loss, None | Some(Loss::SyncFailed));
        if before.purpose == Purpose::Start && !is_news {
            return (None, Step::Done(Ok(())));
        }
        let judged = Judged { before, seen, verdict };
        let step =
            if verdict.loss.is_some_and(Loss::is_roll_back) { judged.end() } else { judged.go_on(core) };
        (verdict.loss.map(|_| verdict), step)
    }
}

impl Ending {
    /// It has ended; the generation is that which the volume has now: higher than before, so that the same roll-back is noticed
    /// again.
    pub fn ended(self, attach_generation: u64, core: &mut Core) -> Step {
        let mut judged = self.judged;
        judged.seen.attach_generation = attach_generation;
        judged.go_on(core)
    }
}

impl Judged {
    fn end(self) -> Step {
        let remembered = self.before.record.as_ref().map_or(0, |record| record.attach_generation);
        let generation = remembered.max(self.seen.attach_generation);
        Step::EndAttachment(Ending { generation, judged: self })
    }

    /// Before the record is written anew: who is killed meanwhile has the cache dropped by the next one.
    fn go_on(self, core: &mut Core) -> Step {
        if self.before.purpose == Purpose::Opening && self.verdict.drops_cache {
            return Step::DropCache(self);
        }
        self.dropped(core)
    }

    /// The cache has nothing any more that the disk may not have.
    pub fn dropped(self, core: &mut Core) -> Step {
        let Self { before, seen, verdict } = self;
        let has_lost = before.record.as_ref().is_some_and(|record| record.lost_writes);
        // What was only looked at is still to be dropped from the cache.
        let record = Record::of(seen, &verdict, before.purpose == Purpose::Start && has_lost);
        if !core.remember(before.volume_uid, &record, before.incarnation) {
            return Step::Done(Err(Withheld::Changed));
        }
        Step::Write(record, Writing { before, loss: verdict.loss })
    }
}

impl Writing {
    /// It is in its file, or not.
    pub fn written(self, is_written: bool, core: &mut Core) -> Step {
        core.written(self.before.volume_uid, is_written);
        Step::Settle(Settling { before: self.before, loss: self.loss, is_in_file: is_written })
    }
}

impl Settling {
    /// The catalog has it, or not.
    pub fn settled(self, is_in_catalog: bool, core: &mut Core) -> Step {
        let Self { before, loss, is_in_file } = self;
        let result = match loss {
            Some(loss) if !is_in_file && !is_in_catalog => {
                core.take_back(before.volume_uid, before.record);
                return Step::Done(Err(Withheld::Unrecorded(loss)));
            }
            // Who waits for it holds an attachment that has just ended.
            Some(loss) if loss.is_roll_back() => Err(Withheld::RolledBack(loss)),
            _ => Ok(()),
        };
        if before.purpose == Purpose::Opening {
            core.admitted(before.volume_uid);
        }
        if is_in_file { Step::Done(result) } else { Step::Remove(Removing(result)) }
    }
}

impl Removing {
    /// It is not there any more, or cannot be removed.
    pub fn removed(self) -> Step {
        Step::Done(self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::super::history::SessionMark;
    use super::super::record::encode;
    use super::*;

    const VOLUME: Uuid = Uuid::from_u128(2);

    fn seen(superblock: &str) -> Seen {
        Seen {
            incarnation: 3,
            attach_generation: 1,
            superblock: Some(superblock.to_owned()),
            file: "file".to_owned(),
            modified: String::new(),
            session: SessionMark { attachment_id: String::new(), epoch: 0 },
            write_back_failed: false,
        }
    }

    fn core() -> Core {
        Core::new("boot".to_owned(), "process".to_owned())
    }

    /// Carries steps out up to one that fits; `log`: their names.
    fn carry_out(
        core: &mut Core,
        mut step: Step,
        seen: &Seen,
        log: &mut Vec<&'static str>,
    ) -> Result<(), Withheld> {
        loop {
            let (name, next) = match step {
                Step::Lock(locking) => ("lock", locking.locked(core)),
                Step::AskWriteBack(asking) => ("ask", asking.answered(false)),
                Step::Look(looking) => ("look", looking.seen(seen.clone(), core).1),
                Step::EndAttachment(ending) => {
                    let generation = ending.generation;
                    ("end", ending.ended(generation + 1, core))
                }
                Step::DropCache(judged) => ("drop", judged.dropped(core)),
                Step::Write(_, writing) => ("write", writing.written(true, core)),
                Step::Settle(settling) => ("settle", settling.settled(true, core)),
                Step::Remove(removing) => ("remove", removing.removed()),
                Step::Done(result) => return result,
            };
            log.push(name);
            step = next;
        }
    }

    fn admit(core: &mut Core, seen: &Seen) -> (Result<(), Withheld>, Vec<&'static str>) {
        let mut log = Vec::new();
        let step = core.admit(VOLUME);
        (carry_out(core, step, seen, &mut log), log)
    }

    #[test]
    fn each_loss_goes_its_way_and_the_record_is_written_after_the_cache_and_before_the_catalog() {
        let mut core = core();
        assert_eq!(admit(&mut core, &seen("a")), (Ok(()), vec!["lock", "look", "write", "settle"]));
        core.raise(VOLUME);
        let (result, log) = admit(&mut core, &seen("a"));
        assert_eq!((result, core.incarnation(VOLUME)), (Ok(()), 5));
        assert_eq!(log, ["lock", "look", "drop", "write", "settle"]);
        core.opened_under(VOLUME, 7);
        let (result, log) = admit(&mut core, &seen("a"));
        assert_eq!(result, Err(Withheld::RolledBack(Loss::CatalogRolledBack)));
        assert_eq!(log, ["lock", "look", "end", "write", "settle"]);
        assert_eq!(core.record(VOLUME).map(|record| record.attach_generation), Some(8));
    }

    #[test]
    fn only_who_has_predecessors_asks_for_failed_write_back_and_only_once() {
        let mut successor = core();
        let mut first = core();
        admit(&mut first, &seen("a")).0.unwrap();
        let text = encode("boot", first.record(VOLUME).unwrap()).unwrap();
        successor.found(VOLUME, &text);
        assert_eq!(admit(&mut successor, &seen("a")).1, ["lock", "ask", "look", "write", "settle"]);
        assert_eq!(admit(&mut successor, &seen("a")).1, ["lock", "look", "write", "settle"]);
    }

    #[test]
    fn at_the_start_only_news_are_told_and_what_the_cache_has_is_still_dropped_later() {
        let mut core = core();
        let mut log = Vec::new();
        core.found(VOLUME, b"{");
        let step = core.look(VOLUME);
        carry_out(&mut core, step, &seen("a"), &mut log).unwrap();
        assert_eq!((log.as_slice(), core.incarnation(VOLUME)), (&["look", "write", "settle"][..], 4));
        assert!(core.record(VOLUME).is_some_and(|record| record.lost_writes));
        log.clear();
        let step = core.look(VOLUME);
        carry_out(&mut core, step, &seen("a"), &mut log).unwrap();
        assert_eq!(log, ["look"], "that a sync failed is no news");
        assert!(admit(&mut core, &seen("a")).1.contains(&"drop"));
    }

    #[test]
    fn what_is_raised_while_the_volume_is_looked_at_is_neither_forgotten_nor_served() {
        let mut core = core();
        admit(&mut core, &seen("a")).0.unwrap();
        let Step::Lock(locking) = core.admit(VOLUME) else { panic!("a file is locked") };
        let Step::Look(looking) = locking.locked(&core) else { panic!("it is looked at") };
        core.raise(VOLUME);
        let (_, step) = looking.seen(seen("a"), &mut core);
        assert!(matches!(step, Step::Done(Err(Withheld::Changed))), "{step:?}");
        assert!(core.record(VOLUME).is_some_and(|record| record.lost_writes && record.incarnation == 4));
    }

    #[test]
    fn a_number_that_could_be_recorded_nowhere_is_not_told_again_for_another_loss() {
        let mut core = core();
        core.raise(VOLUME);
        (0..3).for_each(|_| core.raise(VOLUME));
        assert_eq!(core.incarnation(VOLUME), 4);
        let Step::Lock(locking) = core.admit(VOLUME) else { panic!("a file is locked") };
        let Step::Look(looking) = locking.locked(&core) else { panic!("it is looked at") };
        let (_, step) = looking.seen(seen("a"), &mut core);
        let Step::Write(record, writing) = step else { panic!("{step:?}") };
        assert_eq!(record.incarnation, 4, "the catalog has 3");
        assert!(matches!(writing.written(false, &mut core), Step::Settle(_)));
        assert!(!core.is_recorded(VOLUME, false) && core.is_recorded(VOLUME, true));
    }

    #[test]
    fn a_loss_that_is_recorded_nowhere_keeps_the_volume_from_being_served_until_it_is() {
        let mut core = core();
        admit(&mut core, &seen("a")).0.unwrap();
        let mut admit = |is_in_file, is_in_catalog| {
            let Step::Lock(locking) = core.admit(VOLUME) else { panic!("a file is locked") };
            let Step::Look(looking) = locking.locked(&core) else { panic!("it is looked at") };
            let Step::Write(_, writing) = looking.seen(seen("b"), &mut core).1 else {
                panic!("it is written")
            };
            let Step::Settle(settling) = writing.written(is_in_file, &mut core) else {
                panic!("it is settled")
            };
            match settling.settled(is_in_catalog, &mut core) {
                Step::Done(result) => (false, result),
                Step::Remove(removing) => {
                    (true, carry_out(&mut core, removing.removed(), &seen("b"), &mut vec![]))
                }
                other => panic!("{other:?}"),
            }
        };
        let unrecorded = Err(Withheld::Unrecorded(Loss::Remounted));
        assert_eq!(admit(false, false), (false, unrecorded), "the former record stays");
        assert_eq!(admit(false, false), (false, unrecorded), "nor is it the second time");
        assert_eq!(admit(false, true), (true, Ok(())), "what the former record says is no news any more");
        assert_eq!(admit(false, false), (true, Ok(())), "nothing is lost; there is no place for records");
        assert_eq!(admit(true, false), (false, Ok(())));
    }
}
