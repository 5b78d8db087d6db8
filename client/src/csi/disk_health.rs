//! What the state of a disk means for its volume's health: the same on the node and in the controller.
//!
//! Owns the mapping. Of the two that ask, the node knows a disk by the node API, and the controller by the node's last heartbeat:
//! both have the state's word and the reason for it.
//!
//! | state and reason | status | reason |
//! | --- | --- | --- |
//! | stalled, and I/O waits for the server | DEGRADED | `ServerUnreachable` |
//! | stalled, and I/O fails until the server is back | INACCESSIBLE | `ServerUnreachable` |
//! | failed, and the server forgot writes that it had acknowledged | DATA_LOSS | `UnflushedWritesLost` |
//! | failed, and the server itself lets the disk in no more | INACCESSIBLE | `Fenced` |
//! | failed for another reason | INACCESSIBLE | `DeviceFailed` |
//! | dead | INACCESSIBLE | `DeviceProcessDead` |
//!
//! A disk that is starting, stopping or live is well, and of a state that a newer program has a word for nothing is known. A policy to fail
//! does so after its time: until then I/O waits, so that the reason decides, and not the policy. Called by both services' `health`.

use proto::csi::v1::VolumeHealthErrorType as Status;

use crate::contract::state_reasons;

/// What a disk in this state, a word of [`crate::contract::state_word::state_word`], means for its volume; `None`: no known problem.
pub fn of_disk(state: &str, state_reason: &str) -> Option<(Status, &'static str)> {
    match state {
        "stalled" if state_reason.starts_with(state_reasons::IO_FAILS) => {
            Some((Status::Inaccessible, "ServerUnreachable"))
        }
        "stalled" => Some((Status::Degraded, "ServerUnreachable")),
        "failed" if state_reason.starts_with(state_reasons::WRITES_LOST) => {
            Some((Status::DataLoss, "UnflushedWritesLost"))
        }
        "failed" if state_reasons::is_the_servers(state_reason) => Some((Status::Inaccessible, "Fenced")),
        "failed" => Some((Status::Inaccessible, "DeviceFailed")),
        "dead" => Some((Status::Inaccessible, "DeviceProcessDead")),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use proto::v1::DeviceState;

    use super::*;
    use crate::contract::state_word::state_word;

    /// Numbers of the states that there are: the next one is none.
    const STATES: i32 = 7;

    fn reasons() -> [String; 6] {
        [
            String::new(),
            format!("{}: no route to host", state_reasons::IO_WAITS),
            format!("{}: no route to host", state_reasons::IO_FAILS),
            format!("{}: I/O gets EIO", state_reasons::WRITES_LOST),
            "the server at storage:10809 says: the attachment has ended".to_owned(),
            "the disk was taken away by force".to_owned(),
        ]
    }

    #[test]
    fn every_state_with_every_reason_means_what_the_table_says() {
        use Status::{DataLoss, Degraded, Inaccessible};
        let unreachable = Some((Degraded, "ServerUnreachable"));
        let failed = Some((Inaccessible, "DeviceFailed"));
        let stalled = [
            unreachable,
            unreachable,
            Some((Inaccessible, "ServerUnreachable")),
            unreachable,
            unreachable,
            unreachable,
        ];
        let of_failed = [
            failed,
            failed,
            failed,
            Some((DataLoss, "UnflushedWritesLost")),
            Some((Inaccessible, "Fenced")),
            failed,
        ];
        for (state, expected) in [
            (DeviceState::Unspecified, [None; 6]),
            (DeviceState::Starting, [None; 6]),
            (DeviceState::Live, [None; 6]),
            (DeviceState::Stalled, stalled),
            (DeviceState::Failed, of_failed),
            (DeviceState::Stopping, [None; 6]),
            (DeviceState::Dead, [Some((Inaccessible, "DeviceProcessDead")); 6]),
        ] {
            for (reason, expected) in reasons().iter().zip(expected) {
                assert_eq!(of_disk(state_word(state), reason), expected, "{state:?}: {reason}");
            }
        }
        assert!((0..STATES).all(|number| DeviceState::try_from(number).is_ok()));
        assert!(DeviceState::try_from(STATES).is_err(), "a new state has a row of its own");
        assert_eq!(of_disk("drowsy", "of a newer program"), None);
    }
}
