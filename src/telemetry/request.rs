//! One request as the metrics count it, from its arrival to its end.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use metrics::Gauge;

use super::{Frontend, ResponseFormat, Telemetry};
use crate::error::{Error, ErrorKind};

/// One request at the API where it entered: in flight while it lives, and its end counted once. One that is dropped
/// before its end was cancelled by its client, or was given up because its client did not read.
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
            stream: StreamCount::new(telemetry.streams(frontend), telemetry.lingering(frontend)),
        }
    }

    /// The request's place in the gauge of streams, for whoever may decide its end before its client reads
    /// that.
    #[must_use]
    pub fn stream(&self) -> StreamCount {
        self.stream.clone()
    }

    /// Counts how the request ended; only the first end counts.
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
            self.ended(Err(&Error::new(kind, "The client went away.")));
        }
        self.stream.close();
    }
}

/// A request on its way to an engine of this process: how its tokens leave, and its place in the gauge of
/// streams.
#[derive(Clone)]
pub struct DeliveryContext {
    /// The path that its tokens take.
    pub format: ResponseFormat,
    /// `None` where nothing counts it.
    pub stream: Option<StreamCount>,
}

/// A request's place in the gauge of streams. Clones are the same place.
#[derive(Clone)]
pub struct StreamCount(Arc<Place>);

struct Place {
    in_flight: Gauge,
    lingering: Gauge,
    state: AtomicU8,
}

/// In flight; ended for its slow reader, which may still read that; over.
const IN_FLIGHT: u8 = 0;
const LINGERING: u8 = 1;
const OVER: u8 = 2;

impl StreamCount {
    fn new(in_flight: Gauge, lingering: Gauge) -> Self {
        in_flight.increment(1.0);
        Self(Arc::new(Place {
            in_flight,
            lingering,
            state: AtomicU8::new(IN_FLIGHT),
        }))
    }

    /// The request's reader was given up. It is no longer in flight, though its connection may stay open so
    /// that the reader can learn why.
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
        match self.0.state.swap(OVER, Ordering::SeqCst) {
            IN_FLIGHT => self.0.in_flight.decrement(1.0),
            LINGERING => self.0.lingering.decrement(1.0),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gauges(telemetry: &Telemetry) -> [bool; 2] {
        let text = telemetry.render();
        ["in_flight", "lingering"]
            .map(|name| text.contains(&format!("tokenway_requests_{name}{{frontend=\"http\"}} 1")))
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
