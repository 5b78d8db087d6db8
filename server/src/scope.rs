//! Of which volumes somebody hears: all, or those in the name spaces of some tenants.
//!
//! Owns the one rule: what is outside a caller's scope is not there for it. A snapshot, an attachment, a grant and a change belong to the
//! tenant of their volume. Made by `tls/rights.rs` of a certificate; asked by `management/`, the data side, and the catalog's queries.

use std::collections::BTreeSet;
use std::sync::Arc;

use proto::volume_name::tenant_of;

/// Of which volumes somebody hears.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Scope {
    /// Of all, whoever's they are.
    All,
    /// Of those in the name spaces of these tenants.
    Tenants(Arc<BTreeSet<String>>),
}

impl Scope {
    /// Whether it is a scope for all of the server.
    pub fn is_all(&self) -> bool {
        *self == Self::All
    }

    /// Whether it has what belongs to this tenant; empty: to none.
    pub fn has(&self, tenant: &str) -> bool {
        match self {
            Self::All => true,
            Self::Tenants(tenants) => tenants.contains(tenant),
        }
    }

    /// Whether it has the volume of this name, or the snapshot that is opened by it.
    pub fn has_named(&self, name: &str) -> bool {
        self.has(tenant_of(name))
    }

    /// For a query: the tenants as a JSON array; `None` is all.
    pub(crate) fn for_query(&self) -> Option<String> {
        match self {
            Self::All => None,
            Self::Tenants(tenants) => Some(serde_json::json!(**tenants).to_string()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tenant_s_scope_has_its_name_space_and_nothing_else() {
        let scope = Scope::Tenants(Arc::new(BTreeSet::from(["acme".to_owned(), "b".to_owned()])));
        for inside in ["acme+db", "acme+db@s", "b+x"] {
            assert!(scope.has_named(inside), "{inside}");
        }
        for outside in ["db", "acme", "acme.b+db", "", "@7", "+db", "x+acme"] {
            assert!(!scope.has_named(outside), "{outside}");
        }
        assert_eq!(scope.for_query().as_deref(), Some(r#"["acme","b"]"#));
        assert!(!scope.is_all() && Scope::All.has("") && Scope::All.has_named("acme+db"));
        assert_eq!(Scope::All.for_query(), None);
    }
}
