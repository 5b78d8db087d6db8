//! What LVM's tools answer, as JSON. Only reads; what is missing or of another form is an error that names it.

use serde::Deserialize;

use super::command::Thin;
use super::trouble::PoolTrouble;

/// An answer that cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("LVM's tools answer what cannot be read: {0}")]
pub struct Unreadable(pub(super) String);

/// A thin pool, as it is now.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct PoolState {
    /// A write that finds no space fails, and does not wait for some.
    pub errors_when_full: bool,
    /// What was another volume's is zeroed before it is a new one's.
    pub zeroes: bool,
    /// How full it is.
    pub fill: PoolFill,
    /// What is wrong with it, in LVM's words; empty: nothing.
    pub health: String,
    /// Its metadata are to be checked before anything is made in it.
    pub needs_check: bool,
}

impl PoolState {
    /// Why nothing new can be made in it; of one that is out of data its fill tells.
    pub(super) fn trouble(&self) -> Option<PoolTrouble> {
        match self.health.as_str() {
            "failed" => Some(PoolTrouble::Failed),
            "metadata_read_only" if self.fill.metadata_percent >= 100.0 => Some(PoolTrouble::MetadataFull),
            _ if self.needs_check => Some(PoolTrouble::NeedsCheck),
            "metadata_read_only" => Some(PoolTrouble::ReadOnly),
            _ => None,
        }
    }
}

/// How full a thin pool is, in percent.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PoolFill {
    /// Of its data.
    pub data_percent: f64,
    /// Of its metadata.
    pub metadata_percent: f64,
}

impl PoolFill {
    /// The fuller of both.
    pub fn percent(self) -> f64 {
        self.data_percent.max(self.metadata_percent)
    }
}

/// A logical volume of ours.
#[derive(Debug, Clone, PartialEq)]
pub struct ThinState {
    /// What it is.
    pub thin: Thin,
    /// Its size in bytes: whole extents of its group.
    pub size_bytes: u64,
    /// What its pool knows it by.
    pub thin_id: Option<u32>,
    /// How much of the pool it takes, what it shares among it.
    pub allocated_bytes: u64,
    /// Of its device, where the kernel has one: what it is known by, and its number.
    pub device: Option<(String, u32)>,
}

#[derive(Deserialize)]
struct Answer {
    report: Vec<Report>,
}

#[derive(Deserialize)]
struct Report {
    lv: Vec<Row>,
}

/// LVM writes every value as a text, and leaves what there is none of empty.
#[derive(Deserialize)]
struct Row {
    lv_name: String,
    #[serde(default)]
    lv_uuid: String,
    #[serde(default)]
    vg_uuid: String,
    #[serde(default)]
    lv_size: String,
    #[serde(default)]
    pool_lv: String,
    #[serde(default)]
    lv_tags: String,
    #[serde(default)]
    thin_id: String,
    #[serde(default)]
    lv_layout: String,
    #[serde(default)]
    lv_when_full: String,
    #[serde(default)]
    zero: String,
    #[serde(default)]
    data_percent: String,
    #[serde(default)]
    metadata_percent: String,
    #[serde(default)]
    lv_health_status: String,
    #[serde(default)]
    lv_check_needed: String,
    #[serde(default)]
    lv_kernel_major: String,
    #[serde(default)]
    lv_kernel_minor: String,
}

fn rows(text: &str) -> Result<Vec<Row>, Unreadable> {
    let answer: Answer = serde_json::from_str(text).map_err(|error| Unreadable(error.to_string()))?;
    Ok(answer.report.into_iter().flat_map(|report| report.lv).collect())
}

fn number<T: std::str::FromStr>(text: &str, what: &str) -> Result<T, Unreadable> {
    text.trim().parse().map_err(|_| Unreadable(format!("{what} is {text:?}")))
}

/// The pool's row. `None`: it is there, and is no thin pool.
pub(super) fn pool(text: &str) -> Result<Option<PoolState>, Unreadable> {
    let rows = rows(text)?;
    let [row] = rows.as_slice() else { return Err(Unreadable(format!("{} pools", rows.len()))) };
    let layout: Vec<&str> = row.lv_layout.split(',').collect();
    if !(layout.contains(&"thin") && layout.contains(&"pool")) {
        return Ok(None);
    }
    // Of a pool that has failed, the kernel does not tell.
    let percent = |text: &str, what: &str| match number(text, what) {
        Err(_) if text.is_empty() && row.lv_health_status == "failed" => Ok(100.0),
        read => read,
    };
    let fill = PoolFill {
        data_percent: percent(&row.data_percent, "data_percent")?,
        metadata_percent: percent(&row.metadata_percent, "metadata_percent")?,
    };
    Ok(Some(PoolState {
        errors_when_full: row.lv_when_full == "error",
        zeroes: !matches!(row.zero.as_str(), "" | "0"),
        fill,
        health: row.lv_health_status.clone(),
        // "check needed", 1, or nothing; "unknown" and -1 of what is not known.
        needs_check: matches!(row.lv_check_needed.trim(), "1" | "check needed"),
    }))
}

/// The logical volumes of that pool that are ours, by their names and the tag of this server.
pub(super) fn thin_volumes(text: &str, pool: &str, tag: &str) -> Result<Vec<ThinState>, Unreadable> {
    let mut found = Vec::new();
    for row in rows(text)? {
        let is_ours = row.pool_lv == pool && row.lv_tags.split(',').any(|found| found == tag);
        let Some(thin) = Thin::of_name(&row.lv_name).filter(|_| is_ours) else { continue };
        let size_bytes = number(&row.lv_size, "lv_size")?;
        // Of one that is not active nothing is known.
        let percent: f64 = row.data_percent.trim().parse().unwrap_or(0.0);
        let numbers = (row.lv_kernel_major.trim().parse::<u32>(), row.lv_kernel_minor.trim().parse::<u32>());
        let device = match numbers {
            (Ok(_), Ok(minor)) => Some((device_uuid(&row.vg_uuid, &row.lv_uuid), minor)),
            // -1
            _ => None,
        };
        let allocated_bytes = (size_bytes as f64 * percent / 100.0) as u64;
        let thin_id = row.thin_id.trim().parse().ok();
        found.push(ThinState { thin, size_bytes, thin_id, allocated_bytes, device });
    }
    Ok(found)
}

/// The UUID that device mapper has of a logical volume.
fn device_uuid(group: &str, volume: &str) -> String {
    format!("LVM-{}{}", group.replace('-', ""), volume.replace('-', ""))
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;

    fn pool_answer(layout: &str, when_full: &str, zero: &str) -> String {
        format!(
            r#"{{"report":[{{"lv":[{{"lv_name":"pool","lv_layout":"{layout}","lv_when_full":"{when_full}","zero":"{zero}",
               "data_percent":"12.50","metadata_percent":"20.01","lv_health_status":""}}]}}],"log":[]}}"#
        )
    }

    #[test]
    fn a_pool_says_what_it_does_when_full_and_how_full_it_is() {
        let state = pool(&pool_answer("thin,pool", "queue", "zero")).unwrap().unwrap();
        assert!(!state.errors_when_full && state.zeroes);
        assert_eq!((state.fill.data_percent, state.fill.percent()), (12.5, 20.01));
        let state = pool(&pool_answer("thin,pool", "error", "")).unwrap().unwrap();
        assert!(state.errors_when_full && !state.zeroes);
        assert_eq!(pool(&pool_answer("linear", "", "")).unwrap(), None);
        assert!(pool(r#"{"report":[{"lv":[]}]}"#).is_err() && pool("").is_err() && pool("{}").is_err());
        let inactive = pool_answer("thin,pool", "error", "zero").replace("12.50", "");
        assert!(pool(&inactive).unwrap_err().to_string().contains("data_percent"), "not taken for empty");
    }

    #[test]
    fn a_pool_in_which_nothing_can_be_made_says_why() {
        let of = |health: &str, check: &str, metadata: &str| {
            let answer = pool_answer("thin,pool", "error", "zero")
                .replace(
                    r#""lv_health_status":"""#,
                    &format!(r#""lv_health_status":"{health}","lv_check_needed":"{check}""#),
                )
                .replace("20.01", metadata);
            pool(&answer).unwrap().unwrap().trouble()
        };
        for nothing in ["", "out_of_data"] {
            assert_eq!(of(nothing, "", "20.01"), None, "{nothing}");
            assert_eq!(of(nothing, "unknown", "20.01"), None);
        }
        assert_eq!(of("", "check needed", "20.01"), Some(PoolTrouble::NeedsCheck));
        assert_eq!(of("metadata_read_only", "check needed", "20.01"), Some(PoolTrouble::NeedsCheck));
        assert_eq!(of("metadata_read_only", "", "20.01"), Some(PoolTrouble::ReadOnly));
        assert_eq!(of("metadata_read_only", "1", "100.00"), Some(PoolTrouble::MetadataFull));
        assert_eq!(of("failed", "", ""), Some(PoolTrouble::Failed));
    }

    #[test]
    fn ours_are_told_by_name_pool_and_tag() {
        let row = |name: &str, pool: &str, tags: &str, minor: &str| {
            format!(
                r#"{{"lv_name":"{name}","lv_uuid":"aaaaaa-bbbb","vg_uuid":"cccccc-dddd","lv_size":"8388608","pool_lv":"{pool}",
                   "lv_tags":"{tags}","thin_id":"17","data_percent":"50.00","lv_kernel_major":"{minor}","lv_kernel_minor":"{minor}"}}"#
            )
        };
        let uid = Uuid::from_u128(7);
        let (volume, snapshot) = (Thin::Volume(uid), Thin::Snapshot(uid));
        let rows = [
            row(&volume.name(), "pool", "x,ours", "253"),
            row(&snapshot.name(), "pool", "ours", "-1"),
            row(&volume.name(), "pool", "theirs", "1"),
            row(&volume.name(), "other", "ours", "1"),
            row("root", "pool", "ours", "1"),
        ];
        let text = format!(r#"{{"report":[{{"lv":[{}]}}]}}"#, rows.join(","));
        let found = thin_volumes(&text, "pool", "ours").unwrap();
        let [first, second] = found.as_slice() else { panic!("{found:?}") };
        assert_eq!((first.thin, first.size_bytes, first.allocated_bytes), (volume, 8 << 20, 4 << 20));
        assert_eq!(first.thin_id, Some(17));
        assert_eq!(first.device, Some(("LVM-ccccccddddaaaaaabbbb".to_owned(), 253)));
        assert_eq!((second.thin, &second.device), (snapshot, &None), "not active");
    }
}
