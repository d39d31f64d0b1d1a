//! The metrics of one request, from its arrival to its end.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use metrics::Gauge;

use super::{Frontend, ResponseFormat, Telemetry};
use crate::error::{Error, ErrorKind};

/// Counts a request at the API where it arrived: as in flight until it is dropped, and its outcome once.
///
/// A request that is dropped before [`Self::ended`] counts as `slow_reader` if its stream lingers, and otherwise as
/// cancelled by its client.
pub struct CountedRequest {
    telemetry: Telemetry,
    frontend: Frontend,
    ended: bool,
    stream: StreamCount,
}

impl CountedRequest {
    pub(super) fn new(telemetry: &Telemetry, frontend: Frontend) -> Self {
        Self {
            telemetry: telemetry.clone(),
            frontend,
            ended: false,
            stream: StreamCount::new(
                telemetry.requests_in_flight(frontend),
                telemetry.requests_lingering(frontend),
            ),
        }
    }

    /// Returns the request's part of the gauges, for code that may end the request before its client has read the end.
    #[must_use]
    pub fn stream(&self) -> StreamCount {
        self.stream.clone()
    }

    /// Counts the outcome of the request. Only the first call has an effect.
    pub fn ended(&mut self, outcome: Result<(), &Error>) {
        if !self.ended {
            self.ended = true;
            self.telemetry.request_ended(self.frontend, outcome);
        }
    }
}

impl Drop for CountedRequest {
    fn drop(&mut self) {
        if !self.ended {
            let kind = if self.stream.is_lingering() {
                ErrorKind::SlowReader
            } else {
                self.telemetry.cancellations.increment(1);
                ErrorKind::Cancelled
            };
            self.ended(Err(&Error::new(kind, "The client disconnected.")));
        }
        self.stream.close();
    }
}

/// The metrics context of a request that the HTTP API passes to the engine of this process.
#[derive(Clone)]
pub struct DeliveryContext {
    /// The format of the response.
    pub format: ResponseFormat,
    /// The request's part of the gauges. `None` if the request is not counted.
    pub stream: Option<StreamCount>,
}

/// A request's part of the gauges of in-flight and lingering requests. Clones share it.
#[derive(Clone)]
pub struct StreamCount(Arc<Shared>);

struct Shared {
    in_flight: Gauge,
    lingering: Gauge,
    state: AtomicU8,
}

/// The request has not ended.
const IN_FLIGHT: u8 = 0;
/// The request ended because of its slow reader, and its connection is still open.
const LINGERING: u8 = 1;
/// The request is in neither gauge.
const CLOSED: u8 = 2;

impl StreamCount {
    fn new(in_flight: Gauge, lingering: Gauge) -> Self {
        in_flight.increment(1.0);
        Self(Arc::new(Shared {
            in_flight,
            lingering,
            state: AtomicU8::new(IN_FLIGHT),
        }))
    }

    /// Moves the request from in flight to lingering: it ended because of its slow reader, and its connection stays
    /// open so that the reader can receive the error.
    pub fn linger(&self) {
        let order = Ordering::SeqCst;
        let state = &self.0.state;
        if state
            .compare_exchange(IN_FLIGHT, LINGERING, order, order)
            .is_ok()
        {
            self.0.in_flight.decrement(1.0);
            self.0.lingering.increment(1.0);
        }
    }

    fn is_lingering(&self) -> bool {
        self.0.state.load(Ordering::SeqCst) == LINGERING
    }

    fn close(&self) {
        match self.0.state.swap(CLOSED, Ordering::SeqCst) {
            IN_FLIGHT => self.0.in_flight.decrement(1.0),
            LINGERING => self.0.lingering.decrement(1.0),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns whether the gauges of in-flight and of lingering requests are 1.
    fn gauges(telemetry: &Telemetry) -> [bool; 2] {
        let text = telemetry.render();
        ["in_flight", "lingering"]
            .map(|name| text.contains(&format!("tokenway_requests_{name}{{api=\"http\"}} 1")))
    }

    #[test]
    fn a_request_with_a_slow_reader_counts_as_lingering_until_it_is_dropped() {
        let telemetry = Telemetry::new();
        let request = telemetry.track_request(Frontend::Http);
        let stream = request.stream();
        assert_eq!(gauges(&telemetry), [true, false]);
        stream.linger();
        stream.linger();
        assert_eq!(gauges(&telemetry), [false, true]);
        drop(request);
        stream.linger();
        assert_eq!(gauges(&telemetry), [false, false]);
        let text = telemetry.render();
        assert!(text.contains("outcome=\"slow_reader\"} 1"), "{text}");
        assert!(!text.contains("outcome=\"cancelled\""), "{text}");
    }
}
