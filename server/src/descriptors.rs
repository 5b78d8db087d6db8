//! What the process's open files go to: connections and volumes, half and half where they are few.
//!
//! Owns the division of the limit of open files ([`plan`]) and the count of those that volumes have ([`Descriptors`]). Never: opens a
//! file. A volume takes a descriptor for its I/O, one for each ring to sync on (`sync_groups.rs` says why) and one for its record
//! (`incarnation/`); it keeps them until it is deleted or the server ends, because only who has a file open is told that it could
//! not be written back. So volumes could take what connections need, and are refused before.
//! Called by: `data/server.rs` (the plan), `gate/run.rs` (a volume's share).

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tracing::warn;

use crate::catalog::BackendKind;
use crate::limits::GUESTS_MAX;

/// Beside all that is counted here: the standard ones, listeners, the catalog's files, tokio's, and what calls and openers have open
/// for a moment.
const OTHER: u64 = 128;
/// Of a ring: its io_uring and its mailbox.
const OF_RING: u64 = 2;
/// Of a page pipe: its ends.
const OF_PIPE: u64 = 2;
/// So many volumes have to find room before connections are cut down, however few those are.
const VOLUMES_LEAST: u64 = 16;
/// Without so many connections, or as many as were asked for, nothing is started.
const CONNECTIONS_LEAST: u64 = 32;
const MANAGEMENT_LEAST: u64 = 16;

/// What wants descriptors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wanted {
    /// Ring threads.
    pub rings: usize,
    /// Of each ring, READs that may hold pages of the page cache at once.
    pub page_pipes: u16,
    /// NBD connections at once.
    pub connections_max: u32,
    /// Descriptors that one of them may come to have.
    pub of_connection: u32,
    /// Connections of the management API at once.
    pub management_max: u32,
}

/// How the limit of open files is divided.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Plan {
    /// As wanted, or 0 where there are too few.
    pub page_pipes: u16,
    /// NBD connections at once, at most as wanted.
    pub connections_max: u32,
    /// Connections of the management API at once, at most as wanted.
    pub management_max: u32,
    /// Descriptors that all volumes together may have.
    pub of_volumes: u64,
}

/// The limit of open files leaves too little for a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "a limit of {allowed} open files is too little: {rings} threads with a few connections and one volume need {needed}; raise it \
     (LimitNOFILE= of the unit, ulimit -n, a container's ulimits) or lower --threads"
)]
pub struct TooFewDescriptors {
    /// What the process may have.
    pub allowed: u64,
    /// The least that would do.
    pub needed: u64,
    /// Ring threads.
    pub rings: usize,
}

/// Descriptors of one open volume.
pub fn of_volume(backend: BackendKind, rings: usize) -> u64 {
    match backend {
        BackendKind::File | BackendKind::Device | BackendKind::Lvm => rings as u64 + 2,
        BackendKind::Memory => 1,
    }
}

/// Divides `allowed` descriptors. All connections get what they want where volumes have as many as either kind beside them, else half of what is left
/// for both; what they do not need of that is the volumes'.
///
/// # Errors
/// [`TooFewDescriptors`]
pub fn plan(allowed: u64, wanted: &Wanted) -> Result<Plan, TooFewDescriptors> {
    let rings = wanted.rings as u64;
    let of_connection = u64::from(wanted.of_connection.max(1));
    let (connections_max, management_max) =
        (u64::from(wanted.connections_max), u64::from(wanted.management_max));
    let of_volume = of_volume(BackendKind::File, wanted.rings);
    let fixed = OTHER + rings * OF_RING + u64::from(GUESTS_MAX) * of_connection;

    let wanted_in_all = fixed
        + rings * OF_PIPE * u64::from(wanted.page_pipes)
        + connections_max * of_connection
        + management_max;
    let of_volumes_least =
        (VOLUMES_LEAST * of_volume).max(connections_max * of_connection).max(management_max);
    if allowed >= wanted_in_all + of_volumes_least {
        return Ok(Plan {
            page_pipes: wanted.page_pipes,
            connections_max: wanted.connections_max,
            management_max: wanted.management_max,
            of_volumes: allowed - wanted_in_all,
        });
    }
    let connections_least = connections_max.min(CONNECTIONS_LEAST);
    let management_least = management_max.min(MANAGEMENT_LEAST);
    let needed = fixed + connections_least * of_connection + management_least + of_volume;
    let Some(spare) = allowed.checked_sub(needed) else {
        return Err(TooFewDescriptors { allowed, needed, rings: wanted.rings });
    };
    let management = management_max.min(management_least + spare / 4);
    let of_more_connections = (spare - (management - management_least)) / 2;
    let connections = connections_max.min(connections_least + of_more_connections / of_connection);
    Ok(Plan {
        page_pipes: 0,
        // Both are at most what was wanted.
        connections_max: connections as u32,
        management_max: management as u32,
        of_volumes: allowed - fixed - connections * of_connection - management,
    })
}

/// The same for this process, whose limit is raised to what the administrator allows at most; says what is cut down.
///
/// # Errors
/// [`TooFewDescriptors`]
pub fn plan_of_this_process(wanted: &Wanted) -> Result<Plan, TooFewDescriptors> {
    let allowed = raise_limit();
    let plan = plan(allowed, wanted)?;
    if plan.connections_max < wanted.connections_max || plan.management_max < wanted.management_max {
        warn!(
            allowed,
            connections_max = plan.connections_max,
            wanted = wanted.connections_max,
            "the limit of open files allows fewer connections than --connections-max: raise it (LimitNOFILE=, ulimit -n)"
        );
    }
    Ok(plan)
}

fn raise_limit() -> u64 {
    let limit = getrlimit(Resource::Nofile);
    if limit.current == limit.maximum {
        return limit.current.unwrap_or(u64::MAX);
    }
    match setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }) {
        Ok(()) => limit.maximum.unwrap_or(u64::MAX),
        Err(error) => {
            warn!(%error, ?limit, "the limit of open files cannot be raised");
            limit.current.unwrap_or(u64::MAX)
        }
    }
}

/// A volume has no descriptors left to be opened with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "the volumes that are open have {taken} of the {allowed} open files that volumes may have, and this one needs {needed}: raise \
     the server's limit (LimitNOFILE= of the unit, ulimit -n), or lower --threads or --connections-max, then restart it"
)]
pub struct NoDescriptors {
    /// What others have.
    pub taken: u64,
    /// What all may have.
    pub allowed: u64,
    /// What it needs.
    pub needed: u64,
}

/// Counts the descriptors of volumes.
#[derive(Debug)]
pub struct Descriptors {
    allowed: u64,
    taken: AtomicU64,
}

impl Descriptors {
    /// So many for all volumes together.
    pub fn new(allowed: u64) -> Arc<Self> {
        Arc::new(Self { allowed, taken: AtomicU64::new(0) })
    }

    /// Takes some for a volume.
    ///
    /// # Errors
    /// [`NoDescriptors`]
    pub fn take(self: &Arc<Self>, needed: u64) -> Result<Taken, NoDescriptors> {
        let allowed = self.allowed;
        let more = |taken: u64| taken.checked_add(needed).filter(|sum| *sum <= allowed);
        match self.taken.fetch_update(Ordering::AcqRel, Ordering::Acquire, more) {
            Ok(_) => Ok(Taken { of: Arc::clone(self), count: needed }),
            Err(taken) => Err(NoDescriptors { taken, allowed, needed }),
        }
    }
}

/// A volume's descriptors, given back when dropped.
#[derive(Debug)]
pub struct Taken {
    of: Arc<Descriptors>,
    count: u64,
}

impl Drop for Taken {
    fn drop(&mut self) {
        self.of.taken.fetch_sub(self.count, Ordering::AcqRel);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(rings: usize) -> Wanted {
        Wanted { rings, page_pipes: 32, connections_max: 1024, of_connection: 1, management_max: 512 }
    }

    /// All that may be open at once.
    fn sum(plan: &Plan, wanted: &Wanted) -> u64 {
        let rings = wanted.rings as u64;
        OTHER
            + rings * (OF_RING + OF_PIPE * u64::from(plan.page_pipes))
            + u64::from(plan.connections_max + GUESTS_MAX) * u64::from(wanted.of_connection)
            + u64::from(plan.management_max)
            + plan.of_volumes
    }

    #[test]
    fn no_plan_is_above_its_limit_and_each_has_room_for_connections_and_a_volume() {
        for rings in [1, 2, 16, 64, 1024] {
            for (of_connection, connections_max) in [(1, 1), (1, 1024), (4, 1024), (1, 65536)] {
                let wanted = Wanted { of_connection, connections_max, ..wanted(rings) };
                for allowed in [256, 1024, 4096, 65536, 524_288, 1 << 20, u64::MAX] {
                    match plan(allowed, &wanted) {
                        Ok(plan) => {
                            assert_eq!(sum(&plan, &wanted), allowed, "{wanted:?} {plan:?}");
                            assert!(plan.of_volumes >= of_volume(BackendKind::File, rings), "{plan:?}");
                            assert!(plan.connections_max >= connections_max.min(32), "{plan:?}");
                            assert!(plan.management_max >= 16, "{plan:?}");
                        }
                        Err(error) => {
                            assert!(error.needed > allowed && super::plan(error.needed, &wanted).is_ok());
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn connections_get_what_they_want_as_long_as_volumes_have_as_much() {
        let enough = OTHER + 2 * (2 + 64) + 1024 + u64::from(GUESTS_MAX) + 512 + 1024;
        let at = |allowed| plan(allowed, &wanted(2)).unwrap();
        assert_eq!((at(enough).connections_max, at(enough).management_max), (1024, 512));
        assert_eq!(at(enough).of_volumes, 1024);
        // With a little less the pipes go first.
        assert_eq!((at(enough - 1).page_pipes, at(enough - 1).connections_max), (0, 1024));
        let small = at(1024);
        assert!((300..1024).contains(&small.connections_max) && small.of_volumes >= 300, "{small:?}");
    }

    #[test]
    fn what_connections_do_not_need_is_for_volumes() {
        let of_volumes = |allowed, connections_max| {
            let plan = plan(allowed, &Wanted { connections_max, ..wanted(2) }).unwrap();
            assert!(plan.connections_max >= 32.min(connections_max), "{plan:?}");
            plan.of_volumes / of_volume(BackendKind::File, 2)
        };
        // About half of what is left of 1024, whatever connections want; with fewer of them more.
        for connections_max in [1024, 65536] {
            assert!((70..90).contains(&of_volumes(1024, connections_max)), "{connections_max}");
        }
        assert!(of_volumes(1024, 64) > 120);
        // A higher limit never means fewer volumes or connections, but for what page pipes take.
        let of = |allowed| plan(allowed, &wanted(2)).unwrap();
        for allowed in 200..8000 {
            let (less, more) = (of(allowed), of(allowed + 1));
            let pipes = u64::from(more.page_pipes - less.page_pipes) * 2 * OF_PIPE;
            assert!(more.connections_max >= less.connections_max, "{less:?} {more:?}");
            assert!(more.of_volumes + pipes >= less.of_volumes, "{less:?} {more:?}");
        }
    }

    #[test]
    fn a_limit_that_allows_no_server_is_named_with_what_to_do() {
        let error = plan(100, &wanted(2)).unwrap_err();
        assert_eq!(
            error.to_string(),
            "a limit of 100 open files is too little: 2 threads with a few connections and one volume need 200; raise it \
             (LimitNOFILE= of the unit, ulimit -n, a container's ulimits) or lower --threads"
        );
        assert!(plan(200, &wanted(2)).is_ok() && plan(199, &wanted(2)).is_err());
    }

    #[test]
    fn sixty_four_threads_serve_what_the_unit_allows() {
        // As in deploy/volserver.service.
        let plan = plan(1 << 20, &wanted(64)).unwrap();
        assert!(plan.of_volumes / of_volume(BackendKind::File, 64) >= 15_000, "{plan:?}");
    }

    #[test]
    fn the_last_volume_that_fits_is_opened_and_the_next_when_one_has_gone() {
        let descriptors = Descriptors::new(10);
        let first = descriptors.take(5).unwrap();
        let second = descriptors.take(5).unwrap();
        assert_eq!(descriptors.take(1).unwrap_err(), NoDescriptors { taken: 10, allowed: 10, needed: 1 });
        drop(first);
        assert!(descriptors.take(6).is_err());
        assert!(descriptors.take(5).is_ok());
        drop(second);
    }
}
