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
//! | `volnode:*` | all of it |
//!
//! A certificate with none of them may do nothing: it was made for something else.

use rustls::pki_types::CertificateDer;
use tls::certificates::uri_names;

const PREFIX: &str = "volnode:";

#[derive(Debug, Clone, PartialEq, Eq)]
enum Grant {
    Everything,
    Manage,
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
            Grant::Everything => true,
            Grant::Manage => false,
            Grant::Volume(name) => name == volume_name,
            Grant::Node(id) | Grant::GrantedNode(id) => node_id == Some(id),
        })
    }

    /// Whether every call of the management API may be made.
    pub fn may_manage(&self) -> bool {
        self.0.iter().any(|grant| matches!(grant, Grant::Everything | Grant::Manage))
    }

    /// Whether volumes may be attached to this node and detached from it; some or all of them, as
    /// [`Self::may_attach_ungranted_to`] says.
    pub fn may_attach_to(&self, node_id: &str) -> bool {
        let is_granted_node = |grant: &Grant| matches!(grant, Grant::GrantedNode(id) if id == node_id);
        self.may_attach_ungranted_to(node_id) || self.0.iter().any(is_granted_node)
    }

    /// Whether also those that are not granted to it.
    pub fn may_attach_ungranted_to(&self, node_id: &str) -> bool {
        self.may_manage() || self.0.iter().any(|grant| matches!(grant, Grant::Node(id) if id == node_id))
    }
}

fn grant(name: &str) -> Option<Grant> {
    match name.strip_prefix(PREFIX)? {
        "*" => Some(Grant::Everything),
        "manage" => Some(Grant::Manage),
        name => match name.split_once('/')? {
            ("volume", volume) if !volume.is_empty() => Some(Grant::Volume(volume.to_owned())),
            ("node", node_id) if !node_id.is_empty() => Some(Grant::Node(node_id.to_owned())),
            ("granted", node_id) if !node_id.is_empty() => Some(Grant::GrantedNode(node_id.to_owned())),
            _ => None,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rights(names: &[&str]) -> Rights {
        Rights(names.iter().filter_map(|name| grant(name)).collect())
    }

    #[test]
    fn a_volume_s_holder_opens_that_volume_only() {
        let holder = rights(&["volnode:volume/a"]);
        assert!(holder.may_open("a", None) && holder.may_open("a", Some("node-1")));
        assert!(!holder.may_open("b", None) && !holder.may_open("", None) && !holder.may_open("a/b", None));
        assert!(!holder.may_manage() && !holder.may_attach_to("a"));
    }

    #[test]
    fn a_node_opens_what_is_attached_to_it() {
        let node = rights(&["volnode:node/node-1"]);
        assert!(node.may_open("a", Some("node-1")));
        assert!(!node.may_open("a", Some("node-2")) && !node.may_open("node-1", None));
        assert!(node.may_attach_to("node-1") && !node.may_attach_to("node-2") && !node.may_manage());
    }

    #[test]
    fn a_granted_node_opens_the_same_and_attaches_only_what_is_granted() {
        let node = rights(&["volnode:granted/node-1"]);
        assert!(node.may_open("a", Some("node-1")) && node.may_attach_to("node-1"));
        assert!(!node.may_open("a", Some("node-2")) && !node.may_open("a", None));
        assert!(
            !node.may_attach_ungranted_to("node-1") && !node.may_attach_to("node-2") && !node.may_manage()
        );
        // Rights add up.
        let both = rights(&["volnode:granted/node-1", "volnode:node/node-1"]);
        assert!(both.may_attach_ungranted_to("node-1"));
        assert_eq!(rights(&["volnode:granted/", "volnode:granted"]), Rights::nothing());
    }

    #[test]
    fn the_star_and_only_the_star_is_everything() {
        let all = rights(&["volnode:*"]);
        assert!(all.may_open("a", None) && all.may_manage() && all.may_attach_to("n"));
        for other in
            ["*", "volnode:", "volnode:**", "volnode:volume", "volnode:volume/", "VOLNODE:*", "http://*"]
        {
            assert_eq!(rights(&[other]), Rights::nothing(), "{other}");
        }
        assert!(!rights(&["volnode:volume/*"]).may_open("a", None), "a star is a name like any other there");
        let manager = rights(&["volnode:manage"]);
        assert!(manager.may_manage() && !manager.may_open("a", Some("n")));
    }
}
