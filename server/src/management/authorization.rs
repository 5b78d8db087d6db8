//! Who may make which call, and about what: the caller's rights, as its certificate gave them, against what the call does.
//!
//! Owns the table of all calls ([`Call`]), each with what it asks of its caller ([`Need`]), and the rule for each need. Documents and tests
//! are held to the same table ([`table`]). Never: reads a certificate (`tls/rights.rs` did), or looks at more of a request than whose
//! attachment it is about. Asked first in every method of `management/mod.rs`.
//!
//! What a caller may do it may do in its [`Scope`]. There is one rule for what is outside: who may not make a call at all gets
//! PERMISSION_DENIED, whatever the call is about; so does who would make something by a name outside. Anything else outside is answered
//! as if it were not there.
//!
//! A call without rights beside it did not come through `listener.rs`: it may do nothing.

use std::fmt::Write as _;
use std::sync::Arc;

use tonic::{Extensions, Status};

use super::listener::ApiPeer;
use crate::scope::Scope;
use crate::status;
use crate::tls::rights::{Rights, Role};

/// What a call asks of its caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    /// Nothing.
    Nothing,
    /// To look at volumes and what belongs to them.
    Look,
    /// To look at nodes.
    LookAtNode,
    /// To look at what is attached or granted.
    LookAtAttached,
    /// To attach and detach.
    Attach,
    /// To make, change and delete volumes and what belongs to them.
    Manage,
    /// To speak for a node.
    SpeakForNode,
    /// To change what belongs to no volume.
    Administer,
}

/// Who meets a need.
struct Rule {
    /// Roles of all of the server.
    server: &'static [Role],
    /// Roles of a tenant, in its name space.
    tenant: &'static [Role],
    /// Nodes, in what is about them.
    nodes: bool,
    /// What the others are told that they may not.
    what: &'static str,
}

impl Need {
    fn rule(self) -> Rule {
        use Role::{Attach, Manage, Read};
        let of = |server, tenant, nodes, what| Rule { server, tenant, nodes, what };
        match self {
            Self::Nothing => of(&Role::ALL, &Role::ALL, true, ""),
            Self::Look => of(&[Manage, Read], &[Manage, Read], false, "look at volumes (volnode:read)"),
            Self::LookAtNode => {
                of(&[Manage, Read], &[Manage, Read], true, "look at this node (volnode:node/<node_id>)")
            }
            Self::LookAtAttached => {
                of(&Role::ALL, &Role::ALL, true, "speak for this node (volnode:node/<node_id>)")
            }
            Self::Attach => {
                of(&[Manage, Attach], &[Manage, Attach], true, "speak for this node (volnode:node/<node_id>)")
            }
            Self::Manage => of(&[Manage], &[Manage], false, "manage volumes (volnode:manage)"),
            Self::SpeakForNode => of(&[Manage], &[], true, "speak for this node (volnode:node/<node_id>)"),
            Self::Administer => of(&[Manage], &[], false, "manage the server (volnode:manage)"),
        }
    }
}

macro_rules! calls {
    ($($call:ident: $need:ident,)*) => {
        /// The calls of the API.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        #[allow(missing_docs)] // The API says what each does.
        pub enum Call { $($call),* }

        impl Call {
            /// All of them, in the order of the table.
            pub const ALL: &[Self] = &[$(Self::$call),*];

            /// Its name in the API.
            pub fn name(self) -> &'static str {
                match self { $(Self::$call => stringify!($call)),* }
            }

            /// What it asks of its caller.
            pub fn need(self) -> Need {
                match self { $(Self::$call => Need::$need),* }
            }
        }
    };
}

calls! {
    GetServerInfo: Nothing,
    CreateVolume: Manage,
    GetVolume: Look,
    ListVolumes: Look,
    UpdateVolume: Manage,
    RenameVolume: Manage,
    SetVolumeLimits: Manage,
    SetVolumeContent: Attach,
    DeleteVolume: Manage,
    ResizeVolume: Manage,
    AttachVolume: Attach,
    DetachVolume: Attach,
    ListAttachments: LookAtAttached,
    CreateGrant: Manage,
    DeleteGrant: Manage,
    ListGrants: LookAtAttached,
    RegisterNode: SpeakForNode,
    Heartbeat: SpeakForNode,
    GetNode: LookAtNode,
    ListNodes: Look,
    DeleteNode: Administer,
    CreateSnapshot: Manage,
    MarkSnapshotsFrozen: Manage,
    GetSnapshot: Look,
    ListSnapshots: Look,
    DeleteSnapshot: Manage,
    RestoreVolume: Manage,
    CloneVolume: Manage,
    DiffSnapshots: Look,
    Watch: Look,
    GetOperation: Look,
    ListOperations: Look,
    CancelOperation: Manage,
    SetTenant: Administer,
    GetTenant: Look,
    ListTenants: Look,
    DeleteTenant: Administer,
}

/// Whose certificate it is, for the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Holder {
    /// Of a role for all of the server: `volnode:<role>`.
    Server(Role),
    /// Of a role for one tenant: `volnode:tenant/<tenant>/<role>`.
    Tenant(Role),
    /// Of a node: `volnode:node/<node_id>`.
    Node,
    /// Of a node that attaches what is granted to it: `volnode:granted/<node_id>`.
    Granted,
    /// Of anything else, such as `volnode:volume/<name>`.
    Other,
}

/// What the holder of a certificate may do with a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Allowed {
    /// It may not make it.
    No,
    /// It may make it, whatever it is about.
    Yes,
    /// It may make it about what is in its tenant's name space.
    InTenant,
    /// It may make it about its node.
    ForNode,
}

impl Holder {
    /// All that the table has, in its order.
    pub const ALL: [Self; 9] = [
        Self::Server(Role::Manage),
        Self::Server(Role::Attach),
        Self::Server(Role::Read),
        Self::Tenant(Role::Manage),
        Self::Tenant(Role::Attach),
        Self::Tenant(Role::Read),
        Self::Node,
        Self::Granted,
        Self::Other,
    ];

    /// The URI in its certificate, of a tenant `T`, a node `N` or a volume `V`.
    pub fn uri(self) -> String {
        match self {
            Self::Server(role) => format!("volnode:{}", role.as_str()),
            Self::Tenant(role) => format!("volnode:tenant/T/{}", role.as_str()),
            Self::Node => "volnode:node/N".to_owned(),
            Self::Granted => "volnode:granted/N".to_owned(),
            Self::Other => "volnode:volume/V".to_owned(),
        }
    }

    /// What it may do with a call.
    pub fn may(self, call: Call) -> Allowed {
        let (need, rule) = (call.need(), call.need().rule());
        let is_met = match self {
            _ if need == Need::Nothing => return Allowed::Yes,
            Self::Server(role) => rule.server.contains(&role),
            Self::Tenant(role) => rule.tenant.contains(&role),
            Self::Node | Self::Granted => rule.nodes,
            Self::Other => false,
        };
        match self {
            _ if !is_met => Allowed::No,
            Self::Server(_) | Self::Other => Allowed::Yes,
            Self::Tenant(_) => Allowed::InTenant,
            Self::Node | Self::Granted => Allowed::ForNode,
        }
    }
}

/// The table of every call and every holder, as documents have it.
pub fn table() -> String {
    let mut text = "| call |".to_owned();
    for holder in Holder::ALL {
        let _ = write!(text, " `{}` |", holder.uri().trim_start_matches("volnode:"));
    }
    text.push_str("\n| --- |");
    text.push_str(&" --- |".repeat(Holder::ALL.len()));
    for call in Call::ALL {
        let _ = write!(text, "\n| {} |", call.name());
        for holder in Holder::ALL {
            let word = match (holder.may(*call), holder) {
                (Allowed::No, _) => "–",
                (Allowed::Yes, _) => "yes",
                (Allowed::InTenant, _) => "in T",
                (Allowed::ForNode, Holder::Granted) if *call == Call::AttachVolume => "for N, if granted",
                (Allowed::ForNode, _) => "for N",
            };
            let _ = write!(text, " {word} |");
        }
    }
    text.push('\n');
    text
}

/// The caller of one call.
pub(super) struct Caller(Arc<Rights>);

impl Caller {
    /// Of the call with these extensions.
    pub(super) fn of(extensions: &Extensions) -> Self {
        let peer = extensions.get::<ApiPeer>();
        Self(peer.map_or_else(|| Arc::new(Rights::nothing()), |peer| Arc::clone(&peer.rights)))
    }

    /// Where this call may be made that is not about a node.
    pub(super) fn scope(&self, call: Call) -> Result<Scope, Status> {
        let rule = call.need().rule();
        self.0.scope(rule.server, rule.tenant).ok_or_else(|| status::forbidden(rule.what))
    }

    /// Where this call may be made that is about a node; an empty `node_id` is about every node. Who speaks for the node may make it
    /// whatever the volume is.
    pub(super) fn scope_at(&self, call: Call, node_id: &str) -> Result<Scope, Status> {
        if call.need().rule().nodes && self.0.is_node(node_id) { Ok(Scope::All) } else { self.scope(call) }
    }

    /// Whether it may make this call about some node, or anywhere.
    pub(super) fn require_any(&self, call: Call) -> Result<(), Status> {
        let is_for_nodes = call.need().rule().nodes && self.0.is_for_a_node();
        if is_for_nodes { Ok(()) } else { self.scope(call).map(|_| ()) }
    }

    /// Whether it attaches a volume of this tenant (empty: of none) to this node, to which it may, only if it is granted.
    pub(super) fn needs_grant(&self, node_id: &str, tenant: &str) -> bool {
        let attaches_it = self.scope(Call::AttachVolume).is_ok_and(|scope| scope.has(tenant));
        !attaches_it && !self.0.is_node_ungranted(node_id)
    }

    /// Where it may take volumes from whoever has them.
    pub(super) fn scope_of_force(&self) -> Result<Scope, Status> {
        let scope = self.0.scope(&[Role::Manage], &[Role::Manage]);
        scope.ok_or_else(|| status::forbidden("take volumes by force (volnode:manage)"))
    }
}

/// Whether something may be made by this name.
pub(super) fn require_inside(scope: &Scope, name: &str) -> Result<(), Status> {
    if scope.has_named(name) { Ok(()) } else { Err(status::outside(name)) }
}

/// Whether the caller is one for all of the server.
pub(super) fn require_all(scope: &Scope) -> Result<(), Status> {
    if scope.is_all() {
        Ok(())
    } else {
        Err(status::forbidden("adopt what is on the server (volnode:manage)"))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use tonic::Code;

    use super::*;
    use crate::advertised::ReachedAt;

    #[test]
    fn a_call_that_came_another_way_may_do_nothing() {
        let caller = Caller::of(&Extensions::new());
        for call in Call::ALL.iter().filter(|call| **call != Call::GetServerInfo) {
            for refused in [
                caller.scope(*call).err(),
                caller.scope_at(*call, "n").err(),
                caller.require_any(*call).err(),
            ] {
                assert_eq!(refused.map(|status| status.code()), Some(Code::PermissionDenied), "{call:?}");
            }
        }
        assert!(caller.needs_grant("n", "t") && caller.scope_of_force().is_err());
    }

    #[test]
    fn who_may_do_everything_may_do_each() {
        let mut extensions = Extensions::new();
        let (rights, reached_at) = (Arc::new(Rights::everything()), ReachedAt::Socket);
        extensions.insert(ApiPeer { rights, reached_at, identity: Arc::default() });
        let caller = Caller::of(&extensions);
        for call in Call::ALL {
            assert_eq!(caller.scope(*call).unwrap(), Scope::All, "{call:?}");
            assert_eq!(caller.scope_at(*call, "").unwrap(), Scope::All, "{call:?}");
        }
        assert!(caller.scope_of_force().unwrap().is_all() && !caller.needs_grant("n", ""));
    }

    /// A call that is added to the API has to be in the table.
    #[test]
    fn the_table_has_every_call_of_the_api() {
        let api = include_str!("../../../proto/volnode/v1/management.proto");
        let calls = api.lines().filter_map(|line| line.trim_start().strip_prefix("rpc ")?.split_once('('));
        let calls: BTreeSet<&str> = calls.map(|(name, _)| name).collect();
        let table: BTreeSet<&str> = Call::ALL.iter().map(|call| call.name()).collect();
        assert!(calls.len() > 30, "{calls:?}");
        assert_eq!(calls, table);
    }

    /// To write it anew: put the text that this fails with there.
    #[test]
    fn the_document_has_the_table() {
        let document = include_str!("../../../docs/tls.md");
        let table = table();
        assert!(document.contains(&table), "docs/tls.md must have:\n{table}");
    }
}
