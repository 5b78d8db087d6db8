//! Every row of the decisions, and a world in which the plugin is killed before and within each step.

use super::*;

mod encrypted {
    mod tests;
}

const EXT4: Use = Use::FileSystem(FsType::Ext4);
const XFS: Use = Use::FileSystem(FsType::Xfs);
const MOUNTED: Place = Place::Volume { read_only: false };
const MOUNTED_SOMEWHERE: Shown = Shown { as_file_system: true, as_device: false };
const BOUND_SOMEWHERE: Shown = Shown { as_file_system: false, as_device: true };

fn view() -> StageView {
    StageView {
        used_as: EXT4,
        is_read_only: false,
        disk: Disk::Serving,
        is_granted: true,
        place: Place::Free,
        is_file_system_read_only: false,
        shown: Shown::default(),
        fails_by_us: false,
        content: None,
        found: None,
        has_taken_over: false,
        is_checked: false,
        is_grown: false,
    }
}

fn other() -> Place {
    Place::Other("a tmpfs".to_owned())
}

fn ext4() -> Option<(Found, Ends)> {
    Some((Found::FileSystem("ext4".to_owned()), Ends::Data))
}

#[test]
fn nothing_is_staged_without_a_grant_of_this_call() {
    for disk in
        [Disk::Absent, Disk::Serving, Disk::Stalled, Disk::Locked, Disk::Leaving, Disk::Dead, Disk::Failed]
    {
        for place in [Place::Free, MOUNTED, other()] {
            let view = StageView { disk, place, is_granted: false, ..view() };
            assert_eq!(stage(&view), StageStep::Attach, "{disk:?}");
        }
    }
}

#[test]
fn an_encrypted_disk_that_is_not_open_is_opened_by_an_attach() {
    for used_as in [EXT4, Use::Block] {
        let locked = StageView { disk: Disk::Locked, used_as, ..view() };
        assert_eq!(stage(&locked), StageStep::Attach);
    }
}

#[test]
fn a_disk_that_fails_for_good_is_replaced_unless_it_is_mounted() {
    let step = |place| stage(&StageView { disk: Disk::Failed, place, ..view() });
    assert_eq!(step(Place::Free), StageStep::Replace);
    assert_eq!(step(MOUNTED), StageStep::Refuse(Refusal::Failed));
    assert_eq!(step(other()), StageStep::Refuse(Refusal::Failed));
}

#[test]
fn a_disk_that_fails_for_good_is_not_taken_from_under_another_path() {
    for shown in [MOUNTED_SOMEWHERE, BOUND_SOMEWHERE] {
        for used_as in [EXT4, Use::Block] {
            let view = StageView { disk: Disk::Failed, used_as, shown, ..view() };
            assert_eq!(stage(&view), StageStep::Refuse(Refusal::UsedElsewhere), "{shown:?}");
            // Whoever has no grant changes nothing.
            assert_eq!(stage(&StageView { is_granted: false, ..view }), StageStep::Attach);
        }
    }
}

#[test]
fn a_volume_is_a_file_system_or_a_device_on_one_node() {
    let step = |used_as, shown| stage(&StageView { used_as, shown, ..view() });
    let refused = |is_block| StageStep::Refuse(Refusal::UsedOtherwise(is_block));
    assert_eq!(step(Use::Block, MOUNTED_SOMEWHERE), refused(false));
    assert_eq!(step(EXT4, BOUND_SOMEWHERE), refused(true));
    assert_eq!(step(Use::Block, BOUND_SOMEWHERE), StageStep::Done);
    assert_eq!(step(EXT4, MOUNTED_SOMEWHERE), StageStep::AskContent);
    let step = |is_block, shown| publish(&PublishView { is_block, shown, ..published() });
    let refused = |is_block| PublishStep::Refuse(Refusal::UsedOtherwise(is_block));
    assert_eq!(step(true, MOUNTED_SOMEWHERE), refused(false));
    assert_eq!(step(false, BOUND_SOMEWHERE), refused(true));
    assert_eq!(step(true, BOUND_SOMEWHERE), PublishStep::Bind);
    assert_eq!(step(false, MOUNTED_SOMEWHERE), PublishStep::Bind);
}

#[test]
fn what_is_used_again_waits_for_its_server_again() {
    for disk in [Disk::Serving, Disk::Stalled] {
        let failing = StageView { disk, fails_by_us: true, place: MOUNTED, ..view() };
        assert_eq!(stage(&failing), StageStep::WaitOnStall, "{disk:?}");
        for target in [Place::Free, MOUNTED] {
            let failing = PublishView { disk, fails_by_us: true, target, ..published() };
            assert_eq!(publish(&failing), PublishStep::WaitOnStall, "{disk:?}");
        }
    }
    let block = StageView { used_as: Use::Block, fails_by_us: true, ..view() };
    assert_eq!(stage(&block), StageStep::WaitOnStall);
    // Not for what is refused.
    let refused = PublishView { fails_by_us: true, is_single: true, has_other_targets: true, ..published() };
    assert_eq!(publish(&refused), PublishStep::Refuse(Refusal::SecondTarget));
}

#[test]
fn what_cannot_be_written_to_is_not_grown() {
    let reader = StageView { place: Place::Volume { read_only: true }, ..view() };
    assert_eq!(stage(&reader), StageStep::Done);
    let turned = StageView { place: MOUNTED, is_file_system_read_only: true, ..view() };
    assert_eq!(stage(&turned), StageStep::Done);
}

#[test]
fn a_disk_that_stalls_is_not_looked_at() {
    let step = |place| stage(&StageView { disk: Disk::Stalled, place, ..view() });
    assert_eq!(step(Place::Free), StageStep::Refuse(Refusal::Stalled));
    assert_eq!(step(MOUNTED), StageStep::Done);
}

#[test]
fn a_block_volume_is_staged_once_it_is_attached() {
    assert_eq!(stage(&StageView { used_as: Use::Block, ..view() }), StageStep::Done);
    let stalled = StageView { used_as: Use::Block, disk: Disk::Stalled, ..view() };
    assert_eq!(stage(&stalled), StageStep::Refuse(Refusal::Stalled));
}

#[test]
fn another_mount_is_left_alone() {
    let refused = StageStep::Refuse(Refusal::Occupied("a tmpfs".to_owned()));
    assert_eq!(stage(&StageView { place: other(), ..view() }), refused);
}

#[test]
fn what_is_mounted_is_grown_and_then_done() {
    let mounted = StageView { place: MOUNTED, ..view() };
    assert_eq!(stage(&mounted), StageStep::Grow);
    assert_eq!(stage(&StageView { is_grown: true, ..mounted.clone() }), StageStep::Done);
    assert_eq!(stage(&StageView { is_read_only: true, ..mounted }), StageStep::Done);
}

#[test]
fn the_server_is_asked_before_the_device_is_looked_at() {
    assert_eq!(stage(&view()), StageStep::AskContent);
    assert_eq!(stage(&StageView { content: Some(Content::Written), ..view() }), StageStep::LookAtDevice);
}

#[test]
fn what_another_attachment_began_is_asked_for_once() {
    let elsewhere = StageView { content: Some(Content::InitialisingElsewhere), ..view() };
    assert_eq!(stage(&elsewhere), StageStep::SetInitialising);
    let asked = StageView { has_taken_over: true, found: ext4(), ..elsewhere.clone() };
    assert_eq!(stage(&asked), StageStep::Refuse(blank::Refusal::InitialisedElsewhere.into()));
    let reader = StageView { is_read_only: true, found: ext4(), ..elsewhere };
    assert_eq!(stage(&reader), StageStep::Refuse(blank::Refusal::InitialisedElsewhere.into()));
}

#[test]
fn a_new_volume_is_marked_before_its_mkfs_and_after_it() {
    let blank = Some((Found::Nothing, Ends::Zeros));
    let new = StageView { content: Some(Content::NeverWritten), found: blank.clone(), ..view() };
    assert_eq!(stage(&new), StageStep::SetInitialising);
    let marked = StageView { content: Some(Content::InitialisingHere), ..new.clone() };
    assert_eq!(stage(&marked), StageStep::Make);
    assert_eq!(stage(&StageView { found: ext4(), ..marked.clone() }), StageStep::SetWritten);
    for view in [new, marked] {
        let reader = StageView { is_read_only: true, ..view };
        assert_eq!(stage(&reader), StageStep::Refuse(Refusal::NothingToRead));
    }
}

#[test]
fn what_a_killed_mkfs_left_is_erased_only_by_whoever_makes_it() {
    let unfinished = Some((Found::Unfinished("xfs".to_owned()), Ends::Data));
    let step = |content| {
        stage(&StageView { used_as: XFS, content: Some(content), found: unfinished.clone(), ..view() })
    };
    assert_eq!(step(Content::InitialisingHere), StageStep::Erase);
    for content in [Content::NeverWritten, Content::Written, Content::Unknown] {
        assert!(matches!(step(content), StageStep::Refuse(Refusal::Content(_))), "{content:?}");
    }
}

#[test]
fn ext4_is_checked_before_it_is_mounted_and_xfs_is_not() {
    let written = StageView { content: Some(Content::Written), found: ext4(), ..view() };
    assert_eq!(stage(&written), StageStep::Check);
    assert_eq!(stage(&StageView { is_checked: true, ..written.clone() }), StageStep::Mount);
    assert_eq!(stage(&StageView { is_read_only: true, ..written }), StageStep::Mount);
    let found = Some((Found::FileSystem("xfs".to_owned()), Ends::Data));
    let xfs = StageView { used_as: XFS, content: Some(Content::Written), found, ..view() };
    assert_eq!(stage(&xfs), StageStep::Mount);
}

#[test]
fn another_file_system_is_neither_mounted_nor_replaced() {
    let xfs = StageView { used_as: XFS, content: Some(Content::Written), found: ext4(), ..view() };
    assert!(matches!(stage(&xfs), StageStep::Refuse(Refusal::Content(blank::Refusal::OtherType { .. }))));
}

fn published() -> PublishView {
    PublishView {
        is_block: false,
        disk: Disk::Serving,
        is_disk_read_only: false,
        staged: MOUNTED,
        target: Place::Free,
        is_read_only: false,
        is_single: false,
        has_other_targets: false,
        shown: Shown::default(),
        fails_by_us: false,
    }
}

#[test]
fn a_staged_volume_is_shown_once() {
    assert_eq!(publish(&published()), PublishStep::Bind);
    assert_eq!(publish(&PublishView { target: MOUNTED, ..published() }), PublishStep::Done);
    let others = PublishView { has_other_targets: true, ..published() };
    assert_eq!(publish(&others), PublishStep::Bind);
    let stalled = PublishView { disk: Disk::Stalled, ..published() };
    assert_eq!(publish(&stalled), PublishStep::Bind);
}

#[test]
fn what_is_not_staged_is_not_shown() {
    let refusal = |view: PublishView| match publish(&view) {
        PublishStep::Refuse(why) => why,
        step => panic!("{step:?}"),
    };
    for disk in [Disk::Absent, Disk::Locked, Disk::Leaving] {
        assert_eq!(refusal(PublishView { disk, ..published() }), Refusal::NotStaged);
    }
    for disk in [Disk::Dead, Disk::Failed] {
        assert_eq!(refusal(PublishView { disk, ..published() }), Refusal::Failed);
    }
    assert_eq!(refusal(PublishView { staged: Place::Free, ..published() }), Refusal::NotStaged);
    assert!(matches!(refusal(PublishView { staged: other(), ..published() }), Refusal::Occupied(_)));
    assert!(matches!(refusal(PublishView { target: other(), ..published() }), Refusal::Occupied(_)));
    let block = PublishView { is_block: true, staged: Place::Free, ..published() };
    assert_eq!(publish(&block), PublishStep::Bind);
}

#[test]
fn read_only_and_writable_are_two_things() {
    for (is, wanted) in [(false, true), (true, false)] {
        let target = Place::Volume { read_only: is };
        let view = PublishView { target, is_read_only: wanted, ..published() };
        assert_eq!(publish(&view), PublishStep::Refuse(Refusal::PublishedDifferently(is)));
    }
    let block = PublishView { is_block: true, is_read_only: true, ..published() };
    assert_eq!(publish(&block), PublishStep::Refuse(Refusal::BlockReadOnly));
    assert_eq!(publish(&PublishView { is_disk_read_only: true, ..block }), PublishStep::Bind);
}

#[test]
fn a_single_writer_has_one_target() {
    let second = PublishView { is_single: true, has_other_targets: true, ..published() };
    assert_eq!(publish(&second), PublishStep::Refuse(Refusal::SecondTarget));
    assert_eq!(publish(&PublishView { target: MOUNTED, ..second }), PublishStep::Done);
}

#[test]
fn an_unstage_unmounts_and_then_detaches() {
    let view = |place: &Place, disk| UnstageView {
        disk,
        place: place.clone(),
        fails_on_stall: false,
        is_given_up: false,
        has_device: true,
        is_elsewhere: false,
    };
    let step = |place: &Place, disk| unstage(&view(place, disk));
    for disk in [Disk::Absent, Disk::Serving, Disk::Failed, Disk::Leaving] {
        assert_eq!(step(&MOUNTED, disk), UnstageStep::Unmount, "{disk:?}");
    }
    assert_eq!(step(&MOUNTED, Disk::Stalled), UnstageStep::FailOnStall);
    let failing = UnstageView { fails_on_stall: true, ..view(&MOUNTED, Disk::Stalled) };
    assert_eq!(unstage(&failing), UnstageStep::Unmount);
    for place in [MOUNTED, Place::Free] {
        assert_eq!(step(&place, Disk::Dead), UnstageStep::Recover);
        let given_up = UnstageView { is_given_up: true, ..view(&place, Disk::Dead) };
        assert_eq!(unstage(&given_up), UnstageStep::Detach { by_force: true });
        let elsewhere = UnstageView { is_elsewhere: true, ..given_up };
        assert_eq!(unstage(&elsewhere), UnstageStep::Refuse(Refusal::UsedElsewhere));
    }
    let gone = UnstageView { is_given_up: true, has_device: false, ..view(&MOUNTED, Disk::Dead) };
    assert_eq!(unstage(&gone), UnstageStep::Unmount);
    let gone = UnstageView { place: Place::Free, ..gone };
    assert_eq!(unstage(&gone), UnstageStep::Detach { by_force: true });
    assert_eq!(step(&Place::Free, Disk::Absent), UnstageStep::Done);
    for disk in [Disk::Serving, Disk::Stalled, Disk::Locked, Disk::Leaving] {
        assert_eq!(step(&Place::Free, disk), UnstageStep::Detach { by_force: false }, "{disk:?}");
    }
    assert_eq!(step(&Place::Free, Disk::Failed), UnstageStep::Detach { by_force: true });
    let elsewhere = UnstageView { is_elsewhere: true, ..view(&Place::Free, Disk::Failed) };
    assert_eq!(unstage(&elsewhere), UnstageStep::Refuse(Refusal::UsedElsewhere));
    for disk in [Disk::Absent, Disk::Serving, Disk::Failed] {
        assert!(matches!(step(&other(), disk), UnstageStep::Refuse(Refusal::Occupied(_))));
    }
}

#[test]
fn a_job_that_waits_for_a_lost_server_is_let_go_where_nobody_else_is_hurt() {
    assert!(frees_jobs(Disk::Stalled, false, true, false));
    assert!(!frees_jobs(Disk::Stalled, true, true, false), "it fails already");
    assert!(!frees_jobs(Disk::Stalled, false, false, false), "nothing runs");
    assert!(!frees_jobs(Disk::Stalled, false, true, true), "another path needs the disk");
    for disk in [Disk::Absent, Disk::Serving, Disk::Locked, Disk::Leaving, Disk::Dead, Disk::Failed] {
        assert!(!frees_jobs(disk, false, true, false), "{disk:?}");
    }
}

/// What lies on the volume of the world.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum OnDevice {
    Zeros,
    /// mkfs wrote this much of it.
    Half,
    Whole,
}

/// What outlives the plugin.
#[derive(Debug, Clone)]
struct World {
    used_as: Use,
    content: Content,
    on_device: OnDevice,
    is_attached: bool,
    is_mounted: bool,
    makes: usize,
    mounts: usize,
}

impl World {
    fn new(used_as: Use) -> Self {
        Self {
            used_as,
            content: Content::NeverWritten,
            on_device: OnDevice::Zeros,
            is_attached: false,
            is_mounted: false,
            makes: 0,
            mounts: 0,
        }
    }

    fn look(&self) -> (Found, Ends) {
        let Use::FileSystem(fs_type) = self.used_as else { panic!("nobody looks at a block volume") };
        let name = fs_type.name().to_owned();
        match (self.on_device, fs_type) {
            (OnDevice::Zeros, _) => (Found::Nothing, Ends::Zeros),
            // Its superblock is the last that is written.
            (OnDevice::Half, FsType::Ext4) => (Found::Nothing, Ends::Data),
            (OnDevice::Half, FsType::Xfs) => (Found::Unfinished(name), Ends::Data),
            (OnDevice::Whole, _) => (Found::FileSystem(name), Ends::Data),
        }
    }

    /// One call that is killed at its step of this number: before its effect, or in the middle of it. `true`: it came to its end.
    fn call(&mut self, killed_at: Option<(usize, bool)>) -> bool {
        let disk = if self.is_attached { Disk::Serving } else { Disk::Absent };
        let place = if self.is_mounted { MOUNTED } else { Place::Free };
        let mut view = StageView { used_as: self.used_as, disk, place, is_granted: false, ..view() };
        for number in 0..20 {
            let step = super::stage(&view);
            if let Some((_, within)) = killed_at.filter(|(at, _)| *at == number) {
                if within && step == StageStep::Make {
                    self.on_device = OnDevice::Half;
                }
                return false;
            }
            match step {
                StageStep::Done => return true,
                StageStep::Refuse(why) => panic!("{why}: {self:?} {view:?}"),
                step => self.carry_out(&step, &mut view),
            }
        }
        panic!("it goes round: {self:?}")
    }

    fn carry_out(&mut self, step: &StageStep, view: &mut StageView) {
        match step {
            StageStep::Attach => {
                self.is_attached = true;
                (view.disk, view.is_granted) = (Disk::Serving, true);
            }
            StageStep::AskContent => view.content = Some(self.content),
            StageStep::LookAtDevice => view.found = Some(self.look()),
            StageStep::SetInitialising => {
                assert_ne!(self.content, Content::Written);
                self.content = Content::InitialisingHere;
                view.content = Some(self.content);
            }
            StageStep::Erase => {
                assert_eq!(self.content, Content::InitialisingHere);
                self.on_device = OnDevice::Zeros;
                view.found = None;
            }
            StageStep::Make => {
                assert_eq!(self.content, Content::InitialisingHere, "made over what the server calls data");
                self.on_device = OnDevice::Whole;
                self.makes += 1;
                view.found = None;
            }
            StageStep::SetWritten => {
                assert_eq!(self.on_device, OnDevice::Whole);
                self.content = Content::Written;
                view.content = Some(self.content);
            }
            StageStep::Check => view.is_checked = true,
            StageStep::Mount => {
                assert_eq!(self.content, Content::Written, "whoever mounts it writes to it");
                self.is_mounted = true;
                self.mounts += 1;
                view.place = MOUNTED;
            }
            StageStep::Grow => view.is_grown = true,
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn killed_anywhere_once_or_twice_a_stage_ends_well_when_it_is_repeated() {
    for used_as in [EXT4, XFS, Use::Block] {
        for first in 0..16 {
            for second in 0..16 {
                for within in [false, true] {
                    let mut world = World::new(used_as);
                    world.call(Some((first, within)));
                    world.call(Some((second, within)));
                    assert!(world.call(None));
                    let is_file_system = used_as != Use::Block;
                    assert_eq!(world.is_mounted, is_file_system);
                    assert_eq!(world.mounts, usize::from(is_file_system), "{first} {second}");
                    if is_file_system {
                        assert_eq!((world.content, world.on_device), (Content::Written, OnDevice::Whole));
                        assert_eq!(world.makes, 1, "{first} {second} {within}");
                    }
                    let before = world.clone();
                    assert!(world.call(None), "a repeat");
                    assert_eq!((world.makes, world.mounts), (before.makes, before.mounts));
                }
            }
        }
    }
}
