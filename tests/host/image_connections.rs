//! Images over TLS, and through restarts of the server that has their volumes.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::images::{Bench, MIB, dense, journal_bytes, told};

/// A copy that has been begun, and is in the middle of it: its journal has some MiB of what its limit makes take ten seconds.
fn begun(mut command: Command, journals: &Path) -> Child {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let deadline = Instant::now() + Duration::from_secs(60);
    while journal_bytes(journals) < 512 + 2 * 40 {
        assert!(child.try_wait().unwrap().is_none(), "it has ended");
        assert!(Instant::now() < deadline, "it does not get on");
        std::thread::sleep(Duration::from_millis(2));
    }
    child
}

/// The JSON of a copy that has lost its server on the way.
fn ended(child: Child) -> Value {
    let output = child.wait_with_output().unwrap();
    let told = told(&output);
    assert!(output.status.success() && told.contains("trying again"), "{told}");
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn images_move_over_tls_and_through_restarts_of_the_server() {
    let mut bench = Bench::over_tls();
    let bytes = dense(&bench.path("in.img"), 24 * MIB, 41);
    bench.done(&["create", "vol", "--size", "24M", "--write-bandwidth", "2M", "--read-bandwidth", "2M"]);
    let import = ["import", "in.img", "vol", "--checkpoint-bytes", "1M", "--no-verify", "--output", "json"];
    let running = begun(bench.volctl(&import), &bench.path("state/volnode/images"));
    bench.restart_server();
    bench.done(&["limit", "vol", "--write-bandwidth", "none"]);
    let imported = ended(running);
    assert!(imported["resumed_bytes"].as_u64().unwrap() > 0, "{imported}");
    let export = ["export", "vol", "out.img", "--checkpoint-bytes", "1M", "--output", "json"];
    let running = begun(bench.volctl(&export), bench.directory.path());
    bench.restart_server();
    bench.done(&["limit", "vol", "--read-bandwidth", "none"]);
    let exported = ended(running);
    assert_eq!((&exported["digest"], &exported["verified"]), (&imported["digest"], &Value::from(true)));
    assert!(fs::read(bench.path("out.img")).unwrap() == bytes, "what was exported differs");
    // Another server's export, as it is named by a URI.
    bench.done(&["create", "second", "--size", "24M"]);
    let uri = format!("nbds://localhost:{}/second", bench.server.data.port());
    assert_eq!(bench.done(&["export", "vol", &uri])["digest"], imported["digest"]);
    assert_eq!(bench.done(&["import", &uri, "third", "--create"])["digest"], imported["digest"]);
    let mut unknown = bench.volctl(&["import", &uri, "fourth", "--create"]);
    let stranger = bench.path("server-cert.pem");
    let unknown = unknown.env("VOLNODE_TLS_CA", stranger).output().unwrap();
    assert_ne!(unknown.status.code(), Some(0), "{}", told(&unknown));
}
