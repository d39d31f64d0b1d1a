//! Tests with a plain HTTP client in Python.

use super::client::{Api, Client};
use super::servers::{failing_server, server};
use super::support::program::python;

const PLAIN_HTTP: Client = Client {
    program: || python("tests/clients/plain_http.py"),
    api: Api::Http,
};

cases! { PLAIN_HTTP:
    a_client_that_accepts_anything_gets_one_line_per_token(server());
    a_failing_stream_has_an_error_record_and_then_raises(failing_server());
}
