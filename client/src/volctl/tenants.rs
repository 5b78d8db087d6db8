//! `tenant …`: how much each tenant may have, and has.

use clap::{Args, Subcommand};
use proto::v1;
use serde_json::{Value, json};
use tonic::Code;

use crate::connect::{self, ServerAddress, call};
use crate::exit_code::ExitCode;
use crate::failure::Failure;
use crate::report::{Report, tables};
use crate::size::{exact_size, human_size, parse_size};
use crate::snapshots::utc;

/// The most that the server gives in one page.
const PAGE_SIZE: u32 = 1000;

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
type Most = Option<u64>;

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
    fn is_empty(self) -> bool {
        [self.max_volumes, self.max_bytes, self.max_snapshots].iter().all(Option::is_none)
    }

    /// What comes of limits that are there.
    fn applied_to(self, quota: v1::TenantQuota) -> v1::TenantQuota {
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

pub(crate) async fn tenant(server: &ServerAddress, command: TenantCommand) -> Result<Report, Failure> {
    match command {
        TenantCommand::Set { tenant, quota } => set(server, tenant, quota).await,
        TenantCommand::List => list(server).await,
        TenantCommand::Show { tenant } => {
            let request = v1::GetTenantRequest { name: tenant };
            Ok(told(&call(connect::server(server).await?.get_tenant(request)).await?))
        }
        TenantCommand::Delete { tenant } => {
            let request = v1::DeleteTenantRequest { name: tenant.clone() };
            let deleted = call(connect::server(server).await?.delete_tenant(request)).await?;
            let text = match deleted.existed {
                true => format!("deleted {tenant}\n"),
                false => format!("there is no tenant {tenant}\n"),
            };
            Ok(Report::new(text, json!({ "name": tenant, "existed": deleted.existed })))
        }
    }
}

async fn set(server: &ServerAddress, name: String, wanted: QuotaArgs) -> Result<Report, Failure> {
    if wanted.is_empty() {
        let next = "give --max-volumes, --max-bytes or --max-snapshots";
        return Err(Failure::new(ExitCode::Usage, "no limit is named".to_owned(), next.to_owned()));
    }
    let mut client = connect::server(server).await?;
    let before = match client.get_tenant(v1::GetTenantRequest { name: name.clone() }).await {
        Ok(tenant) => tenant.into_inner().quota.unwrap_or_default(),
        Err(status) if status.code() == Code::NotFound => v1::TenantQuota::default(),
        Err(status) => return Err(status.into()),
    };
    let quota = Some(wanted.applied_to(before));
    Ok(told(&call(client.set_tenant(v1::SetTenantRequest { name, quota })).await?))
}

async fn list(server: &ServerAddress) -> Result<Report, Failure> {
    let mut client = connect::server(server).await?;
    let (mut tenants, mut page_token) = (Vec::new(), String::new());
    loop {
        let page = client.list_tenants(v1::ListTenantsRequest { page_size: PAGE_SIZE, page_token });
        let page = call(page).await?;
        tenants.extend(page.tenants);
        if page.next_page_token.is_empty() {
            break;
        }
        page_token = page.next_page_token;
    }
    let rows = tenants.iter().map(|tenant| {
        let [volumes, size, snapshots] = words(tenant, human_size);
        let since = match tenant.created_at_ms {
            0 => "-".to_owned(),
            created_at_ms => utc(created_at_ms),
        };
        ([tenant.name.clone(), volumes, size, snapshots], [since])
    });
    let tables = tables(["TENANT", "VOLUMES", "SIZE", "SNAPSHOTS"], ["SET"], rows);
    Ok(Report::of_tables(tables, tenants.iter().map(tenant_json).collect()))
}

/// What a tenant has, and of how much, as people read it: volumes, their sizes together, and snapshots.
fn words(tenant: &v1::Tenant, size: fn(u64) -> String) -> [String; 3] {
    let quota = tenant.quota.unwrap_or_default();
    let of = |has: u64, most: Most, word: fn(u64) -> String| match most {
        Some(most) => format!("{} of {}", word(has), word(most)),
        None => word(has),
    };
    [
        of(tenant.volumes, quota.max_volumes, |number| number.to_string()),
        of(tenant.capacity_bytes, quota.max_bytes, size),
        of(tenant.snapshots, quota.max_snapshots, |number| number.to_string()),
    ]
}

fn told(tenant: &v1::Tenant) -> Report {
    let [volumes, size, snapshots] = words(tenant, exact_size);
    let name = &tenant.name;
    let text = format!("tenant {name}\n  volumes: {volumes}\n  size: {size}\n  snapshots: {snapshots}\n");
    Report::new(text, tenant_json(tenant))
}

fn tenant_json(tenant: &v1::Tenant) -> Value {
    let quota = tenant.quota.unwrap_or_default();
    json!({
        "name": tenant.name,
        "quota": {
            "max_volumes": quota.max_volumes,
            "max_bytes": quota.max_bytes,
            "max_snapshots": quota.max_snapshots,
        },
        "volumes": tenant.volumes,
        "capacity_bytes": tenant.capacity_bytes,
        "snapshots": tenant.snapshots,
        "created_at_ms": tenant.created_at_ms,
    })
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
