//! A server that is told to end: what is refused, what is waited for, and what is cut short.

mod support;

use std::time::Duration;

use serde_json::{Value, json};
use support::http::{End, completion, get, refusal};
use support::{Setup, every, grpc, silent_at};
use tokenway::error::{Error, ErrorKind};

#[tokio::test]
async fn a_server_that_drains_refuses_new_work_and_ends_what_takes_too_long() {
    let setup = Setup::test_runner(every(Duration::from_millis(5)));
    let grace = Duration::from_secs(1);
    let server = setup.drain(grace, Duration::from_millis(100)).start().await;
    let short = json!({"prompt": "a", "max_tokens": 20, "stream": true});
    let long = json!({"prompt": "a", "max_tokens": 100_000, "stream": true});
    let mut short = completion(&short).send(&server).await;
    let mut long = completion(&long).send(&server).await;
    assert!(short.line().await.is_some() && long.line().await.is_some());
    let client = server.grpc().await;
    let address = server.http_address();
    let draining = tokio::spawn(server.drain());
    let refused_in_grace = async {
        loop {
            let answer = client.clone().complete(grpc::request("a", 1)).await;
            match answer {
                Ok(stream) => drop(grpc::collect(stream.into_inner()).await),
                Err(status) => return Error::from(&status).kind,
            }
        }
    };
    assert_eq!(refused_in_grace.await, ErrorKind::Draining);
    assert_eq!(short.rest().await.end, End::Clean);
    let long = long.rest().await;
    assert_eq!(long.end, End::Unclean);
    let record = long.lines().pop().expect("a record");
    assert_eq!(record["error"]["code"], "draining");
    draining.await.unwrap().assert_nothing_is_left();
    assert!(tokio::net::TcpStream::connect(address).await.is_err());
}

#[tokio::test]
async fn whatever_makes_the_tokens_the_http_door_says_that_it_drains() {
    let engine = Setup::test_runner(every(Duration::ZERO)).start().await;
    for setup in [
        Setup::test_runner(every(Duration::ZERO)),
        Setup::gateway(&[&engine]),
    ] {
        let grace = Duration::from_secs(3_600);
        let server = setup.drain(grace, Duration::ZERO).start().await;
        let address = server.http_address();
        let draining = tokio::spawn(server.drain());
        // On this one thread it has begun to drain when it is our turn again.
        tokio::task::yield_now().await;
        let body = json!({"prompt": "a", "max_tokens": 1});
        for request in [completion(&body), get("/readyz"), get("/health")] {
            let mut response = request.send_to(&address).await;
            let code = response.rest().await.error().0;
            assert_eq!((response.status, code.as_str()), (503, "draining"));
        }
        draining.abort();
    }
}

#[tokio::test]
async fn an_engine_that_drains_under_a_gateway_tells_its_streams_so() {
    let abandoned = Duration::from_millis(1);
    let engine = Setup::test_runner(silent_at(2))
        .drain(Duration::ZERO, abandoned)
        .start()
        .await;
    let gateway = Setup::gateway(&[&engine]).start().await;
    let body = json!({"prompt": "a", "max_tokens": 5, "stream": true});
    let mut response = completion(&body).send(&gateway).await;
    assert!(response.line().await.is_some());
    assert!(response.line().await.is_some());
    engine.drain().await;
    let record: Value = response.json_line().await.expect("a record");
    assert_eq!(record["error"]["code"], "draining");
    assert_eq!(record["error"]["tokens_delivered"], 2);
    assert_eq!(response.rest().await.end, End::Unclean);
    // Nobody is left to ask.
    let (status, code, _) = refusal(&gateway, completion(&body)).await;
    assert_eq!((status, code.as_str()), (503, "no_worker"));
    gateway.drain().await.assert_nothing_is_left();
}
