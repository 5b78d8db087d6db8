//! The options of `tenant …`.
//!
//! Owns what a limit is on the command line: a number, or `none`. Used by `cli.rs`, and by `tenants.rs`, which makes calls of them.

use clap::{Args, Subcommand};
use proto::v1;

use crate::size::parse_size;

#[derive(Debug, Subcommand)]
pub(crate) enum TenantCommand {
    /// Limit what a tenant may have; what is left out stays as it is
    ///
    /// A tenant's volumes are called TENANT+NAME. It needs no such command: without one there is no limit. What it has already stays.
    Set {
        /// The tenant's name
        tenant: String,
        #[command(flatten)]
        quota: QuotaArgs,
    },
    /// List the tenants that have a limit, or a volume or snapshot
    List,
    /// Show what one tenant may have, and has
    Show {
        /// The tenant's name
        tenant: String,
    },
    /// Take a tenant's limits away, when it has no volumes and snapshots any more; one that has none is a success
    Delete {
        /// The tenant's name
        tenant: String,
    },
}

/// A limit; `None` is none.
pub(crate) type Most = Option<u64>;

#[derive(Debug, Clone, Copy, Args)]
pub(crate) struct QuotaArgs {
    /// Volumes at most; none takes the limit away
    #[arg(long, value_name = "NUMBER", value_parser = parse_number)]
    max_volumes: Option<Limit>,
    /// The sizes of all volumes together at most, such as 10T; none takes the limit away
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes)]
    max_bytes: Option<Limit>,
    /// Snapshots at most; none takes the limit away
    #[arg(long, value_name = "NUMBER", value_parser = parse_number)]
    max_snapshots: Option<Limit>,
}

/// What a limit becomes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Limit(Most);

impl QuotaArgs {
    /// Whether no limit is named.
    pub(crate) fn is_empty(self) -> bool {
        [self.max_volumes, self.max_bytes, self.max_snapshots].iter().all(Option::is_none)
    }

    /// What comes of limits that are there.
    pub(crate) fn applied_to(self, quota: v1::TenantQuota) -> v1::TenantQuota {
        let of = |limit: Option<Limit>, before: Most| limit.map_or(before, |limit| limit.0);
        v1::TenantQuota {
            max_volumes: of(self.max_volumes, quota.max_volumes),
            max_bytes: of(self.max_bytes, quota.max_bytes),
            max_snapshots: of(self.max_snapshots, quota.max_snapshots),
        }
    }
}

fn parse_number(text: &str) -> Result<Limit, String> {
    match text {
        "none" => Ok(Limit(None)),
        number => number
            .parse()
            .map(|number| Limit(Some(number)))
            .map_err(|_| "write a whole number, or none".to_owned()),
    }
}

fn parse_bytes(text: &str) -> Result<Limit, String> {
    if text == "none" { Ok(Limit(None)) } else { parse_size(text).map(|bytes| Limit(Some(bytes))) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_out_stays_and_none_takes_a_limit_away() {
        let before = v1::TenantQuota { max_volumes: Some(5), max_bytes: Some(6), max_snapshots: None };
        let wanted = QuotaArgs {
            max_volumes: Some(parse_number("none").unwrap()),
            max_bytes: None,
            max_snapshots: Some(parse_number("0").unwrap()),
        };
        let after = wanted.applied_to(before);
        assert_eq!((after.max_volumes, after.max_bytes, after.max_snapshots), (None, Some(6), Some(0)));
        assert_eq!(parse_bytes("2K"), Ok(Limit(Some(2048))));
        assert!(parse_number("-1").is_err() && parse_bytes("x").is_err() && !wanted.is_empty());
    }
}
