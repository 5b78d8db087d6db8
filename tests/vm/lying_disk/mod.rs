//! What the server promises about stable storage, on a disk that loses whatever was not flushed.
//!
//! - `data`: what was written with FUA, or before a FLUSH, or to a volume without a write cache, survives a power cut, and
//!   so does what was written before the volume got another holder; the same check catches a server that skips its flush.
//! - `device`: the same through an attached device, as its user sees it.
//! - `catalog`: after a power cut the catalog holds exactly what was answered.
//! - `rig`: a server whose data directory is on that disk, and its way through a power cut.
//!
//! Every test runs in rounds, each ended by a power cut in the middle of traffic, at a request of the disk's that the seed
//! chooses. The state after one cut is what the next round starts from. What needs no block device runs on one kernel.

mod catalog;
mod data;
mod device;
mod rig;

use testlab::harness::Test;

pub(crate) const TESTS: &[Test] = &[
    Test::new("lying_disk::flushed_data_survives_a_power_cut", data::flushed_data_survives_a_power_cut)
        .once(),
    Test::new(
        "lying_disk::flushed_data_survives_a_power_cut_through_the_page_cache",
        data::flushed_data_survives_a_power_cut_through_the_page_cache,
    )
    .once(),
    Test::new(
        "lying_disk::without_a_write_cache_every_answered_write_survives_a_power_cut",
        data::without_a_write_cache_every_answered_write_survives_a_power_cut,
    )
    .once(),
    Test::new(
        "lying_disk::what_the_next_holder_reads_survives_a_power_cut",
        data::what_the_next_holder_reads_survives_a_power_cut,
    )
    .once(),
    Test::new(
        "lying_disk::a_server_that_skips_its_flush_is_caught",
        data::a_server_that_skips_its_flush_is_caught,
    )
    .once(),
    Test::new(
        "lying_disk::a_server_that_skips_one_flush_is_caught",
        data::a_server_that_skips_one_flush_is_caught,
    )
    .once(),
    Test::new(
        "lying_disk::what_the_device_flushed_survives_a_power_cut_of_its_server",
        device::what_the_device_flushed_survives_a_power_cut_of_its_server,
    ),
    Test::new(
        "lying_disk::a_flush_on_one_connection_covers_the_writes_of_all",
        device::a_flush_on_one_connection_covers_the_writes_of_all,
    ),
    Test::new(
        "lying_disk::the_catalog_holds_exactly_what_was_answered",
        catalog::the_catalog_holds_exactly_what_was_answered,
    )
    .once(),
];
