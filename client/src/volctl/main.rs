//! volctl: the command line of volnode.
//!
//! Owns: running one command, printing its report, and turning its failure into two lines on stderr and an exit code.
//! Never: state; secrets (the programs it talks to give it none), but a passphrase on its way to the node daemon. stdout carries the result and nothing else, so that it
//! can be piped; a reader that stops reading is no error.

mod apply;
mod attachments;
mod cli;
mod connect;
mod diff;
mod doctor;
mod duration;
mod events;
mod exit_code;
mod failure;
mod frozen_snapshot;
mod grants;
mod image;
mod nodes;
mod once;
mod operations;
mod output;
mod passphrase;
mod report;
mod settings;
mod size;
mod snapshots;
mod tenant_args;
mod tenants;
mod volumes;
mod watch;

use std::io::{self, Write as _};
use std::process::ExitCode as ProcessExitCode;

use clap::Parser as _;
use client::tls_spec::ClientFiles;

use crate::cli::{Cli, Command, SnapshotCommand};
use crate::connect::ServerAddress;
use crate::failure::Failure;
use crate::report::Report;

fn main() -> ProcessExitCode {
    let cli = Cli::parse();
    let output = cli.output;
    if let Command::ImageProgram(args) = cli.command {
        // While there is one thread.
        return image::become_program(args);
    }
    let outcome = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => {
            let outcome = runtime.block_on(run(cli));
            // Whoever reads from a pipe into which nobody writes is not waited for.
            runtime.shutdown_background();
            outcome
        }
        Err(error) => Err(Failure::other(format!("cannot start: {error}"))),
    };
    let outcome = outcome.and_then(|report| report.print(output).map(|()| report.exit_code));
    match outcome {
        Ok(exit_code) => exit_code.into(),
        Err(failure) => {
            // Whoever closed stderr does not want to know.
            io::stderr().write_all(failure.to_string().as_bytes()).ok();
            failure.exit_code.into()
        }
    }
}

async fn run(cli: Cli) -> Result<Report, Failure> {
    let tls_files = ClientFiles::named(cli.tls_ca, cli.tls_cert, cli.tls_key);
    let tls_files = tls_files.map_err(|error| Failure::other(format!("--tls-ca: {error}")))?;
    let (server, socket) = (&ServerAddress { uri: cli.server, tls_files }, cli.socket.as_path());
    match cli.command {
        Command::Create(args) => volumes::create(server, args).await,
        Command::Apply(args) => apply::apply(server, args, cli.output).await,
        Command::List { labels } => volumes::list(server, labels).await,
        Command::Show { name } => volumes::show(server, name).await,
        Command::Set(args) => settings::set(server, args).await,
        Command::Rename { name, new_name, only } => settings::rename(server, name, new_name, only).await,
        Command::Limit { name, limits, only } => settings::limit(server, name, limits, only).await,
        Command::Resize { name, size, only } => volumes::resize(server, name, size, only).await,
        Command::Delete { name, keep_snapshots, only } => {
            volumes::delete(server, name, keep_snapshots, only).await
        }
        Command::Snapshot { command: SnapshotCommand::Create { volumes, name, freeze: true } } => {
            frozen_snapshot::create(server, socket, volumes, name).await
        }
        Command::Snapshot { command } => snapshots::snapshot(server, command).await,
        Command::Operation { command } => operations::operation(server, command).await,
        Command::Node { command } => nodes::node(server, command).await,
        Command::Grant { command } => grants::grant(server, command).await,
        Command::Tenant { command } => tenants::tenant(server, command).await,
        Command::Clone(args) => snapshots::clone(server, args).await,
        Command::Diff { base, target } => diff::diff(server, base, target, cli.output).await,
        Command::Import(args) => image::import(server, args).await,
        Command::Export(args) => image::export(server, args).await,
        Command::ImageProgram(_) => Err(Failure::other("it was to be another program")),
        Command::Attach(args) => attachments::attach(socket, args).await,
        Command::Passphrase(args) => passphrase::change(socket, args).await,
        Command::Detach { target, force, .. } => attachments::detach(socket, target, force).await,
        Command::Policy { target, stall, .. } => attachments::set_policy(socket, target, stall).await,
        Command::Upgrade { target, .. } => attachments::upgrade(socket, target).await,
        Command::Events { follow } => events::events(socket, follow, cli.output).await,
        Command::Watch(args) => watch::watch(server, args, cli.output).await,
        Command::Attachments => attachments::list(socket).await,
        Command::Version => Ok(doctor::version(server, socket).await),
        Command::Doctor => Ok(doctor::doctor(server, socket).await),
    }
}
