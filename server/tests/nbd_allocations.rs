//! The hot path allocates nothing: counted on the ring thread, while requests of every kind and size go through it.
#![allow(missing_docs, clippy::unwrap_used)] // A test says what went wrong by panicking.
#![allow(unsafe_code)] // A global allocator that counts cannot be written without.

#[path = "nbd_data/client.rs"]
#[allow(dead_code)] // Made for the other tests; this one needs less.
mod client;
#[path = "nbd_data/support.rs"]
#[allow(dead_code)]
mod support;
mod unit_filter;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};

use proto::nbd::transmission::{Command, CommandFlags};
use server::catalog::BackendKind;

use client::Client;
use support::Server;

/// Thread id of the ring thread; 0 until it is known.
static RING_THREAD: AtomicI32 = AtomicI32::new(0);
static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

struct Counting;

fn count() {
    let ring_thread = RING_THREAD.load(Ordering::Relaxed);
    if ring_thread != 0 && rustix::thread::gettid().as_raw_nonzero().get() == ring_thread {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
    }
}

// SAFETY: every call is passed on to the system's allocator as it came; counting neither allocates nor unwinds.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller's promises are the system allocator's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as above; what is freed came from there.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, new_bytes: usize) -> *mut u8 {
        count();
        // SAFETY: as above.
        unsafe { System.realloc(pointer, layout, new_bytes) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn ring_thread() -> i32 {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    let mut ids = tasks.map(|task| task.unwrap().file_name().into_string().unwrap());
    let is_ring = |id: &String| {
        std::fs::read_to_string(format!("/proc/self/task/{id}/comm")).unwrap().trim() == "ring-0"
    };
    ids.find(is_ring).unwrap().parse().unwrap()
}

/// Requests of one round of [`load`], by kind and size.
const ROUND_REQUESTS: u64 = 9;
/// More than 10,000 requests are counted on each backend.
const COUNTED_ROUNDS: u64 = 1_120;

fn load(client: &mut Client, rounds: u64) {
    let data = vec![3; 256 << 10];
    for round in 0..rounds {
        for length in [4096usize, 64 << 10, 256 << 10] {
            let offset = (round % 16) << 20;
            client.send(Command::Write, CommandFlags::NONE, offset, length as u32, &data[..length]);
            client.send(Command::Read, CommandFlags::NONE, offset + (8 << 20), length as u32, &[]);
        }
        client.send(Command::Flush, CommandFlags::NONE, 0, 0, &[]);
        client.send(Command::WriteZeroes, CommandFlags::FUA, 30 << 20, 8192, &[]);
        client.send(Command::Read, CommandFlags::NONE, 1 << 40, 4096, &[]);
        for _ in 0..ROUND_REQUESTS {
            client.receive().unwrap();
        }
    }
}

#[test]
fn requests_allocate_nothing_on_the_ring_thread() {
    // Before the server's own, which `RUST_LOG` may make say much: what is said is allocated.
    let _ = tracing_subscriber::fmt().with_max_level(tracing_subscriber::filter::LevelFilter::OFF).try_init();
    let server = Server::start_with(|config| config.threads = 1);
    for backend in [BackendKind::File, BackendKind::Memory] {
        let volume = server.create_with(backend.as_str(), 32 << 20, |new| new.backend = backend);
        let mut client = server.open(&server.attach(&volume, false), 1, 0);
        load(&mut client, 20);
        RING_THREAD.store(ring_thread(), Ordering::Relaxed);
        ALLOCATIONS.store(0, Ordering::Relaxed);
        load(&mut client, COUNTED_ROUNDS);
        let requests = COUNTED_ROUNDS * ROUND_REQUESTS;
        assert_eq!(ALLOCATIONS.load(Ordering::Relaxed), 0, "{backend:?}: {requests} requests");
        // That it counts at all: another connection allocates.
        let other = server.create(&format!("{}-other", backend.as_str()), 1 << 20);
        server.open(&server.attach(&other, false), 1, 0).write(0, &[1; 4096]).unwrap();
        assert_ne!(ALLOCATIONS.load(Ordering::Relaxed), 0, "the counter does not count");
        RING_THREAD.store(0, Ordering::Relaxed);
    }
}
