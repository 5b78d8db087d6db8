//! What the lab (the `lab` binary) and the tests inside its virtual machine (`vm/main.rs`) share.
//!
//! Owns the names of the kernels we test on, the event lines by which a test process tells the lab what it
//! does, and the harness that runs the VM tests one by one with a deadline each. It starts no virtual machine
//! (that is the binary's part) and holds no test of the product (those are in `vm/`).

pub mod block_history;
pub mod card_pair;
pub mod direct_io;
pub mod disk_statistics;
pub mod dribbling_relay;
pub mod events;
pub mod fault_proxy;
pub mod harness;
pub mod image_contents;
pub mod kernel_series;
pub mod kubelet;
mod left_behind;
pub mod libtest_binary;
pub mod lying_disk;
pub mod management_api;
#[path = "../../server/tests/nbd_data/client.rs"]
pub mod nbd_client;
pub mod nbd_load;
pub mod oci_image;
pub mod pod;
pub mod process_resources;
pub mod seed;
pub mod selection;
pub mod shell;
pub mod simulator;
pub mod soak;
pub mod socket_memory;
pub mod storage_node;
pub mod stuck_tasks;
pub mod unit_file;
pub mod volcsi;
pub mod volserver;
