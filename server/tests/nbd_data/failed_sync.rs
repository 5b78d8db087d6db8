//! What a server says when its storage cannot make durable what it was given.

use proto::export_name::ExportDescription;
use proto::nbd::transmission::{Command, CommandFlags, NbdError};
use server::backend::file::CacheMode;
use server::data::config::DataServerConfig;

use super::client::Client;
use super::support::{FragileServer, wait_until};

#[test]
fn after_a_failed_sync_nothing_is_flushed_until_the_volume_was_opened_anew() {
    let buffered = |config: &mut DataServerConfig| config.cache = CacheMode::Buffered;
    let Some(fragile) = FragileServer::start_with(buffered) else { return };
    let server = &fragile.server;
    let volume = server.create("vol", 16 << 20);
    let attachment = server.attach(&volume, false);
    let before = server.data.storage_incarnation(&volume);
    let mut clients: Vec<Client> = (0..3).map(|slot| server.open(&attachment, 1, slot)).collect();
    clients[0].write(0, &[1; 4096]).unwrap();
    if !fragile.fail_syncs() {
        return;
    }
    let eio = Err(NbdError::Eio as u32);
    // All at once: none of them may have its success from the other's error.
    for client in &mut clients {
        client.send(Command::Flush, CommandFlags::NONE, 0, 0, &[]);
        client.send(Command::Flush, CommandFlags::NONE, 0, 0, &[]);
    }
    for client in &mut clients {
        for _ in 0..2 {
            assert_eq!(client.receive().unwrap().error, NbdError::Eio as u32);
        }
        assert_eq!(client.flush(), eio);
    }
    // A reconnection while others have the volume is served by the same, failed one.
    let mut again = server.open(&attachment, 1, 0);
    assert_eq!(again.flush(), eio);
    drop((clients, again));
    wait_until("the incarnation is raised", || {
        let volume = server.catalog.volume_by_uid(volume.volume_uid).unwrap().unwrap();
        server.data.storage_incarnation(&volume) != before
    });
    // Only then is it opened anew, and not the failed one given once more.
    wait_until("nobody has it open", || server.data.connections_of_volume(volume.volume_uid) == 0);
    fragile.mend();
    let mut anew = server.open(&attachment, 1, 0);
    let description: ExportDescription = anew.info.description.as_deref().unwrap().parse().unwrap();
    assert_ne!(description.incarnation, before, "the client is told");
    anew.write(0, &[2; 4096]).unwrap();
    anew.flush().unwrap();
}
