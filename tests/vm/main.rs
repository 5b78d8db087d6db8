//! The tests that need ublk: every one of them, by module. Run by `cargo lab test` inside the VM.
//!
//! To add one, write a function in its module and a line in the module's `TESTS`. The harness
//! (`testlab::harness`) gives each test a directory, a deadline and a machine in the state it found it in.

mod adopted;
mod allocations;
mod bad_input;
mod clones;
mod counting_allocator;
mod csi;
mod csi_sanity;
mod daemons;
mod direct;
mod file_systems;
mod fio;
mod foreign;
mod freeze;
mod fsx;
mod full_storage;
mod grants;
mod hostile_server;
mod idle;
mod images;
mod in_use;
mod kubelet;
mod limits;
mod luks;
mod lvm;
mod lvm_changes;
mod lvm_failures;
mod lvm_kills;
mod lying_disk;
mod memory_pressure;
mod network;
mod pod;
mod queues;
mod recovery;
mod ride_through;
mod rungs;
mod send_zc;
mod shutdown;
mod smoke;
mod snapshots;
mod soak;
mod tls_disks;

use std::process::ExitCode;

fn main() -> ExitCode {
    let modules = [
        smoke::TESTS,
        fio::TESTS,
        rungs::TESTS,
        queues::TESTS,
        file_systems::TESTS,
        foreign::TESTS,
        adopted::TESTS,
        lvm::TESTS,
        lvm_changes::TESTS,
        lvm_failures::TESTS,
        lvm_kills::TESTS,
        full_storage::TESTS,
        luks::TESTS,
        tls_disks::TESTS,
        bad_input::TESTS,
        daemons::TESTS,
        pod::TESTS,
        in_use::TESTS,
        hostile_server::TESTS,
        ride_through::TESTS,
        recovery::TESTS,
        network::TESTS,
        grants::TESTS,
        clones::TESTS,
        csi::TESTS,
        kubelet::TESTS,
        send_zc::TESTS,
        fsx::TESTS,
        snapshots::TESTS,
        csi_sanity::TESTS,
        freeze::TESTS,
        images::TESTS,
        shutdown::TESTS,
        soak::TESTS,
        idle::TESTS,
        allocations::TESTS,
        limits::TESTS,
        lying_disk::TESTS,
        memory_pressure::TESTS,
    ];
    testlab::harness::main(&modules.concat())
}
