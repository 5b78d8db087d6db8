//! What LVM's tools are asked: the arguments of each call, one by one, and how long it may take.
//!
//! Owns the names of logical volumes, which are built from uids alone, and what is said of the machine's settings (lvm.conf(5)): what we depend on
//! is in `--config`, and comes out the same whatever that file says. Never: runs anything (`tool.rs` does).
//! Source: lvm(8), lvcreate(8), lvs(8), lvm.conf(5), dmsetup(8), thin_dump(8), thin_ls(8).

use std::time::Duration;

use uuid::Uuid;

/// Of a call that only looks.
const LOOK_LIMIT: Duration = Duration::from_secs(30);
/// Of one that changes something: it waits for the volume group's lock, and for the I/O of what it suspends.
const CHANGE_LIMIT: Duration = Duration::from_secs(60);

/// Overrides of the settings of lvm.conf(5). No daemon is started out of this server's unit (`monitoring`); what is made is active, whatever the flag
/// to skip that says, with or without a udev (`verify_udev_operations`); nothing asks, and nothing looks for signatures in what is ours.
/// Disks of volnode's own client on this machine are passed over (`filter`): one may wait for this very server, and LVM with it. What is
/// written in volumes is never taken for LVM's (`scan_lvs`): their clients may have written anything there. What
/// else is not to be looked at is in `global_filter` or the devices file, which stay as they are.
const CONFIG: &str = "activation{monitoring=0 verify_udev_operations=1 auto_set_activation_skip=0 retry_deactivation=1} \
     global{use_lvmpolld=0 wait_for_locks=1} backup{backup=0 archive=0} log{report_command_log=0 prefix=\"\"} \
     allocation{wipe_signatures_when_zeroing_new_lvs=0} devices{scan_lvs=0 filter=[\"r|^/dev/ublkb|\"]}";

/// Of one that reads a pool's metadata: some millions of mappings.
const READ_LIMIT: Duration = Duration::from_secs(300);

const VOLUME: &str = "volnode-v-";
const SNAPSHOT: &str = "volnode-s-";
const RESTORING: &str = "volnode-r-";
const REPLACED: &str = "volnode-o-";

/// What a logical volume of ours is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Thin {
    /// A volume's bytes.
    Volume(Uuid),
    /// A snapshot's.
    Snapshot(Uuid),
    /// What is to take the place of a volume's.
    Restoring(Uuid),
    /// What was a volume's until that took its place.
    Replaced(Uuid),
}

impl Thin {
    /// The logical volume's name.
    pub fn name(self) -> String {
        let (kind, uid) = match self {
            Self::Volume(uid) => (VOLUME, uid),
            Self::Snapshot(uid) => (SNAPSHOT, uid),
            Self::Restoring(uid) => (RESTORING, uid),
            Self::Replaced(uid) => (REPLACED, uid),
        };
        format!("{kind}{uid}")
    }

    /// What has that name; `None`: it is none of ours.
    pub fn of_name(name: &str) -> Option<Self> {
        let kind = [VOLUME, SNAPSHOT, RESTORING, REPLACED].into_iter().find(|kind| name.starts_with(kind))?;
        let uid: Uuid = name.strip_prefix(kind)?.parse().ok()?;
        let found = match kind {
            VOLUME => Self::Volume(uid),
            SNAPSHOT => Self::Snapshot(uid),
            RESTORING => Self::Restoring(uid),
            _ => Self::Replaced(uid),
        };
        // A uid has several spellings, and one that is ours.
        (found.name() == name).then_some(found)
    }
}

/// A thin pool, as `VG/POOL`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PoolName {
    /// Of its volume group.
    pub group: String,
    /// Its own.
    pub pool: String,
}

impl std::fmt::Display for PoolName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.group, self.pool)
    }
}

impl std::str::FromStr for PoolName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        // As lvm(8) has them; one that begins with a hyphen would be an option.
        let is_name = |name: &str| {
            let is_known = |c: char| c.is_ascii_alphanumeric() || "+_.-".contains(c);
            (1..=127).contains(&name.len()) && name.chars().all(is_known) && !name.starts_with(['-', '.'])
        };
        match text.split_once('/') {
            Some((group, pool)) if is_name(group) && is_name(pool) => {
                Ok(Self { group: group.to_owned(), pool: pool.to_owned() })
            }
            _ => Err("must be a volume group and a thin pool in it, as VG/POOL".to_owned()),
        }
    }
}

/// A call of `lvm`, or of a tool beside it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Call {
    /// What is run.
    pub program: &'static str,
    /// All arguments; of `lvm`, the name of the tool first.
    pub args: Vec<String>,
    /// How long it may take.
    pub limit: Duration,
    /// It only reads what nobody changes: it may be killed, and then its end is waited for.
    pub only_reads: bool,
}

impl Call {
    fn new(limit: Duration, args: &[&str]) -> Self {
        let program = "lvm";
        let [tool, rest @ ..] = args else {
            return Self { program, args: Vec::new(), limit, only_reads: false };
        };
        let config = ["--config", CONFIG];
        let args = std::iter::once(tool).chain(&config).chain(rest);
        Self { program, args: args.map(|arg| (*arg).to_owned()).collect(), limit, only_reads: false }
    }

    fn beside(program: &'static str, limit: Duration, args: &[&str]) -> Self {
        Self { program, args: args.iter().map(|arg| (*arg).to_owned()).collect(), limit, only_reads: false }
    }

    fn reading(self) -> Self {
        Self { only_reads: true, ..self }
    }

    /// What it is called in messages.
    pub(super) fn name(&self) -> String {
        match self.args.first() {
            Some(tool) if self.program == "lvm" => tool.clone(),
            _ => self.program.to_owned(),
        }
    }

    /// The same, which may take no longer than that.
    pub(super) fn within(self, limit: Duration) -> Self {
        Self { limit: self.limit.min(limit), ..self }
    }

    fn change(args: &[&str]) -> Self {
        Self::new(CHANGE_LIMIT, args)
    }
}

const REPORT: [&str; 4] = ["--reportformat", "json", "--units", "b"];

impl PoolName {
    fn of(&self, thin: Thin) -> String {
        format!("{}/{}", self.group, thin.name())
    }

    /// The name that device mapper has for it: each hyphen of a name twice, and one between both.
    pub(super) fn mapper_name(&self, thin: Thin) -> String {
        format!("{}-{}", self.group.replace('-', "--"), thin.name().replace('-', "--"))
    }

    /// What device mapper calls a part of the pool.
    fn mapper_part(&self, part: &str) -> String {
        format!("{}-{}{part}", self.group.replace('-', "--"), self.pool.replace('-', "--"))
    }

    /// Has the pool keep its metadata as they are now, to be read; or not any more.
    pub fn keep_metadata(&self, keeps: bool) -> Call {
        let message = if keeps { "reserve_metadata_snap" } else { "release_metadata_snap" };
        Call::beside("dmsetup", LOOK_LIMIT, &["message", &self.mapper_part("-tpool"), "0", message])
    }

    /// Whether it keeps them, among much else.
    pub fn status(&self) -> Call {
        Call::beside("dmsetup", LOOK_LIMIT, &["status", "--noflush", &self.mapper_part("-tpool")])
    }

    fn metadata_path(&self) -> String {
        format!("/dev/mapper/{}", self.mapper_part("_tmeta"))
    }

    /// The mappings of a thin volume, as XML, of the metadata that are kept.
    pub fn dump(&self, thin_id: u32) -> Call {
        let (thin_id, path) = (thin_id.to_string(), self.metadata_path());
        Call::beside("thin_dump", READ_LIMIT, &["--metadata-snap", "--dev-id", &thin_id, &path]).reading()
    }

    /// What each thin volume has alone, in bytes, of the metadata that are kept.
    pub fn list_exclusive(&self) -> Call {
        let path = self.metadata_path();
        let args = ["--metadata-snap", "--no-headers", "--format", "DEV,EXCLUSIVE_BYTES", &path];
        Call::beside("thin_ls", READ_LIMIT, &args).reading()
    }

    /// What the pool is, and how full.
    pub fn look_at_pool(&self) -> Call {
        let options = "lv_name,lv_layout,lv_when_full,zero,data_percent,metadata_percent,lv_health_status,lv_check_needed";
        let [a, b, c, d] = REPORT;
        let pool = self.to_string();
        Call::new(LOOK_LIMIT, &["lvs", a, b, c, d, "--nosuffix", "--options", options, &pool])
    }

    /// All logical volumes of its group.
    pub fn list(&self) -> Call {
        let options = "lv_name,lv_uuid,vg_uuid,lv_size,pool_lv,lv_tags,thin_id,data_percent,lv_kernel_major,lv_kernel_minor";
        let [a, b, c, d] = REPORT;
        Call::new(LOOK_LIMIT, &["lvs", a, b, c, d, "--nosuffix", "--options", options, &self.group])
    }

    /// A write that finds the pool full fails at once.
    pub fn error_when_full(&self) -> Call {
        Call::change(&["lvchange", "--yes", "--errorwhenfull", "y", &self.to_string()])
    }

    /// No byte of a former volume is seen in a new one.
    pub fn zero(&self) -> Call {
        Call::change(&["lvchange", "--yes", "--zero", "y", &self.to_string()])
    }

    /// Makes an empty thin volume.
    pub fn create(&self, thin: Thin, bytes: u64, tag: &str) -> Call {
        let (size, name) = (format!("{bytes}b"), thin.name());
        Call::change(&[
            "lvcreate",
            "--yes",
            "--type",
            "thin",
            "--virtualsize",
            &size,
            "--name",
            &name,
            "--addtag",
            tag,
            "--wipesignatures",
            "n",
            "--setactivationskip",
            "n",
            "--thinpool",
            &self.pool,
            &self.group,
        ])
    }

    /// Makes a thin snapshot of another, of one instant, that can be written to.
    pub fn snapshot(&self, of: Thin, thin: Thin, tag: &str) -> Call {
        let (of, name) = (self.of(of), thin.name());
        Call::change(&[
            "lvcreate",
            "--yes",
            "--snapshot",
            "--name",
            &name,
            "--addtag",
            tag,
            "--permission",
            "rw",
            "--setactivationskip",
            "n",
            "--activate",
            "y",
            "--ignoreactivationskip",
            &of,
        ])
    }

    /// Makes the logical volume larger.
    pub fn extend(&self, thin: Thin, bytes: u64) -> Call {
        let size = format!("{bytes}b");
        Call::change(&["lvextend", "--yes", "--size", &size, &self.of(thin)])
    }

    /// Has the kernel have the pool.
    pub fn activate_pool(&self) -> Call {
        Call::change(&["lvchange", "--yes", "--activate", "y", &self.to_string()])
    }

    /// Has the kernel have its device.
    pub fn activate(&self, thin: Thin) -> Call {
        Call::change(&["lvchange", "--yes", "--activate", "y", "--ignoreactivationskip", &self.of(thin)])
    }

    /// Gives it another name.
    pub fn rename(&self, from: Thin, to: Thin) -> Call {
        Call::change(&["lvrename", "--yes", &self.group, &from.name(), &to.name()])
    }

    /// Removes the logical volume.
    pub fn remove(&self, thin: Thin) -> Call {
        Call::change(&["lvremove", "--yes", &self.of(thin)])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_of_uids_alone_and_are_read_again() {
        let uid = Uuid::from_u128(7);
        for thin in [Thin::Volume(uid), Thin::Snapshot(uid), Thin::Restoring(uid), Thin::Replaced(uid)] {
            assert_eq!(Thin::of_name(&thin.name()), Some(thin));
        }
        assert_eq!(Thin::Volume(uid).name(), "volnode-v-00000000-0000-0000-0000-000000000007");
        for other in ["root", "volnode-v-", "volnode-v-00000000000000000000000000000007", "volnode-x-7"] {
            assert_eq!(Thin::of_name(other), None, "{other}");
        }
    }

    #[test]
    fn a_pool_is_a_group_and_a_name_and_never_an_option() {
        let pool: PoolName = "vg0/thin+1".parse().unwrap();
        assert_eq!((pool.group.as_str(), pool.pool.as_str()), ("vg0", "thin+1"));
        assert_eq!(pool.to_string(), "vg0/thin+1");
        let pool: PoolName = "vg-a/pool".parse().unwrap();
        let name = pool.mapper_name(Thin::Volume(Uuid::nil()));
        assert_eq!(name, "vg--a-volnode--v--00000000--0000--0000--0000--000000000000");
        for bad in ["vg0", "/pool", "vg0/", "-vg/pool", "vg/--force", "vg/a/b", "vg/a b", "../a", "vg/a\n"] {
            assert!(bad.parse::<PoolName>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_pools_metadata_are_read_by_the_names_that_device_mapper_has() {
        let pool: PoolName = "vg-a/pool-1".parse().unwrap();
        let message = pool.keep_metadata(true);
        assert_eq!(message.args, ["message", "vg--a-pool--1-tpool", "0", "reserve_metadata_snap"]);
        assert_eq!((message.program, message.name().as_str()), ("dmsetup", "dmsetup"));
        assert_eq!(pool.keep_metadata(false).args[3], "release_metadata_snap");
        let dump = pool.dump(7);
        assert_eq!(dump.args.last().unwrap(), "/dev/mapper/vg--a-pool--1_tmeta");
        assert!(dump.args.windows(2).any(|pair| pair == ["--dev-id", "7"]), "{dump:?}");
        assert_eq!(pool.list().name(), "lvs");
        assert_eq!(pool.list().within(Duration::from_secs(1)).limit, Duration::from_secs(1));
        assert_eq!(pool.list().within(Duration::MAX).limit, LOOK_LIMIT);
    }

    #[test]
    fn every_call_overrides_the_machines_settings_and_asks_nothing() {
        let pool: PoolName = "vg0/pool".parse().unwrap();
        let uid = Uuid::from_u128(7);
        let (volume, snapshot) = (Thin::Volume(uid), Thin::Snapshot(uid));
        let changes = [
            pool.error_when_full(),
            pool.zero(),
            pool.activate_pool(),
            pool.create(volume, 4096, "t"),
            pool.snapshot(volume, snapshot, "t"),
            pool.extend(volume, 8192),
            pool.activate(volume),
            pool.rename(Thin::Restoring(uid), volume),
            pool.remove(snapshot),
        ];
        for call in &changes {
            assert_eq!(call.args[1..3], ["--config", CONFIG], "{call:?}");
            assert_eq!(call.args[3], "--yes", "{call:?}");
            assert!(call.args[2].contains("scan_lvs=0"), "what a client wrote is not looked at");
        }
        for call in [pool.list(), pool.look_at_pool()] {
            assert_eq!(call.args[1..3], ["--config", CONFIG], "{call:?}");
            assert!(call.args.windows(2).any(|pair| pair == ["--reportformat", "json"]), "{call:?}");
        }
        let made = &changes[3].args;
        assert_eq!(made[0], "lvcreate");
        assert!(made.windows(2).any(|pair| pair == ["--virtualsize", "4096b"]), "{made:?}");
        assert_eq!(made[made.len() - 2..], ["pool", "vg0"]);
        let snapshot = &changes[4].args;
        assert_eq!(snapshot.last().unwrap(), &format!("vg0/{}", volume.name()));
    }
}
