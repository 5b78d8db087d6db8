//! Who may make which call: the caller's rights, as its certificate gave them, against what the call would do.
//!
//! Owns: the rule for each kind of call. Never: reads a certificate (`tls/rights.rs` did), or looks at more of a request
//! than whose attachment it is about. Called first in every method of `management/mod.rs`.
//! A call without rights beside it did not come through `listener.rs`: it may do nothing.
//!
//! | call | a holder of `volnode:manage` | a holder of `volnode:node/N` | a holder of `volnode:granted/N` | any other certificate |
//! | --- | --- | --- | --- | --- |
//! | GetServerInfo | yes | yes | yes | yes |
//! | AttachVolume | yes | for N; by force never | for N what is granted to it; by force never | no |
//! | DetachVolume, ListAttachments, ListGrants, SetVolumeContent | yes | for N | for N | no |
//! | RegisterNode, Heartbeat, GetNode | yes | for N | for N | no |
//! | all others | yes | no | no | no |

use std::sync::Arc;

use tonic::{Extensions, Status};

use super::listener::ApiPeer;
use crate::status;
use crate::tls::rights::Rights;

/// The caller of one call.
pub(super) struct Caller(Arc<Rights>);

impl Caller {
    /// Of the call with these extensions.
    pub(super) fn of(extensions: &Extensions) -> Self {
        let peer = extensions.get::<ApiPeer>();
        Self(peer.map_or_else(|| Arc::new(Rights::nothing()), |peer| Arc::clone(&peer.rights)))
    }

    /// Whether every call may be made, whatever it is about.
    pub(super) fn may_manage(&self) -> bool {
        self.0.may_manage()
    }

    /// For calls about volumes.
    pub(super) fn require_manage(&self) -> Result<(), Status> {
        allow(self.may_manage(), "manage volumes (volnode:manage)")
    }

    /// For calls about attachments of one node; an empty `node_id` is about every node's.
    pub(super) fn require_node(&self, node_id: &str) -> Result<(), Status> {
        allow(self.0.may_attach_to(node_id), "speak for this node (volnode:node/<node_id>)")
    }

    /// Whether it attaches to this node, to which it may, only what is granted.
    pub(super) fn needs_grant(&self, node_id: &str) -> bool {
        !self.0.may_attach_ungranted_to(node_id)
    }

    /// For an attach that may end another node's attachment.
    pub(super) fn require_force(&self) -> Result<(), Status> {
        allow(self.may_manage(), "take volumes by force (volnode:manage)")
    }
}

fn allow(is_allowed: bool, what: &str) -> Result<(), Status> {
    if is_allowed { Ok(()) } else { Err(status::forbidden(what)) }
}

#[cfg(test)]
mod tests {
    use tonic::Code;

    use super::*;
    use crate::advertised::ReachedAt;

    #[test]
    fn a_call_that_came_another_way_may_do_nothing() {
        let caller = Caller::of(&Extensions::new());
        for refused in [caller.require_manage(), caller.require_node("n"), caller.require_force()] {
            assert_eq!(refused.unwrap_err().code(), Code::PermissionDenied);
        }
        assert!(caller.needs_grant("n"));
    }

    #[test]
    fn who_may_do_everything_may_do_each() {
        let mut extensions = Extensions::new();
        let (rights, reached_at) = (Arc::new(Rights::everything()), ReachedAt::Socket);
        extensions.insert(ApiPeer { rights, reached_at, identity: Arc::default() });
        let caller = Caller::of(&extensions);
        assert!(
            caller.require_manage().is_ok()
                && caller.require_node("").is_ok()
                && caller.require_force().is_ok()
                && !caller.needs_grant("n")
        );
    }
}
