//! Rules that the simulation can break on purpose: each has to be noticed, or the simulation tests nothing.

/// A rule that is broken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mutant {
    /// The server takes a connection for gone while its I/O is still under way.
    NoDraining,
    /// The server does not look at the session epoch.
    EpochIgnored,
    /// The server does not close the older connection of a slot.
    SlotIgnored,
    /// The client sends again on another slot.
    OtherSlot,
    /// An attachment is given to another node without fencing the former holder.
    NotFenced,
    /// A new server process does not wait for the last I/O of the one before.
    NoRestartLock,
    /// A cookie is the tag alone.
    TagOnlyCookie,
    /// The client does not look at the storage incarnation.
    IncarnationIgnored,
    /// Requests are sent again before every operation on the lost connection is reaped.
    NoReaping,
    /// The main thread's look at what was acknowledged and not flushed is late.
    CountedLate,
    /// A FLUSH is taken to cover all that was acknowledged when it ended.
    FlushCoversTooMuch,
    /// Requests are given up while another queue is still served.
    GivesUpAlone,
    /// The server answers every FLUSH without a sync.
    FlushDropped,
    /// The server does not look at FUA.
    FuaDropped,
    /// The server answers a WRITE before it is done.
    EarlyAnswer,
    /// The server puts two neighbouring blocks in each other's place.
    SwappedBlocks,
    /// After a reconnect, the server reads from stable storage past the cache.
    StaleRead,
    /// A failed sync is told before it is recorded.
    LossNotRecorded,
    /// A file system that was mounted anew is taken for the one before.
    MountIgnored,
    /// Nobody asks whether the kernel failed to write something back while no server ran.
    WriteBackIgnored,
    /// What could not be written back stays in the page cache when the volume is opened anew.
    CacheKept,
    /// A new server process does not read what is remembered of the volume.
    RecordUnread,
    /// The number that the catalog has is not looked at.
    CatalogUnread,
    /// What is told of a storage does not change with a reboot.
    BootUntold,
    /// What could not be written back is dropped after the record says so.
    CacheDroppedLate,
    /// What the file system says once is not remembered for the next process.
    WriteBackForgotten,
    /// A volume is opened although its loss of writes can be recorded nowhere.
    UnrecordedAdmitted,
    /// Nobody hears that a sync failed which was no client's.
    ControlSyncUntold,
    /// A device goes without its last FLUSH.
    FinalFlushDropped,
    /// A silent server is left although it answers probes.
    ProbesIgnored,
    /// Probes vouch for a request however old it is.
    ProbesForEver,
    /// The answers to pings say nothing of the connection.
    PongsIgnored,
    /// Nobody hears that a queue's connections are silent.
    SilenceUntold,
    /// Requests that are to be given up wait on.
    GiveUpForgotten,
    /// How old the oldest request is, is forgotten with its connection.
    AgeForgotten,
    /// A volume that opens late is given to all who ever waited for it, whatever they wait for now.
    LateOpenAnswered,
    /// An open may take as long as it likes.
    OpensForEver,
    /// An epoch is recorded after its connection was answered.
    AnsweredBeforePersisted,
    /// A connection is served although its epoch could not be recorded.
    UnpersistedServed,
    /// A volume that lost writes is not closed when nobody has it any more, but given to the next one.
    RetiredKept,
    /// The gate is not told of a loss of writes.
    LossUnheard,
    /// A volume goes on being served although its loss of writes is recorded nowhere.
    UnrecordedServed,
    /// A volume that is in use is not told that its loss of writes is recorded after all.
    RecordingUnheard,
    /// The gate does not look at secrets.
    SecretIgnored,
    /// A volume may be opened for writing by its name although it is attached.
    HolderIgnored,
    /// Who has connections fenced is told at once that they are gone.
    FenceNotAwaited,
    /// The first write to a volume begins before it is durable that there is one.
    MarkNotAwaited,
    /// The first write to a volume begins although that cannot be recorded.
    UnmarkedWritten,
    /// No change waits for a copy.
    HoldIgnored,
    /// Only what is written waits for a copy, and not what is zeroed.
    ZeroesNotHeld,
    /// The first pieces are copied before changes wait for them.
    CopiedBeforeHeld,
    /// A piece is taken for copied before it is.
    MarkedEarly,
    /// Who waited for a copy is not told to go on.
    HeldForgotten,
    /// The limits of a volume are not looked at.
    LimitIgnored,
    /// A WRITE that waits for its turn keeps what is behind it waiting for as long.
    LookAheadLeft,
    /// Of a foreign server, each queue loses its connections and gets new ones on its own.
    LostAlone,
    /// The same, but for that all queues drop their connections when one has lost its.
    ServedBeforeAllAreDown,
    /// Queues of a foreign server's disk wait for ever for one that gets no connection.
    OthersAwaitedForEver,
    /// Nobody counts that connections to a foreign server were lost.
    LossUncounted,
    /// A FLUSH that fails is taken to tell of every loss, also of those that came after it began.
    FlushTellsOfAll,
    /// A FLUSH that succeeds after a loss that came after it began is believed.
    FlushBelieved,
}

impl Mutant {
    /// All there are.
    pub const ALL: [Self; 61] = [
        Self::NoDraining,
        Self::EpochIgnored,
        Self::SlotIgnored,
        Self::OtherSlot,
        Self::NotFenced,
        Self::NoRestartLock,
        Self::TagOnlyCookie,
        Self::IncarnationIgnored,
        Self::NoReaping,
        Self::CountedLate,
        Self::FlushCoversTooMuch,
        Self::GivesUpAlone,
        Self::FlushDropped,
        Self::FuaDropped,
        Self::EarlyAnswer,
        Self::SwappedBlocks,
        Self::StaleRead,
        Self::LossNotRecorded,
        Self::MountIgnored,
        Self::WriteBackIgnored,
        Self::CacheKept,
        Self::RecordUnread,
        Self::CatalogUnread,
        Self::BootUntold,
        Self::CacheDroppedLate,
        Self::WriteBackForgotten,
        Self::UnrecordedAdmitted,
        Self::ControlSyncUntold,
        Self::FinalFlushDropped,
        Self::ProbesIgnored,
        Self::ProbesForEver,
        Self::PongsIgnored,
        Self::SilenceUntold,
        Self::GiveUpForgotten,
        Self::AgeForgotten,
        Self::LateOpenAnswered,
        Self::OpensForEver,
        Self::AnsweredBeforePersisted,
        Self::UnpersistedServed,
        Self::RetiredKept,
        Self::LossUnheard,
        Self::UnrecordedServed,
        Self::RecordingUnheard,
        Self::SecretIgnored,
        Self::HolderIgnored,
        Self::FenceNotAwaited,
        Self::MarkNotAwaited,
        Self::UnmarkedWritten,
        Self::HoldIgnored,
        Self::ZeroesNotHeld,
        Self::CopiedBeforeHeld,
        Self::MarkedEarly,
        Self::HeldForgotten,
        Self::LimitIgnored,
        Self::LookAheadLeft,
        Self::LostAlone,
        Self::ServedBeforeAllAreDown,
        Self::OthersAwaitedForEver,
        Self::LossUncounted,
        Self::FlushTellsOfAll,
        Self::FlushBelieved,
    ];

    /// Whether it is a rule of foreign servers' disks, which no other simulation has.
    pub(super) fn is_of_foreign_servers(self) -> bool {
        use Mutant::{
            FlushBelieved, FlushTellsOfAll, LossUncounted, LostAlone, OthersAwaitedForEver,
            ServedBeforeAllAreDown,
        };
        matches!(
            self,
            LostAlone
                | ServedBeforeAllAreDown
                | OthersAwaitedForEver
                | LossUncounted
                | FlushTellsOfAll
                | FlushBelieved
        )
    }
}
