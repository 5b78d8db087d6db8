//! What `cargo lab bench-server` measures: which servers, under which loads, how long and how often.
//!
//! Used by every other file here. Starts nothing.

use std::time::Duration;

use testlab::nbd_load::{Operation, Order};

/// How a server reaches what it stores. Servers are compared with those that do it in the same way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Storage {
    /// A file, through the page cache, which holds all of it.
    PageCache,
    /// A file, past the page cache (O_DIRECT).
    Direct,
    /// Its own memory.
    Memory,
}

impl Storage {
    pub(super) const ALL: [Self; 3] = [Self::PageCache, Self::Direct, Self::Memory];

    /// As headings say it.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::PageCache => "page cache",
            Self::Direct => "O_DIRECT",
            Self::Memory => "memory",
        }
    }
}

/// The program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Program {
    Volserver,
    Nbdkit,
    QemuNbd,
    NbdServer,
}

/// A server as it is measured.
#[derive(Clone, Copy, Debug)]
pub(super) struct Subject {
    pub(super) program: Program,
    pub(super) storage: Storage,
}

impl Subject {
    /// As tables say it.
    pub(super) fn name(self) -> String {
        let program = match (self.program, self.storage) {
            (Program::Volserver, _) => "volserver",
            (Program::Nbdkit, Storage::Memory) => "nbdkit memory",
            (Program::Nbdkit, _) => "nbdkit file",
            (Program::QemuNbd, _) => "qemu-nbd",
            (Program::NbdServer, _) => "nbd-server",
        };
        format!("{program}, {}", self.storage.name())
    }

    pub(super) fn is_ours(self) -> bool {
        self.program == Program::Volserver
    }
}

const fn subject(program: Program, storage: Storage) -> Subject {
    Subject { program, storage }
}

/// Everybody. nbdkit's file plugin and nbd-server have no O_DIRECT; qemu-nbd and nbd-server hold nothing in memory.
pub(super) const SUBJECTS: [Subject; 8] = [
    subject(Program::Volserver, Storage::PageCache),
    subject(Program::Nbdkit, Storage::PageCache),
    subject(Program::QemuNbd, Storage::PageCache),
    subject(Program::NbdServer, Storage::PageCache),
    subject(Program::Volserver, Storage::Direct),
    subject(Program::QemuNbd, Storage::Direct),
    subject(Program::Volserver, Storage::Memory),
    subject(Program::Nbdkit, Storage::Memory),
];

/// Who makes the load.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Driver {
    /// Our own generator.
    NbdLoad,
    /// fio's nbd engine.
    Fio,
    /// A copy of the whole export by nbdcopy, with the connections, requests and sizes of its own choice.
    Nbdcopy,
}

/// Size, order and number of requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Shape {
    /// 4 KiB at random offsets, one at a time.
    Small1,
    /// 32 of them in flight.
    Small32,
    /// Four connections with 32 in flight each.
    Small4x32,
    /// 1 MiB one after another, eight in flight on one connection.
    Large,
}

impl Shape {
    pub(super) fn block_bytes(self) -> u32 {
        if self == Self::Large { 1 << 20 } else { 4 << 10 }
    }

    pub(super) fn connections(self) -> u32 {
        if self == Self::Small4x32 { 4 } else { 1 }
    }

    /// In flight on each connection.
    pub(super) fn depth(self) -> u32 {
        match self {
            Self::Small1 => 1,
            Self::Small32 | Self::Small4x32 => 32,
            Self::Large => 8,
        }
    }

    pub(super) fn order(self) -> Order {
        if self == Self::Large { Order::Sequential } else { Order::Random }
    }
}

/// One load.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Cell {
    pub(super) driver: Driver,
    pub(super) operation: Operation,
    /// Of nbdcopy: [`Shape::Large`], which it is nearest to.
    pub(super) shape: Shape,
}

impl Cell {
    /// As headings say it: `R 4k/32x4` is random reads of 4 KiB, four connections with 32 in flight each.
    pub(super) fn heading(&self) -> String {
        let letter = if self.operation == Operation::Read { 'R' } else { 'W' };
        let shape = match self.shape {
            Shape::Small1 => "4k/1",
            Shape::Small32 => "4k/32",
            Shape::Small4x32 => "4k/32x4",
            Shape::Large => "1M/8",
        };
        match self.driver {
            Driver::NbdLoad => format!("{letter} {shape}"),
            Driver::Fio => format!("{letter} {shape} fio"),
            Driver::Nbdcopy => format!("{letter} nbdcopy"),
        }
    }
}

/// How much is measured.
#[derive(Clone, Copy, Debug)]
pub(super) struct Plan {
    pub(super) rounds: usize,
    /// Of a load before it is measured.
    pub(super) warm_up: Duration,
    /// Of a load while it is measured.
    pub(super) runtime: Duration,
    /// Of every export.
    pub(super) size_bytes: u64,
    /// How often nbdcopy copies it in one run.
    pub(super) copies: u32,
    shapes: &'static [Shape],
    fio_shapes: &'static [Shape],
}

impl Plan {
    /// What the documentation shows.
    pub(super) const FULL: Self = Self {
        rounds: 3,
        warm_up: Duration::from_millis(300),
        runtime: Duration::from_millis(1500),
        size_bytes: 512 << 20,
        copies: 4,
        shapes: &[Shape::Small1, Shape::Small32, Shape::Small4x32, Shape::Large],
        fio_shapes: &[Shape::Small1, Shape::Small32, Shape::Small4x32, Shape::Large],
    };

    /// That everything works; its numbers mean nothing.
    pub(super) const QUICK: Self = Self {
        rounds: 1,
        warm_up: Duration::from_millis(10),
        runtime: Duration::from_millis(200),
        size_bytes: 16 << 20,
        copies: 1,
        shapes: &[Shape::Small4x32],
        fio_shapes: &[Shape::Small32],
    };

    /// Every cell: reads before writes, our generator's first.
    pub(super) fn cells(&self) -> Vec<Cell> {
        let of = |driver, shapes: &[Shape], operation| -> Vec<Cell> {
            shapes.iter().map(|&shape| Cell { driver, operation, shape }).collect()
        };
        let operations = [Operation::Read, Operation::Write];
        let own = operations.map(|operation| of(Driver::NbdLoad, self.shapes, operation));
        let fio = operations.map(|operation| of(Driver::Fio, self.fio_shapes, operation));
        let copies = operations.map(|operation| of(Driver::Nbdcopy, &[Shape::Large], operation));
        own.into_iter().chain(fio).chain(copies).flatten().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_cell_has_a_heading_of_its_own() {
        let mut headings: Vec<String> = Plan::FULL.cells().iter().map(Cell::heading).collect();
        assert_eq!(headings.len(), 18);
        headings.sort();
        headings.dedup();
        assert_eq!(headings.len(), 18);
    }

    #[test]
    fn ours_has_a_peer_wherever_it_is_measured() {
        for storage in Storage::ALL {
            let with_it = || SUBJECTS.iter().filter(|subject| subject.storage == storage);
            assert!(
                with_it().any(|subject| subject.is_ours()) && with_it().any(|subject| !subject.is_ours())
            );
        }
    }
}
