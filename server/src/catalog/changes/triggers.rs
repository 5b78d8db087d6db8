//! The triggers that write down what changes: SQL that is part of the catalog, and so runs in programs that know nothing of it.
//!
//! Owns what counts as a change, what is told of an object, and how many changes are kept. A change is in the transaction that made it:
//! no call site can forget it, and a kill leaves both or none. Never: the secret of an attachment. Called by [`super::prepare`].
//!
//! A volume or snapshot is one while it is `ready`. An attachment is one while it has a row, in whichever of its tables: moving to
//! another is no change, and it is gone when its I/O has finished. A trigger that is there is left as it is, unless it has, letter by
//! letter, the text of an earlier program ([`BEFORE`]), which tells less: any other may be a later program's, which tells more.

/// What finds the attachments of one volume or node, and grants by their identity; the other tables have such an index by their constraints.
pub(super) const INDEXES: &str = "
CREATE INDEX IF NOT EXISTS shared_attachments_of_volume ON shared_attachments (volume_uid);
CREATE INDEX IF NOT EXISTS snapshot_attachments_of_volume ON snapshot_attachments (volume_uid);
CREATE INDEX IF NOT EXISTS attachments_of_node ON attachments (node_id);
CREATE INDEX IF NOT EXISTS shared_attachments_of_node ON shared_attachments (node_id);
CREATE INDEX IF NOT EXISTS grants_by_identity ON grants (volume_uid || '/' || node_id);
";

/// A snapshot that goes with its attachments, as one does that an older program deletes: they go before it, because what is told of them
/// is told of the snapshot, too.
const CASCADE: &str = "CREATE TRIGGER IF NOT EXISTS snapshots_change_cascaded BEFORE DELETE ON snapshots
BEGIN
    DELETE FROM snapshot_attachments WHERE volume_uid = OLD.snapshot_uid;
END;
";

/// What happens to all rows.
pub(super) const TABLE: &str = "
CREATE TABLE IF NOT EXISTS changes (
    seq         INTEGER PRIMARY KEY AUTOINCREMENT,
    mark        TEXT    NOT NULL,
    time_ms     INTEGER NOT NULL,
    kind        TEXT    NOT NULL,
    change      TEXT    NOT NULL,
    uid         TEXT    NOT NULL,
    volume_uid  TEXT    NOT NULL,
    facts       TEXT    NOT NULL
) STRICT;
";

/// The first row: so there is always one to go on behind, and what is before it belongs to no token.
pub(super) const BEGUN: &str = "
INSERT INTO changes (mark, time_ms, kind, change, uid, volume_uid, facts)
SELECT lower(hex(randomblob(8))), CAST(round((julianday('now') - 2440587.5) * 86400000) AS INTEGER), 'catalog', 'begun', '', '', '{}'
WHERE NOT EXISTS (SELECT 1 FROM changes);
";

/// Milliseconds since the Unix epoch; without `unixepoch`'s fractions, which older copies of SQLite lack.
const NOW_MS: &str = "CAST(round((julianday('now') - 2440587.5) * 86400000) AS INTEGER)";

/// How many changes are kept, and for how long.
#[derive(Debug, Clone, Copy)]
pub(super) struct Kept {
    /// The newest ones.
    pub(super) changes: u32,
    /// Of those, what is not older than this.
    pub(super) milliseconds: i64,
}

/// As `proto/volnode/v1/management.proto` promises it.
pub(super) const KEPT: Kept = Kept { changes: 100_000, milliseconds: 7 * 24 * 60 * 60 * 1000 };

/// So many of the oldest changes are looked at with each new one: more than one, so that what was left when time passed goes as well.
const PRUNED_AT_ONCE: u32 = 8;

const OF_VOLUMES: [&str; 19] = [
    "name",
    "capacity_bytes",
    "block_size_bytes",
    "write_cache_on",
    "created_at_ms",
    "labels",
    "description",
    "is_protected",
    "is_read_only",
    "is_shared",
    "content",
    "initialising_attachment_id",
    "read_iops",
    "write_iops",
    "read_bytes_per_second",
    "write_bytes_per_second",
    "burst_seconds",
    "source_uid",
    "is_encrypted",
];
const OF_ATTACHMENTS: [&str; 7] =
    ["volume_uid", "node_id", "read_only", "is_shared", "generation", "created_at_ms", "boot_id"];
const OF_SNAPSHOTS: [&str; 10] = [
    "name",
    "volume_uid",
    "capacity_bytes",
    "block_size_bytes",
    "created_at_ms",
    "group_uid",
    "content",
    "is_frozen",
    "freeze_id",
    "is_encrypted",
];
const OF_GRANTS: [&str; 4] = ["volume_uid", "node_id", "read_only", "created_at_ms"];
const OF_NODES: [&str; 4] = ["boot_id", "version", "labels", "registered_at_ms"];

/// What programs before this one did not tell: of each, the columns that it did not know. Whoever adds a column adds a line.
const BEFORE: [&[&str]; 1] = [&["is_encrypted"]];

/// A trigger, and the statement that makes it where it is missing.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Trigger {
    name: String,
    sql: String,
}

impl Trigger {
    /// As SQLite writes it down.
    fn text(&self) -> String {
        let text = self.sql.trim_end().trim_end_matches(';');
        text.replacen("CREATE TRIGGER IF NOT EXISTS ", "CREATE TRIGGER ", 1)
    }
}

/// The triggers of earlier programs that this one replaces: texts and names.
pub(super) fn of_before() -> Vec<(String, String)> {
    let of_source = |source: &Source| {
        let now = source.triggers(&[]);
        let before = BEFORE.iter().flat_map(|unknown| source.triggers(unknown));
        let others = before.filter(|trigger| !now.contains(trigger));
        others.map(|trigger| (trigger.text(), trigger.name)).collect::<Vec<_>>()
    };
    SOURCES.iter().flat_map(of_source).collect()
}

/// A table whose rows are objects, and what is told of them.
#[derive(Debug, Clone, Copy)]
pub(super) struct Source {
    pub(super) table: &'static str,
    /// The word for it in `changes`.
    pub(super) kind: &'static str,
    /// The object's identity, as an expression in which `ROW` is the row.
    uid: &'static str,
    /// Told as they are.
    columns: &'static [&'static str],
    /// Told as well: names, each with an expression in which `ROW` is the row.
    more: &'static [(&'static str, &'static str)],
    /// The volume that it belongs to, as such an expression.
    volume_uid: &'static str,
    /// Whether it is of volume `?2`, as a condition that an index serves.
    of_volume: &'static str,
    /// Whether a row is an object only while its state is `ready`.
    has_state: bool,
    /// The row is the same object as one of another table: where it came from, or has gone to.
    moved: Option<&'static str>,
}

const NAME_OF_VOLUME: (&str, &str) =
    ("volume_name", "coalesce((SELECT name FROM volumes WHERE volume_uid = ROW.volume_uid), '')");

/// Everything that is watched.
pub(super) const SOURCES: [Source; 7] = [
    Source {
        table: "volumes",
        kind: "volume",
        uid: "ROW.volume_uid",
        columns: &OF_VOLUMES,
        // As `volumes.rs` reads it.
        more: &[(
            "backend",
            "CASE WHEN EXISTS (SELECT 1 FROM adopted_volumes WHERE volume_uid = ROW.volume_uid) THEN 'device' \
             WHEN EXISTS (SELECT 1 FROM thin_volumes WHERE volume_uid = ROW.volume_uid) THEN 'lvm' ELSE ROW.backend END",
        )],
        volume_uid: "ROW.volume_uid",
        of_volume: "volume_uid = ?2",
        has_state: true,
        moved: None,
    },
    Source {
        table: "attachments",
        kind: "attachment",
        uid: "ROW.attachment_id",
        columns: &OF_ATTACHMENTS,
        more: &[NAME_OF_VOLUME],
        volume_uid: "ROW.volume_uid",
        of_volume: "volume_uid = ?2",
        has_state: false,
        moved: Some("shared_attachments"),
    },
    Source {
        table: "shared_attachments",
        kind: "attachment",
        uid: "ROW.attachment_id",
        columns: &OF_ATTACHMENTS,
        more: &[NAME_OF_VOLUME],
        volume_uid: "ROW.volume_uid",
        of_volume: "volume_uid = ?2",
        has_state: false,
        moved: Some("attachments"),
    },
    Source {
        table: "snapshot_attachments",
        kind: "attachment",
        uid: "ROW.attachment_id",
        columns: &OF_ATTACHMENTS,
        more: &[
            (
                "volume_name",
                "coalesce((SELECT volumes.name || '@' || snapshots.name FROM snapshots JOIN volumes USING (volume_uid) \
                 WHERE snapshot_uid = ROW.volume_uid AND volumes.state = 'ready'), '@' || ROW.volume_uid)",
            ),
            ("snapshot_uid", "ROW.volume_uid"),
        ],
        volume_uid: "coalesce((SELECT volume_uid FROM snapshots WHERE snapshot_uid = ROW.volume_uid), '')",
        of_volume: "volume_uid IN (SELECT snapshot_uid FROM snapshots WHERE volume_uid = ?2)",
        has_state: false,
        moved: None,
    },
    Source {
        table: "snapshots",
        kind: "snapshot",
        uid: "ROW.snapshot_uid",
        columns: &OF_SNAPSHOTS,
        more: &[(
            "volume_name",
            "coalesce((SELECT name FROM volumes WHERE volume_uid = ROW.volume_uid AND state = 'ready'), '')",
        )],
        volume_uid: "ROW.volume_uid",
        of_volume: "volume_uid = ?2",
        has_state: true,
        moved: None,
    },
    Source {
        table: "nodes",
        kind: "node",
        uid: "ROW.node_id",
        columns: &OF_NODES,
        more: &[],
        volume_uid: "''",
        of_volume: "0",
        has_state: false,
        moved: None,
    },
    Source {
        table: "grants",
        kind: "grant",
        // As the index has it.
        uid: "(ROW.volume_uid || '/' || ROW.node_id)",
        columns: &OF_GRANTS,
        more: &[NAME_OF_VOLUME],
        volume_uid: "ROW.volume_uid",
        of_volume: "volume_uid = ?2",
        has_state: false,
        moved: None,
    },
];

impl Source {
    /// The columns that a program knows, to which some are unknown.
    fn known(&self, unknown: &[&str]) -> impl Iterator<Item = &'static str> {
        self.columns.iter().copied().filter(move |column| !unknown.contains(column))
    }

    /// What is told of a row, as an expression that makes a JSON object.
    fn facts(&self, row: &str, unknown: &[&str]) -> String {
        let plain = self.known(unknown).map(|column| format!("'{column}', {row}.{column}"));
        let more = self.more.iter().map(|(name, value)| format!("'{name}', {}", value.replace("ROW", row)));
        format!("json_object({})", plain.chain(more).collect::<Vec<_>>().join(", "))
    }

    /// A query of objects in order of their identities, with volume and facts: at most `?3` behind `?1`; if it is narrow, those of volume
    /// `?2`. The limit is inside, so that no table is read to its end for a page; and what is of one volume is found by that, which the
    /// `+` before the identity sees to.
    pub(super) fn present(&self, is_narrow: bool) -> String {
        let Self { table, uid, volume_uid, .. } = self;
        let (facts, volume_uid) = (self.facts(table, &[]), volume_uid.replace("ROW", table));
        let uid = uid.replace("ROW", table);
        let condition = if self.has_state { "state = 'ready'" } else { "1" };
        let behind =
            if is_narrow { format!("+{uid} > ?1 AND {}", self.of_volume) } else { format!("{uid} > ?1") };
        format!(
            "SELECT * FROM (SELECT {uid} AS uid, {volume_uid} AS of_volume, {facts} AS facts FROM {table} \
             WHERE {condition} AND {behind} ORDER BY {uid} LIMIT ?3)"
        )
    }

    fn trigger(&self, when: (&str, &str, &str), change: &str, row: &str, unknown: &[&str]) -> Trigger {
        let Self { table, kind, uid, volume_uid, .. } = self;
        let (event, name, condition) = when;
        let (facts, volume_uid) = (self.facts(row, unknown), volume_uid.replace("ROW", row));
        let uid = uid.replace("ROW", row);
        let name = format!("{table}_{name}");
        let sql = format!(
            "CREATE TRIGGER IF NOT EXISTS {name} AFTER {event} ON {table} WHEN {condition}
BEGIN
    INSERT INTO changes (mark, time_ms, kind, change, uid, volume_uid, facts)
    VALUES (lower(hex(randomblob(8))), {NOW_MS}, '{kind}', '{change}', {uid}, {volume_uid}, {facts});
END;
"
        );
        Trigger { name, sql }
    }

    /// As a program makes them to which some columns are unknown.
    fn triggers(&self, unknown: &[&str]) -> Vec<Trigger> {
        let (is, was) = match (self.has_state, self.moved) {
            (true, _) => ("NEW.state = 'ready'".to_owned(), "OLD.state = 'ready'".to_owned()),
            (false, None) => ("1".to_owned(), "1".to_owned()),
            (false, Some(other)) => {
                let is_not_there = |row: &str| {
                    let uid = |row: &str| self.uid.replace("ROW", row);
                    format!("NOT EXISTS (SELECT 1 FROM {other} WHERE {} = {})", uid(other), uid(row))
                };
                (is_not_there("NEW"), is_not_there("OLD"))
            }
        };
        let mut all = vec![
            self.trigger(("INSERT", "change_inserted", &is), "created", "NEW", unknown),
            self.trigger(("DELETE", "change_dropped", &was), "deleted", "OLD", unknown),
        ];
        if self.has_state {
            let of_state = "UPDATE OF state";
            let made = "OLD.state <> 'ready' AND NEW.state = 'ready'";
            let unmade = "OLD.state = 'ready' AND NEW.state <> 'ready'";
            all.push(self.trigger((of_state, "change_ready", made), "created", "NEW", unknown));
            all.push(self.trigger((of_state, "change_unready", unmade), "deleted", "OLD", unknown));
        }
        let told = |row: &str| {
            self.known(unknown).map(|column| format!("{row}.{column}")).collect::<Vec<_>>().join(", ")
        };
        let stays = if self.has_state { "OLD.state = 'ready' AND NEW.state = 'ready' AND " } else { "" };
        let is_another = format!("{stays}({}) IS NOT ({})", told("OLD"), told("NEW"));
        let of_told = format!("UPDATE OF {}", self.known(unknown).collect::<Vec<_>>().join(", "));
        all.push(self.trigger((&of_told, "change_updated", &is_another), "updated", "NEW", unknown));
        all
    }
}

/// All triggers, those that prune among them. What goes is always the oldest: there are no gaps in what is left, however a clock jumps;
/// and the newest stays, whatever its age.
pub(super) fn all(kept: Kept) -> String {
    let Kept { changes, milliseconds } = kept;
    let pruning = format!(
        "CREATE TRIGGER IF NOT EXISTS changes_pruned AFTER INSERT ON changes
BEGIN
    DELETE FROM changes WHERE seq <= (
        SELECT max(seq) FROM (SELECT seq, time_ms FROM changes ORDER BY seq LIMIT {PRUNED_AT_ONCE})
        WHERE seq < NEW.seq AND (seq <= NEW.seq - {changes} OR time_ms < NEW.time_ms - {milliseconds}));
END;
"
    );
    let of_sources = SOURCES.iter().flat_map(|source| source.triggers(&[]));
    let mut sql: String = of_sources.map(|trigger| trigger.sql).collect();
    sql.push_str(CASCADE);
    sql.push_str(&pruning);
    sql
}
