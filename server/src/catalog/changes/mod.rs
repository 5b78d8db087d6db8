//! What has changed in the catalog, in order: for those who watch.
//!
//! Owns the table `changes`, which triggers fill (`triggers.rs`), and how it is read: what is there, what comes behind a point, and
//! whether a point is one of this history. Rows are in the order of their commits, without gaps; each has a mark at random, so that a
//! row of the same number in a catalog that was put back from a backup is another one. Never: keeps the catalog for long; a page at a
//! time is read. Called by `management/watch/`, and by `serve.rs` where space gets short.

mod facts;
#[cfg(test)]
mod tests;
mod triggers;

use std::path::Path;
use std::sync::atomic::Ordering;

use rusqlite::hooks::Action;
use rusqlite::{Connection, OptionalExtension as _, Row, TransactionBehavior};
use tokio::sync::watch;

use super::columns::damaged;
use super::{Catalog, CatalogError, now_ms, reserve, space_bytes, tenants};
pub use facts::{AttachmentFacts, Facts, GrantFacts, NodeFacts, SnapshotFacts, VolumeFacts, WatchedKind};
use triggers::{KEPT, Kept, SOURCES};

/// Free pages (of 4 KiB) that the database is to have where its file system is nearly full: for some hundred changes more.
const SPARE_PAGES: u32 = 64;
/// Of the oldest changes, so many are given up in one step.
const GIVEN_UP_AT_ONCE: u32 = 256;
/// Steps of one look.
pub(super) const STEPS_MAX: u32 = 16;
/// So many of the newest are kept where the file system is nearly full: those who watch just now go on.
const KEPT_LEAST: u32 = 256;
/// After so many changes it is looked whether there is room for more.
const CHANGES_BETWEEN_LOOKS: u64 = 16;
/// The oldest changes whose size is taken for that of the others.
const MEASURED: u32 = 32;
/// Of a row, beside what it is about and its facts.
const ROW_BYTES: f64 = 60.0;
const PAGE_BYTES: f64 = 4096.0;

/// A place in the history: a change that there was.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChangePoint {
    /// Its number.
    pub seq: i64,
    /// Its mark.
    pub mark: String,
}

/// What happened to an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Happened {
    /// It is there now.
    Created,
    /// Something that is told of it is another.
    Updated,
    /// It is gone.
    Deleted,
}

/// An object as it is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Told {
    /// Its identity; of a node its name, of a grant its volume's and its node's with a `/` between them.
    pub uid: String,
    /// The volume that it is, or belongs to; empty of a node.
    pub volume_uid: String,
    /// In whose name space that volume is or was; empty: in none, or it is a node.
    pub tenant: String,
    /// What it is like.
    pub facts: Facts,
}

/// One change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// Where it is.
    pub point: ChangePoint,
    /// When it was made, in milliseconds since the Unix epoch.
    pub time_ms: i64,
    /// What of it is told; `None`: nothing that this program knows.
    pub told: Option<(Happened, Told)>,
}

/// Some of the objects that there are.
#[derive(Debug)]
pub struct PresentPage {
    /// In order of their identities.
    pub objects: Vec<Told>,
    /// The page has what was changed up to here.
    pub as_of: ChangePoint,
}

/// Makes the table and the triggers where they are missing, and replaces triggers of earlier programs.
pub(super) fn prepare(db: &mut Connection) -> Result<(), CatalogError> {
    prepare_keeping(db, KEPT)
}

fn prepare_keeping(db: &mut Connection, kept: Kept) -> Result<(), CatalogError> {
    let transaction = db.transaction_with_behavior(TransactionBehavior::Immediate)?;
    transaction.execute_batch(triggers::TABLE)?;
    transaction.execute_batch(triggers::INDEXES)?;
    transaction.execute_batch(triggers::BEGUN)?;
    drop_those_of_before(&transaction)?;
    transaction.execute_batch(&triggers::all(kept))?;
    Ok(transaction.commit()?)
}

/// Takes the triggers of earlier programs away, which tell less than this one.
fn drop_those_of_before(db: &Connection) -> Result<(), CatalogError> {
    let mut find =
        db.prepare("SELECT 1 FROM sqlite_schema WHERE type = 'trigger' AND name = ?1 AND sql = ?2")?;
    for (text, name) in triggers::of_before() {
        if find.exists((&name, &text))? {
            db.execute_batch(&format!("DROP TRIGGER {name}"))?;
            tracing::info!(name, "a trigger of an earlier volserver is replaced by one that tells more");
        }
    }
    Ok(())
}

/// Counts, for those who wait, how often something was written to the table. Whoever hears of it finds it: until the transaction has
/// ended, the database is the writer's alone.
pub(super) fn notify(db: &mut Connection) -> Result<watch::Sender<u64>, CatalogError> {
    let (sender, _) = watch::channel(0);
    let told = sender.clone();
    db.update_hook(Some(move |action, _: &str, table: &str, _| {
        if action == Action::SQLITE_INSERT && table == "changes" {
            told.send_modify(|count| *count += 1);
        }
    }))?;
    Ok(sender)
}

impl Catalog {
    /// Is told of each change.
    pub fn changes_count(&self) -> watch::Receiver<u64> {
        self.inner.changes.subscribe()
    }

    /// The newest change.
    ///
    /// # Errors
    /// SQLite's.
    pub fn newest_change(&self) -> Result<ChangePoint, CatalogError> {
        Ok(newest(&self.state().db)?)
    }

    /// The mark of a change; `None`: there is none of that number, or not any more.
    ///
    /// # Errors
    /// SQLite's.
    pub fn change_mark(&self, seq: i64) -> Result<Option<String>, CatalogError> {
        let state = self.state();
        let mut query = state.db.prepare_cached("SELECT mark FROM changes WHERE seq = ?1")?;
        Ok(query.query_row([seq], |row| row.get(0)).optional()?)
    }

    /// At most `limit` changes behind that point, in order. `None`: what is behind it is not all there any more.
    ///
    /// # Errors
    /// SQLite's, or a damaged row.
    pub fn changes_after(
        &self,
        after: &ChangePoint,
        limit: u32,
    ) -> Result<Option<Vec<Change>>, CatalogError> {
        changes_after(&self.state().db, after, limit)
    }

    /// At most `limit` objects of that kind whose identities come after `after`; only those of a volume, where its uid is given.
    ///
    /// # Errors
    /// SQLite's, or a damaged row.
    pub fn present(
        &self,
        kind: WatchedKind,
        of_volume: Option<&str>,
        after: &str,
        limit: u32,
    ) -> Result<PresentPage, CatalogError> {
        present(&self.state().db, kind, of_volume, after, limit)
    }

    /// Gives up some of the changes that are too old; and, where the file system is nearly full, the oldest ones, so that the next ones
    /// find room in the database. A deletion must not fail because it is written down.
    ///
    /// # Errors
    /// SQLite's.
    pub fn spare_changes(&self) -> Result<(), CatalogError> {
        for _ in 0..STEPS_MAX {
            // Each step has the catalog for itself, and lets go of it.
            if !make_room(&self.state().db, &self.inner.data_dir, 1)? {
                break;
            }
        }
        prune(&self.state().db, KEPT.milliseconds, GIVEN_UP_AT_ONCE)?;
        Ok(())
    }

    /// The same for room, once for some changes, by whoever uses the catalog next.
    pub(super) fn keep_room(&self, db: &Connection) {
        let (count, looked_at) = (*self.inner.changes.borrow(), &self.inner.changes_at_look);
        if count < looked_at.load(Ordering::Relaxed) + CHANGES_BETWEEN_LOOKS {
            return;
        }
        looked_at.store(count, Ordering::Relaxed);
        if let Err(error) = make_room(db, &self.inner.data_dir, 1) {
            tracing::debug!(%error, "cannot make room in the catalog; its file system is nearly full");
        }
    }
}

/// Where the file system is nearly full: gives up the oldest changes, in so many steps at most. True: there may be more to give up.
pub(super) fn make_room(db: &Connection, data_dir: &Path, steps: u32) -> rusqlite::Result<bool> {
    if space_bytes(data_dir).is_none_or(|bytes| bytes >= reserve::PLENTY_BYTES) {
        return Ok(false);
    }
    for _ in 0..steps {
        if !give_up(db, SPARE_PAGES, GIVEN_UP_AT_ONCE, KEPT_LEAST)? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Where a deletion has found no room: brings the log into the database, which lets the log begin anew, and gives up as many changes
/// as that takes, but for the newest.
pub(super) fn make_room_at_any_price(db: &Connection) -> rusqlite::Result<()> {
    // What it cannot bring over stays in the log, which has some room now.
    let checkpoint = || {
        let _ = db.query_row("PRAGMA wal_checkpoint(PASSIVE)", [], |_| Ok(()));
    };
    checkpoint();
    while free_pages(db)? < SPARE_PAGES && drop_oldest(db, GIVEN_UP_AT_ONCE, 1)? > 0 {}
    checkpoint();
    Ok(())
}

fn newest(db: &Connection) -> rusqlite::Result<ChangePoint> {
    let mut query = db.prepare_cached("SELECT seq, mark FROM changes ORDER BY seq DESC LIMIT 1")?;
    query.query_row([], |row| Ok(ChangePoint { seq: row.get(0)?, mark: row.get(1)? }))
}

fn changes_after(
    db: &Connection,
    after: &ChangePoint,
    limit: u32,
) -> Result<Option<Vec<Change>>, CatalogError> {
    let mut query = db.prepare_cached(&format!(
        "SELECT seq, mark, time_ms, kind, change, uid, volume_uid, facts, {} FROM changes WHERE seq >= ?1 ORDER BY seq LIMIT ?2",
        tenants::tenant_of("changes.volume_uid")
    ))?;
    let mut rows = query.query((after.seq, limit.saturating_add(1)))?;
    // The change itself is kept as long as all that is behind it.
    let is_kept = match rows.next()? {
        Some(row) => row.get::<_, i64>(0)? == after.seq && row.get::<_, String>(1)? == after.mark,
        None => false,
    };
    if !is_kept {
        return Ok(None);
    }
    let mut found = Vec::new();
    while let Some(row) = rows.next()? {
        found.push(change(row)?);
    }
    Ok(Some(found))
}

fn change(row: &Row<'_>) -> Result<Change, CatalogError> {
    let point = ChangePoint { seq: row.get(0)?, mark: row.get(1)? };
    let (kind, change): (String, String) = (row.get(3)?, row.get(4)?);
    let happened = match change.as_str() {
        "created" => Some(Happened::Created),
        "updated" => Some(Happened::Updated),
        "deleted" => Some(Happened::Deleted),
        _ => None,
    };
    let told = match (WatchedKind::of(&kind), happened) {
        (Some(kind), Some(happened)) => {
            let told = told(kind, row.get(5)?, row.get(6)?, row.get(8)?, &row.get::<_, String>(7)?)?;
            Some((happened, told))
        }
        _ => None,
    };
    Ok(Change { point, time_ms: row.get(2)?, told })
}

fn told(
    kind: WatchedKind,
    uid: String,
    volume_uid: String,
    tenant: String,
    facts: &str,
) -> Result<Told, CatalogError> {
    let facts = Facts::parse(kind, facts).map_err(|_| damaged("changes", "facts"))?;
    Ok(Told { uid, volume_uid, tenant, facts })
}

fn present(
    db: &Connection,
    kind: WatchedKind,
    of_volume: Option<&str>,
    after: &str,
    limit: u32,
) -> Result<PresentPage, CatalogError> {
    let is_narrow = of_volume.is_some();
    let sources = SOURCES.iter().filter(|source| source.kind == kind.as_str());
    let tables = sources.map(|source| source.present(is_narrow));
    let all = tables.collect::<Vec<_>>().join(" UNION ALL ");
    // Another program may write between the two queries.
    let at_once = db.unchecked_transaction()?;
    let mut query = at_once.prepare_cached(&format!(
        "SELECT uid, of_volume, facts, {} FROM ({all}) AS present ORDER BY uid LIMIT ?3",
        tenants::tenant_of("present.of_volume")
    ))?;
    let mut rows = query.query((after, of_volume, limit))?;
    let mut objects = Vec::new();
    while let Some(row) = rows.next()? {
        objects.push(told(kind, row.get(0)?, row.get(1)?, row.get(3)?, &row.get::<_, String>(2)?)?);
    }
    Ok(PresentPage { objects, as_of: newest(&at_once)? })
}

/// Gives up some of the oldest changes where the database has less free pages than that, but keeps so many. False: it has enough, or
/// would not have it then, so that nothing is lost for nothing.
fn give_up(db: &Connection, spare_pages: u32, at_once: u32, kept: u32) -> rusqlite::Result<bool> {
    let missing_pages = spare_pages.saturating_sub(free_pages(db)?);
    if missing_pages == 0 {
        return Ok(false);
    }
    let (rows, bytes_each): (u32, f64) = db.query_row(
        "SELECT max(seq) - min(seq) + 1, (SELECT avg(length(CAST(uid || volume_uid || facts AS BLOB))) \
             FROM (SELECT uid, volume_uid, facts FROM changes ORDER BY seq LIMIT ?1)) \
         FROM changes",
        [MEASURED],
        |row| Ok((row.get(0)?, row.get(1)?)),
    )?;
    let is_within_reach = pages_of(rows.saturating_sub(kept), bytes_each) >= f64::from(missing_pages);
    Ok(is_within_reach && drop_oldest(db, at_once, kept)? > 0)
}

/// Pages that so many changes take.
fn pages_of(rows: u32, bytes_each: f64) -> f64 {
    f64::from(rows) * (bytes_each + ROW_BYTES) / PAGE_BYTES
}

fn free_pages(db: &Connection) -> rusqlite::Result<u32> {
    db.pragma_query_value(None, "freelist_count", |row| row.get(0))
}

/// Drops some of the oldest changes, but none of so many newest ones; says how many.
fn drop_oldest(db: &Connection, at_once: u32, kept: u32) -> rusqlite::Result<usize> {
    db.execute(
        "DELETE FROM changes WHERE seq IN (SELECT seq FROM changes ORDER BY seq LIMIT ?1) \
         AND seq <= (SELECT max(seq) FROM changes) - ?2",
        (at_once, kept),
    )
}

/// Drops some of the oldest changes if they are older than that, however few there are: but for the newest, and without a gap.
fn prune(db: &Connection, milliseconds: i64, at_once: u32) -> rusqlite::Result<usize> {
    let too_old = now_ms() - milliseconds;
    let oldest =
        "SELECT time_ms FROM changes WHERE seq < (SELECT max(seq) FROM changes) ORDER BY seq LIMIT 1";
    let oldest: Option<i64> = db.query_row(oldest, [], |row| row.get(0)).optional()?;
    // Where nothing is to be done, nobody's lock is waited for.
    if oldest.is_none_or(|time_ms| time_ms >= too_old) {
        return Ok(0);
    }
    db.execute(
        "DELETE FROM changes WHERE seq <= (SELECT max(seq) FROM (SELECT seq, time_ms FROM changes ORDER BY seq LIMIT ?1) \
         WHERE time_ms < ?2 AND seq < (SELECT max(seq) FROM changes))",
        (at_once, too_old),
    )
}
