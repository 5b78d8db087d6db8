//! What the data side may take at most: connections, time, sizes, and memory.
//!
//! Owns the bounds, their defaults, and the one sum of all memory that peers can make the data side hold. Enforces nothing
//! itself: connections are counted by `admission.rs`, times are kept by `io/run.rs` and the gate, sizes are announced by the
//! gate and checked by `proto`'s validation, buffers come from `buffers.rs`, whose pools are made as large as is said here.
//! Called by `config.rs`, `serve.rs` and `data/server.rs`.
//!
//! **What the memory limit means.** Nothing that a peer does makes the data side allocate beyond what was set aside at start:
//! every ring has a pool of buffers, and every connection that may exist has its own part. Both are address space until they
//! are first used. What the kernel keeps in the connections' sockets is in the sum: all of them are narrow, and they may be
//! wider as far as there is room (`socket_memory.rs`). Not in the sum, because no peer decides it: the program, the catalog, and
//! memory volumes, which are data.

use std::time::Duration;

use proto::nbd::PAYLOAD_BYTES_MAX_DEFAULT;
use proto::nbd::handshake::OPTION_BYTES_MAX;
use proto::nbd::handshake::server::OPTIONS_MAX;

use crate::buffer_classes::PoolSize;
use crate::machine_memory::Allowed;

/// Connections of the management API at once, on all addresses together, where the limit of open files allows so many.
pub const MANAGEMENT_CONNECTIONS_MAX: u32 = 512;

/// Each direction's buffer of a narrow socket, in bytes as the kernel counts them: its own structures are included.
pub(crate) const NARROW_BUFFER_BYTES: u64 = 64 << 10;

/// A packet is taken into a buffer that is not yet full, so there may be one too many: 64 KiB of data and its structures.
pub(crate) const PACKET_BYTES: u64 = 72 << 10;

/// The kernel memory of a narrow socket, in bytes.
pub const NARROW_BYTES: u64 = 2 * (NARROW_BUFFER_BYTES + PACKET_BYTES);

/// Requests of one connection that are in flight at once. As many as ublk and the kernel's nbd client put on a queue by
/// default, so that neither is held back; a peer that sends more finds its socket full.
pub const IN_FLIGHT_REQUESTS_MAX: usize = 128;

/// Receive memory of a connection: a queue of 32 small writes in one receive.
pub const BULK_BYTES: usize = 128 << 10;

/// Room for a BLOCK_STATUS's extents, in bytes: some 4,000 with 64-bit lengths. Who wants more asks again. No maximum block
/// size may be smaller.
pub(crate) const STATUS_REPLY_BYTES_MAX: u32 = 64 << 10;

/// Zeroes that are written at a time where the file system cannot make them itself. Large enough that a system call for
/// each does not count.
pub const ZEROES_BYTES_MAX: u32 = 1 << 20;

/// From this size on, a payload in a memory volume or in the page cache is sent by handing its pages to the socket; below,
/// copying it costs less than the way there.
pub(crate) const PAGES_BYTES_MIN: u32 = 32 << 10;

/// The most that one READ may hold in this way, in bytes: a pipe that needs no privileges (`fs.pipe-max-size`).
pub const PIPE_BYTES_MAX: u32 = 1 << 20;

/// Answers of one ring that may wait to be taken, each as long as the room that its request has.
pub const ANSWERS_MAX: usize = 4;

/// Memory of the answers on their way to one ring, in bytes.
pub const ANSWERS_BYTES_MAX: u64 = ANSWERS_MAX as u64 * STATUS_REPLY_BYTES_MAX as u64;

/// What a connection has beside its receive memory: slots, vectors, headers, the queues of its session.
const BOOKKEEPING_BYTES: u64 = 64 << 10;

/// What a ring has beside its pool and its connections: zeroes to write, extents on their way, lists.
const RING_BYTES: u64 = ZEROES_BYTES_MAX as u64 + ANSWERS_BYTES_MAX + (256 << 10);

/// READs of one ring that may hold pages of the page cache at once; more are read into buffers.
const PAGE_PIPES_MAX: u64 = 32;

/// What a handshake may come to hold: a long option as it arrives, in a vector that grows by doubling, and once more when it is
/// looked at. It is let go before the receive memory is used in full.
const HANDSHAKE_BYTES: u64 = 3 * OPTION_BYTES_MAX as u64;

/// Memory of the server's own that one connection may come to hold, in bytes; its payload buffers are the pool's.
pub const CONNECTION_BYTES: u64 =
    BOOKKEEPING_BYTES + if HANDSHAKE_BYTES > BULK_BYTES as u64 { HANDSHAKE_BYTES } else { BULK_BYTES as u64 };

/// Connections beyond the limits that may come as far as to say what they are for; and of one address. Who takes the slot of a
/// connection that is dead, or only asks whether the server lives, is let in; the others are told of the limit. There are none where
/// the memory is just enough for the connections (`MemoryPlan::guests_max`).
pub const GUESTS_MAX: u32 = 16;
/// As above.
pub const GUESTS_PER_ADDRESS_MAX: u32 = 4;

/// Bounds of the data side.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Connections at once; what more ask for is refused, but see [`GUESTS_MAX`].
    pub connections_max: u32,
    /// Connections at once from one address (from one /64 with IPv6); the same for more.
    pub connections_per_address_max: u32,
    /// From the first byte to the transmission phase.
    pub handshake_timeout: Duration,
    /// Options that one handshake may ask for; more end it.
    pub handshake_options_max: u32,
    /// Longest READ and WRITE, in bytes: announced as the maximum block size.
    pub request_bytes_max: u32,
    /// Memory that peers can make the data side hold, in bytes; `None` is what full pools and wide sockets for all need, but no
    /// more than half of what this process may have (`machine_memory.rs`).
    pub memory_bytes_max: Option<u64>,
    /// How long an open may wait for a former session's I/O, or for the lock of a backing file.
    pub open_timeout: Duration,
    /// How long a fence may wait for the connections' I/O.
    pub fence_timeout: Duration,
    /// How long a peer may stand still with buffers that others wait for; while nobody does, it may for ever.
    pub stall_timeout: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections_max: 1024,
            // A node with a hundred disks has some four hundred.
            connections_per_address_max: 512,
            // Longer than an open may take, so that it gets its answer.
            handshake_timeout: Duration::from_secs(60),
            handshake_options_max: OPTIONS_MAX,
            request_bytes_max: PAYLOAD_BYTES_MAX_DEFAULT,
            memory_bytes_max: None,
            // A disk that retries takes tens of seconds; a client has given up after more.
            open_timeout: Duration::from_secs(40),
            fence_timeout: Duration::from_secs(40),
            // A megabyte in ten seconds is slower than any link that a disk is put on.
            stall_timeout: Duration::from_secs(10),
        }
    }
}

/// The memory limit leaves too little for buffers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "a memory limit of {limit_mib} MiB is too little: {connections_max} connections and {rings} threads need at least \
     {needed_mib} MiB; raise --memory-max, or lower --connections-max, --request-max or --threads"
)]
pub struct TooLittleMemory {
    /// What was set, or half of what there is, in MiB.
    pub limit_mib: u64,
    /// The least that would do, in MiB.
    pub needed_mib: u64,
    /// As set.
    pub connections_max: u32,
    /// Ring threads.
    pub rings: usize,
}

/// How the memory is divided.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryPlan {
    /// Buffers of each ring.
    pub pool: PoolSize,
    /// Connections beyond the limits: [`GUESTS_MAX`], or 0 where there is no memory for them.
    pub guests_max: u32,
    /// Connections that a ring may come to have, if they are evenly divided; guests are counted.
    pub connections_per_ring: u32,
    /// What the kernel may keep in the sockets of all connections together, beyond what narrow ones hold.
    pub wide_sockets_bytes: u64,
    /// READs of each ring that may hold pages of the page cache at once.
    pub page_pipes: u16,
    /// The sum of everything, in bytes.
    pub total_bytes: u64,
}

impl Limits {
    /// Divides the memory among `rings` rings and all the connections there may be; `allowed_bytes` is what this process may have,
    /// `tls_bytes` what TLS may take for each connection, `more_bytes` what the kernel may keep in the widest socket beyond what
    /// it may in a narrow one. Of what is left beside the least of everything, the pools get three quarters, until they are full,
    /// held pages a quarter of the rest, and wide sockets what is left then. Guests are planned for where the least with them fits.
    ///
    /// # Errors
    /// [`TooLittleMemory`]
    pub fn plan(
        &self,
        rings: usize,
        allowed_bytes: u64,
        tls_bytes: u64,
        more_bytes: u64,
    ) -> Result<MemoryPlan, TooLittleMemory> {
        let rings_count = rings as u64;
        let with_guests = u64::from(self.connections_max + GUESTS_MAX);
        let fixed_bytes = |connections: u64| {
            connections * (CONNECTION_BYTES + NARROW_BYTES + tls_bytes) + rings_count * RING_BYTES
        };
        let least_pools_bytes = rings_count * PoolSize::smallest(self.request_bytes_max).bytes();
        let pipe_bytes = rings_count * u64::from(PIPE_BYTES_MAX);
        let full_bytes = fixed_bytes(with_guests)
            + rings_count * PoolSize::full(self.request_bytes_max).bytes()
            + with_guests * more_bytes
            + PAGE_PIPES_MAX * pipe_bytes;
        let limit_bytes = self.memory_bytes_max.unwrap_or_else(|| full_bytes.min(allowed_bytes / 2));
        let have_guests = limit_bytes >= fixed_bytes(with_guests) + least_pools_bytes;
        let guests_max = if have_guests { GUESTS_MAX } else { 0 };
        let connections_max = u64::from(self.connections_max + guests_max);
        let fixed_bytes = fixed_bytes(connections_max);
        let with_pools = |pool: PoolSize| fixed_bytes + rings_count * pool.bytes();
        let least_bytes = fixed_bytes + least_pools_bytes;
        let spare_bytes = limit_bytes.saturating_sub(least_bytes);
        let pool_bytes_max = (limit_bytes - spare_bytes / 4).saturating_sub(fixed_bytes) / rings_count.max(1);
        match PoolSize::within(pool_bytes_max, self.request_bytes_max) {
            Some(pool) => {
                let left_bytes = limit_bytes - with_pools(pool);
                let page_pipes = PAGE_PIPES_MAX.min(left_bytes / 4 / pipe_bytes.max(1));
                let held_bytes = page_pipes * pipe_bytes;
                let wide_sockets_bytes = (connections_max * more_bytes).min(left_bytes - held_bytes);
                Ok(MemoryPlan {
                    pool,
                    guests_max,
                    connections_per_ring: (self.connections_max + guests_max).div_ceil(rings as u32),
                    wide_sockets_bytes,
                    page_pipes: page_pipes as u16,
                    total_bytes: with_pools(pool) + held_bytes + wide_sockets_bytes,
                })
            }
            None => Err(TooLittleMemory {
                limit_mib: limit_bytes >> 20,
                needed_mib: least_bytes.div_ceil(1 << 20),
                connections_max: self.connections_max,
                rings,
            }),
        }
    }

    /// [`Self::plan`] with what this process may have. Where nobody has set a limit, half of the machine's memory would be enough, and
    /// only a control group allows less, it is the least: most of it is never used.
    ///
    /// # Errors
    /// [`TooLittleMemory`]
    pub fn plan_within(
        &self,
        rings: usize,
        allowed: &Allowed,
        tls_bytes: u64,
        more_bytes: u64,
    ) -> Result<MemoryPlan, TooLittleMemory> {
        let plan = |limits: &Self| limits.plan(rings, allowed.bytes, tls_bytes, more_bytes);
        match plan(self) {
            Err(error)
                if self.memory_bytes_max.is_none() && error.needed_mib <= allowed.machine_bytes >> 21 =>
            {
                plan(&Self { memory_bytes_max: Some(error.needed_mib << 20), ..*self })
            }
            planned => planned,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;
    const MORE_BYTES: u64 = 12 << 20;

    #[test]
    fn no_plan_is_above_its_limit_and_one_byte_less_than_the_least_is_refused() {
        for rings in [1, 2, 16, 64] {
            for (connections_max, request_bytes_max) in [(1, 32 << 20), (1024, 32 << 20), (1024, 64 << 10)] {
                let limits = |memory_bytes_max| Limits {
                    connections_max,
                    request_bytes_max,
                    memory_bytes_max: Some(memory_bytes_max),
                    ..Limits::default()
                };
                let least_bytes = u64::from(connections_max) * (CONNECTION_BYTES + NARROW_BYTES)
                    + rings as u64 * (RING_BYTES + PoolSize::smallest(request_bytes_max).bytes());
                assert!(limits(least_bytes - 1).plan(rings, GIB, 0, MORE_BYTES).is_err());
                let with_guests_bytes =
                    least_bytes + u64::from(GUESTS_MAX) * (CONNECTION_BYTES + NARROW_BYTES);
                for (memory_bytes_max, guests_max) in
                    [(least_bytes, 0), (with_guests_bytes - 1, 0), (with_guests_bytes, GUESTS_MAX)]
                {
                    let plan = limits(memory_bytes_max).plan(rings, GIB, 0, MORE_BYTES).unwrap();
                    assert_eq!(plan.guests_max, guests_max);
                    assert!(
                        plan.connections_per_ring * rings as u32 >= connections_max + guests_max,
                        "{plan:?}"
                    );
                }
                for memory_bytes_max in [least_bytes, least_bytes + (7 << 20), 2 * least_bytes, 1 << 40] {
                    let plan = limits(memory_bytes_max).plan(rings, GIB, 0, MORE_BYTES).unwrap();
                    assert!(plan.total_bytes <= memory_bytes_max, "{plan:?}");
                    assert!(plan.pool.bytes() <= PoolSize::full(request_bytes_max).bytes());
                }
            }
        }
    }

    #[test]
    fn unset_it_is_half_of_the_machine_at_most_and_full_pools_where_there_is_room() {
        let limits = Limits::default();
        let plan = limits.plan(2, 1 << 40, 0, MORE_BYTES).unwrap();
        assert_eq!(plan.pool, PoolSize::full(limits.request_bytes_max));
        assert_eq!(plan.wide_sockets_bytes, u64::from(limits.connections_max + GUESTS_MAX) * MORE_BYTES);
        let plan = limits.plan(8, 2 * GIB, 0, MORE_BYTES).unwrap();
        assert!((MORE_BYTES..100 * MORE_BYTES).contains(&plan.wide_sockets_bytes), "{plan:?}");
        assert!(
            plan.total_bytes <= GIB && plan.pool.bytes() < PoolSize::full(limits.request_bytes_max).bytes()
        );
        let error = limits.plan(8, GIB / 2, 0, MORE_BYTES).unwrap_err();
        assert!(error.to_string().contains("a memory limit of 256 MiB is too little"), "{error}");
    }

    #[test]
    fn where_only_a_control_group_is_small_the_least_is_planned() {
        let limits = Limits::default();
        let group = |bytes| ("/sys/fs/cgroup/memory.max".into(), bytes);
        let within = |limits: &Limits, machine_bytes, group_bytes| {
            limits.plan_within(2, &Allowed::smallest(machine_bytes, [group(group_bytes)]), 0, MORE_BYTES)
        };
        let least = within(&limits, 8 * GIB, 512 << 20).unwrap();
        assert!(limits.plan(2, 512 << 20, 0, MORE_BYTES).is_err(), "half of it is too little");
        assert!((256 << 20..4 * GIB).contains(&least.total_bytes), "{least:?}");
        let less = Limits { memory_bytes_max: Some(least.total_bytes - (2 << 20)), ..limits };
        assert!(within(&less, 8 * GIB, 512 << 20).is_err(), "no more than it has to be: {least:?}");
        // However small it is.
        assert_eq!(within(&limits, 8 * GIB, 64 << 20).unwrap(), least);
        // With a machine of that size, or a limit that was set, it is refused.
        assert!(within(&limits, 512 << 20, 512 << 20).is_err());
        assert!(within(&limits, 512 << 20, 64 << 20).is_err());
        let set = Limits { memory_bytes_max: Some(256 << 20), ..limits };
        assert!(within(&set, 8 * GIB, 512 << 20).is_err());
        // Where half of it is enough nothing changes.
        assert_eq!(within(&limits, 8 * GIB, 2 * GIB), limits.plan(2, 2 * GIB, 0, MORE_BYTES));
    }

    #[test]
    fn tls_is_in_the_sum() {
        let limits = Limits { memory_bytes_max: Some(GIB), ..Limits::default() };
        let [without, with] =
            [0, 300 << 10].map(|tls_bytes| limits.plan(2, GIB, tls_bytes, MORE_BYTES).unwrap());
        assert!(with.total_bytes <= GIB && with.pool.bytes() < without.pool.bytes());
        assert!(limits.plan(2, GIB, 1 << 20, MORE_BYTES).is_err(), "a GiB for TLS leaves none for buffers");
    }
}
