//! The last part of a token's path: a frontend writes it, and the connection flushes it to the socket. Both frontends
//! use this module to learn when their output has been flushed and how long that took. It must not know what is
//! written.

mod flush;
mod meter;
mod timer;

pub use flush::{FlushHandle, FlushTracker};
pub use meter::TokenMeter;
pub use timer::{DeliverySummary, DeliveryTimer, WriteStart};
