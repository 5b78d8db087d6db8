//! Attaching and detaching.

use super::*;

#[test]
fn the_former_holder_is_fenced_before_the_new_attachment_exists() {
    let (bench, volume) = Bench::with_volume();
    let first = bench.attach("vol-1", "node-a", false).unwrap();
    assert_eq!(
        bench.double().take_calls(),
        ["fence named writers, row Some(Active)", "sync storage, row Some(Active)"]
    );
    let again = bench.attach("vol-1", "node-a", true).unwrap();
    assert!(again.existed && !first.existed);
    assert_eq!(again.attachment, first.attachment, "force takes nothing from its own node");
    let calls = bench.double().take_calls();
    assert!(!calls.iter().any(|call| call.starts_with("fence node")), "nor is it fenced: {calls:?}");
    let error = bench.attach("vol-1", "node-b", false).unwrap_err();
    assert!(
        matches!(&error, LifecycleError::VolumeAttached { node_id, .. } if node_id == "node-a"),
        "{error}"
    );
    assert_eq!(bench.double().take_calls(), [""; 0], "nobody was disturbed");

    let second = bench.attach("vol-1", "node-b", true).unwrap();
    assert_eq!(
        bench.double().take_calls(),
        [
            "fence node-a, row Ending",
            "fence named writers, row Some(Active)",
            "sync storage, row Some(Active)"
        ]
    );
    assert_ne!(second.attachment.attachment_id, first.attachment.attachment_id);
    assert_ne!(second.attachment.secret, first.attachment.secret);
    assert_eq!(second.attachment.generation, first.attachment.generation + 1);
    assert_eq!(bench.lifecycle.catalog().attachment(first.attachment.attachment_id).unwrap(), None);
    assert_eq!(bench.double().attachment_state(volume.volume_uid), Some(AttachmentState::Active));
}

#[test]
fn nothing_gets_past_a_fence_that_has_not_finished() {
    let (bench, _) = Bench::with_volume();
    bench.attach("vol-1", "node-a", false).unwrap();
    bench.double().change(|state| state.fence_error = true);
    assert!(matches!(bench.attach("vol-1", "node-b", true), Err(LifecycleError::Unfenced { .. })));
    assert!(matches!(bench.attach("vol-1", "node-b", false), Err(LifecycleError::Unfenced { .. })));
    assert!(matches!(bench.attach("vol-1", "node-a", false), Err(LifecycleError::Unfenced { .. })));
    assert!(matches!(bench.delete("vol-1"), Err(LifecycleError::Unfenced { .. })));
    assert!(matches!(bench.detach("vol-1"), Err(LifecycleError::Unfenced { .. })));
    bench.double().change(|state| state.fence_error = false);
    bench.double().take_calls();
    // The generation went up once, with the force, however often the fence was tried.
    let attached = bench.attach("vol-1", "node-b", false).unwrap();
    assert_eq!((attached.existed, attached.attachment.generation), (false, 2));
    assert_eq!(
        bench.double().take_calls(),
        [
            "fence node-a, row Ending",
            "fence named writers, row Some(Active)",
            "sync storage, row Some(Active)"
        ]
    );
}

#[test]
fn an_attachment_is_not_answered_while_writers_by_name_remain() {
    let (bench, _) = Bench::with_volume();
    bench.double().change(|state| state.named_writer_error = true);
    assert!(matches!(bench.attach("vol-1", "node-a", false), Err(LifecycleError::Unfenced { .. })));
    bench.double().change(|state| state.named_writer_error = false);
    assert!(!bench.attach("vol-1", "node-a", false).unwrap().existed);
}

#[test]
fn an_attachment_is_not_answered_before_what_was_written_is_durable() {
    let (bench, _) = Bench::with_volume();
    bench.double().change(|state| state.sync_error = Some(true));
    let refused = bench.attach("vol-1", "node-a", false);
    assert!(matches!(refused, Err(LifecycleError::Storage { action: "sync", .. })), "{refused:?}");
    bench.double().change(|state| state.sync_error = Some(false));
    let refused = bench.attach("vol-1", "node-a", false);
    assert!(matches!(refused, Err(LifecycleError::Unfenced { .. })), "nothing is lost: {refused:?}");
    bench.double().change(|state| state.sync_error = None);
    assert!(!bench.attach("vol-1", "node-a", false).unwrap().existed);
}

#[test]
fn an_attachment_whose_first_answer_was_lost_is_not_answered_before_that_either() {
    let (bench, _) = Bench::with_volume();
    let held = bench.attach("vol-1", "node-a", false).unwrap().attachment;
    // As if the server had been killed with the row there and nothing durable.
    bench.double().change(|state| state.sync_error = Some(true));
    let refused = bench.attach("vol-1", "node-a", false);
    assert!(matches!(refused, Err(LifecycleError::Storage { action: "sync", .. })), "{refused:?}");
    bench.lifecycle.catalog().raise_session_epoch(held.attachment_id, 1).unwrap();
    assert!(bench.attach("vol-1", "node-a", false).unwrap().existed, "its holder has it open");
}

#[test]
fn an_attachment_ends_only_for_who_names_it() {
    let (bench, _) = Bench::with_volume();
    let held = bench.attach("vol-1", "node-a", false).unwrap().attachment;
    let detach = |wanted: &DetachWanted| {
        bench.lifecycle.detach_volume(&bench.locks.blocking_lock("vol-1"), wanted).unwrap()
    };
    assert!(!detach(&DetachWanted { node_id: Some("node-b".to_owned()), attachment_id: None }));
    assert!(!detach(&DetachWanted { node_id: None, attachment_id: Some(Uuid::new_v4()) }));
    assert!(bench.lifecycle.catalog().attachment(held.attachment_id).unwrap().is_some());
    bench.double().take_calls();
    assert!(detach(&DetachWanted {
        node_id: Some("node-a".to_owned()),
        attachment_id: Some(held.attachment_id)
    }));
    assert_eq!(bench.double().take_calls(), ["fence node-a, row Ending"]);
    assert!(!detach(&DetachWanted::default()));
}

#[test]
fn the_other_access_mode_is_refused_and_taken_by_force() {
    let (bench, _) = Bench::with_volume();
    bench.attach("vol-1", "node-a", false).unwrap();
    let attach_reader = |force| {
        let wanted =
            AttachWanted { node_id: "node-a".to_owned(), read_only: true, force, ..AttachWanted::default() };
        bench.lifecycle.attach_volume(&bench.locks.blocking_lock("vol-1"), &wanted)
    };
    assert!(matches!(attach_reader(false), Err(LifecycleError::AttachedDifferently { .. })));
    let reader = attach_reader(true).unwrap();
    assert!(reader.attachment.read_only && !reader.existed);
}

#[test]
fn another_boot_of_a_node_gets_the_volume_when_the_former_has_gone() {
    let (bench, _) = Bench::with_volume();
    let first = bench.attach_boot("vol-1", "node-a", "boot-1", false).unwrap();
    let again = bench.attach_boot("vol-1", "node-a", "boot-1", false).unwrap();
    assert!(again.existed && again.attachment == first.attachment);
    let holder = |connections, seconds| {
        let gone_for = Duration::from_secs(seconds);
        bench.double().state.lock().unwrap().holder = Some(Holder { connections, gone_for });
    };
    holder(1, 0);
    let clone = bench.attach_boot("vol-1", "node-a", "boot-2", false);
    assert!(matches!(clone, Err(LifecycleError::OtherBoot { .. })));
    holder(0, 10);
    let clone = bench.attach_boot("vol-1", "node-a", "boot-2", false);
    assert!(matches!(clone, Err(LifecycleError::OtherBootMayReturn { .. })));
    let told = bench.attach("vol-1", "node-a", false).unwrap();
    assert!(told.hides_secret && told.attachment == first.attachment, "a controller's call again");
    bench.double().take_calls();
    holder(0, 60);
    let second = bench.attach_boot("vol-1", "node-a", "boot-2", false).unwrap();
    assert!(!second.existed && second.attachment.secret != first.attachment.secret);
    assert!(second.attachment.generation > first.attachment.generation, "as by force");
    assert_eq!(bench.double().take_calls()[0], "fence node-a, row Ending");
}

#[test]
fn a_controllers_grant_is_bound_to_the_boot_that_fetches_it() {
    let (bench, _) = Bench::with_volume();
    let granted = bench.attach("vol-1", "node-a", false).unwrap();
    let fetched = bench.attach_boot("vol-1", "node-a", "boot-1", false).unwrap();
    assert!(fetched.existed && fetched.attachment.secret == granted.attachment.secret);
    assert_eq!(fetched.attachment.boot_id, "boot-1");
    bench.double().state.lock().unwrap().holder = Some(Holder { connections: 1, gone_for: Duration::ZERO });
    assert!(bench.attach_boot("vol-1", "node-a", "boot-2", false).is_err());
}

#[test]
fn recovery_finishes_what_a_killed_server_began() {
    let (bench, kept) = Bench::with_volume();
    let catalog = bench.lifecycle.catalog();
    let new = |name: &str| NewVolume {
        name: name.to_owned(),
        capacity_bytes: 4096,
        block_size_bytes: 512,
        backend: BackendKind::File,
        write_cache_on: true,
        settings: Default::default(),
    };
    let half_made = catalog.begin_creating(&new("half-made")).unwrap();
    let half_gone = bench.create("half-gone", 4096).unwrap();
    catalog.begin_deleting(half_gone.volume_uid).unwrap();
    let restored = Uuid::new_v4();
    bench.double().change(|state| state.stored.extend([half_made.volume_uid, restored]));
    let held = bench.attach("vol-1", "node-a", false).unwrap().attachment;
    catalog.end_attachment(held.attachment_id, false).unwrap();

    let expected =
        Recovered { unfinished_volumes: 2, ending_attachments: 1, orphans: 1, ..Recovered::default() };
    assert_eq!(bench.lifecycle.recover().unwrap(), expected);
    assert_eq!(catalog.all_volumes().unwrap(), [(kept.clone(), VolumeState::Ready)]);
    assert!(!catalog.volume_has_attachment(kept.volume_uid).unwrap());
    let stored: BTreeSet<Uuid> = bench.double().stored_volumes().unwrap().into_iter().collect();
    assert_eq!(stored, BTreeSet::from([kept.volume_uid, restored]), "what no row names is left alone");
    assert_eq!(bench.lifecycle.recover().unwrap(), Recovered { orphans: 1, ..Recovered::default() });
}
