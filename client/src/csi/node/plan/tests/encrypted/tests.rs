//! The same world with an encrypted volume in it, and a node daemon that dies as well: its decisions are those of `luks_plan.rs`.

use super::super::{
    Content, Disk, EXT4, MOUNTED, OnDevice, Place, StageStep, StageView, Use, World, XFS, stage, view,
};
use crate::node::luks_plan::{self, ClearDisk, Header};

/// An encrypted volume, its node daemon and its disk: the header of LUKS is made in the attach, and the file system behind it.
#[derive(Debug, Clone)]
struct EncryptedWorld {
    used_as: Use,
    content: Content,
    header: Header,
    is_open: bool,
    /// Behind the header. After a new header it is noise.
    behind: OnDevice,
    is_attached: bool,
    is_mounted: bool,
    /// A pod wrote something.
    has_data: bool,
}

/// Where a call of the plugin's ends early: the plugin at its step, or the daemon at one of its own, each before the step or within it.
#[derive(Debug, Clone, Copy)]
enum Death {
    Plugin(usize, bool),
    Daemon(usize, bool),
    /// The plugin at its step, and the whole node with it: nothing is open or attached after that.
    Node(usize),
}

impl EncryptedWorld {
    fn new(used_as: Use) -> Self {
        Self {
            used_as,
            content: Content::NeverWritten,
            header: Header::Zeros,
            is_open: false,
            behind: OnDevice::Zeros,
            is_attached: false,
            is_mounted: false,
            has_data: false,
        }
    }

    /// An attach, as the daemon makes it; `false`: the daemon was killed in it.
    fn attach(&mut self, death: Option<Death>) -> bool {
        if !self.is_attached && self.content == Content::InitialisingHere {
            // By the attachment before this one.
            self.content = Content::InitialisingElsewhere;
        }
        self.is_attached = true;
        let mut view = luks_plan::View {
            is_read_only: false,
            has_passphrase: true,
            keeps_initialising: self.used_as != Use::Block,
            clear_disk: if self.is_open { ClearDisk::Open } else { ClearDisk::Absent },
            content: None,
            header: None,
            is_formatted: false,
            is_erased: false,
        };
        for number in 0..16 {
            let step = luks_plan::attach(&view);
            let within = match death {
                Some(Death::Daemon(at, within)) if at == number => Some(within),
                _ => None,
            };
            if within == Some(false) {
                return false;
            }
            match step {
                luks_plan::Step::Done => return true,
                luks_plan::Step::Refuse(why) => panic!("{why}: {self:?}"),
                step => self.carry_out_of_daemon(step, &mut view),
            }
            if within == Some(true) {
                if step == luks_plan::Step::Format {
                    self.header = Header::Other;
                }
                return false;
            }
        }
        panic!("it goes round: {self:?}")
    }

    fn carry_out_of_daemon(&mut self, step: luks_plan::Step, view: &mut luks_plan::View) {
        use luks_plan::Step;
        match step {
            Step::AskContent => view.content = Some(self.content),
            Step::LookAtDisk => view.header = Some(self.header),
            Step::SetInitialising => {
                assert_ne!(self.content, Content::Written);
                self.content = Content::InitialisingHere;
                view.content = Some(self.content);
            }
            Step::Format => {
                assert!(!self.has_data && self.content == Content::InitialisingHere, "{self:?}");
                (self.header, self.behind) = (Header::Luks, OnDevice::Zeros);
                view.is_formatted = true;
            }
            Step::Open => {
                assert_eq!(self.header, Header::Luks);
                (self.is_open, view.clear_disk) = (true, ClearDisk::Open);
            }
            Step::Erase => {
                assert!(!self.has_data && self.behind == OnDevice::Zeros);
                view.is_erased = true;
            }
            Step::SetWritten => {
                self.content = Content::Written;
                view.content = Some(self.content);
            }
            other => panic!("{other:?}"),
        }
    }

    /// A stage; `true`: it came to its end.
    fn call(&mut self, death: Option<Death>) -> bool {
        let disk = match (self.is_attached, self.is_open) {
            (false, _) => Disk::Absent,
            (true, false) => Disk::Locked,
            (true, true) => Disk::Serving,
        };
        let place = if self.is_mounted { MOUNTED } else { Place::Free };
        let mut view = StageView { used_as: self.used_as, disk, place, is_granted: false, ..view() };
        for number in 0..20 {
            let step = stage(&view);
            let at = match death {
                Some(Death::Plugin(at, within)) => Some((at, within)),
                Some(Death::Node(at)) => Some((at, true)),
                _ => None,
            };
            if let Some((_, within)) = at.filter(|(at, _)| *at == number) {
                if within && step == StageStep::Make {
                    self.behind = OnDevice::Half;
                }
                if matches!(death, Some(Death::Node(_))) {
                    (self.is_open, self.is_attached, self.is_mounted) = (false, false, false);
                }
                return false;
            }
            match step {
                StageStep::Done => return true,
                StageStep::Refuse(why) => panic!("{why}: {self:?} {view:?}"),
                StageStep::Attach => {
                    if !self.attach(death) {
                        return false;
                    }
                    (view.disk, view.is_granted) = (Disk::Serving, true);
                }
                step => {
                    assert!(self.is_open, "{step:?} of a disk that is not open");
                    let mut plain = self.plain();
                    plain.carry_out(&step, &mut view);
                    (self.content, self.behind, self.is_mounted) =
                        (plain.content, plain.on_device, plain.is_mounted);
                }
            }
        }
        panic!("it goes round: {self:?}")
    }

    /// What the plugin has before it: the clear disk, as any other.
    fn plain(&self) -> World {
        assert!(!self.has_data || self.content == Content::Written);
        World {
            content: self.content,
            on_device: self.behind,
            is_attached: true,
            is_mounted: self.is_mounted,
            ..World::new(self.used_as)
        }
    }
}

#[test]
fn killed_anywhere_an_encrypted_volume_is_made_and_never_made_over_data() {
    let plugin = (0..12).flat_map(|at| [Death::Plugin(at, false), Death::Plugin(at, true), Death::Node(at)]);
    let daemon = (0..10).flat_map(|at| [Death::Daemon(at, false), Death::Daemon(at, true)]);
    let deaths: Vec<Death> = plugin.chain(daemon).collect();
    for used_as in [EXT4, XFS, Use::Block] {
        for first in &deaths {
            for second in &deaths {
                let mut world = EncryptedWorld::new(used_as);
                world.call(Some(*first));
                world.call(Some(*second));
                assert!(world.call(None), "{first:?} {second:?}");
                assert_eq!((world.content, world.header), (Content::Written, Header::Luks));
                assert_eq!(world.is_mounted, used_as != Use::Block, "{first:?} {second:?}");
                // From now on a pod writes: whatever dies then, it finds what it wrote.
                world.has_data = true;
                for death in [*first, *second] {
                    world.call(Some(death));
                }
                assert!(world.call(None) && world.has_data, "{first:?} {second:?}");
            }
        }
    }
}
