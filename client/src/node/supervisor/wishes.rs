//! What a caller of attach wants of the disk, and in what one that is there is otherwise.

use std::fmt::Display;

use proto::v1;
use ublk_core::DataPath;
use ublk_core::abi::UBLK_MAX_QUEUE_DEPTH;

use crate::contract::{DATA_PATH_AUTO, DeviceSpec, DeviceStatus, SendZcMode, StallPolicy};
use crate::node::attachment_record::{send_zc_mode, stall_policy};
use crate::node::error::NodeError;
use crate::node::target::Target;

/// Most connections of one attachment, and so most queues: a server that is asked for more by mistake should not have
/// to refuse them one by one.
const NR_CONNECTIONS_MAX: u16 = 256;
/// Longer is not waiting for an answer any more.
const BUSY_POLL_US_MAX: u16 = 10_000;

/// How a target is to be attached; `None` where any will do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Wishes {
    pub(super) read_only: bool,
    /// Other nodes may read the volume as well; or write to it, where this one does.
    pub(super) shared: bool,
    pub(super) data_path: Option<DataPath>,
    pub(super) nr_hw_queues: Option<u16>,
    pub(super) nr_connections: Option<u16>,
    pub(super) queue_depth: Option<u16>,
    pub(super) on_stall: StallPolicy,
    pub(super) busy_poll_us: Option<u16>,
    pub(super) send_zc_mode: SendZcMode,
    /// Not without a grant of the server's.
    pub(super) only_if_granted: bool,
}

impl Wishes {
    pub(super) fn of(request: &v1::AttachRequest, target: &Target) -> Result<Self, NodeError> {
        // Which nobody writes to, and anybody may have.
        let is_snapshot = matches!(target, Target::Snapshot(_));
        let data_path = match request.data_path.as_str() {
            "" | DATA_PATH_AUTO => None,
            name => Some(name.parse().map_err(|error| NodeError::InvalidField {
                field: "data_path",
                message: format!("{error}; auto chooses"),
            })?),
        };
        let nr_hw_queues = limited("nr_hw_queues", request.nr_hw_queues, NR_CONNECTIONS_MAX)?;
        let nr_connections = limited("nr_connections", request.nr_connections, NR_CONNECTIONS_MAX)?;
        if let (Some(queues), Some(connections)) = (nr_hw_queues, nr_connections)
            && connections < queues
        {
            return Err(NodeError::InvalidField {
                field: "nr_connections",
                message: format!(
                    "{connections} are too few for {queues} queues: ask for at least {queues} connections, or fewer queues"
                ),
            });
        }
        if request.only_if_granted && !matches!(target, Target::Volume(_)) {
            let message = "only volumes of the storage server are granted".to_owned();
            return Err(NodeError::InvalidField { field: "only_if_granted", message });
        }
        Ok(Self {
            read_only: request.read_only || is_snapshot,
            shared: request.shared || is_snapshot,
            data_path,
            nr_hw_queues,
            nr_connections,
            queue_depth: limited("queue_depth", request.queue_depth, UBLK_MAX_QUEUE_DEPTH)?,
            on_stall: stall_policy(request.on_stall(), request.stall_fail_after_ms),
            busy_poll_us: limited("busy_poll_us", request.busy_poll_us, BUSY_POLL_US_MAX)?,
            send_zc_mode: send_zc_mode(request),
            only_if_granted: request.only_if_granted,
        })
    }

    /// What is asked of the server.
    pub(super) fn access_mode(&self) -> v1::AccessMode {
        match (self.read_only, self.shared) {
            (false, false) => v1::AccessMode::SingleNodeWriter,
            (false, true) => v1::AccessMode::MultiNodeMultiWriter,
            (true, false) => v1::AccessMode::SingleNodeReaderOnly,
            (true, true) => v1::AccessMode::MultiNodeReaderOnly,
        }
    }

    /// That an attachment may write and is not to, or the other way round, for people; which is known of one without a device, too.
    pub(super) fn other_access(&self, spec: &DeviceSpec) -> Option<String> {
        let (is, wished) = (spec.read_only, self.read_only);
        (is != wished).then(|| format!("read_only {is} instead of {wished}"))
    }

    /// In what an attachment is otherwise than wished, for people. What was asked for and could not be had in full, such
    /// as more queues than there are processors, may be asked for again.
    pub(super) fn differences(&self, spec: &DeviceSpec, in_use: &DeviceStatus) -> Vec<String> {
        let mut differences: Vec<String> = self.other_access(spec).into_iter().collect();
        let mut differ = |name: &str, is: &dyn Display, wished: &dyn Display| {
            differences.push(format!("{name} {is} instead of {wished}"));
        };
        // `auto` leaves the choice.
        let is_sent_zc = spec.send_zc_mode();
        if self.send_zc_mode != SendZcMode::Auto && self.send_zc_mode != is_sent_zc {
            differ("send_zc", &is_sent_zc, &self.send_zc_mode);
        }
        if let Some(wished) = self.data_path.filter(|path| path.as_str() != in_use.data_path) {
            differ("data_path", &in_use.data_path, &wished);
        }
        let numbers = [
            ("nr_hw_queues", in_use.nr_hw_queues, spec.nr_hw_queues, self.nr_hw_queues),
            ("nr_connections", in_use.connections(), spec.nr_connections, self.nr_connections),
            ("queue_depth", in_use.queue_depth, spec.queue_depth, self.queue_depth),
            ("busy_poll_us", spec.busy_poll_us, spec.busy_poll_us, self.busy_poll_us),
        ];
        for (name, is, asked, wished) in numbers {
            if let Some(wished) = wished.filter(|wished| ![is, asked].contains(wished)) {
                differ(name, &is, &wished);
            }
        }
        differences
    }
}

/// 0 leaves the choice; anything else must be within what the driver takes.
fn limited(field: &'static str, value: u32, max: u16) -> Result<Option<u16>, NodeError> {
    match u16::try_from(value) {
        Ok(0) => Ok(None),
        Ok(value) if value <= max => Ok(Some(value)),
        _ => Err(NodeError::InvalidField { field, message: format!("{value} is more than {max}") }),
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::contract::DeviceState;
    use crate::node::attachment_record::tests::{spec, status};

    fn request() -> v1::AttachRequest {
        v1::AttachRequest { target: "vol-1".to_owned(), ..Default::default() }
    }

    fn of(request: &v1::AttachRequest) -> Result<Wishes, NodeError> {
        Wishes::of(request, &Target::parse("vol-1").unwrap())
    }

    #[test]
    fn a_snapshot_is_read_beside_others_whatever_is_asked() {
        for (read_only, shared) in [(false, false), (true, false), (false, true)] {
            let asked = v1::AttachRequest { read_only, shared, ..request() };
            let wishes = Wishes::of(&asked, &Target::parse("vol-1@s").unwrap()).unwrap();
            assert_eq!(wishes.access_mode(), v1::AccessMode::MultiNodeReaderOnly);
        }
    }

    #[test]
    fn nothing_but_a_volume_is_asked_for_under_a_grant() {
        let asked = v1::AttachRequest { only_if_granted: true, ..request() };
        assert!(of(&asked).unwrap().only_if_granted && !of(&request()).unwrap().only_if_granted);
        for other in ["vol-1@s", "nbd://h/vol-1"] {
            let refused = Wishes::of(&asked, &Target::parse(other).unwrap());
            assert!(
                matches!(refused, Err(NodeError::InvalidField { field: "only_if_granted", .. })),
                "{refused:?}"
            );
        }
    }

    /// An attachment that was asked for 4 queues and got 2, with a connection each, over `mapped`.
    fn attached() -> (DeviceSpec, DeviceStatus) {
        let mut spec = spec(Uuid::from_u128(7), "vol-1");
        (spec.nr_hw_queues, spec.nr_connections) = (4, 0);
        let mut status = status(&spec, DeviceState::Live, "boot");
        (status.nr_hw_queues, status.nr_connections) = (2, 2);
        (spec, status)
    }

    #[test]
    fn what_is_not_asked_for_differs_from_nothing() {
        let (spec, status) = attached();
        let wishes = of(&v1::AttachRequest { data_path: "auto".into(), ..request() }).unwrap();
        assert!(wishes.differences(&spec, &status).is_empty());
    }

    #[test]
    fn what_was_asked_for_and_what_was_had_may_be_asked_for_again() {
        let (spec, status) = attached();
        for nr_hw_queues in [2, 4] {
            let wishes = of(&v1::AttachRequest { nr_hw_queues, ..request() }).unwrap();
            assert!(wishes.differences(&spec, &status).is_empty(), "{nr_hw_queues}");
        }
    }

    #[test]
    fn every_difference_is_told() {
        let (spec, status) = attached();
        let asked = v1::AttachRequest {
            data_path: "fused".into(),
            read_only: true,
            shared: false,
            nr_hw_queues: 3,
            nr_connections: 6,
            queue_depth: 64,
            busy_poll_us: 50,
            send_zc: true,
            ..request()
        };
        let differences = of(&asked).unwrap().differences(&spec, &status);
        let expected = [
            "read_only false instead of true",
            "send_zc off instead of on",
            "data_path mapped instead of fused",
            "nr_hw_queues 2 instead of 3",
            "nr_connections 2 instead of 6",
            "queue_depth 128 instead of 64",
            "busy_poll_us 0 instead of 50",
        ];
        assert_eq!(differences, expected);
    }

    #[test]
    fn whether_pages_are_sent_is_auto_unless_it_is_told_by_the_mode_or_the_flag() {
        use v1::SendZcMode::{Auto, Off, On, Unspecified};
        for (mode, send_zc, expected) in [
            (Unspecified, false, SendZcMode::Auto),
            (Unspecified, true, SendZcMode::On),
            (Auto, true, SendZcMode::Auto),
            (On, false, SendZcMode::On),
            (Off, true, SendZcMode::Off),
        ] {
            let asked = v1::AttachRequest { send_zc, send_zc_mode: mode.into(), ..request() };
            assert_eq!(of(&asked).unwrap().send_zc_mode, expected, "{mode:?}, {send_zc}");
        }
    }

    #[test]
    fn what_is_attached_as_it_is_sent_is_attached_again_with_auto() {
        let (spec, status) = attached();
        for is in [SendZcMode::Auto, SendZcMode::On, SendZcMode::Off] {
            let spec = DeviceSpec { send_zc_mode: Some(is), ..spec.clone() };
            for wished in [SendZcMode::Auto, SendZcMode::On, SendZcMode::Off] {
                let wishes = Wishes { send_zc_mode: wished, ..of(&request()).unwrap() };
                let is_fine = wished == SendZcMode::Auto || wished == is;
                assert_eq!(wishes.differences(&spec, &status).is_empty(), is_fine, "{is} as {wished}");
            }
        }
    }

    #[test]
    fn what_cannot_be_is_refused() {
        for bad in [
            v1::AttachRequest { data_path: "fast".into(), ..request() },
            v1::AttachRequest { nr_hw_queues: 257, ..request() },
            v1::AttachRequest { nr_connections: 257, ..request() },
            v1::AttachRequest { nr_hw_queues: 4, nr_connections: 3, ..request() },
            v1::AttachRequest { queue_depth: 70_000, ..request() },
            v1::AttachRequest { busy_poll_us: 10_001, ..request() },
        ] {
            assert!(matches!(of(&bad), Err(NodeError::InvalidField { .. })), "{bad:?}");
        }
    }
}
