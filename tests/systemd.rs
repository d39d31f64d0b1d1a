//! Notifications to systemd, and the unit file in `deploy`.

mod support;

use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::time::Duration;

use support::program::{system, tokenway};

/// Time within which a started server must report to systemd.
const WAIT_LIMIT: Duration = Duration::from_secs(30);

fn receive(socket: &UnixDatagram) -> String {
    let mut buffer = [0; 1_024];
    let count = socket.recv(&mut buffer).expect("a notification");
    String::from_utf8_lossy(&buffer[..count])
        .trim_end()
        .to_owned()
}

#[tokio::test]
async fn systemd_learns_when_the_server_is_ready_and_when_it_stops() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("notify");
    let socket = UnixDatagram::bind(&path).expect("a socket");
    let limited = socket.set_read_timeout(Some(WAIT_LIMIT));
    limited.expect("a read timeout");
    let free = "127.0.0.1:0";
    let arguments = ["serve", "--http-listen", free, "--grpc-listen", free];
    let server = tokenway().args(arguments).env("NOTIFY_SOCKET", &path);
    let running = server.args(["--drain-grace", "0"]).start();
    assert_eq!(receive(&socket), "READY=1");
    assert_eq!(running.interrupt().await, Some(0));
    assert_eq!(receive(&socket), "STOPPING=1");
}

/// Skipped on machines without systemd.
#[tokio::test]
async fn systemd_accepts_the_unit_file() {
    let Some(analyze) = system("systemd-analyze") else {
        return;
    };
    let folder = tempfile::tempdir().expect("a temporary folder");
    let unit = Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/tokenway.service");
    let text = std::fs::read_to_string(unit).expect("the unit file");
    // systemd checks that the program exists.
    let text = text.replace("/usr/local/bin/tokenway", env!("CARGO_BIN_EXE_tokenway"));
    let copy = folder.path().join("tokenway.service");
    std::fs::write(&copy, text).expect("a copy of the unit file");
    let outcome = analyze.arg("verify").arg(&copy).run().await;
    let is_about_unit = |line: &&str| line.contains("tokenway.service");
    let problems: Vec<_> = outcome.stderr.lines().filter(is_about_unit).collect();
    assert_eq!((outcome.code, &problems[..]), (Some(0), &[][..]));
}
