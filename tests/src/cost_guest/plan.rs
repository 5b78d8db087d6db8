//! What can be measured: the subjects (rows) and the cells (columns), by the names that people type and read.
//!
//! Used by both sides of `cargo lab cost`: `lab::cost` makes a [`Plan`] of the command line's words, `cost_guest` carries it
//! out inside the machine and answers with one [`Row`] for each subject. Owns no measurement. The data paths come from
//! `ublk_core`, so a new one has a row without a change here.

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use ublk_core::DataPath;
use ublk_core::abi::UBLK_F_SUPPORT_ZERO_COPY;

/// How often each cell is measured, unless the command line says otherwise; the table has the mean.
pub(crate) const REPETITIONS: usize = 2;

/// What fio does for one number of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Cell {
    /// Whether it reads; otherwise it writes.
    pub(crate) reads: bool,
    /// KiB of each I/O.
    pub(crate) block_kib: u64,
    /// I/Os in flight.
    pub(crate) depth: u32,
    /// I/Os of one measurement: some 300 ms of the guest on the devices that go through TCP.
    pub(crate) ios: u64,
}

/// The columns, first for reads, then for writes: KiB, depth, I/Os.
const SHAPES: [(u64, u32, u64); 5] =
    [(4, 1, 4000), (4, 16, 12000), (128, 1, 1500), (128, 16, 1600), (512, 4, 500)];

/// The same for the comparison of data paths by size.
const SIZES: [(u64, u32, u64); 5] =
    [(4, 4, 9000), (16, 4, 6000), (64, 4, 2500), (256, 4, 1000), (1024, 4, 300)];

impl Cell {
    /// Every column of the table.
    pub(crate) fn all() -> impl Iterator<Item = Self> {
        Self::of(SHAPES)
    }

    /// Every column of the table by size.
    pub(crate) fn by_size() -> impl Iterator<Item = Self> {
        Self::of(SIZES)
    }

    fn of(shapes: [(u64, u32, u64); 5]) -> impl Iterator<Item = Self> {
        [true, false].into_iter().flat_map(move |reads| {
            shapes.into_iter().map(move |(block_kib, depth, ios)| Self { reads, block_kib, depth, ios })
        })
    }

    /// The column's heading: `R 4k/16` is a read of 4 KiB, 16 in flight.
    pub(crate) fn heading(self) -> String {
        let direction = if self.reads { 'R' } else { 'W' };
        format!("{direction} {}k/{}", self.block_kib, self.depth)
    }

    /// The column with that heading.
    ///
    /// # Errors
    /// There is none; the error lists them.
    pub(crate) fn from_heading(heading: &str) -> Result<Self> {
        let known = || Self::all().chain(Self::by_size()).map(Self::heading).collect::<Vec<_>>().join(", ");
        let mut all = Self::all().chain(Self::by_size());
        all.find(|cell| cell.heading() == heading)
            .with_context(|| format!("there is no cell {heading:?}; known are {}", known()))
    }
}

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Subject {
    /// volnode's client over a data path, and volnode's server.
    Ours(DataPath),
    /// The kernel's NBD client and nbdkit's memory plugin.
    KernelNbdAndNbdkit,
    /// The kernel's NBD client and volnode's server.
    KernelNbdAndOurServer,
    /// The kernel's NVMe/TCP client and its target on a RAM disk.
    NvmeTcp,
    /// A ublk disk that answers at once: a part of the floor.
    UblkNull,
    /// The same with commands for many requests at once, which volnode does not use.
    UblkNullBatch,
    /// An exchange over TCP with no disk at all: the other part of the floor.
    Tcp,
    /// The kernel's own disk that answers at once.
    NullBlk,
}

/// Writes below this many KiB arrive at our server in its receive memory, together with other requests, and are copied to
/// the volume; larger ones are received there (`server/src/data/io/session_io.rs`).
const RECEIVED_IN_PLACE_KIB_MIN: u64 = 16;

/// Reads of a memory volume from this many KiB on are sent by our server as pages that it lends to the socket
/// (`server/src/data/io/ring.rs`).
const SENT_BY_REFERENCE_KIB_MIN: u64 = 32;

/// Payloads up to this many KiB travel through our client's inbox and outbox together with the headers around them, where
/// the data path lets it copy them from there (`client/src/device/queue/payload.rs`).
const SMALL_KIB_MAX: u64 = 8;

impl Subject {
    /// In the order of the table.
    pub(crate) fn all() -> Vec<Self> {
        let ours = DataPath::LADDER.into_iter().map(Self::Ours);
        ours.chain(Self::PEERS).chain(Self::FLOOR).chain([Self::UblkNullBatch, Self::NullBlk]).collect()
    }

    /// What is compared by size: the pages lent to the ring with the request, put there by hand, and two ways of copying.
    pub(crate) const BY_SIZE: [Self; 4] = [
        Self::Ours(DataPath::Fused),
        Self::Ours(DataPath::Registered),
        Self::Ours(DataPath::UserCopy),
        Self::Ours(DataPath::Mapped),
    ];

    /// Whose cells ours are compared with.
    pub(crate) const PEERS: [Self; 3] =
        [Self::KernelNbdAndNbdkit, Self::KernelNbdAndOurServer, Self::NvmeTcp];

    /// Whose sum is the floor.
    pub(crate) const FLOOR: [Self; 2] = [Self::UblkNull, Self::Tcp];

    /// Whether it keeps what is written to it, so that this is verified first.
    pub(crate) fn stores(self) -> bool {
        !matches!(self, Self::UblkNull | Self::UblkNullBatch | Self::Tcp | Self::NullBlk)
    }

    /// How many times the cell's I/Os it is given: where an I/O does less, a measurement of the same length has more.
    fn ios_factor(self, cell: Cell) -> u64 {
        match self {
            Self::UblkNull | Self::UblkNullBatch if cell.block_kib == 4 => 3,
            Self::UblkNull | Self::UblkNullBatch => 6,
            Self::Tcp => 2,
            Self::NullBlk => 8,
            _ => 1,
        }
    }

    /// The name on the command line.
    pub(crate) fn key(self) -> &'static str {
        match self {
            Self::Ours(data_path) => data_path.as_str(),
            Self::KernelNbdAndNbdkit => "nbd-nbdkit",
            Self::KernelNbdAndOurServer => "nbd-volserver",
            Self::NvmeTcp => "nvme-tcp",
            Self::UblkNull => "ublk-null",
            Self::UblkNullBatch => "ublk-null-batch",
            Self::Tcp => "tcp",
            Self::NullBlk => "null-blk",
        }
    }

    /// The name in the table.
    pub(crate) fn title(self) -> String {
        match self {
            Self::Ours(data_path) => format!("volnode, `{data_path}`"),
            Self::KernelNbdAndNbdkit => "kernel nbd + nbdkit memory".to_owned(),
            Self::KernelNbdAndOurServer => "kernel nbd + volserver".to_owned(),
            Self::NvmeTcp => "kernel NVMe/TCP + nvmet + brd".to_owned(),
            Self::UblkNull => "ublk null target, zero copy (stores nothing)".to_owned(),
            Self::UblkNullBatch => "the same with `UBLK_F_BATCH_IO`".to_owned(),
            Self::Tcp => "TCP alone (stores nothing)".to_owned(),
            Self::NullBlk => "null_blk (fio and block layer alone, stores nothing)".to_owned(),
        }
    }

    /// The subjects that these words name: keys, or the groups `ours`, `peers` and `floor`. In the order of the table.
    ///
    /// # Errors
    /// A word names nothing; the error lists what there is.
    pub(crate) fn from_words(words: &[String]) -> Result<Vec<Self>> {
        let mut named = Vec::new();
        for word in words {
            match (word.as_str(), Self::all().into_iter().find(|subject| subject.key() == word)) {
                (_, Some(subject)) => named.push(subject),
                ("ours", _) => named.extend(DataPath::LADDER.map(Self::Ours)),
                ("peers", _) => named.extend(Self::PEERS),
                ("floor", _) => named.extend(Self::FLOOR),
                _ => {
                    let keys: Vec<&str> = Self::all().into_iter().map(Self::key).collect();
                    bail!("there is no row {word:?}; known are ours, peers, floor, {}", keys.join(", "))
                }
            }
        }
        Ok(Self::all().into_iter().filter(|subject| named.contains(subject)).collect())
    }

    /// How often the payload of one I/O of a cell is copied on its way, by derivation; [`Self::copies_are`] says where.
    pub(crate) fn copies(self, cell: Cell) -> u32 {
        let in_and_out_of_the_socket = 2;
        let is_by_reference = cell.reads && cell.block_kib >= SENT_BY_REFERENCE_KIB_MIN;
        let by_our_server = 1 - u32::from(is_by_reference);
        let in_our_server = u32::from(!cell.reads && cell.block_kib < RECEIVED_IN_PLACE_KIB_MIN);
        match self {
            Self::Ours(data_path) if cell.reads => by_our_server + 1 + read_copies(data_path, cell),
            Self::Ours(data_path) => write_copies(data_path, cell) + 1 + in_our_server,
            Self::KernelNbdAndNbdkit => in_and_out_of_the_socket + 1,
            Self::KernelNbdAndOurServer => by_our_server + 1 + in_our_server,
            // The sender lends its pages to the socket, but the RAM disk has memory of its own.
            Self::NvmeTcp => 2,
            Self::UblkNull | Self::UblkNullBatch | Self::NullBlk => 0,
            Self::Tcp => in_and_out_of_the_socket,
        }
    }

    /// Which copies those are.
    pub(crate) fn copies_are(self) -> &'static str {
        match self {
            Self::Ours(DataPath::Fused) => {
                "a large read: out of the socket, to which the server lends its pages, into the request's; a large write: into \
                 pages that the client lends to the socket, and out of it; a small payload: into the socket, out of it, and \
                 through the client's inbox or outbox; a small write also from the server's receive memory to the volume"
            }
            Self::Ours(DataPath::Mapped) => {
                "as `fixed-rw`, and between the client's buffer and the request's pages; a small payload also through the \
                 client's inbox or outbox"
            }
            Self::Ours(DataPath::UserCopy) => {
                "writes as `fused`; reads also from the client's buffer to the request's pages"
            }
            Self::Ours(_) => {
                "out of the socket and, but for large reads, into it; a small write also from the server's receive memory to \
                 the volume"
            }
            Self::KernelNbdAndNbdkit => {
                "into the socket and out of it; between nbdkit's buffer and its memory plugin's pages"
            }
            Self::KernelNbdAndOurServer => {
                "out of the socket and, but for large reads, into it; of a small write, from the server's receive memory to \
                 the volume"
            }
            Self::NvmeTcp => {
                "out of the socket, to which the sender lends its pages; between the target's pages and the RAM disk"
            }
            Self::UblkNull | Self::UblkNullBatch | Self::NullBlk => "no payload moves",
            Self::Tcp => "into the socket and out of it",
        }
    }
}

/// Copies of a read's payload in our client, besides the one out of the socket.
fn read_copies(data_path: DataPath, cell: Cell) -> u32 {
    let has_buffers = data_path.device_flags() & UBLK_F_SUPPORT_ZERO_COPY == 0;
    u32::from(has_buffers) + u32::from(is_small(data_path, cell))
}

/// Copies of a write's payload in our client, the one into the socket included.
fn write_copies(data_path: DataPath, cell: Cell) -> u32 {
    let through_outbox = u32::from(is_small(data_path, cell));
    match data_path {
        // Into the outbox and on into the socket, or into pages that the socket is lent.
        DataPath::Fused | DataPath::UserCopy => 1 + through_outbox,
        DataPath::Mapped => 2 + through_outbox,
        // FixedRw, Registered: from the request's pages into the socket.
        _ => 1,
    }
}

fn is_small(data_path: DataPath, cell: Cell) -> bool {
    cell.block_kib <= SMALL_KIB_MAX && !matches!(data_path, DataPath::FixedRw | DataPath::Registered)
}

/// What to measure.
#[derive(Serialize, Deserialize)]
pub(crate) struct Plan {
    /// Keys of the subjects.
    rows: Vec<String>,
    /// Headings of the cells.
    cells: Vec<String>,
    /// Measurements of each cell.
    repetitions: usize,
    /// Whether calls are counted, too.
    pub(crate) counts_calls: bool,
    /// Whether another machine has carried it out before: no device proves again that it stores what it is given, and TCP alone
    /// exchanges less, because the emulator takes each byte of a copy by itself.
    pub(crate) again: bool,
    /// Features that the processor has to have, or not to have.
    flags: Vec<(String, bool)>,
}

impl Plan {
    /// A plan for these subjects and cells.
    pub(crate) fn new(subjects: &[Subject], cells: &[Cell], repetitions: usize, counts_calls: bool) -> Self {
        let rows = subjects.iter().map(|subject| subject.key().to_owned()).collect();
        let cells = cells.iter().map(|cell| cell.heading()).collect();
        Self { rows, cells, repetitions, counts_calls, again: false, flags: Vec::new() }
    }

    /// The same in a further machine, once: it takes its time, and less than half of a difference goes into a figure.
    pub(crate) fn again(subjects: &[Subject], cells: &[Cell]) -> Self {
        Self { again: true, ..Self::new(subjects, cells, 1, false) }
    }

    /// The same on a processor that has, or does not have, these features.
    pub(crate) fn on_a_processor_with<const N: usize>(self, flags: [(&str, bool); N]) -> Self {
        Self { flags: flags.map(|(name, has)| (name.to_owned(), has)).into(), ..self }
    }

    /// Makes sure of the processor: `cpuinfo` is the text of `/proc/cpuinfo`.
    ///
    /// # Errors
    /// It has a feature that it should not have, or lacks one: its figures would not be what they are taken for.
    pub(crate) fn ensure_processor(&self, cpuinfo: &str) -> Result<()> {
        let line =
            cpuinfo.lines().find_map(|line| line.strip_prefix("flags")).context("no flags in cpuinfo")?;
        for (name, wanted) in &self.flags {
            let has = line.split_whitespace().any(|flag| flag == name);
            ensure!(has == *wanted, "the kernel lists {name}: {has}, wanted: {wanted}");
        }
        Ok(())
    }

    /// How many I/Os one measurement of a cell has.
    pub(crate) fn ios(&self, subject: Subject, cell: Cell) -> u64 {
        let ios = cell.ios * subject.ios_factor(cell);
        // fio gathers requests by chance, so it does the same in each machine. The exchange has batches of one size.
        if self.again && subject == Subject::Tcp { ios / 8 } else { ios }
    }

    /// How often a cell is measured: what involves no more than one daemon and one queue repeats to the digit.
    pub(crate) fn repetitions(&self, subject: Subject) -> usize {
        if subject.stores() { self.repetitions } else { 1 }
    }

    /// The subjects.
    ///
    /// # Errors
    /// One is unknown: the plan is another version's.
    pub(crate) fn subjects(&self) -> Result<Vec<Subject>> {
        Subject::from_words(&self.rows)
    }

    /// The cells.
    ///
    /// # Errors
    /// As [`Plan::subjects`].
    pub(crate) fn cells(&self) -> Result<Vec<Cell>> {
        self.cells.iter().map(|heading| Cell::from_heading(heading)).collect()
    }
}

/// What came of one subject.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Row {
    /// The subject's key.
    pub(crate) key: String,
    /// By cell, in the plan's order.
    pub(crate) cells: Vec<Measured>,
}

/// One number of the table, and what stands beside it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Measured {
    /// The cell's.
    pub(crate) heading: String,
    /// Thousand instructions per I/O, one for each repetition.
    pub(crate) samples: Vec<f64>,
    /// If they were counted.
    pub(crate) calls: Option<CallsPerIo>,
}

/// What everything but fio does for an I/O.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct CallsPerIo {
    /// System calls.
    pub(crate) system_calls: f64,
    /// SQEs.
    pub(crate) sqes: f64,
    /// How often a thread, the kernel's own included, gave up the processor to wait, which is how often it was woken.
    pub(crate) wake_ups: f64,
}

impl Measured {
    /// Thousand instructions per I/O.
    pub(crate) fn mean(&self) -> f64 {
        self.samples.iter().sum::<f64>() / self.samples.len() as f64
    }

    /// Thousand instructions per I/O of the cheapest repetition.
    pub(crate) fn least(&self) -> f64 {
        self.samples.iter().copied().fold(f64::MAX, f64::min)
    }

    /// The largest difference between two repetitions, in per cent of the mean.
    pub(crate) fn spread_percent(&self) -> f64 {
        let (low, high) = self.samples.iter().fold((f64::MAX, 0.0_f64), |(l, h), &s| (l.min(s), h.max(s)));
        (high - low) / self.mean() * 100.0
    }
}

impl Row {
    /// The measurement of a cell, if it was one of the plan's.
    pub(crate) fn measured(&self, cell: Cell) -> Option<&Measured> {
        let heading = cell.heading();
        self.cells.iter().find(|measured| measured.heading == heading)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_heading_and_every_key_names_one_thing() {
        for cell in Cell::all() {
            assert_eq!(Cell::from_heading(&cell.heading()).unwrap(), cell);
        }
        for subject in Subject::all() {
            assert_eq!(Subject::from_words(&[subject.key().to_owned()]).unwrap(), [subject]);
        }
        assert!(Cell::from_heading("R 8k/2").is_err());
        assert!(Subject::from_words(&["iscsi".to_owned()]).is_err());
    }

    #[test]
    fn a_processor_with_other_features_is_an_error() {
        let plan = Plan::again(&[], &[]).on_a_processor_with([("erms", true), ("fsrm", false)]);
        let with =
            |flags: &str| plan.ensure_processor(&format!("processor\t: 0\nflags\t\t: {flags}\nbugs\t\t:\n"));
        assert!(with("fpu erms avx2").is_ok());
        assert!(with("fpu avx2").is_err() && with("erms fsrm").is_err() && with("ermsx").is_err());
        assert!(plan.ensure_processor("processor\t: 0\n").is_err());
    }

    #[test]
    fn groups_and_rows_are_measured_once_and_in_the_tables_order() {
        let words = ["tcp", "floor", "fused"].map(str::to_owned);
        let expected = [Subject::Ours(DataPath::Fused), Subject::UblkNull, Subject::Tcp];
        assert_eq!(Subject::from_words(&words).unwrap(), expected);
    }
}
