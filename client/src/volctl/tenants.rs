//! `tenant …`: how much each tenant may have, and has.

use proto::v1;
use serde_json::{Value, json};
use tonic::Code;

use crate::connect::{self, ServerAddress, call};
use crate::exit_code::ExitCode;
use crate::failure::Failure;
use crate::report::{Report, tables};
use crate::size::{exact_size, human_size};
use crate::snapshots::utc;
use crate::tenant_args::{Most, QuotaArgs, TenantCommand};

/// The most that the server gives in one page.
const PAGE_SIZE: u32 = 1000;

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
