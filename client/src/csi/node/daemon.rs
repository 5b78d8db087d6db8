//! The node daemon of this machine, as the Node service uses it.
//!
//! Owns: the calls, their deadlines, and what an attachment is to a volume. Never: decides, or repeats a call. What the daemon refuses is
//! passed on with its code, its reason and its advice. Called by: the rest of `node`.

use std::collections::HashMap;
use std::future::Future;
use std::time::Duration;

use proto::error_reason as reason;
use proto::v1;
use proto::v1::node_client::NodeClient;
use tonic::transport::Channel;
use tonic::{Code, Response, Status};
use tonic_types::{ErrorDetails, StatusExt as _};

use super::plan::Disk;
use super::request::{AttachAs, VolumeId};

/// For what the daemon answers without a look at any disk or server.
const LOOK_DEADLINE: Duration = Duration::from_secs(5);
/// For an attach or a detach, which goes on in the daemon when nobody waits any more, and is joined by its repeat.
const WORK_DEADLINE: Duration = Duration::from_secs(90);
/// How long an outage lasts before I/O fails under an unmount, in milliseconds: a restart or fail-over of the server takes less, and loses
/// nothing; and a node that is drained while its server is gone for good waits no longer. The odd millisecond is this plugin's mark: by it
/// a policy is known as ours, and not the administrator's, once the volume is used again.
const UNMOUNT_FAIL_AFTER_MS: u64 = 120_001;
/// How much of a message is passed on, in characters.
const SHOWN_CHARACTERS_MAX: usize = 2000;

/// A client of the node daemon.
#[derive(Debug, Clone)]
pub struct Daemon {
    stub: NodeClient<Channel>,
}

impl Daemon {
    /// Over a channel to the daemon, which need not be there yet.
    pub fn new(channel: Channel) -> Self {
        Self { stub: NodeClient::new(channel) }
    }

    /// Who this node is.
    ///
    /// # Errors
    /// UNAVAILABLE
    pub async fn info(&self) -> Result<v1::GetNodeInfoResponse, Status> {
        let mut stub = self.stub.clone();
        call(stub.get_node_info(v1::GetNodeInfoRequest {}), LOOK_DEADLINE).await
    }

    /// All disks of this machine.
    ///
    /// # Errors
    /// UNAVAILABLE; the daemon's.
    pub async fn attachments(&self) -> Result<Vec<v1::NodeAttachment>, Status> {
        let mut stub = self.stub.clone();
        let listed = call(stub.list_node_attachments(v1::ListNodeAttachmentsRequest {}), LOOK_DEADLINE);
        Ok(listed.await?.attachments)
    }

    /// The volume's disk; `None`: it has none here.
    ///
    /// # Errors
    /// As for [`Self::attachments`].
    pub async fn attachment(&self, volume: VolumeId) -> Result<Option<v1::NodeAttachment>, Status> {
        Ok(self.attachments().await?.into_iter().find(|attachment| is_of(attachment, volume)))
    }

    /// Makes the volume a disk, if the server has granted it to this node.
    ///
    /// # Errors
    /// NOT_FOUND: there is no such volume. The daemon's and the server's.
    pub async fn attach(
        &self,
        volume: VolumeId,
        how: AttachAs,
        passphrase: Option<v1::Passphrase>,
    ) -> Result<v1::NodeAttachment, Status> {
        let request = v1::AttachRequest {
            target: volume.as_name(),
            read_only: how.read_only,
            shared: how.shared,
            only_if_granted: true,
            passphrase,
            keep_initialising: how.makes_file_system,
            ..Default::default()
        };
        let mut stub = self.stub.clone();
        let attached = call(stub.attach(request), WORK_DEADLINE).await?.attachment;
        attached.ok_or_else(|| Status::internal("the node daemon attached nothing; see its log"))
    }

    /// Takes a disk away.
    ///
    /// # Errors
    /// FAILED_PRECONDITION: somebody has it open. The daemon's.
    pub async fn detach(&self, target: &str, by_force: bool) -> Result<(), Status> {
        let request = v1::DetachRequest { target: target.to_owned(), force: by_force };
        let mut stub = self.stub.clone();
        call(stub.detach(request), WORK_DEADLINE).await.map(drop)
    }

    /// Has the disk's I/O fail once the server could not be reached for two minutes.
    ///
    /// # Errors
    /// The daemon's.
    pub async fn fail_on_stall(&self, attachment_id: &str) -> Result<(), Status> {
        self.set_stall_policy(attachment_id, v1::StallAction::Fail, UNMOUNT_FAIL_AFTER_MS).await
    }

    /// Has the disk's I/O wait for the server again.
    ///
    /// # Errors
    /// The daemon's.
    pub async fn wait_on_stall(&self, attachment_id: &str) -> Result<(), Status> {
        self.set_stall_policy(attachment_id, v1::StallAction::Wait, 0).await
    }

    async fn set_stall_policy(
        &self,
        attachment_id: &str,
        action: v1::StallAction,
        stall_fail_after_ms: u64,
    ) -> Result<(), Status> {
        let request = v1::SetStallPolicyRequest {
            target: attachment_id.to_owned(),
            on_stall: action.into(),
            stall_fail_after_ms,
        };
        let mut stub = self.stub.clone();
        call(stub.set_stall_policy(request), WORK_DEADLINE).await.map(drop)
    }
}

/// Whether the disk is the volume's and this plugin's: attached by uid, as the plugin does, or under a grant. What an administrator
/// attached for themselves is left alone.
pub fn is_of(attachment: &v1::NodeAttachment, volume: VolumeId) -> bool {
    let is_granted = attachment.only_if_granted && attachment.volume_uid == volume.to_string();
    is_granted || attachment.target == volume.as_name()
}

/// Whether the disk is the volume's, and somebody else's than this plugin's.
pub fn is_anothers_of(attachment: &v1::NodeAttachment, volume: VolumeId) -> bool {
    attachment.volume_uid == volume.to_string() && !is_of(attachment, volume)
}

/// Whether I/O fails in an outage because this plugin has asked for it.
pub fn fails_by_us(attachment: &v1::NodeAttachment) -> bool {
    attachment.on_stall() == v1::StallAction::Fail && attachment.stall_fail_after_ms == UNMOUNT_FAIL_AFTER_MS
}

/// Whether I/O fails now because the outage has lasted for longer than it may, at `now_ms` since 1970.
pub fn is_failing(attachment: &v1::NodeAttachment, now_ms: i64) -> bool {
    let lasts_ms = u64::try_from(now_ms.saturating_sub(attachment.state_since_ms)).unwrap_or(0);
    attachment.state() == v1::DeviceState::Stalled
        && attachment.on_stall() == v1::StallAction::Fail
        && lasts_ms >= attachment.stall_fail_after_ms
}

/// Whether an attach was refused for good: no repeat makes a disk that is dead serve again. Of every other refusal nobody knows.
pub fn is_permanent(refused: &Status) -> bool {
    // Without a passphrase one of an encrypted volume is asked for where its clear disk is not open: nothing can have been written to it.
    const PERMANENT: [&str; 4] = [
        reason::VOLUME_NOT_GRANTED,
        reason::DEVICE_FAILED,
        reason::VOLUME_NOT_FOUND,
        reason::PASSPHRASE_MISSING,
    ];
    PERMANENT.iter().any(|reason| is_refused_for(refused, reason))
}

/// Whether the daemon gives this reason, one of `error_reason`.
pub fn is_refused_for(refused: &Status, reason: &str) -> bool {
    refused.get_details_error_info().is_some_and(|info| info.reason == reason)
}

/// Whether an attach was refused because of the disk that is there; the volume is granted then.
pub fn is_of_failed_device(refused: &Status) -> bool {
    is_refused_for(refused, reason::DEVICE_FAILED)
}

/// What the disk is good for.
pub fn disk_of(attachment: Option<&v1::NodeAttachment>) -> Disk {
    let Some(attachment) = attachment else { return Disk::Absent };
    let is_locked = attachment.is_encrypted && attachment.clear_device_path.is_empty();
    match attachment.state() {
        v1::DeviceState::Live | v1::DeviceState::Starting if is_locked => Disk::Locked,
        v1::DeviceState::Live | v1::DeviceState::Starting => Disk::Serving,
        v1::DeviceState::Stalled => Disk::Stalled,
        v1::DeviceState::Failed => Disk::Failed,
        v1::DeviceState::Stopping => Disk::Leaving,
        v1::DeviceState::Dead | v1::DeviceState::Unspecified => Disk::Dead,
    }
}

async fn call<T>(
    answer: impl Future<Output = Result<Response<T>, Status>>,
    deadline: Duration,
) -> Result<T, Status> {
    match tokio::time::timeout(deadline, answer).await {
        Ok(Ok(response)) => Ok(response.into_inner()),
        Ok(Err(status)) => Err(passed_on(&status)),
        Err(_) => Err(Status::unavailable(format!(
            "the node daemon has not answered for {} s; see its log, and repeat the call",
            deadline.as_secs()
        ))),
    }
}

/// A refusal of the daemon, or of the server behind it: with the advice in the message, because kubelet shows that alone.
fn passed_on(status: &Status) -> Status {
    let Some(info) = status.get_details_error_info() else {
        return match status.code() {
            // No words of the daemon's: it is not there.
            Code::Unavailable | Code::Unknown | Code::Cancelled => Status::unavailable(format!(
                "the node daemon cannot be asked: {}; start it: `volclient serve`, as root, or give another --socket",
                shortened(status.message())
            )),
            code => Status::new(code, shortened(status.message())),
        };
    };
    let next = info.metadata.get(reason::METADATA_NEXT).filter(|next| !next.is_empty());
    let message = match next {
        Some(next) => format!("{}; {next}", status.message()),
        None => status.message().to_owned(),
    };
    // By the reason the plugin tells what is for good.
    let mut details = ErrorDetails::new();
    details.set_error_info(info.reason, info.domain, HashMap::new());
    Status::with_error_details(status.code(), shortened(&message), details)
}

fn shortened(message: &str) -> String {
    message.chars().take(SHOWN_CHARACTERS_MAX).collect()
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;

    #[test]
    fn a_disk_is_the_volumes_by_its_uid_under_a_grant_and_no_administrators() {
        let volume = VolumeId::from(Uuid::from_u128(7));
        let attachment = |target: String, uid: Uuid| v1::NodeAttachment {
            target,
            volume_uid: uid.to_string(),
            ..Default::default()
        };
        let own = attachment("vol-1".to_owned(), Uuid::from_u128(7));
        assert!(!is_of(&own, volume) && is_anothers_of(&own, volume));
        let granted = v1::NodeAttachment { only_if_granted: true, ..own };
        assert!(is_of(&granted, volume) && !is_anothers_of(&granted, volume));
        assert!(is_of(&v1::NodeAttachment { target: volume.as_name(), ..Default::default() }, volume));
        assert!(!is_of(&attachment("vol-1".to_owned(), Uuid::from_u128(8)), volume));
        assert!(!is_of(&v1::NodeAttachment::default(), volume));
    }

    #[test]
    fn a_refusal_keeps_its_code_and_says_what_to_do() {
        let metadata = HashMap::from([(reason::METADATA_NEXT.to_owned(), "unmount it".to_owned())]);
        let details = ErrorDetails::with_error_info(reason::DEVICE_OPEN, reason::DOMAIN, metadata);
        let status = Status::with_error_details(Code::FailedPrecondition, "vol-1 is in use", details);
        let told = passed_on(&status);
        assert_eq!((told.code(), told.message()), (Code::FailedPrecondition, "vol-1 is in use; unmount it"));
        assert!(told.get_details_error_info().is_some_and(|info| info.reason == reason::DEVICE_OPEN));
        let gone = passed_on(&Status::unavailable("tcp connect error"));
        assert!(gone.message().contains("start it: `volclient serve`"), "{gone}");
    }

    #[test]
    fn what_passes_is_not_for_good() {
        let refused = |code, reason: &str| {
            let details = ErrorDetails::with_error_info(reason, reason::DOMAIN, HashMap::new());
            passed_on(&Status::with_error_details(code, "no", details))
        };
        for of_good in [reason::VOLUME_NOT_GRANTED, reason::DEVICE_FAILED, reason::PASSPHRASE_MISSING] {
            assert!(is_permanent(&refused(Code::FailedPrecondition, of_good)), "{of_good}");
        }
        assert!(is_permanent(&refused(Code::NotFound, reason::VOLUME_NOT_FOUND)));
        for passing in [
            reason::SERVER_UNREACHABLE,
            reason::DEVICE_TIMED_OUT,
            reason::DEVICE_START_FAILED,
            reason::PASSPHRASE_WRONG,
        ] {
            assert!(!is_permanent(&refused(Code::FailedPrecondition, passing)), "{passing}");
        }
        // The daemon is away, or does not answer in time.
        assert!(!is_permanent(&passed_on(&Status::unavailable("tcp connect error"))));
        assert!(is_of_failed_device(&refused(Code::FailedPrecondition, reason::DEVICE_FAILED)));
        assert!(!is_of_failed_device(&refused(Code::FailedPrecondition, reason::VOLUME_NOT_GRANTED)));
    }

    #[test]
    fn an_encrypted_disk_is_of_use_once_its_clear_disk_is_open() {
        let encrypted = |state: v1::DeviceState, clear: &str| v1::NodeAttachment {
            state: state.into(),
            is_encrypted: true,
            clear_device_path: clear.to_owned(),
            ..Default::default()
        };
        let clear = "/dev/mapper/volnode-x";
        for (state, closed, open) in [
            (v1::DeviceState::Live, Disk::Locked, Disk::Serving),
            (v1::DeviceState::Starting, Disk::Locked, Disk::Serving),
            (v1::DeviceState::Stalled, Disk::Stalled, Disk::Stalled),
            (v1::DeviceState::Failed, Disk::Failed, Disk::Failed),
            (v1::DeviceState::Dead, Disk::Dead, Disk::Dead),
            (v1::DeviceState::Stopping, Disk::Leaving, Disk::Leaving),
        ] {
            assert_eq!(disk_of(Some(&encrypted(state, ""))), closed);
            assert_eq!(disk_of(Some(&encrypted(state, clear))), open);
        }
    }

    #[test]
    fn our_policy_is_told_from_an_administrators_and_has_its_time() {
        let policy = |on_stall: v1::StallAction, stall_fail_after_ms| v1::NodeAttachment {
            state: v1::DeviceState::Stalled.into(),
            state_since_ms: 1_000_000,
            on_stall: on_stall.into(),
            stall_fail_after_ms,
            ..Default::default()
        };
        let ours = policy(v1::StallAction::Fail, UNMOUNT_FAIL_AFTER_MS);
        assert!(fails_by_us(&ours));
        for theirs in [0, 5_000, 120_000] {
            assert!(!fails_by_us(&policy(v1::StallAction::Fail, theirs)), "{theirs}");
        }
        assert!(!fails_by_us(&policy(v1::StallAction::Wait, UNMOUNT_FAIL_AFTER_MS)));
        assert!(!is_failing(&ours, 1_120_000) && is_failing(&ours, 1_120_001));
        assert!(!is_failing(&policy(v1::StallAction::Wait, 0), i64::MAX));
        let live = v1::NodeAttachment { state: v1::DeviceState::Live.into(), ..ours };
        assert!(!is_failing(&live, i64::MAX));
    }
}
