//! Counts running requests in the gauges of requests in flight and of lingering requests.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use metrics::Gauge;

/// Counts one request in the gauges of running requests. Clones count the same request.
#[derive(Clone)]
pub(crate) struct RequestGauge(Arc<GaugeState>);

struct GaugeState {
    in_flight: Gauge,
    lingering: Gauge,
    state: AtomicU8,
}

/// State of a request that no gauge counts yet.
const STATE_NEW: u8 = 0;
/// State of a request that the gauge of requests in flight counts.
const STATE_IN_FLIGHT: u8 = 1;
/// State of a request whose slow reader was given up. The client may still read the error record.
const STATE_LINGERING: u8 = 2;
/// State of a request that no gauge counts any more.
const STATE_CLOSED: u8 = 3;

impl RequestGauge {
    pub(super) fn new(in_flight: Gauge, lingering: Gauge) -> Self {
        Self(Arc::new(GaugeState {
            in_flight,
            lingering,
            state: AtomicU8::new(STATE_NEW),
        }))
    }

    pub(super) fn begin(&self) {
        if self.transition(STATE_NEW, STATE_IN_FLIGHT) {
            self.0.in_flight.increment(1.0);
        }
    }

    /// Moves the request from the gauge of requests in flight to the gauge of lingering requests. The request has
    /// ended with `slow_reader`, and its connection stays open only so that the client can read this error.
    pub(crate) fn linger(&self) {
        if self.transition(STATE_IN_FLIGHT, STATE_LINGERING) {
            self.0.in_flight.decrement(1.0);
            self.0.lingering.increment(1.0);
        }
    }

    fn transition(&self, from: u8, to: u8) -> bool {
        let order = Ordering::SeqCst;
        let moved = self.0.state.compare_exchange(from, to, order, order);
        moved.is_ok()
    }

    pub(super) fn is_lingering(&self) -> bool {
        self.0.state.load(Ordering::SeqCst) == STATE_LINGERING
    }

    pub(super) fn close(&self) {
        match self.0.state.swap(STATE_CLOSED, Ordering::SeqCst) {
            STATE_IN_FLIGHT => self.0.in_flight.decrement(1.0),
            STATE_LINGERING => self.0.lingering.decrement(1.0),
            _ => {}
        }
    }
}
