//! What is set of volumes, and who shares them.

use super::*;
use crate::catalog::{Content, VolumeLimits, VolumeSettings};

fn update(bench: &Bench, wanted: &PropertiesWanted) -> Result<VolumeRecord, LifecycleError> {
    bench.lifecycle.update_volume(&bench.locks.blocking_lock("vol-1"), wanted)
}

fn is_refused<T: std::fmt::Debug>(outcome: Result<T, LifecycleError>) -> SettingsError {
    match outcome {
        Err(LifecycleError::Settings(error)) => error,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_protected_volume_is_deleted_only_once_it_is_not() {
    let (bench, _) = Bench::with_volume();
    let protect = |is| PropertiesWanted { is_protected: Some(is), ..PropertiesWanted::default() };
    update(&bench, &protect(true)).unwrap();
    assert!(matches!(is_refused(bench.delete("vol-1")), SettingsError::Protected(_)));
    assert_eq!(bench.double().take_calls(), [""; 0], "nothing was begun");
    update(&bench, &protect(false)).unwrap();
    assert!(bench.delete("vol-1").unwrap());
}

#[test]
fn labels_are_set_and_taken_away_and_are_no_more_than_a_volume_has() {
    let (bench, _) = Bench::with_volume();
    let labels = |pairs: &[(&str, &str)]| PropertiesWanted {
        labels: pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect(),
        ..PropertiesWanted::default()
    };
    update(&bench, &labels(&[("a", "1"), ("b", "2")])).unwrap();
    let volume = update(&bench, &labels(&[("a", ""), ("c", "3")])).unwrap();
    assert_eq!(volume.settings.labels.keys().collect::<Vec<_>>(), ["b", "c"]);
    let many: Vec<String> = (0..63).map(|number| format!("k{number}")).collect();
    let many: Vec<(&str, &str)> = many.iter().map(|key| (key.as_str(), "v")).collect();
    let refused = is_refused(update(&bench, &labels(&many)));
    assert!(matches!(refused, SettingsError::TooManyLabels { labels: 65, .. }), "{refused}");
    assert_eq!(bench.lifecycle.volume("vol-1").unwrap(), volume);
}

#[test]
fn a_volume_becomes_read_only_while_nobody_writes_to_it_and_has_no_writer_then() {
    let (bench, volume) = Bench::with_volume();
    let read_only = |is| PropertiesWanted { is_read_only: Some(is), ..PropertiesWanted::default() };
    bench.attach("vol-1", "node-a", false).unwrap();
    assert!(matches!(is_refused(update(&bench, &read_only(true))), SettingsError::HasWriter { .. }));
    bench.detach("vol-1").unwrap();
    bench.double().change(|state| state.open_connections = 1);
    assert!(matches!(is_refused(update(&bench, &read_only(true))), SettingsError::HasWriter { .. }));
    assert_eq!(bench.lifecycle.volume("vol-1").unwrap(), volume, "as it was");
    bench.double().change(|state| state.open_connections = 0);
    update(&bench, &read_only(true)).unwrap();
    let force = true;
    assert!(matches!(is_refused(bench.attach("vol-1", "node-a", force)), SettingsError::ReadOnly(_)));
    let reader = AttachWanted { node_id: "node-a".to_owned(), read_only: true, ..AttachWanted::default() };
    bench.lifecycle.attach_volume(&bench.locks.blocking_lock("vol-1"), &reader).unwrap();
    update(&bench, &read_only(false)).unwrap();
}

#[test]
fn limits_hold_once_they_are_durable() {
    let (bench, _) = Bench::with_volume();
    let limits = VolumeLimits { read_iops: 7, ..VolumeLimits::default() };
    for _ in 0..2 {
        let volume = bench.lifecycle.set_limits(&bench.locks.blocking_lock("vol-1"), limits).unwrap();
        assert_eq!(
            (volume.settings.limits, bench.double().take_calls()),
            (limits, vec!["limits changed".to_owned()])
        );
    }
}

fn set_content(bench: &Bench, by: &Attached, wanted: ContentWanted) -> Result<Content, LifecycleError> {
    let id = by.attachment.attachment_id;
    let set = bench.lifecycle.set_content(&bench.locks.blocking_lock("vol-1"), id, wanted);
    set.map(|volume| volume.settings.content)
}

/// Makes `vol-1`, to which nobody has written.
fn create_never_written(bench: &Bench) {
    let new = NewVolume {
        name: "vol-1".to_owned(),
        capacity_bytes: 4096,
        block_size_bytes: 4096,
        backend: BackendKind::File,
        write_cache_on: true,
        settings: VolumeSettings { content: Content::NeverWritten, ..VolumeSettings::default() },
    };
    bench.lifecycle.create_volume(&bench.locks.blocking_lock("vol-1"), &new).unwrap();
}

#[test]
fn content_goes_from_never_written_by_way_of_one_attachment_to_written() {
    use ContentWanted::{Initialising, Written};
    let bench = Bench::new();
    create_never_written(&bench);
    let first = bench.attach("vol-1", "node-a", false).unwrap();
    let by = |attached: &Attached| Content::Initialising { attachment_id: attached.attachment.attachment_id };
    let told = |attached: &Attached| {
        let lock = bench.locks.blocking_lock("vol-1");
        let volume = bench.lifecycle.volume_of_attachment(&lock, attached.attachment.attachment_id);
        volume.map(|volume| volume.settings.content)
    };
    assert_eq!(told(&first).unwrap(), Content::NeverWritten);
    for _ in 0..2 {
        assert_eq!(set_content(&bench, &first, Initialising).unwrap(), by(&first), "it may start again");
    }
    assert_eq!(told(&first).unwrap(), by(&first));
    // Taken away by force, before it is drained.
    bench.double().change(|state| state.fence_error = true);
    assert!(bench.attach("vol-1", "node-b", true).is_err());
    bench.double().change(|state| state.fence_error = false);
    let second = bench.attach("vol-1", "node-b", true).unwrap();
    assert!(matches!(
        is_refused(set_content(&bench, &first, Written)),
        SettingsError::NoSuchAttachment { .. }
    ));
    assert!(told(&first).is_err(), "it is over");
    assert!(matches!(
        is_refused(set_content(&bench, &second, Written)),
        SettingsError::ContentRefused { .. }
    ));
    assert_eq!(set_content(&bench, &second, Initialising).unwrap(), by(&second), "nobody's bytes are in it");
    assert_eq!(set_content(&bench, &second, Written).unwrap(), Content::Written);
    assert_eq!(set_content(&bench, &second, Written).unwrap(), Content::Written);
    let refused = is_refused(set_content(&bench, &second, Initialising));
    assert_eq!(refused.to_string(), "the content of volume vol-1 is written already");
}

#[test]
fn a_volume_that_has_data_counts_as_written_after_a_start() {
    let bench = Bench::new();
    create_never_written(&bench);
    let content = || bench.lifecycle.volume("vol-1").unwrap().settings.content;
    bench.lifecycle.recover().unwrap();
    assert_eq!(content(), Content::NeverWritten);
    bench.double().change(|state| state.allocated_bytes = 4096);
    bench.lifecycle.recover().unwrap();
    assert_eq!(content(), Content::Written);
}

#[test]
fn readers_share_a_volume_and_a_writer_takes_it_from_all_of_them_by_force_alone() {
    let (bench, _) = Bench::with_volume();
    let read = |node_id: &str| {
        let wanted = AttachWanted {
            node_id: node_id.to_owned(),
            read_only: true,
            is_shared: true,
            ..AttachWanted::default()
        };
        bench.lifecycle.attach_volume(&bench.locks.blocking_lock("vol-1"), &wanted)
    };
    let detach = |node_id: Option<&str>| {
        let wanted = DetachWanted { node_id: node_id.map(str::to_owned), attachment_id: None };
        bench.lifecycle.detach_volume(&bench.locks.blocking_lock("vol-1"), &wanted)
    };
    let first = read("node-a").unwrap();
    assert!(!read("node-b").unwrap().existed && !read("node-c").unwrap().existed);
    let again = read("node-a").unwrap();
    assert!(again.existed && again.attachment == first.attachment);
    let refused = bench.attach("vol-1", "node-w", false).unwrap_err();
    assert!(matches!(&refused, LifecycleError::VolumeAttached { .. }), "{refused}");
    // One of the readers wants to write: it is another mode for it, and the others are in the way.
    assert!(bench.attach("vol-1", "node-a", false).is_err());
    assert!(bench.delete("vol-1").unwrap_err().to_string().contains("node-"));
    assert!(matches!(detach(None), Err(LifecycleError::SeveralHolders { .. })));
    assert!(detach(Some("node-a")).unwrap() && !detach(Some("node-a")).unwrap());
    bench.double().take_calls();
    let writer = bench.attach("vol-1", "node-w", true).unwrap();
    let calls = bench.double().take_calls();
    let fenced: BTreeSet<&String> = calls.iter().filter(|call| call.starts_with("fence node-")).collect();
    assert_eq!(fenced.len(), 2, "{calls:?}");
    assert!(!writer.attachment.is_shared && writer.attachment.generation > first.attachment.generation);
    assert!(
        matches!(read("node-a"), Err(LifecycleError::VolumeAttached { node_id, .. }) if node_id == "node-w")
    );
}
