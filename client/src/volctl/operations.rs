//! `operation …`: what goes on behind the storage server's calls, and has ended within the last hour.

use std::time::Duration;

use proto::v1;
use proto::v1::management_client::ManagementClient;
use serde_json::{Value, json};
use tonic::transport::Channel;

use crate::cli::OperationCommand;
use crate::connect::{self, ServerAddress, call};
use crate::exit_code::ExitCode;
use crate::failure::Failure;
use crate::report::{Report, or_dash, properties, tables};
use crate::size::human_size;
use crate::snapshots::utc;

/// Between two looks at an operation.
const LOOK_INTERVAL: Duration = Duration::from_millis(250);

pub(crate) async fn operation(server: &ServerAddress, command: OperationCommand) -> Result<Report, Failure> {
    let mut client = connect::server(server).await?;
    match command {
        OperationCommand::List => list(&mut client).await,
        OperationCommand::Show { operation_id } => {
            let operation = call(client.get_operation(v1::GetOperationRequest { operation_id })).await?;
            Ok(shown(&operation))
        }
        OperationCommand::Cancel { operation_id } => cancel(&mut client, operation_id).await,
    }
}

async fn list(client: &mut ManagementClient<Channel>) -> Result<Report, Failure> {
    let operations = call(client.list_operations(v1::ListOperationsRequest {})).await?.operations;
    let rows = operations.iter().map(|operation| {
        let row = [
            operation.operation_id.clone(),
            operation.kind.clone(),
            operation.targets.join(","),
            state_word(operation.state()).to_owned(),
            progress(operation),
            utc(operation.started_at_ms),
        ];
        let ended = if operation.ended_at_ms == 0 { "-".to_owned() } else { utc(operation.ended_at_ms) };
        (row, [ended, or_dash(&operation.error_reason), or_dash(&operation.error_message)])
    });
    let tables =
        tables(["ID", "KIND", "TARGETS", "STATE", "DONE", "STARTED"], ["ENDED", "REASON", "ERROR"], rows);
    Ok(Report::of_tables(tables, operations.iter().map(operation_json).collect()))
}

fn shown(operation: &v1::Operation) -> Report {
    let mut rows = vec![
        ("operation id", operation.operation_id.clone()),
        ("kind", operation.kind.clone()),
        ("targets", operation.targets.join(", ")),
        ("state", state_word(operation.state()).to_owned()),
        ("done", progress(operation)),
        ("started", utc(operation.started_at_ms)),
    ];
    if operation.ended_at_ms != 0 {
        rows.push(("ended", utc(operation.ended_at_ms)));
    }
    if !operation.error_message.is_empty() {
        rows.push(("error", format!("{} ({})", operation.error_message, operation.error_reason)));
    }
    if !operation.next.is_empty() {
        rows.push(("next", operation.next.clone()));
    }
    Report::new(properties(rows), operation_json(operation))
}

/// To its end: then nothing is left of what it did.
async fn cancel(client: &mut ManagementClient<Channel>, operation_id: String) -> Result<Report, Failure> {
    let request = v1::CancelOperationRequest { operation_id: operation_id.clone() };
    let mut operation = call(client.cancel_operation(request)).await?;
    while operation.state() == v1::OperationState::Running {
        tokio::time::sleep(LOOK_INTERVAL).await;
        let request = v1::GetOperationRequest { operation_id: operation_id.clone() };
        operation = call(client.get_operation(request)).await?;
    }
    match operation.state() {
        v1::OperationState::Succeeded => Err(Failure::new(
            ExitCode::Precondition,
            format!("the {} operation {operation_id} has succeeded already", operation.kind),
            format!("delete what it made, if it is not wanted: {}", operation.targets.join(", ")),
        )),
        state => {
            let text = format!("the {} operation {operation_id} is {}\n", operation.kind, state_word(state));
            Ok(Report::new(text, operation_json(&operation)))
        }
    }
}

/// What is done, in words.
fn progress(operation: &v1::Operation) -> String {
    format!("{} of {}", human_size(operation.done_bytes), human_size(operation.total_bytes))
}

/// An operation, as JSON.
fn operation_json(operation: &v1::Operation) -> Value {
    json!({
        "operation_id": operation.operation_id,
        "kind": operation.kind,
        "targets": operation.targets,
        "state": state_word(operation.state()),
        "done_bytes": operation.done_bytes,
        "total_bytes": operation.total_bytes,
        "error_reason": operation.error_reason,
        "error_message": operation.error_message,
        "next": operation.next,
        "started_at_ms": operation.started_at_ms,
        "ended_at_ms": operation.ended_at_ms,
    })
}

/// `running`, `succeeded`, `failed` or `cancelled`.
fn state_word(state: v1::OperationState) -> &'static str {
    match state {
        v1::OperationState::Unspecified => "unknown",
        v1::OperationState::Running => "running",
        v1::OperationState::Succeeded => "succeeded",
        v1::OperationState::Failed => "failed",
        v1::OperationState::Cancelled => "cancelled",
    }
}
