//! Calls that were carried out, by the ids that their callers gave them (AIP-155): a repetition does nothing again.
//!
//! A catalog that is used under a request ([`Catalog::under`]) writes the id down in the transaction of the change that the call is for:
//! a kill leaves both or none. The answer is added when there is one; without it, the subject says what an answer is made of anew.
//! Never: knows calls or answers; `management/requests.rs` does, which also keeps two calls of one id from being carried out at once.
//! What is kept is bounded, by number and by age: each scope has a number of its own, so that no tenant pushes out another's.

use rusqlite::{Connection, OptionalExtension as _, TransactionBehavior};
use uuid::Uuid;

use super::schema::add_column;
use super::{Catalog, CatalogError, now_ms};

/// Table that came after the first format; older programs leave it alone.
const TABLE: &str = "
CREATE TABLE IF NOT EXISTS requests (
    number       INTEGER PRIMARY KEY AUTOINCREMENT,
    request_id   TEXT    NOT NULL,
    scope        TEXT    NOT NULL,
    fingerprint  TEXT    NOT NULL,
    subject      TEXT    NOT NULL,
    answer       BLOB,
    time_ms      INTEGER NOT NULL,
    UNIQUE (request_id, scope)
) STRICT;
";

/// The place of a row among those of its scope, from 1; 0: an older program wrote it, and it goes by its age alone.
const PLACE: &str = "INTEGER NOT NULL DEFAULT 0";
const INDEX: &str = "CREATE INDEX IF NOT EXISTS requests_of_scope ON requests (scope, place);";

/// So long a call is known, as `proto/volnode/v1/management.proto` promises it.
const KEPT_MS: i64 = 24 * 60 * 60 * 1000;
/// So many of the newest of a scope are known at most: some 10 MiB.
const KEPT_MAX: u32 = 20_000;
/// So many of the oldest are looked at with each new one: more than one, so that what was left when time passed goes as well.
const PRUNED_AT_ONCE: u32 = 8;
/// A longer answer is not kept, but made anew.
const ANSWER_BYTES_MAX: usize = 4096;

/// A call, as it is known again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RequestKey {
    /// What its caller calls it.
    pub request_id: Uuid,
    /// Whose it is: the scope of its caller, as a query has it (`Scope::for_query`); empty: of one for all of the server.
    /// By the same id another has calls of its own, and hears nothing of these.
    pub scope: String,
    /// The same for the same call with the same fields, and for no other.
    pub fingerprint: String,
}

/// What is known of a call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Carried {
    /// Nothing: it is to be carried out.
    NotYet,
    /// The id was another call's.
    Another,
    /// It was carried out.
    Out {
        /// What it made, changed or took away.
        subject: String,
        /// The first answer; `None`: the server died before there was one, it was a long one, or it was that something goes on.
        answer: Option<Vec<u8>>,
    },
}

/// Makes the table, or adds what the one of an older program lacks.
pub(super) fn prepare(db: &Connection) -> Result<(), CatalogError> {
    db.execute_batch(TABLE)?;
    add_column(db, "requests", "place", PLACE)?;
    Ok(db.execute_batch(INDEX)?)
}

/// Writes down that a call is carried out, in the transaction that does so; nothing where it has no id.
pub(super) fn record(
    db: &Connection,
    request: Option<&RequestKey>,
    subject: &str,
) -> Result<(), CatalogError> {
    request.map_or(Ok(()), |request| add(db, request, subject, None))
}

fn add(
    db: &Connection,
    request: &RequestKey,
    subject: &str,
    answer: Option<&[u8]>,
) -> Result<(), CatalogError> {
    let now = now_ms();
    forget(db, request)?;
    db.execute(
        "INSERT INTO requests (request_id, scope, fingerprint, subject, answer, time_ms, place) \
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, (SELECT coalesce(max(place), 0) + 1 FROM requests WHERE scope = ?2))",
        (request.request_id.to_string(), &request.scope, &request.fingerprint, subject, answer, now),
    )?;
    prune(db, &request.scope, now, KEPT_MAX)
}

fn prune(db: &Connection, scope: &str, now: i64, kept: u32) -> Result<(), CatalogError> {
    db.execute(
        "DELETE FROM requests WHERE scope = ?1 AND place > 0 \
         AND place <= (SELECT max(place) FROM requests WHERE scope = ?1) - ?2",
        (scope, kept),
    )?;
    db.execute(
        "DELETE FROM requests WHERE number IN (SELECT number FROM requests ORDER BY number LIMIT ?1) AND time_ms < ?2",
        (PRUNED_AT_ONCE, now - KEPT_MS),
    )?;
    Ok(())
}

/// Takes back that a call is carried out.
pub(super) fn forget(db: &Connection, request: &RequestKey) -> Result<(), CatalogError> {
    db.execute(
        "DELETE FROM requests WHERE request_id = ?1 AND scope = ?2",
        (request.request_id.to_string(), &request.scope),
    )?;
    Ok(())
}

/// Runs a change that is what the call is for: both are in one transaction.
pub(super) fn carry_out<T>(
    db: &mut Connection,
    request: Option<&RequestKey>,
    subject: &str,
    change: impl FnOnce(&Connection) -> Result<T, CatalogError>,
) -> Result<T, CatalogError> {
    let transaction = db.transaction_with_behavior(TransactionBehavior::Immediate)?;
    let changed = change(&transaction)?;
    record(&transaction, request, subject)?;
    transaction.commit()?;
    Ok(changed)
}

impl Catalog {
    /// The same catalog for one call: the change that it is for is written down together with its id.
    pub fn under(&self, request: RequestKey) -> Self {
        Self { request: Some(request.into()), ..self.clone() }
    }

    /// The same catalog for changes that are not what the call is for.
    pub(crate) fn beside(&self) -> Self {
        Self { request: None, ..self.clone() }
    }

    /// The same change in a transaction of its own, with the call's id.
    pub(super) fn carrying_out<T>(
        &self,
        subject: &str,
        change: impl FnOnce(&Connection) -> Result<T, CatalogError>,
    ) -> Result<T, CatalogError> {
        carry_out(&mut self.state().db, self.request.as_deref(), subject, change)
    }

    /// Writes down that the call is carried out, where its change is none of the catalog's.
    ///
    /// # Errors
    /// SQLite's.
    pub fn note_carried_out(&self, subject: &str) -> Result<(), CatalogError> {
        if self.request.is_none() {
            return Ok(());
        }
        self.carrying_out(subject, |_| Ok(()))
    }

    /// What is known of the call.
    ///
    /// # Errors
    /// SQLite's.
    pub fn carried(&self) -> Result<Carried, CatalogError> {
        let Some(request) = self.request.as_deref() else { return Ok(Carried::NotYet) };
        carried(&self.state().db, request, now_ms())
    }

    /// The call that the catalog is used for.
    pub fn request(&self) -> Option<&RequestKey> {
        self.request.as_deref()
    }

    /// Keeps the answer of the call; of a long one nothing but what it is about, of which it is made anew. A call that found nothing to
    /// change is carried out with it.
    ///
    /// # Errors
    /// SQLite's: a call that found nothing to change is not known then.
    pub fn keep_answer(&self, subject: &str, answer: &[u8]) -> Result<(), CatalogError> {
        let Some(request) = self.request.as_deref() else { return Ok(()) };
        let answer = Some(answer).filter(|answer| answer.len() <= ANSWER_BYTES_MAX);
        let mut state = self.state();
        let transaction = state.db.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let changed = transaction.execute(
            "UPDATE requests SET answer = ?3 WHERE request_id = ?1 AND scope = ?2",
            (request.request_id.to_string(), &request.scope, answer),
        )?;
        if changed == 0 {
            add(&transaction, request, subject, answer)?;
        }
        Ok(transaction.commit()?)
    }
}

fn carried(db: &Connection, request: &RequestKey, now: i64) -> Result<Carried, CatalogError> {
    let mut query = db.prepare_cached(
        "SELECT fingerprint, subject, answer FROM requests WHERE request_id = ?1 AND scope = ?2 AND time_ms >= ?3",
    )?;
    let found: Option<(String, String, Option<Vec<u8>>)> = query
        .query_row((request.request_id.to_string(), &request.scope, now - KEPT_MS), |row| {
            Ok((row.get(0)?, row.get(1)?, row.get(2)?))
        })
        .optional()?;
    Ok(match found {
        None => Carried::NotYet,
        Some((fingerprint, ..)) if fingerprint != request.fingerprint => Carried::Another,
        Some((_, subject, answer)) => Carried::Out { subject, answer },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> Connection {
        let db = Connection::open_in_memory().unwrap();
        prepare(&db).unwrap();
        db
    }

    fn key(number: u128) -> RequestKey {
        RequestKey {
            request_id: Uuid::from_u128(number),
            scope: String::new(),
            fingerprint: format!("f{number}"),
        }
    }

    fn count(db: &Connection) -> u32 {
        db.query_row("SELECT count(*) FROM requests", [], |row| row.get(0)).unwrap()
    }

    #[test]
    fn a_change_that_fails_leaves_no_id() {
        let mut db = table();
        let failed = carry_out(&mut db, Some(&key(1)), "s", |db| {
            db.execute(
                "INSERT INTO requests (request_id, scope, fingerprint, subject, time_ms) VALUES ('a', '', '', '', 0)",
                [],
            )?;
            Err::<(), _>(CatalogError::VolumeExists)
        });
        assert!(failed.is_err() && count(&db) == 0);
        carry_out(&mut db, Some(&key(1)), "s", |_| Ok(())).unwrap();
        let out = Carried::Out { subject: "s".to_owned(), answer: None };
        assert_eq!(carried(&db, &key(1), now_ms()).unwrap(), out);
        carry_out(&mut db, None, "s", |_| Ok(())).unwrap();
        assert_eq!(count(&db), 1, "without an id nothing is written down");
    }

    #[test]
    fn an_id_is_of_one_call_for_a_day_and_of_any_after_that() {
        let db = table();
        record(&db, Some(&key(1)), "s").unwrap();
        let another = RequestKey { fingerprint: "other".to_owned(), ..key(1) };
        assert_eq!(carried(&db, &another, now_ms()).unwrap(), Carried::Another);
        assert_eq!(carried(&db, &another, now_ms() + KEPT_MS + 60_000).unwrap(), Carried::NotYet);
        assert_eq!(carried(&db, &key(2), now_ms()).unwrap(), Carried::NotYet);
    }

    #[test]
    fn an_id_is_known_of_the_scope_that_it_came_from_and_of_no_other() {
        let mut db = table();
        let of = |scope: &str| RequestKey { scope: scope.to_owned(), ..key(1) };
        record(&db, Some(&of(r#"["acme"]"#)), "s").unwrap();
        for other in ["", r#"["b"]"#, r#"["acme","b"]"#] {
            assert_eq!(carried(&db, &of(other), now_ms()).unwrap(), Carried::NotYet, "{other}");
        }
        carry_out(&mut db, Some(&of("")), "t", |_| Ok(())).unwrap();
        forget(&db, &of(r#"["b"]"#)).unwrap();
        let subject = |scope: &str| match carried(&db, &of(scope), now_ms()).unwrap() {
            Carried::Out { subject, .. } => subject,
            other => panic!("{other:?}"),
        };
        assert_eq!((subject(r#"["acme"]"#).as_str(), subject("").as_str()), ("s", "t"));
    }

    #[test]
    fn the_newest_are_kept_and_those_of_yesterday_are_not() {
        let db = table();
        for number in 0..10 {
            record(&db, Some(&key(number)), "s").unwrap();
        }
        prune(&db, "", now_ms(), 3).unwrap();
        assert_eq!(count(&db), 3);
        assert_eq!(carried(&db, &key(6), now_ms()).unwrap(), Carried::NotYet);
        assert_ne!(carried(&db, &key(7), now_ms()).unwrap(), Carried::NotYet);
        prune(&db, "", now_ms() + KEPT_MS + 60_000, 3).unwrap();
        assert_eq!(count(&db), 0);
    }

    #[test]
    fn a_tenant_that_makes_many_calls_pushes_out_none_of_another_s() {
        let db = table();
        let of = |scope: &str, number| RequestKey { scope: scope.to_owned(), ..key(number) };
        record(&db, Some(&of(r#"["acme"]"#, 1)), "s").unwrap();
        record(&db, Some(&of("", 1)), "s").unwrap();
        for number in 2..20 {
            record(&db, Some(&of(r#"["busy"]"#, number)), "s").unwrap();
            prune(&db, r#"["busy"]"#, now_ms(), 3).unwrap();
        }
        assert_eq!(count(&db), 2 + 3);
        for scope in [r#"["acme"]"#, ""] {
            assert_ne!(carried(&db, &of(scope, 1), now_ms()).unwrap(), Carried::NotYet, "{scope}");
        }
        for (number, is_kept) in [(16, false), (17, true), (19, true)] {
            let found = carried(&db, &of(r#"["busy"]"#, number), now_ms()).unwrap();
            assert_eq!(found != Carried::NotYet, is_kept, "{number}");
        }
    }

    #[test]
    fn what_an_older_program_wrote_down_is_known_and_goes_by_its_age() {
        let db = Connection::open_in_memory().unwrap();
        db.execute_batch(TABLE).unwrap();
        let sql = "INSERT INTO requests (request_id, scope, fingerprint, subject, time_ms) VALUES (?1, '', 'f1', 's', ?2)";
        db.execute(sql, (key(1).request_id.to_string(), now_ms())).unwrap();
        prepare(&db).unwrap();
        prepare(&db).unwrap();
        for number in 2..9 {
            record(&db, Some(&key(number)), "s").unwrap();
        }
        prune(&db, "", now_ms(), 3).unwrap();
        assert_eq!(count(&db), 1 + 3);
        assert_eq!(
            carried(&db, &key(1), now_ms()).unwrap(),
            Carried::Out { subject: "s".to_owned(), answer: None }
        );
        prune(&db, "", now_ms() + KEPT_MS + 60_000, 3).unwrap();
        assert_eq!(count(&db), 0);
    }
}
