//! The load over a server with a planted fault. Times are asserted from below only.

use std::time::Duration;

use tokenway::runner::monotonic_ns;

use super::{BodyFormat, Load, Session, Sockets, Target};
use crate::arguments::ServerUrl;
use crate::figures::Figures;
use planted::{PlantedServer, Stamp, record, wait_until};

#[path = "../../tests/support/planted.rs"]
mod planted;

const US: u64 = 1_000;
const MS: u64 = 1_000 * US;

/// Figures of one stream of this many tokens.
async fn load(server: &PlantedServer, tokens: u32, timed: bool) -> Figures {
    let target = Target::Http(ServerUrl::at(&server.authority()), BodyFormat::Ndjson);
    let load = Load {
        streams: 1,
        requests: 1,
        tokens,
        timed,
        spread: Duration::ZERO,
    };
    let session = Session::open(&target, Sockets::of(1)).await;
    session.expect("the server listens").run(&load).await
}

#[tokio::test]
async fn a_delay_of_200_us_on_every_token_is_in_every_one_way_latency() {
    let server = PlantedServer::start(|_, response| {
        response.start();
        for index in 0..50 {
            let emitted_ns = monotonic_ns();
            wait_until(emitted_ns + 200 * US);
            let due_ns = emitted_ns;
            response.record(&record(
                index,
                index == 49,
                Some(Stamp { due_ns, emitted_ns }),
            ));
        }
        response.end();
    });
    let figures = load(&server, 50, true).await;
    assert_eq!(figures.faults, Vec::<String>::new());
    let one_way = &figures.times.one_way;
    assert_eq!(one_way.len(), 50);
    // A histogram rounds its smallest value down, to three digits.
    assert!(one_way.min() >= 199 * US, "{}", one_way.min());
}

#[tokio::test]
async fn a_stall_is_counted_against_every_token_that_it_delays() {
    let server = PlantedServer::start(|_, response| {
        response.start();
        let start_ns = monotonic_ns();
        for index in 0..40 {
            let due_ns = start_ns + u64::from(index) * MS;
            wait_until(due_ns.max(start_ns + 30 * MS));
            let emitted_ns = monotonic_ns();
            response.record(&record(
                index,
                index == 39,
                Some(Stamp { due_ns, emitted_ns }),
            ));
        }
        response.end();
    });
    let figures = load(&server, 40, true).await;
    assert_eq!(figures.faults, Vec::<String>::new());
    // Token 0 is 30 ms late, and token 20 still 10 ms.
    let late = |times: &hdrhistogram::Histogram<u64>| times.count_between(10 * MS, 60_000 * MS);
    assert!(late(&figures.times.lateness) >= 21);
    assert!(late(&figures.times.runner) >= 21);
}

#[tokio::test]
async fn a_token_that_is_lost_repeated_or_swapped_is_a_fault() {
    for (indices, fault) in [
        (&[0, 1, 3][..], "expected token_2, got"),
        (&[0, 1, 1, 2, 3], "expected token_2, got"),
        (&[0, 2, 1, 3], "expected token_1, got"),
        (
            &[0, 1, 2],
            "the stream ended after 3 tokens without its last token",
        ),
        (&[0, 1, 2, 3, 4], "more than the requested 4 tokens arrived"),
    ] {
        let figures = load(&PlantedServer::streaming(indices), 4, false).await;
        let found = figures.faults.first().expect("a fault");
        assert!(found.starts_with(fault), "{indices:?}: {found}");
        assert_eq!((figures.fault_count, figures.requests), (1, 0));
    }
}

#[tokio::test]
async fn stamps_of_another_clock_are_a_fault() {
    let server = PlantedServer::start(|_, response| {
        let (due_ns, emitted_ns) = (1, 1);
        response.start();
        response.record(&record(0, true, Some(Stamp { due_ns, emitted_ns })));
        response.end();
    });
    let figures = load(&server, 1, true).await;
    assert_eq!(figures.faults, ["1 stamps are not of this machine's clock"]);
    assert_eq!(figures.times.one_way.len(), 0);
}
