//! Delivery of tokens to the client: from the frontend that writes a token until the connection has flushed the token
//! to its socket. Both frontends use this module to wait for flushes and to measure their duration. This module must
//! not know what is written.

mod flush;
mod meter;
mod timer;

pub use flush::{FlushHandle, FlushTracker};
pub(crate) use meter::TokenMeter;
pub use timer::{DeliverySummary, DeliveryTimer, WriteStart};
