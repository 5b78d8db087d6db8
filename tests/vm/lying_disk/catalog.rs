//! The catalog on a disk that lies: calls of the management API, a power cut in their middle, and a look at everything.
//!
//! What was answered is there: every created volume, no deleted one, every attachment with the secret that was given out,
//! no ended one. The one call that the power cut interrupted is done or not done. And nothing is half-made: the volumes'
//! directory has a file for each volume of the list, of its size, and no other.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use proto::v1::WriteCache;
use testlab::harness::Env;
use testlab::management_api::ManagementApi;
use testlab::seed;
use tonic::Status;

use super::rig::{Rig, run_rounds};

/// Few, so that each is made and deleted often.
const NAMES: [&str; 6] = ["vol-a", "vol-b", "vol-c", "vol-d", "vol-e", "vol-f"];

const NODE_ID: &str = "node-1";

const CAPACITY_BYTES: u64 = 1 << 20;

/// The power is cut at a write or flush of the disk's chosen from these of a round: some tens of calls.
const DISK_REQUESTS: Range<u64> = 10..250;

/// The power is cut by then, however few requests the disk has seen.
const TRAFFIC_SECONDS_MAX: u64 = 6;

pub(super) fn the_catalog_holds_exactly_what_was_answered(env: &Env) -> Result<()> {
    let seed = seed::choose()?;
    let mut rig = Rig::start(env, &[])?;
    let mut state = State::new();
    run_rounds(seed, |round_seed| {
        let interrupted = call_until_the_cut(&rig, &mut state, round_seed)?;
        rig.power_cycle(round_seed)?;
        let found = look(&rig)?;
        ensure_expected(&state, interrupted, &found)?;
        state = found;
        Ok(())
    })
}

/// A volume as it was answered or found.
#[derive(Debug, Clone, PartialEq, Eq)]
struct KnownVolume {
    volume_uid: String,
    attachment: Option<KnownAttachment>,
}

/// An attachment as it was answered or found.
#[derive(Debug, Clone, PartialEq, Eq)]
struct KnownAttachment {
    attachment_id: String,
    secret: String,
}

/// The volumes by name.
type State = BTreeMap<&'static str, KnownVolume>;

/// A call that changes something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Call {
    Create,
    Delete,
    Attach,
    Detach,
}

/// Calls until one fails or time is up; gives the call that failed, which may have been done or not.
fn call_until_the_cut(rig: &Rig, state: &mut State, seed: u64) -> Result<Option<(Call, &'static str)>> {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut api = rig.management()?;
    rig.disk().cut_power_after(random.u64(DISK_REQUESTS));
    let deadline = Instant::now() + Duration::from_secs(TRAFFIC_SECONDS_MAX);
    let mut answered = 0;
    while Instant::now() < deadline {
        let name = NAMES[random.usize(0..NAMES.len())];
        let call = match state.get(name) {
            None => Call::Create,
            Some(KnownVolume { attachment: Some(_), .. }) => Call::Detach,
            Some(_) if random.bool() => Call::Attach,
            Some(_) => Call::Delete,
        };
        match make_call(&mut api, state, call, name) {
            Ok(is_as_expected) => {
                ensure!(is_as_expected, "{call:?} {name} was answered as if it was done before")
            }
            Err(status) => {
                ensure!(rig.disk().is_cut(), "{call:?} {name} failed while the disk had power: {status}");
                println!("round of seed {seed}: {answered} calls answered, then {call:?} {name}: {status}");
                return Ok(Some((call, name)));
            }
        }
        answered += 1;
    }
    println!("round of seed {seed}: {answered} calls answered, none interrupted");
    Ok(None)
}

/// Makes one call and enters its answer; false where the server says that there was nothing to do.
fn make_call(
    api: &mut ManagementApi,
    state: &mut State,
    call: Call,
    name: &'static str,
) -> Result<bool, Status> {
    match call {
        Call::Create => {
            let volume = api.create_volume(name, CAPACITY_BYTES, WriteCache::On)?;
            let known = KnownVolume { volume_uid: volume.volume_uid, attachment: None };
            Ok(state.insert(name, known).is_none())
        }
        Call::Delete => {
            let existed = api.delete_volume(name)?;
            state.remove(name);
            Ok(existed)
        }
        Call::Attach => {
            let attached = api.attach_volume(name, NODE_ID)?;
            let attachment_id = attached.attachment.unwrap_or_default().attachment_id;
            let attachment = KnownAttachment { attachment_id, secret: attached.secret };
            if let Some(volume) = state.get_mut(name) {
                volume.attachment = Some(attachment);
            }
            Ok(!attached.existed)
        }
        Call::Detach => {
            let existed = api.detach_volume(name)?;
            if let Some(volume) = state.get_mut(name) {
                volume.attachment = None;
            }
            Ok(existed)
        }
    }
}

/// What the restarted server has, with the secrets of its attachments; fails where something is half-made.
fn look(rig: &Rig) -> Result<State> {
    let mut api = rig.management()?;
    let mut found = State::new();
    let mut uids = BTreeSet::new();
    let attachments = api.attachments()?;
    for volume in api.volumes()? {
        let name = NAMES.into_iter().find(|name| *name == volume.name);
        let Some(name) = name else { anyhow::bail!("a volume that nobody made: {volume:?}") };
        ensure!(volume.capacity_bytes == CAPACITY_BYTES, "{name} has {} bytes", volume.capacity_bytes);
        let file_bytes = std::fs::metadata(rig.volumes_dir().join(&volume.volume_uid))?.len();
        ensure!(file_bytes == CAPACITY_BYTES, "the file of {name} has {file_bytes} bytes");
        uids.insert(volume.volume_uid.clone());
        let attachment = attachments.iter().find(|attachment| attachment.volume_uid == volume.volume_uid);
        ensure!(
            attachment == volume.attachments.first() && volume.attachments.len() < 2,
            "ListVolumes and ListAttachments differ on {name}: {attachment:?}, {:?}",
            volume.attachments
        );
        let attachment = match attachment {
            Some(attachment) => Some(with_secret(&mut api, name, &attachment.attachment_id)?),
            None => None,
        };
        found.insert(name, KnownVolume { volume_uid: volume.volume_uid, attachment });
    }
    let attached = found.values().filter(|volume| volume.attachment.is_some()).count();
    ensure!(attachments.len() == attached, "attachments of no volume: {attachments:?}");
    let mut files = BTreeSet::new();
    for entry in std::fs::read_dir(rig.volumes_dir())? {
        files.insert(entry?.file_name().to_string_lossy().into_owned());
    }
    ensure!(files == uids, "the volumes' directory has {files:?}, the list {uids:?}");
    Ok(found)
}

/// The secret of an attachment that is there, as its holder is told it when it asks again.
fn with_secret(api: &mut ManagementApi, name: &str, attachment_id: &str) -> Result<KnownAttachment> {
    let attached = api.attach_volume(name, NODE_ID)?;
    let found_id = attached.attachment.unwrap_or_default().attachment_id;
    ensure!(
        attached.existed && found_id == attachment_id,
        "{name} is listed as attachment {attachment_id}, yet attaching it again gave {found_id}"
    );
    Ok(KnownAttachment { attachment_id: found_id, secret: attached.secret })
}

/// Compares what was answered with what is there.
fn ensure_expected(answered: &State, interrupted: Option<(Call, &'static str)>, found: &State) -> Result<()> {
    for name in NAMES {
        let (answered, found) = (answered.get(name), found.get(name));
        let call = interrupted.and_then(|(call, of)| (of == name).then_some(call));
        let is_expected = found == answered || call.is_some_and(|call| is_done(call, answered, found));
        ensure!(is_expected, "{name}: answered {answered:?}, interrupted {call:?}, found {found:?}");
    }
    Ok(())
}

/// Whether what was found is what the call makes of what was there before.
fn is_done(call: Call, before: Option<&KnownVolume>, found: Option<&KnownVolume>) -> bool {
    let same_volume = before.map(|volume| &volume.volume_uid) == found.map(|volume| &volume.volume_uid);
    let attachment = found.and_then(|volume| volume.attachment.as_ref());
    match call {
        Call::Create => found.is_some() && attachment.is_none(),
        Call::Delete => found.is_none(),
        Call::Attach => same_volume && attachment.is_some(),
        Call::Detach => same_volume && attachment.is_none(),
    }
}
