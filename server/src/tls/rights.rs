//! What the holder of a client certificate may do, as the certificate's own names say.
//!
//! Owns: the rule. Never: checks signatures (rustls has, against the configured authority), or knows connections.
//! Called by: the handshake (to read a certificate), the gate (before an export is opened, told about or listed) and
//! the management API.
//!
//! Subject alternative names that are URIs count, all others are for other uses of the certificate:
//!
//! | name | the holder may |
//! | --- | --- |
//! | `volnode:volume/<name>` | open the volume of this name, by its name or through any attachment of it |
//! | `volnode:node/<node_id>` | open what is attached to this node; and over the API attach to it, detach from it, and list |
//! | `volnode:granted/<node_id>` | the same, but for what it attaches: only volumes that are granted to this node |
//! | `volnode:manage` | call everything of the API |
//! | `volnode:attach` | call what attaches and detaches, and open every volume |
//! | `volnode:read` | call what only looks |
//! | `volnode:tenant/<tenant>/manage`, `…/attach`, `…/read` | the same in the name space of this tenant |
//! | `volnode:tenant/<tenant>/*` | all three |
//! | `volnode:*` | all of it |
//!
//! A certificate with none of them may do nothing: it was made for something else. Several add up.

use std::collections::BTreeSet;
use std::sync::Arc;

use proto::volume_name::{is_tenant_name, tenant_of};
use rustls::pki_types::CertificateDer;
use tls::certificates::uri_names;

use crate::scope::Scope;

const PREFIX: &str = "volnode:";

/// What somebody is to volumes, of all of the server or of a tenant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// It makes, changes and deletes them.
    Manage,
    /// It attaches and detaches them, and opens them.
    Attach,
    /// It looks.
    Read,
}

impl Role {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Manage, Self::Attach, Self::Read];

    /// The word for it in certificates.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Manage => "manage",
            Self::Attach => "attach",
            Self::Read => "read",
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Grant {
    Everything,
    Server(Role),
    Tenant(String, &'static [Role]),
    Volume(String),
    Node(String),
    GrantedNode(String),
}

/// What a client may do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rights(Vec<Grant>);

impl Rights {
    /// Of clients that are not told apart by certificates: everything.
    pub fn everything() -> Self {
        Self(vec![Grant::Everything])
    }

    /// Nothing at all.
    pub fn nothing() -> Self {
        Self(Vec::new())
    }

    /// Of the holder of this certificate, which was checked.
    pub fn of_certificate(certificate: &CertificateDer<'_>) -> Self {
        Self(uri_names(certificate).iter().filter_map(|name| grant(name)).collect())
    }

    /// Whether the volume may be opened, through an attachment of the node where one is told.
    pub fn may_open(&self, volume_name: &str, node_id: Option<&str>) -> bool {
        self.0.iter().any(|grant| match grant {
            Grant::Everything | Grant::Server(Role::Attach) => true,
            Grant::Server(_) => false,
            Grant::Tenant(tenant, roles) => roles.contains(&Role::Attach) && tenant_of(volume_name) == tenant,
            Grant::Volume(name) => name == volume_name,
            Grant::Node(id) | Grant::GrantedNode(id) => node_id == Some(id),
        })
    }

    /// The names of exports that are looked through for those that it may open: where it is for tenants only, none but theirs.
    pub fn scope_of_exports(&self) -> Scope {
        let is_of_tenant =
            |grant: &Grant| matches!(grant, Grant::Tenant(..) | Grant::Server(Role::Manage | Role::Read));
        match self.scope(&[], &[Role::Attach]) {
            Some(scope) if self.0.iter().all(is_of_tenant) => scope,
            _ => Scope::All,
        }
    }

    /// Where it has one of these roles: of all of the server one of `server`, or of tenants one of `tenant`. `None`: nowhere.
    pub fn scope(&self, server: &[Role], tenant: &[Role]) -> Option<Scope> {
        let is_for_all = |grant: &Grant| match grant {
            Grant::Everything => true,
            Grant::Server(role) => server.contains(role),
            _ => false,
        };
        if self.0.iter().any(is_for_all) {
            return Some(Scope::All);
        }
        let of_tenant = |grant: &Grant| match grant {
            Grant::Tenant(name, roles) if roles.iter().any(|role| tenant.contains(role)) => {
                Some(name.clone())
            }
            _ => None,
        };
        let tenants: BTreeSet<String> = self.0.iter().filter_map(of_tenant).collect();
        (!tenants.is_empty()).then(|| Scope::Tenants(Arc::new(tenants)))
    }

    /// The tenants that it names, in whatever role.
    pub fn tenants(&self) -> BTreeSet<&str> {
        let named = self.0.iter().filter_map(|grant| match grant {
            Grant::Tenant(name, _) => Some(name.as_str()),
            _ => None,
        });
        named.collect()
    }

    /// Whether it speaks for a node, whichever.
    pub fn is_for_a_node(&self) -> bool {
        self.0.iter().any(|grant| matches!(grant, Grant::Node(_) | Grant::GrantedNode(_)))
    }

    /// Whether it speaks for this node: what it may attach is all, or as [`Self::is_node_ungranted`] says.
    pub fn is_node(&self, node_id: &str) -> bool {
        let is_granted_node = |grant: &Grant| matches!(grant, Grant::GrantedNode(id) if id == node_id);
        self.is_node_ungranted(node_id) || self.0.iter().any(is_granted_node)
    }

    /// Whether it attaches to this node also what is not granted to it.
    pub fn is_node_ungranted(&self, node_id: &str) -> bool {
        self.0.iter().any(|grant| matches!(grant, Grant::Node(id) if id == node_id))
    }
}

fn grant(name: &str) -> Option<Grant> {
    match name.strip_prefix(PREFIX)? {
        "*" => Some(Grant::Everything),
        "manage" => Some(Grant::Server(Role::Manage)),
        "attach" => Some(Grant::Server(Role::Attach)),
        "read" => Some(Grant::Server(Role::Read)),
        name => match name.split_once('/')? {
            ("tenant", of_tenant) => grant_of_tenant(of_tenant),
            ("volume", volume) if !volume.is_empty() => Some(Grant::Volume(volume.to_owned())),
            ("node", node_id) if !node_id.is_empty() => Some(Grant::Node(node_id.to_owned())),
            ("granted", node_id) if !node_id.is_empty() => Some(Grant::GrantedNode(node_id.to_owned())),
            _ => None,
        },
    }
}

/// Of `<tenant>/<role>`.
fn grant_of_tenant(text: &str) -> Option<Grant> {
    let (tenant, role) = text.split_once('/')?;
    let roles: &'static [Role] = match role {
        "manage" => &[Role::Manage],
        "attach" => &[Role::Attach],
        "read" => &[Role::Read],
        "*" => &Role::ALL,
        _ => return None,
    };
    is_tenant_name(tenant).then(|| Grant::Tenant(tenant.to_owned(), roles))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rights(names: &[&str]) -> Rights {
        Rights(names.iter().filter_map(|name| grant(name)).collect())
    }

    fn may_manage(rights: &Rights) -> bool {
        rights.scope(&[Role::Manage], &[]) == Some(Scope::All)
    }

    fn tenants<const N: usize>(names: [&str; N]) -> Option<Scope> {
        Some(Scope::Tenants(Arc::new(names.map(str::to_owned).into())))
    }

    #[test]
    fn a_volume_s_holder_opens_that_volume_only() {
        let holder = rights(&["volnode:volume/a", "volnode:volume/acme+db"]);
        assert!(holder.may_open("a", None) && holder.may_open("a", Some("node-1")));
        assert!(holder.may_open("acme+db", None) && !holder.may_open("acme+d", None));
        assert!(!holder.may_open("b", None) && !holder.may_open("", None) && !holder.may_open("a/b", None));
        assert!(
            !may_manage(&holder) && !holder.is_node("a") && holder.scope(&Role::ALL, &Role::ALL).is_none()
        );
        assert_eq!(holder.scope_of_exports(), Scope::All);
    }

    #[test]
    fn a_node_opens_what_is_attached_to_it() {
        let node = rights(&["volnode:node/node-1"]);
        assert!(node.may_open("a", Some("node-1")) && node.may_open("acme+db", Some("node-1")));
        assert!(!node.may_open("a", Some("node-2")) && !node.may_open("node-1", None));
        assert!(node.is_node("node-1") && node.is_node_ungranted("node-1") && node.is_for_a_node());
        assert!(!node.is_node("node-2") && !node.is_node("") && !may_manage(&node));
    }

    #[test]
    fn a_granted_node_opens_the_same_and_attaches_only_what_is_granted() {
        let node = rights(&["volnode:granted/node-1"]);
        assert!(node.may_open("a", Some("node-1")) && node.is_node("node-1"));
        assert!(!node.may_open("a", Some("node-2")) && !node.may_open("a", None));
        assert!(!node.is_node_ungranted("node-1") && !node.is_node("node-2") && !may_manage(&node));
        // Rights add up.
        let both = rights(&["volnode:granted/node-1", "volnode:node/node-1"]);
        assert!(both.is_node_ungranted("node-1"));
        assert_eq!(rights(&["volnode:granted/", "volnode:granted"]), Rights::nothing());
    }

    #[test]
    fn a_role_is_of_all_of_the_server_or_of_a_tenant() {
        let reader = rights(&["volnode:read"]);
        assert_eq!(reader.scope(&[Role::Read], &[]), Some(Scope::All));
        assert_eq!(reader.scope(&[Role::Manage, Role::Attach], &Role::ALL), None);
        assert!(!reader.may_open("a", None));
        let attacher = rights(&["volnode:attach"]);
        assert!(
            attacher.may_open("a", None) && attacher.may_open("acme+db", Some("n")) && !may_manage(&attacher)
        );

        let tenant = rights(&["volnode:tenant/acme/read", "volnode:tenant/b/attach"]);
        assert_eq!(tenant.scope(&Role::ALL, &[Role::Read]), tenants(["acme"]));
        assert_eq!(tenant.scope(&Role::ALL, &[Role::Read, Role::Attach]), tenants(["acme", "b"]));
        assert_eq!(tenant.scope(&Role::ALL, &[Role::Manage]), None);
        assert_eq!(tenant.tenants(), BTreeSet::from(["acme", "b"]));
        assert!(
            tenant.may_open("b+x", None)
                && tenant.may_open("b+x@s", None)
                && !tenant.may_open("acme+db", None)
        );
        assert!(!tenant.may_open("b", None) && !tenant.may_open("@7", None) && !tenant.is_for_a_node());
        assert_eq!(tenant.scope_of_exports(), tenants(["b"]).unwrap());
        assert_eq!(rights(&["volnode:tenant/b/attach", "volnode:volume/a"]).scope_of_exports(), Scope::All);

        let all_of_it = rights(&["volnode:tenant/acme/*"]);
        for role in Role::ALL {
            assert_eq!(all_of_it.scope(&[role], &[role]), tenants(["acme"]));
        }
        for other in [
            "tenant/acme",
            "tenant//read",
            "tenant/acme/",
            "tenant/a+b/read",
            "tenant/*/read",
            "tenant/a/b/read",
        ] {
            assert_eq!(rights(&[&format!("volnode:{other}")]), Rights::nothing(), "{other}");
        }
    }

    #[test]
    fn the_star_and_only_the_star_is_everything() {
        let all = rights(&["volnode:*"]);
        assert!(all.may_open("a", None) && may_manage(&all) && all.scope(&[], &[]) == Some(Scope::All));
        for other in
            ["*", "volnode:", "volnode:**", "volnode:volume", "volnode:volume/", "VOLNODE:*", "http://*"]
        {
            assert_eq!(rights(&[other]), Rights::nothing(), "{other}");
        }
        assert!(!rights(&["volnode:volume/*"]).may_open("a", None), "a star is a name like any other there");
        let manager = rights(&["volnode:manage"]);
        assert!(may_manage(&manager) && !manager.may_open("a", Some("n")));
    }
}
