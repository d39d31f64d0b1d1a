//! A third-party client and the cases that it runs.

use rustix::process::Signal;

use super::servers::server_process;
use super::support::TestServer;
use super::support::program::Program;

/// A client program in `tests/clients/`, and the API that it uses.
pub(super) struct Client {
    pub(super) program: fn() -> Program,
    pub(super) api: Api,
}

pub(super) enum Api {
    Http,
    Grpc,
}

impl Client {
    /// Runs a case against a server. Asserts that the case passes.
    pub(super) async fn run(&self, case: &str, server: &TestServer) {
        let program = (self.program)().arg(case).arg(self.address(server));
        program.run().await.expect_success();
    }

    pub(super) fn address(&self, server: &TestServer) -> String {
        match self.api {
            Api::Http => server.http_url(),
            Api::Grpc => server.grpc_address(),
        }
    }

    /// Runs a case against a server process. Sends the signal to that process once the case reports that it is
    /// reading a stream.
    pub(super) async fn run_until_signal(&self, case: &str, signal: Signal) {
        let (server, [http, grpc]) = server_process().await;
        let address = match self.api {
            Api::Http => http,
            Api::Grpc => grpc.replace("http://", ""),
        };
        let mut client = (self.program)().arg(case).arg(address).start();
        assert_eq!(client.read_line().await, "reading");
        server.signal(signal);
        assert_eq!(client.wait_for_exit_code().await, Some(0));
    }
}
