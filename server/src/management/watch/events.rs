//! Changes of the catalog as events of the API.
//!
//! Owns the message of each object that is watched. A word that this program does not know becomes the enum's UNSPECIFIED. Pure; used by
//! `run.rs`.

use proto::v1;

use super::token::{Origin, Token};
use crate::catalog::{
    AttachmentFacts, Change, ChangePoint, Facts, GrantFacts, Happened, SnapshotFacts, Told, VolumeFacts,
    WatchedKind, WatchedNodeFacts,
};
use crate::scope::Scope;

/// What a caller wants to hear of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Wanted {
    /// Only of what is in it. Nodes are no tenant's.
    pub(super) scope: Scope,
    /// In the order in which what is there is told.
    pub(super) kinds: Vec<WatchedKind>,
    /// Only of the volume with this uid.
    pub(super) volume_uid: Option<String>,
}

impl Wanted {
    /// Whether an object is among them.
    pub(super) fn has(&self, told: &Told) -> bool {
        let is_of_volume = self.volume_uid.as_ref().is_none_or(|uid| *uid == told.volume_uid);
        is_of_volume && self.kinds.contains(&told.facts.kind()) && self.scope_has(told)
    }

    /// Whether an object is in the scope.
    pub(super) fn scope_has(&self, told: &Told) -> bool {
        self.scope.has(&told.tenant)
    }
}

/// An object that is there.
pub(super) fn present(told: &Told, time_ms: i64) -> v1::WatchEvent {
    event(v1::WatchChange::Present, String::new(), time_ms, Some(object(told)))
}

/// A change; `None`: one that is not told. `origin` is absent before all that there was has been told: there is no token then.
pub(super) fn changed(change: &Change, origin: Option<&Origin>) -> Option<v1::WatchEvent> {
    let (happened, told) = change.told.as_ref()?;
    let word = match happened {
        Happened::Created => v1::WatchChange::Created,
        Happened::Updated => v1::WatchChange::Updated,
        Happened::Deleted => v1::WatchChange::Deleted,
    };
    let token = origin.map_or_else(String::new, |origin| Token::text(origin, &change.point));
    Some(event(word, token, change.time_ms, Some(object(told))))
}

/// All that there was has been told.
pub(super) fn synced(origin: &Origin, point: &ChangePoint, time_ms: i64) -> v1::WatchEvent {
    event(v1::WatchChange::Synced, Token::text(origin, point), time_ms, None)
}

/// A newer token, and nothing else.
pub(super) fn bookmark(origin: &Origin, point: &ChangePoint, time_ms: i64) -> v1::WatchEvent {
    event(v1::WatchChange::Bookmark, Token::text(origin, point), time_ms, None)
}

fn event(
    change: v1::WatchChange,
    resume_token: String,
    time_ms: i64,
    object: Option<v1::watch_event::Object>,
) -> v1::WatchEvent {
    v1::WatchEvent { resume_token, time_ms, change: change.into(), object }
}

fn object(told: &Told) -> v1::watch_event::Object {
    use v1::watch_event::Object;
    match &told.facts {
        Facts::Volume(facts) => Object::Volume(volume(&told.uid, facts)),
        Facts::Attachment(facts) => Object::Attachment(attachment(&told.uid, facts)),
        Facts::Snapshot(facts) => Object::Snapshot(snapshot(&told.uid, facts)),
        Facts::Node(facts) => Object::Node(node(&told.uid, facts)),
        Facts::Grant(facts) => Object::Grant(grant(facts)),
    }
}

fn volume(uid: &str, facts: &VolumeFacts) -> v1::WatchedVolume {
    let backend = match facts.backend.as_str() {
        "file" => v1::Backend::File,
        "memory" => v1::Backend::Memory,
        "device" => v1::Backend::Device,
        "lvm" => v1::Backend::Lvm,
        _ => v1::Backend::Unspecified,
    };
    let write_cache = if facts.write_cache_on == 0 { v1::WriteCache::Off } else { v1::WriteCache::On };
    v1::WatchedVolume {
        name: facts.name.clone(),
        volume_uid: uid.to_owned(),
        capacity_bytes: facts.capacity_bytes,
        block_size_bytes: facts.block_size_bytes,
        backend: backend.into(),
        write_cache: write_cache.into(),
        created_at_ms: facts.created_at_ms,
        labels: facts.labels.clone().into_iter().collect(),
        description: facts.description.clone(),
        is_protected: facts.is_protected != 0,
        is_read_only: facts.is_read_only != 0,
        is_shared: facts.is_shared != 0,
        content: content(&facts.content).into(),
        initialising_attachment_id: facts.initialising_attachment_id.clone(),
        limits: Some(v1::VolumeLimits {
            read_iops: facts.read_iops,
            write_iops: facts.write_iops,
            read_bytes_per_second: facts.read_bytes_per_second,
            write_bytes_per_second: facts.write_bytes_per_second,
            burst_seconds: facts.burst_seconds,
        }),
        source_uid: facts.source_uid.clone(),
        is_encrypted: facts.is_encrypted != 0,
    }
}

fn content(word: &str) -> v1::VolumeContent {
    match word {
        "never-written" => v1::VolumeContent::NeverWritten,
        "initialising" => v1::VolumeContent::Initialising,
        "written" => v1::VolumeContent::Written,
        _ => v1::VolumeContent::Unspecified,
    }
}

fn attachment(id: &str, facts: &AttachmentFacts) -> v1::WatchedAttachment {
    let access_mode = match (facts.read_only != 0, facts.is_shared != 0) {
        (false, false) => v1::AccessMode::SingleNodeWriter,
        (false, true) => v1::AccessMode::MultiNodeMultiWriter,
        (true, false) => v1::AccessMode::SingleNodeReaderOnly,
        (true, true) => v1::AccessMode::MultiNodeReaderOnly,
    };
    v1::WatchedAttachment {
        attachment_id: id.to_owned(),
        volume_name: facts.volume_name.clone(),
        volume_uid: facts.volume_uid.clone(),
        node_id: facts.node_id.clone(),
        access_mode: access_mode.into(),
        generation: facts.generation,
        created_at_ms: facts.created_at_ms,
        boot_id: facts.boot_id.clone(),
        snapshot_uid: facts.snapshot_uid.clone(),
    }
}

fn snapshot(uid: &str, facts: &SnapshotFacts) -> v1::WatchedSnapshot {
    v1::WatchedSnapshot {
        name: facts.name.clone(),
        snapshot_uid: uid.to_owned(),
        volume_name: facts.volume_name.clone(),
        volume_uid: facts.volume_uid.clone(),
        capacity_bytes: facts.capacity_bytes,
        block_size_bytes: facts.block_size_bytes,
        created_at_ms: facts.created_at_ms,
        group_uid: facts.group_uid.clone(),
        content: content(&facts.content).into(),
        frozen: facts.is_frozen != 0,
        freeze_id: facts.freeze_id.clone(),
        is_encrypted: facts.is_encrypted != 0,
    }
}

fn grant(facts: &GrantFacts) -> v1::WatchedGrant {
    v1::WatchedGrant {
        volume_name: facts.volume_name.clone(),
        volume_uid: facts.volume_uid.clone(),
        node_id: facts.node_id.clone(),
        read_only: facts.read_only != 0,
        created_at_ms: facts.created_at_ms,
    }
}

fn node(node_id: &str, facts: &WatchedNodeFacts) -> v1::WatchedNode {
    v1::WatchedNode {
        node_id: node_id.to_owned(),
        boot_id: facts.boot_id.clone(),
        version: facts.version.clone(),
        labels: facts.labels.clone().into_iter().collect(),
        registered_at_ms: facts.registered_at_ms,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::sync::Arc;

    use super::*;

    fn told(facts: Facts, volume_uid: &str) -> Told {
        Told { uid: "u".to_owned(), volume_uid: volume_uid.to_owned(), tenant: String::new(), facts }
    }

    fn change(told: Option<(Happened, Told)>) -> Change {
        let point = ChangePoint { seq: 7, mark: "00ff00ff00ff00ff".to_owned() };
        Change { point, time_ms: 5, told }
    }

    #[test]
    fn a_row_is_the_event_that_it_says() {
        let facts = VolumeFacts { name: "v".to_owned(), backend: "lvm".to_owned(), ..Default::default() };
        let volume = told(Facts::Volume(facts), "u");
        for (happened, word) in [
            (Happened::Created, v1::WatchChange::Created),
            (Happened::Updated, v1::WatchChange::Updated),
            (Happened::Deleted, v1::WatchChange::Deleted),
        ] {
            let row = change(Some((happened, volume.clone())));
            let origin = Origin { server_id: uuid::Uuid::nil(), volume_uid: None };
            let event = changed(&row, Some(&origin)).unwrap();
            assert_eq!((event.change(), event.time_ms), (word, 5));
            assert_eq!(event.resume_token, Token::text(&origin, &row.point));
            assert_eq!(changed(&row, None).unwrap().resume_token, "", "before all was told");
            let Some(v1::watch_event::Object::Volume(told)) = event.object else { panic!("{event:?}") };
            assert_eq!((told.name.as_str(), told.volume_uid.as_str()), ("v", "u"));
            assert_eq!((told.backend(), told.write_cache()), (v1::Backend::Lvm, v1::WriteCache::Off));
        }
        assert_eq!(changed(&change(None), None), None, "a later program's");
    }

    #[test]
    fn words_of_a_later_program_are_unspecified() {
        let facts =
            VolumeFacts { backend: "cloud".to_owned(), content: "odd".to_owned(), ..Default::default() };
        let told = volume("u", &facts);
        assert_eq!(
            (told.backend(), told.content()),
            (v1::Backend::Unspecified, v1::VolumeContent::Unspecified)
        );
    }

    #[test]
    fn what_is_wanted_is_of_its_kind_and_its_volume() {
        let all = Wanted { scope: Scope::All, kinds: WatchedKind::ALL.to_vec(), volume_uid: None };
        let kinds = vec![WatchedKind::Volume, WatchedKind::Node];
        let of_volume = Wanted { scope: Scope::All, kinds, volume_uid: Some("a".to_owned()) };
        let volume = |uid| told(Facts::Volume(VolumeFacts::default()), uid);
        let snapshot = told(Facts::Snapshot(SnapshotFacts::default()), "a");
        let node = told(Facts::Node(WatchedNodeFacts::default()), "");
        assert!(all.has(&volume("a")) && all.has(&snapshot) && all.has(&node));
        assert!(of_volume.has(&volume("a")) && !of_volume.has(&volume("b")));
        assert!(!of_volume.has(&snapshot), "another kind");
        assert!(!of_volume.has(&node), "of no volume");

        let scope = Scope::Tenants(Arc::new(BTreeSet::from(["acme".to_owned()])));
        let of_tenant = Wanted { scope, ..all };
        let of = |tenant: &str| Told { tenant: tenant.to_owned(), ..volume("a") };
        assert!(of_tenant.has(&of("acme")) && !of_tenant.has(&of("other")) && !of_tenant.has(&of("")));
        assert!(!of_tenant.has(&node), "of no tenant");
    }

    #[test]
    fn access_modes_are_those_of_attachments() {
        let mode = |read_only, is_shared| {
            attachment("i", &AttachmentFacts { read_only, is_shared, ..Default::default() }).access_mode()
        };
        assert_eq!(mode(0, 0), v1::AccessMode::SingleNodeWriter);
        assert_eq!(mode(0, 1), v1::AccessMode::MultiNodeMultiWriter);
        assert_eq!(mode(1, 0), v1::AccessMode::SingleNodeReaderOnly);
        assert_eq!(mode(1, 1), v1::AccessMode::MultiNodeReaderOnly);
    }
}
