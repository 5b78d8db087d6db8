//! How much a volume has alone takes long to find out: no other call waits for those who ask.

use std::sync::Condvar;
use std::time::Instant;

use proto::v1::{self, management_client::ManagementClient};
use tonic::Request;

use super::*;

const LONG: Duration = Duration::from_secs(60);

/// Where walks wait until the test lets them go, and how many are under way.
#[derive(Debug, Default)]
pub(super) struct Gate {
    state: Mutex<(usize, bool)>,
    changed: Condvar,
}

impl Gate {
    /// Waits there.
    pub(super) fn pass(&self) {
        let mut state = self.state.lock().unwrap();
        state.0 += 1;
        self.changed.notify_all();
        while !state.1 {
            state = self.changed.wait(state).unwrap();
        }
        state.0 -= 1;
    }

    fn open(&self) {
        self.state.lock().unwrap().1 = true;
        self.changed.notify_all();
    }

    fn under_way(&self) -> usize {
        self.state.lock().unwrap().0
    }
}

fn administrator(mut request: Request<()>) -> Result<Request<()>, tonic::Status> {
    use crate::advertised::ReachedAt;
    use crate::management::listener::ApiPeer;
    use crate::tls::rights::Rights;

    let rights = Arc::new(Rights::everything());
    request.extensions_mut().insert(ApiPeer {
        rights,
        reached_at: ReachedAt::Socket,
        identity: Arc::default(),
    });
    Ok(request)
}

#[test]
fn no_call_waits_for_those_that_look_at_all_extents() {
    let (bench, _) = Bench::with_volume();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(others_go_on(&bench));
}

async fn others_go_on(bench: &Bench) {
    // The API itself, which is above what is tested here.
    use crate::advertised::Advertised;
    use crate::management::{Calls, ManagementService};

    const ASKED: usize = 40;
    let gate = Arc::new(Gate::default());
    let waits = Arc::clone(&gate);
    bench.double().change(|state| state.walk = Some(waits));
    let advertised = Advertised::new(Vec::new(), Vec::new());
    let service = ManagementService::new(bench.lifecycle.clone(), Calls::default(), advertised, None);
    let client = ManagementClient::with_interceptor(service, administrator);
    let request = v1::GetVolumeRequest { name: "vol-1".to_owned(), with_exclusive_bytes: true };
    let asked: Vec<_> = (0..ASKED)
        .map(|_| {
            let (mut client, request) = (client.clone(), request.clone());
            tokio::spawn(async move { client.get_volume(request).await.unwrap().into_inner() })
        })
        .collect();
    let give_up = Instant::now() + LONG;
    while gate.under_way() == 0 {
        assert!(Instant::now() < give_up, "one is under way");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let create =
        v1::CreateVolumeRequest { name: "vol-2".to_owned(), capacity_bytes: 4096, ..Default::default() };
    let mut other = client.clone();
    let made = tokio::time::timeout(LONG, other.create_volume(create)).await;
    let under_way = gate.under_way();
    gate.open();
    assert!(made.is_ok_and(|made| made.is_ok()), "a volume is made meanwhile");
    assert!(under_way < ASKED / 2, "{under_way} threads wait");
    for asked in asked {
        assert_eq!(asked.await.unwrap().exclusive_bytes, Some(4096));
    }
}
