//! Draining: new requests are rejected, running streams may finish, and a stream that takes too long ends with an
//! error.

mod support;

use std::time::Duration;

use serde_json::{Value, json};
use support::http::{BodyEnd, completion, get, http_error};
use support::{Setup, grpc, silent_at, with_interval};
use tokenway::error::{Error, ErrorKind};
use tokio::time::timeout;

#[tokio::test]
async fn a_drain_rejects_new_requests_and_ends_streams_that_take_too_long() {
    let setup = Setup::test_runner(with_interval(Duration::from_millis(5)));
    let grace = Duration::from_secs(1);
    let server = setup.drain(grace, Duration::from_millis(100)).start().await;
    let short = json!({"prompt": "a", "max_tokens": 20, "stream": true});
    let long = json!({"prompt": "a", "max_tokens": 100_000, "stream": true});
    let mut short = completion(&short).send(&server).await;
    let mut long = completion(&long).send(&server).await;
    assert!(short.read_line().await.is_some() && long.read_line().await.is_some());
    let client = server.grpc().await;
    let address = server.http_address();
    let draining = tokio::spawn(server.drain());
    let rejected_in_grace = async {
        loop {
            let response = client.clone().complete(grpc::request("a", 1)).await;
            match response {
                Ok(stream) => drop(grpc::collect(stream.into_inner()).await),
                Err(status) => return Error::from(&status).kind,
            }
        }
    };
    let rejected = timeout(Duration::from_secs(30), rejected_in_grace).await;
    assert_eq!(rejected.expect("the drain starts"), ErrorKind::Draining);
    assert_eq!(short.read_rest().await.end, BodyEnd::Clean);
    let long = long.read_rest().await;
    assert_eq!(long.end, BodyEnd::Unclean);
    let record = long.lines().pop().expect("an error record");
    assert_eq!(record["error"]["code"], "draining");
    draining.await.unwrap().assert_all_gauges_are_zero();
    assert!(tokio::net::TcpStream::connect(address).await.is_err());
}

#[tokio::test]
async fn engines_and_gateways_report_draining_over_http() {
    let engine = Setup::test_runner(with_interval(Duration::ZERO))
        .start()
        .await;
    for setup in [
        Setup::test_runner(with_interval(Duration::ZERO)),
        Setup::gateway(&[&engine]),
    ] {
        let grace = Duration::from_secs(3_600);
        let server = setup.drain(grace, Duration::ZERO).start().await;
        let address = server.http_address();
        let draining = tokio::spawn(server.drain());
        // The runtime has one thread, so the drain has started when this task runs again.
        tokio::task::yield_now().await;
        let body = json!({"prompt": "a", "max_tokens": 1});
        for request in [completion(&body), get("/readyz"), get("/health")] {
            let mut response = request.send_to(&address).await;
            let code = response.read_rest().await.error().0;
            assert_eq!((response.status, code.as_str()), (503, "draining"));
        }
        draining.abort();
    }
}

#[tokio::test]
async fn streams_of_a_gateway_report_that_their_engine_drains() {
    let timeout = Duration::from_millis(1);
    let engine = Setup::test_runner(silent_at(2))
        .drain(Duration::ZERO, timeout)
        .start()
        .await;
    let gateway = Setup::gateway(&[&engine]).start().await;
    let body = json!({"prompt": "a", "max_tokens": 5, "stream": true});
    let mut response = completion(&body).send(&gateway).await;
    assert!(response.read_line().await.is_some());
    assert!(response.read_line().await.is_some());
    engine.drain().await;
    let record: Value = response.read_json_line().await.expect("an error record");
    assert_eq!(record["error"]["code"], "draining");
    assert_eq!(record["error"]["tokens_delivered"], 2);
    assert_eq!(response.read_rest().await.end, BodyEnd::Unclean);
    // The gateway has no engine left that accepts requests.
    let (status, code, _) = http_error(&gateway, completion(&body)).await;
    assert_eq!((status, code.as_str()), (503, "no_worker"));
    gateway.drain().await.assert_all_gauges_are_zero();
}
