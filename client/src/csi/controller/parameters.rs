//! Parameters of StorageClasses, VolumeAttributesClasses and VolumeSnapshotClasses.
//!
//! Owns: their names and values, which are an API. Whatever is not known is refused by name: a typing error would be a limit that
//! nobody has. Never: does I/O.
//!
//! | parameter | value | changed later |
//! | --- | --- | --- |
//! | `csi.storage.k8s.io/fstype` | `ext4`, `xfs` | no |
//! | `backend` | `file`, `lvm`, `memory` | no |
//! | `shared` | `true`, `false` | no |
//! | `encrypted` | `true`, `false` | no |
//! | `tenant` | the tenant in whose name space volumes are made | no |
//! | `readIops`, `writeIops` | requests per second; 0 is no limit | in a VolumeAttributesClass |
//! | `readBandwidth`, `writeBandwidth` | bytes per second, as a quantity of Kubernetes: `104857600`, `100Mi`, `100M`; 0 is no limit | the same |

use std::collections::{BTreeMap, HashMap};

use proto::v1::{Backend, VolumeLimits};
use proto::volume_name::{TENANT_NAME_CHARS_MAX, is_tenant_name};

use super::names::hash;
use super::refusal::{Refusal, shown};
use crate::csi::mount_options::FsType;

/// The file system.
pub(super) const FS_TYPE: &str = "csi.storage.k8s.io/fstype";
const BACKEND: &str = "backend";
const SHARED: &str = "shared";
/// What is written is encrypted, by the nodes.
pub(super) const ENCRYPTED: &str = "encrypted";
const TENANT: &str = "tenant";
const READ_IOPS: &str = "readIops";
const WRITE_IOPS: &str = "writeIops";
const READ_BANDWIDTH: &str = "readBandwidth";
const WRITE_BANDWIDTH: &str = "writeBandwidth";
/// Of external-provisioner's `--extra-create-metadata`: for whom the volume is.
const CLAIM_NAME: &str = "csi.storage.k8s.io/pvc/name";
const CLAIM_NAMESPACE: &str = "csi.storage.k8s.io/pvc/namespace";
const PERSISTENT_VOLUME: &str = "csi.storage.k8s.io/pv/name";
/// Of external-snapshotter's, which says the same of snapshots; nothing is made of it.
const OF_SNAPSHOTS: [&str; 6] = [
    "csi.storage.k8s.io/volumesnapshot/name",
    "csi.storage.k8s.io/volumesnapshot/namespace",
    "csi.storage.k8s.io/volumesnapshotcontent/name",
    "csi.storage.k8s.io/volumegroupsnapshot/name",
    "csi.storage.k8s.io/volumegroupsnapshot/namespace",
    "csi.storage.k8s.io/volumegroupsnapshotcontent/name",
];
/// Requests per second at most, as the server has it.
const IOPS_MAX: u64 = 1_000_000_000;
/// Bytes per second at least and at most, the same.
const BANDWIDTH: std::ops::RangeInclusive<u64> = 1 << 20..=1 << 40;

/// What a StorageClass says.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Class {
    /// The file system of volumes that are mounted.
    pub(super) fs_type: Option<FsType>,
    /// Where the data is kept; `None` is the server's choice, or a copy's source's.
    pub(super) backend: Option<Backend>,
    /// Several nodes may write to its volumes at once.
    pub(super) is_shared: bool,
    /// The nodes encrypt what is written to its volumes.
    pub(super) is_encrypted: bool,
    /// In whose name space its volumes are made.
    pub(super) tenant: Option<String>,
    /// For every volume.
    pub(super) limits: Limits,
    /// Namespace and name of the claim, for people.
    pub(super) claim: Option<String>,
    /// The same for the same parameters; whose claim it is makes no difference.
    pub(super) fingerprint: String,
}

/// Limits that are to be set; of those that are `None` nothing is said.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Limits {
    read_iops: Option<u64>,
    write_iops: Option<u64>,
    read_bytes_per_second: Option<u64>,
    write_bytes_per_second: Option<u64>,
}

impl Class {
    /// # Errors
    /// INVALID_ARGUMENT: a parameter that there is not, or a value that it cannot have.
    pub(super) fn of(parameters: &HashMap<String, String>) -> Result<Self, Refusal> {
        let mut class = Self::default();
        let mut ours = BTreeMap::new();
        for (key, value) in parameters {
            match key.as_str() {
                CLAIM_NAME | CLAIM_NAMESPACE | PERSISTENT_VOLUME => continue,
                FS_TYPE => {
                    let fs_type =
                        FsType::parse(value).map_err(|error| Refusal::invalid(format!("{key}: {error}")))?;
                    class.fs_type = (!value.is_empty()).then_some(fs_type);
                }
                BACKEND => class.backend = Some(backend(value)?),
                SHARED => class.is_shared = boolean(key, value)?,
                ENCRYPTED => class.is_encrypted = boolean(key, value)?,
                TENANT => class.tenant = Some(tenant(value)?),
                key if class.limits.set(key, value)? => {}
                key => return Err(unknown(key, &[FS_TYPE, BACKEND, SHARED, ENCRYPTED, TENANT])),
            }
            ours.insert(key.as_str(), value.as_str());
        }
        if class.is_encrypted && class.is_shared {
            return Err(Refusal::invalid(
                "encrypted: a shared volume cannot be encrypted; take one of both out of the StorageClass",
            ));
        }
        let (namespace, name) = (parameters.get(CLAIM_NAMESPACE), parameters.get(CLAIM_NAME));
        class.claim = namespace.zip(name).map(|(namespace, name)| format!("{namespace}/{name}"));
        class.fingerprint = fingerprint(&ours);
        Ok(class)
    }
}

impl Limits {
    /// Of a VolumeAttributesClass.
    ///
    /// # Errors
    /// INVALID_ARGUMENT: a parameter that cannot be changed, or a value that it cannot have.
    pub(super) fn of(parameters: &HashMap<String, String>) -> Result<Self, Refusal> {
        let mut limits = Self::default();
        for (key, value) in parameters {
            if !limits.set(key, value)? {
                return Err(unknown(key, &[]));
            }
        }
        Ok(limits)
    }

    /// Whether the parameter is one of the limits, which is set then.
    fn set(&mut self, key: &str, value: &str) -> Result<bool, Refusal> {
        match key {
            READ_IOPS => self.read_iops = Some(iops(key, value)?),
            WRITE_IOPS => self.write_iops = Some(iops(key, value)?),
            READ_BANDWIDTH => self.read_bytes_per_second = Some(bandwidth(key, value)?),
            WRITE_BANDWIDTH => self.write_bytes_per_second = Some(bandwidth(key, value)?),
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// What a volume with these limits has once ours are set.
    pub(super) fn over(self, has: VolumeLimits) -> VolumeLimits {
        VolumeLimits {
            read_iops: self.read_iops.unwrap_or(has.read_iops),
            write_iops: self.write_iops.unwrap_or(has.write_iops),
            read_bytes_per_second: self.read_bytes_per_second.unwrap_or(has.read_bytes_per_second),
            write_bytes_per_second: self.write_bytes_per_second.unwrap_or(has.write_bytes_per_second),
            burst_seconds: has.burst_seconds,
        }
    }
}

/// Looks at the parameters of a VolumeSnapshotClass, of which there are none.
///
/// # Errors
/// INVALID_ARGUMENT: there is one.
pub(super) fn of_snapshot(parameters: &HashMap<String, String>) -> Result<(), Refusal> {
    match parameters.keys().find(|key| !OF_SNAPSHOTS.contains(&key.as_str())) {
        None => Ok(()),
        Some(key) => {
            Err(Refusal::invalid(format!("parameter {} is not known: snapshots have none", shown(key))))
        }
    }
}

fn unknown(key: &str, others: &[&str]) -> Refusal {
    let known = [others, &[READ_IOPS, WRITE_IOPS, READ_BANDWIDTH, WRITE_BANDWIDTH]].concat().join(", ");
    Refusal::invalid(format!("parameter {} is not known here; there are {known}", shown(key)))
}

fn backend(value: &str) -> Result<Backend, Refusal> {
    match value {
        "file" => Ok(Backend::File),
        "lvm" => Ok(Backend::Lvm),
        "memory" => Ok(Backend::Memory),
        other => Err(Refusal::invalid(format!("{BACKEND}: {} is not file, lvm or memory", shown(other)))),
    }
}

fn tenant(value: &str) -> Result<String, Refusal> {
    if is_tenant_name(value) {
        return Ok(value.to_owned());
    }
    Err(Refusal::invalid(format!(
        "{TENANT}: {} is no tenant, which is 1 to {TENANT_NAME_CHARS_MAX} letters, digits, '-', '_' and '.', beginning with a letter or digit",
        shown(value)
    )))
}

fn boolean(key: &str, value: &str) -> Result<bool, Refusal> {
    value.parse().map_err(|_| Refusal::invalid(format!("{key}: {} is not true or false", shown(value))))
}

fn iops(key: &str, value: &str) -> Result<u64, Refusal> {
    let number = value.parse().ok().filter(|number| *number <= IOPS_MAX);
    number.ok_or_else(|| {
        Refusal::invalid(format!(
            "{key}: {} is no number of requests per second up to {IOPS_MAX}; 0 is no limit",
            shown(value)
        ))
    })
}

fn bandwidth(key: &str, value: &str) -> Result<u64, Refusal> {
    let number = quantity(value).filter(|bytes| *bytes == 0 || BANDWIDTH.contains(bytes));
    number.ok_or_else(|| {
        Refusal::invalid(format!(
            "{key}: {} is no number of bytes per second from 1Mi to 1Ti, such as 104857600 or 100Mi; 0 is no limit",
            shown(value)
        ))
    })
}

/// A whole quantity of Kubernetes, in bytes.
fn quantity(text: &str) -> Option<u64> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let factor: u64 = match unit {
        "" => 1,
        "k" => 1000,
        "M" => 1_000_000,
        "G" => 1_000_000_000,
        "T" => 1_000_000_000_000,
        "Ki" => 1 << 10,
        "Mi" => 1 << 20,
        "Gi" => 1 << 30,
        "Ti" => 1 << 40,
        _ => return None,
    };
    number.parse::<u64>().ok()?.checked_mul(factor)
}

/// Each key and value with its length before it, so that no two sets of parameters look alike.
fn fingerprint(parameters: &BTreeMap<&str, &str>) -> String {
    let text: String =
        parameters.iter().map(|(key, value)| format!("{}:{key}{}:{value}", key.len(), value.len())).collect();
    hash(&text)
}

#[cfg(test)]
mod tests {
    use tonic::Code;

    use super::*;

    fn map(pairs: &[(&str, &str)]) -> HashMap<String, String> {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn a_storage_class_is_read() {
        let class = Class::of(&map(&[
            ("csi.storage.k8s.io/fstype", "xfs"),
            ("backend", "lvm"),
            ("shared", "false"),
            ("tenant", "acme"),
            ("readIops", "500"),
            ("writeBandwidth", "100Mi"),
            ("csi.storage.k8s.io/pvc/name", "data"),
            ("csi.storage.k8s.io/pvc/namespace", "shop"),
        ]))
        .unwrap();
        assert_eq!(
            (class.fs_type, class.backend, class.is_shared),
            (Some(FsType::Xfs), Some(Backend::Lvm), false)
        );
        assert_eq!((class.claim.as_deref(), class.tenant.as_deref()), (Some("shop/data"), Some("acme")));
        let has = VolumeLimits { read_iops: 1, write_iops: 7, burst_seconds: 5, ..Default::default() };
        let expected = VolumeLimits { read_iops: 500, write_bytes_per_second: 100 << 20, ..has };
        assert_eq!(class.limits.over(has), expected);
        assert_eq!(Limits::default().over(expected), expected);
        assert_eq!(Class::of(&map(&[])).unwrap(), Class { fingerprint: hash(""), ..Class::default() });
    }

    #[test]
    fn whose_claim_it_is_makes_no_other_class() {
        let of = |pairs: &[(&str, &str)]| Class::of(&map(pairs)).unwrap().fingerprint;
        let class = of(&[("backend", "file"), ("readIops", "1")]);
        let claimed = [("readIops", "1"), ("backend", "file"), ("csi.storage.k8s.io/pvc/name", "x")];
        assert_eq!(of(&claimed), class);
        for other in [&[("backend", "file")][..], &[("backend", "file"), ("readIops", "11")], &[]] {
            assert_ne!(of(other), class);
        }
        assert!(proto::label::is_value(&class));
    }

    #[test]
    fn what_is_not_known_or_cannot_be_is_refused_by_name() {
        let long = "x".repeat(10 << 10);
        for (key, value, what) in [
            ("readIOPS", "1", "readIOPS"),
            (long.as_str(), "1", "xxx"),
            ("\u{1b}[2J", "", "\\u{1b}"),
            ("encrypted", "yes", "encrypted: \"yes\" is not true or false"),
            ("encrypted", "", "is not true or false"),
            ("encrypted", "True", "True"),
            ("tenant", "", "no tenant"),
            ("tenant", "a+b", "a+b"),
            ("backend", "device", "device"),
            ("shared", "yes", "yes"),
            ("readIops", "-1", "-1"),
            ("readIops", "1000000001", "1000000001"),
            ("writeIops", "1k", "1k"),
            ("readBandwidth", "1023Ki", "1023Ki"),
            ("readBandwidth", "2Ti", "2Ti"),
            ("writeBandwidth", "99999999999999999999", "9999"),
            ("writeBandwidth", "18446744073709551615Ti", "Ti"),
            ("writeBandwidth", "Mi", "Mi"),
            ("csi.storage.k8s.io/fstype", "ntfs", "ntfs"),
        ] {
            let refusal = Class::of(&map(&[(key, value)])).unwrap_err();
            assert_eq!(refusal.code, Code::InvalidArgument);
            assert!(refusal.message.contains(what) && refusal.message.len() < 600, "{}", refusal.message);
        }
    }

    #[test]
    fn a_class_is_encrypted_where_it_says_so_and_not_shared_as_well() {
        for (parameters, is_encrypted) in
            [(&[][..], false), (&[("encrypted", "false")], false), (&[("encrypted", "true")], true)]
        {
            assert_eq!(Class::of(&map(parameters)).unwrap().is_encrypted, is_encrypted, "{parameters:?}");
        }
        let refusal = Class::of(&map(&[("encrypted", "true"), ("shared", "true")])).unwrap_err();
        assert!(refusal.code == Code::InvalidArgument && refusal.message.contains("cannot be encrypted"));
    }

    #[test]
    fn only_limits_change_later() {
        let limits = Limits::of(&map(&[("readBandwidth", "0"), ("writeIops", "100")])).unwrap();
        let has = VolumeLimits { read_bytes_per_second: 1 << 20, ..Default::default() };
        assert_eq!(limits.over(has), VolumeLimits { write_iops: 100, ..Default::default() });
        for key in ["backend", "shared", "encrypted", "tenant", "csi.storage.k8s.io/fstype", "no-such-key"] {
            let refusal = Limits::of(&map(&[(key, "true")])).unwrap_err();
            assert!(refusal.code == Code::InvalidArgument && refusal.message.contains(key));
        }
        assert!(of_snapshot(&map(&[("csi.storage.k8s.io/volumesnapshot/name", "x")])).is_ok());
        assert!(
            of_snapshot(&map(&[("incremental", "true")])).is_err_and(|it| it.message.contains("incremental"))
        );
    }

    #[test]
    fn quantities_are_as_in_kubernetes() {
        for (text, bytes) in
            [("7", 7), ("1Ki", 1024), ("2k", 2000), ("3Mi", 3 << 20), ("1T", 1_000_000_000_000)]
        {
            assert_eq!(quantity(text), Some(bytes), "{text}");
        }
        for text in ["", "k", "1 Mi", "1.5Mi", "1mi", "-1", "+1"] {
            assert_eq!(quantity(text), None, "{text}");
        }
    }
}
