//! Names and ids: what CSI calls things by, and what the storage server does.
//!
//! Owns: the names that are made of CSI's, which may be any text of 128 bytes, and the labels that a volume of ours bears. A name of
//! CSI's is never part of a name on the server: its hash is, and the name itself is in the volume's description. An id is the
//! server's uid, in its one spelling. Never: does I/O.

use proto::volume_name::TENANT_MARK;
use uuid::Uuid;

use super::refusal::{Refusal, given, shown};

/// Bytes of a name at most, as CSI says.
const NAME_BYTES_MAX: usize = 128;
/// Of a node's name, as the server takes it, and CSI.
const NODE_ID_BYTES_MAX: usize = 256;
/// Characters of a hash in a name or label: 160 bits. A snapshot's name has 64 characters at most, and a label's value 63.
const HASH_CHARACTERS: usize = 40;
/// Begins the names of volumes and single snapshots.
const PREFIX: &str = "csi-";
/// Begins the names of snapshots that were made as a group.
const GROUP_PREFIX: &str = "csi-group-";

/// Label: the hash of the CSI name, by which the volume is found whatever it is called by now.
pub(super) const LABEL_NAME: &str = "csi.volnode.io/name";
/// Label: the hash of the StorageClass parameters that it was made with.
pub(super) const LABEL_PARAMETERS: &str = "csi.volnode.io/parameters";
/// Label: the file system that the StorageClass wants.
pub(super) const LABEL_FS_TYPE: &str = "csi.volnode.io/fstype";
/// Label: what it is a copy of, [`SOURCE_SNAPSHOT`] or [`SOURCE_VOLUME`].
pub(super) const LABEL_SOURCE: &str = "csi.volnode.io/source";
/// Value of [`LABEL_SOURCE`].
pub(super) const SOURCE_SNAPSHOT: &str = "snapshot";
/// Value of [`LABEL_SOURCE`].
pub(super) const SOURCE_VOLUME: &str = "volume";
/// Label of a copy that has not got its limits yet; taken off once it has.
pub(super) const LABEL_UNFINISHED: &str = "csi.volnode.io/unfinished";
/// Value of [`LABEL_UNFINISHED`].
pub(super) const UNFINISHED_LIMITS: &str = "limits";

/// A name that CSI gives, looked at.
///
/// # Errors
/// INVALID_ARGUMENT: it is missing, too long, or has characters that CSI forbids.
pub(super) fn csi_name(name: &str) -> Result<&str, Refusal> {
    given("name", name)?;
    if name.len() > NAME_BYTES_MAX {
        return Err(Refusal::invalid(format!("name: {} is longer than {NAME_BYTES_MAX} bytes", shown(name))));
    }
    // What is left of the control characters is white space.
    if name.chars().any(|c| c.is_control() && !matches!(c, '\t' | '\n' | '\r')) {
        return Err(Refusal::invalid(format!("name: {} has control characters", shown(name))));
    }
    Ok(name)
}

/// The hash of a text, for names and labels.
pub(super) fn hash(text: &str) -> String {
    let mut hex = blake3::hash(text.as_bytes()).to_hex().to_string();
    hex.truncate(HASH_CHARACTERS);
    hex
}

/// The name on the server of a new volume, or of a snapshot, that CSI calls by `name`.
pub(super) fn of_csi(name: &str) -> String {
    format!("{PREFIX}{}", hash(name))
}

/// The same of a volume in a tenant's name space, if it is to be in one.
pub(super) fn of_csi_volume(tenant: Option<&str>, name: &str) -> String {
    match tenant {
        Some(tenant) => format!("{tenant}{TENANT_MARK}{}", of_csi(name)),
        None => of_csi(name),
    }
}

/// The name on the server of the snapshots of a group that CSI calls by `name`.
pub(super) fn of_csi_group(name: &str) -> String {
    format!("{GROUP_PREFIX}{}", hash(name))
}

/// Whether it is a snapshot of a group that was made as one.
pub(super) fn is_of_group(snapshot_name: &str) -> bool {
    snapshot_name.starts_with(GROUP_PREFIX)
}

/// The uid that an id of CSI's is; nothing else is an id of anything.
pub(super) fn uid(id: &str) -> Option<Uuid> {
    Uuid::try_parse(id).ok().filter(|uid| uid.to_string() == id)
}

/// The uid of a volume that has to be there.
///
/// # Errors
/// INVALID_ARGUMENT: the id is missing; NOT_FOUND: no volume has such a one.
pub(super) fn volume_uid(volume_id: &str) -> Result<Uuid, Refusal> {
    given("volume_id", volume_id)?;
    uid(volume_id).ok_or_else(|| Refusal::not_found(format!("there is no volume {}", shown(volume_id))))
}

/// Whether a node can be called so.
pub(super) fn is_node_id(node_id: &str) -> bool {
    (1..=NODE_ID_BYTES_MAX).contains(&node_id.len()) && node_id.bytes().all(|byte| byte.is_ascii_graphic())
}

#[cfg(test)]
mod tests {
    use proto::label;
    use tonic::Code;

    use super::*;

    #[test]
    fn any_name_of_128_bytes_becomes_a_legal_one() {
        let longest = "x".repeat(NAME_BYTES_MAX);
        let hashes: std::collections::HashSet<String> =
            ["pvc-1", "pvc-2", "ä", "a/../b", "-part1", " ", "tab\tand\nline", &longest]
                .map(|name| of_csi(csi_name(name).unwrap()))
                .into();
        assert_eq!(hashes.len(), 8);
        for name in hashes {
            assert!(
                name.len() <= 64 && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
            );
            assert_eq!(proto::volume_name::partition_of(&name), None);
        }
        let in_tenant = of_csi_volume(Some(&"t".repeat(63)), &longest);
        assert!(proto::volume_name::is_volume_name(&in_tenant), "{in_tenant}");
        assert_eq!(proto::volume_name::tenant_of(&in_tenant), "t".repeat(63));
        assert_eq!(of_csi_volume(None, "x"), of_csi("x"));
        assert!(is_of_group(&of_csi_group(&longest)) && of_csi_group(&longest).len() <= 64);
        assert!(!is_of_group(&of_csi("group-")));
        assert!(label::is_value(&hash("")) && label::is_value(&hash(&longest)));
        for key in [LABEL_NAME, LABEL_PARAMETERS, LABEL_FS_TYPE, LABEL_SOURCE, LABEL_UNFINISHED] {
            assert!(label::is_key(key), "{key}");
        }
    }

    #[test]
    fn names_that_csi_forbids_are_refused() {
        for name in ["", "a\0b", "\u{1b}[2J", "\u{7f}", "\u{85}", &"ä".repeat(65), &"x".repeat(10 << 10)] {
            let refusal = csi_name(name).unwrap_err();
            assert_eq!(refusal.code, Code::InvalidArgument);
            assert!(refusal.message.len() < 600 && !refusal.message.contains('\u{1b}'));
        }
    }

    #[test]
    fn an_id_is_a_uid_in_its_one_spelling() {
        let uid_text = "0f0e0d0c-0b0a-4908-8706-050403020100";
        assert_eq!(uid(uid_text).unwrap().to_string(), uid_text);
        let spelled = [uid_text.to_uppercase(), format!("{{{uid_text}}}"), uid_text.replace('-', "")];
        for other in spelled.iter().map(String::as_str).chain(["", "vol-1", "uid:x", "../x"]) {
            assert_eq!(uid(other), None, "{other}");
        }
        assert_eq!(volume_uid("").unwrap_err().code, Code::InvalidArgument);
        assert_eq!(volume_uid("nonsense").unwrap_err().code, Code::NotFound);
    }

    #[test]
    fn a_nodes_name_is_what_the_server_takes() {
        assert!(is_node_id("node-1.example") && is_node_id(&"n".repeat(256)));
        for bad in ["", "a b", "a\n", "ä", &"n".repeat(257)] {
            assert!(!is_node_id(bad), "{bad:?}");
        }
    }
}
